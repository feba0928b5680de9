//! Crash model of the inflight tracking of packed rings: a back-end is killed after every single store to the region or
//! to the ring, and its successor loses no request, keeps the order, and does not repeat a request that the guest has
//! seen completed.
//!
//! The stores of the real tracker change a model of the state that survives a crash, as do those of a ring that
//! publishes a batch by storing the flags of its first descriptor last. A second writer stores to the region as DPDK
//! does, one field at a time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use proptest::prelude::*;
use vhost_migrate::abi::inflight::packed_queue_bytes;
use vhost_migrate::abi::virtio::{DESC_F_NEXT, DESC_F_WRITE, PackedDesc};
use vhost_migrate::inflight::{PackedInflight, PackedRecovery, Store, StoreSink, recover_packed};
use vhost_migrate::ring::RingBase;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const HEADER: usize = 32;
const ENTRY: usize = 32;

/// Errors in the tracking. The model must notice each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutation {
    None,
    CommitBeforePublish,
    StageAfterPublish,
    FirstFlagsFirst,
    StaleNotRepaired,
    HeadsNotStored,
    UsedNotStored,
    MarkBeforeCopies,
    BaseIgnoredWhenFresh,
    FrontendsBaseUsed,
    CountersRestart,
    PutBackNotStored,
    PutBackInOrder,
}

/// The implementation that writes the region.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    /// This crate's tracker.
    Tracker(Mutation),
    Dpdk,
}

/// A position and its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq)]
struct At(u16, bool);

impl At {
    fn after(self, count: usize, size: u16) -> At {
        let next = usize::from(self.0) + count;
        if next < size.into() { At(next as u16, self.1) } else { At((next - usize::from(size)) as u16, !self.1) }
    }

    fn before(self, count: usize, size: u16) -> At {
        // Two whole rounds lead back to the same position and wrap counter.
        self.after(usize::from(size) - count, size).after(size.into(), size)
    }

    fn bits(self) -> u32 {
        u32::from(self.0) | u32::from(self.1) << 15
    }
}

fn base(avail: At, used: At) -> RingBase {
    RingBase::from_bits(avail.bits() | used.bits() << 16)
}

fn halves(base: RingBase) -> [At; 2] {
    [base.bits() as u16, (base.bits() >> 16) as u16].map(|half| At(half & 0x7fff, half >> 15 == 1))
}

fn flag_bits(flags: u16) -> (bool, bool) {
    (flags & AVAIL != 0, flags & USED != 0)
}

fn with_bits(flags: u16, avail: bool, used: bool) -> u16 {
    flags & !(AVAIL | USED) | if avail { AVAIL } else { 0 } | if used { USED } else { 0 }
}

/// The state that survives a crash: the region, the ring, and the guest's. A request is its index in `made`.
#[derive(Clone)]
struct CrashState {
    region: Vec<u8>,
    queue_size: u16,
    start: At,
    ring: Vec<PackedDesc>,
    made: Vec<Vec<PackedDesc>>,
    outstanding: BTreeMap<u16, usize>,
    completed: Vec<usize>,
    /// Position at which the driver makes the next request available.
    next: At,
    /// Position at which the driver expects the next used descriptor.
    seen: At,
    /// Number of stores until the kill.
    stores_left: usize,
    /// Number of executed stores.
    stores: usize,
}

impl CrashState {
    fn new(queue_size: u16, ring_size: u16, start: At) -> CrashState {
        // A ring that was used before: in this round up to `start`, in the previous round from there. Only the first
        // descriptor of a chain was marked used.
        let old = |index| {
            let wrap = if index < start.0 { start.1 } else { !start.1 };
            let flags = with_bits(0, wrap, if index % 3 == 0 { wrap } else { !wrap });
            PackedDesc { addr: 0.into(), len: 0.into(), id: 0.into(), flags: flags.into() }
        };
        CrashState {
            region: vec![0; packed_queue_bytes(queue_size) as usize],
            queue_size,
            start,
            ring: (0..ring_size).map(old).collect(),
            made: Vec::new(),
            outstanding: BTreeMap::new(),
            completed: Vec::new(),
            next: start,
            seen: start,
            stores_left: usize::MAX,
            stores: 0,
        }
    }

