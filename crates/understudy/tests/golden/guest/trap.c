// Traps of S-mode, and, as firmware, M-mode with the little of the SBI that the guest calls.
#include "guest.h"

volatile u64 traps[16], interrupts[16], ipis[HARTS_MAX], timers[HARTS_MAX], rtc_alarms, irqs[32];
u64 user_sp, saved_tp;
u8 stacks[HARTS_MAX + 1][8192] __attribute__((aligned(16)));

static u64 plic_context(u64 hart) { return 2 * hart + 1; }

void enable_irq(u32 irq, u64 to) {
    u64 enable = PLIC + 0x2000 + plic_context(to) * 0x80;
    write32(PLIC + 4 * irq, 1);
    write32(enable, read32(enable) | 1u << irq);
    write32(PLIC + 0x200000 + plic_context(to) * 0x1000, 0);
}

static void external(void) {
    u64 claim = PLIC + 0x200004 + plic_context(hart()) * 0x1000;
    u32 irq;
    while ((irq = read32(claim)) != 0) {
        if (irq == UART_IRQ) {
            while (read8(UART + 5) & 1) {
                char c = read8(UART);
                if (typed_count < sizeof typed) typed[typed_count++] = c;
            }
        } else if (irq == RTC_IRQ) {
            write32(RTC + 0x1c, 1);
            rtc_alarms++;
        } else if (irq >= 1 && irq <= 8) {
            u64 slot = VIRTIO + (irq - 1) * 0x1000ul;
            write32(slot + 0x64, read32(slot + 0x60));
        }
        irqs[irq & 31]++;
        write32(claim, irq);
    }
    // Hart 0 is the one that waits.
    if (hart() != 0) sbi(SBI_IPI, 0, 1, 0, 0);
}

static void interrupt(u64 cause) {
    interrupts[cause & 15]++;
    if (cause == 1) {
        csr_clear(sip, 2);
        ipis[hart()]++;
    } else if (cause == 5) {
        csr_write_number(STIMECMP, -1ul);
        timers[hart()]++;
    } else if (cause == 9) {
        external();
    }
}

// Bytes of the instruction there; user code is compressed as well.
static u64 length(u64 pc) { return (*(volatile u16 *)pc & 3) == 3 ? 4 : 2; }

void supervisor_trap(struct frame *f) {
    u64 cause = csr_read(scause);
    if (cause >> 63) {
        interrupt(cause << 1 >> 1);
        return;
    }
    traps[cause & 15]++;
    if ((cause == 13 || cause == 15) && demand_map(csr_read(stval), cause == 15)) return;
    if (cause == 8 && f->A(7) == 0) {
        f->pc = (u64)user_end;
        f->status = (f->status | 1 << 8) & ~0x20ul;      // to S-mode, interrupts off until its stack is back
        return;
    }
    if (cause == 8) {
        print_number("user: sum ", f->A(0));
        print_number("user: root ", f->A(1));
    }
    csr_set(sstatus, 1 << 18);          // SUM: the instruction may be a user's
    f->pc += length(f->pc);
    csr_clear(sstatus, 1 << 18);
}

#ifdef FIRMWARE
#define MSIP(hart) (CLINT + 4 * (hart))
#define MTIMECMP(hart) (CLINT + 0x4000 + 8 * (hart))

u8 machine_stacks[HARTS_MAX + 1][8192] __attribute__((aligned(16)));
static volatile u64 is_there[HARTS_MAX], start_at[HARTS_MAX], wants_ipi[HARTS_MAX], machine_timers, machine_traps;

static struct answer serve(struct frame *f) {
    u64 extension = f->A(7), a0 = f->A(0);
    if (extension == SBI_HSM && f->A(6) == 0) {
        if (a0 >= HARTS_MAX || !is_there[a0]) return (struct answer){-3ul, 0};
        start_at[a0] = f->A(1);
        fence();
        write32(MSIP(a0), 1);
        return (struct answer){0, 0};
    }
    if (extension == SBI_IPI) {
        for (u64 h = 0; h < HARTS_MAX; h++) {
            if (a0 >> h & 1) {
                wants_ipi[h] = 1;
                fence();
                write32(MSIP(h), 1);
            }
        }
        return (struct answer){0, 0};
    }
    return (struct answer){-2ul, 0};
}

void machine_trap(struct frame *f) {
    u64 cause = csr_read(mcause), h = csr_read(mhartid);
    if (cause == (1ul << 63 | 3)) {
        write32(MSIP(h), 0);
        if (wants_ipi[h]) {
            wants_ipi[h] = 0;
            csr_set(mip, 2);
        }
    } else if (cause == (1ul << 63 | 7)) {
        *(volatile u64 *)MTIMECMP(h) = -1ul;
        machine_timers++;
    } else if (cause == 9) {
        struct answer answer = serve(f);
        f->A(0) = answer.error;
        f->A(1) = answer.value;
        f->pc += 4;
    } else {
        machine_traps++;
        f->pc += length(f->pc);
    }
}

extern void supervisor_start(void);

// Everything before S-mode; the address at which this hart starts there.
u64 machine_main(u64 h) {
    csr_write(pmpaddr0, -1ul >> 10);
    csr_write(pmpcfg0, 0x1f);
    csr_write(medeleg, 0xb1ff);
    csr_write(mideleg, 0x222);
    csr_write(mcounteren, 7);
    csr_write_number(MENVCFG, 1ul << 63 | 1ul << 61 | 0xf0);
    csr_write(mie, 1 << 3 | 1 << 7);
    is_there[h] = 1;
    if (h == 0) {
        __asm__ volatile(".4byte 0xffffffff\n csrr zero, 0x7c0\n" ::: "memory");
        *(volatile u64 *)MTIMECMP(0) = *(volatile u64 *)(CLINT + 0xbff8) + 10000;
        csr_set(mstatus, 8);
        while (machine_timers == 0) __asm__ volatile("wfi");
        print_number("firmware: timers ", machine_timers);
        print_number("firmware: traps ", machine_traps);
        return (u64)supervisor_start;
    }
    csr_set(mstatus, 8);
    while (start_at[h] == 0) __asm__ volatile("wfi");
    return start_at[h];
}
#endif
