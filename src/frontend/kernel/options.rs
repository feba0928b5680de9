//! Options of the kernel's vhost devices.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

/// Options of a [`KernelDevice`](super::KernelDevice).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct KernelOptions {
    /// Path of the device, if it is not the usual one, such as `/dev/vhost-net`.
    pub path: Option<PathBuf>,
    /// Time for which the device polls a ring before it waits for a kick; 0 for none. In whole microseconds.
    pub busy_poll: Duration,
    /// Number of additional threads of the kernel between which the rings are divided. With 0 one thread serves them
    /// all.
    pub workers: u16,
    /// Type of the kernel's threads, if it is not the kernel's default.
    pub worker_type: Option<WorkerType>,
    /// True if the driver is a legacy one (without VERSION_1) and big-endian.
    pub big_endian: bool,
}

impl KernelOptions {
    setters! {
        with_path: path: Option<PathBuf>,
        with_busy_poll: busy_poll: Duration,
        with_workers: workers: u16,
        with_worker_type: worker_type: Option<WorkerType>,
        with_big_endian: big_endian: bool,
    }
}

/// Type of the threads in which the kernel serves rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerType {
    /// Kernel threads, as before Linux 6.4.
    KernelThread,
    /// Tasks of the process that owns the device. Its limits and cgroups apply to them.
    OwnerTask,
}
