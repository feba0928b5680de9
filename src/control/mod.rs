//! How orchestrators talk to the process that owns a guest: one JSON object a line over a UNIX socket.
//!
//! A client sends [`ControlCommand`]s and reads events, objects with an `event` field, until `ok` or `error` ends the answer;
//! then it may send the next command. Connections are independent: `cancel` is sent on a second one. What the
//! commands do is up to the [`CommandHandler`].
//!
//! A client that does not read delays nothing: its events are kept up to a limit and dropped beyond it, and a client that
//! does not take the end of an answer within seconds loses its connection.
#![forbid(unsafe_code)]

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
use serde_json::{Value, json};
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::vhost_user::{Header, Request};
use crate::sys::listen::{self, SocketPathGuard, listen};
use crate::sys::socket;

pub use crate::sys::listen::MAX_SOCKET_PATH;

/// The longest line that is read, bytes.
pub const MAX_LINE: u64 = 64 << 10;
/// Bytes of events that are kept for a client that does not read, beyond what its socket holds.
const MAX_UNSENT: usize = 64 << 10;
/// How long the other side may take to read what ends an answer, to accept a connection, to take a command, and to answer one
/// that is answered at once.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a full queue of connections is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Longest wait for the answer that tells a back-end's socket from a control socket.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum ControlCommand {
    /// One event with the guest's state and counters.
    Status,
    /// An event for each of the guest's devices, now and whenever its connection changes: its back-end goes away, answers in
    /// a way that it can't go on with, comes back.
    Watch {
        /// For how long, seconds; it ends with the client too.
        seconds: f64,
    },
    /// Move the guest away; events until it is done or has failed.
    Migrate(MigrateArguments),
    /// End the migration that is under way, or a measurement, a verification or a resume; the guest goes on here.
    Cancel,
    /// Stop the guest between two actions.
    Pause,
    /// Let a paused guest go on. After a migration whose outcome is not known: the operator says that the destination does
    /// not run the guest.
    Resume,
    /// Let go of a guest after a migration whose outcome is not known: the operator says that the destination runs it.
    Forget,
    /// Compare every byte of the guest's memory and disk with what it must be. A wrong byte is the guest's failure.
    Verify,
    /// Measure what is dirtied and forecast a migration.
    DirtyRate {
        /// How long to measure, seconds.
        seconds: f64,
        /// Bandwidth of the migration to forecast, bytes of guest memory per second.
        bandwidth: u64,
        /// Longest stop of the guest to forecast for, milliseconds.
        downtime_ms: u64,
    },
    /// End the guest's process.
    Quit,
}

/// How to migrate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateArguments {
    /// Where to: `tcp:HOST:PORT`, `unix:PATH`, `file:PATH`, `exec:COMMAND` or `fd:N`.
    pub uri: String,
    /// `none`, `zstd` or `zstd:LEVEL`.
    pub codec: String,
    /// Connections that carry pages.
    pub channels: u16,
    /// Longest stop of the guest that is acceptable, milliseconds.
    pub downtime_ms: u64,
    /// Limit while the guest runs, bytes per second.
    pub bandwidth: Option<u64>,
    /// Rounds after which a migration that does not converge is given up.
    pub max_rounds: u32,
    /// Compare all memory with what has arrived, while the guest is stopped and before it is handed over.
    #[serde(default)]
    pub verify: bool,
    /// Longest switchover, milliseconds; then the guest goes on here. By default four times the downtime, at least 10 000.
    #[serde(default)]
    pub switchover_timeout_ms: Option<u64>,
    /// The guest goes on here once a file holds it.
    #[serde(default)]
    pub continue_here: bool,
    /// Want no answers. Then nothing can say that the guest runs at the other end.
    #[serde(default)]
    pub one_way: bool,
}

/// Carries out commands. Called from one thread per connection.
pub trait CommandHandler: Send + Sync + 'static {
    /// Carries out `command`, telling `client` of events as they come.
    ///
    /// # Errors
    /// A message for the client: what failed and what to do.
    fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), String>;

    /// Ends the process, after a successful [`ControlCommand::Quit`] was answered.
    fn quit(&self);
}

impl ControlCommand {
    /// Returns true if the process that owns the guest answers this without waiting for anything.
    fn is_answered_immediately(&self) -> bool {
        matches!(self, ControlCommand::Status | ControlCommand::Cancel | ControlCommand::Forget | ControlCommand::Quit)
    }
}

/// The connection that a command came over.
pub struct ControlClient<'a> {
    stream: &'a UnixStream,
    unsent: Mutex<UnsentEvents>,
}

/// What a client has not read yet and its socket has no room for.
#[derive(Default)]
struct UnsentEvents {
    /// Whole lines, but for the first, of which a part may have been sent.
    bytes: Vec<u8>,
    /// Events that were dropped since the last line that was kept.
    dropped: u64,
}

