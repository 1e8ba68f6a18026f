//! Thousands of histories, and proof that broken rules would be noticed.

use sim::{Mutation, Options, run, run_with};

const SEEDS: u64 = 4_000;
const THREADS: u64 = 4;

#[test]
fn no_history_breaks_an_invariant() {
    let workers: Vec<_> = (0..THREADS)
        .map(|worker| {
            std::thread::spawn(move || {
                let (mut failovers, mut lost) = (0, 0);
                for seed in (worker..SEEDS).step_by(THREADS as usize) {
                    match run(seed) {
                        Ok(report) => {
                            failovers += report.failovers;
                            lost += u64::from(report.is_lost);
                        }
                        Err(violation) => panic!("seed {seed}: {violation}"),
                    }
                }
                (failovers, lost)
            })
        })
        .collect();
    let (mut failovers, mut lost) = (0, 0);
    for worker in workers {
        let (f, l) = worker.join().unwrap();
        failovers += f;
        lost += l;
    }
    // The histories must be worth something: many failovers, few VMs lost with all of their copies.
    assert!(failovers > SEEDS, "{failovers} failovers");
    assert!(lost < SEEDS / 4, "{lost} lost");
}

#[test]
fn long_histories_hold() {
    for seed in 0..40 {
        let options = Options { faults_us: 5_000_000, ..Options::default() };
        if let Err(violation) = run_with(seed, options) {
            panic!("seed {seed}: {violation}");
        }
    }
}

#[test]
fn same_seed_gives_same_history() {
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed));
    }
}

/// Which invariant is seen broken, and by which seed first.
fn caught(mutation: Mutation) -> Option<(u64, &'static str)> {
    let options = Options { mutation: Some(mutation), ..Options::default() };
    (0..4_000).find_map(|seed| Some((seed, run_with(seed, options).err()?.invariant)))
}

#[test]
fn every_broken_rule_is_noticed() {
    for (mutation, invariants) in [
        (Mutation::ReleaseBeforeAck, &["INV-REPLICA-1", "INV-REPLICA-3"][..]),
        (Mutation::GoLiveUnasked, &["INV-REPLICA-2"]),
        (Mutation::AloneUnasked, &["INV-REPLICA-1", "INV-REPLICA-5"]),
        (Mutation::AdmitUnheld, &["INV-REPLICA-3", "INV-REPLICA-1"]),
        (Mutation::ClaimUnnamed, &["INV-REPLICA-3", "INV-REPLICA-1"]),
        (Mutation::GoLiveEarly, &["INV-REPLICA-4"]),
        (Mutation::StaleAcks, &["INV-REPLICA-5"]),
        (Mutation::NeverReplace, &["INV-REPLICA-6"]),
    ] {
        let found = caught(mutation);
        let is_expected = found.is_some_and(|(_, invariant)| invariants.contains(&invariant));
        assert!(is_expected, "{mutation:?}: {found:?}");
    }
}
