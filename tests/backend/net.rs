//! What a guest's network driver may rely on, and what a hostile one can't do.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use vhost_migrate::abi::bit;
use vhost_migrate::abi::vhost_user::{
    CONFIG_TYPE_MIGRATION, ConfigHeader, InflightDescription, Request as Code, protocol_feature,
};
use vhost_migrate::abi::virtio::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_RING_F_EVENT_IDX,
};
use vhost_migrate::backend::net::{Counts, Net, NetOptions, Peer};
use vhost_migrate::inflight;
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::guest::{BASIC, Guest, HIGH, PROTOCOL, Ring, begin, harvest, install_log, start_logging};
use crate::log::{LOG_AT, Oracle};
use crate::raw::{Client, DEADLINE};
use crate::server::Server;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGEABLE: u64 = BASIC | bit(VIRTIO_NET_F_MRG_RXBUF);
const CONTROL: u64 = bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_CTRL_RX)
    | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
    | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
const HEADER: usize = 12;
/// Where frames to send are put, and from where on buffers to receive into lie.
const SENT: u64 = 0xc0_0000;
const BUFFERS: u64 = HIGH;
const OUTSIDE: u64 = 1 << 40;

fn options(peer: Peer) -> NetOptions {
    NetOptions { peer, pairs: 1, max_queue_size: 1024, mac: MAC, mtu: None }
}

/// An interface, its front-end, and the guest behind that.
struct Rig {
    device: Arc<Net>,
    server: Server,
    client: Client,
    guest: Guest,
    features: u64,
    rx: Vec<Ring>,
    tx: Vec<Ring>,
    /// Buffers provided, by pair and head.
    provided: HashMap<(usize, u16), Buffer>,
    next: u64,
}

impl Rig {
    fn new(features: u64, change: impl FnOnce(&mut NetOptions)) -> Rig {
        let mut options = options(Peer::Loopback);
        change(&mut options);
        let pairs = u32::from(options.pairs);
        let (device, guest) = (Arc::new(Net::open(options).unwrap()), Guest::new());
        let server = Server::new(device.clone());
        let client = server.connect();
        begin(&client, &guest, features);
        let ring = |index| Ring::new(&guest, index, 256, features);
        let (rx, tx) = (0..pairs).map(|pair| (ring(2 * pair), ring(2 * pair + 1))).unzip();
        let rig = Rig { device, server, client, guest, features, rx, tx, provided: HashMap::new(), next: BUFFERS };
        for ring in rig.rx.iter().chain(&rig.tx) {
            ring.set_up(&rig.client, &rig.guest, 0);
            ring.enable(&rig.client, true);
        }
        rig
    }

    /// Provides a buffer of `len` bytes, cut in two, which begins where the last one ends.
    fn provide(&mut self, pair: usize, len: u32) -> u16 {
        let buffer = Buffer { gpa: self.next, len };
        self.next += u64::from(len);
        assert!(self.next < BUFFERS + (16 << 20));
        self.guest.memory.write(buffer.gpa, &vec![0xee; len as usize]).unwrap();
        let first = Buffer { len: len / 3, ..buffer };
        let second = Buffer { gpa: buffer.gpa + u64::from(first.len), len: len - first.len };
        let head = self.rx[pair].driver.add(&[], &[first, second], None).unwrap().unwrap();
        self.provided.insert((pair, head), buffer);
        head
    }

    fn provide_kicked(&mut self, pair: usize, lens: &[u32]) {
        lens.iter().for_each(|len| _ = self.provide(pair, *len));
        self.rx[pair].kick();
    }

    /// Sends a frame behind a header that asks for what was never offered, and waits until the device is done with it.
    fn send(&mut self, pair: usize, frame: &[u8]) {
        let message = [&[0xff; HEADER], frame].concat();
        self.guest.memory.write(SENT, &message).unwrap();
        let len = message.len() as u32;
        self.transmit(pair, &[Buffer { gpa: SENT, len: 7 }, Buffer { gpa: SENT + 7, len: len - 7 }], &[]);
    }

    fn transmit(&mut self, pair: usize, readable: &[Buffer], writable: &[Buffer]) {
        let tx = &mut self.tx[pair];
        tx.driver.add(readable, writable, None).unwrap().unwrap();
        tx.kick();
        assert_eq!(tx.completion().1, 0, "the device wrote to a packet that it was to send");
    }

