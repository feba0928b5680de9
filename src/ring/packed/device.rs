//! The device's side of a packed ring: requests out of the descriptor ring, completions into it, and their log.

use std::sync::atomic::{Ordering, fence};

use crate::abi::bit;
use crate::abi::virtio::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, PACKED_EVENT_FLAG_DISABLE, PackedDesc, VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC, desc_table_bytes,
};
use crate::memory::Memory;
use crate::ring::chain::copy_table;
use crate::ring::iommu::are_marked;
use crate::ring::{Buffer, Chain, RingBase, RingError, RingIommu, RingLog};

use super::{
    EVENT_ALIGN, NotifyCondition, PackedAreas, PackedLayout, Position, PositionBits, deduce, event_at, event_bits,
    half_bits, is_avail, notify_condition, passes_position,
};

const DESC_BYTES: u64 = size_of::<PackedDesc>() as u64;
/// A used descriptor's bytes begin here: the address before them stays.
const HALF: u64 = 8;

/// A packed ring as its device serves it.
///
/// It is used as a [`SplitDevice`](crate::ring::SplitDevice) is: drained, slept on, completed and published in the same
/// way. The data a request writes must be logged before its completion is published (rule L10.1). With IN_ORDER
/// negotiated, whoever holds the ring pushes completions in the order in which the requests were taken.
pub struct PackedDevice {
    memory: Memory,
    areas: PackedAreas,
    layout: PackedLayout,
    event_idx: bool,
    indirect: bool,
    /// Of the next request to take.
    avail: PositionBits,
    /// Of the next completion, with all that was pushed.
    next_used: PositionBits,
    /// Of the next completion as the driver sees it.
    published: PositionBits,
    /// What was pushed since: place and second half of each used descriptor.
    staged: Vec<(u16, u64)>,
    /// Whether a notification was decided on before.
    decided: bool,
    /// What stands in the device's event area.
    event: u32,
    log: Option<RingLog>,
    iommu: Option<RingIommu>,
    /// The ring's descriptors of the last request.
    descs: Vec<PackedDesc>,
    /// Copy of an indirect table.
    table: Vec<PackedDesc>,
}

impl PackedDevice {
    /// Takes up a ring at `base`. Nothing is written.
    ///
    /// `features` are the negotiated ones; INDIRECT_DESC and EVENT_IDX matter here.
    ///
    /// # Errors
    /// A size, alignment or address that a packed ring can't have; a base that is not in it (rule R4.5).
    pub fn new(
        memory: &Memory,
        layout: PackedLayout,
        features: u64,
        base: RingBase,
    ) -> Result<PackedDevice, RingError> {
        let areas = PackedAreas::new(memory, &layout)?;
        // Some front-ends begin every ring at 0, which in a packed one is the start of its second round (rule R4.4).
        let base = if base.bits() == 0 && areas.is_untouched(layout.size) { RingBase::PACKED_START } else { base };
        let (avail, used) = (base.packed_avail(), base.packed_used());
        check(avail, used, layout.size)?;
        Ok(PackedDevice {
            memory: memory.clone(),
            event: u32::from_le(areas.device.nth(0).load(Ordering::Relaxed)),
            areas,
            layout,
            event_idx: features & bit(VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: features & bit(VIRTIO_RING_F_INDIRECT_DESC) != 0,
            avail: avail.into(),
            next_used: used.into(),
            published: used.into(),
            staged: Vec::new(),
            decided: false,
            log: None,
            iommu: None,
            descs: Vec::new(),
            table: Vec::new(),
        })
    }

    /// Sets where writes are logged from now on; `None` is nowhere. The descriptor ring's are logged where it lies, the
    /// device event area's at `used_gpa` (rules L4.1, L4.2).
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
    }

    /// Says that all addresses in the ring are I/O virtual, as its own and those of its log are. It was taken up in the
    /// window's memory.
    pub fn set_iommu(&mut self, iommu: RingIommu) {
        self.iommu = Some(iommu);
    }

