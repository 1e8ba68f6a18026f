//! Stands for the translator where there is none for the host: it cannot be made.
//!
//! # Invariants
//! - INV-ABSENT-1: it has what the translator has for the dispatcher, and no value.

use crate::runtime::{Entry, Exit, Found, Link, Runtime, State, Stats};
use crate::stops::Stops;
use crate::tables::Tables;

/// False.
#[must_use]
pub fn is_supported() -> bool {
    false
}

/// A translator that cannot be had.
#[derive(Debug)]
pub enum Jit {}

impl Jit {
    /// `None`.
    #[must_use]
    pub fn new(_state: &State<'_>, _ram_pages: u32, _code_bytes: usize) -> Option<Self> {
        None
    }

    /// See the translator's.
    pub fn set_counts_twice(&mut self, _twice: bool) {
        match *self {}
    }

    /// See the translator's.
    pub fn set_block_max(&mut self, _instructions: u8) {
        match *self {}
    }

    /// See the translator's.
    pub fn sync(&self, _tables: &mut Tables) {
        match *self {}
    }

    /// See the translator's.
    #[must_use]
    pub fn entry(&self, _page: u32, _offset: u16) -> Option<Entry> {
        match *self {}
    }

    /// See the translator's.
    #[must_use]
    pub fn find(&self, _tables: &Tables, _pc: u64) -> Found {
        match *self {}
    }

    /// See the translator's.
    pub fn map(&self, _tables: &mut Tables, _pc: u64, _page: u32) {
        match *self {}
    }

    /// See the translator's.
    pub fn heat(&mut self, _page: u32, _offset: u16) -> u8 {
        match *self {}
    }

    /// See the translator's.
    pub fn translate(
        &mut self,
        _page: u32,
        _bytes: &[u8],
        _offset: u16,
        _stops: Option<&Stops>,
    ) -> (Entry, u16) {
        match *self {}
    }

    /// See the translator's.
    pub fn require_stops(&mut self, _page: u32, _stops: &Stops) {
        match *self {}
    }

    /// See the translator's.
    #[must_use]
    pub fn stops_at(&self, _tables: &Tables, _pc: u64) -> Option<u32> {
        match *self {}
    }

    /// See the translator's.
    pub fn stopped_in_vain(&mut self, _page: u32, _needed: Option<&Stops>) {
        match *self {}
    }

    /// See the translator's.
    pub fn invalidate(&mut self, _page: u32) {
        match *self {}
    }

    /// See the translator's.
    pub fn clear(&mut self) {
        match *self {}
    }

    /// See the translator's.
    pub fn enter<R: Runtime>(
        &self,
        _runtime: &mut R,
        _entry: Entry,
        _pc: u64,
        _budget: u64,
    ) -> (u64, Exit) {
        match *self {}
    }

    /// See the translator's.
    pub fn link(&mut self, _link: Link, _target: Entry) {
        match *self {}
    }

    /// See the translator's.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match *self {}
    }
}
