//! Time of a request in the ring and in the inflight region, and time of the recovery by a successor.
//!
//! Per request, in batches, on split and packed rings. Only the device side is measured, for requests of one
//! descriptor, of a chain and of an indirect table, with and without inflight tracking, and with logging of the ring.
//! Behind an IOMMU there is a translation for each page, and all are in the IOTLB. Recovery is measured for a queue of
//! 1024 entries with 512 requests in flight.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod race;
#[path = "../tests/kit/tracked_ring.rs"]
mod tracked_ring;

use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use race::{Contender, race, time};
use tracked_ring::TrackedRing;
use vhost_migrate::abi::virtio::{PackedDesc, VIRTIO_F_RING_PACKED, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::inflight::{InflightRegion, RingKind, recover_packed, recover_split};
use vhost_migrate::memory::{
    Access, Address, GuestAddress, Iotlb, Iova, IovaWindow, LOG_PAGE, Memory, Region, UserAddress, sealed_memfd,
};
use vhost_migrate::ring::{Buffer, Chain, DeviceRing, DriverRing, RingBase, RingIommu, RingLayout, RingLog};
use zerocopy::FromZeros;

const SIZE: u16 = 256;
const BATCH: u16 = 16;
/// Number of batches of one turn.
const BATCHES: u64 = 2000;
const TURNS: usize = 9;
/// Guest-physical addresses of the parts of a ring.
const AREAS: [GuestAddress; 3] = [GuestAddress(0), GuestAddress(0x4000), GuestAddress(0x8000)];
const KINDS: [(&str, VirtioFeatures); 2] = [("split", VirtioFeatures::empty()), ("packed", VIRTIO_F_RING_PACKED)];
/// Guest-physical start of the memory for indirect tables.
const TABLES: GuestAddress = GuestAddress(0x2_0000);

fn rings(kind: VirtioFeatures, translated: bool) -> (DriverRing, DeviceRing) {
    let fd = sealed_memfd("ring-bench", 1 << 20).unwrap();
    let region = Region::map(fd.as_fd(), GuestAddress(0), 1 << 20, UserAddress(0), 0).unwrap();
    let memory = Memory::new([Arc::new(region)]).unwrap();
    let features = kind | VIRTIO_RING_F_INDIRECT_DESC;
    let layout = RingLayout::new(features, SIZE, AREAS);
    let driver = DriverRing::new(&memory, layout, features).unwrap();
    let start = RingBase::initial(features);
    if !translated {
        return (driver, DeviceRing::new(&memory, layout, features, start).unwrap());
    }
    let iotlb = Arc::new(Iotlb::default());
    for page in (0..1 << 20).step_by(LOG_PAGE as usize) {
        iotlb.update(Iova(page), LOG_PAGE, UserAddress(page), Some(Access::ReadWrite)).unwrap();
    }
    let sizes = RingLayout::area_bytes(features, SIZE);
    let areas: Vec<_> =
        layout.areas().into_iter().zip(sizes).map(|(at, len)| (Iova(at.0), len, Access::ReadWrite)).collect();
    let window = Arc::new(IovaWindow::open(&memory, &iotlb, &areas, None).unwrap());
    let mut device = DeviceRing::new(window.memory(), layout, features, start).unwrap();
    device.set_iommu(RingIommu { memory, iotlb, window });
    (driver, device)
}

/// The layout of requests.
#[derive(Clone, Copy)]
struct RequestLayout {
    /// Number of writable buffers, beside one readable buffer.
    writable: usize,
    indirect: bool,
    /// True if the ring is behind an IOMMU, which translates addresses page by page.
    translated: bool,
}

const CHAIN: RequestLayout = RequestLayout { writable: 2, indirect: false, translated: false };

/// Nanoseconds of the device side per request, measured over many batches.
fn serve(kind: VirtioFeatures, layout: RequestLayout, region: Option<&InflightRegion>, log: Option<RingLog>) -> f64 {
    let (mut driver, mut device) = rings(kind, layout.translated);
    device.set_log(log);
    let mut device = TrackedRing::new(device, region, 0);
    let buffer = Buffer { gpa: GuestAddress(0x1_0000), len: 4096 };
    let writable = [buffer; 2];
    let mut chains: Vec<(Chain, u16)> = (0..BATCH).map(|_| Default::default()).collect();
    let mut spent = Duration::ZERO;
    for _ in 0..BATCHES {
        for number in 0..u64::from(BATCH) {
            let table = layout.indirect.then_some(TABLES.unchecked_add(number * 64));
            driver.add(&[buffer], &writable[..layout.writable], table).unwrap().unwrap();
        }
        let _ = driver.publish();
        let begin = Instant::now();
        for (chain, entry) in &mut chains {
            *entry = device.take(chain);
        }
        for (chain, entry) in &chains {
            device.push(chain, *entry, 8192);
        }
        black_box(device.publish());
        spent += begin.elapsed();
        while driver.pop_used().unwrap().is_some() {}
    }
    spent.as_nanos() as f64 / (BATCHES * u64::from(BATCH)) as f64
}

fn main() {
    per_request();
    inflight_alone();
    recovery();
}

fn per_request() {
    let layouts = [
        ("one descriptor", RequestLayout { writable: 0, ..CHAIN }),
        ("a chain of three", CHAIN),
        ("an indirect table of three", RequestLayout { indirect: true, ..CHAIN }),
        ("one descriptor behind an IOMMU", RequestLayout { writable: 0, translated: true, ..CHAIN }),
        ("a chain of three behind an IOMMU", RequestLayout { translated: true, ..CHAIN }),
        ("an indirect table of three behind an IOMMU", RequestLayout { indirect: true, translated: true, ..CHAIN }),
    ];
    for (name, kind) in KINDS {
        let mut contenders: Vec<Contender<'_>> = Vec::new();
        for (what, layout) in layouts {
            contenders.push((what, Box::new(move || serve(kind, layout, None, None))));
        }
        let tracked = move || {
            let layout = if kind.contains(VIRTIO_F_RING_PACKED) { RingKind::Packed } else { RingKind::Split };
            let (region, _) = InflightRegion::create(layout, 1, SIZE).unwrap();
            serve(kind, CHAIN, Some(&region), None)
        };
        contenders.push(("a chain of three with inflight", Box::new(tracked)));
        let log =
            RingLog { log: Arc::new(Log::create(GuestAddress(1 << 20)).unwrap().0), used_gpa: GuestAddress(0x8000) };
        let logged = move || serve(kind, CHAIN, None, Some(log.clone()));
        contenders.push(("a chain of three with the log", Box::new(logged)));
        race(&format!("request, {name}"), TURNS, contenders);
    }
}

fn inflight_alone() {
    let (region, _fd) = InflightRegion::create(RingKind::Split, 1, SIZE).unwrap();
    let (mut inflight, _) = region.split(0, SIZE, 0).unwrap();
    let heads = [3u16, 9, 1, 200, 77, 4, 5, 6, 90, 91, 92, 255, 0, 128, 64, 32];
    let batch = move || {
        heads.iter().for_each(|head| inflight.take(*head));
        heads.iter().for_each(|head| inflight.stage(*head));
        inflight.commit(black_box(16));
    };
    race("request, inflight alone", TURNS, vec![("split", each(BATCHES, heads.len() as u64, batch))]);
}

fn recovery() {
    const TIMES: u64 = 100;
    let (split, _fd) = InflightRegion::create(RingKind::Split, 1, 1024).unwrap();
    let (mut inflight, _) = split.split(0, 1024, 0).unwrap();
    (0..512).for_each(|i| inflight.take(i * 5 % 1024));
    let split_bytes = split.copy(0).unwrap();
    let (packed, _fd) = InflightRegion::create(RingKind::Packed, 1, 1024).unwrap();
    let unused = |_| 0x80;
    let start = RingBase::PACKED_START;
    let (mut inflight, _) = packed.packed(0, 1024, start, unused).unwrap();
    (0..512u16).for_each(|_| _ = inflight.take(&[PackedDesc::new_zeroed()]).unwrap());
    let packed_bytes = packed.copy(0).unwrap();
    let recover_packed = || recover_packed(black_box(&packed_bytes), 1024, 1024, start, unused).unwrap();
    race(
        "recovery of 512 requests of 1024",
        TURNS,
        vec![
            ("recover, split", each(TIMES, 1, || recover_split(black_box(&split_bytes), 0, 1024).unwrap())),
            ("take over, split", each(TIMES, 1, || split.split(0, 1024, 0).unwrap())),
            ("recover, packed", each(TIMES, 1, recover_packed)),
            ("take over, packed", each(TIMES, 1, || packed.packed(0, 1024, start, unused).unwrap())),
        ],
    );
}

/// A contender that does `work` `times` times. Its result is nanoseconds per unit, of which `work` has `units`.
fn each<'a, T>(times: u64, units: u64, mut work: impl FnMut() -> T + 'a) -> Box<dyn FnMut() -> f64 + 'a> {
    Box::new(move || time(|| (0..times).for_each(|_| _ = black_box(work()))) / (times * units) as f64)
}
