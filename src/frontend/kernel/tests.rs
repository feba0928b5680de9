//! The devices of the kernel with a fake of their ioctls: the order of the calls, and errors that are hard to provoke.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::slice;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::handle::VhostFile;
use super::*;
use crate::abi::vhost::*;
use crate::abi::virtio::VIRTIO_F_VERSION_1;
use crate::memory::{GuestAddress, Region, UserAddress};

/// Guest memory of the tests, bytes.
const MEMORY: u64 = 1 << 20;

/// The calls that the fake has had, and the errors that it is to return.
#[derive(Default)]
struct Script {
    calls: Vec<(u32, Vec<u8>)>,
    errors: Vec<(u32, Errno)>,
    /// Version, kind, address and size of each message.
    messages: Vec<(u32, u8, u64, u64)>,
    refused_message: Option<(u8, Errno)>,
    vdpa: FakeVdpa,
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
            bytes.copy_from_slice((VHOST_F_LOG_ALL | VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM).bits().as_bytes());
        }
        script.vdpa.ioctl(request, bytes);
        Ok(())
    }

    unsafe fn write(&self, message: &[u8]) -> nix::Result<()> {
        let mut script = self.0.lock().unwrap();
        // Both versions have the message at the same place.
        let iotlb = IotlbMsg::read_from_bytes(&message[8..40]).unwrap();
        let version = u32::from_ne_bytes(message[..4].try_into().unwrap());
        script.messages.push((version, iotlb.kind, iotlb.iova, iotlb.size));
        match script.refused_message.take_if(|(kind, _)| *kind == iotlb.kind) {
            Some((_, errno)) => Err(errno),
            None => Ok(()),
        }
    }
}

/// The state of a vDPA device.
#[derive(Default)]
struct FakeVdpa {
    status: u8,
    backend_features: u64,
    /// Status bits that the device never sets.
    refused_status: u8,
    /// The positions that the next questions for them get.
    bases: VecDeque<u32>,
}

impl FakeVdpa {
    fn ioctl(&mut self, request: u32, bytes: &mut [u8]) {
        let mut answer = |answer: &[u8]| bytes.copy_from_slice(answer);
        match request {
            VHOST_GET_BACKEND_FEATURES => answer(self.backend_features.as_bytes()),
            VHOST_VDPA_GET_DEVICE_ID => answer(2u32.as_bytes()),
            VHOST_VDPA_GET_VQS_COUNT => answer(4u32.as_bytes()),
            VHOST_VDPA_GET_VRING_NUM => answer(256u16.as_bytes()),
            VHOST_VDPA_GET_CONFIG_SIZE => answer(60u32.as_bytes()),
            VHOST_VDPA_GET_IOVA_RANGE => answer(VdpaIovaRange { first: 0, last: (1 << 40) - 1 }.as_bytes()),
            VHOST_VDPA_GET_STATUS => answer(&[self.status]),
            VHOST_VDPA_SET_STATUS => self.status = bytes[0] & !self.refused_status,
            VHOST_GET_VRING_BASE => {
                let base = self.bases.pop_front();
                base.into_iter().for_each(|base| bytes[4..].copy_from_slice(base.as_bytes()));
            }
            _ => {}
        }
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

const V2: u64 = 1 << VHOST_BACKEND_F_IOTLB_MSG_V2;
const BATCH: u64 = 1 << VHOST_BACKEND_F_IOTLB_BATCH;
const SUSPEND: u64 = 1 << VHOST_BACKEND_F_SUSPEND;
const PERSIST: u64 = 1 << VHOST_BACKEND_F_IOTLB_PERSIST;

impl Fake {
    /// Makes a vDPA device whose driver uses one ring, with memory.
    fn vdpa(&self, backend_features: u64) -> KernelDevice {
        self.0.lock().unwrap().vdpa.backend_features = backend_features;
        let handle = VhostHandle::new(self.clone(), "/dev/vhost-vdpa-0".into());
        let mut device =
            KernelDevice::with_handle(handle, Box::new(Vdpa::new(Some(1))), KernelOptions::default()).unwrap();
        device.set_features(VIRTIO_F_VERSION_1).unwrap();
        device.set_memory(&memory()).unwrap();
        device
    }

    /// Returns the kinds of messages since the last call.
    fn messages(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap().messages).into_iter().map(|(_, kind, ..)| kind).collect()
    }

    fn bases(&self, bases: impl IntoIterator<Item = u32>) {
        self.0.lock().unwrap().vdpa.bases = bases.into_iter().collect();
    }
}

fn set_used_index(device: &KernelDevice, index: u16) {
    device.memory.write(GuestAddress(0x3002), &index.to_le_bytes()).unwrap();
}

/// Rules K5.1 and K5.2.
#[test]
fn a_vdpa_device_starts_with_a_status_handshake() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2 | BATCH);
    assert_eq!((device.device_id(), device.queues(), device.max_mem_slots()), (2, 1, usize::MAX));
    let script = |fake: &Fake| std::mem::take(&mut fake.0.lock().unwrap().messages);
    assert_eq!(
        script(&fake),
        [(2, VHOST_IOTLB_BATCH_BEGIN, 0, 0), (2, VHOST_IOTLB_UPDATE, 0, MEMORY), (2, VHOST_IOTLB_BATCH_END, 0, 0)]
    );
    fake.calls();
    device.start_ring(0, ring()).unwrap();
    let status = |status: u8| (VHOST_VDPA_SET_STATUS, vec![status]);
    let calls = fake.calls();
    let handshake: Vec<_> = calls.iter().filter(|(request, _)| *request == VHOST_VDPA_SET_STATUS).cloned().collect();
    assert_eq!(handshake, [status(3), status(11), status(15)]);
    let requests: Vec<u32> = calls.iter().map(|(request, _)| *request).collect();
    let (get, set) = (VHOST_VDPA_GET_STATUS, VHOST_VDPA_SET_STATUS);
    let start = [&[set, VHOST_SET_FEATURES, set, get][..], &RING, &[VHOST_VDPA_SET_VRING_ENABLE, set, get]].concat();
    // The ring is set twice: once to check it, and once with the status DRIVER.
    assert_eq!(requests, [&RING[..], &start].concat());
    let features = (VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM).bits();
    assert!(calls.contains(&(VHOST_SET_FEATURES, features.as_bytes().to_vec())));
    let address = calls.iter().find(|(request, _)| *request == VHOST_SET_VRING_ADDR).unwrap();
    let address = VringAddr::read_from_bytes(&address.1).unwrap();
    assert_eq!([address.desc_user_addr, address.avail_user_addr, address.used_user_addr], [0x1000, 0x2000, 0x3000]);
    assert_eq!(device.status().unwrap(), Some(15));
}

