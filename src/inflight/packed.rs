//! Packed rings: the order of the stores that track a request, and recovery from wherever they stopped.
//!
//! A packed ring overwrites a request's descriptors with what is used, in any order: so each request is copied into
//! entries of the region, which come from a list of free ones, and is known by its first entry from then on. The
//! header has the free list and the used position twice, as they are and as last committed. Between them lies a batch
//! that is being published, and the ring itself tells whether it was (rules I4.2, I4.3).
//!
//! | step | stores | killed after any of them |
//! |---|---|---|
//! | `take` | copies, counter, `last` and `num`; both heads of the free list; the mark | not taken before the mark; without it entries may be missing in the list, which recovery makes up for |
//! | `stage` | `next` of the chain's last entry, `free_head`, the used position | rolled back |
//! | the ring | the flags of the batch's first descriptor last | published or not, never in part |
//! | `put_back` | `next` of the chain's last entry; the mark; both heads of the free list | `take`, backwards |
//! | `commit` | the marks, `old_free_head`, the committed used position | committed |
//!
//! The specification marks a request before it fills its entries and stores index and wrap counter one by one; the
//! order here gives its recovery the same answers and leaves fewer states to others that don't follow it: DPDK takes
//! every mark for a request with all its entries. Both used positions share eight aligned bytes and are stored at once,
//! since an index that has wrapped beside a counter that has not is a position a whole ring away.

use std::mem::offset_of;

use zerocopy::FromBytes;

use crate::abi::inflight::{PACKED_HEADER_BYTES, PackedEntry, PackedHeader, VERSION};
use crate::abi::virtio::{MAX_QUEUE_SIZE, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED, PackedDesc};
use crate::ring::{Position, PositionBits, RingBase};

use super::{InflightError, QueueRegion, Store, StoreSink};

const VERSION_AT: usize = offset_of!(PackedHeader, version);
const DESC_NUM_AT: usize = offset_of!(PackedHeader, desc_num);
/// `old_free_head` follows it.
const FREE_HEAD_AT: usize = offset_of!(PackedHeader, free_head);
const OLD_FREE_HEAD_AT: usize = offset_of!(PackedHeader, old_free_head);
/// Both positions, with two bytes of padding.
const USED_AT: usize = offset_of!(PackedHeader, used_idx);
const INFLIGHT: usize = offset_of!(PackedEntry, inflight);
const NEXT: usize = offset_of!(PackedEntry, next);
/// `num` follows it.
const LAST: usize = offset_of!(PackedEntry, last);
const COUNTER: usize = offset_of!(PackedEntry, counter);
/// `flags` and `len` follow it.
const ID: usize = offset_of!(PackedEntry, id);
const ADDR: usize = offset_of!(PackedEntry, addr);

/// Tracks the requests of one packed ring (rule I4).
///
/// For each request [`take`](PackedInflight::take), when it is popped. For each batch, without a `take` in between:
/// [`stage`](PackedInflight::stage) for each request in it, the ring's publish, [`commit`](PackedInflight::commit).
/// The ring must publish a batch as a whole: the flags of its first descriptor are the last that it stores.
#[derive(Debug)]
pub struct PackedInflight<S: StoreSink = QueueRegion> {
    sink: S,
    ring_size: u16,
    /// Of the next request to be taken.
    counter: u64,
    free_head: u16,
    /// With what is staged.
    used: PositionBits,
    committed: PositionBits,
    /// What the region says of each entry, which is not believed again while the ring runs.
    links: Vec<EntryLink>,
    /// Descriptors in flight.
    descs_in_flight: u16,
    /// Staged and not committed.
    batch: Vec<u16>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct EntryLink {
    /// Of a free entry the next free one, of a chain's the next of the chain.
    next: u16,
    /// Last entry of the request that starts here.
    last: u16,
    /// Descriptors of the request that starts here; 0 if none does.
    num: u16,
}

impl<S: StoreSink> PackedInflight<S> {
    /// Puts `recovery` into effect and goes on from it.
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

