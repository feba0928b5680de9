//! Rule P1: guest memory whose pages arrive when they are accessed. They are placed through the back-end's userfaultfd
//! ([`PageServer`]), so the check itself needs no privilege.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::fstat;
use zerocopy::{FromBytes, IntoBytes};

use super::connection::{Reply, readable};
use super::harness::{HIGH, Harness, MAX_REQUESTS, RESEND_INTERVAL, RequestSize};
use super::hostile::serves;
use super::negotiation::PROTOCOL;
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::page_server::{MemoryContents, PageServer};
use super::pages::{Pages, noise};
use super::ring_variant::Flow;
use super::target::Target;
use crate::abi::vhost_user::{FrontendRequest as Code, Header, MemoryHeader, MemoryRegion, ProtocolFeatures};
use crate::abi::virtio::VirtioFeatures;
use crate::memory::{GuestAddress, LOG_PAGE, Userfault};
use crate::ring::Buffer;
use crate::sys::with_causes::with_causes;

/// Header flags without and with need-reply.
const PLAIN: u32 = Header::FLAG_VERSION;
const ASKING: u32 = Header::FLAG_VERSION | Header::FLAG_NEED_REPLY;

/// A point in the start of postcopy, and the function that gets there.
type SetupPoint = (&'static str, fn(&Harness) -> Result<Userfault, CheckAbort>);

/// Points at which a front-end disconnects before any ring runs.
const SETUP_POINTS: &[SetupPoint] = &[
    ("POSTCOPY_ADVISE", |harness| advise(harness, PLAIN)),
    ("POSTCOPY_LISTEN", |harness| listen(harness, PLAIN)),
    ("an unacknowledged memory table", |harness| {
        let userfault = listen(harness, PLAIN)?;
        send_table(harness, PLAIN).map(|_| userfault)
    }),
];

/// Returns a guest with pending requests on a new connection, with PAGEFAULT negotiated.
fn pending_harness(target: &Target, requests: u64) -> Result<Harness, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::PAGEFAULT)?;
    let mut harness = target.harness(VirtioFeatures::empty())?;
    fill(&harness)?;
    harness.add(requests, RequestSize::Mixed)?;
    harness.publish();
    harness.connection = target.connect()?;
    let slots = ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    harness.protocol = target.offered.protocol & PROTOCOL & !slots | ProtocolFeatures::PAGEFAULT;
    harness.negotiate()?;
    Ok(harness)
}

/// Fills all data pages, so that a zero page is noticed.
fn fill(harness: &Harness) -> Result<(), CheckAbort> {
    for region in harness.memory.regions().iter().filter(|region| region.gpa() >= HIGH) {
        harness.memory.write(region.gpa(), &noise(u64::MAX, region.size() as u32))?;
    }
    Ok(())
}

/// Sends a request that has a reply of its own, and receives the reply.
fn request(harness: &Harness, code: Code, flags: u32) -> Result<Reply, CheckAbort> {
    harness.connection.send(code, flags, &[], &[])?;
    let reply = harness.connection.reply(code)?;
    check_single_reply(harness, flags)?;
    Ok(reply)
}

/// Fails if need-reply has caused a second reply (rule F3.2).
fn check_single_reply(harness: &Harness, flags: u32) -> Result<(), CheckAbort> {
    if flags & Header::FLAG_NEED_REPLY != 0 {
        harness.connection.barrier()?;
    }
    Ok(())
}

/// Returns flags with need-reply if REPLY_ACK is offered.
fn need_reply_flags(harness: &Harness) -> u32 {
    if harness.offered.has_protocol(ProtocolFeatures::REPLY_ACK) { ASKING } else { PLAIN }
}

/// Sends POSTCOPY_ADVISE. Returns the userfaultfd.
fn advise(harness: &Harness, flags: u32) -> Result<Userfault, CheckAbort> {
    let mut reply = request(harness, Code::POSTCOPY_ADVISE, flags)?;
    let (bytes, count) = (reply.payload.len(), reply.fds.len());
    match reply.fds.pop() {
        None => Err(CheckAbort::NotPossible(
            "PAGEFAULT is offered, but the back-end has no userfaultfd. Run it as root, or set sysctl \
         vm.unprivileged_userfaultfd=1",
        )),
        Some(_) if (bytes, count) != (0, 1) => {
            Err(CheckAbort::Violation(format!("the reply to POSTCOPY_ADVISE has {count} fds and {bytes} bytes")))
        }
        Some(fd) if !is_userfaultfd(&fd) => {
            Err(CheckAbort::Violation("the fd of the reply is not a userfaultfd".into()))
        }
        Some(fd) => {
            // Faults of a blocking userfaultfd cannot be polled.
            fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok(Userfault::from_fd(fd))
        }
    }
}

