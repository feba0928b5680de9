//! Rules M1 and L9: changes of the memory table while requests run and logging is on.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::harness::{HIGH, MAX_REQUESTS, RequestSize, describe};
use super::log::{MarkComparison, harness_with_log};
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::pages::harvest;
use super::target::Target;
use crate::abi::vhost_user::{FrontendRequest as Code, MemRegMsg, ProtocolFeatures, VHOST_USER_MAX_RAM_SLOTS};
use crate::abi::virtio::VirtioFeatures;
use crate::dirty::Log;
use crate::memory::{Address, GuestAddress, Memory, Region};

/// Address and size of the added region, with room for one request per slot.
const ADDED: GuestAddress = GuestAddress(HIGH.0 + (1 << 30));
const ADDED_BYTES: u64 = 2 << 20;

pub(super) fn slot_count(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
    let slots = target.harness(VirtioFeatures::empty())?.connection.request_u64(Code::GET_MAX_MEM_SLOTS)?;
    Ok(match slots >= VHOST_USER_MAX_RAM_SLOTS as u64 {
        true => Outcome::pass(format!("{slots}")),
        false => Outcome::fail(format!("{slots}, fewer than {VHOST_USER_MAX_RAM_SLOTS}")),
    })
}

pub(super) fn added_region(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
    let mut harness = target.started(VirtioFeatures::empty())?;
    let (log, fd) = Log::create(ADDED.unchecked_add(ADDED_BYTES))?;
    harness.send_log(&fd, log.size(), 0)?;
    harness.enable_logging(harness.ring.device_area())?;
    harness.add(MAX_REQUESTS, RequestSize::Large)?;
    harness.publish();
    let region = Arc::new(Region::create(ADDED, ADDED_BYTES)?);
    let message = MemRegMsg { padding: 0, region: describe(&region) };
    let fds: Vec<_> = region.shared().into_iter().map(|(fd, _)| fd).collect();
    harness.send_acked(Code::ADD_MEM_REG, message.as_bytes(), &fds)?;
    harness.finish()?;
    harness.connection.barrier()?;
    harvest(&log);
    let without = harness.memory.clone();
    harness.memory = Memory::new(without.regions().iter().cloned().chain([region.clone()]))?;
    harness.writable_pages.clear();
    let room = ADDED_BYTES / MAX_REQUESTS;
    for slot in 0..MAX_REQUESTS {
        harness.add_at(slot as usize, ADDED.unchecked_add(slot * room), room)?;
    }
    let before = harness.hashes()?;
    harness.serve()?;
    harness.connection.barrier()?;
    let Outcome(verdict, found) = MarkComparison::of(&harness, &before, harvest(&log))?.outcome();
    harness.memory = without;
    harness.add(MAX_REQUESTS, RequestSize::Large)?;
    harness.publish();
    harness.send_acked(Code::REM_MEM_REG, message.as_bytes(), &[])?;
    harness.finish()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    Ok(Outcome(verdict, format!("in the added region: {found}")))
}

pub(super) fn repeated_memory_table(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.enable_logging(harness.ring.device_area())?;
    harness.add(MAX_REQUESTS, RequestSize::Large)?;
    let before = harness.hashes()?;
    harness.publish();
    harness.send_memory()?;
    harness.finish()?;
    harness.connection.barrier()?;
    let during = MarkComparison::of(&harness, &before, harvest(&log))?.outcome();
    if during.0 == Verdict::Fail {
        return Ok(during);
    }
    harness.writable_pages.clear();
    harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
    let before = harness.hashes()?;
    harness.serve()?;
    harness.connection.barrier()?;
    let Outcome(verdict, after) = MarkComparison::of(&harness, &before, harvest(&log))?.outcome();
    Ok(Outcome(verdict.max(during.0), format!("{}; afterwards {after}", during.1)))
}
