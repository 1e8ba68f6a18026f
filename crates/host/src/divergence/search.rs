//! The search for the first step that two runs of a machine do not agree on.
//!
//! # Invariants
//! - INV-SEARCH-1: both runs stand in the same state at the base, and what they make of it at the upper end is not the same.
//!
//! Where a run ends, an engine may leave the last steps to another one, and what is wrong in a piece of generated code may
//! take more than one instruction of it. So a step at which all is well says nothing by itself: the base moves there only
//! if what follows from there on is not the same, either.

/// Steps that are looked at one by one.
const SCAN_MAX: u64 = 1024;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// The one by which the other is measured.
    Reference,
    /// The other one.
    Other,
}

/// Two runs of a machine that begin at a base.
pub(super) trait Runs {
    /// What a state is compared by.
    type State: PartialEq;
    /// What it takes to go back to an earlier base.
    type Before;

    /// Step of the base.
    fn base(&self) -> u64;
    /// The state that a run comes to at a step.
    fn state(&mut self, run: Run, step: u64) -> Self::State;
    /// Makes the state of a later step, at which they agree, the base.
    fn advance(&mut self, step: u64) -> Self::Before;
    /// Undoes that.
    fn retreat(&mut self, before: Self::Before);
}

/// Two runs that are known to differ.
pub(super) struct Search<'a, R: Runs> {
    runs: &'a mut R,
    /// The upper end.
    to: u64,
    /// The reference's state there.
    there: R::State,
}

impl<'a, R: Runs> Search<'a, R> {
    /// Begins at the base. `None` when they do not differ at the step `to`.
    pub(super) fn begin(runs: &'a mut R, to: u64) -> Option<Self> {
        let there = runs.state(Run::Reference, to);
        let mut search = Self { runs, to, there };
        search.differs_at_end().then_some(search)
    }

    fn differs_at_end(&mut self) -> bool {
        self.runs.state(Run::Other, self.to) != self.there
    }

    /// Whether they differ at `step`; if so, that is the upper end now.
    fn cut_above(&mut self, step: u64) -> bool {
        let there = self.runs.state(Run::Reference, step);
        if self.runs.state(Run::Other, step) == there {
            return false;
        }
        (self.to, self.there) = (step, there);
        true
    }

    /// Whether they differ from `step` on as well; if so, that is the base now.
    fn cut_below(&mut self, step: u64) -> bool {
        let before = self.runs.advance(step);
        if self.differs_at_end() {
            return true;
        }
        self.runs.retreat(before);
        false
    }

    /// Halves what lies between the ends until nothing can be taken away. The base is then the lower end; the upper one is
    /// given back. `told` hears of both on the way.
    pub(super) fn run(mut self, told: &mut dyn FnMut(u64, u64)) -> u64 {
        let middle = |low: u64, high: u64| low + (high - low) / 2;
        while self.to - self.runs.base() > 1 {
            told(self.runs.base(), self.to);
            let step = middle(self.runs.base(), self.to);
            if !self.cut_above(step) && !self.cut_below(step) {
                self.shrink_around(step);
                break;
            }
        }
        self.scan();
        self.to
    }

    /// What is left may hold something smaller that is wrong by itself: looks at each step, if they are few.
    fn scan(&mut self) {
        let base = self.runs.base();
        if self.to - base > SCAN_MAX {
            return;
        }
        for step in (base + 1..self.to).rev() {
            if self.cut_below(step) {
                break;
            }
        }
        for step in self.runs.base() + 1..self.to {
            if self.cut_above(step) {
                break;
            }
        }
    }

    /// What is wrong lies across `step`: takes away what is not needed on either side.
    fn shrink_around(&mut self, step: u64) {
        let mut not_from = step;
        while not_from - self.runs.base() > 1 {
            let middle = self.runs.base() + (not_from - self.runs.base()) / 2;
            if !self.cut_below(middle) {
                not_from = middle;
            }
        }
        let mut not_to = step;
        while self.to - not_to > 1 {
            let middle = not_to + (self.to - not_to) / 2;
            if !self.cut_above(middle) {
                not_to = middle;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    /// Runs whose states are the same until the other one has made all steps of one of `wrong` without a stop in between.
    struct Toy {
        base: u64,
        wrong: Vec<Range<u64>>,
        trials: usize,
    }

    fn toy(base: u64, wrong: impl IntoIterator<Item = Range<u64>>) -> Toy {
        Toy { base, wrong: wrong.into_iter().collect(), trials: 0 }
    }

    impl Runs for Toy {
        type State = (u64, bool);
        type Before = u64;

        fn base(&self) -> u64 {
            self.base
        }

        fn state(&mut self, run: Run, step: u64) -> (u64, bool) {
            self.trials += 1;
            assert!(self.base <= step);
            let is_in = |wrong: &Range<u64>| self.base <= wrong.start && wrong.end <= step;
            (step, run == Run::Other && self.wrong.iter().any(is_in))
        }

        fn advance(&mut self, step: u64) -> u64 {
            assert!(self.base <= step);
            std::mem::replace(&mut self.base, step)
        }

        fn retreat(&mut self, before: u64) {
            self.base = before;
        }
    }

    #[test]
    fn one_wrong_step_is_found_wherever_it_is() {
        for high in [2, 3, 64, 1000, 4097] {
            for step in 0..high {
                let mut toy = toy(0, Some(step..step + 1));
                let to = Search::begin(&mut toy, high).unwrap().run(&mut |_, _| ());
                assert_eq!((toy.base, to), (step, step + 1));
            }
        }
    }

    #[test]
    fn steps_that_are_wrong_together_alone_are_found_together() {
        for length in [2, 3, 17, 64] {
            for start in 0..300 {
                let wrong = start..start + length;
                let mut toy = toy(0, Some(wrong.clone()));
                let to = Search::begin(&mut toy, 400).unwrap().run(&mut |_, _| ());
                assert_eq!(toy.base..to, wrong);
            }
        }
    }

    #[test]
    fn something_smaller_within_what_is_wrong_is_found() {
        for start in 100..300 {
            let mut toy =
                toy(0, [start..start + 90, start + 7..start + 81, start + 40..start + 45]);
            let to = Search::begin(&mut toy, 512).unwrap().run(&mut |_, _| ());
            assert_eq!(toy.base..to, start + 40..start + 45);
        }
    }

    #[test]
    fn the_number_of_trials_grows_with_the_logarithm() {
        let start = 123_456_789_012;
        let mut toy = toy(7, Some(start..start + 20));
        let to = Search::begin(&mut toy, 1 << 40).unwrap().run(&mut |from, to| {
            assert!(from <= start && start + 20 <= to);
        });
        assert_eq!((toy.base, to), (start, start + 20));
        assert!(toy.trials < 5 * 40, "{}", toy.trials);
    }

    #[test]
    fn runs_that_agree_are_not_searched() {
        let mut toy = toy(0, Some(50..60));
        assert!(Search::begin(&mut toy, 59).is_none());
        assert!(Search::begin(&mut toy, 60).is_some());
    }
}
