//! Both sides of a split ring: each side takes exactly what the other side adds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "kit/ring.rs"]
mod ring;
#[path = "kit/ring_sides.rs"]
mod ring_sides;

use std::sync::Arc;

use proptest::prelude::*;
use ring::{EVENT_IDX, IN_ORDER, INDIRECT, TABLES, buffer, layout, memory, put_desc, ring_at};
use ring_sides::{exchange, op};
use vhost_migrate::abi::virtio::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, VIRTIO_F_RING_PACKED, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{Access, Address, GuestAddress, Iotlb, IotlbMiss, Iova, IovaWindow, Memory, UserAddress};
use vhost_migrate::ring::{
    Buffer, Chain, DeviceRing, DriverRing, InOrderState, PackedLayout, RingBase, RingError, RingIommu, RingLayout,
    RingLog, SplitDevice, SplitDriver, SplitDriverState, SplitLayout,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_side_of_a_split_ring_takes_what_the_other_adds_in_order(
        size in (0..16u32).prop_map(|bits| 1u16 << bits), event_idx in any::<bool>(), in_order in any::<bool>(),
        start in prop_oneof![Just(0u16), Just(0xfff0), any::<u16>()], ops in prop::collection::vec(op(), 0..600),
    ) {
        let features = INDIRECT | if event_idx { EVENT_IDX } else { VirtioFeatures::empty() } | if in_order { IN_ORDER } else { VirtioFeatures::empty() };
        let (memory, layout) = (memory(), layout(size));
        let (driver, device) = ring_at(&memory, layout, features, start);
        let sides = (DriverRing::Split(driver), DeviceRing::Split(device));
        exchange(&memory, RingLayout::Split(layout), features, sides, ops)?;
    }
}

/// Rule R4.1.
#[test]
fn a_split_device_continues_at_its_base_and_reads_requests_of_a_predecessor_again() {
    let (memory, layout) = (memory(), layout(4));
    let (mut driver, mut first) = ring_at(&memory, layout, VirtioFeatures::empty(), 65535);
    let heads: Vec<u16> = (1..=3).map(|i| driver.add(&[buffer(i, 1)], &[], None).unwrap().unwrap()).collect();
    assert!(driver.publish());
    let mut chain = Chain::default();
    assert!(first.pop(&mut chain).unwrap());
    assert_eq!(first.base(), RingBase::split(0));
    drop(first);
    let mut second = SplitDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::split(65535)).unwrap();
    second.set_next_avail(0);
    second.resubmit(heads[0], &mut chain).unwrap();
    assert_eq!((chain.head, chain.readable[0].gpa), (heads[0], GuestAddress(1)));
    assert!(second.pop(&mut chain).unwrap());
    assert_eq!((chain.head, chain.readable[0].gpa), (heads[1], GuestAddress(2)));
}

/// Takes the chain of a ring of 8 entries with all features, whose avail ring has descriptor 0.
fn one_chain(descs: &[(u16, u64, u32, u16, u16)]) -> Result<Chain, RingError> {
    one_chain_with(INDIRECT, descs)
}

fn one_chain_with(features: VirtioFeatures, descs: &[(u16, u64, u32, u16, u16)]) -> Result<Chain, RingError> {
    let (memory, layout) = (memory(), layout(8));
    let mut device = SplitDevice::new(&memory, layout, features, RingBase::split(0)).unwrap();
    for &(index, gpa, len, flags, next) in descs {
        let table = if index < 8 { layout.desc } else { GuestAddress(TABLES.0 - 8 * 16) };
        put_desc(&memory, table.unchecked_add(u64::from(index) * 16), gpa, len, flags, next);
    }
    memory.write(layout.avail.unchecked_add(2), &1u16.to_le_bytes()).unwrap();
    let mut chain = Chain::default();
    assert!(device.pop(&mut chain)?);
    Ok(chain)
}

const N: u16 = DESC_F_NEXT;
const W: u16 = DESC_F_WRITE;
const I: u16 = DESC_F_INDIRECT;

