//! Requests that complete before their turn.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};

use crate::backend::Request;

/// The requests in flight of a driver with VIRTIO_F_IN_ORDER, which are published in the order in which they were
/// taken.
#[derive(Default)]
pub(super) struct InOrder {
    pub(super) taken: VecDeque<u16>,
    /// Completed requests whose predecessors are still in flight, by head.
    pub(super) completed_early: HashMap<u16, Request>,
}

impl InOrder {
    /// Leaves in `done` the requests that may be published now, in order.
    pub(super) fn release_in_order(&mut self, done: &mut Vec<Request>) {
        self.completed_early.extend(done.drain(..).map(|request| (request.head(), request)));
        while let Some(request) = self.taken.front().and_then(|head| self.completed_early.remove(head)) {
            self.taken.pop_front();
            done.push(request);
        }
    }
}
