//! Both sides of a packed ring: each side takes exactly what the other side adds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/ring.rs"]
mod ring;
#[path = "kit/ring_sides.rs"]
mod ring_sides;

use proptest::prelude::*;
use ring::{EVENT_IDX, IN_ORDER, INDIRECT, TABLES, buffer, memory, packed_at, packed_layout, put_desc};
use ring_sides::{exchange, op};
use vhost_migrate::abi::virtio::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, VIRTIO_F_RING_PACKED, VirtioFeatures};
use vhost_migrate::memory::{Address, GuestAddress};
use vhost_migrate::ring::{
    Chain, DeviceRing, DriverRing, InOrderState, PackedDevice, PackedDriver, PackedDriverRequest, PackedDriverState,
    PackedLayout, Position, RingBase, RingError, RingLayout, UsedBuffer,
};

fn position(size: u16) -> impl Strategy<Value = Position> {
    (prop_oneof![Just(0), Just(size - 1), 0..size], any::<bool>()).prop_map(|(index, wrap)| Position { index, wrap })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_side_of_a_packed_ring_takes_what_the_other_adds_in_order(
        (size, start) in prop_oneof![1..=12u16, Just(256), Just(32767), Just(32768)]
            .prop_flat_map(|size| (Just(size), position(size))),
        event_idx in any::<bool>(), in_order in any::<bool>(), ops in prop::collection::vec(op(), 0..600),
    ) {
        let mut features = INDIRECT;
        features |= if event_idx { EVENT_IDX } else { VirtioFeatures::empty() };
        features |= if in_order { IN_ORDER } else { VirtioFeatures::empty() };
        let (memory, layout) = (memory(), packed_layout(size));
        let (driver, device) = packed_at(&memory, layout, features, start);
        let sides = (DriverRing::Packed(driver), DeviceRing::Packed(device));
        exchange(&memory, RingLayout::Packed(layout), features, sides, ops)?;
    }

    /// Oracle: a counter that never wraps.
    #[test]
    fn a_position_is_a_counter_modulo_two_rounds(
        size in prop_oneof![1..20u16, Just(32767), Just(32768)], from in any::<u32>(), slots in any::<u16>(),
    ) {
        let at = |count: u64| {
            let size = u64::from(size);
            Position { index: (count % size) as u16, wrap: (count / size).is_multiple_of(2) }
        };
        let (from, slots) = (u64::from(from), slots % (size + 1));
        let to = at(from).after(slots, size);
        prop_assert_eq!(to, at(from + u64::from(slots)));
        prop_assert_eq!(at(from).until(to, size), Some(slots));
        prop_assert_eq!(to.before(slots, size), at(from));
        let more_than_a_round = at(from + u64::from(size) + 1 + u64::from(slots) % u64::from(size));
        if size > 1 && slots + 1 < size {
            prop_assert_eq!(at(from).until(more_than_a_round, size), None);
        }
    }
}

/// Takes the chain of a ring of 8 descriptors with all features. `descs` are the first ones: address, length, id and
/// flags, to which AVAIL is added.
fn one_chain(descs: &[(u64, u32, u16, u16)]) -> Result<Chain, RingError> {
    one_chain_with(INDIRECT, descs, &[])
}

fn one_chain_with(
    features: VirtioFeatures,
    descs: &[(u64, u32, u16, u16)],
    table: &[(u64, u32, u16, u16)],
) -> Result<Chain, RingError> {
    let (memory, layout) = (memory(), packed_layout(8));
    let mut device = PackedDevice::new(&memory, layout, features, RingBase::PACKED_START).unwrap();
    for (index, &(gpa, len, id, flags)) in (0..).zip(descs) {
        put_desc(&memory, layout.desc.unchecked_add(index * 16), gpa, len, id, flags | A);
    }
    for (index, &(gpa, len, id, flags)) in (0..).zip(table) {
        put_desc(&memory, TABLES.unchecked_add(index * 16), gpa, len, id, flags);
    }
    let mut chain = Chain::default();
    let popped = device.pop(&mut chain);
    // A request that cannot be taken does not move the position.
    assert_eq!(device.avail_position() == Position::START, popped.is_err());
    assert!(popped?);
    Ok(chain)
}

