//! Restores the recorded state on a new connection, after a restart of the back-end (rules R6.1, L8.1, I3.4).
#![forbid(unsafe_code)]

use std::time::Duration;

use zerocopy::IntoBytes;

use super::super::{FrontendError, RingSetup};
use super::connect::negotiate;
use super::connection::TimeoutPolicy;
use super::{UserDevice, UserOptions, device_state, signal};
use crate::abi::features::{feature_names, protocol_feature_names};
use crate::abi::vhost_user::{FrontendRequest, ProtocolFeatures, own};
use crate::abi::virtio;
use crate::memory::{GuestAddress, Memory};
use crate::ring::RingBase;

impl UserDevice {
    /// Returns the position at which a restarted back-end continues: the used index of a split ring (rules I3.4, R4.1).
    /// The position of a packed ring is in its inflight region, which takes precedence over this base (rule I4.5).
    fn base_after_crash(&self, index: u16, setup: &RingSetup) -> Result<RingBase, FrontendError> {
        if self.is_packed() {
            return match self.inflight {
                Some(_) => Ok(setup.base),
                None => Err(FrontendError::PackedUnrecoverable { index }),
            };
        }
        let used = self.ring_index(setup.used)?;
        let outstanding = self.ring_index(setup.avail)?.wrapping_sub(used);
        if self.inflight.is_none() && outstanding != 0 {
            return Err(FrontendError::Unrecoverable { index, outstanding });
        }
        Ok(RingBase::split(used))
    }

    fn ring_index(&self, ring: GuestAddress) -> Result<u16, FrontendError> {
        let mut bytes = [0; 2];
        let mut rest = &mut bytes[..];
        for (gpa, len) in self.guest_ranges(GuestAddress(ring.0.saturating_add(virtio::RING_IDX_OFFSET)), 2)? {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len as usize);
            self.memory.read(gpa, here)?;
            rest = after;
        }
        Ok(u16::from_le_bytes(bytes))
    }

    /// Sends the recorded state to a new back-end (rules R6.1, L8.1). Returns the number of requests marked in the
    /// inflight region.
    fn install(&mut self) -> Result<u64, FrontendError> {
        let marked = self.inflight.as_ref().map_or(Ok(0), |inflight| inflight.marked(self.is_packed()))?;
        let rings = self.rings.clone();
        if self.has(ProtocolFeatures::STATUS) && self.status != 0 {
            self.send_status()?;
        }
        self.send_features()?;
        self.send_mtu()?;
        if let Some(inflight) = &self.inflight {
            self.connection.send(
                FrontendRequest::SET_INFLIGHT_FD,
                inflight.description().as_bytes(),
                &[inflight.fd()],
            )?;
        }
        if !self.memory.regions().is_empty() {
            self.send_memory_table(&Memory::default())?;
        }
        if let Some(state) = &self.loaded_state {
            device_state::load(&mut self.connection, self.options.stop_timeout, &self.interrupt, state)?;
        }
        for (&index, setup) in &rings {
            let base = self.base_after_crash(index, setup)?;
            self.send_ring(index, setup, base)?;
            self.send_kick(index, setup)?;
            if let Some((log, _)) = &self.log {
                // The failed back-end may have written the used ring without logging it. These marks also show the next
                // back-end that the marks of the old one are kept (rule L15.4).
                let [desc, _, used] = self.layout(setup);
                let written = if self.is_packed() { &[desc, used][..] } else { &[used] };
                for (addr, len) in written {
                    self.guest_ranges(*addr, *len)?.iter().for_each(|(gpa, len)| log.mark(*gpa, *len));
                }
            }
        }
        self.install_log()?;
        if self.log_signal.is_some() {
            self.send_log_fd()?;
        }
        for (&index, setup) in &rings {
            self.backend_channel.iter().for_each(|backend_channel| backend_channel.add_ring(index, setup));
            self.send_enable(index, true)?;
        }
        self.connection.wait_for_acks()?;
        for (&index, setup) in &rings {
            self.forward_kicks(index, true);
            // The failed back-end may have consumed a kick, or not have sent a call.
            signal(&setup.kick);
            signal(&setup.call);
        }
        Ok(marked)
    }

    pub(super) fn reconnect_once(&mut self, timeout: Duration) -> Result<u64, FrontendError> {
        let options = UserOptions { timeout, ..self.options };
        // Close the old connection first: many back-ends serve one front-end at a time.
        self.connection.close();
        self.backend_channel = None;
        self.stopping.clear();
        self.sent_rings.clear();
        self.starting.clear();
        let (connection, negotiated, backend_channel) =
            negotiate(&self.path, options, &self.events, &self.translator, &self.interrupt)?;
        let old = std::mem::replace(&mut self.negotiated, negotiated);
        (self.connection, self.backend_channel) = (connection, backend_channel);
        let lost = self.features & !negotiated.features;
        // A back-end whose image cannot store a generation serves the disk all the same.
        let lost_protocol = old.protocol & !negotiated.protocol & !own::F_DISK_GENERATION;
        if !lost.is_empty() || !lost_protocol.is_empty() || negotiated.queues < old.queues {
            self.connection.close();
            self.negotiated = old;
            let features = feature_names(lost, self.options.device_id());
            let differences = [
                (!lost.is_empty()).then(|| format!("features {features}")),
                (!lost_protocol.is_empty())
                    .then(|| format!("protocol features {}", protocol_feature_names(lost_protocol))),
                (negotiated.queues < old.queues).then(|| format!("{} queues (now {})", old.queues, negotiated.queues)),
            ];
            let missing: Vec<_> = differences.into_iter().flatten().collect();
            return Err(FrontendError::NotOffered {
                what: format!("what it offered before: {}", missing.join("; ")),
                advice: "restart the back-end with its previous options",
            });
        }
        let installed = self.check_iommu(self.features).and_then(|()| self.install());
        self.connection.set_timeout(self.options.timeout);
        self.connection.set_timeout_policy(TimeoutPolicy::Close);
        installed.inspect_err(|_| self.connection.close())
    }
}
