//! A device's log as a source of dirty pages, also while its back-end is being restarted.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Device, FrontendError};
use crate::dirty::{DirtyError, DirtySource, Harvest, Log, PageSet};
use crate::memory::LOG_PAGE;

/// A device that control threads share. No data path locks it.
pub type SharedDevice = Arc<Mutex<Box<dyn Device>>>;

/// How long a back-end may take to come back before a call on its device fails.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Calls `ask` until it succeeds, connecting again whenever the back-end hangs up meanwhile, for [`PATIENCE`].
///
/// # Errors
/// What `ask` reports if it is no hang-up, or what [`Device::reconnect`] reports.
pub fn insist<T>(
    device: &mut dyn Device,
    mut ask: impl FnMut(&mut dyn Device) -> Result<T, FrontendError>,
) -> Result<T, FrontendError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(device) {
            Err(error) if error.is_hang_up() && Instant::now() < deadline => {
                device.reconnect(deadline)?;
            }
            other => return other,
        }
    }
}

/// The dirty pages of one device, from a log of its own, so that reports can tell devices apart.
pub struct DeviceLog {
    device: SharedDevice,
    name: String,
    memory_end: u64,
    log: Option<(Arc<Log>, OwnedFd)>,
}

impl DeviceLog {
    /// The log of `device`, whose guest memory ends at `memory_end`. Nothing happens before
    /// [`start`](DirtySource::start).
    pub fn new(device: SharedDevice, memory_end: u64) -> DeviceLog {
        let name = lock(&device).name().to_owned();
        DeviceLog { device, name, memory_end, log: None }
    }

    fn failed(&self, cause: FrontendError) -> DirtyError {
        DirtyError::Source { name: self.name.clone(), cause: cause.into() }
    }
}

fn lock(device: &SharedDevice) -> MutexGuard<'_, Box<dyn Device>> {
    // A thread that panicked while it held the device left it as the last completed call did.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DirtySource for DeviceLog {
    fn start(&mut self) -> Result<(), DirtyError> {
        let (log, fd) = Log::create(self.memory_end)?;
        let log = Arc::new(log);
        insist(lock(&self.device).as_mut(), |device| device.start_logging(&log, fd.as_fd()))
            .map_err(|cause| self.failed(cause))?;
        self.log = Some((log, fd));
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        Ok(self.log.as_ref().map_or_else(Harvest::default, |(log, _)| log.harvest(into)))
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        Ok(self.log.as_ref().map_or_else(Harvest::default, |(log, _)| log.harvest_stopped(into)))
    }

    fn put_back(&mut self, pages: &PageSet) {
        if let Some((log, _)) = &self.log {
            pages.runs().for_each(|run| log.mark(run.start * LOG_PAGE, (run.end - run.start) * LOG_PAGE));
        }
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.log = None;
        insist(lock(&self.device).as_mut(), |device| device.stop_logging()).map_err(|cause| self.failed(cause))
    }

    fn name(&self) -> &str {
        &self.name
    }
}
