//! Rule P1: guest memory whose pages come when they are touched. They come through the userfaultfd of the back-end
//! ([`Postman`]), so that the check needs no right to have one itself.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::fstat;
use zerocopy::{FromBytes, IntoBytes};

use super::connection::{Reply, readable};
use super::harness::{AGAIN, HIGH, PROTOCOL, Pages, Rig, SLOTS, Size, noise};
use super::hostile::serves;
use super::page_server::{Contents, Postman};
use super::{Bench, Check, Fault, Flow, Outcome, Verdict, When};
use crate::abi::bit;
use crate::abi::vhost_user::{Header, MemoryHeader, MemoryRegion, Request as Code, protocol_feature};
use crate::memory::{LOG_PAGE, Userfault};
use crate::ring::Buffer;

/// Flags of a message, and of one that wants to be acknowledged.
const PLAIN: u32 = Header::FLAG_VERSION;
const ASKING: u32 = Header::FLAG_VERSION | Header::FLAG_NEED_REPLY;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "F3", what: "need-reply adds no answer to those of postcopy", when: When::Once, run: answers },
    Check { rule: "M1", what: "postcopy is not offered together with memory slots", when: When::Once, run: offered },
    Check {
        rule: "P1",
        what: "POSTCOPY_ADVISE is answered with one userfaultfd and nothing else",
        when: When::Once,
        run: advised,
    },
    Check {
        rule: "P1",
        what: "a memory table is answered with addresses at which pages can be placed, and acknowledged",
        when: When::Once,
        run: addresses,
    },
    Check {
        rule: "P1",
        what: "requests in memory that is not there are served as its pages come",
        when: When::Each,
        run: served,
    },
    Check { rule: "P1", what: "POSTCOPY_LISTEN without POSTCOPY_ADVISE is refused", when: When::Once, run: unadvised },
    Check { rule: "P1", what: "POSTCOPY_ADVISE without PAGEFAULT is refused", when: When::Once, run: unasked },
];

/// What a back-end may not get over.
pub(super) const DEADLY: &[Check] = &[Check {
    rule: "P1",
    what: "a front-end that hangs up before POSTCOPY_END does no harm",
    when: When::Once,
    run: hung_up,
}];

