//! A ring as its worker uses it: with the part of the inflight region that tracks its requests, if there is one.

#![forbid(unsafe_code)]

use crate::abi::virtio::VirtioFeatures;
use crate::backend::{BackendError, Request};
use crate::inflight::{InflightRegion, PackedInflight, PackedRecovery, SplitInflight, SplitRecovery};
use crate::memory::Memory;
use crate::ring::{Chain, PackedDevice, RingBase, RingError, RingIommu, RingLayout, RingLog, SplitDevice};

/// The device side of a ring. With an inflight region, its requests are tracked in the layout of its kind.
pub(super) enum TrackedRing {
    Split(SplitDevice, Option<Tracker<SplitInflight, SplitRecovery>>),
    Packed(PackedDevice, Option<Tracker<PackedInflight, PackedRecovery>>),
}

/// The part of the inflight region that belongs to one ring.
pub(super) struct Tracker<T, R> {
    inflight: T,
    /// The requests that a previous back-end left in flight, in submission order.
    found: R,
    /// The number of them that were resubmitted.
    resubmitted: usize,
}

impl<T, R> Tracker<T, R> {
    fn new((inflight, found): (T, R)) -> Option<Tracker<T, R>> {
        Some(Tracker { inflight, found, resubmitted: 0 })
    }
}

/// Evaluates an expression for the ring of either kind.
macro_rules! either {
    ($tracked:expr, $ring:ident => $result:expr) => {
        match $tracked {
            TrackedRing::Split($ring, _) => $result,
            TrackedRing::Packed($ring, _) => $result,
        }
    };
}

impl TrackedRing {
    /// Opens a ring at `base`, without tracking.
    ///
    /// # Errors
    /// As [`SplitDevice::new`] and [`PackedDevice::new`].
    pub(super) fn new(
        memory: &Memory,
        layout: RingLayout,
        features: VirtioFeatures,
        base: RingBase,
    ) -> Result<TrackedRing, RingError> {
        Ok(match layout {
            RingLayout::Split(layout) => TrackedRing::Split(SplitDevice::new(memory, layout, features, base)?, None),
            RingLayout::Packed(layout) => TrackedRing::Packed(PackedDevice::new(memory, layout, features, base)?, None),
        })
    }

    /// Starts tracking as ring `index`. A region that was in use determines where the ring resumes (rules I3, I4). The base
    /// takes precedence if nothing is in flight and the driver has started again; for a ring that has already run on
    /// this connection, not for the `first` time, that is any other base (rule I12).
    ///
    /// # Errors
    /// A region that does not fit the ring, or has invalid contents (rule I1.2).
    pub(super) fn track(&mut self, region: &InflightRegion, index: u16, first: bool) -> Result<(), BackendError> {
        match self {
            TrackedRing::Split(ring, tracker) => {
                let (inflight, found) = region.split(index, ring.layout().size, ring.used_index())?;
                if let Some(next) = found.next_avail {
                    ring.set_next_avail(next);
                }
                *tracker = Tracker::new((inflight, found));
            }
            TrackedRing::Packed(ring, tracker) => {
                let (size, given) = (ring.layout().size, ring.base());
                let flags_of = |position| ring.flags(position);
                let (mut inflight, mut found) = region.packed(index, size, given, flags_of)?;
                let moved = found.base.is_some_and(|base| base != given) && found.resubmit.is_empty();
                if moved && (!first || ring.deduced_position() == Some(ring.used_position())) {
                    inflight.reset();
                    (inflight, found) = region.packed(index, size, given, flags_of)?;
                }
                if let Some(base) = found.base {
                    let (avail, used) = base.packed_positions();
                    let broken = |source| BackendError::BrokenRing { index, source };
                    ring.set_positions(avail, used).map_err(broken)?;
                }
                *tracker = Tracker::new((inflight, found));
            }
        }
        Ok(())
    }

    /// Returns true if requests are tracked.
    pub(super) fn is_tracked(&self) -> bool {
        matches!(self, TrackedRing::Split(_, Some(_)) | TrackedRing::Packed(_, Some(_)))
    }

    /// Returns true if a back-end has served this ring with this region before.
    pub(super) fn was_used(&self) -> bool {
        match self {
            TrackedRing::Split(_, tracker) => tracker.as_ref().is_some_and(|it| it.found.next_avail.is_some()),
            TrackedRing::Packed(_, tracker) => tracker.as_ref().is_some_and(|it| it.found.base.is_some()),
        }
    }

    /// Returns the number of requests of a previous back-end that are still to be resubmitted.
    pub(super) fn to_resubmit(&self) -> usize {
        match self {
            TrackedRing::Split(_, tracker) => tracker.as_ref().map_or(0, |it| it.found.resubmit.len() - it.resubmitted),
            TrackedRing::Packed(_, tracker) => {
                tracker.as_ref().map_or(0, |it| it.found.resubmit.len() - it.resubmitted)
            }
        }
    }

