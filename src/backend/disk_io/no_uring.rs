//! Stand-ins for the rings of io_uring where the feature `io-uring` is off: none can be set up, and threads do the I/O.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Done, Engine, Files, Io};

/// Rings that were set up in advance: none.
#[derive(Debug)]
pub(crate) struct Urings(Infallible);

impl Urings {
    /// # Errors
    /// Always: this program has no io_uring.
    pub(crate) fn new(_queues: u16, _depth: u16) -> io::Result<Urings> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this program was built without the feature io-uring"))
    }
}

/// An engine over a ring, of which there is none.
pub(crate) struct Uring(Infallible);

impl Uring {
    pub(crate) fn new(_files: Arc<Files>, home: &Arc<Urings>) -> Option<Uring> {
        match home.0 {}
    }
}

impl Engine for Uring {
    fn submit(&mut self, _: Io) {
        match self.0 {}
    }

    fn cancel(&mut self) {
        match self.0 {}
    }

    fn completions(&mut self, _: &mut VecDeque<Done>) {
        match self.0 {}
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self.0 {}
    }
}
