//! The front-end's side of one connection and of the channel beside it, message by message, with nothing in between that could be polite.
//!
//! What an answer should be is the checks' business; here is only what can happen to a message. The header of every
//! reply is noted ([`ReplyFlags`]), so that rule F2.2 is judged by all of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::process::RETRY_INTERVAL;
use super::stop::Deadline;
use super::{CheckAbort, CheckOptions, Outcome, StopToken};
use crate::abi::vhost_user::{BackendRequest, Header, Request as Code};
use crate::sys::socket;

/// Longest reply that is read. The longest there is has 268 bytes (GET_CONFIG).
const MAX_REPLY: u32 = 1 << 16;
/// Longest message on the channel. The longest there is has 40 bytes.
const MAX_BACKEND_MESSAGE: u32 = 4096;
/// Most fds of a reply that are kept: more than any may have.
const MAX_FDS: usize = 16;
/// Between two segments of a message that is cut, so that the system does not join them again.
const SEGMENT_DELAY: Duration = Duration::from_millis(20);
/// The interval at which a wait looks for the stop of the check.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The headers of all replies of a run.
#[derive(Debug, Default)]
pub(super) struct ReplyFlags {
    pub(super) count: u64,
    /// How many replies to a request had flags other than 5, by both.
    pub(super) wrong: BTreeMap<(Code, u32), u64>,
}

impl ReplyFlags {
    /// Rule F2.2, by all of them.
    pub(super) fn outcome(&self) -> Outcome {
        let wrong: Vec<String> =
            self.wrong.iter().map(|((code, flags), count)| format!("{code} {flags:#x} ({count} times)")).collect();
        match wrong.is_empty() {
            true => Outcome::pass(format!("{} replies", self.count)),
            false => Outcome::fail(format!("of {} replies: {}", self.count, wrong.join(", "))),
        }
    }
}

/// A reply of the back-end.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) code: Code,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as the one structure that it must be.
    pub(super) fn read<T: FromBytes>(&self) -> Result<T, CheckAbort> {
        T::read_from_bytes(&self.payload).map_err(|_| {
            let (got, needed) = (self.payload.len(), size_of::<T>());
            CheckAbort::Violation(format!("the reply to {} has {got} bytes, not {needed}", self.code))
        })
    }
}

/// A connection to the back-end.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    timeout: Duration,
    stop: StopToken,
    replies: Rc<RefCell<ReplyFlags>>,
}

impl Connection {
    pub(super) fn connect(
        path: &Path,
        options: &CheckOptions,
        replies: Rc<RefCell<ReplyFlags>>,
    ) -> io::Result<Connection> {
        Ok(Connection::from_stream(connect(path, options.timeout, &options.stop)?, options, replies))
    }

    /// A connection that was made already.
    pub(super) fn from_stream(
        socket: UnixStream,
        options: &CheckOptions,
        replies: Rc<RefCell<ReplyFlags>>,
    ) -> Connection {
        Connection { socket, timeout: options.timeout, stop: options.stop.clone(), replies }
    }

    /// The end of a wait for the back-end that takes at most `time`.
    pub(super) fn deadline(&self, time: Duration) -> Deadline {
        self.stop.deadline(time)
    }

    /// The same connection once more, for messages that nothing answers.
    pub(super) fn try_clone(&self) -> Result<UnixStream, CheckAbort> {
        Ok(self.socket.try_clone()?)
    }

    /// Any request with any flags, payload and fds.
    pub(super) fn send(
        &self,
        code: Code,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), CheckAbort> {
        let header = Header { request: code.0, flags, size: payload.len() as u32 };
        self.send_bytes(code, &[header.as_bytes(), payload].concat(), fds)
    }

    /// A request whose header, and both halves of whose payload, travel alone (rule F1.3).
    pub(super) fn send_in_parts(
        &self,
        code: Code,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), CheckAbort> {
        let header = Header { request: code.0, flags, size: payload.len() as u32 };
        self.send_bytes(code, header.as_bytes(), fds)?;
        let (first, second) = payload.split_at(payload.len() / 2);
        for part in [first, second] {
            thread::sleep(SEGMENT_DELAY);
            self.send_bytes(code, part, &[])?;
        }
        Ok(())
    }

