//! Rules R6 to R8 and R10: orders in which front-ends start and stop rings, and resets.

use std::os::fd::AsFd;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::connection::readable;
use super::harness::{Harness, RequestSize, wait_until};
use super::inflight::TrackedRegion;
use super::outcome::{CheckAbort, Outcome};
use super::pages::changed;
use super::ring_variant::Flow;
use super::target::Target;
use crate::abi::vhost_user::{
    FrontendRequest as Code, Header, ProtocolFeatures, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VringAddr,
};
use crate::abi::virtio::VirtioFeatures;
use crate::dirty::Log;

/// Returns a guest with pending requests, on a new connection with only features negotiated.
fn unstarted_harness(target: &Target, requests: u64) -> Result<Harness, CheckAbort> {
    let mut harness = target.harness(VirtioFeatures::empty())?;
    harness.forget_session();
    harness.add(requests, RequestSize::Mixed)?;
    harness.publish();
    harness.connection = target.connect()?;
    harness.negotiate()?;
    Ok(harness)
}

pub(super) fn qemu_start_order(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = unstarted_harness(target, 4)?;
    let mut seen = "4 requests".to_string();
    if target.offered.has_protocol(ProtocolFeatures::INFLIGHT_SHMFD) {
        TrackedRegion::get_inflight_fd(&harness)?.set_inflight_fd(&harness)?;
        seen += ", the inflight region before the memory table";
    }
    for queue in harness.all() {
        harness.send_acked(Code::SET_VRING_CALL, u64::from(queue.index).as_bytes(), &[queue.call.as_fd()])?;
    }
    let logs = target.offered.has_protocol(ProtocolFeatures::LOG_SHMFD) && target.offered.has(VHOST_F_LOG_ALL);
    harness.set_log_all(logs)?;
    harness.send_memory()?;
    for queue in harness.all() {
        harness.start_without_call(queue, logs.then(|| queue.device_area()))?;
    }
    if logs {
        let (log, fd) = Log::create(harness.memory.end())?;
        harness.send_log(&fd, log.size(), 0)?;
        seen += ", the log after the kick fd";
    }
    harness.enable(true)?;
    harness.kick();
    harness.finish()?;
    harness.enable(false)?;
    let base = harness.stop()?;
    Ok(match harness.ring.is_same_base(base, harness.ring.end_base()) {
        true => Outcome::pass(seen),
        false => Outcome::fail(format!("{seen}; the base is then {}", harness.ring.format_base(base))),
    })
}

pub(super) fn uml_start_order(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if !target.offered.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        return Err(CheckAbort::NotOffered("disabling a ring (PROTOCOL_FEATURES)".into()));
    }
    let mut harness = unstarted_harness(target, 4)?;
    harness.send_memory()?;
    for queue in harness.all() {
        let index = u64::from(queue.index);
        harness.send_acked(Code::SET_VRING_CALL, index.as_bytes(), &[queue.call.as_fd()])?;
        harness.start_without_call(queue, None)?;
        let addr = VringAddr { log_guest_addr: u64::MAX, ..harness.vring_addr(queue, None) };
        harness.send_acked(Code::SET_VRING_ADDR, addr.as_bytes(), &[])?;
    }
    harness.enable(true)?;
    harness.kick();
    harness.finish()?;
    // UML stops rings so, without GET_VRING_BASE.
    harness.enable(false)?;
    harness.connection.barrier()?;
    let outcome = run_disabled(&mut harness)?;
    harness.enable(true)?;
    harness.kick();
    harness.finish()?;
    Ok(outcome.unwrap_or_else(|discarded| disabled_outcome(target, discarded)))
}

/// Adds 4 requests on a ring that is not enabled. Returns `Err` with the number that was served. Only data pages count,
/// because the event word may be written late.
fn run_disabled(harness: &mut Harness) -> Result<Result<Outcome, u64>, CheckAbort> {
    harness.add(4, RequestSize::Mixed)?;
    harness.publish();
    let before = harness.hashes()?;
    harness.kick();
    harness.wait_quiet();
    let mut touched = changed(&before, &harness.hashes()?);
    touched.retain(|page| harness.writable_pages.contains(page));
    Ok(match (harness.pop_all()?, touched.len()) {
        (0, 0) => {
            Ok(Outcome::pass("4 requests served; 4 more waited while the ring was disabled and were then served"))
        }
        (served, pages) => Err(served.max(u64::from(pages > 0))),
    })
}

