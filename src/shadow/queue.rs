//! Passes requests from the driver's ring to the shadow ring, and back when the inner device has completed them.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::abi::virtio::VirtioFeatures;
use crate::backend::{Queue, Request, VirtioDevice};
use crate::memory::GuestAddress;
use crate::ring::{DriverRing, RingError};
use crate::sys::log_limit::limited;
use crate::sys::nonblocking;
use crate::sys::with_causes::with_causes;

/// The device that the workers of the driver's rings serve. Its queues are shadow rings.
pub(super) struct ForwardingDevice {
    /// The queue of each ring that is about to be started.
    prepared: Vec<Mutex<Option<ShadowQueue>>>,
}

impl ForwardingDevice {
    pub(super) fn new(queues: u16) -> ForwardingDevice {
        ForwardingDevice { prepared: (0..queues).map(|_| Mutex::default()).collect() }
    }

    /// Provides the queue for the next start of ring `index`.
    pub(super) fn prepare(&self, index: u16, queue: ShadowQueue) {
        if let Some(slot) = self.prepared.get(usize::from(index)) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(queue);
        }
    }
}

impl VirtioDevice for ForwardingDevice {
    fn features(&self) -> VirtioFeatures {
        VirtioFeatures::empty()
    }

    fn queues(&self) -> u16 {
        self.prepared.len() as u16
    }

    /// Empty: the driver reads the configuration space of the inner device.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let prepared = self.prepared.get(usize::from(index));
        let queue = prepared.and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
        queue
            .map(|queue| Box::new(queue) as Box<dyn Queue>)
            .ok_or_else(|| io::Error::other("no shadow ring is prepared"))
    }
}

/// The parts of a shadow ring that the control thread shares with its worker.
pub(super) struct ShadowRing {
    /// Signals the inner device.
    pub(super) kick: Arc<OwnedFd>,
    /// Signalled by the inner device.
    pub(super) call: Arc<OwnedFd>,
    /// True once the inner device has stopped the ring: it accesses no request that it has not completed.
    pub(super) stopped: AtomicBool,
}

/// A running shadow ring.
pub(super) struct ShadowQueue {
    ring: DriverRing,
    shared: Arc<ShadowRing>,
    /// The requests in the shadow ring, by the head of their descriptors.
    outstanding: Vec<Option<Outstanding>>,
    /// Number of requests added to the shadow ring so far.
    added: u64,
    /// Requests that wait for descriptors.
    waiting: VecDeque<Request>,
    /// Requests that cannot be passed on.
    refused: Vec<Request>,
    /// Requests that were found complete when the ring was stopped.
    completed: Vec<Request>,
    /// The indirect table for a request with more buffers than the ring has entries, and the head of its user.
    table: Option<(GuestAddress, Option<u16>)>,
    /// True if the inner device has broken the ring.
    broken: bool,
}

struct Outstanding {
    request: Request,
    /// Position in the order of requests.
    number: u64,
}

impl ShadowQueue {
    pub(super) fn new(
        ring: DriverRing,
        size: u16,
        table: Option<GuestAddress>,
        shared: Arc<ShadowRing>,
    ) -> ShadowQueue {
        ShadowQueue {
            ring,
            shared,
            outstanding: (0..size).map(|_| None).collect(),
            added: 0,
            waiting: VecDeque::new(),
            refused: Vec::new(),
            completed: Vec::new(),
            table: table.map(|table| (table, None)),
            broken: false,
        }
    }

    /// Adds a request to the shadow ring. Returns it if there are too few descriptors.
    fn add(&mut self, request: Request) -> Option<Request> {
        // The inner device can also access the shadow rings, so the driver's buffers must be in guest memory.
        if !request.is_mapped() {
            self.refused.push(request);
            return None;
        }
        let chain = request.chain();
        let is_long = chain.readable.len() + chain.writable.len() > self.outstanding.len();
        let table = match self.table {
            Some((_, Some(_))) if is_long => return Some(request),
            Some((table, None)) if is_long => Some(table),
            _ => None,
        };
        match self.ring.add(&chain.readable, &chain.writable, table) {
            Ok(None) => return Some(request),
            Ok(Some(head)) => {
                if let Some((_, user)) = self.table.as_mut().filter(|_| table.is_some()) {
                    *user = Some(head);
                }
                let number = self.added;
                self.added += 1;
                if let Some(slot) = self.outstanding.get_mut(usize::from(head)) {
                    *slot = Some(Outstanding { request, number });
                }
            }
            Err(error) => {
                limited!(warn, "a request cannot be passed to the device: {}", with_causes(&error));
                self.refused.push(request);
            }
        }
        None
    }

    /// Moves completed requests to `done`. Returns false if there were none.
    fn take_used(&mut self, done: &mut Vec<Request>) -> bool {
        let before = done.len();
        while !self.broken {
            match self.ring.pop_used() {
                Ok(None) => break,
                Ok(Some(used)) => {
                    if let Some((_, user)) = self.table.as_mut().filter(|(_, user)| *user == Some(used.head)) {
                        *user = None;
                    }
                    let request = self.outstanding.get_mut(usize::from(used.head)).and_then(Option::take);
                    done.extend(request.map(|Outstanding { mut request, .. }| {
                        request.written_by_device(used.len);
                        request
                    }));
                }
                Err(error) => self.break_ring(&error),
            }
        }
        done.len() > before
    }

    fn break_ring(&mut self, error: &RingError) {
        limited!(warn, "the device has broken its ring, and completes no more requests: {}", with_causes(error));
        self.broken = true;
    }

    /// Moves the requests that the inner device did not take to `unused`, in the order of the driver's ring. There are
    /// none before it has stopped the ring.
    fn take_back(&mut self, unused: &mut Vec<Request>) {
        if !self.shared.stopped.load(Ordering::Acquire) {
            return;
        }
        let mut completed = std::mem::take(&mut self.completed);
        self.take_used(&mut completed);
        self.completed = completed;
        let mut left: Vec<Outstanding> = self.outstanding.iter_mut().filter_map(Option::take).collect();
        left.sort_by_key(|outstanding| outstanding.number);
        unused.extend(left.into_iter().map(|outstanding| outstanding.request));
        unused.extend(self.waiting.drain(..));
    }
}

impl Queue for ShadowQueue {
    fn wants_request(&mut self) -> bool {
        self.waiting.is_empty() && !self.broken
    }

    fn submit(&mut self, request: Request) {
        let left = self.add(request);
        self.waiting.extend(left);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.completed);
        loop {
            let mut found = self.take_used(done);
            while let Some(request) = self.waiting.pop_front() {
                if let Some(request) = self.add(request) {
                    self.waiting.push_front(request);
                    break;
                }
            }
            done.append(&mut self.refused);
            if self.ring.publish() {
                let _ = nonblocking::signal(self.shared.kick.as_fd());
            }
            if !found {
                let _ = nonblocking::take(self.shared.call.as_fd());
                found = self.ring.enable_notifications();
            }
            if !found || self.broken {
                return;
            }
        }
    }

    fn put_back(&mut self, unused: &mut Vec<Request>) {
        self.take_back(unused);
    }

    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        self.take_back(unserved);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.call.as_fd())
    }
}
