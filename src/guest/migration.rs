//! [`SourceVm`] and [`IncomingVm`] for the built-in guest.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::{
    DeviceSetup, DeviceState, DiskGenerations, DiskIdentities, Guest, GuestConfig, GuestError, GuestState,
    PreparedDevice, SavedGuest, in_parallel, make_memory,
};
use crate::abi::virtio::VIRTIO_ID_BLOCK;
use crate::dirty::{DirtySource, Pagemap, UnionSource};
use crate::frontend::{Device, FrontendError, Interrupt, KernelDevice, KernelOptions, UserDevice, UserOptions};
use crate::memory::Memory;
use crate::migrate::{IncomingVm, RegionLayout, SourceVm, VmError};
use crate::record::{self, MAX_STATE};
use crate::shadow::ShadowDevice;
use crate::stream::{CancelCallback, CancelToken, StreamError};
use crate::sys::lock;

/// Version of the record with a [`GuestState`], used in live migrations.
const STATE_VERSION: u16 = 1;
/// Version of the record with a [`SavedGuest`], used for saved guests.
const SAVED_STATE_VERSION: u16 = 2;
/// Version of the record with a [`DeviceSetup`], used for saved guests.
const DEVICES_VERSION: u16 = 1;
/// Version of the record with a [`DeviceSetup`] and [`DiskIdentities`], used in live migrations.
const DEVICES_AND_IDENTITIES_VERSION: u16 = 2;

/// Decodes the state of a built-in guest, and its disk generations if the guest was saved.
///
/// # Errors
/// As [`record::decode`]: the state of another VM, or of an unknown version.
pub fn decode_guest_state(state: &[u8]) -> Result<(GuestState, Option<DiskGenerations>), StreamError> {
    const NAME: &str = "guest state";
    if record::version(state)? == SAVED_STATE_VERSION {
        let SavedGuest { guest, disks } = record::decode(NAME, SAVED_STATE_VERSION, state, MAX_STATE)?;
        return Ok((guest, Some(disks)));
    }
    Ok((record::decode(NAME, STATE_VERSION, state, MAX_STATE)?, None))
}

/// Decodes the disk generations in the first bytes of a saved state; 64 KiB are enough. Returns `None` for other
/// states.
pub fn decode_saved_disks(beginning: &[u8]) -> Option<DiskGenerations> {
    record::decode_first(SAVED_STATE_VERSION, beginning).ok()
}

/// Warning about a disk without a generation.
const NO_GENERATION: &str = "a restore can't compare this disk with what it is now: its back-end, or the image's file system, \
                            knows no generations. Keep a copy of it, and restore onto that";

/// Ends waits for a guest's devices on cancellation. Dropping it allows new waits.
pub struct InterruptOnCancel {
    interrupts: Vec<Interrupt>,
    call: Option<CancelCallback>,
}

impl InterruptOnCancel {
    /// Creates it for the devices of `interrupts` ([`Guest::interrupts`]).
    pub fn new(interrupts: Vec<Interrupt>, cancel: &CancelToken) -> InterruptOnCancel {
        let set = interrupts.clone();
        let call = cancel.on_cancel(move || set.iter().for_each(Interrupt::set));
        InterruptOnCancel { interrupts, call: Some(call) }
    }
}

impl Drop for InterruptOnCancel {
    fn drop(&mut self) {
        self.call = None;
        self.interrupts.iter().for_each(Interrupt::clear);
    }
}

/// A built-in guest at the source. Other threads may access it meanwhile. It is dropped on release.
pub struct GuestSourceVm<'a> {
    guest: &'a Mutex<Option<Guest>>,
    memory: Memory,
    interrupts: Vec<Interrupt>,
    /// The token that sets the interrupts, and its registration.
    cancel: Option<(CancelToken, InterruptOnCancel)>,
    /// True if the CPUs ran before the migration.
    running: bool,
    /// True if the state includes disk generations.
    record_generations: bool,
    /// Warnings about the saved state.
    warnings: Vec<String>,
}

