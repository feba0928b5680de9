//! The shared dirty log of VHOST_SET_LOG_BASE and VHOST_USER_SET_LOG_BASE: map or create, mark, burst, signal.
//!
//! One bit per 4 KiB page of guest-physical memory, byte `page / 8`, bit `page % 8` (rule L1), in memory that several
//! processes change at once (rule L11): every write here is an atomic read-modify-write. Scanning and clearing is in
//! `harvest`; when to log and where to is the business of whoever holds the [`Log`].

use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::LOG_PAGE;
use super::harvest::{self, Harvest};
use super::page_set::{PageSet, mask, word_masks};

/// Bytes of log under which looking for holes costs more than reading them.
const SPARSE_MIN: u64 = 256 << 10;
/// A log is walked by its holes when less than one part in this many is populated: finding a populated stretch takes
/// two system calls, about the time of reading eight pages of log.
const SPARSE_RATIO: u64 = 8;

/// Why a log can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// A log of no bytes.
    #[error("the dirty log has size 0: give it one bit per 4 KiB page of guest memory (rule L2)")]
    Empty,
    /// The file ends before the log does; touching the rest would be a SIGBUS.
    #[error(
        "the dirty log needs {size} bytes at offset {offset}, but its file has {file} bytes: enlarge the file (rule L2)"
    )]
    ShortFile {
        /// Bytes of log asked for.
        size: u64,
        /// Where in the file it starts, in bytes.
        offset: u64,
        /// Bytes in the file.
        file: u64,
    },
    /// The log would not start at a whole 64-bit word.
    #[error("the dirty log starts at offset {offset}, which is no multiple of 8: align it (rule L2)")]
    Misaligned {
        /// Where in the file it would start, in bytes.
        offset: u64,
    },
    /// The system refused.
    #[error("can't {what} the dirty log: {cause}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        cause: std::io::Error,
    },
}

impl LogError {
    fn system<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> LogError {
        move |cause| LogError::System { what, cause: cause.into() }
    }
}

/// A dirty log mapped into this process; shared as `Arc<Log>` between the threads that mark and the one that harvests.
#[derive(Debug)]
pub struct Log {
    map: MmapRaw,
    /// Bytes; a page count would lose nothing, but every peer speaks of bytes.
    size: u64,
    /// The file of the log, to look for holes in it.
    file: OwnedFd,
    /// Where in the file the log starts, in bytes.
    offset: u64,
    /// Whether the file is one whose holes are exact while it is mapped: tmpfs, which memfds live in.
    holes: bool,
    out_of_range: AtomicU64,
}

