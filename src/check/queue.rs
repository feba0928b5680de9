//! One ring of the harness: memory, driver, notification fds and position.

use std::os::fd::AsFd;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::outcome::CheckAbort;
use super::pages::{Pages, pages};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VirtioFeatures};
use crate::memory::{Address, GuestAddress, LOG_PAGE, Memory};
use crate::ring::{DriverRing, DriverRingState, PackedDriverState, Position, RingBase, RingLayout, SplitDriverState};
use crate::sys::nonblocking;

/// Address of the first ring in the lower region; the others follow.
const FIRST_RING: u64 = 0x10_0000;
/// Size of a ring's area: 1024 entries, with each part on pages of its own.
pub(super) const RING_SLOT_BYTES: u64 = 0x1_0000;
const DRIVER_OFFSET: u64 = 0x5000;
const DEVICE_OFFSET: u64 = 0x8000;
/// Offsets of the parts behind an IOMMU, so that each crosses a page boundary.
const IOMMU_OFFSETS: [u64; 3] = [0xe00, 0xff0, 0xfc0];
/// Maximum number of rings.
pub(super) const MAX_RINGS: usize = 32;

/// A ring and its driver.
pub(super) struct DriverQueue {
    /// Ring index of the protocol.
    pub(super) index: u32,
    pub(super) layout: RingLayout,
    pub(super) driver: DriverRing,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    /// Position at which the ring starts.
    pub(super) base: RingBase,
    /// Buffers of a receive ring for which no frame was injected yet.
    pub(super) awaited_frames: u64,
    features: VirtioFeatures,
}

impl DriverQueue {
    /// Creates an empty ring in area `place`.
    pub(super) fn new(
        memory: &Memory,
        index: u32,
        place: usize,
        size: u16,
        features: VirtioFeatures,
    ) -> Result<DriverQueue, CheckAbort> {
        let at = FIRST_RING + place as u64 * RING_SLOT_BYTES;
        let [desc, driver, device] = if features.contains(VIRTIO_F_ACCESS_PLATFORM) { IOMMU_OFFSETS } else { [0; 3] };
        let areas = [at + desc, at + DRIVER_OFFSET + driver, at + DEVICE_OFFSET + device].map(GuestAddress);
        let layout = RingLayout::new(features, size, areas);
        let eventfd = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        Ok(DriverQueue {
            index,
            layout,
            driver: DriverRing::new(memory, layout, features)?,
            kick: eventfd()?,
            call: eventfd()?,
            base: RingBase::initial(features),
            awaited_frames: 0,
            features,
        })
    }

    pub(super) fn is_packed(&self) -> bool {
        self.features.contains(VIRTIO_F_RING_PACKED)
    }

    /// Continues the driver after the ring's pages have moved.
    pub(super) fn remap(&mut self, memory: &Memory) -> Result<(), CheckAbort> {
        self.driver = DriverRing::restore(memory, self.layout, self.features, &self.driver.state())?;
        Ok(())
    }

    /// Returns the address of the ring's area.
    pub(super) fn slot_address(&self) -> GuestAddress {
        let [GuestAddress(desc), ..] = self.layout.areas();
        GuestAddress(desc - desc % RING_SLOT_BYTES)
    }

    /// Restarts the driver: a split ring at index `at`, a packed ring at that descriptor.
    pub(super) fn move_to(&mut self, memory: &Memory, at: u16) -> Result<(), CheckAbort> {
        let state = if self.is_packed() {
            let here = Position { index: at % self.layout.size(), wrap: true };
            let (requests, held, in_order) = (Vec::new(), 0, None);
            DriverRingState::Packed(PackedDriverState {
                avail: here,
                published: here,
                used: here,
                requests,
                held,
                in_order,
            })
        } else {
            let [_, avail, used] = self.layout.areas();
            for area in [avail, used] {
                memory.write(area.unchecked_add(2), &at.to_le_bytes())?;
            }
            DriverRingState::Split(SplitDriverState { avail: at, published: at, used: at, ..Default::default() })
        };
        self.driver = DriverRing::restore(memory, self.layout, self.features, &state)?;
        self.base = self.current_base();
        Ok(())
    }

    /// Resets ring memory and driver to the initial state.
    pub(super) fn reinitialize(&mut self, memory: &Memory) -> Result<(), CheckAbort> {
        for (area, bytes) in self.layout.areas().into_iter().zip(self.area_sizes()) {
            memory.write(area, &vec![0; bytes as usize])?;
        }
        self.move_to(memory, 0)
    }

