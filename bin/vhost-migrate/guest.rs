//! `vhost-migrate guest`: a process that owns a built-in guest, or waits for one to arrive.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, bounded};
use crossbeam::select;
use nix::sys::signal::Signal;
use vhost_migrate::control::{
    self, CommandError, CommandHandler, ControlClient, ControlCommand, ControlEvent, MigrateArguments,
};
use vhost_migrate::frontend::Interrupt;
use vhost_migrate::guest::{Guest, GuestConfig, GuestIncomingVm, GuestOwner, OwnerState, connect_backends};
use vhost_migrate::migrate::{
    ConvergencePolicy, MigrateError, MigrationListener, MigrationParameters, OUTCOME_QUERY_TIMEOUT, VmError, receive,
};
use vhost_migrate::stream::{StreamListener, StreamOptions, Uri, remove_unfinished_saves};
use vhost_migrate::unstable::with_causes;

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
    /// Disk: the vhost-user socket of a block back-end, or a device /dev/vhost-vdpa-N; once for each disk
    #[arg(long, required = true, value_name = "PATH", value_parser = values::socket_path())]
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
        eprintln!("guest: {}", with_causes(error.as_ref()));
        ExitCode::FAILURE
    });
    control::remove_sockets();
    ended
}

fn run_guest_process(arguments: &Arguments) -> Result<ExitCode, VmError> {
    arguments.metrics.start().map_err(|error| with_causes(error.as_ref()).to_string())?;
    let (listener, _path) = control::bind(&arguments.control)?;
    let owner = Arc::new(GuestOwner::default());
    let (quit, quitting) = bounded(1);
    let handler = Arc::new(GuestCommands { owner: owner.clone(), quit });
    // The listener is created before the first reply: a client that learns that this process has no guest can then
    // migrate one to it.
    let incoming = match &arguments.incoming {
        Some(uri) => {
            Some((uri, Arc::new(MigrationListener::start(StreamListener::bind(uri)?, owner.outcomes().clone())?)))
        }
        None => None,
    };
    owner.set_incoming(incoming.as_ref().map(|(_, incoming)| incoming.clone()));
    std::thread::spawn(move || control::serve(listener, handler));

    match incoming {
        // The listener is kept to the end, because a source may still query the outcome of its migration.
        Some((uri, incoming)) => {
            println!("waits for a guest at {uri}");
            wait_for_arrival(&owner, &incoming, uri, arguments)?;
            incoming.close_after(2 * OUTCOME_QUERY_TIMEOUT);
        }
        None => {
            let config = arguments.config();
            let (backends, overwrite) = (arguments.backend.clone(), arguments.workload.overwrite);
            let (done, booted) = bounded(1);
            // The guest boots on a separate thread, so that quit ends this process at once even if a back-end hangs.
            let boot = move || drop(done.send(boot(config, &backends, overwrite)));
            std::thread::Builder::new().name("boot".into()).spawn(boot)?;
            select! {
                recv(booted) -> guest => {
                    let guest = guest??;
                    tracing::info!("the guest has started, with disks from {}", join_paths(&arguments.backend));
                    owner.own(Some(guest), true);
                }
                recv(quitting) -> _ => return Ok(ExitCode::SUCCESS),
            }
        }
    }
    // A failure of the guest is reported immediately.
    loop {
        let waited = quitting.recv_timeout(Duration::from_millis(100));
        if let Some(failure) = owner.new_failure() {
            eprintln!("guest: {}", with_causes(&*failure));
        }
        if waited != Err(RecvTimeoutError::Timeout) {
            break;
        }
    }
    // Stops listening and removes the socket.
    owner.set_incoming(None);
    Ok(if owner.state() == OwnerState::Failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Formats the paths of the disks.
fn join_paths(backends: &[PathBuf]) -> String {
    backends.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Creates and starts a guest.
fn boot(config: GuestConfig, backends: &[PathBuf], overwrite: bool) -> Result<Guest, VmError> {
    let devices = connect_backends(backends, &config, &Interrupt::new()?)?;
    let mut guest = Guest::new(config)?;
    guest.boot(devices)?;
    guest.probe_disks(overwrite)?;
    guest.resume()?;
    Ok(guest)
}

/// Receives a guest. A failed migration leaves the guest at its source. This function then waits for the next
/// migration, until quit.
fn wait_for_arrival(
    owner: &GuestOwner,
    incoming: &MigrationListener,
    uri: &Uri,
    arguments: &Arguments,
) -> Result<(), VmError> {
    while let Some(connection) = incoming.next()? {
        let id = connection.id;
        let (was_saved, any_disks) = (connection.one_way, arguments.ignore_disk_generation);
        let arrival = GuestIncomingVm::new(arguments.backend.clone())?;
        let mut arrival = arrival.with_disk_checks(was_saved, any_disks);
        match receive(&mut arrival, connection, owner.outcomes(), arguments.switchover_timeout) {
            Ok(received) => {
                let is = if received.running { "runs" } else { "is paused" };
                tracing::info!(
                    "a guest has arrived at {uri} and {is} here, with disks from {}",
                    join_paths(&arguments.backend)
                );
                owner.own(arrival.into_guest(), received.running);
                return Ok(());
            }
            Err(error @ MigrateError::NotStarted(_)) => {
                eprintln!("guest: {}", with_causes(&error));
                owner.own_unstarted(arrival.into_guest(), id);
                return Ok(());
            }
            Err(error) if uri.is_single_channel() => return Err(error.into()),
            Err(error) => {
                tracing::warn!("no guest has arrived: {}. Waiting for the next migration", with_causes(&error))
            }
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
        let working_set = self.working_set.unwrap_or(defaults.working_set);
        defaults
            .with_cpus(self.cpus)
            .with_dirty_rate(self.dirty_rate)
            .with_working_set(working_set)
            .with_disks(disks)
            .with_queues(self.queues)
            .with_queue_size(self.queue_size)
            .with_packed(self.packed)
            .with_inflight_migration(self.inflight_migration)
            .with_reconnect_timeout(self.reconnect_timeout)
            .with_depth(self.depth)
            .with_request_rate(self.request_rate)
    }
}

/// Time limit for removing sockets and files of incomplete saves after SIGTERM.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval of checks for changes during a watch.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);
const MAX_WATCH: Duration = Duration::from_secs(86_400);

struct GuestCommands {
    owner: Arc<GuestOwner>,
    quit: crossbeam::channel::Sender<()>,
}

/// Returns true if a descriptor is close-on-exec. Such a descriptor was not passed to this process.
fn is_close_on_exec(number: i32) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_CLOEXEC != 0)
}

/// Migrates the guest with the given arguments, and sends events to `client`.
fn migrate(owner: &GuestOwner, arguments: &MigrateArguments, client: &ControlClient<'_>) -> Result<(), VmError> {
    let uri: Uri = arguments.uri.parse()?;
    if let Uri::Fd(number) = &uri
        && is_close_on_exec(*number)
    {
        let advice = "pass a descriptor to the guest's process at its start, not to this command";
        return Err(format!("{uri}: the guest's process has opened this descriptor for itself: {advice}").into());
    }
    let codec = arguments.codec.parse()?;
    let options = StreamOptions::new()?
        .with_channels(if uri.is_single_channel() { 1 } else { arguments.channels })
        .with_one_way(arguments.one_way);
    options.limiter.set(arguments.bandwidth);
    let policy = ConvergencePolicy::new(Duration::from_millis(arguments.downtime_ms), arguments.max_rounds);
    let parameters = MigrationParameters::default()
        .with_policy(policy)
        .with_codec(codec)
        .with_verify(arguments.verify)
        .with_switchover_timeout(arguments.switchover_timeout_ms.map(Duration::from_millis))
        .with_continue_here(arguments.continue_here);
    let mut tell = |event| client.send_event(&ControlEvent::Migration(Box::new(event)));
    Ok(owner.migrate(&uri, &options, &parameters, &mut tell)?)
}

/// Reports each device now and whenever its connection changes.
fn watch(owner: &GuestOwner, seconds: f64, client: &ControlClient<'_>) -> Result<(), String> {
    let for_long = Duration::try_from_secs_f64(seconds).ok().filter(|time| *time <= MAX_WATCH);
    let deadline = Instant::now() + for_long.ok_or(format!("{seconds} seconds: watch for 0 to 86400"))?;
    let mut reported = Vec::new();
    loop {
        let mut connections = owner.connections();
        for (number, connection) in connections.iter_mut().enumerate() {
            let event = ControlEvent::Device(connection.clone());
            // A change of the time of unavailability alone is not reported.
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

fn dirty_rate(owner: &GuestOwner, seconds: f64, bandwidth: u64, downtime_ms: u64) -> Result<ControlEvent, VmError> {
    if !(0.01..=3600.0).contains(&seconds) {
        return Err(format!("{seconds} seconds: measure for 0.01 to 3600").into());
    }
    let measured = owner.dirty_rate(Duration::from_secs_f64(seconds), bandwidth, downtime_ms)?;
    Ok(ControlEvent::DirtyRate(Box::new(measured)))
}

impl CommandHandler for GuestCommands {
    fn command(&self, command: ControlCommand, client: &ControlClient<'_>) -> Result<(), CommandError> {
        let owner = &self.owner;
        match command {
            ControlCommand::Status {} => client.send_event(&owner.status().into()),
            ControlCommand::Watch { seconds } => watch(owner, seconds, client)?,
            ControlCommand::Migrate(arguments) => migrate(owner, &arguments, client)?,
            ControlCommand::Cancel {} => owner.cancel()?,
            ControlCommand::Pause {} => owner.pause()?,
            ControlCommand::Resume {} => owner.resume()?,
            ControlCommand::Forget {} => owner.forget()?,
            ControlCommand::Verify {} => {
                let verified = owner.verify()?;
                client.send_event(&ControlEvent::Status {
                    status: Box::new(owner.status()),
                    verified_memory_bytes: Some(verified.memory),
                    verified_disk_bytes: Some(verified.disk),
                });
            }
            ControlCommand::DirtyRate { seconds, bandwidth, downtime_ms } => {
                client.send_event(&dirty_rate(owner, seconds, bandwidth, downtime_ms)?);
            }
            ControlCommand::Quit {} => owner.prepare_quit()?,
            other => return Err(format!("{other:?} is not supported by a built-in guest").into()),
        }
        Ok(())
    }

    fn quit(&self) {
        tracing::info!("ends by quit");
        // The channel is full if quit was requested before.
        let _ = self.quit.try_send(());
    }
}
