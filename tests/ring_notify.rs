//! Suppression of notifications: neither side waits while there is work for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "kit/ring.rs"]
mod ring;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use proptest::prelude::*;
use ring::{EVENT_IDX, buffer, either, layout, memory, packed_at, packed_layout, ring_at};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{Address, GuestAddress, Memory};
use vhost_migrate::ring::{Chain, DeviceRing, DriverRing, Position, RingError, RingLayout, RingLog};

/// All variants of a ring: packed or not, and features.
const VARIANTS: [(bool, VirtioFeatures); 4] = [(false, NONE), (false, EVENT_IDX), (true, NONE), (true, EVENT_IDX)];
const NONE: VirtioFeatures = VirtioFeatures::empty();

/// An error of one side: it does not read the ring again after it has enabled notifications.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutation {
    None,
    DeviceDoesNotRecheck,
    DriverDoesNotRecheck,
}

/// The next step of a side. A step is one call of the ring, and the two sides are interleaved between such calls. The
/// order inside a call is tested with threads below.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    Work,
    Enable,
    Wait,
}

struct BothSides {
    driver: DriverRing,
    device: DeviceRing,
    chain: Chain,
    /// True if the device has taken the request in `chain`.
    taken: bool,
    driver_next: Next,
    device_next: Next,
    /// True if the driver has kicked and the device has not yet noticed.
    kick: bool,
    /// True if the device has notified and the driver has not yet noticed.
    call: bool,
    to_make: u32,
    done: u32,
    unpublished: bool,
}

impl BothSides {
    fn driver_step(&mut self, mutation: Mutation) {
        match self.driver_next {
            Next::Wait => {
                self.call = false;
                self.driver.disable_notifications();
                self.driver_next = Next::Work;
            }
            Next::Work if self.unpublished => {
                self.kick |= self.driver.publish();
                self.unpublished = false;
            }
            Next::Work if self.driver.pop_used().unwrap().is_some() => self.done += 1,
            Next::Work if self.to_make > 0 && self.driver.add(&[buffer(1, 1)], &[], None).unwrap().is_some() => {
                self.to_make -= 1;
                self.unpublished = true;
            }
            Next::Work => self.driver_next = Next::Enable,
            Next::Enable => {
                let more = self.driver.enable_notifications() && mutation != Mutation::DriverDoesNotRecheck;
                self.driver_next = if more { Next::Work } else { Next::Wait };
            }
        }
    }

    fn device_step(&mut self, mutation: Mutation) {
        match self.device_next {
            Next::Wait => {
                self.kick = false;
                self.device.disable_notifications();
                self.device_next = Next::Work;
            }
            Next::Work if std::mem::take(&mut self.taken) => {
                self.device.push(&self.chain, 0);
                self.call |= self.device.publish();
            }
            Next::Work if self.device.pop(&mut self.chain).unwrap() => self.taken = true,
            Next::Work => self.device_next = Next::Enable,
            Next::Enable => {
                let more = self.device.enable_notifications() && mutation != Mutation::DeviceDoesNotRecheck;
                self.device_next = if more { Next::Work } else { Next::Wait };
            }
        }
    }
}

/// Runs both sides, switching from one to the other before the steps in `switches` and whenever one must wait. Returns
/// the number of steps, or `None` if both wait before all requests are done.
fn run(
    memory: &Memory,
    packed: bool,
    size: u16,
    features: VirtioFeatures,
    switches: &[usize],
    mutation: Mutation,
) -> Option<usize> {
    let (driver, device) = either(memory, packed, size, features);
    let mut both = BothSides {
        driver,
        device,
        chain: Chain::default(),
        taken: false,
        driver_next: Next::Work,
        device_next: Next::Work,
        kick: false,
        call: false,
        to_make: 3,
        done: 0,
        unpublished: false,
    };
    let mut driver_runs = true;
    for step in 0.. {
        if both.done == 3 {
            return Some(step);
        }
        let driver_can = both.driver_next != Next::Wait || both.call;
        let device_can = both.device_next != Next::Wait || both.kick;
        driver_runs = match (driver_can, device_can) {
            (true, true) => driver_runs ^ switches.contains(&step),
            (false, false) => return None,
            (driver_can, _) => driver_can,
        };
        if driver_runs { both.driver_step(mutation) } else { both.device_step(mutation) }
    }
    None
}

