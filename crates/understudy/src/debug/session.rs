//! One client of the debugger, from its connection to its end.
//!
//! # Place
//! Called by [`super::serve`] on its thread. The protocol's crate has one state machine for a connection; this feeds it
//! packet by packet, and runs the target when it says so.
//!
//! # Failure
//! A client that breaks the protocol loses its connection, with a line that says why; the next one is served.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::{GdbStubStateMachine, GdbStubStateMachineInner, state};
use gdbstub::stub::{GdbStub, GdbStubError, MultiThreadStopReason};

use super::inbox::Inbox;
use super::screen::{REFUSAL, Screened, screen};
use super::target::Debuggee;
use super::wire::{PACKET_MAX, Received, console, frame};

/// Why a session ended before its client ended it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The connection cannot be used.
    #[error("the connection to the client cannot be used")]
    Connection(#[from] std::io::Error),
    /// The client is no GDB.
    #[error("the client does not speak GDB's remote protocol")]
    Foreign,
    /// The client sent what the protocol does not know.
    #[error("the client broke the protocol: {0}")]
    Protocol(String),
}

type StubError = GdbStubError<std::convert::Infallible, std::io::Error>;

impl From<StubError> for SessionError {
    fn from(error: StubError) -> Self {
        let text = error.to_string();
        match error.into_connection_error() {
            Some((source, _)) => Self::Connection(source),
            // What follows the first sentence is for the crate's users.
            None => Self::Protocol(text.split(['.', '!']).next().unwrap_or_default().to_owned()),
        }
    }
}

/// While a command takes longer than that, the client hears that it is still being done: GDB waits two seconds.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// The way to the client: an answer is sent as a whole.
#[derive(Debug)]
struct Outbox {
    // Held while a packet is sent, by the session or by the thread that gives a sign of life.
    stream: Arc<Mutex<TcpStream>>,
    waiting: Vec<u8>,
}

impl Connection for Outbox {
    type Error = std::io::Error;

    fn write(&mut self, byte: u8) -> Result<(), Self::Error> {
        self.waiting.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), Self::Error> {
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Self::Error> {
        send(&self.stream, &std::mem::take(&mut self.waiting))
    }
}

fn send(stream: &Mutex<TcpStream>, packets: &[u8]) -> std::io::Result<()> {
    Write::write_all(&mut *stream.lock().unwrap_or_else(PoisonError::into_inner), packets)
}

type Stub<'a> = GdbStubStateMachine<'a, Debuggee, Outbox>;
type Idle<'a> = GdbStubStateMachineInner<'a, state::Idle<Debuggee>, Debuggee, Outbox>;

/// Serves a client until it goes. `tell` gets words for the person who started the server.
pub(crate) fn serve(
    stream: TcpStream,
    target: &mut Debuggee,
    tell: &dyn Fn(&str),
) -> Result<(), SessionError> {
    match converse(stream, target, tell) {
        // It went while it was being answered.
        Err(SessionError::Connection(e))
            if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) =>
        {
            Ok(())
        }
        ended => ended,
    }
}

fn converse(
    stream: TcpStream,
    target: &mut Debuggee,
    tell: &dyn Fn(&str),
) -> Result<(), SessionError> {
    stream.set_nodelay(true)?;
    target.forget_client();
    let inbox = Inbox::open(stream.try_clone()?, Arc::clone(&target.interrupt))?;
    let stream = Arc::new(Mutex::new(stream));
    let outbox = Outbox { stream: Arc::clone(&stream), waiting: Vec::new() };
    let mut session = Session { inbox, stream, target, acknowledges: true, tell };
    let stub = GdbStub::builder(outbox)
        .packet_buffer_size(PACKET_MAX)
        .build()
        .map_err(|e| SessionError::Protocol(e.to_string()))?;
    let mut stub = stub.run_state_machine(session.target)?;
    loop {
        stub = match stub {
            GdbStubStateMachine::Idle(idle) => match session.inbox.next() {
                None => return Ok(()),
                Some(received) => session.take(idle, received)?,
            },
            GdbStubStateMachine::Running(mut running) => {
                let stopped = session.target.go();
                if !stopped.words.is_empty() {
                    running.borrow_conn().write_all(&console(&stopped.words))?;
                }
                running.report_stop(session.target, stopped.reason)?
            }
            GdbStubStateMachine::CtrlCInterrupt(inner) => {
                inner.interrupt_handled(session.target, None::<MultiThreadStopReason<u64>>)?
            }
            GdbStubStateMachine::Disconnected(_) => return Ok(()),
        }
    }
}

struct Session<'t> {
    inbox: Inbox,
    stream: Arc<Mutex<TcpStream>>,
    target: &'t mut Debuggee,
    /// The client wants to hear that its packets arrived.
    acknowledges: bool,
    tell: &'t dyn Fn(&str),
}

impl Session<'_> {
    fn take<'a>(
        &mut self,
        mut idle: Idle<'a>,
        received: Received,
    ) -> Result<Stub<'a>, SessionError> {
        let body = match received {
            Received::Packet(body) => body,
            Received::Damaged => {
                let out = idle.borrow_conn();
                out.write(b'-')?;
                out.flush()?;
                return Ok(idle.into());
            }
            // The target stands already.
            Received::Interrupt => return Ok(idle.into()),
            // A browser, for instance, that a page has sent here: what follows is not to be obeyed.
            Received::Foreign => return Err(SessionError::Foreign),
        };
        let answer = match screen(self.target, &body) {
            Screened::On if body.starts_with(b"qRcmd,") && !self.acknowledges => {
                return self.pass_on_alive(idle, &body);
            }
            Screened::On => return self.pass_on(idle, &body),
            Screened::Answer(answer) => answer,
            Screened::Refused(answer) => {
                (self.tell)(REFUSAL);
                answer
            }
        };
        let out = idle.borrow_conn();
        if self.acknowledges {
            out.write(b'+')?;
        }
        out.write_all(&frame(answer.as_bytes()))?;
        out.flush()?;
        Ok(idle.into())
    }

    /// Passes on a request that may take long, and shows GDB meanwhile that there is no need to give up: with nothing, on
    /// its console.
    fn pass_on_alive<'a>(&mut self, idle: Idle<'a>, body: &[u8]) -> Result<Stub<'a>, SessionError> {
        let stream = Arc::clone(&self.stream);
        std::thread::scope(|scope| {
            let (done, is_done) = channel::<()>();
            scope.spawn(move || {
                while is_done.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
                    // A connection that is gone is found by whoever sends the answer.
                    drop(send(&stream, &console("")));
                }
            });
            let passed = self.pass_on(idle, body);
            drop(done);
            passed
        })
    }

    fn pass_on<'a>(&mut self, idle: Idle<'a>, body: &[u8]) -> Result<Stub<'a>, SessionError> {
        if body == b"QStartNoAckMode" {
            self.acknowledges = false;
        }
        let mut stub: Stub<'a> = idle.into();
        for byte in frame(body) {
            stub = match stub {
                GdbStubStateMachine::Idle(idle) => idle.incoming_data(self.target, byte)?,
                // Only the last byte of a packet leads elsewhere.
                other => return Ok(other),
            };
        }
        Ok(stub)
    }
}
