//! The back-end's process, if the check may kill and restart it.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::connection::{RETRY_INTERVAL, connect};
use super::options::CheckOptions;
use super::stop::StopToken;

/// A back-end that may be killed. A process that was started here is killed on drop.
#[derive(Debug)]
pub(super) struct BackendProcess {
    command: String,
    socket: PathBuf,
    timeout: Duration,
    pub(super) stop: StopToken,
    /// Process id of a back-end that was started by the user.
    external_pid: Cell<Option<Pid>>,
    child: RefCell<Option<Child>>,
    /// True once the current process has accepted a connection.
    served: Cell<bool>,
    /// False until it is known if the back-end exits after each connection.
    exit_known: Cell<bool>,
    /// Exit status after each connection, if the back-end exits then.
    usual_exit: Cell<Option<ExitStatus>>,
    /// Number of restarts after such an exit.
    pub(super) restarts: Cell<u32>,
}

impl BackendProcess {
    pub(super) fn new(command: &str, socket: &Path, options: &CheckOptions) -> BackendProcess {
        let external_pid = options.kill_pid.map(Pid::from_raw);
        BackendProcess {
            command: command.into(),
            socket: socket.into(),
            timeout: options.timeout,
            stop: options.stop.clone(),
            external_pid: Cell::new(external_pid),
            child: RefCell::default(),
            served: Cell::new(external_pid.is_some()),
            exit_known: Cell::default(),
            usual_exit: Cell::default(),
            restarts: Cell::default(),
        }
    }

    /// Starts the back-end. Waits until it listens, unless it exits after each connection.
    ///
    /// # Errors
    /// An error if the process does not start. A back-end that exits after each connection is not probed.
    pub(super) fn start(&self) -> io::Result<()> {
        let shell = format!("exec {}", self.command);
        let mut command = Command::new("/bin/sh");
        // A process group of its own: Ctrl-C then ends only the check, which needs the back-end to restore its changes.
        command.args(["-c", &shell]).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        *self.child.borrow_mut() = Some(command.spawn()?);
        self.served.set(false);
        if self.exit_known.get() && self.usual_exit.get().is_none() {
            self.connect()?;
        }
        Ok(())
    }

    /// Records that a second connection was served. Another exit status is a crash from now on.
    pub(super) fn mark_exit_known(&self) {
        self.exit_known.set(true);
    }

    /// Returns the exit status if the process has ended. It is not known for a process that the user started.
    fn exit_status(&self) -> io::Result<Option<ExitStatus>> {
        match (self.child.borrow_mut().as_mut(), self.external_pid.get()) {
            (Some(child), _) => child.try_wait(),
            (None, Some(pid)) if kill(pid, None).is_err() => Ok(Some(ExitStatus::default())),
            _ => Ok(None),
        }
    }

    /// Connects as soon as the back-end listens. Restarts it if it has exited after the last connection.
    pub(super) fn connect(&self) -> io::Result<UnixStream> {
        if self.served.get() && self.usual_exit.get().is_some() {
            self.wait_for_end()?;
        }
        let deadline = self.stop.deadline(self.timeout);
        loop {
            let error = match connect(&self.socket, self.timeout, &self.stop) {
                Ok(stream) => {
                    self.served.set(true);
                    return Ok(stream);
                }
                Err(error) => error,
            };
            match (self.exit_status()?, self.served.get()) {
                (Some(status), false) => {
                    *self.child.borrow_mut() = None;
                    return Err(io::Error::other(format!("'{}' exited with {status}", self.command)));
                }
                (Some(status), true) if self.usual_exit.get().is_some() || !self.exit_known.get() => {
                    self.start_again(status)?
                }
                (Some(status), true) => return Err(crash(status)),
                (None, _) if deadline.is_over() => {
                    let (command, waited) = (&self.command, self.timeout);
                    let late = format!("'{command}' does not listen within {waited:?}: {error}");
                    return Err(io::Error::other(late));
                }
                (None, _) => thread::sleep(RETRY_INTERVAL),
            }
        }
    }

    /// Waits for the exit that follows each connection. Another status than the first is a crash.
    fn wait_for_end(&self) -> io::Result<()> {
        let deadline = self.stop.deadline(self.timeout);
        loop {
            if let Some(status) = self.exit_status()? {
                return self.start_again(status);
            }
            if deadline.is_over() {
                return Err(io::Error::other("the back-end exited after its first connection, but not after this one"));
            }
            thread::sleep(RETRY_INTERVAL);
        }
    }

    fn start_again(&self, status: ExitStatus) -> io::Result<()> {
        self.external_pid.set(None);
        let usual = self.usual_exit.get().unwrap_or(status);
        self.usual_exit.set(Some(usual));
        self.restarts.set(self.restarts.get() + 1);
        self.start()?;
        match status == usual {
            true => Ok(()),
            false => Err(crash(status)),
        }
    }

    /// Returns the exit status after each connection, if the back-end exits then.
    pub(super) fn usual_exit(&self) -> Option<ExitStatus> {
        self.usual_exit.get()
    }

    /// Sends SIGKILL and waits until the socket is no longer served.
    pub(super) fn kill(&self) -> io::Result<()> {
        match (self.child.borrow_mut().take(), self.external_pid.take()) {
            (Some(mut child), _) => {
                child.kill()?;
                child.wait()?;
                return Ok(());
            }
            (None, Some(pid)) => kill(pid, Signal::SIGKILL)?,
            (None, None) => {}
        }
        let deadline = self.stop.deadline(self.timeout);
        while connect(&self.socket, self.timeout, &self.stop).is_ok() {
            if deadline.is_over() {
                return Err(io::Error::other(
                    "the socket is still served after SIGKILL. Check that the process id is that of the back-end",
                ));
            }
            thread::sleep(RETRY_INTERVAL);
        }
        Ok(())
    }
}

fn crash(status: ExitStatus) -> io::Error {
    io::Error::other(format!("the back-end exited with {status}"))
}

impl Drop for BackendProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.borrow_mut().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
