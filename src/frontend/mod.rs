//! The front-end: the [`Device`] trait, the vhost-user client and the kernel's vhost devices.
//!
//! This module holds the operations of a VMM, a migration or the built-in guest on a vhost device, independent of its
//! transport; [`UserDevice`], the vhost-user client; and [`KernelDevice`], for vhost-net, vhost-vsock, vhost-scsi
//! and vhost-vdpa. It does not hold the device side (`backend`) or drivers (`guest`).
//!
//! # Example
//!
//! Connect to a disk, give it guest memory, and read its capacity. `examples/drive_device.rs` continues with a ring.
//!
//! ```
//! # use std::os::fd::AsFd;
//! # use std::os::unix::net::UnixStream;
//! # use std::sync::Arc;
//! # use vhost_migrate::backend::{BackendListener, VirtioDevice, blk::{BlkDevice, BlkOptions}, serve};
//! # let folder = tempfile::tempdir()?;
//! # let (image, path) = (folder.path().join("disk.img"), folder.path().join("disk.sock"));
//! # std::fs::File::create(&image)?.set_len(16 << 20)?;
//! # let disk: Arc<dyn VirtioDevice> = Arc::new(BlkDevice::open(BlkOptions::new(&image))?);
//! # let listener = BackendListener::bind(&path)?;
//! # let (stop, stopper) = UnixStream::pair()?;
//! # let backend = std::thread::spawn(move || serve(&listener, &disk, stop.as_fd()));
//! use std::time::{Duration, Instant};
//!
//! use vhost_migrate::abi::virtio::VIRTIO_F_VERSION_1;
//! use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
//! use vhost_migrate::memory::{GuestAddress, Memory, Region};
//!
//! // Tries again until the deadline: the back-end may still be starting.
//! let mut disk = UserDevice::connect(&path, UserOptions::default(), Instant::now() + Duration::from_secs(10))?;
//! disk.set_features(disk.features() & VIRTIO_F_VERSION_1)?;
//! let region = Region::create(GuestAddress(0), 1 << 20)?;
//! disk.set_memory(&Memory::new([region.into()])?)?;
//!
//! let mut capacity = [0; 8];
//! disk.config(0, &mut capacity)?;
//! assert_eq!(u64::from_le_bytes(capacity) * 512, 16 << 20);
//! # drop((disk, stopper));
//! # backend.join().map_err(|_| "the back-end panicked")??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod counters;
mod error;
mod interrupt;
mod iommu;
pub(crate) mod kernel;
mod logging;
mod user;

#[cfg(feature = "metrics")]
pub use counters::describe_counters;
pub use error::FrontendError;
pub use interrupt::Interrupt;
pub use iommu::{Iommu, Mapping};
pub use kernel::{KernelDevice, KernelOffer, KernelOptions, KernelProbe, WorkerType, probe_kernel};
pub use logging::{DeviceDirtySource, SharedDevice};
pub use user::{BackendAddresses, UserDevice, UserOptions};

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::abi::vhost_user::{BackendRequest, DiskGeneration};
use crate::abi::virtio::VirtioFeatures;
use crate::dirty::{Log, LogQuality};
use crate::memory::{GuestAddress, Iova, Memory};
use crate::ring::RingBase;

/// Parameters of a ring to be started. Addresses are guest-physical, or I/O virtual if ACCESS_PLATFORM was acknowledged
/// (rule T1.7).
#[derive(Clone, Debug)]
pub struct RingSetup {
    /// Number of entries.
    pub size: u16,
    /// Descriptor table (packed: the descriptor ring).
    pub desc: GuestAddress,
    /// Available ring (packed: the driver's event area).
    pub avail: GuestAddress,
    /// Used ring (packed: the device's event area). While logging is on, writes to it are logged at this address.
    pub used: GuestAddress,
    /// Eventfd that the driver writes when buffers are available.
    pub kick: Arc<OwnedFd>,
    /// Eventfd that the device writes when buffers were used.
    pub call: Arc<OwnedFd>,
    /// Eventfd that the device writes when it finds the ring broken. A broken ring is not served until it is stopped
    /// and started again.
    pub error: Option<Arc<OwnedFd>>,
    /// Position at which the device continues (rules R4.1, R4.2).
    pub base: RingBase,
}

