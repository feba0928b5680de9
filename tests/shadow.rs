//! Shadow rings: a device without a dirty log is migrated, its requests come back when a ring stops, and its driver
//! cannot reach the shadow rings.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/guest_work.rs"]
mod guest_work;
#[path = "kit/served.rs"]
mod served;
#[path = "kit/wait.rs"]
mod wait;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use guest_work::{PATIENCE, assert_works, run_for, wait_until};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rstest::rstest;
use served::Served;
use vhost_migrate::abi::vhost_user::ProtocolFeatures;
use vhost_migrate::abi::virtio::{
    VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use vhost_migrate::backend::blk::{BlkDevice, BlkOptions};
use vhost_migrate::backend::{Queue, RING_FEATURES, Request, VirtioDevice};
use vhost_migrate::dirty::{Log, LogQuality, PageSet};
use vhost_migrate::frontend::{Device, FrontendError, RingSetup, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig, GuestIncomingVm, GuestSourceVm};
use vhost_migrate::memory::{Address, GuestAddress, Memory, Region};
use vhost_migrate::migrate::{
    ConvergencePolicy, MigrationParameters, Outcomes, SWITCHOVER_TIMEOUT, SourceVm, migrate, receive,
};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase, RingLayout};
use vhost_migrate::shadow::ShadowDevice;
use vhost_migrate::stream::{StreamListener, StreamOptions, connect};

const MIB: u64 = 1 << 20;
/// Addresses of the driver's ring.
const AREAS: [GuestAddress; 3] = [GuestAddress(0x1000), GuestAddress(0x8000), GuestAddress(0x9000)];

/// Connects to the back-end at `socket` without a dirty log and an inflight region.
fn unlogged(socket: &Path) -> UserDevice {
    let lacks = ProtocolFeatures::LOG_SHMFD | ProtocolFeatures::INFLIGHT_SHMFD;
    let usual = UserOptions::default();
    let options = usual.with_protocol_features(usual.protocol_features & !lacks);
    UserDevice::connect(socket, options, Instant::now() + PATIENCE).unwrap()
}

fn shadowed(socket: &Path) -> ShadowDevice {
    ShadowDevice::new(Box::new(unlogged(socket)))
}

fn disk(folder: &Path, socket: &str) -> Served {
    let image = folder.join("disk.img");
    File::options().create(true).truncate(false).write(true).open(&image).unwrap().set_len(16 * MIB).unwrap();
    let options = BlkOptions::new(image).with_queues(2).with_share_rw(true);
    Served::new(&folder.join(socket), Arc::new(BlkDevice::open(options).unwrap()))
}

#[rstest]
fn a_guest_migrates_from_a_back_end_without_a_log(#[values(false, true)] packed: bool) {
    let folder = tempfile::tempdir().unwrap();
    let (source, _destination) = (disk(folder.path(), "a"), disk(folder.path(), "b"));
    let (log, fd) = Log::create(GuestAddress(MIB)).unwrap();
    let refused = unlogged(&folder.path().join("a")).start_logging(&Arc::new(log), fd.as_fd()).unwrap_err();
    assert!(refused.to_string().contains("LOG_SHMFD"), "{refused}");

    let config = GuestConfig::new(32 * MIB)
        .with_working_set(2 * MIB)
        .with_cold(2 * MIB)
        .with_dirty_rate(32 * MIB)
        .with_disk_area(4 * MIB)
        .with_packed(packed);
    let mut guest = Guest::new(config).unwrap();
    guest.boot(vec![Box::new(shadowed(&folder.path().join("a")))]).unwrap();
    guest.resume().unwrap();
    run_for(&guest, 200);

    let mut arrival = GuestIncomingVm::new(vec![folder.path().join("b")]).unwrap();
    let listener =
        StreamListener::bind(&format!("unix:{}", folder.path().join("m").display()).parse().unwrap()).unwrap();
    let options = StreamOptions::new().unwrap().with_deadline(Some(PATIENCE)).with_timeout(Some(PATIENCE));
    let guest = Mutex::new(Some(guest));
    std::thread::scope(|scope| {
        let arrived = scope.spawn(|| {
            let connection = listener.accept(&options).unwrap();
            receive(&mut arrival, connection, &Outcomes::default(), SWITCHOVER_TIMEOUT)
        });
        let connection = connect(listener.uri(), &options).unwrap();
        let policy = ConvergencePolicy::new(PATIENCE, 100);
        // Compares every page of both sides before the guest runs at the destination.
        let parameters = MigrationParameters::default().with_policy(policy).with_verify(true);
        let mut machine = GuestSourceVm::new(&guest).unwrap();
        let report = migrate(&mut machine, connection, &parameters, &mut |_| {}).unwrap();
        assert!(report.rounds > 1, "it was paused from the beginning");
        arrived.join().unwrap().unwrap();
        machine.release();
    });
    drop(source);
    let mut arrived = arrival.into_guest().unwrap();
    assert_works(&mut arrived);
    assert_eq!((arrived.stats().lost, arrived.stats().duplicates), (0, 0));
}

