//! `vhost-migrate guest`: a process that owns a built-in guest, or waits for one to arrive.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, bounded};
use crossbeam::select;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vhost_migrate::control::{self, CommandHandler, ControlClient, ControlCommand, MigrateArguments};
use vhost_migrate::dirty::{forecast, measure_dirty_rate};
use vhost_migrate::frontend::{FrontendError, Interrupt};
use vhost_migrate::guest::{
    Guest, GuestConfig, GuestError, GuestIncomingVm, GuestSourceVm, GuestView, InterruptOnCancel, Verified,
    connect_backends, dirty_sources,
};
use vhost_migrate::migrate::{
    ConvergencePolicy, GuestLocation, MigrateError, MigrationEvent, MigrationListener, MigrationParameters,
    OUTCOME_QUERY_TIMEOUT, Outcomes, VmError, migrate, receive,
};
use vhost_migrate::stream::{
    CancelToken, MigrationId, Started, StreamListener, StreamOptions, ToSource, Uri, connect, query_outcome,
    remove_unfinished_saves,
};

use crate::log_arguments::LogArguments;
use crate::metrics::MetricsArguments;
use crate::signals::{before_termination, ignore_hangup};
use crate::units;
use crate::values;
use crate::wrong_arguments;

/// Run the built-in guest: a machine that writes memory and disk, and checks every byte it reads
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  truncate -s 64M disk.img
  vhost-migrate backend blk --socket a.sock --image disk.img --queues 2 &
  vhost-migrate guest --backend a.sock --control source.ctl --memory 1G --dirty-rate 100MiB/s &
  vhost-migrate guest --backend b.sock --control destination.ctl --incoming tcp:0.0.0.0:4444
  vhost-migrate guest --backend a.sock --control again.ctl --incoming file:/backup/guest.vhm

It takes commands, one JSON object a line, on the control socket: status, watch, migrate, cancel, pause, resume, forget,
verify, dirty_rate, quit. A wrong byte stops the guest and is reported on stderr and by status. A guest that has arrived
and can't be started stays here, paused: resume tries again.

Exit status: 0 ended by quit; 1 failed, or the guest had found a wrong byte; 2 wrong arguments.")]
pub(crate) struct Arguments {
    /// vhost-user socket of a block back-end; once for each disk
    #[arg(long, required = true, value_name = "SOCKET", value_parser = values::socket_path())]
    backend: Vec<PathBuf>,
    /// Control socket to listen on
    #[arg(long, value_name = "SOCKET", value_parser = values::socket_path())]
    control: PathBuf,
    /// Receive a guest from here: tcp:HOST:PORT, unix:PATH, file:PATH, exec:COMMAND or fd:N
    #[arg(long, value_name = "URI", conflicts_with = "Workload")]
    incoming: Option<Uri>,
    /// Longest switchover of an arriving guest, from the end of the last round to the commit. After that the migration
    /// is given up, and the guest resumes at its source. The source has a limit of its own
    #[arg(long, default_value = "30s", value_parser = units::seconds_limit, value_name = "TIME")]
    switchover_timeout: Duration,
    /// Restore a saved guest even if its disks have changed since the save or can't be compared; receive a migrated
    /// guest even if its disks here are others. The guest then reads data that it did not write
    #[arg(long, requires = "incoming")]
    ignore_disk_generation: bool,
    #[command(flatten)]
    workload: Workload,
    #[command(flatten)]
    metrics: MetricsArguments,
    #[command(flatten)]
    messages: LogArguments,
}

