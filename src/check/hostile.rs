//! Messages and rings that are wrong on purpose: the back-end must refuse them, or hang up, and serve the next front-end.
//!
//! Each is sent on a connection of its own with a running ring, for what a back-end does wrong shows best there.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use zerocopy::{Immutable, IntoBytes};

use super::harness::{HIGH, Rig, Size, describe};
use super::{Bench, Check, Fault, Outcome, Verdict, When, state};
use crate::abi::inflight::{PACKED_HEADER_BYTES, SPLIT_HEADER_BYTES, VERSION};
use crate::abi::vhost_user::{
    ConfigHeader, Header, InflightDescription, LogDescription, MemRegMsg, MemoryHeader, MemoryRegion, Request as Code,
    VringAddr, VringState, protocol_feature,
};
use crate::abi::virtio::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, PACKED_DESC_F_AVAIL, PackedDesc};
use crate::inflight::RingKind;
use crate::memory::sealed_memfd;

const MIB: u64 = 1 << 20;
const VERSION_FLAG: u32 = Header::FLAG_VERSION;
/// Regions of noise that are tried.
const NOISES: u64 = 20;

pub(super) const CHECKS: &[Check] = &[
    Check {
        rule: "F1",
        what: "hostile: broken headers, and messages that end too soon",
        when: When::Once,
        run: frames,
    },
    Check { rule: "F6", what: "hostile: every payload cut to 3 bytes", when: When::Once, run: cut },
    Check { rule: "M1", what: "hostile: memory tables that can't be", when: When::Once, run: memory },
    Check { rule: "R2", what: "hostile: rings that can't be", when: When::Once, run: rings },
    Check { rule: "L2", what: "hostile: logs that can't be", when: When::Once, run: logs },
    Check { rule: "C1", what: "hostile: configuration that is not there", when: When::Once, run: config },
    Check { rule: "D1", what: "hostile: states that were changed, and noise", when: When::Once, run: state::changed },
    Check { rule: "I1", what: "hostile: inflight regions that can't be", when: When::Once, run: regions },
    Check { rule: "I3", what: "hostile: inflight regions full of noise", when: When::Rings, run: noise },
    Check { rule: "R9", what: "hostile: descriptors that loop or lead astray", when: When::Rings, run: descriptors },
];

/// A message that must be refused. The fds are of a memfd of 1 MiB.
struct Message {
    what: &'static str,
    code: Code,
    payload: Vec<u8>,
    fds: usize,
}

fn message(what: &'static str, code: Code, body: &(impl IntoBytes + Immutable + ?Sized), fds: usize) -> Message {
    Message { what, code, payload: body.as_bytes().to_vec(), fds }
}

/// How a back-end took what it was sent.
#[derive(Default)]
struct Taken {
    refused: u32,
    hung_up: u32,
    believed: Vec<&'static str>,
}

impl Taken {
    fn outcome(self) -> Outcome {
        let Taken { refused, hung_up, believed } = self;
        let seen = format!("survived; {refused} refused or passed over, {hung_up} answered by hanging up");
        match believed.is_empty() {
            true => Outcome::pass(seen),
            false => Outcome::warning(format!("{seen}; acknowledged as done: {}", believed.join(", "))),
        }
    }
}

/// Whether the next front-end gets its data.
pub(super) fn serves(bench: &Bench) -> Result<(), Fault> {
    let mut rig = bench.rig(0)?;
    rig.start()?;
    rig.load(2, Size::Mixed)
}

/// Tries one thing after the other, each with a front-end of its own.
pub(super) fn attack<T>(
    bench: &Bench,
    all: impl IntoIterator<Item = T>,
    name: impl Fn(&T) -> &'static str,
    attempt: impl Fn(&mut Rig, &T) -> Result<u64, Fault>,
) -> Result<Outcome, Fault> {
    let mut taken = Taken::default();
    for thing in all {
        let what = name(&thing);
        let mut rig = bench.rig(0)?;
        rig.start()?;
        match attempt(&mut rig, &thing) {
            Ok(0) => taken.believed.push(what),
            Ok(_) | Err(Fault::Refused { .. }) => taken.refused += 1,
            Err(Fault::HungUp { .. }) => taken.hung_up += 1,
            Err(fault) => {
                let Outcome(verdict, seen) = fault.into();
                return Ok(Outcome(verdict, format!("{what}: {seen}")));
            }
        }
        drop(rig);
        if let Err(fault) = serves(bench) {
            return Ok(Outcome::fail(format!("{what}: the next front-end is not served: {fault}")));
        }
    }
    Ok(taken.outcome())
}

