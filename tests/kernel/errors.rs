//! The errors of the kernel's vhost ioctls, and their texts (rule K2).

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use vhost_migrate::abi::vhost::*;
use vhost_migrate::abi::virtio::VIRTIO_F_VERSION_1;
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, FrontendError, KernelDevice, KernelOptions};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory};
use vhost_migrate::unstable::frontend::vhost_error;
use zerocopy::{FromZeros, IntoBytes};

use crate::modules::load;
use crate::rings::{Ring, region};
use crate::tap::Tap;

/// An address that no process can map.
const KERNEL_ADDRESS: u64 = 0xffff_8880_0000_0000;

const UNUSABLE_RING: &str = "/dev/vhost-net: VHOST_SET_VRING_ADDR: an area of the ring is not aligned (descriptors by 16 \
                             bytes, the avail ring by 2, the used ring by 4), or is outside this process's memory. Put \
                             each inside one region (rules K2.4, K2.7)";

/// A vhost-net device and nothing that checks what it is told.
struct Raw {
    file: File,
    memory: Memory,
    ring: Ring,
    tap: Tap,
}

impl Raw {
    /// A device with an owner.
    fn owned(tap: &str) -> Raw {
        let raw = Raw::new(tap);
        raw.done(VHOST_SET_OWNER, &mut []);
        raw
    }

    fn new(tap: &str) -> Raw {
        load("vhost_net");
        let file = OpenOptions::new().read(true).write(true).open("/dev/vhost-net").unwrap();
        let memory = Memory::new([region(0, 256)]).unwrap();
        let ring = Ring::new(&memory, 4, VIRTIO_F_VERSION_1);
        Raw { file, memory, ring, tap: Tap::new(tap, libc::IFF_VNET_HDR) }
    }

    fn call(&self, request: u32, argument: &mut [u8]) -> nix::Result<()> {
        // SAFETY: the arguments of these tests are whole, and what their addresses name is not freed before the file.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), request.into(), argument.as_mut_ptr()) };
        Errno::result(done).map(drop)
    }

    fn done(&self, request: u32, argument: &mut [u8]) {
        self.call(request, argument).unwrap_or_else(|errno| panic!("{request:#x}: {errno}"));
    }

    /// The error of a call, as this crate's front-end reports it.
    fn refused(&self, request: u32, argument: &mut [u8]) -> String {
        explained(request, self.call(request, argument).unwrap_err())
    }

    /// Sets features, memory and addresses of ring 0.
    fn set_up(&self, features: u64) {
        self.done(VHOST_SET_FEATURES, &mut features.to_ne_bytes());
        self.done(VHOST_SET_MEM_TABLE, &mut self.table(1));
        self.done(VHOST_SET_VRING_NUM, state(0, 64).as_mut_bytes());
        self.done(VHOST_SET_VRING_ADDR, self.addresses().as_mut_bytes());
    }

    fn table(&self, regions: u32) -> Vec<u8> {
        let mut table = VhostMemoryHeader { nregions: regions, padding: 0 }.as_bytes().to_vec();
        for number in 0..u64::from(regions) {
            let region = VhostMemoryRegion {
                guest_phys_addr: number << 20,
                memory_size: 1 << 20,
                userspace_addr: self.host(),
                flags_padding: 0,
            };
            table.extend(region.as_bytes());
        }
        table
    }

    fn host(&self) -> u64 {
        self.memory.regions()[0].host_ptr().addr() as u64
    }

    fn addresses(&self) -> VringAddr {
        let at = |gpa: GuestAddress| self.host() + gpa.0;
        VringAddr {
            desc_user_addr: at(self.ring.setup.desc),
            avail_user_addr: at(self.ring.setup.avail),
            used_user_addr: at(self.ring.setup.used),
            ..VringAddr::new_zeroed()
        }
    }

    fn backend(&self) -> VringFile {
        VringFile { index: 0, fd: self.tap.fd.as_raw_fd() }
    }
}

fn state(index: u32, num: u32) -> VringState {
    VringState { index, num }
}

