//! Disks on real servers: nbdkit and qemu-nbd.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::PATIENCE_DEFAULT;
use crate::disk::{DiskSource, Image, OpenMode, Place};
use crate::one_line::one_line;

/// A server of ours on a socket in a directory of its own; it ends with the test.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts nbdkit on the socket; `args` are its filters and its plugin.
    fn nbdkit(socket: &Path, args: &[&str]) -> Self {
        drop(fs::remove_file(socket));
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(socket).args(args);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: &Path) -> Self {
        let child = command.stderr(Stdio::null()).spawn().expect("cannot start the server");
        let end = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < end, "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, socket: socket.to_owned() }
    }

    fn url(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    fn open(&self, mode: OpenMode) -> Result<Image, String> {
        open(&self.url(), mode, PATIENCE_DEFAULT)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn open(url: &str, mode: OpenMode, patience: Duration) -> Result<Image, String> {
    let place = Place::Nbd { url: url.parse()?, patience };
    let source = DiskSource { place, format: None, has_backing: false };
    Image::open(&source, mode).map_err(|e| one_line(&e))
}

fn draws(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |n| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    }
}

/// Writes and zeroes at random, and compares with a model in memory.
fn work(image: &Image, turns: u64) -> Vec<u8> {
    let size = image.size();
    let mut model = image.read(0, size as usize).unwrap();
    let mut draw = draws(size + turns);
    for _ in 0..turns {
        let offset = draw(size / 512) * 512;
        let len = ((draw(300) + 1) * 512).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        if draw(3) == 0 {
            image.zero(offset, len).unwrap();
            model[range].fill(0);
        } else {
            let byte = draw(255) as u8 + 1;
            image.write(offset, &vec![byte; len as usize]).unwrap();
            model[range].fill(byte);
        }
        let offset = draw(size / 512) * 512;
        let len = ((draw(300) + 1) * 512).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        assert!(image.read(offset, len as usize).unwrap() == model[range]);
    }
    image.flush().unwrap();
    model
}

#[test]
fn servers_of_all_kinds_hold_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let kinds: [&[&str]; 5] = [
        &["memory", "16M"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "16M",
            "blocksize-minimum=4096",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
        &["--filter=nozero", "memory", "16M"],
        &["--no-sr", "memory", "16M"],
        &["--filter=noextents", "memory", "16M"],
    ];
    for args in kinds {
        let server = Server::nbdkit(&socket, args);
        let image = server.open(OpenMode::Shared).unwrap();
        assert_eq!((image.size(), image.is_device()), (16 << 20, true));
        assert!(image.raw_file().is_none());
        let model = work(&image, 60);
        drop(image);
        let image = server.open(OpenMode::ReadOnly).unwrap();
        assert!(image.read(0, 16 << 20).unwrap() == model, "{args:?}");
        assert!(image.write(0, &[0; 512]).unwrap_err().contains("read-only"));
    }
}

#[test]
fn qemu_serves_a_file_whose_holes_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("disk"));
    fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "4", "-f", "raw", "-x", "a b", "--discard=unmap", "-k"]);
    command.arg(&socket).arg(&file);
    let server = Server::start(command, &socket);
    let url = |name: &str| format!("nbd+unix:///{name}?socket={}", server.socket.display());
    let said = open(&url("b"), OpenMode::Shared, PATIENCE_DEFAULT).unwrap_err();
    assert!(said.contains("no export \"b\""), "{said}");
    let image = open(&url("a%20b"), OpenMode::Shared, PATIENCE_DEFAULT).unwrap();
    assert_eq!(image.next_data(0), None);
    image.write(3 << 20, &[7; 65536]).unwrap();
    assert_eq!((image.next_data(512), image.next_data(4 << 20)), (Some(3 << 20), None));
    let model = work(&image, 60);
    assert!(fs::read(&file).unwrap() == model);
    image.zero(0, 8 << 20).unwrap();
    assert_eq!(image.next_data(0), None);
}

#[test]
fn errors_of_a_server_are_errors_of_the_request() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let trigger = dir.path().join("broken");
    let file = format!("error-file={}", trigger.display());
    let server = Server::nbdkit(
        &socket,
        &[
            "--filter=error",
            "--filter=delay",
            "memory",
            "1M",
            "error=ENOSPC",
            &file,
            "error-rate=100%",
            "delay-read=5ms",
        ],
    );
    let image = server.open(OpenMode::Shared).unwrap();
    image.write(0, &[1; 4096]).unwrap();
    fs::write(&trigger, "").unwrap();
    for said in [
        image.write(0, &[2; 512]).unwrap_err(),
        image.read(0, 512).unwrap_err(),
        image.zero(0, 512).unwrap_err(),
    ] {
        assert!(said.contains("No space left"), "{said}");
    }
    fs::remove_file(&trigger).unwrap();
    image.flush().unwrap();
    assert_eq!(image.read(0, 512).unwrap(), [1; 512]);
    drop((image, server));

    let server = Server::nbdkit(&socket, &["-r", "memory", "1M"]);
    assert!(server.open(OpenMode::Shared).unwrap_err().contains("only be read"));
    server.open(OpenMode::ReadOnly).unwrap();
    drop(server);
    let server = Server::nbdkit(&socket, &["memory", "1000"]);
    assert!(server.open(OpenMode::ReadOnly).unwrap_err().contains("1000 bytes"));
    drop(server);
    let said = open(
        &format!("nbd+unix:///?socket={}", socket.display()),
        OpenMode::Shared,
        PATIENCE_DEFAULT,
    );
    assert!(said.unwrap_err().contains("connection failed"));
}

