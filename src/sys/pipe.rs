//! Reading and writing everything that goes through a pipe, with a limit on memory and time.
//!
//! The other end can cause neither unbounded memory use ([`MAX_STATE`]) nor an unbounded wait ([`WaitLimit`]).
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::nonblocking::{is_stream, read, write};

/// Maximum size of a device's state, bytes.
pub(crate) const MAX_STATE: usize = 16 << 20;
/// Longest interval between two calls of [`WaitLimit::Remaining`].
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The end of a wait.
pub(crate) enum WaitLimit<'a> {
    /// Ends when the function returns 0. It returns the time left, and is called repeatedly.
    Remaining(&'a dyn Fn() -> Duration),
    /// Ends as soon as the fd is readable.
    StopFd(BorrowedFd<'a>),
    /// Ends at the instant, or as soon as the fd is readable.
    DeadlineOrStop(Instant, BorrowedFd<'a>),
}

/// Reads to the end of the stream.
///
/// # Errors
/// `InvalidInput` for a file of a file system, `FileTooLarge` for more than [`MAX_STATE`] bytes, `TimedOut` at the
/// limit `until`, otherwise the error of the system.
pub(crate) fn read_all(pipe: BorrowedFd<'_>, until: &WaitLimit<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    let pipe = stream(pipe)?;
    loop {
        match read(pipe, &mut chunk) {
            Ok(0) => return Ok(bytes),
            Ok(count) if bytes.len() + count > MAX_STATE => return Err(io::ErrorKind::FileTooLarge.into()),
            Ok(count) => bytes.extend(chunk.get(..count).unwrap_or_default()),
            Err(Errno::EAGAIN) => until.wait(pipe, PollFlags::POLLIN)?,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Writes all of `bytes`.
///
/// # Errors
/// `InvalidInput` for a file of a file system, `BrokenPipe` if the reading end is closed, `TimedOut` at the limit
/// `until`, otherwise the error of the system.
pub(crate) fn write_all(pipe: BorrowedFd<'_>, bytes: &[u8], until: &WaitLimit<'_>) -> io::Result<()> {
    let mut rest = bytes;
    let pipe = stream(pipe)?;
    while !rest.is_empty() {
        match write(pipe, rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::EAGAIN) => until.wait(pipe, PollFlags::POLLOUT)?,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Refuses files of a file system: poll does not tell if a read of one would block.
fn stream(pipe: BorrowedFd<'_>) -> io::Result<BorrowedFd<'_>> {
    let refused = || io::Error::new(io::ErrorKind::InvalidInput, "it is neither a pipe nor a socket");
    if is_stream(pipe) { Ok(pipe) } else { Err(refused()) }
}

impl WaitLimit<'_> {
    /// Waits until `pipe` is ready for `flags`, or for a part of the time; the caller tries again.
    ///
    /// # Errors
    /// `TimedOut` at the limit.
    fn wait(&self, pipe: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
        let pipe = PollFd::new(pipe, flags);
        let stop = match self {
            WaitLimit::Remaining(_) => None,
            WaitLimit::StopFd(stop) | WaitLimit::DeadlineOrStop(_, stop) => Some(*stop),
        };
        let left = || match self {
            WaitLimit::Remaining(left) => Some(left().min(POLL_INTERVAL)),
            WaitLimit::StopFd(_) => None,
            WaitLimit::DeadlineOrStop(deadline, _) => Some(deadline.saturating_duration_since(Instant::now())),
        };
        let timeout = left()
            .map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX));
        let stop = stop.map(|stop| PollFd::new(stop, PollFlags::POLLIN));
        let mut fds: Vec<PollFd<'_>> = std::iter::once(pipe).chain(stop).collect();
        retried(poll(&mut fds, timeout))?;
        let stopped = fds.get(1).is_some_and(|stop| stop.any() == Some(true));
        let over = stopped || left().is_some_and(|left| left.is_zero());
        if over { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

/// Counts an interrupted poll as one without ready descriptors.
fn retried(polled: nix::Result<i32>) -> nix::Result<i32> {
    if polled == Err(Errno::EINTR) { Ok(0) } else { polled }
}
