//! Setup of a ring by messages, and the decision when it runs (rules R1, R2).
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{Session, VringConfig, VringController};
use crate::abi::vhost_user::{
    FrontendRequest as Code, ProtocolFeatures, VHOST_F_LOG_ALL, VHOST_VRING_F_LOG, VRING_IDX_MASK, VRING_NOFD_MASK,
    VringAddr, VringAddrFlags, VringState,
};
use crate::abi::virtio::VirtioFeatures;
use crate::backend::{BackendError, FrontendHandle, Kick, Notifier, VhostUserMessage};
use crate::memory::{GuestAddress, Memory, UserAddress};
use crate::ring::{RingBase, RingLayout};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// One ring as the front-end has set it up. Addresses are the front-end's.
#[derive(Debug, Default)]
pub(super) struct SessionRing {
    pub(super) size: u16,
    pub(super) base: RingBase,
    pub(super) addr: Option<VringAddr>,
    pub(super) kick: Option<Arc<Kick>>,
    pub(super) call: Option<Arc<Notifier>>,
    pub(super) error: Option<Arc<Notifier>>,
    /// SET_VRING_KICK or an in-band kick was received, and no GET_VRING_BASE since (rules R2.2, B3.4).
    pub(super) started: bool,
    pub(super) enabled: bool,
    /// [`VringController::start`] was called, and no [`VringController::stop`] since.
    pub(super) running: bool,
    /// [`VringController::start`] has been called on this connection.
    pub(super) has_run: bool,
    /// `call` was set while the ring was stopped.
    pub(super) call_changed: bool,
    /// The driver has been notified.
    pub(super) has_notified: Arc<AtomicBool>,
}

impl SessionRing {
    /// Discards all driver settings. Call and error descriptors belong to the front-end and stay (rule R8.4).
    pub(super) fn reset(&mut self) {
        let (call, error) = (self.call.take(), self.error.take());
        *self = SessionRing { call, error, has_run: self.has_run, ..SessionRing::default() };
    }

    /// True if the used ring is to be logged (rule L3.2).
    pub(super) fn logs_used_ring(&self) -> bool {
        self.addr.as_ref().is_some_and(logs_used)
    }
}

impl Session {
    pub(super) fn ring(&mut self, code: Code, index: u32) -> Result<&mut SessionRing, BackendError> {
        let queues = self.device.queues();
        self.rings.get_mut(index as usize).ok_or(BackendError::NoSuchRing { code, index, queues })
    }

    pub(super) fn require_stopped(
        &mut self,
        code: Code,
        index: u32,
        rule: &'static str,
    ) -> Result<&mut SessionRing, BackendError> {
        let ring = self.ring(code, index)?;
        match ring.running {
            false => Ok(ring),
            true => Err(BackendError::RingRunning { code, index: index as u16, rule }),
        }
    }

    pub(super) fn require_all_stopped(&mut self, code: Code, rule: &'static str) -> Result<(), BackendError> {
        (0..self.device.queues()).try_for_each(|index| self.require_stopped(code, index.into(), rule).map(drop))
    }

    pub(super) fn set_size(&mut self, state: VringState, rings: &mut dyn VringController) -> Result<(), BackendError> {
        let (max, packed) = (self.device.max_queue_size(), self.is_packed());
        let ring = self.require_stopped(Code::SET_VRING_NUM, state.index, "R2.6")?;
        let fits = |size: &u16| (1..=max).contains(size) && (packed || size.is_power_of_two());
        let size = u16::try_from(state.num).ok().filter(fits);
        let index = state.index as u16;
        ring.size = size.ok_or(BackendError::RingSize { index, size: state.num, max, packed })?;
        rings.prepare(index);
        Ok(())
    }

    pub(super) fn set_addr(&mut self, addr: VringAddr, rings: &mut dyn VringController) -> Result<(), BackendError> {
        let features = self.features;
        let ring = self.ring(Code::SET_VRING_ADDR, addr.index)?;
        let (index, running, size) = (addr.index as u16, ring.running, ring.size);
        if logs_used(&addr) {
            let [_, _, device] = RingLayout::area_bytes(features, size);
            let wraps = addr.log_guest_addr.checked_add(device).is_none();
            if wraps || !addr.log_guest_addr.is_multiple_of(4) {
                return Err(BackendError::LogAddress { index, gpa: GuestAddress(addr.log_guest_addr) });
            }
        }
        if running {
            let places = |addr: &VringAddr| (addr.desc_user_addr, addr.avail_user_addr, addr.used_user_addr);
            if ring.addr.as_ref().map(places) != Some(places(&addr)) {
                return Err(BackendError::RingRunning { code: Code::SET_VRING_ADDR, index, rule: "R5.2" });
            }
        } else if size > 0 && !self.memory.regions().is_empty() && !self.is_translated() {
            layout(&self.memory, features, index, size, &addr)?;
        }
        self.ring(Code::SET_VRING_ADDR, addr.index)?.addr = Some(addr);
        self.update_logging(rings);
        self.note_unlogged();
        self.apply_ring_state(index, rings)
    }

