//! Rule D1: saving and loading the device state, complete and in parts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::IntoBytes;

use super::device::TestedDevice;
use super::device::blk::read_config;
use super::harness::{Harness, MAX_REQUESTS, RequestSize};
use super::hostile::attack;
use super::outcome::{CheckAbort, Outcome, Verdict};
use super::pages::noise;
use super::target::Target;
use crate::abi::vhost_user::{
    CONFIG_TYPE_MIGRATION, ConfigHeader, DEVICE_STATE_ERROR_MASK, DEVICE_STATE_LOAD, DEVICE_STATE_NOFD_MASK,
    DEVICE_STATE_PHASE_STOPPED, DEVICE_STATE_SAVE, DeviceStateTransfer, FrontendRequest as Code, Header,
    ProtocolFeatures,
};
use crate::sys::pipe::{WaitLimit, read_all, write_all};
use crate::sys::with_causes::with_causes;

const SET: Code = Code::SET_DEVICE_STATE_FD;
const CHECK: Code = Code::CHECK_DEVICE_STATE;

/// Returns a harness with DEVICE_STATE negotiated and no ring started.
fn state_harness(target: &Target) -> Result<Harness, CheckAbort> {
    target.harness_with_protocol(ProtocolFeatures::DEVICE_STATE)
}

/// Sends SET_DEVICE_STATE_FD with one end of a pipe. Returns the fd of the reply, to be used instead of the other end.
fn begin_transfer(
    harness: &Harness,
    direction: u32,
    phase: u32,
    end: BorrowedFd<'_>,
) -> Result<Option<OwnedFd>, CheckAbort> {
    let body = DeviceStateTransfer { direction, phase };
    harness.connection.send(SET, Header::FLAG_VERSION, body.as_bytes(), &[end])?;
    let reply = harness.connection.reply(SET)?;
    let answer: u64 = reply.read()?;
    if answer & DEVICE_STATE_ERROR_MASK != 0 {
        return Err(CheckAbort::Refused { code: SET, answer });
    }
    let due = usize::from(answer & DEVICE_STATE_NOFD_MASK == 0);
    match reply.fds.len() {
        count if count == due => Ok(reply.fds.into_iter().next()),
        count => Err(CheckAbort::Violation(format!("{count} fds with the reply {answer:#x}, which announces {due}"))),
    }
}

/// Saves the device state.
fn save(harness: &Harness) -> Result<Vec<u8>, CheckAbort> {
    let (reader, writer) = io::pipe()?;
    let other = begin_transfer(harness, DEVICE_STATE_SAVE, DEVICE_STATE_PHASE_STOPPED, writer.as_fd())?;
    drop(writer);
    let from = other.unwrap_or_else(|| reader.into());
    let deadline = harness.deadline(harness.timeout);
    let state = read_all(from.as_fd(), &WaitLimit::Remaining(&|| deadline.left()))
        .map_err(|error| pipe_error(harness, error))?;
    match harness.connection.request_u64(CHECK)? {
        0 => Ok(state),
        answer => Err(CheckAbort::Refused { code: CHECK, answer }),
    }
}

/// Loads a device state. Returns the result of CHECK_DEVICE_STATE.
fn load(harness: &Harness, state: &[u8]) -> Result<u64, CheckAbort> {
    let (reader, writer) = io::pipe()?;
    let other = begin_transfer(harness, DEVICE_STATE_LOAD, DEVICE_STATE_PHASE_STOPPED, reader.as_fd())?;
    drop(reader);
    let into = other.unwrap_or_else(|| writer.into());
    let deadline = harness.deadline(harness.timeout);
    match write_all(into.as_fd(), state, &WaitLimit::Remaining(&|| deadline.left())) {
        // The back-end may stop reading when it knows the result.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(pipe_error(harness, error)),
        _ => drop(into),
    }
    harness.connection.request_u64(CHECK)
}

fn pipe_error(harness: &Harness, error: io::Error) -> CheckAbort {
    match error.kind() {
        io::ErrorKind::TimedOut => {
            CheckAbort::Violation(format!("the state transfer did not end within {:?}", harness.timeout))
        }
        _ => error.into(),
    }
}

/// Loads a state that must be accepted.
fn load_accepted(harness: &Harness, state: &[u8]) -> Result<(), CheckAbort> {
    match load(harness, state)? {
        0 => Ok(()),
        answer => Err(CheckAbort::Refused { code: CHECK, answer }),
    }
}

