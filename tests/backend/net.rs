//! The network device as its driver sees it, also with hostile drivers.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, UnixAddr, shutdown};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{
    BackendRequest, CONFIG_TYPE_MIGRATION, ConfigHeader, FrontendRequest as Code, ProtocolFeatures,
};
use vhost_migrate::abi::virtio::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_RING_F_EVENT_IDX, VirtioFeatures,
};
use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer, PacketCounts};
use vhost_migrate::memory::{Address, GuestAddress};
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::backend_channel::BackendChannel;
use crate::guest::{
    BASIC, Guest, HIGH, PACKED, PROTOCOL_FEATURES_BIT, Ring, SPLIT, harvest, inflight_region, install_log, negotiate,
    start_logging,
};
use crate::log::{LOG_AT, Oracle, check};
use crate::raw::{DEADLINE, RawFrontend, VERSION};
use crate::server::{Process, Server};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGEABLE: VirtioFeatures = BASIC.union(VIRTIO_NET_F_MRG_RXBUF);
const CONTROL: VirtioFeatures = VIRTIO_NET_F_CTRL_VQ
    .union(VIRTIO_NET_F_CTRL_RX)
    .union(VIRTIO_NET_F_CTRL_MAC_ADDR)
    .union(VIRTIO_NET_F_GUEST_ANNOUNCE);
const HEADER: usize = 12;
/// Address of frames to send, and first address of receive buffers.
const SENT: GuestAddress = GuestAddress(0xc0_0000);
const BUFFERS: GuestAddress = HIGH;
const OUTSIDE: GuestAddress = GuestAddress(1 << 40);

fn options(peer: NetPeer) -> NetOptions {
    NetOptions::new(peer, MAC)
}

/// A network interface, its front-end, and the guest of that front-end.
struct NetGuest {
    device: Arc<NetDevice>,
    _server: Option<Server>,
    client: RawFrontend,
    guest: Guest,
    features: VirtioFeatures,
    rx: Vec<Ring>,
    tx: Vec<Ring>,
    /// Receive buffers provided, by pair and head.
    provided: HashMap<(usize, u16), Buffer>,
    next: GuestAddress,
}

impl NetGuest {
    fn new(features: VirtioFeatures, change: impl FnOnce(&mut NetOptions)) -> NetGuest {
        let mut options = options(NetPeer::Loopback);
        change(&mut options);
        let pairs = options.pairs.into();
        let device = Arc::new(NetDevice::open(options).unwrap());
        let server = Server::new(device.clone());
        let net = NetGuest::on(&server, &device, features, pairs);
        NetGuest { _server: Some(server), ..net }
    }

    /// Connects a new front-end with a guest of its own to a server that outlives it.
    fn on(server: &Server, device: &Arc<NetDevice>, features: VirtioFeatures, pairs: u32) -> NetGuest {
        let (client, guest) = (server.connect(), Guest::new());
        negotiate(&client, &guest, features);
        let ring = |index| Ring::new(&guest, index, 256, features);
        let (rx, tx) = (0..pairs).map(|pair| (ring(2 * pair), ring(2 * pair + 1))).unzip();
        let (provided, device) = (HashMap::new(), device.clone());
        let net = NetGuest { device, _server: None, client, guest, features, rx, tx, provided, next: BUFFERS };
        for ring in net.rx.iter().chain(&net.tx) {
            ring.start(&net.client, &net.guest);
        }
        net
    }

    /// Provides a receive buffer of `len` bytes, cut in two. It begins where the last one ends.
    fn provide(&mut self, pair: usize, len: u32) -> u16 {
        let buffer = Buffer { gpa: self.next, len };
        self.next = self.next.unchecked_add(len.into());
        assert!(self.next < BUFFERS.unchecked_add(16 << 20));
        self.guest.memory.write(buffer.gpa, &vec![0xee; len as usize]).unwrap();
        let first = Buffer { len: len / 3, ..buffer };
        let second = Buffer { gpa: buffer.gpa.unchecked_add(first.len.into()), len: len - first.len };
        let head = self.rx[pair].driver.add(&[], &[first, second], None).unwrap().unwrap();
        self.provided.insert((pair, head), buffer);
        head
    }

    fn provide_kicked(&mut self, pair: usize, lens: &[u32]) {
        lens.iter().for_each(|len| _ = self.provide(pair, *len));
        self.rx[pair].kick();
    }

    /// Sends a frame whose header requests features that were never offered, and waits until the device has completed
    /// it.
    fn send(&mut self, pair: usize, frame: &[u8]) {
        let message = [&[0xff; HEADER], frame].concat();
        self.guest.memory.write(SENT, &message).unwrap();
        let len = message.len() as u32;
        self.transmit(pair, &[Buffer { gpa: SENT, len: 7 }, Buffer { gpa: SENT.unchecked_add(7), len: len - 7 }], &[]);
    }

    fn transmit(&mut self, pair: usize, readable: &[Buffer], writable: &[Buffer]) {
        let tx = &mut self.tx[pair];
        tx.driver.add(readable, writable, None).unwrap().unwrap();
        tx.kick();
        assert_eq!(tx.completion().1, 0, "the device wrote to a packet that it was to send");
    }

    /// Returns the next received frame. Checks its header and its buffers, which must have been published together.
    fn receive(&mut self, pair: usize) -> Vec<u8> {
        let mut used = self.rx[pair].completion();
        let mut message = Vec::new();
        let mut left = None;
        loop {
            let buffer = self.provided.remove(&(pair, used.0)).unwrap();
            assert!(used.1 <= buffer.len);
            message.extend(self.guest.bytes(buffer.gpa, used.1 as usize));
            let behind = self.guest.bytes(buffer.gpa.unchecked_add(used.1.into()), (buffer.len - used.1) as usize);
            assert!(behind.iter().all(|byte| *byte == 0xee), "bytes behind the packet were written");
            let buffers = *left.get_or_insert_with(|| u16::from_le_bytes([message[10], message[11]]));
            assert!(buffers == 1 || used.1 == buffer.len, "a buffer that is not the last was not filled");
            if buffers == 1 {
                break;
            }
            left = Some(buffers - 1);
            let next = self.rx[pair].driver.pop_used().unwrap();
            used = next.map(|used| (used.head, used.len)).expect("a part of a packet was published without the others");
        }
        assert_eq!(message[..10], [0; 10], "a header that promises what was never offered");
        message.split_off(HEADER)
    }

