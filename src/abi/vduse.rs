//! The kernel's VDUSE interface (`linux/vduse.h`): ioctl numbers and the messages of `/dev/vduse/NAME`.
//!
//! Names are those of the header. Numbers newer than Linux 6.1 are at the end. Not here: calling ioctls.
//!
//! The kernel passes the state of split and of packed rings in one union:
//!
//! ```
//! use vhost_migrate::abi::vduse::{VqStatePacked, VqStateSplit};
//!
//! let state = VqStatePacked::from_split(VqStateSplit { avail_index: 7 });
//! assert_eq!(state.as_split().avail_index, 7);
//! ```
use super::vhost::{io, ior, iow, iowr};
use super::wire;

/// Ioctl type of all VDUSE requests.
pub const VDUSE_BASE: u8 = 0x81;
/// Version of the interface.
pub const VDUSE_API_VERSION: u64 = 0;
/// Maximum length of a device name, bytes, with its NUL.
pub const VDUSE_NAME_MAX: usize = 256;
/// [`VqEventfd::fd`]: unbinds the kick eventfd.
pub const VDUSE_EVENTFD_DEASSIGN: i32 = -1;

/// Access to a mapping: read.
pub const VDUSE_ACCESS_RO: u8 = 1;
/// Access to a mapping: write.
pub const VDUSE_ACCESS_WO: u8 = 2;
/// Access to a mapping: read and write.
pub const VDUSE_ACCESS_RW: u8 = 3;
/// [`IovaInfo::capability`]: memory of this process can be registered.
pub const VDUSE_IOVA_CAP_UMEM: u64 = 1;

/// [`DevRequest::kind`]: asks for the state of a ring, a [`VqState`].
pub const VDUSE_GET_VQ_STATE: u32 = 0;
/// [`DevRequest::kind`]: sets the status, a [`DevStatus`].
pub const VDUSE_SET_STATUS: u32 = 1;
/// [`DevRequest::kind`]: mappings changed, an [`IovaRange`].
pub const VDUSE_UPDATE_IOTLB: u32 = 2;
/// [`DevResponse::result`]: success.
pub const VDUSE_REQ_RESULT_OK: u32 = 0;
/// [`DevResponse::result`]: refused.
pub const VDUSE_REQ_RESULT_FAILED: u32 = 1;

