/* The kernel's work: switching between two processes, page faults, system calls, signals. */
#define _GNU_SOURCE
#include "kernels.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS 24000

/* Sends a byte back and forth between two processes. */
int context(void)
{
    int there[2], back[2];
    char byte = 1;
    if (pipe(there) || pipe(back))
        return 1;
    pid_t child = fork();
    if (child < 0)
        return 1;
    if (child == 0) {
        close(there[1]);
        close(back[0]);
        while (read(there[0], &byte, 1) == 1) {
            byte++;
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        }
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    for (int i = 0; i < ROUNDS; i++) {
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            return 1;
    }
    close(there[1]);
    int status = 1;
    if (waitpid(child, &status, 0) != child || status)
        return 1;
    show((unsigned char)byte);
    return 0;
}

#define PAGE 4096
#define PAGES 512

int faults(void)
{
    uint64_t sum = 0;
    for (int turn = 0; turn < 120; turn++) {
        char *pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED)
            return 1;
        /* Each page is to fault by itself. */
        madvise(pages, PAGES * PAGE, MADV_NOHUGEPAGE);
        for (int i = 0; i < PAGES; i++) {
            sum += (unsigned char)pages[i * PAGE + turn];
            pages[i * PAGE] = (char)i;
        }
        if (munmap(pages, PAGES * PAGE))
            return 1;
    }
    show(sum);
    return 0;
}

int syscalls(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 2000000; i++)
        sum += (uint64_t)syscall(SYS_getppid) != 0;
    show(sum);
    return 0;
}

static volatile sig_atomic_t caught;

static void count(int number)
{
    (void)number;
    caught++;
}

int signals(void)
{
    struct sigaction action = {.sa_handler = count};
    if (sigaction(SIGUSR1, &action, NULL))
        return 1;
    pid_t self = getpid();
    for (int i = 0; i < 200000; i++) {
        if (kill(self, SIGUSR1))
            return 1;
    }
    show((uint64_t)caught);
    return 0;
}
