//! Why a migration failed, and what that means for the guest.

use crate::dirty::DirtyError;
use crate::memory::LOG_PAGE;
use crate::stream::StreamError;

use super::machine::MachineError;

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
        addresses(named),
        if named.len() as u64 == *pages { "" } else { ", …" }
    )]
    Different {
        /// Pages that differ.
        pages: u64,
        /// The first of them, by page number.
        named: Vec<u64>,
    },
    /// The machine could not do its part.
    #[error("{doing}: {cause}")]
    Machine {
        /// What was asked of it.
        doing: &'static str,
        /// Its own words.
        cause: MachineError,
    },
    /// All rounds are used up and the guest still dirties memory faster than it can be sent.
    #[error(
        "no convergence after {rounds} rounds: stopping the guest now would take {expected_ms:.0} ms. \
         Allow that with a longer downtime, or give it more bandwidth, or have the guest write less"
    )]
    NoConvergence {
        /// Rounds made.
        rounds: u32,
        /// What stopping the guest would have cost, milliseconds.
        expected_ms: f64,
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
pub struct Failure {
    /// Why.
    #[source]
    pub error: MigrateError,
    /// Whether the guest runs here. If not, the failure came after the commit, or the guest could not be resumed.
    pub source_running: bool,
}
