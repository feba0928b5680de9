//! Back-ends under test: a device served by a thread, or the command as a process.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::VirtioDevice;
use vhost_migrate::backend::blk::{BlkDevice, BlkOptions};

use crate::guest::{Guest, Ring, negotiate};
use crate::raw::RawFrontend;
use crate::served::Served;

/// A device served by a thread of this process until it is dropped.
pub(crate) struct Server {
    pub(crate) folder: tempfile::TempDir,
    served: Option<Served>,
}

impl Server {
    pub(crate) fn new(device: Arc<dyn VirtioDevice>) -> Server {
        Server::at(tempfile::tempdir().unwrap(), device)
    }

    pub(crate) fn at(folder: tempfile::TempDir, device: Arc<dyn VirtioDevice>) -> Server {
        let served = Some(Served::new(&folder.path().join("socket"), device));
        Server { folder, served }
    }

    /// A disk of `bytes`, each 512-byte sector of which begins with its own number.
    pub(crate) fn disk(bytes: u64, change: impl FnOnce(&mut BlkOptions)) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let options = disk_options(folder.path(), bytes, change);
        let disk = BlkDevice::open(options).unwrap();
        Server::at(folder, Arc::new(disk))
    }

    /// The server with a new guest, whose front-end is connected.
    pub(crate) fn connected(self) -> (Server, Guest, RawFrontend) {
        let client = self.connect();
        (self, Guest::new(), client)
    }

    /// The same, with `features` negotiated.
    pub(crate) fn negotiated(self, features: VirtioFeatures) -> (Server, Guest, RawFrontend) {
        let (server, guest, client) = self.connected();
        negotiate(&client, &guest, features);
        (server, guest, client)
    }

    /// The same, with ring 0 of `size` entries started.
    pub(crate) fn running(self, size: u16, features: VirtioFeatures) -> (Server, Guest, RawFrontend, Ring) {
        let (server, guest, client) = self.negotiated(features);
        let ring = Ring::started(&client, &guest, 0, size, features);
        (server, guest, client, ring)
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    pub(crate) fn connect(&self) -> RawFrontend {
        RawFrontend::connect(&self.folder.path().join("socket"))
    }

    /// Stops the server. Requests in flight are complete or abandoned when this returns.
    pub(crate) fn stop(&mut self) {
        self.served = None;
    }
}

pub(crate) fn disk_options(folder: &Path, bytes: u64, change: impl FnOnce(&mut BlkOptions)) -> BlkOptions {
    let image = folder.join("image");
    let mut contents = vec![0; bytes as usize];
    for (number, sector) in (0u64..).zip(contents.chunks_mut(512)) {
        sector.fill(number as u8 | 1);
        if let Some(start) = sector.get_mut(..8) {
            start.copy_from_slice(&number.to_le_bytes());
        }
    }
    std::fs::write(&image, contents).unwrap();
    let mut options = BlkOptions::new(image).with_queues(2).with_serial("serial-number".into());
    change(&mut options);
    options
}

/// `vhost-migrate backend` as a process; killed when dropped.
pub(crate) struct Process {
    pub(crate) child: Child,
}

impl Process {
    pub(crate) fn command(arguments: &[&str]) -> Command {
        Process::command_of("blk", arguments)
    }

    pub(crate) fn command_of(device: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
        command.args(["backend", device]).args(arguments).env_remove("RUST_LOG");
        command
    }

    /// Starts a disk, and waits for the line that says it listens.
    pub(crate) fn start(socket: &Path, image: &Path, more: &[&str]) -> Process {
        let image = image.to_str().unwrap();
        Process::spawn("blk", socket, &[&["--image", image][..], more].concat())
    }

    /// Starts a disk of 1 MiB with a folder of its own. Returns the folder and the socket too.
    pub(crate) fn disk(more: &[&str]) -> (tempfile::TempDir, PathBuf, Process) {
        let folder = tempfile::tempdir().unwrap();
        let image = disk_options(folder.path(), 1 << 20, |_| {}).image;
        let socket = folder.path().join("socket");
        let process = Process::start(&socket, &image, more);
        (folder, socket, process)
    }

    /// Starts a network interface in the same way.
    pub(crate) fn net(socket: &Path, more: &[&str]) -> Process {
        Process::spawn("net", socket, more)
    }

    fn spawn(device: &str, socket: &Path, more: &[&str]) -> Process {
        let socket = socket.to_str().unwrap();
        let mut command = Process::command_of(device, &["--socket", socket, "--log-level", "warn"]);
        let mut child = command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("serves "), "{line}");
        Process { child }
    }

    /// The standard error of the process, after its end.
    pub(crate) fn stderr(&mut self) -> String {
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }

    pub(crate) fn open_fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    pub(crate) fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }

    /// Limits the numbers of new fds of the process to those below `limit`.
    pub(crate) fn limit_fds(&self, limit: u64) {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: 4096 };
        // SAFETY: the first structure exists during the call, and the second pointer is null.
        let done = unsafe { libc::prlimit(self.child.id() as i32, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// The number of file mappings, such as those of guest memory, logs and inflight regions.
    pub(crate) fn mapped_files(&self) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).unwrap();
        maps.lines().filter(|line| line.contains("memfd:")).count()
    }

    /// Private memory of the process, KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
