//! The test harness: a guest without a CPU. It has memory in memfds, rings, and the messages that pass both to a
//! back-end.
//!
//! The lower region holds the rings, request headers and status bytes. The upper region, above 4 GiB, holds data. Each
//! request has a slot with a place for each. Only pages of rings are written by both sides.

mod injector;
mod iommu;
mod pages;
mod requests;

pub(super) use injector::FrameInjector;
pub(super) use iommu::{GuestIommu, Scatter};
pub(super) use requests::{RESEND_INTERVAL, RequestSize};

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use zerocopy::IntoBytes;

use self::requests::InFlightRequest;
use super::connection::Connection;
use super::device::TestedDevice;
use super::device::fs::{self, OpenFile};
use super::negotiation::{BackendFeatures, PROTOCOL};
use super::options::CheckOptions;
use super::outcome::CheckAbort;
use super::pages::Pages;
use super::queue::{DriverQueue, MAX_RINGS};
use super::ring_variant::{Flow, RingVariant};
use super::stop::Deadline;
use crate::abi::vhost_user::{
    FrontendRequest as Code, Header, LogDescription, MemoryHeader, MemoryRegion, ProtocolFeatures, VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES, VHOST_VRING_F_LOG, VringAddr, VringState,
};
use crate::abi::virtio::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MQ, VirtioFeatures,
};
use crate::dirty::Log;
use crate::memory::{Address, GuestAddress, Memory, Region, UserAddress, sealed_memfd};
use crate::ring::{Buffer, RingBase};

/// Maximum number of requests in flight. With three descriptors each they fill the smallest ring.
pub(super) const MAX_REQUESTS: u64 = 20;
/// Size of a slot's data area, bytes.
pub(super) const SLOT_BYTES: u64 = 512 << 10;
/// Size of the lower region. The rings begin at 1 MiB.
pub(super) const LOW_BYTES: u64 = 4 << 20;
/// Address of the upper region.
pub(super) const HIGH: GuestAddress = GuestAddress(1 << 32);
const HIGH_BYTES: u64 = MAX_REQUESTS * SLOT_BYTES;
/// Unused pages of the lower region, for logging a used ring at another address.
pub(super) const UNUSED_AREA: GuestAddress = GuestAddress(0x30_0000);
const STATUSES: GuestAddress = GuestAddress(0x38_0000);
const HEADS: GuestAddress = GuestAddress(0x3a_0000);
/// Size of a slot's request header, bytes.
const HEAD: u64 = 128;
/// Frames to be transmitted, which return as received ones.
pub(super) const FRAMES: GuestAddress = GuestAddress(0x3c_0000);
const FRAMES_BYTES: u64 = 0x4_0000;
/// Device status: ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK.
const DRIVER_OK: u64 = 1 | 2 | 8 | 4;

/// Interval at which a condition is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// One connection with memory and rings.
pub(super) struct Harness {
    pub(super) connection: Connection,
    pub(super) offered: BackendFeatures,
    /// Protocol features to negotiate.
    pub(super) protocol: ProtocolFeatures,
    device: TestedDevice,
    pub(super) flow: Flow,
    pub(super) timeout: Duration,
    pub(super) settle: Duration,
    pub(super) memory: Memory,
    /// The IOMMU, if any. Then all addresses except those of regions are I/O virtual.
    iommu: Option<GuestIommu>,
    /// The first ring for requests.
    pub(super) ring: DriverQueue,
    /// Further rings for requests.
    more_rings: Vec<DriverQueue>,
    /// The other rings of the pairs of a network device.
    other_direction: Vec<DriverQueue>,
    /// Frame source.
    source: Option<FrameInjector>,
    /// Acknowledged features without LOG_ALL.
    pub(super) features: VirtioFeatures,
    /// Number of requests so far. Also the seed of their data.
    submitted: u64,
    /// Requests in flight, by slot.
    slots: Vec<Option<InFlightRequest>>,
    /// The open file of a file system.
    file: Option<OpenFile>,
    /// Number of injected frames.
    frames_sent: u64,
    /// Number of injected frames that arrived. Other frames may arrive too.
    pub(super) frames_received: u64,
    /// True for frames of maximum length.
    long_frames: bool,
    /// Pages of data and status that the device may write.
    pub(super) writable_pages: Pages,
    /// Data of the last popped completion.
    pub(super) last_data: Buffer,
}

