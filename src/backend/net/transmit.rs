//! The transmit queue: what the driver sends goes out on its pair's wire at once, or is dropped.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use tracing::debug;

use super::state::{HEADER, Hub, MAX_FRAME, View, count};
use crate::backend::{Queue, Request};

pub(super) struct Transmit {
    pair: u16,
    /// Bytes of the header as this driver knows it.
    header: usize,
    view: View,
    buffer: Vec<u8>,
    done: Vec<Request>,
}

impl Transmit {
    pub(super) fn new(hub: Arc<Hub>, pair: u16, header: usize) -> Transmit {
        Transmit { pair, header, view: View::new(hub), buffer: Vec::new(), done: Vec::new() }
    }

    fn send(&mut self, request: &Request) {
        let counters = &self.view.hub.counters;
        let frame = request.readable_len().checked_sub(self.header as u64).and_then(|len| usize::try_from(len).ok());
        let Some(frame) = frame.filter(|len| *len <= MAX_FRAME) else {
            debug!("transmit queue {}: a packet of {} bytes is dropped", self.pair, request.readable_len());
            return count(&counters.sent_malformed);
        };
        // Nothing is offloaded, so what the header says is nothing to go by: ours is zero.
        self.buffer.resize(HEADER, 0);
        self.buffer.resize(HEADER + frame, 0);
        let to = self.buffer.get_mut(HEADER..).unwrap_or_default();
        if let Err(error) = request.read(self.header as u64, to) {
            debug!("transmit queue {}: a packet is dropped: {error}", self.pair);
            return count(&counters.sent_malformed);
        }
        match self.view.state.out_of(self.pair).is_some_and(|wire| wire.send(&self.buffer)) {
            true => count(&counters.sent),
            false => count(&counters.sent_dropped),
        }
    }
}

impl Queue for Transmit {
    fn submit(&mut self, request: Request) {
        self.view.refresh();
        self.send(&request);
        self.done.push(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.done);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
