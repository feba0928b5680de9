//! Events of a migration and its final report.

use serde::{Deserialize, Serialize};

use crate::dirty::LogQuality;

/// Location of the guest, as far as the source knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum GuestLocation {
    /// The guest runs at the source.
    RunningHere,
    /// The guest is paused at the source, and nowhere else.
    PausedHere,
    /// The destination runs the guest, or a complete file holds it. The source has released it.
    HandedOver,
    /// The commit was sent and its outcome is unknown. The source keeps the guest paused until the operator decides.
    OutcomeUnknown,
}

/// An event of a migration: for orchestrators, a JSON object with an `event` field.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum MigrationEvent {
    /// The destination has accepted the guest's memory layout.
    Started {
        /// Bytes of guest memory.
        guest_bytes: u64,
        /// Number of channels.
        channels: u16,
        /// Compression of pages.
        codec: String,
        /// Quality of the least exact dirty log.
        #[serde(default)]
        log_quality: LogQuality,
    },
    /// Pages are being sent. At most a few events per second.
    Progress {
        /// Number of the round, from 0.
        round: u32,
        /// Pages of this round not sent yet.
        pages_left: u64,
        /// Bytes of guest memory sent per second since the last event, zero pages included.
        bytes_per_second: f64,
    },
    /// A round has been sent, and the pages dirtied meanwhile have been harvested.
    Round(RoundReport),
    /// Rounds no longer reduce the number of pages left: the migration will probably not converge.
    Stalled {
        /// The problem and advice.
        message: String,
    },
    /// The guest is being stopped.
    Switchover {
        /// Number of pages known to be dirty; the last harvest may add some.
        pages_left: u64,
        /// Expected downtime, milliseconds.
        expected_downtime_ms: f64,
    },
    /// The guest cannot be stopped yet, because the back-end of a device is unavailable. Rounds continue until it is
    /// back.
    Waiting {
        /// The device and the reason.
        message: String,
    },
    /// A warning for the user: a disk that a restore cannot compare, or an obstacle to the migration.
    Warning {
        /// The warning.
        message: String,
    },
    /// The connection failed after the commit was sent. The source queries the outcome.
    Asking {
        /// The error of the connection.
        message: String,
    },
    /// The destination or a complete file has the guest.
    Completed(MigrationReport),
    /// The migration ended without success.
    Failed {
        /// The reason and advice.
        message: String,
        /// Location of the guest.
        location: GuestLocation,
    },
}

/// A completed round of pre-copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RoundReport {
    /// Number of the round, from 0.
    pub round: u32,
    /// Pages sent with data.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Bytes sent in this round.
    pub wire_bytes: u64,
    /// Duration of the round, milliseconds.
    pub ms: f64,
    /// Pages dirtied during the round, which are left to send.
    pub pages_left: u64,
    /// Dirty rate during the round, bytes per second. Each page counts once.
    pub dirty_bytes_per_second: f64,
    /// Expected downtime if the guest were stopped now, milliseconds.
    pub expected_downtime_ms: f64,
}

/// Figures of a completed migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MigrationReport {
    /// Time from the first connection until the guest runs at the destination, milliseconds.
    pub total_ms: f64,
    /// Time from stopping the guest until the destination confirms that it runs, milliseconds. For a file: until the
    /// last byte was written.
    pub downtime_ms: f64,
    /// Time between the guest's last action here and its first there by its own clock, milliseconds; only if both share
    /// a clock.
    pub observed_downtime_ms: Option<f64>,
    /// Number of rounds, including the last with the guest stopped.
    pub rounds: u32,
    /// Bytes of guest memory.
    pub guest_bytes: u64,
    /// Bytes sent.
    pub wire_bytes: u64,
    /// Pages sent, zero pages included.
    pub pages_sent: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Average dirty rate over all rounds, bytes per second.
    pub dirty_rate_bytes_per_s: f64,
    /// Quality of the least exact dirty log.
    #[serde(default)]
    pub log_quality: LogQuality,
    /// Time spent on hashing all memory with the guest stopped, milliseconds; only with verification.
    #[serde(default)]
    pub verify_ms: Option<f64>,
}
