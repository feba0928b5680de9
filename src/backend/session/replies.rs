//! Replies that are sent together.
//!
//! Acknowledgements of messages that have already arrived are sent with one system call; otherwise the calls would
//! dominate the time to stop and start the rings of many devices. Pending replies are sent before anything that may
//! block.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{MsgFlags, send};

use crate::sys::socket;

/// Encoded replies that have not been sent yet.
#[derive(Debug)]
pub(crate) struct PendingReplies {
    connection: OwnedFd,
    bytes: Mutex<Vec<u8>>,
}

impl PendingReplies {
    /// Creates an empty buffer for replies over `connection`.
    ///
    /// # Errors
    /// The error of the system.
    pub(crate) fn new(connection: BorrowedFd<'_>) -> io::Result<PendingReplies> {
        Ok(PendingReplies { connection: connection.try_clone_to_owned()?, bytes: Mutex::default() })
    }

    /// Appends a reply. Returns the number of pending bytes.
    pub(crate) fn add(&self, reply: &[u8]) -> usize {
        let mut waiting = self.lock();
        waiting.extend(reply);
        waiting.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Sends all pending replies, with `fd` on the first byte. Waits for room in the socket.
    ///
    /// # Errors
    /// The error of the system.
    pub(crate) fn send(&self, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let waiting = std::mem::take(&mut *self.lock());
        socket::send(self.connection.as_fd(), &waiting, fd.as_slice())
    }

    /// Sends as much as the socket has room for, without blocking.
    pub(crate) fn try_send(&self) {
        let mut waiting = self.lock();
        if waiting.is_empty() {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // An error of the connection is reported by its next use.
        let sent = send(self.connection.as_raw_fd(), &waiting, flags).unwrap_or_default();
        waiting.drain(..sent);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
