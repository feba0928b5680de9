//! Transports: QEMU-style URIs, opening and accepting the channels of a migration, and [`StreamChannel`]. Nothing here
//! knows the stream beyond the connection header.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{self, MsgFlags, Shutdown, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

use super::cancel::{CancelTarget, CancelToken, poll_until};
use super::frame::{
    ChannelId, ConnectionHeader, FRAME_HEADER_BYTES, FrameReader, FrameWriter, HEADER_BYTES, MigrationId,
};
use super::limiter::RateLimiter;
use super::sys::{ReadMemory, ReceiveWindow};
use super::{StreamError, ToSource};
use crate::sys::lock;

mod accept;
mod connect;
mod resolve;
mod save;

pub use accept::{IncomingConnection, OutcomeQuery, StreamListener};
pub use connect::{connect, query_outcome};
pub use save::remove_unfinished_saves;
use save::{PartialFile, Save};

/// Address of a migration's source or destination.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Uri {
    /// `tcp:HOST:PORT`. An IPv6 address is in brackets. An empty host is every address (listening) or this machine.
    Tcp {
        /// Name or address.
        host: String,
        /// Port; 0 lets the system choose when listening.
        port: u16,
    },
    /// `unix:PATH`
    Unix(PathBuf),
    /// `file:PATH`: one channel, one way.
    File(PathBuf),
    /// `exec:COMMAND`: run by the shell, with a socket as standard input and output.
    Exec(String),
    /// `fd:N`: an inherited socket, pipe or file.
    Fd(RawFd),
}

impl FromStr for Uri {
    type Err = StreamError;

    fn from_str(text: &str) -> Result<Uri, StreamError> {
        let wrong = |why: &str| Err(StreamError::Uri { uri: text.into(), why: why.into() });
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        match scheme {
            "tcp" => {
                let Some((host, port)) = rest.rsplit_once(':') else {
                    return wrong("a port is missing: write tcp:HOST:PORT");
                };
                let Ok(port) = port.parse() else {
                    return wrong("the port must be a number from 0 to 65535: write tcp:HOST:PORT");
                };
                let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                if bare.is_none() && host.contains(':') {
                    return wrong("an IPv6 address goes into brackets: write tcp:[ADDRESS]:PORT");
                }
                Ok(Uri::Tcp { host: bare.unwrap_or(host).into(), port })
            }
            "unix" | "file" | "exec" if rest.is_empty() => wrong("nothing follows the colon"),
            "unix" => Ok(Uri::Unix(rest.into())),
            "file" => Ok(Uri::File(rest.into())),
            "exec" => Ok(Uri::Exec(rest.into())),
            "fd" => match rest.parse() {
                Ok(number) if number >= 0 => Ok(Uri::Fd(number)),
                _ => wrong("fd: takes the number of an open file descriptor"),
            },
            _ => wrong("write tcp:HOST:PORT, unix:PATH, file:PATH, exec:COMMAND or fd:N"),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Uri::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Uri::Unix(path) => write!(f, "unix:{}", path.display()),
            Uri::File(path) => write!(f, "file:{}", path.display()),
            Uri::Exec(command) => write!(f, "exec:{command}"),
            Uri::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

impl Uri {
    /// Returns true if the transport has only one channel.
    pub fn is_single_channel(&self) -> bool {
        matches!(self, Uri::File(_) | Uri::Exec(_) | Uri::Fd(_))
    }

    fn error(&self, advice: impl Into<String>, source: impl Into<Option<io::Error>>) -> StreamError {
        StreamError::Open { uri: self.to_string(), advice: advice.into(), source: source.into() }
    }
}

/// Options for connecting and accepting.
#[derive(Clone)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Number of channels to open, 1 to [`MAX_CHANNELS`](super::MAX_CHANNELS). A destination uses the source's
    /// number.
    pub channels: u16,
    /// The destination sends no replies: for `exec:` filters such as a compressor, and for pipes. Files are always one
    /// way.
    pub one_way: bool,
    /// Time limit for connecting or accepting; `None` waits until cancelled.
    pub deadline: Option<Duration>,
    /// Time limit for a write without progress, and for a read while nothing arrives on any channel; `None` waits until
    /// cancelled.
    pub timeout: Option<Duration>,
    /// Cancels the migration.
    pub cancel: CancelToken,
    /// Rate limit of all channels together.
    pub limiter: RateLimiter,
}

impl StreamOptions {
    /// One channel, 10 s to connect, 30 s without progress, no rate limit, a new cancel token.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> Result<StreamOptions, StreamError> {
        Ok(StreamOptions {
            channels: 1,
            one_way: false,
            deadline: Some(Duration::from_secs(10)),
            timeout: Some(Duration::from_secs(30)),
            cancel: CancelToken::new()?,
            limiter: RateLimiter::new(None),
        })
    }

    setters! {
        with_channels: channels: u16,
        with_one_way: one_way: bool,
        with_deadline: deadline: Option<Duration>,
        with_timeout: timeout: Option<Duration>,
        with_cancel: cancel: CancelToken,
        with_limiter: limiter: RateLimiter,
    }
}

/// The channels of one migration after the exchange of headers.
pub struct StreamConnection {
    /// The migration.
    pub id: MigrationId,
    /// Version of the stream that both sides use.
    pub version: u16,
    /// True if the destination sends nothing.
    pub one_way: bool,
    /// True if pages may be compressed with zstd: both sides can, or this side can and the stream is one way.
    pub zstd: bool,
    /// The channels in order of their numbers; at least one.
    pub channels: Vec<StreamChannel>,
    /// URI for outcome queries, if the transport can connect again.
    query_uri: Option<Uri>,
    cancel: CancelToken,
    limiter: RateLimiter,
}

impl StreamConnection {
    /// Returns the token that ends every wait of this connection.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.cancel
    }

