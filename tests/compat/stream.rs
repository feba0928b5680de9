//! Saved streams: connection header, frames of every kind that a file has, pages of both codecs.

use std::sync::Arc;

use vhost_migrate::dirty::Log;
use vhost_migrate::dirty::{DirtySource, LogSource};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region};
use vhost_migrate::migrate::{IncomingVm, Outcomes, RegionLayout, SourceVm, VmError, migrate, receive};
use vhost_migrate::stream::{self, CancelToken, Codec, StreamListener, StreamOptions, Uri};

use crate::{path, read};

const NONE: &str = "stream-2-none";
const ZSTD: &str = "stream-2-zstd";
const HIGH: GuestAddress = GuestAddress(4 << 30);
const PAGES: u64 = 6;
const STATE: &[u8] = b"state of a guest";

/// Memory of two regions. Every second page is zero.
fn memory(regions: impl IntoIterator<Item = (GuestAddress, u64)>) -> Memory {
    let share = |(gpa, size)| Arc::new(Region::create(gpa, size).unwrap());
    Memory::new(regions.into_iter().map(share)).unwrap()
}

/// Contents of the page at `gpa`.
fn page(GuestAddress(gpa): GuestAddress) -> Vec<u8> {
    match gpa / LOG_PAGE % 2 {
        0 => format!("page at {gpa:#x} ").bytes().cycle().take(LOG_PAGE as usize).collect(),
        _ => vec![0; LOG_PAGE as usize],
    }
}

fn pages() -> impl Iterator<Item = GuestAddress> {
    [GuestAddress(0), HIGH].into_iter().flat_map(|base| (0..PAGES).map(move |page| base.unchecked_add(page * LOG_PAGE)))
}

/// A guest that does nothing.
struct IdleVm(Memory);

impl SourceVm for IdleVm {
    fn memory(&self) -> Memory {
        self.0.clone()
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        Ok(Box::new(LogSource::new("nothing", Arc::new(Log::create(self.0.end())?.0))))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(STATE.to_vec())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn release(&mut self) {}
}

#[derive(Default)]
struct RestoredVm {
    memory: Memory,
    state: Vec<u8>,
    started: bool,
}

impl IncomingVm for RestoredVm {
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        self.memory = memory(regions.iter().map(|region| (region.gpa, region.size)));
        Ok(self.memory.clone())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.state = state.to_vec();
        Ok(())
    }

    fn start(&mut self, run: bool, _: &CancelToken) -> Result<Option<u64>, VmError> {
        self.started = run;
        Ok(None)
    }
}

fn uri(name: &str) -> Uri {
    format!("file:{}", path(name).display()).parse().unwrap()
}

#[test]
fn saved_streams_are_restored() {
    for name in [NONE, ZSTD] {
        let options = StreamOptions::new().unwrap();
        let connection = StreamListener::bind(&uri(name)).unwrap().accept(&options).unwrap();
        let mut vm = RestoredVm::default();
        let limit = std::time::Duration::from_secs(60);
        receive(&mut vm, connection, &Outcomes::default(), limit).unwrap();
        assert!(vm.started && vm.state == STATE, "{name}");
        for gpa in pages() {
            let mut found = vec![0; LOG_PAGE as usize];
            vm.memory.read(gpa, &mut found).unwrap();
            assert!(found == page(gpa), "{name}: page at {:#x}", gpa.0);
        }
        assert_eq!(vm.memory.size(), 2 * PAGES * LOG_PAGE);
    }
}

#[test]
fn every_kind_of_frame_of_a_file_is_in_the_files() {
    use vhost_migrate::stream::FrameKind;
    use vhost_migrate::unstable::stream::frame::{ChannelId, ConnectionHeader, FrameReader};
    let mut kinds = Vec::new();
    for name in [NONE, ZSTD] {
        let bytes = read(name);
        let mut bytes = bytes.as_slice();
        let header = ConnectionHeader::read(&mut bytes).unwrap();
        let mut reader = FrameReader::new(bytes, ChannelId { migration: header.id, channel: 0 });
        while let Ok(frame) = reader.next_frame() {
            reader.body(&frame, &mut Vec::new()).unwrap();
            kinds.push(frame.kind);
        }
    }
    for kind in [FrameKind::Layout, FrameKind::Pages, FrameKind::RoundEnd, FrameKind::State, FrameKind::Commit] {
        assert!(kinds.contains(&kind), "{kind:?}");
    }
}

#[test]
#[ignore = "writes the files"]
fn write_files() {
    for (name, codec) in [(NONE, Codec::None), (ZSTD, Codec::Zstd(1))] {
        if path(name).exists() {
            continue;
        }
        let size = PAGES * LOG_PAGE;
        let mut vm = IdleVm(memory([(GuestAddress(0), size), (HIGH, size)]));
        pages().for_each(|gpa| vm.0.write(gpa, &page(gpa)).unwrap());
        let options = StreamOptions::new().unwrap();
        let connection = stream::connect(&uri(name), &options).unwrap();
        let parameters = crate::stream::parameters(codec);
        migrate(&mut vm, connection, &parameters, &mut |_| {}).unwrap();
    }
}

fn parameters(codec: Codec) -> vhost_migrate::migrate::MigrationParameters {
    use std::time::Duration;
    use vhost_migrate::migrate::{ConvergencePolicy, MigrationParameters};
    MigrationParameters::default()
        .with_policy(ConvergencePolicy::new(Duration::from_secs(60), 10))
        .with_codec(codec)
        .with_outcome_query_timeout(Duration::from_secs(60))
}
