//! Prepares a device up to its rings: everything that driver and VMM negotiate with it. This can be done while the
//! guest runs elsewhere, except for the state of the stopped device.

use zerocopy::{FromZeros, IntoBytes};

use super::disk::QueueDoorbells;
use super::driver::DiskGeometry;
use super::error::GuestError;
use super::in_parallel;
use super::layout::{BUFFER_BYTES, GuestConfig, GuestLayout, QueueLayout};
use super::state::{DeviceSetup, DeviceState, STATE_VERSION};
use crate::abi::features::feature_names;
use crate::abi::virtio::{
    self, BlkConfig, SECTOR_BYTES, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_F_VERSION_1, VIRTIO_ID_BLOCK, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
    VirtioFeatures,
};
use crate::frontend::Device;
use crate::memory::Memory;
use crate::ring::RingBase;

/// Features that the driver accepts, if they are offered.
const FEATURES: VirtioFeatures = VIRTIO_F_VERSION_1
    .union(VIRTIO_RING_F_EVENT_IDX)
    .union(VIRTIO_RING_F_INDIRECT_DESC)
    .union(VIRTIO_BLK_F_FLUSH)
    .union(VIRTIO_BLK_F_SEG_MAX)
    .union(VIRTIO_BLK_F_BLK_SIZE)
    .union(VIRTIO_BLK_F_MQ);
/// Advice for another disk than the source's.
const ADVICE: &str = "Give the destination's back-end the image that the source's has, or a copy that is kept equal to it and has \
                      its extended attributes. With guest --ignore-disk-generation the guest is taken in all the same, and \
                      reads what it did not write";
/// Size of the configuration space that the driver reads, up to `num_queues`, bytes.
const CONFIG_BYTES: usize = 36;

/// A device that is negotiated except for its rings, without the state of another device.
pub struct PreparedDevice {
    pub(super) device: Box<dyn Device>,
    /// State found at this device.
    found: DeviceState,
    has_inflight: bool,
    pub(super) doorbells: Vec<QueueDoorbells>,
}

impl PreparedDevice {
    /// Prepares devices for a guest with the memory `memory` and devices like `setup`'s.
    ///
    /// # Errors
    /// A setup of another version; devices that differ from the guest's, or are not reachable.
    pub fn all(
        setup: &DeviceSetup,
        memory: &Memory,
        devices: Vec<Box<dyn Device>>,
    ) -> Result<Vec<PreparedDevice>, GuestError> {
        if setup.version != STATE_VERSION {
            return Err(GuestError::State("it was saved by another version of this program".into()));
        }
        let config = GuestConfig::from(setup.config.clone());
        check_device_count(devices.len(), &config)?;
        let layout = GuestLayout::new(&config)?;
        let queues = layout.queues.chunks(config.queues.max(1).into());
        let expected = setup.devices.iter().map(Some).chain(std::iter::repeat(None));
        let agree = |((device, queues), expected)| PreparedDevice::new(device, &config, queues, memory, expected);
        in_parallel(devices.into_iter().zip(queues).zip(expected), agree)
    }

    /// Returns true if the device is still connected and fits `expected`.
    pub fn fits(&self, expected: &DeviceState) -> bool {
        !self.device.needs_reconnect() && self.found.features == expected.features
    }

    /// Compares the disk's identity with `there`, the identity at the source, unless either is unknown.
    ///
    /// # Errors
    /// [`GuestError::State`] if it is another disk; errors of the query.
    pub fn check_identity(&mut self, there: Option<u128>) -> Result<(), GuestError> {
        let here = if there.is_some() { self.device.disk_identity()? } else { None };
        match here.zip(there) {
            Some((here, there)) if here != there => {
                let name = self.device.name();
                Err(GuestError::State(format!("{name}: it is another disk than the guest's at the source. {ADVICE}")))
            }
            _ => Ok(()),
        }
    }

