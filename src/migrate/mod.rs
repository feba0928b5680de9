//! Moving a running guest: the source's side, the destination's, and when to stop the guest.
//!
//! | file | purpose |
//! |---|---|
//! | `machine` | what a migration needs from whoever owns the guest |
//! | `source` | rounds, switchover, and the way back when something fails |
//! | `destination` | pages into place, restore, start |
//! | `populate` | the destination's memory, provided ahead |
//! | `incoming` | listening for guests and for sources that ask |
//! | `outcomes` | what a destination answers to a source that asks what came of a migration |
//! | `converge` | when to stop the guest: a pure decision |
//! | `report` | events and figures |
//! | `builtin` | the built-in guest as a machine |
//! | `measure` | a dirty rate without a migration |
//!
//! A migration belongs to no particular guest or device: implement [`Machine`] and [`Arrival`], open a
//! [`StreamConnection`](crate::stream::StreamConnection), and call [`migrate`] and [`receive`].
#![forbid(unsafe_code)]

mod builtin;
mod converge;
mod destination;
mod error;
mod incoming;
mod machine;
mod measure;
mod outcomes;
mod populate;
mod report;
mod source;
mod time_limit;

pub use builtin::{
    GuestArrival, GuestMachine, InterruptOnCancel, connect_all, decode_state, dirty_sources, saved_disks,
};
pub use converge::{Convergence, Next, Policy, Round, STALL_ROUNDS, Spent};
pub use destination::{Received, SWITCHOVER_TIMEOUT, receive};
pub use error::{Failure, MigrateError};
pub use incoming::{Arriving, Incoming};
pub use machine::{Arrival, Machine, MachineError, RegionLayout};
pub use measure::measure;
pub use outcomes::Outcomes;
pub use report::{Event, GuestLocation, Report, RoundReport};
pub use source::{ASK_FOR, Plan, migrate};
