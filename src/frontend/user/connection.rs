//! Main connection to a vhost-user back-end: sends requests, receives acknowledgements and replies, each with a
//! deadline. The socket is non-blocking, and every wait is a poll.
//!
//! A request without a reply of its own is sent without waiting. [`wait_for_acks`](Connection::wait_for_acks) then
//! waits for all of them: for their acknowledgements, or with a GET_FEATURES round trip if the back-end does not
//! support REPLY_ACK (rule F4.4). The meaning of requests is not handled here.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use tracing::debug;
use zerocopy::{FromBytes, IntoBytes};

use super::super::{FrontendError, Interrupt, counters};
use crate::abi::vhost_user::{FrontendRequest, Header};
use crate::sys::socket;

/// Maximum payload of a reply. GET_CONFIG has 268 bytes; the rest is reserve for later versions of the protocol.
const MAX_REPLY: usize = 4096;

/// Number of fds accepted with a reply. Replies have at most one; the second makes an excess visible.
const MAX_FDS: usize = 2;

/// Maximum number of messages sent before their replies are read.
pub(super) const MAX_UNACKED: usize = 64;

/// Refusals among several messages, by index.
type Refusals = Vec<(usize, FrontendError)>;

/// Replies that arrived after the wait for them had ended.
#[derive(Default)]
pub(super) struct LateReplies {
    /// Replies to GET_VRING_BASE: rings that have stopped.
    pub(super) base_replies: Vec<Reply>,
    /// First refusal.
    pub(super) refused: Option<FrontendError>,
}

pub(super) struct Connection {
    socket: Arc<ConnectionSocket>,
    path: PathBuf,
    timeout: Duration,
    interrupt: Interrupt,
    /// Handling of replies that do not arrive in time.
    timeout_policy: TimeoutPolicy,
    /// True once the back-end has replied, which shows that it serves this connection.
    has_replied: bool,
    /// Replies whose wait has ended before they arrived. Nothing is sent while there are any.
    pending: Vec<PendingReply>,
    /// Pending replies that have arrived.
    late_replies: LateReplies,
    /// True if REPLY_ACK was negotiated.
    pub(super) acks: bool,
    /// Requests sent and not yet acknowledged.
    unacked: Vec<FrontendRequest>,
    send_buffer: Option<SendBuffer>,
}

/// Messages to be sent in one system call.
struct SendBuffer {
    bytes: Vec<u8>,
    /// Descriptor of the first message.
    fd: Option<Arc<OwnedFd>>,
    last: FrontendRequest,
    /// Number of messages counted in [`Connection::unacked`].
    unacked: usize,
}

/// Handling of a reply that does not arrive in time. An interrupted wait always leaves its reply pending.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum TimeoutPolicy {
    /// Closes the connection, because a late reply could be mistaken for another one.
    Close,
    /// Leaves the reply pending, and ignores the interrupt.
    KeepUninterruptible,
    /// Leaves the reply pending.
    Keep,
}

/// A reply that has not arrived.
#[derive(Clone, Copy)]
struct PendingReply {
    request: FrontendRequest,
    /// True for an acknowledgement, false for a reply of the request's own.
    is_ack: bool,
}

/// Socket of the connection, with a lock so that messages of two threads do not interleave.
pub(super) struct ConnectionSocket {
    socket: UnixStream,
    sends: Mutex<()>,
}

impl ConnectionSocket {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a short message without a reply if there is room. Returns false if there is none. Errors of a closed
    /// connection are ignored.
    pub(super) fn try_send(&self, bytes: &[u8]) -> bool {
        let Ok(_alone) = self.sends.try_lock() else { return false };
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) != Err(Errno::EAGAIN)
    }
}

/// Payload and fds of a reply.
pub(super) struct Reply {
    pub(super) request: FrontendRequest,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// Parses the payload as exactly one structure.
    pub(super) fn read<T: FromBytes>(&self, rule: &'static str) -> Result<T, FrontendError> {
        T::read_from_bytes(&self.payload).map_err(|_| FrontendError::ProtocolViolation {
            request: self.request,
            what: format!("a reply of {} bytes instead of {}", self.payload.len(), size_of::<T>()),
            rule,
        })
    }
}

