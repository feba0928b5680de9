//! How orchestrators talk to the process that owns a guest: one JSON object a line over a UNIX socket.
//!
//! A client sends [`Command`]s and reads events, objects with an `event` field, until `ok` or `error` ends the answer;
//! then it may send the next command. Connections are independent: `cancel` is sent on a second one. What the
//! commands do is up to the [`Handler`].
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::vhost_user::{Header, Request};
use crate::sys::listen::listen;

/// The longest line that is read, bytes.
pub const MAX_LINE: u64 = 64 << 10;

/// Longest wait for the answer that tells a back-end's socket from a control socket.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Command {
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
    /// End the running migration; the guest goes on here.
    Cancel,
    /// Stop the guest between two actions.
    Pause,
    /// Let a paused guest go on.
    Resume,
    /// Compare every byte of the guest's memory and disk with what it must be.
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
}

/// Carries out commands. Called from one thread per connection.
pub trait Handler: Send + Sync + 'static {
    /// Carries out `command`, telling `client` of events as they come.
    ///
    /// # Errors
    /// A message for the client: what failed and what to do.
    fn command(&self, command: Command, client: &Client<'_>) -> Result<(), String>;

    /// Ends the process, after a successful [`Command::Quit`] was answered.
    fn quit(&self);
}

/// Who has sent a command.
pub struct Client<'a>(&'a UnixStream);

impl Client<'_> {
    /// Sends an event. One that went away does not end what it started; its events just have no reader.
    pub fn tell(&self, event: &Value) {
        let _ = write_line(self.0, event);
    }

    /// Whether it went away. One that only sends nothing more still reads.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// Listens for control connections at `path`; a socket that a dead process left there is replaced.
///
/// # Errors
/// What is in the way, and what to do.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    listen(path).map_err(|refused| {
        let kind = refused.source.map_or(io::ErrorKind::AddrInUse, |error| error.kind());
        io::Error::new(kind, format!("control socket {}: {}", path.display(), refused.advice))
    })
}

