//! The board: every device of QEMU's `virt` machine that exists here, and which address belongs to which.
//!
//! # Place
//! Owned by the machine, which hands each access of a hart and each input to it, at a defined icount and on the one
//! thread that owns the machine. Devices read and write guest RAM only within such a call.
//!
//! ```text
//! 0x0010_0000 test finisher   0x0200_0000 CLINT   0x1000_0000 UART, irq 10
//! 0x0010_1000 RTC, irq 11     0x0c00_0000 PLIC    0x1000_1000 + 0x1000 i  virtio-mmio slot i, irq 1 + i
//! ```
//! Slots hold the network devices first, then disks, consoles and entropy devices, in the order of the
//! configuration; a slot without a device reads DeviceID 0.
//!
//! # Invariants
//! - INV-BOARD-1: the lines that the PLIC sees are those of the devices after each call.
//! - INV-BOARD-2: `load(save())` gives a board that saves the same and behaves the same.
//! - INV-BOARD-3: an input that is refused leaves the state as it was.
//! - INV-BOARD-4: whatever the guest writes, each call ends within a bound that its queue sizes set.
//!
//! # Determinism
//! A function of the accesses and of the inputs, each at its icount; nothing else enters.

pub mod boot;
mod clint;
mod elf;
pub mod fdt;
mod finisher;
mod plic;
mod rtc;
pub mod state;
mod uart;
mod virtio;

#[cfg(test)]
mod tests;

use crate::config::{MachineConfig, VIRTIO_SLOTS};
use crate::io::{Input, Output, OutputKind};
use crate::offload::Offloads;
use crate::ram::GuestRam;

use clint::{CLINT_SIZE, Clint};
use finisher::FINISHER_SIZE;
use plic::{PLIC_SIZE, Plic};
use rtc::{RTC_SIZE, Rtc};
use uart::{UART_SIZE, Uart};
use virtio::Slot;

pub use state::{BoardSaved, LoadBoardError};

/// Address of the test finisher.
pub const FINISHER_BASE: u64 = 0x10_0000;
/// Address of the real-time clock.
pub const RTC_BASE: u64 = 0x10_1000;
/// Address of the core-local interruptor.
pub const CLINT_BASE: u64 = 0x200_0000;
/// Address of the platform-level interrupt controller.
pub const PLIC_BASE: u64 = 0xc00_0000;
/// Address of the UART.
pub const UART_BASE: u64 = 0x1000_0000;
/// Address of the first virtio-mmio slot.
pub const VIRTIO_BASE: u64 = 0x1000_1000;
/// Distance between two virtio-mmio slots, and the size of each.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Interrupt source of the UART.
pub const UART_IRQ: u32 = 10;
/// Interrupt source of the real-time clock.
pub const RTC_IRQ: u32 = 11;
/// Interrupt source of the first virtio-mmio slot; the others follow.
pub const VIRTIO_IRQ: u32 = 1;

const VIRTIO_END: u64 = VIRTIO_BASE + VIRTIO_STRIDE * VIRTIO_SLOTS as u64;

/// What a device gets beside the access itself.
#[derive(Debug)]
pub struct BusCtx<'a> {
    /// Guest memory.
    pub ram: &'a mut GuestRam,
    /// Icount that outputs carry.
    pub icount: u64,
    /// Guest time of the access in ticks of 100 ns.
    pub mtime: u64,
    /// Where outputs go.
    pub outputs: &'a mut Vec<Output>,
}

impl BusCtx<'_> {
    fn emit(&mut self, kind: OutputKind) {
        self.outputs.push(Output { icount: self.icount, kind });
    }
}

/// No device takes this access: the hart raises an access fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no device takes the access")]
pub struct BusFault;

