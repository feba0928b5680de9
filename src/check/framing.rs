//! Rules F1 to F6 and F8: messages, replies, and call fds.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;

use super::connection::readable;
use super::harness::{Harness, RequestSize, describe};
use super::outcome::{CheckAbort, Outcome};
use super::target::Target;
use crate::abi::vhost_user::{
    ConfigHeader, FrontendRequest as Code, Header, InflightDescription, MemoryHeader, MemoryRegion, ProtocolFeatures,
    VringAddr, VringState,
};
use crate::abi::virtio::VirtioFeatures;

const VERSION: u32 = Header::FLAG_VERSION;
const NEED_REPLY: u32 = Header::FLAG_VERSION | Header::FLAG_NEED_REPLY;
/// A request code that no specification defines.
const UNKNOWN: Code = Code(4711);

pub(super) fn segments(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    harness.connection.send_in_parts(Code::SET_FEATURES, VERSION, harness.features.as_bytes(), &[])?;
    harness.connection.barrier()?;
    harness.connection.send_in_parts(Code::SET_MEM_TABLE, VERSION, &harness.memory_table(), &harness.fds())?;
    harness.connection.barrier()?;
    harness.connection.send_in_parts(Code::GET_VRING_BASE, VERSION, VringState { index: 0, num: 0 }.as_bytes(), &[])?;
    harness.connection.reply(Code::GET_VRING_BASE)?;
    Ok(Outcome::pass("SET_FEATURES, SET_MEM_TABLE with its fds, GET_VRING_BASE"))
}

/// Returns the offered requests that have a reply of their own: payload, and length of the reply.
fn requests_with_reply(target: &Target) -> Vec<(Code, Vec<u8>, usize)> {
    let config = ConfigHeader { offset: 0, size: 8, flags: 0 };
    let inflight = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: 64, padding: [0; 4] };
    let state = VringState { index: 0, num: 0 }.as_bytes().to_vec();
    let all = [
        (None, Code::GET_FEATURES, Vec::new(), 8),
        (None, Code::GET_PROTOCOL_FEATURES, Vec::new(), 8),
        (None, Code::GET_VRING_BASE, state, 8),
        (Some(ProtocolFeatures::MQ), Code::GET_QUEUE_NUM, Vec::new(), 8),
        (Some(ProtocolFeatures::CONFIGURE_MEM_SLOTS), Code::GET_MAX_MEM_SLOTS, Vec::new(), 8),
        (Some(ProtocolFeatures::STATUS), Code::GET_STATUS, Vec::new(), 8),
        (Some(ProtocolFeatures::CONFIG), Code::GET_CONFIG, [config.as_bytes(), &[0; 8]].concat(), 20),
        (Some(ProtocolFeatures::INFLIGHT_SHMFD), Code::GET_INFLIGHT_FD, inflight.as_bytes().to_vec(), 24),
    ];
    let offered =
        |feature: Option<ProtocolFeatures>| feature.is_none_or(|feature| target.offered.has_protocol(feature));
    let all = all.into_iter().filter(|(feature, ..)| offered(*feature));
    all.map(|(_, code, payload, length)| (code, payload, length)).collect()
}

pub(super) fn reply_flags(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    let asked = target.offered.has_protocol(ProtocolFeatures::REPLY_ACK).then_some(NEED_REPLY);
    for (code, payload, _) in requests_with_reply(target) {
        for flags in [VERSION].into_iter().chain(asked) {
            harness.connection.send(code, flags, &payload, &[])?;
            // Rule F3.1 covers which reply it is.
            harness.connection.receive(code)?;
        }
    }
    Ok(target.replies.borrow().outcome())
}

pub(super) fn replies(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    let flags = if target.offered.has_protocol(ProtocolFeatures::REPLY_ACK) { NEED_REPLY } else { VERSION };
    let (mut names, mut odd) = (Vec::new(), Vec::new());
    for (code, payload, length) in requests_with_reply(target) {
        harness.connection.send(code, flags, &payload, &[])?;
        let got = harness.connection.reply(code)?.payload.len();
        if got != length {
            odd.push(format!("{code} has {got} bytes, not {length}"));
        }
        // A second reply would arrive before this one.
        let next = if code == Code::GET_FEATURES { Code::GET_PROTOCOL_FEATURES } else { Code::GET_FEATURES };
        harness.connection.request_u64(next)?;
        names.push(code.to_string());
    }
    Ok(match odd.is_empty() {
        true => Outcome::pass(names.join(", ")),
        false => Outcome::fail(odd.join("; ")),
    })
}

