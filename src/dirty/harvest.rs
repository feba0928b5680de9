//! The harvest of a log (rule L13.1): one algorithm, written over a small vector trait for every vector width.
//!
//! Zero blocks are skipped by whole vectors. Words that are not zero are swapped for zero one by one, because other
//! threads and processes may be marking in them. After all writers have stopped, whole blocks are moved. The mapping
//! and the choice of the parts to scan are in `log`, the instructions are in `vector`.

use std::ops::{AddAssign, Range};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::page_set::{BLOCK, PageSet};
use super::vector::{Isa, Vector};

/// The result of one harvest of one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Harvest {
    /// Number of pages that were marked in the source.
    pub pages: u64,
    /// Number of these pages that were not in the set before.
    pub added: u64,
}

impl AddAssign for Harvest {
    fn add_assign(&mut self, other: Harvest) {
        self.pages += other.pages;
        self.added += other.added;
    }
}

/// Moves the marks of `range` (words of a log) to `into`, while writers may mark further pages. `into` must have the
/// capacity for them.
pub(super) fn take(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
    run::<false>(Isa::best_for(log.as_ptr().addr()), log, range, into)
}

/// As [`take`], after all writers have stopped.
pub(super) fn take_stopped(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
    run::<true>(Isa::best_for(log.as_ptr().addr()), log, range, into)
}

/// Moves the marks of the bytes after the last whole word to `into`. They would be the first bytes of the word `index`.
pub(super) fn take_bytes(bytes: &[AtomicU8], index: usize, into: &mut PageSet) -> Harvest {
    let mut bits = [0; 8];
    for (bits, byte) in bits.iter_mut().zip(bytes) {
        if byte.load(Ordering::Relaxed) != 0 {
            *bits = byte.swap(0, Ordering::AcqRel);
        }
    }
    put(index, u64::from_le_bytes(bits), into)
}

