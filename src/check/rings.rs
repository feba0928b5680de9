//! Rules R1 to R5 and R9: start, stop and position of rings.

use std::thread;

use zerocopy::IntoBytes;

use super::harness::{MAX_REQUESTS, RequestSize, wait_until};
use super::log::MarkComparison;
use super::negotiation::BackendFeatures;
use super::options::FrameSource;
use super::outcome::{CheckAbort, Outcome};
use super::pages::{changed, harvest};
use super::ring_variant::Flow;
use super::target::Target;
use crate::abi::vhost_user::{FrontendRequest as Code, ProtocolFeatures, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::abi::virtio::VirtioFeatures;

/// Number of drains. A request may complete before the message arrives.
const DRAINS: u32 = 20;

pub(super) fn unoffered_features(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::REPLY_ACK)?;
    let harness = target.harness(VirtioFeatures::empty())?;
    let Some(number) = (!target.offered.features.bits()).checked_ilog2() else {
        return Ok(Outcome::not_tested("all 64 are offered"));
    };
    let features = harness.features | VirtioFeatures::from_bits_retain(1 << number);
    let answer = harness.connection.request_ack(Code::SET_FEATURES, features.as_bytes(), &[])?;
    Ok(match answer {
        0 => Outcome::warning(format!("bit {number} was not offered and was acknowledged as done")),
        _ => Outcome::pass(format!("bit {number} was refused")),
    })
}

pub(super) fn without_protocol_features(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if !target.offered.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        return Ok(Outcome::not_tested("bit 30 is not offered: every check is run without it"));
    }
    let mut harness = target.harness(VirtioFeatures::empty())?;
    let without = !VHOST_USER_F_PROTOCOL_FEATURES;
    harness.offered = BackendFeatures {
        features: harness.offered.features & without,
        protocol: ProtocolFeatures::empty(),
        queues: 1,
    };
    harness.features &= without;
    harness.reconnect(target.connect()?)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let (base, expected) = (harness.stop()?, harness.ring.end_base());
    Ok(match harness.ring.is_same_base(base, expected) {
        true => Outcome::pass(format!("{MAX_REQUESTS} requests without SET_VRING_ENABLE and protocol features")),
        false => Outcome::fail(format!("the base is {} after {MAX_REQUESTS} requests", harness.ring.format_base(base))),
    })
}

pub(super) fn disabled_ring(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.harness(VirtioFeatures::empty())?;
    if !target.offered.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        return Err(CheckAbort::NotOffered("disabling a ring (PROTOCOL_FEATURES)".into()));
    }
    harness.add(4, RequestSize::Mixed)?;
    harness.publish();
    let before = harness.hashes()?;
    harness.start_disabled(None)?;
    harness.kick();
    harness.wait_quiet();
    let touched = changed(&before, &harness.hashes()?);
    Ok(match (touched.len(), harness.pop_all()?) {
        (0, _) => Outcome::pass(format!("4 requests waited for {:?}", harness.settle)),
        // The specification wants packets on a disabled transmit ring discarded (rule R2.4).
        (_, used) if target.variant.flow == Flow::Transmit => Outcome::warning(format!(
            "{used} of 4 packets were discarded, as the specification wants; their used entries are written \
         without a log"
        )),
        (pages, used) => Outcome::fail(format!("{used} of 4 requests were served, {pages} pages written")),
    })
}

pub(super) fn enabled_ring(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.harness(VirtioFeatures::empty())?;
    harness.add(4, RequestSize::Mixed)?;
    // Published before there is a kick fd.
    let _ = harness.ring.driver.publish();
    harness.inject_frames()?;
    harness.start_disabled(None)?;
    harness.enable(true)?;
    if !wait_until(&harness.deadline(harness.short_wait()), || harness.pop())? {
        harness.kick();
        harness.finish()?;
        return Ok(Outcome::warning("only after another kick, as in an older specification"));
    }
    harness.finish()?;
    Ok(Outcome::pass("4 requests, without another kick"))
}

