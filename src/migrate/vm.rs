//! Traits that the owner of a guest implements: a VMM, or the built-in guest.

use crate::dirty::DirtySource;
use crate::memory::Memory;
use crate::stream::CancelToken;

/// An error of a VM, with a text for the user.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// A guest at the source.
///
/// Order of the calls: [`set_cancel`](SourceVm::set_cancel), [`memory`](SourceVm::memory),
/// [`is_running`](SourceVm::is_running), [`dirty_source`](SourceVm::dirty_source), then [`pause`](SourceVm::pause), which is called again only after
/// [`resume`](SourceVm::resume). A migration that fails before its commit ends with [`resume`](SourceVm::resume), a
/// migration whose destination confirms that it runs the guest with [`release`](SourceVm::release). If the outcome of
/// the commit is unknown, neither is called: the guest stays paused, and its owner decides.
pub trait SourceVm {
    /// Receives the connection's token. When it is cancelled, all calls must return even if a device hangs.
    fn set_cancel(&mut self, cancel: &CancelToken) {
        let _ = cancel;
    }

    /// Returns the guest's memory. Its regions must not change until the migration has ended.
    ///
    /// Holes are detected in regions made by [`Region::share`](crate::memory::Region::share). Other regions are read
    /// completely, which allocates all their memory.
    fn memory(&self) -> Memory;

    /// Returns true if the guest's CPUs run. A guest that was paused before the migration stays paused at the
    /// destination.
    fn is_running(&self) -> bool {
        true
    }

    /// Returns the reason that the guest cannot be stopped now: a device whose back-end is unavailable, for example.
    /// The migration then sends further rounds instead of stopping the guest, one every 2 s, and fails after 60 s.
    fn blocker(&self) -> Option<String> {
        None
    }

    /// Returns one source for everything that can dirty guest memory. The migration starts and stops it. A log that an
    /// earlier migration has used is harvested first, see [`LogSource`](crate::dirty::LogSource).
    ///
    /// # Errors
    /// If dirty pages cannot be tracked. The migration then fails and the guest keeps running.
    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError>;

    /// Describes the guest's devices while the guest runs, in the format of the destination's
    /// [`IncomingVm::prepare_devices`], at most 1 MiB. Returns `None` if nothing needs to be prepared.
    ///
    /// # Errors
    /// If the description is not available. The migration then fails and the guest keeps running.
    fn devices(&mut self) -> Result<Option<Vec<u8>>, VmError> {
        Ok(None)
    }

    /// Stops everything that can write guest memory: CPUs and drivers first, then every ring of every device, drained
    /// (rule R3.1).
    ///
    /// # Errors
    /// If something cannot be stopped; [`resume`](SourceVm::resume) is called then. If there is a
    /// [`blocker`](SourceVm::blocker) at that time, the migration continues with further rounds and calls this again.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Returns the state of CPUs and devices of a paused guest, in the format of the destination's [`IncomingVm`].
    ///
    /// # Errors
    /// If the state is not available; [`resume`](SourceVm::resume) is called then.
    fn state(&mut self) -> Result<Vec<u8>, VmError>;

    /// Returns warnings for the user about the state that was saved last. Reported as
    /// [`MigrationEvent::Warning`](super::MigrationEvent::Warning).
    fn warnings(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Undoes [`pause`](SourceVm::pause), also one that failed halfway: the guest continues as if nothing had happened.
    /// A guest that was paused before stays paused.
    ///
    /// # Errors
    /// If the guest cannot resume here. It must stay intact, because `resume` is tried again.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Releases the guest, which runs at the destination or is saved in a file. It must never run here again.
    fn release(&mut self);
}

/// A region of guest memory at the destination.
pub use crate::stream::record::RegionLayout;

/// A guest at the destination.
///
/// Order of the calls: [`set_cancel`](IncomingVm::set_cancel), [`prepare`](IncomingVm::prepare),
/// [`prepare_devices`](IncomingVm::prepare_devices) if the source has described its devices,
/// [`restore`](IncomingVm::restore), [`start`](IncomingVm::start). Until `start` everything can be dropped, and the
/// source resumes the guest. From then on the guest belongs to this side.
pub trait IncomingVm {
    /// Receives the connection's token. When it is cancelled, all calls before [`start`](IncomingVm::start) must return
    /// even if a device hangs.
    fn set_cancel(&mut self, cancel: &CancelToken) {
        let _ = cancel;
    }

    /// Creates the guest's memory, zeroed, with exactly these regions.
    ///
    /// # Errors
    /// If this host cannot provide the memory. The source receives the reason.
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError>;

    /// Prepares the devices described by [`SourceVm::devices`] while the guest runs at the source and memory arrives.
    /// This time does not count as downtime. Nothing may be restored or run yet.
    ///
    /// # Errors
    /// If the devices here do not fit. The source receives the reason and keeps the guest running.
    fn prepare_devices(&mut self, devices: &[u8]) -> Result<(), VmError> {
        let _ = devices;
        Ok(())
    }

    /// Restores CPUs and devices from the state of [`SourceVm::state`]. All memory has arrived. Nothing may run yet.
    /// Everything that could make [`start`](IncomingVm::start) fail is to be tried here, while the source still has the
    /// guest.
    ///
    /// # Errors
    /// If the state does not fit. The source receives the reason and resumes the guest.
    fn restore(&mut self, state: &[u8]) -> Result<(), VmError>;

    /// Starts the guest after the commit, its CPUs only if `run` is true. Returns the guest's downtime by its own clock
    /// in nanoseconds, if that clock is the source's too. It must return after `cancel` is used even if a device hangs.
    ///
    /// # Errors
    /// If the guest cannot be started. It must stay intact and paused: `start` is tried again, unless it was cancelled;
    /// after that the operator decides.
    fn start(&mut self, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError>;
}
