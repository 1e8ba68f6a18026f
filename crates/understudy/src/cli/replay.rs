//! `understudy replay`: run a recorded VM again, see that it is the same, and take out what crossed its border.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use host::config::{DiskSection, NetSection, ProtectionSection, VmConfig};
use host::disk::DiskFormat;
use host::one_line::one_line;
use host::recording::{
    DiskExtract, Extract, Player, RecordingDir, RecordingInfo, ReplayEnd, ReplayOptions, Replayed,
    When, play,
};
use host::vm::{Definition, Origin, Prepared};
use machine::engine::EngineKind;

use super::run::live;
use super::terminal::show;
use super::{engine_line, failure, say, usage};

/// Options of `replay`.
#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// The recording: a directory that `understudy run --record` made, or a flight recorder's.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Stop there: a step, a time since the beginning (90s, 1m30s) or a date (2026-01-31T12:00:00Z).
    #[arg(long, value_name = "ICOUNT|TIME")]
    until: Option<When>,
    /// Only compare: the console is not shown.
    #[arg(long)]
    verify: bool,
    /// Write the frames that the VM sent and received to a new file, as pcapng (for Wireshark, tcpdump).
    #[arg(long, value_name = "FILE")]
    net_pcap: Option<PathBuf>,
    /// Write the contents of a disk, as far as the VM wrote and read them, to a new raw image; N is 0 if left out.
    #[arg(long, value_name = "[N=]FILE", value_parser = numbered)]
    disk_out: Vec<(u8, PathBuf)>,
    /// What a disk held when the recording began, for --disk-out: a raw image, which is only read.
    #[arg(long, value_name = "[N=]FILE", value_parser = numbered, requires = "disk_out")]
    disk_base: Vec<(u8, PathBuf)>,
    /// Go on from there as a live VM in this terminal, cut off from every network. Its disks are the --disk-out images.
    #[arg(long, requires = "until", conflicts_with = "verify")]
    then_live: bool,
    /// Steps that the machine runs at a time. Makes no difference, as tests show with it.
    #[arg(long, value_name = "N", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    slice: u64,
    /// Drop every cache of the machine after so many steps. Makes no difference but to the time that it takes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    drop_caches_every: Option<u64>,
    /// The engine [default: the fastest that this host can have]. Makes no difference but to the time that it takes.
    #[arg(long, value_name = "interpreter|jit")]
    engine: Option<EngineKind>,
    /// Say at the end what the engine had in memory and has done.
    #[arg(long)]
    stats: bool,
}

/// A file with the number of a device in front, or without.
fn numbered(text: &str) -> Result<(u8, PathBuf), String> {
    match text.split_once('=') {
        Some((number, file))
            if !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit()) =>
        {
            let number = number.parse().map_err(|_| format!("there is no disk {number}"))?;
            Ok((number, file.into()))
        }
        _ => Ok((0, text.into())),
    }
}

/// Replays at full speed to the end of the recording, or to where it is to stop, is cut off, damaged or differs.
pub(crate) fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let fail = |e: &dyn std::error::Error| failure(1, one_line(e));
    let recording = Arc::new(RecordingDir::open(&args.dir).map_err(|e| fail(&e))?);
    if args.then_live {
        check_disks(args, &recording)?;
    }
    let until = match args.until {
        Some(when) => {
            let info = RecordingInfo::scan(&recording).map_err(|e| fail(&e))?;
            Some(info.position_at(when))
        }
        None => None,
    };
    let options = ReplayOptions {
        slice: args.slice,
        drop_caches_every: args.drop_caches_every,
        engine: args.engine,
        until,
    };
    let player = Player::open(&recording, 0, args.engine).map_err(|e| fail(&e))?;
    let mut extract = extract(args, &recording)?;
    extract.outstanding(player.machine().outstanding());
    let (replayed, player) = play(player, options, &mut extract);
    let (packets, disks) = extract.finish().map_err(|e| fail(&e))?;
    report(args, &replayed, packets, &disks);
    if let Some(disk) = disks.iter().find(|disk| disk.mismatch.is_some()) {
        let why = disk.mismatch.clone().unwrap_or_default();
        return Err(failure(1, format!("--disk-base is not what disk {} held: {why}", disk.dev)));
    }
    match replayed.end {
        None if args.then_live => go_on(args, &recording, player),
        Some(ReplayEnd::Whole) | None => Ok(ExitCode::SUCCESS),
        Some(end) => Err(failure(1, end.to_string())),
    }
}

