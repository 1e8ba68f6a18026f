//! A disk's speed beside QEMU's: the same requests of the same guest on the same kind of image.
//!
//! # Invariants
//! - INV-DISKBENCH-1: a load runs on one machine after the other within seconds, each with an image of its own that was just
//!   written and is in the host's page cache; the order changes each turn.
//!
//! QEMU runs with `cache=writeback`, once with `aio=threads` and once with `aio=io_uring`; the faster of the two counts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use super::Options;
use crate::bench::engine::running::{Running, Span};
use crate::bench::engine::side::QEMU;
use crate::bench::engine::workload::COMPILER;
use crate::bench::figure::{Figure, Section, Target, largest, listed, median};
use crate::bench::stage::Material;
use crate::demo::progress::Progress;

/// Size of the image.
const DISK_BYTES: usize = 256 << 20;
/// Longest time that a load, or a boot, takes.
const LOAD_MAX: Duration = Duration::from_secs(300);
/// Slowest that a stream may be, with QEMU's as 1.
const STREAM_MIN: f64 = 0.8;
/// Slowest that requests one after the other may be.
const SINGLE_MIN: f64 = 1.0;
const MEMORY: &str = "1G";

/// Requests of one kind.
struct Load {
    name: &'static str,
    what: &'static str,
    /// Arguments of the program: direction, order, block, depth.
    words: &'static str,
    block: u32,
    /// Requests in a turn.
    count: u32,
    target: Option<f64>,
}

const fn load(
    name: &'static str,
    (what, words): (&'static str, &'static str),
    (block, count): (u32, u32),
    target: Option<f64>,
) -> Load {
    Load { name, what, words, block, count, target }
}

const STREAM: (u32, u32) = (131_072, 4000);
const LOADS: &[Load] = &[
    load(
        "read-stream",
        ("reading 128 KiB in order, 8 at once", "read sequential 131072 8"),
        STREAM,
        Some(STREAM_MIN),
    ),
    load(
        "write-stream",
        ("writing 128 KiB in order, 8 at once", "write sequential 131072 8"),
        STREAM,
        Some(STREAM_MIN),
    ),
    load(
        "read-single",
        ("reading 4 KiB anywhere, one at a time", "read random 4096 1"),
        (4096, 10_000),
        Some(SINGLE_MIN),
    ),
    load(
        "write-single",
        ("writing 4 KiB anywhere, one at a time", "write random 4096 1"),
        (4096, 10_000),
        Some(SINGLE_MIN),
    ),
    load(
        "read-many",
        ("reading 4 KiB anywhere, 32 at once", "read random 4096 32"),
        (4096, 30_000),
        None,
    ),
    load(
        "write-many",
        ("writing 4 KiB anywhere, 32 at once", "write random 4096 32"),
        (4096, 30_000),
        None,
    ),
];

/// A machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Ours,
    QemuThreads,
    QemuUring,
}

const SIDES: [Side; 3] = [Side::Ours, Side::QemuThreads, Side::QemuUring];

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Ours => "understudy",
            Self::QemuThreads => "QEMU with threads",
            Self::QemuUring => "QEMU with io_uring",
        }
    }

    fn command(self, material: &Material, initrd: &Path, disk: &str) -> anyhow::Result<Command> {
        let aio = match self {
            Self::Ours => None,
            Self::QemuThreads => Some("threads"),
            Self::QemuUring => Some("io_uring"),
        };
        let mut command = match aio {
            None => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["run", "--memory", MEMORY]);
                command.args(["--disk", &format!("path={disk},format=raw")]);
                command
            }
            Some(aio) => {
                let mut command = Command::new(QEMU);
                command.args(["-M", "virt", "-accel", "tcg", "-m", MEMORY, "-smp", "1"]);
                command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
                command.args(["-no-reboot", "-global", "virtio-mmio.force-legacy=false"]);
                let drive =
                    format!("file={disk},format=raw,if=none,id=d,cache=writeback,aio={aio}");
                command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=d"]);
                command
            }
        };
        let [kernel, ramdisk, append] = if aio.is_none() {
            ["--kernel", "--initrd", "--append"]
        } else {
            ["-kernel", "-initrd", "-append"]
        };
        command.arg(kernel).arg(&material.guest.kernel).arg(ramdisk).arg(initrd);
        command.args([append, &material.guest.append]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }
}

