//! The server around a session: accepts connections, reads messages, sends replies (rule R9).

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::vhost_user::{FrontendRequest as Code, Header};
use crate::backend::rings::ring_lock::{RingLock, RingLockClient};
use crate::backend::session::replies::PendingReplies;
use crate::backend::session::{MessageOutcome, Session};
use crate::backend::{BackendError, MAX_FDS, VhostUserMessage, VhostUserReply, VirtioDevice, Workers, counters};
use crate::sys::listen::{SocketPathGuard, listen};
use crate::sys::log_limit::limited;
use crate::sys::socket;
use crate::sys::with_causes::with_causes;

/// Wait in milliseconds when the system has no file descriptor for a new connection.
const RETRY_MS: u16 = 1000;
/// Wait in milliseconds before connecting to the front-end again.
const RECONNECT_MS: u16 = 100;
/// Maximum time from the first byte of a message to the last, and for the socket to accept a reply (rule R9.3). Between
/// messages a front-end may be silent for any time.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of messages read without blocking between two checks of the stop descriptor.
const MAX_MESSAGES_WITHOUT_POLL: usize = 64;
/// Number of pending reply bytes that are sent together.
const MAX_REPLY_BYTES: usize = 4096;

/// A listening socket for front-ends. A socket file created by [`BackendListener::bind`] is removed on drop, unless
/// another process has replaced it.
#[derive(Debug)]
pub struct BackendListener {
    // Dropped, and so removed, before the socket is closed.
    _place: Option<SocketPathGuard>,
    socket: UnixListener,
}

/// The main socket of a connection, the stop descriptor, and the listening socket of the next front-end.
struct Connection<'a> {
    socket: BorrowedFd<'a>,
    stop: BorrowedFd<'a>,
    /// The listening socket, until another front-end has connected.
    next: Option<BorrowedFd<'a>>,
    /// Number of messages read without blocking since `stop` and `next` were last checked.
    messages_since_poll: usize,
    replies: Arc<PendingReplies>,
}

/// The result of a wait.
enum WaitResult<T> {
    Ready(T),
    /// The front-end has hung up.
    HungUp,
    /// The stop descriptor is readable.
    Stop,
}

impl BackendListener {
    /// Listens on a new socket at `path`. A stale socket file is replaced.
    ///
    /// # Errors
    /// [`BackendError::Listen`], with advice.
    pub fn bind(path: impl AsRef<Path>) -> Result<BackendListener, BackendError> {
        let path = path.as_ref();
        let (socket, place) = listen(path).map_err(|refused| BackendError::Listen {
            path: path.display().to_string(),
            advice: refused.advice,
            source: refused.source,
        })?;
        Ok(BackendListener { socket, _place: Some(place) })
    }

    /// Takes over a listening socket, for example from a service manager.
    pub fn from_socket(socket: UnixListener) -> BackendListener {
        BackendListener { socket, _place: None }
    }
}

/// Takes over the socket that this process inherited as descriptor `number`: a listening socket or a connection.
///
/// # Errors
/// The error of the system if there is no such descriptor, or it is no socket.
pub fn inherit_socket(number: i32) -> io::Result<InheritedSocket> {
    let fd = socket::inherit(number)?;
    Ok(match getsockopt(&fd, AcceptConn)? {
        true => InheritedSocket::Listener(BackendListener::from_socket(fd.into())),
        false => InheritedSocket::Connection(fd.into()),
    })
}

/// An inherited socket.
#[derive(Debug)]
pub enum InheritedSocket {
    /// A listening socket, for [`serve`].
    Listener(BackendListener),
    /// A connection, for [`serve_connection`].
    Connection(UnixStream),
}

/// Serves `device` to one front-end after the other until `stop` is readable, for example a
/// socket whose other end was dropped. The next front-end waits until the
/// current one hangs up or stalls within a message for 10 seconds (rules R9.2, R9.3). A device with several front-ends
/// ([`VirtioDevice::max_front_ends`]) serves that many at the same time; only one of them can run rings.
///
/// # Errors
/// The error of the listening socket. An error of a connection ends that connection and is logged.
pub fn serve(
    listener: &BackendListener,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
) -> Result<(), BackendError> {
    if device.max_front_ends() > 1 {
        return serve_several(listener, device, stop);
    }
    let mut failing = false;
    loop {
        match accept(listener, stop, &mut failing)? {
            Some(WaitResult::Ready(connection)) => {
                let stopped = run_connection(&connection, device, stop, Some(listener.socket.as_fd()), None);
                if stopped {
                    return Ok(());
                }
            }
            Some(_) => return Ok(()),
            None => {}
        }
    }
}

