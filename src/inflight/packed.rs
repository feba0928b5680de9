//! Inflight tracking of packed rings: the order of the stores, and recovery after a crash between any two of them.
//!
//! Used descriptors overwrite a request's descriptors in the ring, in any order. So each request is copied into entries
//! of the region, taken from a free list, and is named by its first entry from then on. The header has the free list
//! and the used position twice: the current and the committed values. They differ while a batch is being published, and
//! the ring itself shows if it was published (rules I4.2, I4.3).
//!
//! | step | stores, in this order | state after a crash in this step |
//! |---|---|---|
//! | `take` | copies, counter, `last` and `num`; both heads of the free list; the mark | not taken until the mark is stored; entries may be missing in the free list, which recovery repairs |
//! | `stage` | `next` of the chain's last entry, `free_head`, the used position | rolled back |
//! | publish (the ring) | the used descriptors, the flags of the batch's first one last | published as a whole or not at all |
//! | `put_back` | `next` of the chain's last entry; the mark; both heads of the free list | the reverse of `take`: taken until the mark is cleared |
//! | `commit` | the marks, `old_free_head`, the committed used position | committed |
//!
//! The specification marks a request before it fills its entries, and stores index and wrap counter one by one. With
//! the order used here, a recovery by the specification gives the same result. It also leaves fewer intermediate states
//! to implementations that do not follow the specification: DPDK takes every mark for a request with all its entries.
//! Both used positions share eight aligned bytes and are stored at once, because a wrapped index with the old wrap
//! counter is a position one whole ring away.

use std::mem::offset_of;

use zerocopy::FromBytes;

use crate::abi::inflight::{PACKED_HEADER_BYTES, PackedEntry, PackedHeader, VERSION};
use crate::abi::virtio::{MAX_QUEUE_SIZE, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED, PackedDesc};
use crate::ring::{Position, PositionBits, RingBase};

use super::{InflightError, QueueRegion, Store, StoreSink};

const VERSION_AT: usize = offset_of!(PackedHeader, version);
const DESC_NUM_AT: usize = offset_of!(PackedHeader, desc_num);
/// Offset of `free_head` and of `old_free_head` after it.
const FREE_HEAD_AT: usize = offset_of!(PackedHeader, free_head);
const OLD_FREE_HEAD_AT: usize = offset_of!(PackedHeader, old_free_head);
/// Offset of the eight bytes with both used positions and two bytes of padding.
const USED_AT: usize = offset_of!(PackedHeader, used_idx);
const INFLIGHT: usize = offset_of!(PackedEntry, inflight);
const NEXT: usize = offset_of!(PackedEntry, next);
/// Offset of `last` and of `num` after it.
const LAST: usize = offset_of!(PackedEntry, last);
const COUNTER: usize = offset_of!(PackedEntry, counter);
/// Offset of `id` and of `flags` and `len` after it.
const ID: usize = offset_of!(PackedEntry, id);
const ADDR: usize = offset_of!(PackedEntry, addr);

