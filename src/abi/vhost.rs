//! The kernel's vhost interface (`linux/vhost.h`, `linux/vhost_types.h`): ioctl numbers, structures, feature bits.
//!
//! Names are those of the header. Numbers newer than Linux 6.1 are at the end; a kernel that does not know them returns
//! an error. Not here: calling ioctls.
//!
//! An ioctl that this module does not have is made of the same parts:
//!
//! ```
//! use vhost_migrate::abi::vhost::{VHOST_GET_FEATURES, ior};
//!
//! assert_eq!(VHOST_GET_FEATURES, ior::<u64>(0xaf, 0x00));
//! ```
use super::virtio::{VirtioFeatures, feature};
use super::wire;

/// The number of an ioctl without an argument: `_IO(kind, number)`.
pub const fn io(kind: u8, number: u8) -> u32 {
    ioc(0, kind, number, 0)
}

/// The number of an ioctl that writes a `T` to user memory: `_IOR(kind, number, T)`.
pub const fn ior<T>(kind: u8, number: u8) -> u32 {
    ioc(2, kind, number, size_of::<T>())
}

/// The number of an ioctl that reads a `T` from user memory: `_IOW(kind, number, T)`.
pub const fn iow<T>(kind: u8, number: u8) -> u32 {
    ioc(1, kind, number, size_of::<T>())
}

/// The number of an ioctl that reads and writes a `T` in user memory: `_IOWR(kind, number, T)`.
pub const fn iowr<T>(kind: u8, number: u8) -> u32 {
    ioc(3, kind, number, size_of::<T>())
}

/// An ioctl number as `asm-generic/ioctl.h` encodes it: direction in bits 30-31, size in 16-29, kind in 8-15, number in
/// 0-7.
const fn ioc(direction: u32, kind: u8, number: u8, size: usize) -> u32 {
    assert!(size < 1 << 14, "an ioctl argument must be smaller than 16 KiB");
    direction << 30 | (size as u32) << 16 | (kind as u32) << 8 | number as u32
}

#[cfg(any(target_arch = "powerpc64", target_arch = "mips64", target_arch = "sparc64"))]
compile_error!("ioctl numbers are encoded differently on this architecture");

