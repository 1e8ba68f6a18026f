//! PostgreSQL as a client sees it: its protocol, as far as one simple query after the other needs it, and its programs.
//!
//! # References
//! PostgreSQL 17 documentation, chapter 53, protocol 3.0: simple query, no encryption, no password.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::demo::lab::CLIENT;
use crate::demo::net;
use crate::demo::progress::Progress;

/// Where Debian keeps PostgreSQL's programs, a directory for each version.
const HOME: &str = "/usr/lib/postgresql";
/// Who asks, and the database.
pub(super) const USER: &str = "postgres";
/// Where servers listen.
pub(super) const PORT: u16 = 5432;
/// Longest message that is taken.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Longest boot up to the database, which is made then.
const READY_MAX: Duration = Duration::from_secs(300);
/// A connection that says nothing for this long counts as broken.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(120);

/// A row of an answer.
pub(super) type Row = Vec<Option<String>>;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    stream: BufReader<TcpStream>,
}

impl Session {
    /// Connects to the server at `address`; an answer that takes longer than `silence_max` is an error.
    pub(super) fn open(address: SocketAddr, silence_max: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(silence_max))?;
        let mut session = Self { stream: BufReader::new(stream) };
        let words = format!("user\0{USER}\0database\0{USER}\0\0");
        let mut start = length(words.len() + 8)?.to_vec();
        start.extend_from_slice(&[0, 3, 0, 0]);
        start.extend_from_slice(words.as_bytes());
        session.stream.get_mut().write_all(&start)?;
        session.rows()?;
        Ok(session)
    }

    /// Sends a statement, and takes its answer to the end.
    pub(super) fn query(&mut self, statement: &str) -> io::Result<Vec<Row>> {
        let mut message = vec![b'Q'];
        message.extend_from_slice(&length(statement.len() + 5)?);
        message.extend_from_slice(statement.as_bytes());
        message.push(0);
        self.stream.get_mut().write_all(&message)?;
        self.rows()
    }

    /// The one number that a statement answers.
    pub(super) fn number(&mut self, statement: &str) -> io::Result<i64> {
        let rows = self.query(statement)?;
        let cell = rows.first().and_then(|row| row.first()).and_then(Option::as_ref);
        let number = cell.and_then(|text| text.parse().ok());
        number.ok_or_else(|| io::Error::other(format!("{statement:?} answered {rows:?}")))
    }

    /// Everything up to the server's being ready for more.
    fn rows(&mut self) -> io::Result<Vec<Row>> {
        let (mut rows, mut error) = (Vec::new(), None);
        loop {
            // After an error in the beginning the server closes.
            let (kind, body) = match (self.message(), error.take()) {
                (Ok(message), before) => {
                    error = before;
                    message
                }
                (Err(_), Some(text)) => return Err(io::Error::other::<String>(text)),
                (Err(e), None) => return Err(e),
            };
            match kind {
                b'D' => rows.push(row(&body)?),
                b'E' => error = Some(message_text(&body)),
                b'R' if body != [0; 4] => return Err(io::Error::other("a password is wanted")),
                b'Z' => break,
                // Parameters, notices, descriptions, ends of statements.
                _ => {}
            }
        }
        error.map_or(Ok(rows), |text| Err(io::Error::other(text)))
    }

    fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let bytes = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if !(4..=MESSAGE_BYTES_MAX).contains(&bytes) {
            return Err(io::Error::other(format!("a message of {bytes} bytes")));
        }
        let mut body = vec![0; bytes - 4];
        self.stream.read_exact(&mut body)?;
        Ok((kind, body))
    }
}

fn length(bytes: usize) -> io::Result<[u8; 4]> {
    let bytes = i32::try_from(bytes).map_err(io::Error::other)?;
    Ok(bytes.to_be_bytes())
}

fn row(body: &[u8]) -> io::Result<Row> {
    let short = || io::Error::other("a row that is cut off");
    let (count, mut rest) = body.split_first_chunk::<2>().ok_or_else(short)?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (size, data) = rest.split_first_chunk::<4>().ok_or_else(short)?;
        rest = data;
        // -1 stands for a null.
        row.push(match usize::try_from(i32::from_be_bytes(*size)) {
            Err(_) => None,
            Ok(size) => {
                let (cell, more) = rest.split_at_checked(size).ok_or_else(short)?;
                rest = more;
                Some(String::from_utf8_lossy(cell).into_owned())
            }
        });
    }
    Ok(row)
}

