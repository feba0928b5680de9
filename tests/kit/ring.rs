//! Helpers of the ring tests: guest memory, the layout of a ring in it, and both sides of a ring at any index.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, reason = "each test file uses a part")]

use std::os::fd::AsFd;
use std::sync::Arc;

use vhost_migrate::abi::virtio::{
    VIRTIO_F_IN_ORDER, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use vhost_migrate::memory::{Address, GuestAddress, Memory, Region, UserAddress, sealed_memfd};
use vhost_migrate::ring::{
    Buffer, DeviceRing, DriverRing, InOrderState, PackedDevice, PackedDriver, PackedDriverState, PackedLayout,
    Position, RingBase, SplitDevice, SplitDriver, SplitDriverState, SplitLayout,
};

pub(crate) const EVENT_IDX: VirtioFeatures = VIRTIO_RING_F_EVENT_IDX;
pub(crate) const INDIRECT: VirtioFeatures = VIRTIO_RING_F_INDIRECT_DESC;
pub(crate) const IN_ORDER: VirtioFeatures = VIRTIO_F_IN_ORDER;
/// Addresses of the parts of a ring.
const DESC: GuestAddress = GuestAddress(0x1000);
const DRIVER: GuestAddress = GuestAddress(0x10_0000);
const DEVICE: GuestAddress = GuestAddress(0x20_0000);
/// Guest-physical start of the memory for indirect tables, which extends to the end.
pub(crate) const TABLES: GuestAddress = GuestAddress(0x30_0000);

pub(crate) fn memory() -> Memory {
    let fd = sealed_memfd("ring-test", 4 << 20).unwrap();
    let region = Region::map(fd.as_fd(), GuestAddress(0), 4 << 20, UserAddress(0), 0).unwrap();
    Memory::new([Arc::new(region)]).unwrap()
}

/// The layout of a split ring, with space for the largest one.
pub(crate) fn layout(size: u16) -> SplitLayout {
    SplitLayout { size, desc: DESC, avail: DRIVER, used: DEVICE }
}

/// Both sides of an empty split ring whose indexes are `start`.
pub(crate) fn ring_at(
    memory: &Memory,
    layout: SplitLayout,
    features: VirtioFeatures,
    start: u16,
) -> (SplitDriver, SplitDevice) {
    drop(SplitDriver::new(memory, layout, features).unwrap());
    memory.write(layout.avail.unchecked_add(2), &start.to_le_bytes()).unwrap();
    memory.write(layout.used.unchecked_add(2), &start.to_le_bytes()).unwrap();
    let in_order = (features & IN_ORDER != VirtioFeatures::empty()).then(InOrderState::default);
    let state = SplitDriverState { avail: start, published: start, used: start, in_order, ..Default::default() };
    let driver = SplitDriver::restore(memory, layout, features, &state).unwrap();
    (driver, SplitDevice::new(memory, layout, features, RingBase::split(start)).unwrap())
}

/// The layout of a packed ring, with space for the largest one.
pub(crate) fn packed_layout(size: u16) -> PackedLayout {
    PackedLayout { size, desc: DESC, driver: DRIVER, device: DEVICE }
}

/// Both sides of an empty packed ring whose positions are `start`.
pub(crate) fn packed_at(
    memory: &Memory,
    layout: PackedLayout,
    features: VirtioFeatures,
    start: Position,
) -> (PackedDriver, PackedDevice) {
    drop(PackedDriver::new(memory, layout, features).unwrap());
    for index in 0..layout.size {
        // Used in this round before `start`, in the previous round from there.
        let flags = if (index < start.index) == start.wrap { 0x8080 } else { 0 };
        put_desc(memory, layout.desc.unchecked_add(u64::from(index) * 16), 0, 0, 0, flags);
    }
    let in_order = (features & IN_ORDER != VirtioFeatures::empty()).then(InOrderState::default);
    let (requests, held) = (Vec::new(), 0);
    let state = PackedDriverState { avail: start, published: start, used: start, requests, held, in_order };
    let driver = PackedDriver::restore(memory, layout, features, &state).unwrap();
    let base = RingBase::packed(start.index, start.wrap, start.index, start.wrap);
    (driver, PackedDevice::new(memory, layout, features, base).unwrap())
}

/// Both sides of an empty ring of either kind. A split ring is near the end of its indexes, a packed one near its end.
pub(crate) fn either(memory: &Memory, packed: bool, size: u16, features: VirtioFeatures) -> (DriverRing, DeviceRing) {
    if packed {
        let start = Position { index: size - 1, wrap: true };
        let (driver, device) = packed_at(memory, packed_layout(size), features, start);
        return (DriverRing::Packed(driver), DeviceRing::Packed(device));
    }
    let (driver, device) = ring_at(memory, layout(size), features, 0xfffe);
    (DriverRing::Split(driver), DeviceRing::Split(device))
}

pub(crate) fn buffer(gpa: u64, len: u32) -> Buffer {
    Buffer { gpa: GuestAddress(gpa), len }
}

/// Writes a descriptor at `at`. `flags` and `next` are id and flags on a packed ring.
pub(crate) fn put_desc(memory: &Memory, at: GuestAddress, gpa: u64, len: u32, flags: u16, next: u16) {
    let bytes = [&gpa.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
    memory.write(at, &bytes).unwrap();
}
