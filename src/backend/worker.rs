//! The threads that serve running rings, one each, and how a session commands them.
//!
//! A ring belongs to its thread alone: nothing on the way of a request takes a lock. Orders come over a channel, and
//! each is carried out between two batches of requests and then acknowledged. So whatever a ring did by its old orders
//! is done when the order returns: that is the grace period which a new log needs (rule L9).
//!
//! The way of a request, each arrow survivable by a successor that has the inflight region: taken from the ring →
//! noted as in flight → served → marked in the log → staged → published → noted as done → notified (rules L10, I2).

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::read;
use tracing::{debug, error, warn};

use super::counters::RingCounters;
use super::device::Dropped;
use super::session::{Logging, Rings, Setup};
use super::tracker::{Found, Tracker};
use super::{BackendError, Device, Notifier, Queue, Request};
use crate::abi::bit;
use crate::abi::virtio::VIRTIO_F_IN_ORDER;
use crate::ring::{Chain, DeviceRing, RingBase, RingLog};

/// How long a drain waits before it asks the device's queue again, in milliseconds.
const RETRY_MS: u8 = 100;
/// How often a ring without a kick is looked at, in milliseconds.
const POLL_EVERY_MS: u8 = 1;

/// The rings of one connection. Dropping it abandons those that run: what is under way ends, but is not published, so
/// that a front-end which has gone on without us finds its rings as it left them.
pub struct Workers {
    device: Arc<dyn Device>,
    running: Vec<Option<Handle>>,
}

struct Handle {
    orders: Sender<Order>,
    wake: Arc<EventFd>,
    thread: JoinHandle<RingBase>,
}

enum Order {
    Logging(Logging, Sender<()>),
    Notifiers {
        call: Option<Arc<Notifier>>,
        error: Option<Arc<Notifier>>,
        done: Sender<()>,
    },
    /// Take no more requests, or take them again.
    Hold(bool, Sender<()>),
    /// Finish, and publish what is finished.
    Stop,
    /// Finish only what can't be left to a successor (rule I8).
    Suspend,
    /// Finish, and keep it.
    Abandon,
}

impl Workers {
    /// No ring runs yet.
    pub fn new(device: Arc<dyn Device>) -> Workers {
        let running = (0..device.queues()).map(|_| None).collect();
        Workers { device, running }
    }

    /// Stops all rings as [`Rings::stop`] does.
    pub fn stop_all(&mut self) {
        self.end(|| Order::Stop);
    }

    fn end(&mut self, order: fn() -> Order) {
        for handle in self.running.iter().flatten() {
            handle.order(order());
        }
        for handle in self.running.iter_mut().filter_map(Option::take) {
            let _ = handle.thread.join();
        }
    }

    fn finish(&mut self, index: u16, order: Order) -> Result<RingBase, BackendError> {
        let lost = BackendError::RingLost { index };
        let Some(handle) = self.running.get_mut(usize::from(index)).and_then(Option::take) else { return Err(lost) };
        handle.order(order);
        handle.thread.join().map_err(|_| lost)
    }

    fn handle(&self, index: u16) -> Option<&Handle> {
        self.running.get(usize::from(index))?.as_ref()
    }
}

impl Handle {
    fn order(&self, order: Order) {
        // A worker takes orders until it is told to end.
        let _ = self.orders.send(order);
        let _ = self.wake.write(1);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end(|| Order::Abandon);
    }
}

