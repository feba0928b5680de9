//! Protocol rules that front-ends depend on.

use std::os::fd::AsFd;
use std::path::Path;

use rstest::rstest;
use vhost_migrate::abi::vhost_user::{
    ConfigHeader, FrontendRequest as Code, Header, InflightDescription, LogDescription, MemoryHeader, ProtocolFeatures,
    VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VRING_NOFD_MASK, VringState, own,
};
use vhost_migrate::abi::virtio::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
    VirtioFeatures,
};
use vhost_migrate::dirty::Log;
use vhost_migrate::inflight;
use vhost_migrate::memory::GuestAddress;
use zerocopy::{FromBytes, IntoBytes};

use crate::drain::GatedDevice;
use crate::guest::{
    Guest, LOG_ALL, PACKED, PROTOCOL, PROTOCOL_FEATURES_BIT, Ring, SPLIT, inflight_kind, inflight_region, negotiate,
    request_addresses, send_log, status,
};
use crate::raw::{DEADLINE, NEED_REPLY, RawFrontend, VERSION};
use crate::server::Server;
use crate::wait::is_readable;

const DISK: u64 = 1 << 20;

fn disk() -> Server {
    Server::disk(DISK, |_| {})
}

fn running(client: &RawFrontend, guest: &Guest, features: VirtioFeatures) -> Ring {
    negotiate(client, guest, features);
    Ring::started(client, guest, 0, 256, features)
}

fn read_one(guest: &Guest, ring: &mut Ring, sector: u64) {
    let head = ring.read(guest, 0, sector, 512);
    ring.kick();
    assert_eq!(ring.completion(), (head, 513));
    assert_eq!(status(guest, 0), 0);
    assert_eq!(guest.bytes(request_addresses(0).2, 8), sector.to_le_bytes());
}

/// Rules B4.1 and R1.1.
#[test]
fn the_offered_features_are_those_of_the_protocol_rules() {
    let (_server, _guest, client) = disk().connected();
    let features = VirtioFeatures::from_bits_retain(client.request_u64(Code::GET_FEATURES));
    let rings = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_RING_PACKED];
    let transport = [VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES];
    for feature in rings.into_iter().chain(transport) {
        assert!(features.contains(feature), "{feature:?}");
    }
    let offered = ProtocolFeatures::from_bits_retain(client.request_u64(Code::GET_PROTOCOL_FEATURES));
    let expected = [
        ProtocolFeatures::MQ,
        ProtocolFeatures::LOG_SHMFD,
        ProtocolFeatures::REPLY_ACK,
        ProtocolFeatures::BACKEND_REQ,
        ProtocolFeatures::CONFIG,
        ProtocolFeatures::BACKEND_SEND_FD,
        ProtocolFeatures::INFLIGHT_SHMFD,
        ProtocolFeatures::RESET_DEVICE,
        ProtocolFeatures::INBAND_NOTIFICATIONS,
        ProtocolFeatures::CONFIGURE_MEM_SLOTS,
        ProtocolFeatures::STATUS,
    ];
    // Offered only for an image on a file system with extended attributes.
    let offered = offered & !own::F_DISK_GENERATION;
    assert_eq!(offered, expected.into_iter().collect());
    assert_eq!(client.request_u64(Code::GET_QUEUE_NUM), 2);
    assert!(client.request_u64(Code::GET_MAX_MEM_SLOTS) >= 509);
}

/// Rules F1.1 to F1.3.
#[test]
fn a_message_may_come_byte_by_byte_with_its_fds_on_the_first() {
    let (_server, guest, client) = disk().connected();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    let (_, fd) = Log::create(guest.memory.end()).unwrap();
    let header = Header { request: Code::SET_LOG_BASE.0, flags: VERSION, size: 16 };
    let body = LogDescription { mmap_size: 8, mmap_offset: 0 };
    client.send_slowly(&[header.as_bytes(), body.as_bytes()].concat(), Some(fd.as_fd()));
    assert_eq!(client.reply(Code::SET_LOG_BASE), body.as_bytes());
}