/// Tracker of the requests of one packed ring (rule I4).
///
/// Call [`take`](PackedInflight::take) for each request that is popped. For each batch, without a `take` in between,
/// call [`stage`](PackedInflight::stage) for each of its requests, then the ring's publish, then
/// [`commit`](PackedInflight::commit). The ring must publish a batch as a whole: it stores the flags of the first
/// descriptor last.
///
/// ```
/// use vhost_migrate::abi::virtio::PackedDesc;
/// use vhost_migrate::inflight::{InflightRegion, RingKind};
/// use vhost_migrate::ring::RingBase;
///
/// let (region, _fd) = InflightRegion::create(RingKind::Packed, 1, 64)?;
/// let base = RingBase::packed(0, true, 0, true);
/// let (mut tracker, _) = region.packed(0, 64, base, |_| 0)?;
///
/// // The descriptors of a request are stored too: the driver's ring may have been overwritten at the recovery.
/// let desc = PackedDesc { addr: 0x4000.into(), len: 512.into(), id: 3.into(), flags: 0.into() };
/// let entry = tracker.take(&[desc]);
/// drop(tracker);
///
/// let (_, recovery) = region.packed(0, 64, base, |_| 0)?;
/// assert_eq!(recovery.resubmit[0].descs, [desc]);
/// assert_eq!(Some(recovery.resubmit[0].entry), entry);
/// # Ok::<(), vhost_migrate::inflight::InflightError>(())
/// ```
#[derive(Debug)]
pub struct PackedInflight<S: StoreSink = QueueRegion> {
    sink: S,
    ring_size: u16,
    /// Counter of the next request to be taken.
    counter: u64,
    free_head: u16,
    /// Used position after the staged requests.
    used: PositionBits,
    committed: PositionBits,
    /// Private copy of the links of each entry. Peers can write the region, so it is not read again while the ring
    /// runs.
    links: Vec<EntryLink>,
    /// Number of descriptors in flight.
    descs_in_flight: u16,
    /// Requests that are staged and not committed.
    batch: Vec<u16>,
}

/// The links of one entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct EntryLink {
    /// Next entry of the free list, or of the chain.
    next: u16,
    /// Last entry of the request that starts at this entry.
    last: u16,
    /// Number of descriptors of the request that starts at this entry; 0 if none does.
    num: u16,
}

impl<S: StoreSink> PackedInflight<S> {
    /// Executes the stores of `recovery` on `sink` and continues from that state.
    pub fn resume(mut sink: S, recovery: &PackedRecovery) -> PackedInflight<S> {
        for store in &recovery.stores {
            store.to(&mut sink);
        }
        let PackedRecovery { ring_size, next_counter: counter, free_head, used, .. } = *recovery;
        let links = recovery.links.clone();
        let descs_in_flight = links.iter().map(|link| link.num).sum();
        let batch = Vec::new();
        PackedInflight {
            sink,
            ring_size,
            counter,
            free_head,
            used: used.into(),
            committed: used.into(),
            links,
            descs_in_flight,
            batch,
        }
    }

    /// Records that a request was taken. `descs` are its descriptors in the ring. Returns the entry that names the
    /// request from now on. Call it before the request is executed, and not for a resubmitted request, which is
    /// recorded already.
    ///
    /// Returns `None` and records nothing while a batch is staged and not committed, for a request without descriptors,
    /// and for one with more descriptors than the ring has besides those in flight.
    #[inline]
    pub fn take(&mut self, descs: &[PackedDesc]) -> Option<u16> {
        let num = u16::try_from(descs.len()).ok()?;
        let descs_in_flight =
            self.descs_in_flight.checked_add(num).filter(|descs_in_flight| *descs_in_flight <= self.ring_size)?;
        if num == 0 || !self.batch.is_empty() {
            return None;
        }
        let head = self.free_head;
        let (mut last, mut free) = (head, head);
        for desc in descs {
            let next = self.links.get(usize::from(free))?.next;
            let at = entry(free);
            let [id, flags] = [desc.id.get(), desc.flags.get()].map(u64::from);
            self.sink.u64(at + ID, id | flags << 16 | u64::from(desc.len.get()) << 32);
            self.sink.u64(at + ADDR, desc.addr.get());
            (last, free) = (free, next);
        }
        let link = self.links.get_mut(usize::from(head))?;
        (link.last, link.num) = (last, num);
        self.sink.u64(entry(head) + COUNTER, self.counter);
        self.sink.u32(entry(head) + LAST, pair(last, num));
        self.sink.u32(FREE_HEAD_AT, pair(free, free));
        self.sink.u8(entry(head) + INFLIGHT, 1);
        self.counter = self.counter.wrapping_add(1);
        (self.free_head, self.descs_in_flight) = (free, descs_in_flight);
        Some(head)
    }

