//! Invalid messages and rings. The back-end must refuse them or close the connection, and must serve the next
//! front-end.
//!
//! Each is sent on a connection of its own with a running ring, where errors of a back-end are most visible.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use zerocopy::{Immutable, IntoBytes};

use super::harness::{HIGH, Harness, RequestSize, describe};
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::target::Target;
use crate::abi::inflight::{PACKED_HEADER_BYTES, SPLIT_HEADER_BYTES, VERSION};
use crate::abi::vhost_user::{
    ConfigHeader, FrontendRequest as Code, Header, InflightDescription, LogDescription, MemRegMsg, MemoryHeader,
    MemoryRegion, ProtocolFeatures, VringAddr, VringState,
};
use crate::abi::virtio::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, PACKED_DESC_F_AVAIL, PackedDesc, VirtioFeatures,
};
use crate::inflight::RingKind;
use crate::memory::{Address, sealed_memfd};
use crate::sys::with_causes::with_causes;

const MIB: u64 = 1 << 20;
const VERSION_FLAG: u32 = Header::FLAG_VERSION;
/// Number of inflight regions filled with noise.
const NOISE_REGIONS: u64 = 20;

/// A message that must be refused. Its fds are of a memfd of 1 MiB.
struct HostileMessage {
    what: &'static str,
    code: Code,
    payload: Vec<u8>,
    fds: usize,
}

fn message(what: &'static str, code: Code, body: &(impl IntoBytes + Immutable + ?Sized), fds: usize) -> HostileMessage {
    HostileMessage { what, code, payload: body.as_bytes().to_vec(), fds }
}

/// Responses of a back-end to invalid messages.
#[derive(Default)]
struct HostileTally {
    refused: u32,
    hung_up: u32,
    accepted: Vec<&'static str>,
}

impl HostileTally {
    fn outcome(self) -> Outcome {
        let HostileTally { refused, hung_up, accepted } = self;
        let seen = format!("survived; {refused} refused or ignored, {hung_up} closed the connection");
        match accepted.is_empty() {
            true => Outcome::pass(seen),
            false => Outcome::warning(format!("{seen}; acknowledged as done: {}", accepted.join(", "))),
        }
    }
}

/// Fails if the next front-end is not served.
pub(super) fn serves(target: &Target) -> Result<(), CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    harness.run_batch(2, RequestSize::Mixed)
}

/// Runs `attempt` for each item with a front-end of its own. Then the next front-end must be served.
pub(super) fn attack<T>(
    target: &Target,
    all: impl IntoIterator<Item = T>,
    name: impl Fn(&T) -> &'static str,
    attempt: impl Fn(&mut Harness, &T) -> Result<u64, CheckAbort>,
) -> Result<Outcome, CheckAbort> {
    let mut tally = HostileTally::default();
    for thing in all {
        let what = name(&thing);
        let mut harness = target.started(VirtioFeatures::empty())?;
        match attempt(&mut harness, &thing) {
            Ok(0) => tally.accepted.push(what),
            Ok(_) | Err(CheckAbort::Refused { .. }) => tally.refused += 1,
            Err(CheckAbort::HungUp { .. }) => tally.hung_up += 1,
            Err(abort) => {
                let Outcome(verdict, seen) = abort.into();
                return Ok(Outcome(verdict, format!("{what}: {seen}")));
            }
        }
        drop(harness);
        if let Err(abort) = serves(target) {
            return Ok(Outcome::fail(format!("{what}: the next front-end is not served: {}", with_causes(&abort))));
        }
    }
    Ok(tally.outcome())
}

/// Like [`attack`], for ring contents, which a back-end may process later.
fn attack_rings<T>(
    target: &Target,
    all: impl IntoIterator<Item = T>,
    name: impl Fn(&T) -> &'static str,
    attempt: impl Fn(&mut Harness, &T) -> Result<u64, CheckAbort>,
) -> Result<Outcome, CheckAbort> {
    let outcome = attack(target, all, name, |harness, thing| {
        let answer = attempt(harness, thing)?;
        harness.kick();
        thread::sleep(target.options.settle / 8);
        // A broken ring need not be served, but the connection must be.
        harness.connection.barrier().map(|_| answer)
    })?;
    if outcome.0 == Verdict::Fail {
        // The failing item is known; later front-ends are not served.
        return Ok(outcome);
    }
    thread::sleep(target.options.settle);
    Ok(match serves(target) {
        Ok(()) => outcome,
        Err(abort) => {
            Outcome::fail(format!("after all of them the next front-end is not served: {}", with_causes(&abort)))
        }
    })
}

