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

use super::connection::{Word, readable};
use super::harness::{Rig, SLOTS, Size, soon};
use super::stop::Deadline;
use super::{Bench, Check, Fault, Outcome, When};
use crate::abi::vhost_user::{BackendRequest, Header, Request as Code, VRING_NOFD_MASK, VringState, protocol_feature};

/// Batches of requests whose notifications nobody reads: more than find room.
const UNREAD: u32 = 64;
/// Batches of requests with kicks and calls in messages.
const BATCHES: u32 = 20;
const BATCH: u64 = 4;
/// Looks at a channel for its end: more than what can be unread.
const LOOKS: u32 = 1024;

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "B1", what: "another channel replaces the first", when: When::Once, run: replaced },
    Check {
        rule: "B1",
        what: "a channel that is closed, or over which noise comes, takes nothing else along",
        when: When::Once,
        run: lost,
    },
    Check {
        rule: "B1",
        what: "a front-end that does not read its channel stalls no ring",
        when: When::Once,
        run: unread,
    },
    Check { rule: "B3", what: "kicks and calls may be messages", when: When::Rings, run: messages },
    Check {
        rule: "B3",
        what: "the first kick starts a ring whose fds were never spoken of",
        when: When::Rings,
        run: unspoken,
    },
];

/// The front-end's end of a channel.
pub(super) struct Channel(UnixStream);

impl Channel {
    /// SET_BACKEND_REQ_FD.
    pub(super) fn give(rig: &Rig) -> Result<Channel, Fault> {
        let (ours, theirs) = UnixStream::pair()?;
        Channel::give_ends(rig, ours, &theirs)
    }

