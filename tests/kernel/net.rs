//! vhost-net: frames between a driver and a tap, and their dirty log (rules K1, K3, K4).

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::virtio::{VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::dirty::{Log, LogQuality};
use vhost_migrate::frontend::{Device, FrontendError, KernelDevice, KernelOptions, WorkerType};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory};
use vhost_migrate::ring::RingBase;

use crate::modules::load;
use crate::rings::{Ring, changed, harvest, page, region, snapshot};
use crate::tap::{Tap, frame};
use crate::wait::is_readable;

pub(crate) const RECEIVE: u16 = 0;
pub(crate) const SEND: u16 = 1;
/// Bytes of the virtio-net header with VERSION_1.
pub(crate) const HEADER: usize = 12;
pub(crate) const FEATURES: VirtioFeatures = VIRTIO_F_VERSION_1;
/// First pages of the rings.
pub(crate) const RING_PAGES: [u64; 2] = [4, 8];
/// A page for frames.
const DATA: u64 = 100;

/// A device without rings.
pub(crate) fn open(tap: &Tap, memory: &Memory, options: KernelOptions) -> KernelDevice {
    load("vhost_net");
    let mut device = KernelDevice::net(tap.share(), options).unwrap();
    device.set_features(FEATURES).unwrap();
    device.set_memory(memory).unwrap();
    device
}

/// An interface whose rings run.
struct Net {
    tap: Tap,
    memory: Memory,
    device: KernelDevice,
    rings: [Ring; 2],
}

impl Net {
    fn new(name: &str) -> Net {
        Net::with(name, libc::IFF_VNET_HDR, KernelOptions::default())
    }

    fn with(name: &str, flags: libc::c_int, options: KernelOptions) -> Net {
        let tap = Tap::new(name, flags);
        let memory = Memory::new([region(0, 256)]).unwrap();
        let device = open(&tap, &memory, options);
        let rings = RING_PAGES.map(|page| Ring::new(&memory, page, FEATURES));
        let mut net = Net { tap, memory, device, rings };
        net.start(RECEIVE).unwrap();
        net.start(SEND).unwrap();
        net
    }

    fn start(&mut self, index: u16) -> Result<(), FrontendError> {
        self.device.start_ring(index, self.rings[usize::from(index)].setup.clone())
    }

    /// Stops a ring, which goes on at its base when it is started again.
    fn stop(&mut self, index: u16) -> RingBase {
        let base = self.device.stop_ring(index).unwrap();
        self.rings[usize::from(index)].setup.base = base;
        base
    }

    /// Sends a frame from the guest, through a buffer at `page`.
    fn send(&mut self, page: u64, payload: &[u8]) {
        let frame = [vec![0; HEADER], frame(payload)].concat();
        self.memory.write(GuestAddress(page * LOG_PAGE), &frame).unwrap();
        let ring = &mut self.rings[usize::from(SEND)];
        ring.add(page, frame.len() as u32, false);
        ring.completion();
        assert_eq!(self.tap.receive(), frame[HEADER..]);
    }

    /// Sends a frame to the guest, into a buffer at `page`.
    fn receive(&mut self, page: u64, payload: &[u8]) {
        self.rings[usize::from(RECEIVE)].add(page, LOG_PAGE as u32, true);
        self.tap.send(payload);
        self.received(page, payload);
    }

    fn received(&mut self, number: u64, payload: &[u8]) {
        let frame = frame(payload);
        let used = self.rings[usize::from(RECEIVE)].completion();
        assert_eq!(used.len as usize, HEADER + frame.len());
        assert_eq!(page(&self.memory, number)[HEADER..HEADER + frame.len()], frame);
    }

    fn start_logging(&mut self, end: u64) -> Arc<Log> {
        let (log, fd) = Log::create(GuestAddress(end)).unwrap();
        let log = Arc::new(log);
        self.device.start_logging(&log, fd.as_fd()).unwrap();
        log
    }

