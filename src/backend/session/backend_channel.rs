//! Back-end side of the back-end channel, the socket passed with SET_BACKEND_REQ_FD.
//!
//! A request is sent at once if the socket has room. Otherwise it is queued, each pending notification once however
//! often its cause occurs (rule B1.4), and a thread sends it later. Nothing blocks on a front-end that does not read
//! (rule B1.2). An error ends the channel, not the connection (rule B1.5).

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, UnixAddr, getsockname, recv, send, shutdown};
use tracing::debug;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::vhost_user::{BackendRequest as Code, Header, VringState};
use crate::backend::BackendError;
use crate::backend::session::direct::DirectFrontend;
use crate::sys::join::join;
use crate::sys::log_limit::limited;

/// Maximum number of requests that wait for room or for their acknowledgement.
const MAX_QUEUED: usize = 1024;
/// Size of an acknowledgement in bytes.
const ACK_BYTES: usize = size_of::<Header>() + size_of::<u64>();

/// Handle for requests of the device and its rings to the front-end of one connection. Notifications made before
/// SET_BACKEND_REQ_FD are sent once there is a channel; those made after the connection has ended are dropped.
#[derive(Debug, Default)]
pub struct FrontendHandle {
    state: Mutex<ChannelState>,
    /// The front-end of a device without a back-end channel.
    direct: Option<Arc<dyn DirectFrontend>>,
}

#[derive(Debug, Default)]
struct ChannelState {
    channel: Option<ChannelSocket>,
    /// REPLY_ACK is negotiated.
    reply_ack: bool,
    /// The rest of a request that was sent in part.
    unsent_bytes: Vec<u8>,
    queued: VecDeque<QueuedRequest>,
    ring_errors: BTreeSet<u16>,
    ring_calls: BTreeSet<u16>,
    config_changed: bool,
    /// Sent requests that wait for their acknowledgement.
    unacknowledged: VecDeque<(Code, Sender<u64>)>,
}

/// The socket of the channel, and the eventfd that wakes its thread.
#[derive(Debug, Clone)]
struct ChannelSocket {
    socket: Arc<OwnedFd>,
    wake: Arc<EventFd>,
}

#[derive(Debug)]
struct QueuedRequest {
    code: Code,
    body: Vec<u8>,
    reply: Option<Sender<u64>>,
}

/// The next request to send.
enum NextRequest {
    Message,
    Error(u16),
    Call(u16),
    Config,
}

/// An open channel, closed on drop.
#[derive(Debug)]
pub(super) struct BackendChannel {
    frontend: Arc<FrontendHandle>,
    thread: Option<JoinHandle<()>>,
}

impl FrontendHandle {
    /// Creates the handle of a front-end that is reached by calls.
    pub(crate) fn of_direct(frontend: Arc<dyn DirectFrontend>) -> FrontendHandle {
        FrontendHandle { direct: Some(frontend), ..FrontendHandle::default() }
    }

    /// Returns the front-end, if it is reached by calls.
    pub(crate) fn direct(&self) -> Option<&dyn DirectFrontend> {
        self.direct.as_deref()
    }

    /// Notifies the front-end that configuration space has changed (rule B2.1).
    pub fn config_changed(&self) {
        match self.direct() {
            Some(frontend) => frontend.config_changed(),
            None => self.set_and_send(|state| !std::mem::replace(&mut state.config_changed, true)),
        }
    }

    /// Sends VRING_CALL: buffers of a ring were used (rule B3.2).
    pub(super) fn call(&self, ring: u16) {
        match self.direct() {
            Some(frontend) => frontend.call(ring),
            None => self.set_and_send(|state| state.ring_calls.insert(ring)),
        }
    }

    /// Sends VRING_ERR: a ring is broken (rule B3.2).
    pub(super) fn error(&self, ring: u16) {
        self.set_and_send(|state| state.ring_errors.insert(ring));
    }

    /// Sends a request without a file descriptor.
    ///
    /// # Errors
    /// [`BackendError::BackendChannel`] if there is no channel, or too many requests are queued.
    pub fn send(&self, code: Code, body: &(impl IntoBytes + Immutable)) -> Result<(), BackendError> {
        self.enqueue(code, body.as_bytes(), None)
    }

