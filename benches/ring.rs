//! What a request costs in the ring and in the inflight region, and how long a successor takes to find its way.
//!
//! Per request, in batches: the device's side alone (the driver's is outside the clock), with and without inflight
//! tracking and with the used ring logged. Recovery: a queue of 1024 entries, half of them in flight.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vhost_migrate::dirty::Log;
use vhost_migrate::inflight::{Kind, Region as Inflight, SplitInflight, recover};
use vhost_migrate::memory::{Memory, Region, sealed_memfd};
use vhost_migrate::ring::{Buffer, Chain, RingBase, RingLog, SplitDevice, SplitDriver, SplitLayout};

const SIZE: u16 = 256;
const BATCH: u16 = 16;

fn rings() -> (SplitDriver, SplitDevice) {
    let fd = sealed_memfd("ring-bench", 1 << 20).unwrap();
    let memory = Memory::new([Arc::new(Region::map(fd.as_fd(), 0, 1 << 20, 0, 0).unwrap())]).unwrap();
    let layout = SplitLayout { size: SIZE, desc: 0, avail: 0x4000, used: 0x8000 };
    let driver = SplitDriver::new(&memory, layout, 0).unwrap();
    (driver, SplitDevice::new(&memory, layout, 0, RingBase::default()).unwrap())
}

/// The time the device spends on `requests` requests of three buffers, in batches.
fn serve(requests: u64, inflight: Option<&mut SplitInflight>, log: Option<RingLog>) -> Duration {
    let (mut driver, mut device) = rings();
    device.set_log(log);
    let mut inflight = inflight;
    let buffer = Buffer { gpa: 0x10_000, len: 4096 };
    let (mut chain, mut heads) = (Chain::default(), Vec::new());
    let mut spent = Duration::ZERO;
    for _ in 0..requests.div_ceil(BATCH.into()) {
        for _ in 0..BATCH {
            driver.add(&[buffer], &[buffer, buffer], None).unwrap().unwrap();
        }
        let _ = driver.publish();
        let begin = Instant::now();
        while device.pop(&mut chain).unwrap() {
            if let Some(inflight) = &mut inflight {
                inflight.take(chain.head);
            }
            heads.push(chain.head);
        }
        for head in heads.drain(..) {
            device.push(head, 8192);
            if let Some(inflight) = &mut inflight {
                inflight.stage(head);
            }
        }
        black_box(device.publish());
        if let Some(inflight) = &mut inflight {
            inflight.commit(device.used_index());
        }
        spent += begin.elapsed();
        while driver.pop_used().unwrap().is_some() {}
    }
    spent
}

fn per_request(c: &mut Criterion) {
    let mut group = c.benchmark_group("request");
    group.throughput(Throughput::Elements(1));
    group.bench_function("ring alone", |b| b.iter_custom(|requests| serve(requests, None, None)));
    let (region, _fd) = Inflight::create(Kind::Split, 1, SIZE).unwrap();
    let (mut inflight, _) = region.split(0, SIZE, 0).unwrap();
    group.bench_function("with inflight", |b| b.iter_custom(|requests| serve(requests, Some(&mut inflight), None)));
    let log = RingLog { log: Arc::new(Log::create(1 << 20).unwrap().0), used_gpa: 0x8000 };
    group.bench_function("with the log", |b| b.iter_custom(|requests| serve(requests, None, Some(log.clone()))));
    group.bench_function("inflight alone", |b| {
        let heads = [3u16, 9, 1, 200, 77, 4, 5, 6, 90, 91, 92, 255, 0, 128, 64, 32];
        b.iter_custom(|requests| {
            let begin = Instant::now();
            for _ in 0..requests.div_ceil(heads.len() as u64) {
                heads.iter().for_each(|head| inflight.take(*head));
                heads.iter().for_each(|head| inflight.stage(*head));
                inflight.commit(black_box(16));
            }
            begin.elapsed()
        });
    });
}

fn recovery(c: &mut Criterion) {
    let (region, _fd) = Inflight::create(Kind::Split, 1, 1024).unwrap();
    let (mut inflight, _) = region.split(0, 1024, 0).unwrap();
    (0..512).for_each(|i| inflight.take(i * 5 % 1024));
    let bytes = region.copy(0).unwrap();
    c.bench_function("recover 512 of 1024", |b| b.iter(|| recover(black_box(&bytes), 0, 1024).unwrap()));
    c.bench_function("take over 512 of 1024", |b| b.iter(|| region.split(0, 1024, 0).unwrap()));
}

criterion_group!(benches, per_request, recovery);
criterion_main!(benches);
