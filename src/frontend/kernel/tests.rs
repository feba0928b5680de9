//! The devices of the kernel with a fake of their ioctls: the order of the calls, and errors that are hard to provoke.
#![allow(unsafe_code)]

use std::slice;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::handle::VhostFile;
use super::*;
use crate::abi::vhost::*;
use crate::abi::virtio::VIRTIO_F_VERSION_1;
use crate::memory::{GuestAddress, Region};

/// Guest memory of the tests, bytes.
const MEMORY: u64 = 1 << 20;

/// What the fake was told, and the errors that it is to return.
#[derive(Default)]
struct Script {
    calls: Vec<(u32, Vec<u8>)>,
    errors: Vec<(u32, Errno)>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

impl VhostFile for Fake {
    unsafe fn ioctl(&self, request: u32, argument: *mut u8) -> nix::Result<()> {
        let size = (request >> 16 & 0x3fff) as usize;
        // SAFETY: the caller's promise.
        let bytes = unsafe { slice::from_raw_parts_mut(argument, size) };
        let mut script = self.0.lock().unwrap();
        script.calls.push((request, bytes.to_vec()));
        if let Some(index) = script.errors.iter().position(|(failing, _)| *failing == request) {
            return Err(script.errors.remove(index).1);
        }
        if request == VHOST_GET_FEATURES {
            bytes.copy_from_slice((VHOST_F_LOG_ALL | VIRTIO_F_VERSION_1).bits().as_bytes());
        }
        Ok(())
    }
}

impl Fake {
    /// Lets the next call of a request fail.
    fn fail(&self, request: u32, errno: Errno) {
        self.0.lock().unwrap().errors.push((request, errno));
    }

    /// Returns the requests since the last call.
    fn requests(&self) -> Vec<u32> {
        self.calls().iter().map(|(request, _)| *request).collect()
    }

    fn calls(&self) -> Vec<(u32, Vec<u8>)> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }

    /// Returns the arguments of a request since the last call.
    fn arguments<T: FromBytes>(&self, request: u32) -> Vec<T> {
        let calls = self.calls().into_iter().filter(|(made, _)| *made == request);
        calls.map(|(_, bytes)| T::read_from_bytes(&bytes).unwrap()).collect()
    }

    /// Makes an interface whose tap is a socket, with memory.
    fn device(&self) -> Result<KernelDevice, FrontendError> {
        let tap = std::os::unix::net::UnixStream::pair().unwrap().0.into();
        let handle = VhostHandle::new(self.clone(), "/dev/vhost-net".into());
        let mut device = KernelDevice::with_handle(handle, Box::new(Net { tap }), KernelOptions::default())?;
        device.set_features(VIRTIO_F_VERSION_1)?;
        device.set_memory(&memory())?;
        Ok(device)
    }

    /// Makes an interface with a running ring.
    fn running(&self) -> KernelDevice {
        let mut device = self.device().unwrap();
        device.start_ring(0, ring()).unwrap();
        self.calls();
        device
    }
}

fn memory() -> Memory {
    Memory::new([Arc::new(Region::create(GuestAddress(0), MEMORY).unwrap())]).unwrap()
}

fn ring() -> RingSetup {
    let fd = || Arc::new(OwnedFd::from(EventFd::new().unwrap()));
    let [desc, avail, used] = [0x1000, 0x2000, 0x3000].map(GuestAddress);
    RingSetup { size: 16, desc, avail, used, kick: fd(), call: fd(), error: None, base: RingBase::split(7) }
}

fn start_logging(device: &mut KernelDevice, end: u64) -> Result<Arc<Log>, FrontendError> {
    let (log, fd) = Log::create(GuestAddress(end)).unwrap();
    let log = Arc::new(log);
    device.start_logging(&log, std::os::fd::AsFd::as_fd(&fd))?;
    Ok(log)
}

const RING: [u32; 6] = [
    VHOST_SET_VRING_NUM,
    VHOST_SET_VRING_BASE,
    VHOST_SET_VRING_ADDR,
    VHOST_SET_VRING_KICK,
    VHOST_SET_VRING_CALL,
    VHOST_SET_VRING_ERR,
];

/// Rules K1.1 and K1.2.
#[test]
fn a_ring_starts_after_owner_features_and_memory() {
    let fake = Fake::default();
    let mut device = fake.device().unwrap();
    assert_eq!(fake.requests(), [VHOST_SET_OWNER, VHOST_GET_FEATURES, VHOST_SET_FEATURES, VHOST_SET_MEM_TABLE]);
    device.start_ring(1, ring()).unwrap();
    assert_eq!(fake.requests(), [&RING[..], &[VHOST_NET_SET_BACKEND]].concat());
    device.stop_ring(1).unwrap();
    assert_eq!(fake.requests(), [VHOST_NET_SET_BACKEND, VHOST_GET_VRING_BASE]);
}