/// An unsolicited message of a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DeviceEvent {
    /// The configuration space has changed: read it again.
    ConfigChanged,
    /// The device reported a broken ring over the back-end channel (rule B3.2). The ring's error fd has been signalled
    /// too.
    RingBroken(u16),
    /// The device may not access this I/O virtual address as requested: the [`Iommu`] has no mapping, or one with less
    /// permission. The ring that needed it is stalled (rule T1.4).
    AccessFailed(Iova),
    /// The device offered a host notifier for this ring, which was refused (rule B4.2).
    HostNotifierRefused(u16),
    /// The device sent an unknown request, which was refused.
    RequestRefused(BackendRequest),
    /// The device violated the protocol on the back-end channel, which stays closed until the next connection.
    ChannelBroken(&'static str),
}

/// Contents of an inflight region, to be moved with a device whose rings are stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    /// Number of queues.
    pub queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Bytes of the region.
    pub contents: Vec<u8>,
}

/// Result of a reconnection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Reconnection {
    /// Number of requests that the inflight region had marked. The new back-end executes them again; up to one batch of
    /// them may be complete already.
    pub resubmitted: u64,
    /// Number of connection attempts; 0 if the existing connection was kept.
    pub attempts: u32,
}

/// A vhost device, as its front-end sees it.
///
/// The device keeps a record of its state. When a call fails with [`FrontendError::is_hang_up`], memory, features,
/// started rings, the inflight region and the log stay recorded; a log that was being installed does not, and a ring
/// that was being stopped counts as running. Call [`reconnect`](Device::reconnect), then repeat the call. The same
/// holds for [`FrontendError::Interrupted`], except that a ring that was being started counts as running and must not
/// be started again.
pub trait Device: Send {
    /// Returns the name of the device in messages: the path of its socket or of the kernel's device.
    fn name(&self) -> &str;

    /// Returns the offered virtio and vhost feature bits.
    fn features(&self) -> VirtioFeatures;

    /// Returns the virtio feature bits that [`set_features`](Device::set_features) acknowledged.
    fn acked_features(&self) -> VirtioFeatures;

