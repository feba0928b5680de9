//! Resources of the serving process after connections have ended, and when file descriptors run out.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rstest::rstest;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header, InflightDescription, VringState};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::memory::sealed_memfd;
use vhost_migrate::unstable::backend::MAX_FDS;
use zerocopy::IntoBytes;

use crate::backend_channel::BackendChannel;
use crate::guest::{Guest, PACKED, Ring, SPLIT, inflight_region, install_log, negotiate_with};
use crate::hostile::{assert_ring_works, start_ring};
use crate::iommu::assert_served;
use crate::iommu_guest::{CHANNEL, FEATURES, IommuGuest};
use crate::net_driver::{LoopbackNetGuest, interface_features};
use crate::raw::{NEED_REPLY, RawFrontend, VERSION};
use crate::server::Process;

/// Resources of a process while an idle front-end is connected: fds, mappings of files, threads.
fn resources(process: &Process, socket: &Path) -> [usize; 3] {
    let client = RawFrontend::connect(socket);
    client.wait_until_processed();
    [process.open_fds(), process.mapped_files(), process.threads()]
}

/// Sends all messages before those of rings. Some connections also get an inflight region, a back-end channel or both.
fn negotiate(
    client: &RawFrontend,
    guest: &Guest,
    features: VirtioFeatures,
    queues: u16,
    number: u32,
) -> Option<BackendChannel> {
    negotiate_with(client, guest, features, CHANNEL);
    if number.is_multiple_of(3) {
        let (_, fd, description) = inflight_region(features, queues, 256);
        client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    }
    number.is_multiple_of(5).then(|| BackendChannel::open(client))
}

fn use_disk(client: RawFrontend, guest: &Guest, number: u32) {
    let features = if number.is_multiple_of(2) { SPLIT } else { PACKED };
    if number.is_multiple_of(11) {
        let space = IommuGuest::new(client, FEATURES | features);
        let mut ring = space.ring(0, 256, features);
        space.start(&ring, ring.initial_base());
        return assert_served(&space, &mut ring, 0);
    }
    let _channel = negotiate(&client, guest, features, 2, number);
    let mut ring = Ring::started(&client, guest, 0, 256, features);
    let _log = install_log(&client, guest);
    match number / 2 % 4 {
        0 => assert_ring_works(guest, &mut ring),
        1 => client.send_bytes(&[1, 0, 0], &[]),
        2 => ring.kick.write(1).map(drop).unwrap(),
        _ => drop(client.ring_base(0)),
    }
}

fn use_network(client: RawFrontend, number: u32) {
    let features = interface_features(if number.is_multiple_of(2) { SPLIT } else { PACKED });
    let guest = Guest::new();
    let _channel = negotiate(&client, &guest, features, 5, number);
    let mut net = LoopbackNetGuest::on_connection(client, guest, features);
    let _log = install_log(&net.client, &net.guest);
    match number / 2 % 4 {
        0 => {
            let packet = net.send(0);
            // Packets that earlier connections have sent and not received come first.
            while net.receive(0) != packet {}
        }
        1 => net.client.send_bytes(&[1, 0, 0], &[]),
        2 => drop(net.send(1)),
        _ => {
            net.command();
            net.client.ring_base(4);
        }
    }
}

fn connect_repeatedly(process: &Process, socket: &Path, visit: impl Fn(RawFrontend, u32)) {
    let connect = |count: u32| {
        (0..count).for_each(|number| visit(RawFrontend::connect(socket), number));
        (resources(process, socket), process.memory_kib())
    };
    // The first connections allocate memory that the process keeps.
    let (before, kib_before) = connect(100);
    let (after, kib_after) = connect(1000);
    assert_eq!(after, before, "fds, mappings, threads");
    assert!(kib_after < kib_before + 2048, "{kib_before} KiB before, {kib_after} KiB after");
}

#[test]
fn a_thousand_connections_to_a_disk_leak_no_fds_mappings_threads_or_memory() {
    let (_folder, socket, process) = Process::disk(&["--queues", "2", "--iommu"]);
    let guest = Guest::new();
    connect_repeatedly(&process, &socket, |client, number| use_disk(client, &guest, number));
}

#[test]
fn a_thousand_connections_to_a_network_device_leak_no_fds_mappings_threads_or_memory() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let process = Process::net(&socket, &["--loopback", "--queue-pairs", "2"]);
    connect_repeatedly(&process, &socket, use_network);
}

