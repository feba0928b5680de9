//! IOTLB misses of a ring behind an IOMMU, and the translations that it has in use (rules T1, T3).
//!
//! Nothing here blocks. A ring that lacks a translation requests it and takes no more requests until it arrives; its
//! thread continues to receive commands, and the session's thread applies updates. A front-end that is reached by calls
//! gives the translation at once.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError};
use tracing::debug;
use zerocopy::FromZeros;

use crate::abi::vhost::{VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_MISS};
use crate::abi::vhost_user::{BackendRequest, IotlbMsg};
use crate::backend::session::VringConfig;
use crate::backend::{BackendError, FrontendHandle};
use crate::memory::{Access, Iotlb, IotlbMiss, Iova, IovaWindow, Memory, MemoryError, RingArea, overlap};
use crate::ring::{Buffer, RingIommu, RingLayout, iova};
use crate::sys::with_causes::with_causes;

/// Interval at which a ring checks for the acknowledgement of a miss.
const REPLY_POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Time after which a miss is sent again, because its translation may have been invalidated before it was used.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Sends the misses of a ring, one at a time.
pub(super) struct IotlbMisses {
    index: u16,
    iotlb: Arc<Iotlb>,
    frontend: Arc<FrontendHandle>,
    pending: Option<PendingMiss>,
}

struct PendingMiss {
    miss: IotlbMiss,
    reply: Option<Receiver<u64>>,
    sent_at: Instant,
}

impl IotlbMisses {
    pub(super) fn new(index: u16, iotlb: Arc<Iotlb>, frontend: Arc<FrontendHandle>) -> IotlbMisses {
        IotlbMisses { index, iotlb, frontend, pending: None }
    }

    /// Sends a miss, unless it is already pending. Returns the memory with the translation if it is there already.
    ///
    /// # Errors
    /// [`BackendError::AccessRefused`] if the front-end has refused it (rule T1.4), [`BackendError::BackendChannel`] if
    /// there is no channel.
    pub(super) fn ask(&mut self, miss: IotlbMiss) -> Result<Option<Memory>, BackendError> {
        let refused = BackendError::AccessRefused { index: self.index, iova: miss.iova, access: miss.access };
        let same = |pending: &&PendingMiss| (pending.miss.iova, pending.miss.access) == (miss.iova, miss.access);
        if let Some(frontend) = self.frontend.direct() {
            if miss.denied {
                return Err(refused);
            }
            let error = match frontend.translate(miss.iova, &self.iotlb) {
                Ok(memory) => {
                    self.pending = None;
                    return Ok(Some(memory));
                }
                Err(error) => error,
            };
            debug!("ring {}: miss at {:#x}: {}", self.index, miss.iova, with_causes(&error));
            // While the kernel replaces all mappings, it has none.
            let sent_at = self.pending.as_ref().filter(same).map_or_else(Instant::now, |pending| pending.sent_at);
            if sent_at.elapsed() >= RETRY_INTERVAL {
                return Err(refused);
            }
            self.pending = Some(PendingMiss { miss, reply: None, sent_at });
            return Ok(None);
        }
        if let Some(pending) = self.pending.as_ref().filter(same) {
            if miss.denied {
                // Best effort: the channel may be full.
                let _ = self.frontend.send(BackendRequest::IOTLB_MSG, &iotlb_msg(VHOST_IOTLB_ACCESS_FAIL, &miss));
                return Err(refused);
            }
            match pending.reply.as_ref().map(Receiver::try_recv) {
                Some(Ok(1..)) => return Err(refused),
                // The update travels over another socket than the acknowledgement and may arrive later (rule T1.3).
                _ if pending.sent_at.elapsed() < RETRY_INTERVAL => return Ok(None),
                // The acknowledgement is still pending.
                Some(Err(TryRecvError::Empty)) => return Ok(None),
                _ => {}
            }
        }
        if miss.denied {
            // The refusal may be outdated.
            self.iotlb.invalidate(&(miss.iova..=miss.iova));
        }
        debug!("ring {}: miss at {:#x}, {:?}", self.index, miss.iova, miss.access);
        let reply = self.frontend.send_with_reply(BackendRequest::IOTLB_MSG, &iotlb_msg(VHOST_IOTLB_MISS, &miss))?;
        self.pending = Some(PendingMiss { miss, reply, sent_at: Instant::now() });
        Ok(None)
    }

    /// Returns true if a miss is pending.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Discards the pending miss.
    pub(super) fn clear(&mut self) {
        self.pending = None;
    }

    /// Returns the time after which to check for the acknowledgement or repeat the miss.
    pub(super) fn poll_interval(&self) -> Option<Duration> {
        self.pending.as_ref().map(|pending| if pending.reply.is_some() { REPLY_POLL_INTERVAL } else { RETRY_INTERVAL })
    }

