//! What can go wrong between a front-end and a device, in words that say what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::abi::vhost_user::Request;
use crate::memory::MemoryError;

/// Why a device did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontendError {
    /// No connection to the back-end's socket.
    #[error("can't connect to the back-end at {}: {source}: {}", path.display(), advice(source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection ended; the device's state is kept and [`reconnect`](super::Device::reconnect) installs it again.
    #[error("the back-end closed the connection at {request}: start it again and reconnect (rule R9.1)")]
    HungUp {
        /// The message that was under way.
        request: Request,
    },
    /// The back-end is silent. The connection is given up, since a late answer could be taken for another one.
    #[error(
        "no answer to {request} within {waited:?}: the back-end hangs, or what it serves from does; see which before it is \
         restarted"
    )]
    Timeout {
        /// The message without an answer.
        request: Request,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The back-end has not read the first message of this connection: it serves another front-end, or hangs.
    #[error(
        "{}: no answer to {request} within {waited:?}: the back-end has not taken up this connection. {}",
        path.display(),
        if *busy { BUSY } else { UNSERVED }
    )]
    NotServed {
        /// The socket.
        path: PathBuf,
        /// The message without an answer.
        request: Request,
        /// How long it was waited for.
        waited: Duration,
        /// Another front-end is known to be connected.
        busy: bool,
    },
    /// The wait for an answer was ended by [`Interrupt::set`](super::Interrupt::set). The answer is still owed:
    /// [`reconnect`](super::Device::reconnect) gets it.
    #[error("the wait for the answer to {request} was ended: reconnect before anything else")]
    Interrupted {
        /// The message whose answer is owed.
        request: Request,
    },
    /// The back-end has been away, or silent, for too long, or nothing waits for it any more.
    #[error("{device}: its back-end is away{}: start it again, or wait until it answers", why(.reason))]
    Unavailable {
        /// The device.
        device: String,
        /// Why what answers in the back-end's place can't go on for it, if there is something.
        reason: Option<String>,
    },
    /// The back-end understood and said no.
    #[error("the back-end refused {request} (answer {code:#x}): its log says why (rule F4.1)")]
    Refused {
        /// The message.
        request: Request,
        /// The non-zero answer.
        code: u64,
    },
    /// An answer that the protocol does not allow. The connection is given up.
    #[error("the back-end broke the protocol at {request}: {what} (rule {rule})")]
    ProtocolViolation {
        /// The message.
        request: Request,
        /// What was wrong with the answer.
        what: String,
        /// The rule that was broken.
        rule: &'static str,
    },
    /// The device can't do this.
    #[error("the device does not offer {what}: {advice}")]
    NotOffered {
        /// The feature.
        what: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// A ring number or size that the device does not have.
    #[error("ring {index} can't be used: {reason}")]
    InvalidRing {
        /// Ring index.
        index: u16,
        /// Why not.
        reason: String,
    },
    /// A region without an fd, which no device can map.
    #[error("the region at {gpa:#x} has no fd to share: make guest memory with Region::share (rule M1.1)")]
    NotShared {
        /// Guest-physical address of the region.
        gpa: u64,
    },
    /// Requests are outstanding that the restarted back-end can't know of.
    #[error(
        "ring {index} has {outstanding} requests outstanding and no inflight region: their fate is unknown; \
         use a back-end with INFLIGHT_SHMFD, or reset the device"
    )]
    Unrecoverable {
        /// Ring index.
        index: u16,
        /// Requests between the used and the available index.
        outstanding: u16,
    },
    /// Nobody knows where a packed ring goes on.
    #[error(
        "ring {index} is packed and has no inflight region: nobody knows where it goes on; \
         use a back-end with INFLIGHT_SHMFD, or reset the device"
    )]
    PackedUnrecoverable {
        /// Ring index.
        index: u16,
    },
    /// ACCESS_PLATFORM without an IOMMU.
    #[error(
        "ACCESS_PLATFORM is acknowledged, and nobody is there to translate: give the device the VMM's IOMMU first, with \
         UserDevice::set_iommu (rule T1.7)"
    )]
    NoIommu,
    /// A part of a ring that its driver has unmapped.
    #[error(
        "address {iova:#x} of a ring that runs has no translation any more: stop the ring, or reset the device (rule T1.8)"
    )]
    Untranslated {
        /// I/O virtual address.
        iova: u64,
    },
    /// The device's state did not get through its pipe.
    #[error("can't {operation} the device's state: {source}: {}", state_advice(source))]
    DeviceState {
        /// "save" or "load".
        operation: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// Requests in flight, and another shape of inflight region here than where they came from.
    #[error(
        "{requests} requests are in flight, and the inflight region differs: {here} here, {there} at the source; \
         use a back-end of the same kind, or stop rings without --inflight-migration (rule I8.3)"
    )]
    InflightMismatch {
        /// Requests marked in the region that was to be restored.
        requests: u64,
        /// Shape of this device's region.
        here: String,
        /// Shape of the region that was to be restored.
        there: String,
    },
    /// A ring, or guest memory, is not where it was said to be.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The system refused.
    #[error("can't {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl FrontendError {
    /// Whether the connection is gone, so that [`reconnect`](super::Device::reconnect) and a second try may help.
    pub fn is_hang_up(&self) -> bool {
        use FrontendError::{HungUp, NotServed, Timeout};
        matches!(self, HungUp { .. } | Timeout { .. } | NotServed { .. })
    }

    /// Returns true if the device is to be reconnected before it can be used again: the connection is gone, or answers are
    /// owed on it.
    pub(crate) fn needs_reconnect(&self) -> bool {
        self.is_hang_up() || matches!(self, FrontendError::Interrupted { .. })
    }

    /// Whether the back-end is merely not there, yet or any more, so that waiting for it may help.
    pub fn is_transient(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
        match self {
            FrontendError::Connect { source, .. } => {
                matches!(source.kind(), NotFound | ConnectionRefused | WouldBlock)
            }
            other => other.is_hang_up(),
        }
    }

    /// Whether no back-end whatsoever can go on where the last one was.
    pub fn is_unrecoverable(&self) -> bool {
        matches!(self, FrontendError::Unrecoverable { .. } | FrontendError::PackedUnrecoverable { .. })
    }

    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> FrontendError {
        move |source| FrontendError::System { what, source: source.into() }
    }
}

const BUSY: &str = "It serves another front-end, and serves one at a time: end that one, or start a back-end for each. \
                    A restart would disturb the other one's guest";
const UNSERVED: &str = "It may be serving another front-end, one at a time, or be stuck: see what it does before it is \
                        restarted";

fn why(reason: &Option<String>) -> String {
    reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default()
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::WouldBlock => "its queue of connections is full: it accepts none, see what it does",
        io::ErrorKind::NotFound => "is the back-end running, and is this its socket?",
        io::ErrorKind::ConnectionRefused => "a stale socket: start the back-end again",
        io::ErrorKind::PermissionDenied => "run as the back-end's user, or change the socket's permissions",
        io::ErrorKind::InvalidInput => "socket paths have at most 107 bytes: use a shorter one",
        _ => "check the back-end",
    }
}

fn state_advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::TimedOut => "the back-end hangs, or is too slow",
        io::ErrorKind::FileTooLarge => "it sends more than 16 MiB",
        _ => "its log may say why",
    }
}
