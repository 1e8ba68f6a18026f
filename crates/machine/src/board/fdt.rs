//! The flattened device tree that describes the machine to its guest, node for node as QEMU's `virt` board has it.
//!
//! Not here, since the devices do not exist: `pci`, `flash`, `fw-cfg`, `platform-bus` and `pmu`.
//!
//! # Determinism
//! The blob is a function of the configuration, the command line and where the initial RAM disk lies.
//!
//! # References
//! Devicetree Specification 0.4, chapter 5. Version 17, last compatible version 16.

use crate::config::{MachineConfig, VIRTIO_SLOTS};
use crate::ram::RAM_BASE;

use super::clint::CLINT_SIZE;
use super::finisher::{FINISHER_SIZE, PASS, RESET};
use super::plic::{PLIC_SIZE, SOURCES};
use super::rtc::RTC_SIZE;
use super::uart::UART_SIZE;
use super::{
    CLINT_BASE, FINISHER_BASE, PLIC_BASE, RTC_BASE, RTC_IRQ, UART_BASE, UART_IRQ, VIRTIO_BASE,
    VIRTIO_IRQ, VIRTIO_STRIDE,
};

/// Ticks of `mtime` in a second.
pub const TIMEBASE_HZ: u32 = 10_000_000;

/// Bytes of a block of the cache operations, which are aligned to it.
pub const CACHE_BLOCK_BYTES: u32 = 64;

/// Extensions of the harts, in the order of QEMU's ISA string. Svadu without Svade says that accessed and dirty bits are set
/// by hardware from the start. Not Zkt: see [`isa::crypto`].
const EXTENSIONS: [&str; 35] = [
    "i",
    "m",
    "a",
    "f",
    "d",
    "c",
    "zicbom",
    "zicbop",
    "zicboz",
    "zicond",
    "zicntr",
    "zicsr",
    "zifencei",
    "zihintpause",
    "zawrs",
    "zfa",
    "zca",
    "zcb",
    "zcd",
    "zba",
    "zbb",
    "zbc",
    "zbkb",
    "zbkc",
    "zbkx",
    "zbs",
    "zkn",
    "zknd",
    "zkne",
    "zknh",
    "sstc",
    "svadu",
    "svinval",
    "svnapot",
    "svpbmt",
];
const UART_CLOCK_HZ: u32 = 3_686_400;
const UART_PATH: &str = "/soc/serial@10000000";

const HEADER_BYTES: u32 = 40;
const RESERVATIONS_BYTES: u32 = 16;
const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const END: u32 = 9;

/// Writes a flattened device tree, node by node.
#[derive(Debug, Default)]
struct Writer {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl Writer {
    fn word(&mut self, word: u32) {
        self.structure.extend(word.to_be_bytes());
    }

    fn pad(&mut self) {
        self.structure.resize(self.structure.len().next_multiple_of(4), 0);
    }

    fn begin(&mut self, name: &str) {
        self.word(BEGIN_NODE);
        self.structure.extend(name.as_bytes());
        self.structure.push(0);
        self.pad();
    }

    fn end(&mut self) {
        self.word(END_NODE);
    }

    fn bytes(&mut self, name: &str, value: &[u8]) {
        let name_at = self.string(name);
        self.word(PROP);
        self.word(value.len() as u32);
        self.word(name_at);
        self.structure.extend(value);
        self.pad();
    }

    /// Offset of a property's name among the strings.
    fn string(&mut self, name: &str) -> u32 {
        let mut at = 0;
        for known in self.strings.split_inclusive(|&b| b == 0) {
            if known.strip_suffix(&[0]) == Some(name.as_bytes()) {
                return at;
            }
            at += known.len() as u32;
        }
        self.strings.extend(name.as_bytes());
        self.strings.push(0);
        at
    }

    fn cells(&mut self, name: &str, cells: &[u32]) {
        let value: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.bytes(name, &value);
    }

    fn u64(&mut self, name: &str, value: u64) {
        self.bytes(name, &value.to_be_bytes());
    }

    fn text(&mut self, name: &str, value: &str) {
        self.list(name, &[value]);
    }

    fn list(&mut self, name: &str, values: &[&str]) {
        let value: Vec<u8> = values.iter().flat_map(|v| v.bytes().chain([0])).collect();
        self.bytes(name, &value);
    }

