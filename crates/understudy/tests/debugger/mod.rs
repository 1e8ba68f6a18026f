//! Runs `understudy debug` on a recording, and GDB against it, with a bound on every wait.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::vmrun::understudy;

/// Longest that one script of GDB may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(200);
const LOOK: Duration = Duration::from_millis(10);

fn tool(name: &str, package: &str, command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{name} (package {package}) runs: {e}"));
    assert!(
        output.status.success(),
        "{command:?}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A program for the bare machine, with its labels.
pub(crate) struct Program {
    /// For GDB: without the labels that are for the tests.
    pub(crate) elf: PathBuf,
    /// Each symbol's address.
    pub(crate) labels: BTreeMap<String, u64>,
}

impl Program {
    /// Assembles `source` in `work`, to stand where RAM begins.
    pub(crate) fn build(work: &Path, source: &str) -> Self {
        let [text, object, all, elf] =
            ["program.s", "program.o", "all.elf", "program.elf"].map(|name| work.join(name));
        fs::write(&text, source).expect("room for a program");
        let binutils = |name: &str, args: &[&str], last: &Path| {
            let mut command = Command::new(format!("riscv64-linux-gnu-{name}"));
            command.current_dir(work).args(args).arg(last);
            tool(name, "binutils-riscv64-linux-gnu", &mut command)
        };
        binutils("as", &["-g", "-o", "program.o"], &text);
        let link = ["-N", "--no-warn-rwx-segments", "-Ttext=0x80000000", "-o", "all.elf"];
        binutils("ld", &link, &object);
        let listing = String::from_utf8(binutils("nm", &[], &all).stdout).expect("nm prints text");
        let label = |line: &str| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((words.nth(1)?.to_owned(), address))
        };
        let labels = listing.lines().filter_map(label).collect();
        binutils("objcopy", &["-w", "--strip-symbol", "at_*", "all.elf"], Path::new("program.elf"));
        Self { elf, labels }
    }

    /// `text` with each `{label}` replaced by its address.
    pub(crate) fn fill(&self, text: &str) -> String {
        let mut filled = text.to_owned();
        for (name, address) in &self.labels {
            filled = filled.replace(&format!("{{{name}}}"), &format!("{address:#x}"));
        }
        filled
    }
}

/// `understudy debug`, ended when this is dropped.
pub(crate) struct Server {
    child: Child,
    /// Where it listens.
    pub(crate) address: String,
    // Kept, so that the server has somebody to talk to.
    _words: Receiver<String>,
}

impl Server {
    /// Serves the recording in `dir`.
    pub(crate) fn start(dir: &Path, args: &[&str]) -> Self {
        let mut command = understudy();
        command.arg("debug").arg(dir).args(["--listen", "127.0.0.1:0"]).args(args);
        let mut child =
            command.stderr(Stdio::piped()).spawn().expect("the program under test runs");
        let stderr = BufReader::new(child.stderr.take().expect("standard error is a pipe"));
        let (send, words) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|l| send.send(l))
        });
        let mut said = String::new();
        let address = loop {
            let line =
                words.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("no address in: {said}"));
            if let Some((_, rest)) = line.split_once("target remote ") {
                break rest.split('\'').next().expect("there is a first part").to_owned();
            }
            said.push_str(&line);
        };
        Self { child, address, _words: words }
    }

    /// Runs GDB with `script`, after it has connected; what it printed.
    pub(crate) fn gdb(&self, elf: Option<&Path>, script: &str) -> String {
        self.gdb_with(elf, script, |_, _| {})
    }

    /// Runs GDB with `script`; `meanwhile` gets its process, and what waits until it has printed something.
    pub(crate) fn gdb_with(
        &self,
        elf: Option<&Path>,
        script: &str,
        meanwhile: impl FnOnce(&Child, &dyn Fn(&str)),
    ) -> String {
        let work = tempfile::tempdir().expect("room for temporary files");
        let (file, printed) = (work.path().join("script"), work.path().join("printed"));
        let lines: String = script.lines().map(|line| expand(line.trim())).collect();
        let text = format!("{SETTINGS}target remote {}\n{lines}", self.address);
        fs::write(&file, text).expect("room for a script");
        let out = fs::File::create(&printed).expect("room for what is printed");
        let mut command = Command::new("gdb-multiarch");
        command.args(["-nx", "-batch", "-x"]).arg(&file).args(elf).stdin(Stdio::null());
        command.stderr(out.try_clone().expect("a file has more than one handle")).stdout(out);
        let mut gdb = command.spawn().expect("gdb-multiarch (package gdb-multiarch) runs");
        let deadline = Instant::now() + LIMIT;
        let read = || fs::read_to_string(&printed).expect("GDB prints text");
        let wait_for = |text: &str| {
            while !read().contains(text) {
                assert!(
                    Instant::now() < deadline,
                    "{text:?} did not come; GDB printed:\n{}",
                    read()
                );
                std::thread::sleep(LOOK);
            }
        };
        meanwhile(&gdb, &wait_for);
        while gdb.try_wait().expect("the child can be waited for").is_none() {
            if Instant::now() > deadline {
                drop(gdb.kill());
                panic!("GDB does not end; it printed:\n{}", read());
            }
            std::thread::sleep(LOOK);
        }
        read()
    }

    /// A connection without GDB.
    pub(crate) fn connect(&self) -> RawClient {
        RawClient::new(TcpStream::connect(&self.address).expect("the server takes connections"))
    }

    /// Whether it still runs.
    pub(crate) fn is_up(&mut self) -> bool {
        self.child.try_wait().expect("the child can be waited for").is_none()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What every script begins with.
const SETTINGS: &str = "\
set confirm off
set pagination off
set width 0
set debuginfod enabled off
set remotetimeout 60
";

/// A line of a script: `shown "NAME" EXPRESSION` `registers "NAME"` and `try COMMAND` are written out, the rest
/// is GDB's.
fn expand(line: &str) -> String {
    let part = |start: &str| line.strip_prefix(start)?.split_once('"');
    if let Some((name, value)) = part("shown \"") {
        return format!("printf \"CHECK {name} = %#lx\\n\", (unsigned long)({value})\n");
    }
    if let Some((name, _)) = part("registers \"") {
        return format!("echo BEGIN {name}\\n\ninfo all-registers\necho END {name}\\n\n");
    }
    if let Some(command) = line.strip_prefix("try ") {
        // A command that fails ends a script, but not this one.
        return format!(
            "python\ntry:\n  gdb.execute('{command}')\nexcept gdb.error as e:\n  print(e)\nend\n"
        );
    }
    format!("{line}\n")
}

/// The value that a script showed under `name` with `shown`, in order of the script.
pub(crate) fn values(printed: &str, name: &str) -> Vec<u64> {
    let prefix = format!("CHECK {name} = ");
    let value = |line: &str| {
        let text = line.strip_prefix(&prefix)?.trim_start_matches("0x");
        u64::from_str_radix(text, 16).ok()
    };
    printed.lines().filter_map(value).collect()
}

/// What stands between `BEGIN name` and `END name`.
pub(crate) fn section<'a>(printed: &'a str, name: &str) -> &'a str {
    let between = printed.split_once(&format!("BEGIN {name}\n"));
    let between = between.and_then(|(_, rest)| rest.split_once(&format!("END {name}\n")));
    between.unwrap_or_else(|| panic!("no section {name} in:\n{printed}")).0
}

