//! Stopping a ring: its requests are put back, completed, or left to a successor (rules R3, I8).
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use crossbeam::channel::Sender;
use nix::poll::PollTimeout;

use super::{Worker, WorkerCommand, poll_readable};
use crate::backend::VringConfig;
use crate::ring::RingBase;
use crate::sys::log_limit::limited;

/// Interval in milliseconds at which a drain polls the device's queue.
const RETRY_MS: u8 = 100;

/// The reason for which a ring is not served any more, with the state to resume.
pub(in crate::backend) enum StopReason {
    Commanded(RingBase),
    /// The ring's areas were invalidated or must be mapped elsewhere.
    Unmapped(Box<ParkedRing>, Sender<()>),
}

/// The state of a ring that is not served for now.
pub(in crate::backend) struct ParkedRing {
    pub(in crate::backend) config: VringConfig,
    pub(in crate::backend) broken: bool,
    pub(in crate::backend) enabled: bool,
}

impl StopReason {
    pub(in crate::backend) fn base(self) -> RingBase {
        match self {
            StopReason::Commanded(base) => base,
            StopReason::Unmapped(left, _) => left.config.base,
        }
    }
}

impl Worker {
    /// Puts unused requests back into the ring, as if they had never been taken.
    pub(super) fn put_back(&mut self) {
        let mut unused = Vec::new();
        self.queue.put_back(&mut unused);
        unused.iter_mut().for_each(|request| request.submitted = false);
        if unused.is_empty() {
            return;
        }
        if !self.ring.put_back(&unused) {
            // Later requests are still in flight, so these are used with a length of 0.
            self.completed.append(&mut unused);
            if let Some(in_order) = &mut self.in_order {
                in_order.release_in_order(&mut self.completed);
            }
            if self.completed.is_empty() {
                return;
            }
            self.mark_not_in_flight();
            self.publish();
            return self.spare_requests.append(&mut self.completed);
        }
        for request in unused.iter().rev() {
            if let Some(in_order) = &mut self.in_order {
                in_order.taken.pop_back();
            }
            if let Some(busy) = self.heads_in_flight.get_mut(usize::from(request.head())) {
                *busy = false;
            }
            if let Some(iommu) = &mut self.iommu {
                iommu.request_completed(request.head());
            }
        }
        self.in_flight -= unused.len();
        self.spare_requests.append(&mut unused);
    }

    /// Waits for all requests in flight. If they are not to be published, or the front-end hangs up, requests that need
    /// not be completed are left to a successor (rule I10.2).
    pub(super) fn drain(mut self, mut publish: bool) -> RingBase {
        let mut unserved = Vec::new();
        if publish {
            self.put_back();
        } else {
            self.queue.put_back(&mut unserved);
        }
        let count = self.ring.to_resubmit();
        if count > 0 {
            limited!(
                warn,
                "ring {}: {count} requests of the previous back-end can't be translated and stay marked (rule I3.3)",
                self.index
            );
        }
        while self.in_flight > unserved.len() + self.completed_early(publish) {
            let before = unserved.len();
            publish = publish && !self.is_abandoned();
            if !publish {
                self.queue.suspend(&mut unserved);
            }
            if unserved.len() == before && !self.collect_completions(publish) {
                self.wait_for_queue();
            }
        }
        unserved.iter_mut().for_each(|request| request.submitted = false);
        self.ring.base()
    }

    /// Returns true if the front-end has hung up, so nothing may be published any more.
    fn is_abandoned(&self) -> bool {
        self.commands.try_iter().any(|in_order| matches!(in_order, WorkerCommand::Abandon))
    }

    /// Number of completed requests whose turn will not come, because earlier ones are left to a successor.
    fn completed_early(&self, publish: bool) -> usize {
        self.in_order.as_ref().filter(|_| !publish).map_or(0, |in_order| in_order.completed_early.len())
    }

    /// Waits for requests that cannot be left to a successor (rule I8.2). The others stay marked in the inflight region and
    /// unpublished. Their writes so far are marked in the log, because the successor may write different bytes.
    pub(super) fn suspend(mut self) -> RingBase {
        self.put_back();
        let (mut unserved, mut publish) = (Vec::new(), true);
        // With IN_ORDER, requests completed behind an open one are left to the successor too.
        while self.in_flight > unserved.len() + self.completed_early(false) {
            let before = unserved.len();
            publish = publish && !self.is_abandoned();
            self.queue.suspend(&mut unserved);
            if unserved.len() == before && !self.collect_completions(publish) {
                self.wait_for_queue();
            }
        }
        unserved.iter_mut().for_each(|request| request.submitted = false);
        let early = self.in_order.iter().flat_map(|in_order| in_order.completed_early.values());
        if let Some(log) = &self.config.logging.data {
            let burst = log.burst();
            unserved.iter().chain(early).for_each(|request| request.for_each_written(|gpa, len| burst.mark(gpa, len)));
        }
        self.signal_log();
        self.ring.base()
    }

    /// Waits for completions or dropped requests, at most `RETRY_MS`: work that failed for lack of memory is then
    /// submitted again.
    fn wait_for_queue(&self) {
        poll_readable([self.queue.completion_fd(), Some(self.wake.as_fd())], PollTimeout::from(RETRY_MS));
        let _ = self.wake.read();
    }
}
