//! The interface between a session and the rings of its device: configuration, start and stop, logging.
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::abi::virtio::VirtioFeatures;
use crate::backend::{BackendError, FrontendHandle, Kick, Notifier};
use crate::dirty::{Log, LogSignal};
use crate::inflight;
use crate::memory::{GuestAddress, Iotlb, Iova, Memory};
use crate::ring::{RingBase, RingLayout, RingLog};

/// The configuration with which a ring starts.
#[derive(Debug, Clone)]
pub struct VringConfig {
    /// Guest-physical addresses and sizes of the ring's areas.
    pub layout: RingLayout,
    /// The base at which the ring resumes, unless `inflight` determines it (rule I3.4).
    pub base: RingBase,
    /// Acknowledged features.
    pub features: VirtioFeatures,
    /// Guest memory.
    pub memory: Memory,
    /// The logs of the ring's writes.
    pub logging: Logging,
    /// The kick eventfd.
    pub kick: Option<Arc<Kick>>,
    /// True if the ring must be polled: it has no kick eventfd, and [`VringController::kick`] is not called either
    /// (rule B3.7).
    pub is_polled: bool,
    /// Signalled when requests were used.
    pub call: Option<Arc<Notifier>>,
    /// True if `call` was set while the ring was stopped.
    pub call_changed: bool,
    /// True if the driver has ever been notified, also before a restart of the ring (rule R10.1).
    pub has_notified: Arc<AtomicBool>,
    /// Signalled when the ring breaks.
    pub error: Option<Arc<Notifier>>,
    /// The inflight region.
    pub inflight: Option<Arc<inflight::InflightRegion>>,
    /// True if the ring has not run on this connection. If it has a past, another back-end has served it.
    pub is_first_start: bool,
    /// True while guest memory is incomplete. The control thread must then not wait for the ring (rule P1.7).
    pub in_postcopy: bool,
    /// The front-end, for requests over the back-end channel.
    pub frontend: Arc<FrontendHandle>,
    /// The IOTLB, with ACCESS_PLATFORM acknowledged. All addresses of the ring are then I/O virtual (rule T1.1).
    pub iotlb: Option<Arc<Iotlb>>,
}

/// The logs of a ring's writes. By default nothing is logged.
#[derive(Debug, Clone, Default)]
pub struct Logging {
    /// The log for data, while LOG_ALL is acknowledged (rule L3.1).
    pub data: Option<Arc<Log>>,
    /// The log for used-ring writes with `log_guest_addr`, while VHOST_VRING_F_LOG is set (rule L3.2).
    pub used: Option<(Arc<Log>, GuestAddress)>,
    /// Signalled after logging (rule L12.1).
    pub signal: Option<Arc<LogSignal>>,
    /// Number of pages outside the log that were reported, shared by all rings (rule L6.2).
    pub out_of_range_pages: Arc<AtomicU64>,
}

impl Logging {
    /// Returns the log of the ring's own writes.
    pub(in crate::backend) fn of_ring(&self) -> Option<RingLog> {
        self.used.clone().map(|(log, used_gpa)| RingLog { log, used_gpa })
    }
}

/// Controls the rings of a device. Each call returns once it has taken effect: writes under the former configuration
/// have been made, and no others follow (rules R3.3, L9.1).
pub trait VringController {
    /// Called before an operation other than a ring command that may block.
    fn before_blocking(&mut self) {}

    /// Prepares a ring that is likely to be started.
    fn prepare(&mut self, index: u16) {
        let _ = index;
    }

    /// Starts a stopped ring.
    ///
    /// # Errors
    /// The error of the system. The ring is then stopped.
    fn start(&mut self, index: u16, config: VringConfig) -> Result<(), BackendError>;

    /// Stops a running ring: completes, logs and publishes all its requests (rule R3.2). Returns its base.
    ///
    /// # Errors
    /// An error if the base is not known. The ring is stopped nevertheless.
    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError>;

    /// Stops a running ring once nothing accesses guest memory any more, and leaves incomplete requests marked in the
    /// inflight region (rule I8.2). Returns its base. A ring without a region is drained (rule I8.6).
    ///
    /// # Errors
    /// As [`VringController::stop`].
    fn suspend(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.stop(index)
    }

    /// Sets whether a running ring takes new requests.
    fn set_enabled(&mut self, index: u16, enabled: bool) {
        let _ = (index, enabled);
    }

    /// Changes the logs of a running ring (rule L9.1).
    fn set_logging(&mut self, index: u16, logging: Logging);

    /// Completes requests that use these addresses, whose translations are invalid (rule T3.2).
    fn invalidate(&mut self, iovas: &RangeInclusive<Iova>);

    /// Makes a running ring look for requests (rule B3.2), or for translations that it lacked.
    fn kick(&mut self, index: u16);

    /// Changes the call and error notifiers of a running ring.
    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>);
}
