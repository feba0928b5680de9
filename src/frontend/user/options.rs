//! How a back-end is talked to.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::abi::vhost_user::{own, protocol_feature, unstable::INFLIGHT_MIGRATION};
use crate::abi::virtio::VIRTIO_ID_NET;

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
    /// Whether it is a network interface: GET_QUEUE_NUM counts pairs of rings there, and a control ring comes after them.
    pub queue_pairs: bool,
    /// The kind of device, if it is known (`VIRTIO_ID_BLOCK`): messages then name its own features.
    pub device: Option<u32>,
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
                own::F_DISK_GENERATION,
            ]
            .into_iter()
            .fold(0, |all, number| all | bit(number)),
            queue_pairs: false,
            device: None,
        }
    }
}

impl UserOptions {
    pub(super) fn device_id(&self) -> Option<u32> {
        self.device.or(self.queue_pairs.then_some(VIRTIO_ID_NET))
    }

    /// Also uses what the specification has not settled: rings that are stopped without being drained (rule I8.1).
    pub fn with_inflight_migration(self) -> UserOptions {
        UserOptions { protocol_features: self.protocol_features | INFLIGHT_MIGRATION, ..self }
    }
}