/// The same with what a ring leads to, of which a back-end may die later.
fn attack_rings<T>(
    bench: &Bench,
    all: impl IntoIterator<Item = T>,
    name: impl Fn(&T) -> &'static str,
    attempt: impl Fn(&mut Rig, &T) -> Result<u64, Fault>,
) -> Result<Outcome, Fault> {
    let outcome = attack(bench, all, name, |rig, thing| {
        let answer = attempt(rig, thing)?;
        rig.wake();
        thread::sleep(bench.options.settle / 8);
        // Whether it answers on a broken ring is its affair.
        rig.link.barrier().map(|_| answer)
    })?;
    if outcome.0 == Verdict::Fail {
        // What it was of is known; behind it nobody is served.
        return Ok(outcome);
    }
    thread::sleep(bench.options.settle);
    Ok(match serves(bench) {
        Ok(()) => outcome,
        Err(fault) => Outcome::fail(format!("after all of them the next front-end is not served: {fault}")),
    })
}

fn send(bench: &Bench, all: Vec<Message>) -> Result<Outcome, Fault> {
    let file = sealed_memfd("hostile", MIB)?;
    let acks = bench.offer.speaks(protocol_feature::REPLY_ACK);
    attack(
        bench,
        all,
        |message| message.what,
        |rig, Message { code, payload, fds, .. }| {
            let fds: Vec<BorrowedFd<'_>> = (0..*fds).map(|_| file.as_fd()).collect();
            if acks {
                rig.link.send(*code, VERSION_FLAG | Header::FLAG_NEED_REPLY, payload, &fds)?;
                let reply = rig.link.reply(*code)?;
                // Replies of their own say no in their own ways.
                // A log that is taken has an answer of its own, which is not a number (rule F7.1).
                let taken = *code == Code::SET_LOG_BASE && reply.payload.len() != size_of::<u64>();
                return Ok(if taken { 0 } else { reply.read().unwrap_or(1) });
            }
            rig.link.send(*code, VERSION_FLAG, payload, &fds)?;
            rig.link.barrier().map(|_| 1)
        },
    )
}

fn frames(bench: &mut Bench) -> Result<Outcome, Fault> {
    let header = |request, flags, size| Header { request, flags, size }.as_bytes().to_vec();
    let frames = [
        ("version 0", header(1, 0, 0)),
        ("version 2", header(1, 2, 0)),
        ("a payload of 4 GiB", header(5, 1, u32::MAX)),
        ("a payload of 1 MiB", header(5, 1, 1 << 20)),
        ("noise", vec![0xff; 64]),
        ("half a header", vec![1, 0, 0, 0, 1]),
        ("a header without its payload", header(2, 1, 8)),
        ("a reply that nobody asked for", [header(2, 5, 8), vec![0; 8]].concat()),
    ];
    attack(
        bench,
        frames,
        |(what, _)| what,
        |rig, (_, bytes)| {
            rig.link.send_bytes(Code(0), bytes, &[])?;
            rig.link.end();
            Ok(1)
        },
    )
}

fn cut(bench: &mut Bench) -> Result<Outcome, Fault> {
    let codes = [
        Code::SET_FEATURES,
        Code::SET_PROTOCOL_FEATURES,
        Code::SET_MEM_TABLE,
        Code::ADD_MEM_REG,
        Code::REM_MEM_REG,
        Code::SET_LOG_BASE,
        Code::SET_VRING_NUM,
        Code::SET_VRING_BASE,
        Code::SET_VRING_ADDR,
        Code::SET_VRING_KICK,
        Code::SET_VRING_CALL,
        Code::SET_VRING_ENABLE,
        Code::GET_VRING_BASE,
        Code::GET_CONFIG,
        Code::SET_CONFIG,
        Code::GET_INFLIGHT_FD,
        Code::SET_INFLIGHT_FD,
    ];
    let name = |code: Code| code.name().unwrap_or("a request");
    send(bench, codes.into_iter().map(|code| message(name(code), code, &[1u8; 3], 1)).collect())
}

