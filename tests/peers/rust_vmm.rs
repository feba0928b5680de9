//! rust-vmm's front-end (the `vhost` crate) with this project's back-ends: rings, logging, kills, memory slots,
//! the back-end channel, device state and postcopy.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_migrate::abi::vhost_user::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_VRING_F_LOG};
use vhost_migrate::abi::virtio::{
    SECTOR_BYTES, VIRTIO_BLK_T_IN, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VirtioFeatures,
};
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{Address, GuestAddress, Memory, Region};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::backend::{Backend, Kind};
use crate::disk_driver::{DATA, DiskDriver, HIGH, REGION, SIZE, harvest, region};
use crate::linux_net;
use crate::process::{DEADLINE, Lab};

const IMAGE_BYTES: u64 = 8 << 20;
const SPLIT: VirtioFeatures = VIRTIO_F_VERSION_1.union(VIRTIO_RING_F_EVENT_IDX).union(VHOST_USER_F_PROTOCOL_FEATURES);
const PACKED: VirtioFeatures = SPLIT.union(VIRTIO_F_RING_PACKED);
/// Protocol features that the tests negotiate if they are offered.
const USED: Protocol = Protocol::from_bits_truncate(
    Protocol::MQ.bits()
        | Protocol::LOG_SHMFD.bits()
        | Protocol::REPLY_ACK.bits()
        | Protocol::BACKEND_REQ.bits()
        | Protocol::CONFIG.bits()
        | Protocol::PAGEFAULT.bits()
        | Protocol::INFLIGHT_SHMFD.bits()
        | Protocol::RESET_DEVICE.bits()
        | Protocol::CONFIGURE_MEM_SLOTS.bits()
        | Protocol::DEVICE_STATE.bits(),
);

/// Returns a connection with negotiated features, with or without need-reply on every message.
fn connect(socket: &Path, features: VirtioFeatures, need_reply: bool) -> Frontend {
    let connection = UnixStream::connect(socket).unwrap();
    // The crate waits for replies without a limit: close the connection so that a missing reply fails the test.
    let connection_end = connection.try_clone().unwrap();
    thread::spawn(move || {
        thread::sleep(DEADLINE);
        let _ = connection_end.shutdown(Shutdown::Both);
    });
    let mut frontend = Frontend::from_stream(connection, 1);
    if need_reply {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend.set_owner().unwrap();
    assert_eq!(features.bits() & !frontend.get_features().unwrap(), 0);
    let offered = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(offered & USED).unwrap();
    frontend.set_features(features.bits()).unwrap();
    frontend
}

fn describe(region: &Region) -> VhostUserMemoryRegionInfo {
    let (fd, mmap_offset) = region.shared().unwrap();
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.gpa().0,
        memory_size: region.size(),
        userspace_addr: region.user_addr().0,
        mmap_offset,
        mmap_handle: fd.as_raw_fd(),
    }
}

fn table(memory: &Memory) -> Vec<VhostUserMemoryRegionInfo> {
    memory.regions().iter().map(|region| describe(region)).collect()
}

/// Converts an eventfd of rust-vmm to an `OwnedFd`.
fn share(eventfd: &EventFd) -> OwnedFd {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.send_with_fd(&[0u8][..], eventfd.as_raw_fd()).unwrap();
    theirs.recv_with_fd(&mut [0]).unwrap().1.unwrap().into()
}

fn eventfd() -> EventFd {
    EventFd::new(0).unwrap()
}

/// `backend blk`, rust-vmm's front-end, and a driver of ring 0.
struct Harness {
    _lab: Lab,
    backend: Backend,
    image: PathBuf,
    frontend: Frontend,
    features: VirtioFeatures,
    need_reply: bool,
    inflight: (VhostUserInflight, File),
    driver: DiskDriver,
    kick: EventFd,
    call: EventFd,
}

