//! Debian's own test programs run in a guest and find nothing: stress-ng verifies what it computes, openssl meets known
//! answers, python prints what the host's python prints.

mod vmrun;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use guest::{GuestKind, write_with_run_list};
use vmrun::{Running, guest, run_command};

/// Debian's OpenSBI, from its package.
const OPENSBI: &str = "/usr/lib/riscv64-linux-gnu/opensbi/generic/fw_dynamic.bin";
/// What a compared line of a program starts with, so that the kernel's lines are not taken for it.
const SAYS: &str = "says: ";
/// Programs whose output has to be the host's.
const PROGRAMS: [(&str, &str); 4] = [
    ("floats", include_str!("guest_tools/floats.py")),
    ("integers", include_str!("guest_tools/integers.py")),
    ("memory", include_str!("guest_tools/memory.py")),
    ("threads", include_str!("guest_tools/threads.py")),
];

/// Loads for one hart. The counts of operations keep each to seconds on the interpreter.
const STRESS: &str = "
stress-ng --cpu 1 --cpu-method all --cpu-ops 100 --verify
stress-ng --vm 1 --vm-bytes 2M --vm-method all --vm-ops 40 --verify
stress-ng --matrix 1 --matrix-size 32 --matrix-ops 60 --verify
stress-ng --fp 1 --fp-ops 4 --verify
stress-ng --fma 1 --fma-ops 20 --verify
stress-ng --atomic 1 --atomic-ops 20 --verify
stress-ng --bitops 1 --bitops-ops 20 --verify
stress-ng --qsort 1 --qsort-size 4096 --qsort-ops 2 --verify
stress-ng --context 1 --context-ops 100 --verify
stress-ng --fork 1 --fork-ops 20 --verify
stress-ng --mmap 1 --mmap-bytes 512K --mmap-ops 8 --verify
stress-ng --signal 1 --signal-ops 1000 --verify
";

/// Loads whose workers meet each other on four harts. The mutex stressor sleeps until its time is over, on QEMU too.
const STRESS_SMP: &str = "
stress-ng --cpu 4 --cpu-method all --cpu-ops 60 --verify
stress-ng --atomic 4 --atomic-ops 20 --verify
stress-ng --mutex 4 --mutex-ops 1000 --timeout 4 --verify
stress-ng --futex 4 --futex-ops 500 --verify
stress-ng --vm 2 --vm-bytes 2M --vm-ops 20 --verify
stress-ng --matrix 4 --matrix-size 32 --matrix-ops 60 --verify
stress-ng --context 4 --context-ops 100 --verify
stress-ng --fork 4 --fork-ops 20 --verify
stress-ng --mmap 4 --mmap-bytes 512K --mmap-ops 8 --verify
stress-ng --signal 4 --signal-ops 1000 --verify
";

/// Loads for a machine that firmware starts.
const STRESS_FIRMWARE: &str = "
stress-ng --cpu 2 --cpu-method all --cpu-ops 40 --verify
stress-ng --vm 1 --vm-bytes 2M --vm-ops 20 --verify
stress-ng --context 2 --context-ops 100 --verify
stress-ng --signal 2 --signal-ops 1000 --verify
stress-ng --fork 2 --fork-ops 20 --verify
";