#[test]
fn a_split_chain_may_end_in_an_indirect_table_whose_write_flag_is_ignored() {
    let chain = one_chain(&[
        (0, 1, 10, N, 5),
        (5, TABLES.0, 3 * 16, I | W, 0),
        (8, 2, 20, N, 2),
        (10, 3, 30, N | W, 1),
        (9, 4, 40, W, 0),
    ])
    .unwrap();
    assert_eq!(chain.readable, [buffer(1, 10), buffer(2, 20)]);
    assert_eq!(chain.writable, [buffer(3, 30), buffer(4, 40)]);
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (30, 70));
}

#[test]
fn buffers_of_zero_bytes_are_left_out() {
    let chain = one_chain(&[(0, 1, 0, N, 1), (1, 1, 5, N, 2), (2, 9, 0, W | N, 3), (3, 2, 6, W, 0)]).unwrap();
    assert_eq!((chain.readable, chain.writable), (vec![buffer(1, 5)], vec![buffer(2, 6)]));
}

#[test]
fn an_invalid_split_chain_is_refused_with_its_error() {
    use RingError::*;
    assert!(matches!(one_chain(&[(0, 1, 1, N, 8)]), Err(Descriptor { head: 0, index: 8, size: 8 })));
    assert!(matches!(one_chain(&[(0, 1, 1, N, 1), (1, 1, 1, N, 0)]), Err(Loop { head: 0 })));
    assert!(matches!(one_chain(&[(0, 1, 1, N, 0)]), Err(Loop { head: 0 })));
    assert!(matches!(one_chain(&[(0, 1, 1, W | N, 1), (1, 1, 1, 0, 0)]), Err(ReadableAfterWritable { .. })));
    let max = u32::MAX;
    assert!(one_chain(&[(0, 1, max, N, 1), (1, 1, 1, 0, 0)]).is_ok());
    assert!(matches!(one_chain(&[(0, 1, max, N, 1), (1, 1, 2, W, 0)]), Err(TooManyBytes { .. })));
    let table = (0, TABLES.0, 32, I, 0);
    assert!(matches!(one_chain_with(VirtioFeatures::empty(), &[table]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(0, TABLES.0, 32, I | N, 1)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(0, TABLES.0, 0, I, 0)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[(0, TABLES.0, 40, I, 0)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[table, (8, TABLES.0, 32, I, 0)]), Err(Indirect { .. })));
    assert!(matches!(one_chain(&[table, (8, 1, 1, N, 2)]), Err(Descriptor { index: 2, size: 2, .. })));
    assert!(matches!(one_chain(&[table, (8, 1, 1, N, 1), (9, 1, 1, N, 0)]), Err(Loop { .. })));
    assert!(matches!(one_chain(&[(0, TABLES.0, 1025 * 16, I, 0)]), Err(TooManyBuffers { limit: 1024, .. })));
    assert!(matches!(one_chain(&[(0, u64::MAX - 15, 32, I, 0)]), Err(IndirectOutside { .. })));
    assert!(matches!(one_chain(&[(0, u64::MAX, 16, I, 0)]), Err(IndirectOutside { .. })));
}

/// First I/O virtual address of buffers in the tests behind an IOMMU.
const IOVA: u64 = 1 << 40;

/// A ring of 8 entries behind an IOMMU. The I/O virtual addresses of its areas are the guest-physical ones, except for
/// the used ring at `IOVA / 2`. From `IOVA` there are four pages, at 0x6000, 0x7000, 0x9000 and 0xb000; the last is
/// read-only.
fn behind_an_iommu(memory: &Memory) -> (SplitDevice, Arc<Iotlb>) {
    let at = SplitLayout { used: GuestAddress(IOVA / 2), ..layout(8) };
    let iotlb = Arc::new(Iotlb::default());
    for (iova, gpa, permitted) in [
        (at.desc.0, at.desc.0, Access::Read),
        (at.avail.0, at.avail.0, Access::Read),
        (at.used.0, layout(8).used.0, Access::ReadWrite),
        (IOVA, 0x6000, Access::ReadWrite),
        (IOVA + 0x1000, 0x7000, Access::ReadWrite),
        (IOVA + 0x2000, 0x9000, Access::ReadWrite),
        (IOVA + 0x3000, 0xb000, Access::Read),
    ] {
        // The front-end has guest memory at the same addresses.
        iotlb.update(Iova(iova), 0x1000, UserAddress(gpa), Some(permitted)).unwrap();
    }
    let [desc, avail, used] = RingLayout::area_bytes(VirtioFeatures::empty(), 8);
    let areas = [(at.desc, desc, Access::Read), (at.avail, avail, Access::Read), (at.used, used, Access::ReadWrite)]
        .map(|(address, bytes, access)| (Iova(address.0), bytes, access));
    let window = Arc::new(IovaWindow::open(memory, &iotlb, &areas, None).unwrap());
    let mut device = SplitDevice::new(window.memory(), at, INDIRECT, RingBase::split(0)).unwrap();
    device.set_iommu(RingIommu { memory: memory.clone(), iotlb: iotlb.clone(), window });
    (device, iotlb)
}

#[test]
fn buffers_behind_an_iommu_are_translated_page_by_page() {
    let memory = memory();
    let (mut device, iotlb) = behind_an_iommu(&memory);
    let mut driver = SplitDriver::new(&memory, layout(8), VirtioFeatures::empty()).unwrap();
    let mut add = |readable: &[Buffer], writable: &[Buffer]| {
        driver.add(readable, writable, None).unwrap();
        let _ = driver.publish();
    };
    let mut chain = Chain::default();
    // Pages that are adjacent in guest memory become one buffer; two buffers stay two.
    add(&[buffer(IOVA + 0x800, 0x1900), buffer(IOVA + 0x2100, 0xf10)], &[buffer(IOVA + 0x10, 0x20)]);
    assert!(device.pop(&mut chain).unwrap());
    assert_eq!(
        chain.readable,
        [buffer(0x6800, 0x1800), buffer(0x9000, 0x100), buffer(0x9100, 0xf00), buffer(0xb000, 0x10)]
    );
    assert_eq!(chain.writable, [buffer(0x6010, 0x20)]);

    let misses = |error: RingError| error.miss();
    let miss = |offset, access, denied| Some(IotlbMiss { iova: Iova(IOVA + offset), access, denied });
    add(&[], &[buffer(IOVA + 0x2ff0, 0x20)]);
    assert_eq!(device.pop(&mut chain).map_err(misses), Err(miss(0x3000, Access::Write, true)), "not writable");
    iotlb.update(Iova(IOVA + 0x3000), 0x1000, UserAddress(0xb000), Some(Access::ReadWrite)).unwrap();
    assert!(device.pop(&mut chain).unwrap(), "the failed pop took nothing");
    assert_eq!(chain.writable, [buffer(0x9ff0, 0x10), buffer(0xb000, 0x10)]);
    add(&[buffer(IOVA + 0x3ff0, 0x20)], &[]);
    assert_eq!(device.pop(&mut chain).map_err(misses), Err(miss(0x4000, Access::Read, false)), "no translation");
    // The front-end gives a translation to an address outside guest memory.
    iotlb.update(Iova(IOVA + 0x4000), 0x1000, UserAddress(1 << 30), Some(Access::ReadWrite)).unwrap();
    let outside = device.pop(&mut chain).unwrap_err();
    assert!(matches!(outside, RingError::Translation { head: 4, .. }) && outside.miss().is_none(), "{outside}");
}

#[test]
fn an_indirect_table_behind_an_iommu_is_read_page_by_page() {
    let memory = memory();
    let (mut device, _) = behind_an_iommu(&memory);
    put_desc(&memory, layout(8).desc, IOVA + 0x1ff0, 32, I, 0);
    put_desc(&memory, GuestAddress(0x7ff0), IOVA + 5, 8, N, 1);
    put_desc(&memory, GuestAddress(0x9000), IOVA + 0x2006, 9, W, 0);
    memory.write(layout(8).avail.unchecked_add(2), &1u16.to_le_bytes()).unwrap();
    let mut chain = Chain::default();
    assert!(device.pop(&mut chain).unwrap());
    assert_eq!((chain.readable, chain.writable), (vec![buffer(0x6005, 8)], vec![buffer(0x9006, 9)]));
}

/// Rule L5.1.
#[test]
fn the_used_ring_behind_an_iommu_is_logged_at_its_guest_physical_address() {
    let memory = memory();
    let (mut device, _) = behind_an_iommu(&memory);
    let log = Arc::new(Log::create(GuestAddress(1 << 30)).unwrap().0);
    assert!(!device.is_used_marked(), "there is no log");
    device.set_log(Some(RingLog { log: log.clone(), used_gpa: GuestAddress(IOVA / 2) }));
    assert!(!device.is_used_marked());
    device.relog_used();
    assert!(device.is_used_marked() && log.is_marked(layout(8).used));
    assert_eq!(log.out_of_range(), 0);
    device.set_log(Some(RingLog { log, used_gpa: GuestAddress(IOVA) }));
    assert!(!device.is_used_marked(), "the address is outside the window");
}

#[test]
fn the_areas_of_a_ring_depend_on_its_kind() {
    // 16 bytes per descriptor; flags, index and event word with 2 or 8 bytes per entry; packed: two event areas.
    assert_eq!(RingLayout::area_bytes(VirtioFeatures::empty(), 8), [128, 22, 70]);
    assert_eq!(RingLayout::area_bytes(VIRTIO_F_RING_PACKED, 8), [128, 4, 4]);
    let areas = [1, 2, 3].map(GuestAddress);
    let split = SplitLayout { size: 8, desc: areas[0], avail: areas[1], used: areas[2] };
    let packed = PackedLayout { size: 7, desc: areas[0], driver: areas[1], device: areas[2] };
    assert_eq!(RingLayout::new(VirtioFeatures::empty(), 8, areas), RingLayout::Split(split));
    assert_eq!(RingLayout::new(VIRTIO_F_RING_PACKED, 7, areas), RingLayout::Packed(packed));
    for (layout, size) in [(RingLayout::Split(split), 8), (RingLayout::Packed(packed), 7)] {
        assert_eq!((layout.areas(), layout.size()), (areas, size));
    }
}

#[test]
fn an_invalid_avail_index_is_refused() {
    let (memory, layout) = (memory(), layout(8));
    let offer = |idx: u16, head: u16| {
        memory.write(layout.avail.unchecked_add(2), &idx.to_le_bytes()).unwrap();
        memory.write(layout.avail.unchecked_add(4), &head.to_le_bytes()).unwrap();
        let mut device = SplitDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::split(0)).unwrap();
        device.pop(&mut Chain::default())
    };
    assert!(matches!(offer(8, 0), Ok(true)));
    assert!(matches!(offer(9, 0), Err(RingError::AvailIndex { index: 9, .. })));
    assert!(matches!(offer(u16::MAX, 0), Err(RingError::AvailIndex { .. })));
    assert!(matches!(offer(1, 8), Err(RingError::Descriptor { head: 8, index: 8, .. })));
    // One more request for each one taken, and none completed: more are in flight than the ring has entries.
    let mut device = SplitDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::split(0)).unwrap();
    let mut chain = Chain::default();
    let mut offered = 0u16;
    let refused = std::iter::repeat_with(|| {
        offered += 1;
        memory.write(layout.avail.unchecked_add(2), &offered.to_le_bytes()).unwrap();
        memory.write(layout.avail.unchecked_add(4 + 2 * u64::from((offered - 1) % 8)), &[0; 2]).unwrap();
        device.pop(&mut chain)
    });
    assert!(matches!(refused.take(9).last(), Some(Err(RingError::AvailIndex { index: 9, .. }))));
}

