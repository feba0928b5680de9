//! Control socket of a process that owns a guest: one JSON object per line over a UNIX socket.
//!
//! A client sends [`ControlCommand`]s and reads [`ControlEvent`]s, objects with an `event` field, until `ok` or `error`
//! ends the answer; then it may send the next command. Connections are independent: `cancel` is sent on a second one. The
//! [`CommandHandler`] implements the commands.
//!
//! A client that does not read cannot block the process: its events are buffered up to a limit and then dropped, and
//! its connection is closed if it does not read the end of an answer within seconds.
//!
//! # Example
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("guest.ctl");
//! use std::sync::Arc;
//!
//! use vhost_migrate::control::{CommandError, CommandHandler, ControlClient, ControlCommand, bind, call, serve, status};
//! use vhost_migrate::guest::{GuestOwner, OwnerState};
//!
//! struct Commands(GuestOwner);
//!
//! impl CommandHandler for Commands {
//!     fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), CommandError> {
//!         match command {
//!             ControlCommand::Status {} => client.send_event(&self.0.status().into()),
//!             ControlCommand::Pause {} => self.0.pause()?,
//!             _ => return Err("this guest knows status and pause only".into()),
//!         }
//!         Ok(())
//!     }
//!
//!     fn quit(&self) {}
//! }
//!
//! let (listener, _socket) = bind(&path)?;
//! std::thread::spawn(move || serve(listener, Arc::new(Commands(GuestOwner::default()))));
//!
//! assert_eq!(status(&path)?.state, OwnerState::Absent);
//! assert!(call(&path, &ControlCommand::Pause {}, |_| {}).is_err(), "there is no guest here yet");
//! # Ok::<(), std::io::Error>(())
//! ```
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::vhost_user::{FrontendRequest, Header};
use crate::guest::{DeviceConnection, MeasuredRate, OwnerStatus};
use crate::migrate::MigrationEvent;
use crate::sys::listen::{self, SocketPathGuard, listen};
use crate::sys::socket;
use crate::sys::with_causes::with_causes;

pub use crate::sys::listen::MAX_SOCKET_PATH;

/// Maximum length of a line, bytes.
pub const MAX_LINE: u64 = 64 << 10;
/// Maximum size of the buffered events of a client that does not read, bytes.
const MAX_UNSENT: usize = 64 << 10;
/// Time limit for the other side to read the end of an answer, accept a connection, read a command, and reply to a
/// command that is answered immediately.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Delay between attempts to connect to a full backlog.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Time limit of the probe that distinguishes a back-end's socket from a control socket.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// A command of a client. Commands without arguments have braces, so that unknown fields are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum ControlCommand {
    /// Reports the guest's state and counters in one event.
    Status {},
    /// Reports each of the guest's devices now and whenever its connection changes: its back-end disconnects, is
    /// refused, or is connected again.
    Watch {
        /// Duration, seconds. The command also ends when the client disconnects.
        seconds: f64,
    },
    /// Migrates the guest; reports events until the end of the migration.
    Migrate(MigrateArguments),
    /// Cancels the migration, measurement, verification or resume under way.
    Cancel {},
    /// Pauses the guest.
    Pause {},
    /// Resumes a paused guest. After a migration of unknown outcome: the operator asserts that the destination does not
    /// run the guest.
    Resume {},
    /// Releases a guest after a migration of unknown outcome: the operator asserts that the destination runs the guest.
    Forget {},
    /// Compares every byte of the guest's memory and disks with its expected value. A wrong byte fails the guest.
    Verify {},
    /// Measures dirty rates and forecasts a migration.
    DirtyRate {
        /// Duration of the measurement, seconds.
        seconds: f64,
        /// Bandwidth of the migration to forecast, bytes of guest memory per second.
        bandwidth: u64,
        /// Downtime limit for the forecast, milliseconds.
        downtime_ms: u64,
    },
    /// Ends the guest's process.
    Quit {},
}

/// Arguments of the `migrate` command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateArguments {
    /// Destination: `tcp:HOST:PORT`, `unix:PATH`, `file:PATH`, `exec:COMMAND` or `fd:N`.
    pub uri: String,
    /// `none`, `zstd` or `zstd:LEVEL`.
    pub codec: String,
    /// Number of channels.
    pub channels: u16,
    /// Downtime limit, milliseconds.
    pub downtime_ms: u64,
    /// Bandwidth limit while the guest runs, bytes per second.
    pub bandwidth: Option<u64>,
    /// Maximum number of rounds.
    pub max_rounds: u32,
    /// Compare all memory with the destination's before the commit, while the guest is stopped.
    #[serde(default)]
    pub verify: bool,
    /// Switchover timeout, milliseconds. The default is four times the downtime limit and at least 10 000.
    #[serde(default)]
    pub switchover_timeout_ms: Option<u64>,
    /// Resume the guest here once a file holds it.
    #[serde(default)]
    pub continue_here: bool,
    /// Send one way, without replies. The outcome is then unknown.
    #[serde(default)]
    pub one_way: bool,
}

