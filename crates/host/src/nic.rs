//! What a network device of a VM is attached to on this host, whatever that is.
//!
//! # Place
//! Opened and read by the ports of a VM ([`crate::vm`]), written by its run loop.

use machine::offload::Offloads;

use crate::one_line::one_line;
use crate::passt::{Passt, PasstReader};
use crate::tap::{Tap, TapReader, TapWaker};

/// See the module documentation. Clones share it.
#[derive(Debug, Clone)]
pub(crate) enum Nic {
    Tap(Tap),
    Passt(Passt),
}

/// Waits for packets, on a thread of its own.
#[derive(Debug)]
pub(crate) enum NicReader {
    Tap(TapReader),
    Passt(PasstReader),
}

impl Nic {
    /// Sends a packet, or drops it where there is no room.
    pub(crate) fn write(&self, packet: &[u8]) -> Result<bool, String> {
        match self {
            Self::Tap(tap) => tap.write(packet).map_err(|e| one_line(&e)),
            Self::Passt(passt) => passt.write(packet).map_err(|e| one_line(&e)),
        }
    }

    /// Says what packets that come in may leave undone.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> Result<(), String> {
        match self {
            Self::Tap(tap) => tap.set_offloads(offloads).map_err(|e| one_line(&e)),
            // It leaves nothing.
            Self::Passt(_) => Ok(()),
        }
    }

    /// The guest is live here from now on.
    pub(crate) fn go_live(&self) -> Result<(), String> {
        match self {
            Self::Tap(tap) if tap.is_macvtap() => tap.bring_up().map_err(|e| one_line(&e)),
            Self::Tap(_) | Self::Passt(_) => Ok(()),
        }
    }

    pub(crate) fn reader(&self) -> Result<(NicReader, TapWaker), String> {
        match self {
            Self::Tap(tap) => {
                let (reader, waker) = tap.reader().map_err(|e| one_line(&e))?;
                Ok((NicReader::Tap(reader), waker))
            }
            Self::Passt(passt) => {
                let (reader, waker) = passt.reader().map_err(|e| one_line(&e))?;
                Ok((NicReader::Passt(reader), waker))
            }
        }
    }
}

impl NicReader {
    /// The next packet, or none once the reader was woken.
    pub(crate) fn next_packet(&mut self) -> Result<Option<&[u8]>, String> {
        match self {
            Self::Tap(tap) => tap.next_packet().map_err(|e| one_line(&e)),
            Self::Passt(passt) => passt.next_packet().map_err(|e| one_line(&e)),
        }
    }
}
