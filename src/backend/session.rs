//! What the messages of a front-end mean: the protocol's state machine, without sockets and threads.
//!
//! [`Session::message`] takes one message, tells the rings what follows from it ([`Rings`], the workers outside of
//! tests) and says what to answer. The order in which front-ends send things is theirs (rules R6, R7, L8): all state
//! is kept as given, and a ring runs from the moment it is started, enabled and complete.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tracing::{debug, error, warn};
use zerocopy::FromBytes;

use super::channel::Attached;
use super::postcopy::{Postcopy, own_addresses};
use super::transfer::Transfer;
use super::{BackendError, Device, Host, Message, Notifier, Reply, counters};
use crate::abi::vhost::{VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE};
use crate::abi::vhost_user::{
    ConfigHeader, DEVICE_STATE_NOFD_MASK, Header, InflightDescription, IotlbMsg, LogDescription, MemRegMsg,
    MemoryHeader, MemoryRegion, Request as Code, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_MAX_CONFIG_SIZE, VHOST_USER_MAX_RAM_SLOTS_TODAY, VHOST_VRING_F_LOG, VRING_IDX_MASK, VRING_NOFD_MASK,
    VringAddr, VringState, protocol_feature, unstable,
};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED};
use crate::abi::{bit, virtio};
use crate::dirty::{Log, LogSignal};
use crate::inflight;
use crate::memory::{Iotlb, Memory, Region, invalidated};
use crate::ring::{RingBase, RingLayout};

/// The protocol features that are offered with any device.
const PROTOCOL_FEATURES: u64 = bit(protocol_feature::MQ)
    | bit(protocol_feature::LOG_SHMFD)
    | bit(protocol_feature::REPLY_ACK)
    | bit(protocol_feature::BACKEND_REQ)
    | bit(protocol_feature::CONFIG)
    | bit(protocol_feature::BACKEND_SEND_FD)
    | bit(protocol_feature::INFLIGHT_SHMFD)
    | bit(protocol_feature::RESET_DEVICE)
    | bit(protocol_feature::INBAND_NOTIFICATIONS)
    | bit(protocol_feature::CONFIGURE_MEM_SLOTS)
    | bit(protocol_feature::STATUS);

/// What INBAND_NOTIFICATIONS makes no sense without.
const IN_BAND_NEEDS: u64 = bit(protocol_feature::BACKEND_REQ) | bit(protocol_feature::REPLY_ACK);

const LOG_ALL: u64 = bit(VHOST_F_LOG_ALL);
const BIT_30: u64 = bit(VHOST_USER_F_PROTOCOL_FEATURES);

/// Everything a ring needs to run.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where the ring lies, guest-physical.
    pub layout: RingLayout,
    /// Where it goes on, unless `inflight` knows better (rule I3).
    pub base: RingBase,
    /// Acknowledged features.
    pub features: u64,
    /// Guest memory.
    pub memory: Memory,
    /// Where writes are logged.
    pub logging: Logging,
    /// Readable when there are new requests.
    pub kick: Option<Arc<OwnedFd>>,
    /// Whether the ring is to be looked at every now and then: there is no kick, and [`Rings::kick`] isn't called either.
    pub polled: bool,
    /// Signalled when requests were used.
    pub call: Option<Arc<Notifier>>,
    /// Signalled when the ring breaks.
    pub error: Option<Arc<Notifier>>,
    /// Where requests in flight are noted.
    pub inflight: Option<Arc<inflight::Region>>,
    /// Whether it runs on this connection for the first time: if it has a past, that was another back-end's.
    pub first: bool,
    /// Whether guest memory is still on its way: nobody may wait for the ring where pages are waited for (rule P1).
    pub postcopy: bool,
    /// The front-end, to be told or asked something.
    pub host: Arc<Host>,
    /// With ACCESS_PLATFORM acknowledged: what is known of the IOMMU. All addresses of the ring are I/O virtual then.
    pub iotlb: Option<Arc<Iotlb>>,
}

/// Where a ring's writes are logged. Nothing is logged by default.
#[derive(Debug, Clone, Default)]
pub struct Logging {
    /// The log for data, while LOG_ALL is acknowledged (rule L3).
    pub data: Option<Arc<Log>>,
    /// The log for the used ring, and the address it is logged under, while the ring's F_LOG is set (rule L3).
    pub used: Option<(Arc<Log>, u64)>,
    /// Signalled after logging (rule L12).
    pub signal: Option<Arc<LogSignal>>,
    /// How many pages outside the log have been reported; one for all rings (rule L6).
    pub lost: Arc<AtomicU64>,
}

/// The rings of a device, as a session commands them. Every call returns when it has taken effect: what a ring wrote
/// before is written, and it does nothing more by its old orders (rules R3, L9).
pub trait Rings {
    /// Lets a ring run that doesn't.
    ///
    /// # Errors
    /// What the system says; the ring then doesn't run.
    fn start(&mut self, index: u16, setup: Setup) -> Result<(), BackendError>;

