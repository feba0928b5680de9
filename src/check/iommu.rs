//! Rules T1 to T5 and L5: the device behind an IOMMU, without translations at first.
//!
//! Each I/O virtual page is mapped to another guest-physical page, so an untranslated access reads or writes the wrong
//! page. Data is compared with reads without an IOMMU, and every page of guest memory with its old contents.

use std::thread;

use zerocopy::{FromZeros, IntoBytes};

use super::harness::{HIGH, Harness, MAX_REQUESTS, RequestSize, SLOT_BYTES, Scatter, UNUSED_AREA, wait_until};
use super::log::{MarkComparison, missing_marks};
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::pages::{Pages, changed, harvest, noise, pages};
use super::queue::RING_SLOT_BYTES;
use super::ring_variant::Flow;
use super::target::Target;
use crate::abi::vhost::{
    VHOST_ACCESS_RO, VHOST_ACCESS_RW, VHOST_ACCESS_WO, VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_INVALIDATE,
    VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE,
};
use crate::abi::vhost_user::{FrontendRequest as Code, IotlbMsg, ProtocolFeatures};
use crate::abi::virtio::{VIRTIO_RING_F_EVENT_IDX, VirtioFeatures};
use crate::memory::{Address, GuestAddress, Iova, LOG_PAGE};
use crate::sys::with_causes::with_causes;

/// Number of moves of data under load.
const MOVES: u64 = 8;
/// Number of moves of a ring.
const RING_MOVES: u32 = 4;
/// Number of batches that wrap around a ring of the default size, 256.
const BATCHES: usize = 16;

/// Runs batches of requests one after the other.
fn run_batches(harness: &mut Harness, sizes: &[RequestSize]) -> Result<(), CheckAbort> {
    sizes.iter().try_for_each(|size| harness.run_batch(MAX_REQUESTS, *size))
}

/// Returns hashes of the data that a disk reads without an IOMMU. Frames carry a checksum of their own.
fn expected_data(target: &Target, sizes: &[RequestSize]) -> Result<Vec<(u64, u64)>, CheckAbort> {
    if !target.device.is_stable() {
        return Ok(Vec::new());
    }
    let mut harness = target.started(VirtioFeatures::empty())?;
    run_batches(&mut harness, sizes)?;
    data_hashes(&harness)
}

/// Returns hashes of all data pages, by I/O virtual page.
fn data_hashes(harness: &Harness) -> Result<Vec<(u64, u64)>, CheckAbort> {
    Ok(harness.driver_view_hashes()?.into_iter().filter(|(page, _)| *page >= HIGH.0 / LOG_PAGE).collect())
}

/// Returns the number of pages with unexpected contents.
fn wrong_pages(harness: &Harness, expected: &[(u64, u64)]) -> Result<usize, CheckAbort> {
    Ok(changed(expected, &data_hashes(harness)?).len())
}

pub(super) fn translations(target: &mut Target) -> Result<Outcome, CheckAbort> {
    served(target, Scatter::Rings)
}

pub(super) fn scattered_ring(target: &mut Target) -> Result<Outcome, CheckAbort> {
    served(target, Scatter::Pages)
}

fn served(target: &Target, scatter: Scatter) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    let mut sizes = [RequestSize::Mixed; BATCHES];
    sizes.iter_mut().step_by(4).for_each(|size| *size = RequestSize::Large);
    let expected = expected_data(target, &sizes)?;
    let mut harness = target.harness_behind_iommu(VirtioFeatures::empty(), scatter, 1)?;
    let before = harness.hashes()?;
    harness.start()?;
    run_batches(&mut harness, &sizes)?;
    let base = harness.stop()?;
    let (own, used) = (harness.driver_pages(), harness.device_pages());
    let mut stray = changed(&before, &harness.hashes()?);
    stray.retain(|page| !own.contains(page) && !used.contains(page) && !harness.writable_pages.contains(page));
    // The driver has written the frames to transmit.
    let stray = if target.variant.flow == Flow::Transmit { 0 } else { stray.len() };
    let (wrong, misses) = (wrong_pages(&harness, &expected)?, harness.iommu()?.misses()?);
    let made = BATCHES as u64 * MAX_REQUESTS;
    let same = harness.ring.is_same_base(base, harness.ring.end_base());
    Ok(match (stray, wrong, misses, same) {
        (0, 0, 1.., true) => Outcome::pass(format!("{made} requests, {misses} translation misses")),
        (0, 0, 0, _) => Outcome::fail(format!("{made} requests without a translation miss")),
        (0, 0, _, false) => {
            Outcome::fail(format!("the base is {} after {made} requests", harness.ring.format_base(base)))
        }
        _ => Outcome::fail(format!(
            "{made} requests: {wrong} pages differ from those without an IOMMU, {stray} pages outside the \
         buffers were written"
        )),
    })
}

