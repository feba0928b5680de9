//! Rules R1 to R5 and R9: rings that start, stop and go on.

use std::thread;

use zerocopy::IntoBytes;

use super::harness::{SLOTS, Size, changed, harvest, soon};
use super::log::Marks;
use super::{Bench, Check, Fault, Flow, FrameSource, Offer, Outcome, When};
use crate::abi::bit;
use crate::abi::vhost_user::{Request as Code, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature};

/// How often a drain is tried; a request may always be quicker than the message.
const DRAINS: u32 = 20;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "R1", what: "features that were not offered are not taken", when: When::Once, run: features },
    Check { rule: "R1", what: "without bit 30 a ring runs as soon as it is started", when: When::Rings, run: plain },
    Check { rule: "R2", what: "nothing is done on a ring that is not enabled", when: When::Each, run: disabled },
    Check {
        rule: "R2",
        what: "requests that wait are served when the ring is enabled",
        when: When::Each,
        run: enabled,
    },
    Check {
        rule: "R3",
        what: "GET_VRING_BASE completes and publishes what was taken, and then all is quiet",
        when: When::Each,
        run: drain,
    },
    Check {
        rule: "R3",
        what: "all rings at once: what they write is marked, and each is drained",
        when: When::Each,
        run: everywhere,
    },
    Check { rule: "R4", what: "a ring goes on at its base, over the end of 16 bits", when: When::Each, run: base },
    Check { rule: "R5", what: "SET_VRING_ADDR on a running ring moves no index", when: When::Each, run: addr },
    Check {
        rule: "R9",
        what: "the next front-end is served, and finds the device as it was",
        when: When::Rings,
        run: reconnect,
    },
];

fn features(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::REPLY_ACK)?;
    let rig = bench.rig(0)?;
    let Some(number) = (0..64).rev().find(|number| !bench.offer.has(*number)) else {
        return Ok(Outcome::not_tested("all 64 are offered"));
    };
    let answer = rig.link.acknowledged(Code::SET_FEATURES, (rig.features | bit(number)).as_bytes(), &[])?;
    Ok(match answer {
        0 => Outcome::warning(format!("bit {number} was acknowledged without being offered, and taken")),
        _ => Outcome::pass(format!("bit {number} was refused")),
    })
}

fn plain(bench: &mut Bench) -> Result<Outcome, Fault> {
    if !bench.offer.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        return Ok(Outcome::not_tested("it is not offered: every check is one of this"));
    }
    let mut rig = bench.rig(0)?;
    let without = !bit(VHOST_USER_F_PROTOCOL_FEATURES);
    rig.offer = Offer { features: rig.offer.features & without, protocol: 0, queues: 1 };
    rig.features &= without;
    rig.reconnect(bench.connect()?)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let (base, expected) = (rig.stop()?, rig.ring.end());
    Ok(match rig.ring.same(base, expected) {
        true => Outcome::pass(format!("{SLOTS} requests without SET_VRING_ENABLE and protocol features")),
        false => Outcome::fail(format!("{SLOTS} requests later it says {}", rig.ring.show(base))),
    })
}

fn disabled(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    if !bench.offer.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        return Err(Fault::NotOffered("disabling a ring (PROTOCOL_FEATURES)".into()));
    }
    rig.add(4, Size::Mixed)?;
    rig.publish();
    let before = rig.hashes()?;
    rig.start_disabled(None)?;
    rig.wake();
    rig.watch();
    let touched = changed(&before, &rig.hashes()?);
    Ok(match (touched.len(), rig.pop_all()?) {
        (0, _) => Outcome::pass(format!("4 requests waited for {:?}", rig.settle)),
        // The specification wants the packets of a disabled ring discarded.
        (_, used) if bench.shape.flow == Flow::Transmit => Outcome::warning(format!(
            "{used} of 4 packets were discarded, as the specification has it: their used entries are written while no log is there"
        )),
        (pages, used) => Outcome::fail(format!("{used} of 4 requests were served, {pages} pages written")),
    })
}

