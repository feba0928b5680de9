//! Devices of the kernel: [`KernelDevice`] drives vhost-net, vhost-vsock, vhost-scsi and vhost-vdpa.
//!
//! This module maps the calls of [`Device`] to ioctls in the order that the kernel expects (rules K1), and keeps the
//! dirty log in memory (rules K3). What differs between the devices is in `net`, `vsock`, `scsi` and `vdpa`; the ioctls are in
//! `handle`, the texts of their errors in `explain`.

mod explain;
mod handle;
mod net;
mod options;
mod probe;
mod scsi;
#[cfg(test)]
mod tests;
mod vdpa;
mod vsock;

pub use explain::vhost_error;
pub use options::{KernelOptions, WorkerType};
pub use probe::{KernelOffer, KernelProbe, probe_kernel};

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::{Device, DeviceEvent, FrontendError, InflightState, LogQuality, Reconnection, RingSetup};
use crate::abi::features::feature_names;
use crate::abi::vhost::{
    VHOST_ATTACH_VRING_WORKER, VHOST_F_LOG_ALL, VHOST_FORK_OWNER_KTHREAD, VHOST_FORK_OWNER_TASK, VHOST_GET_FEATURES,
    VHOST_NET_F_VIRTIO_NET_HDR, VHOST_NEW_WORKER, VHOST_SCSI_GET_EVENTS_MISSED, VHOST_SCSI_SET_EVENTS_MISSED,
    VHOST_SET_FEATURES, VHOST_SET_FORK_FROM_OWNER, VHOST_SET_OWNER, VHOST_SET_VRING_BUSYLOOP_TIMEOUT,
    VHOST_SET_VRING_ENDIAN, VHOST_VRING_BIG_ENDIAN, VHOST_VSOCK_SET_GUEST_CID, VringState, VringWorker, WorkerState,
};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VirtioFeatures};
use crate::dirty::Log;
use crate::memory::{LOG_PAGE, Memory};
use crate::ring::RingBase;
use crate::sys::nonblocking;
use handle::{VhostHandle, ring_addresses};
use net::Net;
use scsi::Scsi;
use vdpa::Vdpa;
use vsock::Vsock;

/// Feature bits that the device sets itself, and those that this front-end does not support (device IOTLB).
const HIDDEN_FEATURES: VirtioFeatures =
    VHOST_F_LOG_ALL.union(VHOST_NET_F_VIRTIO_NET_HDR).union(VIRTIO_F_ACCESS_PLATFORM);
/// Number of regions that the module vhost takes by default.
const DEFAULT_MAX_REGIONS: usize = 64;
/// The module's parameter for it.
const MAX_REGIONS: &str = "/sys/module/vhost/parameters/max_mem_regions";

/// The differences between the vhost devices of the kernel.
trait Kind: Send {
    /// Returns the virtio device id.
    fn id(&self) -> u32;

    /// Makes the calls that follow SET_OWNER.
    fn opened(&mut self, _: &mut VhostHandle) -> Result<(), FrontendError> {
        Ok(())
    }

    /// Returns the number of rings.
    fn queues(&self) -> u16;

    /// Returns the maximum number of entries of a ring.
    fn max_ring_size(&self) -> u16 {
        1 << 15
    }

    /// Returns the maximum number of regions, if it is not that of the module vhost.
    fn slots(&self) -> Option<usize> {
        None
    }

    /// Returns true if all rings start and stop together.
    fn runs_as_a_whole(&self) -> bool;

    /// Returns the features that are acknowledged whatever the driver wants.
    fn own_features(&self, offered: VirtioFeatures) -> VirtioFeatures {
        let _ = offered;
        VirtioFeatures::empty()
    }

    /// Prepares the device for the features that the driver has acknowledged.
    fn features_set(&self, _: VirtioFeatures) -> Result<(), FrontendError> {
        Ok(())
    }

    /// Returns an error if the device cannot access this memory.
    fn check_memory(&self, _: &Memory) -> Result<(), FrontendError> {
        Ok(())
    }

    /// Starts the ring, or all rings of a device that runs as a whole. `features` are all that were acknowledged.
    fn run(&self, handle: &mut VhostHandle, index: u16, features: VirtioFeatures) -> Result<(), FrontendError>;