const N: u16 = DESC_F_NEXT;
const W: u16 = DESC_F_WRITE;
const I: u16 = DESC_F_INDIRECT;
/// Available in the first round.
const A: u16 = 0x80;

#[test]
fn a_packed_chain_has_the_id_of_its_last_descriptor() {
    let chain = one_chain(&[(1, 10, 7, N), (2, 0, 8, N), (3, 30, 9, N | W), (4, 40, 65535, W), (5, 50, 1, 0)]).unwrap();
    assert_eq!((chain.head, chain.slots), (65535, 4));
    assert_eq!((chain.readable, chain.writable), (vec![buffer(1, 10)], vec![buffer(3, 30), buffer(4, 40)]));
}

#[test]
fn only_the_write_flag_is_used_in_a_packed_indirect_table() {
    let table = [(1, 10, 5, 0), (2, 20, 6, N | I | A), (3, 0, 0, W), (4, 40, 9, W | 0x8000), (5, 50, 0, 0)];
    let chain = one_chain_with(INDIRECT, &[(TABLES.0, 4 * 16, 3, I | W)], &table).unwrap();
    assert_eq!((chain.head, chain.slots), (3, 1));
    assert_eq!((chain.readable, chain.writable), (vec![buffer(1, 10), buffer(2, 20)], vec![buffer(4, 40)]));
}

#[test]
fn an_invalid_packed_chain_is_refused_with_its_error() {
    use RingError::*;
    assert!(matches!(one_chain(&[(1, 1, 0, N); 8]), Err(AvailDescriptors { index: 0, in_flight: 0, size: 8 })));
    assert!(matches!(one_chain(&[(1, 1, 0, W | N), (1, 1, 0, 0)]), Err(ReadableAfterWritable { .. })));
    let max = u32::MAX;
    assert!(one_chain(&[(1, max, 0, N), (1, 1, 0, 0)]).is_ok());
    assert!(matches!(one_chain(&[(1, max, 0, N), (1, 2, 0, W)]), Err(TooManyBytes { .. })));
    let table = (TABLES.0, 32, 0, I);
    assert!(matches!(one_chain_with(VirtioFeatures::empty(), &[table], &[]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(TABLES.0, 32, 0, I | N), (1, 1, 1, 0)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(1, 1, 0, N), table]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(TABLES.0, 0, 0, I)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(TABLES.0, 40, 0, I)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(TABLES.0, 1025 * 16, 0, I)]), Err(TooManyBuffers { limit: 1024, .. })));
    assert!(matches!(one_chain(&[(u64::MAX - 15, 32, 0, I)]), Err(IndirectOutside { .. })));
}

#[test]
fn packed_descriptors_in_flight_are_not_taken_again() {
    let (memory, layout) = (memory(), packed_layout(4));
    let (mut driver, mut device) = packed_at(&memory, layout, VirtioFeatures::empty(), Position::START);
    for i in 0..3 {
        driver.add(&[buffer(i, 1)], &[], None).unwrap().unwrap();
    }
    let _ = driver.publish();
    let mut chain = Chain::default();
    while device.pop(&mut chain).unwrap() {}
    // One descriptor is free, but the driver's next chain has two.
    put_desc(&memory, layout.desc.unchecked_add(3 * 16), 1, 1, 3, N | A);
    put_desc(&memory, layout.desc, 1, 1, 3, 0x8000);
    let refused = RingError::AvailDescriptors { index: 3, in_flight: 3, size: 4 };
    assert_eq!(device.pop(&mut chain).unwrap_err().to_string(), refused.to_string());
    put_desc(&memory, layout.desc.unchecked_add(3 * 16), 1, 1, 3, A);
    assert!(device.pop(&mut chain).unwrap());
    // Descriptor 0 is available in the second round by its flags, and has been in flight since the first.
    assert!(matches!(device.pop(&mut chain), Err(RingError::AvailDescriptors { index: 0, in_flight: 4, .. })));
}

