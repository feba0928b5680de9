//! The vhost-user client: [`UserDevice`] drives a back-end behind a UNIX socket.
//!
//! This module maps the calls of [`Device`] to messages, in the order that back-ends expect (rules R6.1, L7.1), and
//! records the state that a restarted back-end has to get again. Framing and deadlines are in `connection`.
#![forbid(unsafe_code)]

mod backend_channel;
mod connect;
mod connection;
mod device_state;
mod inflight;
mod install;
mod iommu;
mod options;
mod payload;
mod postcopy;
mod requests;
mod translator;

pub use options::UserOptions;
pub use postcopy::BackendAddresses;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use super::{
    Device, DeviceEvent, FrontendError, InflightState, Interrupt, LogQuality, Reconnection, RingSetup, counters,
};
use crate::abi::features::feature_names;
use crate::abi::vhost_user::{
    CONFIG_TYPE_FRONTEND, ConfigHeader, DiskGeneration, FrontendRequest, InflightDescription, LogDescription,
    MemRegMsg, ProtocolFeatures, VHOST_F_LOG_ALL, VHOST_MEMORY_BASELINE_NREGIONS, VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_MAX_CONFIG_SIZE, VHOST_VRING_F_LOG, VRING_NOFD_MASK, VringAddr, VringState, own,
    unstable::INFLIGHT_MIGRATION,
};
use crate::abi::virtio::{VIRTIO_F_RING_PACKED, VirtioFeatures};
use crate::dirty::Log;
use crate::memory::{GuestAddress, Iova, Memory, MemoryError, Region};
use crate::ring::{RingBase, RingLayout};
use crate::sys::log_limit::limited;
use crate::sys::nonblocking;
use crate::sys::with_causes::with_causes;
use backend_channel::{BackendChannel, EventQueue};
use connect::{BACK_OFF, Negotiated, negotiate, retry_until};
use connection::{Connection, LateReplies, MAX_UNACKED, Reply, TimeoutPolicy};
use inflight::InflightFile;
use payload::{memory_table, region_message, user_addr};
use translator::Translator;

/// Feature bits of the transport, which the driver does not acknowledge.
const TRANSPORT_FEATURES: VirtioFeatures = VHOST_F_LOG_ALL.union(VHOST_USER_F_PROTOCOL_FEATURES);
const SET_LOG_BASE: FrontendRequest = FrontendRequest::SET_LOG_BASE;
/// Timeout for stopping the log once the interrupt is set. The acknowledgement stays pending after it.
const STOP_LOGGING_TIMEOUT: Duration = Duration::from_millis(500);
/// Number of messages that start a ring: CALL, ERR, NUM, BASE, ADDR, KICK and ENABLE.
const START_MESSAGES: usize = 7;
/// Number of messages that validate a ring.
const VALIDATE_MESSAGES: usize = 7;

/// Parameters of a stopped ring that the back-end has received.
struct SentRing {
    size: u16,
    call: Arc<OwnedFd>,
    error: Option<Arc<OwnedFd>>,
    placement: Option<RingPlacement>,
}

/// Descriptor, driver and device area of a ring, and its base.
type RingPlacement = ([GuestAddress; 3], RingBase);

/// A device behind a vhost-user socket.
pub struct UserDevice {
    path: PathBuf,
    options: UserOptions,
    connection: Connection,
    /// The back-end channel, if the back-end supports it.
    backend_channel: Option<BackendChannel>,
    events: Arc<EventQueue>,
    translator: Arc<Translator>,
    interrupt: Interrupt,
    /// Rings whose stop was interrupted.
    stopping: Vec<u16>,
    /// Rings whose start was interrupted. They count as running.
    starting: Vec<u16>,
    negotiated: Negotiated,
    features: VirtioFeatures,
    memory: Memory,
    inflight: Option<InflightFile>,
    rings: BTreeMap<u16, RingSetup>,
    /// Parameters of stopped rings that the back-end has received.
    sent_rings: BTreeMap<u16, SentRing>,
    log: Option<(Arc<Log>, OwnedFd)>,
    log_signal: Option<OwnedFd>,
    status: u8,
    mtu: Option<u16>,
    /// The loaded device state, until a ring is started.
    loaded_state: Option<Vec<u8>>,
}

impl UserDevice {
    /// Connects to the socket at `path` and negotiates protocol features. Retries until `deadline`, so that a back-end
    /// may still be starting.
    ///
    /// # Errors
    /// The last error at `deadline`; immediately, an error that waiting does not fix.
    pub fn connect(
        path: impl AsRef<Path>,
        options: UserOptions,
        deadline: Instant,
    ) -> Result<UserDevice, FrontendError> {
        UserDevice::connect_interruptible(path, options, deadline, Interrupt::new()?)
    }

