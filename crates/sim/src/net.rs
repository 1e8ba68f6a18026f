//! Links between hosts: ordered, reliable while they last, like TCP. A cut stalls them; a break loses what is under way.

use std::collections::VecDeque;

use replica::LinkId;

use crate::rng::Rng;

/// What travels.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    Message(Vec<u8>),
    Close,
}

/// A connection. Direction `d` leads from `ends[d]` to `ends[1 - d]`.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) ends: [usize; 2],
    pub(crate) open: [bool; 2],
    queue: [VecDeque<Packet>; 2],
    last: [u64; 2],
    stalled: [u32; 2],
}

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Net {
    pub(crate) links: Vec<Link>,
    /// Pairs that cannot reach each other; the arbiter and the client are nodes, too.
    cuts: Vec<(usize, usize)>,
}

/// A packet will arrive.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) at: u64,
    pub(crate) link: usize,
    pub(crate) direction: usize,
}

pub(crate) fn delay(rng: &mut Rng) -> u64 {
    if rng.one_in(200) { rng.range(1_000, 8_000) } else { rng.range(20, 300) }
}

impl Net {
    pub(crate) fn connect(&mut self, a: usize, b: usize) -> LinkId {
        self.links.push(Link {
            ends: [a, b],
            open: [true; 2],
            queue: Default::default(),
            last: [0; 2],
            stalled: [0; 2],
        });
        LinkId(self.links.len() as u64 - 1)
    }

    pub(crate) fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cuts.iter().any(|&pair| pair == (a, b) || pair == (b, a))
    }

    pub(crate) fn cut(&mut self, a: usize, b: usize) {
        self.cuts.push((a, b));
    }

    /// Takes back one cut; what stalled goes on.
    pub(crate) fn mend(&mut self, now: u64, a: usize, b: usize) -> Vec<Arrival> {
        if let Some(index) = self.cuts.iter().position(|&pair| pair == (a, b)) {
            self.cuts.swap_remove(index);
        }
        let mut arrivals = vec![];
        for index in 0..self.links.len() {
            let [x, y] = self.links[index].ends;
            if self.is_cut(x, y) {
                continue;
            }
            for direction in 0..2 {
                let stalled = std::mem::take(&mut self.links[index].stalled[direction]);
                for _ in 0..stalled {
                    let at = self.links[index].last[direction].max(now + 50);
                    self.links[index].last[direction] = at;
                    arrivals.push(Arrival { at, link: index, direction });
                }
            }
        }
        arrivals
    }

    fn end_of(&self, link: LinkId, host: usize) -> Option<(usize, usize)> {
        let index = link.0 as usize;
        let end = self.links.get(index)?.ends.iter().position(|&end| end == host)?;
        Some((index, end))
    }

    pub(crate) fn send(
        &mut self,
        now: u64,
        rng: &mut Rng,
        link: LinkId,
        from: usize,
        packet: Packet,
    ) -> Option<Arrival> {
        let (index, direction) = self.end_of(link, from)?;
        let link = &mut self.links[index];
        if !link.open[direction] {
            return None;
        }
        if matches!(packet, Packet::Close) {
            link.open[direction] = false;
        }
        Some(link.push(now, rng, index, direction, packet))
    }

    /// The host's process or power is gone.
    pub(crate) fn crash(
        &mut self,
        now: u64,
        rng: &mut Rng,
        host: usize,
        silent: bool,
    ) -> Vec<Arrival> {
        let mut arrivals = vec![];
        for (index, link) in self.links.iter_mut().enumerate() {
            for direction in 0..2 {
                if link.ends[direction] == host && link.open[direction] {
                    link.open[direction] = false;
                    link.lose_some(rng, direction);
                    if !silent {
                        arrivals.push(link.push(now, rng, index, direction, Packet::Close));
                    }
                }
            }
        }
        arrivals
    }

    /// The connection is reset in both directions.
    pub(crate) fn reset(&mut self, now: u64, rng: &mut Rng, index: usize) -> Vec<Arrival> {
        let link = &mut self.links[index];
        let mut arrivals = vec![];
        for direction in 0..2 {
            if link.open[direction] || link.open[1 - direction] {
                link.lose_some(rng, direction);
                arrivals.push(link.push(now, rng, index, direction, Packet::Close));
            }
        }
        arrivals
    }

    /// The packet of an arrival, if it gets through, and to whom.
    pub(crate) fn arrive(&mut self, index: usize, direction: usize) -> Option<(usize, Packet)> {
        let [a, b] = self.links[index].ends;
        let is_cut = self.is_cut(a, b);
        let link = &mut self.links[index];
        if is_cut {
            link.stalled[direction] += 1;
            return None;
        }
        let packet = link.queue[direction].pop_front()?;
        let end = 1 - direction;
        if !link.open[end] {
            return None;
        }
        if matches!(packet, Packet::Close) {
            link.open[end] = false;
        }
        Some((link.ends[end], packet))
    }
}

impl Link {
    fn push(
        &mut self,
        now: u64,
        rng: &mut Rng,
        index: usize,
        direction: usize,
        packet: Packet,
    ) -> Arrival {
        let at = (now + delay(rng)).max(self.last[direction]);
        self.last[direction] = at;
        self.queue[direction].push_back(packet);
        Arrival { at, link: index, direction }
    }

    fn lose_some(&mut self, rng: &mut Rng, direction: usize) {
        let queue = &mut self.queue[direction];
        let keep = rng.index(queue.len() + 1);
        queue.truncate(keep);
    }
}
