//! Memory of the shadow rings. It is a region of the inner device's memory table, after guest memory, which the driver
//! cannot address.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::eventfd;
use super::queue::{ShadowQueue, ShadowRing};
use crate::abi::virtio::{VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures};
use crate::frontend::{FrontendError, RingSetup};
use crate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region};
use crate::ring::{DriverRing, RingBase, RingLayout};

/// Maximum number of entries of a shadow ring.
const MAX_SIZE: u16 = 1024;
/// Bytes of the indirect table of a ring, for 1024 descriptors.
const TABLE_BYTES: u64 = 16 << 10;
/// Alignment of the region, bytes. It suits huge pages and IOMMUs.
const ALIGNMENT: u64 = 2 << 20;
/// Alignment of ring areas, bytes.
const AREA_ALIGNMENT: u64 = 64;

/// The memory of the shadow rings of a device.
pub(super) struct ShadowMemory {
    /// Guest memory and the region of the shadow rings.
    memory: Memory,
    region: Arc<Region>,
}

/// A shadow ring that is ready to be started.
pub(super) struct NewRing {
    pub(super) setup: RingSetup,
    pub(super) queue: ShadowQueue,
    pub(super) ring: Arc<ShadowRing>,
}

impl ShadowMemory {
    /// Creates the memory of `queues` shadow rings, after `guest` memory.
    pub(super) fn new(guest: &Memory, queues: u16) -> Result<ShadowMemory, FrontendError> {
        let too_high =
            |_| FrontendError::InvalidRing { index: 0, reason: "no address is left above guest memory".into() };
        let end = guest.end().0.checked_next_multiple_of(ALIGNMENT).ok_or(()).map_err(too_high)?;
        let region = Arc::new(Region::create(GuestAddress(end), stride() * u64::from(queues.max(1)))?);
        let memory = Memory::new(guest.regions().iter().cloned().chain([region.clone()]))?;
        Ok(ShadowMemory { memory, region })
    }

    /// Returns the memory table of the inner device.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Creates an empty shadow ring with the features `features`, for ring `index` of the driver with `size` entries.
    pub(super) fn ring(
        &self,
        index: u16,
        size: u16,
        features: VirtioFeatures,
        driver: &RingSetup,
    ) -> Result<NewRing, FrontendError> {
        let invalid = |reason: String| FrontendError::InvalidRing { index, reason };
        let size = size.checked_next_power_of_two().filter(|size| *size <= MAX_SIZE && *size > 0);
        let size = size.ok_or_else(|| invalid(format!("it has {} entries, at most {MAX_SIZE} work", driver.size)))?;
        let mut at = self.region.gpa().unchecked_add(stride() * u64::from(index));
        let mut area = |bytes: u64| {
            let area = at;
            at = at.unchecked_add(bytes.next_multiple_of(AREA_ALIGNMENT));
            area
        };
        let areas = RingLayout::area_bytes(features, size).map(&mut area);
        let table = features.contains(VIRTIO_RING_F_INDIRECT_DESC).then(|| area(TABLE_BYTES));
        let layout = RingLayout::new(features, size, areas);
        let driver_ring = DriverRing::new(&self.memory, layout, features);
        let driver_ring = driver_ring.map_err(|error| invalid(error.to_string()))?;
        let ring = Arc::new(ShadowRing { kick: eventfd()?, call: eventfd()?, stopped: AtomicBool::new(false) });
        let [desc, avail, used] = areas;
        let setup = RingSetup {
            size,
            desc,
            avail,
            used,
            kick: ring.kick.clone(),
            call: ring.call.clone(),
            error: driver.error.clone(),
            base: RingBase::initial(features),
        };
        Ok(NewRing { setup, queue: ShadowQueue::new(driver_ring, size, table, ring.clone()), ring })
    }
}

/// Bytes of the region for each ring.
fn stride() -> u64 {
    let areas = RingLayout::area_bytes(VirtioFeatures::empty(), MAX_SIZE);
    let bytes = areas.iter().map(|bytes| bytes.next_multiple_of(AREA_ALIGNMENT)).sum::<u64>() + TABLE_BYTES;
    bytes.next_multiple_of(LOG_PAGE)
}
