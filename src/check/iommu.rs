//! Rules T1 to T5 and L5: the device behind an IOMMU, which knows no address until it has asked.
//!
//! A page of the driver's lies in the place of another, so whoever takes an address for guest-physical reads and writes
//! what is not its own: data is compared with what the device reads without an IOMMU, and every page of guest memory with
//! what it was.

use std::thread;

use zerocopy::{FromZeros, IntoBytes};

use super::harness::{HIGH, NOWHERE, Pages, Rig, SLOT, SLOTS, Scatter, Size, changed, harvest, noise, pages, soon};
use super::log::{Marks, missing};
use super::queue::RING;
use super::{Bench, Check, Fault, Flow, Outcome, Verdict, When};
use crate::abi::bit;
use crate::abi::vhost::{
    VHOST_ACCESS_RO, VHOST_ACCESS_RW, VHOST_ACCESS_WO, VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE,
};
use crate::abi::vhost_user::{IotlbMsg, Request as Code, protocol_feature};
use crate::abi::virtio::VIRTIO_RING_F_EVENT_IDX;
use crate::memory::LOG_PAGE;

/// How often data is moved under load.
const MOVES: u64 = 8;
/// How often a ring is moved.
const RING_MOVES: u32 = 4;
/// Batches that go round every ring, whose entries are 256 unless it was asked for others.
const BATCHES: usize = 16;

pub(super) const CHECKS: &[Check] = &[
    Check {
        rule: "T1",
        what: "every address is translated, and what is not known is asked for",
        when: When::Each,
        run: translated,
    },
    Check {
        rule: "T1",
        what: "what is not permitted is left alone, and ends one ring at most",
        when: When::Each,
        run: forbidden,
    },
    Check {
        rule: "T1",
        what: "GET_VRING_BASE is answered while an answer of the IOMMU is outstanding",
        when: When::Each,
        run: unanswered,
    },
    Check { rule: "T2", what: "translations that can't be change nothing", when: When::Rings, run: impossible },
    Check {
        rule: "T3",
        what: "data is moved under load: nothing uses the old place after the answer",
        when: When::Data,
        run: moved,
    },
    Check { rule: "T3", what: "a ring is moved, and goes on in its new place", when: When::Each, run: ring_moved },
    Check { rule: "T4", what: "a ring runs whose pages are scattered", when: When::Each, run: scattered },
    Check { rule: "T5", what: "ACCESS_PLATFORM is offered", when: When::Once, run: offered },
    Check {
        rule: "L5",
        what: "marks are of guest-physical pages, and log_guest_addr is translated",
        when: When::Each,
        run: marked,
    },
];

/// Batches of requests, one after the other.
fn batches(rig: &mut Rig, sizes: &[Size]) -> Result<(), Fault> {
    sizes.iter().try_for_each(|size| rig.load(SLOTS, *size))
}

/// What a disk reads into memory by these batches without an IOMMU. Frames tell themselves whether they are right.
fn expected(bench: &Bench, sizes: &[Size]) -> Result<Vec<(u64, u64)>, Fault> {
    if !bench.subject.is_stable() {
        return Ok(Vec::new());
    }
    let mut rig = bench.rig(0)?;
    rig.start()?;
    batches(&mut rig, sizes)?;
    data(&rig)
}

/// The hashes of all data, by the driver's addresses.
fn data(rig: &Rig) -> Result<Vec<(u64, u64)>, Fault> {
    Ok(rig.seen()?.into_iter().filter(|(page, _)| *page >= HIGH / LOG_PAGE).collect())
}

/// How many pages hold something else than they should.
fn wrong(rig: &Rig, expected: &[(u64, u64)]) -> Result<usize, Fault> {
    Ok(changed(expected, &data(rig)?).len())
}

fn translated(bench: &mut Bench) -> Result<Outcome, Fault> {
    served(bench, Scatter::Rings)
}

fn scattered(bench: &mut Bench) -> Result<Outcome, Fault> {
    served(bench, Scatter::Pages)
}

