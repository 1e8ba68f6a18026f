//! The bench's guest: programs of Debian's, each with what it needs, for the workloads that `understudy bench engine`
//! times.

use crate::BuildGuestError;
use crate::cpio::FileTree;
use crate::image::Packages;

/// What the programs come from.
pub(crate) const PACKAGES: &[&str] = &[
    "busybox-static",
    "binutils",
    "coreutils",
    "dash",
    "gcc-14",
    "gzip",
    "iperf3",
    "libc6-dev",
    "openssl",
    "python3-minimal",
    "sqlite3",
    "xz-utils",
];
/// Starts of the names of packages that these depend on for uses that the guest does not have.
pub(crate) const LEFT_OUT: &[&str] = &[
    "adduser",
    "debconf",
    "libasan",
    "liblsan",
    "libtsan",
    "libubsan",
    "linux-libc-dev",
    "passwd",
];
const PROGRAMS: &[&str] = &[
    "usr/bin/cat",
    "usr/bin/dash",
    "usr/bin/gzip",
    "usr/bin/iperf3",
    "usr/bin/openssl",
    "usr/bin/python3",
    "usr/bin/riscv64-linux-gnu-as",
    "usr/bin/riscv64-linux-gnu-gcc-14",
    "usr/bin/sha256sum",
    "usr/bin/sqlite3",
    "usr/bin/tr",
    "usr/bin/true",
    "usr/bin/wc",
    "usr/bin/xz",
    "usr/libexec/gcc/riscv64-linux-gnu/14/cc1",
];

/// Adds the programs; those that busybox has too come before its names.
pub(crate) fn add_programs(
    tree: &mut FileTree,
    packages: &Packages,
) -> Result<(), BuildGuestError> {
    for program in PROGRAMS {
        packages.add_program(tree, program)?;
    }
    tree.add_symlink("usr/bin/gcc", "riscv64-linux-gnu-gcc-14");
    tree.add_symlink("usr/bin/as", "riscv64-linux-gnu-as");
    // Loaded at run time, when a thread ends.
    packages.add_library(tree, "libgcc_s.so.1")?;
    packages.add_file(tree, "etc/ssl/openssl.cnf")?;
    tree.add_symlink("usr/lib/ssl/openssl.cnf", "/etc/ssl/openssl.cnf");
    for dir in ["usr/lib/python3.13", "usr/include", "usr/lib/gcc/riscv64-linux-gnu/14/include"] {
        packages.add_dir(tree, dir);
    }
    Ok(())
}
