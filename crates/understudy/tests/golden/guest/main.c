// Goes through the machine once, resets it, goes through half of it again, and powers it off.
#include "guest.h"

// The compiler calls these of its own accord.
void *memset(void *to, int byte, u64 bytes) {
    for (u64 i = 0; i < bytes; i++) ((u8 *)to)[i] = (u8)byte;
    return to;
}
void *memcpy(void *to, const void *from, u64 bytes) {
    for (u64 i = 0; i < bytes; i++) ((u8 *)to)[i] = ((const u8 *)from)[i];
    return to;
}

void print(const char *text) {
    while (*text) {
        while (!(read8(UART + 5) & 0x20)) {}
        write8(UART, (u8)*text++);
    }
}

static void number(u64 v, u64 base) {
    char text[24];
    u32 at = sizeof text;
    text[--at] = 0;
    do { text[--at] = "0123456789abcdef"[v % base]; v /= base; } while (v);
    print(text + at);
    print("\n");
}

void print_number(const char *before, u64 v) { print(before); number(v, 10); }
void print_hex(const char *before, u64 v) { print(before); number(v, 16); }

struct answer sbi(u64 extension, u64 function, u64 first, u64 second, u64 third) {
    register u64 a0 __asm__("a0") = first;
    register u64 a1 __asm__("a1") = second;
    register u64 a2 __asm__("a2") = third;
    register u64 a6 __asm__("a6") = function;
    register u64 a7 __asm__("a7") = extension;
    __asm__ volatile("ecall" : "+r"(a0), "+r"(a1) : "r"(a2), "r"(a6), "r"(a7) : "memory");
    return (struct answer){a0, a1};
}

extern void supervisor_start(void);

static u64 start_harts(void) {
    u64 count = 1;
    while (count < HARTS_MAX && sbi(SBI_HSM, 0, count, (u64)supervisor_start, 0).error == 0) count++;
    return count;
}

void main(void) {
    static const char GREETING[] = "said by the SBI\n";
    csr_set(sie, 1 << 1 | 1 << 5 | 1 << 9);
    csr_set(sstatus, 2);
    print("golden guest\n");
    sbi(SBI_DBCN, 0, sizeof GREETING - 1, (u64)GREETING, 0);
    paging_on(0);
    u64 harts = start_harts();
    print_number("harts: ", harts);
    test_paging();
    test_user();
    test_code();
    test_harts(harts);
    test_timer();
    u64 boots = test_disk(harts > 1);
    print_number("boots: ", boots);
    if (boots == 0) {
        test_compute(300);
        test_rtc();
        test_entropy();
        test_net();
        test_keyboard();
        print_number("interrupts between harts: ", ipis[0]);
        print("reset\n");
        write32(FINISHER, 0x7777);
    }
    test_compute(20);
    print("power off\n");
    write32(FINISHER, 0x5555);
    while (1) __asm__ volatile("wfi");
}
