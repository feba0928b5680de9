//! Accepting a migration: waits for all its channels among any other connections.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::resolve::resolve;
use super::{
    FdKind, LastReceived, OnFinish, StreamChannel, StreamConnection, StreamOptions, Uri, check_channel_count,
    duplicate_inherited, kind_of,
};
use super::{open_error, set_nonblocking, spawn_command};
use crate::stream::cancel::{CancelToken, poll_until};
use crate::stream::frame::{
    ChannelId, ConnectionHeader, FrameWriter, HEADER_BYTES, MAX_CHANNELS, MigrationId, OLDEST_VERSION,
};
use crate::stream::{StreamError, ToSource};
use crate::sys::listen::{SocketPathGuard, listen};
use crate::sys::lock;
use crate::sys::with_causes::with_causes;

/// Maximum number of connections that are not part of a complete migration.
const MAX_PENDING: usize = 2 * MAX_CHANNELS as usize;
/// Time limit for a connection to send its header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the other channels of a migration to connect.
const ALL_CHANNELS_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for resolving the host name to listen at.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Delay after the system had no descriptor left.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Listens for migrations at a URI. Dropping it removes its socket file.
#[derive(Debug)]
pub struct StreamListener {
    uri: Uri,
    socket: ListeningSocket,
    /// Connections that are not part of a complete migration.
    pending: Mutex<Vec<PendingConnection>>,
}

#[derive(Debug)]
enum ListeningSocket {
    Tcp(TcpListener),
    Unix {
        // Removed while it is still listened at.
        _place: SocketPathGuard,
        listener: UnixListener,
    },
    /// Opened when accepting.
    Single,
}

/// A connection that a [`StreamListener`] has accepted.
#[derive(Debug)]
pub enum IncomingConnection {
    /// All channels of a migration.
    Migration(StreamConnection),
    /// A source queries the outcome of a migration.
    OutcomeQuery(OutcomeQuery),
}

/// A source that waits for the outcome of a migration.
#[derive(Debug)]
pub struct OutcomeQuery {
    /// The migration.
    pub id: MigrationId,
    channel: StreamChannel,
}

impl OutcomeQuery {
    /// Answers with STARTED, FAILED, HELD or UNKNOWN.
    ///
    /// # Errors
    /// The error of the connection. The source then queries again.
    pub fn reply(self, answer: &ToSource) -> Result<(), StreamError> {
        let id = ChannelId { migration: self.id, channel: 0 };
        answer.write(&mut FrameWriter::new(self.channel, id)).map(drop)
    }
}

impl StreamListener {
    /// Starts listening.
    ///
    /// # Errors
    /// `Open` with advice: port or socket in use, path too long, no permission, no such file.
    pub fn bind(uri: &Uri) -> Result<StreamListener, StreamError> {
        let mut uri = uri.clone();
        let socket = match &mut uri {
            Uri::Tcp { .. } => {
                let (listener, bound) = bind_tcp(&uri)?;
                uri = bound;
                ListeningSocket::Tcp(listener)
            }
            Uri::Unix(path) => {
                let path = path.clone();
                bind_unix(&uri, path)?
            }
            Uri::File(path) => {
                File::open(&*path).map_err(open_error(&uri))?;
                ListeningSocket::Single
            }
            Uri::Exec(_) => ListeningSocket::Single,
            Uri::Fd(number) => {
                let number = *number;
                duplicate_inherited(&uri, number)?;
                ListeningSocket::Single
            }
        };
        Ok(StreamListener { uri, socket, pending: Mutex::default() })
    }

