//! The dirty log, compared with an oracle that records every byte the device writes: no page missing, none in excess.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, LogDescription};
use vhost_migrate::abi::virtio::{VIRTIO_RING_F_EVENT_IDX, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Region, UserAddress, sealed_memfd};
use vhost_migrate::ring::{Buffer, DriverRingState};
use zerocopy::IntoBytes;

use crate::guest::{
    Guest, LOG_ALL, PACKED, Ring, SPLIT, add_region, harvest, header, inflight_region, install_log, negotiate, pages,
    request_addresses, start_logging, status, stop_logging,
};
use crate::raw::{RawFrontend, VERSION};
use crate::server::Server;

const EVENT_IDX: VirtioFeatures = VIRTIO_RING_F_EVENT_IDX;
/// Address under which used rings are logged. It differs from their own address, and a page ends between the index and
/// the elements.
pub(crate) const LOG_AT: GuestAddress = GuestAddress(0x30_0ffc);
const DISK: u64 = 4 << 20;

/// Pages that the device has written since a point in time, as far as they can be known in advance.
pub(crate) struct Oracle {
    pub(crate) pages: BTreeSet<u64>,
    /// Pages that the device may have written without changing their contents.
    perhaps: BTreeSet<u64>,
    seen: DriverRingState,
    event: Vec<u8>,
}

impl Oracle {
    pub(crate) fn new(guest: &Guest, ring: &Ring) -> Oracle {
        let (pages, perhaps) = (BTreeSet::new(), BTreeSet::new());
        Oracle { pages, perhaps, seen: ring.driver.state(), event: event(guest, ring) }
    }

    pub(crate) fn wrote(&mut self, gpa: GuestAddress, len: u64) {
        self.pages.extend(pages(gpa, len));
    }

    /// Adds the device's writes to the ring since the last call. All requests must be complete. A split ring is logged
    /// under `at` (rule L3.3), a packed one under its own address, and the device event area under `at` (rules L4.1,
    /// L4.2).
    pub(crate) fn used_ring(&mut self, guest: &Guest, ring: &Ring, at: GuestAddress) {
        let (size, now) = (ring.layout.size, ring.driver.state());
        let changed = event(guest, ring) != self.event;
        match (std::mem::replace(&mut self.seen, now.clone()), now) {
            (DriverRingState::Split(before), DriverRingState::Split(now)) => {
                let mut index = before.used;
                while index != now.used {
                    self.wrote(at.unchecked_add(2), 2);
                    self.wrote(at.unchecked_add(4 + 8 * u64::from(index % size)), 8);
                    index = index.wrapping_add(1);
                }
                if changed {
                    self.wrote(at.unchecked_add(4 + 8 * u64::from(size)), 2);
                }
            }
            (DriverRingState::Packed(before), DriverRingState::Packed(now)) => {
                let mut position = before.used;
                while position != now.used {
                    if ring.is_used(guest, position) {
                        self.wrote(ring.layout.desc.unchecked_add(16 * u64::from(position.index) + 8), 8);
                    }
                    position = position.after(1, size);
                }
                if changed {
                    self.wrote(at, 4);
                }
                // The device may have disabled kicks and enabled them again.
                self.perhaps.extend(pages(at, 4));
            }
            _ => panic!("the ring has become one of the other kind"),
        }
    }

    /// Adds the pages of a ring that a successor marks: all that the device may write.
    fn whole_ring(&mut self, ring: &Ring, at: GuestAddress) {
        let size = u64::from(ring.layout.size);
        match self.seen {
            DriverRingState::Split(_) => self.wrote(at, 6 + 8 * size),
            DriverRingState::Packed(_) => {
                self.wrote(at, 4);
                self.wrote(ring.layout.desc, 16 * size);
            }
        }
    }

    pub(crate) fn check(&self, marked: BTreeSet<u64>) {
        check([self], marked);
    }
}

