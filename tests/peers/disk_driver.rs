//! A disk driver on one ring, for tests that act as the front-end. It submits requests of 8 KiB and computes the pages
//! that the device writes for each. Its memory has two regions, and the ring has areas in both.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use vhost_migrate::abi::virtio::{
    BlkRequestHeader, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VirtioFeatures,
};
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region};
use vhost_migrate::ring::{Buffer, DriverRing, RingLayout};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::process::DEADLINE;

pub(crate) const HIGH: GuestAddress = GuestAddress(4 << 30);
pub(crate) const REGION: u64 = 4 << 20;
pub(crate) const SIZE: u16 = 64;
/// The address of the tests' data buffer.
pub(crate) const DATA: GuestAddress = GuestAddress(0x100000);
const HEADERS: GuestAddress = GuestAddress(0x10000);
const STATUSES: GuestAddress = GuestAddress(HIGH.0 + 0x11000);
const BYTES: u64 = 8192;

pub(crate) struct DiskDriver {
    pub(crate) memory: Memory,
    pub(crate) layout: RingLayout,
    pub(crate) kick: Arc<OwnedFd>,
    pub(crate) call: Arc<OwnedFd>,
    ring: DriverRing,
    completed: u64,
}

impl DiskDriver {
    /// Creates a driver with an empty ring in memory of its own. `features` are the acknowledged features.
    pub(crate) fn new(features: VirtioFeatures) -> DiskDriver {
        let eventfd = || OwnedFd::from(EventFd::new().unwrap());
        DiskDriver::with_fds(features, eventfd(), eventfd())
    }

    /// Creates a driver as [`DiskDriver::new`] does, with existing eventfds.
    pub(crate) fn with_fds(features: VirtioFeatures, kick: OwnedFd, call: OwnedFd) -> DiskDriver {
        let memory = Memory::new([region(GuestAddress(0)), region(HIGH)]).unwrap();
        let areas = [GuestAddress(0x1000), GuestAddress(0x2000), HIGH.unchecked_add(0x3000)];
        let layout = RingLayout::new(features, SIZE, areas);
        let ring = DriverRing::new(&memory, layout, features).unwrap();
        DiskDriver { memory, layout, kick: Arc::new(kick), call: Arc::new(call), ring, completed: 0 }
    }

    /// Makes a request of 8 KiB at `sector` available, with its data at `gpa`.
    pub(crate) fn submit(&mut self, kind: u32, sector: u64, gpa: GuestAddress) -> u16 {
        self.submit_bytes(kind, sector, gpa, BYTES as u32)
    }

    /// Makes a request of `len` bytes at `sector` available, with its data at `gpa`.
    pub(crate) fn submit_bytes(&mut self, kind: u32, sector: u64, gpa: GuestAddress, len: u32) -> u16 {
        let slot = u64::from(self.ring.outstanding());
        let (header, status) = (HEADERS.unchecked_add(16 * slot), STATUSES.unchecked_add(slot));
        let head = BlkRequestHeader { request_type: U32::new(kind), ioprio: U32::ZERO, sector: U64::new(sector) };
        self.memory.write(header, head.as_bytes()).unwrap();
        self.memory.write(status, &[0xff]).unwrap();
        let (header, data) = (Buffer { gpa: header, len: 16 }, Buffer { gpa, len });
        let status = Buffer { gpa: status, len: 1 };
        let added = match kind {
            VIRTIO_BLK_T_OUT => self.ring.add(&[header, data], &[status], None),
            _ => self.ring.add(&[header], &[data, status], None),
        };
        let head = added.unwrap().unwrap();
        if self.ring.publish() {
            nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
        head
    }

    /// Waits until no request is outstanding, and asserts that all of them succeeded.
    pub(crate) fn drain(&mut self) {
        let slots = u64::from(self.ring.outstanding());
        while self.ring.outstanding() > 0 {
            if self.ring.pop_used().unwrap().is_some() {
                self.completed += 1;
                continue;
            }
            if self.ring.enable_notifications() {
                continue;
            }
            let mut ready = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(DEADLINE).unwrap();
            assert_eq!(poll(&mut ready, limit), Ok(1), "{} requests without an answer", self.ring.outstanding());
            nix::unistd::read(&self.call, &mut [0; 8]).unwrap();
        }
        for slot in 0..slots {
            let mut status = [0xff];
            self.memory.read(STATUSES.unchecked_add(slot), &mut status).unwrap();
            assert_eq!(status, [VIRTIO_BLK_S_OK]);
        }
    }

    pub(crate) fn write(&mut self, sector: u64, fill: u8) {
        self.memory.write(DATA, &[fill; BYTES as usize]).unwrap();
        self.submit(VIRTIO_BLK_T_OUT, sector, DATA);
        self.drain();
    }

    /// Reads into `gpa`. Returns the pages that the device must have marked if the ring is split.
    pub(crate) fn read(&mut self, sector: u64, gpa: GuestAddress, expected: u8) -> Vec<u64> {
        let [_, _, used] = self.layout.areas();
        let element = used.unchecked_add(4 + 8 * (self.completed % u64::from(SIZE)));
        self.submit(VIRTIO_BLK_T_IN, sector, gpa);
        self.drain();
        self.holds(gpa, expected);
        let data = gpa.0 / LOG_PAGE..=(gpa.0 + BYTES - 1) / LOG_PAGE;
        let others = [STATUSES, element, used.unchecked_add(2)].map(|at| at.0 / LOG_PAGE);
        let mut pages: Vec<u64> = data.chain(others).collect();
        pages.sort();
        pages.dedup();
        pages
    }

    /// Asserts that the last read into `gpa` returned `expected` in every byte.
    pub(crate) fn holds(&self, gpa: GuestAddress, expected: u8) {
        let mut data = [!expected; BYTES as usize];
        self.memory.read(gpa, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == expected));
    }

    /// Creates a dirty log for the driver's memory.
    pub(crate) fn new_log(&self) -> (Arc<Log>, OwnedFd) {
        let (log, fd) = Log::create(self.memory.end()).unwrap();
        (Arc::new(log), fd)
    }
}

/// Creates a region that can be shared.
pub(crate) fn region(gpa: GuestAddress) -> Arc<Region> {
    Arc::new(Region::create(gpa, REGION).unwrap())
}

/// Returns the marked pages and clears their marks.
pub(crate) fn harvest(log: &Log) -> Vec<u64> {
    let mut pages = PageSet::new(log.pages());
    log.harvest(&mut pages);
    pages.iter().map(|page| page.0).collect()
}
