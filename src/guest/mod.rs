//! The built-in guest: memory, CPUs that dirty it, disks with drivers, and a check of every byte of both.
//!
//! This module defines the guest's work and knowledge, and how it is stopped, saved and restored. Its purpose is to
//! detect data that a migration or a back-end loses: contents describe themselves ([`GuestError::WrongByte`] reports
//! the location), and its clock measures its downtime. Not here: access to devices
//! ([`crate::frontend`]). `migration` makes the guest the source and the destination of a migration.
//!
//! ```text
//! new → boot ──────────────→ resume ⇄ pause → stop_devices → save_state
//! restore(memory) → attach → start_devices → resume
//! ```
//!
//! # Example
//!
//! Run a guest without disks, and verify its memory:
//!
//! ```
//! use vhost_migrate::guest::{Guest, GuestConfig};
//!
//! let mut config = GuestConfig::new(16 << 20);
//! config.disks = 0;
//! let mut guest = Guest::new(config)?;
//! guest.boot(Vec::new())?;
//! guest.resume()?;
//! std::thread::sleep(std::time::Duration::from_millis(20));
//! guest.pause()?;
//! let verified = guest.verify()?;
//! assert!(verified.memory > 15 << 20, "all but the guest's own tables");
//! # Ok::<(), vhost_migrate::guest::GuestError>(())
//! ```
#![forbid(unsafe_code)]

mod cpu;
mod disk;
mod disk_generations;
mod driver;
mod error;
mod layout;
#[cfg(feature = "migrate")]
pub(crate) mod migration;
#[cfg(feature = "migrate")]
mod owner;
mod pattern;
mod prepared;
mod signal;
pub(crate) mod state;
mod threads;
mod view;

pub use error::{ByteLocation, GuestError, WrongByte};
pub use layout::GuestConfig;
#[cfg(feature = "migrate")]
pub use migration::{GuestIncomingVm, GuestSourceVm, InterruptOnCancel, connect_backends, dirty_sources};
#[cfg(feature = "migrate")]
pub use owner::{GuestOwner, GuestStatus, MeasuredRate, Operation, OwnerError, OwnerState, OwnerStatus};
pub use prepared::PreparedDevice;
pub use state::GuestState;
use state::{DeviceSetup, DeviceState, DiskGenerations, DiskIdentities, STATE_VERSION, SavedGuest, Timestamp};
pub use view::{DeviceConnection, GuestStats, GuestView};

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use crate::abi::virtio::SECTOR_BYTES;
use crate::frontend::{Device, DeviceDirtySource, FrontendError, Interrupt};
use crate::memory::{ExtentFinder, GuestAddress, LOG_PAGE, Memory, PageNumber, Region, sealed_memfd};
use crate::ring::RingBase;
use cpu::Cpu;
use disk::{Disk, Reconnector};
use driver::{DiskGeometry, Driver, DriverCounters, PriorContents};
use layout::GuestLayout;
use pattern::Pattern;
use prepared::{check_device_count, disk_geometry};
use signal::GuestFailure;
use threads::{GuestThreads, NotStarted};

/// Maximum of time limits in seconds; larger values could overflow clocks.
const MAX_SECONDS: u64 = 1 << 30;
/// A built-in guest.
pub struct Guest {
    config: GuestConfig,
    layout: GuestLayout,
    memory: Memory,
    pattern: Pattern,
    failure: Arc<GuestFailure>,
    execution: Execution,
    /// In order of the disks.
    disks: Vec<AttachedDisk>,
    /// Saved states of the devices of a restored guest, in order of the disks.
    expected: Vec<DeviceState>,
    steps: Vec<Arc<AtomicU64>>,
    counters: Vec<Arc<DriverCounters>>,
    last_action: Option<Timestamp>,
    downtime_ns: Option<u64>,
}

/// CPUs and drivers, paused or running.
enum Execution {
    Paused(Vec<Cpu>, Vec<Driver>),
    Running(GuestThreads),
    /// A thread has panicked or could not be started.
    Broken,
}

