//! The socket around a session: listens, hears one front-end after the other, and answers (rules R9.1, R9.2).

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

use super::replies::PendingReplies;
use super::ring_lock::{RingLock, RingLockClient};
use super::session::{MessageOutcome, Session};
use super::{BackendError, MAX_FDS, VhostUserMessage, VhostUserReply, VirtioDevice, Workers, counters};
use crate::abi::vhost_user::{Header, Request as Code};
use crate::sys::listen::{SocketPathGuard, listen};
use crate::sys::log_limit::limited;
use crate::sys::socket;

/// How long to wait, in milliseconds, when the system has no fd left for a new connection.
const RETRY_MS: u16 = 1000;
/// How long to wait, in milliseconds, before the front-end is connected to again.
const RECONNECT_MS: u16 = 100;
/// How long a front-end may take from the first byte of a message to the last, and to make room for an answer. Between
/// messages it may be silent as long as it likes.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most messages that are taken without waiting between two looks at whether to stop.
const MAX_MESSAGES_WITHOUT_POLL: usize = 64;
/// Bytes of answers that are sent together.
const MAX_REPLY_BYTES: usize = 4096;

/// Where front-ends connect. A socket that was made here is removed with it, unless another process has replaced it.
#[derive(Debug)]
pub struct BackendListener {
    // Removed while it is still listened at.
    _place: Option<SocketPathGuard>,
    socket: UnixListener,
}

/// A connected socket, the fd that says when to stop, and where the next front-end may come.
struct Connection<'a> {
    socket: BorrowedFd<'a>,
    stop: BorrowedFd<'a>,
    /// Until one has come.
    next: Option<BorrowedFd<'a>>,
    /// Messages that were there without waiting since `stop` and `next` were last looked at.
    messages_since_poll: usize,
    replies: Arc<PendingReplies>,
}

/// What a wait came to.
enum WaitResult<T> {
    Ready(T),
    /// The front-end has hung up.
    HungUp,
    /// It is time to stop.
    Stop,
}

impl BackendListener {
    /// Makes a socket at `path`. One that a dead process left there is replaced.
    ///
    /// # Errors
    /// [`BackendError::Listen`], which says what to do.
    pub fn bind(path: &Path) -> Result<BackendListener, BackendError> {
        let (socket, place) = listen(path)
            .map_err(|refused| BackendError::Listen { path: path.display().to_string(), advice: refused.advice })?;
        Ok(BackendListener { socket, _place: Some(place) })
    }

    /// Takes over a listening socket, for example one that a service manager made.
    pub fn from_socket(socket: UnixListener) -> BackendListener {
        BackendListener { socket, _place: None }
    }
}

/// A socket that this process inherited as fd `number`: either one to listen on, or a connection.
///
/// # Errors
/// What the system says: no such fd, or no socket.
pub fn inherit_socket(number: i32) -> io::Result<InheritedSocket> {
    let fd = socket::inherit(number)?;
    Ok(match getsockopt(&fd, AcceptConn)? {
        true => InheritedSocket::Listener(BackendListener::from_socket(fd.into())),
        false => InheritedSocket::Connection(fd.into()),
    })
}

/// What an inherited fd is.
#[derive(Debug)]
pub enum InheritedSocket {
    /// For [`serve`].
    Listener(BackendListener),
    /// For [`serve_connection`].
    Connection(UnixStream),
}

/// Serves `device` to one front-end after the other, until `stop` is readable. The next one waits meanwhile, until the
/// one before it hangs up or stops within a message for 10 seconds. Of a device that can have several front-ends
/// ([`VirtioDevice::max_front_ends`]) so many are served at the same time; only one of them has rings that run.
///
/// # Errors
/// What the system says of the listening socket. What goes wrong with a connection ends that one, and is logged.
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

/// Waits for a front-end; `None` is one that did not come after all. That the system has no room for it is said once.
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
                limited!(error, "can't accept a connection, and goes on trying: {e}");
            }
            if let WaitResult::Stop = wait(stop, PollFlags::POLLIN, stop, RETRY_MS.into())? {
                return Ok(Some(WaitResult::Stop));
            }
        }
    }
    Ok(None)
}

/// Serves as many front-ends at the same time as the device can have, each on a thread of its own.
fn serve_several(
    listener: &BackendListener,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
) -> Result<(), BackendError> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
    let seats = u32::try_from(device.max_front_ends()).unwrap_or(u32::MAX);
    // Readable while there is room for one more.
    let free = EventFd::from_value_and_flags(seats, flags).map_err(BackendError::system("make an eventfd"))?;
    let (free, turns, mut failing) = (&free, &Arc::new(RingLock::default()), false);
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
                run_connection(&connection, device, stop, None, Some(RingLockClient::new(turns, number)));
                let _ = free.write(1);
            };
            if let Err(e) = thread::Builder::new().name("front-end".into()).spawn_scoped(scope, serve) {
                limited!(error, "can't start a thread for a connection: {e}");
                let _ = free.write(1);
            }
        }
        Ok(())
    })
}