    fn wait_for(&self, what: &str, seen: impl Fn(PacketCounts) -> bool) {
        let end = std::time::Instant::now() + DEADLINE;
        while !seen(self.device.packet_counts()) {
            assert!(std::time::Instant::now() < end, "{what}: {:?}", self.device.packet_counts());
            std::thread::yield_now();
        }
    }
}

/// A frame of `len` bytes with contents of its own for each `seed`.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8).wrapping_add(seed)).collect()
}

#[rstest]
fn a_frame_of_any_size_is_received_intact_for_any_buffer_sizes(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    for features in [rings | MERGEABLE, rings | MERGEABLE | VIRTIO_RING_F_EVENT_IDX] {
        let mut net = NetGuest::new(features, |_| {});
        let mut seed = 0;
        for room in [12, 13, 97, 1526, 4099, 65562] {
            for len in [0, 1, 13, 60, 85, 86, 1514, 4086, 4087, 4088, 9000, 65535, 65550] {
                let buffers = (len + HEADER).div_ceil(room);
                if buffers > 250 {
                    continue;
                }
                seed += 1;
                net.next = BUFFERS.unchecked_add(u64::from(seed));
                net.provide_kicked(0, &vec![room as u32; buffers]);
                net.send(0, &frame(len, seed));
                assert_eq!(net.receive(0), frame(len, seed), "{len} bytes in buffers of {room}");
                assert!(net.provided.is_empty(), "{len} bytes in buffers of {room}");
            }
        }
        let PacketCounts { sent, received, .. } = net.device.packet_counts();
        assert_eq!((sent, received), (u64::from(seed), u64::from(seed)));
    }
}

#[rstest]
fn without_mergeable_buffers_a_packet_larger_than_its_buffer_is_dropped(
    #[values(SPLIT, PACKED)] rings: VirtioFeatures,
) {
    let mut net = NetGuest::new(rings, |_| {});
    net.provide_kicked(0, &[1526, 1526, 65562]);
    net.send(0, &frame(1514, 1));
    net.send(0, &frame(1515, 2));
    net.send(0, &frame(3, 3));
    net.send(0, &frame(65550, 4));
    assert_eq!(net.receive(0), frame(1514, 1));
    assert_eq!(net.receive(0), frame(3, 3), "the buffer that was too small is used for the next packet");
    assert_eq!(net.receive(0), frame(65550, 4));
    assert_eq!(net.device.packet_counts().received_dropped, 1);
}

#[rstest]
fn a_packet_without_buffers_is_received_once_buffers_are_added(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    for features in [rings | MERGEABLE, rings | MERGEABLE | VIRTIO_RING_F_EVENT_IDX] {
        let mut net = NetGuest::new(features, |_| {});
        net.send(0, &frame(3000, 1));
        net.send(0, &frame(100, 2));
        for _ in 0..30 {
            net.provide_kicked(0, &[100]);
        }
        net.provide_kicked(0, &[100, 100]);
        assert_eq!(net.receive(0), frame(3000, 1));
        assert!(net.provided.len() == 1);
        net.provide_kicked(0, &[100]);
        assert_eq!(net.receive(0), frame(100, 2));
    }
}

/// The log holds every byte that the device writes: packets with their headers, used rings, and nothing else.
#[rstest]
fn the_log_holds_exactly_what_was_received(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    for features in [rings | MERGEABLE, rings | MERGEABLE | VIRTIO_RING_F_EVENT_IDX] {
        let mut net = NetGuest::new(features, |_| {});
        let log = install_log(&net.client, &net.guest);
        let (rx, tx) = (&mut net.rx[0], &mut net.tx[0]);
        start_logging(&net.client, &net.guest, features, &mut [rx, tx], LOG_AT);
        let mut oracles = [Oracle::new(&net.guest, &net.rx[0]), Oracle::new(&net.guest, &net.tx[0])];
        for round in 0..60u64 {
            let (len, room) = (round as usize * 997 % 20000, [1526, 4096, 4097, 9001, 20480][round as usize % 5]);
            let buffers = (len + HEADER).div_ceil(room);
            // Every buffer begins at the end of a page.
            for number in 0..buffers {
                net.next = GuestAddress((net.next.0 + 0x1fff) / 0x1000 * 0x1000 - 1 - round % 3 * 5);
                let written = (len + HEADER - number * room).min(room) as u64;
                oracles[0].wrote(net.next, written);
                net.provide(0, room as u32);
            }
            net.rx[0].kick();
            net.send(0, &frame(len, round as u8));
            assert_eq!(net.receive(0), frame(len, round as u8));
            for (ring, oracle) in net.rx.iter().chain(&net.tx).zip(&mut oracles) {
                oracle.used_ring(&net.guest, ring, LOG_AT.unchecked_add(u64::from(ring.index) * 0x10_0000));
            }
            if net.next > BUFFERS.unchecked_add(12 << 20) {
                net.next = BUFFERS;
            }
        }
        // The device takes these buffers for a larger packet and does not write to them.
        net.next = BUFFERS.unchecked_add(15 << 20);
        net.provide_kicked(0, &[4096, 4096]);
        net.send(0, &frame(9000, 0));
        for (ring, oracle) in net.rx.iter().chain(&net.tx).zip(&mut oracles) {
            net.client.ring_base(ring.index);
            oracle.used_ring(&net.guest, ring, LOG_AT.unchecked_add(u64::from(ring.index) * 0x10_0000));
        }
        check(&oracles, harvest(&log));
        assert_eq!(log.out_of_range(), 0);
    }
}