    /// Like [`connect`](UserDevice::connect), with an interrupt that also ends the connection set-up. It becomes the
    /// interrupt of the device ([`Device::interrupt`]).
    ///
    /// # Errors
    /// As [`connect`](UserDevice::connect); [`FrontendError::Interrupted`].
    pub fn connect_interruptible(
        path: impl AsRef<Path>,
        options: UserOptions,
        deadline: Instant,
        interrupt: Interrupt,
    ) -> Result<UserDevice, FrontendError> {
        let path = path.as_ref();
        let events = Arc::new(EventQueue::new()?);
        let translator = Arc::default();
        let greeted = retry_until(deadline, &interrupt, || negotiate(path, options, &events, &translator, &interrupt))?;
        let ((mut connection, negotiated, backend_channel), _) = greeted;
        connection.set_timeout_policy(TimeoutPolicy::Close);
        Ok(UserDevice {
            path: path.into(),
            options,
            connection,
            backend_channel,
            events,
            translator,
            interrupt,
            stopping: Vec::new(),
            starting: Vec::new(),
            negotiated,
            features: VirtioFeatures::empty(),
            memory: Memory::default(),
            inflight: None,
            rings: BTreeMap::new(),
            sent_rings: BTreeMap::new(),
            log: None,
            log_signal: None,
            status: 0,
            mtu: None,
            loaded_state: None,
        })
    }