/// Asserts that the marked pages are exactly the written ones.
pub(crate) fn check<'a>(oracles: impl IntoIterator<Item = &'a Oracle>, mut marked: BTreeSet<u64>) {
    let mut expected = BTreeSet::new();
    for oracle in oracles {
        expected.extend(&oracle.pages);
        marked.retain(|page| oracle.pages.contains(page) || !oracle.perhaps.contains(page));
    }
    assert_eq!(marked, expected);
}

/// The field by which the device requests kicks: avail_event of a split ring, the device event area of a packed one.
fn event(guest: &Guest, ring: &Ring) -> Vec<u8> {
    match ring.driver.state() {
        DriverRingState::Split(_) => {
            guest.bytes(ring.layout.used.unchecked_add(4 + 8 * u64::from(ring.layout.size)), 2)
        }
        DriverRingState::Packed(_) => guest.bytes(ring.layout.used, 4),
    }
}

/// A disk whose writes are logged, with its guest, front-end, ring and log, and the oracle of that log.
fn logging(features: VirtioFeatures) -> (Server, Guest, RawFrontend, Ring, Log, Oracle) {
    let (server, guest, client, mut ring) = disk().running(512, features);
    let log = install_log(&client, &guest);
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    let oracle = Oracle::new(&guest, &ring);
    (server, guest, client, ring, log, oracle)
}

/// Serves 30 reads, writes and requests that must fail, in slots from `first` on. Calls `meanwhile` after the kick.
fn load(guest: &Guest, ring: &mut Ring, first: u64, oracle: &mut Oracle, meanwhile: impl FnOnce()) {
    for slot in first..first + 30 {
        let (_, status, data) = request_addresses(slot);
        let len = 512 * (slot % 40 + 1);
        oracle.wrote(status, 1);
        match slot % 3 {
            0 => {
                ring.write(guest, slot, slot % 100 * 80, &vec![slot as u8; len as usize]);
            }
            1 => {
                ring.read(guest, slot, DISK / 512 - 1, 1024);
            }
            _ => {
                oracle.wrote(data, len);
                ring.read(guest, slot, slot % 100 * 80, len as u32);
            }
        }
    }
    ring.kick();
    meanwhile();
    ring.completions(30);
    for slot in first..first + 30 {
        assert_eq!(status(guest, slot), u8::from(slot % 3 == 1));
    }
}

fn disk() -> Server {
    Server::disk(DISK, |_| {})
}

pub(crate) fn running(client: &RawFrontend, guest: &Guest, features: VirtioFeatures) -> Ring {
    negotiate(client, guest, features);
    Ring::started(client, guest, 0, 512, features)
}

#[rstest]
fn the_log_holds_exactly_what_the_device_wrote(#[values(SPLIT, PACKED)] basic: VirtioFeatures) {
    for features in [basic, basic | EVENT_IDX] {
        let (_server, guest, client, mut ring, log, mut oracle) = logging(features);
        for round in 0..8 {
            load(&guest, &mut ring, round * 30 % 120, &mut oracle, || {});
            oracle.used_ring(&guest, &ring, LOG_AT);
        }
        assert_eq!(client.ring_base(0), ring.drained_base());
        oracle.used_ring(&guest, &ring, LOG_AT);
        oracle.check(harvest(&log));
        assert_eq!(log.out_of_range(), 0);
    }
}

/// Rule L1.3.
#[rstest]
fn a_buffer_across_pages_and_regions_is_logged_exactly(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring, log, mut oracle) = logging(features);
    let (head, _, _) = request_addresses(0);
    let head = header(&guest, head, 0, 0);
    // 512 bytes that end with the first byte of a page, 512 bytes from the middle of another, and the status at a
    // page's end.
    let writable =
        [(0x70_0e01, 512), (0x71_0800, 512), (0x72_0fff, 1)].map(|(gpa, len)| Buffer { gpa: GuestAddress(gpa), len });
    ring.driver.add(&[head], &writable, None).unwrap().unwrap();
    ring.serve_one();
    client.ring_base(0);
    writable.iter().for_each(|buffer| oracle.wrote(buffer.gpa, buffer.len.into()));
    oracle.used_ring(&guest, &ring, LOG_AT);
    oracle.check(harvest(&log));
    assert!(oracle.pages.contains(&0x701), "the test must have a range that just reaches a page");
}

