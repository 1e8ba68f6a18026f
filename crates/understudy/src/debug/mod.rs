//! A GDB server over a recording: the machine of the past, to be walked through in both directions.
//!
//! # Place
//! Called by the command line. One thread has the machine and serves one client after the other; each client has a
//! thread that reads what it sends. [`host::recording::Timeline`] does the walking, the crate `gdbstub` speaks the protocol.
//!
//! # Invariants
//! Those of [`registers`], [`wire`], [`target`], [`inbox`] and [`screen`] (INV-GDB).
//!
//! # Failure
//! Nothing that a client sends ends the server. The recording and the position outlive the client.
//!
//! # References
//! GDB manual: "Remote Protocol", "Running programs backward"; QEMU's `Qqemu.PhyMemMode`.

mod harts;
mod inbox;
mod memory;
mod monitor;
mod moves;
mod registers;
#[cfg(test)]
mod samples;
mod screen;
mod session;
mod target;
mod wire;
mod xp;

use std::io::ErrorKind;
use std::net::TcpListener;
use std::time::Duration;

use host::one_line::one_line;

pub(crate) use self::monitor::overview;
pub(crate) use self::target::Debuggee;
use crate::cli::say;

/// Before another try, when the system cannot take a connection now.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves one client after the other, for as long as there can be clients.
pub(crate) fn serve(listener: &TcpListener, debuggee: &mut Debuggee) -> std::io::Error {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(e) = session::serve(stream, debuggee, &say) {
                    say(&format!("gdb: {}", one_line(&e)));
                }
            }
            Err(e) if is_passing(e.kind()) => std::thread::sleep(PAUSE),
            Err(e) => return e,
        }
    }
}

/// Whether the next client may be taken all the same.
fn is_passing(error: ErrorKind) -> bool {
    matches!(
        error,
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted
    )
}