fn enabled(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    rig.add(4, Size::Mixed)?;
    // Published before anybody could be kicked.
    let _ = rig.ring.driver.publish();
    rig.feed()?;
    rig.start_disabled(None)?;
    rig.enable(true)?;
    if !soon(&rig.deadline(rig.patience()), || rig.pop())? {
        rig.wake();
        rig.finish()?;
        return Ok(Outcome::warning("only after another kick, as an older specification has it"));
    }
    rig.finish()?;
    Ok(Outcome::pass("4 requests, without another kick"))
}

fn drain(bench: &mut Bench) -> Result<Outcome, Fault> {
    if bench.shape.flow == Flow::Receive
        && let Some(late) = late_frames(bench)?
    {
        return Ok(Outcome::fail(late));
    }
    let mut in_flight = 0;
    for round in 1..=DRAINS {
        let mut rig = bench.rig(0)?;
        rig.start()?;
        rig.add(SLOTS, Size::Large)?;
        rig.publish();
        if round % 2 == 0 {
            // With the first one complete, the others are under way.
            let deadline = rig.deadline(rig.timeout);
            while !rig.pop()? && !deadline.is_over() {
                thread::yield_now();
            }
        }
        let base = rig.stop()?;
        rig.ring.ack_call();
        let before = rig.hashes()?;
        rig.pop_all()?;
        if !rig.ring.same(base, rig.ring.position()) {
            let (lost, used) = (rig.ring.in_flight(base), rig.ring.show(rig.ring.position()));
            let lost = lost.map_or("a number of".into(), |lost| lost.to_string());
            let base = rig.ring.show(base);
            rig.watch();
            let late = changed(&before, &rig.hashes()?).len();
            return Ok(Outcome::fail(format!(
                "round {round}: it answers with base {base}, but has published up to {used}; {lost} were not drained, and \
                 {late} pages changed later"
            )));
        }
        in_flight += SLOTS - u64::from(rig.outstanding());
        // The whole time only where it is worth it: I/O that was given up shows soon, or never.
        if round == 1 || round == DRAINS {
            rig.watch();
        }
        let late = changed(&before, &rig.hashes()?).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("round {round}: {late} pages changed after the answer")));
        }
        if rig.ring.ack_call() {
            return Ok(Outcome::fail(format!("round {round}: it notified after the answer")));
        }
    }
    Ok(match in_flight {
        0 => Outcome::warning(format!("{DRAINS} times no request had been taken when the ring was stopped")),
        taken => {
            Outcome::pass(format!("{taken} requests taken and published in {DRAINS} rounds, no page changed later"))
        }
    })
}

/// What is wrong with a ring that is stopped with buffers in it, for frames that come in only then.
fn late_frames(bench: &Bench) -> Result<Option<String>, Fault> {
    let mut rig = bench.rig(0)?;
    rig.start()?;
    // A frame that has come in shows that the ring runs: a message may overtake the first kick.
    rig.add(1, Size::Large)?;
    rig.publish();
    rig.finish()?;
    rig.add(SLOTS, Size::Large)?;
    rig.ring.publish();
    // What is left of earlier connections takes the first of the buffers.
    let deadline = rig.deadline(rig.timeout);
    while soon(&rig.deadline(rig.settle), || rig.pop())? && !deadline.is_over() {
        rig.add(SLOTS - u64::from(rig.outstanding()), Size::Large)?;
        rig.ring.publish();
    }
    let base = rig.stop_first()?;
    let before = rig.hashes()?;
    rig.pop_all()?;
    if !rig.ring.same(base, rig.ring.position()) {
        let (base, used) = (rig.ring.show(base), rig.ring.show(rig.ring.position()));
        return Ok(Some(format!(
            "buffers that nothing came for: it answers with base {base}, but has used up to {used}"
        )));
    }
    rig.feed()?;
    rig.watch();
    let written = changed(&before, &rig.hashes()?).intersection(&rig.lent).count();
    let late = rig.pop_all()?;
    Ok((late > 0 || written > 0).then(|| {
        format!("frames that came in after the answer: {late} buffers were used, {written} of their pages written")
    }))
}

