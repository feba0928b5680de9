//! One side refuses, breaks the order of the handshake, has another version, or is no migration at all: both sides
//! report a clear error, and the guest continues at its source.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use vhost_migrate::migrate::{ConvergencePolicy, MigrateError, MigrationEvent, MigrationFailure};
use vhost_migrate::stream::{self, Codec, MigrationId, PageStats, Started, StreamError, StreamListener, ToSource, Uri};
use vhost_migrate::unstable::stream::frame::{ConnectionHeader, HEADER_BYTES, OLDEST_VERSION, VERSION};
use vhost_migrate::unstable::stream::record::{Commit, MemoryLayout, RoundEnd, ToDestination};
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, GuestFault, REFUSAL_REASON, RefusalPoint, layout};
use crate::harness::{
    Destination, MigrationSetup, TempFolder, assert_source_unharmed, migrate_out, migrate_to, options, stream_error,
    uri,
};

const PAGES: u64 = 128;

fn failure_with_refusal(refusal_point: RefusalPoint) -> MigrationFailure {
    let folder = TempFolder::new();
    let mut guest = Guest::running(PAGES);
    let destination = Destination::new(&folder.unix("socket"), Some(refusal_point));
    let failure = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).failure();
    destination.join().expect_failure();
    assert!(matches!(failure.error, MigrateError::Destination(_)), "{failure}");
    assert_source_unharmed(guest, &failure);
    failure
}

#[test]
fn the_error_quotes_a_destination_that_refuses() {
    for refusal_point in [RefusalPoint::Prepare, RefusalPoint::Restore] {
        let words = with_causes(&failure_with_refusal(refusal_point)).to_string();
        assert!(words.contains(REFUSAL_REASON), "{refusal_point:?}: {words}");
    }
    let words = with_causes(&failure_with_refusal(RefusalPoint::OtherMemory)).to_string();
    assert!(words.contains("start the destination with the same memory"), "{words}");
}

#[test]
fn devices_that_do_not_fit_fail_the_migration_while_the_guest_runs() {
    let folder = TempFolder::new();
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::AlwaysDirty);
    let destination = Destination::new(&folder.unix("socket"), Some(RefusalPoint::Devices));
    let mut setup = MigrationSetup::new();
    // No other limit ends the migration.
    setup.parameters.policy = ConvergencePolicy::new(Duration::ZERO, u32::MAX);
    let failure = migrate_out(&mut guest, &destination.uri, &setup).failure();
    assert!(with_causes(&failure).to_string().contains(REFUSAL_REASON), "{failure}");
    destination.join().expect_failure();
    assert_eq!(guest.calls.pauses, 0);
    assert_source_unharmed(guest, &failure);
}

/// Devices are prepared once.
#[test]
fn a_second_devices_message_is_refused() {
    let (_folder, destination) = Destination::start();
    let connection = stream::connect(&destination.uri, &options()).unwrap();
    let (mut reader, mut writer) = (connection.readers().remove(0), connection.writers().remove(0));
    let regions = layout(PAGES).to_vec();
    ToDestination::Layout(MemoryLayout { regions }).write(&mut writer).unwrap();
    assert_eq!(ToSource::next(&mut reader).unwrap(), ToSource::Accepted);
    for _ in 0..2 {
        ToDestination::Devices(b"a writer".into()).write(&mut writer).unwrap();
    }
    let answer = ToSource::next(&mut reader).unwrap();
    assert!(matches!(&answer, ToSource::Failed { message } if message.contains("Devices")), "{answer:?}");
    destination.join().expect_failure();
}

#[test]
fn a_source_vm_that_fails_resumes_and_sends_the_reason() {
    for (fault, why) in [
        (GuestFault::NoTracking, "no log here"),
        (GuestFault::HarvestFails, "a device has gone"),
        (GuestFault::PauseFails, "a ring does not drain"),
        (GuestFault::StateFails, "a device keeps its state to itself"),
    ] {
        for channels in [1, 3] {
            let mut guest = Guest::running(PAGES).with_fault(fault);
            let (_folder, destination) = Destination::start();
            let mut setup = MigrationSetup::new().channels(channels);
            if fault == GuestFault::HarvestFails {
                // Ensures enough rounds.
                setup.parameters.policy.downtime_limit = Duration::ZERO;
            }
            let failure = migrate_out(&mut guest, &destination.uri, &setup).failure();
            assert!(with_causes(&failure).to_string().contains(why), "{failure}");
            let told = destination.join().expect_failure();
            assert!(matches!(&told, MigrateError::Source(words) if words.contains(why)), "{told}");
            assert_source_unharmed(guest, &failure);
        }
    }
}