/// Returns a data page of a slot that no batch uses, as I/O virtual address.
fn unused_page(slot: u64, number: u64) -> GuestAddress {
    HIGH.unchecked_add(slot * SLOT_BYTES + SLOT_BYTES / 2 + number * LOG_PAGE)
}

/// Waits until the device has requested a translation of the page.
fn wait_for_miss(harness: &mut Harness, iova: Iova) -> Result<bool, CheckAbort> {
    wait_until(&harness.deadline(harness.timeout), || {
        harness.inject_frames()?;
        Ok(harness.iommu()?.asked(iova.0 / LOG_PAGE) > 0)
    })
}

pub(super) fn denied_pages(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    // The ring on which a frame arrives cannot be chosen.
    let rings = if target.variant.flow == Flow::Receive { 1 } else { target.max_rings().min(2) };
    let mut harness = target.harness_behind_iommu(VirtioFeatures::empty(), Scatter::Rings, rings)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let too_little = if target.variant.flow == Flow::Transmit { VHOST_ACCESS_WO } else { VHOST_ACCESS_RO };
    for (number, permission) in (0..).zip([0, too_little]) {
        let buffer = unused_page(0, number);
        let iova = Iova(buffer.0);
        let page = iova.0 / LOG_PAGE;
        harness.iommu()?.permit(page, permission);
        harness.add_at(0, buffer, LOG_PAGE)?;
        let others = rings as u16 - 1;
        if others > 0 {
            harness.add_at(1, unused_page(1, number), LOG_PAGE)?;
        }
        let place: Pages = harness.guest_pages([page].into_iter()).collect();
        let before = harness.hashes()?;
        harness.publish();
        if !wait_for_miss(&mut harness, iova)? {
            return Ok(Outcome::fail(format!("no translation miss for the page at {iova:#x}")));
        }
        let with = format!("with permission {permission}");
        if !wait_until(&harness.deadline(harness.timeout), || harness.pop_all().map(|_| harness.outstanding() <= 1))? {
            return Ok(Outcome::fail(format!("{with}: a request of another ring was not served")));
        }
        harness.connection.barrier()?;
        let base = harness.stop()?;
        harness.pop_all()?;
        if harness.outstanding() != 1 || !harness.ring.is_same_base(base, harness.ring.current_base()) {
            let base = harness.ring.format_base(base);
            return Ok(Outcome::fail(format!("{with}: the request was accepted anyway; the base is {base}")));
        }
        if !changed(&before, &harness.hashes()?).is_disjoint(&place) {
            return Ok(Outcome::fail(format!("{with}: the page was written")));
        }
        harness.iommu()?.permit(page, VHOST_ACCESS_RW);
        harness.invalidate(iova, LOG_PAGE)?;
        harness.start()?;
        harness.finish()?;
    }
    let others = if rings > 1 { "another ring and the connection" } else { "the connection" };
    Ok(Outcome::pass(format!(
        "2 pages, unmapped or without permission; {others} continued, and the ring continued after a \
         permission"
    )))
}

pub(super) fn outstanding_translation(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    let mut harness = target.harness_behind_iommu(VirtioFeatures::empty(), Scatter::Rings, 1)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let buffer = unused_page(0, 0);
    let iova = Iova(buffer.0);
    harness.iommu()?.hold_answers([iova.0 / LOG_PAGE]);
    harness.add_at(0, buffer, LOG_PAGE)?;
    harness.publish();
    if !wait_for_miss(&mut harness, iova)? {
        return Ok(Outcome::fail(format!("no translation miss for the page at {iova:#x}")));
    }
    let base = harness.stop()?;
    harness.pop_all()?;
    if harness.outstanding() != 1 || !harness.ring.is_same_base(base, harness.ring.current_base()) {
        let base = harness.ring.format_base(base);
        return Ok(Outcome::fail(format!("a request without translation was accepted; the base is {base}")));
    }
    harness.release()?;
    harness.start()?;
    harness.finish()?;
    Ok(Outcome::pass("the request was not accepted; it was served after the ring was started again"))
}

