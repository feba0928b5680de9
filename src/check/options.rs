//! Options and errors of a check.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::rules::Rule;
use super::stop::StopToken;
use crate::inflight::RingKind;

/// Device kinds that can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A block device.
    Blk,
    /// A network interface.
    Net,
    /// An entropy source.
    Rng,
    /// A FUSE file system.
    Fs,
    /// Sockets between guest and host.
    Vsock,
    /// A console.
    Console,
}

impl DeviceKind {
    /// All kinds.
    pub const ALL: &[DeviceKind] =
        &[DeviceKind::Blk, DeviceKind::Net, DeviceKind::Rng, DeviceKind::Fs, DeviceKind::Vsock, DeviceKind::Console];

    /// Returns the name on the command line.
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

/// Source of frames for the device under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameSource {
    /// The device itself: it sends back what it receives.
    Loop,
    /// This interface of the host, on the other side of the device, such as a tap.
    Interface(String),
    /// Another vhost-user back-end at this socket, whose frames arrive at the device. For vsock, the host's socket,
    /// which accepts CONNECT and a port.
    Backend(PathBuf),
    /// A TCP connection to this address, for input of a console.
    Tcp(String),
}

/// Options of a check.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckOptions {
    /// Device kind, if it cannot be detected.
    pub device: Option<DeviceKind>,
    /// Rules to check; all if empty.
    pub only: Vec<Rule>,
    /// Ring format to check; by default split, and packed if offered.
    pub rings: Option<RingKind>,
    /// Number of queue pairs that a network interface serves, if fewer than it reports: DPDK reports 128 always.
    pub pairs: Option<u16>,
    /// Source of frames, connections or input. Without one, a loopback is detected.
    pub frame_source: Option<FrameSource>,
    /// Maximum time of the back-end for each step.
    pub timeout: Duration,
    /// Time to watch for an event that must not happen.
    pub settle: Duration,
    /// Ring size, a power of two from 64 to 1024. By default 256, or the largest that the back-end accepts.
    pub queue_size: Option<u16>,
    /// Also run checks that some back-ends do not survive. Implied by `hostile` and `restart`.
    pub may_kill: bool,
    /// Also send messages that must be refused. A faulty back-end may crash.
    pub hostile: bool,
    /// Also write to the last MiB of the disk. The old contents are restored.
    pub write: bool,
    /// A simple shell command that starts the back-end. It is run whenever the back-end has ended, and at the beginning
    /// unless [`kill_pid`](CheckOptions::kill_pid) names a running one.
    pub restart: Option<String>,
    /// Process id of a running back-end, which is killed with requests in flight. Needs `restart`.
    pub kill_pid: Option<i32>,
    /// Token that ends the check early.
    pub stop: StopToken,
}

impl CheckOptions {
    setters! {
        with_device: device: Option<DeviceKind>,
        with_only: only: Vec<Rule>,
        with_rings: rings: Option<RingKind>,
        with_pairs: pairs: Option<u16>,
        with_frame_source: frame_source: Option<FrameSource>,
        with_timeout: timeout: Duration,
        with_settle: settle: Duration,
        with_queue_size: queue_size: Option<u16>,
        with_may_kill: may_kill: bool,
        with_hostile: hostile: bool,
        with_write: write: bool,
        with_restart: restart: Option<String>,
        with_kill_pid: kill_pid: Option<i32>,
        with_stop: stop: StopToken,
    }
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

/// Reason why nothing could be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The first connection failed.
    #[error("{}: cannot connect (check that the back-end is running and that this is its socket)", path.display())]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The back-end does not read the connection.
    #[error(
        "{}: the back-end has not read GET_FEATURES within {waited:?}. It serves another front-end or \
         is stuck. Most back-ends serve one front-end at a time: stop that one, or check another \
         instance",
        path.display()
    )]
    Busy {
        /// Path of the socket.
        path: PathBuf,
        /// Time waited.
        waited: Duration,
    },
    /// The back-end does not complete the negotiation.
    #[error("{}: the vhost-user negotiation failed: {reason}", path.display())]
    Negotiation {
        /// Path of the socket.
        path: PathBuf,
        /// Cause.
        reason: String,
    },
    /// The device kind cannot be detected.
    #[error("{}: the device kind cannot be detected ({reason}). Name it with --device", path.display())]
    UnknownDevice {
        /// Path of the socket.
        path: PathBuf,
        /// Properties of the device.
        reason: String,
    },
    /// The back-end does not serve a second front-end.
    #[error(
        "{}: the back-end serves no second connection ({reason}). Give a command that restarts it with \
         --restart",
        path.display()
    )]
    NoSecondConnection {
        /// Path of the socket.
        path: PathBuf,
        /// Cause.
        reason: String,
    },
    /// Packed rings were requested and are not offered.
    #[error("packed rings are not offered. Omit --rings, or start the back-end with packed rings")]
    NotPacked,
    /// No frame of the frame source arrives.
    #[error(
        "no data from {frame_source:?}: {reason}. Check that it is the other end of this back-end, and \
         that it is up"
    )]
    FrameSource {
        /// The frame source.
        frame_source: FrameSource,
        /// Cause.
        reason: String,
    },
    /// The ring size is not valid for a split ring, or too small.
    #[error("ring size {0}: use a power of two from 64 to 1024")]
    QueueSize(u16),
    /// The back-end refuses the ring size.
    #[error("the back-end refuses rings of {0} entries: {1}")]
    QueueSizeRefused(u16, String),
    /// Another process listens at the socket of the back-end that is to be started.
    #[error("{}: another process serves this socket. Give --kill-pid if the check may kill it, or another \
         socket", path.display())]
    SocketInUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The back-end does not start.
    #[error("cannot start the back-end")]
    Start(#[source] io::Error),
    /// [`CheckOptions::stop`] was set.
    #[error("the check was stopped{}", .unrestored.iter().map(|change| format!("; {change}")).collect::<String>())]
    Stopped {
        /// Changes that could not be restored, in words; usually none.
        unrestored: Vec<String>,
    },
}
