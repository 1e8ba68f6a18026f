//! A driver's side of the transport: rings built in guest RAM, real transfers, and drivers that break every rule.

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::board::{ApplyError, Board, BoardSaved, BusCtx, NetRoom, VIRTIO_BASE, VIRTIO_STRIDE};
use crate::config::{DiskConfig, MachineConfig, NetConfig};
use crate::io::{BlkOp, BlkStatus, Input, Output, OutputKind};
use crate::offload::{Offloads, plain};
use crate::ram::{GuestRam, RAM_BASE};

const SIZE: u16 = 16;
const NET: u64 = 0;
const BLK: u64 = 1;
const RO_BLK: u64 = 2;
const CON: u64 = 3;
const RNG: u64 = 4;
const RAM: u64 = 1 << 20;
/// Where buffers of the tests lie.
const BUF: u64 = RAM_BASE + 0x8_0000;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const VERSION_1: u64 = 1 << 32;
const MRG_RXBUF: u64 = 1 << 15;
/// Checksums, and segments of TCP over IPv4 and IPv6, in both directions.
const OFFLOADS: u64 = 0x1983;
const DISK: u64 = 1 << 20;

fn config() -> MachineConfig {
    let disk = |readonly| DiskConfig { size: DISK, readonly, serial: "serial-1".into() };
    MachineConfig {
        harts: 2,
        ram_size: 32 << 20,
        nets: vec![NetConfig { mac: [2, 0, 0, 0, 0, 1] }],
        disks: vec![disk(false), disk(true)],
        consoles: 1,
        rngs: 1,
        rtc_base_ns: 0,
        rng_seed: vec![],
    }
}

struct Rig {
    ram: GuestRam,
    board: Board,
    outputs: Vec<Output>,
    next_desc: BTreeMap<(u64, u64), u16>,
}

fn ring(slot: u64, queue: u64) -> u64 {
    RAM_BASE + (slot * 2 + queue) * 0x1000
}

impl Rig {
    fn new() -> Self {
        Self {
            ram: GuestRam::new(RAM),
            board: Board::new(&config()),
            outputs: vec![],
            next_desc: BTreeMap::new(),
        }
    }

    /// A rig whose device has been started with these features beside VERSION_1.
    fn started(slot: u64, features: u64) -> Self {
        let mut rig = Self::new();
        rig.start(slot, features);
        rig
    }