    /// Acknowledges virtio feature bits. The device sets transport and logging bits itself.
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] for bits that are not offered; [`FrontendError::NoIommu`] for ACCESS_PLATFORM
    /// without an IOMMU; errors of the connection.
    fn set_features(&mut self, features: VirtioFeatures) -> Result<(), FrontendError>;

    /// Returns the maximum number of rings.
    fn queues(&self) -> u16;

    /// Returns the maximum number of regions for [`set_memory`](Device::set_memory).
    fn max_mem_slots(&self) -> usize;

    /// Sets the guest memory of the device. Its regions must have file descriptors
    /// ([`Region::share`](crate::memory::Region::share)). Rings may run; memory that they use must be part of the old
    /// and the new table (rules M1.1, L9.2).
    ///
    /// # Errors
    /// [`FrontendError::NotShared`]; [`FrontendError::NotOffered`] if there are too many regions; errors of the
    /// connection.
    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError>;

    /// Negotiates an inflight region for `queues` rings of up to `queue_size` entries, before any ring is started.
    /// `restored` is the result of [`inflight_state`](Device::inflight_state) on another host. It is used if this
    /// device's region has the same size. Otherwise the region starts fresh if no request is in flight, as after a
    /// drain (rule I5.1), and the call fails if there are some.
    ///
    /// Returns false if the device has no inflight region. Such a device cannot be restarted with outstanding requests.
    ///
    /// # Errors
    /// Errors of the connection; [`FrontendError::ProtocolViolation`] for an invalid region (rule I1.2).
    fn set_inflight(
        &mut self,
        queues: u16,
        queue_size: u16,
        restored: Option<&InflightState>,
    ) -> Result<bool, FrontendError>;

    /// Copies the result of [`inflight_state`](Device::inflight_state) on another host into the negotiated inflight
    /// region, before any ring is started. See [`set_inflight`](Device::set_inflight).
    ///
    /// # Errors
    /// [`FrontendError::InflightMismatch`] for another size with requests in flight; [`FrontendError::NotOffered`] if
    /// there is no region, and from the default implementation.
    fn restore_inflight(&mut self, restored: &InflightState) -> Result<(), FrontendError> {
        let _ = restored;
        let advice = "requests in flight cannot be moved to it";
        Err(FrontendError::NotOffered { what: "INFLIGHT_SHMFD".into(), advice })
    }

    /// Returns the contents of the inflight region. Move them when all rings are stopped.
    ///
    /// # Errors
    /// [`FrontendError::System`] if the region cannot be read.
    fn inflight_state(&self) -> Result<Option<InflightState>, FrontendError>;

    /// Sends the parameters of rings that do not depend on their memory: sizes and notification fds. Validating and
    /// starting the rings then takes less time.
    ///
    /// # Errors
    /// [`FrontendError::InvalidRing`]; errors of the connection.
    fn prepare_rings(&mut self, rings: &[(u16, RingSetup)]) -> Result<(), FrontendError> {
        let _ = rings;
        Ok(())
    }

    /// Sends everything that [`start_ring`](Device::start_ring) sends except the kick, to find out if the device would
    /// refuse the ring's size or position, or lacks what it needs to serve the ring (rule D2.1).
    ///
    /// # Errors
    /// As [`start_ring`](Device::start_ring).
    fn validate_ring(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        let _ = (index, setup);
        Ok(())
    }

    /// Returns true if the calls for several rings call their argument `sent` once all messages are sent and only
    /// replies are missing. One thread can then nest the calls of many devices. A call that fails earlier does not call
    /// `sent`.
    fn reports_sent(&self) -> bool {
        false
    }

    /// Validates several rings. Their messages are sent before the first reply is read. For `sent` see
    /// [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`validate_ring`](Device::validate_ring): the first error.
    fn validate_rings(&mut self, rings: &[(u16, RingSetup)], sent: &mut dyn FnMut()) -> Result<(), FrontendError> {
        let _ = sent;
        rings.iter().try_for_each(|(index, setup)| self.validate_ring(*index, setup))
    }

    /// Starts and enables ring `index`.
    ///
    /// # Errors
    /// [`FrontendError::InvalidRing`]; [`FrontendError::Memory`] for a ring outside memory; errors of the connection.
    /// After [`FrontendError::Interrupted`] the ring counts as running.
    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError>;

    /// Starts and enables several rings, and calls `started` for each that was started. Their messages are sent before
    /// the first reply is read. For `sent` see [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`start_ring`](Device::start_ring): the first error, after the results of all rings are known.
    fn start_rings(
        &mut self,
        rings: &[(u16, RingSetup)],
        sent: &mut dyn FnMut(),
        started: &mut dyn FnMut(u16),
    ) -> Result<(), FrontendError> {
        let _ = sent;
        rings.iter().try_for_each(|(index, setup)| {
            self.start_ring(*index, setup.clone())?;
            started(*index);
            Ok(())
        })
    }

    /// Stops ring `index` after all its requests are complete, and returns the position at which it would continue
    /// (rules R3.1, R3.2).
    ///
    /// # Errors
    /// [`FrontendError::InvalidRing`] if the ring is not started; errors of the connection.
    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError>;

    /// Stops several rings as [`stop_ring`](Device::stop_ring) does, and calls `stopped` with the position of each.
    /// Their requests are sent before the first reply is read. For `sent` see [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`stop_ring`](Device::stop_ring). Rings reported to `stopped` are stopped despite the error.
    fn stop_rings(
        &mut self,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        let _ = sent;
        indices.iter().try_for_each(|index| self.stop_ring(*index).map(|base| stopped(*index, base)))
    }

    /// Returns true if [`suspend_ring`](Device::suspend_ring) is available once there is an inflight region.
    fn can_suspend_rings(&self) -> bool {
        false
    }

    /// Stops ring `index` without waiting for its requests. Incomplete requests stay in the inflight region, and the
    /// device that starts the ring with this region executes them (rule I8.3).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the device does not support it; as [`stop_ring`](Device::stop_ring).
    fn suspend_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        let _ = index;
        Err(FrontendError::NotOffered { what: "suspending a ring".into(), advice: "stop it" })
    }

    /// Stops several rings as [`suspend_ring`](Device::suspend_ring) does, and calls `stopped` with the position of
    /// each. For `sent` see [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`suspend_ring`](Device::suspend_ring). Rings reported to `stopped` are stopped despite the error.
    fn suspend_rings(
        &mut self,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        let _ = sent;
        indices.iter().try_for_each(|index| self.suspend_ring(*index).map(|base| stopped(*index, base)))
    }

    /// Starts logging writes to guest memory to `log`, which the device maps from `fd`. When it returns, every later
    /// write is in `log`, and none goes to the log that was used before (rules L7.2, L9.1).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the device cannot log; errors of the connection.
    fn start_logging(&mut self, log: &Arc<Log>, fd: BorrowedFd<'_>) -> Result<(), FrontendError>;

    /// Stops logging. When it returns, no write goes to the log. A back-end that is disconnected, or does not reply in
    /// time, gets no log when it is reconnected.
    ///
    /// # Errors
    /// [`FrontendError::Refused`] and other errors of the connection.
    fn stop_logging(&mut self) -> Result<(), FrontendError>;

    /// Returns the quality of the log of [`start_logging`](Device::start_logging), or `None` if the device cannot log.
    fn log_quality(&self) -> Option<LogQuality> {
        Some(LogQuality::Exact)
    }

    /// Returns false if [`save_state`](Device::save_state) always returns `None`.
    fn has_state(&self) -> bool {
        true
    }

    /// Saves the device state beyond rings and configuration, to be loaded into a device of the same kind. Returns
    /// `None` if the device has no such state. All rings must be stopped (rule D1.1).
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::DeviceState`]; errors of the connection.
    fn save_state(&mut self) -> Result<Option<Vec<u8>>, FrontendError> {
        Ok(None)
    }

    /// Loads the result of [`save_state`](Device::save_state) of another device, before any ring is started (rule
    /// D1.4).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`], and from the default implementation; [`FrontendError::Refused`] for a state of
    /// another kind of device or a damaged one, which changes nothing; [`FrontendError::DeviceState`]; errors of the
    /// connection.
    fn load_state(&mut self, state: &[u8]) -> Result<(), FrontendError> {
        let _ = state;
        let advice = "the guest has a device state; use a device of the same kind";
        Err(FrontendError::NotOffered { what: "DEVICE_STATE".into(), advice })
    }

    /// Returns the identity of the disk and the generation of its contents, which stays the same until a ring runs.
    /// Returns `None` if the device does not know it. All rings must be stopped (GET_DISK_GENERATION).
    ///
    /// # Errors
    /// Errors of the connection.
    fn disk_generation(&mut self) -> Result<Option<DiskGeneration>, FrontendError> {
        Ok(None)
    }

    /// Returns the identity of the disk, or `None` if the device does not know it. Rings may run (GET_DISK_IDENTITY).
    ///
    /// # Errors
    /// Errors of the connection.
    fn disk_identity(&mut self) -> Result<Option<u128>, FrontendError> {
        Ok(None)
    }

    /// Returns the log in use.
    fn log(&self) -> Option<&Arc<Log>>;

    /// Reads configuration space at `offset` (rule C1.1).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`], [`FrontendError::Refused`]; errors of the connection.
    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError>;

    /// Writes configuration space at `offset` on behalf of the driver (SET_CONFIG with flags 0, rule C1.2).
    ///
    /// # Errors
    /// As [`config`](Device::config).
    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError>;

    /// Returns the virtio status byte, or `None` if the device does not keep one.
    ///
    /// # Errors
    /// Errors of the connection.
    fn status(&mut self) -> Result<Option<u8>, FrontendError>;

    /// Sets the virtio status byte if the device keeps one.
    ///
    /// # Errors
    /// Errors of the connection.
    fn set_status(&mut self, status: u8) -> Result<(), FrontendError>;

    /// Returns an fd that polls POLLHUP when the connection ends, or `None` if the device cannot disconnect.
    ///
    /// # Errors
    /// [`FrontendError::System`] if the fd cannot be duplicated.
    fn hang_up_fd(&self) -> Result<Option<OwnedFd>, FrontendError>;

    /// Returns the events since the last call. Equal events are returned once.
    fn take_events(&mut self) -> Vec<DeviceEvent> {
        Vec::new()
    }

    /// Returns an fd that is readable while there are [events](Device::take_events), or `None` if the device has no
    /// events.
    ///
    /// # Errors
    /// [`FrontendError::System`] if the fd cannot be duplicated.
    fn events_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        Ok(None)
    }

    /// Returns true if the device must be [reconnected](Device::reconnect) before the next call: either side has closed
    /// the connection, or a reply is pending after an interrupted wait.
    fn needs_reconnect(&self) -> bool;

    /// Returns the interrupt for the waits of this device, or `None` if the device never waits.
    /// [`stop_logging`](Device::stop_logging) is not interrupted; it has a short timeout of its own.
    ///
    /// After an interrupted wait [`needs_reconnect`](Device::needs_reconnect) is true and the connection is kept.
    /// [`reconnect`](Device::reconnect) receives the pending replies. A ring that was being stopped or started then
    /// runs.
    fn interrupt(&self) -> Option<Interrupt> {
        None
    }

    /// Makes the device usable again. If replies are pending on a connection that is still open, receives them.
    /// Otherwise connects again and restores the recorded state: memory, inflight region, rings (continued from the
    /// inflight region and the used ring) and log. Then signals kick and call of every ring, so that no notification is
    /// lost (rules R6.1, L8.1, I3.4). Retries until `deadline`, also if the back-end fails again.
    ///
    /// # Errors
    /// The last error at `deadline`; [`FrontendError::Interrupted`]; [`FrontendError::NotOffered`] if the new back-end
    /// has fewer features; [`FrontendError::Unrecoverable`] if requests would be lost.
    fn reconnect(&mut self, deadline: Instant) -> Result<Reconnection, FrontendError>;
}
