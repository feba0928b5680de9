//! The driver side of a split ring, used by the built-in guest and by tests: it adds requests and takes completions.
//!
//! Values written by the device are checked. The links between descriptors are kept here and never read from shared
//! memory.

use std::sync::atomic::{Ordering, fence};

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::abi::virtio::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, Desc, USED_F_NO_NOTIFY, VIRTIO_RING_F_EVENT_IDX, VirtioFeatures,
};
use crate::memory::{GuestAddress, Memory};
use crate::ring::driver::{check_order, needed_descriptors, new_order, with_flags};
use crate::ring::{Buffer, InOrderState, RingError, UsedBuffer, passes};

use super::{SplitAreas, SplitLayout, load, store};

/// The saved state of a driver, to continue with the ring in another process that has the same guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SplitDriverState {
    /// Avail index after all added requests.
    pub avail: u16,
    /// Avail index that the device sees.
    pub published: u16,
    /// Used index up to which completions were taken.
    pub used: u16,
    /// The requests without a completion: their descriptors in order, the head first.
    pub chains: Vec<Vec<u16>>,
    /// The free descriptor with which the next request begins. It is ignored if none is free.
    pub first_free: u16,
    /// With IN_ORDER, the order of the requests.
    pub in_order: Option<InOrderState>,
}

/// The driver side of a split ring.
///
/// A driver misses no completion if it works in this order: [`pop_used`](SplitDriver::pop_used) until it returns
/// `None`; `enable_notifications`, and from the start again if that returns true; then wait for a notification.
pub struct SplitDriver {
    memory: Memory,
    areas: SplitAreas,
    size: u16,
    event_idx: bool,
    /// By descriptor: the next one of its chain, or of the free list.
    links: Vec<u16>,
    /// By head: the number of descriptors of its chain; 0 if no request in flight has this head.
    lengths: Vec<u16>,
    /// Head of the free list. Freed descriptors are appended to the list, so that with IN_ORDER descriptors are used in
    /// the order of the table (virtio 1.2, "In-order use of descriptors").
    first_free: u16,
    last_free: u16,
    free: u16,
    outstanding: u16,
    avail: u16,
    published: u16,
    used: u16,
    in_order: Option<InOrderState>,
}

impl SplitDriver {
    /// Initialises an empty ring.
    ///
    /// `features` are the negotiated ones, of which EVENT_IDX and IN_ORDER are used.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Misaligned`] or [`RingError::Outside`] for an invalid layout.
    pub fn new(memory: &Memory, layout: SplitLayout, features: VirtioFeatures) -> Result<SplitDriver, RingError> {
        let areas = SplitAreas::new(memory, &layout)?;
        let words = [&areas.avail_flags, &areas.avail_idx, &areas.used_event];
        for word in words.into_iter().chain([&areas.used_flags, &areas.used_idx, &areas.avail_event]) {
            store(word, 0, Ordering::Release);
        }
        Ok(SplitDriver {
            memory: memory.clone(),
            areas,
            size: layout.size,
            event_idx: features.contains(VIRTIO_RING_F_EVENT_IDX),
            links: (1..=layout.size).collect(),
            lengths: vec![0; layout.size.into()],
            first_free: 0,
            last_free: layout.size - 1,
            free: layout.size,
            outstanding: 0,
            avail: 0,
            published: 0,
            used: 0,
            in_order: new_order(features),
        })
    }

    /// Opens a ring with the saved `state`. The ring itself is in guest memory and is not changed.
    ///
    /// # Errors
    /// As [`SplitDriver::new`], and [`RingError::State`] for a state that is invalid for this ring.
    pub fn restore(
        memory: &Memory,
        layout: SplitLayout,
        features: VirtioFeatures,
        state: &SplitDriverState,
    ) -> Result<SplitDriver, RingError> {
        let fault = |fault| Err(RingError::State { fault });
        let areas = SplitAreas::new(memory, &layout)?;
        let size = usize::from(layout.size);
        let SplitDriverState { avail, published, used, ref chains, first_free, ref in_order } = *state;
        if chains.len() > size || chains.len() != usize::from(avail.wrapping_sub(used)) {
            return fault("the indexes do not match the number of requests");
        }
        if avail.wrapping_sub(published) > avail.wrapping_sub(used) {
            return fault("more requests are unpublished than outstanding");
        }
        let (mut links, mut lengths, mut taken) = (vec![0; size], vec![0; size], vec![false; size]);
        let mut free = layout.size;
        for chain in chains {
            for (at, &index) in chain.iter().enumerate() {
                match (taken.get_mut(usize::from(index)), links.get_mut(usize::from(index))) {
                    (Some(taken @ false), Some(link)) => {
                        (*taken, *link) = (true, chain.get(at + 1).copied().unwrap_or_default());
                        free -= 1;
                    }
                    _ => return fault("a descriptor is outside the table or in two requests"),
                }
            }
            match chain.first().and_then(|head| lengths.get_mut(usize::from(*head))) {
                Some(length) => *length = chain.len() as u16,
                None => return fault("a request has no descriptor"),
            }
        }
        if first_free >= layout.size {
            return fault("a descriptor is outside the table or in two requests");
        }
        check_order(in_order.as_ref(), features, chains.iter().flat_map(|chain| chain.first().copied()))?;
        // The free list, linked from its last descriptor back to its first.
        let (mut next, mut last_free) = (layout.size, None);
        for index in (0..layout.size).rev().map(|at| first_free.wrapping_add(at) & (layout.size - 1)) {
            match links.get_mut(usize::from(index)) {
                Some(link) if taken.get(usize::from(index)) == Some(&false) => {
                    *link = std::mem::replace(&mut next, index);
                    last_free.get_or_insert(index);
                }
                _ => {}
            }
        }
        Ok(SplitDriver {
            memory: memory.clone(),
            areas,
            size: layout.size,
            event_idx: features.contains(VIRTIO_RING_F_EVENT_IDX),
            links,
            lengths,
            first_free: next,
            last_free: last_free.unwrap_or_default(),
            free,
            outstanding: chains.len() as u16,
            avail,
            published,
            used,
            in_order: in_order.clone(),
        })
    }