/// Commands that print `$2` to `$1`: known answers. FIPS 180-4, FIPS 202, RFC 1321, FIPS 197, RFC 8032.
const ANSWERS: [(&str, &str); 7] = [
    (
        "printf abc | openssl dgst -sha256 -r | cut -d' ' -f1",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    ),
    (
        "printf abc | openssl dgst -sha512 -r | cut -d' ' -f1",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e\
         2a9ac94fa54ca49f",
    ),
    (
        "printf abc | openssl dgst -sha3-256 -r | cut -d' ' -f1",
        "3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532",
    ),
    ("printf abc | openssl dgst -md5 -r | cut -d' ' -f1", "900150983cd24fb0d6963f7d28e17f72"),
    (
        "printf '\\x00\\x11\\x22\\x33\\x44\\x55\\x66\\x77\\x88\\x99\\xaa\\xbb\\xcc\\xdd\\xee\\xff' | openssl enc \
         -aes-128-ecb -K 000102030405060708090a0b0c0d0e0f -nopad | od -An -tx1 | tr -d ' \\n'",
        "69c4e0d86a7b0430d8cdb78070b4c55a",
    ),
    (
        "printf '\\x00\\x11\\x22\\x33\\x44\\x55\\x66\\x77\\x88\\x99\\xaa\\xbb\\xcc\\xdd\\xee\\xff' | openssl enc \
         -aes-256-ecb -K 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f -nopad | od -An -tx1 | \
         tr -d ' \\n'",
        "8ea2b7ca516745bfeafc49904b496089",
    ),
    (
        "printf '\\x30\\x2e\\x02\\x01\\x00\\x30\\x05\\x06\\x03\\x2b\\x65\\x70\\x04\\x22\\x04\\x20\\x4c\\xcd\\x08\\x9b\
         \\x28\\xff\\x96\\xda\\x9d\\xb6\\xc3\\x46\\xec\\x11\\x4e\\x0f\\x5b\\x8a\\x31\\x9f\\x35\\xab\\xa6\\x24\\xda\\x8c\
         \\xf6\\xed\\x4f\\xb8\\xa6\\xfb' > /tmp/ed; printf '\\x72' > /tmp/r; openssl pkeyutl -sign -rawin -inkey /tmp/ed \
         -keyform DER -in /tmp/r | od -An -v -tx1 | tr -d ' \\n'",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee\
         b00d291612bb0c00",
    ),
];

/// What openssl makes, it can take apart again, and nothing else.
const ROUND_TRIPS: &str = "
dd if=/dev/urandom of=/tmp/a bs=1k count=128 2>/dev/null; dd if=/dev/urandom of=/tmp/b bs=1k count=128 2>/dev/null
openssl enc -aes-256-cbc -K 00 -iv 00 -in /tmp/a -out /tmp/c && openssl enc -d -aes-256-cbc -K 00 -iv 00 -in /tmp/c -out /tmp/d && cmp /tmp/a /tmp/d && ! cmp -s /tmp/a /tmp/c
openssl enc -chacha20 -K 01 -iv 02 -in /tmp/a -out /tmp/c && openssl enc -d -chacha20 -K 01 -iv 02 -in /tmp/c -out /tmp/d && cmp /tmp/a /tmp/d && ! cmp -s /tmp/a /tmp/c
[ $(openssl dgst -sha256 -r /bin/busybox | cut -d' ' -f1) = $(sha256sum /bin/busybox | cut -d' ' -f1) ]
openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:1024 -out /tmp/rsa && openssl pkey -in /tmp/rsa -pubout -out /tmp/rsa.pub && openssl dgst -sha256 -sign /tmp/rsa -out /tmp/s /tmp/a && openssl dgst -sha256 -verify /tmp/rsa.pub -signature /tmp/s /tmp/a && ! openssl dgst -sha256 -verify /tmp/rsa.pub -signature /tmp/s /tmp/b
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out /tmp/ec && openssl pkey -in /tmp/ec -pubout -out /tmp/ec.pub && openssl dgst -sha256 -sign /tmp/ec -out /tmp/s /tmp/a && openssl dgst -sha256 -verify /tmp/ec.pub -signature /tmp/s /tmp/a && ! openssl dgst -sha256 -verify /tmp/ec.pub -signature /tmp/s /tmp/b
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out /tmp/ec && openssl pkey -in /tmp/ec -pubout -out /tmp/ec.pub && openssl dgst -sha384 -sign /tmp/ec -out /tmp/s /tmp/a && openssl dgst -sha384 -verify /tmp/ec.pub -signature /tmp/s /tmp/a && ! openssl dgst -sha384 -verify /tmp/ec.pub -signature /tmp/s /tmp/b
openssl genpkey -algorithm X25519 -out /tmp/x && openssl genpkey -algorithm X25519 -out /tmp/y && openssl pkey -in /tmp/x -pubout -out /tmp/x.pub && openssl pkey -in /tmp/y -pubout -out /tmp/y.pub && openssl pkeyutl -derive -inkey /tmp/x -peerkey /tmp/y.pub -out /tmp/1 && openssl pkeyutl -derive -inkey /tmp/y -peerkey /tmp/x.pub -out /tmp/2 && cmp /tmp/1 /tmp/2 && [ $(stat -c %s /tmp/1) = 32 ]
";

