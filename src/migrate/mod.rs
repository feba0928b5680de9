//! Moving a running guest.

mod converge;
mod report;

pub use converge::{Convergence, Next, Policy, Round, STALL_ROUNDS};
pub use report::{Event, Report, RoundReport};
