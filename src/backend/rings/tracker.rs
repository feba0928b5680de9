//! The inflight region of one ring as its worker uses it: split or packed layout.

#![forbid(unsafe_code)]

use crate::backend::BackendError;
use crate::inflight::{InflightRegion, PackedInflight, PackedRecovery, SplitInflight, SplitRecovery};
use crate::ring::{Chain, DeviceRing, RingError};

/// The part of the inflight region that belongs to one ring.
pub(super) enum InflightTracker {
    Split(SplitInflight),
    Packed(PackedInflight),
}

/// Requests that a previous back-end left in flight, in submission order.
pub(super) enum Recovered {
    Split(SplitRecovery),
    Packed(PackedRecovery),
}

impl InflightTracker {
    /// Starts tracking ring `index`. A region that was in use determines where the ring resumes (rules I3, I4). The base
    /// takes precedence if nothing is in flight and the driver has started again; for a ring that has already run on
    /// this connection, not for the `first` time, that is any other base (rule I12).
    ///
    /// # Errors
    /// A region that does not fit the ring, or has invalid contents (rule I1.2).
    pub(super) fn start(
        region: &InflightRegion,
        index: u16,
        ring: &mut DeviceRing,
        first: bool,
    ) -> Result<(InflightTracker, Recovered), BackendError> {
        let broken = |source| BackendError::BrokenRing { index, source };
        match ring {
            DeviceRing::Split(ring) => {
                let (tracker, recovery) = region.split(index, ring.layout().size, ring.used_index())?;
                if let Some(next) = recovery.next_avail {
                    ring.set_next_avail(next);
                }
                Ok((InflightTracker::Split(tracker), Recovered::Split(recovery)))
            }
            DeviceRing::Packed(ring) => {
                let (size, given) = (ring.layout().size, ring.base());
                let flags_of = |position| ring.flags(position);
                let (mut tracker, mut recovery) = region.packed(index, size, given, flags_of)?;
                let moved = recovery.base.is_some_and(|base| base != given) && recovery.resubmit.is_empty();
                if moved && (!first || ring.deduced_position() == Some(ring.used_position())) {
                    tracker.reset();
                    (tracker, recovery) = region.packed(index, size, given, flags_of)?;
                }
                if let Some(base) = recovery.base {
                    let (avail, used) = base.packed_positions();
                    ring.set_positions(avail, used).map_err(broken)?;
                }
                Ok((InflightTracker::Packed(tracker), Recovered::Packed(recovery)))
            }
        }
    }

    /// Marks the request that was popped last as in flight. Returns its slot; `None` for more requests than the ring
    /// can hold.
    pub(super) fn take(&mut self, ring: &DeviceRing, head: u16) -> Option<u16> {
        match (self, ring) {
            (InflightTracker::Split(tracker), _) => {
                tracker.take(head);
                Some(head)
            }
            (InflightTracker::Packed(tracker), DeviceRing::Packed(ring)) => tracker.take(ring.descs()),
            (InflightTracker::Packed(_), DeviceRing::Split(_)) => None,
        }
    }

    /// Adds a request to the batch that is published next.
    pub(super) fn stage(&mut self, name: u16) {
        match self {
            InflightTracker::Split(tracker) => tracker.stage(name),
            InflightTracker::Packed(tracker) => tracker.stage(name),
        }
    }

    /// Unmarks the request that was marked last.
    pub(super) fn put_back(&mut self, name: u16) {
        match self {
            InflightTracker::Split(tracker) => tracker.put_back(name),
            InflightTracker::Packed(tracker) => tracker.put_back(name),
        }
    }

    /// Unmarks the published batch.
    pub(super) fn commit(&mut self, ring: &DeviceRing) {
        match (self, ring) {
            (InflightTracker::Split(tracker), DeviceRing::Split(ring)) => tracker.commit(ring.used_index()),
            (InflightTracker::Packed(tracker), _) => tracker.commit(),
            (InflightTracker::Split(_), DeviceRing::Packed(_)) => {}
        }
    }
}

impl Recovered {
    /// Returns true if a back-end has served this ring with this region before.
    pub(super) fn was_used(&self) -> bool {
        match self {
            Recovered::Split(recovery) => recovery.next_avail.is_some(),
            Recovered::Packed(recovery) => recovery.base.is_some(),
        }
    }

    /// Returns the number of requests to resubmit.
    pub(super) fn len(&self) -> usize {
        match self {
            Recovered::Split(recovery) => recovery.resubmit.len(),
            Recovered::Packed(recovery) => recovery.resubmit.len(),
        }
    }

    /// Reverts unpublished writes of the previous back-end to a packed ring (rule I4.6).
    pub(super) fn repair(&self, ring: &mut DeviceRing) {
        if let (Recovered::Packed(recovery), DeviceRing::Packed(ring)) = (self, ring) {
            ring.restore_flags(&recovery.stale);
        }
    }

    /// Loads the request with this number into `chain`. Returns its slot.
    ///
    /// # Errors
    /// The driver has changed the request to something invalid.
    pub(super) fn resubmit(&self, number: usize, ring: &mut DeviceRing, chain: &mut Chain) -> Result<u16, RingError> {
        match (self, ring) {
            (Recovered::Split(recovery), DeviceRing::Split(ring)) => {
                let head = recovery.resubmit.get(number).copied().unwrap_or_default();
                ring.resubmit(head, chain).map(|()| head)
            }
            (Recovered::Packed(recovery), DeviceRing::Packed(ring)) => {
                let request = recovery.resubmit.get(number);
                let (entry, descs) = request.map_or((0, &[][..]), |request| (request.entry, &request.descs));
                ring.resubmit(descs, chain).map(|()| entry)
            }
            _ => Ok(0),
        }
    }
}