/// Rules F3.1, F3.2.
#[test]
fn need_reply_adds_no_second_reply_to_a_request_with_its_own_reply() {
    let (_server, _guest, client) = disk().connected();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    client.send(Code::GET_QUEUE_NUM, NEED_REPLY, &[], &[]);
    client.send(Code::GET_STATUS, VERSION, &[], &[]);
    assert_eq!(client.reply(Code::GET_QUEUE_NUM), 2u64.as_bytes());
    client.reply(Code::GET_STATUS);
}

/// Rule F4.2; UML waits for this reply.
#[test]
fn the_message_that_acknowledges_reply_ack_is_itself_acknowledged() {
    let (_server, _guest, client) = disk().connected();
    client.send_acknowledged(Code::SET_PROTOCOL_FEATURES, &PROTOCOL, &[]);
    let without = PROTOCOL & !ProtocolFeatures::REPLY_ACK;
    client.send(Code::SET_PROTOCOL_FEATURES, NEED_REPLY, without.as_bytes(), &[]);
    client.wait_until_processed(); // REPLY_ACK is off again: no other reply follows
}

/// Rule F4.3.
#[test]
fn need_reply_is_ignored_before_reply_ack_is_acknowledged() {
    let (_server, _guest, client) = disk().connected();
    client.send(Code::SET_OWNER, NEED_REPLY, &[], &[]);
    client.wait_until_processed();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    assert_eq!(client.acknowledged(Code::SET_OWNER, &[], &[]), 0);
}

/// Rules F6.1, F6.2.
#[test]
fn a_memory_table_payload_may_be_longer_than_its_regions() {
    let (_server, guest, client) = disk().connected();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    // User-mode Linux always sends 72 bytes, one region and one fd.
    let mut payload = MemoryHeader { nregions: 1, padding: 0 }.as_bytes().to_vec();
    payload.extend(Guest::describe(&guest.memory.regions()[0]).as_bytes());
    payload.resize(72, 0xee);
    assert_eq!(client.acknowledged(Code::SET_MEM_TABLE, &payload, &guest.fds()[..1]), 0);
    assert_eq!(client.acknowledged(Code::SET_MEM_TABLE, &payload[..39], &guest.fds()[..1]), 1);
}

/// Rule F7.1. rust-vmm's front-end requests acknowledgements, but waits for these 16 bytes here.
#[test]
fn set_log_base_has_its_own_reply_also_with_need_reply() {
    let (_server, guest, client) = disk().connected();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    let (log, fd) = Log::create(guest.memory.end()).unwrap();
    send_log(&client, &log, &fd);
    let body = LogDescription { mmap_size: log.size(), mmap_offset: 0 };
    client.send(Code::SET_LOG_BASE, NEED_REPLY, body.as_bytes(), &[fd.as_fd()]);
    assert_eq!(client.reply(Code::SET_LOG_BASE), body.as_bytes());
    // Without LOG_SHMFD the request has no reply of its own.
    client.send_body(Code::SET_PROTOCOL_FEATURES, &(PROTOCOL & !ProtocolFeatures::LOG_SHMFD));
    assert_eq!(client.acknowledged(Code::SET_LOG_BASE, body.as_bytes(), &[fd.as_fd()]), 0);
}

/// Rule F8.1.
#[rstest]
fn a_call_fd_may_be_a_socket_and_gets_eight_bytes_per_signal(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    client.send_acknowledged(Code::SET_VRING_CALL, &0u64, &[theirs.as_fd()]);
    drop(theirs);
    ring.read(&guest, 0, 0, 512);
    ring.kick();
    let mut signal = [0; 8];
    std::io::Read::read_exact(&mut &ours, &mut signal).unwrap();
    assert_eq!(u64::from_ne_bytes(signal), 1);
    // The test no longer reads the call fd: the ring must not wait for it.
    for _ in 0..2000 {
        while ring.driver.pop_used().unwrap().is_some() {}
        read_polled(&guest, &mut ring);
    }
}