/// Configuration of a harness.
pub(super) struct HarnessConfig {
    pub(super) device: TestedDevice,
    pub(super) variant: RingVariant,
    /// Ring size.
    pub(super) size: u16,
    /// Features to acknowledge in addition to the defaults, if offered.
    pub(super) features: VirtioFeatures,
    /// Number of rings for requests.
    pub(super) rings: usize,
    pub(super) source: Option<FrameInjector>,
    /// Scattering of memory behind an IOMMU, if there is one.
    pub(super) iommu: Option<Scatter>,
}

impl Harness {
    /// Negotiates features and sends the memory table.
    pub(super) fn new(
        connection: Connection,
        offered: BackendFeatures,
        options: &CheckOptions,
        config: HarnessConfig,
    ) -> Result<Harness, CheckAbort> {
        let HarnessConfig { device, variant: RingVariant { packed, flow }, size, features, rings, source, iommu } =
            config;
        let share = |gpa, bytes| {
            let fd = sealed_memfd("check", bytes)?;
            Ok::<_, CheckAbort>(Arc::new(Region::share(fd, gpa, bytes, 0)?))
        };
        let memory = Memory::new([share(GuestAddress(0), LOW_BYTES)?, share(HIGH, HIGH_BYTES)?])?;
        let iommu = iommu.map(|scatter| GuestIommu::new(&memory, scatter)).transpose()?;
        let mut protocol = PROTOCOL;
        let mut wanted = VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES | features;
        if iommu.is_some() {
            wanted |= VIRTIO_F_ACCESS_PLATFORM;
            protocol |= ProtocolFeatures::BACKEND_REQ;
        }
        wanted.set(VIRTIO_F_RING_PACKED, packed);
        // A block device needs no feature for several queues.
        wanted.set(VIRTIO_NET_F_MQ, rings > 1 && flow != Flow::Requests);
        let features = offered.features & wanted;
        let places = match (flow, device) {
            (Flow::Requests, TestedDevice::Fs) => 1 + rings,
            (Flow::Requests, _) => rings,
            _ => 2 * rings,
        };
        if places > MAX_RINGS {
            return Err(CheckAbort::System(std::io::Error::other("no room for so many rings")));
        }
        let view = iommu.as_ref().map_or(&memory, |iommu| &iommu.view).clone();
        let queue = |index: u32| DriverQueue::new(&view, index, index as usize, size, features);
        let rings = rings as u32;
        // Index of the first ring, distance to the next, and further rings that must be served.
        let (main, step, others) = match (flow, device) {
            // The high-priority queue precedes the request queues.
            (Flow::Requests, TestedDevice::Fs) => (1, 1, vec![0]),
            (Flow::Requests, _) => (0, 1, Vec::new()),
            (Flow::Receive, _) => (0, 2, (0..rings).map(|pair| 2 * pair + 1).collect()),
            (Flow::Transmit, _) => (1, 2, (0..rings).map(|pair| 2 * pair).collect()),
        };
        let more_rings = (1..rings).map(|number| queue(main + number * step)).collect::<Result<_, _>>()?;
        let other_direction = others.into_iter().map(queue).collect::<Result<_, _>>()?;
        let harness = Harness {
            connection,
            offered,
            protocol: offered.protocol & protocol,
            device,
            flow,
            timeout: options.timeout,
            settle: options.settle,
            ring: queue(main)?,
            more_rings,
            other_direction,
            memory,
            iommu,
            source,
            features,
            submitted: 0,
            slots: vec![None; MAX_REQUESTS as usize],
            file: None,
            frames_sent: 0,
            frames_received: 0,
            long_frames: false,
            writable_pages: Pages::new(),
            last_data: Buffer { gpa: GuestAddress(0), len: 0 },
        };
        harness.set_up_device()?;
        Ok(harness)
    }

    /// Returns the rings for requests.
    pub(super) fn rings(&self) -> impl Iterator<Item = &DriverQueue> {
        std::iter::once(&self.ring).chain(&self.more_rings)
    }

    fn rings_mut(&mut self) -> impl Iterator<Item = &mut DriverQueue> {
        std::iter::once(&mut self.ring).chain(&mut self.more_rings)
    }

    /// Returns all rings in start order.
    pub(super) fn all(&self) -> impl Iterator<Item = &DriverQueue> {
        let others_first = self.ring.index > 0;
        let (first, last) =
            if others_first { (Some(&self.other_direction), None) } else { (None, Some(&self.other_direction)) };
        first.into_iter().flatten().chain(self.rings()).chain(last.into_iter().flatten())
    }

    /// Sends owner, features and memory on a new connection.
    fn set_up_device(&self) -> Result<(), CheckAbort> {
        self.negotiate()?;
        self.send_memory()
    }

