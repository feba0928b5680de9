//! Requests outside of [`Device`](super::super::Device): network devices, configuration in a migration, the log fd, and
//! reset.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use zerocopy::IntoBytes;

use super::super::{Device, FrontendError};
use super::UserDevice;
use crate::abi::vhost_user::{CONFIG_TYPE_MIGRATION, FrontendRequest, ProtocolFeatures};
use crate::abi::virtio::VirtioFeatures;

impl UserDevice {
    /// Makes a network device announce `mac` to its network, after a migration whose driver cannot do so (SEND_RARP).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`], [`FrontendError::Refused`]; errors of the connection.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), FrontendError> {
        self.require(ProtocolFeatures::RARP, "RARP", "let the guest's driver announce itself")?;
        let [a, b, c, d, e, f] = mac;
        let payload = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        self.connection.send(FrontendRequest::SEND_RARP, payload.as_bytes(), &[])?;
        self.connection.wait_for_acks()
    }

    /// Sets the MTU of a network device's driver in bytes. Also sent after a reconnection (NET_SET_MTU).
    ///
    /// # Errors
    /// As [`UserDevice::send_rarp`].
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), FrontendError> {
        self.require(ProtocolFeatures::MTU, "MTU", "leave it as it is")?;
        self.mtu = Some(mtu);
        self.send_mtu()?;
        self.connection.wait_for_acks().inspect_err(|error| {
            if !error.needs_reconnect() {
                self.mtu = None;
            }
        })
    }

    /// Sends the recorded MTU.
    pub(super) fn send_mtu(&mut self) -> Result<(), FrontendError> {
        match self.mtu {
            Some(mtu) => self.connection.send(FrontendRequest::NET_SET_MTU, u64::from(mtu).as_bytes(), &[]),
            None => Ok(()),
        }
    }

    /// Writes configuration space at `offset` as the destination of a migration does, for devices that keep state
    /// there, such as the address of a network interface (SET_CONFIG with flags 1, rule C1.2).
    ///
    /// # Errors
    /// As [`Device::set_config`].
    pub fn restore_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.write_config(offset, bytes, CONFIG_TYPE_MIGRATION)
    }

    /// Sets the eventfd that the device writes after it has logged, or removes it. Also sent after a reconnection
    /// (SET_LOG_FD, rule L12.1).
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; errors of the connection.
    pub fn set_log_fd(&mut self, signal: Option<BorrowedFd<'_>>) -> Result<(), FrontendError> {
        let kept = signal.map(|fd| fd.try_clone_to_owned()).transpose();
        let kept = kept.map_err(FrontendError::system("keep the log's signal"))?;
        let before = std::mem::replace(&mut self.log_signal, kept);
        let done = self.send_log_fd().and_then(|()| self.connection.wait_for_acks());
        // Back-ends without SET_LOG_FD hang up: do not send it again after a reconnection.
        done.inspect_err(|_| self.log_signal = before)
    }

    /// Sends the recorded log fd.
    pub(super) fn send_log_fd(&mut self) -> Result<(), FrontendError> {
        let fds: Vec<BorrowedFd<'_>> = self.log_signal.iter().map(AsFd::as_fd).collect();
        self.connection.send(FrontendRequest::SET_LOG_FD, &[], &fds)
    }

    /// Resets the device as its driver would: removes rings, drops requests in flight and clears features. Memory and
    /// log stay (RESET_DEVICE, else SET_STATUS 0; rules R8.2, R8.3).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the device supports neither request; errors of the connection.
    pub fn reset(&mut self) -> Result<(), FrontendError> {
        self.rings.keys().for_each(|index| self.forward_kicks(*index, false));
        let asked = self.request_reset();
        if asked.as_ref().is_err_and(|error| !matches!(error, FrontendError::Interrupted { .. })) {
            // The reset failed: the rings keep running.
            self.rings.keys().for_each(|index| self.forward_kicks(*index, true));
            return asked;
        }
        (self.status, self.features) = (0, VirtioFeatures::empty());
        self.sent_rings.clear();
        let rings = std::mem::take(&mut self.rings);
        rings.keys().for_each(|index| {
            self.backend_channel.iter().for_each(|backend_channel| backend_channel.remove_ring(*index))
        });
        asked
    }

    fn request_reset(&mut self) -> Result<(), FrontendError> {
        match self.has(ProtocolFeatures::RESET_DEVICE) {
            true => self.connection.send(FrontendRequest::RESET_DEVICE, &[], &[])?,
            false => {
                self.require(ProtocolFeatures::STATUS, "RESET_DEVICE or STATUS", "stop its rings instead")?;
                self.set_status(0)?;
            }
        }
        self.connection.wait_for_acks()
    }
}