/// Speaks the protocol by itself, or something like it.
pub(crate) struct RawClient {
    stream: TcpStream,
}

impl RawClient {
    fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(LIMIT)).expect("a time limit can be set");
        stream.set_nodelay(true).expect("a socket takes options");
        Self { stream }
    }

    /// Sends bytes as they are; whether there was somebody to take them.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Sends a packet.
    pub(crate) fn send(&mut self, body: &[u8]) -> bool {
        let sum = body.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        let packet = [b"$".as_slice(), body, format!("#{sum:02x}").as_bytes()].concat();
        self.send_raw(&packet)
    }

    /// The body of the next packet, with runs written out; `None` at the end of the connection.
    pub(crate) fn receive(&mut self) -> Option<Vec<u8>> {
        while self.byte()? != b'$' {}
        let mut body = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                b'*' => {
                    let times = self.byte()?.saturating_sub(29);
                    let last = *body.last()?;
                    body.extend(std::iter::repeat_n(last, times.into()));
                }
                byte => body.push(byte),
            }
        }
        self.byte()?;
        self.byte()?;
        Some(body)
    }

    /// Sends a packet and returns the answer.
    pub(crate) fn ask(&mut self, body: &str) -> String {
        assert!(self.send(body.as_bytes()), "the server takes {body}");
        let answer = self.receive().unwrap_or_else(|| panic!("no answer to {body}"));
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Reads what there is until the server has nothing more to say.
    pub(crate) fn drain(&mut self) {
        let limit = Some(Duration::from_millis(50));
        self.stream.set_read_timeout(limit).expect("a time limit can be set");
        while self.byte().is_some() {}
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).ok()?;
        Some(byte[0])
    }
}
