//! Signals out of a ring: the call and error fds, or messages in their place.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::FrontendHandle;
use crate::sys::nonblocking;

/// What a ring signals: an fd that takes 8 bytes each time, an eventfd or, from user-mode Linux, a pipe or socket (rules F8.1, F9.1);
/// or the front-end over the back-end channel (rule B3.2).
///
/// A signal never blocks the ring: a receiver that lets signals pile up until nothing fits has one pending anyway.
#[derive(Debug)]
pub struct Notifier(NotifierTarget);

#[derive(Debug)]
enum NotifierTarget {
    Fd(OwnedFd),
    Call(Arc<FrontendHandle>, u16),
    Error(Arc<FrontendHandle>, u16),
}

impl Notifier {
    /// Takes the fd of SET_VRING_CALL or SET_VRING_ERR.
    pub fn new(fd: OwnedFd) -> Notifier {
        Notifier(NotifierTarget::Fd(fd))
    }

    /// Calls in-band for ring `index`.
    pub(super) fn call(host: Arc<FrontendHandle>, index: u16) -> Notifier {
        Notifier(NotifierTarget::Call(host, index))
    }

    /// Tells in-band that ring `index` is broken.
    pub(super) fn error(host: Arc<FrontendHandle>, index: u16) -> Notifier {
        Notifier(NotifierTarget::Error(host, index))
    }

    /// Signals once. What the receiver can't take is dropped: it has hung up, or has signals it didn't look at yet.
    pub fn signal(&self) {
        match &self.0 {
            NotifierTarget::Fd(fd) => {
                let _ = nonblocking::signal(fd.as_fd());
            }
            NotifierTarget::Call(host, index) => host.call(*index),
            NotifierTarget::Error(host, index) => host.error(*index),
        }
    }
}