/// Waits for a connection. Returns `None` if it was closed before it could be accepted. An exhausted system is logged
/// once.
fn accept(
    listener: &BackendListener,
    stop: BorrowedFd<'_>,
    failing: &mut bool,
) -> Result<Option<WaitResult<UnixStream>>, BackendError> {
    if let WaitResult::Stop = wait(listener.socket.as_fd(), PollFlags::POLLIN, stop, PollTimeout::NONE)? {
        return Ok(Some(WaitResult::Stop));
    }
    match listener.socket.accept() {
        Ok((connection, _)) => {
            *failing = false;
            return Ok(Some(WaitResult::Ready(connection)));
        }
        Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
        Err(e) => {
            if !std::mem::replace(failing, true) {
                limited!(error, "can't accept a connection (retrying): {e}");
            }
            if let WaitResult::Stop = wait(stop, PollFlags::POLLIN, stop, RETRY_MS.into())? {
                return Ok(Some(WaitResult::Stop));
            }
        }
    }
    Ok(None)
}

/// Serves as many front-ends at the same time as the device allows, each on its own thread.
fn serve_several(
    listener: &BackendListener,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
) -> Result<(), BackendError> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
    let max_front_ends = u32::try_from(device.max_front_ends()).unwrap_or(u32::MAX);
    // Readable while another front-end can be served.
    let free = EventFd::from_value_and_flags(max_front_ends, flags).map_err(BackendError::system("make an eventfd"))?;
    let (free, ring_lock, mut failing) = (&free, &Arc::new(RingLock::default()), false);
    thread::scope(|scope| {
        for number in 0.. {
            if let WaitResult::Stop = wait(free.as_fd(), PollFlags::POLLIN, stop, PollTimeout::NONE)? {
                break;
            }
            let connection = match accept(listener, stop, &mut failing)? {
                Some(WaitResult::Ready(connection)) => connection,
                Some(_) => break,
                None => continue,
            };
            let _ = free.read();
            let serve = move || {
                run_connection(&connection, device, stop, None, Some(RingLockClient::new(ring_lock, number)));
                let _ = free.write(1);
            };
            if let Err(e) = thread::Builder::new().name("front-end".into()).spawn_scoped(scope, serve) {
                limited!(error, "can't start a connection thread: {e}");
                let _ = free.write(1);
            }
        }
        Ok(())
    })
}

/// Serves `device` to the front-end that listens at `path`, as OVS and QEMU with `server=on` do. Connects, and
/// reconnects after the connection has ended, until `stop` is readable.
///
/// # Errors
/// [`BackendError::Connect`] for an invalid socket path. A front-end that does not listen yet is waited for.
pub fn connect_and_serve(
    path: impl AsRef<Path>,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
) -> Result<(), BackendError> {
    let path = path.as_ref();
    let mut last_error = None;
    loop {
        match socket::connect(path).and_then(|connection| connection.set_nonblocking(false).map(|()| connection)) {
            Ok(connection) => {
                last_error = None;
                if run_connection(&connection, device, stop, None, None) {
                    return Ok(());
                }
            }
            Err(source) if source.kind() == io::ErrorKind::InvalidInput => {
                return Err(BackendError::Connect { path: path.display().to_string(), source });
            }
            Err(error) => {
                if last_error.replace(error.kind()) != Some(error.kind()) {
                    limited!(info, "{}: waiting for a front-end to listen ({error})", path.display());
                }
            }
        }
        if let WaitResult::Stop = wait(stop, PollFlags::POLLIN, stop, RECONNECT_MS.into())? {
            return Ok(());
        }
    }
}

/// Serves `device` to one front-end until it hangs up or `stop` is readable. Requests in flight are completed before a
/// stop. Returns true if it was stopped.
pub fn serve_connection(connection: &UnixStream, device: &Arc<dyn VirtioDevice>, stop: BorrowedFd<'_>) -> bool {
    run_connection(connection, device, stop, None, None)
}

