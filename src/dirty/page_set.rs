//! Sets of guest pages: the result of a harvest and the input of a migration round.
//!
//! A set is a bitmap with a summary above it, one bit per word that is not zero. Iterating, merging and clearing take
//! time proportional to the pages in the set, also for a large guest.
//! Sets are not shared between processes; the shared bitmap is [`Log`](super::Log).

use std::fmt;

use crate::memory::{PageNumber, PageRange};

/// Number of words of the bitmap per word of the summary.
pub(super) const BLOCK: usize = u64::BITS as usize;

/// A set of page numbers below a fixed capacity.
///
/// The system provides the memory of the bitmap zeroed, and only parts with inserted pages are touched.
///
/// ```
/// use vhost_migrate::dirty::PageSet;
/// use vhost_migrate::memory::PageNumber;
///
/// let mut pages = PageSet::new(1024);
/// pages.insert_range((10..20).into());
/// pages.insert(PageNumber(30));
/// pages.remove(PageNumber(15));
/// assert_eq!(pages.len(), 10);
/// assert_eq!(pages.runs().collect::<Vec<_>>(), [(10..15).into(), (16..20).into(), (30..31).into()]);
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// One bit per page, in whole blocks. Bits at and above `capacity` are clear.
    words: Vec<u64>,
    /// One bit per word that is not zero.
    summary: Vec<u64>,
    capacity: u64,
    len: u64,
}

impl PageSet {
    /// An empty set with the capacity for the pages `0..pages`.
    pub fn new(pages: u64) -> PageSet {
        let mut set = PageSet::default();
        set.grow(pages);
        set
    }

    /// Extends the capacity to the pages `0..pages`. The capacity never shrinks.
    ///
    /// [`union`](PageSet::union) and every harvest call this themselves, so that they lose no page.
    pub fn grow(&mut self, pages: u64) {
        if pages <= self.capacity {
            return;
        }
        self.capacity = pages;
        let blocks = pages.div_ceil((BLOCK * BLOCK) as u64) as usize;
        if self.words.is_empty() {
            // `vec!` gets zeroed memory from the system; `resize` would write all of it.
            self.words = vec![0; blocks * BLOCK];
            self.summary = vec![0; blocks];
        } else {
            self.words.resize(blocks * BLOCK, 0);
            self.summary.resize(blocks, 0);
        }
    }

    /// The first page number that the set cannot hold.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The number of pages in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns true if the set has no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns true if `page` is in the set.
    pub fn contains(&self, page: PageNumber) -> bool {
        let (index, bit) = position(page.0);
        self.words.get(index).is_some_and(|word| word & bit != 0)
    }

    /// Inserts `page` and returns true if it is new. A page at or above the capacity is not inserted.
    pub fn insert(&mut self, page: PageNumber) -> bool {
        let (index, bit) = position(page.0);
        page.0 < self.capacity && self.or_word(index, bit) != 0
    }

    /// Inserts all of `pages` that are below the capacity and returns the number of new ones.
    pub fn insert_range(&mut self, pages: PageRange) -> u64 {
        let (start, end) = (pages.start.0, pages.end.0.min(self.capacity));
        if start >= end {
            return 0;
        }
        word_masks(start, end - 1).map(|(index, mask)| self.or_word(index, mask)).sum()
    }

    /// Removes `page` and returns true if it was in the set.
    pub fn remove(&mut self, page: PageNumber) -> bool {
        let (index, bit) = position(page.0);
        self.clear_bits(index, bit) != 0
    }

    /// Adds all pages of `other`, and grows to its capacity if that is larger.
    ///
    /// Pages that could not be sent are put back this way too (rule L14.1).
    pub fn union(&mut self, other: &PageSet) {
        self.grow(other.capacity);
        for (index, word) in other.nonzero_words() {
            self.or_word(index, word);
        }
    }

    /// Removes all pages of `other` from this set.
    pub fn difference(&mut self, other: &PageSet) {
        for (index, word) in other.nonzero_words() {
            self.clear_bits(index, word);
        }
    }

    /// Removes all pages, in time proportional to their number.
    pub fn clear(&mut self) {
        if self.len == 0 {
            return;
        }
        for (block, live) in self.words.chunks_exact_mut(BLOCK).zip(&mut self.summary) {
            match std::mem::take(live) {
                0 => {}
                u64::MAX => block.fill(0),
                some => ones(some).for_each(|i| block[i] = 0),
            }
        }
        self.len = 0;
    }

