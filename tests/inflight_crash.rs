//! A back-end dies at every single store, and its successor knows what to do: nothing lost, order kept, nothing done
//! twice that the guest has seen done.
//!
//! The stores of the real tracker go into a world with a fuse: after so many of them, counting the one that publishes
//! the used index, nothing more happens, as if the process had been killed there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use proptest::prelude::*;
use vhost_migrate::abi::inflight::split_queue_bytes;
use vhost_migrate::inflight::{SplitInflight, SplitRecovery, Store, StoreSink, recover_split};

/// Ways to do it wrong, each of which the model must notice.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutation {
    None,
    CommitBeforePublish,
    StageAfterPublish,
    NextNotKept,
    MarkBeforeCounter,
    UsedIndexForgottenWhenFresh,
    CountersStartOver,
    RecoveryBackwards,
    PutBackUnmarked,
    PutBackFirstFirst,
}

/// Who keeps the region.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    Ours(Mutation),
    /// One by the rules of libvhost-user and DPDK, which publish one request at a time and keep no `next`.
    OneByOne,
}

/// What survives a kill: the region, the rings, and what the guest knows. A request is its position in `avail`.
#[derive(Clone)]
struct World {
    region: Vec<u8>,
    size: u16,
    /// Index that the rings stood at when the region was fresh.
    start: u16,
    avail: Vec<u16>,
    completed: Vec<u16>,
    outstanding: BTreeMap<u16, usize>,
    /// Stores until the kill, and stores made.
    fuse: usize,
    made: usize,
}

impl World {
    fn new(size: u16, start: u16) -> World {
        let region = vec![0; split_queue_bytes(size) as usize];
        let (avail, completed, outstanding) = (Vec::new(), Vec::new(), BTreeMap::new());
        World { region, size, start, avail, completed, outstanding, fuse: usize::MAX, made: 0 }
    }

    fn used_idx(&self) -> u16 {
        self.start.wrapping_add(self.completed.len() as u16)
    }

    /// Whether the process lives to do one more store.
    fn lives(&mut self) -> bool {
        let lives = self.fuse > 0;
        self.fuse -= usize::from(lives);
        self.made += usize::from(lives);
        lives
    }

    fn publish(&mut self, batch: &[u16]) {
        if self.lives() {
            for head in batch {
                self.outstanding.remove(head).expect("a request is completed once");
                self.completed.push(*head);
            }
        }
    }
}

/// The region as the process sees it.
struct Shared {
    world: Rc<RefCell<World>>,
    mutation: Mutation,
    /// A counter held back.
    late: Option<Store>,
}

