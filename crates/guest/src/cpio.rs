//! A tree of files held in memory, written as a cpio archive in the `newc` format: the same tree, the same bytes.
//!
//! # Determinism
//! Entries are sorted by path, owned by root, dated 0 and numbered from 1; nothing of the host's file system gets in.
//!
//! # Format
//! `newc` as in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`: a header of 13 fields of eight
//! hexadecimal digits after the magic `070701`, the name, the data, each padded to four bytes; `TRAILER!!!` last. The
//! archive is padded to 512 bytes, so that another one may follow it.

use std::collections::BTreeMap;
use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Dir,
    File { mode: u32, data: Vec<u8> },
    Symlink { target: String },
    CharDevice { major: u32, minor: u32 },
}

/// Files for an initial RAM disk, by path without a leading slash.
#[derive(Debug, Clone, Default)]
pub struct FileTree {
    nodes: BTreeMap<String, Node>,
}

impl FileTree {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents.
    pub fn add_dir(&mut self, path: &str) {
        self.insert(path, Node::Dir);
    }

    /// Adds a file with permission bits `mode`, and its parent directories.
    pub fn add_file(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.insert(path, Node::File { mode, data });
    }

    /// Adds a symbolic link and its parent directories.
    pub fn add_symlink(&mut self, path: &str, target: &str) {
        self.insert(path, Node::Symlink { target: target.to_owned() });
    }

    /// Adds a character device and its parent directories.
    pub fn add_char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.insert(path, Node::CharDevice { major, minor });
    }

    /// Whether there is anything at `path`.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        self.nodes.contains_key(path.trim_matches('/'))
    }

    fn insert(&mut self, path: &str, node: Node) {
        let path = path.trim_matches('/');
        for (at, _) in path.match_indices('/') {
            self.nodes.entry(path[..at].to_owned()).or_insert(Node::Dir);
        }
        if !(node == Node::Dir && self.nodes.contains_key(path)) {
            self.nodes.insert(path.to_owned(), node);
        }
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// Those of `out`, and [`io::ErrorKind::FileTooLarge`] for a file of 4 GiB or more.
    pub fn write_cpio(&self, out: &mut impl Write) -> io::Result<()> {
        let mut written = 0;
        for (index, (path, node)) in self.nodes.iter().enumerate() {
            let ino = u32::try_from(index + 1).map_err(|_| io::ErrorKind::FileTooLarge)?;
            written += write_entry(out, ino, path, node)?;
        }
        written += write_entry(out, 0, "TRAILER!!!", &Node::File { mode: 0, data: Vec::new() })?;
        out.write_all(&vec![0; written.next_multiple_of(512) - written])
    }
}

fn write_entry(out: &mut impl Write, ino: u32, path: &str, node: &Node) -> io::Result<usize> {
    let (mode, links, data, device): (u32, u32, &[u8], (u32, u32)) = match node {
        Node::Dir => (S_IFDIR | 0o755, 2, &[], (0, 0)),
        Node::File { mode: 0, data } => (0, 1, data, (0, 0)),
        Node::File { mode, data } => (S_IFREG | mode, 1, data, (0, 0)),
        Node::Symlink { target } => (S_IFLNK | 0o777, 1, target.as_bytes(), (0, 0)),
        Node::CharDevice { major, minor } => (S_IFCHR | 0o600, 1, &[], (*major, *minor)),
    };
    let size = u32::try_from(data.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let name_size = path.len() + 1;
    let mut head = String::from("070701");
    for field in [ino, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1] {
        head.push_str(&format!("{field:08x}"));
    }
    head.push_str(&format!("{name_size:08x}{:08x}{path}\0", 0));
    pad4(&mut head);
    out.write_all(head.as_bytes())?;
    out.write_all(data)?;
    let padded = data.len().next_multiple_of(4);
    out.write_all(&[0; 4][..padded - data.len()])?;
    Ok(head.len() + padded)
}

fn pad4(text: &mut String) {
    while !text.len().is_multiple_of(4) {
        text.push('\0');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> FileTree {
        let mut tree = FileTree::new();
        tree.add_symlink("bin/sh", "busybox");
        tree.add_file("/init", 0o755, b"#!x\ny".to_vec());
        tree.add_char_device("dev/console", 5, 1);
        tree.add_dir("bin");
        tree
    }

    #[test]
    fn archive_is_padded_and_the_same_whatever_the_order_of_insertion() {
        let mut a = Vec::new();
        sample().write_cpio(&mut a).unwrap();
        let mut other = FileTree::new();
        other.add_char_device("dev/console", 5, 1);
        other.add_file("init", 0o755, b"#!x\ny".to_vec());
        other.add_symlink("bin/sh", "busybox");
        let mut b = Vec::new();
        other.write_cpio(&mut b).unwrap();
        assert_eq!(a, b);
        assert!(a.len().is_multiple_of(512));
        assert!(a.starts_with(b"070701"));
    }

    #[test]
    fn cpio_reads_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.cpio");
        let mut archive = Vec::new();
        sample().write_cpio(&mut archive).unwrap();
        std::fs::write(&path, &archive).unwrap();
        let Ok(out) = std::process::Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(std::fs::File::open(&path).unwrap())
            .output()
        else {
            return;
        };
        assert_eq!(String::from_utf8_lossy(&out.stdout), "bin\nbin/sh\ndev\ndev/console\ninit\n");
    }
}
