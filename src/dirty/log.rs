//! The shared dirty log of VHOST_SET_LOG_BASE and VHOST_USER_SET_LOG_BASE: map or create, mark, burst, signal.
//!
//! The log has one bit per 4 KiB page of guest-physical memory, bit `page % 8` of byte `page / 8` (rule L1.1). Several
//! processes change it concurrently (rule L11.1), so every write here is an atomic read-modify-write. Not here:
//! scanning and clearing (`harvest`), and the decision when to log (the owner of the [`Log`]).

use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::error::DirtyError;
use super::harvest::{self, Harvest};
use super::page_set::{PageSet, word_masks};
use crate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, sealed_memfd};
use crate::sys::log_limit::limited;
use crate::sys::nonblocking;

/// Size of a log in bytes below which the search for holes costs more than reading them.
const SPARSE_MIN: u64 = 256 << 10;
/// Inverse of the populated part below which a log is searched for holes. Finding a populated range takes two system
/// calls, about the time of reading eight pages of log.
const SPARSE_RATIO: u64 = 8;

/// A dirty log mapped into this process. The threads that mark and the one that harvests share it as `Arc<Log>`.
#[derive(Debug)]
pub struct Log {
    map: MmapRaw,
    /// Size, bytes, as in the messages of all peers.
    size: u64,
    /// The file of the log, in which holes are searched.
    file: OwnedFd,
    /// Offset of the log in the file, bytes.
    offset: u64,
    /// True if the holes of the file are exact while it is mapped, as on tmpfs, which memfds are in.
    holes: bool,
    out_of_range: AtomicU64,
}