fn is_userfaultfd(fd: &OwnedFd) -> bool {
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    name.is_ok_and(|name| name.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Sends POSTCOPY_ADVISE and POSTCOPY_LISTEN.
fn listen(harness: &Harness, flags: u32) -> Result<Userfault, CheckAbort> {
    let userfault = advise(harness, flags)?;
    request_acknowledged(harness, Code::POSTCOPY_LISTEN)?;
    Ok(userfault)
}

/// Sends POSTCOPY_LISTEN or POSTCOPY_END, which must be acknowledged with 0. QEMU sends them with need-reply, and DPDK
/// replies to POSTCOPY_LISTEN only then.
fn request_acknowledged(harness: &Harness, code: Code) -> Result<(), CheckAbort> {
    match request(harness, code, need_reply_flags(harness))?.read()? {
        0 => Ok(()),
        answer => Err(CheckAbort::Refused { code, answer }),
    }
}

/// Sends SET_MEM_TABLE in postcopy. Returns the back-end's addresses.
fn send_table(harness: &Harness, flags: u32) -> Result<Vec<MemoryRegion>, CheckAbort> {
    let (code, table) = (Code::SET_MEM_TABLE, harness.memory_table());
    harness.connection.send(code, flags, &table, &harness.fds())?;
    let reply = harness.connection.reply(code)?;
    let (ours, theirs) = (regions(&table), regions(&reply.payload));
    let key = |region: &MemoryRegion| (region.guest_phys_addr, region.memory_size);
    match reply.payload.len() == table.len() && theirs.iter().map(key).eq(ours.iter().map(key)) {
        true => Ok(theirs),
        false => Err(CheckAbort::Violation(format!(
            "the reply to SET_MEM_TABLE has {} bytes and {} regions, which differ from those sent",
            reply.payload.len(),
            theirs.len()
        ))),
    }
}

/// Parses the regions of a memory table.
fn regions(table: &[u8]) -> Vec<MemoryRegion> {
    let (head, rest) = table.split_at_checked(size_of::<MemoryHeader>()).unwrap_or_default();
    let count = MemoryHeader::read_from_bytes(head).map_or(0, |head| head.nregions as usize);
    let regions = rest.chunks_exact(size_of::<MemoryRegion>()).take(count);
    regions.filter_map(|region| MemoryRegion::read_from_bytes(region).ok()).collect()
}

/// Acknowledges the memory table. This message has no reply, whatever its flags.
fn acknowledge(harness: &Harness, flags: u32) -> Result<(), CheckAbort> {
    harness.connection.send(Code::SET_MEM_TABLE, flags, 0u64.as_bytes(), &[])?;
    harness.connection.barrier().map(|_| ())
}

/// Fails if the next front-end is not served `after` an action.
fn check_next_front_end(target: &Target, after: &str) -> Result<(), CheckAbort> {
    serves(target).map_err(|abort| {
        CheckAbort::Violation(format!("after {after} the next front-end is not served: {}", with_causes(&abort)))
    })
}

pub(super) fn no_memory_slots(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::PAGEFAULT)?;
    Ok(match target.offered.has_protocol(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        false => Outcome::pass("PAGEFAULT without CONFIGURE_MEM_SLOTS"),
        true => Outcome::warning(
            "PAGEFAULT and CONFIGURE_MEM_SLOTS: a front-end with both must wait for a reply to every \
         ADD_MEM_REG",
        ),
    })
}

pub(super) fn need_reply_in_postcopy(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::REPLY_ACK)?;
    let harness = pending_harness(target, 0)?;
    let _userfault = listen(&harness, ASKING)?;
    send_table(&harness, ASKING)?;
    acknowledge(&harness, ASKING)?;
    request_acknowledged(&harness, Code::POSTCOPY_END)?;
    Ok(Outcome::pass("one reply to each of the four requests, and none to the acknowledgement of the memory table"))
}

pub(super) fn postcopy_advise_reply(target: &mut Target) -> Result<Outcome, CheckAbort> {
    advise(&pending_harness(target, 0)?, PLAIN)?;
    Ok(Outcome::pass("one fd, no payload"))
}

