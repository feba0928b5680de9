//! The front-end side of the main connection and of the back-end channel, without any policy on messages.
//!
//! The checks decide what a reply should be. The flags of every reply are recorded in [`ReplyFlags`], so that rule F2.2
//! is evaluated for the whole run.

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

use super::options::CheckOptions;
use super::outcome::{CheckAbort, Outcome};
use super::stop::{Deadline, StopToken};
use crate::abi::vhost_user::{BackendRequest, FrontendRequest as Code, Header};
use crate::sys::socket;

/// Maximum payload of a reply, bytes. The largest defined one has 268 (GET_CONFIG).
const MAX_REPLY: u32 = 1 << 16;
/// Maximum payload of a message on the back-end channel, bytes. The largest defined one has 40.
const MAX_BACKEND_MESSAGE: u32 = 4096;
/// Maximum number of fds kept of a reply; more than any reply may have.
const MAX_FDS: usize = 16;
/// Interval between attempts to connect or to wait for the process.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(5);
/// Delay between the segments of a message, so that the kernel does not join them.
const SEGMENT_DELAY: Duration = Duration::from_millis(20);
/// Interval at which a wait checks the stop token.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Flags of all replies of a run.
#[derive(Debug, Default)]
pub(super) struct ReplyFlags {
    pub(super) count: u64,
    /// Number of replies with flags other than 0x5, by request and flags.
    pub(super) wrong: BTreeMap<(Code, u32), u64>,
}

impl ReplyFlags {
    /// Evaluates rule F2.2.
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
    /// Parses the payload as exactly one structure.
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

    /// Wraps a connected socket.
    pub(super) fn from_stream(
        socket: UnixStream,
        options: &CheckOptions,
        replies: Rc<RefCell<ReplyFlags>>,
    ) -> Connection {
        Connection { socket, timeout: options.timeout, stop: options.stop.clone(), replies }
    }

    /// Returns the deadline of a wait for the back-end that takes at most `time`.
    pub(super) fn deadline(&self, time: Duration) -> Deadline {
        self.stop.deadline(time)
    }

    /// Duplicates the socket, for messages without a reply.
    pub(super) fn try_clone(&self) -> Result<UnixStream, CheckAbort> {
        Ok(self.socket.try_clone()?)
    }

    /// Sends any request with any flags, payload and fds.
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

    /// Sends a request in three segments: the header and both halves of the payload (rule F1.3).
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

    /// Sends any bytes. `code` names them in errors.
    pub(super) fn send_bytes(&self, code: Code, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), CheckAbort> {
        let (socket, deadline) = (self.socket.as_fd(), self.deadline(self.timeout));
        let has_room = || Ok(ready(&[socket], PollFlags::POLLOUT, &deadline));
        socket::send_with(socket, bytes, fds, has_room).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => CheckAbort::Timeout { code, waited: self.timeout },
            _ => CheckAbort::HungUp { code },
        })
    }

    /// Closes the connection.
    pub(super) fn close(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Receives the next message. `code` is the request whose reply is due, for errors.
    pub(super) fn receive(&self, code: Code) -> Result<Reply, CheckAbort> {
        let deadline = self.deadline(self.timeout);
        let mut header = Header::new_zeroed();
        let mut fds = Vec::new();
        self.read_exact_with_fds(code, header.as_mut_bytes(), &mut fds, &deadline)?;
        if header.size > MAX_REPLY {
            return Err(CheckAbort::Violation(format!("the reply to {code} announces {} bytes", header.size)));
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

    /// Returns true if the back-end has not read everything that was sent.
    pub(super) fn is_unread(&self) -> bool {
        socket::is_unread(self.socket.as_fd()).unwrap_or(false)
    }

    /// Returns true if data arrives within `patience`.
    pub(super) fn replies_within(&self, patience: Duration) -> bool {
        readable(&[self.socket.as_fd()], &self.deadline(patience))
    }

    /// Receives the reply to `code`, which must be the next message.
    pub(super) fn reply(&self, code: Code) -> Result<Reply, CheckAbort> {
        let reply = self.receive(code)?;
        match reply.code == code {
            true => Ok(reply),
            false => Err(CheckAbort::Violation(format!("a reply to {} instead of {code}", reply.code))),
        }
    }

    /// Sends a request that has a reply of its own, and receives the reply.
    pub(super) fn request(&self, code: Code, payload: &[u8]) -> Result<Reply, CheckAbort> {
        self.send(code, Header::FLAG_VERSION, payload, &[])?;
        self.reply(code)
    }

    /// Like [`request`](Connection::request), for replies that are a u64.
    pub(super) fn request_u64(&self, code: Code) -> Result<u64, CheckAbort> {
        self.request(code, &[])?.read()
    }

    /// Sends a request with need-reply. Returns the acknowledgement, 0 for success (rule F4.1).
    pub(super) fn request_ack(&self, code: Code, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<u64, CheckAbort> {
        self.send(code, Header::FLAG_VERSION | Header::FLAG_NEED_REPLY, payload, fds)?;
        self.reply(code)?.read()
    }

    /// Waits until the back-end has processed all messages (rule F4.4).
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

/// A message on the back-end channel (rule B1.1).
pub(super) struct BackendMessage {
    pub(super) code: BackendRequest,
    pub(super) body: Vec<u8>,
    /// True if the message needs a reply.
    pub(super) needs_reply: bool,
}

impl BackendMessage {
    /// Receives the next message. Returns `None` if the channel is closed.
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

    /// Replies if the message needs it.
    pub(super) fn acknowledge(&self, mut channel: &UnixStream, answer: u64) -> Result<(), CheckAbort> {
        if !self.needs_reply {
            return Ok(());
        }
        let reply = Header { request: self.code.0, flags: Header::REPLY_FLAGS, size: size_of_val(&answer) as u32 };
        match channel.write_all(&[reply.as_bytes(), answer.as_bytes()].concat()) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Err(
                CheckAbort::Violation(format!("it requests acknowledgements of {} and does not read them", self.code)),
            ),
            // A closed channel shows at the next message.
            _ => Ok(()),
        }
    }
}

/// Connects to a socket, also if its queue of connections is full for a while. `timeout` also limits later sends.
pub(super) fn connect(path: &Path, timeout: Duration, stop: &StopToken) -> io::Result<UnixStream> {
    let deadline = stop.deadline(timeout);
    let socket = loop {
        match socket::connect(path) {
            // The queue of connections is full.
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

/// Waits until one of the fds is readable. Returns false at `deadline`.
pub(super) fn readable(fds: &[BorrowedFd<'_>], deadline: &Deadline) -> bool {
    ready(fds, PollFlags::POLLIN, deadline)
}

fn ready(fds: &[BorrowedFd<'_>], events: PollFlags, deadline: &Deadline) -> bool {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, events)).collect();
    loop {
        let left = deadline.left();
        // Rounded up, so that the last fraction of a millisecond is not a busy loop.
        let timeout = left.min(STOP_POLL_INTERVAL) + Duration::from_micros(999);
        match poll(&mut polled, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}
