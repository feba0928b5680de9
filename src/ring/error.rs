//! Errors of a ring. Each of them ends the service of that ring alone, never the process.

use crate::memory::{GuestAddress, IotlbMiss, MemoryError};

use super::Position;

/// An error that prevents the set-up or the further service of a ring.
///
/// The `head` of a chain is the index of its head descriptor. On a packed ring it is the index of its first descriptor,
/// or the buffer id of a request that is served again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The size is invalid for a split ring.
    #[error("ring size {size} is not a power of two from 1 to 32768 (virtio 1.2, \"Split Virtqueues\")")]
    Size {
        /// Number of entries.
        size: u16,
    },
    /// The size is invalid for a packed ring.
    #[error("ring size {size} is not from 1 to 32768 (virtio 1.2, \"Packed Virtqueues\")")]
    PackedSize {
        /// Number of descriptors.
        size: u16,
    },
    /// The positions are invalid for a packed ring of this size.
    #[error("avail {avail:?} and used {used:?} in a ring of {size}: one is outside, or used is ahead (rule R4.5)")]
    Positions {
        /// Avail position.
        avail: Position,
        /// Used position.
        used: Position,
        /// Number of descriptors.
        size: u16,
    },
    /// The address of an area is not aligned.
    #[error("{area} at {:#x} is not aligned to {align} bytes in guest and host (virtio 1.2, \"Virtqueues\")", gpa.0)]
    Misaligned {
        /// Name of the area.
        area: &'static str,
        /// Guest-physical address.
        gpa: GuestAddress,
        /// Required alignment, bytes.
        align: u64,
    },
    /// An area is not completely inside one region of guest memory.
    #[error("{area} is not in guest memory")]
    Outside {
        /// Name of the area.
        area: &'static str,
        /// Error of the memory.
        source: MemoryError,
    },
    /// The driver makes more requests available than the ring has entries.
    #[error(
        "avail index {index} is more than the {size} entries of the ring ahead of the next index {next} or of the \
         used index {used}"
    )]
    AvailIndex {
        /// Avail index of the driver.
        index: u16,
        /// Avail index of the next request to be taken.
        next: u16,
        /// Used index of the device.
        used: u16,
        /// Number of entries.
        size: u16,
    },
    /// The descriptors of a packed ring contradict its base.
    #[error(
        "the base has used position {index} with wrap counter {wrap}, but the descriptors of the ring show that it \
         has moved on, and do not show its position: reset the device in the guest, or use a front-end with an \
         inflight region (rule I12.4)",
        wrap = u8::from(*.wrap)
    )]
    StaleBase {
        /// Used position of the base.
        index: u16,
        /// Wrap counter of the used position.
        wrap: bool,
    },
    /// The driver makes more descriptors available than the ring has: in a chain without an end, or in place of
    /// descriptors in flight.
    #[error(
        "chain at {index}: has more than the {size} descriptors of the ring, of which {in_flight} are in flight \
         (virtio 1.2, \"Next Flag: Descriptor Chaining\")"
    )]
    AvailDescriptors {
        /// Index of the chain's first descriptor.
        index: u16,
        /// Number of descriptors of requests without a completion.
        in_flight: u16,
        /// Number of descriptors of the ring.
        size: u16,
    },
    /// The number of copied descriptors of a request in flight is invalid.
    #[error("a request that was in flight has {count} descriptors in a ring of {size} (rule I1.2)")]
    Copies {
        /// Number of descriptors of the request.
        count: usize,
        /// Number of descriptors of the ring.
        size: u16,
    },
    /// A head or `next` is outside the descriptor table or the indirect table.
    #[error("chain {head}: descriptor {index} is outside the table of {size} descriptors")]
    Descriptor {
        /// Head of the chain.
        head: u16,
        /// Index of the descriptor.
        index: u16,
        /// Number of descriptors in the table.
        size: usize,
    },
    /// A chain is circular.
    #[error("chain {head} loops (virtio 1.2, \"The Virtqueue Descriptor Table\")")]
    Loop {
        /// Head of the chain.
        head: u16,
    },
    /// A chain has more buffers than a device must accept.
    #[error("chain {head} has more than {limit} buffers (virtio 1.2, \"Indirect Descriptors\")")]
    TooManyBuffers {
        /// Head of the chain.
        head: u16,
        /// Maximum number of buffers of a chain.
        limit: usize,
    },
    /// A chain has more than 2^32 bytes.
    #[error("chain {head} has {bytes} bytes, more than 2^32 (virtio 1.2, \"The Virtqueue Descriptor Table\")")]
    TooManyBytes {
        /// Head of the chain.
        head: u16,
        /// Total length of its buffers, bytes.
        bytes: u64,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("chain {head}: a device-readable buffer follows a device-writable one (virtio 1.2, \"Message Framing\")")]
    ReadableAfterWritable {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect descriptor is invalid.
    #[error("chain {head}: indirect descriptor {fault} (virtio 1.2, \"Indirect Descriptors\")")]
    Indirect {
        /// Head of the chain.
        head: u16,
        /// The fault, as the end of a sentence that begins with "indirect descriptor".
        fault: &'static str,
    },
    /// An indirect table is outside guest memory.
    #[error("chain {head}: indirect table is not in guest memory")]
    IndirectOutside {
        /// Head of the chain.
        head: u16,
        /// Error of the memory.
        source: MemoryError,
    },
    /// An I/O virtual address has no translation. The operation can be repeated when there is one.
    #[error("I/O virtual address {iova:#x} has no translation for {access:?} (rule T1.4)", iova = .0.iova, access = .0.access)]
    Untranslated(IotlbMiss),
    /// An I/O virtual address is translated to an address outside guest memory.
    #[error("chain {head}: an I/O virtual address is translated to an address outside guest memory")]
    Translation {
        /// Head of the chain.
        head: u16,
        /// Error of the translation.
        source: MemoryError,
    },
    /// The device completes more requests than are outstanding.
    #[error("used index {index} is ahead of {last} by more than the {outstanding} outstanding requests")]
    UsedIndex {
        /// Used index of the device.
        index: u16,
        /// Used index up to which completions were taken.
        last: u16,
        /// Number of requests without a completion.
        outstanding: u16,
    },
    /// The device completes a request that is not in flight, or, with IN_ORDER, more requests than its index covers.
    #[error("used element has id {id}, which is not a request in flight")]
    UsedId {
        /// Id in the element.
        id: u32,
    },
    /// A driver's request has no buffer, or more than the ring can ever hold.
    #[error("a request of {buffers} buffers does not fit this ring: use 1 to {limit}")]
    Request {
        /// Number of buffers of the request.
        buffers: usize,
        /// Maximum number of buffers of such a request.
        limit: usize,
    },
    /// A saved driver state is invalid.
    #[error("saved state of the ring's driver is invalid: {fault}")]
    State {
        /// The fault.
        fault: &'static str,
    },
}
