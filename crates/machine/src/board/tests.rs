//! The devices that are not virtio, the device tree and the boot loader.

use std::sync::Arc;

use super::boot::{self, KERNEL_BASE, LoadError};
use super::*;
use crate::config::{BootImages, ConfigError, DiskConfig, NetConfig};
use crate::ram::RAM_BASE;

fn config() -> MachineConfig {
    MachineConfig {
        harts: 2,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 1_000,
        rng_seed: vec![1; 32],
    }
}

struct Rig {
    board: Board,
    ram: GuestRam,
    outputs: Vec<Output>,
    mtime: u64,
}

impl Rig {
    fn new() -> Self {
        let board = Board::new(&config());
        Self { board, ram: GuestRam::new(4096), outputs: vec![], mtime: 0 }
    }

    fn with<R>(&mut self, f: impl FnOnce(&mut Board, &mut BusCtx<'_>) -> R) -> R {
        let Self { ram, board, outputs, mtime } = self;
        let result = f(board, &mut BusCtx { ram, icount: 0, mtime: *mtime, outputs });
        let saved = self.board.save();
        let loaded = Board::load(&config(), &saved).unwrap();
        assert_eq!(loaded.save(), saved);
        assert_eq!(loaded.irq_lines(1), self.board.irq_lines(1));
        result
    }

    fn read(&mut self, gpa: u64, size: u8) -> u64 {
        self.with(|board, ctx| board.read(gpa, size, ctx).unwrap())
    }

    fn write(&mut self, gpa: u64, size: u8, value: u64) {
        self.with(|board, ctx| board.write(gpa, size, value, ctx).unwrap());
    }

    fn uart(&mut self, register: u64) -> u64 {
        self.read(UART_BASE + register, 1)
    }

    fn set_uart(&mut self, register: u64, value: u64) {
        self.write(UART_BASE + register, 1, value);
    }

    fn type_in(&mut self, bytes: &[u8]) {
        let input = Input::Console { dev: 0, bytes: bytes.to_vec() };
        self.with(|board, ctx| board.apply(&input, ctx).unwrap());
    }

    fn printed(&mut self) -> Vec<u8> {
        let bytes = |o: Output| match o.kind {
            OutputKind::Console { dev: 0, bytes } => bytes,
            other => panic!("{other:?}"),
        };
        std::mem::take(&mut self.outputs).into_iter().flat_map(bytes).collect()
    }
}

#[test]
fn addresses_without_a_device_fault() {
    let mut rig = Rig::new();
    for gpa in [0, 0x10_2000, 0x201_0000, 0x1000_0100, 0x1000_9000, RAM_BASE, u64::MAX] {
        assert!(!Board::contains(gpa));
        assert_eq!(rig.with(|board, ctx| board.read(gpa, 4, ctx)), Err(BusFault));
        assert_eq!(rig.with(|board, ctx| board.write(gpa, 4, 0, ctx)), Err(BusFault));
    }
    assert!(Board::contains(VIRTIO_BASE + 0x7fff));
    assert_eq!(rig.with(|board, ctx| board.read(PLIC_BASE, 8, ctx)), Err(BusFault));
    assert_eq!(rig.with(|board, ctx| board.read(PLIC_BASE + 2, 4, ctx)), Err(BusFault));
}

#[test]
fn finisher_asks_for_power_off_or_reset() {
    let mut rig = Rig::new();
    for (value, request) in [
        (0x5555, Some(BoardRequest::PowerOff { code: 0 })),
        (0x0042_3333, Some(BoardRequest::PowerOff { code: 0x42 })),
        (0x7777, Some(BoardRequest::Reset)),
        (0x1234, None),
    ] {
        rig.write(FINISHER_BASE, 4, value);
        assert_eq!(rig.board.take_request(), request);
        assert_eq!(rig.board.take_request(), None);
    }
}

#[test]
fn clint_has_comparators_software_interrupts_and_the_time_of_the_access() {
    let mut rig = Rig::new();
    rig.write(CLINT_BASE + 4, 4, 1);
    assert!(rig.board.irq_lines(1).msip && !rig.board.irq_lines(0).msip);
    rig.write(CLINT_BASE + 0x4008, 8, 0x1_0000_0002);
    rig.write(CLINT_BASE + 0x400c, 4, 7);
    assert_eq!(rig.board.mtimecmp(1), 0x7_0000_0002);
    assert_eq!(rig.board.mtimecmp(0), u64::MAX);
    rig.mtime = 0x5_0000_0006;
    rig.write(CLINT_BASE + 0xbff8, 8, 99);
    assert_eq!(rig.read(CLINT_BASE + 0xbff8, 8), 0x5_0000_0006);
    assert_eq!(rig.read(CLINT_BASE + 0xbffc, 4), 5);
    assert_eq!(rig.read(CLINT_BASE + 0x4010, 8), 0, "a hart that does not exist");
}

#[test]
fn rtc_tells_time_and_wakes() {
    let mut rig = Rig::new();
    rig.mtime = 5;
    assert_eq!(rig.read(RTC_BASE, 4), 1_500);
    rig.write(RTC_BASE + 4, 4, 2);
    rig.write(RTC_BASE, 4, 10);
    assert_eq!((rig.read(RTC_BASE, 4), rig.read(RTC_BASE + 4, 4)), (10, 2));
    rig.write(RTC_BASE + 0x10, 4, 1);
    rig.write(RTC_BASE + 0x0c, 4, 2);
    rig.write(RTC_BASE + 0x08, 4, 510);
    assert_eq!(rig.board.next_deadline(), Some(10));
    assert_eq!(rig.read(RTC_BASE + 0x18, 4), 1);
    rig.write(PLIC_BASE + 4 * 11, 4, 1);
    rig.write(PLIC_BASE + 0x2000, 4, 1 << 11);
    rig.mtime = 9;
    rig.with(Board::poll);
    assert!(!rig.board.irq_lines(0).meip);
    rig.mtime = 10;
    rig.with(Board::poll);
    assert!(rig.board.irq_lines(0).meip);
    assert_eq!(rig.board.next_deadline(), None);
    rig.write(RTC_BASE + 0x1c, 4, 1);
    assert!(!rig.board.irq_lines(0).meip);
    // An alarm in the past goes off at once, and setting the clock past an alarm sets it off.
    rig.write(RTC_BASE + 0x08, 4, 0);
    assert!(rig.board.irq_lines(0).meip);
    rig.write(RTC_BASE + 0x1c, 4, 1);
    rig.write(RTC_BASE + 0x0c, 4, 3);
    rig.write(RTC_BASE + 0x08, 4, 0);
    assert!(!rig.board.irq_lines(0).meip);
    rig.write(RTC_BASE + 4, 4, 4);
    assert!(rig.board.irq_lines(0).meip);
}

#[test]
fn plic_claims_by_priority_and_masks_until_completion() {
    let mut rig = Rig::new();
    // Context 1: hart 0 in S-mode. UART and RTC both pend.
    rig.write(PLIC_BASE + 4 * 10, 4, 1);
    rig.write(PLIC_BASE + 4 * 11, 4, 15);
    assert_eq!(rig.read(PLIC_BASE + 4 * 11, 4), 7);
    rig.write(PLIC_BASE + 0x2080, 4, u64::from(u32::MAX));
    assert_eq!(rig.read(PLIC_BASE + 0x2080, 4), 0xffff_fffe, "source 0 does not exist");
    rig.set_uart(1, 1);
    rig.type_in(b"a");
    rig.write(RTC_BASE + 0x10, 4, 1);
    rig.write(RTC_BASE + 0x08, 4, 0);
    assert_eq!(rig.read(PLIC_BASE + 0x1000, 4), 1 << 10 | 1 << 11);
    let lines = IrqLines { seip: true, ..IrqLines::default() };
    assert_eq!((rig.board.irq_lines(0), rig.board.irq_lines(1)), (lines, IrqLines::default()));
    let claim = PLIC_BASE + 0x20_1004;
    rig.write(claim - 4, 4, 1);
    assert_eq!(rig.read(claim, 4), 11);
    assert!(!rig.board.irq_lines(0).seip, "the UART is not above the threshold");
    rig.write(claim - 4, 4, 0);
    assert_eq!(rig.read(claim, 4), 10);
    assert_eq!(rig.read(claim, 4), 0);
    assert_eq!(rig.read(PLIC_BASE + 0x1000, 4), 0);
    rig.write(claim, 4, 10);
    assert!(rig.board.irq_lines(0).seip, "the line is still high");
    assert_eq!(rig.uart(0), u64::from(b'a'));
    assert!(!rig.board.irq_lines(0).seip);
    assert_eq!(rig.read(claim, 4), 0);
    rig.write(claim, 4, 1 << 30);
}

#[test]
fn uart_prints_and_its_empty_interrupt_behaves_as_drivers_test_it() {
    let mut rig = Rig::new();
    assert_eq!(rig.uart(5), 0x60);
    assert_eq!(rig.uart(2), 1);
    rig.set_uart(1, 2);
    assert_eq!(rig.uart(2), 2);
    assert_eq!(rig.uart(2), 1, "reading the identification clears it");
    rig.set_uart(1, 0);
    rig.set_uart(1, 2);
    assert_eq!(rig.uart(2), 2, "enabling it again asserts it again");
    rig.set_uart(0, b'x'.into());
    assert_eq!(rig.uart(2), 2);
    assert_eq!(rig.printed(), b"x");
    rig.set_uart(3, 0x83);
    rig.set_uart(0, 0x12);
    rig.set_uart(1, 0x34);
    assert_eq!((rig.uart(0), rig.uart(1)), (0x12, 0x34));
    rig.set_uart(3, 3);
    assert_eq!(rig.uart(1), 2);
    rig.set_uart(7, 0xa5);
    assert_eq!(rig.uart(7), 0xa5);
    assert!(rig.printed().is_empty());
}

#[test]
fn uart_receives_through_its_fifo() {
    let mut rig = Rig::new();
    rig.set_uart(2, 0x81);
    rig.set_uart(1, 1);
    rig.type_in(&[b'.'; 7]);
    assert_eq!(rig.uart(2), 0xcc, "below the trigger level: timeout");
    rig.type_in(&[b'.'; 93]);
    assert_eq!(rig.uart(2), 0xc4);
    let mut count = 0;
    while rig.uart(5) & 1 != 0 {
        assert_eq!(rig.uart(0), u64::from(b'.'));
        count += 1;
    }
    assert_eq!(count, 100);
    assert_eq!(rig.uart(2), 0xc1);
    for _ in 0..3 {
        rig.type_in(&[1; 40_000]);
    }
    assert!(rig.board.save().uart.input.len() <= 64 << 10);
}

#[test]
fn uart_loopback_stays_inside() {
    let mut rig = Rig::new();
    assert_eq!(rig.uart(6), 0xb0);
    rig.set_uart(4, 0x1a);
    assert_eq!(rig.uart(6), 0x90, "what Linux's autoconfig expects");
    rig.set_uart(0, 0x55);
    rig.type_in(b"t");
    assert_eq!(rig.uart(5) & 1, 1);
    assert_eq!(rig.uart(0), 0x55);
    assert_eq!(rig.uart(5) & 1, 0);
    rig.set_uart(0, 1);
    rig.set_uart(0, 2);
    assert_eq!(rig.uart(5) & 2, 2, "overrun without FIFOs");
    rig.uart(0);
    rig.set_uart(4, 0);
    assert_eq!(rig.uart(0), u64::from(b't'));
    assert!(rig.printed().is_empty());
}

#[test]
fn inputs_for_nobody_are_refused() {
    let mut rig = Rig::new();
    let refused = [
        Input::NetRx { dev: 0, packet: vec![0; 72] },
        Input::BlkDone { dev: 0, id: 0, status: crate::io::BlkStatus::Ok, data: vec![] },
        Input::Console { dev: 1, bytes: vec![1] },
        Input::Entropy { dev: 0, bytes: vec![1] },
        Input::PowerOff,
        Input::Clock { mtime: 0, rate: 0 },
    ];
    for input in refused {
        assert!(rig.with(|board, ctx| board.apply(&input, ctx)).is_err());
    }
    assert_eq!(rig.board.save(), Board::new(&config()).save());
}

#[test]
fn states_of_another_configuration_are_refused() {
    let saved = Board::new(&config()).save();
    let three = MachineConfig { harts: 3, ..config() };
    let disk = DiskConfig { size: 512, readonly: false, serial: String::new() };
    let with_disk = MachineConfig { disks: vec![disk], ..config() };
    for other in [three, with_disk] {
        assert!(Board::load(&other, &saved).is_err());
    }
}

#[test]
fn impossible_configurations_are_named() {
    assert_eq!(config().check(), Ok(()));
    let disk = |size, serial: &str| DiskConfig { size, readonly: false, serial: serial.into() };
    let net = NetConfig { mac: [2; 6] };
    let check = |change: &dyn Fn(&mut MachineConfig)| {
        let mut config = config();
        change(&mut config);
        config.check()
    };
    assert_eq!(check(&|c| c.harts = 9), Err(ConfigError::Harts(9)));
    assert!(matches!(check(&|c| c.ram_size += 1), Err(ConfigError::Ram(_))));
    assert!(matches!(check(&|c| c.ram_size = 1 << 40), Err(ConfigError::Ram(_))));
    assert_eq!(check(&|c| c.nets = vec![net.clone(); 9]), Err(ConfigError::Slots(9)));
    assert!(matches!(check(&|c| c.disks = vec![disk(100, "")]), Err(ConfigError::DiskSize { .. })));
    let long = check(&|c| c.disks = vec![disk(512, "123456789012345678901")]);
    assert_eq!(long, Err(ConfigError::Serial { disk: 0, len: 21 }));
}

// --- Boot --------------------------------------------------------------------------------------------------------

fn image(len: usize, image_size: u64) -> Vec<u8> {
    let mut image = vec![0x13; len];
    image[8..16].copy_from_slice(&0x20_0000u64.to_le_bytes());
    image[16..24].copy_from_slice(&image_size.to_le_bytes());
    image[24..32].copy_from_slice(&0u64.to_le_bytes());
    image[0x38..0x3c].copy_from_slice(b"RSC\x05");
    image
}

fn elf_file(vaddr: u64, paddr: u64, data: &[u8], mem_bytes: u64) -> Vec<u8> {
    let mut elf = vec![0; 64 + 56];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[16] = 2;
    elf[18] = 243;
    elf[24..32].copy_from_slice(&(vaddr + 4).to_le_bytes());
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = 1;
    elf[64] = 1;
    for (at, value) in
        [(8, 120), (16, vaddr), (24, paddr), (32, data.len() as u64), (40, mem_bytes)]
    {
        elf[64 + at..64 + at + 8].copy_from_slice(&value.to_le_bytes());
    }
    elf.extend(data);
    elf
}

fn images(bios: Option<Vec<u8>>, kernel: Option<Vec<u8>>, initrd: Option<Vec<u8>>) -> BootImages {
    let arc = |image: Option<Vec<u8>>| image.map(Arc::from);
    BootImages {
        bios: arc(bios),
        kernel: arc(kernel),
        initrd: arc(initrd),
        append: "console=ttyS0".into(),
    }
}

fn load(images: &BootImages) -> (Result<boot::BootState, LoadError>, GuestRam) {
    let mut ram = GuestRam::new(config().ram_size);
    let result = boot::load(&config(), images, &mut ram);
    (result, ram)
}

#[test]
fn a_linux_image_starts_in_supervisor_mode() {
    let (state, ram) = load(&images(None, Some(image(0x1000, 0x10_0000)), Some(vec![7; 5000])));
    let state = state.unwrap();
    assert_eq!((state.pc, state.a2, state.machine_mode), (KERNEL_BASE, 0, false));
    assert_eq!(state.a1, RAM_BASE + (30 << 20), "the last 2 MiB boundary with room");
    let mut magic = [0; 4];
    ram.read(state.a1, &mut magic).unwrap();
    assert_eq!(u32::from_be_bytes(magic), 0xd00d_feed);
    let initrd = state.a1 - 8192;
    assert_eq!(ram.read_u32(initrd).unwrap(), 0x0707_0707);
    assert_eq!(ram.read_u16(initrd - 2).unwrap(), 0);
}

#[test]
fn firmware_starts_in_machine_mode_and_learns_where_the_kernel_is() {
    let (state, ram) = load(&images(Some(vec![0x6f; 3 << 20]), Some(image(0x1000, 0)), None));
    let state = state.unwrap();
    assert_eq!((state.pc, state.machine_mode), (RAM_BASE, true));
    let info: Vec<u64> = (0..6).map(|i| ram.read_u64(state.a2 + 8 * i).unwrap()).collect();
    assert_eq!(info, [0x4942_534f, 2, RAM_BASE + (4 << 20), 1, 0, 0]);
}

#[test]
fn firmware_starts_a_raw_binary_where_a_kernel_would_be() {
    let (state, ram) = load(&images(Some(vec![0x6f; 100]), Some(vec![5; 100]), None));
    assert_eq!(ram.read_u64(state.unwrap().a2 + 16).unwrap(), KERNEL_BASE);
    assert_eq!(ram.read_u32(KERNEL_BASE).unwrap(), 0x0505_0505);
    let gzip = Some(vec![0x1f, 0x8b, 8]);
    assert!(load(&images(Some(vec![0x6f; 100]), gzip, None)).0.is_err());
}

#[test]
fn elf_files_load_by_physical_address_or_else_by_virtual() {
    for paddr in [RAM_BASE + 0x1000, 0] {
        let (state, ram) =
            load(&images(None, Some(elf_file(RAM_BASE + 0x1000, paddr, &[9; 8], 64)), None));
        assert_eq!(state.unwrap().pc, RAM_BASE + 0x1004);
        assert_eq!(ram.read_u64(RAM_BASE + 0x1000).unwrap(), 0x0909_0909_0909_0909);
    }
    let kernel = elf_file(0xffff_ffff_8000_0000, RAM_BASE + 0x20_0000, &[9; 8], 64);
    assert_eq!(load(&images(None, Some(kernel), None)).0.unwrap().pc, KERNEL_BASE + 4);
}

#[test]
fn bad_images_are_refused_with_the_reason() {
    let message = |bios: Option<Vec<u8>>, kernel: Option<Vec<u8>>, initrd| {
        load(&images(bios, kernel, initrd)).0.unwrap_err().to_string()
    };
    let kernel = |kernel: Vec<u8>| message(None, Some(kernel), None);
    let mut bzimage = vec![0; 0x400];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let mut big_endian = image(0x1000, 0);
    big_endian[24] = 1;
    let good = elf_file(RAM_BASE, RAM_BASE, &[1; 100], 100);
    let patched = |at: usize, value: u8| {
        let mut elf = good.clone();
        elf[at] = value;
        elf
    };
    for (got, expected) in [
        (message(None, None, None), "neither firmware nor a kernel"),
        (kernel(vec![]), "the kernel is empty"),
        (kernel(vec![0x1f, 0x8b, 8]), "compressed with gzip"),
        (kernel(b"MZ\0\0zimg....".to_vec()), "zboot"),
        (kernel(bzimage), "x86 bzImage"),
        (kernel(vec![0; 100]), "unknown format"),
        (kernel(big_endian), "big-endian"),
        (kernel(image(0x40, 0)[..0x3c].to_vec()), "the file ends within it"),
        (kernel(image(0x1000, 1 << 30)), "does not fit"),
        (kernel(image(0x1000, u64::MAX)), "does not fit"),
        (kernel(good[..50].to_vec()), "within the header"),
        (kernel(good[..100].to_vec()), "within the program headers"),
        (kernel(good[..150].to_vec()), "within a segment"),
        (kernel(patched(4, 1)), "not a 64-bit"),
        (kernel(patched(18, 62)), "not for RISC-V"),
        (kernel(patched(64, 2)), "nothing to load"),
        (kernel(patched(31, 1)), "entry point"),
        (kernel(elf_file(RAM_BASE, RAM_BASE, &[1], u64::MAX)), "does not fit"),
        (kernel(elf_file(0, u64::MAX, &[1], 1)), "does not fit"),
        (message(Some(vec![1; 33 << 20]), None, None), "the firmware does not fit"),
        (message(Some(vec![1; 32 << 20]), None, None), "overlaps"),
        (message(Some(vec![1; 3 << 20]), Some(good.clone()), None), "overlaps the firmware"),
        (message(None, Some(image(0x1000, 0)), Some(vec![1; 29 << 20])), "initial RAM disk"),
        (message(None, Some(image(0x1000, 0)), Some(vec![1; 40 << 20])), "initial RAM disk"),
    ] {
        assert!(got.contains(expected), "{got:?} does not say {expected:?}");
        assert!(!got.contains('\n'));
    }
    let mut long = images(None, Some(image(0x1000, 0)), None);
    long.append = "x".repeat(20_000);
    assert!(matches!(load(&long).0, Err(LoadError::AppendTooLong { len: 20_000 })));
}

proptest::proptest! {
    #[test]
    fn arbitrary_headers_do_no_harm(
        elf: bool,
        patches in proptest::collection::vec((0..160usize, proptest::prelude::any::<u8>()), 0..12),
        cut in 0..240usize,
    ) {
        let mut file = if elf { elf_file(RAM_BASE, RAM_BASE, &[1; 100], 120) } else { image(240, 4096) };
        for (at, value) in patches {
            file[at] = value;
        }
        file.truncate(cut.max(1));
        let _ = load(&images(None, Some(file.clone()), None));
        let _ = load(&images(Some(file), None, None));
    }
}
