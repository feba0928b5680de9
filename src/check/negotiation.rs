//! Features that the back-end offers, and their negotiation.

use super::connection::Connection;
use super::outcome::CheckAbort;
use crate::abi::bit;
use crate::abi::features::protocol_feature_name;
use crate::abi::vhost_user::{Request as Code, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature};
use crate::abi::virtio::VIRTIO_F_ACCESS_PLATFORM;

/// Protocol features to negotiate if they are offered.
pub(super) const PROTOCOL: u64 = bit(protocol_feature::MQ)
    | bit(protocol_feature::LOG_SHMFD)
    | bit(protocol_feature::REPLY_ACK)
    | bit(protocol_feature::CONFIG)
    | bit(protocol_feature::INFLIGHT_SHMFD)
    | bit(protocol_feature::RESET_DEVICE)
    | bit(protocol_feature::CONFIGURE_MEM_SLOTS)
    | bit(protocol_feature::STATUS);

/// Features that the back-end offers.
#[derive(Clone, Copy, Debug)]
pub(super) struct BackendFeatures {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
}

impl BackendFeatures {
    pub(super) fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    pub(super) fn has_protocol(&self, feature: u32) -> bool {
        self.protocol & bit(feature) != 0
    }

    /// Fails with "not offered" without ACCESS_PLATFORM and BACKEND_REQ.
    pub(super) fn require_iommu(&self) -> Result<(), CheckAbort> {
        match self.has(VIRTIO_F_ACCESS_PLATFORM) {
            true => self.require_protocol(protocol_feature::BACKEND_REQ),
            false => Err(CheckAbort::NotOffered("ACCESS_PLATFORM".into())),
        }
    }

    /// Fails with "not offered" without the protocol feature.
    pub(super) fn require_protocol(&self, feature: u32) -> Result<(), CheckAbort> {
        match self.has_protocol(feature) {
            true => Ok(()),
            false => Err(CheckAbort::NotOffered(protocol_feature_name(feature))),
        }
    }
}

/// Negotiates protocol features and returns what the back-end offers.
pub(super) fn negotiate_protocol(connection: &Connection) -> Result<BackendFeatures, CheckAbort> {
    let features = connection.barrier()?;
    let mut offered = BackendFeatures { features, protocol: 0, queues: 1 };
    if offered.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        offered.protocol = connection.request_u64(Code::GET_PROTOCOL_FEATURES)?;
        let agreed = offered.protocol & PROTOCOL;
        connection.send(Code::SET_PROTOCOL_FEATURES, 1, &agreed.to_ne_bytes(), &[])?;
        if offered.has_protocol(protocol_feature::MQ) {
            offered.queues = connection.request_u64(Code::GET_QUEUE_NUM)?;
        }
    }
    Ok(offered)
}