/// The text for people in an error: fields of a letter and text each, `M` is the message.
fn message_text(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0);
    let text = fields.filter_map(|field| field.strip_prefix(b"M")).next();
    text.map_or("an error without words".to_owned(), |text| String::from_utf8_lossy(text).into())
}

/// Where the guest's server listens.
pub(super) fn server() -> SocketAddr {
    SocketAddr::from(([10, 77, 0, 10], PORT))
}

/// Waits until the guest's server answers.
pub(super) fn wait_ready(progress: &Progress) -> anyhow::Result<()> {
    wait_ready_at(server(), progress)
}

/// The same of any server.
pub(super) fn wait_ready_at(server: SocketAddr, progress: &Progress) -> anyhow::Result<()> {
    let step = Duration::from_millis(500);
    progress.wait_for("PostgreSQL in the machine", READY_MAX, step, |_| {
        let answer = net::inside(CLIENT, || {
            Session::open(server, Duration::from_secs(5))?.query("SELECT 1")
        })?;
        Ok(answer.is_ok().then_some(()))
    })
}

/// One of PostgreSQL's programs, of the newest version that is installed.
pub(super) fn program(name: &str) -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir(HOME).into_iter().flatten();
    let numbers = versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut numbers: Vec<u32> = numbers.collect();
    numbers.sort_unstable();
    let paths = numbers.iter().rev().map(|number| format!("{HOME}/{number}/bin/{name}"));
    let found = paths.map(PathBuf::from).find(|path| path.is_file());
    found.with_context(|| format!("there is no {name} below {HOME} (Debian package postgresql)"))
}

/// One of PostgreSQL's programs, as a client of the guest's server.
pub(super) fn client(name: &str) -> anyhow::Result<Command> {
    let path = program(name)?;
    let mut command = net::command_in(CLIENT, path.to_str().context("the path is not UTF-8")?);
    let address = server();
    command.arg("-h").arg(address.ip().to_string()).args(["-U", USER]);
    Ok(command)
}

/// Runs a command to its end; what it printed.
pub(super) fn finish(mut command: Command) -> anyhow::Result<String> {
    let what = format!("{command:?}");
    let output = command.output().with_context(|| format!("run {what}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} failed ({}): {}", output.status, words.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server whose answers to any queries are these numbers, one after the other.
    pub(in super::super) fn numbers(numbers: &[i64]) -> SocketAddr {
        let row = |number: &i64| {
            let text = number.to_string();
            let cell = [&[0, 1], &length(text.len()).unwrap()[..], text.as_bytes()].concat();
            [message(b'D', &cell), message(b'Z', b"I")].concat()
        };
        server([vec![ready()], numbers.iter().map(row).collect()].concat())
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind], &length(body.len() + 4).unwrap()[..], body].concat()
    }

    /// A server that answers the start and each query with the next of `answers`, then closes.
    fn server(answers: Vec<Vec<u8>>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for bytes in answers {
                if stream.read(&mut [0; 4096]).unwrap() == 0 {
                    return;
                }
                stream.write_all(&bytes).unwrap();
            }
        });
        address
    }

    fn ready() -> Vec<u8> {
        [message(b'R', &[0; 4]), message(b'S', b"a\0b\0"), message(b'Z', b"I")].concat()
    }

    fn ask(answer: Vec<u8>) -> io::Result<Vec<Row>> {
        Session::open(server(vec![ready(), answer]), SILENCE_MAX)?.query("SELECT")
    }

    #[test]
    fn rows_have_texts_and_nulls() {
        let data = b"\0\x02\0\0\0\x0242\xff\xff\xff\xff";
        let answer = [message(b'T', b"x"), message(b'D', data), message(b'Z', b"I")].concat();
        assert_eq!(ask(answer).unwrap(), [vec![Some("42".to_owned()), None]]);
    }

    #[test]
    fn servers_error_and_a_broken_answer_are_errors() {
        let error = message(b'E', b"SERROR\0Mno such table\0\0");
        let error = ask([error, message(b'Z', b"I")].concat()).unwrap_err();
        assert_eq!(error.to_string(), "no such table");
        assert!(ask(message(b'D', b"\0\x01\0\0\0\x09a")).is_err());
        assert!(ask(vec![b'Z', 0x7f, 0xff, 0xff, 0xff]).is_err());
        assert!(ask(vec![]).is_err());
        let wants_password = message(b'R', &[0, 0, 0, 3]);
        assert!(Session::open(server(vec![wants_password]), SILENCE_MAX).is_err());
    }
}