fn served(bench: &Bench, scatter: Scatter) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    let mut sizes = [Size::Mixed; BATCHES];
    sizes.iter_mut().step_by(4).for_each(|size| *size = Size::Large);
    let expected = expected(bench, &sizes)?;
    let mut rig = bench.behind(0, scatter, 1)?;
    let before = rig.hashes()?;
    rig.start()?;
    batches(&mut rig, &sizes)?;
    let base = rig.stop()?;
    let (own, used) = (rig.own(), rig.used_ring());
    let mut stray = changed(&before, &rig.hashes()?);
    stray.retain(|page| !own.contains(page) && !used.contains(page) && !rig.lent.contains(page));
    // What the driver has filled for frames that leave is its own too.
    let stray = if bench.shape.flow == Flow::Transmit { 0 } else { stray.len() };
    let (wrong, misses) = (wrong(&rig, &expected)?, rig.iommu()?.misses()?);
    let made = BATCHES as u64 * SLOTS;
    let same = rig.ring.same(base, rig.ring.end());
    Ok(match (stray, wrong, misses, same) {
        (0, 0, 1.., true) => Outcome::pass(format!("{made} requests, {misses} translations asked for")),
        (0, 0, 0, _) => Outcome::fail(format!("{made} requests, and no translation was asked for")),
        (0, 0, _, false) => Outcome::fail(format!("{made} requests later it says {}", rig.ring.show(base))),
        _ => Outcome::fail(format!(
            "{made} requests: {wrong} pages hold other data than without an IOMMU, {stray} pages were written that were \
             not lent"
        )),
    })
}

/// A page of data of a slot that no batch has used, as the driver knows it.
fn fresh(slot: u64, number: u64) -> u64 {
    HIGH + slot * SLOT + SLOT / 2 + number * LOG_PAGE
}

/// Waits until the device has asked for a page.
fn asked(rig: &mut Rig, iova: u64) -> Result<bool, Fault> {
    soon(&rig.deadline(rig.timeout), || {
        rig.feed()?;
        Ok(rig.iommu()?.asked(iova / LOG_PAGE) > 0)
    })
}

fn forbidden(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    // Which ring a frame arrives on can't be told.
    let rings = if bench.shape.flow == Flow::Receive { 1 } else { bench.most_rings().min(2) };
    let mut rig = bench.behind(0, Scatter::Rings, rings)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let too_little = if bench.shape.flow == Flow::Transmit { VHOST_ACCESS_WO } else { VHOST_ACCESS_RO };
    for (number, permission) in (0..).zip([0, too_little]) {
        let iova = fresh(0, number);
        let page = iova / LOG_PAGE;
        rig.iommu()?.permit(page, permission);
        rig.add_at(0, iova, LOG_PAGE)?;
        let others = rings as u16 - 1;
        if others > 0 {
            rig.add_at(1, fresh(1, number), LOG_PAGE)?;
        }
        let place: Pages = rig.places([page].into_iter()).collect();
        let before = rig.hashes()?;
        rig.publish();
        if !asked(&mut rig, iova)? {
            return Ok(Outcome::fail(format!("it did not ask for the page at {iova:#x}, which it did not know")));
        }
        let with = format!("with permission {permission}");
        if !soon(&rig.deadline(rig.timeout), || rig.pop_all().map(|_| rig.outstanding() <= 1))? {
            return Ok(Outcome::fail(format!("{with}: a request of another ring was not served")));
        }
        rig.link.barrier()?;
        let base = rig.stop()?;
        rig.pop_all()?;
        if rig.outstanding() != 1 || !rig.ring.same(base, rig.ring.position()) {
            let base = rig.ring.show(base);
            return Ok(Outcome::fail(format!("{with}: the request was taken all the same, and the base is {base}")));
        }
        if !changed(&before, &rig.hashes()?).is_disjoint(&place) {
            return Ok(Outcome::fail(format!("{with}: the page was written")));
        }
        rig.iommu()?.permit(page, VHOST_ACCESS_RW);
        rig.invalidate(iova, LOG_PAGE)?;
        rig.start()?;
        rig.finish()?;
    }
    let others = if rings > 1 { "another ring and the connection" } else { "the connection" };
    Ok(Outcome::pass(format!(
        "2 pages, not mapped or not for this; {others} went on, and the ring when it was permitted"
    )))
}

fn unanswered(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    let mut rig = bench.behind(0, Scatter::Rings, 1)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let iova = fresh(0, 0);
    rig.iommu()?.hold([iova / LOG_PAGE]);
    rig.add_at(0, iova, LOG_PAGE)?;
    rig.publish();
    if !asked(&mut rig, iova)? {
        return Ok(Outcome::fail(format!("it did not ask for the page at {iova:#x}, which it did not know")));
    }
    let base = rig.stop()?;
    rig.pop_all()?;
    if rig.outstanding() != 1 || !rig.ring.same(base, rig.ring.position()) {
        let base = rig.ring.show(base);
        return Ok(Outcome::fail(format!("a request that could not be made was taken, and the base is {base}")));
    }
    rig.release()?;
    rig.start()?;
    rig.finish()?;
    Ok(Outcome::pass("the request was not taken; it was served when the ring went on"))
}

