//! Why a guest stopped: what it found wrong, with everything there is to know about it.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::frontend::FrontendError;
use crate::memory::MemoryError;
use crate::ring::RingError;

/// Why a guest can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// A configuration that makes no guest.
    #[error("no such guest: {0}")]
    Config(String),
    /// A device that the guest can't use.
    #[error("{name}: the guest can't use this device: {why}")]
    Unusable {
        /// The device, by its back-end's socket.
        name: String,
        /// The reason.
        why: String,
    },
    /// Another number of devices than the guest has disks.
    #[error("the guest has {disks} disks, and {devices} back-ends are given: give one for each disk")]
    DeviceCount {
        /// Disks of the guest.
        disks: usize,
        /// Devices.
        devices: usize,
    },
    /// A byte is not what the guest wrote.
    #[error(transparent)]
    WrongByte(#[from] Box<WrongByte>),
    /// A disk holds something that the guest would write over.
    #[error(
        "{name}: sector {sector} of the disk holds something that no such guest has written: give it a blank disk, or \
        --overwrite to lose that"
    )]
    ForeignContents {
        /// Where the disk comes from.
        name: String,
        /// The first such sector that was found.
        sector: u64,
    },
    /// A request was answered with an error.
    #[error("the disk answered status {status} to {kind} of {sectors} sectors at sector {sector}")]
    Io {
        /// What it was.
        kind: &'static str,
        /// First sector.
        sector: u64,
        /// How many sectors.
        sectors: u32,
        /// The status byte.
        status: u8,
    },
    /// A request is lost: it was not completed for too long.
    #[error("a request of queue {queue} got no answer for {seconds} s ({outstanding} are outstanding)")]
    LostRequest {
        /// Which queue of which disk, counted through.
        queue: usize,
        /// How many requests have no answer yet.
        outstanding: u16,
        /// For how long.
        seconds: u64,
    },
    /// A completion for a request that is not outstanding.
    #[error("queue {queue} completed descriptor {head}, which is no request: twice, or never asked for")]
    DuplicateCompletion {
        /// Which queue of which disk, counted through.
        queue: usize,
        /// The head descriptor.
        head: u16,
    },
    /// The device broke its ring.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Which queue of which disk, counted through.
        queue: usize,
        /// How.
        source: RingError,
    },
    /// The device can't be driven.
    #[error(transparent)]
    Device(#[from] FrontendError),
    /// Guest memory can't be had, or is not as the state says.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A saved state that does not fit.
    #[error("the guest can't go on here: {0}")]
    State(String),
    /// Called at the wrong time.
    #[error("the guest is {is}: {advice}")]
    WrongState {
        /// What it is.
        is: &'static str,
        /// What to do first.
        advice: &'static str,
    },
    /// A check was ended by an [`Interrupt`](crate::frontend::Interrupt).
    #[error("the check was ended before all was looked at; nothing wrong was found until then")]
    Interrupted,
    /// The system refused.
    #[error("can't {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// One of its threads stopped the guest.
    #[error(transparent)]
    Failed(#[from] Arc<GuestError>),
}

impl GuestError {
    /// Returns true if something is wrong with the guest, its memory or its disks, and false for the obstacles to a
    /// check.
    pub(super) fn is_failure(&self) -> bool {
        use GuestError::{Device, Interrupted, System, WrongState};
        !matches!(self, Device(_) | Interrupted | WrongState { .. } | System { .. })
    }

    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> GuestError {
        move |source| GuestError::System { what, source: source.into() }
    }
}

/// Where a byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteLocation {
    /// Guest-physical address, of memory that CPUs wrote.
    Memory(u64),
    /// Guest-physical address, of a buffer that the disk filled from the byte offset that comes second.
    Buffer(u64, u64),
}

impl fmt::Display for ByteLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ByteLocation::Memory(gpa) => write!(f, "guest memory at {gpa:#x}"),
            ByteLocation::Buffer(gpa, offset) => {
                write!(f, "disk offset {offset:#x}, as read to guest memory at {gpa:#x}")
            }
        }
    }
}

/// A byte that is not what the guest wrote, or last read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("WRONG BYTE in {location}: expected {expected:#04x} of version {version}, found {found:#04x}; {diagnosis}")]
pub struct WrongByte {
    /// Where the first wrong byte is.
    pub location: ByteLocation,
    /// What it should be.
    pub expected: u8,
    /// What it is.
    pub found: u8,
    /// The version that its page or sector should have; 0 if it was never written since boot.
    pub version: u64,
    /// What its page or sector looks like instead.
    pub diagnosis: String,
}
