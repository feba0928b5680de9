//! Time of a mark, and of a write to guest memory with and without logging.
//!
//! Compared with vm-memory's `AtomicBitmap`, and with the method of rust-vmm's vhost-user back-end: a lock, an optional
//! log, and one atomic operation on a byte per page. Run `cargo bench --bench mark`.
#![allow(missing_docs, clippy::unwrap_used)]

mod race;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, RwLock};

use race::{Contender, race, time};
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::dirty::{LogBitmap, LogSwitch, PageMarker};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const GUEST: u64 = 4 << 30;
const WRITTEN: usize = 2 << 20;
const TURNS: usize = 9;

fn main() {
    let log = Arc::new(Log::create(GuestAddress(GUEST)).unwrap().0);
    let atomic = AtomicBitmap::new(GUEST as usize, NonZeroUsize::new(4096).unwrap());
    let locked = Locked::new();
    locked.install();
    let gpas = random(GUEST);
    let (ours, atomic, locked, gpas) = (&*log, &atomic, &locked, &gpas);
    for (title, len) in [("mark 4 KiB, alone", 4096), ("mark 1 MiB", 1 << 20)] {
        race(
            title,
            TURNS,
            vec![
                each("Log::mark", gpas, move |gpa| ours.mark(GuestAddress(gpa), len)),
                each("vm-memory AtomicBitmap", gpas, move |gpa| atomic.set_addr_range(gpa as usize, len as usize)),
                each("lock, one byte per page", gpas, move |gpa| locked.mark_dirty(gpa as usize, len as usize)),
            ],
        );
    }

    let mut set = PageSet::default();
    for burst in [8, 32, 256] {
        let set = &mut set;
        let marked = move || time(|| in_bursts(gpas, burst, ours)) / gpas.len() as f64;
        let clean = move || {
            ours.harvest(set);
            marked()
        };
        race(
            &format!("mark 4 KiB, in bursts of {burst}"),
            TURNS,
            vec![
                ("Burst::mark, marked before", Box::new(marked)),
                ("Burst::mark, after a harvest", Box::new(clean)),
                each("vm-memory AtomicBitmap", gpas, move |gpa| atomic.set_addr_range(gpa as usize, 4096)),
            ],
        );
    }

    let switch = Arc::new(LogSwitch::new().unwrap());
    let (plain, switched, fixed) = (memory(()), memory(bitmap(&switch)), memory(bitmap(&log)));
    let lock = memory(Locked::new());
    let gpas = &random(WRITTEN as u64);
    race(
        "write of 8 bytes to guest memory, log off",
        TURNS,
        vec![
            each("no log support: ()", gpas, |gpa| plain.write_obj(gpa, GuestAddress(gpa)).unwrap()),
            each("LogBitmap<LogSwitch>", gpas, |gpa| switched.write_obj(gpa, GuestAddress(gpa)).unwrap()),
            each("lock and option", gpas, |gpa| lock.write_obj(gpa, GuestAddress(gpa)).unwrap()),
        ],
    );
    switch.set(Some(Arc::clone(&log))).unwrap();
    race(
        "write of 8 bytes to guest memory, log on",
        TURNS,
        vec![
            each("no log support: ()", gpas, |gpa| plain.write_obj(gpa, GuestAddress(gpa)).unwrap()),
            each("LogBitmap", gpas, |gpa| fixed.write_obj(gpa, GuestAddress(gpa)).unwrap()),
            each("LogBitmap<LogSwitch>", gpas, |gpa| switched.write_obj(gpa, GuestAddress(gpa)).unwrap()),
        ],
    );
}

/// Page addresses in random order, the same for all contenders.
fn random(bytes: u64) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % (bytes - (1 << 20))) & !0xfff
    };
    (0..1 << 15).map(|_| next()).collect()
}

/// A contender that does `work` for every address. Its result is nanoseconds per address.
fn each<'a>(name: &'static str, gpas: &'a [u64], mut work: impl FnMut(u64) + 'a) -> Contender<'a> {
    (name, Box::new(move || time(|| gpas.iter().for_each(|gpa| work(*gpa))) / gpas.len() as f64))
}

fn in_bursts(gpas: &[u64], burst: usize, log: &Log) {
    for gpas in gpas.chunks(burst) {
        let burst = log.burst();
        gpas.iter().for_each(|gpa| burst.mark(GuestAddress(*gpa), 4096));
    }
}

fn bitmap<M: PageMarker + 'static>(marker: &Arc<M>) -> LogBitmap<M> {
    LogBitmap::new(Arc::clone(marker), GuestAddress(0))
}

/// Guest memory with `bitmap`, all pages populated.
fn memory<B: Bitmap>(bitmap: B) -> GuestMemoryMmap<B> {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_POPULATE;
    let builder = MmapRegionBuilder::new_with_bitmap(WRITTEN, bitmap).with_mmap_flags(flags);
    let mapping = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().unwrap();
    GuestMemoryMmap::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap()
}

/// An optional log behind a lock, marked page by page with an atomic operation on a byte.
struct Locked(RwLock<Option<Vec<AtomicU8>>>);

impl Locked {
    fn new() -> Locked {
        Locked(RwLock::new(None))
    }

    fn install(&self) {
        *self.0.write().unwrap() = Some((0..GUEST >> 15).map(|_| AtomicU8::new(0)).collect());
    }
}

impl<'a> WithBitmapSlice<'a> for Locked {
    type S = RefSlice<'a, Locked>;
}

impl Bitmap for Locked {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(log) = &*self.0.read().unwrap() {
            for page in offset >> 12..=(offset + len - 1) >> 12 {
                log[page / 8].fetch_or(1 << (page % 8), Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Locked> {
        RefSlice::new(self, offset)
    }
}
