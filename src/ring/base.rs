//! A ring's base: where its device side goes on, as GET_VRING_BASE and SET_VRING_BASE carry it.

use std::fmt;

use super::Position;
use crate::abi::bit;
use crate::abi::virtio::VIRTIO_F_RING_PACKED;

/// The 32-bit state of a ring, split or packed (vhost-user spec, "Vring state"; rules R4.1, R4.2).
///
/// Split: the next avail index in the low 16 bits, free-running. Packed: bits 0-14 the avail position, bit 15 its wrap
/// counter, bits 16-30 the used position, bit 31 its wrap counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RingBase(u32);

impl RingBase {
    /// The base of a fresh packed ring: both positions 0, both wrap counters 1 (rule R4.2).
    pub const PACKED_START: RingBase = RingBase::packed(0, true, 0, true);

    /// A split ring's base: the next avail index to be taken.
    pub const fn split(next_avail: u16) -> RingBase {
        RingBase(next_avail as u32)
    }

    /// A packed ring's base: the positions in the ring, each less than 32768, and the wrap counters there.
    pub const fn packed(avail_position: u16, avail_wrap: bool, used_position: u16, used_wrap: bool) -> RingBase {
        let avail = Position { index: avail_position, wrap: avail_wrap }.to_bits();
        let used = Position { index: used_position, wrap: used_wrap }.to_bits();
        RingBase(avail as u32 | (used as u32) << 16)
    }

    /// The base of a ring that has never been used, of the kind that the negotiated `features` say.
    pub fn initial(features: u64) -> RingBase {
        if features & bit(VIRTIO_F_RING_PACKED) == 0 { RingBase::split(0) } else { RingBase::PACKED_START }
    }

    /// Whether a ring that has never been used may have this base.
    pub fn is_initial(self, features: u64) -> bool {
        let (start, packed) = (RingBase::initial(features), features & bit(VIRTIO_F_RING_PACKED) != 0);
        self == start
            || packed && (self.packed_avail(), self.packed_used()) == (start.packed_avail(), start.packed_used())
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

    /// Where the device takes the next request, when this is a packed ring's base. May be outside the ring.
    pub const fn packed_avail(self) -> Position {
        Position::from_bits(self.0 as u16)
    }

    /// Both positions of a packed ring, avail and used, exactly as the bits say: for a base that was made here and not by
    /// a front-end, where a used position 0 with wrap counter 0 is one.
    pub const fn packed_positions(self) -> (Position, Position) {
        (Position::from_bits(self.0 as u16), Position::from_bits((self.0 >> 16) as u16))
    }

    /// Where the device writes the next completion, when this is a packed ring's base. May be outside the ring.
    ///
    /// Some front-ends know the avail position alone and leave these bits 0: then it is that (rule R4.3).
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
