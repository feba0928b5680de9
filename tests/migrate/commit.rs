//! The guest runs in one place, also when something fails after the commit and when it is called off at any moment.

use std::time::{Duration, Instant};

use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent, MigrationFailure, SourceVm};
use vhost_migrate::stream::frame::{FRAME_HEADER_BYTES, FrameKind};
use vhost_migrate::stream::record::{Commit, MemoryLayout, RoundEnd};
use vhost_migrate::stream::{
    CancelToken, FrameReader, FrameWriter, MigrationId, PageStats, StreamChannel, StreamConnection, StreamListener,
};
use vhost_migrate::stream::{ToDestination, ToSource, Uri, transport};

use crate::guest::{Guest, NO_ROOM, PATIENCE, Refusal, SLOW, Trouble, layout};
use crate::relay::{At, Deed, Fault, Relay, Way};
use crate::trip::{Destination, How, Left, Place, assert_nothing_happened, leave, leave_telling, options, travel};

const PAGES: u64 = 64;

/// A migration through a relay with a fault.
fn through(fault: Fault, how: &How) -> (Guest, Left, Destination, (Relay, Place)) {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&place.unix("destination"));
    let relay = Relay::new(place.unix("relay"), &destination.uri, fault);
    let left = leave(&mut guest, &relay.uri, how);
    assert!(relay.struck());
    (guest, left, destination, (relay, place))
}

/// A frame without a body, and COMMIT, which has three bytes.
const HEADER: u64 = FRAME_HEADER_BYTES as u64;
const COMMIT_BYTES: u64 = HEADER + 3;

/// A migration that is committed and whose connection then fails: the source asks, and lets go.
fn resolved_by_a_question(fault: Fault, how: &How) {
    let (guest, left, destination, _relay) = through(fault, how);
    assert!(left.events.iter().any(|event| matches!(event, MigrationEvent::Asking { .. })), "{:?}", left.events);
    left.outcome.unwrap();
    guest.assert_gone();
    destination.join().guest();
}

#[test]
fn a_source_that_did_not_hear_that_the_guest_runs_asks_and_lets_go() {
    let started = |at, deed| Fault::new(Way::ToSource, At::Frame(FrameKind::Started, at), deed);
    for at in [0, 1, HEADER - 1, HEADER, HEADER + 1] {
        resolved_by_a_question(started(at, Deed::Cut), &How::new());
    }
    for at in [2, 8, 20, HEADER + 2] {
        resolved_by_a_question(started(at, Deed::Flip), &How::new());
    }
    let hasty = How::new().timeout(Duration::from_millis(500));
    resolved_by_a_question(started(0, Deed::Hold), &hasty);
}

/// A commit that does not arrive: the destination gives the guest up for good, and it goes on at its source.
fn taken_back(fault: Fault, how: &How) {
    let (guest, left, destination, _relay) = through(fault, how);
    let failure = left.failure();
    assert!(matches!(failure.error, MigrateError::Destination(_)), "{failure}");
    destination.join().nobody();
    assert_nothing_happened(guest, &failure);
}

#[test]
fn a_commit_that_does_not_arrive_whole_starts_nothing_and_the_source_goes_on() {
    let commit = |at, deed| Fault::new(Way::ToDestination, At::Frame(FrameKind::Commit, at), deed);
    for at in [0, 1, HEADER - 1, HEADER, COMMIT_BYTES - 1] {
        taken_back(commit(at, Deed::Cut), &How::new());
    }
    for at in [0, 2, 4, 8, 16, HEADER, COMMIT_BYTES - 1] {
        // A damaged length is waited for.
        taken_back(commit(at, Deed::Flip), &How::new().timeout(Duration::from_secs(1)));
    }
    for at in [0, COMMIT_BYTES - 1] {
        taken_back(commit(at, Deed::Hold), &How::new().timeout(Duration::from_millis(500)));
    }
}

#[test]
fn a_source_that_can_reach_nobody_keeps_the_guest_until_it_is_told() {
    let brief = How::new().ask_for(Duration::from_millis(300));
    let unknown = |failure: &MigrationFailure| {
        assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
        assert!(matches!(failure.error, MigrateError::OutcomeUnknown { .. }), "{failure}");
    };
    // The operator finds that the destination runs the guest, and lets go of it here.
    let fault = Fault::new(Way::ToSource, At::Frame(FrameKind::Started, 0), Deed::CutForGood);
    let (mut guest, left, destination, _relay) = through(fault, &brief);
    unknown(&left.failure());
    guest.assert_kept();
    drop(guest);
    destination.join().guest();
    // The operator finds that it does not.
    let fault = Fault::new(Way::ToDestination, At::Frame(FrameKind::Commit, 0), Deed::CutForGood);
    let (mut guest, left, destination, _relay) = through(fault, &brief);
    unknown(&left.failure());
    guest.assert_kept();
    destination.join().nobody();
    guest.go_on();
}

