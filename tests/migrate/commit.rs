//! The guest runs in exactly one place, also after failures behind the commit and a cancellation at any time.

use std::time::{Duration, Instant};

use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent, MigrationFailure, SourceVm};
use vhost_migrate::stream::{
    self, CancelToken, FrameKind, MigrationId, PageStats, StreamChannel, StreamConnection, StreamListener, ToSource,
    Uri,
};
use vhost_migrate::unstable::stream::frame::{FRAME_HEADER_BYTES, FrameReader, FrameWriter};
use vhost_migrate::unstable::stream::record::{Commit, MemoryLayout, RoundEnd, ToDestination};
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, GuestFault, PATIENCE, REFUSAL_REASON, RefusalPoint, SLOW_START, layout};
use crate::harness::{
    Destination, MigrationSetup, SourceOutcome, TempFolder, assert_moved, assert_source_unharmed, migrate_out,
    migrate_out_with_events, migrate_to, options,
};
use crate::relay::{Direction, Fault, FaultAction, FaultPosition, Relay};

const PAGES: u64 = 64;

/// A migration through a relay with a fault.
fn migrate_through(fault: Fault, setup: &MigrationSetup) -> (Guest, SourceOutcome, Destination, (Relay, TempFolder)) {
    let folder = TempFolder::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&folder.unix("destination"));
    let relay = Relay::new(folder.unix("relay"), &destination.uri, fault);
    let left = migrate_out(&mut guest, &relay.uri, setup);
    assert!(relay.triggered());
    (guest, left, destination, (relay, folder))
}

/// A frame without a body, and COMMIT, which has three bytes.
const HEADER: u64 = FRAME_HEADER_BYTES as u64;
const COMMIT_BYTES: u64 = HEADER + 3;

/// A committed migration whose connection then fails: the source queries the outcome and releases the guest.
fn assert_resolved_by_outcome_query(fault: Fault, setup: &MigrationSetup) {
    let (guest, left, destination, _relay) = migrate_through(fault, setup);
    assert!(left.events.iter().any(|event| matches!(event, MigrationEvent::Asking { .. })), "{:?}", left.events);
    assert_moved(left, &guest, destination);
}

#[test]
fn a_source_that_misses_started_queries_the_outcome_and_releases_the_guest() {
    let started = |at, action| Fault::new(Direction::ToSource, FaultPosition::Frame(FrameKind::Started, at), action);
    for at in [0, 1, HEADER - 1, HEADER, HEADER + 1] {
        assert_resolved_by_outcome_query(started(at, FaultAction::Cut), &MigrationSetup::new());
    }
    for at in [2, 8, 20, HEADER + 2] {
        assert_resolved_by_outcome_query(started(at, FaultAction::Flip), &MigrationSetup::new());
    }
    let hasty = MigrationSetup::new().timeout(Duration::from_millis(500));
    assert_resolved_by_outcome_query(started(0, FaultAction::Hold), &hasty);
}

/// A commit that does not arrive: the destination gives up for good, and the guest resumes at its source.
fn assert_commit_has_no_effect(fault: Fault, setup: &MigrationSetup) {
    let (guest, left, destination, _relay) = migrate_through(fault, setup);
    let failure = left.failure();
    assert!(matches!(failure.error, MigrateError::Destination(_)), "{failure}");
    destination.join().expect_failure();
    assert_source_unharmed(guest, &failure);
}

#[test]
fn an_incomplete_commit_starts_nothing_and_the_source_resumes() {
    let commit = |at, action| Fault::new(Direction::ToDestination, FaultPosition::Frame(FrameKind::Commit, at), action);
    for at in [0, 1, HEADER - 1, HEADER, COMMIT_BYTES - 1] {
        assert_commit_has_no_effect(commit(at, FaultAction::Cut), &MigrationSetup::new());
    }
    for at in [0, 2, 4, 8, 16, HEADER, COMMIT_BYTES - 1] {
        // A damaged length is waited for.
        assert_commit_has_no_effect(
            commit(at, FaultAction::Flip),
            &MigrationSetup::new().timeout(Duration::from_secs(1)),
        );
    }
    for at in [0, COMMIT_BYTES - 1] {
        assert_commit_has_no_effect(
            commit(at, FaultAction::Hold),
            &MigrationSetup::new().timeout(Duration::from_millis(500)),
        );
    }
}

