//! Layout of the inflight region, the memory shared with INFLIGHT_SHMFD (vhost-user spec, "Inflight I/O tracking").
//!
//! Not here: the order of stores, and recovery (rules I1-I7). Both are in [`crate::inflight`].
//!
//! The size of a region for two split rings of 128 descriptors:
//!
//! ```
//! use vhost_migrate::abi::inflight::split_queue_bytes;
//!
//! assert_eq!(2 * split_queue_bytes(128), 2 * 2112);
//! ```
use super::wire;
use zerocopy::little_endian::{U16, U32, U64};

/// Version of an initialised region. A fresh region and one of a reset device have 0 (rules I5.1, I7.1).
pub const VERSION: u16 = 1;
/// Unit to which every queue's part of the region is rounded up, bytes.
pub const QUEUE_ALIGN: u64 = 64;
/// Size of a [`SplitHeader`], bytes.
pub const SPLIT_HEADER_BYTES: u64 = size_of::<SplitHeader>() as u64;
/// Size of a [`SplitEntry`], bytes.
pub const SPLIT_ENTRY_BYTES: u64 = size_of::<SplitEntry>() as u64;
/// Size of a [`PackedHeader`], bytes.
pub const PACKED_HEADER_BYTES: u64 = size_of::<PackedHeader>() as u64;
/// Size of a [`PackedEntry`], bytes.
pub const PACKED_ENTRY_BYTES: u64 = size_of::<PackedEntry>() as u64;

/// Size of the part of one split ring of `desc_num` descriptors, bytes.
pub const fn split_queue_bytes(desc_num: u16) -> u64 {
    (SPLIT_HEADER_BYTES + SPLIT_ENTRY_BYTES * desc_num as u64).next_multiple_of(QUEUE_ALIGN)
}

/// Size of the part of one packed ring of `desc_num` descriptors, bytes.
pub const fn packed_queue_bytes(desc_num: u16) -> u64 {
    (PACKED_HEADER_BYTES + PACKED_ENTRY_BYTES * desc_num as u64).next_multiple_of(QUEUE_ALIGN)
}

wire! {
    /// Header of a split ring's part.
    SplitHeader, 16 bytes {
        /// 0.
        features: U64 => 0,
        /// [`VERSION`], or 0.
        version: U16 => 8,
        /// Number of entries that follow: the ring's size.
        desc_num: U16 => 10,
        /// Head of the list of the last batch of used descriptors.
        last_batch_head: U16 => 12,
        /// The used index as of the last finished batch.
        used_idx: U16 => 14,
    }

    /// State of one descriptor of a split ring. Only the entry of a chain's head descriptor is used.
    SplitEntry, 16 bytes {
        /// 1 from taking the request to its completion, otherwise 0.
        inflight: u8 => 0,
        /// Unused.
        padding: [u8; 5] => 1,
        /// Next head descriptor in the list of the last batch.
        next: U16 => 6,
        /// Sequence number of the request, for the order of resubmission.
        counter: U64 => 8,
    }

    /// Header of a packed ring's part. The `old_` fields are the committed state (rule I4.2).
    PackedHeader, 32 bytes {
        /// 0.
        features: U64 => 0,
        /// [`VERSION`], or 0.
        version: U16 => 8,
        /// Number of entries that follow: the ring's size.
        desc_num: U16 => 10,
        /// Head of the list of free entries.
        free_head: U16 => 12,
        /// Committed value of `free_head`.
        old_free_head: U16 => 14,
        /// Position of the next used descriptor.
        used_idx: U16 => 16,
        /// Committed value of `used_idx`.
        old_used_idx: U16 => 18,
        /// Wrap counter of the used position.
        used_wrap_counter: u8 => 20,
        /// Committed value of `used_wrap_counter`.
        old_used_wrap_counter: u8 => 21,
        /// Unused.
        padding: [u8; 10] => 22,
    }

    /// State and copy of one descriptor of a packed ring. The copy is needed because used descriptors overwrite the
    /// ring's.
    PackedEntry, 32 bytes {
        /// 1 from taking the request to its completion, otherwise 0. Used in the first entry of a chain.
        inflight: u8 => 0,
        /// Unused.
        padding: u8 => 1,
        /// Next entry of the free list or of the chain.
        next: U16 => 2,
        /// Last entry of the chain. Used in its first entry.
        last: U16 => 4,
        /// Length of the chain, entries. Used in its first entry.
        num: U16 => 6,
        /// Sequence number of the request, for the order of resubmission.
        counter: U64 => 8,
        /// Buffer id.
        id: U16 => 16,
        /// Descriptor flags.
        flags: U16 => 18,
        /// Buffer length, bytes.
        len: U32 => 20,
        /// Buffer address.
        addr: U64 => 24,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_queue_is_header_and_entries_rounded_up_to_64_bytes() {
        assert_eq!(split_queue_bytes(0), 64);
        assert_eq!(split_queue_bytes(3), 64);
        assert_eq!(split_queue_bytes(4), 128);
        assert_eq!(split_queue_bytes(128), 2112);
        assert_eq!(split_queue_bytes(32768), 524_352);
        assert_eq!(packed_queue_bytes(1), 64);
        assert_eq!(packed_queue_bytes(2), 128);
        assert_eq!(packed_queue_bytes(32768), 1_048_640);
        assert_eq!(packed_queue_bytes(u16::MAX), 2_097_152);
    }
}
