//! Rings with invalid contents. The back-end stops only the broken ring, signals its error descriptor and logs the
//! reason. The ring can be set up again.

use std::os::fd::AsFd;

use nix::sys::eventfd::EventFd;
use rstest::rstest;
use vhost_migrate::abi::vhost_user::FrontendRequest as Code;
use vhost_migrate::abi::virtio::{Desc, PackedDesc, VirtioFeatures};
use vhost_migrate::memory::Address;
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::guest::{Guest, HIGH, PACKED, Ring, SPLIT, negotiate, wait_for_error};
use crate::hostile::assert_ring_works;
use crate::net_driver::{CONTROL, LoopbackNetGuest, interface_features};
use crate::raw::RawFrontend;
use crate::server::{Process, Server};

/// Ring contents that break a ring: the descriptors, and the avail ring or driver event area.
struct InvalidRing {
    what: &'static str,
    /// The reason in the log.
    why: &'static str,
    descs: Vec<u8>,
    avail: Vec<u8>,
}

fn split_breakages() -> Vec<InvalidRing> {
    let desc = |addr: u64, len: u32, flags: u16, next: u16| Desc {
        addr: addr.into(),
        len: len.into(),
        flags: flags.into(),
        next: next.into(),
    };
    let breakage = |what, why, descs: [Desc; 2], head: u16, index: u16| InvalidRing {
        what,
        why,
        descs: descs.as_bytes().to_vec(),
        avail: [0, index, head].as_bytes().to_vec(),
    };
    let none = desc(0, 0, 0, 0);
    let (at, len) = (0x60_0000, 16);
    vec![
        breakage("a chain that is a loop", "chain 0 loops", [desc(at, len, 1, 1), desc(at, len, 1, 0)], 0, 1),
        breakage(
            "a next outside the table",
            "chain 0: descriptor 999 is outside the table of 256 descriptors",
            [desc(at, len, 1, 999), none],
            0,
            1,
        ),
        breakage(
            "a head outside the table",
            "chain 256: descriptor 256 is outside the table of 256 descriptors",
            [none, none],
            256,
            1,
        ),
        breakage(
            "an index that ran away",
            "avail index 9999 is more than the 256 entries of the ring ahead of the next index 0 or of the used index 0",
            [none, none],
            0,
            9999,
        ),
        breakage(
            "a readable buffer behind a writable one",
            "chain 0: a device-readable buffer follows a device-writable one",
            [desc(at, len, 3, 1), desc(at, len, 0, 0)],
            0,
            1,
        ),
        breakage("an indirect table without INDIRECT_DESC", UNWANTED_TABLE, [desc(at, len, 4, 0), none], 0, 1),
    ]
}

const UNWANTED_TABLE: &str = "chain 0: indirect descriptor although INDIRECT_DESC is not negotiated";

fn packed_breakages() -> Vec<InvalidRing> {
    let desc = |flags: u16| PackedDesc {
        addr: 0x60_0000.into(),
        len: 16.into(),
        id: 3.into(),
        // Available in the first round of the ring.
        flags: (flags | 0x80).into(),
    };
    let breakage = |what, why, descs: Vec<PackedDesc>| InvalidRing {
        what,
        why,
        descs: descs.as_bytes().to_vec(),
        avail: vec![0xff; 4],
    };
    vec![
        breakage(
            "a chain without an end",
            "chain at 0: has more than the 256 descriptors of the ring, of which 0 are in flight",
            vec![desc(1); 256],
        ),
        breakage(
            "a readable buffer behind a writable one",
            "chain 0: a device-readable buffer follows a device-writable one",
            vec![desc(3), desc(0)],
        ),
        breakage("an indirect table without INDIRECT_DESC", UNWANTED_TABLE, vec![desc(4)]),
    ]
}

fn breakages(features: VirtioFeatures) -> Vec<InvalidRing> {
    if features & (SPLIT ^ PACKED) == VirtioFeatures::empty() { split_breakages() } else { packed_breakages() }
}

/// Sets up the stopped ring `index` with invalid contents. Returns the ring and its error eventfd.
fn set_up_broken(
    client: &RawFrontend,
    guest: &Guest,
    index: u32,
    features: VirtioFeatures,
    breakage: &InvalidRing,
) -> (Ring, EventFd) {
    let ring = Ring::new(guest, index, 256, features);
    guest.memory.write(ring.layout.desc, &breakage.descs).unwrap();
    guest.memory.write(ring.layout.avail, &breakage.avail).unwrap();
    let error = EventFd::new().unwrap();
    client.send_acknowledged(Code::SET_VRING_ERR, &u64::from(index), &[error.as_fd()]);
    ring.start(client, guest);
    (ring, error)
}

