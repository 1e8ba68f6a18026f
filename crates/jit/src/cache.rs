//! The code cache: which pages have code, where it is, and what makes room.
//!
//! # Invariants
//! - INV-CACHE-1: code is written into chunks of the arena in turn, what is often run into the first half of a chunk and the
//!   rest into the second; before a chunk is written anew, every page that has code in it is dropped whole, and the
//!   generation raised.
//! - INV-CACHE-2: a page's table holds the address of an entry point or of the stub for missing ones.
//! - INV-CACHE-3: a page's code asks at each of `stops`, and nowhere else, whether to stop.
//! - INV-CACHE-4: tables take no more memory than the code may: a page more than that drops everything.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::Arena;
use crate::emit::{Emit, Page};
use crate::features::{BLOCK_MAX, Features};
use crate::layout::Layout;
use crate::runtime::{Entry, Found, State, Stats};
use crate::stops::Stops;
use crate::stubs::Stubs;
use crate::tables::Tables;

/// Halfwords in a page.
const HALFWORDS: usize = 2048;
/// Most chunks of the arena: each is a bit of [`PageCode::chunks`].
const CHUNKS_MAX: usize = 32;
/// Bytes for the stubs.
const STUBS: usize = 4096;
/// More than either part of the code of one translation takes.
const PART_MAX: usize = 32 << 10;
/// Generations of no two translators are the same, so that tables filled for one are not taken for another's.
static FIRST_GENERATION: AtomicU64 = AtomicU64::new(1);
/// Counters of executions.
const HEATS: usize = 1 << 16;
/// Stops in vain after which a page's code is made anew.
const VAIN_MAX: u32 = 1 << 10;

/// A page's code.
#[derive(Debug)]
struct PageCode {
    page: u32,
    table: Box<[u32; HALFWORDS]>,
    /// Chunks that hold some of it, a bit each.
    chunks: u32,
    /// Offsets at which code asks whether to stop.
    stops: Stops,
    /// How often it did for nothing.
    vain: u32,
}

/// The translator with its cache.
#[derive(Debug)]
pub struct Jit {
    arena: Arena,
    pub(crate) layout: Layout,
    pub(crate) stubs: Stubs,
    features: Features,
    by_page: Vec<u32>,
    pages: Vec<Option<PageCode>>,
    free: Vec<u32>,
    /// Pages with code at most: their tables take no more memory than code.
    pages_max: usize,
    /// Chunks that the arena has.
    chunks: usize,
    /// The one that is written.
    chunk: usize,
    /// Offset in the arena of the next code that is often run.
    next: usize,
    /// The same of that which is not.
    next_cold: usize,
    /// Whether the arena has been full once.
    wrapped: bool,
    heat: Box<[u8; HEATS]>,
    /// Raised when code was overwritten, or harts' tables have to be filled anew.
    pub(crate) generation: u64,
    blocks: u64,
    evictions: u64,
}

/// Whether this host can have a translator: its processor suffices, and it gives memory to execute.
#[must_use]
pub fn is_supported() -> bool {
    Features::detect().is_some() && Arena::new(STUBS).is_some()
}

impl Jit {
    /// A translator for harts laid out as this one, with RAM of `ram_pages` pages; `None` when this host cannot have one.
    #[must_use]
    pub fn new(state: &State<'_>, ram_pages: u32, code_bytes: usize) -> Option<Self> {
        let features = Features::detect()?;
        let layout = Layout::of(state)?;
        let chunks = (code_bytes / (4 * PART_MAX)).clamp(2, CHUNKS_MAX);
        let chunk = (code_bytes / chunks).clamp(4 * PART_MAX, 16 << 20).next_multiple_of(4096);
        let mut arena = Arena::new(STUBS + chunk * chunks)?;
        let (stubs, code) = Stubs::generate(arena.base(), &layout);
        assert!(code.len() <= STUBS, "the stubs fit their place");
        arena.write(0, &code);
        let mut jit = Self {
            arena,
            layout,
            stubs,
            features,
            by_page: vec![0; ram_pages as usize],
            pages: Vec::new(),
            free: Vec::new(),
            pages_max: (code_bytes / (HALFWORDS * 4)).max(16),
            chunks,
            chunk: 0,
            next: 0,
            next_cold: 0,
            wrapped: false,
            heat: Box::new([0; HEATS]),
            generation: FIRST_GENERATION.fetch_add(1 << 32, Ordering::Relaxed),
            blocks: 0,
            evictions: 0,
        };
        jit.begin_chunk(0);
        Some(jit)
    }

