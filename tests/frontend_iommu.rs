//! The vhost-user client with an IOMMU: misses, translations and invalidations (rules T1-T3, L5).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::eventfd::{EfdFlags, EventFd};
use rstest::rstest;
use vhost_migrate::abi::vhost::{VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE};
use vhost_migrate::abi::vhost_user::{
    BackendRequest, FrontendRequest as Code, Header, IotlbMsg, ProtocolFeatures, VHOST_USER_F_PROTOCOL_FEATURES,
};
use vhost_migrate::abi::virtio::{
    VIRTIO_BLK_T_IN, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC,
    VirtioFeatures,
};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, DeviceEvent, FrontendError, Iommu, Mapping, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{Access, Address, GuestAddress, Iotlb, Iova, IovaWindow, LOG_PAGE, Memory, Region};
use vhost_migrate::ring::RingBase;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

#[path = "kit/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "kit/iommu_guest.rs"]
#[allow(dead_code)]
mod iommu_guest;
#[path = "kit/iommu_load.rs"]
#[allow(dead_code)]
mod iommu_load;
#[path = "kit/raw.rs"]
#[allow(dead_code)]
mod raw;
#[path = "kit/served.rs"]
mod served;
#[path = "kit/server.rs"]
#[allow(dead_code)]
mod server;
#[path = "kit/tracked_ring.rs"]
#[allow(dead_code)]
mod tracked_ring;
#[path = "kit/wait.rs"]
mod wait;

use guest::{Guest, HIGH, REGION, Ring, harvest, pages};
use iommu_guest::{BASE, DATA, Random, iova, page_at};
use iommu_load::{DiskLoad, Slot, bytes, contents};
use server::{Process, Server};
use wait::is_readable;

const DISK: u64 = 4 << 20;
const SIZE: u16 = 1024;
const PACKED: VirtioFeatures = VIRTIO_F_RING_PACKED;
const INDIRECT: VirtioFeatures = VIRTIO_RING_F_INDIRECT_DESC;
const TRANSLATED: VirtioFeatures = VIRTIO_F_ACCESS_PLATFORM;
const FEATURES: VirtioFeatures = VIRTIO_F_VERSION_1.union(TRANSLATED);
const EVERYTHING: RangeInclusive<Iova> = Iova(0)..=Iova(u64::MAX);
const DEADLINE: Duration = Duration::from_secs(60);

/// Mappings of an IOMMU: guest-physical page and permission, by I/O virtual page.
#[derive(Default)]
struct IommuTable {
    map: Mutex<BTreeMap<u64, (GuestAddress, Access)>>,
    asked: AtomicU64,
}

impl Iommu for IommuTable {
    fn translate(&self, iova: Iova, _: Access) -> Option<Mapping> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let page = iova.0 / LOG_PAGE;
        let (gpa, permission) = *self.map.lock().unwrap().get(&page)?;
        Some(Mapping { iova: Iova(page * LOG_PAGE), size: LOG_PAGE, gpa, permission })
    }
}

impl IommuTable {
    /// Maps 24 MiB of I/O virtual addresses from [`BASE`] to pages of both regions in random order. Also returns the
    /// free pages.
    fn scattered() -> (IommuTable, Vec<GuestAddress>) {
        let mut pages: Vec<u64> = (0..REGION / LOG_PAGE).flat_map(|page| [page, HIGH.0 / LOG_PAGE + page]).collect();
        let mut dice = Random(11);
        let numbers = (BASE.0 / LOG_PAGE..).take((24 << 20) / LOG_PAGE as usize);
        let map = numbers.map(|number| {
            let gpa = pages.swap_remove(dice.below(pages.len() as u64) as usize) * LOG_PAGE;
            (number, (GuestAddress(gpa), Access::ReadWrite))
        });
        let table = IommuTable { map: Mutex::new(map.collect()), asked: AtomicU64::new(0) };
        (table, pages.iter().map(|page| GuestAddress(page * LOG_PAGE)).collect())
    }

    /// The guest-physical address of an address of the driver.
    fn gpa(&self, address: GuestAddress) -> GuestAddress {
        let (gpa, _) = self.map.lock().unwrap()[&(address.0 / LOG_PAGE)];
        gpa.unchecked_add(address.0 % LOG_PAGE)
    }

    /// The guest-physical pages of a range of the driver.
    fn pages(&self, address: GuestAddress, len: u64) -> impl Iterator<Item = u64> {
        pages(address, len).map(|page| self.gpa(GuestAddress(page * LOG_PAGE)).0 / LOG_PAGE)
    }

