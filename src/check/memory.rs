//! Rules M1 and L9: memory tables that change while requests run, with the log on.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::harness::{HIGH, SLOTS, Size, describe, harvest};
use super::log::{Marks, ready};
use super::{Bench, Check, Fault, Outcome, Verdict, When};
use crate::abi::vhost_user::{MemRegMsg, Request as Code, VHOST_USER_MAX_RAM_SLOTS_TODAY, protocol_feature};
use crate::dirty::Log;
use crate::memory::{Memory, Region, sealed_memfd};

/// Where a region is added, and its bytes: room for one request per slot.
const ADDED: u64 = HIGH + (1 << 30);
const ADDED_BYTES: u64 = 2 << 20;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "M1", what: "there are memory slots enough", when: When::Once, run: slots },
    Check {
        rule: "M1",
        what: "a region is added and removed while requests run, and what lands in it is marked",
        when: When::Data,
        run: added,
    },
    Check { rule: "L9", what: "a repeated memory table under load: no page is lost", when: When::Data, run: repeated },
];

fn slots(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::CONFIGURE_MEM_SLOTS)?;
    let slots = bench.rig(0)?.link.ask_number(Code::GET_MAX_MEM_SLOTS)?;
    Ok(match slots >= VHOST_USER_MAX_RAM_SLOTS_TODAY as u64 {
        true => Outcome::pass(format!("{slots}")),
        false => Outcome::fail(format!("{slots}, fewer than {VHOST_USER_MAX_RAM_SLOTS_TODAY}")),
    })
}

fn added(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::CONFIGURE_MEM_SLOTS)?;
    let mut rig = bench.rig(0)?;
    rig.start()?;
    let (log, fd) = Log::create(ADDED + ADDED_BYTES)?;
    rig.send_log(&fd, log.size(), 0)?;
    rig.log_on(rig.ring.device_at())?;
    rig.add(SLOTS, Size::Large)?;
    rig.publish();
    let region = Arc::new(Region::share(sealed_memfd("added", ADDED_BYTES)?, ADDED, ADDED_BYTES, 0)?);
    let message = MemRegMsg { padding: 0, region: describe(&region) };
    let fds: Vec<_> = region.shared().into_iter().map(|(fd, _)| fd).collect();
    rig.done(Code::ADD_MEM_REG, message.as_bytes(), &fds)?;
    rig.finish()?;
    rig.link.barrier()?;
    harvest(&log);
    let without = rig.memory.clone();
    rig.memory = Memory::new(without.regions().iter().cloned().chain([region.clone()]))?;
    rig.lent.clear();
    let room = ADDED_BYTES / SLOTS;
    for slot in 0..SLOTS {
        rig.add_at(slot as usize, ADDED + slot * room, room)?;
    }
    let before = rig.hashes()?;
    rig.publish();
    rig.finish()?;
    rig.link.barrier()?;
    let Outcome(verdict, found) = Marks::of(&rig, &before, harvest(&log))?.allow(rig.used_ring()).judge();
    rig.memory = without;
    rig.add(SLOTS, Size::Large)?;
    rig.publish();
    rig.done(Code::REM_MEM_REG, message.as_bytes(), &[])?;
    rig.finish()?;
    rig.load(SLOTS, Size::Mixed)?;
    Ok(Outcome(verdict, format!("in the added region: {found}")))
}

fn repeated(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut rig, log) = ready(bench, 0)?;
    rig.log_on(rig.ring.device_at())?;
    rig.add(SLOTS, Size::Large)?;
    let before = rig.hashes()?;
    rig.publish();
    rig.send_memory()?;
    rig.finish()?;
    rig.link.barrier()?;
    let during = Marks::of(&rig, &before, harvest(&log))?.allow(rig.used_ring()).judge();
    if during.0 == Verdict::Fail {
        return Ok(during);
    }
    rig.lent.clear();
    rig.add(SLOTS, Size::Mixed)?;
    let before = rig.hashes()?;
    rig.publish();
    rig.finish()?;
    rig.link.barrier()?;
    let Outcome(verdict, after) = Marks::of(&rig, &before, harvest(&log))?.allow(rig.used_ring()).judge();
    Ok(Outcome(verdict.max(during.0), format!("{}; afterwards {after}", during.1)))
}
