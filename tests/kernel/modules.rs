//! The modules of the kernel, and their devices.

use std::path::Path;
use std::process::Command;

/// Loads a module of the kernel.
pub(crate) fn load(module: &str) {
    let output = Command::new("modprobe").arg(module).output().unwrap();
    assert!(output.status.success(), "modprobe {module}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn each_module_has_its_device() {
    let devices = [
        ("vhost_net", "/dev/vhost-net"),
        ("vhost_vsock", "/dev/vhost-vsock"),
        ("vhost_scsi", "/dev/vhost-scsi"),
        ("vduse", "/dev/vduse/control"),
        ("tun", "/dev/net/tun"),
        ("virtio_vdpa", "/sys/bus/vdpa/drivers/virtio_vdpa"),
        ("vhost_vdpa", "/sys/bus/vdpa/drivers/vhost_vdpa"),
    ];
    for (module, device) in devices {
        load(module);
        assert!(Path::new(device).exists(), "{module} has no {device}");
    }
}
