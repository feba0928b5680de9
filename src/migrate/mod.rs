//! Live migration of a guest: source, destination and the decision when to stop the guest.
//!
//! | file | purpose |
//! |---|---|
//! | `vm` | the traits that the owner of a guest implements |
//! | `source` | rounds, switchover, and the way back when something fails |
//! | `destination` | pages into place, restore, start |
//! | `populate` | the destination's memory, provided ahead |
//! | `listener` | listening for guests and for sources that ask |
//! | `outcomes` | what a destination answers to a source that asks what came of a migration |
//! | `converge` | when to stop the guest: a pure decision |
//! | `report` | events and figures |
//!
//! Migration is independent of the kind of guest and device: implement [`SourceVm`] and [`IncomingVm`], open a
//! [`StreamConnection`](crate::stream::StreamConnection), and call [`migrate`] and [`receive`].
#![forbid(unsafe_code)]

mod converge;
mod destination;
mod error;
mod listener;
mod outcomes;
mod populate;
mod report;
mod source;
mod time_limit;
mod vm;

pub use converge::{Convergence, ConvergencePolicy, NextStep, RoundResult, RoundTime, STALL_ROUNDS};
pub use destination::{IncomingReport, SWITCHOVER_TIMEOUT, receive};
pub use error::{MigrateError, MigrationFailure};
pub use listener::{IncomingMigration, MigrationListener};
pub use outcomes::Outcomes;
pub use report::{GuestLocation, MigrationEvent, MigrationReport, RoundReport};
pub use source::{MigrationParameters, OUTCOME_QUERY_TIMEOUT, migrate};
pub use vm::{IncomingVm, RegionLayout, SourceVm, VmError};