impl Harness {
    fn new(kind: Kind, features: VirtioFeatures, need_reply: bool) -> Harness {
        let lab = Lab::new();
        let image = lab.disk();
        File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        let backend = Backend::start(&lab, kind, "backend", &image, 2);
        let mut frontend = connect(backend.socket(), features, need_reply);
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        let wish = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: SIZE };
        let inflight = frontend.get_inflight_fd(&wish).unwrap();
        assert!(inflight.0.mmap_size > 0 && (inflight.0.num_queues, inflight.0.queue_size) == (2, SIZE));
        let (kick, call) = (eventfd(), eventfd());
        let driver = DiskDriver::with_fds(features, share(&kick), share(&call));
        let mut harness =
            Harness { _lab: lab, backend, image, frontend, features, need_reply, inflight, driver, kick, call };
        harness.install(0);
        harness
    }

    /// Sends inflight region, memory and ring to a new back-end.
    fn install(&mut self, base: u16) {
        let (description, fd) = &self.inflight;
        self.frontend.set_inflight_fd(description, fd.as_raw_fd()).unwrap();
        self.frontend.set_mem_table(&table(&self.driver.memory)).unwrap();
        self.start(base);
    }

    fn start(&mut self, base: u16) {
        self.frontend.set_vring_num(0, SIZE).unwrap();
        self.frontend.set_vring_base(0, base).unwrap();
        self.addresses(false);
        self.frontend.set_vring_call(0, &self.call).unwrap();
        self.frontend.set_vring_err(0, &eventfd()).unwrap();
        self.frontend.set_vring_kick(0, &self.kick).unwrap();
        self.frontend.set_vring_enable(0, true).unwrap();
    }

    fn addresses(&self, logged: bool) {
        let areas = self.driver.layout.areas();
        let user = |gpa: GuestAddress| {
            let region = self.driver.memory.regions().iter().rev().find(|region| region.gpa() <= gpa).unwrap();
            region.user_addr().0 + gpa.unchecked_offset_from(region.gpa())
        };
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = areas.map(user);
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: if logged { VHOST_VRING_F_LOG.bits() } else { 0 },
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: logged.then_some(areas[2].0),
        };
        self.frontend.set_vring_addr(0, &addresses).unwrap();
    }

    fn set_log(&self, log: &Log, fd: &OwnedFd) {
        let (mmap_size, mmap_handle) = (log.size(), fd.as_raw_fd());
        let region = VhostUserDirtyLogRegion { mmap_size, mmap_offset: 0, mmap_handle };
        self.frontend.set_log_base(0, Some(region)).unwrap();
    }

    fn switch_log(&self, on: bool) {
        self.frontend
            .set_features((self.features | if on { VHOST_F_LOG_ALL } else { VirtioFeatures::empty() }).bits())
            .unwrap();
        self.addresses(on);
        self.settle();
    }

    /// Waits until all messages are processed.
    fn settle(&self) {
        self.frontend.get_features().unwrap();
    }

    /// Kills the back-end, starts a new one and restores the device.
    fn crash(&mut self, meanwhile: impl FnOnce(&mut DiskDriver)) {
        self.backend.kill();
        meanwhile(&mut self.driver);
        self.backend.restart();
        self.frontend = connect(self.backend.socket(), self.features, self.need_reply);
        // The inflight region takes precedence over any base (rules I3.4, I4.5).
        self.install(0);
    }

    fn capacity(&mut self) -> u64 {
        let (_, bytes) = self.frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap()) * SECTOR_BYTES
    }
}