/// Rule R3.6.
#[rstest]
fn get_vring_base_does_not_wait_for_packets_and_returns_unused_buffers(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE, |_| {});
    let (region, fd, description) = inflight_region(rings, 2, 256);
    for ring in net.rx.iter().chain(&net.tx) {
        assert_eq!(net.client.ring_base(ring.index), ring.initial_base());
    }
    net.client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    for ring in net.rx.iter().chain(&net.tx) {
        ring.set_up(&net.client, &net.guest, ring.initial_base());
    }
    net.provide_kicked(0, &[1000; 10]);
    assert_eq!(net.client.ring_base(0), net.rx[0].initial_base(), "buffers that nothing came for were taken");
    net.rx[0].set_up(&net.client, &net.guest, net.rx[0].initial_base());
    net.send(0, &frame(100, 1));
    assert_eq!(net.receive(0), frame(100, 1));
    // Nine buffers are too few for this packet. The device takes them, and must return them without writing to them.
    net.send(0, &frame(9500, 2));
    while net.rx[0].in_flight(&net.guest, &region) != Some(9) {
        net.client.wait_until_processed();
    }
    // Guest memory without the fields that request kicks, which a ring may write before it sleeps.
    let written = |net: &NetGuest| {
        let mut memory = net.guest.snapshot();
        for ring in net.rx.iter().chain(&net.tx) {
            let kicks = ring.layout.used.0 as usize + if rings == SPLIT { 0 } else { 2 };
            memory[0][kicks..kicks + 2].fill(0);
        }
        memory
    };
    let before = written(&net);
    let base = net.rx[0].base_after(1, 2);
    assert_eq!(net.client.ring_base(0), base);
    assert!(written(&net) == before, "a stop wrote guest memory");
    assert_eq!(net.rx[0].in_flight(&net.guest, &region), Some(0), "what was given back is still in flight");
    net.provide_kicked(0, &[1000]);
    net.rx[0].set_up(&net.client, &net.guest, base);
    assert_eq!(net.receive(0), frame(9500, 2), "the packet that waited was lost");
    assert_eq!(net.client.ring_base(0), net.rx[0].base_after(11, 2));
    assert!(net.provided.is_empty());
}

#[rstest]
fn buffers_taken_by_a_killed_back_end_are_used_first(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE, |_| {});
    for ring in net.rx.iter().chain(&net.tx) {
        assert_eq!(net.client.ring_base(ring.index), ring.initial_base());
    }
    let heads: Vec<u16> = (0..4).map(|_| net.provide(0, 1000)).collect();
    let _ = net.rx[0].driver.publish();
    let (region, fd, description) = inflight_region(rings, 2, 256);
    net.rx[0].take_requests(&net.guest, &region, 2);
    net.client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    net.rx[0].set_up(&net.client, &net.guest, net.rx[0].initial_base());
    net.tx[0].set_up(&net.client, &net.guest, net.tx[0].initial_base());
    assert_eq!(net.client.ring_base(0), net.rx[0].initial_base(), "what was taken over and not used goes back");
    net.rx[0].set_up(&net.client, &net.guest, net.rx[0].initial_base());
    net.send(0, &frame(1500, 1));
    assert_eq!(net.receive(0), frame(1500, 1));
    assert_eq!(net.client.ring_base(0), net.rx[0].base_after(2, 2));
    assert!(!net.provided.contains_key(&(0, heads[0])) && !net.provided.contains_key(&(0, heads[1])));
}

#[rstest]
fn a_burst_is_received_in_order_and_excess_packets_are_dropped_and_counted(
    #[values(SPLIT, PACKED)] rings: VirtioFeatures,
) {
    let mut net = NetGuest::new(rings | MERGEABLE, |_| {});
    net.provide_kicked(0, &[1000; 100]);
    for seed in 0..50 {
        net.send(0, &frame(1500, seed));
    }
    for seed in 0..50 {
        assert_eq!(net.receive(0), frame(1500, seed));
    }
    // No further receive buffers are provided.
    for _ in 0..2000 {
        net.send(0, &frame(9000, 0));
    }
    let PacketCounts { sent, sent_dropped, .. } = net.device.packet_counts();
    assert_eq!(sent + sent_dropped, 2050);
    assert!(sent_dropped > 1000, "{sent} packets of 9000 bytes are kept");
    net.provide_kicked(0, &[9012; 2]);
    assert_eq!(net.receive(0), frame(9000, 0));
}

#[rstest]
fn each_pair_receives_what_it_sent(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE | VIRTIO_NET_F_MQ, |options| options.pairs = 4);
    for pair in 0..4 {
        net.provide_kicked(pair, &[700; 3]);
    }
    for pair in 0..4 {
        net.send(pair, &frame(1500, pair as u8));
    }
    for pair in 0..4 {
        assert_eq!(net.receive(pair), frame(1500, pair as u8));
    }
    for (received, ring) in [3, 1].into_iter().cycle().zip(net.rx.iter().zip(&net.tx).flat_map(|(rx, tx)| [rx, tx])) {
        assert_eq!(net.client.ring_base(ring.index), ring.base_after(received, 2));
    }
}

/// QEMU does this for a guest with fewer CPUs than pairs: it starts the rings of all pairs and enables some.
#[rstest]
fn packets_of_a_pair_with_a_disabled_ring_are_received_by_another_pair(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE | VIRTIO_NET_F_MQ, |options| options.pairs = 3);
    net.provide_kicked(0, &[2000; 9]);
    net.provide_kicked(1, &[2000]);
    net.rx[1].enable(&net.client, false);
    net.rx[2].enable(&net.client, false);
    for pair in [1, 2] {
        net.send(pair, &frame(100, pair as u8));
        assert_eq!(net.receive(0), frame(100, pair as u8));
    }
    net.rx[1].enable(&net.client, true);
    net.send(1, &frame(100, 9));
    assert_eq!(net.receive(1), frame(100, 9));
}