/// Rule K5.5.
#[test]
fn a_vdpa_device_is_suspended_before_its_position_is_read() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2 | SUSPEND);
    device.start_ring(0, ring()).unwrap();
    fake.calls();
    fake.bases([42]);
    assert_eq!(device.stop_ring(0).unwrap(), RingBase::split(42));
    assert_eq!(fake.requests(), [VHOST_VDPA_SUSPEND, VHOST_GET_VRING_BASE, VHOST_VDPA_SET_STATUS]);
    assert_eq!(device.status().unwrap(), Some(0));
}

/// Rule K5.5.
#[test]
fn a_vdpa_device_without_suspend_completes_what_it_has_taken() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2);
    device.start_ring(0, ring()).unwrap();
    fake.calls();
    set_used_index(&device, 9);
    // Two requests in flight, then one, then none.
    fake.bases([11, 10, 9]);
    assert_eq!(device.stop_ring(0).unwrap(), RingBase::split(9));
    let base = VHOST_GET_VRING_BASE;
    assert_eq!(fake.requests(), [VHOST_SET_VRING_KICK, base, base, base, VHOST_VDPA_SET_STATUS]);
}

#[test]
fn a_vdpa_device_that_cannot_be_stopped_goes_on() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2);
    let setup = ring();
    device.start_ring(0, setup.clone()).unwrap();
    fake.calls();
    fake.fail(VHOST_GET_VRING_BASE, Errno::EIO);
    let error = device.stop_ring(0).unwrap_err();
    assert!(error.to_string().ends_with("Is the process that implements it alive?"), "{error}");
    let kicks: Vec<i32> = fake.arguments::<VringFile>(VHOST_SET_VRING_KICK).iter().map(|file| file.fd).collect();
    assert_eq!(kicks, [VHOST_FILE_UNBIND, std::os::fd::AsRawFd::as_raw_fd(&setup.kick)]);
    assert_eq!(device.stop_ring(0).unwrap(), RingBase::split(0));
}

/// Rule K5.6.
#[test]
fn a_reset_vdpa_device_gets_its_memory_again_unless_mappings_persist() {
    let (map, unmap) = (VHOST_IOTLB_UPDATE, VHOST_IOTLB_INVALIDATE);
    for (features, expected) in [(V2, &[map, unmap, map][..]), (V2 | PERSIST, &[map])] {
        let fake = Fake::default();
        let mut device = fake.vdpa(features);
        for _ in 0..2 {
            device.start_ring(0, ring()).unwrap();
            device.stop_ring(0).unwrap();
        }
        let messages = fake.messages();
        assert_eq!(messages[..expected.len()], *expected, "{features:#x}");
    }
}

