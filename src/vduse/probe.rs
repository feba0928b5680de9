//! VDUSE and the vDPA bus of this kernel: what there is.

#![forbid(unsafe_code)]

use std::fs;

use crate::abi::vduse::{VDUSE_API_VERSION, VDUSE_F_QUEUE_READY, VDUSE_F_SUSPEND};
use crate::vduse::bus::{BusDriver, bound_driver, devices, offered_as};
use crate::vduse::server::open_control;
use crate::vduse::{VduseError, files::DeviceFile};

/// VDUSE of this kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VduseProbe {
    /// The version of the interface that is used.
    pub api_version: u64,
    /// The kernel sends a message when a driver enables a ring.
    pub queue_ready: bool,
    /// The kernel can suspend a device, so that its state can be read while its driver does not notice.
    pub suspend: bool,
    /// The drivers of the vDPA bus that are loaded.
    pub drivers: Vec<BusDriver>,
}

/// A device of the vDPA bus, or a VDUSE device that is not on it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VdpaDevice {
    /// Its name.
    pub name: String,
    /// Its driver on the bus.
    pub driver: Option<String>,
    /// The paths and names by which the driver offers it, such as `/dev/vda`.
    pub offered_as: Vec<String>,
    /// For a VDUSE device: true if a process serves it. `None` for other devices.
    pub is_served: Option<bool>,
}

/// Opens `/dev/vduse/control`, and returns what the kernel offers.
///
/// # Errors
/// [`VduseError::NoModule`], [`VduseError::NotPermitted`].
pub fn probe_vduse() -> Result<VduseProbe, VduseError> {
    let features = open_control()?.features();
    let has = |bit: u32| features & 1 << bit != 0;
    let drivers = [BusDriver::Virtio, BusDriver::Vhost];
    Ok(VduseProbe {
        api_version: VDUSE_API_VERSION,
        queue_ready: has(VDUSE_F_QUEUE_READY),
        suspend: has(VDUSE_F_SUSPEND),
        drivers: drivers.into_iter().filter(|driver| driver.check().is_ok()).collect(),
    })
}

/// Returns the devices of the vDPA bus and the VDUSE devices, sorted by name. Whether a process serves a VDUSE device is
/// found by opening it.
pub fn vdpa_devices() -> Vec<VdpaDevice> {
    let entries = fs::read_dir("/sys/class/vduse").into_iter().flatten().flatten();
    let vduse: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "control")
        .collect();
    let mut names = [devices(), vduse.clone()].concat();
    names.sort();
    names.dedup();
    let describe = |name: String| {
        let opened = vduse.contains(&name).then(|| DeviceFile::open(&name));
        let is_served = opened.map(|opened| opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)));
        VdpaDevice { driver: bound_driver(&name), offered_as: offered_as(&name), is_served, name }
    };
    names.into_iter().map(describe).collect()
}
