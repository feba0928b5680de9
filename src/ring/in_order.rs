//! VIRTIO_F_IN_ORDER on the driver side: one completion may complete all requests before it.

use std::collections::{BTreeSet, VecDeque};

use super::{Buffer, UsedBuffer};

/// The requests of a driver whose device completes them in the order in which they were added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct InOrderState {
    /// The requests without a completion, oldest first: name, and number of bytes that the device may write.
    pub queue: VecDeque<(u16, u32)>,
    /// The last completion, until it is taken for all requests that it completes.
    pub batch: Option<UsedBuffer>,
}

impl InOrderState {
    /// Records that a request was added.
    pub(super) fn add(&mut self, head: u16, writable: &[Buffer]) {
        let bytes = writable.iter().fold(0, |bytes: u32, buffer| bytes.saturating_add(buffer.len));
        self.queue.push_back((head, bytes));
    }

    /// The requests that the completion of `head` completes, oldest first, with `head` last. None if it is not in
    /// flight.
    pub(super) fn up_to(&self, head: u16) -> impl Iterator<Item = u16> {
        let count = self.queue.iter().position(|(of, _)| *of == head).map_or(0, |at| at + 1);
        self.queue.iter().take(count).map(|(head, _)| *head)
    }

    /// Records that the device completed a request in flight and all before it. Takes the first of them.
    pub(super) fn complete(&mut self, last: UsedBuffer) -> UsedBuffer {
        self.batch = Some(last);
        self.next().unwrap_or(last)
    }

    /// Takes the oldest request of a completed batch, if there is one. The device reports the written length only for
    /// the last request of a batch; the others count as written completely (virtio 1.2, "In-order use of descriptors").
    pub(super) fn next(&mut self) -> Option<UsedBuffer> {
        let batch = self.batch?;
        let (head, len) = self.queue.pop_front()?;
        if head != batch.head {
            return Some(UsedBuffer { head, len });
        }
        self.batch.take()
    }

    /// Returns true if the queue consists of the requests `heads`, and the batch, if any, ends with one of them.
    pub(super) fn is_of(&self, heads: impl Iterator<Item = u16>) -> bool {
        let heads: BTreeSet<u16> = heads.collect();
        let queue: BTreeSet<u16> = self.queue.iter().map(|(head, _)| *head).collect();
        self.queue.len() == queue.len() && queue == heads && self.batch.is_none_or(|batch| queue.contains(&batch.head))
    }
}
