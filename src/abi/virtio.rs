//! The virtio interface common to all transports (virtio 1.2; `linux/virtio_ring.h`, `virtio_config.h`, `virtio_ids.h`,
//! `virtio_blk.h` and `virtio_net.h`): feature and status bits, device ids, ring layouts, block and network devices.
//!
//! Guest-visible structures are little-endian. Not here: reading rings, serving requests.
//!
//! The sizes of the three areas of a split ring of 256 entries:
//!
//! ```
//! use vhost_migrate::abi::virtio::{avail_ring_bytes, desc_table_bytes, used_ring_bytes};
//!
//! assert_eq!([desc_table_bytes(256), avail_ring_bytes(256), used_ring_bytes(256)], [4096, 518, 2054]);
//! ```
use super::wire;
use std::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Feature bits of virtio and vhost, as in GET_FEATURES and SET_FEATURES.
///
/// The bits are constants with the names of the headers, such as [`VIRTIO_F_VERSION_1`]; those from 0 to 23 mean
/// something else for every type of device. Bits without a constant are kept.
/// [`feature_names`](super::features::feature_names) gives the names.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
#[repr(transparent)]
pub struct VirtioFeatures(u64);

bitflags::bitflags! {
    impl VirtioFeatures: u64 {
        const _ = !0;
    }
}

impl fmt::Debug for VirtioFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.bits())
    }
}

/// The feature of bit `number`, at most 63.
pub(super) const fn feature(number: u32) -> VirtioFeatures {
    VirtioFeatures::from_bits_retain(1 << number)
}

// Feature bits.

/// Legacy: the device notifies when the ring becomes empty, even if notifications are suppressed.
pub const VIRTIO_F_NOTIFY_ON_EMPTY: VirtioFeatures = feature(24);
/// Legacy: any descriptor layout.
pub const VIRTIO_F_ANY_LAYOUT: VirtioFeatures = feature(27);
/// Indirect descriptors.
pub const VIRTIO_RING_F_INDIRECT_DESC: VirtioFeatures = feature(28);
/// Notification by index: `used_event` and `avail_event`.
pub const VIRTIO_RING_F_EVENT_IDX: VirtioFeatures = feature(29);
/// Virtio 1.0 or later.
pub const VIRTIO_F_VERSION_1: VirtioFeatures = feature(32);
/// Addresses are IOVAs.
pub const VIRTIO_F_ACCESS_PLATFORM: VirtioFeatures = feature(33);
/// Packed rings.
pub const VIRTIO_F_RING_PACKED: VirtioFeatures = feature(34);
/// Buffers are used in the order they were made available.
pub const VIRTIO_F_IN_ORDER: VirtioFeatures = feature(35);
/// The driver orders memory accesses as the platform requires.
pub const VIRTIO_F_ORDER_PLATFORM: VirtioFeatures = feature(36);
/// SR-IOV.
pub const VIRTIO_F_SR_IOV: VirtioFeatures = feature(37);
/// Kicks carry data.
pub const VIRTIO_F_NOTIFICATION_DATA: VirtioFeatures = feature(38);
/// Rings can be reset one by one.
pub const VIRTIO_F_RING_RESET: VirtioFeatures = feature(40);

// Device status bits.

/// The guest has found the device.
pub const VIRTIO_CONFIG_S_ACKNOWLEDGE: u8 = 1;
/// The guest has a driver for the device.
pub const VIRTIO_CONFIG_S_DRIVER: u8 = 2;
/// The driver is ready.
pub const VIRTIO_CONFIG_S_DRIVER_OK: u8 = 4;
/// Features are negotiated.
pub const VIRTIO_CONFIG_S_FEATURES_OK: u8 = 8;
/// The device has failed and works again only after a reset.
pub const VIRTIO_CONFIG_S_NEEDS_RESET: u8 = 0x40;
/// The driver has failed.
pub const VIRTIO_CONFIG_S_FAILED: u8 = 0x80;

// Device ids.

