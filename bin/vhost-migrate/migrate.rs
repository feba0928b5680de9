//! `vhost-migrate migrate`: asks the process that owns a guest to move it, and tells how it goes.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use vhost_migrate::control::{self, ControlCommand, MigrateArguments};
use vhost_migrate::migrate::GuestLocation;
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
  vhost-migrate migrate --control guest.ctl file:guest.vhm --continue    saves it, and it goes on here

A file holds the guest's memory, CPUs and the state of its devices, not its disks: of those it records which they are and what
state they are in, and a restore onto a disk that has gone on, or another, is refused. To keep both: pause the guest, save it
with --continue, copy its disks with their extended attributes (cp --preserve=xattr), resume it, restore it onto the copies.

Exit status: 0 handed over: the destination runs the guest, or a complete file holds it; 1 failed, the guest runs here;
2 wrong arguments; 3 outcome unknown: the guest is kept here, paused, until `resume` or `forget`; 4 failed, the guest is
paused here; 5 no contact with the guest's process, so that nothing is known; 6 failed, and no guest here can run.
Ctrl-C cancels: the guest goes on here. A second one ends this command alone.")]
pub(crate) struct Arguments {
    /// Control socket of the process that owns the guest
    #[arg(long, value_name = "SOCKET", value_parser = values::socket_path())]
    control: PathBuf,
    /// Where to: tcp:HOST:PORT, unix:PATH, file:PATH, exec:COMMAND or fd:N, a descriptor that the guest's process was
    /// started with
    #[arg(value_parser = values::migration_target)]
    uri: Uri,
    #[command(flatten)]
    transfer: TransferArguments,
    /// Want no answers, as over a pipe or a command that is a filter: the outcome stays unknown, and the guest is kept here
    /// until `forget`
    #[arg(long)]
    one_way: bool,
    /// Let the guest go on here once a file or device holds it, as a snapshot; without this it is moved there
    #[arg(long = "continue", conflicts_with = "one_way")]
    continue_here: bool,
    #[command(flatten)]
    output: OutputArguments,
}

/// How pages travel; the same for `migrate` and `demo`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TransferArguments {
    /// How pages are compressed: none, zstd or zstd:LEVEL
    #[arg(long, default_value_t = Codec::None)]
    pub(crate) codec: Codec,
    /// Connections that carry pages
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) channels: u16,
    /// Longest stop of the guest that is acceptable, for example 50ms; a number alone is milliseconds
    #[arg(long, default_value = "300ms", value_parser = units::milliseconds, value_name = "TIME")]
    pub(crate) downtime: u64,
    /// Longest switchover, from stopping the guest to its start at the destination; then the guest goes on here. By
    /// default four times the downtime, at least 10s
    #[arg(long, value_parser = units::milliseconds_limit, value_name = "TIME")]
    pub(crate) switchover_timeout: Option<u64>,
    /// Limit while the guest runs, for example 500MiB/s
    #[arg(long, value_parser = units::rate_limit, value_name = "RATE")]
    pub(crate) bandwidth: Option<u64>,
    /// Rounds after which a migration that does not converge is given up
    #[arg(long, default_value_t = 100)]
    pub(crate) max_rounds: u32,
    /// Compare all memory, by hashes, before the guest is handed over. It stands still for it: about 0.1 s per GiB
    #[arg(long)]
    pub(crate) verify: bool,
}

impl TransferArguments {
    /// The order to the guest's process.
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

/// Exit status when the guest's process does not answer.
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
        format!("this moves the guest into {uri}: it runs here no more then. With --continue it goes on here")
    });
    let (continue_here, one_way) = (arguments.continue_here, arguments.one_way);
    let order = MigrateArguments { continue_here, one_way, ..arguments.transfer.migrate_arguments(uri) };
    let order = ControlCommand::Migrate(order);
    let tell = |event: Value| {
        // There is a guest that can be moved.
        if event["event"] == "started" {
            advice.take().iter().for_each(|advice| eprintln!("{advice}"));
        }
        progress.event(&event);
    };
    match control::call(&arguments.control, &order, tell) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_location(&arguments.control, &error),
    }
}

/// A URI whose path does not depend on the folder of the process that opens it.
fn absolute_uri(uri: Uri) -> String {
    match uri {
        Uri::File(path) => Uri::File(std::path::absolute(&path).unwrap_or(path)),
        Uri::Unix(path) => Uri::Unix(std::path::absolute(&path).unwrap_or(path)),
        uri => uri,
    }
    .to_string()
}