    /// Returns the negotiated protocol features.
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.negotiated.protocol
    }

    fn has(&self, feature: ProtocolFeatures) -> bool {
        self.negotiated.protocol.contains(feature)
    }

    fn require(&self, feature: ProtocolFeatures, what: &str, advice: &'static str) -> Result<(), FrontendError> {
        let offered = self.has(feature);
        if offered { Ok(()) } else { Err(FrontendError::NotOffered { what: what.into(), advice }) }
    }

    fn send_features(&mut self) -> Result<(), FrontendError> {
        // SET_VRING_ADDR carries the ring's log flag.
        self.forget_placements();
        let mut features = self.features | self.negotiated.features & VHOST_USER_F_PROTOCOL_FEATURES;
        features.set(VHOST_F_LOG_ALL, self.log.is_some());
        self.connection.send(FrontendRequest::SET_FEATURES, features.as_bytes(), &[])
    }

    /// Changes the back-end's memory from `before` to the recorded memory.
    ///
    /// A translation is either looked up with the old table and sent before the first message of the new one, or looked
    /// up with the new table and sent after its last message. In between translations are deferred. Nothing waits for
    /// them: the back-end may need a reply on its channel before it acknowledges the table.
    fn send_memory_table(&mut self, before: &Memory) -> Result<(), FrontendError> {
        let memory = self.memory.clone();
        self.forget_placements();
        self.set_translation_memory(None);
        let result = self.send_regions(before, &memory);
        self.set_translation_memory(Some(&memory));
        result
    }

    fn send_regions(&mut self, before: &Memory, memory: &Memory) -> Result<(), FrontendError> {
        if memory.regions().len() <= VHOST_MEMORY_BASELINE_NREGIONS {
            let (payload, fds) = memory_table(memory)?;
            return self.connection.send(FrontendRequest::SET_MEM_TABLE, &payload, &fds);
        }
        let has = |memory: &Memory, region: &Arc<Region>| memory.regions().iter().any(|r| Arc::ptr_eq(r, region));
        for region in before.regions().iter().filter(|region| !has(memory, region)) {
            let message = MemRegMsg { padding: 0, region: region_message(region)?.0 };
            self.connection.send(FrontendRequest::REM_MEM_REG, message.as_bytes(), &[])?;
        }
        for region in memory.regions().iter().filter(|region| !has(before, region)) {
            let (region, fd) = region_message(region)?;
            let message = MemRegMsg { padding: 0, region };
            self.connection.send(FrontendRequest::ADD_MEM_REG, message.as_bytes(), &[fd])?;
        }
        Ok(())
    }

    /// Builds SET_VRING_ADDR. On a running ring only the log flag has an effect (rule R5.1).
    fn vring_addr(&self, index: u16, setup: &RingSetup) -> Result<VringAddr, MemoryError> {
        let place = |(gpa, len): (GuestAddress, u64)| match self.is_translated() {
            // The fields hold I/O virtual addresses then (rule T1.1).
            true => Ok(gpa.0),
            false => user_addr(&self.memory, gpa, len).map(|addr| addr.0),
        };
        let [desc, avail, used] = self.layout(setup).map(place);
        Ok(VringAddr {
            index: index.into(),
            flags: if self.log.is_some() { VHOST_VRING_F_LOG.bits() } else { 0 },
            desc_user_addr: desc?,
            used_user_addr: used?,
            avail_user_addr: avail?,
            log_guest_addr: setup.used.0,
        })
    }

    fn send_kick(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        // The back-end may forget the ring's parameters when it is stopped.
        self.sent_rings.remove(&index);
        self.send_ring_fd(FrontendRequest::SET_VRING_KICK, index, Some(&setup.kick))
    }

    /// Sends all messages that start a ring except kick and enable, unless the back-end has received them.
    fn send_ring(&mut self, index: u16, setup: &RingSetup, base: RingBase) -> Result<(), FrontendError> {
        self.send_ring_size(index, setup)?;
        let placement = Some(([setup.desc, setup.avail, setup.used], base));
        if self.sent_rings.get(&index).is_some_and(|sent| sent.placement == placement) {
            return Ok(());
        }
        let addresses = self.vring_addr(index, setup)?;
        let state = VringState { index: index.into(), num: base.bits() };
        self.connection.send_buffered(FrontendRequest::SET_VRING_BASE, state.as_bytes(), None)?;
        self.connection.send_buffered(FrontendRequest::SET_VRING_ADDR, addresses.as_bytes(), None)?;
        self.sent_rings.get_mut(&index).into_iter().for_each(|sent| sent.placement = placement);
        Ok(())
    }

    /// Sends size and notification fds of a ring, unless the back-end has received them.
    fn send_ring_size(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        let fds =
            |call: &Arc<OwnedFd>, error: &Option<Arc<OwnedFd>>| (Arc::as_ptr(call), error.as_ref().map(Arc::as_ptr));
        let is_known =
            |sent: &SentRing| sent.size == setup.size && fds(&sent.call, &sent.error) == fds(&setup.call, &setup.error);
        if self.sent_rings.get(&index).is_some_and(is_known) {
            return Ok(());
        }
        self.send_ring_fd(FrontendRequest::SET_VRING_CALL, index, Some(&setup.call))?;
        self.send_ring_fd(FrontendRequest::SET_VRING_ERR, index, setup.error.as_ref())?;
        let state = VringState { index: index.into(), num: setup.size.into() };
        self.connection.send_buffered(FrontendRequest::SET_VRING_NUM, state.as_bytes(), None)?;
        let sent = SentRing { size: setup.size, call: setup.call.clone(), error: setup.error.clone(), placement: None };
        self.sent_rings.insert(index, sent);
        Ok(())
    }

    /// Fails if replies are pending: the device must be reconnected first.
    fn check_pending_replies(&self) -> Result<(), FrontendError> {
        match self.connection.has_pending_replies() {
            true => Err(FrontendError::Unavailable {
                device: self.name().into(),
                reason: Some("a reply is pending".into()),
            }),
            false => Ok(()),
        }
    }

    fn forget_placements(&mut self) {
        self.sent_rings.values_mut().for_each(|sent| sent.placement = None);
    }

    /// Sends messages for several rings and waits for their acknowledgements. After a refusal all messages of these
    /// rings are sent again next time.
    fn send_for_each(
        &mut self,
        rings: &[(u16, RingSetup)],
        sent: &mut dyn FnMut(),
        send_ring: impl Fn(&mut UserDevice, u16, &RingSetup) -> Result<(), FrontendError>,
    ) -> Result<(), FrontendError> {
        self.check_pending_replies()?;
        rings.iter().try_for_each(|(index, setup)| self.check_ring(*index, setup))?;
        self.connection.wait_for_acks()?;
        for rings in rings.chunks(MAX_UNACKED / VALIDATE_MESSAGES) {
            let result = rings.iter().try_for_each(|(index, setup)| send_ring(self, *index, setup));
            let acked = result.and_then(|()| self.connection.collect_acks(self.options.timeout, sent));
            let acked = acked.and_then(|refused| refused.into_iter().next().map_or(Ok(()), |(_, error)| Err(error)));
            acked.inspect_err(|_| rings.iter().for_each(|(index, _)| drop(self.sent_rings.remove(index))))?;
        }
        Ok(())
    }

    fn check_ring(&self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        let bad = |reason| Err(FrontendError::InvalidRing { index, reason });
        if index >= self.negotiated.queues || index > 0xff {
            return bad(format!("the device has {} rings", self.negotiated.queues));
        }
        if setup.size == 0 || !self.is_packed() && !setup.size.is_power_of_two() {
            let what = if self.is_packed() { "packed ring has at least 1" } else { "split ring has a power of two" };
            return bad(format!("it has {} entries, a {what}", setup.size));
        }
        if self.rings.contains_key(&index) {
            return bad("it is already started; stop it first".into());
        }
        self.vring_addr(index, setup)?;
        Ok(())
    }

    /// Sends a ring's kick, call or error fd, or its in-band replacement (rule B3.2).
    fn send_ring_fd(
        &mut self,
        request: FrontendRequest,
        index: u16,
        fd: Option<&Arc<OwnedFd>>,
    ) -> Result<(), FrontendError> {
        match fd {
            _ if self.has(ProtocolFeatures::INBAND_NOTIFICATIONS) => {
                self.connection.send_buffered(request, (u64::from(index) | VRING_NOFD_MASK).as_bytes(), None)
            }
            Some(fd) => self.connection.send_buffered(request, u64::from(index).as_bytes(), Some(fd)),
            None => Ok(()),
        }
    }

    /// Enables or disables a ring. Without protocol features rings are always enabled (rule R1.2).
    fn send_enable(&mut self, index: u16, enable: bool) -> Result<(), FrontendError> {
        if !self.negotiated.features.contains(VHOST_USER_F_PROTOCOL_FEATURES) {
            return Ok(());
        }
        let state = VringState { index: index.into(), num: enable.into() };
        self.connection.send_buffered(FrontendRequest::SET_VRING_ENABLE, state.as_bytes(), None)
    }

    fn send_status(&mut self) -> Result<(), FrontendError> {
        let status = u64::from(self.status);
        self.connection.send(FrontendRequest::SET_STATUS, status.as_bytes(), &[])
    }

    /// Sends SET_LOG_BASE with the recorded log. Its reply may have any length (rule F7.2).
    fn install_log(&mut self) -> Result<(), FrontendError> {
        let Some((log, fd)) = &self.log else { return Ok(()) };
        let message = LogDescription { mmap_size: log.size(), mmap_offset: 0 };
        self.connection.request(SET_LOG_BASE, message.as_bytes(), &[fd.as_fd()]).map(drop)
    }

    /// Sends LOG_ALL and F_LOG of the rings for the recorded log.
    fn send_logging(&mut self) -> Result<(), FrontendError> {
        self.send_features()?;
        for (&index, setup) in &self.rings {
            let addresses = self.vring_addr(index, setup)?;
            self.connection.send(FrontendRequest::SET_VRING_ADDR, addresses.as_bytes(), &[])?;
        }
        self.connection.wait_for_acks()
    }

    /// Returns address and length in bytes of descriptor, driver and device area.
    fn layout(&self, setup: &RingSetup) -> [(GuestAddress, u64); 3] {
        let [desc, avail, used] = RingLayout::area_bytes(self.features, setup.size);
        [(setup.desc, desc), (setup.avail, avail), (setup.used, used)]
    }

    fn is_packed(&self) -> bool {
        self.features.contains(VIRTIO_F_RING_PACKED)
    }
}

