//! Completeness of the log for every order in which a front-end starts a ring, with requests in between (rules L8, L9,
//! L15). The oracle is a copy of guest memory: every byte that the device has changed since the front-end last read the
//! log is on a logged page.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use rstest::rstest;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, VringState};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE};
use zerocopy::IntoBytes;

use crate::guest::{
    Guest, LOG_ALL, PACKED, Ring, SPLIT, harvest, install_log, negotiate, request_addresses, send_log, start_logging,
    stop_logging,
};
use crate::log::running;
use crate::raw::{RawFrontend, VERSION};
use crate::server::Server;

const DISK: u64 = 1 << 18;

#[derive(Clone, Copy, Debug, PartialEq)]
enum StartStep {
    Enable,
    Addr,
    Kick,
    Log,
}

/// All orders of the four steps.
fn step_orders() -> Vec<Vec<StartStep>> {
    let mut orders = vec![Vec::new()];
    for step in [StartStep::Enable, StartStep::Addr, StartStep::Kick, StartStep::Log] {
        let place = |order: &Vec<StartStep>, at: usize| [&order[..at], &[step], &order[at..]].concat();
        orders = orders.iter().flat_map(|order| (0..=order.len()).map(move |at| place(order, at))).collect();
    }
    assert_eq!(orders.len(), 24);
    orders
}

/// Guest memory as a destination has it: the contents when the log was last read, and the driver's writes since.
struct MemoryCopy(Vec<(GuestAddress, Vec<u8>)>);

impl MemoryCopy {
    fn of(guest: &Guest) -> MemoryCopy {
        let regions = guest.memory.regions().iter().map(|region| region.gpa());
        MemoryCopy(regions.zip(guest.snapshot()).collect())
    }

    fn driver_wrote(&mut self, guest: &Guest, gpa: GuestAddress, len: usize) {
        let (start, bytes) = self.0.iter_mut().rfind(|(start, _)| *start <= gpa).unwrap();
        let at = gpa.unchecked_offset_from(*start) as usize;
        bytes[at..at + len].copy_from_slice(&guest.bytes(gpa, len));
    }

    /// Pages that have changed and are not in `log`.
    fn lost(&self, guest: &Guest, log: &BTreeSet<u64>) -> Vec<u64> {
        let page = LOG_PAGE as usize;
        let changed = self.0.iter().zip(guest.snapshot()).flat_map(|((start, before), now)| {
            let pairs = before.chunks(page).zip(now.chunks(page)).map(|(before, now)| before != now);
            let numbers = (start.0 / LOG_PAGE..).zip(pairs.collect::<Vec<_>>());
            numbers.filter_map(|(number, differs)| differs.then_some(number)).collect::<Vec<_>>()
        });
        changed.filter(|number| !log.contains(number)).collect()
    }
}

/// A ring and its requests, each in a slot of its own.
struct DiskLoad {
    ring: Ring,
    slot: u64,
    open: usize,
}

impl DiskLoad {
    fn add(&mut self, guest: &Guest, copy: &mut MemoryCopy) {
        let (header, status, _) = request_addresses(self.slot);
        self.ring.read(guest, self.slot, 1 + self.slot % 100, 512);
        copy.driver_wrote(guest, header, 16);
        copy.driver_wrote(guest, status, 1);
        let _ = self.ring.driver.publish();
        // A ring that does not run yet has not written its notification setting.
        self.ring.kick.write(1).unwrap();
        (self.slot, self.open) = (self.slot + 1, self.open + 1);
    }

    fn complete(&mut self) {
        assert_eq!(self.ring.completions(self.open).len(), self.open);
        self.open = 0;
    }

    /// Adds a request and waits for its completion.
    fn serve(&mut self, guest: &Guest, copy: &mut MemoryCopy) {
        self.add(guest, copy);
        self.complete();
    }