    /// Has code that is made from now on count each block's steps twice, to no effect but time.
    pub fn set_counts_twice(&mut self, twice: bool) {
        self.features.counts_twice = twice;
    }

    /// Has code that is made from now on go in blocks of so many instructions at most, 1 to 64.
    pub fn set_block_max(&mut self, instructions: u8) {
        self.features.block_max = usize::from(instructions).clamp(1, BLOCK_MAX);
    }

    fn chunk_size(&self) -> usize {
        (self.arena.len() - STUBS) / self.chunks
    }

    fn begin_chunk(&mut self, chunk: usize) {
        let size = self.chunk_size();
        self.chunk = chunk;
        self.next = STUBS + chunk * size;
        self.next_cold = self.next + size / 2;
    }

    /// Drops from a hart's tables what is stale.
    #[inline]
    pub fn sync(&self, tables: &mut Tables) {
        if tables.code_generation != self.generation {
            tables.code_generation = self.generation;
            tables.flush_fetch();
        }
    }

    fn code(&self, page: u32) -> Option<&PageCode> {
        let slot = self.by_page.get(page as usize)?.checked_sub(1)?;
        self.pages.get(slot as usize)?.as_ref()
    }

    fn entry_in(&self, code: &PageCode, offset: u16) -> Option<u32> {
        let address = code.table[usize::from(offset >> 1)];
        (u64::from(address) != self.stubs.missing).then_some(address)
    }

    /// The code at an offset of a page of RAM.
    #[inline]
    #[must_use]
    pub fn entry(&self, page: u32, offset: u16) -> Option<Entry> {
        let address = self.entry_in(self.code(page)?, offset)?;
        Some(Entry { address, generation: self.generation })
    }

    /// The code at an address, as far as the tables know it.
    #[inline]
    #[must_use]
    pub fn find(&self, tables: &Tables, pc: u64) -> Found {
        match tables.find_fetch(pc) {
            None => Found::Unmapped,
            Some(page) => match self.entry(page, pc as u16 & 0xffe) {
                Some(entry) => Found::Code(entry),
                None => Found::Missing(page),
            },
        }
    }

    /// Notes for generated code that the page of `pc`, in the present context, is this page of RAM. Tables must be in
    /// sync. Does nothing while the page has no code.
    #[inline]
    pub fn map(&self, tables: &mut Tables, pc: u64, page: u32) {
        if let Some(code) = self.code(page) {
            tables.insert_fetch(pc, code.table.as_ptr() as u64, page);
        }
    }

    /// Counts an execution of a block without code; returns how many there were.
    #[inline]
    pub fn heat(&mut self, page: u32, offset: u16) -> u8 {
        let at = (page as usize * HALFWORDS + usize::from(offset >> 1)).wrapping_mul(0x9e37_79b1);
        let heat = &mut self.heat[at >> 4 & (HEATS - 1)];
        *heat = heat.saturating_add(1);
        *heat
    }

    /// Translates the code at an offset of a page with these contents. Returns its entry point and the end of what was
    /// translated: the caller tracks writes to that range. The code asks at `stops` whether to stop, too.
    pub fn translate(
        &mut self,
        page: u32,
        bytes: &[u8],
        offset: u16,
        stops: Option<&Stops>,
    ) -> (Entry, u16) {
        // Making a table may drop all code, so that the place comes after it.
        let slot = self.slot(page);
        let slot = if self.make_room() { self.slot(page) } else { slot };
        if let Some(stops) = stops {
            self.require_stops(page, stops);
        }
        let base = self.arena.base();
        let bases = (base + self.next as u64, base + self.next_cold as u64);
        let code = self.pages[slot].as_ref().expect("the slot was just made");
        let entry = |offset| self.entry_in(code, offset);
        let page = Page { bytes, entry: &entry, stops: &code.stops };
        let mut emit = Emit::new(bases, &self.layout, &self.stubs, self.features, page);
        emit.translate(offset);
        let (end, entries, (hot, cold)) = (emit.end.min(4096), emit.entries, emit.a.into_parts());
        assert!(hot.len().max(cold.len()) <= PART_MAX, "one translation is bounded");
        self.arena.write(self.next, &hot);
        self.arena.write(self.next_cold, &cold);
        self.next += hot.len().next_multiple_of(16);
        self.next_cold += cold.len();
        self.blocks += entries.len() as u64;
        let code = self.pages[slot].as_mut().expect("the slot was just made");
        code.chunks |= 1 << self.chunk;
        for e in &entries {
            code.table[usize::from(e.offset >> 1)] = e.address;
        }
        let address = entries.first().expect("the first block is always made").address;
        (Entry { address, generation: self.generation }, end as u16)
    }

