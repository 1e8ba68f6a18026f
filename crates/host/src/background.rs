//! Threads whose work can wait: that of a guest goes first where there are not CPUs enough for both.

/// Nice value: on a CPU that it shares with a machine that has always something to do, such a thread gets a quarter. A copy that
/// takes longer leaves its machine unprotected for longer.
const NICE: i32 = 5;

/// Makes the calling thread one of them, and those that it starts from now on. Whoever is not root cannot undo it.
pub(crate) fn enter() {
    // Linux has a nice value for each thread. An error leaves things as they are.
    rustix::process::setpriority_process(None, NICE).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_steps_back_alone() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let inside = std::thread::spawn(move || {
            enter();
            nice()
        });
        assert_eq!((inside.join().unwrap(), nice()), (NICE, before));
    }
}
