//! A bitmap of the guest pages that may hold data other than zeros. Parts of it are allocated when a bit in them
//! differs from the initial value: a source can announce any amount of guest memory, and the bitmap grows only with
//! received pages.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

/// Number of words allocated together, for 1 GiB of guest memory.
const PART_WORDS: usize = 4096;

/// Bits for the pages of one region, in 64-bit words.
pub(super) struct DataBitmap {
    /// Initial value of every word.
    initial: u64,
    parts: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl DataBitmap {
    /// Creates a bitmap of `words` words with the value `initial`.
    pub(super) fn new(words: u64, initial: u64) -> DataBitmap {
        let parts = words.div_ceil(PART_WORDS as u64);
        DataBitmap { initial, parts: (0..parts).map(|_| OnceLock::new()).collect() }
    }

    /// Returns a word to change, and allocates it if necessary.
    pub(super) fn word_or_allocate(&self, index: u64) -> Option<&AtomicU64> {
        let (part, offset) = part_and_offset(index);
        let made = || (0..PART_WORDS).map(|_| AtomicU64::new(self.initial)).collect();
        self.parts.get(part)?.get_or_init(made).get(offset)
    }

    /// Returns a word that may have bits set, or `None` if it has none.
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
