//! To drive a device: the [`Device`] trait, and what implements it.
//!
//! Here: what a VMM, a migration or the built-in guest asks of a vhost device, whatever it is reached through, and the
//! vhost-user client ([`UserDevice`]). Not here: how a device serves requests, and what a guest does with one.
#![forbid(unsafe_code)]

mod counters;
mod error;
mod interrupt;
mod iommu;
mod logging;
mod user;

#[cfg(feature = "metrics")]
pub use counters::describe_counters;
pub use error::FrontendError;
pub use interrupt::Interrupt;
pub use iommu::{Iommu, Mapping};
pub use logging::{DeviceDirtySource, SharedDevice};
pub use user::{BackendAddresses, UserDevice, UserOptions};

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::abi::vhost_user::{BackendRequest, DiskGeneration};
use crate::dirty::Log;
use crate::memory::Memory;
use crate::ring::RingBase;

/// What a ring needs to be started. All addresses are guest-physical, or I/O virtual where ACCESS_PLATFORM was acknowledged
/// (rule T1.7).
#[derive(Clone, Debug)]
pub struct RingSetup {
    /// Entries.
    pub size: u16,
    /// Descriptor table (packed: the descriptor ring).
    pub desc: u64,
    /// Available ring (packed: the driver's event area).
    pub avail: u64,
    /// Used ring (packed: the device's event area); its writes are logged at this address while logging is on.
    pub used: u64,
    /// Eventfd that the driver writes when there are new buffers.
    pub kick: Arc<OwnedFd>,
    /// Eventfd that the device writes when buffers were used.
    pub call: Arc<OwnedFd>,
    /// Eventfd that the device writes when it finds the ring broken: it then does nothing more until the ring is stopped
    /// and started.
    pub error: Option<Arc<OwnedFd>>,
    /// Where the device goes on (rules R4.1, R4.2).
    pub base: RingBase,
}

/// What a device says without having been asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DeviceEvent {
    /// Its configuration space has changed: read it again.
    ConfigChanged,
    /// This ring is broken, said over the channel (rule B3.2); its error fd has been signalled too.
    RingBroken(u16),
    /// It may not access this I/O virtual address as it wanted to: the [`Iommu`] has no translation, or one that permits
    /// less. The ring that needed it stands still (rule T1.4).
    AccessFailed(u64),
    /// It wanted this ring's kicks on a page of its own, and was told no (rule B4.2).
    HostNotifierRefused(u16),
    /// It asked for something that is not known here, and was told no.
    RequestRefused(BackendRequest),
    /// It broke the protocol, and can't say anything until the next connection.
    ChannelBroken(&'static str),
}

/// An inflight region's contents, to be moved with a device whose rings are stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    /// Queues it covers.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Its bytes.
    pub contents: Vec<u8>,
}

/// What a reconnection found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Reconnection {
    /// Requests that the inflight region had marked: those the new back-end executes again, and at most one batch
    /// whose completion the guest has already seen.
    pub resubmitted: u64,
    /// Connections that were tried until one held; 0 if the old one still does.
    pub attempts: u32,
}

/// A vhost device as whoever drives it sees it.
///
/// The device remembers what it was told. When a call fails with [`FrontendError::is_hang_up`], memory, features,
/// started rings, the inflight region and the log stay noted (a log that was being installed is not, a ring that was
/// being stopped counts as running): [`reconnect`](Device::reconnect), then repeat the call. The same holds for
/// [`FrontendError::Interrupted`], but a ring that was being started counts as running then: it is not started again.
pub trait Device: Send {
    /// What to call it in messages: a path.
    fn name(&self) -> &str;

    /// Virtio and vhost feature bits offered.
    fn features(&self) -> u64;

    /// Virtio feature bits that [`set_features`](Device::set_features) acknowledged.
    fn acked_features(&self) -> u64;

