//! Why a migration failed, and what that means for the guest.

use std::time::Duration;

use crate::dirty::DirtyError;
use crate::memory::LOG_PAGE;
use crate::stream::StreamError;

use super::report::GuestLocation;
use super::vm::VmError;

/// Why a migration failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The user called it off.
    #[error("cancelled")]
    Cancelled,
    /// The stream to the peer failed.
    #[error(transparent)]
    Stream(StreamError),
    /// The destination gave up and said why.
    #[error("the destination gave up: {0}")]
    Destination(String),
    /// The source gave up and said why.
    #[error("the source called the migration off: {0}")]
    Source(String),
    /// The peer sent something else than the handshake has next.
    #[error("the peer sent {found} where {wanted} was due: do both sides run the same version?")]
    Handshake {
        /// What came.
        found: String,
        /// What was due.
        wanted: &'static str,
    },
    /// Dirty pages can't be tracked.
    #[error("can't track dirty pages: {0}")]
    Dirty(#[from] DirtyError),
    /// The comparison of all memory, which the source had asked for, found differences.
    #[error(
        "{pages} pages differ from the source's after the last round, at {}{}: something writes guest memory that no \
         dirty source sees",
        addresses(first_different),
        if first_different.len() as u64 == *pages { "" } else { ", …" }
    )]
    MemoryDiffers {
        /// Pages that differ.
        pages: u64,
        /// The first of them, by page number.
        first_different: Vec<u64>,
    },
    /// The machine could not do its part.
    #[error("{doing}: {cause}")]
    Vm {
        /// What was asked of it.
        doing: &'static str,
        /// Its own words.
        cause: VmError,
    },
    /// The switchover took longer than the source allows.
    #[error("the switchover took longer than {limit:?}, while {doing}: allow it more time, or look for what is slow")]
    SwitchoverTimeout {
        /// The limit.
        limit: Duration,
        /// What took the time at its end.
        doing: &'static str,
    },
    /// A device was away for too long when the guest was to be stopped.
    #[error("the guest can't be stopped: {0}; it goes on here. Migrate again when the device is back")]
    DeviceAway(String),
    /// The migration failed, and the guest could not be made to go on here.
    #[error("{error}; the guest could not go on here: {cause}. It is paused here: \"resume\" tries again")]
    NotResumed {
        /// Why the migration failed.
        error: Box<MigrateError>,
        /// Why the guest can't go on, in the VM's words.
        cause: VmError,
    },
    /// A guest shall go on here that is not saved to a file.
    #[error("the guest can go on here only if it is saved to a file or device: anywhere else it would run twice")]
    NotAFile,
    /// The guest was saved to go on here, and could not be made to.
    #[error("the guest is saved, and could not go on here: {0}. It is paused here: \"resume\" tries again")]
    SavedNotResumed(VmError),
    /// This destination has given the migration up, for good.
    #[error("the migration was given up: {0}")]
    GivenUp(String),
    /// The guest has arrived and belongs to this destination, but could not be started. It is whole and paused.
    #[error("the guest has arrived and is paused here: {0}. \"resume\" tries again")]
    NotStarted(VmError),
    /// The destination has the guest and could not start it.
    #[error(
        "the destination has the guest, paused, and can't start it: {0}. Resume it there, then \"forget\" it here; \
         or end the destination's process, then \"resume\" it here"
    )]
    Held(String),
    /// The connection failed after the commit was sent, and the destination could not be asked.
    #[error("{error}; whether the destination runs the guest is not known: {reason}")]
    OutcomeUnknown {
        /// What went wrong after the commit.
        error: Box<MigrateError>,
        /// Why the destination did not resolve it.
        reason: String,
    },
    /// Everything was sent one way: nothing can say that the guest runs at the other end.
    #[error("everything was sent, but one way: nothing says that the guest runs at the other end")]
    OneWay,
    /// All rounds are used up and the guest still dirties memory faster than it can be sent.
    #[error(
        "no convergence after {rounds} rounds: stopping the guest now would take {expected_ms:.0} ms. \
         Allow that with a longer downtime, or {remedy}, or have the guest write less"
    )]
    NoConvergence {
        /// Rounds made.
        rounds: u32,
        /// What stopping the guest would have cost, milliseconds.
        expected_ms: f64,
        /// The remedy for what has limited the rounds ([`RoundTime::remedy`](super::RoundTime::remedy)).
        remedy: &'static str,
    },
}

/// The guest-physical addresses of pages, in words.
fn addresses(pages: &[u64]) -> String {
    pages.iter().map(|page| format!("{:#x}", page * LOG_PAGE)).collect::<Vec<_>>().join(", ")
}

impl From<StreamError> for MigrateError {
    fn from(error: StreamError) -> MigrateError {
        match error {
            StreamError::Cancelled => MigrateError::Cancelled,
            other => MigrateError::Stream(other),
        }
    }
}

/// A migration that failed at the source.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct MigrationFailure {
    /// Why.
    #[source]
    pub error: MigrateError,
    /// Where the guest is.
    pub location: GuestLocation,
}
