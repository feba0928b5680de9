//! Two processes connected as a pair, with a SOCK_SEQPACKET connection per queue pair.
//!
//! The process that holds the lock of `SOCKET.lock` listens at `SOCKET`, and the other process connects. If the
//! listening process ends, the remaining one takes the lock and listens. Packets are exchanged again when a new process
//! has connected. A third process, for example the destination of a migration, waits until one of the two has ended.
//! Packets that it sends meanwhile are queued until its socket is full, and then dropped. The first message of a
//! connection names its queue pair, and all others are packets.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use tracing::debug;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::NetError;
use super::state::{PeerPort, SharedNetState};
use crate::sys::join::join;
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// Interval between connection attempts, in milliseconds.
const RETRY_MS: u16 = 100;
/// Maximum time for a new connection to send its first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);

/// System errors after which a connection attempt is delayed.
const EXHAUSTED: [Errno; 4] = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
/// The delay, in milliseconds.
const EXHAUSTED_RETRY_MS: u16 = 1000;

/// The first message of a connection.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Hello {
    magic: [u8; 8],
    /// The sender's pair that this connection is for.
    pair: U16,
    /// The sender's number of pairs.
    pairs: U16,
}

const MAGIC: [u8; 8] = *b"vm-pair1";

/// Connects and reconnects the pair until dropped.
#[derive(Debug)]
pub(super) struct PairConnector {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl PairConnector {
    /// Starts connecting to the other end at `path`. Ports are put into `shared`.
    pub(super) fn start(path: &Path, pairs: u16, shared: Arc<SharedNetState>) -> Result<PairConnector, NetError> {
        let refused = |source: io::Error| NetError::Pair { path: path.to_owned(), source };
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|errno| refused(errno.into()))?);
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(lock).map_err(refused)?;
        UnixAddr::new(path).map_err(|errno| refused(errno.into()))?;
        let mut end = PairEnd {
            path: path.to_owned(),
            lock,
            pairs,
            shared,
            stop: stop.clone(),
            listener: None,
            exhausted: Cell::default(),
        };
        // The first process must listen before it reports that it is ready.
        end.connect_or_listen();
        let thread = thread::Builder::new().name("pair".into()).spawn(move || end.run()).map_err(refused)?;
        Ok(PairConnector { stop, thread: Some(thread) })
    }
}

impl Drop for PairConnector {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            join(thread);
        }
    }
}

/// This end of the pair.
struct PairEnd {
    path: PathBuf,
    lock: File,
    pairs: u16,
    shared: Arc<SharedNetState>,
    stop: Arc<EventFd>,
    /// The listening socket, if this end listens.
    listener: Option<UnixListener>,
    /// True if the last connection could not be accepted for lack of file descriptors or memory.
    exhausted: Cell<bool>,
}

impl PairEnd {
    fn run(&mut self) {
        while !self.wait() {
            self.connect_or_listen();
        }
        if self.listener.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Connects to the other end, unless this end listens.
    fn connect_or_listen(&mut self) {
        if self.listener.is_none()
            && let Err(error) = self.connect()
        {
            debug!("{}: {}", self.path.display(), with_causes(&error));
        }
    }

    /// Connects missing pairs. Listens if nothing listens at the path.
    fn connect(&mut self) -> io::Result<()> {
        let state = self.shared.state();
        for pair in (0..self.pairs).filter(|pair| state.port(*pair).is_none()) {
            let stream = match connect_nonblocking(&self.path) {
                Ok(stream) => stream,
                Err(Errno::ENOENT | Errno::ECONNREFUSED) => return self.listen(),
                Err(errno) => return Err(errno.into()),
            };
            let hello = Hello { magic: MAGIC, pair: pair.into(), pairs: self.pairs.into() };
            (&stream).write_all(hello.as_bytes())?;
            self.add(pair, stream)?;
        }
        Ok(())
    }

    /// Listens, unless the other end holds the lock.
    fn listen(&mut self) -> io::Result<()> {
        if self.lock.try_lock().is_err() {
            return Ok(());
        }
        // A socket file at the path is stale, because a process that listens holds the lock.
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let fd = seqpacket(SockFlag::SOCK_NONBLOCK)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(&self.path)?)?;
        listen(&fd, Backlog::MAXCONN)?;
        limited!(info, "{}: waiting for the other end", self.path.display());
        self.listener = Some(fd.into());
        Ok(())
    }