    /// Sends a request without a file descriptor and asks for its acknowledgement, 0 for success. Receive it with a
    /// deadline; the receiver is disconnected when the channel ends. Returns `None` if REPLY_ACK is not negotiated.
    ///
    /// # Errors
    /// As [`FrontendHandle::send`].
    pub fn send_with_reply(
        &self,
        code: Code,
        body: &(impl IntoBytes + Immutable),
    ) -> Result<Option<Receiver<u64>>, BackendError> {
        if !self.lock().reply_ack {
            return self.send(code, body).map(|()| None);
        }
        let (answer, answered) = bounded(1);
        self.enqueue(code, body.as_bytes(), Some(answer)).map(|()| Some(answered))
    }

    /// Opens the channel on the socket of SET_BACKEND_REQ_FD, after [`check_socket`].
    ///
    /// # Errors
    /// The error of the system. There is no channel then.
    pub(super) fn attach(self: &Arc<FrontendHandle>, socket: OwnedFd) -> Result<BackendChannel, BackendError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags).map_err(BackendError::system("make an eventfd"))?;
        let channel = ChannelSocket { socket: Arc::new(socket), wake: Arc::new(wake) };
        self.lock().channel = Some(channel.clone());
        let frontend = self.clone();
        let thread = thread::Builder::new().name("channel".into()).spawn(move || frontend.run(&channel));
        let channel_guard = |thread| BackendChannel { frontend: self.clone(), thread };
        let thread = thread.map_err(|error| {
            drop(channel_guard(None));
            BackendError::system("start a thread")(error)
        })?;
        self.set_and_send(|_| true);
        Ok(channel_guard(Some(thread)))
    }

    /// Returns true if there is a channel.
    pub(super) fn has_channel(&self) -> bool {
        self.lock().channel.is_some()
    }

    /// Sets whether REPLY_ACK is negotiated.
    pub(super) fn set_reply_ack(&self, acknowledges: bool) {
        self.lock().reply_ack = acknowledges;
    }

    fn enqueue(&self, code: Code, body: &[u8], answer: Option<Sender<u64>>) -> Result<(), BackendError> {
        let mut state = self.lock();
        if state.channel.is_none() {
            return Err(BackendError::BackendChannel {
                why: "not available: the front-end has not sent SET_BACKEND_REQ_FD",
            });
        }
        if state.queued.len() + state.unacknowledged.len() >= MAX_QUEUED {
            return Err(BackendError::BackendChannel { why: "the front-end does not acknowledge requests" });
        }
        state.queued.push_back(QueuedRequest { code, body: body.to_vec(), reply: answer });
        state.send_or_wake();
        Ok(())
    }

    /// Changes the state with `note`, and sends if that added a notification.
    fn set_and_send(&self, change: impl FnOnce(&mut ChannelState) -> bool) {
        let mut state = self.lock();
        if change(&mut state) {
            state.send_or_wake();
        }
    }

    /// Locks the state. A panic of a lock holder leaves it consistent, because changes are plain stores.
    fn lock(&self) -> MutexGuard<'_, ChannelState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Thread of the channel: reads acknowledgements and sends queued requests while `line` is the current socket.
    fn run(&self, channel: &ChannelSocket) {
        let mut received = Vec::new();
        loop {
            let waiting = {
                let state = self.lock();
                if !state.channel.as_ref().is_some_and(|now| Arc::ptr_eq(&now.socket, &channel.socket)) {
                    return;
                }
                !state.unsent_bytes.is_empty() || state.next().is_some()
            };
            let events = if waiting { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
            let mut fds =
                [PollFd::new(channel.wake.as_fd(), PollFlags::POLLIN), PollFd::new(channel.socket.as_fd(), events)];
            if poll(&mut fds, PollTimeout::NONE).is_err_and(|errno| errno != Errno::EINTR) {
                return self.lock().close("poll failed");
            }
            let _ = channel.wake.read();
            let result = read_available(&channel.socket, &mut received).and_then(|()| {
                let mut state = self.lock();
                state.take_acknowledgements(&mut received)?;
                state.flush();
                Ok(())
            });
            if let Err(why) = result {
                return self.lock().close(why);
            }
        }
    }
}

