//! One connection to a vhost-user back-end: messages out, acknowledgements and replies in, each before a deadline.
//! Nothing here blocks: the socket does not, and every wait is a poll.
//!
//! Messages without a reply of their own are posted, and settled together: by their acknowledgements, or by a
//! GET_FEATURES round trip where the back-end does not acknowledge (rule F4.4). What messages mean is not known here.
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
use crate::abi::vhost_user::{Header, Request};
use crate::sys::socket;

/// Longest reply: GET_CONFIG's 268 bytes, with room for what is to come.
const MAX_REPLY: usize = 4096;

/// Most fds of a reply: none has more than one, and one too many is to be seen.
const MAX_FDS: usize = 2;

/// Messages sent before their answers are read.
pub(super) const MAX_UNACKED: usize = 64;

/// Which of several messages were refused, and how.
type Refusals = Vec<(usize, FrontendError)>;

/// What has come of answers that were owed.
#[derive(Default)]
pub(super) struct LateReplies {
    /// Where rings have stopped.
    pub(super) base_replies: Vec<Reply>,
    /// The first refusal.
    pub(super) refused: Option<FrontendError>,
}

pub(super) struct Connection {
    socket: Arc<ConnectionSocket>,
    path: PathBuf,
    timeout: Duration,
    interrupt: Interrupt,
    /// What becomes of a connection on which an answer is late.
    timeout_policy: TimeoutPolicy,
    /// The back-end has answered something: it has taken the connection up.
    has_replied: bool,
    /// Answers that come later than they were waited for. Nothing is sent while there are any.
    pending: Vec<PendingReply>,
    /// What has come of answers that were owed.
    late_replies: LateReplies,
    /// REPLY_ACK is agreed on.
    pub(super) acks: bool,
    /// Posted and not yet settled.
    unacked: Vec<Request>,
    send_buffer: Option<SendBuffer>,
}

/// Messages that are to be sent together.
struct SendBuffer {
    bytes: Vec<u8>,
    /// Goes along with the first of them.
    fd: Option<Arc<OwnedFd>>,
    last: Request,
    /// The number of them that are counted as posted.
    unacked: usize,
}

/// What becomes of a connection on which an answer is late. An answer stays owed where the interrupt has ended the wait.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum TimeoutPolicy {
    /// It is given up: the answer could be taken for another one.
    Close,
    /// The answer stays owed. The interrupt does not end the wait.
    KeepUninterruptible,
    /// The answer stays owed.
    Keep,
}

/// An answer that is owed.
#[derive(Clone, Copy)]
struct PendingReply {
    request: Request,
    /// It is the acknowledgement of a message without a reply of its own.
    is_ack: bool,
}

/// The socket, on which messages don't mix.
pub(super) struct ConnectionSocket {
    socket: UnixStream,
    sends: Mutex<()>,
}

impl ConnectionSocket {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a short message without a reply, if there is room for it now. One for a back-end that is gone is dropped.
    pub(super) fn try_send(&self, bytes: &[u8]) -> bool {
        let Ok(_alone) = self.sends.try_lock() else { return false };
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) != Err(Errno::EAGAIN)
    }
}

/// A reply's payload, and the fds that came with it.
pub(super) struct Reply {
    pub(super) request: Request,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as the one structure it must be.
    pub(super) fn read<T: FromBytes>(&self, rule: &'static str) -> Result<T, FrontendError> {
        T::read_from_bytes(&self.payload).map_err(|_| FrontendError::ProtocolViolation {
            request: self.request,
            what: format!("an answer of {} bytes, not {}", self.payload.len(), size_of::<T>()),
            rule,
        })
    }
}

impl Connection {
    /// Connects, or says at once why that is not possible.
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

    /// The connection, for short messages beside those of the channel.
    pub(super) fn socket(&self) -> &Arc<ConnectionSocket> {
        &self.socket
    }

