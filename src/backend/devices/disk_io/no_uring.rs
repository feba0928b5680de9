//! Replaces `uring` without the feature `io-uring`: no ring can be set up, and threads do the I/O.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{DiskEngine, DiskIo, Done, ImageFiles};

/// An empty pool of rings.
#[derive(Debug)]
pub(crate) struct UringPool(Infallible);

impl UringPool {
    /// # Errors
    /// Always: this program has no io_uring.
    pub(crate) fn new(_queues: u16, _depth: u16) -> io::Result<UringPool> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this program was built without the feature io-uring"))
    }
}

/// An engine that cannot be made, because there are no rings.
pub(crate) struct UringEngine(Infallible);

impl UringEngine {
    pub(crate) fn new(_files: Arc<ImageFiles>, pool: &Arc<UringPool>) -> Option<UringEngine> {
        match pool.0 {}
    }
}

impl DiskEngine for UringEngine {
    fn submit(&mut self, _: DiskIo) {
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
