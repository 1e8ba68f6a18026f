//! Handshakes and frames between two ends of a socket, with damage, strangers and silence.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::dial::connect;
use super::*;
use crate::one_line::one_line;

mod bonded;

const LIMIT: Duration = Duration::from_secs(30);
/// Frames of much data.
const FRAMES: u32 = 2000;

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes()).unwrap()
}

fn good() -> Secret {
    secret("0123456789abcdef")
}

fn listener() -> Listener {
    Listener::bind("127.0.0.1:0", good(), "beta", false).unwrap()
}

fn pair() -> (Link, Link) {
    let listener = listener();
    let address = listener.address().to_string();
    let client = connect(&address, &good(), "alpha", "log", LIMIT).unwrap();
    let server = listener.next(LIMIT).unwrap().unwrap();
    (client, server)
}

fn frame(bytes: &[u8]) -> Received {
    Received::Frame(bytes.to_vec())
}

#[test]
fn frames_go_both_ways_and_the_ends_know_each_other() {
    let (mut a, mut b) = pair();
    assert_eq!((a.peer.as_str(), b.peer.as_str()), ("beta", "alpha"));
    assert_eq!((a.purpose.as_str(), b.purpose.as_str()), ("log", "log"));
    a.sender.send(b"one").unwrap();
    a.sender.send(b"").unwrap();
    b.sender.send(b"two").unwrap();
    assert_eq!(b.receiver.recv(Some(LIMIT)).unwrap(), frame(b"one"));
    assert_eq!(b.receiver.recv(Some(LIMIT)).unwrap(), frame(b""));
    assert_eq!(a.receiver.recv(None).unwrap(), frame(b"two"));
    assert_eq!(a.receiver.recv(Some(Duration::ZERO)).unwrap(), Received::TimedOut);
    assert!(a.sender.send(&vec![0; FRAME_BYTES_MAX + 1]).is_err());
}

#[test]
fn goodbye_and_sudden_end_are_told_apart() {
    let (a, mut b) = pair();
    drop(a);
    assert_eq!(b.receiver.recv(Some(LIMIT)).unwrap(), Received::Closed { is_clean: true });
    assert_eq!(b.receiver.recv(Some(LIMIT)).unwrap(), Received::Closed { is_clean: true });
    let (a, mut b) = pair();
    a.sender.abort();
    assert_eq!(b.receiver.recv(Some(LIMIT)).unwrap(), Received::Closed { is_clean: false });
    let deadline = Instant::now() + LIMIT;
    while b.sender.send(b"x").is_ok() {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn much_data_passes_a_slow_reader_unharmed() {
    let (mut a, mut b) = pair();
    let (all, has_all) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut sum = 0u64;
        let mut count = 0u32;
        loop {
            match b.receiver.recv(Some(LIMIT)).unwrap() {
                Received::Frame(f) => {
                    assert!(f.iter().all(|x| u32::from(*x) == count % 251));
                    sum += f.len() as u64;
                    count += 1;
                    if count == FRAMES {
                        all.send(()).unwrap();
                    }
                }
                other => return (sum, other),
            }
        }
    });
    let mut sent = 0;
    for i in 0..FRAMES {
        let payload = vec![(i % 251) as u8; (i as usize * 37) % 60_000];
        let deadline = Instant::now() + LIMIT;
        while let Err(e) = a.sender.send(&payload) {
            assert!(matches!(e, SendError::Full { .. }) && Instant::now() < deadline, "{e}");
        }
        sent += payload.len() as u64;
    }
    // A sender's goodbye does not wait long for a reader that is slow.
    has_all.recv_timeout(LIMIT).unwrap();
    drop(a.sender);
    assert_eq!(reader.join().unwrap(), (sent, Received::Closed { is_clean: true }));
}

#[test]
fn a_peer_that_reads_nothing_stops_the_sender_within_a_bound() {
    let (mut a, b) = pair();
    let payload = vec![1; 1 << 20];
    let error = (0..200).find_map(|_| a.sender.send(&payload).err()).unwrap();
    assert!(matches!(error, SendError::Full { waiting } if waiting > 16 << 20), "{error}");
    let started = Instant::now();
    drop(a);
    assert!(started.elapsed() < Duration::from_secs(10));
    drop(b);
}