    /// Returns the rate limit of all channels together.
    pub fn rate_limiter(&self) -> &RateLimiter {
        &self.limiter
    }

    /// Returns a frame writer for each channel.
    pub fn writers(&self) -> Vec<FrameWriter<StreamChannel>> {
        self.channels_with_ids().map(|(channel, id)| FrameWriter::new(channel, id)).collect()
    }

    /// Returns a frame reader for each channel.
    pub fn readers(&self) -> Vec<FrameReader<StreamChannel>> {
        self.channels_with_ids().map(|(channel, id)| FrameReader::new(channel, id)).collect()
    }

    fn channels_with_ids(&self) -> impl Iterator<Item = (StreamChannel, ChannelId)> {
        let migration = self.id;
        self.channels.iter().cloned().zip(0..).map(move |(it, channel)| (it, ChannelId { migration, channel }))
    }

    /// Waits up to `limit` for the first frame on channel 0, or as much of it as fits in the socket's buffer. Reads
    /// nothing; returns immediately for pipes and files.
    ///
    /// # Errors
    /// `Timeout`, `Ended` if the source hangs up, `Cancelled`, and errors of the system.
    pub fn wait_for_frame(&self, limit: Duration) -> Result<(), StreamError> {
        let first = self.channels.first().ok_or(StreamError::Ended)?;
        if first.0.kind == FdKind::Socket { first.0.wait_for_frame(limit) } else { Ok(()) }
    }

    /// Syncs a file or device. Does nothing for other transports.
    ///
    /// # Errors
    /// `DiskFull`, and errors of the system.
    pub fn sync(&self) -> Result<(), StreamError> {
        self.channels.iter().try_for_each(|channel| channel.0.sync())
    }

    /// Completes the stream: a file or device is complete and synced, and a file has its name; a command has exited
    /// with status 0. A save is unfinished until this returns.
    ///
    /// # Errors
    /// `Command`, `DiskFull`, `Timeout`, `Cancelled`, and errors of the system.
    pub fn finish(&self) -> Result<(), StreamError> {
        self.channels.iter().try_for_each(|channel| channel.0.finish())
    }
}

