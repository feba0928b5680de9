//! Rules I1 to I7: the inflight region of a back-end, and its recovery.
//!
//! For the inflight region a front-end that disconnects is equivalent to a crash: the next connection has to complete
//! the open requests. With `--restart` the back-end is killed as well.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::stat::fstat;
use zerocopy::{FromBytes, IntoBytes};

use super::harness::{Harness, MAX_REQUESTS, RequestSize, wait_until};
use super::outcome::{CheckAbort, Outcome};
use super::pages::changed;
use super::target::Target;
use crate::abi::inflight::{PackedEntry, PackedHeader, SplitEntry, SplitHeader, VERSION};
use crate::abi::vhost_user::{
    FrontendRequest as Code, Header, InflightDescription, ProtocolFeatures, unstable::INFLIGHT_MIGRATION,
};
use crate::abi::virtio::VirtioFeatures;
use crate::inflight::RingKind;
use crate::memory::{GuestAddress, Memory, Region, UserAddress};
use crate::ring::RingBase;
use crate::sys::with_causes::with_causes;

/// Minimum number of disconnections and kills with requests in flight.
const ROUNDS: u32 = 10;
/// Maximum number of them, until open requests were seen. A fast back-end may have completed all before.
const MAX_ROUNDS: u32 = 60;

/// An inflight region of the back-end, for all rings up to the one that is checked.
pub(super) struct TrackedRegion {
    fd: OwnedFd,
    description: InflightDescription,
    memory: Memory,
    kind: RingKind,
    /// Offset of the ring's part.
    at: u64,
}

/// Contents of a ring's part.
struct RegionContents {
    version: u16,
    desc_num: u16,
    /// Used position.
    used: RingBase,
    marked: usize,
    counter: u64,
    /// Error in the contents, for a ring without requests in flight.
    wrong: Option<String>,
}

impl TrackedRegion {
    /// Requests a region with GET_INFLIGHT_FD.
    pub(super) fn get_inflight_fd(harness: &Harness) -> Result<TrackedRegion, CheckAbort> {
        harness.offered.require_protocol(ProtocolFeatures::INFLIGHT_SHMFD)?;
        let queue_size = harness.ring.layout.size();
        let num_queues = harness.ring.index as u16 + 1;
        let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues, queue_size, padding: [0; 4] };
        let reply = harness.connection.request(Code::GET_INFLIGHT_FD, wanted.as_bytes())?;
        let mut description: InflightDescription = reply.read()?;
        let InflightDescription { mmap_size, mmap_offset, .. } = description;
        // Some back-ends do not fill in these fields.
        (description.num_queues, description.queue_size) = (num_queues, queue_size);
        let kind = if harness.ring.is_packed() { RingKind::Packed } else { RingKind::Split };
        let (part, number) = (kind.queue_bytes(queue_size), u64::from(num_queues));
        let needed = part * number;
        let count = reply.fds.len();
        let Some(fd) = reply.fds.into_iter().next().filter(|_| count == 1) else {
            return Err(CheckAbort::Violation(format!("{count} fds with the region")));
        };
        let file = fstat(&fd)?.st_size.cast_unsigned();
        if mmap_size < needed || mmap_offset.checked_add(mmap_size).is_none_or(|end| end > file) {
            return Err(CheckAbort::Violation(format!(
                "{mmap_size} bytes at offset {mmap_offset} of a file of {file}; {num_queues} queues need \
         {needed}"
            )));
        }
        let region = Region::map(fd.as_fd(), GuestAddress(0), mmap_size, UserAddress(0), mmap_offset)?;
        let (at, memory) = (part * (number - 1), Memory::new([Arc::new(region)])?);
        Ok(TrackedRegion { fd, description, memory, kind, at })
    }

    /// Sends SET_INFLIGHT_FD.
    pub(super) fn set_inflight_fd(&self, harness: &Harness) -> Result<(), CheckAbort> {
        harness.send_acked(Code::SET_INFLIGHT_FD, self.description.as_bytes(), &[self.fd.as_fd()])
    }

    fn read(&self) -> Result<RegionContents, CheckAbort> {
        let mut bytes = vec![0; self.kind.queue_bytes(self.description.queue_size) as usize];
        self.memory.read(GuestAddress(self.at), &mut bytes)?;
        let contents = match self.kind {
            RingKind::Split => split(&bytes, self.description.queue_size),
            RingKind::Packed => packed(&bytes, self.description.queue_size),
        };
        contents.ok_or_else(|| CheckAbort::Violation("the region is too small for its header".into()))
    }
}

