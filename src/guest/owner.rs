//! The process that owns a guest: the states of the guest there, and the operations on it.
//!
//! ```text
//! absent ──arrives, boots──→ running ←──pause, resume──→ paused
//!                               └────────migrate─────────┘
//!                                           ├──→ migrated
//!                                           └──→ outcome unknown ──resume──→ running
//!                                                       └──forget──→ migrated
//! ```
//!
//! A failure of the guest leads from each state to `failed`. One operation runs at a time; a migration ends a
//! measurement. State and operation are under one lock, which is not held during an operation.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{
    DeviceConnection, Guest, GuestError, GuestSourceVm, GuestStats, GuestView, InterruptOnCancel, Verified,
    dirty_sources,
};
use crate::dirty::{DirtyError, DirtyRate, Forecast, forecast, measure_dirty_rate};
use crate::frontend::FrontendError;
use crate::migrate::{
    GuestLocation, MigrationEvent, MigrationFailure, MigrationListener, MigrationParameters, Outcomes, VmError, migrate,
};
use crate::stream::{
    CancelToken, MigrationId, Started, StreamError, StreamOptions, ToSource, Uri, connect, query_outcome,
};
use crate::sys::lock;
use crate::sys::with_causes::with_causes;

/// Time limit of the outcome query before a resume.
const RESUME_QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for a measurement to end before a migration.
const MEASUREMENT_END_TIMEOUT: Duration = Duration::from_secs(15);
/// Interval of a measurement's harvests.
const MEASUREMENT_INTERVAL: Duration = Duration::from_millis(100);
/// Warning about a snapshot of a running guest.
const NOT_PAUSED_WARNING: &str = "the guest is not paused and continues to write to its disk after the save: a restore onto that disk is then refused. \
                       For a snapshot pause the guest, save it, copy its disk with cp --preserve=xattr, and resume it";

/// State of the guest at its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OwnerState {
    /// There is no guest yet: it boots or is waited for.
    Absent,
    /// The guest has arrived and is being started.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest was handed over.
    Migrated,
    /// The outcome of the guest's migration is unknown. It is intact and paused.
    OutcomeUnknown,
    /// The guest found a wrong byte or another error.
    Failed,
}

impl OwnerState {
    /// Returns the location of the guest, if there is one.
    pub fn location(self) -> Option<GuestLocation> {
        match self {
            OwnerState::Running => Some(GuestLocation::RunningHere),
            OwnerState::Paused => Some(GuestLocation::PausedHere),
            OwnerState::Migrated => Some(GuestLocation::HandedOver),
            OwnerState::OutcomeUnknown => Some(GuestLocation::OutcomeUnknown),
            OwnerState::Absent | OwnerState::Starting | OwnerState::Failed => None,
        }
    }
}

/// The name in reports: `outcome_unknown`.
impl fmt::Display for OwnerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl OwnerState {
    /// Returns the state as the reason why an operation is refused.
    fn refusal(self) -> &'static str {
        match self {
            OwnerState::Absent => "there is no guest here yet",
            OwnerState::Starting => {
                "a guest has arrived and is being started here: wait until it runs, or cancel the start, which leaves the guest here, paused"
            }
            OwnerState::Running => "the guest runs here: pause it first",
            OwnerState::Paused => "the guest is paused here: resume it first",
            OwnerState::Migrated => "the guest was handed over: there is no guest here",
            OwnerState::OutcomeUnknown => {
                "the outcome of the guest's migration is unknown: run resume if the destination does not run it, \
                 or forget if the destination does"
            }
            OwnerState::Failed => "the guest has failed and never runs again: status reports the error",
        }
    }
}

/// An operation that excludes others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Operation {
    /// [`GuestOwner::migrate`].
    #[serde(rename = "a migration")]
    Migration,
    /// [`GuestOwner::dirty_rate`].
    #[serde(rename = "a measurement")]
    Measurement,
    /// [`GuestOwner::verify`].
    #[serde(rename = "a verification")]
    Verification,
    /// [`GuestOwner::pause`].
    #[serde(rename = "a pause")]
    Pause,
    /// [`GuestOwner::resume`].
    #[serde(rename = "a resume")]
    Resume,
    /// [`GuestOwner::forget`].
    #[serde(rename = "a forget")]
    Forget,
}

