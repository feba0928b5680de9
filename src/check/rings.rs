//! Rules R1 to R5 and R9: rings that start, stop and go on.

use std::thread;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::rig::{SLOTS, Size, changed};
use super::{Bench, Check, Fault, Outcome};
use crate::abi::bit;
use crate::abi::vhost_user::{Request as Code, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature};

/// How often a drain is tried; a request may always be quicker than the message.
const DRAINS: u32 = 20;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "R1", what: "features that were not offered are not taken", run: features },
    Check { rule: "R2", what: "nothing is done on a ring that is not enabled", run: disabled },
    Check { rule: "R2", what: "requests that wait are served when the ring is enabled", run: enabled },
    Check {
        rule: "R3",
        what: "GET_VRING_BASE completes and publishes what was taken, and then all is quiet",
        run: drain,
    },
    Check { rule: "R4", what: "a ring goes on at its base, over the end of 16 bits", run: base },
    Check { rule: "R5", what: "SET_VRING_ADDR on a running ring moves no index", run: addr },
    Check { rule: "R9", what: "the next front-end is served, and finds the same disk", run: reconnect },
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
        _ => Outcome::kept(format!("bit {number} was refused")),
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
    rig.start_disabled(0, None)?;
    rig.wake();
    rig.watch();
    let touched = changed(&before, &rig.hashes()?);
    Ok(match (touched.len(), rig.used_index()?) {
        (0, _) => Outcome::kept(format!("4 requests waited for {:?}", rig.settle)),
        (pages, used) => Outcome::broken(format!("{used} of 4 requests were served, {pages} pages written")),
    })
}

fn enabled(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    rig.add(4, Size::Mixed)?;
    // Published before anybody could be kicked.
    let _ = rig.driver.publish();
    rig.start_disabled(0, None)?;
    rig.enable(true)?;
    rig.watch();
    if rig.used_index()? == 0 {
        rig.wake();
        rig.finish()?;
        return Ok(Outcome::warning("only after another kick, as an older specification has it"));
    }
    rig.finish()?;
    Ok(Outcome::kept("4 requests, without another kick"))
}

fn drain(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut in_flight = 0;
    for round in 1..=DRAINS {
        let mut rig = bench.rig(0)?;
        rig.start()?;
        rig.add(SLOTS, Size::Large)?;
        rig.publish();
        if round % 2 == 0 {
            // With the first one complete, the others are under way.
            let deadline = Instant::now() + rig.timeout;
            while rig.used_index()? == 0 && Instant::now() < deadline {
                thread::yield_now();
            }
        }
        let base = rig.stop()? as u16;
        let used = rig.used_index()?;
        let _ = rig.call.read();
        let before = rig.hashes()?;
        if used != base {
            let lost = base.wrapping_sub(used);
            rig.watch();
            let late = changed(&before, &rig.hashes()?).len();
            return Ok(Outcome::broken(format!(
                "round {round}: {base} requests were taken and {used} published when it answered; {lost} were not \
                 drained, and {late} pages changed later"
            )));
        }
        in_flight += u64::from(used);
        // The whole time only where it is worth it: I/O that was given up shows soon, or never.
        if round == 1 || round == DRAINS {
            rig.watch();
        }
        let late = changed(&before, &rig.hashes()?).len();
        if late > 0 {
            return Ok(Outcome::broken(format!("round {round}: {late} pages changed after the answer")));
        }
        if rig.call.read().is_ok() {
            return Ok(Outcome::broken(format!("round {round}: it notified after the answer")));
        }
        while rig.pop()? {}
    }
    Ok(match in_flight {
        0 => Outcome::warning(format!("{DRAINS} times no request had been taken when the ring was stopped")),
        taken => {
            Outcome::kept(format!("{taken} requests taken and published in {DRAINS} rounds, no page changed later"))
        }
    })
}

fn base(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = bench.rig(0)?;
    let from = 65530u16;
    rig.move_to(from)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let expected = from.wrapping_add(SLOTS as u16);
    let base = rig.stop()?;
    if base != u32::from(expected) {
        return Ok(Outcome::broken(format!("{SLOTS} requests after base {from} it says {base}, not {expected}")));
    }
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let base = rig.stop()?;
    let expected = expected.wrapping_add(SLOTS as u16);
    Ok(match base == u32::from(expected) {
        true => Outcome::kept(format!("from {from} to {base} with a stop on the way")),
        false => Outcome::broken(format!("started again it says {base}, not {expected}")),
    })
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
    let (base, expected) = (rig.stop()?, rounds * SLOTS as u32);
    Ok(match base == expected {
        true => Outcome::kept(format!("{expected} requests, each answered once, over {rounds} SET_VRING_ADDR")),
        false => Outcome::broken(format!("{expected} requests were made, the base is {base}")),
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
        1 => Outcome::kept("3 front-ends, each gone with requests in flight"),
        _ => Outcome::broken("the same sectors held something else for the next front-end"),
    })
}
