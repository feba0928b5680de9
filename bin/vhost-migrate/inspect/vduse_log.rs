//! `inspect vduse-log`: prints the record and the requests in flight in the log of a VDUSE device.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};
use vhost_migrate::abi::features::feature_names;
use vhost_migrate::inflight::RingKind;
use vhost_migrate::ring::RingBase;
use vhost_migrate::unstable::with_causes;
use vhost_migrate::vduse::{RECORD_BYTES, VduseRecord};

use super::inflight::{RegionArguments, RegionFile, list_queues};
use super::{Inspection, LinePrinter, open};

pub(super) fn inspect(file: &Path, requests: u32, lines: &LinePrinter) -> Result<Inspection, String> {
    let with_path = |error: String| format!("{}: {error}", file.display());
    let opened = open(file)?;
    let mut page = vec![0; RECORD_BYTES as usize];
    let read = opened.read_exact_at(&mut page, 0);
    read.map_err(|error| with_path(format!("the record of {RECORD_BYTES} bytes can't be read: {error}")))?;
    let record = VduseRecord::read(&page).map_err(|error| with_path(with_causes(&error).to_string()))?;
    let packed = record.ring_kind() == RingKind::Packed;
    let [offered, features] = [record.offered, record.features].map(|bits| feature_names(bits, Some(record.device_id)));
    lines.print(format_args!(
        "virtio device {}, data {:#x}, boot {}, inode {}, status {:#x}{}, {} queues of {} entries",
        record.device_id,
        record.data_id,
        uuid(record.instance.boot_id),
        record.instance.inode,
        record.status,
        if record.suspended { ", suspended" } else { "" },
        record.queues(),
        record.queue_size
    ));
    lines.print(format_args!("offered: {offered}"));
    lines.print(format_args!("driver:  {features}"));
    for (queue, base) in record.stopped_at.iter().enumerate().filter_map(|(queue, base)| Some((queue, (*base)?))) {
        lines.print(format_args!("queue {queue} is stopped at {base:?}"));
    }
    let region = RegionArguments::of_log(record.queues(), record.queue_size, packed, requests);
    let bytes = RegionFile::after(opened, RECORD_BYTES).map_err(with_path)?;
    let queues = list_queues(&bytes, &region, lines).map_err(with_path)?;
    Ok(json!({
        "boot_id": uuid(record.instance.boot_id),
        "inode": record.instance.inode,
        "device_id": record.device_id,
        "data_id": format!("{:#x}", record.data_id),
        "queue_size": record.queue_size,
        "offered": record.offered.bits(),
        "features": record.features.bits(),
        "status": record.status,
        "suspended": record.suspended,
        "config": record.config,
        "stopped_at": record.stopped_at.iter().map(|base| json!(base.map(RingBase::bits))).collect::<Vec<Value>>(),
        "queues": queues,
    })
    .into())
}

fn uuid(bytes: [u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(bytes));
    let groups = [0..8, 8..12, 12..16, 16..20, 20..32];
    groups.map(|group| digits.get(group).unwrap_or_default()).join("-")
}