    fn set(&self, address: GuestAddress, to: Option<(GuestAddress, Access)>) {
        let mut map = self.map.lock().unwrap();
        match to {
            Some(to) => map.insert(address.0 / LOG_PAGE, to),
            None => map.remove(&(address.0 / LOG_PAGE)),
        };
    }
}

/// A guest behind an IOMMU, and its device.
struct IommuSetup {
    guest: Guest,
    table: Arc<IommuTable>,
    free: Vec<GuestAddress>,
    device: UserDevice,
    features: VirtioFeatures,
}

impl IommuSetup {
    fn new(socket: &Path, features: VirtioFeatures) -> IommuSetup {
        let mut device = UserDevice::connect(socket, UserOptions::default(), Instant::now() + DEADLINE).unwrap();
        let (table, free) = IommuTable::scattered();
        let (guest, table) = (Guest::new(), Arc::new(table));
        device.set_iommu(table.clone());
        device.set_features(FEATURES | features).unwrap();
        device.set_memory(&guest.memory).unwrap();
        assert!(device.set_inflight(2, SIZE, None).unwrap());
        IommuSetup { guest, table, free, device, features }
    }

    /// Returns guest memory as the driver sees it, contiguous.
    fn view(&self, address: GuestAddress, len: u64) -> Memory {
        let iotlb = Iotlb::default();
        for (page, (gpa, _)) in self.table.map.lock().unwrap().iter() {
            let user = self.guest.user(*gpa);
            iotlb.update(Iova(page * LOG_PAGE), LOG_PAGE, user, Some(Access::ReadWrite)).unwrap();
        }
        let area = [(iova(address), len, Access::Read)];
        IovaWindow::open(&self.guest.memory, &iotlb, &area, None).unwrap().memory().clone()
    }

    /// Starts a ring. Returns it with its error fd.
    fn ring(&mut self, index: u16) -> (Ring, Arc<OwnedFd>) {
        let at = BASE.unchecked_add(u64::from(index) << 20);
        let ring = Ring::at(&self.view(BASE, 24 << 20), at, index.into(), SIZE, self.features);
        let base = RingBase::from_bits(ring.initial_base());
        let error = self.start(&ring, base);
        (ring, error)
    }

    fn start(&mut self, ring: &Ring, base: RingBase) -> Arc<OwnedFd> {
        let own = |fd: &EventFd| Arc::new(fd.as_fd().try_clone_to_owned().unwrap());
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let error: Arc<OwnedFd> = Arc::new(EventFd::from_flags(flags).unwrap().into());
        let setup = RingSetup {
            size: SIZE,
            desc: ring.layout.desc,
            avail: ring.layout.avail,
            used: ring.layout.used,
            kick: own(&ring.kick),
            call: own(&ring.call),
            error: Some(error.clone()),
            base,
        };
        self.device.start_ring(ring.index as u16, setup).unwrap();
        error
    }

    /// Returns the guest-physical pages of a ring that the device writes.
    fn written_of(&self, ring: &Ring) -> BTreeSet<u64> {
        let areas = match self.features.contains(PACKED) {
            false => vec![(ring.layout.used, 6 + 8 * u64::from(SIZE))],
            true => vec![(ring.layout.desc, 16 * u64::from(SIZE)), (ring.layout.used, 4)],
        };
        areas.iter().flat_map(|(at, len)| self.table.pages(*at, *len)).collect()
    }

    /// Reads two sectors and checks the data.
    fn reads(&self, ring: &mut Ring, slot: &Slot) {
        let memory = self.view(slot.at(), Slot::BYTES);
        slot.add(ring, &memory, VIRTIO_BLK_T_IN, 1, 1024, false);
        ring.serve_one();
        assert_eq!(bytes(&memory, slot.data(), 1024), contents(1, 1024));
    }
}

fn server() -> (Server, PathBuf) {
    let server = Server::disk(DISK, |options| options.iommu = true);
    let socket = server.folder.path().join("socket");
    (server, socket)
}

/// Waits for one event.
fn event(device: &mut UserDevice) -> Vec<DeviceEvent> {
    assert!(is_readable(&device.events_fd().unwrap().unwrap(), 60_000u16), "no event came");
    device.take_events()
}

