//! Connecting the channels of a migration, and outcome queries.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, UnixAddr, connect as connect_fd,
    getsockopt, socket, sockopt,
};

use super::resolve::resolve;
use super::{
    FdKind, LastReceived, OnFinish, StreamChannel, StreamConnection, StreamOptions, Uri, check_channel_count,
    check_socket_path, duplicate_inherited, kind_of,
};
use super::{open_error, save, spawn_command};
use crate::stream::cancel::poll_until;
use crate::stream::codec::Codec;
use crate::stream::frame::{ChannelId, ConnectionHeader, FrameReader, MAX_CHANNELS, MigrationId};
use crate::stream::{StreamError, ToSource};

/// Opens the channels of a new migration, sends their headers and waits for the destination's headers, unless one way.
///
/// # Errors
/// `Open` with advice, `Version`, `Timeout`, `Cancelled`, and errors of the system.
pub fn connect(uri: &Uri, options: &StreamOptions) -> Result<StreamConnection, StreamError> {
    let deadline = options.deadline.map(|time| Instant::now() + time);
    let channels = options.channels;
    if channels == 0 || channels > MAX_CHANNELS {
        return Err(uri.error(format!("{channels} channels are not possible: use 1 to {MAX_CHANNELS}"), None));
    }
    if uri.is_single_channel() {
        check_channel_count(uri, channels)?;
    }
    let id = MigrationId::random()?;
    let mut name = None;
    let mut fds = Vec::new();
    for _ in 0..channels {
        fds.push(match uri {
            Uri::Tcp { host, port } => (connect_tcp(uri, host, *port, options, deadline)?, OnFinish::Nothing),
            Uri::Unix(path) => (connect_unix(uri, path, options, deadline)?, OnFinish::Nothing),
            Uri::File(path) => {
                let (file, partial) = save::open(uri, path, id)?;
                name = partial;
                (file, OnFinish::Nothing)
            }
            Uri::Exec(command) => spawn_command(uri, command)?,
            Uri::Fd(number) => (duplicate_inherited(uri, *number)?, OnFinish::Nothing),
        });
    }
    let mut one_way = options.one_way;
    for (fd, _) in &fds {
        match (uri, kind_of(fd)?) {
            (Uri::File(_), _) | (_, FdKind::File) => one_way = true,
            (_, FdKind::Pipe) if !one_way => {
                let advice = "this is a pipe, which carries no answers: use a socket, or --one-way if that is meant";
                return Err(uri.error(advice, None));
            }
            _ => {}
        }
    }
    let offered = ConnectionHeader { channels, one_way, zstd: Codec::HAS_ZSTD, ..ConnectionHeader::new(id) };
    let header = |channel| ConnectionHeader { channel, ..offered };
    let (mut open, activity) = (Vec::new(), LastReceived::new());
    for ((fd, end), number) in fds.into_iter().zip(0..) {
        let mut channel = StreamChannel::new(fd, end, options, &activity)?;
        channel.begin(uri, name.take(), header(number))?;
        open.push(channel);
    }
    let mut accepted = offered;
    if !one_way {
        for (channel, number) in open.iter_mut().zip(0..) {
            let header = ConnectionHeader { channel: number, ..accepted };
            accepted = read_header_reply(uri, channel, header, deadline)?;
            channel.set_timeout(options.timeout)?;
        }
    }
    let again = matches!(uri, Uri::Tcp { .. } | Uri::Unix(_)).then(|| uri.clone());
    let ConnectionHeader { version, zstd, .. } = accepted;
    let (cancel, limiter) = (options.cancel.clone(), options.limiter.clone());
    Ok(StreamConnection { id, version, one_way, zstd, channels: open, query_uri: again, cancel, limiter })
}

/// Queries the destination at `uri` for the outcome of the migration `id`. The answer is STARTED, FAILED, HELD or
/// UNKNOWN.
///
/// # Errors
/// `NoReturnPath` if the URI cannot be connected to again; `Open` or `Timeout` if there is no answer within `time`;
/// other errors of connecting and reading.
pub fn query_outcome(uri: &Uri, id: MigrationId, time: Duration) -> Result<ToSource, StreamError> {
    let options = StreamOptions { deadline: Some(time), timeout: Some(time), ..StreamOptions::new()? };
    let deadline = Some(Instant::now() + time);
    let fd = match uri {
        Uri::Tcp { host, port } => connect_tcp(uri, host, *port, &options, deadline)?,
        Uri::Unix(path) => connect_unix(uri, path, &options, deadline)?,
        _ => return Err(StreamError::NoReturnPath),
    };
    let mut channel = StreamChannel::new(fd, OnFinish::Nothing, &options, &LastReceived::new())?;
    let header = ConnectionHeader { outcome_query: true, ..ConnectionHeader::new(id) };
    channel.begin(uri, None, header)?;
    read_header_reply(uri, &mut channel, header, deadline)?;
    ToSource::next(&mut FrameReader::new(channel, ChannelId { migration: id, channel: 0 }))
}

