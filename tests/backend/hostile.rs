//! Invalid input: every invalid message is refused, and the device serves the next front-end.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;

use rstest::rstest;
use vhost_migrate::abi::vhost_user::{
    ConfigHeader, FrontendRequest as Code, Header, InflightDescription, LogDescription, MemRegMsg, MemoryHeader,
    MemoryRegion, ProtocolFeatures, VringAddr, VringState,
};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::memory::{GuestAddress, Region, sealed_memfd};
use vhost_migrate::unstable::backend::MAX_FDS;
use zerocopy::IntoBytes;

use crate::guest::{
    Guest, HIGH, PACKED, PROTOCOL, REGION, Ring, SPLIT, add_region, inflight_region, negotiate, request_addresses,
    status,
};
use crate::raw::{DEADLINE, NEED_REPLY, RawFrontend, VERSION};
use crate::server::{Process, Server};

/// A message that the back-end refuses with a non-zero number. The connection continues (rule F5.1).
struct InvalidMessage {
    what: &'static str,
    code: Code,
    payload: Vec<u8>,
    fds: usize,
}

fn invalid(
    what: &'static str,
    code: Code,
    payload: &(impl IntoBytes + zerocopy::Immutable + ?Sized),
    fds: usize,
) -> InvalidMessage {
    InvalidMessage { what, code, payload: payload.as_bytes().to_vec(), fds }
}

fn table(regions: &[MemoryRegion]) -> Vec<u8> {
    let mut payload = MemoryHeader { nregions: regions.len() as u32, padding: 0 }.as_bytes().to_vec();
    payload.extend(regions.as_bytes());
    payload
}

fn region(guest_phys_addr: u64, memory_size: u64, userspace_addr: u64, mmap_offset: u64) -> MemoryRegion {
    MemoryRegion { guest_phys_addr, memory_size, userspace_addr, mmap_offset }
}