/// Rule K5.2.
#[test]
fn memory_of_a_running_vdpa_device_changes_by_regions() {
    let fake = Fake::default();
    let mut device = fake.vdpa(0);
    device.start_ring(0, ring()).unwrap();
    let region = |gpa| Arc::new(Region::create(GuestAddress(gpa), MEMORY).unwrap());
    let kept = device.memory.regions()[0].clone();
    device.set_memory(&Memory::new([kept.clone(), region(1 << 30)]).unwrap()).unwrap();
    fake.messages();
    fake.calls();
    device.set_memory(&Memory::new([kept.clone(), region(2 << 30)]).unwrap()).unwrap();
    let messages = std::mem::take(&mut fake.0.lock().unwrap().messages);
    // Without V2 the messages are those of version 1.
    let expected = [(1, VHOST_IOTLB_INVALIDATE, 1 << 30, MEMORY), (1, VHOST_IOTLB_UPDATE, 2 << 30, MEMORY)];
    assert_eq!(messages, expected);
    assert!(fake.requests().is_empty());
    // A refused region: the former memory is mapped again.
    fake.0.lock().unwrap().refused_message = Some((VHOST_IOTLB_UPDATE, Errno::ENOMEM));
    let error = device.set_memory(&Memory::new([kept, region(3 << 30)]).unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/dev/vhost-vdpa-0: VHOST_IOTLB_UPDATE: guest memory cannot be locked. Raise RLIMIT_MEMLOCK (ulimit -l, in KiB) \
         to its size (rule K5.4)"
    );
    let (map, unmap) = (VHOST_IOTLB_UPDATE, VHOST_IOTLB_INVALIDATE);
    assert_eq!(fake.messages(), [unmap, map, map]);
    assert_eq!(device.memory.end().0, (2 << 30) + MEMORY);
}

/// Rules K5.3 and K5.4.
#[test]
fn memory_that_a_vdpa_device_cannot_access_is_refused() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2);
    fake.messages();
    let high = Memory::new([Arc::new(Region::create(GuestAddress(1 << 40), MEMORY).unwrap())]).unwrap();
    assert_eq!(
        device.set_memory(&high).unwrap_err().to_string(),
        "the device does not offer the addresses 0x10000000000 to 0x10000100000 (it has 0x0 to 0xffffffffff): place \
         guest memory at addresses that the device can access"
    );
    let file = nix::sys::memfd::memfd_create("memory", nix::sys::memfd::MFdFlags::empty()).unwrap();
    nix::unistd::ftruncate(&file, MEMORY as i64).unwrap();
    let region = Region::map(std::os::fd::AsFd::as_fd(&file), GuestAddress(0), MEMORY, UserAddress(0), 0).unwrap();
    let error = device.set_memory(&Memory::new([Arc::new(region)]).unwrap()).unwrap_err();
    assert!(matches!(error, FrontendError::NotShared { gpa: GuestAddress(0) }), "{error}");
    assert!(fake.messages().is_empty());
}

/// Rule K5.1.
#[test]
fn a_vdpa_device_that_does_not_start_is_reset() {
    for (refused, message) in [
        (8, "the device does not offer this set of features: acknowledge other bits of features()"),
        (
            4,
            "/dev/vhost-vdpa-0: the device did not start, its status is 0xb. Its log, or that of the process that \
             implements it, may have the reason (rule K5.1)",
        ),
    ] {
        let fake = Fake::default();
        let mut device = fake.vdpa(V2);
        fake.0.lock().unwrap().vdpa.refused_status = refused;
        assert_eq!(device.start_ring(0, ring()).unwrap_err().to_string(), message);
        assert_eq!(device.status().unwrap(), Some(0));
        fake.0.lock().unwrap().vdpa.refused_status = 0;
        device.start_ring(0, ring()).unwrap();
    }
}

#[test]
fn calls_that_a_vdpa_device_lacks_are_refused() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2);
    let large = RingSetup { size: 512, ..ring() };
    assert_eq!(
        device.start_ring(0, large).unwrap_err().to_string(),
        "ring 0: it has 512 entries, the device allows 256"
    );
    let beyond = device.config(56, &mut [0; 8]).unwrap_err();
    assert_eq!(
        beyond.to_string(),
        "the device does not offer 8 bytes of configuration at 56 (it has 60): access the fields that its features stand \
         for"
    );
    device.config(52, &mut [0; 8]).unwrap();
    assert!(device.set_config(60, &[0]).is_err());
    fake.calls();
    device.set_config(58, &[1, 2]).unwrap();
    let written = fake.arguments::<VdpaConfigHeader>(VHOST_VDPA_SET_CONFIG);
    assert_eq!(written.iter().map(|header| (header.off, header.len)).collect::<Vec<_>>(), [(58, 2)]);
    // Rule K4.4.
    assert_eq!(device.log_quality(), None);
    assert_eq!(
        start_logging(&mut device, MEMORY).unwrap_err().to_string(),
        "the device does not offer a complete dirty log: vhost-vdpa has no log (rule K4.4); wrap it in \
         shadow::ShadowDevice"
    );
    let handle = VhostHandle::new(fake.clone(), "/dev/vhost-vdpa-0".into());
    let many = KernelDevice::with_handle(handle, Box::new(Vdpa::new(Some(5))), KernelOptions::default());
    assert_eq!(
        many.err().unwrap().to_string(),
        "the device does not offer 5 rings (4 at most): let the driver use fewer, but one at least"
    );
}

#[test]
fn a_changed_configuration_is_an_event() {
    let fake = Fake::default();
    let mut device = fake.vdpa(V2);
    assert_eq!(device.take_events(), []);
    let events = device.events_fd().unwrap().unwrap();
    nix::unistd::write(&events, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(device.take_events(), [DeviceEvent::ConfigChanged]);
    assert_eq!(device.take_events(), []);
}