impl Connection {
    /// Connects, or fails at once.
    pub(super) fn connect(path: &Path, timeout: Duration, interrupt: &Interrupt) -> Result<Connection, FrontendError> {
        let socket = socket::connect(path).map_err(|source| FrontendError::Connect { path: path.into(), source })?;
        let socket = Arc::new(ConnectionSocket { socket, sends: Mutex::default() });
        Ok(Connection {
            socket,
            path: path.into(),
            timeout,
            interrupt: interrupt.clone(),
            timeout_policy: TimeoutPolicy::Close,
            has_replied: false,
            pending: Vec::new(),
            late_replies: LateReplies::default(),
            acks: false,
            unacked: Vec::new(),
            send_buffer: None,
        })
    }

    /// Returns the socket, for short messages of the back-end channel's thread.
    pub(super) fn socket(&self) -> &Arc<ConnectionSocket> {
        &self.socket
    }

    /// Requests acknowledgements (need-reply) from now on.
    pub(super) fn enable_acks(&mut self) {
        self.acks = true;
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sets the handling of replies that do not arrive in time.
    pub(super) fn set_timeout_policy(&mut self, timeout_policy: TimeoutPolicy) {
        self.timeout_policy = timeout_policy;
    }

    /// Returns true if replies are pending.
    pub(super) fn has_pending_replies(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Receives the pending replies until `deadline`.
    pub(super) fn receive_pending(&mut self, deadline: Instant) -> Result<LateReplies, FrontendError> {
        let begun = Instant::now();
        while let Some(&PendingReply { request, is_ack }) = self.pending.first() {
            if !self.wait_readable(request, deadline, true)? {
                return Err(FrontendError::Timeout { request, waited: begun.elapsed() });
            }
            let reply = self.receive_reply(request, self.timeout)?;
            self.pending.remove(0);
            if is_ack {
                let acknowledged = self.check_ack(&reply);
                self.late_replies.refused = self.late_replies.refused.take().or(acknowledged.err());
            } else if matches!(request, FrontendRequest::GET_VRING_BASE | FrontendRequest::GET_VRING_BASE_SKIP_DRAIN) {
                self.late_replies.base_replies.push(reply);
            }
        }
        Ok(std::mem::take(&mut self.late_replies))
    }

    /// Sends a request that has no reply of its own.
    pub(super) fn send(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        self.send_message(request, self.ack_flags(), payload, fds)?;
        self.count_unacked(request)
    }

    /// Sends a request that has no reply of its own, possibly in one system call with the next ones. It is sent at the
    /// latest before the next wait.
    pub(super) fn send_buffered(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        fd: Option<&Arc<OwnedFd>>,
    ) -> Result<(), FrontendError> {
        if self.has_pending_replies() {
            return Err(FrontendError::Interrupted { request });
        }
        // The kernel attaches fds to the first byte of a send.
        if fd.is_some() {
            self.flush()?;
        }
        self.buffer_message(request, self.ack_flags(), payload, fd).unacked += 1;
        self.count_unacked(request)
    }

    fn buffer_message(
        &mut self,
        request: FrontendRequest,
        flags: u32,
        payload: &[u8],
        fd: Option<&Arc<OwnedFd>>,
    ) -> &mut SendBuffer {
        let new = || SendBuffer { bytes: Vec::new(), fd: fd.cloned(), last: request, unacked: 0 };
        let send_buffer = self.send_buffer.get_or_insert_with(new);
        send_buffer.bytes.extend(encode(request, flags, payload));
        send_buffer.last = request;
        send_buffer
    }

    fn ack_flags(&self) -> u32 {
        Header::FLAG_VERSION | if self.acks { Header::FLAG_NEED_REPLY } else { 0 }
    }

    fn count_unacked(&mut self, request: FrontendRequest) -> Result<(), FrontendError> {
        self.unacked.push(request);
        // More unread acknowledgements than a socket holds would block both sides.
        if self.acks && self.unacked.len() >= MAX_UNACKED { self.wait_for_acks() } else { Ok(()) }
    }

    /// Sends a message that is never answered, whatever was negotiated.
    pub(super) fn send_without_reply(&mut self, request: FrontendRequest, payload: &[u8]) -> Result<(), FrontendError> {
        self.send_message(request, Header::FLAG_VERSION, payload, &[])
    }

    /// Waits until all sent requests are processed. Returns the first refusal after all acknowledgements have arrived.
    pub(super) fn wait_for_acks(&mut self) -> Result<(), FrontendError> {
        self.wait_for_acks_within(self.timeout)
    }

    /// Like [`wait_for_acks`](Self::wait_for_acks), with a timeout for requests that may take longer.
    pub(super) fn wait_for_acks_within(&mut self, timeout: Duration) -> Result<(), FrontendError> {
        self.collect_acks(timeout, &mut || {})?.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Calls `sent`, whose time counts towards `timeout`, and waits until all sent requests are processed. Returns the
    /// refusals, indexed from 0 since the last wait.
    pub(super) fn collect_acks(
        &mut self,
        timeout: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Refusals, FrontendError> {
        self.flush()?;
        let elapsed = time_of(sent);
        if !self.acks && !self.unacked.is_empty() {
            self.request_within(timeout, FrontendRequest::GET_FEATURES, &[], &[])?;
        }
        self.receive_replies(timeout, elapsed, &[], &mut Vec::new())
    }

    /// Returns the number of unacknowledged requests.
    pub(super) fn unacked(&self) -> usize {
        self.unacked.len()
    }

    /// Receives the outstanding acknowledgements and then the replies to `requests`. Replies are added to `replies` also
    /// if a later one does not arrive. Each may take `timeout`, of which `elapsed` has passed for the first. Returns the
    /// refusals among the acknowledgements.
    fn receive_replies(
        &mut self,
        timeout: Duration,
        elapsed: Duration,
        requests: &[FrontendRequest],
        replies: &mut Vec<Reply>,
    ) -> Result<Refusals, FrontendError> {
        let unacked = std::mem::take(&mut self.unacked).into_iter().filter(|_| self.acks);
        let unacked = unacked.map(|request| PendingReply { request, is_ack: true });
        let requests = requests.iter().map(|request| PendingReply { request: *request, is_ack: false });
        let expected: Vec<PendingReply> = unacked.chain(requests).collect();
        let mut refused = Vec::new();
        let mut elapsed = elapsed;
        for (number, answer) in expected.iter().enumerate() {
            let received = self.wait_for_reply(*answer, timeout, std::mem::take(&mut elapsed));
            if self.has_pending_replies() {
                self.pending.extend(expected.iter().skip(number + 1));
                self.late_replies.refused = refused.into_iter().next().map(|(_, error)| error);
                return received.map(|_| Vec::new());
            }
            if !answer.is_ack {
                replies.push(received?);
                continue;
            }
            match self.check_ack(&received?) {
                Err(error @ FrontendError::Refused { .. }) => refused.push((number, error)),
                done => done?,
            }
        }
        Ok(refused)
    }

    /// Sends requests with replies of their own, all before the first reply is read. Replies are added to `replies`,
    /// also those before one that does not arrive. Together with unacknowledged requests there must be at most
    /// [`MAX_UNACKED`]. Calls `sent` after sending; its time counts towards `timeout`. Returns the refusals of the
    /// unacknowledged requests.
    pub(super) fn request_each<'a>(
        &mut self,
        timeout: Duration,
        request: FrontendRequest,
        payloads: impl IntoIterator<Item = &'a [u8]>,
        sent: &mut dyn FnMut(),
        replies: &mut Vec<Reply>,
    ) -> Result<Refusals, FrontendError> {
        let mut requests = Vec::new();
        for payload in payloads {
            self.buffer_message(request, Header::FLAG_VERSION, payload, None);
            requests.push(request);
        }
        self.flush()?;
        let elapsed = time_of(sent);
        self.receive_replies(timeout, elapsed, &requests, replies)
    }

    /// Evaluates an acknowledgement.
    fn check_ack(&self, reply: &Reply) -> Result<(), FrontendError> {
        let request = reply.request;
        match reply.read("F4.1").inspect_err(|_| self.close())? {
            0 => Ok(()),
            code => {
                counters::message_refused(request);
                Err(FrontendError::Refused { request, code })
            }
        }
    }

    /// Sends a request that has a reply of its own, and waits for the reply (rule F3.1).
    pub(super) fn request(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, FrontendError> {
        self.request_within(self.timeout, request, payload, fds)
    }

    /// Like [`request`](Self::request), with a timeout for requests that may take longer.
    pub(super) fn request_within(
        &mut self,
        timeout: Duration,
        request: FrontendRequest,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, FrontendError> {
        if self.acks {
            self.wait_for_acks()?;
        }
        self.unacked.clear();
        self.send_message(request, Header::FLAG_VERSION, payload, fds)?;
        self.wait_for_reply(PendingReply { request, is_ack: false }, timeout, Duration::ZERO)
    }

    /// Closes the connection. Also wakes threads that poll [`hang_up_fd`](Self::hang_up_fd).
    pub(super) fn close(&self) {
        // An error means that the connection is closed already.
        let _ = self.socket.socket.shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.fd(), PollFlags::POLLHUP)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    pub(super) fn hang_up_fd(&self) -> Result<OwnedFd, FrontendError> {
        self.socket.fd().try_clone_to_owned().map_err(FrontendError::system("watch the connection"))
    }

    fn send_message(
        &mut self,
        request: FrontendRequest,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        self.flush()?;
        self.send_bytes(request, &encode(request, flags, payload), fds)
    }

    fn flush(&mut self) -> Result<(), FrontendError> {
        let Some(SendBuffer { bytes, fd, last, unacked }) = self.send_buffer.take() else { return Ok(()) };
        let sent = self.send_bytes(last, &bytes, fd.as_ref().map(AsFd::as_fd).as_slice());
        // There is no acknowledgement for an unsent message.
        sent.inspect_err(|_| self.unacked.truncate(self.unacked.len().saturating_sub(unacked)))
    }

    /// Sends messages, the last of which is `request`.
    fn send_bytes(&self, request: FrontendRequest, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        if self.has_pending_replies() {
            return Err(FrontendError::Interrupted { request });
        }
        // Ignores poisoning: a message is sent completely or the connection is closed.
        let _alone = self.socket.sends.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = socket::send_until(self.socket.fd(), bytes, fds, Instant::now() + self.timeout);
        sent.map_err(|error| self.io_error(request, self.timeout, error))
    }

    /// Waits for the next reply for `timeout`, of which `elapsed` has passed.
    fn wait_for_reply(
        &mut self,
        answer: PendingReply,
        timeout: Duration,
        elapsed: Duration,
    ) -> Result<Reply, FrontendError> {
        let request = answer.request;
        if self.has_data() {
            return self.receive_reply(request, timeout);
        }
        match self.wait_readable(
            request,
            Instant::now() + timeout.saturating_sub(elapsed),
            self.timeout_policy != TimeoutPolicy::KeepUninterruptible,
        ) {
            Ok(true) => self.receive_reply(request, timeout),
            Ok(false) if self.timeout_policy == TimeoutPolicy::Close => {
                Err(self.io_error(request, timeout, io::ErrorKind::TimedOut.into()))
            }
            Ok(false) => {
                self.pending.push(answer);
                Err(self.timeout_error(request, timeout))
            }
            Err(error) => {
                self.pending.push(answer);
                Err(error)
            }
        }
    }

    /// Returns true if data is available.
    fn has_data(&self) -> bool {
        recv(self.socket.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Ok(1)
    }

    /// Waits until data is available or the back-end has closed the connection. Returns false at the deadline.
    fn wait_readable(
        &self,
        request: FrontendRequest,
        deadline: Instant,
        interruptible: bool,
    ) -> Result<bool, FrontendError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            let events = if interruptible { PollFlags::POLLIN } else { PollFlags::empty() };
            let mut fds =
                [PollFd::new(self.socket.fd(), PollFlags::POLLIN), PollFd::new(self.interrupt.as_fd(), events)];
            match poll(&mut fds, if left.is_zero() { PollTimeout::ZERO } else { timeout }) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(FrontendError::system("wait for the back-end")(errno)),
            }
            match fds.map(|fd| fd.any() == Some(true)) {
                [true, _] => return Ok(true),
                [_, true] if interruptible => return Err(FrontendError::Interrupted { request }),
                _ => {}
            }
        }
    }

    fn receive_reply(&mut self, request: FrontendRequest, timeout: Duration) -> Result<Reply, FrontendError> {
        let deadline = Instant::now() + timeout;
        let mut fds = Vec::new();
        let mut header = [0; size_of::<Header>()];
        self.read_exact(&mut header, &mut fds, request, deadline, timeout)?;
        let header: Header = zerocopy::transmute!(header);
        let breach = |what: String, rule| {
            self.close();
            Err(FrontendError::ProtocolViolation { request, what, rule })
        };
        if header.request != request.0 {
            return breach(format!("a reply to {}", FrontendRequest(header.request)), "F10.1");
        }
        if header.flags != Header::REPLY_FLAGS {
            return breach(format!("flags {:#x} instead of {:#x}", header.flags, Header::REPLY_FLAGS), "F2.2");
        }
        let size = header.size as usize;
        if size > MAX_REPLY {
            return breach(format!("a reply of {size} bytes, more than {MAX_REPLY}"), "F1.4");
        }
        let mut payload = vec![0; size];
        self.read_exact(&mut payload, &mut fds, request, deadline, timeout)?;
        self.has_replied = true;
        Ok(Reply { request, payload, fds })
    }

    fn read_exact(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        request: FrontendRequest,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(), FrontendError> {
        let mut rest = buf;
        while !rest.is_empty() {
            let failed = match socket::receive(self.socket.fd(), rest, fds, MAX_FDS) {
                Ok(0) => return Err(FrontendError::HungUp { request }),
                Ok(received) => {
                    rest = rest.get_mut(received..).unwrap_or_default();
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match socket::ready(self.socket.fd(), PollFlags::POLLIN, deadline) {
                        Ok(true) => continue,
                        Ok(false) => io::ErrorKind::TimedOut.into(),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            return Err(self.io_error(request, timeout, failed));
        }
        Ok(())
    }

    fn io_error(&self, request: FrontendRequest, waited: Duration, error: io::Error) -> FrontendError {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, TimedOut};
        match error.kind() {
            BrokenPipe | ConnectionReset | NotConnected => FrontendError::HungUp { request },
            TimedOut => {
                let error = self.timeout_error(request, waited);
                self.close();
                error
            }
            _ => {
                // An unknown part of a message may have been sent.
                self.close();
                FrontendError::System { what: "communicate with the back-end", source: error }
            }
        }
    }

    /// Returns the error for a reply that did not arrive in time, as specific as can be known.
    fn timeout_error(&self, request: FrontendRequest, waited: Duration) -> FrontendError {
        if self.has_replied || !socket::is_unread(self.socket.fd()).unwrap_or(false) {
            return FrontendError::Timeout { request, waited };
        }
        let busy = socket::has_accepted(&self.path);
        FrontendError::NotServed { path: self.path.clone(), request, waited, busy }
    }
}

/// Encodes a message.
fn encode(request: FrontendRequest, flags: u32, payload: &[u8]) -> Vec<u8> {
    debug!("{request}: {} bytes", payload.len());
    counters::message_sent(request);
    let header = Header { request: request.0, flags, size: payload.len() as u32 };
    [header.as_bytes(), payload].concat()
}

/// Returns the time that `work` takes.
fn time_of(work: &mut dyn FnMut()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Returns a connection with a timeout of 1 ms, and the back-end's end.
    fn connection_with_1ms_timeout() -> (Connection, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let connection = Connection::connect(&path, Duration::from_millis(1), &Interrupt::new().unwrap()).unwrap();
        (connection, listener.accept().unwrap().0)
    }

    #[test]
    fn a_longer_timeout_applies_without_reply_ack() {
        let (mut connection, mut back_end) = connection_with_1ms_timeout();
        connection.send(FrontendRequest::SET_VRING_ENABLE, &[0; 8], &[]).unwrap();
        let request = FrontendRequest::GET_VRING_BASE;
        let replies_thread = std::thread::spawn(move || {
            let mut received = [0; 3 * (size_of::<Header>() + 8)];
            back_end.read_exact(&mut received).unwrap();
            // Longer than the connection's own timeout.
            std::thread::sleep(Duration::from_millis(100));
            let header = Header { request: request.0, flags: Header::REPLY_FLAGS, size: 8 };
            back_end.write_all(&[header.as_bytes(), &[1; 8], header.as_bytes(), &[2; 8]].concat()).unwrap();
        });
        let mut replies = Vec::new();
        connection.request_each(PATIENCE, request, [[0; 8].as_slice(); 2], &mut || {}, &mut replies).unwrap();
        assert_eq!(replies.iter().map(|reply| reply.payload[0]).collect::<Vec<_>>(), [1, 2]);
        replies_thread.join().unwrap();
    }

    /// Every byte may carry as many fds as a socket message allows.
    #[test]
    fn a_reply_in_pieces_keeps_at_most_max_fds() {
        let (mut connection, back_end) = connection_with_1ms_timeout();
        let replies_thread = std::thread::spawn(move || {
            let header = Header { request: FrontendRequest::GET_QUEUE_NUM.0, flags: Header::REPLY_FLAGS, size: 8 };
            for byte in [header.as_bytes(), &[0; 8]].concat() {
                socket::send(back_end.as_fd(), &[byte], &[back_end.as_fd(); 20]).unwrap();
            }
            back_end
        });
        let reply = connection.request_within(PATIENCE, FrontendRequest::GET_QUEUE_NUM, &[], &[]).unwrap();
        assert!(reply.fds.len() <= MAX_FDS, "{}", reply.fds.len());
        replies_thread.join().unwrap();
    }
}
