//! Arbiter in a directory on shared storage, local or NFS: a generation belongs to whoever links its file first.
//!
//! # Place
//! See [`super`]. Calls block as long as the file system does; a hard NFS mount may block for minutes.
//!
//! # Invariants
//! - `VM.gen.N` is created by link(2) of a finished, fsynced file with a unique name, never by open or rename: link is
//!   exclusive on NFS v3 and v4 too, and a reader never sees half a record. The answer to link may be lost and the call
//!   repeated, so the unique file's link count decides, as open(2) advises.
//! - INV-DIR-1: `VM.gen.N` is removed only when a generation above N + 8 exists; generation 1 and the highest are never
//!   removed. So a claimant that links N and then finds nothing above N + 8 is the only one that N ever had. One that
//!   does find it came too late, takes its link back and has lost.
//!
//! # Failure
//! A crash leaves at most a `.VM.tmp.*` file, which a later claim removes after an hour by the file server's clock.
//! The directory is not created here: a share that is not mounted must not look like an empty arbiter.
//!
//! # Format
//! `VM.gen.N` (N in decimal) holds [`Record::encode`]; the highest N is in force.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::{
    Arbiter, ArbiterError, CasOutcome, FIRST_GENERATION, RECORD_BYTES_MAX, Record, check_claim,
    check_vm,
};

/// How many generations stay beside the first.
const GENERATIONS_KEPT: u64 = 8;
/// How often a read starts over when files go away under it.
const READ_TRIES: u32 = 16;
/// Age at which somebody's temporary file counts as left behind, in seconds.
const TEMP_AGE_S: i64 = 3600;

/// The arbiter; see the module.
#[derive(Debug)]
pub struct DirArbiter {
    dir: PathBuf,
}

