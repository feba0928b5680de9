//! Rules B1 and B3: the channel over which a back-end says what it was not asked, and notifications that are messages.
//!
//! Without in-band notifications a back-end has nothing to say here: then only that is seen which the channel must not
//! take along when it ends.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::SndBuf};
use zerocopy::{FromBytes, IntoBytes};

use super::connection::{BackendMessage, readable};
use super::harness::{Harness, MAX_REQUESTS, RequestSize, wait_until};
use super::stop::Deadline;
use super::{Check, CheckAbort, Outcome, RingSelection, Target};
use crate::abi::vhost_user::{BackendRequest, Header, Request as Code, VRING_NOFD_MASK, VringState, protocol_feature};

/// Batches of requests whose notifications nobody reads: more than find room.
const UNREAD: u32 = 64;
/// Batches of requests with kicks and calls in messages.
const BATCHES: u32 = 20;
const BATCH: u64 = 4;
/// Looks at a channel for its end: more than what can be unread.
const MAX_READS: u32 = 1024;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "B1", what: "another channel replaces the first", run_on: RingSelection::Once, run: replaced },
    Check {
        rule: "B1",
        what: "a channel that is closed, or over which noise comes, takes nothing else along",
        run_on: RingSelection::Once,
        run: lost,
    },
    Check {
        rule: "B1",
        what: "a front-end that does not read its channel stalls no ring",
        run_on: RingSelection::Once,
        run: unread,
    },
    Check { rule: "B3", what: "kicks and calls may be messages", run_on: RingSelection::Main, run: messages },
    Check {
        rule: "B3",
        what: "the first kick starts a ring whose fds were never sends_fd_messages of",
        run_on: RingSelection::Main,
        run: kick_without_vring_kick,
    },
];

/// The front-end's end of a channel.
pub(super) struct BackendChannel(UnixStream);

impl BackendChannel {
    /// SET_BACKEND_REQ_FD.
    pub(super) fn install(harness: &Harness) -> Result<BackendChannel, CheckAbort> {
        let (ours, theirs) = UnixStream::pair()?;
        BackendChannel::install_pair(harness, ours, &theirs)
    }

    fn install_pair(harness: &Harness, ours: UnixStream, theirs: &UnixStream) -> Result<BackendChannel, CheckAbort> {
        ours.set_read_timeout(Some(harness.timeout))?;
        ours.set_write_timeout(Some(harness.timeout))?;
        harness.send_acked(Code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Ok(BackendChannel(ours))
    }

    /// The next message and what it carries, if one comes until `deadline`. It is acknowledged if that is asked for: with 0
    /// where there is nothing to be done.
    pub(super) fn receive(&self, deadline: &Deadline) -> Result<Option<(BackendRequest, Vec<u8>)>, CheckAbort> {
        if !readable(&[self.0.as_fd()], deadline) {
            return Ok(None);
        }
        let Some(message) = BackendMessage::receive(&self.0)? else {
            return Err(CheckAbort::Violation("the back-end has closed the channel".into()));
        };
        let known = [BackendRequest::VRING_CALL, BackendRequest::VRING_ERR, BackendRequest::CONFIG_CHANGE_MSG];
        message.acknowledge(&self.0, u64::from(!known.contains(&message.code)))?;
        Ok(Some((message.code, message.body)))
    }

    /// Whether the back-end ends it until `deadline`, whatever it says before.
    fn closes_before(&self, deadline: &Deadline) -> bool {
        let mut said = [0; 4096];
        for _ in 0..MAX_READS {
            if !readable(&[self.0.as_fd()], deadline) {
                return false;
            }
            // One that went away with something unread resets it.
            if !(&self.0).read(&mut said).is_ok_and(|count| count > 0) {
                return true;
            }
        }
        false
    }
}

/// How a ring is kicked, and its driver called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum NotifyMethod {
    Fds,
    Messages,
}