    /// Returns the base after the completions that the driver has popped.
    pub(super) fn current_base(&self) -> RingBase {
        match self.driver.state() {
            DriverRingState::Split(state) => RingBase::split(state.used),
            DriverRingState::Packed(PackedDriverState { used, .. }) => packed(used),
        }
    }

    /// Returns the base after all submitted requests.
    pub(super) fn end_base(&self) -> RingBase {
        match self.driver.state() {
            DriverRingState::Split(state) => RingBase::split(state.avail),
            DriverRingState::Packed(PackedDriverState { avail, .. }) => packed(avail),
        }
    }

    /// Returns true if the bases are equal for this ring format.
    pub(super) fn is_same_base(&self, base: RingBase, expected: RingBase) -> bool {
        match self.is_packed() {
            true => (base.packed_avail(), base.packed_used()) == (expected.packed_avail(), expected.packed_used()),
            false => base == expected,
        }
    }

    /// Formats a base for a report.
    pub(super) fn format_base(&self, base: RingBase) -> String {
        if !self.is_packed() {
            return base.bits().to_string();
        }
        let (avail, used) = (base.packed_avail(), base.packed_used());
        let show = |position: Position| format!("{} (wrap counter {})", position.index, u8::from(position.wrap));
        match avail == used {
            true => show(avail),
            false => format!("avail {}, used {}", show(avail), show(used)),
        }
    }

    /// Returns the number of descriptors in flight according to a base, or `None` if it is not a base of this ring.
    pub(super) fn in_flight_at(&self, base: RingBase) -> Option<u16> {
        let (here, size) = (self.current_base(), self.layout.size());
        match self.is_packed() {
            true => here.packed_used().until(base.packed_avail(), size),
            false => Some(base.split_index().wrapping_sub(here.split_index())).filter(|count| *count <= size),
        }
    }

    /// Returns true if the used index of a split ring is beyond the submitted requests. The driver itself detects this
    /// on a packed ring.
    pub(super) fn has_excess_completions(&self, memory: &Memory) -> Result<bool, CheckAbort> {
        let mut index = [0; 2];
        memory.read(self.device_area().unchecked_add(2), &mut index)?;
        Ok(!self.is_packed() && u16::from_le_bytes(index) != self.end_base().split_index())
    }

    /// Returns the pages of a packed ring with completions from `from` to the driver's position. A completion is in the
    /// first descriptor of its request; batches are taken as a whole.
    pub(super) fn completed_pages(&self, from: Position) -> impl Iterator<Item = u64> {
        let ([GuestAddress(desc), ..], size) = (self.layout.areas(), self.layout.size());
        let to = self.current_base().packed_used();
        let count = from.until(to, size).unwrap_or_default();
        (0..count).map(move |step| (desc + u64::from(from.after(step, size).index) * 16) / LOG_PAGE)
    }

    /// Returns the pages that only the driver writes.
    pub(super) fn driver_pages(&self) -> Pages {
        let ([desc, driver, _], [desc_bytes, driver_bytes, _]) = (self.layout.areas(), self.area_sizes());
        let desc = (!self.is_packed()).then(|| pages(desc, desc_bytes));
        desc.into_iter().flatten().chain(pages(driver, driver_bytes)).collect()
    }

    /// Returns the pages of the ring that the device writes.
    pub(super) fn device_pages(&self) -> Pages {
        let ([desc, _, device], [desc_bytes, _, device_bytes]) = (self.layout.areas(), self.area_sizes());
        let desc = self.is_packed().then(|| pages(desc, desc_bytes));
        desc.into_iter().flatten().chain(pages(device, device_bytes)).collect()
    }

    /// Returns the sizes of the ring's parts.
    pub(super) fn area_sizes(&self) -> [u64; 3] {
        RingLayout::area_bytes(self.features, self.layout.size())
    }

    /// Returns the address of the device area: the used ring or the event area.
    pub(super) fn device_area(&self) -> GuestAddress {
        let [_, _, device] = self.layout.areas();
        device
    }

    /// Signals the kick fd unconditionally.
    pub(super) fn signal_kick(&self) {
        // An error means that the eventfd is signalled already.
        let _ = nonblocking::signal(self.kick.as_fd());
    }

    /// Clears the call fd. Returns false if it was not signalled.
    pub(super) fn ack_call(&self) -> bool {
        nonblocking::take(self.call.as_fd()).is_ok()
    }

    /// Publishes added requests, and kicks if the device needs it.
    pub(super) fn publish(&mut self) {
        if self.driver.publish() {
            self.signal_kick();
        }
    }
}

fn packed(at: Position) -> RingBase {
    RingBase::packed(at.index, at.wrap, at.index, at.wrap)
}
