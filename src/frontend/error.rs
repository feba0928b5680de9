//! Errors of the front-end.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::abi::vhost_user::FrontendRequest;
use crate::dirty::DirtyError;
use crate::memory::{GuestAddress, Iova, MemoryError};

/// Error of a call on a [`Device`](super::Device).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontendError {
    /// The connection to the back-end's socket failed.
    #[error("{}: cannot connect to the back-end ({})", path.display(), advice(source.kind()))]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The back-end closed the connection. The device keeps its state, and [`reconnect`](super::Device::reconnect)
    /// restores it.
    #[error("the back-end closed the connection during {request}. Start it again and reconnect (rule R9.1)")]
    HungUp {
        /// Request in progress.
        request: FrontendRequest,
    },
    /// The back-end did not reply in time. The connection is closed unless the reply stays pending, because a late
    /// reply could be mistaken for another one.
    #[error(
        "no reply to {request} within {waited:?}. The back-end or its storage may be stuck; check its log before you \
         restart it"
    )]
    Timeout {
        /// Request without a reply.
        request: FrontendRequest,
        /// Time waited for the reply.
        waited: Duration,
    },
    /// The back-end has not read the first message of this connection: it serves another front-end, or is stuck.
    #[error(
        "{}: no reply to {request} within {waited:?}: the back-end does not serve this connection. {}",
        path.display(),
        if *busy { BUSY } else { UNSERVED }
    )]
    NotServed {
        /// Path of the socket.
        path: PathBuf,
        /// Request without a reply.
        request: FrontendRequest,
        /// Time waited for the reply.
        waited: Duration,
        /// True if another front-end is known to be connected.
        busy: bool,
    },
    /// [`Interrupt::set`](super::Interrupt::set) ended the wait for a reply. The reply is still pending;
    /// [`reconnect`](super::Device::reconnect) receives it.
    #[error("the wait for the reply to {request} was interrupted. Reconnect before the next call")]
    Interrupted {
        /// Request whose reply is pending.
        request: FrontendRequest,
    },
    /// The back-end was disconnected or silent for too long, or the wait for it has ended.
    #[error("{device}: its back-end is away{}. Start it again, or wait until it replies", after_colon(.reason))]
    Unavailable {
        /// Name of the device.
        device: String,
        /// Reason why the process that answers at the socket cannot take over, if there is one.
        reason: Option<String>,
    },
    /// The back-end refused a request.
    #[error("the back-end refused {request} with {code:#x} (rule F4.1). Its log has the reason")]
    Refused {
        /// The request.
        request: FrontendRequest,
        /// The non-zero reply.
        code: u64,
    },
    /// The back-end sent a reply that the protocol does not allow. The connection is closed.
    #[error("the back-end violated the protocol: {request}: {what} (rule {rule})")]
    ProtocolViolation {
        /// The request.
        request: FrontendRequest,
        /// Description of the violation.
        what: String,
        /// Obligation of `docs/protocol.md` that was violated.
        rule: &'static str,
    },
    /// The device does not offer a feature that the call needs.
    #[error("the device does not offer {what}: {advice}")]
    NotOffered {
        /// Name of the feature.
        what: String,
        /// Advice to the user.
        advice: &'static str,
    },
    /// The ring index, size or state does not allow the call.
    #[error("ring {index}: {reason}")]
    InvalidRing {
        /// Ring index.
        index: u16,
        /// Reason.
        reason: String,
    },
    /// A region has no file descriptor, so no device can map it.
    #[error("the region at {:#x} has no file descriptor. Create guest memory with Region::share (rule M1.1)", gpa.0)]
    NotShared {
        /// Guest-physical address of the region.
        gpa: GuestAddress,
    },
    /// Requests are outstanding, and the restarted back-end has no record of them.
    #[error(
        "ring {index} has {outstanding} requests outstanding and no inflight region: their fate is unknown; \
         use a back-end with INFLIGHT_SHMFD, or reset the device"
    )]
    Unrecoverable {
        /// Ring index.
        index: u16,
        /// Number of requests between the used and the available index.
        outstanding: u16,
    },
    /// A packed ring has no inflight region, so its position is not known after a restart.
    #[error(
        "ring {index} is packed and has no inflight region: its position is unknown; \
         use a back-end with INFLIGHT_SHMFD, or reset the device"
    )]
    PackedUnrecoverable {
        /// Ring index.
        index: u16,
    },
    /// ACCESS_PLATFORM was acknowledged without an IOMMU.
    #[error(
        "ACCESS_PLATFORM needs an IOMMU. Call UserDevice::set_iommu before the features are acknowledged (rule T1.7)"
    )]
    NoIommu,
    /// The driver has unmapped a part of a running ring.
    #[error("address {iova:#x} of a running ring has no translation. Stop the ring, or reset the device (rule T1.8)")]
    Untranslated {
        /// I/O virtual address.
        iova: Iova,
    },
    /// The transfer of the device state failed.
    #[error("cannot {operation} the device state ({})", state_advice(source.kind()))]
    DeviceState {
        /// "save" or "load".
        operation: &'static str,
        /// Error of the pipe.
        source: io::Error,
    },
    /// Requests are in flight, and the inflight region of this device differs from the one at the source.
    #[error(
        "{requests} requests are in flight, and the inflight region differs: {here} here, {there} at the source. \
         Use a back-end of the same kind, or stop rings without --inflight-migration (rule I8.3)"
    )]
    InflightMismatch {
        /// Number of requests marked in the region to be restored.
        requests: u64,
        /// Layout of this device's region.
        here: String,
        /// Layout of the region to be restored.
        there: String,
    },
    /// A device of the kernel cannot be opened.
    #[error("{}: cannot open the device ({advice})", path.display())]
    OpenDevice {
        /// Path of the device.
        path: PathBuf,
        /// Advice to the user.
        advice: String,
        /// Error of the system.
        source: io::Error,
    },
    /// The kernel refused a call on a vhost device.
    #[error("{device}: {call}: {reason}")]
    Vhost {
        /// Path of the device.
        device: String,
        /// Name of the ioctl.
        call: &'static str,
        /// Cause and remedy.
        reason: &'static str,
        /// Error of the system.
        source: io::Error,
    },
    /// The interface behind a vhost-net device is gone.
    #[error("{device}: the tap has no interface any more. Create it again, and open another device with it")]
    TapGone {
        /// Path of the device.
        device: String,
        /// Error of the system.
        source: io::Error,
    },
    /// A vDPA device has not started.
    #[error(
        "{device}: the device did not start, its status is {status:#x}. Its log, or that of the process that implements \
         it, may have the reason (rule K5.1)"
    )]
    NotStarted {
        /// Path of the device.
        device: String,
        /// Its status.
        status: u8,
    },
    /// A device that is to be stopped has not completed its requests.
    #[error(
        "{device}: ring {index} has {in_flight} requests in flight after {waited:?}. The device or its storage may be \
         stuck; stop the ring again later (rule K5.5)"
    )]
    InFlight {
        /// Path of the device.
        device: String,
        /// Ring index.
        index: u16,
        /// Number of requests that the device has taken and not completed.
        in_flight: u16,
        /// Time waited for them.
        waited: Duration,
    },
    /// The dirty log is smaller than guest memory. The kernel does not know its size, and would write beyond it.
    #[error(
        "the dirty log has {pages} pages, and guest memory ends at {:#x}. Call start_logging with a larger log first \
         (rule K1.4)", memory_end.0
    )]
    LogTooSmall {
        /// Number of pages that the log has a bit for.
        pages: u64,
        /// Guest-physical address after the last byte of memory.
        memory_end: GuestAddress,
    },
    /// The dirty log cannot be mapped, or not be locked in memory.
    #[error(transparent)]
    Log(#[from] DirtyError),
    /// A ring or a range of guest memory is not mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// Error of the system.
        source: io::Error,
    },
}

