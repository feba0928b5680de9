//! Notifications of a ring: call and error descriptors, or in-band messages.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::backend::FrontendHandle;
use crate::sys::nonblocking;

/// A notification target: a descriptor that takes 8 bytes per signal (rule F8.1), which is an eventfd, or a pipe or socket
/// from User-mode Linux; or a message on the back-end channel (rule B3.2).
///
/// A signal never blocks the ring (rule F9.1). A receiver without room for more signals has one pending anyway.
#[derive(Debug)]
pub struct Notifier(NotifierTarget);

#[derive(Debug)]
enum NotifierTarget {
    Fd(OwnedFd),
    Call(Arc<FrontendHandle>, u16),
    Error(Arc<FrontendHandle>, u16),
}

impl Notifier {
    /// Takes the descriptor of SET_VRING_CALL or SET_VRING_ERR.
    pub fn new(fd: OwnedFd) -> Notifier {
        Notifier(NotifierTarget::Fd(fd))
    }

    /// Creates an in-band call notifier for ring `index`.
    pub(crate) fn call(frontend: Arc<FrontendHandle>, index: u16) -> Notifier {
        Notifier(NotifierTarget::Call(frontend, index))
    }

    /// Creates an in-band error notifier for ring `index`.
    pub(crate) fn error(frontend: Arc<FrontendHandle>, index: u16) -> Notifier {
        Notifier(NotifierTarget::Error(frontend, index))
    }

    /// Signals once. The signal is dropped if the receiver has hung up or has no room (rule F8.2).
    pub fn signal(&self) {
        match &self.0 {
            NotifierTarget::Fd(fd) => {
                let _ = nonblocking::signal(fd.as_fd());
            }
            NotifierTarget::Call(frontend, index) => frontend.call(*index),
            NotifierTarget::Error(frontend, index) => frontend.error(*index),
        }
    }
}