    /// The slot of a page's code.
    fn slot(&mut self, page: u32) -> usize {
        if let Some(slot) = self.by_page[page as usize].checked_sub(1) {
            return slot as usize;
        }
        if self.pages.len() - self.free.len() >= self.pages_max {
            self.clear();
            self.evictions += 1;
        }
        let table = Box::new([self.stubs.missing as u32; HALFWORDS]);
        let code = Some(PageCode { page, table, chunks: 0, stops: Stops::default(), vain: 0 });
        let slot = match self.free.pop() {
            Some(slot) => {
                self.pages[slot as usize] = code;
                slot
            }
            None => {
                self.pages.push(code);
                self.pages.len() as u32 - 1
            }
        };
        self.by_page[page as usize] = slot + 1;
        slot as usize
    }

    /// Goes to the next chunk when this one may be too small, dropping what it held.
    /// Returns whether pages were dropped.
    fn make_room(&mut self) -> bool {
        let size = self.chunk_size();
        let end = STUBS + (self.chunk + 1) * size;
        if self.next + PART_MAX <= end - size / 2 && self.next_cold + PART_MAX <= end {
            return false;
        }
        let next = self.chunk + 1;
        self.wrapped |= next == self.chunks;
        self.begin_chunk(next % self.chunks);
        if !self.wrapped {
            return false;
        }
        self.evictions += 1;
        self.generation += 1;
        for slot in 0..self.pages.len() {
            if self.pages[slot].as_ref().is_some_and(|p| p.chunks >> self.chunk & 1 != 0) {
                self.drop_slot(slot);
            }
        }
        true
    }

    fn drop_slot(&mut self, slot: usize) {
        if let Some(code) = self.pages[slot].take() {
            self.by_page[code.page as usize] = 0;
            self.free.push(slot as u32);
        }
    }

    fn code_mut(&mut self, page: u32) -> Option<&mut PageCode> {
        let slot = self.by_page.get(page as usize)?.checked_sub(1)?;
        self.pages.get_mut(slot as usize)?.as_mut()
    }

    /// The page was written: forgets its code.
    pub fn invalidate(&mut self, page: u32) {
        let missing = self.stubs.missing as u32;
        if let Some(code) = self.code_mut(page) {
            code.table.fill(missing);
        }
    }

    /// The page is about to be mapped where there are breakpoints at these offsets: code that does not ask there is
    /// forgotten. What asks more than it needs to may stay.
    pub fn require_stops(&mut self, page: u32, stops: &Stops) {
        if let Some(code) = self.code_mut(page)
            && !code.stops.includes(stops)
        {
            code.stops.add(stops);
            self.invalidate(page);
        }
    }

    /// The page of RAM, if code for `pc` stops there. The tables know the page.
    #[inline]
    #[must_use]
    pub fn stops_at(&self, tables: &Tables, pc: u64) -> Option<u32> {
        if !tables.may_stop(pc) {
            return None;
        }
        let page = tables.find_fetch(pc)?;
        self.code(page)?.stops.contains(pc as u16 & 0xffe).then_some(page)
    }

    /// The page's code stopped where there was no breakpoint. When that happens often it is made anew, to ask where it is
    /// `needed` alone; harts' tables are then filled anew, which tells of what else is.
    pub fn stopped_in_vain(&mut self, page: u32, needed: Option<&Stops>) {
        let Some(code) = self.code_mut(page) else { return };
        code.vain += 1;
        if code.vain >= VAIN_MAX {
            code.vain = 0;
            code.stops = needed.cloned().unwrap_or_default();
            self.invalidate(page);
            self.generation += 1;
        }
    }

    /// Forgets all code.
    pub fn clear(&mut self) {
        for slot in 0..self.pages.len() {
            self.drop_slot(slot);
        }
        self.heat.fill(0);
        self.generation += 1;
        self.begin_chunk(0);
        self.wrapped = false;
    }

    /// Makes the jump at `site` go to `target` from now on.
    pub(crate) fn patch(&mut self, site: u32, target: Entry) {
        let rel = i64::from(target.address) - (i64::from(site) + 4);
        let rel = i32::try_from(rel).expect("the arena is smaller than 2 GiB");
        let offset = (u64::from(site) - self.arena.base()) as usize;
        self.arena.write(offset, &rel.to_le_bytes());
    }

