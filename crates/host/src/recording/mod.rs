//! Recordings: a directory with everything that a machine needs to run again, step by step, anywhere.
//!
//! # Place
//! The loop of a machine, a live one or a secondary, tells a [`Recorder`] each input, digest and mark; threads of its own
//! write them. [`RecordingDir`] opens such a directory, [`Player`] runs its machine again, [`Timeline`] goes to and fro.
//!
//! # Invariants
//! - INV-RECORD-1: the log holds every input with all that it carries, the data of disk reads as well, so that a
//!   recording needs no disk. A copy of the disk would be smaller in the long run, but takes as long as the disk is
//!   large, and would have to be replayed with it.
//! - INV-RECORD-2: recording never holds up the guest and never stops it. What cannot be written ends the recording,
//!   with one line; what was written until then replays.
//! - INV-RECORD-3: a segment that does not begin at power-on begins with a snapshot. Nothing that a later segment needs
//!   is removed before what stands for it is complete.
//!
//! # Failure
//! A recording whose VM died is one that is cut off: it replays up to there. Nothing is left behind of a recording that
//! could not be started.
//!
//! # Format
//! `machine`: see [`start`]. `bios`, `kernel`, `initrd`: what the machine boots, as far as it has them. `log-ICOUNT`:
//! segments of [`eventlog`], named by the step at which they begin, each going on where the one before ends; their identity
//! is the SHA-256 at the end of `machine`. `snapshot-ICOUNT`: the machine at the beginning of the segment of that name, see
//! [`crate::snapshot`]. Version 1 had a single segment, `log`, and no snapshots. Nobody but the owner may read them: guest
//! memory can be had from them.

mod cursor;
mod dir;
mod extract;
mod info;
mod limit;
mod log_writer;
mod player;
mod recorder;
pub mod start;
mod timeline;
mod trim;
mod when;

pub use self::cursor::ReplayEnd;
pub use self::dir::{OpenRecordingError, RecordingDir, SegmentFile, SnapshotFile};
pub use self::extract::{DiskExtract, Extract, ExtractError};
pub use self::info::{EntryKind, KindTotals, RecordingInfo};
pub use self::limit::{RecordLimit, parse_duration};
pub(crate) use self::player::Mark;
pub use self::player::{Observer, Player, Ran, ReplayOptions, Replayed, play, replay};
pub(crate) use self::recorder::{Prepared, Recorder, unix_ms};
pub use self::recorder::{RecordOptions, SNAPSHOT_INTERVAL_DEFAULT, StartRecordingError};
pub use self::start::About;
pub(crate) use self::start::image_hashes;
pub(crate) use self::timeline::merged;
pub use self::timeline::{Checkpoint, Stop, Timeline, Watch};
pub use self::when::{BadWhen, When, rfc3339};
