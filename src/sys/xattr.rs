//! Extended attributes of open files.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Reads an attribute of at most `N` bytes. Returns `None` if the file does not have it.
///
/// # Errors
/// The error of the system: EOPNOTSUPP if the file system has no attributes, ERANGE if the value is longer than `N`.
pub(crate) fn get<const N: usize>(file: &File, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; N];
    // SAFETY: the name is NUL-terminated, and the call writes at most as many bytes as `value` has.
    let len = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match usize::try_from(len) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
            error => Err(error),
        },
    }
}

/// Creates or replaces an attribute. It is on stable storage after the next fsync of the file.
///
/// # Errors
/// The error of the system.
pub(crate) fn set(file: &File, name: &CStr, value: &[u8]) -> io::Result<()> {
    // SAFETY: the name is NUL-terminated, and the call reads as many bytes as `value` has.
    match unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
