//! Taking the marks out of a log: one algorithm over a small vector trait, for whichever width the CPU has (rule L13).
//!
//! Zero blocks are skipped wide; words that are not zero are swapped for zero one by one, because others may be
//! marking in them; after all writers have stopped, whole blocks are moved. Where the log is and which parts of it
//! are worth scanning is in `log`.

use std::ops::{AddAssign, Range};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::page_set::{BLOCK, PageSet};

/// What one harvest of one source found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Harvest {
    /// Pages that were newly set in the source, whether or not the set had them.
    pub pages: u64,
    /// Those of them that the set did not have before.
    pub added: u64,
}

impl AddAssign for Harvest {
    fn add_assign(&mut self, other: Harvest) {
        self.pages += other.pages;
        self.added += other.added;
    }
}

/// Takes the marks out of `range` of the words of a log while others go on marking.
pub(super) fn take(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
    let mut found = Harvest::default();
    for index in range {
        found += take_word(log, index, into);
    }
    found
}

/// The same after all writers have stopped.
pub(super) fn take_stopped(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
    take(log, range, into)
}

/// Takes the marks out of the bytes after the last whole word, which would begin the word `index`.
pub(super) fn take_bytes(bytes: &[AtomicU8], index: usize, into: &mut PageSet) -> Harvest {
    let mut bits = [0; 8];
    for (bits, byte) in bits.iter_mut().zip(bytes) {
        if byte.load(Ordering::Relaxed) != 0 {
            *bits = byte.swap(0, Ordering::AcqRel);
        }
    }
    put(index, u64::from_le_bytes(bits), into)
}

#[inline]
fn take_word(log: &[AtomicU64], index: usize, into: &mut PageSet) -> Harvest {
    match log.get(index) {
        Some(word) if word.load(Ordering::Relaxed) != 0 => {
            put(index, u64::from_le(word.swap(0, Ordering::AcqRel)), into)
        }
        _ => Harvest::default(),
    }
}

#[inline]
fn put(index: usize, bits: u64, into: &mut PageSet) -> Harvest {
    Harvest {
        pages: bits.count_ones().into(),
        added: into.or_word(index, bits),
    }
}