#[test]
fn a_split_ring_that_is_misaligned_or_outside_guest_memory_is_refused() {
    let memory = memory();
    let new = |size, desc, avail, used| {
        let [desc, avail, used] = [desc, avail, used].map(GuestAddress);
        let layout = SplitLayout { size, desc, avail, used };
        SplitDevice::new(&memory, layout, VirtioFeatures::empty(), RingBase::default()).map(drop)
    };
    let GuestAddress(end) = memory.end();
    assert!(new(8, 0, 0x100, 0x200).is_ok());
    for size in [0, 3, 32769, u16::MAX] {
        assert!(matches!(new(size, 0, 0x100, 0x200), Err(RingError::Size { .. })), "{size}");
    }
    for (desc, avail, used) in [(8, 0x100, 0x200), (0, 0x101, 0x200), (0, 0x100, 0x202)] {
        assert!(matches!(new(8, desc, avail, used), Err(RingError::Misaligned { .. })));
    }
    assert!(new(8, end - 128, 0, 0).is_ok() && new(8, 0, end - 22, 0).is_ok() && new(8, 0, 0, end - 72).is_ok());
    for (desc, avail, used) in [(end - 112, 0, 0), (0, end - 20, 0), (0, 0, end - 68), (u64::MAX - 15, 0, 0)] {
        assert!(matches!(new(8, desc, avail, used), Err(RingError::Outside { .. })));
    }
    for (avail, used) in [(u64::MAX - 1, 0), (0, u64::MAX - 3), (end, 0), (0, end)] {
        assert!(matches!(new(8, 0, avail, used), Err(RingError::Outside { .. })));
    }
}

