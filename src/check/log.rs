//! Rules L1 to L9, L12 and F7: the dirty log is compared with the changes of every page of guest memory.
//!
//! A page that changed and is not marked is lost by a migration: fail. A page that is marked, did not change and was
//! not given to the device for writing is sent without need: warning.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use zerocopy::IntoBytes;

use super::harness::{Harness, LOW_BYTES, MAX_REQUESTS, RequestSize, UNUSED_AREA, wait_until};
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::pages::{Pages, changed, harvest, pages};
use super::target::Target;
use crate::abi::vhost_user::{FrontendRequest as Code, Header, LogDescription};
use crate::abi::virtio::{
    RING_ELEMENTS_OFFSET, RING_IDX_OFFSET, VIRTIO_RING_F_EVENT_IDX, VirtioFeatures, avail_event_offset, used_ring_bytes,
};
use crate::dirty::Log;
use crate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region, UserAddress, sealed_memfd};
use crate::sys::nonblocking;
use crate::sys::with_causes::with_causes;

const ROUNDS: u64 = 8;

/// The pages that a batch of requests changed, compared with the log.
pub(super) struct MarkComparison {
    /// Pages that the device changed.
    changed: Pages,
    /// Pages given to the device for writing, or covered by other rules.
    allowed: Pages,
    marked: Pages,
}

impl MarkComparison {
    /// Compares the device's changes since `before` with `marked`. Rule L3.3 covers the used ring.
    pub(super) fn of(harness: &Harness, before: &[(u64, u64)], marked: Pages) -> Result<MarkComparison, CheckAbort> {
        let (own, used) = (harness.driver_pages(), harness.device_pages());
        let mut changed = changed(before, &harness.hashes()?);
        changed.retain(|page| !own.contains(page) && !used.contains(page));
        let allowed = &harness.writable_pages | &used;
        Ok(MarkComparison { changed, allowed, marked })
    }

    pub(super) fn allow(mut self, pages: impl IntoIterator<Item = u64>) -> MarkComparison {
        self.allowed.extend(pages);
        self
    }

    pub(super) fn outcome(&self) -> Outcome {
        let (changed, marked) = (self.changed.len(), self.marked.len());
        let missed: Vec<u64> = self.changed.difference(&self.marked).copied().collect();
        if let Some(first) = missed.first() {
            let lost = missed.len();
            let first = first * LOG_PAGE;
            return Outcome::fail(format!("{lost} of {changed} changed pages are not marked, the first at {first:#x}"));
        }
        let needed = |page: &&u64| !self.changed.contains(page) && !self.allowed.contains(page);
        let extra = self.marked.iter().filter(needed).count();
        if extra > 0 {
            let percent = extra as f64 * 100.0 / marked as f64;
            return Outcome::warning(format!(
                "all {changed} changed pages are marked, and {extra} pages ({percent:.1} % of the marks) \
         outside the buffers"
            ));
        }
        Outcome::pass(format!("{changed} pages changed, {marked} marked"))
    }
}

/// Returns a running ring with a log installed. Logging is off.
pub(super) fn harness_with_log(target: &Target, features: VirtioFeatures) -> Result<(Harness, Log), CheckAbort> {
    let harness = target.started(features)?;
    let log = harness.install_log()?;
    Ok((harness, log))
}

pub(super) fn set_log_base_reply(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    let (log, fd) = Log::create(harness.memory.end())?;
    let plain = harness.send_log(&fd, log.size(), 0)?;
    harness.connection.barrier()?;
    let description = LogDescription { mmap_size: log.size(), mmap_offset: 0 };
    let flags = Header::FLAG_VERSION | Header::FLAG_NEED_REPLY;
    harness.connection.send(Code::SET_LOG_BASE, flags, description.as_bytes(), &[fd.as_fd()])?;
    let asked = harness.connection.reply(Code::SET_LOG_BASE)?.payload.len();
    harness.connection.barrier()?;
    let seen = format!("{plain} bytes, with need-reply {asked}");
    Ok(match plain {
        16 if asked == plain => Outcome::pass(seen),
        16 => Outcome::warning(format!("{seen}; rust-vmm's front-end sends need-reply and hangs without 16")),
        0 | 8 => Outcome::warning(format!("{seen}; rust-vmm's front-end hangs without 16")),
        _ => Outcome::fail(format!("{seen}; 0, 8 or 16 are expected")),
    })
}