    /// Acknowledges virtio feature bits. Transport bits and logging are the device's own business.
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] for bits that are not offered, [`FrontendError::NoIommu`] for ACCESS_PLATFORM where
    /// nobody translates; the channel's errors.
    fn set_features(&mut self, features: u64) -> Result<(), FrontendError>;

    /// Most rings it has.
    fn queues(&self) -> u16;

    /// Most regions [`set_memory`](Device::set_memory) may have.
    fn max_mem_slots(&self) -> usize;

    /// Gives the device guest memory, whose regions must have fds ([`Region::share`](crate::memory::Region::share)).
    /// Replaces what it had, also while rings run; then what they use must be in both (rules M1.1, L9.2).
    ///
    /// # Errors
    /// [`FrontendError::NotShared`], [`FrontendError::NotOffered`] if there are too many regions; the channel's errors.
    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError>;

    /// Agrees on an inflight region for `queues` rings of up to `queue_size` entries, before any ring is started.
    /// `restored` is what [`inflight_state`](Device::inflight_state) said on another host; it is used if this device's region has
    /// the same size, else the region starts fresh, which is right for rings that were drained (rule I5.1)
    /// and refused for others.
    ///
    /// Returns false if the device has no such thing; then it can't be restarted with requests outstanding.
    ///
    /// # Errors
    /// The channel's errors, and [`FrontendError::ProtocolViolation`] for a region that can't be one (rule I1.2).
    fn set_inflight(
        &mut self,
        queues: u16,
        queue_size: u16,
        restored: Option<&InflightState>,
    ) -> Result<bool, FrontendError>;

    /// Gives the inflight region that was agreed on, before any ring is started, the contents that
    /// [`inflight_state`](Device::inflight_state) said on another host, as [`set_inflight`](Device::set_inflight) does.
    ///
    /// # Errors
    /// [`FrontendError::InflightMismatch`] for another size with requests in flight; [`FrontendError::NotOffered`] if there is no
    /// region, also from the default implementation.
    fn restore_inflight(&mut self, restored: &InflightState) -> Result<(), FrontendError> {
        let _ = restored;
        let advice = "requests that are in flight can't be moved to it";
        Err(FrontendError::NotOffered { what: "INFLIGHT_SHMFD".into(), advice })
    }

    /// The inflight region as it is now; to be moved when all rings are stopped.
    ///
    /// # Errors
    /// [`FrontendError::System`] if it can't be read.
    fn inflight_state(&self) -> Result<Option<InflightState>, FrontendError>;

    /// Tells the device what can be told of rings while their memory is still on its way: how large they are, and what the device
    /// signals. What is told now takes no time when they are tried and started.
    ///
    /// # Errors
    /// [`FrontendError::InvalidRing`]; the channel's errors.
    fn prepare_rings(&mut self, rings: &[(u16, RingSetup)]) -> Result<(), FrontendError> {
        let _ = rings;
        Ok(())
    }

    /// Tells the device all that [`start_ring`](Device::start_ring) does but what starts the ring, to find out whether it
    /// would be refused: its size, its place, and what the device needs to serve it (rule D2.1).
    ///
    /// # Errors
    /// As [`start_ring`](Device::start_ring).
    fn validate_ring(&mut self, index: u16, setup: &RingSetup) -> Result<(), FrontendError> {
        let _ = (index, setup);
        Ok(())
    }

    /// Returns true if the calls for several rings at once say when nothing is left to do but to wait, so that one thread can call
    /// those of many devices. They call their argument `sent` then, unless they fail before.
    fn reports_sent(&self) -> bool {
        false
    }

    /// Does so for several rings. Their messages need not wait for each other; `sent` is as of
    /// [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`validate_ring`](Device::validate_ring): the first.
    fn validate_rings(&mut self, rings: &[(u16, RingSetup)], sent: &mut dyn FnMut()) -> Result<(), FrontendError> {
        let _ = sent;
        rings.iter().try_for_each(|(index, setup)| self.validate_ring(*index, setup))
    }

    /// Starts and enables ring `index`.
    ///
    /// # Errors
    /// [`FrontendError::InvalidRing`], [`FrontendError::Memory`] for a ring outside memory; the channel's errors. After
    /// [`FrontendError::Interrupted`] the ring counts as running.
    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError>;

    /// Starts and enables rings, and tells `started` of each as soon as it is known. Their messages need not wait for each
    /// other; `sent` is as of [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`start_ring`](Device::start_ring): the first, when it is known what became of all.
    fn start_rings(
        &mut self,
        rings: &[(u16, RingSetup)],
        sent: &mut dyn FnMut(),
        started: &mut dyn FnMut(u16),
    ) -> Result<(), FrontendError> {
        let _ = sent;
        rings.iter().try_for_each(|(index, setup)| {
            self.start_ring(*index, setup.clone())?;
            started(*index);
            Ok(())
        })
    }

    /// Stops ring `index` when all its requests are complete, and says where it would go on (rules R3.1, R3.2).
    ///
    /// # Errors
    /// [`FrontendError::InvalidRing`] if it is not started; the channel's errors.
    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError>;

    /// Stops rings as [`stop_ring`](Device::stop_ring) does, and tells `stopped` where each would go on. The requests need not
    /// wait for each other; `sent` is as of [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`stop_ring`](Device::stop_ring); rings that `stopped` was told of are stopped all the same.
    fn stop_rings(
        &mut self,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        let _ = sent;
        indices.iter().try_for_each(|index| self.stop_ring(*index).map(|base| stopped(*index, base)))
    }

    /// Whether [`suspend_ring`](Device::suspend_ring) works, once there is an inflight region.
    fn can_suspend_rings(&self) -> bool {
        false
    }

    /// Stops ring `index` without waiting for its requests: those that are not complete stay in the inflight region, and
    /// whoever starts the ring with it serves them (rule I8.3).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the device can't; as [`stop_ring`](Device::stop_ring).
    fn suspend_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        let _ = index;
        Err(FrontendError::NotOffered { what: "suspending a ring".into(), advice: "stop it" })
    }

    /// Stops rings as [`suspend_ring`](Device::suspend_ring) does, and tells `stopped` where each would go on; `sent` is as of
    /// [`reports_sent`](Device::reports_sent).
    ///
    /// # Errors
    /// As [`suspend_ring`](Device::suspend_ring); rings that `stopped` was told of are stopped all the same.
    fn suspend_rings(
        &mut self,
        indices: &[u16],
        sent: &mut dyn FnMut(),
        stopped: &mut dyn FnMut(u16, RingBase),
    ) -> Result<(), FrontendError> {
        let _ = sent;
        indices.iter().try_for_each(|index| self.suspend_ring(*index).map(|base| stopped(*index, base)))
    }

    /// Has every write to guest memory logged to `log`, which the device maps from `fd`. From its return on all writes
    /// are in it; if another log was in use, none goes there any more (rules L7.2, L9.1).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`] if the device can't log; the channel's errors.
    fn start_logging(&mut self, log: &Arc<Log>, fd: BorrowedFd<'_>) -> Result<(), FrontendError>;

    /// Ends logging: no write to the log after its return. A back-end that is away, or does not answer in time, has nothing
    /// to log to when it is back.
    ///
    /// # Errors
    /// [`FrontendError::Refused`] and other errors of the channel.
    fn stop_logging(&mut self) -> Result<(), FrontendError>;

    /// Returns false if [`save_state`](Device::save_state) returns `None` at once.
    fn has_state(&self) -> bool {
        true
    }

    /// What the device knows beside its rings and configuration, to be loaded into its like; `None` if it keeps no such
    /// thing. All rings must be stopped (rule D1.1).
    ///
    /// # Errors
    /// [`FrontendError::Refused`], [`FrontendError::DeviceState`]; the channel's errors.
    fn save_state(&mut self) -> Result<Option<Vec<u8>>, FrontendError> {
        Ok(None)
    }

    /// Gives the device what [`save_state`](Device::save_state) said elsewhere, before any ring is started (rule D1.4).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`], also from the default implementation; [`FrontendError::Refused`] for a state that
    /// is not this device's or damaged, which then changes nothing; [`FrontendError::DeviceState`]; the channel's errors.
    fn load_state(&mut self, state: &[u8]) -> Result<(), FrontendError> {
        let _ = state;
        let advice = "the guest's device has a state; give it a device of the same kind";
        Err(FrontendError::NotOffered { what: "DEVICE_STATE".into(), advice })
    }

    /// Which disk it is and the state of its contents, as they stay until a ring runs; `None` if the device can't tell. All
    /// rings must be stopped (GET_DISK_GENERATION).
    ///
    /// # Errors
    /// The channel's errors.
    fn disk_generation(&mut self) -> Result<Option<DiskGeneration>, FrontendError> {
        Ok(None)
    }

    /// Which disk it is, also while rings run; `None` if the device can't tell (GET_DISK_IDENTITY).
    ///
    /// # Errors
    /// The channel's errors.
    fn disk_identity(&mut self) -> Result<Option<u128>, FrontendError> {
        Ok(None)
    }

    /// The log in use.
    fn log(&self) -> Option<&Arc<Log>>;

    /// Reads configuration space from `offset` (rule C1.1).
    ///
    /// # Errors
    /// [`FrontendError::NotOffered`], [`FrontendError::Refused`]; the channel's errors.
    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError>;

    /// Writes configuration space from `offset`, as the driver would (SET_CONFIG with flags 0, rule C1.2).
    ///
    /// # Errors
    /// As [`config`](Device::config).
    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError>;

    /// The virtio status byte, or `None` if the device does not keep one.
    ///
    /// # Errors
    /// The channel's errors.
    fn status(&mut self) -> Result<Option<u8>, FrontendError>;

    /// Sets the virtio status byte where the device keeps one.
    ///
    /// # Errors
    /// The channel's errors.
    fn set_status(&mut self, status: u8) -> Result<(), FrontendError>;

    /// An fd that polls POLLHUP when the device goes away, or `None` if it never does.
    ///
    /// # Errors
    /// [`FrontendError::System`] if no fd is to be had.
    fn hang_up_fd(&self) -> Result<Option<OwnedFd>, FrontendError>;

    /// Takes what it has said since the last time, each thing once.
    fn take_events(&mut self) -> Vec<DeviceEvent> {
        Vec::new()
    }

    /// An fd that is readable while there are [events](Device::take_events), or `None` if there never are.
    ///
    /// # Errors
    /// [`FrontendError::System`] if no fd is to be had.
    fn events_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        Ok(None)
    }

    /// Returns true if the device can't be used before [`reconnect`](Device::reconnect): the connection has ended, by
    /// either side, or an answer is still owed because the wait for it was interrupted.
    fn needs_reconnect(&self) -> bool;

    /// The switch that ends this device's waits, but that of [`stop_logging`](Device::stop_logging), which has a limit of
    /// its own. `None` if it never waits.
    ///
    /// A wait that it ends leaves the device as [`needs_reconnect`](Device::needs_reconnect), with the connection kept:
    /// [`reconnect`](Device::reconnect) gets the answers that are owed. A ring that was being stopped or started runs then.
    fn interrupt(&self) -> Option<Interrupt> {
        None
    }

    /// Makes the device usable again. Where answers are owed on a connection that holds, gets them. Else connects again and installs everything that is noted: memory, inflight region, rings (going on where the inflight
    /// region and the used ring say), the log. Then kicks and calls every ring, so that nothing waits (rules R6.1, L8.1, I3.4).
    /// Tries until `deadline`, also if the back-end falls over meanwhile.
    ///
    /// # Errors
    /// The last error when `deadline` is over; [`FrontendError::Interrupted`]; [`FrontendError::NotOffered`] if the new back-end is a lesser one,
    /// [`FrontendError::Unrecoverable`] if requests would get lost.
    fn reconnect(&mut self, deadline: Instant) -> Result<Reconnection, FrontendError>;
}