wire! {
    /// `struct vduse_dev_config` without the configuration space, which follows immediately.
    DevConfigHeader, 336 bytes {
        /// Device name, NUL-terminated.
        name: [u8; VDUSE_NAME_MAX] => 0,
        /// Virtio vendor id.
        vendor_id: u32 => 256,
        /// Virtio device id.
        device_id: u32 => 260,
        /// Virtio features.
        features: u64 => 264,
        /// Number of rings.
        vq_num: u32 => 272,
        /// Alignment of rings, bytes.
        vq_align: u32 => 276,
        /// 0. With [`VDUSE_API_VERSION_1`] the first two words are the number of groups and of address spaces.
        reserved: [u32; 13] => 280,
        /// Size of the configuration space that follows, bytes.
        config_size: u32 => 332,
    }

    /// `struct vduse_iotlb_entry`: both ends inclusive.
    IotlbEntry, 32 bytes {
        /// Offset of the mapping in its fd, bytes.
        offset: u64 => 0,
        /// First IOVA.
        start: u64 => 8,
        /// Last IOVA.
        last: u64 => 16,
        /// [`VDUSE_ACCESS_RO`], [`VDUSE_ACCESS_WO`] or [`VDUSE_ACCESS_RW`].
        perm: u8 => 24,
        /// Tail padding.
        padding: [u8; 7] => 25,
    }

    /// `struct vduse_config_data` without its data, which follows immediately.
    ConfigDataHeader, 8 bytes {
        /// Offset in configuration space, bytes.
        offset: u32 => 0,
        /// Length of the data that follows, bytes.
        length: u32 => 4,
    }

    /// `struct vduse_vq_config`.
    VqConfig, 32 bytes {
        /// Ring index.
        index: u32 => 0,
        /// Maximum ring size, entries.
        max_size: u16 => 4,
        /// 0. With [`VDUSE_API_VERSION_1`] the second and third element are the ring's group.
        reserved: [u16; 13] => 6,
    }

    /// `struct vduse_vq_state_split`.
    VqStateSplit, 2 bytes {
        /// Next index of the available ring.
        avail_index: u16 => 0,
    }

    /// `struct vduse_vq_state_packed`.
    VqStatePacked, 8 bytes {
        /// Driver's wrap counter.
        last_avail_counter: u16 => 0,
        /// Position of the next available descriptor.
        last_avail_idx: u16 => 2,
        /// Device's wrap counter.
        last_used_counter: u16 => 4,
        /// Position of the next used descriptor.
        last_used_idx: u16 => 6,
    }

    /// `struct vduse_vq_info`.
    VqInfo, 48 bytes {
        /// Ring index.
        index: u32 => 0,
        /// Ring size, entries.
        num: u32 => 4,
        /// IOVA of the descriptor area.
        desc_addr: u64 => 8,
        /// IOVA of the driver area.
        driver_addr: u64 => 16,
        /// IOVA of the device area.
        device_addr: u64 => 24,
        /// Position from which the ring continues, as SET_VRING_BASE sets it. For a split ring see
        /// [`VqStatePacked::as_split`].
        state: VqStatePacked => 32,
        /// 1 if enabled.
        ready: u8 => 40,
        /// Tail padding.
        padding: [u8; 7] => 41,
    }

    /// `struct vduse_vq_eventfd`.
    VqEventfd, 8 bytes {
        /// Ring index.
        index: u32 => 0,
        /// Eventfd or [`VDUSE_EVENTFD_DEASSIGN`].
        fd: i32 => 4,
    }

    /// `struct vduse_iova_umem`.
    IovaUmem, 48 bytes {
        /// Address in this process, page-aligned.
        uaddr: u64 => 0,
        /// First IOVA.
        iova: u64 => 8,
        /// Length, bytes.
        size: u64 => 16,
        /// 0.
        reserved: [u64; 3] => 24,
    }

    /// `struct vduse_iova_info`: both ends inclusive.
    IovaInfo, 48 bytes {
        /// First IOVA.
        start: u64 => 0,
        /// Last IOVA.
        last: u64 => 8,
        /// [`VDUSE_IOVA_CAP_UMEM`].
        capability: u64 => 16,
        /// 0.
        reserved: [u64; 3] => 24,
    }

    /// `struct vduse_vq_state`: payload of [`VDUSE_GET_VQ_STATE`]. The request uses only `index`.
    VqState, 12 bytes {
        /// Ring index.
        index: u32 => 0,
        /// Position from which the ring continues.
        state: VqStatePacked => 4,
    }

    /// `struct vduse_dev_status`: payload of [`VDUSE_SET_STATUS`].
    DevStatus, 1 bytes {
        /// Virtio status bits.
        status: u8 => 0,
    }

    /// `struct vduse_iova_range`: payload of [`VDUSE_UPDATE_IOTLB`]; both ends inclusive.
    IovaRange, 16 bytes {
        /// First IOVA.
        start: u64 => 0,
        /// Last IOVA.
        last: u64 => 8,
    }

    /// `struct vduse_vq_ready`: payload of [`VDUSE_SET_VQ_READY`] (newer kernels only).
    VqReady, 8 bytes {
        /// Ring index.
        index: u32 => 0,
        /// 1 if the ring is enabled, 0 if it is disabled.
        ready: u32 => 4,
    }

    /// `struct vduse_dev_request`: a message read from the device.
    DevRequest, 152 bytes {
        /// [`VDUSE_GET_VQ_STATE`] or another request number.
        kind: u32 => 0,
        /// Number that the response must carry.
        request_id: u32 => 4,
        /// 0.
        reserved: [u32; 4] => 8,
        /// A [`VqState`], [`DevStatus`], [`IovaRange`] or [`VqReady`], depending on `kind`.
        payload: [u8; 128] => 24,
    }

    /// `struct vduse_dev_response`: a message written to the device.
    DevResponse, 152 bytes {
        /// Number of the request.
        request_id: u32 => 0,
        /// [`VDUSE_REQ_RESULT_OK`] or [`VDUSE_REQ_RESULT_FAILED`].
        result: u32 => 4,
        /// 0.
        reserved: [u32; 4] => 8,
        /// A [`VqState`] in response to [`VDUSE_GET_VQ_STATE`], otherwise zeros.
        payload: [u8; 128] => 24,
    }

    /// `struct vduse_iotlb_entry_v2`, used with [`VDUSE_API_VERSION_1`].
    IotlbEntryV2, 80 bytes {
        /// The entry without an address space.
        v1: IotlbEntry => 0,
        /// Address space id.
        asid: u32 => 32,
        /// 0.
        reserved: [u32; 11] => 36,
    }
}

impl VqStatePacked {
    /// The union of the header that holds the state of a split ring: its first word is the available index.
    pub const fn from_split(split: VqStateSplit) -> Self {
        Self { last_avail_counter: split.avail_index, last_avail_idx: 0, last_used_counter: 0, last_used_idx: 0 }
    }

    /// The same union read as the state of a split ring.
    pub const fn as_split(self) -> VqStateSplit {
        VqStateSplit { avail_index: self.last_avail_counter }
    }
}

