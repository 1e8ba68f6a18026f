/* Runs the kernel that is named. */
#include "kernels.h"

#include <stdio.h>
#include <string.h>

static const struct kernel kernels[] = {
    {"integer", integer}, {"calls", calls},     {"sort", sort},       {"matrix", matrix},
    {"nbody", nbody},     {"mandelbrot", mandelbrot}, {"chase", chase}, {"copy", copy},
    {"stream", stream},   {"context", context}, {"faults", faults},   {"syscalls", syscalls},
    {"signals", signals},
};

void show(uint64_t value)
{
    printf("%016llx\n", (unsigned long long)value);
}

uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

int main(int argc, char **argv)
{
    for (size_t i = 0; argc == 2 && i < sizeof kernels / sizeof *kernels; i++) {
        if (strcmp(kernels[i].name, argv[1]) == 0)
            return kernels[i].run();
    }
    fprintf(stderr, "usage: kernels NAME\n");
    return 2;
}
