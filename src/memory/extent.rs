//! Data and holes of guest memory, found without touching it: a read of a page that was never used allocates it.
//!
//! Here: the search in files and in this process's page table. Not here: the use of holes (`stream`, `guest`).

use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};

use super::{Address, LOG_PAGE, Memory, PageNumber, PageRange, Region};

/// A range of bytes that begins at a given offset of a region and is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length, bytes: whole pages, or up to the end of the region.
    pub len: u64,
    /// True if the bytes read as zero. If false, they may hold anything, also zeros.
    pub hole: bool,
}

/// The method to find the holes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HoleSearch {
    /// SEEK_DATA and SEEK_HOLE see every page that was ever written, mapped or not.
    Seek,
    /// `read` allocates no pages in holes, and bytes other than zero are data. For hugetlbfs, which has no SEEK_DATA.
    Read,
    /// Everything is data: the file system may not know of pages that were written through a mapping.
    None,
}

impl HoleSearch {
    pub(super) fn of(fd: BorrowedFd<'_>) -> HoleSearch {
        // Not defined by libc on every target.
        const XFS_SUPER_MAGIC: FsType = FsType(0x5846_5342);
        const SEEKING: [FsType; 4] = [TMPFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];
        match fstatfs(fd).map(|fs| fs.filesystem_type()) {
            Ok(HUGETLBFS_MAGIC) => HoleSearch::Read,
            Ok(fs) if SEEKING.contains(&fs) => HoleSearch::Seek,
            _ => HoleSearch::None,
        }
    }

    /// The extent at the start of `range` of the file, in whole pages counted from there.
    pub(super) fn extent(self, fd: BorrowedFd<'_>, range: Range<u64>) -> Extent {
        let size = range.end.saturating_sub(range.start);
        match self {
            HoleSearch::Seek => seek(fd, range),
            HoleSearch::Read => read(fd, range.start, size),
            HoleSearch::None => Err(Errno::ENOTSUP),
        }
        // Data is the safe answer if the search fails: the bytes are read then.
        .unwrap_or(Extent { len: size, hole: false })
    }
}

fn seek(fd: BorrowedFd<'_>, Range { start, end }: Range<u64>) -> nix::Result<Extent> {
    let find = |from: u64, whence| match lseek(fd, from as libc::off_t, whence) {
        Ok(found) => Ok((found as u64).clamp(from, end)),
        // No data, or no hole, up to the end of the file.
        Err(Errno::ENXIO) => Ok(end),
        Err(error) => Err(error),
    };
    let data = find(start, Whence::SeekData)?;
    if data == end {
        return Ok(Extent { len: end - start, hole: true });
    }
    match (data - start) / LOG_PAGE * LOG_PAGE {
        0 => {
            let hole = find(data, Whence::SeekHole)?.max(data + 1);
            Ok(Extent { len: (hole - start).next_multiple_of(LOG_PAGE).min(end - start), hole: false })
        }
        len => Ok(Extent { len, hole: true }),
    }
}

fn read(fd: BorrowedFd<'_>, start: u64, size: u64) -> nix::Result<Extent> {
    /// Length of the first read, bytes. In most data pages of hugetlbfs it already finds a byte other than zero.
    const FIRST: usize = LOG_PAGE as usize;
    const PIECE: usize = 64 << 10;
    let mut buffer = [0; PIECE];
    let mut zeros = 0;
    for want in [FIRST, PIECE] {
        let want = want.min(usize::try_from(size).unwrap_or(PIECE));
        let part = buffer.get_mut(..want).unwrap_or_default();
        let count = pread(fd, part, start as libc::off_t)?;
        if count < want || part.iter().any(|byte| *byte != 0) {
            // Only this piece was read. The next call looks at the bytes after it.
            return Ok(Extent { len: (PIECE as u64).min(size), hole: false });
        }
        zeros = want as u64;
    }
    Ok(Extent { len: zeros, hole: true })
}

/// The page table of this process, which knows the holes of private anonymous memory.
#[derive(Debug)]
pub(super) struct OwnPageTable(File);

