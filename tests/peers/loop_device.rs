//! This project's back-end on a block device that the kernel's loop driver makes of a file.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use vhost_migrate::abi::virtio::{
    SECTOR_BYTES, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_F_VERSION_1,
};
use vhost_migrate::frontend::{Device, RingSetup, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};
use vhost_migrate::memory::Address;
use vhost_migrate::ring::RingBase;

use crate::backend::{Backend, Kind};
use crate::disk_driver::{DATA, DiskDriver, SIZE};
use crate::process::{DEADLINE, Lab, wait_for};

const BYTES: u64 = 16 << 20;

/// A loop device. It is detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn of(file: &Path) -> Loop {
        Loop::with_blocks(file, 512)
    }

    /// Creates a loop device with logical blocks of `bytes` bytes.
    fn with_blocks(file: &Path, bytes: u32) -> Loop {
        let blocks = bytes.to_string();
        let made = Command::new("losetup").args(["--find", "--show", "-b", &blocks]).arg(file).output().unwrap();
        assert!(made.status.success(), "losetup needs root: {}", String::from_utf8_lossy(&made.stderr));
        Loop(String::from_utf8(made.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_guest_works_on_a_block_device_and_its_back_end_may_be_killed() {
    for kind in [Kind::Ours, Kind::OursDirect] {
        let lab = Lab::new();
        File::create(lab.disk()).unwrap().set_len(BYTES).unwrap();
        let disk = Loop::of(&lab.disk());
        let mut backend = Backend::start(&lab, kind, "backend", &disk.0, 1);
        let mut device =
            UserDevice::connect(backend.socket(), UserOptions::default(), Instant::now() + DEADLINE).unwrap();
        assert!(device.features().contains(VIRTIO_BLK_F_DISCARD));
        let mut capacity = [0; 8];
        device.config(0, &mut capacity).unwrap();
        assert_eq!(u64::from_le_bytes(capacity), BYTES / 512);
        let config = GuestConfig::new(32 << 20).with_queues(1).with_disk_area(BYTES / 2);
        let mut guest = Guest::new(config).unwrap();
        guest.boot(vec![Box::new(device)]).unwrap();
        guest.resume().unwrap();
        for kills in 1..=3 {
            let goal = guest.stats().completions + 200;
            wait_for("the guest works", || (guest.stats().completions >= goal).then_some(()));
            backend.kill();
            backend.restart();
            wait_for("the back-end is connected again", || (guest.stats().reconnects >= kills).then_some(()));
        }
        assert!(guest.verify().unwrap().disk > 0);
        assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
        drop(guest);
        backend.terminate();
    }
}

/// Changes the file below a loop device, as another host would. The device's own page cache does not get this change.
#[test]
fn sectors_of_a_direct_disk_with_larger_blocks_come_from_the_disk_and_go_there() {
    let lab = Lab::new();
    let contents: Vec<u8> = (0..BYTES).map(|at| (at / SECTOR_BYTES % 251) as u8 + 1).collect();
    fs::write(lab.disk(), &contents).unwrap();
    let disk = Loop::with_blocks(&lab.disk(), 4096);
    let backend = Backend::start(&lab, Kind::OursDirect, "backend", &disk.0, 1);
    let mut device = UserDevice::connect(backend.socket(), UserOptions::default(), Instant::now() + DEADLINE).unwrap();
    let mut block = [0; 4];
    device.config(20, &mut block).unwrap();
    assert_eq!(u32::from_le_bytes(block), 4096);
    let features = VIRTIO_F_VERSION_1 | VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_BLK_SIZE;
    device.set_features(features).unwrap();
    device.set_inflight(1, SIZE, None).unwrap();
    let mut driver = DiskDriver::new(features);
    device.set_memory(&driver.memory).unwrap();
    let [desc, avail, used] = driver.layout.areas();
    let (kick, call) = (driver.kick.clone(), driver.call.clone());
    let setup =
        |base| RingSetup { size: SIZE, desc, avail, used, kick: kick.clone(), call: call.clone(), error: None, base };
    device.start_ring(0, setup(RingBase::split(0))).unwrap();
    let read = |driver: &mut DiskDriver, sector: u64, len: usize| {
        let mut bytes = vec![0; len];
        driver.submit_bytes(VIRTIO_BLK_T_IN, sector, DATA.unchecked_add(3), len as u32);
        driver.drain();
        driver.memory.read(DATA.unchecked_add(3), &mut bytes).unwrap();
        bytes
    };
    let below = OpenOptions::new().read(true).write(true).open(lab.disk()).unwrap();
    // The end of a block, all of the next, and the beginning of a third.
    assert!(read(&mut driver, 7, 10 * 512) == contents[7 * 512..17 * 512]);
    below.write_all_at(&[0x33; 10 * 512], 7 * 512).unwrap();
    assert!(read(&mut driver, 7, 10 * 512) == [0x33; 10 * 512], "it comes from the page cache");
    assert!(read(&mut driver, BYTES / SECTOR_BYTES - 1, 512) == contents[BYTES as usize - 512..]);
    let write = |driver: &mut DiskDriver, sector: u64, fill: u8| {
        driver.memory.write(DATA.unchecked_add(3), &[fill; 512]).unwrap();
        driver.submit_bytes(VIRTIO_BLK_T_OUT, sector, DATA.unchecked_add(3), 512);
        driver.drain();
    };
    write(&mut driver, 12, 0xaa);
    let written = [&[0x33; 4 * 512][..], &[0xaa; 512], &[0x33; 3 * 512]].concat();
    assert!(read(&mut driver, 8, 4096) == written);
    let base = device.stop_ring(0).unwrap();
    let mut found = vec![0; 4096];
    below.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == written, "it is not on the disk");

    below.write_all_at(&[0x55; 4096], 4096).unwrap();
    device.start_ring(0, setup(base)).unwrap();
    write(&mut driver, 8, 0xbb);
    assert!(read(&mut driver, 9, 7 * 512) == [0x55; 7 * 512], "a write of a sector has undone another host's");
    device.stop_ring(0).unwrap();
}
