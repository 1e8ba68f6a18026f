//! Where outputs leave the host: networks, consoles, and disks that the hosts share.

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
use crate::config::NetSection;
use crate::console::ConsoleHub;
use crate::nic::Nic;
use crate::one_line::one_line;
use crate::passt::Passt;
use crate::tap::{Tap, TapWaker};
use crate::{macvtap, tap};

/// Consoles: the UART and one for each virtio slot.
pub(crate) const CONSOLES: usize = 1 + machine::config::VIRTIO_SLOTS;

struct NetPort {
    nic: Option<Nic>,
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
            let mut port = NetPort { nic: None, waker: None, book, queue };
            let fail = |e| format!("VM {}: {e}", definition.config.name);
            let name = tap_name(&definition.config.name, index);
            if let Some(nic) = open_nic(section, &name, mac).map_err(fail)? {
                if is_live.load(Ordering::SeqCst) {
                    nic.go_live().map_err(fail)?;
                }
                let reader = start_reader(&nic, index, shared, &port.queue, &is_live);
                port.waker = Some(reader.map_err(fail)?);
                port.nic = Some(nic);
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

    /// What a network device is attached to, if it is.
    pub(crate) fn nic(&self, dev: u8) -> Option<Nic> {
        self.nets.get(usize::from(dev))?.nic.clone()
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
                    disk.submit(id, op);
                }
            }
            // Answered where it is made.
            OutputKind::EntropyWanted { .. } => {}
        }
    }

    /// Tells the network where the guest is now.
    pub(crate) fn announce(&self) {
        for nic in self.nets.iter().filter_map(|net| net.nic.as_ref()) {
            if let Err(e) = nic.go_live() {
                crate::log::line(&format!("a network device stays without a network: {e}"));
            }
        }
        for net in &self.nets {
            for frame in net.book.announcements() {
                net.write(&plain(&frame));
            }
        }
    }
}

impl NetPort {
    fn write(&self, packet: &[u8]) {
        if let Some(nic) = &self.nic
            && let Err(e) = nic.write(packet)
        {
            crate::log::line(&format!("cannot send a packet: {e}"));
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

/// Attaches a network device to what is configured; `name` is for an interface that is made. One that has the guest's
/// MAC address stays down until the guest is live.
fn open_nic(section: &NetSection, name: &str, mac: [u8; 6]) -> Result<Option<Nic>, String> {
    let words = |e: tap::TapError| one_line(&e);
    if section.passt {
        let passt = Passt::start(mac, &section.ports).map_err(|e| one_line(&e))?;
        return Ok(Some(Nic::Passt(passt)));
    }
    if let Some(card) = &section.macvtap {
        return macvtap::make(name, card, mac).map(Nic::Tap).map(Some).map_err(words);
    }
    if section.tap.is_none() && section.bridge.is_none() {
        return Ok(None);
    }
    let name = section.tap.as_deref().unwrap_or(name);
    if let Some(tap) = macvtap::find(name, mac).map_err(words)? {
        return Ok(Some(Nic::Tap(tap)));
    }
    let tap = Tap::open(name).map_err(words)?;
    if let Some(bridge) = &section.bridge {
        tap.attach_to_bridge(bridge).map_err(words)?;
    }
    tap.bring_up().map_err(words)?;
    Ok(Some(Nic::Tap(tap)))
}

fn start_reader(
    nic: &Nic,
    index: usize,
    shared: &Arc<Shared>,
    queue: &Arc<PacketQueue>,
    is_live: &Arc<AtomicBool>,
) -> Result<TapWaker, String> {
    let (mut reader, waker) = nic.reader()?;
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
                    crate::log::line(&format!("a network cannot be read any more: {e}"));
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