fn region(guest_phys_addr: u64, memory_size: u64, userspace_addr: u64, mmap_offset: u64) -> MemoryRegion {
    MemoryRegion { guest_phys_addr, memory_size, userspace_addr, mmap_offset }
}

fn memory(bench: &mut Bench) -> Result<Outcome, Fault> {
    let table = |count: u32, regions: &[MemoryRegion]| {
        [MemoryHeader { nregions: count, padding: 0 }.as_bytes(), regions.as_bytes()].concat()
    };
    let one = |what, bad, fds| Message { what, code: Code::SET_MEM_TABLE, payload: table(1, &[bad]), fds };
    let good = region(0, MIB, 0, 0);
    let overlap = table(2, &[good, region(MIB - 4096, MIB, MIB, 0)]);
    let mut all = vec![
        one("a table without fds", good, 0),
        one("a table with two fds for one region", good, 2),
        one("a region larger than its file", region(0, 2 * MIB, 0, 0), 1),
        one("a region behind its file", region(0, MIB, 0, MIB), 1),
        one("an offset that wraps", region(0, MIB, 0, u64::MAX - 4095), 1),
        one("a region that wraps", region(u64::MAX - 4095, MIB, 0, 0), 1),
        one("an empty region", region(0, 0, 0, 0), 1),
        Message { what: "overlapping regions", code: Code::SET_MEM_TABLE, payload: overlap, fds: 2 },
        Message { what: "2^32 - 1 regions", code: Code::SET_MEM_TABLE, payload: table(u32::MAX, &[good]), fds: 1 },
        Message { what: "a table shorter than it says", code: Code::SET_MEM_TABLE, payload: table(2, &[good]), fds: 2 },
    ];
    if bench.offer.speaks(protocol_feature::CONFIGURE_MEM_SLOTS) {
        let add = |region| MemRegMsg { padding: 0, region };
        let far = region(1 << 40, MIB, 1 << 40, 0);
        all.extend([
            message("an added region without an fd", Code::ADD_MEM_REG, &add(far), 0),
            message("an added region with two fds", Code::ADD_MEM_REG, &add(far), 2),
            message("an added region larger than its file", Code::ADD_MEM_REG, &add(region(1 << 40, 2 * MIB, 0, 0)), 1),
            message("an added region over another", Code::ADD_MEM_REG, &add(region(HIGH, MIB, 1 << 40, 0)), 1),
            message("the removal of no region", Code::REM_MEM_REG, &add(far), 0),
        ]);
    }
    send(bench, all)
}

fn rings(bench: &mut Bench) -> Result<Outcome, Fault> {
    let state = |index, num| VringState { index, num };
    let rig = bench.rig(0)?;
    let fine = rig.addr(&rig.ring, None);
    let end = rig.memory.regions().first().map_or(0, |region| {
        let MemoryRegion { userspace_addr, memory_size, .. } = describe(region);
        userspace_addr.wrapping_add(memory_size)
    });
    drop(rig);
    send(
        bench,
        vec![
            message("a size of 0", Code::SET_VRING_NUM, &state(0, 0), 0),
            message("a size that is no power of two", Code::SET_VRING_NUM, &state(0, 100), 0),
            message("a size of 2^31", Code::SET_VRING_NUM, &state(0, 1 << 31), 0),
            message("the size of ring 9999", Code::SET_VRING_NUM, &state(9999, 64), 0),
            message("the base of ring 2^32 - 1", Code::SET_VRING_BASE, &state(u32::MAX, 0), 0),
            message("the enabling of ring 9999", Code::SET_VRING_ENABLE, &state(9999, 1), 0),
            message("the stop of ring 9999", Code::GET_VRING_BASE, &state(9999, 0), 0),
            message("the kick of ring 255", Code::SET_VRING_KICK, &255u64, 1),
            message("a kick without its fd", Code::SET_VRING_KICK, &0u64, 0),
            message("a call with two fds", Code::SET_VRING_CALL, &0u64, 2),
            message("addresses of ring 9999", Code::SET_VRING_ADDR, &VringAddr { index: 9999, ..fine }, 0),
            message("descriptors outside memory", Code::SET_VRING_ADDR, &VringAddr { desc_user_addr: 16, ..fine }, 0),
            message(
                "an avail ring that leaves memory",
                Code::SET_VRING_ADDR,
                &VringAddr { avail_user_addr: end.wrapping_sub(8), ..fine },
                0,
            ),
            message(
                "a used ring that wraps",
                Code::SET_VRING_ADDR,
                &VringAddr { used_user_addr: u64::MAX - 7, ..fine },
                0,
            ),
        ],
    )
}

