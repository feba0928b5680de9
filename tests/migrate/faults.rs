//! The connection breaks, hangs or is damaged at any step before the commit: the guest continues at its source, nothing
//! runs at the destination, and the next migration succeeds.

use std::time::{Duration, Instant};

use vhost_migrate::migrate::{MigrateError, MigrationFailure};
use vhost_migrate::stream::FrameKind;
use vhost_migrate::unstable::stream::frame::{FRAME_HEADER_BYTES, HEADER_BYTES};
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, PATIENCE};
use crate::harness::{Destination, MigrationSetup, TempFolder, assert_source_unharmed, migrate_out};
use crate::relay::{Direction, Fault, FaultAction, FaultPosition, Relay};

use Direction::{ToDestination, ToSource};

/// Every step of the handshake, as the position of the lost byte.
const STEPS: [(Direction, FaultPosition); 14] = [
    (ToDestination, FaultPosition::Byte(20)),
    (ToSource, FaultPosition::Byte(0)),
    (ToSource, FaultPosition::Byte(17)),
    (ToDestination, FaultPosition::Frame(FrameKind::Layout, 30)),
    (ToSource, FaultPosition::Frame(FrameKind::Accepted, 0)),
    (ToDestination, FaultPosition::Frame(FrameKind::Pages, 0)),
    (ToDestination, FaultPosition::Byte(5_000)),
    (ToDestination, FaultPosition::Byte(100_000)),
    (ToDestination, FaultPosition::Byte(300_000)),
    (ToDestination, FaultPosition::Frame(FrameKind::RoundEnd, 0)),
    (ToDestination, FaultPosition::Frame(FrameKind::State, 0)),
    (ToDestination, FaultPosition::Frame(FrameKind::State, 100)),
    (ToSource, FaultPosition::Frame(FrameKind::Ready, 0)),
    (ToSource, FaultPosition::Frame(FrameKind::Ready, 11)),
];

/// Migrates through a relay with a fault. The guest must be unharmed. Returns it, after another migration, and the
/// failure.
fn migrate_with_fault(mut guest: Guest, fault: Fault, setup: &MigrationSetup) -> (Guest, MigrationFailure) {
    let mut setup = setup.clone();
    loop {
        let folder = TempFolder::new();
        let destination = Destination::at(&folder.unix("destination"));
        let relay = Relay::new(folder.unix("relay"), &destination.uri, fault);
        let failure = migrate_out(&mut guest, &relay.uri, &setup).failure();
        let triggered = relay.triggered();
        drop(relay);
        destination.cancel().expect_failure();
        if triggered {
            return (assert_source_unharmed(guest, &failure), failure);
        }
        // On a busy machine a short timeout may end a migration before it reaches the fault.
        guest.assert_runs_unharmed();
        let longer = 2 * setup.options.timeout.unwrap();
        setup = setup.timeout(longer);
    }
}

#[test]
fn a_connection_cut_at_any_step_leaves_the_guest_at_its_source() {
    let mut guest = Guest::running(128);
    for (direction, at) in STEPS {
        (guest, _) = migrate_with_fault(guest, Fault::new(direction, at, FaultAction::Cut), &MigrationSetup::new());
    }
}

#[test]
fn a_cut_of_any_channel_fails_the_migration() {
    let mut guest = Guest::running(1536);
    for (channel, direction, at) in [
        (0, ToDestination, FaultPosition::Byte(100_000)),
        (1, ToSource, FaultPosition::Byte(10)),
        (2, ToDestination, FaultPosition::Byte(40)),
        (3, ToDestination, FaultPosition::Byte(100_000)),
        (4, ToDestination, FaultPosition::Frame(FrameKind::RoundEnd, 0)),
    ] {
        let fault = Fault { channel, ..Fault::new(direction, at, FaultAction::Cut) };
        (guest, _) = migrate_with_fault(guest, fault, &MigrationSetup::new().channels(5));
    }
}

