//! Answers that go out together.
//!
//! Acknowledgements of messages that have come already are sent together: a system call for each is much of the time that it takes
//! to stop and start the rings of many devices. Before anything that may take time they are sent.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{MsgFlags, send};

use crate::sys::socket;

/// Answers to a front-end that are to be sent.
#[derive(Debug)]
pub(super) struct PendingReplies {
    connection: OwnedFd,
    bytes: Mutex<Vec<u8>>,
}

impl PendingReplies {
    /// Answers that go over `connection`.
    ///
    /// # Errors
    /// The error of the system.
    pub(super) fn new(connection: BorrowedFd<'_>) -> io::Result<PendingReplies> {
        Ok(PendingReplies { connection: connection.try_clone_to_owned()?, bytes: Mutex::default() })
    }

    /// Adds an answer. Returns how many bytes wait.
    pub(super) fn add(&self, answer: &[u8]) -> usize {
        let mut waiting = self.lock();
        waiting.extend(answer);
        waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Sends all of them, with `fd` along the first byte. Waits for room.
    ///
    /// # Errors
    /// The error of the system.
    pub(super) fn send(&self, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let waiting = std::mem::take(&mut *self.lock());
        socket::send(self.connection.as_fd(), &waiting, fd.as_slice())
    }

    /// Sends what there is room for. For use before something that takes time.
    pub(super) fn try_send(&self) {
        let mut waiting = self.lock();
        if waiting.is_empty() {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // What is wrong with the connection is found out when it is used the next time.
        let sent = send(self.connection.as_raw_fd(), &waiting, flags).unwrap_or_default();
        waiting.drain(..sent);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
