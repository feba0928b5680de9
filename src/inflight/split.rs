//! Inflight tracking of split rings: the order of the stores, and recovery after a crash between any two of them.
//!
//! Each sequence of stores is written once, over [`StoreSink`], so the crash tests run the same code as a device.

use std::collections::HashSet;
use std::mem::offset_of;

use zerocopy::FromBytes;

use crate::abi::inflight::{SPLIT_HEADER_BYTES, SplitEntry, SplitHeader, VERSION};

use super::{InflightError, QueueRegion, Store, StoreSink};

pub(super) const VERSION_AT: usize = offset_of!(SplitHeader, version);
const DESC_NUM_AT: usize = offset_of!(SplitHeader, desc_num);
const LAST_BATCH_HEAD_AT: usize = offset_of!(SplitHeader, last_batch_head);
const USED_IDX_AT: usize = offset_of!(SplitHeader, used_idx);
const INFLIGHT: usize = offset_of!(SplitEntry, inflight);
const NEXT: usize = offset_of!(SplitEntry, next);
const COUNTER: usize = offset_of!(SplitEntry, counter);

/// Tracker of the requests of one split ring (rule I2).
///
/// A request is named by its head descriptor. Heads outside the region's queue size are ignored.
#[derive(Debug)]
pub struct SplitInflight<S: StoreSink = QueueRegion> {
    sink: S,
    /// Counter of the next request to be taken.
    counter: u64,
    last_batch_head: u16,
    /// Heads that are staged and not committed.
    batch: Vec<u16>,
}

impl<S: StoreSink> SplitInflight<S> {
    /// Executes the stores of `recovery` on `sink` and continues from that state.
    pub fn resume(mut sink: S, recovery: &SplitRecovery) -> SplitInflight<S> {
        for store in &recovery.stores {
            store.to(&mut sink);
        }
        let SplitRecovery { next_counter, last_batch_head, .. } = *recovery;
        SplitInflight { sink, counter: next_counter, last_batch_head, batch: Vec::new() }
    }

