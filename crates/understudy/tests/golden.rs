//! Recordings made by every version of the format that was ever released replay as they did when they were made; copies
//! that are cut off or damaged replay up to there and are never taken for whole.
//!
//! `golden/` has the recordings, beside each a text with what it has to come to, and how they were made.

mod vmrun;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use host::recording::{Stop, Timeline};
use machine::engine::EngineKind;
use vmrun::understudy;

/// Recordings that have to be there.
const NAMES: &[&str] =
    &["v1-firmware-4-harts", "v1-kernel-1-hart", "v2-firmware-4-harts", "v2-kernel-1-hart"];
/// Bytes of a file that are damaged, one at a time.
const DAMAGES: usize = 40;

/// A recording and what it comes to.
struct Golden {
    name: String,
    dir: PathBuf,
    /// What `replay` says of it.
    words: String,
    /// The machine's digest at the end.
    digest: u64,
    console: String,
}

impl Golden {
    fn read(text: &Path) -> Self {
        let dir = text.with_extension("");
        let name = dir.file_name().expect("a file has a name").to_str().expect("ASCII").to_owned();
        let text = fs::read_to_string(text).expect("the text can be read");
        let (head, console) = text.split_once("\n\n").expect("an empty line ends the head");
        let value = |key: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap_or_else(|| panic!("{name}.txt says nothing about {key}")).trim()
        };
        let (steps, records, digests) = (value("steps"), value("records"), value("digests"));
        // A recording whose beginning was dropped says where it begins.
        let (steps, from) = steps.split_at(steps.find(' ').unwrap_or(steps.len()));
        let words = format!(
            "replayed {steps} steps{from}, {records} records; {digests} digests are as recorded"
        );
        let digest = u64::from_str_radix(value("digest "), 16).expect("a digest is hexadecimal");
        Self { words, digest, console: console.to_owned(), name, dir }
    }
}

fn all() -> Vec<Golden> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut texts: Vec<PathBuf> = fs::read_dir(&dir)
        .expect("it is there")
        .map(|entry| entry.expect("and can be read").path())
        .collect();
    texts.retain(|path| path.extension().is_some_and(|end| end == "txt"));
    texts.sort();
    texts.iter().map(|text| Golden::read(text)).collect()
}

/// What a replay came to: exit status, console, words.
fn replay(dir: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let output = understudy().arg("replay").arg(dir).args(args).output().expect("replay runs");
    let [console, words] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.code(), console, words)
}

/// The digest of the machine at the end of a recording.
fn digest_at_the_end(dir: &Path, engine: Option<EngineKind>) -> u64 {
    let mut timeline = Timeline::open(dir, engine).expect("a recording");
    let end = timeline.last();
    let stop = timeline.goto(end, &AtomicBool::new(false));
    assert_eq!((stop, timeline.icount()), (Stop::Reached, end), "{}", dir.display());
    timeline.digest()
}

/// Places in a file of so many bytes: its start, its end, and what a fixed generator draws.
fn places(bytes: usize) -> Vec<usize> {
    let mut state = bytes as u64;
    let drawn = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) as usize % bytes
    });
    [0, 9, bytes / 2, bytes - 1].into_iter().chain(drawn).take(DAMAGES).collect()
}

/// Replays a copy whose file `name` is damaged; it has to end with status 1 and a line that names the file or the step. Two
/// things are no failure: a snapshot that a replay of everything does not begin with makes no difference to it; and a
/// recording whose first segment is no good, or not there, is replayed from the next one on, which is said.
fn assert_damage_is_told(golden: &Golden, copy: &Path, name: &str, what: &str) {
    let (code, _, words) = replay(copy, &["--verify"]);
    let path = copy.join(name).display().to_string();
    let is_named = words.contains(&path) || what == "removed";
    let begins_later = words.contains(" from step ") && !words.contains(&golden.words);
    let is_same = name.starts_with("snapshot-") && words.contains(&golden.words);
    if code == Some(0) && (is_same || begins_later && is_named) {
        return;
    }
    assert_eq!(code, Some(1), "{path}, {what}: {words}");
    let place = if what == "removed" { copy.display().to_string() } else { path.clone() };
    let says_where = words.contains(&place) || words.contains("diverged at step");
    assert!(says_where && !words.contains("panicked"), "{path}, {what}: {words}");
}

#[test]
fn golden_recordings_replay_as_they_did() {
    let all = all();
    let names: Vec<&str> = all.iter().map(|golden| golden.name.as_str()).collect();
    assert_eq!(names, NAMES);
    for golden in &all {
        // Without a word about the engine: the fastest that this host can have.
        for engine in [&[][..], &["--engine", "interpreter"]] {
            let ways: [&[&str]; 4] = [
                &[],
                &["--slice", "61"],
                &["--slice", "8191", "--drop-caches-every", "40009"],
                &["--slice", "1000003"],
            ];
            for way in ways {
                let args = [engine, way].concat();
                let (code, console, words) = replay(&golden.dir, &args);
                assert_eq!(code, Some(0), "{} {args:?}: {words}", golden.name);
                assert!(words.contains(&golden.words), "{} {args:?}: {words}", golden.name);
                assert_eq!(console, golden.console, "{} {args:?}", golden.name);
            }
            let (code, console, words) = replay(&golden.dir, &[engine, &["--verify"]].concat());
            assert_eq!((code, console.as_str()), (Some(0), ""), "{}: {words}", golden.name);
        }
        for engine in [None, Some(EngineKind::Interpreter)] {
            let digest = digest_at_the_end(&golden.dir, engine);
            assert_eq!(digest, golden.digest, "{}: {digest:x}", golden.name);
        }
    }
}

#[test]
fn damaged_copies_of_golden_recordings_are_never_taken_for_whole() {
    let work = tempfile::tempdir().expect("room for temporary files");
    for golden in all() {
        let copy = work.path().join(&golden.name);
        fs::create_dir(&copy).expect("a new directory");
        let mut files = Vec::new();
        for entry in fs::read_dir(&golden.dir).expect("it is there") {
            let path = entry.expect("it can be read").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("ASCII").to_owned();
            let bytes = fs::read(&path).expect("the file can be read");
            fs::write(copy.join(&name), &bytes).expect("room for a copy");
            files.push((name, bytes));
        }
        for (name, good) in &files {
            let path = copy.join(name);
            for at in places(good.len()) {
                fs::write(&path, &good[..at]).expect("room for a copy");
                assert_damage_is_told(&golden, &copy, name, &format!("cut at {at}"));
                let mut bytes = good.clone();
                bytes[at] ^= 1 << (at % 8);
                fs::write(&path, &bytes).expect("room for a copy");
                assert_damage_is_told(&golden, &copy, name, &format!("changed at {at}"));
            }
            fs::remove_file(&path).expect("it is there");
            assert_damage_is_told(&golden, &copy, name, "removed");
            fs::write(&path, good).expect("room for a copy");
        }
        assert_eq!(replay(&copy, &["--verify"]).0, Some(0), "{} whole again", golden.name);
    }
}
