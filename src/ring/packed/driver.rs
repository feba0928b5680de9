//! The driver side of a packed ring, used by the built-in guest and by tests: it adds requests and takes completions.
//!
//! Values written by the device are checked. The lengths of requests are kept here and never read from shared memory.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::abi::virtio::{
    DESC_F_INDIRECT, DESC_F_WRITE, PACKED_EVENT_FLAG_DISABLE, PackedDesc, VIRTIO_RING_F_EVENT_IDX, VirtioFeatures,
};
use crate::memory::{GuestAddress, Memory};
use crate::ring::driver::{check_order, needed_descriptors, new_order, with_flags};
use crate::ring::shared_array::SharedArray;
use crate::ring::{Buffer, InOrderState, RingError, UsedBuffer};

use super::{
    NotifyCondition, PackedAreas, PackedLayout, Position, event_at, event_bits, half_bits, is_used, notify_condition,
    passes_position,
};

/// A request of a packed ring without a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PackedDriverRequest {
    /// Buffer id.
    pub id: u16,
    /// Number of descriptors.
    pub slots: u16,
}

/// The saved state of a driver, to continue with the ring in another process that has the same guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PackedDriverState {
    /// Position at which the next request is added.
    pub avail: Position,
    /// Position after the last published request.
    pub published: Position,
    /// Position of the next completion.
    pub used: Position,
    /// The requests without a completion.
    pub requests: Vec<PackedDriverRequest>,
    /// Length, id and flags of the descriptor at `published`, which are written to publish it. They are ignored if all
    /// requests are published.
    pub held: u64,
    /// With IN_ORDER, the order of the requests.
    pub in_order: Option<InOrderState>,
}

/// The driver side of a packed ring.
///
/// A driver misses no completion if it works in this order: [`pop_used`](PackedDriver::pop_used) until it returns
/// `None`; `enable_notifications`, and from the start again if that returns true; then wait for a notification.
pub struct PackedDriver {
    memory: Memory,
    areas: PackedAreas,
    size: u16,
    event_idx: bool,
    /// By buffer id: the number of descriptors of its request; 0 if no request in flight has this id.
    lengths: Vec<u16>,
    free_ids: Vec<u16>,
    avail: Position,
    published: Position,
    used: Position,
    /// Second half of the descriptor at `published`, which is written after all other added descriptors.
    held: u64,
    in_order: Option<InOrderState>,
}

impl PackedDriver {
    /// Initialises an empty ring with its event areas.
    ///
    /// `features` are the negotiated ones, of which EVENT_IDX and IN_ORDER are used.
    ///
    /// # Errors
    /// [`RingError::PackedSize`], [`RingError::Misaligned`] or [`RingError::Outside`] for an invalid layout.
    pub fn new(memory: &Memory, layout: PackedLayout, features: VirtioFeatures) -> Result<PackedDriver, RingError> {
        let areas = PackedAreas::new(memory, &layout)?;
        for index in 0..layout.size {
            areas.set_addr(index, GuestAddress(0));
            areas.set_half(index, 0, Ordering::Release);
        }
        set(&areas.driver, 0);
        set(&areas.device, 0);
        Ok(PackedDriver {
            memory: memory.clone(),
            areas,
            size: layout.size,
            event_idx: features.contains(VIRTIO_RING_F_EVENT_IDX),
            lengths: vec![0; layout.size.into()],
            free_ids: (0..layout.size).rev().collect(),
            avail: Position::START,
            published: Position::START,
            used: Position::START,
            held: 0,
            in_order: new_order(features),
        })
    }