    /// Sends owner and features on a new connection.
    pub(super) fn negotiate(&self) -> Result<(), CheckAbort> {
        self.connection.send(Code::SET_OWNER, Header::FLAG_VERSION, &[], &[])?;
        self.negotiate_features()
    }

    /// Negotiates features with a back-end that has an owner.
    pub(super) fn negotiate_features(&self) -> Result<(), CheckAbort> {
        // All front-ends send these requests on each connection. rust-vmm's back-end acknowledges nothing before.
        self.connection.request_u64(Code::GET_FEATURES)?;
        if self.offered.has(VHOST_USER_F_PROTOCOL_FEATURES) {
            self.connection.request_u64(Code::GET_PROTOCOL_FEATURES)?;
            self.connection.send(Code::SET_PROTOCOL_FEATURES, Header::FLAG_VERSION, self.protocol.as_bytes(), &[])?;
        }
        if let Some(iommu) = &self.iommu {
            let channel = iommu.channel(self.connection.try_clone()?, self.timeout)?;
            self.send_acked(Code::SET_BACKEND_REQ_FD, &[], &[channel.as_fd()])?;
        }
        self.send_acked(Code::SET_FEATURES, self.features.as_bytes(), &[])
    }

    /// Continues with the same guest on another connection. Requests in flight stay in flight.
    pub(super) fn reconnect(&mut self, connection: Connection) -> Result<(), CheckAbort> {
        self.connection = connection;
        self.set_up_device()?;
        match self.submitted {
            0 => self.begin_session(),
            // The ring continues; the session may be of another process.
            _ => {
                self.forget_session();
                Ok(())
            }
        }
    }

    /// Ends the file system session. Later requests are of a kind that needs none.
    pub(super) fn forget_session(&mut self) {
        self.file = None;
    }

    /// Opens a file of a file system. Other state is as before.
    pub(super) fn begin_session(&mut self) -> Result<(), CheckAbort> {
        if !matches!(self.device, TestedDevice::Fs) {
            return Ok(());
        }
        let (made, lent) = (self.submitted, self.writable_pages.clone());
        self.start()?;
        self.file = Some(fs::open(|head, unique, room| self.exchange(head, unique, room))?);
        self.enable(false)?;
        self.stop()?;
        (self.submitted, self.writable_pages) = (made, lent);
        let view = self.view().clone();
        for queue in std::iter::once(&mut self.ring).chain(&mut self.more_rings).chain(&mut self.other_direction) {
            queue.reinitialize(&view)?;
        }
        Ok(())
    }

    /// Sends a request without a reply of its own, and waits until it is processed (rule F4.1).
    pub(super) fn send_acked(&self, code: Code, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), CheckAbort> {
        if !self.offered.has_protocol(ProtocolFeatures::REPLY_ACK) {
            self.connection.send(code, Header::FLAG_VERSION, payload, fds)?;
            return self.connection.barrier().map(|_| ());
        }
        match self.connection.request_ack(code, payload, fds)? {
            0 => Ok(()),
            answer => Err(CheckAbort::Refused { code, answer }),
        }
    }

    /// Builds the payload of SET_MEM_TABLE.
    pub(super) fn memory_table(&self) -> Vec<u8> {
        let regions = self.memory.regions();
        let mut payload = MemoryHeader { nregions: regions.len() as u32, padding: 0 }.as_bytes().to_vec();
        regions.iter().for_each(|region| payload.extend(describe(region).as_bytes()));
        payload
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.memory.regions().iter().filter_map(|region| Some(region.shared()?.0)).collect()
    }

    pub(super) fn send_memory(&self) -> Result<(), CheckAbort> {
        self.send_acked(Code::SET_MEM_TABLE, &self.memory_table(), &self.fds())
    }

    /// Converts a ring address for messages: user addresses, or I/O virtual ones behind an IOMMU.
    fn ring_addr(&self, at: GuestAddress) -> u64 {
        if self.iommu.is_some() { at.0 } else { user_addr(&self.memory, at).0 }
    }

    /// Builds the payload of SET_VRING_ADDR. `log_at` is `log_guest_addr`, and sets F_LOG.
    pub(super) fn vring_addr(&self, queue: &DriverQueue, log_at: Option<GuestAddress>) -> VringAddr {
        let [desc, driver, device] = queue.layout.areas();
        VringAddr {
            index: queue.index,
            flags: log_at.map_or(0, |_| VHOST_VRING_F_LOG.bits()),
            desc_user_addr: self.ring_addr(desc),
            used_user_addr: self.ring_addr(device),
            avail_user_addr: self.ring_addr(driver),
            log_guest_addr: log_at.unwrap_or(device).0,
        }
    }