wire! {
    /// `struct vhost_vring_state`: a ring index and one number. It is also the payload of vhost-user's SET_VRING_NUM,
    /// SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE.
    VringState, 8 bytes {
        /// Ring index.
        index: u32 => 0,
        /// Size, base, byte order, or enable, depending on the request.
        num: u32 => 4,
    }

    /// `struct vhost_vring_file`: a ring and a file descriptor.
    VringFile, 8 bytes {
        /// Ring index.
        index: u32 => 0,
        /// File descriptor, or [`VHOST_FILE_UNBIND`].
        fd: i32 => 4,
    }

    /// `struct vhost_vring_addr`: the addresses of a ring. It is also the payload of vhost-user's SET_VRING_ADDR.
    VringAddr, 40 bytes {
        /// Ring index.
        index: u32 => 0,
        /// [`VHOST_VRING_F_LOG`]: used-ring writes are logged at `log_guest_addr`.
        flags: u32 => 4,
        /// Address of the descriptor table: a user address of the front-end, or an IOVA with VIRTIO_F_ACCESS_PLATFORM.
        desc_user_addr: u64 => 8,
        /// Address of the used ring (packed: of the device event area), likewise.
        used_user_addr: u64 => 16,
        /// Address of the available ring (packed: of the driver event area), likewise.
        avail_user_addr: u64 => 24,
        /// Guest-physical address under which used-ring writes are logged (rules L3.3, L5.1).
        log_guest_addr: u64 => 32,
    }

    /// `struct vhost_iotlb_msg`. It is also the payload of vhost-user's IOTLB_MSG in both directions.
    IotlbMsg, 32 bytes {
        /// I/O virtual address.
        iova: u64 => 0,
        /// Length, bytes.
        size: u64 => 8,
        /// User address of the front-end.
        uaddr: u64 => 16,
        /// [`VHOST_ACCESS_RO`], [`VHOST_ACCESS_WO`], [`VHOST_ACCESS_RW`] or 0.
        perm: u8 => 24,
        /// [`VHOST_IOTLB_MISS`] or another type of message.
        kind: u8 => 25,
        /// Tail padding.
        padding: [u8; 6] => 26,
    }

    /// `struct vhost_msg`: a message read from or written to a kernel vhost device. The union of the header is `iotlb`
    /// plus `unused`.
    Msg, 72 bytes {
        /// [`VHOST_IOTLB_MSG`].
        kind: u32 => 0,
        /// Alignment.
        padding: u32 => 4,
        /// The message.
        iotlb: IotlbMsg => 8,
        /// Rest of the union.
        unused: [u8; 32] => 40,
    }

    /// `struct vhost_msg_v2`, used once [`VHOST_BACKEND_F_IOTLB_MSG_V2`] is acknowledged.
    MsgV2, 72 bytes {
        /// [`VHOST_IOTLB_MSG_V2`].
        kind: u32 => 0,
        /// Address space id with [`VHOST_BACKEND_F_IOTLB_ASID`], otherwise 0 (older headers call it `reserved`).
        asid: u32 => 4,
        /// The message.
        iotlb: IotlbMsg => 8,
        /// Rest of the union.
        unused: [u8; 32] => 40,
    }

    /// `struct vhost_memory_region`.
    VhostMemoryRegion, 32 bytes {
        /// Guest-physical address, a multiple of 4096.
        guest_phys_addr: u64 => 0,
        /// Size, bytes, a multiple of 4096.
        memory_size: u64 => 8,
        /// Address in the calling process.
        userspace_addr: u64 => 16,
        /// 0.
        flags_padding: u64 => 24,
    }

    /// `struct vhost_memory` without its regions, which follow immediately.
    VhostMemoryHeader, 8 bytes {
        /// Number of regions that follow.
        nregions: u32 => 0,
        /// 0.
        padding: u32 => 4,
    }

    /// `struct vhost_scsi_target`.
    ScsiTarget, 232 bytes {
        /// [`VHOST_SCSI_ABI_VERSION`].
        abi_version: i32 => 0,
        /// World-wide port name, NUL-terminated.
        vhost_wwpn: [u8; 224] => 4,
        /// Target portal group tag; ignored since version 1.
        vhost_tpgt: u16 => 228,
        /// 0.
        reserved: u16 => 230,
    }

    /// `struct vhost_vdpa_config` without its data, which follows immediately.
    VdpaConfigHeader, 8 bytes {
        /// Offset in the configuration space, bytes.
        off: u32 => 0,
        /// Length of the data that follows, bytes.
        len: u32 => 4,
    }

    /// `struct vhost_vdpa_iova_range`: both ends inclusive.
    VdpaIovaRange, 16 bytes {
        /// First address that can be mapped.
        first: u64 => 0,
        /// Last address that can be mapped.
        last: u64 => 8,
    }

    /// `struct vhost_worker_state` (Linux 6.5).
    WorkerState, 4 bytes {
        /// Worker id.
        worker_id: u32 => 0,
    }

    /// `struct vhost_vring_worker` (Linux 6.5).
    VringWorker, 8 bytes {
        /// Ring index.
        index: u32 => 0,
        /// Worker id.
        worker_id: u32 => 4,
    }

    /// `struct vhost_features_array` without its words, which follow immediately (Linux 6.18).
    FeaturesArrayHeader, 8 bytes {
        /// Number of 64-bit words that follow.
        count: u64 => 0,
    }
}