impl<'a> GuestSourceVm<'a> {
    /// Creates it for the guest in `guest`. Returns `None` if there is no guest.
    pub fn new(guest: &'a Mutex<Option<Guest>>) -> Option<GuestSourceVm<'a>> {
        let of = |guest: &Guest| (guest.memory().clone(), guest.interrupts(), guest.is_running());
        let (memory, interrupts, running) = lock(guest).as_ref().map(of)?;
        Some(GuestSourceVm {
            guest,
            memory,
            interrupts,
            cancel: None,
            running,
            record_generations: false,
            warnings: Vec::new(),
        })
    }

    /// Includes the identity and generation of each disk in the state, for a guest that is restored later.
    pub fn with_disk_generations(mut self, to_save: bool) -> GuestSourceVm<'a> {
        self.record_generations = to_save;
        self
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Guest) -> Result<T, GuestError>) -> Result<T, VmError> {
        let mut guest = lock(self.guest);
        let guest = guest.as_mut().ok_or("the guest has ended")?;
        Ok(ask(guest)?)
    }
}

/// Returns the dirty sources of a built-in guest: its CPUs and drivers in this process, and each of its devices.
pub fn dirty_sources(guest: &Guest) -> Vec<Box<dyn DirtySource>> {
    let cpus: Box<dyn DirtySource> = Box::new(Pagemap::new("cpus", guest.memory().clone()));
    std::iter::once(cpus).chain(guest.logs().map(|log| Box::new(log) as Box<dyn DirtySource>)).collect()
}

impl SourceVm for GuestSourceVm<'_> {
    /// Lets `cancel` end waits for the guest's devices: a disk that hangs while its queues are stopped does not block the
    /// guest's CPUs and other devices. The disk continues when its back-end replies.
    fn set_cancel(&mut self, cancel: &CancelToken) {
        // The end of an earlier registration clears the interrupts.
        self.cancel = None;
        self.cancel = Some((cancel.clone(), InterruptOnCancel::new(self.interrupts.clone(), cancel)));
    }

    fn memory(&self) -> Memory {
        self.memory.clone()
    }

    fn is_running(&self) -> bool {
        self.running
    }

    fn blocker(&self) -> Option<String> {
        let connections = lock(self.guest).as_ref().map(Guest::connections).unwrap_or_default();
        connections.into_iter().find(|connection| connection.away_ms.is_some()).map(|away| {
            let why = away.refused.map(|why| format!(" ({why})")).unwrap_or_default();
            format!("{}: its back-end is away{why}", away.name)
        })
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        self.with(|guest| Ok(Box::new(UnionSource::new(dirty_sources(guest))) as Box<dyn DirtySource>))
    }

    fn devices(&mut self) -> Result<Option<Vec<u8>>, VmError> {
        if self.record_generations {
            let setup = self.with(|guest| Ok(guest.device_setup()))?;
            return Ok(Some(record::encode(DEVICES_VERSION, &setup)?));
        }
        let moving = self.with(|guest| Ok((guest.device_setup(), guest.disk_identities()?)))?;
        Ok(Some(record::encode(DEVICES_AND_IDENTITIES_VERSION, &moving)?))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.with(|guest| {
            if guest.is_running() {
                guest.pause()?;
            }
            guest.stop_devices()
        })
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        let to_save = self.record_generations;
        let (guest, disks, unknown) = self.with(|guest| {
            let disks = if to_save { guest.disk_generations()? } else { Vec::new() };
            Ok((guest.save_state()?, disks.clone(), guest.unknown_disks(&disks)))
        })?;
        if !to_save {
            return Ok(record::encode(STATE_VERSION, &guest)?);
        }
        self.warnings = unknown.into_iter().map(|name| format!("{name}: {NO_GENERATION}")).collect();
        Ok(record::encode(SAVED_STATE_VERSION, &SavedGuest { guest, disks })?)
    }

    fn warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if self.cancel.as_ref().is_some_and(|(cancel, _)| cancel.is_cancelled()) {
            self.cancel = None;
        }
        let running = self.running;
        self.with(|guest| {
            if running {
                return guest.resume_without_waiting();
            }
            guest.request_device_start();
            Ok(())
        })
    }

    fn release(&mut self) {
        *lock(self.guest) = None;
    }
}

