//! Transfer of the device state through a pipe (rule D1.3).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use zerocopy::IntoBytes;

use super::super::{FrontendError, Interrupt};
use super::connection::Connection;
use crate::abi::vhost_user::{
    DEVICE_STATE_ERROR_MASK, DEVICE_STATE_LOAD, DEVICE_STATE_NOFD_MASK, DEVICE_STATE_PHASE_STOPPED, DEVICE_STATE_SAVE,
    DeviceStateTransfer, FrontendRequest,
};
use crate::sys::pipe::{WaitLimit, read_all, write_all};

/// Reads the state that the back-end saves, for at most `timeout`.
pub(super) fn save(
    connection: &mut Connection,
    timeout: Duration,
    interrupt: &Interrupt,
) -> Result<Vec<u8>, FrontendError> {
    let (reader, writer) = pipe()?;
    let own = begin(connection, DEVICE_STATE_SAVE, writer)?.unwrap_or(reader);
    let state = read_all(own.as_fd(), &WaitLimit::DeadlineOrStop(Instant::now() + timeout, interrupt.as_fd()));
    let state = state.map_err(|source| failed("save", source, interrupt))?;
    drop(own);
    check(connection, timeout)?;
    Ok(state)
}

/// Writes the state that the back-end loads, for at most `timeout`.
pub(super) fn load(
    connection: &mut Connection,
    timeout: Duration,
    interrupt: &Interrupt,
    state: &[u8],
) -> Result<(), FrontendError> {
    let (reader, writer) = pipe()?;
    let own = begin(connection, DEVICE_STATE_LOAD, reader)?.unwrap_or(writer);
    let written =
        write_all(own.as_fd(), state, &WaitLimit::DeadlineOrStop(Instant::now() + timeout, interrupt.as_fd()));
    drop(own);
    match written {
        // The back-end stopped reading; CHECK_DEVICE_STATE returns its reason.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            check(connection, timeout)?;
            Err(FrontendError::DeviceState { operation: "load", source: error })
        }
        Err(source) => Err(failed("load", source, interrupt)),
        Ok(()) => check(connection, timeout),
    }
}

fn failed(operation: &'static str, source: std::io::Error, interrupt: &Interrupt) -> FrontendError {
    match source.kind() {
        std::io::ErrorKind::TimedOut if interrupt.is_set() => {
            FrontendError::Interrupted { request: FrontendRequest::SET_DEVICE_STATE_FD }
        }
        _ => FrontendError::DeviceState { operation, source },
    }
}

/// Passes `theirs` to the back-end. Returns the fd to use instead of the pipe's other end, if the back-end sends one.
fn begin(connection: &mut Connection, direction: u32, theirs: OwnedFd) -> Result<Option<OwnedFd>, FrontendError> {
    let request = FrontendRequest::SET_DEVICE_STATE_FD;
    let transfer = DeviceStateTransfer { direction, phase: DEVICE_STATE_PHASE_STOPPED };
    let mut reply = connection.request(request, transfer.as_bytes(), &[theirs.as_fd()])?;
    let code: u64 = reply.read("D1.2").inspect_err(|_| connection.close())?;
    if code & DEVICE_STATE_ERROR_MASK != 0 {
        return Err(FrontendError::Refused { request, code });
    }
    if code & DEVICE_STATE_NOFD_MASK != 0 {
        return Ok(None);
    }
    let breach = || FrontendError::ProtocolViolation {
        request,
        what: "the reply announces an fd and has none".into(),
        rule: "D1.2",
    };
    reply.fds.pop().ok_or_else(breach).map(Some).inspect_err(|_| connection.close())
}

/// Requests the result of the transfer.
fn check(connection: &mut Connection, timeout: Duration) -> Result<(), FrontendError> {
    let request = FrontendRequest::CHECK_DEVICE_STATE;
    let reply = connection.request_within(timeout, request, &[], &[])?;
    match reply.read("D1.4").inspect_err(|_| connection.close())? {
        0 => Ok(()),
        code => Err(FrontendError::Refused { request, code }),
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), FrontendError> {
    pipe2(OFlag::O_CLOEXEC).map_err(FrontendError::system("make a pipe"))
}