/// Returns invalid messages about addresses in use.
fn invalid_messages(harness: &Harness) -> Vec<(String, IotlbMsg)> {
    let in_use = IotlbMsg { iova: HIGH.0, size: SLOT_BYTES, perm: VHOST_ACCESS_RW, ..IotlbMsg::new_zeroed() };
    let user = harness.memory.regions().first().map_or(0, |region| region.user_addr().0);
    // Regions may be adjacent in this address space.
    let end =
        harness.memory.regions().iter().map(|region| region.user_addr().0 + region.size()).max().unwrap_or_default();
    let (update, invalidate) = (VHOST_IOTLB_UPDATE, VHOST_IOTLB_INVALIDATE);
    let mut messages: Vec<_> = [0, VHOST_IOTLB_MISS, VHOST_IOTLB_ACCESS_FAIL, u8::MAX]
        .map(|kind| (format!("kind {kind}"), IotlbMsg { uaddr: user, kind, ..in_use }))
        .into();
    let bad = [
        ("an update of no bytes", IotlbMsg { uaddr: user, size: 0, kind: update, ..in_use }),
        ("an update that wraps", IotlbMsg { uaddr: user, size: u64::MAX, kind: update, ..in_use }),
        ("an update to an unmapped address", IotlbMsg { uaddr: u64::MAX - SLOT_BYTES, kind: update, ..in_use }),
        ("an update beyond the end of memory", IotlbMsg { uaddr: end - LOG_PAGE, kind: update, ..in_use }),
        ("an invalidation of no bytes", IotlbMsg { size: 0, kind: invalidate, ..in_use }),
        ("an invalidation that wraps", IotlbMsg { size: u64::MAX, kind: invalidate, ..in_use }),
    ];
    messages.extend(bad.map(|(name, message)| (name.to_string(), message)));
    messages
}

pub(super) fn invalid_iotlb_messages(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    target.offered.require_protocol(ProtocolFeatures::REPLY_ACK)?;
    let sizes = [RequestSize::Mixed; 2];
    let expected = expected_data(target, &sizes)?;
    let mut harness = target.harness_behind_iommu(VirtioFeatures::empty(), Scatter::Rings, 1)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let messages = invalid_messages(&harness);
    let mut taken = Vec::new();
    for (name, message) in &messages {
        let answer = harness.connection.request_ack(Code::IOTLB_MSG, message.as_bytes(), &[]);
        match answer.and_then(|answer| harness.connection.barrier().map(|_| answer)) {
            Ok(0) => taken.push(name.as_str()),
            Ok(_) => {}
            Err(abort) => return Ok(Outcome::fail(format!("{name}: {}", with_causes(&abort)))),
        }
    }
    let answers = match taken.is_empty() {
        true => "all refused".into(),
        false => format!("acknowledged as done: {}", taken.join(", ")),
    };
    if let Err(abort) = harness.run_batch(MAX_REQUESTS, RequestSize::Mixed) {
        return Ok(Outcome::fail(format!("{answers}; then {}", with_causes(&abort))));
    }
    Ok(match (wrong_pages(&harness, &expected)?, taken.len()) {
        (0, 0) => Outcome::pass(format!("{} messages, {answers}", messages.len())),
        (0, _) => Outcome::warning(format!("{answers}; they had no effect")),
        (pages, _) => Outcome::fail(format!("{answers}; {pages} pages then had other data")),
    })
}

/// Returns the pages of the first half of every slot, each with a page of the second half to swap with.
fn first_halves() -> Vec<(u64, u64)> {
    let half = SLOT_BYTES / 2 / LOG_PAGE;
    let firsts = (0..MAX_REQUESTS).flat_map(|slot| pages(HIGH.unchecked_add(slot * SLOT_BYTES), SLOT_BYTES / 2));
    firsts.map(|page| (page, page + half)).collect()
}

/// Adds one request per slot, in its first half.
fn add_first_halves(harness: &mut Harness) -> Result<(), CheckAbort> {
    (0..MAX_REQUESTS)
        .try_for_each(|slot| harness.add_at(slot as usize, HIGH.unchecked_add(slot * SLOT_BYTES), SLOT_BYTES / 2))
}

pub(super) fn moved_data(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    let mut harness = target.harness_behind_iommu(VirtioFeatures::empty(), Scatter::Rings, 1)?;
    harness.start()?;
    let (halves, mut open) = (first_halves(), 0);
    for round in 1..=MOVES {
        add_first_halves(&mut harness)?;
        harness.publish();
        if round % 2 == 0 {
            // With the first request complete, the others are in progress.
            let deadline = harness.deadline(harness.timeout);
            while !harness.pop()? && !deadline.is_over() {
                harness.inject_frames()?;
                thread::yield_now();
            }
        }
        open += u64::from(harness.outstanding());
        let old: Pages = harness.guest_pages(halves.iter().map(|(page, _)| *page)).collect();
        harness.swap_pages(halves.iter().copied())?;
        harness.invalidate(Iova(HIGH.0), MAX_REQUESTS * SLOT_BYTES)?;
        // The old pages must not change: they hold data of completed requests, or the initial contents of the buffers.
        let at_acknowledgement = harness.hashes_of(&old)?;
        harness.refresh_view()?;
        harness.finish()?;
        harness.connection.barrier()?;
        let late = changed(&at_acknowledgement, &harness.hashes_of(&old)?).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("round {round}: {late} pages were written at their old place")));
        }
        for page in &old {
            harness.memory.write(GuestAddress(page * LOG_PAGE), &noise(round * 1_000_000 + page, LOG_PAGE as u32))?;
        }
        let at_acknowledgement = harness.hashes_of(&old)?;
        add_first_halves(&mut harness)?;
        harness.serve()?;
        harness.connection.barrier()?;
        let stale = changed(&at_acknowledgement, &harness.hashes_of(&old)?).len();
        if stale > 0 {
            return Ok(Outcome::fail(format!(
                "round {round}: requests after the acknowledgement wrote {stale} pages at the old place"
            )));
        }
    }
    harness.stop()?;
    harness.iommu()?.misses()?;
    let pages = halves.len();
    Ok(Outcome::pass(format!("{MOVES} moves of {pages} pages, with {open} requests in flight in total")))
}

