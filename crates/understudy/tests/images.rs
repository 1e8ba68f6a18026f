//! `understudy image` beside QEMU's tools: what it says of their images, and what they say of its own.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn understudy(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.arg("image").args(args).current_dir(dir).output().unwrap()
}

fn qemu_img(dir: &Path, args: &[&str]) -> Output {
    let output = Command::new("qemu-img").args(args).current_dir(dir).output();
    output.expect("qemu-img (package qemu-utils) runs")
}

/// Both are run as `PROGRAM ARGS`, and succeed.
fn ok(output: Output) -> String {
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn refused(output: Output, code: i32, why: &str) {
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words}");
    assert!(words.contains(why), "{words}");
}

fn json(output: Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A raw disk with data here and there.
fn raw(path: &Path, bytes: u64) {
    let file = fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    for i in 0..20u64 {
        let at = (i * 7_919_104) % (bytes - 100_000);
        file.write_all_at(&vec![i as u8 + 1; 70_000], at / 512 * 512).unwrap();
    }
}

#[test]
fn images_go_from_format_to_format_and_stay_sparse() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    raw(&dir.join("a.raw"), 64 << 20);
    ok(understudy(dir, &["convert", "a.raw", "b.qcow2"]));
    ok(qemu_img(dir, &["check", "-f", "qcow2", "b.qcow2"]));
    ok(qemu_img(dir, &["compare", "-f", "raw", "-F", "qcow2", "a.raw", "b.qcow2"]));
    ok(understudy(dir, &["convert", "b.qcow2", "c", "--to", "raw"]));
    assert!(fs::read(dir.join("a.raw")).unwrap() == fs::read(dir.join("c")).unwrap());
    assert!(fs::metadata(dir.join("c")).unwrap().blocks() * 512 < 8 << 20);
    assert!(fs::metadata(dir.join("b.qcow2")).unwrap().len() < 8 << 20);
    // What is there is not written over by mistake, and what is not said is not guessed.
    refused(understudy(dir, &["convert", "a.raw", "c"]), 2, "--force");
    fs::rename(dir.join("b.qcow2"), dir.join("b")).unwrap();
    refused(understudy(dir, &["convert", "b", "d"]), 1, "--format qcow2");
    ok(understudy(dir, &["convert", "--format", "qcow2", "b", "c", "--force"]));
    // An overlay, whole or not at all.
    ok(qemu_img(
        dir,
        &["create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "o.qcow2", "70M"],
    ));
    refused(understudy(dir, &["convert", "o.qcow2", "d"]), 1, "--backing");
    ok(understudy(dir, &["convert", "--backing", "o.qcow2", "d.qcow2"]));
    ok(qemu_img(dir, &["compare", "-f", "qcow2", "-F", "qcow2", "o.qcow2", "d.qcow2"]));
}

#[test]
fn info_and_resize_agree_with_qemu() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    ok(qemu_img(
        dir,
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "a.qcow2", "10M"],
    ));
    let info = json(understudy(dir, &["info", "-o", "json", "a.qcow2"]));
    assert_eq!((&info["format"], &info["virtual_bytes"]), (&"qcow2".into(), &(10 << 20).into()));
    assert_eq!((&info["cluster_bytes"], &info["usable"]), (&4096.into(), &"yes".into()));
    ok(understudy(dir, &["resize", "a.qcow2", "+6M"]));
    ok(qemu_img(dir, &["check", "-f", "qcow2", "a.qcow2"]));
    let qemu = json(qemu_img(dir, &["info", "--output=json", "a.qcow2"]));
    assert_eq!(qemu["virtual-size"], 16 << 20);
    refused(understudy(dir, &["resize", "a.qcow2", "8M"]), 2, "--shrink");
    ok(understudy(dir, &["resize", "a.qcow2", "8M", "--shrink"]));
    ok(qemu_img(dir, &["check", "-f", "qcow2", "a.qcow2"]));
    raw(&dir.join("b"), 4 << 20);
    ok(understudy(dir, &["resize", "b", "5M"]));
    assert_eq!(fs::metadata(dir.join("b")).unwrap().len(), 5 << 20);
    refused(understudy(dir, &["resize", "b", "1000"]), 2, "--shrink");
    let said = ok(understudy(dir, &["info", "b"]));
    assert!(said.contains("raw") && said.contains("5242880"), "{said}");
    ok(qemu_img(dir, &["create", "-q", "-f", "vmdk", "c", "4M"]));
    assert_eq!(json(understudy(dir, &["info", "-o", "json", "c"]))["format"], "VMDK");
    refused(understudy(dir, &["check", "c"]), 1, "looks like VMDK");
    refused(understudy(dir, &["check", "/dev/null"]), 1, "disk image");
    let lies = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s"];
    let create = [&["create", "-q", "-f", "qcow2"], &lies[..], &["d.qcow2", "4M"]].concat();
    ok(qemu_img(dir, &create));
    let said = ok(understudy(dir, &["info", "d.qcow2"]));
    assert!(said.contains("no: it is encrypted"), "{said}");
}

