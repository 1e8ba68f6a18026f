//! One round of the demo: hurt the live host, see what the client sees, wait for protection, mend.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use host::control::VmStatus;

use super::client::{Client, Watched};
use super::control::{is_protected, words};
use super::fault::{Fault, FaultChoice};
use super::progress::Progress;
use super::report::{Report, Round};

/// Longest wait for the machine to be protected again.
const PROTECTED_MAX: Duration = Duration::from_secs(180);
/// Longest wait for the first acknowledgement, and for one after a failover.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Undisturbed time before a fault.
const CALM: Duration = Duration::from_secs(1);

/// What a round needs of the hosts; there is one implementation for real ones, and one in the tests.
pub(crate) trait Cluster {
    /// The machine as `host` sees it, or as any host does; `None` when nobody answers.
    fn view(&self, not: Option<&str>) -> Option<VmStatus>;
    /// Does `fault` to `host`.
    fn inflict(&mut self, fault: Fault, host: &str) -> anyhow::Result<()>;
    /// Undoes it: `host` is a spare again.
    fn mend(&mut self, fault: Fault, host: &str, progress: &Progress) -> anyhow::Result<()>;
}

/// Waits until the machine is protected, by a pair of hosts without `not`; how the hosts see it then.
pub(crate) fn wait_protected(
    cluster: &impl Cluster,
    not: Option<&str>,
    bound: Duration,
    progress: &Progress,
) -> anyhow::Result<VmStatus> {
    progress.wait_for("protection", bound, Duration::from_millis(50), |note| {
        let Some(view) = cluster.view(not) else {
            note.push_str("no host answers");
            return Ok(None);
        };
        note.push_str(&words(&view));
        let apart = not.is_none_or(|old| {
            [&view.live_host, &view.secondary_host]
                .into_iter()
                .all(|host| host.as_deref() != Some(old))
        });
        Ok((is_protected(&view) && view.live_host.is_some() && apart).then_some(view))
    })
}

/// Waits until the machine has been protected on the same hosts for a while: a fault while its secondary is being
/// replaced would be a double one, which nobody promises to survive. Returns the live host.
fn wait_calm(cluster: &impl Cluster, progress: &Progress) -> anyhow::Result<String> {
    let begun = Instant::now();
    loop {
        let before = wait_protected(cluster, None, PROTECTED_MAX, progress)?;
        std::thread::sleep(CALM);
        let after = wait_protected(cluster, None, PROTECTED_MAX, progress)?;
        if after.generation == before.generation {
            return after.live_host.context("a protected machine has a live host");
        }
        progress.say("the secondary was replaced meanwhile: waiting for a calm moment");
        anyhow::ensure!(begun.elapsed() < PROTECTED_MAX, "the machine does not stay protected");
    }
}

/// One round, counted from 0.
pub(crate) fn run_round(
    cluster: &mut impl Cluster,
    client: &impl Watched,
    index: u32,
    fault: Fault,
    progress: &Progress,
) -> anyhow::Result<Round> {
    let from = wait_calm(cluster, progress)?;
    client.begin_window();
    let acked_before = client.seen().acked;
    progress.say(&format!(
        "round {}: {} on {from}, {acked_before} writes acknowledged",
        index + 1,
        fault.name()
    ));
    let begun = Instant::now();
    let begun_unix_ms = unix_ms();
    cluster.inflict(fault, &from)?;
    let after = wait_protected(cluster, Some(&from), PROTECTED_MAX, progress);
    let protected_again = begun.elapsed();
    // Mended in any case, so that a failed round can be studied with all hosts up.
    cluster.mend(fault, &from, progress)?;
    let after = after?;
    // From what is acknowledged now on, so that the gap is over when it is read.
    wait_answers(client, client.seen().acked, progress)?;
    let seen = client.seen();
    let round = Round {
        round: index + 1,
        fault,
        from,
        to: after.live_host.unwrap_or_default(),
        gap_ms: seen.gap(Instant::now()).as_secs_f64() * 1000.0,
        failover: after.failover.filter(|failover| failover.at_unix_ms >= begun_unix_ms),
        connection_broken: seen.broken.is_some(),
        writes_acked: seen.acked,
        protected_again_s: protected_again.as_secs_f64(),
    };
    progress.say(&format!(
        "round {}: {} is live, gap {:.0} ms, protected again after {:.1} s",
        round.round, round.to, round.gap_ms, round.protected_again_s
    ));
    Ok(round)
}

