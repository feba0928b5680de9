//! Virtqueues: the device side and the driver side of a ring, split or packed, the chains they carry, and the ring's
//! base.
//!
//! Every number read from a ring was written by somebody who may be hostile: it is checked here, and every walk is
//! bounded. What a request means, and when to notify whom, is the business of whoever holds the ring.

mod base;
mod chain;
mod device;
mod driver;
mod error;
mod in_order;
mod iommu;
pub mod packed;
mod shared_array;
pub mod split;

pub use base::RingBase;
pub use chain::{Buffer, Chain};
pub use device::{DeviceRing, RingLayout, RingLog};
pub use driver::{DriverRing, DriverRingState, UsedBuffer};
pub use error::RingError;
pub use in_order::InOrderState;
pub use iommu::RingIommu;
pub(crate) use packed::PositionBits;
pub use packed::{PackedDevice, PackedDriver, PackedDriverRequest, PackedDriverState, PackedLayout, Position};
pub use split::{SplitDevice, SplitDriver, SplitDriverState, SplitLayout};

/// Whether moving an index from `old` to `new` passes `event` (virtio 1.2, `vring_need_event`).
#[inline]
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