/// Network device.
pub const VIRTIO_ID_NET: u32 = 1;
/// Block device.
pub const VIRTIO_ID_BLOCK: u32 = 2;
/// Console.
pub const VIRTIO_ID_CONSOLE: u32 = 3;
/// Entropy source.
pub const VIRTIO_ID_RNG: u32 = 4;
/// Memory balloon.
pub const VIRTIO_ID_BALLOON: u32 = 5;
/// SCSI host.
pub const VIRTIO_ID_SCSI: u32 = 8;
/// 9P transport.
pub const VIRTIO_ID_9P: u32 = 9;
/// GPU.
pub const VIRTIO_ID_GPU: u32 = 16;
/// Input device.
pub const VIRTIO_ID_INPUT: u32 = 18;
/// Socket device.
pub const VIRTIO_ID_VSOCK: u32 = 19;
/// Crypto device.
pub const VIRTIO_ID_CRYPTO: u32 = 20;
/// IOMMU.
pub const VIRTIO_ID_IOMMU: u32 = 23;
/// Memory device.
pub const VIRTIO_ID_MEM: u32 = 24;
/// Sound device.
pub const VIRTIO_ID_SOUND: u32 = 25;
/// File system.
pub const VIRTIO_ID_FS: u32 = 26;
/// Persistent memory.
pub const VIRTIO_ID_PMEM: u32 = 27;

// Split ring.

/// [`Desc::flags`]: the chain continues at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// [`Desc::flags`]: the device writes this buffer.
pub const DESC_F_WRITE: u16 = 2;
/// [`Desc::flags`]: the buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;
/// `flags` of the used ring: the driver need not kick.
pub const USED_F_NO_NOTIFY: u16 = 1;
/// `flags` of the available ring: the device need not call.
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Alignment of the descriptor table, bytes.
pub const DESC_ALIGN_SIZE: u64 = 16;
/// Alignment of the available ring, bytes.
pub const AVAIL_ALIGN_SIZE: u64 = 2;
/// Alignment of the used ring, bytes.
pub const USED_ALIGN_SIZE: u64 = 4;
/// Maximum size of a split ring, entries. Sizes are powers of two.
pub const MAX_QUEUE_SIZE: u32 = 32768;
/// Offset of `flags` in the available and in the used ring.
pub const RING_FLAGS_OFFSET: u64 = 0;
/// Offset of `idx` in the available and in the used ring.
pub const RING_IDX_OFFSET: u64 = 2;
/// Offset of the first element in the available and in the used ring.
pub const RING_ELEMENTS_OFFSET: u64 = 4;

/// Size of a descriptor table of `num` entries, split or packed, bytes.
pub const fn desc_table_bytes(num: u32) -> u64 {
    size_of::<Desc>() as u64 * num as u64
}

/// Offset of `used_event` in an available ring of `num` entries, bytes.
pub const fn used_event_offset(num: u32) -> u64 {
    RING_ELEMENTS_OFFSET + 2 * num as u64
}

/// Offset of `avail_event` in a used ring of `num` entries, bytes.
pub const fn avail_event_offset(num: u32) -> u64 {
    RING_ELEMENTS_OFFSET + size_of::<UsedElem>() as u64 * num as u64
}

/// Size of an available ring of `num` entries with `used_event`, bytes.
pub const fn avail_ring_bytes(num: u32) -> u64 {
    used_event_offset(num) + 2
}

/// Size of a used ring of `num` entries with `avail_event`, bytes.
pub const fn used_ring_bytes(num: u32) -> u64 {
    avail_event_offset(num) + 2
}

wire! {
    /// `struct vring_desc`: one descriptor of a split ring or of an indirect table.
    Desc, 16 bytes {
        /// Guest-physical address, or IOVA.
        addr: U64 => 0,
        /// Length of the buffer, bytes.
        len: U32 => 8,
        /// [`DESC_F_NEXT`], [`DESC_F_WRITE`], [`DESC_F_INDIRECT`].
        flags: U16 => 12,
        /// Next descriptor of the chain.
        next: U16 => 14,
    }

    /// `struct vring_used_elem`: one completed request.
    UsedElem, 8 bytes {
        /// Head descriptor of the chain.
        id: U32 => 0,
        /// Number of bytes that the device wrote.
        len: U32 => 4,
    }
}

