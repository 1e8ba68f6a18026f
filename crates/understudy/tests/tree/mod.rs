//! The tree that a test was built from: its files, its crates, its history.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A crate of the workspace.
pub(crate) struct Crate {
    pub(crate) name: String,
    pub(crate) dependencies: Vec<Dependency>,
}

/// What a crate's Cargo.toml names.
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) is_for_tests: bool,
}

/// The tree's top.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// A file's text; `path` counts from the top.
pub(crate) fn file(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every file of the tree, without build results and git's own, in order.
pub(crate) fn files() -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![root()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let is_dir = entry.file_type().unwrap().is_dir();
            let is_result = name.starts_with("target") || name.starts_with(".cache");
            if is_dir && name != ".git" && !is_result {
                dirs.push(entry.path());
            } else if !is_dir && !name.ends_with(".img") && name != ".git" {
                let path = entry.path();
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.retain(|path| {
        std::fs::read(root().join(path)).is_ok_and(|b| String::from_utf8(b).is_ok())
    });
    found.sort();
    found
}

/// The Rust files among [`files`].
pub(crate) fn sources() -> Vec<String> {
    files().into_iter().filter(|path| path.ends_with(".rs")).collect()
}

/// What cargo prints, asked about this tree; it fetches and builds nothing.
pub(crate) fn cargo(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    let output = command.args(args).args(["--locked", "--offline"]).current_dir(root()).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The crates of the workspace.
pub(crate) fn crates() -> Vec<Crate> {
    let text = cargo(&["metadata", "--format-version", "1", "--no-deps"]);
    let metadata: serde_json::Value = serde_json::from_str(&text).unwrap();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
    let dependency = |value: &serde_json::Value| Dependency {
        name: name(value),
        is_for_tests: value["kind"].as_str() == Some("dev"),
    };
    let package = |value: &serde_json::Value| Crate {
        name: name(value),
        dependencies: value["dependencies"].as_array().unwrap().iter().map(dependency).collect(),
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

/// What git prints; nothing where the tree has no history, or only a part of it.
pub(crate) fn git(args: &[&str]) -> Option<String> {
    let ask = |args: &[&str]| {
        let output = Command::new("git").args(args).current_dir(root()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let is_whole = ask(&["rev-parse", "--is-shallow-repository"])?.trim() == "false";
    is_whole.then(|| ask(args))?
}