pub(super) fn data_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.enable_logging(harness.ring.device_area())?;
    let mut worst = Outcome::not_tested("no round was run");
    for round in 0..ROUNDS {
        harness.writable_pages.clear();
        harness.add(MAX_REQUESTS, if round % 2 == 0 { RequestSize::Mixed } else { RequestSize::Large })?;
        let before = harness.hashes()?;
        harness.serve()?;
        harness.connection.barrier()?;
        let found = MarkComparison::of(&harness, &before, harvest(&log))?.outcome();
        if found.0 >= worst.0 {
            worst = found;
        }
        if worst.0 == Verdict::Fail {
            break;
        }
    }
    Ok(worst)
}

/// Creates a file for a log, and maps it as memory.
fn log_file(bytes: u64) -> Result<(OwnedFd, Memory), CheckAbort> {
    let fd = sealed_memfd("log", bytes)?;
    let region = Region::map(fd.as_fd(), GuestAddress(0), bytes, UserAddress(0), 0)?;
    Ok((fd, Memory::new([Arc::new(region)])?))
}

pub(super) fn log_at_offset(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    let at = 2 * LOG_PAGE;
    // The last needed page has its bit in the last byte. The file continues behind the log.
    let size = (harness.memory.end().0 / LOG_PAGE - 1) / 8 + 1;
    let odd = size | 1;
    let (fd, seen) = log_file((at + odd).next_multiple_of(LOG_PAGE) + LOG_PAGE)?;
    harness.send_log(&fd, odd, at)?;
    harness.enable_logging(harness.ring.device_area())?;
    harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
    let before = harness.hashes()?;
    harness.serve()?;
    harness.connection.barrier()?;
    let mut bytes = vec![0; seen.size() as usize];
    seen.read(GuestAddress(0), &mut bytes)?;
    let inside = |byte: &u64| (at..at + odd).contains(byte);
    let outside = (0..).zip(&bytes).filter(|(place, byte)| **byte != 0 && !inside(place)).count();
    let log = Log::map(fd.as_fd(), odd, at)?;
    let Outcome(verdict, found) = MarkComparison::of(&harness, &before, harvest(&log))?.outcome();
    Ok(match outside {
        0 => Outcome(verdict, format!("{odd} bytes at offset {at}: {found}")),
        bytes => Outcome::fail(format!("{odd} bytes at offset {at}: {bytes} bytes outside were written; {found}")),
    })
}

pub(super) fn used_ring_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    // Flags and index of the used ring are alone on their page; the elements are on later ones.
    let at = UNUSED_AREA.unchecked_add(LOG_PAGE - 4);
    harness.enable_logging(at)?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    // The index may be marked after it was seen, but before the ring is stopped (rule R3.2).
    harness.stop()?;
    let marked = harvest(&log);
    let missed = missing_marks(&marked, at, |page| page);
    let (GuestAddress(at), at_ring) = (at, harness.ring.device_pages().intersection(&marked).count());
    Ok(match (missed.is_empty(), at_ring) {
        (true, 0) => Outcome::pass(format!("index and elements at {at:#x}")),
        (true, _) => Outcome::warning(format!("index and elements at {at:#x}, and also at the ring's own address")),
        (false, 0) => Outcome::fail(format!("{missed} not marked at {at:#x}")),
        (false, _) => Outcome::fail(format!("{missed} not marked at {at:#x}, but at the ring's own address")),
    })
}