impl ChannelState {
    fn next(&self) -> Option<NextRequest> {
        if !self.queued.is_empty() {
            return Some(NextRequest::Message);
        }
        let error = self.ring_errors.first().map(|ring| NextRequest::Error(*ring));
        error
            .or_else(|| self.ring_calls.first().map(|ring| NextRequest::Call(*ring)))
            .or(self.config_changed.then_some(NextRequest::Config))
    }

    /// Sends what there is room for, and wakes the thread for the rest.
    fn send_or_wake(&mut self) {
        if !self.flush()
            && let Some(channel) = &self.channel
        {
            let _ = channel.wake.write(1);
        }
    }

    /// Sends what there is room for. Returns false if something is left.
    fn flush(&mut self) -> bool {
        let Some(channel) = self.channel.clone() else { return true };
        loop {
            let next = if self.unsent_bytes.is_empty() { self.next() } else { None };
            let bytes = match &next {
                None if self.unsent_bytes.is_empty() => return true,
                None => std::mem::take(&mut self.unsent_bytes),
                Some(next) => self.encode(next),
            };
            match send(channel.socket.as_raw_fd(), &bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => {
                    self.unsent_bytes = bytes.get(count..).unwrap_or_default().to_vec();
                    if let Some(next) = next {
                        self.mark_sent(&next);
                    }
                }
                Err(errno) => {
                    if next.is_none() {
                        self.unsent_bytes = bytes;
                    }
                    match errno {
                        Errno::EINTR => {}
                        Errno::EAGAIN => return false,
                        _ => {
                            self.close("closed by the front-end");
                            return true;
                        }
                    }
                }
            }
        }
    }

    fn encode(&self, next: &NextRequest) -> Vec<u8> {
        let ring = |code, index: u16| (code, VringState { index: index.into(), num: 0 }.as_bytes().to_vec(), false);
        let (code, body, answer) = match next {
            NextRequest::Message => match self.queued.front() {
                Some(message) => (message.code, message.body.clone(), message.reply.is_some()),
                None => return Vec::new(),
            },
            NextRequest::Error(index) => ring(Code::VRING_ERR, *index),
            NextRequest::Call(index) => ring(Code::VRING_CALL, *index),
            NextRequest::Config => (Code::CONFIG_CHANGE_MSG, Vec::new(), false),
        };
        let flags = Header::FLAG_VERSION | if answer { Header::FLAG_NEED_REPLY } else { 0 };
        debug!("{code} to the front-end");
        [Header { request: code.0, flags, size: body.len() as u32 }.as_bytes(), &body].concat()
    }

    /// Removes a sent request from the queue.
    fn mark_sent(&mut self, next: &NextRequest) {
        match next {
            NextRequest::Message => {
                if let Some(QueuedRequest { code, reply: Some(answer), .. }) = self.queued.pop_front() {
                    self.unacknowledged.push_back((code, answer));
                }
            }
            NextRequest::Error(ring) => {
                self.ring_errors.remove(ring);
            }
            NextRequest::Call(ring) => {
                self.ring_calls.remove(ring);
            }
            NextRequest::Config => self.config_changed = false,
        }
    }

    /// Decodes complete acknowledgements from `heard`.
    fn take_acknowledgements(&mut self, received: &mut Vec<u8>) -> Result<(), &'static str> {
        while let Some((bytes, rest)) = received.split_first_chunk::<ACK_BYTES>() {
            let (head, number) = bytes.split_at(size_of::<Header>());
            let header = Header::read_from_bytes(head).ok();
            let number = u64::read_from_bytes(number).unwrap_or_default();
            let expected = header.filter(|header| {
                let is_for = |(code, _): &(Code, _)| code.0 == header.request;
                header.flags == Header::REPLY_FLAGS
                    && header.size == 8
                    && self.unacknowledged.front().is_some_and(is_for)
            });
            let Some((_, answer)) = expected.and_then(|_| self.unacknowledged.pop_front()) else {
                return Err("the front-end sent data that is no acknowledgement (rule B1.5)");
            };
            // The receiver may have been dropped.
            let _ = answer.try_send(number);
            *received = rest.to_vec();
        }
        Ok(())
    }

    /// Closes the channel. Pending notifications are kept for the next one.
    fn close(&mut self, why: &str) {
        let Some(channel) = self.channel.take() else { return };
        if self.queued.is_empty() && self.unacknowledged.is_empty() {
            limited!(info, "the back-end channel is closed: {why}");
        } else {
            limited!(warn, "the back-end channel is closed: {why}");
        }
        self.queued.clear();
        self.unacknowledged.clear();
        self.unsent_bytes.clear();
        let _ = shutdown(channel.socket.as_raw_fd(), Shutdown::Both);
        let _ = channel.wake.write(1);
    }
}

