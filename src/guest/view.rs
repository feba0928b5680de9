//! A view of a guest that never waits: counters, its devices' connections, its failure.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::driver::DriverCounters;
use super::error::GuestError;
use super::signal::GuestFailure;

/// Counters of a guest over its whole life, including earlier hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GuestStats {
    /// Disk requests made.
    pub requests: u64,
    /// Disk requests completed.
    pub completions: u64,
    /// Disk requests outstanding.
    pub outstanding: u64,
    /// Completions without an outstanding request.
    pub duplicates: u64,
    /// Requests without an answer that have stopped the guest.
    pub lost: u64,
    /// Pages written by CPUs.
    pub pages: u64,
    /// Number of reconnections to back-ends.
    pub reconnects: u64,
    /// Requests that restarted back-ends found in flight.
    pub resubmitted: u64,
}

/// The connection to a device's back-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DeviceConnection {
    /// Name of the device.
    pub name: String,
    /// Milliseconds since the back-end disconnected; `None` while it is connected.
    pub away_ms: Option<u64>,
    /// While the back-end is unavailable: the reason that a reconnection was refused, if there is one.
    pub refused: Option<String>,
    /// Number of reconnections, in the guest's whole life.
    pub reconnects: u64,
    /// Size of the disk, bytes. It may have grown since the guest started to use it.
    pub capacity: u64,
    /// Broken rings. They complete no requests until they are started again.
    pub broken_rings: Vec<u16>,
}

/// A view of a guest for any thread. It waits neither for the guest nor for its devices, and keeps neither alive.
pub struct GuestView {
    pub(super) steps: Vec<Arc<AtomicU64>>,
    pub(super) counters: Vec<Arc<DriverCounters>>,
    pub(super) disks: Vec<Weak<Disk>>,
    pub(super) failure: Arc<GuestFailure>,
    pub(super) memory_bytes: u64,
}

impl GuestView {
    /// Returns the guest's counters.
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

    /// Returns the state of the devices' connections, in order of the disks.
    pub fn connections(&self) -> Vec<DeviceConnection> {
        let connection_of = |disk: Arc<Disk>| DeviceConnection {
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
        self.live_disks().map(connection_of).collect()
    }

    /// Returns the error that has stopped the guest, if there is one.
    pub fn failure(&self) -> Option<Arc<GuestError>> {
        self.failure.error().cloned()
    }

    /// Returns the size of the guest's memory, bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn live_disks(&self) -> impl Iterator<Item = Arc<Disk>> {
        self.disks.iter().filter_map(Weak::upgrade)
    }
}