    fn used_page(&self, index: u16) -> u64 {
        self.rings[usize::from(index)].used_page()
    }
}

/// Bytes of this process's locked memory.
fn locked_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn frames_pass_in_both_directions() {
    let mut net = Net::new("both");
    for round in 0..200u8 {
        net.send(DATA, &[round; 900]);
        net.receive(DATA + 1, &[!round; 1400]);
    }
}

#[test]
fn a_tap_without_a_header_works_too() {
    let mut net = Net::with("plain", 0, KernelOptions::default());
    net.send(DATA, b"to the host");
    net.receive(DATA, b"to the guest");
}

#[test]
fn a_busy_ring_is_polled() {
    let mut net =
        Net::with("busy", libc::IFF_VNET_HDR, KernelOptions::default().with_busy_poll(Duration::from_micros(50)));
    net.send(DATA, b"to the host");
    net.receive(DATA, b"to the guest");
}

/// Rules K1.3, K3.1 and K4.1.
#[test]
fn the_log_has_exactly_the_pages_that_the_device_wrote() {
    let mut net = Net::new("exact");
    assert_eq!(net.device.log_quality(), Some(LogQuality::Exact));
    net.receive(DATA, b"before the log");
    let log = net.start_logging(256 * LOG_PAGE);
    assert!(locked_bytes() >= log.size(), "{}", locked_bytes());
    assert_eq!(harvest(&log), BTreeSet::new());

    let before = snapshot(&net.memory);
    net.receive(DATA + 7, &[7; 1000]);
    let found = harvest(&log);
    assert_eq!(found, BTreeSet::from([net.used_page(RECEIVE), DATA + 7]));
    assert!(found.is_superset(&BTreeSet::from([DATA + 7])) && changed(&net.memory, &before).is_superset(&found));

    // A frame in buffers of three pages.
    net.rings[0].add_buffers(&[(120, 512), (125, 100), (121, 4096)], true);
    net.tap.send(&[3; 900]);
    assert_eq!(net.rings[0].completion().len, 12 + 14 + 900);
    assert_eq!(harvest(&log), BTreeSet::from([net.used_page(RECEIVE), 120, 121, 125]));

    // What the device only reads is not dirty.
    net.send(DATA, b"to the host");
    assert_eq!(harvest(&log), BTreeSet::from([net.used_page(SEND)]));
    assert_eq!(harvest(&log), BTreeSet::new());
}

/// Rule K1.3.
#[test]
fn nothing_is_logged_after_the_end_of_logging() {
    let mut net = Net::new("end");
    let log = net.start_logging(256 * LOG_PAGE);
    net.receive(DATA, b"logged");
    assert_eq!(harvest(&log).len(), 2);
    net.device.stop_logging().unwrap();
    assert!(net.device.log().is_none());
    assert_eq!(locked_bytes(), 0);
    net.receive(DATA, b"not logged");
    net.send(DATA, b"not logged");
    assert_eq!(harvest(&log), BTreeSet::new());
    // And again.
    let log = net.start_logging(256 * LOG_PAGE);
    net.receive(DATA, b"logged again");
    assert_eq!(harvest(&log), BTreeSet::from([net.used_page(RECEIVE), DATA]));
}

/// Rules K1.3 and L9.3.
#[test]
fn a_new_log_replaces_the_former_one_and_gets_its_marks() {
    let mut net = Net::new("replace");
    let first = net.start_logging(256 * LOG_PAGE);
    net.receive(DATA, b"in both");
    let second = net.start_logging(512 * LOG_PAGE);
    let marked = BTreeSet::from([net.used_page(RECEIVE), DATA]);
    assert_eq!((harvest(&first), harvest(&second)), (marked.clone(), marked));
    net.receive(DATA + 1, b"in the second");
    assert_eq!(harvest(&first), BTreeSet::new());
    assert_eq!(harvest(&second), BTreeSet::from([net.used_page(RECEIVE), DATA + 1]));
}

