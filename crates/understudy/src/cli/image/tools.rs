//! `understudy image info`, `convert`, `resize` and `check`.

use std::fs::File;
use std::io::IsTerminal as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use host::config::parse_size;
use host::disk::convert::{copy_over, copy_to_new};
use host::disk::mirror::MirrorWriter;
use host::disk::qcow2::check::check as check_qcow2;
use host::disk::qcow2::header::Header;
use host::disk::{
    DiskFormat, DiskSource, Image, NbdUrl, OpenMode, PATIENCE_DEFAULT, Place, looks_like,
};
use host::one_line::one_line;
use serde_json::json;

use crate::cli::client::Format;
use crate::cli::{failure, print, say, usage};

/// `image info`
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A file, a block device, or an NBD export (nbd://HOST/EXPORT).
    image: String,
    /// What it is [default: what it looks like].
    #[arg(long, value_name = "raw|qcow2")]
    format: Option<DiskFormat>,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// `image convert`
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// A file, a block device, or an NBD export.
    source: String,
    /// A file, which is made; or a block device or an NBD export, which is written over with --force.
    target: String,
    /// What the source is [default: raw, or qcow2 when its name ends so and it is one].
    #[arg(long, value_name = "raw|qcow2")]
    format: Option<DiskFormat>,
    /// What the target becomes [default: qcow2 when its name ends so, otherwise raw].
    #[arg(long, value_name = "raw|qcow2")]
    to: Option<DiskFormat>,
    /// Read the source's backing files, too: the target gets everything.
    #[arg(long)]
    backing: bool,
    /// Even though what the target holds now is lost.
    #[arg(long)]
    force: bool,
}

/// `image resize`
#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// The file.
    image: PathBuf,
    /// The disk's new size: 20G; or how much it grows: +5G.
    size: String,
    /// What it is [default: raw, or qcow2 when its name ends so and it is one].
    #[arg(long, value_name = "raw|qcow2")]
    format: Option<DiskFormat>,
    /// Even though what is behind the new end is lost.
    #[arg(long)]
    shrink: bool,
}

/// `image check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The file.
    image: PathBuf,
    /// What it is [default: what it looks like].
    #[arg(long, value_name = "raw|qcow2")]
    format: Option<DiskFormat>,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// A name on the command line: an export or a path.
fn place(text: &str) -> anyhow::Result<Place> {
    if text.contains("://") {
        let url: NbdUrl = text.parse().map_err(usage)?;
        return Ok(Place::Nbd { url, patience: PATIENCE_DEFAULT });
    }
    Ok(Place::File(text.into()))
}

/// What a file looks like. For commands that only look at it.
fn look(path: &Path) -> anyhow::Result<Option<&'static str>> {
    use std::os::unix::fs::FileExt as _;
    let mut start = [0; 512];
    let mut read = || {
        let meta = std::fs::metadata(path)?;
        if meta.is_dir() || std::os::unix::fs::FileTypeExt::is_fifo(&meta.file_type()) {
            return Err(std::io::Error::other("it is neither a regular file nor a block device"));
        }
        File::open(path)?.read_at(&mut start, 0)
    };
    let len = read().map_err(|e| failure(1, format!("cannot read {}: {e}", path.display())))?;
    Ok(looks_like(&start[..len]))
}

fn is_named_qcow2(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("qcow2"))
}

/// A source whose format is what was said, or what name and contents agree on.
fn source(text: &str, format: Option<DiskFormat>) -> anyhow::Result<DiskSource> {
    let place = place(text)?;
    let format = match &place {
        Place::File(path) if format.is_none() && is_named_qcow2(path) => {
            (look(path)? == Some("qcow2")).then_some(DiskFormat::Qcow2)
        }
        _ => format,
    };
    Ok(DiskSource { place, format, has_backing: false })
}

fn open(source: &DiskSource, mode: OpenMode) -> anyhow::Result<Image> {
    Image::open(source, mode).map_err(|e| {
        // The option is called so here.
        failure(
            1,
            one_line(&e).replace("`format=", "`--format ").replace("`backing=on`", "`--backing`"),
        )
    })
}

