//! Shadow rings: a [`Device`] around a [`Device`], with rings of its own between the driver and the inner device.
//!
//! Some devices do not log what they write: vhost-vsock, older vhost-scsi, vDPA, and vhost-user back-ends without
//! LOG_SHMFD. [`ShadowDevice`] makes them migratable. The driver's rings are served in this process, as in a
//! back-end. Each request is passed on to the inner device in a second ring, the shadow ring. The buffers are not
//! copied: the inner device reads and writes guest memory itself. When it has completed a request, all writable bytes
//! of the request are marked in the dirty log, and then the driver gets it. So the log is complete, and requests in
//! flight are known, whatever the inner device does.
//!
//! The driver's ring is split or packed, the shadow ring is split. Requests that the inner device has not taken when a
//! ring is stopped return to the driver's ring, as if they had never been taken.
//!
//! | file | purpose |
//! |---|---|
//! | `memory` | memory of the shadow rings, and the memory table of the inner device |
//! | `queue` | passes requests from the driver's ring to the shadow ring and back |
//!
//! The cost is one more thread per ring, and its notifications. Devices that log (vhost-net, most vhost-user
//! back-ends) need no shadow rings.
//!
//! # Example
//!
//! A disk on a back-end that has no dirty log:
//!
//! ```
//! # use std::os::fd::AsFd;
//! # use std::os::unix::net::UnixStream;
//! # use std::sync::Arc;
//! # use vhost_migrate::abi::vhost_user::ProtocolFeatures;
//! # use vhost_migrate::backend::{BackendListener, VirtioDevice, blk::{BlkDevice, BlkOptions}, serve};
//! # let folder = tempfile::tempdir()?;
//! # let (image, path) = (folder.path().join("disk.img"), folder.path().join("disk.sock"));
//! # std::fs::File::create(&image)?.set_len(16 << 20)?;
//! # let disk: Arc<dyn VirtioDevice> = Arc::new(BlkDevice::open(BlkOptions::new(&image))?);
//! # let listener = BackendListener::bind(&path)?;
//! # let (stop, stopper) = UnixStream::pair()?;
//! # let backend = std::thread::spawn(move || serve(&listener, &disk, stop.as_fd()));
//! # let options = UserOptions::default();
//! # let options = options.with_protocol_features(options.protocol_features & !ProtocolFeatures::LOG_SHMFD);
//! use std::time::{Duration, Instant};
//!
//! use vhost_migrate::dirty::Log;
//! use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
//! use vhost_migrate::memory::{GuestAddress, Memory, Region};
//! use vhost_migrate::shadow::ShadowDevice;
//!
//! let memory = Memory::new([Region::create(GuestAddress(0), 1 << 20)?.into()])?;
//! let (log, fd) = Log::create(memory.end())?;
//! let log = Arc::new(log);
//!
//! let deadline = Instant::now() + Duration::from_secs(10);
//! let mut disk = UserDevice::connect(&path, options, deadline)?;
//! assert!(disk.start_logging(&log, fd.as_fd()).is_err());
//!
//! let mut disk = ShadowDevice::new(Box::new(disk));
//! disk.set_memory(&memory)?;
//! disk.start_logging(&log, fd.as_fd())?;
//! # drop((disk, stopper));
//! # backend.join().map_err(|_| "the back-end panicked")??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod memory;
mod queue;

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::abi::vhost::VHOST_F_LOG_ALL;
use crate::abi::vhost_user::DiskGeneration;
use crate::abi::virtio::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use crate::backend::rings::Workers;
use crate::backend::session::{Kick, Logging, Notifier, VringConfig, VringController};
use crate::dirty::{Log, LogQuality};
use crate::frontend::{Device, DeviceEvent, FrontendError, InflightState, Interrupt, Reconnection, RingSetup};
use crate::memory::Memory;
use crate::ring::{RingBase, RingLayout};
use crate::sys::with_causes::with_causes;
use memory::ShadowMemory;
use queue::{ForwardingDevice, ShadowRing};

