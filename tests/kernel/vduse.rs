//! The command as a VDUSE device, and the kernel's view of it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::modules::load;
use crate::process::{program, text};
use crate::wait::{PATIENCE, wait_for};

/// Loads the modules of VDUSE and of the drivers that are attached to.
pub(crate) fn load_modules() {
    for module in ["vduse", "virtio_vdpa", "vhost_vdpa", "virtio_blk", "virtio_net"] {
        load(module);
    }
}

/// A running `backend`. It is ended on drop.
pub(crate) struct Served {
    child: Child,
    name: String,
    /// The line in which the command says what it serves.
    pub(crate) line: String,
    log: PathBuf,
}

impl Served {
    /// Starts `backend DEVICE --vduse NAME ARGUMENTS…`, and waits until it serves.
    pub(crate) fn start(device: &str, name: &str, arguments: &[&str]) -> Served {
        let mut command = program();
        command.args(["backend", device, "--vduse", name]).args(arguments);
        Served::run(command, name)
    }

    /// Runs a command that serves the device `name`, and waits until it serves.
    pub(crate) fn run(mut command: Command, name: &str) -> Served {
        load_modules();
        let log = PathBuf::from(format!("/tmp/{name}.log"));
        command.env("RUST_LOG", "debug").stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let served = Served { child, name: name.into(), line, log };
        assert!(served.line.contains(" as VDUSE device "), "{:?}, {}", served.line, served.log());
        served
    }

    /// Returns the path of the disk that the driver offers.
    pub(crate) fn disk(&self) -> PathBuf {
        let path = self.line.split('(').find_map(|part| part.strip_prefix("/dev/"));
        Path::new("/dev").join(path.expect("a disk in parentheses").trim_end().trim_end_matches(')'))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns what the command has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end of the command.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let log = self.log.clone();
        let started = Instant::now();
        wait_for(&format!("{} ends", self.name), || {
            if started.elapsed() > PATIENCE / 2 {
                println!("{}", fs::read_to_string(&log).unwrap());
            }
            self.child.try_wait().unwrap()
        })
    }

    /// Ends the command by SIGTERM, and checks that nothing is left behind.
    pub(crate) fn end(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
        assert_eq!(left_behind(&self.name), Vec::<PathBuf>::new(), "{}", self.log());
    }

    /// Kills the command by SIGKILL.
    pub(crate) fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        assert_eq!(self.wait().signal(), Some(libc::SIGKILL));
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            println!("{}: {}", self.name, self.log());
            self.signal(Signal::SIGCONT);
            self.signal(Signal::SIGTERM);
            let started = Instant::now();
            while self.child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = self.child.kill();
        }
    }
}

/// Runs `backend blk --vduse NAME ARGUMENTS…`, which is expected to fail, and returns its message.
pub(crate) fn refused(device: &str, name: &str, arguments: &[&str]) -> String {
    let output: Output = program().args(["backend", device, "--vduse", name]).args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    text(&output.stderr)
}

/// Returns the files by which a device exists.
pub(crate) fn left_behind(name: &str) -> Vec<PathBuf> {
    let places = [format!("/dev/vduse/{name}"), bus_path(name)];
    places.into_iter().map(PathBuf::from).filter(|path| path.exists()).collect()
}

/// Returns the folder of a device on the vDPA bus.
pub(crate) fn bus_path(name: &str) -> String {
    format!("/sys/bus/vdpa/devices/{name}")
}

/// Unbinds a device of the vDPA bus from its driver, or binds it.
pub(crate) fn driver(driver: &str, operation: &str, name: &str) {
    fs::write(format!("/sys/bus/vdpa/drivers/{driver}/{operation}"), name).unwrap();
}