/// Rule K2.5.
#[test]
fn the_log_signal_is_signalled_while_it_is_set() {
    let mut net = Net::new("signal");
    let signal = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    net.device.set_log_fd(Some(signal.as_fd())).unwrap();
    net.receive(DATA, b"not logged");
    assert!(!is_readable(&signal.as_fd(), 0u16));
    let _log = net.start_logging(256 * LOG_PAGE);
    net.receive(DATA, b"logged");
    assert!(signal.read().unwrap() > 0);
    net.device.set_log_fd(None).unwrap();
    net.receive(DATA, b"logged");
    assert!(!is_readable(&signal.as_fd(), 0u16));
}

/// Rule K1.5.
#[test]
fn a_stopped_ring_goes_on_at_its_base() {
    let mut net = Net::new("base");
    for round in 1..=5 {
        net.receive(DATA, b"one");
        net.send(DATA, b"one");
        assert_eq!(net.stop(RECEIVE), RingBase::split(round));
        assert_eq!(net.stop(SEND), RingBase::split(round));
        net.start(SEND).unwrap();
        net.start(RECEIVE).unwrap();
    }
    // What is added while the ring is stopped is served after its start, without another kick.
    let base = net.stop(RECEIVE);
    net.rings[0].add(DATA, LOG_PAGE as u32, true);
    net.tap.send(b"waits");
    let before = snapshot(&net.memory);
    assert!(!is_readable(&net.rings[0].setup.call.as_fd(), 100u16));
    assert_eq!(changed(&net.memory, &before), BTreeSet::new());
    assert_eq!(base, RingBase::split(5));
    net.start(RECEIVE).unwrap();
    net.received(DATA, b"waits");
    // Another device takes over.
    let bases = [net.stop(RECEIVE), net.stop(SEND)];
    net.device = open(&net.tap, &net.memory, KernelOptions::default());
    assert_eq!(bases, [RingBase::split(6), RingBase::split(5)]);
    net.start(RECEIVE).unwrap();
    net.start(SEND).unwrap();
    net.receive(DATA, b"after the move");
    net.send(DATA, b"after the move");
}

/// Rules K1.4 and K3.2.
#[test]
fn memory_changes_while_rings_run_and_log() {
    let mut net = Net::new("memory");
    let log = net.start_logging(256 * LOG_PAGE);
    let [first] = net.memory.regions() else { panic!("one region") };
    let grown = Memory::new([first.clone(), region(1 << 30, 16)]).unwrap();
    let error = net.device.set_memory(&grown).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the dirty log has 256 pages, and guest memory ends at 0x40010000. Call start_logging with a larger log first \
         (rule K1.4)"
    );
    // The device goes on with the memory and the log that it has.
    net.receive(DATA, b"in the small memory");
    assert_eq!(harvest(&log), BTreeSet::from([net.used_page(RECEIVE), DATA]));

    let log = net.start_logging(grown.end().0);
    net.device.set_memory(&grown).unwrap();
    net.memory = grown;
    let high = (1 << 30) / LOG_PAGE;
    net.receive(high + 5, b"in the new region");
    net.send(high + 6, b"from the new region");
    assert_eq!(harvest(&log), BTreeSet::from([net.used_page(RECEIVE), net.used_page(SEND), high + 5]));

    // The same guest memory at another address of this process: the rings move.
    let first = &net.memory.regions()[0];
    let (fd, offset) = first.shared().unwrap();
    let again =
        vhost_migrate::memory::Region::share(fd.try_clone_to_owned().unwrap(), first.gpa(), first.size(), offset);
    let moved = Memory::new([Arc::new(again.unwrap())]).unwrap();
    net.device.set_memory(&moved).unwrap();
    net.memory = moved;
    let small = net.start_logging(256 * LOG_PAGE);
    net.receive(DATA + 2, b"in the moved region");
    net.send(DATA + 2, b"from the moved region");
    assert_eq!(harvest(&small), BTreeSet::from([net.used_page(RECEIVE), net.used_page(SEND), DATA + 2]));

    // A memory without the rings is refused.
    let without = Memory::new([region(1 << 30, 16)]).unwrap();
    assert!(matches!(net.device.set_memory(&without), Err(FrontendError::LogTooSmall { .. })));
    net.device.stop_logging().unwrap();
    let error = net.device.set_memory(&without).unwrap_err();
    assert_eq!(error.to_string(), "guest-physical range 0x4000 + 0x400 is not inside guest memory");
    net.receive(DATA, b"still running");
}