    /// Takes the next request into `chain`; false if there is none.
    ///
    /// # Errors
    /// The driver broke the ring. Nothing was taken; this ring can't go on, all others can.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let (size, first) = (self.layout.size, self.avail.get());
        // Pairs with the driver's release: the rest of the chain, which it wrote before, is visible after it.
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
        // Each descriptor of the ring would be in flight at once and there is still one more.
        Err(RingError::AvailDescriptors { index: first.index, in_flight, size })
    }

    /// The ring's descriptors of the request that was taken last, for the inflight region: completions overwrite them
    /// in the ring (rule I4.1).
    pub fn descs(&self) -> &[PackedDesc] {
        &self.descs
    }

    /// Makes a request that was taken before a crash from copies of its descriptors in the ring; their NEXT flags don't
    /// matter. An indirect table is read again.
    ///
    /// # Errors
    /// As [`PackedDevice::pop`], and a number of descriptors that no request of this ring can have (rule I1.2).
    pub fn resubmit(&mut self, descs: &[PackedDesc], chain: &mut Chain) -> Result<(), RingError> {
        let size = self.layout.size;
        match descs.last() {
            Some(last) if descs.len() <= size.into() => chain.begin(last.id.get()),
            _ => return Err(RingError::Copies { count: descs.len(), size }),
        }
        collect(&self.memory, self.iommu.as_ref(), self.indirect, descs, &mut self.table, chain)
    }

    /// Writes the completion of the request with buffer id `id`, which takes `slots` descriptors, and of which the device
    /// wrote `written` bytes. The driver sees it after the next [`publish`](PackedDevice::publish).
    #[inline]
    pub fn push(&mut self, id: u16, slots: u16, written: u32) {
        let here = self.next_used.get();
        let flags = here.used_flags() | if written > 0 { DESC_F_WRITE } else { 0 };
        self.staged.push((here.index, half_bits(written, id, flags)));
        self.next_used = here.after(slots, self.layout.size).into();
    }

    /// Makes the completions pushed so far visible and logs all writes of them; true if the driver is to be notified.
    ///
    /// The driver looks at one descriptor at a time: while the first is not there, it sees none of the batch. The log
    /// bits follow the writes, so that a harvest that takes a bit away also sees what was written. A crash in between is
    /// made good by [`relog_used`](PackedDevice::relog_used).
    #[inline]
    #[must_use = "the driver may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        let Some((&(first, rest), others)) = self.staged.split_first() else { return false };
        for (index, rest) in others {
            self.areas.set_half(*index, *rest, Ordering::Relaxed);
        }
        self.areas.set_half(first, rest, Ordering::Release);
        let desc = self.layout.desc;
        // Saturating: an address outside any log is for the log to count (rule L6.2).
        let place = |(index, _): &(u16, u64)| desc.saturating_add(u64::from(*index) * DESC_BYTES + HALF);
        self.fence_and_log(self.staged.iter().map(|staged| (place(staged), DESC_BYTES - HALF)));
        self.staged.clear();
        let size = self.layout.size;
        let new = self.next_used.get();
        let old = std::mem::replace(&mut self.published, self.next_used).get();
        // Only now, after the fence: a driver that is about to sleep either sees the first descriptor or is seen here.
        let decided = std::mem::replace(&mut self.decided, true);
        match notify_condition(&self.areas.driver, self.event_idx) {
            NotifyCondition::Nothing => false,
            NotifyCondition::All => true,
            NotifyCondition::At(event) => {
                !decided || passes_position(event, new, old.until(new, size).unwrap_or(size), size)
            }
        }
    }

    /// Asks the driver not to kick. It may do so all the same.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx {
            self.set_event(event_bits(0, PACKED_EVENT_FLAG_DISABLE));
        }
    }

    /// Asks the driver to kick from now on; true if there are requests already, for which it may not kick.
    #[must_use = "requests that are there already bring no kick"]
    pub fn enable_notifications(&mut self) -> bool {
        self.set_event(event_at(self.avail.get(), self.event_idx));
        // After the fence that followed the write, now or when the same was written before: the driver sees the wish
        // or is seen here.
        self.areas.is_avail(self.avail.get())
    }

    /// Marks the whole descriptor ring and the device event area in the log: after a crash nobody knows which marks of
    /// the last writes were made.
    pub fn relog_used(&self) {
        let ring = (self.layout.desc, desc_table_bytes(self.layout.size.into()));
        self.fence_and_log([ring].into_iter().chain(self.event_area()));
    }

    /// Returns true if all that [`relog_used`](PackedDevice::relog_used) marks is marked already.
    pub fn is_used_marked(&self) -> bool {
        let Some(RingLog { log, .. }) = &self.log else { return false };
        let ring = (self.layout.desc, desc_table_bytes(self.layout.size.into()));
        let mut parts = [ring].into_iter().chain(self.event_area());
        parts.all(|(at, len)| are_marked(log, self.iommu.as_ref(), at, len))
    }

    /// Goes on at these positions, as recovery found them (rule I4.5). What was pushed and not published is forgotten.
    ///
    /// # Errors
    /// Positions that can't be those of this ring (rule R4.5); nothing was changed.
    pub fn set_positions(&mut self, avail: Position, used: Position) -> Result<(), RingError> {
        check(avail, used, self.layout.size)?;
        (self.avail, self.next_used, self.published, self.decided) = (avail.into(), used.into(), used.into(), false);
        self.staged.clear();
        Ok(())
    }

    /// Returns the position at which the ring stands, as its descriptors tell (rules I12.2, I12.3); `None` if they do not tell. The
    /// ring has to be drained, and its device has used every request by a descriptor of its own, not as IN_ORDER allows.
    pub fn standing_at(&self) -> Option<Position> {
        deduce::used_position(&self.areas.descs(self.layout.size))
    }

    /// Goes on where the descriptors tell, if that is elsewhere (rule I12.2): for a front-end that may have lost the base.
    /// Returns true if it is.
    ///
    /// # Errors
    /// [`RingError::StaleBase`] if the descriptors contradict the base and do not tell the position.
    pub fn find_position(&mut self) -> Result<bool, RingError> {
        let used = self.published.get();
        let descs = self.areas.descs(self.layout.size);
        match deduce::used_position(&descs) {
            // A ring that no driver has written to tells nothing.
            Some(position) if position != used && !descs.iter().all(deduce::is_blank) => {
                self.set_positions(position, position).map(|()| true)
            }
            None if deduce::contradicts(&descs, used) => {
                Err(RingError::StaleBase { index: used.index, wrap: used.wrap })
            }
            _ => Ok(false),
        }
    }

    /// Puts requests back that were taken, given by buffer id and number of descriptors, in the order of taking; false if
    /// they are not the last ones taken, in that order, or have been written over in the ring by completions of others:
    /// then nothing has changed. The same requests are taken again by the next [`pop`](PackedDevice::pop)s.
    pub fn put_back(&mut self, requests: impl Iterator<Item = (u16, u16)> + Clone) -> bool {
        let size = self.layout.size;
        let total: u32 = requests.clone().map(|(_, slots)| u32::from(slots)).sum();
        let Some(total) = u16::try_from(total).ok().filter(|total| *total <= self.in_flight()) else { return false };
        let first = self.avail.get().before(total, size);
        let mut at = first;
        // What is between the used position and the avail one was not written since it was taken.
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

    /// Where the next request is taken.
    pub fn avail_position(&self) -> Position {
        self.avail.get()
    }

    /// Where the driver looks for the next completion.
    pub fn used_position(&self) -> Position {
        self.published.get()
    }

    /// The flags of the descriptor at `index`: they tell recovery whether the last batch was published (rule I4.3).
    pub fn flags(&self, index: u16) -> u16 {
        if index < self.layout.size { self.areas.half(index, Ordering::Relaxed).flags.get() } else { 0 }
    }

    /// Stores flags of descriptors, as (index, flags): undoes what a predecessor wrote of a batch that it was killed over
    /// (rule I4.6). What was there is in the log by [`relog_used`](PackedDevice::relog_used).
    pub fn restore_flags(&mut self, stale: &[(u16, u16)]) {
        for &(index, flags) in stale.iter().filter(|(index, _)| *index < self.layout.size) {
            let PackedDesc { len, id, .. } = self.areas.half(index, Ordering::Relaxed);
            self.areas.set_half(index, half_bits(len.get(), id.get(), flags), Ordering::Release);
        }
    }

    /// The base that GET_VRING_BASE answers (rule R4.2). It has to be that of a drained ring: of others, a used position 0
    /// with wrap counter 0 gets lost on the way (see [`RingBase::packed_used`]).
    pub fn base(&self) -> RingBase {
        let (avail, used) = (self.avail.get(), self.published.get());
        RingBase::packed(avail.index, avail.wrap, used.index, used.wrap)
    }

    /// Where the ring lies.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Descriptors of requests that were taken and not completed.
    fn in_flight(&self) -> u16 {
        // Pushing what was never taken would make it `None`: then nothing more is taken.
        self.next_used.get().until(self.avail.get(), self.layout.size).unwrap_or(self.layout.size)
    }

    fn set_event(&mut self, event: u32) {
        if self.event != event {
            self.areas.device.nth(0).store(event.to_le(), Ordering::Relaxed);
            self.event = event;
            self.fence_and_log(self.event_area());
        }
    }

    /// The device event area in the log, if there is one, as (address, length) in bytes.
    fn event_area(&self) -> impl Iterator<Item = (u64, u64)> {
        self.log.iter().map(|log| (log.used_gpa, EVENT_ALIGN))
    }

    /// A full fence, and then the marks for writes before it, as (address, length) in bytes.
    #[inline]
    fn fence_and_log(&self, writes: impl Iterator<Item = (u64, u64)>) {
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

/// Checks that both positions are in a ring of `size`, and avail at most a round ahead of used.
fn check(avail: Position, used: Position, size: u16) -> Result<(), RingError> {
    if avail.index >= size || used.index >= size || used.until(avail, size).is_none() {
        return Err(RingError::Positions { avail, used, size });
    }
    Ok(())
}

/// Puts the buffers of `descs`, a whole request, into `chain`, and names it.
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
        chain.add(Buffer { gpa: desc.addr.get(), len: desc.len.get() }, is(desc, DESC_F_WRITE))
    };
    for desc in descs {
        if !is(desc, DESC_F_INDIRECT) {
            add(chain, desc)?;
            continue;
        }
        let head = chain.head;
        if !indirect {
            return Err(RingError::Indirect { head, fault: "without INDIRECT_DESC being negotiated" });
        }
        if descs.len() > 1 {
            return Err(RingError::Indirect { head, fault: "in a chain with others" });
        }
        copy_table(memory, iommu, head, desc.addr.get(), desc.len.get(), table)?;
        // Of the flags in the table only WRITE means anything (virtio 1.2, "Indirect Flag: Scatter-Gather Support").
        table.iter().try_for_each(|desc| add(chain, desc))?;
    }
    chain.finish(iommu)?;
    chain.slots = descs.len() as u16;
    if let Some(last) = descs.last() {
        chain.head = last.id.get();
    }
    Ok(())
}
