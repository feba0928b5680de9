//! Rules R6 to R8 and R10: the orders in which front-ends start rings and stop them, and resets.

use std::os::fd::AsFd;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::connection::readable;
use super::harness::{Rig, Size, changed, soon};
use super::inflight::Tracked;
use super::{Bench, Check, Fault, Flow, Outcome, When};
use crate::abi::vhost_user::{
    Header, Request as Code, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VringAddr, protocol_feature,
};
use crate::dirty::Log;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "R6", what: "a ring runs that is started in QEMU's order", when: When::Rings, run: like_qemu },
    Check {
        rule: "R7",
        what: "a ring runs that is started in UML's order, and rests when it is disabled",
        when: When::Rings,
        run: like_uml,
    },
    Check { rule: "R8", what: "RESET_OWNER does no harm", when: When::Once, run: reset_owner },
    Check {
        rule: "R8",
        what: "RESET_DEVICE disables rings, which can be started again",
        when: When::Rings,
        run: reset_device,
    },
    Check {
        rule: "R8",
        what: "SET_STATUS 0 disables rings, which can be started again",
        when: When::Rings,
        run: reset_status,
    },
    Check {
        rule: "R10",
        what: "what was completed without a call fd is notified over the next",
        when: When::Each,
        run: late_call,
    },
];

/// A guest with requests that wait, on a new connection where only features are agreed on.
fn fresh(bench: &Bench, requests: u64) -> Result<Rig, Fault> {
    let mut rig = bench.rig(0)?;
    rig.forget_session();
    rig.add(requests, Size::Mixed)?;
    rig.publish();
    rig.link = bench.connect()?;
    rig.hello()?;
    Ok(rig)
}

fn like_qemu(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = fresh(bench, 4)?;
    let mut seen = "4 requests".to_string();
    if bench.offer.speaks(protocol_feature::INFLIGHT_SHMFD) {
        Tracked::ask(&rig)?.install(&rig)?;
        seen += ", the inflight region before the memory table";
    }
    for queue in rig.all() {
        rig.done(Code::SET_VRING_CALL, u64::from(queue.index).as_bytes(), &[queue.call.as_fd()])?;
    }
    let logs = bench.offer.speaks(protocol_feature::LOG_SHMFD) && bench.offer.has(VHOST_F_LOG_ALL);
    rig.log_data(logs)?;
    rig.send_memory()?;
    for queue in rig.all() {
        rig.start_silent(queue, logs.then(|| queue.device_at()))?;
    }
    if logs {
        let (log, fd) = Log::create(rig.memory.end())?;
        rig.send_log(&fd, log.size(), 0)?;
        seen += ", the log after the kick fd";
    }
    rig.enable(true)?;
    rig.wake();
    rig.finish()?;
    rig.enable(false)?;
    let base = rig.stop()?;
    Ok(match rig.ring.same(base, rig.ring.end()) {
        true => Outcome::pass(seen),
        false => Outcome::fail(format!("{seen}; then it is at {}", rig.ring.show(base))),
    })
}

fn like_uml(bench: &mut Bench) -> Result<Outcome, Fault> {
    if !bench.offer.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        return Err(Fault::NotOffered("disabling a ring (PROTOCOL_FEATURES)".into()));
    }
    let mut rig = fresh(bench, 4)?;
    rig.send_memory()?;
    for queue in rig.all() {
        let index = u64::from(queue.index);
        rig.done(Code::SET_VRING_CALL, index.as_bytes(), &[queue.call.as_fd()])?;
        rig.start_silent(queue, None)?;
        let addr = VringAddr { log_guest_addr: u64::MAX, ..rig.addr(queue, None) };
        rig.done(Code::SET_VRING_ADDR, addr.as_bytes(), &[])?;
    }
    rig.enable(true)?;
    rig.wake();
    rig.finish()?;
    // It stops so: GET_VRING_BASE is never sent.
    rig.enable(false)?;
    rig.link.barrier()?;
    let resting = rests(&mut rig)?;
    rig.enable(true)?;
    rig.wake();
    rig.finish()?;
    Ok(resting.unwrap_or_else(|discarded| disabled(bench, discarded)))
}

