//! The commands, apart from the demo.

pub(crate) mod client;
pub(crate) mod debug;
pub(crate) mod disk;
pub(crate) mod divergence;
pub(crate) mod image;
pub(crate) mod record;
pub(crate) mod replay;
pub(crate) mod run;
pub(crate) mod snapshot;
mod terminal;

use std::io::Write as _;

/// The name of this host, for people.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A failure with an exit status of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    message: String,
    code: u8,
}

/// A failure with exit status `code`.
pub(crate) fn failure(code: u8, message: impl Into<String>) -> anyhow::Error {
    Failure { message: message.into(), code }.into()
}

/// Wrong usage: exit status 2.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    failure(2, message)
}

/// The exit status for an error.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Failure>().map_or(1, |f| f.code)
}

/// Words for people. A closed standard error is no reason to fail.
pub(crate) fn say(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

/// What an engine has in memory and has done.
pub(crate) fn engine_line(engine: &host::vm::EngineUse) -> String {
    let machine::engine::EngineStats { code_bytes, table_bytes, blocks, evictions } = engine.stats;
    format!(
        "engine {}: {code_bytes} bytes of code, {table_bytes} bytes of tables, {blocks} blocks, {evictions} evictions",
        engine.kind
    )
}

/// Data, on standard output; a closed pipe is success.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}
