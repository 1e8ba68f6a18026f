//! GDB's `monitor` commands: what the protocol has no request for.

use std::path::{Path, PathBuf};

use host::one_line::one_line;
use host::recording::{BadWhen, ReplayEnd, Stop, When, rfc3339};

use super::target::Debuggee;
use super::{harts, xp};

const HELP: &str = "\
goto WHERE       go to a step (12345), a time since the start (90s, 1m30s), a date (2026-01-31T12:00:00Z), start or end
info replay      where the replay is, and how it goes
checkpoints      states kept on the way, which the ways back start from
snapshot FILE    save the machine as it is here into a new file
harts            mode, state and position of each hart
console          what the guest wrote to its UART up to here
phys on|off      let GDB read physical instead of virtual memory
xp /FORMAT ADDR  show physical memory, for instance: xp /8xg 0x80200000
";

/// What GDB has to be told after its back was turned on the machine.
const STALE: &str = "GDB still has the registers of where it was: `maintenance flush register-cache` makes it read them \
                     anew";

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Command {
    Help,
    GoTo(When),
    InfoReplay,
    Checkpoints,
    Snapshot(PathBuf),
    Harts,
    Console,
    Physical(Option<bool>),
    Examine(xp::Examine),
}

fn parse(text: &str) -> Result<Command, String> {
    let text = text.trim();
    if let Some(rest) = text.strip_prefix("xp")
        && rest.starts_with(['/', ' '])
    {
        return xp::parse(rest).map(Command::Examine);
    }
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let command = match (word, rest.trim()) {
        ("help" | "", "") => Command::Help,
        ("goto", "start") => Command::GoTo(When::Icount(0)),
        ("goto", "end") => Command::GoTo(When::Icount(u64::MAX)),
        ("goto", "") => return Err("goto what? `monitor help` shows".to_owned()),
        ("goto", place) => Command::GoTo(moment(place)?),
        ("info", "replay") => Command::InfoReplay,
        ("checkpoints", "") => Command::Checkpoints,
        ("snapshot", "") => return Err("snapshot to what file?".to_owned()),
        ("snapshot", file) => Command::Snapshot(file.into()),
        ("harts", "") => Command::Harts,
        ("console", "") => Command::Console,
        ("phys", "") => Command::Physical(None),
        ("phys", "on") => Command::Physical(Some(true)),
        ("phys", "off") => Command::Physical(Some(false)),
        _ => return Err(format!("unknown command {text:?}; `monitor help` lists all")),
    };
    Ok(command)
}

/// A moment as people name it.
pub(crate) fn moment(text: &str) -> Result<When, String> {
    text.parse().map_err(|e: BadWhen| one_line(&e))
}

/// Does what a command says; the answer ends with a line break.
pub(crate) fn run(target: &mut Debuggee, text: &str) -> String {
    let mut answer = match parse(text) {
        Ok(command) => answer(target, command),
        Err(reason) => reason,
    };
    if !answer.is_empty() && !answer.ends_with('\n') {
        answer.push('\n');
    }
    answer
}

fn answer(target: &mut Debuggee, command: Command) -> String {
    match command {
        Command::Help => HELP.to_owned(),
        Command::GoTo(place) => go_to(target, place),
        Command::InfoReplay => info(target),
        Command::Checkpoints => checkpoints(target),
        Command::Snapshot(path) => snapshot(target, &path),
        Command::Harts => harts::table(target.timeline.machine()),
        Command::Console => String::from_utf8_lossy(&target.timeline.console()).into_owned(),
        Command::Physical(wanted) => {
            target.is_physical = wanted.unwrap_or(target.is_physical);
            let space = if target.is_physical { "physical" } else { "virtual" };
            format!("addresses are {space}")
        }
        Command::Examine(what) => xp::show(target.timeline.machine(), what),
    }
}

fn go_to(target: &mut Debuggee, when: When) -> String {
    let stop = target.go_to(when);
    let mut text = match stop {
        _ if matches!(when, When::Icount(step) if step > target.timeline.last() && step < u64::MAX) => {
            "the recording ends before that\n".to_owned()
        }
        Stop::Interrupted => "interrupted on the way\n".to_owned(),
        Stop::End { how } if how != ReplayEnd::Whole => format!("{how}\n"),
        _ => String::new(),
    };
    text.push_str(&position(target));
    text.push_str(STALE);
    text
}