    /// Returns the URI, with the port chosen by the system.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Accepts a migration as [`next`](Self::next) does, and answers outcome queries with UNKNOWN.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn accept(&self, options: &StreamOptions) -> Result<StreamConnection, StreamError> {
        loop {
            match self.next(options)? {
                IncomingConnection::Migration(connection) => return Ok(connection),
                IncomingConnection::OutcomeQuery(query) => {
                    if let Err(error) = query.reply(&ToSource::Unknown) {
                        tracing::warn!("a source that asks about a migration went away: {}", with_causes(&error));
                    }
                }
            }
        }
    }

    /// Waits until all channels of a migration or an outcome query have connected, and replies to their headers. Other
    /// connections are dropped with a warning. `options.channels` and `options.one_way` are not used: the source
    /// chooses them.
    ///
    /// # Errors
    /// `Timeout` after `options.deadline`, `Cancelled`, and any error of a single-channel transport.
    pub fn next(&self, options: &StreamOptions) -> Result<IncomingConnection, StreamError> {
        let single = match &self.uri {
            Uri::Tcp { .. } | Uri::Unix(_) => return self.accept_sockets(options),
            Uri::File(path) => (File::open(path).map_err(open_error(&self.uri))?.into(), OnFinish::Nothing),
            Uri::Exec(command) => spawn_command(&self.uri, command)?,
            Uri::Fd(number) => (duplicate_inherited(&self.uri, *number)?, OnFinish::Nothing),
        };
        let (fd, end) = single;
        let answers = kind_of(&fd)? == FdKind::Socket;
        let mut channel = StreamChannel::new(fd, end, options, &LastReceived::new())?;
        channel.set_timeout(options.deadline)?;
        let header = ConnectionHeader::read(&mut channel);
        if let Err(StreamError::Version { .. }) = header {
            send_oldest_version(&mut channel);
        }
        let header = header?;
        check_channel_count(&self.uri, header.channels)?;
        if !header.one_way {
            if !answers {
                return Err(self.uri.error("this stream wants answers, which can't be given here: use a socket", None));
            }
            channel.write_all(&header.accepted().encode())?;
        }
        channel.set_timeout(options.timeout)?;
        Ok(incoming_connection(header.accepted(), vec![channel], options))
    }

    fn accept_sockets(&self, options: &StreamOptions) -> Result<IncomingConnection, StreamError> {
        let deadline = options.deadline.map(|time| Instant::now() + time);
        let mut waiting = lock(&self.pending);
        loop {
            if let Some(complete) = take_complete(&mut waiting) {
                match accept_migration(complete, options) {
                    Ok(incoming) => return Ok(incoming),
                    Err(StreamError::Cancelled) => return Err(StreamError::Cancelled),
                    Err(error) => tracing::warn!("a migration went away before it began: {}", with_causes(&error)),
                }
            }
            let due = waiting.iter().map(|waiting| waiting.since + waiting.timeout().0);
            let wake = due.chain(deadline).min();
            let (ready, listening) = self.poll(&waiting, options, wake)?;
            for (connection, _) in waiting.iter_mut().zip(&ready).filter(|(_, ready)| **ready) {
                connection.read();
            }
            waiting.retain(PendingConnection::must_keep);
            if listening && let Some(fd) = self.accept_one(options)? {
                if waiting.len() == MAX_PENDING {
                    tracing::warn!("too many connections at {}: dropping the oldest", self.uri);
                    // A source sends its header at once.
                    let oldest = waiting.iter().position(|waiting| waiting.header.is_none()).unwrap_or_default();
                    waiting.remove(oldest);
                }
                waiting.push(PendingConnection::new(fd));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let advice = format!("no migration came within {:?}", options.deadline.unwrap_or_default());
                return Err(self.uri.error(advice, None));
            }
        }
    }

    /// Polls the listener and `waiting`. Returns which of `waiting` are readable, and true if there is a new
    /// connection.
    fn poll(
        &self,
        waiting: &[PendingConnection],
        options: &StreamOptions,
        until: Option<Instant>,
    ) -> Result<(Vec<bool>, bool), StreamError> {
        let listener = match &self.socket {
            ListeningSocket::Tcp(listener) => listener.as_fd(),
            ListeningSocket::Unix { listener, .. } => listener.as_fd(),
            ListeningSocket::Single => options.cancel.fd(),
        };
        // Connections that have sent their header send nothing more before the reply; only their end matters.
        let events = |w: &PendingConnection| if w.header.is_none() { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds: Vec<_> = waiting.iter().map(|w| PollFd::new(w.fd.as_fd(), events(w))).collect();
        fds.extend([listener, options.cancel.fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        poll_until(&mut fds, until)?;
        options.cancel.check()?;
        let mut ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        ready.pop();
        let listening = ready.pop().unwrap_or(false);
        Ok((ready, listening))
    }

    fn accept_one(&self, options: &StreamOptions) -> Result<Option<OwnedFd>, StreamError> {
        let accepted = match &self.socket {
            ListeningSocket::Tcp(listener) => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
            ListeningSocket::Unix { listener, .. } => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
            ListeningSocket::Single => return Ok(None),
        };
        match accepted {
            Ok(fd) => {
                set_nonblocking(fd.as_fd(), true)?;
                Ok(Some(fd))
            }
            // The client has disconnected before it was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            // A shortage of system resources does not end the wait for a guest.
            Err(error) if [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS].contains(&errno(&error)) => {
                tracing::warn!("can't accept a connection now: {error}");
                options.cancel.wait(RETRY_DELAY)?;
                Ok(None)
            }
            Err(error) => Err(open_error(&self.uri)(error)),
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// A connection that is not part of a complete migration yet.
#[derive(Debug)]
struct PendingConnection {
    fd: OwnedFd,
    since: Instant,
    bytes: Vec<u8>,
    header: Option<ConnectionHeader>,
    gone: bool,
}

impl PendingConnection {
    fn new(fd: OwnedFd) -> PendingConnection {
        PendingConnection { fd, since: Instant::now(), bytes: Vec::new(), header: None, gone: false }
    }

    fn read(&mut self) {
        let mut buffer = [0; HEADER_BYTES];
        let room = HEADER_BYTES - self.bytes.len();
        let result = match buffer.get_mut(..room) {
            Some(into) if room > 0 => nix::unistd::read(&self.fd, into),
            // The header is complete; readable means the end or an error.
            _ => Ok(0),
        };
        match result {
            Ok(0) => self.mark_gone("it was closed"),
            Ok(count) => self.bytes.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(error) => self.mark_gone(error),
        }
        let Ok(bytes) = self.bytes.as_slice().try_into() else { return };
        match ConnectionHeader::decode(bytes) {
            Ok(header) => self.header = Some(header),
            Err(error) => {
                if let StreamError::Version { .. } = error
                    && let Ok(fd) = self.fd.try_clone()
                {
                    send_oldest_version(&mut File::from(fd));
                }
                self.mark_gone(with_causes(&error));
            }
        }
    }

    /// Returns the time limit and the missing item.
    fn timeout(&self) -> (Duration, &'static str) {
        match self.header {
            None => (HEADER_TIMEOUT, "no header"),
            Some(_) => (ALL_CHANNELS_TIMEOUT, "not all channels of its migration"),
        }
    }

    fn must_keep(&self) -> bool {
        let (limit, what) = self.timeout();
        let late = self.since.elapsed() >= limit;
        if late {
            tracing::warn!("dropping a connection: {what} came within {limit:?}");
        }
        !self.gone && !late
    }

    fn mark_gone(&mut self, why: impl std::fmt::Display) {
        tracing::warn!("dropping a connection: {why}");
        self.gone = true;
    }
}

/// Removes and returns the connections of the first migration that has all its channels.
fn take_complete(waiting: &mut Vec<PendingConnection>) -> Option<Vec<PendingConnection>> {
    let found = waiting.iter().filter_map(|w| w.header).find(|first| {
        (0..first.channels).all(|channel| {
            let wanted = ConnectionHeader { channel, ..*first };
            waiting.iter().any(|w| w.header == Some(wanted))
        })
    })?;
    let mut channels = Vec::new();
    for channel in 0..found.channels {
        let wanted = ConnectionHeader { channel, ..found };
        let index = waiting.iter().position(|w| w.header == Some(wanted))?;
        channels.push(waiting.remove(index));
    }
    Some(channels)
}

/// Replies to the header of every channel. One channel cannot block the others: 40 bytes fit in any socket buffer.
fn accept_migration(
    waiting: Vec<PendingConnection>,
    options: &StreamOptions,
) -> Result<IncomingConnection, StreamError> {
    let (mut channels, activity) = (Vec::new(), LastReceived::new());
    let mut first = None;
    for waiting in waiting {
        let mut channel = StreamChannel::new(waiting.fd, OnFinish::Nothing, options, &activity)?;
        let header = waiting.header.ok_or(StreamError::NotAStream)?.accepted();
        if !header.one_way {
            channel.write_all(&header.encode())?;
        }
        channels.push(channel);
        first.get_or_insert(header);
    }
    let header = first.ok_or(StreamError::NotAStream)?;
    Ok(incoming_connection(header, channels, options))
}

/// Converts connected channels to a migration or an outcome query, by the header of the first.
fn incoming_connection(
    header: ConnectionHeader,
    mut channels: Vec<StreamChannel>,
    options: &StreamOptions,
) -> IncomingConnection {
    match channels.pop() {
        Some(channel) if header.outcome_query => {
            IncomingConnection::OutcomeQuery(OutcomeQuery { id: header.id, channel })
        }
        last => {
            channels.extend(last);
            IncomingConnection::Migration(StreamConnection {
                id: header.id,
                version: header.version,
                one_way: header.one_way,
                zstd: header.zstd,
                channels,
                query_uri: None,
                cancel: options.cancel.clone(),
                limiter: options.limiter.clone(),
            })
        }
    }
}

/// Tells a source whose version is too old which version is needed.
fn send_oldest_version(to: &mut impl Write) {
    let header = ConnectionHeader { version: OLDEST_VERSION, ..ConnectionHeader::new(MigrationId(0)) };
    // The source may have disconnected, or be a file.
    let _ = to.write_all(&header.encode());
}

fn bind_tcp(uri: &Uri) -> Result<(TcpListener, Uri), StreamError> {
    let Uri::Tcp { host, port } = uri else {
        return Err(uri.error("not a TCP address", None));
    };
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    let addresses = resolve(uri, host, *port, &CancelToken::new()?, Some(Instant::now() + LOOKUP_TIMEOUT))?;
    let listener = TcpListener::bind(addresses.as_slice()).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => uri.error("the port is in use: stop what listens there or choose another", error),
        io::ErrorKind::AddrNotAvailable => uri.error("this machine has no such address", error),
        io::ErrorKind::PermissionDenied => uri.error("no permission for this port: choose one above 1023", error),
        _ => open_error(uri)(error),
    })?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    Ok((listener, Uri::Tcp { host: host.into(), port }))
}

fn bind_unix(uri: &Uri, path: PathBuf) -> Result<ListeningSocket, StreamError> {
    let (listener, place) = listen(&path).map_err(|refused| uri.error(refused.advice, refused.source))?;
    listener.set_nonblocking(true)?;
    Ok(ListeningSocket::Unix { listener, _place: place })
}