/// An event of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum ControlEvent {
    /// State and counters of the guest, for `status` and `verify`.
    Status {
        /// The status.
        #[serde(flatten)]
        status: Box<OwnerStatus>,
        /// Bytes of memory that `verify` has compared.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        verified_memory_bytes: Option<u64>,
        /// Bytes of disks that `verify` has compared.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        verified_disk_bytes: Option<u64>,
    },
    /// A device at the start of `watch`, or whose connection has changed.
    Device(DeviceConnection),
    /// The result of `dirty_rate`.
    DirtyRate(Box<MeasuredRate>),
    /// Events were dropped, because the client did not read them.
    Dropped {
        /// Number of events.
        events: u64,
    },
    /// The end of a successful answer.
    Ok,
    /// The end of an answer without success.
    Error {
        /// The failure and advice.
        message: String,
    },
    /// An event of a migration.
    #[serde(untagged)]
    Migration(Box<MigrationEvent>),
    /// An event of a later version.
    #[serde(untagged)]
    Unknown(Value),
}

impl From<OwnerStatus> for ControlEvent {
    fn from(status: OwnerStatus) -> ControlEvent {
        let status = Box::new(status);
        ControlEvent::Status { status, verified_memory_bytes: None, verified_disk_bytes: None }
    }
}

/// Formats the event as its line on the socket.
impl fmt::Display for ControlEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Fields in alphabetical order.
        serde_json::to_value(self).map_err(|_| fmt::Error)?.fmt(f)
    }
}

/// An error of a command. The client gets its text and those of its causes.
pub type CommandError = Box<dyn Error + Send + Sync>;

/// Implements the commands. Called from one thread per connection.
pub trait CommandHandler: Send + Sync + 'static {
    /// Executes `command` and sends its events to `client`.
    ///
    /// # Errors
    /// The failure and advice.
    fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), CommandError>;

    /// Ends the process after a successful [`ControlCommand::Quit`] was answered.
    fn quit(&self);
}

impl ControlCommand {
    /// Returns true if the process answers this command without waiting.
    fn is_answered_immediately(&self) -> bool {
        use ControlCommand::{Cancel, Forget, Quit, Status};
        matches!(self, Status {} | Cancel {} | Forget {} | Quit {})
    }
}

/// The connection of a client.
pub struct ControlClient<'a> {
    stream: &'a UnixStream,
    unsent: Mutex<UnsentEvents>,
}

/// Events that the client has not read and its socket cannot buffer.
#[derive(Default)]
struct UnsentEvents {
    /// Complete lines, except that part of the first may have been sent.
    bytes: Vec<u8>,
    /// Number of events dropped since the last buffered line.
    dropped: u64,
}

impl UnsentEvents {
    /// Adds a line, after a notice about dropped events.
    fn add(&mut self, event: &ControlEvent) {
        let dropped = std::mem::take(&mut self.dropped);
        let notice = (dropped > 0).then_some(ControlEvent::Dropped { events: dropped });
        for event in notice.iter().chain([event]) {
            self.bytes.extend(format!("{event}\n").into_bytes());
        }
    }

    /// Sends as much as the socket can buffer.
    fn flush(&mut self, stream: &UnixStream) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            let rest = self.bytes.get(sent..).unwrap_or_default();
            if rest.is_empty() {
                break Ok(());
            }
            match send(stream.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break Ok(()),
                Err(errno) => break Err(errno.into()),
            }
        };
        self.bytes.drain(..sent);
        result
    }
}