    /// Negotiates with a device, which must match `expected` if given.
    pub(super) fn new(
        mut device: Box<dyn Device>,
        config: &GuestConfig,
        queues: &[QueueLayout],
        memory: &Memory,
        expected: Option<&DeviceState>,
    ) -> Result<PreparedDevice, GuestError> {
        let name = device.name().to_owned();
        let unusable = |why: String| Err(GuestError::Unusable { name: name.clone(), why });
        if device.queues() < config.queues {
            let (has, wants) = (device.queues(), config.queues);
            // The number of queues of an arriving guest is fixed.
            let or = if expected.is_none() { format!(", or the guest with --queues {has}") } else { String::new() };
            return unusable(format!(
                "it has {has} queues, and the guest wants {wants}: start the back-end with --queues {wants}{or}"
            ));
        }
        let ring_features = config.ring_features();
        if !device.features().contains(ring_features) {
            return unusable("it has no packed rings".into());
        }
        if config.inflight_migration && !device.can_suspend_rings() {
            return unusable("it can't leave requests in flight: start it with --inflight-migration".into());
        }
        let offered = (FEATURES | ring_features) & device.features();
        if device.features().contains(VIRTIO_BLK_F_RO) {
            return unusable("it is read-only, and the guest writes".into());
        }
        let features = expected.map_or(offered, |state| state.features);
        let missing = features & !device.features();
        if !missing.is_empty() {
            let names = feature_names(missing, Some(VIRTIO_ID_BLOCK));
            let what = format!("{name}: features differ: it does not offer {names}, which the guest uses");
            return Err(GuestError::State(what));
        }
        if !features.contains(VIRTIO_F_VERSION_1) {
            return unusable("it does not offer VIRTIO_F_VERSION_1".into());
        }
        device.set_features(features)?;
        let [acknowledge, driver] = [virtio::VIRTIO_CONFIG_S_ACKNOWLEDGE, virtio::VIRTIO_CONFIG_S_DRIVER];
        let ready = acknowledge | driver | virtio::VIRTIO_CONFIG_S_FEATURES_OK | virtio::VIRTIO_CONFIG_S_DRIVER_OK;
        device.set_status(ready)?;
        let mut space = BlkConfig::new_zeroed();
        device.config(0, space.as_mut_bytes().get_mut(..CONFIG_BYTES).unwrap_or_default())?;
        let (has, sector) = (|feature| features.contains(feature), SECTOR_BYTES as u32);
        let found = DeviceState {
            features,
            capacity: space.capacity.get().saturating_mul(SECTOR_BYTES),
            segments: if has(VIRTIO_BLK_F_SEG_MAX) { space.seg_max.get() } else { 1 },
            block_size: if has(VIRTIO_BLK_F_BLK_SIZE) { space.blk_size.get() } else { sector },
            ..DeviceState::default()
        };
        let has_inflight = device.set_inflight(config.queues, config.queue_size, None)?;
        device.set_memory(memory)?;
        let doorbells = queues.iter().map(|queue| QueueDoorbells::new(queue.ring)).collect::<Result<Vec<_>, _>>()?;
        let start = RingBase::initial(config.ring_features());
        let rings: Vec<_> = (0..).zip(doorbells.iter().map(|doorbells| doorbells.setup(start))).collect();
        let mut prepared = PreparedDevice { device, found, has_inflight, doorbells };
        expected.map_or(Ok(()), |expected| prepared.check_matches(expected))?;
        prepared.device.prepare_rings(&rings)?;
        Ok(prepared)
    }

    fn check_matches(&self, expected: &DeviceState) -> Result<(), GuestError> {
        let (found, name) = (&self.found, self.device.name());
        for (what, here, there) in [
            ("disk size in bytes", found.capacity, expected.capacity),
            ("block size in bytes", found.block_size.into(), expected.block_size.into()),
            ("largest number of segments", found.segments.into(), expected.segments.into()),
        ] {
            if here != there {
                return Err(GuestError::State(format!("{name}: {what} differs: {here} here, {there} at the source")));
            }
        }
        Ok(())
    }

    /// Restores the state of the saved device.
    pub(super) fn restore(&mut self, config: &GuestConfig, state: &DeviceState) -> Result<(), GuestError> {
        self.check_matches(state)?;
        let (here, there) = (usize::from(config.queues), state.bases.len());
        if here != there {
            let name = self.device.name();
            return Err(GuestError::State(format!("{name}: queues differs: {here} here, {there} at the source")));
        }
        if let Some(inflight) = state.inflight.as_ref().filter(|_| self.has_inflight) {
            self.device.restore_inflight(inflight)?;
        }
        state.backend_state.as_ref().map_or(Ok(()), |own| Ok(self.device.load_state(own)?))
    }

    /// Returns the properties that a driver needs.
    pub(super) fn geometry(&self) -> Result<DiskGeometry, GuestError> {
        disk_geometry(&self.found)
    }
}

/// Returns the properties of a device that a driver needs.
pub(super) fn disk_geometry(state: &DeviceState) -> Result<DiskGeometry, GuestError> {
    let block = u64::from(state.block_size) / SECTOR_BYTES;
    if !block.is_power_of_two() || block > BUFFER_BYTES / SECTOR_BYTES {
        return Err(GuestError::State(format!("a disk can't have blocks of {} bytes", state.block_size)));
    }
    Ok(DiskGeometry { features: state.features, capacity: state.capacity, segments: state.segments, block })
}

/// Checks that the number of devices is the guest's number of disks.
pub(super) fn check_device_count(devices: usize, config: &GuestConfig) -> Result<(), GuestError> {
    match devices == config.disks {
        true => Ok(()),
        false => Err(GuestError::DeviceCount { disks: config.disks, devices }),
    }
}
