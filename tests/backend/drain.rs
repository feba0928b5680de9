//! Requests in flight, with a device that completes no request until its gate is open.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::PollTimeout;
use nix::sys::eventfd::{EfdFlags, EventFd};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::unstable::INFLIGHT_MIGRATION;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, ProtocolFeatures, VringState};
use vhost_migrate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER, VirtioFeatures};
use vhost_migrate::backend::{Queue, RING_FEATURES, Request, VirtioDevice};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Region, sealed_memfd};
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::forward::forward;
use crate::guest::{
    Guest, HIGH, PACKED, Ring, SPLIT, add_region, harvest, install_log, negotiate, pages, start_logging,
};
use crate::raw::{DEADLINE, NEED_REPLY, RawFrontend, VERSION};
use crate::server::Server;
use crate::wait::is_readable;

/// A device that fills writable buffers with 0x5a immediately, and completes requests while its gate is open.
pub(crate) struct GatedDevice {
    gate: Arc<EventFd>,
}

struct GatedQueue {
    gate: Arc<EventFd>,
    held: Vec<Request>,
}

impl GatedDevice {
    pub(crate) fn new() -> (Arc<GatedDevice>, Arc<EventFd>) {
        let gate = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap());
        (Arc::new(GatedDevice { gate: gate.clone() }), gate)
    }
}

impl VirtioDevice for GatedDevice {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES | VIRTIO_F_IN_ORDER | VIRTIO_F_ACCESS_PLATFORM
    }

    fn queues(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4]
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        INFLIGHT_MIGRATION
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(GatedQueue { gate: self.gate.clone(), held: Vec::new() }))
    }
}

impl Queue for GatedQueue {
    fn submit(&mut self, mut request: Request) {
        let filling = vec![0x5a; request.writable_len() as usize];
        request.write(0, &filling).unwrap();
        self.held.push(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        if is_readable(&self.gate, PollTimeout::ZERO) {
            done.append(&mut self.held);
        }
    }

    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        unserved.append(&mut self.held);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.gate.as_fd()).filter(|_| !self.held.is_empty())
    }
}

/// Starts ring 0 with `count` requests of one page each, all taken by the device and none completed.
pub(crate) fn start_with_requests_in_flight(
    client: &RawFrontend,
    guest: &Guest,
    features: VirtioFeatures,
    count: u64,
) -> Ring {
    let mut ring = Ring::new(guest, 0, 256, features);
    for slot in 0..count {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    ring.start(client, guest);
    ring.kick();
    while (0..count).any(|slot| guest.bytes(page(slot).gpa, 1) != [0x5a]) {
        client.wait_until_processed();
    }
    ring
}

/// Address under which rings are logged.
pub(crate) const LOG_AT: GuestAddress = GuestAddress(0x30_0000);

pub(crate) fn page(slot: u64) -> Buffer {
    Buffer { gpa: HIGH.unchecked_add(slot * LOG_PAGE), len: LOG_PAGE as u32 }
}

/// Rules R3.1, R3.2 and R3.4.
#[rstest]
fn get_vring_base_replies_after_all_requests_are_completed_logged_and_published(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    let (_server, guest, client) = Server::new(device).negotiated(features);
    let log = install_log(&client, &guest);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 10);
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    client.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
    gate.write(1).unwrap();
    assert_eq!(client.ring_base_reply(0), ring.drained_base());
    let mut used = 0;
    while ring.driver.pop_used().unwrap().is_some() {
        used += 1;
    }
    assert_eq!(used, 10, "a request was not published before the reply");
    let marked = harvest(&log);
    for slot in 0..10 {
        assert!(marked.contains(&(page(slot).gpa.0 / LOG_PAGE)), "a page was not logged before the reply");
    }
}