#[test]
fn copies_with_an_invalid_number_of_descriptors_are_refused() {
    let (memory, layout) = (memory(), packed_layout(2));
    let (mut driver, mut device) = packed_at(&memory, layout, VirtioFeatures::empty(), Position::START);
    driver.add(&[buffer(1, 1)], &[buffer(2, 2)], None).unwrap().unwrap();
    let _ = driver.publish();
    let mut chain = Chain::default();
    assert!(device.pop(&mut chain).unwrap());
    let descs = device.descs().to_vec();
    for copies in [&[][..], &[descs.clone(), descs].concat()[..3]] {
        assert!(matches!(device.resubmit(copies, &mut chain), Err(RingError::Copies { .. })));
    }
}

/// Rules R4.2 and R4.5.
#[test]
fn the_base_of_a_packed_ring_holds_both_positions() {
    let (memory, layout) = (memory(), packed_layout(5));
    let new = |bits| PackedDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::from_bits(bits));
    let at = |index, wrap| Position { index, wrap };
    let positions = |bits| {
        let device = new(bits).unwrap();
        assert_eq!(RingBase::from_bits(device.base().bits()), device.base());
        (device.avail_position(), device.used_position())
    };
    assert_eq!(RingBase::PACKED_START.bits(), 0x8000_8000);
    assert_eq!(positions(0x8000_8000), (Position::START, Position::START));
    assert_eq!(positions(0x8003_8004), (at(4, true), at(3, true)));
    assert_eq!(positions(0x8004_0002), (at(2, false), at(4, true)));
    // A front-end that knows only the avail position (rule R4.3).
    assert_eq!(positions(0x0000_8000), (Position::START, Position::START));
    assert_eq!(positions(0x0000_0003), (at(3, false), at(3, false)));
    for bits in [0x8000_8005, 0x8005_8000, 0xffff_ffff, 0x7fff, 0x8003_8002, 0x8002_0003] {
        assert!(matches!(new(bits), Err(RingError::Positions { size: 5, .. })), "{bits:#x}");
    }
    let mut device = new(0x8000_8000).unwrap();
    device.set_positions(at(1, false), at(3, true)).unwrap();
    assert_eq!(device.base().bits(), 0x8003_0001);
    assert!(device.set_positions(at(5, true), at(5, true)).is_err());
    assert_eq!(device.base().bits(), 0x8003_0001);
    // Recovery may set a used position of 0 with wrap counter 0, which is used unchanged.
    device.set_positions(at(3, false), at(0, false)).unwrap();
    assert_eq!(device.used_position(), at(0, false));
}

#[test]
fn a_device_deduces_the_position_of_a_packed_ring_with_a_stale_base() {
    let (memory, layout) = (memory(), packed_layout(4));
    let (here, there) = (Position { index: 2, wrap: false }, Position { index: 1, wrap: true });
    let at = |position: Position| {
        let base = RingBase::packed(position.index, position.wrap, position.index, position.wrap);
        PackedDevice::new(&memory, layout, VirtioFeatures::empty(), base).unwrap()
    };
    // Nothing can be deduced from a ring that no driver has written.
    for index in 0..4 {
        put_desc(&memory, layout.desc.unchecked_add(index * 16), 0, 0, 0, 0);
    }
    let mut device = at(there);
    assert_eq!((device.find_position().unwrap(), device.used_position()), (false, there));
    drop(packed_at(&memory, layout, VirtioFeatures::empty(), here));
    let mut device = at(here);
    assert_eq!((device.find_position().unwrap(), device.used_position()), (false, here));
    let mut device = at(there);
    assert_eq!((device.find_position().unwrap(), device.used_position()), (true, here));
    assert_eq!(device.avail_position(), here);
}

