// Timer, clock, keyboard, and the virtio devices: entropy, disk, network.
#include "guest.h"

void test_timer(void) {
    for (u64 i = 1; i <= 6; i++) {
        csr_write_number(STIMECMP, ticks() + i * 5000);
        wait_until(timers[0] == i);
    }
    print_number("timer: interrupts ", timers[0]);
}

void test_rtc(void) {
    u64 now = read32(RTC);
    now |= (u64)read32(RTC + 4) << 32;
    print_number("rtc: seconds ", now / 1000000000);
    enable_irq(RTC_IRQ, 0);
    write32(RTC + 0x10, 1);
    u64 at = now + 3000000;
    write32(RTC + 0xc, at >> 32);
    write32(RTC + 8, (u32)at);
    wait_until(rtc_alarms == 1);
    print_number("rtc: alarms ", rtc_alarms);
}

char typed[64];
volatile u32 typed_count;

void test_keyboard(void) {
    enable_irq(UART_IRQ, 0);
    write8(UART + 1, 1);
    print("type a line: ");
    wait_until(typed_count > 0 && typed[typed_count - 1] == '\n');
    typed[typed_count - 1] = 0;
    print("typed: ");
    print(typed);
    print("\n");
}

// ---- virtio

#define QUEUE 16
#define DEVICE_WRITES 2
#define INDIRECT 4

struct descriptor { u64 at; u32 bytes; u16 flags, next; };
struct queue {
    struct descriptor table[QUEUE];
    struct { u16 flags, index, ring[QUEUE], event; } available;
    struct { u16 flags, index; struct { u32 id, bytes; } ring[QUEUE]; u16 event; } used;
    u64 slot;
    u16 number, seen, free;
};

static struct queue queues[4] __attribute__((aligned(PAGE)));
static u32 queue_count;

// The slot of the first device of a kind, set up but for its queues; 0 if there is none.
static u64 find(u32 kind, u64 features, u32 to_hart) {
    for (u64 i = 0; i < 8; i++) {
        u64 slot = VIRTIO + i * 0x1000;
        if (read32(slot) != 0x74726976 || read32(slot + 8) != kind) continue;
        write32(slot + 0x70, 0);
        write32(slot + 0x70, 3);
        write32(slot + 0x24, 0);
        write32(slot + 0x20, (u32)features);
        write32(slot + 0x24, 1);
        write32(slot + 0x20, 1);            // VERSION_1
        write32(slot + 0x70, 11);
        if (!(read32(slot + 0x70) & 8)) print("virtio: features are refused\n");
        enable_irq((u32)i + 1, to_hart);
        return slot;
    }
    return 0;
}

static void address(u64 at, void *p) {
    write32(at, (u32)(u64)p);
    write32(at + 4, (u64)p >> 32);
}

static struct queue *add_queue(u64 slot, u16 number) {
    struct queue *q = &queues[queue_count++];
    q->slot = slot;
    q->number = number;
    write32(slot + 0x30, number);
    write32(slot + 0x38, QUEUE);
    address(slot + 0x80, q->table);
    address(slot + 0x90, &q->available);
    address(slot + 0xa0, &q->used);
    write32(slot + 0x44, 1);
    return q;
}

static void start(u64 slot) { write32(slot + 0x70, 15); }

// Adds a chain of buffers, without telling the device.
static u16 add(struct queue *q, const struct descriptor *chain, u16 count) {
    u16 first = q->free;
    for (u16 i = 0; i < count; i++) {
        u16 at = q->free++ % QUEUE;
        q->table[at] = chain[i];
        q->table[at].next = (u16)(at + 1) % QUEUE;
        if (i + 1 < count) q->table[at].flags |= 1;
    }
    q->available.ring[q->available.index % QUEUE] = first % QUEUE;
    fence();
    q->available.index++;
    fence();
    return first;
}

static void notify(struct queue *q) { write32(q->slot + 0x50, q->number); }
static u16 used(struct queue *q) { return *(volatile u16 *)&q->used.index; }

static void wait_used(struct queue *q, u16 more) {
    u16 until = q->seen + more;
    wait_until((short)(used(q) - until) >= 0);
    q->seen = until;
}

void test_entropy(void) {
    static u8 bytes[64];
    u64 slot = find(4, 0, 0), h = 0;
    if (!slot) return;
    struct queue *q = add_queue(slot, 0);
    start(slot);
    add(q, (struct descriptor[]){{(u64)bytes, sizeof bytes, DEVICE_WRITES, 0}}, 1);
    notify(q);
    wait_used(q, 1);
    for (u32 i = 0; i < sizeof bytes; i += 8) h = mix(h, *(u64 *)(bytes + i));
    print_hex("entropy: ", h);
}