impl StreamConnection {
    /// Returns true if the stream is saved to a file or block device, which is complete and durable once
    /// [`finish`](Self::finish) has returned and invalid before.
    pub fn is_to_file(&self) -> bool {
        self.channels.iter().all(|channel| channel.0.kind == FdKind::File)
    }

    /// Queries the outcome of this migration over a new connection to the same URI. The answer is STARTED, FAILED, HELD
    /// or UNKNOWN.
    ///
    /// # Errors
    /// As [`query_outcome`].
    pub fn query_outcome(&self, deadline: Duration) -> Result<ToSource, StreamError> {
        match &self.query_uri {
            Some(uri) => query_outcome(uri, self.id, deadline),
            None => Err(StreamError::NoReturnPath),
        }
    }

    /// Releases the connection and lets an `exec:` command run on, as it holds or forwards the guest.
    pub fn detach(self) {
        self.channels.iter().for_each(|channel| channel.0.detach());
    }
}

impl fmt::Debug for StreamConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let channels = self.channels.len();
        f.debug_struct("StreamConnection").field("id", &self.id).field("channels", &channels).finish_non_exhaustive()
    }
}

/// One channel of a migration. Clones share it, so that one thread can read while another writes.
#[derive(Clone)]
pub struct StreamChannel(Arc<StreamChannelState>);

struct StreamChannelState {
    fd: OwnedFd,
    /// Shared by all channels of the connection.
    last_received: Arc<LastReceived>,
    kind: FdKind,
    cancel: CancelToken,
    limiter: RateLimiter,
    timeout_ms: AtomicU64,
    /// Time that writers have waited for the rate limit, nanoseconds.
    rate_limited_ns: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    /// True while a frame is partly written.
    in_frame: AtomicBool,
    /// True if a frame may be written after cancellation.
    allow_after_cancel: AtomicBool,
    on_finish: Mutex<OnFinish>,
}

/// Time of the last received bytes.
#[derive(Debug)]
struct LastReceived {
    begun: Instant,
    /// Milliseconds after `begun`.
    last: AtomicU64,
}

impl LastReceived {
    fn new() -> Arc<LastReceived> {
        Arc::new(LastReceived { begun: Instant::now(), last: AtomicU64::new(0) })
    }

    fn update(&self) {
        self.last.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn is_within(&self, time: Duration) -> bool {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(last) < time
    }
}

#[derive(Clone, Copy, PartialEq)]
enum FdKind {
    /// Blocking; the kernel enforces timeouts, and shutdown(2) interrupts it.
    Socket,
    /// Non-blocking; poll enforces timeouts and sees the cancel token.
    Pipe,
    /// A file or block device: never waits for a peer.
    File,
}

/// Send buffer of TCP connections within this host, bytes. The system would let it grow until the data in flight no
/// longer fits in the cache. Between hosts, the system chooses it by bandwidth and delay. UNIX sockets have a buffer of
/// about this size.
const LOCAL_SEND_BUFFER: usize = 160 << 10;

/// Action of [`StreamConnection::finish`].
enum OnFinish {
    Nothing,
    Save(Save),
    WaitForCommand { child: Child, command: String },
}

impl StreamChannel {
    fn new(
        fd: OwnedFd,
        end: OnFinish,
        options: &StreamOptions,
        activity: &Arc<LastReceived>,
    ) -> Result<StreamChannel, StreamError> {
        let kind = kind_of(&fd)?;
        set_nonblocking(fd.as_fd(), kind == FdKind::Pipe)?;
        if kind == FdKind::Socket {
            // Fails on sockets other than TCP, which have no such delay.
            let _ = setsockopt(&fd, sockopt::TcpNoDelay, &true);
            if is_on_this_host(&fd) {
                let _ = setsockopt(&fd, sockopt::SndBuf, &LOCAL_SEND_BUFFER);
            }
            enable_keepalive(&fd);
        }
        let inner = Arc::new(StreamChannelState {
            fd,
            last_received: activity.clone(),
            kind,
            cancel: options.cancel.clone(),
            limiter: options.limiter.clone(),
            timeout_ms: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            rate_limited_ns: AtomicU64::new(0),
            received: AtomicU64::new(0),
            in_frame: AtomicBool::new(false),
            allow_after_cancel: AtomicBool::new(false),
            on_finish: Mutex::new(end),
        });
        let target: Weak<StreamChannelState> = Arc::downgrade(&inner);
        options.cancel.register(target);
        let channel = StreamChannel(inner);
        channel.set_timeout(options.timeout)?;
        Ok(channel)
    }

