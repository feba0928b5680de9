//! Inflight regions that a back-end of version 0.1 has left behind when it was killed.

use std::os::fd::AsFd;

use vhost_migrate::abi::virtio::PackedDesc;
use vhost_migrate::inflight::{InflightRegion, RingKind};
use vhost_migrate::memory::sealed_memfd;
use vhost_migrate::ring::RingBase;

use crate::{read, write};

const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 8;
const SPLIT: &str = "inflight-split-1";
const PACKED: &str = "inflight-packed-1";

/// The region that contains the bytes of a file.
fn region(kind: RingKind, name: &str) -> InflightRegion {
    let bytes = read(name);
    let fd = sealed_memfd("compat", bytes.len() as u64).unwrap();
    nix::sys::uio::pwrite(&fd, &bytes, 0).unwrap();
    InflightRegion::map(kind, fd.as_fd(), bytes.len() as u64, 0, QUEUES, QUEUE_SIZE).unwrap()
}

fn contents(region: &InflightRegion) -> Vec<u8> {
    (0..QUEUES).flat_map(|queue| region.copy(queue).unwrap()).collect()
}

/// Descriptor `id` of a packed ring.
fn descriptor(id: u16) -> PackedDesc {
    PackedDesc { addr: (u64::from(id) << 12).into(), len: 512.into(), id: id.into(), flags: (1 << 7).into() }
}

/// The queue used the requests 0 and 1, published in two batches the second of which was not committed, and had 5 and 3
/// in flight.
fn split_region() -> InflightRegion {
    let (region, _fd) = InflightRegion::create(RingKind::Split, QUEUES, QUEUE_SIZE).unwrap();
    let (mut tracker, _) = region.split(1, QUEUE_SIZE, 0).unwrap();
    for head in [0, 5, 1, 3] {
        tracker.take(head);
    }
    tracker.stage(0);
    tracker.commit(1);
    tracker.stage(1);
    region
}

/// The queue used a request of two descriptors and had one of two descriptors and one of one descriptor in flight.
fn packed_region() -> InflightRegion {
    let (region, _fd) = InflightRegion::create(RingKind::Packed, QUEUES, QUEUE_SIZE).unwrap();
    let (mut tracker, _) = region.packed(1, QUEUE_SIZE, RingBase::PACKED_START, |_| 0).unwrap();
    let used = tracker.take(&[descriptor(1), descriptor(1)]).unwrap();
    tracker.take(&[descriptor(2), descriptor(2)]).unwrap();
    tracker.take(&[descriptor(3)]).unwrap();
    tracker.stage(used);
    tracker.commit();
    region
}

#[test]
fn requests_in_flight_on_a_split_ring_are_recovered() {
    let region = region(RingKind::Split, SPLIT);
    let (_, untouched) = region.split(0, QUEUE_SIZE, 0).unwrap();
    assert_eq!((untouched.resubmit, untouched.next_avail), (vec![], None));
    let (_, recovery) = region.split(1, QUEUE_SIZE, 2).unwrap();
    assert_eq!(recovery.resubmit, [5, 3], "in the order in which they were taken");
    assert_eq!((recovery.next_avail, recovery.next_counter), (Some(4), 5));
}

#[test]
fn requests_in_flight_on_a_packed_ring_are_recovered() {
    let region = region(RingKind::Packed, PACKED);
    let (_, recovery) = region.packed(1, QUEUE_SIZE, RingBase::PACKED_START, |_| 0).unwrap();
    let requests: Vec<_> = recovery.resubmit.iter().map(|request| request.descs.clone()).collect();
    assert_eq!(requests, [vec![descriptor(2), descriptor(2)], vec![descriptor(3)]]);
    assert_eq!(recovery.base, Some(RingBase::packed(5, true, 2, true)));
}

#[test]
fn inflight_regions_are_written_as_before() {
    assert_eq!(contents(&split_region()), read(SPLIT));
    assert_eq!(contents(&packed_region()), read(PACKED));
}

#[test]
#[ignore = "writes the files"]
fn write_files() {
    write(SPLIT, &contents(&split_region()));
    write(PACKED, &contents(&packed_region()));
}