// ---- disk

struct request { u32 type, reserved; u64 sector; };
struct range { u64 sector; u32 sectors, flags; };
static struct queue *disk;
static struct request heads[4];
static u8 states[4], data[4][2048] __attribute__((aligned(16)));

// Asks for request `n` without telling the device; the data lie in two pieces.
static void ask(u32 n, u32 type, u64 sector, u32 bytes) {
    u16 flags = type == 0 || type == 8 ? DEVICE_WRITES : 0;
    heads[n] = (struct request){type, 0, sector};
    states[n] = 0xff;
    struct descriptor chain[4] = {{(u64)&heads[n], 16, 0, 0}};
    u16 count = 1;
    u32 part = bytes > 512 ? 512 : bytes;
    if (part) chain[count++] = (struct descriptor){(u64)data[n], part, flags, 0};
    if (bytes > part) chain[count++] = (struct descriptor){(u64)data[n] + part, bytes - part, flags, 0};
    chain[count++] = (struct descriptor){(u64)&states[n], 1, DEVICE_WRITES, 0};
    add(disk, chain, count);
}

static u8 request(u32 type, u64 sector, u32 bytes) {
    ask(0, type, sector, bytes);
    notify(disk);
    wait_used(disk, 1);
    return states[0];
}

static void indirect_read(u64 sector) {
    static struct descriptor chain[3];
    heads[1] = (struct request){0, 0, sector};
    chain[0] = (struct descriptor){(u64)&heads[1], 16, 1, 1};
    chain[1] = (struct descriptor){(u64)data[1], 1024, 1 | DEVICE_WRITES, 2};
    chain[2] = (struct descriptor){(u64)&states[1], 1, DEVICE_WRITES, 0};
    add(disk, (struct descriptor[]){{(u64)chain, sizeof chain, INDIRECT, 0}}, 1);
    notify(disk);
    wait_used(disk, 1);
}

static u64 sum_of(u32 n, u32 bytes) {
    u64 h = 0;
    for (u32 i = 0; i < bytes; i += 8) h = mix(h, *(u64 *)(data[n] + i));
    return h;
}

// How often this disk has been booted from; counts on.
u64 test_disk(u32 to_hart) {
    u64 slot = find(2, 1ul << 9 | 1ul << 13 | 1ul << 14 | 1ul << 28, to_hart);
    if (!slot) return 1;
    disk = add_queue(slot, 0);
    start(slot);
    print_number("disk: sectors ", read32(slot + 0x100));
    request(8, 0, 20);
    data[0][20] = 0;
    print("disk: serial ");
    print((char *)data[0]);
    print("\n");
    request(0, 0, 512);
    u64 boots = *(u64 *)data[0];
    *(u64 *)data[0] = boots + 1;
    request(1, 0, 512);
    // A write, a read of the same sectors, another write of some, and a read elsewhere, all at once.
    for (u32 i = 0; i < 2048; i++) data[0][i] = (u8)(i * 7 + boots), data[2][i] = (u8)(i ^ 0x5a);
    ask(0, 1, 64, 2048);
    ask(1, 0, 64, 2048);
    ask(2, 1, 66, 1024);
    ask(3, 0, 1000, 2048);
    notify(disk);
    wait_used(disk, 4);
    print_hex("disk: read ", mix(sum_of(1, 2048), sum_of(3, 2048)));
    print_number("disk: states ", states[0] + states[1] + states[2] + states[3]);
    indirect_read(66);
    print_hex("disk: read again ", sum_of(1, 1024));
    *(struct range *)data[0] = (struct range){65, 2, 0};
    print_number("disk: zeroes ", request(13, 0, 16));
    print_number("disk: discard ", request(11, 0, 16));
    print_number("disk: flush ", request(4, 0, 0));
    request(0, 64, 2048);
    print_hex("disk: read at last ", sum_of(0, 2048));
    print_number("disk: beyond the end ", request(0, 1ul << 40, 512));
    return boots;
}

// ---- network

#define FRAME 2048
#define HEADER 12

static struct queue *receive, *transmit;
static u8 in[8][FRAME], out[FRAME];
static u8 own[6], peer[6] = {255, 255, 255, 255, 255, 255};
static const u8 OWN_IP[4] = {10, 97, 9, 2}, PEER_IP[4] = {10, 97, 9, 1};
static u64 others;

static int same(const void *a, const void *b, u64 n) {
    for (u64 i = 0; i < n; i++) if (((const u8 *)a)[i] != ((const u8 *)b)[i]) return 0;
    return 1;
}
static void big16(u8 *at, u32 v) { at[0] = (u8)(v >> 8); at[1] = (u8)v; }