    /// Sets the time limit for reads and writes without progress; `None` waits until cancelled.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), StreamError> {
        let millis = timeout.map_or(0, |timeout| timeout.as_millis().clamp(1, i32::MAX as u128) as u64);
        self.0.timeout_ms.store(millis, Ordering::Relaxed);
        if self.0.kind == FdKind::Socket {
            let value = TimeVal::new((millis / 1000) as i64, (millis % 1000 * 1000) as i64);
            setsockopt(&self.0.fd, sockopt::ReceiveTimeout, &value).map_err(io::Error::from)?;
            setsockopt(&self.0.fd, sockopt::SendTimeout, &value).map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Returns the time that writers have waited for the rate limit.
    pub fn rate_limited_time(&self) -> Duration {
        Duration::from_nanos(self.0.rate_limited_ns.load(Ordering::Relaxed))
    }

    /// Returns the number of bytes written, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes read, headers included.
    pub fn bytes_received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes that may not be synced to a file or device; 0 for other transports.
    pub fn unsynced_bytes(&self) -> u64 {
        match &*lock(&self.0.on_finish) {
            OnFinish::Save(save) => save.unsynced(),
            _ => 0,
        }
    }

    /// Sends the header, or starts a save with it.
    fn begin(&mut self, uri: &Uri, name: Option<PartialFile>, header: ConnectionHeader) -> Result<(), StreamError> {
        if self.0.kind == FdKind::File {
            *lock(&self.0.on_finish) = OnFinish::Save(Save::begin(uri, &self.0.fd, name, header)?);
            self.0.sent.fetch_add(HEADER_BYTES as u64, Ordering::Relaxed);
            return Ok(());
        }
        self.write_all(&header.encode())?;
        Ok(self.flush()?)
    }

    /// Allows one more frame, with a reason for the peer, on a socket that was just cancelled.
    pub fn allow_final_frame(&self) {
        self.0.allow_after_cancel.store(true, Ordering::Relaxed);
    }

    /// Shuts this channel down: blocked reads and writes on either side end with an error. Does nothing to pipes and
    /// files.
    pub fn shutdown(&self) {
        self.0.shutdown(Shutdown::Both);
    }

    /// Shuts down reading: blocked reads here end with an error, and written data still arrives. Does nothing to pipes
    /// and files.
    pub fn shutdown_read(&self) {
        self.0.shutdown(Shutdown::Read);
    }

    /// Shuts down writing: blocked writes here end with an error, and data of the peer still arrives. Does nothing to
    /// pipes and files.
    pub fn shutdown_write(&self) {
        self.0.shutdown(Shutdown::Write);
    }

    /// Returns the descriptor, for polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl fmt::Debug for StreamChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamChannel").field("fd", &self.0.fd).finish_non_exhaustive()
    }
}

impl Read for StreamChannel {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(|fd| Ok(nix::unistd::read(fd, into)?))
    }
}

impl ReadMemory for StreamChannel {
    fn read_memory(&mut self, window: &ReceiveWindow<'_>) -> io::Result<usize> {
        self.0.read(|fd| window.readv(fd))
    }
}