/// Ring features of the driver's rings, which this process serves.
const DRIVER_RING_FEATURES: VirtioFeatures =
    VIRTIO_RING_F_INDIRECT_DESC.union(VIRTIO_RING_F_EVENT_IDX).union(VIRTIO_F_RING_PACKED);
/// Ring features of the shadow rings, if the inner device has them.
const SHADOW_RING_FEATURES: VirtioFeatures = VIRTIO_RING_F_INDIRECT_DESC.union(VIRTIO_RING_F_EVENT_IDX);
/// Features of the inner device that the driver cannot have: addresses behind an IOMMU are not translated here, and the
/// order of used buffers is that of this process.
const HIDDEN_FEATURES: VirtioFeatures = VIRTIO_F_ACCESS_PLATFORM.union(VIRTIO_F_IN_ORDER).union(DRIVER_RING_FEATURES);

/// A device behind shadow rings, see the [module](self).
///
/// [`Device::set_inflight`] is passed on for the shadow rings, so that the inner device can be reconnected with
/// requests in flight. A stopped `ShadowDevice` has no request in flight, so it neither saves nor restores any.
pub struct ShadowDevice {
    name: String,
    inner: SharedInner,
    /// Dropped before `inner` is.
    workers: Workers,
    forwarding: Arc<ForwardingDevice>,
    shadow: Option<ShadowMemory>,
    memory: Memory,
    features: VirtioFeatures,
    rings: BTreeMap<u16, RunningRing>,
    log: Option<Arc<Log>>,
    out_of_range_pages: Arc<std::sync::atomic::AtomicU64>,
    /// For each ring: true once its driver was notified.
    has_notified: Vec<Arc<AtomicBool>>,
}

type SharedInner = Arc<Mutex<Box<dyn Device>>>;

struct RunningRing {
    setup: RingSetup,
    shadow: Arc<ShadowRing>,
}

