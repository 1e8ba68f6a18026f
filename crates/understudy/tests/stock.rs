//! A stock Debian, made by `understudy image create`, boots by its own boot loader, and reboots and powers off by itself,
//! alone and while it is protected.
//!
//! The image is kept in the guest cache, named by what it is made of: it is made once for each version of its packages.

mod hosts;
mod inside;
mod vmrun;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest::{GuestBuilder, StockOptions};
use hosts::{DIGESTS_MIN, Host, LIMIT, VM, copy_disk, two_hosts_with};
use inside::is_inside;
use vmrun::{Running, understudy};

const PASSWORD: &str = "from the test";
const SIZE: &str = "2G";
const MEMORY: &str = "512M";
/// What each boot says once, at its beginning.
const FIRMWARE: &str = "U-Boot 20";

/// Making the image, and each boot, keeps the cores busy: one test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// The image, made if the cache does not have it.
fn image() -> PathBuf {
    let options = StockOptions {
        hostname: "stock".to_owned(),
        root_password: Some(PASSWORD.to_owned()),
        ..StockOptions::default()
    };
    let cache = guest::default_cache_dir();
    let key = GuestBuilder::new(&cache).stock_key(&options);
    let key = key.unwrap_or_else(|e| panic!("cannot look up Debian's packages: {e}"));
    let path = cache.join("images").join(format!("{key}.img"));
    if !path.exists() {
        fs::create_dir_all(cache.join("images")).expect("room for an image");
        let mut create = understudy();
        create.args(["image", "create", "debian", "--force", "--size", SIZE]);
        create.args(["--hostname", &options.hostname, "--root-password", PASSWORD]).arg(&path);
        let output = create.output().expect("the program under test runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    path
}

/// Logs in, and lets the guest reboot; then logs in again.
fn reboot_by_itself(console: &mut Running) {
    console.log_in("", 0, PASSWORD);
    let boots = console.times(FIRMWARE);
    console.type_line(
        "cat /proc/sys/kernel/random/boot_id > /root/first; echo kept=$((40 + 2)); reboot",
    );
    console.wait_for("kept=42");
    console.log_in(FIRMWARE, boots + 1, PASSWORD);
    console.type_line(
        "cmp -s /root/first /proc/sys/kernel/random/boot_id || echo rebooted=$((40 + 3))",
    );
    console.wait_for("rebooted=43");
}

#[test]
fn stock_debian_boots_by_firmware_reboots_and_powers_off() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let work = tempfile::tempdir().expect("room for temporary files");
    let disk = work.path().join("disk.img");
    copy_disk(&image(), &disk);
    let grown = fs::OpenOptions::new().write(true).open(&disk).and_then(|f| f.set_len(3 << 30));
    grown.expect("the disk can be enlarged");
    let mut command: Command = understudy();
    command.args(["run", "--memory", MEMORY, "--disk"]);
    command.arg(format!("path={},format=raw", disk.display()));
    let mut console = Running::start(&mut command);
    reboot_by_itself(&mut console);
    console
        .type_line("[ $(df --output=size -m / | tail -n 1) -gt 2500 ] && echo grown=$((40 + 4))");
    console.wait_for("grown=44");
    console.type_line("poweroff");
    let ended = console.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
}

#[test]
fn stock_debian_reboots_while_it_is_protected() {
    let name = "stock_debian_reboots_while_it_is_protected";
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Outside: there is no network inside.
    let image = image();
    if !is_inside(name) {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let work = work.path();
    let boot = format!("memory = \"{MEMORY}\"\n");
    let more = "digest_interval_ms = 500\nflight_recorder = \"0s\"\n";
    let (hosts, vm) = two_hosts_with(work, &image, ["jit", "jit"], &boot, more);
    let started = hosts[0].ask(&["start", &vm.display().to_string()]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    hosts[0].wait_protected();
    let mut command = understudy();
    command.args(["console", VM, "--socket"]).arg(hosts[0].dir.join("socket"));
    let mut console = Running::start(&mut command);
    reboot_by_itself(&mut console);
    hosts[0].wait_protected();
    hosts[1].wait_digests(DIGESTS_MIN);
    hosts.iter().for_each(Host::assert_same);
    console.type_line("poweroff");
    for host in &hosts {
        host.wait("off", |s| s["role"] == "stopped");
        host.assert_same();
    }
    let disks = [0, 1].map(|i| hosts[i].dir.join("vm/disk").display().to_string());
    let deadline = Instant::now() + LIMIT;
    while !Command::new("cmp").args(&disks).status().expect("cmp (diffutils) runs").success() {
        assert!(Instant::now() < deadline, "the disks differ");
        std::thread::sleep(Duration::from_millis(500));
    }
}
