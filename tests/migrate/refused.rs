//! One side says no, says something out of turn, is of another version, or is no migration at all: a clear error on
//! both sides, and the guest goes on at the source.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use vhost_migrate::migrate::{ConvergencePolicy, MigrateError, MigrationFailure};
use vhost_migrate::stream::frame::{ConnectionHeader, HEADER_BYTES, VERSION};
use vhost_migrate::stream::record::{Commit, MemoryLayout, RoundEnd, Started};
use vhost_migrate::stream::{MigrationId, PageStats, StreamError, StreamListener};
use vhost_migrate::stream::{ToDestination, ToSource, Uri, transport};

use crate::guest::{Guest, NO_ROOM, Refusal, Trouble, layout};
use crate::trip::{Destination, How, Place, assert_nothing_happened, leave, options, stream_error, travel, uri};

const PAGES: u64 = 128;

fn refused(refusal: Refusal) -> MigrationFailure {
    let place = Place::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&place.unix("socket"), Some(refusal));
    let failure = leave(&mut guest, &destination.uri, &How::new()).failure();
    destination.join().nobody();
    assert!(matches!(failure.error, MigrateError::Destination(_)), "{failure}");
    assert_nothing_happened(guest, &failure);
    failure
}

#[test]
fn a_destination_that_refuses_is_quoted_and_the_guest_goes_on() {
    for refusal in [Refusal::Prepare, Refusal::Restore] {
        let words = refused(refusal).to_string();
        assert!(words.contains(NO_ROOM), "{refusal:?}: {words}");
    }
    let words = refused(Refusal::OtherMemory).to_string();
    assert!(words.contains("start the destination with the same memory"), "{words}");
}

#[test]
fn a_destination_whose_devices_do_not_fit_says_so_while_the_guest_runs() {
    let place = Place::new();
    let mut guest = Guest::running(PAGES).with(Trouble::Relentless);
    let destination = Destination::new(&place.unix("socket"), Some(Refusal::Devices));
    let mut how = How::new();
    // Nothing else ends it.
    how.parameters.policy = ConvergencePolicy { downtime_limit: Duration::ZERO, max_rounds: u32::MAX };
    let failure = leave(&mut guest, &destination.uri, &how).failure();
    assert!(failure.to_string().contains(NO_ROOM), "{failure}");
    destination.join().nobody();
    assert_eq!(guest.calls.pauses, 0);
    assert_nothing_happened(guest, &failure);
}

/// They are prepared once.
#[test]
fn devices_that_are_described_twice_are_refused() {
    let place = Place::new();
    let destination = Destination::at(&place.unix("socket"));
    let connection = transport::connect(&destination.uri, &options()).unwrap();
    let (mut reader, mut writer) = (connection.readers().remove(0), connection.writers().remove(0));
    let regions = layout(PAGES).to_vec();
    ToDestination::Layout(MemoryLayout { regions }).write(&mut writer).unwrap();
    assert_eq!(ToSource::next(&mut reader).unwrap(), ToSource::Accepted);
    for _ in 0..2 {
        ToDestination::Devices(b"a writer".into()).write(&mut writer).unwrap();
    }
    let answer = ToSource::next(&mut reader).unwrap();
    assert!(matches!(&answer, ToSource::Failed { message } if message.contains("Devices")), "{answer:?}");
    destination.join().nobody();
}

#[test]
fn a_source_whose_machine_fails_goes_on_and_tells_the_destination_why() {
    for (trouble, why) in [
        (Trouble::NoTracking, "no log here"),
        (Trouble::HarvestFails, "a device has gone"),
        (Trouble::PauseFails, "a ring does not drain"),
        (Trouble::StateFails, "a device keeps its state to itself"),
    ] {
        for channels in [1, 3] {
            let place = Place::new();
            let mut guest = Guest::running(PAGES).with(trouble);
            let destination = Destination::at(&place.unix("socket"));
            let mut how = How::new().channels(channels);
            if trouble == Trouble::HarvestFails {
                // So that there are enough rounds.
                how.parameters.policy.downtime_limit = Duration::ZERO;
            }
            let failure = leave(&mut guest, &destination.uri, &how).failure();
            assert!(failure.to_string().contains(why), "{failure}");
            let told = destination.join().nobody();
            assert!(matches!(&told, MigrateError::Source(words) if words.contains(why)), "{told}");
            assert_nothing_happened(guest, &failure);
        }
    }
}