/// A disk of this guest.
struct AttachedDisk {
    /// Ends before the device is dropped.
    _reconnector: Reconnector,
    disk: Arc<Disk>,
    geometry: DiskGeometry,
}

impl AttachedDisk {
    /// Returns the part of the state that is known while the device runs.
    fn state(&self) -> DeviceState {
        DeviceState {
            features: self.geometry.features,
            capacity: self.disk.capacity.load(Ordering::Relaxed),
            segments: self.geometry.segments,
            block_size: (self.geometry.block * SECTOR_BYTES) as u32,
            reconnects: self.disk.reconnects.load(Ordering::Relaxed),
            resubmitted: self.disk.resubmitted.load(Ordering::Relaxed),
            ..DeviceState::default()
        }
    }
}

/// Result of [`Guest::verify`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Verified {
    /// Bytes of memory checked.
    pub memory: u64,
    /// Bytes of disk checked.
    pub disk: u64,
}

/// Creates zeroed, shareable guest memory with these regions (guest-physical address and size of each, bytes). With
/// `prefault` all of it is allocated now.
///
/// # Errors
/// Errors of the system, and overlapping regions.
pub fn make_memory(
    regions: impl IntoIterator<Item = (GuestAddress, u64)>,
    prefault: bool,
) -> Result<Memory, GuestError> {
    let make = |(gpa, size)| {
        let fd = sealed_memfd("guest-memory", size).map_err(GuestError::system("make guest memory"))?;
        if prefault {
            let allocated = fallocate(&fd, FallocateFlags::empty(), 0, size as i64);
            allocated.map_err(GuestError::system("allocate guest memory"))?;
        }
        Ok(Arc::new(Region::share(fd, gpa, size, 0)?))
    };
    Ok(Memory::new(regions.into_iter().map(make).collect::<Result<Vec<_>, GuestError>>()?)?)
}

impl Guest {
    /// Creates a guest with new memory. Its CPUs have written all their pages once.
    ///
    /// # Errors
    /// An impossible configuration, or a lack of memory.
    pub fn new(config: GuestConfig) -> Result<Guest, GuestError> {
        let layout = GuestLayout::new(&config)?;
        let memory = make_memory(config.regions(), config.prefault)?;
        let guest = Guest::build(config, layout, memory)?;
        let Execution::Paused(cpus, _) = &guest.execution else { return Err(guest.wrong_state()) };
        in_parallel(cpus, Cpu::boot)?;
        cpu::fill(&guest.memory, &guest.pattern, &guest.layout.cold)?;
        Ok(guest)
    }

    /// Creates a guest from memory with all contents and a saved state. Its devices are added with
    /// [`attach`](Guest::attach).
    ///
    /// # Errors
    /// A state of another version, or one that is inconsistent or does not fit the memory.
    pub fn restore(memory: Memory, state: GuestState) -> Result<Guest, GuestError> {
        let bad = |what: &str| Err(GuestError::State(what.into()));
        if state.version != STATE_VERSION {
            return bad("it was saved by another version of this program");
        }
        let GuestState { config, cpus, drivers, devices, last_action, .. } = state;
        let config = GuestConfig::from(config);
        let regions = memory.regions().iter().map(|region| (region.gpa(), region.size()));
        if !regions.eq(config.regions()) {
            let here: Vec<_> = memory.regions().iter().map(|region| (region.gpa(), region.size())).collect();
            return bad(&format!(
                "memory differs: {} here, {} in the state",
                describe_regions(&here),
                describe_regions(&config.regions())
            ));
        }
        let layout = GuestLayout::new(&config)?;
        if cpus.len() != config.cpus || drivers.len() != layout.queues.len() || devices.len() != config.disks {
            let (queues, disks) = (layout.queues.len(), config.disks);
            return bad(&format!(
                "it has {} CPUs of {}, {} queues of {queues} and {} disks of {disks}",
                cpus.len(),
                config.cpus,
                drivers.len(),
                devices.len()
            ));
        }
        let mut guest = Guest::build(config, layout, memory)?;
        let Execution::Paused(fresh, _) = std::mem::replace(&mut guest.execution, Execution::Broken) else {
            return Err(guest.wrong_state());
        };
        let cpus = fresh.into_iter().zip(cpus).map(|(cpu, state)| cpu.restore(state)).collect();
        let queues = guest.layout.queues.iter().cloned().zip(drivers).enumerate().map(|(queue, (layout, state))| {
            let device = devices.get(queue / usize::from(guest.config.queues));
            let disk = device.map_or_else(|| Err(GuestError::State("a disk is missing".into())), disk_geometry)?;
            Driver::restore(queue, &guest.memory, layout, &guest.config, guest.pattern, disk, state)
        });
        let drivers: Vec<Driver> = queues.collect::<Result<_, _>>()?;
        guest.counters = drivers.iter().map(|driver| driver.counters().clone()).collect();
        guest.execution = Execution::Paused(cpus, drivers);
        (guest.expected, guest.last_action) = (devices, last_action);
        Ok(guest)
    }