/// Ioctl type of all vhost requests.
pub const VHOST_VIRTIO: u8 = 0xaf;
/// [`VringFile::fd`]: unbinds the ring.
pub const VHOST_FILE_UNBIND: i32 = -1;
/// Alignment of region addresses and sizes, bytes.
pub const VHOST_PAGE_SIZE: u64 = 0x1000;

/// Feature bit: every write to guest memory is logged. It may change while rings run (rules L3.1, R1.4).
pub const VHOST_F_LOG_ALL: VirtioFeatures = feature(26);
/// Feature bit of vhost-net: the device adds and strips the virtio-net header itself.
pub const VHOST_NET_F_VIRTIO_NET_HDR: VirtioFeatures = feature(27);
bitflags::bitflags! {
    /// Flags of [`VringAddr::flags`]. Unknown flags are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    #[repr(transparent)]
    pub struct VringAddrFlags: u32 {
        const _ = !0;
    }
}

/// [`VringAddr::flags`]: `log_guest_addr` is valid, and writes to the used ring are logged there.
pub const VHOST_VRING_F_LOG: VringAddrFlags = VringAddrFlags::from_bits_retain(1 << 0);

/// Ring byte order: little-endian.
pub const VHOST_VRING_LITTLE_ENDIAN: u32 = 0;
/// Ring byte order: big-endian.
pub const VHOST_VRING_BIG_ENDIAN: u32 = 1;

/// IOTLB permission: read.
pub const VHOST_ACCESS_RO: u8 = 1;
/// IOTLB permission: write.
pub const VHOST_ACCESS_WO: u8 = 2;
/// IOTLB permission: read and write.
pub const VHOST_ACCESS_RW: u8 = 3;
/// IOTLB message: the back-end asks for a missing translation.
pub const VHOST_IOTLB_MISS: u8 = 1;
/// IOTLB message: a translation.
pub const VHOST_IOTLB_UPDATE: u8 = 2;
/// IOTLB message: removes a translation.
pub const VHOST_IOTLB_INVALIDATE: u8 = 3;
/// IOTLB message: the access is not permitted.
pub const VHOST_IOTLB_ACCESS_FAIL: u8 = 4;
/// IOTLB message: beginning of a batch of updates.
pub const VHOST_IOTLB_BATCH_BEGIN: u8 = 5;
/// IOTLB message: end of a batch of updates.
pub const VHOST_IOTLB_BATCH_END: u8 = 6;
/// `kind` of a [`Msg`].
pub const VHOST_IOTLB_MSG: u32 = 1;
/// `kind` of a [`MsgV2`].
pub const VHOST_IOTLB_MSG_V2: u32 = 2;

/// Back-end feature bit: messages are [`MsgV2`].
pub const VHOST_BACKEND_F_IOTLB_MSG_V2: u32 = 1;
/// Back-end feature bit: IOTLB batches.
pub const VHOST_BACKEND_F_IOTLB_BATCH: u32 = 2;
/// Back-end feature bit: address space ids in [`MsgV2`].
pub const VHOST_BACKEND_F_IOTLB_ASID: u32 = 3;
/// Back-end feature bit: [`VHOST_VDPA_SUSPEND`] is supported.
pub const VHOST_BACKEND_F_SUSPEND: u32 = 4;

