//! The device's side of a split ring: requests out of the avail ring, completions into the used ring and its log.

use std::sync::atomic::{Ordering, fence};

use crate::abi::bit;
use crate::abi::virtio::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, RING_ELEMENTS_OFFSET, RING_FLAGS_OFFSET,
    RING_IDX_OFFSET, USED_F_NO_NOTIFY, UsedElem, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
    avail_event_offset, used_ring_bytes,
};
use crate::memory::Memory;
use crate::ring::chain::copy_table;
use crate::ring::iommu::are_marked;
use crate::ring::{Buffer, Chain, RingBase, RingError, RingIommu, RingLog, passes};

use super::{SplitAreas, SplitLayout, load, store};

const ELEMENT_BYTES: u64 = size_of::<UsedElem>() as u64;

/// A split ring as its device serves it.
///
/// A worker drains it, sleeps, and never misses a request, in this way: `disable_notifications`, [`pop`] until false,
/// `enable_notifications`, and again from the start while that says there is more; then wait for a kick.
/// A completion is [`push`]ed, and a batch of them made visible by [`publish`], which also says whether to notify.
/// The data a request writes must be logged before its completion is published (rule L10.1).
///
/// [`pop`]: SplitDevice::pop
/// [`push`]: SplitDevice::push
/// [`publish`]: SplitDevice::publish
pub struct SplitDevice {
    memory: Memory,
    areas: SplitAreas,
    layout: SplitLayout,
    event_idx: bool,
    indirect: bool,
    /// Avail index of the next request to take.
    next_avail: u16,
    /// The driver's avail index when last looked at.
    seen_avail: u16,
    /// Used index with all that was pushed.
    next_used: u16,
    /// Used index as the driver sees it.
    published: u16,
    /// Used index at the last decision about a notification; none before the first.
    decided: Option<u16>,
    /// What stands in `used.flags` and `avail_event`.
    used_flags: u16,
    avail_event: u16,
    log: Option<RingLog>,
    iommu: Option<RingIommu>,
    /// Copy of an indirect table.
    table: Vec<Desc>,
}

impl SplitDevice {
    /// Takes up a ring at `base`; the used index goes on from what the ring itself says. Nothing is written.
    ///
    /// `features` are the negotiated ones; INDIRECT_DESC and EVENT_IDX matter here.
    ///
    /// # Errors
    /// A size, alignment or address that a split ring can't have.
    pub fn new(memory: &Memory, layout: SplitLayout, features: u64, base: RingBase) -> Result<SplitDevice, RingError> {
        let areas = SplitAreas::new(memory, &layout)?;
        let used = load(&areas.used_idx, Ordering::Relaxed);
        Ok(SplitDevice {
            memory: memory.clone(),
            layout,
            event_idx: features & bit(VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: features & bit(VIRTIO_RING_F_INDIRECT_DESC) != 0,
            next_avail: base.split_index(),
            seen_avail: base.split_index(),
            next_used: used,
            published: used,
            decided: None,
            used_flags: load(&areas.used_flags, Ordering::Relaxed),
            avail_event: load(&areas.avail_event, Ordering::Relaxed),
            areas,
            log: None,
            iommu: None,
            table: Vec::new(),
        })
    }

    /// Goes on in a new memory table, at the addresses it gives the same ring. Indexes and log stay.
    ///
    /// # Errors
    /// As [`SplitDevice::new`], and a size that changed; the ring then stays in the old memory.
    pub fn remap(&mut self, memory: &Memory, layout: SplitLayout) -> Result<(), RingError> {
        if layout.size != self.layout.size {
            return Err(RingError::Size { size: layout.size });
        }
        self.areas = SplitAreas::new(memory, &layout)?;
        self.memory = memory.clone();
        self.layout = layout;
        Ok(())
    }

    /// Sets where writes to the used ring are logged from now on; `None` is nowhere.
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
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(false);
        }
        let head = u16::from_le(self.areas.avail.at(self.next_avail).load(Ordering::Relaxed));
        self.walk(head, chain)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Reads the request `head` again, which was taken before a crash, into `chain` (rule I3.3).
    ///
    /// # Errors
    /// As [`SplitDevice::pop`].
    pub fn resubmit(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        self.walk(head, chain)
    }

