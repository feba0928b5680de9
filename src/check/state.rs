//! Rule D1: what a device knows beside its rings, on its way to another one, whole and in parts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::IntoBytes;

use super::blk::read_config;
use super::harness::{Rig, SLOTS, Size, noise};
use super::hostile::attack;
use super::{Bench, Check, Fault, Outcome, Subject, Verdict, When};
use crate::abi::bit;
use crate::abi::vhost_user::{
    CONFIG_TYPE_MIGRATION, ConfigHeader, DEVICE_STATE_ERROR_MASK, DEVICE_STATE_LOAD, DEVICE_STATE_NOFD_MASK,
    DEVICE_STATE_PHASE_STOPPED, DEVICE_STATE_SAVE, DeviceStateTransfer, Header, Request as Code, protocol_feature,
};
use crate::sys::pipe::{WaitLimit, read_all, write_all};

pub(super) const CHECKS: &[Check] = &[
    Check { rule: "D1", what: "a device that never ran has a state to give", when: When::Once, run: never_ran },
    Check {
        rule: "D1",
        what: "the state of a device that ran and was stopped is taken over on the next connection",
        when: When::Rings,
        run: moved,
    },
    Check { rule: "D1", what: "a state that was cut short is refused, whole", when: When::Once, run: cut },
    Check { rule: "D1", what: "directions and phases that there are not are refused", when: When::Once, run: unknown },
    Check { rule: "D1", what: "messages are answered while a state is on its way", when: When::Once, run: meanwhile },
];

const SET: Code = Code::SET_DEVICE_STATE_FD;
const CHECK: Code = Code::CHECK_DEVICE_STATE;

/// A front-end that has agreed on states, and has not started a ring.
fn ready(bench: &Bench) -> Result<Rig, Fault> {
    bench.rig_with(&[protocol_feature::DEVICE_STATE])
}

/// SET_DEVICE_STATE_FD with one end of a pipe, and the fd that comes back to be used in its place, if one does.
fn begin(rig: &Rig, direction: u32, phase: u32, end: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Fault> {
    let body = DeviceStateTransfer { direction, phase };
    rig.link.send(SET, Header::FLAG_VERSION, body.as_bytes(), &[end])?;
    let reply = rig.link.reply(SET)?;
    let answer: u64 = reply.read()?;
    if answer & DEVICE_STATE_ERROR_MASK != 0 {
        return Err(Fault::Refused { code: SET, answer });
    }
    let due = usize::from(answer & DEVICE_STATE_NOFD_MASK == 0);
    match reply.fds.len() {
        count if count == due => Ok(reply.fds.into_iter().next()),
        count => Err(Fault::Breach(format!("{count} fds come with the answer {answer:#x}, which says {due}"))),
    }
}

/// What the device saves, to the end.
fn save(rig: &Rig) -> Result<Vec<u8>, Fault> {
    let (reader, writer) = io::pipe()?;
    let other = begin(rig, DEVICE_STATE_SAVE, DEVICE_STATE_PHASE_STOPPED, writer.as_fd())?;
    drop(writer);
    let from = other.unwrap_or_else(|| reader.into());
    let deadline = rig.deadline(rig.timeout);
    let state = read_all(from.as_fd(), &WaitLimit::Remaining(&|| deadline.left())).map_err(|error| late(rig, error))?;
    match rig.link.ask_number(CHECK)? {
        0 => Ok(state),
        answer => Err(Fault::Refused { code: CHECK, answer }),
    }
}

/// Has the device load these bytes; what CHECK_DEVICE_STATE says then.
fn load(rig: &Rig, state: &[u8]) -> Result<u64, Fault> {
    let (reader, writer) = io::pipe()?;
    let other = begin(rig, DEVICE_STATE_LOAD, DEVICE_STATE_PHASE_STOPPED, reader.as_fd())?;
    drop(reader);
    let into = other.unwrap_or_else(|| writer.into());
    let deadline = rig.deadline(rig.timeout);
    match write_all(into.as_fd(), state, &WaitLimit::Remaining(&|| deadline.left())) {
        // It need not read on when it knows what to say.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(late(rig, error)),
        _ => drop(into),
    }
    rig.link.ask_number(CHECK)
}

fn late(rig: &Rig, error: io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::TimedOut => Fault::Breach(format!("the state has no end within {:?}", rig.timeout)),
        _ => error.into(),
    }
}