impl<'a> ControlClient<'a> {
    fn new(stream: &'a UnixStream) -> ControlClient<'a> {
        ControlClient { stream, unsent: Mutex::default() }
    }

    /// Sends an event without blocking. Events for a client that does not read are dropped beyond a limit; an event
    /// `dropped` reports their number. A command continues after its client has disconnected.
    pub fn send_event(&self, event: &ControlEvent) {
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = unsent.flush(self.stream).is_err();
        if gone || unsent.bytes.len() > MAX_UNSENT {
            unsent.dropped += 1;
            return;
        }
        unsent.add(event);
        // A disconnected client is noticed at the next event.
        let _ = unsent.flush(self.stream);
    }

    /// Sends the end of an answer and all buffered events. The client has a limited time to read them.
    fn end_answer(&self, answer: &ControlEvent) -> io::Result<()> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        unsent.add(answer);
        loop {
            unsent.flush(self.stream)?;
            if unsent.bytes.is_empty() {
                return Ok(());
            }
            if !socket::ready(self.stream.as_fd(), PollFlags::POLLOUT, deadline)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its events"));
            }
        }
    }

    /// Returns true if the client has disconnected. A client that has only shut down its sending side still reads.
    pub fn has_disconnected(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// The path of a control socket. Dropping it removes the socket, unless another process has replaced it.
#[derive(Debug)]
pub struct SocketPath {
    _place: SocketPathGuard,
}

/// Listens for control connections at `path`. The socket of a dead process is replaced.
///
/// # Errors
/// The obstacle and advice.
pub fn bind(path: &Path) -> io::Result<(UnixListener, SocketPath)> {
    listen(path).map(|(listener, place)| (listener, SocketPath { _place: place })).map_err(|refused| {
        let kind = refused.source.as_ref().map_or(io::ErrorKind::AddrInUse, io::Error::kind);
        io::Error::new(kind, format!("control socket {}: {}", path.display(), with_causes(&refused)))
    })
}

/// Removes all listening sockets that this process has created, also those of back-ends and migrations, before the
/// process ends. Sockets of other processes stay.
pub fn remove_sockets() {
    listen::remove_all();
}

/// Serves connections until the process ends. An error on a connection ends only that connection.
pub fn serve(listener: UnixListener, handler: Arc<dyn CommandHandler>) {
    let mut failing = false;
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                failing = false;
                let handler = Arc::clone(&handler);
                let answer = move || {
                    if let Err(error) = serve_connection(&stream, handler.as_ref()) {
                        tracing::debug!(%error, "control connection ended");
                    }
                };
                if let Err(error) = std::thread::Builder::new().name("control".into()).spawn(answer) {
                    tracing::warn!(%error, "control socket: no thread for a connection");
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "control socket: can't accept a connection; trying again");
                }
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

fn serve_connection(stream: &UnixStream, handler: &dyn CommandHandler) -> io::Result<()> {
    let mut lines = BufReader::new(stream);
    let client = ControlClient::new(stream);
    while let Some(line) = read_line(&mut lines)? {
        let command = serde_json::from_str(&line);
        let quits = matches!(command, Ok(ControlCommand::Quit {}));
        let answer = match command {
            Ok(command) => handler.command(command, &client),
            Err(error) => Err(format!("not a valid command: {error}").into()),
        };
        let answer = match answer {
            Ok(()) => ControlEvent::Ok,
            Err(error) => ControlEvent::Error { message: with_causes(error.as_ref()).to_string() },
        };
        let answered = client.end_answer(&answer);
        if quits && answer == ControlEvent::Ok {
            handler.quit();
        }
        answered?;
    }
    Ok(())
}

/// Sends one command and passes each event to `each` until the answer ends.
///
/// # Errors
/// [`io::ErrorKind::Other`] with the message of an `error` answer; [`io::ErrorKind::TimedOut`] if the process does not
/// read the command, or does not reply to one that is answered immediately; other errors of the socket.
pub fn call(path: &Path, command: &ControlCommand, each: impl FnMut(ControlEvent)) -> io::Result<()> {
    call_with_timeout(path, command, REPLY_TIMEOUT, each)
}

/// Asks for the status of the guest.
///
/// # Errors
/// As [`call`].
pub fn status(path: &Path) -> io::Result<OwnerStatus> {
    let mut found = None;
    call(path, &ControlCommand::Status {}, |event| {
        if let ControlEvent::Status { status, .. } = event {
            found = Some(*status);
        }
    })?;
    found.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: no status in the answer", path.display()))
    })
}

/// Like [`call`], with `patience` as time limit for reading the command, and for replying to one that is answered
/// immediately.
///
/// # Errors
/// As [`call`].
pub fn call_with_timeout(
    path: &Path,
    command: &ControlCommand,
    patience: Duration,
    mut each: impl FnMut(ControlEvent),
) -> io::Result<()> {
    let explain_timeout = |error| explain_timeout(path, patience, error);
    let deadline = Instant::now() + patience;
    let stream = connect(path, deadline)?;
    let line = format!("{}\n", serde_json::to_value(command)?);
    socket::send_until(stream.as_fd(), line.as_bytes(), &[], deadline).map_err(explain_timeout)?;
    let mut events = EventReader { stream: &stream, bytes: Vec::new() };
    let silence = command.is_answered_immediately().then_some(patience);
    while let Some(line) = events.next(silence).map_err(explain_timeout)? {
        match serde_json::from_slice(&line)? {
            ControlEvent::Ok => return Ok(()),
            ControlEvent::Error { message } => return Err(io::Error::other(message)),
            event => each(event),
        }
    }
    let message = if is_vhost_user_socket(path) {
        "this is the vhost-user socket of a back-end: --control takes the control socket of the guest's process"
    } else {
        "the connection was closed before the answer: has the guest's process ended, and is this its control socket?"
    };
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{}: {message}", path.display())))
}

