//! The supervisor binary interface that the machine itself provides when no firmware is given.
//!
//! # References
//! RISC-V Supervisor Binary Interface 2.0: Base, TIME, IPI, RFENCE, HSM, SRST, DBCN and the legacy console and timer.

use crate::hart::csr::envcfg;
use crate::hart::{Hart, HartState, Mode, irq, mstatus};
use crate::io::OutputKind;
use crate::ram::GuestRam;

const SUCCESS: i64 = 0;
const NOT_SUPPORTED: i64 = -2;
const INVALID_PARAM: i64 = -3;
const ALREADY_AVAILABLE: i64 = -6;

const BASE: u64 = 0x10;
const TIME: u64 = 0x5449_4d45;
const IPI: u64 = 0x73_5049;
const RFENCE: u64 = 0x5246_4e43;
const HSM: u64 = 0x48_534d;
const SRST: u64 = 0x5352_5354;
const DBCN: u64 = 0x4442_434e;

/// Most bytes that one DBCN write takes; the caller sees how many were written and calls again.
const DBCN_BYTES_MAX: u64 = 4096;

/// What a call asks of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SbiRequest {
    /// Nothing further.
    None,
    /// Send console bytes.
    Output(OutputKind),
    /// Power off with this code.
    PowerOff(u16),
    /// Reset.
    Reset,
}

fn console(bytes: Vec<u8>) -> SbiRequest {
    SbiRequest::Output(OutputKind::Console { dev: 0, bytes })
}

/// Puts a hart where the SBI says that a supervisor starts.
pub(crate) fn start_hart(hart: &mut Hart, pc: u64, opaque: u64) {
    hart.pc = pc & !1;
    hart.x[10] = u64::from(hart.id);
    hart.x[11] = opaque;
    hart.mode = Mode::Supervisor;
    hart.csr.satp = 0;
    hart.csr.mstatus &= !mstatus::SIE;
    hart.waiting = false;
    hart.state = HartState::Started;
}

/// Registers as firmware leaves them for a supervisor.
pub(crate) fn prepare_hart(hart: &mut Hart) {
    hart.csr.medeleg = 0xb1ff;
    hart.csr.mideleg = irq::S_ALL;
    hart.csr.mcounteren = 7;
    hart.csr.scounteren = 7;
    hart.csr.menvcfg = envcfg::WRITABLE & !envcfg::FIOM;
    hart.pmp = crate::hart::pmp::Pmp::allow_all();
    hart.mode = Mode::Supervisor;
    hart.state = HartState::Stopped;
}

/// Handles the call of hart `current`: arguments in a0 to a7, results to a0 and a1.
pub(crate) fn call(harts: &mut [Hart], current: usize, ram: &GuestRam) -> SbiRequest {
    let a: [u64; 8] = harts[current].x[10..18].try_into().expect("eight registers");
    let (extension, function) = (a[7], a[6]);
    if extension <= 8 {
        return legacy(harts, current, extension, &a);
    }
    let mut request = SbiRequest::None;
    let (error, value) = match extension {
        BASE => base(function, a[0]),
        TIME if function == 0 => {
            set_timer(&mut harts[current], a[0]);
            (SUCCESS, 0)
        }
        IPI if function == 0 => (send_ipi(harts, a[0], a[1]), 0),
        // Translations and decoded code are coherent with memory: there is nothing to fence.
        RFENCE if function <= 6 => (SUCCESS, 0),
        HSM => hart_management(harts, current, function, &a),
        SRST if function == 0 => match a[0] {
            0 => {
                request = SbiRequest::PowerOff(u16::from(a[1] == 1));
                (SUCCESS, 0)
            }
            1 | 2 => {
                request = SbiRequest::Reset;
                (SUCCESS, 0)
            }
            _ => (INVALID_PARAM, 0),
        },
        DBCN => {
            let (error, value, out) = debug_console(function, &a, ram);
            request = out;
            (error, value)
        }
        _ => (NOT_SUPPORTED, 0),
    };
    harts[current].x[10] = error as u64;
    harts[current].x[11] = value;
    request
}

