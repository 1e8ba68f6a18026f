//! qcow2 images, beside QEMU's tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::disk::mirror::MirrorWriter;
use crate::disk::{DiskFormat, DiskSource, Image, OpenMode};
use crate::one_line::one_line;

fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output();
    output.unwrap_or_else(|e| panic!("cannot run {program}: {e}"))
}

fn qemu(args: &[&str]) {
    let output = tool(args[0], &args[1..]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stdout));
}

/// QEMU finds nothing wrong with it, not even a leaked cluster.
fn check(path: &str) {
    qemu(&["qemu-img", "check", "-f", "qcow2", path]);
}

fn qcow2(path: &Path) -> DiskSource {
    DiskSource::file(path, Some(DiskFormat::Qcow2))
}

fn at(dir: &tempfile::TempDir, name: &str) -> (PathBuf, String) {
    let path = dir.path().join(name);
    (path.clone(), path.to_str().unwrap().to_owned())
}

fn refusal(source: impl Into<DiskSource>, mode: OpenMode) -> String {
    one_line(&Image::open(source, mode).unwrap_err())
}

const SIZE: u64 = 64 << 20;

/// Does the same to both, which begin with the same contents: writes, zeroes, within clusters and across them.
fn work(a: &Image, b: &Image, seed: u64) {
    let mut state = seed | 1;
    let mut draw = move |n: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    for turn in 0..200 {
        let offset = draw(a.size() / 512) * 512;
        let len = ((draw(400) + 1) * 512).min(a.size() - offset);
        if draw(3) == 0 {
            a.zero(offset, len).unwrap();
            b.zero(offset, len).unwrap();
        } else {
            let data = vec![draw(255) as u8 + 1; len as usize];
            a.write(offset, &data).unwrap();
            b.write(offset, &data).unwrap();
        }
        if turn % 40 == 0 {
            a.flush().unwrap();
        }
        let offset = draw(a.size() / 512) * 512;
        let len = ((draw(800) + 1) * 512).min(a.size() - offset) as usize;
        assert!(a.read(offset, len).unwrap() == b.read(offset, len).unwrap());
    }
}

#[test]
fn images_of_qemu_are_used_as_qemu_uses_them() {
    let dir = tempfile::tempdir().unwrap();
    let kinds: [&[&str]; 5] = [
        &[],
        &["-o", "compat=0.10"],
        &["-o", "lazy_refcounts=on,compat=1.1"],
        &["-o", "cluster_size=4096"],
        &["-o", "preallocation=metadata"],
    ];
    for (seed, options) in (1u64..).zip(kinds) {
        let (path, name) = at(&dir, &format!("{seed}.qcow2"));
        let (raw_path, raw_name) = at(&dir, &format!("{seed}.raw"));
        qemu(&[&["qemu-img", "create", "-q", "-f", "qcow2"], options, &[&name, "64M"]].concat());
        fs::write(&raw_path, []).unwrap();
        fs::File::options().write(true).open(&raw_path).unwrap().set_len(SIZE).unwrap();
        let image = Image::open(qcow2(&path), OpenMode::Exclusive).unwrap();
        assert_eq!(image.size(), SIZE);
        assert!(image.raw_file().is_none());
        let raw = Image::open(&raw_path, OpenMode::Exclusive).unwrap();
        work(&image, &raw, seed);
        // What was flushed is there for others, while the image is still open here.
        image.flush().unwrap();
        qemu(&["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", &name, &raw_name]);
        image.resize(SIZE + (1 << 20)).unwrap();
        raw.resize(SIZE + (1 << 20)).unwrap();
        work(&image, &raw, seed + 100);
        drop((image, raw));
        check(&name);
        qemu(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &name, &raw_name]);
    }
}

#[test]
fn overlay_reads_its_backing_file_when_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (_, base) = at(&dir, "base.raw");
    let (path, name) = at(&dir, "top.qcow2");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &name, "2M"]);
    assert!(refusal(qcow2(&path), OpenMode::ReadOnly).contains("`backing=on`"));
    let source = DiskSource { has_backing: true, ..qcow2(&path) };
    let image = Image::open(&source, OpenMode::Exclusive).unwrap();
    assert_eq!(image.read(4096, 512).unwrap(), [7; 512]);
    image.zero(4096, 1024).unwrap();
    image.zero(0x20000, 0x10000).unwrap();
    assert_eq!(image.read(4096, 2048).unwrap(), [[0; 1024], [7; 1024]].concat());
    assert_eq!(image.read(0x20000, 0x10000).unwrap(), [0; 0x10000]);
    assert_eq!((image.next_data(0x20000), image.next_data(1 << 20)), (Some(0x30000), None));
    drop(image);
    check(&name);
    assert_eq!(fs::read(&base).unwrap(), vec![7; 1 << 20]);
    // Without a format in the header, what the file looks like would decide.
    qemu(&["qemu-img", "rebase", "-u", "-b", "", &name]);
    let mut header = fs::read(&path).unwrap();
    header[8..16].copy_from_slice(&600u64.to_be_bytes());
    header[16..20].copy_from_slice(&8u32.to_be_bytes());
    header[600..608].copy_from_slice(b"base.raw");
    fs::write(&path, header).unwrap();
    assert!(refusal(&source, OpenMode::ReadOnly).contains("does not say its format"));
    // An overlay of itself has no end.
    qemu(&["qemu-img", "rebase", "-u", "-b", "top.qcow2", "-F", "qcow2", &name]);
    assert!(refusal(&source, OpenMode::ReadOnly).contains("too long"));
}

