/* Integer work: lists, matrices, a state machine and checksums in turn; calls; sorting and hashing. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#define ITEMS 600
#define SIDE 24
#define TEXT 2000

struct item {
    struct item *next;
    int32_t key;
    int32_t place;
};

static struct item items[ITEMS];
static int32_t left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];
static char text[TEXT + 1];

static uint16_t crc(uint16_t sum, uint32_t value)
{
    for (int bit = 0; bit < 32; bit++) {
        uint16_t carry = (uint16_t)((sum ^ value) & 1);
        sum >>= 1;
        if (carry)
            sum ^= 0xA001;
        value >>= 1;
    }
    return sum;
}

/* Merge sort of a list, from pairs upwards. */
static struct item *sort_list(struct item *list, int by_place)
{
    for (int width = 1;; width *= 2) {
        struct item *rest = list, *tail = NULL;
        int merges = 0;
        list = NULL;
        while (rest) {
            struct item *a = rest, *b = rest;
            int a_left = 0, b_left = width;
            merges++;
            while (a_left < width && b) {
                a_left++;
                b = b->next;
            }
            while (a_left > 0 || (b_left > 0 && b)) {
                int take_a = b_left == 0 || !b ||
                    (a_left > 0 && (by_place ? a->place <= b->place : a->key <= b->key));
                struct item *taken = take_a ? a : b;
                if (take_a) {
                    a = a->next;
                    a_left--;
                } else {
                    b = b->next;
                    b_left--;
                }
                if (tail)
                    tail->next = taken;
                else
                    list = taken;
                tail = taken;
            }
            rest = b;
        }
        tail->next = NULL;
        if (merges <= 1)
            return list;
    }
}

static struct item *reverse(struct item *list)
{
    struct item *done = NULL;
    while (list) {
        struct item *next = list->next;
        list->next = done;
        done = list;
        list = next;
    }
    return done;
}

static uint16_t lists(struct item **head, uint64_t *state, uint16_t sum)
{
    for (int i = 0; i < 40; i++) {
        int32_t wanted = (int32_t)(next(state) % ITEMS);
        struct item *at = *head;
        while (at && at->place != wanted)
            at = at->next;
        if (at) {
            at->key = (int32_t)(next(state) & 0x7FFF);
            sum = crc(sum, (uint32_t)at->key);
        }
        *head = reverse(*head);
    }
    *head = sort_list(*head, 0);
    sum = crc(sum, (uint32_t)(*head)->key);
    *head = sort_list(*head, 1);
    return sum;
}

static uint16_t matrices(int32_t seed, uint16_t sum)
{
    for (int row = 0; row < SIDE; row++) {
        for (int column = 0; column < SIDE; column++) {
            left[row][column] += seed;
            right[column][row] ^= seed;
        }
    }
    for (int row = 0; row < SIDE; row++) {
        for (int column = 0; column < SIDE; column++) {
            int32_t cell = 0;
            for (int k = 0; k < SIDE; k++) {
                int32_t term = (left[row][k] & 0xFFFF) * (right[k][column] & 0x7FFF);
                cell += ((term >> 2) & 0xF) * ((term >> 5) & 0x7F);
            }
            product[row][column] = cell;
        }
        sum = crc(sum, (uint32_t)product[row][row]);
    }
    return sum;
}

enum state { START, SIGN, WHOLE, POINT, PART, POWER, EXPONENT, BAD, STATES };

/* Numbers in a text, one character at a time. */
static enum state step(enum state state, char c)
{
    int digit = c >= '0' && c <= '9';
    switch (state) {
    case START:
        return digit ? WHOLE : c == '+' || c == '-' ? SIGN : c == '.' ? POINT : BAD;
    case SIGN:
        return digit ? WHOLE : c == '.' ? POINT : BAD;
    case WHOLE:
        return digit ? WHOLE : c == '.' ? PART : c == 'e' ? POWER : BAD;
    case POINT:
    case PART:
        return digit ? PART : c == 'e' ? POWER : BAD;
    case POWER:
        return digit || c == '-' ? EXPONENT : BAD;
    case EXPONENT:
        return digit ? EXPONENT : BAD;
    default:
        return BAD;
    }
}

