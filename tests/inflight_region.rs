//! The inflight region between processes: mapping, refused regions, and recovery from arbitrary bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::AsFd;

use proptest::prelude::*;
use vhost_migrate::abi::inflight::{packed_queue_bytes, split_queue_bytes};
use vhost_migrate::abi::virtio::PackedDesc;
use vhost_migrate::inflight::{
    InflightError, InflightRegion, RingKind, SplitRecovery, Store, StoreSink, recover_packed, recover_split,
};
use vhost_migrate::memory::sealed_memfd;
use vhost_migrate::ring::RingBase;

const HEADER: usize = 16;
const ENTRY: usize = 16;

/// The bytes of a split queue's part of version 1: entries as head, mark, next and counter.
fn region(size: u16, used_idx: u16, last_batch_head: u16, entries: &[(u16, u8, u16, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; split_queue_bytes(size) as usize];
    let to = &mut bytes[..];
    for (offset, value) in [(8, 1), (10, size), (12, last_batch_head), (14, used_idx)] {
        to.u16(offset, value);
    }
    for &(head, mark, next, counter) in entries {
        let at = HEADER + usize::from(head) * ENTRY;
        to.u8(at, mark);
        to.u16(at + 6, next);
        to.u64(at + 8, counter);
    }
    bytes
}

fn resubmit(bytes: &[u8], used_idx: u16, size: u16) -> Vec<u16> {
    recover_split(bytes, used_idx, size).unwrap().resubmit
}

#[test]
fn a_successor_that_maps_the_same_file_finds_the_requests_in_flight() {
    let (first, fd) = InflightRegion::create(RingKind::Split, 2, 8).unwrap();
    assert_eq!((first.kind(), first.queues(), first.queue_size()), (RingKind::Split, 2, 8));
    let (mut inflight, fresh) = first.split(1, 8, 0).unwrap();
    assert_eq!((fresh.next_avail, fresh.resubmit), (None, vec![]));
    for head in [5, 2, 7] {
        inflight.take(head);
    }
    inflight.stage(2);
    inflight.commit(1);
    drop((inflight, first));

    let second = InflightRegion::map(
        RingKind::Split,
        fd.as_fd(),
        InflightRegion::bytes_for(RingKind::Split, 2, 8).unwrap(),
        0,
        2,
        8,
    )
    .unwrap();
    let (mut inflight, found) = second.split(1, 8, 1).unwrap();
    assert_eq!((found.resubmit, found.next_avail), (vec![5, 7], Some(3)));
    inflight.take(0);
    let (_, other) = second.split(0, 8, 0).unwrap();
    assert!(other.resubmit.is_empty(), "each queue has its own part");

    let third = InflightRegion::map(
        RingKind::Split,
        fd.as_fd(),
        InflightRegion::bytes_for(RingKind::Split, 2, 8).unwrap(),
        0,
        2,
        8,
    )
    .unwrap();
    let (inflight, found) = third.split(1, 8, 1).unwrap();
    assert_eq!(found.resubmit, [5, 7, 0], "counters continue above those of the predecessor");
    inflight.reset();
    let (_, fresh) = third.split(1, 8, 40).unwrap();
    assert_eq!((fresh.next_avail, fresh.resubmit), (None, vec![]), "after a reset the region is fresh");
    assert!(resubmit(&third.copy(1).unwrap(), 40, 8).is_empty());
}

/// Rules I5.1 and I5.3.
#[test]
fn a_fresh_region_on_a_used_ring_takes_the_rings_used_index_and_has_no_last_batch() {
    let (region, _fd) = InflightRegion::create(RingKind::Split, 1, 4).unwrap();
    let (mut inflight, _) = region.split(0, 4, 1234).unwrap();
    inflight.take(0);
    // With a used index of 0 in the region, descriptor 0 would be the head of the last batch, and would be lost.
    assert_eq!(resubmit(&region.copy(0).unwrap(), 1234, 4), [0]);
}

#[test]
fn the_initialisation_of_a_fresh_region_clears_its_former_contents() {
    let header = |bytes: &[u8], words: [usize; 4]| words.map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let mut bytes = region(4, 0, 3, &[(0, 1, 2, u64::MAX), (2, 9, 3, 7), (3, 1, 0, 0)]);
    bytes.u16(8, 0);
    recover_split(&bytes, 1234, 4).unwrap().stores.iter().for_each(|store| store.to(&mut bytes[..]));
    assert_eq!(header(&bytes, [8, 10, 12, 14]), [1, 4, 0, 1234], "version, entries, last batch, used index");
    for entry in bytes[HEADER..HEADER + 4 * ENTRY].chunks_exact(ENTRY) {
        assert_eq!((entry[0], &entry[8..]), (0, &[0; 8][..]), "mark and counter");
    }

    let mut bytes = vec![0; packed_queue_bytes(4) as usize];
    let to = &mut bytes[..];
    for (index, mark, next, counter) in [(0, 1, 7, 3), (1, 0, 2, u64::MAX), (3, 9, 0, 0)] {
        let at = PACKED_HEADER + index * PACKED_ENTRY;
        to.u8(at, mark);
        to.u16(at + 2, next);
        to.u64(at + 8, counter);
    }
    let found = recover_packed(&bytes, 4, 4, RingBase::from_bits(0x0003_8003), unused).unwrap();
    found.stores.iter().for_each(|store| store.to(&mut bytes[..]));
    assert_eq!(header(&bytes, [8, 10, 12, 14]), [1, 4, 0, 0], "version, entries, head of the free list, twice");
    assert_eq!(bytes[16..22], [3, 0, 3, 0, 0, 0], "used position and wrap counter, twice");
    for (entry, next) in bytes[PACKED_HEADER..].chunks_exact(PACKED_ENTRY).take(4).zip(1..) {
        assert_eq!((entry[0], entry[2], &entry[8..16]), (0, next, &[0; 8][..]), "mark, next and counter");
    }
}

/// Rule I1.2.
#[test]
fn a_region_that_does_not_fit_is_refused_before_it_is_accessed() {
    let needed = InflightRegion::bytes_for(RingKind::Split, 2, 128).unwrap();
    assert_eq!(needed, 2 * 2112);
    let fd = sealed_memfd("inflight-test", needed).unwrap();
    let map = |size, offset, queues, queue_size| {
        InflightRegion::map(RingKind::Split, fd.as_fd(), size, offset, queues, queue_size)
    };
    assert!(map(needed, 0, 2, 128).is_ok());
    assert!(matches!(map(needed - 1, 0, 2, 128), Err(InflightError::TooSmall { .. })));
    assert!(matches!(map(needed, 4, 2, 128), Err(InflightError::Misaligned { offset: 4 })));
    assert!(matches!(map(needed, 8, 2, 128), Err(InflightError::Map(_))), "the file ends before the region");
    assert!(matches!(map(needed, u64::MAX - 7, 2, 128), Err(InflightError::Map(_))));
    for (queues, queue_size) in [(0, 128), (1, 0), (1, 32769)] {
        assert!(matches!(map(u64::MAX, 0, queues, queue_size), Err(InflightError::Shape { .. })));
    }
    assert!(matches!(map(u64::MAX, 0, u16::MAX, 32768), Err(InflightError::Map(_))));
    let region = map(needed, 0, 2, 128).unwrap();
    assert!(matches!(region.split(2, 128, 0), Err(InflightError::NoQueue { .. })));
    assert!(matches!(region.split(0, 256, 0), Err(InflightError::RingTooLarge { .. })));
    assert!(region.split(0, 64, 0).is_ok(), "a ring may be smaller than the region's queues");
}

#[test]
fn stores_into_a_region_at_an_offset_do_not_change_the_rest_of_the_file() {
    let needed = InflightRegion::bytes_for(RingKind::Split, 1, 4).unwrap();
    let fd = sealed_memfd("inflight-test", 8 + 2 * needed).unwrap();
    let region = InflightRegion::map(RingKind::Split, fd.as_fd(), needed, 8, 1, 4).unwrap();
    let (mut inflight, _) = region.split(0, 4, 0).unwrap();
    inflight.take(3);
    inflight.take(4);
    inflight.take(u16::MAX);
    let whole = InflightRegion::map(RingKind::Split, fd.as_fd(), 2 * needed, 0, 2, 4).unwrap();
    let bytes = [whole.copy(0).unwrap(), whole.copy(1).unwrap()].concat();
    assert_eq!(bytes[8 + HEADER + 3 * ENTRY], 1);
    assert!(bytes[..16].iter().chain(&bytes[8 + needed as usize..]).all(|byte| *byte == 0));
}

#[test]
fn the_last_entry_of_a_queue_is_stored_and_the_next_queue_is_not_changed() {
    // Three entries and their header fill the queue's part to the last byte.
    let (region, _fd) = InflightRegion::create(RingKind::Split, 2, 3).unwrap();
    assert_eq!(region.copy(0).unwrap().len(), HEADER + 3 * ENTRY);
    let (mut inflight, _) = region.split(0, 3, 0).unwrap();
    for head in [0, 2, 1, 3] {
        inflight.take(head);
    }
    assert_eq!(resubmit(&region.copy(0).unwrap(), 0, 3), [0, 2, 1], "in the order of their counters");
    assert!(region.copy(1).unwrap().iter().all(|byte| *byte == 0));
}

/// Rule I7.1.
#[test]
fn a_reset_makes_every_queue_fresh() {
    let (region, _fd) = InflightRegion::create(RingKind::Split, 3, 8).unwrap();
    for queue in 0..3 {
        region.split(queue, 8, 0).unwrap().0.take(queue);
    }
    region.reset();
    for queue in 0..3 {
        let (_, found) = region.split(queue, 8, 7).unwrap();
        assert_eq!((found.next_avail, found.resubmit), (None, vec![]), "queue {queue}");
    }
}

/// Rule I3.1.
#[test]
fn a_published_batch_whose_marks_are_cleared_in_part_is_not_served_again() {
    // 6, 1 and 4 are published, and the mark of 6 is cleared; 3 and 2 are in flight.
    let bytes = region(8, 10, 4, &[(6, 0, 0, 1), (1, 1, 6, 2), (4, 1, 1, 3), (3, 1, 0, 9), (2, 1, 0, 8)]);
    let SplitRecovery { stores, resubmit, next_avail, next_counter, .. } = recover_split(&bytes, 13, 8).unwrap();
    assert_eq!((resubmit, next_avail, next_counter), (vec![2, 3], Some(15), 10));
    assert_eq!(stores.last(), Some(&Store::U16(14, 13)), "the used index is stored last");
}

/// Rule I3.2.
#[test]
fn only_the_head_of_a_batch_without_links_counts_as_completed() {
    let unlinked = |used| region(8, used, 5, &[(5, 1, 0, 1), (0, 1, 0, 2), (3, 1, 0, 3)]);
    assert_eq!(resubmit(&unlinked(7), 8, 8), [0, 3], "a batch of one request");
    assert_eq!(resubmit(&unlinked(7), 10, 8), [0, 3], "circular links");
}

#[test]
fn the_used_index_may_wrap_between_publishing_and_the_crash() {
    let bytes = region(4, u16::MAX, 1, &[(1, 1, 2, 5), (2, 1, 0, 4), (3, 1, 0, 6)]);
    let found = recover_split(&bytes, 1, 4).unwrap();
    assert_eq!((found.resubmit, found.next_avail), (vec![3], Some(2)));
}

#[test]
fn invalid_contents_are_refused_and_the_error_cites_the_rule() {
    let marked = [(1, 1, 0, 1)];
    let refused = |bytes: &[u8], used_idx| recover_split(bytes, used_idx, 4).unwrap_err();
    let good = region(4, 0, 0, &marked);
    assert!(matches!(refused(&good[..79], 0), InflightError::TooSmall { size: 79, needed: 80 }));
    assert!(matches!(refused(&[], 0), InflightError::TooSmall { .. }));
    let mut version = good.clone();
    version[8] = 2;
    assert!(matches!(refused(&version, 0), InflightError::Version { version: 2 }));
    let mut desc_num = good.clone();
    desc_num[10] = 8;
    assert!(matches!(refused(&desc_num, 0), InflightError::DescNum { desc_num: 8, queue_size: 4 }));
    assert!(matches!(refused(&region(4, 0, 0, &[(2, 9, 0, 1)]), 0), InflightError::Mark { head: 2, mark: 9 }));
    assert!(matches!(refused(&region(4, 0, 4, &marked), 1), InflightError::Index { index: 4, .. }));
    assert!(matches!(refused(&region(4, 0, 1, &[(1, 1, 700, 1)]), 2), InflightError::Index { index: 700, .. }));
    assert!(matches!(refused(&good, 5), InflightError::UsedIndex { region: 0, ring: 5, .. }));
    assert!(matches!(refused(&region(4, 0, 0, &[(0, 0, 0, u64::MAX)]), 0), InflightError::Counter));
    assert!(refused(&good, 5).to_string().contains("I3.1"));
}

#[test]
fn a_region_with_no_request_in_flight_accepts_any_used_index_of_the_ring() {
    let found = recover_split(&region(4, 500, 9, &[]), 0, 4).unwrap();
    assert_eq!((found.resubmit, found.next_avail), (vec![], Some(0)));
}

proptest! {
    #[test]
    fn arbitrary_bytes_give_an_error_or_a_valid_recovery(
        mut bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..400),
        version in 0..3u16, size in prop_oneof![Just(16u16), 1..40u16], used_idx in any::<u16>(), lag in 0..20u16,
        plausible in any::<bool>(),
    ) {
        let whole = bytes.len() >= 16;
        bytes.u16(8, version);
        bytes.u16(10, size);
        bytes.u16(14, used_idx.wrapping_sub(lag));
        if plausible && whole {
            for entry in bytes[HEADER..].chunks_exact_mut(ENTRY) {
                entry[0] &= 1;
                entry.u16(6, u16::from(entry[6]) % size);
            }
        }
        if let Ok(found) = recover_split(&bytes, used_idx, size) {
            prop_assert!(found.resubmit.len() <= size.into());
            prop_assert!(found.stores.len() <= 2 * usize::from(size) + 4);
            let mut heads = found.resubmit.clone();
            heads.sort_unstable();
            heads.dedup();
            prop_assert_eq!(heads.len(), found.resubmit.len());
            prop_assert!(heads.iter().all(|head| *head < size));
            found.stores.iter().for_each(|store| store.to(&mut bytes[..]));
            let again = recover_split(&bytes, used_idx, size).unwrap();
            prop_assert_eq!(again.resubmit, found.resubmit);
            if let Some(next_avail) = found.next_avail {
                prop_assert_eq!(again.next_avail, Some(next_avail));
            }
        }
    }
}