/// Several threads at once, while the server is replaced again and again, each time without what was not flushed.
#[test]
fn a_server_that_loses_its_memory_costs_nothing_that_was_flushed_or_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut server = Server::nbdkit(&socket, &["memory", "8M"]);
    let image = server.open(OpenMode::Shared).unwrap();
    let written = AtomicU64::new(0);
    let _server = std::thread::scope(|scope| {
        let (image, written) = (&image, &written);
        let work = move |i: u8| {
            for k in 0..200u64 {
                let at = u64::from(i) * (2 << 20) + k * 4096;
                image.write(at, &[i + 1; 4096]).unwrap();
                assert!(image.read(at, 4096).unwrap() == [i + 1; 4096]);
                written.fetch_add(1, Ordering::Relaxed);
            }
        };
        let threads = [0, 1, 2, 3].map(|i| scope.spawn(move || work(i)));
        let mut before = 0;
        while threads.iter().any(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(1));
            let now = written.load(Ordering::Relaxed);
            if now > before + 50 {
                before = now;
                drop(server);
                server = Server::nbdkit(&socket, &["memory", "8M"]);
            }
        }
        assert!(before > 100, "the server was hardly replaced");
        server
    });
    image.flush().unwrap();
    for i in 0..4u8 {
        let data = image.read(u64::from(i) * (2 << 20), 200 * 4096).unwrap();
        assert!(data.iter().all(|byte| *byte == i + 1));
    }
}

#[test]
fn a_server_that_is_gone_for_longer_than_the_patience_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let server = Server::nbdkit(&socket, &["memory", "1M"]);
    let image = open(&server.url(), OpenMode::Shared, Duration::from_millis(300)).unwrap();
    image.write(0, &[1; 512]).unwrap();
    drop(server);
    let said = image.write(0, &[2; 512]).unwrap_err();
    assert!(said.contains("was not there for 0.3 s"), "{said}");
    // One that comes back smaller is not the same.
    let server = Server::nbdkit(&socket, &["memory", "512K"]);
    let said = image.read(0, 512).unwrap_err();
    assert!(said.contains("has 524288 bytes now"), "{said}");
    drop(server);
    let server = Server::nbdkit(&socket, &["memory", "2M"]);
    assert_eq!(image.read(0, 512).unwrap(), [1; 512]);
    assert_eq!(image.refresh_size(), Ok(2 << 20));
    image.write((2 << 20) - 512, &[3; 512]).unwrap();
    drop(server);
    // One that does not answer.
    let server = Server::nbdkit(&socket, &["--filter=delay", "memory", "2M", "delay-read=3"]);
    let said = image.read(0, 512).unwrap_err();
    assert!(said.contains("does not answer"), "{said}");
    drop(server);
}

/// What a server says of a size is true for connections that begin after that.
#[test]
fn an_export_that_has_grown_is_used_up_to_its_new_end() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, path) = (dir.path().join("s"), dir.path().join("disk"));
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let server = Server::nbdkit(&socket, &["file", path.to_str().unwrap()]);
    let image = server.open(OpenMode::Shared).unwrap();
    image.write(0, &[1; 4096]).unwrap();
    let said = image.resize(2 << 20).unwrap_err();
    assert!(said.contains("which its server resizes; it has 1048576 bytes"), "{said}");
    assert_eq!(image.refresh_size(), Ok(1 << 20));
    file.set_len(2 << 20).unwrap();
    assert_eq!(image.refresh_size(), Ok(2 << 20));
    image.write((2 << 20) - 4096, &[2; 4096]).unwrap();
    image.zero(1 << 20, 4096).unwrap();
    image.flush().unwrap();
    let bytes = fs::read(&path).unwrap();
    assert!(bytes[..4096] == [1; 4096] && bytes[(2 << 20) - 4096..] == [2; 4096]);
    // One that is smaller is not the same.
    file.set_len(1 << 20).unwrap();
    let said = image.refresh_size().unwrap_err();
    assert!(said.contains("has 1048576 bytes now"), "{said}");
    assert_eq!(image.size(), 2 << 20);
}

/// A server that sends anything, and one that says nothing, cost an error.
#[test]
fn nonsense_costs_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("nbd://127.0.0.1:{}/x", listener.local_addr().unwrap().port());
    let talk = std::thread::spawn(move || {
        for answer in [&b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"[..], &[0xff; 100_000], b""] {
            let (mut stream, _) = listener.accept().unwrap();
            drop(std::io::Write::write_all(&mut stream, answer));
        }
        let (_stream, _) = listener.accept().unwrap();
        std::thread::sleep(Duration::from_millis(600));
    });
    let patience = Duration::from_millis(300);
    for why in ["greet", "greet", "connection failed", "connection failed"] {
        let said = open(&url, OpenMode::Shared, patience).unwrap_err();
        assert!(said.contains(why), "{said}");
    }
    talk.join().unwrap();
}
