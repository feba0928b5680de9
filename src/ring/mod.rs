//! Virtqueues: the device side and the driver side of split and packed rings, the chains of buffers in them, and the
//! base of a ring.
//!
//! Every value read from a ring may have been written by a hostile peer: it is checked here, and every loop over
//! descriptors is bounded. Not here: the contents of requests, and the delivery of notifications.

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

/// Returns true if moving an index from `old` to `new` passes `event` (virtio 1.2, `vring_need_event`).
#[inline]
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