#[test]
fn a_split_driver_refuses_completions_of_requests_that_are_not_in_flight() {
    let (memory, layout) = (memory(), layout(4));
    let (mut driver, _) = ring_at(&memory, layout, VirtioFeatures::empty(), 0);
    let head = driver.add(&[buffer(0, 1)], &[buffer(1, 1)], None).unwrap().unwrap();
    let complete = |idx: u16, id: u32| {
        memory.write(layout.used.unchecked_add(2), &idx.to_le_bytes()).unwrap();
        memory.write(layout.used.unchecked_add(4), &id.to_le_bytes()).unwrap();
    };
    for id in [u32::from(head) + 1, 4, 0x1_0000 + u32::from(head), u32::MAX] {
        complete(1, id);
        assert!(matches!(driver.pop_used(), Err(RingError::UsedId { id: found }) if found == id));
    }
    for idx in [2, u16::MAX] {
        complete(idx, head.into());
        assert!(matches!(driver.pop_used(), Err(RingError::UsedIndex { .. })));
    }
    complete(1, head.into());
    assert_eq!(driver.pop_used().unwrap().map(|used| used.head), Some(head));
    assert_eq!(driver.free(), 4);
}

/// Completes a batch as an in-order device does: it writes only the used element of the last request, in place of that
/// of the first.
fn batch(memory: &Memory, layout: SplitLayout, used: u16, count: u16, last: u16, len: u32) {
    let slot = layout.used.unchecked_add(4 + 8 * u64::from(used % layout.size));
    memory.write(slot, &[u32::from(last).to_le_bytes(), len.to_le_bytes()].concat()).unwrap();
    memory.write(layout.used.unchecked_add(2), &used.wrapping_add(count).to_le_bytes()).unwrap();
}