/// Migrates to a destination that replies to the layout with `first` and to the state with `second`.
fn failure_with_replies(first: ToSource, second: Option<ToSource>) -> MigrationFailure {
    let folder = TempFolder::new();
    let listener = StreamListener::bind(&folder.unix("socket")).unwrap();
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
        // A commit would be received here.
        assert!(reader.next_frame().is_err());
    });
    let mut guest = Guest::running(PAGES);
    let failure = migrate_out(&mut guest, &at, &MigrationSetup::new()).failure();
    assert_source_unharmed(guest, &failure);
    peer.join().unwrap();
    failure
}

#[test]
fn a_destination_that_breaks_the_handshake_order_fails_the_migration() {
    let started = || ToSource::Started(Started::default());
    for (first, second) in [
        (ToSource::Ready, None),
        (started(), None),
        (ToSource::Accepted, Some(started())),
        (ToSource::Accepted, Some(ToSource::Accepted)),
    ] {
        let failure = failure_with_replies(first, second);
        assert!(matches!(failure.error, MigrateError::Handshake { .. }), "{failure}");
    }
    let failure = failure_with_replies(ToSource::Accepted, Some(ToSource::Failed { message: REFUSAL_REASON.into() }));
    assert!(with_causes(&failure).to_string().contains(REFUSAL_REASON), "{failure}");
}

#[test]
fn a_source_that_breaks_the_handshake_order_is_refused() {
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
        let (_folder, destination) = Destination::start();
        let connection = stream::connect(&destination.uri, &options()).unwrap();
        let mut writer = connection.writers().remove(0);
        for message in &script {
            // The destination may have failed before the end.
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
        assert!(words.contains("expected "), "{script:?}: {words}");
        destination.join().expect_failure();
    }
}

/// Returns a one-way header of this version.
fn header_with_version(version: u16) -> [u8; HEADER_BYTES] {
    ConnectionHeader { version, one_way: true, ..ConnectionHeader::new(MigrationId(1)) }.encode()
}

/// Relays one connection to `to`, with a changed header in each direction. Returns the URI to connect to.
fn relay_with_headers(
    folder: &TempFolder,
    to: &Uri,
    offer: fn(ConnectionHeader) -> ConnectionHeader,
    reply: fn(ConnectionHeader) -> ConnectionHeader,
) -> Uri {
    let (Uri::Unix(to), at) = (to.clone(), folder.unix("relay")) else { panic!() };
    let Uri::Unix(path) = &at else { panic!() };
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (source, destination) = (listener.accept().unwrap().0, UnixStream::connect(to).unwrap());
        let ends = [source.try_clone().unwrap(), destination.try_clone().unwrap()];
        let forth = std::thread::spawn(move || relay_with_header(source, destination, offer));
        let [source, destination] = ends;
        relay_with_header(destination, source, reply);
        forth.join().unwrap();
    });
    at
}