impl NotifyMethod {
    /// A front-end that has agreed on it, without a channel.
    fn harness(self, target: &Target) -> Result<Harness, CheckAbort> {
        use protocol_feature::{BACKEND_REQ, INBAND_NOTIFICATIONS, REPLY_ACK};
        if self == NotifyMethod::Fds {
            return target.harness_with_protocol(&[BACKEND_REQ]);
        }
        target.offered.require_protocol(INBAND_NOTIFICATIONS)?;
        match [BACKEND_REQ, REPLY_ACK].into_iter().all(|feature| target.offered.has_protocol(feature)) {
            true => target.harness_with_protocol(&[BACKEND_REQ, INBAND_NOTIFICATIONS]),
            false => {
                Err(CheckAbort::Violation("it is offered without BACKEND_REQ and REPLY_ACK, which it needs".into()))
            }
        }
    }

    /// Those that are offered.
    fn offered(target: &Target) -> impl Iterator<Item = NotifyMethod> + use<> {
        let messages = target.offered.has_protocol(protocol_feature::INBAND_NOTIFICATIONS);
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

    /// A batch of requests, from adding to completion.
    fn serve(self, harness: &mut Harness, channel: &BackendChannel) -> Result<(), CheckAbort> {
        match self {
            NotifyMethod::Fds => harness.run_batch(BATCH, RequestSize::Mixed),
            NotifyMethod::Messages => serve(harness, channel).map(drop),
        }
    }
}

/// Starts rings that are kicked by messages. Where nothing is `sends_fd_messages` of fds, as UML does it, the kick starts them.
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

/// VRING_KICK, with need-reply or without.
fn kick(harness: &Harness, index: u32, acknowledged: bool) -> Result<(), CheckAbort> {
    let body = VringState { index, num: 0 };
    match acknowledged {
        true => harness.send_acked(Code::VRING_KICK, body.as_bytes(), &[]),
        false => harness.connection.send(Code::VRING_KICK, Header::FLAG_VERSION, body.as_bytes(), &[]),
    }
}

/// Makes a batch of requests visible, and kicks by a message.
fn ask(harness: &mut Harness, acknowledged: bool) -> Result<(), CheckAbort> {
    harness.add(BATCH, RequestSize::Mixed)?;
    let _ = harness.ring.driver.publish();
    kick(harness, harness.ring.index, acknowledged)
}

/// A batch of requests whose kick and calls are messages; how many calls came.
fn serve(harness: &mut Harness, channel: &BackendChannel) -> Result<u64, CheckAbort> {
    ask(harness, true)?;
    finish(harness, channel)
}

/// Waits for the calls of requests until nothing is in flight.
fn finish(harness: &mut Harness, channel: &BackendChannel) -> Result<u64, CheckAbort> {
    let (deadline, mut calls) = (harness.deadline(harness.timeout), 0);
    // Nobody has asked not to be called: there is a call even if everything is complete by now.
    while harness.outstanding() > 0 || calls == 0 {
        if harness.pop()? || harness.ring.driver.enable_notifications() {
            continue;
        }
        // Whoever says something else all the time has no more of it.
        let heard = if !deadline.is_over() { channel.receive(&deadline)? } else { None };
        let Some((code, body)) = heard else {
            let (left, waited) = (harness.outstanding(), harness.timeout);
            return Err(CheckAbort::Violation(format!(
                "no BACKEND_VRING_CALL within {waited:?}, {left} requests are open"
            )));
        };
        let ring = VringState::read_from_bytes(&body).ok().map(|state| state.index);
        match (code, ring) {
            (BackendRequest::VRING_CALL, Some(ring)) if ring == harness.ring.index => calls += 1,
            (BackendRequest::VRING_CALL, Some(ring)) if harness.all().any(|queue| queue.index == ring) => {}
            (BackendRequest::VRING_CALL | BackendRequest::VRING_ERR, _) => {
                return Err(CheckAbort::Violation(format!(
                    "{code} for ring {ring:?}, where ring {} was asked",
                    harness.ring.index
                )));
            }
            _ => {}
        }
    }
    Ok(calls)
}

/// Waits for the completions themselves.
fn poll(harness: &mut Harness) -> Result<(), CheckAbort> {
    let timeout = harness.timeout;
    if wait_until(&harness.deadline(timeout), || Ok(harness.pop_all()? == 0 && harness.outstanding() == 0))? {
        return Ok(());
    }
    Err(CheckAbort::Violation(format!("{} requests are open after {timeout:?}", harness.outstanding())))
}

fn replaced(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut names, mut kept_open) = (Vec::new(), false);
    for method in NotifyMethod::offered(target) {
        let mut harness = method.harness(target)?;
        let first = BackendChannel::install(&harness)?;
        method.start(&harness)?;
        method.serve(&mut harness, &first)?;
        let second = BackendChannel::install(&harness)?;
        method.serve(&mut harness, &second)?;
        kept_open |= !first.closes_before(&harness.deadline(harness.short_wait()));
        if second.closes_before(&harness.deadline(Duration::ZERO)) {
            return Ok(Outcome::fail("the second channel was closed"));
        }
        names.push(method.name());
    }
    let seen = format!("rings with {} go on", names.join(", with "));
    Ok(match kept_open {
        false => Outcome::pass(format!("{seen}, and the first channel was closed")),
        true => Outcome::warning(format!("{seen}, but the first channel is kept open")),
    })
}