impl Write for StreamChannel {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write(from)
    }

    /// Marks the end of a frame or header.
    fn flush(&mut self) -> io::Result<()> {
        self.0.in_frame.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl StreamChannelState {
    fn read(&self, mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>) -> io::Result<usize> {
        let count = self.retry_io(PollFlags::POLLIN, || read(self.fd.as_fd()))?;
        self.received.fetch_add(count as u64, Ordering::Relaxed);
        self.last_received.update();
        Ok(count)
    }

    fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.check(PollFlags::POLLOUT)?;
        let total = from.iter().map(|part| part.len()).sum::<usize>();
        let piece = self.limiter.max_write_bytes();
        let first;
        let from = if total <= piece {
            from
        } else {
            // Small writes keep a slow link smooth and cancellation quick.
            let part = from.iter().find(|part| !part.is_empty()).map_or(&[][..], |part| part);
            first = [IoSlice::new(part.get(..piece).unwrap_or(part))];
            &first
        };
        let length = from.iter().map(|part| part.len()).sum::<usize>();
        let waited = match self.limiter.acquire(length, &self.cancel) {
            Err(StreamError::Cancelled) => self.check(PollFlags::POLLOUT).map(|()| Duration::ZERO),
            waited => waited,
        };
        let waited = waited?;
        self.in_frame.store(true, Ordering::Relaxed);
        self.rate_limited_ns.fetch_add(waited.as_nanos() as u64, Ordering::Relaxed);
        let count = self.retry_io(PollFlags::POLLOUT, || match self.kind {
            // No SIGPIPE after the peer has closed the connection.
            FdKind::Socket => {
                let flags = MsgFlags::MSG_NOSIGNAL;
                Ok(socket::sendmsg::<()>(self.fd.as_raw_fd(), from, &[], flags, None)?)
            }
            _ => Ok(nix::sys::uio::writev(&self.fd, from)?),
        })?;
        self.sent.fetch_add(count as u64, Ordering::Relaxed);
        if let OnFinish::Save(save) = &mut *lock(&self.on_finish) {
            save.account_written(&self.fd, count)?;
        }
        Ok(count)
    }

    /// Repeats `io` until it transfers something, fails or times out.
    fn retry_io(&self, events: PollFlags, mut io: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
        let timeout = Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed));
        let deadline = (!timeout.is_zero()).then(|| Instant::now() + timeout);
        self.check(events)?;
        loop {
            let result = io();
            // A shutdown by the cancel switch looks like an end of file or a broken pipe.
            if result.is_err() { self.cancel.check() } else { self.check(events) }?;
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => return other,
            }
            let mut fds = [PollFd::new(self.fd.as_fd(), events), PollFd::new(self.cancel.fd(), PollFlags::POLLIN)];
            // A channel may be idle while others receive.
            if self.kind == FdKind::Socket && events == PollFlags::POLLIN && self.last_received.is_within(timeout) {
                continue;
            }
            if self.kind == FdKind::Socket || !poll_until(&mut fds, deadline)? {
                return Err(StreamError::Timeout(timeout).into());
            }
        }
    }

    /// Fails after cancellation, except for a writer in the middle of a frame on a socket: the peer could not read
    /// anything after a partial frame.
    fn check(&self, events: PollFlags) -> Result<(), StreamError> {
        let goes_on = self.in_frame.load(Ordering::Relaxed) || self.allow_after_cancel.load(Ordering::Relaxed);
        if events == PollFlags::POLLOUT && self.kind == FdKind::Socket && goes_on {
            return Ok(());
        }
        self.cancel.check()
    }

    fn wait_for_frame(&self, limit: Duration) -> Result<(), StreamError> {
        /// Number of bytes that every socket can buffer.
        const PEEK_BYTES: usize = 4096;
        /// Interval of checks for the rest of a partial frame.
        const NAP: Duration = Duration::from_millis(5);
        let deadline = Instant::now() + limit;
        let mut bytes = [0; PEEK_BYTES];
        loop {
            let mut fds = [self.fd.as_fd(), self.cancel.fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            if !poll_until(&mut fds, Some(deadline))? || Instant::now() >= deadline {
                return Err(StreamError::Timeout(limit));
            }
            self.cancel.check()?;
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            match socket::recv(self.fd.as_raw_fd(), &mut bytes, flags) {
                Ok(0) => return Err(StreamError::Ended),
                Ok(count) if count >= first_frame_bytes(bytes.get(..count).unwrap_or_default()).min(PEEK_BYTES) => {
                    return Ok(());
                }
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            self.cancel.wait(NAP)?;
        }
    }

    fn shutdown(&self, how: Shutdown) {
        if self.kind == FdKind::Socket {
            // Fails if the peer has already disconnected, with the same effect.
            let _ = socket::shutdown(self.fd.as_raw_fd(), how);
        }
    }

    fn detach(&self) {
        if let OnFinish::WaitForCommand { mut child, .. } =
            std::mem::replace(&mut *lock(&self.on_finish), OnFinish::Nothing)
        {
            self.shutdown(Shutdown::Write);
            // Reaps the command at its end.
            std::thread::spawn(move || child.wait());
        }
    }

    fn sync(&self) -> Result<(), StreamError> {
        match &mut *lock(&self.on_finish) {
            OnFinish::Save(save) => Ok(save.sync(&self.fd)?),
            _ => Ok(()),
        }
    }

    fn finish(&self) -> Result<(), StreamError> {
        /// Interval of checks for the end of a command.
        const NAP: Duration = Duration::from_millis(5);
        if matches!(*lock(&self.on_finish), OnFinish::WaitForCommand { .. }) {
            // Filters end at the end of their input.
            self.shutdown(Shutdown::Write);
        }
        let timeout = Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed));
        let deadline = (!timeout.is_zero()).then(|| Instant::now() + timeout);
        loop {
            self.cancel.check()?;
            match &mut *lock(&self.on_finish) {
                OnFinish::Nothing => return Ok(()),
                end @ OnFinish::Save(_) => {
                    let OnFinish::Save(save) = std::mem::replace(end, OnFinish::Nothing) else { return Ok(()) };
                    return Ok(save.complete(&self.fd)?);
                }
                end @ OnFinish::WaitForCommand { .. } => {
                    if let OnFinish::WaitForCommand { child, command } = end
                        && let Some(status) = child.try_wait()?
                    {
                        let command = std::mem::take(command);
                        *end = OnFinish::Nothing;
                        let status = if status.success() { return Ok(()) } else { status.to_string() };
                        return Err(StreamError::Command { command, status });
                    }
                }
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(StreamError::Timeout(timeout));
            }
            self.cancel.wait(NAP)?;
        }
    }
}

