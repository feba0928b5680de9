//! The device side of a packed ring: it takes requests from the descriptor ring and writes completions to it and to its
//! log.

use std::sync::atomic::{Ordering, fence};

use crate::abi::virtio::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, PACKED_EVENT_FLAG_DISABLE, PackedDesc, VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures, desc_table_bytes,
};
use crate::memory::{GuestAddress, Memory};
use crate::ring::chain::copy_table;
use crate::ring::iommu::are_marked;
use crate::ring::{Buffer, Chain, RingBase, RingError, RingIommu, RingLog};

use super::{
    EVENT_ALIGN, NotifyCondition, PackedAreas, PackedLayout, Position, PositionBits, deduce, event_at, event_bits,
    half_bits, is_avail, notify_condition, passes_position,
};

const DESC_BYTES: u64 = size_of::<PackedDesc>() as u64;
/// Offset of the second half of a descriptor, bytes. A used descriptor is written from there; the address before it
/// stays.
const HALF: u64 = 8;

/// The device side of a packed ring.
///
/// It is used like a [`SplitDevice`](crate::ring::SplitDevice): requests are taken, waited for, completed and published
/// in the same way. Data that a request writes must be logged before its completion is published (rule L10.1). With
/// IN_ORDER negotiated, completions must be pushed in the order in which the requests were taken.
pub struct PackedDevice {
    memory: Memory,
    areas: PackedAreas,
    layout: PackedLayout,
    event_idx: bool,
    indirect: bool,
    /// Position of the next request to take.
    avail: PositionBits,
    /// Position of the next completion, after all pushed ones.
    next_used: PositionBits,
    /// Position of the next completion, after all published ones.
    published: PositionBits,
    /// Completions that are not published: index and second half of each used descriptor.
    staged: Vec<(u16, u64)>,
    /// True after the first check for a notification.
    notify_checked: bool,
    /// Value of the device event area.
    event: u32,
    log: Option<RingLog>,
    iommu: Option<RingIommu>,
    /// The ring's descriptors of the last request.
    descs: Vec<PackedDesc>,
    /// Copy of an indirect table.
    table: Vec<PackedDesc>,
}

impl PackedDevice {
    /// Opens a ring at `base`. Nothing is written.
    ///
    /// `features` are the negotiated ones, of which INDIRECT_DESC and EVENT_IDX are used.
    ///
    /// # Errors
    /// [`RingError::PackedSize`], [`RingError::Misaligned`] or [`RingError::Outside`] for an invalid layout,
    /// [`RingError::Positions`] for a base outside the ring (rule R4.5).
    pub fn new(
        memory: &Memory,
        layout: PackedLayout,
        features: VirtioFeatures,
        base: RingBase,
    ) -> Result<PackedDevice, RingError> {
        let areas = PackedAreas::new(memory, &layout)?;
        // Some front-ends begin every ring with base 0, which is the start of the second round of a packed ring
        // (rule R4.4).
        let base = if base.bits() == 0 && areas.is_unused(layout.size) { RingBase::PACKED_START } else { base };
        let (avail, used) = (base.packed_avail(), base.packed_used());
        check(avail, used, layout.size)?;
        Ok(PackedDevice {
            memory: memory.clone(),
            event: u32::from_le(areas.device.nth(0).load(Ordering::Relaxed)),
            areas,
            layout,
            event_idx: features.contains(VIRTIO_RING_F_EVENT_IDX),
            indirect: features.contains(VIRTIO_RING_F_INDIRECT_DESC),
            avail: avail.into(),
            next_used: used.into(),
            published: used.into(),
            staged: Vec::new(),
            notify_checked: false,
            log: None,
            iommu: None,
            descs: Vec::new(),
            table: Vec::new(),
        })
    }