/// The name in reports: `a migration`.
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Reason why an operation on the guest failed. Its message is for the operator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnerError {
    /// The operation is not possible in this state.
    #[error("{}", .0.refusal())]
    State(OwnerState),
    /// Another operation is under way.
    #[error("{0} is under way: wait for its end, or cancel it")]
    Busy(Operation),
    /// The operation has no effect or is not possible, with the reason and advice.
    #[error("{0}")]
    Refused(&'static str),
    /// The destination has the guest, and does not run it.
    #[error("the destination has the guest ({0}): end the destination's process first")]
    HeldByDestination(String),
    /// The guest of unknown outcome can't be started.
    #[error(
        "another front-end seems to use the disk: the destination probably runs the guest; if it does, run forget here"
    )]
    DiskInUse(#[source] GuestError),
    /// An operation on the guest failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The guest's devices have no dirty source.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The measurement failed.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The stream could not be opened.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The migration failed.
    #[error(transparent)]
    Migration(#[from] MigrationFailure),
}

/// State and counters of the guest at its owner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OwnerStatus {
    /// State of the guest.
    pub state: OwnerState,
    /// Location of the guest, if there is one.
    pub location: Option<GuestLocation>,
    /// The operation under way.
    pub busy: Option<Operation>,
    /// Counters, if there is a guest.
    #[serde(flatten)]
    pub guest: Option<GuestStatus>,
}

/// Counters of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Counters over the guest's whole life.
    #[serde(flatten)]
    pub stats: GuestStats,
    /// Size of the memory, bytes.
    pub guest_bytes: u64,
    /// Connections to the back-ends.
    pub devices: Vec<DeviceConnection>,
    /// The error that has stopped the guest.
    pub failure: Option<String>,
}

impl From<&GuestView> for GuestStatus {
    fn from(guest: &GuestView) -> GuestStatus {
        GuestStatus {
            stats: guest.stats(),
            guest_bytes: guest.memory_bytes(),
            devices: guest.connections(),
            failure: guest.failure().map(|failure| with_causes(&*failure).to_string()),
        }
    }
}

/// Result of [`GuestOwner::dirty_rate`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuredRate {
    /// Dirty rates by source.
    pub rate: DirtyRate,
    /// Bandwidth of the forecast migration, bytes of guest memory per second.
    pub bandwidth: u64,
    /// The forecast.
    pub forecast: Forecast,
}

/// State of the guest, with what only this state has.
#[derive(Clone, Debug, Default)]
enum OwnedState {
    #[default]
    Absent,
    Running,
    Paused,
    Migrated,
    /// With the destination and the id of the migration, for outcome queries.
    OutcomeUnknown(Uri, MigrationId),
    Failed,
}

/// State and operation, under one lock.
#[derive(Default)]
struct Owned {
    state: OwnedState,
    /// View of the guest for status, which never waits.
    view: Option<GuestView>,
    /// The migration of an arrived guest that could not be started yet.
    not_started: Option<MigrationId>,
    /// Listener for migrations and outcome queries.
    incoming: Option<Arc<MigrationListener>>,
    /// The operation under way, with its cancel token.
    busy: Option<(Operation, Option<CancelToken>)>,
    /// True if [`GuestOwner::new_failure`] has returned the failure.
    failure_reported: bool,
}

/// A guest, its state, and the operations on it.
#[derive(Default)]
pub struct GuestOwner {
    owned: Mutex<Owned>,
    /// The guest. Only the operation under way locks it.
    guest: Mutex<Option<Guest>>,
    /// Outcomes of incoming migrations.
    outcomes: Outcomes,
}

/// Ends the operation under way when it is dropped, also if the operation panicked.
struct OperationEnd<'a>(&'a Mutex<Owned>);

impl Drop for OperationEnd<'_> {
    fn drop(&mut self) {
        lock(self.0).busy = None;
    }
}

impl GuestOwner {
    /// Returns the outcomes of incoming migrations.
    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    /// Sets the listener for incoming migrations, or ends it.
    pub fn set_incoming(&self, incoming: Option<Arc<MigrationListener>>) {
        lock(&self.owned).incoming = incoming;
    }

    /// Takes a guest that runs or is paused.
    pub fn own(&self, guest: Option<Guest>, running: bool) {
        self.set(guest, if running { OwnedState::Running } else { OwnedState::Paused });
    }

