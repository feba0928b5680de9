//! Where packets go to and come from: one wire per queue pair, and which receive queue hears which of them.
//!
//! Every wire, whatever is at its other end, carries messages of a 12-byte virtio-net header and a frame. The kernel keeps
//! what was sent and not read yet, and drops what is too much; so nothing here grows with what others send.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{read, write};
use tracing::warn;

use super::filter::{Mac, ReceiveFilter};
use crate::abi::virtio::NetHeader;

/// Bytes of the header before each frame on a wire.
pub(super) const HEADER: usize = size_of::<NetHeader>();
/// Longest frame, bytes: 64 KiB of IP with an Ethernet header (virtio 1.2, 5.1.6.3.1).
pub(super) const MAX_FRAME: usize = 65550;

/// A way out and a way in.
#[derive(Debug)]
pub(super) struct PeerPort {
    output: OwnedFd,
    input: OwnedFd,
}

impl PeerPort {
    /// Both must not block.
    pub(super) fn new(output: OwnedFd, input: OwnedFd) -> PeerPort {
        PeerPort { output, input }
    }

    /// Sends a header and a frame; false if the other end has no room or is gone.
    pub(super) fn send(&self, message: &[u8]) -> bool {
        loop {
            match write(&self.output, message) {
                Err(Errno::EINTR) => {}
                sent => return sent == Ok(message.len()),
            }
        }
    }

    /// Receives a header and a frame, or what somebody else sent; the number of bytes, `None` if there is nothing. What is
    /// longer than `buffer` fills it.
    ///
    /// # Errors
    /// Why nothing will ever come: the other end is closed, or the tap has been deleted.
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

/// What queues go by. A change replaces it as a whole.
#[derive(Debug, Clone)]
pub(super) struct NetState {
    /// By pair; `None` while nobody is at the other end.
    pub(super) ports: Vec<Option<Arc<PeerPort>>>,
    /// Which frames the driver wants.
    pub(super) filter: ReceiveFilter,
    /// Pairs that the driver has said it uses, from the first on.
    pub(super) driver_pairs: Option<u16>,
    /// Whether the control queue has run since the front-end connected, so that the driver can say that.
    pub(super) control_queue_ran: bool,
    /// Whether the driver shall announce itself.
    pub(super) must_announce: bool,
    /// Whether what was set is from before the front-end connected, and no ring has run since.
    pub(super) from_previous_connection: bool,
    /// The pairs whose receive queues run, with what wakes them when this changes.
    receivers: BTreeMap<u16, Arc<EventFd>>,
}

impl NetState {
    /// How many pairs may receive, from the first on: what the driver has said, one until it does, or as many as run if it
    /// can't say it here (rule R11.2).
    pub(super) fn pairs_in_use(&self) -> u16 {
        self.driver_pairs.unwrap_or(if self.control_queue_ran { 1 } else { self.ports.len() as u16 })
    }

    /// Forgets all that a driver has set.
    pub(super) fn reset_driver_settings(&mut self, mac: Mac) {
        (self.filter, self.driver_pairs) = (ReceiveFilter::new(mac), None);
    }

    /// The wires that the receive queue of `pair` hears: its own, and a share of those whose own queue doesn't run.
    pub(super) fn ports_received_by(&self, pair: u16) -> Vec<Arc<PeerPort>> {
        let listening: Vec<u16> = self.receivers.keys().copied().filter(|ear| *ear < self.pairs_in_use()).collect();
        if listening.is_empty() {
            return Vec::new();
        }
        let hears = |wire: u16| match listening.contains(&wire) {
            true => wire == pair,
            false => listening.get(usize::from(wire) % listening.len()) == Some(&pair),
        };
        let wires = (0..).zip(&self.ports).filter(|(wire, _)| hears(*wire));
        wires.filter_map(|(_, wire)| wire.clone()).collect()
    }

