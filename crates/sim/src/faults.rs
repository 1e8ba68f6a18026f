//! What goes wrong.

use replica::Event;

use crate::checks::Violation;
use crate::shell::ToHost;
use crate::world::{ARBITER, Ev, HOSTS, World};

impl World {
    /// Injects a fault and schedules its end and the next one.
    pub(crate) fn fault(&mut self) -> Result<(), Violation> {
        if !self.has_faults {
            return Ok(());
        }
        self.report.faults += 1;
        let next = self.now + self.rng.range(1_000, 90_000);
        self.schedule(next, Ev::Fault);
        let host = self.rng.index(HOSTS);
        match self.rng.range(0, 19) {
            0..=3 => {
                let a = self.rng.index(HOSTS + 1);
                let b = (a + 1 + self.rng.index(HOSTS)) % (HOSTS + 1);
                self.cut(a, b);
            }
            4 => {
                for other in (0..=HOSTS).filter(|&other| other != host) {
                    self.cut(host, other);
                }
            }
            5..=8 => self.reset_links(),
            9..=10 => {
                let silent = self.rng.one_in(2);
                self.crash(host, silent);
                let at = self.now + self.rng.range(5_000, 150_000);
                self.schedule(at, Ev::Restart(host));
            }
            11..=13 => {
                self.hosts[host].is_paused = true;
                let at = self.now + self.rng.range(2_000, 120_000);
                self.schedule(at, Ev::Resume(host));
            }
            14 => self.hosts[host].skew += self.rng.range(5_000, 200_000),
            15 => {
                self.arbiter.is_down = true;
                let at = self.now + self.rng.range(5_000, 80_000);
                self.schedule(at, Ev::ArbiterUp);
            }
            16 => {
                let all = 0..HOSTS;
                all.for_each(|host| self.schedule_host(0, host, ToHost::Core(Event::SwitchOver)));
            }
            17 => {
                let wanted = self.rng.one_in(2);
                (0..HOSTS).for_each(|host| self.set_protection(host, wanted));
            }
            18 => (0..HOSTS).for_each(|host| self.set_protection(host, true)),
            _ => {
                let reason = "out of memory".into();
                self.schedule_host(0, host, ToHost::Core(Event::ReplicaFailed { reason }));
            }
        }
        Ok(())
    }

    fn cut(&mut self, a: usize, b: usize) {
        self.net.cut(a, b);
        let longest = if a == ARBITER || b == ARBITER { 80_000 } else { 120_000 };
        let at = self.now + self.rng.range(1_000, longest);
        self.schedule(at, Ev::Mend(a, b));
    }

    fn reset_links(&mut self) {
        if self.net.links.is_empty() {
            return;
        }
        let recent = self.net.links.len().min(2);
        let index = self.net.links.len() - 1 - self.rng.index(recent);
        let arrivals = self.net.reset(self.now, &mut self.rng, index);
        self.schedule_arrivals(arrivals);
    }
}
