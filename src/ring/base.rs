//! The base of a ring: the state from which its device side continues, as carried by GET_VRING_BASE and SET_VRING_BASE.

use std::fmt;

use super::Position;
use crate::abi::virtio::{VIRTIO_F_RING_PACKED, VirtioFeatures};

/// The 32-bit state of a ring, split or packed (vhost-user spec, "Vring state"; rules R4.1, R4.2).
///
/// Split ring: the low 16 bits are the next avail index, which is free-running. Packed ring: bits 0-14 are the avail
/// position, bit 15 is its wrap counter, bits 16-30 are the used position, bit 31 is its wrap counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RingBase(u32);

impl RingBase {
    /// The base of a fresh packed ring: both positions 0, both wrap counters 1 (rule R4.2).
    pub const PACKED_START: RingBase = RingBase::packed(0, true, 0, true);

    /// The base of a split ring with the next avail index `next_avail`.
    pub const fn split(next_avail: u16) -> RingBase {
        RingBase(next_avail as u32)
    }

    /// The base of a packed ring with these positions, each less than 32768, and their wrap counters.
    pub const fn packed(avail_position: u16, avail_wrap: bool, used_position: u16, used_wrap: bool) -> RingBase {
        let avail = Position { index: avail_position, wrap: avail_wrap }.to_bits();
        let used = Position { index: used_position, wrap: used_wrap }.to_bits();
        RingBase(avail as u32 | (used as u32) << 16)
    }

    /// The base of a ring that was never used, packed or split by the negotiated `features`.
    pub fn initial(features: VirtioFeatures) -> RingBase {
        if !features.contains(VIRTIO_F_RING_PACKED) { RingBase::split(0) } else { RingBase::PACKED_START }
    }

    /// Returns true if a ring that was never used may have this base.
    pub fn is_initial(self, features: VirtioFeatures) -> bool {
        let (start, packed) = (RingBase::initial(features), features.contains(VIRTIO_F_RING_PACKED));
        self == start
            || packed && (self.packed_avail(), self.packed_used()) == (start.packed_avail(), start.packed_used())
    }

    /// The base with these bits of `vhost_vring_state.num`.
    pub const fn from_bits(bits: u32) -> RingBase {
        RingBase(bits)
    }

    /// The bits for `vhost_vring_state.num`.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The next avail index, if this is the base of a split ring.
    pub const fn split_index(self) -> u16 {
        self.0 as u16
    }

    /// The avail position, of the next request to be taken, if this is the base of a packed ring. It may be outside the
    /// ring.
    pub const fn packed_avail(self) -> Position {
        Position::from_bits(self.0 as u16)
    }

    /// The avail and the used position of a packed ring, exactly as in the bits. Use it for bases that this crate has
    /// made: in those a used position 0 with wrap counter 0 is valid, other than in a front-end's
    /// ([`RingBase::packed_used`]).
    pub const fn packed_positions(self) -> (Position, Position) {
        (Position::from_bits(self.0 as u16), Position::from_bits((self.0 >> 16) as u16))
    }

    /// The used position, of the next completion, if this is the base of a packed ring. It may be outside the ring.
    ///
    /// Some front-ends know only the avail position and leave these bits 0. It is the avail position then (rule R4.3).
    pub const fn packed_used(self) -> Position {
        match self.0 >> 16 {
            0 => self.packed_avail(),
            used => Position::from_bits(used as u16),
        }
    }
}

impl fmt::Debug for RingBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
