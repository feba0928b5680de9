//! Which requests of a running ring are in flight, noted in the inflight region in the way of its kind of ring.

#![forbid(unsafe_code)]

use super::BackendError;
use crate::inflight::{InflightRegion, PackedInflight, PackedRecovery, SplitInflight, SplitRecovery};
use crate::ring::{Chain, DeviceRing, RingError};

/// The part of the inflight region that belongs to one ring.
pub(super) enum InflightTracker {
    Split(SplitInflight),
    Packed(PackedInflight),
}

/// What a predecessor left to be done.
pub(super) enum Recovered {
    Split(SplitRecovery),
    Packed(PackedRecovery),
}

impl InflightTracker {
    /// Starts tracking ring `index`, which goes on where the region says if that has been in use (rules I3.4, I4.5). If its
    /// driver has started afresh and nothing is in flight, the base counts; of a ring that has run on this connection, not
    /// for the `first` time, any base does (rule I12.1).
    ///
    /// # Errors
    /// A region that is not for this ring, or has contents that can't be true.
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
                if moved && (!first || ring.standing_at() == Some(ring.used_position())) {
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

    /// Notes the request that was popped last; what names it here. `None` for more requests than the ring can have.
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

    /// Puts the request that is named `name` here into the batch that is published next.
    pub(super) fn stage(&mut self, name: u16) {
        match self {
            InflightTracker::Split(tracker) => tracker.stage(name),
            InflightTracker::Packed(tracker) => tracker.stage(name),
        }
    }

    /// Notes that a request, the last one taken, is as if never taken.
    pub(super) fn put_back(&mut self, name: u16) {
        match self {
            InflightTracker::Split(tracker) => tracker.put_back(name),
            InflightTracker::Packed(tracker) => tracker.put_back(name),
        }
    }

    /// Notes that the batch is published.
    pub(super) fn commit(&mut self, ring: &DeviceRing) {
        match (self, ring) {
            (InflightTracker::Split(tracker), DeviceRing::Split(ring)) => tracker.commit(ring.used_index()),
            (InflightTracker::Packed(tracker), _) => tracker.commit(),
            (InflightTracker::Split(_), DeviceRing::Packed(_)) => {}
        }
    }
}

impl Recovered {
    /// Whether somebody served this ring before and noted it here.
    pub(super) fn was_used(&self) -> bool {
        match self {
            Recovered::Split(recovery) => recovery.next_avail.is_some(),
            Recovered::Packed(recovery) => recovery.base.is_some(),
        }
    }

    /// How many requests are to be served again.
    pub(super) fn len(&self) -> usize {
        match self {
            Recovered::Split(recovery) => recovery.resubmit.len(),
            Recovered::Packed(recovery) => recovery.resubmit.len(),
        }
    }

    /// Undoes what a predecessor wrote to the ring and did not publish.
    pub(super) fn repair(&self, ring: &mut DeviceRing) {
        if let (Recovered::Packed(recovery), DeviceRing::Packed(ring)) = (self, ring) {
            ring.restore_flags(&recovery.stale);
        }
    }

    /// Makes the `number`th request to be served again in `chain`; what names it in the tracker.
    ///
    /// # Errors
    /// The driver changed it to what no request can be.
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