/// Rule R3.3.
#[rstest]
fn after_the_get_vring_base_reply_memory_is_unchanged_and_no_call_is_signalled(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    let (mut server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 10);
    gate.write(1).unwrap();
    assert_eq!(client.ring_base(0), ring.drained_base());
    ring.completions(10);
    for slot in 100..110 {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    ring.kick();
    ring.kick.write(1).unwrap();
    let before = guest.snapshot();
    let _ = ring.call.read();
    client.wait_until_processed();
    drop(client);
    server.stop();
    assert!(before == guest.snapshot(), "memory was written after the reply");
    assert!(ring.call.read().is_err(), "the driver was notified after the reply");
}

/// Rules R2.3 and R7.3.
#[rstest]
fn a_disabled_ring_completes_its_requests_takes_no_new_ones_and_resumes_when_enabled(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    let (_server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 3);
    gate.write(1).unwrap();
    ring.enable(&client, false);
    ring.completions(3);
    ring.driver.add(&[], &[page(50)], None).unwrap().unwrap();
    ring.kick.write(1).unwrap();
    let _ = ring.driver.publish();
    client.wait_until_processed();
    assert_eq!(guest.bytes(page(50).gpa, 1), [0]);
    ring.enable(&client, true);
    ring.completion();
    assert_eq!(client.ring_base(0), ring.drained_base());
}

/// Rule L9.1.
#[rstest]
fn a_request_in_flight_while_the_log_changes_is_logged_in_the_new_log_only(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    let (_server, guest, client) = Server::new(device).negotiated(features);
    let old = install_log(&client, &guest);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 5);
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    let new = install_log(&client, &guest);
    harvest(&old);
    gate.write(1).unwrap();
    ring.completions(5);
    assert_eq!(client.ring_base(0), ring.drained_base());
    assert!(harvest(&old).is_empty(), "the old log was written after the reply");
    let marked = harvest(&new);
    assert!((0..5).all(|slot| marked.contains(&(page(slot).gpa.0 / LOG_PAGE))));
}

/// Rule M1.6.
#[rstest]
fn a_new_memory_table_waits_for_requests_in_flight(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (device, gate) = GatedDevice::new();
    let (_server, guest, client) = Server::new(device).negotiated(features);
    let log = install_log(&client, &guest);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 5);
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    client.send(Code::SET_MEM_TABLE, NEED_REPLY, &guest.table(), &guest.fds());
    gate.write(1).unwrap();
    assert_eq!(client.reply(Code::SET_MEM_TABLE), 0u64.as_bytes());
    assert_eq!(ring.completions(5).len(), 5);
    ring.driver.add(&[], &[page(9)], None).unwrap().unwrap();
    ring.serve_one();
    assert_eq!(client.ring_base(0), ring.drained_base());
    let marked = harvest(&log);
    for slot in [0, 1, 2, 3, 4, 9] {
        assert!(pages(page(slot).gpa, 4096).all(|page| marked.contains(&page)));
    }
}

#[rstest]
fn the_rings_of_a_closed_connection_are_stopped_before_the_next_front_end_is_served(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    let (mut server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 5);
    drop(client);
    let next = server.connect();
    gate.write(1).unwrap();
    next.wait_until_processed();
    for slot in 10..15 {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    let _ = ring.driver.publish();
    ring.kick.write(1).unwrap();
    let (before, _) = (guest.snapshot(), ring.call.read());
    drop(next);
    server.stop();
    assert!(before == guest.snapshot());
    assert!(ring.call.read().is_err());
}

/// Rule I10.2: requests left in flight are not published after the hang-up. The next front-end does not wait for them.
#[rstest]
fn a_hang_up_during_get_vring_base_abandons_the_requests_in_flight(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (device, gate) = GatedDevice::new();
    let (server, guest, client) = Server::new(device).negotiated(features);
    let ring = start_with_requests_in_flight(&client, &guest, features, 5);
    client.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
    drop(client);
    let next = server.connect();
    next.send(Code::GET_FEATURES, VERSION, &[], &[]);
    let heard = is_readable(&next, DEADLINE.as_millis() as u16);
    gate.write(1).unwrap();
    assert!(heard, "the ring was waited for although nobody hears of its base");
    assert!(!ring.has_completion(&guest), "a request was published although the front-end has gone");
}

/// A device that puts its oldest request back when the ring stops, and only then completes the later requests.
struct PutsBackOldest(Arc<GatedDevice>);

struct PutsBackOldestQueue(GatedQueue);

impl VirtioDevice for PutsBackOldest {
    fn features(&self) -> VirtioFeatures {
        self.0.features()
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(PutsBackOldestQueue(GatedQueue { gate: self.0.gate.clone(), held: Vec::new() })))
    }
}

impl Queue for PutsBackOldestQueue {
    forward!(0: completion_fd -> Option<BorrowedFd<'_>>);

    fn submit(&mut self, request: Request) {
        self.0.submit(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        self.0.completions(done);
    }

    fn put_back(&mut self, unused: &mut Vec<Request>) {
        unused.push(self.0.held.remove(0));
        self.0.gate.write(1).unwrap();
    }
}

/// A request that is put back while later requests are in flight cannot return to the available ring. The request is
/// used in its turn instead.
#[rstest]
fn a_request_put_back_before_later_ones_is_used_in_its_turn_with_in_order(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, _) = GatedDevice::new();
    let features = features | VIRTIO_F_IN_ORDER;
    let (_server, guest, client) = Server::new(Arc::new(PutsBackOldest(device))).negotiated(features);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 3);
    assert_eq!(client.ring_base(0), ring.drained_base());
    assert_eq!(ring.completions(3).len(), 3);
}

