//! `inspect kernel` with the devices of a real kernel.

use serde_json::{Value, json};

use crate::modules::load;
use crate::process::{program, text};
use crate::vduse::{bus_path, load_modules};
use crate::vduse_blk::{image, serve};

fn inspect_kernel() -> Value {
    let output = program().args(["inspect", "--json", "kernel"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Rules K4.1 to K4.4.
#[test]
fn each_device_is_listed_with_its_log() {
    ["vhost_net", "vhost_vsock", "vhost_scsi"].into_iter().for_each(load);
    load_modules();
    let image = image("listed", 8 << 20);
    let served = serve("listed", &image, &[]);
    let found = inspect_kernel();
    let logs = [0, 1, 2].map(|index| found["devices"][index]["log_quality"].clone());
    assert_eq!(logs, [json!("exact"), Value::Null, Value::Null], "{found}");
    let reason = found["devices"][1]["log_missing"].as_str().unwrap();
    assert!(reason.contains("wrap it in shadow::ShadowDevice"), "{reason}");
    assert!(found["devices"][0]["features"].as_u64().unwrap() >> 26 & 1 == 1, "LOG_ALL");
    assert_eq!(found["vduse"]["drivers"], json!(["virtio_vdpa", "vhost_vdpa"]));
    assert_eq!((&found["vduse"]["suspend"], &found["vduse"]["queue_ready"]), (&json!(false), &json!(false)));
    let disk = served.disk().display().to_string();
    let expected = json!([{"name": "listed", "driver": "virtio_vdpa", "offered_as": [disk], "served": true}]);
    assert_eq!(found["vdpa"], expected);
    let device = || inspect_kernel()["vdpa"][0].clone();
    served.kill();
    assert_eq!(device()["served"], false);
    let output = program().args(["inspect", "kernel"]).output().unwrap();
    assert!(text(&output.stdout).contains("no process serves it"), "{}", text(&output.stdout));
    serve("listed", &image, &[]).end();
    assert_eq!(inspect_kernel()["vdpa"], json!([]));
    assert!(!std::path::Path::new(&bus_path("listed")).exists());
}

/// Rule K4.4: a device for a VMM is asked itself.
#[test]
fn a_vdpa_device_is_listed_with_what_it_offers() {
    load_modules();
    let image = image("vmm2", 8 << 20);
    let path = image.to_str().unwrap();
    let served = crate::vduse::Served::start("blk", "vmm2", &["--attach", "vhost", "--image", path]);
    let found = inspect_kernel();
    let device = found["devices"].as_array().unwrap().last().unwrap();
    assert_eq!((&device["module"], &device["device_id"]), (&json!("vhost_vdpa"), &json!(2)), "{found}");
    assert_eq!(device["log_quality"], Value::Null);
    let features = device["backend_features"].as_array().unwrap();
    assert!(features.contains(&json!("IOTLB_MSG_V2")) && features.contains(&json!("IOTLB_BATCH")), "{found}");
    served.end();
}
