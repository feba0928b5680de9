//! The vhost-user client: [`UserDevice`] drives a back-end behind a UNIX socket.
//!
//! Here: which messages carry out what a [`Device`] promises, in the order that peers expect (rules R6, L7), and what is
//! remembered so that a restarted back-end can be given all of it again. Framing and deadlines are the channel's.
#![forbid(unsafe_code)]

mod channel;
mod ear;
mod inflight;
mod postcopy;
mod requests;
mod state;

pub use postcopy::BackendAddresses;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::{Device, DeviceEvent, FrontendError, InflightState, Reconnected, RingSetup};
use crate::abi::bit;
use crate::abi::vhost_user::{
    CONFIG_TYPE_FRONTEND, ConfigHeader, InflightDescription, LogDescription, MemRegMsg, MemoryHeader, MemoryRegion,
    Request, VHOST_F_LOG_ALL, VHOST_MEMORY_BASELINE_NREGIONS, VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_MAX_CONFIG_SIZE, VHOST_VRING_F_LOG, VRING_NOFD_MASK, VringAddr, VringState, protocol_feature,
    unstable::INFLIGHT_MIGRATION,
};
use crate::abi::virtio::{self, VIRTIO_F_RING_PACKED};
use crate::dirty::Log;
use crate::memory::{Memory, MemoryError, Region};
use crate::ring::{RingBase, RingLayout};
use channel::Channel;
use ear::{Ear, Events};
use inflight::Inflight;

/// Waits between attempts to connect.
const BACK_OFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(100);
/// Feature bits that belong to the transport, not to the driver.
const TRANSPORT: u64 = bit(VHOST_F_LOG_ALL) | bit(VHOST_USER_F_PROTOCOL_FEATURES);
/// What INBAND_NOTIFICATIONS makes no sense without (rule B3).
const IN_BAND_NEEDS: u64 = bit(protocol_feature::BACKEND_REQ) | bit(protocol_feature::REPLY_ACK);
const SET_LOG_BASE: Request = Request::SET_LOG_BASE;

/// How a vhost-user back-end is talked to.
#[derive(Clone, Copy, Debug)]
pub struct UserOptions {
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Longest wait for GET_VRING_BASE, which drains a ring, and for a device's state.
    pub stop_timeout: Duration,
    /// Protocol features that may be used (bits of [`protocol_feature`]), of those that are offered. INBAND_NOTIFICATIONS,
    /// which is not among the usual ones, makes kicks and calls messages; drivers see nothing of it.
    pub protocol_features: u64,
}

impl Default for UserOptions {
    fn default() -> UserOptions {
        use protocol_feature::*;
        UserOptions {
            timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(60),
            protocol_features: [
                MQ,
                LOG_SHMFD,
                RARP,
                REPLY_ACK,
                MTU,
                BACKEND_REQ,
                CONFIG,
                INFLIGHT_SHMFD,
                RESET_DEVICE,
                CONFIGURE_MEM_SLOTS,
                STATUS,
                DEVICE_STATE,
            ]
            .into_iter()
            .fold(0, |all, number| all | bit(number)),
        }
    }
}

impl UserOptions {
    /// Also uses what the specification has not settled: rings that are stopped without being drained (rule I8).
    pub fn with_inflight_migration(self) -> UserOptions {
        UserOptions { protocol_features: self.protocol_features | INFLIGHT_MIGRATION, ..self }
    }
}

/// A device behind a vhost-user socket.
pub struct UserDevice {
    path: PathBuf,
    options: UserOptions,
    channel: Channel,
    /// The back-end channel, where the back-end has one.
    ear: Option<Ear>,
    events: Arc<Events>,
    offer: Offer,
    features: u64,
    memory: Memory,
    inflight: Option<Inflight>,
    rings: BTreeMap<u16, RingSetup>,
    log: Option<(Arc<Log>, OwnedFd)>,
    log_signal: Option<OwnedFd>,
    status: u8,
    mtu: Option<u16>,
    /// The state that was loaded, until a ring has started.
    loaded: Option<Vec<u8>>,
}

/// What a back-end says when it is greeted.
#[derive(Clone, Copy)]
struct Offer {
    features: u64,
    /// Protocol features agreed on.
    protocol: u64,
    queues: u16,
    slots: usize,
}