pub(super) fn drain(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if target.variant.flow == Flow::Receive
        && let Some(late) = late_frames(target)?
    {
        return Ok(Outcome::fail(late));
    }
    let mut in_flight = 0;
    for round in 1..=DRAINS {
        let mut harness = target.started(VirtioFeatures::empty())?;
        harness.add(MAX_REQUESTS, RequestSize::Large)?;
        harness.publish();
        if round % 2 == 0 {
            // With the first request complete, the others are in progress.
            let deadline = harness.deadline(harness.timeout);
            while !harness.pop()? && !deadline.is_over() {
                thread::yield_now();
            }
        }
        let base = harness.stop()?;
        harness.ring.ack_call();
        let before = harness.hashes()?;
        harness.pop_all()?;
        if !harness.ring.is_same_base(base, harness.ring.current_base()) {
            let (lost, used) = (harness.ring.in_flight_at(base), harness.ring.format_base(harness.ring.current_base()));
            let lost = lost.map_or("a number of".into(), |lost| lost.to_string());
            let base = harness.ring.format_base(base);
            harness.wait_quiet();
            let late = changed(&before, &harness.hashes()?).len();
            return Ok(Outcome::fail(format!(
                "round {round}: the base is {base}, but requests are published up to {used}; {lost} were not \
         drained, and {late} pages changed later"
            )));
        }
        in_flight += MAX_REQUESTS - u64::from(harness.outstanding());
        // Wait in two rounds only: I/O that was not drained completes soon or never.
        if round == 1 || round == DRAINS {
            harness.wait_quiet();
        }
        let late = changed(&before, &harness.hashes()?).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("round {round}: {late} pages changed after the reply")));
        }
        if harness.ring.ack_call() {
            return Ok(Outcome::fail(format!("round {round}: it notified after the reply")));
        }
    }
    Ok(match in_flight {
        0 => Outcome::warning(format!("in {DRAINS} rounds no request was accepted before the ring was stopped")),
        taken => {
            Outcome::pass(format!("{taken} requests accepted and published in {DRAINS} rounds; no page changed later"))
        }
    })
}

/// Checks a ring that is stopped with free buffers, for frames that arrive after it. Returns a description of a
/// violation.
fn late_frames(target: &Target) -> Result<Option<String>, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    // A received frame shows that the ring runs: GET_VRING_BASE may be processed before the first kick.
    harness.add(1, RequestSize::Large)?;
    harness.serve()?;
    harness.add(MAX_REQUESTS, RequestSize::Large)?;
    harness.ring.publish();
    // Frames of earlier connections use the first buffers.
    let deadline = harness.deadline(harness.timeout);
    while wait_until(&harness.deadline(harness.settle), || harness.pop())? && !deadline.is_over() {
        harness.add(MAX_REQUESTS - u64::from(harness.outstanding()), RequestSize::Large)?;
        harness.ring.publish();
    }
    let base = harness.stop_first_ring()?;
    let before = harness.hashes()?;
    harness.pop_all()?;
    if !harness.ring.is_same_base(base, harness.ring.current_base()) {
        let (base, used) = (harness.ring.format_base(base), harness.ring.format_base(harness.ring.current_base()));
        return Ok(Some(format!("free buffers: the base is {base}, but buffers are used up to {used}")));
    }
    harness.inject_frames()?;
    harness.wait_quiet();
    let written = changed(&before, &harness.hashes()?).intersection(&harness.writable_pages).count();
    let late = harness.pop_all()?;
    Ok((late > 0 || written > 0).then(|| {
        format!("frames after the reply: {late} buffers were used, and {written} of their pages were written")
    }))
}

