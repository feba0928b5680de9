//! What a device behind an IOMMU must be told: the VMM's side of VIRTIO_F_ACCESS_PLATFORM (rule T1.1).
#![forbid(unsafe_code)]

use crate::memory::Access;

/// The IOMMU of a VMM, as the device behind it asks for translations.
///
/// A VMM that takes a translation away changes what this says first, and then calls
/// [`UserDevice::invalidate`](super::UserDevice::invalidate), with nothing held that [`translate`](Iommu::translate) waits
/// for.
pub trait Iommu: Send + Sync {
    /// Where the I/O virtual address `iova` lies, for a device that wants to access it; `None` if it lies nowhere, which
    /// breaks the ring that asked. A mapping that permits less is told to the device too, which then refuses by itself.
    ///
    /// It is called by a thread of the device, for each address that the device does not know, and while a device
    /// reconnects. It must not call the device, nor wait for anybody who does.
    fn translate(&self, iova: u64, access: Access) -> Option<Mapping>;
}

/// A range of I/O virtual addresses that lies in guest memory in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The first I/O virtual address. The range contains the one that was asked for.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// What the device may do there.
    pub permission: Access,
}
