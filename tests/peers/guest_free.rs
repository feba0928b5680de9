//! QEMU without a guest: migrations under load, with a comparison of the memory of source and destination, and back-ends
//! that are killed.

use rstest::rstest;
use serde_json::json;

use crate::backend::{Backend, Kind};
use crate::load::{Load, make_image};
use crate::migration::{self, NEVER_CONVERGES};
use crate::process::{Lab, wait_for};
use crate::qemu::{Disk, Qemu, map_ram};
use crate::qtest_blk::{Machine, Options};
use crate::ram::Ram;

const PLAIN: Options = Options { queues: 1, queue_size: 128, event_idx: false, indirect: false, packed: false };
const EVENTS: Options = Options { queues: 1, queue_size: 1024, event_idx: true, indirect: false, packed: false };
const MANY: Options = Options { queues: 2, queue_size: 256, event_idx: true, indirect: true, packed: false };

const PACKED: Options = Options { packed: true, ..PLAIN };
const PACKED_EVENTS: Options = Options { packed: true, ..EVENTS };
const PACKED_MANY: Options = Options { packed: true, ..MANY };

/// The memory that the test dirties as the guest's CPU, so that a migration does not converge.
const CPU_PAGES: (u64, u64) = (8 << 20, 8 << 20);

/// A source with a load on its disk.
struct Source {
    backend: Backend,
    other: Backend,
    qemu: Qemu,
    machine: Machine,
    load: Load,
    hosts: u32,
    lab: Lab, // last: what the programs printed is read when they end
}

impl Source {
    fn start(kind: Kind, options: Options) -> Source {
        let lab = Lab::new();
        let image = make_image(&lab);
        let backend = Backend::start(&lab, kind, "backend-a", &image, options.queues);
        let other = Backend::start(&lab, kind, "backend-b", &image, options.queues);
        let disk = Disk { queues: options.queues, queue_size: options.queue_size, packed: options.packed };
        let qemu = Qemu::guest_free(&lab, "host-0", backend.socket(), disk);
        let mut machine = Machine { qtest: qemu.qtest(), ram: map_ram(&lab, "host-0") };
        let load = Load::start(&mut machine, options);
        Source { backend, other, qemu, machine, load, hosts: 1, lab }
    }

    /// Starts the destination's QEMU on the other back-end.
    fn destination(&mut self) -> Qemu {
        let name = format!("host-{}", self.hosts);
        self.hosts += 1;
        let Options { queues, queue_size, packed, .. } = self.load.driver.options;
        Qemu::guest_free_destination(&self.lab, &name, self.other.socket(), Disk { queues, queue_size, packed })
    }

    /// Starts a migration under load, and waits for `rounds` rounds.
    fn migrate(&mut self, destination: &mut Qemu, multifd: bool, rounds: u64) {
        let socket = self.lab.file(&format!("{}.migration", destination.name));
        migration::begin(&mut self.qemu, destination, &socket, multifd, NEVER_CONVERGES);
        self.rounds(rounds);
    }

    /// Continues the load, and waits for `rounds` more rounds.
    fn rounds(&mut self, rounds: u64) {
        let goal = migration::rounds(&mut self.qemu) + rounds;
        let (start, len) = CPU_PAGES;
        let mut byte = 0;
        wait_for("the rounds", || {
            self.load.step(&mut self.machine, 16);
            byte = byte % 255 + 1;
            self.machine.qtest.fill(start, len, byte);
            self.machine.qtest.flush();
            (migration::rounds(&mut self.qemu) >= goal).then_some(())
        });
    }

    /// Completes the migration with as many requests in flight as possible.
    fn complete(&mut self, destination: Qemu) {
        self.load.flood(&mut self.machine);
        self.hand_over(destination);
    }

