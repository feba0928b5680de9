//! A VDUSE device from its creation to its removal.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, unbounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::{error, info, warn};
use zerocopy::FromZeros;

use crate::abi::features::feature_names;
use crate::abi::vduse::{DevConfigHeader, VDUSE_F_QUEUE_READY, VDUSE_F_SUSPEND, VDUSE_NAME_MAX};
use crate::abi::virtio::{VIRTIO_ID_NET, VirtioFeatures};
use crate::backend::VirtioDevice;
use crate::sys::with_causes::with_causes;
use crate::vduse::bus::{Bus, BusDriver, bind, is_disk, is_on_bus, offered_as, requests_in_flight, unbind_cut_off};
use crate::vduse::files::{ControlFile, DeviceFile, name_bytes};
use crate::vduse::kernel::Kernel;
use crate::vduse::left_behind::LeftBehind;
use crate::vduse::log::{LogFile, VduseLog};
use crate::vduse::messages::{LoopEnd, Task, serve_messages};
use crate::vduse::offer::{Offer, offers};
use crate::vduse::rings::Rings;
use crate::vduse::{DeviceInstance, VduseError, VduseLogError, VduseOptions, VduseRecord};

/// Alignment of the areas of a ring, bytes.
const RING_ALIGNMENT: u32 = 4096;
/// Time that udev has for the permissions of a new device.
const UDEV_LIMIT: Duration = Duration::from_secs(3);
/// VDUSE features that are acknowledged if the kernel offers them.
const VDUSE_FEATURES: u64 = 1 << VDUSE_F_QUEUE_READY | 1 << VDUSE_F_SUSPEND;

/// A VDUSE device that is served. Dropping it removes the device, as [`VduseServer::serve`] does at its end.
#[derive(Debug)]
pub struct VduseServer {
    name: String,
    control: ControlFile,
    bus: Bus,
    threads: Option<Threads>,
    exists: bool,
}

/// The threads that serve a device.
#[derive(Debug)]
struct Threads {
    /// Ends the message loop.
    stop: Arc<EventFd>,
    /// Signalled when the message loop has ended.
    ended: Arc<EventFd>,
    tasks: Sender<Task>,
    messages: JoinHandle<LoopEnd>,
    /// Returns the log.
    rings: JoinHandle<Option<VduseLog>>,
}

/// The state in which a device is when its threads start.
enum Start {
    /// It was just created.
    Created(Option<VduseLog>),
    /// Another process has served it, with this log.
    Continued(VduseLog),
    /// It is to be removed.
    LeftBehind,
}

impl VduseServer {
    /// Creates a VDUSE device, serves it on threads, and attaches it to the vDPA bus if the options say so. Returns when
    /// its driver, if it has one, has probed it.
    ///
    /// # Errors
    /// [`VduseError`] with advice. Nothing is left behind.
    pub fn start(options: &VduseOptions, device: Arc<dyn VirtioDevice>) -> Result<VduseServer, VduseError> {
        let name = options.name.as_str();
        check_name(name)?;
        if let Some(driver) = options.attach {
            driver.check()?;
        }
        let control = open_control()?;
        let bus = Bus::open().map_err(VduseError::NoBus)?;
        let device_id = device.device_id().ok_or_else(|| VduseError::NoDeviceId { name: name.into() })?;
        let _ = control.set_features(control.features() & VDUSE_FEATURES);
        let mut server = VduseServer { name: name.into(), control, bus, threads: None, exists: false };
        let mut created = server.create(options, device.as_ref(), device_id)?;
        if created.is_none() {
            match server.resume(options, &device, device_id) {
                Err(VduseError::LeftBehind { .. } | VduseError::Continue { .. }) if options.replace => {
                    server.remove_left_behind()?;
                    created = server.create(options, device.as_ref(), device_id)?;
                    created.ok_or_else(|| VduseError::NameTaken { name: name.into() })?;
                }
                resumed => resumed?,
            }
        }
        if let Some(offer) = created {
            server.exists = true;
            server.serve_created(options, &device, device_id, offer)?;
        }
        if let Some(driver) = options.attach {
            if !is_on_bus(name) {
                server.bus.add(name).map_err(|source| match source.kind() {
                    io::ErrorKind::PermissionDenied => not_permitted("the vDPA bus", source),
                    _ => VduseError::Add { name: name.into(), source },
                })?;
            } else if driver == BusDriver::Virtio {
                unbind_cut_off(name)?;
            }
            bind(name, driver)?;
        }
        Ok(server)
    }