/// Why an input cannot be applied; the state is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The machine has no such device.
    #[error("the machine has no {kind} device {dev}")]
    UnknownDevice {
        /// Kind of device.
        kind: &'static str,
        /// Its index.
        dev: u8,
    },
    /// The device has no such request outstanding.
    #[error("disk {dev} has no outstanding request {id}")]
    UnknownRequest {
        /// Index of the disk.
        dev: u8,
        /// Request id.
        id: u64,
    },
    /// A completion carries more or less data than its request asked for.
    #[error("request {id} of disk {dev} takes {expected} bytes of data, not {found}")]
    DataLength {
        /// Index of the disk.
        dev: u8,
        /// Request id.
        id: u64,
        /// Bytes that the request takes.
        expected: u64,
        /// Bytes that the completion carries.
        found: u64,
    },
    /// A disk would not grow.
    #[error(
        "disk {dev} with {present} bytes cannot get {size}: it grows by multiples of 512 alone"
    )]
    DiskSize {
        /// Index of the disk.
        dev: u8,
        /// Size that the input names.
        size: u64,
        /// Size that the disk has.
        present: u64,
    },
    /// The input is one that the machine itself applies.
    #[error("the input is not for a device")]
    NotForBoard,
}

/// Whether a packet finds buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetRoom {
    /// The device will take it, or break the driver's queue for what is wrong with it.
    Ready,
    /// The driver has no buffers for it now.
    Full,
    /// Nobody listens.
    Down,
}

/// External interrupts and the software interrupt of one hart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqLines {
    /// Machine external interrupt.
    pub meip: bool,
    /// Supervisor external interrupt.
    pub seip: bool,
    /// Machine software interrupt.
    pub msip: bool,
}

/// What the guest asked the machine for through the test finisher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum BoardRequest {
    /// Power off.
    PowerOff {
        /// Exit code; 0 is a pass.
        code: u16,
    },
    /// Reset the machine.
    Reset,
}

enum Target {
    Finisher(u64),
    Rtc(u64),
    Clint(u64),
    Plic(u64),
    Uart(u64),
    Virtio(usize, u64),
}

fn decode(gpa: u64) -> Option<Target> {
    let within = |base: u64, size: u64| gpa.checked_sub(base).filter(|&offset| offset < size);
    if let Some(offset) = within(VIRTIO_BASE, VIRTIO_END - VIRTIO_BASE) {
        return Some(Target::Virtio((offset / VIRTIO_STRIDE) as usize, offset % VIRTIO_STRIDE));
    }
    within(PLIC_BASE, PLIC_SIZE)
        .map(Target::Plic)
        .or_else(|| within(CLINT_BASE, CLINT_SIZE).map(Target::Clint))
        .or_else(|| within(UART_BASE, UART_SIZE).map(Target::Uart))
        .or_else(|| within(FINISHER_BASE, FINISHER_SIZE).map(Target::Finisher))
        .or_else(|| within(RTC_BASE, RTC_SIZE).map(Target::Rtc))
}

/// All devices. See the module documentation.
#[derive(Debug)]
pub struct Board {
    plic: Plic,
    clint: Clint,
    uart: Uart,
    rtc: Rtc,
    slots: Vec<Slot>,
    request: Option<BoardRequest>,
    harts: u8,
    rtc_base_ns: u64,
}

impl Board {
    /// A board in power-on state. Devices that exceed the slots, which [`MachineConfig::check`] refuses, are left out.
    #[must_use]
    pub fn new(config: &MachineConfig) -> Self {
        Self {
            plic: Plic::new(config.harts),
            clint: Clint::new(config.harts),
            uart: Uart::new(),
            rtc: Rtc::new(config.rtc_base_ns),
            slots: virtio::slots(config),
            request: None,
            harts: config.harts,
            rtc_base_ns: config.rtc_base_ns,
        }
    }

    /// Whether some device decodes the address.
    #[must_use]
    pub fn contains(gpa: u64) -> bool {
        decode(gpa).is_some()
    }