/// Answers connections until the process ends. A connection that breaks or sends nonsense ends alone.
pub fn serve(listener: UnixListener, handler: Arc<dyn Handler>) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                let handler = Arc::clone(&handler);
                std::thread::spawn(move || {
                    if let Err(error) = converse(&stream, handler.as_ref()) {
                        tracing::debug!(%error, "control connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "control socket: can't accept");
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        }
    }
}

fn converse(stream: &UnixStream, handler: &dyn Handler) -> io::Result<()> {
    let mut lines = BufReader::new(stream);
    while let Some(line) = read_line(&mut lines)? {
        let command = serde_json::from_str(&line);
        let quits = matches!(command, Ok(Command::Quit));
        let answer = match command {
            Ok(command) => handler.command(command, &Client(stream)),
            Err(error) => Err(format!("not a command: {error}")),
        };
        let (done, answer) = match answer {
            Ok(()) => (true, json!({"event": "ok"})),
            Err(message) => (false, json!({"event": "error", "message": message})),
        };
        let answered = write_line(stream, &answer);
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
/// [`io::ErrorKind::Other`] with the message of an `error` answer; else what the socket says.
pub fn call(path: &Path, command: &Command, mut each: impl FnMut(Value)) -> io::Result<()> {
    let advise = |error: io::Error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "no such socket: is the guest running, and is --control its socket?",
            io::ErrorKind::ConnectionRefused => "nobody listens there any more: has the guest ended?",
            io::ErrorKind::PermissionDenied => "no permission: run as the guest's user",
            _ => "can't connect",
        };
        io::Error::new(error.kind(), format!("{}: {advice} ({error})", path.display()))
    };
    let stream = UnixStream::connect(path).map_err(advise)?;
    write_line(&stream, &serde_json::to_value(command)?)?;
    let mut lines = BufReader::new(&stream);
    // A peer that does not read what it was sent resets the connection when it closes it.
    let reset = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionReset;
    while let Some(line) = read_line(&mut lines).or_else(|error| if reset(&error) { Ok(None) } else { Err(error) })? {
        let event: Value = serde_json::from_str(&line)?;
        match event.get("event").and_then(Value::as_str) {
            Some("ok") => return Ok(()),
            Some("error") => {
                let message = event.get("message").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(io::Error::other(message.to_owned()));
            }
            _ => each(event),
        }
    }
    let message = if speaks_vhost_user(path) {
        "this is the vhost-user socket of a back-end: --control takes the control socket of the guest's process"
    } else {
        "the connection was closed before the answer: has the guest's process ended, and is this its control socket?"
    };
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{}: {message}", path.display())))
}

/// Returns true if GET_FEATURES is answered at the socket.
fn speaks_vhost_user(path: &Path) -> bool {
    let header = |flags, size| Header { request: Request::GET_FEATURES.0, flags, size };
    let ask = || {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
        stream.set_write_timeout(Some(PROBE_TIMEOUT))?;
        stream.write_all(header(Header::FLAG_VERSION, 0).as_bytes())?;
        let mut answer = Header::new_zeroed();
        stream.read_exact(answer.as_mut_bytes())?;
        io::Result::Ok(answer)
    };
    ask().is_ok_and(|answer| answer.as_bytes() == header(Header::REPLY_FLAGS, size_of::<u64>() as u32).as_bytes())
}

fn read_line(lines: &mut BufReader<&UnixStream>) -> io::Result<Option<String>> {
    let mut line = String::new();
    let read = lines.by_ref().take(MAX_LINE).read_line(&mut line)?;
    if read as u64 == MAX_LINE && !line.ends_with('\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line of more than {MAX_LINE} bytes")));
    }
    Ok((read > 0).then_some(line))
}

fn write_line(mut stream: &UnixStream, value: &Value) -> io::Result<()> {
    let mut line = value.to_string();
    line.push('\n');
    stream.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn command(&self, command: Command, client: &Client<'_>) -> Result<(), String> {
            match command {
                Command::Quit => Err("not today".into()),
                other => {
                    client.tell(&json!({"event": "saw", "command": serde_json::to_value(other).unwrap()}));
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
        let listener = bind(&dir.path().join(name)).unwrap();
        std::thread::spawn(|| serve(listener, Arc::new(Echo)));
        dir
    }

    #[test]
    fn a_command_arrives_whole_and_its_events_come_back() {
        let dir = served("c");
        let command = Command::DirtyRate { seconds: 1.5, bandwidth: 7, downtime_ms: 300 };
        let mut events = Vec::new();
        call(&dir.path().join("c"), &command, |event| events.push(event)).unwrap();
        assert_eq!(events.len(), 1);
        assert_eq!(serde_json::from_value::<Command>(events[0]["command"].clone()).unwrap(), command);
    }

    #[test]
    fn a_client_that_only_sends_nothing_more_is_not_gone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = Client(&ours);
        assert!(!client.is_gone());
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!client.is_gone());
        drop(theirs);
        assert!(client.is_gone());
    }

    #[test]
    fn an_error_carries_its_message() {
        let dir = served("c");
        let error = call(&dir.path().join("c"), &Command::Quit, |_| ()).unwrap_err();
        assert_eq!(error.to_string(), "not today");
    }

    #[test]
    fn nonsense_is_answered_and_the_connection_goes_on() {
        let dir = served("c");
        let stream = UnixStream::connect(dir.path().join("c")).unwrap();
        let mut lines = BufReader::new(&stream);
        for nonsense in ["{}", "[", r#"{"command":"fly"}"#, r#"{"command":"migrate","uri":1}"#] {
            (&stream).write_all(format!("{nonsense}\n").as_bytes()).unwrap();
            let answer = read_line(&mut lines).unwrap().unwrap();
            assert!(answer.contains(r#""event":"error""#), "{nonsense}: {answer}");
        }
        write_line(&stream, &json!({"command": "status"})).unwrap();
        assert!(read_line(&mut lines).unwrap().unwrap().contains("saw"));
    }

    #[test]
    fn an_endless_line_ends_only_its_connection() {
        let dir = served("c");
        let stream = UnixStream::connect(dir.path().join("c")).unwrap();
        // The server closes while this still writes.
        let _ = (&stream).write_all(&vec![b'x'; 2 * MAX_LINE as usize]);
        let mut rest = Vec::new();
        let _ = (&stream).read_to_end(&mut rest);
        assert!(rest.is_empty());
        call(&dir.path().join("c"), &Command::Status, |_| ()).unwrap();
    }

    #[test]
    fn a_missing_socket_says_what_to_do() {
        let error = call(Path::new("/nonexistent/socket"), &Command::Status, |_| ()).unwrap_err();
        assert!(error.to_string().contains("is the guest running"), "{error}");
    }
}