impl Rings for Workers {
    fn start(&mut self, index: u16, setup: Setup) -> Result<(), BackendError> {
        let broken = |source| BackendError::Ring { index, source };
        let mut ring = DeviceRing::new(&setup.memory, setup.layout, setup.features, setup.base).map_err(broken)?;
        let goes_on = !ring.base().is_start(setup.features);
        let inflight = setup.inflight.as_ref().map(|region| Tracker::start(region, index, &mut ring)).transpose()?;
        let has_a_past = inflight.as_ref().is_some_and(|(_, found)| found.has_a_past());
        if setup.first && (has_a_past || goes_on) {
            relog_memory(index, &setup);
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags).map_err(BackendError::system("make an eventfd"))?);
        let (orders, inbox) = unbounded();
        let (ready, is_ready) = bounded(1);
        let (device, woken) = (self.device.clone(), wake.clone());
        let serve = move || {
            let base = ring.base();
            match device.queue(index, setup.layout.size(), setup.features) {
                Err(source) => {
                    let _ = ready.send(Err(source));
                    base
                }
                Ok(queue) => {
                    let mut worker = Worker::new(index, ring, queue, setup, inbox, woken);
                    let recovered = worker.recover(inflight);
                    let _ = ready.send(Ok(()));
                    worker.run(recovered)
                }
            }
        };
        let thread = thread::Builder::new().name(format!("ring {index}")).spawn(serve);
        let thread = thread.map_err(BackendError::system("start a thread"))?;
        let began = is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended")));
        began.map_err(BackendError::system("serve a queue"))?;
        if let Some(slot) = self.running.get_mut(usize::from(index)) {
            *slot = Some(Handle { orders, wake, thread });
        }
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.finish(index, Order::Stop)
    }

    fn suspend(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.finish(index, Order::Suspend)
    }

    fn hold(&mut self, index: u16, yes: bool) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.order(Order::Hold(yes, done));
            let _ = is_done.recv();
        }
    }

    fn set_logging(&mut self, index: u16, logging: Logging) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.order(Order::Logging(logging, done));
            let _ = is_done.recv();
        }
    }

    fn kick(&mut self, index: u16) {
        if let Some(handle) = self.handle(index) {
            let _ = handle.wake.write(1);
        }
    }

    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.order(Order::Notifiers { call, error, done });
            let _ = is_done.recv();
        }
    }
}

/// What a ring's thread works with.
struct Worker {
    index: u16,
    ring: DeviceRing,
    queue: Box<dyn Queue>,
    setup: Setup,
    inflight: Option<Tracker>,
    inbox: Receiver<Order>,
    wake: Arc<EventFd>,
    /// Heads in flight.
    busy: Vec<bool>,
    in_flight: usize,
    /// With IN_ORDER negotiated: what is in flight, oldest first.
    order: Option<InOrder>,
    /// Came back from the queue, to be published.
    done: Vec<Request>,
    /// Were dropped by the queue.
    dropped: Arc<Dropped>,
    /// To be used again.
    spare: Vec<Request>,
    /// No more requests are taken.
    broken: bool,
    /// No more requests are taken until the ring is enabled again.
    held: bool,
    counters: RingCounters,
    /// Whether the driver was to be notified, over this call fd or without one.
    notified: bool,
}

impl Worker {
    fn new(
        index: u16,
        ring: DeviceRing,
        queue: Box<dyn Queue>,
        setup: Setup,
        inbox: Receiver<Order>,
        wake: Arc<EventFd>,
    ) -> Worker {
        // A packed ring's driver may choose any id.
        let heads = if let DeviceRing::Split(_) = ring { setup.layout.size().into() } else { 1 << 16 };
        let busy = vec![false; heads];
        let order = (setup.features & bit(VIRTIO_F_IN_ORDER) != 0).then(InOrder::default);
        let dropped = Arc::new(Dropped::new(wake.clone()));
        let mut worker = Worker {
            index,
            ring,
            queue,
            setup,
            inflight: None,
            inbox,
            wake,
            busy,
            in_flight: 0,
            order,
            done: Vec::new(),
            dropped,
            spare: Vec::new(),
            broken: false,
            held: false,
            counters: RingCounters::new(index),
            notified: false,
        };
        worker.log_to(worker.setup.logging.clone());
        worker
    }

    /// Takes over from a predecessor: serves again what it had under way (rules I3, I4, I6).
    fn recover(&mut self, inflight: Option<(Tracker, Found)>) -> Result<(), BackendError> {
        let Some((inflight, found)) = inflight else { return Ok(()) };
        self.inflight = Some(inflight);
        if !found.has_a_past() {
            return Ok(());
        }
        if found.len() > 0 {
            debug!("ring {}: {} requests are served again", self.index, found.len());
            self.counters.resubmitted(found.len());
        }
        found.repair(&mut self.ring);
        // A predecessor that was killed between a write to the ring and its mark has left no other trace.
        self.ring.relog_used();
        for number in 0..found.len() {
            let mut request = self.spare_request();
            let index = self.index;
            let name = found.resubmit(number, &mut self.ring, request.renew());
            request.name = name.map_err(|source| BackendError::Ring { index, source })?;
            self.submit(request)?;
        }
        // The last notification may have died with its sender.
        self.notify();
        Ok(())
    }

