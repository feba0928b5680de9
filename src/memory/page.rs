//! Numbers of pages, kept apart from addresses and from numbers of bytes.

use std::fmt;
use std::ops::Range;

use super::{GuestAddress, LOG_PAGE};

/// The number of a page of guest memory: its guest-physical address divided by [`LOG_PAGE`] (rule L1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// The page that contains the byte at `gpa`.
    #[inline]
    pub const fn containing(gpa: GuestAddress) -> PageNumber {
        PageNumber(gpa.0 / LOG_PAGE)
    }

    /// The guest-physical address of the first byte. A number that no page has gives the highest address.
    #[inline]
    pub const fn address(self) -> GuestAddress {
        GuestAddress(self.0.saturating_mul(LOG_PAGE))
    }
}

impl fmt::LowerHex for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// Consecutive pages of guest memory: `start` and those after it that are before `end`.
///
/// ```
/// use vhost_migrate::memory::{GuestAddress, PageNumber, PageRange};
///
/// let pages = PageRange::touched_by(GuestAddress(0x1ff8), 16);
/// assert_eq!(pages, PageRange::from(1..3));
/// assert_eq!((pages.count(), pages.bytes()), (2, 8192));
/// assert_eq!(pages.address(), GuestAddress(0x1000));
/// assert_eq!(pages, PageRange::from(PageNumber(1)..PageNumber(3)));
/// for page in pages {
///     assert!(pages.contains(page));
/// }
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub start: PageNumber,
    /// The page after the last one.
    pub end: PageNumber,
}

impl PageRange {
    /// The pages with any of `len` bytes at `gpa`.
    #[inline]
    pub const fn touched_by(gpa: GuestAddress, len: u64) -> PageRange {
        let start = PageNumber::containing(gpa);
        match len {
            0 => PageRange { start, end: start },
            _ => PageRange { start, end: PageNumber(gpa.0.saturating_add(len).div_ceil(LOG_PAGE)) },
        }
    }

    /// The pages of which all bytes are among `len` bytes at `gpa`.
    #[inline]
    pub const fn inside(gpa: GuestAddress, len: u64) -> PageRange {
        let end = match gpa.0.checked_add(len) {
            Some(end) => end / LOG_PAGE,
            // The last page of the address space is inside too.
            None => u64::MAX / LOG_PAGE + 1,
        };
        PageRange { start: PageNumber(gpa.0.div_ceil(LOG_PAGE)), end: PageNumber(end) }
    }

    /// The guest-physical address of the first byte.
    #[inline]
    pub const fn address(self) -> GuestAddress {
        self.start.address()
    }

    /// The number of pages.
    #[inline]
    pub const fn count(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// The number of bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.count().saturating_mul(LOG_PAGE)
    }

    /// Returns true if there is no page.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.count() == 0
    }

    /// Returns true if `page` is among these pages.
    #[inline]
    pub fn contains(self, page: PageNumber) -> bool {
        self.start <= page && page < self.end
    }

    /// The pages that are in both ranges.
    #[inline]
    pub fn intersection(self, other: PageRange) -> PageRange {
        PageRange { start: self.start.max(other.start), end: self.end.min(other.end) }
    }

    /// The numbers of the pages.
    #[inline]
    pub const fn numbers(self) -> Range<u64> {
        self.start.0..self.end.0
    }

    /// The pages one by one.
    #[inline]
    pub fn iter(self) -> impl DoubleEndedIterator<Item = PageNumber> + Clone {
        self.numbers().map(PageNumber)
    }
}

/// The pages with these numbers.
impl From<Range<u64>> for PageRange {
    #[inline]
    fn from(numbers: Range<u64>) -> PageRange {
        PageRange { start: PageNumber(numbers.start), end: PageNumber(numbers.end) }
    }
}

/// The pages of the range.
impl From<Range<PageNumber>> for PageRange {
    #[inline]
    fn from(Range { start, end }: Range<PageNumber>) -> PageRange {
        PageRange { start, end }
    }
}

impl IntoIterator for PageRange {
    type Item = PageNumber;
    type IntoIter = std::iter::Map<Range<u64>, fn(u64) -> PageNumber>;

    #[inline]
    fn into_iter(self) -> Self::IntoIter {
        self.numbers().map(PageNumber)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The number of addresses.
    const SPACE: u128 = 1 << 64;

    /// Numbers near 0, near the borders of pages, and near the end of the address space.
    fn number() -> impl Strategy<Value = u64> {
        let near = |at: u64| (0..3 * LOG_PAGE).prop_map(move |offset| at.wrapping_add(offset));
        prop_oneof![near(0), near(1 << 32), near(u64::MAX - 3 * LOG_PAGE + 1), near(1 << 52), any::<u64>()]
    }

    proptest! {
        #[test]
        fn the_pages_of_a_range_are_those_of_exact_arithmetic(gpa in number(), len in number()) {
            let page = u128::from(LOG_PAGE);
            let (first, end) = (u128::from(gpa), SPACE.min(u128::from(gpa) + u128::from(len)));
            let wide = |pages: PageRange| u128::from(pages.start.0)..u128::from(pages.end.0);

            let touched = PageRange::touched_by(GuestAddress(gpa), len);
            prop_assert_eq!(touched.is_empty(), len == 0);
            if len > 0 {
                prop_assert_eq!(wide(touched), first / page..end.div_ceil(page));
            }
            let inside = PageRange::inside(GuestAddress(gpa), len);
            let expected = first.div_ceil(page)..end / page;
            prop_assert_eq!(inside.is_empty(), expected.is_empty());
            if !expected.is_empty() {
                prop_assert_eq!(wide(inside), expected.clone());
                prop_assert_eq!(u128::from(inside.count()), expected.end - expected.start);
                prop_assert_eq!(u128::from(inside.address().0), expected.start * page);
            }
        }

        #[test]
        fn no_range_of_numbers_overflows(start in number(), end in number(), page in number(), other in number()) {
            let (pages, page) = (PageRange::from(start..end), PageNumber(page));
            let bytes_of = |pages: u64| (u128::from(pages) * u128::from(LOG_PAGE)).min(SPACE - 1);
            prop_assert_eq!(u128::from(page.address().0), bytes_of(page.0));
            prop_assert_eq!(pages.count(), end.saturating_sub(start));
            prop_assert_eq!(pages.is_empty(), start >= end);
            prop_assert_eq!(u128::from(pages.bytes()), bytes_of(pages.count()));
            prop_assert_eq!(pages.contains(page), (start..end).contains(&page.0));
            let common = pages.intersection((other..page.0).into());
            let is_in_both = |number| pages.contains(number) && (other..page.0).contains(&number.0);
            let numbers = [start, end, other, page.0].map(PageNumber);
            prop_assert!(numbers.into_iter().all(|number| common.contains(number) == is_in_both(number)));
        }
    }
}
