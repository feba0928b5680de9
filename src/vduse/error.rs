//! Errors of VDUSE devices.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::vduse::VduseLogError;

/// The reason for which a VDUSE device is not served, or not any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VduseError {
    /// The name is not valid.
    #[error(
        "{name:?} can't be the name of a VDUSE device: use 1 to 255 bytes without '/', and neither \"control\" nor dots \
        alone"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The type of the device is not known.
    #[error("{name}: the device has no virtio device id: implement VirtioDevice::device_id")]
    NoDeviceId {
        /// The device.
        name: String,
    },
    /// The kernel has no VDUSE.
    #[error("/dev/vduse/control does not exist: run `modprobe vduse` (a kernel with CONFIG_VDPA_USER is needed)")]
    NoModule(#[source] io::Error),
    /// This process may not use VDUSE.
    #[error("{what} is not permitted: run as root (network interfaces and the vDPA bus need CAP_NET_ADMIN)")]
    NotPermitted {
        /// The file or the operation.
        what: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The kernel has no vDPA bus.
    #[error("the vDPA bus does not exist: run `modprobe vdpa`")]
    NoBus(#[source] io::Error),
    /// The driver to attach the device to is not loaded.
    #[error("driver {driver} is not loaded: run `modprobe {driver}`")]
    NoDriver {
        /// The driver.
        driver: &'static str,
    },
    /// Another process serves a device of this name.
    #[error("{name}: another process serves a VDUSE device of this name: choose another name, or end that process")]
    NameTaken {
        /// The device.
        name: String,
    },
    /// A device of this name exists, and no process serves it.
    #[error(
        "{name}: a process that ended has left a VDUSE device of this name behind, which can't be continued: use --replace \
        to remove it"
    )]
    LeftBehind {
        /// The device.
        name: String,
        /// The reason for which it can't be continued.
        source: VduseLogError,
    },
    /// The rings of a device that another process has served could not be started.
    #[error("{name}: the device can't be continued: remove the cause and start again, or use --replace to remove it")]
    Continue {
        /// The device.
        name: String,
        /// The error of the system.
        source: io::Error,
    },
    /// A device that no process serves any more has requests in flight.
    #[error(
        "{name}: {requests} requests of the device are in flight and cannot be completed, and the kernel does not remove it \
        before: restart this host to remove it, or choose another name"
    )]
    LeftWithRequests {
        /// The device.
        name: String,
        /// The number of requests.
        requests: u64,
    },
    /// The kernel refuses the device.
    #[error("{name}: the kernel refuses this type of device{advice}")]
    Refused {
        /// The device.
        name: String,
        /// Advice for the user.
        advice: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// The device could not be added to the vDPA bus.
    #[error("{name}: can't be added to the vDPA bus")]
    Add {
        /// The device.
        name: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The device could not be bound to a driver of the vDPA bus.
    #[error("{name}: can't be bound to driver {driver}")]
    Bind {
        /// The device.
        name: String,
        /// The driver.
        driver: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// The device could not be removed. It is left behind.
    #[error("{name}: can't be removed, and is left behind: start with --replace to remove it")]
    Remove {
        /// The device.
        name: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The log can't be opened or written.
    #[error("{}: the log of the device can't be used (--state-dir names its directory)", .path.display())]
    LogFile {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// Another process uses the log.
    #[error("{}: another process uses this log: it serves a device of the same name", .path.display())]
    LogInUse {
        /// The file.
        path: PathBuf,
    },
    /// The device has no valid record.
    #[error("{}: the log of the device can't be written", .path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: VduseLogError,
    },
    /// The kernel does not use the device any more, because a message was not answered in time.
    #[error(
        "{name}: the kernel has given up the device, because a message was not answered within the time of \
         /sys/class/vduse/{name}/msg_timeout (30 s by default; rule V1.6): was this process stopped?"
    )]
    Broken {
        /// The device.
        name: String,
    },
    /// The system refuses an operation.
    #[error("{name}: can't {what}")]
    System {
        /// The device.
        name: String,
        /// The operation.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
}

impl VduseError {
    /// Returns the error of an operation on device `name`.
    pub(super) fn system(name: &str, what: &'static str) -> impl Fn(io::Error) -> VduseError {
        move |source| VduseError::System { name: name.into(), what, source }
    }
}