impl DirArbiter {
    /// Uses `dir`, which has to exist.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`] when it is not a directory that can be read.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, ArbiterError> {
        let arbiter = Self { dir: dir.into() };
        let meta = fs::metadata(&arbiter.dir).map_err(|e| arbiter.unreachable("look at", &e))?;
        if !meta.is_dir() {
            return Err(arbiter.unreachable("use", &io::Error::other("it is not a directory")));
        }
        Ok(arbiter)
    }

    fn unreachable(&self, action: &str, e: &io::Error) -> ArbiterError {
        ArbiterError::Unreachable { arbiter: self.describe(), reason: format!("{action}: {e}") }
    }

    fn ambiguous(&self, action: &str, e: &io::Error) -> ArbiterError {
        ArbiterError::Ambiguous { arbiter: self.describe(), reason: format!("{action}: {e}") }
    }

    fn file(&self, vm: &str, generation: u64) -> PathBuf {
        self.dir.join(format!("{vm}.gen.{generation}"))
    }

    /// Generations that have a file, ascending. The directory is opened anew, which makes an NFS client revalidate it.
    fn generations(&self, vm: &str) -> io::Result<Vec<u64>> {
        let prefix = format!("{vm}.gen.");
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let digits = name.to_str().and_then(|n| n.strip_prefix(&prefix));
            if let Some(digits) = digits
                && let Ok(generation) = digits.parse::<u64>()
                && generation.to_string() == digits
            {
                found.push(generation);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn read_record(&self, vm: &str, generation: u64) -> Result<Option<Record>, ArbiterError> {
        let path = self.file(vm, generation);
        let bytes = match read_bounded(&path) {
            Ok(bytes) => bytes,
            Err(e) if is_gone(&e) => return Ok(None),
            Err(e) => return Err(self.unreachable("read", &e)),
        };
        let malformed = |reason| ArbiterError::Malformed {
            arbiter: self.describe(),
            place: path.display().to_string(),
            reason,
        };
        let record = Record::decode(&bytes).map_err(malformed)?;
        if record.generation != generation {
            let reason = format!("it holds generation {}", record.generation);
            return Err(malformed(reason));
        }
        Ok(Some(record))
    }

    /// Writes the record under a unique name and makes it durable.
    fn write_temp(&self, vm: &str, record: &Record) -> io::Result<Temp> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let unique = format!(
            ".{vm}.tmp.{:016x}.{}.{}",
            u64::from_le_bytes(random),
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let path = self.dir.join(unique);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path)?;
        let temp = Temp { path };
        file.write_all(&record.encode())?;
        file.sync_all()?;
        Ok(temp)
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Links the temporary file to `VM.gen.N`; whether it now belongs to this attempt.
    fn link(&self, temp: &Temp, target: &Path) -> Result<bool, ArbiterError> {
        let linked = fs::hard_link(&temp.path, target);
        // The file is opened anew so that an NFS client asks the server for the link count.
        let links = File::open(&temp.path).and_then(|f| f.metadata()).map(|m| m.nlink());
        match (linked, links) {
            (_, Ok(2)) => Ok(true),
            (Err(e), Ok(_)) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            (Err(e), Ok(1)) if is_refusal(&e) => Err(self.unreachable("link", &e)),
            (Err(e), _) | (Ok(()), Err(e)) => Err(self.ambiguous("link", &e)),
            (Ok(()), Ok(n)) => {
                let e = io::Error::other(format!("link count is {n} after a link that succeeded"));
                Err(self.ambiguous("link", &e))
            }
        }
    }

    /// Removes old generations, oldest first (INV-DIR-1). What cannot be removed now waits for the next claim.
    fn clean(&self, vm: &str, newest: u64) {
        let Ok(found) = self.generations(vm) else { return };
        let old = |g: &u64| *g > FIRST_GENERATION && newest > kept_until(*g);
        for generation in found.into_iter().filter(old) {
            match fs::remove_file(self.file(vm, generation)) {
                Ok(()) => {}
                Err(e) if is_gone(&e) => {}
                Err(_) => return,
            }
        }
    }

    /// Removes temporary files that are much older than `temp`, by the clock of the file server.
    fn clean_temps(&self, vm: &str, temp: &Temp) {
        let Ok(now) = fs::metadata(&temp.path).map(|m| m.mtime()) else { return };
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let prefix = OsString::from(format!(".{vm}.tmp."));
        for entry in entries.flatten() {
            let ours = entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes());
            if ours
                && let Ok(meta) = entry.metadata()
                && now.saturating_sub(meta.mtime()) > TEMP_AGE_S
                && fs::remove_file(entry.path()).is_err()
            {
                return;
            }
        }
    }

    fn lost(&mut self, vm: &str) -> Result<CasOutcome, ArbiterError> {
        Ok(CasOutcome::Lost { current: self.read(vm)? })
    }
}

impl Arbiter for DirArbiter {
    fn read(&mut self, vm: &str) -> Result<Option<Record>, ArbiterError> {
        check_vm(vm)?;
        for _ in 0..READ_TRIES {
            let found = match self.generations(vm) {
                Ok(found) => found,
                Err(e) if is_stale(&e) => continue,
                Err(e) => return Err(self.unreachable("list", &e)),
            };
            let Some(&newest) = found.last() else { return Ok(None) };
            if let Some(record) = self.read_record(vm, newest)? {
                return Ok(Some(record));
            }
        }
        Err(self.unreachable("read", &io::Error::other("files change too fast")))
    }

    fn compare_and_set(
        &mut self,
        vm: &str,
        expected: Option<u64>,
        new: &Record,
    ) -> Result<CasOutcome, ArbiterError> {
        check_claim(vm, expected, new)?;
        let temp = self.write_temp(vm, new).map_err(|e| self.unreachable("write", &e))?;
        self.clean_temps(vm, &temp);
        if let Some(expected) = expected
            && !self.generations(vm).map_err(|e| self.unreachable("list", &e))?.contains(&expected)
        {
            return self.lost(vm);
        }
        let target = self.file(vm, new.generation);
        if self.link(&temp, &target)? {
            let found = self.generations(vm).map_err(|e| self.ambiguous("list", &e))?;
            if found.last().is_some_and(|newest| *newest > kept_until(new.generation)) {
                fs::remove_file(&target).map_err(|e| self.ambiguous("take back", &e))?;
                return self.lost(vm);
            }
        } else if self.read_record(vm, new.generation)?.as_ref() != Some(new) {
            return self.lost(vm);
        }
        // Either linked now, or this very record was stored by an attempt whose answer was lost.
        self.sync_dir().map_err(|e| self.ambiguous("sync", &e))?;
        self.clean(vm, new.generation);
        Ok(CasOutcome::Won)
    }