    /// The pages as maximal runs of consecutive numbers, in ascending order.
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, from: 0 }
    }

    /// The pages one by one, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageNumber> + '_ {
        self.runs().flat_map(PageRange::iter)
    }

    /// Sets `bits` in the word at `index` and returns the number of new ones.
    ///
    /// A word beyond the end is ignored: the caller grows the set or clips the bits.
    #[inline]
    pub(super) fn or_word(&mut self, index: usize, bits: u64) -> u64 {
        let (Some(word), Some(live)) = (self.words.get_mut(index), self.summary.get_mut(index / BLOCK)) else {
            return 0;
        };
        let new = u64::from((bits & !*word).count_ones());
        *word |= bits;
        *live |= u64::from(*word != 0) << (index % BLOCK);
        self.len += new;
        new
    }

    /// One block of the bitmap with its word of the summary, for a harvest that fills whole blocks. The caller reports
    /// the pages that it adds to [`added`](PageSet::added).
    #[inline]
    pub(super) fn block_mut(&mut self, block: usize) -> Option<(&mut [u64; BLOCK], &mut u64)> {
        let words = self.words.get_mut(block * BLOCK..)?.first_chunk_mut()?;
        Some((words, self.summary.get_mut(block)?))
    }

    /// Counts pages that were added through [`block_mut`](PageSet::block_mut).
    #[inline]
    pub(super) fn added(&mut self, pages: u64) {
        self.len += pages;
    }

    /// Clears `bits` in the word at `index` and returns the number of those that were set.
    fn clear_bits(&mut self, index: usize, bits: u64) -> u64 {
        let (Some(word), Some(live)) = (self.words.get_mut(index), self.summary.get_mut(index / BLOCK)) else {
            return 0;
        };
        let gone = u64::from((bits & *word).count_ones());
        *word &= !bits;
        *live &= !(u64::from(*word == 0) << (index % BLOCK));
        self.len -= gone;
        gone
    }

    /// The index and the value of every word that is not zero.
    fn nonzero_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let blocks = self.words.chunks_exact(BLOCK).zip(&self.summary).enumerate();
        blocks
            .filter(|(_, (_, live))| **live != 0)
            .flat_map(|(number, (block, live))| ones(*live).map(move |i| (number * BLOCK + i, block[i])))
    }

    /// The first page at or after `from` that is in the set.
    fn next_set(&self, from: u64) -> Option<u64> {
        let (index, bit) = position(from);
        let here = self.words.get(index)? & bit.wrapping_neg();
        if here != 0 {
            return Some(first_page(index, here));
        }
        let after = (!1u64) << (index % BLOCK);
        let mut mask = after;
        for (number, live) in self.summary.iter().enumerate().skip(index / BLOCK) {
            let live = live & mask;
            if live != 0 {
                let index = number * BLOCK + live.trailing_zeros() as usize;
                return Some(first_page(index, *self.words.get(index)?));
            }
            mask = u64::MAX;
        }
        None
    }

    /// The first page at or after `from` that is not in the set, or the capacity.
    fn next_clear(&self, from: u64) -> u64 {
        let (index, bit) = position(from);
        let mut mask = bit.wrapping_neg();
        for (i, word) in self.words.iter().enumerate().skip(index) {
            let clear = !word & mask;
            if clear != 0 {
                return first_page(i, clear).min(self.capacity);
            }
            mask = u64::MAX;
        }
        self.capacity
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        let more = if self.runs().nth(SHOWN).is_some() { ", .." } else { "" };
        write!(
            f,
            "PageSet({} of {} pages: {:?}{more})",
            self.len,
            self.capacity,
            Vec::from_iter(self.runs().take(SHOWN))
        )
    }
}

/// The runs of a [`PageSet`], see [`PageSet::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    from: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let start = self.set.next_set(self.from)?;
        self.from = self.set.next_clear(start);
        Some((start..self.from).into())
    }
}

/// The words with the bits of the pages `first..=last`: index, and mask of these bits.
pub(super) fn word_masks(first: u64, last: u64) -> impl Iterator<Item = (usize, u64)> {
    let (low, high) = (first / 64, last / 64);
    (low..=high).map(move |index| {
        let from = if index == low { first % 64 } else { 0 };
        let to = if index == high { last % 64 } else { 63 };
        (index as usize, (u64::MAX << from) & (u64::MAX >> (63 - to)))
    })
}

/// The numbers of the bits that are set, in ascending order.
#[inline]
fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let next = (word != 0).then(|| word.trailing_zeros() as usize);
        word &= word.wrapping_sub(1);
        next
    })
}

/// The index of a page's word, and the mask of its bit.
#[inline]
fn position(page: u64) -> (usize, u64) {
    ((page / 64) as usize, 1 << (page % 64))
}