#[test]
fn a_destination_that_is_slow_to_start_is_asked_until_it_has() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&place.unix("socket"), Some(Refusal::SlowStart));
    let how = How::new().timeout(SLOW / 4);
    let left = leave(&mut guest, &destination.uri, &how);
    assert!(left.events.iter().any(|event| matches!(event, MigrationEvent::Asking { .. })), "{:?}", left.events);
    left.outcome.unwrap();
    guest.assert_gone();
    destination.join().guest();
}

#[test]
fn a_destination_that_cannot_start_keeps_the_guest_paused_and_so_does_the_source() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&place.unix("socket"), Some(Refusal::Start));
    let failure = leave(&mut guest, &destination.uri, &How::new()).failure();
    assert!(matches!(&failure.error, MigrateError::Held(words) if words.contains(NO_ROOM)), "{failure}");
    assert_eq!(failure.location, GuestLocation::OutcomeUnknown);
    guest.assert_kept();
    let mut there = destination.join().paused();
    // Resumed there, or here: it is whole in both places.
    there.start();
    there.beat();
    drop(there);
    guest.go_on();
}

#[test]
fn a_start_that_fails_is_tried_again() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&place.unix("socket"), Some(Refusal::FirstStart));
    leave(&mut guest, &destination.uri, &How::new()).outcome.unwrap();
    guest.assert_gone();
    destination.join().guest();
}

/// The source's side by hand, up to READY.
fn until_ready(uri: &Uri) -> (StreamConnection, FrameWriter<StreamChannel>, FrameReader<StreamChannel>) {
    let connection = transport::connect(uri, &options()).unwrap();
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
fn a_commit_that_arrives_after_the_question_has_no_effect() {
    let place = Place::new();
    let destination = Destination::at(&place.unix("socket"));
    let (connection, mut writer, _reader) = until_ready(&destination.uri);
    for _ in 0..2 {
        let answer = connection.query_outcome(PATIENCE).unwrap();
        assert!(matches!(answer, ToSource::Failed { .. }), "{answer:?}");
    }
    // It may be cut off already.
    let _ = ToDestination::Commit(Commit { run: true }).write(&mut writer);
    assert!(matches!(connection.query_outcome(PATIENCE).unwrap(), ToSource::Failed { .. }));
    destination.join().nobody();
}

#[test]
fn a_question_that_comes_with_the_commit_has_one_answer_for_good() {
    for round in 0..30 {
        let place = Place::new();
        let destination = Destination::at(&place.unix("socket"));
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
            destination.join().nobody();
        } else {
            assert!(!matches!(again(), ToSource::Failed { .. } | ToSource::Unknown), "{first:?}");
            destination.join().guest();
            assert!(matches!(again(), ToSource::Started(_)));
        }
    }
}

#[test]
fn a_destination_that_knows_nothing_of_a_migration_says_so_and_the_source_keeps_the_guest() {
    let place = Place::new();
    let destination = Destination::at(&place.unix("socket"));
    let answer = transport::query_outcome(&destination.uri, MigrationId(7), PATIENCE).unwrap();
    assert_eq!(answer, ToSource::Unknown);
    destination.cancel().nobody();

    // Another process listens where the first one did, which was killed after the commit.
    let mut guest = Guest::running(PAGES);
    let at = place.unix("killed");
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
        (leave(&mut guest, &at, &How::new()), killed.join().unwrap())
    });
    let failure = left.failure();
    assert_eq!(failure.location, GuestLocation::OutcomeUnknown, "{failure}");
    assert!(failure.to_string().contains("knows nothing of it"), "{failure}");
    guest.assert_kept();
    other.cancel().nobody();
    guest.go_on();
}

#[test]
fn a_guest_that_can_neither_be_paused_nor_resumed_is_said_to_be_paused_here() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES).with(Trouble::ResumeFails);
    let destination = Destination::at(&place.unix("socket"));
    let failure = leave(&mut guest, &destination.uri, &How::new()).failure();
    assert_eq!(failure.location, GuestLocation::PausedHere, "{failure}");
    let words = failure.to_string();
    assert!(words.contains("a ring does not drain") && words.contains("a ring does not start"), "{words}");
    assert_eq!(guest.calls.releases, 0);
    destination.join().nobody();
    guest = guest.with(Trouble::None);
    guest.resume().unwrap();
    guest.beat();
}

