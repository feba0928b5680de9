//! Kick eventfds of SET_VRING_KICK, which rings may share (rule F9.4).

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use crate::backend::BackendError;
use crate::sys::nonblocking;

/// The kick eventfd of one or more rings.
///
/// A kick that one ring consumes is lost for the others, so all rings that share it are woken.
#[derive(Debug)]
pub struct Kick {
    eventfd: OwnedFd,
    /// Wake eventfds of the rings that wait for it.
    rings: Mutex<Vec<Weak<EventFd>>>,
}

impl Kick {
    /// Takes the descriptor of SET_VRING_KICK for ring `index`.
    ///
    /// # Errors
    /// [`BackendError::KickFd`] if it is no eventfd (rule F9.3). For other descriptors poll and read can disagree (rule F9.2).
    pub fn new(index: u16, fd: OwnedFd) -> Result<Kick, BackendError> {
        match nonblocking::is_eventfd(fd.as_fd()) {
            true => Ok(Kick { eventfd: fd, rings: Mutex::default() }),
            false => Err(BackendError::KickFd { index }),
        }
    }

    /// Returns true if `fd` refers to the same eventfd.
    pub(crate) fn is_same_eventfd(&self, fd: &OwnedFd) -> bool {
        nonblocking::is_same_file(self.eventfd.as_fd(), fd.as_fd())
    }

    /// Adds a ring, whose `wake` is signalled when another ring consumes a kick.
    pub(crate) fn add_waker(&self, wake: &Arc<EventFd>) {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.retain(|ring| ring.strong_count() > 0);
        rings.push(Arc::downgrade(wake));
    }

    /// Consumes a pending kick and wakes the other rings; `own` belongs to the calling ring. Returns false if no kick
    /// is pending.
    ///
    /// # Errors
    /// [`BackendError::KickFd`] if the eventfd cannot be read.
    pub(crate) fn take(&self, index: u16, own: &Arc<EventFd>) -> Result<bool, BackendError> {
        match nonblocking::take(self.eventfd.as_fd()) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            taken => taken.map_err(|_| BackendError::KickFd { index })?,
        };
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let others = rings.iter().filter_map(Weak::upgrade).filter(|ring| !Arc::ptr_eq(ring, own));
        others.for_each(|ring| _ = ring.write(1));
        Ok(true)
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
