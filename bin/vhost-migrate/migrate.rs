//! `vhost-migrate migrate`: asks the process that owns a guest to migrate it, and reports the progress.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vhost_migrate::control::{self, ControlCommand, ControlEvent, MigrateArguments};
use vhost_migrate::guest::Operation;
use vhost_migrate::migrate::{GuestLocation, MigrationEvent};
use vhost_migrate::stream::{Codec, Uri};

use crate::progress::{OutputArguments, Progress};
use crate::signals::on_every_interrupt;
use crate::units;
use crate::values;
use crate::wrong_arguments;

/// Move a running guest to another process or host
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate migrate --control guest.ctl unix:/run/migration.sock
  vhost-migrate migrate --control guest.ctl tcp:host-b:4444 --codec zstd:1 --channels 4 --downtime 50
  vhost-migrate migrate --control guest.ctl file:guest.vhm               moves the guest into the file
  vhost-migrate migrate --control guest.ctl file:guest.vhm --continue    saves the guest, which keeps running here

A file holds the guest's memory, CPUs and device state, but not its disks. It records the identity and generation of each
disk; a restore onto another or a changed disk is refused. For a snapshot: pause the guest, save it with --continue, copy its
disks with their extended attributes (cp --preserve=xattr), resume it, and restore it onto the copies.

Exit status: 0 handed over: the destination runs the guest, or a complete file holds it; 1 failed, the guest runs here;
2 wrong arguments; 3 outcome unknown: the guest is kept here, paused, until `resume` or `forget`; 4 failed, the guest is
paused here; 5 no contact with the guest's process: the location is unknown; 6 failed, and there is no guest here that can run.
Ctrl-C cancels: the guest keeps running here. A second one ends only this command.")]
pub(crate) struct Arguments {
    /// Control socket of the process that owns the guest
    #[arg(long, value_name = "SOCKET", value_parser = values::socket_path())]
    control: PathBuf,
    /// Destination: tcp:HOST:PORT, unix:PATH, file:PATH, exec:COMMAND or fd:N, a descriptor that was passed to the
    /// guest's process
    #[arg(value_parser = values::migration_target)]
    uri: Uri,
    #[command(flatten)]
    transfer: TransferArguments,
    /// Expect no replies, as over a pipe or a filter command: the outcome stays unknown, and the guest is kept here
    /// until `forget`
    #[arg(long)]
    one_way: bool,
    /// Resume the guest here once a file or device holds it, as a snapshot; without this it is moved there
    #[arg(long = "continue", conflicts_with = "one_way")]
    continue_here: bool,
    #[command(flatten)]
    output: OutputArguments,
}

/// Arguments for the transfer, common to `migrate` and `demo`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TransferArguments {
    /// Compression of pages: none, zstd or zstd:LEVEL
    #[arg(long, default_value_t = Codec::None)]
    pub(crate) codec: Codec,
    /// Connections that carry pages
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) channels: u16,
    /// Longest acceptable downtime, for example 50ms; a number alone is milliseconds
    #[arg(long, default_value = "300ms", value_parser = units::milliseconds, value_name = "TIME")]
    pub(crate) downtime: u64,
    /// Longest switchover, from stopping the guest to its start at the destination; after that the guest resumes here.
    /// By default four times the downtime, at least 10s
    #[arg(long, value_parser = units::milliseconds_limit, value_name = "TIME")]
    pub(crate) switchover_timeout: Option<u64>,
    /// Bandwidth limit while the guest runs, for example 500MiB/s
    #[arg(long, value_parser = units::rate_limit, value_name = "RATE")]
    pub(crate) bandwidth: Option<u64>,
    /// Maximum number of rounds; then the migration fails
    #[arg(long, default_value_t = 100)]
    pub(crate) max_rounds: u32,
    /// Compare all memory by hashes before the guest is handed over. Adds about 0.1 s per GiB to the downtime
    #[arg(long)]
    pub(crate) verify: bool,
}

impl TransferArguments {
    /// Returns the arguments of the command to the guest's process.
    pub(crate) fn migrate_arguments(&self, uri: impl Into<String>) -> MigrateArguments {
        MigrateArguments {
            uri: uri.into(),
            codec: self.codec.to_string(),
            channels: self.channels,
            downtime_ms: self.downtime,
            switchover_timeout_ms: self.switchover_timeout,
            bandwidth: self.bandwidth,
            max_rounds: self.max_rounds,
            verify: self.verify,
            continue_here: false,
            one_way: false,
        }
    }
}