    /// Stops the ring, or all rings, and waits for requests in flight.
    fn halt(&self, handle: &mut VhostHandle, index: u16) -> Result<(), FrontendError>;

    /// Returns the position of a ring that was stopped.
    fn base(&self, handle: &VhostHandle, index: u16) -> Result<RingBase, FrontendError> {
        handle.ring_base(index)
    }

    /// Returns the quality of the log, or the reason why the device has none.
    fn log_quality(&self) -> Result<LogQuality, &'static str>;

    /// Reads configuration space.
    fn config(&self, _: &VhostHandle, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        Err(no_config(format!("{} bytes of configuration at {offset}", buf.len())))
    }

    /// Writes configuration space.
    fn set_config(&self, _: &VhostHandle, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        Err(no_config(format!("a write of {} bytes of configuration at {offset}", bytes.len())))
    }

    /// Returns the eventfd that is signalled when the configuration space has changed.
    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Returns the status byte, if the device has one.
    fn status(&self, _: &VhostHandle) -> Result<Option<u8>, FrontendError> {
        Ok(None)
    }
}

fn no_config(what: String) -> FrontendError {
    FrontendError::NotOffered { what, advice: "the VMM keeps the configuration space of this device" }
}

/// A vhost device of the kernel: vhost-net, vhost-vsock, vhost-scsi or vhost-vdpa.
///
/// vhost-vdpa maps the files of guest memory. The others access it at the addresses that it has in this process, so its
/// regions need no file descriptor. Rings are split. The VMM keeps what the kernel does not have: but for vhost-vdpa the
/// configuration space (except the vsock's) and the features of the device type, and for all the driver's status.
///
/// # Example
///
/// ```
/// use vhost_migrate::abi::virtio::VIRTIO_F_VERSION_1;
/// use vhost_migrate::frontend::{Device, FrontendError, KernelDevice, KernelOptions};
/// use vhost_migrate::memory::{GuestAddress, Memory, Region};
///
/// let memory = Memory::new([Region::create(GuestAddress(0), 1 << 20)?.into()])?;
/// match KernelDevice::vsock(7777, KernelOptions::default()) {
///     Ok(mut vsock) => {
///         vsock.set_features(VIRTIO_F_VERSION_1)?;
///         vsock.set_memory(&memory)?;
///     }
///     // The text says which module to load, or what lacks a permission.
///     Err(error @ FrontendError::OpenDevice { .. }) => eprintln!("{error}"),
///     Err(error) => return Err(error.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct KernelDevice {
    handle: VhostHandle,
    kind: Box<dyn Kind>,
    options: KernelOptions,
    offered: VirtioFeatures,
    features: VirtioFeatures,
    memory: Memory,
    slots: usize,
    /// Rings that were started.
    started: BTreeSet<u16>,
    /// True while a device runs that runs as a whole.
    runs: bool,
    log: Option<Arc<Log>>,
}

impl KernelDevice {
    /// Opens /dev/vhost-net for one pair of rings, 0 to receive and 1 to send, between guest and `tap`. An interface
    /// with several queue pairs has a device for each queue of its tap.
    ///
    /// The tap is opened with IFF_TAP and IFF_NO_PI. With IFF_VNET_HDR it has offloads; the size of the header is set by
    /// the device. A packet socket works too.
    ///
    /// # Errors
    /// [`FrontendError::OpenDevice`]; [`FrontendError::Vhost`].
    pub fn net(tap: OwnedFd, options: KernelOptions) -> Result<KernelDevice, FrontendError> {
        KernelDevice::open("/dev/vhost-net", "vhost_net", Box::new(Net { tap }), options)
    }

    /// Opens /dev/vhost-vsock for the guest with context id `cid`: ring 0 to receive, 1 to send. The VMM keeps the event
    /// ring. The rings run while both are started.
    ///
    /// # Errors
    /// As [`KernelDevice::net`].
    pub fn vsock(cid: u64, options: KernelOptions) -> Result<KernelDevice, FrontendError> {
        let device = KernelDevice::open("/dev/vhost-vsock", "vhost_vsock", Box::new(Vsock { cid }), options)?;
        device.handle.set(VHOST_VSOCK_SET_GUEST_CID, cid)?;
        Ok(device)
    }