static uint16_t machine(uint16_t sum)
{
    uint32_t seen[STATES] = {0};
    enum state state = START;
    for (const char *at = text; *at; at++) {
        if (*at == ',') {
            seen[state]++;
            state = START;
        } else {
            state = step(state, *at);
        }
    }
    for (int i = 0; i < STATES; i++)
        sum = crc(sum, seen[i]);
    return sum;
}

int integer(void)
{
    static const char letters[] = "0123456789012345,,,+-.e";
    uint64_t state = 88172645463325252ULL;
    for (int i = 0; i < ITEMS; i++) {
        items[i].key = (int32_t)(next(&state) & 0x7FFF);
        items[i].place = i;
        items[i].next = i + 1 < ITEMS ? &items[i + 1] : NULL;
    }
    for (int i = 0; i < TEXT; i++)
        text[i] = letters[next(&state) % (sizeof letters - 1)];
    struct item *head = items;
    uint16_t sum = 0;
    for (int turn = 0; turn < 2500; turn++) {
        sum = lists(&head, &state, sum);
        for (int i = 0; i < 4; i++)
            sum = matrices((int32_t)(next(&state) & 0xFF), sum);
        for (int i = 0; i < 8; i++)
            sum = machine(sum);
    }
    show(sum);
    return 0;
}

static __attribute__((noinline)) uint32_t fib(uint32_t n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint32_t op_add(uint32_t a, uint32_t b) { return a + b; }
static uint32_t op_sub(uint32_t a, uint32_t b) { return a - b; }
static uint32_t op_mix(uint32_t a, uint32_t b) { return (a << 5 | a >> 27) ^ b; }
static uint32_t op_mul(uint32_t a, uint32_t b) { return a * (b | 1); }
static uint32_t op_and(uint32_t a, uint32_t b) { return (a & b) + 0x9E37; }
static uint32_t op_or(uint32_t a, uint32_t b) { return (a | b) - 0x79B9; }
static uint32_t op_shift(uint32_t a, uint32_t b) { return a >> (b & 7) ^ b; }
static uint32_t op_not(uint32_t a, uint32_t b) { return ~a ^ b; }

int calls(void)
{
    static uint32_t (*const volatile ops[8])(uint32_t, uint32_t) = {
        op_add, op_sub, op_mix, op_mul, op_and, op_or, op_shift, op_not,
    };
    uint64_t state = 88172645463325252ULL;
    uint8_t program[4096];
    for (size_t i = 0; i < sizeof program; i++)
        program[i] = next(&state) & 7;
    uint32_t value = fib(36);
    for (uint32_t i = 0; i < 30000000; i++)
        value = ops[program[i % sizeof program]](value, i);
    show(value);
    return 0;
}

#define WORDS (1 << 19)
#define SLOTS (1 << 20)

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int sort(void)
{
    uint64_t *words = malloc(WORDS * sizeof *words), *slots = calloc(SLOTS, sizeof *slots);
    uint64_t state = 88172645463325252ULL, sum = 0;
    if (!words || !slots)
        return 1;
    for (int turn = 0; turn < 4; turn++) {
        for (int i = 0; i < WORDS; i++)
            words[i] = next(&state);
        for (int i = 0; i < WORDS; i++) {
            uint64_t at = words[i] * 0x9E3779B97F4A7C15ULL >> 44;
            while (slots[at] && slots[at] != words[i])
                at = (at + 1) % SLOTS;
            slots[at] = words[i];
        }
        qsort(words, WORDS, sizeof *words, compare);
        for (int i = 0; i < WORDS; i++) {
            uint64_t at = words[i] * 0x9E3779B97F4A7C15ULL >> 44;
            while (slots[at] != words[i])
                at = (at + 1) % SLOTS;
            sum = sum * 31 + at + words[i];
        }
        memset(slots, 0, SLOTS * sizeof *slots);
    }
    show(sum);
    return 0;
}
