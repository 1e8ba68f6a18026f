//! Debian's gdb-multiarch walks through recordings, forward and back, driven by scripts: what it shows is what the program
//! did, and the way does not matter.

mod debugger;
mod vmrun;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use debugger::{Program, Server, section, values};
use guest::GuestKind;
use tempfile::TempDir;
use vmrun::{Running, guest, run_command, understudy};

/// A program with two harts that does one thing of each kind.
const PROGRAM: &str = include_str!("gdb/program.s");
/// Where it maps RAM to.
const HIGH: u64 = 0xffff_ffc0_0000_0000 - 0x8000_0000;

/// The program, and a recording of it.
struct Recorded {
    work: TempDir,
    program: Program,
    dir: PathBuf,
}

impl Recorded {
    fn new() -> Self {
        let work = tempfile::tempdir().expect("room for temporary files");
        let program = Program::build(work.path(), PROGRAM);
        let dir = work.path().join("recording");
        let mut command = understudy();
        command.args(["run", "--memory", "32M", "--smp", "2", "--bios"]).arg(&program.elf);
        let ended = Running::start(command.arg("--record").arg(&dir)).wait();
        assert_eq!(ended.code, Some(0), "{}", ended.words);
        assert_eq!(ended.console, "hello from the past\n");
        Self { work, program, dir }
    }

    /// Runs GDB with `script` against a server of its own.
    fn gdb(&self, script: &str) -> String {
        self.gdb_with(&[], script)
    }

    fn gdb_with(&self, args: &[&str], script: &str) -> String {
        let server = Server::start(&self.dir, args);
        server.gdb(Some(&self.program.elf), &self.program.fill(script))
    }

    fn label(&self, name: &str) -> u64 {
        self.program.labels[name]
    }
}

/// Asserts what a script showed under `name`.
#[track_caller]
fn assert_shown(printed: &str, name: &str, expected: &[u64]) {
    assert_eq!(values(printed, name), expected, "{name} in:\n{printed}");
}

#[test]
fn forward_it_is_a_machine_like_any_other() {
    let recorded = Recorded::new();
    for engine in ["interpreter", "jit"] {
        let printed = recorded.gdb_with(
            &["--engine", engine],
            r#"
            break bump
            continue
            shown "bump" $pc
            backtrace
            stepi
            shown "stepped" $pc
            finish
            shown "returned" $s1
            delete
            hbreak *{at_floats_end}
            monitor goto start
            maintenance flush register-cache
            continue
            printf "product %.4f quotient %.4f half %.2f\n", $fa2.double, $fa3.double, $ft0.float
            shown "fflags" $fflags
            shown "fcsr" $fcsr
            shown "fs" ($mstatus >> 13) & 3
            shown "mscratch" $mscratch
            shown "mhartid" $mhartid
            shown "priv" $priv
            shown "sd" $mstatus >> 63
            delete
            break greet
            continue
            next
            step
            shown "lines" $t1
            "#,
        );
        assert_shown(&printed, "bump", &[recorded.label("bump")]);
        assert!(printed.contains("#0  bump ()") && printed.contains("in main ()"), "{printed}");
        assert_shown(&printed, "stepped", &[recorded.label("bump") + 2]);
        assert_shown(&printed, "returned", &[1]);
        assert!(printed.contains("product 3.3750 quotient 0.3333 half 0.50"), "{printed}");
        for (name, value) in [("fflags", 1), ("fcsr", 1), ("fs", 3), ("sd", 1), ("mhartid", 0)] {
            assert_shown(&printed, name, &[value]);
        }
        assert_shown(&printed, "mscratch", &[0x123_4567]);
        assert_shown(&printed, "priv", &[3]);
        assert_shown(&printed, "lines", &[0x1000_0000]);
    }
}

#[test]
fn back_it_is_the_same_machine_again() {
    let recorded = Recorded::new();
    let [there_file, back_file] = ["there", "back"].map(|name| recorded.work.path().join(name));
    let script = r#"
        break *{at_add_store}
        continue
        continue
        registers "there"
        dump binary memory THERE 0x80000000 0x80004000
        stepi
        stepi
        stepi
        registers "later"
        reverse-stepi
        reverse-stepi
        reverse-stepi
        registers "stepped back"
        continue
        continue
        reverse-continue
        reverse-continue
        registers "run back"
        dump binary memory BACK 0x80000000 0x80004000
        delete
        continue
        shown "end" $icount
        reverse-continue
        shown "start" $icount
        shown "start pc" $pc
        "#;
    let script = script.replace("THERE", &there_file.display().to_string());
    let printed = recorded.gdb(&script.replace("BACK", &back_file.display().to_string()));
    let there = section(&printed, "there");
    assert!(
        there.contains("icount") && there.contains("mstatus") && there.contains("fa2"),
        "{there}"
    );
    assert_ne!(there, section(&printed, "later"));
    assert_eq!(there, section(&printed, "stepped back"), "{printed}");
    assert_eq!(there, section(&printed, "run back"), "{printed}");
    let read = |name| fs::read(name).expect("GDB wrote it");
    assert_eq!(read(there_file), read(back_file));
    assert_eq!(printed.matches("No more reverse-execution history").count(), 2, "{printed}");
    assert_shown(&printed, "start", &[0]);
    assert_shown(&printed, "start pc", &[recorded.label("_start")]);
    assert!(values(&printed, "end")[0] > 100, "{printed}");
}

