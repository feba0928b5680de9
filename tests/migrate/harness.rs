//! Migrations with both ends in this process, over any transport.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use vhost_migrate::migrate::{
    ConvergencePolicy, GuestLocation, IncomingReport, MigrateError, MigrationEvent, MigrationFailure,
    MigrationListener, MigrationParameters, MigrationReport, Outcomes, migrate, receive,
};
use vhost_migrate::stream::{self, StreamError, StreamListener, StreamOptions, Uri};
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, IncomingGuest, PATIENCE, RefusalPoint};

/// Parameters and options of a migration.
#[derive(Clone)]
pub(crate) struct MigrationSetup {
    pub(crate) parameters: MigrationParameters,
    pub(crate) options: StreamOptions,
}

impl MigrationSetup {
    /// Long time limits, and a downtime that every writer here meets.
    pub(crate) fn new() -> MigrationSetup {
        let policy = ConvergencePolicy::new(PATIENCE, 100);
        MigrationSetup {
            parameters: MigrationParameters::default().with_policy(policy).with_outcome_query_timeout(PATIENCE),
            options: options(),
        }
    }

    pub(crate) fn channels(mut self, channels: u16) -> MigrationSetup {
        self.options.channels = channels;
        self
    }

    pub(crate) fn codec(mut self, codec: &str) -> MigrationSetup {
        self.parameters.codec = codec.parse().unwrap();
        self
    }

    pub(crate) fn verify(mut self) -> MigrationSetup {
        self.parameters.verify = true;
        self
    }

    pub(crate) fn one_way(mut self) -> MigrationSetup {
        self.options.one_way = true;
        self
    }

    pub(crate) fn ask_for(mut self, time: Duration) -> MigrationSetup {
        self.parameters.outcome_query_timeout = time;
        self
    }

    pub(crate) fn timeout(mut self, time: Duration) -> MigrationSetup {
        (self.options.deadline, self.options.timeout) = (Some(time), Some(time));
        self
    }
}

pub(crate) fn options() -> StreamOptions {
    StreamOptions::new().unwrap().with_deadline(Some(PATIENCE)).with_timeout(Some(PATIENCE))
}

/// Result of a migration at the source.
pub(crate) struct SourceOutcome {
    pub(crate) outcome: Result<MigrationReport, MigrationFailure>,
    pub(crate) events: Vec<MigrationEvent>,
}

impl SourceOutcome {
    pub(crate) fn failure(self) -> MigrationFailure {
        self.outcome.expect_err("the migration should have failed")
    }
}

/// Migrates `guest` to `uri`.
pub(crate) fn migrate_out(guest: &mut Guest, uri: &Uri, setup: &MigrationSetup) -> SourceOutcome {
    migrate_out_with_events(guest, uri, setup, |_| {})
}

/// Migrates `guest` to `uri` and calls `tell` for every event.
pub(crate) fn migrate_out_with_events(
    guest: &mut Guest,
    uri: &Uri,
    setup: &MigrationSetup,
    mut tell: impl FnMut(&MigrationEvent),
) -> SourceOutcome {
    let mut events = Vec::new();
    let outcome = match stream::connect(uri, &setup.options) {
        Ok(connection) => {
            let outcome = migrate(guest, connection, &setup.parameters, &mut |event| {
                tell(&event);
                events.push(event);
            });
            let last = match &outcome {
                Ok(report) => MigrationEvent::Completed(report.clone()),
                Err(failure) => {
                    MigrationEvent::Failed { message: with_causes(failure).to_string(), location: failure.location }
                }
            };
            assert_eq!(events.last(), Some(&last), "the last event says how it ended");
            outcome
        }
        Err(error) => Err(MigrationFailure { error: error.into(), location: GuestLocation::RunningHere }),
    };
    SourceOutcome { outcome, events }
}

/// Result of a migration at the destination.
pub(crate) struct DestinationOutcome {
    pub(crate) outcome: Result<IncomingReport, MigrateError>,
    /// Bytes of frames read from the wire.
    pub(crate) bytes: u64,
    guest: Option<Guest>,
}

impl DestinationOutcome {
    fn none(error: MigrateError) -> DestinationOutcome {
        DestinationOutcome { outcome: Err(error), bytes: 0, guest: None }
    }

    /// Returns the guest, which runs here.
    pub(crate) fn guest(self) -> Guest {
        self.outcome.unwrap();
        let guest = self.guest.unwrap();
        guest.wait_for_write();
        guest
    }

    /// Returns the guest, which is paused here.
    pub(crate) fn paused(self) -> Guest {
        assert!(matches!(self.outcome, Ok(IncomingReport { running: false, .. }) | Err(MigrateError::NotStarted(_))));
        let mut guest = self.guest.unwrap();
        assert!(!guest.is_running());
        guest.check().unwrap();
        guest
    }