    /// Sends CALL, NUM, BASE, ADDR and KICK (rule R6.1): the rings are started but not enabled, if they can be
    /// disabled.
    pub(super) fn start_disabled(&self, log_at: Option<GuestAddress>) -> Result<(), CheckAbort> {
        for queue in self.all() {
            let index = u64::from(queue.index);
            self.send_acked(Code::SET_VRING_CALL, index.as_bytes(), &[queue.call.as_fd()])?;
            self.start_without_call(queue, self.log_address(queue, log_at))?;
        }
        Ok(())
    }

    /// Sends NUM, BASE, ADDR and KICK of a ring.
    pub(super) fn start_without_call(
        &self,
        queue: &DriverQueue,
        log_at: Option<GuestAddress>,
    ) -> Result<(), CheckAbort> {
        self.configure_ring(queue, log_at)?;
        self.send_acked(Code::SET_VRING_KICK, u64::from(queue.index).as_bytes(), &[queue.kick.as_fd()])
    }

    /// Sends SET_VRING_NUM.
    pub(super) fn send_size(&self, queue: &DriverQueue) -> Result<(), CheckAbort> {
        let size = VringState { index: queue.index, num: queue.layout.size().into() };
        self.send_acked(Code::SET_VRING_NUM, size.as_bytes(), &[])
    }

    /// Sends NUM, BASE and ADDR of a ring.
    pub(super) fn configure_ring(&self, queue: &DriverQueue, log_at: Option<GuestAddress>) -> Result<(), CheckAbort> {
        self.send_size(queue)?;
        let base = VringState { index: queue.index, num: queue.base.bits() };
        self.send_acked(Code::SET_VRING_BASE, base.as_bytes(), &[])?;
        self.send_acked(Code::SET_VRING_ADDR, self.vring_addr(queue, log_at).as_bytes(), &[])
    }

    /// Returns the log address of a ring. Only that of the first ring may differ from its address.
    fn log_address(&self, queue: &DriverQueue, log_at: Option<GuestAddress>) -> Option<GuestAddress> {
        log_at.map(|at| if queue.index == self.ring.index { at } else { queue.device_area() })
    }

    pub(super) fn enable(&self, yes: bool) -> Result<(), CheckAbort> {
        if !self.features.contains(VHOST_USER_F_PROTOCOL_FEATURES) {
            return Ok(());
        }
        // DPDK serves no ring before DRIVER_OK, which QEMU also sends here.
        if yes && self.offered.has_protocol(ProtocolFeatures::STATUS) {
            self.send_acked(Code::SET_STATUS, DRIVER_OK.as_bytes(), &[])?;
        }
        for queue in self.all() {
            let state = VringState { index: queue.index, num: yes.into() };
            self.send_acked(Code::SET_VRING_ENABLE, state.as_bytes(), &[])?;
        }
        Ok(())
    }

    /// Starts, enables and kicks the rings at their positions. Some back-ends need the kick.
    pub(super) fn start(&self) -> Result<(), CheckAbort> {
        self.start_logged(None)
    }

    /// Like [`start`](Harness::start), with F_LOG and the first ring logged at `log_at`.
    pub(super) fn start_logged(&self, log_at: Option<GuestAddress>) -> Result<(), CheckAbort> {
        self.start_disabled(log_at)?;
        self.enable(true)?;
        self.kick();
        Ok(())
    }

    /// Restarts the driver of the first ring at another position. No request may be in flight.
    pub(super) fn move_to(&mut self, at: u16) -> Result<(), CheckAbort> {
        let view = self.view().clone();
        self.ring.move_to(&view, at)
    }

    /// Sets the start position of all rings to the position of their drivers.
    pub(super) fn use_current_bases(&mut self) {
        let all = std::iter::once(&mut self.ring).chain(&mut self.more_rings).chain(&mut self.other_direction);
        all.for_each(|queue| queue.base = queue.current_base());
    }

    /// Signals all kick fds unconditionally.
    pub(super) fn kick(&self) {
        self.all().for_each(DriverQueue::signal_kick);
    }

    /// Stops the rings. Returns the base of the first (rule R3.1). They start again at the returned bases.
    pub(super) fn stop(&mut self) -> Result<RingBase, CheckAbort> {
        for queue in std::iter::once(&mut self.ring).chain(&mut self.more_rings).chain(&mut self.other_direction) {
            stop_ring(&self.connection, queue)?;
        }
        Ok(self.ring.base)
    }

    /// Stops the first ring. Returns its base.
    pub(super) fn stop_first_ring(&mut self) -> Result<RingBase, CheckAbort> {
        stop_ring(&self.connection, &mut self.ring)?;
        Ok(self.ring.base)
    }