pub(super) fn moved_ring(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    let mut harness = target.harness_behind_iommu(VirtioFeatures::empty(), Scatter::Rings, 1)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let room = harness.ring.slot_address();
    for round in 1..=RING_MOVES {
        let there: Vec<(u64, u64)> = pages(room, RING_SLOT_BYTES).zip(pages(UNUSED_AREA, RING_SLOT_BYTES)).collect();
        let old: Pages = harness.guest_pages(there.iter().map(|(page, _)| *page)).collect();
        // The ring has not been copied to its new pages yet.
        harness.iommu()?.hold_answers(there.iter().map(|(page, _)| *page));
        harness.swap_pages(there)?;
        harness.invalidate(Iova(room.0), RING_SLOT_BYTES)?;
        harness.refresh_view()?;
        let mut contents = vec![0; RING_SLOT_BYTES as usize];
        harness.view().read(UNUSED_AREA, &mut contents)?;
        harness.view().write(room, &contents)?;
        harness.view().write(UNUSED_AREA, &noise(u64::from(round), RING_SLOT_BYTES as u32))?;
        let view = harness.view().clone();
        harness.ring.remap(&view)?;
        let at_acknowledgement = harness.hashes_of(&old)?;
        harness.release()?;
        harness
            .run_batch(MAX_REQUESTS, RequestSize::Mixed)
            .map_err(|abort| CheckAbort::Violation(format!("move {round}: {}", with_causes(&abort))))?;
        harness.connection.barrier()?;
        let late = changed(&at_acknowledgement, &harness.hashes_of(&old)?).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("move {round}: {late} pages were written at the ring's old place")));
        }
    }
    let base = harness.stop()?;
    Ok(match harness.ring.is_same_base(base, harness.ring.end_base()) {
        true => Outcome::pass(format!("{RING_MOVES} moves, {MAX_REQUESTS} requests after each")),
        false => Outcome::fail(format!("the base is {} after {RING_MOVES} moves", harness.ring.format_base(base))),
    })
}

pub(super) fn access_platform_offered(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    Ok(Outcome::not_tested("it is offered; whether it should be cannot be checked from outside"))
}

pub(super) fn guest_physical_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_iommu()?;
    let packed = target.variant.packed;
    let mut harness = target.harness_behind_iommu(VIRTIO_RING_F_EVENT_IDX, Scatter::Rings, 1)?;
    harness.start()?;
    let log = harness.install_log()?;
    // As in the check of rule L3.3, the device area is logged at another address.
    let at = UNUSED_AREA.unchecked_add(LOG_PAGE - 4);
    harness.enable_logging(at)?;
    let [_, _, device_bytes] = harness.ring.area_sizes();
    let logged: Pages = harness.guest_pages(pages(at, device_bytes)).collect();
    let event = |harness: &Harness| {
        let mut event = [0; 4];
        harness.view().read(harness.ring.device_area(), &mut event).map(|()| event)
    };
    let idle = event(&harness)?;
    harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
    let before = harness.hashes()?;
    harness.publish();
    let from = harness.ring.current_base().packed_used();
    harness.finish()?;
    harness.stop()?;
    let marked = harvest(&log);
    let lost = if !packed {
        let iommu = harness.iommu()?;
        missing_marks(&marked, at, |page| iommu.guest_page(page))
    } else if harness.guest_pages(harness.ring.completed_pages(from)).any(|page| !marked.contains(&page)) {
        "used descriptors".into()
    } else if event(&harness)? != idle && !logged.is_subset(&marked) {
        "the event area".into()
    } else {
        String::new()
    };
    if !lost.is_empty() {
        return Ok(Outcome::fail(format!("{lost} not marked at their translated addresses")));
    }
    let Outcome(verdict, found) = MarkComparison::of(&harness, &before, marked)?.allow(logged).outcome();
    let ring = if packed { "used descriptors and events" } else { "the used ring" };
    Ok(match verdict {
        Verdict::Fail => Outcome::fail(found),
        _ => Outcome(verdict, format!("{ring} and data: {found}")),
    })
}
