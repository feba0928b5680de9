//! Addresses of the address spaces that meet in a device.
//!
//! Guest-physical addresses are vm-memory's [`GuestAddress`]. There are no conversions between the types but the
//! translations of [`Memory`](super::Memory) and [`Iotlb`](super::Iotlb).

use std::fmt;

pub use vm_memory::{Address, GuestAddress};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further; `None` if it exceeds the 64-bit address space.
            #[inline]
            pub fn checked_add(self, bytes: u64) -> Option<$name> {
                self.0.checked_add(bytes).map($name)
            }

            /// The distance from `base` to this address, bytes; `None` if `base` is higher.
            #[inline]
            pub fn checked_offset_from(self, base: $name) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// An address in the address space of the front-end, in which memory tables and ring addresses are given
    /// (rule M1.1).
    UserAddress
}

address! {
    /// An I/O virtual address: what a driver behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM) gives a device.
    Iova
}

address! {
    /// An address in the address space of the process that made a userfaultfd: the back-end, in postcopy (rule P1.4).
    FaultAddress
}