impl Device for UserDevice {
    fn name(&self) -> &str {
        self.path.to_str().unwrap_or("vhost-user device")
    }

    fn features(&self) -> VirtioFeatures {
        self.negotiated.features
    }

    fn acked_features(&self) -> VirtioFeatures {
        self.features
    }

    fn set_features(&mut self, features: VirtioFeatures) -> Result<(), FrontendError> {
        let missing = features & !self.negotiated.features;
        if !missing.is_empty() {
            let what = format!("features {}", feature_names(missing, self.options.device_id()));
            return Err(FrontendError::NotOffered { what, advice: "acknowledge only bits of features()" });
        }
        self.check_iommu(features)?;
        let was_translated = self.is_translated();
        // The features determine the ring format.
        self.sent_rings.clear();
        self.features = features & !TRANSPORT_FEATURES;
        self.send_features()?;
        if self.is_translated() && !was_translated {
            // While the feature was off, `invalidate` sent nothing and memory may have changed (rule T3.9).
            self.send_invalidation(Iova(0)..=Iova(u64::MAX))?;
        }
        self.connection.wait_for_acks()
    }

    fn queues(&self) -> u16 {
        self.negotiated.queues
    }

    fn max_mem_slots(&self) -> usize {
        self.negotiated.slots
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
        if memory.regions().len() > self.negotiated.slots {
            return Err(FrontendError::NotOffered {
                what: format!("{} memory slots ({} at most)", memory.regions().len(), self.negotiated.slots),
                advice: "use fewer, larger regions",
            });
        }
        let before = std::mem::replace(&mut self.memory, memory.clone());
        let done = self.send_memory_table(&before).and_then(|()| self.connection.wait_for_acks());
        done.inspect_err(|error| {
            if !error.needs_reconnect() {
                self.set_translation_memory(Some(&before));
                self.memory = before;
            }
        })
    }

