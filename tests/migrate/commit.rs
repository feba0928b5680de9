//! The guest runs in one place, also when something fails after the commit and when it is called off at any moment.

use std::time::{Duration, Instant};

use vhost_migrate::migrate::{Event, MigrateError};
use vhost_migrate::stream::Cancel;
use vhost_migrate::stream::frame::{FRAME_HEADER_BYTES, Kind};

use crate::guest::{Guest, NO_ROOM, Refusal};
use crate::relay::{At, Deed, Fault, Relay, Way};
use crate::trip::{Arrived, Destination, How, Place, assert_nothing_happened, leave, leave_telling, options, travel};

const PAGES: u64 = 64;

/// A migration that fails after its commit: the guest is gone from its source, for good.
fn fails_late(fault: Fault) -> Arrived {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&place.unix("destination"));
    let relay = Relay::new(place.unix("relay"), &destination.uri, fault);
    let failure = leave(&mut guest, &relay.uri, &How::new()).failure();
    assert!(relay.struck(), "{failure}");
    assert!(!failure.source_running, "{failure}");
    guest.assert_gone();
    drop(relay);
    destination.join()
}

#[test]
fn a_connection_cut_after_the_commit_does_not_stop_the_guest_at_its_destination() {
    for at in [0, 1, FRAME_HEADER_BYTES as u64 + 1] {
        fails_late(Fault::new(Way::ToSource, At::Frame(Kind::Started, at), Deed::Cut)).guest();
    }
    fails_late(Fault::new(Way::ToSource, At::Frame(Kind::Started, 20), Deed::Flip)).guest();
}

#[test]
fn a_commit_that_does_not_arrive_whole_starts_nothing() {
    for at in [0, 23] {
        fails_late(Fault::new(Way::ToDestination, At::Frame(Kind::Commit, at), Deed::Cut)).nobody();
    }
    for at in [0, 2, 8, 16] {
        fails_late(Fault::new(Way::ToDestination, At::Frame(Kind::Commit, at), Deed::Flip)).nobody();
    }
}

#[test]
fn a_destination_that_cannot_start_after_the_commit_says_so_and_the_source_stays_stopped() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&place.unix("socket"), Some(Refusal::Start), options());
    let failure = leave(&mut guest, &destination.uri, &How::new()).failure();
    assert!(failure.to_string().contains(NO_ROOM) && !failure.source_running, "{failure}");
    guest.assert_gone();
    destination.join().nobody();
}

/// A migration that is called off after `moment`, at the source or at the destination. Returns the guest, wherever it
/// runs.
fn called_off(mut guest: Guest, moment: Duration, at_destination: bool) -> Guest {
    let place = Place::new();
    let at = options();
    let (how, its_cancel) = (How::new().channels(2), at.cancel.clone());
    let destination = Destination::new(&place.unix("socket"), None, at);
    let cancel = if at_destination { its_cancel } else { how.options.cancel.clone() };
    let (left, effective) = std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            // A moment, not an event, is what is wanted here.
            std::thread::sleep(moment);
            cancel.cancel()
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
            assert!(failure.source_running, "{failure}");
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
    let moments: [fn(&Event) -> bool; 4] = [
        |event| matches!(event, Event::Started { .. }),
        |event| matches!(event, Event::Round(round) if round.round == 0),
        |event| matches!(event, Event::Round(round) if round.round == 2),
        |event| matches!(event, Event::Switchover { .. }),
    ];
    for (number, moment) in moments.iter().enumerate() {
        let place = Place::new();
        let destination = Destination::at(&place.unix("socket"));
        let mut how = How::new();
        if number == 2 {
            // So that there is such a round.
            how.plan.policy.downtime = Duration::ZERO;
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
    assert!(!destination.options.cancel.cancel());
    destination.join().guest();
}

#[test]
fn a_migration_that_was_called_off_before_it_began_does_not_begin() {
    let place = Place::new();
    let how = How::new();
    let cancel: &Cancel = &how.options.cancel;
    assert!(cancel.cancel());
    let mut guest = Guest::running(PAGES);
    let destination = Destination::at(&place.unix("socket"));
    let failure = leave(&mut guest, &destination.uri, &how).failure();
    assert!(matches!(failure.error, MigrateError::Cancelled), "{failure}");
    destination.cancel().nobody();
    assert_nothing_happened(guest, &failure);
}
