//! Requests that are complete before their turn.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};

use super::super::Request;

/// The requests of a driver that wants them completed in the order in which they were taken (VIRTIO_F_IN_ORDER).
#[derive(Default)]
pub(super) struct InOrder {
    pub(super) taken: VecDeque<u16>,
    /// Complete before their turn, by head.
    pub(super) completed_early: HashMap<u16, Request>,
}

impl InOrder {
    /// Leaves in `done` what may be published now, in order.
    pub(super) fn release_in_order(&mut self, done: &mut Vec<Request>) {
        self.completed_early.extend(done.drain(..).map(|request| (request.head(), request)));
        while let Some(request) = self.taken.front().and_then(|head| self.completed_early.remove(head)) {
            self.taken.pop_front();
            done.push(request);
        }
    }
}