    /// Notes that a request was taken, given the ring's descriptors of it; says the entry that names it from now on.
    /// Call it before anything of the request is done; not for a resubmitted one, which is still noted.
    ///
    /// `None`, and nothing is noted, while a batch is staged and not committed, and for a request of no descriptors or
    /// of more than the ring has besides those in flight.
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

    /// Notes that the request named `head`, the last one taken, was put back into the ring untouched. Of several, the last
    /// comes first: recovery counts on it that what is in flight ends where the next request is taken.
    ///
    /// Nothing is noted while a batch is staged and not committed, and of others than those in flight.
    pub fn put_back(&mut self, head: u16) {
        if !self.batch.is_empty() {
            return;
        }
        let Some(num) = self.free(head) else { return };
        self.sink.u8(entry(head) + INFLIGHT, 0);
        self.sink.u32(FREE_HEAD_AT, pair(head, head));
        self.descs_in_flight = self.descs_in_flight.saturating_sub(num);
    }

    /// Puts the request named `head` into the batch that the ring publishes next. Others than those in flight are left
    /// out.
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

    /// Puts the entries of the request named `head` before those on the free list, but for the head that the region has;
    /// tells how many they are. `None` if it is not in flight.
    #[inline]
    fn free(&mut self, head: u16) -> Option<u16> {
        let link = self.links.get_mut(usize::from(head)).filter(|link| link.num > 0)?;
        let (last, num) = (link.last, std::mem::take(&mut link.num));
        self.links.get_mut(usize::from(last))?.next = self.free_head;
        self.sink.u16(entry(last) + NEXT, self.free_head);
        self.free_head = head;
        Some(num)
    }

    /// Notes that the batch is published.
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

    /// Forgets everything, as a reset of the device wants it: the region counts as fresh (rule I7.1).
    pub fn reset(mut self) {
        self.sink.u16(VERSION_AT, 0);
    }
}

/// What a device finds in the region when it starts, and what it has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedRecovery {
    /// Stores that repair the region, in this order; [`PackedInflight::resume`] does them. Stopping after any of them
    /// and recovering again comes to the same.
    pub stores: Vec<Store>,
    /// The requests to be served again, in this order.
    pub resubmit: Vec<PackedInflightRequest>,
    /// Where the ring goes on, whatever base the front-end gave; `None` on a fresh region, where that base counts.
    pub base: Option<RingBase>,
    /// Descriptors of the ring, by position, and the flags to be stored there before anything is published: a
    /// predecessor was killed while it wrote a batch, after these and before the first, which would have made them
    /// visible. As they stand the driver would come upon them when the one before them is used.
    pub stale: Vec<(u16, u16)>,
    /// Counter of the next request taken (rule I6.1).
    pub next_counter: u64,
    ring_size: u16,
    used: Position,
    free_head: u16,
    links: Vec<EntryLink>,
}

/// A request that was in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedInflightRequest {
    /// The entry that names it, for [`PackedInflight::stage`].
    pub entry: u16,
    /// Its descriptors as the ring had them.
    pub descs: Vec<PackedDesc>,
}

