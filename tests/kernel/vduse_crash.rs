//! Disks over VDUSE whose process is killed and started again: no request is lost or served twice (rule V3.5).

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::Value;

use crate::modules::load;
use crate::process::{program, text};
use crate::vduse::{Served, left_behind, load_modules, refused};
use crate::vduse_blk::{image, serve};
use crate::wait::wait_until;

const MIB: u64 = 1 << 20;
/// Size of a write of the workload, bytes.
const WRITE: usize = 16 << 10;
const FILE_WRITES: u64 = 32;
/// Mount point of the file system.
const MOUNT: &str = "/tmp/mounted";

/// A buffer that O_DIRECT accepts.
#[repr(align(4096))]
struct Aligned([u8; WRITE]);

/// Runs a program, which must succeed. Returns its output.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

/// The contents of write `number` of pass `pass` to a file.
fn fill(buffer: &mut [u8], file: u64, number: u64, pass: u64) {
    let mut word = (file << 48 | pass << 16 | number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for bytes in buffer.chunks_exact_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// Writes a file again and again, past the page cache or through it, and compares what it reads back. Returns the number of
/// passes.
fn write_and_check(file: u64, direct: bool, stop: &AtomicBool) -> u64 {
    let flags = if direct { libc::O_DIRECT } else { libc::O_DSYNC };
    let mut options = OpenOptions::new();
    let path = Path::new(MOUNT).join(format!("file{file}"));
    let opened = options.read(true).write(true).create(true).truncate(true).custom_flags(flags).open(path).unwrap();
    let (mut buffer, mut expected) = (Box::new(Aligned([0; WRITE])), vec![0; WRITE]);
    for pass in 0.. {
        if pass > 0 && stop.load(Ordering::Relaxed) {
            return pass;
        }
        for number in 0..FILE_WRITES {
            fill(&mut buffer.0, file, number, pass);
            opened.write_all_at(&buffer.0, number * WRITE as u64).unwrap();
        }
        if !direct {
            opened.sync_all().unwrap();
            let dropped = nix::fcntl::posix_fadvise(&opened, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            dropped.unwrap();
        }
        for number in 0..FILE_WRITES {
            opened.read_exact_at(&mut buffer.0, number * WRITE as u64).unwrap();
            fill(&mut expected, file, number, pass);
            assert!(buffer.0[..] == expected[..], "file {file}, write {number} of pass {pass}");
        }
    }
    0
}

/// Returns the number of requests in flight in the log of a device.
fn in_flight(name: &str) -> u64 {
    let output =
        program().args(["inspect", "--json", "vduse-log", &format!("/run/vhost-migrate/{name}")]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    found["queues"].as_array().unwrap().iter().map(|queue| queue["in_flight"].as_u64().unwrap()).sum()
}

/// Mounts a file system of `disk` and writes and checks files of it, while `kill_and_restart` is called at random moments.
/// Checks that the kernel reports no error and that the file system is clean.
fn kill_under_load(disk: &Path, kills: u32, mut kill_and_restart: impl FnMut()) {
    load("ext4");
    run("mke2fs", &["-q", "-t", "ext4", disk.to_str().unwrap()]);
    fs::create_dir_all(MOUNT).unwrap();
    run("mount", &["-t", "ext4", disk.to_str().unwrap(), MOUNT]);
    run("dmesg", &["-c"]);
    let seed = SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
    println!("seed {seed}");
    let (stop, mut random) = (AtomicBool::new(false), u64::from(seed) | 1);
    thread::scope(|scope| {
        let stop = &stop;
        let load: Vec<_> = (0..4).map(|file| scope.spawn(move || write_and_check(file, file != 3, stop))).collect();
        for _ in 0..kills {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            thread::sleep(Duration::from_micros((random >> 33) % 100_000));
            kill_and_restart();
        }
        stop.store(true, Ordering::Relaxed);
        let passes: Vec<u64> = load.into_iter().map(|load| load.join().unwrap()).collect();
        println!("passes over the files: {passes:?}");
    });
    run("umount", &[MOUNT]);
    run("e2fsck", &["-f", "-n", disk.to_str().unwrap()]);
    let messages = run("dmesg", &[]);
    assert!(!messages.to_lowercase().contains("error"), "{messages}");
}

/// Rules V3.1, V3.4 and V3.5: a mounted file system under load survives kills of the process at random moments. The kernel
/// reports no error, every byte is right, and the file system is clean.
#[rstest]
#[case::packed(&[], 50)]
#[case::split(&["--split-rings"], 25)]
fn a_mounted_file_system_survives_kills(#[case] more: &[&str], #[case] kills: u32) {
    let image = image("crash", 64 * MIB);
    let first = serve("crash", &image, more);
    let disk = first.disk();
    let (mut served, mut left) = (Some(first), 0);
    kill_under_load(&disk, kills, || {
        served.take().unwrap().kill();
        left += in_flight("crash");
        let next = serve("crash", &image, more);
        assert_eq!(next.disk(), disk);
        served = Some(next);
    });
    println!("{kills} kills with {left} requests in flight");
    assert!(left > 0, "no kill hit a request");
    served.unwrap().end();
    assert!(!Path::new("/run/vhost-migrate/crash").exists());
    run("e2fsck", &["-f", "-n", image.to_str().unwrap()]);
}

/// The storage daemon of QEMU, which also has a log. It is ended on drop.
pub(crate) struct StorageDaemon(Child);

impl StorageDaemon {
    /// Serves an image as /dev/vda.
    pub(crate) fn serve(image: &Path) -> StorageDaemon {
        load_modules();
        let daemon = StorageDaemon(StorageDaemon::start(image));
        wait_until("the disk exists", || {
            // Refused until the daemon has declared its rings.
            let _ = Command::new("vdpa").args(["dev", "add", "name", "qsd", "mgmtdev", "vduse"]).output();
            Path::new("/dev/vda").exists()
        });
        daemon
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    fn start(image: &Path) -> Child {
        let file = format!("driver=file,node-name=disk,filename={}", image.display());
        let export = "type=vduse-blk,id=export,node-name=disk,name=qsd,writable=on";
        Command::new("qemu-storage-daemon").args(["--blockdev", &file, "--export", export]).spawn().unwrap()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn kill_and_restart(&mut self, image: &Path) {
        self.kill();
        self.0 = StorageDaemon::start(image);
        // Until it serves the disk, a kill is none under load.
        thread::sleep(Duration::from_millis(500));
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = Command::new("vdpa").args(["dev", "del", "qsd"]).status();
        // At its regular end it destroys the device.
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// QEMU's storage daemon passes the same test. Unlike this project's, it continues a disk with another image.
#[test]
fn the_storage_daemon_of_qemu_survives_kills_and_takes_another_image() {
    let (image, other) = (image("qsd", 64 * MIB), image("qsd2", 64 * MIB));
    let mut daemon = StorageDaemon::serve(&image);
    let disk = Path::new("/dev/vda");
    kill_under_load(disk, 10, || daemon.kill_and_restart(&image));
    File::options().write(true).open(&other).unwrap().write_all_at(&[7; 4096], 0).unwrap();
    daemon.kill_and_restart(&other);
    let mut buffer = Box::new(Aligned([0; WRITE]));
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(disk).unwrap();
    direct.read_exact_at(&mut buffer.0, 0).unwrap();
    assert_eq!(buffer.0[0], 7);
    drop(daemon);
    assert_eq!(left_behind("qsd"), Vec::<PathBuf>::new());
}

/// Rule V3.3: a log that does not describe the device that was left behind is refused, and the device can be replaced.
#[rstest]
#[case::missing(|log: &str| fs::remove_file(log).unwrap(), "crash does not exist")]
#[case::damaged(|log: &str| File::options().write(true).open(log).unwrap().write_all_at(&[7], 100).unwrap(), "its checksum is wrong")]
#[case::empty(|log: &str| File::options().write(true).open(log).unwrap().set_len(0).unwrap(), "no log of a VDUSE device")]
fn a_device_without_its_log_is_refused(#[case] change: fn(&str), #[case] expected: &str) {
    let image = image("crash", 8 * MIB);
    let arguments = ["--attach", "virtio", "--image", image.to_str().unwrap()];
    let served = serve("crash", &image, &[]);
    fs::write(served.disk(), [3; 4096]).unwrap();
    served.kill();
    change("/run/vhost-migrate/crash");
    let error = refused("blk", "crash", &arguments);
    assert!(error.contains("left a VDUSE device of this name behind") && error.contains(expected), "{error}");
    assert!(error.contains("--replace"), "{error}");
    serve("crash", &image, &["--replace"]).end();
    assert_eq!(fs::read(&image).unwrap()[..4096], [3; 4096]);
}

/// The log of a device that does not exist any more, here of the same name, is replaced.
#[test]
fn a_stale_log_is_not_used() {
    let image = image("stale", 8 * MIB);
    let served = serve("stale", &image, &[]);
    fs::copy("/run/vhost-migrate/stale", "/tmp/stale.copy").unwrap();
    served.end();
    fs::copy("/tmp/stale.copy", "/run/vhost-migrate/stale").unwrap();
    let served = serve("stale", &image, &[]);
    fs::write(served.disk(), [4; 4096]).unwrap();
    served.kill();
    fs::copy("/tmp/stale.copy", "/run/vhost-migrate/stale").unwrap();
    let error = refused("blk", "stale", &["--image", image.to_str().unwrap()]);
    assert!(error.contains("the log is of an earlier device of this name"), "{error}");
    serve("stale", &image, &["--replace"]).end();
}

/// Rule V3.5: a device is continued only with the image and the options that it was created with. It waits for them.
#[test]
fn a_device_is_continued_only_as_it_was() {
    let (image, other) = (image("same", 8 * MIB), image("other", 8 * MIB));
    let served = serve("same", &image, &[]);
    let disk = served.disk();
    served.kill();
    let path = image.to_str().unwrap();
    let error = refused("blk", "same", &["--image", other.to_str().unwrap()]);
    assert!(error.contains("its data is not that with which it was created"), "{error}");
    for more in [&["--split-rings"][..], &["--queues", "2"], &["--queue-size", "64"], &["--read-only"]] {
        let error = refused("blk", "same", &[&["--image", path], more].concat());
        assert!(error.contains("start it with the options that it was created with"), "{error}");
    }
    let served = serve("same", &image, &[]);
    assert_eq!(served.disk(), disk);
    fs::write(&disk, [9; 4096]).unwrap();
    served.end();
    assert_eq!(fs::read(&image).unwrap()[..4096], [9; 4096]);
}

#[test]
fn a_directory_that_cannot_be_used_is_reported_and_nothing_is_left() {
    let image = image("nodir", 8 * MIB);
    let error = refused("blk", "nodir", &["--image", image.to_str().unwrap(), "--state-dir", "/proc/nothing"]);
    assert!(error.contains("/proc/nothing/nodir") && error.contains("--state-dir"), "{error}");
    assert!(left_behind("nodir").is_empty());
    let served = Served::start("blk", "nodir", &["--image", image.to_str().unwrap(), "--state-dir", "/tmp/state"]);
    assert!(Path::new("/tmp/state/nodir").exists());
    served.end();
}

/// The driver learns the size of an image that has grown meanwhile.
#[test]
fn an_image_that_has_grown_before_the_disk_is_continued() {
    let image = image("grown", 8 * MIB);
    let served = serve("grown", &image, &[]);
    let disk = served.disk();
    served.kill();
    File::options().write(true).open(&image).unwrap().set_len(24 * MIB).unwrap();
    let served = serve("grown", &image, &[]);
    let (size, sectors) = (format!("/sys/block/{}/size", disk.file_name().unwrap().display()), 24 * MIB / 512);
    wait_until("the disk has grown", || fs::read_to_string(&size).unwrap().trim() == sectors.to_string());
    OpenOptions::new().write(true).open(&disk).unwrap().write_all_at(&[8; 512], 20 * MIB).unwrap();
    served.end();
}

/// Rule V3.3: a device whose log has no inflight region any more can be replaced.
#[test]
fn a_device_whose_log_was_cut_off_is_refused_and_replaced() {
    let image = image("region", 8 * MIB);
    let served = serve("region", &image, &[]);
    fs::write(served.disk(), [3; 4096]).unwrap();
    served.kill();
    File::options().write(true).open("/run/vhost-migrate/region").unwrap().set_len(4096).unwrap();
    let error = refused("blk", "region", &["--attach", "virtio", "--image", image.to_str().unwrap()]);
    assert!(error.contains("--replace"), "{error}");
    serve("region", &image, &["--replace"]).end();
}

/// A driver of the kernel whose start was cut off, because the process that attached the device was killed, is started again.
#[test]
fn a_driver_whose_start_was_cut_off_is_started_again() {
    let image = image("cutoff", 8 * MIB);
    Served::start("blk", "cutoff", &["--image", image.to_str().unwrap()]).kill();
    let mut adding = Command::new("vdpa").args(["dev", "add", "name", "cutoff", "mgmtdev", "vduse"]).spawn().unwrap();
    // Its first message is not answered.
    wait_until("the driver starts", || fs::exists("/sys/bus/vdpa/devices/cutoff/driver").unwrap());
    adding.kill().unwrap();
    adding.wait().unwrap();
    let served = serve("cutoff", &image, &[]);
    fs::write(served.disk(), [2; 4096]).unwrap();
    served.end();
    assert_eq!(fs::read(&image).unwrap()[..4096], [2; 4096]);
}