/// Messages that are to be refused. What they say of addresses in use is wrong.
fn refusals(rig: &Rig) -> Vec<(String, IotlbMsg)> {
    let in_use = IotlbMsg { iova: HIGH, size: SLOT, perm: VHOST_ACCESS_RW, ..IotlbMsg::new_zeroed() };
    let user = rig.memory.regions().first().map_or(0, |region| region.user_addr());
    // Regions may be neighbours there.
    let end = rig.memory.regions().iter().map(|region| region.user_addr() + region.size()).max().unwrap_or_default();
    let (update, invalidate) = (VHOST_IOTLB_UPDATE, VHOST_IOTLB_INVALIDATE);
    let mut messages: Vec<_> = [0, VHOST_IOTLB_MISS, VHOST_IOTLB_ACCESS_FAIL, u8::MAX]
        .map(|kind| (format!("kind {kind}"), IotlbMsg { uaddr: user, kind, ..in_use }))
        .into();
    let bad = [
        ("an update of no bytes", IotlbMsg { uaddr: user, size: 0, kind: update, ..in_use }),
        ("an update that wraps", IotlbMsg { uaddr: user, size: u64::MAX, kind: update, ..in_use }),
        ("an update to where there is no memory", IotlbMsg { uaddr: u64::MAX - SLOT, kind: update, ..in_use }),
        ("an update beyond the end of memory", IotlbMsg { uaddr: end - LOG_PAGE, kind: update, ..in_use }),
        ("an invalidation of no bytes", IotlbMsg { size: 0, kind: invalidate, ..in_use }),
        ("an invalidation that wraps", IotlbMsg { size: u64::MAX, kind: invalidate, ..in_use }),
    ];
    messages.extend(bad.map(|(name, message)| (name.to_string(), message)));
    messages
}

fn impossible(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    bench.offer.need(protocol_feature::REPLY_ACK)?;
    let sizes = [Size::Mixed; 2];
    let expected = expected(bench, &sizes)?;
    let mut rig = bench.behind(0, Scatter::Rings, 1)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let messages = refusals(&rig);
    let mut taken = Vec::new();
    for (name, message) in &messages {
        let answer = rig.link.acknowledged(Code::IOTLB_MSG, message.as_bytes(), &[]);
        match answer.and_then(|answer| rig.link.barrier().map(|_| answer)) {
            Ok(0) => taken.push(name.as_str()),
            Ok(_) => {}
            Err(fault) => return Ok(Outcome::fail(format!("{name}: {fault}"))),
        }
    }
    let says = match taken.is_empty() {
        true => "all refused".into(),
        false => format!("acknowledged as done: {}", taken.join(", ")),
    };
    if let Err(fault) = rig.load(SLOTS, Size::Mixed) {
        return Ok(Outcome::fail(format!("{says}; then {fault}")));
    }
    Ok(match (wrong(&rig, &expected)?, taken.len()) {
        (0, 0) => Outcome::pass(format!("{} messages, {says}", messages.len())),
        (0, _) => Outcome::warning(format!("{says}; they changed nothing")),
        (pages, _) => Outcome::fail(format!("{says}; {pages} pages then held other data")),
    })
}

/// Pages of the first half of every slot, and those of the second in whose place they go.
fn halves() -> Vec<(u64, u64)> {
    let half = SLOT / 2 / LOG_PAGE;
    let firsts = (0..SLOTS).flat_map(|slot| pages(HIGH + slot * SLOT, SLOT / 2));
    firsts.map(|page| (page, page + half)).collect()
}

/// One request per slot, in its first half.
fn add_halves(rig: &mut Rig) -> Result<(), Fault> {
    (0..SLOTS).try_for_each(|slot| rig.add_at(slot as usize, HIGH + slot * SLOT, SLOT / 2))
}

