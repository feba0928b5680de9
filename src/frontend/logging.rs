//! A device's log as a source of dirty pages, also while its back-end is being restarted.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Device, FrontendError, counters};
use crate::dirty::{DirtyError, DirtySource, Harvest, Log, PageSet};

/// A device that several threads use, none of them on a data path.
pub trait SharedDevice: Send {
    /// Calls `ask` with the device. Whoever connects again to restarted back-ends does so here, and calls once more.
    ///
    /// # Errors
    /// What `ask` reports.
    fn with(&self, ask: &mut dyn FnMut(&mut dyn Device) -> Result<(), FrontendError>) -> Result<(), FrontendError>;

    /// Ends logging. A device whose back-end is away is not waited for: it logs nothing when it is back.
    ///
    /// # Errors
    /// What the device reports.
    fn stop_logging(&self) -> Result<(), FrontendError> {
        self.with(&mut |device| device.stop_logging())
    }
}

/// A device whose back-end is not restarted.
impl SharedDevice for Arc<Mutex<Box<dyn Device>>> {
    fn with(&self, ask: &mut dyn FnMut(&mut dyn Device) -> Result<(), FrontendError>) -> Result<(), FrontendError> {
        // A thread that panicked while it held the device left it as the last completed call did.
        ask(self.lock().unwrap_or_else(PoisonError::into_inner).as_mut())
    }
}

/// The dirty pages of one device, from a log of its own, so that reports can tell devices apart.
pub struct DeviceDirtySource {
    device: Box<dyn SharedDevice>,
    name: String,
    memory_end: u64,
    log: Option<(Arc<Log>, OwnedFd)>,
}

impl DeviceDirtySource {
    /// The log of `device`, called `name` in reports, whose guest memory ends at `memory_end`. Nothing happens before
    /// [`start`](DirtySource::start).
    pub fn new(device: impl SharedDevice + 'static, name: impl Into<String>, memory_end: u64) -> DeviceDirtySource {
        DeviceDirtySource { device: Box::new(device), name: name.into(), memory_end, log: None }
    }

    fn failed(&self, cause: FrontendError) -> DirtyError {
        DirtyError::Source { name: self.name.clone(), cause: cause.into() }
    }
}

impl DirtySource for DeviceDirtySource {
    fn start(&mut self) -> Result<(), DirtyError> {
        let (log, fd) = Log::create(self.memory_end)?;
        let log = Arc::new(log);
        let started = self.device.with(&mut |device| device.start_logging(&log, fd.as_fd()));
        started.map_err(|cause| self.failed(cause))?;
        self.log = Some((log, fd));
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        let found = self.log.as_ref().map_or_else(Harvest::default, |(log, _)| log.harvest(into));
        counters::harvested(&self.name, found.pages);
        Ok(found)
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        let found = self.log.as_ref().map_or_else(Harvest::default, |(log, _)| log.harvest_stopped(into));
        counters::harvested(&self.name, found.pages);
        Ok(found)
    }

    fn put_back(&mut self, pages: &PageSet) {
        if let Some((log, _)) = &self.log {
            log.put_back(pages);
        }
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.log = None;
        self.device.stop_logging().map_err(|cause| self.failed(cause))
    }

    fn name(&self) -> &str {
        &self.name
    }
}