impl CancelTarget for StreamChannelState {
    /// Ends reads. Writers end after the current frame.
    fn interrupt(&self) {
        self.shutdown(Shutdown::Read);
    }

    fn force_end(&self) {
        self.shutdown(Shutdown::Both);
    }
}

impl Drop for StreamChannelState {
    /// Kills the command of an unfinished migration.
    fn drop(&mut self) {
        match &mut *lock(&self.on_finish) {
            OnFinish::Nothing | OnFinish::Save(_) => {}
            OnFinish::WaitForCommand { child, .. } => {
                self.shutdown(Shutdown::Both);
                // The command is the leader of its own process group.
                let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
                let _ = child.wait();
            }
        }
    }
}

/// Returns the size of the frame that starts with `bytes`, as far as known; at least the size of a frame header.
fn first_frame_bytes(bytes: &[u8]) -> usize {
    let length = bytes.get(4..8).and_then(|length| length.try_into().ok()).map_or(0, u32::from_le_bytes);
    FRAME_HEADER_BYTES + length as usize
}

/// Returns true if the socket is a TCP connection within this host.
fn is_on_this_host(fd: &OwnedFd) -> bool {
    let Ok(stream) = fd.try_clone().map(TcpStream::from) else { return false };
    matches!((stream.local_addr(), stream.peer_addr()), (Ok(ours), Ok(theirs)) if ours.ip() == theirs.ip())
}

