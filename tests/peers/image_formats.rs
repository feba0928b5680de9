//! Images in qemu-img's formats, which a disk's back-end must refuse.

use std::fs;
use std::process::Command;

use vhost_migrate::backend::blk::{BlkDevice, BlkError, BlkOptions};

use crate::process::Lab;

/// Tests images made by qemu-img. A guest would see their metadata and overwrite it.
#[test]
fn an_image_that_is_not_raw_is_refused_unless_told_otherwise() {
    let lab = Lab::new();
    let image = lab.disk();
    let secret = ["--object", "secret,id=key,data=secret"];
    let formats: [(&str, &[&str]); 12] = [
        ("qcow2", &["-f", "qcow2"]),
        ("qcow2", &["-f", "qcow2", "-o", "compat=0.10"]),
        ("qed", &["-f", "qed"]),
        ("vmdk", &["-f", "vmdk"]),
        ("vmdk", &["-f", "vmdk", "-o", "subformat=monolithicFlat"]),
        ("vmdk", &["-f", "vmdk", "-o", "subformat=streamOptimized"]),
        ("vdi", &["-f", "vdi"]),
        ("vhdx", &["-f", "vhdx"]),
        ("vpc", &["-f", "vpc"]),
        ("vpc", &["-f", "vpc", "-o", "subformat=fixed"]),
        ("luks", &["-f", "luks", secret[0], secret[1], "-o", "key-secret=key,iter-time=10"]),
        ("parallels", &["-f", "parallels"]),
    ];
    for (format, arguments) in formats {
        let _ = fs::remove_file(&image);
        let made = Command::new("qemu-img").arg("create").args(arguments).arg(&image).arg("8M").output();
        let made = made.expect("qemu-img, which comes with QEMU");
        assert!(made.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&made.stderr));
        match BlkDevice::open(BlkOptions::new(&image)) {
            Err(error @ BlkError::Format { format: found, .. }) => {
                assert_eq!(found, format, "{arguments:?}");
                assert!(error.to_string().contains("--format raw"), "{error}");
            }
            other => panic!("{arguments:?}: {other:?}"),
        }
        // Some of these files only describe another file in text, and are too small for a disk.
        let told = BlkDevice::open(BlkOptions::new(&image).with_raw(true));
        assert!(matches!(told, Ok(_) | Err(BlkError::TooSmall { .. })), "{arguments:?}: {told:?}");
    }
    let made = Command::new("qemu-img").args(["create", "-f", "raw"]).arg(&image).arg("8M").output().unwrap();
    assert!(made.status.success());
    BlkDevice::open(BlkOptions::new(&image)).unwrap();
}