impl Log {
    /// Maps an existing log: `size` bytes at `offset` of `fd` (vhost-user spec, "VHOST_USER_SET_LOG_BASE"; rule L2.1).
    ///
    /// The size may be any number of bytes. All of them are used, and none beyond is written.
    ///
    /// # Errors
    /// [`DirtyError::EmptyLog`] for size 0, [`DirtyError::MisalignedLog`] for an offset that is not a multiple of 8,
    /// [`DirtyError::ShortLogFile`] for a file that ends before the log does, [`DirtyError::System`] if the system refuses.
    pub fn map(fd: BorrowedFd<'_>, size: u64, offset: u64) -> Result<Log, DirtyError> {
        if size == 0 {
            return Err(DirtyError::EmptyLog);
        }
        if !offset.is_multiple_of(8) {
            return Err(DirtyError::MisalignedLog { offset });
        }
        let file = fstat(fd).map_err(DirtyError::system("get the size of its file"))?.st_size.cast_unsigned();
        let len = match (offset.checked_add(size), usize::try_from(size)) {
            (Some(end), Ok(len)) if end <= file => len,
            _ => return Err(DirtyError::ShortLogFile { size, offset, file }),
        };
        let map =
            MmapOptions::new().offset(offset).len(len).map_raw(&fd).map_err(DirtyError::system("map its file"))?;
        Ok(Log {
            map,
            size,
            file: fd.try_clone_to_owned().map_err(DirtyError::system("duplicate its fd"))?,
            offset,
            holes: fstatfs(fd).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC),
            out_of_range: AtomicU64::new(0),
        })
    }

    /// Creates a log for guest memory that ends at `memory_end` (the address after the last byte). Returns it with the
    /// fd to share.
    ///
    /// The log is a memfd of the size that QEMU computes, one 64-bit word per 256 KiB. It is sealed against resizing,
    /// so that no peer can make others fault. Peers can map and write it.
    ///
    /// # Errors
    /// [`DirtyError::EmptyLog`] if `memory_end` is 0, [`DirtyError::System`] if the system refuses.
    pub fn create(memory_end: GuestAddress) -> Result<(Log, OwnedFd), DirtyError> {
        let last = memory_end.0.checked_sub(1).ok_or(DirtyError::EmptyLog)?;
        let size = (last / (64 * LOG_PAGE) + 1) * 8;
        let fd = sealed_memfd("vhost-dirty-log", size).map_err(DirtyError::system("create its memfd"))?;
        Ok((Log::map(fd.as_fd(), size, 0)?, fd))
    }

    /// The size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Allocates the pages of the log and locks them in memory until this mapping is dropped, so that no mark can fail
    /// (rule K3.1).
    ///
    /// # Errors
    /// [`DirtyError::NotLocked`].
    pub(crate) fn lock_in_memory(&self) -> Result<(), DirtyError> {
        let limit = || getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
        self.map.lock().map_err(|cause| DirtyError::NotLocked { size: self.size, limit: limit(), cause })
    }

    /// Address of the first byte in this process, for the kernel.
    pub(crate) fn address(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// The number of pages that the log has a bit for.
    pub fn pages(&self) -> u64 {
        self.size.saturating_mul(8)
    }

    /// Marks the pages of the guest-physical bytes `gpa..gpa + len`. Call it after they are written
    /// (rules L1.3, L10.1).
    ///
    /// It executes one unconditional atomic or per word, which is also the barrier between the data and the bit. Pages
    /// outside the log, and ranges that wrap around, are only counted (rules L6.1, L6.2).
    #[inline]
    pub fn mark(&self, gpa: GuestAddress, len: u64) {
        self.set::<false>(gpa, len);
    }

    /// Begins a burst of marks for data that is already written: **all data writes must precede this call**.
    ///
    /// The burst may skip the atomic or if the bit is set already, because a fence is between the data writes and the
    /// load of the bit (rule L10.2). This call executes the fence. Data written later needs another burst.
    #[inline]
    pub fn burst(&self) -> Burst<'_> {
        fence(Ordering::SeqCst);
        Burst { log: self, changed: Cell::new(false) }
    }

    /// Marks pages again that were harvested and could not be sent (rule L14.1).
    pub fn put_back(&self, pages: &PageSet) {
        let burst = self.burst();
        pages.runs().for_each(|run| burst.mark(run.address(), run.bytes()));
    }

    /// Returns true if the page of `gpa` is marked.
    pub fn is_marked(&self, gpa: GuestAddress) -> bool {
        let page = gpa.0 / LOG_PAGE;
        let word = match self.words().get((page / 64) as usize) {
            Some(word) => u64::from_le(word.load(Ordering::Acquire)),
            None if page < self.pages() => self.tail_bits(),
            None => 0,
        };
        word >> (page % 64) & 1 != 0
    }

    /// Returns true if every page of the guest-physical bytes `gpa..gpa + len` is marked, or if `len` is 0.
    pub fn are_marked(&self, gpa: GuestAddress, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else { return true };
        let Some(end) = gpa.0.checked_add(last) else { return false };
        (gpa.0 / LOG_PAGE..=end / LOG_PAGE).all(|page| self.is_marked(PageNumber(page).address()))
    }

    /// Marks all guest memory. Use it if the written pages are not known.
    pub fn mark_memory(&self, memory: &Memory) {
        let burst = self.burst();
        memory.regions().iter().for_each(|region| burst.mark(region.gpa(), region.size()));
    }

    /// Marks in `new` the pages that are marked in this log. This log does not change: its owner may still harvest it
    /// (rule L9.3).
    pub fn copy_to(&self, new: &Log) {
        let (burst, words) = (new.burst(), self.words());
        let copy = |index: usize, mut bits: u64| {
            while bits != 0 {
                let first = bits.trailing_zeros();
                let count = (bits >> first).trailing_ones();
                let page = index as u64 * 64 + u64::from(first);
                burst.mark(PageNumber(page).address(), u64::from(count) * LOG_PAGE);
                bits &= u64::MAX.checked_shl(first + count).unwrap_or(0);
            }
        };
        self.populated(|bytes| {
            let first = bytes.start / 8;
            let whole = words.get(first..bytes.end.div_ceil(8).min(words.len())).unwrap_or_default();
            for (index, word) in (first..).zip(whole) {
                copy(index, u64::from_le(word.load(Ordering::Acquire)));
            }
            if bytes.end > words.len() * 8 {
                copy(words.len(), self.tail_bits());
            }
        });
    }

    /// The number of pages outside the log that were to be marked (rule L6.2). A migration would lose these pages.
    pub fn out_of_range(&self) -> u64 {
        self.out_of_range.load(Ordering::Relaxed)
    }

    /// Clears all marks of the log and adds their pages to `into`, while writers may mark further pages (rule L13.1).
    ///
    /// Read the pages only after this returns. `into` grows to the size of the log if it is smaller.
    pub fn harvest(&self, into: &mut PageSet) -> Harvest {
        self.harvest_with(harvest::take, into)
    }

    /// As [`harvest`](Log::harvest), but without atomic operations. Use it for the last harvest, after every writer has
    /// stopped: a concurrent mark may be lost.
    pub fn harvest_stopped(&self, into: &mut PageSet) -> Harvest {
        self.harvest_with(harvest::take_stopped, into)
    }

    fn harvest_with(
        &self,
        take: fn(&[AtomicU64], Range<usize>, &mut PageSet) -> Harvest,
        into: &mut PageSet,
    ) -> Harvest {
        into.grow(self.pages());
        let (words, mut found) = (self.words(), Harvest::default());
        self.populated(|bytes| {
            let end = bytes.end.div_ceil(8).min(words.len());
            if bytes.start / 8 < end {
                found += take(words, bytes.start / 8..end, into);
            }
            if bytes.end > words.len() * 8 {
                found += harvest::take_bytes(self.tail(), words.len(), into);
            }
        });
        // Pairs with the fence of a burst: if a burst still found its bit set, its data is visible to later reads of
        // pages.
        fence(Ordering::SeqCst);
        found
    }

    /// Calls `each` with ranges of bytes of the log that together hold all its marks.
    ///
    /// A mostly empty log has pages that were never touched. They are found without being read, which would cost time
    /// and, on tmpfs, memory. A seek moves the position of a file description shared with peers. That is harmless: logs
    /// are not accessed by file position, and only the result of a seek is used here.
    fn populated(&self, mut each: impl FnMut(Range<usize>)) {
        let mut at = 0;
        if self.holes && self.size >= SPARSE_MIN && self.populated_bytes() < self.size / SPARSE_RATIO {
            while at < self.size {
                let start = match self.seek(at, Whence::SeekData) {
                    Ok(start) => start,
                    Err(Errno::ENXIO) => return,
                    Err(_) => break,
                };
                let Ok(end) = self.seek(start, Whence::SeekHole) else {
                    break;
                };
                let (start, end) = (start.clamp(at, self.size), end.min(self.size));
                if start >= end {
                    break;
                }
                each(start as usize..end as usize);
                at = end;
            }
        }
        if at < self.size {
            each(at as usize..self.size as usize);
        }
    }

    /// Allocated bytes of the file.
    fn populated_bytes(&self) -> u64 {
        fstat(&self.file).map_or(u64::MAX, |stat| stat.st_blocks.cast_unsigned().saturating_mul(512))
    }

    /// Seeks in the file; `from` and the result are offsets in the log, bytes.
    fn seek(&self, from: u64, whence: Whence) -> Result<u64, Errno> {
        let at = lseek(&self.file, (self.offset + from).cast_signed(), whence)?;
        Ok(at.cast_unsigned().saturating_sub(self.offset))
    }

    /// Sets the bits of a range and returns true if it wrote to the log. `TEST` skips words whose bits are set already.
    #[inline]
    fn set<const TEST: bool>(&self, GuestAddress(gpa): GuestAddress, len: u64) -> bool {
        let page = gpa / LOG_PAGE;
        // The fast path: nearly every mark is inside one page. A length of 0 wraps around to a large one here.
        if len.wrapping_sub(1) < LOG_PAGE - gpa % LOG_PAGE
            && let Some(word) = self.words().get((page / 64) as usize)
        {
            return or::<TEST>(word, 1 << (page % 64));
        }
        self.set_range::<TEST>(gpa, len)
    }

    fn set_range<const TEST: bool>(&self, gpa: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else { return false };
        let Some(end) = gpa.checked_add(last) else {
            self.count_outside(gpa, last / LOG_PAGE + 1);
            return false;
        };
        let (first, last, pages) = (gpa / LOG_PAGE, end / LOG_PAGE, self.pages());
        if let Some([low, between @ .., high]) = self.words().get((first / 64) as usize..=(last / 64) as usize) {
            let mut changed = or::<TEST>(low, u64::MAX << (first % 64));
            between.iter().for_each(|word| changed |= or::<TEST>(word, u64::MAX));
            return changed | or::<TEST>(high, u64::MAX >> (63 - last % 64));
        }
        let mut changed = false;
        if first < pages {
            for (index, mask) in word_masks(first, last.min(pages - 1)) {
                changed |= match self.words().get(index) {
                    Some(word) => or::<TEST>(word, mask),
                    None => or_bytes::<TEST>(self.tail(), mask),
                };
            }
        }
        if last >= pages {
            self.count_outside(gpa, last - first.max(pages) + 1);
        }
        changed
    }

    /// Counts pages outside the log, and warns at the first.
    #[cold]
    fn count_outside(&self, gpa: u64, pages: u64) {
        let more = |so_far: u64| Some(so_far.saturating_add(pages));
        if self.out_of_range.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) == Ok(0) {
            limited!(
                warn,
                "the dirty log of {} pages does not cover the write at guest-physical {gpa:#x}: not marked (rule L6.2)",
                self.pages()
            );
        }
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `size` bytes as long as `self` exists and is only accessed atomically. It starts at a
        // multiple of 8, as the offset does.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), (self.size / 8) as usize) }
    }

    /// The bytes after the last whole word.
    fn tail(&self) -> &[AtomicU8] {
        let rest = (self.size % 8) as usize;
        // SAFETY: these are the last `size % 8` bytes of the mapping, which exists as long as `self`. They are only
        // accessed atomically.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().add(self.size as usize - rest).cast(), rest) }
    }

    /// The bits of the bytes after the last whole word.
    fn tail_bits(&self) -> u64 {
        self.tail().iter().rev().fold(0, |all, byte| all << 8 | u64::from(byte.load(Ordering::Acquire)))
    }
}