fn logs(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::LOG_SHMFD)?;
    let log = |mmap_size, mmap_offset| LogDescription { mmap_size, mmap_offset };
    send(
        bench,
        vec![
            message("a log without an fd", Code::SET_LOG_BASE, &log(4096, 0), 0),
            message("a log larger than its file", Code::SET_LOG_BASE, &log(2 * MIB, 0), 1),
            message("a log behind its file", Code::SET_LOG_BASE, &log(4096, MIB), 1),
            message("a log that wraps", Code::SET_LOG_BASE, &log(u64::MAX - 4095, 8192), 1),
            message("a log of no bytes", Code::SET_LOG_BASE, &log(0, 0), 1),
        ],
    )
}

fn config(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::CONFIG)?;
    let config = |offset, size| ConfigHeader { offset, size, flags: 0 };
    let with = |header: ConfigHeader, bytes: usize| [header.as_bytes(), &vec![0; bytes]].concat();
    let read = Code::GET_CONFIG;
    send(
        bench,
        vec![
            message("4 GiB of configuration", read, with(config(0, u32::MAX), 8).as_slice(), 0),
            message("configuration that wraps", read, with(config(u32::MAX, 8), 8).as_slice(), 0),
            message("configuration behind the end", read, with(config(4096, 8), 8).as_slice(), 0),
            message("more configuration than was sent", read, with(config(0, 256), 0).as_slice(), 0),
        ],
    )
}

fn describe_region(mmap_size: u64, mmap_offset: u64, num_queues: u16, queue_size: u16) -> InflightDescription {
    InflightDescription { mmap_size, mmap_offset, num_queues, queue_size, padding: [0; 4] }
}

fn regions(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::INFLIGHT_SHMFD)?;
    let set = Code::SET_INFLIGHT_FD;
    send(
        bench,
        vec![
            message("a region without an fd", set, &describe_region(65536, 0, 1, 64), 0),
            message("a region larger than its file", set, &describe_region(2 * MIB, 0, 1, 64), 1),
            message("a region that wraps", set, &describe_region(u64::MAX - 4095, 8192, 1, 64), 1),
            message("a region too small for its queues", set, &describe_region(64, 0, 1, 256), 1),
            message("a region for 65535 queues", set, &describe_region(MIB, 0, u16::MAX, u16::MAX), 1),
            message("a region for no queue", set, &describe_region(65536, 0, 0, 64), 1),
            message(
                "a region for 65535 queues, asked for",
                Code::GET_INFLIGHT_FD,
                &describe_region(0, 0, 65535, 65535),
                0,
            ),
        ],
    )
}

fn noise(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::INFLIGHT_SHMFD)?;
    attack_rings(
        bench,
        1..=NOISES,
        |_| "a region of noise",
        |rig, seed| {
            let (size, queues) = (rig.ring.layout.size(), rig.ring.index as u16 + 1);
            let kind = if rig.ring.is_packed() { RingKind::Packed } else { RingKind::Split };
            let part = kind.queue_bytes(size) as usize;
            // As large as its entries.
            let header = match kind {
                RingKind::Split => SPLIT_HEADER_BYTES,
                RingKind::Packed => PACKED_HEADER_BYTES,
            } as usize;
            let bytes = part as u64 * u64::from(queues);
            let fd = sealed_memfd("noise", bytes)?;
            let mut contents = super::harness::noise(*seed, bytes as u32);
            // A version and a size that are right lead recovery to the rest.
            let head = [VERSION.to_le_bytes(), size.to_le_bytes()].concat();
            for contents in contents.chunks_exact_mut(part) {
                if let Some(place) = contents.get_mut(8..12) {
                    place.copy_from_slice(&head);
                }
                // Marks and links that could be, in every other region.
                if seed.is_multiple_of(2) {
                    for entry in contents.get_mut(header..).unwrap_or_default().chunks_exact_mut(header) {
                        if let [mark, .., _] = entry {
                            *mark &= 1;
                        }
                    }
                }
            }
            File::from(fd.try_clone()?).write_all_at(&contents, 0)?;
            rig.stop()?;
            rig.done(Code::SET_INFLIGHT_FD, describe_region(bytes, 0, queues, size).as_bytes(), &[fd.as_fd()])?;
            rig.start_disabled(None)?;
            rig.enable(true)?;
            // It was believed, and something may be found to do.
            Ok(1)
        },
    )
}

