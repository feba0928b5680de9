//! What a migration needs from whoever owns a guest: a VMM, or the built-in guest.

use crate::dirty::DirtySource;
use crate::memory::Memory;
use crate::stream::CancelToken;

/// What went wrong inside the machine, in words for its user.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// A guest at the source.
///
/// Calls come in this order: [`memory`](SourceVm::memory), [`is_running`](SourceVm::is_running),
/// [`dirty_source`](SourceVm::dirty_source), then [`pause`](SourceVm::pause), again only after [`resume`](SourceVm::resume). A migration that fails before
/// its commit has it undone by [`resume`](SourceVm::resume), one whose destination has said that it runs the guest ends
/// with [`release`](SourceVm::release). If what came of the commit stays unknown, neither is called: the guest stays
/// paused, and whoever owns it decides.
pub trait SourceVm {
    /// The guest's memory. It must not change until the migration has ended.
    ///
    /// Holes are found in regions made by [`Region::share`](crate::memory::Region::share). Others are read as a whole, and
    /// take all their memory from then on.
    fn memory(&self) -> Memory;

    /// Returns true if the guest's CPUs run. Those of a guest that was paused before are not started at the destination.
    fn is_running(&self) -> bool {
        true
    }

    /// What keeps the guest from being stopped now, in words for its user: a device whose back-end is away. The migration
    /// then sends further rounds instead of stopping the guest, one every 2 seconds, and fails after 60 seconds.
    fn blocker(&self) -> Option<String> {
        None
    }

    /// Everything that can dirty guest memory, as one source: the migration starts and stops it.
    ///
    /// # Errors
    /// If dirty pages can't be tracked; the migration then ends and the guest goes on.
    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError>;

    /// What is known of the guest's devices while it runs, in whatever form the destination's
    /// [`IncomingVm::prepare_devices`] reads, at most 1 MiB; `None` if nothing needs to be prepared.
    ///
    /// # Errors
    /// If it can't be had; the migration then ends and the guest goes on.
    fn devices(&mut self) -> Result<Option<Vec<u8>>, VmError> {
        Ok(None)
    }

    /// Stops everything that can write guest memory: CPUs and drivers first, then every ring of every device, drained
    /// (rule R3.3). A device that hangs must not keep this from returning once the migration is cancelled.
    ///
    /// # Errors
    /// If something can't be stopped; [`resume`](SourceVm::resume) is called then. If there is an
    /// [`blocker`](SourceVm::blocker) by then, the migration goes on with further rounds and calls this again.
    fn pause(&mut self) -> Result<(), VmError>;

    /// The state of CPUs and devices of a paused guest, in whatever form the destination's [`IncomingVm`] reads.
    ///
    /// # Errors
    /// If it can't be had; [`resume`](SourceVm::resume) is called then.
    fn state(&mut self) -> Result<Vec<u8>, VmError>;

    /// What the user should know of the state that was saved last, in words; told as [`MigrationEvent::Warning`](super::MigrationEvent::Warning).
    fn warnings(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Undoes all of [`pause`](SourceVm::pause), also of one that failed half-way: the guest goes on as if nothing had
    /// happened. A guest that was paused before stays so.
    ///
    /// # Errors
    /// If the guest can't go on here. It must stay whole: this is tried again.
    fn resume(&mut self) -> Result<(), VmError>;

    /// The guest runs at the destination, or is in a file, and must never run here again.
    fn release(&mut self);
}

/// A region of guest memory that is on its way.
pub use crate::stream::record::RegionLayout;

/// A guest at the destination.
///
/// Calls come in this order: [`prepare`](IncomingVm::prepare), [`prepare_devices`](IncomingVm::prepare_devices) if the source has said
/// something of them, [`restore`](IncomingVm::restore), [`start`](IncomingVm::start).
/// Until `start` everything can still be dropped, and the source goes on. From then on the guest belongs here.
/// A device that hangs must not keep any of them from returning once the migration is cancelled.
pub trait IncomingVm {
    /// Makes the guest's memory, zeroed, with exactly these regions.
    ///
    /// # Errors
    /// If this host can't; the source is told why.
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError>;

    /// Prepares devices, as far as [`SourceVm::devices`] tells, while the guest runs at the source and memory arrives: what is done
    /// here does not count as downtime. Nothing may be restored or run yet.
    ///
    /// # Errors
    /// If the devices here don't fit; the source is told why and goes on.
    fn prepare_devices(&mut self, devices: &[u8]) -> Result<(), VmError> {
        let _ = devices;
        Ok(())
    }

    /// Restores CPUs and devices from what [`SourceVm::state`] saved; all memory is in place. Nothing may run yet.
    /// Everything that could make [`start`](IncomingVm::start) fail is to be tried here: the source still has the guest.
    ///
    /// # Errors
    /// If the state does not fit; the source is told why and goes on.
    fn restore(&mut self, state: &[u8]) -> Result<(), VmError>;

    /// The migration is committed: the guest goes on here, its CPUs only if `run` says so. Returns how long it stood
    /// still by its own clock, in nanoseconds, if that clock is the source's too. A device that hangs must not keep this
    /// from returning once `cancel` is used.
    ///
    /// # Errors
    /// If the guest can't be started. It must stay whole and paused: this is tried again, unless it was cancelled, and
    /// then up to the operator.
    fn start(&mut self, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError>;
}