/// Reads the offered feature bits, u64.
pub const VHOST_GET_FEATURES: u32 = ior::<u64>(VHOST_VIRTIO, 0x00);
/// Acknowledges feature bits, u64.
pub const VHOST_SET_FEATURES: u32 = iow::<u64>(VHOST_VIRTIO, 0x00);
/// Makes the calling process the owner. It must come first: other calls fail with EPERM before.
pub const VHOST_SET_OWNER: u32 = io(VHOST_VIRTIO, 0x01);
/// Releases ownership and resets the device.
pub const VHOST_RESET_OWNER: u32 = io(VHOST_VIRTIO, 0x02);
/// Sets the memory table: [`VhostMemoryHeader`] and regions.
pub const VHOST_SET_MEM_TABLE: u32 = iow::<VhostMemoryHeader>(VHOST_VIRTIO, 0x03);
/// Sets the address of the dirty log, u64. It has no size.
pub const VHOST_SET_LOG_BASE: u32 = iow::<u64>(VHOST_VIRTIO, 0x04);
/// Sets the eventfd signalled after logging; -1 removes it (rules L12.1, L12.2).
pub const VHOST_SET_LOG_FD: u32 = iow::<i32>(VHOST_VIRTIO, 0x07);
/// Sets a ring's size, entries.
pub const VHOST_SET_VRING_NUM: u32 = iow::<VringState>(VHOST_VIRTIO, 0x10);
/// Sets a ring's addresses.
pub const VHOST_SET_VRING_ADDR: u32 = iow::<VringAddr>(VHOST_VIRTIO, 0x11);
/// Sets the base of a ring, the position from which it continues (rules R4.1, R4.2).
pub const VHOST_SET_VRING_BASE: u32 = iow::<VringState>(VHOST_VIRTIO, 0x12);
/// Reads the base of a ring.
pub const VHOST_GET_VRING_BASE: u32 = iowr::<VringState>(VHOST_VIRTIO, 0x12);
/// Sets a legacy ring's byte order.
pub const VHOST_SET_VRING_ENDIAN: u32 = iow::<VringState>(VHOST_VIRTIO, 0x13);
/// Reads a legacy ring's byte order.
pub const VHOST_GET_VRING_ENDIAN: u32 = iow::<VringState>(VHOST_VIRTIO, 0x14);
/// Sets the eventfd signalled for new buffers.
pub const VHOST_SET_VRING_KICK: u32 = iow::<VringFile>(VHOST_VIRTIO, 0x20);
/// Sets the eventfd signalled for used buffers.
pub const VHOST_SET_VRING_CALL: u32 = iow::<VringFile>(VHOST_VIRTIO, 0x21);
/// Sets the eventfd signalled for errors.
pub const VHOST_SET_VRING_ERR: u32 = iow::<VringFile>(VHOST_VIRTIO, 0x22);
/// Sets the busy-poll time, microseconds.
pub const VHOST_SET_VRING_BUSYLOOP_TIMEOUT: u32 = iow::<VringState>(VHOST_VIRTIO, 0x23);
/// Reads the busy-poll time, microseconds.
pub const VHOST_GET_VRING_BUSYLOOP_TIMEOUT: u32 = iow::<VringState>(VHOST_VIRTIO, 0x24);
/// Acknowledges back-end features, u64.
pub const VHOST_SET_BACKEND_FEATURES: u32 = iow::<u64>(VHOST_VIRTIO, 0x25);
/// Reads the offered back-end features, u64.
pub const VHOST_GET_BACKEND_FEATURES: u32 = ior::<u64>(VHOST_VIRTIO, 0x26);
/// [`VHOST_GET_BACKEND_FEATURES`] as old headers define it, with the wrong direction.
pub const VHOST_GET_BACKEND_FEATURES_OLD: u32 = iow::<u64>(VHOST_VIRTIO, 0x26);

/// vhost-net: binds a ring to a socket or tap, which starts it.
pub const VHOST_NET_SET_BACKEND: u32 = iow::<VringFile>(VHOST_VIRTIO, 0x30);

/// vhost-scsi: version of [`ScsiTarget`].
pub const VHOST_SCSI_ABI_VERSION: i32 = 1;
/// vhost-scsi: binds the device to a target, which starts it.
pub const VHOST_SCSI_SET_ENDPOINT: u32 = iow::<ScsiTarget>(VHOST_VIRTIO, 0x40);
/// vhost-scsi: unbinds the target, which stops the device.
pub const VHOST_SCSI_CLEAR_ENDPOINT: u32 = iow::<ScsiTarget>(VHOST_VIRTIO, 0x41);
/// vhost-scsi: reads the version of [`ScsiTarget`].
pub const VHOST_SCSI_GET_ABI_VERSION: u32 = iow::<i32>(VHOST_VIRTIO, 0x42);
/// vhost-scsi: sets the events-missed flag.
pub const VHOST_SCSI_SET_EVENTS_MISSED: u32 = iow::<u32>(VHOST_VIRTIO, 0x43);
/// vhost-scsi: reads the events-missed flag.
pub const VHOST_SCSI_GET_EVENTS_MISSED: u32 = iow::<u32>(VHOST_VIRTIO, 0x44);

