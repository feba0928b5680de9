//! Our back-end on a block device, as the kernel's loop driver makes one of a file.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use vhost_migrate::abi::bit;
use vhost_migrate::abi::virtio::VIRTIO_BLK_F_DISCARD;
use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};

use crate::backend::{Backend, Kind};
use crate::process::{DEADLINE, Lab, wait_for};

const BYTES: u64 = 16 << 20;

/// A loop device, until dropped.
struct Loop(PathBuf);

impl Loop {
    fn of(file: &PathBuf) -> Loop {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
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
        assert_ne!(device.features() & bit(VIRTIO_BLK_F_DISCARD), 0);
        let mut capacity = [0; 8];
        device.config(0, &mut capacity).unwrap();
        assert_eq!(u64::from_le_bytes(capacity), BYTES / 512);
        let config = GuestConfig { queues: 1, disk_area: BYTES / 2, ..GuestConfig::new(32 << 20) };
        let mut guest = Guest::new(config).unwrap();
        guest.boot(vec![Box::new(device)]).unwrap();
        guest.resume().unwrap();
        for kills in 1..=3 {
            let goal = guest.stats().completions + 200;
            wait_for("the guest works", || (guest.stats().completions >= goal).then_some(()));
            backend.kill();
            backend.restart();
            wait_for("the back-end is back", || (guest.stats().reconnects >= kills).then_some(()));
        }
        assert!(guest.verify().unwrap().disk > 0);
        assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
        drop(guest);
        backend.terminate();
    }
}