fn everywhere(bench: &mut Bench) -> Result<Outcome, Fault> {
    let rings = bench.most_rings();
    if rings < 2 {
        return Ok(Outcome::not_tested("it has one"));
    }
    if bench.shape.flow == Flow::Receive && bench.frame_source != Some(FrameSource::Loop) {
        return Ok(Outcome::not_tested("frames can't be told which ring to arrive on"));
    }
    let mut rig = bench.rigged(0, rings)?;
    rig.start()?;
    let log = match rig.install_log() {
        Err(Fault::NotOffered(_)) => None,
        log => Some(log?),
    };
    if log.is_some() {
        rig.log_on(rig.ring.device_at())?;
    }
    rig.add(SLOTS, Size::Large)?;
    let before = rig.hashes()?;
    rig.publish();
    rig.finish()?;
    // The last mark of a used ring may follow the last completion; it comes before this answer (rule R3.2).
    rig.stop()?;
    let found = match &log {
        None => Outcome::pass("no log"),
        Some(log) => {
            let marked = harvest(log);
            let ring = &changed(&before, &rig.hashes()?) & &rig.used_rings();
            match ring.difference(&marked).count() {
                0 => Marks::of(&rig, &before, marked)?.allow(rig.used_ring()).judge(),
                missed => Outcome::fail(format!("{missed} pages that rings were written to are not marked")),
            }
        }
    };
    rig.start()?;
    rig.add(SLOTS, Size::Large)?;
    rig.publish();
    rig.stop()?;
    let before = rig.hashes()?;
    let taken = rig.pop_all()?;
    if let Some(queue) = rig.rings().find(|queue| !queue.same(queue.base, queue.position())) {
        let (index, base, at) = (queue.index, queue.show(queue.base), queue.show(queue.position()));
        return Ok(Outcome::fail(format!("ring {index} answers with base {base}, but has published up to {at}")));
    }
    rig.watch();
    let late = changed(&before, &rig.hashes()?).len();
    let Outcome(verdict, found) = found;
    Ok(match late {
        0 => Outcome(verdict, format!("{rings} rings: {found}; {taken} of {SLOTS} requests taken, all published")),
        pages => Outcome::fail(format!("{rings} rings: {pages} pages changed after they had all been stopped")),
    })
}

fn base(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    // Indexes of split rings run to 2^16, those of packed ones to the ring's end.
    let from = if bench.shape.packed { rig.ring.layout.size() - 6 } else { 65530 };
    rig.move_to(from)?;
    let from = rig.ring.show(rig.ring.base);
    for _ in 0..2 {
        rig.start()?;
        rig.load(SLOTS, Size::Mixed)?;
        let (base, expected) = (rig.stop()?, rig.ring.end());
        if !rig.ring.same(base, expected) {
            let (base, expected) = (rig.ring.show(base), rig.ring.show(expected));
            return Ok(Outcome::fail(format!("{SLOTS} requests later it says {base}, not {expected}")));
        }
    }
    Ok(Outcome::pass(format!("from {from} to {} with a stop on the way", rig.ring.show(rig.ring.base))))
}

fn addr(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    rig.start()?;
    let rounds = 5;
    for _ in 0..rounds {
        rig.add(SLOTS, Size::Mixed)?;
        rig.publish();
        rig.log_used(None)?;
        rig.finish()?;
    }
    let (base, expected, made) = (rig.stop()?, rig.ring.end(), rounds * SLOTS);
    Ok(match rig.ring.same(base, expected) {
        true => Outcome::pass(format!("{made} requests, each answered once, over {rounds} SET_VRING_ADDR")),
        false => Outcome::fail(format!("{made} requests were made, the base is {}", rig.ring.show(base))),
    })
}

fn reconnect(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut seen = Vec::new();
    for _ in 0..3 {
        let mut rig = bench.rig(0)?;
        rig.start()?;
        rig.load(SLOTS, Size::Mixed)?;
        let data: Vec<(u64, u64)> = rig.hashes()?.into_iter().filter(|(page, _)| rig.lent.contains(page)).collect();
        seen.push(data);
        // Left with requests in flight: they are this front-end's trouble, not the next one's.
        rig.add(SLOTS, Size::Large)?;
        rig.publish();
    }
    seen.dedup();
    Ok(match seen.len() {
        _ if bench.subject.has_requests() && !bench.subject.is_stable() => {
            Outcome::pass("3 front-ends, each gone with requests in flight; they have nothing to find")
        }
        1 => Outcome::pass("3 front-ends, each gone with requests in flight"),
        _ => Outcome::fail("the same sectors of the disk held something else for the next front-end"),
    })
}
