//! Rules L10, L11 and L15: when marks are set, who else sets some, and what a successor marks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::harness::{HIGH, Pages, SLOT, SLOTS, Size, changed, harvest, pages};
use super::inflight::Tracked;
use super::log::{Marks, ready};
use super::{Bench, Check, Fault, Outcome, Verdict, When};
use crate::abi::vhost_user::protocol_feature;
use crate::dirty::Log;
use crate::memory::LOG_PAGE;

const ROUNDS: u32 = 8;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "L10", what: "data is marked before its completion is seen", when: When::Data, run: order },
    Check {
        rule: "L11",
        what: "others mark pages in the same words and harvest them: nobody's marks are lost",
        when: When::Data,
        run: shared,
    },
    Check {
        rule: "L15",
        what: "a ring with a past and an empty log: what it writes is marked, and all guest memory",
        when: When::Rings,
        run: successor,
    },
];

fn order(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut rig, log) = ready(bench, 0)?;
    rig.log_on(rig.ring.device_at())?;
    let (mut early, mut late) = (0, 0);
    for _ in 0..ROUNDS {
        rig.add(SLOTS, Size::Mixed)?;
        rig.publish();
        let mut unmarked = Pages::new();
        // Asked again and again, so that a completion is seen as soon as it is there.
        for _ in 0..ROUNDS * 100_000 {
            if rig.outstanding() == 0 {
                break;
            }
            if !rig.pop()? {
                thread::yield_now();
                continue;
            }
            for page in pages(rig.last.gpa, rig.last.len.into()) {
                early += 1;
                if !log.is_marked(page * LOG_PAGE) {
                    unmarked.insert(page);
                }
            }
        }
        rig.finish()?;
        rig.link.barrier()?;
        late += harvest(&log).intersection(&unmarked).count();
    }
    Ok(match late {
        0 => Outcome::pass(format!("{early} pages")),
        late => Outcome::fail(format!(
            "{late} of {early} pages were marked after the driver could see that they were written"
        )),
    })
}

fn shared(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut rig, log) = ready(bench, 0)?;
    rig.log_on(rig.ring.device_at())?;
    // Behind what a batch of mixed sizes is lent, within the same 64 pages.
    let ours: Pages = (0..SLOTS).flat_map(|slot| pages(HIGH + slot * SLOT + (48 << 10), 16 << 10)).collect();
    let mut worst = Outcome::not_tested("no round");
    for _ in 0..ROUNDS {
        rig.lent.clear();
        rig.add(SLOTS, Size::Mixed)?;
        let before = rig.hashes()?;
        let over = AtomicBool::new(false);
        let (served, (mut marked, lost, turns)) = thread::scope(|scope| {
            let other = scope.spawn(|| mark_and_harvest(&log, &ours, &over));
            rig.publish();
            let served = rig.finish().and_then(|()| rig.link.barrier());
            over.store(true, Ordering::Relaxed);
            (served, other.join().unwrap_or_default())
        });
        served?;
        if lost > 0 {
            return Ok(Outcome::fail(format!(
                "{lost} marks that others had set were gone: they are not set atomically"
            )));
        }
        marked.extend(harvest(&log));
        marked.retain(|page| !ours.contains(page));
        let Outcome(verdict, found) = Marks::of(&rig, &before, marked)?.allow(rig.used_ring()).judge();
        if verdict >= worst.0 {
            worst = Outcome(verdict, format!("{turns} harvests meanwhile: {found}"));
        }
        if worst.0 == Verdict::Fail {
            break;
        }
    }
    Ok(worst)
}

/// Marks pages and takes all marks, until it is over: what was taken, how many of its own marks were missing, how often.
fn mark_and_harvest(log: &Log, ours: &Pages, over: &AtomicBool) -> (Pages, usize, u32) {
    let (mut taken, mut lost, mut turns) = (Pages::new(), 0, 0);
    while !over.load(Ordering::Relaxed) {
        ours.iter().for_each(|page| log.mark(page * LOG_PAGE, 1));
        let marked = harvest(log);
        lost += ours.difference(&marked).count();
        taken.extend(marked);
        turns += 1;
    }
    (taken, lost, turns)
}

fn successor(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::INFLIGHT_SHMFD)?;
    let mut rig = bench.rig(0)?;
    let region = Tracked::ask(&rig)?;
    region.install(&rig)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    rig.link.end();
    bench.lives()?;
    rig.reconnect(bench.connect()?)?;
    region.install(&rig)?;
    rig.ring.base = if bench.shape.packed { rig.ring.base } else { rig.ring.position() };
    rig.add(1, Size::Mixed)?;
    rig.publish();
    let before = rig.hashes()?;
    rig.log_data(true)?;
    rig.start_disabled(Some(rig.ring.device_at()))?;
    let (log, fd) = Log::create(rig.memory.end())?;
    rig.send_log(&fd, log.size(), 0)?;
    rig.enable(true)?;
    rig.wake();
    rig.finish()?;
    rig.stop()?;
    let marked = harvest(&log);
    let mut lost = changed(&before, &rig.hashes()?);
    let own = rig.own();
    lost.retain(|page| !own.contains(page) && !marked.contains(page));
    if !lost.is_empty() {
        return Ok(Outcome::fail(format!("{} pages that it wrote itself are not marked", lost.len())));
    }
    let all: Pages = rig.memory.regions().iter().flat_map(|region| pages(region.gpa(), region.size())).collect();
    let missing = all.difference(&marked).count();
    Ok(match missing {
        0 => Outcome::pass(format!("{} pages", all.len())),
        _ => Outcome::warning(format!(
            "{} of {} pages: if it dies during a migration by QEMU 10.0, what it marked before is lost",
            marked.len(),
            all.len()
        )),
    })
}