#[test]
fn descriptor_flags_are_read_and_restored_only_inside_the_packed_ring() {
    let (memory, layout) = (memory(), packed_layout(4));
    let (_driver, mut device) = packed_at(&memory, layout, VirtioFeatures::empty(), Position { index: 0, wrap: true });
    put_desc(&memory, layout.desc.unchecked_add(3 * 16), 1, 2, 3, 0x8080);
    put_desc(&memory, layout.desc.unchecked_add(4 * 16), 4, 5, 6, 7);
    assert_eq!([2, 3, 4].map(|index| device.flags(index)), [0, 0x8080, 0]);
    device.restore_flags(&[(3, 0x80), (4, 0xffff)]);
    assert_eq!(device.flags(3), 0x80);
    let mut behind = [0; 16];
    memory.read(layout.desc.unchecked_add(4 * 16), &mut behind).unwrap();
    assert_eq!(behind, [4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 6, 0, 7, 0]);
}

#[test]
fn the_initial_base_of_a_ring_depends_on_its_kind() {
    let packed = VIRTIO_F_RING_PACKED;
    assert_eq!(RingBase::initial(VirtioFeatures::empty()), RingBase::split(0));
    assert_eq!(RingBase::initial(packed), RingBase::PACKED_START);
    let starts = |features| {
        // The third is that of a front-end that knows only the avail position (rule R4.3).
        [0, 0x8000_8000, 0x0000_8000, 1, 0x8000_8001, 0x8001_8000]
            .map(|bits| RingBase::from_bits(bits).is_initial(features))
    };
    assert_eq!(starts(VirtioFeatures::empty()), [true, false, false, false, false, false]);
    assert_eq!(starts(packed), [false, true, true, false, false, false]);
}

/// User-mode Linux begins every ring with base 0 (rule R4.4).
#[test]
fn a_base_of_zero_is_the_initial_base_of_a_packed_ring_that_was_never_used() {
    let (memory, layout) = (memory(), packed_layout(4));
    let mut driver = PackedDriver::new(&memory, layout, VirtioFeatures::empty()).unwrap();
    let at_zero = || PackedDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::from_bits(0)).unwrap();
    for round in 0..2 {
        // Requests that are available before the device is opened make no difference.
        let heads: Vec<_> = (0..4).map(|_| driver.add(&[buffer(0, 1)], &[], None).unwrap().unwrap()).collect();
        let _ = driver.publish();
        let mut device = at_zero();
        let mut chain = Chain::default();
        for head in heads {
            assert!(device.pop(&mut chain).unwrap(), "round {round}");
            assert_eq!(chain.head, head);
            device.push(chain.head, chain.slots, 0);
        }
        assert!(!device.pop(&mut chain).unwrap());
        let _ = device.publish();
        while driver.pop_used().unwrap().is_some() {}
        let wrap = round == 1;
        assert_eq!(device.base(), RingBase::packed(0, wrap, 0, wrap));
    }
}

#[test]
fn a_packed_ring_that_is_misaligned_or_outside_guest_memory_is_refused() {
    let memory = memory();
    let new = |size, desc, driver, device| {
        let [desc, driver, device] = [desc, driver, device].map(GuestAddress);
        let layout = PackedLayout { size, desc, driver, device };
        PackedDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::PACKED_START).map(drop)
    };
    let GuestAddress(end) = memory.end();
    for size in [1, 3, 8, 1000] {
        assert!(new(size, 0, 0x10000, 0x10004).is_ok());
    }
    for size in [0, 32769, u16::MAX] {
        assert!(matches!(new(size, 0, 0x100, 0x200), Err(RingError::PackedSize { .. })), "{size}");
    }
    for (desc, driver, device) in [(8, 0x100, 0x200), (0, 0x102, 0x200), (0, 0x100, 0x202)] {
        assert!(matches!(new(8, desc, driver, device), Err(RingError::Misaligned { .. })));
    }
    assert!(new(7, end - 112, 0, 0).is_ok() && new(7, 0, end - 4, 0).is_ok() && new(7, 0, 0, end - 4).is_ok());
    for (desc, driver, device) in
        [(end - 96, 0, 0), (0, end, 0), (0, 0, end), (u64::MAX - 15, 0, 0), (0, u64::MAX - 3, 0), (0, 0, u64::MAX - 3)]
    {
        assert!(matches!(new(7, desc, driver, device), Err(RingError::Outside { .. })));
    }
}

