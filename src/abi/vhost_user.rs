//! The vhost-user protocol on the wire: request numbers, header, payloads, protocol features.
//!
//! Names are those of the specification without their prefix, in its current words (back-end, not slave). All fields
//! are in native byte order. Not here: decoding and handling of requests.
//!
//! The first message of a front-end:
//!
//! ```
//! use vhost_migrate::abi::vhost_user::{Header, FrontendRequest};
//! use zerocopy::IntoBytes;
//!
//! let header = Header { request: FrontendRequest::GET_FEATURES.0, flags: Header::FLAG_VERSION, size: 0 };
//! assert_eq!(header.as_bytes().len(), 12);
//! assert_eq!(FrontendRequest(header.request).to_string(), "GET_FEATURES");
//! ```
use super::wire;
use std::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use super::vhost::{IotlbMsg, VHOST_F_LOG_ALL, VHOST_VRING_F_LOG, VringAddr, VringAddrFlags, VringState};
use super::virtio::{VirtioFeatures, feature};

/// Feature bit of SET_FEATURES: protocol features are negotiated, and rings start disabled (rules R1.1, R2.1).
pub const VHOST_USER_F_PROTOCOL_FEATURES: VirtioFeatures = feature(30);
/// Guest memory covered by one bit of the dirty log, bytes.
pub const VHOST_LOG_PAGE: u64 = 4096;
/// Maximum number of regions in a SET_MEM_TABLE, and of fds in one message.
pub const VHOST_MEMORY_BASELINE_NREGIONS: usize = 8;
/// Number of memory slots of libvhost-user (QEMU 10), which front-ends may use up (rule M1.3).
pub const VHOST_USER_MAX_RAM_SLOTS: usize = 509;
/// Number of memory slots of older versions of libvhost-user.
pub const VHOST_USER_MAX_RAM_SLOTS_OLD: usize = 32;
/// Maximum ring size of libvhost-user, entries.
pub const VIRTQUEUE_MAX_SIZE: usize = 1024;
/// Maximum length of configuration space in one GET_CONFIG or SET_CONFIG, bytes.
pub const VHOST_USER_MAX_CONFIG_SIZE: usize = 256;

/// [`ConfigHeader::flags`]: the driver wrote a field.
pub const CONFIG_TYPE_FRONTEND: u32 = 0;
/// [`ConfigHeader::flags`]: migration restores the configuration space.
pub const CONFIG_TYPE_MIGRATION: u32 = 1;

/// Mask of the ring index in the u64 of SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR and of a [`VringArea`].
pub const VRING_IDX_MASK: u64 = 0xff;
/// Bit in the same u64: the message carries no fd.
pub const VRING_NOFD_MASK: u64 = 0x100;

/// [`DeviceStateTransfer::direction`]: the back-end writes its state (source).
pub const DEVICE_STATE_SAVE: u32 = 0;
/// [`DeviceStateTransfer::direction`]: the back-end reads its state (destination).
pub const DEVICE_STATE_LOAD: u32 = 1;
/// [`DeviceStateTransfer::phase`]: all rings are stopped.
pub const DEVICE_STATE_PHASE_STOPPED: u32 = 0;
/// Mask of the error number in the reply to SET_DEVICE_STATE_FD; 0 is success.
pub const DEVICE_STATE_ERROR_MASK: u64 = 0xff;
/// Bit in the reply to SET_DEVICE_STATE_FD: it carries no fd, and the one that was sent is used.
pub const DEVICE_STATE_NOFD_MASK: u64 = 0x100;

/// [`SharedMemoryMap::flags`]: the mapping is writable.
pub const SHMEM_MAP_RW: u64 = 1;

/// Transport features of User-mode Linux's front-end.
pub const UML_SUPPORTED_F: VirtioFeatures = VHOST_USER_F_PROTOCOL_FEATURES;
/// Protocol features of User-mode Linux's front-end.
pub const UML_SUPPORTED_PROTOCOL_F: ProtocolFeatures =
    ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::BACKEND_REQ).union(ProtocolFeatures::CONFIG);