/// How far a front-end comes, and how it comes there.
type Stage = (&'static str, fn(&Rig) -> Result<Userfault, Fault>);

/// Where a front-end hangs up before any ring runs.
const STAGES: &[Stage] = &[
    ("POSTCOPY_ADVISE", |rig| advise(rig, PLAIN)),
    ("POSTCOPY_LISTEN", |rig| listen(rig, PLAIN)),
    ("a memory table that it has not acknowledged", |rig| {
        let userfault = listen(rig, PLAIN)?;
        send_table(rig, PLAIN).map(|_| userfault)
    }),
];

/// A guest with requests that wait, on a new connection where features are agreed on, PAGEFAULT among them.
fn guest(bench: &Bench, requests: u64) -> Result<Rig, Fault> {
    bench.offer.need(protocol_feature::PAGEFAULT)?;
    let mut rig = bench.rig(0)?;
    fill(&rig)?;
    rig.add(requests, Size::Mixed)?;
    rig.publish();
    rig.link = bench.connect()?;
    let slots = bit(protocol_feature::CONFIGURE_MEM_SLOTS);
    rig.protocol = bench.offer.protocol & PROTOCOL & !slots | bit(protocol_feature::PAGEFAULT);
    rig.hello()?;
    Ok(rig)
}

/// Leaves no page of data blank: one that is made up in place of what was there shows.
fn fill(rig: &Rig) -> Result<(), Fault> {
    for region in rig.memory.regions().iter().filter(|region| region.gpa() >= HIGH) {
        rig.memory.write(region.gpa(), &noise(u64::MAX, region.size() as u32))?;
    }
    Ok(())
}

/// Asks for what has an answer of its own.
fn ask(rig: &Rig, code: Code, flags: u32) -> Result<Reply, Fault> {
    rig.link.send(code, flags, &[], &[])?;
    let reply = rig.link.reply(code)?;
    settled(rig, flags)?;
    Ok(reply)
}

/// Whether what was sent with need-reply has brought no second answer (rule F3.2).
fn settled(rig: &Rig, flags: u32) -> Result<(), Fault> {
    if flags & Header::FLAG_NEED_REPLY != 0 {
        rig.link.barrier()?;
    }
    Ok(())
}

/// Need-reply, where anything can be acknowledged.
fn asking(rig: &Rig) -> u32 {
    if rig.offer.speaks(protocol_feature::REPLY_ACK) { ASKING } else { PLAIN }
}

/// POSTCOPY_ADVISE: the userfaultfd.
fn advise(rig: &Rig, flags: u32) -> Result<Userfault, Fault> {
    let mut reply = ask(rig, Code::POSTCOPY_ADVISE, flags)?;
    let (bytes, count) = (reply.payload.len(), reply.fds.len());
    match reply.fds.pop() {
        None => Err(Fault::NotPossible(
            "it offers PAGEFAULT and has no userfaultfd: let it have one (root, or sysctl vm.unprivileged_userfaultfd=1)",
        )),
        Some(_) if (bytes, count) != (0, 1) => {
            Err(Fault::Breach(format!("{count} fds and {bytes} bytes came as the answer to POSTCOPY_ADVISE")))
        }
        Some(fd) if !is_userfaultfd(&fd) => Err(Fault::Breach("the fd that came is no userfaultfd".into())),
        Some(fd) => {
            // Of one that waits it can't be known whether somebody waits for a page.
            fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok(Userfault::from_fd(fd))
        }
    }
}

fn is_userfaultfd(fd: &OwnedFd) -> bool {
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    name.is_ok_and(|name| name.as_os_str() == "anon_inode:[userfaultfd]")
}

/// POSTCOPY_ADVISE and POSTCOPY_LISTEN.
fn listen(rig: &Rig, flags: u32) -> Result<Userfault, Fault> {
    let userfault = advise(rig, flags)?;
    granted(rig, Code::POSTCOPY_LISTEN)?;
    Ok(userfault)
}

/// POSTCOPY_LISTEN or POSTCOPY_END, which are answered with 0 if they are done. QEMU asks for that with need-reply, and
/// DPDK answers POSTCOPY_LISTEN to nobody else.
fn granted(rig: &Rig, code: Code) -> Result<(), Fault> {
    match ask(rig, code, asking(rig))?.read()? {
        0 => Ok(()),
        answer => Err(Fault::Refused { code, answer }),
    }
}

/// SET_MEM_TABLE while the back-end listens: where it has the regions.
fn send_table(rig: &Rig, flags: u32) -> Result<Vec<MemoryRegion>, Fault> {
    let (code, table) = (Code::SET_MEM_TABLE, rig.table());
    rig.link.send(code, flags, &table, &rig.fds())?;
    let reply = rig.link.reply(code)?;
    let (ours, theirs) = (regions(&table), regions(&reply.payload));
    let key = |region: &MemoryRegion| (region.guest_phys_addr, region.memory_size);
    match reply.payload.len() == table.len() && theirs.iter().map(key).eq(ours.iter().map(key)) {
        true => Ok(theirs),
        false => Err(Fault::Breach(format!(
            "the answer to SET_MEM_TABLE has {} bytes and {} regions, which are not those it was sent",
            reply.payload.len(),
            theirs.len()
        ))),
    }
}

/// The regions of a memory table.
fn regions(table: &[u8]) -> Vec<MemoryRegion> {
    let (head, rest) = table.split_at_checked(size_of::<MemoryHeader>()).unwrap_or_default();
    let count = MemoryHeader::read_from_bytes(head).map_or(0, |head| head.nregions as usize);
    let regions = rest.chunks_exact(size_of::<MemoryRegion>()).take(count);
    regions.filter_map(|region| MemoryRegion::read_from_bytes(region).ok()).collect()
}

/// The front-end's word that it serves faults, which nothing answers, whatever its flags.
fn acknowledge(rig: &Rig, flags: u32) -> Result<(), Fault> {
    rig.link.send(Code::SET_MEM_TABLE, flags, 0u64.as_bytes(), &[])?;
    rig.link.barrier().map(|_| ())
}

/// Says so if `after` something the next front-end is not.
fn go_on(bench: &Bench, after: &str) -> Result<(), Fault> {
    serves(bench).map_err(|fault| Fault::Breach(format!("after {after} the next front-end is not served: {fault}")))
}

fn offered(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::PAGEFAULT)?;
    Ok(match bench.offer.speaks(protocol_feature::CONFIGURE_MEM_SLOTS) {
        false => Outcome::pass("PAGEFAULT without CONFIGURE_MEM_SLOTS"),
        true => Outcome::warning(
            "PAGEFAULT and CONFIGURE_MEM_SLOTS: a front-end that speaks both must wait for an answer to every ADD_MEM_REG",
        ),
    })
}

fn answers(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::REPLY_ACK)?;
    let rig = guest(bench, 0)?;
    let _userfault = listen(&rig, ASKING)?;
    send_table(&rig, ASKING)?;
    acknowledge(&rig, ASKING)?;
    granted(&rig, Code::POSTCOPY_END)?;
    Ok(Outcome::pass("one for each of the four requests, and none for the acknowledgement of the memory table"))
}