    /// Serves the ring until told to end; tells where it goes on.
    fn run(mut self, recovered: Result<(), BackendError>) -> RingBase {
        recovered.unwrap_or_else(|error| self.broke(&error));
        loop {
            while let Ok(order) = self.inbox.try_recv() {
                match order {
                    Order::Logging(logging, done) => {
                        self.log_to(logging);
                        let _ = done.send(());
                    }
                    Order::Notifiers { call, error, done } => {
                        (self.setup.call, self.setup.error) = (call, error);
                        // There may have been none, or nobody who heard it (rule R10).
                        if self.notified {
                            self.notify();
                        }
                        let _ = done.send(());
                    }
                    Order::Hold(yes, done) => {
                        self.held = yes;
                        let _ = done.send(());
                    }
                    Order::Suspend if self.inflight.is_some() => return self.suspend(),
                    Order::Stop | Order::Suspend => return self.drain(true),
                    Order::Abandon => return self.drain(false),
                }
            }
            let moved = self.turn().unwrap_or_else(|error| {
                self.broke(&error);
                true
            });
            if !moved {
                self.wait();
            }
        }
    }

    /// Takes what requests there are, and publishes what is complete; false if there was neither.
    fn turn(&mut self) -> Result<bool, BackendError> {
        let mut taken = 0;
        let result = loop {
            // A batch is bounded by the ring: the next turn looks for orders.
            if self.broken || self.held || taken == self.setup.layout.size() {
                break Ok(true);
            }
            if !self.queue.wants() {
                break Ok(false);
            }
            match self.take() {
                Ok(true) => taken += 1,
                Ok(false) => break Ok(true),
                Err(error) => break Err(error),
            }
        };
        let published = self.complete(true);
        let wanting = result?;
        if taken > 0 || published || self.broken || self.held || !wanting {
            return Ok(taken > 0 || published);
        }
        // Nothing to do, it seems: from here on the driver must kick.
        Ok(self.ring.enable_notifications())
    }

    /// Takes the next request, if there is one.
    fn take(&mut self) -> Result<bool, BackendError> {
        let mut request = self.spare_request();
        match self.ring.pop(request.renew()) {
            Ok(true) => {
                let head = request.head();
                if self.busy.get(usize::from(head)) == Some(&true) {
                    return Err(BackendError::Busy { index: self.index, head });
                }
                if let Some(inflight) = &mut self.inflight {
                    let name = inflight.take(&self.ring, head);
                    request.name = name.ok_or(BackendError::Busy { index: self.index, head })?;
                }
                self.submit(request)?;
                Ok(true)
            }
            Ok(false) => {
                self.spare.push(request);
                Ok(false)
            }
            Err(source) => Err(BackendError::Ring { index: self.index, source }),
        }
    }

    fn submit(&mut self, mut request: Request) -> Result<(), BackendError> {
        let (index, head) = (self.index, request.head());
        match self.busy.get_mut(usize::from(head)) {
            Some(busy) if !*busy => *busy = true,
            _ => return Err(BackendError::Busy { index, head }),
        }
        self.in_flight += 1;
        if let Some(order) = &mut self.order {
            order.taken.push_back(head);
        }
        request.lent_out = true;
        self.queue.submit(request);
        Ok(())
    }

    /// Collects what is complete and, if so wanted, publishes it; false if there was nothing.
    fn complete(&mut self, publish: bool) -> bool {
        self.queue.completions(&mut self.done);
        self.dropped.take(&mut self.done);
        self.done.iter_mut().for_each(|request| request.lent_out = false);
        if let Some(order) = &mut self.order {
            order.hold_back(&mut self.done);
        }
        if self.done.is_empty() {
            return false;
        }
        self.settle_done();
        if publish {
            self.publish();
        }
        self.spare.append(&mut self.done);
        true
    }

