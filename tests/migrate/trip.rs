//! One migration with both its ends in this process, over any transport.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use vhost_migrate::migrate::{
    ConvergencePolicy, GuestLocation, IncomingReport, MigrateError, MigrationEvent, MigrationFailure,
    MigrationListener, MigrationParameters, MigrationReport, Outcomes, migrate, receive,
};
use vhost_migrate::stream::{Codec, StreamError, StreamListener, StreamOptions, Uri, transport};

use crate::guest::{Cradle, Guest, PATIENCE, Refusal};

/// How to migrate.
#[derive(Clone)]
pub(crate) struct How {
    pub(crate) parameters: MigrationParameters,
    pub(crate) options: StreamOptions,
}

impl How {
    /// Patient, and with a downtime that any writer here allows.
    pub(crate) fn new() -> How {
        let policy = ConvergencePolicy { downtime_limit: PATIENCE, max_rounds: 100 };
        How {
            parameters: MigrationParameters {
                policy,
                codec: Codec::None,
                verify: false,
                outcome_query_timeout: PATIENCE,
                switchover_timeout: None,
                continue_here: false,
            },
            options: options(),
        }
    }

    pub(crate) fn channels(mut self, channels: u16) -> How {
        self.options.channels = channels;
        self
    }

    pub(crate) fn codec(mut self, codec: &str) -> How {
        self.parameters.codec = codec.parse().unwrap();
        self
    }

    pub(crate) fn verify(mut self) -> How {
        self.parameters.verify = true;
        self
    }

    pub(crate) fn one_way(mut self) -> How {
        self.options.one_way = true;
        self
    }

    pub(crate) fn ask_for(mut self, time: Duration) -> How {
        self.parameters.outcome_query_timeout = time;
        self
    }

    pub(crate) fn timeout(mut self, time: Duration) -> How {
        (self.options.deadline, self.options.timeout) = (Some(time), Some(time));
        self
    }
}

pub(crate) fn options() -> StreamOptions {
    StreamOptions { deadline: Some(PATIENCE), timeout: Some(PATIENCE), ..StreamOptions::new().unwrap() }
}

/// How a migration ended at the source.
pub(crate) struct Left {
    pub(crate) outcome: Result<MigrationReport, MigrationFailure>,
    pub(crate) events: Vec<MigrationEvent>,
}

impl Left {
    pub(crate) fn failure(self) -> MigrationFailure {
        self.outcome.expect_err("the migration should have failed")
    }
}

/// Sends `guest` to `uri`.
pub(crate) fn leave(guest: &mut Guest, uri: &Uri, how: &How) -> Left {
    leave_telling(guest, uri, how, |_| {})
}

/// The same, and `tell` hears of every event as it happens.
pub(crate) fn leave_telling(guest: &mut Guest, uri: &Uri, how: &How, mut tell: impl FnMut(&MigrationEvent)) -> Left {
    let mut events = Vec::new();
    let outcome = match transport::connect(uri, &how.options) {
        Ok(connection) => {
            let StreamOptions { limiter, cancel, .. } = &how.options;
            let outcome = migrate(guest, connection, &how.parameters, limiter, cancel, &mut |event| {
                tell(&event);
                events.push(event);
            });
            let last = match &outcome {
                Ok(report) => MigrationEvent::Completed(report.clone()),
                Err(failure) => MigrationEvent::Failed { message: failure.to_string(), location: failure.location },
            };
            assert_eq!(events.last(), Some(&last), "the last event says how it ended");
            outcome
        }
        Err(error) => Err(MigrationFailure { error: error.into(), location: GuestLocation::RunningHere }),
    };
    Left { outcome, events }
}

/// What came out of a destination.
pub(crate) struct Arrived {
    pub(crate) outcome: Result<IncomingReport, MigrateError>,
    /// Bytes of frames read from the wire.
    pub(crate) bytes: u64,
    guest: Option<Guest>,
}

impl Arrived {
    fn none(error: MigrateError) -> Arrived {
        Arrived { outcome: Err(error), bytes: 0, guest: None }
    }

    /// The guest, which runs here.
    pub(crate) fn guest(self) -> Guest {
        self.outcome.unwrap();
        let guest = self.guest.unwrap();
        guest.beat();
        guest
    }

