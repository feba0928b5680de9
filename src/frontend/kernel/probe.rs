//! The vhost devices of this kernel: which there are, and what they offer.
#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use super::handle::VhostHandle;
use super::{FrontendError, LogQuality, explain, net, scsi, vdpa, vsock};
use crate::abi::vhost::{VHOST_GET_BACKEND_FEATURES, VHOST_GET_FEATURES, VHOST_VDPA_GET_DEVICE_ID};
use crate::abi::virtio::{VIRTIO_ID_NET, VIRTIO_ID_SCSI, VIRTIO_ID_VSOCK, VirtioFeatures};

/// The prefix of the files of vDPA devices.
const VDPA_PREFIX: &str = "/dev/vhost-vdpa-";

type LogOrReason = Result<LogQuality, &'static str>;

/// A vhost device of this kernel.
#[derive(Debug)]
#[non_exhaustive]
pub struct KernelProbe {
    /// The file.
    pub path: PathBuf,
    /// The module that makes it.
    pub module: &'static str,
    /// Its offer, or the reason why it cannot be used, with advice.
    pub found: Result<KernelOffer, FrontendError>,
}

/// The offer of a vhost device of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelOffer {
    /// The virtio device id.
    pub device_id: u32,
    /// Virtio features.
    pub features: VirtioFeatures,
    /// Back-end features (`VHOST_BACKEND_F_*`). 0 for devices without the call.
    pub backend_features: u64,
    /// Quality of the dirty log, or the reason why there is none (rules K4).
    pub log: Result<LogQuality, &'static str>,
}

/// Opens each vhost device of this kernel, and returns what it offers: /dev/vhost-net, /dev/vhost-vsock, /dev/vhost-scsi,
/// and the vDPA devices. The kernel resets a vDPA device that is opened; one that is in use can't be opened.
pub fn probe_kernel() -> Vec<KernelProbe> {
    let fixed = [
        ("/dev/vhost-net", "vhost_net", VIRTIO_ID_NET, net::log_quality()),
        ("/dev/vhost-vsock", "vhost_vsock", VIRTIO_ID_VSOCK, vsock::log_quality()),
        ("/dev/vhost-scsi", "vhost_scsi", VIRTIO_ID_SCSI, scsi::log_quality()),
    ];
    let fixed = fixed.map(|(path, module, id, log)| probe(Path::new(path), module, Some(id), log));
    let vdpa = vdpa_devices().into_iter().map(|path| probe(&path, "vhost_vdpa", None, vdpa::log_quality()));
    fixed.into_iter().chain(vdpa).collect()
}

/// Returns the files of vDPA devices, sorted.
fn vdpa_devices() -> Vec<PathBuf> {
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<_> = entries.filter(|path| path.to_string_lossy().starts_with(VDPA_PREFIX)).collect();
    found.sort();
    found
}

fn probe(path: &Path, module: &'static str, device_id: Option<u32>, log: LogOrReason) -> KernelProbe {
    KernelProbe { path: path.into(), module, found: offer(path, module, device_id, log) }
}

fn offer(path: &Path, module: &str, device_id: Option<u32>, log: LogOrReason) -> Result<KernelOffer, FrontendError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(|source| explain::open_error(path, module, source))?;
    let handle = VhostHandle::new(file, path.display().to_string());
    let device_id = device_id.map_or_else(|| handle.get(VHOST_VDPA_GET_DEVICE_ID), Ok)?;
    let features = VirtioFeatures::from_bits_retain(handle.get(VHOST_GET_FEATURES)?);
    // vhost-scsi does not have the call.
    let backend_features = handle.get(VHOST_GET_BACKEND_FEATURES).unwrap_or(0);
    Ok(KernelOffer { device_id, features, backend_features, log })
}