fn send(target: &Target, all: Vec<HostileMessage>) -> Result<Outcome, CheckAbort> {
    let file = sealed_memfd("hostile", MIB)?;
    let acks = target.offered.has_protocol(ProtocolFeatures::REPLY_ACK);
    attack(
        target,
        all,
        |message| message.what,
        |harness, HostileMessage { code, payload, fds, .. }| {
            let fds: Vec<BorrowedFd<'_>> = (0..*fds).map(|_| file.as_fd()).collect();
            if acks {
                harness.connection.send(*code, VERSION_FLAG | Header::FLAG_NEED_REPLY, payload, &fds)?;
                let reply = harness.connection.reply(*code)?;
                // Requests with replies of their own report errors in different ways. An accepted log has a reply that
                // is not a u64 (rule F7.1).
                let tally = *code == Code::SET_LOG_BASE && reply.payload.len() != size_of::<u64>();
                return Ok(if tally { 0 } else { reply.read().unwrap_or(1) });
            }
            harness.connection.send(*code, VERSION_FLAG, payload, &fds)?;
            harness.connection.barrier().map(|_| 1)
        },
    )
}

pub(super) fn invalid_headers(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let header = |request, flags, size| Header { request, flags, size }.as_bytes().to_vec();
    let frames = [
        ("version 0", header(1, 0, 0)),
        ("version 2", header(1, 2, 0)),
        ("a payload of 4 GiB", header(5, 1, u32::MAX)),
        ("a payload of 1 MiB", header(5, 1, 1 << 20)),
        ("noise", vec![0xff; 64]),
        ("half a header", vec![1, 0, 0, 0, 1]),
        ("a header without its payload", header(2, 1, 8)),
        ("an unsolicited reply", [header(2, 5, 8), vec![0; 8]].concat()),
    ];
    attack(
        target,
        frames,
        |(what, _)| what,
        |harness, (_, bytes)| {
            harness.connection.send_bytes(Code(0), bytes, &[])?;
            harness.connection.close();
            Ok(1)
        },
    )
}

pub(super) fn truncated_payloads(target: &mut Target) -> Result<Outcome, CheckAbort> {
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
    send(target, codes.into_iter().map(|code| message(name(code), code, &[1u8; 3], 1)).collect())
}

fn region(guest_phys_addr: u64, memory_size: u64, userspace_addr: u64, mmap_offset: u64) -> MemoryRegion {
    MemoryRegion { guest_phys_addr, memory_size, userspace_addr, mmap_offset }
}

pub(super) fn memory_tables(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let table = |count: u32, regions: &[MemoryRegion]| {
        [MemoryHeader { nregions: count, padding: 0 }.as_bytes(), regions.as_bytes()].concat()
    };
    let one = |what, bad, fds| HostileMessage { what, code: Code::SET_MEM_TABLE, payload: table(1, &[bad]), fds };
    let good = region(0, MIB, 0, 0);
    let overlap = table(2, &[good, region(MIB - 4096, MIB, MIB, 0)]);
    let mut all = vec![
        one("a table without fds", good, 0),
        one("a table with two fds for one region", good, 2),
        one("a region larger than its file", region(0, 2 * MIB, 0, 0), 1),
        one("a region beyond its file", region(0, MIB, 0, MIB), 1),
        one("an offset that wraps", region(0, MIB, 0, u64::MAX - 4095), 1),
        one("a region that wraps", region(u64::MAX - 4095, MIB, 0, 0), 1),
        one("an empty region", region(0, 0, 0, 0), 1),
        HostileMessage { what: "overlapping regions", code: Code::SET_MEM_TABLE, payload: overlap, fds: 2 },
        HostileMessage {
            what: "2^32 - 1 regions",
            code: Code::SET_MEM_TABLE,
            payload: table(u32::MAX, &[good]),
            fds: 1,
        },
        HostileMessage {
            what: "a table shorter than its number of regions",
            code: Code::SET_MEM_TABLE,
            payload: table(2, &[good]),
            fds: 2,
        },
    ];
    if target.offered.has_protocol(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        let add = |region| MemRegMsg { padding: 0, region };
        let far = region(1 << 40, MIB, 1 << 40, 0);
        all.extend([
            message("an added region without an fd", Code::ADD_MEM_REG, &add(far), 0),
            message("an added region with two fds", Code::ADD_MEM_REG, &add(far), 2),
            message("an added region larger than its file", Code::ADD_MEM_REG, &add(region(1 << 40, 2 * MIB, 0, 0)), 1),
            message(
                "an added region that overlaps another",
                Code::ADD_MEM_REG,
                &add(region(HIGH.0, MIB, 1 << 40, 0)),
                1,
            ),
            message("the removal of a missing region", Code::REM_MEM_REG, &add(far), 0),
        ]);
    }
    send(target, all)
}