impl UserDevice {
    /// Connects to the socket at `path` and agrees on protocol features. Tries until `deadline`, so that a back-end that
    /// is being started is waited for.
    ///
    /// # Errors
    /// The last error when `deadline` is over; at once what waiting does not help.
    pub fn connect(
        path: impl AsRef<Path>,
        options: UserOptions,
        deadline: Instant,
    ) -> Result<UserDevice, FrontendError> {
        let path = path.as_ref();
        let events = Arc::new(Events::new()?);
        let ((channel, offer, ear), _) = until(deadline, || greet(path, options, &events))?;
        Ok(UserDevice {
            path: path.into(),
            options,
            channel,
            ear,
            events,
            offer,
            features: 0,
            memory: Memory::default(),
            inflight: None,
            rings: BTreeMap::new(),
            log: None,
            log_signal: None,
            status: 0,
            mtu: None,
            loaded: None,
        })
    }

    /// Protocol features agreed on (bits of [`protocol_feature`]).
    pub fn protocol_features(&self) -> u64 {
        self.offer.protocol
    }

    fn has(&self, number: u32) -> bool {
        self.offer.protocol & bit(number) != 0
    }

    fn need(&self, number: u32, what: &str, advice: &'static str) -> Result<(), FrontendError> {
        let offered = self.has(number);
        if offered { Ok(()) } else { Err(FrontendError::NotOffered { what: what.into(), advice }) }
    }

    fn post_features(&mut self) -> Result<(), FrontendError> {
        let logging = if self.log.is_some() { bit(VHOST_F_LOG_ALL) } else { 0 };
        let features = self.features | logging | self.offer.features & bit(VHOST_USER_F_PROTOCOL_FEATURES);
        self.channel.post(Request::SET_FEATURES, features.as_bytes(), &[])
    }

    /// Makes the back-end's memory what is noted, given that it has `before`.
    fn post_memory(&mut self, before: &Memory) -> Result<(), FrontendError> {
        let memory = self.memory.clone();
        if memory.regions().len() <= VHOST_MEMORY_BASELINE_NREGIONS {
            let (payload, fds) = table(&memory)?;
            return self.channel.post(Request::SET_MEM_TABLE, &payload, &fds);
        }
        let has = |memory: &Memory, region: &Arc<Region>| memory.regions().iter().any(|r| Arc::ptr_eq(r, region));
        for region in before.regions().iter().filter(|region| !has(&memory, region)) {
            let message = MemRegMsg { padding: 0, region: describe(region)?.0 };
            self.channel.post(Request::REM_MEM_REG, message.as_bytes(), &[])?;
        }
        for region in memory.regions().iter().filter(|region| !has(before, region)) {
            let (region, fd) = describe(region)?;
            let message = MemRegMsg { padding: 0, region };
            self.channel.post(Request::ADD_MEM_REG, message.as_bytes(), &[fd])?;
        }
        Ok(())
    }

    /// Ring addresses; on a running ring they change nothing but whether it is logged (rule R5).
    fn addresses(&self, index: u16, setup: &RingSetup) -> Result<VringAddr, MemoryError> {
        let [desc, avail, used] = self.layout(setup);
        Ok(VringAddr {
            index: index.into(),
            flags: if self.log.is_some() { bit(VHOST_VRING_F_LOG) as u32 } else { 0 },
            desc_user_addr: user_addr(&self.memory, desc)?,
            used_user_addr: user_addr(&self.memory, used)?,
            avail_user_addr: user_addr(&self.memory, avail)?,
            log_guest_addr: setup.used,
        })
    }

    /// Everything that starts a ring, but does not enable it yet.
    fn post_ring(&mut self, index: u16, setup: &RingSetup, base: RingBase) -> Result<(), FrontendError> {
        let addresses = self.addresses(index, setup)?;
        let state = |num| VringState { index: index.into(), num };
        self.post_fd(Request::SET_VRING_CALL, index, Some(&setup.call))?;
        self.post_fd(Request::SET_VRING_ERR, index, setup.error.as_ref())?;
        self.channel.post(Request::SET_VRING_NUM, state(setup.size.into()).as_bytes(), &[])?;
        self.channel.post(Request::SET_VRING_BASE, state(base.bits()).as_bytes(), &[])?;
        self.channel.post(Request::SET_VRING_ADDR, addresses.as_bytes(), &[])?;
        self.post_fd(Request::SET_VRING_KICK, index, Some(&setup.kick))
    }