fn explained(request: u32, errno: Errno) -> String {
    let error = vhost_error("/dev/vhost-net", request, errno);
    let FrontendError::Vhost { source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(source.raw_os_error(), Some(errno as i32));
    error.to_string()
}

/// Rule K2.1.
#[test]
fn a_device_without_an_owner_refuses_calls() {
    let raw = Raw::new("owner");
    raw.done(VHOST_GET_FEATURES, &mut [0; 8]);
    raw.done(VHOST_GET_BACKEND_FEATURES, &mut [0; 8]);
    for (request, name) in [
        (VHOST_SET_LOG_BASE, "VHOST_SET_LOG_BASE"),
        (VHOST_SET_MEM_TABLE, "VHOST_SET_MEM_TABLE"),
        (VHOST_SET_VRING_NUM, "VHOST_SET_VRING_NUM"),
        (VHOST_SET_VRING_ADDR, "VHOST_SET_VRING_ADDR"),
        (VHOST_NET_SET_BACKEND, "VHOST_NET_SET_BACKEND"),
    ] {
        assert_eq!(
            raw.refused(request, &mut [0; 64]),
            format!(
                "/dev/vhost-net: {name}: this process does not own the device. Make the call in the process that opened \
                 it (rule K2.1)"
            )
        );
    }
}

/// Rules K1.1 and K2.1.
#[test]
fn a_device_refuses_calls_of_another_process() {
    let raw = Raw::owned("process");
    // SAFETY: the child only makes system calls.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let errno = raw.call(VHOST_SET_VRING_NUM, &mut [0; 8]).err().map_or(0, |errno| errno as i32);
            // SAFETY: ends the child, which must not run the destructors of the test.
            unsafe { libc::_exit(errno) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, libc::EPERM));
        }
    }
}

/// Rule K2.2.
#[test]
fn a_second_owner_is_refused() {
    let raw = Raw::owned("second");
    assert_eq!(
        raw.refused(VHOST_SET_OWNER, &mut []),
        "/dev/vhost-net: VHOST_SET_OWNER: the device has an owner. Open it anew for each front-end (rule K2.2)"
    );
}

/// Rule K2.3.
#[test]
fn size_and_base_of_a_running_ring_cannot_change() {
    let raw = Raw::owned("running");
    raw.set_up(VIRTIO_F_VERSION_1.bits());
    raw.done(VHOST_NET_SET_BACKEND, raw.backend().as_mut_bytes());
    for (request, name) in
        [(VHOST_SET_VRING_NUM, "VHOST_SET_VRING_NUM"), (VHOST_SET_VRING_BASE, "VHOST_SET_VRING_BASE")]
    {
        assert_eq!(
            raw.refused(request, state(0, 32).as_mut_bytes()),
            format!("/dev/vhost-net: {name}: the ring runs. Stop it first (rule K2.3)")
        );
    }
    // These are allowed.
    raw.done(VHOST_GET_VRING_BASE, state(0, 0).as_mut_bytes());
    raw.done(VHOST_SET_VRING_ADDR, raw.addresses().as_mut_bytes());
    raw.done(VHOST_SET_FEATURES, &mut VIRTIO_F_VERSION_1.bits().to_ne_bytes());
}

/// Rule K2.4.
#[test]
fn a_bad_address_of_the_log_is_found_while_a_ring_runs() {
    let raw = Raw::owned("base");
    let logged = (VIRTIO_F_VERSION_1 | VHOST_F_LOG_ALL).bits();
    raw.done(VHOST_SET_LOG_BASE, &mut KERNEL_ADDRESS.to_ne_bytes());
    raw.set_up(logged);
    assert_eq!(
        raw.refused(VHOST_NET_SET_BACKEND, raw.backend().as_mut_bytes()),
        "/dev/vhost-net: VHOST_NET_SET_BACKEND: a ring or the dirty log is outside this process's memory. Set memory, \
         rings and log before rings start (rule K2.4)"
    );
    let log = region(0, 1);
    raw.done(VHOST_SET_LOG_BASE, &mut (log.host_ptr().addr() as u64).to_ne_bytes());
    raw.done(VHOST_NET_SET_BACKEND, raw.backend().as_mut_bytes());
    assert_eq!(
        raw.refused(VHOST_SET_LOG_BASE, &mut KERNEL_ADDRESS.to_ne_bytes()),
        "/dev/vhost-net: VHOST_SET_LOG_BASE: the log is outside this process's memory. Map it before it is set (rule K2.4)"
    );
    let mut outside = VringAddr { used_user_addr: KERNEL_ADDRESS, ..raw.addresses() };
    assert_eq!(raw.refused(VHOST_SET_VRING_ADDR, outside.as_mut_bytes()), UNUSABLE_RING);
    // Without LOG_ALL the address does not count until the feature is acknowledged.
    raw.done(VHOST_SET_FEATURES, &mut VIRTIO_F_VERSION_1.bits().to_ne_bytes());
    raw.done(VHOST_SET_LOG_BASE, &mut KERNEL_ADDRESS.to_ne_bytes());
    assert_eq!(
        raw.refused(VHOST_SET_FEATURES, &mut logged.to_ne_bytes()),
        "/dev/vhost-net: VHOST_SET_FEATURES: the dirty log does not cover guest memory, or is not mapped. Set a log first \
         (rule K1.3)"
    );
    drop(raw);
}