/// How long each load took on each machine, turn by turn.
type Times = BTreeMap<(&'static str, Side), Vec<Span>>;

/// The RAM disk, with the program that makes the requests.
fn initrd(dir: &Path, material: &Material) -> anyhow::Result<PathBuf> {
    fs::write(dir.join("disk.c"), include_str!("../../../bench/disk.c")).context("write disk.c")?;
    let options = ["-O2", "-march=rv64gc", "-static", "-o", "disk", "disk.c"];
    let output = Command::new(COMPILER).current_dir(dir).args(options).output();
    let output = output.with_context(|| {
        format!(
            "cannot run {COMPILER} (Debian packages gcc-riscv64-linux-gnu, libc6-dev-riscv64-cross)"
        )
    })?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{COMPILER} failed: {}", words.trim());
    let mut tree = guest::FileTree::new();
    tree.add_file("bench/disk", 0o755, fs::read(dir.join("disk")).context("read the program")?);
    for Load { name, words, count, .. } in LOADS {
        let script = format!("exec /bench/disk /dev/vda {words} {count}\n");
        tree.add_file(&format!("bench/{name}"), 0o644, script.into());
    }
    let path = dir.join("initrd");
    guest::write_with_files(&material.guest, &tree, &path)?;
    Ok(path)
}

/// One machine's loads.
fn turn(
    side: Side,
    (dir, initrd): (&Path, &Path),
    material: &Material,
    progress: &mut Progress,
    times: &mut Times,
) -> anyhow::Result<()> {
    let disk = dir.join("disk.img");
    fs::write(&disk, vec![0x5A; DISK_BYTES]).context("make a disk")?;
    let path = disk.to_str().context("the path of the temporary directory is not UTF-8")?;
    let mut running = Running::start(side.command(material, initrd, path)?)?;
    running.wait_for("understudy: bench ready", LOAD_MAX)?;
    for load in LOADS {
        running.type_line(load.name)?;
        let run = format!("understudy: run {}\r\n", load.name);
        let (begun, _) = running.wait_for(&run, LOAD_MAX)?;
        let (ended, printed) = running.wait_for("understudy: exit ", LOAD_MAX)?;
        let (_, rest) = running.wait_for("\n", LOAD_MAX)?;
        ensure!(rest.starts_with("0 "), "{} on {} printed {printed:?}", load.name, side.name());
        let span = ended.since(begun);
        let (wall, cpu) = (span.wall_seconds, span.cpu_seconds);
        let (load, name) = (load.name, side.name());
        progress.say(&format!("{load} on {name}: {wall:.2} s, {cpu:.2} s of CPU time"));
        times.entry((load, side)).or_default().push(span);
    }
    Ok(())
}

/// The figures.
pub(super) fn run(dir: &Path, material: &Material, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new(options.part.name());
    let initrd = initrd(dir, material)?;
    let mut progress = Progress::new();
    let mut times = Times::new();
    for number in 0..options.turns {
        let mut order = SIDES;
        if number % 2 == 1 {
            order.reverse();
        }
        for side in order {
            turn(side, (dir, &initrd), material, &mut progress, &mut times)?;
        }
    }
    for load in LOADS {
        figures(load, &times, &mut section);
    }
    let mib = DISK_BYTES >> 20;
    section.notes.push(format!(
        "an image of {mib} MiB in the host's page cache; ratios are of one turn each, and QEMU's faster way counts"
    ));
    Ok(section)
}

fn figures(load: &Load, times: &Times, section: &mut Section) {
    let spans = |side| times.get(&(load.name, side)).map_or(&[][..], Vec::as_slice);
    let rates = |side| -> Vec<f64> {
        spans(side).iter().map(|s| f64::from(load.count) / s.wall_seconds).collect()
    };
    let (unit, scale) = match load.block {
        4096 => ("requests/s", 1.0),
        block => ("MB/s", f64::from(block) / 1e6),
    };
    for side in SIDES {
        let rate = median(rates(side)).map(|rate| rate * scale);
        section.figures.push(Figure::new(format!("{}, {}", load.what, side.name()), rate, unit));
    }
    let qemu = rates(Side::QemuThreads).into_iter().zip(rates(Side::QemuUring));
    let ratios: Vec<f64> = rates(Side::Ours)
        .into_iter()
        .zip(qemu)
        .filter_map(|(ours, (threads, uring))| Some(ours / largest([threads, uring])?))
        .collect();
    let ratio = median(ratios.iter().copied());
    let ratio = Figure::new(format!("{}: speed / QEMU's", load.what), ratio, "");
    section.figures.push(match load.target {
        Some(least) => ratio.aim(Target::AtLeast(least)),
        None => ratio,
    });
    section.notes.push(format!("{}: {}", load.name, listed(&ratios)));
    let cpu = |side| median(spans(side).iter().map(|s| s.cpu_seconds));
    let share = cpu(Side::Ours).zip(cpu(Side::QemuThreads)).map(|(ours, theirs)| ours / theirs);
    section.figures.push(Figure::new(format!("{}: CPU time / QEMU's", load.what), share, ""));
}