    /// From now on posted messages ask for an acknowledgement.
    pub(super) fn enable_acks(&mut self) {
        self.acks = true;
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Says what becomes of late answers from now on.
    pub(super) fn set_timeout_policy(&mut self, timeout_policy: TimeoutPolicy) {
        self.timeout_policy = timeout_policy;
    }

    /// Returns true if answers are owed.
    pub(super) fn has_pending_replies(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Gets the answers that are owed, until `deadline`.
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
            } else if matches!(request, Request::GET_VRING_BASE | Request::GET_VRING_BASE_SKIP_DRAIN) {
                self.late_replies.base_replies.push(reply);
            }
        }
        Ok(std::mem::take(&mut self.late_replies))
    }

    /// Sends a message that has no reply of its own.
    pub(super) fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        self.send_message(request, self.ack_flags(), payload, fds)?;
        self.count_unacked(request)
    }

    /// The same, but it may be sent together with what is posted next: at the latest before something is waited for.
    pub(super) fn send_buffered(
        &mut self,
        request: Request,
        payload: &[u8],
        fd: Option<&Arc<OwnedFd>>,
    ) -> Result<(), FrontendError> {
        if self.has_pending_replies() {
            return Err(FrontendError::Interrupted { request });
        }
        // An fd belongs to the first of the messages that are sent together.
        if fd.is_some() {
            self.flush()?;
        }
        self.buffer_message(request, self.ack_flags(), payload, fd).unacked += 1;
        self.count_unacked(request)
    }

    fn buffer_message(
        &mut self,
        request: Request,
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

    fn count_unacked(&mut self, request: Request) -> Result<(), FrontendError> {
        self.unacked.push(request);
        // More unread acknowledgements than a socket holds would block both sides.
        if self.acks && self.unacked.len() >= MAX_UNACKED { self.wait_for_acks() } else { Ok(()) }
    }

    /// Sends a message that nothing answers, whatever was agreed on.
    pub(super) fn send_without_reply(&mut self, request: Request, payload: &[u8]) -> Result<(), FrontendError> {
        self.send_message(request, Header::FLAG_VERSION, payload, &[])
    }

    /// Waits until everything posted is done. On refusals the first is reported, when all are in.
    pub(super) fn wait_for_acks(&mut self) -> Result<(), FrontendError> {
        self.wait_for_acks_within(self.timeout)
    }

    /// The same, for requests that may take longer.
    pub(super) fn wait_for_acks_within(&mut self, timeout: Duration) -> Result<(), FrontendError> {
        self.collect_acks(timeout, &mut || {})?.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Waits until everything posted is done, after `sent`, whose time is part of `timeout`. Returns the refusals: which of the
    /// messages posted since the last time it was, counted from 0.
    pub(super) fn collect_acks(
        &mut self,
        timeout: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Refusals, FrontendError> {
        self.flush()?;
        let spent = time_of(sent);
        if !self.acks && !self.unacked.is_empty() {
            self.request_within(timeout, Request::GET_FEATURES, &[], &[])?;
        }
        self.receive_replies(timeout, spent, &[], &mut Vec::new())
    }

    /// How many messages are posted and not settled.
    pub(super) fn unacked(&self) -> usize {
        self.unacked.len()
    }

    /// Receives the acknowledgements of what is posted and then replies to `asked`, which are added to `replies` also when a
    /// later answer does not come. Each may take `timeout`, of which `spent` has passed for the first. Returns the refusals among
    /// the acknowledgements.
    fn receive_replies(
        &mut self,
        timeout: Duration,
        spent: Duration,
        asked: &[Request],
        replies: &mut Vec<Reply>,
    ) -> Result<Refusals, FrontendError> {
        let unacked = std::mem::take(&mut self.unacked).into_iter().filter(|_| self.acks);
        let unacked = unacked.map(|request| PendingReply { request, is_ack: true });
        let asked = asked.iter().map(|request| PendingReply { request: *request, is_ack: false });
        let expected: Vec<PendingReply> = unacked.chain(asked).collect();
        let mut refused = Vec::new();
        let mut spent = spent;
        for (number, answer) in expected.iter().enumerate() {
            let received = self.wait_for_reply(*answer, timeout, std::mem::take(&mut spent));
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

    /// Sends messages that have replies of their own behind what is posted, all before the first answer is read; the replies
    /// are added to `replies`, also those before one that does not come. With what is posted they may be no more than
    /// [`MAX_UNACKED`]. `sent` is called in between; what it takes is part of `timeout`. Returns the refusals of what was
    /// posted.
    pub(super) fn request_each<'a>(
        &mut self,
        timeout: Duration,
        request: Request,
        payloads: impl IntoIterator<Item = &'a [u8]>,
        sent: &mut dyn FnMut(),
        replies: &mut Vec<Reply>,
    ) -> Result<Refusals, FrontendError> {
        let mut asked = Vec::new();
        for payload in payloads {
            self.buffer_message(request, Header::FLAG_VERSION, payload, None);
            asked.push(request);
        }
        self.flush()?;
        let spent = time_of(sent);
        self.receive_replies(timeout, spent, &asked, replies)
    }

    /// What an acknowledgement says.
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

    /// Sends a message that has a reply of its own and waits for that (rule F3.1).
    pub(super) fn request(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, FrontendError> {
        self.request_within(self.timeout, request, payload, fds)
    }

    /// The same, for what may take longer.
    pub(super) fn request_within(
        &mut self,
        timeout: Duration,
        request: Request,
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

    /// Ends the connection; also wakes whoever watches it.
    pub(super) fn close(&self) {
        // An error means that it has ended already.
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
        request: Request,
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
        // Nothing answers what was not sent.
        sent.inspect_err(|_| self.unacked.truncate(self.unacked.len().saturating_sub(unacked)))
    }

    /// Sends messages, the last of which is `request`.
    fn send_bytes(&self, request: Request, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        if self.has_pending_replies() {
            return Err(FrontendError::Interrupted { request });
        }
        // A thread that panicked meanwhile has sent all or nothing.
        let _alone = self.socket.sends.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = socket::send_until(self.socket.fd(), bytes, fds, Instant::now() + self.timeout);
        sent.map_err(|error| self.io_error(request, self.timeout, error))
    }

    /// Receives an answer, the next that comes within `timeout`, of which `spent` has passed.
    fn wait_for_reply(
        &mut self,
        answer: PendingReply,
        timeout: Duration,
        spent: Duration,
    ) -> Result<Reply, FrontendError> {
        let request = answer.request;
        if self.has_data() {
            return self.receive_reply(request, timeout);
        }
        match self.wait_readable(
            request,
            Instant::now() + timeout.saturating_sub(spent),
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

    /// Returns true if something has come already.
    fn has_data(&self) -> bool {
        recv(self.socket.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Ok(1)
    }

    /// Waits until something has come, or the other side has hung up; false at the deadline.
    fn wait_readable(&self, request: Request, deadline: Instant, interruptible: bool) -> Result<bool, FrontendError> {
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

    fn receive_reply(&mut self, request: Request, timeout: Duration) -> Result<Reply, FrontendError> {
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
            return breach(format!("an answer to {}", Request(header.request)), "F10.1");
        }
        if header.flags != Header::REPLY_FLAGS {
            return breach(format!("flags {:#x} instead of {:#x}", header.flags, Header::REPLY_FLAGS), "F2.2");
        }
        let size = header.size as usize;
        if size > MAX_REPLY {
            return breach(format!("an answer of {size} bytes, more than {MAX_REPLY}"), "F1.4");
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
        request: Request,
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

    fn io_error(&self, request: Request, waited: Duration, error: io::Error) -> FrontendError {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, TimedOut};
        match error.kind() {
            BrokenPipe | ConnectionReset | NotConnected => FrontendError::HungUp { request },
            TimedOut => {
                let error = self.timeout_error(request, waited);
                self.close();
                error
            }
            _ => {
                // What of a message was sent is not known.
                self.close();
                FrontendError::System { what: "talk to the back-end", source: error }
            }
        }
    }

    /// What a back-end that has not answered in time does, as far as it can be known.
    fn timeout_error(&self, request: Request, waited: Duration) -> FrontendError {
        if self.has_replied || !socket::is_unread(self.socket.fd()).unwrap_or(false) {
            return FrontendError::Timeout { request, waited };
        }
        let busy = socket::has_accepted(&self.path);
        FrontendError::NotServed { path: self.path.clone(), request, waited, busy }
    }
}

/// A message as it goes over the socket.
fn encode(request: Request, flags: u32, payload: &[u8]) -> Vec<u8> {
    debug!("{request}: {} bytes", payload.len());
    counters::message_sent(request);
    let header = Header { request: request.0, flags, size: payload.len() as u32 };
    [header.as_bytes(), payload].concat()
}

/// The time that `work` takes.
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

    /// A channel that waits hardly at all, and the back-end's end.
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
        connection.send(Request::SET_VRING_ENABLE, &[0; 8], &[]).unwrap();
        let request = Request::GET_VRING_BASE;
        let replies_thread = std::thread::spawn(move || {
            let mut heard = [0; 3 * (size_of::<Header>() + 8)];
            back_end.read_exact(&mut heard).unwrap();
            // The timeout of all else is over.
            std::thread::sleep(Duration::from_millis(100));
            let header = Header { request: request.0, flags: Header::REPLY_FLAGS, size: 8 };
            back_end.write_all(&[header.as_bytes(), &[1; 8], header.as_bytes(), &[2; 8]].concat()).unwrap();
        });
        let mut replies = Vec::new();
        connection.request_each(PATIENCE, request, [[0; 8].as_slice(); 2], &mut || {}, &mut replies).unwrap();
        assert_eq!(replies.iter().map(|reply| reply.payload[0]).collect::<Vec<_>>(), [1, 2]);
        replies_thread.join().unwrap();
    }

    /// Every byte may bring as many fds as a message of a socket carries.
    #[test]
    fn a_reply_in_pieces_keeps_at_most_max_fds() {
        let (mut connection, back_end) = connection_with_1ms_timeout();
        let replies_thread = std::thread::spawn(move || {
            let header = Header { request: Request::GET_QUEUE_NUM.0, flags: Header::REPLY_FLAGS, size: 8 };
            for byte in [header.as_bytes(), &[0; 8]].concat() {
                socket::send(back_end.as_fd(), &[byte], &[back_end.as_fd(); 20]).unwrap();
            }
            back_end
        });
        let reply = connection.request_within(PATIENCE, Request::GET_QUEUE_NUM, &[], &[]).unwrap();
        assert!(reply.fds.len() <= MAX_FDS, "{}", reply.fds.len());
        replies_thread.join().unwrap();
    }
}