    /// Opens a ring with the saved `state`. The ring itself is in guest memory and is not changed.
    ///
    /// # Errors
    /// As [`PackedDriver::new`], and [`RingError::State`] for a state that is invalid for this ring.
    pub fn restore(
        memory: &Memory,
        layout: PackedLayout,
        features: VirtioFeatures,
        state: &PackedDriverState,
    ) -> Result<PackedDriver, RingError> {
        let fault = |fault| Err(RingError::State { fault });
        let areas = PackedAreas::new(memory, &layout)?;
        let size = layout.size;
        let &PackedDriverState { avail, published, used, ref requests, held, ref in_order } = state;
        if [avail, published, used].iter().any(|position| position.index >= size) {
            return fault("a position is outside the ring");
        }
        let mut lengths = vec![0; size.into()];
        for &PackedDriverRequest { id, slots } in requests {
            match lengths.get_mut(usize::from(id)) {
                Some(length @ 0) if slots > 0 => *length = slots,
                _ => return fault("a request has no descriptor, or an id that is used twice or outside the ring"),
            }
        }
        let slots: u64 = requests.iter().map(|request| u64::from(request.slots)).sum();
        let outstanding = used.until(avail, size).map_or(u64::MAX, u64::from);
        if slots != outstanding {
            return fault("the positions do not match the descriptors of the requests");
        }
        if published.until(avail, size).is_none_or(|unpublished| u64::from(unpublished) > outstanding) {
            return fault("more requests are unpublished than outstanding");
        }
        check_order(in_order.as_ref(), features, requests.iter().map(|request| request.id))?;
        Ok(PackedDriver {
            memory: memory.clone(),
            areas,
            size,
            event_idx: features.contains(VIRTIO_RING_F_EVENT_IDX),
            free_ids: (0..size).rev().filter(|id| lengths.get(usize::from(*id)) == Some(&0)).collect(),
            lengths,
            avail,
            published,
            used,
            held,
            in_order: in_order.clone(),
        })
    }

    /// The state for [`PackedDriver::restore`].
    pub fn state(&self) -> PackedDriverState {
        let requests = (0..).zip(&self.lengths).filter(|(_, slots)| **slots > 0);
        PackedDriverState {
            avail: self.avail,
            published: self.published,
            used: self.used,
            requests: requests.map(|(id, slots)| PackedDriverRequest { id, slots: *slots }).collect(),
            held: self.held,
            in_order: self.in_order.clone(),
        }
    }