/// Rules L7.2 and L7.3.
#[rstest]
fn pages_are_logged_only_while_logging_is_enabled(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(512, features);
    let log = install_log(&client, &guest);
    let mut oracle = Oracle::new(&guest, &ring);
    load(&guest, &mut ring, 0, &mut oracle, || {});
    client.wait_until_processed();
    assert!(harvest(&log).is_empty(), "logged before LOG_ALL and F_LOG");
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    load(&guest, &mut ring, 0, &mut oracle, || {});
    assert!(!harvest(&log).is_empty());
    stop_logging(&client, &guest, features, &mut [&mut ring]);
    harvest(&log);
    load(&guest, &mut ring, 0, &mut oracle, || {});
    client.ring_base(0);
    assert!(harvest(&log).is_empty(), "logged after it was switched off");
}

/// Rules L3.1 and L3.2.
#[rstest]
fn log_all_controls_data_logging_and_f_log_controls_used_ring_logging(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client, mut ring) = disk().running(512, features);
    let log = install_log(&client, &guest);
    client.send_acknowledged(Code::SET_FEATURES, &(features | LOG_ALL), &[]);
    let mut data = Oracle::new(&guest, &ring);
    load(&guest, &mut ring, 0, &mut data, || {});
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    assert_eq!(harvest(&log), data.pages);
    ring.log_at = Some(LOG_AT);
    client.send_acknowledged(Code::SET_VRING_ADDR, &ring.addr(&guest), &[]);
    let mut used = Oracle::new(&guest, &ring);
    load(&guest, &mut ring, 0, &mut data, || {});
    client.ring_base(0);
    used.used_ring(&guest, &ring, LOG_AT);
    used.check(harvest(&log));
}

/// Rule L9.1.
#[rstest]
fn changing_the_log_under_load_loses_no_page_and_stops_writes_to_the_old_log(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client, mut ring) = disk().running(512, features | EVENT_IDX);
    let mut logs = vec![install_log(&client, &guest)];
    start_logging(&client, &guest, features | EVENT_IDX, &mut [&mut ring], LOG_AT);
    let (mut oracle, mut found) = (Oracle::new(&guest, &ring), BTreeSet::new());
    for round in 0..40 {
        load(&guest, &mut ring, round * 30 % 210, &mut oracle, || {
            let log = install_log(&client, &guest);
            // The device does not write to the old log after the reply, so this harvest must be complete.
            found.extend(harvest(logs.last().unwrap()));
            logs.push(log);
        });
        oracle.used_ring(&guest, &ring, LOG_AT);
    }
    client.ring_base(0);
    oracle.used_ring(&guest, &ring, LOG_AT);
    let last = logs.pop().unwrap();
    assert!(logs.iter().all(|log| harvest(log).is_empty()), "an old log was written after the reply");
    found.extend(harvest(&last));
    oracle.check(found);
}

/// Rule L9.2.
#[rstest]
fn changing_the_memory_table_under_load_keeps_the_log_exact(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring, log, mut oracle) = logging(features);
    for round in 0..10u64 {
        load(&guest, &mut ring, round * 20, &mut oracle, || match round % 2 {
            0 => guest.send_table(&client),
            _ => {
                let fd = sealed_memfd("more", 0x10_0000).unwrap();
                let region = Region::share(fd, GuestAddress((2 << 30) + (round << 24)), 0x10_0000, 0).unwrap();
                assert_eq!(add_region(&client, &region), 0);
            }
        });
        oracle.used_ring(&guest, &ring, LOG_AT);
    }
    client.ring_base(0);
    oracle.used_ring(&guest, &ring, LOG_AT);
    oracle.check(harvest(&log));
}

