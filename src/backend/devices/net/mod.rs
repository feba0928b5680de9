//! Network device: a tap, a loopback, or another process at the other end, as a virtio-net device.
//!
//! | file | purpose |
//! |---|---|
//! | `state` | the ports to the other end, and the state shared by the queues |
//! | `receive`, `transmit`, `control` | the queues |
//! | `filter` | receive filter of the driver |
//! | `saved_state` | driver settings as part of the device state |
//! | `tap`, `pair` | other ends: the host's network, another process |
//!
//! This file defines the features, the configuration space and announcements. The device offers no offloads: the driver
//! computes checksums and segments packets. QEMU implements the control queue and the configuration space itself, and
//! uses only the data queues of this device.
//!
//! ```
//! use vhost_migrate::backend::VirtioDevice;
//! use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer};
//!
//! let mut options = NetOptions::new(NetPeer::Loopback, [0x52, 0x54, 0, 0, 0, 1]);
//! options.pairs = 2;
//! let net = NetDevice::open(options)?;
//! assert_eq!(net.queues(), 5, "two pairs and the control queue");
//! # Ok::<(), vhost_migrate::backend::net::NetError>(())
//! ```

mod control;
mod filter;
mod pair;
mod receive;
mod saved_state;
mod state;
mod tap;
mod transmit;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use zerocopy::{FromZeros, IntoBytes};

use self::control::ControlQueue;
pub use self::filter::Mac;
use self::filter::ReceiveFilter;
use self::pair::PairConnector;
use self::receive::ReceiveQueue;
pub use self::state::PacketCounts;
use self::state::{HEADER, PeerPort, SharedNetState};
use self::transmit::TransmitQueue;
use crate::abi::vhost_user::{CONFIG_TYPE_MIGRATION, FrontendRequest as Code, ProtocolFeatures};
use crate::abi::virtio::{
    NetConfig, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, VIRTIO_ID_NET, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP, VirtioFeatures,
};
use crate::backend::{BackendError, FrontendHandle, Queue, RING_FEATURES, Request, SyncQueue, VirtioDevice};
use crate::sys::log_limit::limited;

/// Maximum number of queue pairs: a vhost-user message addresses 256 rings.
pub const MAX_PAIRS: u16 = 127;
/// Minimum MTU (virtio 1.2, 5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// Header size of a legacy driver without mergeable buffers.
const LEGACY_HEADER: usize = HEADER - 2;
/// Size of the configuration space, up to the MTU. Later fields belong to features that are not offered.
const CONFIG_BYTES: usize = 12;

/// The other end of the network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetPeer {
    /// The guest itself: each pair receives what it sends.
    Loopback,
    /// A tap of the host, by name.
    Tap(String),
    /// Another process of this program with the same socket path and number of pairs.
    Pair(PathBuf),
}

/// Options of a network device.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NetOptions {
    /// The other end.
    pub peer: NetPeer,
    /// Number of queue pairs.
    pub pairs: u16,
    /// Maximum number of entries of a ring, a power of two.
    pub max_queue_size: u16,
    /// The MAC address of the driver.
    pub mac: Mac,
    /// True to offer ACCESS_PLATFORM. Only for front-ends that translate addresses: others may pass the offer on to the
    /// driver without supporting it (rule T5.1).
    pub iommu: bool,
    /// Maximum size of an IP packet in bytes, if it is reported to the driver.
    pub mtu: Option<u16>,
    /// True to offer postcopy, and therefore no memory slots (rule P1.1). `iommu` takes precedence.
    pub postcopy: bool,
}

impl NetOptions {
    /// Returns the options of a device with one pair of queues of up to 1024 entries and all other features off.
    pub fn new(peer: NetPeer, mac: Mac) -> NetOptions {
        NetOptions { peer, pairs: 1, max_queue_size: 1024, mac, iommu: false, mtu: None, postcopy: false }
    }

    setters! {
        with_pairs: pairs: u16,
        with_max_queue_size: max_queue_size: u16,
        with_iommu: iommu: bool,
        with_mtu: mtu: Option<u16>,
        with_postcopy: postcopy: bool,
    }
}