    /// Completes the migration, and checks that no write is lost: the memory of both sides is equal, and that of the source
    /// does not change until its back-end has ended. The load continues at the destination.
    fn hand_over(&mut self, mut destination: Qemu) {
        self.qemu.qmp("stop", json!({})); // at once, so that what is in flight still is
        migration::let_converge(&mut self.qemu);
        migration::finish(&mut self.qemu, &mut destination);
        let here = self.machine.ram.snapshot();
        let there = map_ram(&self.lab, &destination.name);
        assert_pages_alike("source and destination", &here.differing_pages(&there.snapshot()));

        let late = self.late_writes(&here);
        assert_pages_alike("the source after the end and before", &late);
        self.go_on_at(destination, there);
    }

    /// Ends the source and its back-end. Returns the pages that changed since `before`.
    fn late_writes(&mut self, before: &crate::ram::Snapshot) -> Vec<u64> {
        self.qemu.quit();
        self.backend.terminate();
        self.machine.ram.snapshot().differing_pages(before)
    }

    /// Makes the destination the next source, and the ended back-end the next destination's.
    fn go_on_at(&mut self, mut destination: Qemu, ram: Ram) {
        wait_for("the destination may go on", || {
            let status = destination.qmp("query-status", json!({}));
            ["paused", "prelaunch", "postmigrate"].contains(&status["status"].as_str()?).then_some(())
        });
        self.machine = Machine { qtest: destination.qtest(), ram };
        destination.qmp("cont", json!({}));
        self.qemu = destination;
        self.backend.restart();
        std::mem::swap(&mut self.backend, &mut self.other);
        self.load.run(&mut self.machine, 500);
        self.load.drain(&mut self.machine);
    }

    /// Kills the back-end with requests in flight and starts it again.
    fn crash(&mut self) {
        self.load.flood(&mut self.machine);
        self.backend.kill();
        self.backend.restart();
    }
}

fn assert_pages_alike(what: &str, pages: &[u64]) {
    let some = &pages[..pages.len().min(16)];
    assert!(pages.is_empty(), "{what}: {} pages differ: {some:#x?}", pages.len());
}

/// Rules R3.2 and R6.1 to R6.3.
fn a_migration_under_load_loses_nothing(options: Options, multifd: bool) {
    let mut source = Source::start(Kind::OursDirect, options);
    let mut destination = source.destination();
    source.load.run(&mut source.machine, 1000);
    source.migrate(&mut destination, multifd, 3);
    source.complete(destination);
}

#[rstest]
fn a_migration_under_load_loses_nothing_with_plain_rings(#[values(PLAIN, PACKED)] options: Options) {
    a_migration_under_load_loses_nothing(options, false);
}

#[rstest]
fn a_migration_under_load_loses_nothing_with_event_idx_and_multifd(#[values(EVENTS, PACKED_EVENTS)] options: Options) {
    a_migration_under_load_loses_nothing(options, true);
}

#[rstest]
fn a_migration_under_load_loses_nothing_with_two_queues_and_indirect_descriptors(
    #[values(MANY, PACKED_MANY)] options: Options,
) {
    a_migration_under_load_loses_nothing(options, false);
}

#[rstest]
fn a_guest_migrates_there_and_back_with_multifd(#[values(MANY, PACKED_MANY)] options: Options) {
    let mut source = Source::start(Kind::OursDirect, options);
    for _ in 0..3 {
        let mut destination = source.destination();
        source.migrate(&mut destination, true, 2);
        source.complete(destination);
    }
}

#[rstest]
fn a_log_that_is_toggled_under_load_still_misses_nothing(#[values(EVENTS, PACKED_EVENTS)] options: Options) {
    let mut source = Source::start(Kind::OursDirect, options);
    for _ in 0..2 {
        source.qemu.qmp("calc-dirty-rate", json!({"calc-time": 1, "mode": "dirty-bitmap"}));
        wait_for("the dirty rate is measured", || {
            source.load.step(&mut source.machine, 16);
            (source.qemu.qmp("query-dirty-rate", json!({}))["status"] == "measured").then_some(())
        });
    }
    let mut destination = source.destination();
    source.migrate(&mut destination, false, 3);
    source.complete(destination);
}