/// Runs the algorithm compiled for one instruction set, or the scalar one if the log is not aligned for that set.
fn run<const STOPPED: bool>(isa: Isa, log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vpopcntdq,popcnt")]
    fn avx512<const STOPPED: bool>(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
        // SAFETY: this function is called only on CPUs with its features, and only for a log that is aligned.
        unsafe { scan::<std::arch::x86_64::__m512i, STOPPED>(log, range, into) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,popcnt")]
    fn avx2<const STOPPED: bool>(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
        // SAFETY: as above.
        unsafe { scan::<std::arch::x86_64::__m256i, STOPPED>(log, range, into) }
    }

    match isa {
        // SAFETY: `fits` returns true only if the CPU has the instructions and the log is aligned.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if isa.fits(log.as_ptr().addr()) => unsafe { avx512::<STOPPED>(log, range, into) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 if isa.fits(log.as_ptr().addr()) => unsafe { avx2::<STOPPED>(log, range, into) },
        // SAFETY: scalar words need no special instructions, and the log is aligned to words.
        _ => unsafe { scan::<u64, STOPPED>(log, range, into) },
    }
}

/// A block aligned for every vector.
#[repr(align(64))]
struct Block([u64; BLOCK]);

/// Moves the marks of `range` to `into`, block by block.
///
/// # Safety
/// The CPU must have the instructions of `V`, and `log` must be aligned to it.
#[inline(always)]
unsafe fn scan<V: Vector, const STOPPED: bool>(log: &[AtomicU64], range: Range<usize>, into: &mut PageSet) -> Harvest {
    let mut found = Harvest::default();
    let mut taken = Block([0; BLOCK]);
    let range = range.start..range.end.min(log.len());
    let head = range.start.next_multiple_of(BLOCK).min(range.end);
    let tail = (range.end / BLOCK * BLOCK).max(head);
    for index in (range.start..head).chain(tail..range.end) {
        found += take_word(log, index, into);
    }
    for (number, block) in log[head..tail].chunks_exact(BLOCK).enumerate() {
        let start = head + number * BLOCK;
        // SAFETY: the block has `BLOCK` words and the alignment of the log, since `start` is a multiple of `BLOCK`. The
        // caller guarantees the instructions.
        unsafe {
            if is_zero::<V>(block) {
                continue;
            }
            let bits = if STOPPED { block.as_ptr().cast_mut().cast() } else { swap_block::<V>(block, &mut taken) };
            found += move_block::<V, STOPPED>(bits, start / BLOCK, into);
        }
    }
    found
}

/// Returns true if all words of a block are 0.
///
/// # Safety
/// The CPU must have the instructions of `V`. `block` must have `BLOCK` words and be aligned to `V`.
#[inline(always)]
unsafe fn is_zero<V: Vector>(block: &[AtomicU64]) -> bool {
    // SAFETY: every load is inside the block.
    unsafe {
        let mut any = V::zero();
        for at in (0..BLOCK).step_by(V::WORDS) {
            any = any.or(V::load_log(block.as_ptr().add(at).cast()));
        }
        any.live() == 0
    }
}

/// Swaps the words of a block that are not zero into `taken`. `taken` is a buffer in the cache: a store that misses the
/// cache would delay the next swap.
///
/// # Safety
/// As [`is_zero`].
#[inline(always)]
unsafe fn swap_block<V: Vector>(block: &[AtomicU64], taken: &mut Block) -> *mut u64 {
    for at in (0..BLOCK).step_by(V::WORDS) {
        // SAFETY: both accesses are inside their blocks.
        let mut live = unsafe {
            V::clear_log(taken.0.as_mut_ptr().add(at));
            V::load_log(block.as_ptr().add(at).cast()).live()
        };
        while live != 0 {
            let index = at + live.trailing_zeros() as usize;
            taken.0[index] = block[index].swap(0, Ordering::AcqRel);
            live &= live - 1;
        }
    }
    taken.0.as_mut_ptr()
}

/// Adds the words at `from` to block `number` of the set. `CLEAR` also zeroes them, for words that are still in the
/// log.
///
/// # Safety
/// The CPU must have the instructions of `V`. `from` must be valid for `BLOCK` words and be aligned to `V`.
#[inline(always)]
unsafe fn move_block<V: Vector, const CLEAR: bool>(from: *mut u64, number: usize, into: &mut PageSet) -> Harvest {
    let Some((words, summary)) = into.block_mut(number) else { return Harvest::default() };
    // SAFETY: every access is inside one of the two blocks. The log is shared between processes and accessed by
    // volatile operations: the worst effect of a race is a lost mark.
    let found = unsafe {
        let (mut pages, mut added) = (V::zero(), V::zero());
        for at in (0..BLOCK).step_by(V::WORDS) {
            let (from, to) = (from.add(at), words.as_mut_ptr().add(at));
            let bits = V::load_log(from);
            let live = bits.live();
            if live == 0 {
                continue;
            }
            let old = V::load(to);
            if CLEAR {
                V::clear_log(from);
            }
            let all = bits.or(old);
            all.store(to);
            *summary |= live << at;
            pages = pages.add(bits.ones());
            added = added.add(bits.and_not(old).ones());
        }
        Harvest { pages: pages.sum(), added: added.sum() }
    };
    into.added(found.added);
    found
}

#[inline(always)]
fn take_word(log: &[AtomicU64], index: usize, into: &mut PageSet) -> Harvest {
    match log.get(index) {
        Some(word) if word.load(Ordering::Relaxed) != 0 => {
            put(index, u64::from_le(word.swap(0, Ordering::AcqRel)), into)
        }
        _ => Harvest::default(),
    }
}

#[inline(always)]
fn put(index: usize, bits: u64, into: &mut PageSet) -> Harvest {
    Harvest { pages: bits.count_ones().into(), added: into.or_word(index, bits) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::PageNumber;

    /// A log that begins `skip` words into memory aligned for every vector.
    struct Words {
        all: Vec<AtomicU64>,
        start: usize,
    }

    impl Words {
        fn new(words: &[u64], skip: usize) -> Words {
            let mut all: Vec<_> = (0..words.len() + skip + 8).map(|_| AtomicU64::new(0)).collect();
            let start = all.as_ptr().align_offset(64) + skip;
            for (to, word) in all[start..].iter_mut().zip(words) {
                *to.get_mut() = word.to_le();
            }
            // The words around the log must neither be reported nor changed.
            for (at, word) in all.iter_mut().enumerate() {
                if !(start..start + words.len()).contains(&at) {
                    *word.get_mut() = u64::MAX;
                }
            }
            Words { all, start }
        }

        fn log(&self, len: usize) -> &[AtomicU64] {
            &self.all[self.start..self.start + len]
        }

        fn values(&self) -> Vec<u64> {
            self.all.iter().map(|word| u64::from_le(word.load(Ordering::Relaxed))).collect()
        }
    }

    fn pages_of(words: &[u64], range: Range<usize>) -> BTreeSet<u64> {
        let bits = |index: usize| (0..64).filter(move |bit| words[index] >> bit & 1 != 0);
        range.flat_map(|index| bits(index).map(move |bit| index as u64 * 64 + bit)).collect()
    }

    fn words() -> impl Strategy<Value = Vec<u64>> {
        let word =
            prop_oneof![8 => Just(0), 1 => Just(u64::MAX), 1 => any::<u64>(), 2 => (0..64u64).prop_map(|b| 1 << b)];
        let empty = (0..300usize).prop_map(|n| vec![0; n]);
        prop::collection::vec(prop_oneof![prop::collection::vec(word, 0..150), empty], 0..4)
            .prop_map(|parts| parts.concat())
    }

    proptest! {
        /// Rules L13.1 and L13.2.
        #[test]
        fn every_vector_harvests_exactly_the_marks(
            words in words(),
            cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
            before in prop::collection::btree_set(0..600 * 64u64, 0..50),
        ) {
            let (a, b) = (cut.0.index(words.len() + 1), cut.1.index(words.len() + 1));
            let range = a.min(b)..a.max(b);
            let oracle = pages_of(&words, range.clone());
            for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
                for (stopped, skip) in [(false, 0), (true, 0), (false, isa.align() / 8), (true, isa.align() / 8)] {
                    let memory = Words::new(&words, skip);
                    let mut expected = memory.values();
                    expected[memory.start + range.start..memory.start + range.end].fill(0);
                    let mut set = PageSet::new(before.last().map_or(0, |page| page + 1));
                    before.iter().for_each(|page| { set.insert(PageNumber(*page)); });
                    set.grow(words.len() as u64 * 64);

                    let run = if stopped { run::<true> } else { run::<false> };
                    let found = run(isa, memory.log(words.len()), range.clone(), &mut set);

                    prop_assert_eq!(memory.values(), expected, "{:?}: words after the harvest", isa);
                    prop_assert_eq!(found.pages, oracle.len() as u64, "{:?}: pages", isa);
                    prop_assert_eq!(found.added, oracle.difference(&before).count() as u64, "{:?}: added", isa);
                    let all: Vec<_> = oracle.union(&before).copied().collect();
                    prop_assert_eq!(set.len(), all.len() as u64);
                    prop_assert_eq!(set.iter().map(|page| page.0).collect::<Vec<_>>(), all, "{:?}: set", isa);
                }
            }
        }
    }

    #[test]
    fn a_log_that_is_not_aligned_for_vectors_is_harvested_by_words() {
        assert_eq!(Isa::best_for(4096 + 8), Isa::Scalar);
        let memory = Words::new(&[3; 129], 1);
        let mut set = PageSet::new(129 * 64);
        assert_eq!(take(memory.log(129), 0..129, &mut set), Harvest { pages: 258, added: 258 });
    }

    #[test]
    fn the_widest_vector_of_this_cpu_is_used() {
        let widest = Isa::ALL.iter().find(|isa| isa.available());
        assert_eq!(Some(&Isa::best_for(4096)), widest);
    }
}