    /// A ring's kick, call or error fd, or what stands for it where they are messages (rule B3).
    fn post_fd(&mut self, request: Request, index: u16, fd: Option<&Arc<OwnedFd>>) -> Result<(), FrontendError> {
        match fd {
            _ if self.has(protocol_feature::INBAND_NOTIFICATIONS) => {
                self.channel.post(request, (u64::from(index) | VRING_NOFD_MASK).as_bytes(), &[])
            }
            Some(fd) => self.channel.post(request, u64::from(index).as_bytes(), &[fd.as_fd()]),
            None => Ok(()),
        }
    }

    /// Without protocol features rings have no such state: they are enabled (rule R1).
    fn post_enable(&mut self, index: u16, enable: bool) -> Result<(), FrontendError> {
        if self.offer.features & bit(VHOST_USER_F_PROTOCOL_FEATURES) == 0 {
            return Ok(());
        }
        let state = VringState { index: index.into(), num: enable.into() };
        self.channel.post(Request::SET_VRING_ENABLE, state.as_bytes(), &[])
    }

    fn post_status(&mut self) -> Result<(), FrontendError> {
        let status = u64::from(self.status);
        self.channel.post(Request::SET_STATUS, status.as_bytes(), &[])
    }

    /// SET_LOG_BASE with the noted log. Its reply may have any length (rule F7).
    fn install_log(&mut self) -> Result<(), FrontendError> {
        let Some((log, fd)) = &self.log else { return Ok(()) };
        let message = LogDescription { mmap_size: log.size(), mmap_offset: 0 };
        self.channel.ask(SET_LOG_BASE, message.as_bytes(), &[fd.as_fd()]).map(drop)
    }

    /// LOG_ALL and the rings' F_LOG as the noted log wants it.
    fn switch_logging(&mut self) -> Result<(), FrontendError> {
        self.post_features()?;
        for (&index, setup) in &self.rings {
            let addresses = self.addresses(index, setup)?;
            self.channel.post(Request::SET_VRING_ADDR, addresses.as_bytes(), &[])?;
        }
        self.channel.settle()
    }

    /// Descriptor, driver and device area: address and length in bytes.
    fn layout(&self, setup: &RingSetup) -> [(u64, u64); 3] {
        let [desc, avail, used] = RingLayout::area_bytes(self.features, setup.size);
        [(setup.desc, desc), (setup.avail, avail), (setup.used, used)]
    }

    fn is_packed(&self) -> bool {
        self.features & bit(VIRTIO_F_RING_PACKED) != 0
    }

    /// Where a back-end that knows nothing goes on: a split ring at its used index (rules I3, R4). Of a packed one only
    /// the inflight region knows, which counts more than this base (rule I4).
    fn base_after_crash(&self, index: u16, setup: &RingSetup) -> Result<RingBase, FrontendError> {
        if self.is_packed() {
            return match self.inflight {
                Some(_) => Ok(setup.base),
                None => Err(FrontendError::PackedUnrecoverable { index }),
            };
        }
        let used = self.index(setup.used)?;
        let outstanding = self.index(setup.avail)?.wrapping_sub(used);
        if self.inflight.is_none() && outstanding != 0 {
            return Err(FrontendError::Unrecoverable { index, outstanding });
        }
        Ok(RingBase::split(used))
    }