/// Rule R2.4: such packets are neither sent nor discarded.
#[rstest]
fn packets_on_a_disabled_transmit_ring_stay_there_until_it_is_enabled(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE | VIRTIO_NET_F_MQ, |options| options.pairs = 2);
    (0..2).for_each(|pair| net.provide_kicked(pair, &[2000; 2]));
    net.tx[0].enable(&net.client, false);
    let message = [&[0xff; HEADER][..], &frame(100, 1)].concat();
    let held = Buffer { gpa: SENT.unchecked_add(0x1000), len: message.len() as u32 };
    net.guest.memory.write(held.gpa, &message).unwrap();
    net.tx[0].driver.add(&[held], &[], None).unwrap().unwrap();
    net.tx[0].kick();
    // Another pair continues meanwhile.
    for number in 2..4 {
        net.send(1, &frame(100, number));
        assert_eq!(net.receive(1), frame(100, number));
    }
    assert!(net.tx[0].driver.pop_used().unwrap().is_none(), "a packet of a disabled ring was used");
    net.tx[0].enable(&net.client, true);
    assert_eq!(net.tx[0].completion().1, 0);
    assert_eq!(net.receive(0), frame(100, 1));
}

/// Rules R11.1 and R11.3: the driver is able to set its number of pairs, and has not done so.
#[rstest]
fn a_driver_with_a_control_queue_receives_on_one_pair_until_it_sets_more(
    #[values(SPLIT, PACKED)] rings: VirtioFeatures,
) {
    let mut net = NetGuest::new(rings | MERGEABLE | CONTROL | VIRTIO_NET_F_MQ, |options| options.pairs = 4);
    let mut control = ControlQueueDriver::new(&net, 8);
    (0..4).for_each(|pair| net.provide_kicked(pair, &[700; 30]));
    for number in 0..20 {
        net.send(number % 4, &frame(100, number as u8));
        assert_eq!(net.receive(0), frame(100, number as u8));
    }
    for used in [4, 2] {
        assert_eq!(control.ask(&net.guest, 4, 0, &(used as u16).to_le_bytes()), 0);
        for pair in 0..used {
            net.send(pair, &frame(100, pair as u8));
            assert_eq!(net.receive(pair), frame(100, pair as u8));
        }
    }
    // A frame for a ring without buffers is not delivered there once the pair is no longer used.
    net.provided.clear();
    let (client, guest) = (&net.client, &net.guest);
    client.ring_base(2);
    guest.memory.write(net.rx[1].layout.desc, &vec![0; 1 << 20]).unwrap();
    net.rx[1] = Ring::new(guest, 2, 256, net.features);
    net.rx[1].set_up(client, guest, net.rx[1].initial_base());
    net.rx[1].enable(client, true);
    let before = net.device.packet_counts();
    net.send(1, &frame(100, 77));
    assert_eq!(control.ask(&net.guest, 4, 0, &1u16.to_le_bytes()), 0);
    net.provide_kicked(1, &[700]);
    let arrived =
        |counts: PacketCounts| counts.received + counts.received_dropped - before.received - before.received_dropped;
    net.wait_for("the frame has gone somewhere", |counts| arrived(counts) == 1);
    assert!(!net.rx[1].has_completion(&net.guest), "a pair that is not used has received something");
}

/// A new driver does not inherit the settings of the driver before it, with a control queue or without.
/// Rule D1.8.
#[rstest]
fn a_new_driver_starts_with_the_default_filter(#[values(VirtioFeatures::empty(), CONTROL)] next: VirtioFeatures) {
    let device = Arc::new(NetDevice::open(options(NetPeer::Loopback)).unwrap());
    let (server, strange) = (Server::new(device.clone()), [2, 0, 0, 0, 0, 9]);
    {
        let mut net = NetGuest::on(&server, &device, MERGEABLE | CONTROL, 1);
        let mut control = ControlQueueDriver::new(&net, 2);
        assert_eq!(control.ask(&net.guest, 0, 0, &[0]), 0);
        assert_eq!(control.ask(&net.guest, 1, 1, &strange), 0);
        net.send(0, &frame(60, 1));
        net.wait_for("the frame is filtered", |counts| counts.received_filtered == 1);
        assert_eq!(config(&net.client).0, strange);
    }
    let mut net = NetGuest::on(&server, &device, MERGEABLE | next, 1);
    net.provide_kicked(0, &[700]);
    net.send(0, &frame(60, 2));
    assert_eq!(net.receive(0), frame(60, 2));
    assert_eq!(config(&net.client).0, MAC);
}

/// A front-end reconnects while its guest runs, and the rings continue at their bases.
/// Rule D1.9.
#[test]
fn a_resumed_driver_keeps_its_filter() {
    let device = Arc::new(NetDevice::open(options(NetPeer::Loopback)).unwrap());
    let server = Server::new(device.clone());
    let mut net = NetGuest::on(&server, &device, MERGEABLE | CONTROL, 1);
    let mut control = ControlQueueDriver::new(&net, 2);
    assert_eq!(control.ask(&net.guest, 0, 0, &[0]), 0);
    net.provide_kicked(0, &[700; 3]);
    net.send(0, &[&MAC[..], &frame(54, 1)].concat());
    net.receive(0);
    let bases: Vec<u32> = (0..3).map(|index| net.client.ring_base(index)).collect();
    net.client = server.connect();
    negotiate(&net.client, &net.guest, net.features);
    for (ring, base) in [&net.rx[0], &net.tx[0], &control.0].into_iter().zip(bases) {
        ring.set_up(&net.client, &net.guest, base);
        ring.enable(&net.client, true);
    }
    net.send(0, &frame(60, 2));
    net.wait_for("the frame is filtered", |counts| counts.received_filtered == 1);
}

/// Before version 1, the header of a driver without mergeable buffers has 10 bytes. The number of buffers would follow
/// them.
#[test]
fn a_legacy_header_has_no_num_buffers_field() {
    let mut net = NetGuest::new(PROTOCOL_FEATURES_BIT, |_| {});
    let frame = frame(60, 3);
    net.guest.memory.write(SENT, &[&[0; 10], &frame[..]].concat()).unwrap();
    let buffer = Buffer { gpa: BUFFERS, len: 100 };
    net.rx[0].driver.add(&[], &[buffer], None).unwrap().unwrap();
    net.rx[0].kick();
    net.transmit(0, &[Buffer { gpa: SENT, len: 70 }], &[]);
    assert_eq!(net.rx[0].completion().1, 70);
    assert_eq!(net.guest.bytes(BUFFERS, 70), [&[0; 10], &frame[..]].concat());
}

