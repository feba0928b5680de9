//! Names of feature bits, for log lines and error messages.
//!
//! ```
//! use vhost_migrate::abi::{features::protocol_feature_names, vhost_user::ProtocolFeatures};
//!
//! let features = ProtocolFeatures::LOG_SHMFD | ProtocolFeatures::INFLIGHT_SHMFD;
//! assert_eq!(protocol_feature_names(features), "LOG_SHMFD, INFLIGHT_SHMFD");
//! ```

use bitflags::Flags;

use super::vhost;
use super::vhost_user::{self, ProtocolFeatures};
use super::virtio::{self, VirtioFeatures, feature};

/// The bits of rings and transport. Those below are assigned by each type of device.
const TRANSPORT_BITS: VirtioFeatures = VirtioFeatures::from_bits_retain(!0 << 24);

macro_rules! names {
    ($module:ident: $($name:ident),* $(,)?) => { &[$(($module::$name, stringify!($name))),*] };
}

const TRANSPORT: &[(VirtioFeatures, &str)] = names![virtio:
    VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_ANY_LAYOUT, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_VERSION_1,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_SR_IOV,
    VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_RING_RESET,
];
const VHOST: &[(VirtioFeatures, &str)] = names![vhost: VHOST_F_LOG_ALL];
const VHOST_USER: &[(VirtioFeatures, &str)] = names![vhost_user: VHOST_USER_F_PROTOCOL_FEATURES];
const BLOCK: &[(VirtioFeatures, &str)] = names![virtio:
    VIRTIO_BLK_F_BARRIER, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_SCSI, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_SECURE_ERASE,
];
const NET: &[(VirtioFeatures, &str)] = names![virtio:
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_SPEED_DUPLEX,
];

/// The names of these feature bits, or "none".
///
/// `device_id` is the virtio device id. Device bits have names for `VIRTIO_ID_BLOCK` and `VIRTIO_ID_NET`; for other
/// devices they are given as numbers.
pub fn feature_names(features: VirtioFeatures, device_id: Option<u32>) -> String {
    let own = match device_id {
        Some(virtio::VIRTIO_ID_BLOCK) => BLOCK,
        Some(virtio::VIRTIO_ID_NET) => NET,
        _ => &[],
    };
    names(features.bits(), |number| {
        let feature = feature(number);
        let of = |names: &[(VirtioFeatures, &'static str)]| {
            names.iter().find(|(bit, _)| *bit == feature).map(|(_, name)| *name)
        };
        let common = || of(TRANSPORT).or(of(VHOST)).or(of(VHOST_USER));
        of(own).or_else(|| TRANSPORT_BITS.contains(feature).then(common).flatten())
    })
}

/// The names of these protocol features, or "none".
pub fn protocol_feature_names(features: ProtocolFeatures) -> String {
    names(features.bits(), |number| {
        let feature = ProtocolFeatures::from_bits_retain(1 << number);
        let known = ProtocolFeatures::FLAGS.iter().find(|flag| flag.is_named() && *flag.value() == feature);
        known.map(|flag| flag.name()).or((feature == vhost_user::own::F_DISK_GENERATION).then_some("DISK_GENERATION"))
    })
}

/// The names of the bits that are set; the number of a bit that has none.
fn names(bits: u64, name: impl Fn(u32) -> Option<&'static str>) -> String {
    let name = |number| name(number).map_or_else(|| format!("bit {number}"), str::to_owned);
    let names: Vec<_> = (0..u64::BITS).filter(|number| bits >> number & 1 != 0).map(name).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_bits_have_the_names_of_their_device_and_unknown_bits_are_numbers() {
        let bits = [9, 26, 30, 32, 50].map(feature).into_iter().collect();
        let rest = "VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1, bit 50";
        assert_eq!(feature_names(bits, Some(virtio::VIRTIO_ID_BLOCK)), format!("VIRTIO_BLK_F_FLUSH, {rest}"));
        assert_eq!(feature_names(bits, None), format!("bit 9, {rest}"));
        assert_eq!(feature_names(feature(17), Some(virtio::VIRTIO_ID_NET)), "VIRTIO_NET_F_CTRL_VQ");
        assert_eq!(
            (
                feature_names(VirtioFeatures::empty(), None),
                protocol_feature_names(ProtocolFeatures::from_bits_retain(1 << 12 | 1 << 60))
            ),
            ("none".into(), "INFLIGHT_SHMFD, bit 60".into())
        );
    }
}
