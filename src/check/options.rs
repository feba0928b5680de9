//! How to check, and why nothing could be checked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{FrameSource, StopToken, rules};
use crate::inflight::RingKind;

/// Kinds of devices that can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A disk.
    Blk,
    /// A network interface.
    Net,
    /// A source of random numbers.
    Rng,
    /// A file system, which FUSE is spoken with.
    Fs,
    /// Sockets between guest and host.
    Vsock,
    /// A console.
    Console,
}

impl DeviceKind {
    /// All of them.
    pub const ALL: &[DeviceKind] =
        &[DeviceKind::Blk, DeviceKind::Net, DeviceKind::Rng, DeviceKind::Fs, DeviceKind::Vsock, DeviceKind::Console];

    /// The name, as the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Blk => "blk",
            DeviceKind::Net => "net",
            DeviceKind::Rng => "rng",
            DeviceKind::Fs => "fs",
            DeviceKind::Vsock => "vsock",
            DeviceKind::Console => "console",
        }
    }
}

/// How to check.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// The kind of the device, where its answers do not tell.
    pub device: Option<DeviceKind>,
    /// Only these rules, by their ids ([`rule`](super::rule)); all of them if empty.
    pub only: Vec<&'static str>,
    /// Only on these rings; otherwise on split ones, and on packed ones if those are offered.
    pub rings: Option<RingKind>,
    /// Queue pairs that a network interface serves, if fewer than it says: DPDK says 128 whatever it was started with.
    pub pairs: Option<u16>,
    /// What brings something in: frames, connections or text. Without it, what is sent is watched for.
    pub frame_source: Option<FrameSource>,
    /// How long the back-end may take for any step.
    pub timeout: Duration,
    /// How long to watch whether something happens that must not.
    pub settle: Duration,
    /// Entries of the ring, a power of two from 64 to 1024. If not given, 256 or as many as the back-end takes.
    pub queue_size: Option<u16>,
    /// Also make the checks that some back-ends do not survive. Implied by `hostile` and `restart`.
    pub may_kill: bool,
    /// Also send what must be refused. A back-end that is not up to it dies of it.
    pub hostile: bool,
    /// Also write to the last MiB of the disk, and put back what was there.
    pub write: bool,
    /// A simple shell command that starts the back-end. It is run whenever the back-end has ended, killed by a check, with
    /// its front-end or otherwise; and first of all, unless [`kill_pid`](CheckOptions::kill_pid) says that one runs already.
    pub restart: Option<String>,
    /// The back-end's process, to be killed with requests in flight. Needs `restart`.
    pub kill_pid: Option<i32>,
    /// Ends the check before its time.
    pub stop: StopToken,
}

impl Default for CheckOptions {
    fn default() -> CheckOptions {
        CheckOptions {
            device: None,
            only: Vec::new(),
            rings: None,
            pairs: None,
            frame_source: None,
            timeout: Duration::from_secs(10),
            settle: Duration::from_millis(300),
            queue_size: None,
            may_kill: false,
            hostile: false,
            write: false,
            restart: None,
            kill_pid: None,
            stop: StopToken::default(),
        }
    }
}

/// Why nothing could be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// No connection, from the first.
    #[error("can't connect to {}: {source}: is the back-end running, and is this its socket?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A connection that is not read.
    #[error(
        "{}: the back-end has not read GET_FEATURES within {waited:?}: it serves another front-end, or hangs. Most serve one \
         front-end at a time: stop that one, or check another instance",
        path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long it had.
        waited: Duration,
    },
    /// A connection, and nothing behind it that a check could be made with.
    #[error("{} does not speak vhost-user, or not with us: {why}", path.display())]
    Greeting {
        /// The socket.
        path: PathBuf,
        /// What happened.
        why: String,
    },
    /// A device that can be several kinds, or none that is known.
    #[error("{}: can't tell what device it is ({why}): give --device", path.display())]
    UnknownDevice {
        /// The socket.
        path: PathBuf,
        /// What it says of itself.
        why: String,
    },
    /// A back-end that serves no second front-end.
    #[error(
        "{}: after its first connection the back-end serves no other ({why}): give --restart COMMAND, with which it is started \
         again each time it ends",
        path.display()
    )]
    Once {
        /// The socket.
        path: PathBuf,
        /// What happened.
        why: String,
    },
    /// A rule that is to be checked and does not exist.
    #[error("there is no rule {0:?}: there are {known}", known = rules::ids())]
    NoSuchRule(String),
    /// Rings that are to be checked and are not offered.
    #[error("packed rings are not offered: leave --rings out, or start the back-end with them")]
    NotPacked,
    /// Frames that don't come.
    #[error("nothing comes in from {frame_source:?}: {why}: is it the other end of this back-end, and is that up?")]
    FrameSource {
        /// Where they were to come from.
        frame_source: FrameSource,
        /// What happened.
        why: String,
    },
    /// A ring size that no split ring can have, or that is too small to check with.
    #[error("a ring of {0} entries: use a power of two from 64 to 1024")]
    QueueSize(u16),
    /// A ring size that the back-end refuses.
    #[error("the back-end takes no ring of {0} entries: {1}")]
    QueueSizeRefused(u16, String),
    /// Something listens where the back-end was to be started.
    #[error("{} is served already: give --kill-pid if that may be killed, or another socket", path.display())]
    Served {
        /// The socket.
        path: PathBuf,
    },
    /// The back-end can't be started.
    #[error("can't start the back-end: {0}")]
    Start(io::Error),
    /// [`CheckOptions::stop`] was set.
    #[error("the check was stopped{}", .left.iter().map(|left| format!("; {left}")).collect::<String>())]
    Stopped {
        /// Changes of the check that could not be put back, in words; usually none.
        left: Vec<String>,
    },
}