    /// Opens /dev/vhost-scsi for the target named `wwpn`, with the control ring 0, the event ring 1 and `request_queues`
    /// rings for requests. The rings run while all are started.
    ///
    /// # Errors
    /// As [`KernelDevice::net`]; [`FrontendError::NotOffered`] for a name that no target can have.
    pub fn scsi(wwpn: &str, request_queues: u16, options: KernelOptions) -> Result<KernelDevice, FrontendError> {
        let scsi = Scsi::new(wwpn, request_queues.saturating_add(2))?;
        KernelDevice::open("/dev/vhost-scsi", "vhost_scsi", Box::new(scsi), options)
    }

    /// Opens `path`, such as /dev/vhost-vdpa-0, of whose rings the driver uses `queues`, or all. Guest-physical
    /// addresses are the device's I/O virtual addresses, and all its rings are in address space 0.
    ///
    /// The device is reset, and again whenever its rings are stopped. They run while all are started. A device without
    /// SUSPEND has no more kicks before it is stopped, and has some time to complete the requests that it has taken.
    ///
    /// # Errors
    /// As [`KernelDevice::net`]; [`FrontendError::NotOffered`] for more rings than it has.
    pub fn vdpa(
        path: impl AsRef<Path>,
        queues: Option<u16>,
        options: KernelOptions,
    ) -> Result<KernelDevice, FrontendError> {
        KernelDevice::open(path, "vhost_vdpa", Box::new(Vdpa::new(queues)), options)
    }

    fn open(
        path: impl AsRef<Path>,
        module: &str,
        kind: Box<dyn Kind>,
        options: KernelOptions,
    ) -> Result<KernelDevice, FrontendError> {
        let path = options.path.as_deref().unwrap_or(path.as_ref());
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|source| explain::open_error(path, module, source))?;
        let handle = VhostHandle::new(file, path.display().to_string());
        KernelDevice::with_handle(handle, kind, options)
    }

    fn with_handle(
        mut handle: VhostHandle,
        mut kind: Box<dyn Kind>,
        options: KernelOptions,
    ) -> Result<KernelDevice, FrontendError> {
        if let Some(worker_type) = options.worker_type {
            let value = match worker_type {
                WorkerType::KernelThread => VHOST_FORK_OWNER_KTHREAD,
                WorkerType::OwnerTask => VHOST_FORK_OWNER_TASK,
            };
            handle.set(VHOST_SET_FORK_FROM_OWNER, value)?;
        }
        handle.tell(VHOST_SET_OWNER)?;
        kind.opened(&mut handle)?;
        let offered = VirtioFeatures::from_bits_retain(handle.get(VHOST_GET_FEATURES)?);
        for worker in 0..options.workers {
            let WorkerState { worker_id } = handle.get(VHOST_NEW_WORKER)?;
            for index in (worker..kind.queues()).step_by(options.workers.into()) {
                handle.set(VHOST_ATTACH_VRING_WORKER, VringWorker { index: index.into(), worker_id })?;
            }
        }
        let of_module = || std::fs::read_to_string(MAX_REGIONS).ok()?.trim().parse().ok();
        let slots = kind.slots().or_else(of_module).unwrap_or(DEFAULT_MAX_REGIONS);
        Ok(KernelDevice {
            handle,
            kind,
            options,
            offered,
            features: VirtioFeatures::empty(),
            memory: Memory::default(),
            slots,
            started: BTreeSet::new(),
            runs: false,
            log: None,
        })
    }

    /// Returns the virtio device id.
    pub fn device_id(&self) -> u32 {
        self.kind.id()
    }

    /// Sets the eventfd that the kernel writes after it has logged, or removes it. It stays set when logging starts and
    /// stops (SET_LOG_FD, rule K2.5).
    ///
    /// # Errors
    /// [`FrontendError::Vhost`].
    pub fn set_log_fd(&mut self, signal: Option<BorrowedFd<'_>>) -> Result<(), FrontendError> {
        self.handle.set_log_fd(signal)
    }

    /// Returns true if vhost-scsi had an event and no buffer for it, which a migration has to carry over.
    ///
    /// # Errors
    /// [`FrontendError::Vhost`], also for other devices.
    pub fn events_missed(&self) -> Result<bool, FrontendError> {
        Ok(self.handle.get::<u32>(VHOST_SCSI_GET_EVENTS_MISSED)? != 0)
    }

    /// Sets what [`events_missed`](KernelDevice::events_missed) returned on another host.
    ///
    /// # Errors
    /// As [`events_missed`](KernelDevice::events_missed).
    pub fn set_events_missed(&mut self, missed: bool) -> Result<(), FrontendError> {
        self.handle.set(VHOST_SCSI_SET_EVENTS_MISSED, u32::from(missed))
    }

    fn all_features(&self) -> VirtioFeatures {
        self.features | self.kind.own_features(self.offered)
    }

    fn send_features(&self, log: bool) -> Result<(), FrontendError> {
        let mut features = self.all_features();
        features.set(VHOST_F_LOG_ALL, log);
        self.handle.set(VHOST_SET_FEATURES, features.bits())
    }

    /// Switches logging of data and of the started rings on or off.
    fn send_logging(&mut self, log: bool) -> Result<(), FrontendError> {
        self.send_features(log)?;
        self.started.iter().try_for_each(|index| self.handle.place_ring(*index, log))
    }

    fn check_log(log: &Log, memory: &Memory) -> Result<(), FrontendError> {
        match log.pages().saturating_mul(LOG_PAGE) < memory.end().0 {
            true => Err(FrontendError::LogTooSmall { pages: log.pages(), memory_end: memory.end() }),
            false => Ok(()),
        }
    }

    fn check_ring(&self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        let bad = |reason| Err(FrontendError::InvalidRing { index, reason });
        if index >= self.kind.queues() {
            return bad(format!("the device has {} rings", self.kind.queues()));
        }
        if !setup.size.is_power_of_two() {
            return bad(format!("it has {} entries, a split ring has a power of two", setup.size));
        }
        if setup.size > self.kind.max_ring_size() {
            return bad(format!("it has {} entries, the device allows {}", setup.size, self.kind.max_ring_size()));
        }
        if self.started.contains(&index) {
            return bad("it is already started; stop it first".into());
        }
        ring_addresses(&self.memory, setup)?;
        Ok(())
    }

    /// Sets everything of a ring but the back-end that makes it run.
    fn set_ring(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        self.check_ring(index, setup)?;
        let state = |num| VringState { index: index.into(), num };
        if self.options.big_endian {
            self.handle.set(VHOST_SET_VRING_ENDIAN, state(VHOST_VRING_BIG_ENDIAN))?;
        }
        if !self.options.busy_poll.is_zero() {
            let micros = u32::try_from(self.options.busy_poll.as_micros()).unwrap_or(u32::MAX).min(i32::MAX as u32);
            self.handle.set(VHOST_SET_VRING_BUSYLOOP_TIMEOUT, state(micros))?;
        }
        self.handle.set_ring(index, setup, self.log.is_some())
    }

    fn halt(&mut self, index: u16) -> Result<(), FrontendError> {
        if self.runs || !self.kind.runs_as_a_whole() {
            self.kind.halt(&mut self.handle, index)?;
        }
        self.runs = false;
        Ok(())
    }
}

