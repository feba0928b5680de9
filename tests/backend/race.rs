//! A guest that rewrites descriptors, indexes and indirect tables while its requests run: only what some descriptor let
//! the device write ever changes, and the back-end is there for the next front-end.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::bit;
use vhost_migrate::abi::vhost_user::{Request as Code, VringState};
use vhost_migrate::abi::virtio::{VIRTIO_F_RING_PACKED, VIRTIO_RING_F_INDIRECT_DESC};
use vhost_migrate::ring::RingBase;

use crate::guest::{BASIC, Guest, HIGH, Ring, begin, places, status};
use crate::server::Server;

const SIZE: u16 = 64;
/// Headers that the device reads, indirect tables, and what it may write.
const HEADERS: u64 = 0x60_0000;
const TABLES: u64 = 0x70_0000;
const BUFFERS: std::ops::Range<u64> = 0x80_0000..0xa0_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The guest's hand: writes what a random number says, tame enough that it is known what may change.
struct Scribbler<'a> {
    guest: &'a Guest,
    ring: &'a Ring,
    packed: bool,
    random: u64,
    avail: u16,
}

impl Scribbler<'_> {
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// A descriptor at a place that is always of the same kind, so that one which is read while it changes is of that
    /// kind too: an indirect table, something to read, or something to write.
    fn desc(&mut self, at: u64, flags: u16, next: u16) {
        let random = self.next();
        let wild = random.is_multiple_of(61);
        let (addr, allowed) = match at / 16 % 4 {
            0 if at < HEADERS => (TABLES + random % 0x1000 * 16, !WRITE),
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
        self.guest.memory.write(at, &header).unwrap();
    }

    fn step(&mut self) {
        let random = self.next();
        let slot = random >> 8 & 0x3f;
        let (at, flags, next) = (self.ring.layout.desc + slot * 16, (random >> 16) as u16, (random >> 40) as u16);
        let marks = if random >> 60 & 1 == 0 { 1 << 7 } else { 1 << 15 };
        match random % 8 {
            0 => self.desc(at, flags & 7 | flags & 0x8080, next % (SIZE + 2)),
            1 => self.desc(TABLES + (random >> 20) % 0x1000 * 16, flags & 7, next % 8),
            2 => self.header(),
            3 if !self.packed => {
                let ahead = if random >> 50 & 0xff == 0 { next } else { next % 4 };
                self.avail = self.avail.wrapping_add(ahead);
                self.guest.memory.write(self.ring.layout.avail + 2, &self.avail.to_le_bytes()).unwrap();
            }
            4 if !self.packed => {
                let head = next % (SIZE + 1);
                self.guest.memory.write(self.ring.layout.avail + 4 + slot * 2, &head.to_le_bytes()).unwrap();
            }
            _ => {
                // A chain that makes sense as long as it stays: a header, data, a byte for the status.
                let first = slot & !3 | 1;
                let chain = [(0, NEXT), (1, NEXT | WRITE), (2, WRITE)];
                for (number, flags) in chain.into_iter().rev() {
                    let at = self.ring.layout.desc + (first + number) * 16;
                    self.desc(at, flags | if self.packed { marks } else { 0 }, (first + number) as u16 + 1);
                }
                if !self.packed {
                    let entry = self.ring.layout.avail + 4 + u64::from(self.avail % SIZE) * 2;
                    self.guest.memory.write(entry, &(first as u16).to_le_bytes()).unwrap();
                    self.avail = self.avail.wrapping_add(1);
                    self.guest.memory.write(self.ring.layout.avail + 2, &self.avail.to_le_bytes()).unwrap();
                }
            }
        }
        let _ = self.ring.kick.write(1);
    }
}

fn race(features: u64) {
    let packed = features & bit(VIRTIO_F_RING_PACKED) != 0;
    let (server, guest) = (Server::disk(1 << 20, |_| {}), Guest::new());
    guest.memory.write(HIGH, &[0xa5; 1 << 20]).unwrap();
    let client = server.connect();
    begin(&client, &guest, features);
    let ring = Ring::new(&guest, 0, SIZE, features);
    let error = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    client.done(Code::SET_VRING_ERR, &0u64, &[error.as_fd()]);
    // What the guest writes itself lies below the buffers, and so do the device's areas of the ring.
    let fixed = [(BUFFERS.end, 0x100_0000 - BUFFERS.end), (HIGH, 0x100_0000), (0x20_0000, HEADERS - 0x20_0000)];
    let snapshot = || fixed.map(|(gpa, len)| guest.bytes(gpa, len as usize));
    let before = snapshot();
    let stop = AtomicBool::new(false);
    let (mut served, mut broken, mut round) = (0, 0, 0u16);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut scribbler = Scribbler { guest: &guest, ring: &ring, packed, random: 0x9e37_79b9, avail: 0 };
            while !stop.load(Ordering::Relaxed) {
                scribbler.step();
            }
        });
        while served < 500 || broken < 50 {
            let avail = u16::from_le_bytes(guest.bytes(ring.layout.avail + 2, 2).try_into().unwrap());
            let base = if packed { RingBase::start(features) } else { RingBase::split(avail) };
            if !packed {
                guest.memory.write(ring.layout.used + 2, &avail.to_le_bytes()).unwrap();
            }
            ring.set_up(&client, &guest, base.bits());
            ring.enable(&client, true);
            // Until it breaks, or for a while; a guest may also be harmless by chance.
            let mut waiting = [PollFd::new(error.as_fd(), PollFlags::POLLIN)];
            poll(&mut waiting, 1 + round % 20).unwrap();
            round += 1;
            client.ring_base(0);
            broken += error.read().is_ok() as u32;
            served += ring.call.read().unwrap_or(0);
            client.tell(Code::SET_VRING_ENABLE, &VringState { index: 0, num: 0 });
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(snapshot() == before, "memory that no descriptor let the device write has changed");
    drop(client);

    let client = server.connect();
    begin(&client, &guest, BASIC);
    let mut fresh = Ring::new(&guest, 1, SIZE, BASIC);
    fresh.set_up(&client, &guest, 0);
    fresh.enable(&client, true);
    fresh.read(&guest, 0, 1, 512);
    fresh.kick();
    fresh.completion();
    assert_eq!(status(&guest, 0), 0);
    assert_eq!(guest.bytes(places(0).2, 512).len(), 512);
}

#[test]
fn a_guest_that_rewrites_a_split_ring_while_requests_run_gets_nothing_out_of_it() {
    race(BASIC | bit(VIRTIO_RING_F_INDIRECT_DESC));
}

#[test]
fn a_guest_that_rewrites_a_packed_ring_while_requests_run_gets_nothing_out_of_it() {
    race(BASIC | bit(VIRTIO_RING_F_INDIRECT_DESC) | bit(VIRTIO_F_RING_PACKED));
}
