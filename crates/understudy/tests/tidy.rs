//! Habits of this tree that no compiler checks: dependency direction, lints, unsafe code, and what the documents say.
//!
//! # Place
//! Reads the tree it was built from, and asks cargo and git about it; builds nothing.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test")]

mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use tree::{cargo, crates, file, files, git, sources};

/// Crates without clocks, threads, randomness and host floats.
const PURE: [&str; 5] = ["isa", "jit", "machine", "eventlog", "replica"];

/// The crates of this tree that a crate may use; arrows go down only.
const ARROWS: [(&str, &[&str]); 9] = [
    ("isa", &[]),
    ("jit", &["isa"]),
    ("machine", &["jit", "isa"]),
    ("eventlog", &["machine"]),
    ("replica", &["eventlog", "machine"]),
    ("sim", &["replica"]),
    ("host", &["replica", "eventlog", "machine"]),
    ("guest", &[]),
    ("understudy", &["host", "guest", "replica", "eventlog", "machine"]),
];

/// All that a pure crate may be built from, however indirectly, beside what the JIT maps its memory with.
const PURE_CLOSURE: &[&str] = &[
    "cobs",
    "crc32c",
    "eventlog",
    "isa",
    "jit",
    "machine",
    "postcard",
    "proc-macro2",
    "quote",
    "replica",
    "serde",
    "serde_core",
    "serde_derive",
    "syn",
    "thiserror",
    "thiserror-impl",
    "unicode-ident",
    "xxhash-rust",
];

/// What the JIT maps its memory with; for it alone.
const MAPPING: &[&str] = &["bitflags", "linux-raw-sys", "rustix"];

/// What a pure crate's clippy.toml bans.
const BANNED: &[&str] = &[
    "std::collections::HashMap",
    "std::collections::HashSet",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::thread::spawn",
    "std::thread::sleep",
    "std::env::var",
];

/// The only files with unsafe code.
const UNSAFE_FILES: &[&str] = &[
    "crates/host/src/disk/uring.rs",
    "crates/host/src/huge.rs",
    "crates/host/src/priority.rs",
    "crates/host/src/tap.rs",
    "crates/jit/src/arena.rs",
    "crates/jit/src/enter.rs",
];

/// Files longer than `LINES_MAX`; shorten them, never add one.
const LONG_FILES: &[&str] = &[];
const LINES_MAX: usize = 900;

/// Hosts that a URL in the tree may name: none from which packages come. SVG's namespace is a name, not a place.
const URL_HOSTS: &[&str] = &["www.apache.org", "www.w3.org", "localhost"];

/// Commits whose subject is too long, from before this test.
const LONG_SUBJECTS: &[&str] = &["1c2db22", "e1caca1", "8dcacad"];

#[test]
fn dependencies_between_crates_go_down_only() {
    let known: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    let found = crates();
    let names: BTreeSet<&str> = found.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, known, "ARROWS has to list every crate");
    for (name, allowed) in ARROWS {
        let this = found.iter().find(|c| c.name == name).unwrap();
        for dependency in this.dependencies.iter().filter(|d| known.contains(d.name.as_str())) {
            let target = dependency.name.as_str();
            let is_fine = if dependency.is_for_tests {
                target != "understudy"
            } else {
                allowed.contains(&target)
            };
            assert!(is_fine, "{name} must not depend on {target}");
        }
    }
}

#[test]
fn pure_crates_are_built_from_listed_crates_alone() {
    for name in PURE {
        let mut command = vec!["tree", "-p", name, "-e", "normal", "--prefix", "none"];
        if !["isa", "jit"].contains(&name) {
            command.extend(["--prune", "jit"]);
        }
        for line in cargo(&command).lines() {
            let used = line.split(' ').next().unwrap();
            let is_mapping = name == "jit" && MAPPING.contains(&used);
            assert!(
                PURE_CLOSURE.contains(&used) || is_mapping,
                "{name} is built from {used}, not in PURE_CLOSURE"
            );
        }
    }
}

