//! The device side of a ring of either kind. The work is done in `split` and `packed`.

use std::sync::Arc;

use crate::abi::virtio::{
    PackedEvent, VIRTIO_F_RING_PACKED, VirtioFeatures, avail_ring_bytes, desc_table_bytes, used_ring_bytes,
};
use crate::dirty::Log;
use crate::memory::{GuestAddress, Memory};

use super::{Chain, PackedDevice, PackedLayout, RingBase, RingError, RingIommu, SplitDevice, SplitLayout};

/// Logging of a device's writes to a ring: VHOST_VRING_F_LOG with its `log_guest_addr` (rules L3.3, L4.1, L4.2).
#[derive(Clone, Debug)]
pub struct RingLog {
    /// The dirty log.
    pub log: Arc<Log>,
    /// Guest-physical address at which writes to the used ring are logged. It may differ from the address of the used
    /// ring. On a packed ring, the same for the device event area.
    pub used_gpa: GuestAddress,
}

/// Size and guest-physical addresses of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingLayout {
    /// A split ring.
    Split(SplitLayout),
    /// A packed ring.
    Packed(PackedLayout),
}

impl RingLayout {
    /// The layout of a ring, packed or split by the negotiated `features`. `driver` is the address of the avail ring or
    /// of the driver event area, `device` that of the used ring or of the device event area.
    pub fn new(features: VirtioFeatures, size: u16, [desc, driver, device]: [GuestAddress; 3]) -> RingLayout {
        match features.contains(VIRTIO_F_RING_PACKED) {
            false => RingLayout::Split(SplitLayout { size, desc, avail: driver, used: device }),
            true => RingLayout::Packed(PackedLayout { size, desc, driver, device }),
        }
    }

    /// Sizes of the descriptor area, the driver area and the device area of a ring of `size` descriptors, packed or
    /// split by the negotiated `features`, bytes.
    pub fn area_bytes(features: VirtioFeatures, size: u16) -> [u64; 3] {
        let (size, event) = (u32::from(size), size_of::<PackedEvent>() as u64);
        let [driver, device] = match features.contains(VIRTIO_F_RING_PACKED) {
            false => [avail_ring_bytes(size), used_ring_bytes(size)],
            true => [event, event],
        };
        [desc_table_bytes(size), driver, device]
    }

    /// Guest-physical addresses of the descriptor area, the driver area and the device area.
    pub fn areas(&self) -> [GuestAddress; 3] {
        match self {
            RingLayout::Split(layout) => [layout.desc, layout.avail, layout.used],
            RingLayout::Packed(layout) => [layout.desc, layout.driver, layout.device],
        }
    }

    /// Number of descriptors of the ring.
    pub fn size(&self) -> u16 {
        either!(self, layout => layout.size)
    }
}

/// The device side of a ring. The methods are those of [`SplitDevice`] and [`PackedDevice`] and are documented there.
pub enum DeviceRing {
    /// A split ring.
    Split(SplitDevice),
    /// A packed ring.
    Packed(PackedDevice),
}

impl DeviceRing {
    /// Opens a ring at `base`.
    ///
    /// # Errors
    /// As [`SplitDevice::new`] and [`PackedDevice::new`].
    pub fn new(
        memory: &Memory,
        layout: RingLayout,
        features: VirtioFeatures,
        base: RingBase,
    ) -> Result<DeviceRing, RingError> {
        Ok(match layout {
            RingLayout::Split(layout) => DeviceRing::Split(SplitDevice::new(memory, layout, features, base)?),
            RingLayout::Packed(layout) => DeviceRing::Packed(PackedDevice::new(memory, layout, features, base)?),
        })
    }

    /// Sets the log of further writes to the ring.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        either!(self, ring => ring.set_log(log))
    }

    /// Makes all addresses in the ring and of its log I/O virtual.
    pub fn set_iommu(&mut self, iommu: RingIommu) {
        either!(self, ring => ring.set_iommu(iommu))
    }

    /// Takes the next request into `chain`. Returns false if there is none.
    ///
    /// # Errors
    /// [`RingError`] if the driver has broken the ring.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        either!(self, ring => ring.pop(chain))
    }

    /// Writes the completion of `chain`. `written` is the number of bytes that the device wrote.
    #[inline]
    pub fn push(&mut self, chain: &Chain, written: u32) {
        match self {
            DeviceRing::Split(ring) => ring.push(chain.head, written),
            DeviceRing::Packed(ring) => ring.push(chain.head, chain.slots, written),
        }
    }

    /// Puts the requests that were taken last back, given in the order of taking. Returns false if they are not the
    /// last.
    pub fn put_back(&mut self, chains: &[&Chain]) -> bool {
        match self {
            DeviceRing::Split(ring) => ring.put_back(chains.iter().map(|chain| chain.head)),
            DeviceRing::Packed(ring) => ring.put_back(chains.iter().map(|chain| (chain.head, chain.slots))),
        }
    }

    /// Publishes the completions pushed so far and logs them. Returns true if the driver must be notified.
    #[inline]
    #[must_use = "the driver may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Asks the driver not to kick.
    pub fn disable_notifications(&mut self) {
        either!(self, ring => ring.disable_notifications())
    }

    /// Asks the driver to kick. Returns true if there are requests already.
    #[must_use = "requests that are there already bring no kick"]
    pub fn enable_notifications(&mut self) -> bool {
        either!(self, ring => ring.enable_notifications())
    }

    /// Marks all parts of the ring that the device writes in its log.
    pub fn relog_used(&self) {
        either!(self, ring => ring.relog_used())
    }

    /// Returns true if all parts of the ring that the device writes are marked in its log (rule L15.1).
    pub fn is_used_marked(&self) -> bool {
        either!(self, ring => ring.is_used_marked())
    }

    /// The base for the reply to GET_VRING_BASE (rules R4.1, R4.2).
    pub fn base(&self) -> RingBase {
        either!(self, ring => ring.base())
    }
}
