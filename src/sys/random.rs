//! Random numbers from the kernel (getrandom), which work also in a sandbox that opens no files.

use std::io;

/// A random number of 128 bits.
///
/// # Errors
/// The error of the system.
pub(crate) fn random() -> io::Result<u128> {
    let mut bytes = [0u8; 16];
    // SAFETY: the call writes at most as many bytes as `bytes` has. Up to 256 bytes are never cut short (getrandom(2)).
    match unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) } {
        len if usize::try_from(len) == Ok(bytes.len()) => Ok(u128::from_le_bytes(bytes)),
        _ => Err(io::Error::last_os_error()),
    }
}
