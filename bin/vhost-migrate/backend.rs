//! `vhost-migrate backend`: a vhost-user back-end or a VDUSE device in a process of its own.

mod net;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::virtio::VIRTIO_BLK_ID_BYTES;
use vhost_migrate::backend::blk::{Aio, BlkDevice, BlkOptions};
use vhost_migrate::backend::{self, BackendListener, InheritedSocket, Sandbox, ViolationAction, VirtioDevice};
use vhost_migrate::control;
use vhost_migrate::unstable::with_causes;
use vhost_migrate::vduse::{BusDriver, VduseOptions, VduseServer};

use crate::log_arguments::LogArguments;
use crate::metrics::MetricsArguments;
use crate::signals::{on_hangup, on_interrupt};
use crate::values;

/// Be a vhost-user or a VDUSE device
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    device: DeviceCommand,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    Blk(Blk),
    Net(net::Arguments),
}

impl DeviceCommand {
    fn stop_timeout(&self) -> u64 {
        match self {
            DeviceCommand::Blk(blk) => blk.stopping.stop_timeout,
            DeviceCommand::Net(net) => net.stopping.stop_timeout,
        }
    }

    fn place(&self) -> &PlaceArguments {
        match self {
            DeviceCommand::Blk(blk) => &blk.place,
            DeviceCommand::Net(net) => &net.place,
        }
    }
}

/// Arguments for the end of the process after a signal.
#[derive(Debug, clap::Args)]
struct StopArguments {
    /// Longest wait for requests under way after SIGTERM or Ctrl-C, seconds; then they are left to a successor. A VDUSE
    /// device waits until they are completed
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86400))]
    stop_timeout: u64,
}

/// A disk: serves a raw image file or a block device
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  truncate -s 1G disk.img
  vhost-migrate backend blk --socket /tmp/disk.sock --image disk.img
  vhost-migrate backend blk --socket /tmp/disk.sock --image /dev/vg0/guest --queues 4 --direct

QEMU attaches it so:
  -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem
  -chardev socket,id=disk,path=/tmp/disk.sock,reconnect-ms=10 -device vhost-user-blk-pci,chardev=disk
or so, where QEMU listens and the back-end connects with --connect /tmp/disk.sock instead of --socket:
  -chardev socket,id=disk,path=/tmp/disk.sock,server=on

It serves one front-end after the other until SIGTERM or Ctrl-C. Killed and started again, it goes on where it
was, as far as the front-end reconnects. The image is locked while a front-end runs queues: a second back-end on it
waits up to 10 seconds for the first, and for what a killed one has left to the disk. What it writes to stderr is chosen by --log-level or RUST_LOG.

The disk can grow while a guest uses it; a smaller image is refused, and the disk stays as it is:
  truncate -s 2G disk.img && kill -HUP PID

Exit status: 0 ended by a signal; 1 failed; 2 wrong arguments.")]
struct Blk {
    #[command(flatten)]
    place: PlaceArguments,
    /// Raw image or block device
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Take the image for a raw one whatever it begins with. Without this, what looks like qcow2, qed, vmdk, vdi, vhdx, vpc,
    /// luks or parallels is refused; a guest can make its disk look like that
    #[arg(long, value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// The guest may only read
    #[arg(long)]
    read_only: bool,
    /// Request queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Maximum queue size, a power of two; at most the front-end's choice, if that is less than 128
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = values::queue_size(2, 32768))]
    queue_size: u16,
    /// Serial number of the disk, at most 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "vhost-migrate", value_parser = serial)]
    serial: String,
    /// Engine for reads and writes of the image
    #[arg(long, value_name = "HOW", default_value = "io_uring")]
    aio: AioEngine,
    /// Bypass the page cache (O_DIRECT); the guest receives the block size that this requires
    #[arg(long)]
    direct: bool,
    /// Offer drivers to complete their requests in order; a slow one then holds up those after it
    #[arg(long)]
    in_order: bool,
    /// Offer front-ends to stop queues without waiting for the disk: what is in flight then moves with the inflight region
    /// and is served by the destination. The protocol's numbers for it may still change
    #[arg(long)]
    inflight_migration: bool,
    /// Offer drivers to be behind an IOMMU; the front-end must translate, as QEMU does with a vIOMMU
    #[arg(long)]
    iommu: bool,
    /// Front-ends that may be connected at the same time, of which only one has queues that run: 2 for a migration on this host
    /// whose source and destination share this back-end
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    front_ends: u16,
    /// Let other processes write the image at the same time, as cluster file systems want it
    #[arg(long)]
    share_rw: bool,
    /// Let other processes with this option read a read-only image at the same time. A read that a killed process has left
    /// to the disk may then overwrite what its driver has put into that memory since (see docs/limits.md)
    #[arg(long, requires = "read_only", conflicts_with = "share_rw")]
    share_readers: bool,
    /// Offer postcopy: a migrated guest runs before its memory has arrived. Front-ends then can't add memory in slots, so
    /// there are at most 8 regions. Needs root, or vm.unprivileged_userfaultfd=1; not together with --iommu
    #[arg(long, conflicts_with = "iommu")]
    postcopy: bool,
    #[command(flatten)]
    stopping: StopArguments,
    #[command(flatten)]
    seccomp: SeccompArguments,
    #[command(flatten)]
    metrics: MetricsArguments,
    #[command(flatten)]
    messages: LogArguments,
}