/// Loads what must be taken.
fn load_good(rig: &Rig, state: &[u8]) -> Result<(), Fault> {
    match load(rig, state)? {
        0 => Ok(()),
        answer => Err(Fault::Refused { code: CHECK, answer }),
    }
}

/// Has the device know something else, where a front-end can: the address of a network interface, as a migration brings
/// it. What it saves now, if that differs from before, and is the same each time.
fn other(bench: &Bench, rig: &Rig) -> Result<Option<Vec<u8>>, Fault> {
    let (Subject::Net, true) = (bench.subject, bench.offer.speaks(protocol_feature::CONFIG)) else { return Ok(None) };
    let before = save(rig)?;
    let mut address = match read_config(&rig.link, 0, 6) {
        // That is rule C1.1's.
        Err(Fault::Breach(_)) => return Ok(None),
        address => address?,
    };
    // Another one, and no group's.
    address.iter_mut().skip(1).for_each(|byte| *byte ^= 0x5a);
    let header = ConfigHeader { offset: 0, size: 6, flags: CONFIG_TYPE_MIGRATION };
    match rig.done(Code::SET_CONFIG, &[header.as_bytes(), &address].concat(), &[]) {
        Err(Fault::Refused { .. }) => return Ok(None),
        done => done?,
    }
    let now = save(rig)?;
    Ok(if now != before && save(rig)? == now { Some(now) } else { None })
}

fn never_ran(bench: &mut Bench) -> Result<Outcome, Fault> {
    Ok(Outcome::pass(format!("{} bytes", save(&ready(bench)?)?.len())))
}

fn moved(bench: &mut Bench) -> Result<Outcome, Fault> {
    if !matches!(bench.subject, Subject::Net) {
        return takes_over(bench);
    }
    let good = save(&ready(bench)?)?;
    let outcome = takes_over(bench);
    if outcome.is_err() {
        put_back(bench, &good);
    }
    outcome
}

/// Has the device load the state that it had before the check.
fn put_back(bench: &mut Bench, good: &[u8]) {
    if let Err(fault) = bench.undo(|bench| load_good(&ready(bench)?, good)) {
        bench.left.push(format!("the state of the device could not be put back ({fault})"));
    }
}

fn takes_over(bench: &Bench) -> Result<Outcome, Fault> {
    let mut rig = ready(bench)?;
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    rig.stop()?;
    let state = save(&rig)?;
    rig.reconnect(bench.connect()?)?;
    let other = other(bench, &rig)?;
    let mut forgotten = false;
    // One after the other, so that each is loaded where another one was; in the end it is as it was.
    for state in [Some(&state), other.as_ref(), Some(&state)].into_iter().flatten() {
        load_good(&rig, state)?;
        forgotten |= other.is_some() && save(&rig)? != *state;
    }
    rig.start()?;
    rig.load(SLOTS, Size::Mixed)?;
    let bytes = state.len();
    Ok(match other {
        _ if forgotten => Outcome::fail("a state was loaded, it says, and then it saves another one"),
        Some(_) => Outcome::pass(format!("{bytes} bytes, and others, which it saves again; then the ring goes on")),
        None => Outcome::pass(format!("{bytes} bytes; then the ring goes on")),
    })
}

fn cut(bench: &mut Bench) -> Result<Outcome, Fault> {
    let rig = ready(bench)?;
    let good = save(&rig)?;
    if good.is_empty() {
        return Ok(Outcome::not_tested("it has no bytes: nothing of it can be missing"));
    }
    let here = other(bench, &rig)?;
    let found = refuses(&rig, &good, here.as_deref());
    let back = load_good(&rig, &good);
    if back.is_err() {
        // What was there comes back in any case, as far as it can.
        drop(rig);
        put_back(bench, &good);
    }
    let Outcome(verdict, seen) = found.unwrap_or_else(Outcome::from);
    Ok(match back {
        Err(fault) if verdict != Verdict::Fail => Outcome::fail(format!("{seen}, but the whole one: {fault}")),
        _ => Outcome(verdict, seen),
    })
}