/// A fresh packed ring: both positions 0, both wrap counters 1.
const FRESH: RingBase = RingBase::from_bits(0x8000_8000);
const PACKED_HEADER: usize = 32;
const PACKED_ENTRY: usize = 32;

fn packed_desc(addr: u64) -> PackedDesc {
    PackedDesc { addr: addr.into(), len: 9.into(), id: 3.into(), flags: 0x80.into() }
}

/// Descriptor flags of a ring that was never used.
fn unused(_: u16) -> u16 {
    0x80
}

/// A packed queue's part of 4 entries, with two requests in flight, of 1 and of 2 descriptors.
fn packed_region() -> Vec<u8> {
    let (region, _fd) = InflightRegion::create(RingKind::Packed, 1, 4).unwrap();
    let (mut inflight, _) = region.packed(0, 4, FRESH, unused).unwrap();
    assert_eq!(inflight.take(&[packed_desc(1)]), Some(0));
    assert_eq!(inflight.take(&[packed_desc(2), packed_desc(3)]), Some(1));
    region.copy(0).unwrap()
}

/// Rule I5.2.
#[test]
fn a_packed_successor_that_maps_the_same_file_finds_the_requests_in_flight() {
    let bytes_for = |queues| InflightRegion::bytes_for(RingKind::Packed, queues, 8).unwrap();
    assert_eq!(bytes_for(2), 2 * packed_queue_bytes(8));
    let (first, fd) = InflightRegion::create(RingKind::Packed, 2, 8).unwrap();
    assert!(matches!(first.split(0, 8, 0), Err(InflightError::RingKind { kind: RingKind::Packed })));
    let (mut inflight, fresh) = first.packed(1, 8, FRESH, unused).unwrap();
    assert_eq!((fresh.base, fresh.resubmit.len()), (None, 0));
    let descs = [packed_desc(1), packed_desc(2), packed_desc(3)];
    let (one, three) = (inflight.take(&descs[..1]).unwrap(), inflight.take(&descs).unwrap());
    inflight.stage(one);
    assert_eq!(inflight.take(&descs), None, "not while a batch is being published");
    inflight.commit();
    drop((inflight, first));

    let second = InflightRegion::map(RingKind::Packed, fd.as_fd(), bytes_for(2), 0, 2, 8).unwrap();
    let (mut inflight, found) = second.packed(1, 8, FRESH, unused).unwrap();
    assert_eq!(found.base, Some(RingBase::from_bits(0x8001_8004)), "avail is used plus the descriptors in flight");
    assert_eq!((found.resubmit.len(), found.resubmit[0].entry), (1, three));
    assert_eq!(found.resubmit[0].descs, descs);
    assert_eq!(inflight.take(&[]), None);
    assert!(inflight.take(&[packed_desc(4); 6]).is_none(), "more descriptors than the ring has");
    assert!(inflight.take(&[packed_desc(4); 5]).is_some());
    let (_, full) = second.packed(1, 8, FRESH, unused).unwrap();
    assert_eq!(full.base, Some(RingBase::from_bits(0x8001_0001)), "avail is one round ahead of used");
    inflight.reset();
    let (_, fresh) = second.packed(1, 8, RingBase::from_bits(0x0005_0005), unused).unwrap();
    assert_eq!((fresh.base, fresh.resubmit.len()), (None, 0), "after a reset the region is fresh");
    let (_, found) = second.packed(1, 8, FRESH, unused).unwrap();
    assert_eq!(found.base, Some(RingBase::from_bits(0x0005_0005)), "a fresh region takes the position of the base");
}

