//! Ports to the other end, and the state that the queues of a network device share.
//!
//! A port carries messages of a 12-byte virtio-net header and a frame. The kernel buffers unread packets and drops the
//! excess, so memory use here does not depend on the sender.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{read, write};
use tracing::warn;

use super::filter::{Mac, ReceiveFilter};
use crate::abi::virtio::NetHeader;
use crate::sys::lock;

/// Size of the header before each frame in bytes.
pub(super) const HEADER: usize = size_of::<NetHeader>();
/// Maximum size of a frame in bytes: 64 KiB of IP with an Ethernet header (virtio 1.2, 5.1.6.3.1).
pub(super) const MAX_FRAME: usize = 65550;

/// The descriptors to send to and receive from the other end for one queue pair.
#[derive(Debug)]
pub(super) struct PeerPort {
    output: OwnedFd,
    input: OwnedFd,
}

impl PeerPort {
    /// Creates a port. Both descriptors must be non-blocking.
    pub(super) fn new(output: OwnedFd, input: OwnedFd) -> PeerPort {
        PeerPort { output, input }
    }

    /// Sends a header and a frame. Returns false if the other end has no room or is closed.
    pub(super) fn send(&self, message: &[u8]) -> bool {
        loop {
            match write(&self.output, message) {
                Err(Errno::EINTR) => {}
                sent => return sent == Ok(message.len()),
            }
        }
    }

    /// Receives a header and a frame, unchecked. Returns the number of bytes, `None` if there is no packet. A packet
    /// longer than `buffer` fills it.
    ///
    /// # Errors
    /// The error after which no packets can arrive: the other end is closed, or the tap was deleted.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> nix::Result<Option<usize>> {
        loop {
            match read(&self.input, buffer) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Ok(0) => return Err(Errno::ENOTCONN),
                received => return received.map(Some),
            }
        }
    }

    pub(super) fn input(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }
}

/// State of the device that its queues use. A change replaces it as a whole.
#[derive(Debug, Clone)]
pub(super) struct NetState {
    /// Ports by pair; `None` without another end.
    pub(super) ports: Vec<Option<Arc<PeerPort>>>,
    /// The receive filter.
    pub(super) filter: ReceiveFilter,
    /// Number of pairs set by the driver with VQ_PAIRS_SET.
    pub(super) driver_pairs: Option<u16>,
    /// True if the control queue has run since the front-end connected. The driver can then set the number of pairs.
    pub(super) control_queue_ran: bool,
    /// True if the device asks the driver to announce itself.
    pub(super) must_announce: bool,
    /// True if the settings were made during a previous connection and no ring has run since.
    pub(super) from_previous_connection: bool,
    /// The eventfd that wakes each running receive queue, by pair.
    receivers: BTreeMap<u16, Arc<EventFd>>,
}

impl NetState {
    /// Returns the number of pairs that receive. This is the number set by the driver. Before the driver has set it, it
    /// is one, or all pairs if the control queue has not run (rules R11.1, R11.2).
    pub(super) fn pairs_in_use(&self) -> u16 {
        self.driver_pairs.unwrap_or(if self.control_queue_ran { 1 } else { self.ports.len() as u16 })
    }

    /// Discards all driver settings.
    pub(super) fn reset_driver_settings(&mut self, mac: Mac) {
        (self.filter, self.driver_pairs) = (ReceiveFilter::new(mac), None);
    }

    /// Returns the ports that the receive queue of `pair` reads: its own, and a share of those without a running queue.
    pub(super) fn ports_received_by(&self, pair: u16) -> Vec<Arc<PeerPort>> {
        let listening: Vec<u16> = self.receivers.keys().copied().filter(|wake| *wake < self.pairs_in_use()).collect();
        if listening.is_empty() {
            return Vec::new();
        }
        let hears = |port: u16| match listening.contains(&port) {
            true => port == pair,
            false => listening.get(usize::from(port) % listening.len()) == Some(&pair),
        };
        let ports = (0..).zip(&self.ports).filter(|(port, _)| hears(*port));
        ports.filter_map(|(_, port)| port.clone()).collect()
    }

    /// Returns the port on which `pair` sends.
    pub(super) fn port(&self, pair: u16) -> Option<&Arc<PeerPort>> {
        self.ports.get(usize::from(pair))?.as_ref()
    }
}

/// Packet counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PacketCounts {
    /// Sent by the guest and forwarded.
    pub sent: u64,
    /// Sent by the guest and dropped: truncated header, too long, or outside guest memory.
    pub sent_malformed: u64,
    /// Sent by the guest and dropped: the other end had no room or was not connected.
    pub sent_dropped: u64,
    /// Received by the guest.
    pub received: u64,
    /// Received and dropped: truncated header, or too long.
    pub received_malformed: u64,
    /// Received and dropped: larger than the guest's buffers.
    pub received_dropped: u64,
    /// Received and dropped by the receive filter.
    pub received_filtered: u64,
    /// Receive buffers of the guest that are unusable.
    pub bad_buffers: u64,
}