    /// Takes the steps in the order of `order`, and adds a request after each. The steps in `ready` were taken before.
    fn start(
        &mut self,
        client: &RawFrontend,
        guest: &Guest,
        copy: &mut MemoryCopy,
        order: &[StartStep],
        ready: &[StartStep],
        log: impl Fn(),
    ) {
        let index = self.ring.index;
        let mut taken = ready.to_vec();
        for step in order {
            match step {
                StartStep::Enable => client.send_body(Code::SET_VRING_ENABLE, &VringState { index, num: 1 }),
                StartStep::Addr => client.send_body(Code::SET_VRING_ADDR, &self.ring.addr(guest)),
                StartStep::Kick => {
                    let (kick, ring) = (self.ring.kick.as_fd(), u64::from(index));
                    client.send(Code::SET_VRING_KICK, VERSION, ring.as_bytes(), &[kick]);
                }
                StartStep::Log => log(),
            }
            taken.push(*step);
            client.wait_until_processed();
            self.add(guest, copy);
            if [StartStep::Enable, StartStep::Addr, StartStep::Kick].iter().all(|step| taken.contains(step)) {
                self.complete();
            }
        }
    }

    /// Sends the messages before the steps: CALL, NUM and BASE.
    fn prepare(&self, client: &RawFrontend, base: u32) {
        let index = self.ring.index;
        client.send(Code::SET_VRING_CALL, VERSION, u64::from(index).as_bytes(), &[self.ring.call.as_fd()]);
        client.send_body(Code::SET_VRING_NUM, &VringState { index, num: self.ring.layout.size.into() });
        client.send_body(Code::SET_VRING_BASE, &VringState { index, num: base });
    }

    /// Records the areas that only the driver writes.
    fn driver_areas(&self, guest: &Guest, copy: &mut MemoryCopy, features: VirtioFeatures) {
        if features == SPLIT {
            copy.driver_wrote(guest, self.ring.layout.desc, 16 * 512);
        }
        copy.driver_wrote(guest, self.ring.layout.avail, 6 + 2 * 512);
    }
}

/// A disk whose ring has run while logging: its front-end, load and log, and a copy of memory since the log was read.
fn logging(server: &Server, guest: &Guest, features: VirtioFeatures) -> (RawFrontend, DiskLoad, Log, MemoryCopy) {
    let client = server.connect();
    let mut load = DiskLoad { ring: running(&client, guest, features), slot: 0, open: 0 };
    let log = install_log(&client, guest);
    let used = load.ring.layout.used;
    start_logging(&client, guest, features, &mut [&mut load.ring], used);
    let mut copy = MemoryCopy::of(guest);
    (0..4).for_each(|_| load.serve(guest, &mut copy));
    harvest(&log);
    (client, load, log, MemoryCopy::of(guest))
}

/// Starts a second device, which logs one request into `log`.
fn start_second_device(
    server: &Server,
    guest: &Guest,
    copy: &mut MemoryCopy,
    features: VirtioFeatures,
    log: &(Log, OwnedFd),
) -> DiskLoad {
    let client = server.connect();
    negotiate(&client, guest, features);
    let ring = Ring::started(&client, guest, 1, 512, features);
    send_log(&client, &log.0, &log.1);
    let mut load = DiskLoad { ring, slot: 100, open: 0 };
    let first_used = GuestAddress(load.ring.layout.used.0 - 0x10_0000);
    start_logging(&client, guest, features, &mut [&mut load.ring], first_used);
    load.serve(guest, copy);
    client.ring_base(1);
    load
}

/// Rules L15.2 and L15.3: the log of the killed back-end is lost, with the marks that were not yet read.
#[rstest]
fn a_restarted_back_end_loses_no_page_in_any_order_of_start(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
    #[values(false, true)] shared: bool,
) {
    let servers = [Server::disk(DISK, |_| {}), Server::disk(DISK, |_| {})];
    for order in step_orders() {
        let guest = Guest::new();
        let (client, mut load, old, mut copy) = logging(&servers[0], &guest, features);
        (0..4).for_each(|_| load.serve(&guest, &mut copy));
        drop((client, old));
        let log = Log::create(guest.memory.end()).unwrap();
        let other = shared.then(|| start_second_device(&servers[1], &guest, &mut copy, features, &log));
        let client = servers[0].connect();
        negotiate(&client, &guest, features | LOG_ALL);
        load.prepare(&client, load.ring.drained_base());
        load.start(&client, &guest, &mut copy, &order, &[], || send_log(&client, &log.0, &log.1));
        assert_eq!(client.ring_base(0), load.ring.drained_base());
        [Some(&load), other.as_ref()].iter().flatten().for_each(|load| load.driver_areas(&guest, &mut copy, features));
        let lost = copy.lost(&guest, &harvest(&log.0));
        assert!(lost.is_empty(), "{order:?}: not in the log: {lost:x?}");
    }
}