/// Rule I4.4.
#[test]
fn a_free_list_that_has_lost_entries_is_rebuilt() {
    let mut bytes = packed_region();
    // Both free heads are beyond the entries: the list is empty, although entry 3 is in no request.
    bytes[12..16].copy_from_slice(&[4, 0, 4, 0]);
    let found = recover_packed(&bytes, 4, 4, FRESH, unused).unwrap();
    found.stores.iter().for_each(|store| store.to(&mut bytes[..]));
    assert_eq!(bytes[12..16], [3, 0, 3, 0]);
    assert_eq!(recover_packed(&bytes, 4, 4, FRESH, unused).unwrap().stores, []);
}

/// Rule I4.8.
#[test]
fn a_commit_interrupted_between_index_and_wrap_counter_counts_as_made() {
    let mut bytes = packed_region();
    // The current wrap counter has changed; the committed one and both indexes have not.
    bytes[20] = 0;
    let found = recover_packed(&bytes, 4, 4, FRESH, unused).unwrap();
    assert_eq!(found.base, Some(RingBase::from_bits(0x0000_0003)), "used is the start of the next round");
}

/// Rule I4.6.
#[test]
fn a_stale_used_descriptor_is_made_available_with_either_wrap_counter() {
    for (base, looks_used, available) in [(FRESH, 0x8000, 0x80), (RingBase::from_bits(0), 0, 0x8000)] {
        let (region, _fd) = InflightRegion::create(RingKind::Packed, 1, 4).unwrap();
        let (mut inflight, _) = region.packed(0, 4, base, |_| looks_used).unwrap();
        inflight.take(&[packed_desc(1), packed_desc(2)]).unwrap();
        let found = recover_packed(&region.copy(0).unwrap(), 4, 4, base, |_| looks_used).unwrap();
        assert_eq!(found.stale, [(1, available)]);
    }
}