#[test]
fn functions_are_left_and_entered_backwards() {
    let recorded = Recorded::new();
    let printed = recorded.gdb(
        r#"
        break *{at_add_store}
        continue
        backtrace
        reverse-finish
        shown "call of add" $pc
        reverse-finish
        shown "call of bump" $pc
        shown "first round" $s1
        delete
        break *{at_look_end}
        continue
        reverse-step
        shown "load" $pc
        reverse-step
        shown "call of look" $pc
        reverse-next
        reverse-next
        reverse-next
        shown "fifth round" $s1
        reverse-next
        shown "call again" $pc
        shown "not yet added" *(long*)&total
        next
        shown "added" *(long*)&total
        "#,
    );
    let label = |name| recorded.label(name);
    assert!(printed.contains("#1  ") && printed.contains("#2  "), "{printed}");
    assert_shown(&printed, "call of add", &[label("bump") + 4]);
    assert_shown(&printed, "load", &[label("at_look_load")]);
    assert_shown(&printed, "not yet added", &[10]);
    assert_shown(&printed, "added", &[15]);
    for name in ["call of bump", "call of look", "call again"] {
        let at = values(&printed, name)[0];
        assert!((label("main")..label("floats")).contains(&at), "{name} {at:#x}: {printed}");
    }
    assert_shown(&printed, "first round", &[1]);
    assert_shown(&printed, "fifth round", &[5]);
}

#[test]
fn watchpoints_find_each_write_and_the_last_one_backwards() {
    let recorded = Recorded::new();
    let printed = recorded.gdb(
        r#"
        watch *(long*)&total
        continue
        continue
        continue
        continue
        continue
        shown "total" *(long*)&total
        delete
        continue
        shown "total at the end" *(long*)&total
        watch *(long*)&total
        reverse-continue
        shown "undone" *(long*)&total
        shown "writer" $pc
        reverse-continue
        shown "undone again" *(long*)&total
        delete
        rwatch *(long*)&secret
        continue
        shown "reader" $pc
        shown "read" $a0
        reverse-continue
        shown "before the read" $pc
        delete
        awatch *(long*)&go
        monitor goto start
        maintenance flush register-cache
        continue
        shown "go reader" $pc
        "#,
    );
    let label = |name| recorded.label(name);
    for (old, new) in [(0, 1), (1, 3), (3, 6), (6, 10), (10, 15)] {
        assert!(printed.contains(&format!("Old value = {old}\nNew value = {new}\n")), "{printed}");
    }
    assert!(printed.contains("Old value = 15\nNew value = 10\n"), "{printed}");
    assert_shown(&printed, "total", &[15]);
    assert_shown(&printed, "total at the end", &[15]);
    assert_shown(&printed, "undone", &[10]);
    assert_shown(&printed, "undone again", &[6]);
    assert_shown(&printed, "writer", &[label("at_add_store")]);
    assert_shown(&printed, "reader", &[label("at_look_end")]);
    assert_shown(&printed, "read", &[0x005e_c2e7]);
    assert_shown(&printed, "before the read", &[label("at_look_load")]);
    assert_eq!(values(&printed, "go reader").len(), 1, "{printed}");
}

