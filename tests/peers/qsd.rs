//! Our front-end against `qemu-storage-daemon`: rings, configuration, the log on, off and switched, a restart.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::EventFd;
use vhost_migrate::abi::vhost_user::protocol_feature;
use vhost_migrate::abi::virtio::{
    BlkRequestHeader, SECTOR_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_F_VERSION_1,
};
use vhost_migrate::abi::{bit, virtio};
use vhost_migrate::dirty::{DirtySource, Log, PageSet};
use vhost_migrate::frontend::{Device, FrontendError, RingSetup, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};
use vhost_migrate::memory::{LOG_PAGE, Memory, Region, sealed_memfd};
use vhost_migrate::ring::{Buffer, RingBase, SplitDriver, SplitLayout};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::backend::{Backend, Kind};
use crate::process::{DEADLINE, Lab, wait_for};

const HIGH: u64 = 4 << 30;
const REGION: u64 = 4 << 20;
const RING: SplitLayout = SplitLayout { size: 64, desc: 0x1000, avail: 0x2000, used: HIGH + 0x3000 };
const HEADERS: u64 = 0x10000;
const STATUSES: u64 = HIGH + 0x11000;
const DATA: u64 = 0x100000;
const IMAGE_BYTES: u64 = 8 << 20;

/// One disk, its back-end and a driver of ring 0; ring memory is spread over two regions.
struct Rig {
    _lab: Lab,
    backend: Backend,
    image: PathBuf,
    device: UserDevice,
    memory: Memory,
    driver: SplitDriver,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    features: u64,
}

impl Rig {
    fn new(options: UserOptions) -> Rig {
        let lab = Lab::new();
        let image = lab.file("disk.img");
        File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        let kind = Kind::StorageDaemon { bytes_per_second: None };
        let backend = Backend::start(&lab, kind, "qsd", &image, 2);
        let mut device = UserDevice::connect(backend.socket(), options, Instant::now() + DEADLINE).unwrap();
        let region = |gpa| Arc::new(Region::share(sealed_memfd("guest", REGION).unwrap(), gpa, REGION, 0).unwrap());
        let memory = Memory::new([region(0), region(HIGH)]).unwrap();
        let features = bit(VIRTIO_F_VERSION_1) | bit(virtio::VIRTIO_RING_F_EVENT_IDX);
        device.set_features(features).unwrap();
        assert!(!device.set_inflight(2, RING.size, None).unwrap(), "it has no inflight tracking");
        device.set_memory(&memory).unwrap();
        let driver = SplitDriver::new(&memory, RING, features).unwrap();
        let eventfd = || Arc::new(OwnedFd::from(EventFd::new().unwrap()));
        let (kick, call) = (eventfd(), eventfd());
        let mut rig = Rig { _lab: lab, backend, image, device, memory, driver, kick, call, features };
        rig.start(RingBase::split(0));
        rig
    }

    fn start(&mut self, base: RingBase) {
        let SplitLayout { size, desc, avail, used } = RING;
        let (kick, call) = (self.kick.clone(), self.call.clone());
        self.device.start_ring(0, RingSetup { size, desc, avail, used, kick, call, error: None, base }).unwrap();
    }

