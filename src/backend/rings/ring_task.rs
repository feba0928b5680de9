//! The task of a ring thread: starts the worker, and behind an IOMMU waits until the ring's areas are translated.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::Receiver;
use nix::sys::eventfd::EventFd;

use crate::abi::virtio::VIRTIO_F_IN_ORDER;
use crate::backend::counters::RingCounters;
use crate::backend::rings::iommu::{IotlbMisses, MappedRing};
use crate::backend::rings::tracker::TrackedRing;
use crate::backend::rings::worker::{ParkedRing, StopReason, Worker, WorkerCommand, poll_readable, poll_timeout};
use crate::backend::session::VringConfig;
use crate::backend::{BackendError, VirtioDevice};
use crate::memory::Iotlb;
use crate::ring::{PackedDevice, RingBase};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// Time after which a refused translation of a ring's areas is requested again.
const REFUSAL_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A ring to be served, whether it can run or not.
pub(super) struct RingTask {
    pub(super) index: u16,
    pub(super) device: Arc<dyn VirtioDevice>,
    pub(super) commands: Receiver<WorkerCommand>,
    pub(super) wake: Arc<EventFd>,
}

impl RingTask {
    /// Starts serving the ring. The inner result is that of the recovery from a previous back-end.
    pub(super) fn start_worker(
        &self,
        config: VringConfig,
        iommu: Option<MappedRing>,
    ) -> Result<(Worker, Result<(), BackendError>), BackendError> {
        let index = self.index;
        let broken = |source| BackendError::BrokenRing { index, source };
        // Before the ring and the inflight region are read: a previous back-end that still uses the image may change both
        // until the queue has locked it (rule I10.1).
        let queue = self.device.start_queue(index, config.layout.size(), config.features);
        let queue = queue.map_err(BackendError::system("serve a queue"))?;
        let areas = iommu.as_ref().map_or(&config.memory, |iommu| iommu.window.memory());
        let mut ring = TrackedRing::new(areas, config.layout, config.features, config.base).map_err(broken)?;
        if let Some(iommu) = &iommu {
            ring.set_iommu(iommu.ring_iommu(&config));
        }
        ring.set_log(config.logging.of_ring());
        let found = match &mut ring {
            TrackedRing::Packed(ring, _) if config.is_first_start && config.inflight.is_none() => {
                find_packed_position(index, &config, ring)
            }
            _ => Ok(()),
        };
        let goes_on = !ring.base().is_initial(config.features);
        if let Some(region) = &config.inflight {
            ring.track(region, index, config.is_first_start)?;
        }
        let was_used = ring.was_used();
        if config.is_first_start {
            self.device.ring_activated(was_used || goes_on, config.features);
        }
        if config.is_first_start && (was_used || goes_on) {
            mark_memory_if_log_is_new(index, &config, &ring);
        }
        let (inbox, wake) = (self.commands.clone(), self.wake.clone());
        let mut worker = Worker::new(index, inbox, wake, ring, queue, config, iommu);
        // A ring with an unknown position is treated as broken (rule I12).
        let recovered = found.and_then(|()| worker.recover());
        Ok((worker, recovered))
    }

    /// Serves a ring behind an IOMMU whenever its areas are translated, until it is stopped (rules T1, T3).
    pub(super) fn run_translated(&self, mut config: VringConfig, iotlb: &Arc<Iotlb>) -> RingBase {
        let (index, mut broken, mut enabled, mut refused) = (self.index, false, true, false);
        let mut misses = IotlbMisses::new(index, iotlb.clone(), config.frontend.clone());
        loop {
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    WorkerCommand::Logging(logging, done) => {
                        config.logging = logging;
                        let _ = done.send(());
                    }
                    WorkerCommand::Notifiers { call, error, done } => {
                        (config.call, config.error, config.call_changed) = (call, error, true);
                        let _ = done.send(());
                    }
                    WorkerCommand::Invalidate(_, done) => drop(done.send(())),
                    WorkerCommand::SetEnabled(now, done) => {
                        enabled = now;
                        let _ = done.send(());
                    }
                    WorkerCommand::Stop | WorkerCommand::Suspend | WorkerCommand::Abandon => return config.base,
                }
            }
            let window = if broken { Ok(None) } else { misses.map_areas(&mut config) };
            let opened = window.and_then(|window| match window {
                None => Ok(None),
                Some(window) => {
                    let misses = IotlbMisses::new(index, iotlb.clone(), config.frontend.clone());
                    self.start_worker(config.clone(), Some(MappedRing::new(misses, Arc::new(window)))).map(Some)
                }
            });
            match opened {
                Ok(Some((mut worker, recovered))) => {
                    worker.enabled = enabled;
                    match worker.run(recovered) {
                        StopReason::Commanded(base) => return base,
                        StopReason::Unmapped(left, done) => {
                            ParkedRing { config, broken, enabled } = *left;
                            (config.is_first_start, refused) = (false, false);
                            let _ = done.send(());
                        }
                    }
                }
                Ok(None) => self.wait_for_translation(&mut config, misses.poll_interval().filter(|_| !broken)),
                Err(error) => {
                    // The areas may be mapped later; the driver has lost nothing. The error is reported once.
                    broken = !matches!(error, BackendError::AccessRefused { .. });
                    if broken || !std::mem::replace(&mut refused, true) {
                        limited!(warn, "{}", with_causes(&error));
                        RingCounters::new(index).ring_broken();
                        if let Some(notifier) = &config.error {
                            notifier.signal();
                        }
                    }
                    if !broken {
                        self.wait_for_translation(&mut config, Some(REFUSAL_RETRY_INTERVAL));
                        misses.clear();
                    }
                }
            }
        }
    }

    /// Waits for a command, a kick or an IOTLB update.
    fn wait_for_translation(&self, config: &mut VringConfig, timeout_after: Option<Duration>) {
        let kick = config.kick.clone();
        let fds = [Some(self.wake.as_fd()), kick.as_ref().map(|kick| kick.as_fd())];
        let [_, kicked] = poll_readable(fds, poll_timeout(timeout_after));
        let _ = self.wake.read();
        if let Some(kick) = kick.filter(|_| kicked)
            && kick.take(self.index, &self.wake).is_err()
        {
            // The descriptor is unusable.
            config.kick = None;
        }
    }
}

/// Marks all guest memory if the log has no marks of a ring with a past: the log of the previous back-end, with its
/// marks, is then lost (rules L15.1, L15.2). Marks of other devices in the same log say nothing.
fn mark_memory_if_log_is_new(index: u16, config: &VringConfig, ring: &TrackedRing) {
    let Some(log) = config.logging.data.as_ref().filter(|_| !ring.is_used_marked()) else { return };
    limited!(
        warn,
        "ring {index}: the log of the previous back-end is lost: all guest memory is marked as written (rule L15.2)"
    );
    log.mark_memory(&config.memory);
}

/// Determines the position of a packed ring without an inflight region from its descriptors (rule I12), because the given
/// base may be stale.
fn find_packed_position(index: u16, config: &VringConfig, ring: &mut PackedDevice) -> Result<(), BackendError> {
    let in_order = config.features.contains(VIRTIO_F_IN_ORDER);
    if !in_order && ring.find_position().map_err(|source| BackendError::BrokenRing { index, source })? {
        let base = ring.base();
        limited!(
            warn,
            "ring {index} resumes at {base:?}, determined from its descriptors, instead of its base (rule I12.2)"
        );
    }
    Ok(())
}