    fn set_inflight(
        &mut self,
        queues: u16,
        queue_size: u16,
        restored: Option<&InflightState>,
    ) -> Result<bool, FrontendError> {
        if !self.has(ProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(false);
        }
        let wish =
            InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: queues, queue_size, padding: [0; 4] };
        let reply = self.connection.request(FrontendRequest::GET_INFLIGHT_FD, wish.as_bytes(), &[])?;
        let inflight = InflightFile::from_reply(reply, queues, queue_size, self.is_packed())?;
        if let Some(restored) = restored {
            inflight.restore(restored, self.is_packed())?;
        }
        self.connection.send(FrontendRequest::SET_INFLIGHT_FD, inflight.description().as_bytes(), &[inflight.fd()])?;
        self.inflight = Some(inflight);
        self.connection.wait_for_acks()?;
        Ok(true)
    }

    fn restore_inflight(&mut self, restored: &InflightState) -> Result<(), FrontendError> {
        let advice = "requests in flight cannot be moved to it";
        let none = || FrontendError::NotOffered { what: "INFLIGHT_SHMFD".into(), advice };
        self.inflight.as_ref().ok_or_else(none)?.restore(restored, self.is_packed())
    }

    fn inflight_state(&self) -> Result<Option<InflightState>, FrontendError> {
        self.inflight.as_ref().map(InflightFile::state).transpose()
    }

    fn reports_sent(&self) -> bool {
        true
    }

    fn prepare_rings(&mut self, rings: &[(u16, RingSetup)]) -> Result<(), FrontendError> {
        self.send_for_each(rings, &mut || {}, UserDevice::send_ring_size)
    }

    fn validate_ring(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        self.validate_rings(&[(index, setup.clone())], &mut || {})
    }

    fn validate_rings(&mut self, rings: &[(u16, RingSetup)], sent: &mut dyn FnMut()) -> Result<(), FrontendError> {
        self.send_for_each(rings, sent, |device, index, setup| {
            device.send_ring(index, setup, setup.base)?;
            // A ring without a kick is not started and does not run (rules R2.2, D2.2).
            device.send_enable(index, true)?;
            device.send_enable(index, false)
        })
    }

    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError> {
        self.start_rings(&[(index, setup)], &mut || {}, &mut |_| {})
    }

    fn start_rings(
        &mut self,
        rings: &[(u16, RingSetup)],
        sent: &mut dyn FnMut(),
        started: &mut dyn FnMut(u16),
    ) -> Result<(), FrontendError> {
        // With replies pending, an interrupted start would look like one that has not begun.
        self.check_pending_replies()?;
        rings.iter().try_for_each(|(index, setup)| self.check_ring(*index, setup))?;
        self.connection.wait_for_acks()?;
        rings.chunks(MAX_UNACKED / START_MESSAGES).try_for_each(|rings| self.start_chunk(rings, sent, started))
    }

    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        self.stop_ring_with(FrontendRequest::GET_VRING_BASE, index)
    }

    fn stop_rings(
        &mut self,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        self.stop_rings_with(FrontendRequest::GET_VRING_BASE, indices, sent, stopped)
    }

    fn can_suspend_rings(&self) -> bool {
        self.has(INFLIGHT_MIGRATION | ProtocolFeatures::INFLIGHT_SHMFD)
    }

    fn suspend_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        self.check_suspend()?;
        self.stop_ring_with(FrontendRequest::GET_VRING_BASE_SKIP_DRAIN, index)
    }

    fn suspend_rings(
        &mut self,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        self.check_suspend()?;
        self.stop_rings_with(FrontendRequest::GET_VRING_BASE_SKIP_DRAIN, indices, sent, stopped)
    }

    fn start_logging(&mut self, log: &Arc<Log>, fd: BorrowedFd<'_>) -> Result<(), FrontendError> {
        let advice = "it cannot be migrated while it runs; use a back-end with a dirty log";
        self.require(ProtocolFeatures::LOG_SHMFD, "LOG_SHMFD", advice)?;
        if !self.negotiated.features.contains(VHOST_F_LOG_ALL) {
            return Err(FrontendError::NotOffered { what: "VHOST_F_LOG_ALL".into(), advice });
        }
        let fd = fd.try_clone_to_owned().map_err(FrontendError::system("keep the log's fd"))?;
        let before = self.log.replace((log.clone(), fd));
        let was_on = before.is_some();
        let done = self.keep_pending(|device| {
            device.install_log()?;
            if was_on { Ok(()) } else { device.send_logging() }
        });
        // If the back-end hangs up because of this log, reconnecting must not install it again.
        done.inspect_err(|_| self.log = before)
    }

    fn stop_logging(&mut self) -> Result<(), FrontendError> {
        if self.log.take().is_none() || self.needs_reconnect() {
            return Ok(());
        }
        // The owner that set the interrupt waits for this call as well.
        let timeout =
            if self.interrupt.is_set() { self.options.timeout.min(STOP_LOGGING_TIMEOUT) } else { self.options.timeout };
        self.connection.set_timeout(timeout);
        let stopped = self.with_timeout_policy(TimeoutPolicy::KeepUninterruptible, UserDevice::send_logging);
        self.connection.set_timeout(self.options.timeout);
        match stopped {
            // Recorded: a reconnection does not enable logging.
            Err(error) if error.needs_reconnect() => Ok(()),
            done => done,
        }
    }

    fn log_quality(&self) -> Option<LogQuality> {
        let can_log = self.has(ProtocolFeatures::LOG_SHMFD) && self.negotiated.features.contains(VHOST_F_LOG_ALL);
        can_log.then_some(LogQuality::Exact)
    }

    fn has_state(&self) -> bool {
        self.has(ProtocolFeatures::DEVICE_STATE)
    }

    fn save_state(&mut self) -> Result<Option<Vec<u8>>, FrontendError> {
        if !self.has(ProtocolFeatures::DEVICE_STATE) {
            return Ok(None);
        }
        let (patience, interrupt) = (self.options.stop_timeout, self.interrupt.clone());
        self.keep_pending(|device| device_state::save(&mut device.connection, patience, &interrupt)).map(Some)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), FrontendError> {
        let advice = "the guest has a device state; use a back-end of the same kind";
        self.require(ProtocolFeatures::DEVICE_STATE, "DEVICE_STATE", advice)?;
        device_state::load(&mut self.connection, self.options.stop_timeout, &self.interrupt, state)?;
        self.loaded_state = Some(state.to_vec());
        Ok(())
    }

    fn disk_generation(&mut self) -> Result<Option<DiskGeneration>, FrontendError> {
        self.request_disk_value(own::GET_DISK_GENERATION)
    }

    fn disk_identity(&mut self) -> Result<Option<u128>, FrontendError> {
        self.request_disk_value(own::GET_DISK_IDENTITY)
    }

    fn log(&self) -> Option<&Arc<Log>> {
        self.log.as_ref().map(|(log, _)| log)
    }

    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        let request = FrontendRequest::GET_CONFIG;
        let header = self.config_header(offset, buf.len())?;
        let payload = [header.as_bytes(), buf].concat();
        let reply = self.connection.request(request, &payload, &[])?;
        if reply.payload.is_empty() || reply.payload.get(4..8) == Some(&[0; 4]) {
            return Err(FrontendError::Refused { request, code: 0 });
        }
        let echoed = header.as_bytes().get(..8);
        match reply.payload.split_at_checked(size_of::<ConfigHeader>()) {
            Some((head, bytes)) if head.get(..8) == echoed && bytes.len() == buf.len() => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            _ => {
                let what = format!(
                    "a reply of {} bytes that is not for offset {offset} and {} bytes",
                    reply.payload.len(),
                    buf.len()
                );
                Err(FrontendError::ProtocolViolation { request, what, rule: "C1.1" })
            }
        }
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.write_config(offset, bytes, CONFIG_TYPE_FRONTEND)
    }

    fn status(&mut self) -> Result<Option<u8>, FrontendError> {
        if !self.has(ProtocolFeatures::STATUS) {
            return Ok(None);
        }
        let status: u64 = self.connection.request(FrontendRequest::GET_STATUS, &[], &[])?.read("F3.1")?;
        Ok(Some(status as u8))
    }

    fn set_status(&mut self, status: u8) -> Result<(), FrontendError> {
        self.status = status;
        if status == 0 {
            self.sent_rings.clear();
        }
        if !self.has(ProtocolFeatures::STATUS) {
            return Ok(());
        }
        self.send_status()?;
        self.connection.wait_for_acks()
    }

    fn hang_up_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        self.connection.hang_up_fd().map(Some)
    }

    fn take_events(&mut self) -> Vec<DeviceEvent> {
        self.events.take()
    }

    fn events_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        let fd = self.events.fd().try_clone_to_owned().map_err(FrontendError::system("watch for events"))?;
        Ok(Some(fd))
    }

    fn needs_reconnect(&self) -> bool {
        self.connection.is_hung_up() || self.connection.has_pending_replies()
    }

    fn interrupt(&self) -> Option<Interrupt> {
        Some(self.interrupt.clone())
    }

    fn reconnect(&mut self, deadline: Instant) -> Result<Reconnection, FrontendError> {
        if self.connection.has_pending_replies() && !self.connection.is_hung_up() {
            match self.resume_interrupted(deadline) {
                Err(error) if self.connection.is_hung_up() => {
                    tracing::debug!("{}: {}", self.path.display(), with_causes(&error))
                }
                done => return done.map(|()| Reconnection::default()),
            }
        }
        let timeout = self.options.timeout;
        let left = move || deadline.saturating_duration_since(Instant::now()).min(timeout).max(*BACK_OFF.end());
        let interrupt = self.interrupt.clone();
        let (resubmitted, attempts) = retry_until(deadline, &interrupt, || self.reconnect_once(left()))?;
        counters::reconnected(self.name(), resubmitted);
        Ok(Reconnection { resubmitted, attempts })
    }
}