    /// Makes a request of 8 KiB at `sector` available, with its data at `gpa`.
    fn submit(&mut self, kind: u32, sector: u64, gpa: u64) -> u16 {
        let slot = u64::from(self.driver.outstanding());
        let (header, status) = (HEADERS + 16 * slot, STATUSES + slot);
        let head = BlkRequestHeader { request_type: U32::new(kind), ioprio: U32::ZERO, sector: U64::new(sector) };
        self.memory.write(header, head.as_bytes()).unwrap();
        self.memory.write(status, &[0xff]).unwrap();
        let (header, data) = (Buffer { gpa: header, len: 16 }, Buffer { gpa, len: 8192 });
        let status = Buffer { gpa: status, len: 1 };
        let added = match kind {
            VIRTIO_BLK_T_OUT => self.driver.add(&[header, data], &[status], None),
            _ => self.driver.add(&[header], &[data, status], None),
        };
        let head = added.unwrap().unwrap();
        if self.driver.publish() {
            nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
        head
    }

    /// Waits until nothing is outstanding.
    fn drain(&mut self) {
        let slots = u64::from(self.driver.outstanding());
        while self.driver.outstanding() > 0 {
            if self.driver.pop_used().unwrap().is_some() || self.driver.enable_notifications() {
                continue;
            }
            let mut ready = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
            let millis = u16::try_from(DEADLINE.as_millis()).unwrap();
            assert_eq!(poll(&mut ready, millis), Ok(1), "{} requests without an answer", self.driver.outstanding());
            nix::unistd::read(&self.call, &mut [0; 8]).unwrap();
        }
        for slot in 0..slots {
            let mut status = [0xff];
            self.memory.read(STATUSES + slot, &mut status).unwrap();
            assert_eq!(status, [VIRTIO_BLK_S_OK]);
        }
    }

    fn write(&mut self, sector: u64, fill: u8) {
        self.memory.write(DATA, &[fill; 8192]).unwrap();
        self.submit(VIRTIO_BLK_T_OUT, sector, DATA);
        self.drain();
    }

    /// Reads into `gpa` and returns the pages that the device has to have marked.
    fn read(&mut self, sector: u64, gpa: u64, expected: u8) -> Vec<u64> {
        let used = self.driver.state().used;
        self.submit(VIRTIO_BLK_T_IN, sector, gpa);
        self.drain();
        let mut data = [0; 8192];
        self.memory.read(gpa, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == expected));
        let element = RING.used + 4 + 8 * u64::from(used % RING.size);
        let mut pages = [gpa, gpa + 8191, STATUSES, element, RING.used + 2].map(|at| at / LOG_PAGE).to_vec();
        pages.sort();
        pages.dedup();
        pages
    }

    fn harvest(log: &Log) -> Vec<u64> {
        let mut pages = PageSet::new(log.pages());
        log.harvest(&mut pages);
        pages.runs().flatten().collect()
    }

    fn new_log(&self) -> (Arc<Log>, OwnedFd) {
        let (log, fd) = Log::create(self.memory.end()).unwrap();
        (Arc::new(log), fd)
    }
}

fn all_options() -> [UserOptions; 2] {
    let usual = UserOptions::default();
    let without_acks = usual.protocol_features & !bit(protocol_feature::REPLY_ACK);
    [usual, UserOptions { protocol_features: without_acks, ..usual }]
}

#[test]
fn a_disk_is_driven_stopped_and_started_where_it_was() {
    for options in all_options() {
        let mut rig = Rig::new(options);
        let mut capacity = [0; 8];
        rig.device.config(0, &mut capacity).unwrap();
        assert_eq!(u64::from_le_bytes(capacity) * SECTOR_BYTES, IMAGE_BYTES);
        assert_eq!(rig.device.queues(), 2);
        assert_eq!(rig.device.acked_features(), rig.features);
        rig.write(16, 0x5a);
        rig.read(16, DATA + 0x4000, 0x5a);
        let base = rig.device.stop_ring(0).unwrap();
        assert_eq!(base, RingBase::split(2));
        rig.submit(VIRTIO_BLK_T_IN, 16, DATA + 0x8000);
        rig.start(base);
        rig.drain();
        assert_eq!(rig.device.stop_ring(0).unwrap(), RingBase::split(3));
        assert!(fs::read(&rig.image).unwrap()[16 * 512..][..8192].iter().all(|byte| *byte == 0x5a));
    }
}

