//! Threads whose work can wait: that of a guest goes first where there are not CPUs enough for both.

use rustix::process::{getpriority_process, setpriority_process};

/// Added to the nice value that the daemon has: on a CPU that it shares with a machine that has always something to do, such a
/// thread gets a quarter. A copy that takes longer leaves its machine unprotected for longer.
const NICER: i32 = 5;

/// Makes the calling thread one of them, and those that it starts from now on. Whoever is not root cannot undo it.
pub(crate) fn enter() {
    // Linux has a nice value for each thread. An error leaves things as they are.
    let stepped_back =
        getpriority_process(None).and_then(|nice| setpriority_process(None, nice + NICER));
    stepped_back.unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_steps_back_alone() {
        let nice = || getpriority_process(None).unwrap();
        let before = nice();
        let inside = std::thread::spawn(move || {
            enter();
            nice()
        });
        assert_eq!((inside.join().unwrap(), nice()), ((before + NICER).min(19), before));
    }
}