/// Where the machine stands.
fn position(target: &Debuggee) -> String {
    let timeline = &target.timeline;
    let (here, first, last) = (timeline.icount(), timeline.first(), timeline.last());
    format!("step {here} of {first} to {last}, {}\n", seconds(elapsed_ns(target)))
}

/// Guest time since the first step of the recording, in nanoseconds.
fn elapsed_ns(target: &Debuggee) -> u64 {
    let info = target.timeline.info();
    target.timeline.mtime().saturating_sub(info.mtime_at(info.first.icount)).saturating_mul(100)
}

fn seconds(ns: u64) -> String {
    format!("{}.{:06} s", ns / 1_000_000_000, ns / 1000 % 1_000_000)
}

fn info(target: &Debuggee) -> String {
    let timeline = &target.timeline;
    let info = timeline.info();
    let pace = match target.pace.steps_per_second() {
        Some(pace) => format!("{:.1} million steps a second when it last ran on", pace / 1e6),
        None => "not run on so far".to_owned(),
    };
    format!(
        "recording   {}\nposition    {}length      {} of guest time; {}\nguest time  {} since power-on\n\
         wall clock  {}\nspeed       {pace}, by the {}\ndigests     {} compared, all as recorded\n",
        timeline.recording().path().display(),
        position(target),
        seconds(info.duration_ns()),
        info.end,
        seconds(timeline.mtime().saturating_mul(100)),
        rfc3339(timeline.wall_clock_ns() / 1_000_000),
        timeline.machine().engine(),
        timeline.digests(),
    )
}

fn checkpoints(target: &Debuggee) -> String {
    let kept = target.timeline.checkpoints();
    let bytes: usize = kept.iter().map(|c| c.bytes).sum();
    let rows = kept.iter().map(|c| format!("{:>20}  {:>10}\n", c.icount, c.bytes));
    let head = format!("{:>20}  {:>10}\n", "step", "bytes");
    format!("{head}{}{} states, {bytes} bytes\n", rows.collect::<String>(), kept.len())
}

fn snapshot(target: &mut Debuggee, path: &Path) -> String {
    if path.exists() {
        return format!("{} is there already", path.display());
    }
    match target.timeline.save_snapshot(path) {
        Ok(bytes) => format!("{}: {bytes} bytes", path.display()),
        Err(e) => one_line(&e),
    }
}

/// One line for who starts a server.
pub(crate) fn overview(target: &Debuggee) -> String {
    let timeline = &target.timeline;
    let length = seconds(timeline.info().duration_ns());
    let mut text = format!("steps {} to {}, {length}", timeline.first(), timeline.last());
    if timeline.info().end != ReplayEnd::Whole {
        text.push_str(&format!("; {}", timeline.info().end));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_and_others_refused_with_a_hint() {
        let cases = [
            ("", Command::Help),
            (" help ", Command::Help),
            ("goto 12", Command::GoTo(When::Icount(12))),
            ("goto end", Command::GoTo(When::Icount(u64::MAX))),
            ("info  replay", Command::InfoReplay),
            ("snapshot /tmp/a b", Command::Snapshot("/tmp/a b".into())),
            ("phys", Command::Physical(None)),
            ("phys on", Command::Physical(Some(true))),
            ("harts", Command::Harts),
            ("checkpoints", Command::Checkpoints),
            ("console", Command::Console),
        ];
        for (text, command) in cases {
            assert_eq!(parse(text), Ok(command), "{text}");
        }
        for text in ["xp/4xg 0x80000000", "xp /4xg 0x80000000", "xp 0x80000000"] {
            assert!(matches!(parse(text), Ok(Command::Examine(_))), "{text}");
        }
        for text in [
            "goto",
            "goto x",
            "snapshot",
            "info",
            "phys maybe",
            "xp",
            "xpp 1",
            "harts now",
            "\u{fffd}",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let listed: Vec<&str> =
            HELP.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(listed.len(), HELP.lines().count());
        for word in listed {
            assert!(
                !matches!(parse(word), Err(reason) if reason.starts_with("unknown"))
                    || word == "info"
                    || word == "xp"
            );
        }
    }

    #[test]
    fn times_are_written_in_seconds() {
        assert_eq!(seconds(1_234_567_890), "1.234567 s");
        assert_eq!(seconds(999), "0.000000 s");
    }
}