    /// Writes the completion of request `head`, of which the device wrote `written` bytes. The driver sees it after
    /// the next [`publish`](SplitDevice::publish).
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) {
        self.areas.set_used(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes the completions pushed so far visible and logs all writes of them; true if the driver is to be notified.
    ///
    /// The log bits follow the writes, so that a harvest that takes a bit away also sees what was written. A crash in
    /// between is made good by [`relog_used`](SplitDevice::relog_used).
    #[inline]
    #[must_use = "the driver may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        store(&self.areas.used_idx, new, Ordering::Release);
        self.published = new;
        let size = u64::from(self.layout.size);
        let (first, count) = (u64::from(old) % size, u64::from(new.wrapping_sub(old)));
        let straight = count.min(size - first);
        self.fence_and_log(&[
            (RING_ELEMENTS_OFFSET + first * ELEMENT_BYTES, straight * ELEMENT_BYTES),
            (RING_ELEMENTS_OFFSET, (count - straight) * ELEMENT_BYTES),
            (RING_IDX_OFFSET, 2),
        ]);
        // Only now, after the fence: a driver that is about to sleep either sees the new index or is seen here.
        if !self.event_idx {
            return load(&self.areas.avail_flags, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0;
        }
        match self.decided.replace(new) {
            Some(old) => passes(load(&self.areas.used_event, Ordering::Relaxed), new, old),
            None => true,
        }
    }

    /// Asks the driver not to kick. It may do so all the same.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx {
            self.set_used_flags(USED_F_NO_NOTIFY);
        }
    }

    /// Asks the driver to kick from now on; true if there are requests already, for which it may not kick.
    #[must_use = "requests that are there already bring no kick"]
    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            self.set_avail_event(self.next_avail);
        } else {
            self.set_used_flags(0);
        }
        // After the fence that followed the write, now or when the same was written before: the driver sees the wish
        // or is seen here.
        load(&self.areas.avail_idx, Ordering::Relaxed) != self.next_avail
    }

    /// Marks the whole used ring in its log: after a crash nobody knows which marks of the last writes were made.
    pub fn relog_used(&self) {
        self.fence_and_log(&[(RING_FLAGS_OFFSET, used_ring_bytes(self.layout.size.into()))]);
    }

    /// Returns true if all that [`relog_used`](SplitDevice::relog_used) marks is marked already.
    pub fn is_used_marked(&self) -> bool {
        let Some(RingLog { log, used_gpa }) = &self.log else { return false };
        are_marked(log, self.iommu.as_ref(), *used_gpa, used_ring_bytes(self.layout.size.into()))
    }

    /// Goes on at `next_avail`, as recovery found it (rule I3.4).
    pub fn set_next_avail(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.seen_avail = next_avail;
    }

    /// Puts requests back that were taken, given by their heads in the order of taking; false if they are not the last
    /// ones taken, in that order: then nothing has changed. The same requests are taken again by the next
    /// [`pop`](SplitDevice::pop)s.
    pub fn put_back(&mut self, mut heads: impl ExactSizeIterator<Item = u16>) -> bool {
        let Some(count) = u16::try_from(heads.len()).ok().filter(|count| *count <= self.layout.size) else {
            return false;
        };
        let first = self.next_avail.wrapping_sub(count);
        let at = |offset: u16| u16::from_le(self.areas.avail.at(first.wrapping_add(offset)).load(Ordering::Relaxed));
        let last = (0..count).all(|offset| heads.next() == Some(at(offset)));
        if last {
            self.next_avail = first;
        }
        last
    }

    /// Avail index of the next request to take.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index as the driver sees it.
    pub fn used_index(&self) -> u16 {
        self.published
    }

    /// The base that GET_VRING_BASE answers (rule R4.1).
    pub fn base(&self) -> RingBase {
        RingBase::split(self.next_avail)
    }

    /// Where the ring lies.
    pub fn layout(&self) -> SplitLayout {
        self.layout
    }

    /// Looks for new requests; false if there are none.
    fn look(&mut self) -> Result<bool, RingError> {
        let (size, next, used) = (self.layout.size, self.next_avail, self.next_used);
        // Pairs with the driver's release: the ring's entries and descriptors are visible after it.
        let index = load(&self.areas.avail_idx, Ordering::Acquire);
        // Counted from the used index: a driver can't have more requests under way than the ring has entries.
        if index.wrapping_sub(next) > size || index.wrapping_sub(used) > size {
            return Err(RingError::AvailIndex { index, next, used, size });
        }
        self.seen_avail = index;
        Ok(index != next)
    }

    #[inline]
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let size = self.layout.size;
        chain.begin(head);
        let mut index = head;
        for _ in 0..size {
            if index >= size {
                return Err(RingError::Descriptor { head, index, size: size.into() });
            }
            let desc = self.areas.desc(index);
            let flags = desc.flags.get();
            if flags & DESC_F_INDIRECT != 0 {
                return self.walk_table(&desc, chain);
            }
            chain.add(buffer(&desc), flags & DESC_F_WRITE != 0)?;
            if flags & DESC_F_NEXT == 0 {
                return chain.finish(self.iommu.as_ref());
            }
            index = desc.next.get();
        }
        Err(RingError::Loop { head })
    }

    /// Walks the indirect table that ends a chain.
    fn walk_table(&mut self, desc: &Desc, chain: &mut Chain) -> Result<(), RingError> {
        let head = chain.head;
        let fault = |fault| Err(RingError::Indirect { head, fault });
        if !self.indirect {
            return fault("without INDIRECT_DESC being negotiated");
        }
        if desc.flags.get() & DESC_F_NEXT != 0 {
            return fault("with NEXT");
        }
        copy_table(&self.memory, self.iommu.as_ref(), head, desc.addr.get(), desc.len.get(), &mut self.table)?;
        let size = self.table.len();
        let mut index = 0;
        for _ in 0..size {
            let Some(desc) = self.table.get(usize::from(index)) else {
                return Err(RingError::Descriptor { head, index, size });
            };
            let flags = desc.flags.get();
            if flags & DESC_F_INDIRECT != 0 {
                return fault("inside an indirect table");
            }
            chain.add(buffer(desc), flags & DESC_F_WRITE != 0)?;
            if flags & DESC_F_NEXT == 0 {
                return chain.finish(self.iommu.as_ref());
            }
            index = desc.next.get();
        }
        Err(RingError::Loop { head })
    }

    fn set_used_flags(&mut self, flags: u16) {
        if self.used_flags != flags {
            store(&self.areas.used_flags, flags, Ordering::Relaxed);
            self.used_flags = flags;
            self.fence_and_log(&[(RING_FLAGS_OFFSET, 2)]);
        }
    }

    fn set_avail_event(&mut self, event: u16) {
        if self.avail_event != event {
            store(&self.areas.avail_event, event, Ordering::Relaxed);
            self.avail_event = event;
            self.fence_and_log(&[(avail_event_offset(self.layout.size.into()), 2)]);
        }
    }

    /// A full fence, and then the marks for writes to the used ring before it, as (offset, length) in bytes.
    #[inline]
    fn fence_and_log(&self, writes: &[(u64, u64)]) {
        let Some(RingLog { log, used_gpa }) = &self.log else { return fence(Ordering::SeqCst) };
        let burst = log.burst();
        for (offset, len) in writes.iter().filter(|(_, len)| *len > 0) {
            // Saturating: an address outside any log is for the log to count (rule L6.2).
            let at = used_gpa.saturating_add(*offset);
            match &self.iommu {
                None => burst.mark(at, *len),
                Some(iommu) => iommu.mark(&burst, at, *len),
            }
        }
    }
}

fn buffer(desc: &Desc) -> Buffer {
    Buffer { gpa: desc.addr.get(), len: desc.len.get() }
}