/// A control queue at `index`, and its commands.
struct ControlQueueDriver(Ring);

impl ControlQueueDriver {
    fn new(net: &NetGuest, index: u32) -> ControlQueueDriver {
        let ring = Ring::started(&net.client, &net.guest, index, 64, net.features);
        ControlQueueDriver(ring)
    }

    fn ask(&mut self, guest: &Guest, class: u8, command: u8, data: &[u8]) -> u8 {
        let message = [&[class, command], data].concat();
        guest.memory.write(SENT, &message).unwrap();
        let answer = Buffer { gpa: SENT.unchecked_add(0x10_0000), len: 1 };
        guest.memory.write(answer.gpa, &[0xff]).unwrap();
        let readable =
            [Buffer { gpa: SENT, len: 2 }, Buffer { gpa: SENT.unchecked_add(2), len: message.len() as u32 - 2 }];
        let readable: Vec<_> = readable.into_iter().filter(|buffer| buffer.len > 0).collect();
        self.0.driver.add(&readable, &[answer], None).unwrap().unwrap();
        self.0.kick();
        assert_eq!(self.0.completion().1, 1);
        guest.bytes(answer.gpa, 1)[0]
    }
}

fn table(macs: &[[u8; 6]]) -> Vec<u8> {
    [&(macs.len() as u32).to_le_bytes()[..], macs.as_flattened()].concat()
}

#[test]
fn a_frame_sent_after_a_control_reply_is_filtered_by_the_new_filter() {
    let mut net = NetGuest::new(SPLIT | MERGEABLE | CONTROL, |options| options.pairs = 1);
    let mut control = ControlQueueDriver::new(&net, 2);
    net.provide_kicked(0, &[2000; 20]);
    assert_eq!(control.ask(&net.guest, 0, 0, &[0]), 0);
    let other = [2, 0, 0, 0, 0, 9];
    for round in 1..=5000 {
        // The first change wakes the receive queue, which may be at any point when the second change arrives.
        for mac in [MAC, other] {
            assert_eq!(control.ask(&net.guest, 1, 1, &mac), 0);
        }
        net.send(0, &[&MAC[..], &frame(54, 1)].concat());
        let mut counts = net.device.packet_counts();
        while counts.received + counts.received_filtered < round {
            std::thread::yield_now();
            counts = net.device.packet_counts();
        }
        assert_eq!(counts.received, 0, "round {round}");
    }
}

#[rstest]
fn the_control_queue_executes_specified_commands_and_refuses_others(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    const OK: u8 = 0;
    const ERR: u8 = 1;
    let mut net = NetGuest::new(rings | MERGEABLE | CONTROL | VIRTIO_NET_F_MQ, |options| options.pairs = 2);
    let mut control = ControlQueueDriver::new(&net, 4);
    let mut ask = |net: &NetGuest, class, command, data: &[u8]| control.ask(&net.guest, class, command, data);
    let to = |mac: [u8; 6]| [&mac[..], &frame(54, mac[5])].concat();
    let (new, other, group) = ([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 2], [1, 0, 0, 0, 0, 1]);
    let answers = [
        // Commands of the mode EXTRA, which was not negotiated, and commands that do not exist.
        (ask(&net, 0, 2, &[1]), ERR),
        (ask(&net, 0, 77, &[1]), ERR),
        (ask(&net, 77, 0, &[1]), ERR),
        (ask(&net, 0, 0, &[]), ERR),
        (ask(&net, 0, 0, &[0, 0]), ERR),
        (ask(&net, 2, 0, &[0, 0]), ERR),
        (ask(&net, 0, 1, &[1]), OK),
        (ask(&net, 0, 1, &[0]), OK),
        (ask(&net, 1, 1, &new[..5]), ERR),
        (ask(&net, 1, 1, &new), OK),
        (ask(&net, 1, 0, &[table(&[other]), table(&[])].concat()), OK),
        (ask(&net, 1, 0, &table(&[other])), ERR),
        (ask(&net, 1, 0, &[u32::MAX.to_le_bytes(), [0; 4]].concat()), ERR),
        (ask(&net, 3, 0, &[]), OK),
        (ask(&net, 4, 0, &[0, 0]), ERR),
        (ask(&net, 4, 0, &[3, 0]), ERR),
        (ask(&net, 4, 0, &[1]), ERR),
        (ask(&net, 4, 0, &[1, 0]), OK),
        (ask(&net, 0, 0, &[0]), OK),
    ];
    assert!(answers.iter().all(|(answer, expected)| answer == expected), "{answers:?}");
    net.provide_kicked(0, &[2000; 20]);
    net.provide_kicked(1, &[2000; 20]);
    // One pair is in use. It also receives the frames that arrive for the other pair.
    for (pair, mac) in [(0, MAC), (0, new), (1, group), (1, other), (0, [0xff; 6])] {
        net.send(pair, &to(mac));
    }
    // The order of frames from two pairs is not defined.
    let mut received = [(); 3].map(|()| net.receive(0));
    let mut expected = [new, other, [0xff; 6]].map(to);
    received.sort();
    expected.sort();
    assert_eq!(received, expected);
    assert_eq!(net.device.packet_counts().received_filtered, 2);
    assert_eq!(ask(&net, 4, 0, &[2, 0]), OK);
    assert_eq!(ask(&net, 0, 1, &[1]), OK);
    net.send(1, &to(group));
    assert_eq!(net.receive(1), to(group));
    // A device reset removes these settings: all frames are received again.
    net.client.send_acknowledged(Code::SET_STATUS, &0u64, &[]);
    assert_eq!(config(&net.client).0, MAC);
}