/// The page of the lowest bit of `word`, which is the word at `index`.
#[inline]
fn first_page(index: usize, word: u64) -> u64 {
    index as u64 * 64 + u64::from(word.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use bitvec::prelude::*;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64),
        InsertRange(Range<u64>),
        Remove(u64),
        Union(Vec<u64>),
        Difference(Vec<u64>),
        Clear,
    }

    const PAGES: u64 = 3 * 4096 + 77;

    fn page() -> impl Strategy<Value = u64> {
        prop_oneof![0..PAGES, 0..130u64, 4090..4100u64, PAGES - 3..PAGES]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => page().prop_map(Step::Insert),
            2 => (page(), 0..9000u64).prop_map(|(from, n)| Step::InsertRange(from..from + n)),
            3 => page().prop_map(Step::Remove),
            1 => prop::collection::vec(page(), 0..40).prop_map(Step::Union),
            1 => prop::collection::vec(page(), 0..40).prop_map(Step::Difference),
            1 => Just(Step::Clear),
        ]
    }

    fn set_of(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(PAGES);
        pages.iter().for_each(|page| {
            set.insert(PageNumber(*page));
        });
        set
    }

    fn pages_of(oracle: &BitSlice) -> impl Iterator<Item = u64> {
        oracle.iter_ones().map(|page| page as u64)
    }

    fn runs_of(oracle: &BitSlice) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for page in pages_of(oracle) {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_page_set_behaves_like_a_bit_vector(steps in prop::collection::vec(step(), 1..60)) {
            let mut set = PageSet::new(PAGES);
            let mut oracle = bitvec![0; PAGES as usize];
            for step in steps {
                match step {
                    Step::Insert(page) => prop_assert_eq!(set.insert(PageNumber(page)), !oracle.replace(page as usize, true)),
                    Step::InsertRange(range) => {
                        let before = oracle.count_ones();
                        if let Some(bits) = oracle.get_mut(range.start as usize..range.end.min(PAGES) as usize) {
                            bits.fill(true);
                        }
                        prop_assert_eq!(set.insert_range(range.into()), (oracle.count_ones() - before) as u64);
                    }
                    Step::Remove(page) => prop_assert_eq!(set.remove(PageNumber(page)), oracle.replace(page as usize, false)),
                    Step::Union(pages) => {
                        set.union(&set_of(&pages));
                        pages.iter().for_each(|page| oracle.set(*page as usize, true));
                    }
                    Step::Difference(pages) => {
                        set.difference(&set_of(&pages));
                        pages.iter().for_each(|page| oracle.set(*page as usize, false));
                    }
                    Step::Clear => {
                        set.clear();
                        oracle.fill(false);
                    }
                }
                prop_assert_eq!(set.len(), oracle.count_ones() as u64);
            }
            prop_assert_eq!(set.runs().map(PageRange::numbers).collect::<Vec<_>>(), runs_of(&oracle));
            prop_assert!(set.iter().eq(pages_of(&oracle).map(PageNumber)));
            let is_set = |page: u64| oracle.get(page as usize).is_some_and(|bit| *bit);
            prop_assert!((0..PAGES + 200).all(|page| set.contains(PageNumber(page)) == is_set(page)));
            // A wrong summary would make `clear` leave bits behind.
            set.clear();
            prop_assert_eq!(set, PageSet::new(PAGES));
        }
    }

    #[test]
    fn pages_beyond_the_capacity_are_not_inserted() {
        let mut set = PageSet::new(100);
        assert!(!set.insert(PageNumber(100)));
        assert!(!set.insert(PageNumber(u64::MAX)));
        assert_eq!(set.insert_range((98..u64::MAX).into()), 2);
        assert_eq!(set.insert_range((200..300).into()), 0);
        assert!(set.iter().eq([98, 99].map(PageNumber)));
        assert!(PageSet::default().is_empty() && PageSet::default().runs().next().is_none());
    }

    #[test]
    fn a_union_with_a_larger_set_grows_the_set() {
        let mut small = PageSet::new(10);
        small.insert(PageNumber(9));
        let mut large = PageSet::new(100_000);
        large.insert_range((99_000..100_000).into());
        small.union(&large);
        assert_eq!(small.capacity(), 100_000);
        assert_eq!(small.runs().collect::<Vec<_>>(), [9..10, 99_000..100_000].map(PageRange::from));
    }

    #[test]
    fn a_set_is_printed_as_runs() {
        let mut set = PageSet::new(64);
        set.insert_range((3..6).into());
        assert_eq!(format!("{set:?}"), "PageSet(3 of 64 pages: [3..6])");
    }
}
