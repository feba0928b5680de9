//! Cost of a request in a ring's thread without its device, and the share of the counters in it.
//!
//! A device that completes requests at once, a ring of 256 entries, and batches of 64 requests of three descriptors. The
//! driver publishes a batch, kicks, and waits in a loop for all completions. The figure is the time of all that. It is
//! measured without `--metrics`, and with the recorder that `--metrics` installs. A signal to the driver is measured
//! alone, beside a write to the same eventfd, which a peer can block (rule F9.1).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod race;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusBuilder;
use nix::sys::eventfd::{EfdFlags, EventFd};
use race::{race, time};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::{Queue, RING_FEATURES, SyncQueue, VirtioDevice};
use vhost_migrate::dirty::Log;
use vhost_migrate::memory::{GuestAddress, Memory, Region, sealed_memfd};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase, RingLayout};
use vhost_migrate::unstable::backend::{Kick, Logging, Notifier, VringConfig, VringController, Workers};

const SIZE: u16 = 256;
const BATCH: u64 = 64;
/// Of one turn.
const BATCHES: u64 = 500;
const SIGNALS: u64 = 20_000;
const TURNS: usize = 9;
const FEATURES: u64 = 1 << 32;

struct Nothing;

impl VirtioDevice for Nothing {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(SyncQueue::new(|request| {
            let _ = request.write(0, &[0]);
        })))
    }
}

/// Guest-physical addresses of the parts of the ring.
const AREAS: [GuestAddress; 3] = [GuestAddress(0), GuestAddress(0x4000), GuestAddress(0x8000)];

/// Nanoseconds that a request of many takes.
fn serve(log: Option<Arc<Log>>) -> f64 {
    let fd = sealed_memfd("serve-bench", 1 << 20).unwrap();
    let memory = Memory::new([Arc::new(Region::share(fd, GuestAddress(0), 1 << 20, 0).unwrap())]).unwrap();
    let layout = RingLayout::new(VirtioFeatures::from_bits_retain(FEATURES), SIZE, AREAS);
    let mut driver = DriverRing::new(&memory, layout, VirtioFeatures::from_bits_retain(FEATURES)).unwrap();
    let kick = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let setup = VringConfig {
        call_changed: false,
        has_notified: Arc::default(),
        layout,
        base: RingBase::initial(VirtioFeatures::from_bits_retain(FEATURES)),
        features: VirtioFeatures::from_bits_retain(FEATURES),
        memory,
        logging: Logging { data: log.clone(), used: log.map(|log| (log, AREAS[2])), ..Logging::default() },
        kick: Some(Arc::new(Kick::new(0, kick.as_fd().try_clone_to_owned().unwrap()).unwrap())),
        is_polled: false,
        call: None,
        error: None,
        inflight: None,
        is_first_start: true,
        in_postcopy: false,
        frontend: Arc::default(),
        iotlb: None,
    };
    let mut workers = Workers::new(Arc::new(Nothing));
    workers.start(0, setup).unwrap();
    let buffer = Buffer { gpa: GuestAddress(0x1_0000), len: 4096 };
    let mut batch = || {
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
    };
    let spent = time(|| (0..BATCHES).for_each(|_| batch()));
    workers.stop_all();
    spent / (BATCHES * BATCH) as f64
}

fn main() {
    let log = &Arc::new(Log::create(GuestAddress(1 << 20)).unwrap().0);
    let served = |title| {
        let logged = move || serve(Some(log.clone()));
        race(title, TURNS, vec![("without a log", Box::new(|| serve(None))), ("logged", Box::new(logged))]);
    };
    served("a request, counted for nobody");
    // The recorder of `--metrics`. It is not read meanwhile.
    metrics::set_global_recorder(PrometheusBuilder::new().build_recorder()).unwrap();
    served("a request, counted");

    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let notifier = Notifier::new(eventfd.as_fd().try_clone_to_owned().unwrap());
    let each = |signal: &dyn Fn()| time(|| (0..SIGNALS).for_each(|_| signal())) / SIGNALS as f64;
    race(
        "a signal",
        TURNS,
        vec![
            ("write", Box::new(|| each(&|| _ = eventfd.write(1)))),
            ("Notifier", Box::new(|| each(&|| notifier.signal()))),
        ],
    );
}