/// Workload of a new guest.
#[derive(Debug, clap::Args)]
struct Workload {
    /// Guest memory; a quarter of it lies above 4 GiB
    #[arg(long, default_value = "1GiB", value_parser = units::size, value_name = "SIZE")]
    memory: u64,
    /// CPUs that write memory
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: usize,
    /// Write rate of all CPUs together
    #[arg(long, default_value = "200MiB/s", value_parser = units::rate, value_name = "RATE")]
    dirty_rate: u64,
    /// Memory that the CPUs write repeatedly; a quarter of the guest's by default
    #[arg(long, value_parser = units::size, value_name = "SIZE")]
    working_set: Option<u64>,
    /// Queues of each disk
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Entries of each queue, a power of two
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = values::queue_size(8, 32768))]
    queue_size: u16,
    /// Packed rings instead of split ones
    #[arg(long)]
    packed: bool,
    /// Migrate without waiting for the disk: requests in flight move with the guest. The back-ends on both sides need
    /// --inflight-migration too
    #[arg(long)]
    inflight_migration: bool,
    /// Maximum number of disk requests in flight of each queue
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
    /// Fail if a back-end stays unavailable for this many seconds; by default it is waited for without limit
    #[arg(long, value_name = "SECONDS")]
    reconnect_timeout: Option<u64>,
    /// Overwrite any contents of the disks; without this, a disk is refused unless it is blank or was written by such a
    /// guest
    #[arg(long)]
    overwrite: bool,
    /// Disk requests per second of each queue; unlimited by default
    #[arg(long, value_name = "N")]
    request_rate: Option<u64>,
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    if arguments.incoming.is_none()
        && let Err(error) = arguments.config().check()
    {
        wrong_arguments(error);
    }
    arguments.messages.start();
    let clean = |signal| {
        control::remove_sockets();
        remove_unfinished_saves();
        tracing::info!("ends by {signal}");
    };
    let signals =
        ignore_hangup().and_then(|()| before_termination([Signal::SIGINT, Signal::SIGTERM], CLEANUP_TIMEOUT, clean));
    if let Err(error) = signals {
        eprintln!("guest: signals: {error}");
        return ExitCode::FAILURE;
    }
    let ended = run_guest_process(&arguments).unwrap_or_else(|error| {
        eprintln!("guest: {error}");
        ExitCode::FAILURE
    });
    control::remove_sockets();
    ended
}