/// The error of a network device that cannot be opened. The messages contain advice for the user.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// An invalid number of pairs or of entries.
    #[error("{pairs} queue pairs of {size} entries: use 1 to 127 pairs, and a power of two from 2 to 32768 entries")]
    QueueLayout {
        /// Pairs.
        pairs: u16,
        /// Entries.
        size: u16,
    },
    /// A multicast or zero MAC address.
    #[error("{mac:02x?} can't be an interface's address: use one whose first byte is even, and not all zeroes")]
    Mac {
        /// The address.
        mac: Mac,
    },
    /// An invalid MTU.
    #[error("an MTU of {mtu} bytes: use 68 or more")]
    Mtu {
        /// The MTU.
        mtu: u16,
    },
    /// An invalid interface name.
    #[error("{name:?} can't be a tap's name: it has 1 to 15 bytes, and no '/' or '%'")]
    TapName {
        /// The name.
        name: String,
    },
    /// The tap cannot be opened.
    #[error("can't open tap {name} ({advice})")]
    Tap {
        /// Its name.
        name: String,
        /// The error of the system.
        source: io::Error,
        /// Advice for the user.
        advice: &'static str,
    },
    /// The socket of a pair cannot be used.
    #[error("can't use {path} for a pair (give a path of at most 107 bytes in a directory that you may write to)",
        path = path.display())]
    Pair {
        /// The socket.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A system call failed.
    #[error("can't {what}")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
}

/// An open network device. Implements [`VirtioDevice`].
#[derive(Debug)]
pub struct NetDevice {
    shared: Arc<SharedNetState>,
    options: NetOptions,
    /// The front-end to notify when the device asks the driver to announce itself.
    frontend: Mutex<Arc<FrontendHandle>>,
    /// The thread that connects to the other end of a pair.
    _connector: Option<PairConnector>,
}

impl NetDevice {
    /// Opens the other end.
    ///
    /// # Errors
    /// [`NetError`], with a message for the user.
    pub fn open(options: NetOptions) -> Result<NetDevice, NetError> {
        let NetOptions { pairs, max_queue_size: size, mac, mtu, .. } = options;
        if !(1..=MAX_PAIRS).contains(&pairs) || !(2..=32768).contains(&size) || !size.is_power_of_two() {
            return Err(NetError::QueueLayout { pairs, size });
        }
        if mac[0] & 1 != 0 || mac == Mac::default() {
            return Err(NetError::Mac { mac });
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu { mtu });
        }
        let there = |ports: Vec<PeerPort>| ports.into_iter().map(|port| Some(Arc::new(port))).collect();
        let ports = match &options.peer {
            NetPeer::Loopback => there((0..pairs).map(|_| loopback_port()).collect::<Result<_, _>>()?),
            NetPeer::Tap(name) => there(tap::open(name, pairs)?),
            NetPeer::Pair(_) => (0..pairs).map(|_| None).collect(),
        };
        let shared = Arc::new(SharedNetState::new(ports, ReceiveFilter::new(mac)));
        let connector = match &options.peer {
            NetPeer::Pair(path) => Some(PairConnector::start(path, pairs, shared.clone())?),
            _ => None,
        };
        Ok(NetDevice { shared, options, frontend: Mutex::default(), _connector: connector })
    }

    /// Returns the packet counters.
    pub fn packet_counts(&self) -> PacketCounts {
        self.shared.counters.read()
    }

    /// Returns the role of the queue at `index`, which depends on the negotiated features (virtio 1.2, 5.1.2).
    fn queue_role(&self, index: u16, features: VirtioFeatures) -> Option<QueueRole> {
        let pairs = if features.contains(VIRTIO_NET_F_MQ) { self.options.pairs } else { 1 };
        if features.contains(VIRTIO_NET_F_CTRL_VQ) && index == 2 * pairs {
            return Some(QueueRole::Control);
        }
        let pair = index / 2;
        match (pair < self.options.pairs, index.is_multiple_of(2)) {
            (true, true) => Some(QueueRole::Receive(pair)),
            (true, false) => Some(QueueRole::Transmit(pair)),
            (false, _) => None,
        }
    }

    /// Announces the address of the driver: broadcasts a RARP packet for `mac`, and asks the driver to announce itself.
    fn announce(&self, mac: Mac) {
        self.shared.update(|state| state.must_announce = true);
        self.config_changed();
        if self.options.peer == NetPeer::Loopback {
            return;
        }
        let state = self.shared.state();
        if !state.port(0).is_some_and(|port| port.send(&rarp_packet(mac))) {
            limited!(warn, "can't announce {mac:02x?}: the other end is not connected or has no room");
        }
    }

    fn config_changed(&self) {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner).config_changed();
    }

    fn check_mtu(&self, mtu: u64) -> Result<(), BackendError> {
        let most = self.options.mtu.unwrap_or(u16::MAX);
        match u16::try_from(mtu).is_ok_and(|mtu| (MIN_MTU..=most).contains(&mtu)) {
            true => Ok(()),
            false => Err(BackendError::Mtu { mtu, most }),
        }
    }
}