    fn flag(&mut self, name: &str) {
        self.bytes(name, &[]);
    }

    fn reg(&mut self, base: u64, size: u64) {
        let split = |v: u64| [(v >> 32) as u32, v as u32];
        self.cells("reg", &[split(base), split(size)].concat());
    }

    fn finish(mut self) -> Vec<u8> {
        self.word(END);
        let structure_at = HEADER_BYTES + RESERVATIONS_BYTES;
        let structure_len = self.structure.len() as u32;
        let strings_len = self.strings.len() as u32;
        let strings_at = structure_at + structure_len;
        let header: [u32; 10] = [
            MAGIC,
            strings_at + strings_len,
            structure_at,
            strings_at,
            HEADER_BYTES,
            17,
            16,
            0,
            strings_len,
            structure_len,
        ];
        let mut blob: Vec<u8> = header.iter().flat_map(|word| word.to_be_bytes()).collect();
        blob.extend([0; RESERVATIONS_BYTES as usize]);
        blob.extend(self.structure);
        blob.extend(self.strings);
        blob
    }
}

/// Phandles: harts from 1, then their interrupt controllers, the PLIC and the finisher.
struct Handles {
    harts: u32,
}

impl Handles {
    fn cpu(&self, hart: u32) -> u32 {
        1 + hart
    }

    fn intc(&self, hart: u32) -> u32 {
        1 + self.harts + hart
    }

    fn plic(&self) -> u32 {
        1 + 2 * self.harts
    }

