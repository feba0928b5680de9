//! Live migration of a guest: source, destination and the decision when to stop the guest.
//!
//! | file | purpose |
//! |---|---|
//! | `vm` | what a migration needs from whoever owns the guest |
//! | `source` | rounds, switchover, and the way back when something fails |
//! | `destination` | pages into place, restore, start |
//! | `populate` | the destination's memory, provided ahead |
//! | `listener` | listening for guests and for sources that ask |
//! | `outcomes` | what a destination answers to a source that asks what came of a migration |
//! | `converge` | when to stop the guest: a pure decision |
//! | `report` | events and figures |
//! | `builtin` | the built-in guest as a machine |
//! | `measure` | a dirty rate without a migration |
//!
//! Migration is independent of the kind of guest and device: implement [`SourceVm`] and [`IncomingVm`], open a
//! [`StreamConnection`](crate::stream::StreamConnection), and call [`migrate`] and [`receive`].
#![forbid(unsafe_code)]

#[cfg(feature = "guest")]
mod builtin;
mod converge;
mod destination;
mod error;
mod listener;
#[cfg(feature = "guest")]
mod measure;
mod outcomes;
mod populate;
mod report;
mod source;
mod time_limit;
mod vm;

#[cfg(feature = "guest")]
pub use builtin::{
    GuestIncomingVm, GuestSourceVm, InterruptOnCancel, connect_backends, decode_guest_state, decode_saved_disks,
    dirty_sources,
};
pub use converge::{Convergence, ConvergencePolicy, NextStep, RoundResult, RoundTime, STALL_ROUNDS};
pub use destination::{IncomingReport, SWITCHOVER_TIMEOUT, receive};
pub use error::{MigrateError, MigrationFailure};
pub use listener::{IncomingMigration, MigrationListener};
#[cfg(feature = "guest")]
pub use measure::measure_dirty_rate;
pub use outcomes::Outcomes;
pub use report::{GuestLocation, MigrationEvent, MigrationReport, RoundReport};
pub use source::{MigrationParameters, OUTCOME_QUERY_TIMEOUT, migrate};
pub use vm::{IncomingVm, RegionLayout, SourceVm, VmError};