fn run_connection(
    connection: &UnixStream,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
    next: Option<BorrowedFd<'_>>,
    ring_lock: Option<RingLockClient>,
) -> bool {
    limited!(info, "front-end connected");
    counters::frontend_connected();
    let replies = match PendingReplies::new(connection.as_fd()) {
        Ok(replies) => Arc::new(replies),
        Err(error) => {
            limited!(error, "the connection is closed: no file descriptor available: {}", with_causes(&error));
            return false;
        }
    };
    let mut channel =
        Connection { socket: connection.as_fd(), stop, next, messages_since_poll: 0, replies: replies.clone() };
    let mut rings = Workers::new(device.clone());
    rings.set_replies(replies);
    ring_lock.into_iter().for_each(|ring_lock| rings.use_ring_lock(ring_lock));
    if let Err(error) = rings.watch_connection(connection.as_fd()) {
        limited!(warn, "can't detect a hang-up while a ring is being stopped: {}", with_causes(&error));
    }
    // Dropped before the rings, whose workers may wait for pages that will not arrive any more (rule P1.8).
    let mut session = Session::new(device.clone());
    let ended = serve_messages(&mut channel, &mut session, &mut rings);
    channel.replies.try_send();
    match &ended {
        Ok(WaitResult::Stop) => {
            rings.stop_all();
            if let Err(error) = device.rings_stopped() {
                limited!(error, "written data may not be on stable storage: {}", with_causes(&error));
            }
        }
        Ok(_) => limited!(info, "front-end disconnected"),
        Err(error) => limited!(error, "the connection is closed: {}", with_causes(error)),
    }
    matches!(ended, Ok(WaitResult::Stop))
}

/// Processes messages strictly in order until the connection ends (rule F4.4).
fn serve_messages(
    channel: &mut Connection<'_>,
    session: &mut Session,
    rings: &mut Workers,
) -> Result<WaitResult<()>, BackendError> {
    loop {
        let message = match read_message(channel)? {
            WaitResult::Ready(message) => message,
            WaitResult::HungUp => return Ok(WaitResult::HungUp),
            WaitResult::Stop => return Ok(WaitResult::Stop),
        };
        if !may_delay_reply(message.code)
            && let ended @ (WaitResult::Stop | WaitResult::HungUp) = channel.flush_replies()?
        {
            return Ok(ended);
        }
        let step = session.handle_message(message, rings);
        rings.release_idle_ring_lock();
        let reply = match step {
            MessageOutcome::NoReply => continue,
            MessageOutcome::Reply(reply) => reply,
            MessageOutcome::Close(error) => return Err(error),
        };
        match channel.send_reply(&reply)? {
            WaitResult::Ready(()) => {}
            ended => return Ok(ended),
        }
    }
}

/// Returns true for messages whose replies may be sent together with those of later messages. Pending replies are sent
/// before a message blocks ([`VringController::before_blocking`](crate::backend::session::VringController::before_blocking)).
fn may_delay_reply(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::SET_VRING_NUM
            | C::SET_VRING_BASE
            | C::SET_VRING_ADDR
            | C::SET_VRING_CALL
            | C::SET_VRING_ERR
            | C::SET_VRING_KICK
            | C::SET_VRING_ENABLE
            | C::GET_VRING_BASE
            | C::GET_VRING_BASE_SKIP_DRAIN
    )
}

/// Reads one message in any number of segments (rule F1.3).
fn read_message(channel: &mut Connection<'_>) -> Result<WaitResult<VhostUserMessage>, BackendError> {
    let mut header = Header::new_zeroed();
    let mut fds = Vec::new();
    let head = size_of::<Header>();
    let mut deadline = None;
    channel.messages_since_poll += 1;
    if channel.messages_since_poll > MAX_MESSAGES_WITHOUT_POLL
        && let WaitResult::Stop = channel.wait_for_more(None)?
    {
        return Ok(WaitResult::Stop);
    }
    match channel.read_into(header.as_mut_bytes(), &mut fds, &mut deadline)? {
        WaitResult::Stop => return Ok(WaitResult::Stop),
        WaitResult::HungUp | WaitResult::Ready(0) => return Ok(WaitResult::HungUp),
        WaitResult::Ready(got) if got < head => return Err(BackendError::CutShort { got, needed: head }),
        WaitResult::Ready(_) => {}
    }
    let size = VhostUserMessage::payload_size(&header)?;
    let mut payload = vec![0; size];
    match channel.read_into(&mut payload, &mut fds, &mut deadline)? {
        WaitResult::Stop => return Ok(WaitResult::Stop),
        WaitResult::Ready(got) if got == size => {}
        WaitResult::Ready(got) => return Err(BackendError::CutShort { got: head + got, needed: head + size }),
        WaitResult::HungUp => return Err(BackendError::CutShort { got: head, needed: head + size }),
    }
    Ok(WaitResult::Ready(VhostUserMessage { code: Code(header.request), flags: header.flags, payload, fds }))
}

