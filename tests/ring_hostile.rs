//! Rings with arbitrary contents, written by a guest or a device, also while the other side reads them: no panic, no
//! endless loop, and no more descriptors than the ring has.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "kit/ring.rs"]
mod ring;

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use ring::{EVENT_IDX, IN_ORDER, INDIRECT, TABLES, buffer, layout, memory, packed_layout, put_desc, ring_at};
use vhost_migrate::abi::virtio::{PackedDesc, VirtioFeatures};
use vhost_migrate::memory::{Address, Memory};
use vhost_migrate::ring::RingError::{Loop, TooManyBuffers};
use vhost_migrate::ring::{
    Chain, PackedDevice, PackedDriver, PackedLayout, RingBase, RingError, SplitDevice, SplitDriver, SplitLayout,
};

/// Descriptors whose values are near those of a ring of `size` entries, or arbitrary.
fn descs(size: u16) -> impl Strategy<Value = Vec<(u64, u32, u16, u16)>> {
    let gpa = prop_oneof![(0..64u64).prop_map(|i| TABLES.0 + i * 16), any::<u64>()];
    let len = prop_oneof![0..5u32, (0..70u32).prop_map(|n| n * 16), any::<u32>()];
    let flags = prop_oneof![9 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![9 => 0..=size, 1 => any::<u16>()];
    prop::collection::vec((gpa, len, flags, next), usize::from(size) + 64)
}

fn ring() -> impl Strategy<Value = (u16, Vec<(u64, u32, u16, u16)>)> {
    prop::sample::select(vec![1u16, 2, 8, 64]).prop_flat_map(|size| (Just(size), descs(size)))
}

fn put(memory: &Memory, layout: &SplitLayout, descs: &[(u64, u32, u16, u16)]) {
    for (index, &(gpa, len, flags, next)) in (0u64..).zip(descs) {
        // The first ones fill the ring's table, the others the memory for indirect tables.
        let size = u64::from(layout.size);
        let at = if index < size {
            layout.desc.unchecked_add(index * 16)
        } else {
            TABLES.unchecked_add((index - size) * 16)
        };
        put_desc(memory, at, gpa, len, flags, next);
    }
}

/// Takes all requests. None is completed, so there can be at most as many as the ring has entries.
fn drain(device: &mut SplitDevice, size: u16) {
    let mut chain = Chain::default();
    let mut taken = 0;
    while let Ok(true) = device.pop(&mut chain) {
        taken += 1;
        assert!(taken <= size, "more requests than the ring has entries");
        assert!(chain.head < size);
        assert!(chain.readable.len() + chain.writable.len() <= 1024);
        assert!(chain.readable_bytes() + chain.writable_bytes() <= 1 << 32);
        assert!(chain.readable.iter().chain(&chain.writable).all(|buffer| buffer.len > 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_split_device_handles_arbitrary_descriptors_and_indexes(
        (size, descs) in ring(), avail in prop::collection::vec(prop_oneof![4 => 0..70u16, 1 => any::<u16>()], 67),
        ahead in prop_oneof![4 => 0..66u16, 1 => any::<u16>()], base in any::<u16>(), features in any::<u64>(),
    ) {
        let (memory, layout) = (memory(), layout(size));
        put(&memory, &layout, &descs);
        let avail: Vec<u8> = avail.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write(layout.avail, &avail[..usize::from(size) * 2 + 6]).unwrap();
        memory.write(layout.avail.unchecked_add(2), &base.wrapping_add(ahead).to_le_bytes()).unwrap();
        memory.write(layout.used.unchecked_add(2), &base.to_le_bytes()).unwrap();
        let mut device = SplitDevice::new(&memory, layout, VirtioFeatures::from_bits_retain(features), RingBase::split(base)).unwrap();
        drain(&mut device, size);
    }

    #[test]
    fn a_split_driver_handles_an_arbitrary_used_ring(
        bytes in prop::collection::vec(prop_oneof![3 => 0..8u8, 1 => any::<u8>()], 70), requests in 0..9u16,
        index in prop_oneof![4 => 0..10u16, 1 => any::<u16>()],
    ) {
        let (memory, layout) = (memory(), layout(8));
        let mut driver = SplitDriver::new(&memory, layout, EVENT_IDX).unwrap();
        (0..requests).for_each(|i| { driver.add(&[buffer(i.into(), 1)], &[], None).unwrap(); });
        let _ = driver.publish();
        memory.write(layout.used, &bytes).unwrap();
        memory.write(layout.used.unchecked_add(2), &index.to_le_bytes()).unwrap();
        let mut taken = 0;
        while let Ok(Some(used)) = driver.pop_used() {
            prop_assert!(used.head < 8);
            taken += 1;
        }
        prop_assert!(taken <= requests);
        prop_assert_eq!((driver.outstanding(), driver.free()), (requests - taken, 8 - requests + taken));
    }
}

#[test]
fn a_guest_that_rewrites_a_split_ring_while_it_is_read_gains_no_extra_buffers() {
    let (memory, layout) = (memory(), layout(8));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = 0x2545_f491_4f6c_dd1du64;
            while !stop.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let [at, flags, next, len, head, idx, odd, _] = random.to_le_bytes();
                let at = u64::from(at % 64);
                let table = if at < 8 { layout.desc } else { TABLES };
                let next = if odd == 0 { u16::MAX } else { u16::from(next % 9) };
                let gpa = TABLES.0 + u64::from(len % 16) * 16;
                put_desc(
                    &memory,
                    table.unchecked_add(at * 16),
                    gpa,
                    u32::from(len % 8) * 16,
                    u16::from(flags % 8),
                    next,
                );
                let slot = layout.avail.unchecked_add(4 + u64::from(head % 8) * 2);
                memory.write(slot, &u16::from(head / 8 % 9).to_le_bytes()).unwrap();
                memory.write(layout.avail.unchecked_add(2), &u16::from(idx % 10).to_le_bytes()).unwrap();
            }
        });
        let mut chain = Chain::default();
        let mut seen = [0; 2];
        while seen.iter().any(|count| *count < 2000) {
            let mut device = SplitDevice::new(&memory, layout, INDIRECT, RingBase::split(0)).unwrap();
            loop {
                let popped = device.pop(&mut chain);
                match popped {
                    Ok(true) => seen[0] += 1,
                    Ok(false) => break,
                    Err(_) => {
                        seen[1] += 1;
                        break;
                    }
                }
                assert!(chain.head < 8 && device.next_avail() <= 8);
                assert!(chain.readable.len() + chain.writable.len() <= 16);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_chain_over_the_largest_split_ring_is_refused() {
    let (memory, layout) = (memory(), layout(32768));
    let (_, mut device) = ring_at(&memory, layout, INDIRECT, 0);
    // With buffers of 0 bytes, so that the limit of descriptors is reached and not the limit of buffers.
    for index in 0..32768u16 {
        put_desc(&memory, layout.desc.unchecked_add(u64::from(index) * 16), 0, 0, 1, (index + 1) % 32768);
    }
    memory.write(layout.avail.unchecked_add(2), &1u16.to_le_bytes()).unwrap();
    assert!(matches!(device.pop(&mut Chain::default()), Err(Loop { head: 0 })));
    for index in 0..1025u16 {
        put_desc(&memory, layout.desc.unchecked_add(u64::from(index) * 16), 0, 1, 1, index + 1);
    }
    assert!(matches!(device.pop(&mut Chain::default()), Err(TooManyBuffers { head: 0, limit: 1024 })));
    put_desc(&memory, layout.desc.unchecked_add(1023 * 16), 0, 1, 0, 0);
    let mut chain = Chain::default();
    assert!(device.pop(&mut chain).unwrap());
    assert_eq!(chain.readable.len(), 1024);
}

/// Descriptors of a packed ring, many of them available.
fn packed_descs() -> impl Strategy<Value = (u16, Vec<(u64, u32, u16, u16)>)> {
    let gpa = prop_oneof![(0..64u64).prop_map(|i| TABLES.0 + i * 16), any::<u64>()];
    let len = prop_oneof![0..5u32, (0..70u32).prop_map(|n| n * 16), any::<u32>()];
    let flags =
        (prop_oneof![9 => 0..8u16, 1 => any::<u16>()], prop::sample::select(vec![0x80, 0x80, 0x80, 0x8000, 0x8080]));
    let flags = flags.prop_map(|(flags, round)| flags & 0x7f7f | round);
    let desc = (gpa, len, any::<u16>(), flags);
    prop::sample::select(vec![1u16, 2, 7, 64])
        .prop_flat_map(move |size| (Just(size), prop::collection::vec(desc.clone(), usize::from(size) + 64)))
}

fn packed_put(memory: &Memory, layout: &PackedLayout, descs: &[(u64, u32, u16, u16)]) {
    for (index, &(gpa, len, id, flags)) in (0u64..).zip(descs) {
        let size = u64::from(layout.size);
        let at = if index < size {
            layout.desc.unchecked_add(index * 16)
        } else {
            TABLES.unchecked_add((index - size) * 16)
        };
        put_desc(memory, at, gpa, len, id, flags);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_packed_device_handles_arbitrary_descriptors_and_bases(
        (size, descs) in packed_descs(), base in prop_oneof![Just(0x8000_8000), Just(0), any::<u32>()], event in any::<u32>(),
        indexes in (any::<u16>(), any::<u16>()), features in any::<u64>(), complete in any::<bool>(),
    ) {
        let (memory, layout) = (memory(), packed_layout(size));
        packed_put(&memory, &layout, &descs);
        memory.write(layout.driver, &event.to_le_bytes()).unwrap();
        let _ = PackedDevice::new(&memory, layout, VirtioFeatures::from_bits_retain(features), RingBase::from_bits(base));
        let (avail, used) = (indexes.0 % size, indexes.1 % size);
        let base = RingBase::packed(avail, avail >= used, used, true);
        let mut device = PackedDevice::new(&memory, layout, VirtioFeatures::from_bits_retain(features), base).unwrap();
        let mut chain = Chain::default();
        let in_flight = device.used_position().until(device.avail_position(), size).unwrap();
        let mut slots = u32::from(in_flight);
        // Completions free descriptors, so that further requests are taken; the bound ends the test.
        for _ in 0..3 * size {
            if !matches!(device.pop(&mut chain), Ok(true)) {
                break;
            }
            slots += u32::from(chain.slots);
            prop_assert!(slots <= size.into() && chain.slots > 0, "more descriptors than the ring has");
            prop_assert_eq!(device.descs().len(), usize::from(chain.slots));
            prop_assert!(chain.readable.len() + chain.writable.len() <= 1024);
            prop_assert!(chain.readable_bytes() + chain.writable_bytes() <= 1 << 32);
            prop_assert!(chain.readable.iter().chain(&chain.writable).all(|buffer| buffer.len > 0));
            let taken = device.descs().to_vec();
            let mut again = Chain::default();
            device.resubmit(&taken, &mut again).unwrap();
            prop_assert_eq!((again.head, again.slots, &again.readable), (chain.head, chain.slots, &chain.readable));
            if complete {
                device.push(chain.head, chain.slots, 1);
                let _ = device.publish();
                slots -= u32::from(chain.slots);
            }
        }
        prop_assert!(device.avail_position().index < size && device.used_position().index < size);
        let _ = device.enable_notifications();
    }

    #[test]
    fn a_packed_device_handles_arbitrary_copies_of_descriptors(
        copies in prop::collection::vec((any::<u64>(), 0..70u32, any::<u16>(), any::<u16>()), 0..12), features in any::<u64>(),
    ) {
        let (memory, layout) = (memory(), packed_layout(8));
        let copies: Vec<PackedDesc> = copies.into_iter().map(|(addr, len, id, flags)| PackedDesc {
            addr: addr.into(), len: len.into(), id: id.into(), flags: flags.into(),
        }).collect();
        let mut device = PackedDevice::new(&memory, layout, VirtioFeatures::from_bits_retain(features), RingBase::PACKED_START).unwrap();
        let mut chain = Chain::default();
        if device.resubmit(&copies, &mut chain).is_ok() {
            prop_assert!((1..=8).contains(&copies.len()));
            prop_assert_eq!((chain.slots, chain.head), (copies.len() as u16, copies.last().unwrap().id.get()));
        }
    }

    #[test]
    fn a_packed_driver_handles_arbitrary_descriptors(
        descs in prop::collection::vec((0..10u16, prop::sample::select(vec![0x8080u16, 0x8082, 0, 0x80])), 7),
        requests in prop::collection::vec(1..4usize, 0..8), in_order in any::<bool>(),
    ) {
        let (memory, layout) = (memory(), packed_layout(7));
        let features = if in_order { IN_ORDER } else { VirtioFeatures::empty() };
        let mut driver = PackedDriver::new(&memory, layout, features).unwrap();
        let mut made = 0;
        for count in &requests {
            made += u16::from(driver.add(&vec![buffer(0, 1); *count], &[], None).unwrap().is_some());
        }
        let _ = driver.publish();
        for (index, (id, flags)) in (0..).zip(descs) {
            put_desc(&memory, layout.desc.unchecked_add(index * 16), 0, 5, id, flags);
        }
        let mut seen = std::collections::HashSet::new();
        while let Ok(Some(used)) = driver.pop_used() {
            prop_assert!(used.head < 7 && seen.insert(used.head), "no id is completed twice");
        }
        prop_assert_eq!(usize::from(driver.outstanding()), usize::from(made) - seen.len());
        let state = driver.state();
        let slots: u16 = state.requests.iter().map(|request| request.slots).sum();
        prop_assert_eq!(slots, 7 - driver.free());
        prop_assert!(PackedDriver::restore(&memory, layout, features, &state).is_ok());
    }
}

#[test]
fn a_guest_that_rewrites_a_packed_ring_while_it_is_read_gains_no_extra_buffers() {
    let (memory, layout) = (memory(), packed_layout(7));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = 0x2545_f491_4f6c_dd1du64;
            while !stop.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let [at, flags, id, len, round, ..] = random.to_le_bytes();
                let at = u64::from(at % 64);
                let desc = if at < 7 { layout.desc.unchecked_add(at * 16) } else { TABLES.unchecked_add(at % 16 * 16) };
                let gpa = TABLES.0 + u64::from(len % 16) * 16;
                let round = [0x80, 0x80, 0x80, 0x8000][usize::from(round % 4)];
                put_desc(&memory, desc, gpa, u32::from(len % 8) * 16, id.into(), u16::from(flags % 8) | round);
            }
        });
        let mut chain = Chain::default();
        let mut seen = [0; 2];
        while seen.iter().any(|count| *count < 2000) {
            let mut device = PackedDevice::new(&memory, layout, INDIRECT, RingBase::PACKED_START).unwrap();
            let mut slots = 0;
            loop {
                match device.pop(&mut chain) {
                    Ok(true) => seen[0] += 1,
                    Ok(false) => break,
                    Err(_) => {
                        seen[1] += 1;
                        break;
                    }
                }
                slots += chain.slots;
                assert!(slots <= 7);
                assert!(chain.readable.len() + chain.writable.len() <= 8);
                // The device keeps the descriptors that it checked, even if the ring has changed since.
                let copies = device.descs();
                assert_eq!((copies.len(), copies[copies.len() - 1].id.get()), (chain.slots.into(), chain.head));
                if copies[0].flags.get() & 4 == 0 {
                    let bytes: u64 = copies.iter().map(|copy| u64::from(copy.len.get())).sum();
                    assert_eq!(bytes, chain.readable_bytes() + chain.writable_bytes());
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_chain_over_the_largest_packed_ring_is_refused() {
    let (memory, layout) = (memory(), packed_layout(32768));
    let mut device = PackedDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::PACKED_START).unwrap();
    for index in 0..32768u64 {
        put_desc(&memory, layout.desc.unchecked_add(index * 16), 0, 1, 0, 0x81);
    }
    let mut chain = Chain::default();
    assert!(matches!(device.pop(&mut chain), Err(RingError::AvailDescriptors { .. })), "a chain without an end");
    put_desc(&memory, layout.desc.unchecked_add(32767 * 16), 0, 1, 0, 0x80);
    assert!(matches!(device.pop(&mut chain), Err(RingError::TooManyBuffers { limit: 1024, .. })));
    put_desc(&memory, layout.desc.unchecked_add(1023 * 16), 0, 1, 0, 0x80);
    assert!(device.pop(&mut chain).unwrap());
    assert_eq!((chain.readable.len(), chain.slots), (1024, 1024));
}