    /// Declares the rings of a device that was just created, creates its log, and starts its threads.
    fn serve_created(
        &mut self,
        options: &VduseOptions,
        device: &Arc<dyn VirtioDevice>,
        device_id: u32,
        offer: Offer,
    ) -> Result<(), VduseError> {
        let name = self.name.as_str();
        let file = Arc::new(open_new(name)?);
        for index in 0..offer.queues {
            let declared = file.set_up_ring(index, device.max_queue_size());
            declared.map_err(VduseError::system(name, "declare a ring"))?;
        }
        let log = options.state_dir.as_deref().map(|folder| {
            let record = VduseRecord {
                instance: instance(name)?,
                device_id,
                data_id: device.data_id(),
                queue_size: device.max_queue_size(),
                offered: offer.features,
                features: VirtioFeatures::empty(),
                status: 0,
                suspended: false,
                config: device.config(),
                stopped_at: vec![None; offer.queues.into()],
            };
            VduseLog::create(LogFile::open(folder, name, true)?, record)
        });
        let start = Start::Created(log.transpose()?);
        self.threads = Some(Threads::start(name, device, file, offer, start)?);
        Ok(())
    }

    /// Returns the log of the device of this name, which no process serves.
    fn log_of_left_behind(
        &self,
        options: &VduseOptions,
        device: &dyn VirtioDevice,
        device_id: u32,
    ) -> Result<Result<VduseLog, VduseLogError>, VduseError> {
        let name = self.name.as_str();
        let file = DeviceFile::open(name).map_err(VduseError::system(name, "open the device"))?;
        if file.is_given_up() {
            return Ok(Err(VduseLogError::GivenUp));
        }
        let Some(folder) = &options.state_dir else { return Ok(Err(VduseLogError::NoDirectory)) };
        let file = match LogFile::open(folder, &self.name, false) {
            Err(VduseError::LogFile { path, source }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Err(VduseLogError::Missing { path }));
            }
            opened => opened?,
        };
        let instance = instance(&self.name)?;
        let offers = offers(device, device_id, options.split_rings);
        Ok(file.read(instance).and_then(|record| {
            let is = |offer: &Offer| OfferedDevice { device_id, offer: *offer, queue_size: device.max_queue_size() };
            let was = OfferedDevice {
                device_id: record.device_id,
                offer: Offer { features: record.offered, queues: record.queues() },
                queue_size: record.queue_size,
            };
            match offers.first() {
                Some(first) if !offers.iter().any(|offer| is(offer) == was) => {
                    Err(VduseLogError::OtherOptions { was: was.to_string(), is: is(first).to_string() })
                }
                _ if record.data_id != device.data_id() => Err(VduseLogError::OtherData),
                _ => Ok(VduseLog::resume(file, record)),
            }
        }))
    }

    /// Continues the device of this name, which no process serves, from its log.
    fn resume(
        &mut self,
        options: &VduseOptions,
        device: &Arc<dyn VirtioDevice>,
        device_id: u32,
    ) -> Result<(), VduseError> {
        let log = self.log_of_left_behind(options, device.as_ref(), device_id)?;
        let name = self.name.as_str();
        let log = log.map_err(|source| VduseError::LeftBehind { name: name.into(), source })?;
        let file = Arc::new(DeviceFile::open(name).map_err(VduseError::system(name, "open the device"))?);
        let offer = Offer { features: log.record().offered, queues: log.record().queues() };
        info!("{name}: continues the device of a process that has ended");
        self.threads = Some(Threads::start(name, device, file, offer, Start::Continued(log))?);
        self.exists = true;
        Ok(())
    }

    /// Creates the device with the largest offer that the kernel accepts. Returns `None` if there is a device of this name
    /// that no process serves.
    fn create(
        &self,
        options: &VduseOptions,
        device: &dyn VirtioDevice,
        device_id: u32,
    ) -> Result<Option<Offer>, VduseError> {
        let name = self.name.as_str();
        let mut refused = None;
        let offers = offers(device, device_id, options.split_rings);
        for offer in &offers {
            let header = DevConfigHeader {
                name: name_bytes(name),
                device_id,
                features: offer.features.bits(),
                vq_num: offer.queues.into(),
                vq_align: RING_ALIGNMENT,
                ..DevConfigHeader::new_zeroed()
            };
            match self.control.create(&header, &device.config()) {
                Ok(()) => {
                    let whole = offers.first().map_or(VirtioFeatures::empty(), |whole| whole.features);
                    let missing = whole & !offer.features;
                    if !missing.is_empty() {
                        warn!(
                            "{name}: this kernel refuses, and drivers are not offered, {} (rule V2.3)",
                            feature_names(missing, Some(device_id))
                        );
                    }
                    return Ok(Some(*offer));
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINVAL) => refused = Some(error),
                    Some(libc::EEXIST) => return self.check_unserved().map(|()| None),
                    Some(libc::EPERM | libc::EACCES) => return Err(not_permitted("creating the device", error)),
                    _ => return Err(VduseError::system(name, "create the device")(error)),
                },
            }
        }
        let advice = match device_id {
            VIRTIO_ID_NET => ": network interfaces need a newer one, such as Linux 6.12",
            _ => "",
        };
        let source = refused.unwrap_or_else(|| Errno::EINVAL.into());
        Err(VduseError::Refused { name: name.into(), advice, source })
    }

    /// Checks that no process serves the device of this name.
    fn check_unserved(&self) -> Result<(), VduseError> {
        match DeviceFile::open(&self.name) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                Err(VduseError::NameTaken { name: self.name.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Removes the device of this name, which no process serves.
    fn remove_left_behind(&mut self) -> Result<(), VduseError> {
        let name = self.name.as_str();
        let file = Arc::new(DeviceFile::open(name).map_err(VduseError::system(name, "open the device"))?);
        if file.is_given_up() {
            drop(file);
            let requests = requests_in_flight(name);
            if requests > 0 {
                return Err(VduseError::LeftWithRequests { name: name.into(), requests });
            }
            self.exists = true;
            return self.remove().map(drop);
        }
        let device = LeftBehind::new(&file, is_disk(name));
        let offer = device.offer();
        let device: Arc<dyn VirtioDevice> = Arc::new(device);
        self.threads = Some(Threads::start(name, &device, file, offer, Start::LeftBehind)?);
        self.exists = true;
        self.remove().map(drop)
    }

    /// Returns the paths and names by which the driver offers the device, such as `/dev/vda`.
    pub fn offered_as(&self) -> Vec<String> {
        offered_as(&self.name)
    }

    /// Serves the device until `stop` is readable. Then removes it from the vDPA bus, where the driver completes its
    /// requests, and destroys it.
    ///
    /// A VMM that has the device open must close it first: the kernel waits for that.
    ///
    /// # Errors
    /// [`VduseError::Broken`] if the kernel has given up the device, [`VduseError::Remove`] if it could not be removed.
    pub fn serve(mut self, stop: BorrowedFd<'_>) -> Result<(), VduseError> {
        let ended = self.threads.as_ref().map(|threads| threads.ended.clone());
        let waited = match &ended {
            Some(ended) => wait_for_any([stop, ended.as_fd()]),
            None => Ok(()),
        };
        if self.threads.as_ref().is_some_and(|threads| threads.messages.is_finished()) {
            warn!("{}: its messages are not answered any more: it is removed when its requests have ended", self.name);
        }
        let removed = self.remove();
        waited.map_err(VduseError::system(&self.name, "wait for a signal"))?;
        match removed? {
            LoopEnd::Stopped => Ok(()),
            LoopEnd::Broken => Err(VduseError::Broken { name: self.name.clone() }),
            LoopEnd::Failed(source) => Err(VduseError::system(&self.name, "read messages")(source)),
        }
    }

    /// Removes the device. Returns the reason for which the message loop has ended.
    fn remove(&mut self) -> Result<LoopEnd, VduseError> {
        let refused = |source| VduseError::Remove { name: self.name.clone(), source };
        // The driver still uses the device, and gets answers.
        let detached = if self.exists { self.bus.remove(&self.name).map_err(refused) } else { Ok(false) };
        let (end, log) = self.threads.take().map_or((LoopEnd::Stopped, None), Threads::stop);
        detached?;
        if std::mem::take(&mut self.exists) {
            self.control.destroy(&self.name).map_err(refused)?;
        }
        log.map_or(Ok(()), VduseLog::remove)?;
        Ok(end)
    }
}

impl Drop for VduseServer {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            error!("{}", with_causes(&error));
        }
    }
}