/// The longest time that a migration may take to end once it is cancelled.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest time that the guest's process may take to answer meanwhile; then it hangs.
const STATUS_TIMEOUT: Duration = Duration::from_millis(1500);

/// Has the first SIGINT or SIGTERM cancel the migration and the second end this process, which also ends by itself when the
/// guest's process does not answer.
fn cancel_on_interrupt(control: &Path) -> io::Result<()> {
    let control = control.to_owned();
    on_every_interrupt(move |count| {
        let control = control.clone();
        let cancel = move || cancel(&control);
        // On a thread of its own, so that the next signal finds this one free.
        let waits = count == 1 && std::thread::Builder::new().name("cancel".into()).spawn(cancel).is_ok();
        if !waits {
            std::process::exit(NO_CONTACT.into());
        }
    })
}

fn cancel(control: &Path) {
    match control::call_with_timeout(control, &ControlCommand::Cancel, STATUS_TIMEOUT, |_| ()) {
        Ok(()) => {
            let begun = Instant::now();
            let answers =
                || control::call_with_timeout(control, &ControlCommand::Status, STATUS_TIMEOUT, |_| ()).is_ok();
            // The end of the migration is the end of this process.
            while begun.elapsed() < CANCEL_TIMEOUT && answers() {
                std::thread::sleep(STATUS_INTERVAL);
            }
            eprintln!("cancelled, but the migration has not ended within {:?}", begun.elapsed());
        }
        // It is too late, or something else is under way: its own end tells.
        Err(error) if error.kind() == io::ErrorKind::Other => return eprintln!("can't cancel: {error}"),
        Err(error) => eprintln!("can't cancel: {error}"),
    }
    eprintln!("no contact with the guest's process: it is not known where the guest runs");
    std::process::exit(NO_CONTACT.into());
}

/// The longest wait for a migration whose reports are lost.
const LOST_REPORT_TIMEOUT: Duration = Duration::from_secs(60);
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Says where the guest is after a migration that did not end well, or whose end was not heard.
fn report_location(control: &Path, error: &io::Error) -> ExitCode {
    let begun = Instant::now();
    let status = loop {
        let mut status = Value::Null;
        if let Err(silent) = control::call(control, &ControlCommand::Status, |event| status = event) {
            eprintln!("no contact with the guest's process, nothing is known of the guest: {error}");
            if silent.to_string() != error.to_string() {
                eprintln!("its status can't be had: {silent}");
            }
            return ExitCode::from(NO_CONTACT);
        }
        // An answer is the end; a connection that has broken is none.
        let is_over = error.kind() == io::ErrorKind::Other || status["busy"] != "a migration";
        if is_over {
            break status;
        }
        if begun.elapsed() >= LOST_REPORT_TIMEOUT {
            eprintln!("no contact with the migration, which is still under way: {error}");
            return ExitCode::from(NO_CONTACT);
        }
        std::thread::sleep(STATUS_INTERVAL);
    };
    let (busy, state) = (&status["busy"], &status["state"]);
    let (says, code) = match serde_json::from_value(status["location"].clone()) {
        // The answer was an error: then it was another migration that did it.
        Ok(GuestLocation::HandedOver) if error.kind() == io::ErrorKind::Other => ("there is no guest here".into(), 6),
        Ok(GuestLocation::HandedOver) => {
            eprintln!("the guest was handed over; the migration's report is lost: {error}");
            return ExitCode::SUCCESS;
        }
        Ok(GuestLocation::RunningHere) => ("the guest still runs here".into(), 1),
        Ok(GuestLocation::PausedHere) => ("the guest is paused here".into(), 4),
        Ok(GuestLocation::OutcomeUnknown) => (
            "the outcome is unknown: the guest is kept here, paused. Run `vhost-migrate forget` if the destination runs \
             it, `vhost-migrate resume` if it does not and never will"
                .into(),
            3,
        ),
        _ => (format!("no guest here can run ({})", state.as_str().unwrap_or("unknown")), 6),
    };
    let still = busy.as_str().map_or(String::new(), |busy| format!(" ({busy} is under way)"));
    eprintln!("migration failed, {says}{still}: {error}");
    ExitCode::from(code)
}