    /// Records that request `head` was taken. Call it before the request is executed, and not for a resubmitted
    /// request, which is recorded already.
    #[inline]
    pub fn take(&mut self, head: u16) {
        self.sink.u64(entry(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.sink.u8(entry(head) + INFLIGHT, 1);
    }

    /// Records that request `head`, the last one taken, was put back into the ring without being executed. Put several
    /// requests back in reverse order: recovery relies on it that those in flight are the first of the avail ring.
    pub fn put_back(&mut self, head: u16) {
        self.sink.u8(entry(head) + INFLIGHT, 0);
    }

    /// Adds request `head` to the batch that the ring publishes next.
    #[inline]
    pub fn stage(&mut self, head: u16) {
        self.sink.u16(entry(head) + NEXT, self.last_batch_head);
        self.sink.u16(LAST_BATCH_HEAD_AT, head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// Records that the batch is published. `used_idx` is the ring's used index after it.
    #[inline]
    pub fn commit(&mut self, used_idx: u16) {
        for head in self.batch.drain(..) {
            self.sink.u8(entry(head) + INFLIGHT, 0);
        }
        self.sink.u16(USED_IDX_AT, used_idx);
    }

    /// Marks the part as fresh, as a reset of the device requires (rule I7.1).
    pub fn reset(mut self) {
        self.sink.u16(VERSION_AT, 0);
    }
}

/// State of a split ring as recovered from the region, and the stores that repair the region.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SplitRecovery {
    /// Stores that repair the region, in this order. [`SplitInflight::resume`] executes them. A crash after any of them
    /// and another recovery give the same result.
    pub stores: Vec<Store>,
    /// Heads of the requests to be served again, in this order.
    pub resubmit: Vec<u16>,
    /// Next index of the avail ring, which replaces the front-end's base. `None` on a fresh region, where the base is
    /// valid.
    pub next_avail: Option<u16>,
    /// Counter of the next request to be taken (rule I6.1).
    pub next_counter: u64,
    /// Head of the list of the last batch, which the next batch is linked to.
    pub last_batch_head: u16,
}

/// Recovers the state of a split ring from the bytes of its part and the used index in the ring (rules I3, I5, I6).
///
/// A fresh region (version 0) is initialised. Its ring may have been used before without the region, as at the
/// destination of a migration.
///
/// ```
/// use vhost_migrate::inflight::{InflightRegion, RingKind, recover_split};
///
/// // A copy of the region is enough, for example to inspect it.
/// let (region, _fd) = InflightRegion::create(RingKind::Split, 1, 64)?;
/// region.split(0, 64, 0)?.0.take(7);
/// let recovery = recover_split(&region.copy(0)?, 0, 64)?;
/// assert_eq!(recovery.resubmit, [7]);
/// # Ok::<(), vhost_migrate::inflight::InflightError>(())
/// ```
///
/// # Errors
/// [`InflightError`] for invalid contents, from which the requests in flight cannot be determined. `bytes` may be
/// arbitrary.
pub fn recover_split(bytes: &[u8], used_idx: u16, queue_size: u16) -> Result<SplitRecovery, InflightError> {
    let too_small = || InflightError::TooSmall {
        size: bytes.len() as u64,
        needed: SPLIT_HEADER_BYTES + u64::from(queue_size) * size_of::<SplitEntry>() as u64,
    };
    let (header, rest) = SplitHeader::ref_from_prefix(bytes).map_err(|_| too_small())?;
    let (entries, _) = <[SplitEntry]>::ref_from_prefix_with_elems(rest, queue_size.into()).map_err(|_| too_small())?;
    match header.version.get() {
        0 => return Ok(initialise(entries, used_idx, queue_size)),
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
    let mut stores = Vec::new();
    if header.used_idx.get() != used_idx {
        // The last batch matters only if a mark is left that it could clear.
        if !marked.is_empty() {
            let published = last_batch(header, entries, used_idx)?;
            for &head in &published {
                stores.u8(entry(head) + INFLIGHT, 0);
            }
            let published: HashSet<u16> = published.into_iter().collect();
            marked.retain(|(_, head)| !published.contains(head));
        }
        stores.u16(USED_IDX_AT, used_idx);
    }
    marked.sort_unstable();
    let resubmit: Vec<u16> = marked.into_iter().map(|(_, head)| head).collect();
    Ok(SplitRecovery {
        stores,
        next_avail: Some(used_idx.wrapping_add(resubmit.len() as u16)),
        resubmit,
        next_counter,
        last_batch_head: header.last_batch_head.get(),
    })
}

/// Initialises a fresh region. The version is stored last, so that the region stays fresh after a crash before it.
fn initialise(entries: &[SplitEntry], used_idx: u16, queue_size: u16) -> SplitRecovery {
    let mut stores = Vec::new();
    for (head, found) in (0..).zip(entries) {
        if found.inflight != 0 {
            stores.u8(entry(head) + INFLIGHT, 0);
        }
        if found.counter.get() != 0 {
            stores.u64(entry(head) + COUNTER, 0);
        }
    }
    stores.u16(DESC_NUM_AT, queue_size);
    stores.u16(LAST_BATCH_HEAD_AT, 0);
    stores.u16(USED_IDX_AT, used_idx);
    stores.u16(VERSION_AT, VERSION);
    SplitRecovery { stores, resubmit: Vec::new(), next_avail: None, next_counter: 1, last_batch_head: 0 }
}

/// The heads of the last batch, which was published and whose marks may not all be cleared yet.
///
/// A device that publishes one request at a time need not store `next`. A circular list shows that `next` was not
/// stored: only the head of such a batch is known.
fn last_batch(header: &SplitHeader, entries: &[SplitEntry], used_idx: u16) -> Result<Vec<u16>, InflightError> {
    let queue_size = entries.len() as u16;
    let (region, ring) = (header.used_idx.get(), used_idx);
    let count = ring.wrapping_sub(region);
    if count > queue_size {
        return Err(InflightError::UsedIndex { region, ring, queue_size });
    }
    let mut seen = vec![false; entries.len()];
    let mut batch = Vec::with_capacity(count.into());
    let mut index = header.last_batch_head.get();
    for _ in 0..count {
        let at = usize::from(index);
        let (Some(entry), Some(seen)) = (entries.get(at), seen.get_mut(at)) else {
            return Err(InflightError::Index { index, queue_size });
        };
        if std::mem::replace(seen, true) {
            batch.truncate(1);
            break;
        }
        batch.push(index);
        index = entry.next.get();
    }
    Ok(batch)
}

/// Offset of the entry of `head`.
#[inline]
fn entry(head: u16) -> usize {
    SPLIT_HEADER_BYTES as usize + usize::from(head) * size_of::<SplitEntry>()
}