fn split(bytes: &[u8], size: u16) -> Option<RegionContents> {
    let (header, rest) = SplitHeader::read_from_prefix(bytes).ok()?;
    let entries = rest.chunks_exact(size_of::<SplitEntry>()).take(size.into());
    let entries: Vec<SplitEntry> = entries.filter_map(|entry| SplitEntry::read_from_bytes(entry).ok()).collect();
    let outside = header.last_batch_head.get() >= size;
    Some(RegionContents {
        version: header.version.get(),
        desc_num: header.desc_num.get(),
        used: RingBase::split(header.used_idx.get()),
        marked: entries.iter().filter(|entry| entry.inflight != 0).count(),
        counter: entries.iter().map(|entry| entry.counter.get()).max().unwrap_or(0),
        wrong: outside.then(|| "the head of the last batch is out of range".into()),
    })
}

fn packed(bytes: &[u8], size: u16) -> Option<RegionContents> {
    let (header, rest) = PackedHeader::read_from_prefix(bytes).ok()?;
    let entries = rest.chunks_exact(size_of::<PackedEntry>()).take(size.into());
    let entries: Vec<PackedEntry> = entries.filter_map(|entry| PackedEntry::read_from_bytes(entry).ok()).collect();
    let (used, wrap) = (header.used_idx.get(), header.used_wrap_counter != 0);
    let next = |index: &u16| Some(entries.get(usize::from(*index))?.next.get());
    let mut free: Vec<u16> = std::iter::successors(Some(header.free_head.get()), next).take(size.into()).collect();
    free.sort_unstable();
    free.dedup();
    let inside = free.iter().filter(|index| **index < size).count();
    let old = (header.old_used_idx, header.old_used_wrap_counter, header.old_free_head);
    let wrong = if old != (header.used_idx, header.used_wrap_counter, header.free_head) {
        Some("the last batch is not committed: the old_* fields differ".into())
    } else if inside != usize::from(size) {
        Some(format!("{inside} of {size} entries are on the free list"))
    } else {
        None
    };
    Some(RegionContents {
        version: header.version.get(),
        desc_num: header.desc_num.get(),
        used: RingBase::packed(used, wrap, used, wrap),
        marked: entries.iter().filter(|entry| entry.inflight != 0).count(),
        counter: entries.iter().map(|entry| entry.counter.get()).max().unwrap_or(0),
        wrong,
    })
}

/// Returns a running ring with an inflight region.
fn harness_with_region(target: &Target) -> Result<(Harness, TrackedRegion), CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::INFLIGHT_SHMFD)?;
    let harness = target.harness(VirtioFeatures::empty())?;
    let region = TrackedRegion::get_inflight_fd(&harness)?;
    region.set_inflight_fd(&harness)?;
    harness.start()?;
    Ok((harness, region))
}

pub(super) fn region_size(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    let InflightDescription { mmap_size, mmap_offset, num_queues, .. } =
        TrackedRegion::get_inflight_fd(&harness)?.description;
    let size = harness.ring.layout.size();
    Ok(Outcome::pass(format!("{mmap_size} bytes at {mmap_offset} for {num_queues} queues of {size} entries")))
}

pub(super) fn region_contents(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, region) = harness_with_region(target)?;
    let mut most = 0;
    for round in 0..MAX_ROUNDS {
        if round >= ROUNDS && most > 0 {
            break;
        }
        harness.add(MAX_REQUESTS, RequestSize::Large)?;
        harness.publish();
        let deadline = harness.deadline(harness.timeout);
        while harness.outstanding() > 0 && !deadline.is_over() {
            most = most.max(region.read()?.marked);
            harness.pop_all()?;
        }
        harness.finish()?;
    }
    harness.stop()?;
    let RegionContents { version, desc_num, used, marked, counter, wrong } = region.read()?;
    let (ring, size) = (harness.ring.current_base(), harness.ring.layout.size());
    let used_at = harness.ring.format_base(used);
    let seen = format!("version {version}, {desc_num} entries, used at {used_at}, up to {most} requests marked");
    Ok(match wrong {
        _ if version != VERSION || desc_num != size => Outcome::fail(format!("{seen}; the ring has {size}")),
        _ if !harness.ring.is_same_base(used, ring) => {
            Outcome::fail(format!("{seen}; the ring is at {}", harness.ring.format_base(ring)))
        }
        Some(wrong) => Outcome::fail(format!("{seen}; {wrong}")),
        _ if marked > 0 => Outcome::fail(format!("{seen}; {marked} are still marked")),
        // A back-end that counts requests has marked them first.
        _ if most == 0 && counter == 0 => Outcome::warning(format!("{seen}; no request was seen in flight")),
        _ => Outcome::pass(seen),
    })
}

