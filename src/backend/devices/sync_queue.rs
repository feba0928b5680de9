//! A queue that serves each request synchronously.

#![forbid(unsafe_code)]

use crate::backend::{Queue, Request};

/// A [`Queue`] that serves one request after the other by calling a function.
///
/// While the function runs, the ring's other requests wait, and the ring cannot stop. The function may read and write
/// files. A device whose requests wait for something else, for example for packets, implements [`Queue`].
pub struct SyncQueue<F> {
    serve: F,
    done: Vec<Request>,
}

impl<F: FnMut(&mut Request)> SyncQueue<F> {
    /// Creates a queue that calls `serve` for each request.
    pub fn new(serve: F) -> SyncQueue<F> {
        SyncQueue { serve, done: Vec::new() }
    }
}

impl<F: FnMut(&mut Request)> Queue for SyncQueue<F> {
    fn submit(&mut self, mut request: Request) {
        (self.serve)(&mut request);
        self.done.push(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.done);
    }
}