    /// Attaches disks to a new guest and starts them.
    ///
    /// # Errors
    /// Disks that are unusable or not reachable.
    pub fn boot(&mut self, devices: Vec<Box<dyn Device>>) -> Result<(), GuestError> {
        let per_disk = usize::from(self.config.queues);
        if !self.expected.is_empty() {
            return Err(GuestError::WrongState { is: "restored", advice: "attach its disks, don't boot it" });
        }
        let setup = DeviceSetup { version: STATE_VERSION, config: self.config.clone().into(), devices: Vec::new() };
        self.attach_disks(PreparedDevice::all(&setup, &self.memory, devices)?, &[])?;
        let Execution::Paused(_, drivers) = &mut self.execution else { return Err(self.wrong_state()) };
        drivers.clear();
        for (number, attached) in self.disks.iter().enumerate() {
            let queues = self.layout.queues.iter().cloned().enumerate().skip(number * per_disk).take(per_disk);
            for (queue, layout) in queues {
                let (config, pattern) = (&self.config, self.pattern);
                drivers.push(Driver::new(queue, &self.memory, layout, config, pattern, attached.geometry)?);
            }
        }
        self.counters = drivers.iter().map(|driver| driver.counters().clone()).collect();
        self.start_devices()
    }

    /// Reads the parts of its disks that a new guest will use, before it runs. Contents written by an earlier guest
    /// with this seed are accepted; they are checked once they have been written again.
    ///
    /// # Errors
    /// [`GuestError::ForeignContents`] for other contents than blank sectors and those of such a guest, unless
    /// `overwrite`; and errors of reading.
    pub fn probe_disks(&mut self, overwrite: bool) -> Result<(), GuestError> {
        let Execution::Paused(_, drivers) = &mut self.execution else { return Err(self.wrong_state()) };
        drivers.iter_mut().for_each(Driver::begin_probe);
        self.scan_disks()?;
        let Execution::Paused(_, drivers) = &mut self.execution else { return Err(self.wrong_state()) };
        let per_disk = usize::from(self.config.queues);
        let names = self.disks.iter().flat_map(|attached| (0..per_disk).map(|_| &attached.disk.name));
        let surveys: Vec<PriorContents> = drivers.iter_mut().map(Driver::end_probe).collect();
        let mut blank = true;
        for (PriorContents { own, foreign }, name) in surveys.into_iter().zip(names) {
            if let Some(sector) = foreign.filter(|_| !overwrite) {
                return Err(GuestError::ForeignContents { name: name.clone(), sector });
            }
            blank &= !own && foreign.is_none();
        }
        self.config.blank_disks &= blank;
        drivers.iter_mut().for_each(|driver| driver.set_blank(self.config.blank_disks));
        Ok(())
    }

    /// Attaches disks to a restored guest, prepared as the saved ones, without starting them.
    ///
    /// # Errors
    /// Disks that differ from the saved ones, or are not reachable.
    pub fn attach(&mut self, devices: Vec<Box<dyn Device>>) -> Result<(), GuestError> {
        self.attach_prepared(PreparedDevice::all(&self.expected_setup(), &self.memory, devices)?)
    }

