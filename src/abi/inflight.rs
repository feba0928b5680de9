//! Layout of the inflight region (vhost-user spec, "Inflight I/O tracking"): what INFLIGHT_SHMFD shares.
//!
//! Not here: the order of stores and recovery (rules I1-I7), which are the inflight room's.
use super::wire;
use zerocopy::little_endian::{U16, U32, U64};

/// Version of an initialised region; 0 means fresh or reset (rules I5.1, I7.1).
pub const VERSION: u16 = 1;
/// Every queue's part of the region is rounded up to this many bytes.
pub const QUEUE_ALIGN: u64 = 64;
/// Bytes of a [`SplitHeader`].
pub const SPLIT_HEADER_BYTES: u64 = size_of::<SplitHeader>() as u64;
/// Bytes of a [`SplitEntry`].
pub const SPLIT_ENTRY_BYTES: u64 = size_of::<SplitEntry>() as u64;
/// Bytes of a [`PackedHeader`].
pub const PACKED_HEADER_BYTES: u64 = size_of::<PackedHeader>() as u64;
/// Bytes of a [`PackedEntry`].
pub const PACKED_ENTRY_BYTES: u64 = size_of::<PackedEntry>() as u64;

/// Bytes that one split ring of `desc_num` descriptors takes in the region.
pub const fn split_queue_bytes(desc_num: u16) -> u64 {
    (SPLIT_HEADER_BYTES + SPLIT_ENTRY_BYTES * desc_num as u64).next_multiple_of(QUEUE_ALIGN)
}

/// Bytes that one packed ring of `desc_num` descriptors takes in the region.
pub const fn packed_queue_bytes(desc_num: u16) -> u64 {
    (PACKED_HEADER_BYTES + PACKED_ENTRY_BYTES * desc_num as u64).next_multiple_of(QUEUE_ALIGN)
}

wire! {
    /// Head of a split ring's part.
    SplitHeader, 16 bytes {
        /// 0.
        features: U64 => 0,
        /// [`VERSION`], or 0.
        version: U16 => 8,
        /// How many entries follow: the ring's size.
        desc_num: U16 => 10,
        /// First of the list of the last batch of used descriptors.
        last_batch_head: U16 => 12,
        /// The used index as of the last finished batch.
        used_idx: U16 => 14,
    }

    /// One descriptor of a split ring; only entries of chain heads mean something.
    SplitEntry, 16 bytes {
        /// 1 from taking the request to its completion.
        inflight: u8 => 0,
        /// Unused.
        padding: [u8; 5] => 1,
        /// Next of the last batch.
        next: U16 => 6,
        /// Grows with every request taken, for the order of resubmission.
        counter: U64 => 8,
    }

    /// Head of a packed ring's part; the `old_` fields are the committed state (rule I4.2).
    PackedHeader, 32 bytes {
        /// 0.
        features: U64 => 0,
        /// [`VERSION`], or 0.
        version: U16 => 8,
        /// How many entries follow: the ring's size.
        desc_num: U16 => 10,
        /// First of the list of free entries.
        free_head: U16 => 12,
        /// The same, committed.
        old_free_head: U16 => 14,
        /// Position in the used ring.
        used_idx: U16 => 16,
        /// The same, committed.
        old_used_idx: U16 => 18,
        /// Wrap counter of the used ring.
        used_wrap_counter: u8 => 20,
        /// The same, committed.
        old_used_wrap_counter: u8 => 21,
        /// Unused.
        padding: [u8; 10] => 22,
    }

    /// One descriptor of a packed ring, with a copy of what the driver wrote (the ring's own is overwritten).
    PackedEntry, 32 bytes {
        /// 1 from taking the request to its completion; on the first entry of a chain.
        inflight: u8 => 0,
        /// Unused.
        padding: u8 => 1,
        /// Next free entry, or next of the chain.
        next: U16 => 2,
        /// Last entry of the chain; on its first entry.
        last: U16 => 4,
        /// Length of the chain, entries; on its first entry.
        num: U16 => 6,
        /// Grows with every request taken.
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
    fn a_queues_part_is_header_and_entries_rounded_up_to_64_bytes() {
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