#[test]
fn pure_crates_have_the_determinism_lints() {
    let root = file("clippy.toml");
    for name in PURE {
        let text = file(&format!("crates/{name}/clippy.toml"));
        let lines: BTreeSet<&str> = text.lines().collect();
        for key in root.lines() {
            assert!(
                lines.contains(key),
                "crates/{name}/clippy.toml replaces the root one, and lacks {key}"
            );
        }
        for banned in BANNED {
            assert!(
                text.contains(&format!("\"{banned}\"")),
                "crates/{name}/clippy.toml lacks {banned}"
            );
        }
    }
}

#[test]
fn unsafe_code_is_where_it_is_listed() {
    for path in files().iter().filter(|p| p.ends_with("/src/lib.rs") || p.ends_with("/src/main.rs"))
    {
        let has_exception = UNSAFE_FILES.iter().any(|f| same_crate(f, path));
        let forbids = file(path).contains("#![forbid(unsafe_code)]");
        assert!(forbids != has_exception, "{path}: forbid(unsafe_code) and UNSAFE_FILES disagree");
    }
    for path in sources().iter().filter(|p| p.contains("/src/")) {
        let opts_in = file(path).contains("#![expect(unsafe_code");
        assert_eq!(
            opts_in,
            UNSAFE_FILES.contains(&path.as_str()),
            "{path}: unsafe code and UNSAFE_FILES disagree"
        );
    }
}

fn same_crate(a: &str, b: &str) -> bool {
    a.split('/').nth(1) == b.split('/').nth(1)
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    for (name, _) in ARROWS {
        let text = file(&format!("crates/{name}/Cargo.toml"));
        assert!(text.contains("[lints]\nworkspace = true\n"), "crates/{name}/Cargo.toml");
    }
}

#[test]
fn every_source_file_says_what_it_is() {
    for path in sources() {
        assert!(
            file(&path).starts_with("//! "),
            "{path} does not start with a module documentation"
        );
    }
}

#[test]
fn an_invariant_has_one_crate_to_see_to_it() {
    let mut homes = BTreeMap::new();
    for path in sources() {
        let text = file(&path);
        let crate_of = path.split('/').nth(1).unwrap().to_owned();
        for line in text.lines().filter_map(|line| line.strip_prefix("//! - INV-")) {
            let Some((id, _)) = line.split_once(':') else { continue };
            let home = homes.entry(id.to_owned()).or_insert_with(|| crate_of.clone());
            assert_eq!(*home, crate_of, "INV-{id} is of two crates");
        }
    }
}

#[test]
fn files_stay_short() {
    for path in sources() {
        let lines = file(&path).lines().count();
        let is_listed = LONG_FILES.contains(&path.as_str());
        assert!(lines <= LINES_MAX || is_listed, "{path} has {lines} lines: make modules of it");
        assert!(lines > LINES_MAX || !is_listed, "{path} is short now: take it off LONG_FILES");
    }
}

#[test]
fn no_module_is_a_drawer_for_everything() {
    for path in sources() {
        let drawers = ["base", "util", "utils", "common", "helpers", "manager"];
        let mut parts = path.split('/').map(|part| part.trim_end_matches(".rs"));
        assert!(
            !parts.any(|part| drawers.contains(&part)),
            "{path} says nothing about what is in it"
        );
    }
}

/// Packages come from where a machine's own configuration says, so no file names a server.
#[test]
fn no_file_names_a_server() {
    for path in files().iter().filter(|p| *p != "Cargo.lock") {
        let text = file(path);
        for (host, is_url) in hosts(&text) {
            let is_example = !host.contains('.') || host.parse::<std::net::Ipv4Addr>().is_ok();
            let is_known = URL_HOSTS.contains(&host) || is_url && is_example;
            assert!(is_known, "{path} names the server {host}");
        }
    }
}

/// Servers named in a text: those of URLs (true), and words that look like one (false).
fn hosts(text: &str) -> Vec<(&str, bool)> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
    let urls = text.split("://").skip(1).filter_map(|rest| {
        let host = rest.split(|c| !is_part(c)).next()?;
        host.starts_with(|c: char| c.is_ascii_alphanumeric()).then_some((host, true))
    });
    let words = text.split(|c| !is_part(c)).map(|word| word.trim_matches('.'));
    let named = words
        .filter(|w| [".org", ".com"].iter().any(|end| w.len() > end.len() && w.ends_with(end)));
    urls.chain(named.map(|word| (word, false))).collect()
}