    fn size(&self) -> u16 {
        self.ring.len() as u16
    }

    fn version(&self) -> u8 {
        self.region[8]
    }

    /// Counts one more store. Returns false if the process was killed before it.
    fn count_store(&mut self) -> bool {
        let executed = self.stores_left > 0;
        self.stores_left -= usize::from(executed);
        self.stores += usize::from(executed);
        executed
    }

    /// The descriptor to be stored to, if the process was not killed before the store.
    fn desc(&mut self, index: u16) -> Option<&mut PackedDesc> {
        self.count_store().then(|| &mut self.ring[usize::from(index)])
    }

    /// The driver makes a request of `count` descriptors available, if the ring has that many free descriptors.
    fn add(&mut self, count: u8) {
        let count = usize::from(count);
        let under_way: usize = self.outstanding.values().map(|request| self.made[*request].len()).sum();
        if under_way + count > self.ring.len() {
            return;
        }
        // Scattered ids, so that the order of ids is not that of requests.
        let size = self.size();
        let mut ids = (0..size).map(|i| i.wrapping_mul(5).wrapping_add(3) % size).chain(0..size);
        let id = ids.find(|id| !self.outstanding.contains_key(id)).expect("an id for each descriptor");
        let request = self.made.len();
        let mut descs = Vec::new();
        for i in 0..count {
            let flags = if i + 1 < count { DESC_F_NEXT } else { 0 } | if i % 2 == 1 { DESC_F_WRITE } else { 0 };
            let flags = with_bits(flags, self.next.1, !self.next.1);
            let addr = (request * 100 + i) as u64;
            let desc = PackedDesc { addr: addr.into(), len: (i as u32 + 7).into(), id: id.into(), flags: flags.into() };
            self.ring[usize::from(self.next.0)] = desc;
            descs.push(desc);
            self.next = self.next.after(1, size);
        }
        self.made.push(descs);
        self.outstanding.insert(id, request);
    }

    /// The driver takes all used descriptors.
    fn harvest(&mut self) -> Result<(), String> {
        loop {
            let desc = self.ring[usize::from(self.seen.0)];
            if flag_bits(desc.flags.get()) != (self.seen.1, self.seen.1) {
                return Ok(());
            }
            let id = desc.id.get();
            let request = self.outstanding.remove(&id).ok_or(format!("{id} is completed, which is not outstanding"))?;
            self.completed.push(request);
            self.seen = self.seen.after(self.made[request].len(), self.size());
        }
    }

    /// The request that the driver has made available at `at`.
    fn available(&self, at: At) -> Option<Vec<PackedDesc>> {
        let mut descs = Vec::new();
        for count in 0..self.ring.len() {
            let At(index, wrap) = at.after(count, self.size());
            let desc = self.ring[usize::from(index)];
            if flag_bits(desc.flags.get()) != (wrap, !wrap) {
                return None;
            }
            descs.push(desc);
            if desc.flags.get() & DESC_F_NEXT == 0 {
                return Some(descs);
            }
        }
        None
    }

    /// Returns true if these requests are in the ring from `at` on.
    fn has(&self, at: At, requests: &[(u16, Vec<PackedDesc>)]) -> bool {
        let descs = requests.iter().flat_map(|(_, descs)| descs).enumerate();
        descs.into_iter().all(|(count, desc)| self.ring[usize::from(at.after(count, self.size()).0)] == *desc)
    }

    fn outstanding(&self) -> Vec<usize> {
        let mut requests: Vec<usize> = self.outstanding.values().copied().collect();
        requests.sort_unstable();
        requests
    }
}

fn request_of(descs: &[PackedDesc]) -> usize {
    descs[0].addr.get() as usize / 100
}

/// The region as the process writes it.
struct CrashSink {
    state: Rc<RefCell<CrashState>>,
    mutation: Mutation,
    /// Stores of copies that a mutation delays until the mark.
    delayed: Vec<Store>,
}