/// Exit status when the guest's process does not reply.
const NO_CONTACT: u8 = 5;

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    if arguments.continue_here && matches!(arguments.uri, Uri::Tcp { .. } | Uri::Unix(_) | Uri::Exec(_)) {
        wrong_arguments("--continue saves to a file or device: give file:PATH, or fd:N for one that is open");
    }
    if let Err(error) = cancel_on_interrupt(&arguments.control) {
        eprintln!("signals: {error}");
        return ExitCode::FAILURE;
    }
    let mut progress = Progress::new(arguments.output);
    let uri = absolute_uri(arguments.uri);
    let moves = uri.starts_with("file:") && !arguments.continue_here;
    let mut advice = moves.then(|| {
        format!(
            "this moves the guest into {uri}; it does not run here afterwards. With --continue it keeps running here"
        )
    });
    let (continue_here, one_way) = (arguments.continue_here, arguments.one_way);
    let order = MigrateArguments { continue_here, one_way, ..arguments.transfer.migrate_arguments(uri) };
    let order = ControlCommand::Migrate(order);
    let tell = |event: ControlEvent| {
        if matches!(&event, ControlEvent::Migration(event) if matches!(**event, MigrationEvent::Started { .. })) {
            advice.take().iter().for_each(|advice| eprintln!("{advice}"));
        }
        progress.event(&event);
    };
    match control::call(&arguments.control, &order, tell) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_location(&arguments.control, &error),
    }
}

/// Makes the path of a URI absolute, because the guest's process may have another working directory.
fn absolute_uri(uri: Uri) -> String {
    match uri {
        Uri::File(path) => Uri::File(std::path::absolute(&path).unwrap_or(path)),
        Uri::Unix(path) => Uri::Unix(std::path::absolute(&path).unwrap_or(path)),
        uri => uri,
    }
    .to_string()
}

/// Time limit for a cancelled migration to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for the guest's process to reply while a cancelled migration ends.
const STATUS_TIMEOUT: Duration = Duration::from_millis(1500);

/// Cancels the migration at the first SIGINT or SIGTERM, and ends this process at the second, or when the guest's
/// process does not reply.
fn cancel_on_interrupt(control: &Path) -> io::Result<()> {
    let control = control.to_owned();
    on_every_interrupt(move |count| {
        let control = control.clone();
        let cancel = move || cancel(&control);
        // The cancellation runs on a separate thread, so that this one can handle the next signal.
        let waits = count == 1 && std::thread::Builder::new().name("cancel".into()).spawn(cancel).is_ok();
        if !waits {
            std::process::exit(NO_CONTACT.into());
        }
    })
}

fn cancel(control: &Path) {
    match control::call_with_timeout(control, &ControlCommand::Cancel {}, STATUS_TIMEOUT, |_| ()) {
        Ok(()) => {
            let begun = Instant::now();
            let answers =
                || control::call_with_timeout(control, &ControlCommand::Status {}, STATUS_TIMEOUT, |_| ()).is_ok();
            // The main thread ends this process when the migration ends.
            while begun.elapsed() < CANCEL_TIMEOUT && answers() {
                std::thread::sleep(STATUS_INTERVAL);
            }
            eprintln!("cancelled, but the migration has not ended within {:?}", begun.elapsed());
        }
        // The migration cannot be cancelled any more, or another operation is under way. The main thread reports the
        // end.
        Err(error) if error.kind() == io::ErrorKind::Other => return eprintln!("can't cancel: {error}"),
        Err(error) => eprintln!("can't cancel: {error}"),
    }
    eprintln!("no contact with the guest's process: the location of the guest is unknown");
    std::process::exit(NO_CONTACT.into());
}

/// Maximum wait for the end of a migration whose events were lost.
const LOST_REPORT_TIMEOUT: Duration = Duration::from_secs(60);
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Reports the location of the guest after a failed migration, or one whose end was not received.
fn report_location(control: &Path, error: &io::Error) -> ExitCode {
    let begun = Instant::now();
    let status = loop {
        match control::status(control) {
            // An error reply means that the migration has ended. A broken connection does not.
            Ok(status) if error.kind() == io::ErrorKind::Other || status.busy != Some(Operation::Migration) => {
                break status;
            }
            Ok(_) => {}
            Err(silent) => {
                eprintln!("no contact with the guest's process, the location of the guest is unknown: {error}");
                if silent.to_string() != error.to_string() {
                    eprintln!("its status is not available: {silent}");
                }
                return ExitCode::from(NO_CONTACT);
            }
        }
        if begun.elapsed() >= LOST_REPORT_TIMEOUT {
            eprintln!("no contact with the migration, which is still under way: {error}");
            return ExitCode::from(NO_CONTACT);
        }
        std::thread::sleep(STATUS_INTERVAL);
    };
    let (says, code) = match status.location {
        // An error reply with this location means that another migration has handed the guest over.
        Some(GuestLocation::HandedOver) if error.kind() == io::ErrorKind::Other => ("there is no guest here".into(), 6),
        Some(GuestLocation::HandedOver) => {
            eprintln!("the guest was handed over, but the migration's report is lost: {error}");
            return ExitCode::SUCCESS;
        }
        Some(GuestLocation::RunningHere) => ("the guest still runs here".into(), 1),
        Some(GuestLocation::PausedHere) => ("the guest is paused here".into(), 4),
        Some(GuestLocation::OutcomeUnknown) => (
            "the outcome is unknown: the guest is kept here, paused. Run `vhost-migrate forget` if the destination runs \
             it, `vhost-migrate resume` if it does not and never will"
                .into(),
            3,
        ),
        _ => (format!("no guest here can run ({})", status.state), 6),
    };
    let still = status.busy.map_or(String::new(), |busy| format!(" ({busy} is under way)"));
    eprintln!("migration failed, {says}{still}: {error}");
    ExitCode::from(code)
}
