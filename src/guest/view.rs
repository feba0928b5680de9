//! What can be known of a guest without waiting for it: counters, its devices' connections, its failure.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::driver::DriverCounters;
use super::error::GuestError;
use super::signal::GuestFailure;

/// What a guest has done so far, here and on hosts before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Disk requests made.
    pub requests: u64,
    /// Disk requests completed.
    pub completions: u64,
    /// Disk requests under way.
    pub outstanding: u64,
    /// Completions of what was no request.
    pub duplicates: u64,
    /// Requests that never got an answer, when that has stopped the guest.
    pub lost: u64,
    /// Pages that CPUs have written.
    pub pages: u64,
    /// Times a back-end came back.
    pub reconnects: u64,
    /// Requests that restarted back-ends found unfinished.
    pub resubmitted: u64,
}

/// The connection to a device's back-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConnection {
    /// What the device is called.
    pub name: String,
    /// Milliseconds since its back-end went away; `None` while it is there.
    pub away_ms: Option<u64>,
    /// While it is away: why what answers in its place can't go on for it, if there is something.
    pub refused: Option<String>,
    /// Times its back-end came back, in the guest's whole life.
    pub reconnects: u64,
    /// Bytes of its disk, which may have grown since the guest began to use it.
    pub capacity: u64,
    /// Rings that are broken: nothing more comes from them until they are started anew.
    pub broken_rings: Vec<u16>,
}

/// A view of a guest from any thread, which waits neither for the guest nor for its devices. It keeps neither alive.
pub struct GuestView {
    pub(super) steps: Vec<Arc<AtomicU64>>,
    pub(super) counters: Vec<Arc<DriverCounters>>,
    pub(super) disks: Vec<Weak<Disk>>,
    pub(super) failure: Arc<GuestFailure>,
    pub(super) memory_bytes: u64,
}

impl GuestView {
    /// What the guest has done so far.
    pub fn stats(&self) -> GuestStats {
        let sum = |of: fn(&DriverCounters) -> &AtomicU64| {
            self.counters.iter().map(|counters| of(counters).load(Ordering::Relaxed)).sum()
        };
        GuestStats {
            requests: sum(|counters| &counters.requests),
            completions: sum(|counters| &counters.completions),
            outstanding: sum(|counters| &counters.outstanding),
            duplicates: sum(|counters| &counters.duplicates),
            lost: match self.failure().as_deref() {
                Some(GuestError::LostRequest { outstanding, .. }) => u64::from(*outstanding),
                _ => 0,
            },
            pages: self.steps.iter().map(|steps| steps.load(Ordering::Relaxed)).sum(),
            reconnects: self.live_disks().map(|disk| disk.reconnects.load(Ordering::Relaxed)).sum(),
            resubmitted: self.live_disks().map(|disk| disk.resubmitted.load(Ordering::Relaxed)).sum(),
        }
    }

    /// How the devices' connections are, disk by disk.
    pub fn connections(&self) -> Vec<DeviceConnection> {
        let of = |disk: Arc<Disk>| DeviceConnection {
            name: disk.name.clone(),
            away_ms: disk.away_for().map(|time| time.as_millis() as u64),
            refused: disk.refusal_reason(),
            reconnects: disk.reconnects.load(Ordering::Relaxed),
            capacity: disk.capacity.load(Ordering::Relaxed),
            broken_rings: (0..)
                .zip(&disk.doorbells)
                .filter(|(_, doorbells)| doorbells.broken.load(Ordering::Relaxed))
                .map(|(index, _)| index)
                .collect(),
        };
        self.live_disks().map(of).collect()
    }

    /// Why the guest has stopped by itself, if it has.
    pub fn failure(&self) -> Option<Arc<GuestError>> {
        self.failure.error().cloned()
    }

    /// Bytes of its memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn live_disks(&self) -> impl Iterator<Item = Arc<Disk>> {
        self.disks.iter().filter_map(Weak::upgrade)
    }
}