/// Serves `device` to the front-end that listens at `path`, as OVS and QEMU do with `server=on`: connects to it, and again
/// whenever the connection has ended, until `stop` is readable.
///
/// # Errors
/// [`BackendError::Connect`] for a path that no socket can have. A front-end that is not there is waited for.
pub fn connect_and_serve(
    path: &Path,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
) -> Result<(), BackendError> {
    let mut said = None;
    loop {
        match socket::connect(path).and_then(|connection| connection.set_nonblocking(false).map(|()| connection)) {
            Ok(connection) => {
                said = None;
                if run_connection(&connection, device, stop, None, None) {
                    return Ok(());
                }
            }
            Err(source) if source.kind() == io::ErrorKind::InvalidInput => {
                return Err(BackendError::Connect { path: path.display().to_string(), source });
            }
            Err(error) => {
                if said.replace(error.kind()) != Some(error.kind()) {
                    limited!(info, "{}: waits for a front-end that listens there ({error})", path.display());
                }
            }
        }
        if let WaitResult::Stop = wait(stop, PollFlags::POLLIN, stop, RECONNECT_MS.into())? {
            return Ok(());
        }
    }
}

/// Serves `device` to one front-end until it hangs up, or until `stop` is readable: then everything under way is
/// completed first. True if it was told to stop.
pub fn serve_connection(connection: &UnixStream, device: &Arc<dyn VirtioDevice>, stop: BorrowedFd<'_>) -> bool {
    run_connection(connection, device, stop, None, None)
}

fn run_connection(
    connection: &UnixStream,
    device: &Arc<dyn VirtioDevice>,
    stop: BorrowedFd<'_>,
    next: Option<BorrowedFd<'_>>,
    turn: Option<RingLockClient>,
) -> bool {
    limited!(info, "a front-end has connected");
    counters::frontend_connected();
    let answers = match PendingReplies::new(connection.as_fd()) {
        Ok(answers) => Arc::new(answers),
        Err(error) => {
            limited!(error, "the connection is closed: no fd is left for it: {error}");
            return false;
        }
    };
    let mut channel =
        Connection { socket: connection.as_fd(), stop, next, messages_since_poll: 0, replies: answers.clone() };
    let mut rings = Workers::new(device.clone());
    rings.set_replies(answers);
    turn.into_iter().for_each(|turn| rings.use_ring_lock(turn));
    if let Err(error) = rings.watch_connection(connection.as_fd()) {
        limited!(warn, "can't watch the connection: {error}");
    }
    // Ends before the rings, which may wait for pages that nobody brings any more (rule P1.8).
    let mut session = Session::new(device.clone());
    let ended = serve_messages(&mut channel, &mut session, &mut rings);
    channel.replies.try_send();
    match &ended {
        Ok(WaitResult::Stop) => {
            rings.stop_all();
            if let Err(error) = device.rings_stopped() {
                limited!(error, "what the guest has written may not be on stable storage: {error}");
            }
        }
        Ok(_) => limited!(info, "the front-end has hung up"),
        Err(error) => limited!(error, "the connection is closed: {error}"),
    }
    matches!(ended, Ok(WaitResult::Stop))
}

/// Answers messages strictly in order (rule F4.4), until there are no more.
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

/// Messages whose answers may wait for those of the messages behind them. If one has to wait for something, what is there is sent
/// before ([`VringController::before_blocking`](super::session::VringController::before_blocking)).
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

/// Reads one message, however it is cut into segments (rule F1.3).
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
    /// Sends an answer, those of messages that have come already together.
    fn send_reply(&mut self, reply: &VhostUserReply) -> Result<WaitResult<()>, BackendError> {
        // An fd travels with the first byte of what is sent.
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

    /// Sends the answers that wait.
    fn flush_replies(&mut self) -> Result<WaitResult<()>, BackendError> {
        if self.replies.is_empty() { Ok(WaitResult::Ready(())) } else { self.send(None) }
    }

    fn send(&mut self, fd: Option<&OwnedFd>) -> Result<WaitResult<()>, BackendError> {
        // A front-end that does not read its answers is given up: the next one waits for this connection.
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

    /// Waits for more of the front-end, which has all answers first.
    fn wait_for_more(&mut self, deadline: Option<Instant>) -> Result<WaitResult<()>, BackendError> {
        match self.flush_replies()? {
            WaitResult::Ready(()) => self.wait(PollFlags::POLLIN, deadline),
            ended => Ok(ended),
        }
    }

    /// Waits for the front-end until `deadline`. That another one has come is said once.
    fn wait(&mut self, flags: PollFlags, deadline: Option<Instant>) -> Result<WaitResult<()>, BackendError> {
        self.messages_since_poll = 0;
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // Rounded up: a wait that is over is over.
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
                limited!(warn, "another front-end has connected: it is served when this one hangs up (rule R9.2)");
            }
            if socket {
                return Ok(WaitResult::Ready(()));
            }
        }
    }

    /// Reads until `buf` is full or the front-end has hung up; tells how much came. From the first byte on there is a
    /// deadline.
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
                // A front-end that dies with our answers unread resets the connection: that too is hanging up.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
                Err(e) => return Err(BackendError::system("read from the front-end")(e)),
            }
        }
        Ok(WaitResult::Ready(filled))
    }
}

/// Waits for `fd`, for `stop` or for the time to pass.
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
