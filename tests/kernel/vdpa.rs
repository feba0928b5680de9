//! vhost-vdpa: a disk that this project serves over VDUSE, driven by this project's front-end (rules K4.4, K5).

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::signal::Signal;
use vhost_migrate::abi::virtio::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_F_VERSION_1, VIRTIO_ID_BLOCK};
use vhost_migrate::backend::blk::{BlkDevice, BlkOptions};
use vhost_migrate::dirty::{Log, LogQuality};
use vhost_migrate::frontend::{Device, DeviceEvent, FrontendError, KernelDevice, KernelOptions};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, Region, UserAddress};
use vhost_migrate::ring::{Buffer, RingBase};
use vhost_migrate::shadow::ShadowDevice;
use vhost_migrate::vduse::{BusDriver, VduseOptions, VduseServer};

use crate::modules::load;
use crate::rings::{Ring, changed, harvest, page, region, snapshot};
use crate::vduse;
use crate::wait::is_readable;

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;
/// Pages of a request: header, status and data.
const HEADER: u64 = 100;
const STATUS: u64 = 101;
const DATA: u64 = 102;
const READ: u32 = 0;
const WRITE: u32 = 1;

/// A disk on the vDPA bus.
struct Served {
    _server: VduseServer,
    image: PathBuf,
    /// Path of the vhost-vdpa device.
    path: String,
}

impl Served {
    fn new(name: &str) -> Served {
        for module in ["vduse", "vhost_vdpa"] {
            load(module);
        }
        let image = PathBuf::from(format!("/tmp/{name}.img"));
        File::create(&image).unwrap().set_len(MIB).unwrap();
        let disk = Arc::new(BlkDevice::open(BlkOptions::new(image.clone())).unwrap());
        let options = VduseOptions::new(name).with_attach(Some(BusDriver::Vhost));
        let server = VduseServer::start(&options, disk).unwrap();
        let paths: Vec<String> = server.offered_as();
        let path = paths.into_iter().find(|path| path.contains("vhost-vdpa")).unwrap();
        Served { _server: server, image, path }
    }

    fn device(&self) -> KernelDevice {
        KernelDevice::vdpa(&self.path, Some(1), KernelOptions::default()).unwrap()
    }

    fn sector(&self, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        File::open(&self.image).unwrap().read_exact_at(&mut bytes, number * SECTOR as u64).unwrap();
        bytes
    }
}

/// A guest with one ring.
struct Guest {
    memory: Memory,
    device: Box<dyn Device>,
    ring: Ring,
}

impl Guest {
    fn new(device: impl Device + 'static) -> Guest {
        let memory = Memory::new([region(0, 256)]).unwrap();
        let mut device: Box<dyn Device> = Box::new(device);
        device.set_features(VIRTIO_F_VERSION_1).unwrap();
        device.set_memory(&memory).unwrap();
        let ring = Ring::new(&memory, 4, VIRTIO_F_VERSION_1);
        let mut guest = Guest { memory, device, ring };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.device.start_ring(0, self.ring.setup.clone()).unwrap();
    }

    fn stop(&mut self) -> RingBase {
        let base = self.device.stop_ring(0).unwrap();
        self.ring.setup.base = base;
        base
    }

    /// Publishes a request whose data are on page `data`.
    fn publish(&mut self, kind: u32, sector: u64, data: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write(PageNumber(HEADER).address(), &header).unwrap();
        self.memory.write(PageNumber(STATUS).address(), &[0xff]).unwrap();
        let buffer = |page, len| Buffer { gpa: PageNumber(page).address(), len };
        let (header, data, status) = (buffer(HEADER, 16), buffer(data, SECTOR as u32), buffer(STATUS, 1));
        match kind {
            WRITE => self.ring.publish(&[header, data], &[status]),
            _ => self.ring.publish(&[header], &[data, status]),
        }
    }

    fn complete(&mut self) {
        self.ring.completion();
        assert_eq!(page(&self.memory, STATUS)[0], 0, "status");
    }

    fn write(&mut self, sector: u64, byte: u8) {
        self.memory.write(PageNumber(DATA).address(), &[byte; SECTOR]).unwrap();
        self.publish(WRITE, sector, DATA);
        self.complete();
    }

    fn read(&mut self, sector: u64, into: u64) -> Vec<u8> {
        self.publish(READ, sector, into);
        self.complete();
        page(&self.memory, into)[..SECTOR].to_vec()
    }
}