/// In every round, leaves requests open, ends the connection with `die`, and continues with the region on a new
/// connection.
fn recover_repeatedly(
    target: &mut Target,
    mut die: impl FnMut(&mut Target, &Harness, u32) -> Result<(), CheckAbort>,
) -> Result<Outcome, CheckAbort> {
    let (mut harness, region) = harness_with_region(target)?;
    let (mut open, mut marked, mut round) = (0, 0, 0);
    while round < ROUNDS || open == 0 && round < MAX_ROUNDS {
        round += 1;
        harness.writable_pages.clear();
        harness.add(MAX_REQUESTS, RequestSize::Large)?;
        let before = harness.hashes()?;
        // Without a kick in every third round: then all requests are open, however fast the back-end is.
        if harness.ring.driver.publish() && round % 3 != 0 {
            harness.kick();
        }
        die(target, &harness, round)?;
        harness.pop_all()?;
        open += u32::from(harness.outstanding());
        marked += region.read()?.marked;
        harness.reconnect(target.connect()?)?;
        region.set_inflight_fd(&harness)?;
        // QEMU sends this base. The region takes precedence (rules I3.4, I4.5).
        if !target.variant.packed {
            harness.ring.base = harness.ring.current_base();
        }
        harness.start()?;
        if let Err(abort) = harness.finish() {
            return Ok(Outcome::fail(format!("round {round}: {}", with_causes(&abort))));
        }
        let (base, made) = (harness.stop()?, harness.ring.end_base());
        if !harness.ring.is_same_base(base, made) {
            let (base, made) = (harness.ring.format_base(base), harness.ring.format_base(made));
            return Ok(Outcome::fail(format!("round {round}: the requests end at {made}, but the base is {base}")));
        }
        if harness.ring.has_excess_completions(&harness.memory)? {
            return Ok(Outcome::fail(format!("round {round}: more completions than requests")));
        }
        let done = changed(&before, &harness.hashes()?);
        let missing = harness.writable_pages.iter().filter(|page| !done.contains(page)).count();
        if missing > 0 {
            return Ok(Outcome::fail(format!("round {round}: {missing} pages of completed requests have no data")));
        }
        harness.start()?;
    }
    let seen = format!("{round} rounds, {open} requests in flight in total, {marked} of them marked in the region");
    Ok(if open == 0 { Outcome::not_tested(seen) } else { Outcome::pass(seen) })
}

/// Gives the back-end a short time, different in every round.
fn wait_briefly(round: u32) {
    thread::sleep(Duration::from_micros(u64::from((round - 1) % ROUNDS) * 150));
}

pub(super) fn hang_ups(target: &mut Target) -> Result<Outcome, CheckAbort> {
    recover_repeatedly(target, |target, harness, round| {
        wait_briefly(round);
        harness.connection.close();
        // The next connection shows that this one has ended.
        target.check_served()
    })
}

pub(super) fn kills(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if target.process.is_none() {
        return Ok(Outcome::not_tested("needs --restart"));
    }
    recover_repeatedly(target, |target, _, round| {
        wait_briefly(round);
        target.replace()
    })
}

pub(super) fn fresh_region(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::INFLIGHT_SHMFD)?;
    let mut harness = target.harness(VirtioFeatures::empty())?;
    let region = TrackedRegion::get_inflight_fd(&harness)?;
    // One more than the region's own index: the difference that loses a request (rule I3.2).
    harness.move_to(1)?;
    region.set_inflight_fd(&harness)?;
    harness.start()?;
    let touched =
        wait_until(&harness.deadline(harness.short_wait()), || region.read().map(|found| found.version != 0))?;
    let found = region.read()?;
    if !touched {
        return Ok(Outcome::not_tested("the region is not written before the first request"));
    }
    let at = harness.ring.current_base();
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    Ok(match harness.ring.is_same_base(found.used, at) {
        true => Outcome::pass(format!("used at {}, as in the ring", harness.ring.format_base(at))),
        false => {
            let (found, at) = (harness.ring.format_base(found.used), harness.ring.format_base(at));
            Outcome::fail(format!("used at {found}, but the ring is at {at}: a crash loses a request"))
        }
    })
}

pub(super) fn request_counters(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, region) = harness_with_region(target)?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let first = region.read()?.counter;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let second = region.read()?.counter;
    Ok(match second > first {
        true => Outcome::pass(format!("from {first} to {second} over {MAX_REQUESTS} requests")),
        false => Outcome::fail(format!("from {first} to {second} over {MAX_REQUESTS} requests")),
    })
}

pub(super) fn inflight_migration(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let offered = target.offered.protocol & INFLIGHT_MIGRATION;
    match offered.iter().next() {
        Some(feature) => {
            let bit = feature.bits().trailing_zeros();
            Ok(Outcome::not_tested(format!("bit {bit} is offered; without it rings are drained")))
        }
        None => Err(CheckAbort::NotOffered("GET_VRING_BASE_INFLIGHT".into())),
    }
}

pub(super) fn region_after_reset(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::RESET_DEVICE)?;
    let (mut harness, region) = harness_with_region(target)?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.connection.send(Code::RESET_DEVICE, Header::FLAG_VERSION, &[], &[])?;
    harness.connection.barrier()?;
    Ok(match region.read()?.version {
        0 => Outcome::pass("version 0"),
        version => Outcome::fail(format!("version {version}")),
    })
}
