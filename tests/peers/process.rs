//! Child processes that never outlive their test, folders for their files, and waiting with a deadline.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub(crate) use crate::wait::{PATIENCE as DEADLINE, wait_for};

/// The folders of one test: sockets and logs, guest memory (in `/dev/shm`), and disk images (on a real disk).
pub(crate) struct Lab {
    files: TempDir,
    memory: TempDir,
    disks: TempDir,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let files = tempfile::Builder::new().prefix("peers-").tempdir().unwrap();
        let memory = tempfile::Builder::new().prefix("peers-").tempdir_in("/dev/shm").unwrap();
        let disks = tempfile::Builder::new().prefix("peers-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Lab { files, memory, disks }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// The path of the test's only disk image, which its back-ends share.
    pub(crate) fn disk(&self) -> PathBuf {
        self.disks.path().join("disk.img")
    }

    pub(crate) fn memory(&self, name: &str) -> PathBuf {
        self.memory.path().join(name)
    }
}

/// A running program. It is killed when dropped, or by the kernel when the test is killed. Its output is kept, and
/// shown when the test fails.
pub(crate) struct Process {
    name: String,
    child: Child,
    output: PathBuf,
}

impl Process {
    /// Starts `program` with `args`; its output goes to `output`.
    pub(crate) fn start(name: &str, program: &str, args: &[String], output: &Path) -> Process {
        let log = File::options().create(true).append(true).open(output).unwrap();
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", program])
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{name}: can't start {program} ({e}); tests/peers/install installs it"));
        Process { name: name.into(), child, output: output.into() }
    }

    /// The program's output so far.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.output).unwrap_or_default()).into_owned()
    }

    /// Panics with the program's output if it has ended.
    pub(crate) fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{} ended early with {status}:\n{}", self.name, self.output());
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Sends SIGKILL and waits until the process has ended.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM and waits until the process has ended by itself.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits until the process has ended by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let name = self.name.clone();
        wait_for(&format!("end of {name}"), || self.child.try_wait().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.output());
        }
    }
}
