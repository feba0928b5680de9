//! vhost-vdpa: a vDPA device, of hardware or of a process (VDUSE).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::super::FrontendError;
use super::handle::VhostHandle;
use super::{Kind, LogQuality};
use crate::abi::vhost::{
    VHOST_BACKEND_F_IOTLB_BATCH, VHOST_BACKEND_F_IOTLB_MSG_V2, VHOST_BACKEND_F_IOTLB_PERSIST, VHOST_BACKEND_F_SUSPEND,
    VHOST_GET_BACKEND_FEATURES, VHOST_SET_BACKEND_FEATURES, VHOST_SET_FEATURES, VHOST_SET_VRING_KICK,
    VHOST_VDPA_GET_CONFIG_SIZE, VHOST_VDPA_GET_DEVICE_ID, VHOST_VDPA_GET_IOVA_RANGE, VHOST_VDPA_GET_STATUS,
    VHOST_VDPA_GET_VQS_COUNT, VHOST_VDPA_GET_VRING_NUM, VHOST_VDPA_SET_CONFIG_CALL, VHOST_VDPA_SET_STATUS,
    VHOST_VDPA_SET_VRING_ENABLE, VHOST_VDPA_SUSPEND, VdpaIovaRange, VringState,
};
use crate::abi::virtio::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM, VirtioFeatures,
};
use crate::memory::Memory;
use crate::ring::RingBase;

/// Back-end features that this front-end uses.
const BACKEND_FEATURES: u64 = 1 << VHOST_BACKEND_F_IOTLB_MSG_V2
    | 1 << VHOST_BACKEND_F_IOTLB_BATCH
    | 1 << VHOST_BACKEND_F_SUSPEND
    | 1 << VHOST_BACKEND_F_IOTLB_PERSIST;
/// Time in which a device without SUSPEND completes its requests before its rings are stopped.
const DRAIN_TIME: Duration = Duration::from_secs(10);
/// Time between two questions.
const DRAIN_INTERVAL: Duration = Duration::from_millis(1);

/// A vDPA device. Its rings run together, between the status DRIVER_OK and a reset.
pub(super) struct Vdpa {
    /// Number of rings that the driver uses, if not all.
    queues: Option<u16>,
    found: Found,
    /// Signalled when the configuration space has changed.
    config_changes: Option<OwnedFd>,
}

/// The answers of the device when it was opened.
#[derive(Default)]
struct Found {
    id: u32,
    queues: u16,
    max_ring_size: u16,
    backend_features: u64,
    range: Option<VdpaIovaRange>,
    config_size: u32,
}

impl Vdpa {
    /// A device of which the driver uses `queues` rings, or all.
    pub(super) fn new(queues: Option<u16>) -> Vdpa {
        Vdpa { queues, found: Found::default(), config_changes: None }
    }

    fn has(&self, bit: u32) -> bool {
        self.found.backend_features & 1 << bit != 0
    }

    fn status(handle: &VhostHandle) -> Result<u8, FrontendError> {
        handle.get(VHOST_VDPA_GET_STATUS)
    }