/// Reads the destination's reply to `header`.
fn read_header_reply(
    uri: &Uri,
    channel: &mut StreamChannel,
    header: ConnectionHeader,
    deadline: Option<Instant>,
) -> Result<ConnectionHeader, StreamError> {
    // Never zero, which would mean no timeout.
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
    channel.set_timeout(left)?;
    match ConnectionHeader::read(channel) {
        Ok(reply) => header.check_reply(&reply).map(|()| reply),
        Err(StreamError::Timeout(time)) => {
            let advice = format!("no answer within {time:?}: check that the destination waits for a migration");
            Err(uri.error(advice, None))
        }
        Err(StreamError::Truncated(_) | StreamError::PeerGone) => {
            Err(uri.error("the destination closed the connection without a reply: see its log for the reason", None))
        }
        Err(error) => Err(error),
    }
}

fn connect_tcp(
    uri: &Uri,
    host: &str,
    port: u16,
    options: &StreamOptions,
    deadline: Option<Instant>,
) -> Result<OwnedFd, StreamError> {
    let host = if host.is_empty() { "localhost" } else { host };
    let mut last = None;
    for address in resolve(uri, host, port, &options.cancel, deadline)? {
        let opened = match address {
            SocketAddr::V4(address) => {
                connect_socket(AddressFamily::Inet, &SockaddrIn::from(address), options, deadline)
            }
            SocketAddr::V6(address) => {
                connect_socket(AddressFamily::Inet6, &SockaddrIn6::from(address), options, deadline)
            }
        };
        match opened {
            Ok(fd) => return Ok(fd),
            Err(StreamError::Io(error)) => last = Some(error),
            Err(StreamError::Timeout(_)) => return Err(uri.error("no answer from this host: check its address", None)),
            Err(error) => return Err(error),
        }
    }
    Err(match last {
        Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            uri.error("nothing listens at this port: start the destination first", error)
        }
        Some(error) => open_error(uri)(error),
        None => uri.error("this host has no address", None),
    })
}

fn connect_unix(
    uri: &Uri,
    path: &Path,
    options: &StreamOptions,
    deadline: Option<Instant>,
) -> Result<OwnedFd, StreamError> {
    check_socket_path(uri, path)?;
    let address = UnixAddr::new(path).map_err(|error| open_error(uri)(error.into()))?;
    loop {
        let error = match connect_socket(AddressFamily::Unix, &address, options, deadline) {
            Err(StreamError::Io(error)) => error,
            other => return other,
        };
        match error.kind() {
            // The listener's backlog is full.
            io::ErrorKind::WouldBlock if deadline.is_none_or(|deadline| Instant::now() < deadline) => {
                options.cancel.wait(Duration::from_millis(20))?;
            }
            io::ErrorKind::WouldBlock => return Err(uri.error("the destination does not accept connections", error)),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                return Err(uri.error("nothing listens at this socket: start the destination first", error));
            }
            _ => return Err(open_error(uri)(error)),
        }
    }
}

/// Connects a new socket, with a deadline and the cancel token.
fn connect_socket(
    family: AddressFamily,
    address: &dyn SockaddrLike,
    options: &StreamOptions,
    deadline: Option<Instant>,
) -> Result<OwnedFd, StreamError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None).map_err(io::Error::from)?;
    match connect_fd(fd.as_raw_fd(), address) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS | Errno::EINTR) => {
            let events = PollFlags::POLLOUT;
            let mut fds = [PollFd::new(fd.as_fd(), events), PollFd::new(options.cancel.fd(), PollFlags::POLLIN)];
            if !poll_until(&mut fds, deadline)? {
                return Err(StreamError::Timeout(options.deadline.unwrap_or_default()));
            }
            options.cancel.check()?;
            match getsockopt(&fd, sockopt::SocketError).map_err(io::Error::from)? {
                0 => {}
                error => return Err(StreamError::Io(io::Error::from_raw_os_error(error))),
            }
        }
        Err(error) => return Err(StreamError::Io(error.into())),
    }
    Ok(fd)
}
