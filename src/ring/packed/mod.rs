//! Packed rings (virtio 1.2, "Packed Virtqueues"): the layout, and the access of both sides to the three areas.
//!
//! [`PackedDevice`] is the device side, [`PackedDriver`] the driver side.
//!
//! A position in a packed ring has a wrap counter. The base of a ring holds two positions:
//!
//! ```
//! use vhost_migrate::ring::{Position, RingBase};
//!
//! let avail = Position::START.after(200, 128 + 100);
//! let used = avail.before(3, 228);
//! assert_eq!(used.until(avail, 228), Some(3));
//!
//! let base = RingBase::packed(avail.index, avail.wrap, used.index, used.wrap);
//! assert_eq!(base.packed_positions(), (avail, used));
//! ```

mod deduce;
mod device;
mod driver;

pub use device::PackedDevice;
pub use driver::{PackedDriver, PackedDriverRequest, PackedDriverState};

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::little_endian::{U16, U32, U64};

use crate::abi::virtio::{
    MAX_QUEUE_SIZE, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED, PACKED_EVENT_F_WRAP_CTR, PACKED_EVENT_FLAG_DESC,
    PACKED_EVENT_FLAG_DISABLE, PACKED_EVENT_FLAG_ENABLE, PackedDesc, PackedEvent,
};
use crate::memory::{GuestAddress, Memory};

use super::shared_array::SharedArray;
use super::{RingError, passes};

const AVAIL: u16 = 1 << PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << PACKED_DESC_F_USED;
const WRAP: u16 = 1 << PACKED_EVENT_F_WRAP_CTR;
/// The bits of [`PackedEvent::flags`] that are not reserved.
const EVENT_FLAGS: u16 = 3;
const DESC_ALIGN: u64 = size_of::<PackedDesc>() as u64;
const EVENT_ALIGN: u64 = size_of::<PackedEvent>() as u64;

/// Size and guest-physical addresses of a packed ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    /// Number of descriptors, 1 to 32768.
    pub size: u16,
    /// Guest-physical address of the descriptor ring.
    pub desc: GuestAddress,
    /// Guest-physical address of the driver event area of 4 bytes.
    pub driver: GuestAddress,
    /// Guest-physical address of the device event area of 4 bytes.
    pub device: GuestAddress,
}

/// A position in a packed ring: the index of a descriptor, and the wrap counter of the round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Position {
    /// Index of the descriptor.
    pub index: u16,
    /// Wrap counter, which is inverted in every round.
    pub wrap: bool,
}

impl Position {
    /// The initial position of both sides of a fresh ring.
    pub const START: Position = Position { index: 0, wrap: true };

    /// The position `slots` descriptors ahead, in a ring of `size` descriptors, of which there are at least `slots`.
    #[inline]
    #[must_use]
    pub const fn after(self, slots: u16, size: u16) -> Position {
        let next = self.index as u32 + slots as u32;
        match next.checked_sub(size as u32) {
            Some(index) => Position { index: index as u16, wrap: !self.wrap },
            None => Position { index: next as u16, wrap: self.wrap },
        }
    }

    /// The position `slots` descriptors back, in a ring of `size` descriptors, of which there are at least `slots`.
    #[must_use]
    pub const fn before(self, slots: u16, size: u16) -> Position {
        match self.index.checked_sub(slots) {
            Some(index) => Position { index, wrap: self.wrap },
            None => Position { index: (self.index as u32 + size as u32 - slots as u32) as u16, wrap: !self.wrap },
        }
    }

    /// The number of descriptors from here to `to` in a ring of `size` descriptors; `None` if it is more than a round
    /// or negative.
    #[inline]
    pub fn until(self, to: Position, size: u16) -> Option<u16> {
        let round = if to.wrap == self.wrap { 0 } else { u32::from(size) };
        let slots = (u32::from(to.index) + round).checked_sub(self.index.into())?;
        u16::try_from(slots).ok().filter(|slots| *slots <= size)
    }

    /// The position as in event areas and bases: index in bits 0-14, wrap counter in bit 15.
    pub(super) const fn to_bits(self) -> u16 {
        self.index & !WRAP | if self.wrap { WRAP } else { 0 }
    }