    /// Attaches prepared disks to a restored guest.
    ///
    /// # Errors
    /// As [`attach`](Guest::attach).
    pub fn attach_prepared(&mut self, devices: Vec<PreparedDevice>) -> Result<(), GuestError> {
        if self.expected.len() != self.config.disks {
            return Err(GuestError::WrongState {
                is: "new",
                advice: "boot it, only a restored one is attached to disks",
            });
        }
        let expected = std::mem::take(&mut self.expected);
        let plugged = self.attach_disks(devices, &expected);
        self.expected = expected;
        plugged
    }

    /// Describes the devices, so that others can be prepared in their place.
    pub fn device_setup(&self) -> DeviceSetup {
        let devices = self.disks.iter().map(AttachedDisk::state).collect();
        DeviceSetup { version: STATE_VERSION, config: self.config.clone().into(), devices }
    }

    /// Describes the saved devices of a restored guest.
    pub fn expected_setup(&self) -> DeviceSetup {
        DeviceSetup { version: STATE_VERSION, config: self.config.clone().into(), devices: self.expected.clone() }
    }

    /// Returns the saved devices of a restored guest.
    pub fn expected_devices(&self) -> &[DeviceState] {
        &self.expected
    }

    /// Runs CPUs and drivers. Returns when each of them has acted.
    ///
    /// # Errors
    /// If the guest is not paused, or has failed.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        self.check_failure()?;
        let per_disk = usize::from(self.config.queues);
        let (cpus, drivers) = match std::mem::replace(&mut self.execution, Execution::Broken) {
            Execution::Paused(cpus, drivers) => (cpus, drivers),
            other => {
                self.execution = other;
                return Err(self.wrong_state());
            }
        };
        let queues = self.disks.iter().flat_map(|attached| (0..per_disk).map(|queue| (attached.disk.clone(), queue)));
        let queues = queues.take(drivers.len()).collect();
        let (threads, first) = match GuestThreads::start(cpus, drivers, queues, &self.config, &self.failure) {
            Ok(started) => started,
            Err(not) => {
                let NotStarted { error, cpus, drivers } = *not;
                self.execution = Execution::Paused(cpus, drivers);
                return Err(error);
            }
        };
        self.execution = Execution::Running(threads);
        let first = first.map(threads::timestamp);
        self.downtime_ns = self.last_action.take().zip(first).map(|(last, first)| last.nanos_until(&first));
        self.check_failure()
    }

    /// Starts everything that is stopped: devices first, which are waited for, then CPUs and drivers. Does nothing to a
    /// running guest.
    ///
    /// # Errors
    /// If something cannot be started, or the guest has failed. It can be called again.
    pub fn start(&mut self) -> Result<(), GuestError> {
        if self.is_running() {
            return self.check_failure();
        }
        self.start_devices()?;
        self.resume()
    }

    /// Stops CPUs and drivers between two of their actions. Requests stay outstanding, and devices continue with them.
    ///
    /// # Errors
    /// If the guest does not run, or has failed.
    pub fn pause(&mut self) -> Result<(), GuestError> {
        match std::mem::replace(&mut self.execution, Execution::Broken) {
            Execution::Running(threads) => {
                let (cpus, drivers, last) = threads.stop()?;
                self.execution = Execution::Paused(cpus, drivers);
                self.last_action = Some(threads::timestamp(last));
                self.check_failure()
            }
            other => {
                self.execution = other;
                Err(self.wrong_state())
            }
        }
    }

    /// Stops all rings of a paused guest. No device writes to its memory afterwards (rules R3.1, I8.1). Unavailable
    /// back-ends are not waited for.
    ///
    /// # Errors
    /// If the guest runs, or a device cannot be stopped; [`resume_without_waiting`](Guest::resume_without_waiting)
    /// undoes it.
    pub fn stop_devices(&mut self) -> Result<(), GuestError> {
        if matches!(self.execution, Execution::Running(_)) {
            return Err(self.wrong_state());
        }
        let suspend = self.config.inflight_migration;
        let stopped = self.call_all(&|disk, device, sent| disk.stop_rings(device, suspend, sent))?;
        Ok(stopped.into_iter().collect::<Result<_, _>>()?)
    }

    /// Starts all stopped rings.
    ///
    /// # Errors
    /// If a device cannot be started. It can be called again.
    pub fn start_devices(&mut self) -> Result<(), GuestError> {
        self.call_all_with_retry(&|disk, device, sent| disk.start_rings(device, sent))
    }

    /// Undoes [`pause`](Guest::pause) and [`stop_devices`](Guest::stop_devices), also if they failed halfway, without
    /// waiting for devices: stopped rings are started as soon as their back-end replies, and retried if it refuses
    /// them.
    ///
    /// # Errors
    /// If the guest has failed or is broken.
    pub fn resume_without_waiting(&mut self) -> Result<(), GuestError> {
        let resumed = if self.is_running() { Ok(()) } else { self.resume() };
        self.request_device_start();
        resumed
    }

    /// Undoes [`stop_devices`](Guest::stop_devices) without waiting, and leaves CPUs and drivers as they are.
    pub fn request_device_start(&mut self) {
        self.disks.iter().for_each(|attached| attached.disk.request_start());
    }

    /// Sends devices everything that precedes the start of a stopped ring, to detect a refusal early.
    ///
    /// # Errors
    /// The refusal of a device.
    pub fn try_devices(&self) -> Result<(), GuestError> {
        self.call_all_with_retry(&|disk, device, sent| device.validate_rings(&disk.stopped_rings(), sent))
    }

    /// Returns the state of a paused guest with stopped devices, without its memory and disks.
    ///
    /// # Errors
    /// If the guest is not paused, or a device is not stopped.
    pub fn save_state(&self) -> Result<GuestState, GuestError> {
        let Execution::Paused(cpus, drivers) = &self.execution else { return Err(self.wrong_state()) };
        let save = |attached: &AttachedDisk| {
            let running = GuestError::WrongState { is: "using its devices", advice: "stop them first" };
            let own = attached.disk.try_with(|device| device.save_state())?;
            let inflight = attached.disk.try_with(|device| device.inflight_state())?;
            let bases = attached.disk.stopped_bases().into_iter().collect::<Option<_>>().ok_or(running)?;
            Ok(DeviceState { bases, inflight, backend_state: own, ..attached.state() })
        };
        let mut waits = false;
        for attached in &self.disks {
            waits |= attached.disk.try_with(|device| Ok(device.has_state()))?;
        }
        Ok(GuestState {
            version: STATE_VERSION,
            config: self.config.clone().into(),
            cpus: cpus.iter().map(Cpu::state).collect(),
            drivers: drivers.iter().map(Driver::state).collect(),
            devices: in_parallel_if(waits, &self.disks, save)?,
            last_action: self.last_action.clone(),
        })
    }

    /// Checks every byte of memory and of the used parts of the disks. A running guest is paused meanwhile; its devices
    /// must be started. The [`interrupts`](Guest::interrupts) end the check.
    ///
    /// # Errors
    /// The guest's [`failure`](Guest::failure): [`GuestError::WrongByte`] for the first wrong byte, after which the
    /// guest never runs again. Other errors prevent the check; the guest then continues.
    pub fn verify(&mut self) -> Result<Verified, GuestError> {
        self.check_failure()?;
        let was_running = matches!(self.execution, Execution::Running(_));
        if was_running {
            self.pause()?;
        }
        let verified = self.verify_paused().or_else(|error| {
            if error.is_failure() {
                self.failure.report(error);
                return self.check_failure().map(|()| Verified::default());
            }
            Err(error)
        });
        if was_running && self.failure().is_none() {
            self.resume()?;
        }
        verified
    }

    /// Returns a view of the guest that never waits, also while the guest waits for a device.
    pub fn view(&self) -> GuestView {
        GuestView {
            steps: self.steps.clone(),
            counters: self.counters.clone(),
            disks: self.disks.iter().map(|attached| Arc::downgrade(&attached.disk)).collect(),
            failure: self.failure.clone(),
            memory_bytes: self.memory.size(),
        }
    }

    /// Returns the guest's counters.
    pub fn stats(&self) -> GuestStats {
        self.view().stats()
    }

    /// Returns the state of the devices' connections, in order of the disks.
    pub fn connections(&self) -> Vec<DeviceConnection> {
        self.view().connections()
    }

    /// Returns the error that has stopped the guest, if there is one. It never runs again then.
    pub fn failure(&self) -> Option<Arc<GuestError>> {
        self.failure.error().cloned()
    }

    /// Returns the time between the guest's last action before the last pause, here or at its source, and its first
    /// action afterwards, nanoseconds.
    pub fn downtime_ns(&self) -> Option<u64> {
        self.downtime_ns
    }

    /// Returns the guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Returns the guest's configuration.
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// Returns a dirty source for each device. It survives a restart of the back-end.
    pub fn logs(&self) -> impl Iterator<Item = DeviceDirtySource> {
        let log = |attached: &AttachedDisk| {
            DeviceDirtySource::new(attached.disk.clone(), attached.disk.name.clone(), self.memory.end())
        };
        self.disks.iter().map(log)
    }

    /// Returns the interrupts that end waits for the devices.
    pub fn interrupts(&self) -> Vec<Interrupt> {
        self.disks.iter().filter_map(|attached| attached.disk.interrupt().cloned()).collect()
    }

    /// Returns true if CPUs and drivers run.
    pub fn is_running(&self) -> bool {
        matches!(self.execution, Execution::Running(_))
    }

    /// Calls `f` for each device, and again after a reconnection if its back-end disconnects meanwhile.
    ///
    /// # Errors
    /// The first error of `f` that a reconnection does not resolve.
    pub fn with_devices(
        &self,
        mut f: impl FnMut(&mut dyn Device) -> Result<(), FrontendError>,
    ) -> Result<(), FrontendError> {
        self.disks.iter().try_for_each(|attached| attached.disk.retry_until_connected(&mut f))
    }

    fn build(config: GuestConfig, layout: GuestLayout, memory: Memory) -> Result<Guest, GuestError> {
        let pattern = Pattern { seed: config.seed, repeated: config.repeated };
        let cpu = |(number, area): (usize, &layout::Area)| Cpu::new(number, &memory, area.clone(), pattern);
        let cpus: Vec<Cpu> = layout.cpus.iter().enumerate().map(cpu).collect();
        Ok(Guest {
            steps: cpus.iter().map(|cpu| cpu.counter().clone()).collect(),
            config,
            layout,
            memory,
            pattern,
            failure: Arc::new(GuestFailure::new()?),
            execution: Execution::Paused(cpus, Vec::new()),
            disks: Vec::new(),
            expected: Vec::new(),
            counters: Vec::new(),
            last_action: None,
            downtime_ns: None,
        })
    }

    /// Calls `each` for all devices, concurrently. If all devices report when they wait, by calling the last argument
    /// of `each`, no threads are used: a device is called while the one before it waits. An unavailable device is an
    /// error.
    fn call_all(&self, each: &DeviceCall<'_>) -> Result<Vec<CallResult>, GuestError> {
        fn nest(disks: &[AttachedDisk], each: &DeviceCall<'_>, done: &mut Vec<CallResult>) {
            let Some((AttachedDisk { disk, .. }, rest)) = disks.split_first() else { return };
            let mut rest = Some(rest);
            let mut go_on = || rest.take().into_iter().for_each(|rest| nest(rest, each, done));
            let ended = disk.try_with(|device| each(disk, device, &mut go_on));
            go_on();
            done.push(ended);
        }
        let say = |AttachedDisk { disk, .. }: &AttachedDisk| {
            disk.try_with(|device| Ok(device.reports_sent())).unwrap_or(true)
        };
        if !self.disks.iter().all(say) {
            let alone =
                |AttachedDisk { disk, .. }: &AttachedDisk| Ok(disk.try_with(|device| each(disk, device, &mut || {})));
            return in_parallel(&self.disks, alone);
        }
        let mut done = Vec::new();
        nest(&self.disks, each, &mut done);
        done.reverse();
        Ok(done)
    }

    /// Like [`call_all`](Guest::call_all), and repeats the call for devices that were unavailable when they are back.
    fn call_all_with_retry(&self, each: &DeviceCall<'_>) -> Result<(), GuestError> {
        let ended = self.call_all(each)?;
        let is_away = |ended: &CallResult| ended.as_ref().is_err_and(disk::is_away);
        let away = self.disks.iter().zip(&ended).filter(|(_, ended)| is_away(ended)).map(|(attached, _)| attached);
        in_parallel(away, |AttachedDisk { disk, .. }| {
            Ok(disk.retry_until_connected(|device| each(disk, device, &mut || {}))?)
        })?;
        ended.into_iter().filter(|ended| !is_away(ended)).collect::<Result<(), _>>()?;
        Ok(())
    }

    /// Attaches devices with all rings stopped, at the base of `expected` or the initial base.
    fn attach_disks(&mut self, devices: Vec<PreparedDevice>, expected: &[DeviceState]) -> Result<(), GuestError> {
        if !self.disks.is_empty() {
            return Err(GuestError::WrongState { is: "using its disks", advice: "it can't be given others" });
        }
        check_device_count(devices.len(), &self.config)?;
        let per_disk = usize::from(self.config.queues);
        let plug = |(number, mut prepared): (usize, PreparedDevice)| {
            let expected = expected.get(number);
            expected.map_or(Ok(()), |state| prepared.restore(&self.config, state))?;
            let geometry = expected.map_or_else(|| prepared.geometry(), disk_geometry)?;
            let stopped = match expected {
                Some(state) => state.bases.iter().copied().map(Some).collect(),
                None => vec![Some(RingBase::initial(self.config.ring_features())); per_disk],
            };
            let limit = self.config.reconnect_timeout.map(|s| Duration::from_secs(s.min(MAX_SECONDS)));
            let disk = Arc::new(Disk::new(prepared.device, prepared.doorbells, stopped, geometry.capacity, limit)?);
            if let Some(state) = expected {
                disk.reconnects.store(state.reconnects, Ordering::Relaxed);
                disk.resubmitted.store(state.resubmitted, Ordering::Relaxed);
            }
            let reconnector = Reconnector::start(disk.clone(), self.failure.clone())?;
            Ok(AttachedDisk { _reconnector: reconnector, disk, geometry })
        };
        let waits = expected.iter().any(|state| state.backend_state.is_some());
        self.disks = in_parallel_if(waits, devices.into_iter().enumerate(), plug)?;
        Ok(())
    }

    /// Reads the used parts of all disks. Returns the number of bytes.
    fn scan_disks(&mut self) -> Result<u64, GuestError> {
        let patience = Duration::from_secs(self.config.request_timeout);
        let Execution::Paused(_, drivers) = &mut self.execution else { return Err(self.wrong_state()) };
        self.disks.iter().try_for_each(|attached| attached.disk.wait_for_pending())?;
        if self.disks.iter().any(|attached| attached.disk.stopped_bases().iter().any(Option::is_some)) {
            return Err(GuestError::WrongState { is: "without its disks", advice: "start its devices first" });
        }
        let doorbells =
            self.disks.iter().flat_map(|attached| attached.disk.doorbells.iter().map(|queue| (&attached.disk, queue)));
        in_parallel(drivers.iter_mut().zip(doorbells), |(driver, (disk, doorbells))| {
            threads::scan_disk(driver, disk, doorbells, patience)
        })?;
        Ok(drivers.iter().map(|driver| driver.sectors() * SECTOR_BYTES).sum())
    }

    fn verify_paused(&mut self) -> Result<Verified, GuestError> {
        let Execution::Paused(cpus, _) = &self.execution else { return Err(self.wrong_state()) };
        in_parallel(cpus.iter(), Cpu::verify)?;
        let (memory, pattern) = (&self.memory, &self.pattern);
        for (area, blank) in [(&self.layout.cold, false), (&self.layout.zero, true)] {
            in_parallel(halves(area.pages()), |pages| {
                // A hole is zero; reading it would allocate it.
                let mut extents = ExtentFinder::new();
                pages.map(|page| area.page(page)).try_for_each(|gpa| {
                    let right = blank && extents.is_hole(memory, PageNumber::containing(gpa));
                    if right { Ok(()) } else { cpu::check(memory, pattern, gpa, 0, blank) }
                })
            })?;
        }
        let disk = self.scan_disks()?;
        let areas = self.layout.cpus.iter().chain([&self.layout.cold, &self.layout.zero]);
        Ok(Verified { memory: areas.map(|area| area.pages() * LOG_PAGE).sum(), disk })
    }

    fn check_failure(&self) -> Result<(), GuestError> {
        self.failure().map_or(Ok(()), |error| Err(error.into()))
    }

    /// Returns the error for a call in the wrong state.
    fn wrong_state(&self) -> GuestError {
        match self.execution {
            Execution::Running(_) => GuestError::WrongState { is: "running", advice: "pause it first" },
            Execution::Paused(..) => GuestError::WrongState { is: "paused", advice: "resume it first" },
            Execution::Broken => GuestError::WrongState { is: "broken", advice: "start another one" },
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Execution::Running(threads) = std::mem::replace(&mut self.execution, Execution::Broken) {
            let _ = threads.stop();
        }
    }
}

