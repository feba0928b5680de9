//! Both sides of a ring with any bytes in its areas: bounded loops, bounded chains, no panic.
//!
//! Input: size and kind, features, indexes. The rest is repeated to fill guest memory, which has the ring in it.
#![no_main]

use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::memory::{Address, GuestAddress, Memory, Region, UserAddress, sealed_memfd};
use vhost_migrate::ring::{
    Buffer, Chain, PackedDevice, PackedDriver, PackedLayout, RingBase, SplitDevice, SplitDriver, SplitLayout,
};

const BYTES: u64 = 0x2000;
const LAYOUT: SplitLayout =
    SplitLayout { size: 64, desc: GuestAddress(0), avail: GuestAddress(0x400), used: GuestAddress(0x600) };
const PACKED: PackedLayout =
    PackedLayout { size: 64, desc: GuestAddress(0), driver: GuestAddress(0x400), device: GuestAddress(0x404) };

static MEMORY: LazyLock<Memory> = LazyLock::new(|| {
    let fd = sealed_memfd("fuzz", BYTES).unwrap();
    Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), BYTES, UserAddress(0), 0).unwrap())]).unwrap()
});

fuzz_target!(|input: &[u8]| {
    let Some((&[bits, features, base_low, base_high, ahead, lag, requests, _], bytes)) = input.split_first_chunk()
    else {
        return;
    };
    if bytes.is_empty() {
        return;
    }
    let all: Vec<u8> = bytes.iter().copied().cycle().take(BYTES as usize).collect();
    // Bits 24 to 39: INDIRECT_DESC, EVENT_IDX, and IN_ORDER.
    let features = VirtioFeatures::from_bits_retain(u64::from(features) << 24 | u64::from(bits >> 7) << 35);
    if bits & 0x40 != 0 {
        let layout = PackedLayout { size: 1 + u16::from(bits & 0x3f), ..PACKED };
        packed(layout, features, [base_low, base_high, ahead, lag], requests, &all);
    } else {
        let layout = SplitLayout { size: 1 << (bits % 7), ..LAYOUT };
        split(layout, features, [base_low, base_high, ahead, lag], requests, &all);
    }
});

fn split(layout: SplitLayout, features: VirtioFeatures, indexes: [u8; 4], requests: u8, all: &[u8]) {
    let memory = &*MEMORY;
    let mut driver = SplitDriver::new(memory, layout, features).unwrap();
    for request in 0..u64::from(requests) {
        let _ = driver.add(&[Buffer { gpa: GuestAddress(request), len: 1 }], &[], None);
    }
    let _ = driver.publish();
    memory.write(GuestAddress(0), all).unwrap();

    let outstanding = driver.outstanding();
    let mut completed = 0;
    while let Ok(Some(used)) = driver.pop_used() {
        assert!(used.head < layout.size);
        completed += 1;
    }
    assert!(completed <= outstanding && driver.outstanding() == outstanding - completed);

    let [base_low, base_high, ahead, lag] = indexes;
    let base = u16::from_le_bytes([base_low, base_high]);
    memory.write(layout.avail.unchecked_add(2), &base.wrapping_add(ahead.into()).to_le_bytes()).unwrap();
    memory.write(layout.used.unchecked_add(2), &base.wrapping_sub(lag.into()).to_le_bytes()).unwrap();
    let mut device = SplitDevice::new(memory, layout, features, RingBase::split(base)).unwrap();
    let mut chain = Chain::default();
    let mut taken = 0;
    while let Ok(true) = device.pop(&mut chain) {
        taken += 1;
        assert!(taken <= layout.size && chain.head < layout.size);
        assert!(chain.readable.len() + chain.writable.len() <= 1024);
        assert!(chain.readable_bytes() + chain.writable_bytes() <= 1 << 32);
        device.push(chain.head, 0);
    }
    let _ = (device.publish(), device.enable_notifications());
}

fn packed(layout: PackedLayout, features: VirtioFeatures, base: [u8; 4], requests: u8, all: &[u8]) {
    let memory = &*MEMORY;
    let mut driver = PackedDriver::new(memory, layout, features).unwrap();
    for request in 0..u64::from(requests) {
        let _ = driver.add(&[Buffer { gpa: GuestAddress(request), len: 1 }; 3][request as usize % 3..], &[], None);
    }
    let _ = driver.publish();
    memory.write(GuestAddress(0), all).unwrap();

    let outstanding = driver.outstanding();
    let mut completed = 0;
    while let Ok(Some(used)) = driver.pop_used() {
        assert!(used.head < layout.size);
        completed += 1;
    }
    assert!(completed <= outstanding && driver.outstanding() == outstanding - completed);
    assert!(PackedDriver::restore(memory, layout, features, &driver.state()).is_ok());

    let base = RingBase::from_bits(u32::from_le_bytes(base));
    let Ok(mut device) = PackedDevice::new(memory, layout, features, base) else { return };
    let (mut chain, mut again) = (Chain::default(), Chain::default());
    let mut slots = device.used_position().until(device.avail_position(), layout.size).unwrap();
    let mut taken = Vec::new();
    while let Ok(true) = device.pop(&mut chain) {
        slots += chain.slots;
        assert!(slots <= layout.size && chain.slots > 0);
        assert!(chain.readable.len() + chain.writable.len() <= 1024);
        assert!(chain.readable_bytes() + chain.writable_bytes() <= 1 << 32);
        let descs = device.descs().to_vec();
        device.resubmit(&descs, &mut again).unwrap();
        assert!(again.head == chain.head && again.slots == chain.slots && again.writable == chain.writable);
        taken.push((chain.head, chain.slots));
    }
    taken.into_iter().for_each(|(id, slots)| device.push(id, slots, 1));
    let _ = (device.publish(), device.enable_notifications());
    assert!(device.avail_position().index < layout.size && device.used_position().index < layout.size);
}