fn base(function: u64, arg: u64) -> (i64, u64) {
    let probe = matches!(arg, 0..=3 | 8 | BASE | TIME | IPI | RFENCE | HSM | SRST | DBCN);
    match function {
        0 => (SUCCESS, 2 << 24),
        1 => (SUCCESS, 0x5544_5359), // "UDSY": no id is registered for us
        2 => (SUCCESS, 1),
        3 => (SUCCESS, u64::from(probe)),
        4..=6 => (SUCCESS, 0),
        _ => (NOT_SUPPORTED, 0),
    }
}

fn set_timer(hart: &mut Hart, at: u64) {
    hart.csr.stimecmp = at;
}

fn send_ipi(harts: &mut [Hart], mask: u64, base: u64) -> i64 {
    if base != u64::MAX {
        let high = mask.checked_ilog2().map_or(0, u64::from);
        if base.checked_add(high).is_none_or(|top| top >= harts.len() as u64) {
            return INVALID_PARAM;
        }
    }
    for hart in harts.iter_mut() {
        let id = u64::from(hart.id);
        if base == u64::MAX || (id >= base && id - base < 64 && mask >> (id - base) & 1 != 0) {
            hart.csr.mip_soft |= irq::SSIP;
        }
    }
    SUCCESS
}

fn hart_management(harts: &mut [Hart], current: usize, function: u64, a: &[u64; 8]) -> (i64, u64) {
    let target = usize::try_from(a[0]).ok().filter(|&t| t < harts.len());
    match (function, target) {
        (0, Some(t)) if harts[t].state == HartState::Started => (ALREADY_AVAILABLE, 0),
        (0, Some(t)) => {
            start_hart(&mut harts[t], a[1], a[2]);
            (SUCCESS, 0)
        }
        (1, _) => {
            harts[current].state = HartState::Stopped;
            (SUCCESS, 0)
        }
        (2, Some(t)) => (SUCCESS, u64::from(harts[t].state == HartState::Stopped)),
        (0 | 2, None) => (INVALID_PARAM, 0),
        (3, _) if a[0] == 0 => {
            harts[current].waiting = true; // default retentive suspend
            (SUCCESS, 0)
        }
        _ => (NOT_SUPPORTED, 0),
    }
}

fn debug_console(function: u64, a: &[u64; 8], ram: &GuestRam) -> (i64, u64, SbiRequest) {
    match function {
        0 => {
            let len = a[0].min(DBCN_BYTES_MAX);
            let mut bytes = vec![0; len as usize];
            if a[2] != 0 || ram.read(a[1], &mut bytes).is_err() {
                return (INVALID_PARAM, 0, SbiRequest::None);
            }
            (SUCCESS, len, console(bytes))
        }
        1 => (SUCCESS, 0, SbiRequest::None),
        2 => (SUCCESS, 0, console(vec![a[0] as u8])),
        _ => (NOT_SUPPORTED, 0, SbiRequest::None),
    }
}

fn legacy(harts: &mut [Hart], current: usize, extension: u64, a: &[u64; 8]) -> SbiRequest {
    let mut result = 0i64;
    let request = match extension {
        0 => {
            set_timer(&mut harts[current], a[0]);
            SbiRequest::None
        }
        1 => console(vec![a[0] as u8]),
        2 => {
            result = -1;
            SbiRequest::None
        }
        3 => {
            harts[current].csr.mip_soft &= !irq::SSIP;
            SbiRequest::None
        }
        8 => SbiRequest::PowerOff(0),
        // Legacy IPI and fences name harts by a mask in virtual memory: no kernel of this century uses them with the
        // extensions above present.
        _ => {
            result = NOT_SUPPORTED;
            SbiRequest::None
        }
    };
    harts[current].x[10] = result as u64;
    request
}