#[test]
fn a_dropped_device_frees_its_memory_and_its_tap() {
    let mut net = Net::new("dropped");
    let _log = net.start_logging(256 * LOG_PAGE);
    let Net { tap, memory, device, rings } = net;
    let region = memory.regions()[0].clone();
    drop((memory, rings));
    assert!(Arc::strong_count(&region) > 1);
    drop(device);
    assert_eq!((locked_bytes(), Arc::strong_count(&region)), (0, 1));
    let memory = Memory::new([region]).unwrap();
    let device = open(&tap, &memory, KernelOptions::default());
    let rings = RING_PAGES.map(|page| Ring::new(&memory, page, FEATURES));
    let mut net = Net { tap, memory, device, rings };
    net.start(RECEIVE).unwrap();
    net.receive(DATA, b"to the next device");
}

#[test]
fn a_removed_tap_is_an_error_at_the_start_and_none_at_the_stop() {
    let mut net = Net::new("removed");
    net.tap.remove();
    net.stop(RECEIVE);
    net.stop(SEND);
    let error = net.start(SEND).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/dev/vhost-net: the tap has no interface any more. Create it again, and open another device with it"
    );
}

/// Rule K2.10.
#[test]
fn an_option_that_this_device_lacks_is_an_error_with_a_remedy() {
    load("vhost_net");
    let tap = Tap::new("options", libc::IFF_VNET_HDR);
    let options = KernelOptions::default().with_workers(2);
    assert_eq!(
        KernelDevice::net(tap.share(), options).err().unwrap().to_string(),
        "/dev/vhost-net: VHOST_NEW_WORKER: this device has one worker. Omit the option, or use vhost-scsi of Linux 6.5 \
         or later (rule K2.10)"
    );
    let error =
        KernelDevice::net(tap.share(), KernelOptions::default().with_big_endian(true)).and_then(|mut device| {
            let memory = Memory::new([region(0, 256)]).unwrap();
            device.set_memory(&memory)?;
            device.start_ring(SEND, Ring::new(&memory, RING_PAGES[1], VirtioFeatures::empty()).setup)
        });
    assert_eq!(
        error.unwrap_err().to_string(),
        "/dev/vhost-net: VHOST_SET_VRING_ENDIAN: this kernel serves rings in the host's byte order. Build it with \
         CONFIG_VHOST_CROSS_ENDIAN_LEGACY (rule K2.10)"
    );
}

/// Returns true if one of this process's tasks is a vhost worker.
fn has_worker_task() -> bool {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
    tasks.into_iter().any(|comm| fs::read_to_string(comm).is_ok_and(|name| name.starts_with("vhost-")))
}

#[test]
fn the_type_of_the_workers_can_be_chosen() {
    for (name, worker_type, is_task) in
        [("thread", WorkerType::KernelThread, false), ("task", WorkerType::OwnerTask, true)]
    {
        let options = KernelOptions::default().with_worker_type(Some(worker_type));
        let mut net = Net::with(name, libc::IFF_VNET_HDR, options);
        assert_eq!(has_worker_task(), is_task, "{worker_type:?}");
        net.send(DATA, b"to the host");
        net.receive(DATA, b"to the guest");
    }
}