impl UserDevice {
    /// Starts as many rings as can be started without reading a reply in between.
    fn start_chunk(
        &mut self,
        rings: &[(u16, RingSetup)],
        sent: &mut dyn FnMut(),
        started: &mut dyn FnMut(u16),
    ) -> Result<(), FrontendError> {
        let mut ends = Vec::new();
        let result = rings.iter().try_for_each(|(index, setup)| {
            self.send_ring(*index, setup, setup.base)?;
            self.send_kick(*index, setup)?;
            // The back-end may send a call as soon as the ring is enabled.
            self.backend_channel.iter().for_each(|backend_channel| backend_channel.add_ring(*index, setup));
            self.send_enable(*index, true)?;
            ends.push(self.connection.unacked());
            Ok(())
        });
        let acked = result.and_then(|()| self.connection.collect_acks(self.options.timeout, sent));
        let interrupted = match &acked {
            Ok(_) => None,
            // The rings start when the back-end processes the messages.
            Err(FrontendError::Interrupted { request }) => {
                self.starting = rings.iter().map(|(index, _)| *index).collect();
                Some(FrontendError::Interrupted { request: *request })
            }
            Err(_) => {
                self.backend_channel.iter().for_each(|backend_channel| {
                    rings.iter().for_each(|(index, _)| backend_channel.remove_ring(*index))
                });
                None
            }
        };
        let mut refused = match interrupted.is_some() {
            true => Vec::new(),
            false => acked?,
        }
        .into_iter()
        .peekable();
        let mut first = None;
        for ((index, setup), end) in rings.iter().zip(ends) {
            let mut is_refused = false;
            while let Some((_, error)) = refused.next_if(|(number, _)| *number < end) {
                is_refused = true;
                first.get_or_insert(error);
            }
            if is_refused {
                self.backend_channel.iter().for_each(|backend_channel| backend_channel.remove_ring(*index));
                continue;
            }
            if interrupted.is_none() {
                self.forward_kicks(*index, true);
            }
            self.rings.insert(*index, setup.clone());
            // The back-end may change its state from now on.
            self.loaded_state = None;
            started(*index);
        }
        interrupted.or(first).map_or(Ok(()), Err)
    }

