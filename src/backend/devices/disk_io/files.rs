//! The open files of an image: requirements of direct I/O, and unsynced changes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::fdatasync;
use tracing::warn;

use super::{DiskOp, IoPath};

/// Range of block sizes assumed for a file that does not report its own, in bytes.
const ASSUMED_BLOCK: std::ops::RangeInclusive<u64> = 512..=4096;

/// Alignment required for direct I/O in bytes, powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Alignment of buffers.
    pub(crate) memory: u64,
    /// Alignment of offsets and lengths.
    pub(crate) block: u64,
}

/// One image, opened for buffered I/O and optionally for direct I/O.
#[derive(Debug)]
pub(crate) struct ImageFiles {
    pub(crate) buffered: File,
    /// Opened with O_DIRECT.
    direct: Option<(File, Alignment)>,
    /// True if something was changed after the last flush began.
    unsynced: AtomicBool,
    /// True if I/O of a direct image went through the page cache.
    used_page_cache: AtomicBool,
}

impl ImageFiles {
    /// # Errors
    /// The error of the system for `direct`, which was opened with O_DIRECT; [`io::ErrorKind::Unsupported`] if its I/O
    /// would use the page cache nevertheless.
    pub(crate) fn new(buffered: File, direct: Option<File>) -> io::Result<ImageFiles> {
        let direct = direct.map(|file| alignment(&file).map(|alignment| (file, alignment))).transpose()?;
        Ok(ImageFiles { buffered, direct, unsynced: AtomicBool::new(false), used_page_cache: AtomicBool::new(false) })
    }

    /// Returns the alignment required for direct I/O, if the image is opened for it.
    pub(crate) fn alignment(&self) -> Option<Alignment> {
        self.direct.as_ref().map(|(_, alignment)| *alignment)
    }

    /// Returns the file for I/O that should bypass the page cache.
    pub(crate) fn preferred(&self) -> &File {
        self.direct.as_ref().map_or(&self.buffered, |(file, _)| file)
    }

    /// Returns the file for I/O on this path.
    pub(super) fn file_for(&self, way: IoPath) -> &File {
        if way == IoPath::Cached { &self.buffered } else { self.preferred() }
    }

    /// Records the start of an attempt.
    pub(super) fn note_start(&self, op: DiskOp, way: IoPath) {
        match op {
            // A write that completes during the flush may not be part of it.
            DiskOp::Flush => self.unsynced.store(false, Ordering::Release),
            // File systems zero the parts of a block through the page cache.
            DiskOp::Discard | DiskOp::Zero { .. } => self.used_page_cache.store(true, Ordering::Release),
            DiskOp::Read | DiskOp::Write { .. } if way == IoPath::Cached => {
                self.used_page_cache.store(true, Ordering::Release)
            }
            DiskOp::Read | DiskOp::Write { .. } => {}
        }
    }

    /// Records the end of an attempt.
    pub(super) fn note_end(&self, op: DiskOp, succeeded: bool) {
        let unsynced = match op {
            DiskOp::Flush => !succeeded,
            DiskOp::Write { durable } => !durable,
            DiskOp::Discard | DiskOp::Zero { .. } => true,
            DiskOp::Read => false,
        };
        if unsynced {
            self.unsynced.store(true, Ordering::Release);
        }
    }

    /// Puts all changes on stable storage, unless they already are.
    ///
    /// # Errors
    /// The error of the system.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.unsynced.swap(false, Ordering::AcqRel)
            && let Err(errno) = fdatasync(self.preferred())
        {
            self.unsynced.store(true, Ordering::Release);
            return Err(errno.into());
        }
        Ok(())
    }

    /// Drops the page cache of an image opened for direct I/O, because another host may change the image.
    pub(crate) fn drop_cache(&self) {
        if self.direct.is_some()
            && let Err(errno) = posix_fadvise(&self.buffered, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        {
            warn!("the image's page cache can't be dropped: {errno}");
        }
    }

    /// Drops the page cache if I/O has gone through it since the last time.
    pub(crate) fn drop_used_cache(&self) {
        if self.used_page_cache.swap(false, Ordering::AcqRel) {
            self.drop_cache();
        }
    }
}

#[cfg(test)]
impl ImageFiles {
    /// Sets the block size of direct I/O, for tests.
    pub(super) fn with_blocks(mut self, bytes: u64) -> ImageFiles {
        if let Some((_, alignment)) = &mut self.direct {
            alignment.block = bytes;
        }
        self
    }

    pub(super) fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Relaxed)
    }
}

/// Returns the alignment required for direct I/O on this file (STATX_DIOALIGN), as far as its file system reports it.
fn alignment(file: &File) -> io::Result<Alignment> {
    // SAFETY: all fields of the structure are integers.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: the path is a constant, and only this call writes the structure.
    let asked = unsafe { libc::statx(fd, c"".as_ptr(), flags, libc::STATX_DIOALIGN, &raw mut status) };
    if asked == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0 {
        let (memory, block) = (status.stx_dio_mem_align.into(), u64::from(status.stx_dio_offset_align));
        return match block {
            0 => Err(io::ErrorKind::Unsupported.into()),
            _ => Ok(Alignment { memory, block }),
        };
    }
    let metadata = file.metadata()?;
    let block = match metadata.file_type().is_block_device() {
        true => block_size(file.as_fd()).into(),
        false => metadata.blksize().clamp(*ASSUMED_BLOCK.start(), *ASSUMED_BLOCK.end()),
    };
    Ok(Alignment { memory: block, block })
}

nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);

/// Returns the logical block size of a block device in bytes.
pub(crate) fn block_size(device: BorrowedFd<'_>) -> u32 {
    let mut size = 0;
    // SAFETY: this request writes one int, which `size` is.
    let asked = unsafe { blksszget(device.as_raw_fd(), &raw mut size) };
    asked.ok().and_then(|_| u32::try_from(size).ok()).unwrap_or(512)
}