    /// Adds a request and returns its buffer id, or `None` while the ring has too few free descriptors. The device sees
    /// the request after the next [`publish`](PackedDriver::publish).
    ///
    /// With `table`, the request is indirect and takes a single descriptor. `table` is the guest-physical address of 16
    /// bytes per buffer, which must not be written until the request is completed. INDIRECT_DESC must be negotiated.
    ///
    /// # Errors
    /// [`RingError::Request`] for a request that has no buffer or never fits, [`RingError::IndirectOutside`] for a
    /// `table` outside guest memory.
    pub fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        table: Option<GuestAddress>,
    ) -> Result<Option<u16>, RingError> {
        let needed = needed_descriptors(readable, writable, table, self.size)?;
        let Some(&id) = self.free_ids.last().filter(|_| needed <= self.free()) else { return Ok(None) };
        let flagged = with_flags(readable, writable);
        if let Some(gpa) = table {
            let describe = |(buffer, flags): (&Buffer, u16)| PackedDesc {
                addr: U64::new(buffer.gpa.0),
                len: U32::new(buffer.len),
                id: U16::ZERO,
                // The order in the table links the descriptors (virtio 1.2, "Indirect Flag: Scatter-Gather Support").
                flags: U16::new(flags & DESC_F_WRITE),
            };
            let descs: Vec<PackedDesc> = flagged.map(describe).collect();
            let written = self.memory.write(gpa, descs.as_bytes());
            written.map_err(|source| RingError::IndirectOutside { head: id, source })?;
            self.write_desc(gpa, descs.as_bytes().len() as u32, id, DESC_F_INDIRECT);
        } else {
            flagged.for_each(|(buffer, flags)| self.write_desc(buffer.gpa, buffer.len, id, flags));
        }
        self.free_ids.pop();
        if let Some(length) = self.lengths.get_mut(usize::from(id)) {
            *length = needed;
        }
        if let Some(order) = &mut self.in_order {
            order.add(id, writable);
        }
        Ok(Some(id))
    }

    /// Publishes the requests added so far. Returns true if the device must be kicked.
    #[must_use = "the device may be waiting for a kick"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.avail);
        if old == new {
            return false;
        }
        self.areas.set_half(old.index, self.held, Ordering::Release);
        self.published = new;
        // The device either sees the new descriptors before it waits, or its request for a kick is seen here.
        fence(Ordering::SeqCst);
        match notify_condition(&self.areas.device, self.event_idx) {
            NotifyCondition::Nothing => false,
            NotifyCondition::All => true,
            NotifyCondition::At(event) => {
                passes_position(event, new, old.until(new, self.size).unwrap_or(self.size), self.size)
            }
        }
    }

    /// Takes the next completion, if there is one, and frees its descriptors.
    ///
    /// # Errors
    /// [`RingError::UsedId`] if the device has broken the ring. Nothing is taken then.
    pub fn pop_used(&mut self) -> Result<Option<UsedBuffer>, RingError> {
        if let Some(used) = self.in_order.as_mut().and_then(InOrderState::next) {
            self.release(used.head);
            return Ok(Some(used));
        }
        // Pairs with the device's release: the data of the request is visible after it.
        let desc = self.areas.half(self.used.index, Ordering::Acquire);
        if !is_used(&desc, self.used) {
            return Ok(None);
        }
        let id = desc.id.get();
        // Without the WRITE flag the length is reserved (virtio 1.2, "Element Address and Length").
        let len = if desc.flags.get() & DESC_F_WRITE != 0 { desc.len.get() } else { 0 };
        let slots: u32 = match &self.in_order {
            None => self.length(id).into(),
            Some(order) => order.up_to(id).map(|id| u32::from(self.length(id))).sum(),
        };
        // Only published requests can be completed.
        let visible = self.used.until(self.published, self.size).unwrap_or_default();
        if slots == 0 || slots > u32::from(visible) {
            return Err(RingError::UsedId { id: id.into() });
        }
        let used = UsedBuffer { head: id, len };
        let used = match &mut self.in_order {
            None => used,
            Some(order) => order.complete(used),
        };
        self.release(used.head);
        Ok(Some(used))
    }

    /// Asks the device not to notify. The device may ignore it.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx {
            set(&self.areas.driver, event_bits(0, PACKED_EVENT_FLAG_DISABLE));
        }
    }

    /// Asks the device to notify of completions. Returns true if there are completions already, for which the device
    /// may not notify.
    #[must_use = "completions that are there already bring no notification"]
    pub fn enable_notifications(&mut self) -> bool {
        set(&self.areas.driver, event_at(self.used, self.event_idx));
        fence(Ordering::SeqCst);
        self.in_order.as_ref().is_some_and(|order| order.batch.is_some()) || self.areas.is_used(self.used)
    }

    /// Number of requests without a completion.
    pub fn outstanding(&self) -> u16 {
        self.size - self.free_ids.len() as u16
    }

    /// Number of free descriptors.
    pub fn free(&self) -> u16 {
        self.size - self.used.until(self.avail, self.size).unwrap_or(self.size)
    }

    /// Writes the next descriptor. The second half of the first unpublished one is held back: the device reads one
    /// descriptor after the other and stops there.
    fn write_desc(&mut self, gpa: GuestAddress, len: u32, id: u16, flags: u16) {
        let half = half_bits(len, id, flags | self.avail.avail_flags());
        self.areas.set_addr(self.avail.index, gpa);
        if self.avail == self.published {
            self.held = half;
        } else {
            self.areas.set_half(self.avail.index, half, Ordering::Relaxed);
        }
        self.avail = self.avail.after(1, self.size);
    }

    /// Frees the descriptors and the id of a completed request.
    fn release(&mut self, id: u16) {
        if let Some(length) = self.lengths.get_mut(usize::from(id)) {
            self.used = self.used.after(std::mem::take(length), self.size);
            self.free_ids.push(id);
        }
    }

    /// Number of descriptors of the request with this buffer id.
    fn length(&self, id: u16) -> u16 {
        self.lengths.get(usize::from(id)).copied().unwrap_or_default()
    }
}

/// Writes an event area.
fn set(area: &SharedArray<AtomicU32>, event: u32) {
    area.nth(0).store(event.to_le(), Ordering::Relaxed);
}