#[test]
fn a_source_that_cannot_query_the_outcome_keeps_the_guest_paused() {
    let brief = MigrationSetup::new().ask_for(Duration::from_millis(300));
    let unknown = |failure: &MigrationFailure| {
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        assert!(matches!(failure.error, MigrateError::OutcomeUnknown { .. }), "{failure}");
    };
    // The operator finds that the destination runs the guest, and releases it here.
    let fault = Fault::new(Direction::ToSource, FaultPosition::Frame(FrameKind::Started, 0), FaultAction::CutForGood);
    let (mut guest, left, destination, _relay) = migrate_through(fault, &brief);
    unknown(&left.failure());
    guest.assert_kept_paused();
    drop(guest);
    destination.join().guest();
    // The operator finds that it does not.
    let fault =
        Fault::new(Direction::ToDestination, FaultPosition::Frame(FrameKind::Commit, 0), FaultAction::CutForGood);
    let (mut guest, left, destination, _relay) = migrate_through(fault, &brief);
    unknown(&left.failure());
    guest.assert_kept_paused();
    destination.join().expect_failure();
    guest.resume_unharmed();
}

#[test]
fn the_outcome_is_queried_until_a_slow_destination_has_started() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&folder.unix("socket"), Some(RefusalPoint::SlowStart));
    let setup = MigrationSetup::new().timeout(SLOW_START / 4);
    let left = migrate_out(&mut guest, &destination.uri, &setup);
    assert!(left.events.iter().any(|event| matches!(event, MigrationEvent::Asking { .. })), "{:?}", left.events);
    assert_moved(left, &guest, destination);
}

#[test]
fn a_guest_that_cannot_start_stays_paused_on_both_sides() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&folder.unix("socket"), Some(RefusalPoint::Start));
    let failure = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).failure();
    assert!(matches!(&failure.error, MigrateError::Held(words) if words.contains(REFUSAL_REASON)), "{failure}");
    assert_eq!(failure.location, GuestLocation::OutcomeUnknown);
    guest.assert_kept_paused();
    let mut there = destination.join().paused();
    // Resumed there, or here: it is whole in both places.
    there.start();
    there.wait_for_write();
    drop(there);
    guest.resume_unharmed();
}

#[test]
fn a_failed_start_is_retried() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&folder.unix("socket"), Some(RefusalPoint::FirstStart));
    migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).outcome.unwrap();
    guest.assert_released();
    destination.join().guest();
}

/// Plays the source up to READY.
fn until_ready(uri: &Uri) -> (StreamConnection, FrameWriter<StreamChannel>, FrameReader<StreamChannel>) {
    let connection = stream::connect(uri, &options()).unwrap();
    let mut writer = connection.writers().remove(0);
    let mut reader = connection.readers().remove(0);
    let layout = MemoryLayout { regions: layout(PAGES).to_vec() };
    let versions = vec![0; PAGES as usize * 4 + 8];
    let end = RoundEnd::new(0, true, &PageStats::default());
    for message in [ToDestination::Layout(layout), ToDestination::RoundEnd(end), ToDestination::State(versions)] {
        message.write(&mut writer).unwrap();
    }
    assert_eq!(ToSource::next(&mut reader).unwrap(), ToSource::Accepted);
    assert_eq!(ToSource::next(&mut reader).unwrap(), ToSource::Ready);
    (connection, writer, reader)
}

#[test]
fn a_commit_after_the_outcome_query_has_no_effect() {
    let (_folder, destination) = Destination::start();
    let (connection, mut writer, _reader) = until_ready(&destination.uri);
    for _ in 0..2 {
        let answer = connection.query_outcome(PATIENCE).unwrap();
        assert!(matches!(answer, ToSource::Failed { .. }), "{answer:?}");
    }
    // The connection may be closed already.
    let _ = ToDestination::Commit(Commit { run: true }).write(&mut writer);
    assert!(matches!(connection.query_outcome(PATIENCE).unwrap(), ToSource::Failed { .. }));
    destination.join().expect_failure();
}

