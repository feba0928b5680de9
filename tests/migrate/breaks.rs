//! The connection breaks, hangs or is damaged at any step before the commit: the guest goes on at the source, nothing
//! runs at the destination, and the next migration works.

use std::time::{Duration, Instant};

use vhost_migrate::migrate::{MigrateError, MigrationFailure};
use vhost_migrate::stream::frame::{FRAME_HEADER_BYTES, FrameKind, HEADER_BYTES};

use crate::guest::{Guest, PATIENCE};
use crate::relay::{At, Deed, Fault, Relay, Way};
use crate::trip::{Destination, How, Place, assert_nothing_happened, leave};

use Way::{ToDestination, ToSource};

/// Every step of the handshake, by the byte that gets lost.
const STEPS: [(Way, At); 14] = [
    (ToDestination, At::Byte(20)),
    (ToSource, At::Byte(0)),
    (ToSource, At::Byte(17)),
    (ToDestination, At::Frame(FrameKind::Layout, 30)),
    (ToSource, At::Frame(FrameKind::Accepted, 0)),
    (ToDestination, At::Frame(FrameKind::Pages, 0)),
    (ToDestination, At::Byte(5_000)),
    (ToDestination, At::Byte(100_000)),
    (ToDestination, At::Byte(300_000)),
    (ToDestination, At::Frame(FrameKind::RoundEnd, 0)),
    (ToDestination, At::Frame(FrameKind::State, 0)),
    (ToDestination, At::Frame(FrameKind::State, 100)),
    (ToSource, At::Frame(FrameKind::Ready, 0)),
    (ToSource, At::Frame(FrameKind::Ready, 11)),
];

/// Migrates through a relay with a fault. The guest must be none the worse for it, and is returned with the failure
/// after another migration.
fn survives(mut guest: Guest, fault: Fault, how: &How) -> (Guest, MigrationFailure) {
    let mut how = how.clone();
    loop {
        let place = Place::new();
        let destination = Destination::at(&place.unix("destination"));
        let relay = Relay::new(place.unix("relay"), &destination.uri, fault);
        let failure = leave(&mut guest, &relay.uri, &how).failure();
        let struck = relay.struck();
        drop(relay);
        destination.cancel().nobody();
        if struck {
            return (assert_nothing_happened(guest, &failure), failure);
        }
        // On a busy machine a short timeout may end a migration before it gets to the fault.
        guest.assert_here();
        let longer = 2 * how.options.timeout.unwrap();
        how = how.timeout(longer);
    }
}

#[test]
fn a_connection_cut_at_any_step_leaves_the_guest_at_its_source() {
    let mut guest = Guest::running(128);
    for (way, at) in STEPS {
        (guest, _) = survives(guest, Fault::new(way, at, Deed::Cut), &How::new());
    }
}

#[test]
fn any_one_of_several_connections_being_cut_ends_the_migration() {
    let mut guest = Guest::running(1536);
    for (channel, way, at) in [
        (0, ToDestination, At::Byte(100_000)),
        (1, ToSource, At::Byte(10)),
        (2, ToDestination, At::Byte(40)),
        (3, ToDestination, At::Byte(100_000)),
        (4, ToDestination, At::Frame(FrameKind::RoundEnd, 0)),
    ] {
        let fault = Fault { channel, ..Fault::new(way, at, Deed::Cut) };
        (guest, _) = survives(guest, fault, &How::new().channels(5));
    }
}

#[test]
fn a_destination_that_falls_silent_at_any_step_is_given_up() {
    let mut guest = Guest::running(128);
    for (way, at) in STEPS {
        let how = How::new().timeout(Duration::from_millis(200));
        let failure;
        (guest, failure) = survives(guest, Fault::new(way, at, Deed::Hold), &how);
        let words = failure.to_string();
        assert!(words.contains("no progress") || words.contains("no answer"), "{way:?} {at:?}: {words}");
    }
}

#[test]
fn a_destination_that_reads_no_more_does_not_block_the_source_for_ever() {
    // More than the buffers between them hold.
    let how = How::new().timeout(Duration::from_millis(200));
    let fault = Fault::new(ToDestination, At::Byte(10_000), Deed::Hold);
    survives(Guest::running(3072), fault, &how);
}

/// Offsets into a frame: every other byte of the header, and some of what follows.
fn of_frame(kind: FrameKind, body: &'static [u64]) -> impl Iterator<Item = At> {
    let header = FRAME_HEADER_BYTES as u64;
    let offsets = (0..header).step_by(2).chain(body.iter().map(move |offset| header + offset));
    offsets.map(move |offset| At::Frame(kind, offset))
}

fn of_header() -> impl Iterator<Item = At> {
    (0..HEADER_BYTES as u64).step_by(2).map(At::Byte)
}

fn survives_damage(way: Way, places: impl Iterator<Item = At>, codec: &str) {
    let mut guest = Guest::running(64);
    for at in places {
        let how = How::new().timeout(Duration::from_millis(200)).codec(codec);
        (guest, _) = survives(guest, Fault::new(way, at, Deed::Flip), &how);
    }
}

