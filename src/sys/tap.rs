//! Taps that another program part has opened: their flags, and the size of their header.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc::{self, c_int};

use crate::abi::linux::InterfaceRequest;

nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF, InterfaceRequest);
nix::ioctl_write_ptr_bad!(tun_set_header, libc::TUNSETVNETHDRSZ, c_int);

/// Returns the flags of a tap (`IFF_*`).
///
/// # Errors
/// `EBADFD` for a tap whose interface was removed; another error for a file that is not a tap.
pub(crate) fn flags(tap: BorrowedFd<'_>) -> nix::Result<i16> {
    let mut request = InterfaceRequest { name: [0; libc::IFNAMSIZ], flags: 0, padding: [0; 22] };
    // SAFETY: the request is a whole ifreq.
    unsafe { tun_get_iff(tap.as_raw_fd(), &raw mut request) }?;
    Ok(request.flags)
}

/// Sets the size of the header in front of each frame, bytes.
///
/// # Errors
/// The error of the system.
pub(crate) fn set_header(tap: BorrowedFd<'_>, size: c_int) -> nix::Result<()> {
    // SAFETY: an int, which is only read.
    unsafe { tun_set_header(tap.as_raw_fd(), &raw const size) }.map(drop)
}