/// Guest memory and a driver's ring 0 on a device.
struct Rig {
    device: ShadowDevice,
    memory: Memory,
    driver: DriverRing,
    setup: RingSetup,
    features: VirtioFeatures,
}

fn eventfd() -> Arc<OwnedFd> {
    Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap().into())
}

impl Rig {
    fn start(socket: &Path, size: u16, features: VirtioFeatures) -> Rig {
        let mut device = shadowed(socket);
        device.set_features(features).unwrap();
        let memory = Memory::new([Arc::new(Region::create(GuestAddress(0), MIB).unwrap())]).unwrap();
        device.set_memory(&memory).unwrap();
        let [desc, avail, used] = AREAS;
        let driver = DriverRing::new(&memory, RingLayout::new(features, size, AREAS), features).unwrap();
        let base = RingBase::initial(features);
        let setup = RingSetup { size, desc, avail, used, kick: eventfd(), call: eventfd(), error: None, base };
        device.start_ring(0, setup.clone()).unwrap();
        Rig { device, memory, driver, setup, features }
    }

    fn kick(&mut self) {
        let _ = self.driver.publish();
        nix::unistd::write(&self.setup.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Waits for the next used buffer and returns its length.
    fn used(&mut self) -> u32 {
        let mut found = None;
        wait_until("a buffer is used", || {
            found = self.driver.pop_used().unwrap();
            found.is_some()
        });
        found.unwrap().len
    }

    /// Reads `sector` of a disk to 0x20000, with the status at 0x30000.
    fn read(&mut self, sector: u64, table: Option<GuestAddress>) -> u32 {
        let header: Vec<u8> = [&[0; 8][..], &sector.to_le_bytes()].concat();
        self.memory.write(GuestAddress(0x10000), &header).unwrap();
        self.memory.write(GuestAddress(0x30000), &[0xff]).unwrap();
        // The data is in pieces of 64 bytes.
        let data = (0..8).map(|piece| Buffer { gpa: GuestAddress(0x20000 + piece * 64), len: 64 });
        let writable: Vec<_> = data.chain([Buffer { gpa: GuestAddress(0x30000), len: 1 }]).collect();
        self.driver.add(&[Buffer { gpa: GuestAddress(0x10000), len: 16 }], &writable, table).unwrap().unwrap();
        self.kick();
        self.used()
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.memory.read(GuestAddress(0x30000), &mut status).unwrap();
        status[0]
    }
}

#[rstest]
fn the_log_has_the_written_pages_and_those_of_the_used_ring(#[values(false, true)] packed: bool) {
    let folder = tempfile::tempdir().unwrap();
    let _disk = disk(folder.path(), "a");
    let kind = if packed { VIRTIO_F_RING_PACKED } else { VirtioFeatures::empty() };
    let mut rig = Rig::start(&folder.path().join("a"), 16, VIRTIO_F_VERSION_1 | kind);
    let (log, fd) = Log::create(rig.memory.end()).unwrap();
    let log = Arc::new(log);
    assert_eq!(rig.device.log_quality(), Some(LogQuality::Shadowed));
    rig.device.start_logging(&log, fd.as_fd()).unwrap();
    assert_eq!(rig.read(3, None), 513);
    assert_eq!(rig.status(), 0);
    let mut pages = PageSet::default();
    log.harvest(&mut pages);
    let found: Vec<u64> = pages.iter().map(|page| page.0).collect();
    // A packed ring's device writes its descriptors, and its event area when it disables or enables notifications.
    let ring = if packed { &[0x1, 0x9][..] } else { &[0x9][..] };
    let expected = [ring, &[0x20, 0x30]].concat();
    assert!(found.iter().all(|page| expected.contains(page)), "{found:x?}");
    assert!([ring[0], 0x20, 0x30].iter().all(|page| found.contains(page)), "{found:x?}");

    rig.device.stop_logging().unwrap();
    assert_eq!(rig.read(4, None), 513);
    let mut pages = PageSet::default();
    log.harvest(&mut pages);
    assert!(pages.is_empty(), "{pages:?}");
}

#[test]
fn a_request_with_more_buffers_than_the_ring_has_entries_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let _disk = disk(folder.path(), "a");
    let features = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC;
    let mut rig = Rig::start(&folder.path().join("a"), 4, features);
    for sector in 0..20 {
        assert_eq!(rig.read(sector, Some(GuestAddress(0x40000))), 513);
        assert_eq!(rig.status(), 0);
    }
}

#[test]
fn a_driver_cannot_reach_the_shadow_rings() {
    let folder = tempfile::tempdir().unwrap();
    let _disk = disk(folder.path(), "a");
    let mut rig = Rig::start(&folder.path().join("a"), 16, VIRTIO_F_VERSION_1);
    // They are in the inner device's memory table, at the next multiple of 2 MiB after guest memory.
    let shadow = Buffer { gpa: GuestAddress(2 * MIB), len: 4096 };
    let header = Buffer { gpa: GuestAddress(0x10000), len: 16 };
    let status = Buffer { gpa: GuestAddress(0x30000), len: 1 };
    rig.driver.add(&[header, shadow], &[status], None).unwrap().unwrap();
    rig.driver.add(&[header], &[shadow, status], None).unwrap().unwrap();
    rig.kick();
    assert_eq!((rig.used(), rig.used()), (0, 0));
    assert_eq!(rig.read(3, None), 513);
    assert_eq!(rig.status(), 0);
}

#[test]
fn memory_can_change_while_a_ring_runs() {
    let folder = tempfile::tempdir().unwrap();
    let _disk = disk(folder.path(), "a");
    let mut rig = Rig::start(&folder.path().join("a"), 16, VIRTIO_F_VERSION_1);
    assert_eq!(rig.read(3, None), 513);
    let more = Arc::new(Region::create(GuestAddress(2 * MIB), MIB).unwrap());
    let larger = Memory::new(rig.memory.regions().iter().cloned().chain([more])).unwrap();
    rig.device.set_memory(&larger).unwrap();
    assert_eq!(rig.read(4, None), 513);
    // The driver's buffer is where the shadow rings were before.
    let header = Buffer { gpa: GuestAddress(0x10000), len: 16 };
    let writable = [Buffer { gpa: GuestAddress(2 * MIB), len: 512 }, Buffer { gpa: GuestAddress(0x30000), len: 1 }];
    rig.driver.add(&[header], &writable, None).unwrap().unwrap();
    rig.kick();
    assert_eq!((rig.used(), rig.status()), (513, 0));
}

/// A receiving device: it keeps requests until its gate is opened, and puts them back if its ring stops before.
struct Receiver(Arc<AtomicBool>, Arc<EventFd>);

struct ReceiveQueue {
    open: Arc<AtomicBool>,
    opened: Arc<EventFd>,
    requests: Vec<Request>,
}

impl VirtioDevice for Receiver {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(ReceiveQueue { open: self.0.clone(), opened: self.1.clone(), requests: Vec::new() }))
    }
}