impl FrontendError {
    /// Returns true if the connection is lost. [`reconnect`](super::Device::reconnect) and a second call may succeed.
    pub fn is_hang_up(&self) -> bool {
        use FrontendError::{HungUp, NotServed, Timeout};
        matches!(self, HungUp { .. } | Timeout { .. } | NotServed { .. })
    }

    /// Returns true if the device needs a reconnection before the next call: the connection is lost, or replies are
    /// pending on it.
    pub(crate) fn needs_reconnect(&self) -> bool {
        self.is_hang_up() || matches!(self, FrontendError::Interrupted { .. })
    }

    /// Returns true if the back-end is not reachable yet, or no longer, so that waiting may help.
    pub fn is_transient(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
        match self {
            FrontendError::Connect { source, .. } => {
                matches!(source.kind(), NotFound | ConnectionRefused | WouldBlock)
            }
            other => other.is_hang_up(),
        }
    }

    /// Returns true if no back-end can resume where the last one was.
    pub fn is_unrecoverable(&self) -> bool {
        matches!(self, FrontendError::Unrecoverable { .. } | FrontendError::PackedUnrecoverable { .. })
    }

    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> FrontendError {
        move |source| FrontendError::System { what, source: source.into() }
    }
}

const BUSY: &str = "It serves another front-end, and serves one at a time. End that one, or start a back-end for each. \
                    A restart would disturb the other front-end's guest";
const UNSERVED: &str = "It may be serving another front-end (it serves one at a time) or may be stuck; check its log before \
                        it is restarted";

fn after_colon(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
}

fn advice(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::WouldBlock => "its queue of connections is full: it does not accept any; check its log",
        io::ErrorKind::NotFound => "check that it is running and that this is its socket",
        io::ErrorKind::ConnectionRefused => "this is a stale socket: start the back-end again",
        io::ErrorKind::PermissionDenied => "run as the back-end's user, or change the permissions of the socket",
        io::ErrorKind::InvalidInput => "socket paths have at most 107 bytes: use a shorter one",
        _ => "check its log",
    }
}

fn state_advice(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::TimedOut => "the back-end is stuck or too slow",
        io::ErrorKind::FileTooLarge => "the state is larger than 16 MiB",
        _ => "the log of the back-end may have the reason",
    }
}
