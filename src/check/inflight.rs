//! Rules I1 to I7: the inflight region as the back-end keeps it, and what its successor makes of it.
//!
//! A front-end that hangs up is to the inflight region what a crash is: the next connection has to answer what is open.
//! Where the back-end may be killed, it is killed too.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::fstat;
use zerocopy::{FromBytes, IntoBytes};

use super::rig::{Rig, SLOTS, Size, changed};
use super::{Bench, Check, Fault, Outcome};
use crate::abi::inflight::{SPLIT_HEADER_BYTES, SplitEntry, SplitHeader, VERSION, split_queue_bytes};
use crate::abi::vhost_user::{Header, InflightDescription, Request as Code, protocol_feature};
use crate::memory::{Memory, Region};

/// How often a front-end hangs up, and a back-end is killed, with requests in flight.
const DEATHS: u32 = 10;
/// How often at most, until some were seen marked: a quick back-end has done everything before one looks.
const LOOKS: u32 = 60;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "I1", what: "GET_INFLIGHT_FD answers with a region that holds what was asked for", run: shape },
    Check {
        rule: "I2",
        what: "requests are marked while in flight; then the region is that of the ring",
        run: contents,
    },
    Check {
        rule: "I3",
        what: "requests open at a hang-up are answered exactly once on the next connection",
        run: hang_ups,
    },
    Check { rule: "I3", what: "requests open at a SIGKILL are answered exactly once by the successor", run: kills },
    Check { rule: "I5", what: "a fresh region on a used ring starts at the ring's used index", run: fresh },
    Check { rule: "I6", what: "counters go on growing", run: counters },
    Check { rule: "I7", what: "RESET_DEVICE makes the region fresh", run: reset },
];

/// A region that the back-end made, for one queue.
struct Tracked {
    fd: OwnedFd,
    description: InflightDescription,
    memory: Memory,
}

/// What stands in it.
struct Contents {
    header: SplitHeader,
    entries: Vec<SplitEntry>,
}

impl Contents {
    fn marked(&self) -> usize {
        self.entries.iter().filter(|entry| entry.inflight != 0).count()
    }

    fn counter(&self) -> u64 {
        self.entries.iter().map(|entry| entry.counter.get()).max().unwrap_or(0)
    }
}

impl Tracked {
    /// Asks for a region.
    fn ask(rig: &Rig) -> Result<Tracked, Fault> {
        rig.offer.need(protocol_feature::INFLIGHT_SHMFD)?;
        let queue_size = rig.layout.size;
        let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size, padding: [0; 4] };
        let reply = rig.link.ask(Code::GET_INFLIGHT_FD, wanted.as_bytes())?;
        let mut description: InflightDescription = reply.read()?;
        let InflightDescription { mmap_size, mmap_offset, num_queues, .. } = description;
        // Some leave the shape to the request.
        (description.num_queues, description.queue_size) = (1, queue_size);
        let needed = split_queue_bytes(queue_size);
        let count = reply.fds.len();
        let Some(fd) = reply.fds.into_iter().next().filter(|_| count == 1) else {
            return Err(Fault::Breach(format!("{count} fds came with the region")));
        };
        let file = fstat(&fd)?.st_size.cast_unsigned();
        if mmap_size < needed || mmap_offset.checked_add(mmap_size).is_none_or(|end| end > file) {
            return Err(Fault::Breach(format!(
                "{mmap_size} bytes at {mmap_offset} of a file of {file}, for {num_queues} queues that need {needed}"
            )));
        }
        let region = Region::map(fd.as_fd(), 0, mmap_size, 0, mmap_offset)?;
        Ok(Tracked { fd, description, memory: Memory::new([Arc::new(region)])? })
    }

    /// SET_INFLIGHT_FD.
    fn install(&self, rig: &Rig) -> Result<(), Fault> {
        rig.done(Code::SET_INFLIGHT_FD, self.description.as_bytes(), &[self.fd.as_fd()])
    }

    fn read(&self) -> Result<Contents, Fault> {
        let mut bytes = vec![0; split_queue_bytes(self.description.queue_size) as usize];
        self.memory.read(0, &mut bytes)?;
        let entries = bytes.get(SPLIT_HEADER_BYTES as usize..).unwrap_or_default();
        let entries = entries.chunks_exact(size_of::<SplitEntry>()).take(self.description.queue_size.into());
        let entries = entries.filter_map(|entry| SplitEntry::read_from_bytes(entry).ok()).collect();
        match SplitHeader::read_from_prefix(&bytes) {
            Ok((header, _)) => Ok(Contents { header, entries }),
            Err(_) => Err(Fault::Breach("the region is too small for its header".into())),
        }
    }
}