/// Without MQ there is one pair, and the control queue follows it (virtio 1.2, 5.1.2).
#[test]
fn without_multi_queue_the_control_queue_has_index_2() {
    let net = NetGuest::new(MERGEABLE | CONTROL, |options| options.pairs = 1);
    assert_eq!(ControlQueueDriver::new(&net, 2).ask(&net.guest, 0, 0, &[0]), 0);
    let device = Arc::new(NetDevice::open(options(NetPeer::Loopback).with_pairs(4)).unwrap());
    let (_server, guest, client) = Server::new(device).negotiated(MERGEABLE | CONTROL);
    let ring = Ring::started(&client, &guest, 2, 64, MERGEABLE);
    assert_eq!(ControlQueueDriver(ring).ask(&guest, 0, 0, &[0]), 0);
}

/// The MAC address, and the status: 1 link up, 2 announce.
fn config(client: &RawFrontend) -> ([u8; 6], u16) {
    let question = ConfigHeader { offset: 0, size: 12, flags: 0 };
    let answer = client.request(Code::GET_CONFIG, &[question.as_bytes(), &[0; 12]].concat());
    let config = &answer[12..];
    (config[..6].try_into().unwrap(), u16::from_le_bytes([config[6], config[7]]))
}

/// Rule C1.2.
#[test]
fn network_device_messages_are_answered() {
    let net = NetGuest::new(MERGEABLE | CONTROL, |options| (options.pairs, options.mtu) = (3, Some(9000)));
    let client = &net.client;
    assert_eq!(client.request_u64(Code::GET_QUEUE_NUM), 3, "front-ends of net devices compare it with pairs");
    let features = VirtioFeatures::from_bits_retain(client.request_u64(Code::GET_FEATURES));
    let offered = CONTROL | VIRTIO_NET_F_MQ | VIRTIO_NET_F_MTU | VIRTIO_NET_F_MRG_RXBUF;
    assert_eq!(features & offered, offered);
    assert_eq!(
        features & VirtioFeatures::from_bits_retain(0x7f87),
        VirtioFeatures::empty(),
        "no offload is offered, for none can be kept everywhere"
    );
    let protocol = ProtocolFeatures::from_bits_retain(client.request_u64(Code::GET_PROTOCOL_FEATURES));
    let own = ProtocolFeatures::RARP | ProtocolFeatures::MTU;
    assert_eq!(protocol & own, own);
    for (mtu, answer) in [(68u64, 0), (1500, 0), (9000, 0), (67, 1), (9001, 1), (u64::MAX, 1)] {
        assert_eq!(client.acknowledged(Code::NET_SET_MTU, mtu.as_bytes(), &[]), answer, "{mtu}");
    }
    assert_eq!(config(client), (MAC, 1));
    let mut ear = BackendChannel::open(client);
    client.send_acknowledged(Code::SEND_RARP, &0x0000_0605_0403_0201u64, &[]);
    assert_eq!(ear.receive(), (BackendRequest::CONFIG_CHANGE_MSG, None), "its front-end hears of it (rule B2.1)");
    assert_eq!(config(client), (MAC, 3), "the driver is asked to announce itself");
    let mut control = ControlQueueDriver::new(&net, 2);
    assert_eq!(control.ask(&net.guest, 3, 0, &[]), 0);
    assert_eq!(config(client), (MAC, 1));
    let header = ConfigHeader { offset: 0, size: 6, flags: CONFIG_TYPE_MIGRATION };
    let arrived = [header.as_bytes(), &[2, 9, 9, 9, 9, 9]].concat();
    assert_eq!(client.acknowledged(Code::SET_CONFIG, &arrived, &[]), 0);
    assert_eq!(config(client), ([2, 9, 9, 9, 9, 9], 3));
    let written = [ConfigHeader { flags: 0, ..header }.as_bytes(), &[2, 9, 9, 9, 9, 9]].concat();
    assert_eq!(client.acknowledged(Code::SET_CONFIG, &written, &[]), 1);
}

#[rstest]
fn a_truncated_send_rarp_or_net_set_mtu_is_refused_and_packets_continue(
    #[values(SPLIT, PACKED)] rings: VirtioFeatures,
) {
    let mut net = NetGuest::new(rings | MERGEABLE | CONTROL, |options| options.mtu = Some(9000));
    let mut seed = 0;
    for code in [Code::SEND_RARP, Code::NET_SET_MTU] {
        for payload in [&[][..], &[2; 3], &[2; 7]] {
            assert_eq!(net.client.acknowledged(code, payload, &[]), 1, "{code} of {} bytes", payload.len());
            net.client.send(code, VERSION, payload, &[net.client.as_fd()]);
            assert_eq!(config(&net.client), (MAC, 1), "the driver is asked to announce itself");
            seed += 1;
            net.provide_kicked(0, &[2000]);
            net.send(0, &frame(1500, seed));
            assert_eq!(net.receive(0), frame(1500, seed));
        }
    }
}

#[rstest]
fn invalid_packets_are_dropped_and_counted_and_the_queue_continues(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE, |_| {});
    net.provide_kicked(0, &[2000; 3]);
    let at = |gpa, len| Buffer { gpa, len };
    net.transmit(0, &[at(SENT, 11)], &[]);
    net.transmit(0, &[], &[at(SENT, 64)]);
    net.transmit(0, &[at(SENT, 12 + 65551)], &[]);
    net.transmit(0, &[at(GuestAddress(0), 0xffff_fff0)], &[]);
    net.transmit(0, &[at(SENT, 12), at(OUTSIDE, 100)], &[]);
    net.transmit(0, &[at(OUTSIDE, 12), at(SENT, 100)], &[]);
    net.wait_for("the packet arrives", |seen| seen.received == 1);
    let mut counts = PacketCounts::default();
    // The device ignores the contents of the header, so a header outside memory is accepted.
    (counts.sent_malformed, counts.sent, counts.received) = (5, 1, 1);
    assert_eq!(net.device.packet_counts(), counts);
    net.rx[0].completion();
    net.send(0, &frame(60, 1));
    assert_eq!(net.receive(0), frame(60, 1));
}