pub(super) fn drain_all_rings(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let rings = target.max_rings();
    if rings < 2 {
        return Ok(Outcome::not_tested("the device has one ring"));
    }
    if target.variant.flow == Flow::Receive && target.frame_source != Some(FrameSource::Loop) {
        return Ok(Outcome::not_tested("the ring on which a frame arrives cannot be chosen"));
    }
    let mut harness = target.harness_with_rings(VirtioFeatures::empty(), rings)?;
    harness.start()?;
    let log = match harness.install_log() {
        Err(CheckAbort::NotOffered(_)) => None,
        log => Some(log?),
    };
    if log.is_some() {
        harness.enable_logging(harness.ring.device_area())?;
    }
    harness.add(MAX_REQUESTS, RequestSize::Large)?;
    let before = harness.hashes()?;
    harness.serve()?;
    // The last mark of a used ring may follow the last completion, but precedes this reply (rule R3.2).
    harness.stop()?;
    let found = match &log {
        None => Outcome::pass("no log"),
        Some(log) => {
            let marked = harvest(log);
            let ring = &changed(&before, &harness.hashes()?) & &harness.request_device_pages();
            match ring.difference(&marked).count() {
                0 => MarkComparison::of(&harness, &before, marked)?.outcome(),
                missed => Outcome::fail(format!("{missed} written pages of the rings are not marked")),
            }
        }
    };
    harness.start()?;
    harness.add(MAX_REQUESTS, RequestSize::Large)?;
    harness.publish();
    harness.stop()?;
    let before = harness.hashes()?;
    let taken = harness.pop_all()?;
    if let Some(queue) = harness.rings().find(|queue| !queue.is_same_base(queue.base, queue.current_base())) {
        let (index, base, at) = (queue.index, queue.format_base(queue.base), queue.format_base(queue.current_base()));
        return Ok(Outcome::fail(format!("the base of ring {index} is {base}, but requests are published up to {at}")));
    }
    harness.wait_quiet();
    let late = changed(&before, &harness.hashes()?).len();
    let Outcome(verdict, found) = found;
    Ok(match late {
        0 => Outcome(
            verdict,
            format!("{rings} rings: {found}; {taken} of {MAX_REQUESTS} requests accepted, all published"),
        ),
        pages => Outcome::fail(format!("{rings} rings: {pages} pages changed after all rings were stopped")),
    })
}

pub(super) fn continue_at_base(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.harness(VirtioFeatures::empty())?;
    // Indices of split rings wrap at 2^16, those of packed rings at the ring size.
    let from = if target.variant.packed { harness.ring.layout.size() - 6 } else { 65530 };
    harness.move_to(from)?;
    let from = harness.ring.format_base(harness.ring.base);
    for _ in 0..2 {
        harness.start()?;
        harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
        let (base, expected) = (harness.stop()?, harness.ring.end_base());
        if !harness.ring.is_same_base(base, expected) {
            let (base, expected) = (harness.ring.format_base(base), harness.ring.format_base(expected));
            return Ok(Outcome::fail(format!(
                "the base is {base} instead of {expected} after {MAX_REQUESTS} requests"
            )));
        }
    }
    Ok(Outcome::pass(format!("from {from} to {} with a stop in between", harness.ring.format_base(harness.ring.base))))
}

pub(super) fn set_vring_addr(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    let rounds = 5;
    for _ in 0..rounds {
        harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
        harness.publish();
        harness.set_ring_logging(None)?;
        harness.finish()?;
    }
    let (base, expected, made) = (harness.stop()?, harness.ring.end_base(), rounds * MAX_REQUESTS);
    Ok(match harness.ring.is_same_base(base, expected) {
        true => Outcome::pass(format!("{made} requests completed once each, with {rounds} SET_VRING_ADDR")),
        false => Outcome::fail(format!("the base is {} after {made} requests", harness.ring.format_base(base))),
    })
}

pub(super) fn next_front_end(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut seen = Vec::new();
    for _ in 0..3 {
        let mut harness = target.started(VirtioFeatures::empty())?;
        harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
        let data: Vec<(u64, u64)> =
            harness.hashes()?.into_iter().filter(|(page, _)| harness.writable_pages.contains(page)).collect();
        seen.push(data);
        // Left in flight: they must not affect the next front-end.
        harness.add(MAX_REQUESTS, RequestSize::Large)?;
        harness.publish();
    }
    seen.dedup();
    Ok(match seen.len() {
        _ if target.device.has_requests() && !target.device.is_stable() => {
            Outcome::pass("3 front-ends, each disconnected with requests in flight; the device has no stable data")
        }
        1 => Outcome::pass("3 front-ends, each disconnected with requests in flight"),
        _ => Outcome::fail("the same requests returned other data to the next front-end"),
    })
}