/// Rule K1.3.
#[test]
fn the_log_is_set_before_it_is_used_and_taken_away_after() {
    let fake = Fake::default();
    let mut device = fake.running();
    start_logging(&mut device, MEMORY).unwrap();
    assert_eq!(fake.requests(), [VHOST_SET_LOG_BASE, VHOST_SET_FEATURES, VHOST_SET_VRING_ADDR]);
    // A ring that starts later is logged too.
    device.start_ring(1, ring()).unwrap();
    let [address] = fake.arguments::<VringAddr>(VHOST_SET_VRING_ADDR).try_into().unwrap();
    assert_eq!((address.flags, address.log_guest_addr), (1, 0x3000));
    device.stop_logging().unwrap();
    let calls = fake.calls();
    let requests: Vec<_> = calls.iter().map(|(request, _)| *request).collect();
    assert_eq!(requests, [VHOST_SET_FEATURES, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_ADDR, VHOST_SET_LOG_BASE]);
    assert_eq!(calls[3].1, [0; 8]);
    let address = VringAddr::read_from_bytes(&calls[1].1).unwrap();
    assert_eq!(address.flags, 0);
}

#[test]
fn a_log_that_cannot_be_used_is_taken_away_again() {
    for failing in [VHOST_SET_FEATURES, VHOST_SET_VRING_ADDR] {
        let fake = Fake::default();
        let mut device = fake.running();
        fake.fail(failing, Errno::EFAULT);
        start_logging(&mut device, MEMORY).unwrap_err();
        assert!(device.log().is_none());
        let calls = fake.calls();
        let last = |request| &calls.iter().rfind(|(made, _)| *made == request).unwrap().1;
        assert_eq!(last(VHOST_SET_FEATURES), (VIRTIO_F_VERSION_1 | VHOST_NET_F_VIRTIO_NET_HDR).bits().as_bytes());
        assert_eq!(last(VHOST_SET_LOG_BASE), &[0; 8]);
        assert_eq!(VringAddr::read_from_bytes(last(VHOST_SET_VRING_ADDR)).unwrap().flags, 0);
    }
}

/// Rule L9.3.
#[test]
fn a_failed_change_of_the_log_keeps_the_former_one_with_all_marks() {
    let fake = Fake::default();
    let mut device = fake.running();
    let first = start_logging(&mut device, MEMORY).unwrap();
    let (second, fd) = Log::create(GuestAddress(MEMORY)).unwrap();
    // A ring that has the new log already marks a page in it.
    second.mark(GuestAddress(0x5000), 1);
    fake.fail(VHOST_SET_LOG_BASE, Errno::EFAULT);
    let error = device.start_logging(&Arc::new(second), std::os::fd::AsFd::as_fd(&fd)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/dev/vhost-net: VHOST_SET_LOG_BASE: the log is outside this process's memory. Map it before it is set (rule K2.4)"
    );
    assert!(first.is_marked(GuestAddress(0x5000)));
    assert!(Arc::ptr_eq(device.log().unwrap(), &first));
    let bases = fake.arguments::<u64>(VHOST_SET_LOG_BASE);
    assert_eq!((bases.len(), bases[0]), (3, bases[2]));
}

#[test]
fn a_refused_memory_table_leaves_the_former_one() {
    let fake = Fake::default();
    let mut device = fake.running();
    fake.fail(VHOST_SET_MEM_TABLE, Errno::ENOMEM);
    let error = device.set_memory(&memory()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/dev/vhost-net: VHOST_SET_MEM_TABLE: the kernel has no memory left. Free some, or raise the limits of this process"
    );
    let placed = |device: &mut KernelDevice| {
        device.start_ring(1, ring()).unwrap();
        device.stop_ring(1).unwrap();
        fake.arguments::<VringAddr>(VHOST_SET_VRING_ADDR)[0].desc_user_addr
    };
    let before = placed(&mut device);
    device.set_memory(&memory()).unwrap();
    // The running ring has moved to the new memory.
    let [moved] = fake.arguments::<VringAddr>(VHOST_SET_VRING_ADDR).try_into().unwrap();
    assert_eq!((moved.index, moved.desc_user_addr), (0, placed(&mut device)));
    assert_ne!(moved.desc_user_addr, before);
}