fn descriptors(bench: &mut Bench) -> Result<Outcome, Fault> {
    const NEXT: u16 = DESC_F_NEXT;
    const WRITE: u16 = DESC_F_WRITE;
    let packed = bench.shape.packed;
    // A link of a split ring is the name of a request in a packed one, where it may be anything.
    let desc = |addr: u64, len: u32, flags: u16, next: u16| match packed {
        false => {
            Desc { addr: addr.into(), len: len.into(), flags: flags.into(), next: next.into() }.as_bytes().to_vec()
        }
        true => {
            let flags = flags | 1 << PACKED_DESC_F_AVAIL;
            PackedDesc { addr: addr.into(), len: len.into(), id: next.into(), flags: flags.into() }.as_bytes().to_vec()
        }
    };
    let whole: Vec<_> = (0..1024).map(|id| desc(HIGH, 16, NEXT, id)).collect();
    // Descriptors, the head that is made available, and the avail index.
    let all = [
        ("a loop", vec![desc(HIGH, 16, NEXT, 1), desc(HIGH, 16, NEXT, 0)], 0u16, 1u16),
        ("a loop of one", vec![desc(HIGH, 16, NEXT, 0)], 0, 1),
        ("a chain through the whole ring", whole, 0, 1),
        ("a next outside the table", vec![desc(HIGH, 16, NEXT, 60000)], 0, 1),
        ("a head outside the table", vec![desc(HIGH, 16, 0, 60000)], 60000, 1),
        ("an avail index that ran away", vec![desc(HIGH, 16, 0, 0)], 0, 30000),
        ("a buffer outside memory", vec![desc(1 << 50, 512, WRITE, 0)], 0, 1),
        ("a buffer that wraps", vec![desc(u64::MAX - 15, 512, WRITE, 0)], 0, 1),
        ("buffers of 4 GiB", vec![desc(HIGH, u32::MAX, NEXT, 1), desc(HIGH, u32::MAX, WRITE, 0)], 0, 1),
        ("nothing to read", vec![desc(HIGH, 512, WRITE, 0)], 0, 1),
        ("nothing to write", vec![desc(HIGH, 16, 0, 0)], 0, 1),
        ("a buffer of no bytes", vec![desc(HIGH, 0, 0, 0)], 0, 1),
        ("readable behind writable", vec![desc(HIGH, 16, NEXT | WRITE, 1), desc(HIGH, 16, 0, 0)], 0, 1),
        ("an indirect table of 7 bytes", vec![desc(HIGH, 7, DESC_F_INDIRECT, 0)], 0, 1),
        ("an indirect table outside memory", vec![desc(1 << 50, 32, DESC_F_INDIRECT, 0)], 0, 1),
    ];
    attack_rings(
        bench,
        all,
        |(what, ..)| what,
        |rig, (_, descs, head, index)| {
            let [desc, driver, _] = rig.ring.layout.areas();
            let room = usize::from(rig.ring.layout.size());
            rig.memory.write(desc, &descs.iter().take(room).flatten().copied().collect::<Vec<u8>>())?;
            if !rig.ring.is_packed() {
                rig.memory.write(driver + 4, &head.to_le_bytes())?;
                rig.memory.write(driver + 2, &index.to_le_bytes())?;
            }
            Ok(1)
        },
    )
}