impl Device for KernelDevice {
    fn name(&self) -> &str {
        self.handle.name()
    }

    fn features(&self) -> VirtioFeatures {
        self.offered & !HIDDEN_FEATURES
    }

    fn acked_features(&self) -> VirtioFeatures {
        self.features
    }

    fn set_features(&mut self, features: VirtioFeatures) -> Result<(), FrontendError> {
        let missing = features & !self.features();
        if !missing.is_empty() {
            let what = format!("features {}", feature_names(missing, Some(self.kind.id())));
            return Err(FrontendError::NotOffered { what, advice: "acknowledge only bits of features()" });
        }
        let before = std::mem::replace(&mut self.features, features);
        let set = self.send_features(self.log.is_some()).and_then(|()| self.kind.features_set(features));
        set.inspect_err(|_| self.features = before)
    }

    fn queues(&self) -> u16 {
        self.kind.queues()
    }

    fn max_mem_slots(&self) -> usize {
        self.slots
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
        if memory.regions().len() > self.slots {
            return Err(FrontendError::NotOffered {
                what: format!("{} memory slots ({} at most)", memory.regions().len(), self.slots),
                advice: "use fewer, larger regions, or raise max_mem_regions of the module vhost",
            });
        }
        self.kind.check_memory(memory)?;
        self.log.iter().try_for_each(|log| KernelDevice::check_log(log, memory))?;
        self.started.iter().try_for_each(|index| self.handle.check_place(*index, memory))?;
        self.handle.set_memory(memory)?;
        self.memory = memory.clone();
        // The addresses of a ring change with its region.
        self.started.iter().try_for_each(|index| self.handle.move_ring(*index, self.log.is_some()))
    }

