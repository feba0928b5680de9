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
/// assert!(pages.iter().eq([PageNumber(1), PageNumber(2)]));
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
        PageRange {
            start: PageNumber(gpa.0.div_ceil(LOG_PAGE)),
            end: PageNumber::containing(GuestAddress(gpa.0.saturating_add(len))),
        }
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

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start.0, self.end.0)
    }
}
