//! vhost-scsi: commands of a driver to a RAM disk of the kernel (rules K1.5, K1.6, K4.3).

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Once};

use vhost_migrate::abi::virtio::{VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, KernelDevice, KernelOptions};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber};
use vhost_migrate::ring::{Buffer, RingBase};

use crate::modules::load;
use crate::rings::{Ring, page, region};

const FEATURES: VirtioFeatures = VIRTIO_F_VERSION_1;
const TARGET: &str = "naa.5001405000000001";
/// The ring for requests, after the control and the event ring.
pub(crate) const REQUESTS: u16 = 2;
/// Pages of a request: command, response and data.
const COMMAND: u64 = 100;
pub(crate) const RESPONSE: u64 = 101;
pub(crate) const DATA: u64 = 102;
const RESPONSE_BYTES: u32 = 108;

/// Makes a RAM disk and a target for it, once.
fn make_target() {
    static MADE: Once = Once::new();
    MADE.call_once(|| {
        load("vhost_scsi");
        let config = Path::new("/sys/kernel/config");
        if !config.join("target").exists() {
            let mounted = Command::new("mount").args(["-t", "configfs", "configfs", "/sys/kernel/config"]).status();
            assert!(mounted.unwrap().success());
        }
        let write = |path: &PathBuf, text: &str| {
            fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        };
        let disk = config.join("target/core/rd_mcp_0/disk");
        fs::create_dir_all(&disk).unwrap();
        write(&disk.join("control"), "rd_pages=256\n");
        write(&disk.join("enable"), "1\n");
        let group = config.join("target/vhost").join(TARGET).join("tpgt_1");
        fs::create_dir_all(&group).unwrap();
        write(&group.join("nexus"), "naa.5001405000000002\n");
        let lun = group.join("lun/lun_0");
        fs::create_dir_all(&lun).unwrap();
        std::os::unix::fs::symlink(&disk, lun.join("disk")).unwrap();
    });
}

/// Starts all rings of a device with one for requests, and stops them.
pub(crate) fn start_stop(device: &mut KernelDevice) {
    let memory = Memory::new([region(0, 256)]).unwrap();
    device.set_features(FEATURES).unwrap();
    device.set_memory(&memory).unwrap();
    for (index, page) in [(0, 4), (1, 8), (2, 12)] {
        device.start_ring(index, Ring::new(&memory, page, FEATURES).setup).unwrap();
    }
    for index in 0..3 {
        assert_eq!(device.stop_ring(index).unwrap(), RingBase::split(0));
    }
}

/// A device with its rings.
pub(crate) struct Scsi {
    memory: Memory,
    pub(crate) device: Box<dyn Device>,
    pub(crate) rings: [Ring; 3],
}

impl Scsi {
    fn new(options: KernelOptions) -> Scsi {
        Scsi::with(options, |device| Box::new(device))
    }

    /// A guest with the device that `wrap` makes of the kernel's.
    pub(crate) fn with(options: KernelOptions, wrap: impl Fn(KernelDevice) -> Box<dyn Device>) -> Scsi {
        make_target();
        let memory = Memory::new([region(0, 256)]).unwrap();
        let mut device = wrap(KernelDevice::scsi(TARGET, 1, options).unwrap());
        device.set_features(FEATURES).unwrap();
        device.set_memory(&memory).unwrap();
        let rings = [4, 8, 12].map(|page| Ring::new(&memory, page, FEATURES));
        Scsi { memory, device, rings }
    }

    pub(crate) fn start(&mut self) {
        for (index, ring) in (0..).zip(&self.rings) {
            self.device.start_ring(index, ring.setup.clone()).unwrap();
        }
    }

    pub(crate) fn stop(&mut self) -> Vec<RingBase> {
        let stopped = (0..).zip(&mut self.rings).map(|(index, ring)| {
            ring.setup.base = self.device.stop_ring(index).unwrap();
            ring.setup.base
        });
        stopped.collect()
    }

    /// Executes a command with `len` bytes of data on the page for data.
    fn command(&mut self, cdb: &[u8], len: u32, writes: bool) {
        // The LUN 0 of target 1; a tag; no priority.
        let header =
            [&[1, 1, 0x40, 0, 0, 0, 0, 0][..], &7u64.to_le_bytes(), &[0; 3], cdb, &[0; 32][cdb.len()..]].concat();
        self.memory.write(PageNumber(COMMAND).address(), &header).unwrap();
        let buffer = |page, len| Buffer { gpa: PageNumber(page).address(), len };
        let (command, response) = (buffer(COMMAND, header.len() as u32), buffer(RESPONSE, RESPONSE_BYTES));
        let ring = &mut self.rings[usize::from(REQUESTS)];
        match writes {
            true => ring.publish(&[command, buffer(DATA, len)], &[response]),
            false => ring.publish(&[command], &[response, buffer(DATA, len)]),
        }
        ring.completion();
        let response = page(&self.memory, RESPONSE);
        assert_eq!(response[10..12], [0, 0], "status and response");
    }

