//! Virtqueues: the device side and the driver side of a ring, and the ring's base.

mod base;

pub use base::RingBase;
