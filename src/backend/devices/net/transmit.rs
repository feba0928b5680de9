//! The transmit queue: sends each packet on the port of its pair immediately, or drops it.

use std::sync::Arc;

use tracing::debug;

use super::state::{HEADER, MAX_FRAME, NetStateCache, SharedNetState, count};
use crate::backend::Request;
use crate::sys::with_causes::with_causes;

pub(super) struct TransmitQueue {
    pair: u16,
    /// Header size of this driver in bytes.
    header: usize,
    net_state: NetStateCache,
    buffer: Vec<u8>,
}

impl TransmitQueue {
    pub(super) fn new(shared: Arc<SharedNetState>, pair: u16, header: usize) -> TransmitQueue {
        TransmitQueue { pair, header, net_state: NetStateCache::new(shared), buffer: Vec::new() }
    }

    pub(super) fn send(&mut self, request: &Request) {
        self.net_state.refresh();
        let counters = &self.net_state.shared.counters;
        let frame = request.readable_len().checked_sub(self.header as u64).and_then(|len| usize::try_from(len).ok());
        let Some(frame) = frame.filter(|len| *len <= MAX_FRAME) else {
            debug!("transmit queue {}: a packet of {} bytes is dropped", self.pair, request.readable_len());
            return count(&counters.sent_malformed);
        };
        // Without offloads the driver's header is ignored and sent as zero.
        self.buffer.resize(HEADER, 0);
        self.buffer.resize(HEADER + frame, 0);
        let to = self.buffer.get_mut(HEADER..).unwrap_or_default();
        if let Err(error) = request.read(self.header as u64, to) {
            debug!("transmit queue {}: a packet is dropped: {}", self.pair, with_causes(&error));
            return count(&counters.sent_malformed);
        }
        match self.net_state.state.port(self.pair).is_some_and(|port| port.send(&self.buffer)) {
            true => count(&counters.sent),
            false => count(&counters.sent_dropped),
        }
    }
}