    /// What is in memory and was done.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let size = self.chunk_size();
        let cold = STUBS + self.chunk * size + size / 2;
        let used = match self.wrapped {
            true => self.arena.len(),
            false => self.next + (self.next_cold - cold),
        };
        let pages = self.pages.iter().flatten().count() * (HALFWORDS * 4 + size_of::<PageCode>());
        Stats {
            code_bytes: used as u64,
            table_bytes: (pages + HEATS + self.by_page.len() * 4 + size_of::<Tables>()) as u64,
            blocks: self.blocks,
            evictions: self.evictions,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::runtime::CSRS;

    fn jit(ram_pages: u32, code_bytes: usize) -> Jit {
        let (mut x, mut f, mut csrs) = ([0; 256], [0; 32], [0; CSRS]);
        let mut tables = Tables::new();
        let csrs = csrs.each_mut();
        let state = State { x: &mut x, f: &mut f, tables: &mut tables, csrs };
        Jit::new(&state, ram_pages, code_bytes).unwrap()
    }

    /// Whatever a guest puts together.
    #[test]
    fn no_translation_is_longer_than_its_place() {
        const BRANCH: u32 = 0x0020_9463; // bne x1, x2, .+8
        let mut words: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
        let mut seed = 1u32;
        for _ in 0..3_000_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let word = seed.rotate_left(9) | 3;
            let of_op = words.entry(isa::decode(word).op as u8).or_default();
            if of_op.len() < 63 {
                of_op.push(word);
            }
        }
        // Accesses relative to one register are translated twice: all of them, and each by itself.
        let mut groups = Vec::new();
        for of_op in words.values() {
            for base in [8, 27] {
                let near = |word: &u32| *word & 0x0fff_ffff & !(31 << 15) | base << 15;
                groups.push(of_op.iter().map(near).collect::<Vec<_>>());
            }
        }
        let mut jit = jit(4, 4 << 20);
        let mut longest = [0; 2];
        for of_op in words.values().chain(&groups) {
            let page: Vec<u8> = (0..1024)
                .map(|i| if i % 64 == 63 { BRANCH } else { of_op[i % of_op.len()] })
                .flat_map(u32::to_le_bytes)
                .collect();
            jit.clear();
            jit.translate(0, &page, 0, None);
            let cold = STUBS + jit.chunk_size() / 2;
            longest = [longest[0].max(jit.next - STUBS), longest[1].max(jit.next_cold - cold)];
        }
        assert!(words.len() > 150, "{} instructions", words.len());
        assert!(longest.iter().all(|part| *part <= PART_MAX / 2), "{longest:?} bytes");
    }

    #[test]
    fn stops_are_forgotten_when_they_were_in_vain_and_tables_hear_of_it() {
        let mut jit = jit(4, 1 << 20);
        let page = [0x01u8, 0x00].repeat(HALFWORDS); // c.nop
        let stops = |offset| {
            let mut stops = Stops::default();
            stops.insert(offset);
            stops
        };
        let mut tables = Tables::new();
        tables.sync_stops(1, [0x5000].into_iter());
        jit.translate(0, &page, 0, Some(&stops(8)));
        let known = jit.entry(0, 8);
        assert!(known.is_some(), "a block begins at a stop");
        jit.sync(&mut tables);
        jit.map(&mut tables, 0x5000, 0);
        assert_eq!(jit.stops_at(&tables, 0x5008), Some(0));
        assert_eq!(jit.stops_at(&tables, 0x500a), None);
        jit.require_stops(0, &stops(8));
        assert_eq!(jit.entry(0, 8), known, "the same again changes nothing");
        for _ in 0..VAIN_MAX {
            assert_eq!(jit.stops_at(&tables, 0x5008), Some(0));
            jit.stopped_in_vain(0, Some(&stops(16)));
        }
        assert_eq!(jit.entry(0, 8), None);
        jit.sync(&mut tables);
        assert_eq!(jit.find(&tables, 0x5000), Found::Unmapped, "another address may need more");
        jit.map(&mut tables, 0x5000, 0);
        assert_eq!(jit.stops_at(&tables, 0x5008), None);
        assert_eq!(jit.stops_at(&tables, 0x5010), Some(0));
        tables.sync_stops(2, std::iter::empty());
        assert_eq!(jit.stops_at(&tables, 0x5010), None);
    }

    #[test]
    fn tables_take_no_more_memory_than_code() {
        let code_bytes = 1 << 20;
        let mut jit = jit(4096, code_bytes);
        let page = [0x01u8, 0x00].repeat(HALFWORDS); // c.nop
        for number in 0..4096 {
            let (entry, _) = jit.translate(number, &page, 4000, None);
            assert_eq!(jit.entry(number, 4000), Some(entry));
            assert!(jit.pages.iter().flatten().count() * HALFWORDS * 4 <= code_bytes);
        }
        assert!(jit.evictions > 0);
    }
}
