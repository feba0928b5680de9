//! Signals out of a ring: the call and error fds, or messages in their place.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

use super::Host;

/// What a ring signals: an fd that takes 8 bytes each time, an eventfd or, from user-mode Linux, a pipe or socket (rule F8);
/// or the front-end over the back-end channel (rule B3).
///
/// A signal never blocks the ring: a receiver that lets signals pile up until nothing fits has one pending anyway.
#[derive(Debug)]
pub struct Notifier(Way);

#[derive(Debug)]
enum Way {
    Fd(Line),
    Call(Arc<Host>, u16),
    Error(Arc<Host>, u16),
}

#[derive(Debug)]
struct Line {
    fd: OwnedFd,
    blocking: bool,
}

impl Notifier {
    /// Takes the fd of SET_VRING_CALL or SET_VRING_ERR.
    pub fn new(fd: OwnedFd) -> Notifier {
        // The flag belongs to the front-end, which may rely on it: it is looked at and left alone.
        let flags = fcntl(&fd, FcntlArg::F_GETFL).unwrap_or(0);
        Notifier(Way::Fd(Line { fd, blocking: !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK) }))
    }

    /// Calls in-band for ring `index`.
    pub(super) fn call(host: Arc<Host>, index: u16) -> Notifier {
        Notifier(Way::Call(host, index))
    }

    /// Tells in-band that ring `index` is broken.
    pub(super) fn error(host: Arc<Host>, index: u16) -> Notifier {
        Notifier(Way::Error(host, index))
    }

    /// Signals once. What the receiver can't take is dropped: it has hung up, or has signals it didn't look at yet.
    pub fn signal(&self) {
        match &self.0 {
            Way::Fd(line) => line.signal(),
            Way::Call(host, index) => host.call(*index),
            Way::Error(host, index) => host.error(*index),
        }
    }
}

impl Line {
    fn signal(&self) {
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