#[test]
fn an_outcome_query_that_races_the_commit_has_one_final_answer() {
    for round in 0..30 {
        let (_folder, destination) = Destination::start();
        let (connection, mut writer, _reader) = until_ready(&destination.uri);
        let first = std::thread::scope(|scope| {
            let asks = scope.spawn(|| connection.query_outcome(PATIENCE).unwrap());
            if round % 3 != 0 {
                std::thread::yield_now();
            }
            let _ = ToDestination::Commit(Commit { run: true }).write(&mut writer);
            asks.join().unwrap()
        });
        let gave_up = matches!(first, ToSource::Failed { .. });
        let outcomes = destination.outcomes.clone();
        let again = || outcomes.answer(connection.id);
        if gave_up {
            assert!(matches!(again(), ToSource::Failed { .. }));
            destination.join().expect_failure();
        } else {
            assert!(!matches!(again(), ToSource::Failed { .. } | ToSource::Unknown), "{first:?}");
            destination.join().guest();
            assert!(matches!(again(), ToSource::Started(_)));
        }
    }
}

#[test]
fn an_unknown_migration_id_leaves_the_guest_paused_at_its_source() {
    let (folder, destination) = Destination::start();
    let answer = stream::query_outcome(&destination.uri, MigrationId(7), PATIENCE).unwrap();
    assert_eq!(answer, ToSource::Unknown);
    destination.cancel().expect_failure();

    // Another process listens at the address of the first, which was killed after the commit.
    let mut guest = Guest::running(PAGES);
    let at = folder.unix("killed");
    let listener = StreamListener::bind(&at).unwrap();
    let (left, other) = std::thread::scope(|scope| {
        let killed = scope.spawn(|| {
            let connection = listener.accept(&options()).unwrap();
            let (mut reader, mut writer) = (connection.readers().remove(0), connection.writers().remove(0));
            let mut body = Vec::new();
            loop {
                let header = reader.next_frame().unwrap();
                reader.body(&header, &mut body).unwrap();
                match header.kind {
                    FrameKind::Layout => drop(ToSource::Accepted.write(&mut writer).unwrap()),
                    FrameKind::State => drop(ToSource::Ready.write(&mut writer).unwrap()),
                    FrameKind::Commit => break,
                    _ => {}
                }
            }
            drop(listener);
            Destination::at(&at)
        });
        (migrate_out(&mut guest, &at, &MigrationSetup::new()), killed.join().unwrap())
    });
    let failure = left.failure();
    assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
    assert!(with_causes(&failure).to_string().contains("does not know this migration"), "{failure}");
    guest.assert_kept_paused();
    other.cancel().expect_failure();
    guest.resume_unharmed();
}

#[test]
fn a_guest_that_cannot_resume_is_reported_as_paused_here() {
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::ResumeFails);
    let (_folder, destination) = Destination::start();
    let failure = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).failure();
    assert_eq!(failure.location, GuestLocation::PausedHere, "{failure}");
    let words = with_causes(&failure).to_string();
    assert!(words.contains("a ring does not drain") && words.contains("a ring does not start"), "{words}");
    assert_eq!(guest.calls.releases, 0);
    destination.join().expect_failure();
    guest = guest.with_fault(GuestFault::None);
    guest.resume().unwrap();
    guest.wait_for_write();
}