    /// Takes a paused guest that has arrived and could not be started. [`resume`](Self::resume) tries again.
    pub fn own_unstarted(&self, guest: Option<Guest>, id: MigrationId) {
        lock(&self.owned).not_started = Some(id);
        self.set(guest, OwnedState::Paused);
    }

    fn set(&self, guest: Option<Guest>, state: OwnedState) {
        let view = guest.as_ref().map(Guest::view);
        *lock(&self.guest) = guest;
        let mut owned = lock(&self.owned);
        (owned.view, owned.state) = (view, state);
    }

    /// Returns the state of the guest.
    pub fn state(&self) -> OwnerState {
        let mut owned = lock(&self.owned);
        if owned.view.as_ref().is_some_and(|view| view.failure().is_some()) {
            owned.state = OwnedState::Failed;
        }
        match owned.state {
            OwnedState::Absent if self.outcomes.has_arrived() => OwnerState::Starting,
            OwnedState::Absent => OwnerState::Absent,
            OwnedState::Running => OwnerState::Running,
            OwnedState::Paused => OwnerState::Paused,
            OwnedState::Migrated => OwnerState::Migrated,
            OwnedState::OutcomeUnknown(..) => OwnerState::OutcomeUnknown,
            OwnedState::Failed => OwnerState::Failed,
        }
    }

