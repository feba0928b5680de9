//! Device kinds, and their detection.
//!
//! The protocol has no request for the device kind. Device features, number of queues and configuration space leave one
//! or several kinds. A single kind is used; otherwise the user has to name it.

pub(super) mod blk;
pub(super) mod console;
pub(super) mod fs;
pub(super) mod net;
pub(super) mod vsock;

use self::blk::{BlkGeometry, read_config};
use super::connection::Connection;
use super::negotiation::BackendFeatures;
use super::options::DeviceKind;
use super::outcome::CheckAbort;
use crate::abi::vhost_user::ProtocolFeatures;
use crate::abi::virtio::{VIRTIO_NET_F_MAC, VirtioFeatures};

/// The device under test.
#[derive(Clone, Copy, Debug)]
pub(super) enum TestedDevice {
    Blk(BlkGeometry),
    Net,
    Rng,
    Fs,
    /// Vsock, with its context id.
    Vsock(u64),
    Console,
}

impl TestedDevice {
    /// Returns the device of a connection with negotiated protocol features: the `requested` kind, or the only one that
    /// matches.
    pub(super) fn of(
        connection: &Connection,
        offered: BackendFeatures,
        requested: Option<DeviceKind>,
    ) -> Result<TestedDevice, CheckAbort> {
        let kind = match requested {
            Some(kind) => kind,
            None => find(connection, offered)?,
        };
        Ok(match kind {
            DeviceKind::Blk => TestedDevice::Blk(BlkGeometry::of(connection, offered)?),
            DeviceKind::Net => TestedDevice::Net,
            DeviceKind::Rng => TestedDevice::Rng,
            DeviceKind::Fs => TestedDevice::Fs,
            DeviceKind::Vsock => TestedDevice::Vsock(vsock::context_id(connection, offered)?),
            DeviceKind::Console => TestedDevice::Console,
        })
    }

    /// Returns true if the device answers self-contained requests. Other devices send and receive.
    pub(super) fn has_requests(&self) -> bool {
        matches!(self, TestedDevice::Blk(_) | TestedDevice::Rng | TestedDevice::Fs)
    }

    /// Returns true if equal requests return equal data.
    pub(super) fn is_stable(&self) -> bool {
        matches!(self, TestedDevice::Blk(_) | TestedDevice::Fs)
    }

    /// Returns a description of the device.
    pub(super) fn name(&self) -> String {
        match self {
            TestedDevice::Blk(disk) => format!("a disk of {} bytes", disk.bytes()),
            TestedDevice::Net => "a network interface".into(),
            TestedDevice::Rng => "an entropy source".into(),
            TestedDevice::Fs => "a file system".into(),
            TestedDevice::Vsock(cid) => format!("vsock with context id {cid}"),
            TestedDevice::Console => "a console".into(),
        }
    }

    /// Returns the size of configuration space that every device of the kind has, and parts of it.
    pub(super) fn config(&self) -> (u32, &'static [(u32, u32)]) {
        match self {
            // A disk: what the oldest drivers read. A network interface: what most have.
            TestedDevice::Blk(_) => (36, &[(0, 8), (8, 4), (20, 4), (4, 12), (35, 1)]),
            TestedDevice::Net => (12, &[(0, 6), (6, 2), (8, 2), (2, 8), (11, 1)]),
            TestedDevice::Rng => (0, &[]),
            TestedDevice::Fs => (40, &[(0, 36), (36, 4), (8, 16), (39, 1)]),
            TestedDevice::Vsock(_) | TestedDevice::Console => (8, &[(0, 4), (4, 4), (2, 4), (7, 1)]),
        }
    }
}

/// Feature bits of the device; the others belong to the transport.
const OF_DEVICES: VirtioFeatures = VirtioFeatures::from_bits_retain(0xff_ffff | !0 << 50);
const OF_BLK: VirtioFeatures = mask(&[0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 16, 17]);
const OF_NET: VirtioFeatures = OF_DEVICES.difference(mask(&[4]));
const OF_FS: VirtioFeatures = mask(&[0]);
const OF_VSOCK: VirtioFeatures = mask(&[0, 1, 2]);
const OF_CONSOLE: VirtioFeatures = mask(&[0, 1, 2]);
/// Feature bits that only network interfaces have.
const NET_ALONE: VirtioFeatures = OF_NET.difference(OF_BLK.union(OF_FS).union(OF_VSOCK).union(OF_CONSOLE));

