//! This project's front-end with `qemu-storage-daemon`: rings, configuration, logging on, off and with another log, a
//! restart.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use vhost_migrate::abi::vhost_user::ProtocolFeatures;
use vhost_migrate::abi::virtio;
use vhost_migrate::abi::virtio::{SECTOR_BYTES, VIRTIO_BLK_T_IN, VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::dirty::{DirtySource, PageSet};
use vhost_migrate::frontend::{Device, FrontendError, RingSetup, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};
use vhost_migrate::memory::{Address, LOG_PAGE};
use vhost_migrate::ring::RingBase;

use crate::backend::{Backend, Kind};
use crate::disk_driver::{DATA, DiskDriver, HIGH, SIZE, harvest};
use crate::process::{DEADLINE, Lab, wait_for};

const IMAGE_BYTES: u64 = 8 << 20;

/// One disk, its back-end and a driver of ring 0.
pub(crate) struct Rig {
    _lab: Lab,
    pub(crate) backend: Backend,
    image: PathBuf,
    pub(crate) device: UserDevice,
    pub(crate) driver: DiskDriver,
    features: VirtioFeatures,
}

impl Rig {
    fn new(options: UserOptions) -> Rig {
        Rig::on(Kind::StorageDaemon { bytes_per_second: None }, options)
    }

    /// Connects to another back-end, without inflight tracking.
    pub(crate) fn on(kind: Kind, options: UserOptions) -> Rig {
        let lab = Lab::new();
        let image = lab.file("disk.img");
        File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        let backend = Backend::start(&lab, kind, "disk", &image, 2);
        let mut device = UserDevice::connect(backend.socket(), options, Instant::now() + DEADLINE).unwrap();
        let features = VIRTIO_F_VERSION_1 | virtio::VIRTIO_RING_F_EVENT_IDX;
        device.set_features(features).unwrap();
        assert!(!device.set_inflight(2, SIZE, None).unwrap(), "it has no inflight tracking");
        let driver = DiskDriver::new(features);
        device.set_memory(&driver.memory).unwrap();
        let mut rig = Rig { _lab: lab, backend, image, device, driver, features };
        rig.start(RingBase::split(0));
        rig
    }

    fn start(&mut self, base: RingBase) {
        let [desc, avail, used] = self.driver.layout.areas();
        let (kick, call) = (self.driver.kick.clone(), self.driver.call.clone());
        self.device.start_ring(0, RingSetup { size: SIZE, desc, avail, used, kick, call, error: None, base }).unwrap();
    }
}

fn all_options() -> [UserOptions; 2] {
    let usual = UserOptions::default();
    let without_acks = usual.protocol_features & !ProtocolFeatures::REPLY_ACK;
    [usual, usual.with_protocol_features(without_acks)]
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
        rig.driver.write(16, 0x5a);
        rig.driver.read(16, DATA.unchecked_add(0x4000), 0x5a);
        let base = rig.device.stop_ring(0).unwrap();
        assert_eq!(base, RingBase::split(2));
        rig.driver.submit(VIRTIO_BLK_T_IN, 16, DATA.unchecked_add(0x8000));
        rig.start(base);
        rig.driver.drain();
        assert_eq!(rig.device.stop_ring(0).unwrap(), RingBase::split(3));
        assert!(fs::read(&rig.image).unwrap()[16 * 512..][..8192].iter().all(|byte| *byte == 0x5a));
    }
}

#[test]
fn the_log_holds_what_the_device_wrote_while_it_is_on_and_nothing_else() {
    for options in all_options() {
        let mut rig = Rig::new(options);
        rig.driver.write(0, 0x11);
        let (first, first_fd) = rig.driver.new_log();
        rig.driver.read(0, DATA, 0x11);
        rig.device.start_logging(&first, first_fd.as_fd()).unwrap();
        assert_eq!(harvest(&first), [0; 0], "nothing that was written before");
        // The first buffer begins inside a page and touches three pages. The second is above 4 GiB.
        for gpa in [DATA.unchecked_add(0x4800), HIGH.unchecked_add(0x20000)] {
            let written = rig.driver.read(0, gpa, 0x11);
            assert_eq!(harvest(&first), written);
        }
        let (second, second_fd) = rig.driver.new_log();
        rig.device.start_logging(&second, second_fd.as_fd()).unwrap();
        let written = rig.driver.read(0, DATA.unchecked_add(0x8000), 0x11);
        assert_eq!(harvest(&first), [0; 0], "the old log is left alone after a switch (rule L9.1)");
        assert_eq!(harvest(&second), written);
        rig.device.stop_logging().unwrap();
        rig.driver.read(0, DATA.unchecked_add(0xc000), 0x11);
        assert_eq!(harvest(&second), [0; 0], "logging is off");
        rig.device.start_logging(&first, first_fd.as_fd()).unwrap();
        let written = rig.driver.read(0, DATA.unchecked_add(0x10000), 0x11);
        assert_eq!(harvest(&first), written, "a second migration logs again");
    }
}

#[test]
fn a_restarted_daemon_goes_on_with_rings_and_log() {
    for options in all_options() {
        let mut rig = Rig::new(options);
        rig.driver.write(0, 0x22);
        let (log, fd) = rig.driver.new_log();
        rig.device.start_logging(&log, fd.as_fd()).unwrap();
        rig.backend.kill();
        assert!(rig.device.needs_reconnect());
        assert!(rig.device.stop_ring(0).unwrap_err().is_hang_up());
        rig.backend.restart();
        rig.device.reconnect(Instant::now() + DEADLINE).unwrap();
        assert_eq!(
            harvest(&log),
            [rig.driver.layout.areas()[2].0 / LOG_PAGE],
            "what may have been written last and not logged"
        );
        let written = rig.driver.read(0, HIGH.unchecked_add(0x40000), 0x22);
        assert_eq!(harvest(&log), written);
        rig.backend.kill();
        rig.driver.submit(VIRTIO_BLK_T_IN, 0, DATA);
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
    let mut guest = Guest::new(GuestConfig::new(32 << 20).with_disk_area(2 << 20)).unwrap();
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
