//! How long a guest stands still while a snapshot of it is taken, which keeps a tenth of its memory in motion.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use guest::FileTree;

use super::RecordArgs;
use crate::bench::console::Console;
use crate::bench::engine::Guests;
use crate::bench::figure::{Figure, Section, Target, largest, listed, median, sorted};
use crate::demo::control::Control;
use crate::demo::lab::{VM, quoted, write_secret};
use crate::demo::net;
use crate::demo::progress::Progress;

/// The guest's memory.
const MEMORY_MIB: u32 = 1024;
/// What it writes to, over and over: a tenth of it.
const TOUCHED_MIB: u32 = 102;
/// Snapshots for each turn.
const SNAPSHOTS: u32 = 5;
/// Longest that one may make the guest stand still, in milliseconds.
const PAUSE_MAX_MS: f64 = 10.0;
/// Time between two snapshots.
const BETWEEN: Duration = Duration::from_secs(1);
const UP_MAX: Duration = Duration::from_secs(20);
const FILLED_MAX: Duration = Duration::from_secs(120);

/// The host's daemon, killed when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // An error means that it ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Takes snapshots of a machine on a host of its own.
pub(super) fn run(
    dir: &Path,
    guests: &Guests,
    args: &RecordArgs,
    section: &mut Section,
) -> anyhow::Result<()> {
    let (control, _daemon) = start(&dir.join("host"), guests, args)?;
    let mut console = Console::attach(&control, VM)?;
    console.wait_for("understudy: filled", FILLED_MAX)?;
    let progress = Progress::new();
    let [mut pauses, mut times, mut sizes] = [const { Vec::new() }; 3];
    for number in 1..=SNAPSHOTS * args.turns {
        std::thread::sleep(BETWEEN);
        let begun = Instant::now();
        let (pause, bytes) = control.snapshot(VM)?;
        times.push(begun.elapsed().as_secs_f64());
        pauses.push(pause.as_secs_f64() * 1000.0);
        sizes.push((bytes >> 20) as f64);
        progress.say(&format!("snapshot {number}: {:.2} ms", pause.as_secs_f64() * 1000.0));
    }
    let worst = Figure::new("pause for a snapshot of 1 GiB, max", largest(pauses.clone()), "ms");
    section.figures.extend([
        Figure::new("pause for a snapshot of 1 GiB, median", median(pauses.clone()), "ms"),
        worst.aim(Target::AtMost(PAUSE_MAX_MS)),
        Figure::new("time until it is complete, median", median(times), "s"),
    ]);
    let first = sizes.first().copied().unwrap_or_default();
    let least = sorted(sizes.into_iter().skip(1)).first().copied().unwrap_or_default();
    section.notes.push(format!(
        "snapshots: {first} MiB of memory in the first one, at least {least} MiB that changed in the others, of {MEMORY_MIB}; \
         the guest writes to {TOUCHED_MIB} MiB of it all the time; pauses by the daemon, ms: {}",
        listed(&pauses)
    ));
    Ok(())
}

/// A host without peers, and the machine on it.
fn start(dir: &Path, guests: &Guests, args: &RecordArgs) -> anyhow::Result<(Control, Daemon)> {
    net::run("ip", &["link", "set", "lo", "up"])?;
    for part in ["state", "arbiter"] {
        fs::create_dir_all(dir.join(part)).context("make the host's directories")?;
    }
    write_secret(&dir.join("secret"))?;
    let socket = dir.join("control.sock");
    let engine = args.engine.as_ref().map_or(String::new(), |e| format!("engine = \"{e}\"\n"));
    let host = format!(
        "name = \"bench\"\nlisten = \"127.0.0.1:7700\"\n{engine}socket = {}\nstate_dir = {}\nsecret_file = {}\n\n\
         [arbiter]\ndir = {}\n",
        quoted(&socket),
        quoted(&dir.join("state")),
        quoted(&dir.join("secret")),
        quoted(&dir.join("arbiter")),
    );
    let (host_file, vm_file) = (dir.join("host.toml"), dir.join("vm.toml"));
    fs::write(&host_file, host).context("write host.toml")?;
    let (minimal, initrd) = (&guests.minimal, dir.join("initrd"));
    let mut files = FileTree::new();
    files.add_file("guest.sh", 0o644, script().into());
    guest::write_with_files(minimal, &files, &initrd)?;
    let vm = format!(
        "name = \"{VM}\"\nmemory = \"{MEMORY_MIB}M\"\nharts = 1\nkernel = {}\ninitrd = {}\nappend = \"{}\"\n\n\
         [protection]\nenabled = false\n",
        quoted(&minimal.kernel),
        quoted(&initrd),
        minimal.append,
    );
    fs::write(&vm_file, vm).context("write vm.toml")?;
    let log = fs::File::create(dir.join("log")).context("make a log")?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["host", "--config"]).arg(&host_file).stdin(Stdio::null());
    command.stdout(log.try_clone()?).stderr(log);
    let daemon = Daemon(command.spawn().context("start the host's daemon")?);
    let control = Control::new(&socket);
    let progress = Progress::new();
    progress.wait_for("the host's daemon", UP_MAX, Duration::from_millis(50), |_| {
        Ok(control.answers().then_some(()))
    })?;
    control.start(&vm_file).context("start the machine")?;
    Ok((control, daemon))
}

/// What the guest does instead of waiting for somebody to type.
fn script() -> String {
    let fill = format!("dd if=/dev/urandom of=/tmp/fill bs=1M count={TOUCHED_MIB}");
    format!(
        "mount -t tmpfs tmp /tmp\n{fill} 2>/dev/null\necho understudy: filled\n\
         while :; do {fill} conv=notrunc 2>/dev/null; done\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_writes_to_the_same_memory_over_and_over() {
        assert!(script().contains("count=102 conv=notrunc"));
    }
}