/// A built-in guest at the destination.
pub struct GuestIncomingVm {
    backends: Vec<PathBuf>,
    /// Devices prepared while the guest runs at its source.
    devices: Vec<PreparedDevice>,
    /// Identities of the disks at the source.
    disks: DiskIdentities,
    memory: Option<Memory>,
    guest: Option<Guest>,
    /// True if the guest comes from a saved stream, so that its disks must be unchanged.
    was_saved: bool,
    /// True if differences of disks only give a warning.
    ignore_disk_differences: bool,
    /// Interrupt of all devices.
    interrupt: Interrupt,
    /// Sets the interrupt on cancellation until the commit.
    cancel: Option<CancelCallback>,
}

impl GuestIncomingVm {
    /// Creates it for `backends`, one for each disk of the guest, see [`connect_backends`].
    ///
    /// # Errors
    /// [`FrontendError::System`] when the process is out of file descriptors.
    pub fn new(backends: Vec<PathBuf>) -> Result<GuestIncomingVm, FrontendError> {
        let interrupt = Interrupt::new()?;
        let (was_saved, ignore_disk_differences) = (false, false);
        let (devices, disks, memory, guest, cancel) = (Vec::new(), Vec::new(), None, None, None);
        Ok(GuestIncomingVm {
            backends,
            devices,
            disks,
            memory,
            guest,
            was_saved,
            ignore_disk_differences,
            interrupt,
            cancel,
        })
    }

    /// Sets how disks are checked. With `was_saved` the guest comes from a saved stream, and disks that cannot be
    /// compared give a warning. With `ignore_disk_differences` different disks give a warning instead of an error.
    pub fn with_disk_checks(self, was_saved: bool, ignore_disk_differences: bool) -> GuestIncomingVm {
        GuestIncomingVm { was_saved, ignore_disk_differences, ..self }
    }

    /// Refuses disks that have changed since the guest was saved, and warns of disks that cannot be compared.
    fn compare_disks(&self, guest: &Guest, saved: Option<DiskGenerations>) -> Result<(), GuestError> {
        let Some(saved) = saved else {
            if self.was_saved {
                tracing::warn!("disks are not compared: the guest was saved without a record of them");
            }
            return Ok(());
        };
        for name in guest.unknown_disks(&saved) {
            tracing::warn!("{name}: this disk is not compared: it could not be told when the guest was saved");
        }
        ignore_if_allowed(self.ignore_disk_differences, guest.compare_disks(&saved))
    }

    /// Connects to the back-ends and prepares them as the devices of `setup`. Disks whose identity differs from the
    /// source's are refused.
    fn prepare_disks(&self, setup: &DeviceSetup, memory: &Memory) -> Result<Vec<PreparedDevice>, VmError> {
        let config = GuestConfig::from(setup.config.clone());
        let devices = connect_backends(&self.backends, &config, &self.interrupt)?;
        let mut devices = PreparedDevice::all(setup, memory, devices)?;
        let there = self.disks.iter().copied().chain(std::iter::repeat(None));
        let any = self.ignore_disk_differences;
        let compare = |(device, there): (&mut PreparedDevice, _)| ignore_if_allowed(any, device.check_identity(there));
        in_parallel(devices.iter_mut().zip(there), compare)?;
        Ok(devices)
    }

    fn interrupt_on_cancel(&self, cancel: &CancelToken) -> CancelCallback {
        let interrupt = self.interrupt.clone();
        cancel.on_cancel(move || interrupt.set())
    }

    /// Returns the guest, if it has arrived.
    pub fn into_guest(self) -> Option<Guest> {
        self.guest
    }
}

/// Turns an error about a different disk into a warning if `any` disk is allowed.
fn ignore_if_allowed(any: bool, compared: Result<(), GuestError>) -> Result<(), GuestError> {
    match compared {
        Err(GuestError::State(difference)) if any => {
            tracing::warn!("taking the guest in all the same: {difference}");
            Ok(())
        }
        compared => compared,
    }
}

/// Returns true if all prepared devices fit the guest's devices.
fn all_fit(devices: &[PreparedDevice], expected: &[DeviceState]) -> bool {
    devices.len() == expected.len() && devices.iter().zip(expected).all(|(device, expected)| device.fits(expected))
}