/// Changes the device state, if possible: the address of a network interface, as a migration does. Returns the state
/// that is then saved, if it differs from before and is reproducible.
fn set_distinct_state(target: &Target, harness: &Harness) -> Result<Option<Vec<u8>>, CheckAbort> {
    let (TestedDevice::Net, true) = (target.device, target.offered.has_protocol(ProtocolFeatures::CONFIG)) else {
        return Ok(None);
    };
    let before = save(harness)?;
    let mut address = match read_config(&harness.connection, 0, 6) {
        // Rule C1.1 covers this violation.
        Err(CheckAbort::Violation(_)) => return Ok(None),
        address => address?,
    };
    // Another unicast address.
    address.iter_mut().skip(1).for_each(|byte| *byte ^= 0x5a);
    let header = ConfigHeader { offset: 0, size: 6, flags: CONFIG_TYPE_MIGRATION };
    match harness.send_acked(Code::SET_CONFIG, &[header.as_bytes(), &address].concat(), &[]) {
        Err(CheckAbort::Refused { .. }) => return Ok(None),
        done => done?,
    }
    let now = save(harness)?;
    Ok(if now != before && save(harness)? == now { Some(now) } else { None })
}

pub(super) fn state_before_start(target: &mut Target) -> Result<Outcome, CheckAbort> {
    Ok(Outcome::pass(format!("{} bytes", save(&state_harness(target)?)?.len())))
}

pub(super) fn state_of_stopped_device(target: &mut Target) -> Result<Outcome, CheckAbort> {
    if !matches!(target.device, TestedDevice::Net) {
        return restore_on_next_connection(target);
    }
    let good = save(&state_harness(target)?)?;
    let outcome = restore_on_next_connection(target);
    if outcome.is_err() {
        restore_state(target, &good);
    }
    outcome
}

/// Restores the device state from before the check.
fn restore_state(target: &mut Target, good: &[u8]) {
    if let Err(abort) = target.restore_changes(|target| load_accepted(&state_harness(target)?, good)) {
        target.unrestored.push(format!("the device state was not restored ({})", with_causes(&abort)));
    }
}

fn restore_on_next_connection(target: &Target) -> Result<Outcome, CheckAbort> {
    let mut harness = state_harness(target)?;
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    harness.stop()?;
    let state = save(&harness)?;
    harness.reconnect(target.connect()?)?;
    let other = set_distinct_state(target, &harness)?;
    let mut forgotten = false;
    // Each state is loaded after the other one; the last load restores the original.
    for state in [Some(&state), other.as_ref(), Some(&state)].into_iter().flatten() {
        load_accepted(&harness, state)?;
        forgotten |= other.is_some() && save(&harness)? != *state;
    }
    harness.start()?;
    harness.run_batch(MAX_REQUESTS, RequestSize::Mixed)?;
    let bytes = state.len();
    Ok(match other {
        _ if forgotten => Outcome::fail("a state was loaded, but another one is saved afterwards"),
        Some(_) => Outcome::pass(format!("{bytes} bytes; loaded states are saved again, and the ring continues")),
        None => Outcome::pass(format!("{bytes} bytes; the ring continues")),
    })
}

pub(super) fn truncated_states(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = state_harness(target)?;
    let good = save(&harness)?;
    if good.is_empty() {
        return Ok(Outcome::not_tested("the state is empty and cannot be truncated"));
    }
    let here = set_distinct_state(target, &harness)?;
    let found = load_truncated(&harness, &good, here.as_deref());
    let back = load_accepted(&harness, &good);
    if back.is_err() {
        // Restore the state on a new connection.
        drop(harness);
        restore_state(target, &good);
    }
    let Outcome(verdict, seen) = found.unwrap_or_else(Outcome::from);
    Ok(match back {
        Err(abort) if verdict != Verdict::Fail => {
            Outcome::fail(format!("{seen}, but the complete state: {}", with_causes(&abort)))
        }
        _ => Outcome(verdict, seen),
    })
}

