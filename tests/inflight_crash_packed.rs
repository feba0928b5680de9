//! A back-end on a packed ring dies at every single store, to the region or to the ring, and its successor knows what
//! to do: nothing lost, order kept, nothing done twice that the guest has seen done.
//!
//! The stores of the real tracker go into a world with a fuse, as do those of a ring that publishes a batch by writing
//! the flags of its first descriptor last. A second writer keeps the region as DPDK does, one field at a time.
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

/// Ways to do it wrong, each of which the model must notice.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutation {
    None,
    CommitBeforePublish,
    StageAfterPublish,
    FirstFlagsFirst,
    StaleLeftAlone,
    HeadsNotKept,
    UsedNotKept,
    MarkBeforeCopies,
    BaseForgottenWhenFresh,
    FrontendsBaseBelieved,
    CountersStartOver,
    PutBackUnmarked,
    PutBackFirstFirst,
}

/// Who keeps the region.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    Ours(Mutation),
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
        // Two rounds are none.
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

/// What survives a kill: the region, the ring, and what the guest knows. A request is its place in `made`.
#[derive(Clone)]
struct World {
    region: Vec<u8>,
    queue_size: u16,
    start: At,
    ring: Vec<PackedDesc>,
    made: Vec<Vec<PackedDesc>>,
    outstanding: BTreeMap<u16, usize>,
    completed: Vec<usize>,
    /// Where the driver makes available, and where it looks for what is used.
    next: At,
    seen: At,
    /// Stores until the kill, and stores made.
    fuse: usize,
    stores: usize,
}

impl World {
    fn new(queue_size: u16, ring_size: u16, start: At) -> World {
        // A ring that was used before: this lap up to `start`, the former one behind it. Of a chain only the first
        // descriptor was marked used.
        let old = |index| {
            let wrap = if index < start.0 { start.1 } else { !start.1 };
            let flags = with_bits(0, wrap, if index % 3 == 0 { wrap } else { !wrap });
            PackedDesc { addr: 0.into(), len: 0.into(), id: 0.into(), flags: flags.into() }
        };
        World {
            region: vec![0; packed_queue_bytes(queue_size) as usize],
            queue_size,
            start,
            ring: (0..ring_size).map(old).collect(),
            made: Vec::new(),
            outstanding: BTreeMap::new(),
            completed: Vec::new(),
            next: start,
            seen: start,
            fuse: usize::MAX,
            stores: 0,
        }
    }

    fn size(&self) -> u16 {
        self.ring.len() as u16
    }

    fn version(&self) -> u8 {
        self.region[8]
    }

    /// Whether the process lives to do one more store.
    fn lives(&mut self) -> bool {
        let lives = self.fuse > 0;
        self.fuse -= usize::from(lives);
        self.stores += usize::from(lives);
        lives
    }

    fn desc(&mut self, index: u16) -> Option<&mut PackedDesc> {
        self.lives().then(|| &mut self.ring[usize::from(index)])
    }