    /// The guest, which is here and does not run.
    pub(crate) fn paused(self) -> Guest {
        assert!(matches!(self.outcome, Ok(IncomingReport { running: false, .. }) | Err(MigrateError::NotStarted(_))));
        let mut guest = self.guest.unwrap();
        assert!(!guest.is_running());
        guest.check().unwrap();
        guest
    }

    /// Nothing runs here.
    pub(crate) fn nobody(self) -> MigrateError {
        assert!(!self.guest.is_some_and(|guest| guest.is_running()), "the guest runs where it must not");
        self.outcome.expect_err("the destination should have failed")
    }
}

/// A destination in a thread of its own, which takes in one guest and answers sources that ask until it is joined.
pub(crate) struct Destination {
    pub(crate) uri: Uri,
    pub(crate) outcomes: Outcomes,
    incoming: Arc<MigrationListener>,
    thread: JoinHandle<Arrived>,
}

impl Destination {
    pub(crate) fn at(uri: &Uri) -> Destination {
        Destination::new(uri, None)
    }

    pub(crate) fn new(uri: &Uri, refuse: Option<Refusal>) -> Destination {
        Destination::limited(uri, refuse, PATIENCE)
    }

    /// The same with a limit to the switchover.
    pub(crate) fn limited(uri: &Uri, refuse: Option<Refusal>, switchover_timeout: Duration) -> Destination {
        let listener = StreamListener::bind(uri).unwrap();
        let (uri, outcomes) = (listener.uri().clone(), Outcomes::default());
        let incoming = Arc::new(MigrationListener::start(listener, outcomes.clone()).unwrap());
        let (its, waits) = (outcomes.clone(), incoming.clone());
        let thread = std::thread::spawn(move || {
            let arriving = match waits.next() {
                Ok(Some(arriving)) => arriving,
                Ok(None) => return Arrived::none(MigrateError::Cancelled),
                Err(error) => return Arrived::none(error.into()),
            };
            let channels = arriving.connection.channels.clone();
            let mut cradle = Cradle::new(refuse);
            let outcome = receive(&mut cradle, arriving.connection, &arriving.cancel, &its, switchover_timeout);
            let bytes = channels.iter().map(|channel| channel.bytes_received()).sum();
            Arrived { outcome, bytes, guest: cradle.guest }
        });
        Destination { uri, outcomes, incoming, thread }
    }

    /// Waits for the end.
    pub(crate) fn join(self) -> Arrived {
        self.thread.join().unwrap()
    }

    /// What calls it off, wherever it is. False says that it was too late.
    pub(crate) fn call_off(&self) -> impl FnOnce() -> bool + Send + use<> {
        let (outcomes, incoming) = (self.outcomes.clone(), self.incoming.clone());
        move || {
            incoming.close();
            outcomes.close("the test calls it off")
        }
    }

    /// Calls it off, wherever it is, and waits for the end.
    pub(crate) fn cancel(self) -> Arrived {
        self.call_off()();
        self.join()
    }
}

/// A folder for sockets and files.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        Place(TempDir::new().unwrap())
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

/// Moves a running guest to a good destination and returns it as it goes on there.
pub(crate) fn travel(mut guest: Guest, to: &Uri, how: &How) -> (Guest, MigrationReport) {
    let destination = Destination::at(to);
    let left = leave(&mut guest, &destination.uri, how);
    let arrived = destination.join();
    let report = left.outcome.unwrap();
    guest.assert_gone();
    (arrived.guest(), report)
}

/// What must hold after every migration that failed before its commit: the guest is here, whole, and goes elsewhere
/// the next time, where it is returned from.
pub(crate) fn assert_nothing_happened(mut guest: Guest, failure: &MigrationFailure) -> Guest {
    assert_eq!(failure.location, GuestLocation::RunningHere, "{failure}");
    guest.assert_here();
    let place = Place::new();
    travel(guest, &place.unix("second"), &How::new().channels(2)).0
}

pub(crate) fn stream_error(failure: &MigrationFailure) -> &StreamError {
    match &failure.error {
        MigrateError::Stream(error) => error,
        other => panic!("not an error of the stream: {other}"),
    }
}
