//! Taps: network interfaces of the host whose other end is a file descriptor. The only `unsafe` of the network device:
//! the ioctls.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::libc::{self, c_int};

use super::NetError;
use super::state::{HEADER, PeerPort};
use crate::abi::linux::InterfaceRequest;

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, InterfaceRequest);
nix::ioctl_write_ptr_bad!(tun_set_header, libc::TUNSETVNETHDRSZ, c_int);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);

/// Opens one queue per pair of the tap `name`. A tap that does not exist is created, and is removed when this process
/// ends.
pub(super) fn open(name: &str, pairs: u16) -> Result<Vec<PeerPort>, NetError> {
    let one = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let several = one | libc::IFF_MULTI_QUEUE;
    if pairs > 1 {
        return (0..pairs).map(|_| queue(name, several)).collect();
    }
    // A tap created with multi_queue can be opened only with this flag.
    let port = queue(name, one).or_else(|error| queue(name, several).map_err(|_| error))?;
    Ok(vec![port])
}

fn queue(name: &str, flags: c_int) -> Result<PeerPort, NetError> {
    let refused = |source: io::Error| {
        let advice = match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPERM | Errno::EACCES) => "run as root, or make it for this user: ip tuntap add ... user NAME",
            Some(Errno::ENOENT | Errno::ENODEV) => "the system has no /dev/net/tun: load the module tun",
            Some(Errno::EBUSY) => "another process has it open: end that, or use another tap",
            Some(Errno::EINVAL) => "is it a tap? For several queue pairs it must be made with multi_queue",
            _ => "check its name",
        };
        NetError::Tap { name: name.into(), source, advice }
    };
    let mut request = InterfaceRequest { name: [0; libc::IFNAMSIZ], flags: flags as libc::c_short, padding: [0; 22] };
    // The last byte stays 0, as the terminator.
    match request.name.split_last_mut().and_then(|(_, space)| space.get_mut(..name.len())) {
        Some(space) if !name.is_empty() && !name.contains(['\0', '/', '%']) => space.copy_from_slice(name.as_bytes()),
        _ => return Err(NetError::TapName { name: name.into() }),
    }
    let tap = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let tap: File = tap.map_err(refused)?;
    let (fd, header) = (tap.as_raw_fd(), HEADER as c_int);
    let failed = |errno: Errno| refused(errno.into());
    // SAFETY: the request is a whole ifreq, which is only read.
    unsafe { tun_set_iff(fd, &raw const request) }.map_err(failed)?;
    // SAFETY: an int, which is only read.
    unsafe { tun_set_header(fd, &raw const header) }.map_err(failed)?;
    // SAFETY: takes no pointer. A previous user may have enabled offloads that the driver has not negotiated.
    unsafe { tun_set_offload(fd, 0) }.map_err(failed)?;
    let input = tap.try_clone().map_err(refused)?;
    Ok(PeerPort::new(tap.into(), input.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_tap_name_is_refused_before_any_system_call() {
        for name in ["", "sixteen-bytes-xx", "a/b", "tap%d", "a\0"] {
            assert!(matches!(open(name, 1), Err(NetError::TapName { .. })), "{name:?}");
        }
    }
}