/// Returns the parts of a used ring that are not marked at `at`, after one batch from index 0. `place` maps a page to
/// its page in the log.
pub(super) fn missing_marks(marked: &Pages, at: GuestAddress, place: impl Fn(u64) -> u64) -> String {
    let parts = [("index", RING_IDX_OFFSET, 2), ("elements", RING_ELEMENTS_OFFSET, 8 * MAX_REQUESTS)];
    let lost = |(_, offset, len): &(&str, u64, u64)| {
        pages(at.unchecked_add(*offset), *len).any(|page| !marked.contains(&place(page)))
    };
    parts.into_iter().filter(lost).map(|(name, ..)| name).collect::<Vec<_>>().join(" and ")
}

pub(super) fn logging_switches(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    let at = UNUSED_AREA.unchecked_add(LOG_PAGE - 4);
    let ring: Pages = pages(at, used_ring_bytes(harness.ring.layout.size().into())).collect();
    harness.set_ring_logging(Some(at))?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.connection.barrier()?;
    harness.set_ring_logging(None)?;
    // Harvest only now: flags and event words are written after the last completion.
    let f_log = harvest(&log);
    harness.set_log_all(true)?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.connection.barrier()?;
    let log_all = harvest(&log);
    let mut odd = Vec::new();
    if !missing_marks(&f_log, at, |page| page).is_empty() {
        odd.push("with F_LOG alone the used ring is not marked");
    }
    if f_log.iter().any(|page| harness.writable_pages.contains(page)) {
        odd.push("with F_LOG alone data is marked");
    }
    if log_all.iter().any(|page| ring.contains(page) || harness.device_pages().contains(page)) {
        odd.push("with LOG_ALL alone the used ring is marked");
    }
    if !harness.writable_pages.is_empty() && !log_all.iter().any(|page| harness.writable_pages.contains(page)) {
        odd.push("with LOG_ALL alone data is not marked");
    }
    Ok(match odd.is_empty() {
        true => Outcome::pass("each independently"),
        // Front-ends change both, one after the other.
        false => Outcome::warning(odd.join("; ")),
    })
}

pub(super) fn avail_event_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if !target.offered.has(VIRTIO_RING_F_EVENT_IDX) {
        return Err(CheckAbort::NotOffered("EVENT_IDX".into()));
    }
    let (mut harness, log) = harness_with_log(target, VIRTIO_RING_F_EVENT_IDX)?;
    // Everything before the event word is on earlier pages.
    let word = avail_event_offset(harness.ring.layout.size().into());
    let at = UNUSED_AREA.unchecked_add(4 * LOG_PAGE - word);
    harness.enable_logging(at)?;
    let read = |harness: &Harness| {
        let mut event = [0; 2];
        harness.memory.read(harness.ring.device_area().unchecked_add(word), &mut event).map(|()| event)
    };
    let before = read(&harness)?;
    for _ in 0..ROUNDS {
        harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    }
    // The word may be written after the last notification, and marked after that.
    wait_until(&harness.deadline(harness.short_wait()), || Ok(read(&harness)? != before))?;
    harness.stop()?;
    let (after, marked) = (read(&harness)?, harvest(&log).contains(&((at.0 + word) / LOG_PAGE)));
    let (before, after) = (u16::from_le_bytes(before), u16::from_le_bytes(after));
    Ok(match (before == after, marked) {
        (true, _) => Outcome::not_tested("the device did not write the word"),
        (false, true) => Outcome::pass(format!("the word changed from {before} to {after}")),
        (false, false) => Outcome::fail(format!("the word changed from {before} to {after} without a mark")),
    })
}