#[test]
fn the_log_holds_what_the_device_wrote_while_it_is_on_and_nothing_else() {
    for options in all_options() {
        let mut rig = Rig::new(options);
        rig.write(0, 0x11);
        let (first, first_fd) = rig.new_log();
        rig.read(0, DATA, 0x11);
        rig.device.start_logging(&first, first_fd.as_fd()).unwrap();
        assert_eq!(Rig::harvest(&first), [0; 0], "nothing that was written before");
        // Starts in the middle of a page and so ends in a third one; then a buffer above 4 GiB.
        for gpa in [DATA + 0x4800, HIGH + 0x20000] {
            let mut written = rig.read(0, gpa, 0x11);
            if gpa % LOG_PAGE != 0 {
                written.insert(written.partition_point(|page| *page <= gpa / LOG_PAGE), gpa / LOG_PAGE + 1);
            }
            assert_eq!(Rig::harvest(&first), written);
        }
        let (second, second_fd) = rig.new_log();
        rig.device.start_logging(&second, second_fd.as_fd()).unwrap();
        let written = rig.read(0, DATA + 0x8000, 0x11);
        assert_eq!(Rig::harvest(&first), [0; 0], "the old log is left alone after a switch (rule L9)");
        assert_eq!(Rig::harvest(&second), written);
        rig.device.stop_logging().unwrap();
        rig.read(0, DATA + 0xc000, 0x11);
        assert_eq!(Rig::harvest(&second), [0; 0], "logging is off");
        rig.device.start_logging(&first, first_fd.as_fd()).unwrap();
        let written = rig.read(0, DATA + 0x10000, 0x11);
        assert_eq!(Rig::harvest(&first), written, "a second migration logs again");
    }
}

#[test]
fn a_restarted_daemon_goes_on_with_rings_and_log() {
    for options in all_options() {
        let mut rig = Rig::new(options);
        rig.write(0, 0x22);
        let (log, fd) = rig.new_log();
        rig.device.start_logging(&log, fd.as_fd()).unwrap();
        rig.backend.kill();
        assert!(rig.device.hung_up());
        assert!(rig.device.stop_ring(0).unwrap_err().is_hang_up());
        rig.backend.restart();
        rig.device.reconnect(Instant::now() + DEADLINE).unwrap();
        assert_eq!(Rig::harvest(&log), [RING.used / LOG_PAGE], "what may have been written last and not logged");
        let written = rig.read(0, HIGH + 0x40000, 0x22);
        assert_eq!(Rig::harvest(&log), written);
        rig.backend.kill();
        rig.submit(VIRTIO_BLK_T_IN, 0, DATA);
        rig.backend.restart();
        let error = rig.device.reconnect(Instant::now() + DEADLINE).unwrap_err();
        assert!(matches!(error, FrontendError::Unrecoverable { index: 0, outstanding: 1 }), "{error}");
    }
}

#[test]
fn the_built_in_guest_finds_every_byte_right_on_it_with_logging_on_and_off() {
    let lab = Lab::new();
    let image = lab.file("disk.img");
    File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let backend = Backend::start(&lab, Kind::StorageDaemon { bytes_per_second: None }, "qsd", &image, 2);
    let device = UserDevice::connect(backend.socket(), UserOptions::default(), Instant::now() + DEADLINE).unwrap();
    let mut guest = Guest::new(GuestConfig { disk_area: 2 << 20, ..GuestConfig::new(32 << 20) }).unwrap();
    guest.boot(vec![Box::new(device)]).unwrap();
    guest.resume().unwrap();
    let mut logs: Vec<_> = guest.logs().collect();
    for _ in 0..5 {
        let before = guest.stats().completions;
        logs.iter_mut().for_each(|log| log.start().unwrap());
        wait_for("the guest works", || {
            assert!(guest.failure().is_none(), "{}", guest.failure().unwrap());
            (guest.stats().completions > before + 200).then_some(())
        });
        let mut dirty = PageSet::new(0);
        for log in &mut logs {
            log.harvest(&mut dirty).unwrap();
        }
        assert!(!dirty.is_empty());
        logs.iter_mut().for_each(|log| log.stop().unwrap());
    }
    assert_eq!(guest.verify().unwrap().disk, 4 << 20);
}