#[rstest]
fn a_stopped_server_completes_and_publishes_requests_in_flight(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (device, gate) = GatedDevice::new();
    let (mut server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 5);
    gate.write(1).unwrap();
    server.stop();
    assert_eq!(ring.completions(5).len(), 5);
    assert!(!server.folder.path().join("socket").exists(), "the socket file stays behind");
}

/// Rule M1.2.
#[rstest]
fn an_added_memory_region_is_usable_immediately_and_a_removed_one_is_not(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    gate.write(1).unwrap();
    let (_server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = Ring::started(&client, &guest, 0, 256, features);
    let (fd, gpa) = (sealed_memfd("more", 0x10_0000).unwrap(), GuestAddress(2 << 30));
    let region = Region::share(fd, gpa, 0x10_0000, 0).unwrap();
    assert_eq!(add_region(&client, &region), 0);
    assert_eq!(add_region(&client, &region), 1, "an overlapping region was taken");
    ring.driver.add(&[], &[Buffer { gpa, len: 1 }], None).unwrap().unwrap();
    ring.serve_one();
    let mut byte = [0u8];
    region.slice(0, 1).unwrap().copy_to(&mut byte);
    assert_eq!(byte, [0x5a]);
    let message = vhost_migrate::abi::vhost_user::MemRegMsg { padding: 0, region: Guest::describe(&region) };
    client.send(Code::REM_MEM_REG, VERSION, message.as_bytes(), &[]);
    assert_eq!(client.acknowledged(Code::REM_MEM_REG, message.as_bytes(), &[]), 1, "it was removed twice");
}

/// The base of the ring is unknown after the panic. The back-end does not reply to GET_VRING_BASE.
#[rstest]
fn a_device_that_panics_ends_the_connection_and_the_next_front_end_is_served(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (device, gate) = GatedDevice::new();
    let (server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = Ring::new(&guest, 0, 256, features);
    ring.driver.add(&[], &[page(0)], None).unwrap().unwrap();
    // This buffer is outside memory. The device panics when it fills the buffer.
    ring.driver.add(&[], &[Buffer { gpa: GuestAddress(1 << 50), len: 1 }], None).unwrap().unwrap();
    ring.start(&client, &guest);
    ring.kick();
    while guest.bytes(page(0).gpa, 1) != [0x5a] {
        client.wait_until_processed();
    }
    client.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
    assert!(client.is_closed());
    let (client, guest) = (server.connect(), Guest::new());
    negotiate(&client, &guest, features);
    let mut ring = start_with_requests_in_flight(&client, &guest, features, 10);
    gate.write(1).unwrap();
    ring.completions(10);
    assert_eq!(client.ring_base(0), ring.drained_base());
}

/// A device that fills writable buffers with 0x5a and drops the request on another thread, as after a panic there.
struct DroppingDevice;

impl VirtioDevice for DroppingDevice {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(DroppingDevice))
    }
}

impl Queue for DroppingDevice {
    fn submit(&mut self, mut request: Request) {
        std::thread::spawn(move || {
            let filling = vec![0x5a; request.writable_len() as usize];
            request.write(0, &filling).unwrap();
        });
    }

    fn completions(&mut self, _done: &mut Vec<Request>) {}
}

#[rstest]
fn a_request_dropped_by_the_device_is_logged_and_returned_to_the_driver(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client) = Server::new(Arc::new(DroppingDevice)).negotiated(features);
    let log = install_log(&client, &guest);
    let mut ring = Ring::new(&guest, 0, 256, features);
    ring.set_up(&client, &guest, ring.initial_base());
    start_logging(&client, &guest, features, &mut [&mut ring], LOG_AT);
    ring.enable(&client, true);
    for slot in 0..20 {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    ring.serve(20);
    let marked = harvest(&log);
    assert!((0..20).all(|slot| marked.contains(&(page(slot).gpa.0 / LOG_PAGE))), "a page was not logged");
    for slot in 20..40 {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    ring.kick();
    // A second batch returns to the driver too.
    ring.completions(20);
    for slot in 40..60 {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    ring.kick();
    // In both layouts, the lowest 15 bits of the base are the number of requests that the back-end has taken.
    let base = client.ring_base(0) & 0x7fff;
    assert!((40..=60).contains(&base), "{base}");
    ring.completions(base as usize - 40);
}
