//! What a migration tells while it runs and when it ends. Nothing here decides anything.

use serde::{Deserialize, Serialize};

/// Where the guest is, as far as the source of a migration knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum GuestLocation {
    /// It runs at the source.
    RunningHere,
    /// It is at the source, paused, and nowhere else.
    PausedHere,
    /// The destination runs it, or a complete file holds it. The source has let go of it.
    HandedOver,
    /// The commit was sent and the destination has not said what came of it. The source keeps the guest, paused, until
    /// the operator decides.
    OutcomeUnknown,
}

/// One step of a migration, as an orchestrator reads it: a JSON object with an `event` field.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum MigrationEvent {
    /// The destination has accepted the guest's memory layout.
    Started {
        /// Bytes of guest memory.
        guest_bytes: u64,
        /// Connections that carry pages.
        channels: u16,
        /// How pages are compressed.
        codec: String,
    },
    /// Pages are going out; several per second at the most.
    Progress {
        /// Number of the round, from 0.
        round: u32,
        /// Pages of this round not sent yet.
        pages_left: u64,
        /// Bytes of guest memory sent per second since the last such event, zero pages included.
        bytes_per_second: f64,
    },
    /// A round has been sent and the dirty pages since have been harvested.
    Round(RoundReport),
    /// Rounds no longer shrink what is left: as things stand the migration will not end by itself.
    Stalled {
        /// What is wrong and what the user can change.
        message: String,
    },
    /// The guest is being stopped.
    Switchover {
        /// Pages known to be dirty; the last harvest may add some.
        pages_left: u64,
        /// Predicted stop of the guest, milliseconds.
        expected_downtime_ms: f64,
    },
    /// The guest can't be stopped yet: a device's back-end is away. Rounds go on until it is back.
    Waiting {
        /// Which device, and why.
        message: String,
    },
    /// Something that the user should know: of the guest that is handed over, as a disk that a restore can't compare, or of an
    /// obstacle to the migration.
    Warning {
        /// In words.
        message: String,
    },
    /// The connection failed after the commit was sent: the destination is asked what came of it.
    Asking {
        /// What went wrong.
        message: String,
    },
    /// The guest is handed over.
    Completed(MigrationReport),
    /// The migration ended without success.
    Failed {
        /// Why, and what to do about it.
        message: String,
        /// Where the guest is.
        location: GuestLocation,
    },
}

/// One finished round of pre-copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Number of the round, from 0.
    pub round: u32,
    /// Pages sent with their contents.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Bytes put on the wire in this round.
    pub wire_bytes: u64,
    /// Length of the round, milliseconds.
    pub ms: f64,
    /// Pages dirtied meanwhile, left to send.
    pub pages_left: u64,
    /// Bytes of pages dirtied per second during the round, each page counted once.
    pub dirty_bytes_per_second: f64,
    /// What stopping the guest now would cost, milliseconds.
    pub expected_downtime_ms: f64,
}

/// A completed migration in figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// From the first connection to the guest running at the destination, milliseconds.
    pub total_ms: f64,
    /// From the order to stop the guest to the destination's word that it runs, milliseconds. A file has no such
    /// word: then until the last byte was written.
    pub downtime_ms: f64,
    /// What the guest's own clock saw between its last action here and its first there, milliseconds; only where both
    /// share a clock.
    pub observed_downtime_ms: Option<f64>,
    /// Rounds, the last with the guest stopped included.
    pub rounds: u32,
    /// Bytes of guest memory.
    pub guest_bytes: u64,
    /// Bytes put on the wire.
    pub wire_bytes: u64,
    /// Pages sent, zero pages included.
    pub pages_sent: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Bytes of pages dirtied per second while the guest ran, over all rounds.
    pub dirty_rate_bytes_per_s: f64,
    /// How long hashing all memory took, while the guest was stopped, milliseconds; only if that was asked for.
    #[serde(default)]
    pub verify_ms: Option<f64>,
}