/// A VM that goes on needs all its disks.
fn check_disks(args: &ReplayArgs, recording: &RecordingDir) -> anyhow::Result<()> {
    for dev in 0..recording.start().config.disks.len() {
        if !args.disk_out.iter().any(|(out, _)| usize::from(*out) == dev) {
            let text = format!(
                "--then-live needs --disk-out {dev}=FILE, and --disk-base {dev}=FILE if the VM is to find on its \
                 disk {dev} what it has neither written nor read in the recording"
            );
            return Err(usage(text));
        }
    }
    Ok(())
}

/// Runs the machine of a replay live.
fn go_on(args: &ReplayArgs, recording: &RecordingDir, player: Player) -> anyhow::Result<ExitCode> {
    let machine = recording.start().config.clone();
    let disk = |(dev, disk): (usize, &machine::config::DiskConfig)| {
        let out = args.disk_out.iter().find(|(out, _)| usize::from(*out) == dev);
        let path = out.map_or_else(PathBuf::new, |(_, path)| path.clone());
        let format = Some(DiskFormat::Raw);
        DiskSection { path, format, readonly: disk.readonly, ..DiskSection::default() }
    };
    let config = VmConfig {
        name: recording.about().map_or("vm", |about| &about.vm).to_owned(),
        memory: machine.ram_size,
        harts: machine.harts,
        kernel: None,
        initrd: None,
        bios: None,
        u_boot: None,
        append: recording.start().append.clone(),
        consoles: machine.consoles,
        rngs: machine.rngs,
        disks: machine.disks.iter().enumerate().map(disk).collect(),
        nets: vec![NetSection::default(); machine.nets.len()],
        cloud_init: None,
        protection: ProtectionSection { enabled: false, ..ProtectionSection::default() },
    };
    let (text, file) = (String::new(), PathBuf::new());
    let origin = Origin::state(Prepared::new(player.into_machine()));
    say("live from here, without a network; Ctrl-a x stops it");
    live(Definition { text, file, config, record: None, origin }, args.engine, args.stats)
}

/// What the options ask to take out.
fn extract(
    args: &ReplayArgs,
    recording: &RecordingDir,
) -> anyhow::Result<Extract<impl FnMut(&[u8])>> {
    let config = &recording.start().config;
    let is_shown = !args.verify;
    let console = move |bytes: &[u8]| {
        if is_shown {
            show(bytes);
        }
    };
    let mut extract = Extract::new(console, config.disks.len());
    if let Some(path) = &args.net_pcap {
        extract.pcap(path, config).map_err(|e| failure(1, one_line(&e)))?;
    }
    for (dev, path) in &args.disk_out {
        if usize::from(*dev) >= config.disks.len() {
            let count = config.disks.len();
            return Err(usage(format!(
                "there is no disk {dev}: the recorded VM has {count} disks"
            )));
        }
        let base = args.disk_base.iter().find(|(base, _)| base == dev).map(|(_, path)| path);
        extract
            .disk(*dev, path, base.map(PathBuf::as_path), config)
            .map_err(|e| failure(1, one_line(&e)))?;
    }
    Ok(extract)
}

fn report(args: &ReplayArgs, replayed: &Replayed, packets: u64, disks: &[DiskExtract]) {
    let Replayed { from, icount, records, digests, .. } = replayed;
    let steps = icount - from;
    let begin = if *from > 0 { format!(" from step {from}") } else { String::new() };
    say(&format!(
        "replayed {steps} steps{begin}, {records} records; {digests} digests are as recorded"
    ));
    if replayed.end.is_none() {
        say(&format!("stopped at step {icount}"));
    }
    if let Some(path) = &args.net_pcap {
        say(&format!("{}: {packets} frames", path.display()));
    }
    for disk in disks {
        let known = disk.known_bytes;
        let rest =
            if disk.has_base { "as in --disk-base" } else { "unknown, and zero in the image" };
        say(&format!(
            "{}: disk {}, {known} of {} bytes written or read; the rest is {rest}",
            disk.path.display(),
            disk.dev,
            disk.size
        ));
    }
    if args.stats {
        say(&engine_line(&replayed.engine));
    }
}