#[test]
fn a_destination_that_stops_replying_at_any_step_times_out() {
    let mut guest = Guest::running(128);
    for (direction, at) in STEPS {
        let setup = MigrationSetup::new().timeout(Duration::from_millis(200));
        let failure;
        (guest, failure) = migrate_with_fault(guest, Fault::new(direction, at, FaultAction::Hold), &setup);
        let words = with_causes(&failure).to_string();
        assert!(words.contains("no progress") || words.contains("no answer"), "{direction:?} {at:?}: {words}");
    }
}

#[test]
fn a_destination_that_stops_reading_times_out() {
    // More than the buffers between them hold.
    let setup = MigrationSetup::new().timeout(Duration::from_millis(200));
    let fault = Fault::new(ToDestination, FaultPosition::Byte(10_000), FaultAction::Hold);
    migrate_with_fault(Guest::running(3072), fault, &setup);
}

/// Offsets into a frame: every other byte of the header, and some of what follows.
fn frame_positions(kind: FrameKind, body: &'static [u64]) -> impl Iterator<Item = FaultPosition> {
    let header = FRAME_HEADER_BYTES as u64;
    let offsets = (0..header).step_by(2).chain(body.iter().map(move |offset| header + offset));
    offsets.map(move |offset| FaultPosition::Frame(kind, offset))
}

fn header_positions() -> impl Iterator<Item = FaultPosition> {
    (0..HEADER_BYTES as u64).step_by(2).map(FaultPosition::Byte)
}

fn assert_damage_is_detected(direction: Direction, places: impl Iterator<Item = FaultPosition>, codec: &str) {
    let mut guest = Guest::running(64);
    for at in places {
        let setup = MigrationSetup::new().timeout(Duration::from_millis(200)).codec(codec);
        (guest, _) = migrate_with_fault(guest, Fault::new(direction, at, FaultAction::Flip), &setup);
    }
}

#[test]
fn the_destination_detects_a_damaged_handshake_byte() {
    let places = header_positions().chain(frame_positions(FrameKind::Layout, &[0, 1, 2, 9, 10, 18, 30]));
    assert_damage_is_detected(ToDestination, places, "none");
}

#[test]
fn the_destination_detects_a_damaged_page_byte() {
    let places = frame_positions(FrameKind::Pages, &[0, 3, 4, 7, 8, 13, 15, 16, 1_000, 50_000, 99_999]);
    assert_damage_is_detected(ToDestination, places, "none");
    let places = [24, 28, 32, 300, 2_000, 5_000].map(|offset| FaultPosition::Frame(FrameKind::Pages, offset));
    assert_damage_is_detected(ToDestination, places.into_iter(), "zstd:1");
}

#[test]
fn the_destination_detects_a_damaged_byte_in_round_end_and_state() {
    let places = frame_positions(FrameKind::RoundEnd, &[0, 1, 2, 6, 7, 15, 20]);
    assert_damage_is_detected(ToDestination, places.chain(frame_positions(FrameKind::State, &[0, 100, 263])), "none");
}

#[test]
fn the_source_detects_a_damaged_reply_byte() {
    let places = header_positions()
        .chain(frame_positions(FrameKind::Accepted, &[]))
        .chain(frame_positions(FrameKind::Ready, &[]));
    assert_damage_is_detected(ToSource, places, "none");
}

#[test]
fn the_source_reports_why_the_destination_closed_the_connection() {
    let fault = Fault::new(ToDestination, FaultPosition::Frame(FrameKind::Pages, 3_000), FaultAction::Flip);
    let (_, failure) = migrate_with_fault(Guest::running(3072), fault, &MigrationSetup::new());
    let MigrateError::Destination(words) = &failure.error else { panic!("{failure}") };
    assert!(words.contains("checksum"), "{words}");
}

/// A switchover that is never idle and takes minutes.
const SLOW_TRICKLE: FaultAction = FaultAction::Trickle(Duration::from_secs(1));

