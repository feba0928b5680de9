//! Inflight tracking: a region, shared with the front-end, in which a device notes which requests it has taken, so that
//! its successor after a crash serves exactly the others (vhost-user spec, "Inflight I/O tracking"; rules I1-I7).
//!
//! A worker wraps each ring operation: `take` after popping a request, `stage` after pushing its completion, the
//! ring's publish, then `commit`. A successor calls [`InflightRegion::split`] with the used index of the ring, or
//! [`InflightRegion::packed`] with its base and a look at its descriptors, serves what [`SplitRecovery::resubmit`] or
//! [`PackedRecovery::resubmit`] names in that order, and notifies the driver once in any case: the notification of the
//! last batch may have died with its sender.
//!
//! Not here: the rings themselves, and what the requests are.

pub mod packed;
mod region;
pub mod split;
mod store;

pub use packed::{PackedInflight, PackedInflightRequest, PackedRecovery, recover_packed};
pub use region::{InflightRegion, QueueRegion, RingKind};
pub use split::{SplitInflight, SplitRecovery, recover_split};
pub use store::{Store, StoreSink};

use crate::memory::MemoryError;

/// Why an inflight region can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InflightError {
    /// No queues, or a size that no ring has.
    #[error("an inflight region for {queues} queues of {queue_size} entries: use 1 or more of 1 to 32768 (rule I1.2)")]
    Shape {
        /// Queues.
        queues: u16,
        /// Entries of each.
        queue_size: u16,
    },
    /// The region is smaller than its queues need.
    #[error("the inflight region has {size} bytes, but its queues need {needed} (rule I1.2)")]
    TooSmall {
        /// Bytes offered.
        size: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The region starts where its counters would not be aligned.
    #[error("the inflight region starts at offset {offset}, which is no multiple of 8: align it (rule I1.2)")]
    Misaligned {
        /// Offset in the file, bytes.
        offset: u64,
    },
    /// The file can't be made or mapped, or is shorter than the region.
    #[error("inflight region: {0} (rule I1.1)")]
    Map(#[from] MemoryError),
    /// The system refused to make the file.
    #[error("can't make an inflight region: {0}")]
    Create(#[from] std::io::Error),
    /// A queue that the region has no part for.
    #[error("the inflight region has no queue {queue}, only {queues} (rule I1.2)")]
    NoQueue {
        /// Queue.
        queue: u16,
        /// Queues of the region.
        queues: u16,
    },
    /// A ring with more entries than the region tracks.
    #[error("a ring of {ring_size} entries, but the inflight region has room for {queue_size} (rule I1.2)")]
    RingTooLarge {
        /// Entries of the ring.
        ring_size: u16,
        /// Entries of the region's queues.
        queue_size: u16,
    },
    /// The region is for rings of the other kind.
    #[error("the inflight region is for {kind:?} rings, the ring is of the other kind (rule I1.2)")]
    RingKind {
        /// Kind of the region.
        kind: RingKind,
    },
    /// Written by a version that is not known here.
    #[error("inflight region of version {version}: this is for version 1, and 0 when fresh (rules I1.2, I5.1)")]
    Version {
        /// Version found.
        version: u16,
    },
    /// The region describes a ring of another size.
    #[error("inflight region of a ring of {desc_num} entries where {queue_size} are expected (rule I1.2)")]
    DescNum {
        /// Size found.
        desc_num: u16,
        /// Size expected.
        queue_size: u16,
    },
    /// A mark that is neither set nor clear.
    #[error("inflight entry {head} is marked with {mark}, neither 0 nor 1: the region is damaged (rule I1.2)")]
    Mark {
        /// Entry.
        head: u16,
        /// Mark found.
        mark: u8,
    },
    /// The list of the last batch leaves the entries.
    #[error(
        "the last batch of the inflight region names entry {index} of {queue_size}: it is damaged (rules I1.2, I3.1)"
    )]
    Index {
        /// Entry named.
        index: u16,
        /// Entries there are.
        queue_size: u16,
    },
    /// The ring has moved by more than one batch since the region was written.
    #[error(
        "the inflight region is of used index {region}, the ring is at {ring}, further than its {queue_size} entries: \
         they don't belong together (rule I3.1)"
    )]
    UsedIndex {
        /// Used index in the region.
        region: u16,
        /// Used index of the ring.
        ring: u16,
        /// Entries.
        queue_size: u16,
    },
    /// A used position outside the ring, or a wrap counter that is none.
    #[error("used position {index} with wrap counter {wrap} in a ring of {ring_size} entries (rules I1.2, I4.5)")]
    Position {
        /// Position found.
        index: u16,
        /// Wrap counter found.
        wrap: u8,
        /// Entries of the ring.
        ring_size: u16,
    },
    /// A request whose entries are none, not its own, or not as many as it says.
    #[error(
        "the request in flight at entry {head} has no chain of entries of its own: the region is damaged (rules I1.2, I4.1)"
    )]
    Chain {
        /// First entry of the request.
        head: u16,
    },
    /// The last batch was published, and can't be told from what is still in flight.
    #[error(
        "the list of free entries from {head} on does not hold the last batch: the region is damaged (rules I1.2, I4.3)"
    )]
    Batch {
        /// Head of the list.
        head: u16,
    },
    /// More in flight than the ring has.
    #[error("{descs} descriptors in flight in a ring of {ring_size}: they don't belong together (rule I4.5)")]
    Outstanding {
        /// Descriptors marked.
        descs: u32,
        /// Entries of the ring.
        ring_size: u16,
    },
    /// A counter after which there is none.
    #[error("the request counter of the inflight region is used up: it is damaged (rule I6.1)")]
    Counter,
}