    /// Reverts unpublished writes of the previous back-end to a packed ring (rule I4.6). Marks the ring as written: a
    /// previous back-end may have been killed between a write to the ring and its mark.
    pub(super) fn repair(&mut self) {
        if let TrackedRing::Packed(ring, Some(tracker)) = self {
            ring.restore_flags(&tracker.found.stale);
        }
        either!(self, ring => ring.relog_used());
    }

    /// Loads the next request of a previous back-end into `chain`. Returns its slot, or `None` after the last.
    ///
    /// # Errors
    /// The driver has changed the request to something invalid, or it can't be translated yet. It stays the next.
    pub(super) fn resubmit(&mut self, chain: &mut Chain) -> Result<Option<u16>, RingError> {
        match self {
            TrackedRing::Split(ring, Some(tracker)) => {
                let Some(&head) = tracker.found.resubmit.get(tracker.resubmitted) else { return Ok(None) };
                ring.resubmit(head, chain)?;
                tracker.resubmitted += 1;
                Ok(Some(head))
            }
            TrackedRing::Packed(ring, Some(tracker)) => {
                let Some(request) = tracker.found.resubmit.get(tracker.resubmitted) else { return Ok(None) };
                ring.resubmit(&request.descs, chain)?;
                tracker.resubmitted += 1;
                Ok(Some(request.entry))
            }
            TrackedRing::Split(_, None) | TrackedRing::Packed(_, None) => Ok(None),
        }
    }

    /// Takes the next request into `chain`. Returns false if there is none.
    ///
    /// # Errors
    /// [`RingError`] if the driver has broken the ring.
    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        either!(self, ring => ring.pop(chain))
    }

    /// Marks the request that was popped last as in flight. Returns its slot, which is its head without tracking; `None`
    /// for more requests than the ring can hold.
    #[inline]
    pub(super) fn take(&mut self, head: u16) -> Option<u16> {
        match self {
            TrackedRing::Split(_, Some(tracker)) => tracker.inflight.take(head),
            TrackedRing::Packed(ring, Some(tracker)) => return tracker.inflight.take(ring.descs()),
            TrackedRing::Split(_, None) | TrackedRing::Packed(_, None) => {}
        }
        Some(head)
    }

    /// Adds a completed request to the batch that is published next.
    #[inline]
    pub(super) fn push(&mut self, request: &Request) {
        let (chain, slot, written) = (request.chain(), request.inflight_slot, request.used_len());
        match self {
            TrackedRing::Split(ring, tracker) => {
                tracker.iter_mut().for_each(|tracker| tracker.inflight.stage(slot));
                ring.push(chain.head, written);
            }
            TrackedRing::Packed(ring, tracker) => {
                tracker.iter_mut().for_each(|tracker| tracker.inflight.stage(slot));
                ring.push(chain.head, chain.slots, written);
            }
        }
    }

    /// Publishes the batch, and unmarks its requests. Returns true if the driver must be notified.
    #[inline]
    #[must_use = "the driver may be waiting for a notification"]
    pub(super) fn publish(&mut self) -> bool {
        match self {
            TrackedRing::Split(ring, tracker) => {
                let notify = ring.publish();
                tracker.iter_mut().for_each(|tracker| tracker.inflight.commit(ring.used_index()));
                notify
            }
            TrackedRing::Packed(ring, tracker) => {
                let notify = ring.publish();
                tracker.iter_mut().for_each(|tracker| tracker.inflight.commit());
                notify
            }
        }
    }

    /// Puts the requests that were taken last back, given in the order of taking, and unmarks them. Returns false if they
    /// are not the last.
    pub(super) fn put_back(&mut self, requests: &[Request]) -> bool {
        let chains = requests.iter().map(Request::chain);
        let are_last = match self {
            TrackedRing::Split(ring, _) => ring.put_back(chains.map(|chain| chain.head)),
            TrackedRing::Packed(ring, _) => ring.put_back(chains.map(|chain| (chain.head, chain.slots))),
        };
        for request in requests.iter().rev().filter(|_| are_last) {
            match self {
                TrackedRing::Split(_, Some(tracker)) => tracker.inflight.put_back(request.inflight_slot),
                TrackedRing::Packed(_, Some(tracker)) => tracker.inflight.put_back(request.inflight_slot),
                TrackedRing::Split(_, None) | TrackedRing::Packed(_, None) => {}
            }
        }
        are_last
    }

    pub(super) fn set_log(&mut self, log: Option<RingLog>) {
        either!(self, ring => ring.set_log(log))
    }

    pub(super) fn set_iommu(&mut self, iommu: RingIommu) {
        either!(self, ring => ring.set_iommu(iommu))
    }

    pub(super) fn disable_notifications(&mut self) {
        either!(self, ring => ring.disable_notifications())
    }

    /// Asks the driver to kick. Returns true if there are requests already.
    #[must_use = "requests that are there already bring no kick"]
    pub(super) fn enable_notifications(&mut self) -> bool {
        either!(self, ring => ring.enable_notifications())
    }

    /// Returns true if all parts of the ring that the device writes are marked in its log (rule L15.1).
    pub(super) fn is_used_marked(&self) -> bool {
        either!(self, ring => ring.is_used_marked())
    }

    pub(super) fn base(&self) -> RingBase {
        either!(self, ring => ring.base())
    }
}