fn kind_of(fd: &OwnedFd) -> Result<FdKind, StreamError> {
    use nix::sys::stat::{SFlag, fstat};
    let mode = fstat(fd).map_err(io::Error::from)?.st_mode;
    Ok(match SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFSOCK => FdKind::Socket,
        SFlag::S_IFREG | SFlag::S_IFBLK => FdKind::File,
        _ => FdKind::Pipe,
    })
}

fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> Result<(), StreamError> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).map_err(io::Error::from)?);
    flags.set(OFlag::O_NONBLOCK, nonblocking);
    fcntl(fd, FcntlArg::F_SETFL(flags)).map_err(io::Error::from)?;
    Ok(())
}

/// Enables TCP keep-alive, best effort: a host that disappears ends the connection after half a minute, also if nothing
/// is sent and no timeout is set.
fn enable_keepalive(fd: &OwnedFd) {
    let _ = setsockopt(fd, sockopt::KeepAlive, &true);
    let _ = setsockopt(fd, sockopt::TcpKeepIdle, &15);
    let _ = setsockopt(fd, sockopt::TcpKeepInterval, &5);
    let _ = setsockopt(fd, sockopt::TcpKeepCount, &3);
}

/// The kernel's limit for a socket path, without the final zero.
const MAX_SOCKET_PATH: usize = 107;

fn check_socket_path(uri: &Uri, path: &Path) -> Result<(), StreamError> {
    let length = path.as_os_str().len();
    if length <= MAX_SOCKET_PATH {
        return Ok(());
    }
    let advice =
        format!("the socket path has {length} bytes, at most {MAX_SOCKET_PATH} are possible: use a shorter one");
    Err(uri.error(advice, None))
}

fn check_channel_count(uri: &Uri, channels: u16) -> Result<(), StreamError> {
    if channels == 1 {
        return Ok(());
    }
    Err(uri.error(format!("{channels} channels were asked for, this transport has one: use --channels 1"), None))
}

/// Returns advice for a system error.
fn advice_for(error: io::Error) -> (String, Option<io::Error>) {
    let advice = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM) => "no permission: check the owner and mode of the path".into(),
        Some(Errno::ENOENT) => "there is no such path: check its spelling and that its folder exists".into(),
        Some(Errno::ENOSPC) => "no space left: free some or choose another place".into(),
        Some(Errno::EISDIR) => "this is a folder: name a file in it".into(),
        Some(Errno::EROFS) => "the file system is read-only: choose another place".into(),
        _ => "the system refuses".into(),
    };
    (advice, Some(error))
}

fn open_error(uri: &Uri) -> impl Fn(io::Error) -> StreamError + '_ {
    move |error| {
        let (advice, source) = advice_for(error);
        uri.error(advice, source)
    }
}

/// Starts the command of an `exec:` URI. Returns this process's end of its standard input and output.
fn spawn_command(uri: &Uri, command: &str) -> Result<(OwnedFd, OnFinish), StreamError> {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let input = Stdio::from(theirs.try_clone()?);
    let child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .stdin(input)
        .stdout(theirs)
        .process_group(0)
        .spawn()
        .map_err(open_error(uri))?;
    Ok((ours.into(), OnFinish::WaitForCommand { child, command: command.into() }))
}

fn duplicate_inherited(uri: &Uri, number: RawFd) -> Result<OwnedFd, StreamError> {
    super::sys::duplicate_fd(number).map_err(|error| {
        let advice = format!("file descriptor {number} is not open: pass it on when starting this program");
        uri.error(advice, error)
    })
}