/// Rule L9.2.
#[rstest]
fn a_second_migration_is_logged_as_exactly_as_the_first(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(512, features);
    for _ in 0..3 {
        let log = install_log(&client, &guest);
        start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
        let mut oracle = Oracle::new(&guest, &ring);
        load(&guest, &mut ring, 0, &mut oracle, || {});
        assert_eq!(client.ring_base(0), ring.drained_base());
        oracle.used_ring(&guest, &ring, LOG_AT);
        oracle.check(harvest(&log));
        stop_logging(&client, &guest, features, &mut [&mut ring]);
        ring.set_up(&client, &guest, ring.drained_base());
        load(&guest, &mut ring, 0, &mut oracle, || {});
        client.wait_until_processed();
        assert!(harvest(&log).is_empty());
    }
}

#[rstest]
fn a_reconnect_while_logging_writes_nothing_until_the_ring_is_enabled(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client) = disk().connected();
    // QEMU's order (rule L8.1): LOG_ALL, F_LOG and KICK before SET_LOG_BASE and ENABLE.
    negotiate(&client, &guest, features | LOG_ALL);
    let mut ring = Ring::new(&guest, 0, 512, features);
    ring.log_at = Some(LOG_AT);
    let mut oracle = Oracle::new(&guest, &ring);
    ring.read(&guest, 0, 0, 512);
    oracle.wrote(request_addresses(0).2, 512);
    oracle.wrote(request_addresses(0).1, 1);
    ring.set_up(&client, &guest, ring.initial_base());
    ring.kick();
    let before = guest.snapshot();
    let log = install_log(&client, &guest);
    client.wait_until_processed();
    assert!(before == guest.snapshot(), "memory was touched before the ring was enabled");
    ring.enable(&client, true);
    ring.completion();
    client.ring_base(0);
    oracle.used_ring(&guest, &ring, LOG_AT);
    oracle.check(harvest(&log));
}

/// Rule L8.2.
#[rstest]
fn rings_run_with_log_all_and_no_log(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(512, features | LOG_ALL);
    ring.log_at = Some(LOG_AT);
    client.send_acknowledged(Code::SET_VRING_ADDR, &ring.addr(&guest), &[]);
    let mut oracle = Oracle::new(&guest, &ring);
    load(&guest, &mut ring, 0, &mut oracle, || {});
    assert_eq!(client.ring_base(0), ring.drained_base());
}

/// Rules L2.1 and L6.1.
#[rstest]
fn a_log_of_any_size_and_offset_is_used_exactly_within_its_bounds(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(512, features);
    let fd = sealed_memfd("log", 0x4000).unwrap();
    let file = Region::map(fd.as_fd(), GuestAddress(0), 0x4000, UserAddress(0), 0).unwrap();
    // The log covers the pages up to the status page of slot 4, whose bit is in the last byte.
    let size = request_addresses(4).1.0 / LOG_PAGE / 8 + 1;
    let description = LogDescription { mmap_size: size, mmap_offset: 0x1000 };
    client.send(Code::SET_LOG_BASE, VERSION, description.as_bytes(), &[fd.as_fd()]);
    client.reply(Code::SET_LOG_BASE);
    client.send_acknowledged(Code::SET_FEATURES, &(features | LOG_ALL), &[]);
    for slot in 0..20 {
        ring.read(&guest, slot, 0, 512);
    }
    ring.serve(20);
    assert_eq!(client.ring_base(0), ring.drained_base(), "a log that is too small must not stop the ring");
    let mut bytes = vec![0; 0x4000];
    file.slice(0, 0x4000).unwrap().copy_to(&mut bytes);
    let last = 0x1000 + size as usize - 1;
    assert_eq!(bytes[last], 0xff, "the last byte of the log was not used");
    let outside = |(at, byte): (usize, &u8)| *byte != 0 && !(0x1000..=last).contains(&at);
    assert!(!bytes.iter().enumerate().any(outside), "a byte outside the log was written");
}

