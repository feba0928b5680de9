//! vhost-user-blk back-ends as processes: this project's, `qemu-storage-daemon`, which shows that the tests detect
//! faults, and one made of rust-vmm's crates.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::process::{Lab, Process, wait_for};

/// The program that serves the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// `vhost-migrate backend blk`, with the disk in the page cache.
    Ours,
    /// [`Kind::Ours`] with `--direct`. Its requests take as long as the disk needs, so some are always in flight under
    /// load.
    OursDirect,
    /// [`Kind::Ours`] with `--postcopy`. It logs every message that it receives.
    OursPostcopy,
    /// [`Kind::Ours`] with `--iommu`. It logs its requests to the IOMMU.
    OursIommu,
    /// `qemu-storage-daemon`. With a limit in bytes per second, its requests stay in flight for a long time.
    StorageDaemon { bytes_per_second: Option<u64> },
    /// `examples/rust_vmm_disk.rs`, which has two queues.
    RustVmm,
    /// [`Kind::RustVmm`] with this project's bitmap on its memory.
    RustVmmLogged,
}

/// A back-end process that can be restarted on the same socket.
pub(crate) struct Backend {
    kind: Kind,
    socket: PathBuf,
    image: PathBuf,
    output: PathBuf,
    queues: u16,
    process: Process,
}

impl Backend {
    /// Starts a back-end and waits until it listens.
    pub(crate) fn start(lab: &Lab, kind: Kind, name: &str, image: &Path, queues: u16) -> Backend {
        let (socket, output) = (lab.file(&format!("{name}.sock")), lab.file(&format!("{name}.log")));
        let process = spawn(kind, &socket, image, &output, queues);
        let backend = Backend { kind, socket, image: image.into(), output, queues, process };
        backend.listening()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// Kills the process with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the back-end again after [`Backend::kill`]. The socket file of the killed process still exists, as after
    /// a crash.
    pub(crate) fn restart(&mut self) {
        self.process = spawn(self.kind, &self.socket, &self.image, &self.output, self.queues);
        wait_for("the back-end listens again", || {
            self.process.assert_running();
            listens(&self.socket).then_some(())
        });
    }

    /// Makes the back-end read the size of its image again, with SIGHUP.
    pub(crate) fn look_again(&self) {
        self.process.signal(Signal::SIGHUP);
    }

    /// Panics if the process has ended.
    pub(crate) fn assert_running(&mut self) {
        self.process.assert_running();
    }

    /// Sends SIGTERM and waits until the process has ended. No request in flight is written after that.
    pub(crate) fn terminate(&mut self) {
        self.process.terminate();
    }

    /// The output of the process so far.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }

    fn listening(mut self) -> Backend {
        wait_for("the back-end listens", || {
            self.process.assert_running();
            listens(&self.socket).then_some(())
        });
        self
    }
}

fn spawn(kind: Kind, socket: &Path, image: &Path, output: &Path, queues: u16) -> Process {
    let (socket, image) = (socket.display(), image.display());
    match kind {
        Kind::Ours | Kind::OursDirect | Kind::OursPostcopy | Kind::OursIommu => {
            let program = env!("CARGO_BIN_EXE_vhost-migrate");
            let more = match kind {
                Kind::OursDirect => "--direct",
                Kind::OursPostcopy => "--postcopy --log-level debug",
                Kind::OursIommu => "--iommu --log-level debug",
                _ => "",
            };
            let args = format!("backend blk --socket {socket} --image {image} --queues {queues} {more}");
            Process::start("vhost-migrate", program, &words(&args), output)
        }
        Kind::StorageDaemon { bytes_per_second } => {
            let mut args = format!("--blockdev driver=file,node-name=file,filename={image},locking=off ");
            args += &match bytes_per_second {
                Some(limit) => format!(
                    "--object throttle-group,id=slow,x-bps-total={limit} \
                     --blockdev driver=throttle,node-name=disk,file=file,throttle-group=slow "
                ),
                None => "--blockdev driver=raw,node-name=disk,file=file ".into(),
            };
            args += &format!(
                "--export type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},\
                 writable=on,num-queues={queues}"
            );
            Process::start("qemu-storage-daemon", "qemu-storage-daemon", &words(&args), output)
        }
        Kind::RustVmm | Kind::RustVmmLogged => {
            let program = example("rust_vmm_disk");
            let how = if let Kind::RustVmmLogged = kind { "logged" } else { "" };
            Process::start("rust_vmm_disk", &program, &words(&format!("{socket} {image} {how}")), output)
        }
    }
}

/// The character that stands for a blank within an argument of [`words`].
pub(crate) const NO_BREAK: &str = "\u{a0}";

/// The path of an example's program, which `cargo test` builds beside the tests.
pub(crate) fn example(name: &str) -> String {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "build it first: cargo build --example {name}");
    path.into_os_string().into_string().unwrap()
}

/// Splits arguments at blanks. Paths of a [`Lab`] contain no blanks.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split_ascii_whitespace().map(|word| word.replace(NO_BREAK, " ")).collect()
}

/// Returns true if a process listens on the socket. It does not connect, because a connection would be served.
pub(crate) fn listens(socket: &Path) -> bool {
    const ACCEPTS: u32 = 1 << 16; // __SO_ACCEPTCON
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let flags = fields.get(3).and_then(|f| u32::from_str_radix(f, 16).ok()).unwrap_or(0);
        flags & ACCEPTS != 0 && fields.get(7).is_some_and(|path| Path::new(path) == socket)
    })
}