/// Marks for data written before the burst began, see [`Log::burst`].
///
/// ```
/// # use vhost_migrate::memory::GuestAddress;
/// # let (log, _fd) = vhost_migrate::dirty::Log::create(GuestAddress(1 << 20))?;
/// let mut burst = log.burst();
/// for gpa in [0x3000, 0x5000, 0x7000] {
///     burst.mark(GuestAddress(gpa), 512);
/// }
/// drop(burst);
/// // From here on the completions may be published.
/// assert!(log.is_marked(GuestAddress(0x5000)));
/// # Ok::<(), vhost_migrate::dirty::DirtyError>(())
/// ```
#[derive(Debug)]
pub struct Burst<'a> {
    log: &'a Log,
    changed: Cell<bool>,
}

impl Burst<'_> {
    /// Marks the pages of the guest-physical bytes `gpa..gpa + len`, unless they are marked already.
    ///
    /// Addresses are treated as in [`Log::mark`].
    #[inline]
    pub fn mark(&self, gpa: GuestAddress, len: u64) {
        if self.log.set::<true>(gpa, len) {
            self.changed.set(true);
        }
    }

    /// Ends the burst, and signals `to` if the burst marked any page that was clean: at most one signal per burst
    /// (rule L12.1).
    ///
    /// # Errors
    /// [`DirtyError::System`] if the signal fails. The marks are in the log in any case.
    pub fn signal(self, to: &LogSignal) -> Result<(), DirtyError> {
        if self.changed.get() { to.signal() } else { Ok(()) }
    }
}

