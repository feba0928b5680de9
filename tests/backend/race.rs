//! A guest that rewrites descriptors, indexes and indirect tables while its requests run. Only memory that a descriptor
//! made writable changes, and the back-end serves the next front-end.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, VringState};
use vhost_migrate::abi::virtio::{
    VIRTIO_F_RING_PACKED, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer};
use vhost_migrate::memory::{Address, GuestAddress};
use vhost_migrate::ring::{Buffer, RingBase};

use crate::guest::{BASIC, Guest, HIGH, Ring, negotiate, status};
use crate::raw::DEADLINE;
use crate::server::Server;
use crate::wait::is_readable;

const SIZE: u16 = 64;
/// Addresses of the headers that the device reads, of indirect tables, and of buffers that it may write.
const HEADERS: u64 = 0x60_0000;
const TABLES: u64 = 0x70_0000;
const BUFFERS: std::ops::Range<u64> = 0x80_0000..0xa0_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Writes random values to rings. They are limited, so that the memory that may change is known.
struct RingCorruptor<'a> {
    guest: &'a Guest,
    rings: &'a [Ring],
    packed: bool,
    random: u64,
    /// The avail index of each ring.
    avail: Vec<u16>,
}

impl RingCorruptor<'_> {
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Writes a descriptor. Its place determines its kind: an indirect table, a buffer to read, or a buffer to write. A
    /// descriptor that is read while it changes is therefore of the same kind.
    fn desc(&mut self, at: GuestAddress, flags: u16, next: u16) {
        let random = self.next();
        let wild = random.is_multiple_of(61);
        let (addr, allowed) = match at.0 / 16 % 4 {
            0 if at.0 < HEADERS => (TABLES + random % 0x1000 * 16, !WRITE),
            0 | 1 => (HEADERS + random % 0x1000 * 16, !(WRITE | INDIRECT)),
            _ => (BUFFERS.start + random % (BUFFERS.end - BUFFERS.start - 0x1_0000), !INDIRECT),
        };
        let addr = if wild { addr | 0xff << 56 } else { addr };
        let len = [16, 1, 512, 4096, 64, 0, 1024, 0xff00_0000][(random >> 40) as usize % 8];
        let (flags, next) = (flags & allowed, if self.packed { next & allowed } else { next });
        let (third, fourth) = if self.packed { (next, flags) } else { (flags, next) };
        let bytes = [&addr.to_le_bytes()[..], &u32::to_le_bytes(len), &third.to_le_bytes(), &fourth.to_le_bytes()];
        self.guest.memory.write(at, &bytes.concat()).unwrap();
    }

    fn header(&mut self) {
        let random = self.next();
        let kind = [0u32, 1, 4, 8, 11, 13, 0, 1][random as usize % 8];
        let at = HEADERS + (random >> 8) % 0x1000 * 16;
        let header = [&kind.to_le_bytes()[..], &[0; 4], &(random >> 32 & 0x7f).to_le_bytes()].concat();
        self.guest.memory.write(GuestAddress(at), &header).unwrap();
    }

    fn corrupt_once(&mut self) {
        let random = self.next();
        let number = (random >> 55) as usize % self.rings.len();
        let layout = self.rings[number].layout;
        let slot = random >> 8 & 0x3f;
        let (at, flags, next) = (layout.desc.unchecked_add(slot * 16), (random >> 16) as u16, (random >> 40) as u16);
        let marks = if random >> 60 & 1 == 0 { 1 << 7 } else { 1 << 15 };
        match random % 8 {
            0 => self.desc(at, flags & 7 | flags & 0x8080, next % (SIZE + 2)),
            1 => self.desc(GuestAddress(TABLES + (random >> 20) % 0x1000 * 16), flags & 7, next % 8),
            2 => self.header(),
            3 if !self.packed => {
                let ahead = if random >> 50 & 0xff == 0 { next } else { next % 4 };
                self.avail[number] = self.avail[number].wrapping_add(ahead);
                self.guest.memory.write(layout.avail.unchecked_add(2), &self.avail[number].to_le_bytes()).unwrap();
            }
            4 if !self.packed => {
                let head = next % (SIZE + 1);
                self.guest.memory.write(layout.avail.unchecked_add(4 + slot * 2), &head.to_le_bytes()).unwrap();
            }
            _ => {
                // A chain that is valid until it changes: a header, data, a status byte.
                let first = slot & !3 | 1;
                let chain = [(0, NEXT), (1, NEXT | WRITE), (2, WRITE)];
                for (number, flags) in chain.into_iter().rev() {
                    let at = layout.desc.unchecked_add((first + number) * 16);
                    self.desc(at, flags | if self.packed { marks } else { 0 }, (first + number) as u16 + 1);
                }
                if !self.packed {
                    let entry = layout.avail.unchecked_add(4 + u64::from(self.avail[number] % SIZE) * 2);
                    self.guest.memory.write(entry, &(first as u16).to_le_bytes()).unwrap();
                    self.avail[number] = self.avail[number].wrapping_add(1);
                    self.guest.memory.write(layout.avail.unchecked_add(2), &self.avail[number].to_le_bytes()).unwrap();
                }
            }
        }
        let _ = self.rings[number].kick.write(1);
    }
}