/// Rules K5.1 and K5.2.
#[test]
fn what_is_written_through_vhost_vdpa_is_in_the_image() {
    let served = Served::new("vdpa1");
    let device = served.device();
    assert_eq!((device.device_id(), device.queues(), device.log_quality()), (VIRTIO_ID_BLOCK, 1, None));
    let mut guest = Guest::new(device);
    let status = guest.device.status().unwrap().unwrap();
    assert_eq!(status & VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_DRIVER_OK);
    let mut capacity = [0; 8];
    guest.device.config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity) * SECTOR as u64, MIB);
    for sector in 0..100 {
        guest.write(sector, sector as u8 + 1);
    }
    for sector in 0..100 {
        assert_eq!(guest.read(sector, DATA + 1), [sector as u8 + 1; SECTOR]);
    }
    assert_eq!(served.sector(7), [8; SECTOR]);
}

/// Rules K5.5 and K5.6.
#[test]
fn a_stopped_vdpa_device_goes_on_at_its_base() {
    let served = Served::new("vdpa2");
    let mut guest = Guest::new(served.device());
    for round in 1..=5u8 {
        guest.write(round.into(), round);
        assert_eq!(guest.stop(), RingBase::split(2 * u16::from(round) - 1));
        assert_eq!(guest.device.status().unwrap(), Some(0));
        let _ = nix::unistd::read(&guest.ring.setup.call, &mut [0; 8]);
        // A request that is published while the ring is stopped is served after its start.
        guest.publish(READ, round.into(), DATA + 1);
        let before = snapshot(&guest.memory);
        assert!(!is_readable(&guest.ring.setup.call.as_fd(), 100u16));
        assert_eq!(changed(&guest.memory, &before), BTreeSet::new());
        guest.start();
        guest.complete();
        assert_eq!(page(&guest.memory, DATA + 1)[..SECTOR], [round; SECTOR]);
    }
    // Another front-end takes over.
    guest.stop();
    let Guest { memory, device, ring } = guest;
    drop(device);
    let mut device: Box<dyn Device> = Box::new(served.device());
    device.set_features(VIRTIO_F_VERSION_1).unwrap();
    device.set_memory(&memory).unwrap();
    let mut guest = Guest { memory, device, ring };
    guest.start();
    assert_eq!(guest.read(3, DATA), [3; SECTOR]);
}

/// Rule K5.5.
#[test]
fn requests_in_flight_are_completed_once_when_a_vdpa_device_is_stopped() {
    let served = Served::new("vdpa6");
    let mut guest = Guest::new(served.device());
    let mut completed = 0;
    for round in 1..=20u8 {
        // The header is written anew only when no request uses it.
        guest.write(9, round);
        completed += 1;
        for page in 0..15 {
            guest.publish(READ, 9, DATA + page);
        }
        let base = guest.stop();
        while guest.ring.driver.pop_used().unwrap().is_some() {
            completed += 1;
        }
        assert_eq!(base, RingBase::split(completed));
        guest.start();
        while completed < u16::from(round) * 16 {
            guest.ring.completion();
            completed += 1;
        }
        for number in DATA..DATA + 15 {
            assert_eq!(page(&guest.memory, number)[..SECTOR], [round; SECTOR]);
        }
    }
}

/// Rules K4.4 and K5.2.
#[test]
fn the_writes_of_a_vdpa_device_are_marked_by_shadow_rings() {
    let served = Served::new("vdpa3");
    let mut guest = Guest::new(ShadowDevice::new(Box::new(served.device())));
    assert_eq!(guest.device.log_quality(), Some(LogQuality::Shadowed));
    guest.write(1, 0x11);
    guest.write(2, 0x22);
    let (log, fd) = Log::create(GuestAddress(256 * LOG_PAGE)).unwrap();
    let log = Arc::new(log);
    guest.device.start_logging(&log, fd.as_fd()).unwrap();
    let used_page = guest.ring.used_page();
    for round in 1..20u8 {
        guest.write(3, round);
        assert_eq!(harvest(&log), BTreeSet::from([used_page, STATUS]));
        assert_eq!(guest.read(3, DATA + u64::from(round)), [round; SECTOR]);
        assert_eq!(harvest(&log), BTreeSet::from([used_page, STATUS, DATA + u64::from(round)]));
        assert_eq!(guest.stop(), RingBase::split(2 + 2 * u16::from(round)));
        guest.start();
    }
    assert_eq!((served.sector(1), served.sector(3)), (vec![0x11; SECTOR], vec![19; SECTOR]));
}