/// Returns true if the socket replies to GET_FEATURES.
fn is_vhost_user_socket(path: &Path) -> bool {
    let header = |flags, size| Header { request: FrontendRequest::GET_FEATURES.0, flags, size };
    let ask = || {
        let deadline = Instant::now() + PROBE_TIMEOUT;
        let mut stream = socket::connect(path)?;
        socket::send_until(stream.as_fd(), header(Header::FLAG_VERSION, 0).as_bytes(), &[], deadline)?;
        let mut answer = Header::new_zeroed();
        // A reply arrives in one piece; a part is not a reply.
        if socket::ready(stream.as_fd(), PollFlags::POLLIN, deadline)? {
            stream.read_exact(answer.as_mut_bytes())?;
        }
        io::Result::Ok(answer)
    };
    ask().is_ok_and(|answer| answer.as_bytes() == header(Header::REPLY_FLAGS, size_of::<u64>() as u32).as_bytes())
}

/// Adds the socket and the probable cause to a timeout.
fn explain_timeout(path: &Path, patience: Duration, error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => {
            let text = format!(
                "{}: no reply within {patience:?}. The guest's process may be stuck; check its log",
                path.display()
            );
            io::Error::new(error.kind(), text)
        }
        _ => error,
    }
}

fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    loop {
        let error = match socket::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let advice = match error.kind() {
            io::ErrorKind::WouldBlock if Instant::now() < deadline => {
                std::thread::sleep(RETRY_DELAY);
                continue;
            }
            io::ErrorKind::WouldBlock => "no connection is accepted. The guest's process may be stuck; check its log",
            io::ErrorKind::NotFound => {
                "no such socket. Is the guest's process running, and is this its --control path?"
            }
            io::ErrorKind::ConnectionRefused => "no process listens there. Has the guest's process ended?",
            io::ErrorKind::PermissionDenied => "no permission: run as the guest's user",
            _ => "can't connect",
        };
        return Err(io::Error::new(error.kind(), format!("{}: {advice} ({error})", path.display())));
    }
}

/// Reads events of the guest's process line by line.
struct EventReader<'a> {
    stream: &'a UnixStream,
    /// Bytes received and not returned yet.
    bytes: Vec<u8>,
}