#[test]
fn in_order_one_completion_completes_all_requests_before_it() {
    let (memory, layout) = (memory(), layout(8));
    let (mut driver, mut device) = ring_at(&memory, layout, IN_ORDER, 65534);
    let mut chain = Chain::default();
    let (mut next, mut used) = (0, 65534u16);
    for round in 0..20u32 {
        let mut heads = Vec::new();
        for request in 0..3u32 {
            let readable = vec![buffer(1, 1); request as usize % 2];
            heads.push(driver.add(&readable, &[buffer(1, 5), buffer(2, 10 + request)], None).unwrap().unwrap());
            // Descriptors are taken in the order of the table, on which devices may rely.
            assert_eq!(heads.last(), Some(&next));
            next = (next + 2 + request as u16 % 2) % 8;
        }
        let _ = driver.publish();
        for head in &heads {
            assert!(device.pop(&mut chain).unwrap());
            assert_eq!(chain.head, *head);
        }
        let before = driver.state();
        for (count, last) in [(3, 7u32 << 16), (3, 8), (2, heads[2].into())] {
            batch(&memory, layout, used, count, 0, 0);
            memory.write(layout.used.unchecked_add(4 + 8 * u64::from(used % 8)), &last.to_le_bytes()).unwrap();
            assert!(matches!(driver.pop_used(), Err(RingError::UsedId { id }) if id == last));
        }
        assert_eq!(driver.state(), before);
        batch(&memory, layout, used, 3, heads[2], round);
        for (head, len) in [(heads[0], 15), (heads[1], 16), (heads[2], round)] {
            let taken = driver.pop_used().unwrap().unwrap();
            assert_eq!((taken.head, taken.len), (head, len));
            // A driver that is restored in the middle of a batch continues with it.
            driver = SplitDriver::restore(&memory, layout, IN_ORDER, &driver.state()).unwrap();
        }
        assert!(driver.pop_used().unwrap().is_none());
        used = used.wrapping_add(3);
        // A successor of the device reads the used index from the ring.
        device = SplitDevice::new(&memory, layout, IN_ORDER, device.base()).unwrap();
    }
    assert_eq!((driver.free(), driver.outstanding()), (8, 0));
}