#[test]
fn another_secret_is_refused_on_both_sides() {
    let listener = listener();
    let wrong = secret("0123456789abcdeX");
    let e = connect(&listener.address().to_string(), &wrong, "a", "log", LIMIT).unwrap_err();
    assert!(matches!(e, HandshakeError::WrongSecret), "{e}");
    let (_, e) = listener.next(LIMIT).unwrap().unwrap_err();
    assert!(one_line(&e).contains("secret files of the two hosts differ"));
}

#[test]
fn another_version_is_named_on_both_sides() {
    let listener = listener();
    let mut stream = TcpStream::connect(listener.address()).unwrap();
    stream.write_all(b"USTUDYCH\x09\x00").unwrap();
    stream.write_all(&[1; 300]).unwrap();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(&answer[..10], b"USTUDYCH\x02\x00");
    drop(stream);
    let (_, e) = listener.next(LIMIT).unwrap().unwrap_err();
    assert_eq!(
        e.to_string(),
        "channel version 9 at the peer, 2 here: run the same release on both hosts"
    );
}

/// Connects to a server that answers `answer` to the hello.
fn connect_to_stranger(answer: &'static [u8]) -> HandshakeError {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut hello = [0; 141];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(answer).unwrap();
        let _ = stream.read(&mut hello);
    });
    let e = connect(&address, &good(), "a", "log", LIMIT).unwrap_err();
    thread.join().unwrap();
    e
}

#[test]
fn the_connecting_side_knows_strangers_too() {
    let e = connect_to_stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    assert!(matches!(e, HandshakeError::NotUnderstudy { .. }), "{e}");
    let e = connect_to_stranger(b"USTUDYCH\x03\x00");
    assert!(matches!(e, HandshakeError::OtherVersion { ours: 2, theirs: 3 }), "{e}");
}

#[test]
fn strangers_who_dribble_or_say_nothing_are_timed_out_while_peers_get_in() {
    let listener = listener();
    let _silent = TcpStream::connect(listener.address()).unwrap();
    let mut dribbler = TcpStream::connect(listener.address()).unwrap();
    dribbler.write_all(b"U").unwrap();
    let address = listener.address().to_string();
    let _client = connect(&address, &good(), "a", "bulk", LIMIT).unwrap();
    assert_eq!(listener.next(LIMIT).unwrap().unwrap().purpose, "bulk");
    for _ in 0..2 {
        let (_, e) = listener.next(LIMIT).unwrap().unwrap_err();
        assert!(matches!(e, HandshakeError::TimedOut), "{e}");
    }
    dribbler.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(dribbler.read(&mut [0; 10]).unwrap_or(0), 0);
}

#[test]
fn garbage_is_refused() {
    let listener = listener();
    let mut stream = TcpStream::connect(listener.address()).unwrap();
    stream.write_all(&[0xff; 200]).unwrap();
    let (_, e) = listener.next(LIMIT).unwrap().unwrap_err();
    assert!(matches!(e, HandshakeError::NotUnderstudy { .. }), "{e}");
}

