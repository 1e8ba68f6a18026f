//! This terminal as a VM's console.

use std::io::{Read as _, Write as _};
use std::sync::mpsc::{Receiver, channel};

use host::console::{ESCAPE_HELP, EscapeKeys, KeyAction, RawMode};

/// What the person at the keyboard wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Typed {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// Ctrl-a x.
    Stop,
    /// Ctrl-a d.
    Detach,
    /// Standard input ended.
    End,
}

/// The keyboard, in raw mode as long as this lives.
pub(crate) struct Keyboard {
    pub(crate) typed: Receiver<Typed>,
    _raw: Option<RawMode>,
}

impl Keyboard {
    /// Starts to read the keyboard on a thread of its own.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let raw = RawMode::enter(std::io::stdin())?;
        let (send, typed) = channel();
        std::thread::Builder::new().name("keyboard".to_owned()).spawn(move || {
            let mut keys = EscapeKeys::default();
            let mut buf = [0; 1024];
            while let Ok(len @ 1..) = std::io::stdin().lock().read(&mut buf) {
                let mut bytes = Vec::new();
                for &key in &buf[..len] {
                    let action = match keys.feed(key) {
                        KeyAction::Send(b) => {
                            bytes.push(b);
                            continue;
                        }
                        KeyAction::Nothing => continue,
                        KeyAction::Help => {
                            show(ESCAPE_HELP.as_bytes());
                            continue;
                        }
                        KeyAction::Stop => Typed::Stop,
                        KeyAction::Detach => Typed::Detach,
                    };
                    if send.send(Typed::Bytes(std::mem::take(&mut bytes))).is_err()
                        || send.send(action).is_err()
                    {
                        return;
                    }
                }
                if !bytes.is_empty() && send.send(Typed::Bytes(bytes)).is_err() {
                    return;
                }
            }
            drop(send.send(Typed::End));
        })?;
        Ok(Self { typed, _raw: raw })
    }
}

/// Shows output of the guest. A closed standard output is no reason to stop the VM.
pub(crate) fn show(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    drop(out.write_all(bytes).and_then(|()| out.flush()));
}