/// Waits until the client has had answers beyond `acked`, or its connection is broken.
pub(crate) fn wait_answers(
    client: &impl Watched,
    acked: u64,
    progress: &Progress,
) -> anyhow::Result<()> {
    progress.wait_for("answers to the client", ANSWER_MAX, Duration::from_millis(10), |_| {
        let seen = client.seen();
        Ok((seen.acked > acked + 10 || seen.broken.is_some()).then_some(()))
    })
}

/// All rounds, until one fails or the connection breaks; then `count_lost` is told how many writes were acknowledged,
/// reads everything back and says how many are missing. What failed first, if anything did, comes with the report.
pub(crate) fn run_rounds(
    cluster: &mut impl Cluster,
    client: Client,
    choice: (FaultChoice, u32),
    count_lost: impl FnOnce(u64) -> anyhow::Result<u64>,
    progress: &Progress,
) -> (Report, Option<anyhow::Error>) {
    let mut rounds = Vec::new();
    let mut failure = wait_answers(&client, 0, progress).err();
    for index in 0..choice.1 {
        if failure.is_some() || client.seen().broken.is_some() {
            break;
        }
        match run_round(cluster, &client, index, choice.0.for_round(index), progress) {
            Ok(round) => rounds.push(round),
            Err(error) => failure = Some(error.context(format!("round {}", index + 1))),
        }
    }
    let seen = client.finish();
    progress.say(&format!("reading {} acknowledged writes back", seen.acked));
    let (writes_lost, unread) = match count_lost(seen.acked) {
        Ok(lost) => (Some(lost), None),
        Err(error) => (None, Some(error.context("read the writes back"))),
    };
    let report =
        Report { rounds, writes_acked: seen.acked, writes_lost, connection_broken: seen.broken };
    (report, failure.or(unread))
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use host::control::Protection;

    use super::super::control::sample;
    use super::*;

    /// Hosts that fail over at once, or never when `stuck`.
    struct Fake {
        view: VmStatus,
        stuck: bool,
        mended: u32,
    }

    impl Cluster for Fake {
        fn view(&self, _not: Option<&str>) -> Option<VmStatus> {
            Some(self.view.clone())
        }

        fn inflict(&mut self, _fault: Fault, host: &str) -> anyhow::Result<()> {
            assert_eq!(host, "h1");
            if !self.stuck {
                self.view = sample(Protection::Protected, "h2", "h3");
            }
            Ok(())
        }

        fn mend(&mut self, _fault: Fault, _host: &str, _progress: &Progress) -> anyhow::Result<()> {
            self.mended += 1;
            Ok(())
        }
    }

    #[test]
    fn protection_counts_only_without_the_failed_host() {
        let fake = |secondary| Fake {
            view: sample(Protection::Protected, "h2", secondary),
            stuck: false,
            mended: 0,
        };
        let progress = Progress::new();
        assert!(wait_protected(&fake("h1"), Some("h1"), Duration::ZERO, &progress).is_err());
        assert!(wait_protected(&fake("h3"), Some("h1"), Duration::ZERO, &progress).is_ok());
        let starting =
            Fake { view: sample(Protection::NotProtected, "h2", "h3"), stuck: true, mended: 0 };
        let error = wait_protected(&starting, None, Duration::ZERO, &progress).unwrap_err();
        assert!(error.to_string().ends_with("Not Protected"), "{error}");
    }
}