    /// What is done is not in flight any more.
    fn settle_done(&mut self) {
        self.in_flight -= self.done.len();
        for request in &self.done {
            if let Some(busy) = self.busy.get_mut(usize::from(request.head())) {
                *busy = false;
            }
        }
    }

    fn publish(&mut self) {
        self.counters.batch(&self.done, self.setup.logging.data.is_some());
        if let Some(log) = &self.setup.logging.data {
            // One fence for all data of the batch, which is written by now (rule L10).
            let burst = log.burst();
            for request in &self.done {
                request.written(|gpa, len| burst.mark(gpa, len));
            }
        }
        for request in &self.done {
            if let Some(inflight) = &mut self.inflight {
                inflight.stage(request.name);
            }
            self.ring.push(request.chain(), request.written_len());
        }
        let notify = self.ring.publish();
        if let Some(inflight) = &mut self.inflight {
            inflight.commit(&self.ring);
        }
        self.signal_log();
        if notify {
            self.notify();
        }
    }

    /// Once per batch, whatever it marked (rule L12).
    fn signal_log(&mut self) {
        let Logging { data, used, signal, .. } = &self.setup.logging;
        let Some(log) = data.as_ref().or(used.as_ref().map(|(log, _)| log)) else { return };
        if let Some(Err(error)) = signal.as_ref().map(|signal| signal.signal()) {
            debug!("ring {}: {error}", self.index);
        }
        let lost = log.out_of_range();
        // All rings of a device share the log: whoever sees the figure first counts it.
        let known = self.setup.logging.lost.fetch_max(lost, Ordering::Relaxed);
        if lost > known {
            self.counters.unlogged(lost - known);
            if known == 0 {
                error!("ring {}: {lost} pages outside the log were written and not logged (rule L6)", self.index);
            }
        }
    }

    fn notify(&mut self) {
        self.notified = true;
        self.counters.notified();
        if let Some(call) = &self.setup.call {
            call.signal();
        }
    }

    fn log_to(&mut self, logging: Logging) {
        let used = logging.used.clone();
        self.ring.set_log(used.map(|(log, used_gpa)| RingLog { log, used_gpa }));
        self.setup.logging = logging;
    }

    /// Puts the requests back into the ring that the queue has no use for: they are as if never taken.
    fn put_back(&mut self) {
        let mut unused = Vec::new();
        self.queue.put_back(&mut unused);
        unused.iter_mut().for_each(|request| request.lent_out = false);
        if unused.is_empty() {
            return;
        }
        let chains: Vec<&Chain> = unused.iter().map(Request::chain).collect();
        if !self.ring.put_back(&chains) {
            // Others were taken after them: all that is left is to use them with nothing in them.
            self.done.append(&mut unused);
            self.settle_done();
            self.publish();
            return self.spare.append(&mut self.done);
        }
        for request in unused.iter().rev() {
            if let Some(inflight) = &mut self.inflight {
                inflight.put_back(request.name);
            }
            if let Some(order) = &mut self.order {
                order.taken.pop_back();
            }
            if let Some(busy) = self.busy.get_mut(usize::from(request.head())) {
                *busy = false;
            }
        }
        self.in_flight -= unused.len();
        self.spare.append(&mut unused);
    }

    /// Only this ring ends; what is under way is still completed.
    fn broke(&mut self, error: &BackendError) {
        error!("{error}");
        self.counters.broke();
        self.put_back();
        self.broken = true;
        self.setup.kick = None;
        if let Some(error) = &self.setup.error {
            error.signal();
        }
    }

    /// Waits for everything under way.
    fn drain(mut self, publish: bool) -> RingBase {
        if publish {
            self.put_back();
        } else {
            let mut unused = Vec::new();
            self.queue.put_back(&mut unused);
            unused.iter_mut().for_each(|request| request.lent_out = false);
            self.in_flight -= unused.len();
        }
        while self.in_flight > 0 {
            if !self.complete(publish) {
                self.wait_for_queue();
            }
        }
        self.ring.base()
    }

