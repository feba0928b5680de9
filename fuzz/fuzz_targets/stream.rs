//! Parsers of a peer's stream: connection header, frames, records and page batches. No input may panic, write outside
//! guest memory (checked by AddressSanitizer) or allocate more than the limits.
//!
//! Frame hashes would block a fuzzer, so the input is also used as bodies of valid frames.
#![no_main]

use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use vhost_migrate::memory::{GuestAddress, Memory, Region, UserAddress, sealed_memfd};
use vhost_migrate::stream::{FrameKind, MigrationId, ToSource};
use vhost_migrate::unstable::stream::frame::{ChannelId, ConnectionHeader, FrameReader, FrameWriter};
use vhost_migrate::unstable::stream::pages::{IncomingMemory, PageBatch, PageDecoder};
use vhost_migrate::unstable::stream::record::ToDestination;

const ID: ChannelId = ChannelId { migration: MigrationId(1), channel: 0 };

fuzz_target!(|input: &[u8]| {
    read(input);
    let Some((&first, body)) = input.split_first() else { return };
    let kind = FrameKind::ALL[usize::from(first) % FrameKind::ALL.len()];
    // Two of ten inputs are pages, because they are written to memory.
    let kind = if first >= 128 { FrameKind::Pages } else { kind };
    let mut writer = FrameWriter::new(Vec::new(), ID);
    if writer.write(kind, [body, &[]]).is_ok() {
        read_frames(&writer.into_inner());
    }
    let _ = PageBatch::parse(body);
});

fn read(mut stream: &[u8]) {
    if ConnectionHeader::read(&mut stream).is_ok() {
        read_frames(stream);
    }
    read_frames(stream);
}

fn read_frames(stream: &[u8]) {
    let mut decoder = PageDecoder::new(memory().clone(), 0, 1).expect("codecs can be set up");
    let mut reader = FrameReader::new(stream, ID);
    while let Ok(header) = reader.next_frame() {
        let good = match header.kind {
            FrameKind::Pages => decoder.receive(&header, &mut reader).is_ok(),
            FrameKind::Hashes => decoder.compare(&header, &mut reader).is_ok(),
            kind if (kind as u16) < 0x80 => ToDestination::read(&header, &mut reader).is_ok(),
            _ => ToSource::read(&header, &mut reader).is_ok(),
        };
        if !good {
            break;
        }
    }
}

/// Two small regions and a hole, made once.
fn memory() -> &'static Arc<IncomingMemory> {
    static MEMORY: OnceLock<Arc<IncomingMemory>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let fd = sealed_memfd("fuzz", 64 << 12).expect("a memfd");
        let region = |start, offset| {
            let region = Region::map(fd.as_fd(), GuestAddress(start), 32 << 12, UserAddress(start), offset);
            Arc::new(region.expect("a mapping"))
        };
        let memory = Memory::new([region(0, 0), region(48 << 12, 32 << 12)]).expect("regions apart");
        Arc::new(IncomingMemory::dirty(memory))
    })
}