/// Prints facts: as lines for people, or as they are.
fn report(facts: &serde_json::Value, output: Format) -> anyhow::Result<()> {
    if output == Format::Json {
        return print(&serde_json::to_string_pretty(facts)?);
    }
    for (name, value) in facts.as_object().into_iter().flatten() {
        let text = match value {
            serde_json::Value::Null => continue,
            serde_json::Value::Array(all) if all.is_empty() => continue,
            serde_json::Value::Array(all) => {
                let all: Vec<_> = all.iter().map(|v| v.as_str().unwrap_or_default()).collect();
                all.join(", ")
            }
            serde_json::Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        print(&format!("{:<18} {text}", format!("{}:", name.replace('_', " "))))?;
    }
    Ok(())
}

/// Says what an image is.
pub(crate) fn info(args: &InfoArgs) -> anyhow::Result<ExitCode> {
    let path = match place(&args.image)? {
        place @ Place::Nbd { .. } => {
            let raw = Some(DiskFormat::Raw);
            let source = DiskSource { place, format: raw, has_backing: false };
            let image = open(&source, OpenMode::ReadOnly)?;
            let facts = json!({
                "image": args.image,
                "format": "raw",
                "virtual_bytes": image.size(),
                "export": image.export_line(),
            });
            report(&facts, args.output)?;
            return Ok(ExitCode::SUCCESS);
        }
        Place::File(path) => path,
    };
    let looks = look(&path)?;
    let meta = std::fs::metadata(&path)?;
    let has_file = meta.is_file();
    let mut facts = json!({
        "image": args.image,
        "format": looks.unwrap_or("raw"),
        "virtual_bytes": null,
        "file_bytes": has_file.then_some(meta.len()),
        "disk_usage_bytes": has_file.then_some(meta.blocks() * 512),
    });
    let format = args.format.or(match looks {
        Some("qcow2") => Some(DiskFormat::Qcow2),
        None => Some(DiskFormat::Raw),
        Some(_) => None,
    });
    match format {
        Some(DiskFormat::Qcow2) => {
            let header = header(&path)?.1;
            facts["virtual_bytes"] = header.size.into();
            facts["qcow2_version"] = header.version.into();
            facts["cluster_bytes"] = header.cluster_bytes().into();
            facts["backing_file"] = header.backing.clone().into();
            facts["backing_format"] = header.backing_format.clone().into();
            facts["snapshots"] = header.snapshots.into();
            facts["marks"] = header.marks().into();
            facts["usable"] = match header.check_usable() {
                Ok(()) => "yes".into(),
                Err(e) => format!("no: {e}").into(),
            };
        }
        Some(DiskFormat::Raw) => {
            facts["format"] = "raw".into();
            let source = DiskSource::file(&path, format);
            facts["virtual_bytes"] = open(&source, OpenMode::ReadOnly)?.size().into();
        }
        None => facts["usable"] = "no: this format is not supported".into(),
    }
    report(&facts, args.output)?;
    Ok(ExitCode::SUCCESS)
}

fn header(path: &Path) -> anyhow::Result<(File, Header)> {
    let fail = |e: &dyn std::error::Error| {
        failure(1, format!("cannot open {} as qcow2: {}", path.display(), one_line(e)))
    };
    let file = File::open(path).map_err(|e| fail(&e))?;
    let header = Header::read(&file).map_err(|e| fail(&e))?;
    Ok((file, header))
}

/// Tells on a terminal how far it is.
struct Told {
    total: u64,
    percent: u64,
    is_terminal: bool,
}

impl Told {
    fn new(total: u64) -> Self {
        Self { total, percent: u64::MAX, is_terminal: std::io::stderr().is_terminal() }
    }

    fn at(&mut self, done: u64) {
        let percent = done.saturating_mul(100) / self.total.max(1);
        if self.is_terminal && percent != self.percent {
            self.percent = percent;
            eprint!("\r{percent:3} %");
        }
    }
}

/// Copies a disk into an image of another format or at another place.
pub(crate) fn convert(args: &ConvertArgs) -> anyhow::Result<ExitCode> {
    let from = DiskSource { has_backing: args.backing, ..source(&args.source, args.format)? };
    let from = open(&from, OpenMode::ReadOnly)?;
    let mut told = Told::new(from.size());
    let target = place(&args.target)?;
    let present = match &target {
        Place::Nbd { .. } => true,
        Place::File(path) => path.symlink_metadata().is_ok(),
    };
    if present && !args.force {
        let text = format!("{} holds something: say --force if it is to be lost", args.target);
        return Err(usage(text));
    }
    let written = match target {
        Place::File(path) if !is_device(&path) => {
            let by_name = if is_named_qcow2(&path) { DiskFormat::Qcow2 } else { DiskFormat::Raw };
            // A link keeps leading to the file.
            let path = std::fs::canonicalize(&path).unwrap_or(path);
            let writer = MirrorWriter::create_as(&path, args.to.unwrap_or(by_name), from.size());
            let mut writer = writer.map_err(|e| failure(1, one_line(&e)))?;
            let copied = copy_to_new(&from, &mut writer, &mut |done| told.at(done));
            let written = copied.map_err(|e| failure(1, e))?;
            writer.finish().map_err(|e| failure(1, one_line(&e)))?;
            written
        }
        place => {
            if args.to == Some(DiskFormat::Qcow2) {
                return Err(usage("a device or export is written over as raw"));
            }
            let raw = Some(DiskFormat::Raw);
            let to = DiskSource { place, format: raw, has_backing: false };
            let to = open(&to, OpenMode::Exclusive)?;
            let copied = copy_over(&from, &to, &mut |done| told.at(done));
            copied.map_err(|e| failure(1, e))?
        }
    };
    let end = if told.is_terminal { "\r" } else { "" };
    say(&format!("{end}{}: {} bytes, {written} of them not zero", args.target, from.size()));
    Ok(ExitCode::SUCCESS)
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Makes a disk bigger or smaller.
pub(crate) fn resize(args: &ResizeArgs) -> anyhow::Result<ExitCode> {
    let text = args.image.to_str().ok_or_else(|| usage("the path is not UTF-8"))?;
    let image = open(&source(text, args.format)?, OpenMode::Exclusive)?;
    let now = image.size();
    let size = match args.size.strip_prefix('+') {
        Some(more) => now.checked_add(parse_size(more).map_err(usage)?),
        None => Some(parse_size(&args.size).map_err(usage)?),
    };
    let size = size.ok_or_else(|| usage("that is too big"))?;
    if size < now && !args.shrink {
        return Err(usage(format!(
            "{text} has {now} bytes: what is behind {size} would be lost, say --shrink if that is meant"
        )));
    }
    image.resize(size).map_err(|e| failure(1, e))?;
    say(&format!("{text}: {size} bytes, and {now} before"));
    Ok(ExitCode::SUCCESS)
}

/// Checks an image's tables. Exit status 1: errors; leaked clusters alone are none.
pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let looks = look(&args.image)?;
    let is_qcow2 = args.format.map_or(looks == Some("qcow2"), |f| f == DiskFormat::Qcow2);
    let mut facts = json!({ "image": args.image.display().to_string() });
    if !is_qcow2 {
        // Any bytes are a raw disk; what can be wrong is its size, or that it is something else.
        let source = DiskSource::file(&args.image, args.format);
        let image = open(&source, OpenMode::ReadOnly)?;
        facts["format"] = "raw".into();
        facts["virtual_bytes"] = image.size().into();
        facts["errors"] = 0.into();
        report(&facts, args.output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (file, header) = header(&args.image)?;
    let found = check_qcow2(&file, &header)
        .map_err(|e| failure(1, format!("cannot check {}: {e}", args.image.display())))?;
    facts["format"] = "qcow2".into();
    facts["virtual_bytes"] = header.size.into();
    facts["errors"] = found.errors.into();
    facts["leaked_clusters"] = found.leaks.into();
    facts["data_clusters"] = found.data_clusters.into();
    facts["compressed_clusters"] = found.compressed_clusters.into();
    facts["marks"] = header.marks().into();
    facts["problems"] = found.problems.clone().into();
    report(&facts, args.output)?;
    Ok(if found.errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
