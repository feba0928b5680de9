//! Control of the rings of a VDUSE device: performs what the kernel's messages require, and answers them (rules V1, V4).

#![forbid(unsafe_code)]

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam::channel::Receiver;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::{debug, error, info, warn};
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::features::feature_names;
use crate::abi::vduse::{DevRequest, VqInfo, VqStatePacked};
use crate::abi::virtio::{
    MAX_QUEUE_SIZE, PackedDesc, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED,
    VirtioFeatures,
};
use crate::backend::rings::Workers;
use crate::backend::session::{DirectFrontend, Kick, Logging, Notifier, VringConfig, VringController};
use crate::backend::{BackendError, FrontendHandle, VirtioDevice};
use crate::inflight::InflightRegion;
use crate::memory::{GuestAddress, Iotlb, Iova, Memory};
use crate::ring::{RingBase, RingLayout};
use crate::sys::with_causes::with_causes;
use crate::vduse::VduseError;
use crate::vduse::bus::requests_in_flight;
use crate::vduse::files::DeviceFile;
use crate::vduse::kernel::Kernel;
use crate::vduse::left_behind::idle_base;
use crate::vduse::log::VduseLog;
use crate::vduse::messages::{Message, Task, title};
use crate::vduse::state::{Action, DeviceState, Outcome, from_state};

/// Offset of the used index in the device area of a split ring, bytes.
const USED_INDEX: u64 = 2;