fn read_polled(guest: &Guest, ring: &mut Ring) {
    ring.read(guest, 0, 0, 512);
    ring.kick();
    while ring.driver.pop_used().unwrap().is_none() {
        std::thread::yield_now();
    }
}

/// Rule R1.2.
#[rstest]
fn without_bit_30_a_ring_runs_as_soon_as_it_is_kicked(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().negotiated(features & !PROTOCOL_FEATURES_BIT);
    let mut ring = Ring::new(&guest, 1, 64, features);
    ring.set_up(&client, &guest, ring.initial_base());
    read_one(&guest, &mut ring, 7);
}

/// Rule R2.2.
#[rstest]
fn requests_available_before_the_ring_starts_are_served_without_a_kick(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client) = disk().negotiated(features);
    let mut ring = Ring::new(&guest, 0, 256, features);
    ring.read(&guest, 0, 3, 512);
    let _ = ring.driver.publish();
    ring.enable(&client, true);
    ring.set_up(&client, &guest, ring.initial_base());
    ring.completion();
    assert_eq!(status(&guest, 0), 0);
}

/// Rules R2.1 and R6.4: the parts of a ring may come in any order.
#[rstest]
fn a_ring_runs_once_its_setup_is_complete_in_any_order(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().connected();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    let mut ring = Ring::new(&guest, 0, 256, features);
    ring.read(&guest, 0, 3, 512);
    ring.set_up(&client, &guest, ring.initial_base());
    // The request is refused because there is no memory, but its state is kept.
    let enable = VringState { index: 0, num: 1 };
    assert_eq!(client.acknowledged(Code::SET_VRING_ENABLE, enable.as_bytes(), &[]), 1);
    let _ = ring.driver.publish();
    guest.send_table(&client);
    ring.completion();
    assert_eq!(status(&guest, 0), 0);
}

/// Rule D2.2: front-ends probe a ring in this way.
#[rstest]
fn a_ring_that_is_enabled_and_not_started_takes_nothing(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().negotiated(features);
    let mut ring = Ring::new(&guest, 0, 256, features);
    ring.read(&guest, 0, 3, 512);
    let _ = ring.driver.publish();
    client.send_body(Code::SET_VRING_NUM, &VringState { index: 0, num: 256 });
    client.send_body(Code::SET_VRING_BASE, &VringState { index: 0, num: ring.initial_base() });
    client.send_body(Code::SET_VRING_ADDR, &ring.addr(&guest));
    ring.enable(&client, true);
    ring.enable(&client, false);
    assert_eq!(client.ring_base(0), ring.initial_base());
    assert!(ring.driver.pop_used().unwrap().is_none());
}

/// Rules R5.1, R5.2.
#[rstest]
fn set_vring_addr_on_a_running_ring_changes_only_its_logging(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    for sector in 0..20 {
        read_one(&guest, &mut ring, sector);
        ring.log_at = if sector % 2 == 0 { Some(GuestAddress(0x30_0000)) } else { None };
        client.send_acknowledged(Code::SET_VRING_ADDR, &ring.addr(&guest), &[]);
    }
    let mut moved = ring.addr(&guest);
    moved.desc_user_addr += 4096;
    assert_eq!(client.acknowledged(Code::SET_VRING_ADDR, moved.as_bytes(), &[]), 1);
    read_one(&guest, &mut ring, 20);
    assert_eq!(client.ring_base(0), ring.drained_base());
}

/// Rule R2.6.
#[rstest]
fn set_vring_num_and_set_vring_base_are_refused_on_a_running_ring(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    for code in [Code::SET_VRING_NUM, Code::SET_VRING_BASE] {
        assert_eq!(client.acknowledged(code, VringState { index: 0, num: 128 }.as_bytes(), &[]), 1, "{code}");
    }
    read_one(&guest, &mut ring, 0);
}