    /// Creates and installs a log.
    pub(super) fn install_log(&self) -> Result<Log, CheckAbort> {
        let (log, fd) = Log::create(self.memory.end())?;
        self.send_log(&fd, log.size(), 0)?;
        Ok(log)
    }

    /// Sends SET_LOG_BASE. Returns the size of the reply (rule F7.1).
    pub(super) fn send_log(&self, fd: &OwnedFd, mmap_size: u64, mmap_offset: u64) -> Result<usize, CheckAbort> {
        self.require_log()?;
        let description = LogDescription { mmap_size, mmap_offset };
        self.connection.send(Code::SET_LOG_BASE, Header::FLAG_VERSION, description.as_bytes(), &[fd.as_fd()])?;
        Ok(self.connection.reply(Code::SET_LOG_BASE)?.payload.len())
    }

    /// Fails with "not offered" without a dirty log.
    fn require_log(&self) -> Result<(), CheckAbort> {
        self.offered.require_protocol(ProtocolFeatures::LOG_SHMFD)?;
        match self.offered.has(VHOST_F_LOG_ALL) {
            true => Ok(()),
            false => Err(CheckAbort::NotOffered("VHOST_F_LOG_ALL".into())),
        }
    }

    /// Sets or clears LOG_ALL.
    pub(super) fn set_log_all(&self, yes: bool) -> Result<(), CheckAbort> {
        if yes {
            self.require_log()?;
        }
        let mut features = self.features;
        features.set(VHOST_F_LOG_ALL, yes);
        self.send_acked(Code::SET_FEATURES, features.as_bytes(), &[])
    }

    /// Sets F_LOG of the rings, with the log address of the first, or clears it.
    pub(super) fn set_ring_logging(&self, log_at: Option<GuestAddress>) -> Result<(), CheckAbort> {
        for queue in self.all() {
            let addr = self.vring_addr(queue, self.log_address(queue, log_at));
            self.send_acked(Code::SET_VRING_ADDR, addr.as_bytes(), &[])?;
        }
        Ok(())
    }

    /// Sets LOG_ALL, then F_LOG with the first ring at `log_at` (rule L7.1).
    pub(super) fn enable_logging(&self, log_at: GuestAddress) -> Result<(), CheckAbort> {
        self.set_log_all(true)?;
        self.set_ring_logging(Some(log_at))
    }

    /// Waits for the settle time, in which nothing may happen.
    pub(super) fn wait_quiet(&self) {
        thread::sleep(self.settle);
    }

    /// Returns the deadline of a wait for the back-end that takes at most `time`.
    pub(super) fn deadline(&self, time: Duration) -> Deadline {
        self.connection.deadline(time)
    }

    /// Returns the time to wait for an event that happens soon or never. It is much more than a loaded machine needs.
    pub(super) fn short_wait(&self) -> Duration {
        self.settle.max(self.timeout / 4)
    }
}

fn stop_ring(connection: &Connection, queue: &mut DriverQueue) -> Result<(), CheckAbort> {
    let reply = connection.request(Code::GET_VRING_BASE, VringState { index: queue.index, num: 0 }.as_bytes())?;
    let VringState { index, num } = reply.read()?;
    if index != queue.index {
        let asked = queue.index;
        return Err(CheckAbort::Violation(format!("the reply to GET_VRING_BASE of ring {asked} is for ring {index}")));
    }
    queue.base = RingBase::from_bits(num);
    Ok(())
}

/// Polls `is_so` until it returns true. Returns false at `deadline`.
pub(super) fn wait_until(
    deadline: &Deadline,
    mut is_so: impl FnMut() -> Result<bool, CheckAbort>,
) -> Result<bool, CheckAbort> {
    while !is_so()? {
        if deadline.is_over() {
            return Ok(false);
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(true)
}

/// Returns the front-end's address of a guest-physical address.
fn user_addr(memory: &Memory, gpa: GuestAddress) -> UserAddress {
    let in_region = |region: &Arc<Region>| {
        let offset = gpa.checked_offset_from(region.gpa())?;
        region.user_addr().checked_add(offset)
    };
    memory.regions().iter().rev().find_map(in_region).unwrap_or_default()
}

/// Describes a region as in messages.
pub(super) fn describe(region: &Region) -> MemoryRegion {
    MemoryRegion {
        guest_phys_addr: region.gpa().0,
        memory_size: region.size(),
        userspace_addr: region.user_addr().0,
        mmap_offset: region.shared().map_or(0, |(_, offset)| offset),
    }
}