#[test]
fn commit_subjects_name_an_area_and_are_short() {
    let Some(log) = git(&["log", "--no-merges", "--format=%h %s"]) else { return };
    for line in log.lines() {
        let (id, subject) = line.split_once(' ').unwrap();
        let (areas, summary) = subject.split_once(": ").unwrap_or_default();
        let is_area = |area: &str| !area.is_empty() && area.bytes().all(|b| b.is_ascii_lowercase());
        let has_form = areas.split(", ").all(is_area)
            && summary.starts_with(|c: char| c.is_ascii_uppercase())
            && !summary.ends_with('.');
        let is_short = subject.chars().count() <= 72;
        let is_old = LONG_SUBJECTS.iter().any(|old| id.starts_with(old));
        assert!(
            has_form && (is_short || is_old),
            "commit {id}: not `area: Summary` in 72 characters: {subject}"
        );
    }
}

/// The blocks of a document in a language.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let text = file(document);
    let fence = format!("```{language}\n");
    let block = |rest: &str| rest.split("```").next().unwrap().to_owned();
    text.split(&fence).skip(1).map(block).collect()
}

#[test]
fn configurations_in_the_readme_are_accepted() {
    let [host, vm]: [String; 2] = blocks("README.md", "toml").try_into().unwrap();
    let host = host::config::HostConfig::parse(&host, "host.toml").unwrap();
    let vm = host::config::VmConfig::parse(&vm, "vm.toml", Path::new("/")).unwrap();
    for name in &vm.protection.hosts {
        assert!(*name == host.name || host.peers.contains_key(name), "no host {name}");
    }
}

/// What `understudy` prints about a command, or `None` if it has none of that name.
fn help_of(command: &[&str]) -> Option<String> {
    let mut understudy = Command::new(env!("CARGO_BIN_EXE_understudy"));
    let output = understudy.args(command).arg("--help").output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

#[test]
fn commands_in_the_documents_exist_with_their_options() {
    let texts = ["README.md", "docs/time-travel.md"].map(|path| blocks(path, "sh").concat());
    let commands: Vec<Vec<&str>> = texts
        .iter()
        .flat_map(|text| text.lines())
        .filter_map(|line| line.strip_prefix("understudy "))
        .map(|line| line.split('#').next().unwrap().split(" -- ").next().unwrap())
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert!(commands.len() > 25);
    for words in commands {
        let whole = help_of(&words[..1]).unwrap_or_else(|| panic!("understudy {}", words[0]));
        let has_commands = whole.contains("\nCommands:\n");
        let named = &words[..if has_commands { 2 } else { 1 }];
        let help = help_of(named).unwrap_or_else(|| panic!("understudy {}", named.join(" ")));
        for option in words.iter().filter(|w| w.starts_with('-')) {
            let is_there = help.split([' ', ',', '\n']).any(|word| word == *option);
            assert!(is_there, "understudy {} has no option {option}", named.join(" "));
        }
    }
}

#[test]
fn what_the_architecture_names_is_there() {
    let text = file("ARCHITECTURE.md");
    let sources: String = sources().iter().map(|path| file(path)).collect();
    let named = |start: &'static str| {
        let is_part = |c: char| c.is_ascii_alphanumeric() || "-_/.".contains(c);
        text.split(move |c| !is_part(c)).filter(move |word| word.starts_with(start))
    };
    for path in named("crates/") {
        assert!(tree::root().join(path.trim_end_matches('.')).exists(), "{path} is not there");
    }
    for id in named("INV-") {
        assert!(sources.contains(&format!("{}:", id.trim_end_matches('.'))), "no invariant {id}");
    }
}

#[test]
fn links_within_the_documents_lead_somewhere() {
    for path in files().iter().filter(|path| path.ends_with(".md")) {
        let dir = tree::root().join(path).parent().unwrap().to_owned();
        let text = file(path);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            assert!(dir.join(target).exists(), "{path}: {link} is not there");
        }
    }
}

#[test]
fn licences_are_here() {
    assert!(file("Cargo.toml").contains("license = \"MIT OR Apache-2.0\""));
    assert!(file("LICENSE-MIT").starts_with("MIT License"));
    assert!(file("LICENSE-APACHE").contains("Apache License"));
}