/// The eventfd of VHOST_USER_SET_LOG_FD and VHOST_SET_LOG_FD, signalled after marking (rule L12.1).
#[derive(Debug)]
pub struct LogSignal(OwnedFd);

impl LogSignal {
    /// A signal through the fd of the request.
    pub fn new(fd: OwnedFd) -> LogSignal {
        LogSignal(fd)
    }

    /// Signals once, without blocking. A pending signal is not an error: the receiver has yet to handle it.
    ///
    /// # Errors
    /// [`DirtyError::System`], for example if the other end of a socket is closed.
    pub fn signal(&self) -> Result<(), DirtyError> {
        nonblocking::signal(self.0.as_fd()).map_err(DirtyError::system("signal its eventfd"))
    }
}

impl AsRawFd for LogSignal {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Sets page bits in a word of the log and returns true if it wrote. `TEST` skips bits that are all set.
#[inline]
fn or<const TEST: bool>(word: &AtomicU64, bits: u64) -> bool {
    let bits = bits.to_le();
    if TEST && word.load(Ordering::Relaxed) & bits == bits {
        return false;
    }
    word.fetch_or(bits, Ordering::AcqRel);
    true
}

/// As [`or`], for the bytes after the last whole word. `bits` are those of the word that these bytes would begin.
fn or_bytes<const TEST: bool>(bytes: &[AtomicU8], bits: u64) -> bool {
    let mut changed = false;
    for (byte, bits) in bytes.iter().zip(bits.to_le_bytes()) {
        if bits != 0 && !(TEST && byte.load(Ordering::Relaxed) & bits == bits) {
            byte.fetch_or(bits, Ordering::AcqRel);
            changed = true;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::sys::eventfd::{EfdFlags, EventFd};
    use proptest::prelude::*;

    use super::*;
    use crate::memory::PageRange;

    fn memfd(size: u64) -> OwnedFd {
        sealed_memfd("test", size).unwrap()
    }

    fn bytes(fd: &OwnedFd) -> Vec<u8> {
        let size = fstat(fd).unwrap().st_size as usize;
        let mut bytes = vec![0; size];
        assert_eq!(nix::sys::uio::pread(fd, &mut bytes, 0).unwrap(), size);
        bytes
    }

    fn fill(fd: &OwnedFd, byte: u8) {
        let size = fstat(fd).unwrap().st_size as usize;
        assert_eq!(nix::sys::uio::pwrite(fd, &vec![byte; size], 0).unwrap(), size);
    }

    /// Rule L1.3 executed page by page on a plain array. Returns the number of pages outside the log.
    fn oracle(log: &mut [u8], gpa: u64, len: u64) -> u128 {
        let pages = match len {
            0 => return 0,
            len => u128::from(gpa >> 12)..=(u128::from(gpa) + u128::from(len) - 1) >> 12,
        };
        let mut outside = 0;
        for page in pages {
            match log.get_mut((page / 8) as usize) {
                Some(byte) => *byte |= 1 << (page % 8),
                None => outside += 1,
            }
        }
        outside
    }

    #[test]
    fn an_unusable_log_is_refused_and_the_error_cites_the_rule() {
        let fd = memfd(100);
        let error = |size, offset| Log::map(fd.as_fd(), size, offset).unwrap_err().to_string();
        assert!(error(0, 0).contains("L2.3"), "{}", error(0, 0));
        assert!(matches!(Log::map(fd.as_fd(), 0, 0), Err(DirtyError::EmptyLog)));
        assert!(matches!(Log::map(fd.as_fd(), 8, 4), Err(DirtyError::MisalignedLog { offset: 4 })));
        assert!(matches!(Log::map(fd.as_fd(), 101, 0), Err(DirtyError::ShortLogFile { file: 100, .. })));
        assert!(matches!(Log::map(fd.as_fd(), 93, 8), Err(DirtyError::ShortLogFile { .. })));
        assert!(matches!(Log::map(fd.as_fd(), u64::MAX, 8), Err(DirtyError::ShortLogFile { .. })));
        assert!(matches!(Log::map(fd.as_fd(), u64::MAX - 7, 0), Err(DirtyError::ShortLogFile { .. })));
        assert!(error(101, 0).contains("101 bytes at offset 0") && error(101, 0).contains("L2.2"));
        assert!(Log::map(fd.as_fd(), 92, 8).is_ok());
        assert!(matches!(Log::create(GuestAddress(0)), Err(DirtyError::EmptyLog)));
    }

    #[test]
    fn a_created_log_has_the_size_that_qemu_computes_and_cannot_be_resized() {
        for (end, size) in [(1, 8), (0x4_0000, 8), (0x4_0001, 16), (1 << 30, 32 << 10), ((5 << 30) + 4096, 163_848)] {
            let (log, fd) = Log::create(GuestAddress(end)).unwrap();
            assert_eq!(log.size(), size, "memory end {end:#x}");
            assert!(log.pages() * LOG_PAGE >= end);
            assert!(nix::unistd::ftruncate(&fd, 0).is_err());
            // A peer's mapping shares the bits.
            let peer = Log::map(fd.as_fd(), size, 0).unwrap();
            peer.mark(GuestAddress(end - 1), 1);
            assert!(log.is_marked(GuestAddress(end - 1)));
        }
    }

    /// A range, mostly near the end of a small log.
    fn range() -> impl Strategy<Value = (u64, u64)> {
        let gpa =
            prop_oneof![0..3000u64 * 4096, (0..3000u64).prop_map(|page| page * 4096), (0..90u64).prop_map(|w| w << 18)];
        let len = prop_oneof![0..3 * 4096u64, 0..(1u64 << 21), Just(1), Just(4096)];
        (gpa, len)
    }

    proptest! {
        #[test]
        fn marks_are_exactly_the_pages_written(
            size in 1..300u64,
            offset in prop_oneof![Just(0), Just(8), Just(4096), Just(4104)],
            ranges in prop::collection::vec((range(), any::<bool>()), 0..20),
            noise in any::<bool>(),
        ) {
            let fd = memfd(offset + size + 100);
            // The bytes around the log must not change, be they all clear or all set.
            fill(&fd, if noise { 0xff } else { 0 });
            let log = Log::map(fd.as_fd(), size, offset).unwrap();
            log.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
            log.tail().iter().for_each(|byte| byte.store(0, Ordering::Relaxed));
            let mut expected = bytes(&fd);
            let (from, to) = (offset as usize, (offset + size) as usize);
            let mut outside = 0;
            for ((gpa, len), burst) in ranges {
                outside += oracle(&mut expected[from..to], gpa, len);
                if burst { log.burst().mark(GuestAddress(gpa), len) } else { log.mark(GuestAddress(gpa), len) }
            }
            prop_assert_eq!(&bytes(&fd), &expected);
            prop_assert_eq!(u128::from(log.out_of_range()), outside);
            for page in 0..size * 8 + 9 {
                let set = page < size * 8 && expected[from + (page / 8) as usize] >> (page % 8) & 1 != 0;
                prop_assert_eq!(log.is_marked(GuestAddress(page * 4096 + 17)), set);
            }

            let pages = expected[from..to].iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
            let mut set = PageSet::default();
            let stopped = pages % 2 == 0;
            let found = if stopped { log.harvest_stopped(&mut set) } else { log.harvest(&mut set) };
            prop_assert_eq!((found.pages, found.added, set.len()), (pages, pages, pages));
            prop_assert!(set.iter().all(|PageNumber(page)| expected[from + (page / 8) as usize] >> (page % 8) & 1 != 0));
            expected[from..to].fill(0);
            prop_assert_eq!(bytes(&fd), expected, "the harvest clears the log and nothing else");
        }
    }

    #[test]
    fn a_range_that_wraps_around_is_counted_and_marks_nothing() {
        let (log, fd) = Log::create(GuestAddress(1 << 30)).unwrap();
        for mark in [|log: &Log, gpa, len| log.mark(gpa, len), |log: &Log, gpa, len| log.burst().mark(gpa, len)] {
            let before = log.out_of_range();
            mark(&log, GuestAddress(u64::MAX), 2);
            mark(&log, GuestAddress(4096), u64::MAX);
            assert_eq!(log.out_of_range() - before, 1 + (u64::MAX - 1) / 4096 + 1);
            mark(&log, GuestAddress(u64::MAX), 1);
            mark(&log, GuestAddress(1 << 30), 4097);
            assert_eq!(log.out_of_range() - before, 1 + (1 << 52) + 1 + 2);
        }
        assert!(bytes(&fd).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_range_is_marked_if_all_of_its_pages_are() {
        let (log, _) = Log::create(GuestAddress(1 << 20)).unwrap();
        log.mark(GuestAddress(2 * LOG_PAGE), 2 * LOG_PAGE);
        assert!(log.are_marked(GuestAddress(2 * LOG_PAGE), 2 * LOG_PAGE));
        assert!(log.are_marked(GuestAddress(3 * LOG_PAGE - 1), 2));
        assert!(log.are_marked(GuestAddress(0), 0), "an empty range");
        assert!(!log.are_marked(GuestAddress(2 * LOG_PAGE - 1), 2), "the page before");
        assert!(!log.are_marked(GuestAddress(2 * LOG_PAGE), 2 * LOG_PAGE + 1), "the page after");
        assert!(!log.are_marked(GuestAddress(u64::MAX), 2), "a range that wraps around");
    }

    #[test]
    fn mark_memory_marks_every_page_of_every_region() {
        let region = |gpa, pages| {
            let fd = sealed_memfd("test", pages * LOG_PAGE).unwrap();
            Arc::new(crate::memory::Region::share(fd, GuestAddress(gpa), pages * LOG_PAGE, 0).unwrap())
        };
        let memory = Memory::new([region(LOG_PAGE, 3), region(1 << 30, 2)]).unwrap();
        let (log, _) = Log::create(memory.end()).unwrap();
        log.mark_memory(&memory);
        let mut set = PageSet::default();
        assert_eq!(log.harvest(&mut set).pages, 5);
        assert_eq!(set.runs().collect::<Vec<_>>(), [1..4, 1 << 18..(1 << 18) + 2].map(PageRange::from));
    }

    #[test]
    fn copy_to_adds_the_marks_to_the_other_log_and_keeps_its_own() {
        // A small log with bytes after its last word, one without, and a large one with holes.
        for (size, runs) in [
            (100, &[0..1, 3..5, 63..65, 128..256, 700..701, 799..800][..]),
            (104, &[64..65, 831..832]),
            (8 << 20, &[5..6, 1 << 22..(1 << 22) + 65, (64 << 20) - 1..64 << 20]),
        ] {
            let [old_fd, new_fd] = [memfd(size), memfd(size + 8)];
            let [old, new] =
                [(&old_fd, size), (&new_fd, size + 8)].map(|(fd, size)| Log::map(fd.as_fd(), size, 0).unwrap());
            runs.iter().for_each(|run| old.mark(GuestAddress(run.start * LOG_PAGE), (run.end - run.start) * LOG_PAGE));
            new.mark(GuestAddress(9 * LOG_PAGE), 1);
            let before = bytes(&old_fd);
            old.copy_to(&new);
            assert_eq!(bytes(&old_fd), before, "{size} bytes");
            assert_eq!(new.out_of_range(), 0, "{size} bytes");
            let mut set = PageSet::default();
            new.harvest(&mut set);
            assert!(set.remove(PageNumber(9)));
            assert_eq!(set.runs().map(PageRange::numbers).collect::<Vec<_>>(), runs, "{size} bytes");
        }
    }

    #[test]
    fn no_byte_beyond_the_end_of_the_log_is_accessed() {
        // The log ends with its page, and the next page is inaccessible: an access raises SIGSEGV. The kernel places a
        // new mapping below the last one, unless another thread maps memory in between; then the next attempt succeeds.
        for size in (8..=4096).step_by(8).filter(|size| *size < 128 || *size % 512 == 0) {
            let fd = memfd(4096);
            let attempts = (0..64).map(|_| {
                let guard = MmapOptions::new().len(4096).map_anon().unwrap().make_read_only().unwrap();
                // SAFETY: the page belongs to this test and is not accessed.
                unsafe { libc::mprotect(guard.as_ptr().cast_mut().cast(), 4096, libc::PROT_NONE) };
                (Log::map(fd.as_fd(), size, 4096 - size).unwrap(), guard)
            });
            let adjacent = |(log, guard): &(Log, memmap2::Mmap)| {
                log.map.as_mut_ptr().addr() + size as usize == guard.as_ptr().addr()
            };
            let mut kept = Vec::new();
            for pair in attempts {
                kept.push(pair);
                if kept.last().is_some_and(adjacent) {
                    break;
                }
            }
            let (log, _guard) =
                kept.last().filter(|pair| adjacent(pair)).expect("a log directly before its guard page");
            let mut set = PageSet::default();
            log.mark(GuestAddress(0), u64::MAX);
            log.burst().mark(GuestAddress(0), 1 << 40);
            assert_eq!(log.harvest(&mut set).pages, size * 8);
            log.burst().mark(GuestAddress(0), 1 << 40);
            assert_eq!(log.harvest_stopped(&mut set).pages, size * 8);
        }
    }

    #[test]
    fn a_harvest_of_a_sparse_log_does_not_populate_its_holes() {
        let (log, fd) = Log::create(GuestAddress(1 << 40)).unwrap();
        let mut set = PageSet::default();
        assert_eq!(log.harvest(&mut set).pages, 0);
        let gpas = [0, 1 << 30, (1 << 30) + 4096, 77 << 32, (1 << 40) - 1];
        gpas.iter().for_each(|gpa| log.mark(GuestAddress(*gpa), 1));
        assert_eq!(log.harvest(&mut set), Harvest { pages: 5, added: 5 });
        assert!(set.iter().eq(gpas.iter().map(|gpa| PageNumber(gpa / 4096))));
        gpas.iter().for_each(|gpa| log.mark(GuestAddress(*gpa), 1));
        assert_eq!(log.harvest_stopped(&mut set), Harvest { pages: 5, added: 0 });
        assert!(fstat(&fd).unwrap().st_blocks * 512 <= 4 * 4096, "the holes were filled");
    }

    /// Rule L13.3.
    #[test]
    fn a_harvest_finds_all_marks_at_every_offset_and_density() {
        let size = SPARSE_MIN + 13;
        for (offset, step) in [(0, 64 << 12), (4096, 1 << 20), (8, 1 << 27), (2 << 20, 1 << 29), (4096 + 8, 1 << 31)] {
            let fd = memfd(offset + size + 4096);
            let log = Log::map(fd.as_fd(), size, offset).unwrap();
            let gpas: Vec<u64> =
                (0..log.pages() * LOG_PAGE).step_by(step).chain([log.pages() * LOG_PAGE - 1]).collect();
            let pages: std::collections::BTreeSet<PageNumber> =
                gpas.iter().map(|gpa| PageNumber(gpa / LOG_PAGE)).collect();
            for harvest in [Log::harvest, Log::harvest_stopped] {
                let mut set = PageSet::default();
                gpas.iter().for_each(|gpa| log.mark(GuestAddress(*gpa), 1));
                assert_eq!(harvest(&log, &mut set).pages, pages.len() as u64);
                assert!(set.iter().eq(pages.iter().copied()));
                assert_eq!(harvest(&log, &mut set).pages, 0);
            }
        }
    }

    #[test]
    fn a_burst_signals_once_and_only_if_it_marked_a_clean_page() {
        let (log, _) = Log::create(GuestAddress(1 << 30)).unwrap();
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let signal = LogSignal::new(eventfd.as_fd().try_clone_to_owned().unwrap());
        let burst = log.burst();
        burst.mark(GuestAddress(0), 4096);
        burst.mark(GuestAddress(1 << 20), 1 << 20);
        burst.signal(&signal).unwrap();
        assert_eq!(eventfd.read().unwrap(), 1);

        let burst = log.burst();
        burst.mark(GuestAddress(0), 4096);
        burst.mark(GuestAddress(1 << 30), 4096);
        burst.signal(&signal).unwrap();
        assert_eq!(eventfd.read(), Err(Errno::EAGAIN), "nothing in the log changed");
    }

    #[test]
    fn a_full_signal_neither_fails_nor_blocks() {
        for flags in [EfdFlags::empty(), EfdFlags::EFD_NONBLOCK] {
            let eventfd = EventFd::from_value_and_flags(0, flags).unwrap();
            eventfd.write(u64::MAX - 1).unwrap();
            let signal = LogSignal::new(eventfd.as_fd().try_clone_to_owned().unwrap());
            signal.signal().unwrap();
            assert!(eventfd.read().unwrap() >= u64::MAX - 1);
        }
        let (ours, peer) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(peer);
        assert!(LogSignal::new(ours.into()).signal().is_err(), "the peer has closed the socket");
    }

    /// Rule L1.2.
    #[test]
    fn marks_of_many_threads_are_all_harvested() {
        const PAGES: u64 = 1 << 14;
        let log = Arc::new(Log::create(GuestAddress(PAGES * LOG_PAGE)).unwrap().0);
        let marked = AtomicU64::new(0);
        let mut set = PageSet::default();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (log, marked) = (&log, &marked);
                scope.spawn(move || {
                    for page in (0..PAGES).filter(|page| page % 4 == thread) {
                        if page % 8 < 4 {
                            log.mark(GuestAddress(page * LOG_PAGE), 1)
                        } else {
                            log.burst().mark(GuestAddress(page * LOG_PAGE), 1)
                        }
                    }
                    marked.fetch_add(1, Ordering::Release);
                });
            }
            while marked.load(Ordering::Acquire) < 4 {
                log.harvest(&mut set);
            }
        });
        log.harvest_stopped(&mut set);
        assert_eq!(set.len(), PAGES);
    }
}
