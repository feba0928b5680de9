//! The block device over VDUSE, as a disk of this host: the kernel's virtio_blk uses it through virtio_vdpa.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::signal::Signal;
use rstest::rstest;
use vhost_migrate::abi::vdpa::{VDPA_ATTR_DEV_NAME, VDPA_ATTR_MGMTDEV_DEV_NAME, VDPA_CMD_DEV_DEL, VDPA_CMD_DEV_NEW};

use crate::vduse::{Served, bus_path, driver, left_behind};
use crate::vduse_bus::bus_command;
use crate::wait::wait_until;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// Makes an image of this size.
pub(crate) fn image(name: &str, bytes: u64) -> PathBuf {
    let path = PathBuf::from(format!("/tmp/{name}.img"));
    let _ = fs::remove_file(&path);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// Serves an image, attached to virtio_vdpa.
pub(crate) fn serve(name: &str, image: &Path, more: &[&str]) -> Served {
    let arguments = ["--attach", "virtio", "--image", image.to_str().unwrap()];
    Served::start("blk", name, &[&arguments, more].concat())
}

/// The contents of block `number`, in round `round`.
fn block(number: u64, round: u64) -> Vec<u8> {
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round;
    let mut next = || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (word >> 32) as u8
    };
    (0..BLOCK).map(|_| next()).collect()
}

/// A buffer that O_DIRECT accepts.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

/// Writes all blocks of `range` past the page cache and reads them back, twice.
fn write_and_check_direct(disk: &Path, range: std::ops::Range<u64>) {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk).unwrap();
    let mut buffer = Box::new(Aligned([0; BLOCK]));
    for round in 0..2 {
        for number in range.clone() {
            buffer.0.copy_from_slice(&block(number, round));
            file.write_all_at(&buffer.0, number * BLOCK as u64).unwrap();
        }
        for number in range.clone() {
            file.read_exact_at(&mut buffer.0, number * BLOCK as u64).unwrap();
            assert!(buffer.0 == block(number, round)[..], "block {number}, round {round}");
        }
    }
}

/// Rules V1.1 to V1.4, V2.1, V2.2: what is written to the disk is in the image, with both kinds of rings, and several
/// rings.
#[rstest]
fn every_byte_reaches_the_image_and_comes_back(#[values(&[], &["--split-rings"], &["--queues", "2"])] more: &[&str]) {
    let image = image("bytes", 16 * MIB);
    let served = serve("bytes", &image, more);
    let features = fs::read_to_string(format!("{}/virtio0/features", bus_path("bytes")));
    if let Ok(features) = features {
        assert_eq!(features.as_bytes()[34] == b'1', !more.contains(&"--split-rings"), "packed rings");
    }
    let disk = served.disk();
    // Direct I/O of four threads at the same time.
    thread::scope(|scope| {
        for thread in 0..4 {
            let disk = &disk;
            scope.spawn(move || write_and_check_direct(disk, thread * 128..(thread + 1) * 128));
        }
    });
    // Through the page cache, in large requests.
    let mut file = OpenOptions::new().read(true).write(true).open(&disk).unwrap();
    let cached: Vec<u8> = (1024..2048).flat_map(|number| block(number, 7)).collect();
    file.seek(SeekFrom::Start(1024 * BLOCK as u64)).unwrap();
    file.write_all(&cached).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    let mut back = vec![0; cached.len()];
    File::open(&disk).unwrap().read_exact_at(&mut back, 1024 * BLOCK as u64).unwrap();
    assert!(back == cached);
    served.end();

    let mut bytes = Vec::new();
    File::open(&image).unwrap().read_to_end(&mut bytes).unwrap();
    for (number, found) in (0..).zip(bytes.chunks(BLOCK)) {
        match number {
            0..512 => assert!(found == block(number, 1), "block {number}"),
            1024..2048 => assert!(found == block(number, 7), "block {number}"),
            _ => assert!(found.iter().all(|byte| *byte == 0), "block {number}"),
        }
    }
}

#[test]
fn a_disk_grows_while_it_is_in_use() {
    let image = image("grows", 8 * MIB);
    let served = serve("grows", &image, &[]);
    let disk = served.disk();
    let sectors = || {
        let path = format!("/sys/block/{}/size", disk.file_name().unwrap().display());
        fs::read_to_string(path).unwrap().trim().parse::<u64>().unwrap()
    };
    assert_eq!(sectors(), 8 * MIB / 512);
    OpenOptions::new().write(true).open(&image).unwrap().set_len(24 * MIB).unwrap();
    served.signal(Signal::SIGHUP);
    wait_until("the disk has grown", || sectors() == 24 * MIB / 512);
    write_and_check_direct(&disk, 5000..5100);
    served.end();
}