impl Connection<'_> {
    /// Queues a reply, so that replies to messages that have already arrived are sent together.
    fn send_reply(&mut self, reply: &VhostUserReply) -> Result<WaitResult<()>, BackendError> {
        // A descriptor is passed with the first byte of a send.
        if reply.fd.is_some()
            && let ended @ (WaitResult::Stop | WaitResult::HungUp) = self.flush_replies()?
        {
            return Ok(ended);
        }
        let waiting = self.replies.add(&reply.to_bytes());
        match reply.fd.is_some() || waiting >= MAX_REPLY_BYTES {
            true => self.send(reply.fd.as_ref()),
            false => Ok(WaitResult::Ready(())),
        }
    }

    /// Sends the pending replies.
    fn flush_replies(&mut self) -> Result<WaitResult<()>, BackendError> {
        if self.replies.is_empty() { Ok(WaitResult::Ready(())) } else { self.send(None) }
    }

    fn send(&mut self, fd: Option<&OwnedFd>) -> Result<WaitResult<()>, BackendError> {
        // A front-end that does not read its replies is disconnected, because the next one waits (rule R9.3).
        if let WaitResult::Stop = self.wait(PollFlags::POLLOUT, Some(Instant::now() + MESSAGE_TIMEOUT))? {
            return Ok(WaitResult::Stop);
        }
        match self.replies.send(fd.map(AsFd::as_fd)) {
            Ok(()) => Ok(WaitResult::Ready(())),
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                Ok(WaitResult::HungUp)
            }
            Err(e) => Err(BackendError::system("answer the front-end")(e)),
        }
    }

    /// Sends the pending replies and waits for more data.
    fn wait_for_more(&mut self, deadline: Option<Instant>) -> Result<WaitResult<()>, BackendError> {
        match self.flush_replies()? {
            WaitResult::Ready(()) => self.wait(PollFlags::POLLIN, deadline),
            ended => Ok(ended),
        }
    }

    /// Waits for the front-end until `deadline`. A connection of another front-end is logged once.
    fn wait(&mut self, flags: PollFlags, deadline: Option<Instant>) -> Result<WaitResult<()>, BackendError> {
        self.messages_since_poll = 0;
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // Rounded up, so that the deadline has passed when the wait ends.
            let left = left.map(|left| PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX));
            let next = self.next.unwrap_or(self.stop);
            let mut fds = [(self.stop, PollFlags::POLLIN), (self.socket, flags), (next, PollFlags::POLLIN)]
                .map(|(fd, flags)| PollFd::new(fd, flags));
            match poll(&mut fds, left.unwrap_or(PollTimeout::NONE)) {
                Ok(0) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    return Err(BackendError::Stalled { seconds: MESSAGE_TIMEOUT.as_secs() });
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(BackendError::system("wait for the front-end")(errno)),
            }
            let [stop, socket, next] = fds.map(|fd| fd.any() == Some(true));
            if stop {
                return Ok(WaitResult::Stop);
            }
            if next && self.next.take().is_some() {
                limited!(warn, "another front-end has connected and waits until this one disconnects (rule R9.2)");
            }
            if socket {
                return Ok(WaitResult::Ready(()));
            }
        }
    }

    /// Reads until `buf` is full or the front-end has hung up, and returns the number of bytes. The deadline starts
    /// with the first byte.
    fn read_into(
        &mut self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: &mut Option<Instant>,
    ) -> Result<WaitResult<usize>, BackendError> {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match socket::receive(self.socket, rest, fds, MAX_FDS) {
                Ok(0) => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => match self.wait_for_more(*deadline)? {
                    WaitResult::Ready(()) => {}
                    WaitResult::HungUp => break,
                    WaitResult::Stop => return Ok(WaitResult::Stop),
                },
                Ok(count) => {
                    filled += count;
                    deadline.get_or_insert_with(|| Instant::now() + MESSAGE_TIMEOUT);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A front-end that exits with unread replies resets the connection.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
                Err(e) => return Err(BackendError::system("read from the front-end")(e)),
            }
        }
        Ok(WaitResult::Ready(filled))
    }
}

/// Waits for `fd`, for `stop`, or for the timeout.
fn wait(
    fd: BorrowedFd<'_>,
    flags: PollFlags,
    stop: BorrowedFd<'_>,
    timeout: PollTimeout,
) -> Result<WaitResult<()>, BackendError> {
    let mut fds = [PollFd::new(stop, PollFlags::POLLIN), PollFd::new(fd, flags)];
    loop {
        match poll(&mut fds, timeout) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(BackendError::system("wait for the front-end")(errno)),
        }
    }
    let [stop, _] = fds;
    Ok(if stop.any() == Some(true) { WaitResult::Stop } else { WaitResult::Ready(()) })
}