/// Runs all schedules with up to three switches between steps, beside the switches that waiting forces. Returns their
/// number, or the switches of one that fails.
fn all_schedules(packed: bool, features: VirtioFeatures, mutation: Mutation) -> Result<usize, Vec<usize>> {
    let (memory, mut runs) = (memory(), 0);
    for size in [1, 2] {
        let max_steps = 45;
        for a in 0..max_steps {
            for b in a..max_steps {
                for c in b..max_steps {
                    let switches = [a, b, c];
                    let switches = if a == b { &switches[..1] } else { &switches[..] };
                    runs += 1;
                    run(&memory, packed, size, features, switches, mutation).ok_or(switches.to_vec())?;
                }
            }
        }
    }
    Ok(runs)
}

#[test]
fn in_no_interleaving_of_calls_both_sides_wait() {
    for (packed, features) in VARIANTS {
        assert!(all_schedules(packed, features, Mutation::None).unwrap() > 10_000);
        for mutation in [Mutation::DeviceDoesNotRecheck, Mutation::DriverDoesNotRecheck] {
            assert!(all_schedules(packed, features, mutation).is_err(), "{mutation:?} is not noticed");
        }
    }
}

const TIMEOUT: Duration = Duration::from_secs(60);

fn notify(to: &Sender<()>) {
    // A full channel already has a notification.
    let _ = to.try_send(());
}

fn wait(from: &Receiver<()>, side: &str) {
    from.recv_timeout(TIMEOUT).unwrap_or_else(|_| panic!("the {side} was not notified"));
}

fn threads(packed: bool, size: u16, features: VirtioFeatures, requests: u32) {
    let (mut driver, mut device) = either(&memory(), packed, size, features);
    let (kick, kicked) = bounded(1);
    let (call, called) = bounded(1);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut chain = Chain::default();
            let mut served = 0;
            while served < requests {
                device.disable_notifications();
                loop {
                    while device.pop(&mut chain).unwrap() {
                        device.push(&chain, 1);
                        served += 1;
                        if served % 3 != 0 && device.publish() {
                            notify(&call);
                        }
                    }
                    if device.publish() {
                        notify(&call);
                    }
                    if !device.enable_notifications() {
                        break;
                    }
                }
                if served < requests {
                    wait(&kicked, "device");
                }
            }
        });
        let (mut made, mut done) = (0, 0);
        while done < requests {
            driver.disable_notifications();
            loop {
                while driver.pop_used().unwrap().is_some() {
                    done += 1;
                }
                while made < requests && driver.add(&[buffer(1, 1)], &[], None).unwrap().is_some() {
                    made += 1;
                    if made % 2 == 0 && driver.publish() {
                        notify(&kick);
                    }
                }
                if driver.publish() {
                    notify(&kick);
                }
                if !driver.enable_notifications() {
                    break;
                }
            }
            if done < requests {
                wait(&called, "driver");
            }
        }
    });
}

#[test]
fn two_threads_that_wait_whenever_they_may_complete_all_requests() {
    for (packed, features) in VARIANTS {
        threads(packed, 1, features, 10_000);
        threads(packed, 4, features, 30_000);
        threads(packed, 256, features, 50_000);
    }
}

/// A reusable barrier of two threads that releases both as simultaneously as possible.
struct Gate(AtomicUsize);