#[test]
fn a_packed_request_that_is_not_in_flight_is_neither_staged_nor_put_back() {
    let (region, _fd) = InflightRegion::create(RingKind::Packed, 1, 4).unwrap();
    let (mut inflight, _) = region.packed(0, 4, FRESH, unused).unwrap();
    let one = inflight.take(&[packed_desc(1)]).unwrap();
    let taken = region.copy(0).unwrap();
    for other in [one + 1, 4, u16::MAX] {
        inflight.stage(other);
        inflight.put_back(other);
    }
    inflight.commit();
    assert_eq!(region.copy(0).unwrap(), taken);
    inflight.put_back(one);
    let free = region.copy(0).unwrap();
    assert_eq!((taken[PACKED_HEADER], free[PACKED_HEADER]), (1, 0), "other implementations look at the mark alone");
    inflight.put_back(one);
    assert_eq!(region.copy(0).unwrap(), free);
}

#[test]
fn invalid_packed_contents_are_refused_and_the_error_cites_the_rule() {
    let good = packed_region();
    let refused = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = good.clone();
        change(&mut bytes);
        recover_packed(&bytes, 4, 4, FRESH, unused).unwrap_err()
    };
    let at = |index: usize| PACKED_HEADER + index * PACKED_ENTRY;
    assert_eq!(recover_packed(&good, 4, 4, FRESH, unused).unwrap().resubmit.len(), 2);
    let cut = recover_packed(&good[..159], 4, 4, FRESH, unused).unwrap_err();
    assert!(matches!(cut, InflightError::TooSmall { size: 159, needed: 160 }));
    for (queue_size, ring_size, refused) in [(4, 0, 0), (40_000, 4, 40_000), (u16::MAX, u16::MAX, u16::MAX)] {
        let shape = recover_packed(&good, queue_size, ring_size, FRESH, unused).unwrap_err();
        assert!(matches!(shape, InflightError::Shape { queues: 1, queue_size } if queue_size == refused));
    }
    let largest = recover_packed(&good, 32768, 32768, FRESH, unused).unwrap_err();
    assert!(matches!(largest, InflightError::TooSmall { .. }), "32768 is a valid size");
    let large = recover_packed(&good, 4, 5, FRESH, unused).unwrap_err();
    assert!(matches!(large, InflightError::RingTooLarge { .. }));
    assert!(matches!(refused(&|b| b.u16(8, 7)), InflightError::Version { version: 7 }));
    assert!(matches!(refused(&|b| b.u16(10, 8)), InflightError::DescNum { desc_num: 8, queue_size: 4 }));
    assert!(matches!(refused(&|b| b.u8(at(3), 2)), InflightError::Mark { head: 3, mark: 2 }));
    assert!(matches!(refused(&|b| b.u16(18, 4)), InflightError::Position { index: 4, wrap: 1, ring_size: 4 }));
    assert!(matches!(refused(&|b| b.u8(21, 2)), InflightError::Position { wrap: 2, .. }));
    assert!(matches!(refused(&|b| b.u16(at(1) + 6, 0)), InflightError::Chain { head: 1 }), "no descriptors");
    assert!(matches!(refused(&|b| b.u16(at(1) + 4, 9)), InflightError::Chain { head: 1 }), "another end");
    assert!(matches!(refused(&|b| b.u16(at(1) + 2, 1)), InflightError::Chain { head: 1 }), "a circle");
    assert!(
        matches!(refused(&|b| b.u16(at(1) + 2, 0)), InflightError::Chain { head: 1 }),
        "an entry of another request"
    );
    assert!(matches!(refused(&|b| b.u16(at(1) + 2, 3)), InflightError::Chain { head: 1 }), "a free entry");
    assert!(
        matches!(refused(&|b| b.u16(at(1) + 2, 900)), InflightError::Chain { head: 1 }),
        "an index beyond the entries"
    );
    assert!(matches!(refused(&|b| b.u16(at(1) + 6, 900)), InflightError::Outstanding { descs: 901, ring_size: 4 }));
    assert!(matches!(refused(&|b| b.u64(at(2) + 8, u64::MAX)), InflightError::Counter));
    assert!(refused(&|b| b.u16(18, 4)).to_string().contains("I4.5"));
    let fresh = recover_packed(&vec![0; good.len()], 4, 4, RingBase::from_bits(0x8004_8004), unused).unwrap_err();
    assert!(matches!(fresh, InflightError::Position { index: 4, .. }), "a base outside the ring");
}

