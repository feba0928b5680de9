//! The contents of the dirty log, read through a proxy: exactly the pages that the device wrote, no page without logging,
//! and all pages across a change of the log.

use std::collections::BTreeSet;
use std::ops::Range;

use rstest::rstest;

use crate::backend::{Backend, Kind};
use crate::load::{Load, make_image};
use crate::process::Lab;
use crate::proxy::{Proxy, TestLog};
use crate::qemu::{Disk, Qemu, map_ram};
use crate::qtest_blk::{Machine, Options};
use crate::ram::PAGE;

const PLAIN: Options = Options { queues: 1, queue_size: 128, event_idx: false, indirect: false, packed: false };
const EVENTS: Options = Options { queues: 1, queue_size: 1024, event_idx: true, indirect: false, packed: false };
const MANY: Options = Options { queues: 2, queue_size: 256, event_idx: true, indirect: true, packed: false };

/// A QEMU whose back-end is behind a proxy, with a load on its disk and no request in flight. The fields are dropped in
/// their order.
struct Logged {
    machine: Machine,
    load: Load,
    proxy: Proxy,
    _qemu: Qemu,
    _backend: Backend,
    _lab: Lab,
}

/// The pages that a log must have, and those that it may have.
#[derive(Default)]
struct Expected {
    must: BTreeSet<u64>,
    may: BTreeSet<u64>,
}

impl Logged {
    fn start(kind: Kind, options: Options) -> Logged {
        let lab = Lab::new();
        let image = make_image(&lab);
        let backend = Backend::start(&lab, kind, "backend", &image, options.queues);
        let proxy = Proxy::start(&lab, "proxy.sock", backend.socket());
        let disk = Disk { queues: options.queues, queue_size: options.queue_size, packed: options.packed };
        let qemu = Qemu::guest_free(&lab, "host", proxy.socket(), disk);
        let mut machine = Machine { qtest: qemu.qtest(), ram: map_ram(&lab, "host") };
        let mut load = Load::start(&mut machine, options);
        load.run(&mut machine, 200);
        load.drain(&mut machine);
        Logged { machine, load, proxy, _qemu: qemu, _backend: backend, _lab: lab }
    }

    /// Executes requests. Returns the pages that the device wrote for them, with the used rings logged `moved` bytes
    /// further.
    fn requests(&mut self, moved: u64) -> Expected {
        let mut expected = Expected::default();
        let (seen, events) = (self.seen(), self.events());
        self.load.submit(&mut self.machine, 7);
        for (start, len) in self.load.device_writes() {
            expected.must.extend(pages(start..start + len));
        }
        self.load.drain(&mut self.machine);
        self.expect_rings(&mut expected, &seen, &events, moved);
        expected
    }

    /// The writes to the rings since they were at `seen` and the device waited for `events`. A used ring and an event area
    /// are logged `moved` bytes further, the descriptors of a packed ring at their own address (rule L4.1).
    fn expect_rings(&self, expected: &mut Expected, seen: &[u64], events: &[Vec<u8>], moved: u64) {
        let driver = &self.load.driver;
        let on_descriptors = driver.options.packed;
        for (queue, (&seen, before)) in (0..).zip(seen.iter().zip(events)) {
            let moved_elements = if on_descriptors { 0 } else { moved };
            for (at, len) in driver.used_since(queue, seen) {
                expected.must.extend(pages(at + moved_elements..at + moved_elements + len));
            }
            if !on_descriptors {
                let flags = driver.used_ring(queue) + moved;
                expected.may.extend(pages(flags..flags + 2));
            }
            let (at, len) = driver.device_event(queue);
            let event = pages(at + moved..at + moved + len);
            let changed = self.machine.ram.read(at, len as usize) != *before;
            if changed { &mut expected.must } else { &mut expected.may }.extend(event);
        }
    }

    fn seen(&self) -> Vec<u64> {
        (0..self.load.driver.options.queues).map(|queue| self.load.driver.seen(queue)).collect()
    }

    fn events(&self) -> Vec<Vec<u8>> {
        let event = |queue| {
            let (at, len) = self.load.driver.device_event(queue);
            self.machine.ram.read(at, len as usize)
        };
        (0..self.load.driver.options.queues).map(event).collect()
    }
}

/// The pages that a range of bytes touches.
fn pages(bytes: Range<u64>) -> Range<u64> {
    bytes.start / PAGE..(bytes.end - 1) / PAGE + 1
}

/// Compares a log with the pages that it must and may have. Returns the missing pages and the needless ones.
fn compare(log: &TestLog, expected: &Expected) -> (Vec<u64>, Vec<u64>) {
    let found = log.pages();
    let missed = expected.must.difference(&found).copied().collect();
    let extra =
        found.iter().filter(|page| !expected.must.contains(page) && !expected.may.contains(page)).copied().collect();
    (missed, extra)
}

#[rstest]
#[case::plain_rings(PLAIN, 0)]
#[case::avail_event_on_a_page_of_its_own(EVENTS, 0)]
#[case::two_queues_logged_elsewhere(MANY, 0x1234_5004)]
fn the_log_holds_exactly_what_the_device_wrote(
    #[case] options: Options,
    #[case] moved: u64,
    #[values(false, true)] packed: bool,
) {
    let mut logged = Logged::start(Kind::Ours, Options { packed, ..options });
    for _ in 0..20 {
        let log = TestLog::new();
        logged.proxy.log_on(&log, moved);
        let expected = logged.requests(moved);
        logged.proxy.log_off();
        let (missed, extra) = compare(&log, &expected);
        assert!(missed.is_empty() && extra.is_empty(), "missed pages {missed:#x?}, marked for nothing {extra:#x?}");

        let after = log.pages();
        logged.requests(moved);
        assert_eq!(log.pages(), after, "marked while logging was off");
    }
}

#[rstest]
fn a_switch_of_the_log_under_load_loses_nothing_and_leaves_the_old_one_alone(#[values(false, true)] packed: bool) {
    for options in [PLAIN, EVENTS, MANY] {
        let mut logged = Logged::start(Kind::Ours, Options { packed, ..options });
        let mut old = TestLog::new();
        logged.proxy.log_on(&old, 0);
        for _ in 0..20 {
            let (seen, events) = (logged.seen(), logged.events());
            logged.load.flood(&mut logged.machine);
            let mut expected = Expected::default();
            for (start, len) in logged.load.device_writes() {
                expected.must.extend(pages(start..start + len));
            }
            let new = TestLog::new();
            logged.proxy.switch_log(&new);
            let switched = old.pages();
            logged.load.drain(&mut logged.machine);
            logged.expect_rings(&mut expected, &seen, &events, 0);

            assert_eq!(old.pages(), switched, "the old log was written after the switch");
            let both: BTreeSet<u64> = switched.union(&new.pages()).copied().collect();
            let missed: Vec<_> = expected.must.difference(&both).collect();
            assert!(missed.is_empty(), "missed pages {missed:#x?}");
            old = new;
        }
        logged.proxy.log_off();
    }
}

/// The comparison finds that `qemu-storage-daemon` does not log its writes of avail_event. QEMU does not notice.
#[test]
fn a_back_end_that_does_not_log_avail_event_is_noticed() {
    let mut logged = Logged::start(Kind::StorageDaemon { bytes_per_second: None }, EVENTS);
    let log = TestLog::new();
    logged.proxy.log_on(&log, 0);
    let expected = logged.requests(0);
    logged.proxy.log_off();
    let event = logged.load.driver.device_event(0).0 / PAGE;
    assert_eq!(compare(&log, &expected), (vec![event], vec![]));
}