#[test]
fn changed_repeated_reordered_and_endless_frames_are_refused() {
    use super::compress::Packed;
    use super::frame::{Decoder, Encoder, Frame, Item};
    let packed = |text: &[u8]| Packed { bytes: text.to_vec(), length: None };
    let key = [7; 32];
    let mut encoder = Encoder::new(&key);
    let (mut one, mut two) = (vec![], vec![]);
    encoder.frame(&Item::Data(None, &packed(b"one")), &mut one);
    encoder.frame(&Item::Data(None, &packed(b"two")), &mut two);
    let decode = |bytes: &[u8]| {
        let mut decoder = Decoder::new(&key);
        decoder.push(bytes);
        decoder.next().and_then(|first| Ok((first, decoder.next()?)))
    };
    let both = [&one[..], &two[..]].concat();
    let (first, second) = decode(&both).unwrap();
    assert_eq!(first, Some(Frame::Data(None, b"one".to_vec())));
    assert_eq!(second, Some(Frame::Data(None, b"two".to_vec())));
    for bit in 0..one.len() * 8 {
        let mut bad = both.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // A changed length may make the frame longer than what is there; it is then never handed out.
        assert!(matches!(decode(&bad), Err(_) | Ok((None, _))), "bit {bit}");
    }
    assert!(decode(&[&one[..], &one[..]].concat()).is_err());
    assert!(decode(&two).is_err());
    assert!(matches!(decode(&[0xff; 5]), Err(FrameError::TooLong { .. })));
    for len in 0..one.len() {
        assert_eq!(decode(&one[..len]).unwrap(), (None, None));
    }
}

#[test]
fn bytes_put_into_a_link_by_somebody_else_are_refused() {
    let listener = listener();
    let address = listener.address();
    // A stranger in the middle that passes the handshake on and then speaks for itself.
    let middle = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let door = middle.local_addr().unwrap().to_string();
    let thread = std::thread::spawn(move || {
        let (mut client, _) = middle.accept().unwrap();
        let mut server = TcpStream::connect(address).unwrap();
        for (n, to_server) in [(141, true), (141, false), (32, true), (32, false)] {
            let mut buf = vec![0; n];
            let (from, to) =
                if to_server { (&mut client, &mut server) } else { (&mut server, &mut client) };
            from.read_exact(&mut buf).unwrap();
            to.write_all(&buf).unwrap();
        }
        server.write_all(&[1, 0, 0, 0, 0, b'x']).unwrap();
        server.write_all(&[0; 16]).unwrap();
        (client, server)
    });
    let _client = connect(&door, &good(), "a", "log", LIMIT).unwrap();
    let mut link = listener.next(LIMIT).unwrap().unwrap();
    let e = link.receiver.recv(Some(LIMIT)).unwrap_err();
    assert!(matches!(e, ReceiveError::Frame(FrameError::NotAuthentic { sequence: 0 })), "{e}");
    drop(thread.join().unwrap());
}

#[test]
fn compressed_frames_arrive_as_they_were_and_are_fewer_bytes() {
    let listener = Listener::bind("127.0.0.1:0", good(), "beta", true).unwrap();
    let dialer = Dialer { secret: good(), name: "alpha".into(), timeout: LIMIT, compresses: false };
    let routes = [Route::to(&listener.address().to_string())];
    let mut client = dialer.connect(&routes, "log").unwrap();
    let mut server = listener.next(LIMIT).unwrap().unwrap();
    let text = b"the same again; ".repeat(1000);
    // Each side compresses what it sends, or does not, as it was told.
    server.sender.send(&text).unwrap();
    client.sender.send(&text).unwrap();
    assert_eq!(client.receiver.recv(Some(LIMIT)).unwrap(), frame(&text));
    assert_eq!(server.receiver.recv(Some(LIMIT)).unwrap(), frame(&text));
    assert!(server.sender.wire_bytes() < 1000 && client.sender.wire_bytes() > 16_000);
}

#[test]
fn secrets_are_checked() {
    use std::os::unix::fs::PermissionsExt;
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("secret");
    let mode = |m| std::fs::set_permissions(&path, PermissionsExt::from_mode(m)).unwrap();
    std::fs::write(&path, "0123456789abcdef\n").unwrap();
    mode(0o644);
    let e = Secret::load(&path).unwrap_err().to_string();
    assert!(e.contains("0644") && e.contains("chmod 600"), "{e}");
    mode(0o600);
    assert!(!format!("{:?}", Secret::load(&path).unwrap()).contains('0'));
    std::fs::write(&path, "0123456789abcde\n").unwrap();
    assert!(matches!(Secret::load(&path), Err(SecretError::TooShort { len: 15 })));
    assert!(one_line(&Secret::load(&tmp.path().join("none")).unwrap_err()).contains("none"));
}