/// A program's bytes in a form that a shell line can carry.
fn octal(text: &str) -> String {
    text.bytes().map(|byte| format!("\\{byte:03o}")).collect()
}

fn openssl_commands() -> String {
    let answers = ANSWERS.map(|(command, answer)| format!("[ \"$({command})\" = {answer} ]\n"));
    answers.concat() + ROUND_TRIPS.trim_start()
}

fn python_commands() -> String {
    let run = |(name, text): (&str, &str)| {
        // A line of at most 127 kB, the kernel's limit for one argument, of four bytes for each.
        assert!(text.len() < 30_000, "the program {name} is too long for a command line");
        format!("printf '{}' > /tmp/{name}.py; python3 /tmp/{name}.py\n", octal(text))
    };
    PROGRAMS.map(run).concat()
}

/// Lines that the programs print on the host.
fn expected_lines() -> Vec<String> {
    let mut lines = Vec::new();
    for (name, text) in PROGRAMS {
        let mut python = Command::new("python3");
        let output = python.args(["-c", text]).stdin(Stdio::null()).output();
        let output =
            output.expect("python3 (package python3) runs on this machine, to compare with");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the program {name} fails on this machine: {words}");
        lines.extend(said(&String::from_utf8_lossy(&output.stdout)));
    }
    assert!(lines.len() > 100, "the programs say too little to compare");
    lines
}

fn said(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.strip_prefix(SAYS)).map(str::to_owned).collect()
}

/// Runs the commands in a guest; each has to end with status 0. Returns what the guest wrote.
fn run_in_guest(commands: &str, harts: u8, bios: Option<&Path>) -> String {
    let files = guest(GuestKind::Tools);
    let work = tempfile::tempdir().expect("room for temporary files");
    let initrd = work.path().join("initrd");
    write_with_run_list(&files, commands, &initrd).expect("room for an initial RAM disk");
    let mut command = run_command(&files, harts, "quiet");
    command.arg("--initrd").arg(&initrd);
    if let Some(bios) = bios {
        command.arg("--bios").arg(bios);
    }
    let ended = Running::start(&mut command).wait();
    let console = ended.console.replace('\r', "");
    assert_eq!(ended.code, Some(0), "{console}\n{}", ended.words);
    assert!(console.contains(&format!(", {harts} harts\n")), "{console}");
    let ends: Vec<&str> =
        console.lines().filter(|line| line.starts_with("understudy: exit ")).collect();
    let bad: Vec<&&str> =
        ends.iter().filter(|line| !line.starts_with("understudy: exit 0 ")).collect();
    assert!(bad.is_empty(), "{bad:#?}\n{console}");
    let wanted = commands.lines().filter(|line| !line.trim().is_empty()).count();
    assert_eq!(ends.len(), wanted, "{console}");
    assert!(console.contains("understudy: tools done, 0 failed"), "{console}");
    // stress-ng says so even where its exit status does not.
    assert!(!console.contains("stress-ng: fail"), "{console}");
    console
}

#[test]
fn stress_ng_verifies_one_hart() {
    run_in_guest(STRESS, 1, None);
}

#[test]
fn stress_ng_verifies_four_harts() {
    run_in_guest(STRESS_SMP, 4, None);
}

#[test]
fn openssl_gives_known_answers_and_takes_apart_what_it_made() {
    run_in_guest(&openssl_commands(), 1, None);
}

#[test]
fn python_prints_what_the_hosts_python_prints() {
    let expected = expected_lines();
    let console = run_in_guest(&python_commands(), 4, None);
    let found = said(&console);
    let first = expected.iter().zip(&found).find(|(wanted, found)| wanted != found);
    assert_eq!(first, None, "first line that differs: host, guest");
    assert_eq!(found.len(), expected.len());
}

#[test]
fn all_of_them_pass_under_opensbi() {
    let bios = Path::new(OPENSBI);
    assert!(
        fs::exists(bios).unwrap_or(false),
        "{OPENSBI} is missing: install Debian's package opensbi"
    );
    let console = run_in_guest(&(STRESS_FIRMWARE.to_owned() + &openssl_commands()), 2, Some(bios));
    assert!(console.contains("OpenSBI v"), "{console}");
}
