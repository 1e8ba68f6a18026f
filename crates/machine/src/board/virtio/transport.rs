//! The registers of a virtio-mmio slot (version 2) and its queues.

use crate::board::state::{LoadBoardError, QueueState, TransportState};
use crate::ram::GuestRam;

use super::queue::{self, Broken, Chain};

/// Offset of the generation of the device's configuration.
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
/// Offset of the device's configuration space.
pub(super) const CONFIG: u64 = 0x100;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// The vendor that QEMU's devices name.
const VENDOR: u32 = 0x554d_4551;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;
const INTERRUPT_QUEUE: u8 = 1;
const INTERRUPT_CONFIG: u8 = 2;

const F_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const F_EVENT_IDX: u64 = 1 << 29;
pub(super) const F_VERSION_1: u64 = 1 << 32;
const FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// What the device has to do about a write to a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    None,
    /// The driver reset the device.
    Reset,
    /// The driver is ready.
    Start,
    /// The driver made buffers of this queue available.
    Notify(usize),
}

#[derive(Debug)]
pub(super) struct Transport {
    device_id: u32,
    features: u64,
    queue_max: Vec<u16>,
    state: TransportState,
}

impl Transport {
    /// Registers of a device that offers `features` beside those of the transport.
    pub(super) fn new(device_id: u32, features: u64, queue_max: &[u16]) -> Self {
        let features = if device_id == 0 { 0 } else { features | FEATURES };
        let state = Self::power_on(queue_max.len());
        Self { device_id, features, queue_max: queue_max.to_vec(), state }
    }

    fn power_on(queues: usize) -> TransportState {
        TransportState { queues: vec![QueueState::default(); queues], ..TransportState::default() }
    }

    pub(super) fn reset(&mut self) {
        self.state = Self::power_on(self.queue_max.len());
    }

    pub(super) fn save(&self) -> TransportState {
        self.state.clone()
    }

    pub(super) fn load(&mut self, state: &TransportState) -> Result<(), LoadBoardError> {
        let good_queue = |(queue, &max): (&QueueState, &u16)| {
            let size_ok = queue.size <= max && queue.size.is_power_of_two();
            size_ok || (queue.size == 0 && !queue.ready)
        };
        let features_ok =
            state.status & STATUS_FEATURES_OK == 0 || self.is_acceptable(state.driver_features);
        if state.queues.len() != self.queue_max.len()
            || !state.queues.iter().zip(&self.queue_max).all(good_queue)
            || !features_ok
        {
            return Err(LoadBoardError::Device("virtio transport"));
        }
        self.state = state.clone();
        Ok(())
    }

    fn is_acceptable(&self, driver_features: u64) -> bool {
        driver_features & !self.features == 0 && driver_features & F_VERSION_1 != 0
    }

    pub(super) fn irq(&self) -> bool {
        self.state.interrupt != 0
    }

    pub(super) fn queues(&self) -> usize {
        self.queue_max.len()
    }

    pub(super) fn has_feature(&self, feature: u64) -> bool {
        self.state.driver_features & feature != 0
    }

    /// Whether the device may take requests.
    pub(super) fn is_live(&self) -> bool {
        let needed = STATUS_DRIVER_OK | STATUS_FEATURES_OK;
        self.state.status & (needed | STATUS_NEEDS_RESET) == needed
    }

    /// The driver broke the rules: the device stops until it is reset.
    fn fail(&mut self) {
        self.state.status |= STATUS_NEEDS_RESET;
        self.state.interrupt |= INTERRUPT_CONFIG;
    }

    /// The device's configuration has changed: a driver that is there is told.
    pub(super) fn config_changed(&mut self) {
        if self.is_live() {
            self.state.interrupt |= INTERRUPT_CONFIG;
        }
    }

    /// Most chains that one call may take from the queue.
    pub(super) fn chains_max(&self, queue: usize) -> usize {
        self.state.queues.get(queue).map_or(0, |q| q.size.into())
    }

    /// Takes the next chain of a queue, if there is one.
    pub(super) fn pop(&mut self, queue: usize, ram: &GuestRam) -> Option<Chain> {
        if !self.is_live() {
            return None;
        }
        let indirect = self.has_feature(F_INDIRECT_DESC);
        let q = self.state.queues.get_mut(queue).filter(|q| q.ready)?;
        match queue::pop(q, indirect, ram) {
            Ok(chain) => chain,
            Err(Broken) => {
                self.fail();
                None
            }
        }
    }