/// Makes 4 requests on a ring that is not enabled, and watches: how many were served all the same. A word in which the
/// device says whether it wants kicks may be written late.
fn rests(rig: &mut Rig) -> Result<Result<Outcome, u64>, Fault> {
    rig.add(4, Size::Mixed)?;
    rig.publish();
    let before = rig.hashes()?;
    rig.wake();
    rig.watch();
    let mut touched = changed(&before, &rig.hashes()?);
    touched.retain(|page| rig.lent.contains(page));
    Ok(match (rig.pop_all()?, touched.len()) {
        (0, 0) => Ok(Outcome::pass("4 requests served, 4 left alone while it was disabled, and served then")),
        (served, pages) => Err(served.max(u64::from(pages > 0))),
    })
}

fn disabled(bench: &Bench, served: u64) -> Outcome {
    match bench.shape.flow {
        // The specification wants the packets of a disabled ring discarded.
        Flow::Transmit => Outcome::warning(format!("{served} packets were discarded while it was disabled")),
        _ => Outcome::fail(format!("{served} of 4 requests were served while it was disabled")),
    }
}

fn reset_owner(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    rig.start()?;
    rig.load(4, Size::Mixed)?;
    rig.link.send(Code::RESET_OWNER, Header::FLAG_VERSION, &[], &[])?;
    rig.link.barrier()?;
    rig.hello()?;
    again(&mut rig)?;
    Ok(Outcome::pass("the same connection serves rings that are started again"))
}

/// Starts over on the same connection, where the rings are, and has whatever waits served, and more.
fn again(rig: &mut Rig) -> Result<(), Fault> {
    rig.send_memory()?;
    // A reset need not stop them.
    rig.stop()?;
    rig.rebase();
    rig.start()?;
    rig.finish()?;
    rig.load(4, Size::Mixed)
}

fn reset_device(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::RESET_DEVICE)?;
    reset(bench, |rig| rig.link.send(Code::RESET_DEVICE, Header::FLAG_VERSION, &[], &[]))
}

fn reset_status(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::STATUS)?;
    reset(bench, |rig| rig.done(Code::SET_STATUS, 0u64.as_bytes(), &[]))
}

fn reset(bench: &mut Bench, send: impl FnOnce(&Rig) -> Result<(), Fault>) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    rig.start()?;
    rig.load(4, Size::Mixed)?;
    send(&rig)?;
    rig.link.barrier()?;
    rig.forget_session();
    let rested = rests(&mut rig)?;
    // The owner is still the same.
    rig.agree()?;
    again(&mut rig)?;
    Ok(match rested {
        Ok(_) => Outcome::pass("4 requests waited; they were served when the rings were started again"),
        Err(served) => Outcome::fail(format!("{served} of 4 requests were served after the reset")),
    })
}

/// Number of attempts to bring completion and SET_VRING_CALL together: a back-end that publishes and then looks for the call fd can find a
/// late one in time by chance, and one that keeps the rule signals each time.
const LATE_CALLS: usize = 5;

fn late_call(bench: &mut Bench) -> Result<Outcome, Fault> {
    for _ in 0..LATE_CALLS {
        let mut rig = bench.rig(0)?;
        for queue in rig.all() {
            if queue.index != rig.ring.index {
                rig.done(Code::SET_VRING_CALL, u64::from(queue.index).as_bytes(), &[queue.call.as_fd()])?;
            }
            rig.start_silent(queue, None)?;
        }
        rig.enable(true)?;
        rig.add(4, Size::Mixed)?;
        rig.publish();
        rig.wake();
        let done = soon(&rig.deadline(rig.patience()), || rig.pop_all().map(|_| rig.outstanding() == 0))?;
        // It may have published the last element and not yet looked for its call fd.
        std::thread::sleep(Duration::from_millis(20));
        rig.done(Code::SET_VRING_CALL, u64::from(rig.ring.index).as_bytes(), &[rig.ring.call.as_fd()])?;
        if !done {
            rig.finish()?;
            return Ok(Outcome::pass("requests were completed once it had a call fd, and notified"));
        }
        if !readable(&[rig.ring.call.as_fd()], &rig.deadline(rig.patience())) {
            return Ok(Outcome::fail(
                "4 requests were completed before, and the new fd was not signalled: the driver waits for good",
            ));
        }
    }
    Ok(Outcome::pass(format!("4 requests were completed before, and the new fd was signalled, {LATE_CALLS} times")))
}