// Packed ring.

/// Bit number of AVAIL in [`PackedDesc::flags`].
pub const PACKED_DESC_F_AVAIL: u32 = 7;
/// Bit number of USED in [`PackedDesc::flags`].
pub const PACKED_DESC_F_USED: u32 = 15;
/// [`PackedEvent::flags`]: notifications are enabled.
pub const PACKED_EVENT_FLAG_ENABLE: u16 = 0;
/// [`PackedEvent::flags`]: notifications are disabled.
pub const PACKED_EVENT_FLAG_DISABLE: u16 = 1;
/// [`PackedEvent::flags`]: a notification is wanted for the descriptor given by `off_wrap`.
pub const PACKED_EVENT_FLAG_DESC: u16 = 2;
/// Bit number of the wrap counter in [`PackedEvent::off_wrap`].
pub const PACKED_EVENT_F_WRAP_CTR: u32 = 15;

wire! {
    /// `struct vring_packed_desc`.
    PackedDesc, 16 bytes {
        /// Guest-physical address, or IOVA.
        addr: U64 => 0,
        /// Length of the buffer, bytes. In a used descriptor, the number of bytes that the device wrote.
        len: U32 => 8,
        /// Buffer id.
        id: U16 => 12,
        /// As [`Desc::flags`], with AVAIL and USED.
        flags: U16 => 14,
    }

    /// `struct vring_packed_desc_event`: an event suppression area.
    PackedEvent, 4 bytes {
        /// Position and wrap counter.
        off_wrap: U16 => 0,
        /// [`PACKED_EVENT_FLAG_ENABLE`], [`PACKED_EVENT_FLAG_DISABLE`] or [`PACKED_EVENT_FLAG_DESC`].
        flags: U16 => 2,
    }
}

// Block device.

/// Legacy: barriers.
pub const VIRTIO_BLK_F_BARRIER: VirtioFeatures = feature(0);
/// `size_max` is valid.
pub const VIRTIO_BLK_F_SIZE_MAX: VirtioFeatures = feature(1);
/// `seg_max` is valid.
pub const VIRTIO_BLK_F_SEG_MAX: VirtioFeatures = feature(2);
/// `geometry` is valid.
pub const VIRTIO_BLK_F_GEOMETRY: VirtioFeatures = feature(4);
/// The disk is read-only.
pub const VIRTIO_BLK_F_RO: VirtioFeatures = feature(5);
/// `blk_size` is valid.
pub const VIRTIO_BLK_F_BLK_SIZE: VirtioFeatures = feature(6);
/// Legacy: SCSI commands.
pub const VIRTIO_BLK_F_SCSI: VirtioFeatures = feature(7);
/// Flush requests are supported.
pub const VIRTIO_BLK_F_FLUSH: VirtioFeatures = feature(9);
/// The topology fields are valid.
pub const VIRTIO_BLK_F_TOPOLOGY: VirtioFeatures = feature(10);
/// `wce` can be written to switch the write cache.
pub const VIRTIO_BLK_F_CONFIG_WCE: VirtioFeatures = feature(11);
/// `num_queues` is valid.
pub const VIRTIO_BLK_F_MQ: VirtioFeatures = feature(12);
/// Discard requests are supported.
pub const VIRTIO_BLK_F_DISCARD: VirtioFeatures = feature(13);
/// Write-zeroes requests are supported.
pub const VIRTIO_BLK_F_WRITE_ZEROES: VirtioFeatures = feature(14);
/// Secure-erase requests are supported.
pub const VIRTIO_BLK_F_SECURE_ERASE: VirtioFeatures = feature(16);

