//! What a client sends, read by a thread of its own, so that Ctrl-C reaches a machine that runs.
//!
//! # Place
//! The session takes from it on its thread. The queue is bounded: a client that sends faster than it is answered waits.
//!
//! # Invariants
//! - INV-GDB-4: the flag is set exactly while an interrupt, or the end of the connection, is in the queue: none that
//!   came after a request is lost, and none that came before it stops it.
//!
//! # Failure
//! A connection that breaks is one that ends.

use std::io::Read as _;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::wire::{Received, Unframer};

/// Most packets that wait.
const QUEUE: usize = 16;
const READ_BYTES: usize = 4096;

/// Interrupts on their way.
#[derive(Debug)]
struct Interrupts {
    sent: AtomicU64,
    flag: Arc<AtomicBool>,
}

/// The client's side of a connection.
#[derive(Debug)]
pub(crate) struct Inbox {
    queue: Receiver<Received>,
    interrupts: Arc<Interrupts>,
    handled: u64,
    stream: TcpStream,
}

impl Inbox {
    /// Reads `stream` from now on; sets `flag` while the client wants a stop.
    pub(crate) fn open(stream: TcpStream, flag: Arc<AtomicBool>) -> std::io::Result<Self> {
        let interrupts = Arc::new(Interrupts { sent: AtomicU64::new(0), flag });
        let (send, queue) = sync_channel(QUEUE);
        let (source, theirs) = (stream.try_clone()?, Arc::clone(&interrupts));
        std::thread::Builder::new()
            .name("gdb client".to_owned())
            .spawn(move || read_all(source, &send, &theirs))?;
        Ok(Self { queue, interrupts, handled: 0, stream })
    }

    /// Waits for what the client sends next; `None` at the end of the connection.
    pub(crate) fn next(&mut self) -> Option<Received> {
        let received = self.queue.recv().ok()?;
        if received == Received::Interrupt {
            self.handled += 1;
            self.interrupts.flag.store(false, Ordering::SeqCst);
            if self.interrupts.sent.load(Ordering::SeqCst) > self.handled {
                self.interrupts.flag.store(true, Ordering::SeqCst);
            }
        }
        Some(received)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // Ends the reader; a connection that is gone already needs no end.
        drop(self.stream.shutdown(Shutdown::Both));
    }
}

impl Interrupts {
    fn send(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        self.flag.store(true, Ordering::SeqCst);
    }
}

fn read_all(mut source: TcpStream, queue: &SyncSender<Received>, interrupts: &Interrupts) {
    let mut unframer = Unframer::new();
    let mut buffer = [0; READ_BYTES];
    while let Ok(len @ 1..) = source.read(&mut buffer) {
        for received in buffer[..len].iter().filter_map(|&byte| unframer.take(byte)) {
            if received == Received::Interrupt {
                interrupts.send();
            }
            if queue.send(received).is_err() {
                return;
            }
        }
    }
    interrupts.send();
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;

    use super::super::wire::frame;
    use super::*;

    #[test]
    fn the_flag_is_set_while_an_interrupt_waits() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let stream = listener.accept().unwrap().0;
        let mut inbox = Inbox::open(stream, Arc::clone(&flag)).unwrap();
        let is_set = || flag.load(Ordering::SeqCst);
        client.write_all(&[frame(b"vCont;c"), vec![3], frame(b"g")].concat()).unwrap();
        assert_eq!(inbox.next(), Some(Received::Packet(b"vCont;c".to_vec())));
        while !is_set() {
            std::thread::yield_now();
        }
        assert_eq!(inbox.next(), Some(Received::Interrupt));
        assert!(!is_set());
        assert_eq!(inbox.next(), Some(Received::Packet(b"g".to_vec())));
        assert!(!is_set());
        drop(client);
        assert_eq!(inbox.next(), None);
        assert!(is_set(), "a client that is gone wants nothing to run");
    }
}
