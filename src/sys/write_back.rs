//! Starting the write-back of the page cache early, so that a later fdatasync has less to wait for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Starts the write-back of `count` bytes of a file from `offset`; with `wait`, waits until they are written.
///
/// Does nothing where the kernel or a sandbox refuses sync_file_range: the next fdatasync writes the bytes.
///
/// # Errors
/// The error of the system.
pub(crate) fn write_back(fd: BorrowedFd<'_>, offset: u64, count: u64, wait: bool) -> io::Result<()> {
    let before_and_after = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let flags = libc::SYNC_FILE_RANGE_WRITE | if wait { before_and_after } else { 0 };
    if count == 0 {
        // For sync_file_range, 0 means up to the end of the file.
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

/// Starts the write-back of all dirty pages of a file. The next fdatasync reports its result.
///
/// # Errors
/// As [`write_back`].
pub(crate) fn begin_write_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    write_back(fd, 0, i64::MAX as u64, false)
}