    /// Asserts that nothing runs here. Returns the error.
    pub(crate) fn expect_failure(self) -> MigrateError {
        assert!(!self.guest.is_some_and(|guest| guest.is_running()), "the guest runs where it must not");
        self.outcome.expect_err("the destination should have failed")
    }
}

/// A destination in a separate thread. It receives one guest and answers outcome queries until it is joined.
pub(crate) struct Destination {
    pub(crate) uri: Uri,
    pub(crate) outcomes: Outcomes,
    incoming: Arc<MigrationListener>,
    thread: JoinHandle<DestinationOutcome>,
}

impl Destination {
    /// Starts a destination at a Unix socket in a new folder. Returns the folder too.
    pub(crate) fn start() -> (TempFolder, Destination) {
        let folder = TempFolder::new();
        let destination = Destination::at(&folder.unix("socket"));
        (folder, destination)
    }

    pub(crate) fn at(uri: &Uri) -> Destination {
        Destination::new(uri, None)
    }

    pub(crate) fn new(uri: &Uri, refuse: Option<RefusalPoint>) -> Destination {
        Destination::limited(uri, refuse, PATIENCE)
    }

    /// Starts a destination with a switchover timeout.
    pub(crate) fn limited(uri: &Uri, refuse: Option<RefusalPoint>, switchover_timeout: Duration) -> Destination {
        let listener = StreamListener::bind(uri).unwrap();
        let (uri, outcomes) = (listener.uri().clone(), Outcomes::default());
        let incoming = Arc::new(MigrationListener::start(listener, outcomes.clone()).unwrap());
        let (its, waits) = (outcomes.clone(), incoming.clone());
        let thread = std::thread::spawn(move || {
            let arriving = match waits.next() {
                Ok(Some(arriving)) => arriving,
                Ok(None) => return DestinationOutcome::none(MigrateError::Cancelled),
                Err(error) => return DestinationOutcome::none(error.into()),
            };
            let channels = arriving.channels.clone();
            let mut incoming_guest = IncomingGuest::new(refuse);
            let outcome = receive(&mut incoming_guest, arriving, &its, switchover_timeout);
            let bytes = channels.iter().map(|channel| channel.bytes_received()).sum();
            DestinationOutcome { outcome, bytes, guest: incoming_guest.guest }
        });
        Destination { uri, outcomes, incoming, thread }
    }

    /// Waits for the end.
    pub(crate) fn join(self) -> DestinationOutcome {
        self.thread.join().unwrap()
    }

    /// Returns a function that cancels the migration at any step. It returns false if it was too late.
    pub(crate) fn canceller(&self) -> impl FnOnce() -> bool + Send + use<> {
        let (outcomes, incoming) = (self.outcomes.clone(), self.incoming.clone());
        move || {
            incoming.close();
            outcomes.close("the test calls it off")
        }
    }

    /// Cancels the migration at any step and waits for the end.
    pub(crate) fn cancel(self) -> DestinationOutcome {
        self.canceller()();
        self.join()
    }
}

/// A folder for sockets and files.
pub(crate) struct TempFolder(TempDir);

impl TempFolder {
    pub(crate) fn new() -> TempFolder {
        TempFolder(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    pub(crate) fn unix(&self, name: &str) -> Uri {
        uri(&format!("unix:{}", self.path(name)))
    }

    pub(crate) fn is_empty(&self) -> bool {
        std::fs::read_dir(&self.0).unwrap().next().is_none()
    }
}

pub(crate) fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

/// Asserts that the migration of `guest` succeeded. Returns the guest, which runs at the destination.
pub(crate) fn assert_moved(left: SourceOutcome, guest: &Guest, destination: Destination) -> Guest {
    left.outcome.unwrap();
    guest.assert_released();
    destination.join().guest()
}

/// Migrates a running guest to a faultless destination and returns it running there.
pub(crate) fn migrate_to(mut guest: Guest, to: &Uri, setup: &MigrationSetup) -> (Guest, MigrationReport) {
    let destination = Destination::at(to);
    let left = migrate_out(&mut guest, &destination.uri, setup);
    let arrived = destination.join();
    let report = left.outcome.unwrap();
    guest.assert_released();
    (arrived.guest(), report)
}

/// Asserts the result of a migration that failed before its commit: the guest is here, intact, and can migrate. Returns
/// it from the next destination.
pub(crate) fn assert_source_unharmed(mut guest: Guest, failure: &MigrationFailure) -> Guest {
    assert_eq!(failure.location, GuestLocation::RunningHere, "{failure}");
    guest.assert_runs_unharmed();
    let folder = TempFolder::new();
    migrate_to(guest, &folder.unix("second"), &MigrationSetup::new().channels(2)).0
}

pub(crate) fn stream_error(failure: &MigrationFailure) -> &StreamError {
    match &failure.error {
        MigrateError::Stream(error) => error,
        other => panic!("not an error of the stream: {other}"),
    }
}
