//! Main loop of the thread of a running ring.
//!
//! A ring belongs to its thread alone: the path of a request takes no lock.
//!
//! A request passes these steps, and a successor with the inflight region can recover after each: taken from the ring,
//! marked in flight, served, marked in the log, staged, published, unmarked, notified (rules L10.1, I2).

#![forbid(unsafe_code)]

mod in_order;
mod stop;

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use tracing::debug;

use crate::abi::virtio::VIRTIO_F_IN_ORDER;
use crate::backend::counters::RingCounters;
use crate::backend::device::DroppedRequests;
use crate::backend::rings::iommu::{MappedRing, used_log_range};
use crate::backend::rings::tracker::TrackedRing;
use crate::backend::session::{Logging, VringConfig};
use crate::backend::{BackendError, Kick, Notifier, Queue, Request};
use crate::memory::Iova;
use crate::ring::RingError;
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;
use in_order::InOrder;

pub(super) use stop::{ParkedRing, StopReason};

/// Polling interval of a ring without a kick, in milliseconds (rule B3.7).
const POLL_INTERVAL_MS: u8 = 1;

/// A command of the session. `done` is signalled once it has taken effect.
pub(super) enum WorkerCommand {
    Logging(Logging, Sender<()>),
    Invalidate(RangeInclusive<Iova>, Sender<()>),
    Notifiers {
        call: Option<Arc<Notifier>>,
        error: Option<Arc<Notifier>>,
        done: Sender<()>,
    },
    /// Take requests, or take no more.
    SetEnabled(bool, Sender<()>),
    /// Complete and publish all requests (rule R3.2).
    Stop,
    /// Complete only what cannot be left to a successor (rule I8.2).
    Suspend,
    /// Complete all requests without publishing them.
    Abandon,
}

/// The state of a ring's thread.
pub(super) struct Worker {
    index: u16,
    ring: TrackedRing,
    queue: Box<dyn Queue>,
    config: VringConfig,
    /// The translated ring, behind an IOMMU.
    iommu: Option<MappedRing>,
    commands: Receiver<WorkerCommand>,
    wake: Arc<EventFd>,
    /// True for each head in flight.
    heads_in_flight: Vec<bool>,
    in_flight: usize,
    /// With IN_ORDER negotiated: the requests in flight, oldest first.
    in_order: Option<InOrder>,
    /// Completed requests to be published.
    completed: Vec<Request>,
    /// Requests that the queue dropped.
    dropped: Arc<DroppedRequests>,
    /// Request objects for reuse.
    spare_requests: Vec<Request>,
    /// The ring is broken: no more requests are taken.
    broken: bool,
    /// Requests are taken; false while the ring is disabled and keeps its requests (rule I8.5).
    pub(super) enabled: bool,
    counters: RingCounters,
}

impl Worker {
    pub(super) fn new(
        index: u16,
        inbox: Receiver<WorkerCommand>,
        wake: Arc<EventFd>,
        ring: TrackedRing,
        queue: Box<dyn Queue>,
        config: VringConfig,
        iommu: Option<MappedRing>,
    ) -> Worker {
        // A packed ring's driver may choose any id.
        let heads = if let TrackedRing::Split(..) = ring { config.layout.size().into() } else { 1 << 16 };
        let busy = vec![false; heads];
        let order = (config.features.contains(VIRTIO_F_IN_ORDER)).then(InOrder::default);
        let dropped = Arc::new(DroppedRequests::new(wake.clone()));
        let mut worker = Worker {
            index,
            ring,
            queue,
            config,
            iommu,
            commands: inbox,
            wake,
            heads_in_flight: busy,
            in_flight: 0,
            in_order: order,
            completed: Vec::new(),
            dropped,
            spare_requests: Vec::new(),
            broken: false,
            enabled: true,
            counters: RingCounters::new(index),
        };
        worker.set_logging(worker.config.logging.clone());
        worker
    }

    /// Takes over from a previous back-end: resubmits its requests in flight (rules I3, I4, I6.2).
    pub(super) fn recover(&mut self) -> Result<(), BackendError> {
        if !self.ring.was_used() {
            return Ok(());
        }
        let found = self.ring.to_resubmit();
        if found > 0 {
            debug!("ring {}: {found} requests are served again", self.index);
            self.counters.resubmitted(found);
        }
        self.ring.repair();
        self.resubmit()?;
        // The last notification may not have been sent.
        self.notify();
        Ok(())
    }

