//! The back-end's process, where the check may kill it and start another.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::link::connect;

/// Between two looks at a socket.
const LOOK: Duration = Duration::from_millis(5);

/// A back-end that may be killed. One that was started here is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    command: String,
    socket: PathBuf,
    timeout: Duration,
    /// The one to be killed that somebody else started.
    given: Option<Pid>,
    child: Option<Child>,
}

impl Process {
    pub(super) fn new(command: &str, socket: &Path, timeout: Duration, given: Option<Pid>) -> Process {
        Process { command: command.into(), socket: socket.into(), timeout, given, child: None }
    }

    /// Starts one, and waits until it listens.
    pub(super) fn start(&mut self) -> io::Result<()> {
        let shell = format!("exec {}", self.command);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &shell]).stdin(Stdio::null()).stdout(Stdio::null());
        self.child = Some(command.spawn()?);
        let deadline = Instant::now() + self.timeout;
        while connect(&self.socket, self.timeout).is_err() {
            if let Some(status) = self.child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                self.child = None;
                return Err(io::Error::other(format!("'{}' ended with {status}", self.command)));
            }
            if Instant::now() > deadline {
                let waited = self.timeout;
                return Err(io::Error::other(format!("'{}' does not listen within {waited:?}", self.command)));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// SIGKILL, and waits until its socket is dead.
    pub(super) fn kill(&mut self) -> io::Result<()> {
        match (self.child.take(), self.given.take()) {
            (Some(mut child), _) => {
                child.kill()?;
                child.wait()?;
            }
            (None, Some(pid)) => kill(pid, Signal::SIGKILL)?,
            (None, None) => {}
        }
        let deadline = Instant::now() + self.timeout;
        while connect(&self.socket, self.timeout).is_ok() {
            if Instant::now() > deadline {
                return Err(io::Error::other("the socket is still served after SIGKILL: is it the right process?"));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