/// Rules T1.1, L5.2.
#[rstest]
fn requests_through_scattered_pages_are_correct_and_logged_by_guest_physical_address(
    #[values(VirtioFeatures::empty(), PACKED)] kind: VirtioFeatures,
    #[values(VirtioFeatures::empty(), INDIRECT)] indirect: VirtioFeatures,
) {
    let (server, socket) = server();
    let mut setup = IommuSetup::new(&socket, kind | indirect);
    let (mut ring, _) = setup.ring(0);
    let (log, fd) = Log::create(setup.guest.memory.end()).unwrap();
    let log = Arc::new(log);
    let mut load = DiskLoad::new(DISK);
    let view = setup.view(BASE, 24 << 20);
    let table = setup.table.clone();
    let pages = |at, len| table.pages(at, len);
    // The first rounds are not logged.
    load.round(&mut ring, &view, pages, !indirect.is_empty());
    load.by_device.clear();
    setup.device.start_logging(&log, fd.as_fd()).unwrap();
    for round in 0..40 {
        load.round(&mut ring, &view, pages, !indirect.is_empty());
        // Translations may be invalidated at any time.
        if round % 10 == 5 {
            setup.device.invalidate(EVERYTHING).unwrap();
        }
    }
    // The ring continues after a restart.
    let base = setup.device.stop_ring(0).unwrap();
    assert_eq!(base.bits(), ring.drained_base());
    setup.start(&ring, base);
    load.round(&mut ring, &view, pages, !indirect.is_empty());
    setup.device.stop_ring(0).unwrap();
    setup.device.stop_logging().unwrap();
    let (marked, of_ring) = (harvest(&log), setup.written_of(&ring));
    assert_eq!(load.by_device.difference(&marked).count(), 0, "written and not logged");
    let unknown = marked.difference(&load.by_device).filter(|page| !of_ring.contains(page)).count();
    assert_eq!(unknown, 0, "logged and not written");
    assert!(of_ring.intersection(&marked).count() > 0, "the ring is logged where it lies");
    assert_eq!(log.out_of_range(), 0);
    assert!(setup.table.asked.load(Ordering::SeqCst) > 100, "nothing was known before");
    assert!(std::fs::read(server.image()).unwrap() == load.disk, "other data was written");
}

/// Rule T3.1.
#[rstest]
fn no_page_is_accessed_after_invalidate_has_returned(#[values(VirtioFeatures::empty(), PACKED)] kind: VirtioFeatures) {
    let (_server, socket) = server();
    let mut setup = IommuSetup::new(&socket, kind);
    let (mut ring, _) = setup.ring(0);
    let (mut dice, mut taken) = (Random(3), BTreeSet::new());
    for _ in 0..40 {
        let memory = setup.view(DATA, 4 << 20);
        let mut wanted = Vec::new();
        for number in 0..16 {
            let (sector, len) = (dice.below(DISK / 512 - 128), (2 + dice.below(100)) * 512);
            Slot(number).add(&mut ring, &memory, VIRTIO_BLK_T_IN, sector, len, false);
            wanted.push((Slot(number), sector, len));
        }
        ring.kick();
        // Half of the requests get another data page while they run.
        let mut moved = BTreeSet::new();
        for (slot, _, len) in wanted.iter().step_by(2) {
            let page = page_at(slot.data().unchecked_add(dice.below(*len)));
            let to = setup.free.swap_remove(dice.below(setup.free.len() as u64) as usize);
            let was = setup.table.gpa(page);
            setup.table.set(page, Some((to, Access::ReadWrite)));
            setup.device.invalidate(iova(page)..=iova(page.unchecked_add(LOG_PAGE - 1))).unwrap();
            setup.guest.memory.write(was, &[0xee; LOG_PAGE as usize]).unwrap();
            taken.insert(was);
            taken.remove(&to);
            setup.free.push(was);
            moved.insert(page);
        }
        assert_eq!(ring.completions(16).len(), 16);
        for gpa in &taken {
            let is_as_it_was = setup.guest.bytes(*gpa, LOG_PAGE as usize).iter().all(|byte| *byte == 0xee);
            assert!(is_as_it_was, "{:#x} was written after invalidate had returned", gpa.0);
        }
        // Data in unmoved pages has arrived.
        let memory = setup.view(DATA, 4 << 20);
        for (slot, sector, len) in wanted {
            assert_eq!(bytes(&memory, slot.status(), 1), [0]);
            let (found, right) = (bytes(&memory, slot.data(), len), contents(sector, len));
            let stays = |at: &u64| !moved.contains(&page_at(slot.data().unchecked_add(*at)));
            assert!((0..len).filter(stays).all(|at| found[at as usize] == right[at as usize]), "other data was read");
        }
    }
}

