//! Time of a harvest of a dirty log, compared with vm-memory's `AtomicBitmap::get_and_reset` and with QEMU's loop over
//! a log.
//!
//! All memory of all contenders is populated before the measurement. Run `cargo bench --bench harvest`.
#![allow(missing_docs, clippy::unwrap_used)]

mod race;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use race::{Contender, race, time};
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE};
use vm_memory::bitmap::AtomicBitmap;

const GIB: u64 = 1 << 30;
const TURNS: usize = 9;

fn main() {
    for (name, gib, pages) in [
        ("64 GiB, none dirty", 64, none(64)),
        ("64 GiB, 1 % dirty in runs of 1 MiB", 64, clustered(64)),
        ("64 GiB, all dirty", 64, all(64)),
        ("1 TiB, none dirty", 1024, none(1024)),
    ] {
        let mut contenders = vec![ours(gib, &pages), vm_memory(gib, &pages), qemu(gib, &pages)];
        if pages.is_empty() {
            contenders.push(read(gib));
        }
        race(&format!("harvest, {name}"), TURNS, contenders);
    }
    for (name, pages) in [("none", none(64)), ("1 %", clustered(64)), ("all", all(64))] {
        let contenders = vec![ours_stopped(64, &pages), qemu(64, &pages), copy_and_zero(64, &pages)];
        race(&format!("last harvest after stop, 64 GiB, {name} dirty"), TURNS, contenders);
    }
    let sparse = vec![sparse(1024, 0), sparse(1024, 16), sparse(1024, 256)];
    race("harvest of a sparse log, 1 TiB", TURNS, sparse);
    race(
        "clear the page set afterwards",
        TURNS,
        vec![clear(64, &none(64)), clear(64, &clustered(64)), clear(64, &all(64)), clear(1024, &clustered(64))],
    );
    race(
        "walk the runs afterwards",
        TURNS,
        vec![runs(64, &clustered(64)), runs(64, &all(64)), runs(1024, &clustered(64))],
    );
}

fn none(_: u64) -> Vec<Range<u64>> {
    Vec::new()
}

fn all(gib: u64) -> Vec<Range<u64>> {
    std::iter::once(0..gib * GIB / LOG_PAGE).collect()
}

/// One run of 1 MiB in every 100 MiB, at irregular offsets.
fn clustered(gib: u64) -> Vec<Range<u64>> {
    let runs = gib * GIB / (100 << 20);
    (0..runs).map(|i| i * 25600 + i * 7919 % 25000).map(|page| page..page + 256).collect()
}

fn set(gib: u64) -> PageSet {
    let mut set = PageSet::new(gib * GIB / LOG_PAGE);
    set.insert_range((0..set.capacity()).into());
    set.clear();
    set
}

fn log(gib: u64) -> Log {
    let (log, _) = Log::create(GuestAddress(gib * GIB)).unwrap();
    mark(&log, &all(gib));
    log.harvest_stopped(&mut set(gib));
    log
}

fn mark(log: &Log, pages: &[Range<u64>]) {
    pages.iter().for_each(|run| log.mark(GuestAddress(run.start * LOG_PAGE), (run.end - run.start) * LOG_PAGE));
}

fn ours(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let (log, mut set) = (log(gib), set(gib));
    let turn = move || {
        set.clear();
        mark(&log, pages);
        time(|| log.harvest(&mut set))
    };
    ("Log::harvest", Box::new(turn))
}

fn ours_stopped(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let (log, mut set) = (log(gib), set(gib));
    let turn = move || {
        set.clear();
        mark(&log, pages);
        time(|| log.harvest_stopped(&mut set))
    };
    ("Log::harvest_stopped", Box::new(turn))
}

fn vm_memory(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let bitmap = AtomicBitmap::new((gib * GIB) as usize, NonZeroUsize::new(4096).unwrap());
    let turn = move || {
        for run in pages {
            bitmap.set_addr_range((run.start * LOG_PAGE) as usize, ((run.end - run.start) * LOG_PAGE) as usize);
        }
        time(|| bitmap.get_and_reset())
    };
    ("vm-memory get_and_reset", Box::new(turn))
}