    /// Reads `size` (1, 2, 4 or 8) bytes of a device's registers.
    ///
    /// # Errors
    /// [`BusFault`] when no device is there or it takes no access of that size.
    pub fn read(&mut self, gpa: u64, size: u8, ctx: &mut BusCtx<'_>) -> Result<u64, BusFault> {
        let value = match decode(gpa).ok_or(BusFault)? {
            Target::Finisher(_) => finisher::read(size),
            Target::Rtc(offset) => self.rtc.read(offset, size, ctx.mtime),
            Target::Clint(offset) => self.clint.read(offset, size, ctx.mtime),
            Target::Plic(offset) => self.plic.read(offset, size),
            Target::Uart(offset) => self.uart.read(offset),
            Target::Virtio(slot, offset) => Ok(self.slots[slot].read(offset, size)),
        }?;
        self.update_lines();
        Ok(value)
    }

    /// Writes the low `size` (1, 2, 4 or 8) bytes of `value` to a device's registers.
    ///
    /// # Errors
    /// [`BusFault`] when no device is there or it takes no access of that size.
    pub fn write(
        &mut self,
        gpa: u64,
        size: u8,
        value: u64,
        ctx: &mut BusCtx<'_>,
    ) -> Result<(), BusFault> {
        match decode(gpa).ok_or(BusFault)? {
            Target::Finisher(offset) => {
                if let Some(request) = finisher::write(offset, size, value)? {
                    self.request.get_or_insert(request);
                }
            }
            Target::Rtc(offset) => self.rtc.write(offset, size, value, ctx.mtime)?,
            Target::Clint(offset) => self.clint.write(offset, size, value)?,
            Target::Plic(offset) => self.plic.write(offset, size, value)?,
            Target::Uart(offset) => self.uart.write(offset, value, ctx)?,
            Target::Virtio(slot, offset) => self.slots[slot].write(offset, size, value, ctx),
        }
        self.update_lines();
        Ok(())
    }

    fn update_lines(&mut self) {
        let mut word = 0;
        for (index, slot) in self.slots.iter().enumerate() {
            word |= u32::from(slot.irq()) << (VIRTIO_IRQ + index as u32);
        }
        word |= u32::from(self.uart.irq()) << UART_IRQ | u32::from(self.rtc.irq()) << RTC_IRQ;
        self.plic.set_levels([word, 0, 0]);
    }

    /// Interrupt lines of a hart; all low for a hart that does not exist.
    #[must_use]
    pub fn irq_lines(&self, hart: u8) -> IrqLines {
        let hart = usize::from(hart);
        IrqLines {
            meip: self.plic.eip(hart * 2),
            seip: self.plic.eip(hart * 2 + 1),
            msip: self.clint.msip(hart),
        }
    }

    /// M-mode timer comparator of a hart.
    #[must_use]
    pub fn mtimecmp(&self, hart: u8) -> u64 {
        self.clint.mtimecmp(hart.into())
    }