pub(super) fn memory_table_addresses(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = pending_harness(target, 0)?;
    let userfault = listen(&harness, PLAIN)?;
    let contents = MemoryContents::punch_out(&harness)?;
    let regions = send_table(&harness, PLAIN)?;
    acknowledge(&harness, PLAIN)?;
    let (count, ours) = (regions.len(), self::regions(&harness.memory_table()));
    let address = |region: &MemoryRegion| region.userspace_addr;
    let echoed = regions.iter().map(address).eq(ours.iter().map(address));
    let page_server = PageServer::new(userfault, regions, contents.clone(), GuestAddress(u64::MAX))?;
    page_server.place_all().map_err(|abort| match abort {
        CheckAbort::Violation(what) if echoed => {
            CheckAbort::Violation(format!("{what}: it is the front-end's address"))
        }
        abort => abort,
    })?;
    let wrong = differing(&harness, &contents, &Pages::new())?.len();
    if wrong > 0 {
        return Ok(Outcome::fail(format!("{wrong} pages differ from the placed ones: they were accessed before")));
    }
    request_acknowledged(&harness, Code::POSTCOPY_END)?;
    Ok(Outcome::pass(format!("{count} regions with every page placed")))
}

/// Returns the pages with unexpected contents, except those in `aside`.
fn differing(harness: &Harness, expected: &MemoryContents, aside: &Pages) -> Result<Pages, CheckAbort> {
    let found = MemoryContents::of(&harness.memory)?;
    let pages = found.pages().zip(expected.pages()).filter(|(found, expected)| found != expected);
    Ok(pages.map(|((page, _), _)| page).filter(|page| !aside.contains(page)).collect())
}

pub(super) fn requests_in_missing_memory(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::PAGEFAULT)?;
    let known = if target.device.is_stable() { Some(memory_after_requests(target)?) } else { None };
    let mut harness = pending_harness(target, MAX_REQUESTS)?;
    let userfault = listen(&harness, PLAIN)?;
    let contents = MemoryContents::punch_out(&harness)?;
    let regions = send_table(&harness, PLAIN)?;
    let page_server = PageServer::new(userfault, regions, contents, GuestAddress(u64::MAX))?;
    let (outcome, asked) = thread::scope(|scope| {
        let serving = scope.spawn(|| page_server.serve());
        let outcome = serve(&mut harness, &page_server, known);
        if outcome.is_err() {
            // Release threads that wait for pages before reporting the error.
            let _ = page_server.place_all();
        }
        page_server.stop();
        (outcome, serving.join())
    });
    // An error of the page server is the cause of later ones.
    let asked = asked.map_err(|_| CheckAbort::System(std::io::Error::other("the page server failed")))??;
    let of_ring = asked
        .iter()
        .filter(|page| harness.ring.driver_pages().contains(page) || harness.ring.device_pages().contains(page))
        .count();
    let seen = format!("{} page faults, {of_ring} of them on the ring", asked.len());
    Ok(match outcome? {
        None => Outcome::pass(format!("{seen}; {MAX_REQUESTS} requests, and {MAX_REQUESTS} more after POSTCOPY_END")),
        Some(wrong) => Outcome::fail(format!("{seen}; {wrong}")),
    })
}

/// Returns guest memory after the requests have run with all pages present.
fn memory_after_requests(target: &Target) -> Result<MemoryContents, CheckAbort> {
    let mut harness = target.harness(VirtioFeatures::empty())?;
    fill(&harness)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    MemoryContents::of(&harness.memory)
}

/// Runs requests while pages are missing, and others after all are placed. Returns an error description, if any. Memory
/// must then be as in `known`, or the old contents with the received data.
fn serve(
    harness: &mut Harness,
    page_server: &PageServer,
    known: Option<MemoryContents>,
) -> Result<Option<String>, CheckAbort> {
    acknowledge(harness, PLAIN)?;
    // The driver writes these pages meanwhile. If pages cannot be placed, no thread waits for them.
    harness
        .frame_source_pages()
        .into_iter()
        .try_for_each(|page| page_server.place_page(GuestAddress(page * LOG_PAGE)))?;
    harness.start()?;
    let filled = complete(harness)?;
    page_server.place_all()?;
    let mut expected = known.unwrap_or_else(|| page_server.contents().clone());
    if harness.flow == Flow::Receive {
        for Buffer { gpa, len } in filled {
            let mut bytes = vec![0; len as usize];
            harness.memory.read(gpa, &mut bytes)?;
            expected.put(gpa, &bytes);
        }
    }
    let wrong = differing(harness, &expected, &(&harness.driver_pages() | &harness.device_pages()))?;
    if let Some(first) = wrong.first() {
        let (pages, at) = (wrong.len(), first * LOG_PAGE);
        return Ok(Some(format!("{pages} pages have unexpected contents, the first at {at:#x}")));
    }
    request_acknowledged(harness, Code::POSTCOPY_END)?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let base = harness.stop()?;
    let (shown, same) = (harness.ring.format_base(base), harness.ring.is_same_base(base, harness.ring.end_base()));
    Ok((!same).then(|| format!("the base is then {shown}")))
}

