//! `inspect kernel`: lists the vhost devices of this kernel, VDUSE and the vDPA bus, and what is missing.

use nix::sys::utsname::uname;
use serde_json::{Value, json};
use vhost_migrate::abi::features::feature_names;
use vhost_migrate::frontend::{KernelProbe, probe_kernel};
use vhost_migrate::unstable::with_causes;
use vhost_migrate::vduse::{VdpaDevice, VduseError, VduseProbe, probe_vduse, vdpa_devices};

use super::{Inspection, LinePrinter};

/// Names of the bits `VHOST_BACKEND_F_*` from bit 1 on.
const BACKEND_FEATURES: [&str; 8] = [
    "IOTLB_MSG_V2",
    "IOTLB_BATCH",
    "IOTLB_ASID",
    "SUSPEND",
    "RESUME",
    "ENABLE_AFTER_DRIVER_OK",
    "DESC_ASID",
    "IOTLB_PERSIST",
];

pub(super) fn inspect(lines: &LinePrinter) -> Result<Inspection, String> {
    let release = uname().map_err(|error| error.to_string())?.release().to_string_lossy().into_owned();
    lines.print(format_args!("Linux {release}"));
    let devices: Vec<Value> = probe_kernel().iter().map(|probe| vhost_device(probe, lines)).collect();
    let vduse = vduse(probe_vduse(), lines);
    let bus: Vec<Value> = vdpa_devices().iter().map(|device| vdpa_device(device, lines)).collect();
    Ok(json!({"linux": release, "devices": devices, "vduse": vduse, "vdpa": bus}).into())
}

fn vhost_device(probe: &KernelProbe, lines: &LinePrinter) -> Value {
    let path = probe.path.display().to_string();
    let offer = match &probe.found {
        Ok(offer) => offer,
        Err(error) => {
            let error = with_causes(error).to_string();
            lines.print(format_args!("{error}"));
            return json!({"path": path, "module": probe.module, "usable": false, "error": error});
        }
    };
    let log = offer.log.ok().map(|quality| quality.to_string());
    let shown = log.as_deref().unwrap_or("none");
    lines.print(format_args!("{path}: virtio device {}, dirty log: {shown}", offer.device_id));
    if let Err(reason) = offer.log {
        lines.print(format_args!("  {reason}"));
    }
    lines.print(format_args!("  features: {}", feature_names(offer.features, Some(offer.device_id))));
    let backend_features = backend_feature_names(offer.backend_features);
    if !backend_features.is_empty() {
        lines.print(format_args!("  back-end features: {}", backend_features.join(", ")));
    }
    json!({
        "path": path,
        "module": probe.module,
        "usable": true,
        "device_id": offer.device_id,
        "features": offer.features.bits(),
        "backend_features": backend_features,
        "log_quality": log,
        "log_missing": offer.log.err(),
    })
}

/// Returns the names of back-end features; unknown bits have none.
fn backend_feature_names(bits: u64) -> Vec<&'static str> {
    (1..).zip(BACKEND_FEATURES).filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, name)| name).collect()
}

fn vduse(found: Result<VduseProbe, VduseError>, lines: &LinePrinter) -> Value {
    let probe = match found {
        Ok(probe) => probe,
        Err(error) => {
            let error = with_causes(&error).to_string();
            lines.print(format_args!("{error}"));
            return json!({"usable": false, "error": error});
        }
    };
    let drivers: Vec<&str> = probe.drivers.iter().map(|driver| driver.name()).collect();
    let with = |has: bool, name: &str| format!("{} {name}", if has { "with" } else { "without" });
    lines.print(format_args!(
        "/dev/vduse/control: version {}, {}, {}",
        probe.api_version,
        with(probe.queue_ready, "QUEUE_READY"),
        with(probe.suspend, "SUSPEND")
    ));
    match drivers.is_empty() {
        true => lines.print(format_args!("  no driver of the vDPA bus: run `modprobe -a virtio_vdpa vhost_vdpa`")),
        false => lines.print(format_args!("  drivers of the vDPA bus: {}", drivers.join(", "))),
    }
    json!({
        "usable": true,
        "api_version": probe.api_version,
        "queue_ready": probe.queue_ready,
        "suspend": probe.suspend,
        "drivers": drivers,
    })
}

fn vdpa_device(device: &VdpaDevice, lines: &LinePrinter) -> Value {
    let driver = device.driver.as_deref().unwrap_or("no driver");
    let offered =
        if device.offered_as.is_empty() { String::new() } else { format!(", {}", device.offered_as.join(", ")) };
    let served = match device.is_served {
        Some(true) => ", VDUSE",
        Some(false) => ", VDUSE, but no process serves it: start its process again to continue it",
        None => "",
    };
    lines.print(format_args!("vDPA device {}: {driver}{offered}{served}", device.name));
    json!({"name": device.name, "driver": device.driver, "offered_as": device.offered_as, "served": device.is_served})
}