    /// Records that the request named `head`, the last one taken, was put back into the ring without being executed.
    /// Put several requests back in reverse order: recovery relies on it that the requests in flight end at the avail
    /// position.
    ///
    /// Records nothing while a batch is staged and not committed, and for a request that is not in flight.
    pub fn put_back(&mut self, head: u16) {
        if !self.batch.is_empty() {
            return;
        }
        let Some(num) = self.free(head) else { return };
        self.sink.u8(entry(head) + INFLIGHT, 0);
        self.sink.u32(FREE_HEAD_AT, pair(head, head));
        self.descs_in_flight = self.descs_in_flight.saturating_sub(num);
    }

    /// Adds the request named `head` to the batch that the ring publishes next. A request that is not in flight is
    /// ignored.
    #[inline]
    pub fn stage(&mut self, head: u16) {
        let Some(num) = self.free(head) else { return };
        self.sink.u16(FREE_HEAD_AT, head);
        let used = self.used.get().after(num, self.ring_size);
        self.used = used.into();
        self.descs_in_flight = self.descs_in_flight.saturating_sub(num);
        self.sink.u64(USED_AT, used_word(used, self.committed.get()));
        self.batch.push(head);
    }

    /// Links the entries of the request named `head` before the free list, without storing the new head in the region.
    /// Returns the number of entries, or `None` if the request is not in flight.
    #[inline]
    fn free(&mut self, head: u16) -> Option<u16> {
        let link = self.links.get_mut(usize::from(head)).filter(|link| link.num > 0)?;
        let (last, num) = (link.last, std::mem::take(&mut link.num));
        self.links.get_mut(usize::from(last))?.next = self.free_head;
        self.sink.u16(entry(last) + NEXT, self.free_head);
        self.free_head = head;
        Some(num)
    }

    /// Records that the batch is published.
    #[inline]
    pub fn commit(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        for head in self.batch.drain(..) {
            self.sink.u8(entry(head) + INFLIGHT, 0);
        }
        self.sink.u16(OLD_FREE_HEAD_AT, self.free_head);
        self.committed = self.used;
        self.sink.u64(USED_AT, used_word(self.used.get(), self.used.get()));
    }

    /// Marks the part as fresh, as a reset of the device requires (rule I7.1).
    pub fn reset(mut self) {
        self.sink.u16(VERSION_AT, 0);
    }
}

/// State of a packed ring as recovered from the region, and the stores that repair region and ring.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PackedRecovery {
    /// Stores that repair the region, in this order. [`PackedInflight::resume`] executes them. A crash after any of
    /// them and another recovery give the same result.
    pub stores: Vec<Store>,
    /// The requests to be served again, in this order.
    pub resubmit: Vec<PackedInflightRequest>,
    /// Base of the ring, which replaces the front-end's. `None` on a fresh region, where the front-end's is valid.
    pub base: Option<RingBase>,
    /// Position and repaired flags of stale descriptors in the ring. Store the flags before anything is published.
    ///
    /// The predecessor was killed while it wrote a batch: it had written these used descriptors, and not yet the first
    /// one of the batch, which would have published them. Without the repair the driver would find them used as soon as
    /// the descriptor before them is used.
    pub stale: Vec<(u16, u16)>,
    /// Counter of the next request to be taken (rule I6.1).
    pub next_counter: u64,
    ring_size: u16,
    used: Position,
    free_head: u16,
    links: Vec<EntryLink>,
}

/// A request that was in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedInflightRequest {
    /// The entry that names the request, for [`PackedInflight::stage`].
    pub entry: u16,
    /// The request's descriptors as they were in the ring.
    pub descs: Vec<PackedDesc>,
}

