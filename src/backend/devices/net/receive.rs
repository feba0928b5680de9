//! The receive queue: puts packets into buffers that the driver has provided.
//!
//! A buffer is taken from the ring only when there is a packet for it, and written only when the packet fits into the
//! buffers taken. So a buffer in flight is either being filled, or unwritten and can be put back. All buffers of a
//! packet complete at once and are published in one batch, in order (virtio 1.2, 5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::debug;

use super::state::{HEADER, MAX_FRAME, NetStateCache, PeerPort, SharedNetState, count};
use crate::backend::{Queue, Request};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// Maximum number of packets read before commands are received. Filtered packets count.
const BATCH: usize = 256;

pub(super) struct ReceiveQueue {
    pair: u16,
    /// Header size of this driver in bytes.
    header: usize,
    mergeable: bool,
    /// Size of the ring: no packet can have more buffers.
    size: usize,
    net_state: NetStateCache,
    /// Signalled when the shared state has changed.
    wake: Arc<EventFd>,
    /// Readable when a port or `wake` is.
    readable: Epoll,
    ports: Vec<Arc<PeerPort>>,
    /// The port to read first. It advances with every packet, so that all ports are served.
    next_port: usize,
    buffer: Box<[u8]>,
    /// Size of the packet in `buffer` with its 12-byte header.
    packet: Option<usize>,
    /// Buffers taken from the ring and not written.
    free_buffers: VecDeque<Request>,
    /// Number of writable bytes in `free_buffers`.
    free_bytes: u64,
    done: Vec<Request>,
}

impl ReceiveQueue {
    pub(super) fn new(
        shared: Arc<SharedNetState>,
        pair: u16,
        size: u16,
        header: usize,
        mergeable: bool,
    ) -> io::Result<ReceiveQueue> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags)?);
        let mut queue = ReceiveQueue {
            pair,
            header,
            mergeable,
            size: size.into(),
            readable: epoll_for(&wake, &[])?,
            ports: Vec::new(),
            next_port: 0,
            // One byte more than the longest packet: a packet that fills it is too long.
            buffer: vec![0; HEADER + MAX_FRAME + 1].into(),
            packet: None,
            free_buffers: VecDeque::new(),
            free_bytes: 0,
            done: Vec::new(),
            net_state: NetStateCache::new(shared.clone()),
            wake: wake.clone(),
        };
        if let Some(packet) = shared.receiver_started(pair, wake)
            && let Some(to) = queue.buffer.get_mut(..packet.len())
        {
            to.copy_from_slice(&packet);
            queue.packet = Some(packet.len());
        }
        Ok(queue)
    }

    /// Updates the ports of this queue.
    fn refresh(&mut self) {
        // Repeated until nothing has changed: a consumed signal may belong to a later change.
        while self.net_state.refresh() {
            let _ = self.wake.read();
            self.ports = self.net_state.state.ports_received_by(self.pair);
            match epoll_for(&self.wake, &self.ports) {
                Ok(epoll) => self.readable = epoll,
                Err(error) => {
                    limited!(warn, "receive queue {}: can't wait for packets: {}", self.pair, with_causes(&error))
                }
            }
        }
    }

    /// Reads the next accepted packet. Returns false if there is none.
    fn receive_packet(&mut self) -> bool {
        self.refresh();
        for _ in 0..BATCH {
            let (before, after) = self.ports.split_at(self.next_port.min(self.ports.len()));
            let mut turn = after.iter().chain(before);
            let received = turn.find_map(|port| {
                port.receive(&mut self.buffer).unwrap_or_else(|why| {
                    self.net_state.shared.remove_port(port, why);
                    None
                })
            });
            let Some(len) = received else { return false };
            self.next_port = (self.next_port + 1) % self.ports.len();
            // The packet may have been sent after a filter change that this queue has not seen yet.
            self.refresh();
            let Some(frame) = self.buffer.get(HEADER..len).filter(|frame| frame.len() <= MAX_FRAME) else {
                count(&self.net_state.shared.counters.received_malformed);
                continue;
            };
            if !self.net_state.state.filter.accepts(frame) {
                count(&self.net_state.shared.counters.received_filtered);
                continue;
            }
            self.packet = Some(len);
            return true;
        }
        false
    }

    /// Puts the packet into the free buffers. Drops it if no buffers can ever hold it, and keeps it if more are needed.
    fn place_packet(&mut self) {
        let Some(len) = self.packet else { return };
        self.refresh();
        if self.pair >= self.net_state.state.pairs_in_use() {
            // The packet arrived before the driver reduced its pairs (rule R11.3).
            count(&self.net_state.shared.counters.received_dropped);
            self.packet = None;
            return;
        }
        // The driver's header may be shorter than the header in `buffer`. Both end at the same offset.
        let needed = (len - HEADER + self.header) as u64;
        let enough = match (self.mergeable, self.free_buffers.front()) {
            (_, None) => false,
            (true, _) if self.free_bytes < needed && self.free_buffers.len() < self.size => return,
            (true, _) => self.free_bytes >= needed,
            (false, Some(first)) => first.writable_len() >= needed,
        };
        if !enough {
            if !self.free_buffers.is_empty() {
                debug!("receive queue {}: no buffers for a packet of {needed} bytes", self.pair);
                count(&self.net_state.shared.counters.received_dropped);
                self.packet = None;
            }
            return;
        }
        let (mut left, mut buffers) = (needed, 0u16);
        for request in &self.free_buffers {
            left = left.saturating_sub(request.writable_len());
            buffers += 1;
            if left == 0 {
                break;
            }
        }
        // Without offloads the header is zero except num_buffers, the last field of the longer header.
        if let Some(header) = self.buffer.first_chunk_mut::<HEADER>() {
            *header = [0; HEADER];
            if self.header == HEADER {
                header[HEADER - 2..].copy_from_slice(&buffers.to_le_bytes());
            }
        }
        let mut rest = self.buffer.get(HEADER - self.header..len).unwrap_or_default();
        for mut request in self.free_buffers.drain(..usize::from(buffers)) {
            self.free_bytes -= request.writable_len();
            let here = rest.len().min(usize::try_from(request.writable_len()).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at(here);
            rest = later;
            if let Err(error) = request.write(0, now) {
                // `submit` has checked that the buffer is writable.
                limited!(warn, "receive queue {}: {}", self.pair, with_causes(&error));
            }
            self.done.push(request);
        }
        self.packet = None;
        count(&self.net_state.shared.counters.received);
    }
}