    fn check_suspend(&self) -> Result<(), FrontendError> {
        if self.can_suspend_rings() && self.inflight.is_some() {
            return Ok(());
        }
        let advice = "start the back-end with --inflight-migration, or stop rings with a drain";
        Err(FrontendError::NotOffered { what: "GET_VRING_BASE_SKIP_DRAIN".into(), advice })
    }

    /// Stops a ring with GET_VRING_BASE or GET_VRING_BASE_SKIP_DRAIN.
    fn stop_ring_with(&mut self, request: FrontendRequest, index: u16) -> Result<RingBase, FrontendError> {
        let mut stopped = None;
        self.stop_rings_with(request, &[index], &mut || {}, &mut |_, base| stopped = Some(base))?;
        stopped.ok_or_else(|| FrontendError::InvalidRing { index, reason: "it is not started".into() })
    }

    /// Stops rings with one of these requests, and calls `stopped` for each stopped ring.
    fn stop_rings_with(
        &mut self,
        request: FrontendRequest,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        self.check_pending_replies()?;
        if let Some(index) = indices.iter().copied().find(|index| !self.rings.contains_key(index)) {
            return Err(FrontendError::InvalidRing { index, reason: "it is not started".into() });
        }
        indices.iter().for_each(|index| self.forward_kicks(*index, false));
        let ended = self.keep_pending(|device| {
            // Two messages per ring.
            let mut chunks = indices.chunks(MAX_UNACKED / 2);
            chunks.try_for_each(|indices| device.request_bases(request, indices, sent, stopped))
        });
        let running = indices.iter().copied().filter(|index| self.rings.contains_key(index)).collect::<Vec<_>>();
        match self.connection.has_pending_replies() {
            true => self.stopping = running,
            // Rings that were not stopped keep running.
            false => running.into_iter().for_each(|index| self.forward_kicks(index, true)),
        }
        ended
    }

    fn request_bases(
        &mut self,
        request: FrontendRequest,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        self.connection.wait_for_acks()?;
        // Disabling a ring may drain it.
        if request == FrontendRequest::GET_VRING_BASE {
            indices.iter().try_for_each(|index| self.send_enable(*index, false))?;
        }
        let states: Vec<_> = indices.iter().map(|index| VringState { index: (*index).into(), num: 0 }).collect();
        let mut replies = Vec::new();
        let payloads = states.iter().map(IntoBytes::as_bytes);
        let asked = self.connection.request_each(self.options.stop_timeout, request, payloads, sent, &mut replies);
        for (index, reply) in indices.iter().copied().zip(replies) {
            let base = self.parse_base(&reply, index)?;
            self.backend_channel.iter().for_each(|backend_channel| backend_channel.remove_ring(index));
            self.rings.remove(&index);
            stopped(index, base);
        }
        for (_, error) in asked? {
            let (path, error) = (self.path.display(), with_causes(&error));
            limited!(warn, "{path}: {error}; GET_VRING_BASE has stopped the ring anyway");
        }
        Ok(())
    }