/// Rules R3.1 and R2.2: a ring that was stopped starts again where it was.
#[rstest]
fn a_stopped_ring_resumes_at_its_base(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    for round in 0..5 {
        read_one(&guest, &mut ring, round);
        assert_eq!(client.ring_base(0), ring.drained_base());
        ring.set_up(&client, &guest, ring.drained_base());
    }
    read_one(&guest, &mut ring, 0);
}

/// Rules R8.2, R8.3.
#[rstest]
fn a_reset_stops_the_rings_and_keeps_the_memory(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    read_one(&guest, &mut ring, 0);
    client.send_acknowledged(Code::SET_STATUS, &4u64, &[]);
    assert_eq!(client.request_u64(Code::GET_STATUS), 4);
    for reset in [Code::SET_STATUS, Code::RESET_DEVICE] {
        client.send_acknowledged(reset, &0u64, &[]);
        assert_eq!(client.request_u64(Code::GET_STATUS), 0);
        ring.read(&guest, 0, 0, 512);
        let _ = ring.driver.publish();
        ring.kick.write(1).unwrap();
        client.wait_until_processed();
        assert!(ring.driver.pop_used().unwrap().is_none(), "a request was served after the reset");
        client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
        ring = Ring::new(&guest, 0, 256, features);
        ring.start(&client, &guest);
        read_one(&guest, &mut ring, 1);
    }
}

/// Rule R8.1.
#[rstest]
fn reset_owner_disables_all_rings(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    read_one(&guest, &mut ring, 0);
    client.send_acknowledged(Code::RESET_OWNER, &[0u8; 0], &[]);
    ring.read(&guest, 0, 0, 512);
    let _ = ring.driver.publish();
    ring.kick.write(1).unwrap();
    client.wait_until_processed();
    assert!(ring.driver.pop_used().unwrap().is_none(), "a request was served without an owner");
    // The ring's base is kept.
    client.send(Code::SET_VRING_KICK, NEED_REPLY, &0u64.to_ne_bytes(), &[ring.kick.as_fd()]);
    client.reply(Code::SET_VRING_KICK);
    ring.enable(&client, true);
    ring.completion();
}

/// Rule R9.1.
#[rstest]
fn the_next_front_end_inherits_only_the_disk_contents(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (server, guest, client, mut ring) = disk().running(256, features);
    ring.write(&guest, 1, 9, &[0x77; 512]);
    ring.serve_one();
    // A second front-end waits until the first has disconnected.
    let next = server.connect();
    drop(client);
    negotiate(&next, &guest, features);
    next.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
    assert_eq!(next.ring_base_reply(0), 0);
    let mut ring = Ring::started(&next, &guest, 0, 256, features);
    ring.read(&guest, 0, 9, 512);
    ring.serve_one();
    assert_eq!(guest.bytes(request_addresses(0).2, 512), [0x77; 512]);
}

/// Rules C1.1 and C1.3.
#[test]
fn get_config_echoes_offset_and_size() {
    let (device, _gate) = GatedDevice::new();
    let server = Server::new(device);
    let client = server.connect();
    for (offset, size, bytes) in [(0, 4, &[1, 2, 3, 4][..]), (2, 2, &[3, 4]), (0, 8, &[1, 2, 3, 4, 0, 0, 0, 0])] {
        let header = ConfigHeader { offset, size, flags: 0 };
        let mut question = header.as_bytes().to_vec();
        question.resize(12 + size as usize, 0xaa);
        let answer = client.request(Code::GET_CONFIG, &question);
        assert_eq!(answer, [header.as_bytes(), bytes].concat());
    }
    let beyond = ConfigHeader { offset: 250, size: 7, flags: 0 };
    assert!(client.request(Code::GET_CONFIG, beyond.as_bytes()).is_empty(), "no payload is how this request says no");
}

