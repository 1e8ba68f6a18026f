//! Precedence for the threads that others wait for.
//!
//! Nice values say nothing between sessions on a desktop kernel (autogroup), and on a loaded host a thread that wants the
//! processor for some microseconds may wait for hundreds of milliseconds: long enough to be taken for dead. The threads
//! that acknowledge log, release output and keep time therefore ask for the lowest real-time priority.

#![expect(unsafe_code, reason = "no safe interface sets a scheduling policy")]

/// Puts the calling thread before all ordinary ones; a wish, which takes CAP_SYS_NICE. Whether it was granted. What the
/// thread starts is ordinary again.
pub(crate) fn realtime() -> bool {
    let param = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the call reads `param`, which outlives it, and is about the calling thread alone.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
    result == 0
}

#[cfg(test)]
mod tests {
    #[test]
    fn asking_does_no_harm() {
        std::thread::spawn(|| {
            let first = super::realtime();
            assert_eq!(super::realtime(), first);
        })
        .join()
        .unwrap();
    }
}