    /// The wire that `pair` sends on.
    pub(super) fn port(&self, pair: u16) -> Option<&Arc<PeerPort>> {
        self.ports.get(usize::from(pair))?.as_ref()
    }
}

/// What became of packets, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PacketCounts {
    /// Sent by the guest and passed on.
    pub sent: u64,
    /// Sent by the guest and dropped: without a whole header, too long, or not in its memory.
    pub sent_malformed: u64,
    /// Sent by the guest and dropped: the other end had no room, or was not there.
    pub sent_dropped: u64,
    /// Handed to the guest.
    pub received: u64,
    /// Received and dropped: without a whole header, or too long.
    pub received_malformed: u64,
    /// Received and dropped: the guest's buffers can't hold it.
    pub received_dropped: u64,
    /// Received and dropped: not for the guest, by the filter it has set.
    pub received_filtered: u64,
    /// Buffers that the guest provided and that nothing can be put in.
    pub bad_buffers: u64,
}

/// [`PacketCounts`] that go on counting.
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

/// The device's wires and what the driver has set, shared by its queues.
#[derive(Debug)]
pub(super) struct SharedNetState {
    state: Mutex<Arc<NetState>>,
    /// Counts the changes of `state`.
    generation: AtomicU64,
    /// Packets that were received by queues which have stopped since, by pair.
    unplaced_packets: Mutex<BTreeMap<u16, Vec<u8>>>,
    pub(super) counters: PacketCounters,
}

impl SharedNetState {
    pub(super) fn new(wires: Vec<Option<Arc<PeerPort>>>, filter: ReceiveFilter) -> SharedNetState {
        let (pairs, ears) = (None, BTreeMap::new());
        let state = NetState {
            ports: wires,
            filter,
            driver_pairs: pairs,
            control_queue_ran: false,
            must_announce: false,
            from_previous_connection: false,
            receivers: ears,
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

    /// Changes the state, and wakes the receive queues for it.
    pub(super) fn update(&self, change: impl FnOnce(&mut NetState)) {
        let mut state = lock(&self.state);
        change(Arc::make_mut(&mut state));
        self.generation.fetch_add(1, Ordering::Release);
        for ear in state.receivers.values() {
            let _ = ear.write(1);
        }
    }

    /// Takes out a wire over which nothing comes any more, whoever finds that first.
    pub(super) fn remove_port(&self, wire: &Arc<PeerPort>, why: Errno) {
        let is_this = |there: &Option<Arc<PeerPort>>| there.as_ref().is_some_and(|there| Arc::ptr_eq(there, wire));
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
        // Whoever watches a connection sees that it has ended; a tap is none.
        let _ = shutdown(wire.output.as_raw_fd(), Shutdown::Both);
    }

    /// A receive queue begins to run; the packet that its predecessor left.
    pub(super) fn receiver_started(&self, pair: u16, ear: Arc<EventFd>) -> Option<Vec<u8>> {
        self.update(|state| {
            state.receivers.insert(pair, ear);
        });
        lock(&self.unplaced_packets).remove(&pair)
    }

    /// It has ended, with a packet that found no buffers.
    pub(super) fn receiver_stopped(&self, pair: u16, packet: Option<Vec<u8>>) {
        if let Some(packet) = packet {
            lock(&self.unplaced_packets).insert(pair, packet);
        }
        self.update(|state| {
            state.receivers.remove(&pair);
        });
    }
}

/// A queue's look at the state: no lock is taken while nothing changes.
pub(super) struct NetStateCache {
    pub(super) shared: Arc<SharedNetState>,
    pub(super) state: Arc<NetState>,
    generation: u64,
}

impl NetStateCache {
    pub(super) fn new(hub: Arc<SharedNetState>) -> NetStateCache {
        let generation = hub.generation.load(Ordering::Acquire);
        NetStateCache { state: hub.state(), generation, shared: hub }
    }

    /// Takes note of changes; false if there were none.
    pub(super) fn refresh(&mut self) -> bool {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation == self.generation {
            return false;
        }
        // A change after the number was read is noticed the next time.
        (self.generation, self.state) = (generation, self.shared.state());
        true
    }
}

/// A thread that panicked while it held the lock has left a whole state behind: changes are made of plain stores.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
