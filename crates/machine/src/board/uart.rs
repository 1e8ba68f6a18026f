//! 16550A UART: the board's first console.
//!
//! Transmission takes no guest time: the holding register is empty again at once, and its interrupt pends again.
//!
//! # Invariants
//! - INV-UART-1: the receive FIFO holds at most 16 bytes (1 with FIFOs off), the input behind it at most
//!   [`INPUT_MAX`]; what exceeds that is dropped.
//! - INV-UART-2: bytes sent in loopback mode never leave the machine, and input waits until the mode is left.

use super::BusFault;
use super::state::{LoadBoardError, UartState};
use super::{BusCtx, OutputKind};

/// Bytes of the register region, as on QEMU.
pub(super) const UART_SIZE: u64 = 0x100;
/// Most bytes that wait for the guest to read them.
pub(super) const INPUT_MAX: usize = 64 << 10;

const FIFO_MAX: usize = 16;

const IER_RDI: u8 = 1;
const IER_THRI: u8 = 2;
const IER_RLSI: u8 = 4;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 2;
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA_READY: u8 = 1;
const LSR_OVERRUN: u8 = 2;
/// Holding register and transmitter are both empty, always.
const LSR_EMPTY: u8 = 0x60;
/// Carrier, data set ready and clear to send.
const MSR_IDLE: u8 = 0xb0;
const IIR_NONE: u8 = 1;
const IIR_THRI: u8 = 2;
const IIR_RDI: u8 = 4;
const IIR_RLSI: u8 = 6;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

#[derive(Debug)]
pub(super) struct Uart {
    state: UartState,
}

impl Uart {
    pub(super) fn new() -> Self {
        Self { state: UartState { divisor: 12, mcr: 8, ..UartState::default() } }
    }

    pub(super) fn save(&self) -> UartState {
        self.state.clone()
    }

    pub(super) fn load(state: &UartState) -> Result<Self, LoadBoardError> {
        let fifo_max = if state.fcr & FCR_ENABLE != 0 { FIFO_MAX } else { 1 };
        if state.fifo.len() > fifo_max || state.input.len() > INPUT_MAX {
            return Err(LoadBoardError::Device("uart"));
        }
        Ok(Self { state: state.clone() })
    }

    pub(super) fn irq(&self) -> bool {
        self.interrupt_id() != IIR_NONE
    }

    /// Takes bytes typed at the console; what does not fit is dropped.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        let room = INPUT_MAX - self.state.input.len();
        self.state.input.extend(&bytes[..bytes.len().min(room)]);
        self.refill();
    }

    fn fifo_max(&self) -> usize {
        if self.state.fcr & FCR_ENABLE != 0 { FIFO_MAX } else { 1 }
    }

    fn refill(&mut self) {
        while self.state.mcr & MCR_LOOP == 0 && self.state.fifo.len() < self.fifo_max() {
            let Some(byte) = self.state.input.pop_front() else { break };
            self.state.fifo.push_back(byte);
        }
    }

    fn interrupt_id(&self) -> u8 {
        let s = &self.state;
        if s.ier & IER_RLSI != 0 && s.overrun {
            IIR_RLSI
        } else if s.ier & IER_RDI != 0 && !s.fifo.is_empty() {
            let trigger =
                if s.fcr & FCR_ENABLE == 0 { 1 } else { [1, 4, 8, 14][usize::from(s.fcr >> 6)] };
            // Below the trigger level the timeout interrupt comes at once: guest time between bytes is not modelled.
            if s.fifo.len() >= trigger { IIR_RDI } else { IIR_TIMEOUT }
        } else if s.ier & IER_THRI != 0 && s.thr_pending {
            IIR_THRI
        } else {
            IIR_NONE
        }
    }

    /// Reads a register; any access size reads one byte, as on QEMU.
    pub(super) fn read(&mut self, offset: u64) -> Result<u64, BusFault> {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        Ok(u64::from(match offset {
            0 if dlab => self.state.divisor as u8,
            0 => {
                let byte = self.state.fifo.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            1 if dlab => (self.state.divisor >> 8) as u8,
            1 => self.state.ier,
            2 => {
                let id = self.interrupt_id();
                if id == IIR_THRI {
                    self.state.thr_pending = false;
                }
                id | if self.state.fcr & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 }
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => {
                let ready = if self.state.fifo.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut self.state.overrun) { LSR_OVERRUN } else { 0 };
                LSR_EMPTY | ready | overrun
            }
            6 => self.modem_status(),
            7 => self.state.scr,
            _ => 0,
        }))
    }

    fn modem_status(&self) -> u8 {
        let mcr = self.state.mcr;
        if mcr & MCR_LOOP == 0 {
            return MSR_IDLE;
        }
        // Loopback wires the modem outputs to the inputs: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
        (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 0x0c) << 4
    }

    /// Writes a register; any access size writes one byte, as on QEMU.
    pub(super) fn write(
        &mut self,
        offset: u64,
        value: u64,
        ctx: &mut BusCtx<'_>,
    ) -> Result<(), BusFault> {
        let value = value as u8;
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => self.state.divisor = self.state.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value, ctx),
            1 if dlab => {
                self.state.divisor = self.state.divisor & 0xff | u16::from(value) << 8;
            }
            1 => {
                let changed = self.state.ier ^ value;
                self.state.ier = value & 0x0f;
                if changed & IER_THRI != 0 {
                    self.state.thr_pending = value & IER_THRI != 0;
                }
            }
            2 => self.write_fcr(value),
            3 => self.state.lcr = value,
            4 => {
                self.state.mcr = value & 0x1f;
                self.refill();
            }
            7 => self.state.scr = value,
            _ => {}
        }
        Ok(())
    }

    fn transmit(&mut self, byte: u8, ctx: &mut BusCtx<'_>) {
        if self.state.mcr & MCR_LOOP == 0 {
            ctx.emit(OutputKind::Console { dev: 0, bytes: vec![byte] });
        } else if self.state.fifo.len() < self.fifo_max() {
            self.state.fifo.push_back(byte);
        } else {
            self.state.overrun = true;
        }
        self.state.thr_pending = true;
    }

    fn write_fcr(&mut self, value: u8) {
        if (self.state.fcr ^ value) & FCR_ENABLE != 0 || value & FCR_CLEAR_RX != 0 {
            self.state.fifo.clear();
        }
        self.state.fcr = value & 0xc9;
        self.refill();
    }
}
