//! Stops threads that wait on file descriptors, and records the failure of a guest.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::GuestError;

/// An event that happens once and can be polled.
#[derive(Debug)]
pub(super) struct StopEvent {
    set: AtomicBool,
    eventfd: EventFd,
}

impl StopEvent {
    pub(super) fn new() -> Result<StopEvent, GuestError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = EventFd::from_value_and_flags(0, flags).map_err(GuestError::system("make an eventfd"))?;
        Ok(StopEvent { set: AtomicBool::new(false), eventfd })
    }

    pub(super) fn set(&self) {
        self.set.store(true, Ordering::Release);
        // The counter cannot overflow and is never read: it stays readable.
        let _ = self.eventfd.write(1);
    }

    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }
}

impl AsFd for StopEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

/// The first error of a guest's threads. It stops all of them.
#[derive(Debug)]
pub(super) struct GuestFailure {
    signal: StopEvent,
    error: OnceLock<Arc<GuestError>>,
}

impl GuestFailure {
    pub(super) fn new() -> Result<GuestFailure, GuestError> {
        Ok(GuestFailure { signal: StopEvent::new()?, error: OnceLock::new() })
    }

    pub(super) fn report(&self, error: GuestError) {
        // A second error is usually a consequence of the first.
        let _ = self.error.set(Arc::new(error));
        self.signal.set();
    }

    pub(super) fn error(&self) -> Option<&Arc<GuestError>> {
        self.error.get()
    }

    pub(super) fn signal(&self) -> &StopEvent {
        &self.signal
    }
}

/// Waits until one of `readable` is readable, `hung_up` has hung up, or `timeout` has passed. Returns which of
/// `readable` are readable.
pub(super) fn poll_fds(
    readable: &[BorrowedFd<'_>],
    hung_up: Option<BorrowedFd<'_>>,
    timeout: Option<Duration>,
) -> Result<Vec<bool>, GuestError> {
    let timeout = match timeout {
        Some(timeout) => PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    let to_read = readable.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN));
    let mut fds: Vec<PollFd<'_>> = to_read.chain(hung_up.map(|fd| PollFd::new(fd, PollFlags::empty()))).collect();
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(fds.iter().take(readable.len()).map(|fd| fd.any() == Some(true)).collect()),
        Err(errno) => Err(GuestError::system("wait for events")(errno)),
    }
}