impl EventReader<'_> {
    /// Returns the next line, or `None` at the end. `silence` limits the wait.
    fn next(&mut self, silence: Option<Duration>) -> io::Result<Option<Vec<u8>>> {
        let deadline = silence.map(|silence| Instant::now() + silence);
        let mut chunk = vec![0; 4096];
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.bytes.drain(..=end).collect()));
            }
            if self.bytes.len() as u64 >= MAX_LINE {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line of more than {MAX_LINE} bytes"),
                ));
            }
            // Without a limit, the poll is repeated.
            let until = deadline.unwrap_or_else(|| Instant::now() + REPLY_TIMEOUT);
            if !socket::ready(self.stream.as_fd(), PollFlags::POLLIN, until)? {
                match deadline {
                    Some(_) => return Err(io::ErrorKind::TimedOut.into()),
                    None => continue,
                }
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.bytes.extend(chunk.get(..count).unwrap_or_default()),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // A peer that closes its socket with unread data resets the connection.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

fn read_line(lines: &mut BufReader<&UnixStream>) -> io::Result<Option<String>> {
    let mut line = String::new();
    let read = lines.by_ref().take(MAX_LINE).read_line(&mut line)?;
    if read as u64 == MAX_LINE && !line.ends_with('\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line of more than {MAX_LINE} bytes")));
    }
    Ok((read > 0).then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Write;

    struct Echo;

    impl CommandHandler for Echo {
        fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), CommandError> {
            match command {
                ControlCommand::Quit {} => Err("not today".into()),
                other => {
                    let saw = json!({"event": "saw", "command": serde_json::to_value(other).unwrap()});
                    client.send_event(&ControlEvent::Unknown(saw));
                    Ok(())
                }
            }
        }

        fn quit(&self) {
            panic!("a refused command was carried out");
        }
    }

    fn served(name: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let (listener, path) = bind(&dir.path().join(name)).unwrap();
        std::thread::spawn(move || {
            serve(listener, Arc::new(Echo));
            drop(path);
        });
        dir
    }

    #[test]
    fn a_command_round_trips_and_its_events_return() {
        let dir = served("c");
        let command = ControlCommand::DirtyRate { seconds: 1.5, bandwidth: 7, downtime_ms: 300 };
        let mut events = Vec::new();
        call(&dir.path().join("c"), &command, |event| events.push(event)).unwrap();
        let [ControlEvent::Unknown(saw)] = &events[..] else { panic!("{events:?}") };
        assert_eq!(serde_json::from_value::<ControlCommand>(saw["command"].clone()).unwrap(), command);
    }

    #[test]
    fn a_half_closed_client_has_not_disconnected() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = ControlClient::new(&ours);
        assert!(!client.has_disconnected());
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!client.has_disconnected());
        drop(theirs);
        assert!(client.has_disconnected());
    }

    #[test]
    fn an_error_reply_carries_its_message() {
        let dir = served("c");
        let error = call(&dir.path().join("c"), &ControlCommand::Quit {}, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "not today");
    }

    #[test]
    fn a_malformed_command_is_answered_and_the_connection_stays_open() {
        let dir = served("c");
        let stream = UnixStream::connect(dir.path().join("c")).unwrap();
        let mut lines = BufReader::new(&stream);
        let (fly, uri) = (r#"{"command":"fly"}"#, r#"{"command":"migrate","uri":1}"#);
        let (no_field, one_field) = (r#"{"command":"status","x":1}"#, r#"{"command":"watch","seconds":1,"x":1}"#);
        for nonsense in ["{}", "[", fly, uri, no_field, one_field] {
            (&stream).write_all(format!("{nonsense}\n").as_bytes()).unwrap();
            let answer = read_line(&mut lines).unwrap().unwrap();
            assert!(answer.contains(r#""event":"error""#), "{nonsense}: {answer}");
            assert_eq!(answer.contains("unknown field `x`"), nonsense.contains('x'), "{nonsense}: {answer}");
        }
        (&stream).write_all(b"{\"command\":\"status\"}\n").unwrap();
        assert!(read_line(&mut lines).unwrap().unwrap().contains("saw"));
    }

    #[test]
    fn an_overlong_line_ends_only_its_connection() {
        let dir = served("c");
        let stream = UnixStream::connect(dir.path().join("c")).unwrap();
        // The server closes while this still writes.
        let _ = (&stream).write_all(&vec![b'x'; 2 * MAX_LINE as usize]);
        let mut rest = Vec::new();
        let _ = (&stream).read_to_end(&mut rest);
        assert!(rest.is_empty());
        call(&dir.path().join("c"), &ControlCommand::Status {}, |_| ()).unwrap();
    }

    #[test]
    fn a_missing_socket_error_gives_advice() {
        let error = call(Path::new("/nonexistent/socket"), &ControlCommand::Status {}, |_| ()).unwrap_err();
        assert!(error.to_string().contains("Is the guest's process running"), "{error}");
    }

    #[test]
    fn a_client_that_does_not_read_loses_events_and_learns_how_many() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = ControlClient::new(&ours);
        // More than its socket and what is kept for it hold.
        let events = 40_000u64;
        (0..events)
            .for_each(|number| client.send_event(&ControlEvent::Unknown(json!({"event": "round", "number": number}))));
        let reader = std::thread::spawn(move || {
            let lines =
                BufReader::new(theirs).lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
            lines.collect::<Vec<_>>()
        });
        client.end_answer(&ControlEvent::Ok).unwrap();
        drop(client);
        drop(ours);
        let seen = reader.join().unwrap();
        let numbers: Vec<u64> = seen.iter().filter_map(|event| event["number"].as_u64()).collect();
        assert!(numbers.iter().copied().eq(0..numbers.len() as u64), "the first arrive whole and in order");
        let rest = [json!({"event": "dropped", "events": events - numbers.len() as u64}), json!({"event": "ok"})];
        assert_eq!(seen[numbers.len()..], rest);
    }

    #[test]
    fn a_hanging_process_is_reported_with_and_without_accepted_connections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        // It never accepts, and two connections fit into its queue.
        let (listener, _path) = bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        std::thread::scope(|scope| {
            // More connections than the queue holds.
            let callers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| call(&path, &ControlCommand::Cancel {}, |_| ()))).collect();
            for callers in callers {
                let error = callers.join().unwrap().unwrap_err();
                assert!(error.to_string().contains("may be stuck"), "{error}");
            }
        });
    }
}