enum QueueRole {
    Receive(u16),
    Transmit(u16),
    Control,
}

impl VirtioDevice for NetDevice {
    fn features(&self) -> VirtioFeatures {
        let or = |yes: bool, feature| if yes { feature } else { VirtioFeatures::empty() };
        RING_FEATURES
            | VIRTIO_NET_F_MAC
            | VIRTIO_NET_F_MRG_RXBUF
            | VIRTIO_NET_F_STATUS
            | VIRTIO_NET_F_CTRL_VQ
            | VIRTIO_NET_F_CTRL_RX
            | VIRTIO_NET_F_CTRL_RX_EXTRA
            | VIRTIO_NET_F_CTRL_MAC_ADDR
            | VIRTIO_NET_F_GUEST_ANNOUNCE
            | or(self.options.iommu, VIRTIO_F_ACCESS_PLATFORM)
            | or(self.options.pairs > 1, VIRTIO_NET_F_MQ)
            | or(self.options.mtu.is_some(), VIRTIO_NET_F_MTU)
    }

    fn device_id(&self) -> Option<u32> {
        Some(VIRTIO_ID_NET)
    }

    /// Returns the number of queues: receive and transmit queues, then the control queue.
    fn queues(&self) -> u16 {
        2 * self.options.pairs + 1
    }

    /// Returns the number of pairs. QEMU and DPDK compare it with the number of pairs that they need.
    fn queue_num(&self) -> u64 {
        self.options.pairs.into()
    }

    fn max_queue_size(&self) -> u16 {
        self.options.max_queue_size
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        let mut features = ProtocolFeatures::RARP | ProtocolFeatures::MTU;
        features.set(ProtocolFeatures::PAGEFAULT, self.options.postcopy);
        features
    }

    fn config(&self) -> Vec<u8> {
        let state = self.shared.state();
        let announce = if state.must_announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut config = NetConfig::new_zeroed();
        config.mac = state.filter.mac;
        config.status = (VIRTIO_NET_S_LINK_UP | announce).into();
        config.max_virtqueue_pairs = self.options.pairs.into();
        config.mtu = self.options.mtu.unwrap_or_default().into();
        config.as_bytes().get(..CONFIG_BYTES).unwrap_or_default().to_vec()
    }

    /// Accepts the MAC address that the front-end writes after a migration. The driver sets it over the control queue.
    fn set_config(&self, offset: u32, bytes: &[u8], flags: u32) -> Result<(), BackendError> {
        let refused = |why| Err(BackendError::Config { code: Code::SET_CONFIG, offset, len: bytes.len() as u32, why });
        if flags != CONFIG_TYPE_MIGRATION {
            return refused("the driver sets the address over the control queue, and nothing else is writable");
        }
        let Some(mac) = bytes.first_chunk::<6>().filter(|_| offset == 0) else {
            return refused("a migration must write it from offset 0, with the address");
        };
        self.shared.update(|state| {
            (state.filter.mac, state.must_announce, state.from_previous_connection) = (*mac, true, false)
        });
        self.config_changed();
        Ok(())
    }