    /// The state for [`SplitDriver::restore`].
    pub fn state(&self) -> SplitDriverState {
        let chain = |(head, &length): (u16, &u16)| {
            std::iter::successors(Some(head), |index| Some(self.link(*index))).take(length.into()).collect()
        };
        SplitDriverState {
            avail: self.avail,
            published: self.published,
            used: self.used,
            chains: (0..).zip(&self.lengths).filter(|(_, length)| **length > 0).map(chain).collect(),
            first_free: if self.free > 0 { self.first_free } else { 0 },
            in_order: self.in_order.clone(),
        }
    }

    /// Adds a request and returns its head, or `None` while the ring has too few free descriptors. The device sees the
    /// request after the next [`publish`](SplitDriver::publish).
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
        if needed > self.free {
            return Ok(None);
        }
        let head = self.first_free;
        let flagged = with_flags(readable, writable);
        if let Some(gpa) = table {
            let describe =
                |((buffer, flags), next): ((&Buffer, u16), u16)| describe(buffer.gpa, buffer.len, flags, next);
            let descs: Vec<Desc> = flagged.zip(1..).map(describe).collect();
            let written = self.memory.write(gpa, descs.as_bytes());
            written.map_err(|source| RingError::IndirectOutside { head, source })?;
            self.areas.set_desc(head, &describe_table(gpa, descs.len()));
            self.first_free = self.link(head);
        } else {
            for (buffer, flags) in flagged {
                let index = self.first_free;
                self.first_free = self.link(index);
                self.areas.set_desc(index, &describe(buffer.gpa, buffer.len, flags, self.first_free));
            }
        }
        self.free -= needed;
        self.outstanding += 1;
        if let Some(length) = self.lengths.get_mut(usize::from(head)) {
            *length = needed;
        }
        if let Some(order) = &mut self.in_order {
            order.add(head, writable);
        }
        self.areas.avail.at(self.avail).store(head.to_le(), Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Publishes the requests added so far. Returns true if the device must be kicked.
    #[must_use = "the device may be waiting for a kick"]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.avail);
        if old == new {
            return false;
        }
        store(&self.areas.avail_idx, new, Ordering::Release);
        self.published = new;
        // The device either sees the new index before it waits, or its request for a kick is seen here.
        fence(Ordering::SeqCst);
        if self.event_idx {
            passes(load(&self.areas.avail_event, Ordering::Relaxed), new, old)
        } else {
            load(&self.areas.used_flags, Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
        }
    }

    /// Takes the next completion, if there is one, and frees its descriptors.
    ///
    /// # Errors
    /// [`RingError::UsedIndex`] or [`RingError::UsedId`] if the device has broken the ring. Nothing is taken then.
    pub fn pop_used(&mut self) -> Result<Option<UsedBuffer>, RingError> {
        if let Some(used) = self.in_order.as_mut().and_then(InOrderState::next) {
            self.release(used.head);
            return Ok(Some(used));
        }
        // Pairs with the device's release: the element and the data of the request are visible after it.
        let index = load(&self.areas.used_idx, Ordering::Acquire);
        let (last, outstanding) = (self.used, self.outstanding);
        if index == last {
            return Ok(None);
        }
        if index.wrapping_sub(last) > outstanding {
            return Err(RingError::UsedIndex { index, last, outstanding });
        }
        let element = self.areas.used(last);
        let id = element.id.get();
        let head = u16::try_from(id).map_err(|_| RingError::UsedId { id })?;
        let used = UsedBuffer { head, len: element.len.get() };
        let count = match &self.in_order {
            None => usize::from(self.lengths.get(usize::from(head)).is_some_and(|length| *length > 0)),
            Some(order) => order.up_to(head).count(),
        };
        if count == 0 || count > usize::from(index.wrapping_sub(last)) {
            return Err(RingError::UsedId { id });
        }
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
            store(&self.areas.avail_flags, AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// Asks the device to notify of completions. Returns true if there are completions already, for which the device
    /// may not notify.
    #[must_use = "completions that are there already bring no notification"]
    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            store(&self.areas.used_event, self.used, Ordering::Relaxed);
        } else {
            store(&self.areas.avail_flags, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        load(&self.areas.used_idx, Ordering::Relaxed) != self.used
    }

    /// Number of requests without a completion.
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Number of free descriptors.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Frees the descriptors of a completed request.
    fn release(&mut self, head: u16) {
        let length = self.lengths.get_mut(usize::from(head)).map(std::mem::take).unwrap_or_default();
        let tail = (1..length).fold(head, |index, _| self.link(index));
        match self.links.get_mut(usize::from(self.last_free)) {
            Some(link) if self.free > 0 => *link = head,
            _ => self.first_free = head,
        }
        self.last_free = tail;
        self.free += length;
        self.outstanding -= 1;
        self.used = self.used.wrapping_add(1);
    }

    fn link(&self, index: u16) -> u16 {
        self.links.get(usize::from(index)).copied().unwrap_or_default()
    }
}

fn describe(gpa: GuestAddress, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr: U64::new(gpa.0), len: U32::new(len), flags: U16::new(flags), next: U16::new(next) }
}

fn describe_table(gpa: GuestAddress, buffers: usize) -> Desc {
    describe(gpa, (buffers * size_of::<Desc>()) as u32, DESC_F_INDIRECT, 0)
}
