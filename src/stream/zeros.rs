//! Which pages of guest memory may hold something else than zeros: a bit for each, in memory that is taken when a bit of it
//! differs from the others. Guest memory is as large as a source says that it is; the bits are not, before pages come.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

/// Words that are taken together, for 1 GiB of guest memory.
const PART: usize = 4096;

/// Bits of the pages of one region, in words of 64.
pub(super) struct MayHoldData {
    /// What all words are at first.
    initial: u64,
    parts: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl MayHoldData {
    /// `words` words, all of them `initial`.
    pub(super) fn new(words: u64, initial: u64) -> MayHoldData {
        let parts = words.div_ceil(PART as u64);
        MayHoldData { initial, parts: (0..parts).map(|_| OnceLock::new()).collect() }
    }

    /// A word to be changed.
    pub(super) fn word(&self, index: u64) -> Option<&AtomicU64> {
        let (part, offset) = place(index);
        let made = || (0..PART).map(|_| AtomicU64::new(self.initial)).collect();
        self.parts.get(part)?.get_or_init(made).get(offset)
    }

    /// A word in which bits may be set, or `None` if none is.
    pub(super) fn set_word(&self, index: u64) -> Option<&AtomicU64> {
        let (part, offset) = place(index);
        match self.initial {
            0 => self.parts.get(part)?.get()?.get(offset),
            _ => self.word(index),
        }
    }
}

fn place(index: u64) -> (usize, usize) {
    ((index / PART as u64) as usize, (index % PART as u64) as usize)
}