    /// Returns the ring and the descriptor of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR.
    pub(super) fn ring_fd(&mut self, message: &mut VhostUserMessage) -> Result<(u16, Option<OwnedFd>), BackendError> {
        let bits: u64 = message.body()?;
        let index = (bits & VRING_IDX_MASK) as u16;
        self.ring(message.code, index.into())?;
        let fd = if bits & VRING_NOFD_MASK != 0 { None } else { Some(message.only_fd()?) };
        Ok((index, fd))
    }

    /// Returns the kick of ring `index`, which may be shared with another ring (rule F9.4).
    pub(super) fn kick(&self, index: u16, fd: OwnedFd) -> Result<Arc<Kick>, BackendError> {
        let known = self.rings.iter().filter_map(|ring| ring.kick.as_ref()).find(|kick| kick.is_same_eventfd(&fd));
        known.cloned().map_or_else(|| Kick::new(index, fd).map(Arc::new), Ok)
    }

    /// Returns the call and error notifiers of a ring. With INBAND_NOTIFICATIONS, messages replace missing descriptors
    /// (rule B3.2).
    pub(super) fn notifiers(&self, index: u16, ring: &SessionRing) -> (Option<Arc<Notifier>>, Option<Arc<Notifier>>) {
        let in_band = |make: fn(Arc<FrontendHandle>, u16) -> Notifier| {
            self.is_in_band().then(|| Arc::new(make(self.frontend.clone(), index)))
        };
        (ring.call.clone().or_else(|| in_band(Notifier::call)), ring.error.clone().or_else(|| in_band(Notifier::error)))
    }

    fn vring_config(&self, index: u16, ring: &SessionRing) -> Result<VringConfig, BackendError> {
        let incomplete = |missing| BackendError::RingIncomplete { index, missing };
        if ring.size == 0 {
            return Err(incomplete("SET_VRING_NUM"));
        }
        let addr = ring.addr.as_ref().ok_or(incomplete("SET_VRING_ADDR"))?;
        if self.features.contains(VHOST_F_LOG_ALL) && self.log.is_none() {
            limited!(
                warn,
                "ring {index} starts with LOG_ALL but without SET_LOG_BASE: nothing is logged before it (rule L8.2)"
            );
        }
        let (call, error) = self.notifiers(index, ring);
        let iotlb = self.is_translated().then(|| self.iotlb.clone());
        let layout = match &iotlb {
            None => layout(&self.memory, self.features, index, ring.size, addr)?,
            Some(_) => {
                // These fields hold I/O virtual addresses then (rule T1.1).
                let areas = [addr.desc_user_addr, addr.avail_user_addr, addr.used_user_addr];
                RingLayout::new(self.features, ring.size, areas.map(GuestAddress))
            }
        };
        Ok(VringConfig {
            layout,
            base: ring.base,
            features: self.features,
            memory: self.memory.clone(),
            logging: self.logging(ring),
            kick: ring.kick.clone(),
            is_polled: ring.kick.is_none() && !self.is_in_band(),
            call,
            call_changed: ring.call_changed,
            has_notified: ring.has_notified.clone(),
            error,
            inflight: self.inflight.clone(),
            is_first_start: !ring.has_run,
            in_postcopy: self.postcopy.is_listening(),
            frontend: self.frontend.clone(),
            iotlb,
        })
    }