/// Rule T1.4: an unmapped page, and a read-only page.
#[rstest]
fn an_access_that_the_iommu_denies_breaks_its_ring_and_is_an_event(#[values(false, true)] readable: bool) {
    let (_server, socket) = server();
    let mut setup = IommuSetup::new(&socket, VirtioFeatures::empty());
    let ((mut bad, error), (mut good, other)) = (setup.ring(0), setup.ring(1));
    setup.reads(&mut bad, &Slot(0));
    let page = page_at(Slot(1).data());
    let gpa = setup.table.gpa(page);
    let memory = setup.view(DATA, 1 << 20);
    setup.table.set(page, readable.then_some((gpa, Access::Read)));
    let before = setup.guest.bytes(gpa, LOG_PAGE as usize);
    Slot(1).add(&mut bad, &memory, VIRTIO_BLK_T_IN, 77, 1024, false);
    bad.kick();
    assert!(is_readable(&error, 60_000u16), "the ring did not break");
    assert_eq!(event(&mut setup.device), [DeviceEvent::AccessFailed(Iova(Slot(1).data().0))]);
    assert_eq!(setup.guest.bytes(gpa, LOG_PAGE as usize), before, "it was written");
    setup.table.set(page, Some((gpa, Access::ReadWrite)));
    setup.reads(&mut good, &Slot(2));
    assert!(!is_readable(&other, PollTimeout::ZERO));
    // After a restart with the page mapped the ring continues.
    let base = setup.device.stop_ring(0).unwrap();
    setup.device.invalidate(iova(page)..=iova(page)).unwrap();
    setup.start(&bad, base);
    bad.completion();
    assert_eq!(bytes(&memory, Slot(1).data(), 1024), contents(77, 1024));
}

/// Rules T1.8, L5.2, L15.4, I3.3, I4.5: the restarted back-end has no translations.
#[rstest]
fn a_restarted_back_end_requests_translations_again_and_completes_open_requests(
    #[values(VirtioFeatures::empty(), PACKED)] kind: VirtioFeatures,
    #[values(false, true)] logged: bool,
) {
    let folder = tempfile::tempdir().unwrap();
    let image = server::disk_options(folder.path(), DISK, |_| {}).image;
    let socket = folder.path().join("socket");
    let start = || Process::start(&socket, &image, &["--iommu", "--queues", "2"]);
    let mut backend = start();
    let mut setup = IommuSetup::new(&socket, kind);
    let (mut ring, _) = setup.ring(0);
    let (log, fd) = Log::create(setup.guest.memory.end()).unwrap();
    let log = Arc::new(log);
    if logged {
        setup.device.start_logging(&log, fd.as_fd()).unwrap();
    }
    let (memory, of_ring) = (setup.view(DATA, 8 << 20), setup.written_of(&ring));
    let mut dice = Random(5);
    for round in 0..12u64 {
        let mut wanted = Vec::new();
        for number in 0..32 {
            let (sector, len) = (dice.below(DISK / 512 - 128), (2 + dice.below(100)) * 512);
            Slot(number).add(&mut ring, &memory, VIRTIO_BLK_T_IN, sector, len, false);
            wanted.push((Slot(number), sector, len));
        }
        ring.kick();
        // At a different stage in each round.
        let early = ring.completions((round * 3 % 32) as usize).len();
        if logged {
            harvest(&log);
        }
        drop(backend);
        backend = start();
        setup.device.reconnect(Instant::now() + DEADLINE).unwrap();
        assert_eq!(ring.completions(32 - early).len(), 32 - early);
        for (slot, sector, len) in wanted {
            assert_eq!(bytes(&memory, slot.status(), 1), [0]);
            assert!(bytes(&memory, slot.data(), len) == contents(sector, len), "other data was read");
        }
        if logged {
            let marked = harvest(&log);
            assert!(of_ring.is_subset(&marked), "what the dead one wrote of the ring is not marked");
        }
    }
    assert_eq!(log.out_of_range(), 0, "an I/O virtual address was marked");
    assert_eq!(setup.device.stop_ring(0).unwrap().bits(), ring.drained_base());
}

