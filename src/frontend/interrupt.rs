//! Interrupts waits for a back-end.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::FrontendError;
use crate::sys::socket::ready;

/// Ends waits for a back-end from any thread: those in progress and, until it is cleared, later ones. Interrupted calls
/// return [`FrontendError::Interrupted`]. Clones share one state.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<EventFd>);

impl Interrupt {
    /// Creates an interrupt that is not set.
    ///
    /// # Errors
    /// [`FrontendError::System`] if the process has no file descriptor left.
    pub fn new() -> Result<Interrupt, FrontendError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Interrupt(Arc::new(event.map_err(FrontendError::system("make an eventfd"))?)))
    }

    /// Ends waits until [`clear`](Self::clear) is called.
    pub fn set(&self) {
        // The eventfd counter cannot overflow: each call adds 1.
        let _ = self.0.write(1);
    }

    /// Allows waits again.
    pub fn clear(&self) {
        // An error means that the interrupt was not set.
        let _ = self.0.read();
    }

    /// Returns true between [`set`](Self::set) and [`clear`](Self::clear).
    pub fn is_set(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for at most `time`. Returns true if the interrupt is set.
    pub fn wait(&self, time: Duration) -> bool {
        ready(self.0.as_fd(), PollFlags::POLLIN, Instant::now() + time).unwrap_or(false)
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