/// Rule L9.3: a front-end that stops a ring releases its log, and sends a new one when the ring may already run.
#[rstest]
fn a_ring_that_is_stopped_and_continued_loses_no_page_in_any_order_of_start(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
    #[values(false, true)] shared: bool,
    #[values(false, true)] disabled: bool,
) {
    let servers = [Server::disk(DISK, |_| {}), Server::disk(DISK, |_| {})];
    for order in step_orders() {
        let guest = Guest::new();
        let (client, mut load, old, _) = logging(&servers[0], &guest, features);
        if disabled {
            load.ring.enable(&client, false);
        }
        let base = client.ring_base(0);
        harvest(&old);
        let mut copy = MemoryCopy::of(&guest);
        drop(old);
        let log = Log::create(guest.memory.end()).unwrap();
        let other = shared.then(|| start_second_device(&servers[1], &guest, &mut copy, features, &log));
        client.send_acknowledged(Code::SET_FEATURES, &(features | LOG_ALL), &[]);
        load.prepare(&client, base);
        let ready = if disabled { &[StartStep::Addr][..] } else { &[StartStep::Addr, StartStep::Enable] };
        load.start(&client, &guest, &mut copy, &order, ready, || send_log(&client, &log.0, &log.1));
        assert_eq!(client.ring_base(0), load.ring.drained_base());
        [Some(&load), other.as_ref()].iter().flatten().for_each(|load| load.driver_areas(&guest, &mut copy, features));
        let marked = harvest(&log.0);
        let lost = copy.lost(&guest, &marked);
        assert!(lost.is_empty(), "{order:?}: not in the log: {lost:x?}");
        assert!(marked.len() < 40, "{order:?}: all memory was marked although nothing was lost");
    }
}

/// Rules L9.3 and L9.4: marks are copied once, and never from a migration that has ended.
#[rstest]
fn marks_already_copied_or_of_an_earlier_migration_are_not_repeated(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (server, guest) = (Server::disk(DISK, |_| {}), Guest::new());
    let (client, mut load, old, mut copy) = logging(&server, &guest, features);
    load.serve(&guest, &mut copy);
    // A log that is sent while logging is on receives the marks of the log before it, which keeps them.
    let (log, fd) = Log::create(guest.memory.end()).unwrap();
    send_log(&client, &log, &fd);
    let marked = harvest(&log);
    assert!(!marked.is_empty());
    assert_eq!(harvest(&old), marked);
    send_log(&client, &log, &fd);
    assert!(harvest(&log).is_empty(), "the same log was given again");
    // The migration is cancelled before its marks are read.
    load.serve(&guest, &mut copy);
    stop_logging(&client, &guest, features, &mut [&mut load.ring]);
    let next = install_log(&client, &guest);
    let used = load.ring.layout.used;
    start_logging(&client, &guest, features, &mut [&mut load.ring], used);
    client.wait_until_processed();
    assert!(harvest(&next).is_empty(), "marks of a migration that has ended");
    // A ring that ran with LOG_ALL and without a log causes all memory to be marked, once.
    drop(client);
    let client = server.connect();
    negotiate(&client, &guest, features | LOG_ALL);
    load.prepare(&client, load.ring.drained_base());
    let steps = [StartStep::Addr, StartStep::Kick, StartStep::Enable];
    load.start(&client, &guest, &mut copy, &steps, &[], || {});
    let log = install_log(&client, &guest);
    let pages: u64 = guest.memory.regions().iter().map(|region| region.size() / LOG_PAGE).sum();
    assert_eq!(harvest(&log).len() as u64, pages);
    let next = install_log(&client, &guest);
    assert!(harvest(&next).is_empty(), "all memory was marked twice");
}

/// Rule L8.4.
#[rstest]
fn a_log_that_comes_after_logging_has_ended_is_empty_though_a_ring_ran_without_one(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client) = Server::disk(DISK, |_| {}).negotiated(features | LOG_ALL);
    let _ring = Ring::started(&client, &guest, 0, 512, features);
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    let log = install_log(&client, &guest);
    assert!(harvest(&log).is_empty(), "logging had ended");
}