#[test]
fn rust_vmm_front_end_stops_and_restarts_our_disk() {
    for (features, need_reply) in [(SPLIT, false), (SPLIT, true), (PACKED, false), (PACKED, true)] {
        let mut harness = Harness::new(Kind::Ours, features, need_reply);
        assert_eq!(harness.capacity(), IMAGE_BYTES);
        let refused = harness.frontend.set_config(0, VhostUserConfigFlags::empty(), &[1; 8]);
        assert_eq!(refused.is_err(), need_reply, "{refused:?}");
        harness.driver.write(16, 0x5a);
        harness.driver.read(16, DATA.unchecked_add(0x4000), 0x5a);
        let base = harness.frontend.get_vring_base(0).unwrap();
        assert_eq!(base & 0x7fff, if features == SPLIT { 2 } else { 6 }, "requests, or their descriptors");
        harness.driver.submit(VIRTIO_BLK_T_IN, 16, DATA.unchecked_add(0x8000));
        // The crate passes only 16 bits of a base, half of that of a packed ring. The inflight region has all of it.
        harness.start(base as u16);
        harness.driver.drain();
        harness.driver.holds(DATA.unchecked_add(0x8000), 0x5a);
        assert!(fs::read(&harness.image).unwrap()[16 * 512..][..8192].iter().all(|byte| *byte == 0x5a));
        harness.frontend.reset_device().unwrap();
        harness.frontend.reset_owner().unwrap();
        harness.settle();
    }
}

#[test]
fn a_log_of_rust_vmm_front_end_marks_exactly_what_our_disk_wrote() {
    for need_reply in [false, true] {
        let mut harness = Harness::new(Kind::Ours, SPLIT, need_reply);
        harness.driver.write(0, 0x11);
        let ((first, first_fd), (second, second_fd)) = (harness.driver.new_log(), harness.driver.new_log());
        harness.set_log(&first, &first_fd);
        harness.driver.read(0, DATA, 0x11);
        assert_eq!(harvest(&first), [0; 0], "it has not switched logging on");
        harness.switch_log(true);
        let signal = eventfd();
        harness.frontend.set_log_fd(signal.as_raw_fd()).unwrap();
        harness.settle();
        for gpa in [DATA.unchecked_add(0x4800), HIGH.unchecked_add(0x20000)] {
            let written = harness.driver.read(0, gpa, 0x11);
            assert!(signal.read().unwrap() > 0);
            assert_eq!(harvest(&first), written);
        }
        harness.set_log(&second, &second_fd);
        // The ring's event word may be written and marked after the last completion.
        harvest(&first);
        let written = harness.driver.read(0, DATA.unchecked_add(0x8000), 0x11);
        assert_eq!((harvest(&first), harvest(&second)), (Vec::new(), written));
        harness.switch_log(false);
        harvest(&second);
        harness.driver.read(0, DATA.unchecked_add(0xc000), 0x11);
        assert_eq!(harvest(&second), [0; 0]);
    }
}

#[test]
fn every_request_of_rust_vmm_front_end_completes_once_after_kills_of_our_disk() {
    const REQUESTS: u64 = 16;
    for features in [SPLIT, PACKED] {
        let mut harness = Harness::new(Kind::OursDirect, features, true);
        harness.driver.write(0, 0x33);
        let reads = |driver: &mut DiskDriver, from: u64| {
            for number in from..from + REQUESTS / 2 {
                let gpa = HIGH.unchecked_add(0x100000 + number * 8192);
                driver.memory.write(gpa, &[0; 8192]).unwrap();
                driver.submit(VIRTIO_BLK_T_IN, 0, gpa);
            }
        };
        for _ in 0..10 {
            // Some requests are in flight or unseen at the kill; others are added while there is no back-end.
            reads(&mut harness.driver, 0);
            harness.crash(|driver| reads(driver, REQUESTS / 2));
            harness.driver.drain();
            (0..REQUESTS).for_each(|number| harness.driver.holds(HIGH.unchecked_add(0x100000 + number * 8192), 0x33));
        }
    }
}