/// A migration that is called off after `moment`, at the source or at the destination. Returns the guest, wherever it
/// runs.
fn called_off(mut guest: Guest, moment: Duration, at_destination: bool) -> Guest {
    let place = Place::new();
    let how = How::new().channels(2);
    let destination = Destination::at(&place.unix("socket"));
    let (there, here) = (destination.call_off(), how.options.cancel.clone());
    let (left, effective) = std::thread::scope(|scope| {
        let caller = scope.spawn(move || {
            // A moment, not an event, is what is wanted here.
            std::thread::sleep(moment);
            if at_destination { there() } else { here.cancel() }
        });
        let left = leave(&mut guest, &destination.uri, &how);
        (left, caller.join().unwrap())
    });
    let arrived = match left.outcome {
        // It may not even have reached the destination.
        Err(_) => destination.cancel(),
        Ok(_) => destination.join(),
    };
    match left.outcome {
        Ok(_) => {
            guest.assert_gone();
            arrived.guest()
        }
        Err(failure) => {
            assert_eq!(failure.location, GuestLocation::RunningHere, "{failure}");
            assert!(effective);
            assert!(at_destination || matches!(failure.error, MigrateError::Cancelled), "{failure}");
            arrived.nobody();
            guest.assert_here();
            guest
        }
    }
}

/// Calls migrations off at moments spread over the time that one takes, and migrates in between.
fn call_off_often(at_destination: bool) {
    const TIMES: u32 = 40;
    let mut guest = Guest::running(PAGES);
    let mut typical = Duration::from_millis(20);
    for time in 0..TIMES {
        // In an order that is not the order of the steps.
        let moment = typical * (time * 13 % TIMES) / TIMES * 5 / 4;
        guest = called_off(guest, moment, at_destination);
        let place = Place::new();
        let begun = Instant::now();
        (guest, _) = travel(guest, &place.unix("next"), &How::new());
        typical = (typical + begun.elapsed()) / 2;
    }
}

#[test]
fn a_migration_called_off_at_its_source_at_any_moment_leaves_the_guest_in_one_place() {
    call_off_often(false);
}

#[test]
fn a_migration_called_off_at_its_destination_at_any_moment_leaves_the_guest_in_one_place() {
    call_off_often(true);
}

#[test]
fn a_migration_called_off_at_any_event_before_its_end_does_not_happen() {
    let mut guest = Guest::running(PAGES);
    let moments: [fn(&MigrationEvent) -> bool; 4] = [
        |event| matches!(event, MigrationEvent::Started { .. }),
        |event| matches!(event, MigrationEvent::Round(round) if round.round == 0),
        |event| matches!(event, MigrationEvent::Round(round) if round.round == 2),
        |event| matches!(event, MigrationEvent::Switchover { .. }),
    ];
    for (number, moment) in moments.iter().enumerate() {
        let place = Place::new();
        let destination = Destination::at(&place.unix("socket"));
        let mut how = How::new();
        if number == 2 {
            // So that there is such a round.
            how.parameters.policy.downtime_limit = Duration::ZERO;
        }
        let cancel = how.options.cancel.clone();
        let left = leave_telling(&mut guest, &destination.uri, &how, |event| {
            if moment(event) {
                assert!(cancel.cancel());
            }
        });
        let failure = left.failure();
        assert!(matches!(failure.error, MigrateError::Cancelled), "{failure}");
        destination.join().nobody();
        guest = assert_nothing_happened(guest, &failure);
    }
}

#[test]
fn once_it_is_committed_a_migration_cannot_be_called_off() {
    let place = Place::new();
    let how = How::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&place.unix("socket"));
    leave(&mut guest, &destination.uri, &how).outcome.unwrap();
    assert!(!how.options.cancel.cancel());
    guest.assert_gone();
    assert!(!destination.call_off()());
    destination.join().guest();
}

#[test]
fn a_migration_that_was_called_off_before_it_began_does_not_begin() {
    let place = Place::new();
    let how = How::new();
    let cancel: &CancelToken = &how.options.cancel;
    assert!(cancel.cancel());
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&place.unix("socket"));
    let failure = leave(&mut guest, &destination.uri, &how).failure();
    assert!(matches!(failure.error, MigrateError::Cancelled), "{failure}");
    destination.cancel().nobody();
    assert_nothing_happened(guest, &failure);
}