#[rstest]
fn unusable_receive_buffers_are_returned_empty_and_the_queue_continues(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    for features in [rings, rings | MERGEABLE] {
        let mut net = NetGuest::new(features, |_| {});
        let at = |gpa, len| Buffer { gpa, len };
        let rx = &mut net.rx[0].driver;
        rx.add(&[], &[at(BUFFERS, 11)], None).unwrap().unwrap();
        rx.add(&[at(BUFFERS, 2000)], &[], None).unwrap().unwrap();
        rx.add(&[], &[at(BUFFERS, 500), at(OUTSIDE, 1000)], None).unwrap().unwrap();
        net.rx[0].kick();
        net.provide_kicked(0, &[2000; 2]);
        net.send(0, &frame(1000, 1));
        for _ in 0..3 {
            assert_eq!(net.rx[0].completion().1, 0);
        }
        assert_eq!(net.receive(0), frame(1000, 1));
        assert_eq!(net.device.packet_counts().bad_buffers, 3);
        assert_eq!(net.guest.bytes(BUFFERS.unchecked_add(4000), 8), [0; 8]);
    }
}

/// A larger packet would wait for ever, and all packets behind it.
#[rstest]
fn a_packet_larger_than_a_full_ring_of_buffers_is_dropped(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE, |_| {});
    net.send(0, &frame(256 * 12, 1));
    net.send(0, &frame(255 * 12, 2));
    for number in 0..256 {
        let buffer = Buffer { gpa: BUFFERS.unchecked_add(number * 12), len: 12 };
        net.rx[0].driver.add(&[], &[buffer], None).unwrap().unwrap();
    }
    net.rx[0].serve(256);
    assert_eq!(net.guest.bytes(BUFFERS.unchecked_add(12), 255 * 12), frame(255 * 12, 2));
    assert_eq!(net.device.packet_counts().received_dropped, 1);
}

/// Two interfaces, each in a process or a thread of its own.
#[rstest]
fn paired_devices_exchange_packets_also_after_a_restart(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wire");
    let end = || {
        NetGuest::new(rings | MERGEABLE | VIRTIO_NET_F_MQ, |options| {
            (options.pairs, options.peer) = (2, NetPeer::Pair(path.clone()));
        })
    };
    let talk = |from: &mut NetGuest, to: &mut NetGuest, pair: usize, seed: u8| {
        to.provide_kicked(pair, &[1000; 3]);
        // Packets sent before the other end has connected are dropped.
        let before = from.device.packet_counts().sent;
        while from.device.packet_counts().sent == before {
            from.send(pair, &frame(2900, seed));
        }
        assert_eq!(to.receive(pair), frame(2900, seed));
    };
    let (mut a, mut b) = (end(), end());
    for pair in [0, 1] {
        talk(&mut a, &mut b, pair, 1);
        talk(&mut b, &mut a, pair, 2);
    }
    // A third end waits until one of the two closes. The packets of its driver wait, too.
    let mut c = end();
    c.send(0, &frame(100, 77));
    assert_eq!(c.device.packet_counts().sent, 1);
    talk(&mut b, &mut a, 0, 3);
    a.provide_kicked(0, &[500]);
    drop(b);
    assert_eq!(a.receive(0), frame(100, 77));
    talk(&mut a, &mut c, 1, 4);
    // The listening end closes, and a new end connects to the remaining one.
    drop(a);
    let mut d = end();
    for pair in [0, 1] {
        talk(&mut c, &mut d, pair, 5);
        talk(&mut d, &mut c, pair, 6);
    }
    // An announcement is broadcast to the other end.
    d.provide_kicked(0, &[200]);
    c.client.send_acknowledged(Code::SEND_RARP, &0x0000_0605_0403_0201u64, &[]);
    let rarp = d.receive(0);
    let mac = [1, 2, 3, 4, 5, 6];
    let expected = [&[0xff; 6][..], &mac, &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3], &mac, &[0; 4], &mac, &[0; 4]].concat();
    assert_eq!((&rarp[..42], rarp.len()), (&expected[..], 60));
}

#[test]
fn paired_processes_connect_in_any_start_order() {
    let folder = tempfile::tempdir().unwrap();
    let wire = folder.path().join("wire");
    let start = |socket: &str| Process::net(&folder.path().join(socket), &["--pair", wire.to_str().unwrap()]);
    // The processes start one after the other, and then again with the files that the killed ones have left.
    for _ in 0..2 {
        let (_a, _b) = (start("a"), start("b"));
        let [mut a, mut b] = ["a", "b"].map(|socket| NetClient::new(folder.path().join(socket).as_path()));
        for (from, to) in [(0, 1), (1, 0)] {
            let ends = [&mut a, &mut b];
            ends[to].provide();
            let end = std::time::Instant::now() + DEADLINE;
            loop {
                assert!(std::time::Instant::now() < end, "nothing arrives");
                ends[from].send(&frame(1500, 7));
                if let Some(received) = ends[to].received() {
                    assert_eq!(received, frame(1500, 7));
                    break;
                }
            }
        }
    }
}

/// A front-end of a back-end process, with one pair.
struct NetClient {
    _client: RawFrontend,
    guest: Guest,
    rx: Ring,
    tx: Ring,
}

impl NetClient {
    fn new(socket: &std::path::Path) -> NetClient {
        let (client, guest) = (RawFrontend::connect(socket), Guest::new());
        negotiate(&client, &guest, MERGEABLE);
        let [rx, tx] = [0, 1].map(|index| Ring::started(&client, &guest, index, 256, MERGEABLE));
        NetClient { _client: client, guest, rx, tx }
    }

    fn provide(&mut self) {
        self.rx.driver.add(&[], &[Buffer { gpa: BUFFERS, len: 2000 }], None).unwrap().unwrap();
        self.rx.kick();
    }

