//! State of a guest's CPUs, drivers and devices, saved on one host and restored on another.

use serde::{Deserialize, Serialize};

use super::layout::GuestConfig;
use crate::abi::vhost_user::DiskGeneration;
use crate::abi::virtio::VirtioFeatures;
use crate::frontend::InflightState;
use crate::ring::{self, RingBase};

/// The version of [`GuestState`] that this code reads and writes.
pub const STATE_VERSION: u32 = 3;

/// State of a guest without its memory and disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestState {
    /// Version of the state. A guest is restored from its own version only.
    pub version: u32,
    /// Configuration of the guest.
    pub config: ConfigState,
    /// State of the CPUs.
    pub cpus: Vec<CpuState>,
    /// State of the drivers, in order of disks and queues.
    pub drivers: Vec<BlkDriverState>,
    /// State of the stopped devices.
    pub devices: Vec<DeviceState>,
    /// Time of the last action.
    pub last_action: Option<Timestamp>,
}

/// Defines [`ConfigState`] from the fields of [`GuestConfig`], and the conversions in both directions.
macro_rules! config_state {
    ($($field:ident: $kind:ty,)*) => {
        /// The configuration of a guest as it is in a stream: the fields of [`GuestConfig`], in the order of their encoding.
        #[allow(missing_docs, reason = "the fields of `GuestConfig` have the texts")]
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub struct ConfigState {
            $(pub $field: $kind,)*
        }

        impl From<GuestConfig> for ConfigState {
            fn from(GuestConfig { $($field,)* }: GuestConfig) -> ConfigState {
                ConfigState { $($field,)* }
            }
        }

        impl From<ConfigState> for GuestConfig {
            fn from(ConfigState { $($field,)* }: ConfigState) -> GuestConfig {
                GuestConfig { $($field,)* }
            }
        }
    };
}

config_state! {
    memory: u64,
    high: u64,
    prefault: bool,
    cpus: usize,
    working_set: u64,
    cold: u64,
    dirty_rate: u64,
    repeated: u8,
    disks: usize,
    queues: u16,
    queue_size: u16,
    packed: bool,
    inflight_migration: bool,
    depth: u16,
    request_rate: Option<u64>,
    disk_area: u64,
    blank_disks: bool,
    request_timeout: u64,
    reconnect_timeout: Option<u64>,
    seed: u64,
}

/// Identity and generation of each disk (GET_DISK_GENERATION); `None` if the back-end has none.
pub type DiskGenerations = Vec<Option<DiskGeneration>>;

/// Identity of each disk (GET_DISK_IDENTITY); `None` if the back-end has none.
pub type DiskIdentities = Vec<Option<u128>>;

/// A saved guest, which can be restored at any time, while its disks may change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedGuest {
    /// The disks at the save.
    pub disks: DiskGenerations,
    /// The guest.
    pub guest: GuestState,
}

/// Description of a guest's devices while it runs, for preparing others in their place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceSetup {
    /// Version of the state. A guest is restored from its own version only.
    pub version: u32,
    /// Configuration of the guest.
    pub config: ConfigState,
    /// The devices, without rings, requests in flight and internal state.
    pub devices: Vec<DeviceState>,
}

/// State of a CPU, which follows from its number of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// Number of pages written.
    pub steps: u64,
}

/// State of the driver of one queue of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkDriverState {
    /// The ring.
    pub ring: ring::DriverRingState,
    /// First sector of the queue's part of the disk.
    pub first_sector: u64,
    /// The version of each sector of that part; 0 for never written.
    pub versions: Vec<u32>,
    /// Version of the next write.
    pub next_version: u32,
    /// State of the random number generator.
    pub random: u64,
    /// Requests and retained data, by slot.
    pub slots: Vec<SlotState>,
    /// Number of requests made.
    pub requests: u64,
    /// Number of completions.
    pub completions: u64,
}

/// State of one request slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// The outstanding request.
    pub request: Option<RequestState>,
    /// Data of the last read, if it must still be in the buffer.
    pub retained: Option<RetainedState>,
}

/// Kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestKind {
    /// Reads the disk into the buffer.
    Read,
    /// Writes the buffer to the disk.
    Write,
    /// Flushes the disk's cache.
    Flush,
}

/// An outstanding request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestState {
    /// The head descriptor.
    pub head: u16,
    /// Kind of request.
    pub kind: RequestKind,
    /// First sector, counted from the queue's first.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Offset of the data in the slot's buffer, bytes.
    pub offset: u64,
}

/// Sectors retained in a buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetainedState {
    /// First sector, counted from the queue's first.
    pub sector: u64,
    /// Offset in the slot's buffer, bytes.
    pub offset: u64,
    /// Versions of the sectors when they were read.
    pub versions: Vec<u32>,
}

/// State of a device with stopped rings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Negotiated virtio features.
    pub features: VirtioFeatures,
    /// Size of the disk, bytes.
    pub capacity: u64,
    /// Maximum number of data segments of a request.
    pub segments: u32,
    /// Size of a logical block, bytes.
    pub block_size: u32,
    /// Base of each ring.
    pub bases: Vec<RingBase>,
    /// Contents of the inflight region.
    pub inflight: Option<InflightState>,
    /// State saved by the device itself, if it has any (rule D1.1).
    pub backend_state: Option<Vec<u8>>,
    /// Number of reconnections, in the guest's whole life.
    pub reconnects: u64,
    /// Requests that restarted back-ends found in flight, in the guest's whole life.
    pub resubmitted: u64,
}

/// A time that can be compared with a time of another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// The boot id: monotonic clocks of one boot can be compared.
    pub boot: String,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: u64,
    /// CLOCK_REALTIME, nanoseconds.
    pub realtime_ns: u64,
}

impl Timestamp {
    /// Returns the nanoseconds until `later`: by the monotonic clock within one boot, else by the real-time clock,
    /// which is as accurate as the clocks of both hosts agree.
    pub fn nanos_until(&self, later: &Timestamp) -> u64 {
        match self.boot == later.boot && !self.boot.is_empty() {
            true => later.monotonic_ns.saturating_sub(self.monotonic_ns),
            false => later.realtime_ns.saturating_sub(self.realtime_ns),
        }
    }
}