    pub(super) const fn from_bits(bits: u16) -> Position {
        Position { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    /// The AVAIL and USED flags of an available descriptor at this position.
    #[inline]
    fn avail_flags(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The AVAIL and USED flags of a used descriptor at this position.
    #[inline]
    fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// A [`Position`] in one integer, for fields that are loaded and stored for every request.
///
/// With two fields, a load of both at once after a store of each waits until the stores have left the store buffer.
/// That takes longer than all other work for a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PositionBits(u16);

impl PositionBits {
    #[inline]
    pub(crate) fn get(self) -> Position {
        Position::from_bits(self.0)
    }
}

impl From<Position> for PositionBits {
    #[inline]
    fn from(position: Position) -> PositionBits {
        PositionBits(position.to_bits())
    }
}

/// The areas of a ring, checked to be in guest memory. Values are in host byte order.
///
/// The second half of a descriptor (length, id, flags) is read and written at once, and so is an event area: the flags
/// always belong to the values beside them.
struct PackedAreas {
    desc: SharedArray<[AtomicU64; 2]>,
    driver: SharedArray<AtomicU32>,
    device: SharedArray<AtomicU32>,
}

impl PackedAreas {
    fn new(memory: &Memory, layout: &PackedLayout) -> Result<PackedAreas, RingError> {
        let PackedLayout { size, desc, driver, device } = *layout;
        if size == 0 || u32::from(size) > MAX_QUEUE_SIZE {
            return Err(RingError::PackedSize { size });
        }
        const DESC: &str = "descriptor ring";
        const DRIVER: &str = "driver event area";
        const DEVICE: &str = "device event area";
        for (area, gpa, align) in
            [(DESC, desc, DESC_ALIGN), (DRIVER, driver, EVENT_ALIGN), (DEVICE, device, EVENT_ALIGN)]
        {
            if !gpa.0.is_multiple_of(align) {
                return Err(RingError::Misaligned { area, gpa, align });
            }
        }
        Ok(PackedAreas {
            desc: SharedArray::new(memory, DESC, desc, size)?,
            driver: SharedArray::new(memory, DRIVER, driver, 1)?,
            device: SharedArray::new(memory, DEVICE, device, 1)?,
        })
    }

    /// Reads each half of a descriptor once, so that the values that are checked are the values that are used. The
    /// second half, which has the flags, is read first and with `order`.
    #[inline]
    fn desc(&self, index: u16, order: Ordering) -> PackedDesc {
        let [addr, rest] = self.desc.nth(index);
        let rest = u64::from_le(rest.load(order));
        let addr = u64::from_le(addr.load(Ordering::Relaxed));
        PackedDesc { addr: U64::new(addr), ..half(rest) }
    }

    /// A descriptor without its address.
    #[inline]
    fn half(&self, index: u16, order: Ordering) -> PackedDesc {
        let [_, rest] = self.desc.nth(index);
        half(u64::from_le(rest.load(order)))
    }

    #[inline]
    fn set_addr(&self, index: u16, gpa: GuestAddress) {
        let [addr, _] = self.desc.nth(index);
        addr.store(gpa.0.to_le(), Ordering::Relaxed);
    }

    /// Writes the second half of a descriptor.
    #[inline]
    fn set_half(&self, index: u16, rest: u64, order: Ordering) {
        let [_, half] = self.desc.nth(index);
        half.store(rest.to_le(), order);
    }

    /// Returns true if the device has never used a descriptor.
    ///
    /// After the first round at least one descriptor has the USED bit: a batch is shorter than a round, and the driver
    /// keeps the bit when it makes the descriptor available in the second round.
    fn is_unused(&self, size: u16) -> bool {
        (0..size).all(|index| self.half(index, Ordering::Relaxed).flags.get() & USED == 0)
    }

    /// A copy of the descriptor ring.
    fn descs(&self, size: u16) -> Vec<PackedDesc> {
        (0..size).map(|index| self.desc(index, Ordering::Acquire)).collect()
    }

    /// Returns true if the descriptor at `position` is available in the position's round.
    #[inline]
    fn is_avail(&self, position: Position) -> bool {
        is_avail(&self.half(position.index, Ordering::Relaxed), position)
    }

    /// Returns true if the descriptor at `position` is used in the position's round.
    #[inline]
    fn is_used(&self, position: Position) -> bool {
        is_used(&self.half(position.index, Ordering::Relaxed), position)
    }
}

/// A descriptor with the fields of its second half, and address 0.
fn half(rest: u64) -> PackedDesc {
    PackedDesc {
        addr: U64::ZERO,
        len: U32::new(rest as u32),
        id: U16::new((rest >> 32) as u16),
        flags: U16::new((rest >> 48) as u16),
    }
}

/// The second half of a descriptor.
fn half_bits(len: u32, id: u16, flags: u16) -> u64 {
    u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48
}

#[inline]
fn is_avail(desc: &PackedDesc, position: Position) -> bool {
    desc.flags.get() & (AVAIL | USED) == position.avail_flags()
}

#[inline]
fn is_used(desc: &PackedDesc, position: Position) -> bool {
    desc.flags.get() & (AVAIL | USED) == position.used_flags()
}

/// The value of an event area that asks for a notification when `next` is passed, or always without EVENT_IDX.
fn event_at(next: Position, event_idx: bool) -> u32 {
    match event_idx {
        true => event_bits(next.to_bits(), PACKED_EVENT_FLAG_DESC),
        false => event_bits(0, PACKED_EVENT_FLAG_ENABLE),
    }
}

fn event_bits(off_wrap: u16, flags: u16) -> u32 {
    u32::from(off_wrap) | u32::from(flags) << 16
}

/// The notifications that an event area asks for.
enum NotifyCondition {
    Nothing,
    All,
    /// The one for passing this position.
    At(Position),
}

/// Reads the event area of the other side. An invalid value counts as a request for all notifications.
#[inline]
fn notify_condition(area: &SharedArray<AtomicU32>, event_idx: bool) -> NotifyCondition {
    let event = u32::from_le(area.nth(0).load(Ordering::Relaxed));
    match (event >> 16) as u16 & EVENT_FLAGS {
        PACKED_EVENT_FLAG_DISABLE => NotifyCondition::Nothing,
        PACKED_EVENT_FLAG_DESC if event_idx => NotifyCondition::At(Position::from_bits(event as u16)),
        _ => NotifyCondition::All,
    }
}

/// Returns true if moving `slots` descriptors ahead to `new`, in a ring of `size` descriptors, passes `event`.
#[inline]
fn passes_position(event: Position, new: Position, slots: u16, size: u16) -> bool {
    // As free-running indexes that are 0 at the start of the round of `new`.
    let event = if event.wrap == new.wrap { event.index } else { event.index.wrapping_sub(size) };
    passes(event, new.index, new.index.wrapping_sub(slots))
}
