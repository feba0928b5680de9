//! The commands of docs/guide/kernel-vhost.md.

use std::fs;
use std::process::Command;

use vhost_migrate::frontend::{KernelDevice, KernelOptions};

use crate::scsi::start_stop;
use crate::vduse::Served;
use crate::vduse_blk::image;

const GUIDE: &str = include_str!("../../docs/guide/kernel-vhost.md");

#[test]
fn the_commands_of_the_guide_work() {
    fs::create_dir_all("/etc/modprobe.d").unwrap();
    let image = image("guide", 1 << 20);
    let served = Served::start("blk", "vdpa0", &["--attach", "virtio", "--image", image.to_str().unwrap()]);
    let blocks: Vec<&str> = GUIDE.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(blocks.len(), 5);
    for block in blocks {
        let output = Command::new("sh").args(["-e", "-u", "-c", block]).output().unwrap();
        assert!(output.status.success(), "{block}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let mut scsi = KernelDevice::scsi("naa.5001405000000011", 1, KernelOptions::default()).unwrap();
    start_stop(&mut scsi);
    served.end();
}

#[test]
fn the_guide_shows_a_message_as_it_is() {
    let options = KernelOptions::default().with_path(Some("/dev/vhost-none".into()));
    let error = KernelDevice::vsock(5, options).err().unwrap().to_string();
    let error = error.replace("/dev/vhost-none", "/dev/vhost-net").replace("vhost_vsock", "vhost_net");
    assert!(GUIDE.contains(&format!("```text\n{error}\n```")), "{error}");
}
