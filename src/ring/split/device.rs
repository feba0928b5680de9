//! The device side of a split ring: it takes requests from the avail ring and writes completions to the used ring and
//! its log.

use std::sync::atomic::{Ordering, fence};

use crate::abi::virtio::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, RING_ELEMENTS_OFFSET, RING_FLAGS_OFFSET,
    RING_IDX_OFFSET, USED_F_NO_NOTIFY, UsedElem, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
    avail_event_offset, used_ring_bytes,
};
use crate::memory::{GuestAddress, Memory};
use crate::ring::chain::copy_table;
use crate::ring::iommu::are_marked;
use crate::ring::{Buffer, Chain, RingBase, RingError, RingIommu, RingLog, passes};

use super::{SplitAreas, SplitLayout, load, store};

const ELEMENT_BYTES: u64 = size_of::<UsedElem>() as u64;

/// The device side of a split ring.
///
/// A worker misses no request if it works in this order: `disable_notifications`; [`pop`] until it returns false;
/// `enable_notifications`, and from the start again if that returns true; then wait for a kick. It [`push`]es
/// completions and makes a batch of them visible with [`publish`], which also returns if the driver must be notified.
/// Data that a request writes must be logged before its completion is published (rule L10.1).
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
    /// The driver's avail index when it was last read.
    seen_avail: u16,
    /// Used index after all pushed completions.
    next_used: u16,
    /// Used index that the driver sees.
    published: u16,
    /// Used index at the last check for a notification; `None` before the first.
    notify_checked: Option<u16>,
    /// Value of `used.flags` in the ring.
    used_flags: u16,
    /// Value of `avail_event` in the ring.
    avail_event: u16,
    log: Option<RingLog>,
    iommu: Option<RingIommu>,
    /// Copy of an indirect table.
    table: Vec<Desc>,
}

impl SplitDevice {
    /// Opens a ring at `base`. The used index is read from the ring. Nothing is written.
    ///
    /// `features` are the negotiated ones, of which INDIRECT_DESC and EVENT_IDX are used.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Misaligned`] or [`RingError::Outside`] for an invalid layout.
    pub fn new(
        memory: &Memory,
        layout: SplitLayout,
        features: VirtioFeatures,
        base: RingBase,
    ) -> Result<SplitDevice, RingError> {
        let areas = SplitAreas::new(memory, &layout)?;
        let used = load(&areas.used_idx, Ordering::Relaxed);
        Ok(SplitDevice {
            memory: memory.clone(),
            layout,
            event_idx: features.contains(VIRTIO_RING_F_EVENT_IDX),
            indirect: features.contains(VIRTIO_RING_F_INDIRECT_DESC),
            next_avail: base.split_index(),
            seen_avail: base.split_index(),
            next_used: used,
            published: used,
            notify_checked: None,
            used_flags: load(&areas.used_flags, Ordering::Relaxed),
            avail_event: load(&areas.avail_event, Ordering::Relaxed),
            areas,
            log: None,
            iommu: None,
            table: Vec::new(),
        })
    }

    /// Continues in a new memory table, in which the same ring has the addresses `layout`. Indexes and log stay.
    ///
    /// # Errors
    /// As [`SplitDevice::new`], and [`RingError::Size`] if the size has changed. The ring stays in the old memory then.
    pub fn remap(&mut self, memory: &Memory, layout: SplitLayout) -> Result<(), RingError> {
        if layout.size != self.layout.size {
            return Err(RingError::Size { size: layout.size });
        }
        self.areas = SplitAreas::new(memory, &layout)?;
        self.memory = memory.clone();
        self.layout = layout;
        Ok(())
    }

    /// Sets the log of further writes to the used ring; `None` for no log.
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
        if self.next_avail == self.seen_avail && !self.read_avail_index()? {
            return Ok(false);
        }
        let head = u16::from_le(self.areas.avail.at(self.next_avail).load(Ordering::Relaxed));
        self.read_chain(head, chain)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Reads request `head`, which was taken before a crash, into `chain` (rule I3.3).
    ///
    /// # Errors
    /// As [`SplitDevice::pop`].
    pub fn resubmit(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        self.read_chain(head, chain)
    }