fn lost(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let (mut names, mut ignored) = (Vec::new(), false);
    for (method, noise) in NotifyMethod::offered(target).flat_map(|method| [(method, false), (method, true)]) {
        let mut harness = method.harness(target)?;
        let channel = BackendChannel::install(&harness)?;
        method.start(&harness)?;
        method.serve(&mut harness, &channel)?;
        if noise {
            // Where it is at an end already, there is nothing to be said.
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
                ask(&mut harness, true)?;
                poll(&mut harness)?;
            }
        }
        // And there may be another one.
        let channel = BackendChannel::install(&harness)?;
        method.serve(&mut harness, &channel)?;
        names.push(format!("{} with {}", if noise { "noise" } else { "closed" }, method.name()));
    }
    let heard = if ignored { "noise goes unheard" } else { "noise ends the channel" };
    Ok(Outcome::pass(format!("{}: requests are served, over another channel too; {heard}", names.join(", "))))
}

fn unread(target: &mut Target) -> Result<Outcome, CheckAbort> {
    target.offered.require_protocol(protocol_feature::BACKEND_REQ)?;
    let mut harness = NotifyMethod::Messages.harness(target)?;
    let (ours, theirs) = UnixStream::pair()?;
    // As little as the system allows.
    setsockopt(&theirs, SndBuf, &1)?;
    let channel = BackendChannel::install_pair(&harness, ours, &theirs)?;
    drop(theirs);
    start(&harness, true)?;
    for _ in 0..UNREAD {
        // Each is to be called for.
        let _ = harness.ring.driver.enable_notifications();
        ask(&mut harness, true)?;
        poll(&mut harness)?;
    }
    let (deadline, mut calls) = (harness.deadline(harness.timeout), 0);
    while channel.receive(&harness.deadline(Duration::ZERO))?.is_some() {
        calls += 1;
        if deadline.is_over() {
            return Ok(Outcome::fail(format!("{calls} messages, and no end of them")));
        }
    }
    serve(&mut harness, &channel)?;
    Ok(Outcome::pass(format!(
        "{UNREAD} times {BATCH} requests, for which {calls} calls had room; then it is called again"
    )))
}

fn messages(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = NotifyMethod::Messages.harness(target)?;
    let channel = BackendChannel::install(&harness)?;
    start(&harness, true)?;
    let mut calls = 0;
    for batch in 0..BATCHES {
        ask(&mut harness, batch % 2 == 0)?;
        calls += finish(&mut harness, &channel)?;
    }
    let (base, made) = (harness.stop()?, harness.ring.end_base());
    Ok(match harness.ring.is_same_base(base, made) {
        true => {
            Outcome::pass(format!("{BATCHES} times {BATCH} requests, {calls} calls; every other kick acknowledged"))
        }
        false => Outcome::fail(format!(
            "what was made ends at {}, the base is {}",
            harness.ring.format_base(made),
            harness.ring.format_base(base)
        )),
    })
}

fn kick_without_vring_kick(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut harness = NotifyMethod::Messages.harness(target)?;
    let channel = BackendChannel::install(&harness)?;
    start(&harness, false)?;
    for _ in 0..2 {
        serve(&mut harness, &channel)?;
    }
    Ok(Outcome::pass(format!("2 times {BATCH} requests without SET_VRING_KICK and SET_VRING_CALL")))
}
