//! A guest without a CPU: memory in memfds, rings in it, and the messages that pass both to a back-end.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::vhost_user::{
    FrontendRequest as Code, InflightDescription, LogDescription, MemRegMsg, MemoryHeader, MemoryRegion,
    ProtocolFeatures, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VringAddr, VringState,
};
use vhost_migrate::abi::virtio::{
    BlkRequestHeader, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VirtioFeatures,
};
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::inflight::{self, recover_packed, recover_split};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region, UserAddress};
use vhost_migrate::ring::{
    Buffer, Chain, DeviceRing, DriverRing, DriverRingState, Position, RingBase, RingLayout, SplitLayout,
};
use zerocopy::IntoBytes;

use crate::raw::{DEADLINE, RawFrontend, VERSION};
use crate::tracked_ring::TrackedRing;
use crate::wait::is_readable;

pub(crate) const LOG_ALL: VirtioFeatures = VHOST_F_LOG_ALL;
pub(crate) const PROTOCOL_FEATURES_BIT: VirtioFeatures = VHOST_USER_F_PROTOCOL_FEATURES;
pub(crate) const BASIC: VirtioFeatures = PROTOCOL_FEATURES_BIT.union(VIRTIO_F_VERSION_1);
/// The features that a driver always acknowledges, with split and with packed rings.
pub(crate) const SPLIT: VirtioFeatures = BASIC;
pub(crate) const PACKED: VirtioFeatures = BASIC.union(VIRTIO_F_RING_PACKED);
/// Size of each of the two regions, bytes. The second begins above 4 GiB.
pub(crate) const REGION: u64 = 16 << 20;
pub(crate) const HIGH: GuestAddress = GuestAddress(1 << 32);
pub(crate) const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Shared guest memory.
pub(crate) struct Guest {
    pub(crate) memory: Memory,
}

impl Guest {
    pub(crate) fn new() -> Guest {
        let share = |gpa| Arc::new(Region::create(gpa, REGION).unwrap());
        Guest { memory: Memory::new([share(GuestAddress(0)), share(HIGH)]).unwrap() }
    }

    pub(crate) fn describe(region: &Region) -> MemoryRegion {
        MemoryRegion {
            guest_phys_addr: region.gpa().0,
            memory_size: region.size(),
            userspace_addr: region.user_addr().0,
            mmap_offset: region.shared().unwrap().1,
        }
    }

    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.memory.regions().iter().map(|region| region.shared().unwrap().0).collect()
    }

    /// Payload of SET_MEM_TABLE.
    pub(crate) fn table(&self) -> Vec<u8> {
        let regions = self.memory.regions();
        let mut payload = MemoryHeader { nregions: regions.len() as u32, padding: 0 }.as_bytes().to_vec();
        for region in regions {
            payload.extend(Guest::describe(region).as_bytes());
        }
        payload
    }

    pub(crate) fn send_table(&self, client: &RawFrontend) {
        assert_eq!(client.acknowledged(Code::SET_MEM_TABLE, &self.table(), &self.fds()), 0);
    }

    /// The front-end's address of a guest-physical one.
    pub(crate) fn user(&self, gpa: GuestAddress) -> UserAddress {
        let in_region = |region: &Arc<Region>| {
            let offset = gpa.checked_offset_from(region.gpa()).filter(|offset| *offset < region.size())?;
            region.user_addr().checked_add(offset)
        };
        self.memory.regions().iter().find_map(in_region).unwrap()
    }

    pub(crate) fn bytes(&self, gpa: GuestAddress, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(gpa, &mut bytes).unwrap();
        bytes
    }

    /// All of guest memory.
    pub(crate) fn snapshot(&self) -> Vec<Vec<u8>> {
        self.memory.regions().iter().map(|region| self.bytes(region.gpa(), region.size() as usize)).collect()
    }
}