impl CrashSink {
    fn put(&mut self, store: Store) {
        match (self.mutation, store) {
            (Mutation::HeadsNotStored, Store::U16(12 | 14, _)) | (Mutation::UsedNotStored, Store::U64(16, _)) => return,
            (Mutation::MarkBeforeCopies, Store::U64(offset, _)) if offset >= HEADER => {
                return self.delayed.push(store);
            }
            _ => {}
        }
        let delayed = if matches!(store, Store::U8(..)) { std::mem::take(&mut self.delayed) } else { Vec::new() };
        for store in std::iter::once(store).chain(delayed) {
            let mut state = self.state.borrow_mut();
            if state.count_store() {
                store.to(&mut state.region[..]);
            }
        }
    }
}

impl StoreSink for CrashSink {
    fn u8(&mut self, offset: usize, value: u8) {
        self.put(Store::U8(offset, value));
    }
    fn u16(&mut self, offset: usize, value: u16) {
        self.put(Store::U16(offset, value));
    }
    fn u32(&mut self, offset: usize, value: u32) {
        self.put(Store::U32(offset, value));
    }
    fn u64(&mut self, offset: usize, value: u64) {
        self.put(Store::U64(offset, value));
    }
}

/// DPDK's algorithm: the mark first, every field by itself, one request at a time. Its commit stores index and wrap
/// counter one after the other.
struct Dpdk {
    sink: CrashSink,
    counter: u64,
}

impl Dpdk {
    /// Initialises a region as DPDK does in GET_INFLIGHT_FD, SET_INFLIGHT_FD and at the first start.
    fn new(mut sink: CrashSink) -> Dpdk {
        let size = sink.state.borrow().queue_size;
        for wrap in [20, 21] {
            sink.u8(wrap, 1);
        }
        (0..size).for_each(|index| sink.u16(Dpdk::at(index) + 2, index + 1));
        sink.u16(10, size);
        sink.u16(8, 1);
        Dpdk { sink, counter: 0 }
    }

    fn at(index: u16) -> usize {
        HEADER + ENTRY * usize::from(index)
    }

    fn word(&self, offset: usize) -> u16 {
        let state = self.sink.state.borrow();
        u16::from_le_bytes([state.region[offset], state.region[offset + 1]])
    }

    fn take(&mut self, descs: &[PackedDesc]) -> u16 {
        let head = self.word(14);
        let mut free = head;
        self.sink.u16(Dpdk::at(head) + 6, 0);
        self.sink.u64(Dpdk::at(head) + 8, self.counter);
        self.counter += 1;
        self.sink.u8(Dpdk::at(head), 1);
        for (num, desc) in (1..).zip(descs) {
            self.sink.u16(Dpdk::at(head) + 6, num);
            self.sink.u64(Dpdk::at(free) + 24, desc.addr.get());
            self.sink.u32(Dpdk::at(free) + 20, desc.len.get());
            self.sink.u16(Dpdk::at(free) + 18, desc.flags.get());
            self.sink.u16(Dpdk::at(free) + 16, desc.id.get());
            self.sink.u16(Dpdk::at(head) + 4, free);
            free = self.word(Dpdk::at(free) + 2);
            self.sink.u16(12, free);
        }
        self.sink.u16(14, free);
        head
    }

    fn stage(&mut self, head: u16) {
        let last = self.word(Dpdk::at(head) + 4);
        self.sink.u16(Dpdk::at(last) + 2, self.word(12));
        self.sink.u16(12, head);
        let (used, size) = (self.word(16) + self.word(Dpdk::at(head) + 6), self.word(10));
        self.sink.u16(16, used);
        if used >= size {
            self.sink.u16(16, used - size);
            let wrap = self.word(20) as u8;
            self.sink.u8(20, wrap ^ 1);
        }
    }

    fn commit(&mut self, head: u16) {
        self.sink.u8(Dpdk::at(head), 0);
        self.sink.u16(14, self.word(12));
        self.sink.u16(18, self.word(16));
        let wrap = self.word(20) as u8;
        self.sink.u8(21, wrap);
    }
}

