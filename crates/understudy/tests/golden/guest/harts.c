// Several harts: atomics, locks, interrupts between them, and code that one changes and another runs.
#include "guest.h"

#define TURNS 1500

static volatile u64 count, arrived, phase, added, reserved, locked, lock, largest, ring, told[HARTS_MAX];
static u32 code[4] __attribute__((aligned(64)));
static u8 pages[2 * PAGE] __attribute__((aligned(PAGE)));

static void pause(void) { __asm__ volatile(".4byte 0x0100000f"); }

static u64 add(volatile u64 *to, u64 v) { return __atomic_fetch_add(to, v, __ATOMIC_SEQ_CST); }

static void reserve(volatile u64 *to) {
    u64 old, failed;
    do {
        __asm__ volatile("lr.d.aqrl %0, (%2)\n addi %0, %0, 1\n sc.d.rl %1, %0, (%2)" : "=&r"(old), "=&r"(failed) : "r"(to) : "memory");
    } while (failed);
}

static void barrier(u64 harts) {
    u64 now = phase;
    if (add(&arrived, 1) + 1 == harts) {
        arrived = 0;
        fence();
        phase = now + 1;
    } else {
        while (phase == now) pause();
    }
}

static u64 call(void *at, u64 a0) { return ((u64 (*)(u64))at)(a0); }

static void work(u64 h, u64 harts) {
    barrier(harts);
    for (u64 i = 0; i < TURNS; i++) {
        add(&added, h + 1);
        reserve(&reserved);
        while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) pause();
        locked = mix(locked, h + 1);
        __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
        __asm__ volatile("amomax.d zero, %0, (%1)" :: "r"(i * (h + 3) % 1009), "r"(&largest) : "memory");
    }
    barrier(harts);
    // A token goes round.
    for (u64 i = 0; i < 40; i++) {
        while (ring % harts != h) pause();
        add(&ring, 1);
    }
    barrier(harts);
    // Hart 0 changes the code, all run it.
    for (u64 i = 0; i < 30; i++) {
        if (h == 0) {
            code[0] = 0x00050513 | (u32)(i * 7 + 1) << 20;     // addi a0, a0, …
            code[1] = 0x00008067;                              // ret
            fence();
        }
        barrier(harts);
        fence_i();
        told[h] = mix(told[h], call(code, i));
        barrier(harts);
    }
}

void worker(u64 h) {
    csr_set(sie, 1 << 1 | 1 << 9);
    csr_set(sstatus, 2);
    paging_on(h);
    while (count == 0) __asm__ volatile("wfi");
    work(h, count);
    while (1) __asm__ volatile("wfi");
}

void test_harts(u64 harts) {
    count = harts;
    fence();
    if (harts > 1) sbi(SBI_IPI, 0, ((1ul << harts) - 1) & ~1ul, 0, 0);
    work(0, harts);
    u64 all = 0;
    for (u64 h = 0; h < harts; h++) all = mix(all, told[h]);
    print_number("harts: added ", added);
    print_number("harts: reserved ", reserved);
    print_hex("harts: locked ", locked);
    print_number("harts: largest ", largest);
    print_number("harts: ring ", ring);
    print_hex("harts: ran ", all);
}

// Code that changes under the hart that runs it.
void test_code(void) {
    u64 sum = 0;
    for (u32 i = 0; i < 400; i++) {
        code[0] = 0x00050513 | (i * 5 & 0x7ff) << 20;
        code[1] = 0x00008067;
        fence_i();
        sum = mix(sum, call(code, i));
    }
    // An instruction that lies on two pages, its second half changed.
    u16 *at = (u16 *)(pages + PAGE - 2);
    for (u32 i = 0; i < 50; i++) {
        u32 word = 0x00050513 | i << 20;
        at[0] = (u16)word;
        at[1] = (u16)(word >> 16);
        at[2] = 0x8082;                                        // ret
        fence_i();
        sum = mix(sum, call(at, i));
    }
    // The next instruction but one, changed by the code before it.
    for (u32 i = 0; i < 20; i++) {
        u64 out = i;
        u32 word = 0x00000293 | (i + 1) << 20;                 // addi t0, zero, …
        __asm__ volatile(
            ".option push\n .option norvc\n"
            "la t1, 1f\n sw %1, 0(t1)\n fence.i\n"
            "1: addi t0, zero, 0\n add %0, %0, t0\n .option pop"
            : "+r"(out) : "r"(word) : "t0", "t1", "memory");
        sum = mix(sum, out);
    }
    print_hex("code: sum ", sum);
}
