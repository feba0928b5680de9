//! Options of the vhost-user client.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::abi::vhost_user::{ProtocolFeatures, own, unstable::INFLIGHT_MIGRATION};
use crate::abi::virtio::VIRTIO_ID_NET;

/// Options of the vhost-user client.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct UserOptions {
    /// Maximum wait for a reply.
    pub timeout: Duration,
    /// Maximum wait for GET_VRING_BASE, which drains a ring, and for the device state.
    pub stop_timeout: Duration,
    /// Protocol features that may be negotiated. INBAND_NOTIFICATIONS, which is not in
    /// the default, replaces kick and call fds by messages; drivers are not affected.
    pub protocol_features: ProtocolFeatures,
    /// True for a network interface: GET_QUEUE_NUM then counts ring pairs, and a control ring follows them.
    pub queue_pairs: bool,
    /// Virtio device id, if known (`VIRTIO_ID_BLOCK`). Error messages then use the names of the device's features.
    pub device: Option<u32>,
}

impl Default for UserOptions {
    fn default() -> UserOptions {
        UserOptions {
            timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(60),
            protocol_features: ProtocolFeatures::MQ
                | ProtocolFeatures::LOG_SHMFD
                | ProtocolFeatures::RARP
                | ProtocolFeatures::REPLY_ACK
                | ProtocolFeatures::MTU
                | ProtocolFeatures::BACKEND_REQ
                | ProtocolFeatures::CONFIG
                | ProtocolFeatures::INFLIGHT_SHMFD
                | ProtocolFeatures::RESET_DEVICE
                | ProtocolFeatures::CONFIGURE_MEM_SLOTS
                | ProtocolFeatures::STATUS
                | ProtocolFeatures::DEVICE_STATE
                | own::F_DISK_GENERATION,
            queue_pairs: false,
            device: None,
        }
    }
}

impl UserOptions {
    pub(super) fn device_id(&self) -> Option<u32> {
        self.device.or(self.queue_pairs.then_some(VIRTIO_ID_NET))
    }

    /// Also negotiates unstable features: rings that are stopped without a drain (rule I8.1).
    pub fn with_inflight_migration(self) -> UserOptions {
        UserOptions { protocol_features: self.protocol_features | INFLIGHT_MIGRATION, ..self }
    }

    setters! {
        with_timeout: timeout: Duration,
        with_stop_timeout: stop_timeout: Duration,
        with_protocol_features: protocol_features: ProtocolFeatures,
        with_queue_pairs: queue_pairs: bool,
        with_device: device: Option<u32>,
    }
}