    fn index(&self, ring: u64) -> Result<u16, MemoryError> {
        let mut bytes = [0; 2];
        self.memory.read(ring.saturating_add(virtio::RING_IDX_OFFSET), &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Gives a back-end that knows nothing all that is noted (rules R6, L8). Returns how many requests it finds marked.
    fn install(&mut self) -> Result<u64, FrontendError> {
        let marked = self.inflight.as_ref().map_or(Ok(0), |inflight| inflight.marked(self.is_packed()))?;
        let rings = self.rings.clone();
        if self.has(protocol_feature::STATUS) && self.status != 0 {
            self.post_status()?;
        }
        self.post_features()?;
        self.post_mtu()?;
        if let Some(inflight) = &self.inflight {
            self.channel.post(Request::SET_INFLIGHT_FD, inflight.describe().as_bytes(), &[inflight.fd()])?;
        }
        if !self.memory.regions().is_empty() {
            self.post_memory(&Memory::default())?;
        }
        if let Some(state) = &self.loaded {
            state::load(&mut self.channel, self.options.stop_timeout, state)?;
        }
        for (&index, setup) in &rings {
            let base = self.base_after_crash(index, setup)?;
            self.post_ring(index, setup, base)?;
            if let Some((log, _)) = &self.log {
                // The back-end that died may have written the used ring and not yet logged it. The next one also sees
                // by these marks that the old one's are not lost (rule L15).
                let [desc, _, used] = self.layout(setup);
                let written = if self.is_packed() { &[desc, used][..] } else { &[used] };
                written.iter().for_each(|(gpa, len)| log.mark(*gpa, *len));
            }
        }
        self.install_log()?;
        if self.log_signal.is_some() {
            self.post_log_signal()?;
        }
        for &index in rings.keys() {
            self.post_enable(index, true)?;
        }
        self.channel.settle()?;
        for (&index, setup) in &rings {
            self.ear.iter().for_each(|ear| ear.add(index, setup));
            // It may have taken a kick with it, or died before its call.
            wake(&setup.kick);
            wake(&setup.call);
        }
        Ok(marked)
    }

    fn reinstall(&mut self, timeout: Duration) -> Result<u64, FrontendError> {
        let options = UserOptions { timeout, ..self.options };
        // The old connection must be gone before the new one asks for the same device.
        self.channel.close();
        self.ear = None;
        let (channel, offer, ear) = greet(&self.path, options, &self.events)?;
        let old = std::mem::replace(&mut self.offer, offer);
        (self.channel, self.ear) = (channel, ear);
        let lost = self.features & !offer.features;
        let lost_protocol = old.protocol & !offer.protocol;
        if lost != 0 || lost_protocol != 0 || offer.queues < old.queues {
            self.channel.close();
            self.offer = old;
            return Err(FrontendError::NotOffered {
                what: format!(
                    "what it did before (features {lost:#x}, protocol features {}, {} of {} queues)",
                    protocol_names(lost_protocol),
                    offer.queues,
                    old.queues
                ),
                advice: "restart the back-end with the options it had",
            });
        }
        let marked = self.install().inspect_err(|_| self.channel.close())?;
        self.channel.set_timeout(self.options.timeout);
        Ok(marked)
    }
}

impl Device for UserDevice {
    fn name(&self) -> &str {
        self.path.to_str().unwrap_or("vhost-user device")
    }

    fn features(&self) -> u64 {
        self.offer.features
    }

    fn acked_features(&self) -> u64 {
        self.features
    }

    fn set_features(&mut self, features: u64) -> Result<(), FrontendError> {
        let missing = features & !self.offer.features;
        if missing != 0 {
            let what = format!("feature bits {missing:#x}");
            return Err(FrontendError::NotOffered { what, advice: "acknowledge only what features() has" });
        }
        self.features = features & !TRANSPORT;
        self.post_features()?;
        self.channel.settle()
    }

    fn queues(&self) -> u16 {
        self.offer.queues
    }

    fn max_mem_slots(&self) -> usize {
        self.offer.slots
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
        if memory.regions().len() > self.offer.slots {
            return Err(FrontendError::NotOffered {
                what: format!("{} memory slots, only {}", memory.regions().len(), self.offer.slots),
                advice: "use fewer, larger regions",
            });
        }
        let before = std::mem::replace(&mut self.memory, memory.clone());
        let done = self.post_memory(&before).and_then(|()| self.channel.settle());
        done.inspect_err(|error| {
            if !error.is_hang_up() {
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
        if !self.has(protocol_feature::INFLIGHT_SHMFD) {
            return Ok(false);
        }
        let wish =
            InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: queues, queue_size, padding: [0; 4] };
        let reply = self.channel.ask(Request::GET_INFLIGHT_FD, wish.as_bytes(), &[])?;
        let inflight = Inflight::take(reply, queues, queue_size, self.is_packed())?;
        if let Some(restored) = restored {
            inflight.restore(restored, self.is_packed())?;
        }
        self.channel.post(Request::SET_INFLIGHT_FD, inflight.describe().as_bytes(), &[inflight.fd()])?;
        self.inflight = Some(inflight);
        self.channel.settle()?;
        Ok(true)
    }

    fn inflight(&self) -> Result<Option<InflightState>, FrontendError> {
        self.inflight.as_ref().map(Inflight::state).transpose()
    }

    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError> {
        let bad = |reason| Err(FrontendError::BadRing { index, reason });
        if index >= self.offer.queues || index > 0xff {
            return bad("the device has fewer rings");
        }
        if setup.size == 0 || !self.is_packed() && !setup.size.is_power_of_two() {
            return bad("its size must be a power of two");
        }
        if self.rings.contains_key(&index) {
            return bad("it is started already: stop it first");
        }
        self.post_ring(index, &setup, setup.base)?;
        self.post_enable(index, true)?;
        self.channel.settle()?;
        self.ear.iter().for_each(|ear| ear.add(index, &setup));
        self.rings.insert(index, setup);
        // The back-end may change it from now on.
        self.loaded = None;
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        self.end_ring(Request::GET_VRING_BASE, index)
    }

    fn can_suspend(&self) -> bool {
        let both = INFLIGHT_MIGRATION | bit(protocol_feature::INFLIGHT_SHMFD);
        self.offer.protocol & both == both
    }

    fn suspend_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        if !self.can_suspend() || self.inflight.is_none() {
            let advice = "start its back-end with --inflight-migration, or stop rings the usual way";
            return Err(FrontendError::NotOffered { what: "GET_VRING_BASE_SKIP_DRAIN".into(), advice });
        }
        self.end_ring(Request::GET_VRING_BASE_SKIP_DRAIN, index)
    }

    fn start_logging(&mut self, log: &Arc<Log>, fd: BorrowedFd<'_>) -> Result<(), FrontendError> {
        let advice = "it can't be migrated while it runs; use a back-end that logs";
        self.need(protocol_feature::LOG_SHMFD, "LOG_SHMFD", advice)?;
        if self.offer.features & bit(VHOST_F_LOG_ALL) == 0 {
            return Err(FrontendError::NotOffered { what: "VHOST_F_LOG_ALL".into(), advice });
        }
        let fd = fd.try_clone_to_owned().map_err(FrontendError::system("keep the log's fd"))?;
        let before = self.log.replace((log.clone(), fd));
        let was_on = before.is_some();
        let done = self.install_log().and_then(|()| if was_on { Ok(()) } else { self.switch_logging() });
        // A back-end may hang up because of this very log: connecting again must not depend on it.
        done.inspect_err(|_| self.log = before)
    }

    fn stop_logging(&mut self) -> Result<(), FrontendError> {
        match self.log.take() {
            Some(_) => self.switch_logging(),
            None => Ok(()),
        }
    }

    fn save_state(&mut self) -> Result<Option<Vec<u8>>, FrontendError> {
        if !self.has(protocol_feature::DEVICE_STATE) {
            return Ok(None);
        }
        state::save(&mut self.channel, self.options.stop_timeout).map(Some)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), FrontendError> {
        let advice = "the guest's device has a state; use a back-end of the same kind";
        self.need(protocol_feature::DEVICE_STATE, "DEVICE_STATE", advice)?;
        state::load(&mut self.channel, self.options.stop_timeout, state)?;
        self.loaded = Some(state.to_vec());
        Ok(())
    }

    fn log(&self) -> Option<&Arc<Log>> {
        self.log.as_ref().map(|(log, _)| log)
    }

    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        let request = Request::GET_CONFIG;
        let header = self.config_header(offset, buf.len())?;
        let payload = [header.as_bytes(), buf].concat();
        let reply = self.channel.ask(request, &payload, &[])?;
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
                let what =
                    format!("{} bytes that are not offset {offset} and {} bytes", reply.payload.len(), buf.len());
                Err(FrontendError::Breach { request, what, rule: "C1" })
            }
        }
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        let header = self.config_header(offset, bytes.len())?;
        self.channel.post(Request::SET_CONFIG, &[header.as_bytes(), bytes].concat(), &[])?;
        self.channel.settle()
    }