/// Sends the messages that start a ring, regardless of the replies. Waits until the back-end has closed the connection.
fn try_to_start_ring(client: &RawFrontend, guest: &Guest, ring: &Ring) {
    let [size, base, on] = [256, 0, 1].map(|num| VringState { index: 0, num });
    let wish = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 256, padding: [0; 4] };
    let (call, kick, channel) =
        (ring.call.as_fd(), ring.kick.as_fd(), std::os::unix::net::UnixStream::pair().unwrap().0);
    let (number, addr) = (0u64, ring.addr(guest));
    let messages: [(Code, &[u8], &[BorrowedFd<'_>]); 11] = [
        (Code::SET_PROTOCOL_FEATURES, CHANNEL.as_bytes(), &[]),
        (Code::SET_FEATURES, SPLIT.as_bytes(), &[]),
        (Code::SET_BACKEND_REQ_FD, &[], &[channel.as_fd()]),
        (Code::SET_MEM_TABLE, &guest.table(), &guest.fds()),
        (Code::GET_INFLIGHT_FD, wish.as_bytes(), &[]),
        (Code::SET_VRING_CALL, number.as_bytes(), &[call]),
        (Code::SET_VRING_NUM, size.as_bytes(), &[]),
        (Code::SET_VRING_BASE, base.as_bytes(), &[]),
        (Code::SET_VRING_ADDR, addr.as_bytes(), &[]),
        (Code::SET_VRING_KICK, number.as_bytes(), &[kick]),
        (Code::SET_VRING_ENABLE, on.as_bytes(), &[]),
    ];
    for (code, payload, fds) in messages {
        let header = Header { request: code.0, flags: NEED_REPLY, size: payload.len() as u32 };
        let _ = client.try_send_bytes(&[header.as_bytes(), payload].concat(), fds);
    }
    let _ = client.socket.shutdown(std::net::Shutdown::Write);
    while !client.is_closed() {}
}

/// Each connection may use one fd more than the connection before it, so that the fds run out at different steps. The
/// next front-end is always served.
#[test]
fn fd_exhaustion_at_any_step_ends_only_that_connection() {
    let (_folder, socket, mut process) = Process::disk(&["--queues", "2"]);
    let guest = Guest::new();
    let before = resources(&process, &socket);
    for spare in 0..24 {
        let client = RawFrontend::connect(&socket);
        client.wait_until_processed();
        process.limit_fds(before[0] as u64 + spare);
        try_to_start_ring(&client, &guest, &Ring::new(&guest, 0, 256, SPLIT));
        process.limit_fds(4096);
        let next = RawFrontend::connect(&socket);
        let mut ring = start_ring(&next, &guest, SPLIT);
        assert_ring_works(&guest, &mut ring);
        drop(next);
        assert_eq!(resources(&process, &socket), before, "with {spare} left");
    }
    // No fd is left for a connection. The connection waits until an fd is free.
    let mut said = BufReader::new(process.child.stderr.take().unwrap());
    process.limit_fds(3);
    let client = RawFrontend::connect(&socket);
    client.send(Code::GET_FEATURES, VERSION, &[], &[]);
    let mut line = String::new();
    while !line.contains("can't accept a connection") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "it has ended");
        assert!(!line.contains("panicked"), "{line}");
    }
    process.limit_fds(4096);
    client.reply(Code::GET_FEATURES);
    process.child.kill().unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("panicked"), "{rest}");
}

/// Messages with the maximum number of fds, which is more than the process may open. Some are sent byte by byte, with
/// fds for each byte.
#[rstest]
fn a_flood_of_fds_leaks_nothing(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_folder, socket, mut process) = Process::disk(&["--queues", "2"]);
    let guest = Guest::new();
    let before = resources(&process, &socket);
    process.limit_fds(64);
    let file = sealed_memfd("hostile", 1 << 20).unwrap();
    let fds = vec![file.as_fd(); MAX_FDS];
    for code in (0..=45).map(Code) {
        let client = RawFrontend::connect(&socket);
        let _ring = start_ring(&client, &guest, features);
        let header = Header { request: code.0, flags: VERSION, size: 8 };
        let message = [header.as_bytes(), &[0; 8]].concat();
        for _ in 0..10 {
            let _ = client.try_send_bytes(&message, &fds);
        }
        // One more message is sent byte by byte, with fds for each byte.
        for byte in &message {
            let _ = client.try_send_bytes(&[*byte], &fds);
        }
        let _ = client.socket.shutdown(std::net::Shutdown::Write);
        while !client.is_closed() {}
        drop(client);
        let client = RawFrontend::connect(&socket);
        let mut ring = start_ring(&client, &guest, features);
        assert_ring_works(&guest, &mut ring);
    }
    assert_eq!(resources(&process, &socket), before);
    process.child.kill().unwrap();
    let errors = process.stderr();
    assert!(!errors.contains("panicked"), "{errors}");
}
