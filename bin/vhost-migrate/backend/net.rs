//! `vhost-migrate backend net`: a network interface.

use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use vhost_migrate::backend::Sandbox;
use vhost_migrate::backend::net::{MAX_PAIRS, MIN_MTU, Mac, NetDevice, NetOptions, NetPeer};

use super::{PlaceArguments, SeccompArguments, StopArguments, serve};
use crate::log_arguments::LogArguments;
use crate::metrics::MetricsArguments;
use crate::signals::ignore_hangup;
use crate::values;

/// A network interface: on a tap of the host, on another such process, or on itself
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate backend net --socket /tmp/net.sock --loopback
  ip tuntap add tap0 mode tap multi_queue user \"$USER\" && ip link set tap0 up
  vhost-migrate backend net --socket /tmp/net.sock --tap tap0 --queue-pairs 4 --mac 52:54:00:12:34:56

Two guests on one wire: a process for each, started in any order. Whichever comes first listens at the socket of
--pair (and keeps a lock in a file beside it, PATH.lock), the other connects. Both need the same --queue-pairs. When
one ends, the other waits for its successor:
  vhost-migrate backend net --socket /tmp/a.sock --pair /tmp/wire
  vhost-migrate backend net --socket /tmp/b.sock --pair /tmp/wire --mac 52:54:00:00:00:02

QEMU attaches it so:
  -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem
  -chardev socket,id=net,path=/tmp/net.sock -netdev vhost-user,id=n,chardev=net,queues=4
  -device virtio-net-pci,netdev=n,mq=on,mac=52:54:00:12:34:56
It keeps MAC address, MTU and link state to itself; --mac and --mtu are for front-ends that ask the back-end.

After a migration the back-end broadcasts a RARP when the front-end asks for it. Nothing is offloaded. Packets that the
other end has no room for are dropped and counted. It serves one front-end after the other until SIGTERM or Ctrl-C.
What it writes to stderr is chosen by --log-level or RUST_LOG.

Exit status: 0 ended by a signal; 1 failed; 2 wrong arguments.")]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) place: PlaceArguments,
    #[command(flatten)]
    peer: PeerArguments,
    /// Pairs of a receive and a transmit queue
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_PAIRS)))]
    queue_pairs: u16,
    /// Maximum queue size, a power of two
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = values::queue_size(2, 32768))]
    queue_size: u16,
    /// The guest's address
    #[arg(long, value_name = "ADDRESS", default_value = "52:54:00:00:00:01", value_parser = mac)]
    mac: Mac,
    /// Offer drivers to be behind an IOMMU; the front-end must translate, as QEMU does with a vIOMMU
    #[arg(long)]
    iommu: bool,
    /// Refused with words: it is known from disks
    #[arg(long = "front-ends", hide = true, value_name = "N", default_value = "1", value_parser = one_front_end)]
    _front_ends: OneFrontEnd,
    /// MTU to report to the guest, bytes; by default none is reported
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(i64::from(MIN_MTU)..))]
    mtu: Option<u16>,
    /// Offer postcopy: a migrated guest runs before its memory has arrived. Front-ends then can't add memory in slots, so
    /// there are at most 8 regions. Needs root, or vm.unprivileged_userfaultfd=1; not together with --iommu
    #[arg(long, conflicts_with = "iommu")]
    postcopy: bool,
    #[command(flatten)]
    pub(super) stopping: StopArguments,
    #[command(flatten)]
    seccomp: SeccompArguments,
    #[command(flatten)]
    metrics: MetricsArguments,
    #[command(flatten)]
    messages: LogArguments,
}

/// The only valid number of front-ends.
#[derive(Clone, Debug)]
struct OneFrontEnd;

fn one_front_end(text: &str) -> Result<OneFrontEnd, &'static str> {
    let advice = "an interface keeps what its driver has set, which two front-ends would mix: start a back-end for each; \
                  only a disk can be shared";
    if text == "1" { Ok(OneFrontEnd) } else { Err(advice) }
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct PeerArguments {
    /// Tap of the host; made if it doesn't exist, for which root or CAP_NET_ADMIN is needed
    #[arg(long, value_name = "NAME", value_parser = tap)]
    tap: Option<String>,
    /// Return the guest's packets to the guest
    #[arg(long)]
    loopback: bool,
    /// Socket where another such process is met
    #[arg(long, value_name = "PATH", value_parser = values::socket_path())]
    pair: Option<PathBuf>,
}

impl Arguments {
    pub(super) fn run(self, stop: &EventFd) -> Result<(), Box<dyn std::error::Error>> {
        ignore_hangup()?;
        self.messages.start();
        self.metrics.start()?;
        let sandbox = self.seccomp.sandbox(self.postcopy, &self.metrics);
        let sandbox = sandbox.map(|sandbox| Sandbox { allow_pair: self.peer.pair.is_some(), ..sandbox });
        let (peer, what) = match (self.peer.tap, self.peer.pair) {
            (Some(name), _) => (NetPeer::Tap(name.clone()), format!("tap {name}")),
            (None, Some(path)) => (NetPeer::Pair(path.clone()), format!("a pair at {}", path.display())),
            (None, None) => (NetPeer::Loopback, "a loopback".into()),
        };
        let net = NetDevice::open(
            NetOptions::new(peer, self.mac)
                .with_pairs(self.queue_pairs)
                .with_max_queue_size(self.queue_size)
                .with_iommu(self.iommu)
                .with_mtu(self.mtu)
                .with_postcopy(self.postcopy),
        )?;
        let what = format!("{what} ({} queue pairs)", self.queue_pairs);
        serve(&self.place, Arc::new(net), &what, sandbox, stop)
    }
}

/// Parses a MAC address: six bytes in hexadecimal, separated by colons.
fn mac(text: &str) -> Result<Mac, String> {
    let byte =
        |digits: &str| digits.chars().all(|digit| digit.is_ascii_hexdigit()).then(|| u8::from_str_radix(digits, 16));
    let bytes: Option<Vec<u8>> = text.split(':').map(|digits| byte(digits)?.ok()).collect();
    let mac = bytes.and_then(|bytes| Mac::try_from(bytes).ok()).ok_or("write it as 52:54:00:12:34:56")?;
    match mac {
        [0, 0, 0, 0, 0, 0] => Err("an interface has no address of zeroes".into()),
        [first, ..] if first & 1 != 0 => Err("it is a group's: use one whose first byte is even".into()),
        mac => Ok(mac),
    }
}

/// Parses the name of a tap.
fn tap(text: &str) -> Result<String, String> {
    match (1..libc::IFNAMSIZ).contains(&text.len()) && !text.contains(['/', '%']) {
        true => Ok(text.into()),
        false => Err(format!("an interface's name has 1 to {} bytes, and no '/' or '%'", libc::IFNAMSIZ - 1)),
    }
}
