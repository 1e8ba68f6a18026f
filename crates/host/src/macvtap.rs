//! macvtap interfaces: a guest's own MAC address on a network card of the host, without a bridge.
//!
//! # Place
//! Makes and opens them for [`crate::tap`], whose taps they are from then on. Asks iproute2 and sysfs; the device's file
//! is the kernel's.
//!
//! # Invariants
//! - INV-MACVTAP-1: an interface that was made here is down until [`crate::tap::Tap::bring_up`]: until then it receives
//!   nothing, sends nothing, and no switch learns its address. The kernel sends nothing from it of its own accord.
//! - INV-MACVTAP-2: what was made here is deleted when its tap is dropped, unless another one has its name by then.
//!
//! # Failure
//! A process that is killed leaves its interface behind; the next one that needs the name deletes it first.
//!
//! # References
//! Linux `drivers/net/macvlan.c`, `drivers/net/tap.c`; ip-link(8).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use crate::tap::{Tap, TapError, ip};

/// An interface that was made here.
#[derive(Debug)]
pub(crate) struct Made {
    name: String,
    index: u32,
}

impl Drop for Made {
    fn drop(&mut self) {
        if index_of(&self.name).is_ok_and(|index| index == self.index) {
            // It is gone with its card, or stays for the next user, who deletes it.
            drop(ip(&["link", "del", "dev", &self.name]));
        }
    }
}

/// Makes the interface `name` with the guest's address on `card`, down.
///
/// # Errors
/// See [`TapError`].
pub fn make(name: &str, card: &str, mac: [u8; 6]) -> Result<Tap, TapError> {
    for name in [name, card] {
        crate::tap::check_interface_name(name).map_err(TapError::BadName)?;
    }
    if index_of(name).is_ok() {
        ip(&["link", "del", "dev", name])?;
    }
    let address = text_of(mac);
    ip(&[
        "link", "add", "link", card, "name", name, "address", &address, "type", "macvtap", "mode",
        "bridge",
    ])?;
    let fail = |source| TapError::Io { action: "find", name: name.to_owned(), source };
    let made = Made { name: name.to_owned(), index: index_of(name).map_err(fail)? };
    // What the guest listens to by multicast, IPv6's neighbour discovery first of all, nobody tells the host.
    ip(&["link", "set", "dev", name, "allmulticast", "on"])?;
    // The kernel would give itself an address here and announce it, from the guest's MAC address. Without IPv6 there
    // is no such file.
    drop(fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1"));
    let file = open_file(name, made.index).map_err(fail)?;
    Tap::of_macvtap(file, name, Some(made))
}

/// Opens the interface `name`, if it is a macvtap that is there already; its address has to be the guest's.
///
/// # Errors
/// See [`TapError`].
pub fn find(name: &str, mac: [u8; 6]) -> Result<Option<Tap>, TapError> {
    crate::tap::check_interface_name(name).map_err(TapError::BadName)?;
    let dir = sysfs(name);
    let Ok(index) = index_of(name) else { return Ok(None) };
    if !dir.join("macvtap").exists() {
        return Ok(None);
    }
    let fail = |source| TapError::Io { action: "open macvtap", name: name.to_owned(), source };
    let address = fs::read_to_string(dir.join("address")).map_err(fail)?;
    if address.trim() != text_of(mac) {
        return Err(TapError::OtherAddress {
            name: name.to_owned(),
            found: address.trim().to_owned(),
            wanted: text_of(mac),
        });
    }
    let file = open_file(name, index).map_err(fail)?;
    Tap::of_macvtap(file, name, None).map(Some)
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn sysfs(name: &str) -> PathBuf {
    Path::new("/sys/class/net").join(name)
}

fn index_of(name: &str) -> io::Result<u32> {
    let any: OwnedFd = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(netdevice::name_to_index(any, name)?)
}

/// Opens the character device of the interface. Its node in /dev has the interface's number in its name, which another
/// network namespace may have, too: the numbers of the device decide.
fn open_file(name: &str, index: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let numbers = fs::read_to_string(sysfs(name).join(format!("tap{index}/dev"))).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("/sys does not show it ({e}); /sys has to be this network namespace's"),
        )
    })?;
    let device = numbers
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some(makedev(major.parse().ok()?, minor.parse().ok()?)));
    let device = device.ok_or_else(|| io::Error::other("/sys shows no device numbers"))?;
    let usual = PathBuf::from(format!("/dev/tap{index}"));
    if fs::metadata(&usual).is_ok_and(|found| found.rdev() == device) {
        return options.open(&usual);
    }
    let own = PathBuf::from(format!("/dev/understudy-{name}-{}", std::process::id()));
    mknodat(CWD, &own, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device)?;
    let opened = options.open(&own);
    fs::remove_file(&own)?;
    opened
}
