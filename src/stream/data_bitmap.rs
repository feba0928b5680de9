//! Which pages of guest memory may hold something else than zeros: a bit for each, in memory that is taken when a bit of it
//! differs from the others. Guest memory is as large as a source says that it is; the bits are not, before pages come.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

/// Words that are taken together, for 1 GiB of guest memory.
const PART_WORDS: usize = 4096;

/// Bits of the pages of one region, in words of 64.
pub(super) struct DataBitmap {
    /// What all words are at first.
    initial: u64,
    parts: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl DataBitmap {
    /// `words` words, all of them `initial`.
    pub(super) fn new(words: u64, initial: u64) -> DataBitmap {
        let parts = words.div_ceil(PART_WORDS as u64);
        DataBitmap { initial, parts: (0..parts).map(|_| OnceLock::new()).collect() }
    }

    /// A word to be changed.
    pub(super) fn word_or_allocate(&self, index: u64) -> Option<&AtomicU64> {
        let (part, offset) = part_and_offset(index);
        let made = || (0..PART_WORDS).map(|_| AtomicU64::new(self.initial)).collect();
        self.parts.get(part)?.get_or_init(made).get(offset)
    }

    /// A word in which bits may be set, or `None` if none is.
    pub(super) fn allocated_word(&self, index: u64) -> Option<&AtomicU64> {
        let (part, offset) = part_and_offset(index);
        match self.initial {
            0 => self.parts.get(part)?.get()?.get(offset),
            _ => self.word_or_allocate(index),
        }
    }
}

fn part_and_offset(index: u64) -> (usize, usize) {
    ((index / PART_WORDS as u64) as usize, (index % PART_WORDS as u64) as usize)
}
