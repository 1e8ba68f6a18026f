// Sv39 and Sv48 with pages of every size, pages mapped on demand, accessed and dirty bits, and U-mode.
#include "guest.h"

#define V 1ul
#define R 2ul
#define W 4ul
#define X 8ul
#define U 16ul
#define ACCESSED 64ul
#define DIRTY 128ul
#define KERNEL (V | R | W | X | ACCESSED | DIRTY)
#define DEVICE (V | R | W | ACCESSED | DIRTY)
#define WINDOW 0x100000000ul        // 2 MiB of pages that come when they are touched
#define USER (WINDOW + 0x100000)    // within it: a page of code, and behind it one of data
#define FRAMES 40

typedef u64 table[512];
static table root, top, low, devices, serial, window_middle, window __attribute__((aligned(PAGE)));
static u8 frames[FRAMES][PAGE] __attribute__((aligned(PAGE)));
static u32 frames_used;
static u64 upgrades, maps;

static u64 leaf(u64 at, u64 bits) { return at >> 12 << 10 | bits; }
static u64 next(table *t) { return leaf((u64)t, V); }
static void flush(u64 va) { __asm__ volatile("sfence.vma %0, zero" :: "r"(va) : "memory"); }

static void build(void) {
    low[FINISHER >> 21] = next(&devices);
    devices[(FINISHER >> 12) & 511] = leaf(FINISHER, DEVICE);
    devices[(RTC >> 12) & 511] = leaf(RTC, DEVICE);
    low[CLINT >> 21] = leaf(CLINT, DEVICE);
    low[PLIC >> 21] = leaf(PLIC, DEVICE);
    low[(PLIC >> 21) + 1] = leaf(PLIC + 0x200000, DEVICE);
    low[UART >> 21] = next(&serial);
    for (u64 i = 0; i < 9; i++) serial[i] = leaf(UART + i * PAGE, DEVICE);
    root[0] = next(&low);
    root[RAM >> 30] = leaf(RAM, KERNEL);
    root[WINDOW >> 30] = next(&window_middle);
    window_middle[0] = next(&window);
    root[511] = leaf(RAM, KERNEL);  // RAM again, at the top of the address space
    top[0] = next(&root);
    top[511] = next(&root);
}

void paging_on(u64 h) {
    if (h == 0) build();
    u64 satp = h & 1 ? 9ul << 60 | (u64)top >> 12 : 8ul << 60 | (u64)root >> 12;
    __asm__ volatile("sfence.vma\n csrw satp, %0\n sfence.vma" :: "r"(satp) : "memory");
}

// A page of the window that was touched: first for reading, at the second fault for writing as well.
int demand_map(u64 va, int is_store) {
    if (va < WINDOW || va >= WINDOW + 0x200000) return 0;
    u64 *pte = &window[(va >> 12) & 511];
    if (*pte & V) {
        if (!is_store || *pte & W) return 0;
        *pte |= W;
        upgrades++;
    } else {
        if (frames_used == FRAMES) return 0;
        *pte = leaf((u64)frames[frames_used++], V | R);
        maps++;
    }
    flush(va);
    return 1;
}

void test_paging(void) {
    u64 sum = 0;
    for (u64 round = 0; round < 3; round++) {
        for (u64 i = 0; i < 24; i++) {
            volatile u64 *p = (volatile u64 *)(WINDOW + i * 3 * PAGE + 8 * i);
            sum = mix(sum, *p);
            if (i % 3) *p = sum;
        }
    }
    // An access that lies on two pages, the second of which is not there yet.
    volatile u64 *straddling = (volatile u64 *)(WINDOW + 20 * PAGE - 4);
    *straddling = 0x0123456789abcdef;
    sum = mix(sum, *straddling);
    u64 accessed = 0, dirty = 0;
    for (u64 i = 0; i < 512; i++) {
        accessed += (window[i] & ACCESSED) != 0;
        dirty += (window[i] & DIRTY) != 0;
        window[i] &= ~(ACCESSED | DIRTY);    // without a fence, as Linux does
    }
    for (u64 i = 0; i < 24; i += 2) sum = mix(sum, *(volatile u64 *)(WINDOW + i * 3 * PAGE));
    u64 again = 0;
    for (u64 i = 0; i < 512; i++) again += (window[i] & ACCESSED) != 0;
    // The same frame under another address, and then another frame under that address.
    window[400] = leaf((u64)frames[0], DEVICE);
    window[401] = leaf((u64)frames[1], DEVICE);
    flush(WINDOW + 400 * PAGE);
    flush(WINDOW + 401 * PAGE);
    volatile u64 *alias = (volatile u64 *)(WINDOW + 400 * PAGE);
    *alias = sum;
    sum = mix(sum, *(volatile u64 *)frames[0]);
    window[400] = window[401];
    flush(WINDOW + 400 * PAGE);
    sum = mix(sum, *alias);
    // RAM at the top.
    sum = mix(sum, *(volatile u64 *)((u64)frames[0] - RAM + 0xffffffffc0000000ul));
    print_number("paging: mapped ", maps);
    print_number("paging: made writable ", upgrades);
    print_number("paging: accessed ", accessed);
    print_number("paging: dirty ", dirty);
    print_number("paging: accessed again ", again);
    print_hex("paging: sum ", sum);
}

void test_user(void) {
    u64 before = traps[2] + traps[3] + traps[8] + traps[13];
    csr_write(scounteren, 7);
    window[(USER >> 12) & 511] = leaf((u64)user_code, V | R | X | U);
    window[(USER >> 12 & 511) + 1] = leaf((u64)frames[FRAMES - 1], V | R | W | U);
    flush(USER);
    flush(USER + PAGE);
    user_run(USER, USER + PAGE + 256);
    u64 sum = *(volatile u64 *)(frames[FRAMES - 1] + 256);
    print_number("user: stored ", sum);
    print_number("user: traps ", traps[2] + traps[3] + traps[8] + traps[13] - before);
}