    /// Waits for what can't be left to a successor. The rest stays marked in the inflight region, and unpublished, but
    /// what was written of it already is in the log: the successor may write other bytes.
    fn suspend(mut self) -> RingBase {
        self.put_back();
        let mut unserved = Vec::new();
        // With IN_ORDER, what is complete behind a request that is not is left to the successor too.
        while self.in_flight > unserved.len() + self.order.as_ref().map_or(0, |order| order.early.len()) {
            let before = unserved.len();
            self.queue.suspend(&mut unserved);
            if unserved.len() == before && !self.complete(true) {
                self.wait_for_queue();
            }
        }
        unserved.iter_mut().for_each(|request| request.lent_out = false);
        let early = self.order.iter().flat_map(|order| order.early.values());
        if let Some(log) = &self.setup.logging.data {
            let burst = log.burst();
            unserved.iter().chain(early).for_each(|request| request.written(|gpa, len| burst.mark(gpa, len)));
        }
        self.signal_log();
        self.ring.base()
    }

    /// Looks again after a while even if nothing comes: what the system had no memory for is passed on once more.
    fn wait_for_queue(&self) {
        if let Some(fd) = self.queue.completion_fd() {
            wait_for([Some(fd)], PollTimeout::from(RETRY_MS));
        }
    }

    /// Waits until there may be something to do.
    fn wait(&mut self) {
        let polled = self.setup.polled && !self.broken;
        let timeout = if polled { PollTimeout::from(POLL_EVERY_MS) } else { PollTimeout::NONE };
        let kick = self.setup.kick.clone();
        // A broken ring takes nothing more: only what it still has can move it.
        let completions = self.queue.completion_fd().filter(|_| !self.broken || self.in_flight > 0);
        let fds = [Some(self.wake.as_fd()), completions, kick.as_ref().map(|kick| kick.as_fd())];
        let [woken, _, kicked] = wait_for(fds, timeout);
        if woken {
            let _ = self.wake.read();
        }
        if let Some(kick) = kick.filter(|_| kicked) {
            self.kicked(&kick);
        }
    }

    fn kicked(&mut self, kick: &OwnedFd) {
        match read(kick, &mut [0; 8]) {
            Ok(1..) => self.ring.disable_notifications(),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // Nothing will ever come from there, but polling it would always return at once.
            Ok(0) | Err(_) => self.broke(&BackendError::Kick { index: self.index }),
        }
    }

    fn spare_request(&mut self) -> Request {
        self.spare.pop().unwrap_or_else(|| Request::new(self.setup.memory.clone(), Some(self.dropped.clone())))
    }
}

/// The requests of a driver that wants them completed in the order in which they were taken (VIRTIO_F_IN_ORDER).
#[derive(Default)]
struct InOrder {
    taken: VecDeque<u16>,
    /// Complete before their turn, by head.
    early: HashMap<u16, Request>,
}

impl InOrder {
    /// Leaves in `done` what may be published now, in order.
    fn hold_back(&mut self, done: &mut Vec<Request>) {
        self.early.extend(done.drain(..).map(|request| (request.head(), request)));
        while let Some(request) = self.taken.front().and_then(|head| self.early.remove(head)) {
            self.taken.pop_front();
            done.push(request);
        }
    }
}

/// An empty log that comes with a ring which others served before is a new one: what they marked in the old one, the
/// front-end may have thrown away with it. All guest memory may have been written (rule L15).
fn relog_memory(index: u16, setup: &Setup) {
    let Some(log) = setup.logging.data.as_ref().filter(|log| log.is_clear()) else { return };
    warn!("ring {index}: its last back-end's log is gone: all guest memory is logged as written (rule L15)");
    for region in setup.memory.regions() {
        log.mark(region.gpa(), region.size());
    }
}

/// Waits until one of the fds has something to say; tells which.
fn wait_for<const N: usize>(fds: [Option<BorrowedFd<'_>>; N], timeout: PollTimeout) -> [bool; N] {
    let mut polled: Vec<_> = fds.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    if let Err(errno) = poll(&mut polled, timeout)
        && errno != Errno::EINTR
    {
        warn!("poll: {errno}");
    }
    let mut results = polled.iter().map(|fd| fd.any() == Some(true));
    fds.map(|fd| fd.is_some() && results.next() == Some(true))
}