    /// Completes, logs and publishes all requests of a running ring, stops it, and tells where it goes on (rule R3).
    ///
    /// # Errors
    /// When that can't be told. The ring doesn't run then either.
    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError>;

    /// Stops a running ring as soon as nothing reaches into guest memory any more, and leaves what is not complete by then
    /// marked in the inflight region (rule I8). Tells where the ring goes on. One without a region is drained.
    ///
    /// # Errors
    /// As [`Rings::stop`].
    fn suspend(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.stop(index)
    }

    /// Whether a running ring is to leave new requests alone.
    fn hold(&mut self, index: u16, yes: bool) {
        let _ = (index, yes);
    }

    /// Changes where a running ring logs (rule L9).
    fn set_logging(&mut self, index: u16, logging: Logging);

    /// Finishes what uses these addresses, whose translations are gone (rule T3).
    fn invalidate(&mut self, iovas: &RangeInclusive<u64>);

    /// Has a running ring look for new requests (rule B3), or for translations that it lacked.
    fn kick(&mut self, index: u16);

    /// Changes what a running ring signals.
    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>);
}

/// What is due after a message.
#[derive(Debug)]
pub enum Step {
    /// Nothing.
    Silence,
    /// Send this.
    Reply(Reply),
    /// Hang up: the front-end waits for an answer that can't be given.
    Close(BackendError),
}

/// One ring, as the front-end set it up; addresses are the front-end's.
#[derive(Debug, Default)]
struct Ring {
    size: u16,
    base: RingBase,
    addr: Option<VringAddr>,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<Notifier>>,
    error: Option<Arc<Notifier>>,
    /// SET_VRING_KICK or a kick in-band came, and no GET_VRING_BASE since (rules R2, B3).
    started: bool,
    enabled: bool,
    /// [`Rings::start`] was called, and no [`Rings::stop`] since.
    running: bool,
    /// [`Rings::start`] was called before.
    ran: bool,
}

/// The state of one connection.
pub struct Session {
    device: Arc<dyn Device>,
    features: u64,
    protocol_features: u64,
    status: u64,
    memory: Memory,
    log: Option<Arc<Log>>,
    log_signal: Option<Arc<LogSignal>>,
    lost: Arc<AtomicU64>,
    inflight: Option<Arc<inflight::Region>>,
    rings: Vec<Ring>,
    postcopy: Postcopy,
    /// A device's state on its way.
    transfer: Option<Transfer>,
    iotlb: Arc<Iotlb>,
    host: Arc<Host>,
    /// The back-end channel, if the front-end has given one.
    channel: Option<Attached>,
}

impl Session {
    /// A session with a front-end that has just connected: nothing is acknowledged, all rings are stopped and disabled.
    pub fn new(device: Arc<dyn Device>) -> Session {
        let rings = (0..device.queues()).map(|_| Ring::default()).collect();
        let host = Arc::new(Host::default());
        device.connected(host.clone());
        Session {
            device,
            features: 0,
            protocol_features: 0,
            status: 0,
            memory: Memory::default(),
            log: None,
            log_signal: None,
            lost: Arc::default(),
            inflight: None,
            rings,
            postcopy: Postcopy::default(),
            transfer: None,
            iotlb: Arc::default(),
            host,
            channel: None,
        }
    }

    /// Does what a message asks, and says what to answer. What is refused for its contents changes nothing.
    pub fn message(&mut self, message: Message, rings: &mut dyn Rings) -> Step {
        let code = message.code;
        debug!(
            "{code}: {} bytes, {} fds{}",
            message.payload.len(),
            message.fds.len(),
            if message.flags & Header::FLAG_NEED_REPLY != 0 { ", wants a reply" } else { "" }
        );
        if self.postcopy.awaits() {
            return self.memory_acknowledged(&message, rings).map_or_else(Step::Close, |()| Step::Silence);
        }
        let asked = message.flags & Header::FLAG_NEED_REPLY != 0;
        let outcome = self.handle(message, asked && self.speaks(protocol_feature::REPLY_ACK), rings);
        // Asked afterwards: the message that switches acknowledgements on may want the first one (rule F4).
        let acknowledge = asked && self.speaks(protocol_feature::REPLY_ACK);
        counters::message(code, outcome.is_err());
        match outcome {
            Ok(Some(reply)) => Step::Reply(reply),
            Ok(None) if acknowledge => Step::Reply(Reply::new(code, &0u64)),
            Ok(None) => Step::Silence,
            // The front-end takes up its rings from guest memory and the inflight region, with the next connection.
            Err(error @ BackendError::RingLost { .. }) => Step::Close(error),
            Err(error) if acknowledge => {
                error!("{code} refused: {error}");
                Step::Reply(Reply::new(code, &1u64))
            }
            Err(error) if self.always_answers(code) => Step::Close(error),
            Err(error) => {
                error!("{code} refused: {error}");
                Step::Silence
            }
        }
    }

    fn speaks(&self, feature: u32) -> bool {
        self.protocol_features & bit(feature) != 0
    }