    fn parse_base(&self, reply: &Reply, index: u16) -> Result<RingBase, FrontendError> {
        // After an invalid reply the ring's state is unknown; a reconnection restarts it from its last position.
        let state: VringState = reply.read("R3.1").inspect_err(|_| self.connection.close())?;
        if state.index != u32::from(index) {
            self.connection.close();
            let what = format!("a reply for ring {} instead of {index}", state.index);
            return Err(FrontendError::ProtocolViolation { request: reply.request, what, rule: "R3.1" });
        }
        Ok(RingBase::from_bits(state.num))
    }

    /// Runs an operation whose result only this connection can deliver: its replies stay pending after a timeout. If
    /// there is an inflight region, which records the rings' positions, the connection is closed instead.
    fn keep_pending<T>(
        &mut self,
        work: impl FnOnce(&mut UserDevice) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        self.with_timeout_policy(TimeoutPolicy::Keep, work)
    }

    fn with_timeout_policy<T>(
        &mut self,
        policy: TimeoutPolicy,
        work: impl FnOnce(&mut UserDevice) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        self.connection.set_timeout_policy(policy);
        let done = work(self);
        self.connection.set_timeout_policy(TimeoutPolicy::Close);
        if done.as_ref().is_err_and(FrontendError::is_hang_up) && self.inflight.is_some() {
            self.connection.close();
        }
        done
    }

    /// Receives the pending replies and restores the recorded state: a ring that was being stopped or started runs, and
    /// logging is as before the interrupted call. If the start of a ring is refused, the connection is closed and the
    /// ring is started on a new one.
    fn resume_interrupted(&mut self, deadline: Instant) -> Result<(), FrontendError> {
        let LateReplies { base_replies, refused } = self.connection.receive_pending(deadline)?;
        if let Some(error) = refused.filter(|_| !self.starting.is_empty()) {
            self.connection.close();
            return Err(error);
        }
        // Other refusals show when the call is repeated. After an error here the state of the connection is unknown.
        self.undo_interrupted(&base_replies).inspect_err(|_| self.connection.close())
    }

    fn undo_interrupted(&mut self, stopped: &[Reply]) -> Result<(), FrontendError> {
        self.install_log()?;
        self.send_logging()?;
        for index in std::mem::take(&mut self.starting) {
            let Some(setup) = self.rings.get(&index) else { continue };
            self.forward_kicks(index, true);
            signal(&setup.kick);
        }
        let stopping = std::mem::take(&mut self.stopping);
        // Replies arrive in the order of the interrupted stops.
        let mut replies = stopped.iter();
        for index in stopping {
            let Some(setup) = self.rings.get(&index).cloned() else { continue };
            if let Some(reply) = replies.next() {
                let base = self.parse_base(reply, index)?;
                self.send_ring(index, &setup, base)?;
                self.send_kick(index, &setup)?;
                self.rings.insert(index, RingSetup { base, ..setup.clone() });
            }
            self.send_enable(index, true)?;
            self.connection.wait_for_acks()?;
            self.forward_kicks(index, true);
            // Requests may have been added meanwhile.
            signal(&setup.kick);
        }
        Ok(())
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8], flags: u32) -> Result<(), FrontendError> {
        let header = ConfigHeader { flags, ..self.config_header(offset, bytes.len())? };
        self.connection.send(FrontendRequest::SET_CONFIG, &[header.as_bytes(), bytes].concat(), &[])?;
        self.connection.wait_for_acks()
    }

    /// Starts or stops forwarding a ring's kicks, if they are messages.
    fn forward_kicks(&self, index: u16, yes: bool) {
        self.backend_channel.iter().for_each(|backend_channel| backend_channel.set_kick_forwarding(index, yes));
    }

    /// Requests the disk's identity or generation.
    fn request_disk_value<T: FromBytes>(&mut self, request: FrontendRequest) -> Result<Option<T>, FrontendError> {
        if !self.has(own::F_DISK_GENERATION) {
            return Ok(None);
        }
        let reply = self.connection.request(request, &[], &[])?;
        if reply.payload.is_empty() { Ok(None) } else { reply.read("F3.1").map(Some) }
    }

    fn config_header(&self, offset: u32, len: usize) -> Result<ConfigHeader, FrontendError> {
        self.require(ProtocolFeatures::CONFIG, "CONFIG", "its configuration can't be read through this socket")?;
        if len == 0 || len > VHOST_USER_MAX_CONFIG_SIZE {
            let what = format!("{len} bytes of configuration in one message");
            return Err(FrontendError::NotOffered { what, advice: "ask for 1 to 256 bytes" });
        }
        Ok(ConfigHeader { offset, size: len as u32, flags: CONFIG_TYPE_FRONTEND })
    }
}

/// Signals an eventfd of a ring, which the back-end shares.
fn signal(eventfd: &OwnedFd) {
    let _ = nonblocking::signal(eventfd.as_fd());
}