/// Request: read.
pub const VIRTIO_BLK_T_IN: u32 = 0;
/// Request: write.
pub const VIRTIO_BLK_T_OUT: u32 = 1;
/// Legacy request: SCSI command.
pub const VIRTIO_BLK_T_SCSI_CMD: u32 = 2;
/// Request: flush.
pub const VIRTIO_BLK_T_FLUSH: u32 = 4;
/// Request: read the serial.
pub const VIRTIO_BLK_T_GET_ID: u32 = 8;
/// Request: discard.
pub const VIRTIO_BLK_T_DISCARD: u32 = 11;
/// Request: write zeroes.
pub const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;
/// Request: secure erase.
pub const VIRTIO_BLK_T_SECURE_ERASE: u32 = 14;
/// Legacy flag of a request: barrier.
pub const VIRTIO_BLK_T_BARRIER: u32 = 0x8000_0000;

/// Status: success.
pub const VIRTIO_BLK_S_OK: u8 = 0;
/// Status: the disk or the request failed.
pub const VIRTIO_BLK_S_IOERR: u8 = 1;
/// Status: unknown request.
pub const VIRTIO_BLK_S_UNSUPP: u8 = 2;

/// Size of a serial, bytes.
pub const VIRTIO_BLK_ID_BYTES: usize = 20;
/// Size of a sector, bytes. It is the unit of the protocol for every `blk_size`.
pub const SECTOR_BYTES: u64 = 512;
/// [`BlkDiscardWriteZeroes::flags`]: the range may be deallocated.
pub const VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: u32 = 1;

wire! {
    /// `struct virtio_blk_geometry`.
    BlkGeometry, 4 bytes {
        /// Cylinders.
        cylinders: U16 => 0,
        /// Heads.
        heads: u8 => 2,
        /// Sectors per track.
        sectors: u8 => 3,
    }

    /// `struct virtio_blk_config`: configuration space up to secure erase. A front-end reads the part of the features
    /// that it knows: 36, 60 or 72 bytes.
    BlkConfig, 72 bytes {
        /// Size of the disk, 512-byte sectors.
        capacity: U64 => 0,
        /// Maximum size of a segment, bytes.
        size_max: U32 => 8,
        /// Maximum number of segments of a request.
        seg_max: U32 => 12,
        /// Legacy geometry.
        geometry: BlkGeometry => 16,
        /// Logical block size, bytes.
        blk_size: U32 => 20,
        /// Base-2 logarithm of the physical block size in logical blocks.
        physical_block_exp: u8 => 24,
        /// Offset of the first aligned logical block.
        alignment_offset: u8 => 25,
        /// Suggested minimum size of a request, logical blocks.
        min_io_size: U16 => 26,
        /// Suggested optimal size of a request, logical blocks.
        opt_io_size: U32 => 28,
        /// Write cache: 1 write-back, 0 write-through.
        wce: u8 => 32,
        /// Unused.
        unused: u8 => 33,
        /// Number of queues.
        num_queues: U16 => 34,
        /// Maximum size of a discard segment, sectors.
        max_discard_sectors: U32 => 36,
        /// Maximum number of segments of a discard.
        max_discard_seg: U32 => 40,
        /// Alignment of discards, sectors.
        discard_sector_alignment: U32 => 44,
        /// Maximum size of a write-zeroes segment, sectors.
        max_write_zeroes_sectors: U32 => 48,
        /// Maximum number of segments of a write-zeroes.
        max_write_zeroes_seg: U32 => 52,
        /// 1 if write-zeroes may deallocate.
        write_zeroes_may_unmap: u8 => 56,
        /// Unused.
        unused1: [u8; 3] => 57,
        /// Maximum size of a secure-erase segment, sectors.
        max_secure_erase_sectors: U32 => 60,
        /// Maximum number of segments of a secure erase.
        max_secure_erase_seg: U32 => 64,
        /// Alignment of secure erases, sectors.
        secure_erase_sector_alignment: U32 => 68,
    }

    /// `struct virtio_blk_outhdr`: header of every request.
    BlkRequestHeader, 16 bytes {
        /// [`VIRTIO_BLK_T_IN`] or another type of request.
        request_type: U32 => 0,
        /// Reserved (legacy: priority).
        ioprio: U32 => 4,
        /// First sector.
        sector: U64 => 8,
    }

    /// `struct virtio_blk_discard_write_zeroes`: one segment of a discard, write-zeroes or secure erase.
    BlkDiscardWriteZeroes, 16 bytes {
        /// First sector.
        sector: U64 => 0,
        /// Number of sectors.
        num_sectors: U32 => 8,
        /// 0 or [`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`].
        flags: U32 => 12,
    }
}