/// A ring that runs with a region.
fn tracked(bench: &Bench) -> Result<(Rig, Tracked), Fault> {
    bench.offer.need(protocol_feature::INFLIGHT_SHMFD)?;
    let rig = bench.rig(0)?;
    let region = Tracked::ask(&rig)?;
    region.install(&rig)?;
    rig.start()?;
    Ok((rig, region))
}

fn shape(bench: &mut Bench) -> Result<Outcome, Fault> {
    let rig = bench.rig(0)?;
    let InflightDescription { mmap_size, mmap_offset, .. } = Tracked::ask(&rig)?.description;
    let size = rig.layout.size;
    Ok(Outcome::kept(format!("{mmap_size} bytes at {mmap_offset} for 1 queue of {size} entries")))
}

fn contents(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut rig, region) = tracked(bench)?;
    let mut most = 0;
    for round in 0..LOOKS {
        if round >= DEATHS && most > 0 {
            break;
        }
        rig.add(SLOTS, Size::Large)?;
        rig.publish();
        let deadline = Instant::now() + rig.timeout;
        while rig.driver.outstanding() > 0 && Instant::now() < deadline {
            most = most.max(region.read()?.marked());
            while rig.pop()? {}
        }
        rig.finish()?;
    }
    let base = rig.stop()?;
    let (found, used, size) = (region.read()?, rig.used_index()?, rig.layout.size);
    let SplitHeader { version, desc_num, used_idx, last_batch_head, .. } = found.header;
    let (version, desc_num, used_idx) = (version.get(), desc_num.get(), used_idx.get());
    let seen = format!("version {version}, {desc_num} entries, used index {used_idx}, up to {most} requests marked");
    let marked = found.marked();
    Ok(match () {
        () if version != VERSION || desc_num != size => Outcome::broken(format!("{seen}; the ring has {size}")),
        () if last_batch_head.get() >= size => Outcome::broken(format!("{seen}; the last batch is outside")),
        () if used_idx != used => Outcome::broken(format!("{seen}; the ring is at {used}")),
        () if marked > 0 => Outcome::broken(format!("{seen}; {marked} are still marked at base {base}")),
        // What took a request counted it first.
        () if most == 0 && found.counter() == 0 => Outcome::warning(format!("{seen}: none was seen in flight")),
        () => Outcome::kept(seen),
    })
}