/// Formats regions by guest-physical address and size.
fn describe_regions(regions: &[(GuestAddress, u64)]) -> String {
    let regions: Vec<_> = regions.iter().map(|(gpa, size)| format!("{size:#x} bytes at {:#x}", gpa.0)).collect();
    regions.join(", ")
}

/// Calls `each` for every item concurrently. Returns the results in order of the items, or the first error in that
/// order.
pub(crate) fn in_parallel<I: Send, T: Send>(
    items: impl IntoIterator<Item = I>,
    each: impl Fn(I) -> Result<T, GuestError> + Sync,
) -> Result<Vec<T>, GuestError> {
    let mut items: Vec<I> = items.into_iter().collect();
    if items.len() <= 1 {
        return items.pop().map(each).into_iter().collect();
    }
    let panicked = |_| Err(GuestError::State("a thread of the guest has panicked".into()));
    std::thread::scope(|scope| {
        let each = &each;
        let start = |item| std::thread::Builder::new().spawn_scoped(scope, move || each(item));
        let started: Vec<_> = items.into_iter().map(start).collect();
        let end = |started: io::Result<ScopedJoinHandle<'_, _>>| match started {
            Ok(thread) => thread.join().unwrap_or_else(panicked),
            Err(source) => Err(GuestError::System { what: "start a thread", source }),
        };
        // All threads are joined, also after an error.
        let ended: Vec<_> = started.into_iter().map(end).collect();
        ended.into_iter().collect()
    })
}

/// Calls `each` for every item: concurrently if it may wait, else one by one, which is quicker.
fn in_parallel_if<I: Send, T: Send>(
    waits: bool,
    items: impl IntoIterator<Item = I>,
    each: impl Fn(I) -> Result<T, GuestError> + Sync,
) -> Result<Vec<T>, GuestError> {
    if waits { in_parallel(items, each) } else { items.into_iter().map(each).collect() }
}

/// A call for a device. It calls its last argument when it has nothing left to do but wait.
type DeviceCall<'a> = dyn Fn(&Disk, &mut dyn Device, &mut dyn FnMut()) -> CallResult + Sync + 'a;
/// Result of a [`DeviceCall`].
type CallResult = Result<(), FrontendError>;

/// Divides `0..count` between two threads.
fn halves(count: u64) -> [Range<u64>; 2] {
    [0..count / 2, count / 2..count]
}