pub(super) fn descriptor_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.set_log_all(true)?;
    harness.stop()?;
    // A ring of 256 entries spans more than one page: exactly the written ones must be marked.
    let (mut changed_pages, mut marks, mut missed) = (0, 0, 0);
    for _ in 0..ROUNDS {
        harness.start_logged(Some(UNUSED_AREA))?;
        harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
        harness.publish();
        // Descriptors of the driver are overwritten by completions, which are identified by position.
        let from = harness.ring.current_base().packed_used();
        harness.finish()?;
        // The last descriptor may be marked after it was seen.
        harness.stop()?;
        let written: Pages = harness.ring.completed_pages(from).collect();
        let marked = harvest(&log);
        changed_pages += written.len();
        missed += written.difference(&marked).count();
        let [desc, ..] = harness.ring.layout.areas();
        let [desc_bytes, ..] = harness.ring.area_sizes();
        marks += pages(desc, desc_bytes).filter(|page| marked.contains(page)).count();
    }
    let seen =
        format!("{changed_pages} pages with used descriptors in {ROUNDS} rounds, {marks} pages of the ring marked");
    Ok(match (missed, marks > changed_pages) {
        (0, false) => Outcome::pass(seen),
        (0, true) => Outcome::warning(format!("{seen}: more than needed")),
        (missed, _) => Outcome::fail(format!("{seen}: {missed} are missing")),
    })
}

pub(super) fn event_area_marks(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VIRTIO_RING_F_EVENT_IDX)?;
    harness.enable_logging(UNUSED_AREA)?;
    let read = |harness: &Harness| {
        let mut event = [0; 4];
        harness.memory.read(harness.ring.device_area(), &mut event).map(|()| u32::from_le_bytes(event))
    };
    let before = read(&harness)?;
    for _ in 0..ROUNDS {
        harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    }
    // The area may be written after the last notification, and marked after that.
    wait_until(&harness.deadline(harness.short_wait()), || Ok(read(&harness)? != before))?;
    harness.stop()?;
    let (after, marked) = (read(&harness)?, harvest(&log).contains(&(UNUSED_AREA.0 / LOG_PAGE)));
    let seen = format!("the area changed from {before:#x} to {after:#x}");
    Ok(match (before == after, marked) {
        (true, _) => Outcome::not_tested("the device did not write the area"),
        (false, true) => Outcome::pass(seen),
        (false, false) => Outcome::fail(format!("{seen} without a mark")),
    })
}

pub(super) fn no_marks_while_off(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.connection.barrier()?;
    let early = harvest(&log).len();
    harness.enable_logging(harness.ring.device_area())?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.set_log_all(false)?;
    harness.set_ring_logging(None)?;
    // Logging is off, so all marks are set.
    let on = harvest(&log).len();
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.stop()?;
    let late = harvest(&log).len();
    Ok(match (early, on, late) {
        (_, 0, _) => Outcome::fail("nothing was marked while logging was on"),
        (0, on, 0) => Outcome::pass(format!("{on} pages while logging was on, none otherwise")),
        _ => Outcome::fail(format!("{early} pages marked before, {late} after")),
    })
}