    /// Any bytes at all; `code` is what to call them.
    pub(super) fn send_bytes(&self, code: Code, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), CheckAbort> {
        let (socket, deadline) = (self.socket.as_fd(), self.deadline(self.timeout));
        let has_room = || Ok(ready(&[socket], PollFlags::POLLOUT, &deadline));
        socket::send_with(socket, bytes, fds, has_room).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => CheckAbort::Timeout { code, waited: self.timeout },
            _ => CheckAbort::HungUp { code },
        })
    }

    /// Hangs up.
    pub(super) fn close(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// The next message of the back-end, while the answer to `code` is due.
    pub(super) fn receive(&self, code: Code) -> Result<Reply, CheckAbort> {
        let deadline = self.deadline(self.timeout);
        let mut header = Header::new_zeroed();
        let mut fds = Vec::new();
        self.read_exact_with_fds(code, header.as_mut_bytes(), &mut fds, &deadline)?;
        if header.size > MAX_REPLY {
            return Err(CheckAbort::Violation(format!("the answer to {code} claims {} bytes", header.size)));
        }
        let mut payload = vec![0; header.size as usize];
        self.read_exact_with_fds(code, &mut payload, &mut fds, &deadline)?;
        let mut replies = self.replies.borrow_mut();
        replies.count += 1;
        let answered = Code(header.request);
        if header.flags != Header::REPLY_FLAGS {
            *replies.wrong.entry((answered, header.flags)).or_default() += 1;
        }
        Ok(Reply { code: answered, payload, fds })
    }

    /// Returns true if the back-end has not read what was sent to it.
    pub(super) fn is_unread(&self) -> bool {
        socket::is_unread(self.socket.as_fd()).unwrap_or(false)
    }

    /// Whether something comes within `patience`.
    pub(super) fn replies_within(&self, patience: Duration) -> bool {
        readable(&[self.socket.as_fd()], &self.deadline(patience))
    }

    /// The reply to `code`, which must be the next message.
    pub(super) fn reply(&self, code: Code) -> Result<Reply, CheckAbort> {
        let reply = self.receive(code)?;
        match reply.code == code {
            true => Ok(reply),
            false => Err(CheckAbort::Violation(format!("{} was answered where {code} was due", reply.code))),
        }
    }

    /// Sends a request that has a reply of its own, and waits for that.
    pub(super) fn request(&self, code: Code, payload: &[u8]) -> Result<Reply, CheckAbort> {
        self.send(code, Header::FLAG_VERSION, payload, &[])?;
        self.reply(code)
    }

    /// Like [`request`](Connection::request), for the many whose reply is a u64.
    pub(super) fn request_u64(&self, code: Code) -> Result<u64, CheckAbort> {
        self.request(code, &[])?.read()
    }

    /// Sends a request with need-reply; the answer is 0 for done (rule F4.1).
    pub(super) fn request_ack(&self, code: Code, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<u64, CheckAbort> {
        self.send(code, Header::FLAG_VERSION | Header::FLAG_NEED_REPLY, payload, fds)?;
        self.reply(code)?.read()
    }

    /// Everything that was sent is done when this returns (rule F4.4).
    pub(super) fn barrier(&self) -> Result<u64, CheckAbort> {
        self.request_u64(Code::GET_FEATURES)
    }

    fn read_exact_with_fds(
        &self,
        code: Code,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: &Deadline,
    ) -> Result<(), CheckAbort> {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            if !readable(&[self.socket.as_fd()], deadline) {
                return Err(CheckAbort::Timeout { code, waited: self.timeout });
            }
            match socket::receive(self.socket.as_fd(), rest, fds, MAX_FDS) {
                Ok(0) => return Err(CheckAbort::HungUp { code }),
                Ok(count) => filled += count,
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(_) => return Err(CheckAbort::HungUp { code }),
            }
        }
        Ok(())
    }
}

/// What a back-end says over its channel (rule B1.1).
pub(super) struct BackendMessage {
    pub(super) code: BackendRequest,
    pub(super) body: Vec<u8>,
    /// Whether it is to be acknowledged.
    pub(super) needs_reply: bool,
}

impl BackendMessage {
    /// The next one; `None` when the channel is over.
    pub(super) fn receive(mut channel: &UnixStream) -> Result<Option<BackendMessage>, CheckAbort> {
        let mut header = Header::new_zeroed();
        if channel.read_exact(header.as_mut_bytes()).is_err() {
            return Ok(None);
        }
        let (code, Header { flags, size, .. }) = (BackendRequest(header.request), header);
        if flags & !Header::FLAG_NEED_REPLY != Header::FLAG_VERSION || size > MAX_BACKEND_MESSAGE {
            return Err(CheckAbort::Violation(format!("{code} has flags {flags:#x} and {size} bytes")));
        }
        let mut body = vec![0; size as usize];
        let whole = channel.read_exact(&mut body);
        Ok(whole.ok().map(|()| BackendMessage { code, body, needs_reply: flags & Header::FLAG_NEED_REPLY != 0 }))
    }

    /// Answers it, if it needs_reply for that.
    pub(super) fn acknowledge(&self, mut channel: &UnixStream, answer: u64) -> Result<(), CheckAbort> {
        if !self.needs_reply {
            return Ok(());
        }
        let reply = Header { request: self.code.0, flags: Header::REPLY_FLAGS, size: size_of_val(&answer) as u32 };
        match channel.write_all(&[reply.as_bytes(), answer.as_bytes()].concat()) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(CheckAbort::Violation(format!(
                    "it needs_reply for acknowledgements of {} and does not read them",
                    self.code
                )))
            }
            // If the channel is over, the next message says so.
            _ => Ok(()),
        }
    }
}

/// Connects to a socket whose owner may have stopped accepting; sending on it has the same limit.
pub(super) fn connect(path: &Path, timeout: Duration, stop: &StopToken) -> io::Result<UnixStream> {
    let deadline = stop.deadline(timeout);
    let socket = loop {
        match socket::connect(path) {
            // There is no room for another one that waits to be accepted.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !deadline.is_over() => {
                thread::sleep(RETRY_INTERVAL)
            }
            connected => break connected?,
        }
    };
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(timeout))?;
    Ok(socket)
}

/// Waits until there is something to read from one of them, at most until `deadline`.
pub(super) fn readable(fds: &[BorrowedFd<'_>], deadline: &Deadline) -> bool {
    ready(fds, PollFlags::POLLIN, deadline)
}

fn ready(fds: &[BorrowedFd<'_>], events: PollFlags, deadline: &Deadline) -> bool {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, events)).collect();
    loop {
        let left = deadline.left();
        // Rounded up: the last part of a millisecond is waited for too, and not spun through.
        let timeout = left.min(STOP_POLL_INTERVAL) + Duration::from_micros(999);
        match poll(&mut polled, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}