#[test]
fn the_source_ends_a_trickling_switchover_at_its_timeout() {
    let mut guest = Guest::running(128);
    for (direction, at) in [
        (ToDestination, FaultPosition::Frame(FrameKind::State, 0)),
        (ToSource, FaultPosition::Frame(FrameKind::Ready, 0)),
    ] {
        let mut setup = MigrationSetup::new();
        setup.parameters.switchover_timeout = Some(Duration::from_millis(300));
        let failure;
        (guest, failure) = migrate_with_fault(guest, Fault::new(direction, at, SLOW_TRICKLE), &setup);
        assert!(matches!(failure.error, MigrateError::SwitchoverTimeout { .. }), "{direction:?}: {failure}");
        assert!(with_causes(&failure).to_string().contains("took longer than 300ms"), "{failure}");
    }
}

#[test]
fn the_destination_ends_a_trickling_state_at_its_timeout() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(128);
    let destination = Destination::limited(&folder.unix("destination"), None, Duration::from_millis(300));
    let fault = Fault::new(ToDestination, FaultPosition::Frame(FrameKind::State, 0), SLOW_TRICKLE);
    let relay = Relay::new(folder.unix("relay"), &destination.uri, fault);
    let failure = migrate_out(&mut guest, &relay.uri, &MigrationSetup::new()).failure();
    drop(relay);
    let error = destination.join().expect_failure();
    assert!(with_causes(&error).to_string().contains("took longer than 300ms"), "{error}");
    assert_source_unharmed(guest, &failure);
}

#[test]
fn a_one_way_stream_may_take_longer_than_the_switchover_timeout() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(64);
    let destination = Destination::limited(&folder.unix("destination"), None, Duration::from_millis(300));
    let action = FaultAction::Trickle(Duration::from_millis(5));
    let fault = Fault::new(ToDestination, FaultPosition::Frame(FrameKind::State, 0), action);
    let relay = Relay::new(folder.unix("relay"), &destination.uri, fault);
    let failure = migrate_out(&mut guest, &relay.uri, &MigrationSetup::new().one_way()).failure();
    assert!(matches!(failure.error, MigrateError::OneWay), "{failure}");
    destination.join().guest();
}

#[test]
fn the_destination_stops_waiting_for_the_commit_at_its_timeout() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(128);
    let destination = Destination::limited(&folder.unix("destination"), None, Duration::from_millis(300));
    let fault = Fault::new(ToSource, FaultPosition::Frame(FrameKind::Ready, 0), SLOW_TRICKLE);
    let relay = Relay::new(folder.unix("relay"), &destination.uri, fault);
    let mut setup = MigrationSetup::new();
    setup.parameters.switchover_timeout = Some(Duration::from_secs(1));
    let failure = migrate_out(&mut guest, &relay.uri, &setup).failure();
    drop(relay);
    let error = destination.join().expect_failure();
    assert!(with_causes(&error).to_string().contains("took longer than 300ms"), "{error}");
    assert_source_unharmed(guest, &failure);
}

#[test]
fn a_broken_channel_ends_the_channels_that_hang() {
    // More data than the buffers hold: a hanging channel blocks its writer, for a minute if nothing ends it.
    let folder = TempFolder::new();
    let mut guest = Guest::running(6144);
    let destination = Destination::at(&folder.unix("destination"));
    let hang = Fault { channel: 0, ..Fault::new(ToDestination, FaultPosition::Byte(500_000), FaultAction::Hold) };
    let cut = Fault { channel: 1, ..Fault::new(ToDestination, FaultPosition::Byte(1_000_000), FaultAction::Cut) };
    let relay = Relay::with_faults(folder.unix("relay"), &destination.uri, [hang, cut]);
    let begun = Instant::now();
    let failure = migrate_out(&mut guest, &relay.uri, &MigrationSetup::new().channels(2)).failure();
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}: {failure}", begun.elapsed());
    drop(relay);
    destination.cancel().expect_failure();
    assert_source_unharmed(guest, &failure);
}
