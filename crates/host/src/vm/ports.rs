//! Where outputs leave the host: taps, consoles, and disks that the hosts share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use machine::io::{Input, OutputKind};
use sha2::Digest as _;

use super::definition::Definition;
use super::shared::Shared;
use super::vcpu::{Disks, Mail};
use crate::announce::AddressBook;
use crate::console::ConsoleHub;
use crate::one_line::one_line;
use crate::tap::{Tap, TapWaker};

/// Frames that wait for the guest at most; more are dropped, as a network card does.
const FRAMES_WAITING_MAX: usize = 512;
/// Consoles: the UART and one for each virtio slot.
pub(crate) const CONSOLES: usize = 1 + machine::config::VIRTIO_SLOTS;

struct NetPort {
    tap: Option<Tap>,
    waker: Option<TapWaker>,
    book: AddressBook,
}

/// The open ports of a VM on this host.
pub(crate) struct Ports {
    nets: Vec<NetPort>,
    consoles: Vec<ConsoleHub>,
    pub(crate) disks: Disks,
    /// Frames from the taps go to the guest.
    is_live: Arc<AtomicBool>,
}

/// Name of the tap of a VM's network device: the same on each host, at most 15 characters.
fn tap_name(vm: &str, index: usize) -> String {
    let h = sha2::Sha256::digest(vm.as_bytes());
    format!("us{:02x}{:02x}{:02x}{:02x}n{index}", h[0], h[1], h[2], h[3])
}

impl Ports {
    /// Opens the taps; a secondary's are ready, but carry nothing.
    pub(crate) fn open(
        definition: &Definition,
        shared: &Arc<Shared>,
        disks: Disks,
        is_live: bool,
    ) -> Result<Self, String> {
        let is_live = Arc::new(AtomicBool::new(is_live));
        let macs = definition.config.macs()?;
        let mut nets = Vec::new();
        for (index, (section, mac)) in definition.config.nets.iter().zip(macs).enumerate() {
            let mut port = NetPort { tap: None, waker: None, book: AddressBook::new(mac) };
            if section.tap.is_some() || section.bridge.is_some() {
                let name =
                    section.tap.clone().unwrap_or_else(|| tap_name(&definition.config.name, index));
                let fail = |e| format!("VM {}: {}", definition.config.name, one_line(&e));
                let tap = Tap::open(&name).map_err(fail)?;
                if let Some(bridge) = &section.bridge {
                    tap.attach_to_bridge(bridge).map_err(fail)?;
                }
                tap.bring_up().map_err(fail)?;
                port.waker = Some(start_reader(&tap, index, shared, &is_live).map_err(fail)?);
                port.tap = Some(tap);
            }
            nets.push(port);
        }
        Ok(Self { nets, consoles: shared.consoles.clone(), disks, is_live })
    }

    /// Frames from the taps go to the guest from now on, or do not.
    pub(crate) fn set_live(&self, is_live: bool) {
        self.is_live.store(is_live, Ordering::SeqCst);
    }

    /// Learns the guest's addresses from a frame that it sends.
    pub(crate) fn learn(&mut self, dev: u8, frame: &[u8]) {
        if let Some(net) = self.nets.get_mut(usize::from(dev)) {
            net.book.learn(frame);
        }
    }

    /// Sends an output.
    pub(crate) fn send(&mut self, kind: OutputKind) {
        match kind {
            OutputKind::NetTx { dev, frame } => {
                if let Some(net) = self.nets.get_mut(usize::from(dev)) {
                    net.book.learn(&frame);
                    net.write(&frame);
                }
            }
            OutputKind::Console { dev, bytes } => {
                if let Some(hub) = self.consoles.get(usize::from(dev)) {
                    hub.push(&bytes);
                }
            }
            OutputKind::Blk { dev, id, op } => {
                if let Some(disk) = self.disks.get(usize::from(dev)) {
                    disk.handle.submit(id, op);
                }
            }
            // Answered where it is made.
            OutputKind::EntropyWanted { .. } => {}
        }
    }

    /// Tells the network where the guest is now.
    pub(crate) fn announce(&self) {
        for net in &self.nets {
            for frame in net.book.announcements() {
                net.write(&frame);
            }
        }
    }
}

impl NetPort {
    fn write(&self, frame: &[u8]) {
        if let Some(tap) = &self.tap
            && let Err(e) = tap.write(frame)
        {
            crate::log::line(&format!("cannot send a frame: {}", one_line(&e)));
        }
    }
}

impl Drop for NetPort {
    /// Also where the next port cannot be opened: a reader that stays would keep the tap busy.
    fn drop(&mut self) {
        if let Some(waker) = &self.waker {
            waker.wake();
        }
    }
}

fn start_reader(
    tap: &Tap,
    index: usize,
    shared: &Arc<Shared>,
    is_live: &Arc<AtomicBool>,
) -> Result<TapWaker, crate::tap::TapError> {
    let (mut reader, waker) = tap.reader()?;
    let (weak, is_live) = (Arc::downgrade(shared), Arc::clone(is_live));
    let dev = u8::try_from(index).unwrap_or(u8::MAX);
    let run = move || {
        let _ = crate::priority::realtime();
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) if is_live.load(Ordering::Relaxed) => {
                    let Some(shared) = weak.upgrade() else { return };
                    let mail = Mail::Input(Input::NetRx { dev, frame: frame.to_vec() });
                    // A guest that does not fetch its frames loses them.
                    let _ = shared.mailbox.post_bounded(mail, FRAMES_WAITING_MAX);
                }
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(e) => {
                    crate::log::line(&format!("a tap cannot be read any more: {}", one_line(&e)));
                    return;
                }
            }
        }
    };
    if let Err(e) = std::thread::Builder::new().name(format!("tap{index}")).spawn(run) {
        crate::log::line(&format!("cannot start a tap's thread: {e}"));
    }
    Ok(waker)
}