    /// Writes the completion of request `head`. `written` is the number of bytes that the device wrote. The driver sees
    /// it after the next [`publish`](SplitDevice::publish).
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) {
        self.areas.set_used(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Publishes the completions pushed so far and logs these writes. Returns true if the driver must be notified.
    ///
    /// The log bits are set after the writes, so that a harvest that clears a bit also sees the data. After a crash
    /// between the two, [`relog_used`](SplitDevice::relog_used) sets the missing bits.
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
        // After the fence: a driver that is about to wait either sees the new index, or its request for a notification
        // is seen here.
        if !self.event_idx {
            return load(&self.areas.avail_flags, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0;
        }
        match self.notify_checked.replace(new) {
            Some(old) => passes(load(&self.areas.used_event, Ordering::Relaxed), new, old),
            None => true,
        }
    }

    /// Asks the driver not to kick. The driver may ignore it.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx {
            self.set_used_flags(USED_F_NO_NOTIFY);
        }
    }

    /// Asks the driver to kick. Returns true if there are requests already, for which the driver may not kick.
    #[must_use = "requests that are there already bring no kick"]
    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            self.set_avail_event(self.next_avail);
        } else {
            self.set_used_flags(0);
        }
        // After the fence that followed this write, or an earlier write of the same value: the driver sees the request
        // for a kick, or its avail index is seen here.
        load(&self.areas.avail_idx, Ordering::Relaxed) != self.next_avail
    }

    /// Marks the whole used ring in its log. After a crash it is not known which of the last writes were marked.
    pub fn relog_used(&self) {
        self.fence_and_log(&[(RING_FLAGS_OFFSET, used_ring_bytes(self.layout.size.into()))]);
    }

    /// Returns true if all pages that [`relog_used`](SplitDevice::relog_used) marks are marked already.
    pub fn is_used_marked(&self) -> bool {
        let Some(RingLog { log, used_gpa }) = &self.log else { return false };
        are_marked(log, self.iommu.as_ref(), *used_gpa, used_ring_bytes(self.layout.size.into()))
    }

    /// Continues at `next_avail`, the result of recovery (rule I3.4).
    pub fn set_next_avail(&mut self, next_avail: u16) {
        self.next_avail = next_avail;
        self.seen_avail = next_avail;
    }

    /// Puts the requests that were taken last back, given by their heads in the order of taking. The next calls of
    /// [`pop`](SplitDevice::pop) take them again.
    ///
    /// Returns false and changes nothing if these are not the requests that were taken last, in that order.
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

    /// The used index that the driver sees.
    pub fn used_index(&self) -> u16 {
        self.published
    }

    /// The base for the reply to GET_VRING_BASE (rule R4.1).
    pub fn base(&self) -> RingBase {
        RingBase::split(self.next_avail)
    }

    /// The layout of the ring.
    pub fn layout(&self) -> SplitLayout {
        self.layout
    }

    /// Reads the driver's avail index. Returns false if there are no new requests.
    fn read_avail_index(&mut self) -> Result<bool, RingError> {
        let (size, next, used) = (self.layout.size, self.next_avail, self.next_used);
        // Pairs with the driver's release: the ring's entries and descriptors are visible after it.
        let index = load(&self.areas.avail_idx, Ordering::Acquire);
        // Counted from the used index too: a driver cannot have more requests in flight than the ring has entries.
        if index.wrapping_sub(next) > size || index.wrapping_sub(used) > size {
            return Err(RingError::AvailIndex { index, next, used, size });
        }
        self.seen_avail = index;
        Ok(index != next)
    }

    /// Reads the chain of descriptors at `head`.
    #[inline]
    fn read_chain(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
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
                return self.read_table(&desc, chain);
            }
            chain.add(buffer(&desc), flags & DESC_F_WRITE != 0)?;
            if flags & DESC_F_NEXT == 0 {
                return chain.finish(self.iommu.as_ref());
            }
            index = desc.next.get();
        }
        Err(RingError::Loop { head })
    }

    /// Reads the indirect table at the end of a chain.
    fn read_table(&mut self, desc: &Desc, chain: &mut Chain) -> Result<(), RingError> {
        let head = chain.head;
        let fault = |fault| Err(RingError::Indirect { head, fault });
        if !self.indirect {
            return fault("although INDIRECT_DESC is not negotiated");
        }
        if desc.flags.get() & DESC_F_NEXT != 0 {
            return fault("with the NEXT flag");
        }
        copy_table(
            &self.memory,
            self.iommu.as_ref(),
            head,
            GuestAddress(desc.addr.get()),
            desc.len.get(),
            &mut self.table,
        )?;
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

    /// Executes a full fence and then marks earlier writes to the used ring, given as (offset, length) in bytes.
    #[inline]
    fn fence_and_log(&self, writes: &[(u64, u64)]) {
        let Some(RingLog { log, used_gpa }) = &self.log else { return fence(Ordering::SeqCst) };
        let burst = log.burst();
        for (offset, len) in writes.iter().filter(|(_, len)| *len > 0) {
            // Saturating: the log counts pages outside it (rule L6.2).
            let at = GuestAddress(used_gpa.0.saturating_add(*offset));
            match &self.iommu {
                None => burst.mark(at, *len),
                Some(iommu) => iommu.mark(&burst, at, *len),
            }
        }
    }
}

fn buffer(desc: &Desc) -> Buffer {
    Buffer { gpa: GuestAddress(desc.addr.get()), len: desc.len.get() }
}
