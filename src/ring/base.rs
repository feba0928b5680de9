//! A ring's base: where its device side goes on, as GET_VRING_BASE and SET_VRING_BASE carry it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The 32-bit state of a ring, split or packed (vhost-user spec, "Vring state"; rule R4).
///
/// Split: the next avail index in the low 16 bits, free-running. Packed: bits 0-14 the avail position, bit 15 its wrap
/// counter, bits 16-30 the used position, bit 31 its wrap counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct RingBase(u32);

impl RingBase {
    /// A split ring's base: the next avail index to be taken.
    pub const fn split(next_avail: u16) -> RingBase {
        RingBase(next_avail as u32)
    }

    /// The bits as they travel in `vhost_vring_state.num`.
    pub const fn from_bits(bits: u32) -> RingBase {
        RingBase(bits)
    }

    /// The bits as they travel in `vhost_vring_state.num`.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The next avail index, when this is a split ring's base.
    pub const fn split_index(self) -> u16 {
        self.0 as u16
    }
}

impl fmt::Debug for RingBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
