//! The log of a ring is exact: it has each page that the device changed, at the log's address, and no other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "kit/ring.rs"]
mod ring;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use ring::{EVENT_IDX, buffer, layout, memory, packed_at, packed_layout, ring_at};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory};
use vhost_migrate::ring::{Chain, PackedLayout, Position, RingLog, SplitLayout};

const LOG_END: GuestAddress = GuestAddress(1 << 30);

fn used_ring(memory: &Memory, layout: &SplitLayout) -> Vec<u8> {
    let mut bytes = vec![0; 6 + 8 * usize::from(layout.size)];
    memory.read(layout.used, &mut bytes).unwrap();
    bytes
}

/// Pages of the words and elements that differ. Each is written as a whole, also if some of its bytes stay the same.
fn changed(before: &[u8], after: &[u8], GuestAddress(used_gpa): GuestAddress) -> BTreeSet<u64> {
    let elements = (4..before.len() - 2).step_by(8).map(|at| at..at + 8);
    let written = [0..2, 2..4, before.len() - 2..before.len()].into_iter().chain(elements);
    let differ = |range: &Range<usize>| before[range.clone()] != after[range.clone()];
    let pages =
        |range: Range<usize>| (used_gpa + range.start as u64) / LOG_PAGE..=(used_gpa + range.end as u64 - 1) / LOG_PAGE;
    written.filter(differ).flat_map(pages).collect()
}

fn harvest(log: &Log) -> BTreeSet<u64> {
    let mut pages = PageSet::new(LOG_END.0 / LOG_PAGE);
    log.harvest(&mut pages);
    pages.iter().map(|page| page.0).collect()
}

/// An address at which a ring may be logged.
fn log_address() -> impl Strategy<Value = GuestAddress> {
    (0..LOG_END.0 / 4 - 0x10_000).prop_map(|words| GuestAddress(words * 4))
}

#[derive(Clone, Debug)]
enum Op {
    Batch(u16),
    Disable,
    Enable,
    LogOff,
    LogOn,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1..1500u16).prop_map(Op::Batch), 2 => Just(Op::Disable), 2 => Just(Op::Enable),
        1 => Just(Op::LogOff), 2 => Just(Op::LogOn),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Rule L3.3.
    #[test]
    fn exactly_the_changed_pages_of_a_used_ring_are_marked_at_the_logs_address(
        size in prop::sample::select(vec![1u16, 16, 256, 1024, 4096]), event_idx in any::<bool>(), start in any::<u16>(),
        used_gpa in prop_oneof![Just(GuestAddress(0x5000 - 8)), log_address()],
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let (memory, layout) = (memory(), layout(size));
        let (mut driver, mut device) = ring_at(&memory, layout, if event_idx { EVENT_IDX } else { VirtioFeatures::empty() }, start);
        let log = Arc::new(Log::create(LOG_END).unwrap().0);
        let mut logging = false;
        let mut chain = Chain::default();
        // All completions differ, so that every write changes the contents.
        let mut serial = u32::from(size);
        for op in ops {
            let before = used_ring(&memory, &layout);
            match op {
                Op::Batch(count) => {
                    for _ in 0..count.min(size) {
                        driver.add(&[buffer(1, 1)], &[], None).unwrap().unwrap();
                    }
                    let _ = driver.publish();
                    while device.pop(&mut chain).unwrap() {
                        serial += 1;
                        device.push(chain.head, serial);
                    }
                    let _ = device.publish();
                    while driver.pop_used().unwrap().is_some() {}
                }
                Op::Disable => device.disable_notifications(),
                Op::Enable => {
                    let _ = device.enable_notifications();
                }
                Op::LogOff | Op::LogOn => {
                    logging = matches!(op, Op::LogOn);
                    device.set_log(logging.then(|| RingLog { log: log.clone(), used_gpa }));
                }
            }
            let changed = changed(&before, &used_ring(&memory, &layout), used_gpa);
            prop_assert_eq!(harvest(&log), if logging { changed } else { BTreeSet::new() });
        }
        prop_assert_eq!(log.out_of_range(), 0);
    }
}

/// Pages that the device changed: of descriptors at the ring's address, of the event area at the log's address.
fn packed_changed(
    before: &[u8],
    after: &[u8],
    layout: &PackedLayout,
    GuestAddress(used_gpa): GuestAddress,
) -> BTreeSet<u64> {
    let event = before.len() - 4;
    let descs = (0..event).step_by(16).filter(|at| before[*at..at + 16] != after[*at..at + 16]);
    let mut pages: BTreeSet<u64> = descs.map(|at| layout.desc.unchecked_add(at as u64).0 / LOG_PAGE).collect();
    if before[event..] != after[event..] {
        pages.extend([used_gpa / LOG_PAGE, (used_gpa + 3) / LOG_PAGE]);
    }
    pages
}