fn moved(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    let mut rig = bench.behind(0, Scatter::Rings, 1)?;
    rig.start()?;
    let (halves, mut open) = (halves(), 0);
    for round in 1..=MOVES {
        add_halves(&mut rig)?;
        rig.publish();
        if round % 2 == 0 {
            // With the first one complete, the others are under way.
            let deadline = rig.deadline(rig.timeout);
            while !rig.pop()? && !deadline.is_over() {
                rig.feed()?;
                thread::yield_now();
            }
        }
        open += u64::from(rig.outstanding());
        let old: Pages = rig.places(halves.iter().map(|(page, _)| *page)).collect();
        rig.trade(halves.iter().copied())?;
        rig.invalidate(HIGH, SLOTS * SLOT)?;
        // What is in the old places stays so: data where a request is complete, else what its buffer was filled with.
        let left = rig.hashes_of(&old)?;
        rig.look_again()?;
        rig.finish()?;
        rig.link.barrier()?;
        let late = changed(&left, &rig.hashes_of(&old)?).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("round {round}: {late} pages were written where they had been before")));
        }
        for page in &old {
            rig.memory.write(page * LOG_PAGE, &noise(round * 1_000_000 + page, LOG_PAGE as u32))?;
        }
        let left = rig.hashes_of(&old)?;
        add_halves(&mut rig)?;
        rig.publish();
        rig.finish()?;
        rig.link.barrier()?;
        let stale = changed(&left, &rig.hashes_of(&old)?).len();
        if stale > 0 {
            return Ok(Outcome::fail(format!(
                "round {round}: of requests that came after the answer, {stale} pages were written to the old place"
            )));
        }
    }
    rig.stop()?;
    rig.iommu()?.misses()?;
    let pages = halves.len();
    Ok(Outcome::pass(format!("{MOVES} times {pages} pages, {open} requests were not seen complete before")))
}

fn ring_moved(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    let mut rig = bench.behind(0, Scatter::Rings, 1)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let room = rig.ring.room();
    for round in 1..=RING_MOVES {
        let there: Vec<(u64, u64)> = pages(room, RING).zip(pages(NOWHERE, RING)).collect();
        let old: Pages = rig.places(there.iter().map(|(page, _)| *page)).collect();
        // Where it goes nobody has copied anything yet.
        rig.iommu()?.hold(there.iter().map(|(page, _)| *page));
        rig.trade(there)?;
        rig.invalidate(room, RING)?;
        rig.look_again()?;
        let mut contents = vec![0; RING as usize];
        rig.view().read(NOWHERE, &mut contents)?;
        rig.view().write(room, &contents)?;
        rig.view().write(NOWHERE, &noise(u64::from(round), RING as u32))?;
        let view = rig.view().clone();
        rig.ring.follow(&view)?;
        let left = rig.hashes_of(&old)?;
        rig.release()?;
        rig.load(SLOTS, Size::Mixed).map_err(|fault| Fault::Breach(format!("move {round}: {fault}")))?;
        rig.link.barrier()?;
        let late = changed(&left, &rig.hashes_of(&old)?).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("move {round}: {late} pages were written where the ring had been")));
        }
    }
    let base = rig.stop()?;
    Ok(match rig.ring.same(base, rig.ring.end()) {
        true => Outcome::pass(format!("{RING_MOVES} moves, {SLOTS} requests after each")),
        false => Outcome::fail(format!("after {RING_MOVES} moves it says {}", rig.ring.show(base))),
    })
}

fn offered(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    Ok(Outcome::not_tested("it is offered; whether it was asked to can't be seen"))
}

fn marked(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need_iommu()?;
    let packed = bench.shape.packed;
    let mut rig = bench.behind(bit(VIRTIO_RING_F_EVENT_IDX), Scatter::Rings, 1)?;
    rig.start()?;
    let log = rig.install_log()?;
    // The device's area is logged under other addresses of the driver's, as in the check of rule L3.3.
    let at = NOWHERE + LOG_PAGE - 4;
    rig.log_on(at)?;
    let [_, _, device_bytes] = rig.ring.bytes();
    let logged: Pages = rig.places(pages(at, device_bytes)).collect();
    let event = |rig: &Rig| {
        let mut event = [0; 4];
        rig.view().read(rig.ring.device_at(), &mut event).map(|()| event)
    };
    let idle = event(&rig)?;
    rig.add(SLOTS, Size::Mixed)?;
    let before = rig.hashes()?;
    rig.publish();
    let from = rig.ring.position().packed_used();
    rig.finish()?;
    rig.stop()?;
    let marked = harvest(&log);
    let lost = if !packed {
        let iommu = rig.iommu()?;
        missing(&marked, at, |page| iommu.place(page))
    } else if rig.places(rig.ring.completed_pages(from)).any(|page| !marked.contains(&page)) {
        "used descriptors".into()
    } else if event(&rig)? != idle && !logged.is_subset(&marked) {
        "the event area".into()
    } else {
        String::new()
    };
    if !lost.is_empty() {
        return Ok(Outcome::fail(format!("{lost} not marked where the IOMMU has them")));
    }
    let Outcome(verdict, found) = Marks::of(&rig, &before, marked)?.allow(rig.used_ring()).allow(logged).judge();
    let ring = if packed { "used descriptors and events" } else { "the used ring" };
    Ok(match verdict {
        Verdict::Fail => Outcome::fail(found),
        _ => Outcome(verdict, format!("{ring} and data: {found}")),
    })
}
