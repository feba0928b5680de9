//! Other peers that connect to a destination: they do not block a migration.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vhost_migrate::migrate::{MigrateError, MigrationListener, Outcomes, receive};
use vhost_migrate::stream::{MigrationId, StreamError, StreamListener, StreamOptions, Uri};
use vhost_migrate::unstable::stream::frame::{
    ChannelId, ConnectionHeader, FRAME_HEADER_BYTES, FrameWriter, HEADER_BYTES,
};
use vhost_migrate::unstable::stream::record::{MemoryLayout, ToDestination};

use crate::guest::{Guest, IncomingGuest, PATIENCE, layout};
use crate::harness::{Destination, MigrationSetup, TempFolder, migrate_out};

const PAGES: u64 = 128;

fn header(id: u128, channels: u16) -> ConnectionHeader {
    ConnectionHeader { channels, ..ConnectionHeader::new(MigrationId(id)) }
}

/// Returns the frame of a memory layout.
fn opening(id: u128) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), ChannelId { migration: MigrationId(id), channel: 0 });
    let regions = layout(PAGES).to_vec();
    ToDestination::Layout(MemoryLayout { regions }).write(&mut writer).unwrap();
    writer.into_inner()
}

/// Connects `peers` peers that each send `bytes` of their number and stay connected; then migrates a guest.
fn assert_migrates_despite_peers(peers: u128, channels: u16, bytes: impl Fn(u128) -> Vec<u8>) {
    let folder = TempFolder::new();
    let destination = Destination::at(&folder.unix("destination"));
    let Uri::Unix(path) = &destination.uri else { panic!() };
    let connect = |number| {
        let mut peer = UnixStream::connect(path).unwrap();
        // The destination may have dropped it for another peer.
        let _ = peer.write_all(&bytes(number));
        peer
    };
    let peers: Vec<UnixStream> = (1..=peers).map(connect).collect();
    let mut guest = Guest::running(PAGES);
    migrate_out(&mut guest, &destination.uri, &MigrationSetup::new().channels(channels)).outcome.unwrap();
    guest.assert_released();
    destination.join().guest();
    drop(peers);
}

#[test]
fn a_peer_that_sends_only_a_header_does_not_block_a_migration() {
    assert_migrates_despite_peers(1, 1, |id| header(id, 1).encode().to_vec());
    assert_migrates_despite_peers(5, 3, |id| header(id, 1).encode().to_vec());
}

#[test]
fn peers_that_send_nothing_or_a_partial_header_do_not_block_a_migration() {
    assert_migrates_despite_peers(300, 2, |_| Vec::new());
    assert_migrates_despite_peers(300, 2, |id| header(id, 2).encode().to_vec());
    assert_migrates_despite_peers(300, 2, |id| header(id, 1).encode().to_vec());
    assert_migrates_despite_peers(5, 2, |id| header(id, 1).encode()[..39].to_vec());
}

#[test]
fn a_peer_that_sends_a_partial_memory_layout_does_not_block_a_migration() {
    assert_migrates_despite_peers(3, 2, |id| [&header(id, 1).encode()[..], &opening(id)[..40]].concat());
    assert_migrates_despite_peers(3, 2, |id| [&header(id, 1).encode()[..], &[0xff; 24]].concat());
}

/// The destination receives this peer first, because its layout has arrived.
#[test]
fn a_peer_that_stops_after_its_accepted_layout_does_not_block_a_migration() {
    let folder = TempFolder::new();
    let uri = folder.unix("destination");
    let incoming = MigrationListener::start(StreamListener::bind(&uri).unwrap(), Outcomes::default()).unwrap();
    let Uri::Unix(path) = &uri else { panic!() };
    let mut peer = UnixStream::connect(path).unwrap();
    peer.write_all(&[&header(1, 1).encode()[..], &opening(1)].concat()).unwrap();
    let take_in = || {
        let arriving = incoming.next().unwrap().unwrap();
        let mut incoming_guest = IncomingGuest::new(None);
        let outcome = receive(&mut incoming_guest, arriving, &Outcomes::default(), PATIENCE);
        outcome.map(|_| incoming_guest.guest.unwrap())
    };
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| (take_in(), take_in()));
        // The replies to header and layout.
        peer.read_exact(&mut [0; HEADER_BYTES + FRAME_HEADER_BYTES]).unwrap();
        let mut guest = Guest::running(PAGES);
        // With the default time limits of a source.
        let setup = MigrationSetup { options: StreamOptions::new().unwrap(), ..MigrationSetup::new() };
        migrate_out(&mut guest, &uri, &setup).outcome.unwrap();
        guest.assert_released();
        let (failed, arrived) = destination.join().unwrap();
        assert!(matches!(failed.err().unwrap(), MigrateError::Stream(StreamError::Timeout(_))));
        arrived.unwrap().wait_for_write();
    });
}
