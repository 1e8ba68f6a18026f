//! Networks that a host has: passt, for VMs without any right.

mod vmrun;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use guest::GuestKind;
use vmrun::{Running, guest, run_command};

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(100);
/// What the guest serves: more than a frame has room for, several times over.
const LINES: usize = 40_000;

/// A port that nobody uses now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// Asks the web server at `port` until it answers.
fn fetch(port: u16) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut text = String::new();
        let asked = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"GET /lines HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut text)
        });
        if asked.is_ok() && text.contains("200 OK") {
            return text;
        }
        assert!(Instant::now() < deadline, "no answer: {asked:?} {text:.200}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn guest_behind_passt_gets_an_address_and_answers_at_a_port_of_the_host() {
    let files = guest(GuestKind::Minimal);
    let port = free_port();
    let mut command = run_command(&files, 1, "");
    command.arg("--initrd").arg(&files.initrd).args(["-p", &format!("127.0.0.1:{port}:80")]);
    let mut vm = Running::start(&mut command);
    vm.wait_for("understudy: shell ready");
    let set =
        "[ $1 = bound ] && ifconfig $interface $ip netmask $subnet && route add default gw $router";
    vm.type_line(&format!(
        "printf '#!/bin/sh\\n{set}\\nexit 0\\n' >/set; chmod +x /set; mkdir /web"
    ));
    vm.type_line(&format!("seq {LINES} >/web/lines; ip link set eth0 up"));
    vm.type_line(
        "busybox udhcpc -n -q -s /set -i eth0 && busybox httpd -h /web && echo serves $((40 + 2))",
    );
    vm.wait_for("serves 42");
    let answer = fetch(port);
    let body = answer.split_once("\r\n\r\n").expect("it has a body").1;
    assert!(body.lines().eq((1..=LINES).map(|n| n.to_string())), "{:.300}", answer);
    vm.type_line("exit");
    let ended = vm.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
    // passt ends with the VM, and the port is free again.
    let deadline = Instant::now() + LIMIT;
    while TcpListener::bind(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "passt goes on without its VM");
        std::thread::sleep(Duration::from_millis(50));
    }
}
