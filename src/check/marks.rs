//! Rules L10, L11 and L15: the time of marks, concurrent marks, and marks of a restarted back-end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::harness::{HIGH, MAX_REQUESTS, RequestSize, SLOT_BYTES};
use super::inflight::TrackedRegion;
use super::log::{MarkComparison, harness_with_log};
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::pages::{Pages, changed, harvest, pages};
use super::target::Target;
use crate::abi::vhost_user::ProtocolFeatures;
use crate::abi::virtio::VirtioFeatures;
use crate::dirty::Log;
use crate::memory::{Address, GuestAddress, LOG_PAGE};

const ROUNDS: u32 = 8;

pub(super) fn mark_order(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.enable_logging(harness.ring.device_area())?;
    let (mut early, mut late) = (0, 0);
    for _ in 0..ROUNDS {
        harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
        harness.publish();
        let mut unmarked = Pages::new();
        // Polls without a pause, to see a completion as early as possible.
        for _ in 0..ROUNDS * 100_000 {
            if harness.outstanding() == 0 {
                break;
            }
            if !harness.pop()? {
                thread::yield_now();
                continue;
            }
            for page in pages(harness.last_data.gpa, harness.last_data.len.into()) {
                early += 1;
                if !log.is_marked(GuestAddress(page * LOG_PAGE)) {
                    unmarked.insert(page);
                }
            }
        }
        harness.finish()?;
        harness.connection.barrier()?;
        late += harvest(&log).intersection(&unmarked).count();
    }
    Ok(match late {
        0 => Outcome::pass(format!("{early} pages")),
        late => Outcome::fail(format!("{late} of {early} pages were marked after their completion was visible")),
    })
}

pub(super) fn concurrent_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.enable_logging(harness.ring.device_area())?;
    // Pages that no batch of mixed sizes uses, with bits in the same words.
    let ours: Pages = (0..MAX_REQUESTS)
        .flat_map(|slot| pages(HIGH.unchecked_add(slot * SLOT_BYTES + (48 << 10)), 16 << 10))
        .collect();
    let mut worst = Outcome::not_tested("no round was run");
    for _ in 0..ROUNDS {
        harness.writable_pages.clear();
        harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
        let before = harness.hashes()?;
        let over = AtomicBool::new(false);
        let (served, (mut marked, lost, turns)) = thread::scope(|scope| {
            let other = scope.spawn(|| mark_and_harvest(&log, &ours, &over));
            harness.publish();
            let served = harness.finish().and_then(|()| harness.connection.barrier());
            over.store(true, Ordering::Relaxed);
            (served, other.join().unwrap_or_default())
        });
        served?;
        if lost > 0 {
            return Ok(Outcome::fail(format!(
                "{lost} marks of another writer were lost: marks are not set atomically"
            )));
        }
        marked.extend(harvest(&log));
        marked.retain(|page| !ours.contains(page));
        let Outcome(verdict, found) = MarkComparison::of(&harness, &before, marked)?.outcome();
        if verdict >= worst.0 {
            worst = Outcome(verdict, format!("{turns} concurrent harvests: {found}"));
        }
        if worst.0 == Verdict::Fail {
            break;
        }
    }
    Ok(worst)
}

/// Sets marks and harvests until `over`. Returns the harvested pages, the number of its own marks that were missing,
/// and the number of rounds.
fn mark_and_harvest(log: &Log, ours: &Pages, over: &AtomicBool) -> (Pages, usize, u32) {
    let (mut taken, mut lost, mut turns) = (Pages::new(), 0, 0);
    while !over.load(Ordering::Relaxed) {
        ours.iter().for_each(|page| log.mark(GuestAddress(page * LOG_PAGE), 1));
        let marked = harvest(log);
        lost += ours.difference(&marked).count();
        taken.extend(marked);
        turns += 1;
    }
    (taken, lost, turns)
}

pub(super) fn successor_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::INFLIGHT_SHMFD)?;
    let mut harness = target.harness(VirtioFeatures::empty())?;
    let region = TrackedRegion::get_inflight_fd(&harness)?;
    region.set_inflight_fd(&harness)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.connection.close();
    target.check_served()?;
    harness.reconnect(target.connect()?)?;
    region.set_inflight_fd(&harness)?;
    harness.ring.base = if target.variant.packed { harness.ring.base } else { harness.ring.current_base() };
    harness.add(1, RequestSize::Mixed)?;
    harness.publish();
    let before = harness.hashes()?;
    harness.set_log_all(true)?;
    harness.start_disabled(Some(harness.ring.device_area()))?;
    let (log, fd) = Log::create(harness.memory.end())?;
    harness.send_log(&fd, log.size(), 0)?;
    harness.enable(true)?;
    harness.kick();
    harness.finish()?;
    harness.stop()?;
    let marked = harvest(&log);
    let mut lost = changed(&before, &harness.hashes()?);
    let own = harness.driver_pages();
    lost.retain(|page| !own.contains(page) && !marked.contains(page));
    if !lost.is_empty() {
        return Ok(Outcome::fail(format!("{} pages that the device wrote are not marked", lost.len())));
    }
    let all: Pages = harness.memory.regions().iter().flat_map(|region| pages(region.gpa(), region.size())).collect();
    let missing = all.difference(&marked).count();
    Ok(match missing {
        0 => Outcome::pass(format!("{} pages", all.len())),
        _ => Outcome::warning(format!(
            "{} of {} pages: if the back-end fails during a migration by QEMU 10.0, its earlier marks are \
         lost",
            marked.len(),
            all.len()
        )),
    })
}
