//! The seeds of the fuzz target `stream` are streams of the current version with a frame of every kind, because a
//! fuzzer cannot find valid frame hashes.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::process::Command;

use vhost_migrate::stream::{FrameKind, MigrationId};
use vhost_migrate::unstable::stream::frame::{ChannelId, ConnectionHeader, FrameReader};

#[test]
fn the_seeds_contain_complete_streams_of_the_current_version() {
    let folder = tempfile::tempdir().unwrap();
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/stream.tar.gz");
    let unpacked = Command::new("tar").args(["-xzf", seeds, "-C"]).arg(folder.path()).status().unwrap();
    assert!(unpacked.success());
    let kinds: HashSet<FrameKind> = fs::read_dir(folder.path())
        .unwrap()
        .flat_map(|file| kinds_of_frames(&fs::read(file.unwrap().path()).unwrap()))
        .collect();
    let missing: Vec<FrameKind> = FrameKind::ALL.into_iter().filter(|kind| !kinds.contains(kind)).collect();
    assert!(
        missing.is_empty(),
        "no input has a valid frame of the kinds {missing:?}: tests/fuzz says how to select anew"
    );
}

/// Returns the kinds of the valid frames behind a valid connection header, read like in the target.
fn kinds_of_frames(mut stream: &[u8]) -> Vec<FrameKind> {
    let mut kinds = Vec::new();
    if ConnectionHeader::read(&mut stream).is_ok() {
        let mut reader = FrameReader::new(stream, ChannelId { migration: MigrationId(1), channel: 0 });
        while let Ok(frame) = reader.next_frame() {
            if reader.body(&frame, &mut Vec::new()).is_err() {
                break;
            }
            kinds.push(frame.kind);
        }
    }
    kinds
}
