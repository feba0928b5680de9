//! What a guest's CPUs, drivers and devices know, as it is saved on one host and restored on another.

use serde::{Deserialize, Serialize};

use super::layout::GuestConfig;
use crate::abi::vhost_user::DiskGeneration;
use crate::frontend::InflightState;
use crate::ring::{self, RingBase};

/// The version of [`GuestState`] that this code writes, and the only one it reads.
pub const STATE_VERSION: u32 = 3;

/// A guest without its memory and disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// What kind of guest it is.
    pub config: GuestConfig,
    /// Its CPUs.
    pub cpus: Vec<CpuState>,
    /// Its drivers: queue by queue, disk by disk.
    pub drivers: Vec<BlkDriverState>,
    /// Its stopped devices.
    pub devices: Vec<DeviceState>,
    /// When it did something last, after which it stood still.
    pub last_action: Option<Timestamp>,
}

/// Which disks a guest has and the state of their contents, disk by disk (GET_DISK_GENERATION); `None` for one whose
/// back-end can't tell.
pub type DiskGenerations = Vec<Option<DiskGeneration>>;

/// Which disks a guest has, disk by disk (GET_DISK_IDENTITY); `None` for one whose back-end can't tell.
pub type DiskIdentities = Vec<Option<u128>>;

/// A guest that was saved to be restored at any time, while its disks can go on without it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedGuest {
    /// Its disks as they were.
    pub disks: DiskGenerations,
    /// The guest.
    pub guest: GuestState,
}

/// What is known of a guest's devices while it runs, so that others can be prepared in their place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceSetup {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// What kind of guest it is.
    pub config: GuestConfig,
    /// Its devices, which say nothing of their rings, of what is in flight, and of their own state.
    pub devices: Vec<DeviceState>,
}

/// A CPU: all it knows follows from how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// Pages written so far.
    pub steps: u64,
}

/// A disk's queue as its driver knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkDriverState {
    /// The ring.
    pub ring: ring::DriverRingState,
    /// First sector of its part of the disk.
    pub first_sector: u64,
    /// The version of each sector of that part; 0 for never written.
    pub versions: Vec<u32>,
    /// The version that the next write gets.
    pub next_version: u32,
    /// Where its random numbers are.
    pub random: u64,
    /// Its requests and what is left of former ones, slot by slot.
    pub slots: Vec<SlotState>,
    /// Requests made so far.
    pub requests: u64,
    /// Completions seen so far.
    pub completions: u64,
}

/// One request's place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// The request that is outstanding.
    pub request: Option<RequestState>,
    /// What the device read into its buffer last, if that is still to be there.
    pub retained: Option<RetainedState>,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestKind {
    /// The disk fills the buffer.
    Read,
    /// The disk takes the buffer.
    Write,
    /// Nothing but durability.
    Flush,
}

/// An outstanding request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestState {
    /// Its head descriptor.
    pub head: u16,
    /// What it does.
    pub kind: RequestKind,
    /// First sector, counted from the queue's first.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Where in the slot's buffer its data begins, bytes.
    pub offset: u64,
}

/// Sectors in a buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetainedState {
    /// First sector, counted from the queue's first.
    pub sector: u64,
    /// Where in the slot's buffer they begin, bytes.
    pub offset: u64,
    /// Their versions when they were read.
    pub versions: Vec<u32>,
}

/// A device whose rings are stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Virtio features agreed on.
    pub features: u64,
    /// Bytes of disk.
    pub capacity: u64,
    /// Most data segments of a request.
    pub segments: u32,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// Where each ring goes on.
    pub bases: Vec<RingBase>,
    /// Its inflight region.
    pub inflight: Option<InflightState>,
    /// What the device itself has saved, if it has a state of its own (rule D1.1).
    pub backend_state: Option<Vec<u8>>,
    /// How often its back-end was connected to again, in the guest's whole life.
    pub reconnects: u64,
    /// Requests that restarted back-ends found in flight, in the guest's whole life.
    pub resubmitted: u64,
}

/// A moment that another process can compare with its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// The machine's boot id: monotonic clocks of one boot can be compared.
    pub boot: String,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: u64,
    /// CLOCK_REALTIME, nanoseconds.
    pub realtime_ns: u64,
}

impl Timestamp {
    /// Nanoseconds from here to `later`: by the monotonic clock within one boot of one machine, else by the time of day,
    /// which is as good as the clocks of both machines agree.
    pub fn nanos_until(&self, later: &Timestamp) -> u64 {
        match self.boot == later.boot && !self.boot.is_empty() {
            true => later.monotonic_ns.saturating_sub(self.monotonic_ns),
            false => later.realtime_ns.saturating_sub(self.realtime_ns),
        }
    }
}