    /// A look at the chains that the next calls of [`Self::pop`] will take, which changes nothing; none when the queue is
    /// not in use.
    pub(super) fn peek<'a>(
        &'a self,
        queue: usize,
        ram: &'a GuestRam,
    ) -> Option<impl Iterator<Item = Result<Chain, Broken>> + 'a> {
        let mut q = self.state.queues.get(queue).filter(|q| q.ready && self.is_live())?.clone();
        let indirect = self.has_feature(F_INDIRECT_DESC);
        Some(std::iter::from_fn(move || queue::pop(&mut q, indirect, ram).transpose()))
    }

    /// Position in the available ring, to go back to with [`Self::rewind`].
    pub(super) fn position(&self, queue: usize) -> u16 {
        self.state.queues.get(queue).map_or(0, |q| q.next_avail)
    }

    /// Gives back the chains taken since [`Self::position`].
    pub(super) fn rewind(&mut self, queue: usize, position: u16) {
        if let Some(q) = self.state.queues.get_mut(queue) {
            q.next_avail = position;
        }
    }

    /// Hands a chain back to the driver, `len` bytes of it written.
    pub(super) fn push(&mut self, queue: usize, head: u16, len: u32, ram: &mut GuestRam) {
        if !self.is_live() {
            return;
        }
        let event_idx = self.has_feature(F_EVENT_IDX);
        let Some(q) = self.state.queues.get_mut(queue).filter(|q| q.ready) else { return };
        match queue::push(q, head, len, event_idx, ram) {
            Ok(true) => self.state.interrupt |= INTERRUPT_QUEUE,
            Ok(false) => {}
            Err(Broken) => self.fail(),
        }
    }

    /// Asks the driver to notify from the next chain on.
    pub(super) fn want_notify(&mut self, queue: usize, ram: &mut GuestRam) {
        if !self.is_live() || !self.has_feature(F_EVENT_IDX) {
            return;
        }
        let Some(q) = self.state.queues.get(queue).filter(|q| q.ready) else { return };
        if queue::set_avail_event(q, ram).is_err() {
            self.fail();
        }
    }

    fn selected(&self) -> Option<&QueueState> {
        self.state.queues.get(self.state.queue_sel as usize)
    }

    pub(super) fn read(&self, offset: u64, size: u8) -> u64 {
        if size != 4 {
            return 0;
        }
        let s = &self.state;
        u64::from(match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device_id,
            0x00c => VENDOR,
            0x010 => word(self.features, s.device_features_sel),
            0x034 => self.queue_max.get(s.queue_sel as usize).copied().unwrap_or(0).into(),
            0x044 => self.selected().is_some_and(|q| q.ready).into(),
            0x060 => s.interrupt.into(),
            0x070 => s.status.into(),
            // There are no shared memory regions: length and base read as all ones.
            0x0b0..=0x0bc if offset.is_multiple_of(4) => u32::MAX,
            // The generation of a configuration that never changes stays 0; the slot answers for those that do.
            _ => 0,
        })
    }

    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64) -> Action {
        if size != 4 || self.device_id == 0 {
            return Action::None;
        }
        let value = value as u32;
        let s = &mut self.state;
        match offset {
            0x014 => s.device_features_sel = value,
            0x020 if s.status & STATUS_FEATURES_OK == 0 => match s.driver_features_sel {
                0 => set_low(&mut s.driver_features, value),
                1 => set_high(&mut s.driver_features, value),
                _ => {}
            },
            0x024 => s.driver_features_sel = value,
            0x030 => s.queue_sel = value,
            0x050 => return Action::Notify(value as usize),
            0x064 => s.interrupt &= !(value as u8),
            0x070 => return self.write_status(value as u8),
            0x038 | 0x044 | 0x080..=0x0a4 => self.write_queue(offset, value),
            _ => {}
        }
        Action::None
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            self.reset();
            return Action::Reset;
        }
        let old = self.state.status;
        let mut new = value & !STATUS_NEEDS_RESET | old & STATUS_NEEDS_RESET;
        if old & STATUS_FEATURES_OK == 0 && !self.is_acceptable(self.state.driver_features) {
            new &= !STATUS_FEATURES_OK;
        }
        // A driver must not take bits back; accepted features stay accepted.
        new |= old & STATUS_FEATURES_OK;
        self.state.status = new;
        if old & STATUS_DRIVER_OK == 0 && self.is_live() { Action::Start } else { Action::None }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let index = self.state.queue_sel as usize;
        let (Some(q), Some(&max)) = (self.state.queues.get_mut(index), self.queue_max.get(index))
        else {
            return;
        };
        match offset {
            0x044 if value & 1 == 0 => *q = QueueState::default(),
            // An enabled queue stays as it is until the driver disables it.
            _ if q.ready => {}
            0x038 => {
                let size = u16::try_from(value).unwrap_or(0);
                q.size = if size <= max && size.is_power_of_two() { size } else { 0 };
            }
            0x044 => q.ready = q.size != 0 && queue::is_aligned(q),
            0x080 => set_low(&mut q.desc, value),
            0x084 => set_high(&mut q.desc, value),
            0x090 => set_low(&mut q.avail, value),
            0x094 => set_high(&mut q.avail, value),
            0x0a0 => set_low(&mut q.used, value),
            0x0a4 => set_high(&mut q.used, value),
            _ => {}
        }
    }
}

fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(to: &mut u64, value: u32) {
    *to = *to & !0xffff_ffff | u64::from(value);
}

fn set_high(to: &mut u64, value: u32) {
    *to = *to & 0xffff_ffff | u64::from(value) << 32;
}