impl UnsentEvents {
    /// Adds a line, behind one that says how many were dropped.
    fn add(&mut self, value: &Value) {
        let dropped = std::mem::take(&mut self.dropped);
        let notice = (dropped > 0).then(|| json!({"event": "dropped", "events": dropped}));
        for value in notice.iter().chain([value]) {
            self.bytes.extend(value.to_string().into_bytes());
            self.bytes.push(b'\n');
        }
    }

    /// Sends what there is room for.
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

    /// Sends an event; never waits. Events for a client that does not read are dropped beyond a limit, of which it is told by
    /// an event `dropped`. A client that went away does not end what it started; its events just have no reader.
    pub fn send_event(&self, event: &Value) {
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = unsent.flush(self.stream).is_err();
        if gone || unsent.bytes.len() > MAX_UNSENT {
            unsent.dropped += 1;
            return;
        }
        unsent.add(event);
        // One that is gone is noticed at the next event.
        let _ = unsent.flush(self.stream);
    }

    /// Sends what ends an answer, and all before it. The client has some time to read it.
    fn end_answer(&self, answer: &Value) -> io::Result<()> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut unsent = self.unsent.lock().unwrap_or_else(PoisonError::into_inner);
        unsent.add(answer);
        loop {
            unsent.flush(self.stream)?;
            if unsent.bytes.is_empty() {
                return Ok(());
            }
            if !socket::ready(self.stream.as_fd(), PollFlags::POLLOUT, deadline)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read"));
            }
        }
    }

    /// Whether it went away. One that only sends nothing more still reads.
    pub fn has_disconnected(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// The path of a control socket. The socket there is removed with this, unless another process has replaced it.
#[derive(Debug)]
pub struct SocketPath {
    _place: SocketPathGuard,
}

/// Listens for control connections at `path`; a socket that a dead process left there is replaced.
///
/// # Errors
/// What is in the way, and what to do.
pub fn bind(path: &Path) -> io::Result<(UnixListener, SocketPath)> {
    listen(path).map(|(listener, place)| (listener, SocketPath { _place: place })).map_err(|refused| {
        let kind = refused.source.map_or(io::ErrorKind::AddrInUse, |error| error.kind());
        io::Error::new(kind, format!("control socket {}: {}", path.display(), refused.advice))
    })
}

/// Removes the sockets that this process has made to listen on, of back-ends and migrations too, for a process that is about to
/// end. Those of other processes stay.
pub fn remove_sockets() {
    listen::remove_all();
}

/// Answers connections until the process ends. A connection that breaks or sends nonsense ends alone.
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
                    tracing::warn!(%error, "control socket: can't accept a connection, and goes on trying");
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
        let quits = matches!(command, Ok(ControlCommand::Quit));
        let answer = match command {
            Ok(command) => handler.command(command, &client),
            Err(error) => Err(format!("not a command: {error}")),
        };
        let (done, answer) = match answer {
            Ok(()) => (true, json!({"event": "ok"})),
            Err(message) => (false, json!({"event": "error", "message": message})),
        };
        let answered = client.end_answer(&answer);
        if quits && done {
            handler.quit();
        }
        answered?;
    }
    Ok(())
}

/// Sends one command and hands each event to `each` until the answer ends.
///
/// # Errors
/// [`io::ErrorKind::Other`] with the message of an `error` answer; [`io::ErrorKind::TimedOut`] if the process does not take
/// the command, or does not answer one that is answered at once; else what the socket says.
pub fn call(path: &Path, command: &ControlCommand, each: impl FnMut(Value)) -> io::Result<()> {
    call_with_timeout(path, command, REPLY_TIMEOUT, each)
}

/// The same, with another limit for what the process does at once: to take the command, and to answer one that is answered at
/// once.
///
/// # Errors
/// As [`call`].
pub fn call_with_timeout(
    path: &Path,
    command: &ControlCommand,
    patience: Duration,
    mut each: impl FnMut(Value),
) -> io::Result<()> {
    let explain_timeout = |error| explain_timeout(path, patience, error);
    let deadline = Instant::now() + patience;
    let stream = connect(path, deadline)?;
    let line = format!("{}\n", serde_json::to_value(command)?);
    socket::send_until(stream.as_fd(), line.as_bytes(), &[], deadline).map_err(explain_timeout)?;
    let mut events = EventReader { stream: &stream, bytes: Vec::new() };
    let silence = command.is_answered_immediately().then_some(patience);
    while let Some(line) = events.next(silence).map_err(explain_timeout)? {
        let event: Value = serde_json::from_slice(&line)?;
        match event.get("event").and_then(Value::as_str) {
            Some("ok") => return Ok(()),
            Some("error") => {
                let message = event.get("message").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(io::Error::other(message.to_owned()));
            }
            _ => each(event),
        }
    }
    let message = if is_vhost_user_socket(path) {
        "this is the vhost-user socket of a back-end: --control takes the control socket of the guest's process"
    } else {
        "the connection was closed before the answer: has the guest's process ended, and is this its control socket?"
    };
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{}: {message}", path.display())))
}

