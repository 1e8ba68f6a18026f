//! Where outputs leave the host: taps, consoles, and disks that the hosts share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use machine::io::OutputKind;
use machine::offload::{frame, plain};
use sha2::Digest as _;

use super::definition::Definition;
use super::packets::PacketQueue;
use super::shared::Shared;
use super::vcpu::{Disks, Mail};
use crate::announce::AddressBook;
use crate::console::ConsoleHub;
use crate::one_line::one_line;
use crate::tap::{Tap, TapWaker};

/// Consoles: the UART and one for each virtio slot.
pub(crate) const CONSOLES: usize = 1 + machine::config::VIRTIO_SLOTS;

struct NetPort {
    tap: Option<Tap>,
    waker: Option<TapWaker>,
    book: AddressBook,
    queue: Arc<PacketQueue>,
}

/// The open ports of a VM on this host.
pub(crate) struct Ports {
    nets: Vec<NetPort>,
    consoles: Vec<ConsoleHub>,
    pub(crate) disks: Disks,
    /// Packets from the taps go to the guest.
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
        let consoles = shared.consoles.clone();
        // Closes what it has when the next port cannot be opened.
        let mut ports = Self { nets: Vec::new(), consoles, disks, is_live: Arc::clone(&is_live) };
        let sections = definition.config.nets.iter().zip(macs).zip(&shared.packets);
        for (index, ((section, mac), queue)) in sections.enumerate() {
            let (book, queue) = (AddressBook::new(mac), Arc::clone(queue));
            let mut port = NetPort { tap: None, waker: None, book, queue };
            if section.tap.is_some() || section.bridge.is_some() {
                let name =
                    section.tap.clone().unwrap_or_else(|| tap_name(&definition.config.name, index));
                let fail = |e| format!("VM {}: {}", definition.config.name, one_line(&e));
                let tap = Tap::open(&name).map_err(fail)?;
                if let Some(bridge) = &section.bridge {
                    tap.attach_to_bridge(bridge).map_err(fail)?;
                }
                tap.bring_up().map_err(fail)?;
                let reader = start_reader(&tap, index, shared, &port.queue, &is_live);
                port.waker = Some(reader.map_err(fail)?);
                port.tap = Some(tap);
            }
            ports.nets.push(port);
        }
        Ok(ports)
    }

    /// Uses other disks from now on.
    pub(crate) fn set_disks(&mut self, disks: Disks) {
        self.disks = disks;
    }

    /// Packets from the taps go to the guest from now on, or do not.
    pub(crate) fn set_live(&self, is_live: bool) {
        self.is_live.store(is_live, Ordering::SeqCst);
    }

    /// Learns the guest's addresses from a packet that it sends.
    pub(crate) fn learn(&mut self, dev: u8, packet: &[u8]) {
        if let Some(net) = self.nets.get_mut(usize::from(dev)) {
            net.book.learn(frame(packet));
        }
    }

    /// The tap of a network device, if it has one.
    pub(crate) fn tap(&self, dev: u8) -> Option<Tap> {
        self.nets.get(usize::from(dev))?.tap.clone()
    }

    /// Sends an output.
    pub(crate) fn send(&mut self, kind: OutputKind) {
        match kind {
            OutputKind::NetTx { dev, packet } => {
                if let Some(net) = self.nets.get_mut(usize::from(dev)) {
                    net.book.learn(frame(&packet));
                    net.write(&packet);
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
                net.write(&plain(&frame));
            }
        }
    }
}

impl NetPort {
    fn write(&self, packet: &[u8]) {
        if let Some(tap) = &self.tap
            && let Err(e) = tap.write(packet)
        {
            crate::log::line(&format!("cannot send a packet: {}", one_line(&e)));
        }
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        for net in &self.nets {
            net.queue.close(&self.is_live);
        }
    }
}

impl Drop for NetPort {
    /// A reader that stays would keep the tap busy.
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
    queue: &Arc<PacketQueue>,
    is_live: &Arc<AtomicBool>,
) -> Result<TapWaker, crate::tap::TapError> {
    let (mut reader, waker) = tap.reader()?;
    let (weak, is_live) = (Arc::downgrade(shared), Arc::clone(is_live));
    let queue = Arc::clone(queue);
    let run = move || {
        let _ = crate::priority::realtime();
        loop {
            match reader.next_packet() {
                Ok(Some(packet)) if is_live.load(Ordering::Relaxed) => {
                    if queue.put(packet.to_vec(), &is_live) {
                        let Some(shared) = weak.upgrade() else { return };
                        shared.mailbox.post(Mail::Packets);
                    }
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