/// A ring in guest memory. Each index has 1 MiB of its own, after the first MiB.
pub(crate) struct Ring {
    pub(crate) index: u32,
    /// Addresses of its parts; of a packed ring the event areas instead of avail and used ring.
    pub(crate) layout: SplitLayout,
    pub(crate) driver: DriverRing,
    features: VirtioFeatures,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// `log_guest_addr`, while F_LOG is set.
    pub(crate) log_at: Option<GuestAddress>,
}

impl Ring {
    pub(crate) fn new(guest: &Guest, index: u32, size: u16, features: VirtioFeatures) -> Ring {
        let at = GuestAddress((u64::from(index) + 1) << 20);
        Ring::at(&guest.memory, at, index, size, features)
    }

    /// A new ring that the back-end serves.
    pub(crate) fn started(
        client: &RawFrontend,
        guest: &Guest,
        index: u32,
        size: u16,
        features: VirtioFeatures,
    ) -> Ring {
        let ring = Ring::new(guest, index, size, features);
        ring.start(client, guest);
        ring
    }

    /// One at any address of any memory.
    pub(crate) fn at(memory: &Memory, at: GuestAddress, index: u32, size: u16, features: VirtioFeatures) -> Ring {
        let layout =
            SplitLayout { size, desc: at, avail: at.unchecked_add(0x4_0000), used: at.unchecked_add(0x8_0000) };
        let eventfd = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        let SplitLayout { desc, avail, used, .. } = layout;
        let ring = RingLayout::new(features, size, [desc, avail, used]);
        let driver = DriverRing::new(memory, ring, features).unwrap();
        Ring { index, layout, driver, features, kick: eventfd(), call: eventfd(), log_at: None }
    }

    /// The base of a ring that was never used.
    pub(crate) fn initial_base(&self) -> u32 {
        RingBase::initial(self.features).bits()
    }

    /// The base after the first `requests`, each of `slots` descriptors.
    pub(crate) fn base_after(&self, requests: u16, slots: u16) -> u32 {
        match self.driver {
            DriverRing::Split(_) => RingBase::split(requests).bits(),
            DriverRing::Packed(_) => {
                let Position { index, wrap } = Position::START.after(requests * slots, self.layout.size);
                RingBase::packed(index, wrap, index, wrap).bits()
            }
        }
    }