// Net device.

/// The device accepts packets with partial checksum.
pub const VIRTIO_NET_F_CSUM: VirtioFeatures = feature(0);
/// The driver accepts packets with partial checksum.
pub const VIRTIO_NET_F_GUEST_CSUM: VirtioFeatures = feature(1);
/// The control queue changes offloads.
pub const VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: VirtioFeatures = feature(2);
/// `mtu` is valid.
pub const VIRTIO_NET_F_MTU: VirtioFeatures = feature(3);
/// `mac` is valid.
pub const VIRTIO_NET_F_MAC: VirtioFeatures = feature(5);
/// The driver accepts TSO over IPv4.
pub const VIRTIO_NET_F_GUEST_TSO4: VirtioFeatures = feature(7);
/// The driver accepts TSO over IPv6.
pub const VIRTIO_NET_F_GUEST_TSO6: VirtioFeatures = feature(8);
/// The driver accepts TSO with ECN.
pub const VIRTIO_NET_F_GUEST_ECN: VirtioFeatures = feature(9);
/// The driver accepts UFO.
pub const VIRTIO_NET_F_GUEST_UFO: VirtioFeatures = feature(10);
/// The device accepts TSO over IPv4.
pub const VIRTIO_NET_F_HOST_TSO4: VirtioFeatures = feature(11);
/// The device accepts TSO over IPv6.
pub const VIRTIO_NET_F_HOST_TSO6: VirtioFeatures = feature(12);
/// The device accepts TSO with ECN.
pub const VIRTIO_NET_F_HOST_ECN: VirtioFeatures = feature(13);
/// The device accepts UFO.
pub const VIRTIO_NET_F_HOST_UFO: VirtioFeatures = feature(14);
/// A received packet may span several buffers.
pub const VIRTIO_NET_F_MRG_RXBUF: VirtioFeatures = feature(15);
/// `status` is valid.
pub const VIRTIO_NET_F_STATUS: VirtioFeatures = feature(16);
/// The device has a control queue.
pub const VIRTIO_NET_F_CTRL_VQ: VirtioFeatures = feature(17);
/// The control queue sets receive modes.
pub const VIRTIO_NET_F_CTRL_RX: VirtioFeatures = feature(18);
/// The control queue filters VLANs.
pub const VIRTIO_NET_F_CTRL_VLAN: VirtioFeatures = feature(19);
/// The control queue sets more receive modes.
pub const VIRTIO_NET_F_CTRL_RX_EXTRA: VirtioFeatures = feature(20);
/// The driver announces itself on request.
pub const VIRTIO_NET_F_GUEST_ANNOUNCE: VirtioFeatures = feature(21);
/// The device has several queue pairs.
pub const VIRTIO_NET_F_MQ: VirtioFeatures = feature(22);
/// The control queue sets the MAC address.
pub const VIRTIO_NET_F_CTRL_MAC_ADDR: VirtioFeatures = feature(23);
/// `speed` and `duplex` are valid.
pub const VIRTIO_NET_F_SPEED_DUPLEX: VirtioFeatures = feature(63);

/// [`NetConfig::status`]: the link is up.
pub const VIRTIO_NET_S_LINK_UP: u16 = 1;
/// [`NetConfig::status`]: the driver must announce itself.
pub const VIRTIO_NET_S_ANNOUNCE: u16 = 2;

