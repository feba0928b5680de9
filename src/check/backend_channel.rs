//! Rules B1 and B3: the back-end channel and in-band notifications.
//!
//! Without in-band notifications a back-end has no reason to use its channel. The checks then only verify that the loss
//! of the channel has no other effect.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::SndBuf};
use zerocopy::{FromBytes, IntoBytes};

use super::connection::{BackendMessage, readable};
use super::harness::{Harness, MAX_REQUESTS, RequestSize, wait_until};
use super::outcome::{CheckAbort, Outcome};
use super::stop::Deadline;
use super::target::Target;
use crate::abi::vhost_user::{
    BackendRequest, FrontendRequest as Code, Header, ProtocolFeatures, VRING_NOFD_MASK, VringState,
};

/// Number of batches whose notifications stay unread; more than fit into the socket.
const UNREAD: u32 = 64;
/// Number of batches with in-band kicks and calls.
const BATCHES: u32 = 20;
const BATCH: u64 = 4;
/// Maximum number of reads while waiting for the end of a channel; more than can be unread.
const MAX_READS: u32 = 1024;

/// Front-end's end of a back-end channel.
pub(super) struct BackendChannel(UnixStream);

impl BackendChannel {
    /// Sends SET_BACKEND_REQ_FD.
    pub(super) fn set_backend_req_fd(harness: &Harness) -> Result<BackendChannel, CheckAbort> {
        let (ours, theirs) = UnixStream::pair()?;
        BackendChannel::install_pair(harness, ours, &theirs)
    }

    fn install_pair(harness: &Harness, ours: UnixStream, theirs: &UnixStream) -> Result<BackendChannel, CheckAbort> {
        ours.set_read_timeout(Some(harness.timeout))?;
        ours.set_write_timeout(Some(harness.timeout))?;
        harness.send_acked(Code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Ok(BackendChannel(ours))
    }

    /// Receives the next message before `deadline`. If it needs a reply, replies with 0 to known requests and with 1 to
    /// others.
    pub(super) fn receive(&self, deadline: &Deadline) -> Result<Option<(BackendRequest, Vec<u8>)>, CheckAbort> {
        if !readable(&[self.0.as_fd()], deadline) {
            return Ok(None);
        }
        let Some(message) = BackendMessage::receive(&self.0)? else {
            return Err(CheckAbort::Violation("the back-end closed the channel".into()));
        };
        let known = [BackendRequest::VRING_CALL, BackendRequest::VRING_ERR, BackendRequest::CONFIG_CHANGE_MSG];
        message.acknowledge(&self.0, u64::from(!known.contains(&message.code)))?;
        Ok(Some((message.code, message.body)))
    }

    /// Returns true if the back-end closes the channel before `deadline`. Messages before that are ignored.
    fn closes_before(&self, deadline: &Deadline) -> bool {
        let mut buffer = [0; 4096];
        for _ in 0..MAX_READS {
            if !readable(&[self.0.as_fd()], deadline) {
                return false;
            }
            // A socket closed with unread data fails with a reset.
            if !(&self.0).read(&mut buffer).is_ok_and(|count| count > 0) {
                return true;
            }
        }
        false
    }
}

/// Kind of notifications of a ring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NotifyMethod {
    Fds,
    Messages,
}

impl NotifyMethod {
    /// Returns a harness with these notifications negotiated and without a back-end channel.
    fn harness(self, target: &Target) -> Result<Harness, CheckAbort> {
        if self == NotifyMethod::Fds {
            return target.harness_with_protocol(ProtocolFeatures::BACKEND_REQ);
        }
        target.offered.require_protocol(ProtocolFeatures::INBAND_NOTIFICATIONS)?;
        match target.offered.has_protocol(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK) {
            true => {
                target.harness_with_protocol(ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::INBAND_NOTIFICATIONS)
            }
            false => {
                Err(CheckAbort::Violation("INBAND_NOTIFICATIONS is offered without BACKEND_REQ and REPLY_ACK".into()))
            }
        }
    }

    /// Returns the offered kinds.
    fn offered(target: &Target) -> impl Iterator<Item = NotifyMethod> + use<> {
        let messages = target.offered.has_protocol(ProtocolFeatures::INBAND_NOTIFICATIONS);
        std::iter::once(NotifyMethod::Fds).chain(messages.then_some(NotifyMethod::Messages))
    }