impl ShadowDevice {
    /// Puts shadow rings before `inner`, none of whose rings may run.
    pub fn new(inner: Box<dyn Device>) -> ShadowDevice {
        let (name, queues) = (inner.name().to_owned(), inner.queues());
        let forwarding = Arc::new(ForwardingDevice::new(queues));
        ShadowDevice {
            name,
            inner: Arc::new(Mutex::new(inner)),
            workers: Workers::new(forwarding.clone()),
            forwarding,
            shadow: None,
            memory: Memory::default(),
            features: VirtioFeatures::empty(),
            rings: BTreeMap::new(),
            log: None,
            out_of_range_pages: Arc::default(),
            has_notified: (0..queues).map(|_| Arc::default()).collect(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Box<dyn Device>> {
        // A thread that panicked left the device as after its last completed call.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the features of the shadow rings and of the inner device, for driver features `features`.
    fn inner_features(&self, features: VirtioFeatures) -> VirtioFeatures {
        let offered = self.inner().features() & !VHOST_F_LOG_ALL;
        offered & (features & !HIDDEN_FEATURES | SHADOW_RING_FEATURES)
    }

    fn start(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError> {
        let invalid = |reason: String| FrontendError::InvalidRing { index, reason };
        if self.rings.contains_key(&index) {
            return Err(invalid("it is already started; stop it first".into()));
        }
        let queues = self.queues();
        if index >= queues {
            return Err(invalid(format!("the device has {queues} rings")));
        }
        let Some(shadow) = &self.shadow else { return Err(invalid("there is no guest memory yet".into())) };
        let shadow = shadow.ring(index, setup.size, self.inner_features(self.features), &setup)?;
        let config = self.vring_config(index, &setup)?;
        self.forwarding.prepare(index, shadow.queue);
        self.inner().start_ring(index, shadow.setup)?;
        if let Err(error) = self.workers.start(index, config) {
            self.stop_inner(index, &shadow.ring)?;
            return Err(invalid(with_causes(&error).to_string()));
        }
        self.rings.insert(index, RunningRing { setup, shadow: shadow.ring });
        Ok(())
    }

    /// Stops the inner device's ring. Afterwards the requests that are left in the shadow ring are this process's.
    fn stop_inner(&self, index: u16, ring: &ShadowRing) -> Result<(), FrontendError> {
        self.inner().stop_ring(index)?;
        ring.stopped.store(true, Ordering::Release);
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<(RingSetup, RingBase), FrontendError> {
        let invalid = |reason: String| FrontendError::InvalidRing { index, reason };
        let ring = self.rings.get(&index).ok_or_else(|| invalid("it is not started".into()))?;
        self.stop_inner(index, &ring.shadow)?;
        let base = self.workers.stop(index).map_err(|error| invalid(with_causes(&error).to_string()))?;
        let ring = self.rings.remove(&index).ok_or_else(|| invalid("it is not started".into()))?;
        Ok((ring.setup, base))
    }

    fn vring_config(&self, index: u16, setup: &RingSetup) -> Result<VringConfig, FrontendError> {
        let copy = |fd: &Arc<OwnedFd>| fd.try_clone().map_err(FrontendError::system("keep a ring's eventfd"));
        let notifier = |fd| copy(fd).map(|fd| Arc::new(Notifier::new(fd)));
        let invalid = |reason: String| FrontendError::InvalidRing { index, reason };
        let kick = Kick::new(index, copy(&setup.kick)?).map_err(|error| invalid(with_causes(&error).to_string()))?;
        Ok(VringConfig {
            layout: RingLayout::new(self.features, setup.size, [setup.desc, setup.avail, setup.used]),
            base: setup.base,
            features: self.features,
            memory: self.memory.clone(),
            logging: self.logging(setup),
            kick: Some(Arc::new(kick)),
            is_polled: false,
            call: Some(notifier(&setup.call)?),
            // A notification before the ring was stopped may have been lost (rule R10.1).
            call_changed: true,
            has_notified: self.has_notified.get(usize::from(index)).cloned().unwrap_or_default(),
            error: setup.error.as_ref().map(notifier).transpose()?,
            inflight: None,
            // The base is exact: it is not compared with the ring's contents.
            is_first_start: false,
            in_postcopy: false,
            frontend: Arc::default(),
            iotlb: None,
        })
    }

    fn logging(&self, setup: &RingSetup) -> Logging {
        Logging {
            data: self.log.clone(),
            used: self.log.clone().map(|log| (log, setup.used)),
            signal: None,
            out_of_range_pages: self.out_of_range_pages.clone(),
        }
    }

    fn apply_logging(&mut self) {
        let logging: Vec<_> = self.rings.iter().map(|(index, ring)| (*index, self.logging(&ring.setup))).collect();
        logging.into_iter().for_each(|(index, logging)| self.workers.set_logging(index, logging));
    }
}

impl Drop for ShadowDevice {
    fn drop(&mut self) {
        for (index, ring) in &self.rings {
            // If the inner device cannot be stopped, it ends with this call's caller.
            let _ = self.inner().stop_ring(*index);
            ring.shadow.stopped.store(true, Ordering::Release);
        }
    }
}

impl Device for ShadowDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> VirtioFeatures {
        self.inner().features() & !HIDDEN_FEATURES | DRIVER_RING_FEATURES | VHOST_F_LOG_ALL
    }

    fn acked_features(&self) -> VirtioFeatures {
        self.features
    }

    fn set_features(&mut self, features: VirtioFeatures) -> Result<(), FrontendError> {
        let missing = features & !self.features();
        if !missing.is_empty() {
            let advice = "acknowledge only bits of features()";
            return Err(FrontendError::NotOffered { what: format!("features {missing:?}"), advice });
        }
        let inner = self.inner_features(features);
        self.inner().set_features(inner)?;
        self.features = features & !VHOST_F_LOG_ALL;
        Ok(())
    }

    fn queues(&self) -> u16 {
        self.inner().queues()
    }

    fn max_mem_slots(&self) -> usize {
        // One is for the shadow rings.
        self.inner().max_mem_slots().saturating_sub(1)
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
        let shadow = ShadowMemory::new(memory, self.inner().queues())?;
        // Rings that run move with the shadow rings.
        let running: Vec<u16> = self.rings.keys().copied().collect();
        let stopped = running.into_iter().map(|index| self.stop(index).map(|(setup, base)| (index, setup, base)));
        let stopped = stopped.collect::<Result<Vec<_>, _>>()?;
        let result = self.inner().set_memory(shadow.memory());
        if result.is_ok() {
            self.memory = memory.clone();
            self.shadow = Some(shadow);
        }
        for (index, setup, base) in stopped {
            self.start(index, RingSetup { base, ..setup })?;
        }
        result
    }

    fn set_inflight(
        &mut self,
        queues: u16,
        queue_size: u16,
        restored: Option<&InflightState>,
    ) -> Result<bool, FrontendError> {
        restored.map_or(Ok(()), |restored| self.restore_inflight(restored))?;
        self.inner().set_inflight(queues, queue_size.checked_next_power_of_two().unwrap_or(queue_size), None)
    }

    fn restore_inflight(&mut self, restored: &InflightState) -> Result<(), FrontendError> {
        match restored.requests(self.features.contains(VIRTIO_F_RING_PACKED)) {
            0 => Ok(()),
            requests => Err(FrontendError::NotOffered {
                what: format!("the resubmission of {requests} requests in flight"),
                advice: "a device with shadow rings starts with none; let the source complete them",
            }),
        }
    }

    fn inflight_state(&self) -> Result<Option<InflightState>, FrontendError> {
        Ok(None)
    }

    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError> {
        self.start(index, setup)
    }

    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        self.stop(index).map(|(_, base)| base)
    }

    fn start_logging(&mut self, log: &Arc<Log>, _fd: BorrowedFd<'_>) -> Result<(), FrontendError> {
        self.log = Some(log.clone());
        self.apply_logging();
        Ok(())
    }

    fn stop_logging(&mut self) -> Result<(), FrontendError> {
        self.log = None;
        self.apply_logging();
        Ok(())
    }

    fn log_quality(&self) -> Option<LogQuality> {
        Some(LogQuality::Shadowed)
    }

    fn has_state(&self) -> bool {
        self.inner().has_state()
    }

    fn save_state(&mut self) -> Result<Option<Vec<u8>>, FrontendError> {
        self.inner().save_state()
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), FrontendError> {
        self.inner().load_state(state)
    }

    fn disk_generation(&mut self) -> Result<Option<DiskGeneration>, FrontendError> {
        self.inner().disk_generation()
    }

    fn disk_identity(&mut self) -> Result<Option<u128>, FrontendError> {
        self.inner().disk_identity()
    }

    fn log(&self) -> Option<&Arc<Log>> {
        self.log.as_ref()
    }

    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        self.inner().config(offset, buf)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.inner().set_config(offset, bytes)
    }

    fn status(&mut self) -> Result<Option<u8>, FrontendError> {
        self.inner().status()
    }

    fn set_status(&mut self, status: u8) -> Result<(), FrontendError> {
        self.inner().set_status(status)
    }

    fn hang_up_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        self.inner().hang_up_fd()
    }

    fn take_events(&mut self) -> Vec<DeviceEvent> {
        self.inner().take_events()
    }

    fn events_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        self.inner().events_fd()
    }

    fn needs_reconnect(&self) -> bool {
        self.inner().needs_reconnect()
    }

    fn interrupt(&self) -> Option<Interrupt> {
        self.inner().interrupt()
    }

    fn reconnect(&mut self, deadline: Instant) -> Result<Reconnection, FrontendError> {
        // The inner device restores the shadow rings, with the requests that are in them.
        self.inner().reconnect(deadline)
    }
}

/// Creates an eventfd of a shadow ring.
fn eventfd() -> Result<Arc<OwnedFd>, FrontendError> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let eventfd = EventFd::from_value_and_flags(0, flags).map_err(FrontendError::system("make an eventfd"))?;
    Ok(Arc::new(eventfd.into()))
}