impl Queue for ReceiveQueue {
    fn wants_request(&mut self) -> bool {
        while self.packet.is_none() {
            if !self.receive_packet() {
                return false;
            }
            self.place_packet();
        }
        true
    }

    fn submit(&mut self, request: Request) {
        if request.writable_len() < self.header as u64 || !request.is_writable() {
            debug!("receive queue {}: a buffer of {} bytes is of no use", self.pair, request.writable_len());
            count(&self.net_state.shared.counters.bad_buffers);
            return self.done.push(request);
        }
        self.free_bytes += request.writable_len();
        self.free_buffers.push_back(request);
        self.place_packet();
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.done);
    }

    fn put_back(&mut self, unused: &mut Vec<Request>) {
        self.free_bytes = 0;
        unused.extend(self.free_buffers.drain(..));
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        // While a packet is kept, the queue waits only for buffers.
        self.packet.is_none().then(|| self.readable.0.as_fd())
    }
}

impl Drop for ReceiveQueue {
    fn drop(&mut self) {
        debug!("receive queue {}: stops, and so far {:?}", self.pair, self.net_state.shared.counters.read());
        let packet = self.packet.and_then(|len| self.buffer.get(..len)).map(<[u8]>::to_vec);
        self.net_state.shared.receiver_stopped(self.pair, packet);
    }
}

fn epoll_for(wake: &EventFd, ports: &[Arc<PeerPort>]) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
    epoll.add(wake, event)?;
    for port in ports {
        epoll.add(port.input(), event)?;
    }
    Ok(epoll)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::filter::ReceiveFilter;
    use super::*;

    /// The queue takes no buffers while there are no packets, so only the change signal wakes it.
    #[test]
    fn a_concurrent_state_change_is_not_missed() {
        let shared = Arc::new(SharedNetState::new(vec![None, None], ReceiveFilter::new([2; 6])));
        let mut queue = ReceiveQueue::new(shared.clone(), 0, 8, HEADER, true).unwrap();
        for _ in 0..1000 {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    (0..10).for_each(|_| shared.update(|_| {}));
                    over.store(true, Ordering::Release);
                });
                while !over.load(Ordering::Acquire) {
                    queue.refresh();
                }
            });
            assert!(queue.wake.read().is_ok() || !queue.net_state.refresh(), "the last change is not seen");
        }
    }
}