static u32 checksum(const u8 *at, u32 bytes, u32 sum) {
    for (u32 i = 0; i < bytes; i++) sum += i & 1 ? at[i] : at[i] << 8;
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return ~sum & 0xffff;
}

static void send(u32 type, u32 bytes) {
    memcpy(out + HEADER, peer, 6);
    memcpy(out + HEADER + 6, own, 6);
    big16(out + HEADER + 12, type);
    add(transmit, (struct descriptor[]){{(u64)out, HEADER, 0, 0}, {(u64)out + HEADER, 14 + bytes, 0, 0}}, 2);
    notify(transmit);
    wait_used(transmit, 1);
}

static void offer(u32 n) {
    add(receive, (struct descriptor[]){{(u64)in[n], FRAME, DEVICE_WRITES, 0}}, 1);
    notify(receive);
}

// The next frame of a kind, from behind its Ethernet header; what else comes is counted.
static u8 *next(u32 type, u32 protocol) {
    while (1) {
        wait_used(receive, 1);
        u32 id = receive->used.ring[(u16)(receive->seen - 1) % QUEUE].id;
        u8 *frame = (u8 *)receive->table[id].at + HEADER;
        offer((u32)(((u64)frame - (u64)in) / FRAME));
        u8 *rest = frame + 14;
        int is_it = frame[12] == type >> 8 && frame[13] == (type & 255);
        if (is_it && type == 0x806) is_it = rest[7] == 2;
        if (is_it && type == 0x800) is_it = rest[9] == protocol && same(rest + 16, OWN_IP, 4);
        if (is_it) return frame + 14;
        others++;
    }
}

static u8 *ip_packet(u32 protocol, u32 bytes) {
    u8 *ip = out + HEADER + 14;
    for (u32 i = 0; i < 20; i++) ip[i] = 0;
    ip[0] = 0x45;
    big16(ip + 2, 20 + bytes);
    ip[8] = 64;
    ip[9] = (u8)protocol;
    memcpy(ip + 12, OWN_IP, 4);
    memcpy(ip + 16, PEER_IP, 4);
    big16(ip + 10, checksum(ip, 20, 0));
    return ip + 20;
}

static void ask_for_peer(void) {
    u8 *arp = out + HEADER + 14;
    static const u8 START[8] = {0, 1, 8, 0, 6, 4, 0, 1};
    memcpy(arp, START, 8);
    memcpy(arp + 8, own, 6);
    memcpy(arp + 14, OWN_IP, 4);
    memcpy(arp + 24, PEER_IP, 4);
    send(0x806, 28);
    memcpy(peer, next(0x806, 0) + 8, 6);
}

static u64 echo(u32 number, u32 bytes) {
    u8 *icmp = ip_packet(1, 8 + bytes);
    memcpy(icmp, (u8[8]){8, 0, 0, 0, 0x12, 0x34, 0, (u8)number}, 8);
    for (u32 i = 0; i < bytes; i++) icmp[8 + i] = (u8)(i * number + 3);
    big16(icmp + 2, checksum(icmp, 8 + bytes, 0));
    send(0x800, 28 + bytes);
    u8 *answer = next(0x800, 1) + 20;
    return answer[0] == 0 && same(answer + 8, icmp + 8, bytes);
}

// A datagram whose checksum is left to the device, to a port where nobody is: the answer quotes it.
static void datagram(void) {
    u8 *udp = ip_packet(17, 8 + 100);
    big16(udp, 4000);
    big16(udp + 2, 9);
    big16(udp + 4, 108);
    for (u32 i = 0; i < 100; i++) udp[8 + i] = (u8)i;
    u8 *ip = udp - 20;
    big16(udp + 6, ~checksum(ip + 12, 8, 17 + 108));
    out[0] = 1;                             // NEEDS_CSUM, from behind IP's header, 6 bytes into UDP's
    out[6] = 34;
    out[8] = 6;
    send(0x800, 128);
    out[0] = out[6] = out[8] = 0;
    u8 *answer = next(0x800, 1) + 20;
    print_number("net: unreachable ", answer[0] * 10 + answer[1]);
    print_hex("net: checksum ", answer[34] << 8 | answer[35]);
}

void test_net(void) {
    u64 slot = find(1, 1ul | 1ul << 5, 0);
    if (!slot) return;
    receive = add_queue(slot, 0);
    transmit = add_queue(slot, 1);
    start(slot);
    for (u32 i = 0; i < 6; i++) own[i] = read8(slot + 0x100 + i);
    for (u32 i = 0; i < 8; i++) offer(i);
    ask_for_peer();
    u64 answered = 0;
    for (u32 i = 1; i <= 3; i++) answered += echo(i, i * i * 150);
    datagram();
    print_number("net: answered ", answered);
    print_number("net: others ", others);
}