impl Log {
    /// Maps a log that somebody else made: `size` bytes at `offset` of `fd` (vhost-user spec,
    /// "VHOST_USER_SET_LOG_BASE"; rule L2).
    ///
    /// Any size is taken: each of its bytes counts, and none beyond is written.
    ///
    /// # Errors
    /// Size 0, an offset that is no multiple of 8, a file that ends before the log does, or what the system says.
    pub fn map(fd: BorrowedFd<'_>, size: u64, offset: u64) -> Result<Log, LogError> {
        if size == 0 {
            return Err(LogError::Empty);
        }
        if offset % 8 != 0 {
            return Err(LogError::Misaligned { offset });
        }
        let file = fstat(fd).map_err(LogError::system("look at the file of"))?.st_size.cast_unsigned();
        let len = match (offset.checked_add(size), usize::try_from(size)) {
            (Some(end), Ok(len)) if end <= file => len,
            _ => return Err(LogError::ShortFile { size, offset, file }),
        };
        let map = MmapOptions::new().offset(offset).len(len).map_raw(&fd).map_err(LogError::system("map"))?;
        Ok(Log {
            map,
            size,
            file: fd.try_clone_to_owned().map_err(LogError::system("keep the file of"))?,
            offset,
            holes: fstatfs(fd).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC),
            out_of_range: AtomicU64::new(0),
        })
    }

    /// Makes a log for guest memory that ends at `memory_end` (one past the last byte), with the fd to share.
    ///
    /// It is a memfd of the size that QEMU computes, one 64-bit word per 256 KiB, sealed against resizing so that no
    /// peer can make another one fault; peers map and write it freely.
    ///
    /// # Errors
    /// No memory at all, or what the system says.
    pub fn create(memory_end: u64) -> Result<(Log, OwnedFd), LogError> {
        let last = memory_end.checked_sub(1).ok_or(LogError::Empty)?;
        let size = (last / (64 * LOG_PAGE) + 1) * 8;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create("vhost-dirty-log", flags).map_err(LogError::system("create"))?;
        nix::unistd::ftruncate(&fd, size.cast_signed()).map_err(LogError::system("size"))?;
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(LogError::system("seal"))?;
        Ok((Log::map(fd.as_fd(), size, 0)?, fd))
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The number of pages there is a bit for.
    pub fn pages(&self) -> u64 {
        self.size.saturating_mul(8)
    }

    /// Marks the pages of the guest-physical bytes `gpa..gpa + len`, after they were written (rules L1, L10).
    ///
    /// One unconditional atomic or per word, which is also the barrier between the data and the bit. Pages outside
    /// the log, and ranges that wrap around, are counted and nothing else (rule L6).
    #[inline]
    pub fn mark(&self, gpa: u64, len: u64) {
        self.set::<false>(gpa, len);
    }

    /// Begins a burst of marks for data that is already written: **all data writes must precede this call**.
    ///
    /// The burst may skip the atomic or where the bit is set already, because a fence stands between the data writes
    /// and its looks at the bits (rule L10); this call is that fence. Later data needs another burst.
    #[inline]
    pub fn burst(&self) -> Burst<'_> {
        fence(Ordering::SeqCst);
        Burst { log: self, changed: Cell::new(false) }
    }

    /// Whether the page of `gpa` is marked.
    pub fn is_marked(&self, gpa: u64) -> bool {
        let page = gpa / LOG_PAGE;
        let word = match self.words().get((page / 64) as usize) {
            Some(word) => u64::from_le(word.load(Ordering::Acquire)),
            None if page < self.pages() => {
                self.tail().iter().rev().fold(0, |all, byte| all << 8 | u64::from(byte.load(Ordering::Acquire)))
            }
            None => 0,
        };
        word >> (page % 64) & 1 != 0
    }

    /// How many pages outside the log were to be marked so far (rule L6); each is a page that a migration would lose.
    pub fn out_of_range(&self) -> u64 {
        self.out_of_range.load(Ordering::Relaxed)
    }

    /// Takes all marks out of the log and adds their pages to `into`, while others go on marking (rule L13).
    ///
    /// Read the pages only after this returns. `into` grows to the size of the log if it is smaller.
    pub fn harvest(&self, into: &mut PageSet) -> Harvest {
        self.harvest_with(harvest::take, into)
    }

    /// Like [`harvest`](Log::harvest), but without atomics: for the last harvest, after every writer has stopped.
    ///
    /// A mark that comes in meanwhile may be lost.
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
        // Pairs with the fence of a burst: whoever still saw its bit set has its data visible to our reads of pages.
        fence(Ordering::SeqCst);
        found
    }

    /// Calls `each` with ranges of bytes of the log that together hold all its marks.
    ///
    /// A mostly empty log has pages that were never touched. They are found without reading them, which would cost
    /// time and, on tmpfs, memory. Seeking moves the position of a file description shared with peers: nobody reads
    /// a log through it, and only the result of a seek is used here.
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

    fn populated_bytes(&self) -> u64 {
        fstat(&self.file).map_or(u64::MAX, |stat| stat.st_blocks.cast_unsigned().saturating_mul(512))
    }

    /// Seeks from a byte of the log to a byte of the log.
    fn seek(&self, from: u64, whence: Whence) -> Result<u64, Errno> {
        let at = lseek(&self.file, (self.offset + from).cast_signed(), whence)?;
        Ok(at.cast_unsigned().saturating_sub(self.offset))
    }

    /// Sets the bits; tells whether it wrote to the log. With `TEST`, not where all of them are set already.
    #[inline]
    fn set<const TEST: bool>(&self, gpa: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else {
            return false;
        };
        if let Some(last) = gpa.checked_add(last) {
            let (first, last) = (gpa / LOG_PAGE, last / LOG_PAGE);
            if first / 64 == last / 64
                && let Some(word) = self.words().get((first / 64) as usize)
            {
                return or::<TEST>(word, mask(first % 64, last % 64));
            }
            return self.set_many::<TEST>(first, last);
        }
        self.refuse(gpa, last / LOG_PAGE + 1);
        false
    }

    fn set_many<const TEST: bool>(&self, first: u64, last: u64) -> bool {
        let words = self.words();
        let pages = self.pages();
        let mut changed = false;
        if first < pages {
            for (index, mask) in word_masks(first, last.min(pages - 1)) {
                changed |= match words.get(index) {
                    Some(word) => or::<TEST>(word, mask),
                    None => or_bytes::<TEST>(self.tail(), mask),
                };
            }
        }
        if last >= pages {
            self.refuse(first * LOG_PAGE, last - first.max(pages) + 1);
        }
        changed
    }

    #[cold]
    fn refuse(&self, gpa: u64, pages: u64) {
        if self.out_of_range.fetch_add(pages, Ordering::Relaxed) == 0 {
            tracing::warn!(
                "write at guest-physical {gpa:#x} reaches outside the dirty log of {} pages: not marked (rule L6)",
                self.pages()
            );
        }
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `size` bytes as long as `self` lives and is only accessed atomically; it starts
        // at a multiple of 8, as the offset does.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), (self.size / 8) as usize) }
    }

    /// The bytes after the last whole word.
    fn tail(&self) -> &[AtomicU8] {
        let rest = (self.size % 8) as usize;
        // SAFETY: the last `size % 8` bytes of the mapping, which lives as long as `self`; accessed atomically only.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().add(self.size as usize - rest).cast(), rest) }
    }
}