#[rstest]
fn a_migration_after_a_cancelled_one_loses_nothing(#[values(MANY, PACKED_MANY)] options: Options) {
    let mut source = Source::start(Kind::OursDirect, options);
    let mut destination = source.destination();
    source.migrate(&mut destination, false, 2);
    migration::cancel(&mut source.qemu);
    drop(destination);
    source.load.run(&mut source.machine, 500);

    let mut destination = source.destination();
    source.migrate(&mut destination, false, 3);
    source.complete(destination);
}

#[rstest]
fn a_stopped_guest_goes_on_where_it_was_also_with_another_back_end(#[values(EVENTS, PACKED_EVENTS)] options: Options) {
    let mut source = Source::start(Kind::OursDirect, options);
    for round in 0..6 {
        source.load.flood(&mut source.machine);
        source.qemu.qmp("stop", json!({}));
        if round % 2 == 0 {
            let stopped = source.machine.ram.snapshot();
            source.backend.terminate();
            assert_pages_alike("a stopped guest", &source.machine.ram.snapshot().differing_pages(&stopped));
            source.backend.restart();
        }
        source.qemu.qmp("cont", json!({}));
        source.load.run(&mut source.machine, 200);
    }
    source.load.drain(&mut source.machine);
}

#[test]
fn a_killed_back_end_answers_every_request_exactly_once() {
    for options in [PLAIN, EVENTS, MANY, PACKED, PACKED_EVENTS, PACKED_MANY] {
        let mut source = Source::start(Kind::OursDirect, options);
        for _ in 0..5 {
            source.crash();
            source.load.run(&mut source.machine, 300);
        }
        source.load.drain(&mut source.machine);
    }
}

#[test]
fn a_back_end_killed_during_a_migration_loses_nothing() {
    for (multifd, options) in [(false, EVENTS), (true, EVENTS), (true, PACKED_EVENTS)] {
        let mut source = Source::start(Kind::OursDirect, options);
        let mut destination = source.destination();
        source.migrate(&mut destination, multifd, 2);
        for _ in 0..2 {
            source.crash();
            source.load.run(&mut source.machine, 300);
            source.rounds(1);
        }
        source.complete(destination);
        source.crash();
        source.load.drain(&mut source.machine);
    }
}

/// QEMU drops the marks of a killed back-end. Its successor marks all memory (rule L15.2).
#[test]
fn what_a_killed_back_end_marked_reaches_the_destination() {
    for (multifd, options) in [(false, EVENTS), (true, EVENTS), (true, PACKED_EVENTS)] {
        let mut source = Source::start(Kind::OursDirect, options);
        let mut destination = source.destination();
        source.migrate(&mut destination, multifd, 2);
        source.load.drain(&mut source.machine);
        source.load.flood(&mut source.machine);
        source.load.drain(&mut source.machine);
        source.backend.kill();
        source.backend.restart();
        // One request shows that the new back-end serves. No other page is written again.
        source.load.step(&mut source.machine, 1);
        source.load.drain(&mut source.machine);
        source.hand_over(destination);
    }
}

/// The comparison of memory finds a back-end that replies to GET_VRING_BASE with requests in flight.
#[test]
fn a_back_end_that_does_not_drain_is_noticed() {
    let slow = Kind::StorageDaemon { bytes_per_second: Some(1 << 20) };
    let mut source = Source::start(slow, PLAIN);
    let mut destination = source.destination();
    source.migrate(&mut destination, false, 2);
    source.load.flood(&mut source.machine);
    source.qemu.qmp("stop", json!({}));
    migration::let_converge(&mut source.qemu);
    migration::finish(&mut source.qemu, &mut destination);
    let before = source.machine.ram.snapshot();
    assert!(!source.late_writes(&before).is_empty(), "nothing was written late");
}