#[test]
fn an_invalid_split_driver_state_is_refused() {
    let (memory, layout) = (memory(), layout(4));
    let restore = |avail, published, used, chains: &[&[u16]]| {
        let chains = chains.iter().map(|chain| chain.to_vec()).collect();
        let state = SplitDriverState { avail, published, used, chains, ..Default::default() };
        SplitDriver::restore(&memory, layout, VirtioFeatures::empty(), &state).map(|driver| driver.free())
    };
    assert_eq!(restore(1, 0, 65535, &[&[3, 0], &[2]]).unwrap(), 1);
    assert!(restore(1, 1, 0, &[]).is_err());
    assert!(restore(0, 0, 0, &[&[1]]).is_err());
    assert!(restore(1, 65535, 0, &[&[1]]).is_err());
    assert!(restore(1, 1, 0, &[&[]]).is_err());
    assert!(restore(1, 1, 0, &[&[4]]).is_err());
    assert!(restore(1, 1, 0, &[&[1, 1]]).is_err());
    assert!(restore(2, 2, 0, &[&[1], &[0, 1]]).is_err());
    assert!(restore(5, 5, 0, &[&[0], &[1], &[2], &[3], &[3]]).is_err());
    let restore = |features, first_free, queue: &[(u16, u32)]| {
        let in_order = Some(InOrderState { queue: queue.iter().copied().collect(), batch: None });
        let state = SplitDriverState {
            avail: 2,
            published: 2,
            chains: vec![vec![1], vec![3, 2]],
            first_free,
            in_order,
            used: 0,
        };
        SplitDriver::restore(&memory, layout, features, &state).map(|driver| driver.free())
    };
    assert_eq!(restore(IN_ORDER, 0, &[(3, 0), (1, 0)]).unwrap(), 1);
    assert!(restore(VirtioFeatures::empty(), 0, &[(3, 0), (1, 0)]).is_err());
    assert!(restore(IN_ORDER, 4, &[(3, 0), (1, 0)]).is_err());
    assert!(restore(IN_ORDER, 0, &[(2, 0), (1, 0)]).is_err());
    assert!(restore(IN_ORDER, 0, &[(1, 0)]).is_err());
}