/// Arguments for the place where the device is served.
#[derive(Debug, clap::Args)]
struct PlaceArguments {
    #[command(flatten)]
    target: TargetArguments,
    /// Attach the VDUSE device to a driver of the vDPA bus; without this, `vdpa dev add name NAME mgmtdev vduse` does
    #[arg(long, value_name = "DRIVER", requires = "vduse")]
    attach: Option<AttachTo>,
    /// Remove a VDUSE device of this name that a process has left behind, if it can't be continued. What its driver has not
    /// written is lost
    #[arg(long, requires = "vduse")]
    replace: bool,
    /// Directory of the log of the VDUSE device. A process that is started after this one was killed continues the device
    /// from it (see docs/vduse-log.md)
    #[arg(long, value_name = "DIR", requires = "vduse", default_value = "/run/vhost-migrate")]
    state_dir: PathBuf,
    /// Offer only split rings over VDUSE, as QEMU's shadow virtqueues need them
    #[arg(long, requires = "vduse")]
    split_rings: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AttachTo {
    /// virtio_vdpa: a device of this host, for example the disk /dev/vda
    Virtio,
    /// vhost_vdpa: a /dev/vhost-vdpa-N for a VMM
    Vhost,
}

/// Arguments for the front-end's socket, or the name of a VDUSE device.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct TargetArguments {
    /// UNIX socket to listen on
    #[arg(long, value_name = "PATH", value_parser = values::socket_path())]
    socket: Option<PathBuf>,
    /// Connect to this UNIX socket instead, where the front-end listens (QEMU's server=on, OVS's dpdkvhostuserclient), and
    /// again whenever the connection has ended
    #[arg(long, value_name = "PATH", value_parser = values::socket_path())]
    connect: Option<PathBuf>,
    /// Inherited socket instead: a listening one, or one connection
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<i32>,
    /// Serve a VDUSE device of this name instead, to the kernel's vDPA bus (see docs/guide/vduse.md)
    #[arg(long, value_name = "NAME")]
    vduse: Option<String>,
}