    fn describe(&self) -> String {
        format!("directory {}", self.dir.display())
    }
}

/// A file that is removed when the attempt is over; its contents live on under the name it was linked to.
#[derive(Debug)]
struct Temp {
    path: PathBuf,
}

impl Drop for Temp {
    fn drop(&mut self) {
        // A file that stays is removed by a later claim.
        drop(fs::remove_file(&self.path));
    }
}

/// While nothing above this exists, `generation` was never removed (INV-DIR-1).
fn kept_until(generation: u64) -> u64 {
    generation.saturating_add(GENERATIONS_KEPT)
}

/// Answers to link that say that nothing was done and nothing will be; others (EIO, ETIMEDOUT) may come from a request
/// that is still under way.
fn is_refusal(e: &io::Error) -> bool {
    const REFUSALS: [Errno; 8] = [
        Errno::PERM,
        Errno::ACCESS,
        Errno::OPNOTSUPP,
        Errno::ROFS,
        Errno::NOSPC,
        Errno::DQUOT,
        Errno::MLINK,
        Errno::NAMETOOLONG,
    ];
    REFUSALS.iter().any(|r| Some(r.raw_os_error()) == e.raw_os_error())
}

fn is_stale(e: &io::Error) -> bool {
    e.raw_os_error() == Some(Errno::STALE.raw_os_error())
}

fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || is_stale(e)
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = RECORD_BYTES_MAX as u64 + 1;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn record(generation: u64, live: &str, nonce: u64) -> Record {
        Record {
            generation,
            live: Some(live.to_owned()),
            secondary: None,
            nonce,
            copies: Vec::new(),
        }
    }

    #[test]
    fn generations_are_claimed_in_turn_and_read_back() {
        let tmp = tempfile::tempdir().unwrap();
        let mut a = DirArbiter::open(tmp.path()).unwrap();
        assert_eq!(a.read("vm").unwrap(), None);
        assert_eq!(a.compare_and_set("vm", None, &record(1, "a", 1)).unwrap(), CasOutcome::Won);
        let lost = a.compare_and_set("vm", None, &record(1, "b", 2)).unwrap();
        assert_eq!(lost, CasOutcome::Lost { current: Some(record(1, "a", 1)) });
        for g in 2..40 {
            let won = a.compare_and_set("vm", Some(g - 1), &record(g, "a", g)).unwrap();
            assert_eq!(won, CasOutcome::Won);
        }
        assert_eq!(a.read("vm").unwrap(), Some(record(39, "a", 39)));
        assert_eq!(a.read("vm.gen").unwrap(), None);
        let files = fs::read_dir(tmp.path()).unwrap().count() as u64;
        assert!(files <= GENERATIONS_KEPT + 3, "{files} files are left");
    }

    #[test]
    fn a_repeated_claim_after_a_lost_answer_is_won_again() {
        let tmp = tempfile::tempdir().unwrap();
        let mut a = DirArbiter::open(tmp.path()).unwrap();
        for _ in 0..2 {
            let won = a.compare_and_set("vm", None, &record(1, "a", 77)).unwrap();
            assert_eq!(won, CasOutcome::Won);
        }
    }

    #[test]
    fn a_claimant_that_slept_while_its_generation_was_cleaned_has_lost() {
        let tmp = tempfile::tempdir().unwrap();
        let mut a = DirArbiter::open(tmp.path()).unwrap();
        a.compare_and_set("vm", None, &record(1, "a", 0)).unwrap();
        for g in 2..40 {
            a.compare_and_set("vm", Some(g - 1), &record(g, "a", 0)).unwrap();
        }
        for (expected, claim) in [(Some(3), 4), (Some(1), 2), (None, 1)] {
            let lost = a.compare_and_set("vm", expected, &record(claim, "b", 9)).unwrap();
            assert_eq!(lost, CasOutcome::Lost { current: Some(record(39, "a", 0)) });
        }
        assert_eq!(a.read("vm").unwrap().unwrap().generation, 39);
    }

    #[test]
    fn racing_threads_have_one_winner_for_each_generation() {
        const THREADS: u64 = 8;
        const ROUNDS: u64 = 30;
        let tmp = tempfile::tempdir().unwrap();
        let barrier = Barrier::new(THREADS as usize);
        let wins: Vec<u64> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..THREADS)
                .map(|t| {
                    let (dir, barrier) = (tmp.path(), &barrier);
                    s.spawn(move || race(dir, t, ROUNDS, barrier))
                })
                .collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        let mut sorted = wins.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (1..=ROUNDS).collect::<Vec<_>>());
    }

    fn race(dir: &Path, me: u64, rounds: u64, barrier: &Barrier) -> Vec<u64> {
        let mut arbiter = DirArbiter::open(dir).unwrap();
        let mut won = vec![];
        for g in 1..=rounds {
            barrier.wait();
            let expected = (g > 1).then(|| g - 1);
            let outcome =
                arbiter.compare_and_set("vm", expected, &record(g, &me.to_string(), me)).unwrap();
            if outcome == CasOutcome::Won {
                won.push(g);
            }
        }
        won
    }

    /// Claims for as long as there are generations, without waiting for the others: stale expectations and cleaning
    /// overlap. Run as a process of its own by the test below.
    #[test]
    #[ignore = "is run by racing_processes_have_one_winner_for_each_generation"]
    fn racing_process() {
        let Some(dir) = std::env::var_os("UNDERSTUDY_RACE_DIR") else { return };
        let me = u64::from(std::process::id());
        let mut arbiter = DirArbiter::open(PathBuf::from(dir)).unwrap();
        loop {
            let expected = arbiter.read("vm").unwrap().map(|r| r.generation);
            let next = expected.map_or(1, |g| g + 1);
            if next > 300 {
                return;
            }
            let new = record(next, &me.to_string(), me);
            if arbiter.compare_and_set("vm", expected, &new).unwrap() == CasOutcome::Won {
                println!("won {next}.");
            }
        }
    }

    #[test]
    fn racing_processes_have_one_winner_for_each_generation() {
        let tmp = tempfile::tempdir().unwrap();
        let children: Vec<_> = (0..4)
            .map(|_| {
                std::process::Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "arbiter::directory::tests::racing_process"])
                    .args(["--ignored", "--nocapture"])
                    .env("UNDERSTUDY_RACE_DIR", tmp.path())
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let mut wins = vec![];
        for child in children {
            let out = child.wait_with_output().unwrap();
            assert!(out.status.success());
            let text = String::from_utf8(out.stdout).unwrap();
            let numbers = text.split("won ").skip(1).filter_map(|t| t.split('.').next());
            wins.extend(numbers.map(|n| n.parse::<u64>().unwrap()));
        }
        wins.sort_unstable();
        assert_eq!(wins, (1..=300).collect::<Vec<_>>());
    }

    #[test]
    fn malformed_files_and_missing_directories_are_told_apart() {
        let tmp = tempfile::tempdir().unwrap();
        let missing = DirArbiter::open(tmp.path().join("nothing")).unwrap_err();
        assert!(matches!(missing, ArbiterError::Unreachable { .. }));
        let mut a = DirArbiter::open(tmp.path()).unwrap();
        fs::write(tmp.path().join("vm.gen.3"), "half a rec").unwrap();
        assert!(matches!(a.read("vm"), Err(ArbiterError::Malformed { .. })));
        fs::write(tmp.path().join("vm.gen.4"), record(5, "a", 0).encode()).unwrap();
        assert!(matches!(a.read("vm"), Err(ArbiterError::Malformed { .. })));
        fs::write(tmp.path().join("vm.gen.09"), "not a generation").unwrap();
        fs::remove_file(tmp.path().join("vm.gen.4")).unwrap();
        assert!(a.read("vm").unwrap_err().to_string().contains("vm.gen.3"));
    }
}