/// Rule K5.2.
#[test]
fn memory_of_a_vdpa_device_changes_while_its_ring_runs() {
    let served = Served::new("vdpa4");
    let mut guest = Guest::new(served.device());
    guest.write(5, 5);
    let first = guest.memory.regions()[0].clone();
    let high = (1 << 30) / LOG_PAGE;
    for _ in 0..3 {
        guest.memory = Memory::new([first.clone(), region(1 << 30, 16)]).unwrap();
        guest.device.set_memory(&guest.memory).unwrap();
        assert_eq!(guest.read(5, high + 3), [5; SECTOR]);
        guest.memory = Memory::new([first.clone()]).unwrap();
        guest.device.set_memory(&guest.memory).unwrap();
        assert_eq!(guest.read(5, DATA), [5; SECTOR]);
    }
}

/// Rule K5.4.
#[test]
fn a_vdpa_device_refuses_what_it_cannot_access() {
    let served = Served::new("vdpa5");
    let mut device = served.device();
    let file = OpenOptions::new().read(true).write(true).open(&served.image).unwrap();
    let unshared = Region::map(file.as_fd(), GuestAddress(0), MIB, UserAddress(0), 0).unwrap();
    let error = device.set_memory(&Memory::new([Arc::new(unshared)]).unwrap()).unwrap_err();
    assert!(matches!(error, FrontendError::NotShared { .. }), "{error}");
    let again = KernelDevice::vdpa(&served.path, Some(1), KernelOptions::default()).err().unwrap();
    assert_eq!(
        again.to_string(),
        format!(
            "{}: cannot open the device (another process has it open: end that, or use another device)",
            served.path
        )
    );
    assert_eq!(
        device.set_log_fd(None).unwrap_err().to_string(),
        format!(
            "{}: VHOST_SET_LOG_FD: neither this kernel nor this device has it. Use a later kernel (rule K2.10)",
            served.path
        )
    );
    drop(device);
    let many = KernelDevice::vdpa(&served.path, Some(9), KernelOptions::default()).err().unwrap();
    assert!(many.to_string().contains("9 rings"), "{many}");
}

/// Serves a disk in a process of its own. Returns it and the path of its vhost-vdpa device.
fn serve_apart(name: &str) -> (vduse::Served, PathBuf) {
    let image = PathBuf::from(format!("/tmp/{name}.img"));
    File::create(&image).unwrap().set_len(MIB).unwrap();
    let arguments = ["--attach", "vhost", "--image", image.to_str().unwrap()];
    let served = vduse::Served::start("blk", name, &arguments);
    let path = served.disk();
    (served, path)
}

#[test]
fn a_disk_that_grows_is_an_event() {
    let (served, path) = serve_apart("vdpa7");
    let mut device = KernelDevice::vdpa(path.to_str().unwrap(), Some(1), KernelOptions::default()).unwrap();
    device.set_features(VIRTIO_F_VERSION_1).unwrap();
    let mut guest = Guest::new(device);
    assert_eq!(guest.device.take_events(), []);
    OpenOptions::new().write(true).open("/tmp/vdpa7.img").unwrap().set_len(2 * MIB).unwrap();
    served.signal(Signal::SIGHUP);
    let events = guest.device.events_fd().unwrap().unwrap();
    assert!(is_readable(&events.as_fd(), 20_000u16), "no event");
    assert_eq!(guest.device.take_events(), [DeviceEvent::ConfigChanged]);
    let mut capacity = [0; 8];
    guest.device.config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity) * SECTOR as u64, 2 * MIB);
    drop(guest);
    served.end();
}

#[test]
fn a_device_whose_process_was_killed_is_an_error_with_a_remedy() {
    let (served, path) = serve_apart("vdpa8");
    fs::write("/sys/class/vduse/vdpa8/msg_timeout", "1").unwrap();
    let path = path.to_str().unwrap();
    let mut guest = Guest::new(KernelDevice::vdpa(path, Some(1), KernelOptions::default()).unwrap());
    guest.write(1, 1);
    served.kill();
    assert_eq!(
        guest.device.stop_ring(0).unwrap_err().to_string(),
        format!("{path}: VHOST_GET_VRING_BASE: the device does not reply. Is the process that implements it alive?")
    );
    drop(guest);
    let error = KernelDevice::vdpa(path, Some(1), KernelOptions::default()).err().unwrap().to_string();
    assert_eq!(
        error,
        format!("{path}: cannot open the device (the device does not reply: is the process that implements it alive?)")
    );
    let replaced = ["--attach", "vhost", "--replace", "--image", "/tmp/vdpa8.img"];
    vduse::Served::start("blk", "vdpa8", &replaced).end();
}
