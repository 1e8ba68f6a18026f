//! What is looked at while a load runs: log, lag, and how fast either replica's CPU is.
//!
//! # Why the slower CPU
//! A protected machine is where its primary is and, but for the lag, where its secondary is: over any time that is longer than
//! the lag may be, both have done the same steps. Where the speed of CPUs changes from moment to moment, as that of a virtual
//! machine's does, a protected machine has the slower one of each moment; an unprotected one has its own.
//! [`Samples::slower_cpu`] says how much less that is. What replaying costs the secondary of its CPU time is in it too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use crate::bench::figure::largest;
use crate::bench::speed::cpu_seconds;
use crate::demo::control::Control;
use crate::demo::lab::VM;

/// How often it is looked.
const SAMPLE: Duration = Duration::from_millis(250);
/// Samples in which the speeds of CPUs are compared: about as long as it takes until a slower secondary slows its primary.
const SPEED_SAMPLES: usize = 4;

/// Steps of the guest, and seconds of CPU time of the daemon, up to a moment.
type Progress = (u64, f64);

/// What was seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples {
    /// Bytes of log in a second.
    log: Vec<f64>,
    /// Milliseconds.
    lags: Vec<f64>,
    /// Of primary and secondary.
    progress: Vec<(Progress, Progress)>,
}

impl Samples {
    /// The log's bandwidth, in megabits a second.
    pub(super) fn log_mbit(&self) -> Option<f64> {
        let mean = self.log.iter().sum::<f64>() / self.log.len() as f64;
        (!self.log.is_empty()).then_some(mean * 8.0 / 1e6)
    }

    /// The largest lag, in milliseconds.
    pub(super) fn lag_ms(&self) -> Option<f64> {
        largest(self.lags.iter().copied())
    }

    /// Steps in a second of CPU time: the mean of the slower replica's at each time, divided by the primary's.
    pub(super) fn slower_cpu(&self) -> Option<f64> {
        let at = self.progress.iter().step_by(SPEED_SAMPLES);
        let speed = |from: Progress, to: Progress| {
            let seconds = to.1 - from.1;
            (seconds > 0.0).then(|| to.0.saturating_sub(from.0) as f64 / seconds)
        };
        let speeds: Vec<_> = at
            .clone()
            .zip(at.skip(1))
            .filter_map(|(from, to)| Some((speed(from.0, to.0)?, speed(from.1, to.1)?)))
            .collect();
        let slower: f64 = speeds.iter().map(|(primary, secondary)| primary.min(*secondary)).sum();
        let primary: f64 = speeds.iter().map(|(primary, _)| primary).sum();
        (primary > 0.0).then(|| slower / primary)
    }
}

/// A host's daemon: where it is asked, and its process.
pub(super) type Daemon = (Control, u32);

/// Looks while a load runs.
pub(super) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Samples>,
}

impl Sampler {
    pub(super) fn start(live: Daemon, secondary: Option<Daemon>) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let work = move || {
            let mut samples = Samples::default();
            let begun = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(SAMPLE);
                // The daemon tells what there was in the second before.
                if begun.elapsed() > Duration::from_secs(1) {
                    look(&live, secondary.as_ref(), &mut samples);
                }
            }
            samples
        };
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(work)?;
        Ok(Self { stop, thread })
    }

    pub(super) fn finish(self) -> anyhow::Result<Samples> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the sampler stopped"))
    }
}

/// One look; a daemon that does not answer is not in it.
fn look(live: &Daemon, secondary: Option<&Daemon>, samples: &mut Samples) {
    let ask = |(control, process): &Daemon| {
        let view = control.view(VM)?;
        Some((view.icount, cpu_seconds(*process).ok()?, view))
    };
    let Some((steps, cpu, view)) = ask(live) else { return };
    samples.log.push(view.log_bytes_per_s as f64);
    samples.lags.push(view.lag_ms as f64);
    if let Some((its_steps, its_cpu, _)) = secondary.and_then(ask) {
        samples.progress.push(((steps, cpu), (its_steps, its_cpu)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_cpu_is_that_of_each_time() {
        let at = |primary, secondary| vec![(primary, secondary); SPEED_SAMPLES];
        let progress = [
            at((0, 0.0), (0, 0.0)),
            at((100, 1.0), (90, 1.0)),
            at((180, 2.0), (200, 2.0)),
            // It waits: what it does in its CPU time counts.
            at((280, 3.0), (250, 2.5)),
        ];
        let samples = Samples { progress: progress.concat(), ..Samples::default() };
        assert_eq!(samples.slower_cpu(), Some((90.0 + 80.0 + 100.0) / (100.0 + 80.0 + 100.0)));
        let none = Samples::default();
        assert_eq!((none.slower_cpu(), none.log_mbit(), none.lag_ms()), (None, None, None));
    }
}