    /// The next frame received, after its header and all its buffers were checked: they must be there at once.
    fn receive(&mut self, pair: usize) -> Vec<u8> {
        let mut used = self.rx[pair].completion();
        let mut message = Vec::new();
        let mut left = None;
        loop {
            let buffer = self.provided.remove(&(pair, used.0)).unwrap();
            assert!(used.1 <= buffer.len);
            message.extend(self.guest.bytes(buffer.gpa, used.1 as usize));
            let behind = self.guest.bytes(buffer.gpa + u64::from(used.1), (buffer.len - used.1) as usize);
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

    /// That nothing arrives: all that was sent before is done by the time of the answer to a stop.
    fn nothing_arrives(&mut self, pair: usize) {
        let (base, used) = (self.client.ring_base(2 * pair as u32), self.rx[pair].driver.pop_used().unwrap());
        assert!(used.is_none());
        self.rx[pair].set_up(&self.client, &self.guest, base);
    }

    fn wait_for(&self, what: &str, seen: impl Fn(Counts) -> bool) {
        let end = std::time::Instant::now() + DEADLINE;
        while !seen(self.device.counts()) {
            assert!(std::time::Instant::now() < end, "{what}: {:?}", self.device.counts());
            std::thread::yield_now();
        }
    }
}

/// A frame that no other is like.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8).wrapping_add(seed)).collect()
}

#[test]
fn a_frame_of_any_size_comes_back_byte_for_byte_however_the_buffers_are_cut() {
    for features in [MERGEABLE, MERGEABLE | bit(VIRTIO_RING_F_EVENT_IDX)] {
        let mut rig = Rig::new(features, |_| {});
        let mut seed = 0;
        for room in [12, 13, 97, 1526, 4099, 65562] {
            for len in [0, 1, 13, 60, 85, 86, 1514, 4086, 4087, 4088, 9000, 65535, 65550] {
                let buffers = (len + HEADER).div_ceil(room);
                if buffers > 250 {
                    continue;
                }
                seed += 1;
                rig.next = BUFFERS + u64::from(seed);
                rig.provide_kicked(0, &vec![room as u32; buffers]);
                rig.send(0, &frame(len, seed));
                assert_eq!(rig.receive(0), frame(len, seed), "{len} bytes in buffers of {room}");
                assert!(rig.provided.is_empty(), "{len} bytes in buffers of {room}");
            }
        }
        let Counts { sent, received, .. } = rig.device.counts();
        assert_eq!((sent, received), (u64::from(seed), u64::from(seed)));
    }
}

#[test]
fn without_mergeable_buffers_a_packet_takes_one_and_is_dropped_if_it_does_not_fit() {
    let mut rig = Rig::new(BASIC, |_| {});
    rig.provide_kicked(0, &[1526, 1526, 65562]);
    rig.send(0, &frame(1514, 1));
    rig.send(0, &frame(1515, 2));
    rig.send(0, &frame(3, 3));
    rig.send(0, &frame(65550, 4));
    assert_eq!(rig.receive(0), frame(1514, 1));
    assert_eq!(rig.receive(0), frame(3, 3), "the buffer that was too small is used for the next packet");
    assert_eq!(rig.receive(0), frame(65550, 4));
    assert_eq!(rig.device.counts().received_dropped, 1);
}

#[test]
fn a_packet_that_waits_for_buffers_is_received_when_they_come() {
    for features in [MERGEABLE, MERGEABLE | bit(VIRTIO_RING_F_EVENT_IDX)] {
        let mut rig = Rig::new(features, |_| {});
        rig.send(0, &frame(3000, 1));
        rig.send(0, &frame(100, 2));
        for _ in 0..30 {
            rig.provide_kicked(0, &[100]);
        }
        rig.provide_kicked(0, &[100, 100]);
        assert_eq!(rig.receive(0), frame(3000, 1));
        assert!(rig.provided.len() == 1);
        rig.provide_kicked(0, &[100]);
        assert_eq!(rig.receive(0), frame(100, 2));
    }
}

/// Every byte that the device writes: packets with their headers, used rings, and nothing else.
#[test]
fn the_log_holds_exactly_what_was_received() {
    for features in [MERGEABLE, MERGEABLE | bit(VIRTIO_RING_F_EVENT_IDX)] {
        let mut rig = Rig::new(features, |_| {});
        let log = install_log(&rig.client, &rig.guest);
        let (rx, tx) = (&mut rig.rx[0], &mut rig.tx[0]);
        start_logging(&rig.client, &rig.guest, features, &mut [rx, tx], LOG_AT);
        let mut oracles = [Oracle::new(&rig.guest, &rig.rx[0]), Oracle::new(&rig.guest, &rig.tx[0])];
        for round in 0..60u64 {
            let (len, room) = (round as usize * 997 % 20000, [1526, 4096, 4097, 9001, 20480][round as usize % 5]);
            let buffers = (len + HEADER).div_ceil(room);
            // Every buffer begins at the end of a page, and those that are not needed lie before those that are.
            for number in 0..buffers {
                rig.next = (rig.next + 0x1fff) / 0x1000 * 0x1000 - 1 - round % 3 * 5;
                let written = (len + HEADER - number * room).min(room) as u64;
                oracles[0].wrote(rig.next, written);
                rig.provide(0, room as u32);
            }
            rig.rx[0].kick();
            rig.send(0, &frame(len, round as u8));
            assert_eq!(rig.receive(0), frame(len, round as u8));
            if rig.next > BUFFERS + (12 << 20) {
                rig.next = BUFFERS;
            }
        }
        // Taken for a packet that is larger, and not written.
        rig.next = BUFFERS + (15 << 20);
        rig.provide_kicked(0, &[4096, 4096]);
        rig.send(0, &frame(9000, 0));
        for (ring, oracle) in rig.rx.iter().chain(&rig.tx).zip(&mut oracles) {
            rig.client.ring_base(ring.index);
            oracle.used_ring(&rig.guest, ring, LOG_AT + u64::from(ring.index) * 0x10_0000);
        }
        let [mut expected, used] = oracles.map(|oracle| oracle.pages);
        expected.extend(used);
        assert_eq!(harvest(&log), expected, "features {features:#x}");
        assert_eq!(log.out_of_range(), 0);
    }
}

#[test]
fn a_stop_does_not_wait_for_packets_and_gives_every_unused_buffer_back() {
    let mut rig = Rig::new(MERGEABLE, |_| {});
    let (region, fd) = inflight::Region::create(2, 256).unwrap();
    let description = InflightDescription {
        mmap_size: inflight::Region::bytes_for(2, 256).unwrap(),
        mmap_offset: 0,
        num_queues: 2,
        queue_size: 256,
        padding: [0; 4],
    };
    for index in [0, 1] {
        assert_eq!(rig.client.ring_base(index), 0);
    }
    rig.client.done(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    for ring in rig.rx.iter().chain(&rig.tx) {
        ring.set_up(&rig.client, &rig.guest, 0);
    }
    rig.provide_kicked(0, &[1000; 10]);
    assert_eq!(rig.client.ring_base(0), 0, "buffers that nothing came for were taken");
    rig.rx[0].set_up(&rig.client, &rig.guest, 0);
    rig.send(0, &frame(100, 1));
    assert_eq!(rig.receive(0), frame(100, 1));
    // Nine buffers are too few for this one: they are taken, and must come back untouched.
    rig.send(0, &frame(9500, 2));
    while region.split(0, 256, 1).unwrap().1.resubmit.len() < 9 {
        rig.client.barrier();
    }
    let before = rig.guest.snapshot();
    assert_eq!(rig.client.ring_base(0), 1);
    assert!(rig.guest.snapshot() == before, "a stop wrote guest memory");
    assert!(region.split(0, 256, 1).unwrap().1.resubmit.is_empty(), "what was given back is still in flight");
    rig.provide_kicked(0, &[1000]);
    rig.rx[0].set_up(&rig.client, &rig.guest, 1);
    assert_eq!(rig.receive(0), frame(9500, 2), "the packet that waited was lost");
    assert_eq!(rig.client.ring_base(0), 11);
    assert!(rig.provided.is_empty());
}

#[test]
fn buffers_that_a_killed_predecessor_had_taken_are_the_first_to_be_used() {
    let mut rig = Rig::new(MERGEABLE, |_| {});
    for index in [0, 1] {
        assert_eq!(rig.client.ring_base(index), 0);
    }
    let heads: Vec<u16> = (0..4).map(|_| rig.provide(0, 1000)).collect();
    let _ = rig.rx[0].driver.publish();
    let (region, fd) = inflight::Region::create(2, 256).unwrap();
    let mut taken = region.split(0, 256, 0).unwrap().0;
    taken.take(heads[0]);
    taken.take(heads[1]);
    drop(taken);
    let description = InflightDescription {
        mmap_size: inflight::Region::bytes_for(2, 256).unwrap(),
        mmap_offset: 0,
        num_queues: 2,
        queue_size: 256,
        padding: [0; 4],
    };
    rig.client.done(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    rig.rx[0].set_up(&rig.client, &rig.guest, 0);
    rig.tx[0].set_up(&rig.client, &rig.guest, 0);
    assert_eq!(rig.client.ring_base(0), 0, "what was taken over and not used goes back");
    rig.rx[0].set_up(&rig.client, &rig.guest, 0);
    rig.send(0, &frame(1500, 1));
    assert_eq!(rig.receive(0), frame(1500, 1));
    assert_eq!(rig.client.ring_base(0), 2);
    assert!(!rig.provided.contains_key(&(0, heads[0])) && !rig.provided.contains_key(&(0, heads[1])));
}
