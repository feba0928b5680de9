//! A switch that ends what a device waits for.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::FrontendError;
use crate::sys::socket::ready;

/// Ends waits for a back-end from any thread: those that are under way and, until it is cleared, those to come. They
/// return [`FrontendError::Interrupted`]. Clones are one switch.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<EventFd>);

impl Interrupt {
    /// A switch that is off.
    ///
    /// # Errors
    /// [`FrontendError::System`] when the process is out of file descriptors.
    pub fn new() -> Result<Interrupt, FrontendError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Interrupt(Arc::new(event.map_err(FrontendError::system("make an eventfd"))?)))
    }

    /// Ends waits, now and until [`clear`](Self::clear).
    pub fn set(&self) {
        // The counter can't overflow by being set once more per call.
        let _ = self.0.write(1);
    }

    /// Lets devices wait again.
    pub fn clear(&self) {
        // Nothing to read: it was off.
        let _ = self.0.read();
    }

    /// Returns true between [`set`](Self::set) and [`clear`](Self::clear).
    pub fn is_set(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for at most `time`; returns true if it is set.
    pub fn wait(&self, time: Duration) -> bool {
        ready(self.0.as_fd(), PollFlags::POLLIN, Instant::now() + time).unwrap_or(false)
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