/// Rule T1.7.
#[test]
fn access_platform_needs_an_iommu_and_a_back_end_channel() {
    let (_server, socket) = server();
    let usual = UserOptions::default();
    let mut device = UserDevice::connect(&socket, usual, Instant::now() + DEADLINE).unwrap();
    let error = device.set_features(FEATURES).unwrap_err();
    assert!(matches!(error, FrontendError::NoIommu), "{error}");
    assert!(error.to_string().contains("set_iommu"), "{error}");
    device.set_features(FEATURES & !TRANSLATED).unwrap();
    device.invalidate(EVERYTHING).expect("there is nothing to forget");
    drop(device);
    let protocol_features = usual.protocol_features & !ProtocolFeatures::BACKEND_REQ;
    let options = usual.with_protocol_features(protocol_features);
    let mut device = UserDevice::connect(&socket, options, Instant::now() + DEADLINE).unwrap();
    device.set_iommu(Arc::new(IommuTable::default()));
    let error = device.set_features(FEATURES).unwrap_err();
    assert!(matches!(error, FrontendError::NotOffered { .. }), "{error}");
    device.set_features(FEATURES & !TRANSLATED).unwrap();
}

/// Protocol features of [`ManualBackend`].
const PROTOCOL: ProtocolFeatures =
    ProtocolFeatures::REPLY_ACK.union(ProtocolFeatures::BACKEND_REQ).union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// A back-end that the test drives: a connection after negotiation and SET_MEM_TABLE, and its back-end channel.
struct ManualBackend {
    connection: raw::RawFrontend,
    channel: raw::RawFrontend,
}

impl ManualBackend {
    /// Connects a device with `iommu` to a back-end driven by the test.
    fn connect(iommu: Arc<dyn Iommu>) -> (ManualBackend, UserDevice, Guest) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let backend = std::thread::spawn(move || ManualBackend::negotiate(&listener));
        let path = folder.path().join("s");
        let mut device = UserDevice::connect(path, UserOptions::default(), Instant::now() + DEADLINE).unwrap();
        device.set_iommu(iommu);
        device.set_features(FEATURES).unwrap();
        let guest = Guest::new();
        device.set_memory(&guest.memory).unwrap();
        (backend.join().unwrap(), device, guest)
    }

    fn negotiate(listener: &UnixListener) -> ManualBackend {
        let own = |socket: UnixStream| {
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            raw::RawFrontend { socket }
        };
        let connection = own(listener.accept().unwrap().0);
        let mut channel = None;
        loop {
            let (header, _, fd) = connection.receive();
            let code = Code(header.request);
            let number = match code {
                Code::GET_FEATURES => (FEATURES | VHOST_USER_F_PROTOCOL_FEATURES).bits(),
                Code::GET_PROTOCOL_FEATURES => PROTOCOL.bits(),
                Code::GET_MAX_MEM_SLOTS => 128,
                _ if header.flags & Header::FLAG_NEED_REPLY != 0 => 0,
                _ => continue,
            };
            if code == Code::SET_BACKEND_REQ_FD {
                channel = fd.map(|fd| own(UnixStream::from(fd)));
            }
            connection.send(code, Header::REPLY_FLAGS, number.as_bytes(), &[]);
            if code == Code::SET_MEM_TABLE {
                return ManualBackend { connection, channel: channel.unwrap() };
            }
        }
    }

    fn send_miss(&self, Iova(iova): Iova, perm: u8, flags: u32) {
        let miss = IotlbMsg { iova, perm, kind: VHOST_IOTLB_MISS, ..IotlbMsg::new_zeroed() };
        self.channel.send(Code(BackendRequest::IOTLB_MSG.0), flags, miss.as_bytes(), &[]);
    }

    /// Receives an acknowledgement on the channel.
    fn receive_ack(&self) -> u64 {
        u64::read_from_bytes(&self.channel.reply(Code(BackendRequest::IOTLB_MSG.0))).unwrap()
    }

    /// Receives the next IOTLB message and acknowledges it if it has need-reply.
    fn receive_iotlb_message(&self) -> IotlbMsg {
        let (header, payload, _) = self.connection.receive();
        assert_eq!(Code(header.request), Code::IOTLB_MSG);
        if header.flags & Header::FLAG_NEED_REPLY != 0 {
            self.connection.send(Code::IOTLB_MSG, Header::REPLY_FLAGS, 0u64.as_bytes(), &[]);
        }
        IotlbMsg::read_from_bytes(&payload).unwrap()
    }
}

/// Maps everything to itself.
struct Identity;

impl Iommu for Identity {
    fn translate(&self, iova: Iova, _: Access) -> Option<Mapping> {
        let all = Mapping { iova: Iova(0), size: 1 << 40, gpa: GuestAddress(0), permission: Access::ReadWrite };
        (iova != Iova(u64::MAX)).then_some(all)
    }
}