pub(super) fn ring_parameters(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let state = |index, num| VringState { index, num };
    let harness = target.harness(VirtioFeatures::empty())?;
    let fine = harness.vring_addr(&harness.ring, None);
    let end = harness.memory.regions().first().map_or(0, |region| {
        let MemoryRegion { userspace_addr, memory_size, .. } = describe(region);
        userspace_addr.wrapping_add(memory_size)
    });
    drop(harness);
    send(
        target,
        vec![
            message("a size of 0", Code::SET_VRING_NUM, &state(0, 0), 0),
            message("a size that is not a power of two", Code::SET_VRING_NUM, &state(0, 100), 0),
            message("a size of 2^31", Code::SET_VRING_NUM, &state(0, 1 << 31), 0),
            message("the size of ring 9999", Code::SET_VRING_NUM, &state(9999, 64), 0),
            message("the base of ring 2^32 - 1", Code::SET_VRING_BASE, &state(u32::MAX, 0), 0),
            message("enabling ring 9999", Code::SET_VRING_ENABLE, &state(9999, 1), 0),
            message("stopping ring 9999", Code::GET_VRING_BASE, &state(9999, 0), 0),
            message("the kick of ring 255", Code::SET_VRING_KICK, &255u64, 1),
            message("a kick without its fd", Code::SET_VRING_KICK, &0u64, 0),
            message("a call with two fds", Code::SET_VRING_CALL, &0u64, 2),
            message("addresses of ring 9999", Code::SET_VRING_ADDR, &VringAddr { index: 9999, ..fine }, 0),
            message("descriptors outside memory", Code::SET_VRING_ADDR, &VringAddr { desc_user_addr: 16, ..fine }, 0),
            message(
                "an avail ring that crosses the end of memory",
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

pub(super) fn logs(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::LOG_SHMFD)?;
    let log = |mmap_size, mmap_offset| LogDescription { mmap_size, mmap_offset };
    send(
        target,
        vec![
            message("a log without an fd", Code::SET_LOG_BASE, &log(4096, 0), 0),
            message("a log larger than its file", Code::SET_LOG_BASE, &log(2 * MIB, 0), 1),
            message("a log beyond its file", Code::SET_LOG_BASE, &log(4096, MIB), 1),
            message("a log that wraps", Code::SET_LOG_BASE, &log(u64::MAX - 4095, 8192), 1),
            message("a log of no bytes", Code::SET_LOG_BASE, &log(0, 0), 1),
        ],
    )
}

pub(super) fn configuration_ranges(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::CONFIG)?;
    let config = |offset, size| ConfigHeader { offset, size, flags: 0 };
    let with = |header: ConfigHeader, bytes: usize| [header.as_bytes(), &vec![0; bytes]].concat();
    let read = Code::GET_CONFIG;
    send(
        target,
        vec![
            message("4 GiB of configuration", read, with(config(0, u32::MAX), 8).as_slice(), 0),
            message("configuration that wraps", read, with(config(u32::MAX, 8), 8).as_slice(), 0),
            message("configuration beyond the end", read, with(config(4096, 8), 8).as_slice(), 0),
            message("more configuration than the payload has", read, with(config(0, 256), 0).as_slice(), 0),
        ],
    )
}

fn describe_region(mmap_size: u64, mmap_offset: u64, num_queues: u16, queue_size: u16) -> InflightDescription {
    InflightDescription { mmap_size, mmap_offset, num_queues, queue_size, padding: [0; 4] }
}

pub(super) fn inflight_regions(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::INFLIGHT_SHMFD)?;
    let set = Code::SET_INFLIGHT_FD;
    send(
        target,
        vec![
            message("a region without an fd", set, &describe_region(65536, 0, 1, 64), 0),
            message("a region larger than its file", set, &describe_region(2 * MIB, 0, 1, 64), 1),
            message("a region that wraps", set, &describe_region(u64::MAX - 4095, 8192, 1, 64), 1),
            message("a region too small for its queues", set, &describe_region(64, 0, 1, 256), 1),
            message("a region for 65535 queues", set, &describe_region(MIB, 0, u16::MAX, u16::MAX), 1),
            message("a region for no queue", set, &describe_region(65536, 0, 0, 64), 1),
            message(
                "a requested region for 65535 queues",
                Code::GET_INFLIGHT_FD,
                &describe_region(0, 0, 65535, 65535),
                0,
            ),
        ],
    )
}

pub(super) fn inflight_noise(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::INFLIGHT_SHMFD)?;
    attack_rings(
        target,
        1..=NOISE_REGIONS,
        |_| "a region of noise",
        |harness, seed| {
            let (size, queues) = (harness.ring.layout.size(), harness.ring.index as u16 + 1);
            let kind = if harness.ring.is_packed() { RingKind::Packed } else { RingKind::Split };
            let part = kind.queue_bytes(size) as usize;
            // Entries have the size of the header.
            let header = match kind {
                RingKind::Split => SPLIT_HEADER_BYTES,
                RingKind::Packed => PACKED_HEADER_BYTES,
            } as usize;
            let bytes = part as u64 * u64::from(queues);
            let fd = sealed_memfd("noise", bytes)?;
            let mut contents = super::pages::noise(*seed, bytes as u32);
            // A valid version and size make recovery process the rest.
            let head = [VERSION.to_le_bytes(), size.to_le_bytes()].concat();
            for contents in contents.chunks_exact_mut(part) {
                if let Some(place) = contents.get_mut(8..12) {
                    place.copy_from_slice(&head);
                }
                // Valid marks and links in every other region.
                if seed.is_multiple_of(2) {
                    for entry in contents.get_mut(header..).unwrap_or_default().chunks_exact_mut(header) {
                        if let [mark, .., _] = entry {
                            *mark &= 1;
                        }
                    }
                }
            }
            File::from(fd.try_clone()?).write_all_at(&contents, 0)?;
            harness.stop()?;
            harness.send_acked(
                Code::SET_INFLIGHT_FD,
                describe_region(bytes, 0, queues, size).as_bytes(),
                &[fd.as_fd()],
            )?;
            harness.start_disabled(None)?;
            harness.enable(true)?;
            // The region was accepted, and recovery may find work in it.
            Ok(1)
        },
    )
}