    fn send(&mut self, frame: &[u8]) {
        self.guest.memory.write(SENT, &[&[0; HEADER], frame].concat()).unwrap();
        let message = Buffer { gpa: SENT, len: (HEADER + frame.len()) as u32 };
        self.tx.driver.add(&[message], &[], None).unwrap().unwrap();
        self.tx.serve_one();
    }

    fn received(&mut self) -> Option<Vec<u8>> {
        let used = self.rx.driver.pop_used().unwrap()?;
        Some(self.guest.bytes(BUFFERS, used.len as usize).split_off(HEADER))
    }
}

#[test]
fn invalid_network_options_are_refused_with_a_one_line_error() {
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
        let output = command.args(["backend", "net", "--socket", "s"]).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let cases: [(&[&str], i32, &str); 6] = [
        (&["--loopback", "--mac", "01:00:00:00:00:00"], 2, "first byte is even"),
        (&["--loopback", "--queue-size", "1000"], 2, "a power of two"),
        (&["--tap", "sixteen-bytes-xx"], 2, "1 to 15 bytes"),
        (&["--pair", "/nowhere/at/all"], 1, "that you may write to"),
        (&["--loopback", "--mac", "52:54:00"], 2, "write it as"),
        (&["--loopback", "--pair", "x"], 2, "cannot be used with"),
    ];
    for (arguments, status, advice) in cases {
        let (code, said) = run(arguments);
        assert_eq!(code, Some(status), "{said}");
        assert!(said.contains(advice) && (status == 2 || said.lines().count() == 1), "{said}");
    }
    assert_eq!(run(&[]).0, Some(2), "what is at the other end must be said");
}

/// Rule R10.1: QEMU sends the call fd last, when packets may already have arrived.
#[rstest]
fn a_notification_without_a_call_fd_is_signalled_over_the_next_call_fd(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    let mut net = NetGuest::new(rings | MERGEABLE, |_| {});
    let renew = |net: &mut NetGuest| {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        net.rx[0].call = EventFd::from_flags(flags).unwrap();
        let call = net.rx[0].call.as_fd();
        net.client.send_acknowledged(Code::SET_VRING_CALL, &0u64, &[call]);
        net.rx[0].call.read().is_ok()
    };
    assert!(!renew(&mut net), "there was nothing to say");
    let none = 1u64 << 8;
    net.client.send_acknowledged(Code::SET_VRING_CALL, &none, &[]);
    net.provide_kicked(0, &[1000]);
    net.send(0, &frame(100, 1));
    while !net.rx[0].has_completion(&net.guest) {
        net.client.wait_until_processed();
    }
    assert!(renew(&mut net), "the driver never hears of its packet");
    assert_eq!(net.receive(0), frame(100, 1));
}

/// The other end of a pair shuts down its sending direction and stays connected. The socket would be readable for ever.
#[test]
fn a_half_closed_pair_connection_is_closed_and_reconnected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pair");
    let _rig = NetGuest::new(BASIC, |options| options.peer = NetPeer::Pair(path.clone()));
    let connect = || {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = nix::sys::socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        nix::sys::socket::connect(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        // The first message: for pair 0 of 1.
        nix::unistd::write(&socket, b"vm-pair1\0\0\x01\0").unwrap();
        socket
    };
    for _ in 0..2 {
        let socket = connect();
        shutdown(socket.as_raw_fd(), Shutdown::Write).unwrap();
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        assert_eq!(poll(&mut fds, DEADLINE.as_millis() as u16), Ok(1), "it is not hung up");
    }
}

/// A tap is deleted while the interface runs. Its queues stop reading from it, one line reports that, and everything
/// else continues.
#[cfg(feature = "peers")]
#[test]
fn a_deleted_tap_is_removed_from_the_device() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    use crate::net_driver::{LoopbackNetGuest, interface_features};

    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let program = env!("CARGO_BIN_EXE_vhost-migrate");
    let backend = format!("{program} backend net --socket {} --tap tap0 --queue-pairs 2", socket.display());
    // Disables IPv6: the host would send packets of its own, which would wait for buffers.
    let quiet = "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6";
    let tap = format!("{quiet}; ip tuntap add dev tap0 mode tap multi_queue && ip link set tap0 up");
    // The shell deletes the tap when it reads a line, and then waits for the back-end to end.
    let script = format!("{tap} && {{ {backend} --log-level warn & }} && read go && ip link del tap0 && wait");
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--net", "sh", "-c", &script]);
    let mut shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(shell.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.starts_with("serves "), "{said}");
    let mut net = LoopbackNetGuest::new(RawFrontend::connect(&socket), interface_features(SPLIT));
    net.send(0);
    shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let mut lines = BufReader::new(shell.stderr.take().unwrap()).lines().map(Result::unwrap);
    for _ in 0..2 {
        let line = lines.next().unwrap();
        assert!(line.contains("is gone"), "{line}");
    }
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", shell.id())).unwrap();
    // The process that deletes the tap may not have ended yet.
    let backend: i32 = children.split(' ').next().unwrap().parse().unwrap();
    // Threads without work sleep.
    let is_asleep = || {
        let tasks = std::fs::read_dir(format!("/proc/{backend}/task")).unwrap();
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default()).all(|stat| {
            let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('S'));
            after_name.unwrap_or(true)
        })
    };
    let (end, mut times) = (std::time::Instant::now() + DEADLINE, 0);
    while times < 50 {
        assert!(std::time::Instant::now() < end, "a thread has something to do all the time");
        times = if is_asleep() { times + 1 } else { 0 };
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // Sent packets are dropped, and commands are completed.
    (0..3).for_each(|_| _ = net.send(0));
    net.command();
    drop(net);
    let mut net = LoopbackNetGuest::new(RawFrontend::connect(&socket), interface_features(SPLIT));
    net.send(1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(backend), nix::sys::signal::Signal::SIGTERM).unwrap();
    // This line is unrelated to the tap: a connection may arrive before the end of the previous one is noticed.
    let more = lines.find(|line| !line.contains("another front-end has connected"));
    assert_eq!(more, None, "one line is enough");
    shell.wait().unwrap();
}