/// Rules T1.3 and T2.5.
#[test]
fn a_mapping_larger_than_a_region_is_sent_region_by_region() {
    let (backend, mut device, guest) = ManualBackend::connect(Arc::new(Identity));
    for (iova, start) in [(Iova(0x1234), GuestAddress(0)), (Iova(HIGH.0 + REGION - 1), HIGH)] {
        backend.send_miss(iova, 3, raw::NEED_REPLY);
        let told = backend.receive_iotlb_message();
        assert_eq!((told.iova, told.size, told.uaddr), (start.0, REGION, guest.user(start).0));
        assert_eq!((told.kind, told.perm), (VHOST_IOTLB_UPDATE, 3));
        assert_eq!(backend.receive_ack(), 0);
    }
    // Unmapped memory, an address outside the mapping, invalid permissions, and a message kind that back-ends do not
    // send.
    for (iova, perm) in [(REGION, 1), (1 << 40, 1), (u64::MAX, 1), (0x1000, 0), (0x1000, 4)] {
        let iova = Iova(iova);
        backend.send_miss(iova, perm, raw::NEED_REPLY);
        assert_eq!(backend.receive_ack(), 1, "{iova:#x} {perm}");
        assert_eq!(event(&mut device), [DeviceEvent::AccessFailed(iova)]);
    }
    let update = IotlbMsg { kind: VHOST_IOTLB_UPDATE, ..IotlbMsg::new_zeroed() };
    let code = Code(BackendRequest::IOTLB_MSG.0);
    backend.channel.send(code, raw::NEED_REPLY, update.as_bytes(), &[]);
    assert_eq!(backend.receive_ack(), 1);
    backend.channel.send(code, raw::NEED_REPLY, &[0; 31], &[]);
    assert_eq!(backend.receive_ack(), 1);
    assert!(!is_readable(&backend.connection, PollTimeout::ZERO), "something was sent for what was refused");
    let everything = std::thread::spawn(move || device.invalidate(EVERYTHING));
    let said = [backend.receive_iotlb_message(), backend.receive_iotlb_message()]
        .map(|told| (told.kind, told.iova, told.size));
    let kind = VHOST_IOTLB_INVALIDATE;
    assert_eq!(said, [(kind, 0, u64::MAX), (kind, u64::MAX, 1)]);
    everything.join().unwrap().unwrap();
}