#[test]
fn harts_are_threads() {
    let recorded = Recorded::new();
    let printed = recorded.gdb(
        r#"
        info threads
        break *{at_tick_store}
        continue
        thread
        shown "first tick" $t2
        shown "its hart" $mhartid
        continue
        continue
        shown "third tick" $t2
        thread 1
        shown "the other hart" $mhartid
        thread apply all printf "CHECK each = %#lx\n", $mhartid
        thread 2
        stepi
        shown "ticks" *(int*)&ticks
        reverse-stepi
        shown "ticks before" *(int*)&ticks
        delete
        watch *(int*)&ticks
        reverse-continue
        shown "ticks undone" *(int*)&ticks
        info threads
        set scheduler-locking on
        stepi
        set scheduler-locking off
        monitor harts
        "#,
    );
    assert!(printed.contains("hart 0, machine mode, running"), "{printed}");
    assert!(printed.contains("hart 1, machine mode, running"), "{printed}");
    assert!(printed.contains("Current thread is 2"), "{printed}");
    let expected = [
        ("first tick", 1),
        ("its hart", 1),
        ("third tick", 3),
        ("the other hart", 0),
        ("ticks", 3),
        ("ticks before", 2),
        ("ticks undone", 1),
    ];
    for (name, value) in expected {
        assert_shown(&printed, name, &[value]);
    }
    let mut each = values(&printed, "each");
    each.sort_unstable();
    assert_eq!(each, [0, 1], "{printed}");
}