/// Recovers from the bytes of one queue's part (rules I4, I5, I6).
///
/// `queue_size` is the region's, `ring_size` the ring's; `base` is where the ring would go on without the region, and
/// `flags_of` reads the flags of the ring's descriptor at a position below `ring_size`.
///
/// A fresh region (version 0) is initialised for a ring that may have been used before without it, as at the
/// destination of a migration: its used position is that of `base`.
///
/// # Errors
/// Contents that can't be true: the region can't be trusted to say what was in flight. Any bytes are bearable.
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

    // One that adds first and wraps then may leave an index outside the ring, before anything is published.
    let current = position(header.used_idx.get(), header.used_wrap_counter, ring_size).ok();
    let committed = position(header.old_used_idx.get(), header.old_used_wrap_counter, ring_size)?;
    let batch = current.filter(|current| {
        // The used bit alone: the driver may have made the descriptor available again, for the next lap.
        let shown = used_bit(flags_of(committed.index)) == committed.wrap;
        *current != committed && (shown || is_torn(*current, committed, entries, &marked, ring_size))
    });
    let heads = (header.free_head.get(), header.old_free_head.get());
    let (used, mut free_head) = batch.map_or((committed, heads.1), |current| (current, heads.0));

    // What was decided comes first, in an order that leads to the same decision again.
    let mut stores = Vec::new();
    let set_heads = (heads != (free_head, free_head)).then_some(Store::U32(FREE_HEAD_AT, pair(free_head, free_head)));
    let set_used = ((current, committed) != (Some(used), used)).then_some(Store::U64(USED_AT, used_word(used, used)));
    let decided = if batch.is_some() { [set_heads, set_used] } else { [set_used, set_heads] };
    stores.extend(decided.into_iter().flatten());

    // Nothing on the free list is in flight: neither the published batch nor a request taken halfway.
    let whole = free_list(entries, free_head);
    let found = whole.and_then(|free| Some((in_flight(entries, &marked, &free, ring_size).ok()?, free)));
    let (((resubmit, busy), free), is_list) = match found {
        Some(found) => (found, true),
        None => {
            // Nobody kept the list: of it only the first is sure, which is enough for a batch of one request.
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
    // One killed while it took a request may have left entries out of the list.
    if !is_list || free.iter().zip(&busy).any(|(free, busy)| free == busy) {
        free_head = relist(&busy, &mut links, &mut stores);
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

/// A fresh region: the version comes last, so that a crash on the way leaves it fresh (rules I4.7, I5.2).
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

/// Whether one that stores index and wrap counter one by one was killed in between, when it had committed. Positions a
/// whole ring apart also come of a batch as long as the ring: with that before it is published, everything is in flight.
fn is_torn(current: Position, committed: Position, entries: &[PackedEntry], marked: &[u16], ring_size: u16) -> bool {
    current.index == committed.index && descriptors(entries, marked) != u32::from(ring_size)
}

/// Which entries are on the free list, which ends where it leaves the entries; `None` if it runs in circles.
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

/// How many descriptors the requests at `heads` say they have.
fn descriptors(entries: &[PackedEntry], heads: &[u16]) -> u32 {
    heads.iter().filter_map(|head| entries.get(usize::from(*head))).map(|entry| u32::from(entry.num.get())).sum()
}

/// The requests at those `heads` that are not free, in that order, and which entries they have.
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

/// Makes a new free list of what is not `busy`; returns its head. The list is empty while it is made, so that a crash
/// on the way does not lead into the entries of a request.
fn relist(busy: &[bool], links: &mut [EntryLink], stores: &mut Vec<Store>) -> u16 {
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

/// The position that the region says, if it is in the ring.
fn position(index: u16, wrap: u8, ring_size: u16) -> Result<Position, InflightError> {
    match wrap {
        0 | 1 if index < ring_size => Ok(Position { index, wrap: wrap == 1 }),
        _ => Err(InflightError::Position { index, wrap, ring_size }),
    }
}

fn used_bit(flags: u16) -> bool {
    flags >> PACKED_DESC_F_USED & 1 == 1
}

/// `flags` of a descriptor that the driver made available in the lap of `wrap`, and that is not used.
fn available(flags: u16, wrap: bool) -> u16 {
    let (avail, used) = (1 << PACKED_DESC_F_AVAIL, 1 << PACKED_DESC_F_USED);
    flags & !(avail | used) | if wrap { avail } else { used }
}

#[inline]
fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

#[inline]
fn used_word(used: Position, committed: Position) -> u64 {
    u64::from(pair(used.index, committed.index)) | u64::from(used.wrap) << 32 | u64::from(committed.wrap) << 40
}

/// Offset of the entry at `index`.
#[inline]
fn entry(index: u16) -> usize {
    PACKED_HEADER_BYTES as usize + usize::from(index) * size_of::<PackedEntry>()
}
