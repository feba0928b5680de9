//! VDUSE: devices of the kernel's vDPA bus that are served by this process.
//!
//! A [`VirtioDevice`](crate::backend::VirtioDevice) that a VMM uses through vhost-user can also be served over VDUSE,
//! unchanged. With the driver virtio_vdpa it is a virtio device of this host, for example the disk `/dev/vda`. With
//! vhost_vdpa it is a device file for a VMM. `docs/guide/vduse.md` describes modules, permissions and limits.
//!
//! | file | purpose |
//! |---|---|
//! | `server` | creation, threads, removal |
//! | `messages` | the message loop |
//! | `state` | what each message changes, without files and threads |
//! | `rings` | performs what messages require: starts and stops rings |
//! | `kernel` | interrupts, and the mappings of I/O virtual addresses |
//! | `log` | the log from which another process continues the device |
//! | `left_behind` | a device whose process has ended, while it is removed |
//! | `offer` | the features that the kernel accepts |
//! | `bus` | the vDPA bus: netlink and sysfs |
//! | `probe` | what VDUSE and the vDPA bus of this kernel offer |
//! | `files` | the device files and their ioctls |
//!
//! # Example
//!
//! Serve a disk as `/dev/vda` until the descriptor `stop` is readable:
//!
//! ```
//! use std::os::fd::BorrowedFd;
//! use std::path::PathBuf;
//! use std::sync::Arc;
//!
//! use vhost_migrate::backend::blk::{BlkDevice, BlkOptions};
//! use vhost_migrate::vduse::{BusDriver, VduseError, VduseOptions, VduseServer};
//!
//! fn serve(image: PathBuf, stop: BorrowedFd<'_>) -> Result<(), Box<dyn std::error::Error>> {
//!     let disk = Arc::new(BlkDevice::open(BlkOptions::new(image))?);
//!     let options = VduseOptions::new("disk0").with_attach(Some(BusDriver::Virtio));
//!     let server = VduseServer::start(&options, disk)?;
//!     println!("serves {}", server.offered_as().join(", "));
//!     Ok(server.serve(stop)?)
//! }
//! # // The name is refused on every host, also on one with VDUSE.
//! # let image = tempfile::NamedTempFile::new()?;
//! # image.as_file().set_len(1 << 20)?;
//! # let disk = Arc::new(BlkDevice::open(BlkOptions::new(image.path()))?);
//!
//! let refused = VduseServer::start(&VduseOptions::new("no/name"), disk);
//! assert!(matches!(refused, Err(VduseError::Name { .. })));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bus;
mod error;
mod files;
mod kernel;
mod left_behind;
mod log;
mod messages;
mod offer;
mod probe;
mod rings;
mod server;
mod state;

pub use bus::BusDriver;
pub use error::VduseError;
pub use log::{DeviceInstance, RECORD_BYTES, VduseLogError, VduseRecord};
pub use probe::{VdpaDevice, VduseProbe, probe_vduse, vdpa_devices};
pub use server::VduseServer;

use std::path::PathBuf;

/// The name of a VDUSE device, and how it is offered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VduseOptions {
    /// Name of the device, on the vDPA bus too.
    pub name: String,
    /// The driver to attach the device to. With `None`, `vdpa dev add name NAME mgmtdev vduse` attaches it.
    pub attach: Option<BusDriver>,
    /// Remove a device of this name that a process has left behind and that can't be continued.
    pub replace: bool,
    /// Directory of the log from which another process continues the device. With `None` there is no log.
    pub state_dir: Option<PathBuf>,
    /// Offer split rings only, as a VMM with shadow virtqueues needs.
    pub split_rings: bool,
}

impl VduseOptions {
    /// Options for a device that is not attached.
    pub fn new(name: impl Into<String>) -> VduseOptions {
        VduseOptions { name: name.into(), attach: None, replace: false, state_dir: None, split_rings: false }
    }

    setters! {
        with_attach: attach: Option<BusDriver>,
        with_replace: replace: bool,
        with_state_dir: state_dir: Option<PathBuf>,
        with_split_rings: split_rings: bool,
    }
}