fn run_guest_process(arguments: &Arguments) -> Result<ExitCode, VmError> {
    arguments.metrics.start().map_err(|error| error.to_string())?;
    let (listener, _path) = control::bind(&arguments.control)?;
    let owner = Arc::new(GuestOwner::default());
    let (quit, quitting) = bounded(1);
    let handler = Arc::new(GuestCommands { owner: owner.clone(), quit });
    // Before the first answer: a client that learns that there is no guest can then migrate one to here.
    let incoming = match &arguments.incoming {
        Some(uri) => {
            Some((uri, Arc::new(MigrationListener::start(StreamListener::bind(uri)?, owner.outcomes.clone())?)))
        }
        None => None,
    };
    *lock(&owner.incoming) = incoming.as_ref().map(|(_, incoming)| incoming.clone());
    std::thread::spawn(move || control::serve(listener, handler));

    match incoming {
        // Kept to the end: a source may still query the outcome of its migration.
        Some((uri, incoming)) => {
            println!("waits for a guest at {uri}");
            wait_for_arrival(&owner, &incoming, uri, arguments)?;
            incoming.close_after(2 * OUTCOME_QUERY_TIMEOUT);
        }
        None => {
            let config = arguments.config();
            let (backends, overwrite) = (arguments.backend.clone(), arguments.workload.overwrite);
            let (done, booted) = bounded(1);
            // On a separate thread, so that quit ends this process at once whatever a back-end does.
            let boot = move || drop(done.send(boot(config, &backends, overwrite)));
            std::thread::Builder::new().name("boot".into()).spawn(boot)?;
            select! {
                recv(booted) -> guest => {
                    let guest = guest??;
                    tracing::info!("the guest has started, with disks from {}", join_paths(&arguments.backend));
                    owner.set(Some(guest), OwnerState::Running);
                }
                recv(quitting) -> _ => return Ok(ExitCode::SUCCESS),
            }
        }
    }
    // A failure of the guest is reported immediately.
    while let Err(RecvTimeoutError::Timeout) = quitting.recv_timeout(Duration::from_millis(100)) {
        owner.check_failure();
    }
    owner.check_failure();
    // Stops listening and removes the socket.
    *lock(&owner.incoming) = None;
    Ok(if owner.state() == OwnerState::Failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Formats the sockets of the back-ends.
fn join_paths(backends: &[PathBuf]) -> String {
    backends.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Creates and starts a guest.
fn boot(config: GuestConfig, backends: &[PathBuf], overwrite: bool) -> Result<Guest, VmError> {
    let devices = connect_backends(backends, config.inflight_migration, &Interrupt::new()?)?;
    let mut guest = Guest::new(config)?;
    guest.boot(devices)?;
    guest.probe_disks(overwrite)?;
    guest.resume()?;
    Ok(guest)
}

/// Receives a guest. A failed migration leaves the guest at its source, and the next one is waited for, until quit.
fn wait_for_arrival(
    owner: &GuestOwner,
    incoming: &MigrationListener,
    uri: &Uri,
    arguments: &Arguments,
) -> Result<(), VmError> {
    while let Some(connection) = incoming.next()? {
        let id = connection.id;
        let (was_saved, any_disks) = (connection.one_way, arguments.ignore_disk_generation);
        let arrival = GuestIncomingVm::new(arguments.backend.clone())?.with_cancel(connection.cancel_token());
        let mut arrival = arrival.with_disk_checks(was_saved, any_disks);
        match receive(&mut arrival, connection, &owner.outcomes, arguments.switchover_timeout) {
            Ok(received) => {
                let is = if received.running { "runs" } else { "is paused" };
                tracing::info!(
                    "a guest has arrived at {uri} and {is} here, with disks from {}",
                    join_paths(&arguments.backend)
                );
                owner
                    .set(arrival.into_guest(), if received.running { OwnerState::Running } else { OwnerState::Paused });
                return Ok(());
            }
            Err(error @ MigrateError::NotStarted(_)) => {
                eprintln!("guest: {error}");
                *lock(&owner.held) = Some(id);
                owner.set(arrival.into_guest(), OwnerState::Paused);
                return Ok(());
            }
            Err(error) if uri.is_single_channel() => return Err(error.into()),
            Err(error) => tracing::warn!("no guest has arrived: {error}. Waiting for the next migration"),
        }
    }
    Ok(())
}

impl Arguments {
    /// Returns the configuration of a new guest.
    fn config(&self) -> GuestConfig {
        self.workload.config(self.backend.len())
    }
}

impl Workload {
    fn config(&self, disks: usize) -> GuestConfig {
        let defaults = GuestConfig::new(self.memory);
        GuestConfig {
            cpus: self.cpus,
            dirty_rate: self.dirty_rate,
            working_set: self.working_set.unwrap_or(defaults.working_set),
            disks,
            queues: self.queues,
            queue_size: self.queue_size,
            packed: self.packed,
            inflight_migration: self.inflight_migration,
            reconnect_timeout: self.reconnect_timeout,
            depth: self.depth,
            request_rate: self.request_rate,
            ..defaults
        }
    }
}

/// Time limit for removing sockets and files of incomplete saves after SIGTERM.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit of the outcome query before a resume.
const RESUME_QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Warning about a snapshot of a running guest.
const NOT_PAUSED_WARNING: &str = "the guest is not paused and continues to write to its disk after the save: a restore onto that disk is then refused. \
                       For a snapshot pause the guest, save it, copy its disk with cp --preserve=xattr, and resume it";
/// Advice when a guest of unknown outcome can't be resumed.
const DISK_IN_USE_ADVICE: &str =
    "Another front-end seems to use the disk: the destination probably runs the guest. If it does, run forget here";
const MIGRATION: &str = "a migration";
const MEASUREMENT: &str = "a measurement";
/// Time limit for a measurement to end before a migration.
const MEASUREMENT_END_TIMEOUT: Duration = Duration::from_secs(15);
/// Interval of checks for changes during a watch.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);
const MAX_WATCH: Duration = Duration::from_secs(86_400);

/// State of the guest's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum OwnerState {
    /// There is no guest yet: it boots or is waited for.
    #[default]
    Absent,
    /// The guest has arrived and is being started.
    Starting,
    Running,
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
    fn location(self) -> Option<GuestLocation> {
        match self {
            OwnerState::Running => Some(GuestLocation::RunningHere),
            OwnerState::Paused => Some(GuestLocation::PausedHere),
            OwnerState::Migrated => Some(GuestLocation::HandedOver),
            OwnerState::OutcomeUnknown => Some(GuestLocation::OutcomeUnknown),
            OwnerState::Absent | OwnerState::Starting | OwnerState::Failed => None,
        }
    }

    fn at(location: GuestLocation) -> OwnerState {
        match location {
            GuestLocation::RunningHere => OwnerState::Running,
            GuestLocation::PausedHere => OwnerState::Paused,
            GuestLocation::HandedOver => OwnerState::Migrated,
            _ => OwnerState::OutcomeUnknown,
        }
    }

    /// Returns the error for a command that needs another state.
    fn refusal_message(self) -> String {
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
        .into()
    }
}

/// The guest and the operations on it.
#[derive(Default)]
struct GuestOwner {
    guest: Mutex<Option<Guest>>,
    /// View of the guest for status, which never waits.
    view: Mutex<Option<GuestView>>,
    state: Mutex<OwnerState>,
    /// Outcomes of incoming migrations.
    outcomes: Outcomes,
    /// Listener for migrations and outcome queries.
    incoming: Mutex<Option<Arc<MigrationListener>>>,
    /// The migration of an arrived guest that could not be started.
    held: Mutex<Option<MigrationId>>,
    /// Destination and id of an outgoing migration, for outcome queries.
    unknown: Mutex<Option<(Uri, MigrationId)>>,
    /// The operation under way, with its cancel token.
    busy: Mutex<Option<(&'static str, Option<CancelToken>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GuestOwner {
    fn set(&self, guest: Option<Guest>, state: OwnerState) {
        *lock(&self.view) = guest.as_ref().map(Guest::view);
        *lock(&self.guest) = guest;
        *lock(&self.state) = state;
    }

    fn state(&self) -> OwnerState {
        match *lock(&self.state) {
            OwnerState::Absent if self.outcomes.has_arrived() => OwnerState::Starting,
            state => state,
        }
    }

    fn check_failure(&self) {
        let failure = lock(&self.view).as_ref().and_then(GuestView::failure);
        if let Some(failure) = failure
            && std::mem::replace(&mut *lock(&self.state), OwnerState::Failed) != OwnerState::Failed
        {
            eprintln!("guest: {failure}");
        }
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Guest) -> Result<T, VmError>) -> Result<T, String> {
        let mut guest = lock(&self.guest);
        let guest = guest.as_mut().ok_or_else(|| self.state().refusal_message())?;
        ask(guest).map_err(|error| error.to_string())
    }

    /// Runs `work` unless another operation is under way. A migration has priority: it ends a measurement.
    fn run_exclusively<T>(
        &self,
        what: &'static str,
        cancel: Option<CancelToken>,
        work: impl FnOnce() -> Result<T, String>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + MEASUREMENT_END_TIMEOUT;
        loop {
            let mut busy = lock(&self.busy);
            match &*busy {
                None => {
                    *busy = Some((what, cancel));
                    break;
                }
                Some((MEASUREMENT, Some(other))) if what == MIGRATION && Instant::now() < deadline => {
                    other.cancel();
                }
                Some((other, _)) => return Err(format!("{other} is under way: wait for its end, or cancel it")),
            }
            drop(busy);
            std::thread::sleep(Duration::from_millis(1));
        }
        let done = work();
        *lock(&self.busy) = None;
        done
    }

    /// Lets `cancel` end waits for the guest's devices.
    fn interrupt_on(&self, cancel: &CancelToken) -> Result<InterruptOnCancel, String> {
        Ok(InterruptOnCancel::new(self.with(|guest| Ok(guest.interrupts()))?, cancel))
    }

    fn status(&self) -> Value {
        self.check_failure();
        let (state, busy) = (self.state(), lock(&self.busy).as_ref().map(|b| b.0));
        let mut status = json!({"event": "status", "state": state, "location": state.location(), "busy": busy});
        if let Some(guest) = &*lock(&self.view)
            && let (Some(into), Ok(Value::Object(stats))) =
                (status.as_object_mut(), serde_json::to_value(guest.stats()))
        {
            into.extend(stats);
            into.insert("guest_bytes".into(), guest.memory_bytes().into());
            into.insert("devices".into(), serde_json::to_value(guest.connections()).unwrap_or_default());
            into.insert("failure".into(), guest.failure().map(|failure| failure.to_string()).into());
        }
        status
    }

    /// Reports each device now and whenever its connection changes.
    fn watch(&self, seconds: f64, client: &ControlClient<'_>) -> Result<(), String> {
        let for_long = Duration::try_from_secs_f64(seconds).ok().filter(|time| *time <= MAX_WATCH);
        let deadline = Instant::now() + for_long.ok_or(format!("{seconds} seconds: watch for 0 to 86400"))?;
        let mut reported = Vec::new();
        loop {
            let mut connections = lock(&self.view).as_ref().map(GuestView::connections).unwrap_or_default();
            for (number, connection) in connections.iter_mut().enumerate() {
                let mut event = json!(connection);
                event["event"] = "device".into();
                // A longer unavailability alone is not reported.
                connection.away_ms = connection.away_ms.map(|_| 0);
                if reported.get(number) != Some(connection) {
                    client.send_event(&event);
                }
            }
            reported = connections;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || client.has_disconnected() {
                return Ok(());
            }
            std::thread::sleep(WATCH_INTERVAL.min(left));
        }
    }

    fn migrate(&self, arguments: &MigrateArguments, emit: &mut dyn FnMut(Value)) -> Result<(), String> {
        let text_of = |error: &dyn std::error::Error| error.to_string();
        let uri: Uri = arguments.uri.parse().map_err(|error| text_of(&error))?;
        if let Uri::Fd(number) = &uri
            && is_close_on_exec(*number)
        {
            let advice = "pass a descriptor to the guest's process at its start, not to this command";
            return Err(format!("{uri}: the guest's process has opened this descriptor for itself: {advice}"));
        }
        let codec = arguments.codec.parse().map_err(|error| text_of(&error))?;
        let options = StreamOptions {
            channels: if uri.is_single_channel() { 1 } else { arguments.channels },
            one_way: arguments.one_way,
            ..StreamOptions::new().map_err(|error| text_of(&error))?
        };
        options.limiter.set(arguments.bandwidth);
        let policy = ConvergencePolicy {
            downtime_limit: Duration::from_millis(arguments.downtime_ms),
            max_rounds: arguments.max_rounds,
        };
        let parameters = MigrationParameters {
            policy,
            codec,
            verify: arguments.verify,
            outcome_query_timeout: OUTCOME_QUERY_TIMEOUT,
            switchover_timeout: arguments.switchover_timeout_ms.map(Duration::from_millis),
            continue_here: arguments.continue_here,
        };
        self.run_exclusively(MIGRATION, Some(options.cancel.clone()), || {
            let state = self.state();
            if !matches!(state, OwnerState::Running | OwnerState::Paused) {
                return Err(state.refusal_message());
            }
            let vm = GuestSourceVm::new(&self.guest).ok_or("there is no guest here")?;
            let connection = connect(&uri, &options).map_err(|error| text_of(&error))?;
            // A one-way stream may be kept and restored at any time.
            let mut vm = vm.with_cancel(connection.cancel_token()).with_disk_generations(connection.one_way);
            *lock(&self.unknown) = Some((uri, connection.id));
            let mut tell = |event| emit(serde_json::to_value(event).unwrap_or_default());
            if parameters.continue_here && state == OwnerState::Running && connection.is_to_file() {
                tell(MigrationEvent::Warning { message: NOT_PAUSED_WARNING.into() });
            }
            let left = migrate(&mut vm, connection, &parameters, &mut tell);
            *lock(&self.state) = match &left {
                Ok(_) if parameters.continue_here => state,
                Ok(_) => OwnerState::Migrated,
                Err(failure) => OwnerState::at(failure.location),
            };
            if self.state() == OwnerState::Migrated {
                *lock(&self.view) = None;
                tracing::info!("the guest has moved to {}", arguments.uri);
            }
            left.map(drop).map_err(|failure| text_of(&failure))
        })
    }

    /// Resumes a paused guest, or one of unknown outcome.
    fn resume(&self) -> Result<(), String> {
        let cancel = CancelToken::new().map_err(|error| error.to_string())?;
        self.run_exclusively("a resume", Some(cancel.clone()), || {
            let state = self.state();
            match state {
                OwnerState::Paused => {}
                OwnerState::OutcomeUnknown => self.query_before_resume()?,
                OwnerState::Running => return Err("the guest runs here already".into()),
                other => return Err(other.refusal_message()),
            }
            let interrupt = self.interrupt_on(&cancel)?;
            let downtime = self.with(|guest| match guest.start() {
                Ok(()) => Ok(guest.downtime_ns()),
                Err(error @ GuestError::Device(FrontendError::Refused { .. }))
                    if state == OwnerState::OutcomeUnknown =>
                {
                    // Nothing of the guest may run here now.
                    let _ = guest.stop_devices();
                    Err(format!("{error}. {DISK_IN_USE_ADVICE}").into())
                }
                Err(error) => Err(error.into()),
            })?;
            drop(interrupt);
            *lock(&self.state) = OwnerState::Running;
            if let Some(id) = lock(&self.held).take() {
                self.outcomes.record_started(id, Started { observed_downtime_ns: downtime, start_ns: 0 });
            }
            Ok(())
        })
    }

    /// Queries the destination before a resume. The operator's assertion counts unless the destination contradicts it.
    fn query_before_resume(&self) -> Result<(), String> {
        let Some((uri, id)) = lock(&self.unknown).clone() else { return Ok(()) };
        match query_outcome(&uri, id, RESUME_QUERY_TIMEOUT) {
            Ok(ToSource::Started(_)) => {
                self.set(None, OwnerState::Migrated);
                Err("the destination confirms that it runs the guest: it was released here".into())
            }
            Ok(ToSource::Held(held)) => {
                Err(format!("the destination has the guest ({}): end the destination's process first", held.message))
            }
            _ => Ok(()),
        }
    }

    /// Releases a guest that runs at the destination according to the operator.
    fn forget(&self) -> Result<(), String> {
        self.run_exclusively("a forget", None, || match self.state() {
            OwnerState::OutcomeUnknown => {
                self.set(None, OwnerState::Migrated);
                tracing::info!("the guest was released by forget");
                Ok(())
            }
            OwnerState::Running | OwnerState::Paused => {
                Err("the guest is here: forget is only for a guest of unknown outcome; quit ends this one".into())
            }
            other => Err(other.refusal_message()),
        })
    }

    /// Checks that the process may end: not with a guest that has arrived meanwhile, and not with one of unknown
    /// outcome.
    fn prepare_quit(&self) -> Result<(), String> {
        match (self.state(), &*lock(&self.incoming)) {
            (OwnerState::OutcomeUnknown, _) => Err(OwnerState::OutcomeUnknown.refusal_message()),
            (OwnerState::Absent | OwnerState::Starting, Some(incoming)) => {
                if !self.outcomes.close("the destination's process was told to quit") {
                    return Err("a guest has arrived meanwhile: run quit again to end it".into());
                }
                incoming.close();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn cancel(&self) -> Result<(), String> {
        match &*lock(&self.busy) {
            Some((_, Some(cancel))) if cancel.cancel() => Ok(()),
            Some((_, Some(_))) => {
                Err("too late: the commit has been sent, and the destination decides the outcome".into())
            }
            _ if self.outcomes.give_up_all("cancelled at the destination") => Ok(()),
            _ if self.outcomes.cancel_start() => Ok(()),
            _ if self.state() == OwnerState::Absent && lock(&self.incoming).is_some() => {
                Err("no migration has started yet: this process waits for one, and quit ends it".into())
            }
            _ => Err("no migration is under way".into()),
        }
    }

    fn dirty_rate(&self, seconds: f64, bandwidth: u64, downtime_ms: u64) -> Result<Value, String> {
        if !(0.01..=3600.0).contains(&seconds) {
            return Err(format!("{seconds} seconds: measure for 0.01 to 3600"));
        }
        let cancel = CancelToken::new().map_err(|error| error.to_string())?;
        self.run_exclusively(MEASUREMENT, Some(cancel.clone()), || {
            let (mut sources, bytes) = self.with(|guest| Ok((dirty_sources(guest), guest.memory().size())))?;
            let interval = Duration::from_millis(100);
            // Logging devices are stopped regularly after the start.
            let mut starting = Some(self.interrupt_on(&cancel)?);
            let rate = measure_dirty_rate(&mut sources, Duration::from_secs_f64(seconds), interval, |time| {
                starting = None;
                cancel.wait(time).is_ok()
            });
            if cancel.is_cancelled() {
                return Err("the measurement was ended by a migration, which has priority, or by cancel".into());
            }
            let rate = rate.map_err(|error| error.to_string())?;
            let forecast = forecast(&(&rate).into(), bandwidth as f64, downtime_ms as f64, bytes);
            Ok(json!({"event": "dirty_rate", "rate": rate, "bandwidth": bandwidth, "forecast": forecast}))
        })
    }

    fn verify(&self) -> Result<Verified, String> {
        let cancel = CancelToken::new().map_err(|error| error.to_string())?;
        self.run_exclusively("a verification", Some(cancel.clone()), || {
            let _interrupt = self.interrupt_on(&cancel)?;
            self.with(|guest| Ok(guest.verify()?))
        })
    }

    fn pause(&self) -> Result<(), String> {
        self.run_exclusively("a pause", None, || {
            match self.state() {
                OwnerState::Running => self.with(|guest| Ok(guest.pause()?))?,
                OwnerState::Paused => return Err("the guest is paused already".into()),
                other => return Err(other.refusal_message()),
            }
            *lock(&self.state) = OwnerState::Paused;
            Ok(())
        })
    }
}

struct GuestCommands {
    owner: Arc<GuestOwner>,
    quit: crossbeam::channel::Sender<()>,
}

/// Returns true if a descriptor is close-on-exec: it was not passed to this process.
fn is_close_on_exec(number: i32) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_CLOEXEC != 0)
}

impl CommandHandler for GuestCommands {
    fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), String> {
        let owner = &self.owner;
        match command {
            ControlCommand::Status => client.send_event(&owner.status()),
            ControlCommand::Watch { seconds } => owner.watch(seconds, client)?,
            ControlCommand::Migrate(arguments) => owner.migrate(&arguments, &mut |event| client.send_event(&event))?,
            ControlCommand::Cancel => owner.cancel()?,
            ControlCommand::Pause => owner.pause()?,
            ControlCommand::Resume => owner.resume()?,
            ControlCommand::Forget => owner.forget()?,
            ControlCommand::Verify => {
                let verified = owner.verify()?;
                let mut status = owner.status();
                status["verified_memory_bytes"] = verified.memory.into();
                status["verified_disk_bytes"] = verified.disk.into();
                client.send_event(&status);
            }
            ControlCommand::DirtyRate { seconds, bandwidth, downtime_ms } => {
                client.send_event(&owner.dirty_rate(seconds, bandwidth, downtime_ms)?);
            }
            ControlCommand::Quit => owner.prepare_quit()?,
            other => return Err(format!("{other:?} is not supported by a built-in guest")),
        }
        Ok(())
    }

    fn quit(&self) {
        tracing::info!("ends by quit");
        // Full if quit was requested before.
        let _ = self.quit.try_send(());
    }
}
