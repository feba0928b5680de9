//! What connects to a destination and is no migration: it keeps no source out, however it goes about it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vhost_migrate::migrate::{MigrateError, MigrationListener, Outcomes, receive};
use vhost_migrate::stream::frame::{ConnectionHeader, FRAME_HEADER_BYTES, HEADER_BYTES};
use vhost_migrate::stream::record::MemoryLayout;
use vhost_migrate::stream::{
    ChannelId, FrameWriter, MigrationId, StreamError, StreamListener, StreamOptions, ToDestination, Uri,
};

use crate::guest::{Cradle, Guest, PATIENCE, layout};
use crate::trip::{Destination, How, Place, leave};

const PAGES: u64 = 128;

fn header(id: u128, channels: u16) -> ConnectionHeader {
    ConnectionHeader { id: MigrationId(id), channel: 0, channels, one_way: false, outcome_query: false }
}

/// A memory layout as a source sends it.
fn opening(id: u128) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), ChannelId { migration: MigrationId(id), channel: 0 });
    let regions = layout(PAGES).to_vec();
    ToDestination::Layout(MemoryLayout { regions }).write(&mut writer).unwrap();
    writer.into_inner()
}

/// Connects so often, sends each time what `bytes` makes of its number, and hangs on; then a guest migrates.
fn passes(strangers: u128, channels: u16, bytes: impl Fn(u128) -> Vec<u8>) {
    let place = Place::new();
    let destination = Destination::at(&place.unix("destination"));
    let Uri::Unix(path) = &destination.uri else { panic!() };
    let connect = |number| {
        let mut stranger = UnixStream::connect(path).unwrap();
        // It may have been dropped for another by now.
        let _ = stranger.write_all(&bytes(number));
        stranger
    };
    let strangers: Vec<UnixStream> = (1..=strangers).map(connect).collect();
    let mut guest = Guest::running(PAGES);
    leave(&mut guest, &destination.uri, &How::new().channels(channels)).outcome.unwrap();
    guest.assert_gone();
    destination.join().guest();
    drop(strangers);
}

#[test]
fn a_stranger_that_sends_a_header_and_nothing_else_keeps_no_source_out() {
    passes(1, 1, |id| header(id, 1).encode().to_vec());
    passes(5, 3, |id| header(id, 1).encode().to_vec());
}

#[test]
fn strangers_that_send_nothing_or_part_of_a_migration_keep_no_source_out() {
    passes(300, 2, |_| Vec::new());
    passes(300, 2, |id| header(id, 2).encode().to_vec());
    passes(300, 2, |id| header(id, 1).encode().to_vec());
    passes(5, 2, |id| header(id, 1).encode()[..39].to_vec());
}

#[test]
fn a_stranger_that_begins_its_memory_layout_and_does_not_end_it_keeps_no_source_out() {
    passes(3, 2, |id| [&header(id, 1).encode()[..], &opening(id)[..40]].concat());
    passes(3, 2, |id| [&header(id, 1).encode()[..], &[0xff; 24]].concat());
}

/// It is the one that is taken in, as its layout has come.
#[test]
fn a_stranger_whose_memory_layout_is_accepted_and_that_does_not_go_on_keeps_no_source_out() {
    let place = Place::new();
    let uri = place.unix("destination");
    let incoming = MigrationListener::start(StreamListener::bind(&uri).unwrap(), Outcomes::default()).unwrap();
    let Uri::Unix(path) = &uri else { panic!() };
    let mut stranger = UnixStream::connect(path).unwrap();
    stranger.write_all(&[&header(1, 1).encode()[..], &opening(1)].concat()).unwrap();
    let take_in = || {
        let arriving = incoming.next().unwrap().unwrap();
        let mut cradle = Cradle::new(None);
        let outcome = receive(&mut cradle, arriving.connection, &arriving.cancel, &Outcomes::default(), PATIENCE);
        outcome.map(|_| cradle.guest.unwrap())
    };
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| (take_in(), take_in()));
        // The answers to header and layout.
        stranger.read_exact(&mut [0; HEADER_BYTES + FRAME_HEADER_BYTES]).unwrap();
        let mut guest = Guest::running(PAGES);
        // As long as a source waits unless it is told otherwise.
        let how = How { options: StreamOptions::new().unwrap(), ..How::new() };
        leave(&mut guest, &uri, &how).outcome.unwrap();
        guest.assert_gone();
        let (failed, arrived) = destination.join().unwrap();
        assert!(matches!(failed.err().unwrap(), MigrateError::Stream(StreamError::Timeout(_))));
        arrived.unwrap().beat();
    });
}