pub(super) fn reconnect_while_logging(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.harness(VirtioFeatures::empty())?;
    harness.add(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.publish();
    let (log, fd) = Log::create(harness.memory.end())?;
    let before = harness.hashes()?;
    harness.set_log_all(true)?;
    harness.start_disabled(Some(harness.ring.device_area()))?;
    harness.wait_quiet();
    let early = changed(&before, &harness.hashes()?).len();
    harness.send_log(&fd, log.size(), 0)?;
    harness.enable(true)?;
    harness.kick();
    harness.finish()?;
    harness.stop()?;
    let marked = harvest(&log);
    let ring = &changed(&before, &harness.hashes()?) & &harness.ring.device_pages();
    let unmarked = ring.difference(&marked).count();
    let Outcome(verdict, found) = MarkComparison::of(&harness, &before, marked)?.outcome();
    if early == 0 && unmarked > 0 {
        return Ok(Outcome::fail(format!("{unmarked} written pages of the ring are not marked; {found}")));
    }
    Ok(match early {
        0 => Outcome(verdict, found),
        pages => Outcome::fail(format!(
            "{pages} pages were written before the log was installed and the ring was enabled; {found}"
        )),
    })
}

pub(super) fn replaced_log(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, mut log) = harness_with_log(target, VirtioFeatures::empty())?;
    harness.enable_logging(harness.ring.device_area())?;
    let mut worst = Outcome::not_tested("no round was run");
    for round in 1..=ROUNDS {
        harness.writable_pages.clear();
        harness.add(MAX_REQUESTS, RequestSize::Large)?;
        let before = harness.hashes()?;
        harness.publish();
        let next = harness.install_log()?;
        // The old log must not get any further mark.
        let mut marked = harvest(&log);
        let first = marked.len();
        harness.finish()?;
        harness.connection.barrier()?;
        let late = harvest(&log).len();
        if late > 0 {
            return Ok(Outcome::fail(format!("round {round}: {late} pages marked in the old log after the reply")));
        }
        marked.extend(harvest(&next));
        log = next;
        let Outcome(verdict, found) = MarkComparison::of(&harness, &before, marked)?.outcome();
        let found = Outcome(verdict, format!("round {round} of {ROUNDS}: {found}, {first} of them in the old log"));
        if found.0 >= worst.0 {
            worst = found;
        }
    }
    Ok(worst)
}

pub(super) fn log_fd_signals(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut harness, _log) = harness_with_log(target, VirtioFeatures::empty())?;
    let signal = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    match harness.send_acked(Code::SET_LOG_FD, 0u64.as_bytes(), &[signal.as_fd()]) {
        Err(CheckAbort::Refused { .. }) => return Err(CheckAbort::NotOffered("SET_LOG_FD".into())),
        done => done?,
    }
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.connection.barrier()?;
    let early = nonblocking::take(signal.as_fd()).unwrap_or(0);
    harness.enable_logging(harness.ring.device_area())?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    // The last signal may follow the last completion.
    harness.stop()?;
    let count = nonblocking::take(signal.as_fd()).unwrap_or(0);
    harness.start_logged(Some(harness.ring.device_area()))?;
    let mut without_fd = || {
        harness.send_acked(Code::SET_LOG_FD, &[], &[])?;
        let _ = nonblocking::take(signal.as_fd());
        harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
        harness.stop()?;
        Ok::<_, CheckAbort>(nonblocking::take(signal.as_fd()).unwrap_or(0))
    };
    let late = match without_fd() {
        Ok(late) => late,
        Err(abort) => return Ok(Outcome::fail(format!("after SET_LOG_FD without an fd: {}", with_causes(&abort)))),
    };
    Ok(match (early, count, late) {
        // With a loopback, received frames were also transmitted by another ring.
        (0, 1.., 0) if count <= MAX_REQUESTS * harness.all().count() as u64 => {
            Outcome::pass(format!("{count} signals for {MAX_REQUESTS} requests, none before and after"))
        }
        _ => Outcome::fail(format!(
            "{MAX_REQUESTS} requests each: {early} signals before logging, {count} while logging, {late} \
         without the fd"
        )),
    })
}

pub(super) fn log_too_small(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    // Bits for the lower region only; data is beyond it.
    let size = LOW_BYTES / LOG_PAGE / 8;
    // The file has room for all bits, but the log does not.
    let (fd, seen) = log_file((harness.memory.end().0 / LOG_PAGE / 8).next_multiple_of(LOG_PAGE))?;
    harness.send_log(&fd, size, 0)?;
    harness.enable_logging(harness.ring.device_area())?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.stop()?;
    let mut bytes = vec![0; seen.size() as usize];
    seen.read(GuestAddress(0), &mut bytes)?;
    let outside = bytes.iter().skip(size as usize).filter(|byte| **byte != 0).count();
    Ok(match outside {
        0 => Outcome::pass(format!("{MAX_REQUESTS} reads into pages outside a log of {size} bytes")),
        bytes => Outcome::fail(format!("{bytes} bytes after the log were written")),
    })
}
