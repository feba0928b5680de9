//! Crash model of the inflight tracking of split rings: a back-end is killed after every single store, and its
//! successor loses no request, keeps the order, and does not repeat a request that the guest has seen completed.
//!
//! The stores of the real tracker change a model of the state that survives a crash. After a given number of stores,
//! the one that publishes the used index included, further stores have no effect, as if the process had been killed
//! there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use proptest::prelude::*;
use vhost_migrate::abi::inflight::split_queue_bytes;
use vhost_migrate::inflight::{SplitInflight, SplitRecovery, Store, StoreSink, recover_split};

/// Errors in the tracking. The model must notice each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutation {
    None,
    CommitBeforePublish,
    StageAfterPublish,
    NextNotStored,
    MarkBeforeCounter,
    UsedIndexIgnoredWhenFresh,
    CountersRestart,
    RecoveryStoresReversed,
    PutBackNotStored,
    PutBackInOrder,
}

/// The implementation that writes the region.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    /// This crate's tracker.
    Tracker(Mutation),
    /// libvhost-user's and DPDK's algorithm, which publishes one request at a time and does not store `next`.
    LibvhostUser,
}

/// The state that survives a crash: the region, the rings, and the guest's. A request is its position in `avail`.
#[derive(Clone)]
struct CrashState {
    region: Vec<u8>,
    size: u16,
    /// Index of both rings when the region was fresh.
    start: u16,
    avail: Vec<u16>,
    completed: Vec<u16>,
    outstanding: BTreeMap<u16, usize>,
    /// Number of stores until the kill.
    stores_left: usize,
    /// Number of executed stores.
    stores: usize,
}

impl CrashState {
    fn new(size: u16, start: u16) -> CrashState {
        let region = vec![0; split_queue_bytes(size) as usize];
        let (avail, completed, outstanding) = (Vec::new(), Vec::new(), BTreeMap::new());
        CrashState { region, size, start, avail, completed, outstanding, stores_left: usize::MAX, stores: 0 }
    }

    fn used_idx(&self) -> u16 {
        self.start.wrapping_add(self.completed.len() as u16)
    }

    /// Counts one more store. Returns false if the process was killed before it.
    fn count_store(&mut self) -> bool {
        let executed = self.stores_left > 0;
        self.stores_left -= usize::from(executed);
        self.stores += usize::from(executed);
        executed
    }

    fn publish(&mut self, batch: &[u16]) {
        if self.count_store() {
            for head in batch {
                self.outstanding.remove(head).expect("a request is completed once");
                self.completed.push(*head);
            }
        }
    }
}

/// The region as the process writes it.
struct CrashSink {
    state: Rc<RefCell<CrashState>>,
    mutation: Mutation,
    /// Store of a counter that a mutation delays.
    delayed: Option<Store>,
}