impl OwnPageTable {
    pub(super) fn open() -> std::io::Result<OwnPageTable> {
        Ok(OwnPageTable(File::open("/proc/self/pagemap")?))
    }

    /// The extent at the start of `size` bytes at `address` of this process. A page that userfaultfd write-protects
    /// counts as data even if it was never touched.
    pub(super) fn extent(&self, address: u64, size: u64) -> Extent {
        /// Number of entries read by one call: those of 2 MiB.
        const ENTRIES: usize = 512;
        /// Bits of a page that is present or swapped out. A marker of userfaultfd looks swapped out.
        const USED: u64 = 1 << 63 | 1 << 62;
        let mut buffer = [0; 8 * ENTRIES];
        let pages = (address % LOG_PAGE + size).div_ceil(LOG_PAGE).min(ENTRIES as u64);
        let part = buffer.get_mut(..8 * pages as usize).unwrap_or_default();
        let read = pread(&self.0, part, (address / LOG_PAGE * 8) as libc::off_t);
        let (entries, _) = buffer.get(..read.unwrap_or(0)).unwrap_or_default().as_chunks();
        let mut hole = entries.iter().map(|entry| u64::from_ne_bytes(*entry) & USED == 0);
        let Some(first) = hole.next().filter(|_| address.is_multiple_of(LOG_PAGE)) else {
            return Extent { len: size, hole: false };
        };
        let alike = 1 + hole.take_while(|hole| *hole == first).count() as u64;
        Extent { len: (alike * LOG_PAGE).min(size), hole: first }
    }
}

/// Splits runs of pages into data and holes, and caches the extent that was found last.
///
/// A hole was a hole at some time since the finder was made, and its pages read as zero at that time. So a caller loses
/// no writes if it first clears the dirty bits of the pages, then makes a new `ExtentFinder` and treats holes as zeros
/// (rule L13.1).
#[derive(Debug, Default)]
pub struct ExtentFinder {
    last: PageRange,
    hole: bool,
}

impl ExtentFinder {
    /// A finder with an empty cache.
    pub fn new() -> ExtentFinder {
        ExtentFinder::default()
    }

    /// The longest run at the start of `pages`, which are whole pages of `region`, that is all hole (true) or all data
    /// (false).
    pub fn first(&mut self, region: &Region, pages: PageRange) -> (PageRange, bool) {
        if !self.last.contains(pages.start) {
            let extent = region.extent(pages.address().unchecked_offset_from(region.gpa()));
            // At least 1: a region may end inside a page, and `pages` are whole ones.
            let count = (extent.len / LOG_PAGE).max(1);
            (self.last, self.hole) = ((pages.start.0..pages.start.0 + count).into(), extent.hole);
        }
        (PageRange { end: pages.end.min(self.last.end), ..pages }, self.hole)
    }

    /// Returns true if `page` is a hole of `memory`.
    pub fn is_hole(&mut self, memory: &Memory, page: PageNumber) -> bool {
        let Some((region, _)) = memory.region_at(page.address()) else { return false };
        self.first(region, (page.0..page.0 + 1).into()).1
    }
}

