//! `understudy`: the command line. Data go to standard output, words to standard error.
//!
//! # Failure
//! Exit status 0 done, 1 failed, 2 usage, 3 not found, 4 not protected, 5 refused by arbitration.

#![forbid(unsafe_code)]

mod bench;
mod cli;
mod debug;
mod demo;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fault-tolerant virtual machines for ordinary Linux hosts.
#[derive(Debug, Parser)]
#[command(name = "understudy", version, max_term_width = 100, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show it: three hosts on this machine, a protected VM, and one host after the other failing.
    Demo(demo::DemoArgs),
    /// Measure the figures that this project aims at, and print them.
    Bench(bench::BenchArgs),
    /// Run one unprotected VM in this terminal.
    Run(Box<cli::run::RunArgs>),
    /// Make disk images.
    Image(cli::image::ImageArgs),
    /// Run a recorded VM again, and compare every digest.
    Replay(cli::replay::ReplayArgs),
    /// Look at recordings.
    Record(cli::record::RecordArgs),
    /// Serve a recorded VM to GDB, forward and back.
    Debug(cli::debug::DebugArgs),
    /// Find what made two replicas differ, down to the instruction or the byte.
    Divergence(cli::divergence::DivergenceArgs),
    /// Run the daemon of this host.
    Host {
        /// Its configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Start a VM on this host.
    Start {
        #[command(flatten)]
        socket: cli::client::Socket,
        /// The VM's configuration.
        #[arg(value_name = "VM.toml")]
        file: PathBuf,
        /// Start it here even if the arbiter says that other hosts have it. Only when those are gone for good. This host's
        /// copies of the disks have to be as new as is known of.
        #[arg(long)]
        force: bool,
        /// Start it from this host's copies of its disks even if another host has newer ones: what those have more is lost.
        #[arg(long)]
        accept_stale: bool,
    },
    /// Show the VMs that this host runs or follows.
    Status(cli::client::StatusArgs),
    /// Attach to a VM's console; Ctrl-a d detaches, Ctrl-a h shows the other keys.
    Console(cli::client::ConsoleArgs),
    /// Let the secondary take over, as a test or before maintenance; a new secondary is made afterwards.
    Failover(cli::client::VmArgs),
    /// Protect a VM that runs on this host.
    Protect {
        #[command(flatten)]
        vm: cli::client::VmArgs,
        /// The host to make the secondary on.
        #[arg(long)]
        on: Option<String>,
    },
    /// Give a VM's secondary up.
    Unprotect(cli::client::VmArgs),
    /// Take, list, restore and delete snapshots of VMs.
    Snapshot(cli::snapshot::SnapshotArgs),
    /// Limit or resize a disk of a VM that runs on this host.
    Disk(cli::disk::DiskArgs),
    /// Power a VM off, at once.
    Stop(cli::client::VmArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(code) => code,
        Err(e) => {
            cli::say(&format!("error: {}", host::one_line::flatten(&format!("{e:#}"))));
            ExitCode::from(cli::exit_code(&e))
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(&args),
        Command::Run(args) => cli::run::run(*args),
        Command::Image(args) => cli::image::run(args),
        Command::Replay(args) => cli::replay::run(&args),
        Command::Record(args) => cli::record::run(&args),
        Command::Debug(args) => cli::debug::run(&args),
        Command::Divergence(args) => cli::divergence::run(&args),
        Command::Host { config } => {
            let config =
                host::config::HostConfig::load(&config).map_err(|e| cli::usage(e.to_string()))?;
            host::daemon::run(config)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Start { socket, file, force, accept_stale } => {
            cli::client::start(&socket, &file, force, accept_stale)
        }
        Command::Status(args) => cli::client::status(&args),
        Command::Console(args) => cli::client::console(&args),
        Command::Failover(args) => {
            cli::client::simple(&args, |vm| host::control::Request::Failover { vm })
        }
        Command::Protect { vm, on } => {
            cli::client::simple(&vm, |vm| host::control::Request::Protect { vm, host: on })
        }
        Command::Unprotect(args) => {
            cli::client::simple(&args, |vm| host::control::Request::Unprotect { vm })
        }
        Command::Disk(args) => cli::disk::run(args),
        Command::Snapshot(args) => cli::snapshot::run(args),
        Command::Stop(args) => cli::client::simple(&args, |vm| host::control::Request::Stop { vm }),
    }
}