/// A destination that answers the layout with `first`, and the state with `second`.
fn answers(first: ToSource, second: Option<ToSource>) -> MigrationFailure {
    let place = Place::new();
    let listener = StreamListener::bind(&place.unix("socket")).unwrap();
    let at = listener.uri().clone();
    let peer = std::thread::spawn(move || {
        let connection = listener.accept(&options()).unwrap();
        let mut reader = connection.readers().remove(0);
        let mut writer = connection.writers().remove(0);
        let layout = reader.next_frame().unwrap();
        ToDestination::read(&layout, &mut reader).unwrap();
        first.write(&mut writer).unwrap();
        let Some(second) = second else { return };
        let mut body = Vec::new();
        loop {
            let header = reader.next_frame().unwrap();
            reader.body(&header, &mut body).unwrap();
            if header.kind == vhost_migrate::stream::FrameKind::State {
                break;
            }
        }
        second.write(&mut writer).unwrap();
        // Whether the source commits is seen here.
        assert!(reader.next_frame().is_err());
    });
    let mut guest = Guest::running(PAGES);
    let failure = leave(&mut guest, &at, &How::new()).failure();
    assert_nothing_happened(guest, &failure);
    peer.join().unwrap();
    failure
}

#[test]
fn a_destination_that_speaks_out_of_turn_gets_no_guest() {
    let started = || ToSource::Started(Started::default());
    for (first, second) in [
        (ToSource::Ready, None),
        (started(), None),
        (ToSource::Accepted, Some(started())),
        (ToSource::Accepted, Some(ToSource::Accepted)),
    ] {
        let failure = answers(first, second);
        assert!(matches!(failure.error, MigrateError::Handshake { .. }), "{failure}");
    }
    let failure = answers(ToSource::Accepted, Some(ToSource::Failed { message: NO_ROOM.into() }));
    assert!(failure.to_string().contains(NO_ROOM), "{failure}");
}

#[test]
fn a_source_that_speaks_out_of_turn_starts_nothing() {
    let end = |last| ToDestination::RoundEnd(RoundEnd::new(0, last, &PageStats::default()));
    let commit = ToDestination::Commit(Commit { run: true });
    let regions = layout(PAGES).to_vec();
    let opening = ToDestination::Layout(MemoryLayout { regions });
    let scripts = [
        vec![commit.clone()],
        vec![end(true)],
        vec![opening.clone(), commit.clone()],
        vec![opening.clone(), ToDestination::State(vec![0; 8])],
        vec![opening.clone(), end(false), commit.clone()],
        vec![opening.clone(), end(true), commit],
        vec![opening.clone(), end(true), end(true)],
        vec![opening, end(true), ToDestination::State(vec![0; PAGES as usize * 4 + 8]), end(true)],
    ];
    for script in scripts {
        let place = Place::new();
        let destination = Destination::at(&place.unix("socket"));
        let connection = transport::connect(&destination.uri, &options()).unwrap();
        let mut writer = connection.writers().remove(0);
        for message in &script {
            // It may have had enough before the end.
            let _ = message.write(&mut writer);
        }
        let mut reader = connection.readers().remove(0);
        let words = loop {
            match ToSource::next(&mut reader).unwrap() {
                ToSource::Failed { message } => break message,
                ToSource::Started(_) => panic!("started by {script:?}"),
                _ => {}
            }
        };
        assert!(words.contains(" was due"), "{script:?}: {words}");
        destination.join().nobody();
    }
}

/// A header of the next version.
fn from_the_future() -> [u8; HEADER_BYTES] {
    let header = ConnectionHeader { id: MigrationId(1), channel: 0, channels: 1, one_way: false, outcome_query: false };
    let mut bytes = header.encode();
    assert_eq!(bytes[8..10], VERSION.to_le_bytes());
    bytes[8..10].copy_from_slice(&(VERSION + 1).to_le_bytes());
    bytes
}