/// Number of regions in every SET_MEM_TABLE payload of User-mode Linux, also if `nregions` is less (rule F6.2).
pub const UML_MEM_TABLE_REGIONS: usize = 2;

/// Numbers that the specification has not settled (rule I8.1). They are used only on request.
pub mod unstable {
    use super::ProtocolFeatures;

    /// Both protocol features. Neither is useful without the other.
    pub const INFLIGHT_MIGRATION: ProtocolFeatures =
        ProtocolFeatures::GET_VRING_BASE_INFLIGHT.union(ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN);
    /// Request: GET_VRING_BASE without draining the ring.
    pub const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
    /// Number of the same request in one implementation. The specification assigns it to GET_SHMEM_CONFIG.
    pub const GET_VRING_BASE_SKIP_DRAIN_OTHER: u32 = 44;
}

/// Numbers of this project that are in no specification. Other programs ignore the feature and never get the requests.
pub mod own {
    /// Protocol feature: the requests of this module are supported. The specification adds bits from the other end of
    /// the word.
    pub const F_DISK_GENERATION: super::ProtocolFeatures = super::ProtocolFeatures::from_bits_retain(1 << 62);
    /// Asks a disk that no ring uses for its [`DiskGeneration`](super::DiskGeneration). A reply without payload means
    /// that the generation is not known.
    pub const GET_DISK_GENERATION: super::FrontendRequest = super::FrontendRequest(0x7664_0001);
    /// Asks a disk for the identity in its [`DiskGeneration`](super::DiskGeneration), a `u128`, also while rings run. A
    /// reply without payload means that the identity is not known.
    pub const GET_DISK_IDENTITY: super::FrontendRequest = super::FrontendRequest(0x7664_0002);
}

/// Protocol feature bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES. Unknown bits are kept.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct ProtocolFeatures(u64);

/// The specification's names of the bits that are set.
impl fmt::Debug for ProtocolFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bitflags::parser::to_writer(self, f)
    }
}

bitflags::bitflags! {
    impl ProtocolFeatures: u64 {
        /// Several queues.
        const MQ = 1 << 0;
        /// SET_LOG_BASE carries an fd.
        const LOG_SHMFD = 1 << 1;
        /// SEND_RARP.
        const RARP = 1 << 2;
        /// The need-reply flag and its u64 reply (rule F4.1).
        const REPLY_ACK = 1 << 3;
        /// NET_SET_MTU.
        const MTU = 1 << 4;
        /// The back-end channel: SET_BACKEND_REQ_FD.
        const BACKEND_REQ = 1 << 5;
        /// SET_VRING_ENDIAN.
        const CROSS_ENDIAN = 1 << 6;
        /// Crypto sessions.
        const CRYPTO_SESSION = 1 << 7;
        /// Postcopy (rule P1).
        const PAGEFAULT = 1 << 8;
        /// GET_CONFIG and SET_CONFIG.
        const CONFIG = 1 << 9;
        /// The back-end channel carries fds.
        const BACKEND_SEND_FD = 1 << 10;
        /// VRING_HOST_NOTIFIER_MSG.
        const HOST_NOTIFIER = 1 << 11;
        /// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// VRING_KICK, and on the back-end channel VRING_CALL and VRING_ERR.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// GET_STATUS and SET_STATUS.
        const STATUS = 1 << 16;
        /// Xen's own region layout.
        const XEN_MMAP = 1 << 17;
        /// Shared objects by UUID.
        const SHARED_OBJECT = 1 << 18;
        /// SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE (rules D1.2, D1.4).
        const DEVICE_STATE = 1 << 19;
        /// GET_VRING_BASE leaves requests marked in the inflight region. Unstable, see [`unstable`].
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Ring addresses are guest-physical.
        const GPA_ADDRESSES = 1 << 21;
        /// SHMEM_MAP, SHMEM_UNMAP and GET_SHMEM_CONFIG.
        const SHMEM = 1 << 22;
        /// [`unstable::GET_VRING_BASE_SKIP_DRAIN`]. Unstable, see [`unstable`].
        const GET_VRING_BASE_SKIP_DRAIN = 1 << 23;
        const _ = !0;
    }
}

