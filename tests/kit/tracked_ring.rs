//! The device side of a ring, with the part of the inflight region that tracks its requests, if there is one.

use vhost_migrate::inflight::{InflightRegion, PackedInflight, SplitInflight};
use vhost_migrate::ring::{Chain, DeviceRing, PackedDevice, SplitDevice};

pub(crate) enum TrackedRing {
    Split(SplitDevice, Option<SplitInflight>),
    Packed(PackedDevice, Option<PackedInflight>),
}

impl TrackedRing {
    /// Tracks the requests of a ring as those of ring `index` of a region that is fresh.
    pub(crate) fn new(ring: DeviceRing, region: Option<&InflightRegion>, index: u16) -> TrackedRing {
        match ring {
            DeviceRing::Split(ring) => {
                let (size, used) = (ring.layout().size, ring.used_index());
                let tracker = region.map(|region| region.split(index, size, used).unwrap().0);
                TrackedRing::Split(ring, tracker)
            }
            DeviceRing::Packed(ring) => {
                let (size, base) = (ring.layout().size, ring.base());
                let tracker = region.map(|region| region.packed(index, size, base, |at| ring.flags(at)).unwrap().0);
                TrackedRing::Packed(ring, tracker)
            }
        }
    }

    /// Takes the next request into `chain`. Returns its name in the region, which is its head without one.
    #[inline]
    pub(crate) fn take(&mut self, chain: &mut Chain) -> u16 {
        match self {
            TrackedRing::Split(ring, tracker) => {
                assert!(ring.pop(chain).unwrap());
                tracker.iter_mut().for_each(|tracker| tracker.take(chain.head));
                chain.head
            }
            TrackedRing::Packed(ring, tracker) => {
                assert!(ring.pop(chain).unwrap());
                tracker.as_mut().map_or(chain.head, |tracker| tracker.take(ring.descs()).unwrap())
            }
        }
    }

    /// Adds a completed request to the batch that is published next.
    #[inline]
    pub(crate) fn push(&mut self, chain: &Chain, name: u16, written: u32) {
        match self {
            TrackedRing::Split(ring, tracker) => {
                tracker.iter_mut().for_each(|tracker| tracker.stage(name));
                ring.push(chain.head, written);
            }
            TrackedRing::Packed(ring, tracker) => {
                tracker.iter_mut().for_each(|tracker| tracker.stage(name));
                ring.push(chain.head, chain.slots, written);
            }
        }
    }

    /// Publishes the batch, and unmarks its requests. Returns true if the driver must be notified.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        match self {
            TrackedRing::Split(ring, tracker) => {
                let notify = ring.publish();
                tracker.iter_mut().for_each(|tracker| tracker.commit(ring.used_index()));
                notify
            }
            TrackedRing::Packed(ring, tracker) => {
                let notify = ring.publish();
                tracker.iter_mut().for_each(|tracker| tracker.commit());
                notify
            }
        }
    }
}