/// Arguments for the seccomp filter.
#[derive(Debug, clap::Args)]
struct SeccompArguments {
    /// Action on a system call that no back-end needs (see docs/security.md)
    #[arg(long, value_name = "WHAT", default_value = "kill")]
    seccomp: SeccompAction,
    /// As --seccomp off
    #[arg(long, conflicts_with = "seccomp")]
    no_seccomp: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SeccompAction {
    /// The process ends with SIGSYS
    Kill,
    /// A line in the kernel's log
    Log,
    /// Nothing: any call is allowed
    Off,
}

impl SeccompArguments {
    fn sandbox(&self, postcopy: bool, metrics: &MetricsArguments) -> Option<Sandbox> {
        let violation = match self.seccomp {
            _ if self.no_seccomp => return None,
            SeccompAction::Kill => ViolationAction::Kill,
            SeccompAction::Log => ViolationAction::Log,
            SeccompAction::Off => return None,
        };
        Some(Sandbox {
            on_violation: violation,
            allow_userfaultfd: postcopy,
            allow_unlink: metrics.has_socket(),
            ..Sandbox::default()
        })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ImageFormat {
    /// The disk's bytes, and nothing else
    Raw,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AioEngine {
    /// io_uring where the system has it, else threads
    #[value(name = "io_uring")]
    IoUring,
    /// Threads
    Threads,
}

/// Parses the serial number of a disk.
fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        ..=VIRTIO_BLK_ID_BYTES => Ok(text.into()),
        len => Err(format!("it has {len} bytes: at most {VIRTIO_BLK_ID_BYTES} fit")),
    }
}

/// Runs the subcommand.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    // The signals are blocked first, so that threads started later don't receive them.
    let limit = Duration::from_secs(arguments.device.stop_timeout());
    let leaves_requests = arguments.device.place().target.vduse.is_none();
    let ended = stop_on_interrupt(limit, leaves_requests).and_then(|stop| match arguments.device {
        DeviceCommand::Blk(blk) => blk.run(&stop),
        DeviceCommand::Net(net) => net.run(&stop),
    });
    control::remove_sockets();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-migrate: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Returns an eventfd that is signalled at SIGINT or SIGTERM. After the signal, requests under way are completed for at
/// most `limit`, and then the process exits. A successor resubmits those that are left in the inflight region. Without
/// `leaves_requests` the process does not exit: the kernel would wait for the requests of a VDUSE device for ever.
fn stop_on_interrupt(limit: Duration, leaves_requests: bool) -> Result<Arc<EventFd>, Box<dyn std::error::Error>> {
    let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
    let signalled = stop.clone();
    on_interrupt(move || {
        let _ = signalled.write(1);
        std::thread::sleep(limit);
        // The message is logged on a separate thread, because the write blocks if the reader of stderr has stopped
        // reading.
        let seconds = limit.as_secs();
        std::thread::spawn(move || match leaves_requests {
            true => tracing::error!("requests are under way {seconds} s after the signal: they are left"),
            false => tracing::error!(
                "the device is in use {seconds} s after the signal: it is removed when its requests are completed and no \
                 VMM has it open"
            ),
        });
        if !leaves_requests {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
        control::remove_sockets();
        std::process::exit(1);
    })?;
    Ok(stop)
}

impl Blk {
    fn run(self, stop: &EventFd) -> Result<(), Box<dyn std::error::Error>> {
        self.messages.start();
        let disk = BlkDevice::open(
            BlkOptions::new(self.image.clone())
                .with_raw(matches!(self.format, Some(ImageFormat::Raw)))
                .with_read_only(self.read_only)
                .with_queues(self.queues)
                .with_max_queue_size(self.queue_size)
                .with_serial(self.serial)
                .with_aio(match self.aio {
                    AioEngine::IoUring => Aio::IoUring,
                    AioEngine::Threads => Aio::Threads,
                })
                .with_direct(self.direct)
                .with_in_order(self.in_order)
                .with_inflight_migration(self.inflight_migration)
                .with_iommu(self.iommu)
                .with_max_front_ends(self.front_ends)
                .with_share_rw(self.share_rw)
                .with_share_readers(self.share_readers)
                .with_postcopy(self.postcopy),
        )?;
        let disk = Arc::new(disk);
        let growing = disk.clone();
        on_hangup(move || {
            if let Err(error) = growing.grow() {
                tracing::error!("{}", with_causes(&error));
            }
        })?;
        self.metrics.start()?;
        let (bytes, image) = (disk.capacity() * 512, self.image.display());
        let what = format!("{image} ({bytes} bytes)");
        serve(&self.place, disk, &what, self.seccomp.sandbox(self.postcopy, &self.metrics), stop)
    }
}

/// Serves `device` at `place` until `stop` is signalled. Prints `what`, the description of the device, to stdout. The
/// process opens nothing else from then on.
fn serve(
    place: &PlaceArguments,
    device: Arc<dyn VirtioDevice>,
    what: &str,
    sandbox: Option<Sandbox>,
    stop: &EventFd,
) -> Result<(), Box<dyn std::error::Error>> {
    // When this closure is called, everything that must be opened is open.
    let TargetArguments { socket, connect, fd, vduse } = &place.target;
    let confine = || {
        sandbox.map_or(Ok(()), |sandbox| {
            Sandbox {
                allow_unlink: sandbox.allow_unlink || socket.is_some() || vduse.is_some(),
                allow_connect: connect.is_some(),
                allow_vduse: vduse.is_some(),
                ..sandbox
            }
            .install()
        })
    };
    if let Some(name) = vduse {
        let options = VduseOptions::new(name)
            .with_attach(place.attach.map(|driver| match driver {
                AttachTo::Virtio => BusDriver::Virtio,
                AttachTo::Vhost => BusDriver::Vhost,
            }))
            .with_replace(place.replace)
            .with_state_dir(Some(place.state_dir.clone()))
            .with_split_rings(place.split_rings);
        let server = VduseServer::start(&options, device)?;
        let offered = server.offered_as();
        confine()?;
        let offered = if offered.is_empty() { String::new() } else { format!(" ({})", offered.join(", ")) };
        println!("serves {what} as VDUSE device {name}{offered}");
        return Ok(server.serve(stop.as_fd())?);
    }
    if let Some(path) = connect {
        confine()?;
        println!("serves {what} at {}", path.display());
        return Ok(backend::connect_and_serve(path, &device, stop.as_fd())?);
    }
    let listener = match (socket, *fd) {
        (Some(path), _) => BackendListener::bind(path)?,
        (None, Some(number)) => match backend::inherit_socket(number) {
            Ok(InheritedSocket::Listener(listener)) => listener,
            Ok(InheritedSocket::Connection(connection)) => {
                confine()?;
                println!("serves {what} on fd {number}");
                backend::serve_connection(&connection, &device, stop.as_fd());
                return Ok(());
            }
            Err(error) => {
                return Err(format!("--fd {number} is no socket that was passed on: {}", with_causes(&error)).into());
            }
        },
        (None, None) => return Err("give --socket, --connect, --fd or --vduse".into()),
    };
    confine()?;
    match socket {
        Some(path) => println!("serves {what} on {}", path.display()),
        None => println!("serves {what}"),
    }
    backend::serve(&listener, &device, stop.as_fd())?;
    Ok(())
}
