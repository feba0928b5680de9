//! The block device over VDUSE with a driver in this process, through vhost_vdpa: what the kernel's drivers don't do.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use rstest::rstest;
use vhost_migrate::abi::vhost::{
    IotlbMsg, MsgV2, VHOST_ACCESS_RW, VHOST_BACKEND_F_IOTLB_MSG_V2, VHOST_GET_VRING_BASE, VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_MSG_V2, VHOST_IOTLB_UPDATE, VHOST_SET_BACKEND_FEATURES, VHOST_SET_FEATURES, VHOST_SET_OWNER,
    VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE, VHOST_SET_VRING_CALL, VHOST_SET_VRING_KICK, VHOST_SET_VRING_NUM,
    VHOST_VDPA_SET_STATUS, VHOST_VDPA_SET_VRING_ENABLE, VringAddr, VringFile, VringState,
};
use vhost_migrate::abi::virtio::{
    BlkRequestHeader, VIRTIO_BLK_T_IN, VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VirtioFeatures,
};
use vhost_migrate::abi::zerocopy::{FromZeros, IntoBytes};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, Region};
use vhost_migrate::ring::{Buffer, RingBase};

use crate::rings::{Ring, page, region};
use crate::vduse::Served;
use crate::vduse_blk::image;

const SPLIT: VirtioFeatures = VIRTIO_F_VERSION_1.union(VIRTIO_F_ACCESS_PLATFORM);
const PACKED: VirtioFeatures = SPLIT.union(VIRTIO_F_RING_PACKED);
/// Pages of the ring, and of headers and statuses.
const RING: u64 = 4;
const HEADERS: u64 = 8;
/// First page of the region for data, which can be replaced.
const DATA: u64 = 0x100;
const PAGES: u64 = 16;
const SECTORS_OF_PAGE: u64 = LOG_PAGE / 512;

/// A started driver of a `/dev/vhost-vdpa-N`.
struct Driver {
    file: File,
    ring: Ring,
    memory: Memory,
    requests: u64,
}