    /// Sets the log of further writes; `None` for no log. Writes to the descriptor ring are logged at its own address,
    /// writes to the device event area at `used_gpa` (rules L4.1, L4.2).
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
    }

    /// Makes all addresses in the ring and of its log I/O virtual. The ring must have been opened in the memory of the
    /// IOMMU's window.
    pub fn set_iommu(&mut self, iommu: RingIommu) {
        self.iommu = Some(iommu);
    }

    /// Takes the next request into `chain`. Returns false if there is none.
    ///
    /// # Errors
    /// [`RingError`] if the driver has broken the ring. Nothing is taken then, and only this ring must be stopped.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let (size, first) = (self.layout.size, self.avail.get());
        // Pairs with the driver's release: the rest of the chain was written before, and is visible after it.
        let mut desc = self.areas.desc(first.index, Ordering::Acquire);
        if !is_avail(&desc, first) {
            return Ok(false);
        }
        let in_flight = self.in_flight();
        self.descs.clear();
        let mut next = first;
        for _ in in_flight..size {
            next = next.after(1, size);
            self.descs.push(desc);
            if desc.flags.get() & DESC_F_NEXT == 0 {
                chain.begin(first.index);
                collect(&self.memory, self.iommu.as_ref(), self.indirect, &self.descs, &mut self.table, chain)?;
                self.avail = next.into();
                return Ok(true);
            }
            desc = self.areas.desc(next.index, Ordering::Relaxed);
        }
        // All descriptors of the ring would be in flight, and the chain still continues.
        Err(RingError::AvailDescriptors { index: first.index, in_flight, size })
    }

    /// The descriptors of the request that was taken last, for the inflight region: completions overwrite them in the
    /// ring (rule I4.1).
    pub fn descs(&self) -> &[PackedDesc] {
        &self.descs
    }

    /// Reads a request that was taken before a crash into `chain`. `descs` are copies of its descriptors, whose NEXT
    /// flags are ignored. An indirect table is read again.
    ///
    /// # Errors
    /// As [`PackedDevice::pop`], and [`RingError::Copies`] for a number of descriptors that is invalid for this ring
    /// (rule I1.2).
    pub fn resubmit(&mut self, descs: &[PackedDesc], chain: &mut Chain) -> Result<(), RingError> {
        let size = self.layout.size;
        match descs.last() {
            Some(last) if descs.len() <= size.into() => chain.begin(last.id.get()),
            _ => return Err(RingError::Copies { count: descs.len(), size }),
        }
        collect(&self.memory, self.iommu.as_ref(), self.indirect, descs, &mut self.table, chain)
    }

    /// Writes the completion of the request with buffer id `id`, which takes `slots` descriptors. `written` is the
    /// number of bytes that the device wrote. The driver sees it after the next [`publish`](PackedDevice::publish).
    #[inline]
    pub fn push(&mut self, id: u16, slots: u16, written: u32) {
        let here = self.next_used.get();
        let flags = here.used_flags() | if written > 0 { DESC_F_WRITE } else { 0 };
        self.staged.push((here.index, half_bits(written, id, flags)));
        self.next_used = here.after(slots, self.layout.size).into();
    }

    /// Publishes the completions pushed so far and logs these writes. Returns true if the driver must be notified.
    ///
    /// The driver reads one descriptor after the other, so the first descriptor, which is written last, publishes the
    /// whole batch. The log bits are set after the writes, so that a harvest that clears a bit also sees the data.
    /// After a crash between the two, [`relog_used`](PackedDevice::relog_used) sets the missing bits.
    #[inline]
    #[must_use = "the driver may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        let Some((&(first, rest), others)) = self.staged.split_first() else { return false };
        for (index, rest) in others {
            self.areas.set_half(*index, *rest, Ordering::Relaxed);
        }
        self.areas.set_half(first, rest, Ordering::Release);
        let desc = self.layout.desc;
        // Saturating: the log counts pages outside it (rule L6.2).
        let address =
            |(index, _): &(u16, u64)| GuestAddress(desc.0.saturating_add(u64::from(*index) * DESC_BYTES + HALF));
        self.fence_and_log(self.staged.iter().map(|staged| (address(staged), DESC_BYTES - HALF)));
        self.staged.clear();
        let size = self.layout.size;
        let new = self.next_used.get();
        let old = std::mem::replace(&mut self.published, self.next_used).get();
        // After the fence: a driver that is about to wait either sees the first descriptor, or its request for a
        // notification is seen here.
        let notify_checked = std::mem::replace(&mut self.notify_checked, true);
        match notify_condition(&self.areas.driver, self.event_idx) {
            NotifyCondition::Nothing => false,
            NotifyCondition::All => true,
            NotifyCondition::At(event) => {
                !notify_checked || passes_position(event, new, old.until(new, size).unwrap_or(size), size)
            }
        }
    }

    /// Asks the driver not to kick. The driver may ignore it.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx {
            self.set_event(event_bits(0, PACKED_EVENT_FLAG_DISABLE));
        }
    }

    /// Asks the driver to kick. Returns true if there are requests already, for which the driver may not kick.
    #[must_use = "requests that are there already bring no kick"]
    pub fn enable_notifications(&mut self) -> bool {
        self.set_event(event_at(self.avail.get(), self.event_idx));
        // After the fence that followed this write, or an earlier write of the same value: the driver sees the request
        // for a kick, or its descriptor is seen here.
        self.areas.is_avail(self.avail.get())
    }

    /// Marks the whole descriptor ring and the device event area in the log. After a crash it is not known which of the
    /// last writes were marked.
    pub fn relog_used(&self) {
        let ring = (self.layout.desc, desc_table_bytes(self.layout.size.into()));
        self.fence_and_log([ring].into_iter().chain(self.event_area()));
    }

    /// Returns true if all pages that [`relog_used`](PackedDevice::relog_used) marks are marked already.
    pub fn is_used_marked(&self) -> bool {
        let Some(RingLog { log, .. }) = &self.log else { return false };
        let ring = (self.layout.desc, desc_table_bytes(self.layout.size.into()));
        let mut parts = [ring].into_iter().chain(self.event_area());
        parts.all(|(at, len)| are_marked(log, self.iommu.as_ref(), at, len))
    }

    /// Continues at these positions, the result of recovery (rule I4.5). Completions that are not published are
    /// dropped.
    ///
    /// # Errors
    /// [`RingError::Positions`] for positions that are invalid for this ring (rule R4.5); nothing was changed.
    pub fn set_positions(&mut self, avail: Position, used: Position) -> Result<(), RingError> {
        check(avail, used, self.layout.size)?;
        (self.avail, self.next_used, self.published, self.notify_checked) =
            (avail.into(), used.into(), used.into(), false);
        self.staged.clear();
        Ok(())
    }

    /// The position of the ring as deduced from its descriptors (rules I12.2, I12.3); `None` if it cannot be deduced.
    /// The ring must be drained, and its device must have written a used descriptor for every request, which IN_ORDER
    /// does not require.
    pub fn deduced_position(&self) -> Option<Position> {
        deduce::used_position(&self.areas.descs(self.layout.size))
    }

    /// Continues at the position deduced from the descriptors if it differs from the current one (rule I12.2), for a
    /// front-end that may have lost the base. Returns true if it differs.
    ///
    /// # Errors
    /// [`RingError::StaleBase`] if the descriptors contradict the base and the position cannot be deduced.
    pub fn find_position(&mut self) -> Result<bool, RingError> {
        let used = self.published.get();
        let descs = self.areas.descs(self.layout.size);
        match deduce::used_position(&descs) {
            // Nothing is deduced from a ring that no driver has written.
            Some(position) if position != used && !descs.iter().all(deduce::is_blank) => {
                self.set_positions(position, position).map(|()| true)
            }
            None if deduce::contradicts(&descs, used) => {
                Err(RingError::StaleBase { index: used.index, wrap: used.wrap })
            }
            _ => Ok(false),
        }
    }

    /// Puts the requests that were taken last back, given by buffer id and number of descriptors in the order of
    /// taking. The next calls of [`pop`](PackedDevice::pop) take them again.
    ///
    /// Returns false and changes nothing if these are not the requests that were taken last, in that order, or if
    /// completions of other requests have overwritten them in the ring.
    pub fn put_back(&mut self, requests: impl Iterator<Item = (u16, u16)> + Clone) -> bool {
        let size = self.layout.size;
        let total: u32 = requests.clone().map(|(_, slots)| u32::from(slots)).sum();
        let Some(total) = u16::try_from(total).ok().filter(|total| *total <= self.in_flight()) else { return false };
        let first = self.avail.get().before(total, size);
        let mut at = first;
        // Descriptors between the used and the avail position are as they were when they were taken.
        let last = requests.into_iter().all(|(id, slots)| {
            (1..=slots).all(|count| {
                let (desc, here) = (self.areas.half(at.index, Ordering::Relaxed), at);
                at = at.after(1, size);
                let ends = desc.flags.get() & DESC_F_NEXT == 0;
                is_avail(&desc, here) && ends == (count == slots) && (!ends || desc.id.get() == id)
            })
        });
        if last {
            self.avail = first.into();
        }
        last
    }

    /// The position of the next request to take.
    pub fn avail_position(&self) -> Position {
        self.avail.get()
    }

    /// The position at which the driver expects the next completion.
    pub fn used_position(&self) -> Position {
        self.published.get()
    }

    /// The flags of the descriptor at `index`. They show recovery if the last batch was published (rule I4.3).
    pub fn flags(&self, index: u16) -> u16 {
        if index < self.layout.size { self.areas.half(index, Ordering::Relaxed).flags.get() } else { 0 }
    }

    /// Stores flags of descriptors, given as (index, flags). It reverts the part of a batch that a predecessor had
    /// written when it was killed (rule I4.6). These writes are marked by [`relog_used`](PackedDevice::relog_used).
    pub fn restore_flags(&mut self, stale: &[(u16, u16)]) {
        for &(index, flags) in stale.iter().filter(|(index, _)| *index < self.layout.size) {
            let PackedDesc { len, id, .. } = self.areas.half(index, Ordering::Relaxed);
            self.areas.set_half(index, half_bits(len.get(), id.get(), flags), Ordering::Release);
        }
    }

    /// The base for the reply to GET_VRING_BASE (rule R4.2). The ring must be drained: a used position 0 with wrap
    /// counter 0, which differs from the avail position, would be misread by the receiver (see
    /// [`RingBase::packed_used`]).
    pub fn base(&self) -> RingBase {
        let (avail, used) = (self.avail.get(), self.published.get());
        RingBase::packed(avail.index, avail.wrap, used.index, used.wrap)
    }

    /// The layout of the ring.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Number of descriptors of requests that were taken and not completed.
    fn in_flight(&self) -> u16 {
        // `None` if more was pushed than taken; with the full size nothing more is taken then.
        self.next_used.get().until(self.avail.get(), self.layout.size).unwrap_or(self.layout.size)
    }

    fn set_event(&mut self, event: u32) {
        if self.event != event {
            self.areas.device.nth(0).store(event.to_le(), Ordering::Relaxed);
            self.event = event;
            self.fence_and_log(self.event_area());
        }
    }

    /// Address and length in bytes of the device event area in the log, if there is a log.
    fn event_area(&self) -> impl Iterator<Item = (GuestAddress, u64)> {
        self.log.iter().map(|log| (log.used_gpa, EVENT_ALIGN))
    }

    /// Executes a full fence and then marks earlier writes, given as (address, length) in bytes.
    #[inline]
    fn fence_and_log(&self, writes: impl Iterator<Item = (GuestAddress, u64)>) {
        let Some(RingLog { log, .. }) = &self.log else { return fence(Ordering::SeqCst) };
        let burst = log.burst();
        for (at, len) in writes {
            match &self.iommu {
                None => burst.mark(at, len),
                Some(iommu) => iommu.mark(&burst, at, len),
            }
        }
    }
}