fn advised(bench: &mut Bench) -> Result<Outcome, Fault> {
    advise(&guest(bench, 0)?, PLAIN)?;
    Ok(Outcome::pass("one fd, no payload"))
}

fn addresses(bench: &mut Bench) -> Result<Outcome, Fault> {
    let rig = guest(bench, 0)?;
    let userfault = listen(&rig, PLAIN)?;
    let contents = Contents::take(&rig)?;
    let regions = send_table(&rig, PLAIN)?;
    acknowledge(&rig, PLAIN)?;
    let (count, ours) = (regions.len(), self::regions(&rig.table()));
    let address = |region: &MemoryRegion| region.userspace_addr;
    let echoed = regions.iter().map(address).eq(ours.iter().map(address));
    let postman = Postman::new(userfault, regions, contents.clone(), u64::MAX)?;
    postman.bring_all().map_err(|fault| match fault {
        Fault::Breach(what) if echoed => Fault::Breach(format!("{what}: that is where the front-end has it")),
        fault => fault,
    })?;
    let wrong = differing(&rig, &contents, &Pages::new())?.len();
    if wrong > 0 {
        return Ok(Outcome::fail(format!("{wrong} pages are not what was placed: they were made up before that")));
    }
    granted(&rig, Code::POSTCOPY_END)?;
    Ok(Outcome::pass(format!("{count} regions, every page of them placed")))
}

/// Pages but those `aside` whose bytes are not the expected ones.
fn differing(rig: &Rig, expected: &Contents, aside: &Pages) -> Result<Pages, Fault> {
    let found = Contents::of(&rig.memory)?;
    let pages = found.pages().zip(expected.pages()).filter(|(found, expected)| found != expected);
    Ok(pages.map(|((page, _), _)| page).filter(|page| !aside.contains(page)).collect())
}

fn served(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::PAGEFAULT)?;
    let known = if bench.subject.is_stable() { Some(answered(bench)?) } else { None };
    let mut rig = guest(bench, SLOTS)?;
    let userfault = listen(&rig, PLAIN)?;
    let contents = Contents::take(&rig)?;
    let regions = send_table(&rig, PLAIN)?;
    let postman = Postman::new(userfault, regions, contents, u64::MAX)?;
    let (outcome, asked) = thread::scope(|scope| {
        let serving = scope.spawn(|| postman.serve());
        let outcome = serve(&mut rig, &postman, known);
        if outcome.is_err() {
            // Whoever waits for a page has nothing to do with what went wrong.
            let _ = postman.bring_all();
        }
        postman.stop();
        (outcome, serving.join())
    });
    // What went wrong with pages tells more than what came of it.
    let asked = asked.map_err(|_| Fault::System(std::io::Error::other("nobody brings pages")))??;
    let of_ring =
        asked.iter().filter(|page| rig.ring.own().contains(page) || rig.ring.written().contains(page)).count();
    let seen = format!("{} pages were asked for, {of_ring} of them of the ring", asked.len());
    Ok(match outcome? {
        None => Outcome::pass(format!("{seen}; {SLOTS} requests, and {SLOTS} more after POSTCOPY_END")),
        Some(wrong) => Outcome::fail(format!("{seen}; {wrong}")),
    })
}

/// What the memory of a guest is when its requests were answered, all of it being there.
fn answered(bench: &Bench) -> Result<Contents, Fault> {
    let mut rig = bench.rig(0)?;
    fill(&rig)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    Contents::of(&rig.memory)
}

/// Has the requests of a guest served whose pages are brought, and others when all are there; what is wrong with them.
/// What memory must be then is `known`, or what it was and what came in.
fn serve(rig: &mut Rig, postman: &Postman, known: Option<Contents>) -> Result<Option<String>, Fault> {
    acknowledge(rig, PLAIN)?;
    // The driver writes them meanwhile. Where pages can't be placed, nobody is made to wait for any.
    rig.sending().into_iter().try_for_each(|page| postman.bring(page * LOG_PAGE))?;
    rig.start()?;
    let filled = complete(rig)?;
    postman.bring_all()?;
    let mut expected = known.unwrap_or_else(|| postman.contents().clone());
    if rig.flow == Flow::Receive {
        for Buffer { gpa, len } in filled {
            let mut bytes = vec![0; len as usize];
            rig.memory.read(gpa, &mut bytes)?;
            expected.put(gpa, &bytes);
        }
    }
    let wrong = differing(rig, &expected, &(&rig.own() | &rig.used_ring()))?;
    if let Some(first) = wrong.first() {
        let (pages, at) = (wrong.len(), first * LOG_PAGE);
        return Ok(Some(format!("{pages} pages are not as they were or as the device leaves them, first {at:#x}")));
    }
    granted(rig, Code::POSTCOPY_END)?;
    rig.load(SLOTS, Size::Mixed)?;
    let base = rig.stop()?;
    let (shown, same) = (rig.ring.show(base), rig.ring.same(base, rig.ring.end()));
    Ok((!same).then(|| format!("then the ring is at {shown}")))
}