/// Leaves requests open in every round, has `die` end the connection, and goes on with the region on another.
fn survive(
    bench: &mut Bench,
    mut die: impl FnMut(&mut Bench, &Rig, u32) -> Result<(), Fault>,
) -> Result<Outcome, Fault> {
    let (mut rig, region) = tracked(bench)?;
    let (mut open, mut marked) = (0, 0);
    for round in 1..=DEATHS {
        rig.lent.clear();
        rig.add(SLOTS, Size::Large)?;
        let before = rig.hashes()?;
        // Every third time nobody tells the back-end: then all are open, however quick it is.
        if rig.driver.publish() && round % 3 != 0 {
            rig.wake();
        }
        die(bench, &rig, round)?;
        while rig.pop()? {}
        open += u32::from(rig.driver.outstanding());
        marked += region.read()?.marked();
        rig.reconnect(bench.connect()?)?;
        region.install(&rig)?;
        // The base as QEMU sends it then: the region knows better (rule I3).
        rig.start_disabled(rig.used_index()?, None)?;
        rig.enable(true)?;
        rig.wake();
        if let Err(fault) = rig.finish() {
            return Ok(Outcome::broken(format!("round {round}: {fault}")));
        }
        let (base, made) = (rig.stop()?, rig.driver.state().avail);
        if base != u32::from(made) {
            return Ok(Outcome::broken(format!("round {round}: {made} requests were made, the base is {base}")));
        }
        if rig.used_index()? != made {
            return Ok(Outcome::broken(format!("round {round}: more answers than requests")));
        }
        let done = changed(&before, &rig.hashes()?);
        let missing = rig.lent.iter().filter(|page| !done.contains(page)).count();
        if missing > 0 {
            return Ok(Outcome::broken(format!("round {round}: {missing} pages of answered requests have no data")));
        }
        rig.start()?;
    }
    let seen = format!("{DEATHS} times, {open} requests open in all, {marked} of them marked");
    Ok(if open == 0 { Outcome::not_tested(seen) } else { Outcome::kept(seen) })
}

/// Lets the back-end work for a moment, another one every time.
fn at_work(round: u32) {
    thread::sleep(Duration::from_micros(u64::from(round - 1) * 150));
}

fn hang_ups(bench: &mut Bench) -> Result<Outcome, Fault> {
    survive(bench, |bench, rig, round| {
        at_work(round);
        rig.link.end();
        // The next connection is the proof that this one is over.
        bench.lives()
    })
}

fn kills(bench: &mut Bench) -> Result<Outcome, Fault> {
    if bench.process.is_none() {
        return Ok(Outcome::not_tested("needs --restart"));
    }
    survive(bench, |bench, _, round| {
        at_work(round);
        bench.replace()
    })
}

fn fresh(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::INFLIGHT_SHMFD)?;
    let mut rig = bench.rig(0)?;
    let region = Tracked::ask(&rig)?;
    // One behind the region's own: the difference that costs a request, see rule I3.
    rig.move_to(1)?;
    region.install(&rig)?;
    rig.start()?;
    let deadline = Instant::now() + rig.settle;
    while region.read()?.header.version.get() == 0 && Instant::now() < deadline {
        thread::yield_now();
    }
    let header = region.read()?.header;
    if header.version.get() == 0 {
        return Ok(Outcome::not_tested("the region is not touched before there is a request"));
    }
    let found = header.used_idx.get();
    rig.load(SLOTS, Size::Mixed)?;
    Ok(match found {
        1 => Outcome::kept("used index 1, as the ring has it"),
        other => Outcome::broken(format!("used index {other} on a ring that is at 1: a crash now costs a request")),
    })
}

fn counters(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut rig, region) = tracked(bench)?;
    rig.load(SLOTS, Size::Mixed)?;
    let first = region.read()?.counter();
    rig.load(SLOTS, Size::Mixed)?;
    let second = region.read()?.counter();
    Ok(match second > first {
        true => Outcome::kept(format!("from {first} to {second} over {SLOTS} requests")),
        false => Outcome::broken(format!("from {first} to {second} over {SLOTS} requests")),
    })
}

fn reset(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::RESET_DEVICE)?;
    let (mut rig, region) = tracked(bench)?;
    rig.load(SLOTS, Size::Mixed)?;
    rig.link.send(Code::RESET_DEVICE, Header::FLAG_VERSION, &[], &[])?;
    rig.link.barrier()?;
    Ok(match region.read()?.header.version.get() {
        0 => Outcome::kept("version 0"),
        version => Outcome::broken(format!("version {version}")),
    })
}