impl CrashSink {
    fn put(&mut self, store: Store) {
        let next_of_an_entry = matches!(store, Store::U16(offset, _) if offset >= 16);
        match (self.mutation, store) {
            (Mutation::NextNotStored, _) if next_of_an_entry => return,
            (Mutation::MarkBeforeCounter, Store::U64(..)) => return self.delayed = Some(store),
            _ => {}
        }
        for store in [Some(store), self.delayed.take()].into_iter().flatten() {
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

/// The algorithm of libvhost-user. To complete a request it stores its head, publishes it, clears its mark, and then
/// stores the used index. It only stores the version in a fresh region; `desc_num` is stored when the region is made.
struct LibvhostUser {
    sink: CrashSink,
    counter: u64,
}

impl LibvhostUser {
    fn new(mut sink: CrashSink) -> LibvhostUser {
        let size = sink.state.borrow().size;
        sink.u16(10, size);
        sink.u16(8, 1);
        LibvhostUser { sink, counter: 0 }
    }

    fn at(head: u16) -> usize {
        16 + 16 * usize::from(head)
    }

    fn take(&mut self, head: u16) {
        self.sink.u64(LibvhostUser::at(head) + 8, self.counter);
        self.counter += 1;
        self.sink.u8(LibvhostUser::at(head), 1);
    }

    fn complete(&mut self, head: u16) {
        self.sink.u16(12, head);
        let state = self.sink.state.clone();
        state.borrow_mut().publish(&[head]);
        self.sink.u8(LibvhostUser::at(head), 0);
        let used = state.borrow().used_idx();
        self.sink.u16(14, used);
    }
}

/// The running writer of the region.
enum RunningWriter {
    Tracker(SplitInflight<CrashSink>),
    LibvhostUser(LibvhostUser),
}

impl RunningWriter {
    fn take(&mut self, head: u16) {
        match self {
            RunningWriter::Tracker(inflight) => inflight.take(head),
            RunningWriter::LibvhostUser(writer) => writer.take(head),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// The guest makes this many requests available.
    Add(u8),
    /// The device takes this many requests.
    Take(u8),
    /// The device completes a batch, picked from the requests that it has taken.
    Complete(Vec<u8>),
    /// The device puts back this many of the requests that it took last.
    PutBack(u8),
}

/// The recovery of a successor, and the position of the next request that it takes.
fn recover(state: &CrashState, mutation: Mutation) -> Result<(SplitRecovery, usize), String> {
    let used_idx = match mutation {
        Mutation::UsedIndexIgnoredWhenFresh if state.region[8] == 0 => 0,
        _ => state.used_idx(),
    };
    let mut recovery = recover_split(&state.region, used_idx, state.size).map_err(|e| e.to_string())?;
    if mutation == Mutation::CountersRestart {
        recovery.next_counter = 1;
    }
    if mutation == Mutation::RecoveryStoresReversed && state.region[8] != 0 {
        recovery.stores.reverse();
    }
    let next = recovery.next_avail.map_or(0, |next| next.wrapping_sub(state.used_idx()));
    Ok((recovery, state.completed.len() + usize::from(next)))
}

/// Checks the recovery of a successor that starts now.
fn check(state: &CrashState, mutation: Mutation) -> Result<(), String> {
    let (recovery, next) = recover(state, mutation)?;
    let mut all = Vec::new();
    for head in &recovery.resubmit {
        all.push(
            *state.outstanding.get(head).ok_or(format!("{head}, which the guest has seen completed, is repeated"))?,
        );
    }
    if !all.is_sorted() {
        return Err(format!("requests are out of order: {all:?}"));
    }
    if next > state.avail.len() {
        return Err("requests are taken that the guest has not made".into());
    }
    all.extend(next..state.avail.len());
    all.sort_unstable();
    let outstanding: Vec<usize> = {
        let mut positions: Vec<usize> = state.outstanding.values().copied().collect();
        positions.sort_unstable();
        positions
    };
    if all != outstanding {
        return Err(format!("requests to be served: {outstanding:?}, served: {all:?}"));
    }
    for stop in 0..=recovery.stores.len() {
        let mut killed = state.clone();
        recovery.stores[..stop].iter().for_each(|store| store.to(&mut killed.region[..]));
        let (second, second_next) = recover(&killed, mutation)?;
        if (&second.resubmit, second_next) != (&recovery.resubmit, next) {
            return Err(format!("killed after {stop} stores of recovery: {second:?}, expected {recovery:?}"));
        }
    }
    Ok(())
}

/// Runs a back-end until `steps` are done or it is killed. Returns the number of steps that it began.
fn run_process(state: CrashState, steps: &[Step], writer: Writer) -> Result<(CrashState, usize), String> {
    let mutation = match writer {
        Writer::Tracker(mutation) => mutation,
        Writer::LibvhostUser => Mutation::None,
    };
    let state = Rc::new(RefCell::new(state));
    let (recovery, mut next) = recover(&state.borrow(), mutation)?;
    let sink = CrashSink { state: state.clone(), mutation, delayed: None };
    let mut tracker = match writer {
        Writer::Tracker(_) => RunningWriter::Tracker(SplitInflight::resume(sink, &recovery)),
        Writer::LibvhostUser => RunningWriter::LibvhostUser(LibvhostUser::new(sink)),
    };
    let mut held = recovery.resubmit.clone();
    let mut begun = 0;
    while state.borrow().stores_left > 0 && begun < steps.len() {
        match &steps[begun] {
            Step::Add(count) => {
                let mut state = state.borrow_mut();
                // Scattered heads, so that the order of heads is not that of requests.
                let free = |head: &u16| !state.outstanding.contains_key(head);
                let heads: Vec<u16> =
                    (0..state.size).map(|i| i.wrapping_mul(5).wrapping_add(3) % state.size).filter(free).collect();
                for head in heads.into_iter().take((*count).into()) {
                    let position = state.avail.len();
                    if state.outstanding.insert(head, position).is_none() {
                        state.avail.push(head);
                    }
                }
            }
            Step::Take(count) => {
                for _ in 0..*count {
                    let head = state.borrow().avail.get(next).copied();
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
                    RunningWriter::Tracker(inflight) if state.borrow().avail[back..next] == last[..] => {
                        match mutation {
                            Mutation::PutBackNotStored => {}
                            Mutation::PutBackInOrder => last.iter().for_each(|head| inflight.put_back(*head)),
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
                    RunningWriter::Tracker(inflight) => complete(&state, inflight, &batch, mutation),
                    RunningWriter::LibvhostUser(writer) => batch.iter().for_each(|head| writer.complete(*head)),
                }
            }
        }
        begun += 1;
    }
    drop(tracker);
    Ok((Rc::into_inner(state).expect("the process has ended").into_inner(), begun))
}

fn complete(state: &RefCell<CrashState>, inflight: &mut SplitInflight<CrashSink>, batch: &[u16], mutation: Mutation) {
    if batch.is_empty() {
        return;
    }
    let after = state.borrow().used_idx().wrapping_add(batch.len() as u16);
    match mutation {
        Mutation::CommitBeforePublish => {
            batch.iter().for_each(|head| inflight.stage(*head));
            inflight.commit(after);
            state.borrow_mut().publish(batch);
        }
        Mutation::StageAfterPublish => {
            state.borrow_mut().publish(batch);
            batch.iter().for_each(|head| inflight.stage(*head));
            inflight.commit(after);
        }
        _ => {
            batch.iter().for_each(|head| inflight.stage(*head));
            state.borrow_mut().publish(batch);
            inflight.commit(after);
        }
    }
}

/// Runs `steps` and kills the first process after every possible number of stores, and each successor after a few
/// stores. Returns the number of kills.
fn kill_everywhere(size: u16, start: u16, steps: &[Step], first: Writer) -> Result<usize, String> {
    let (mutation, successor) = match first {
        Writer::Tracker(mutation) => (mutation, first),
        Writer::LibvhostUser => (Mutation::None, Writer::Tracker(Mutation::None)),
    };
    let (done, _) = run_process(CrashState::new(size, start), steps, first)?;
    let mut kills = 0;
    for stores_left in 0..=done.stores {
        let (mut state, begun) = run_process(CrashState { stores_left, ..CrashState::new(size, start) }, steps, first)?;
        // The initialisation by other implementations, before they are connected, is not killed.
        if first == Writer::LibvhostUser && state.region[8] == 0 {
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
        // The last successor is not killed and completes everything.
        state.stores_left = usize::MAX;
        let all = [Step::Take(u8::MAX), Step::Complete(vec![0; usize::from(size)])];
        let (state, _) = run_process(state, &all, successor)?;
        if !state.outstanding.is_empty() || state.completed.len() != state.avail.len() {
            return Err(format!("killed after store {stores_left}: {:?} never completed", state.outstanding));
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

    /// Rules I2.1 to I2.3, I3.1 to I3.4, I6.1 and I6.2.
    #[test]
    fn a_kill_after_any_store_loses_reorders_and_repeats_no_request(
        size in size(), start in start(), steps in prop::collection::vec(step(), 1..24)
    ) {
        prop_assert!(kill_everywhere(size, start, &steps, Writer::Tracker(Mutation::None)).map_err(TestCaseError::fail)? > 0);
    }

    /// Rule I3.2.
    #[test]
    fn a_region_written_by_libvhost_user_is_recovered_after_a_kill_at_any_store(
        size in size(), steps in prop::collection::vec(step(), 1..24)
    ) {
        prop_assert!(kill_everywhere(size, 0, &steps, Writer::LibvhostUser).map_err(TestCaseError::fail)? > 0);
    }
}

#[test]
fn the_model_notices_every_mutation_of_the_tracker() {
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
    assert!(kill_everywhere(8, 5, &steps, Writer::Tracker(Mutation::None)).unwrap() > 100);
    for mutation in [
        Mutation::CommitBeforePublish,
        Mutation::StageAfterPublish,
        Mutation::NextNotStored,
        Mutation::MarkBeforeCounter,
        Mutation::UsedIndexIgnoredWhenFresh,
        Mutation::CountersRestart,
        Mutation::RecoveryStoresReversed,
        Mutation::PutBackNotStored,
        Mutation::PutBackInOrder,
    ] {
        assert!(kill_everywhere(8, 5, &steps, Writer::Tracker(mutation)).is_err(), "{mutation:?} is not noticed");
    }
}