/// The reason for which an action failed.
#[derive(Debug, thiserror::Error)]
enum RingFault {
    #[error("the driver acknowledges features that were not offered: {}", feature_names(*.0, None))]
    Features(VirtioFeatures),
    #[error("the driver and the log differ in the features {}", feature_names(*.0, None))]
    OtherDriver(VirtioFeatures),
    #[error("ring {index} can't have {size} entries")]
    Size { index: u16, size: u32 },
    #[error("written data may not be on stable storage")]
    Storage(#[source] io::Error),
    #[error(transparent)]
    Ring(#[from] BackendError),
    #[error(transparent)]
    System(#[from] io::Error),
}

/// The rings of one VDUSE device.
pub(super) struct Rings {
    pub(super) name: String,
    pub(super) device: Arc<dyn VirtioDevice>,
    pub(super) file: Arc<DeviceFile>,
    pub(super) kernel: Arc<Kernel>,
    pub(super) offered: VirtioFeatures,
    state: DeviceState,
    /// The features of the driver, once its rings have been started.
    features: VirtioFeatures,
    frontend: Arc<FrontendHandle>,
    workers: Workers,
    rings: Vec<KernelRing>,
    log: Option<VduseLog>,
    /// The inflight region in the log, for rings of the driver's kind.
    inflight: Option<Arc<InflightRegion>>,
}

/// A ring as the kernel has set it up.
#[derive(Default)]
struct KernelRing {
    running: bool,
    has_run: bool,
    /// The translations of the ring.
    iotlb: Arc<Iotlb>,
    /// The state that the kernel gave when the ring was started, and the base when it was stopped. The kernel itself keeps
    /// no base (rule V4.1).
    stopped_at: Option<(VqStatePacked, RingBase)>,
    given: Option<VqStatePacked>,
    has_notified: Arc<AtomicBool>,
}

impl Rings {
    /// Creates the control of a device with `queues` rings, which are stopped.
    pub(super) fn new(
        name: &str,
        device: Arc<dyn VirtioDevice>,
        file: Arc<DeviceFile>,
        kernel: Arc<Kernel>,
        offered: VirtioFeatures,
        queues: u16,
    ) -> Rings {
        let frontend = Arc::new(FrontendHandle::of_direct(kernel.clone()));
        device.connected(frontend.clone());
        Rings {
            name: name.into(),
            workers: Workers::new(device.clone()),
            device,
            file,
            kernel,
            offered,
            state: DeviceState::new(queues),
            features: VirtioFeatures::empty(),
            frontend,
            rings: (0..queues).map(|_| KernelRing::default()).collect(),
            log: None,
            inflight: None,
        }
    }

    /// Records the state from now on in `log`, which describes the present one (rule V3.4).
    pub(super) fn set_log(&mut self, log: VduseLog) {
        self.log = Some(log);
    }

    /// Continues the device from its log (rule V3.5): starts the rings that were running.
    ///
    /// # Errors
    /// [`VduseError::Continue`]. The log and the device are as before.
    pub(super) fn resume(&mut self) -> Result<(), VduseError> {
        let name = self.name.clone();
        let resumed = self.resume_rings();
        resumed.map_err(|fault| VduseError::Continue { name, source: io::Error::other(fault) })?;
        // An image may have grown meanwhile.
        if self.log.as_ref().is_some_and(|log| log.record().config != self.device.config()) {
            self.change_config();
        }
        Ok(())
    }

    fn resume_rings(&mut self) -> Result<(), RingFault> {
        let Some(record) = self.log.as_ref().map(|log| log.record().clone()) else { return Ok(()) };
        self.state = DeviceState::taken_over(self.queues(), record.status, record.suspended);
        for (index, base) in (0..).zip(&record.stopped_at) {
            if let (Some(ring), Some(base)) = (self.rings.get_mut(usize::from(index)), base) {
                (ring.has_run, ring.stopped_at) = (true, Some((self.file.ring(index)?.state, *base)));
            }
        }
        self.features = record.features;
        if record.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            self.clear_inflight();
        }
        if !self.state.runs() {
            return Ok(());
        }
        let driver = self.check_features()? | VIRTIO_F_ACCESS_PLATFORM;
        if driver != record.features {
            return Err(RingFault::OtherDriver(driver ^ record.features));
        }
        self.prepare_start()?;
        for index in (0..self.queues()).filter(|index| record.stopped_at.get(usize::from(*index)) == Some(&None)) {
            self.start_ring(index)?;
        }
        Ok(())
    }

    /// Records the state in the log. Without a log, it does nothing.
    fn save(&mut self, status: u8) {
        let Some(log) = &mut self.log else { return };
        let stopped_at = |ring: &KernelRing| ring.stopped_at.map(|(_, base)| base);
        let saved = log.save(|record| {
            (record.status, record.suspended) = (status, self.state.is_suspended());
            record.features = self.features;
            record.stopped_at = self.rings.iter().map(stopped_at).collect();
        });
        if let Err(error) = saved {
            self.give_up_log(&error);
        }
    }

    /// Removes the log, which is not valid any more.
    fn give_up_log(&mut self, error: &VduseError) {
        error!("{}: can't be continued after a crash from now on: {}", self.name, with_causes(error));
        if let Some(Err(error)) = self.log.take().map(VduseLog::remove) {
            error!("{}: {}", self.name, with_causes(&error));
        }
    }

    /// Continues the rings of a process that has ended, which have no requests in flight. The kernel does not know where
    /// they are (rule V3.1), but the rings show it (rule V3.2).
    ///
    /// # Errors
    /// [`VduseError::LeftWithRequests`], or the rings cannot be read.
    pub(super) fn take_over(&mut self) -> Result<(), VduseError> {
        let name = self.name.clone();
        let failed =
            |fault: RingFault| VduseError::system(&name, "take over the rings of the device")(io::Error::other(fault));
        self.state = DeviceState::taken_over(self.queues(), VIRTIO_CONFIG_S_DRIVER_OK, false);
        let features = self.file.features().map_err(|error| failed(error.into()))?;
        for index in 0..self.queues() {
            self.find_base(index, features.contains(VIRTIO_F_RING_PACKED)).map_err(failed)?;
        }
        // Requests from now on are after the bases.
        let requests = requests_in_flight(&name);
        if requests > 0 {
            return Err(VduseError::LeftWithRequests { name, requests });
        }
        self.start_rings().map_err(failed)
    }

    /// Finds the base of a ring without requests in flight.
    fn find_base(&mut self, index: u16, packed: bool) -> Result<(), RingFault> {
        let info = self.file.ring(index)?;
        let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|_| info.ready != 0) else { return Ok(()) };
        let read = |iova: u64, bytes: &mut [u8]| {
            let memory = self.kernel.translate(Iova(iova), &Iotlb::default())?;
            memory.read(GuestAddress(iova), bytes)
        };
        let base = if packed {
            let mut descs = vec![PackedDesc::new_zeroed(); info.num.min(MAX_QUEUE_SIZE) as usize];
            read(info.desc_addr, descs.as_mut_bytes()).map_err(BackendError::from)?;
            idle_base(&descs)
        } else {
            let mut used = [0; 2];
            read(info.device_addr.saturating_add(USED_INDEX), &mut used).map_err(BackendError::from)?;
            RingBase::split(u16::from_le_bytes(used))
        };
        (ring.has_run, ring.stopped_at) = (true, Some((info.state, base)));
        Ok(())
    }

    /// Performs tasks until it is stopped; then drains and stops the rings. Returns the log.
    pub(super) fn run(mut self, tasks: &Receiver<Task>) -> Option<VduseLog> {
        for task in tasks {
            match task {
                Task::Message(message) => {
                    self.answer(&message);
                    message.set_done();
                }
                Task::ConfigChanged => self.change_config(),
                Task::Stop => break,
            }
        }
        if let Err(error) = self.stop_all() {
            error!("{}: {}", self.name, with_causes(&error));
        }
        self.log
    }

    fn change_config(&mut self) {
        let config = self.device.config();
        if let Err(error) = self.file.set_config(&config) {
            warn!("{}: the change of the configuration is not reported: {error}", self.name);
        }
        let saved = self.log.as_mut().map_or(Ok(()), |log| log.save(|record| record.config = config));
        if let Err(error) = saved {
            self.give_up_log(&error);
        }
    }

    fn answer(&mut self, message: &Message) {
        if message.is_claimed() {
            return;
        }
        let (name, request, before) = (&self.name, &message.request, self.state.clone());
        let outcome = match self.state.begin(request) {
            Err(error) => {
                error!("{name}: {} is refused: {}", title(request.kind), with_causes(&error));
                Outcome::Failed
            }
            Ok(action) => {
                debug!("{name}: {}, {action:x?}", title(request.kind));
                self.perform(&action, request)
            }
        };
        let response = self.state.finish(request, outcome);
        self.save(self.state.status());
        if self.state.status() == 0 && before.status() != 0 {
            self.clear_inflight();
        }
        if message.claim() {
            if let Err(error) = self.file.write(&response) {
                error!("{}: {} is not answered: {error}", self.name, title(request.kind));
            }
        } else if self.state.runs() && !before.runs() {
            // For the kernel, the start has failed.
            self.state = before;
            self.stop_rings();
            self.save(self.state.status());
        }
    }

    /// Clears the inflight region for the next driver. The log says already that no ring runs (rule V3.6).
    fn clear_inflight(&mut self) {
        self.inflight = None;
        let cleared = self.log.as_ref().map_or(Ok(()), VduseLog::clear_region);
        if let Err(error) = cleared {
            self.give_up_log(&error);
        }
    }

    /// Performs an action. An error is logged.
    fn perform(&mut self, action: &Action, request: &DevRequest) -> Outcome {
        let performed = match action {
            Action::None => Ok(Outcome::Done),
            Action::CheckFeatures => self.check_features().map(|_| Outcome::Done),
            Action::StartRings => self.start_rings().map(|()| Outcome::Done),
            Action::StartRing(index) => self.start_ring(*index).map(|()| Outcome::Done),
            Action::StopRings => {
                self.stop_rings();
                Ok(Outcome::Done)
            }
            Action::StopRing(index) => self.stop_ring(*index).map(|()| Outcome::Done),
            Action::Reset => self.reset().map(|()| Outcome::Done),
            Action::RingBase(index) => self.base(*index).map(|base| Outcome::Base(base, self.features)),
            Action::Invalidate(iovas) => {
                self.invalidate(iovas);
                Ok(Outcome::Done)
            }
        };
        performed.unwrap_or_else(|error| {
            error!("{}: {} is refused: {}", self.name, title(request.kind), with_causes(&error));
            Outcome::Failed
        })
    }

    /// Returns the features of the driver.
    fn check_features(&self) -> Result<VirtioFeatures, RingFault> {
        let features = self.file.features()?;
        let unknown = features & !self.offered;
        if unknown.is_empty() { Ok(features) } else { Err(RingFault::Features(unknown)) }
    }

    /// Reads the features of the driver, records the start in the log, and maps the inflight region.
    fn prepare_start(&mut self) -> Result<(), RingFault> {
        // Addresses are I/O virtual whether the driver has acknowledged it or not (rule V2.1).
        self.features = self.check_features()? | VIRTIO_F_ACCESS_PLATFORM;
        // Before a request is served: a successor must not take the rings for ones that were not started (rule V3.4).
        self.save(self.state.status() | VIRTIO_CONFIG_S_DRIVER_OK);
        let region = self.log.as_ref().map(VduseLog::region).transpose().map_err(BackendError::from)?;
        self.inflight = region.map(Arc::new);
        Ok(())
    }

    fn start_rings(&mut self) -> Result<(), RingFault> {
        self.prepare_start()?;
        info!("{}: a driver has started, with {}", self.name, feature_names(self.features, self.device.device_id()));
        let started = (0..self.queues()).try_for_each(|index| self.start_ring(index));
        if started.is_err() {
            self.stop_rings();
        }
        started
    }

    fn queues(&self) -> u16 {
        self.rings.len() as u16
    }

    /// Starts a ring, if it is enabled and stopped.
    fn start_ring(&mut self, index: u16) -> Result<(), RingFault> {
        let info = self.file.ring(index)?;
        let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| info.ready != 0 && !ring.running) else {
            return Ok(());
        };
        let features = self.features;
        let layout = layout(index, &info, features, self.device.max_queue_size())?;
        let base = match ring.stopped_at {
            // It goes on, as the driver has not set another base.
            Some((given, base)) if given == info.state => base,
            _ => from_state(info.state, features),
        };
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(io::Error::from)?;
        self.file.set_kick(index, eventfd.as_fd())?;
        let eventfd = eventfd.as_fd().try_clone_to_owned()?;
        ring.iotlb = Arc::default();
        let config = VringConfig {
            layout,
            base,
            features,
            memory: Memory::default(),
            logging: Logging::default(),
            kick: Some(Arc::new(Kick::new(index, eventfd)?)),
            is_polled: false,
            call: Some(Arc::new(Notifier::call(self.frontend.clone(), index))),
            call_changed: false,
            has_notified: ring.has_notified.clone(),
            error: None,
            inflight: self.inflight.clone(),
            is_first_start: !ring.has_run,
            in_postcopy: false,
            frontend: self.frontend.clone(),
            iotlb: Some(ring.iotlb.clone()),
        };
        self.workers.start(index, config)?;
        (ring.running, ring.has_run, ring.given, ring.stopped_at) = (true, true, Some(info.state), None);
        debug!("{}: ring {index} runs from {base:?}, {} entries", self.name, info.num);
        Ok(())
    }

