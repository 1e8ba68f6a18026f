//! `understudy divergence`: what made two replicas differ, down to the instruction or the byte.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use host::divergence::analysis::{
    AnalyseError, Analysis, Cause, EngineDifference, StateDifference, analyse, analyse_recording,
};
use host::divergence::compare::{Differences, HartRegisters};
use host::divergence::{Report, Side, Step};
use host::one_line::one_line;
use host::recording::start::BUILD;
use machine::engine::EngineKind;

use super::client::Format;
use super::{failure, print, say, usage};

/// Runs of bytes that the table shows.
const RUNS_SHOWN: usize = 16;

/// Options of `divergence`.
#[derive(Debug, Args)]
pub(crate) struct DivergenceArgs {
    /// What the secondary kept: a directory that its host's `status` names.
    #[arg(value_name = "REPORT", required_unless_present = "recording")]
    report: Option<PathBuf>,
    /// Look for what the engines differ in on a recording instead.
    #[arg(long, value_name = "DIR", conflicts_with = "report")]
    recording: Option<PathBuf>,
    /// The engines to run the machine on.
    #[arg(long, value_name = "ENGINES", value_delimiter = ',', default_value = "jit,interpreter")]
    engines: Vec<EngineKind>,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// Runs the command. Exit status 0 when the cause was found, 1 when the evidence does not tell.
pub(crate) fn run(args: &DivergenceArgs) -> anyhow::Result<ExitCode> {
    let (Some(target), is_report) =
        (args.report.as_ref().or(args.recording.as_ref()), args.report.is_some())
    else {
        return Err(usage("name a report, or a recording with --recording"));
    };
    if !target.is_dir() {
        return Err(failure(3, format!("{} is no directory on this host", target.display())));
    }
    let mut told = |words: &str| say(words);
    let analysed = if is_report {
        analyse(target, &args.engines, &mut told)
    } else {
        analyse_recording(target, &args.engines, &mut told)
    };
    let analysis = analysed.map_err(|e: AnalyseError| failure(1, one_line(&e)))?;
    match args.output {
        Format::Json => {
            let mut value = serde_json::to_value(&analysis)?;
            value["is_told"] = analysis.cause.is_told().into();
            value["conclusion"] = conclusion(&analysis).into();
            print(&serde_json::to_string_pretty(&value)?)?;
        }
        Format::Table => print(&table(&analysis))?,
    }
    if analysis.cause.is_told() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(failure(1, format!("the cause was not found: {}", conclusion(&analysis))))
}

/// What it comes to, in one line.
fn conclusion(analysis: &Analysis) -> String {
    let host = |side| match &analysis.report {
        Some(report) if report.side == side => format!("host {}", report.host),
        Some(Report { peer: Some(peer), .. }) => format!("host {peer}"),
        _ => format!("the {side}'s host"),
    };
    match &analysis.cause {
        Cause::Engines(found) => engines_differ(found),
        Cause::Secondary(found) => {
            let what = extent(&found.differences);
            format!(
                "the engines make what is in the log; on {} something else had changed the machine: {what}",
                host(Side::Secondary)
            )
        }
        Cause::Digest => "the machines are the same, byte by byte; the secondary's digest of it was wrong: it missed a \
                          write to memory"
            .to_owned(),
        Cause::Primary => format!(
            "the engines make what the secondary had; on {} something else had changed the machine",
            host(Side::Primary)
        ),
        Cause::Unknown { reason } => reason.clone(),
    }
}

fn engines_differ(found: &EngineDifference) -> String {
    let EngineDifference { reference, other, from, to, .. } = found;
    let who = format!("{} and {} differ", reference.engine(), other.engine());
    if !found.is_narrow {
        return format!(
            "{who} somewhere between steps {from} and {to}, but only after all that was run before; run again from there, \
             they do not"
        );
    }
    let step = match found.steps.as_slice() {
        [step] => Some(step),
        steps => steps.iter().find(|step| Some(step.icount) == found.made_by),
    };
    let instruction = step.map(|step| {
        let Step { icount, hart, pc, text, .. } = step;
        format!("{text}, hart {hart}, pc {pc:#x}, step {icount}")
    });
    match (instruction, to - from) {
        (Some(instruction), 1) => format!("{who} in one instruction: {instruction}"),
        (Some(instruction), count) => format!(
            "{who} in what {count} instructions make together, from step {from} on; the first thing that differs is the \
             result of {instruction}"
        ),
        (None, count) => {
            format!("{who} in what {count} instructions make together, from step {from} on")
        }
    }
}

/// How much differs.
fn extent(found: &Differences) -> String {
    let mut parts = Vec::new();
    if let [run] = found.memory.as_slice()
        && let ([was], [is]) = (run.left.as_slice(), run.right.as_slice())
    {
        let bits = match (was ^ is).count_ones() {
            1 => ", one bit of it",
            _ => "",
        };
        parts.push(format!(
            "the byte at {:#x}{bits} ({was:#04x} as it should be, {is:#04x})",
            run.gpa
        ));
    } else if found.memory_bytes > 0 {
        parts.push(format!("{} bytes in {} pages", found.memory_bytes, found.memory_pages));
    }
    let registers = found.registers_different();
    if registers > 0 {
        parts.push(format!("{registers} registers"));
    }
    if !found.devices.is_empty() {
        parts.push(format!("{} fields of devices", found.devices.len()));
    }
    parts.join(", ")
}

/// What somebody can do about it.
fn remedy(analysis: &Analysis) -> Option<String> {
    Some(match &analysis.cause {
        Cause::Engines(found) => {
            let report = "report this; until it is repaired, run the hosts of this VM with engine = \"interpreter\" in \
                          their configuration";
            let log_has_it =
                analysis.trials.iter().any(|t| t.manner == found.reference && !t.agrees);
            let kept = match log_has_it && analysis.report.is_some() {
                true => format!(
                    "; the log has what the {} made, and so has the VM, which runs on with it: restart its guest then",
                    found.other.engine()
                ),
                false => String::new(),
            };
            report.to_owned() + &kept
        }
        Cause::Secondary(_) => {
            "look for machine checks in that host's kernel log and test its memory; if that is good, report this".to_owned()
        }
        Cause::Digest => "report this; the VM has lost nothing".to_owned(),
        Cause::Primary => format!(
            "the VM runs on with that state, and its new secondary has a copy: look for machine checks in that host's \
             kernel log and test its memory, then restart the guest; the state that it should have had comes back with \
             `understudy replay {} --then-live`",
            analysis.recording.display()
        ),
        Cause::Unknown { .. } => return None,
    })
}

fn table(analysis: &Analysis) -> String {
    let mut lines = Vec::new();
    let mut row = |name: &str, value: &str| lines.push(format!("{name:18}{value}"));
    if let Some(report) = &analysis.report {
        let Report { vm, side, host, engine, build, .. } = report;
        row("VM", &format!("{vm}, {side} on host {host}, {engine}, {build}"));
        if build != BUILD {
            row("", &format!("this is {BUILD}: its engines need not make what those made"));
        }
        row("Seen", &format!("{}, step {}: {}", report.date, report.icount, report.reason));
        let right = report.last_right.map(|step| format!("step {step}"));
        row("Last digest right", &right.unwrap_or_else(|| "none since it follows".to_owned()));
    }
    row("Recording", &analysis.recording.display().to_string());
    for trial in &analysis.trials {
        let outcome = if trial.agrees { "as in the log" } else { "not as in the log" };
        row(
            "Run",
            &format!(
                "steps {} to {}: digest {:#018x}, {outcome} ({})",
                trial.from, trial.icount, trial.digest, trial.manner
            ),
        );
    }
    row("Cause", &conclusion(analysis));
    if let Some(remedy) = remedy(analysis) {
        row("What to do", &remedy);
    }
    match &analysis.cause {
        Cause::Engines(found) => {
            let (dir, step) = (analysis.recording.display(), found.from);
            lines.push(format!("{:18}understudy debug {dir} --at {step}", "To look around"));
            show_engines(&mut lines, found);
        }
        Cause::Secondary(found) => show_state(&mut lines, analysis, found),
        Cause::Digest | Cause::Primary | Cause::Unknown { .. } => {}
    }
    lines.join("\n")
}

fn show_engines(lines: &mut Vec<String>, found: &EngineDifference) {
    lines.push(String::new());
    if found.steps.first().is_some_and(|step| step.icount > found.from) {
        lines.push("...".to_owned());
    }
    for step in &found.steps {
        let raw = match step.raw {
            Some(raw) if raw & 3 == 3 => format!("{raw:08x}"),
            Some(raw) => format!("    {raw:04x}"),
            None => format!("{:8}", "-"),
        };
        let is_it = found.to - found.from > 1 && found.made_by == Some(step.icount);
        let mark = if is_it { "  <-- makes what differs" } else { "" };
        let trap = step.trap.map(|cause| format!("  (takes a trap, cause {cause:#x})"));
        lines.push(format!(
            "step {}  hart {}  pc {:#018x}  {raw}  {}{}",
            step.icount,
            step.hart,
            step.pc,
            step.text,
            trap.unwrap_or_default() + mark
        ));
    }
    let names = [found.reference, found.other].map(|manner| manner.engine().to_string());
    show_differences(lines, &found.differences, &names);
}

fn show_state(lines: &mut Vec<String>, analysis: &Analysis, found: &StateDifference) {
    lines.push(String::new());
    let right = analysis.report.as_ref().and_then(|report| report.last_right);
    if let Some(step) = found.wrong_since {
        lines.push(format!("The snapshot at step {step} of the recording has the change already."));
    }
    match &found.last_write {
        Some(write) => {
            let when = match write.icount {
                Some(step) => format!("at step {step}"),
                None => format!("before step {}, where the recording begins", write.since),
            };
            lines.push(format!(
                "The guest last wrote to {:#x} {when}; it was changed between that and step {}.",
                write.gpa, found.icount
            ));
            if let Some(step) = right {
                lines.push(format!(
                    "The digest at step {step} was right: it sees what the guest has written since the one before."
                ));
            }
        }
        None => {
            if let Some(step) = right {
                lines.push(format!(
                    "It was changed between the digests at steps {step} and {}.",
                    found.icount
                ));
            }
        }
    }
    show_differences(lines, &found.differences, &["by the log".to_owned(), "as kept".to_owned()]);
}

fn show_differences(lines: &mut Vec<String>, found: &Differences, names: &[String; 2]) {
    for hart in &found.harts {
        show_registers(lines, hart, names);
    }
    let [left, right] = names;
    if found.memory_bytes > 0 {
        lines.push(format!(
            "\nMemory: {} bytes in {} pages ({left}; {right})",
            found.memory_bytes, found.memory_pages
        ));
    }
    for run in found.memory.iter().take(RUNS_SHOWN) {
        let hex = |bytes: &[u8]| {
            let all: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let rest = if bytes.len() < run.bytes { "..." } else { "" };
            all + rest
        };
        lines.push(format!("{:#018x}  {}  {}", run.gpa, hex(&run.left), hex(&run.right)));
    }
    if found.memory.len() > RUNS_SHOWN {
        lines.push("...".to_owned());
    }
    if !found.devices.is_empty() {
        lines.push(format!("\nDevices and the rest ({left}; {right})"));
    }
    for field in &found.devices {
        lines.push(format!("{}: {}; {}", field.path, field.left, field.right));
    }
}

fn show_registers(lines: &mut Vec<String>, hart: &HartRegisters, [left, right]: &[String; 2]) {
    let has_before = hart.registers.iter().any(|register| register.before.is_some());
    let before = if has_before { format!("  {:18}", "before") } else { String::new() };
    lines.push(format!("\nHart {:<11}{before}  {left:18}  {right}", hart.hart));
    for register in &hart.registers {
        let before = match register.before {
            Some(value) => format!("  {value:#018x}"),
            None => String::new(),
        };
        let mark = if register.differs() { "  <-- differs" } else { "" };
        lines.push(format!(
            "{:16}{before}  {:#018x}  {:#018x}{mark}",
            register.name, register.left, register.right
        ));
    }
}
