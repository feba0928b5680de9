//! Virtqueues: the device side and the driver side of split and packed rings, the chains of buffers in them, and the
//! base of a ring.
//!
//! Every value read from a ring may have been written by a hostile peer: it is checked here, and every loop over
//! descriptors is bounded. Not here: the contents of requests, and the delivery of notifications.
//!
//! # Example
//!
//! Let a driver pass a buffer to a device, and the device fill it:
//!
//! ```
//! # use std::sync::Arc;
//! # use vhost_migrate::memory::{Memory, Region};
//! # let memory = Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?;
//! use vhost_migrate::abi::virtio::VirtioFeatures;
//! use vhost_migrate::memory::GuestAddress;
//! use vhost_migrate::ring::{Buffer, Chain, DeviceRing, DriverRing, RingBase, RingLayout};
//!
//! // A split ring of 64 entries, as no features are negotiated, with its three areas on a page each.
//! let features = VirtioFeatures::empty();
//! let layout = RingLayout::new(features, 64, [0x1000, 0x2000, 0x3000].map(GuestAddress));
//! let mut driver = DriverRing::new(&memory, layout, features)?;
//! let mut device = DeviceRing::new(&memory, layout, features, RingBase::initial(features))?;
//!
//! let head = driver.add(&[], &[Buffer { gpa: GuestAddress(0x4000), len: 64 }], None)?;
//! assert!(driver.publish(), "the device wants a kick");
//!
//! let mut chain = Chain::default();
//! while device.pop(&mut chain)? {
//!     memory.write(chain.writable[0].gpa, b"hello")?;
//!     device.push(&chain, 5);
//! }
//! assert!(device.publish(), "the driver wants a call");
//!
//! let used = driver.pop_used()?.ok_or("nothing was used")?;
//! assert_eq!((Some(used.head), used.len), (head, 5));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

/// Evaluates an expression for the variant of an enum that is split or packed.
macro_rules! either {
    ($self:expr, $it:ident => $result:expr) => {
        match $self {
            Self::Split($it) => $result,
            Self::Packed($it) => $result,
        }
    };
}

mod base;
mod chain;
mod device;
mod driver;
mod error;
mod in_order;
mod iommu;
mod packed;
mod shared_array;
mod split;

pub use base::RingBase;
pub use chain::{Buffer, Chain};
pub use device::{DeviceRing, RingLayout, RingLog};
pub use driver::{DriverRing, DriverRingState, UsedBuffer};
pub use error::RingError;
pub use in_order::InOrderState;
pub use iommu::RingIommu;
#[cfg(any(feature = "backend", feature = "frontend"))]
pub(crate) use iommu::iova;
pub(crate) use packed::PositionBits;
pub use packed::{PackedDevice, PackedDriver, PackedDriverRequest, PackedDriverState, PackedLayout, Position};
pub use split::{SplitDevice, SplitDriver, SplitDriverState, SplitLayout};

/// Returns true if moving an index from `old` to `new` passes `event` (virtio 1.2, `vring_need_event`).
#[inline]
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