    fn with<R>(&mut self, f: impl FnOnce(&mut Board, &mut BusCtx<'_>) -> R) -> R {
        let Self { ram, board, outputs, .. } = self;
        let result = f(board, &mut BusCtx { ram, icount: 7, mtime: 0, outputs });
        self.check_contract();
        result
    }

    /// What is saved can be loaded and saves the same, in memory and encoded.
    fn check_contract(&self) {
        let saved = self.board.save();
        let bytes = postcard::to_stdvec(&saved).unwrap();
        assert_eq!(postcard::from_bytes::<BoardSaved>(&bytes).unwrap(), saved);
        let loaded = Board::load(&config(), &saved).unwrap();
        assert_eq!(loaded.save(), saved);
        assert_eq!(loaded.outstanding(), self.board.outstanding());
        for hart in 0..2 {
            assert_eq!(loaded.irq_lines(hart), self.board.irq_lines(hart));
        }
    }

    fn write(&mut self, slot: u64, offset: u64, value: u64) {
        let gpa = VIRTIO_BASE + slot * VIRTIO_STRIDE + offset;
        self.with(|board, ctx| board.write(gpa, 4, value, ctx).unwrap());
    }

    fn read(&mut self, slot: u64, offset: u64) -> u64 {
        let gpa = VIRTIO_BASE + slot * VIRTIO_STRIDE + offset;
        self.with(|board, ctx| board.read(gpa, 4, ctx).unwrap())
    }

    fn start(&mut self, slot: u64, features: u64) {
        self.write(slot, 0x70, 0);
        self.write(slot, 0x70, 3);
        for (word, part) in [(0, features), (1, VERSION_1 >> 32)] {
            self.write(slot, 0x24, word);
            self.write(slot, 0x20, part & 0xffff_ffff);
        }
        self.write(slot, 0x70, 11);
        assert_eq!(self.read(slot, 0x70), 11);
        for queue in 0..2 {
            self.write(slot, 0x30, queue);
            if self.read(slot, 0x34) == 0 {
                continue;
            }
            self.ram.write(ring(slot, queue), &[0; 0x1000]).unwrap();
            self.next_desc.remove(&(slot, queue));
            self.write(slot, 0x38, SIZE.into());
            self.write(slot, 0x80, ring(slot, queue));
            self.write(slot, 0x90, ring(slot, queue) + 0x400);
            self.write(slot, 0xa0, ring(slot, queue) + 0x800);
            self.write(slot, 0x44, 1);
        }
        self.write(slot, 0x70, 15);
    }

    fn desc(&mut self, at: u64, (gpa, len, writable): (u64, u32, bool), next: Option<u16>) {
        let flags = u16::from(next.is_some()) | u16::from(writable) << 1;
        self.raw_desc(at, gpa, len, flags, next.unwrap_or(0));
    }

    fn raw_desc(&mut self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        self.ram.write(at, &gpa.to_le_bytes()).unwrap();
        self.ram.write(at + 8, &len.to_le_bytes()).unwrap();
        self.ram.write(at + 12, &flags.to_le_bytes()).unwrap();
        self.ram.write(at + 14, &next.to_le_bytes()).unwrap();
    }

    fn avail(&mut self, slot: u64, queue: u64, head: u16) {
        let avail = ring(slot, queue) + 0x400;
        let index = self.ram.read_u16(avail + 2).unwrap();
        let entry = avail + 4 + 2 * u64::from(index % SIZE);
        self.ram.write(entry, &head.to_le_bytes()).unwrap();
        self.ram.write(avail + 2, &index.wrapping_add(1).to_le_bytes()).unwrap();
    }

    /// Makes a chain of (address, length, writable) available; returns its head.
    fn add(&mut self, slot: u64, queue: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        let free = self.next_desc.entry((slot, queue)).or_default();
        let head = *free % SIZE;
        *free += buffers.len() as u16;
        for (i, &buffer) in (0u16..).zip(buffers) {
            let at = ring(slot, queue) + 16 * u64::from((head + i) % SIZE);
            let next = (usize::from(i) + 1 < buffers.len()).then_some((head + i + 1) % SIZE);
            self.desc(at, buffer, next);
        }
        self.avail(slot, queue, head);
        head
    }

    /// The same through an indirect table at `table`.
    fn add_indirect(
        &mut self,
        slot: u64,
        queue: u64,
        table: u64,
        buffers: &[(u64, u32, bool)],
    ) -> u16 {
        for (i, &buffer) in (0u16..).zip(buffers) {
            let next = (usize::from(i) + 1 < buffers.len()).then_some(i + 1);
            self.desc(table + 16 * u64::from(i), buffer, next);
        }
        let free = self.next_desc.entry((slot, queue)).or_default();
        let head = *free % SIZE;
        *free += 1;
        let at = ring(slot, queue) + 16 * u64::from(head);
        self.raw_desc(at, table, 16 * buffers.len() as u32, 4, 0);
        self.avail(slot, queue, head);
        head
    }

    fn kick(&mut self, slot: u64, queue: u64) {
        self.write(slot, 0x50, queue);
    }

    /// Used elements so far: head and length; at most one ring full.
    fn used(&self, slot: u64, queue: u64) -> Vec<(u16, u32)> {
        let used = ring(slot, queue) + 0x800;
        let count = self.ram.read_u16(used + 2).unwrap();
        (0..count)
            .map(|i| {
                let at = used + 4 + 8 * u64::from(i % SIZE);
                (self.ram.read_u16(at).unwrap(), self.ram.read_u32(at + 4).unwrap())
            })
            .collect()
    }

    fn apply(&mut self, input: Input) -> Result<(), ApplyError> {
        let before = self.board.save();
        let result = self.with(|board, ctx| board.apply(&input, ctx));
        if result.is_err() {
            assert_eq!(self.board.save(), before);
        }
        result
    }

    fn take_outputs(&mut self) -> Vec<OutputKind> {
        std::mem::take(&mut self.outputs).into_iter().map(|o| o.kind).collect()
    }

    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(gpa, &mut bytes).unwrap();
        bytes
    }

    /// Queues a block request with its header and status byte at `at`, data in two pieces behind it.
    fn blk(&mut self, at: u64, kind: u32, sector: u64, data: u32) -> u16 {
        self.ram.write(at, &kind.to_le_bytes()).unwrap();
        self.ram.write(at + 8, &sector.to_le_bytes()).unwrap();
        self.ram.write(at + 16, &[0xff]).unwrap();
        let read = kind == 0 || kind == 8;
        let mut chain = vec![(at, 16, false)];
        if data > 0 {
            chain.push((at + 32, data / 2, read));
            chain.push((at + 32 + u64::from(data / 2), data - data / 2, read));
        }
        chain.push((at + 16, 1, true));
        self.add(BLK, 0, &chain)
    }

    fn done(&mut self, id: u64, data: &[u8]) -> Result<(), ApplyError> {
        self.apply(Input::BlkDone { dev: 0, id, status: BlkStatus::Ok, data: data.to_vec() })
    }
}