    fn status(&mut self) -> Result<Option<u8>, FrontendError> {
        if !self.has(protocol_feature::STATUS) {
            return Ok(None);
        }
        let status: u64 = self.channel.ask(Request::GET_STATUS, &[], &[])?.read("S1")?;
        Ok(Some(status as u8))
    }

    fn set_status(&mut self, status: u8) -> Result<(), FrontendError> {
        self.status = status;
        if !self.has(protocol_feature::STATUS) {
            return Ok(());
        }
        self.post_status()?;
        self.channel.settle()
    }

    fn watch(&self) -> Result<Option<OwnedFd>, FrontendError> {
        self.channel.watch().map(Some)
    }

    fn events(&mut self) -> Vec<DeviceEvent> {
        self.events.take()
    }

    fn watch_events(&self) -> Result<Option<OwnedFd>, FrontendError> {
        let fd = self.events.fd().try_clone_to_owned().map_err(FrontendError::system("watch for events"))?;
        Ok(Some(fd))
    }

    fn hung_up(&self) -> bool {
        self.channel.hung_up()
    }

    fn reconnect(&mut self, deadline: Instant) -> Result<Reconnected, FrontendError> {
        let timeout = self.options.timeout;
        let left = move || deadline.saturating_duration_since(Instant::now()).min(timeout).max(*BACK_OFF.end());
        let (resubmitted, attempts) = until(deadline, || self.reinstall(left()))?;
        Ok(Reconnected { resubmitted, attempts })
    }
}