#[test]
fn a_packed_batch_without_a_valid_free_list_is_recovered_only_if_it_is_one_request() {
    let mut bytes = packed_region();
    // The request at entry 0, of one descriptor, is published; the free list is circular.
    bytes.u16(12, 0);
    bytes.u16(PACKED_HEADER + 2, 0);
    bytes.u16(16, 1);
    let published = |_| 0x8080;
    let found = recover_packed(&bytes, 4, 4, FRESH, published).unwrap();
    assert_eq!(found.resubmit.iter().map(|request| request.entry).collect::<Vec<_>>(), [1]);
    assert_eq!(found.base, Some(RingBase::from_bits(0x8001_8003)));
    bytes.u16(16, 3);
    let unclear = recover_packed(&bytes, 4, 4, FRESH, published).unwrap_err();
    assert!(matches!(unclear, InflightError::Batch { head: 0 }));
    assert_eq!(recover_packed(&bytes, 4, 4, FRESH, unused).unwrap().resubmit.len(), 2, "rolled back");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_packed_bytes_give_an_error_or_a_recovery_that_can_be_interrupted(
        mut bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..400),
        version in 0..3u16, queue_size in prop_oneof![Just(8u16), 1..12u16], short in 0..3u16,
        flags in prop::collection::vec(prop::sample::select(vec![0u16, 0x80, 0x8000, 0x8080]), 12),
        plausible in any::<bool>(), base in any::<u32>(),
    ) {
        let whole = bytes.len() >= PACKED_HEADER;
        let ring_size = queue_size.saturating_sub(short).max(1);
        bytes.u16(8, version);
        bytes.u16(10, queue_size);
        if plausible && whole {
            for offset in [12, 14, 16, 18] {
                let value = u16::from(bytes[offset]) % (ring_size + u16::from(offset < 16));
                bytes.u16(offset, value);
            }
            bytes[20] &= 1;
            bytes[21] &= 1;
            for entry in bytes[PACKED_HEADER..].chunks_exact_mut(PACKED_ENTRY) {
                entry[0] &= 1;
                for offset in [2, 4] {
                    let value = u16::from(entry[offset]) % (queue_size + 1);
                    entry.u16(offset, value);
                }
                let single = entry[7] & 1 == 0;
                entry.u16(6, if single { 1 } else { 2 });
            }
            for (index, entry) in (0..).zip(bytes[PACKED_HEADER..].chunks_exact_mut(PACKED_ENTRY)) {
                if entry[6] == 1 {
                    entry.u16(4, index);
                } else {
                    let next = u16::from_le_bytes([entry[2], entry[3]]);
                    entry.u16(4, next);
                }
            }
        }
        let flags_of = |index: u16| flags[usize::from(index)];
        if let Ok(found) = recover_packed(&bytes, queue_size, ring_size, RingBase::from_bits(base), flags_of) {
            let descs: usize = found.resubmit.iter().map(|request| request.descs.len()).sum();
            prop_assert!(descs <= ring_size.into());
            prop_assert!(found.stale.iter().all(|(index, _)| *index < ring_size));
            prop_assert!(found.stores.len() <= 3 * usize::from(queue_size) + 8);
            for stop in 0..=found.stores.len() {
                let again = recover_packed(&bytes, queue_size, ring_size, RingBase::from_bits(base), flags_of).unwrap();
                prop_assert_eq!(&again.resubmit, &found.resubmit);
                if found.base.is_some() {
                    prop_assert_eq!((again.base, &again.stale), (found.base, &found.stale));
                }
                if let Some(store) = found.stores.get(stop) {
                    store.to(&mut bytes[..]);
                } else {
                    prop_assert!(again.stores.is_empty(), "the region needs no further repair");
                }
            }
        }
    }
}
