//! Virtqueues: the device side and the driver side of a ring, the chains they carry, and the ring's base.
//!
//! Every number read from a ring was written by somebody who may be hostile: it is checked here, and every walk is
//! bounded. What a request means, and when to notify whom, is the business of whoever holds the ring.

mod base;
mod chain;
mod error;
mod slots;
pub mod split;

pub use base::RingBase;
pub use chain::{Buffer, Chain};
pub use error::RingError;
pub use split::{RingLog, SplitDevice, SplitDriver, SplitDriverState, SplitLayout, Used};