    /// Starts or stops a ring according to its state (rules R2.1, R6.4).
    pub(super) fn apply_ring_state(&mut self, index: u16, rings: &mut dyn VringController) -> Result<(), BackendError> {
        let Some(ring) = self.rings.get(usize::from(index)) else { return Ok(()) };
        let skips = self.has_protocol_feature(ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN);
        if ring.running && ring.started && skips {
            // It keeps its requests: the front-end has not said yet how to stop the ring (rule I8.5).
            rings.set_enabled(index, ring.enabled);
        } else if !(ring.started && ring.enabled) {
            self.stop_ring(index, rings)?;
        } else if !ring.running {
            let config = self.vring_config(index, ring)?;
            rings.start(index, config)?;
            if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                (ring.running, ring.has_run, ring.call_changed) = (true, true, false);
            }
            self.note_unlogged();
        }
        Ok(())
    }

    /// Starts or stops all rings according to their states. A ring that cannot start yet waits for the next change.
    pub(super) fn apply_ring_states(&mut self, rings: &mut dyn VringController) -> Result<(), BackendError> {
        for index in 0..self.device.queues() {
            match self.apply_ring_state(index, rings) {
                Err(error @ BackendError::WorkerLost { .. }) => return Err(error),
                Err(error) => limited!(warn, "{}", with_causes(&error)),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Stops a running ring and keeps its base.
    pub(super) fn stop_ring(&mut self, index: u16, rings: &mut dyn VringController) -> Result<(), BackendError> {
        if let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| ring.running) {
            ring.running = false;
            ring.base = rings.stop(index)?;
        }
        Ok(())
    }

    /// Stops a running ring without draining it and keeps its base (rule I8.2).
    pub(super) fn suspend_ring(&mut self, index: u16, rings: &mut dyn VringController) -> Result<(), BackendError> {
        if let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| ring.running) {
            ring.running = false;
            ring.base = rings.suspend(index)?;
        }
        Ok(())
    }

    /// Handles VRING_KICK (rule B3).
    pub(super) fn kick_in_band(
        &mut self,
        state: VringState,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        let VringState { index, .. } = state;
        let ring = self.ring(Code::VRING_KICK, index)?;
        // It also starts the ring: UML sends no SET_VRING_KICK (rules B3.3, B3.4).
        ring.started = true;
        if !ring.running {
            return self.apply_ring_state(index as u16, rings);
        }
        rings.kick(index as u16);
        Ok(())
    }

    /// Handles GET_VRING_BASE, or the request that stops a ring without draining it.
    pub(super) fn get_vring_base(
        &mut self,
        code: Code,
        state: VringState,
        rings: &mut dyn VringController,
    ) -> Result<VringState, BackendError> {
        let VringState { index, .. } = state;
        self.ring(code, index)?;
        let [leaves, skips] = [ProtocolFeatures::GET_VRING_BASE_INFLIGHT, ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN];
        // Without the separate request, the feature alone means not to drain (rule I8.4).
        match self.has_protocol_feature(leaves)
            && (code == Code::GET_VRING_BASE_SKIP_DRAIN || !self.has_protocol_feature(skips))
        {
            true => self.suspend_ring(index as u16, rings)?,
            false => self.stop_ring(index as u16, rings)?,
        }
        let ring = self.ring(code, index)?;
        (ring.started, ring.kick) = (false, None);
        let num = ring.base.bits();
        if !self.rings.iter().any(|ring| ring.running) {
            self.clear_iotlb();
            rings.before_blocking();
            self.device
                .rings_stopped()
                .map_err(BackendError::system("put what the guest has written on stable storage"))?;
        }
        self.report_lost_pages();
        Ok(VringState { index, num })
    }

    /// Stops and disables all rings. Each needs a new kick and a new enable.
    pub(super) fn stop_and_disable_rings(&mut self, rings: &mut dyn VringController) -> Result<(), BackendError> {
        for index in 0..self.device.queues() {
            self.stop_ring(index, rings)?;
        }
        for ring in &mut self.rings {
            (ring.started, ring.enabled, ring.kick) = (false, false, None);
        }
        Ok(())
    }
}

/// Returns the layout of a ring, whose given addresses are the front-end's (rule R6.4).
fn layout(
    memory: &Memory,
    features: VirtioFeatures,
    index: u16,
    size: u16,
    addr: &VringAddr,
) -> Result<RingLayout, BackendError> {
    let find = |part, user, len| {
        memory.gpa_of_user(UserAddress(user), len).map_err(|source| BackendError::RingAddress { index, part, source })
    };
    let [desc_bytes, driver_bytes, device_bytes] = RingLayout::area_bytes(features, size);
    let desc = find("descriptor table", addr.desc_user_addr, desc_bytes)?;
    let driver = find("available ring or driver area", addr.avail_user_addr, driver_bytes)?;
    let device = find("used ring or device area", addr.used_user_addr, device_bytes)?;
    Ok(RingLayout::new(features, size, [desc, driver, device]))
}

pub(super) fn logs_used(addr: &VringAddr) -> bool {
    VringAddrFlags::from_bits_retain(addr.flags).contains(VHOST_VRING_F_LOG)
}