    fn inquiry(&mut self) -> String {
        self.command(&[0x12, 0, 0, 0, 36, 0], 36, false);
        String::from_utf8_lossy(&page(&self.memory, DATA)[8..32]).into_owned()
    }

    pub(crate) fn write_block(&mut self, block: u8, byte: u8) {
        self.memory.write(PageNumber(DATA).address(), &[byte; 512]).unwrap();
        self.command(&[0x2a, 0, 0, 0, 0, block, 0, 0, 1, 0], 512, true);
    }

    pub(crate) fn read_block(&mut self, block: u8) -> Vec<u8> {
        self.memory.write(PageNumber(DATA).address(), &[0; 512]).unwrap();
        self.command(&[0x28, 0, 0, 0, 0, block, 0, 0, 1, 0], 512, false);
        page(&self.memory, DATA)[..512].to_vec()
    }
}

#[test]
fn blocks_are_written_and_read() {
    let mut scsi = Scsi::new(KernelOptions::default());
    scsi.start();
    assert_eq!(scsi.inquiry(), "LIO-ORG RAMDISK-MCP     ");
    for block in 0..50 {
        scsi.write_block(block, block + 1);
    }
    for block in 0..50 {
        assert_eq!(scsi.read_block(block), [block + 1; 512]);
    }
}

#[test]
fn a_missed_event_is_moved() {
    make_target();
    let mut device = KernelDevice::scsi(TARGET, 1, KernelOptions::default()).unwrap();
    assert!(!device.events_missed().unwrap());
    device.set_events_missed(true).unwrap();
    assert!(device.events_missed().unwrap());
}

/// Rules K1.5 and K1.6.
#[test]
fn a_stopped_device_goes_on_at_its_bases() {
    let mut scsi = Scsi::new(KernelOptions::default());
    for round in 0..4u8 {
        scsi.start();
        scsi.write_block(round, 0xa0 + round);
        assert_eq!(scsi.read_block(round), [0xa0 + round; 512]);
        let bases = [0, 0, 2 * (u16::from(round) + 1)].map(RingBase::split);
        assert_eq!(scsi.stop(), bases);
    }
}

#[test]
fn rings_are_divided_between_workers() {
    let mut scsi = Scsi::new(KernelOptions::default().with_workers(2));
    scsi.start();
    assert_eq!(scsi.inquiry(), "LIO-ORG RAMDISK-MCP     ");
    let named = |name: &str| name.starts_with("vhost-");
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
    let workers = tasks.filter(|comm| fs::read_to_string(comm).is_ok_and(|name| named(&name))).count();
    assert_eq!(workers, 3, "the first one, and two more");
}

/// Rule K4.3.
#[test]
fn its_incomplete_log_is_refused() {
    let mut scsi = Scsi::new(KernelOptions::default());
    let (log, fd) = Log::create(GuestAddress(256 * LOG_PAGE)).unwrap();
    assert_eq!(scsi.device.log_quality(), None);
    assert_eq!(
        scsi.device.start_logging(&Arc::new(log), fd.as_fd()).unwrap_err().to_string(),
        "the device does not offer a complete dirty log: before Linux 6.16 the kernel does not log what vhost-scsi \
         writes to guest memory, although it offers LOG_ALL (rule K4.3); use a later kernel, or wrap it in \
         shadow::ShadowDevice"
    );
}

#[test]
fn a_target_that_does_not_exist_is_an_error_at_the_start() {
    make_target();
    let memory = Memory::new([region(0, 256)]).unwrap();
    let mut device = KernelDevice::scsi("naa.none", 1, KernelOptions::default()).unwrap();
    device.set_memory(&memory).unwrap();
    let rings = [4, 8, 12].map(|page| Ring::new(&memory, page, VirtioFeatures::empty()));
    device.start_ring(0, rings[0].setup.clone()).unwrap();
    device.start_ring(1, rings[1].setup.clone()).unwrap();
    assert_eq!(
        device.start_ring(2, rings[2].setup.clone()).unwrap_err().to_string(),
        "/dev/vhost-scsi: VHOST_SCSI_SET_ENDPOINT: there is no target of this name with a nexus, or another device uses \
         it. Set it up in /sys/kernel/config/target/vhost"
    );
}