/// Returns true if GET_FEATURES is answered at the socket.
fn is_vhost_user_socket(path: &Path) -> bool {
    let header = |flags, size| Header { request: Request::GET_FEATURES.0, flags, size };
    let ask = || {
        let deadline = Instant::now() + PROBE_TIMEOUT;
        let mut stream = socket::connect(path)?;
        socket::send_until(stream.as_fd(), header(Header::FLAG_VERSION, 0).as_bytes(), &[], deadline)?;
        let mut answer = Header::new_zeroed();
        // The answer comes as one: a part of it is not the answer.
        if socket::ready(stream.as_fd(), PollFlags::POLLIN, deadline)? {
            stream.read_exact(answer.as_mut_bytes())?;
        }
        io::Result::Ok(answer)
    };
    ask().is_ok_and(|answer| answer.as_bytes() == header(Header::REPLY_FLAGS, size_of::<u64>() as u32).as_bytes())
}

/// Says whose silence a timeout was.
fn explain_timeout(path: &Path, patience: Duration, error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => {
            let text = format!("{}: no answer within {patience:?}: the guest's process hangs", path.display());
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
            io::ErrorKind::WouldBlock => "no connection is accepted: the guest's process hangs",
            io::ErrorKind::NotFound => "no such socket: is the guest running, and is --control its socket?",
            io::ErrorKind::ConnectionRefused => "nobody listens there any more: has the guest ended?",
            io::ErrorKind::PermissionDenied => "no permission: run as the guest's user",
            _ => "can't connect",
        };
        return Err(io::Error::new(error.kind(), format!("{}: {advice} ({error})", path.display())));
    }
}

/// What the process that owns the guest says, line by line.
struct EventReader<'a> {
    stream: &'a UnixStream,
    /// Received and not yet handed out.
    bytes: Vec<u8>,
}

impl EventReader<'_> {
    /// The next line; `None` at the end. `silence` limits how long it may take.
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
            // Without a limit it looks once in a while, which changes nothing.
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
                // A peer that does not read what it was sent resets the connection when it closes it.
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
    use std::io::Write;

    struct Echo;

    impl CommandHandler for Echo {
        fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), String> {
            match command {
                ControlCommand::Quit => Err("not today".into()),
                other => {
                    client.send_event(&json!({"event": "saw", "command": serde_json::to_value(other).unwrap()}));
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
        assert_eq!(events.len(), 1);
        assert_eq!(serde_json::from_value::<ControlCommand>(events[0]["command"].clone()).unwrap(), command);
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
        let error = call(&dir.path().join("c"), &ControlCommand::Quit, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "not today");
    }

    #[test]
    fn a_malformed_command_is_answered_and_the_connection_stays_open() {
        let dir = served("c");
        let stream = UnixStream::connect(dir.path().join("c")).unwrap();
        let mut lines = BufReader::new(&stream);
        for nonsense in ["{}", "[", r#"{"command":"fly"}"#, r#"{"command":"migrate","uri":1}"#] {
            (&stream).write_all(format!("{nonsense}\n").as_bytes()).unwrap();
            let answer = read_line(&mut lines).unwrap().unwrap();
            assert!(answer.contains(r#""event":"error""#), "{nonsense}: {answer}");
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
        call(&dir.path().join("c"), &ControlCommand::Status, |_| ()).unwrap();
    }

    #[test]
    fn a_missing_socket_error_gives_advice() {
        let error = call(Path::new("/nonexistent/socket"), &ControlCommand::Status, |_| ()).unwrap_err();
        assert!(error.to_string().contains("is the guest running"), "{error}");
    }

    #[test]
    fn a_client_that_does_not_read_loses_events_and_learns_how_many() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = ControlClient::new(&ours);
        // More than its socket and what is kept for it hold.
        let events = 40_000u64;
        (0..events).for_each(|number| client.send_event(&json!({"event": "round", "number": number})));
        let reader = std::thread::spawn(move || {
            let lines =
                BufReader::new(theirs).lines().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
            lines.collect::<Vec<_>>()
        });
        client.end_answer(&json!({"event": "ok"})).unwrap();
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
            // More than there is room for.
            let asked: Vec<_> = (0..4).map(|_| scope.spawn(|| call(&path, &ControlCommand::Cancel, |_| ()))).collect();
            for asked in asked {
                let error = asked.join().unwrap().unwrap_err();
                assert!(error.to_string().contains("the guest's process hangs"), "{error}");
            }
        });
    }
}