    /// Maps the areas of a ring. Returns `None` while a translation is missing.
    ///
    /// # Errors
    /// As [`IotlbMisses::ask`], or an invalid area.
    pub(super) fn map_areas(&mut self, config: &mut VringConfig) -> Result<Option<IovaWindow>, BackendError> {
        let index = self.index;
        loop {
            match IovaWindow::open(&config.memory, &self.iotlb, &ring_areas(config), used_log_range(config)) {
                Ok(window) => {
                    self.clear();
                    return Ok(Some(window));
                }
                Err(MemoryError::Untranslated(miss)) => match self.ask(miss)? {
                    Some(memory) => config.memory = memory,
                    None => return Ok(None),
                },
                Err(source) => return Err(BackendError::RingTranslation { index, source }),
            }
        }
    }
}

/// The translations that a running ring has in use.
pub(super) struct MappedRing {
    pub(super) misses: IotlbMisses,
    pub(super) window: Arc<IovaWindow>,
    /// Buffers of requests in flight, by head.
    in_flight: Vec<Vec<Buffer>>,
    /// Invalidated ranges that are still in use, with the channel to acknowledge them.
    pending_invalidations: Vec<(RangeInclusive<Iova>, Sender<()>)>,
}

impl MappedRing {
    pub(super) fn new(asker: IotlbMisses, window: Arc<IovaWindow>) -> MappedRing {
        MappedRing { misses: asker, window, in_flight: Vec::new(), pending_invalidations: Vec::new() }
    }

    /// Returns what the ring itself needs for its translations.
    pub(super) fn ring_iommu(&self, config: &VringConfig) -> RingIommu {
        RingIommu { memory: config.memory.clone(), iotlb: self.misses.iotlb.clone(), window: self.window.clone() }
    }

    /// Records the buffers of a request in flight.
    pub(super) fn request_started(&mut self, head: u16, buffers: &[Buffer]) {
        self.misses.clear();
        let at = usize::from(head);
        if at >= self.in_flight.len() {
            self.in_flight.resize_with(at + 1, Vec::new);
        }
        if let Some(noted) = self.in_flight.get_mut(at) {
            noted.extend_from_slice(buffers);
        }
    }

    /// Forgets the buffers of a request.
    pub(super) fn request_completed(&mut self, head: u16) {
        if let Some(noted) = self.in_flight.get_mut(usize::from(head)) {
            noted.clear();
        }
    }

    /// Returns true if a request in flight uses these addresses.
    pub(super) fn uses(&self, iovas: &RangeInclusive<Iova>) -> bool {
        self.in_flight.iter().flatten().any(|buffer| overlap(iova(buffer.gpa), buffer.len.into(), iovas))
    }

    /// Signals `done` as soon as no request in flight uses these addresses (rule T3.2).
    pub(super) fn invalidate(&mut self, iovas: RangeInclusive<Iova>, done: Sender<()>) {
        self.pending_invalidations.push((iovas, done));
        self.acknowledge_invalidations();
    }

    /// Signals invalidations of ranges that are no longer in use.
    pub(super) fn acknowledge_invalidations(&mut self) {
        let mut retiring = std::mem::take(&mut self.pending_invalidations);
        retiring.retain(|(iovas, done)| {
            let uses = self.uses(iovas);
            if !uses {
                let _ = done.send(());
            }
            uses
        });
        self.pending_invalidations = retiring;
    }
}

/// Returns the areas of a ring with the access that the device needs.
fn ring_areas(config: &VringConfig) -> [RingArea; 3] {
    let [desc, driver, device] = config.layout.areas().map(iova);
    let [desc_bytes, driver_bytes, device_bytes] = RingLayout::area_bytes(config.features, config.layout.size());
    // Completions are written into a packed ring's descriptors; the device reads what it wrote in its own area.
    let on_descs = if let RingLayout::Packed(_) = config.layout { Access::ReadWrite } else { Access::Read };
    [(desc, desc_bytes, on_descs), (driver, driver_bytes, Access::Read), (device, device_bytes, Access::ReadWrite)]
}

/// Returns the address range under which the device's area is logged (rule L5.1).
pub(super) fn used_log_range(config: &VringConfig) -> Option<(Iova, u64)> {
    let [_, _, bytes] = RingLayout::area_bytes(config.features, config.layout.size());
    config.logging.used.as_ref().map(|(_, used_gpa)| (iova(*used_gpa), bytes))
}

fn iotlb_msg(kind: u8, miss: &IotlbMiss) -> IotlbMsg {
    IotlbMsg { iova: miss.iova.0, perm: miss.access.permission(), kind, ..IotlbMsg::new_zeroed() }
}