/// Relays one direction until it ends.
fn relay_with_header(mut from: UnixStream, mut to: UnixStream, change: fn(ConnectionHeader) -> ConnectionHeader) {
    let header = ConnectionHeader::read(&mut from).unwrap();
    to.write_all(&change(header).encode()).unwrap();
    // The other side may close the connection first.
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

#[test]
fn a_newer_source_migrates_in_the_version_that_the_destination_knows() {
    let (folder, destination) = Destination::start();
    let newer = |header| ConnectionHeader { version: VERSION + 1, ..header };
    let known = |reply: ConnectionHeader| {
        assert_eq!(reply.version, VERSION);
        reply
    };
    let at = relay_with_headers(&folder, &destination.uri, newer, known);
    migrate_out(&mut Guest::running(PAGES), &at, &MigrationSetup::new()).outcome.unwrap();
    destination.join().guest();
}

#[test]
fn pages_are_sent_uncompressed_to_a_destination_without_zstd() {
    let (folder, destination) = Destination::start();
    let at = relay_with_headers(
        &folder,
        &destination.uri,
        |header| header,
        |reply| ConnectionHeader { zstd: false, ..reply },
    );
    let mut setup = MigrationSetup::new();
    setup.parameters.codec = Codec::Zstd(1);
    let moved = migrate_out(&mut Guest::running(PAGES), &at, &setup);
    moved.outcome.unwrap();
    let [MigrationEvent::Warning { message }, MigrationEvent::Started { codec, .. }, ..] = moved.events.as_slice()
    else {
        panic!("{:?}", moved.events);
    };
    assert!(message.contains("without zstd") && codec == "none", "{message}; {codec}");
    destination.join().guest();
}

/// Migrates to a peer that replies with these bytes.
fn failure_with_reply_bytes(bytes: &[u8]) -> MigrationFailure {
    let folder = TempFolder::new();
    let at = folder.unix("socket");
    let Uri::Unix(path) = &at else { panic!() };
    let listener = UnixListener::bind(path).unwrap();
    let mut guest = Guest::running(PAGES);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut socket, _) = listener.accept().unwrap();
            socket.read_exact(&mut [0; HEADER_BYTES]).unwrap();
            socket.write_all(bytes).unwrap();
        });
        let failure = migrate_out(&mut guest, &at, &MigrationSetup::new()).failure();
        assert_source_unharmed(guest, &failure);
        failure
    })
}

#[test]
fn the_source_reports_what_is_wrong_with_the_peers_header() {
    let failure = failure_with_reply_bytes(&header_with_version(VERSION + 1));
    assert!(matches!(stream_error(&failure), StreamError::Version { theirs: 3, .. }), "{failure}");
    let failure = failure_with_reply_bytes(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    assert!(matches!(stream_error(&failure), StreamError::NotAStream), "{failure}");
    let failure = failure_with_reply_bytes(b"short");
    assert!(with_causes(&failure).to_string().contains("closed the connection without a reply"), "{failure}");
}

#[test]
fn a_destination_drops_other_connections_and_accepts_the_migration() {
    let (_folder, destination) = Destination::start();
    let Uri::Unix(path) = &destination.uri else { panic!() };
    let mut peers = Vec::new();
    for bytes in [b"GET / HTTP/1.1\r\nHost: a.b\r\nAccept: */*\r\n\r\n".as_slice(), b"short", &header_with_version(1)] {
        let mut peer = UnixStream::connect(path).unwrap();
        peer.write_all(bytes).unwrap();
        peers.push(peer);
    }
    // The reply to a source whose version is too old names the version that is needed.
    let needed = ConnectionHeader::read(&mut peers[2]).unwrap().version;
    assert_eq!(needed, OLDEST_VERSION);
    let mut guest = Guest::running(PAGES);
    migrate_out(&mut guest, &destination.uri, &MigrationSetup::new()).outcome.unwrap();
    destination.join().guest();
}

#[test]
fn an_incomplete_or_damaged_file_is_refused() {
    let folder = TempFolder::new();
    let saved = uri(&format!("file:{}", folder.path("saved")));
    migrate_out(&mut Guest::running(PAGES), &saved, &MigrationSetup::new()).outcome.unwrap();
    let whole = std::fs::read(folder.path("saved")).unwrap();

    let broken = uri(&format!("file:{}", folder.path("broken")));
    let restore = |bytes: &[u8]| {
        std::fs::write(folder.path("broken"), bytes).unwrap();
        match Destination::at(&broken).join().expect_failure() {
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
    assert!(matches!(restore(&header_with_version(VERSION + 1)), StreamError::Version { .. }));
    let damaged_at = |at: usize| {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x80;
        restore(&damaged)
    };
    // A byte of the state, which is not parsed before its checksum matches.
    let damaged = damaged_at(last - 100);
    assert!(matches!(damaged, StreamError::Checksum { .. }), "{damaged}");
    // Elsewhere the damage may be in a header or in compressed pages: it is refused in any case.
    for part in 0..16 {
        damaged_at(length * part / 16);
    }

    // The undamaged file is still valid.
    let (guest, _) = migrate_to(Destination::at(&saved).join().guest(), &folder.unix("on"), &MigrationSetup::new());
    guest.wait_for_write();
}
