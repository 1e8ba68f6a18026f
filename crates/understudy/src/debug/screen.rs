//! Packets that are answered before the protocol's crate sees them: what it does not know, and what is refused in words.
//!
//! # Invariants
//! - INV-GDB-5: no request for memory goes on whose range wraps around or whose answer would be longer than a packet.

use std::num::NonZeroUsize;

use gdbstub::common::Tid;

use super::target::Debuggee;
use super::wire::PACKET_MAX;

/// Why nothing can be written.
pub(crate) const REFUSAL: &str = "a replay is the past: nothing in it can be changed";

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Screened {
    /// The crate is to see it.
    On,
    /// This is the answer.
    Answer(String),
    /// This is the answer, and the person is to be told why.
    Refused(String),
}

/// Looks at a packet's body.
pub(crate) fn screen(target: &mut Debuggee, body: &[u8]) -> Screened {
    let answer = |text: &str| Screened::Answer(text.to_owned());
    match body {
        // As QEMU's: whether addresses are physical.
        b"qqemu.PhyMemMode" => answer(if target.is_physical { "1" } else { "0" }),
        b"Qqemu.PhyMemMode:0" | b"Qqemu.PhyMemMode:1" => {
            target.is_physical = body.ends_with(b"1");
            answer("OK")
        }
        [b'H', b'g', thread @ ..] => {
            if let Some(thread) = thread_id(thread) {
                target.hart = target.hart_of(thread);
            }
            Screened::On
        }
        [b'H', b'c', thread @ ..] => {
            let thread = thread_id(thread);
            target.moving = thread.map(|thread| target.hart_of(thread));
            // For any thread the crate would take the first one, and for all none.
            if thread.is_some() { Screened::On } else { answer("OK") }
        }
        [b'M' | b'X' | b'P' | b'G', ..] => Screened::Refused(format!("E.{REFUSAL}")),
        [b'm', range @ ..] if !is_sound(range) => answer("E16"),
        _ => Screened::On,
    }
}

/// The one thread that is meant, if it is one: `THREAD` or `pPROCESS.THREAD`, in hexadecimal digits.
fn thread_id(text: &[u8]) -> Option<Tid> {
    let text = str::from_utf8(text).ok()?;
    let digits = match text.strip_prefix('p') {
        Some(pair) => pair.split_once('.')?.1,
        None => text,
    };
    NonZeroUsize::new(usize::from_str_radix(digits, 16).ok()?)
}

fn is_sound(range: &[u8]) -> bool {
    let Some((at, len)) = str::from_utf8(range).ok().and_then(|text| text.split_once(',')) else {
        return false;
    };
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let (Some(at), Some(len)) = (hex(at), hex(len)) else { return false };
    len as usize <= PACKET_MAX / 2 && at.checked_add(len).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_one_that_is_named() {
        let named = |text: &str| thread_id(text.as_bytes()).map(NonZeroUsize::get);
        assert_eq!(["1", "p1.2", "pa.1f", "p-1.3"].map(named), [1, 2, 31, 3].map(Some));
        assert_eq!(["0", "-1", "p1.-1", "p1.0", "p1", "", "x"].map(named), [None; 7]);
    }

    #[test]
    fn ranges_that_wrap_or_are_too_long_are_not_sound() {
        for good in ["0,0", "80000000,40", "ffffffffffffffff,0", "0,8000"] {
            assert!(is_sound(good.as_bytes()), "{good}");
        }
        let bad = [
            "",
            "0",
            ",",
            "0,",
            "x,1",
            "ffffffffffffffff,2",
            "0,8001",
            "0,ffffffffffffffff",
            "0,1,2",
        ];
        for bad in bad {
            assert!(!is_sound(bad.as_bytes()), "{bad}");
        }
    }
}