fn disabled_outcome(target: &Target, served: u64) -> Outcome {
    match target.variant.flow {
        // The specification wants packets on a disabled transmit ring discarded (rule R2.4).
        Flow::Transmit => Outcome::warning(format!("{served} packets were discarded while the ring was disabled")),
        _ => Outcome::fail(format!("{served} of 4 requests were served while the ring was disabled")),
    }
}

pub(super) fn reset_owner(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    harness.run_batch(4, RequestSize::Mixed)?;
    harness.connection.send(Code::RESET_OWNER, Header::FLAG_VERSION, &[], &[])?;
    harness.connection.barrier()?;
    harness.negotiate()?;
    start_again(&mut harness)?;
    Ok(Outcome::pass("rings started again on the same connection are served"))
}

/// Starts the rings again on the same connection at their current positions, and completes pending and new requests.
fn start_again(harness: &mut Harness) -> Result<(), CheckAbort> {
    harness.send_memory()?;
    // A reset need not stop the rings.
    harness.stop()?;
    harness.use_current_bases();
    harness.start()?;
    harness.finish()?;
    harness.run_batch(4, RequestSize::Mixed)
}

pub(super) fn reset_device(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::RESET_DEVICE)?;
    reset(target, |harness| harness.connection.send(Code::RESET_DEVICE, Header::FLAG_VERSION, &[], &[]))
}

pub(super) fn reset_status(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::STATUS)?;
    reset(target, |harness| harness.send_acked(Code::SET_STATUS, 0u64.as_bytes(), &[]))
}

fn reset(target: &mut Target, send: impl FnOnce(&Harness) -> Result<(), CheckAbort>) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    harness.run_batch(4, RequestSize::Mixed)?;
    send(&harness)?;
    harness.connection.barrier()?;
    harness.forget_session();
    let outcome = run_disabled(&mut harness)?;
    // The owner is still set.
    harness.negotiate_features()?;
    start_again(&mut harness)?;
    Ok(match outcome {
        Ok(_) => Outcome::pass("4 requests waited until the rings were started again"),
        Err(served) => Outcome::fail(format!("{served} of 4 requests were served after the reset")),
    })
}

/// Number of attempts. A back-end that publishes before it reads the call fd may see a late one in time by chance.
const LATE_CALLS: usize = 5;

pub(super) fn late_call_fd(target: &mut Target) -> Result<Outcome, CheckAbort> {
    for _ in 0..LATE_CALLS {
        let mut harness = target.harness(VirtioFeatures::empty())?;
        for queue in harness.all() {
            if queue.index != harness.ring.index {
                harness.send_acked(Code::SET_VRING_CALL, u64::from(queue.index).as_bytes(), &[queue.call.as_fd()])?;
            }
            harness.start_without_call(queue, None)?;
        }
        harness.enable(true)?;
        harness.add(4, RequestSize::Mixed)?;
        harness.publish();
        harness.kick();
        let done = wait_until(&harness.deadline(harness.short_wait()), || {
            harness.pop_all().map(|_| harness.outstanding() == 0)
        })?;
        // The back-end may have published the last element and not yet read the call fd.
        std::thread::sleep(Duration::from_millis(20));
        harness.send_acked(
            Code::SET_VRING_CALL,
            u64::from(harness.ring.index).as_bytes(),
            &[harness.ring.call.as_fd()],
        )?;
        if !done {
            harness.finish()?;
            return Ok(Outcome::pass("requests were completed and signalled once there was a call fd"));
        }
        if !readable(&[harness.ring.call.as_fd()], &harness.deadline(harness.short_wait())) {
            return Ok(Outcome::fail(
                "4 requests were completed before, and the new fd was not signalled: the driver waits forever",
            ));
        }
    }
    Ok(Outcome::pass(format!("4 requests were completed before, and the new fd was signalled, {LATE_CALLS} times")))
}