/// The features with these bit numbers, whose meaning differs between devices.
const fn mask(bits: &[u32]) -> VirtioFeatures {
    let (mut mask, mut rest) = (0, bits);
    while let [bit, others @ ..] = rest {
        mask |= 1 << *bit;
        rest = others;
    }
    VirtioFeatures::from_bits_retain(mask)
}

/// Properties of a back-end that differ between kinds.
#[derive(Clone, Debug, Default)]
struct DeviceProperties {
    /// Features of the device.
    features: VirtioFeatures,
    /// Number of queues, if MQ is offered.
    queues: Option<u64>,
    /// Configuration space, up to 40 bytes; `None` without one.
    config: Option<Vec<u8>>,
}

impl DeviceProperties {
    fn ask(connection: &Connection, offered: BackendFeatures) -> Result<DeviceProperties, CheckAbort> {
        let features = offered.features & OF_DEVICES;
        let queues = offered.has_protocol(ProtocolFeatures::MQ).then_some(offered.queues);
        // The features identify a network interface without its configuration.
        if !offered.has_protocol(ProtocolFeatures::CONFIG) || features.intersects(NET_ALONE) {
            return Ok(DeviceProperties { features, queues, config: None });
        }
        let mut config = Vec::new();
        // Back-ends reply without payload to a size that they do not have.
        for size in [40, 36, 12, 8, 1] {
            match read_config(connection, 0, size) {
                Ok(bytes) => {
                    config = bytes;
                    break;
                }
                Err(CheckAbort::Violation(_)) => {}
                Err(abort) => return Err(abort),
            }
        }
        Ok(DeviceProperties { features, queues, config: Some(config) })
    }

