//! Writing the page cache back before somebody waits for it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Has the disk write `count` bytes of a file that begin at `offset`; with `wait`, until it has them. A kernel or sandbox
/// that can't leaves that to the next fdatasync.
///
/// # Errors
/// The error of the system.
pub(crate) fn write_back(fd: BorrowedFd<'_>, offset: u64, count: u64, wait: bool) -> io::Result<()> {
    let before_and_after = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let flags = libc::SYNC_FILE_RANGE_WRITE | if wait { before_and_after } else { 0 };
    if count == 0 {
        // It would mean all of the file.
        return Ok(());
    }
    // SAFETY: it touches no memory.
    match unsafe { libc::sync_file_range(fd.as_raw_fd(), offset.cast_signed(), count.cast_signed(), flags) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
            error => Err(error),
        },
    }
}

/// Has the disk begin to write all of a file that it does not have. What becomes of that is told to the next fdatasync.
///
/// # Errors
/// As [`write_back`].
pub(crate) fn begin_write_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    write_back(fd, 0, i64::MAX as u64, false)
}