/// The kernel writes its page cache while it removes the disk.
#[test]
fn sigterm_loses_no_write_and_leaves_nothing_behind() {
    let image = image("sigterm", 16 * MIB);
    let served = serve("sigterm", &image, &[]);
    let file = OpenOptions::new().write(true).open(served.disk()).unwrap();
    for number in 0..1024 {
        file.write_all_at(&block(number, 3), number * BLOCK as u64).unwrap();
    }
    drop(file);
    served.end();
    let bytes = fs::read(&image).unwrap();
    for (number, found) in (0..1024).zip(bytes.chunks(BLOCK)) {
        assert!(found == block(number, 3), "block {number}");
    }
}

/// Rule V1.6: a reset by the driver is answered, and another driver can follow.
#[test]
fn a_disk_can_be_unbound_under_load_and_bound_again() {
    let image = image("unbound", 16 * MIB);
    let served = serve("unbound", &image, &[]);
    let disk = served.disk();
    let load = thread::spawn({
        let disk = disk.clone();
        move || {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(disk).unwrap();
            let mut buffer = Box::new(Aligned([0; BLOCK]));
            (0..).take_while(|number| file.read_exact_at(&mut buffer.0, number % 4096 * BLOCK as u64).is_ok()).count()
        }
    });
    wait_until("the load has begun", || {
        let text = fs::read_to_string(format!("/sys/block/{}/stat", disk.file_name().unwrap().display())).unwrap();
        text.split_whitespace().next().unwrap().parse::<u64>().unwrap() > 100
    });
    driver("virtio_vdpa", "unbind", "unbound");
    assert!(load.join().unwrap() > 0, "it ends with an error of the disk that was removed");
    assert!(!disk.exists());
    driver("virtio_vdpa", "bind", "unbound");
    wait_until("the disk is there again", || disk.exists());
    write_and_check_direct(&disk, 0..64);
    served.end();
}

#[test]
fn a_device_that_is_not_attached_waits_for_its_driver() {
    let image = image("waits", 8 * MIB);
    let served = Served::start("blk", "waits", &["--image", image.to_str().unwrap()]);
    assert!(!served.line.contains("(/dev"), "{}", served.line);
    assert_eq!(left_behind("waits"), [PathBuf::from("/dev/vduse/waits")]);
    served.end();
}

#[test]
fn a_device_for_a_vmm_is_a_vhost_vdpa_file() {
    let image = image("vmm", 8 * MIB);
    let served = Served::start("blk", "vmm", &["--attach", "vhost", "--image", image.to_str().unwrap()]);
    assert!(served.line.contains("(/dev/vhost-vdpa-"), "{}", served.line);
    let driver = fs::read_link(Path::new(&bus_path("vmm")).join("driver")).unwrap();
    assert!(driver.ends_with("vhost_vdpa"), "{}", driver.display());
    served.end();
}

/// Someone else removes the device from the bus. It can be added again.
#[test]
fn a_device_is_detached_from_the_bus_while_it_is_served() {
    let image = image("detached", 8 * MIB);
    let served = serve("detached", &image, &[]);
    let disk = served.disk();
    write_and_check_direct(&disk, 0..16);
    bus_command(VDPA_CMD_DEV_DEL, &[(VDPA_ATTR_DEV_NAME, "detached")]);
    assert!(!disk.exists() && !Path::new(&bus_path("detached")).exists());
    let again = [(VDPA_ATTR_MGMTDEV_DEV_NAME, "vduse"), (VDPA_ATTR_DEV_NAME, "detached")];
    bus_command(VDPA_CMD_DEV_NEW, &again);
    let bound = Path::new(&bus_path("detached")).join("driver");
    if !fs::read_link(&bound).unwrap().ends_with("virtio_vdpa") {
        driver("vhost_vdpa", "unbind", "detached");
        driver("virtio_vdpa", "bind", "detached");
    }
    wait_until("the disk is there again", || disk.exists());
    write_and_check_direct(&disk, 16..32);
    bus_command(VDPA_CMD_DEV_DEL, &[(VDPA_ATTR_DEV_NAME, "detached")]);
    served.end();
}
