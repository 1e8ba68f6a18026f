//! A Debian userland that systemd brings up to a login prompt, from packages as they are: no script of theirs has run.
//!
//! What their scripts would have made and systemd wants is made here: users, names, and a machine's identity.

use crate::BuildGuestError;
use crate::cpio::FileTree;
use crate::image::Packages;

/// What is installed, beside what it depends on.
pub(crate) const PACKAGES: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "dbus",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "kmod",
    "libc-bin",
    "libpam-systemd",
    "login",
    "mount",
    "ncurses-base",
    "passwd",
    "procps",
    "sed",
    "systemd-sysv",
    "tar",
    "udev",
    "util-linux",
];
/// Documentation and translations, and the text that udev's hardware database is made from.
const LEFT_OUT: &[&str] = &[
    "usr/lib/udev/hwdb.d/",
    "usr/share/bash-completion/",
    "usr/share/doc/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
    "usr/share/zsh/",
];
/// Users that packages' scripts add: name and number.
const USERS: &[(&str, u32)] =
    &[("messagebus", 992), ("systemd-network", 998), ("systemd-journal", 999)];

/// The whole system.
pub(crate) fn file_tree(packages: &Packages) -> Result<FileTree, BuildGuestError> {
    let mut tree = FileTree::new();
    for dir in ["dev", "etc", "proc", "root", "run", "sys", "tmp", "var/tmp", "var/log"] {
        tree.add_dir(dir);
    }
    for name in ["bin", "lib", "sbin"] {
        tree.add_symlink(name, &format!("usr/{name}"));
    }
    packages.add_all(&mut tree, LEFT_OUT);
    if !tree.contains("usr/bin/sh") {
        tree.add_symlink("usr/bin/sh", "dash");
    }
    let of_base = |name: &str| packages.text(&format!("usr/share/base-passwd/{name}.master"));
    let (mut passwd, mut group) = (of_base("passwd")?, of_base("group")?);
    for (name, id) in USERS {
        passwd += &format!("{name}:x:{id}:{id}::/nonexistent:/usr/sbin/nologin\n");
        group += &format!("{name}:x:{id}:\n");
    }
    let shadow: String = passwd
        .lines()
        .filter_map(|line| line.split(':').next())
        .map(|name| format!("{name}:*:20000:0:99999:7:::\n"))
        .collect();
    tree.add_file("etc/passwd", 0o644, passwd.into());
    tree.add_file("etc/group", 0o644, group.into());
    tree.add_file("etc/shadow", 0o640, shadow.into());
    tree.add_file("etc/nsswitch.conf", 0o644, packages.text(NSSWITCH)?.into());
    tree.add_file("etc/hostname", 0o644, "understudy\n".into());
    tree.add_file("etc/hosts", 0o644, "127.0.0.1 localhost understudy\n".into());
    tree.add_file("etc/fstab", 0o644, Vec::new());
    // Without it systemd takes each boot for the first one and asks questions.
    tree.add_file("etc/machine-id", 0o444, "5ca1ab1e000040008000000000000001\n".into());
    // As if the scripts that follow a change of /usr had run.
    for path in ["etc/.updated", "var/.updated"] {
        tree.add_file(path, 0o644, Vec::new());
    }
    tree.add_char_device("dev/console", 5, 1);
    tree.add_symlink("init", "usr/lib/systemd/systemd");
    Ok(tree)
}

const NSSWITCH: &str = "usr/share/libc-bin/nsswitch.conf";