/// The running writer of the region.
enum RunningWriter {
    Tracker(PackedInflight<CrashSink>),
    Dpdk(Dpdk),
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest makes requests available that have these numbers of descriptors.
    Add(Vec<u8>),
    /// The device takes this many requests.
    Take(u8),
    /// The device completes a batch, picked from the requests that it has taken.
    Complete(Vec<u8>),
    /// The device puts back this many of the requests that it took last.
    PutBack(u8),
    /// The guest takes all used descriptors.
    Harvest,
}

/// The recovery of a successor, the position of the next request that it takes, and its used position.
fn recover(state: &CrashState, mutation: Mutation) -> Result<(PackedRecovery, At, At), String> {
    // The front-end's base is that of the first connection (rule I4.5).
    let mut given = base(state.start, state.start);
    if mutation == Mutation::BaseIgnoredWhenFresh && state.version() == 0 {
        given = base(At(0, true), At(0, true));
    }
    let flags_of = |index| state.ring[usize::from(index)].flags.get();
    let found = recover_packed(&state.region, state.queue_size, state.size(), given, flags_of);
    let mut recovery = found.map_err(|e| e.to_string())?;
    match mutation {
        Mutation::CountersRestart => recovery.next_counter = 1,
        Mutation::StaleNotRepaired => recovery.stale.clear(),
        Mutation::FrontendsBaseUsed => recovery.base = None,
        _ => {}
    }
    let [avail, used] = halves(recovery.base.unwrap_or(given));
    Ok((recovery, avail, used))
}

/// Checks the recovery of a successor that starts now: with an idle guest, after the guest has taken used descriptors,
/// and after it has made more requests available.
fn check(state: &CrashState, mutation: Mutation) -> Result<(), String> {
    let mut busy = state.clone();
    busy.harvest()?;
    check_one(state, mutation)?;
    check_one(&busy, mutation)?;
    (0..busy.size()).for_each(|i| busy.add(i as u8 % 3 + 1));
    check_one(&busy, mutation).map_err(|e| format!("{e} (after further requests of the guest)"))
}

fn check_one(state: &CrashState, mutation: Mutation) -> Result<(), String> {
    let (recovery, avail, _) = recover(state, mutation)?;
    let mut guest = state.clone();
    guest.harvest()?;
    let mut all = Vec::new();
    for found in &recovery.resubmit {
        let request = request_of(&found.descs);
        if state.made.get(request) != Some(&found.descs) {
            return Err(format!("the guest has not made {found:?}"));
        }
        if !guest.outstanding().contains(&request) {
            return Err(format!("{request}, which the guest has seen completed, is repeated"));
        }
        all.push(request);
    }
    let mut at = avail;
    while let Some(descs) = state.available(at) {
        all.push(request_of(&descs));
        at = at.after(descs.len(), state.size());
        if all.len() > state.ring.len() {
            return Err("more requests than the ring holds".into());
        }
    }
    if !all.is_sorted() {
        return Err(format!("requests are out of order: {all:?}"));
    }
    if all != guest.outstanding() {
        return Err(format!("requests to be served: {:?}, served: {all:?}", guest.outstanding()));
    }
    if state.version() == 1
        && resubmit_by_the_specification(state) != recovery.resubmit.iter().map(|r| r.entry).collect::<Vec<_>>()
    {
        return Err("recovery by the specification gives other requests".into());
    }
    for stop in 0..=recovery.stores.len() + recovery.stale.len() {
        let mut killed = state.clone();
        recovery.stores.iter().take(stop).for_each(|store| store.to(&mut killed.region[..]));
        let repaired = stop.saturating_sub(recovery.stores.len());
        for (index, flags) in &recovery.stale[..repaired] {
            killed.ring[usize::from(*index)].flags = (*flags).into();
        }
        let (second, second_avail, _) = recover(&killed, mutation)?;
        if (&second.resubmit, second_avail) != (&recovery.resubmit, avail) {
            return Err(format!("killed after {stop} stores of recovery: {second:?}, expected {recovery:?}"));
        }
        if second.stale != recovery.stale[repaired..] {
            return Err(format!("killed after {stop} stores of recovery: stale are {:?}", second.stale));
        }
    }
    Ok(())
}