#[test]
fn images_that_could_not_be_used_faithfully_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, (_, data)) = ("secret,id=s,data=x", at(&dir, "data"));
    let external = format!("data_file={data},data_file_raw=on");
    let encrypted = ["--object", secret, "-o", "encrypt.format=luks,encrypt.key-secret=s"];
    let kinds: [(&[&str], &str); 4] = [
        (&encrypted, "encrypted"),
        (&["-o", "extended_l2=on"], "extended L2"),
        (&["-o", "compression_type=zstd"], "zstd"),
        (&["-o", &external], "another file"),
    ];
    let begin = ["qemu-img", "create", "-q", "-f", "qcow2"];
    for (options, why) in kinds {
        let (path, name) = at(&dir, "a.qcow2");
        qemu(&[&begin, options, &[&name, "8M"]].concat());
        let said = refusal(qcow2(&path), OpenMode::Exclusive);
        assert!(said.contains(why), "{said}");
        let said = refusal(&path, OpenMode::Exclusive);
        assert!(said.contains("`format=qcow2`"), "{said}");
        fs::remove_file(&path).unwrap();
    }
    let (path, name) = at(&dir, "b.vmdk");
    qemu(&["qemu-img", "create", "-q", "-f", "vmdk", &name, "8M"]);
    assert!(refusal(&path, OpenMode::ReadOnly).contains("VMDK"));
    assert!(refusal(qcow2(&path), OpenMode::ReadOnly).contains("VMDK"));
}

#[test]
fn what_a_guest_writes_does_not_make_its_disk_another_format() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = at(&dir, "raw");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let image = Image::open(&path, OpenMode::Exclusive).unwrap();
    image.write(0, &[&b"QFI\xfb\0\0\0\x03"[..], &[0; 504]].concat()).unwrap();
    drop(image);
    assert!(refusal(&path, OpenMode::Exclusive).contains("`format=raw`"));
    for source in
        [DiskSource::file(&path, Some(DiskFormat::Raw)), DiskSource::file(&path, None).settled()]
    {
        let image = Image::open(source, OpenMode::Exclusive).unwrap();
        assert_eq!(image.size(), 1 << 20);
        assert!(image.read(0, 512).unwrap().starts_with(b"QFI"));
    }
}

#[test]
fn internal_snapshots_and_compressed_clusters_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (raw_path, raw) = at(&dir, "raw");
    let (path, name) = at(&dir, "a.qcow2");
    fs::write(&raw_path, vec![3; 4 << 20]).unwrap();
    qemu(&["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &name]);
    qemu(&["qemu-img", "snapshot", "-c", "one", &name]);
    let image = Image::open(qcow2(&path), OpenMode::Exclusive).unwrap();
    let twin = Image::open(&raw_path, OpenMode::Exclusive).unwrap();
    work(&image, &twin, 9);
    drop((image, twin));
    check(&name);
    qemu(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &name, &raw]);
    qemu(&["qemu-img", "snapshot", "-a", "one", &name]);
    let image = Image::open(qcow2(&path), OpenMode::ReadOnly).unwrap();
    assert!(image.read(0, 4 << 20).unwrap() == vec![3; 4 << 20]);
}

#[test]
fn a_mirror_can_be_a_qcow2_image() {
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = at(&dir, "mirror.qcow2");
    let mut writer = MirrorWriter::create_as(&path, DiskFormat::Qcow2, 10 << 20).unwrap();
    writer.write_chunk(3, &[5; 65536]).unwrap();
    writer.write_chunk(4, &[6; 65536]).unwrap();
    writer.zero_chunk(3).unwrap();
    writer.finish().unwrap();
    check(&name);
    let image = Image::open(qcow2(&path), OpenMode::Exclusive).unwrap();
    assert_eq!((image.size(), image.next_data(0)), (10 << 20, Some(4 * 65536)));
    assert!(refusal(qcow2(&path), OpenMode::Exclusive).contains("in use"));
}

/// Damage to its tables costs errors, never the process.
#[test]
fn a_damaged_image_costs_errors_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = at(&dir, "a.qcow2");
    qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", &name, "4M"]);
    let image = Image::open(qcow2(&path), OpenMode::Exclusive).unwrap();
    for i in 0..40 {
        image.write(i * 65536, &[i as u8; 9000]).unwrap();
    }
    drop(image);
    let whole = fs::read(&path).unwrap();
    let mut state = 1u64;
    let mut draw = move |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    for _ in 0..400 {
        let mut bytes = whole.clone();
        // Tables are in the first clusters.
        for _ in 0..=draw(6) {
            let at = draw(bytes.len().min(10 * 4096));
            bytes[at] = if draw(2) == 0 { draw(256) as u8 } else { 1 << draw(8) };
        }
        fs::write(&path, &bytes).unwrap();
        let Ok(image) = Image::open(qcow2(&path), OpenMode::Exclusive) else { continue };
        for i in 0..8 {
            let at = (i * 9 * 65536).min(image.size().saturating_sub(8192));
            drop(image.read(at, 4096));
            drop(image.write(at, &[1; 4096]));
            drop(image.zero(at + 4096, 4096));
        }
        drop(image.flush());
        let _ = image.next_data(0);
    }
}
