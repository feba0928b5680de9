//! System calls of the command for each request of a disk over VDUSE, as docs/performance.md lists them.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::vduse_blk::{image, serve};
use crate::vduse_crash::StorageDaemon;
use crate::wait::wait_until;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

/// Reads blocks past the page cache, on `threads` threads at the same time.
fn read_blocks(disk: &Path, threads: u64, each: u64) {
    thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(disk).unwrap();
                let mut buffer = Box::new(Aligned([0; BLOCK]));
                for number in 0..each {
                    file.read_exact_at(&mut buffer.0, (thread * each + number) * BLOCK as u64).unwrap();
                }
            });
        }
    });
}

/// Returns the number of each system call of a process while `load` runs.
fn calls(pid: u32, load: impl FnOnce()) -> BTreeMap<String, u64> {
    let _ = fs::remove_file("/tmp/calls");
    let mut strace = Command::new("strace");
    let mut strace =
        strace.args(["-f", "-c", "-U", "calls,name", "-o", "/tmp/calls", "-p", &pid.to_string()]).spawn().unwrap();
    wait_until("strace traces each thread", || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        threads
            .map(|thread| fs::read_to_string(thread.path().join("status")).unwrap_or_default())
            .all(|status| status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")))
    });
    load();
    kill(Pid::from_raw(strace.id() as i32), Signal::SIGINT).unwrap();
    strace.wait().unwrap();
    let text = fs::read_to_string("/tmp/calls").unwrap();
    println!("{text}");
    let pair = |line: &str| {
        let (calls, name) = line.trim().split_once(char::is_whitespace)?;
        Some((name.trim().to_owned(), calls.parse().ok()?))
    };
    text.lines().filter_map(pair).filter(|(name, _)| name != "total").collect()
}

const LOADS: [(u64, u64); 2] = [(1, 400), (16, 50)];

/// Rule V1.4: a batch of requests costs one ioctl, which notifies the driver. Data is read into the kernel's bounce buffer
/// itself: there is no other call that moves it, and none that maps memory.
#[test]
fn a_batch_of_requests_costs_one_ioctl() {
    let image = image("calls", 16 * MIB);
    let served = serve("calls", &image, &[]);
    let disk = served.disk();
    read_blocks(&disk, 1, 1);
    for (threads, each) in LOADS {
        let calls = calls(served.pid(), || read_blocks(&disk, threads, each));
        let count = |name: &str| calls.get(name).copied().unwrap_or(0);
        let requests = threads * each;
        println!("{threads} requests at a time, {requests} in all: {calls:?}");
        assert!((1..=requests).contains(&count("ioctl")), "{calls:?}");
        assert!(count("io_uring_enter") <= 2 * requests, "{calls:?}");
        for unwanted in ["mmap", "munmap", "pread64", "preadv", "process_vm_readv"] {
            assert_eq!(count(unwanted), 0, "{unwanted}: {calls:?}");
        }
    }
    served.end();
}

/// The same load on the storage daemon of QEMU, for comparison.
#[test]
fn the_calls_of_the_storage_daemon_of_qemu() {
    let daemon = StorageDaemon::serve(&image("calls2", 16 * MIB));
    for (threads, each) in LOADS {
        let calls = calls(daemon.pid(), || read_blocks(Path::new("/dev/vda"), threads, each));
        println!("{threads} requests at a time, {} in all: {calls:?}", threads * each);
        assert!(calls.contains_key("ioctl"));
    }
}