/// Corrupts the first `count` rings of a device until each has served many requests and has been broken many times.
fn race(server: &Server, features: VirtioFeatures, count: u32) {
    let packed = features.contains(VIRTIO_F_RING_PACKED);
    let guest = Guest::new();
    guest.memory.write(HIGH, &[0xa5; 1 << 20]).unwrap();
    let client = server.connect();
    negotiate(&client, &guest, features);
    let rings: Vec<Ring> = (0..count).map(|index| Ring::new(&guest, index, SIZE, features)).collect();
    let errors: Vec<EventFd> = rings.iter().map(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()).collect();
    for (ring, error) in rings.iter().zip(&errors) {
        client.send_acknowledged(Code::SET_VRING_ERR, &u64::from(ring.index), &[error.as_fd()]);
    }
    // The guest's own writes are below the buffers, and so are the device's areas of the rings.
    let above = (u64::from(count) + 1) << 20;
    let fixed = [(BUFFERS.end, 0x100_0000 - BUFFERS.end), (HIGH.0, 0x100_0000), (above, HEADERS - above)];
    let snapshot = || fixed.map(|(gpa, len)| guest.bytes(GuestAddress(gpa), len as usize));
    let before = snapshot();
    let stop = AtomicBool::new(false);
    // Both counts are per ring.
    let (mut served, mut broken, mut round) = (vec![0; rings.len()], vec![0; rings.len()], 0u16);
    let end = Instant::now() + 6 * DEADLINE;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (random, avail) = (0x9e37_79b9, vec![0; rings.len()]);
            let mut scribbler = RingCorruptor { guest: &guest, rings: &rings, packed, random, avail };
            while !stop.load(Ordering::Relaxed) {
                scribbler.corrupt_once();
            }
        });
        while served.iter().any(|served| *served < 500) || broken.iter().any(|broken| *broken < 50) {
            if Instant::now() > end {
                stop.store(true, Ordering::Relaxed);
                panic!("hardly anything happens: {served:?} served, {broken:?} broken");
            }
            for ring in &rings {
                let avail = u16::from_le_bytes(guest.bytes(ring.layout.avail.unchecked_add(2), 2).try_into().unwrap());
                let base = if packed { RingBase::initial(features) } else { RingBase::split(avail) };
                if !packed {
                    guest.memory.write(ring.layout.used.unchecked_add(2), &avail.to_le_bytes()).unwrap();
                }
                ring.set_up(&client, &guest, base.bits());
                ring.enable(&client, true);
            }
            // Waits for each ring to break, but not for long: random values may also be harmless.
            for error in &errors {
                is_readable(error, 1 + round % 20);
            }
            round += 1;
            for (number, ring) in rings.iter().enumerate() {
                client.ring_base(ring.index);
                broken[number] += errors[number].read().is_ok() as u32;
                served[number] += ring.call.read().unwrap_or(0);
                client.send_body(Code::SET_VRING_ENABLE, &VringState { index: ring.index, num: 0 });
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(snapshot() == before, "memory that no descriptor let the device write has changed");
}

fn race_on_a_disk(features: VirtioFeatures) {
    let server = Server::disk(1 << 20, |_| {});
    race(&server, features, 1);
    let (client, guest) = (server.connect(), Guest::new());
    negotiate(&client, &guest, BASIC);
    let mut fresh = Ring::new(&guest, 1, SIZE, BASIC);
    fresh.set_up(&client, &guest, 0);
    fresh.enable(&client, true);
    // The previous guest wrote to the disk, too.
    fresh.read(&guest, 0, 1, 512);
    fresh.serve_one();
    assert_eq!(status(&guest, 0), 0);
}

/// Corrupts the receive, transmit and control queues. The next guest must then receive its own packet.
fn race_on_an_interface(features: VirtioFeatures) {
    let device = NetDevice::open(NetOptions::new(NetPeer::Loopback, [2, 0, 0, 0, 0, 1])).unwrap();
    let server = Server::new(Arc::new(device));
    let control = [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_MRG_RXBUF];
    race(&server, control.into_iter().fold(features, |all, feature| all | feature), 3);

    let (client, guest) = (server.connect(), Guest::new());
    negotiate(&client, &guest, BASIC);
    let [mut rx, mut tx] = [0, 1].map(|index| Ring::new(&guest, index, SIZE, BASIC));
    for ring in [&rx, &tx] {
        ring.set_up(&client, &guest, 0);
        ring.enable(&client, true);
    }
    // The last packets of the previous guest still arrive, and may have left no room.
    let frame = [0xff; 60];
    let sent = [&[0; 12][..], &frame].concat();
    let buffer = Buffer { gpa: GuestAddress(BUFFERS.start), len: sent.len() as u32 };
    guest.memory.write(buffer.gpa, &sent).unwrap();
    loop {
        tx.driver.add(&[buffer], &[], None).unwrap().unwrap();
        tx.serve_one();
        rx.driver.add(&[], &[Buffer { gpa: HIGH, len: 0x2_0000 }], None).unwrap().unwrap();
        rx.kick();
        let (_, len) = rx.completion();
        if guest.bytes(HIGH, len as usize)[12..] == frame {
            break;
        }
    }
}

#[test]
fn a_guest_rewriting_a_split_ring_under_load_breaks_only_that_ring() {
    race_on_a_disk(BASIC | VIRTIO_RING_F_INDIRECT_DESC);
}

#[test]
fn a_guest_rewriting_a_packed_ring_under_load_breaks_only_that_ring() {
    race_on_a_disk(BASIC | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_F_RING_PACKED);
}

#[test]
fn a_guest_rewriting_split_rings_of_a_network_device_breaks_only_those_rings() {
    race_on_an_interface(BASIC | VIRTIO_RING_F_INDIRECT_DESC);
}

#[test]
fn a_guest_rewriting_packed_rings_of_a_network_device_breaks_only_those_rings() {
    race_on_an_interface(BASIC | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_F_RING_PACKED);
}