    /// Returns the error that has stopped the guest, once.
    pub fn new_failure(&self) -> Option<Arc<GuestError>> {
        let mut owned = lock(&self.owned);
        let failure = owned.view.as_ref().and_then(GuestView::failure)?;
        owned.state = OwnedState::Failed;
        (!std::mem::replace(&mut owned.failure_reported, true)).then_some(failure)
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Guest) -> Result<T, OwnerError>) -> Result<T, OwnerError> {
        let mut guest = lock(&self.guest);
        ask(guest.as_mut().ok_or_else(|| OwnerError::State(self.state()))?)
    }

    /// Runs `work` unless another operation is under way. A migration has priority: it ends a measurement.
    fn run_exclusively<T>(
        &self,
        operation: Operation,
        cancel: Option<&CancelToken>,
        work: impl FnOnce() -> Result<T, OwnerError>,
    ) -> Result<T, OwnerError> {
        let deadline = Instant::now() + MEASUREMENT_END_TIMEOUT;
        loop {
            let mut owned = lock(&self.owned);
            match &owned.busy {
                None => {
                    owned.busy = Some((operation, cancel.cloned()));
                    break;
                }
                Some((Operation::Measurement, Some(other)))
                    if operation == Operation::Migration && Instant::now() < deadline =>
                {
                    other.cancel();
                }
                Some((other, _)) => return Err(OwnerError::Busy(*other)),
            }
            drop(owned);
            std::thread::sleep(Duration::from_millis(1));
        }
        let _end = OperationEnd(&self.owned);
        work()
    }

    /// Lets `cancel` end waits for the guest's devices.
    fn interrupt_on(&self, cancel: &CancelToken) -> Result<InterruptOnCancel, OwnerError> {
        Ok(InterruptOnCancel::new(self.with(|guest| Ok(guest.interrupts()))?, cancel))
    }

    /// Returns state and counters without waiting for the guest or an operation.
    pub fn status(&self) -> OwnerStatus {
        let state = self.state();
        let owned = lock(&self.owned);
        OwnerStatus {
            state,
            location: state.location(),
            busy: owned.busy.as_ref().map(|(operation, _)| *operation),
            guest: owned.view.as_ref().map(GuestStatus::from),
        }
    }

    /// Returns the connections of the guest's devices.
    pub fn connections(&self) -> Vec<DeviceConnection> {
        lock(&self.owned).view.as_ref().map(GuestView::connections).unwrap_or_default()
    }

    /// Migrates the guest to `uri` and reports events until the end.
    ///
    /// # Errors
    /// If there is no guest, or the migration failed. The state then says where the guest is.
    pub fn migrate(
        &self,
        uri: &Uri,
        options: &StreamOptions,
        parameters: &MigrationParameters,
        on_event: &mut dyn FnMut(MigrationEvent),
    ) -> Result<(), OwnerError> {
        self.run_exclusively(Operation::Migration, Some(&options.cancel), || {
            let state = self.state();
            if !matches!(state, OwnerState::Running | OwnerState::Paused) {
                return Err(OwnerError::State(state));
            }
            let vm = GuestSourceVm::new(&self.guest).ok_or(OwnerError::Refused("there is no guest here"))?;
            let connection = connect(uri, options)?;
            // A one-way stream may be kept and restored at any time.
            let mut vm = vm.with_disk_generations(connection.one_way);
            let id = connection.id;
            if parameters.continue_here && state == OwnerState::Running && connection.is_to_file() {
                on_event(MigrationEvent::Warning { message: NOT_PAUSED_WARNING.into() });
            }
            let migrated = migrate(&mut vm, connection, parameters, on_event);
            let mut owned = lock(&self.owned);
            let state = match &migrated {
                Ok(_) if parameters.continue_here => return Ok(()),
                Ok(_) => OwnedState::Migrated,
                Err(failure) => match failure.location {
                    GuestLocation::RunningHere => OwnedState::Running,
                    GuestLocation::PausedHere => OwnedState::Paused,
                    GuestLocation::HandedOver => OwnedState::Migrated,
                    GuestLocation::OutcomeUnknown => OwnedState::OutcomeUnknown(uri.clone(), id),
                },
            };
            if matches!(state, OwnedState::Migrated) {
                owned.view = None;
                tracing::info!("the guest has moved to {uri}");
            }
            owned.state = state;
            drop(owned);
            Ok(migrated.map(drop)?)
        })
    }

    /// Resumes a paused guest, or one of unknown outcome.
    ///
    /// # Errors
    /// If there is no such guest, or it can't be started. The destination of a guest of unknown outcome is asked before.
    pub fn resume(&self) -> Result<(), OwnerError> {
        let cancel = CancelToken::new()?;
        self.run_exclusively(Operation::Resume, Some(&cancel), || {
            match self.state() {
                OwnerState::Paused | OwnerState::OutcomeUnknown => {}
                OwnerState::Running => return Err(OwnerError::Refused("the guest runs here already")),
                other => return Err(OwnerError::State(other)),
            }
            let state = lock(&self.owned).state.clone();
            let is_unknown = matches!(state, OwnedState::OutcomeUnknown(..));
            if let OwnedState::OutcomeUnknown(uri, id) = &state {
                self.query_before_resume(uri, *id)?;
            }
            let interrupt = self.interrupt_on(&cancel)?;
            let downtime = self.with(|guest| match guest.start() {
                Ok(()) => Ok(guest.downtime_ns()),
                Err(error @ GuestError::Device(FrontendError::Refused { .. })) if is_unknown => {
                    // Nothing of the guest may run here now.
                    let _ = guest.stop_devices();
                    Err(OwnerError::DiskInUse(error))
                }
                Err(error) => Err(error.into()),
            })?;
            drop(interrupt);
            let not_started = {
                let mut owned = lock(&self.owned);
                owned.state = OwnedState::Running;
                owned.not_started.take()
            };
            if let Some(id) = not_started {
                self.outcomes.record_started(id, Started { observed_downtime_ns: downtime, start_ns: 0 });
            }
            Ok(())
        })
    }

    /// Queries the destination before a resume. The operator's assertion counts unless the destination contradicts it.
    fn query_before_resume(&self, uri: &Uri, id: MigrationId) -> Result<(), OwnerError> {
        match query_outcome(uri, id, RESUME_QUERY_TIMEOUT) {
            Ok(ToSource::Started(_)) => {
                self.set(None, OwnedState::Migrated);
                Err(OwnerError::Refused("the destination confirms that it runs the guest: it was released here"))
            }
            Ok(ToSource::Held(held)) => Err(OwnerError::HeldByDestination(held.message)),
            _ => Ok(()),
        }
    }

    /// Releases a guest that runs at the destination according to the operator.
    ///
    /// # Errors
    /// If the outcome of the guest's migration is not unknown.
    pub fn forget(&self) -> Result<(), OwnerError> {
        self.run_exclusively(Operation::Forget, None, || match self.state() {
            OwnerState::OutcomeUnknown => {
                self.set(None, OwnedState::Migrated);
                tracing::info!("the guest was released by forget");
                Ok(())
            }
            OwnerState::Running | OwnerState::Paused => Err(OwnerError::Refused(
                "the guest is here: forget is only for a guest of unknown outcome; quit ends this one",
            )),
            other => Err(OwnerError::State(other)),
        })
    }

    /// Pauses the guest.
    ///
    /// # Errors
    /// If it does not run, or a device does not stop.
    pub fn pause(&self) -> Result<(), OwnerError> {
        self.run_exclusively(Operation::Pause, None, || {
            match self.state() {
                OwnerState::Running => self.with(|guest| Ok(guest.pause()?))?,
                OwnerState::Paused => return Err(OwnerError::Refused("the guest is paused already")),
                other => return Err(OwnerError::State(other)),
            }
            lock(&self.owned).state = OwnedState::Paused;
            Ok(())
        })
    }

    /// Compares every byte of the guest's memory and disks with its expected value.
    ///
    /// # Errors
    /// If there is no guest, or a byte is wrong.
    pub fn verify(&self) -> Result<Verified, OwnerError> {
        let cancel = CancelToken::new()?;
        self.run_exclusively(Operation::Verification, Some(&cancel), || {
            let _interrupt = self.interrupt_on(&cancel)?;
            self.with(|guest| Ok(guest.verify()?))
        })
    }

    /// Measures dirty rates for `time`, and forecasts a migration with this bandwidth (bytes of guest memory per second)
    /// and downtime limit (milliseconds).
    ///
    /// # Errors
    /// If there is no guest, or the measurement was ended.
    pub fn dirty_rate(&self, time: Duration, bandwidth: u64, downtime_ms: u64) -> Result<MeasuredRate, OwnerError> {
        let cancel = CancelToken::new()?;
        self.run_exclusively(Operation::Measurement, Some(&cancel), || {
            let (mut sources, bytes) = self.with(|guest| Ok((dirty_sources(guest), guest.memory().size())))?;
            // Logging devices are stopped regularly after the start.
            let mut starting = Some(self.interrupt_on(&cancel)?);
            let rate = measure_dirty_rate(&mut sources, time, MEASUREMENT_INTERVAL, |time| {
                starting = None;
                cancel.wait(time).is_ok()
            });
            if cancel.is_cancelled() {
                let ended = "the measurement was ended by a migration, which has priority, or by cancel";
                return Err(OwnerError::Refused(ended));
            }
            let rate = rate?;
            let forecast = forecast(&(&rate).into(), bandwidth as f64, downtime_ms as f64, bytes);
            Ok(MeasuredRate { rate, bandwidth, forecast })
        })
    }

    /// Cancels the operation under way, or the arrival of a guest.
    ///
    /// # Errors
    /// If there is nothing to cancel, or it is too late.
    pub fn cancel(&self) -> Result<(), OwnerError> {
        let (busy, waits) = {
            let owned = lock(&self.owned);
            (owned.busy.clone(), owned.incoming.is_some())
        };
        let why = match busy {
            Some((_, Some(cancel))) if cancel.cancel() => return Ok(()),
            Some((_, Some(_))) => "too late: the commit has been sent, and the destination decides the outcome",
            _ if self.outcomes.give_up_all("cancelled at the destination") => return Ok(()),
            _ if self.outcomes.cancel_start() => return Ok(()),
            _ if self.state() == OwnerState::Absent && waits => {
                "no migration has started yet: this process waits for one, and quit ends it"
            }
            _ => "no migration is under way",
        };
        Err(OwnerError::Refused(why))
    }

    /// Ends incoming migrations before the end of the process.
    ///
    /// # Errors
    /// If the outcome of the guest's migration is unknown, or a guest has arrived meanwhile.
    pub fn prepare_quit(&self) -> Result<(), OwnerError> {
        let state = self.state();
        let incoming = lock(&self.owned).incoming.clone();
        match (state, incoming) {
            (OwnerState::OutcomeUnknown, _) => Err(OwnerError::State(state)),
            (OwnerState::Absent | OwnerState::Starting, Some(incoming)) => {
                if !self.outcomes.close("the destination's process was told to quit") {
                    return Err(OwnerError::Refused("a guest has arrived meanwhile: run quit again to end it"));
                }
                incoming.close();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_that_panics_is_no_longer_under_way() {
        let owner = GuestOwner::default();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            owner.run_exclusively::<()>(Operation::Pause, None, || panic!("in the operation"))
        }));
        assert!(panicked.is_err());
        assert_eq!(owner.status().busy, None);
        owner.run_exclusively(Operation::Resume, None, || Ok(())).unwrap();
    }
}