/// The entries that a recovery by the text of the specification resubmits, corrected for batches as long as the ring,
/// which the text does not cover.
fn resubmit_by_the_specification(state: &CrashState) -> Vec<u16> {
    let word = |offset: usize| u16::from_le_bytes([state.region[offset], state.region[offset + 1]]);
    let (used, old) = ((word(16), state.region[20]), (word(18), state.region[21]));
    let wrap = old.1 == 1;
    let flags = state.ring[usize::from(old.0)].flags.get();
    let committed = used != old && flag_bits(flags) != (wrap, !wrap);
    let mut free = if committed { word(12) } else { word(14) };
    let mut marked: BTreeMap<(u64, u16), ()> = BTreeMap::new();
    for index in 0..state.queue_size {
        let at = HEADER + ENTRY * usize::from(index);
        if state.region[at] == 1 {
            marked.insert((u64::from_le_bytes(state.region[at + 8..at + 16].try_into().unwrap()), index), ());
        }
    }
    for _ in 0..state.queue_size {
        if free < state.queue_size {
            marked.retain(|(_, index), ()| *index != free);
            free = word(HEADER + ENTRY * usize::from(free) + 2);
        }
    }
    marked.into_keys().map(|(_, index)| index).collect()
}

/// Runs a back-end until `steps` are done or it is killed. Returns the number of steps that it began.
fn run_process(state: CrashState, steps: &[Step], writer: Writer) -> Result<(CrashState, usize), String> {
    let mutation = match writer {
        Writer::Tracker(mutation) => mutation,
        Writer::Dpdk => Mutation::None,
    };
    let size = state.size();
    let (recovery, mut avail, mut used) = recover(&state, mutation)?;
    let state = Rc::new(RefCell::new(state));
    let sink = CrashSink { state: state.clone(), mutation, delayed: Vec::new() };
    let mut tracker = match writer {
        Writer::Tracker(_) => RunningWriter::Tracker(PackedInflight::resume(sink, &recovery)),
        Writer::Dpdk => RunningWriter::Dpdk(Dpdk::new(sink)),
    };
    for (index, flags) in &recovery.stale {
        if let Some(desc) = state.borrow_mut().desc(*index) {
            desc.flags = (*flags).into();
        }
    }
    let mut held: Vec<(u16, Vec<PackedDesc>)> = recovery.resubmit.into_iter().map(|r| (r.entry, r.descs)).collect();
    let mut begun = 0;
    while state.borrow().stores_left > 0 && begun < steps.len() {
        match &steps[begun] {
            Step::Add(counts) => counts.iter().for_each(|count| state.borrow_mut().add(*count)),
            Step::Harvest => state.borrow_mut().harvest()?,
            Step::Take(count) => {
                for _ in 0..*count {
                    let found = state.borrow().available(avail);
                    let Some(descs) = found else { break };
                    let entry = match &mut tracker {
                        RunningWriter::Tracker(inflight) => inflight.take(&descs).ok_or("no entry for a request")?,
                        RunningWriter::Dpdk(dpdk) if state.borrow().stores_left > 0 => dpdk.take(&descs),
                        RunningWriter::Dpdk(_) => break,
                    };
                    avail = avail.after(descs.len(), size);
                    held.push((entry, descs));
                }
            }
            Step::PutBack(count) => {
                let last = held.split_off(held.len().saturating_sub(usize::from(*count)));
                let back = avail.before(last.iter().map(|(_, descs)| descs.len()).sum(), size);
                match &mut tracker {
                    RunningWriter::Tracker(inflight) if state.borrow().has(back, &last) => {
                        let mut entries: Vec<u16> = last.iter().rev().map(|(entry, _)| *entry).collect();
                        match mutation {
                            Mutation::PutBackNotStored => entries.clear(),
                            Mutation::PutBackInOrder => entries.reverse(),
                            _ => {}
                        }
                        entries.into_iter().for_each(|entry| inflight.put_back(entry));
                        avail = back;
                    }
                    // DPDK puts nothing back, and requests whose descriptors are overwritten cannot be put back.
                    _ => held.extend(last),
                }
            }
            Step::Complete(picks) => {
                let mut batch = Vec::new();
                for pick in picks.iter().take(held.len()) {
                    batch.push(held.remove(usize::from(*pick) % held.len()));
                }
                // DPDK publishes one request at a time.
                let batch_size = if writer == Writer::Dpdk { 1 } else { batch.len().max(1) };
                for batch in batch.chunks(batch_size) {
                    complete(&state, &mut tracker, batch, &mut used, mutation);
                }
            }
        }
        begun += 1;
    }
    drop(tracker);
    Ok((Rc::into_inner(state).expect("the process has ended").into_inner(), begun))
}

