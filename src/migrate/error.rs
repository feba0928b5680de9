//! Errors of a migration, and the resulting location of the guest.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use crate::dirty::DirtyError;
use crate::memory::PageNumber;
use crate::stream::StreamError;
use crate::sys::with_causes::with_causes;

use super::report::GuestLocation;
use super::vm::VmError;

/// An error of a migration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The user cancelled the migration.
    #[error("cancelled")]
    Cancelled,
    /// The stream to the peer failed.
    #[error(transparent)]
    Stream(StreamError),
    /// The destination failed, with its reason.
    #[error("the destination failed: {0}")]
    Destination(String),
    /// The source cancelled or failed, with its reason.
    #[error("the source ended the migration: {0}")]
    Source(String),
    /// The peer sent a message that breaks the order of the handshake.
    #[error("the peer sent {found}, expected {wanted}. Do both sides run the same version?")]
    Handshake {
        /// The received message.
        found: String,
        /// The expected message.
        wanted: &'static str,
    },
    /// Dirty pages cannot be tracked.
    #[error("can't track dirty pages")]
    Dirty(#[from] DirtyError),
    /// The comparison of all memory, requested by the source, found differences.
    #[error(
        "{pages} pages differ from the source's after the last round, at {}{}: something writes guest memory that no \
         dirty source sees",
        addresses(first_different),
        if first_different.len() as u64 == *pages { "" } else { ", …" }
    )]
    MemoryDiffers {
        /// Number of different pages.
        pages: u64,
        /// The first different page numbers.
        first_different: Vec<PageNumber>,
    },
    /// The VM reported an error.
    #[error("{doing} failed")]
    Vm {
        /// The failed operation.
        doing: &'static str,
        /// The VM's error.
        #[source]
        cause: VmError,
    },
    /// The switchover exceeded its time limit.
    #[error("the switchover took longer than {limit:?}, while {doing}: allow it more time, or look for what is slow")]
    SwitchoverTimeout {
        /// The limit.
        limit: Duration,
        /// The operation at the end of the time.
        doing: &'static str,
    },
    /// A device was unavailable for too long when the guest was to be stopped.
    #[error("the guest can't be stopped and keeps running here: {0}. Migrate again when the device is back")]
    DeviceAway(String),
    /// The migration failed, and the guest could not resume here.
    #[error("{}. The guest could not resume here and is paused (run \"resume\" to try again)", with_causes(error))]
    NotResumed {
        /// The error of the migration.
        error: Box<MigrateError>,
        /// The error of resuming the guest.
        #[source]
        cause: VmError,
    },
    /// The guest is to continue here, and the destination is not a file or device.
    #[error("the guest can continue here only if it is saved to a file or device: anywhere else it would run twice")]
    NotAFile,
    /// The guest was saved and was to continue here, and could not resume.
    #[error("the guest is saved, but could not resume here and is paused (run \"resume\" to try again)")]
    SavedNotResumed(#[source] VmError),
    /// This destination has given up the migration for good.
    #[error("the migration was given up: {0}")]
    GivenUp(String),
    /// The guest has arrived and belongs to this destination, but could not be started. It is intact and paused.
    #[error("the guest has arrived and could not be started; it is paused here (run \"resume\" to try again)")]
    NotStarted(#[source] VmError),
    /// The destination has the guest and could not start it.
    #[error(
        "the destination has the guest, paused, and can't start it: {0}. Resume it there, then \"forget\" it here; \
         or end the destination's process, then \"resume\" it here"
    )]
    Held(String),
    /// The connection failed after the commit was sent, and the outcome query failed.
    #[error("it is unknown if the destination runs the guest ({reason})")]
    OutcomeUnknown {
        /// The error after the commit.
        #[source]
        error: Box<MigrateError>,
        /// The result of the outcome query.
        reason: String,
    },
    /// Everything was sent one way: nothing confirms that the guest runs at the other end.
    #[error("everything was sent one way: nothing confirms that the guest runs at the other end")]
    OneWay,
    /// All rounds were used, and the guest still dirties memory faster than it can be sent.
    #[error(
        "no convergence after {rounds} rounds: stopping the guest now would take {expected_ms:.0} ms. \
         Allow that with a longer downtime, or {remedy}, or have the guest write less"
    )]
    NoConvergence {
        /// Rounds made.
        rounds: u32,
        /// Expected downtime after the last round, milliseconds.
        expected_ms: f64,
        /// The remedy for the limiting factor ([`RoundTime::remedy`](super::RoundTime::remedy)).
        remedy: &'static str,
    },
}

/// Lists the guest-physical addresses of pages.
fn addresses(pages: &[PageNumber]) -> String {
    pages.iter().map(|page| format!("{:#x}", page.address().0)).collect::<Vec<_>>().join(", ")
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
#[derive(Debug)]
pub struct MigrationFailure {
    /// The error.
    pub error: MigrateError,
    /// Location of the guest.
    pub location: GuestLocation,
}

/// The text of the error.
impl fmt::Display for MigrationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// The source is that of the error, because the text is.
impl Error for MigrationFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}