/// Rules F6.3, I1.1 and I1.3.
#[rstest]
fn get_inflight_fd_creates_the_requested_region_and_set_inflight_fd_accepts_it(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_server, guest, client) = disk().connected();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &PROTOCOL);
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 256, padding: [0; 4] };
    client.send(Code::GET_INFLIGHT_FD, VERSION, wanted.as_bytes(), &[]);
    let (_, answer, fd) = client.receive();
    let answer = InflightDescription::read_from_bytes(&answer).unwrap();
    assert_eq!(answer.mmap_size, inflight::InflightRegion::bytes_for(inflight_kind(features), 2, 256).unwrap());
    assert_eq!((answer.mmap_offset, answer.num_queues, answer.queue_size), (0, 2, 256));
    client.send_acknowledged(Code::SET_INFLIGHT_FD, &answer, &[fd.unwrap().as_fd()]);
    let mut ring = running(&client, &guest, features);
    read_one(&guest, &mut ring, 0);
    // The region cannot be changed while a ring runs.
    let none = InflightDescription { num_queues: 99, ..wanted };
    client.send(Code::GET_INFLIGHT_FD, VERSION, none.as_bytes(), &[]);
    let (_, answer, fd) = client.receive();
    assert_eq!(InflightDescription::read_from_bytes(&answer).unwrap().mmap_size, 0, "a region of 0 bytes says no");
    assert!(fd.is_none());
}

/// Rules I5.1, I5.3: the destination of a migration, where the ring was used without the region.
#[rstest]
fn a_fresh_inflight_region_on_a_used_ring_marks_no_request(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    for sector in 0..5 {
        read_one(&guest, &mut ring, sector);
    }
    let base = client.ring_base(0);
    let (region, fd, description) = inflight_region(features, 1, 256);
    client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    ring.set_up(&client, &guest, base);
    read_one(&guest, &mut ring, 6);
    assert_eq!(client.ring_base(0), ring.drained_base());
    assert_eq!(ring.in_flight(&guest, &region), Some(0));
    let version = |region: &inflight::InflightRegion| region.copy(0).unwrap()[8];
    assert_eq!(version(&region), 1);
    // Rule I7.1: a reset makes the region fresh again.
    client.send_acknowledged(Code::RESET_DEVICE, &[0u8; 0], &[]);
    assert_eq!(version(&region), 0);
}

/// Rule R1.4: a ring keeps the features that were acknowledged when it started.
#[rstest]
fn only_log_all_may_change_while_a_ring_runs(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().connected();
    let features = features | VIRTIO_RING_F_INDIRECT_DESC;
    let mut ring = running(&client, &guest, features);
    for changed in [VIRTIO_F_RING_PACKED, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_BLK_F_FLUSH] {
        let other = features ^ changed;
        assert_eq!(client.acknowledged(Code::SET_FEATURES, other.as_bytes(), &[]), 1, "{changed:?} changed");
        let other = other | LOG_ALL;
        assert_eq!(client.acknowledged(Code::SET_FEATURES, other.as_bytes(), &[]), 1, "{changed:?} changed");
        read_one(&guest, &mut ring, changed.bits().trailing_zeros().into());
    }
    for same in [features, features | LOG_ALL, features] {
        client.send_acknowledged(Code::SET_FEATURES, &same, &[]);
        read_one(&guest, &mut ring, 1);
    }
    // A stopped ring starts with the features acknowledged since, here the other kind of ring.
    assert_eq!(client.ring_base(0), ring.drained_base());
    let other = features ^ VIRTIO_F_RING_PACKED;
    client.send_acknowledged(Code::SET_FEATURES, &other, &[]);
    let mut ring = Ring::new(&guest, 0, 256, other);
    ring.set_up(&client, &guest, ring.initial_base());
    read_one(&guest, &mut ring, 2);
}

