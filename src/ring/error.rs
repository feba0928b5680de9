//! What can be wrong with a ring. Each of these ends this ring's service alone, never the process.

use crate::memory::{IotlbMiss, MemoryError, TranslationError};

use super::Position;

/// Why a ring can't be set up, or can't go on.
///
/// The `head` of a chain is the index of its head descriptor; of a packed ring's, the index of its first descriptor, or
/// its buffer id when it is served again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// Not a size that split rings have.
    #[error("ring size {size} is not a power of two from 1 to 32768 (virtio 1.2, \"Split Virtqueues\")")]
    Size {
        /// Entries.
        size: u16,
    },
    /// Not a size that packed rings have.
    #[error("ring size {size} is not from 1 to 32768 (virtio 1.2, \"Packed Virtqueues\")")]
    PackedSize {
        /// Descriptors.
        size: u16,
    },
    /// Positions that no packed ring of this size can have.
    #[error("avail {avail:?} and used {used:?} in a ring of {size}: one is outside, or used is ahead (rule R4.5)")]
    Positions {
        /// Where the next request would be taken.
        avail: Position,
        /// Where the next completion would be written.
        used: Position,
        /// Descriptors.
        size: u16,
    },
    /// An area starts at an address it may not start at.
    #[error("{area} at {gpa:#x} is not aligned to {align} bytes in guest and host (virtio 1.2, \"Virtqueues\")")]
    Misaligned {
        /// Which area.
        area: &'static str,
        /// Guest-physical address.
        gpa: u64,
        /// Alignment in bytes.
        align: u64,
    },
    /// An area is not wholly in one region of guest memory.
    #[error("{area} is not in guest memory: {source}")]
    Outside {
        /// Which area.
        area: &'static str,
        /// What the memory said.
        source: MemoryError,
    },
    /// The driver claims more requests than the ring holds.
    #[error(
        "avail index {index} with {next} next and used index {used}: more requests than the {size} entries of the ring"
    )]
    AvailIndex {
        /// The driver's index.
        index: u16,
        /// The index to be taken next.
        next: u16,
        /// The device's used index.
        used: u16,
        /// Entries.
        size: u16,
    },
    /// A packed ring that does not stand at its base.
    #[error(
        "the ring was given the base {index} with wrap counter {wrap}, but its descriptors say that it has gone on, and \
         not to where: reset the device in the guest, or use a front-end with an inflight region (rule I12.4)",
        wrap = u8::from(*.wrap)
    )]
    StaleBase {
        /// Used position of the base.
        index: u16,
        /// Its wrap counter.
        wrap: bool,
    },
    /// The driver makes more descriptors available than the ring holds, in a chain without an end or over others.
    #[error(
        "chain at {index} with {in_flight} descriptors in flight: more than the {size} of the ring (virtio 1.2, \"Next Flag: Descriptor Chaining\")"
    )]
    AvailDescriptors {
        /// Index of the chain's first descriptor.
        index: u16,
        /// Descriptors of requests without a completion.
        in_flight: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// Copies of descriptors that can't be those of a request.
    #[error("a request that was in flight has {count} descriptors in a ring of {size} (rule I1.2)")]
    Copies {
        /// Descriptors.
        count: usize,
        /// Descriptors of the ring.
        size: u16,
    },
    /// A head or `next` outside the descriptor table, or outside the indirect table.
    #[error("chain {head}: descriptor {index} in a table of {size}")]
    Descriptor {
        /// Head of the chain.
        head: u16,
        /// Index of the descriptor.
        index: u16,
        /// Descriptors in the table.
        size: usize,
    },
    /// A chain that never ends.
    #[error("chain {head} loops (virtio 1.2, \"The Virtqueue Descriptor Table\")")]
    Loop {
        /// Head of the chain.
        head: u16,
    },
    /// A chain of more buffers than a device needs to take.
    #[error("chain {head} has more than {limit} buffers (virtio 1.2, \"Indirect Descriptors\")")]
    TooManyBuffers {
        /// Head of the chain.
        head: u16,
        /// Most buffers of a chain.
        limit: usize,
    },
    /// A chain of more than 2^32 bytes.
    #[error("chain {head} has {bytes} bytes, more than 2^32 (virtio 1.2, \"The Virtqueue Descriptor Table\")")]
    TooManyBytes {
        /// Head of the chain.
        head: u16,
        /// Bytes of all its buffers.
        bytes: u64,
    },
    /// A buffer to be read follows one to be written.
    #[error("chain {head}: a device-readable buffer follows a device-writable one (virtio 1.2, \"Message Framing\")")]
    ReadableAfterWritable {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect descriptor against the rules.
    #[error("chain {head}: indirect descriptor {fault} (virtio 1.2, \"Indirect Descriptors\")")]
    Indirect {
        /// Head of the chain.
        head: u16,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// An indirect table outside guest memory.
    #[error("chain {head}: indirect table is not in guest memory: {source}")]
    IndirectOutside {
        /// Head of the chain.
        head: u16,
        /// What the memory said.
        source: MemoryError,
    },
    /// An address behind the IOMMU without a translation; the same may be tried again when there is one.
    #[error("address {iova:#x} behind the IOMMU has no translation for {access:?} (rule T1.4)", iova = .0.iova, access = .0.access)]
    Untranslated(IotlbMiss),
    /// An address behind the IOMMU that leads to where there is no guest memory.
    #[error("chain {head}: {source}")]
    Translation {
        /// Head of the chain.
        head: u16,
        /// What is wrong with the address.
        source: TranslationError,
    },
    /// The device claims more completions than there are requests.
    #[error("used index {index} after {last}, with {outstanding} requests outstanding")]
    UsedIndex {
        /// The device's index.
        index: u16,
        /// The index up to which completions were taken.
        last: u16,
        /// Requests without a completion.
        outstanding: u16,
    },
    /// The device completes a request that was not made, or, with IN_ORDER, more requests than it says.
    #[error("used element names {id}, which is no request in flight")]
    UsedId {
        /// What the element says.
        id: u32,
    },
    /// A driver's request without a buffer, or with more than the ring could ever take.
    #[error("a request of {buffers} buffers can't be put on this ring: use 1 to {limit}")]
    Request {
        /// Buffers of the request.
        buffers: usize,
        /// Most buffers of a request like this.
        limit: usize,
    },
    /// A saved driver state that can't be true.
    #[error("saved state of a ring's driver: {fault}")]
    State {
        /// What is wrong with it.
        fault: &'static str,
    },
}
