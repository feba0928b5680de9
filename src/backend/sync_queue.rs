//! A queue that serves its requests as they come, one after the other.

#![forbid(unsafe_code)]

use super::{Queue, Request};

/// A [`Queue`] out of a function that serves a request. For work that takes long, or that the system does on its own,
/// write a [`Queue`]: this one takes the next request when the function returns.
pub struct SyncQueue<F> {
    serve: F,
    done: Vec<Request>,
}

impl<F: FnMut(&mut Request)> SyncQueue<F> {
    /// Serves each request with `serve`.
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
