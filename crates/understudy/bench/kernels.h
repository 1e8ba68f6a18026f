/* The bench's own workloads: each is a function that prints a check of its result, called by its name.
 * Sizes are fixed, so that every machine does the same work; they take one to three seconds on QEMU's TCG.
 */
#ifndef KERNELS_H
#define KERNELS_H

#include <stdint.h>

struct kernel {
    const char *name;
    int (*run)(void);
};

/* Prints a result, which also keeps the compiler from leaving the work out. */
void show(uint64_t value);
/* Marsaglia's xorshift: the same numbers everywhere. */
uint64_t next(uint64_t *state);

/* integer.c */
int integer(void);
int calls(void);
int sort(void);
/* floating.c */
int matrix(void);
int nbody(void);
int mandelbrot(void);
/* memory.c */
int chase(void);
int copy(void);
int stream(void);
/* system.c */
int context(void);
int faults(void);
int syscalls(void);
int signals(void);

#endif