/// Marks for data written before the burst began, see [`Log::burst`].
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
    pub fn mark(&self, gpa: u64, len: u64) {
        if self.log.set::<true>(gpa, len) {
            self.changed.set(true);
        }
    }

    /// Ends the burst with a signal to whoever waits for dirty pages, if it marked any page that was clean: at most
    /// one signal for the whole burst (rule L12).
    ///
    /// # Errors
    /// What the system says of the write; the marks are in the log in any case.
    pub fn signal(self, to: &LogSignal) -> Result<(), LogError> {
        if self.changed.get() { to.signal() } else { Ok(()) }
    }
}

/// The eventfd of VHOST_USER_SET_LOG_FD and VHOST_SET_LOG_FD, signalled after marking (rule L12).
#[derive(Debug)]
pub struct LogSignal(OwnedFd);

impl LogSignal {
    /// Takes the fd of the request.
    pub fn new(fd: OwnedFd) -> LogSignal {
        LogSignal(fd)
    }

    /// Signals once; a signal that is still pending stands for this one too, and never blocks the caller.
    ///
    /// # Errors
    /// What the system says, for example when the other end of a socket is gone.
    pub fn signal(&self) -> Result<(), LogError> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        // A full counter blocks a write, and the fd's flags belong to the peer as well: ask first.
        match nix::poll::poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(LogError::system("signal for")(errno)),
        }
        match nix::unistd::write(&self.0, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(LogError::system("signal for")(errno)),
        }
    }
}

impl AsRawFd for LogSignal {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Ors page bits into a word of the log; tells whether it wrote.
#[inline]
fn or<const TEST: bool>(word: &AtomicU64, bits: u64) -> bool {
    let bits = bits.to_le();
    if TEST && word.load(Ordering::Relaxed) & bits == bits {
        return false;
    }
    word.fetch_or(bits, Ordering::AcqRel);
    true
}

/// The same for the bytes after the last word, `bits` being those of the word they would begin.
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