impl Threads {
    fn start(
        name: &str,
        device: &Arc<dyn VirtioDevice>,
        file: Arc<DeviceFile>,
        offer: Offer,
        start: Start,
    ) -> Result<Threads, VduseError> {
        let failed = VduseError::system(name, "start a thread");
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = || EventFd::from_flags(flags).map(Arc::new).map_err(|errno| failed(errno.into()));
        let (stop, ended) = (eventfd()?, eventfd()?);
        let limit = time_limit(name);
        let (tasks, inbox) = unbounded();
        let kernel = Arc::new(Kernel::new(&file, tasks.clone()));
        let mut rings = Rings::new(name, device.clone(), file.clone(), kernel, offer.features, offer.queues);
        match start {
            Start::Created(None) => {}
            Start::Created(Some(log)) => rings.set_log(log),
            Start::Continued(log) => {
                rings.set_log(log);
                rings.resume()?;
            }
            Start::LeftBehind => rings.take_over()?,
        }
        let rings = thread::Builder::new().name("vduse rings".into()).spawn(move || rings.run(&inbox));
        let rings = rings.map_err(&failed)?;
        let messages = {
            let (name, stop, ended, tasks) = (name.to_owned(), stop.clone(), ended.clone(), tasks.clone());
            thread::Builder::new().name("vduse messages".into()).spawn(move || {
                let end = serve_messages(&name, &file, stop.as_fd(), limit, &tasks);
                let _ = ended.write(1);
                end
            })
        };
        let messages = messages.map_err(|error| {
            let _ = tasks.send(Task::Stop);
            failed(error)
        })?;
        Ok(Threads { stop, ended, tasks, messages, rings })
    }