    fn negotiate(&self, handle: &mut VhostHandle, features: VirtioFeatures) -> Result<(), FrontendError> {
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        handle.set(VHOST_VDPA_SET_STATUS, status)?;
        handle.set(VHOST_SET_FEATURES, features.bits())?;
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        handle.set(VHOST_VDPA_SET_STATUS, status)?;
        if Vdpa::status(handle)? & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            let advice = "acknowledge other bits of features()";
            return Err(FrontendError::NotOffered { what: "this set of features".into(), advice });
        }
        handle.map_memory()?;
        for (index, setup) in handle.rings() {
            handle.set_ring(index, &setup, false)?;
            handle.set(VHOST_VDPA_SET_VRING_ENABLE, VringState { index: index.into(), num: 1 })?;
        }
        status |= VIRTIO_CONFIG_S_DRIVER_OK;
        handle.set(VHOST_VDPA_SET_STATUS, status)?;
        match Vdpa::status(handle)? {
            now if now & VIRTIO_CONFIG_S_DRIVER_OK != 0 && now & VIRTIO_CONFIG_S_NEEDS_RESET == 0 => Ok(()),
            status => Err(FrontendError::NotStarted { device: handle.name().into(), status }),
        }
    }

    /// Resets the device, which ends its accesses.
    fn reset(&self, handle: &mut VhostHandle) -> Result<(), FrontendError> {
        handle.set(VHOST_VDPA_SET_STATUS, 0u8)?;
        match self.has(VHOST_BACKEND_F_IOTLB_PERSIST) {
            true => Ok(()),
            false => handle.unmap_memory(),
        }
    }

    /// Waits until the device has completed every request that it has taken, and does not notice others.
    fn drain(handle: &VhostHandle) -> Result<(), FrontendError> {
        let deadline = Instant::now() + DRAIN_TIME;
        let rings = handle.rings();
        for (index, _) in &rings {
            handle.set_ring_fd(VHOST_SET_VRING_KICK, *index, None)?;
        }
        loop {
            let mut busy = None;
            for (index, _) in &rings {
                // The used index is read last: if it is equal, nothing was in flight at that time.
                let taken = handle.ring_base(*index)?.split_index();
                let in_flight = taken.wrapping_sub(handle.used_index(*index)?);
                busy = busy.or((in_flight != 0).then_some((*index, in_flight)));
            }
            match busy {
                None => return Ok(()),
                Some((index, in_flight)) if Instant::now() >= deadline => {
                    let device = handle.name().into();
                    return Err(FrontendError::InFlight { device, index, in_flight, waited: DRAIN_TIME });
                }
                Some(_) => std::thread::sleep(DRAIN_INTERVAL),
            }
        }
    }

    fn stop(&self, handle: &mut VhostHandle) -> Result<(), FrontendError> {
        if self.has(VHOST_BACKEND_F_SUSPEND) {
            handle.tell(VHOST_VDPA_SUSPEND)?;
            for (index, _) in handle.rings() {
                let base = handle.ring_base(index)?;
                handle.note_base(index, base);
            }
            return self.reset(handle);
        }
        if let Err(error) = Vdpa::drain(handle) {
            // The rings go on.
            for (index, setup) in handle.rings() {
                handle.set_ring_fd(VHOST_SET_VRING_KICK, index, Some(setup.kick.as_raw_fd()))?;
            }
            handle.kick_rings(|_| true);
            return Err(error);
        }
        self.reset(handle)?;
        for (index, _) in handle.rings() {
            let base = RingBase::split(handle.used_index(index)?);
            handle.note_base(index, base);
        }
        Ok(())
    }

    fn check_config(&self, offset: u32, len: usize) -> Result<(), FrontendError> {
        let size = self.found.config_size;
        match len as u64 <= u64::from(size.saturating_sub(offset)) {
            true => Ok(()),
            false => Err(FrontendError::NotOffered {
                what: format!("{len} bytes of configuration at {offset} (it has {size})"),
                advice: "access the fields that its features stand for",
            }),
        }
    }
}

impl Kind for Vdpa {
    fn id(&self) -> u32 {
        self.found.id
    }

