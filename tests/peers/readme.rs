//! The commands of the README that start programs of other projects.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::process::{Lab, Process, wait_for};

#[test]
fn qemu_runs_with_the_command_of_readme() {
    let lab = Lab::new();
    let readme = include_str!("../../README.md").replace("\\\n", " ");
    let (image, socket, metrics) = (lab.disk(), lab.file("disk.sock"), lab.file("metrics"));
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let words = |program: &str| -> Vec<String> {
        let line = readme.lines().find(|line| line.starts_with(program)).unwrap();
        let line = line.replace("/run/vm1-disk.sock", socket.to_str().unwrap());
        line.replace("disk.img", image.to_str().unwrap()).split_whitespace().skip(1).map(Into::into).collect()
    };
    let mut arguments = words("vhost-migrate backend blk");
    arguments.extend(["--metrics".into(), format!("unix:{}", metrics.display())]);
    let mut backend =
        Process::start("backend", env!("CARGO_BIN_EXE_vhost-migrate"), &arguments, &lab.file("backend.log"));
    wait_for("the back-end", || {
        backend.assert_running();
        socket.exists().then_some(())
    });
    let mut qemu = Process::start("qemu", "qemu-system-x86_64", &words("qemu-system-x86_64"), &lab.file("qemu.log"));
    // The firmware searches for a boot device and so reads the disk.
    wait_for("the firmware reads the disk", || {
        qemu.assert_running();
        let mut stream = UnixStream::connect(&metrics).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
        let mut metrics = String::new();
        stream.read_to_string(&mut metrics).unwrap();
        metrics.lines().find(|line| line.starts_with("vhost_requests_total{") && !line.ends_with(" 0")).map(|_| ())
    });
}