/// A log in a memfd, as in QEMU, all pages populated.
struct SharedLog {
    map: MmapRaw,
    words: usize,
}

impl SharedLog {
    fn new(gib: u64) -> SharedLog {
        let words = (gib * GIB / LOG_PAGE / 64) as usize;
        let file = nix::sys::memfd::memfd_create("log", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, words as i64 * 8).unwrap();
        let shared = SharedLog { map: MmapOptions::new().len(words * 8).map_raw(&file).unwrap(), words };
        shared.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        shared
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has that many words and exists as long as `self`.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), self.words) }
    }

    fn mark(&self, pages: &[Range<u64>]) {
        for page in pages.iter().cloned().flatten() {
            self.words()[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }
}

fn qemu(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let shared = SharedLog::new(gib);
    let mut into = vec![1u64; shared.words];
    let turn = move || {
        into.fill(0);
        shared.mark(pages);
        time(|| {
            for (word, into) in shared.words().iter().zip(&mut into) {
                if word.load(Ordering::Relaxed) != 0 {
                    *into |= word.swap(0, Ordering::SeqCst);
                }
            }
        })
    };
    ("load, skip 0, xchg (QEMU's loop)", Box::new(turn))
}

/// Lower bound for an empty log: a plain read of all its words.
fn read<'a>(gib: u64) -> Contender<'a> {
    let shared = SharedLog::new(gib);
    let turn = move || {
        time(|| {
            // SAFETY: the mapping has that many words, and nothing writes them.
            let words = unsafe { std::slice::from_raw_parts(shared.map.as_ptr().cast::<u64>(), shared.words) };
            words.iter().fold(0, |any, word| any | word)
        })
    };
    ("read it (the limit)", Box::new(turn))
}

/// Lower bound for stopped writers: moving the bytes, without filling a page set.
fn copy_and_zero(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let shared = SharedLog::new(gib);
    let mut into = vec![1u64; shared.words];
    let turn = move || {
        shared.mark(pages);
        time(|| {
            // SAFETY: both have that many words, and nothing else accesses them.
            unsafe {
                let log = shared.map.as_mut_ptr().cast::<u64>();
                std::ptr::copy_nonoverlapping(log, into.as_mut_ptr(), shared.words);
                std::ptr::write_bytes(log, 0, shared.words);
            }
        })
    };
    ("memcpy + memset", Box::new(turn))
}

fn sparse<'a>(gib: u64, touched: u64) -> Contender<'a> {
    let (log, _) = Log::create(GuestAddress(gib * GIB)).unwrap();
    let mut set = set(gib);
    let name = match touched {
        0 => "no page of the log touched",
        16 => "16 pages of the log touched",
        _ => "256 pages of the log touched",
    };
    let turn = move || {
        set.clear();
        // One page of the log covers 128 MiB of guest memory.
        (0..touched).for_each(|i| log.mark(GuestAddress(i * (gib * GIB / touched)), 1));
        time(|| log.harvest(&mut set))
    };
    (name, Box::new(turn))
}

fn clear(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let mut set = set(gib);
    let turn = move || {
        pages.iter().for_each(|run| {
            set.insert_range(run.clone().into());
        });
        time(|| set.clear())
    };
    (label(gib, pages), Box::new(turn))
}

fn runs(gib: u64, pages: &[Range<u64>]) -> Contender<'_> {
    let mut set = set(gib);
    pages.iter().for_each(|run| {
        set.insert_range(run.clone().into());
    });
    (label(gib, pages), Box::new(move || time(|| set.runs().count())))
}

fn label(gib: u64, pages: &[Range<u64>]) -> &'static str {
    match (gib, pages.len()) {
        (64, 0) => "64 GiB, none",
        (64, 1) => "64 GiB, all",
        (64, _) => "64 GiB, 655 runs",
        _ => "1 TiB, 655 runs",
    }
}