/// Asserts that the process logged exactly these broken rings, once each and in this order.
fn assert_log(mut process: Process, expected: &[(u32, &str)]) {
    process.child.kill().unwrap();
    let errors = process.stderr();
    let lines: Vec<&str> = errors.lines().filter(|line| line.contains("is broken")).collect();
    assert_eq!(lines.len(), expected.len(), "{errors}");
    for (line, (index, why)) in lines.into_iter().zip(expected) {
        let whole = format!("ring {index} is broken and stops until it is set up again: {why}");
        assert!(line.contains(&whole), "{line:?} instead of {whole:?}");
    }
    assert!(!errors.contains("panicked"), "{errors}");
}

#[rstest]
fn a_broken_ring_stops_alone_signals_its_error_fd_and_can_be_set_up_again(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let (_folder, socket, process) = Process::disk(&["--queues", "2"]);
    let guest = Guest::new();
    let client = RawFrontend::connect(&socket);
    negotiate(&client, &guest, features);
    let mut good = Ring::started(&client, &guest, 1, 256, features);
    let mut expected = Vec::new();
    for breakage in breakages(features) {
        let (_ring, error) = set_up_broken(&client, &guest, 0, features, &breakage);
        wait_for_error(&error, breakage.what);
        expected.push((0, breakage.why));
        assert_ring_works(&guest, &mut good);
        client.ring_base(0);
        let mut again = Ring::new(&guest, 0, 256, features);
        again.set_up(&client, &guest, again.initial_base());
        assert_ring_works(&guest, &mut again);
        client.ring_base(0);
    }
    assert_log(process, &expected);
}

/// A broken receive, transmit or control queue stops alone. The other queues continue.
#[rstest]
fn a_broken_ring_of_a_network_device_stops_alone_and_signals_its_error_fd(
    #[values(SPLIT, PACKED)] rings: VirtioFeatures,
    #[values(0, 1, CONTROL)] broken: u32,
) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let process = Process::net(&socket, &["--loopback", "--queue-pairs", "2"]);
    let features = interface_features(rings);
    let mut net = LoopbackNetGuest::new(RawFrontend::connect(&socket), features);
    let mut expected = Vec::new();
    for breakage in breakages(rings) {
        net.client.ring_base(broken);
        let (_ring, error) = set_up_broken(&net.client, &net.guest, broken, features, &breakage);
        // The device reads receive buffers only when it has a packet for them.
        let waiting = (broken == 0).then(|| net.send(0));
        wait_for_error(&error, breakage.what);
        expected.push((broken, breakage.why));
        // The other pair and an intact control queue continue.
        let packet = net.send(1);
        assert_eq!(net.receive(1), packet, "{}", breakage.what);
        if broken != CONTROL {
            net.command();
        }
        match broken {
            // Pair 0 still transmits, and its packets wait for its receive queue. The receive queue of the other pair
            // is disabled. Otherwise it would receive these packets while ring 0 is stopped.
            0 => {
                let next = net.send(0);
                net.rings[2].enable(&net.client, false);
                net.client.ring_base(0);
                net.restart_ring(0);
                assert_eq!([net.receive(0), net.receive(0)], [waiting.unwrap(), next], "{}", breakage.what);
                net.rings[2].enable(&net.client, true);
                continue;
            }
            // Pair 0 still receives. The receive queue of the other pair is disabled, so the packets of the other pair
            // arrive at pair 0.
            1 => {
                net.rings[2].enable(&net.client, false);
                let packet = net.send(1);
                assert_eq!(net.receive(0), packet, "{}", breakage.what);
                net.rings[2].enable(&net.client, true);
            }
            _ => {
                let packet = net.send(0);
                assert_eq!(net.receive(0), packet, "{}", breakage.what);
            }
        }
        net.client.ring_base(broken);
        net.restart_ring(broken);
        let packet = net.send(0);
        assert_eq!(net.receive(0), packet, "{}", breakage.what);
        net.command();
    }
    assert_log(process, &expected);
}

#[rstest]
fn a_head_made_available_twice_breaks_only_its_ring(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (device, gate) = crate::drain::GatedDevice::new();
    let (_server, guest, client) = Server::new(device).negotiated(features);
    let mut ring = Ring::new(&guest, 0, 256, features);
    ring.driver.add(&[], &[Buffer { gpa: HIGH, len: 8 }], None).unwrap().unwrap();
    let _ = ring.driver.publish();
    if features == SPLIT {
        guest.memory.write(ring.layout.avail.unchecked_add(2), &2u16.to_le_bytes()).unwrap();
    } else {
        // A second descriptor with the same buffer id, while the first one is in flight.
        guest.memory.write(ring.layout.desc.unchecked_add(16), &guest.bytes(ring.layout.desc, 16)).unwrap();
    }
    let error = EventFd::new().unwrap();
    client.send_acknowledged(Code::SET_VRING_ERR, &0u64, &[error.as_fd()]);
    ring.start(&client, &guest);
    wait_for_error(&error, "twice");
    gate.write(1).unwrap();
    client.ring_base(0);
    ring.completion();
}
