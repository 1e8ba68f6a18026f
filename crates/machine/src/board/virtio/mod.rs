//! virtio-mmio slots: the transport and the devices behind it.
//!
//! # Place
//! The board hands a slot the accesses to its registers and the inputs for its device. The transport keeps status,
//! features and queues; the device takes requests from the queues within the access that notifies them.
//!
//! # Invariants
//! - INV-VIRTIO-1: a device takes requests only between DRIVER_OK and the next reset or broken queue.
//! - INV-VIRTIO-2: a queue that the driver broke sets NEEDS_RESET; nothing else comes of it.
//! - INV-VIRTIO-3: a chain has at most as many buffers as its queue has entries, each within RAM, and one notify takes
//!   at most as many chains as the queue has entries.
//!
//! # References
//! Virtual I/O Device (VIRTIO) Version 1.2, sections 2.6, 2.7, 3 and 4.2.

mod blk;
mod console;
mod net;
mod queue;
mod rng;
mod transport;

#[cfg(test)]
mod tests;

use crate::config::{MachineConfig, VIRTIO_SLOTS};
use crate::io::{BlkStatus, OutputKind};
use crate::offload::Offloads;
use crate::ram::GuestRam;

use super::state::{DeviceSaved, LoadBoardError, SlotSaved};
use super::{ApplyError, BusCtx, NetRoom};
use blk::Blk;
use console::Console;
use net::Net;
use rng::Rng;
use transport::{Action, Transport};

/// What is in a slot.
#[derive(Debug)]
enum Device {
    Empty,
    Net(Net),
    Blk(Blk),
    Console(Console),
    Rng(Rng),
}

/// A virtio-mmio slot.
#[derive(Debug)]
pub(super) struct Slot {
    transport: Transport,
    device: Device,
}

/// The slots of a machine: networks, disks, consoles, entropy devices, then empty ones.
pub(super) fn slots(config: &MachineConfig) -> Vec<Slot> {
    let nets = (0u8..).zip(&config.nets).map(|(i, net)| Device::Net(Net::new(i, net)));
    let disks = (0u8..).zip(&config.disks).map(|(i, disk)| Device::Blk(Blk::new(i, disk)));
    let consoles = (0..config.consoles).map(|i| Device::Console(Console::new(i)));
    let rngs = (0..config.rngs).map(|i| Device::Rng(Rng::new(i)));
    nets.chain(disks)
        .chain(consoles)
        .chain(rngs)
        .chain(std::iter::repeat_with(|| Device::Empty))
        .take(VIRTIO_SLOTS)
        .map(Slot::new)
        .collect()
}

impl Slot {
    fn new(device: Device) -> Self {
        let transport = match &device {
            Device::Empty => Transport::new(0, 0, &[]),
            Device::Net(_) => Transport::new(1, net::FEATURES, &[net::QUEUE_MAX; 2]),
            Device::Blk(blk) => Transport::new(2, blk.features(), &[blk::QUEUE_MAX]),
            Device::Console(_) => Transport::new(3, 0, &[console::QUEUE_MAX; 2]),
            Device::Rng(_) => Transport::new(4, 0, &[rng::QUEUE_MAX]),
        };
        Self { transport, device }
    }

    pub(super) fn irq(&self) -> bool {
        self.transport.irq()
    }

    pub(super) fn is_net(&self, index: u8) -> bool {
        matches!(&self.device, Device::Net(net) if net.index() == index)
    }

    pub(super) fn is_blk(&self, index: u8) -> bool {
        matches!(&self.device, Device::Blk(blk) if blk.index() == index)
    }

    pub(super) fn is_console(&self, index: u8) -> bool {
        matches!(&self.device, Device::Console(console) if console.index() == index)
    }

    pub(super) fn is_rng(&self, index: u8) -> bool {
        matches!(&self.device, Device::Rng(rng) if rng.index() == index)
    }

    pub(super) fn read(&self, offset: u64, size: u8) -> u64 {
        if let Some(at) = offset.checked_sub(transport::CONFIG) {
            return self.read_config(at as usize, size);
        }
        if let (transport::CONFIG_GENERATION, 4, Device::Blk(blk)) = (offset, size, &self.device) {
            return blk.generation().into();
        }
        self.transport.read(offset, size)
    }

