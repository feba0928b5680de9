//! The VMM's interface for a device with VIRTIO_F_ACCESS_PLATFORM (rule T1.1).
#![forbid(unsafe_code)]

use crate::memory::{Access, GuestAddress, Iova};

/// The IOMMU of a VMM, queried for translations by the device behind it.
///
/// To remove a mapping, the VMM first makes `translate` stop returning it and then calls
/// [`UserDevice::invalidate`](super::UserDevice::invalidate). It must not hold a lock that
/// [`translate`](Iommu::translate) needs during that call.
pub trait Iommu: Send + Sync {
    /// Returns the mapping that contains `iova`, for an access by the device. `None` denies the access, which breaks
    /// the ring that needed it. A mapping with less permission than `access` is sent to the device, which denies the
    /// access itself.
    ///
    /// The device's threads call it for each address without a known translation, and during a reconnection. It must
    /// not call the device or wait for a thread that does.
    fn translate(&self, iova: Iova, access: Access) -> Option<Mapping>;
}

/// A range of I/O virtual addresses that is contiguous in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First I/O virtual address. The range contains the requested address.
    pub iova: Iova,
    /// Size in bytes.
    pub size: u64,
    /// Guest-physical address of the first byte.
    pub gpa: GuestAddress,
    /// Accesses that the device may make.
    pub permission: Access,
}