    /// Flags of the descriptor at `index` of a packed ring.
    pub(crate) fn flags(&self, guest: &Guest, index: u16) -> u16 {
        let bytes = guest.bytes(self.layout.desc.unchecked_add(16 * u64::from(index) + 14), 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Returns true if the descriptor at `position` of a packed ring is used in the position's round.
    pub(crate) fn is_used(&self, guest: &Guest, position: Position) -> bool {
        self.flags(guest, position.index) & 0x8080 == if position.wrap { 0x8080 } else { 0 }
    }

    /// The used index of a split ring in memory.
    pub(crate) fn used_index(&self, guest: &Guest) -> u16 {
        let bytes = guest.bytes(self.layout.used.unchecked_add(2), 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Returns true if there is a completion that the driver has not taken.
    pub(crate) fn has_completion(&self, guest: &Guest) -> bool {
        match self.driver.state() {
            DriverRingState::Split(state) => self.used_index(guest) != state.used,
            DriverRingState::Packed(state) => self.is_used(guest, state.used),
        }
    }

    /// Marks the first `count` requests of this ring in a new region, like a back-end that is killed then.
    pub(crate) fn take_requests(&self, guest: &Guest, region: &inflight::InflightRegion, count: usize) {
        PreviousBackend::of(self, guest, region, count);
    }

    /// Number of requests of this ring that a region has in flight; `None` while it changes.
    pub(crate) fn in_flight(&self, guest: &Guest, region: &inflight::InflightRegion) -> Option<usize> {
        let (bytes, size) = (region.copy(self.index as u16).unwrap(), self.layout.size);
        match self.driver {
            DriverRing::Split(_) => {
                recover_split(&bytes, self.used_index(guest), size).ok().map(|found| found.resubmit.len())
            }
            DriverRing::Packed(_) => {
                let flags_of = |index| self.flags(guest, index);
                let found = recover_packed(&bytes, size, size, RingBase::PACKED_START, flags_of);
                found.ok().map(|found| found.resubmit.len())
            }
        }
    }

    /// The base when all its requests are complete.
    pub(crate) fn drained_base(&self) -> u32 {
        match self.driver.state() {
            DriverRingState::Split(state) => RingBase::split(state.avail).bits(),
            DriverRingState::Packed(state) => {
                let Position { index, wrap } = state.avail;
                RingBase::packed(index, wrap, index, wrap).bits()
            }
        }
    }

    pub(crate) fn addr(&self, guest: &Guest) -> VringAddr {
        VringAddr {
            index: self.index,
            flags: u32::from(self.log_at.is_some()),
            desc_user_addr: guest.user(self.layout.desc).0,
            used_user_addr: guest.user(self.layout.used).0,
            avail_user_addr: guest.user(self.layout.avail).0,
            log_guest_addr: self.log_at.map_or(u64::MAX, |gpa| gpa.0),
        }
    }

    /// Sends NUM, BASE, ADDR, CALL and KICK (rule R6.1).
    pub(crate) fn set_up(&self, client: &RawFrontend, guest: &Guest, base: u32) {
        let index = self.index;
        client.send(Code::SET_VRING_CALL, VERSION, u64::from(index).as_bytes(), &[self.call.as_fd()]);
        client.send_body(Code::SET_VRING_NUM, &VringState { index, num: self.layout.size.into() });
        client.send_body(Code::SET_VRING_BASE, &VringState { index, num: base });
        client.send_body(Code::SET_VRING_ADDR, &self.addr(guest));
        client.send(Code::SET_VRING_KICK, VERSION, u64::from(index).as_bytes(), &[self.kick.as_fd()]);
    }

    /// Sets up an unused ring, and enables it.
    pub(crate) fn start(&self, client: &RawFrontend, guest: &Guest) {
        self.set_up(client, guest, self.initial_base());
        self.enable(client, true);
    }

    pub(crate) fn enable(&self, client: &RawFrontend, yes: bool) {
        client.send_acknowledged(Code::SET_VRING_ENABLE, &VringState { index: self.index, num: yes.into() }, &[]);
    }

    /// Publishes the added requests, and kicks if the device needs it.
    pub(crate) fn kick(&mut self) {
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    /// Waits for one completion. Returns its head and its length.
    pub(crate) fn completion(&mut self) -> (u16, u32) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.driver.pop_used().unwrap() {
                return (used.head, used.len);
            }
            if !self.driver.enable_notifications() {
                let left = end.checked_duration_since(Instant::now()).expect("the back-end doesn't answer");
                is_readable(&self.call, u16::try_from(left.as_millis()).unwrap_or(u16::MAX));
                let _ = self.call.read();
            }
        }
    }

    /// Publishes the added requests, and waits for one completion.
    pub(crate) fn serve_one(&mut self) {
        self.serve(1);
    }

    /// Publishes the added requests, and waits for this many completions.
    pub(crate) fn serve(&mut self, count: usize) {
        self.kick();
        self.completions(count);
    }

    pub(crate) fn completions(&mut self, count: usize) -> BTreeSet<u16> {
        (0..count).map(|_| self.completion().0).collect()
    }
}

/// A back-end that serves a ring before the tested one does.
pub(crate) struct PreviousBackend {
    ring: TrackedRing,
    /// Requests in flight, with their slots in the region.
    taken: VecDeque<(Chain, u16)>,
}

impl PreviousBackend {
    /// Takes the first `count` requests of `ring`, and marks them in a new region.
    pub(crate) fn of(ring: &Ring, guest: &Guest, region: &inflight::InflightRegion, count: usize) -> PreviousBackend {
        let SplitLayout { size, desc, avail, used } = ring.layout;
        let layout = RingLayout::new(ring.features, size, [desc, avail, used]);
        let base = RingBase::initial(ring.features);
        let device = DeviceRing::new(&guest.memory, layout, ring.features, base).unwrap();
        let mut ring = TrackedRing::new(device, Some(region), ring.index as u16);
        let mut taken = VecDeque::new();
        for _ in 0..count {
            let mut chain = Chain::default();
            let name = ring.take(&mut chain);
            taken.push_back((chain, name));
        }
        PreviousBackend { ring, taken }
    }

    /// Completes the oldest request with success, and publishes it.
    pub(crate) fn complete_one(&mut self, guest: &Guest) {
        let (chain, name) = self.taken.pop_front().unwrap();
        guest.memory.write(chain.writable.last().unwrap().gpa, &[0]).unwrap();
        self.ring.push(&chain, name, 1);
        let _ = self.ring.publish();
    }
}

/// Waits for the signal on the error fd of a broken ring.
pub(crate) fn wait_for_error(error: &EventFd, what: &str) {
    assert!(is_readable(error, DEADLINE.as_millis() as u16), "the ring did not break: {what}");
}

/// Sends all messages before those of rings: protocol features, owner, features, memory.
pub(crate) fn negotiate(client: &RawFrontend, guest: &Guest, features: VirtioFeatures) {
    negotiate_with(client, guest, features, PROTOCOL);
}

pub(crate) fn negotiate_with(
    client: &RawFrontend,
    guest: &Guest,
    features: VirtioFeatures,
    protocol: ProtocolFeatures,
) {
    client.send_body(Code::SET_OWNER, &[0u8; 0]);
    // A device with a state has no STATUS.
    client.send_body(
        Code::SET_PROTOCOL_FEATURES,
        &(protocol & ProtocolFeatures::from_bits_retain(client.request_u64(Code::GET_PROTOCOL_FEATURES))),
    );
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    guest.send_table(client);
}

pub(crate) fn inflight_kind(features: VirtioFeatures) -> inflight::RingKind {
    if features.contains(VIRTIO_F_RING_PACKED) { inflight::RingKind::Packed } else { inflight::RingKind::Split }
}

/// A new inflight region for rings of the kind in `features`, its fd, and the payload of SET_INFLIGHT_FD.
pub(crate) fn inflight_region(
    features: VirtioFeatures,
    queues: u16,
    size: u16,
) -> (inflight::InflightRegion, OwnedFd, InflightDescription) {
    let kind = inflight_kind(features);
    let (region, fd) = inflight::InflightRegion::create(kind, queues, size).unwrap();
    let mmap_size = inflight::InflightRegion::bytes_for(kind, queues, size).unwrap();
    let description =
        InflightDescription { mmap_size, mmap_offset: 0, num_queues: queues, queue_size: size, padding: [0; 4] };
    (region, fd, description)
}

/// Writes the header of a disk request at `gpa`. The caller writes the starts of the next two pages.
pub(crate) fn header(guest: &Guest, gpa: GuestAddress, request_type: u32, sector: u64) -> Buffer {
    let header = BlkRequestHeader { request_type: request_type.into(), ioprio: 0.into(), sector: sector.into() };
    guest.memory.write(gpa, header.as_bytes()).unwrap();
    Buffer { gpa, len: size_of::<BlkRequestHeader>() as u32 }
}

/// Addresses of the parts of disk request number `slot`: header, status, data. Status and data have pages of their own;
/// the data, of up to 64 KiB, is in the second region.
pub(crate) fn request_addresses(slot: u64) -> (GuestAddress, GuestAddress, GuestAddress) {
    (
        GuestAddress(0x60_0000 + slot * 16),
        GuestAddress(0x80_0000 + slot * LOG_PAGE),
        HIGH.unchecked_add(slot * 0x1_0000),
    )
}

impl Ring {
    /// Adds a read of `len` bytes from `sector` in `slot`.
    pub(crate) fn read(&mut self, guest: &Guest, slot: u64, sector: u64, len: u32) -> u16 {
        let (head, status, data) = request_addresses(slot);
        guest.memory.write(status, &[0xff]).unwrap();
        let head = header(guest, head, VIRTIO_BLK_T_IN, sector);
        let writable = [Buffer { gpa: data, len }, Buffer { gpa: status, len: 1 }];
        self.driver.add(&[head], &writable, None).unwrap().unwrap()
    }

    /// Adds a write of `data` to `sector` in `slot`.
    pub(crate) fn write(&mut self, guest: &Guest, slot: u64, sector: u64, data: &[u8]) -> u16 {
        let (head, status, at) = request_addresses(slot);
        guest.memory.write(status, &[0xff]).unwrap();
        guest.memory.write(at, data).unwrap();
        let readable = [header(guest, head, VIRTIO_BLK_T_OUT, sector), Buffer { gpa: at, len: data.len() as u32 }];
        self.driver.add(&readable, &[Buffer { gpa: status, len: 1 }], None).unwrap().unwrap()
    }
}

pub(crate) fn status(guest: &Guest, slot: u64) -> u8 {
    guest.bytes(request_addresses(slot).1, 1)[0]
}

/// A log for the guest, installed.
pub(crate) fn install_log(client: &RawFrontend, guest: &Guest) -> Log {
    let (log, fd) = Log::create(guest.memory.end()).unwrap();
    send_log(client, &log, &fd);
    log
}

pub(crate) fn send_log(client: &RawFrontend, log: &Log, fd: &OwnedFd) {
    let description = LogDescription { mmap_size: log.size(), mmap_offset: 0 };
    client.send(Code::SET_LOG_BASE, VERSION, description.as_bytes(), &[fd.as_fd()]);
    assert_eq!(client.reply(Code::SET_LOG_BASE), description.as_bytes(), "the 16 bytes that everybody takes (F7.1)");
}

/// Sets LOG_ALL, then F_LOG on every ring, as front-ends do (rule L7.1).
pub(crate) fn start_logging(
    client: &RawFrontend,
    guest: &Guest,
    features: VirtioFeatures,
    rings: &mut [&mut Ring],
    at: GuestAddress,
) {
    client.send_acknowledged(Code::SET_FEATURES, &(features | LOG_ALL), &[]);
    for ring in rings {
        ring.log_at = Some(at.unchecked_add(u64::from(ring.index) * 0x10_0000));
        client.send_acknowledged(Code::SET_VRING_ADDR, &ring.addr(guest), &[]);
    }
}

pub(crate) fn stop_logging(client: &RawFrontend, guest: &Guest, features: VirtioFeatures, rings: &mut [&mut Ring]) {
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    for ring in rings {
        ring.log_at = None;
        client.send_acknowledged(Code::SET_VRING_ADDR, &ring.addr(guest), &[]);
    }
}

/// Takes the marked pages out of a log.
pub(crate) fn harvest(log: &Log) -> BTreeSet<u64> {
    let mut set = PageSet::new(log.pages());
    log.harvest(&mut set);
    set.iter().map(|page| page.0).collect()
}

/// The pages of a range of bytes.
pub(crate) fn pages(gpa: GuestAddress, len: u64) -> impl Iterator<Item = u64> {
    gpa.0 / LOG_PAGE..=(gpa.0 + len - 1) / LOG_PAGE
}

pub(crate) fn add_region(client: &RawFrontend, region: &Region) -> u64 {
    let message = MemRegMsg { padding: 0, region: Guest::describe(region) };
    client.acknowledged(Code::ADD_MEM_REG, message.as_bytes(), &[region.shared().unwrap().0])
}