/// Recovers the state of a packed ring from the bytes of its part (rules I4, I5, I6).
///
/// `queue_size` is the number of entries of the part, `ring_size` that of the ring. `base` is the front-end's base of
/// the ring. `flags_of` reads the flags of the ring's descriptor at a position below `ring_size`.
///
/// A fresh region (version 0) is initialised with the used position of `base`. Its ring may have been used before
/// without the region, as at the destination of a migration.
///
/// # Errors
/// [`InflightError`] for invalid contents, from which the requests in flight cannot be determined. `bytes` may be
/// arbitrary.
pub fn recover_packed(
    bytes: &[u8],
    queue_size: u16,
    ring_size: u16,
    base: RingBase,
    flags_of: impl Fn(u16) -> u16,
) -> Result<PackedRecovery, InflightError> {
    if ring_size == 0 || u32::from(queue_size) > MAX_QUEUE_SIZE {
        return Err(InflightError::Shape { queues: 1, queue_size: if ring_size == 0 { 0 } else { queue_size } });
    }
    if ring_size > queue_size {
        return Err(InflightError::RingTooLarge { ring_size, queue_size });
    }
    let too_small = || InflightError::TooSmall {
        size: bytes.len() as u64,
        needed: PACKED_HEADER_BYTES + u64::from(queue_size) * size_of::<PackedEntry>() as u64,
    };
    let (header, rest) = PackedHeader::ref_from_prefix(bytes).map_err(|_| too_small())?;
    let (entries, _) = <[PackedEntry]>::ref_from_prefix_with_elems(rest, queue_size.into()).map_err(|_| too_small())?;
    match header.version.get() {
        0 => return initialise(entries, base, queue_size, ring_size),
        VERSION => {}
        version => return Err(InflightError::Version { version }),
    }
    let desc_num = header.desc_num.get();
    if desc_num != queue_size {
        return Err(InflightError::DescNum { desc_num, queue_size });
    }
    let mut marked = Vec::new();
    let mut next_counter = 0;
    for (head, entry) in (0..).zip(entries) {
        match entry.inflight {
            0 => {}
            1 => marked.push((entry.counter.get(), head)),
            mark => return Err(InflightError::Mark { head, mark }),
        }
        next_counter = next_counter.max(entry.counter.get());
    }
    let next_counter = next_counter.checked_add(1).ok_or(InflightError::Counter)?;
    marked.sort_unstable();
    let marked: Vec<u16> = marked.into_iter().map(|(_, head)| head).collect();

    // An implementation that adds first and wraps then (DPDK) may leave an index outside the ring, before it publishes.
    let current = position(header.used_idx.get(), header.used_wrap_counter, ring_size).ok();
    let committed = position(header.old_used_idx.get(), header.old_used_wrap_counter, ring_size)?;
    let batch = current.filter(|current| {
        // Only the used bit counts: the driver may have made the descriptor available again, in the next round.
        let published = used_bit(flags_of(committed.index)) == committed.wrap;
        *current != committed && (published || is_torn(*current, committed, entries, &marked, ring_size))
    });
    let heads = (header.free_head.get(), header.old_free_head.get());
    let (used, mut free_head) = batch.map_or((committed, heads.1), |current| (current, heads.0));

    // The decision is stored first. After a crash between these stores recovery decides the same again.
    let mut stores = Vec::new();
    let set_heads = (heads != (free_head, free_head)).then_some(Store::U32(FREE_HEAD_AT, pair(free_head, free_head)));
    let set_used = ((current, committed) != (Some(used), used)).then_some(Store::U64(USED_AT, used_word(used, used)));
    let decision = if batch.is_some() { [set_heads, set_used] } else { [set_used, set_heads] };
    stores.extend(decision.into_iter().flatten());

    // Entries on the free list are not in flight: those of the published batch, and of a request taken in part.
    let whole = free_list(entries, free_head);
    let found = whole.and_then(|free| Some((in_flight(entries, &marked, &free, ring_size).ok()?, free)));
    let (((resubmit, busy), free), is_list) = match found {
        Some(found) => (found, true),
        None => {
            // The free list was not maintained. Only its head is known, which is enough for a batch of one request.
            let num = entries.get(usize::from(free_head)).map_or(0, |first| first.num.get());
            if batch.is_some_and(|current| committed.after(num.min(ring_size), ring_size) != current) {
                return Err(InflightError::Batch { head: free_head });
            }
            let free: Vec<bool> = (0..queue_size).map(|index| index == free_head).collect();
            ((in_flight(entries, &marked, &free, ring_size)?, free), false)
        }
    };
    for &head in &marked {
        if free.get(usize::from(head)) == Some(&true) {
            stores.u8(entry(head) + INFLIGHT, 0);
        }
    }
    let mut links: Vec<EntryLink> =
        entries.iter().map(|entry| EntryLink { next: entry.next.get(), ..EntryLink::default() }).collect();
    for request in &resubmit {
        let head = usize::from(request.entry);
        if let (Some(link), Some(entry)) = (links.get_mut(head), entries.get(head)) {
            (link.last, link.num) = (entry.last.get(), entry.num.get());
        }
    }
    // A predecessor killed in `take` may have left entries out of the free list.
    if !is_list || free.iter().zip(&busy).any(|(free, busy)| free == busy) {
        free_head = rebuild_free_list(&busy, &mut links, &mut stores);
    }
    let descs_in_flight = links.iter().map(|link| link.num).sum();
    let avail = used.after(descs_in_flight, ring_size);
    let stale = (1..descs_in_flight).filter_map(|offset| {
        let Position { index, wrap } = used.after(offset, ring_size);
        let flags = flags_of(index);
        (used_bit(flags) == wrap).then(|| (index, available(flags, wrap)))
    });
    Ok(PackedRecovery {
        stores,
        base: Some(RingBase::packed(avail.index, avail.wrap, used.index, used.wrap)),
        stale: stale.collect(),
        resubmit,
        next_counter,
        ring_size,
        used,
        free_head,
        links,
    })
}