    /// The driver makes a request of `count` descriptors available, if there is room.
    fn add(&mut self, count: u8) {
        let count = usize::from(count);
        let under_way: usize = self.outstanding.values().map(|request| self.made[*request].len()).sum();
        if under_way + count > self.ring.len() {
            return;
        }
        // Scattered ids, so that their order is not that of the requests.
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

    /// The driver takes note of what is used.
    fn harvest(&mut self) -> Result<(), String> {
        loop {
            let desc = self.ring[usize::from(self.seen.0)];
            if flag_bits(desc.flags.get()) != (self.seen.1, self.seen.1) {
                return Ok(());
            }
            let id = desc.id.get();
            let request =
                self.outstanding.remove(&id).ok_or(format!("{id} completed, which the guest doesn't wait for"))?;
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

    /// Whether these requests stand in the ring from `at` on.
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

/// The region as the process sees it.
struct Shared {
    world: Rc<RefCell<World>>,
    mutation: Mutation,
    /// Copies held back until the mark.
    late: Vec<Store>,
}

impl Shared {
    fn put(&mut self, store: Store) {
        match (self.mutation, store) {
            (Mutation::HeadsNotKept, Store::U16(12 | 14, _)) | (Mutation::UsedNotKept, Store::U64(16, _)) => return,
            (Mutation::MarkBeforeCopies, Store::U64(offset, _)) if offset >= HEADER => return self.late.push(store),
            _ => {}
        }
        let late = if matches!(store, Store::U8(..)) { std::mem::take(&mut self.late) } else { Vec::new() };
        for store in std::iter::once(store).chain(late) {
            let mut world = self.world.borrow_mut();
            if world.lives() {
                store.to(&mut world.region[..]);
            }
        }
    }
}

impl StoreSink for Shared {
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

/// A writer of the region by DPDK's rules: the mark first, every field by itself, one request at a time; the last
/// commit stores index and wrap counter one after the other.
struct Dpdk {
    shared: Shared,
    counter: u64,
}

impl Dpdk {
    /// What its GET_INFLIGHT_FD, SET_INFLIGHT_FD and first start make of a region.
    fn new(mut shared: Shared) -> Dpdk {
        let size = shared.world.borrow().queue_size;
        for wrap in [20, 21] {
            shared.u8(wrap, 1);
        }
        (0..size).for_each(|index| shared.u16(Dpdk::at(index) + 2, index + 1));
        shared.u16(10, size);
        shared.u16(8, 1);
        Dpdk { shared, counter: 0 }
    }

    fn at(index: u16) -> usize {
        HEADER + ENTRY * usize::from(index)
    }

    fn word(&self, offset: usize) -> u16 {
        let world = self.shared.world.borrow();
        u16::from_le_bytes([world.region[offset], world.region[offset + 1]])
    }

    fn take(&mut self, descs: &[PackedDesc]) -> u16 {
        let head = self.word(14);
        let mut free = head;
        self.shared.u16(Dpdk::at(head) + 6, 0);
        self.shared.u64(Dpdk::at(head) + 8, self.counter);
        self.counter += 1;
        self.shared.u8(Dpdk::at(head), 1);
        for (num, desc) in (1..).zip(descs) {
            self.shared.u16(Dpdk::at(head) + 6, num);
            self.shared.u64(Dpdk::at(free) + 24, desc.addr.get());
            self.shared.u32(Dpdk::at(free) + 20, desc.len.get());
            self.shared.u16(Dpdk::at(free) + 18, desc.flags.get());
            self.shared.u16(Dpdk::at(free) + 16, desc.id.get());
            self.shared.u16(Dpdk::at(head) + 4, free);
            free = self.word(Dpdk::at(free) + 2);
            self.shared.u16(12, free);
        }
        self.shared.u16(14, free);
        head
    }

    fn stage(&mut self, head: u16) {
        let last = self.word(Dpdk::at(head) + 4);
        self.shared.u16(Dpdk::at(last) + 2, self.word(12));
        self.shared.u16(12, head);
        let (used, size) = (self.word(16) + self.word(Dpdk::at(head) + 6), self.word(10));
        self.shared.u16(16, used);
        if used >= size {
            self.shared.u16(16, used - size);
            let wrap = self.word(20) as u8;
            self.shared.u8(20, wrap ^ 1);
        }
    }

    fn commit(&mut self, head: u16) {
        self.shared.u8(Dpdk::at(head), 0);
        self.shared.u16(14, self.word(12));
        self.shared.u16(18, self.word(16));
        let wrap = self.word(20) as u8;
        self.shared.u8(21, wrap);
    }
}

/// Whichever keeps the region.
enum Tracker {
    Ours(PackedInflight<Shared>),
    Dpdk(Dpdk),
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest makes requests of so many descriptors available.
    Add(Vec<u8>),
    /// The device takes this many.
    Take(u8),
    /// The device completes a batch: picks among what it holds.
    Complete(Vec<u8>),
    /// The device gives back as many of the last requests that it holds.
    PutBack(u8),
    /// The guest looks at what is used.
    Harvest,
}

/// What a successor finds, and where it takes the next request and puts the next used one.
fn find(world: &World, mutation: Mutation) -> Result<(PackedRecovery, At, At), String> {
    // The base that a front-end gives is as old as the connection (rule I4.5).
    let mut given = base(world.start, world.start);
    if mutation == Mutation::BaseForgottenWhenFresh && world.version() == 0 {
        given = base(At(0, true), At(0, true));
    }
    let flags_of = |index| world.ring[usize::from(index)].flags.get();
    let found = recover_packed(&world.region, world.queue_size, world.size(), given, flags_of);
    let mut recovery = found.map_err(|e| e.to_string())?;
    match mutation {
        Mutation::CountersStartOver => recovery.next_counter = 1,
        Mutation::StaleLeftAlone => recovery.stale.clear(),
        Mutation::FrontendsBaseBelieved => recovery.base = None,
        _ => {}
    }
    let [avail, used] = halves(recovery.base.unwrap_or(given));
    Ok((recovery, avail, used))
}

/// The promises, for a successor that starts now, with the guest asleep or busy in the meantime.
fn check(world: &World, mutation: Mutation) -> Result<(), String> {
    let mut awake = world.clone();
    awake.harvest()?;
    check_one(world, mutation)?;
    check_one(&awake, mutation)?;
    (0..awake.size()).for_each(|i| awake.add(i as u8 % 3 + 1));
    check_one(&awake, mutation).map_err(|e| format!("{e} (after the guest went on)"))
}

fn check_one(world: &World, mutation: Mutation) -> Result<(), String> {
    let (recovery, avail, _) = find(world, mutation)?;
    let mut guest = world.clone();
    guest.harvest()?;
    let mut all = Vec::new();
    for found in &recovery.resubmit {
        let request = request_of(&found.descs);
        if world.made.get(request) != Some(&found.descs) {
            return Err(format!("never made: {found:?}"));
        }
        if !guest.outstanding().contains(&request) {
            return Err(format!("{request} again, which the guest has seen completed"));
        }
        all.push(request);
    }
    let mut at = avail;
    while let Some(descs) = world.available(at) {
        all.push(request_of(&descs));
        at = at.after(descs.len(), world.size());
        if all.len() > world.ring.len() {
            return Err("more than the ring holds".into());
        }
    }
    if !all.is_sorted() {
        return Err(format!("order not kept: {all:?}"));
    }
    if all != guest.outstanding() {
        return Err(format!("to be served {:?}, would be served {all:?}", guest.outstanding()));
    }
    if world.version() == 1
        && by_the_specification(world) != recovery.resubmit.iter().map(|r| r.entry).collect::<Vec<_>>()
    {
        return Err("one that recovers by the specification would serve others".into());
    }
    for stop in 0..=recovery.stores.len() + recovery.stale.len() {
        let mut killed = world.clone();
        recovery.stores.iter().take(stop).for_each(|store| store.to(&mut killed.region[..]));
        let repaired = stop.saturating_sub(recovery.stores.len());
        for (index, flags) in &recovery.stale[..repaired] {
            killed.ring[usize::from(*index)].flags = (*flags).into();
        }
        let (second, second_avail, _) = find(&killed, mutation)?;
        if (&second.resubmit, second_avail) != (&recovery.resubmit, avail) {
            return Err(format!("killed after {stop} stores of recovery: {second:?} and not {recovery:?}"));
        }
        if second.stale != recovery.stale[repaired..] {
            return Err(format!("killed after {stop} stores of recovery: stale are {:?}", second.stale));
        }
    }
    Ok(())
}

/// The entries that a successor would serve which follows the text of the specification, besides what the text leaves
/// out: that a batch may be as long as the ring.
fn by_the_specification(world: &World) -> Vec<u16> {
    let word = |offset: usize| u16::from_le_bytes([world.region[offset], world.region[offset + 1]]);
    let (used, old) = ((word(16), world.region[20]), (word(18), world.region[21]));
    let wrap = old.1 == 1;
    let flags = world.ring[usize::from(old.0)].flags.get();
    let committed = used != old && flag_bits(flags) != (wrap, !wrap);
    let mut free = if committed { word(12) } else { word(14) };
    let mut marked: BTreeMap<(u64, u16), ()> = BTreeMap::new();
    for index in 0..world.queue_size {
        let at = HEADER + ENTRY * usize::from(index);
        if world.region[at] == 1 {
            marked.insert((u64::from_le_bytes(world.region[at + 8..at + 16].try_into().unwrap()), index), ());
        }
    }
    for _ in 0..world.queue_size {
        if free < world.queue_size {
            marked.retain(|(_, index), ()| *index != free);
            free = word(HEADER + ENTRY * usize::from(free) + 2);
        }
    }
    marked.into_keys().map(|(_, index)| index).collect()
}

/// One life of a back-end, until `steps` are done or it is killed. Returns how many steps were begun.
fn live(world: World, steps: &[Step], writer: Writer) -> Result<(World, usize), String> {
    let mutation = match writer {
        Writer::Ours(mutation) => mutation,
        Writer::Dpdk => Mutation::None,
    };
    let size = world.size();
    let (recovery, mut avail, mut used) = find(&world, mutation)?;
    let world = Rc::new(RefCell::new(world));
    let shared = Shared { world: world.clone(), mutation, late: Vec::new() };
    let mut tracker = match writer {
        Writer::Ours(_) => Tracker::Ours(PackedInflight::resume(shared, &recovery)),
        Writer::Dpdk => Tracker::Dpdk(Dpdk::new(shared)),
    };
    for (index, flags) in &recovery.stale {
        if let Some(desc) = world.borrow_mut().desc(*index) {
            desc.flags = (*flags).into();
        }
    }
    let mut held: Vec<(u16, Vec<PackedDesc>)> = recovery.resubmit.into_iter().map(|r| (r.entry, r.descs)).collect();
    let mut begun = 0;
    while world.borrow().fuse > 0 && begun < steps.len() {
        match &steps[begun] {
            Step::Add(counts) => counts.iter().for_each(|count| world.borrow_mut().add(*count)),
            Step::Harvest => world.borrow_mut().harvest()?,
            Step::Take(count) => {
                for _ in 0..*count {
                    let found = world.borrow().available(avail);
                    let Some(descs) = found else { break };
                    let entry = match &mut tracker {
                        Tracker::Ours(inflight) => inflight.take(&descs).ok_or("no entry for a request")?,
                        Tracker::Dpdk(dpdk) if world.borrow().fuse > 0 => dpdk.take(&descs),
                        Tracker::Dpdk(_) => break,
                    };
                    avail = avail.after(descs.len(), size);
                    held.push((entry, descs));
                }
            }
            Step::PutBack(count) => {
                let last = held.split_off(held.len().saturating_sub(usize::from(*count)));
                let back = avail.before(last.iter().map(|(_, descs)| descs.len()).sum(), size);
                match &mut tracker {
                    Tracker::Ours(inflight) if world.borrow().has(back, &last) => {
                        let mut entries: Vec<u16> = last.iter().rev().map(|(entry, _)| *entry).collect();
                        match mutation {
                            Mutation::PutBackUnmarked => entries.clear(),
                            Mutation::PutBackFirstFirst => entries.reverse(),
                            _ => {}
                        }
                        entries.into_iter().for_each(|entry| inflight.put_back(entry));
                        avail = back;
                    }
                    // DPDK gives nothing back, and nobody what is written over.
                    _ => held.extend(last),
                }
            }
            Step::Complete(picks) => {
                let mut batch = Vec::new();
                for pick in picks.iter().take(held.len()) {
                    batch.push(held.remove(usize::from(*pick) % held.len()));
                }
                // DPDK publishes one request at a time.
                let most = if writer == Writer::Dpdk { 1 } else { batch.len().max(1) };
                for batch in batch.chunks(most) {
                    complete(&world, &mut tracker, batch, &mut used, mutation);
                }
            }
        }
        begun += 1;
    }
    drop(tracker);
    Ok((Rc::into_inner(world).expect("the process is gone").into_inner(), begun))
}

fn complete(
    world: &RefCell<World>,
    tracker: &mut Tracker,
    batch: &[(u16, Vec<PackedDesc>)],
    used: &mut At,
    mutation: Mutation,
) {
    let stage = |tracker: &mut Tracker| {
        for (entry, _) in batch {
            match tracker {
                Tracker::Ours(inflight) => inflight.stage(*entry),
                Tracker::Dpdk(dpdk) => dpdk.stage(*entry),
            }
        }
    };
    let commit = |tracker: &mut Tracker| match tracker {
        Tracker::Ours(inflight) => inflight.commit(),
        Tracker::Dpdk(dpdk) => dpdk.commit(batch[0].0),
    };
    let mut publish = || {
        let mut world = world.borrow_mut();
        let mut elements = Vec::new();
        for (_, descs) in batch {
            elements.push((*used, descs.last().expect("a descriptor").id));
            *used = used.after(descs.len(), world.size());
        }
        if mutation != Mutation::FirstFlagsFirst {
            elements.reverse();
        }
        for (At(index, wrap), id) in elements {
            if let Some(desc) = world.desc(index) {
                desc.id = id;
            }
            if let Some(desc) = world.desc(index) {
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

/// Runs `steps` with a kill of `first` after every possible number of stores, and of its successors after a few each.
fn kill_everywhere(new: &World, steps: &[Step], first: Writer) -> Result<usize, String> {
    let (mutation, ours) = match first {
        Writer::Ours(mutation) => (mutation, first),
        Writer::Dpdk => (Mutation::None, Writer::Ours(Mutation::None)),
    };
    let (done, _) = live(new.clone(), steps, first)?;
    let mut kills = 0;
    for fuse in 0..=done.stores {
        let (mut world, begun) = live(World { fuse, ..new.clone() }, steps, first)?;
        // What DPDK does before it is connected is not killed here.
        if first == Writer::Dpdk && world.version() == 0 {
            continue;
        }
        check(&world, mutation).map_err(|e| format!("killed after store {fuse}: {e}"))?;
        kills += 1;
        let mut rest = &steps[begun..];
        for patience in 1.. {
            world.fuse = fuse % 7 + patience;
            let (next, begun) = live(world, rest, ours)?;
            world = next;
            check(&world, mutation).map_err(|e| format!("killed after store {fuse}, life {patience}: {e}"))?;
            kills += 1;
            rest = &rest[begun..];
            if rest.is_empty() {
                break;
            }
        }
        // The last one lives, and everything comes to its end, one request after the other.
        world.fuse = usize::MAX;
        let mut all = vec![Step::Take(u8::MAX)];
        all.extend((0..new.size()).flat_map(|i| [Step::Complete(vec![i as u8]), Step::Harvest]));
        let (mut world, _) = live(world, &all, ours).map_err(|e| format!("killed after store {fuse}: at last {e}"))?;
        world.harvest()?;
        if !world.outstanding.is_empty() || world.completed.len() != world.made.len() {
            return Err(format!("killed after store {fuse}: {:?} never completed", world.outstanding()));
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

/// Sizes of the region's queues and of the ring, which need be no power of two.
fn sizes() -> impl Strategy<Value = (u16, u16)> {
    prop::sample::select(vec![(1, 1), (2, 2), (3, 3), (4, 4), (8, 5), (8, 8), (16, 13)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn killed_at_any_store_nothing_is_lost_reordered_or_done_again(
        (queue_size, ring_size) in sizes(), index in any::<u16>(), wrap in any::<bool>(),
        steps in prop::collection::vec(step(), 1..20)
    ) {
        let new = World::new(queue_size, ring_size, At(index % ring_size, wrap));
        let kills = kill_everywhere(&new, &steps, Writer::Ours(Mutation::None)).map_err(TestCaseError::fail)?;
        prop_assert!(kills > 0);
    }

    #[test]
    fn a_region_that_dpdk_kept_up_to_any_store_is_taken_over(
        size in prop::sample::select(vec![2u16, 4, 7, 8]), steps in prop::collection::vec(step(), 1..20)
    ) {
        let kills = kill_everywhere(&World::new(size, size, At(0, true)), &steps, Writer::Dpdk);
        prop_assert!(kills.map_err(TestCaseError::fail)? > 0);
    }
}

#[test]
fn the_model_notices_every_wrong_order_of_stores() {
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
    let new = World::new(8, 8, At(5, false));
    assert!(kill_everywhere(&new, &steps, Writer::Ours(Mutation::None)).unwrap() > 100);
    for mutation in [
        Mutation::CommitBeforePublish,
        Mutation::StageAfterPublish,
        Mutation::FirstFlagsFirst,
        Mutation::StaleLeftAlone,
        Mutation::HeadsNotKept,
        Mutation::UsedNotKept,
        Mutation::MarkBeforeCopies,
        Mutation::BaseForgottenWhenFresh,
        Mutation::FrontendsBaseBelieved,
        Mutation::CountersStartOver,
        Mutation::PutBackUnmarked,
        Mutation::PutBackFirstFirst,
    ] {
        let noticed = kill_everywhere(&new, &steps, Writer::Ours(mutation));
        assert!(noticed.is_err(), "{mutation:?} went unnoticed");
    }
}