/// Errors and leaks that both find.
fn found(dir: &Path, name: &str) -> [(u64, u64); 2] {
    let ours = json(understudy(dir, &["check", "-o", "json", name]));
    let qemu = json(qemu_img(dir, &["check", "--output=json", "-f", "qcow2", name]));
    let count = |v: &Value| v.as_u64().unwrap_or(0);
    [
        (count(&ours["errors"]), count(&ours["leaked_clusters"])),
        (count(&qemu["corruptions"]), count(&qemu["leaks"])),
    ]
}

#[test]
fn check_finds_what_qemu_finds() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    raw(&dir.join("raw"), 16 << 20);
    let make = |options: &[&str]| {
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        ok(qemu_img(dir, &[&convert, options, &["raw", "a.qcow2"]].concat()));
    };
    for options in
        [&["-c"][..], &["-o", "cluster_size=512,refcount_bits=1"], &["-o", "refcount_bits=64"], &[]]
    {
        make(options);
        assert_eq!(found(dir, "a.qcow2"), [(0, 0); 2], "{options:?}");
    }
    ok(qemu_img(dir, &["snapshot", "-c", "a snapshot", "a.qcow2"]));
    ok(qemu_img(dir, &["bitmap", "--add", "a.qcow2", "bitmap"]));
    ok(qemu_img(dir, &["snapshot", "-c", "another", "a.qcow2"]));
    assert_eq!(found(dir, "a.qcow2"), [(0, 0); 2]);
    make(&[]);
    let file = fs::File::options().read(true).write(true).open(dir.join("a.qcow2")).unwrap();
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let first_l2 = be64(be64(40)) & 0x00ff_ffff_ffff_fe00;
    // An entry is gone: its cluster leaks.
    let used = (0..8192u64).find(|i| be64(first_l2 + i * 8) != 0).unwrap();
    let entry = be64(first_l2 + used * 8);
    file.write_all_at(&[0; 8], first_l2 + used * 8).unwrap();
    assert_eq!(found(dir, "a.qcow2"), [(0, 1); 2]);
    // It is there twice, too: its cluster is counted once and used twice.
    for i in [used, 4000] {
        file.write_all_at(&entry.to_be_bytes(), first_l2 + i * 8).unwrap();
    }
    let [ours, qemu] = found(dir, "a.qcow2");
    assert!(ours.0 > 0 && qemu.0 > 0 && ours.1 == 0 && qemu.1 == 0, "{ours:?} {qemu:?}");
    assert_eq!(understudy(dir, &["check", "a.qcow2"]).status.code(), Some(1));
    // It leads beyond the end.
    file.write_all_at(&((1u64 << 63) | (1 << 40)).to_be_bytes(), first_l2 + 4000 * 8).unwrap();
    assert!(found(dir, "a.qcow2")[0].0 > 0);
}

#[test]
fn an_export_is_a_source_and_a_target() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    raw(&dir.join("a.raw"), 16 << 20);
    let server = Command::new("nbdkit")
        .args(["-f", "-U", "socket", "memory", "20M"])
        .current_dir(dir)
        .stderr(std::process::Stdio::null())
        .spawn();
    let mut server = server.expect("nbdkit (package nbdkit) runs");
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !dir.join("socket").exists() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let url = format!("nbd+unix:///?socket={}", dir.join("socket").display());
    let there = understudy(dir, &["convert", "a.raw", &url, "--force"]);
    let info = understudy(dir, &["info", "-o", "json", &url]);
    let back = understudy(dir, &["convert", &url, "b.raw"]);
    server.kill().unwrap();
    server.wait().unwrap();
    ok(there);
    ok(back);
    assert_eq!(json(info)["virtual_bytes"], 20 << 20);
    let (a, b) = (fs::read(dir.join("a.raw")).unwrap(), fs::read(dir.join("b.raw")).unwrap());
    assert!(b.len() == 20 << 20 && b[..16 << 20] == a && b[16 << 20..].iter().all(|b| *b == 0));
}
