//! Signals out of a ring: the call and error fds.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

/// An fd that takes 8 bytes per signal: an eventfd or, from user-mode Linux, a pipe or socket (rule F8).
///
/// A signal never blocks the ring: a receiver that lets signals pile up until nothing fits has one pending anyway.
#[derive(Debug)]
pub struct Notifier {
    fd: OwnedFd,
    blocking: bool,
}

impl Notifier {
    /// Takes the fd of SET_VRING_CALL or SET_VRING_ERR.
    pub fn new(fd: OwnedFd) -> Notifier {
        // The flag belongs to the front-end, which may rely on it: it is looked at and left alone.
        let flags = fcntl(&fd, FcntlArg::F_GETFL).unwrap_or(0);
        Notifier { fd, blocking: !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK) }
    }

    /// Signals once. What the receiver can't take is dropped: it has hung up, or has signals it didn't look at yet.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        let mut rest = &one[..];
        while !rest.is_empty() && (!self.blocking || self.is_writable()) {
            match write(&self.fd, rest) {
                // Pipes and sockets may take part of the 8 bytes; the receiver counts on whole ones.
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
    }

    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
            && fds.iter().all(|fd| fd.revents() == Some(PollFlags::POLLOUT))
    }
}