/// The counters behind [`PacketCounts`].
#[derive(Debug, Default)]
pub(super) struct PacketCounters {
    pub(super) sent: AtomicU64,
    pub(super) sent_malformed: AtomicU64,
    pub(super) sent_dropped: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) received_malformed: AtomicU64,
    pub(super) received_dropped: AtomicU64,
    pub(super) received_filtered: AtomicU64,
    pub(super) bad_buffers: AtomicU64,
}

impl PacketCounters {
    pub(super) fn read(&self) -> PacketCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PacketCounts {
            sent: read(&self.sent),
            sent_malformed: read(&self.sent_malformed),
            sent_dropped: read(&self.sent_dropped),
            received: read(&self.received),
            received_malformed: read(&self.received_malformed),
            received_dropped: read(&self.received_dropped),
            received_filtered: read(&self.received_filtered),
            bad_buffers: read(&self.bad_buffers),
        }
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The state of a network device, shared by its queues.
#[derive(Debug)]
pub(super) struct SharedNetState {
    state: Mutex<Arc<NetState>>,
    /// Number of changes of `state`.
    generation: AtomicU64,
    /// Packets received by queues that have stopped, by pair.
    unplaced_packets: Mutex<BTreeMap<u16, Vec<u8>>>,
    pub(super) counters: PacketCounters,
}

impl SharedNetState {
    pub(super) fn new(ports: Vec<Option<Arc<PeerPort>>>, filter: ReceiveFilter) -> SharedNetState {
        let (pairs, receivers) = (None, BTreeMap::new());
        let state = NetState {
            ports,
            filter,
            driver_pairs: pairs,
            control_queue_ran: false,
            must_announce: false,
            from_previous_connection: false,
            receivers,
        };
        SharedNetState {
            state: Mutex::new(Arc::new(state)),
            generation: AtomicU64::new(0),
            unplaced_packets: Mutex::default(),
            counters: PacketCounters::default(),
        }
    }

    pub(super) fn state(&self) -> Arc<NetState> {
        lock(&self.state).clone()
    }

    /// Changes the state, and wakes the receive queues.
    pub(super) fn update(&self, change: impl FnOnce(&mut NetState)) {
        let mut state = lock(&self.state);
        change(Arc::make_mut(&mut state));
        self.generation.fetch_add(1, Ordering::Release);
        for wake in state.receivers.values() {
            let _ = wake.write(1);
        }
    }

    /// Removes a port whose other end no longer exists. Does nothing if the port was already removed.
    pub(super) fn remove_port(&self, port: &Arc<PeerPort>, why: Errno) {
        let is_this = |there: &Option<Arc<PeerPort>>| there.as_ref().is_some_and(|there| Arc::ptr_eq(there, port));
        let Some(pair) = self.state().ports.iter().position(is_this) else { return };
        self.update(|state| {
            for there in state.ports.iter_mut().filter(|there| is_this(there)) {
                *there = None;
                warn!(
                    "queue pair {pair}: its tap or other end is gone ({}): no packets until it is there again",
                    why.desc()
                );
            }
        });
        // Signals the end of the connection to the thread that polls it. The call has no effect on a tap.
        let _ = shutdown(port.output.as_raw_fd(), Shutdown::Both);
    }

    /// Adds a running receive queue. Returns the packet that a previous queue of the pair received but did not deliver.
    pub(super) fn receiver_started(&self, pair: u16, wake: Arc<EventFd>) -> Option<Vec<u8>> {
        self.update(|state| {
            state.receivers.insert(pair, wake);
        });
        lock(&self.unplaced_packets).remove(&pair)
    }

    /// Removes a receive queue. Keeps `packet`, which the queue could not deliver for lack of buffers.
    pub(super) fn receiver_stopped(&self, pair: u16, packet: Option<Vec<u8>>) {
        if let Some(packet) = packet {
            lock(&self.unplaced_packets).insert(pair, packet);
        }
        self.update(|state| {
            state.receivers.remove(&pair);
        });
    }
}

/// A queue's copy of the state. It is read without a lock, and replaced only after a change.
pub(super) struct NetStateCache {
    pub(super) shared: Arc<SharedNetState>,
    pub(super) state: Arc<NetState>,
    generation: u64,
}

impl NetStateCache {
    pub(super) fn new(shared: Arc<SharedNetState>) -> NetStateCache {
        let generation = shared.generation.load(Ordering::Acquire);
        NetStateCache { state: shared.state(), generation, shared }
    }

    /// Updates the copy. Returns false if nothing has changed.
    pub(super) fn refresh(&mut self) -> bool {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation == self.generation {
            return false;
        }
        // The next call sees a change that was made after the number was read.
        (self.generation, self.state) = (generation, self.shared.state());
        true
    }
}