    fn name(self) -> &'static str {
        match self {
            NotifyMethod::Fds => "fds",
            NotifyMethod::Messages => "messages",
        }
    }

    /// Starts the rings.
    fn start(self, harness: &Harness) -> Result<(), CheckAbort> {
        match self {
            NotifyMethod::Fds => harness.start(),
            NotifyMethod::Messages => start(harness, true),
        }
    }

    /// Runs a batch of requests until all are complete.
    fn serve(self, harness: &mut Harness, channel: &BackendChannel) -> Result<(), CheckAbort> {
        match self {
            NotifyMethod::Fds => harness.run_batch(BATCH, RequestSize::Mixed),
            NotifyMethod::Messages => serve(harness, channel).map(drop),
        }
    }
}

/// Starts rings with in-band kicks. Without `sends_fd_messages` the kick starts the rings, as UML does it.
fn start(harness: &Harness, sends_fd_messages: bool) -> Result<(), CheckAbort> {
    let without_fd =
        |code: Code, index: u32| harness.send_acked(code, (u64::from(index) | VRING_NOFD_MASK).as_bytes(), &[]);
    for queue in harness.all() {
        if sends_fd_messages {
            without_fd(Code::SET_VRING_CALL, queue.index)?;
            without_fd(Code::SET_VRING_ERR, queue.index)?;
        }
        harness.configure_ring(queue, None)?;
        if sends_fd_messages {
            without_fd(Code::SET_VRING_KICK, queue.index)?;
        }
    }
    harness.enable(true)?;
    harness.all().try_for_each(|queue| kick(harness, queue.index, true))
}

/// Sends VRING_KICK, with or without need-reply.
fn kick(harness: &Harness, index: u32, acknowledged: bool) -> Result<(), CheckAbort> {
    let body = VringState { index, num: 0 };
    match acknowledged {
        true => harness.send_acked(Code::VRING_KICK, body.as_bytes(), &[]),
        false => harness.connection.send(Code::VRING_KICK, Header::FLAG_VERSION, body.as_bytes(), &[]),
    }
}

/// Publishes a batch of requests and sends an in-band kick.
fn publish_and_kick(harness: &mut Harness, acknowledged: bool) -> Result<(), CheckAbort> {
    harness.add(BATCH, RequestSize::Mixed)?;
    let _ = harness.ring.driver.publish();
    kick(harness, harness.ring.index, acknowledged)
}

/// Runs a batch of requests with in-band kick and calls. Returns the number of calls.
fn serve(harness: &mut Harness, channel: &BackendChannel) -> Result<u64, CheckAbort> {
    publish_and_kick(harness, true)?;
    finish(harness, channel)
}

/// Waits for in-band calls until no request is in flight. Returns the number of calls.
fn finish(harness: &mut Harness, channel: &BackendChannel) -> Result<u64, CheckAbort> {
    let (deadline, mut calls) = (harness.deadline(harness.timeout), 0);
    // Calls are not suppressed: at least one must arrive, even if all requests are complete by now.
    while harness.outstanding() > 0 || calls == 0 {
        if harness.pop()? || harness.ring.driver.enable_notifications() {
            continue;
        }
        // A back-end that keeps sending other messages must not extend the wait.
        let message = if !deadline.is_over() { channel.receive(&deadline)? } else { None };
        let Some((code, body)) = message else {
            let (left, waited) = (harness.outstanding(), harness.timeout);
            return Err(CheckAbort::Violation(format!(
                "no BACKEND_VRING_CALL within {waited:?}; {left} requests are in flight"
            )));
        };
        let ring = VringState::read_from_bytes(&body).ok().map(|state| state.index);
        match (code, ring) {
            (BackendRequest::VRING_CALL, Some(ring)) if ring == harness.ring.index => calls += 1,
            (BackendRequest::VRING_CALL, Some(ring)) if harness.all().any(|queue| queue.index == ring) => {}
            (BackendRequest::VRING_CALL | BackendRequest::VRING_ERR, _) => {
                return Err(CheckAbort::Violation(format!(
                    "{code} for ring {ring:?} instead of ring {}",
                    harness.ring.index
                )));
            }
            _ => {}
        }
    }
    Ok(calls)
}

/// Waits for the completions without calls.
fn poll(harness: &mut Harness) -> Result<(), CheckAbort> {
    let timeout = harness.timeout;
    if wait_until(&harness.deadline(timeout), || Ok(harness.pop_all()? == 0 && harness.outstanding() == 0))? {
        return Ok(());
    }
    Err(CheckAbort::Violation(format!("{} requests are in flight after {timeout:?}", harness.outstanding())))
}