impl Queue for ReceiveQueue {
    fn submit(&mut self, request: Request) {
        self.requests.push(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        let _ = self.opened.read();
        if self.open.load(Ordering::Acquire) {
            for mut request in self.requests.drain(..) {
                request.write(0, b"received").unwrap();
                done.push(request);
            }
        }
    }

    fn put_back(&mut self, unused: &mut Vec<Request>) {
        unused.append(&mut self.requests);
    }

    fn completion_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(self.opened.as_fd())
    }
}

#[rstest]
fn requests_that_the_device_has_not_used_return_to_the_ring(#[values(false, true)] packed: bool) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("a");
    let (open, opened) = (Arc::new(AtomicBool::new(false)), EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let opened = Arc::new(opened);
    let _device = Served::new(&socket, Arc::new(Receiver(open.clone(), opened.clone())));
    let kind = if packed { VIRTIO_F_RING_PACKED } else { VirtioFeatures::empty() };
    let mut rig = Rig::start(&socket, 16, VIRTIO_F_VERSION_1 | kind);
    for buffer in 0..10 {
        let buffer = Buffer { gpa: GuestAddress(0x20000 + buffer * 0x1000), len: 64 };
        rig.driver.add(&[], &[buffer], None).unwrap().unwrap();
    }
    rig.kick();
    let start = RingBase::initial(rig.features);
    for _ in 0..3 {
        assert_eq!(rig.device.stop_ring(0).unwrap(), start);
        assert!(rig.driver.pop_used().unwrap().is_none());
        rig.device.start_ring(0, rig.setup.clone()).unwrap();
    }
    open.store(true, Ordering::Release);
    opened.write(1).unwrap();
    for buffer in 0..10 {
        assert_eq!(rig.used(), 8);
        let mut received = [0; 8];
        rig.memory.read(GuestAddress(0x20000).unchecked_add(buffer * 0x1000), &mut received).unwrap();
        assert_eq!(&received, b"received");
    }
    assert_ne!(rig.device.stop_ring(0).unwrap(), start);
}

#[test]
fn invalid_calls_have_clear_errors() {
    let folder = tempfile::tempdir().unwrap();
    let _disk = disk(folder.path(), "a");
    let mut rig = Rig::start(&folder.path().join("a"), 16, VIRTIO_F_VERSION_1);
    let ring_error = |error: FrontendError| match error {
        FrontendError::InvalidRing { reason, .. } => reason,
        other => panic!("{other}"),
    };
    let again = rig.device.start_ring(0, rig.setup.clone()).unwrap_err();
    assert!(ring_error(again).contains("already started"));
    let outside = RingSetup { used: GuestAddress(2 * MIB), ..rig.setup.clone() };
    let outside = rig.device.start_ring(1, outside).unwrap_err();
    assert!(ring_error(outside).contains("0x200000"));
    let absent = rig.device.start_ring(2, rig.setup.clone()).unwrap_err();
    assert!(ring_error(absent).contains("2 rings"));
    assert!(ring_error(rig.device.stop_ring(1).unwrap_err()).contains("not started"));
    assert_eq!(rig.read(3, None), 513, "the ring that runs was not disturbed");
    let setup = rig.setup.clone();
    drop(rig);
    let mut early = shadowed(&folder.path().join("a"));
    assert!(ring_error(early.start_ring(0, setup).unwrap_err()).contains("no guest memory"));
}