#[test]
fn a_damaged_byte_in_the_handshake_is_noticed_by_the_destination() {
    let places = of_header().chain(of_frame(FrameKind::Layout, &[0, 1, 2, 9, 10, 18, 30]));
    survives_damage(ToDestination, places, "none");
}

#[test]
fn a_damaged_byte_in_the_pages_is_noticed() {
    let places = of_frame(FrameKind::Pages, &[0, 3, 4, 7, 8, 13, 15, 16, 1_000, 50_000, 99_999]);
    survives_damage(ToDestination, places, "none");
    let places = [24, 28, 32, 300, 2_000, 5_000].map(|offset| At::Frame(FrameKind::Pages, offset));
    survives_damage(ToDestination, places.into_iter(), "zstd:1");
}

#[test]
fn a_damaged_byte_in_a_rounds_end_or_in_the_state_is_noticed() {
    let places = of_frame(FrameKind::RoundEnd, &[0, 1, 2, 6, 7, 15, 20]);
    survives_damage(ToDestination, places.chain(of_frame(FrameKind::State, &[0, 100, 263])), "none");
}

#[test]
fn a_damaged_byte_in_what_the_destination_says_is_noticed_by_the_source() {
    let places = of_header().chain(of_frame(FrameKind::Accepted, &[])).chain(of_frame(FrameKind::Ready, &[]));
    survives_damage(ToSource, places, "none");
}

#[test]
fn the_source_learns_why_the_destination_hung_up_in_the_middle_of_its_pages() {
    let fault = Fault::new(ToDestination, At::Frame(FrameKind::Pages, 3_000), Deed::Flip);
    let (_, failure) = survives(Guest::running(3072), fault, &How::new());
    let MigrateError::Destination(words) = &failure.error else { panic!("{failure}") };
    assert!(words.contains("checksum"), "{words}");
}

/// A switchover that is never at rest and takes minutes.
const SLOW: Deed = Deed::Trickle(Duration::from_secs(1));

#[test]
fn a_switchover_that_only_trickles_is_given_up_by_the_source_in_its_own_time() {
    let mut guest = Guest::running(128);
    for (way, at) in [(ToDestination, At::Frame(FrameKind::State, 0)), (ToSource, At::Frame(FrameKind::Ready, 0))] {
        let mut how = How::new();
        how.parameters.switchover_timeout = Some(Duration::from_millis(300));
        let failure;
        (guest, failure) = survives(guest, Fault::new(way, at, SLOW), &how);
        assert!(matches!(failure.error, MigrateError::SwitchoverTimeout { .. }), "{way:?}: {failure}");
        assert!(failure.to_string().contains("took longer than 300ms"), "{failure}");
    }
}

#[test]
fn a_source_that_trickles_its_state_is_given_up_by_the_destination_in_its_own_time() {
    let place = Place::new();
    let mut guest = Guest::running(128);
    let destination = Destination::limited(&place.unix("destination"), None, Duration::from_millis(300));
    let fault = Fault::new(ToDestination, At::Frame(FrameKind::State, 0), SLOW);
    let relay = Relay::new(place.unix("relay"), &destination.uri, fault);
    let failure = leave(&mut guest, &relay.uri, &How::new()).failure();
    drop(relay);
    let error = destination.join().nobody();
    assert!(error.to_string().contains("took longer than 300ms"), "{error}");
    assert_nothing_happened(guest, &failure);
}

#[test]
fn a_destination_that_waits_for_a_commit_gives_up_in_its_own_time() {
    let place = Place::new();
    let mut guest = Guest::running(128);
    let destination = Destination::limited(&place.unix("destination"), None, Duration::from_millis(300));
    let fault = Fault::new(ToSource, At::Frame(FrameKind::Ready, 0), SLOW);
    let relay = Relay::new(place.unix("relay"), &destination.uri, fault);
    let mut how = How::new();
    how.parameters.switchover_timeout = Some(Duration::from_secs(1));
    let failure = leave(&mut guest, &relay.uri, &how).failure();
    drop(relay);
    let error = destination.join().nobody();
    assert!(error.to_string().contains("took longer than 300ms"), "{error}");
    assert_nothing_happened(guest, &failure);
}

#[test]
fn one_connection_that_breaks_ends_others_at_once_that_hang() {
    // More than the buffers hold: a channel that hangs blocks its writer, for a minute if nothing ends it.
    let place = Place::new();
    let mut guest = Guest::running(6144);
    let destination = Destination::at(&place.unix("destination"));
    let hang = Fault { channel: 0, ..Fault::new(ToDestination, At::Byte(500_000), Deed::Hold) };
    let cut = Fault { channel: 1, ..Fault::new(ToDestination, At::Byte(1_000_000), Deed::Cut) };
    let relay = Relay::with_faults(place.unix("relay"), &destination.uri, [hang, cut]);
    let begun = Instant::now();
    let failure = leave(&mut guest, &relay.uri, &How::new().channels(2)).failure();
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}: {failure}", begun.elapsed());
    drop(relay);
    destination.cancel().nobody();
    assert_nothing_happened(guest, &failure);
}