impl Shared {
    fn put(&mut self, store: Store) {
        let next_of_an_entry = matches!(store, Store::U16(offset, _) if offset >= 16);
        match (self.mutation, store) {
            (Mutation::NextNotKept, _) if next_of_an_entry => return,
            (Mutation::MarkBeforeCounter, Store::U64(..)) => return self.late = Some(store),
            _ => {}
        }
        for store in [Some(store), self.late.take()].into_iter().flatten() {
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

/// A writer of the region that stores the head of what it completes, publishes it, clears its mark and then stores the
/// used index. A region that is fresh gets its version and nothing else: `desc_num` is stored when the region is made.
struct OneByOne {
    shared: Shared,
    counter: u64,
}

impl OneByOne {
    fn new(mut shared: Shared) -> OneByOne {
        let size = shared.world.borrow().size;
        shared.u16(10, size);
        shared.u16(8, 1);
        OneByOne { shared, counter: 0 }
    }

    fn at(head: u16) -> usize {
        16 + 16 * usize::from(head)
    }

    fn take(&mut self, head: u16) {
        self.shared.u64(OneByOne::at(head) + 8, self.counter);
        self.counter += 1;
        self.shared.u8(OneByOne::at(head), 1);
    }

    fn complete(&mut self, head: u16) {
        self.shared.u16(12, head);
        let world = self.shared.world.clone();
        world.borrow_mut().publish(&[head]);
        self.shared.u8(OneByOne::at(head), 0);
        let used = world.borrow().used_idx();
        self.shared.u16(14, used);
    }
}

/// Whichever keeps the region.
enum Tracker {
    Ours(SplitInflight<Shared>),
    OneByOne(OneByOne),
}

impl Tracker {
    fn take(&mut self, head: u16) {
        match self {
            Tracker::Ours(inflight) => inflight.take(head),
            Tracker::OneByOne(writer) => writer.take(head),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest makes this many requests available.
    Add(u8),
    /// The device takes this many.
    Take(u8),
    /// The device completes a batch: picks among what it holds.
    Complete(Vec<u8>),
    /// The device gives back as many of the last requests that it holds.
    PutBack(u8),
}

/// What a successor finds: requests to serve again, and the position of the next one to take.
fn find(world: &World, mutation: Mutation) -> Result<(SplitRecovery, usize), String> {
    let used_idx = match mutation {
        Mutation::UsedIndexForgottenWhenFresh if world.region[8] == 0 => 0,
        _ => world.used_idx(),
    };
    let mut recovery = recover_split(&world.region, used_idx, world.size).map_err(|e| e.to_string())?;
    if mutation == Mutation::CountersStartOver {
        recovery.next_counter = 1;
    }
    if mutation == Mutation::RecoveryBackwards && world.region[8] != 0 {
        recovery.stores.reverse();
    }
    let next = recovery.next_avail.map_or(0, |next| next.wrapping_sub(world.used_idx()));
    Ok((recovery, world.completed.len() + usize::from(next)))
}

/// The promises, for a successor that starts now; with how many stores it repairs the region.
fn check(world: &World, mutation: Mutation) -> Result<usize, String> {
    let (recovery, next) = find(world, mutation)?;
    let mut all = Vec::new();
    for head in &recovery.resubmit {
        all.push(*world.outstanding.get(head).ok_or(format!("{head} again, which the guest has seen completed"))?);
    }
    if !all.is_sorted() {
        return Err(format!("order not kept: {all:?}"));
    }
    if next > world.avail.len() {
        return Err("requests taken that nobody made".into());
    }
    all.extend(next..world.avail.len());
    all.sort_unstable();
    let outstanding: Vec<usize> = {
        let mut positions: Vec<usize> = world.outstanding.values().copied().collect();
        positions.sort_unstable();
        positions
    };
    if all != outstanding {
        return Err(format!("to be served {outstanding:?}, would be served {all:?}"));
    }
    for stop in 0..=recovery.stores.len() {
        let mut killed = world.clone();
        recovery.stores[..stop].iter().for_each(|store| store.to(&mut killed.region[..]));
        let (second, second_next) = find(&killed, mutation)?;
        if (&second.resubmit, second_next) != (&recovery.resubmit, next) {
            return Err(format!("killed after {stop} stores of recovery: {second:?} and not {recovery:?}"));
        }
    }
    Ok(recovery.stores.len())
}

/// One life of a back-end, until `steps` are done or it is killed. Returns how many steps were begun.
fn live(world: World, steps: &[Step], writer: Writer) -> Result<(World, usize), String> {
    let mutation = match writer {
        Writer::Ours(mutation) => mutation,
        Writer::OneByOne => Mutation::None,
    };
    let world = Rc::new(RefCell::new(world));
    let (recovery, mut next) = find(&world.borrow(), mutation)?;
    let shared = Shared { world: world.clone(), mutation, late: None };
    let mut tracker = match writer {
        Writer::Ours(_) => Tracker::Ours(SplitInflight::resume(shared, &recovery)),
        Writer::OneByOne => Tracker::OneByOne(OneByOne::new(shared)),
    };
    let mut held = recovery.resubmit.clone();
    let mut begun = 0;
    while world.borrow().fuse > 0 && begun < steps.len() {
        match &steps[begun] {
            Step::Add(count) => {
                let mut world = world.borrow_mut();
                // Scattered heads, so that their order is not that of the requests.
                let free = |head: &u16| !world.outstanding.contains_key(head);
                let heads: Vec<u16> =
                    (0..world.size).map(|i| i.wrapping_mul(5).wrapping_add(3) % world.size).filter(free).collect();
                for head in heads.into_iter().take((*count).into()) {
                    let position = world.avail.len();
                    if world.outstanding.insert(head, position).is_none() {
                        world.avail.push(head);
                    }
                }
            }
            Step::Take(count) => {
                for _ in 0..*count {
                    let head = world.borrow().avail.get(next).copied();
                    if let Some(head) = head {
                        tracker.take(head);
                        held.push(head);
                        next += 1;
                    }
                }
            }
            Step::PutBack(count) => {
                let last = held.split_off(held.len().saturating_sub(usize::from(*count)));
                let back = next - last.len();
                match &mut tracker {
                    Tracker::Ours(inflight) if world.borrow().avail[back..next] == last[..] => {
                        match mutation {
                            Mutation::PutBackUnmarked => {}
                            Mutation::PutBackFirstFirst => last.iter().for_each(|head| inflight.put_back(*head)),
                            _ => last.iter().rev().for_each(|head| inflight.put_back(*head)),
                        }
                        next = back;
                    }
                    _ => held.extend(last),
                }
            }
            Step::Complete(picks) => {
                let mut batch = Vec::new();
                for pick in picks.iter().take(held.len()) {
                    batch.push(held.remove(usize::from(*pick) % held.len()));
                }
                match &mut tracker {
                    Tracker::Ours(inflight) => complete(&world, inflight, &batch, mutation),
                    Tracker::OneByOne(writer) => batch.iter().for_each(|head| writer.complete(*head)),
                }
            }
        }
        begun += 1;
    }
    drop(tracker);
    Ok((Rc::into_inner(world).expect("the process is gone").into_inner(), begun))
}

fn complete(world: &RefCell<World>, inflight: &mut SplitInflight<Shared>, batch: &[u16], mutation: Mutation) {
    if batch.is_empty() {
        return;
    }
    let after = world.borrow().used_idx().wrapping_add(batch.len() as u16);
    match mutation {
        Mutation::CommitBeforePublish => {
            batch.iter().for_each(|head| inflight.stage(*head));
            inflight.commit(after);
            world.borrow_mut().publish(batch);
        }
        Mutation::StageAfterPublish => {
            world.borrow_mut().publish(batch);
            batch.iter().for_each(|head| inflight.stage(*head));
            inflight.commit(after);
        }
        _ => {
            batch.iter().for_each(|head| inflight.stage(*head));
            world.borrow_mut().publish(batch);
            inflight.commit(after);
        }
    }
}

/// Runs `steps` with a kill after every possible number of stores, and after some of those with a second kill.
fn kill_everywhere(size: u16, start: u16, steps: &[Step], first: Writer) -> Result<usize, String> {
    let (mutation, ours) = match first {
        Writer::Ours(mutation) => (mutation, first),
        Writer::OneByOne => (Mutation::None, Writer::Ours(Mutation::None)),
    };
    let (done, _) = live(World::new(size, start), steps, first)?;
    let mut kills = 0;
    for fuse in 0..=done.made {
        let (mut world, begun) = live(World { fuse, ..World::new(size, start) }, steps, first)?;
        // What others do before they are connected is not killed here.
        if first == Writer::OneByOne && world.region[8] == 0 {
            continue;
        }
        check(&world, mutation).map_err(|e| format!("killed after store {fuse}: {e}"))?;
        kills += 1;
        // The successors get a few stores more each time, so that every phase of theirs is hit too.
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
        // The last one lives, and everything comes to its end.
        world.fuse = usize::MAX;
        let all = [Step::Take(u8::MAX), Step::Complete(vec![0; usize::from(size)])];
        let (world, _) = live(world, &all, ours)?;
        if !world.outstanding.is_empty() || world.completed.len() != world.avail.len() {
            return Err(format!("killed after store {fuse}: {:?} never completed", world.outstanding));
        }
    }
    Ok(kills)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..6u8).prop_map(Step::Add),
        (1..6u8).prop_map(Step::Take),
        prop::collection::vec(any::<u8>(), 1..6).prop_map(Step::Complete),
        (1..4u8).prop_map(Step::PutBack),
    ]
}

fn size() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![1, 2, 4, 8, 64])
}

fn start() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), Just(u16::MAX - 3), any::<u16>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn killed_at_any_store_nothing_is_lost_reordered_or_done_again(
        size in size(), start in start(), steps in prop::collection::vec(step(), 1..24)
    ) {
        prop_assert!(kill_everywhere(size, start, &steps, Writer::Ours(Mutation::None)).map_err(TestCaseError::fail)? > 0);
    }

    #[test]
    fn a_region_that_libvhost_user_kept_up_to_any_store_is_taken_over(
        size in size(), steps in prop::collection::vec(step(), 1..24)
    ) {
        prop_assert!(kill_everywhere(size, 0, &steps, Writer::OneByOne).map_err(TestCaseError::fail)? > 0);
    }
}

#[test]
fn the_model_notices_every_wrong_order_of_stores() {
    use Step::{Add, Complete, PutBack, Take};
    let steps = [
        Add(4),
        Take(2),
        Complete(vec![1, 0]),
        Take(2),
        Add(3),
        Complete(vec![1]),
        Take(2),
        Complete(vec![2, 0]),
        Add(4),
        Take(5),
        Complete(vec![3, 0, 1]),
        Add(3),
        Take(4),
        PutBack(3),
        Take(1),
        Complete(vec![1]),
    ];
    assert!(kill_everywhere(8, 5, &steps, Writer::Ours(Mutation::None)).unwrap() > 100);
    for mutation in [
        Mutation::CommitBeforePublish,
        Mutation::StageAfterPublish,
        Mutation::NextNotKept,
        Mutation::MarkBeforeCounter,
        Mutation::UsedIndexForgottenWhenFresh,
        Mutation::CountersStartOver,
        Mutation::RecoveryBackwards,
        Mutation::PutBackUnmarked,
        Mutation::PutBackFirstFirst,
    ] {
        assert!(kill_everywhere(8, 5, &steps, Writer::Ours(mutation)).is_err(), "{mutation:?} went unnoticed");
    }
}