pub(super) fn replaced_channel(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut names, mut kept_open) = (Vec::new(), false);
    for method in NotifyMethod::offered(target) {
        let mut harness = method.harness(target)?;
        let first = BackendChannel::set_backend_req_fd(&harness)?;
        method.start(&harness)?;
        method.serve(&mut harness, &first)?;
        let second = BackendChannel::set_backend_req_fd(&harness)?;
        method.serve(&mut harness, &second)?;
        kept_open |= !first.closes_before(&harness.deadline(harness.short_wait()));
        if second.closes_before(&harness.deadline(Duration::ZERO)) {
            return Ok(Outcome::fail("the second channel was closed"));
        }
        names.push(method.name());
    }
    let seen = format!("rings with {} continue", names.join(", with "));
    Ok(match kept_open {
        false => Outcome::pass(format!("{seen}, and the first channel was closed")),
        true => Outcome::warning(format!("{seen}, but the first channel stays open")),
    })
}

pub(super) fn lost_channel(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut names, mut ignored) = (Vec::new(), false);
    for (method, noise) in NotifyMethod::offered(target).flat_map(|method| [(method, false), (method, true)]) {
        let mut harness = method.harness(target)?;
        let channel = BackendChannel::set_backend_req_fd(&harness)?;
        method.start(&harness)?;
        method.serve(&mut harness, &channel)?;
        if noise {
            // An error means that the channel is closed already.
            let _ = (&channel.0).write_all(&[0xff; 64]);
            ignored |= !channel.closes_before(&harness.deadline(harness.settle));
        } else {
            drop(channel);
            harness.wait_quiet();
        }
        harness.connection.barrier()?;
        match method {
            NotifyMethod::Fds => harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?,
            NotifyMethod::Messages => {
                publish_and_kick(&mut harness, true)?;
                poll(&mut harness)?;
            }
        }
        // A new channel must work after the loss of the first.
        let channel = BackendChannel::set_backend_req_fd(&harness)?;
        method.serve(&mut harness, &channel)?;
        names.push(format!("{} with {}", if noise { "noise" } else { "closed" }, method.name()));
    }
    let noise = if ignored { "noise is ignored" } else { "noise closes the channel" };
    Ok(Outcome::pass(format!("{}: requests are served, also with another channel; {noise}", names.join(", "))))
}

pub(super) fn unread_channel(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(ProtocolFeatures::BACKEND_REQ)?;
    let mut harness = NotifyMethod::Messages.harness(target)?;
    let (ours, theirs) = UnixStream::pair()?;
    // The smallest buffer that the kernel allows.
    setsockopt(&theirs, SndBuf, &1)?;
    let channel = BackendChannel::install_pair(&harness, ours, &theirs)?;
    drop(theirs);
    start(&harness, true)?;
    for _ in 0..UNREAD {
        // Each completion needs a call.
        let _ = harness.ring.driver.enable_notifications();
        publish_and_kick(&mut harness, true)?;
        poll(&mut harness)?;
    }
    let (deadline, mut calls) = (harness.deadline(harness.timeout), 0);
    while channel.receive(&harness.deadline(Duration::ZERO))?.is_some() {
        calls += 1;
        if deadline.is_over() {
            return Ok(Outcome::fail(format!("{calls} messages without an end")));
        }
    }
    serve(&mut harness, &channel)?;
    Ok(Outcome::pass(format!(
        "{UNREAD} batches of {BATCH} requests; {calls} calls fitted; calls continue after they are read"
    )))
}

pub(super) fn in_band_notifications(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = NotifyMethod::Messages.harness(target)?;
    let channel = BackendChannel::set_backend_req_fd(&harness)?;
    start(&harness, true)?;
    let mut calls = 0;
    for batch in 0..BATCHES {
        publish_and_kick(&mut harness, batch % 2 == 0)?;
        calls += finish(&mut harness, &channel)?;
    }
    let (base, made) = (harness.stop()?, harness.ring.end_base());
    Ok(match harness.ring.is_same_base(base, made) {
        true => Outcome::pass(format!(
            "{BATCHES} batches of {BATCH} requests, {calls} calls; every other kick with need-reply"
        )),
        false => Outcome::fail(format!(
            "the requests end at {}, but the base is {}",
            harness.ring.format_base(made),
            harness.ring.format_base(base)
        )),
    })
}

pub(super) fn kick_without_vring_kick(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = NotifyMethod::Messages.harness(target)?;
    let channel = BackendChannel::set_backend_req_fd(&harness)?;
    start(&harness, false)?;
    for _ in 0..2 {
        serve(&mut harness, &channel)?;
    }
    Ok(Outcome::pass(format!("2 batches of {BATCH} requests without SET_VRING_KICK and SET_VRING_CALL")))
}