/// Reads the kernel's version of the interface, u64. Used on `/dev/vduse/control`, like the next three.
pub const VDUSE_GET_API_VERSION: u32 = ior::<u64>(VDUSE_BASE, 0x00);
/// Sets the version of the interface, u64.
pub const VDUSE_SET_API_VERSION: u32 = iow::<u64>(VDUSE_BASE, 0x01);
/// Creates a device: [`DevConfigHeader`] and configuration space.
pub const VDUSE_CREATE_DEV: u32 = iow::<DevConfigHeader>(VDUSE_BASE, 0x02);
/// Destroys the device of this name.
pub const VDUSE_DESTROY_DEV: u32 = iow::<[u8; VDUSE_NAME_MAX]>(VDUSE_BASE, 0x03);
/// Finds the first mapping in a range and returns its fd.
pub const VDUSE_IOTLB_GET_FD: u32 = iowr::<IotlbEntry>(VDUSE_BASE, 0x10);
/// Reads the negotiated features, u64.
pub const VDUSE_DEV_GET_FEATURES: u32 = ior::<u64>(VDUSE_BASE, 0x11);
/// Writes configuration space: [`ConfigDataHeader`] and data.
pub const VDUSE_DEV_SET_CONFIG: u32 = iow::<ConfigDataHeader>(VDUSE_BASE, 0x12);
/// Notifies the driver of a change of configuration space.
pub const VDUSE_DEV_INJECT_CONFIG_IRQ: u32 = io(VDUSE_BASE, 0x13);
/// Declares a ring. Used before the device is attached.
pub const VDUSE_VQ_SETUP: u32 = iow::<VqConfig>(VDUSE_BASE, 0x14);
/// Reads the addresses and the state of a ring.
pub const VDUSE_VQ_GET_INFO: u32 = iowr::<VqInfo>(VDUSE_BASE, 0x15);
/// Sets the kick eventfd.
pub const VDUSE_VQ_SETUP_KICKFD: u32 = iow::<VqEventfd>(VDUSE_BASE, 0x16);
/// Notifies the driver of used buffers: ring index, u32.
pub const VDUSE_VQ_INJECT_IRQ: u32 = iow::<u32>(VDUSE_BASE, 0x17);
/// Registers memory of this process for a range of IOVAs.
pub const VDUSE_IOTLB_REG_UMEM: u32 = iow::<IovaUmem>(VDUSE_BASE, 0x18);
/// Removes the memory registered with [`VDUSE_IOTLB_REG_UMEM`].
pub const VDUSE_IOTLB_DEREG_UMEM: u32 = iow::<IovaUmem>(VDUSE_BASE, 0x19);
/// Finds the first mapping in a range, without its fd.
pub const VDUSE_IOTLB_GET_INFO: u32 = iowr::<IovaInfo>(VDUSE_BASE, 0x1a);

/// Version of the interface with groups and address spaces.
pub const VDUSE_API_VERSION_1: u64 = 1;
/// VDUSE feature bit: the kernel sends [`VDUSE_SET_VQ_READY`] when a ring is enabled or disabled (newer kernels only).
pub const VDUSE_F_QUEUE_READY: u32 = 0;
/// VDUSE feature bit: the device can be suspended (newer kernels only).
pub const VDUSE_F_SUSPEND: u32 = 1;
/// Reads the VDUSE features the kernel offers, u64.
pub const VDUSE_GET_FEATURES: u32 = ior::<u64>(VDUSE_BASE, 0x04);
/// Acknowledges VDUSE features, u64.
pub const VDUSE_SET_FEATURES: u32 = iow::<u64>(VDUSE_BASE, 0x05);
/// As [`VDUSE_IOTLB_GET_FD`], with an address space.
pub const VDUSE_IOTLB_GET_FD2: u32 = iowr::<IotlbEntryV2>(VDUSE_BASE, 0x1b);
/// [`DevRequest::kind`]: moves a group to an address space.
pub const VDUSE_SET_VQ_GROUP_ASID: u32 = 3;
/// [`DevRequest::kind`]: a ring was enabled or disabled.
pub const VDUSE_SET_VQ_READY: u32 = 4;
/// [`DevRequest::kind`]: the device must stop processing and keep its state.
pub const VDUSE_SUSPEND: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn a_split_ring_state_is_the_first_word_of_the_kernels_union() {
        let state = VqStatePacked::from_split(VqStateSplit { avail_index: 0xbeef });
        assert_eq!(state.as_bytes()[..2], 0xbeef_u16.to_ne_bytes());
        assert_eq!(state.as_split().avail_index, 0xbeef);
    }
}