    /// Whether a request has a reply of its own, whatever its flags say (rule F3).
    fn always_answers(&self, code: Code) -> bool {
        match code {
            Code::SET_LOG_BASE => self.speaks(protocol_feature::LOG_SHMFD),
            Code::SET_MEM_TABLE => self.postcopy.is_listening(),
            Code::GET_FEATURES
            | Code::GET_PROTOCOL_FEATURES
            | Code::GET_QUEUE_NUM
            | Code::GET_VRING_BASE
            | Code::GET_CONFIG
            | Code::GET_INFLIGHT_FD
            | Code::GET_MAX_MEM_SLOTS
            | Code::GET_STATUS
            | Code::POSTCOPY_ADVISE
            | Code::POSTCOPY_LISTEN
            | Code::POSTCOPY_END
            | Code::CREATE_CRYPTO_SESSION
            | Code::GET_SHARED_OBJECT
            | Code::SET_DEVICE_STATE_FD
            | Code::CHECK_DEVICE_STATE
            | Code::GET_SHMEM_CONFIG
            | Code::GET_VRING_BASE_SKIP_DRAIN => true,
            _ => false,
        }
    }

    fn handle(
        &mut self,
        mut message: Message,
        acknowledge: bool,
        rings: &mut dyn Rings,
    ) -> Result<Option<Reply>, BackendError> {
        let code = message.code;
        if message.flags & Header::FLAG_REPLY != 0 {
            return Err(BackendError::UnexpectedReply { code });
        }
        let number = |number: u64| Ok(Some(Reply::new(code, &number)));
        match code {
            Code::GET_FEATURES => return number(self.offered()),
            Code::SET_FEATURES => self.set_features(message.body()?, rings)?,
            Code::GET_PROTOCOL_FEATURES => return number(self.offered_protocol()),
            Code::SET_PROTOCOL_FEATURES => {
                let bits = acknowledged(code, message.body()?, self.offered_protocol())?;
                if bits & bit(protocol_feature::INBAND_NOTIFICATIONS) != 0 && bits & IN_BAND_NEEDS != IN_BAND_NEEDS {
                    return Err(BackendError::InBand);
                }
                self.protocol_features = bits;
                self.host.set_acknowledges(self.speaks(protocol_feature::REPLY_ACK));
            }
            Code::GET_QUEUE_NUM => return number(self.device.queue_num()),
            Code::GET_MAX_MEM_SLOTS => return number(VHOST_USER_MAX_RAM_SLOTS_TODAY as u64),
            Code::SET_OWNER => {}
            Code::RESET_OWNER => self.disable(rings)?,
            Code::RESET_DEVICE => self.reset(rings)?,
            Code::GET_STATUS => return number(self.status),
            Code::SET_STATUS => {
                self.status = message.body()?;
                if self.status == 0 {
                    self.reset(rings)?;
                }
            }
            Code::SET_MEM_TABLE => {
                let memory = Memory::new(regions_of(&message)?)?;
                if self.postcopy.is_listening() {
                    let payload = own_addresses(&message.payload, &memory);
                    self.postcopy.offer(memory)?;
                    return Ok(Some(Reply { code, payload, fd: None }));
                }
                self.replace_memory(memory, rings)?;
            }
            Code::POSTCOPY_ADVISE if self.speaks(protocol_feature::PAGEFAULT) => {
                // An answer without an fd is the one that means "no".
                let fd = self.postcopy.advise().map_err(|error| error!("{error}")).ok();
                return Ok(Some(Reply { code, payload: Vec::new(), fd }));
            }
            Code::POSTCOPY_LISTEN if self.speaks(protocol_feature::PAGEFAULT) => {
                let listening = self.all_stopped(code, "P1").and_then(|()| self.postcopy.listen());
                return number(answer(listening));
            }
            Code::POSTCOPY_END if self.speaks(protocol_feature::PAGEFAULT) => {
                return number(answer(self.postcopy.end()));
            }
            Code::ADD_MEM_REG => {
                let MemRegMsg { region, .. } = message.body()?;
                let fd = message.only_fd()?;
                self.add_region(&region, fd, rings)?;
            }
            Code::REM_MEM_REG => self.remove_region(&message.body::<MemRegMsg>()?.region, rings)?,
            Code::SET_LOG_BASE => {
                let description = message.body()?;
                self.set_log_base(&description, &message.only_fd()?, rings)?;
                // The answer that every front-end takes (rule F7).
                let own = self.speaks(protocol_feature::LOG_SHMFD) && !acknowledge;
                return Ok(own.then(|| Reply::new(code, &description)));
            }
            Code::SET_LOG_FD => {
                // No fd takes the last one back (rule L12).
                self.log_signal = message.fds.pop().map(|fd| Arc::new(LogSignal::new(fd)));
                self.relog(rings);
            }
            Code::SET_VRING_NUM => self.set_size(message.body()?)?,
            Code::SET_VRING_BASE => {
                let state: VringState = message.body()?;
                self.stopped(code, state.index, "R4")?.base = RingBase::from_bits(state.num);
            }
            Code::SET_VRING_ADDR => self.set_addr(message.body()?, rings)?,
            Code::SET_VRING_KICK => {
                let (index, kick) = self.ring_fd(&mut message)?;
                self.pause(index, rings)?;
                if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                    (ring.kick, ring.started) = (kick.map(Arc::new), true);
                }
                self.settle(index, rings)?;
            }
            Code::SET_VRING_CALL | Code::SET_VRING_ERR => {
                let (index, fd) = self.ring_fd(&mut message)?;
                let notifier = fd.map(|fd| Arc::new(Notifier::new(fd)));
                let ring = self.ring(code, index.into())?;
                *(if code == Code::SET_VRING_CALL { &mut ring.call } else { &mut ring.error }) = notifier;
                if let Some(ring) = self.rings.get(usize::from(index)).filter(|ring| ring.running) {
                    let (call, error) = self.notifiers(index, ring);
                    rings.set_notifiers(index, call, error);
                }
            }
            Code::VRING_KICK if self.is_in_band() => {
                let VringState { index, .. } = message.body()?;
                let ring = self.ring(code, index)?;
                let running = ring.running;
                // It starts a ring too: UML sends no SET_VRING_KICK.
                ring.started = true;
                if running {
                    rings.kick(index as u16);
                } else {
                    self.settle(index as u16, rings)?;
                }
            }
            Code::SET_VRING_ENABLE => {
                let state: VringState = message.body()?;
                self.ring(code, state.index)?.enabled = state.num != 0;
                self.settle(state.index as u16, rings)?;
            }
            Code::GET_VRING_BASE | Code::GET_VRING_BASE_SKIP_DRAIN => {
                let [leaves, skips] = [unstable::F_GET_VRING_BASE_INFLIGHT, unstable::F_GET_VRING_BASE_SKIP_DRAIN];
                if code == Code::GET_VRING_BASE_SKIP_DRAIN && !self.speaks(skips) {
                    return Err(BackendError::Unsupported { code });
                }
                let VringState { index, .. } = message.body()?;
                self.ring(code, index)?;
                // Before there was a request for it, the feature alone meant it (rule I8).
                match self.speaks(leaves) && (code == Code::GET_VRING_BASE_SKIP_DRAIN || !self.speaks(skips)) {
                    true => self.suspend(index as u16, rings)?,
                    false => self.pause(index as u16, rings)?,
                }
                let ring = self.ring(code, index)?;
                (ring.started, ring.kick) = (false, None);
                self.report_lost_pages();
                let num = self.ring(code, index)?.base.bits();
                return Ok(Some(Reply::new(code, &VringState { index, num })));
            }
            Code::GET_CONFIG => return self.get_config(&message).map(Some),
            Code::SET_CONFIG => {
                let ConfigHeader { offset, size, flags } = message.body()?;
                let bytes = config_bytes(&message, offset, size)?;
                self.device.set_config(offset, bytes, flags)?;
            }
            Code::GET_INFLIGHT_FD => return Ok(Some(self.get_inflight(message.body()?))),
            Code::SET_INFLIGHT_FD => {
                let description: InflightDescription = message.body()?;
                self.check_shape(&description)?;
                for index in 0..self.device.queues() {
                    self.stopped(code, index.into(), "I1")?;
                }
                let fd = message.only_fd()?;
                let InflightDescription { mmap_size, mmap_offset, num_queues, queue_size, .. } = description;
                let region = inflight::Region::map(
                    self.inflight_kind(),
                    fd.as_fd(),
                    mmap_size,
                    mmap_offset,
                    num_queues,
                    queue_size,
                )?;
                self.inflight = Some(Arc::new(region));
            }
            Code::IOTLB_MSG if self.device.features() & bit(VIRTIO_F_ACCESS_PLATFORM) != 0 => {
                self.translation(&message.body()?, rings)?;
            }
            Code::SET_DEVICE_STATE_FD if self.speaks(protocol_feature::DEVICE_STATE) => {
                let error = answer(self.begin_transfer(&mut message));
                return number(error | DEVICE_STATE_NOFD_MASK);
            }
            Code::CHECK_DEVICE_STATE if self.speaks(protocol_feature::DEVICE_STATE) => {
                return number(answer(self.check_transfer()));
            }
            Code::SEND_RARP | Code::NET_SET_MTU => self.device.message(code, message.body()?)?,
            Code::SET_BACKEND_REQ_FD => {
                let socket = message.only_fd()?;
                // The old one ends first.
                self.channel = None;
                self.channel = Some(self.host.attach(socket)?);
            }
            _ => return Err(BackendError::Unsupported { code }),
        }
        Ok(None)
    }

    fn offered(&self) -> u64 {
        self.device.features() | LOG_ALL | BIT_30
    }

    /// QEMU sets the status to 0, which is a reset, whenever it stops a device; there would be no state left to save.
    fn offered_protocol(&self) -> u64 {
        let mut offered = PROTOCOL_FEATURES | self.device.protocol_features();
        if self.device.state_kind().is_some() {
            offered = offered & !bit(protocol_feature::STATUS) | bit(protocol_feature::DEVICE_STATE);
        }
        if offered & bit(protocol_feature::PAGEFAULT) != 0 {
            // Front-ends do not speak both (rule M1).
            offered &= !bit(protocol_feature::CONFIGURE_MEM_SLOTS);
        }
        offered
    }

    fn set_features(&mut self, bits: u64, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let bits = acknowledged(Code::SET_FEATURES, bits, self.offered())?;
        // Rings and queues keep to what was acknowledged when they started.
        let changed = (bits ^ self.features) & !LOG_ALL;
        if changed != 0 && self.rings.iter().any(|ring| ring.running) {
            return Err(BackendError::FeaturesRun { changed });
        }
        self.features = bits;
        self.relog(rings);
        if bits & BIT_30 == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
            self.settle_all(rings)?;
        }
        Ok(())
    }

    fn is_translated(&self) -> bool {
        self.features & bit(VIRTIO_F_ACCESS_PLATFORM) != 0
    }

    /// What the front-end says of its IOMMU (rules T2, T3).
    fn translation(&mut self, message: &IotlbMsg, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let IotlbMsg { iova, size, uaddr, perm, kind, .. } = *message;
        match kind {
            VHOST_IOTLB_UPDATE => {
                if perm != 0 {
                    self.memory.pieces_of_user(uaddr, size, |_, _| {})?;
                }
                self.iotlb.update(iova, size, uaddr, perm)?;
                // Some of them may wait for just this.
                for (index, _) in (0..).zip(&self.rings).filter(|(_, ring)| ring.running) {
                    rings.kick(index);
                }
                Ok(())
            }
            VHOST_IOTLB_INVALIDATE => {
                let iovas = invalidated(iova, size)?;
                self.iotlb.invalidate(&iovas);
                rings.invalidate(&iovas);
                Ok(())
            }
            _ => Err(BackendError::IotlbKind { kind }),
        }
    }

    /// Stops all rings; each needs a new kick and a new enable.
    fn disable(&mut self, rings: &mut dyn Rings) -> Result<(), BackendError> {
        for index in 0..self.device.queues() {
            self.pause(index, rings)?;
        }
        for ring in &mut self.rings {
            (ring.started, ring.enabled, ring.kick) = (false, false, None);
        }
        Ok(())
    }

    /// Back to the state before the driver came: the owner, its memory and protocol features stay (rules R8, I7).
    fn reset(&mut self, rings: &mut dyn Rings) -> Result<(), BackendError> {
        self.disable(rings)?;
        self.rings.iter_mut().for_each(|ring| *ring = Ring::default());
        (self.features, self.status) = (0, 0);
        self.iotlb.invalidate(&(0..=u64::MAX));
        self.device.reset();
        if let Some(region) = &self.inflight {
            region.reset();
        }
        Ok(())
    }

    fn add_region(&mut self, region: &MemoryRegion, fd: OwnedFd, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let mut regions = self.memory.regions().to_vec();
        if regions.len() >= VHOST_USER_MAX_RAM_SLOTS_TODAY {
            return Err(BackendError::NoSlot { slots: VHOST_USER_MAX_RAM_SLOTS_TODAY });
        }
        regions.push(map(region, &fd)?);
        self.replace_memory(Memory::new(regions)?, rings)
    }

    fn remove_region(&mut self, region: &MemoryRegion, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let mut regions = self.memory.regions().to_vec();
        let (gpa, size, user_addr) = (region.guest_phys_addr, region.memory_size, region.userspace_addr);
        let found = regions.iter().position(|r| (r.gpa(), r.size(), r.user_addr()) == (gpa, size, user_addr));
        regions.remove(found.ok_or(BackendError::NoSuchRegion { gpa, size, user_addr })?);
        self.replace_memory(Memory::new(regions)?, rings)
    }

    /// Requests that are in flight finish in the old memory; then the rings go on in the new one (rules L9, M1).
    fn replace_memory(&mut self, memory: Memory, rings: &mut dyn Rings) -> Result<(), BackendError> {
        for index in 0..self.device.queues() {
            self.pause(index, rings)?;
        }
        self.memory = memory;
        self.check_log_size();
        self.settle_all(rings)
    }

    /// The front-end hears of faults from here on, so rings may run (rule P1).
    fn memory_acknowledged(&mut self, message: &Message, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let memory = self.postcopy.acknowledged(message, message.code == Code::SET_MEM_TABLE)?;
        self.replace_memory(memory, rings)
    }

    fn set_log_base(
        &mut self,
        description: &LogDescription,
        fd: &OwnedFd,
        rings: &mut dyn Rings,
    ) -> Result<(), BackendError> {
        let log = Log::map(fd.as_fd(), description.mmap_size, description.mmap_offset)?;
        self.report_lost_pages();
        (self.log, self.lost) = (Some(Arc::new(log)), Arc::default());
        self.check_log_size();
        self.relog(rings);
        Ok(())
    }

    fn check_log_size(&self) {
        if let Some(log) = &self.log
            && log.pages().saturating_mul(crate::memory::LOG_PAGE) < self.memory.end()
        {
            let (pages, end) = (log.pages(), self.memory.end());
            warn!("the log has {pages} pages, memory ends at {end:#x}: writes behind the log are lost (rule L6)");
        }
    }

    fn report_lost_pages(&self) {
        if let Some(lost) = self.log.as_ref().map(|log| log.out_of_range()).filter(|&lost| lost > 0) {
            error!("{lost} pages outside the log were written and not logged (rule L6)");
        }
    }

    /// Tells the running rings where to log now.
    fn relog(&self, rings: &mut dyn Rings) {
        for (index, ring) in (0..).zip(&self.rings).filter(|(_, ring)| ring.running) {
            rings.set_logging(index, self.logging(ring));
        }
    }

    fn logging(&self, ring: &Ring) -> Logging {
        let used = ring.addr.filter(logs_used).zip(self.log.clone());
        Logging {
            data: self.log.clone().filter(|_| self.features & LOG_ALL != 0),
            used: used.map(|(addr, log)| (log, addr.log_guest_addr)),
            signal: self.log_signal.clone(),
            lost: self.lost.clone(),
        }
    }

    fn set_size(&mut self, state: VringState) -> Result<(), BackendError> {
        let (max, packed) = (self.device.max_queue_size(), self.is_packed());
        let ring = self.stopped(Code::SET_VRING_NUM, state.index, "R2")?;
        let fits = |size: &u16| (1..=max).contains(size) && (packed || size.is_power_of_two());
        let size = u16::try_from(state.num).ok().filter(fits);
        let index = state.index as u16;
        ring.size = size.ok_or(BackendError::RingSize { index, size: state.num, max })?;
        Ok(())
    }

    fn set_addr(&mut self, addr: VringAddr, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let features = self.features;
        let ring = self.ring(Code::SET_VRING_ADDR, addr.index)?;
        let (index, running, size) = (addr.index as u16, ring.running, ring.size);
        if logs_used(&addr) {
            let [_, _, device] = RingLayout::area_bytes(features, size);
            let wraps = addr.log_guest_addr.checked_add(device).is_none();
            if wraps || !addr.log_guest_addr.is_multiple_of(4) {
                return Err(BackendError::LogAddress { index, addr: addr.log_guest_addr });
            }
        }
        if running {
            let places = |addr: &VringAddr| (addr.desc_user_addr, addr.avail_user_addr, addr.used_user_addr);
            if ring.addr.as_ref().map(places) != Some(places(&addr)) {
                return Err(BackendError::RingRuns { code: Code::SET_VRING_ADDR, index, rule: "R5" });
            }
        } else if size > 0 && !self.memory.regions().is_empty() && !self.is_translated() {
            layout(&self.memory, features, index, size, &addr)?;
        }
        self.ring(Code::SET_VRING_ADDR, addr.index)?.addr = Some(addr);
        self.relog(rings);
        self.settle(index, rings)
    }

    fn get_config(&self, message: &Message) -> Result<Reply, BackendError> {
        let header: ConfigHeader = message.body()?;
        let ConfigHeader { offset, size, .. } = header;
        let mut reply = Reply::new(message.code, &header);
        match config_end(message.code, offset, size) {
            Ok(end) => {
                let mut config = self.device.config();
                config.resize(end.max(config.len()), 0);
                reply.payload.extend(config.get(offset as usize..end).unwrap_or_default());
            }
            Err(error) => {
                // This request has an answer that means "no": no payload.
                error!("{error}");
                reply.payload.clear();
            }
        }
        Ok(reply)
    }

    fn get_inflight(&self, wanted: InflightDescription) -> Reply {
        let make = || {
            self.check_shape(&wanted)?;
            let mmap_size = inflight::Region::bytes_for(self.inflight_kind(), wanted.num_queues, wanted.queue_size)?;
            let (_, fd) = inflight::Region::create(self.inflight_kind(), wanted.num_queues, wanted.queue_size)?;
            Ok::<_, BackendError>((mmap_size, Some(fd)))
        };
        let (mmap_size, fd) = make().unwrap_or_else(|error| {
            // This request has an answer that means "no": a region of no bytes.
            error!("{error}");
            (0, None)
        });
        let description = InflightDescription { mmap_size, mmap_offset: 0, ..wanted };
        Reply { fd, ..Reply::new(Code::GET_INFLIGHT_FD, &description) }
    }

    /// Whether messages stand for the fds of kicks, calls and errors that are not given (rule B3).
    fn is_in_band(&self) -> bool {
        self.speaks(protocol_feature::INBAND_NOTIFICATIONS)
    }

    /// SET_DEVICE_STATE_FD; a transfer that nobody asked the result of is given up.
    fn begin_transfer(&mut self, message: &mut Message) -> Result<(), BackendError> {
        self.transfer = None;
        self.all_stopped(message.code, "D1")?;
        self.transfer = Some(Transfer::begin(self.device.as_ref(), message.body()?, message.only_fd()?)?);
        Ok(())
    }

    fn check_transfer(&mut self) -> Result<(), BackendError> {
        let nothing = || BackendError::State { why: "SET_DEVICE_STATE_FD did not begin a transfer".into() };
        let transfer = self.transfer.take().ok_or_else(nothing)?;
        self.all_stopped(Code::CHECK_DEVICE_STATE, "D1")?;
        transfer.check(self.device.as_ref())
    }

    fn all_stopped(&mut self, code: Code, rule: &'static str) -> Result<(), BackendError> {
        (0..self.device.queues()).try_for_each(|index| self.stopped(code, index.into(), rule).map(drop))
    }

    fn is_packed(&self) -> bool {
        self.features & bit(VIRTIO_F_RING_PACKED) != 0
    }

    fn inflight_kind(&self) -> inflight::Kind {
        if self.is_packed() { inflight::Kind::Packed } else { inflight::Kind::Split }
    }

    fn check_shape(&self, wanted: &InflightDescription) -> Result<(), BackendError> {
        let (queues, size, max) = (wanted.num_queues, wanted.queue_size, self.device.queues());
        match queues >= 1 && queues <= max && size >= 1 && u32::from(size) <= virtio::MAX_QUEUE_SIZE {
            true => Ok(()),
            false => Err(BackendError::InflightShape { queues, size, max }),
        }
    }

    fn ring(&mut self, code: Code, index: u32) -> Result<&mut Ring, BackendError> {
        let queues = self.device.queues();
        self.rings.get_mut(index as usize).ok_or(BackendError::NoSuchRing { code, index, queues })
    }

    fn stopped(&mut self, code: Code, index: u32, rule: &'static str) -> Result<&mut Ring, BackendError> {
        let ring = self.ring(code, index)?;
        match ring.running {
            false => Ok(ring),
            true => Err(BackendError::RingRuns { code, index: index as u16, rule }),
        }
    }

    /// What a ring signals for calls and errors: where no fd was given, the front-end itself if messages stand for it.
    fn notifiers(&self, index: u16, ring: &Ring) -> (Option<Arc<Notifier>>, Option<Arc<Notifier>>) {
        let in_band =
            |make: fn(Arc<Host>, u16) -> Notifier| self.is_in_band().then(|| Arc::new(make(self.host.clone(), index)));
        (ring.call.clone().or_else(|| in_band(Notifier::call)), ring.error.clone().or_else(|| in_band(Notifier::error)))
    }

    /// The ring and the fd of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR.
    fn ring_fd(&mut self, message: &mut Message) -> Result<(u16, Option<OwnedFd>), BackendError> {
        let bits: u64 = message.body()?;
        let index = (bits & VRING_IDX_MASK) as u16;
        self.ring(message.code, index.into())?;
        let fd = if bits & VRING_NOFD_MASK != 0 { None } else { Some(message.only_fd()?) };
        Ok((index, fd))
    }

    /// Stops a ring if it runs, and keeps its base.
    fn pause(&mut self, index: u16, rings: &mut dyn Rings) -> Result<(), BackendError> {
        if let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| ring.running) {
            ring.running = false;
            ring.base = rings.stop(index)?;
        }
        Ok(())
    }

    /// Stops a ring if it runs, without draining it, and keeps its base (rule I8).
    fn suspend(&mut self, index: u16, rings: &mut dyn Rings) -> Result<(), BackendError> {
        if let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| ring.running) {
            ring.running = false;
            ring.base = rings.suspend(index)?;
        }
        Ok(())
    }

    /// Makes a ring run if it should, and stop if it should not (rule R2).
    fn settle(&mut self, index: u16, rings: &mut dyn Rings) -> Result<(), BackendError> {
        let Some(ring) = self.rings.get(usize::from(index)) else { return Ok(()) };
        let skips = self.speaks(unstable::F_GET_VRING_BASE_SKIP_DRAIN);
        if ring.running && ring.started && skips {
            // It is disabled before it is known whether what is in flight shall be completed (rule I8).
            rings.hold(index, !ring.enabled);
        } else if !(ring.started && ring.enabled) {
            self.pause(index, rings)?;
        } else if !ring.running {
            let setup = self.setup(index, ring)?;
            rings.start(index, setup)?;
            if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                (ring.running, ring.ran) = (true, true);
            }
        }
        Ok(())
    }

    /// A ring that can't run yet waits for the next change.
    fn settle_all(&mut self, rings: &mut dyn Rings) -> Result<(), BackendError> {
        for index in 0..self.device.queues() {
            match self.settle(index, rings) {
                Err(error @ BackendError::RingLost { .. }) => return Err(error),
                Err(error) => warn!("{error}"),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn setup(&self, index: u16, ring: &Ring) -> Result<Setup, BackendError> {
        let incomplete = |missing| BackendError::RingIncomplete { index, missing };
        if ring.size == 0 {
            return Err(incomplete("SET_VRING_NUM"));
        }
        let addr = ring.addr.as_ref().ok_or(incomplete("SET_VRING_ADDR"))?;
        if self.features & LOG_ALL != 0 && self.log.is_none() {
            warn!("ring {index} starts with LOG_ALL but without SET_LOG_BASE: nothing is logged (rule L8)");
        }
        let (call, error) = self.notifiers(index, ring);
        let iotlb = self.is_translated().then(|| self.iotlb.clone());
        let layout = match &iotlb {
            None => layout(&self.memory, self.features, index, ring.size, addr)?,
            Some(_) => {
                let VringAddr { desc_user_addr, avail_user_addr, used_user_addr, .. } = *addr;
                RingLayout::new(self.features, ring.size, desc_user_addr, avail_user_addr, used_user_addr)
            }
        };
        Ok(Setup {
            layout,
            base: ring.base,
            features: self.features,
            memory: self.memory.clone(),
            logging: self.logging(ring),
            kick: ring.kick.clone(),
            polled: ring.kick.is_none() && !self.is_in_band(),
            call,
            error,
            inflight: self.inflight.clone(),
            first: !ring.ran,
            postcopy: self.postcopy.is_listening(),
            host: self.host.clone(),
            iotlb,
        })
    }
}

/// The bits, if all of them were offered.
fn acknowledged(code: Code, bits: u64, offered: u64) -> Result<u64, BackendError> {
    match bits & !offered {
        0 => Ok(bits),
        unknown => Err(BackendError::Features { code, bits, unknown }),
    }
}

/// For requests whose answer has a number that means "no".
fn answer(done: Result<(), BackendError>) -> u64 {
    done.map_or_else(
        |error| {
            error!("{error}");
            1
        },
        |()| 0,
    )
}

fn logs_used(addr: &VringAddr) -> bool {
    addr.flags & bit(VHOST_VRING_F_LOG) as u32 != 0
}

fn map(region: &MemoryRegion, fd: &OwnedFd) -> Result<Arc<Region>, BackendError> {
    let MemoryRegion { guest_phys_addr, memory_size, userspace_addr, mmap_offset } = *region;
    Ok(Arc::new(Region::map(fd.as_fd(), guest_phys_addr, memory_size, userspace_addr, mmap_offset)?))
}

/// The regions of SET_MEM_TABLE, mapped.
fn regions_of(message: &Message) -> Result<Vec<Arc<Region>>, BackendError> {
    let MemoryHeader { nregions, .. } = message.body()?;
    let (got, head) = (message.payload.len(), size_of::<MemoryHeader>());
    let needed = (nregions as usize).saturating_mul(size_of::<MemoryRegion>()).saturating_add(head);
    let table = message.payload.get(head..needed).ok_or(BackendError::Truncated { code: message.code, got, needed })?;
    if message.fds.len() != nregions as usize {
        let (got, needed) = (message.fds.len(), nregions as usize);
        return Err(BackendError::Fds { code: message.code, got, needed });
    }
    let regions = table.chunks_exact(size_of::<MemoryRegion>()).zip(&message.fds).map(|(bytes, fd)| {
        let region = MemoryRegion::read_from_bytes(bytes).map_err(|_| BackendError::Truncated {
            code: message.code,
            got,
            needed,
        })?;
        map(&region, fd)
    });
    regions.collect()
}

/// Where a ring lies in guest memory (rule R6: the addresses are the front-end's).
fn layout(memory: &Memory, features: u64, index: u16, size: u16, addr: &VringAddr) -> Result<RingLayout, BackendError> {
    let find = |part, user, len| {
        memory.gpa_of_user(user, len).map_err(|source| BackendError::RingAddress { index, part, source })
    };
    let [desc_bytes, driver_bytes, device_bytes] = RingLayout::area_bytes(features, size);
    let desc = find("descriptor table", addr.desc_user_addr, desc_bytes)?;
    let driver = find("available ring or driver area", addr.avail_user_addr, driver_bytes)?;
    let device = find("used ring or device area", addr.used_user_addr, device_bytes)?;
    Ok(RingLayout::new(features, size, desc, driver, device))
}

/// One past the last byte of configuration space that a message is about.
fn config_end(code: Code, offset: u32, len: u32) -> Result<usize, BackendError> {
    match offset.checked_add(len).map(|end| end as usize) {
        Some(end) if end <= VHOST_USER_MAX_CONFIG_SIZE => Ok(end),
        _ => Err(BackendError::Config { code, offset, len, why: "there are 256 bytes at most" }),
    }
}

fn config_bytes(message: &Message, offset: u32, len: u32) -> Result<&[u8], BackendError> {
    config_end(message.code, offset, len)?;
    let head = size_of::<ConfigHeader>();
    let (got, needed) = (message.payload.len(), head + len as usize);
    message.payload.get(head..needed).ok_or(BackendError::Truncated { code: message.code, got, needed })
}
