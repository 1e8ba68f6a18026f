/* Memory: a chain of pointers over 64 MiB, memcpy, and four loops over long arrays of doubles. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#define LINE 64
#define CHAIN_BYTES (64u << 20)

struct link {
    struct link *next;
    uint64_t value;
    char rest[LINE - sizeof(void *) - sizeof(uint64_t)];
};

int chase(void)
{
    size_t count = CHAIN_BYTES / sizeof(struct link);
    struct link *links = aligned_alloc(LINE, CHAIN_BYTES);
    uint32_t *order = malloc(count * sizeof *order);
    uint64_t state = 88172645463325252ULL, sum = 0;
    if (!links || !order)
        return 1;
    for (size_t i = 0; i < count; i++)
        order[i] = (uint32_t)i;
    for (size_t i = count - 1; i > 0; i--) {
        size_t other = next(&state) % (i + 1);
        uint32_t kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
    for (size_t i = 0; i < count; i++) {
        links[order[i]].next = &links[order[(i + 1) % count]];
        links[order[i]].value = i;
    }
    const struct link *at = links;
    for (int i = 0; i < 8000000; i++) {
        sum += at->value;
        at = at->next;
    }
    show(sum);
    return 0;
}

#define COPY_BYTES (16u << 20)

int copy(void)
{
    char *from = malloc(COPY_BYTES), *to = malloc(COPY_BYTES);
    uint64_t sum = 0;
    if (!from || !to)
        return 1;
    memset(from, 3, COPY_BYTES);
    for (unsigned turn = 0; turn < 400; turn++) {
        from[turn * 4096] = (char)turn;
        memcpy(to, from, COPY_BYTES);
        sum += (unsigned char)to[turn * 4096] + (unsigned char)to[turn];
    }
    show(sum);
    return 0;
}

#define LENGTH (1u << 20)

int stream(void)
{
    double *a = malloc(LENGTH * sizeof *a), *b = malloc(LENGTH * sizeof *b);
    double *c = malloc(LENGTH * sizeof *c);
    if (!a || !b || !c)
        return 1;
    for (size_t i = 0; i < LENGTH; i++) {
        a[i] = (double)i;
        b[i] = 2.0;
        c[i] = 0.0;
    }
    for (int turn = 0; turn < 40; turn++) {
        for (size_t i = 0; i < LENGTH; i++)
            c[i] = a[i];
        for (size_t i = 0; i < LENGTH; i++)
            b[i] = 0.4 * c[i];
        for (size_t i = 0; i < LENGTH; i++)
            c[i] = a[i] + b[i];
        for (size_t i = 0; i < LENGTH; i++)
            a[i] = b[i] + 0.4 * c[i];
    }
    uint64_t bits;
    memcpy(&bits, &a[LENGTH - 1], sizeof bits);
    show(bits);
    return 0;
}