    fn give_ends(rig: &Rig, ours: UnixStream, theirs: &UnixStream) -> Result<Channel, Fault> {
        ours.set_read_timeout(Some(rig.timeout))?;
        ours.set_write_timeout(Some(rig.timeout))?;
        rig.done(Code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Ok(Channel(ours))
    }

    /// The next message and what it carries, if one comes until `deadline`. It is acknowledged if that is asked for: with 0
    /// where there is nothing to be done.
    pub(super) fn hear(&self, deadline: &Deadline) -> Result<Option<(BackendRequest, Vec<u8>)>, Fault> {
        if !readable(&[self.0.as_fd()], deadline) {
            return Ok(None);
        }
        let Some(word) = Word::hear(&self.0)? else {
            return Err(Fault::Breach("the back-end has closed the channel".into()));
        };
        let known = [BackendRequest::VRING_CALL, BackendRequest::VRING_ERR, BackendRequest::CONFIG_CHANGE_MSG];
        word.acknowledge(&self.0, u64::from(!known.contains(&word.code)))?;
        Ok(Some((word.code, word.body)))
    }

    /// Whether the back-end ends it until `deadline`, whatever it says before.
    fn ends(&self, deadline: &Deadline) -> bool {
        let mut said = [0; 4096];
        for _ in 0..LOOKS {
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
enum Way {
    Fds,
    Messages,
}

impl Way {
    /// A front-end that has agreed on it, without a channel.
    fn ready(self, bench: &Bench) -> Result<Rig, Fault> {
        use protocol_feature::{BACKEND_REQ, INBAND_NOTIFICATIONS, REPLY_ACK};
        if self == Way::Fds {
            return bench.rig_with(&[BACKEND_REQ]);
        }
        bench.offer.need(INBAND_NOTIFICATIONS)?;
        match [BACKEND_REQ, REPLY_ACK].into_iter().all(|feature| bench.offer.speaks(feature)) {
            true => bench.rig_with(&[BACKEND_REQ, INBAND_NOTIFICATIONS]),
            false => Err(Fault::Breach("it is offered without BACKEND_REQ and REPLY_ACK, which it needs".into())),
        }
    }

    /// Those that are offered.
    fn offered(bench: &Bench) -> impl Iterator<Item = Way> + use<> {
        let messages = bench.offer.speaks(protocol_feature::INBAND_NOTIFICATIONS);
        std::iter::once(Way::Fds).chain(messages.then_some(Way::Messages))
    }

    fn name(self) -> &'static str {
        match self {
            Way::Fds => "fds",
            Way::Messages => "messages",
        }
    }

    /// Starts the rings.
    fn start(self, rig: &Rig) -> Result<(), Fault> {
        match self {
            Way::Fds => rig.start(),
            Way::Messages => start(rig, true),
        }
    }

    /// A batch of requests, from adding to completion.
    fn serve(self, rig: &mut Rig, channel: &Channel) -> Result<(), Fault> {
        match self {
            Way::Fds => rig.load(BATCH, Size::Mixed),
            Way::Messages => serve(rig, channel).map(drop),
        }
    }
}

/// Starts rings that are kicked by messages. Where nothing is `spoken` of fds, as UML does it, the kick starts them.
fn start(rig: &Rig, spoken: bool) -> Result<(), Fault> {
    let without_fd = |code: Code, index: u32| rig.done(code, (u64::from(index) | VRING_NOFD_MASK).as_bytes(), &[]);
    for queue in rig.all() {
        if spoken {
            without_fd(Code::SET_VRING_CALL, queue.index)?;
            without_fd(Code::SET_VRING_ERR, queue.index)?;
        }
        rig.set_up(queue, None)?;
        if spoken {
            without_fd(Code::SET_VRING_KICK, queue.index)?;
        }
    }
    rig.enable(true)?;
    rig.all().try_for_each(|queue| kick(rig, queue.index, true))
}

/// VRING_KICK, with need-reply or without.
fn kick(rig: &Rig, index: u32, acknowledged: bool) -> Result<(), Fault> {
    let body = VringState { index, num: 0 };
    match acknowledged {
        true => rig.done(Code::VRING_KICK, body.as_bytes(), &[]),
        false => rig.link.send(Code::VRING_KICK, Header::FLAG_VERSION, body.as_bytes(), &[]),
    }
}

/// Makes a batch of requests visible, and kicks by a message.
fn ask(rig: &mut Rig, acknowledged: bool) -> Result<(), Fault> {
    rig.add(BATCH, Size::Mixed)?;
    let _ = rig.ring.driver.publish();
    kick(rig, rig.ring.index, acknowledged)
}

/// A batch of requests whose kick and calls are messages; how many calls came.
fn serve(rig: &mut Rig, channel: &Channel) -> Result<u64, Fault> {
    ask(rig, true)?;
    finish(rig, channel)
}

/// Waits for the calls of requests until nothing is in flight.
fn finish(rig: &mut Rig, channel: &Channel) -> Result<u64, Fault> {
    let (deadline, mut calls) = (rig.deadline(rig.timeout), 0);
    // Nobody has asked not to be called: there is a call even if everything is complete by now.
    while rig.outstanding() > 0 || calls == 0 {
        if rig.pop()? || rig.ring.driver.enable_notifications() {
            continue;
        }
        // Whoever says something else all the time has no more of it.
        let heard = if !deadline.is_over() { channel.hear(&deadline)? } else { None };
        let Some((code, body)) = heard else {
            let (left, waited) = (rig.outstanding(), rig.timeout);
            return Err(Fault::Breach(format!("no BACKEND_VRING_CALL within {waited:?}, {left} requests are open")));
        };
        let ring = VringState::read_from_bytes(&body).ok().map(|state| state.index);
        match (code, ring) {
            (BackendRequest::VRING_CALL, Some(ring)) if ring == rig.ring.index => calls += 1,
            (BackendRequest::VRING_CALL, Some(ring)) if rig.all().any(|queue| queue.index == ring) => {}
            (BackendRequest::VRING_CALL | BackendRequest::VRING_ERR, _) => {
                return Err(Fault::Breach(format!(
                    "{code} for ring {ring:?}, where ring {} was asked",
                    rig.ring.index
                )));
            }
            _ => {}
        }
    }
    Ok(calls)
}

/// Waits for the completions themselves.
fn poll(rig: &mut Rig) -> Result<(), Fault> {
    let timeout = rig.timeout;
    if soon(&rig.deadline(timeout), || Ok(rig.pop_all()? == 0 && rig.outstanding() == 0))? {
        return Ok(());
    }
    Err(Fault::Breach(format!("{} requests are open after {timeout:?}", rig.outstanding())))
}

fn replaced(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut names, mut kept_open) = (Vec::new(), false);
    for way in Way::offered(bench) {
        let mut rig = way.ready(bench)?;
        let first = Channel::give(&rig)?;
        way.start(&rig)?;
        way.serve(&mut rig, &first)?;
        let second = Channel::give(&rig)?;
        way.serve(&mut rig, &second)?;
        kept_open |= !first.ends(&rig.deadline(rig.patience()));
        if second.ends(&rig.deadline(Duration::ZERO)) {
            return Ok(Outcome::fail("the second channel was closed"));
        }
        names.push(way.name());
    }
    let seen = format!("rings with {} go on", names.join(", with "));
    Ok(match kept_open {
        false => Outcome::pass(format!("{seen}, and the first channel was closed")),
        true => Outcome::warning(format!("{seen}, but the first channel is kept open")),
    })
}

fn lost(bench: &mut Bench) -> Result<Outcome, Fault> {
    let (mut names, mut ignored) = (Vec::new(), false);
    for (way, noise) in Way::offered(bench).flat_map(|way| [(way, false), (way, true)]) {
        let mut rig = way.ready(bench)?;
        let channel = Channel::give(&rig)?;
        way.start(&rig)?;
        way.serve(&mut rig, &channel)?;
        if noise {
            // Where it is at an end already, there is nothing to be said.
            let _ = (&channel.0).write_all(&[0xff; 64]);
            ignored |= !channel.ends(&rig.deadline(rig.settle));
        } else {
            drop(channel);
            rig.watch();
        }
        rig.link.barrier()?;
        match way {
            Way::Fds => rig.load(SLOTS, Size::Mixed)?,
            Way::Messages => {
                ask(&mut rig, true)?;
                poll(&mut rig)?;
            }
        }
        // And there may be another one.
        let channel = Channel::give(&rig)?;
        way.serve(&mut rig, &channel)?;
        names.push(format!("{} with {}", if noise { "noise" } else { "closed" }, way.name()));
    }
    let heard = if ignored { "noise goes unheard" } else { "noise ends the channel" };
    Ok(Outcome::pass(format!("{}: requests are served, over another channel too; {heard}", names.join(", "))))
}

fn unread(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::BACKEND_REQ)?;
    let mut rig = Way::Messages.ready(bench)?;
    let (ours, theirs) = UnixStream::pair()?;
    // As little as the system allows.
    setsockopt(&theirs, SndBuf, &1)?;
    let channel = Channel::give_ends(&rig, ours, &theirs)?;
    drop(theirs);
    start(&rig, true)?;
    for _ in 0..UNREAD {
        // Each is to be called for.
        let _ = rig.ring.driver.enable_notifications();
        ask(&mut rig, true)?;
        poll(&mut rig)?;
    }
    let (deadline, mut calls) = (rig.deadline(rig.timeout), 0);
    while channel.hear(&rig.deadline(Duration::ZERO))?.is_some() {
        calls += 1;
        if deadline.is_over() {
            return Ok(Outcome::fail(format!("{calls} messages, and no end of them")));
        }
    }
    serve(&mut rig, &channel)?;
    Ok(Outcome::pass(format!(
        "{UNREAD} times {BATCH} requests, for which {calls} calls had room; then it is called again"
    )))
}

fn messages(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = Way::Messages.ready(bench)?;
    let channel = Channel::give(&rig)?;
    start(&rig, true)?;
    let mut calls = 0;
    for batch in 0..BATCHES {
        ask(&mut rig, batch % 2 == 0)?;
        calls += finish(&mut rig, &channel)?;
    }
    let (base, made) = (rig.stop()?, rig.ring.end());
    Ok(match rig.ring.same(base, made) {
        true => {
            Outcome::pass(format!("{BATCHES} times {BATCH} requests, {calls} calls; every other kick acknowledged"))
        }
        false => {
            Outcome::fail(format!("what was made ends at {}, the base is {}", rig.ring.show(made), rig.ring.show(base)))
        }
    })
}

fn unspoken(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut rig = Way::Messages.ready(bench)?;
    let channel = Channel::give(&rig)?;
    start(&rig, false)?;
    for _ in 0..2 {
        serve(&mut rig, &channel)?;
    }
    Ok(Outcome::pass(format!("2 times {BATCH} requests without SET_VRING_KICK and SET_VRING_CALL")))
}
