//! `demo --device vhost-vdpa`: a guest moves from one VDUSE disk to another while it writes.

use std::fs;
use std::process::Command;

use rstest::rstest;
use serde_json::Value;

use crate::process::{program, text};
use crate::vduse::load_modules;

/// Runs the demo. Returns its events.
fn demo(more: &[&str]) -> Vec<Value> {
    load_modules();
    let small = ["--memory", "64MiB", "--disk", "8MiB", "--seconds", "2", "--dirty-rate", "1MiB/s", "--json"];
    let mut demo = program();
    // The machine is emulated, and slow.
    demo.args(["demo", "--device", "vhost-vdpa", "--downtime", "5s"]).args(small).args(more);
    let output = demo.output().unwrap();
    let (events, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{events}{errors}");
    println!("{errors}");
    events.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Rule K4.4: the device has no log. That of the shadow rings is complete, or the guest would find a wrong byte.
#[rstest]
fn a_guest_moves_between_vduse_disks_while_it_writes(#[values(&[], &["--packed", "--kill"])] more: &[&str]) {
    let events = demo(more);
    let done = events.last().unwrap();
    println!("{done}");
    assert_eq!((&done["event"], &done["verified"], &done["lost"]), (&"done".into(), &true.into(), &0.into()), "{done}");
    assert_eq!(done["kills"], if more.contains(&"--kill") { 3 } else { 0 }, "{done}");
    assert_eq!(done["log_quality"], "shadowed", "{done}");
    assert!(done["requests"].as_u64().unwrap() > 100, "{done}");
    assert!(fs::read_dir("/sys/bus/vdpa/devices").unwrap().next().is_none(), "a device is left behind");
}

#[test]
fn a_missing_module_is_named() {
    load_modules();
    let unload = |module: &str| {
        let output = Command::new("rmmod").arg(module).output().unwrap();
        assert!(output.status.success(), "rmmod {module}: {}", text(&output.stderr));
    };
    unload("vhost_vdpa");
    let output = program().args(["demo", "--device", "vhost-vdpa"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = "demo: --device vhost-vdpa is not possible yet: run `modprobe -a vhost_vdpa`\n";
    assert_eq!(text(&output.stderr), expected);
    unload("vduse");
    let output = program().args(["demo", "--device", "vhost-vdpa"]).output().unwrap();
    assert!(text(&output.stderr).contains("run `modprobe -a vduse vhost_vdpa`"), "{}", text(&output.stderr));
    load_modules();
}