/// vhost-vsock: sets the guest's context id, u64.
pub const VHOST_VSOCK_SET_GUEST_CID: u32 = iow::<u64>(VHOST_VIRTIO, 0x60);
/// vhost-vsock: starts (1) or stops (0) the device.
pub const VHOST_VSOCK_SET_RUNNING: u32 = iow::<i32>(VHOST_VIRTIO, 0x61);

/// vhost-vdpa: reads the virtio device id.
pub const VHOST_VDPA_GET_DEVICE_ID: u32 = ior::<u32>(VHOST_VIRTIO, 0x70);
/// vhost-vdpa: reads the virtio status byte.
pub const VHOST_VDPA_GET_STATUS: u32 = ior::<u8>(VHOST_VIRTIO, 0x71);
/// vhost-vdpa: writes the virtio status byte.
pub const VHOST_VDPA_SET_STATUS: u32 = iow::<u8>(VHOST_VIRTIO, 0x72);
/// vhost-vdpa: reads configuration space.
pub const VHOST_VDPA_GET_CONFIG: u32 = ior::<VdpaConfigHeader>(VHOST_VIRTIO, 0x73);
/// vhost-vdpa: writes configuration space.
pub const VHOST_VDPA_SET_CONFIG: u32 = iow::<VdpaConfigHeader>(VHOST_VIRTIO, 0x74);
/// vhost-vdpa: enables or disables a ring.
pub const VHOST_VDPA_SET_VRING_ENABLE: u32 = iow::<VringState>(VHOST_VIRTIO, 0x75);
/// vhost-vdpa: reads the maximum ring size.
pub const VHOST_VDPA_GET_VRING_NUM: u32 = ior::<u16>(VHOST_VIRTIO, 0x76);
/// vhost-vdpa: sets the eventfd signalled for configuration changes.
pub const VHOST_VDPA_SET_CONFIG_CALL: u32 = iow::<i32>(VHOST_VIRTIO, 0x77);
/// vhost-vdpa: reads the range of addresses that can be mapped.
pub const VHOST_VDPA_GET_IOVA_RANGE: u32 = ior::<VdpaIovaRange>(VHOST_VIRTIO, 0x78);
/// vhost-vdpa: reads the size of configuration space.
pub const VHOST_VDPA_GET_CONFIG_SIZE: u32 = ior::<u32>(VHOST_VIRTIO, 0x79);
/// vhost-vdpa: reads the number of address spaces.
pub const VHOST_VDPA_GET_AS_NUM: u32 = ior::<u32>(VHOST_VIRTIO, 0x7a);
/// vhost-vdpa: reads the group of a ring.
pub const VHOST_VDPA_GET_VRING_GROUP: u32 = iowr::<VringState>(VHOST_VIRTIO, 0x7b);
/// vhost-vdpa: binds a group to an address space.
pub const VHOST_VDPA_SET_GROUP_ASID: u32 = iow::<VringState>(VHOST_VIRTIO, 0x7c);
/// vhost-vdpa: stops processing and keeps the state.
pub const VHOST_VDPA_SUSPEND: u32 = io(VHOST_VIRTIO, 0x7d);
/// vhost-vdpa: reads the number of rings.
pub const VHOST_VDPA_GET_VQS_COUNT: u32 = ior::<u32>(VHOST_VIRTIO, 0x80);
/// vhost-vdpa: reads the number of groups.
pub const VHOST_VDPA_GET_GROUP_NUM: u32 = ior::<u32>(VHOST_VIRTIO, 0x81);