impl Driver {
    fn start(path: &PathBuf, features: VirtioFeatures) -> Driver {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let memory = Memory::new([region(0, 64), region(DATA * LOG_PAGE, PAGES)]).unwrap();
        let ring = Ring::new(&memory, RING, features);
        let driver = Driver { file, ring, memory, requests: 0 };
        driver.ioctl(VHOST_SET_OWNER, &mut 0_u64);
        driver.ioctl(VHOST_SET_BACKEND_FEATURES, &mut (1_u64 << VHOST_BACKEND_F_IOTLB_MSG_V2));
        let begun = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        driver.status(0);
        driver.status(begun);
        driver.ioctl(VHOST_SET_FEATURES, &mut features.bits());
        driver.status(begun | VIRTIO_CONFIG_S_FEATURES_OK);
        for region in driver.memory.regions().iter() {
            driver.iotlb(VHOST_IOTLB_UPDATE, region);
        }
        let setup = &driver.ring.setup;
        let state = |num: u32| VringState { index: 0, num };
        let file = |fd: RawFd| VringFile { index: 0, fd };
        driver.ioctl(VHOST_SET_VRING_NUM, &mut state(setup.size.into()));
        driver.ioctl(VHOST_SET_VRING_BASE, &mut state(setup.base.bits()));
        let mut areas = VringAddr {
            desc_user_addr: setup.desc.0,
            avail_user_addr: setup.avail.0,
            used_user_addr: setup.used.0,
            ..VringAddr::new_zeroed()
        };
        driver.ioctl(VHOST_SET_VRING_ADDR, &mut areas);
        driver.ioctl(VHOST_SET_VRING_KICK, &mut file(setup.kick.as_raw_fd()));
        driver.ioctl(VHOST_SET_VRING_CALL, &mut file(setup.call.as_raw_fd()));
        driver.ioctl(VHOST_VDPA_SET_VRING_ENABLE, &mut state(1));
        driver.status(begun | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
        driver
    }

    fn ioctl<T>(&self, request: u32, argument: &mut T) {
        // SAFETY: the callers give the argument of the request, which the kernel reads and writes.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
        Errno::result(result).unwrap_or_else(|errno| panic!("ioctl {request:#x}: {errno}"));
    }

    fn status(&self, mut status: u8) {
        self.ioctl(VHOST_VDPA_SET_STATUS, &mut status);
    }

    /// Adds or removes the mapping of a region, whose addresses are guest-physical.
    fn iotlb(&self, kind: u8, region: &Region) {
        let iotlb = IotlbMsg {
            iova: region.gpa().0,
            size: region.size(),
            uaddr: region.host_ptr() as u64,
            perm: VHOST_ACCESS_RW,
            kind,
            ..IotlbMsg::new_zeroed()
        };
        let message = MsgV2 { kind: VHOST_IOTLB_MSG_V2, iotlb, ..MsgV2::new_zeroed() };
        (&self.file).write_all(message.as_bytes()).unwrap();
    }

    /// Publishes the read of a page of the disk into a page of memory.
    fn read(&mut self, from: u64, to: u64) {
        let number = self.requests % 32;
        self.requests += 1;
        let header = PageNumber(HEADERS).address().0 + number * 32;
        let content = BlkRequestHeader {
            request_type: VIRTIO_BLK_T_IN.into(),
            sector: (from * SECTORS_OF_PAGE).into(),
            ..BlkRequestHeader::new_zeroed()
        };
        self.memory.write(GuestAddress(header), content.as_bytes()).unwrap();
        let buffer = |gpa: u64, len: u32| Buffer { gpa: GuestAddress(gpa), len };
        let into = [buffer(to * LOG_PAGE, LOG_PAGE as u32), buffer(header + 16, 1)];
        self.ring.publish(&[buffer(header, 16)], &into);
    }

    fn base(&self) -> RingBase {
        let mut state = VringState { index: 0, num: 0 };
        self.ioctl(VHOST_GET_VRING_BASE, &mut state);
        RingBase::from_bits(state.num)
    }
}

/// The base after this number of requests of three descriptors.
fn after(requests: u16, features: VirtioFeatures) -> RingBase {
    match features {
        SPLIT => RingBase::split(requests),
        _ => RingBase::packed(3 * requests % 64, 3 * requests < 64, 3 * requests % 64, 3 * requests < 64),
    }
}

/// An image whose pages have their numbers in all bytes.
fn numbered(name: &str) -> PathBuf {
    let path = image(name, 1 << 20);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for number in 0..16 {
        file.write_all_at(&[number as u8 + 1; LOG_PAGE as usize], number * LOG_PAGE).unwrap();
    }
    path
}

fn serve(name: &str) -> Served {
    numbered(name);
    serve_again(name)
}

/// Serves the image that [`serve`] has made.
fn serve_again(name: &str) -> Served {
    Served::start("blk", name, &["--attach", "vhost", "--image", &format!("/tmp/{name}.img")])
}

/// Rule V4.2: when GET_VRING_BASE has returned, all requests before the base are completed and no other is.
#[rstest]
fn the_base_is_that_of_a_drained_ring(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let served = serve("drained");
    let mut driver = Driver::start(&served.disk(), features);
    for request in 0..18 {
        driver.read(request % 16, DATA + request % PAGES);
    }
    driver.ring.completion();
    let base = driver.base();
    let mut done = 1;
    while driver.ring.driver.pop_used().unwrap().is_some() {
        done += 1;
    }
    assert_eq!(base, after(done, features), "after {done} requests");
    driver.read(0, DATA);
    assert_eq!(driver.base(), base, "it stays stopped");
    assert!(driver.ring.driver.pop_used().unwrap().is_none(), "after its base");
    drop(driver);
    served.end();
}

/// Rule V3.5: a ring whose base was reported stays stopped in the next process, which reports the same base.
#[rstest]
fn a_successor_keeps_the_base_that_was_reported(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let served = serve("kept");
    let mut driver = Driver::start(&served.disk(), features);
    for request in 0..3 {
        driver.read(request, DATA + request);
        driver.ring.completion();
    }
    assert_eq!(driver.base(), after(3, features));
    served.kill();
    driver.read(3, DATA);
    let served = serve_again("kept");
    assert_eq!(driver.base(), after(3, features), "it stays stopped");
    assert!(driver.ring.driver.pop_used().unwrap().is_none(), "after its base");
    drop(driver);
    // The reset starts it afresh.
    let mut driver = Driver::start(&served.disk(), features);
    driver.read(5, DATA);
    driver.ring.completion();
    assert_eq!(page(&driver.memory, DATA), [6; LOG_PAGE as usize]);
    drop(driver);
    served.end();
}

/// Rules V1.3, V1.5: after UPDATE_IOTLB nothing is read or written through the former mapping.
#[rstest]
fn a_new_mapping_replaces_the_former_one_while_the_ring_runs(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let served = serve("mapping");
    let mut driver = Driver::start(&served.disk(), features);
    driver.read(4, DATA);
    driver.ring.completion();
    assert_eq!(page(&driver.memory, DATA), [5; LOG_PAGE as usize]);
    let former = driver.memory.clone();
    let [low, data] = [0, 1].map(|index: usize| driver.memory.regions()[index].clone());
    driver.iotlb(VHOST_IOTLB_INVALIDATE, &data);
    let new = region(DATA * LOG_PAGE, PAGES);
    driver.iotlb(VHOST_IOTLB_UPDATE, &new);
    driver.memory = Memory::new([low, Arc::clone(&new)]).unwrap();
    driver.read(9, DATA);
    driver.ring.completion();
    assert_eq!(page(&driver.memory, DATA), [10; LOG_PAGE as usize]);
    assert_eq!(page(&former, DATA), [5; LOG_PAGE as usize]);
    drop(driver);
    served.end();
}

/// A VMM that closes its file has the kernel reset the device. The next VMM starts afresh.
#[test]
fn one_vmm_follows_another() {
    let served = serve("vmms");
    for features in [SPLIT, PACKED, SPLIT] {
        let mut driver = Driver::start(&served.disk(), features);
        for number in 0..16 {
            driver.read(number, DATA);
            driver.ring.completion();
            assert_eq!(page(&driver.memory, DATA), [number as u8 + 1; LOG_PAGE as usize]);
        }
    }
    served.end();
}