    fn may_be(&self, kind: DeviceKind) -> bool {
        let DeviceProperties { features, queues, ref config } = *self;
        let only = |known: VirtioFeatures| known.contains(features);
        let number = |least: u64, most: u64| queues.is_none_or(|queues| (least..=most).contains(&queues));
        let len = config.as_ref().map(Vec::len);
        let start =
            config.as_ref().and_then(|config| config.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        match kind {
            // A disk has a non-zero capacity.
            DeviceKind::Blk => only(OF_BLK) && len.is_some_and(|len| len >= 36) && start > 0 && !self.has_tag(),
            // The address is present only with VIRTIO_NET_F_MAC.
            DeviceKind::Net => {
                let has_address = features.contains(VIRTIO_NET_F_MAC);
                // Back-ends that count queue pairs offer features that only network interfaces have.
                let one_pair = features.intersects(NET_ALONE) || number(2, u64::MAX);
                only(OF_NET) && one_pair && len.is_none_or(|len| len < 36) && (has_address || start << 16 == 0)
            }
            DeviceKind::Rng => {
                features.is_empty() && queues == Some(1) && config.iter().flatten().all(|byte| *byte == 0)
            }
            DeviceKind::Fs => only(OF_FS) && number(2, u64::MAX) && (config.is_none() || self.has_tag()),
            // Context ids below 3 are reserved. Excess configuration has no meaning: some back-ends return bytes beyond
            // their fields.
            DeviceKind::Vsock => {
                let is_cid = len.is_some_and(|len| len >= 8) && (3..u64::from(u32::MAX)).contains(&start);
                only(OF_VSOCK) && number(2, 3) && (config.is_none() || is_cid) && !self.has_tag()
            }
            // Without a feature none of the configuration fields is valid.
            DeviceKind::Console => {
                let has_fields = !features.is_empty() && len.is_some_and(|len| len >= 8);
                only(OF_CONSOLE) && number(2, u64::MAX) && (config.is_none() || has_fields) && !self.has_tag()
            }
        }
    }

    /// Returns true if the configuration is that of a file system: a zero-padded tag and the number of request queues.
    fn has_tag(&self) -> bool {
        let Some((tag, queues)) = self.config.as_ref().and_then(|config| config.split_first_chunk::<36>()) else {
            return false;
        };
        let text = tag.split(|byte| *byte == 0).next().unwrap_or_default();
        let padded = tag.iter().skip(text.len()).all(|byte| *byte == 0);
        let is_text = std::str::from_utf8(text).is_ok_and(|text| !text.is_empty() && !text.contains(char::is_control));
        is_text && padded && queues.first_chunk().is_some_and(|queues| u32::from_le_bytes(*queues) > 0)
    }
}

/// Returns the only matching kind.
fn find(connection: &Connection, offered: BackendFeatures) -> Result<DeviceKind, CheckAbort> {
    let properties = DeviceProperties::ask(connection, offered)?;
    let may_be: Vec<DeviceKind> = DeviceKind::ALL.iter().copied().filter(|kind| properties.may_be(*kind)).collect();
    match may_be.as_slice() {
        [kind] => Ok(*kind),
        _ => {
            let DeviceProperties { features, queues, config } = properties;
            let queues = queues.map_or("an unknown number of".into(), |queues| queues.to_string());
            let config = config.map_or("none".into(), |config| format!("{} bytes", config.len()));
            let names: Vec<&str> = may_be.iter().map(|kind| kind.name()).collect();
            let names = if names.is_empty() { "none of the known kinds".into() } else { names.join(", ") };
            Err(CheckAbort::UnknownDevice(format!(
                "device features {:#x}, {queues} queues, configuration: {config}; matching kinds: \
         {names}",
                features.bits()
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::virtio::VIRTIO_RING_F_EVENT_IDX;

    /// Returns the kinds that match these properties.
    fn kinds(features: u64, queues: u64, config: Option<&[u8]>) -> Vec<&'static str> {
        let properties = DeviceProperties {
            features: VirtioFeatures::from_bits_retain(features) & OF_DEVICES,
            queues: Some(queues),
            config: config.map(<[u8]>::to_vec),
        };
        DeviceKind::ALL.iter().filter(|kind| properties.may_be(**kind)).map(|kind| kind.name()).collect()
    }

    fn padded(text: &[u8], queues: u32) -> Vec<u8> {
        let mut config = text.to_vec();
        config.resize(36, 0);
        [config.as_slice(), &queues.to_le_bytes()].concat()
    }

    #[test]
    fn a_device_is_identified_when_only_one_kind_matches() {
        let transport = VIRTIO_RING_F_EVENT_IDX.bits() | 1 << 30 | 1 << 32;
        let mut disk = vec![0; 40];
        disk[1] = 0x40;
        disk[21] = 2;
        assert_eq!(kinds(0x7e46 | transport, 2, Some(&disk)), ["blk"], "qemu-storage-daemon's");
        assert_eq!(kinds(transport, 1, Some(&disk)), ["blk"]);
        assert_eq!(kinds(0x1_8020 | transport, 128, None), ["net"], "DPDK's");
        assert_eq!(kinds(transport, 1, None), ["rng"]);
        assert_eq!(kinds(transport, 2, Some(&padded(b"myfs", 1))), ["fs"]);
        assert_eq!(kinds(transport, 3, Some(&[3, 0, 0, 0, 0, 0, 0, 0])), ["vsock"]);
        assert_eq!(kinds(2 | transport, 4, Some(&[20, 0, 20, 0, 1, 0, 0, 0, 64, 0, 0, 0])), ["console"]);
    }

    #[test]
    fn several_matching_kinds_are_all_reported() {
        assert_eq!(kinds(0, 2, None), ["net", "fs", "vsock", "console"]);
        assert_eq!(kinds(0, 2, Some(&[0; 40])), Vec::<&str>::new());
        // vhost-device-console returns as many bytes as requested.
        let mut console = vec![20, 0, 20, 0, 1, 0, 0, 0, 64, 0, 0, 0];
        console.resize(40, 0x5a);
        assert_eq!(kinds(2, 4, Some(&console)), ["blk", "console"]);
        // A disk whose capacity reads as a tag, with a block size that is not text.
        let mut disk = padded(b"myfs", 1);
        disk[21] = 2;
        assert_eq!(kinds(0, 2, Some(&disk)), ["blk", "vsock"]);
    }
}