/// Loads the beginnings of a state. `here` is what the device must save all the while.
fn refuses(rig: &Rig, good: &[u8], here: Option<&[u8]>) -> Result<Outcome, Fault> {
    let bytes = good.len();
    for end in [bytes - 1, bytes / 2, 0] {
        let part = good.get(..end).unwrap_or_default();
        if load(rig, part)? == 0 {
            return Ok(Outcome::fail(format!("the first {end} of {bytes} bytes were taken")));
        }
        if let Some(here) = here
            && save(rig)? != here
        {
            return Ok(Outcome::fail(format!("{end} of {bytes} bytes were refused, and yet it saves another state")));
        }
    }
    let whole = if here.is_some() { ", and it stayed as it was" } else { "" };
    Ok(Outcome::pass(format!("without its last byte, half of it, nothing{whole}")))
}

fn unknown(bench: &mut Bench) -> Result<Outcome, Fault> {
    let mut hung_up = 0;
    for (direction, phase) in [(2, 0), (u32::MAX, 0), (DEVICE_STATE_SAVE, 1), (DEVICE_STATE_LOAD, u32::MAX)] {
        let rig = ready(bench)?;
        let (reader, writer) = io::pipe()?;
        let end = if direction == DEVICE_STATE_LOAD { reader.as_fd() } else { writer.as_fd() };
        match begin(&rig, direction, phase, end) {
            Ok(_) => return Ok(Outcome::fail(format!("direction {direction} in phase {phase} was taken"))),
            Err(Fault::Refused { .. }) => drop(rig.link.barrier()?),
            // As of any request that it can't answer (rule F5.2).
            Err(Fault::HungUp { .. }) => hung_up += 1,
            Err(fault) => return Err(fault),
        }
    }
    Ok(match hung_up {
        0 => Outcome::pass("4 were refused, and the connection went on"),
        times => Outcome::warning(format!("it hung up at {times} of 4")),
    })
}

fn meanwhile(bench: &mut Bench) -> Result<Outcome, Fault> {
    let rig = ready(bench)?;
    let (reader, writer) = io::pipe()?;
    let other = begin(&rig, DEVICE_STATE_LOAD, DEVICE_STATE_PHASE_STOPPED, reader.as_fd())?;
    rig.link.send(Code::GET_FEATURES, Header::FLAG_VERSION, &[], &[])?;
    let answered = rig.link.answers(rig.patience());
    drop((reader, writer, other));
    rig.link.reply(Code::GET_FEATURES)?;
    rig.link.ask_number(CHECK)?;
    Ok(match answered {
        true => Outcome::pass("GET_FEATURES, before the first byte came"),
        false => Outcome::warning("GET_FEATURES was not answered before the pipe was closed"),
    })
}

/// What was done to a state, and how.
type Change = (&'static str, fn(&[u8]) -> Vec<u8>);

/// States that nobody saved: a check of those that a back-end may die of.
pub(super) fn changed(bench: &mut Bench) -> Result<Outcome, Fault> {
    fn flipped(good: &[u8], at: usize) -> Vec<u8> {
        let mut state = good.to_vec();
        state.get_mut(at).into_iter().for_each(|byte| *byte ^= 0x10);
        state
    }
    let changes: [Change; 6] = [
        ("a bit of its first byte", |good| flipped(good, 0)),
        ("a bit in its middle", |good| flipped(good, good.len() / 2)),
        ("a bit of its last byte", |good| flipped(good, good.len().saturating_sub(1))),
        ("a state and one byte", |good| [good, &[0]].concat()),
        ("a state of noise", |good| noise(1, good.len().max(64) as u32)),
        ("a MiB of ones", |_| vec![0xff; 1 << 20]),
    ];
    let good = save(&ready(bench)?)?;
    let outcome = attack(
        bench,
        changes,
        |(what, _)| what,
        |rig, (_, change)| {
            rig.protocol |= bit(protocol_feature::DEVICE_STATE);
            rig.reconnect(bench.connect()?)?;
            let answer = load(rig, &change(&good))?;
            match load(rig, &good)? {
                0 => Ok(answer),
                _ => Err(Fault::Breach("after it the state itself is refused".into())),
            }
        },
    )?;
    if bench.options.stop.is_set() {
        put_back(bench, &good);
    } else if outcome.0 != Verdict::Fail {
        load_good(&ready(bench)?, &good)?;
    }
    Ok(outcome)
}