    fn read_config(&self, at: usize, size: u8) -> u64 {
        let space = match &self.device {
            Device::Empty | Device::Rng(_) | Device::Console(_) => Vec::new(),
            Device::Net(net) => net.config_space(),
            Device::Blk(blk) => blk.config_space(),
        };
        let mut value = [0; 8];
        for (to, from) in value.iter_mut().take(size.into()).zip(space.iter().skip(at)) {
            *to = *from;
        }
        u64::from_le_bytes(value)
    }

    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64, ctx: &mut BusCtx<'_>) {
        match self.transport.write(offset, size, value) {
            Action::None => {}
            Action::Reset => self.reset_device(),
            Action::Notify(queue) => self.notify(queue, ctx),
            // Buffers may have been made available before: their notification came too early to be heeded.
            Action::Start => (0..self.transport.queues()).for_each(|queue| self.notify(queue, ctx)),
        }
    }

    fn notify(&mut self, queue: usize, ctx: &mut BusCtx<'_>) {
        let transport = &mut self.transport;
        match (&mut self.device, queue) {
            (Device::Net(net), net::TX) => net.transmit(transport, ctx),
            (Device::Blk(blk), blk::REQUESTS) => blk.run(transport, ctx),
            (Device::Console(console), console::RX) => console.fill(transport, ctx),
            (Device::Console(console), console::TX) => console.transmit(transport, ctx),
            (Device::Rng(rng), rng::REQUESTS) => rng.run(transport, ctx),
            // The network's receive queue is looked at when a frame comes.
            (
                Device::Empty
                | Device::Net(_)
                | Device::Blk(_)
                | Device::Console(_)
                | Device::Rng(_),
                _,
            ) => {}
        }
    }

    fn reset_device(&mut self) {
        match &mut self.device {
            Device::Empty | Device::Net(_) => {}
            Device::Blk(blk) => blk.reset(),
            Device::Console(console) => console.reset(),
            Device::Rng(rng) => rng.reset(),
        }
    }

    /// Back to power-on state, but for block requests that are on their way and the ids given.
    pub(super) fn power_on(&mut self) {
        self.transport.reset();
        self.reset_device();
        if let Device::Net(net) = &mut self.device {
            net.power_on();
        }
    }

    pub(super) fn net_room(&self, bytes: usize, ram: &GuestRam) -> NetRoom {
        net::room(bytes, &self.transport, ram)
    }

    pub(super) fn net_offloads(&self) -> Offloads {
        net::receive_offloads(&self.transport)
    }

    pub(super) fn net_input(&mut self, packet: &[u8], ctx: &mut BusCtx<'_>) {
        if let Device::Net(net) = &mut self.device {
            net.receive(packet, &mut self.transport, ctx);
        }
    }

    pub(super) fn blk_done(
        &mut self,
        id: u64,
        status: BlkStatus,
        data: &[u8],
        ctx: &mut BusCtx<'_>,
    ) -> Result<(), ApplyError> {
        match &mut self.device {
            Device::Blk(blk) => blk.done(id, status, data, &mut self.transport, ctx),
            Device::Empty | Device::Net(_) | Device::Console(_) | Device::Rng(_) => Ok(()),
        }
    }

    /// A disk has grown.
    pub(super) fn blk_resized(&mut self, size: u64) -> Result<(), ApplyError> {
        match &mut self.device {
            Device::Blk(blk) => blk.grow(size, &mut self.transport),
            Device::Empty | Device::Net(_) | Device::Console(_) | Device::Rng(_) => Ok(()),
        }
    }

    /// Size in bytes of the disk that is here.
    pub(super) fn blk_size(&self) -> Option<u64> {
        match &self.device {
            Device::Blk(blk) => Some(blk.size()),
            Device::Empty | Device::Net(_) | Device::Console(_) | Device::Rng(_) => None,
        }
    }

    pub(super) fn console_input(&mut self, bytes: &[u8], ctx: &mut BusCtx<'_>) {
        if let Device::Console(console) = &mut self.device {
            console.receive(bytes, &mut self.transport, ctx);
        }
    }

    pub(super) fn entropy(&mut self, bytes: &[u8], ctx: &mut BusCtx<'_>) {
        if let Device::Rng(rng) = &mut self.device {
            rng.fill(bytes, &mut self.transport, ctx);
        }
    }

    pub(super) fn outstanding(&self) -> Vec<OutputKind> {
        match &self.device {
            Device::Empty | Device::Net(_) | Device::Console(_) => Vec::new(),
            Device::Blk(blk) => blk.outstanding(),
            Device::Rng(rng) => rng.outstanding().into_iter().collect(),
        }
    }

    pub(super) fn save(&self) -> SlotSaved {
        let device = match &self.device {
            Device::Empty => DeviceSaved::Empty,
            Device::Net(net) => DeviceSaved::Net(net.save()),
            Device::Blk(blk) => blk.save(),
            Device::Console(console) => DeviceSaved::Console(console.save()),
            Device::Rng(rng) => DeviceSaved::Rng(rng.save()),
        };
        SlotSaved { transport: self.transport.save(), device }
    }

    pub(super) fn load(&mut self, saved: &SlotSaved) -> Result<(), LoadBoardError> {
        self.transport.load(&saved.transport)?;
        match (&mut self.device, &saved.device) {
            (Device::Empty, DeviceSaved::Empty) => Ok(()),
            (Device::Net(net), DeviceSaved::Net(saved)) => {
                net.load(saved);
                Ok(())
            }
            (Device::Blk(blk), DeviceSaved::Blk(saved)) => blk.load(saved),
            (Device::Blk(blk), DeviceSaved::ResizedBlk(saved)) => blk.load_resized(saved),
            (Device::Console(console), DeviceSaved::Console(saved)) => console.load(saved),
            (Device::Rng(rng), DeviceSaved::Rng(saved)) => rng.load(saved),
            (
                Device::Empty
                | Device::Net(_)
                | Device::Blk(_)
                | Device::Console(_)
                | Device::Rng(_),
                _,
            ) => Err(LoadBoardError::Device("virtio slot")),
        }
    }
}
