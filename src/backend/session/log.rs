//! The log as messages give it, and which ring writes what of it (rules L3, L6, L9).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tracing::{error, warn};

use super::super::BackendError;
use super::ring::{Ring, logs_used};
use super::{LOG_ALL, Logging, Rings, Session};
use crate::abi::vhost_user::LogDescription;
use crate::dirty::Log;

impl Session {
    pub(super) fn set_log_base(
        &mut self,
        description: &LogDescription,
        fd: &OwnedFd,
        rings: &mut dyn Rings,
    ) -> Result<(), BackendError> {
        let log = Log::map(fd.as_fd(), description.mmap_size, description.mmap_offset)?;
        self.report_lost_pages();
        (self.log, self.lost) = (Some(Arc::new(log)), Arc::default());
        self.check_log_size();
        self.relog(rings);
        Ok(())
    }

    pub(super) fn check_log_size(&self) {
        if let Some(log) = &self.log
            && log.pages().saturating_mul(crate::memory::LOG_PAGE) < self.memory.end()
        {
            let (pages, end) = (log.pages(), self.memory.end());
            warn!("the log has {pages} pages, memory ends at {end:#x}: writes behind the log are lost (rule L6)");
        }
    }

    pub(super) fn report_lost_pages(&self) {
        if let Some(lost) = self.log.as_ref().map(|log| log.out_of_range()).filter(|&lost| lost > 0) {
            error!("{lost} pages outside the log were written and not logged (rule L6)");
        }
    }

    /// Tells the running rings where to log now.
    pub(super) fn relog(&self, rings: &mut dyn Rings) {
        for (index, ring) in (0..).zip(&self.rings).filter(|(_, ring)| ring.running) {
            rings.set_logging(index, self.logging(ring));
        }
    }

    pub(super) fn logging(&self, ring: &Ring) -> Logging {
        let used = ring.addr.filter(logs_used).zip(self.log.clone());
        Logging {
            data: self.log.clone().filter(|_| self.features & LOG_ALL != 0),
            used: used.map(|(addr, log)| (log, addr.log_guest_addr)),
            signal: self.log_signal.clone(),
            lost: self.lost.clone(),
        }
    }
}