/// Declares an open set of message numbers: an unknown message keeps its number.
macro_rules! codes {
    (
        $(#[$meta:meta])*
        $type:ident, $prefix:literal, $unknown:literal { $($(#[$doc:meta])* $name:ident = $code:expr;)* }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(transparent)]
        pub struct $type(pub u32);

        impl $type {
            $($(#[$doc])* pub const $name: $type = $type($code);)*

            /// Every known number.
            pub const KNOWN: &[$type] = &[$($type::$name),*];

            /// The specification's name; `None` for an unknown number.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $($type::$name => Some(concat!($prefix, stringify!($name))),)*
                    _ => None,
                }
            }
        }

        /// The specification's name, or the number.
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.pad(name),
                    None => write!(f, concat!($unknown, " {}"), self.0),
                }
            }
        }
    };
}

codes! {
    /// Number of a front-end message and of its reply.
    FrontendRequest, "", "request" {
        /// Offered feature bits, u64.
        GET_FEATURES = 1;
        /// Acknowledged feature bits, u64.
        SET_FEATURES = 2;
        /// Makes the sender the owner of the session.
        SET_OWNER = 3;
        /// Deprecated (rule R8.1).
        RESET_OWNER = 4;
        /// Memory table: [`MemoryHeader`], regions, one fd per region.
        SET_MEM_TABLE = 5;
        /// Dirty log: [`LogDescription`] and fd.
        SET_LOG_BASE = 6;
        /// Eventfd signalled after logging.
        SET_LOG_FD = 7;
        /// Ring size: [`VringState`].
        SET_VRING_NUM = 8;
        /// Ring addresses: [`VringAddr`].
        SET_VRING_ADDR = 9;
        /// Base of a ring, the position from which it continues: [`VringState`].
        SET_VRING_BASE = 10;
        /// Stops a ring and returns its base: [`VringState`] (rule R3.1).
        GET_VRING_BASE = 11;
        /// Eventfd for new buffers; starts the ring: u64 of [`VRING_IDX_MASK`] and [`VRING_NOFD_MASK`].
        SET_VRING_KICK = 12;
        /// Eventfd for used buffers: u64 as of SET_VRING_KICK.
        SET_VRING_CALL = 13;
        /// Eventfd for errors: u64 as of SET_VRING_KICK.
        SET_VRING_ERR = 14;
        /// Offered protocol features, u64.
        GET_PROTOCOL_FEATURES = 15;
        /// Acknowledged protocol features, u64.
        SET_PROTOCOL_FEATURES = 16;
        /// Maximum number of queues, u64.
        GET_QUEUE_NUM = 17;
        /// Enables or disables a ring: [`VringState`].
        SET_VRING_ENABLE = 18;
        /// Asks a network device to announce a MAC address, u64.
        SEND_RARP = 19;
        /// MTU of a network device, u64.
        NET_SET_MTU = 20;
        /// Socket of the back-end channel.
        SET_BACKEND_REQ_FD = 21;
        /// Translation: [`IotlbMsg`].
        IOTLB_MSG = 22;
        /// Byte order of a legacy ring: [`VringState`].
        SET_VRING_ENDIAN = 23;
        /// Reads configuration space: [`ConfigHeader`] and data.
        GET_CONFIG = 24;
        /// Writes configuration space: [`ConfigHeader`] and data.
        SET_CONFIG = 25;
        /// Opens a session of a crypto device.
        CREATE_CRYPTO_SESSION = 26;
        /// Closes a session of a crypto device.
        CLOSE_CRYPTO_SESSION = 27;
        /// Announces postcopy; the reply carries a userfaultfd.
        POSTCOPY_ADVISE = 28;
        /// Begins postcopy: memory tables that follow are registered with the userfaultfd.
        POSTCOPY_LISTEN = 29;
        /// Ends postcopy.
        POSTCOPY_END = 30;
        /// Asks for an inflight region: [`InflightDescription`].
        GET_INFLIGHT_FD = 31;
        /// Passes an inflight region to the back-end: [`InflightDescription`] and fd.
        SET_INFLIGHT_FD = 32;
        /// Socket of a GPU device.
        GPU_SET_SOCKET = 33;
        /// Disables rings, resets device state, keeps the owner (rule R8.2).
        RESET_DEVICE = 34;
        /// In-band kick: [`VringState`].
        VRING_KICK = 35;
        /// Maximum number of memory slots, u64.
        GET_MAX_MEM_SLOTS = 36;
        /// Adds a region: [`MemRegMsg`] and fd.
        ADD_MEM_REG = 37;
        /// Removes a region: [`MemRegMsg`].
        REM_MEM_REG = 38;
        /// Sets the virtio status byte, u64.
        SET_STATUS = 39;
        /// Reads the virtio status byte, u64.
        GET_STATUS = 40;
        /// Asks for the fd of a [`SharedObject`].
        GET_SHARED_OBJECT = 41;
        /// Begins a transfer of device state: [`DeviceStateTransfer`] and fd.
        SET_DEVICE_STATE_FD = 42;
        /// Result of the last transfer of device state, u64; 0 is success.
        CHECK_DEVICE_STATE = 43;
        /// Sizes of shared memory regions: [`SharedMemoryConfigHeader`] and sizes.
        GET_SHMEM_CONFIG = 44;
        /// Unstable, see [`unstable`].
        GET_VRING_BASE_SKIP_DRAIN = unstable::GET_VRING_BASE_SKIP_DRAIN;
    }
}

codes! {
    /// Number of a back-end message on the back-end channel and of its reply.
    BackendRequest, "BACKEND_", "back-end request" {
        /// Translation missing or access refused: [`IotlbMsg`].
        IOTLB_MSG = 1;
        /// Change of configuration space.
        CONFIG_CHANGE_MSG = 2;
        /// Doorbell to map into the guest: [`VringArea`] and fd.
        VRING_HOST_NOTIFIER_MSG = 3;
        /// In-band notification of used buffers: [`VringState`].
        VRING_CALL = 4;
        /// In-band notification of a ring's error: [`VringState`].
        VRING_ERR = 5;
        /// Publishes a [`SharedObject`].
        SHARED_OBJECT_ADD = 6;
        /// Withdraws a [`SharedObject`].
        SHARED_OBJECT_REMOVE = 7;
        /// Asks for the fd of a [`SharedObject`].
        SHARED_OBJECT_LOOKUP = 8;
        /// Maps an fd into a shared memory region: [`SharedMemoryMap`] and fd.
        SHMEM_MAP = 9;
        /// Unmaps part of a shared memory region: [`SharedMemoryMap`].
        SHMEM_UNMAP = 10;
    }
}

impl Header {
    /// Protocol version, in the flags of every message.
    pub const FLAG_VERSION: u32 = 0x1;
    /// Mask of the version in the flags.
    pub const FLAG_VERSION_MASK: u32 = 0x3;
    /// Flag of a reply.
    pub const FLAG_REPLY: u32 = 0x4;
    /// Flag that asks for a reply to a message that has none of its own (rule F4.1).
    pub const FLAG_NEED_REPLY: u32 = 0x8;
    /// The flags of every reply (rule F2.2).
    pub const REPLY_FLAGS: u32 = Self::FLAG_VERSION | Self::FLAG_REPLY;
}

wire! {
    /// Header of every message (rule F1.1).
    Header, 12 bytes {
        /// A [`FrontendRequest`] or, on the back-end channel, a [`BackendRequest`].
        request: u32 => 0,
        /// Version and the flags reply and need-reply.
        flags: u32 => 4,
        /// Size of the payload that follows, bytes.
        size: u32 => 8,
    }

    /// Reply to [`own::GET_DISK_GENERATION`]: identity of a disk, and state of its contents.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    DiskGeneration, 32 bytes {
        /// Random number of the disk. It never changes.
        identity: u128 => 0,
        /// Random number of the contents, replaced before they change.
        generation: u128 => 16,
    }

    /// Header of SET_MEM_TABLE; the regions follow.
    MemoryHeader, 8 bytes {
        /// Number of valid regions.
        nregions: u32 => 0,
        /// 0.
        padding: u32 => 4,
    }

    /// One region of guest memory.
    MemoryRegion, 32 bytes {
        /// Guest-physical address.
        guest_phys_addr: u64 => 0,
        /// Size, bytes.
        memory_size: u64 => 8,
        /// Address in the front-end.
        userspace_addr: u64 => 16,
        /// Offset of the region in its fd, bytes.
        mmap_offset: u64 => 24,
    }

    /// Payload of ADD_MEM_REG and REM_MEM_REG.
    MemRegMsg, 40 bytes {
        /// 0.
        padding: u64 => 0,
        /// The region.
        region: MemoryRegion => 8,
    }

    /// Payload of SET_LOG_BASE.
    LogDescription, 16 bytes {
        /// Size of the log, bytes.
        mmap_size: u64 => 0,
        /// Offset of the log in its fd, bytes.
        mmap_offset: u64 => 8,
    }

    /// Header of GET_CONFIG and SET_CONFIG; `size` bytes follow.
    ConfigHeader, 12 bytes {
        /// Offset in configuration space, bytes.
        offset: u32 => 0,
        /// Length, bytes.
        size: u32 => 4,
        /// [`CONFIG_TYPE_FRONTEND`] or [`CONFIG_TYPE_MIGRATION`].
        flags: u32 => 8,
    }

    /// Payload of VRING_HOST_NOTIFIER_MSG.
    VringArea, 24 bytes {
        /// Ring index ([`VRING_IDX_MASK`]) and [`VRING_NOFD_MASK`].
        u64: u64 => 0,
        /// Size of the area, bytes.
        size: u64 => 8,
        /// Offset of the area in its fd, bytes.
        offset: u64 => 16,
    }

    /// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD, with the tail padding that peers send (rule F6.3).
    InflightDescription, 24 bytes {
        /// Size of the region, bytes.
        mmap_size: u64 => 0,
        /// Offset of the region in its fd, bytes.
        mmap_offset: u64 => 8,
        /// Number of queues.
        num_queues: u16 => 16,
        /// Number of descriptors of each queue.
        queue_size: u16 => 18,
        /// Unused.
        padding: [u8; 4] => 20,
    }

    /// Payload of SET_DEVICE_STATE_FD.
    DeviceStateTransfer, 8 bytes {
        /// [`DEVICE_STATE_SAVE`] or [`DEVICE_STATE_LOAD`].
        direction: u32 => 0,
        /// [`DEVICE_STATE_PHASE_STOPPED`].
        phase: u32 => 4,
    }

    /// Payload of the shared-object messages.
    SharedObject, 16 bytes {
        /// UUID. Its first three fields are big-endian.
        uuid: [u8; 16] => 0,
    }

    /// Payload of SHMEM_MAP and SHMEM_UNMAP.
    SharedMemoryMap, 40 bytes {
        /// Id of the device's shared memory region.
        shmid: u8 => 0,
        /// 0.
        padding: [u8; 7] => 1,
        /// Offset of the area in its fd, bytes.
        fd_offset: u64 => 8,
        /// Offset of the area in the shared memory region, bytes.
        shm_offset: u64 => 16,
        /// Length of the area, bytes.
        len: u64 => 24,
        /// 0 or [`SHMEM_MAP_RW`].
        flags: u64 => 32,
    }

    /// Header of GET_SHMEM_CONFIG's reply; u64 sizes follow, 0 for regions that do not exist.
    SharedMemoryConfigHeader, 8 bytes {
        /// Number of regions that exist.
        nregions: u32 => 0,
        /// 0.
        padding: u32 => 4,
    }
}

const _: () = {
    // Sizes of libvhost-user's VhostUserMemory and VhostUserConfig and of UML's fixed table: header and what follows
    // it.
    assert!(size_of::<MemoryHeader>() + VHOST_MEMORY_BASELINE_NREGIONS * size_of::<MemoryRegion>() == 264);
    assert!(size_of::<MemoryHeader>() + UML_MEM_TABLE_REGIONS * size_of::<MemoryRegion>() == 72);
    assert!(size_of::<ConfigHeader>() + VHOST_USER_MAX_CONFIG_SIZE == 268);
    assert!(size_of::<FrontendRequest>() == 4 && size_of::<BackendRequest>() == 4);
    assert!(Header::REPLY_FLAGS == 5);
};