    fn set_inflight(&mut self, _: u16, _: u16, _: Option<&InflightState>) -> Result<bool, FrontendError> {
        Ok(false)
    }

    fn inflight_state(&self) -> Result<Option<InflightState>, FrontendError> {
        Ok(None)
    }

    fn validate_ring(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        self.set_ring(index, setup)
    }

    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError> {
        self.set_ring(index, &setup)?;
        let features = self.all_features();
        if self.kind.runs_as_a_whole() {
            if self.started.len() + 1 < self.kind.queues().into() {
                self.started.insert(index);
                return Ok(());
            }
            self.kind.run(&mut self.handle, index, features)?;
            self.runs = true;
        } else {
            self.kind.run(&mut self.handle, index, features)?;
        }
        self.started.insert(index);
        // The kernel has consumed kicks that came before the start.
        self.handle.kick_rings(|other| self.runs || other == index);
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        if !self.started.contains(&index) {
            return Err(FrontendError::InvalidRing { index, reason: "it is not started".into() });
        }
        self.halt(index)?;
        let base = self.kind.base(&self.handle, index)?;
        self.started.remove(&index);
        Ok(base)
    }

    fn start_logging(&mut self, log: &Arc<Log>, fd: BorrowedFd<'_>) -> Result<(), FrontendError> {
        let not_offered = |advice| FrontendError::NotOffered { what: "a complete dirty log".into(), advice };
        self.kind.log_quality().map_err(not_offered)?;
        if cfg!(target_endian = "big") {
            return Err(not_offered("the kernel's log has another order of bits on big-endian hosts (rule K3.3)"));
        }
        if !self.offered.contains(VHOST_F_LOG_ALL) {
            let advice = "it cannot be migrated while it runs";
            return Err(FrontendError::NotOffered { what: "VHOST_F_LOG_ALL".into(), advice });
        }
        KernelDevice::check_log(log, &self.memory)?;
        let map = Log::map(fd, log.size(), 0)?;
        map.lock_in_memory()?;
        self.handle.set_log(Some(map))?;
        if self.log.is_none()
            && let Err(error) = self.send_logging(true)
        {
            // Nothing is logged after a failed start.
            let _ = self.send_logging(false).and_then(|()| self.handle.set_log(None));
            return Err(error);
        }
        self.log = Some(log.clone());
        Ok(())
    }

    fn stop_logging(&mut self) -> Result<(), FrontendError> {
        if self.log.is_none() {
            return Ok(());
        }
        self.send_logging(false)?;
        self.log = None;
        self.handle.set_log(None)
    }

    fn log_quality(&self) -> Option<LogQuality> {
        self.kind.log_quality().ok().filter(|_| self.offered.contains(VHOST_F_LOG_ALL))
    }

    fn has_state(&self) -> bool {
        false
    }

    fn log(&self) -> Option<&Arc<Log>> {
        self.log.as_ref()
    }

    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        self.kind.config(&self.handle, offset, buf)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.kind.set_config(&self.handle, offset, bytes)
    }

    fn status(&mut self) -> Result<Option<u8>, FrontendError> {
        self.kind.status(&self.handle)
    }

    /// Does nothing: starting and stopping the rings changes the status of a device that has one.
    fn set_status(&mut self, _: u8) -> Result<(), FrontendError> {
        Ok(())
    }

    fn hang_up_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        Ok(None)
    }

    fn take_events(&mut self) -> Vec<DeviceEvent> {
        let has_changed = self.kind.config_changes().is_some_and(|changes| nonblocking::take(changes).is_ok());
        has_changed.then_some(DeviceEvent::ConfigChanged).into_iter().collect()
    }

    fn events_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        let copy = |changes: BorrowedFd<'_>| changes.try_clone_to_owned();
        self.kind.config_changes().map(copy).transpose().map_err(FrontendError::system("keep an eventfd"))
    }

    fn needs_reconnect(&self) -> bool {
        false
    }

    fn reconnect(&mut self, _: Instant) -> Result<Reconnection, FrontendError> {
        Ok(Reconnection::default())
    }
}