fn complete(
    state: &RefCell<CrashState>,
    tracker: &mut RunningWriter,
    batch: &[(u16, Vec<PackedDesc>)],
    used: &mut At,
    mutation: Mutation,
) {
    let stage = |tracker: &mut RunningWriter| {
        for (entry, _) in batch {
            match tracker {
                RunningWriter::Tracker(inflight) => inflight.stage(*entry),
                RunningWriter::Dpdk(dpdk) => dpdk.stage(*entry),
            }
        }
    };
    let commit = |tracker: &mut RunningWriter| match tracker {
        RunningWriter::Tracker(inflight) => inflight.commit(),
        RunningWriter::Dpdk(dpdk) => dpdk.commit(batch[0].0),
    };
    let mut publish = || {
        let mut state = state.borrow_mut();
        let mut elements = Vec::new();
        for (_, descs) in batch {
            elements.push((*used, descs.last().expect("a descriptor").id));
            *used = used.after(descs.len(), state.size());
        }
        if mutation != Mutation::FirstFlagsFirst {
            elements.reverse();
        }
        for (At(index, wrap), id) in elements {
            if let Some(desc) = state.desc(index) {
                desc.id = id;
            }
            if let Some(desc) = state.desc(index) {
                desc.flags = with_bits(0, wrap, wrap).into();
            }
        }
    };
    match mutation {
        Mutation::CommitBeforePublish => {
            stage(tracker);
            commit(tracker);
            publish();
        }
        Mutation::StageAfterPublish => {
            publish();
            stage(tracker);
            commit(tracker);
        }
        _ => {
            stage(tracker);
            publish();
            commit(tracker);
        }
    }
}

/// Runs `steps` and kills the first process after every possible number of stores, and each successor after a few
/// stores. Returns the number of kills.
fn kill_everywhere(new: &CrashState, steps: &[Step], first: Writer) -> Result<usize, String> {
    let (mutation, successor) = match first {
        Writer::Tracker(mutation) => (mutation, first),
        Writer::Dpdk => (Mutation::None, Writer::Tracker(Mutation::None)),
    };
    let (done, _) = run_process(new.clone(), steps, first)?;
    let mut kills = 0;
    for stores_left in 0..=done.stores {
        let (mut state, begun) = run_process(CrashState { stores_left, ..new.clone() }, steps, first)?;
        // The initialisation by DPDK, before it is connected, is not killed.
        if first == Writer::Dpdk && state.version() == 0 {
            continue;
        }
        check(&state, mutation).map_err(|e| format!("killed after store {stores_left}: {e}"))?;
        kills += 1;
        // Each successor gets one store more than the one before, so that every phase of a successor is killed too.
        let mut rest = &steps[begun..];
        for process in 1.. {
            state.stores_left = stores_left % 7 + process;
            let (next, begun) = run_process(state, rest, successor)?;
            state = next;
            check(&state, mutation)
                .map_err(|e| format!("killed after store {stores_left}, successor {process}: {e}"))?;
            kills += 1;
            rest = &rest[begun..];
            if rest.is_empty() {
                break;
            }
        }
        // The last successor is not killed and completes everything, one request after the other.
        state.stores_left = usize::MAX;
        let mut all = vec![Step::Take(u8::MAX)];
        all.extend((0..new.size()).flat_map(|i| [Step::Complete(vec![i as u8]), Step::Harvest]));
        let (mut state, _) = run_process(state, &all, successor)
            .map_err(|e| format!("killed after store {stores_left}, last successor: {e}"))?;
        state.harvest()?;
        if !state.outstanding.is_empty() || state.completed.len() != state.made.len() {
            return Err(format!("killed after store {stores_left}: {:?} never completed", state.outstanding()));
        }
    }
    Ok(kills)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec(1..5u8, 1..4).prop_map(Step::Add),
        (1..6u8).prop_map(Step::Take),
        prop::collection::vec(any::<u8>(), 1..6).prop_map(Step::Complete),
        (1..4u8).prop_map(Step::PutBack),
        Just(Step::Harvest),
    ]
}