/// Rule K2.5.
#[test]
fn a_log_signal_that_is_no_eventfd_is_refused() {
    let raw = Raw::owned("signal");
    raw.done(VHOST_SET_LOG_FD, &mut (-1i32).to_ne_bytes());
    assert_eq!(
        raw.refused(VHOST_SET_LOG_FD, &mut 9999i32.to_ne_bytes()),
        "/dev/vhost-net: VHOST_SET_LOG_FD: the descriptor is not open. Keep it open until the call (rule K2.5)"
    );
    let mut device = KernelDevice::net(raw.tap.share(), KernelOptions::default()).unwrap();
    assert_eq!(
        device.set_log_fd(Some(raw.file.as_fd())).unwrap_err().to_string(),
        "/dev/vhost-net: VHOST_SET_LOG_FD: the descriptor is not an eventfd. Pass one (rule K2.5)"
    );
}

/// Rule K2.6.
#[test]
fn unknown_features_and_flags_are_refused() {
    let raw = Raw::owned("features");
    assert_eq!(
        raw.refused(VHOST_SET_FEATURES, &mut (1u64 << 60).to_ne_bytes()),
        "/dev/vhost-net: VHOST_SET_FEATURES: the device does not offer all of these features. Acknowledge only those of \
         features() (rule K2.6)"
    );
    let mut flags = VringAddr { flags: 2, ..raw.addresses() };
    assert_eq!(
        raw.refused(VHOST_SET_VRING_ADDR, flags.as_mut_bytes()),
        "/dev/vhost-net: VHOST_SET_VRING_ADDR: the ring's flags are unknown to this kernel (rule K2.6)"
    );
    let mut device = KernelDevice::net(raw.tap.share(), KernelOptions::default()).unwrap();
    assert_eq!(
        device.set_features(VHOST_F_LOG_ALL).unwrap_err().to_string(),
        "the device does not offer features VHOST_F_LOG_ALL: acknowledge only bits of features()"
    );
}

/// Rule K2.7.
#[test]
fn numbers_that_a_ring_cannot_have_are_refused() {
    let raw = Raw::owned("numbers");
    for size in [0, 3, 1 << 17] {
        assert_eq!(
            raw.refused(VHOST_SET_VRING_NUM, state(0, size).as_mut_bytes()),
            "/dev/vhost-net: VHOST_SET_VRING_NUM: the size is not a power of two up to 32768 (rule K2.7)"
        );
    }
    assert_eq!(
        raw.refused(VHOST_SET_VRING_BASE, state(0, 0x1_0000).as_mut_bytes()),
        "/dev/vhost-net: VHOST_SET_VRING_BASE: the base of a split ring is above 65535 (rule K2.7)"
    );
    let mut unaligned = VringAddr { flags: 1, log_guest_addr: 2, ..raw.addresses() };
    assert_eq!(raw.refused(VHOST_SET_VRING_ADDR, unaligned.as_mut_bytes()), UNUSABLE_RING);
}

/// Rule K2.8.
#[test]
fn a_memory_table_with_too_many_regions_is_refused() {
    let raw = Raw::owned("regions");
    raw.done(VHOST_SET_MEM_TABLE, &mut raw.table(64));
    assert_eq!(
        raw.refused(VHOST_SET_MEM_TABLE, &mut raw.table(65)),
        "/dev/vhost-net: VHOST_SET_MEM_TABLE: the table has more regions than the parameter max_mem_regions of the \
         module vhost. Use fewer, larger regions (rule K2.8)"
    );
    let mut device = KernelDevice::net(raw.tap.share(), KernelOptions::default()).unwrap();
    assert_eq!(device.max_mem_slots(), 64);
    let many = Memory::new((0..65).map(|number| region(number << 20, 1))).unwrap();
    assert_eq!(
        device.set_memory(&many).unwrap_err().to_string(),
        "the device does not offer 65 memory slots (64 at most): use fewer, larger regions, or raise max_mem_regions of \
         the module vhost"
    );
}

