//! The dirty log of a session, and the logs of each ring (rules L3, L6, L9).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::ring::{SessionRing, logs_used};
use super::{Logging, Session, VringController};
use crate::abi::vhost_user::{LogDescription, VHOST_F_LOG_ALL};
use crate::backend::BackendError;
use crate::dirty::Log;
use crate::memory::GuestAddress;
use crate::sys::log_limit::limited;

impl Session {
    pub(super) fn set_log_base(
        &mut self,
        description: &LogDescription,
        fd: &OwnedFd,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        let log = Arc::new(Log::map(fd.as_fd(), description.mmap_size, description.mmap_offset)?);
        self.report_lost_pages();
        let old = self.log.replace(log.clone());
        self.out_of_range_pages = Arc::default();
        self.check_log_size();
        self.update_logging(rings);
        // Nothing writes the old log any more. If the front-end released it before a ring was started, it does not read what
        // was marked in it since (rule L9.3).
        if let Some(old) = old.filter(|_| self.is_logging()) {
            old.copy_to(&log);
        }
        if std::mem::take(&mut self.unlogged) {
            limited!(warn, "rings ran before there was a log: all guest memory is logged as written (rule L8.3)");
            log.mark_memory(&self.memory);
        }
        Ok(())
    }

    /// Returns true if logging is wanted for data or for a used ring.
    fn is_logging(&self) -> bool {
        self.features.contains(VHOST_F_LOG_ALL) || self.rings.iter().any(SessionRing::logs_used_ring)
    }

    /// Records that a ring runs whose writes should be logged, and that there is no log (rule L8.3).
    pub(super) fn note_unlogged(&mut self) {
        let log_all = self.features.contains(VHOST_F_LOG_ALL);
        let runs = self.rings.iter().any(|ring| ring.running && (log_all || ring.logs_used_ring()));
        self.unlogged |= runs && self.log.is_none();
    }

    pub(super) fn check_log_size(&self) {
        if let Some(log) = &self.log
            && log.pages().saturating_mul(crate::memory::LOG_PAGE) < self.memory.end().0
        {
            let (pages, end) = (log.pages(), self.memory.end().0);
            limited!(
                warn,
                "the log has {pages} pages, memory ends at {end:#x}: writes behind the log are lost (rule L6.2)"
            );
        }
    }

    pub(super) fn report_lost_pages(&self) {
        if let Some(lost) = self.log.as_ref().map(|log| log.out_of_range()).filter(|&lost| lost > 0) {
            limited!(error, "{lost} pages outside the log were written and not logged (rule L6.2)");
        }
    }

    /// Passes the current logs to the running rings.
    pub(super) fn update_logging(&self, rings: &mut dyn VringController) {
        for (index, ring) in (0..).zip(&self.rings).filter(|(_, ring)| ring.running) {
            rings.set_logging(index, self.logging(ring));
        }
    }

    pub(super) fn logging(&self, ring: &SessionRing) -> Logging {
        let used = ring.addr.filter(logs_used).zip(self.log.clone());
        Logging {
            data: self.log.clone().filter(|_| self.features.contains(VHOST_F_LOG_ALL)),
            used: used.map(|(addr, log)| (log, GuestAddress(addr.log_guest_addr))),
            signal: self.log_signal.clone(),
            out_of_range_pages: self.out_of_range_pages.clone(),
        }
    }
}