impl Memory {
    /// Calls `each` with the runs of pages that may hold other bytes than zeros, by increasing page number, until it
    /// returns false. Holes that the regions know of are not touched.
    pub fn data(&self, mut each: impl FnMut(PageRange) -> bool) {
        let mut extents = ExtentFinder::new();
        for region in self.regions() {
            let mut pages = region.pages();
            while !pages.is_empty() {
                let (part, hole) = extents.first(region, pages);
                pages.start = part.end;
                if !hole && !each(part) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;

    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::stat::fstat;

    use super::*;
    use crate::memory::{GuestAddress, UserAddress, sealed_memfd};

    const PAGES: u64 = 1024;

    /// Memory of a file, half of it above 4 GiB. If `unaligned`, its pages begin 8 bytes into those of the file.
    fn memory(unaligned: bool) -> (OwnedFd, Memory) {
        let skip = if unaligned { 8 } else { 0 };
        let fd = sealed_memfd("extent-test", (PAGES + 1) * LOG_PAGE).unwrap();
        let half = PAGES / 2 * LOG_PAGE;
        let share =
            |gpa, offset| Region::share(fd.try_clone().unwrap(), GuestAddress(gpa), half, offset + skip).unwrap();
        let memory = Memory::new([share(0, 0), share(4 << 30, half)].map(Arc::new)).unwrap();
        (fd, memory)
    }

    fn data(memory: &Memory) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        memory.data(|run| {
            runs.push(run.numbers());
            true
        });
        runs
    }

    fn pages_of(fd: &OwnedFd) -> i64 {
        fstat(fd).unwrap().st_blocks / 8
    }

    #[test]
    fn only_written_pages_are_data_and_the_search_allocates_none() {
        const HIGH: u64 = (4 << 30) / LOG_PAGE;
        let (fd, memory) = memory(false);
        assert_eq!(data(&memory), []);
        for page in [0, 3, 4, 511, HIGH, HIGH + 511] {
            memory.write(GuestAddress(page * LOG_PAGE + 77), &[1]).unwrap();
        }
        assert_eq!(data(&memory), [0..1, 3..5, 511..512, HIGH..HIGH + 1, HIGH + 511..HIGH + 512]);
        assert_eq!(pages_of(&fd), 6);
        let mut extents = ExtentFinder::new();
        assert!(
            extents.is_hole(&memory, PageNumber(1))
                && extents.is_hole(&memory, PageNumber(2))
                && !extents.is_hole(&memory, PageNumber(3))
        );
        assert!(!extents.is_hole(&memory, PageNumber(HIGH + 512)), "outside of memory");
        // A page that the file's owner discards is a hole again, also for processes that have it mapped.
        let discard = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&fd, discard, 3 * 4096, 4096).unwrap();
        assert_eq!(data(&memory)[..2], [0..1, 4..5]);
        // Pages that are only allocated are holes.
        fallocate(&fd, FallocateFlags::empty(), 0, (PAGES * LOG_PAGE) as i64).unwrap();
        assert_eq!(data(&memory)[..2], [0..1, 4..5]);
    }

    #[test]
    fn a_page_is_data_if_any_byte_of_it_is() {
        let (_, memory) = memory(true);
        // The last 8 bytes of the page are in the next page of the file, which the following page of memory shares.
        memory.write(GuestAddress(2 * LOG_PAGE - 8), &[1]).unwrap();
        assert_eq!(data(&memory), [1..3]);
        memory.write(GuestAddress(5 * LOG_PAGE), &[1]).unwrap();
        assert_eq!(data(&memory), [1..3, 4..6]);
    }

    #[test]
    fn a_region_that_does_not_keep_its_file_is_all_data() {
        let fd = sealed_memfd("extent-test", PAGES * LOG_PAGE).unwrap();
        let region = Region::map(fd.as_fd(), GuestAddress(0), PAGES * LOG_PAGE, UserAddress(0), 0).unwrap();
        assert_eq!(region.extent(LOG_PAGE), Extent { len: (PAGES - 1) * LOG_PAGE, hole: false });
        assert_eq!(HoleSearch::of(std::fs::File::open("/proc/self/maps").unwrap().as_fd()), HoleSearch::None);
    }

    #[test]
    fn a_search_by_reading_allocates_no_pages_and_finds_every_byte() {
        let (fd, memory) = memory(false);
        let search = |from: u64| HoleSearch::Read.extent(fd.as_fd(), from..PAGES * LOG_PAGE);
        assert_eq!(search(0), Extent { len: 64 << 10, hole: true });
        memory.write(GuestAddress(20 * LOG_PAGE - 1), &[1]).unwrap();
        assert!(
            search(0).hole && !search(16 * LOG_PAGE).hole && !search(19 * LOG_PAGE).hole && search(20 * LOG_PAGE).hole
        );
        assert_eq!(search((PAGES - 1) * LOG_PAGE), Extent { len: LOG_PAGE, hole: true });
        assert_eq!(pages_of(&fd), 1);
    }
}