/// Loads truncated states. The device must keep the state `here`.
fn load_truncated(harness: &Harness, good: &[u8], here: Option<&[u8]>) -> Result<Outcome, CheckAbort> {
    let bytes = good.len();
    for end in [bytes - 1, bytes / 2, 0] {
        let part = good.get(..end).unwrap_or_default();
        if load(harness, part)? == 0 {
            return Ok(Outcome::fail(format!("the first {end} of {bytes} bytes were accepted")));
        }
        if let Some(here) = here
            && save(harness)? != here
        {
            return Ok(Outcome::fail(format!(
                "{end} of {bytes} bytes were refused, but another state is saved afterwards"
            )));
        }
    }
    let whole = if here.is_some() { "; the state did not change" } else { "" };
    Ok(Outcome::pass(format!("without the last byte, one half, and empty{whole}")))
}

pub(super) fn invalid_directions(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let mut hung_up = 0;
    for (direction, phase) in [(2, 0), (u32::MAX, 0), (DEVICE_STATE_SAVE, 1), (DEVICE_STATE_LOAD, u32::MAX)] {
        let harness = state_harness(target)?;
        let (reader, writer) = io::pipe()?;
        let end = if direction == DEVICE_STATE_LOAD { reader.as_fd() } else { writer.as_fd() };
        match begin_transfer(&harness, direction, phase, end) {
            Ok(_) => return Ok(Outcome::fail(format!("direction {direction} in phase {phase} was accepted"))),
            Err(CheckAbort::Refused { .. }) => drop(harness.connection.barrier()?),
            // As for any request that the back-end does not support (rule F5.2).
            Err(CheckAbort::HungUp { .. }) => hung_up += 1,
            Err(abort) => return Err(abort),
        }
    }
    Ok(match hung_up {
        0 => Outcome::pass("4 were refused, and the connection continued"),
        times => Outcome::warning(format!("it closed the connection at {times} of 4")),
    })
}

pub(super) fn messages_during_transfer(target: &mut Target) -> Result<Outcome, CheckAbort> {
    let harness = state_harness(target)?;
    let (reader, writer) = io::pipe()?;
    let other = begin_transfer(&harness, DEVICE_STATE_LOAD, DEVICE_STATE_PHASE_STOPPED, reader.as_fd())?;
    harness.connection.send(Code::GET_FEATURES, Header::FLAG_VERSION, &[], &[])?;
    let answered = harness.connection.replies_within(harness.short_wait());
    drop((reader, writer, other));
    harness.connection.reply(Code::GET_FEATURES)?;
    harness.connection.request_u64(CHECK)?;
    Ok(match answered {
        true => Outcome::pass("GET_FEATURES, before the first byte of the state"),
        false => Outcome::warning("GET_FEATURES was not answered before the pipe was closed"),
    })
}

/// Name and function of a mutation.
type StateMutation = (&'static str, fn(&[u8]) -> Vec<u8>);

/// Loads states that no device has saved (a hostile check).
pub(super) fn mutated_states(target: &mut Target) -> Result<Outcome, CheckAbort> {
    fn flipped(good: &[u8], at: usize) -> Vec<u8> {
        let mut state = good.to_vec();
        state.get_mut(at).into_iter().for_each(|byte| *byte ^= 0x10);
        state
    }
    let changes: [StateMutation; 6] = [
        ("a bit of its first byte", |good| flipped(good, 0)),
        ("a bit in its middle", |good| flipped(good, good.len() / 2)),
        ("a bit of its last byte", |good| flipped(good, good.len().saturating_sub(1))),
        ("a state and one byte", |good| [good, &[0]].concat()),
        ("a state of noise", |good| noise(1, good.len().max(64) as u32)),
        ("a MiB of ones", |_| vec![0xff; 1 << 20]),
    ];
    let good = save(&state_harness(target)?)?;
    let outcome = attack(
        target,
        changes,
        |(what, _)| what,
        |harness, (_, change)| {
            harness.protocol |= ProtocolFeatures::DEVICE_STATE;
            harness.reconnect(target.connect()?)?;
            let answer = load(harness, &change(&good))?;
            match load(harness, &good)? {
                0 => Ok(answer),
                _ => Err(CheckAbort::Violation("the unchanged state is refused afterwards".into())),
            }
        },
    )?;
    if target.options.stop.is_set() {
        restore_state(target, &good);
    } else if outcome.0 != Verdict::Fail {
        load_accepted(&state_harness(target)?, &good)?;
    }
    Ok(outcome)
}
