//! The device's side of a ring, split or packed.

use std::sync::Arc;

use crate::abi::bit;
use crate::abi::virtio::{PackedEvent, VIRTIO_F_RING_PACKED, avail_ring_bytes, desc_table_bytes, used_ring_bytes};
use crate::dirty::Log;
use crate::memory::Memory;

use super::{Chain, PackedDevice, PackedLayout, RingBase, RingError, RingIommu, SplitDevice, SplitLayout};

/// Where a device's writes to a ring are logged: VHOST_VRING_F_LOG with its `log_guest_addr` (rules L3.3, L4.1, L4.2).
#[derive(Clone, Debug)]
pub struct RingLog {
    /// The dirty log.
    pub log: Arc<Log>,
    /// Guest-physical address that the used ring's bytes are logged at, which need not be where it is mapped; of a packed
    /// ring, the device event area's.
    pub used_gpa: u64,
}

/// Size and guest-physical addresses of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum RingLayout {
    /// Of a split ring.
    Split(SplitLayout),
    /// Of a packed ring.
    Packed(PackedLayout),
}

impl RingLayout {
    /// A ring of the kind that the negotiated `features` say. `driver` is the avail ring or the driver's event area,
    /// `device` the used ring or the device's event area.
    pub fn new(features: u64, size: u16, desc: u64, driver: u64, device: u64) -> RingLayout {
        match features & bit(VIRTIO_F_RING_PACKED) {
            0 => RingLayout::Split(SplitLayout { size, desc, avail: driver, used: device }),
            _ => RingLayout::Packed(PackedLayout { size, desc, driver, device }),
        }
    }

    /// Bytes of the descriptors, of the driver's area and of the device's, of a ring of `size` descriptors and of the kind
    /// that the negotiated `features` say.
    pub fn area_bytes(features: u64, size: u16) -> [u64; 3] {
        let (size, event) = (u32::from(size), size_of::<PackedEvent>() as u64);
        let [driver, device] = match features & bit(VIRTIO_F_RING_PACKED) {
            0 => [avail_ring_bytes(size), used_ring_bytes(size)],
            _ => [event, event],
        };
        [desc_table_bytes(size), driver, device]
    }

    /// Guest-physical addresses of the descriptors, of the driver's area and of the device's.
    pub fn areas(&self) -> [u64; 3] {
        match self {
            RingLayout::Split(layout) => [layout.desc, layout.avail, layout.used],
            RingLayout::Packed(layout) => [layout.desc, layout.driver, layout.device],
        }
    }

    /// Descriptors of the ring.
    pub fn size(&self) -> u16 {
        match self {
            RingLayout::Split(layout) => layout.size,
            RingLayout::Packed(layout) => layout.size,
        }
    }
}

/// A ring as its device serves it: [`SplitDevice`] or [`PackedDevice`], which say what the functions do.
pub enum DeviceRing {
    /// A split ring.
    Split(SplitDevice),
    /// A packed ring.
    Packed(PackedDevice),
}

impl DeviceRing {
    /// Takes up a ring at `base`.
    ///
    /// # Errors
    /// As [`SplitDevice::new`] and [`PackedDevice::new`].
    pub fn new(memory: &Memory, layout: RingLayout, features: u64, base: RingBase) -> Result<DeviceRing, RingError> {
        Ok(match layout {
            RingLayout::Split(layout) => DeviceRing::Split(SplitDevice::new(memory, layout, features, base)?),
            RingLayout::Packed(layout) => DeviceRing::Packed(PackedDevice::new(memory, layout, features, base)?),
        })
    }

    /// Sets where writes to the ring are logged from now on.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        match self {
            DeviceRing::Split(ring) => ring.set_log(log),
            DeviceRing::Packed(ring) => ring.set_log(log),
        }
    }

    /// Says that all addresses in the ring are I/O virtual, as its own and those of its log are. It was taken up in the
    /// window's memory.
    pub fn set_iommu(&mut self, iommu: RingIommu) {
        match self {
            DeviceRing::Split(ring) => ring.set_iommu(iommu),
            DeviceRing::Packed(ring) => ring.set_iommu(iommu),
        }
    }

    /// Takes the next request into `chain`; false if there is none.
    ///
    /// # Errors
    /// The driver broke the ring.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        match self {
            DeviceRing::Split(ring) => ring.pop(chain),
            DeviceRing::Packed(ring) => ring.pop(chain),
        }
    }

    /// Writes the completion of `chain`, of which the device wrote `written` bytes.
    #[inline]
    pub fn push(&mut self, chain: &Chain, written: u32) {
        match self {
            DeviceRing::Split(ring) => ring.push(chain.head, written),
            DeviceRing::Packed(ring) => ring.push(chain.head, chain.slots, written),
        }
    }

    /// Gives back requests, the last that were taken, in the order in which they were taken; false if they are not.
    pub fn put_back(&mut self, chains: &[&Chain]) -> bool {
        match self {
            DeviceRing::Split(ring) => ring.put_back(chains.iter().map(|chain| chain.head)),
            DeviceRing::Packed(ring) => ring.put_back(chains.iter().map(|chain| (chain.head, chain.slots))),
        }
    }

    /// Makes completions visible and logs them; true if the driver is to be notified.
    #[inline]
    #[must_use = "the driver may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        match self {
            DeviceRing::Split(ring) => ring.publish(),
            DeviceRing::Packed(ring) => ring.publish(),
        }
    }

    /// Asks the driver not to kick.
    pub fn disable_notifications(&mut self) {
        match self {
            DeviceRing::Split(ring) => ring.disable_notifications(),
            DeviceRing::Packed(ring) => ring.disable_notifications(),
        }
    }

    /// Asks the driver to kick; true if there are requests already.
    #[must_use = "requests that are there already bring no kick"]
    pub fn enable_notifications(&mut self) -> bool {
        match self {
            DeviceRing::Split(ring) => ring.enable_notifications(),
            DeviceRing::Packed(ring) => ring.enable_notifications(),
        }
    }

    /// Marks all that the device may write of the ring in its log.
    pub fn relog_used(&self) {
        match self {
            DeviceRing::Split(ring) => ring.relog_used(),
            DeviceRing::Packed(ring) => ring.relog_used(),
        }
    }

    /// Returns true if all that the device may write of the ring is marked in its log (rule L15.1).
    pub fn is_used_marked(&self) -> bool {
        match self {
            DeviceRing::Split(ring) => ring.is_used_marked(),
            DeviceRing::Packed(ring) => ring.is_used_marked(),
        }
    }

    /// The base that GET_VRING_BASE answers (rules R4.1, R4.2).
    pub fn base(&self) -> RingBase {
        match self {
            DeviceRing::Split(ring) => ring.base(),
            DeviceRing::Packed(ring) => ring.base(),
        }
    }
}