/// Messages that are invalid on a connection with memory and a running ring 0. Their fds are of a memfd of 1 MiB.
fn invalid_messages(guest: &Guest, ring: &Ring, features: VirtioFeatures) -> Vec<InvalidMessage> {
    const MIB: u64 = 1 << 20;
    let state = |index, num| VringState { index, num };
    let fine = VringAddr { index: 1, ..ring.addr(guest) };
    let inflight = |mmap_size, mmap_offset, num_queues, queue_size| InflightDescription {
        mmap_size,
        mmap_offset,
        num_queues,
        queue_size,
        padding: [0; 4],
    };
    let add = |region| MemRegMsg { padding: 0, region };
    let log = |mmap_size, mmap_offset| LogDescription { mmap_size, mmap_offset };
    let config = |offset, size| ConfigHeader { offset, size, flags: 0 };
    let mut more_than_sent = table(&[region(0, MIB, 0, 0)]);
    more_than_sent[0] = 2;
    let mut huge_count = table(&[region(0, MIB, 0, 0)]);
    huge_count[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut all = vec![
        invalid(
            "features that were not offered",
            Code::SET_FEATURES,
            &(features | VirtioFeatures::from_bits_retain(1 << 50)),
            0,
        ),
        invalid("features that a running ring does not have", Code::SET_FEATURES, &(features ^ PACKED ^ SPLIT), 0),
        invalid("protocol features that were not offered", Code::SET_PROTOCOL_FEATURES, &u64::MAX, 0),
        invalid(
            "a protocol feature without a name",
            Code::SET_PROTOCOL_FEATURES,
            &(PROTOCOL | ProtocolFeatures::from_bits_retain(1 << 50)),
            0,
        ),
        invalid("a table without fds", Code::SET_MEM_TABLE, table(&[region(0, MIB, 0, 0)]).as_slice(), 0),
        invalid("a table with too many fds", Code::SET_MEM_TABLE, table(&[region(0, MIB, 0, 0)]).as_slice(), 2),
        invalid("a table shorter than it says", Code::SET_MEM_TABLE, more_than_sent.as_slice(), 2),
        invalid("a table of 2^32 - 1 regions", Code::SET_MEM_TABLE, huge_count.as_slice(), 1),
        invalid("a region larger than its file", Code::SET_MEM_TABLE, table(&[region(0, MIB + 1, 0, 0)]).as_slice(), 1),
        invalid("a region beyond its file", Code::SET_MEM_TABLE, table(&[region(0, MIB, 0, 4096)]).as_slice(), 1),
        invalid(
            "an offset that wraps",
            Code::SET_MEM_TABLE,
            table(&[region(0, MIB, 0, u64::MAX - 4095)]).as_slice(),
            1,
        ),
        invalid("an empty region", Code::SET_MEM_TABLE, table(&[region(0, 0, 0, 0)]).as_slice(), 1),
        invalid("a region that wraps", Code::SET_MEM_TABLE, table(&[region(u64::MAX, MIB, 0, 0)]).as_slice(), 1),
        invalid(
            "overlapping regions",
            Code::SET_MEM_TABLE,
            table(&[region(0, MIB, 0, 0), region(MIB - 1, MIB, MIB, 0)]).as_slice(),
            2,
        ),
        invalid("an added region that overlaps", Code::ADD_MEM_REG, &add(region(HIGH.0 + 4096, MIB, 1 << 40, 0)), 1),
        invalid("an added region without an fd", Code::ADD_MEM_REG, &add(region(1 << 40, MIB, 1 << 40, 0)), 0),
        invalid("an added region with two fds", Code::ADD_MEM_REG, &add(region(1 << 40, MIB, 1 << 40, 0)), 2),
        invalid("removal of a region that is not there", Code::REM_MEM_REG, &add(region(1 << 40, MIB, 0, 0)), 0),
        invalid("a log without an fd", Code::SET_LOG_BASE, &log(4096, 0), 0),
        invalid("a log larger than its file", Code::SET_LOG_BASE, &log(MIB + 1, 0), 1),
        invalid("a log at the end of its file", Code::SET_LOG_BASE, &log(1, MIB), 1),
        invalid("a log that wraps", Code::SET_LOG_BASE, &log(u64::MAX, 8), 1),
        invalid("a log of no bytes", Code::SET_LOG_BASE, &log(0, 0), 1),
        invalid("a size of 0", Code::SET_VRING_NUM, &state(1, 0), 0),
        invalid("a size that wraps 16 bits", Code::SET_VRING_NUM, &state(1, 65536 + 64), 0),
        invalid("a size larger than is offered", Code::SET_VRING_NUM, &state(1, 2048), 0),
        invalid("the size of no ring", Code::SET_VRING_NUM, &state(2, 64), 0),
        invalid("the base of no ring", Code::SET_VRING_BASE, &state(u32::MAX, 0), 0),
        invalid("the enabling of no ring", Code::SET_VRING_ENABLE, &state(65536, 1), 0),
        invalid("the kick of no ring", Code::SET_VRING_KICK, &255u64, 1),
        invalid("a kick without an fd", Code::SET_VRING_KICK, &1u64, 0),
        invalid("a call without an fd", Code::SET_VRING_CALL, &0u64, 0),
        invalid("an error fd for no ring", Code::SET_VRING_ERR, &9u64, 1),
        invalid("a call with two fds", Code::SET_VRING_CALL, &0u64, 2),
        invalid("the stop of no ring", Code::GET_VRING_BASE, &state(7, 0), 0),
        invalid("addresses of no ring", Code::SET_VRING_ADDR, &VringAddr { index: 2, ..fine }, 0),
        invalid("a descriptor table outside memory", Code::SET_VRING_ADDR, &VringAddr { desc_user_addr: 8, ..fine }, 0),
        invalid("a used ring that wraps", Code::SET_VRING_ADDR, &VringAddr { used_user_addr: u64::MAX, ..fine }, 0),
        invalid(
            "an available ring that leaves its region",
            Code::SET_VRING_ADDR,
            &VringAddr { avail_user_addr: guest.user(HIGH).0 + REGION - 2, ..fine },
            0,
        ),
        invalid(
            "a log address that is not aligned",
            Code::SET_VRING_ADDR,
            &VringAddr { flags: 1, log_guest_addr: 6, ..fine },
            0,
        ),
        invalid(
            "a log address that wraps",
            Code::SET_VRING_ADDR,
            &VringAddr { flags: 1, log_guest_addr: u64::MAX - 3, ..fine },
            0,
        ),
        invalid("configuration written", Code::SET_CONFIG, [config(0, 4).as_bytes(), &[0; 4]].concat().as_slice(), 0),
        invalid("configuration cut short", Code::SET_CONFIG, [config(0, 8).as_bytes(), &[0; 4]].concat().as_slice(), 0),
        invalid("an inflight region without an fd", Code::SET_INFLIGHT_FD, &inflight(1 << 16, 0, 1, 256), 0),
        invalid("an inflight region too small", Code::SET_INFLIGHT_FD, &inflight(64, 0, 1, 256), 1),
        invalid("an inflight region beyond its file", Code::SET_INFLIGHT_FD, &inflight(1 << 20, MIB, 1, 256), 1),
        invalid("an inflight region for no queue", Code::SET_INFLIGHT_FD, &inflight(1 << 16, 0, 0, 256), 1),
        invalid("an inflight region for three queues", Code::SET_INFLIGHT_FD, &inflight(1 << 16, 0, 3, 256), 1),
        invalid("an inflight region for rings of 0", Code::SET_INFLIGHT_FD, &inflight(1 << 16, 0, 1, 0), 1),
        invalid("a back-end channel without an fd", Code::SET_BACKEND_REQ_FD, &[0u8; 0], 0),
        invalid("postcopy, which is not offered", Code::POSTCOPY_ADVISE, &[0u8; 0], 0),
        invalid("device state, which is not offered", Code::SET_DEVICE_STATE_FD, &0u64, 1),
        invalid("in-band notifications alone", Code::SET_PROTOCOL_FEATURES, &(1u64 << 14 | 1 << 3), 0),
        invalid("an in-band kick, which was not agreed on", Code::VRING_KICK, &state(0, 0), 0),
        invalid("the byte order of a legacy ring, which is not offered", Code::SET_VRING_ENDIAN, &state(1, 1), 0),
        invalid("a back-end channel that is a file", Code::SET_BACKEND_REQ_FD, &[0u8; 0], 1),
        invalid("an address translation, which is not offered", Code::IOTLB_MSG, &[0u8; 32], 0),
        invalid("a request that nobody knows", Code(4711), &[1u8; 100], 3),
        invalid("request 0", Code(0), &[0u8; 0], 0),
    ];
    if features == SPLIT {
        all.push(invalid("a size that is no power of two", Code::SET_VRING_NUM, &state(1, 100), 0));
    }
    // Requests with a payload are refused if the payload is truncated.
    for code in [
        Code::SET_FEATURES,
        Code::SET_PROTOCOL_FEATURES,
        Code::SET_MEM_TABLE,
        Code::ADD_MEM_REG,
        Code::REM_MEM_REG,
        Code::SET_LOG_BASE,
        Code::SET_VRING_NUM,
        Code::SET_VRING_BASE,
        Code::SET_VRING_ADDR,
        Code::SET_VRING_KICK,
        Code::SET_VRING_CALL,
        Code::SET_VRING_ERR,
        Code::SET_VRING_ENABLE,
        Code::GET_VRING_BASE,
        Code::GET_CONFIG,
        Code::SET_CONFIG,
        Code::SET_STATUS,
        Code::GET_INFLIGHT_FD,
        Code::SET_INFLIGHT_FD,
    ] {
        all.push(invalid("a message cut short", code, &[1u8; 3], 1));
    }
    // Requests that a disk does not support, or whose feature is not negotiated.
    for code in [
        Code::SEND_RARP,
        Code::NET_SET_MTU,
        Code::CREATE_CRYPTO_SESSION,
        Code::CLOSE_CRYPTO_SESSION,
        Code::POSTCOPY_ADVISE,
        Code::POSTCOPY_LISTEN,
        Code::POSTCOPY_END,
        Code::GPU_SET_SOCKET,
        Code::GET_SHARED_OBJECT,
        Code::SET_DEVICE_STATE_FD,
        Code::CHECK_DEVICE_STATE,
        Code::GET_SHMEM_CONFIG,
        Code::GET_VRING_BASE_SKIP_DRAIN,
    ] {
        all.push(invalid("what a disk does not do", code, &[0u8; 8], 0));
    }
    all
}

pub(crate) fn start_ring(client: &RawFrontend, guest: &Guest, features: VirtioFeatures) -> Ring {
    negotiate(client, guest, features);
    let ring = Ring::started(client, guest, 0, 256, features);
    client.send_acknowledged(Code::SET_VRING_NUM, &VringState { index: 1, num: 256 }, &[]);
    ring
}

pub(crate) fn assert_ring_works(guest: &Guest, ring: &mut Ring) {
    ring.read(guest, 0, 1, 512);
    ring.serve_one();
    assert_eq!((status(guest, 0), guest.bytes(request_addresses(0).2, 8)), (0, 1u64.to_le_bytes().to_vec()));
}

/// Rules B3.1, F1.5, F5.1, F6.4, F8.3, I1.2, L2.2, L2.3, L3.4, M1.2, M1.4, M1.5, R1.3 and R2.6.
#[rstest]
fn every_invalid_message_is_refused_and_the_ring_continues(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = Server::disk(1 << 20, |_| {}).connected();
    let mut ring = start_ring(&client, &guest, features);
    let file = sealed_memfd("hostile", 1 << 20).unwrap();
    for InvalidMessage { what, code, payload, fds } in invalid_messages(&guest, &ring, features) {
        let fds: Vec<BorrowedFd<'_>> = (0..fds).map(|_| file.as_fd()).collect();
        assert_ne!(client.acknowledged(code, &payload, &fds), 0, "{what} was taken");
        assert_ring_works(&guest, &mut ring);
    }
}

/// Rule F5.2.
#[rstest]
fn an_invalid_message_without_need_reply_is_ignored_unless_it_requires_a_reply(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (server, guest) = (Server::disk(1 << 20, |_| {}), Guest::new());
    let file = sealed_memfd("hostile", 1 << 20).unwrap();
    let owed = [
        Code::SET_LOG_BASE,
        Code::GET_VRING_BASE,
        Code::GET_CONFIG,
        Code::GET_INFLIGHT_FD,
        Code::POSTCOPY_ADVISE,
        Code::POSTCOPY_LISTEN,
        Code::POSTCOPY_END,
        Code::CREATE_CRYPTO_SESSION,
        Code::GET_SHARED_OBJECT,
        Code::SET_DEVICE_STATE_FD,
        Code::CHECK_DEVICE_STATE,
        Code::GET_SHMEM_CONFIG,
        Code::GET_VRING_BASE_SKIP_DRAIN,
    ];
    let mut client = server.connect();
    let mut ring = start_ring(&client, &guest, features);
    for InvalidMessage { what, code, payload, fds } in invalid_messages(&guest, &ring, features) {
        let fds: Vec<BorrowedFd<'_>> = (0..fds).map(|_| file.as_fd()).collect();
        client.send(code, VERSION, &payload, &fds);
        if owed.contains(&code) {
            // The front-end waits for a reply that cannot be given, so the back-end closes the connection.
            assert!(client.is_closed(), "{what} was passed over");
            client = server.connect();
            ring = start_ring(&client, &guest, features);
        } else {
            client.wait_until_processed();
        }
        assert_ring_works(&guest, &mut ring);
    }
}

/// Rules F1.4, F2.1 and F2.3.
#[test]
fn an_invalid_header_closes_the_connection_and_the_next_one_is_served() {
    let server = Server::disk(1 << 20, |_| {});
    let header = |request, flags, size| Header { request, flags, size }.as_bytes().to_vec();
    let frames = [
        header(1, 0, 0),
        header(1, 2, 0),
        header(1, 3, 0),
        header(5, VERSION, u32::MAX),
        header(5, VERSION, 1 << 20),
        vec![0xff; 64],
    ];
    for frame in frames {
        let client = server.connect();
        client.send_bytes(&frame, &[]);
        assert!(client.is_closed(), "{frame:?}");
    }
    // One message ends within its header, and the other one before its payload.
    for cut in [vec![1, 0, 0, 0, 1], header(2, VERSION, 8)] {
        let client = server.connect();
        client.send_bytes(&cut, &[]);
        client.socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(client.is_closed());
    }
    server.connect().wait_until_processed();
}

/// Rule F2.3.
#[test]
fn an_unexpected_reply_is_ignored() {
    let server = Server::disk(1 << 20, |_| {});
    let client = server.connect();
    client.send(Code::SET_FEATURES, VERSION | Header::FLAG_REPLY, &[0; 8], &[]);
    client.wait_until_processed();
}

#[rstest]
fn an_inflight_region_with_random_contents_is_refused_at_ring_start(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (server, guest) = (Server::disk(1 << 20, |_| {}), Guest::new());
    let mut noise = 1u64;
    for round in 0..50 {
        let (region, fd, description) = inflight_region(features, 1, 256);
        let mut bytes = region.copy(0).unwrap();
        for byte in &mut bytes {
            noise = noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = (noise >> 56) as u8;
        }
        // Recovery reads the rest of the region only if the version and the ring size are right.
        bytes[8..12].copy_from_slice(&[1, 0, 0, 1]);
        std::os::unix::fs::FileExt::write_all_at(&std::fs::File::from(fd.try_clone().unwrap()), &bytes, 0).unwrap();
        let client = server.connect();
        negotiate(&client, &guest, features);
        client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
        let ring = Ring::new(&guest, 0, 256, features);
        ring.set_up(&client, &guest, ring.initial_base());
        let enable = VringState { index: 0, num: 1 };
        let refused = client.acknowledged(Code::SET_VRING_ENABLE, enable.as_bytes(), &[]);
        assert_eq!(refused, 1, "noise {round} was taken for requests");
        client.wait_until_processed();
    }
}

/// Rule F5.3.
#[test]
fn invalid_messages_leak_no_fd_and_do_not_end_the_process() {
    let (_folder, socket, mut process) = Process::disk(&["--queues", "2"]);
    let guest = Guest::new();
    let file = sealed_memfd("hostile", 1 << 20).unwrap();
    let idle = || {
        let client = RawFrontend::connect(&socket);
        client.wait_until_processed();
        process.open_fds()
    };
    let before = idle();
    for (flags, more_fds) in [(VERSION, 0), (NEED_REPLY, 0), (VERSION, MAX_FDS), (NEED_REPLY, MAX_FDS)] {
        let mut client = RawFrontend::connect(&socket);
        let mut ring = start_ring(&client, &guest, SPLIT);
        for InvalidMessage { code, payload, fds, .. } in invalid_messages(&guest, &ring, SPLIT) {
            let fds: Vec<BorrowedFd<'_>> = (0..(fds + more_fds).min(MAX_FDS)).map(|_| file.as_fd()).collect();
            client.send(code, flags, &payload, &fds);
            // The back-end reads this next message, or has already closed the connection.
            let header = Header { request: Code::SET_PROTOCOL_FEATURES.0, flags: VERSION, size: 8 };
            let _ = client.try_send_bytes(&[header.as_bytes(), PROTOCOL.as_bytes()].concat(), &[]);
            client.socket.shutdown(std::net::Shutdown::Write).unwrap();
            while !client.is_closed() {}
            client = RawFrontend::connect(&socket);
            ring = start_ring(&client, &guest, SPLIT);
            assert_ring_works(&guest, &mut ring);
        }
    }
    assert_eq!(idle(), before, "file descriptors are left open");
    process.child.kill().unwrap();
    let errors = process.stderr();
    assert!(errors.contains("(rule L2.2)") && errors.contains("(rule M1.5)"), "errors name their rules: {errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

/// Rule M1.3.
#[test]
fn thousands_of_memory_table_changes_leak_nothing_and_every_slot_is_usable() {
    let (_folder, socket, process) = Process::disk(&["--queues", "2"]);
    let guest = Guest::new();
    let client = RawFrontend::connect(&socket);
    let mut ring = start_ring(&client, &guest, SPLIT);
    let before = (process.open_fds(), process.mapped_files());
    for change in 0..3000 {
        guest.send_table(&client);
        if change % 100 == 0 {
            assert_ring_works(&guest, &mut ring);
        }
    }
    assert_eq!((process.open_fds(), process.mapped_files()), before);
    let slots = client.request_u64(Code::GET_MAX_MEM_SLOTS) - guest.memory.regions().len() as u64;
    let fd = sealed_memfd("slots", 0x1000).unwrap();
    let regions: Vec<_> = (0..=slots)
        .map(|slot| GuestAddress((3 << 30) + (slot << 16)))
        .map(|gpa| Region::share(fd.try_clone().unwrap(), gpa, 0x1000, 0).unwrap())
        .collect();
    let (last, rest) = regions.split_last().unwrap();
    for region in rest {
        assert_eq!(add_region(&client, region), 0);
    }
    assert_ne!(add_region(&client, last), 0, "more slots than there are");
    assert_ring_works(&guest, &mut ring);
    for region in rest {
        let message = MemRegMsg { padding: 0, region: Guest::describe(region) };
        assert_eq!(client.acknowledged(Code::REM_MEM_REG, message.as_bytes(), &[]), 0);
    }
    assert_ring_works(&guest, &mut ring);
    assert_eq!((process.open_fds(), process.mapped_files()), before);
}

/// Rule R9.2: the queued connections send garbage and fds. Some of them close at once, and others stay open.
#[rstest]
fn queued_connections_do_not_disturb_the_served_one(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_folder, socket, mut process) = Process::disk(&["--queues", "2"]);
    let guest = Guest::new();
    let client = RawFrontend::connect(&socket);
    let mut ring = start_ring(&client, &guest, features);
    assert_ring_works(&guest, &mut ring);
    let before = (process.open_fds(), process.mapped_files());
    let file = sealed_memfd("hostile", 1 << 20).unwrap();
    let fds = vec![file.as_fd(); MAX_FDS];
    let header = |code: Code, size| Header { request: code.0, flags: NEED_REPLY, size }.as_bytes().to_vec();
    let flood = header(Code::GET_FEATURES, 0).repeat(50);
    let garbage: [(&[u8], &[BorrowedFd<'_>]); 5] = [
        (&[0xff; 4096], &[]),
        (&header(Code::SET_MEM_TABLE, 4096), &fds),
        (&header(Code::SET_VRING_CALL, 8)[..5], &fds),
        (&flood, &fds),
        (&flood, &[]),
    ];
    let mut waiting = Vec::new();
    for number in 0..30 {
        let next = RawFrontend::connect(&socket);
        let (bytes, fds) = garbage[number % garbage.len()];
        next.send_bytes(bytes, fds);
        if number % 3 != 0 {
            waiting.push(next);
        }
        assert_ring_works(&guest, &mut ring);
        assert_eq!((process.open_fds(), process.mapped_files()), before, "what waits was let in");
    }
    client.wait_until_processed();
    assert_eq!(client.ring_base(0), ring.drained_base());
    client.socket.set_nonblocking(true).unwrap();
    let more = std::io::Read::read(&mut &client.socket, &mut [0]).unwrap_err();
    assert_eq!(more.kind(), std::io::ErrorKind::WouldBlock, "an answer to somebody else");
    // The served connection and all queued ones are closed. The back-end takes each queued connection in turn, and ends
    // it, before it serves the next front-end.
    drop((client, waiting));
    let next = RawFrontend::connect(&socket);
    let mut ring = start_ring(&next, &guest, features);
    assert_ring_works(&guest, &mut ring);
    assert_eq!((process.open_fds(), process.mapped_files()), before);
    process.child.kill().unwrap();
    let errors = process.stderr();
    assert!(errors.contains("the connection is closed") && !errors.contains("panicked"), "{errors}");
}

/// A front-end that stalls within a message, or does not read its replies, is disconnected after a deadline. The next
/// front-end is then served. An idle front-end stays connected.
/// Rule R9.3.
#[test]
fn a_front_end_that_stalls_within_a_message_is_disconnected_and_an_idle_one_is_not() {
    let patient = |server: &Server| {
        let client = server.connect();
        client.socket.set_read_timeout(Some(DEADLINE * 6)).unwrap();
        client
    };
    let long = Header { request: Code::SET_MEM_TABLE.0, flags: VERSION, size: 4096 };
    let (idle, half, slow, deaf) = (server(), server(), server(), server());
    let guest = Guest::new();
    let silent = idle.connect();
    let mut ring = start_ring(&silent, &guest, SPLIT);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let stalled = patient(&half);
            stalled.send_bytes(&long.as_bytes()[..5], &[]);
            let next = patient(&half);
            next.wait_until_processed();
            assert!(stalled.is_closed());
        });
        scope.spawn(|| {
            let (stalled, next) = (patient(&slow), patient(&slow));
            let cut_off = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // The front-end sends one byte at a time. The deadline is for the message, not for a byte.
                    stalled.send_bytes(long.as_bytes(), &[]);
                    while !cut_off.load(Relaxed) && stalled.try_send_bytes(&[0], &[]).is_ok() {
                        std::thread::sleep(std::time::Duration::from_millis(100));
                    }
                });
                next.wait_until_processed();
                cut_off.store(true, Relaxed);
            });
            assert!(stalled.is_closed());
        });
        scope.spawn(|| {
            let (stalled, next) = (patient(&deaf), patient(&deaf));
            stalled.socket.set_nonblocking(true).unwrap();
            let ask = Header { request: Code::GET_FEATURES.0, flags: VERSION, size: 0 };
            let cut_off = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // The front-end sends requests until both sockets are full, and reads no reply.
                    while !cut_off.load(Relaxed) {
                        if stalled.try_send_bytes(ask.as_bytes(), &[]).is_err() {
                            std::thread::sleep(std::time::Duration::from_millis(1));
                        }
                    }
                });
                next.wait_until_processed();
                cut_off.store(true, Relaxed);
            });
        });
    });
    // All deadlines of the back-end have passed.
    assert_ring_works(&guest, &mut ring);
    let next = patient(&idle);
    next.send(Code::GET_FEATURES, VERSION, &[], &[]);
    next.socket.set_nonblocking(true).unwrap();
    assert_ring_works(&guest, &mut ring);
    silent.wait_until_processed();
    let waits = std::io::Read::read(&mut &next.socket, &mut [0]).unwrap_err();
    assert_eq!(waits.kind(), std::io::ErrorKind::WouldBlock, "the first one was not disturbed");
    next.socket.set_nonblocking(false).unwrap();
    drop(silent);
    next.reply(Code::GET_FEATURES);
}

fn server() -> Server {
    Server::disk(1 << 20, |_| {})
}