impl Gate {
    fn pass(&self, round: usize) {
        self.0.fetch_add(1, Ordering::AcqRel);
        for spins in 1.. {
            if self.0.load(Ordering::Acquire) >= 2 * round {
                break;
            }
            // The other thread may be waiting for this CPU.
            if spins % 500 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// One side enables notifications at the moment in which the other publishes, many times. For every order of their
/// loads and stores on the CPU, the waiting side sees the published request or the publishing side sees that it must
/// notify.
#[test]
fn one_side_notices_if_the_other_publishes_while_it_enables_notifications() {
    const ROUNDS: usize = 10_000;
    for (packed, features) in VARIANTS {
        for log in [None, Some(Arc::new(Log::create(GuestAddress(1 << 22)).unwrap().0))] {
            let (mut driver, mut device) = either(&memory(), packed, 4, features);
            device.set_log(log.map(|log| RingLog { log, used_gpa: GuestAddress(0) }));
            let gate = Gate(AtomicUsize::new(0));
            let noticed = AtomicUsize::new(0);
            // Counted and checked at the end: after a panic the other thread would wait at the gate for ever.
            let mut lost = (0, 0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut chain = Chain::default();
                    for round in 0..ROUNDS {
                        // Gate 1: the device enables notifications while the driver publishes a request.
                        gate.pass(4 * round + 1);
                        let by_device = device.enable_notifications();
                        noticed.fetch_add(by_device.into(), Ordering::AcqRel);
                        gate.pass(4 * round + 2);
                        device.disable_notifications();
                        assert!(device.pop(&mut chain).unwrap());
                        device.push(&chain, 0);
                        // Gate 3: the driver enables notifications while the device publishes the completion.
                        gate.pass(4 * round + 3);
                        let by_device = device.publish();
                        noticed.fetch_add(by_device.into(), Ordering::AcqRel);
                        gate.pass(4 * round + 4);
                    }
                });
                for round in 0..ROUNDS {
                    driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap();
                    gate.pass(4 * round + 1);
                    let by_driver = driver.publish();
                    noticed.fetch_add(by_driver.into(), Ordering::AcqRel);
                    gate.pass(4 * round + 2);
                    lost.0 += usize::from(noticed.swap(0, Ordering::AcqRel) == 0);
                    gate.pass(4 * round + 3);
                    let by_driver = driver.enable_notifications();
                    noticed.fetch_add(by_driver.into(), Ordering::AcqRel);
                    gate.pass(4 * round + 4);
                    lost.1 += usize::from(noticed.swap(0, Ordering::AcqRel) == 0);
                    driver.disable_notifications();
                    assert!(driver.pop_used().unwrap().is_some());
                }
            });
            assert_eq!(lost, (0, 0), "requests and completions missed, packed {packed}, features {features:#x}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Oracle: the index is moved one by one, and the step to one past the event notifies.
    #[test]
    fn a_split_ring_notifies_exactly_when_the_event_is_passed(
        start in prop_oneof![Just(0xfff8u16), any::<u16>()], batches in prop::collection::vec(1..=8u16, 2..12),
        offset in 0..40u16,
    ) {
        let (memory, layout) = (memory(), layout(8));
        let (mut driver, mut device) = ring_at(&memory, layout, EVENT_IDX, start);
        let event = start.wrapping_add(offset);
        memory.write(layout.avail.unchecked_add(4 + 16), &event.to_le_bytes()).unwrap();
        memory.write(layout.used.unchecked_add(4 + 64), &event.to_le_bytes()).unwrap();
        let mut chain = Chain::default();
        let mut at = start;
        for (number, count) in batches.into_iter().enumerate() {
            (0..count).for_each(|_| { driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap(); });
            let passed = (0..count).any(|i| at.wrapping_add(i) == event);
            prop_assert_eq!(driver.publish(), passed);
            while device.pop(&mut chain).unwrap() {
                device.push(chain.head, 0);
            }
            // The last check before the device was opened is not known, so the first publish always notifies.
            prop_assert_eq!(device.publish(), passed || number == 0);
            while driver.pop_used().unwrap().is_some() {}
            at = at.wrapping_add(count);
        }
        prop_assert!(!device.publish(), "a publish without completions does not notify");
    }

    /// Oracle: the position is moved one by one, and the step over the event's position notifies.
    #[test]
    fn a_packed_ring_notifies_exactly_when_the_events_position_is_passed(
        (size, start, offset) in prop_oneof![4..20u16, Just(32767), Just(32768)]
            .prop_flat_map(|size| (Just(size), prop_oneof![0..size, Just(size - 1)], prop_oneof![0..size, Just(size - 1)])),
        wraps in (any::<bool>(), any::<bool>()), batches in prop::collection::vec((1..=2u16, 1..=2usize), 2..12),
    ) {
        let (memory, layout) = (memory(), packed_layout(size));
        let start = Position { index: start, wrap: wraps.0 };
        let event = Position { index: offset, wrap: wraps.1 };
        let (mut driver, mut device) = packed_at(&memory, layout, EVENT_IDX, start);
        let off_wrap = event.index | u16::from(event.wrap) << 15;
        for area in [layout.driver, layout.device] {
            memory.write(area, &[off_wrap.to_le_bytes(), 2u16.to_le_bytes()].concat()).unwrap();
        }
        let mut chain = Chain::default();
        let mut at = start;
        for (number, (count, length)) in batches.into_iter().enumerate() {
            (0..count).for_each(|_| { driver.add(&vec![buffer(1, 1); length], &[], None).unwrap().unwrap(); });
            let slots = count * length as u16;
            let passed = (0..slots).any(|slot| at.after(slot, size) == event);
            prop_assert_eq!(driver.publish(), passed);
            while device.pop(&mut chain).unwrap() {
                device.push(chain.head, chain.slots, 0);
            }
            prop_assert_eq!(device.publish(), passed || number == 0);
            while driver.pop_used().unwrap().is_some() {}
            at = at.after(slots, size);
        }
        prop_assert!(!device.publish(), "a publish without completions does not notify");
    }
}

#[test]
fn an_invalid_event_area_does_not_suppress_notifications() {
    let (memory, layout) = (memory(), packed_layout(4));
    for (features, flags, notified) in [
        (NONE, 0u16, true),
        (NONE, 1, false),
        (NONE, 2, true),
        (NONE, 3, true),
        (EVENT_IDX, 1, false),
        (EVENT_IDX, 3, true),
        (NONE, 5, false),
    ] {
        let (mut driver, mut device) = packed_at(&memory, layout, features, Position::START);
        for area in [layout.driver, layout.device] {
            memory.write(area.unchecked_add(2), &flags.to_le_bytes()).unwrap();
        }
        driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap();
        assert_eq!(driver.publish(), notified);
        let mut chain = Chain::default();
        assert!(device.pop(&mut chain).unwrap());
        device.push(chain.head, chain.slots, 0);
        assert_eq!(device.publish(), notified);
    }
}

#[test]
fn disabling_and_enabling_notifications_takes_effect_on_the_other_side() {
    for packed in [false, true] {
        let (mut driver, mut device) = either(&memory(), packed, 4, VirtioFeatures::empty());
        let mut chain = Chain::default();
        let mut round = |driver: &mut DriverRing, device: &mut DeviceRing| {
            driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap();
            let kick = driver.publish();
            assert!(device.pop(&mut chain).unwrap());
            device.push(&chain, 0);
            let call = device.publish();
            assert!(driver.pop_used().unwrap().is_some());
            (kick, call)
        };
        assert_eq!(round(&mut driver, &mut device), (true, true));
        device.disable_notifications();
        assert_eq!(round(&mut driver, &mut device), (false, true));
        driver.disable_notifications();
        assert_eq!(round(&mut driver, &mut device), (false, false));
        assert!(!device.enable_notifications() && !driver.enable_notifications());
        assert_eq!(round(&mut driver, &mut device), (true, true));
    }
}

#[test]
fn a_driver_continues_from_its_saved_state_on_a_ring_of_the_same_kind_only() {
    for packed in [false, true] {
        let memory = memory();
        let (mut driver, mut device) = either(&memory, packed, 4, VirtioFeatures::empty());
        let head = driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap();
        let _ = driver.publish();
        let state = driver.state();
        drop(driver);
        let layouts = [RingLayout::Split(layout(4)), RingLayout::Packed(packed_layout(4))];
        let restored = |layout| DriverRing::restore(&memory, layout, VirtioFeatures::empty(), &state);
        let [own, other] = if packed { [layouts[1], layouts[0]] } else { layouts };
        let mut driver = restored(own).unwrap();
        assert_eq!((driver.outstanding(), driver.state()), (1, state.clone()));
        assert!(matches!(restored(other), Err(RingError::State { .. })));
        let mut chain = Chain::default();
        assert!(device.pop(&mut chain).unwrap());
        device.push(&chain, 7);
        let _ = device.publish();
        let used = driver.pop_used().unwrap().unwrap();
        assert_eq!((used.head, used.len, driver.outstanding()), (head, 7, 0));
    }
}

#[test]
fn enabling_notifications_returns_true_if_there_is_work_already() {
    for (packed, features) in VARIANTS {
        let (mut driver, mut device) = either(&memory(), packed, 4, features);
        let mut chain = Chain::default();
        for round in 0..9 {
            assert!(!device.enable_notifications() && !driver.enable_notifications(), "round {round}");
            driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap();
            let _ = driver.publish();
            assert!(device.enable_notifications(), "round {round}: a request");
            assert!(device.pop(&mut chain).unwrap());
            device.push(&chain, 0);
            let _ = device.publish();
            assert!(!device.enable_notifications() && driver.enable_notifications(), "round {round}: a completion");
            assert!(driver.pop_used().unwrap().is_some());
        }
    }
}