/// Takes completions where the device has said that there are some: a look at the ring before would make its pages up.
fn complete(rig: &mut Rig) -> Result<Vec<Buffer>, Fault> {
    let deadline = rig.deadline(rig.timeout);
    let mut filled = Vec::new();
    while rig.outstanding() > 0 {
        rig.feed()?;
        if readable(&[rig.ring.call.as_fd()], &deadline.within(AGAIN)) {
            // Whatever it counts.
            rig.ring.ack_call();
            while rig.pop()? {
                filled.push(rig.last);
            }
            continue;
        }
        let left = rig.outstanding();
        if deadline.is_over() {
            let waited = rig.timeout;
            return Err(Fault::Breach(format!("{left} requests without answer and notification within {waited:?}")));
        }
        rig.ring.due = left.into();
    }
    Ok(filled)
}

fn hung_up(bench: &mut Bench) -> Result<Outcome, Fault> {
    for (what, come_to) in STAGES {
        let rig = guest(bench, 0)?;
        let userfault = come_to(&rig)?;
        rig.link.end();
        drop(userfault);
        go_on(bench, what)?;
    }
    let rig = guest(bench, SLOTS)?;
    let userfault = listen(&rig, PLAIN)?;
    let contents = Contents::take(&rig)?;
    let regions = send_table(&rig, PLAIN)?;
    let postman = Postman::new(userfault, regions, contents, HIGH)?;
    let (started, is_held) = thread::scope(|scope| {
        let serving = scope.spawn(|| postman.serve());
        let started = acknowledge(&rig, PLAIN).and_then(|()| rig.start());
        let is_held = readable(&[postman.held.as_fd()], &rig.deadline(rig.timeout));
        rig.link.end();
        postman.stop();
        (serving.join().unwrap_or_else(|_| Ok(Pages::new())).and(started), is_held)
    });
    if !is_held {
        started?;
        return Ok(Outcome::fail(
            "requests were made in memory that is not there, and no page of their data was asked for",
        ));
    }
    // As a front-end that dies does.
    drop(postman);
    go_on(bench, "pages that never came")?;
    rig.watch();
    let data = rig.fds().pop().map(fstat).transpose()?;
    let made_up = data.map_or(0, |data| data.st_blocks) * 512;
    let stages = 1 + STAGES.len();
    Ok(match made_up {
        0 => Outcome::pass(format!(
            "{stages} front-ends, one with requests that waited for pages: each time the next was served"
        )),
        bytes => Outcome::warning(format!(
            "the next was served; {bytes} bytes of pages that never came were made up in the front-end's file"
        )),
    })
}

/// How what must be refused was answered.
fn refused(answer: Result<Reply, Fault>) -> Result<Outcome, Fault> {
    match answer {
        Err(Fault::HungUp { .. }) => Ok(Outcome::pass("refused by hanging up")),
        Err(fault) => Err(fault),
        Ok(reply) if !reply.fds.is_empty() => Ok(Outcome::warning("answered with an fd")),
        Ok(reply) => Ok(match reply.read() {
            Ok(0u64) => Outcome::warning("acknowledged as done"),
            _ => Outcome::pass("refused"),
        }),
    }
}

fn unadvised(bench: &mut Bench) -> Result<Outcome, Fault> {
    advise(&guest(bench, 0)?, PLAIN)?;
    let rig = guest(bench, 0)?;
    let outcome = refused(ask(&rig, Code::POSTCOPY_LISTEN, asking(&rig)))?;
    drop(rig);
    go_on(bench, "POSTCOPY_LISTEN without POSTCOPY_ADVISE")?;
    Ok(outcome)
}

fn unasked(bench: &mut Bench) -> Result<Outcome, Fault> {
    let offers = bench.offer.speaks(protocol_feature::PAGEFAULT);
    if offers {
        advise(&guest(bench, 0)?, PLAIN)?;
    }
    let rig = bench.rig(0)?;
    let outcome = refused(ask(&rig, Code::POSTCOPY_ADVISE, PLAIN))?;
    drop(rig);
    go_on(bench, "POSTCOPY_ADVISE without PAGEFAULT")?;
    Ok(match outcome {
        Outcome(Verdict::Pass, seen) if !offers => {
            Outcome(Verdict::NotOffered, format!("PAGEFAULT is not offered; POSTCOPY_ADVISE is {seen}"))
        }
        outcome => outcome,
    })
}