impl Drop for BackendChannel {
    fn drop(&mut self) {
        self.frontend.lock().close("the connection ended or a new channel was set");
        if let Some(thread) = self.thread.take() {
            join(thread);
        }
    }
}

/// Checks that the descriptor of SET_BACKEND_REQ_FD is a UNIX socket.
///
/// # Errors
/// [`BackendError::BackendChannel`] otherwise (rule F8.3). Other sockets may stay readable without data, for example
/// for pending errors (rule F9.2).
pub(super) fn check_socket(fd: OwnedFd) -> Result<OwnedFd, BackendError> {
    match getsockname::<UnixAddr>(fd.as_raw_fd()) {
        Ok(_) => Ok(fd),
        Err(_) => Err(BackendError::BackendChannel { why: "the descriptor is no UNIX socket" }),
    }
}

/// Reads at most one acknowledgement, so `heard` stays bounded. File descriptors are closed by the system.
fn read_available(socket: &OwnedFd, received: &mut Vec<u8>) -> Result<(), &'static str> {
    let mut buffer = [0; ACK_BYTES];
    match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Err("closed by the front-end"),
        Ok(count) => {
            received.extend(buffer.get(..count).unwrap_or_default());
            Ok(())
        }
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
        Err(errno) => {
            debug!("the back-end channel: {}", io::Error::from(errno));
            Err("read failed")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn open() -> (Arc<FrontendHandle>, BackendChannel, UnixStream) {
        let (frontend, (ours, theirs)) = (Arc::new(FrontendHandle::default()), UnixStream::pair().unwrap());
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        let channel_guard = frontend.attach(ours.into()).unwrap();
        (frontend, channel_guard, theirs)
    }

    /// The next message: number, flags, first four bytes of what follows.
    fn next(stream: &mut UnixStream) -> (Code, u32, Option<u32>) {
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        let header: Header = zerocopy::transmute!(head);
        let mut body = vec![0; header.size as usize];
        stream.read_exact(&mut body).unwrap();
        (Code(header.request), header.flags, body.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes)))
    }

    fn ack(code: Code, number: u64) -> Vec<u8> {
        let header = Header { request: code.0, flags: 5, size: 8 };
        [header.as_bytes(), number.as_bytes()].concat()
    }

    fn wait_until(what: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !what() {
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
    }

    #[test]
    fn notifications_before_the_channel_is_set_are_sent_over_it() {
        let (frontend, (ours, mut theirs)) = (Arc::new(FrontendHandle::default()), UnixStream::pair().unwrap());
        assert!(frontend.send(Code::IOTLB_MSG, &[0u8; 32]).is_err());
        frontend.config_changed();
        frontend.config_changed();
        frontend.call(3);
        let _attached = frontend.attach(ours.into()).unwrap();
        assert_eq!(next(&mut theirs), (Code::VRING_CALL, 1, Some(3)));
        assert_eq!(next(&mut theirs), (Code::CONFIG_CHANGE_MSG, 1, None));
        frontend.error(7);
        assert_eq!(next(&mut theirs), (Code::VRING_ERR, 1, Some(7)));
    }

    #[test]
    fn pending_notifications_are_sent_once_when_the_front_end_reads_again() {
        let (frontend, _attached, mut theirs) = open();
        let mut sent = 0;
        while frontend.send(Code::IOTLB_MSG, &[sent, 0]).is_ok() {
            sent += 1;
        }
        assert!(sent as usize >= MAX_QUEUED, "{sent}");
        for _ in 0..100_000 {
            frontend.config_changed();
            frontend.call(1);
            frontend.call(2);
        }
        for number in 0..sent {
            assert_eq!(next(&mut theirs), (Code::IOTLB_MSG, 1, Some(number)));
        }
        let rest = [(Code::VRING_CALL, 1, Some(1)), (Code::VRING_CALL, 1, Some(2)), (Code::CONFIG_CHANGE_MSG, 1, None)];
        assert_eq!([next(&mut theirs), next(&mut theirs), next(&mut theirs)], rest);
        wait_until(|| frontend.lock().next().is_none());
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut [0]).is_err(), "something was told twice");
    }

    #[test]
    fn fragmented_acknowledgements_reach_their_senders() {
        let (frontend, _attached, mut theirs) = open();
        assert!(frontend.send_with_reply(Code::IOTLB_MSG, &1u64).unwrap().is_none(), "REPLY_ACK is not agreed on");
        assert_eq!(next(&mut theirs).1, 1);
        frontend.set_reply_ack(true);
        let asked: Vec<_> =
            (0..100u64).map(|n| frontend.send_with_reply(Code::IOTLB_MSG, &n).unwrap().unwrap()).collect();
        let mut answers = Vec::new();
        for n in 0..100 {
            assert_eq!(next(&mut theirs), (Code::IOTLB_MSG, 9, Some(n)));
            answers.extend(ack(Code::IOTLB_MSG, u64::from(n) * 3));
        }
        for piece in answers.chunks(7) {
            theirs.write_all(piece).unwrap();
        }
        for (n, answer) in (0..).zip(asked) {
            assert_eq!(answer.recv_timeout(PATIENCE), Ok(n * 3));
        }
    }

    #[test]
    fn invalid_acknowledgements_close_the_channel_and_a_new_one_works() {
        let long = Header { request: Code::IOTLB_MSG.0, flags: 5, size: 16 };
        let long = [long.as_bytes(), &[0; 16]].concat();
        let wrong: [Vec<u8>; 4] = [vec![0xff; 999], ack(Code::VRING_CALL, 0), long, vec![0; 20]];
        for bytes in wrong {
            let (frontend, channel_guard, mut theirs) = open();
            frontend.set_reply_ack(true);
            let asked = frontend.send_with_reply(Code::IOTLB_MSG, &0u64).unwrap().unwrap();
            theirs.write_all(&bytes).unwrap();
            assert!(asked.recv_timeout(PATIENCE).is_err());
            wait_until(|| frontend.lock().channel.is_none());
            assert!(frontend.send_with_reply(Code::IOTLB_MSG, &0u64).is_err());
            frontend.config_changed();
            drop(channel_guard);
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let _attached = frontend.attach(ours.into()).unwrap();
            assert_eq!(next(&mut theirs), (Code::CONFIG_CHANGE_MSG, 1, None));
        }
    }

    #[test]
    fn a_closed_or_invalid_channel_socket_is_handled() {
        let (frontend, _attached, theirs) = open();
        frontend.set_reply_ack(true);
        let asked = frontend.send_with_reply(Code::IOTLB_MSG, &0u64).unwrap().unwrap();
        drop(theirs);
        assert!(asked.recv_timeout(PATIENCE).is_err());
        wait_until(|| frontend.lock().channel.is_none());
        frontend.call(0);
        let file = tempfile::tempfile().unwrap();
        let error = check_socket(file.into()).unwrap_err();
        assert!(error.to_string().contains("no UNIX socket"), "{error}");
        // Sockets that nothing can be sent over.
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(check_socket(tcp.into()).is_err(), "its errors may keep it readable");
        let folder = tempfile::tempdir().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
        for socket in [OwnedFd::from(listener), OwnedFd::from(datagrams)] {
            let frontend = Arc::new(FrontendHandle::default());
            let _attached = frontend.attach(check_socket(socket).unwrap()).unwrap();
            frontend.config_changed();
            wait_until(|| frontend.lock().channel.is_none());
        }
    }
}
