// What the parts of the guest share.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define HARTS_MAX 8
#define PAGE 4096
#define RAM 0x80000000ul
#define FINISHER 0x100000ul
#define RTC 0x101000ul
#define CLINT 0x2000000ul
#define PLIC 0xc000000ul
#define UART 0x10000000ul
#define VIRTIO 0x10001000ul
#define RTC_IRQ 11
#define UART_IRQ 10

#define csr_read(name) ({ u64 v_; __asm__ volatile("csrr %0, " #name : "=r"(v_)); v_; })
#define csr_write(name, v) __asm__ volatile("csrw " #name ", %0" :: "r"((u64)(v)) : "memory")
#define csr_set(name, v) __asm__ volatile("csrs " #name ", %0" :: "r"((u64)(v)) : "memory")
#define csr_clear(name, v) __asm__ volatile("csrc " #name ", %0" :: "r"((u64)(v)) : "memory")
#define STIMECMP 0x14d
#define MENVCFG 0x30a
#define csr_write_number(number, v) __asm__ volatile("csrw %0, %1" :: "i"(number), "r"((u64)(v)) : "memory")

static inline u32 read32(u64 at) { return *(volatile u32 *)at; }
static inline void write32(u64 at, u32 v) { *(volatile u32 *)at = v; }
static inline u8 read8(u64 at) { return *(volatile u8 *)at; }
static inline void write8(u64 at, u8 v) { *(volatile u8 *)at = v; }
static inline u64 hart(void) { u64 v; __asm__ volatile("mv %0, tp" : "=r"(v)); return v; }
static inline u64 ticks(void) { return csr_read(time); }
static inline void fence(void) { __asm__ volatile("fence" ::: "memory"); }
static inline void fence_i(void) { __asm__ volatile("fence.i" ::: "memory"); }
static inline u64 mix(u64 h, u64 v) { h = (h ^ v) * 0x9e3779b97f4a7c15ul; return h ^ (h >> 29); }

// Waits in WFI until something that an interrupt brings is true.
#define wait_until(is_true) \
    do { \
        csr_clear(sstatus, 2); \
        if (is_true) { csr_set(sstatus, 2); break; } \
        __asm__ volatile("wfi"); \
        csr_set(sstatus, 2); \
    } while (1)

// What a trap saves: see start.S.
struct frame { u64 x[31]; u64 pc; u64 status; };
#define A(n) x[9 + (n)]

struct answer { u64 error, value; };
struct answer sbi(u64 extension, u64 function, u64 a0, u64 a1, u64 a2);
#define SBI_HSM 0x48534d
#define SBI_IPI 0x735049
#define SBI_DBCN 0x4442434e

void *memcpy(void *to, const void *from, u64 bytes);
void print(const char *text);
void print_number(const char *before, u64 number);
void print_hex(const char *before, u64 number);

extern volatile u64 traps[16], interrupts[16], ipis[HARTS_MAX], timers[HARTS_MAX], rtc_alarms, irqs[32];
extern char typed[64];
extern volatile u32 typed_count;
void enable_irq(u32 irq, u64 hart);

void paging_on(u64 hart);
int demand_map(u64 va, int is_store);
void test_paging(void);
void test_user(void);
void test_code(void);
void test_compute(u32 rounds);
void test_harts(u64 count);
void test_timer(void);
void test_rtc(void);
void test_keyboard(void);
void test_entropy(void);
u64 test_disk(u32 to_hart);
void test_net(void);
void worker(u64 hart);
void user_run(u64 pc, u64 sp);
extern u8 user_code[], user_end[];