/// Back-end feature bit: [`VHOST_VDPA_RESUME`] is supported.
pub const VHOST_BACKEND_F_RESUME: u32 = 5;
/// Back-end feature bit: rings may be enabled after DRIVER_OK.
pub const VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK: u32 = 6;
/// Back-end feature bit: descriptor tables have a group of their own.
pub const VHOST_BACKEND_F_DESC_ASID: u32 = 7;
/// Back-end feature bit: mappings survive a reset.
pub const VHOST_BACKEND_F_IOTLB_PERSIST: u32 = 8;
/// Creates a worker thread.
pub const VHOST_NEW_WORKER: u32 = ior::<WorkerState>(VHOST_VIRTIO, 0x08);
/// Frees a worker thread.
pub const VHOST_FREE_WORKER: u32 = iow::<WorkerState>(VHOST_VIRTIO, 0x09);
/// Moves a ring to a worker thread.
pub const VHOST_ATTACH_VRING_WORKER: u32 = iow::<VringWorker>(VHOST_VIRTIO, 0x15);
/// Reads a ring's worker thread.
pub const VHOST_GET_VRING_WORKER: u32 = iowr::<VringWorker>(VHOST_VIRTIO, 0x16);
/// vhost-vdpa: resumes processing after [`VHOST_VDPA_SUSPEND`].
pub const VHOST_VDPA_RESUME: u32 = io(VHOST_VIRTIO, 0x7e);
/// vhost-vdpa: reads the group of a ring's descriptor table.
pub const VHOST_VDPA_GET_VRING_DESC_GROUP: u32 = iowr::<VringState>(VHOST_VIRTIO, 0x7f);
/// vhost-vdpa: reads the size of one ring.
pub const VHOST_VDPA_GET_VRING_SIZE: u32 = iowr::<VringState>(VHOST_VIRTIO, 0x82);
/// Reads the offered feature bits, more than 64.
pub const VHOST_GET_FEATURES_ARRAY: u32 = ior::<FeaturesArrayHeader>(VHOST_VIRTIO, 0x83);
/// Acknowledges feature bits, more than 64.
pub const VHOST_SET_FEATURES_ARRAY: u32 = iow::<FeaturesArrayHeader>(VHOST_VIRTIO, 0x83);
/// Value of [`VHOST_SET_FORK_FROM_OWNER`]: workers are kernel threads.
pub const VHOST_FORK_OWNER_KTHREAD: u8 = 0;
/// Value of [`VHOST_SET_FORK_FROM_OWNER`]: workers are tasks of the owner.
pub const VHOST_FORK_OWNER_TASK: u8 = 1;
/// Sets the type of the workers.
pub const VHOST_SET_FORK_FROM_OWNER: u32 = iow::<u8>(VHOST_VIRTIO, 0x84);
/// Reads the type of the workers.
pub const VHOST_GET_FORK_FROM_OWNER: u32 = ior::<u8>(VHOST_VIRTIO, 0x85);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_those_shown_by_strace() {
        assert_eq!(VHOST_GET_FEATURES, 0x8008_af00);
        assert_eq!(VHOST_SET_OWNER, 0xaf01);
        assert_eq!(VHOST_SET_MEM_TABLE, 0x4008_af03);
        assert_eq!(VHOST_SET_VRING_ADDR, 0x4028_af11);
        assert_eq!(VHOST_GET_VRING_BASE, 0xc008_af12);
    }

    #[test]
    fn the_old_number_of_get_backend_features_differs_in_direction_only() {
        assert_eq!(VHOST_GET_BACKEND_FEATURES, 0x8008_af26);
        assert_eq!(VHOST_GET_BACKEND_FEATURES_OLD, 0x4008_af26);
    }
}
