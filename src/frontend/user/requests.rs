//! Requests that no [`Device`](super::super::Device) of every kind has: of network devices, of migrations, of logs that
//! signal, and the reset.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use zerocopy::IntoBytes;

use super::super::{Device, FrontendError};
use super::UserDevice;
use crate::abi::vhost_user::{CONFIG_TYPE_MIGRATION, Request, protocol_feature};

impl UserDevice {
    /// Has a network device tell its network where `mac` is now, as after a migration whose driver can't do that itself
    /// (SEND_RARP).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`], [`FrontendError::Refused`]; the channel's errors.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), FrontendError> {
        self.require(protocol_feature::RARP, "RARP", "let the guest's driver announce itself")?;
        let [a, b, c, d, e, f] = mac;
        let payload = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        self.connection.send(Request::SEND_RARP, payload.as_bytes(), &[])?;
        self.connection.wait_for_acks()
    }

    /// Tells a network device the largest packet of its driver, in bytes; also after a reconnection (NET_SET_MTU).
    ///
    /// # Errors
    /// As [`UserDevice::send_rarp`].
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), FrontendError> {
        self.require(protocol_feature::MTU, "MTU", "leave it as it is")?;
        self.mtu = Some(mtu);
        self.send_mtu()?;
        self.connection.wait_for_acks().inspect_err(|error| {
            if !error.needs_reconnect() {
                self.mtu = None;
            }
        })
    }

    /// Posts the MTU that is noted.
    pub(super) fn send_mtu(&mut self) -> Result<(), FrontendError> {
        match self.mtu {
            Some(mtu) => self.connection.send(Request::NET_SET_MTU, u64::from(mtu).as_bytes(), &[]),
            None => Ok(()),
        }
    }

    /// Writes configuration space from `offset` as a migration's destination does, for a device that carries part of its
    /// state there: a network interface's address (SET_CONFIG with flags 1, rule C1.2).
    ///
    /// # Errors
    /// As [`Device::set_config`].
    pub fn restore_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.write_config(offset, bytes, CONFIG_TYPE_MIGRATION)
    }

    /// Has the device write `signal` after it logged, or nothing any more; also after a reconnection (SET_LOG_FD, rule
    /// L12.1).
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; the channel's errors.
    pub fn set_log_fd(&mut self, signal: Option<BorrowedFd<'_>>) -> Result<(), FrontendError> {
        let kept = signal.map(|fd| fd.try_clone_to_owned()).transpose();
        let kept = kept.map_err(FrontendError::system("keep the log's signal"))?;
        let before = std::mem::replace(&mut self.log_signal, kept);
        let done = self.send_log_fd().and_then(|()| self.connection.wait_for_acks());
        // Back-ends that don't know it hang up: connecting again must not bring it up again.
        done.inspect_err(|_| self.log_signal = before)
    }

    /// Posts the signal that is noted.
    pub(super) fn send_log_fd(&mut self) -> Result<(), FrontendError> {
        let fds: Vec<BorrowedFd<'_>> = self.log_signal.iter().map(AsFd::as_fd).collect();
        self.connection.send(Request::SET_LOG_FD, &[], &fds)
    }

    /// Resets the device as its driver would: rings are gone, requests in flight are not answered any more, features are
    /// to be set anew. Memory and the log stay (RESET_DEVICE, else SET_STATUS 0; rules R8.2, R8.3).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if it knows neither; the channel's errors.
    pub fn reset(&mut self) -> Result<(), FrontendError> {
        self.rings.keys().for_each(|index| self.forward_kicks(*index, false));
        let asked = self.request_reset();
        if asked.as_ref().is_err_and(|error| !matches!(error, FrontendError::Interrupted { .. })) {
            // Rings that live on are kicked on.
            self.rings.keys().for_each(|index| self.forward_kicks(*index, true));
            return asked;
        }
        (self.status, self.features) = (0, 0);
        self.sent_rings.clear();
        let rings = std::mem::take(&mut self.rings);
        rings.keys().for_each(|index| {
            self.backend_channel.iter().for_each(|backend_channel| backend_channel.remove_ring(*index))
        });
        asked
    }

    fn request_reset(&mut self) -> Result<(), FrontendError> {
        match self.has(protocol_feature::RESET_DEVICE) {
            true => self.connection.send(Request::RESET_DEVICE, &[], &[])?,
            false => {
                self.require(protocol_feature::STATUS, "RESET_DEVICE or STATUS", "stop its rings instead")?;
                self.set_status(0)?;
            }
        }
        self.connection.wait_for_acks()
    }
}
