//! The dirty log of a device as a [`DirtySource`], including while its back-end restarts.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Device, FrontendError, counters};
use crate::dirty::{DirtyError, DirtySource, Harvest, Log, LogQuality, PageSet};
use crate::memory::GuestAddress;

/// A device shared between threads, none of which is on a data path.
pub trait SharedDevice: Send {
    /// Calls `ask` with the device. An implementation that reconnects to restarted back-ends does so here and repeats
    /// the call.
    ///
    /// # Errors
    /// The error of `ask`.
    fn with(&self, ask: &mut dyn FnMut(&mut dyn Device) -> Result<(), FrontendError>) -> Result<(), FrontendError>;

    /// Stops logging. Does not wait for a back-end that is disconnected: after a reconnection nothing is logged.
    ///
    /// # Errors
    /// The error of the device.
    fn stop_logging(&self) -> Result<(), FrontendError> {
        self.with(&mut |device| device.stop_logging())
    }
}

/// A device without reconnection.
impl SharedDevice for Arc<Mutex<Box<dyn Device>>> {
    fn with(&self, ask: &mut dyn FnMut(&mut dyn Device) -> Result<(), FrontendError>) -> Result<(), FrontendError> {
        // A thread that panicked while holding the lock left the device as after its last completed call.
        ask(self.lock().unwrap_or_else(PoisonError::into_inner).as_mut())
    }
}

/// The dirty pages of one device, from a log that only this device writes, so that reports can tell devices apart.
pub struct DeviceDirtySource {
    device: Box<dyn SharedDevice>,
    name: String,
    memory_end: GuestAddress,
    log: Option<(Arc<Log>, OwnedFd)>,
    /// Quality of the last log.
    quality: LogQuality,
}

impl DeviceDirtySource {
    /// Creates the source for `device`, named `name` in reports, whose guest memory ends at `memory_end`. Logging
    /// begins with [`start`](DirtySource::start).
    pub fn new(
        device: impl SharedDevice + 'static,
        name: impl Into<String>,
        memory_end: GuestAddress,
    ) -> DeviceDirtySource {
        let (device, name, quality) = (Box::new(device), name.into(), LogQuality::default());
        DeviceDirtySource { device, name, memory_end, log: None, quality }
    }

    fn failed(&self, cause: FrontendError) -> DirtyError {
        DirtyError::Source { name: self.name.clone(), cause: cause.into() }
    }
}

impl DirtySource for DeviceDirtySource {
    fn start(&mut self) -> Result<(), DirtyError> {
        let (log, fd) = Log::create(self.memory_end)?;
        let log = Arc::new(log);
        let mut quality = None;
        let started = self.device.with(&mut |device| {
            quality = device.log_quality();
            device.start_logging(&log, fd.as_fd())
        });
        started.map_err(|cause| self.failed(cause))?;
        self.quality = quality.unwrap_or_default();
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

    fn log_quality(&self) -> LogQuality {
        self.quality
    }
}