/// Pops completions only after a notification: reading the ring earlier would create its pages.
fn complete(harness: &mut Harness) -> Result<Vec<Buffer>, CheckAbort> {
    let deadline = harness.deadline(harness.timeout);
    let mut filled = Vec::new();
    while harness.outstanding() > 0 {
        harness.inject_frames()?;
        if readable(&[harness.ring.call.as_fd()], &deadline.within(RESEND_INTERVAL)) {
            // The value of the eventfd does not matter.
            harness.ring.ack_call();
            while harness.pop()? {
                filled.push(harness.last_data);
            }
            continue;
        }
        let left = harness.outstanding();
        if deadline.is_over() {
            let waited = harness.timeout;
            return Err(CheckAbort::Violation(format!(
                "{left} requests without completion and notification within {waited:?}"
            )));
        }
        harness.ring.awaited_frames = left.into();
    }
    Ok(filled)
}

pub(super) fn hang_ups(target: &mut Target) -> Result<Outcome, CheckAbort> {
    for (what, come_to) in SETUP_POINTS {
        let harness = pending_harness(target, 0)?;
        let userfault = come_to(&harness)?;
        harness.connection.close();
        drop(userfault);
        check_next_front_end(target, what)?;
    }
    let harness = pending_harness(target, MAX_REQUESTS)?;
    let userfault = listen(&harness, PLAIN)?;
    let contents = MemoryContents::punch_out(&harness)?;
    let regions = send_table(&harness, PLAIN)?;
    let page_server = PageServer::new(userfault, regions, contents, HIGH)?;
    let (started, is_held) = thread::scope(|scope| {
        let serving = scope.spawn(|| page_server.serve());
        let started = acknowledge(&harness, PLAIN).and_then(|()| harness.start());
        let is_held = readable(&[page_server.withheld.as_fd()], &harness.deadline(harness.timeout));
        harness.connection.close();
        page_server.stop();
        (serving.join().unwrap_or_else(|_| Ok(Pages::new())).and(started), is_held)
    });
    if !is_held {
        started?;
        return Ok(Outcome::fail("requests in missing memory caused no page fault on their data"));
    }
    // Closes the userfaultfd, as the death of a front-end does.
    drop(page_server);
    check_next_front_end(target, "pages that never arrived")?;
    harness.wait_quiet();
    let data = harness.fds().pop().map(fstat).transpose()?;
    let made_up = data.map_or(0, |data| data.st_blocks) * 512;
    let stages = 1 + SETUP_POINTS.len();
    Ok(match made_up {
        0 => Outcome::pass(format!(
            "{stages} front-ends, one with requests that waited for pages; the next was served each time"
        )),
        bytes => Outcome::warning(format!(
            "the next was served; {bytes} bytes of missing pages were created in the front-end's file"
        )),
    })
}

/// Evaluates the response to a request that must be refused.
fn refusal_outcome(answer: Result<Reply, CheckAbort>) -> Result<Outcome, CheckAbort> {
    match answer {
        Err(CheckAbort::HungUp { .. }) => Ok(Outcome::pass("refused by closing the connection")),
        Err(abort) => Err(abort),
        Ok(reply) if !reply.fds.is_empty() => Ok(Outcome::warning("answered with an fd")),
        Ok(reply) => Ok(match reply.read() {
            Ok(0u64) => Outcome::warning("acknowledged as done"),
            _ => Outcome::pass("refused"),
        }),
    }
}

pub(super) fn listen_without_advise(target: &mut Target) -> Result<Outcome, CheckAbort> {
    advise(&pending_harness(target, 0)?, PLAIN)?;
    let harness = pending_harness(target, 0)?;
    let outcome = refusal_outcome(request(&harness, Code::POSTCOPY_LISTEN, need_reply_flags(&harness)))?;
    drop(harness);
    check_next_front_end(target, "POSTCOPY_LISTEN without POSTCOPY_ADVISE")?;
    Ok(outcome)
}

pub(super) fn advise_without_pagefault(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let offers = target.offered.has_protocol(ProtocolFeatures::PAGEFAULT);
    if offers {
        advise(&pending_harness(target, 0)?, PLAIN)?;
    }
    let harness = target.harness(VirtioFeatures::empty())?;
    let outcome = refusal_outcome(request(&harness, Code::POSTCOPY_ADVISE, PLAIN))?;
    drop(harness);
    check_next_front_end(target, "POSTCOPY_ADVISE without PAGEFAULT")?;
    Ok(match outcome {
        Outcome(Verdict::Pass, seen) if !offers => {
            Outcome(Verdict::NotOffered, format!("PAGEFAULT is not offered; POSTCOPY_ADVISE is {seen}"))
        }
        outcome => outcome,
    })
}