#[test]
fn addresses_are_those_of_the_hart_or_physical() {
    let recorded = Recorded::new();
    let high = |name: &str| recorded.label(name) + HIGH;
    let printed = recorded.gdb(&format!(
        r#"
        break *{:#x}
        continue
        shown "pc" $pc
        shown "priv" $priv
        shown "sscratch" $sscratch
        shown "paging" $satp >> 60
        shown "word before" *(long*){word:#x}
        stepi
        shown "word after" *(long*){word:#x}
        x/i {:#x}
        try x/1xg {{kernel_word}}
        maint packet qqemu.PhyMemMode
        maint packet Qqemu.PhyMemMode:1
        maintenance flush register-cache
        shown "physical" *(long*){{kernel_word}}
        monitor phys
        monitor phys off
        maintenance flush register-cache
        watch *(long*){word:#x}
        reverse-continue
        shown "undone" *(long*){word:#x}
        delete
        monitor phys on
        try x/1xw 0x10000000
        try set var *(long*){{kernel_word}} = 1
        try set $a0 = 1
        monitor xp /1xg {{kernel_word}}
        monitor xp 0x10000000
        "#,
        high("at_supervisor_store"),
        high("at_supervisor_store"),
        word = high("kernel_word"),
    ));
    assert_shown(&printed, "pc", &[high("at_supervisor_store")]);
    let expected = [
        ("priv", 1),
        ("sscratch", 0xfeed),
        ("paging", 8),
        ("word before", 0),
        ("word after", 0xfeed),
        ("physical", 0xfeed),
        ("undone", 0),
    ];
    for (name, value) in expected {
        assert_shown(&printed, name, &[value]);
    }
    let word = recorded.label("kernel_word");
    let said = [
        "sd\tt0,0(t1)".to_owned(),
        format!("Cannot access memory at address {word:#x}"),
        "addresses are physical".to_owned(),
        "Cannot access memory at address 0x10000000".to_owned(),
        "a replay is the past".to_owned(),
        format!("{word:#018x}: 0x0000000000000000"),
        "0x10000000 is not RAM".to_owned(),
    ];
    for words in said {
        assert!(printed.contains(&words), "{words:?} in:\n{printed}");
    }
}

#[test]
fn monitor_commands_answer() {
    let recorded = Recorded::new();
    let work = recorded.work.path().to_owned();
    let printed = recorded.gdb_with(
        &["--at", "100"],
        &format!(
            r#"
            shown "at" $icount
            monitor
            monitor info replay
            monitor console
            monitor goto end
            maintenance flush register-cache
            shown "end" $icount
            printf "BEGIN console\n"
            monitor console
            printf "END console\n"
            monitor goto 10
            maintenance flush register-cache
            shown "ten" $icount
            printf "BEGIN early console\n"
            monitor console
            printf "END early console\n"
            monitor goto 1ms
            maintenance flush register-cache
            monitor goto 99999999999
            monitor goto yesterday
            monitor checkpoints
            monitor snapshot {0}
            monitor snapshot {0}
            monitor snapshot /nowhere/at/all
            monitor harts
            monitor make coffee
            "#,
            work.join("saved").display()
        ),
    );
    assert_shown(&printed, "at", &[100]);
    assert_shown(&printed, "ten", &[10]);
    assert_eq!(section(&printed, "console"), "hello from the past\n", "{printed}");
    assert_eq!(section(&printed, "early console"), "", "{printed}");
    assert!(work.join("saved").exists(), "{printed}");
    let said = [
        "goto WHERE",
        "step 100 of 0 to",
        "unknown command \"make coffee\"",
        "machine  ",
        "\"yesterday\" is no step",
        "the recording ends before that",
        "/nowhere/at/all",
        "saved is there already",
    ];
    for words in said {
        assert!(printed.contains(words), "{words:?} in:\n{printed}");
    }
}

/// Bytes that no GDB sends, made from `seed`.
fn nonsense(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    const PARTS: &[&str] = &[
        "m",
        "M",
        "X",
        "p",
        "P",
        "g",
        "G",
        "H",
        "vCont;",
        "vCont?",
        "Z0,",
        "Z2,",
        "z4,",
        "qXfer:features:read:",
        "target.xml:",
        "qRcmd,",
        "qThreadExtraInfo,",
        "qSupported:",
        "?",
        "c",
        "s",
        "bs",
        "bc",
        "D",
        "k",
        "T",
        "!",
        "vFile:open:",
        "qC",
        ":",
        ",",
        ";",
        "-1",
        "0",
        "1",
        "p1.1",
        "ffffffffffffffff",
        "80000000",
        "fffffffffffffffe",
        "676f746f20",
        "78702f",
        "Hg",
        "Hc",
        "r",
        "C05",
        "\u{1}",
        "}",
        "*",
        "xx",
        "QTDP:",
        "qTStatus",
        "vRun;",
        "1000000",
    ];
    let parts = (0..random() % 6).map(|_| PARTS[(random() % PARTS.len() as u64) as usize]);
    let mut body = parts.collect::<String>().into_bytes();
    if random() % 4 == 0 {
        body.extend((0..random() % 20).map(|_| random() as u8));
    }
    body
}

#[test]
fn no_client_brings_the_server_down() {
    let recorded = Recorded::new();
    let mut server = Server::start(&recorded.dir, &[]);
    for round in 0..60 {
        let mut client = server.connect();
        for n in 0..25 {
            let body = nonsense(round * 1000 + n);
            let is_open = if n % 10 == 9 { client.send_raw(&body) } else { client.send(&body) };
            if !is_open {
                break;
            }
        }
        if round % 3 == 0 {
            client.drain();
        }
    }
    let mut browser = server.connect();
    browser.send_raw(b"POST / HTTP/1.1\r\n\r\n+");
    browser.send(b"g");
    assert_eq!(browser.receive(), None, "nothing for those who speak otherwise");
    assert!(server.is_up());
    // The next one is served as if nothing had been.
    let script = "monitor goto start\nmaintenance flush register-cache\nbreak bump\ncontinue\nshown \"pc\" $pc";
    let printed = server.gdb(Some(&recorded.program.elf), script);
    assert_shown(&printed, "pc", &[recorded.label("bump")]);
    assert!(server.is_up());
}

#[test]
fn interrupts_stop_a_run_wherever_they_come() {
    let recorded = Recorded::new();
    let server = Server::start(&recorded.dir, &[]);
    let mut client = server.connect();
    assert!(client.ask("qSupported:swbreak+;hwbreak+").contains("ReverseStep+"));
    // Before the run has begun, or behind it: the run ends either way, and what follows is answered.
    for _ in 0..50 {
        assert!(client.send(b"vCont;c") && client.send_raw(&[3]));
        let stop = String::from_utf8(client.receive().expect("a stop")).expect("text");
        assert!(stop.starts_with("T02thread:") || stop.contains("replaylog:end"), "{stop}");
        assert!(client.ask("g").len() == 33 * 16);
        assert!(client.send(b"bc"));
        let stop = String::from_utf8(client.receive().expect("a stop")).expect("text");
        assert!(stop.contains("replaylog:begin"), "{stop}");
    }
}

#[test]
fn the_hart_that_steps_back_is_the_one_named_or_else_the_one_looked_at() {
    let recorded = Recorded::new();
    let server = Server::start(&recorded.dir, &["--at", "8200"]);
    let mut client = server.connect();
    // Both have made steps by now. Requests, and the hart whose step is undone.
    for (requests, thread) in [
        (&["Hg2", "Hc0"][..], "thread:02"),
        (&["Hg1", "Hc2"], "thread:02"),
        (&["Hg1", "Hc-1"], "thread:01"),
        (&["Hg2", "Hc1"], "thread:01"),
        (&["Hg1", "Hcp1.0"], "thread:01"),
    ] {
        for request in requests {
            assert_eq!(client.ask(request), "OK", "{request}");
        }
        let stop = client.ask("bs");
        assert!(stop.starts_with("T05") && stop.contains(thread), "{requests:?}: {stop}");
    }
    for refused in ["M80000000,1:00", "X80000000,0:", "P20=0000000000000000", "G00"] {
        assert!(client.ask(refused).starts_with("E.a replay is the past"), "{refused}");
    }
    assert_eq!(client.ask("mfffffffffffffffe,4"), "E16");
    assert_eq!(client.ask("p0").len(), 16);
}

#[test]
fn a_gdb_that_is_started_here_is_connected_and_shows_where_it_was_taken() {
    let recorded = Recorded::new();
    let mut command = understudy();
    command.arg("debug").arg(&recorded.dir).args(["--listen", "127.0.0.1:0", "--gdb", "--"]);
    command.args([
        "-nx",
        "-batch",
        "-ex",
        "p $icount",
        "-ex",
        "monitor goto 55",
        "-ex",
        "p $icount",
    ]);
    let output = command.arg(&recorded.program.elf).output().expect("the program under test runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{printed}");
    assert!(printed.contains("$1 = 0\n") && printed.contains("$2 = 55\n"), "{printed}");
}

/// A recording of a boot of Debian's kernel, and where it has a function.
fn record_boot(work: &Path) -> (PathBuf, u64) {
    let files = guest(GuestKind::Minimal);
    let dir = work.join("boot");
    let mut command = run_command(&files, 1, "");
    command.arg("--initrd").arg(&files.initrd).arg("--record").arg(&dir);
    let mut live = Running::start(&mut command);
    live.wait_for("understudy: shell ready");
    live.type_line(
        "grep ' T do_sys_openat2$' /proc/kallsyms || grep ' t do_sys_openat2$' /proc/kallsyms",
    );
    live.wait_for(" do_sys_openat2\r");
    live.type_line("cat /proc/version; exit");
    let ended = live.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
    let line = ended.console.lines().find(|line| {
        line.trim_end().ends_with("T do_sys_openat2")
            || line.trim_end().ends_with("t do_sys_openat2")
    });
    let address = line.and_then(|line| line.split_whitespace().next());
    let address = address.and_then(|text| u64::from_str_radix(text, 16).ok());
    (dir, address.unwrap_or_else(|| panic!("no address in {}", ended.console)))
}

#[test]
fn a_kernel_is_debugged_in_both_directions() {
    let work = tempfile::tempdir().expect("room for temporary files");
    let (dir, function) = record_boot(work.path());
    let server = Server::start(&dir, &[]);
    let script = format!(
        r#"
        set riscv use-compressed-breakpoints yes
        break *{function:#x}
        continue
        shown "pc" $pc
        shown "priv" $priv
        shown "caller" $ra
        shown "first" $icount
        x/4i $pc
        registers "first"
        continue
        continue
        shown "third" $icount
        reverse-continue
        reverse-continue
        shown "first again" $icount
        registers "first again"
        reverse-stepi
        stepi
        shown "pc again" $pc
        delete
        monitor goto end
        maintenance flush register-cache
        break *{function:#x}
        reverse-continue
        shown "last" $icount
        reverse-stepi
        shown "before last" $icount
        monitor info replay
        monitor console
        "#
    );
    let printed = server.gdb(None, &script);
    for name in ["pc", "pc again"] {
        assert_shown(&printed, name, &[function]);
    }
    assert_shown(&printed, "priv", &[1]);
    let number = |name| values(&printed, name)[0];
    assert!(number("caller") > 0xffff_ffff_8000_0000, "{printed}");
    assert_eq!(number("first"), number("first again"), "{printed}");
    assert!(number("first") < number("third") && number("third") < number("last"), "{printed}");
    assert_eq!(number("before last") + 1, number("last"), "{printed}");
    assert_eq!(section(&printed, "first"), section(&printed, "first again"));
    assert!(printed.contains("Linux version "), "{printed}");
}

#[test]
fn ctrl_c_in_gdb_stops_the_replay() {
    let work = tempfile::tempdir().expect("room for temporary files");
    let (dir, _) = record_boot(work.path());
    // The interpreter takes long enough to be interrupted.
    let server = Server::start(&dir, &["--engine", "interpreter"]);
    let script = "shown \"begun\" $icount\ncontinue\nshown \"stopped\" $icount\nreverse-stepi\nshown \"back\" $icount";
    let printed = server.gdb_with(None, script, |gdb, wait_for| {
        wait_for("CHECK begun");
        std::thread::sleep(Duration::from_millis(500));
        let pid = gdb.id().to_string();
        let sent = Command::new("kill").args(["-INT", &pid]).status().expect("kill runs");
        assert!(sent.success());
    });
    assert!(printed.contains("received signal SIGINT"), "{printed}");
    let number = |name| values(&printed, name)[0];
    assert!(number("stopped") > number("begun"), "{printed}");
    assert_eq!(number("back") + 1, number("stopped"), "{printed}");
}