/// Result of a control command: success.
pub const VIRTIO_NET_OK: u8 = 0;
/// Result of a control command: error.
pub const VIRTIO_NET_ERR: u8 = 1;
/// Control class: receive modes.
pub const VIRTIO_NET_CTRL_RX: u8 = 0;
/// Receive mode: everything.
pub const VIRTIO_NET_CTRL_RX_PROMISC: u8 = 0;
/// Receive mode: all multicast.
pub const VIRTIO_NET_CTRL_RX_ALLMULTI: u8 = 1;
/// Receive mode: all unicast.
pub const VIRTIO_NET_CTRL_RX_ALLUNI: u8 = 2;
/// Receive mode: no multicast.
pub const VIRTIO_NET_CTRL_RX_NOMULTI: u8 = 3;
/// Receive mode: no unicast.
pub const VIRTIO_NET_CTRL_RX_NOUNI: u8 = 4;
/// Receive mode: no broadcast.
pub const VIRTIO_NET_CTRL_RX_NOBCAST: u8 = 5;
/// Control class: MAC addresses.
pub const VIRTIO_NET_CTRL_MAC: u8 = 1;
/// Sets the filter table.
pub const VIRTIO_NET_CTRL_MAC_TABLE_SET: u8 = 0;
/// Sets the address.
pub const VIRTIO_NET_CTRL_MAC_ADDR_SET: u8 = 1;
/// Control class: VLANs.
pub const VIRTIO_NET_CTRL_VLAN: u8 = 2;
/// Adds a VLAN.
pub const VIRTIO_NET_CTRL_VLAN_ADD: u8 = 0;
/// Removes a VLAN.
pub const VIRTIO_NET_CTRL_VLAN_DEL: u8 = 1;
/// Control class: announcements.
pub const VIRTIO_NET_CTRL_ANNOUNCE: u8 = 3;
/// The driver has announced itself.
pub const VIRTIO_NET_CTRL_ANNOUNCE_ACK: u8 = 0;
/// Control class: queue pairs.
pub const VIRTIO_NET_CTRL_MQ: u8 = 4;
/// Sets the number of queue pairs in use.
pub const VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: u8 = 0;

wire! {
    /// `struct virtio_net_config`.
    NetConfig, 24 bytes {
        /// MAC address.
        mac: [u8; 6] => 0,
        /// [`VIRTIO_NET_S_LINK_UP`], [`VIRTIO_NET_S_ANNOUNCE`].
        status: U16 => 6,
        /// Maximum number of queue pairs.
        max_virtqueue_pairs: U16 => 8,
        /// Maximum size of a packet, bytes.
        mtu: U16 => 10,
        /// Speed of the link, megabits per second.
        speed: U32 => 12,
        /// Duplex mode of the link: 0 half, 1 full.
        duplex: u8 => 16,
        /// Maximum size of the RSS key, bytes.
        rss_max_key_size: u8 => 17,
        /// Maximum number of entries of the RSS indirection table.
        rss_max_indirection_table_length: U16 => 18,
        /// Supported hash types of RSS.
        supported_hash_types: U32 => 20,
    }

    /// `struct virtio_net_hdr_v1`: header of every packet.
    NetHeader, 12 bytes {
        /// Checksum flags.
        flags: u8 => 0,
        /// Type of segmentation, 0 for none.
        gso_type: u8 => 1,
        /// Size of the packet's headers, bytes.
        hdr_len: U16 => 2,
        /// Size of a segment, bytes.
        gso_size: U16 => 4,
        /// Offset of the first byte of the checksummed part, bytes.
        csum_start: U16 => 6,
        /// Offset of the checksum after `csum_start`, bytes.
        csum_offset: U16 => 8,
        /// Number of buffers of a received packet.
        num_buffers: U16 => 10,
    }

    /// `struct virtio_net_ctrl_hdr`: header of every control command.
    NetCtrlHeader, 2 bytes {
        /// [`VIRTIO_NET_CTRL_RX`] or another class.
        class: u8 => 0,
        /// Command within the class.
        cmd: u8 => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_sizes_are_those_of_the_specification() {
        assert_eq!(desc_table_bytes(256), 4096);
        assert_eq!(avail_ring_bytes(256), 6 + 2 * 256);
        assert_eq!(used_ring_bytes(256), 6 + 8 * 256);
        assert_eq!(used_event_offset(256), 4 + 2 * 256);
        assert_eq!(avail_event_offset(256), 4 + 8 * 256);
    }
}