    fn connected(&self, frontend: Arc<FrontendHandle>) {
        self.shared.update(|state| (state.from_previous_connection, state.control_queue_ran) = (true, false));
        *self.frontend.lock().unwrap_or_else(PoisonError::into_inner) = frontend;
    }

    fn handle_message(&self, code: Code, number: u64) -> Result<(), BackendError> {
        match code {
            Code::SEND_RARP => {
                let [a, b, c, d, e, f, _, _] = number.to_le_bytes();
                self.announce([a, b, c, d, e, f]);
                Ok(())
            }
            Code::NET_SET_MTU => self.check_mtu(number),
            _ => Err(BackendError::Unsupported { code }),
        }
    }

    fn state_kind(&self) -> Option<&'static str> {
        Some("virtio-net")
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        saved_state::save(&self.shared.state(), self.options.mtu)
    }

    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        let (filter, pairs) = saved_state::load(state, self.options.pairs, self.options.mtu)?;
        // The device was migrated: the driver must announce itself.
        self.shared.update(|state| {
            (state.filter, state.driver_pairs, state.must_announce, state.from_previous_connection) =
                (filter, Some(pairs), true, false);
        });
        self.config_changed();
        Ok(())
    }

    fn reset(&self) {
        self.shared.update(|state| {
            state.reset_driver_settings(self.options.mac);
            (state.control_queue_ran, state.must_announce) = (false, false);
        });
    }

    /// Discards the settings of a previous driver, unless the driver resumes and has a control queue to change them.
    fn ring_activated(&self, resumed: bool, features: VirtioFeatures) {
        if !self.shared.state().from_previous_connection {
            return;
        }
        let keeps = resumed && features.contains(VIRTIO_NET_F_CTRL_VQ);
        self.shared.update(|state| {
            if std::mem::take(&mut state.from_previous_connection) && !keeps {
                state.reset_driver_settings(self.options.mac);
            }
        });
    }

    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let mergeable = features.contains(VIRTIO_NET_F_MRG_RXBUF);
        let header = if mergeable || features.contains(VIRTIO_F_VERSION_1) { HEADER } else { LEGACY_HEADER };
        let shared = self.shared.clone();
        Ok(match self.queue_role(index, features) {
            Some(QueueRole::Receive(pair)) => Box::new(ReceiveQueue::new(shared, pair, size, header, mergeable)?),
            Some(QueueRole::Transmit(pair)) => {
                let mut queue = TransmitQueue::new(shared, pair, header);
                Box::new(SyncQueue::new(move |request: &mut Request| queue.send(request)))
            }
            Some(QueueRole::Control) => {
                let queue = ControlQueue::new(shared, self.options.pairs, features);
                Box::new(SyncQueue::new(move |request: &mut Request| queue.serve(request)))
            }
            None => return Err(io::Error::other("a control queue that the driver has not negotiated")),
        })
    }
}

/// Returns a broadcast RARP request for its own address (RFC 903), with the packet header.
fn rarp_packet(mac: Mac) -> Vec<u8> {
    const SHORTEST_FRAME: usize = 60;
    let mut message = vec![0; HEADER];
    message.extend([0xff; 6]);
    message.extend(mac);
    // EtherType, hardware type Ethernet, protocol type IPv4, their address lengths, operation "request reverse".
    message.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        message.extend(mac);
        message.extend([0; 4]);
    }
    message.resize(HEADER + SHORTEST_FRAME, 0);
    message
}

/// Returns a port that receives what it sends.
fn loopback_port() -> Result<PeerPort, NetError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let ends = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (output, input) = ends.map_err(|errno| NetError::System { what: "make a loop", source: errno.into() })?;
    Ok(PeerPort::new(output, input))
}