/// Initialises a fresh region (rules I4.7, I5.2). The version is stored last, so that the region stays fresh after a
/// crash before it.
fn initialise(
    entries: &[PackedEntry],
    base: RingBase,
    queue_size: u16,
    ring_size: u16,
) -> Result<PackedRecovery, InflightError> {
    let (_, used) = base.packed_positions();
    let used = position(used.index, used.wrap.into(), ring_size)?;
    let mut stores = Vec::new();
    let mut links = Vec::with_capacity(entries.len());
    for (index, found) in (0..).zip(entries) {
        if found.inflight != 0 {
            stores.u8(entry(index) + INFLIGHT, 0);
        }
        if found.counter.get() != 0 {
            stores.u64(entry(index) + COUNTER, 0);
        }
        let next = index + 1;
        if found.next.get() != next {
            stores.u16(entry(index) + NEXT, next);
        }
        links.push(EntryLink { next, ..EntryLink::default() });
    }
    stores.u16(DESC_NUM_AT, queue_size);
    stores.u32(FREE_HEAD_AT, 0);
    stores.u64(USED_AT, used_word(used, used));
    stores.u16(VERSION_AT, VERSION);
    Ok(PackedRecovery {
        stores,
        resubmit: Vec::new(),
        base: None,
        stale: Vec::new(),
        next_counter: 1,
        ring_size,
        used,
        free_head: 0,
        links,
    })
}

/// Returns true if a predecessor that stores index and wrap counter one by one was killed between the two, in its
/// commit.
///
/// Both positions are then one whole ring apart. That is also the case for a batch as long as the ring which is not
/// published yet, but then all descriptors of the ring are in flight.
fn is_torn(current: Position, committed: Position, entries: &[PackedEntry], marked: &[u16], ring_size: u16) -> bool {
    current.index == committed.index && descriptors(entries, marked) != u32::from(ring_size)
}

/// Membership of each entry in the free list, which ends at the first index beyond the entries. `None` if it is
/// circular.
fn free_list(entries: &[PackedEntry], free_head: u16) -> Option<Vec<bool>> {
    let mut free = vec![false; entries.len()];
    let mut index = usize::from(free_head);
    while let (Some(free), Some(entry)) = (free.get_mut(index), entries.get(index)) {
        if std::mem::replace(free, true) {
            return None;
        }
        index = entry.next.get().into();
    }
    Some(free)
}

