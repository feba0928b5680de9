//! What a session tells the rings of a device: to start, with all that takes, to stop, and where to log.
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::super::{BackendError, FrontendHandle, Kick, Notifier};
use crate::dirty::{Log, LogSignal};
use crate::inflight;
use crate::memory::{Iotlb, Memory};
use crate::ring::{RingBase, RingLayout, RingLog};

/// Everything a ring needs to run.
#[derive(Debug, Clone)]
pub struct VringConfig {
    /// Where the ring lies, guest-physical.
    pub layout: RingLayout,
    /// Where it goes on, unless `inflight` knows better (rule I3.4).
    pub base: RingBase,
    /// Acknowledged features.
    pub features: u64,
    /// Guest memory.
    pub memory: Memory,
    /// Where writes are logged.
    pub logging: Logging,
    /// Readable when there are new requests.
    pub kick: Option<Arc<Kick>>,
    /// Whether the ring is to be looked at every now and then: there is no kick, and [`VringController::kick`] isn't called either.
    pub is_polled: bool,
    /// Signalled when requests were used.
    pub call: Option<Arc<Notifier>>,
    /// True if `call` came while the ring did not run.
    pub call_changed: bool,
    /// Whether the driver was to be notified before, also when the ring ran the last time (rule R10.2).
    pub has_notified: Arc<AtomicBool>,
    /// Signalled when the ring breaks.
    pub error: Option<Arc<Notifier>>,
    /// Where requests in flight are noted.
    pub inflight: Option<Arc<inflight::InflightRegion>>,
    /// Whether it runs on this connection for the first time: if it has a past, that was another back-end's.
    pub is_first_start: bool,
    /// Whether guest memory is still on its way: nobody may wait for the ring where pages are waited for (rule P1.6).
    pub in_postcopy: bool,
    /// The front-end, to be told or asked something.
    pub frontend: Arc<FrontendHandle>,
    /// With ACCESS_PLATFORM acknowledged: what is known of the IOMMU. All addresses of the ring are I/O virtual then.
    pub iotlb: Option<Arc<Iotlb>>,
}

/// Where a ring's writes are logged. Nothing is logged by default.
#[derive(Debug, Clone, Default)]
pub struct Logging {
    /// The log for data, while LOG_ALL is acknowledged (rule L3.1).
    pub data: Option<Arc<Log>>,
    /// The log for the used ring, and the address it is logged under, while the ring's F_LOG is set (rules L3.2, L3.3).
    pub used: Option<(Arc<Log>, u64)>,
    /// Signalled after logging (rule L12.1).
    pub signal: Option<Arc<LogSignal>>,
    /// How many pages outside the log have been reported; one for all rings (rule L6.2).
    pub out_of_range_pages: Arc<AtomicU64>,
}

impl Logging {
    /// The log as a ring needs it for its own writes.
    pub(in crate::backend) fn of_ring(&self) -> Option<RingLog> {
        self.used.clone().map(|(log, used_gpa)| RingLog { log, used_gpa })
    }
}

/// The rings of a device, as a session commands them. Every call returns when it has taken effect: what a ring wrote
/// before is written, and it does nothing more by its old orders (rules R3.3, L9.1).
pub trait VringController {
    /// Something that is no ring is about to take time.
    fn before_blocking(&mut self) {}

    /// Makes ready what a ring takes to run, which is likely to be started.
    fn prepare(&mut self, index: u16) {
        let _ = index;
    }

    /// Lets a ring run that doesn't.
    ///
    /// # Errors
    /// What the system says; the ring then doesn't run.
    fn start(&mut self, index: u16, setup: VringConfig) -> Result<(), BackendError>;

    /// Completes, logs and publishes all requests of a running ring, stops it, and tells where it goes on (rules R3.1, R3.2).
    ///
    /// # Errors
    /// When that can't be told. The ring doesn't run then either.
    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError>;

    /// Stops a running ring as soon as nothing reaches into guest memory any more, and leaves what is not complete by then
    /// marked in the inflight region (rules I8.2, I8.6). Tells where the ring goes on. One without a region is drained.
    ///
    /// # Errors
    /// As [`VringController::stop`].
    fn suspend(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.stop(index)
    }

    /// Whether a running ring is to leave new requests alone.
    fn set_enabled(&mut self, index: u16, yes: bool) {
        let _ = (index, yes);
    }

    /// Changes where a running ring logs (rule L9.1).
    fn set_logging(&mut self, index: u16, logging: Logging);

    /// Finishes what uses these addresses, whose translations are gone (rule T3.2).
    fn invalidate(&mut self, iovas: &RangeInclusive<u64>);

    /// Has a running ring look for new requests (rule B3.2), or for translations that it lacked.
    fn kick(&mut self, index: u16);

    /// Changes what a running ring signals.
    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>);
}
