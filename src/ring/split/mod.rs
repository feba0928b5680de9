//! Split rings (virtio 1.2, "Split Virtqueues"): the layout, and the access of both sides to the three areas.
//!
//! [`SplitDevice`] is the device side, [`SplitDriver`] the driver side.
//!
//! A device that stops a ring puts back what it has not served. Its successor continues at the base:
//!
//! ```
//! # use std::sync::Arc;
//! # use vhost_migrate::memory::{Memory, Region};
//! # let memory = Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?;
//! use vhost_migrate::abi::virtio::VirtioFeatures;
//! use vhost_migrate::memory::GuestAddress;
//! use vhost_migrate::ring::{Buffer, Chain, RingBase, SplitDevice, SplitDriver, SplitLayout};
//!
//! let features = VirtioFeatures::empty();
//! let [desc, avail, used] = [0x1000, 0x2000, 0x3000].map(GuestAddress);
//! let layout = SplitLayout { size: 64, desc, avail, used };
//! let mut driver = SplitDriver::new(&memory, layout, features)?;
//! for gpa in [0x4000, 0x5000].map(GuestAddress) {
//!     driver.add(&[Buffer { gpa, len: 512 }], &[], None)?;
//! }
//! let _kick = driver.publish();
//!
//! let mut device = SplitDevice::new(&memory, layout, features, RingBase::split(0))?;
//! let mut chain = Chain::default();
//! device.pop(&mut chain)?;
//! device.push(chain.head, 0);
//! let _call = device.publish();
//! device.pop(&mut chain)?;
//! assert!(device.put_back([chain.head].into_iter()));
//! assert_eq!(device.base(), RingBase::split(1));
//!
//! let mut successor = SplitDevice::new(&memory, layout, features, device.base())?;
//! assert!(successor.pop(&mut chain)?);
//! assert_eq!(chain.readable[0].gpa, GuestAddress(0x5000));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod device;
mod driver;

pub use device::SplitDevice;
pub use driver::{SplitDriver, SplitDriverState};

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use zerocopy::little_endian::{U16, U32, U64};

use crate::abi::virtio::{
    AVAIL_ALIGN_SIZE, DESC_ALIGN_SIZE, Desc, RING_ELEMENTS_OFFSET, RING_FLAGS_OFFSET, RING_IDX_OFFSET, USED_ALIGN_SIZE,
    UsedElem, avail_event_offset, used_event_offset,
};
use crate::memory::{GuestAddress, Memory};

use super::RingError;
use super::shared_array::SharedArray;

/// Size and guest-physical addresses of a split ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitLayout {
    /// Number of entries, a power of two from 1 to 32768.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: GuestAddress,
    /// Guest-physical address of the avail ring (driver area).
    pub avail: GuestAddress,
    /// Guest-physical address of the used ring (device area).
    pub used: GuestAddress,
}

/// The areas of a ring with the event words, checked to be in guest memory. Values are in host byte order.
struct SplitAreas {
    desc: SharedArray<[AtomicU64; 2]>,
    avail_flags: SharedArray<AtomicU16>,
    avail_idx: SharedArray<AtomicU16>,
    avail: SharedArray<AtomicU16>,
    used_event: SharedArray<AtomicU16>,
    used_flags: SharedArray<AtomicU16>,
    used_idx: SharedArray<AtomicU16>,
    used: SharedArray<[AtomicU32; 2]>,
    avail_event: SharedArray<AtomicU16>,
}

impl SplitAreas {
    fn new(memory: &Memory, layout: &SplitLayout) -> Result<SplitAreas, RingError> {
        let SplitLayout { size, desc, avail, used } = *layout;
        if !size.is_power_of_two() {
            return Err(RingError::Size { size });
        }
        const DESC: &str = "descriptor table";
        const AVAIL: &str = "avail ring";
        const USED: &str = "used ring";
        let areas = [(DESC, desc, DESC_ALIGN_SIZE), (AVAIL, avail, AVAIL_ALIGN_SIZE), (USED, used, USED_ALIGN_SIZE)];
        for (area, gpa, align) in areas {
            if !gpa.0.is_multiple_of(align) {
                return Err(RingError::Misaligned { area, gpa, align });
            }
        }
        // A saturated address is outside guest memory, whose regions never contain the last byte of the address space.
        let at = |area: GuestAddress, offset| GuestAddress(area.0.saturating_add(offset));
        let avail_at = |offset: u64, count| SharedArray::new(memory, AVAIL, at(avail, offset), count);
        let used_at = |offset: u64, count| SharedArray::new(memory, USED, at(used, offset), count);
        Ok(SplitAreas {
            desc: SharedArray::new(memory, DESC, desc, size)?,
            avail_flags: avail_at(RING_FLAGS_OFFSET, 1)?,
            avail_idx: avail_at(RING_IDX_OFFSET, 1)?,
            avail: avail_at(RING_ELEMENTS_OFFSET, size)?,
            used_event: avail_at(used_event_offset(size.into()), 1)?,
            used_flags: used_at(RING_FLAGS_OFFSET, 1)?,
            used_idx: used_at(RING_IDX_OFFSET, 1)?,
            used: SharedArray::new(memory, USED, at(used, RING_ELEMENTS_OFFSET), size)?,
            avail_event: used_at(avail_event_offset(size.into()), 1)?,
        })
    }

    /// Reads each half of a descriptor once, so that the values that are checked are the values that are used.
    #[inline]
    fn desc(&self, index: u16) -> Desc {
        let [addr, rest] = self.desc.at(index);
        let (addr, rest) = (u64::from_le(addr.load(Ordering::Relaxed)), u64::from_le(rest.load(Ordering::Relaxed)));
        Desc {
            addr: U64::new(addr),
            len: U32::new(rest as u32),
            flags: U16::new((rest >> 32) as u16),
            next: U16::new((rest >> 48) as u16),
        }
    }

    #[inline]
    fn set_desc(&self, index: u16, desc: &Desc) {
        let [addr, rest] = self.desc.at(index);
        let value = u64::from(desc.len.get()) | u64::from(desc.flags.get()) << 32 | u64::from(desc.next.get()) << 48;
        addr.store(desc.addr.get().to_le(), Ordering::Relaxed);
        rest.store(value.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn used(&self, index: u16) -> UsedElem {
        let [id, len] = self.used.at(index);
        UsedElem {
            id: U32::new(u32::from_le(id.load(Ordering::Relaxed))),
            len: U32::new(u32::from_le(len.load(Ordering::Relaxed))),
        }
    }

    #[inline]
    fn set_used(&self, index: u16, head: u16, len: u32) {
        let [id, length] = self.used.at(index);
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        length.store(len.to_le(), Ordering::Relaxed);
    }
}

#[inline]
fn load(word: &SharedArray<AtomicU16>, order: Ordering) -> u16 {
    u16::from_le(word.at(0).load(order))
}

#[inline]
fn store(word: &SharedArray<AtomicU16>, value: u16, order: Ordering) {
    word.at(0).store(value.to_le(), order);
}