/// An IOMMU that returns a mapping some time after the look-up.
struct SlowIommu {
    gpa: AtomicU64,
    looked: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl Iommu for SlowIommu {
    fn translate(&self, iova: Iova, _: Access) -> Option<Mapping> {
        let gpa = GuestAddress(self.gpa.load(Ordering::SeqCst));
        self.looked.lock().unwrap().send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        Some(Mapping { iova, size: LOG_PAGE, gpa, permission: Access::ReadWrite })
    }
}

/// Rule T3.5: otherwise the back-end would use a translation after its invalidation.
#[test]
fn a_translation_found_before_an_invalidation_is_not_sent_after_it() {
    let ((looked, has_looked), (go_on, goes_on)) = (channel(), channel());
    let slow = SlowIommu { gpa: AtomicU64::new(0x1000), looked: Mutex::new(looked), go_on: Mutex::new(goes_on) };
    let slow = Arc::new(slow);
    let (backend, device, guest) = ManualBackend::connect(slow.clone());
    backend.send_miss(Iova(0x7000), 3, raw::VERSION);
    has_looked.recv_timeout(DEADLINE).unwrap();
    // The old mapping was looked up and is not sent yet. Now the driver unmaps the page.
    slow.gpa.store(0x2000, Ordering::SeqCst);
    let invalidates: JoinHandle<UserDevice> = std::thread::spawn(move || {
        let mut device = device;
        device.invalidate(Iova(0x7000)..=Iova(0x7fff)).unwrap();
        device
    });
    assert!(!is_readable(&backend.connection, 300u16), "the invalidation overtakes the translation");
    go_on.send(()).unwrap();
    let told = backend.receive_iotlb_message();
    assert_eq!((told.kind, told.uaddr), (VHOST_IOTLB_UPDATE, guest.user(GuestAddress(0x1000)).0));
    assert_eq!(backend.receive_iotlb_message().kind, VHOST_IOTLB_INVALIDATE);
    let device = invalidates.join().unwrap();
    // Later translations use the new mapping.
    backend.send_miss(Iova(0x7000), 3, raw::VERSION);
    go_on.send(()).unwrap();
    assert_eq!(backend.receive_iotlb_message().uaddr, guest.user(GuestAddress(0x2000)).0);
    drop(device);
}

/// Acknowledgements are not lost if the back-end reads them late.
#[test]
fn misses_may_arrive_faster_than_their_acknowledgements_are_read() {
    const MISSES: u64 = 30_000;
    let (backend, mut device, _guest) = ManualBackend::connect(Arc::new(Identity));
    let asks = raw::RawFrontend { socket: backend.channel.socket.try_clone().unwrap() };
    let asking = std::thread::spawn(move || {
        let asker =
            ManualBackend { connection: raw::RawFrontend { socket: asks.socket.try_clone().unwrap() }, channel: asks };
        (0..MISSES).for_each(|number| asker.send_miss(Iova(number % 4096 * LOG_PAGE), 3, raw::NEED_REPLY));
    });
    // Translations sent before the channel is full. No acknowledgement is read.
    let mut told = 0;
    while is_readable(&backend.connection, 500u16) {
        backend.receive_iotlb_message();
        told += 1;
    }
    assert!(told < MISSES, "there was room for all answers");
    for _ in 0..MISSES {
        while is_readable(&backend.connection, PollTimeout::ZERO) {
            backend.receive_iotlb_message();
        }
        assert_eq!(backend.receive_ack(), 0);
    }
    asking.join().unwrap();
    assert_eq!(device.take_events(), []);
}

/// The back-end sends misses without reading.
/// Rule T1.8.
#[test]
fn translations_are_sent_later_when_the_socket_is_full() {
    const PAGES: u64 = 4000;
    let table = Arc::new(IommuTable::default());
    (0..PAGES).map(|page| GuestAddress(page * LOG_PAGE)).for_each(|gpa| table.set(gpa, Some((gpa, Access::ReadWrite))));
    let (backend, mut device, _guest) = ManualBackend::connect(table.clone());
    let asks = raw::RawFrontend { socket: backend.channel.socket.try_clone().unwrap() };
    let asking = std::thread::spawn(move || {
        let asker =
            ManualBackend { connection: raw::RawFrontend { socket: asks.socket.try_clone().unwrap() }, channel: asks };
        (0..PAGES).for_each(|page| asker.send_miss(Iova(page * LOG_PAGE), 3, raw::VERSION));
    });
    // The socket is full after some translations; further misses are read for a while.
    let end = Instant::now() + DEADLINE;
    while table.asked.load(Ordering::SeqCst) < 1000 {
        assert!(Instant::now() < end, "it hears no more");
        std::thread::yield_now();
    }
    // The invalidation is not lost among the translations.
    let invalidates = std::thread::spawn(move || {
        device.invalidate(Iova(0)..=Iova(LOG_PAGE - 1)).unwrap();
        device
    });
    let (mut told, mut forgotten) = (BTreeSet::new(), 0);
    while told.len() < PAGES as usize || forgotten == 0 {
        let IotlbMsg { iova, kind, .. } = backend.receive_iotlb_message();
        match kind {
            VHOST_IOTLB_UPDATE => assert!(told.insert(iova), "{iova:#x} was told twice"),
            _ => forgotten += 1,
        }
    }
    asking.join().unwrap();
    let mut device = invalidates.join().unwrap();
    assert!(table.asked.load(Ordering::SeqCst) > PAGES, "there was room for all of them");
    assert_eq!((forgotten, device.take_events()), (1, vec![]));
}

/// Rule T3.9: while the feature is off, changes are not sent.
#[test]
fn acknowledging_access_platform_again_invalidates_all_translations() {
    let (backend, mut device, _guest) = ManualBackend::connect(Arc::new(Identity));
    backend.send_miss(Iova(0x1000), 3, raw::VERSION);
    assert_eq!(backend.receive_iotlb_message().kind, VHOST_IOTLB_UPDATE);
    let without = std::thread::spawn(move || {
        device.set_features(FEATURES).unwrap();
        device.set_features(FEATURES & !TRANSLATED).unwrap();
        device.invalidate(EVERYTHING).unwrap();
        device.set_features(FEATURES).unwrap();
    });
    for features in [FEATURES, FEATURES & !TRANSLATED, FEATURES] {
        let (header, payload, _) = backend.connection.receive();
        assert_eq!(
            (Code(header.request), payload),
            (Code::SET_FEATURES, (features | VirtioFeatures::from_bits_retain(1 << 30)).as_bytes().to_vec())
        );
        backend.connection.send(Code::SET_FEATURES, Header::REPLY_FLAGS, 0u64.as_bytes(), &[]);
    }
    let said = [backend.receive_iotlb_message(), backend.receive_iotlb_message()]
        .map(|told| (told.kind, told.iova, told.size));
    assert_eq!(said, [(VHOST_IOTLB_INVALIDATE, 0, u64::MAX), (VHOST_IOTLB_INVALIDATE, u64::MAX, 1)]);
    without.join().unwrap();
}

/// Rule T1.6: the mapping was removed after the acknowledgement and before the translation was sent.
#[test]
fn a_deferred_translation_that_was_unmapped_is_sent_without_permission() {
    const PAGES: u64 = 1000;
    const GONE: GuestAddress = GuestAddress((PAGES - 1) * LOG_PAGE);
    let table = Arc::new(IommuTable::default());
    (0..PAGES).map(|page| GuestAddress(page * LOG_PAGE)).for_each(|gpa| table.set(gpa, Some((gpa, Access::ReadWrite))));
    let (backend, mut device, guest) = ManualBackend::connect(table.clone());
    for page in 0..PAGES {
        backend.send_miss(Iova(page * LOG_PAGE), 3, raw::NEED_REPLY);
        assert_eq!(backend.receive_ack(), 0);
    }
    table.set(GONE, None);
    let told: BTreeMap<u64, IotlbMsg> =
        (0..PAGES).map(|_| backend.receive_iotlb_message()).map(|told| (told.iova, told)).collect();
    assert!(table.asked.load(Ordering::SeqCst) > PAGES, "there was room for all of them");
    let gone = &told[&GONE.0];
    assert_eq!(
        (gone.kind, gone.size, gone.perm, gone.uaddr),
        (VHOST_IOTLB_UPDATE, LOG_PAGE, 0, guest.user(GuestAddress(0)).0)
    );
    assert!(told.values().filter(|told| told.iova != GONE.0).all(|told| told.perm == 3));
    assert_eq!(event(&mut device), [DeviceEvent::AccessFailed(iova(GONE))]);
}

#[test]
fn a_translation_with_too_little_permission_is_sent_and_is_an_event() {
    let table = Arc::new(IommuTable::default());
    table.set(GuestAddress(0x1000), Some((GuestAddress(0x1000), Access::Read)));
    let iova = Iova(0x1234);
    let (backend, mut device, _guest) = ManualBackend::connect(table);
    backend.send_miss(iova, 3, raw::NEED_REPLY);
    let told = backend.receive_iotlb_message();
    assert_eq!((told.kind, told.iova, told.perm), (VHOST_IOTLB_UPDATE, 0x1000, 1));
    assert_eq!(backend.receive_ack(), 0);
    assert_eq!(event(&mut device), [DeviceEvent::AccessFailed(iova)]);
    backend.send_miss(iova, 1, raw::NEED_REPLY);
    assert_eq!((backend.receive_iotlb_message().perm, backend.receive_ack(), device.take_events()), (1, 0, vec![]));
}

/// The memory table consists of many messages; the back-end may send a miss in between.
/// Rule T3.10.
#[test]
fn translations_are_deferred_until_the_memory_table_is_sent() {
    const MORE: u64 = 70;
    const FIRST: u64 = 1 << 36;
    let (backend, mut device, guest) = ManualBackend::connect(Arc::new(Identity));
    let share = |gpa| Region::create(gpa, LOG_PAGE);
    let more = (0..MORE).map(|number| Arc::new(share(GuestAddress(FIRST + number * REGION)).unwrap()));
    let memory = Memory::new(guest.memory.regions().iter().cloned().chain(more)).unwrap();
    let user = memory.regions().last().unwrap().user_addr();
    let gives = std::thread::spawn(move || device.set_memory(&memory).map(|()| device));
    let region = || assert_eq!(Code(backend.connection.receive().0.request), Code::ADD_MEM_REG);
    let acknowledge = || backend.connection.send(Code::ADD_MEM_REG, Header::REPLY_FLAGS, 0u64.as_bytes(), &[]);
    // The front-end waits for these acknowledgements before it continues.
    (0..64).for_each(|_| region());
    backend.send_miss(Iova(FIRST + (MORE - 1) * REGION), 3, raw::NEED_REPLY);
    assert_eq!(backend.receive_ack(), 0);
    (0..64).for_each(|_| acknowledge());
    (64..MORE).for_each(|_| region());
    (64..MORE).for_each(|_| acknowledge());
    let told = backend.receive_iotlb_message();
    assert_eq!((told.kind, told.size, told.uaddr), (VHOST_IOTLB_UPDATE, LOG_PAGE, user.0));
    gives.join().unwrap().unwrap();
}