#[test]
fn a_packed_driver_refuses_completions_of_requests_that_are_not_in_flight() {
    let (memory, layout) = (memory(), packed_layout(4));
    for features in [VirtioFeatures::empty(), IN_ORDER] {
        let (mut driver, _) = packed_at(&memory, layout, features, Position::START);
        let id = driver.add(&[buffer(0, 1)], &[buffer(1, 1)], None).unwrap().unwrap();
        let complete = |id: u16| put_desc(&memory, layout.desc, 0, 1, id, 0x8080 | W);
        complete(id);
        assert!(matches!(driver.pop_used(), Err(RingError::UsedId { .. })), "not published yet");
        let _ = driver.publish();
        let unseen = driver.add(&[buffer(0, 1)], &[], None).unwrap().unwrap();
        for other in [unseen + 1, 4, u16::MAX] {
            complete(other);
            assert!(matches!(driver.pop_used(), Err(RingError::UsedId { id }) if id == u32::from(other)), "{other}");
        }
        complete(id);
        assert_eq!(driver.pop_used().unwrap(), Some(UsedBuffer { head: id, len: 1 }));
        assert_eq!((driver.free(), driver.outstanding()), (3, 1));
        put_desc(&memory, layout.desc.unchecked_add(32), 0, 1, id, 0x8080);
        assert!(matches!(driver.pop_used(), Err(RingError::UsedId { .. })), "completed already");
    }
}

#[test]
fn an_invalid_packed_driver_state_is_refused() {
    let (memory, layout) = (memory(), packed_layout(4));
    let at = |index, wrap| Position { index, wrap };
    let order = |heads: &[u16], batch: Option<u16>| InOrderState {
        queue: heads.iter().map(|head| (*head, 0)).collect(),
        batch: batch.map(|head| UsedBuffer { head, len: 0 }),
    };
    let restore = |avail, published, used, requests: &[(u16, u16)], in_order: Option<InOrderState>| {
        let features = if in_order.is_some() { IN_ORDER } else { VirtioFeatures::empty() };
        let requests = requests.iter().map(|&(id, slots)| PackedDriverRequest { id, slots }).collect();
        let state = PackedDriverState { avail, published, used, requests, held: 0, in_order };
        PackedDriver::restore(&memory, layout, features, &state).map(|driver| driver.free())
    };
    let (a, b, c) = (at(1, false), at(0, false), at(2, true));
    assert_eq!(restore(a, b, c, &[(3, 2), (0, 1)], None).unwrap(), 1);
    assert_eq!(restore(a, b, c, &[(3, 2), (0, 1)], Some(order(&[0, 3], Some(0)))).unwrap(), 1);
    assert!(restore(at(4, true), b, c, &[(3, 2)], None).is_err());
    assert!(restore(a, at(9, true), c, &[(3, 2), (0, 1)], None).is_err());
    assert!(restore(a, at(1, true), c, &[(3, 2), (0, 1)], None).is_err());
    assert!(restore(a, at(2, false), c, &[(3, 2), (0, 1)], None).is_err());
    assert!(restore(c, c, a, &[], None).is_err());
    assert!(restore(a, b, c, &[(3, 3), (0, 1)], None).is_err());
    assert!(restore(a, b, c, &[(3, 2), (3, 1)], None).is_err());
    assert!(restore(a, b, c, &[(3, 2), (4, 1)], None).is_err());
    assert!(restore(a, b, c, &[(3, 3), (1, 0)], None).is_err());
    assert!(restore(a, b, c, &[(3, 2), (0, 65535)], None).is_err());
    for bad in [order(&[0], None), order(&[0, 0], None), order(&[0, 3, 1], None), order(&[0, 3], Some(1))] {
        assert!(restore(a, b, c, &[(3, 2), (0, 1)], Some(bad)).is_err());
    }
}
