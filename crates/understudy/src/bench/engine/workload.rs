//! What is run in the guest: the same script on every machine, of a size that takes QEMU one to three seconds.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use guest::FileTree;

/// What a workload needs beside the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Needs {
    /// Nothing.
    Nothing,
    /// A disk that it reads and writes.
    Disk,
    /// A host to talk to.
    Net,
}

/// How a workload is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Kind {
    /// A script in the guest with the tools.
    Script(&'static str),
    /// A boot of the guest whose console ends with these words.
    Boot(Boot),
}

/// Which guest is booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Boot {
    /// A kernel and a shell.
    Minimal,
    /// Debian with systemd.
    Debian,
}

impl Boot {
    /// What its console shows when it is up.
    pub(in crate::bench) fn ready(self) -> &'static str {
        match self {
            Self::Minimal => "understudy: shell ready",
            Self::Debian => "login: ",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) struct Workload {
    /// The row's name, and the script's.
    pub(in crate::bench) name: &'static str,
    /// What it does, for people.
    pub(in crate::bench) what: &'static str,
    /// How it is started.
    pub(in crate::bench) kind: Kind,
    /// What it needs.
    pub(in crate::bench) needs: Needs,
}

const fn script(name: &'static str, what: &'static str, script: &'static str) -> Workload {
    Workload { name, what, kind: Kind::Script(script), needs: Needs::Nothing }
}

const fn boot(name: &'static str, what: &'static str, boot: Boot) -> Workload {
    Workload { name, what, kind: Kind::Boot(boot), needs: Needs::Nothing }
}

const fn with(needs: Needs, workload: Workload) -> Workload {
    Workload { needs, ..workload }
}

/// Every row, in the order of the table.
pub(in crate::bench) const WORKLOADS: &[Workload] = &[
    boot("boot-debian", "Debian with systemd to the login prompt", Boot::Debian),
    boot("boot-minimal", "kernel and busybox to a shell", Boot::Minimal),
    script("integer", "lists, matrices, a state machine, CRC", "/bench/kernels integer"),
    script("calls", "recursive and indirect calls", "/bench/kernels calls"),
    script("sort", "qsort and a hash table of 64-bit words", "/bench/kernels sort"),
    script("sha256", "openssl dgst -sha256", "openssl dgst -sha256 /tmp/zeros"),
    script(
        "aes",
        "openssl enc -aes-128-ctr",
        "openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 0123456789abcdef0123456789abcdef -in /tmp/zeros -out /dev/null",
    ),
    script("matrix", "product of matrices in double precision", "/bench/kernels matrix"),
    script("nbody", "n-body in double precision", "/bench/kernels nbody"),
    script("mandelbrot", "Mandelbrot set in double precision", "/bench/kernels mandelbrot"),
    script("chase", "chain of pointers over 64 MiB", "/bench/kernels chase"),
    script("memcpy", "memcpy of 16 MiB", "/bench/kernels copy"),
    script("stream", "copy, scale, add and triad of doubles", "/bench/kernels stream"),
    script("python", "python3 script", "python3 /bench/work.py"),
    script("sqlite", "sqlite3 script in memory", "sqlite3 :memory: < /bench/work.sql"),
    script("gzip", "gzip of a file", "gzip -nc /tmp/gzip.in > /tmp/out && sha256sum /tmp/out"),
    script("xz", "xz of a file", "xz -c /tmp/xz.in > /tmp/out && sha256sum /tmp/out"),
    script(
        "gcc",
        "gcc -O2 compiling C",
        "cd /bench && for f in integer floating; do gcc -O2 -c $f.c -o /tmp/$f.o || exit 1; done",
    ),
    script("fork", "fork, exec and pipes in a shell loop", ". /bench/fork.sh"),
    script("context", "switches between two processes", "/bench/kernels context"),
    script("faults", "mmap, touch, munmap", "/bench/kernels faults"),
    script("syscalls", "system calls", "/bench/kernels syscalls"),
    script("signals", "signals", "/bench/kernels signals"),
    with(
        Needs::Disk,
        script(
            "disk-read",
            "virtio-blk, dd iflag=direct",
            "for i in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null || exit 1; done",
        ),
    ),
    with(
        Needs::Disk,
        script(
            "disk-write",
            "virtio-blk, dd oflag=direct",
            "for i in 1 2 3 4; do dd if=/tmp/zeros of=/dev/vda bs=64k oflag=direct 2>/dev/null || exit 1; done",
        ),
    ),
    with(
        Needs::Net,
        script("net-send", "iperf3 from the guest", "iperf3 -c 10.97.0.1 -n 400M > /tmp/iperf"),
    ),
    with(
        Needs::Net,
        script("net-receive", "iperf3 to the guest", "iperf3 -c 10.97.0.1 -R -n 400M > /tmp/iperf"),
    ),
];

/// What is made in the guest before anything is timed.
const SETUP: &str = "\
mount -t tmpfs tmp /tmp
dd if=/dev/null of=/tmp/zeros bs=1M seek=128 2>/dev/null
lib=/usr/lib/riscv64-linux-gnu/libcrypto.so.3
cat $lib > /tmp/gzip.in
head -c 600000 $lib > /tmp/xz.in
";
/// The shell's loop: each turn starts four processes.
const FORK: &str = "\
i=0
while [ $i -lt 100 ]; do
    /usr/bin/true
    echo $i | cat | tr 0-9 a-j > /tmp/out
    i=$((i + 1))
done
cat /tmp/out
";
/// Sources of `/bench/kernels`.
const SOURCES: &[(&str, &str)] = &[
    ("floating.c", include_str!("../../../bench/floating.c")),
    ("integer.c", include_str!("../../../bench/integer.c")),
    ("kernels.h", include_str!("../../../bench/kernels.h")),
    ("main.c", include_str!("../../../bench/main.c")),
    ("memory.c", include_str!("../../../bench/memory.c")),
    ("system.c", include_str!("../../../bench/system.c")),
];
/// Debian's compiler for riscv64 on other machines.
pub(in crate::bench) const COMPILER: &str = "riscv64-linux-gnu-gcc";

/// Compiles `kernels` in `dir` for this computer.
pub(in crate::bench) fn compile_native(dir: &Path) -> anyhow::Result<()> {
    compile(dir, "gcc", &["-O2"])
}

fn compile(dir: &Path, compiler_name: &str, options: &[&str]) -> anyhow::Result<()> {
    for (name, text) in SOURCES {
        fs::write(dir.join(name), text).with_context(|| format!("write {name}"))?;
    }
    let sources = SOURCES.iter().map(|(name, _)| *name).filter(|name| name.ends_with(".c"));
    let mut compiler = Command::new(compiler_name);
    compiler.current_dir(dir).args(options).args(["-o", "kernels"]);
    let output = compiler.args(sources).arg("-lm").output();
    let output = output.with_context(|| format!("cannot run {compiler_name}"))?;
    if !output.status.success() {
        bail!("{compiler_name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The files that the guest with the tools gets, compiled in `dir`.
pub(in crate::bench) fn files(dir: &Path) -> anyhow::Result<FileTree> {
    let mut tree = FileTree::new();
    for (name, text) in SOURCES {
        tree.add_file(&format!("bench/{name}"), 0o644, text.as_bytes().to_vec());
    }
    let needs = "Debian packages gcc-riscv64-linux-gnu, libc6-dev-riscv64-cross";
    compile(dir, COMPILER, &["-O2", "-march=rv64gc", "-static"]).context(needs)?;
    tree.add_file("bench/kernels", 0o755, fs::read(dir.join("kernels"))?);
    for (name, text) in [
        ("setup", SETUP),
        ("fork.sh", FORK),
        ("work.py", include_str!("../../../bench/work.py")),
        ("work.sql", include_str!("../../../bench/work.sql")),
    ] {
        tree.add_file(&format!("bench/{name}"), 0o644, text.into());
    }
    for workload in WORKLOADS {
        if let Kind::Script(script) = workload.kind {
            tree.add_file(&format!("bench/{}", workload.name), 0o644, format!("{script}\n").into());
        }
    }
    Ok(tree)
}

/// The rows called `names`, or all; an error names those that there are.
pub(in crate::bench) fn chosen(names: &[String]) -> Result<Vec<Workload>, String> {
    let known = || WORKLOADS.iter().map(|workload| workload.name).collect::<Vec<_>>().join(", ");
    if let Some(name) = names.iter().find(|name| WORKLOADS.iter().all(|w| w.name != **name)) {
        return Err(format!("there is no workload {name:?}; there are {}", known()));
    }
    let is_chosen =
        |workload: &&Workload| names.is_empty() || names.iter().any(|name| name == workload.name);
    Ok(WORKLOADS.iter().filter(is_chosen).copied().collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_different_and_fit_a_line() {
        let names: BTreeSet<&str> = WORKLOADS.iter().map(|workload| workload.name).collect();
        assert_eq!(names.len(), WORKLOADS.len());
        let fits = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        assert!(names.iter().all(|name| fits(name) && !["setup", "end"].contains(name)));
    }

    #[test]
    fn unknown_name_is_refused_with_those_that_there_are() {
        assert_eq!(chosen(&[]).unwrap().len(), WORKLOADS.len());
        assert_eq!(chosen(&["gcc".into(), "aes".into()]).unwrap().len(), 2);
        assert!(chosen(&["gc".into()]).unwrap_err().contains("gcc"));
    }
}