fn ids(outputs: &[OutputKind]) -> Vec<u64> {
    let id = |o: &OutputKind| if let OutputKind::Blk { id, .. } = o { Some(*id) } else { None };
    outputs.iter().filter_map(id).collect()
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn slots_identify_their_devices() {
    let mut rig = Rig::new();
    for (slot, id) in [1, 2, 2, 3, 4, 0, 0, 0].into_iter().enumerate() {
        assert_eq!(rig.read(slot as u64, 0), 0x7472_6976);
        assert_eq!(rig.read(slot as u64, 4), 2);
        assert_eq!(rig.read(slot as u64, 8), id);
    }
    assert_eq!(rig.read(NET, 0x100), 2);
    assert_eq!(rig.read(NET, 0x104), 0x0001_0100);
    assert_eq!(rig.read(BLK, 0x100), DISK / 512);
    assert_eq!(rig.read(BLK, 0x10) & 1 << 5, 0);
    assert_eq!(rig.read(RO_BLK, 0x10) & 1 << 5, 1 << 5);
}

#[test]
fn unknown_features_are_not_accepted() {
    let mut rig = Rig::new();
    rig.write(RNG, 0x70, 3);
    rig.write(RNG, 0x20, 1);
    rig.write(RNG, 0x24, 1);
    rig.write(RNG, 0x20, 1);
    rig.write(RNG, 0x70, 11);
    assert_eq!(rig.read(RNG, 0x70), 3);
    rig.write(RNG, 0x24, 0);
    rig.write(RNG, 0x20, 0);
    rig.write(RNG, 0x70, 11);
    assert_eq!(rig.read(RNG, 0x70), 11);
}

#[test]
fn net_sends_what_follows_the_header() {
    for features in [0, EVENT_IDX, EVENT_IDX | INDIRECT] {
        let mut rig = Rig::started(NET, features);
        rig.ram.write(BUF + 12, &frame(100)).unwrap();
        let chain = [(BUF, 20, false), (BUF + 20, 92, false)];
        let head = if features & INDIRECT != 0 {
            rig.add_indirect(NET, 1, BUF + 0x1000, &chain)
        } else {
            rig.add(NET, 1, &chain)
        };
        assert!(rig.take_outputs().is_empty());
        rig.kick(NET, 1);
        assert_eq!(rig.take_outputs(), [OutputKind::NetTx { dev: 0, packet: plain(&frame(100)) }]);
        assert_eq!(rig.used(NET, 1), [(head, 0)]);
        assert_eq!(rig.read(NET, 0x60), 1);
        rig.write(NET, 0x64, 1);
        assert_eq!(rig.read(NET, 0x60), 0);
        // The next notification is wanted for the next chain.
        let avail_event = rig.ram.read_u16(ring(NET, 1) + 0x804 + 8 * 16).unwrap();
        assert_eq!(avail_event, u16::from(features & EVENT_IDX != 0));
    }
}

#[test]
fn event_idx_interrupts_at_the_wanted_entry_only() {
    let mut rig = Rig::started(NET, EVENT_IDX);
    let used_event = ring(NET, 1) + 0x404 + 2 * 16;
    rig.ram.write(used_event, &1u16.to_le_bytes()).unwrap();
    for expected in [0, 1, 0] {
        rig.add(NET, 1, &[(BUF, 100, false)]);
        rig.kick(NET, 1);
        assert_eq!(rig.read(NET, 0x60), expected);
        rig.write(NET, 0x64, 1);
    }
}

#[test]
fn frames_too_short_or_too_long_are_not_sent() {
    let mut rig = Rig::started(NET, 0);
    rig.add(NET, 1, &[(BUF, 8, false)]);
    rig.add(NET, 1, &[(BUF, 0x2_0000, false)]);
    rig.kick(NET, 1);
    assert!(rig.take_outputs().is_empty());
    assert_eq!(rig.used(NET, 1).len(), 2);
}

#[test]
fn net_receives_into_one_buffer_or_several_or_drops() {
    let mut rig = Rig::started(NET, MRG_RXBUF);
    let receive = |rig: &mut Rig, len| {
        rig.apply(Input::NetRx { dev: 0, packet: plain(&frame(len)) }).unwrap();
    };
    receive(&mut rig, 60);
    assert!(rig.used(NET, 0).is_empty());
    for i in 0..3 {
        rig.add(NET, 0, &[(BUF + 0x1000 * i, 512, true)]);
    }
    receive(&mut rig, 1600);
    assert!(rig.used(NET, 0).is_empty(), "a frame without room leaves the buffers");
    receive(&mut rig, 1000);
    assert_eq!(rig.used(NET, 0), [(0, 512), (1, 500)]);
    assert_eq!(rig.bytes(BUF, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(rig.bytes(BUF + 12, 500), frame(1000)[..500]);
    assert_eq!(rig.bytes(BUF + 0x1000, 500), frame(1000)[500..]);
    receive(&mut rig, 60);
    assert_eq!(rig.used(NET, 0).len(), 3);
    assert!(rig.board.irq_lines(0) == rig.board.irq_lines(1));
    assert!(rig.apply(Input::NetRx { dev: 1, packet: plain(&frame(60)) }).is_err());
}

/// A packet of TCP over IPv4 whose `data` bytes are to be cut into segments of `size`.
fn segments(data: usize, size: u16) -> Vec<u8> {
    let mut bytes = vec![2; 12];
    bytes.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    bytes.extend(frame(data));
    let mut packet = plain(&bytes);
    packet[..10].copy_from_slice(&[1, 1, 54, 0, 0, 0, 34, 0, 16, 0]);
    packet[4..6].copy_from_slice(&size.to_le_bytes());
    packet
}

#[test]
fn net_sends_work_only_as_far_as_it_was_offered() {
    let packet = segments(3000, 1000);
    let mut checksum = packet.clone();
    checksum[1..6].fill(0);
    let mut hostile = packet.clone();
    hostile[6] = 200;
    for (features, sent) in
        [(0, vec![]), (1, vec![&checksum]), (OFFLOADS, vec![&checksum, &packet])]
    {
        let mut rig = Rig::started(NET, features);
        for packet in [&checksum, &packet, &hostile] {
            rig.ram.write(BUF, packet).unwrap();
            rig.add(NET, 1, &[(BUF, packet.len() as u32, false)]);
            rig.kick(NET, 1);
        }
        let sent = sent.into_iter().map(|p| OutputKind::NetTx { dev: 0, packet: p.clone() });
        assert_eq!(rig.take_outputs(), sent.collect::<Vec<_>>());
        assert_eq!(rig.used(NET, 1).len(), 3);
    }
}

#[test]
fn net_receives_work_only_as_far_as_the_driver_takes_it() {
    let packet = segments(3000, 1000);
    for (features, is_taken) in
        [(MRG_RXBUF, false), (MRG_RXBUF | 2, false), (OFFLOADS | MRG_RXBUF, true)]
    {
        let mut rig = Rig::started(NET, features);
        for i in 0..4 {
            rig.add(NET, 0, &[(BUF + 0x1000 * i, 1024, true)]);
        }
        rig.apply(Input::NetRx { dev: 0, packet: packet.clone() }).unwrap();
        let taken = if is_taken { vec![(0, 1024), (1, 1024), (2, 1018)] } else { vec![] };
        assert_eq!(rig.used(NET, 0), taken);
        if is_taken {
            assert_eq!(rig.bytes(BUF, 10), packet[..10]);
            assert_eq!(rig.bytes(BUF + 10, 2), [3, 0]);
            assert_eq!(rig.bytes(BUF + 12, 1012), packet[12..1024]);
        }
        assert_eq!(rig.board.net_offloads(0).tcp4, features & OFFLOADS == OFFLOADS);
        rig.write(NET, 0x70, 0);
        assert_eq!(rig.board.net_offloads(0), Offloads::default());
    }
}

#[test]
fn a_header_may_be_longer_than_a_buffer() {
    let mut rig = Rig::started(NET, MRG_RXBUF);
    for (i, len) in [(0, 5), (1, 6), (2, 100)] {
        rig.add(NET, 0, &[(BUF + 0x1000 * i, len, true)]);
    }
    rig.apply(Input::NetRx { dev: 0, packet: plain(&frame(60)) }).unwrap();
    assert_eq!(rig.used(NET, 0), [(0, 5), (1, 6), (2, 61)]);
    assert_eq!(rig.bytes(BUF + 0x1000, 6), [0, 0, 0, 0, 0, 3]);
    assert_eq!(rig.bytes(BUF + 0x2000, 61), [&[0][..], &frame(60)].concat());
}

#[test]
fn room_is_told_without_a_trace() {
    let mut rig = Rig::new();
    let room = |rig: &Rig, bytes| rig.board.net_room(0, bytes, &rig.ram);
    assert_eq!(room(&rig, 100), NetRoom::Down);
    assert_eq!(rig.board.net_room(1, 100, &rig.ram), NetRoom::Down);
    rig.start(NET, MRG_RXBUF);
    assert_eq!(room(&rig, 100), NetRoom::Full);
    rig.add(NET, 0, &[(BUF, 600, true)]);
    rig.add(NET, 0, &[(BUF + 0x1000, 600, true)]);
    let before = rig.board.save();
    assert_eq!(room(&rig, 1200), NetRoom::Ready);
    assert_eq!(room(&rig, 1201), NetRoom::Full);
    assert_eq!(rig.board.save(), before);
    // A broken queue is for the device to find, and a buffer that is too small when there can be no other.
    rig.start(NET, 0);
    rig.add(NET, 0, &[(BUF, 600, true)]);
    assert_eq!(room(&rig, 1201), NetRoom::Ready);
    rig.start(NET, MRG_RXBUF);
    rig.add(NET, 0, &[(1, 600, true)]);
    let before = rig.board.save();
    assert_eq!(room(&rig, 100), NetRoom::Ready);
    assert_eq!(rig.board.save(), before);
    rig.apply(Input::NetRx { dev: 0, packet: plain(&frame(60)) }).unwrap();
    assert_eq!(room(&rig, 100), NetRoom::Down);
}

#[test]
fn blk_reads_and_writes() {
    let mut rig = Rig::started(BLK, EVENT_IDX);
    rig.ram.write(BUF + 0x1000 + 32, &[7; 1024]).unwrap();
    rig.blk(BUF, 0, 4, 1024);
    rig.blk(BUF + 0x1000, 1, 8, 1024);
    rig.blk(BUF + 0x2000, 4, 0, 0);
    rig.kick(BLK, 0);
    let issued = rig.take_outputs();
    let ops = [
        BlkOp::Read { offset: 2048, len: 1024 },
        BlkOp::Write { offset: 4096, data: vec![7; 1024] },
        BlkOp::Flush,
    ];
    let expected: Vec<_> =
        (0..).zip(ops).map(|(id, op)| OutputKind::Blk { dev: 0, id, op }).collect();
    assert_eq!(issued, expected);
    assert_eq!(rig.board.outstanding(), expected);
    rig.done(1, &[]).unwrap();
    assert_eq!(rig.bytes(BUF + 0x1010, 1), [0]);
    let wrong = rig.done(0, &[1; 512]).unwrap_err();
    assert!(matches!(wrong, ApplyError::DataLength { expected: 1024, found: 512, .. }));
    rig.done(0, &frame(1024)).unwrap();
    assert_eq!(rig.bytes(BUF + 32, 1024), frame(1024));
    let status = BlkStatus::IoErr;
    rig.apply(Input::BlkDone { dev: 0, id: 2, status, data: vec![] }).unwrap();
    assert_eq!(rig.bytes(BUF + 0x2010, 1), [1]);
    assert_eq!(rig.used(BLK, 0).iter().map(|u| u.1).collect::<Vec<_>>(), [1, 1025, 1]);
    assert!(rig.board.outstanding().is_empty());
    assert!(matches!(rig.done(2, &[]), Err(ApplyError::UnknownRequest { dev: 0, id: 2 })));
}

#[test]
fn blk_discards_and_tells_its_serial() {
    let mut rig = Rig::started(BLK, 0);
    let range = [&16u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat();
    for (i, kind) in [11, 13].into_iter().enumerate() {
        let at = BUF + 0x1000 * i as u64;
        rig.ram.write(at + 32, &range).unwrap();
        rig.blk(at, kind, 0, 16);
    }
    rig.blk(BUF + 0x2000, 8, 0, 20);
    rig.kick(BLK, 0);
    assert_eq!(rig.bytes(BUF + 0x2020, 9), *b"serial-1\0");
    let discard = BlkOp::Discard { offset: 8192, len: 4096 };
    assert_eq!(rig.take_outputs(), [OutputKind::Blk { dev: 0, id: 0, op: discard }]);
    rig.done(0, &[]).unwrap();
    let zeroes = BlkOp::WriteZeroes { offset: 8192, len: 4096 };
    assert_eq!(rig.take_outputs(), [OutputKind::Blk { dev: 0, id: 1, op: zeroes }]);
}

#[test]
fn bad_blk_requests_fail_at_once() {
    let mut rig = Rig::started(BLK, 0);
    let status = |rig: &mut Rig, kind, sector, data| {
        rig.blk(BUF, kind, sector, data);
        rig.kick(BLK, 0);
        assert!(rig.take_outputs().is_empty());
        rig.bytes(BUF + 16, 1)[0]
    };
    assert_eq!(status(&mut rig, 0, DISK / 512, 512), 1);
    assert_eq!(status(&mut rig, 1, DISK / 512 - 1, 1024), 1);
    assert_eq!(status(&mut rig, 0, u64::MAX, 512), 1);
    assert_eq!(status(&mut rig, 0, u64::MAX / 512, 512), 1);
    assert_eq!(status(&mut rig, 0, 0, 500), 1);
    assert_eq!(status(&mut rig, 0, 0, 0), 1);
    assert_eq!(status(&mut rig, 11, 0, 8), 1);
    assert_eq!(status(&mut rig, 99, 0, 0), 2);
}

#[test]
fn overlapping_requests_are_held_in_order() {
    let mut rig = Rig::started(BLK, 0);
    let at = |i: u64| BUF + 0x1000 * i;
    rig.blk(at(0), 1, 0, 1024); // 0: sectors 0-1
    rig.blk(at(1), 0, 1, 1024); // 1: reads 1-2, waits for 0
    rig.blk(at(2), 1, 2, 512); // 2: writes 2, waits for 1
    rig.blk(at(3), 0, 8, 512); // 3: free
    rig.kick(BLK, 0);
    assert_eq!(ids(&rig.take_outputs()), [0, 3]);
    assert_eq!(ids(&rig.board.outstanding()), [0, 3]);
    assert!(rig.done(1, &[0; 1024]).is_err(), "a request that waits cannot be done");
    rig.done(3, &[1; 512]).unwrap();
    assert!(rig.take_outputs().is_empty());
    rig.done(0, &[]).unwrap();
    assert_eq!(ids(&rig.take_outputs()), [1]);
    rig.done(1, &[2; 1024]).unwrap();
    assert_eq!(ids(&rig.take_outputs()), [2]);
    rig.blk(at(4), 4, 0, 0);
    rig.kick(BLK, 0);
    assert_eq!(ids(&rig.take_outputs()), [4], "a flush waits for nothing");
}

#[test]
fn requests_on_their_way_survive_a_reset_unseen() {
    for machine in [false, true] {
        let mut rig = Rig::started(BLK, 0);
        rig.blk(BUF, 1, 0, 512);
        rig.blk(BUF + 0x1000, 0, 0, 512);
        rig.kick(BLK, 0);
        assert_eq!(ids(&rig.take_outputs()), [0]);
        if machine {
            rig.board.reset();
        }
        rig.start(BLK, 0);
        assert_eq!(ids(&rig.board.outstanding()), [0]);
        rig.blk(BUF + 0x2000, 1, 0, 512);
        rig.kick(BLK, 0);
        assert!(rig.take_outputs().is_empty(), "a new write must not overtake the old one");
        rig.done(0, &[]).unwrap();
        assert_eq!(ids(&rig.take_outputs()), [2]);
        assert!(rig.used(BLK, 0).is_empty());
        rig.done(2, &[]).unwrap();
        assert_eq!(rig.used(BLK, 0).len(), 1);
    }
}

#[test]
fn requests_left_by_resets_are_bounded() {
    let mut rig = Rig::new();
    for _ in 0..40 {
        rig.start(BLK, 0);
        for i in 0..5 {
            rig.blk(BUF, 0, i, 512);
        }
        rig.kick(BLK, 0);
    }
    assert_eq!(rig.board.outstanding().len(), 128);
    rig.done(0, &[0; 512]).unwrap();
    assert_eq!(rig.board.outstanding().len(), 128, "what stayed in the queue is taken now");
}

#[test]
fn a_disk_grows_and_stays_so() {
    let mut rig = Rig::started(BLK, 0);
    let grow = |rig: &mut Rig, dev, size| rig.apply(Input::DiskResized { dev, size });
    rig.blk(BUF, 0, DISK / 512, 512);
    rig.kick(BLK, 0);
    assert_eq!(rig.bytes(BUF + 16, 1), [1]);
    let refused = ApplyError::DiskSize { dev: 0, size: DISK, present: DISK };
    assert_eq!(grow(&mut rig, 0, DISK), Err(refused));
    assert!(grow(&mut rig, 0, DISK + 100).is_err());
    assert!(grow(&mut rig, 7, DISK * 2).is_err());
    rig.write(BLK, 0x64, 3);
    assert_eq!((rig.read(BLK, 0x60), rig.read(BLK, 0xfc)), (0, 0));
    grow(&mut rig, 0, DISK * 2).unwrap();
    // The driver is told, once for each change.
    assert_eq!((rig.read(BLK, 0x60), rig.read(BLK, 0xfc)), (2, 1));
    assert_eq!(rig.board.disk_sizes(), [DISK * 2, DISK]);
    rig.write(BLK, 0x64, 2);
    assert_eq!(rig.read(BLK, 0x100), DISK * 2 / 512);
    rig.blk(BUF + 0x1000, 0, DISK / 512, 512);
    rig.kick(BLK, 0);
    assert_eq!(ids(&rig.take_outputs()), [0]);
    let loaded = Board::load(&config(), &rig.board.save()).unwrap();
    assert_eq!(loaded.disk_sizes(), [DISK * 2, DISK]);
    rig.check_contract();
    rig.board.reset();
    assert_eq!((rig.read(BLK, 0x100), rig.read(BLK, 0x60)), (DISK * 2 / 512, 0));
    // Without a driver nobody is told; whoever starts reads it anyway.
    grow(&mut rig, 1, DISK + 512).unwrap();
    assert_eq!((rig.read(RO_BLK, 0x60), rig.read(RO_BLK, 0xfc)), (0, 1));
}

#[test]
fn readonly_disks_refuse_writes() {
    let mut rig = Rig::started(RO_BLK, 0);
    rig.ram.write(BUF, &1u32.to_le_bytes()).unwrap();
    rig.add(RO_BLK, 0, &[(BUF, 16 + 512, false), (BUF + 0x1000, 1, true)]);
    rig.kick(RO_BLK, 0);
    assert!(rig.outputs.is_empty());
    assert_eq!(rig.bytes(BUF + 0x1000, 1), [1]);
}

#[test]
fn console_sends_and_buffers_input() {
    let mut rig = Rig::started(CON, EVENT_IDX);
    rig.ram.write(BUF, b"hello").unwrap();
    rig.add(CON, 1, &[(BUF, 2, false), (BUF + 2, 3, false)]);
    rig.kick(CON, 1);
    assert_eq!(rig.take_outputs(), [OutputKind::Console { dev: 1, bytes: b"hello".to_vec() }]);
    rig.apply(Input::Console { dev: 1, bytes: b"typed".to_vec() }).unwrap();
    rig.add(CON, 0, &[(BUF + 0x100, 3, true)]);
    rig.add(CON, 0, &[(BUF + 0x200, 64, true)]);
    rig.kick(CON, 0);
    assert_eq!(rig.used(CON, 0), [(0, 3), (1, 2)]);
    assert_eq!(
        (rig.bytes(BUF + 0x100, 3), rig.bytes(BUF + 0x200, 2)),
        (b"typ".into(), b"ed".into())
    );
    let unknown = rig.apply(Input::Console { dev: 2, bytes: vec![1] });
    assert_eq!(unknown, Err(ApplyError::UnknownDevice { kind: "console", dev: 2 }));
    for _ in 0..3 {
        rig.apply(Input::Console { dev: 1, bytes: vec![1; 40_000] }).unwrap();
    }
}

#[test]
fn entropy_fills_one_buffer_at_a_time() {
    let mut rig = Rig::started(RNG, 0);
    rig.add(RNG, 0, &[(BUF, 64, true)]);
    rig.add(RNG, 0, &[(BUF + 0x1000, 0x1_0000, true)]);
    rig.kick(RNG, 0);
    let wanted = |len| OutputKind::EntropyWanted { dev: 0, len };
    assert_eq!(rig.take_outputs(), [wanted(64)]);
    assert_eq!(rig.board.outstanding(), [wanted(64)]);
    rig.apply(Input::Entropy { dev: 0, bytes: vec![9; 100] }).unwrap();
    assert_eq!(rig.used(RNG, 0), [(0, 64)]);
    assert_eq!(rig.bytes(BUF + 63, 2), [9, 0]);
    assert_eq!(rig.take_outputs(), [wanted(4096)]);
    rig.write(RNG, 0x70, 0);
    rig.apply(Input::Entropy { dev: 0, bytes: vec![9; 100] }).unwrap();
    assert!(rig.board.outstanding().is_empty());
    assert!(rig.apply(Input::Entropy { dev: 1, bytes: vec![] }).is_err());
}

#[test]
fn a_broken_queue_needs_a_reset() {
    let breakages: [fn(&mut Rig); 7] = [
        // A loop of descriptors.
        |rig| rig.raw_desc(ring(NET, 1), BUF, 1, 1, 0),
        // A descriptor outside the table.
        |rig| rig.raw_desc(ring(NET, 1), BUF, 1, 1, SIZE),
        // A buffer outside RAM.
        |rig| rig.raw_desc(ring(NET, 1), RAM_BASE + RAM - 1, 2, 0, 0),
        |rig| rig.raw_desc(ring(NET, 1), u64::MAX, 2, 0, 0),
        // An indirect table of an impossible length, or of endless depth.
        |rig| rig.raw_desc(ring(NET, 1), BUF, 17, 4, 0),
        |rig| {
            rig.raw_desc(ring(NET, 1), BUF, 16, 4, 0);
            rig.raw_desc(BUF, BUF, 16, 4, 0);
        },
        // More available entries than the queue has.
        |rig| rig.ram.write(ring(NET, 1) + 0x402, &17u16.to_le_bytes()).unwrap(),
    ];
    for breakage in breakages {
        let mut rig = Rig::started(NET, INDIRECT);
        rig.add(NET, 1, &[(BUF, 100, false)]);
        breakage(&mut rig);
        rig.kick(NET, 1);
        assert_eq!(rig.read(NET, 0x70), 15 | 64);
        assert_eq!(rig.read(NET, 0x60), 2);
        assert!(rig.outputs.is_empty());
        rig.start(NET, 0);
        rig.add(NET, 1, &[(BUF, 100, false)]);
        rig.kick(NET, 1);
        assert_eq!(rig.outputs.len(), 1);
    }
}

#[test]
fn reset_is_power_on() {
    let mut rig = Rig::new();
    for slot in [NET, CON, RNG] {
        rig.start(slot, EVENT_IDX);
    }
    rig.apply(Input::Console { dev: 1, bytes: b"x".to_vec() }).unwrap();
    rig.apply(Input::NetRx { dev: 0, packet: plain(&frame(60)) }).unwrap();
    assert_ne!(rig.board.save(), Board::new(&config()).save());
    rig.board.reset();
    assert_eq!(rig.board.save(), Board::new(&config()).save());
}

/// What a hostile guest, with an innocent host, may do next.
#[derive(Debug, Clone)]
enum Step {
    Start(u64, u64),
    Register(u64, u64, u64),
    Access(u64, u8, u64),
    Desc(u64, u64, u64, u32, u16, u16),
    Poke(u64, Vec<u8>),
    Avail(u64, u64, u16),
    Kick(u64, u64),
    Input(Input),
    CompleteFirst,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = 0..6u64;
    let gpa = prop_oneof![
        4 => (0..RAM).prop_map(|o| RAM_BASE + o),
        2 => (0..16u64, 0..0x90u64).prop_map(|(r, o)| RAM_BASE + r * 0x1000 + o * 16),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..2048u32, 2 => (0..64u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let value = prop_oneof![0..20u64, gpa.clone(), any::<u64>()];
    let bytes = proptest::collection::vec(any::<u8>(), 0..200);
    let status = prop_oneof![Just(BlkStatus::Ok), Just(BlkStatus::IoErr)];
    let input = prop_oneof![
        (0..2u8, any::<bool>(), bytes.clone()).prop_map(|(dev, is_frame, bytes)| {
            let packet = if is_frame { plain(&bytes) } else { bytes };
            Input::NetRx { dev, packet }
        }),
        (0..3u8, bytes.clone()).prop_map(|(dev, bytes)| Input::Console { dev, bytes }),
        (0..2u8, bytes.clone()).prop_map(|(dev, bytes)| Input::Entropy { dev, bytes }),
        (0..3u8, 0..4u64, status, bytes.clone())
            .prop_map(|(dev, id, status, data)| Input::BlkDone { dev, id, status, data }),
        (0..3u8, 0..8u64).prop_map(|(dev, n)| Input::DiskResized { dev, size: DISK + n * 256 }),
    ];
    let step = prop_oneof![
        2 => (slot.clone(), any::<u64>()).prop_map(|(s, f)| Step::Start(s, f)),
        3 => (slot.clone(), (0..0x48u64).prop_map(|o| o * 4), value.clone())
            .prop_map(|(s, o, v)| Step::Register(s, o, v)),
        1 => (any::<u64>(), prop_oneof![Just(1u8), Just(2), Just(4), Just(8)], value.clone())
            .prop_map(|(g, s, v)| Step::Access(g, s, v)),
        8 => (slot.clone(), 0..2u64, gpa.clone(), len, 0..8u16, 0..20u16)
            .prop_map(|(s, q, g, l, f, n)| Step::Desc(s, q, g, l, f, n)),
        2 => (gpa, bytes).prop_map(|(g, b)| Step::Poke(g, b)),
        6 => (slot.clone(), 0..2u64, 0..20u16).prop_map(|(s, q, h)| Step::Avail(s, q, h)),
        6 => (slot, 0..3u64).prop_map(|(s, q)| Step::Kick(s, q)),
        3 => input.prop_map(Step::Input),
        2 => Just(Step::CompleteFirst),
        1 => Just(Step::Reset),
    ];
    proptest::collection::vec(step, 1..80)
}

fn play(rig: &mut Rig, step: &Step, at: u64) {
    match step.clone() {
        Step::Start(slot, features) => {
            let offered =
                [MRG_RXBUF | OFFLOADS, 0, 0, 0, 0, 0][slot as usize] | EVENT_IDX | INDIRECT;
            if slot < 5 {
                rig.start(slot, features & offered);
            }
        }
        Step::Register(slot, offset, value) => rig.write(slot, offset, value),
        Step::Access(gpa, size, value) => {
            let bases = [0x10_0000, 0x10_1000, 0x200_0000, 0xc00_0000, 0x1000_0000];
            let gpa = bases[(gpa % 5) as usize] + (gpa >> 8) % 0x20_2000;
            rig.with(|board, ctx| {
                let _ = board.write(gpa, size, value, ctx);
                let _ = board.read(gpa, size, ctx);
            });
        }
        Step::Desc(slot, queue, gpa, len, flags, next) => {
            let entry = ring(slot, queue) + 16 * (at % u64::from(SIZE));
            rig.raw_desc(entry, gpa, len, flags, next);
        }
        Step::Poke(gpa, bytes) => {
            let _ = rig.ram.write(gpa, &bytes);
        }
        Step::Avail(slot, queue, head) => rig.avail(slot, queue, head),
        Step::Kick(slot, queue) => rig.kick(slot, queue),
        Step::Input(input) => {
            let _ = rig.apply(input);
        }
        Step::CompleteFirst => {
            let first = rig.board.outstanding().into_iter().next();
            if let Some(OutputKind::Blk { dev, id, op }) = first {
                let data =
                    if let BlkOp::Read { len, .. } = op { vec![5; len as usize] } else { vec![] };
                let done = Input::BlkDone { dev, id, status: BlkStatus::Ok, data };
                rig.apply(done).unwrap();
            }
        }
        Step::Reset => rig.board.reset(),
    }
    let _ = rig.board.take_request();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever a guest does: no panic, the same state and outputs again, and the same after a save and a load
    /// half-way (every step also passes the contract of save and load).
    #[test]
    fn hostile_drivers_do_no_harm(steps in steps()) {
        let (mut a, mut b) = (Rig::new(), Rig::new());
        for (at, step) in (0..).zip(&steps) {
            play(&mut a, step, at);
            play(&mut b, step, at);
            b.board = Board::load(&config(), &b.board.save()).unwrap();
        }
        prop_assert_eq!(a.board.save(), b.board.save());
        prop_assert_eq!(&a.outputs, &b.outputs);
        prop_assert_eq!(a.ram.digest(), b.ram.digest());
        for i in 0..a.outputs.len() {
            assert_on_disk(&a.outputs[i].kind);
        }
    }

    /// A saved state with flipped bytes is refused or makes a board that bears everything.
    #[test]
    fn hostile_snapshots_do_no_harm(
        before in steps(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        after in steps(),
    ) {
        let mut rig = Rig::new();
        for (at, step) in (0..).zip(&before) {
            play(&mut rig, step, at);
        }
        let mut bytes = postcard::to_stdvec(&rig.board.save()).unwrap();
        for (index, value) in flips {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        let Ok(saved) = postcard::from_bytes::<BoardSaved>(&bytes) else { return Ok(()) };
        let Ok(board) = Board::load(&config(), &saved) else { return Ok(()) };
        prop_assert_eq!(board.save(), saved);
        rig.board = board;
        for (at, step) in (0..).zip(&after) {
            play(&mut rig, step, at);
        }
    }
}

/// Operations that leave the machine lie on the disk.
fn assert_on_disk(output: &OutputKind) {
    if let OutputKind::Blk { op, .. } = output {
        let end = match op {
            BlkOp::Read { offset, len } => offset + u64::from(*len),
            BlkOp::Write { offset, data } => offset + data.len() as u64,
            BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => offset + len,
            BlkOp::Flush => 0,
        };
        assert!(end <= DISK + 7 * 256);
    }
}
