//! The open files of one image: what direct I/O needs of them, and what of them may be in the page cache alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::fdatasync;
use tracing::warn;

use super::{DiskOp, IoPath};

/// Smallest unit of direct I/O anywhere, and the largest that is assumed of a file that doesn't tell, in bytes.
const ASSUMED_BLOCK: std::ops::RangeInclusive<u64> = 512..=4096;

/// The alignment that direct I/O on a file needs, in bytes; powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of buffers.
    pub(crate) memory: u64,
    /// Of offsets and lengths.
    pub(crate) block: u64,
}

/// One image, opened in every way that is needed.
#[derive(Debug)]
pub(crate) struct ImageFiles {
    pub(crate) buffered: File,
    /// With O_DIRECT.
    direct: Option<(File, Alignment)>,
    /// Whether something was changed that no flush was started after.
    unsynced: AtomicBool,
    /// Whether I/O that should have been direct went through the page cache.
    used_page_cache: AtomicBool,
}

impl ImageFiles {
    /// # Errors
    /// What the system says of `direct`, which was opened with O_DIRECT; [`io::ErrorKind::Unsupported`] if its I/O would go
    /// through the page cache all the same.
    pub(crate) fn new(buffered: File, direct: Option<File>) -> io::Result<ImageFiles> {
        let direct = direct.map(|file| alignment(&file).map(|alignment| (file, alignment))).transpose()?;
        Ok(ImageFiles { buffered, direct, unsynced: AtomicBool::new(false), used_page_cache: AtomicBool::new(false) })
    }

    /// The alignment that direct I/O needs, if the image is opened for it.
    pub(crate) fn alignment(&self) -> Option<Alignment> {
        self.direct.as_ref().map(|(_, alignment)| *alignment)
    }

    /// The file for I/O that should go past the page cache.
    pub(crate) fn preferred(&self) -> &File {
        self.direct.as_ref().map_or(&self.buffered, |(file, _)| file)
    }

    /// The file that I/O goes through.
    pub(super) fn file_for(&self, way: IoPath) -> &File {
        if way == IoPath::Cached { &self.buffered } else { self.preferred() }
    }

    /// Notes that an attempt begins.
    pub(super) fn note_start(&self, op: DiskOp, way: IoPath) {
        match op {
            // What completes while it is under way may not be in it.
            DiskOp::Flush => self.unsynced.store(false, Ordering::Release),
            // File systems zero the parts of a block through the page cache.
            DiskOp::Discard | DiskOp::Zero { .. } => self.used_page_cache.store(true, Ordering::Release),
            DiskOp::Read | DiskOp::Write { .. } if way == IoPath::Cached => {
                self.used_page_cache.store(true, Ordering::Release)
            }
            DiskOp::Read | DiskOp::Write { .. } => {}
        }
    }

    /// Notes that an attempt has ended.
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

    /// Puts everything that was changed on stable storage, unless it is there.
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

    /// Forgets what the page cache has of an image that is opened for direct I/O: another host may have changed the image
    /// since, or may do so from now on.
    pub(crate) fn drop_cache(&self) {
        if self.direct.is_some()
            && let Err(errno) = posix_fadvise(&self.buffered, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        {
            warn!("the image's page cache can't be dropped: {errno}");
        }
    }

    /// The same, if I/O has gone through it since the last time.
    pub(crate) fn drop_used_cache(&self) {
        if self.used_page_cache.swap(false, Ordering::AcqRel) {
            self.drop_cache();
        }
    }
}

#[cfg(test)]
impl ImageFiles {
    /// As if direct I/O needed blocks of that many bytes.
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

/// What direct I/O on this file needs (STATX_DIOALIGN), as far as its file system tells.
fn alignment(file: &File) -> io::Result<Alignment> {
    // SAFETY: all of its fields are integers.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: the path is a constant, and the structure is this call's.
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

/// The logical block size of a block device, in bytes.
pub(crate) fn block_size(device: BorrowedFd<'_>) -> u32 {
    let mut size = 0;
    // SAFETY: this request writes one int, which `size` is.
    let asked = unsafe { blksszget(device.as_raw_fd(), &raw mut size) };
    asked.ok().and_then(|_| u32::try_from(size).ok()).unwrap_or(512)
}