/// Rule K2.9.
#[test]
fn a_ring_that_the_device_does_not_have_is_refused() {
    let raw = Raw::owned("index");
    assert_eq!(
        raw.refused(VHOST_SET_VRING_NUM, state(2, 64).as_mut_bytes()),
        "/dev/vhost-net: VHOST_SET_VRING_NUM: the device has no ring of this index. Use a lower one (rule K2.9)"
    );
}

/// Rule K2.10.
#[test]
fn a_call_that_the_kernel_does_not_have_is_refused() {
    let raw = Raw::owned("calls");
    assert_eq!(
        raw.refused(VHOST_SET_VRING_ENDIAN, state(0, 1).as_mut_bytes()),
        "/dev/vhost-net: VHOST_SET_VRING_ENDIAN: this kernel serves rings in the host's byte order. Build it with \
         CONFIG_VHOST_CROSS_ENDIAN_LEGACY (rule K2.10)"
    );
    assert_eq!(
        raw.refused(VHOST_VSOCK_SET_RUNNING, &mut 1i32.to_ne_bytes()),
        "/dev/vhost-net: VHOST_VSOCK_SET_RUNNING: neither this kernel nor this device has it. Use a later kernel (rule \
         K2.10)"
    );
}

/// Runs `work` in a thread that is no longer root's.
fn without_privileges<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the system call, unlike the function of the C library, changes the calling thread alone.
            Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_device_that_cannot_be_opened_is_an_error_with_a_remedy() {
    load("vhost_net");
    let tap = Tap::new("open", libc::IFF_VNET_HDR);
    let error = |path: Option<PathBuf>| {
        KernelDevice::net(tap.share(), KernelOptions::default().with_path(path)).err().unwrap().to_string()
    };
    assert_eq!(
        error(Some("/dev/vhost-none".into())),
        "/dev/vhost-none: cannot open the device (is the module loaded? Run `modprobe vhost_net`)"
    );
    assert_eq!(
        without_privileges(|| error(None)),
        "/dev/vhost-net: cannot open the device (add this user to the group kvm, which systemd gives access to it, or \
         run as root)"
    );
    assert_eq!(
        KernelDevice::vdpa("/dev/vhost-vdpa-99", None, KernelOptions::default()).err().unwrap().to_string(),
        "/dev/vhost-vdpa-99: cannot open the device (does the device exist? Run `modprobe vhost_vdpa`, and bind it to \
         that driver, in /sys/bus/vdpa/drivers/vhost_vdpa)"
    );
    assert_eq!(
        error(Some("/dev/null".into())),
        "/dev/null: VHOST_SET_OWNER: neither this kernel nor this device has it. Use a later kernel (rule K2.10)"
    );
}

#[test]
fn a_descriptor_that_is_no_tap_is_an_error() {
    load("vhost_net");
    let memory = Memory::new([region(0, 256)]).unwrap();
    let null = File::open("/dev/null").unwrap();
    let mut device = KernelDevice::net(null.into(), KernelOptions::default()).unwrap();
    device.set_features(VIRTIO_F_VERSION_1).unwrap();
    device.set_memory(&memory).unwrap();
    let error = device.start_ring(0, Ring::new(&memory, 4, VIRTIO_F_VERSION_1).setup).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/dev/vhost-net: VHOST_NET_SET_BACKEND: the descriptor is neither a tap nor a packet socket. Open a tap"
    );
}

/// Rule K3.1.
#[test]
fn a_log_that_cannot_be_locked_in_memory_is_refused() {
    load("vhost_net");
    let tap = Tap::new("locked", libc::IFF_VNET_HDR);
    let mut device = KernelDevice::net(tap.share(), KernelOptions::default()).unwrap();
    device.set_memory(&Memory::new([region(0, 256)]).unwrap()).unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    setrlimit(Resource::RLIMIT_MEMLOCK, 8192, hard).unwrap();
    // A log of 8 MiB is for 256 GiB.
    let (log, fd) = Log::create(GuestAddress(256 << 30)).unwrap();
    let error = without_privileges(|| device.start_logging(&Arc::new(log), fd.as_fd()).unwrap_err().to_string());
    assert_eq!(
        error,
        "the dirty log: cannot lock its 8388608 bytes in memory, of which this process may lock 8192: raise \
         RLIMIT_MEMLOCK (ulimit -l, in KiB), or give the process CAP_IPC_LOCK (rule K3.1)"
    );
    // A log within the limit is accepted.
    let (log, fd) = Log::create(GuestAddress(256 * LOG_PAGE)).unwrap();
    without_privileges(|| device.start_logging(&Arc::new(log), fd.as_fd())).unwrap();
    setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).unwrap();
}