    /// The `mtime` from which on [`Self::poll`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.rtc.deadline()
    }

    /// Does what is due at `ctx.mtime`.
    pub fn poll(&mut self, ctx: &mut BusCtx<'_>) {
        self.rtc.poll(ctx.mtime);
        self.update_lines();
    }

    /// Applies an input.
    ///
    /// # Errors
    /// [`ApplyError`] when it names a device or request that does not exist; the state is then as before.
    pub fn apply(&mut self, input: &Input, ctx: &mut BusCtx<'_>) -> Result<(), ApplyError> {
        match input {
            Input::Console { dev: 0, bytes } => self.uart.receive(bytes),
            Input::Console { dev, bytes } => {
                let unknown = ApplyError::UnknownDevice { kind: "console", dev: *dev };
                let index = dev.checked_sub(1).ok_or(unknown.clone())?;
                self.find(|slot| slot.is_console(index)).ok_or(unknown)?.console_input(bytes, ctx);
            }
            Input::NetRx { dev, packet } => self
                .find(|slot| slot.is_net(*dev))
                .ok_or(ApplyError::UnknownDevice { kind: "network", dev: *dev })?
                .net_input(packet, ctx),
            Input::BlkDone { dev, id, status, data } => self
                .find(|slot| slot.is_blk(*dev))
                .ok_or(ApplyError::UnknownDevice { kind: "block", dev: *dev })?
                .blk_done(*id, *status, data, ctx)?,
            Input::Entropy { dev, bytes } => self
                .find(|slot| slot.is_rng(*dev))
                .ok_or(ApplyError::UnknownDevice { kind: "entropy", dev: *dev })?
                .entropy(bytes, ctx),
            Input::DiskResized { dev, size } => self
                .find(|slot| slot.is_blk(*dev))
                .ok_or(ApplyError::UnknownDevice { kind: "block", dev: *dev })?
                .blk_resized(*size)?,
            Input::Clock { .. } | Input::PowerOff => return Err(ApplyError::NotForBoard),
        }
        self.update_lines();
        Ok(())
    }

    fn find(&mut self, is_it: impl Fn(&Slot) -> bool) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| is_it(slot))
    }

    /// Sizes of the disks in bytes as they are now, in order.
    #[must_use]
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.slots.iter().filter_map(Slot::blk_size).collect()
    }

    /// Whether a network device's driver has buffers for a packet of that many bytes.
    #[must_use]
    pub fn net_room(&self, dev: u8, bytes: usize, ram: &GuestRam) -> NetRoom {
        let slot = self.slots.iter().find(|slot| slot.is_net(dev));
        slot.map_or(NetRoom::Down, |slot| slot.net_room(bytes, ram))
    }

    /// What a network device's driver has said that packets for it may leave undone; nothing while it is not ready.
    #[must_use]
    pub fn net_offloads(&self, dev: u8) -> Offloads {
        let slot = self.slots.iter().find(|slot| slot.is_net(dev));
        slot.map_or_else(Offloads::default, Slot::net_offloads)
    }

    /// What the guest asked for since the last call; the first of several requests counts.
    pub fn take_request(&mut self) -> Option<BoardRequest> {
        self.request.take()
    }

    /// Every request that left the machine and whose answer has not been applied, in the order of the slots and of
    /// the requests: what a machine that goes live issues again.
    #[must_use]
    pub fn outstanding(&self) -> Vec<OutputKind> {
        self.slots.iter().flat_map(Slot::outstanding).collect()
    }

    /// Back to power-on state. Block requests that left the machine stay in [`Self::outstanding`] until they
    /// complete, without effect on the guest, and ids count on: a new request must not overtake an old write.
    pub fn reset(&mut self) {
        self.plic = Plic::new(self.harts);
        self.clint = Clint::new(self.harts);
        self.uart = Uart::new();
        self.rtc = Rtc::new(self.rtc_base_ns);
        self.request = None;
        for slot in &mut self.slots {
            slot.power_on();
        }
        self.update_lines();
    }

    /// The state to keep.
    #[must_use]
    pub fn save(&self) -> BoardSaved {
        BoardSaved {
            plic: self.plic.save(),
            clint: self.clint.save(),
            uart: self.uart.save(),
            rtc: self.rtc.save(),
            slots: self.slots.iter().map(Slot::save).collect(),
            request: self.request,
        }
    }

    /// A board of this configuration in a saved state.
    ///
    /// # Errors
    /// [`LoadBoardError`] when the state is not one that a board of this configuration can be in.
    pub fn load(config: &MachineConfig, saved: &BoardSaved) -> Result<Self, LoadBoardError> {
        let mut board = Self::new(config);
        if saved.slots.len() != board.slots.len() {
            return Err(LoadBoardError::Slots {
                expected: board.slots.len(),
                found: saved.slots.len(),
            });
        }
        board.plic = Plic::load(config.harts, &saved.plic)?;
        board.clint = Clint::load(config.harts, &saved.clint)?;
        board.uart = Uart::load(&saved.uart)?;
        board.rtc = Rtc::load(config.rtc_base_ns, &saved.rtc);
        for (slot, saved) in board.slots.iter_mut().zip(&saved.slots) {
            slot.load(saved)?;
        }
        board.request = saved.request;
        board.update_lines();
        Ok(board)
    }
}