    /// Drains and stops a ring, and keeps its base.
    fn stop_ring(&mut self, index: u16) -> Result<(), RingFault> {
        let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| ring.running) else { return Ok(()) };
        ring.running = false;
        let base = self.workers.stop(index)?;
        ring.stopped_at = ring.given.map(|given| (given, base));
        Ok(())
    }

    /// Drains and stops all rings, and keeps their bases.
    fn stop_rings(&mut self) {
        for index in 0..self.queues() {
            if let Err(error) = self.stop_ring(index) {
                error!("{}: {}", self.name, with_causes(&error));
            }
        }
    }

    /// Drains and stops all rings at the same time, and puts what the driver has written on stable storage.
    fn stop_all(&mut self) -> Result<(), RingFault> {
        let has_run = self.rings.iter().any(|ring| ring.running);
        self.workers.stop_all();
        self.rings.iter_mut().for_each(|ring| ring.running = false);
        if has_run { self.device.rings_stopped().map_err(RingFault::Storage) } else { Ok(()) }
    }

    fn reset(&mut self) -> Result<(), RingFault> {
        let stopped = self.stop_all();
        self.kernel.forget(&(Iova(0)..=Iova(u64::MAX)));
        for ring in &mut self.rings {
            *ring = KernelRing { has_run: ring.has_run, ..KernelRing::default() };
        }
        if !self.features.is_empty() {
            info!("{}: the driver has reset the device", self.name);
        }
        self.features = VirtioFeatures::empty();
        self.device.reset();
        stopped
    }

    /// Stops a ring and returns its base. The ring stays stopped: with another request, the base would be wrong (rule V4.2).
    fn base(&mut self, index: u16) -> Result<RingBase, RingFault> {
        self.stop_ring(index)?;
        let stopped_at = self.rings.get(usize::from(index)).and_then(|ring| ring.stopped_at);
        match stopped_at {
            Some((_, base)) => Ok(base),
            None => Ok(from_state(self.file.ring(index)?.state, self.file.features()?)),
        }
    }

    /// Drops mappings, once no request uses them (rule V1.5).
    fn invalidate(&mut self, iovas: &RangeInclusive<Iova>) {
        let iovas = self.kernel.forget(iovas);
        self.rings.iter().for_each(|ring| ring.iotlb.invalidate(&iovas));
        self.workers.invalidate(&iovas);
    }
}

/// Returns the layout of a ring.
fn layout(index: u16, info: &VqInfo, features: VirtioFeatures, max: u16) -> Result<RingLayout, RingFault> {
    let packed = features.contains(VIRTIO_F_RING_PACKED);
    let fits = |size: &u16| (1..=max).contains(size) && (packed || size.is_power_of_two());
    let size = u16::try_from(info.num).ok().filter(fits).ok_or(RingFault::Size { index, size: info.num })?;
    let areas = [info.desc_addr, info.driver_addr, info.device_addr];
    Ok(RingLayout::new(features, size, areas.map(GuestAddress)))
}