#[test]
fn a_ring_that_cannot_start_is_not_started() {
    for failing in [&RING[..], &[VHOST_NET_SET_BACKEND]].concat() {
        let fake = Fake::default();
        let mut device = fake.device().unwrap();
        fake.fail(failing, Errno::ENOMEM);
        device.start_ring(0, ring()).unwrap_err();
        assert!(matches!(device.stop_ring(0), Err(FrontendError::InvalidRing { .. })));
        device.start_ring(0, ring()).unwrap();
    }
}

#[test]
fn a_ring_that_could_not_be_stopped_can_be_stopped_again() {
    for failing in [VHOST_NET_SET_BACKEND, VHOST_GET_VRING_BASE] {
        let fake = Fake::default();
        let mut device = fake.running();
        fake.fail(failing, Errno::EIO);
        let error = device.stop_ring(0).unwrap_err();
        assert!(error.to_string().ends_with("the device does not reply. Is the process that implements it alive?"));
        assert_eq!(device.stop_ring(0).unwrap(), RingBase::split(0));
    }
}

#[test]
fn a_device_without_a_thread_is_an_error() {
    let fake = Fake::default();
    fake.fail(VHOST_SET_OWNER, Errno::ENOMEM);
    assert_eq!(
        fake.device().err().unwrap().to_string(),
        "/dev/vhost-net: VHOST_SET_OWNER: the kernel cannot make the device's thread. Raise the limits of processes and \
         memory"
    );
}

#[test]
fn invalid_rings_are_refused_before_any_call() {
    let fake = Fake::default();
    let mut device = fake.running();
    let mut refused = |index, change: fn(&mut RingSetup)| {
        let mut setup = ring();
        change(&mut setup);
        device.start_ring(index, setup).unwrap_err().to_string()
    };
    assert_eq!(refused(2, |_| ()), "ring 2: the device has 2 rings");
    assert_eq!(refused(1, |ring| ring.size = 3), "ring 1: it has 3 entries, a split ring has a power of two");
    assert_eq!(refused(1, |ring| ring.size = 0), "ring 1: it has 0 entries, a split ring has a power of two");
    assert_eq!(refused(0, |_| ()), "ring 0: it is already started; stop it first");
    let outside = refused(1, |ring| ring.used = GuestAddress(MEMORY - 8));
    assert_eq!(outside, "guest-physical range 0xffff8 + 0x86 is not inside guest memory");
    assert!(fake.requests().is_empty());
}

#[test]
fn a_call_with_an_address_or_with_a_short_argument_is_not_made() {
    let fake = Fake::default();
    let handle = VhostHandle::new(fake.clone(), "device".into());
    for request in [VHOST_SET_LOG_BASE, VHOST_SET_MEM_TABLE] {
        handle.set(request, 0x1000u64).unwrap_err();
    }
    handle.set(VHOST_SET_VRING_ADDR, VringAddr::new_zeroed()).unwrap_err();
    handle.set(VHOST_SET_VRING_NUM, 0u32).unwrap_err();
    assert!(fake.requests().is_empty());
}

/// Rule K1.6.
#[test]
fn a_device_that_runs_as_a_whole_runs_while_all_rings_are_started() {
    let fake = Fake::default();
    let handle = VhostHandle::new(fake.clone(), "/dev/vhost-vsock".into());
    let mut device = KernelDevice::with_handle(handle, Box::new(Vsock { cid: 3 }), KernelOptions::default()).unwrap();
    device.set_memory(&memory()).unwrap();
    device.start_ring(1, ring()).unwrap();
    assert!(fake.arguments::<i32>(VHOST_VSOCK_SET_RUNNING).is_empty());
    // One ring alone has never run.
    assert_eq!(device.stop_ring(1).unwrap(), RingBase::split(0));
    assert!(fake.arguments::<i32>(VHOST_VSOCK_SET_RUNNING).is_empty());
    device.start_ring(0, ring()).unwrap();
    device.start_ring(1, ring()).unwrap();
    assert_eq!(fake.arguments::<i32>(VHOST_VSOCK_SET_RUNNING), [1]);
    device.stop_ring(0).unwrap();
    assert_eq!(fake.arguments::<i32>(VHOST_VSOCK_SET_RUNNING), [0]);
    device.start_ring(0, ring()).unwrap();
    assert_eq!(fake.arguments::<i32>(VHOST_VSOCK_SET_RUNNING), [1]);
    device.stop_ring(1).unwrap();
    device.stop_ring(0).unwrap();
    assert_eq!(fake.arguments::<i32>(VHOST_VSOCK_SET_RUNNING), [0]);
    let mut cid = [0; 8];
    device.config(0, &mut cid).unwrap();
    assert_eq!(cid, 3u64.to_le_bytes());
    assert!(device.config(1, &mut cid).is_err());
}