impl UserDevice {
    /// Stops a ring with one of the requests that do.
    fn end_ring(&mut self, request: Request, index: u16) -> Result<RingBase, FrontendError> {
        if !self.rings.contains_key(&index) {
            return Err(FrontendError::BadRing { index, reason: "it is not started" });
        }
        // Disabling it may drain it already.
        if request == Request::GET_VRING_BASE {
            self.post_enable(index, false)?;
            self.channel.settle_within(self.options.stop_timeout)?;
        }
        let state = VringState { index: index.into(), num: 0 };
        let reply = self.channel.ask_within(self.options.stop_timeout, request, state.as_bytes(), &[])?;
        // Whether the ring runs is not known after a wrong answer; connecting again starts it where it was.
        let state: VringState = reply.read("R3").inspect_err(|_| self.channel.close())?;
        if state.index != u32::from(index) {
            self.channel.close();
            let what = format!("it answered for ring {} instead of {index}", state.index);
            return Err(FrontendError::Breach { request, what, rule: "R3" });
        }
        self.ear.iter().for_each(|ear| ear.remove(index));
        self.rings.remove(&index);
        Ok(RingBase::from_bits(state.num))
    }

    fn config_header(&self, offset: u32, len: usize) -> Result<ConfigHeader, FrontendError> {
        self.need(protocol_feature::CONFIG, "CONFIG", "its configuration can't be read through this socket")?;
        if len == 0 || len > VHOST_USER_MAX_CONFIG_SIZE {
            let what = format!("{len} bytes of configuration in one message");
            return Err(FrontendError::NotOffered { what, advice: "ask for 1 to 256 bytes" });
        }
        Ok(ConfigHeader { offset, size: len as u32, flags: CONFIG_TYPE_FRONTEND })
    }
}

