// A load for one disk: requests of one size, so many at once, past the guest's page cache, as fio's libaio engine makes them.
//
// disk DEVICE read|write sequential|random BLOCK DEPTH COUNT

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEPTH_MAX 128
#define GETSIZE64 _IOR(0x12, 114, size_t)

static int fail(const char *what) {
    printf("%s: %s\n", what, strerror(errno));
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 7)
        return 2;
    int writes = argv[2][0] == 'w', is_random = argv[3][0] == 'r';
    long block = atol(argv[4]), depth = atol(argv[5]), count = atol(argv[6]);
    int fd = open(argv[1], (writes ? O_WRONLY : O_RDONLY) | O_DIRECT);
    uint64_t size = 0, seed = 1;
    if (fd < 0 || ioctl(fd, GETSIZE64, &size) < 0 || size < (uint64_t)block)
        return fail(argv[1]);
    if (depth < 1 || depth > DEPTH_MAX)
        return 2;
    static struct iocb requests[DEPTH_MAX];
    static struct io_event events[DEPTH_MAX];
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context) < 0)
        return fail("io_setup");
    for (long i = 0; i < depth; i++) {
        void *buffer;
        if (posix_memalign(&buffer, 4096, block))
            return fail("memory");
        memset(buffer, 'a' + i % 26, block);
        requests[i].aio_buf = (uintptr_t)buffer;
    }
    long made = 0, done = 0;
    struct iocb *batch[DEPTH_MAX];
    long ready = 0;
    for (; ready < depth; ready++)
        batch[ready] = &requests[ready];
    while (done < count) {
        long n = ready < count - made ? ready : count - made;
        for (long i = 0; i < n; i++) {
            struct iocb *r = batch[i];
            uint64_t at = made++;
            if (is_random) {
                seed = seed * 6364136223846793005u + 1442695040888963407u;
                at = seed >> 20;
            }
            r->aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            r->aio_fildes = fd;
            r->aio_nbytes = block;
            r->aio_offset = at % (size / block) * block;
        }
        for (long sent = 0; sent < n;) {
            long some = syscall(SYS_io_submit, context, n - sent, batch + sent);
            if (some <= 0)
                return fail("io_submit");
            sent += some;
        }
        long some = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
        if (some <= 0)
            return fail("io_getevents");
        ready = 0;
        for (long i = 0; i < some; i++) {
            if (events[i].res != block) {
                errno = -events[i].res;
                return fail("request");
            }
            batch[ready++] = (struct iocb *)(uintptr_t)events[i].obj;
        }
        done += some;
    }
    printf("%ld\n", done);
    return 0;
}