    /// Submits requests of a previous back-end as far as they can be translated.
    fn resubmit(&mut self) -> Result<(), BackendError> {
        loop {
            let mut request = self.spare_request();
            match self.ring.resubmit(request.reset()) {
                Ok(Some(slot)) => request.inflight_slot = slot,
                Ok(None) => {
                    self.spare_requests.push(request);
                    return Ok(());
                }
                Err(source) => {
                    self.spare_requests.push(request);
                    if self.request_translation(source)? {
                        continue;
                    }
                    // The request stays marked in the inflight region.
                    return Ok(());
                }
            }
            self.submit(request)?;
        }
    }

    /// Requests a missing translation from the front-end (rule T1.2). Returns true if it is there already.
    fn request_translation(&mut self, source: RingError) -> Result<bool, BackendError> {
        let (Some(miss), Some(iommu)) = (source.miss(), &mut self.iommu) else {
            return Err(BackendError::BrokenRing { index: self.index, source });
        };
        let Some(memory) = iommu.misses.ask(miss)? else { return Ok(false) };
        self.config.memory = memory;
        self.ring.set_iommu(iommu.ring_iommu(&self.config));
        // Their memory is the former one.
        self.spare_requests.clear();
        Ok(true)
    }

    fn awaits_translation(&self) -> bool {
        self.iommu.as_ref().is_some_and(|iommu| iommu.misses.is_pending())
    }

    /// Serves the ring until it is stopped.
    pub(super) fn run(mut self, recovered: Result<(), BackendError>) -> StopReason {
        recovered.unwrap_or_else(|error| self.break_ring(&error));
        // The call descriptor was set while the ring was stopped (rule R10.2).
        if std::mem::take(&mut self.config.call_changed) {
            self.repeat_notification();
        }
        loop {
            while let Ok(order) = self.commands.try_recv() {
                match order {
                    WorkerCommand::Logging(logging, done) => {
                        self.set_logging(logging);
                        if !self.is_mapped(None) {
                            return self.park(done);
                        }
                        let _ = done.send(());
                    }
                    WorkerCommand::Invalidate(iovas, done) => {
                        if !self.is_mapped(Some(&iovas)) {
                            return self.park(done);
                        }
                        self.invalidate(iovas, done);
                    }
                    WorkerCommand::Notifiers { call, error, done } => {
                        (self.config.call, self.config.error) = (call, error);
                        // A previous notification may have been lost (rule R10.1).
                        self.repeat_notification();
                        let _ = done.send(());
                    }
                    WorkerCommand::SetEnabled(enabled, done) => {
                        self.enabled = enabled;
                        let _ = done.send(());
                    }
                    WorkerCommand::Suspend if self.ring.is_tracked() => return StopReason::Commanded(self.suspend()),
                    WorkerCommand::Stop | WorkerCommand::Suspend => return StopReason::Commanded(self.drain(true)),
                    WorkerCommand::Abandon => return StopReason::Commanded(self.drain(false)),
                }
            }
            let moved = self.process_ring().unwrap_or_else(|error| {
                self.break_ring(&error);
                true
            });
            if let Some(iommu) = &mut self.iommu {
                iommu.acknowledge_invalidations();
            }
            if !moved {
                self.wait_for_work();
            }
        }
    }

    /// Returns true if the ring's areas and its logged area are still mapped after an invalidation of `invalid`. Always
    /// true without an IOMMU.
    fn is_mapped(&self, invalid: Option<&RangeInclusive<Iova>>) -> bool {
        let Some(MappedRing { window, .. }) = &self.iommu else { return true };
        !invalid.is_some_and(|iovas| window.uses(iovas))
            && used_log_range(&self.config).is_none_or(|(at, len)| window.holds(at, len))
    }

    /// Stops a ring whose areas must be translated again. `done` is signalled once the former areas are unused.
    fn park(self, done: Sender<()>) -> StopReason {
        let mut left = ParkedRing { config: self.config.clone(), broken: self.broken, enabled: self.enabled };
        left.config.base = self.drain(true);
        StopReason::Unmapped(Box::new(left), done)
    }