#[test]
fn memory_regions_are_added_and_removed_by_rust_vmm_front_end() {
    const ADDED: GuestAddress = GuestAddress(8 << 30);
    let mut harness = Harness::new(Kind::Ours, SPLIT, true);
    assert!(harness.frontend.get_max_mem_slots().unwrap() >= 509);
    harness.driver.write(0, 0x44);
    let (before, added) = (harness.driver.memory.clone(), region(ADDED));
    for _ in 0..3 {
        harness.driver.memory = Memory::new(before.regions().iter().chain([&added]).cloned()).unwrap();
        harness.frontend.add_mem_region(&describe(&added)).unwrap();
        harness.driver.read(0, ADDED.unchecked_add(REGION - 8192), 0x44);
        harness.frontend.remove_mem_region(&describe(&added)).unwrap();
        harness.driver.memory = before.clone();
        harness.driver.read(0, DATA, 0x44);
    }
    harness.frontend.remove_mem_region(&describe(&added)).unwrap_err();
    harness.driver.read(0, DATA, 0x44);
}

/// Counts configuration changes.
struct ConfigChangeCounter(AtomicU64);

impl VhostUserFrontendReqHandler for ConfigChangeCounter {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(0)
    }
}

#[test]
fn rust_vmm_front_end_receives_config_changes_of_our_disk() {
    let mut harness = Harness::new(Kind::Ours, SPLIT, true);
    let changes = Arc::new(ConfigChangeCounter(AtomicU64::new(0)));
    let mut channel = FrontendReqHandler::new(changes.clone()).unwrap();
    channel.set_reply_ack_flag(true);
    harness.frontend.set_backend_request_fd(&channel.get_tx_raw_fd()).unwrap();
    let (heard, told) = mpsc::channel();
    thread::spawn(move || while channel.handle_request().is_ok_and(|answer| heard.send(answer).is_ok()) {});
    for times in 1..=3 {
        let image = File::options().write(true).open(&harness.image).unwrap();
        image.set_len(IMAGE_BYTES << times).unwrap();
        harness.backend.look_again();
        assert_eq!(told.recv_timeout(DEADLINE), Ok(0));
        assert_eq!((changes.0.load(Ordering::SeqCst), harness.capacity()), (times, IMAGE_BYTES << times));
    }
}

#[test]
fn rust_vmm_front_end_moves_the_device_state_of_our_interface() {
    let lab = Lab::new();
    let names = ["source", "destination"];
    let _backends = names.map(|name| linux_net::backend(&lab, name, "--loopback"));
    let [source, destination] = names.map(|name| connect(&lab.file(&format!("{name}.sock")), SPLIT, true));

    let (mut from, to) = std::io::pipe().unwrap();
    assert!(source.set_device_state_fd(Direction::SAVE, Phase::STOPPED, to.into()).unwrap().is_none());
    let mut state = Vec::new();
    from.read_to_end(&mut state).unwrap();
    source.check_device_state().unwrap();
    assert!(!state.is_empty());

    let load = |state: &[u8]| {
        let (from, mut to) = std::io::pipe().unwrap();
        assert!(destination.set_device_state_fd(Direction::LOAD, Phase::STOPPED, from.into()).unwrap().is_none());
        to.write_all(state).unwrap();
        drop(to);
        destination.check_device_state()
    };
    let last = state.len() - 1;
    let damaged: Vec<u8> = state.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == last)).collect();
    load(&damaged).unwrap_err();
    load(&state).unwrap();
}

#[test]
fn rust_vmm_front_end_starts_and_ends_postcopy_on_our_disk() {
    let lab = Lab::new();
    let image = lab.disk();
    File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let backend = Backend::start(&lab, Kind::OursPostcopy, "backend", &image, 1);
    let mut frontend = connect(backend.socket(), SPLIT, true);
    let driver = DiskDriver::new(SPLIT);
    let userfault = frontend.postcopy_advise().unwrap();
    assert!(userfault.as_raw_fd() >= 0);
    frontend.postcopy_listen().unwrap();
    let bases = frontend.set_mem_table(&table(&driver.memory)).unwrap().expect("addresses of the back-end's own");
    assert!(bases.len() == 2 && bases[0] != bases[1] && !bases.contains(&0), "{bases:x?}");
    frontend.postcopy_ack_mem_regions(FrontendReq::SET_MEM_TABLE).unwrap();
    frontend.get_features().unwrap();
    frontend.postcopy_end().unwrap();
    frontend.get_features().unwrap();
}
