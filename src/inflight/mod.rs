//! Inflight tracking: a region shared with the front-end in which a back-end records the requests that it has taken.
//! After a crash its successor serves exactly those that are not completed (vhost-user spec, "Inflight I/O tracking";
//! rules I1-I7).
//!
//! A worker wraps each ring operation: `take` after popping a request, `stage` after pushing its completion, the ring's
//! publish, then `commit`. A successor calls [`InflightRegion::split`] with the used index of the ring, or
//! [`InflightRegion::packed`] with its base and access to the flags of its descriptors. It serves the requests of
//! [`SplitRecovery::resubmit`] or [`PackedRecovery::resubmit`] in that order. It notifies the driver once in any case,
//! because the predecessor may have died before it sent the notification of the last batch.
//!
//! Not here: the rings themselves, and the contents of requests.
//!
//! # Example
//!
//! Recover the request that a killed back-end left in flight:
//!
//! ```
//! use std::os::fd::AsFd;
//!
//! use vhost_migrate::inflight::{InflightRegion, RingKind};
//!
//! // The front-end keeps the region. The back-end takes two requests, completes one, and is killed.
//! let (region, fd) = InflightRegion::create(RingKind::Split, 1, 128)?;
//! let (mut tracker, _) = region.split(0, 128, 0)?;
//! tracker.take(5);
//! tracker.take(9);
//! tracker.stage(5);
//! let used_index = 1; // of the ring, after the completion was published
//! tracker.commit(used_index);
//! drop((tracker, region));
//!
//! // Its successor gets the same region from the front-end.
//! let size = InflightRegion::bytes_for(RingKind::Split, 1, 128)?;
//! let region = InflightRegion::map(RingKind::Split, fd.as_fd(), size, 0, 1, 128)?;
//! let (_tracker, recovery) = region.split(0, 128, used_index)?;
//! assert_eq!(recovery.resubmit, [9]);
//! assert_eq!(recovery.next_avail, Some(2));
//! # Ok::<(), vhost_migrate::inflight::InflightError>(())
//! ```

mod packed;
mod region;
mod split;
mod store;

pub use packed::{PackedInflight, PackedInflightRequest, PackedRecovery, recover_packed};
pub use region::{InflightRegion, QueueRegion, RingKind};
pub use split::{SplitInflight, SplitRecovery, recover_split};
pub use store::{Store, StoreSink};

use crate::memory::MemoryError;

/// An error of an inflight region.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InflightError {
    /// The number of queues is 0, or the queue size is not that of a ring.
    #[error(
        "the inflight region has {queues} queues of {queue_size} entries: use 1 or more queues of 1 to 32768 entries \
         (rule I1.2)"
    )]
    Shape {
        /// Number of queues.
        queues: u16,
        /// Number of entries of each queue.
        queue_size: u16,
    },
    /// The region is smaller than its queues need.
    #[error("the inflight region has {size} bytes, but its queues need {needed}: enlarge it (rule I1.2)")]
    TooSmall {
        /// Size of the region, bytes.
        size: u64,
        /// Required size, bytes.
        needed: u64,
    },
    /// The counters of the region would not be aligned.
    #[error("the inflight region starts at offset {offset}, which is not a multiple of 8: align it (rule I1.2)")]
    Misaligned {
        /// Offset in the file, bytes.
        offset: u64,
    },
    /// The file cannot be mapped, or is shorter than the region.
    #[error("the inflight region cannot be mapped (rule I1.1)")]
    Map(#[from] MemoryError),
    /// The system refused to create the file.
    #[error("the inflight region cannot be created")]
    Create(#[from] std::io::Error),
    /// The region has no part for the queue.
    #[error("the inflight region has {queues} queues and no queue {queue} (rule I1.2)")]
    NoQueue {
        /// Index of the queue.
        queue: u16,
        /// Number of queues of the region.
        queues: u16,
    },
    /// The ring has more entries than the region tracks.
    #[error("the inflight region tracks {queue_size} entries per queue, but the ring has {ring_size} (rule I1.2)")]
    RingTooLarge {
        /// Number of entries of the ring.
        ring_size: u16,
        /// Number of entries of the region's queues.
        queue_size: u16,
    },
    /// The region is for rings of the other kind.
    #[error("the inflight region is for {kind:?} rings, the ring is of the other kind (rule I1.2)")]
    RingKind {
        /// Kind of the region.
        kind: RingKind,
    },
    /// The version of the region is not known.
    #[error(
        "the inflight region has version {version}: only version 1, and 0 for a fresh region, are supported \
         (rules I1.2, I5.1)"
    )]
    Version {
        /// Version of the region.
        version: u16,
    },
    /// The region describes a ring of another size.
    #[error("the inflight region is of a ring of {desc_num} entries, expected {queue_size} (rule I1.2)")]
    DescNum {
        /// Size in the region.
        desc_num: u16,
        /// Expected size.
        queue_size: u16,
    },
    /// The mark of an entry is neither 0 nor 1.
    #[error("the inflight region is damaged: entry {head} is marked with {mark}, expected 0 or 1 (rule I1.2)")]
    Mark {
        /// Index of the entry.
        head: u16,
        /// Mark in the region.
        mark: u8,
    },
    /// The list of the last batch has an invalid index.
    #[error("the inflight region is damaged: the last batch has entry {index} of {queue_size} (rules I1.2, I3.1)")]
    Index {
        /// Index of the entry.
        index: u16,
        /// Number of entries.
        queue_size: u16,
    },
    /// The used index has advanced by more than a ring since the region was written.
    #[error(
        "the inflight region does not belong to this ring: it has used index {region}, and the ring has {ring}, \
         further than its {queue_size} entries (rule I3.1)"
    )]
    UsedIndex {
        /// Used index in the region.
        region: u16,
        /// Used index of the ring.
        ring: u16,
        /// Number of entries.
        queue_size: u16,
    },
    /// The used position is outside the ring, or its wrap counter is neither 0 nor 1.
    #[error(
        "the inflight region has used position {index} with wrap counter {wrap}, invalid in a ring of {ring_size} \
         entries (rules I1.2, I4.5)"
    )]
    Position {
        /// Position in the region.
        index: u16,
        /// Wrap counter in the region.
        wrap: u8,
        /// Number of entries of the ring.
        ring_size: u16,
    },
    /// The chain of a request in flight is empty, leaves the entries, shares entries, or has another length or end than
    /// recorded.
    #[error(
        "the inflight region is damaged: the request in flight at entry {head} has no valid chain of entries \
         (rules I1.2, I4.1)"
    )]
    Chain {
        /// First entry of the request.
        head: u16,
    },
    /// The last batch was published, but its requests cannot be told from those in flight.
    #[error(
        "the inflight region is damaged: the free list from entry {head} does not hold the last batch \
         (rules I1.2, I4.3)"
    )]
    Batch {
        /// Head of the free list.
        head: u16,
    },
    /// The requests in flight have more descriptors than the ring.
    #[error(
        "the inflight region does not belong to this ring: {descs} descriptors are in flight in a ring of {ring_size} \
         (rule I4.5)"
    )]
    Outstanding {
        /// Number of descriptors in flight.
        descs: u32,
        /// Number of entries of the ring.
        ring_size: u16,
    },
    /// The request counter has its maximum value, so no request could be recorded after it.
    #[error("the inflight region is damaged: its request counter is at its maximum (rule I6.1)")]
    Counter,
}