/// Time limit for a back-end that is being started.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to the disks of a guest like `config`. Each is the socket of a vhost-user back-end or a vhost-vdpa device
/// (`/dev/vhost-vdpa-N`), which gets shadow rings. Back-ends that are being started are waited for up to 5 s. `interrupt`
/// ends waits, also later ones.
///
/// # Errors
/// The first failed connection.
pub fn connect_backends(
    backends: &[PathBuf],
    config: &GuestConfig,
    interrupt: &Interrupt,
) -> Result<Vec<Box<dyn Device>>, VmError> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let usual = UserOptions { device: Some(VIRTIO_ID_BLOCK), ..UserOptions::default() };
    let options = if config.inflight_migration { usual.with_inflight_migration() } else { usual };
    let connect = |path: &PathBuf| {
        if is_character_device(path) {
            return open_vdpa(path, config.queues);
        }
        let device = UserDevice::connect_interruptible(path, options, deadline, interrupt.clone())?;
        Ok(Box::new(device) as Box<dyn Device>)
    };
    Ok(in_parallel(backends, connect)?)
}

fn is_character_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device())
}

/// Opens a disk of vhost-vdpa behind shadow rings, because it has no dirty log (rule K4.4).
fn open_vdpa(path: &Path, queues: u16) -> Result<Box<dyn Device>, GuestError> {
    let device = KernelDevice::vdpa(path, Some(queues), KernelOptions::default())?;
    match device.device_id() {
        VIRTIO_ID_BLOCK => Ok(Box::new(ShadowDevice::new(Box::new(device)))),
        other => {
            let why = format!("it is no disk, but a device with the virtio id {other}");
            Err(GuestError::Unusable { name: path.display().to_string(), why })
        }
    }
}

impl IncomingVm for GuestIncomingVm {
    /// Lets `cancel` end waits for back-ends.
    fn set_cancel(&mut self, cancel: &CancelToken) {
        self.cancel = Some(self.interrupt_on_cancel(cancel));
    }

    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        let memory = make_memory(regions.iter().map(|region| (region.gpa, region.size)), false)?;
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn prepare_devices(&mut self, devices: &[u8]) -> Result<(), VmError> {
        const NAME: &str = "devices";
        let setup: DeviceSetup;
        (setup, self.disks) = match record::version(devices)? {
            DEVICES_AND_IDENTITIES_VERSION => record::decode(NAME, DEVICES_AND_IDENTITIES_VERSION, devices, MAX_STATE)?,
            _ => (record::decode(NAME, DEVICES_VERSION, devices, MAX_STATE)?, Vec::new()),
        };
        let memory = self.memory.as_ref().ok_or("there is no memory for devices")?;
        self.devices = self.prepare_disks(&setup, memory)?;
        Ok(())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        let memory = self.memory.take().ok_or("there is no memory to restore a guest in")?;
        let (state, disks) = decode_guest_state(state)?;
        let mut guest = Guest::restore(memory, state)?;
        let mut devices = std::mem::take(&mut self.devices);
        if !all_fit(&devices, guest.expected_devices()) {
            // The old connections must be closed before new ones are opened.
            drop(devices);
            devices = self.prepare_disks(&guest.expected_setup(), guest.memory())?;
        }
        guest.attach_prepared(devices)?;
        guest.try_devices()?;
        self.compare_disks(&guest, disks)?;
        self.guest = Some(guest);
        Ok(())
    }

    fn start(&mut self, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError> {
        self.cancel = None;
        let interrupted = self.interrupt_on_cancel(cancel);
        let guest = self.guest.as_mut().ok_or("no guest was restored")?;
        let started = if run { guest.start() } else { guest.start_devices() };
        if started.is_err() {
            // Nothing may run until the next attempt. A device that cannot be stopped was not started, or serves
            // requests of a paused guest.
            let _ = guest.stop_devices();
        }
        drop(interrupted);
        // Later waits for devices are possible again.
        self.interrupt.clear();
        started?;
        Ok(guest.downtime_ns())
    }
}
