//! A live migration between two QEMU processes, in steps that a test controls.

use std::path::Path;

use serde_json::{Value, json};

use crate::process::wait_for;
use crate::qemu::Qemu;

/// The limits of a migration: the bandwidth in bytes per second, and the downtime in milliseconds.
#[derive(Clone, Copy)]
pub(crate) struct Pace(u64, u64);

/// So slow that the migration of a guest that writes memory all the time does not converge.
pub(crate) const NEVER_CONVERGES: Pace = Pace(8 << 20, 1);
/// A migration of a few rounds for a guest that writes little memory.
pub(crate) const GENTLE: Pace = Pace(100 << 20, 30);
/// So fast that the migration converges at once.
const CONVERGES: Pace = Pace(100 << 30, 2000);

/// Starts the migration from `source` to `destination`.
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

/// The number of times that the source has collected its dirty log. 2 means that every page was sent once.
pub(crate) fn rounds(source: &mut Qemu) -> u64 {
    let info = source.qmp("query-migrate", json!({}));
    let status = info["status"].as_str().unwrap_or("none");
    assert!(["setup", "active"].contains(&status), "the migration should still run: {info}");
    info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

/// Waits until the migration is complete on both sides. Returns the source's reply to `query-migrate`.
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

/// Cancels the migration and waits until the source reports it as cancelled.
pub(crate) fn cancel(source: &mut Qemu) {
    source.qmp("migrate_cancel", json!({}));
    wait_for("the migration is cancelled", || {
        (source.qmp("query-migrate", json!({}))["status"] == "cancelled").then_some(())
    });
}

/// Sets the limits of a migration, before it starts or while it runs.
pub(crate) fn limit(source: &mut Qemu, Pace(bytes_per_second, downtime_ms): Pace) {
    let parameters = json!({"max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms});
    source.qmp("migrate-set-parameters", parameters);
}