/// Sizes of the region's queues and of the ring, which need not be a power of two.
fn sizes() -> impl Strategy<Value = (u16, u16)> {
    prop::sample::select(vec![(1, 1), (2, 2), (3, 3), (4, 4), (8, 5), (8, 8), (16, 13)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Rules I4.1 to I4.5, I4.7, I4.9, I6.1 and I6.2.
    #[test]
    fn a_kill_after_any_store_loses_reorders_and_repeats_no_request(
        (queue_size, ring_size) in sizes(), index in any::<u16>(), wrap in any::<bool>(),
        steps in prop::collection::vec(step(), 1..20)
    ) {
        let new = CrashState::new(queue_size, ring_size, At(index % ring_size, wrap));
        let kills = kill_everywhere(&new, &steps, Writer::Tracker(Mutation::None)).map_err(TestCaseError::fail)?;
        prop_assert!(kills > 0);
    }

    /// Rule I4.8.
    #[test]
    fn a_region_written_by_dpdk_is_recovered_after_a_kill_at_any_store(
        size in prop::sample::select(vec![2u16, 4, 7, 8]), steps in prop::collection::vec(step(), 1..20)
    ) {
        let kills = kill_everywhere(&CrashState::new(size, size, At(0, true)), &steps, Writer::Dpdk);
        prop_assert!(kills.map_err(TestCaseError::fail)? > 0);
    }
}

#[test]
fn the_model_notices_every_mutation_of_the_tracker() {
    use Step::{Add, Complete, Harvest, PutBack, Take};
    let steps = [
        Add(vec![1, 3, 1]),
        Take(3),
        Complete(vec![1, 0]),
        Harvest,
        Add(vec![2, 2]),
        Take(2),
        Complete(vec![2, 0]),
        Harvest,
        Add(vec![1, 1, 1]),
        Take(4),
        Complete(vec![1]),
        Harvest,
        Complete(vec![2, 0]),
        Harvest,
        Add(vec![3, 4]),
        Take(2),
        Complete(vec![1, 0, 0]),
        Harvest,
        Add(vec![1, 3, 2]),
        Take(3),
        Complete(vec![0]),
        PutBack(2),
        Take(1),
        Add(vec![1]),
        Complete(vec![0]),
    ];
    let new = CrashState::new(8, 8, At(5, false));
    assert!(kill_everywhere(&new, &steps, Writer::Tracker(Mutation::None)).unwrap() > 100);
    for mutation in [
        Mutation::CommitBeforePublish,
        Mutation::StageAfterPublish,
        Mutation::FirstFlagsFirst,
        Mutation::StaleNotRepaired,
        Mutation::HeadsNotStored,
        Mutation::UsedNotStored,
        Mutation::MarkBeforeCopies,
        Mutation::BaseIgnoredWhenFresh,
        Mutation::FrontendsBaseUsed,
        Mutation::CountersRestart,
        Mutation::PutBackNotStored,
        Mutation::PutBackInOrder,
    ] {
        let noticed = kill_everywhere(&new, &steps, Writer::Tracker(mutation));
        assert!(noticed.is_err(), "{mutation:?} is not noticed");
    }
}
