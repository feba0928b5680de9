//! Features that the back-end offers, and their negotiation.

use super::connection::Connection;
use super::outcome::CheckAbort;
use crate::abi::features::protocol_feature_names;
use crate::abi::vhost_user::{FrontendRequest as Code, ProtocolFeatures, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VirtioFeatures};

/// Protocol features to negotiate if they are offered.
pub(super) const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Features that the back-end offers.
#[derive(Clone, Copy, Debug)]
pub(super) struct BackendFeatures {
    pub(super) features: VirtioFeatures,
    pub(super) protocol: ProtocolFeatures,
    pub(super) queues: u64,
}

impl BackendFeatures {
    pub(super) fn has(&self, feature: VirtioFeatures) -> bool {
        self.features.contains(feature)
    }

    pub(super) fn has_protocol(&self, feature: ProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// Fails with "not offered" without ACCESS_PLATFORM and BACKEND_REQ.
    pub(super) fn require_iommu(&self) -> Result<(), CheckAbort> {
        match self.has(VIRTIO_F_ACCESS_PLATFORM) {
            true => self.require_protocol(ProtocolFeatures::BACKEND_REQ),
            false => Err(CheckAbort::NotOffered("ACCESS_PLATFORM".into())),
        }
    }

    /// Fails with "not offered" without the protocol feature.
    pub(super) fn require_protocol(&self, feature: ProtocolFeatures) -> Result<(), CheckAbort> {
        match self.has_protocol(feature) {
            true => Ok(()),
            false => Err(CheckAbort::NotOffered(protocol_feature_names(feature))),
        }
    }
}

/// Negotiates protocol features and returns what the back-end offers.
pub(super) fn negotiate_protocol(connection: &Connection) -> Result<BackendFeatures, CheckAbort> {
    let features = VirtioFeatures::from_bits_retain(connection.barrier()?);
    let mut offered = BackendFeatures { features, protocol: ProtocolFeatures::empty(), queues: 1 };
    if offered.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        offered.protocol = ProtocolFeatures::from_bits_retain(connection.request_u64(Code::GET_PROTOCOL_FEATURES)?);
        let agreed = offered.protocol & PROTOCOL;
        connection.send(Code::SET_PROTOCOL_FEATURES, 1, &agreed.bits().to_ne_bytes(), &[])?;
        if offered.has_protocol(ProtocolFeatures::MQ) {
            offered.queues = connection.request_u64(Code::GET_QUEUE_NUM)?;
        }
    }
    Ok(offered)
}