/// One connection with everything that precedes features and memory.
fn greet(
    path: &Path,
    options: UserOptions,
    events: &Arc<Events>,
) -> Result<(Channel, Offer, Option<Ear>), FrontendError> {
    let mut channel = Channel::connect(path, options.timeout)?;
    let number = |channel: &mut Channel, request| channel.ask(request, &[], &[])?.read::<u64>("F3");
    channel.post(Request::SET_OWNER, &[], &[])?;
    let features = number(&mut channel, Request::GET_FEATURES)?;
    let mut offer = Offer { features, protocol: 0, queues: 1, slots: VHOST_MEMORY_BASELINE_NREGIONS };
    if features & bit(VHOST_USER_F_PROTOCOL_FEATURES) == 0 {
        // Nobody can say how many rings it has: the guest's driver has to know.
        offer.queues = u16::from(u8::MAX) + 1;
        return Ok((channel, offer, None));
    }
    offer.protocol = number(&mut channel, Request::GET_PROTOCOL_FEATURES)? & options.protocol_features;
    if offer.protocol & IN_BAND_NEEDS != IN_BAND_NEEDS {
        offer.protocol &= !bit(protocol_feature::INBAND_NOTIFICATIONS);
    }
    channel.post(Request::SET_PROTOCOL_FEATURES, offer.protocol.as_bytes(), &[])?;
    let has = |number| offer.protocol & bit(number) != 0;
    if has(protocol_feature::MQ) {
        offer.queues = u16::try_from(number(&mut channel, Request::GET_QUEUE_NUM)?).unwrap_or(u16::MAX);
    }
    if has(protocol_feature::CONFIGURE_MEM_SLOTS) {
        let slots = number(&mut channel, Request::GET_MAX_MEM_SLOTS)?;
        offer.slots = offer.slots.max(usize::try_from(slots).unwrap_or(usize::MAX));
    }
    if has(protocol_feature::REPLY_ACK) {
        channel.settle()?;
        channel.use_acks();
    }
    if !has(protocol_feature::BACKEND_REQ) {
        return Ok((channel, offer, None));
    }
    let kicks = has(protocol_feature::INBAND_NOTIFICATIONS).then(|| channel.line().clone());
    let (ear, theirs) = Ear::open(events.clone(), kicks)?;
    channel.post(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
    match channel.settle() {
        Ok(()) => Ok((channel, offer, Some(ear))),
        Err(error @ FrontendError::Refused { .. }) if !has(protocol_feature::INBAND_NOTIFICATIONS) => {
            tracing::warn!("{}: changes of its configuration won't be heard of: {error}", path.display());
            Ok((channel, offer, None))
        }
        Err(error) => Err(error),
    }
}

/// Tries until it works, waiting helps no more, or the deadline is over. Returns also how many attempts that took.
fn until<T>(
    deadline: Instant,
    mut attempt: impl FnMut() -> Result<T, FrontendError>,
) -> Result<(T, u32), FrontendError> {
    let (mut wait, mut attempts) = (*BACK_OFF.start(), 1);
    loop {
        let error = match attempt() {
            Ok(done) => return Ok((done, attempts)),
            Err(error) => error,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if !error.is_away() || left.is_zero() {
            return Err(error);
        }
        std::thread::sleep(wait.min(left));
        wait = (wait * 2).min(*BACK_OFF.end());
        attempts += 1;
    }
}

/// SET_MEM_TABLE with all of `memory`.
fn table(memory: &Memory) -> Result<(Vec<u8>, Vec<BorrowedFd<'_>>), FrontendError> {
    let (regions, fds): (Vec<MemoryRegion>, Vec<_>) =
        memory.regions().iter().map(|region| describe(region)).collect::<Result<_, _>>()?;
    let header = MemoryHeader { nregions: regions.len() as u32, padding: 0 };
    Ok(([header.as_bytes(), regions.as_bytes()].concat(), fds))
}

/// A region as messages describe it, with the fd that goes along.
fn describe(region: &Region) -> Result<(MemoryRegion, BorrowedFd<'_>), FrontendError> {
    let (fd, mmap_offset) = region.shared().ok_or(FrontendError::NotShared { gpa: region.gpa() })?;
    let description = MemoryRegion {
        guest_phys_addr: region.gpa(),
        memory_size: region.size(),
        userspace_addr: region.user_addr(),
        mmap_offset,
    };
    Ok((description, fd))
}

/// The front-end's address of a range that must be inside one region.
fn user_addr(memory: &Memory, (gpa, len): (u64, u64)) -> Result<u64, MemoryError> {
    memory.slice(gpa, len)?;
    let region = memory.regions().iter().rev().find(|region| region.gpa() <= gpa);
    let not_mapped = MemoryError::NotMapped { addr: gpa, len, space: "guest-physical" };
    region.map(|region| region.user_addr() + (gpa - region.gpa())).ok_or(not_mapped)
}

/// Signals an eventfd. One that is full is signalled already.
fn wake(eventfd: &OwnedFd) {
    let _ = nix::unistd::write(eventfd, &1u64.to_ne_bytes());
}

fn protocol_names(bits: u64) -> String {
    let names = protocol_feature::NAMES.iter().filter(|(number, _)| bits & bit(*number) != 0);
    match names.map(|(_, name)| *name).collect::<Vec<_>>() {
        names if names.is_empty() => "none".into(),
        names => names.join(", "),
    }
}