fn packed_ring(memory: &Memory, layout: &PackedLayout) -> Vec<u8> {
    let mut bytes = vec![0; 4 + 16 * usize::from(layout.size)];
    let (descs, event) = bytes.split_at_mut(16 * usize::from(layout.size));
    memory.read(layout.desc, descs).unwrap();
    memory.read(layout.device, event).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Rules L4.1 and L4.2.
    #[test]
    fn exactly_the_changed_pages_of_a_packed_ring_are_marked(
        (size, start) in prop::sample::select(vec![1u16, 16, 300, 1024, 4096]).prop_flat_map(|size| (Just(size), 0..size)),
        event_idx in any::<bool>(), long in any::<bool>(),
        used_gpa in prop_oneof![Just(GuestAddress(0x5000 - 2)), log_address()],
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let (memory, layout) = (memory(), packed_layout(size));
        let start = Position { index: start, wrap: true };
        let (mut driver, mut device) = packed_at(&memory, layout, if event_idx { EVENT_IDX } else { VirtioFeatures::empty() }, start);
        let log = Arc::new(Log::create(LOG_END).unwrap().0);
        let mut logging = false;
        let mut chain = Chain::default();
        // With chains longer than a page of descriptors, many pages do not change.
        let buffers = vec![buffer(1, 1); if long { 300.min(size.into()) } else { 1 }];
        for op in ops {
            let mut before = packed_ring(&memory, &layout);
            match op {
                Op::Batch(count) => {
                    for _ in 0..count {
                        if driver.add(&buffers, &[], None).unwrap().is_none() {
                            break;
                        }
                    }
                    let _ = driver.publish();
                    before = packed_ring(&memory, &layout);
                    while device.pop(&mut chain).unwrap() {
                        device.push(chain.head, chain.slots, 1);
                    }
                    let _ = device.publish();
                }
                Op::Disable => device.disable_notifications(),
                Op::Enable => {
                    let _ = device.enable_notifications();
                }
                Op::LogOff | Op::LogOn => {
                    logging = matches!(op, Op::LogOn);
                    device.set_log(logging.then(|| RingLog { log: log.clone(), used_gpa }));
                }
            }
            let changed = packed_changed(&before, &packed_ring(&memory, &layout), &layout, used_gpa);
            prop_assert_eq!(harvest(&log), if logging { changed } else { BTreeSet::new() });
            while driver.pop_used().unwrap().is_some() {}
        }
        prop_assert_eq!(log.out_of_range(), 0);
    }
}

#[test]
fn relog_used_marks_exactly_a_packed_ring_and_its_event_area() {
    let (memory, layout) = (memory(), packed_layout(1000));
    let (_, mut device) = packed_at(&memory, layout, VirtioFeatures::empty(), Position::START);
    device.relog_used();
    let log = Arc::new(Log::create(LOG_END).unwrap().0);
    for (used_gpa, pages) in [(0x9000, [9, 9]), (0x9ffe, [9, 10]), (0x1000, [1, 1])] {
        device.set_log(Some(RingLog { log: log.clone(), used_gpa: GuestAddress(used_gpa) }));
        assert!(!device.is_used_marked());
        device.relog_used();
        assert!(device.is_used_marked());
        assert_eq!(harvest(&log), (1..=4).chain(pages).collect(), "{used_gpa:#x}");
    }
}

/// Rules L6.1 and L6.2.
#[test]
fn writes_to_a_packed_ring_outside_the_log_are_counted() {
    let (memory, layout) = (memory(), packed_layout(4));
    let (mut driver, mut device) = packed_at(&memory, layout, EVENT_IDX, Position::START);
    let log = Arc::new(Log::create(GuestAddress(LOG_PAGE)).unwrap().0);
    for used_gpa in [log.pages() * LOG_PAGE, u64::MAX, u64::MAX - 2] {
        device.set_log(Some(RingLog { log: log.clone(), used_gpa: GuestAddress(used_gpa) }));
        driver.add(&[buffer(1, 1)], &[], None).unwrap();
        let _ = driver.publish();
        let mut chain = Chain::default();
        assert!(device.pop(&mut chain).unwrap());
        device.push(chain.head, chain.slots, 0);
        let _ = device.publish();
        let before = log.out_of_range();
        let _ = device.enable_notifications();
        assert!(log.out_of_range() > before);
        while driver.pop_used().unwrap().is_some() {}
    }
}

#[test]
fn relog_used_marks_exactly_the_used_ring() {
    let (memory, layout) = (memory(), layout(1024));
    let (_, mut device) = ring_at(&memory, layout, VirtioFeatures::empty(), 0);
    device.relog_used();
    let log = Arc::new(Log::create(LOG_END).unwrap().0);
    for (used_gpa, pages) in [(0x5000, 5..=7), (0x5ffc, 5..=8), (0x5000 - 8, 4..=6)] {
        device.set_log(Some(RingLog { log: log.clone(), used_gpa: GuestAddress(used_gpa) }));
        assert!(!device.is_used_marked());
        device.relog_used();
        assert!(device.is_used_marked());
        assert_eq!(harvest(&log), pages.collect(), "{used_gpa:#x}");
    }
}

/// Rules L6.1 and L6.2.
#[test]
fn writes_to_a_used_ring_outside_the_log_are_counted() {
    let (memory, layout) = (memory(), layout(4));
    let (mut driver, mut device) = ring_at(&memory, layout, EVENT_IDX, 0);
    let log = Arc::new(Log::create(LOG_END).unwrap().0);
    for used_gpa in [LOG_END.0, u64::MAX, u64::MAX - 6] {
        device.set_log(Some(RingLog { log: log.clone(), used_gpa: GuestAddress(used_gpa) }));
        driver.add(&[buffer(1, 1)], &[], None).unwrap();
        let _ = driver.publish();
        let mut chain = Chain::default();
        assert!(device.pop(&mut chain).unwrap());
        device.push(chain.head, 0);
        let before = log.out_of_range();
        assert!(device.publish() || !device.enable_notifications());
        assert!(log.out_of_range() > before);
        assert!(harvest(&log).is_empty());
    }
}
