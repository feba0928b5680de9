//! What a request costs in a ring's thread beside its device, and what the counters are of it.
//!
//! A device that does nothing, a ring of 256, batches of 64 requests of three descriptors: the driver publishes a batch,
//! kicks, and waits in a loop until all of it is used; all of that is in the clock. First as it is in a process without
//! `--metrics`, then with the recorder that `--metrics` installs. Then a signal to the driver alone, beside a write to the same eventfd,
//! which a peer can make wait (rule F9).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use metrics_exporter_prometheus::PrometheusBuilder;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::backend::{Device, Immediate, Kick, Logging, Notifier, Queue, RING_FEATURES, Rings, Setup, Workers};
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{Memory, Region, sealed_memfd};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase, RingLayout};

const SIZE: u16 = 256;
const BATCH: u64 = 64;
const FEATURES: u64 = 1 << 32;

struct Nothing;

impl Device for Nothing {
    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queue(&self, _: u16, _: u16, _: u64) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(Immediate::new(|request| {
            let _ = request.write(0, &[0]);
        })))
    }
}

/// The time from the first of `requests` to the last.
fn serve(requests: u64, log: Option<Arc<Log>>) -> Duration {
    let fd = sealed_memfd("serve-bench", 1 << 20).unwrap();
    let memory = Memory::new([Arc::new(Region::share(fd, 0, 1 << 20, 0).unwrap())]).unwrap();
    let layout = RingLayout::new(FEATURES, SIZE, 0, 0x4000, 0x8000);
    let mut driver = DriverRing::new(&memory, layout, FEATURES).unwrap();
    let kick = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let setup = Setup {
        call_is_new: false,
        notified: Arc::default(),
        layout,
        base: RingBase::start(FEATURES),
        features: FEATURES,
        memory,
        logging: Logging { data: log.clone(), used: log.map(|log| (log, 0x8000)), ..Logging::default() },
        kick: Some(Arc::new(Kick::new(0, kick.as_fd().try_clone_to_owned().unwrap()).unwrap())),
        polled: false,
        call: None,
        error: None,
        inflight: None,
        first: true,
        postcopy: false,
        host: Arc::default(),
        iotlb: None,
    };
    let mut workers = Workers::new(Arc::new(Nothing));
    workers.start(0, setup).unwrap();
    let buffer = Buffer { gpa: 0x1_0000, len: 4096 };
    let begin = Instant::now();
    for _ in 0..requests.div_ceil(BATCH) {
        for _ in 0..BATCH {
            driver.add(&[buffer], &[buffer; 2], None).unwrap().unwrap();
        }
        if driver.publish() {
            kick.write(1).unwrap();
        }
        let mut left = BATCH;
        while left > 0 {
            match driver.pop_used().unwrap() {
                Some(_) => left -= 1,
                None => std::hint::spin_loop(),
            }
        }
    }
    let spent = begin.elapsed();
    workers.stop_all();
    spent
}

fn counters(c: &mut Criterion) {
    let mut group = c.benchmark_group("serve");
    group.throughput(Throughput::Elements(1));
    let mut run = |what: &str| {
        group.bench_function(what, |b| b.iter_custom(|requests| serve(requests, None)));
        let log = Arc::new(Log::create(1 << 20).unwrap().0);
        group.bench_function(format!("{what}, logged"), |b| {
            b.iter_custom(|requests| serve(requests, Some(log.clone())))
        });
    };
    run("counted for nobody");
    // The one of `--metrics`; nobody reads it meanwhile.
    metrics::set_global_recorder(PrometheusBuilder::new().build_recorder()).unwrap();
    run("counted");
}

fn signals(c: &mut Criterion) {
    let mut group = c.benchmark_group("signal");
    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    group.bench_function("write", |b| b.iter(|| eventfd.write(1)));
    let notifier = Notifier::new(eventfd.as_fd().try_clone_to_owned().unwrap());
    group.bench_function("Notifier", |b| b.iter(|| notifier.signal()));
}

criterion_group!(benches, counters, signals);
criterion_main!(benches);
