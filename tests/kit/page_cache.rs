//! The state of a file in the page cache.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The number of pages of a file that are dirty or being written back.
pub(crate) fn unwritten(fd: BorrowedFd<'_>) -> u64 {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [0u64; 2];
    // Cached, dirty, being written, evicted, recently evicted.
    let mut found = [0u64; 5];
    // SAFETY: both arrays have the size of the kernel's structures and exist during the call.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0) };
    assert_eq!(result, 0, "cachestat needs Linux 6.5: {}", io::Error::last_os_error());
    found[1] + found[2]
}
