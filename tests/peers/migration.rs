//! A live migration between two QEMUs, step by step, as a test wants to steer it.

use std::path::Path;

use serde_json::{Value, json};

use crate::process::wait_for;
use crate::qemu::Qemu;

/// Limits of a migration: bytes per second, and the downtime that ends it in milliseconds.
#[derive(Clone, Copy)]
pub(crate) struct Pace(u64, u64);

/// Slow enough that a guest which is dirtied all the time can't be moved.
pub(crate) const NEVER_CONVERGES: Pace = Pace(8 << 20, 1);
/// A few rounds for a guest that dirties little.
pub(crate) const GENTLE: Pace = Pace(100 << 20, 30);
/// So fast that it is done at once.
const CONVERGES: Pace = Pace(100 << 30, 2000);

/// Starts to move `source` into `destination`.
pub(crate) fn begin(source: &mut Qemu, destination: &mut Qemu, socket: &Path, multifd: bool, pace: Pace) {
    let uri = format!("unix:{}", socket.display());
    let capabilities = json!({"capabilities": [{"capability": "multifd", "state": multifd}]});
    for side in [&mut *source, &mut *destination] {
        side.qmp("migrate-set-capabilities", capabilities.clone());
    }
    limit(source, pace);
    destination.qmp("migrate-incoming", json!({"uri": uri}));
    source.qmp("migrate", json!({"uri": uri}));
}

pub(crate) fn let_converge(source: &mut Qemu) {
    limit(source, CONVERGES);
}

/// Number of times that the source has collected its dirty log: 2 means that every page was sent once.
pub(crate) fn rounds(source: &mut Qemu) -> u64 {
    let info = source.qmp("query-migrate", json!({}));
    let status = info["status"].as_str().unwrap_or("none");
    assert!(["setup", "active"].contains(&status), "the migration should still run: {info}");
    info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

/// Waits until the migration is complete on both sides; returns the source's figures.
pub(crate) fn finish(source: &mut Qemu, destination: &mut Qemu) -> Value {
    let info = wait_for("the migration completes", || {
        let info = source.qmp("query-migrate", json!({}));
        let status = info["status"].as_str().unwrap_or("none").to_owned();
        assert!(!["failed", "cancelled"].contains(&status.as_str()), "{info}");
        (status == "completed").then_some(info)
    });
    wait_for("the destination has it all", || {
        (destination.qmp("query-migrate", json!({}))["status"] == "completed").then_some(())
    });
    info
}

/// Cancels it and waits until the source is back to normal.
pub(crate) fn cancel(source: &mut Qemu) {
    source.qmp("migrate_cancel", json!({}));
    wait_for("the migration is cancelled", || {
        (source.qmp("query-migrate", json!({}))["status"] == "cancelled").then_some(())
    });
}

/// Changes the pace of a migration that may run already.
pub(crate) fn limit(source: &mut Qemu, Pace(bytes_per_second, downtime_ms): Pace) {
    let parameters = json!({"max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms});
    source.qmp("migrate-set-parameters", parameters);
}
