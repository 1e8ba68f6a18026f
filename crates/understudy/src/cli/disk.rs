//! `understudy disk`: disks of a VM that runs on this host.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use host::config::parse_size;
use host::control::{Request, Response};

use super::client::{Socket, connect, refuse};

/// `disk`
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    command: DiskCommand,
}

#[derive(Debug, Subcommand)]
enum DiskCommand {
    /// Limit what a disk does in a second, until the VM is started anew, wherever it runs; without limits, lift them.
    Limit {
        #[command(flatten)]
        disk: DiskName,
        /// Reads, writes and discards in a second.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        iops: Option<u64>,
        /// Bytes read and written in a second.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        bps: Option<u64>,
        /// How many requests may come at once after a pause [default: those of a tenth of a second].
        #[arg(long, value_name = "N", requires = "iops")]
        iops_burst: Option<u64>,
        /// How many bytes may come at once after a pause [default: those of a tenth of a second].
        #[arg(long, value_name = "SIZE", requires = "bps", value_parser = parse_size)]
        bps_burst: Option<u64>,
    },
    /// Move a disk's image to another path of this host, which runs or follows the VM, while requests go on.
    Move {
        #[command(flatten)]
        disk: DiskName,
        /// The new path, at which nothing is.
        path: PathBuf,
        /// Delete the old image; otherwise it stays as NAME.moved.
        #[arg(long)]
        delete: bool,
    },
    /// Make a disk bigger, on this host and on the secondary's; the guest is told.
    Resize {
        #[command(flatten)]
        disk: DiskName,
        /// Its size from then on.
        #[arg(value_parser = parse_size)]
        size: u64,
    },
}

#[derive(Debug, Args)]
struct DiskName {
    #[command(flatten)]
    socket: Socket,
    /// The VM.
    vm: String,
    /// Which disk: 0 is the first.
    disk: u8,
}

/// Carries the command out.
pub(crate) fn run(args: DiskArgs) -> anyhow::Result<ExitCode> {
    let (socket, request) = match args.command {
        DiskCommand::Limit { disk, iops, bps, iops_burst, bps_burst } => {
            let DiskName { socket, vm, disk } = disk;
            let (bytes_per_second, bytes_burst) = (bps, bps_burst);
            let request =
                Request::LimitDisk { vm, disk, iops, iops_burst, bytes_per_second, bytes_burst };
            (socket, request)
        }
        DiskCommand::Move { disk: DiskName { socket, vm, disk }, path, delete } => {
            let to = std::path::absolute(path)?;
            (socket, Request::MoveDisk { vm, disk, to, delete })
        }
        DiskCommand::Resize { disk: DiskName { socket, vm, disk }, size } => {
            (socket, Request::ResizeDisk { vm, disk, size })
        }
    };
    match connect(&socket)?.call_telling(&request, &mut |_| ())? {
        Response::Done => Ok(ExitCode::SUCCESS),
        other => Err(refuse(other)),
    }
}
