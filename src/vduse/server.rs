//! A VDUSE device from its creation to its removal.

#![forbid(unsafe_code)]

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
use tracing::{error, warn};
use zerocopy::FromZeros;

use crate::abi::features::feature_names;
use crate::abi::vduse::{DevConfigHeader, VDUSE_F_QUEUE_READY, VDUSE_F_SUSPEND, VDUSE_NAME_MAX};
use crate::abi::virtio::{VIRTIO_ID_NET, VirtioFeatures};
use crate::backend::VirtioDevice;
use crate::sys::with_causes::with_causes;
use crate::vduse::bus::{Bus, bind, is_disk, offered_as};
use crate::vduse::files::{ControlFile, DeviceFile, name_bytes};
use crate::vduse::kernel::Kernel;
use crate::vduse::left_behind::LeftBehind;
use crate::vduse::messages::{LoopEnd, Task, serve_messages};
use crate::vduse::offer::{Offer, offers};
use crate::vduse::rings::Rings;
use crate::vduse::{VduseError, VduseOptions};

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
    rings: JoinHandle<()>,
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
        let control = ControlFile::open().map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => not_permitted("/dev/vduse/control", source),
            _ => VduseError::NoModule(source),
        })?;
        let bus = Bus::open().map_err(VduseError::NoBus)?;
        let device_id = device.device_id().ok_or_else(|| VduseError::NoDeviceId { name: name.into() })?;
        let _ = control.set_features(control.features() & VDUSE_FEATURES);
        let mut server = VduseServer { name: name.into(), control, bus, threads: None, exists: false };
        let offer = match server.create(options, device.as_ref(), device_id) {
            Err(VduseError::LeftBehind { .. }) if options.replace => {
                server.remove_left_behind()?;
                server.create(options, device.as_ref(), device_id)
            }
            created => created,
        }?;
        server.exists = true;
        let file = Arc::new(open_new(name)?);
        for index in 0..offer.queues {
            let declared = file.set_up_ring(index, device.max_queue_size());
            declared.map_err(VduseError::system(name, "declare a ring"))?;
        }
        server.threads = Some(Threads::start(name, &device, file, offer, false)?);
        if let Some(driver) = options.attach {
            server.bus.add(name).map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => not_permitted("the vDPA bus", source),
                _ => VduseError::Add { name: name.into(), source },
            })?;
            bind(name, driver)?;
        }
        Ok(server)
    }

    /// Creates the device with the largest offer that the kernel accepts.
    fn create(&self, options: &VduseOptions, device: &dyn VirtioDevice, device_id: u32) -> Result<Offer, VduseError> {
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
                    return Ok(*offer);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINVAL) => refused = Some(error),
                    Some(libc::EEXIST) => return Err(self.exists_already()),
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

    /// Returns the error for a device of this name that exists.
    fn exists_already(&self) -> VduseError {
        let name = self.name.clone();
        match DeviceFile::open(&name) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => VduseError::NameTaken { name },
            _ => VduseError::LeftBehind { name },
        }
    }

    /// Removes the device of this name, which no process serves.
    fn remove_left_behind(&mut self) -> Result<(), VduseError> {
        let name = self.name.as_str();
        let file = Arc::new(DeviceFile::open(name).map_err(VduseError::system(name, "open the device"))?);
        let device = LeftBehind::new(&file, is_disk(name));
        let offer = device.offer();
        let device: Arc<dyn VirtioDevice> = Arc::new(device);
        self.threads = Some(Threads::start(name, &device, file, offer, true)?);
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
        let end = self.threads.take().map_or(LoopEnd::Stopped, Threads::stop);
        detached?;
        if std::mem::take(&mut self.exists) {
            self.control.destroy(&self.name).map_err(refused)?;
        }
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
        take_over: bool,
    ) -> Result<Threads, VduseError> {
        let failed = VduseError::system(name, "start a thread");
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = || EventFd::from_flags(flags).map(Arc::new).map_err(|errno| failed(errno.into()));
        let (stop, ended) = (eventfd()?, eventfd()?);
        let limit = time_limit(name);
        let (tasks, inbox) = unbounded();
        let kernel = Arc::new(Kernel::new(&file, tasks.clone()));
        let mut rings = Rings::new(name, device.clone(), file.clone(), kernel, offer.features, offer.queues);
        if take_over {
            rings.take_over()?;
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

    /// Drains the rings and ends the threads.
    fn stop(self) -> LoopEnd {
        let _ = self.tasks.send(Task::Stop);
        // Requests under way are completed, however long that takes.
        let _ = self.rings.join();
        let _ = self.stop.write(1);
        self.messages.join().unwrap_or(LoopEnd::Stopped)
    }
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