    fn invalidate(&mut self, iovas: RangeInclusive<Iova>, done: Sender<()>) {
        if self.iommu.as_ref().is_some_and(|iommu| iommu.uses(&iovas)) {
            // Buffers that wait for input would be in use without limit (rule T3.3).
            self.put_back();
        }
        if let Some(iommu) = &mut self.iommu {
            iommu.invalidate(iovas, done);
        }
    }

    /// Takes available requests and publishes completed ones. Returns false if there were none.
    fn process_ring(&mut self) -> Result<bool, BackendError> {
        let mut taken = 0;
        let resubmitted = if self.ring.to_resubmit() > 0 && !self.broken { self.resubmit() } else { Ok(()) };
        let result = loop {
            if let Err(error) = resubmitted {
                break Err(error);
            }
            if self.ring.to_resubmit() > 0 {
                break Ok(false);
            }
            // A batch is bounded by the ring size, so that commands are received in between.
            if self.broken || !self.enabled || taken == self.config.layout.size() {
                break Ok(true);
            }
            if !self.queue.wants_request() {
                break Ok(false);
            }
            match self.take_request() {
                Ok(true) => taken += 1,
                Ok(false) => break Ok(!self.awaits_translation()),
                Err(error) => break Err(error),
            }
        };
        let published = self.collect_completions(true);
        let wanting = result?;
        if taken > 0 || published || self.broken || !self.enabled || !wanting {
            return Ok(taken > 0 || published);
        }
        // Idle: from here on the driver must kick.
        Ok(self.ring.enable_notifications())
    }