/// A peer that answers a connection with these bytes.
fn answered_with(bytes: &[u8]) -> MigrationFailure {
    let place = Place::new();
    let at = place.unix("socket");
    let Uri::Unix(path) = &at else { panic!() };
    let listener = UnixListener::bind(path).unwrap();
    let mut guest = Guest::running(PAGES);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            socket.read_exact(&mut [0; HEADER_BYTES]).unwrap();
            socket.write_all(bytes).unwrap();
        });
        let failure = leave(&mut guest, &at, &How::new()).failure();
        assert_nothing_happened(guest, &failure);
        failure
    })
}

#[test]
fn a_source_says_what_is_wrong_with_a_destination_that_is_none() {
    let failure = answered_with(&from_the_future());
    assert!(matches!(stream_error(&failure), StreamError::Version { theirs: 3, .. }), "{failure}");
    let failure = answered_with(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    assert!(matches!(stream_error(&failure), StreamError::NotAStream), "{failure}");
    let failure = answered_with(b"short");
    assert!(failure.to_string().contains("closed the connection without an answer"), "{failure}");
}

#[test]
fn a_destination_lets_strangers_pass_and_takes_the_migration_after_them() {
    let place = Place::new();
    let destination = Destination::at(&place.unix("socket"));
    let Uri::Unix(path) = &destination.uri else { panic!() };
    let mut strangers = Vec::new();
    for bytes in [b"GET / HTTP/1.1\r\nHost: a.b\r\nAccept: */*\r\n\r\n".as_slice(), b"short", &from_the_future()] {
        let mut stranger = UnixStream::connect(path).unwrap();
        stranger.write_all(bytes).unwrap();
        strangers.push(stranger);
    }
    // A source of another version is told which one this is.
    let mut answer = [0; HEADER_BYTES];
    strangers[2].read_exact(&mut answer).unwrap();
    ConnectionHeader::decode(&answer).unwrap();
    let mut guest = Guest::running(PAGES);
    leave(&mut guest, &destination.uri, &How::new()).outcome.unwrap();
    destination.join().guest();
}

#[test]
fn a_file_that_is_no_whole_migration_starts_nothing() {
    let place = Place::new();
    let saved = uri(&format!("file:{}", place.path("saved")));
    leave(&mut Guest::running(PAGES), &saved, &How::new()).outcome.unwrap();
    let whole = std::fs::read(place.path("saved")).unwrap();

    let broken = uri(&format!("file:{}", place.path("broken")));
    let restore = |bytes: &[u8]| {
        std::fs::write(place.path("broken"), bytes).unwrap();
        match Destination::at(&broken).join().nobody() {
            MigrateError::Stream(error) => error,
            other => panic!("{other}"),
        }
    };
    let (length, last) = (whole.len(), whole.len() - 24);
    for cut in [0, 1, 39, 40, 41, 64, 100, 10_000, length / 2, last - 1000, last, last + 1, length - 1] {
        let error = restore(&whole[..cut]);
        assert!(matches!(error, StreamError::Truncated(_) | StreamError::Ended), "{cut} of {length} bytes: {error}");
    }
    assert!(matches!(restore(&[7; 1000]), StreamError::NotAStream));
    assert!(matches!(restore(&from_the_future()), StreamError::Version { .. }));
    let damaged_at = |at: usize| {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x80;
        restore(&damaged)
    };
    // A byte of the state, which nothing looks at before its checksum fits.
    let damaged = damaged_at(last - 100);
    assert!(matches!(damaged, StreamError::Checksum { .. }), "{damaged}");
    // Elsewhere it may be a header that makes no sense, or pages that can't be decompressed: refused in any case.
    for part in 0..16 {
        damaged_at(length * part / 16);
    }

    // The whole one is good, all this time.
    let (guest, _) = travel(Destination::at(&saved).join().guest(), &place.unix("on"), &How::new());
    guest.beat();
}
