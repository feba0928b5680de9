//! Errors of a guest.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::frontend::FrontendError;
use crate::memory::{GuestAddress, MemoryError};
use crate::ring::RingError;

/// An error that prevents a guest from running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// An impossible configuration.
    #[error("impossible guest configuration: {0}")]
    Config(String),
    /// A device that the guest cannot use.
    #[error("{name}: the guest can't use this device: {why}")]
    Unusable {
        /// The device, named after its back-end's socket.
        name: String,
        /// The reason.
        why: String,
    },
    /// The number of devices differs from the number of disks of the guest.
    #[error("the guest has {disks} disks, and {devices} back-ends are given: give one for each disk")]
    DeviceCount {
        /// Disks of the guest.
        disks: usize,
        /// Devices.
        devices: usize,
    },
    /// A byte differs from the guest's expectation.
    #[error(transparent)]
    WrongByte(#[from] Box<WrongByte>),
    /// A disk has contents that the guest would overwrite.
    #[error(
        "{name}: sector {sector} of the disk holds data that no such guest has written. Use a blank disk, or \
        --overwrite to destroy the data"
    )]
    ForeignContents {
        /// Name of the device.
        name: String,
        /// The first such sector.
        sector: u64,
    },
    /// The disk completed a request with an error.
    #[error("the disk answered status {status} to {kind} of {sectors} sectors at sector {sector}")]
    Io {
        /// Kind of request.
        kind: &'static str,
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
        /// The status byte.
        status: u8,
    },
    /// A request was not completed in time.
    #[error("queue {queue}: a request was not completed within {seconds} s ({outstanding} are outstanding)")]
    LostRequest {
        /// Number of the queue, counted across all disks.
        queue: usize,
        /// Number of outstanding requests.
        outstanding: u16,
        /// Time limit, seconds.
        seconds: u64,
    },
    /// A completion without an outstanding request.
    #[error(
        "queue {queue}: the device completed descriptor {head}, which has no outstanding request: completed twice, or never submitted"
    )]
    DuplicateCompletion {
        /// Number of the queue, counted across all disks.
        queue: usize,
        /// The head descriptor.
        head: u16,
    },
    /// The device has broken its ring.
    #[error("queue {queue}: the device has broken its ring")]
    Ring {
        /// Number of the queue, counted across all disks.
        queue: usize,
        /// The violation.
        source: RingError,
    },
    /// An error of the device.
    #[error(transparent)]
    Device(#[from] FrontendError),
    /// Guest memory is not available, or differs from the state.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A saved state that does not fit.
    #[error("the saved guest does not fit: {0}")]
    State(String),
    /// A call in the wrong state of the guest.
    #[error("the guest is {is}: {advice}")]
    WrongState {
        /// State of the guest.
        is: &'static str,
        /// Advice.
        advice: &'static str,
    },
    /// A check was ended by an [`Interrupt`](crate::frontend::Interrupt).
    #[error("the check was interrupted before its end; it had found no error")]
    Interrupted,
    /// An error of the system.
    #[error("can't {what}")]
    System {
        /// The failed operation.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
    /// An error of one of the guest's threads.
    #[error(transparent)]
    Failed(#[from] Arc<GuestError>),
}

impl GuestError {
    /// Returns true for errors of the guest, its memory or its disks, and false for errors that only prevent a check.
    pub(super) fn is_failure(&self) -> bool {
        use GuestError::{Device, Interrupted, System, WrongState};
        !matches!(self, Device(_) | Interrupted | WrongState { .. } | System { .. })
    }

    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> GuestError {
        move |source| GuestError::System { what, source: source.into() }
    }
}

/// Location of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteLocation {
    /// Guest-physical address of memory written by CPUs.
    Memory(GuestAddress),
    /// Guest-physical address of a read buffer, and the byte offset on the disk.
    Buffer(GuestAddress, u64),
}

impl fmt::Display for ByteLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ByteLocation::Memory(gpa) => write!(f, "guest memory at {:#x}", gpa.0),
            ByteLocation::Buffer(gpa, offset) => {
                write!(f, "disk offset {offset:#x}, as read to guest memory at {:#x}", gpa.0)
            }
        }
    }
}

/// A byte that differs from the value that the guest wrote or last read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("WRONG BYTE in {location}: expected {expected:#04x} of version {version}, found {found:#04x}; {diagnosis}")]
#[non_exhaustive]
pub struct WrongByte {
    /// Location of the first wrong byte.
    pub location: ByteLocation,
    /// Expected value.
    pub expected: u8,
    /// Found value.
    pub found: u8,
    /// Expected version of the page or sector; 0 if it was never written since boot.
    pub version: u64,
    /// Description of the found page or sector.
    pub diagnosis: String,
}
