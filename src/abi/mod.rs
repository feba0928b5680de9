//! Numbers and layouts that this crate shares with kernels, front-ends, back-ends and guests.
//!
//! Here: constants, plain structures, their sizes and offsets (checked at compile time), names for messages.
//! Not here: sockets, checks of values that a peer sent, anything that changes state.
//!
//! # Example
//!
//! Name the features that a device offers:
//!
//! ```
//! use vhost_migrate::abi::{features::feature_names, virtio::*};
//!
//! let offered = VIRTIO_BLK_F_FLUSH | VIRTIO_F_VERSION_1;
//! assert_eq!(feature_names(offered, Some(VIRTIO_ID_BLOCK)), "VIRTIO_BLK_F_FLUSH, VIRTIO_F_VERSION_1");
//! ```
//!
//! The structures convert to and from bytes by the traits of the crate [`zerocopy`], and begin as zeros:
//!
//! ```
//! use vhost_migrate::abi::virtio::BlkConfig;
//! use vhost_migrate::abi::zerocopy::{FromZeros, IntoBytes};
//!
//! let mut config = BlkConfig::new_zeroed();
//! config.capacity = 2048.into();
//! assert_eq!(config.as_bytes()[..8], 2048u64.to_le_bytes());
//! ```
#![forbid(unsafe_code)]

pub mod features;
pub mod inflight;
pub(crate) mod linux;
pub mod vdpa;
pub mod vduse;
pub mod vhost;
pub mod vhost_user;
pub mod virtio;

pub use zerocopy;

/// Declares a plain structure with its size and the offset of every field in bytes, and checks both at compile time.
/// The derived `IntoBytes` refuses padding that is not a field of its own.
macro_rules! wire {
    ($(
        $(#[$meta:meta])*
        $name:ident, $size:literal bytes {
            $($(#[$doc:meta])* $field:ident: $ty:ty => $offset:literal),* $(,)?
        }
    )+) => {
        $(
            $(#[$meta])*
            #[derive(
                Debug, Clone, Copy, PartialEq, Eq,
                zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
            )]
            #[repr(C)]
            pub struct $name { $($(#[$doc])* pub $field: $ty,)* }

            const _: () = {
                assert!(size_of::<$name>() == $size);
                $(assert!(core::mem::offset_of!($name, $field) == $offset);)*
            };
        )+
    };
}
use wire;