/// Migrates and cancels after `moment`, at the source or at the destination. Returns the guest, wherever it runs.
fn migrate_and_cancel_after(mut guest: Guest, moment: Duration, at_destination: bool) -> Guest {
    let setup = MigrationSetup::new().channels(2);
    let (_folder, destination) = Destination::start();
    let (there, here) = (destination.canceller(), setup.options.cancel.clone());
    let (left, effective) = std::thread::scope(|scope| {
        let caller = scope.spawn(move || {
            // The test needs arbitrary times, not events.
            std::thread::sleep(moment);
            if at_destination { there() } else { here.cancel() }
        });
        let left = migrate_out(&mut guest, &destination.uri, &setup);
        (left, caller.join().unwrap())
    });
    let arrived = match left.outcome {
        // It may not even have reached the destination.
        Err(_) => destination.cancel(),
        Ok(_) => destination.join(),
    };
    match left.outcome {
        Ok(_) => {
            guest.assert_released();
            arrived.guest()
        }
        Err(failure) => {
            assert_eq!(failure.location, GuestLocation::RunningHere, "{failure}");
            assert!(effective);
            assert!(at_destination || matches!(failure.error, MigrateError::Cancelled), "{failure}");
            arrived.expect_failure();
            guest.assert_runs_unharmed();
            guest
        }
    }
}

/// Cancels migrations at times spread over the duration of one, with a successful migration after each.
fn cancel_at_many_times(at_destination: bool) {
    const TIMES: u32 = 40;
    let mut guest = Guest::running(PAGES);
    let mut typical = Duration::from_millis(20);
    for time in 0..TIMES {
        // In an order different from the order of the steps.
        let moment = typical * (time * 13 % TIMES) / TIMES * 5 / 4;
        guest = migrate_and_cancel_after(guest, moment, at_destination);
        let folder = TempFolder::new();
        let begun = Instant::now();
        (guest, _) = migrate_to(guest, &folder.unix("next"), &MigrationSetup::new());
        typical = (typical + begun.elapsed()) / 2;
    }
}

#[test]
fn a_migration_cancelled_at_its_source_at_any_time_leaves_one_running_guest() {
    cancel_at_many_times(false);
}

#[test]
fn a_migration_cancelled_at_its_destination_at_any_time_leaves_one_running_guest() {
    cancel_at_many_times(true);
}

#[test]
fn a_migration_cancelled_at_any_event_before_the_commit_fails() {
    let mut guest = Guest::running(PAGES);
    let moments: [fn(&MigrationEvent) -> bool; 4] = [
        |event| matches!(event, MigrationEvent::Started { .. }),
        |event| matches!(event, MigrationEvent::Round(round) if round.round == 0),
        |event| matches!(event, MigrationEvent::Round(round) if round.round == 2),
        |event| matches!(event, MigrationEvent::Switchover { .. }),
    ];
    for (number, moment) in moments.iter().enumerate() {
        let (_folder, destination) = Destination::start();
        let mut setup = MigrationSetup::new();
        if number == 2 {
            // So that there is such a round.
            setup.parameters.policy.downtime_limit = Duration::ZERO;
        }
        let cancel = setup.options.cancel.clone();
        let left = migrate_out_with_events(&mut guest, &destination.uri, &setup, |event| {
            if moment(event) {
                assert!(cancel.cancel());
            }
        });
        let failure = left.failure();
        assert!(matches!(failure.error, MigrateError::Cancelled), "{failure}");
        destination.join().expect_failure();
        guest = assert_source_unharmed(guest, &failure);
    }
}

#[test]
fn a_committed_migration_cannot_be_cancelled() {
    let folder = TempFolder::new();
    let setup = MigrationSetup::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&folder.unix("socket"));
    migrate_out(&mut guest, &destination.uri, &setup).outcome.unwrap();
    assert!(!setup.options.cancel.cancel());
    guest.assert_released();
    assert!(!destination.canceller()());
    destination.join().guest();
}

#[test]
fn a_migration_cancelled_before_its_start_does_not_start() {
    let folder = TempFolder::new();
    let setup = MigrationSetup::new();
    let cancel: &CancelToken = &setup.options.cancel;
    assert!(cancel.cancel());
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&folder.unix("socket"));
    let failure = migrate_out(&mut guest, &destination.uri, &setup).failure();
    assert!(matches!(failure.error, MigrateError::Cancelled), "{failure}");
    destination.cancel().expect_failure();
    assert_source_unharmed(guest, &failure);
}