/// Rules L12.1 and L12.2.
#[rstest]
fn the_log_fd_is_signalled_after_logging_until_it_is_removed(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(512, features);
    let signal = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    client.send_acknowledged(Code::SET_LOG_FD, &0u64, &[signal.as_fd()]);
    let mut oracle = Oracle::new(&guest, &ring);
    load(&guest, &mut ring, 0, &mut oracle, || {});
    client.wait_until_processed();
    assert!(signal.read().is_err(), "signalled without logging");
    let _log = install_log(&client, &guest);
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    load(&guest, &mut ring, 0, &mut oracle, || {});
    // The log fd is signalled before the driver is notified of a batch.
    assert!((1..=30).contains(&signal.read().unwrap()), "at most one signal per burst");
    client.send_acknowledged(Code::SET_LOG_FD, &[0u8; 0], &[]);
    let _ = signal.read();
    load(&guest, &mut ring, 0, &mut oracle, || {});
    client.ring_base(0);
    assert!(signal.read().is_err());
}

/// Sets up the ring of a successor up to, but not including, SET_VRING_ENABLE. The guest has two requests, and its
/// previous back-end was killed with the first of them taken. If `kept` is true, the log has the marks of the ring.
fn start_successor(guest: &Guest, client: &RawFrontend, features: VirtioFeatures, kept: bool) -> (Ring, Log) {
    let mut ring = Ring::new(guest, 0, 512, features);
    ring.read(guest, 0, 5, 512);
    ring.read(guest, 1, 6, 512);
    let _ = ring.driver.publish();
    let (region, fd, description) = inflight_region(features, 1, 512);
    ring.take_requests(guest, &region, 1);
    negotiate(client, guest, features);
    client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    ring.log_at = Some(LOG_AT);
    ring.set_up(client, guest, ring.initial_base());
    let log = install_log(client, guest);
    if kept {
        let mut oracle = Oracle::new(guest, &ring);
        oracle.whole_ring(&ring, LOG_AT);
        oracle.pages.iter().for_each(|page| log.mark(GuestAddress(page * LOG_PAGE), 1));
    }
    client.send_acknowledged(Code::SET_FEATURES, &(features | LOG_ALL), &[]);
    (ring, log)
}

/// Rules I3.3 and L10.1: a process may be killed between a write to the used ring and its mark.
#[rstest]
fn a_successor_of_a_killed_back_end_logs_the_whole_used_ring_again(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().connected();
    let (mut ring, log) = start_successor(&guest, &client, features, true);
    ring.enable(&client, true);
    assert_eq!(ring.completions(2).len(), 2);
    assert_eq!(client.ring_base(0), ring.drained_base());
    let mut oracle = Oracle::new(&guest, &ring);
    for slot in [0, 1] {
        oracle.wrote(request_addresses(slot).1, 1);
        oracle.wrote(request_addresses(slot).2, 512);
    }
    oracle.whole_ring(&ring, LOG_AT);
    oracle.check(harvest(&log));
}

/// Rules L15.1 and L15.2: all memory is logged once, and not when this back-end itself has stopped and started the
/// ring.
#[rstest]
fn a_successor_with_a_new_log_logs_all_guest_memory(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().connected();
    let (mut ring, log) = start_successor(&guest, &client, features, false);
    assert!(harvest(&log).is_empty(), "marked before the ring runs");
    ring.enable(&client, true);
    assert_eq!(ring.completions(2).len(), 2);
    let mut all = Oracle::new(&guest, &ring);
    for region in guest.memory.regions() {
        all.wrote(region.gpa(), region.size());
    }
    // The log address of the used ring may be outside guest memory.
    all.whole_ring(&ring, LOG_AT);
    let base = client.ring_base(0);
    all.check(harvest(&log));
    ring.set_up(&client, &guest, base);
    ring.enable(&client, true);
    ring.read(&guest, 2, 7, 512);
    ring.serve_one();
    client.ring_base(0);
    assert!(harvest(&log).len() < 8, "memory was logged although nothing was lost");
}