    /// Takes the next request, if there is one.
    fn take_request(&mut self) -> Result<bool, BackendError> {
        loop {
            let mut request = self.spare_request();
            match self.ring.pop(request.reset()) {
                Ok(true) => {
                    let head = request.head();
                    if self.heads_in_flight.get(usize::from(head)) == Some(&true) {
                        return Err(BackendError::HeadInFlight { index: self.index, head });
                    }
                    let slot = self.ring.take(head);
                    request.inflight_slot = slot.ok_or(BackendError::HeadInFlight { index: self.index, head })?;
                    self.submit(request)?;
                    return Ok(true);
                }
                Ok(false) => {
                    self.spare_requests.push(request);
                    return Ok(false);
                }
                Err(source) => {
                    self.spare_requests.push(request);
                    if !self.request_translation(source)? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    fn submit(&mut self, mut request: Request) -> Result<(), BackendError> {
        let (index, head) = (self.index, request.head());
        match self.heads_in_flight.get_mut(usize::from(head)) {
            Some(busy) if !*busy => *busy = true,
            _ => return Err(BackendError::HeadInFlight { index, head }),
        }
        self.in_flight += 1;
        if let Some(iommu) = &mut self.iommu {
            iommu.request_started(head, &request.chain().untranslated);
        }
        if let Some(order) = &mut self.in_order {
            order.taken.push_back(head);
        }
        request.submitted = true;
        self.queue.submit(request);
        Ok(())
    }

    /// Collects completed requests and publishes them if `publish` is set. Returns false if there were none.
    fn collect_completions(&mut self, publish: bool) -> bool {
        self.queue.completions(&mut self.completed);
        self.dropped.take(&mut self.completed);
        self.completed.iter_mut().for_each(|request| request.submitted = false);
        if let Some(order) = &mut self.in_order {
            order.release_in_order(&mut self.completed);
        }
        if self.completed.is_empty() {
            return false;
        }
        self.mark_not_in_flight();
        if publish {
            self.publish();
        }
        self.spare_requests.append(&mut self.completed);
        true
    }

    /// Removes the completed requests from those in flight.
    fn mark_not_in_flight(&mut self) {
        self.in_flight -= self.completed.len();
        for request in &self.completed {
            let head = request.head();
            if let Some(busy) = self.heads_in_flight.get_mut(usize::from(head)) {
                *busy = false;
            }
            if let Some(iommu) = &mut self.iommu {
                iommu.request_completed(head);
            }
        }
    }

    fn publish(&mut self) {
        self.counters.completed(&self.completed, self.config.logging.data.is_some());
        if let Some(log) = &self.config.logging.data {
            // One fence for all data of the batch, which has been written (rule L10.2).
            let burst = log.burst();
            for request in &self.completed {
                request.for_each_written(|gpa, len| burst.mark(gpa, len));
            }
        }
        self.completed.iter().for_each(|request| self.ring.push(request));
        let notify = self.ring.publish();
        self.signal_log();
        if notify {
            self.notify();
        }
    }

    /// Signals the log descriptor, at most once per batch (rule L12.1), and reports pages outside the log (rule L6.2).
    fn signal_log(&mut self) {
        let Logging { data, used, signal, .. } = &self.config.logging;
        let Some(log) = data.as_ref().or(used.as_ref().map(|(log, _)| log)) else { return };
        if let Some(Err(error)) = signal.as_ref().map(|signal| signal.signal()) {
            debug!("ring {}: {}", self.index, with_causes(&error));
        }
        let lost = log.out_of_range();
        // All rings of a device share the log and this figure: the first ring to see it counts it.
        let known = self.config.logging.out_of_range_pages.fetch_max(lost, Ordering::Relaxed);
        if lost > known {
            self.counters.unlogged(lost - known);
            if known == 0 {
                limited!(
                    error,
                    "ring {}: {lost} pages outside the log were written and not logged (rule L6.2)",
                    self.index
                );
            }
        }
    }

    /// Notifies the driver again if the ring has ever notified it (rule R10.1).
    fn repeat_notification(&mut self) {
        if self.config.has_notified.load(Ordering::Relaxed) {
            self.notify();
        }
    }

    fn notify(&mut self) {
        self.config.has_notified.store(true, Ordering::Relaxed);
        self.counters.notified();
        if let Some(call) = &self.config.call {
            call.signal();
        }
    }

    fn set_logging(&mut self, logging: Logging) {
        self.ring.set_log(logging.of_ring());
        self.config.logging = logging;
    }

    /// Marks the ring as broken. Requests in flight are still completed, and other rings continue.
    fn break_ring(&mut self, error: &BackendError) {
        limited!(warn, "{}", with_causes(error));
        self.counters.ring_broken();
        self.put_back();
        self.broken = true;
        self.config.kick = None;
        if let Some(error) = &self.config.error {
            error.signal();
        }
    }

    /// Waits until there may be work.
    fn wait_for_work(&mut self) {
        let polled = self.config.is_polled && !self.broken;
        let patience = self.iommu.as_ref().and_then(|iommu| iommu.misses.poll_interval()).filter(|_| !self.broken);
        let timeout = if polled { PollTimeout::from(POLL_INTERVAL_MS) } else { poll_timeout(patience) };
        let kick = self.config.kick.clone();
        // A broken ring takes no requests; it only waits for those in flight.
        let completions = self.queue.completion_fd().filter(|_| !self.broken || self.in_flight > 0);
        let fds = [Some(self.wake.as_fd()), completions, kick.as_ref().map(|kick| kick.as_fd())];
        let [woken, _, kicked] = poll_readable(fds, timeout);
        if woken {
            let _ = self.wake.read();
        }
        if let Some(kick) = kick.filter(|_| kicked) {
            self.handle_kick(&kick);
        }
    }

    fn handle_kick(&mut self, kick: &Kick) {
        match kick.take(self.index, &self.wake) {
            Ok(true) => self.ring.disable_notifications(),
            Ok(false) => {}
            // Polling the descriptor would return immediately every time.
            Err(error) => self.break_ring(&error),
        }
    }

    fn spare_request(&mut self) -> Request {
        self.spare_requests
            .pop()
            .unwrap_or_else(|| Request::new(self.config.memory.clone(), Some(self.dropped.clone())))
    }
}

pub(super) fn poll_timeout(patience: Option<Duration>) -> PollTimeout {
    patience.map_or(PollTimeout::NONE, |patience| PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX))
}

/// Polls descriptors for input. Returns which of them are ready.
pub(super) fn poll_readable<const N: usize>(fds: [Option<BorrowedFd<'_>>; N], timeout: PollTimeout) -> [bool; N] {
    let mut polled: Vec<_> = fds.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    if let Err(errno) = poll(&mut polled, timeout)
        && errno != Errno::EINTR
    {
        limited!(warn, "poll: {errno}");
    }
    let mut results = polled.iter().map(|fd| fd.any() == Some(true));
    fds.map(|fd| fd.is_some() && results.next() == Some(true))
}