    fn finisher(&self) -> u32 {
        2 + 2 * self.harts
    }
}

/// The blob for a machine of this configuration. `initrd` is the first address of the initial RAM disk and the one
/// after its last. A zero byte ends `bootargs`.
#[must_use]
pub fn build(config: &MachineConfig, bootargs: &str, initrd: Option<(u64, u64)>) -> Vec<u8> {
    let handles = Handles { harts: u32::from(config.harts) };
    let mut w = Writer::default();
    w.begin("");
    w.cells("#address-cells", &[2]);
    w.cells("#size-cells", &[2]);
    w.text("compatible", "riscv-virtio");
    w.text("model", "riscv-virtio,qemu");
    chosen(&mut w, config, bootargs, initrd);
    w.begin("aliases");
    w.text("serial0", UART_PATH);
    w.end();
    w.begin(&format!("memory@{RAM_BASE:x}"));
    w.text("device_type", "memory");
    w.reg(RAM_BASE, config.ram_size);
    w.end();
    cpus(&mut w, &handles);
    for (name, value) in [("poweroff", PASS), ("reboot", RESET)] {
        w.begin(name);
        w.text("compatible", &format!("syscon-{name}"));
        w.cells("regmap", &[handles.finisher()]);
        w.cells("offset", &[0]);
        w.cells("value", &[value]);
        w.end();
    }
    soc(&mut w, &handles);
    w.end();
    w.finish()
}

fn chosen(w: &mut Writer, config: &MachineConfig, bootargs: &str, initrd: Option<(u64, u64)>) {
    w.begin("chosen");
    w.text("stdout-path", UART_PATH);
    if !bootargs.is_empty() {
        w.text("bootargs", bootargs.split('\0').next().unwrap_or_default());
    }
    if let Some((start, end)) = initrd {
        w.u64("linux,initrd-start", start);
        w.u64("linux,initrd-end", end);
    }
    if !config.rng_seed.is_empty() {
        w.bytes("rng-seed", &config.rng_seed);
    }
    w.end();
}

/// The ISA string: single letters first, then the others behind underscores.
fn isa_string() -> String {
    let mut isa = String::from("rv64");
    for extension in EXTENSIONS {
        if extension.len() > 1 {
            isa.push('_');
        }
        isa.push_str(extension);
    }
    isa
}

fn cpus(w: &mut Writer, handles: &Handles) {
    let isa = isa_string();
    w.begin("cpus");
    w.cells("#address-cells", &[1]);
    w.cells("#size-cells", &[0]);
    w.cells("timebase-frequency", &[TIMEBASE_HZ]);
    for hart in 0..handles.harts {
        w.begin(&format!("cpu@{hart:x}"));
        w.cells("phandle", &[handles.cpu(hart)]);
        w.text("device_type", "cpu");
        w.cells("reg", &[hart]);
        w.text("status", "okay");
        w.text("compatible", "riscv");
        w.list("riscv,isa-extensions", &EXTENSIONS);
        w.text("riscv,isa-base", "rv64i");
        w.text("riscv,isa", &isa);
        for operations in ["cbom", "cbop", "cboz"] {
            w.cells(&format!("riscv,{operations}-block-size"), &[CACHE_BLOCK_BYTES]);
        }
        w.text("mmu-type", "riscv,sv48");
        w.begin("interrupt-controller");
        w.cells("#interrupt-cells", &[1]);
        w.flag("interrupt-controller");
        w.text("compatible", "riscv,cpu-intc");
        w.cells("phandle", &[handles.intc(hart)]);
        w.end();
        w.end();
    }
    w.begin("cpu-map");
    w.begin("cluster0");
    for hart in 0..handles.harts {
        w.begin(&format!("core{hart}"));
        w.cells("cpu", &[handles.cpu(hart)]);
        w.end();
    }
    w.end();
    w.end();
    w.end();
}

fn soc(w: &mut Writer, handles: &Handles) {
    w.begin("soc");
    w.cells("#address-cells", &[2]);
    w.cells("#size-cells", &[2]);
    w.text("compatible", "simple-bus");
    w.flag("ranges");
    w.begin(&format!("test@{FINISHER_BASE:x}"));
    w.cells("phandle", &[handles.finisher()]);
    w.list("compatible", &["sifive,test1", "sifive,test0", "syscon"]);
    w.reg(FINISHER_BASE, FINISHER_SIZE);
    w.end();
    interrupt_controllers(w, handles);
    device(w, handles, "rtc", "google,goldfish-rtc", (RTC_BASE, RTC_SIZE), RTC_IRQ);
    w.end();
    device(w, handles, "serial", "ns16550a", (UART_BASE, UART_SIZE), UART_IRQ);
    w.cells("clock-frequency", &[UART_CLOCK_HZ]);
    w.end();
    // Linux numbers devices in the order of these nodes: the first disk must be vda.
    for slot in 0..VIRTIO_SLOTS as u32 {
        let base = VIRTIO_BASE + VIRTIO_STRIDE * u64::from(slot);
        let region = (base, VIRTIO_STRIDE);
        device(w, handles, "virtio_mmio", "virtio,mmio", region, VIRTIO_IRQ + slot);
        w.end();
    }
    w.end();
}

/// Begins the node of a device with one interrupt; the caller ends it.
fn device(
    w: &mut Writer,
    handles: &Handles,
    name: &str,
    compatible: &str,
    region: (u64, u64),
    irq: u32,
) {
    w.begin(&format!("{name}@{:x}", region.0));
    w.text("compatible", compatible);
    w.reg(region.0, region.1);
    w.cells("interrupt-parent", &[handles.plic()]);
    w.cells("interrupts", &[irq]);
}

fn interrupt_controllers(w: &mut Writer, handles: &Handles) {
    let of_harts = |first: u32, second: u32| -> Vec<u32> {
        (0..handles.harts)
            .flat_map(|hart| [handles.intc(hart), first, handles.intc(hart), second])
            .collect()
    };
    w.begin(&format!("clint@{CLINT_BASE:x}"));
    w.list("compatible", &["sifive,clint0", "riscv,clint0"]);
    w.reg(CLINT_BASE, CLINT_SIZE);
    // Machine software and timer interrupts.
    w.cells("interrupts-extended", &of_harts(3, 7));
    w.end();
    w.begin(&format!("plic@{PLIC_BASE:x}"));
    w.cells("phandle", &[handles.plic()]);
    w.list("compatible", &["sifive,plic-1.0.0", "riscv,plic0"]);
    w.reg(PLIC_BASE, PLIC_SIZE);
    // Machine and supervisor external interrupts: the contexts in their order.
    w.cells("interrupts-extended", &of_harts(11, 9));
    w.flag("interrupt-controller");
    w.cells("#interrupt-cells", &[1]);
    w.cells("#address-cells", &[0]);
    w.cells("riscv,ndev", &[SOURCES - 1]);
    w.end();
}