/// Checks that both positions are in a ring of `size` descriptors, and that avail is at most a round ahead of used.
fn check(avail: Position, used: Position, size: u16) -> Result<(), RingError> {
    if avail.index >= size || used.index >= size || used.until(avail, size).is_none() {
        return Err(RingError::Positions { avail, used, size });
    }
    Ok(())
}

/// Reads the buffers of `descs`, a whole request, into `chain`, and sets its name.
fn collect(
    memory: &Memory,
    iommu: Option<&RingIommu>,
    indirect: bool,
    descs: &[PackedDesc],
    table: &mut Vec<PackedDesc>,
    chain: &mut Chain,
) -> Result<(), RingError> {
    let is = |desc: &PackedDesc, flag: u16| desc.flags.get() & flag != 0;
    let add = |chain: &mut Chain, desc: &PackedDesc| {
        chain.add(Buffer { gpa: GuestAddress(desc.addr.get()), len: desc.len.get() }, is(desc, DESC_F_WRITE))
    };
    for desc in descs {
        if !is(desc, DESC_F_INDIRECT) {
            add(chain, desc)?;
            continue;
        }
        let head = chain.head;
        if !indirect {
            return Err(RingError::Indirect { head, fault: "although INDIRECT_DESC is not negotiated" });
        }
        if descs.len() > 1 {
            return Err(RingError::Indirect { head, fault: "in a chain with other descriptors" });
        }
        copy_table(memory, iommu, head, GuestAddress(desc.addr.get()), desc.len.get(), table)?;
        // Only the WRITE flag is used in the table (virtio 1.2, "Indirect Flag: Scatter-Gather Support").
        table.iter().try_for_each(|desc| add(chain, desc))?;
    }
    chain.finish(iommu)?;
    chain.slots = descs.len() as u16;
    if let Some(last) = descs.last() {
        chain.head = last.id.get();
    }
    Ok(())
}