    fn opened(&mut self, handle: &mut VhostHandle) -> Result<(), FrontendError> {
        let backend_features = handle.get::<u64>(VHOST_GET_BACKEND_FEATURES)? & BACKEND_FEATURES;
        handle.set(VHOST_SET_BACKEND_FEATURES, backend_features)?;
        self.found = Found {
            id: handle.get(VHOST_VDPA_GET_DEVICE_ID)?,
            queues: u16::try_from(handle.get::<u32>(VHOST_VDPA_GET_VQS_COUNT)?).unwrap_or(u16::MAX),
            max_ring_size: handle.get(VHOST_VDPA_GET_VRING_NUM)?,
            backend_features,
            range: Some(handle.get(VHOST_VDPA_GET_IOVA_RANGE)?),
            config_size: handle.get(VHOST_VDPA_GET_CONFIG_SIZE)?,
        };
        handle.use_iotlb(self.has(VHOST_BACKEND_F_IOTLB_MSG_V2), self.has(VHOST_BACKEND_F_IOTLB_BATCH));
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = EventFd::from_value_and_flags(0, flags).map_err(FrontendError::system("make an eventfd"))?;
        handle.set(VHOST_VDPA_SET_CONFIG_CALL, eventfd.as_raw_fd())?;
        self.config_changes = Some(eventfd.into());
        let has = self.found.queues;
        if self.queues.is_some_and(|queues| queues > has || queues == 0) {
            return Err(FrontendError::NotOffered {
                what: format!("{} rings ({has} at most)", self.queues()),
                advice: "let the driver use fewer, but one at least",
            });
        }
        Ok(())
    }

    fn queues(&self) -> u16 {
        self.queues.unwrap_or(self.found.queues)
    }

    fn max_ring_size(&self) -> u16 {
        self.found.max_ring_size
    }

    fn slots(&self) -> Option<usize> {
        Some(usize::MAX)
    }

    fn runs_as_a_whole(&self) -> bool {
        true
    }

    fn own_features(&self, offered: VirtioFeatures) -> VirtioFeatures {
        // The addresses of rings and buffers are those of the memory that is mapped.
        offered & VIRTIO_F_ACCESS_PLATFORM
    }

    fn check_memory(&self, memory: &Memory) -> Result<(), FrontendError> {
        let Some(range) = &self.found.range else { return Ok(()) };
        for region in memory.regions() {
            region.shared().ok_or(FrontendError::NotShared { gpa: region.gpa() })?;
            let (first, end) = (region.gpa().0, region.gpa().0.saturating_add(region.size()));
            if first < range.first || end.saturating_sub(1) > range.last {
                return Err(FrontendError::NotOffered {
                    what: format!(
                        "the addresses {first:#x} to {end:#x} (it has {:#x} to {:#x})",
                        range.first, range.last
                    ),
                    advice: "place guest memory at addresses that the device can access",
                });
            }
        }
        Ok(())
    }

    fn run(&self, handle: &mut VhostHandle, _: u16, features: VirtioFeatures) -> Result<(), FrontendError> {
        self.negotiate(handle, features).inspect_err(|_| {
            // The error of the start tells more.
            let _ = self.reset(handle);
        })
    }

    fn halt(&self, handle: &mut VhostHandle, _: u16) -> Result<(), FrontendError> {
        self.stop(handle)
    }

    /// The base that was noted when the device was stopped: the reset has cleared the device's.
    fn base(&self, handle: &VhostHandle, index: u16) -> Result<RingBase, FrontendError> {
        let rings = handle.rings();
        let base = rings.into_iter().find_map(|(ring, setup)| (ring == index).then_some(setup.base));
        base.ok_or_else(|| FrontendError::InvalidRing { index, reason: "it is not started".into() })
    }

    fn log_quality(&self) -> Result<LogQuality, &'static str> {
        log_quality()
    }

    fn config(&self, handle: &VhostHandle, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        self.check_config(offset, buf.len())?;
        handle.config(offset, buf)
    }

    fn set_config(&self, handle: &VhostHandle, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.check_config(offset, bytes.len())?;
        handle.set_config(offset, bytes)
    }

    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        self.config_changes.as_ref().map(OwnedFd::as_fd)
    }

    fn status(&self, handle: &VhostHandle) -> Result<Option<u8>, FrontendError> {
        Vdpa::status(handle).map(Some)
    }
}

/// Returns the quality of the log, or the reason why there is none (rules K4).
pub(super) fn log_quality() -> Result<LogQuality, &'static str> {
    Err("vhost-vdpa has no log (rule K4.4); wrap it in shadow::ShadowDevice")
}