pub(super) fn invalid_descriptors(target: &mut Target) -> Result<Outcome, CheckAbort> {
    const NEXT: u16 = DESC_F_NEXT;
    const WRITE: u16 = DESC_F_WRITE;
    let packed = target.variant.packed;
    // In a packed ring the field of `next` holds the buffer id, which may have any value.
    let desc = |addr: u64, len: u32, flags: u16, next: u16| match packed {
        false => {
            Desc { addr: addr.into(), len: len.into(), flags: flags.into(), next: next.into() }.as_bytes().to_vec()
        }
        true => {
            let flags = flags | 1 << PACKED_DESC_F_AVAIL;
            PackedDesc { addr: addr.into(), len: len.into(), id: next.into(), flags: flags.into() }.as_bytes().to_vec()
        }
    };
    let whole: Vec<_> = (0..1024).map(|id| desc(HIGH.0, 16, NEXT, id)).collect();
    // Descriptors, head of the available chain, and avail index.
    let all = [
        ("a loop", vec![desc(HIGH.0, 16, NEXT, 1), desc(HIGH.0, 16, NEXT, 0)], 0u16, 1u16),
        ("a loop of one", vec![desc(HIGH.0, 16, NEXT, 0)], 0, 1),
        ("a chain longer than the ring", whole, 0, 1),
        ("a next outside the table", vec![desc(HIGH.0, 16, NEXT, 60000)], 0, 1),
        ("a head outside the table", vec![desc(HIGH.0, 16, 0, 60000)], 60000, 1),
        ("an avail index far ahead", vec![desc(HIGH.0, 16, 0, 0)], 0, 30000),
        ("a buffer outside memory", vec![desc(1 << 50, 512, WRITE, 0)], 0, 1),
        ("a buffer that wraps", vec![desc(u64::MAX - 15, 512, WRITE, 0)], 0, 1),
        ("buffers of 4 GiB", vec![desc(HIGH.0, u32::MAX, NEXT, 1), desc(HIGH.0, u32::MAX, WRITE, 0)], 0, 1),
        ("no readable descriptor", vec![desc(HIGH.0, 512, WRITE, 0)], 0, 1),
        ("no writable descriptor", vec![desc(HIGH.0, 16, 0, 0)], 0, 1),
        ("a buffer of no bytes", vec![desc(HIGH.0, 0, 0, 0)], 0, 1),
        ("readable after writable descriptors", vec![desc(HIGH.0, 16, NEXT | WRITE, 1), desc(HIGH.0, 16, 0, 0)], 0, 1),
        ("an indirect table of 7 bytes", vec![desc(HIGH.0, 7, DESC_F_INDIRECT, 0)], 0, 1),
        ("an indirect table outside memory", vec![desc(1 << 50, 32, DESC_F_INDIRECT, 0)], 0, 1),
    ];
    attack_rings(
        target,
        all,
        |(what, ..)| what,
        |harness, (_, descs, head, index)| {
            let [desc, driver, _] = harness.ring.layout.areas();
            let room = usize::from(harness.ring.layout.size());
            harness.memory.write(desc, &descs.iter().take(room).flatten().copied().collect::<Vec<u8>>())?;
            if !harness.ring.is_packed() {
                harness.memory.write(driver.unchecked_add(4), &head.to_le_bytes())?;
                harness.memory.write(driver.unchecked_add(2), &index.to_le_bytes())?;
            }
            Ok(1)
        },
    )
}