/// SET_VRING_KICK without an fd: the back-end polls the ring.
/// Rule B3.7.
#[rstest]
fn a_ring_without_a_kick_fd_is_served_by_polling(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut ring) = disk().running(256, features);
    client.send_acknowledged(Code::SET_VRING_KICK, &0x100u64, &[]);
    ring.read(&guest, 0, 2, 512);
    let _ = ring.driver.publish();
    ring.completion();
    assert_eq!(status(&guest, 0), 0);
}

/// The error messages tell the user of the command line what to do.
#[test]
fn a_stale_socket_file_is_replaced_and_other_files_are_reported() {
    use vhost_migrate::backend::BackendListener;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let explain = |path: &Path| BackendListener::bind(path).unwrap_err().to_string();
    drop(std::os::unix::net::UnixListener::bind(at("stale")).unwrap());
    let listener = BackendListener::bind(at("stale")).unwrap();
    assert!(explain(&at("stale")).contains("another process listens there"));
    drop(listener);
    assert!(!at("stale").exists());
    std::fs::write(at("file"), "precious").unwrap();
    assert!(explain(&at("file")).contains("a file that is not a socket"));
    assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
    assert!(explain(&at("no/such/folder")).contains("its directory does not exist: create it first"));
    assert!(explain(&at(&"long".repeat(40))).contains("use a shorter one"));
}

/// Rule F5.4: read as a vring state, the error number must not name a ring.
#[test]
fn a_refused_get_vring_base_replies_with_an_invalid_ring_index() {
    let (_server, _guest, client) = disk().negotiated(SPLIT);
    client.send(Code::GET_VRING_BASE, NEED_REPLY, VringState { index: 9, num: 0 }.as_bytes(), &[]);
    assert_eq!(client.reply(Code::GET_VRING_BASE), [0xff; 8]);
}

/// Rule R8.4: the call fd belongs to the front-end, and not to the driver.
#[rstest]
fn a_reset_keeps_the_call_fd(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = disk().negotiated(features);
    let mut ring = Ring::new(&guest, 0, 64, features);
    let index = ring.index;
    client.send(Code::SET_VRING_CALL, VERSION, u64::from(index).as_bytes(), &[ring.call.as_fd()]);
    client.send_acknowledged(Code::RESET_DEVICE, &[0u8; 0], &[]);
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    client.send_body(Code::SET_VRING_NUM, &VringState { index, num: 64 });
    client.send_body(Code::SET_VRING_BASE, &VringState { index, num: ring.initial_base() });
    client.send_body(Code::SET_VRING_ADDR, &ring.addr(&guest));
    client.send(Code::SET_VRING_KICK, VERSION, u64::from(index).as_bytes(), &[ring.kick.as_fd()]);
    ring.enable(&client, true);
    ring.read(&guest, 0, 1, 512);
    ring.kick();
    assert_eq!(ring.completion().1, 513);
}

/// Rules R10.1, R10.2: also if the ring was restarted in between.
#[rstest]
fn a_notification_without_a_call_fd_is_signalled_after_the_ring_restarts(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
    #[values(false, true)] stopped: bool,
) {
    let (_server, guest, client) = disk().negotiated(features);
    let mut ring = Ring::new(&guest, 0, 64, features);
    ring.set_up(&client, &guest, ring.initial_base());
    let (index, no_fd) = (u64::from(ring.index), VRING_NOFD_MASK);
    client.send_body(Code::SET_VRING_CALL, &(index | no_fd));
    ring.enable(&client, true);
    ring.read(&guest, 0, 1, 512);
    ring.kick();
    while !ring.has_completion(&guest) {
        client.wait_until_processed();
    }
    let call = |client: &RawFrontend| client.send_acknowledged(Code::SET_VRING_CALL, &index, &[ring.call.as_fd()]);
    if stopped {
        ring.enable(&client, false);
        call(&client);
        ring.enable(&client, true);
    } else {
        guest.send_table(&client);
        call(&client);
    }
    assert!(is_readable(&ring.call, DEADLINE.as_millis() as u16), "the driver was never notified");
}