    /// Drains the rings and ends the threads. Returns the reason for which the message loop has ended, and the log.
    fn stop(self) -> (LoopEnd, Option<VduseLog>) {
        let _ = self.tasks.send(Task::Stop);
        // Requests under way are completed, however long that takes.
        let log = self.rings.join().ok().flatten();
        let _ = self.stop.write(1);
        (self.messages.join().unwrap_or(LoopEnd::Stopped), log)
    }
}

/// The properties that are compared before a device is continued.
#[derive(PartialEq, Eq)]
struct OfferedDevice {
    device_id: u32,
    offer: Offer,
    queue_size: u16,
}

impl fmt::Display for OfferedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OfferedDevice { device_id, offer: Offer { features, queues }, queue_size } = self;
        let features = feature_names(*features, Some(*device_id));
        write!(f, "device id {device_id}, {queues} queues of {queue_size} entries and {features}")
    }
}

/// Opens `/dev/vduse/control`.
pub(super) fn open_control() -> Result<ControlFile, VduseError> {
    ControlFile::open().map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => not_permitted("/dev/vduse/control", source),
        _ => VduseError::NoModule(source),
    })
}

/// Returns the identity of the device `name`.
fn instance(name: &str) -> Result<DeviceInstance, VduseError> {
    DeviceInstance::of(name).map_err(VduseError::system(name, "identify the device in sysfs"))
}

/// Opens a device that was just created. Without privileges, udev first has to permit that.
fn open_new(name: &str) -> Result<DeviceFile, VduseError> {
    let started = Instant::now();
    loop {
        match DeviceFile::open(name) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                if started.elapsed() > UDEV_LIMIT {
                    return Err(not_permitted(&format!("/dev/vduse/{name}"), error));
                }
                thread::sleep(Duration::from_millis(10));
            }
            opened => return opened.map_err(VduseError::system(name, "open the device")),
        }
    }
}

/// Waits until one of the descriptors is readable.
fn wait_for_any(fds: [BorrowedFd<'_>; 2]) -> io::Result<()> {
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            waited => return Ok(waited.map(drop)?),
        }
    }
}

/// Returns the time within which messages are answered: two thirds of the time after which the kernel gives up the device
/// (rule V1.6). `None` if it never does.
fn time_limit(name: &str) -> Option<Duration> {
    let text = fs::read_to_string(format!("/sys/class/vduse/{name}/msg_timeout")).unwrap_or_default();
    let seconds: u32 = text.trim().parse().unwrap_or(30);
    (seconds > 0).then(|| Duration::from_secs(seconds.into()) * 2 / 3)
}

fn not_permitted(what: &str, source: io::Error) -> VduseError {
    VduseError::NotPermitted { what: what.into(), source }
}

/// Checks the name of a device, which is a name of files in /dev and /sys.
fn check_name(name: &str) -> Result<(), VduseError> {
    let valid = (1..VDUSE_NAME_MAX).contains(&name.len())
        && !name.contains(['/', '\0', '\n'])
        && !["control", ".", ".."].contains(&name);
    if valid { Ok(()) } else { Err(VduseError::Name { name: name.into() }) }
}