/// The number of descriptors of the requests at `heads`, by their `num`.
fn descriptors(entries: &[PackedEntry], heads: &[u16]) -> u32 {
    heads.iter().filter_map(|head| entries.get(usize::from(*head))).map(|entry| u32::from(entry.num.get())).sum()
}

/// The requests at those `heads` that are not free, in that order, and for each entry if it belongs to one of them.
fn in_flight(
    entries: &[PackedEntry],
    heads: &[u16],
    free: &[bool],
    ring_size: u16,
) -> Result<(Vec<PackedInflightRequest>, Vec<bool>), InflightError> {
    let is_free = |head: &u16| free.get(usize::from(*head)) != Some(&false);
    let heads: Vec<u16> = heads.iter().copied().filter(|head| !is_free(head)).collect();
    let descs = descriptors(entries, &heads);
    if descs > ring_size.into() {
        return Err(InflightError::Outstanding { descs, ring_size });
    }
    let mut busy = vec![false; entries.len()];
    let mut requests = Vec::with_capacity(heads.len());
    for head in heads {
        let chain = || InflightError::Chain { head };
        let first = entries.get(usize::from(head)).ok_or_else(chain)?;
        let mut descs = Vec::with_capacity(first.num.get().into());
        let (mut last, mut index) = (None, head);
        for _ in 0..first.num.get() {
            let at = usize::from(index);
            let (Some(busy), Some(entry), false) = (busy.get_mut(at), entries.get(at), is_free(&index)) else {
                return Err(chain());
            };
            if std::mem::replace(busy, true) {
                return Err(chain());
            }
            descs.push(PackedDesc { addr: entry.addr, len: entry.len, id: entry.id, flags: entry.flags });
            (last, index) = (Some(index), entry.next.get());
        }
        if last != Some(first.last.get()) {
            return Err(chain());
        }
        requests.push(PackedInflightRequest { entry: head, descs });
    }
    Ok((requests, busy))
}

/// Links all entries that are not `busy` into a new free list and returns its head. The list is empty until it is
/// complete, so that after a crash in between it does not lead into the entries of a request.
fn rebuild_free_list(busy: &[bool], links: &mut [EntryLink], stores: &mut Vec<Store>) -> u16 {
    let end = links.len() as u16;
    stores.u32(FREE_HEAD_AT, pair(end, end));
    let mut head = end;
    for (index, (link, busy)) in (0..end).zip(links.iter_mut().zip(busy)).rev() {
        if !busy {
            if link.next != head {
                link.next = head;
                stores.u16(entry(index) + NEXT, head);
            }
            head = index;
        }
    }
    stores.u32(FREE_HEAD_AT, pair(head, head));
    head
}

/// The position with this index and wrap counter, if they are valid.
fn position(index: u16, wrap: u8, ring_size: u16) -> Result<Position, InflightError> {
    match wrap {
        0 | 1 if index < ring_size => Ok(Position { index, wrap: wrap == 1 }),
        _ => Err(InflightError::Position { index, wrap, ring_size }),
    }
}

/// The USED bit of a descriptor's flags.
fn used_bit(flags: u16) -> bool {
    flags >> PACKED_DESC_F_USED & 1 == 1
}

/// `flags` with the AVAIL and USED bits of a descriptor that the driver made available in the round of `wrap` and that
/// is not used.
fn available(flags: u16, wrap: bool) -> u16 {
    let (avail, used) = (1 << PACKED_DESC_F_AVAIL, 1 << PACKED_DESC_F_USED);
    flags & !(avail | used) | if wrap { avail } else { used }
}

/// Two adjacent u16 fields as one value.
#[inline]
fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// Both used positions with their wrap counters as one value for [`USED_AT`].
#[inline]
fn used_word(used: Position, committed: Position) -> u64 {
    u64::from(pair(used.index, committed.index)) | u64::from(used.wrap) << 32 | u64::from(committed.wrap) << 40
}

/// Offset of the entry at `index`.
#[inline]
fn entry(index: u16) -> usize {
    PACKED_HEADER_BYTES as usize + usize::from(index) * size_of::<PackedEntry>()
}