pub(super) fn acknowledgements(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::REPLY_ACK)?;
    let harness = target.harness(VirtioFeatures::empty())?;
    let index = 0u64.as_bytes();
    let size = VringState { index: 0, num: harness.ring.layout.size().into() };
    let (base, addr) =
        (VringState { index: 0, num: 0 }, VringAddr { index: 0, ..harness.vring_addr(&harness.ring, None) });
    let messages: [(Code, &[u8], Vec<_>); 8] = [
        (Code::SET_FEATURES, harness.features.as_bytes(), vec![]),
        (Code::SET_MEM_TABLE, &harness.memory_table(), harness.fds()),
        (Code::SET_VRING_CALL, index, vec![harness.ring.call.as_fd()]),
        (Code::SET_VRING_NUM, size.as_bytes(), vec![]),
        (Code::SET_VRING_BASE, base.as_bytes(), vec![]),
        (Code::SET_VRING_ADDR, addr.as_bytes(), vec![]),
        (Code::SET_VRING_KICK, index, vec![harness.ring.kick.as_fd()]),
        (Code::SET_VRING_ENABLE, base.as_bytes(), vec![]),
    ];
    let count = messages.len();
    for (code, payload, fds) in messages {
        match harness.connection.request_ack(code, payload, &fds)? {
            0 => {}
            answer => return Err(CheckAbort::Refused { code, answer }),
        }
        harness.connection.barrier()?;
    }
    Ok(Outcome::pass(format!("{count} messages with one reply each")))
}

pub(super) fn message_order(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    let codes = [Code::GET_FEATURES, Code::GET_PROTOCOL_FEATURES, Code::GET_FEATURES, Code::GET_FEATURES];
    let sent: Vec<Code> = codes.into_iter().cycle().take(64).collect();
    for code in &sent {
        harness.connection.send(*code, VERSION, &[], &[])?;
    }
    for code in &sent {
        harness.connection.reply(*code)?;
    }
    Ok(Outcome::pass(format!("{} requests sent before the first reply was read", sent.len())))
}

pub(super) fn unknown_with_need_reply(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::REPLY_ACK)?;
    let harness = target.harness(VirtioFeatures::empty())?;
    // The other end of the pipe shows if the back-end closed the fd.
    let (ours, theirs) = std::io::pipe()?;
    let answer = {
        let fds = [theirs.as_fd()];
        harness.connection.request_ack(UNKNOWN, &[1; 100], &fds)?
    };
    drop(theirs);
    harness.connection.barrier()?;
    if answer == 0 {
        return Ok(Outcome::fail("request 4711 was acknowledged as done"));
    }
    Ok(match closed(&harness, ours) {
        true => Outcome::pass(format!("reply {answer:#x}; the attached fd was closed")),
        false => Outcome::fail(format!("reply {answer:#x}, but the attached fd was not closed")),
    })
}

fn closed(harness: &Harness, mut pipe: std::io::PipeReader) -> bool {
    readable(&[pipe.as_fd()], &harness.deadline(harness.short_wait()))
        && pipe.read(&mut [0]).is_ok_and(|count| count == 0)
}

pub(super) fn unknown_without_need_reply(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    harness.connection.send(UNKNOWN, VERSION, &[1; 100], &[])?;
    harness.connection.barrier()?;
    Ok(Outcome::pass("the next request was served"))
}

pub(super) fn padded_memory_table(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = target.harness(VirtioFeatures::empty())?;
    let Some((region, fd)) = harness.memory.regions().first().and_then(|region| Some((region, region.shared()?.0)))
    else {
        return Ok(Outcome::not_tested("no memory"));
    };
    let mut table = MemoryHeader { nregions: 1, padding: 0 }.as_bytes().to_vec();
    table.extend(describe(region).as_bytes());
    table.extend([0; size_of::<MemoryRegion>()]);
    harness.send_acked(Code::SET_MEM_TABLE, &table, &[fd])?;
    Ok(Outcome::pass(format!("{} bytes with one region", table.len())))
}

pub(super) fn socket_as_call_fd(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    let (ours, theirs) = UnixStream::pair()?;
    harness.send_acked(Code::SET_VRING_CALL, u64::from(harness.ring.index).as_bytes(), &[theirs.as_fd()])?;
    drop(theirs);
    harness.add(4, RequestSize::Mixed)?;
    harness.publish();
    let deadline = harness.deadline(harness.timeout);
    let (mut buf, mut bytes) = ([0; 4096], 0);
    // Notifications are not suppressed: at least one must arrive, even if all requests are complete by now.
    while harness.outstanding() > 0 || bytes == 0 {
        if harness.pop()? {
            continue;
        }
        if !readable(&[ours.as_fd()], &deadline) {
            return Ok(Outcome::fail(format!("no notification within {:?}", harness.timeout)));
        }
        match (&ours).read(&mut buf)? {
            0 => return Ok(Outcome::fail("the back-end closed the socket")),
            count => bytes += count,
        }
    }
    Ok(match bytes % 8 {
        0 => Outcome::pass(format!("{} for 4 requests", bytes / 8)),
        _ => Outcome::fail(format!("{bytes} bytes, which is not a multiple of 8")),
    })
}