    fn accept(&self, listener: &UnixListener) -> io::Result<()> {
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        let mut bytes = [0; size_of::<Hello>()];
        let count = io::Read::read(&mut &stream, &mut bytes)?;
        let hello = Hello::read_from_bytes(bytes.get(..count).unwrap_or_default());
        let Some(hello) = hello.ok().filter(|hello| hello.magic == MAGIC) else {
            return Err(io::Error::other("a process has connected that is no back-end with --pair"));
        };
        let (pair, pairs) = (hello.pair.get(), hello.pairs.get());
        if pairs != self.pairs || pair >= pairs {
            let (here, there) = (self.pairs, pairs);
            let why = format!("{here} queue pairs here and {there} at the other end: start both with the same number");
            return Err(io::Error::other(why));
        }
        if self.shared.state().port(pair).is_some() {
            return Err(io::Error::other(format!("a third end has come for pair {pair}, which has two")));
        }
        self.add(pair, stream)
    }

    fn add(&self, pair: u16, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let port = Arc::new(PeerPort::new(stream.try_clone()?.into(), stream.into()));
        limited!(info, "{}: pair {pair} is connected", self.path.display());
        self.set(pair, Some(port));
        Ok(())
    }

    fn set(&self, pair: u16, port: Option<Arc<PeerPort>>) {
        self.shared.update(|state| {
            if let Some(place) = state.ports.get_mut(usize::from(pair)) {
                *place = port;
            }
        });
    }

    /// Waits for events and handles them: new connections, and connections that have ended. Returns true if this end
    /// must stop.
    fn wait(&self) -> bool {
        let state = self.shared.state();
        let missing = state.ports.iter().any(Option::is_none);
        let timeout = match self.listener.is_none() && missing {
            true => PollTimeout::from(RETRY_MS),
            false => PollTimeout::NONE,
        };
        let ports = || (0..).zip(&state.ports).filter_map(|(pair, port)| Some((pair, port.as_ref()?)));
        // While all pairs are connected, a new connection stays in the backlog.
        let listener = self.listener.as_ref().filter(|_| missing);
        let listening = listener.map(AsFd::as_fd);
        let mut fds = vec![PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        fds.extend(listening.iter().map(|fd: &BorrowedFd<'_>| PollFd::new(*fd, PollFlags::POLLIN)));
        // With no events requested, `poll` reports only the end of a connection.
        fds.extend(ports().map(|(_, port)| PollFd::new(port.input(), PollFlags::empty())));
        if let Err(errno) = poll(&mut fds, timeout)
            && errno != Errno::EINTR
        {
            limited!(error, "{}: poll: {errno}", self.path.display());
            return true;
        }
        let mut ready = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty()));
        if ready.next() == Some(true) {
            return true;
        }
        if let Some(listener) = listener
            && ready.next() == Some(true)
            && let Err(refused) = self.accept(listener)
        {
            self.report_refused(&refused);
        }
        for ((pair, _), _) in ports().zip(ready).filter(|(_, gone)| *gone) {
            limited!(info, "{}: the other end of pair {pair} is gone", self.path.display());
            self.set(pair, None);
        }
        false
    }
}

impl PairEnd {
    /// Logs the reason why a connection was not accepted. For lack of file descriptors or memory, a connection stays
    /// pending and is retried later. This is logged once.
    fn report_refused(&self, refused: &io::Error) {
        let exhausted = refused.raw_os_error().is_some_and(|errno| EXHAUSTED.contains(&Errno::from_raw(errno)));
        if !self.exhausted.replace(exhausted) || !exhausted {
            limited!(error, "{}: {refused}", self.path.display());
        }
        if exhausted {
            // The next call of `wait` checks the stop event again.
            let _ = poll(&mut [PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)], EXHAUSTED_RETRY_MS);
        }
    }
}

fn seqpacket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)
}

/// Connects without blocking. EAGAIN means that the other end's backlog is full.
fn connect_nonblocking(path: &Path) -> nix::Result<UnixStream> {
    let fd = seqpacket(SockFlag::SOCK_NONBLOCK)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(fd.into())
}
