//! The machines that are compared, as the commands that run them: one vCPU, 1 GiB, the same kernel, RAM disk, disk and
//! network for each.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;

/// Memory of each.
const MEMORY: &str = "1G";
/// QEMU as it is installed.
pub(in crate::bench) const QEMU: &str = "qemu-system-riscv64";
/// The host's address on the bridge that the guests are on; the workloads name it.
pub(in crate::bench) const HOST_ADDRESS: &str = "10.97.0.1/24";

/// A column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::bench) enum Side {
    /// `understudy run`.
    Ours,
    /// QEMU's TCG as it comes.
    Qemu,
    /// `understudy run --record`.
    Recording,
    /// QEMU that records.
    QemuRecording,
    /// `understudy replay` of what [`Side::Recording`] recorded.
    Replay,
}

impl Side {
    /// Its column's place.
    pub(in crate::bench) fn index(self) -> usize {
        self as usize
    }

    /// For people.
    pub(in crate::bench) fn name(self) -> &'static str {
        match self {
            Self::Ours => "understudy",
            Self::Qemu => "QEMU TCG",
            Self::Recording => "understudy recording",
            Self::QemuRecording => "QEMU recording",
            Self::Replay => "understudy replay",
        }
    }

    /// The tap on the bridge that its guest is on.
    pub(in crate::bench) fn tap(self) -> String {
        format!("tap{}", self.index())
    }

    /// Whether it has the disk and the network. QEMU answers a recorded disk request a tenth of a second later, so that
    /// a stream takes minutes: it is not asked, as that would say more about disks than about recording.
    pub(in crate::bench) fn has_devices(self) -> bool {
        self != Self::QemuRecording
    }

    fn is_qemu(self) -> bool {
        matches!(self, Self::Qemu | Self::QemuRecording)
    }
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Setting<'a> {
    /// Linux.
    pub(in crate::bench) kernel: &'a Path,
    /// The RAM disk.
    pub(in crate::bench) initrd: &'a Path,
    /// The kernel's command line, without the network.
    pub(in crate::bench) append: &'a str,
    /// The disk's image, if there is a disk; this machine's own.
    pub(in crate::bench) disk: Option<PathBuf>,
    /// Whether it is on the network.
    pub(in crate::bench) has_net: bool,
    /// Where a machine that records or replays has its recording: nothing is there yet, or a recording.
    pub(in crate::bench) recording: &'a Path,
    /// Understudy's engine, if one is asked for.
    pub(in crate::bench) engine: Option<&'a str>,
}

impl Setting<'_> {
    /// The process that is this machine on `side`, its console on standard input and output.
    pub(in crate::bench) fn command(&self, side: Side) -> anyhow::Result<Command> {
        let mut command = if side.is_qemu() { self.qemu(side)? } else { self.understudy(side)? };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    fn understudy(&self, side: Side) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        let engine = self.engine.iter().flat_map(|engine| ["--engine", engine]);
        if side == Side::Replay {
            command.arg("replay").args(engine).arg(self.recording);
            return Ok(command);
        }
        command.args(["run", "--memory", MEMORY, "--smp", "1", "--stats"]).args(engine);
        command.arg("--kernel").arg(self.kernel).arg("--initrd").arg(self.initrd);
        command.args(["--append", &self.append(side)]);
        if let Some(disk) = &self.disk {
            command.args(["--disk", &format!("path={}", utf8(disk)?)]);
        }
        if self.has_net {
            command.args(["--net", &format!("tap={},mac={}", side.tap(), mac(side))]);
        }
        if side == Side::Recording {
            command.arg("--record").arg(self.recording);
        }
        Ok(command)
    }

    fn qemu(&self, side: Side) -> anyhow::Result<Command> {
        let mut command = Command::new(QEMU);
        command.args(["-M", "virt", "-accel", "tcg", "-m", MEMORY, "-smp", "1", "-no-reboot"]);
        command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        command.args(["-device", "virtio-rng-device"]);
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initrd);
        command.args(["-append", &self.append(side)]);
        if let Some(disk) = &self.disk {
            let file = format!("file={},format=raw,if=none,id=image", utf8(disk)?);
            command.args(["-drive", &file]);
            command.args(["-device", "virtio-blk-device,drive=image"]);
        }
        if self.has_net {
            let tap = format!("tap,id=net,ifname={},script=no,downscript=no", side.tap());
            command.args(["-netdev", &tap]);
            command.args(["-device", &format!("virtio-net-device,netdev=net,mac={}", mac(side))]);
        }
        if side == Side::QemuRecording {
            let file = utf8(self.recording)?;
            command.args(["-icount", &format!("shift=auto,rr=record,rrfile={file}")]);
        }
        Ok(command)
    }

    fn append(&self, side: Side) -> String {
        if self.has_net {
            format!("{} understudy.ip=10.97.0.{}/24", self.append, side.index() + 2)
        } else {
            self.append.to_owned()
        }
    }
}

fn mac(side: Side) -> String {
    format!("52:54:00:97:00:{:02x}", side.index() + 2)
}

fn utf8(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("the path of the temporary directory is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Side; 5] =
        [Side::Ours, Side::Qemu, Side::Recording, Side::QemuRecording, Side::Replay];

    fn words(side: Side) -> Vec<String> {
        let setting = Setting {
            kernel: Path::new("/k"),
            initrd: Path::new("/i"),
            append: "console=ttyS0",
            disk: Some("/d".into()),
            has_net: true,
            recording: Path::new("/r"),
            engine: Some("jit"),
        };
        let command = setting.command(side).unwrap();
        command.get_args().map(|word| word.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn only_what_records_has_the_recording() {
        for side in ALL {
            let has_it = words(side).iter().any(|word| word.contains("/r"));
            assert_eq!(has_it, !matches!(side, Side::Ours | Side::Qemu), "{side:?}");
        }
        assert_eq!(words(Side::Replay), ["replay", "--engine", "jit", "/r"]);
    }

    #[test]
    fn sides_are_in_the_order_of_their_columns() {
        assert!(ALL.iter().enumerate().all(|(index, side)| side.index() == index));
    }
}
