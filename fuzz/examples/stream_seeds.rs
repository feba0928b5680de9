//! Writes seeds for the fuzz target `stream`: streams of the current version with a frame of every kind, with raw and
//! with compressed pages, and the body of each frame separately.
//!
//! `cargo run --example stream_seeds FOLDER`

use std::error::Error;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageRange, Region, UserAddress, sealed_memfd};
use vhost_migrate::stream::{Codec, FrameKind, Held, MigrationId, Started, ToSource};
use vhost_migrate::unstable::stream::frame::{ChannelId, ConnectionHeader, FrameReader, FrameWriter, HEADER_BYTES};
use vhost_migrate::unstable::stream::hashes::send_hashes;
use vhost_migrate::unstable::stream::pages::PageEncoder;
use vhost_migrate::unstable::stream::record::{Commit, DataRuns, MemoryLayout, RoundEnd, ToDestination};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).ok_or("name the folder to write to")?;
    let write = |name: String, bytes: &[u8]| fs::write(Path::new(&folder).join(name), bytes);
    let header = ConnectionHeader::new(MigrationId(1));
    write("question".into(), &ConnectionHeader { outcome_query: true, ..header }.encode())?;
    write("unfinished".into(), &ConnectionHeader { one_way: true, ..header }.encode_unfinished())?;
    for (name, codec) in [("raw", Codec::None), ("zstd", Codec::Zstd(1))] {
        let stream = [&header.encode(), frames(codec)?.as_slice()].concat();
        write(name.into(), &stream)?;
        let mut reader = FrameReader::new(&stream[HEADER_BYTES..], CHANNEL);
        let mut body = Vec::new();
        while let Ok(frame) = reader.next_frame() {
            reader.body(&frame, &mut body)?;
            let kind = FrameKind::ALL.iter().position(|kind| *kind == frame.kind).ok_or("a kind that is not in ALL")?;
            write(format!("{name}-{}", frame.kind), &[&[kind as u8], body.as_slice()].concat())?;
        }
    }
    Ok(())
}

/// As in the target.
const CHANNEL: ChannelId = ChannelId { migration: MigrationId(1), channel: 0 };

/// A frame of every kind, pages for the memory that the target has.
fn frames(codec: Codec) -> Result<Vec<u8>, Box<dyn Error>> {
    let region = |gpa| -> Result<_, Box<dyn Error>> {
        let fd = sealed_memfd("seeds", 32 * LOG_PAGE)?;
        Ok(Arc::new(Region::map(fd.as_fd(), GuestAddress(gpa), 32 * LOG_PAGE, UserAddress(gpa), 0)?))
    };
    let memory = Memory::new([region(0)?, region(48 * LOG_PAGE)?])?;
    memory.write(GuestAddress(LOG_PAGE), &b"a page of text  ".repeat(256))?;
    let mut writer = FrameWriter::new(Vec::new(), CHANNEL);
    let to = &mut writer;
    ToDestination::Layout(MemoryLayout::from_memory(&memory)?).write(to)?;
    ToDestination::DataRuns(DataRuns::from_memory(&memory)).write(to)?;
    ToDestination::Devices(b"devices".into()).write(to)?;
    let sent = PageEncoder::new(codec)?.send(&memory, [1..3, 48..50].map(PageRange::from), to)?;
    send_hashes(&memory, [1..3, 48..50].map(PageRange::from), to)?;
    ToDestination::RoundEnd(RoundEnd::new(0, true, &sent)).write(to)?;
    ToDestination::State(b"state".into()).write(to)?;
    ToDestination::Commit(Commit { run: true }).write(to)?;
    ToDestination::Cancel { reason: "cancelled".into() }.write(to)?;
    ToSource::Accepted.write(to)?;
    ToSource::Ready.write(to)?;
    ToSource::Started(Started { observed_downtime_ns: Some(1), start_ns: 2 }).write(to)?;
    ToSource::Failed { message: "failed".into() }.write(to)?;
    ToSource::Held(Held { starting: false, message: "held".into() }).write(to)?;
    ToSource::Unknown.write(to)?;
    Ok(writer.into_inner())
}
