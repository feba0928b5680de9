//! Page batches: every page arrives unchanged for any memory, runs, codec and fragmentation; and any damage is an error
//! that leaves everything outside guest memory unchanged.
#![allow(clippy::unwrap_used, clippy::panic, clippy::single_range_in_vec_init)]

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};
use proptest::prelude::*;
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, PageRange, Region, UserAddress, sealed_memfd};
use vhost_migrate::stream::{Codec, FrameKind, MigrationId, PageStats, StreamError};
use vhost_migrate::unstable::stream::CopyingReader;
use vhost_migrate::unstable::stream::frame::{ChannelId, FRAME_HEADER_BYTES, FrameReader, FrameWriter};
use vhost_migrate::unstable::stream::pages::{
    CHUNK_PAGES, IncomingMemory, MAX_BATCH_PAGES, MAX_ENTRIES, PageBatch, PageDecoder, PageEncoder, channel_of,
    runs_of_channel,
};

const PAGE: usize = LOG_PAGE as usize;
const ID: ChannelId = ChannelId { migration: MigrationId(1), channel: 0 };

/// Memory with regions given as first page and number of pages.
fn memory(regions: &[(u64, u64)]) -> Memory {
    let regions = regions.iter().map(|&(first, pages)| {
        let fd = sealed_memfd("guest", pages * LOG_PAGE).unwrap();
        let (gpa, user_addr) = (GuestAddress(first * LOG_PAGE), UserAddress(first * LOG_PAGE));
        Arc::new(Region::map(fd.as_fd(), gpa, pages * LOG_PAGE, user_addr, 0).unwrap())
    });
    Memory::new(regions).unwrap()
}

/// Two adjacent regions, a hole, and one above 4 GiB.
fn guest() -> Memory {
    memory(&[(0, 300), (300, 212), ((4 << 30) / LOG_PAGE + 7, 512)])
}

fn all_pages(memory: &Memory) -> Vec<u64> {
    let pages = |r: &Arc<Region>| r.gpa().0 / LOG_PAGE..(r.gpa().0 + r.size()) / LOG_PAGE;
    memory.regions().iter().flat_map(pages).collect()
}

fn page(memory: &Memory, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    memory.read(GuestAddress(page * LOG_PAGE), &mut bytes).unwrap();
    bytes
}

/// Fills a page with one of the relevant contents: zero, only the last byte, text, noise.
fn fill(memory: &Memory, number: u64, how: u8) {
    let mut seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    };
    let bytes: Vec<u8> = match how % 4 {
        0 => vec![0; PAGE],
        1 => (0..PAGE).map(|n| u8::from(n == PAGE - 1)).collect(),
        2 => (0..PAGE).map(|n| b"page of text "[n % 13] ^ (number as u8)).collect(),
        _ => (0..PAGE).map(|_| noise()).collect(),
    };
    memory.write(GuestAddress(number * LOG_PAGE), &bytes).unwrap();
}

fn runs_of(pages: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

fn send(memory: &Memory, runs: Vec<Range<u64>>, codec: Codec) -> (Vec<u8>, PageStats) {
    let mut writer = FrameWriter::new(Vec::new(), ID);
    let stats =
        PageEncoder::new(codec).unwrap().send(memory, runs.into_iter().map(PageRange::from), &mut writer).unwrap();
    (writer.into_inner(), stats)
}

fn receive(target: &Arc<IncomingMemory>, from: impl Read) -> Result<PageStats, StreamError> {
    receive_on(target, from, 0, 1)
}

/// Reads page frames to the end of the stream.
fn receive_on(
    target: &Arc<IncomingMemory>,
    from: impl Read,
    channel: u16,
    channels: u16,
) -> Result<PageStats, StreamError> {
    let mut decoder = PageDecoder::new(target.clone(), channel, channels)?;
    let mut reader = FrameReader::new(CopyingReader(from), ID);
    let mut stats = PageStats::default();
    loop {
        match reader.next_frame() {
            Ok(header) => stats += decoder.receive(&header, &mut reader)?,
            Err(StreamError::Ended) => return Ok(stats),
            Err(error) => return Err(error),
        }
    }
}

/// A reader that returns a few bytes at a time.
struct ChunkedReader<'a> {
    bytes: &'a [u8],
    sizes: Vec<usize>,
    turn: usize,
}

impl Read for ChunkedReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.turn += 1;
        if self.turn.is_multiple_of(7) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let size = self.sizes[self.turn % self.sizes.len()].min(into.len());
        self.bytes.read(&mut into[..size])
    }
}

fn codec() -> impl Strategy<Value = Codec> {
    prop_oneof![Just(Codec::None), Just(Codec::Zstd(1)), Just(Codec::Zstd(-5))]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_sent_page_arrives_and_no_other_is_written(
        contents in prop::collection::vec(any::<u8>(), 1024),
        picks in prop::collection::vec((0usize..1024, 1usize..40), 0..60),
        sizes in prop::collection::vec(1usize..20_000, 1..8),
        codec in codec(),
        fresh in any::<bool>(),
    ) {
        let (source, destination) = (guest(), guest());
        let pages = all_pages(&source);
        for (&page, &how) in pages.iter().zip(&contents) {
            fill(&source, page, how);
        }
        let before = if fresh { vec![0; PAGE] } else { vec![0xee; PAGE] };
        for &page in pages.iter().filter(|_| !fresh) {
            destination.write(GuestAddress(page * LOG_PAGE), &before).unwrap();
        }
        let picked = |(at, count): &(usize, usize)| pages[*at..(at + count).min(pages.len())].to_vec();
        let set: BTreeSet<u64> = picks.iter().flat_map(picked).collect();
        let (wire, sent) = send(&source, runs_of(&set), codec);
        let target = Arc::new(if fresh { IncomingMemory::zeroed(destination) } else { IncomingMemory::dirty(destination) });
        let received = receive(&target, ChunkedReader { bytes: &wire, sizes, turn: 0 }).unwrap();
        for &number in &pages {
            let wanted = if set.contains(&number) { page(&source, number) } else { before.clone() };
            prop_assert!(page(target.memory(), number) == wanted, "page {number:#x}");
        }
        let zero = set.iter().filter(|number| page(&source, **number) == [0; PAGE]).count() as u64;
        prop_assert_eq!((sent.zero_pages, sent.pages()), (zero, set.len() as u64));
        prop_assert_eq!(sent.wire_bytes, wire.len() as u64);
        prop_assert_eq!(received, sent);
    }

    #[test]
    fn every_page_belongs_to_exactly_one_channel(
        starts in prop::collection::btree_map(0u64..5000, 1u64..1500, 0..12),
        channels in 1u16..9,
    ) {
        let mut end = 0;
        let mut runs = Vec::new();
        for (start, length) in starts {
            let start = start.max(end);
            end = start + length;
            runs.push(start..end);
        }
        let mut seen = BTreeSet::new();
        for channel in 0..channels {
            for run in runs_of_channel(runs.iter().cloned().map(PageRange::from), channel, channels) {
                for page in run.iter() {
                    prop_assert_eq!(channel_of(page, channels), channel);
                    prop_assert!(seen.insert(page));
                }
            }
        }
        prop_assert_eq!(seen, runs.into_iter().flatten().map(PageNumber).collect::<BTreeSet<_>>());
    }

    #[test]
    fn random_bytes_yield_an_error_and_never_a_panic(noise in prop::collection::vec(any::<u8>(), 0..5000)) {
        let target = Arc::new(IncomingMemory::zeroed(memory(&[(0, 16)])));
        prop_assert!(receive(&target, noise.as_slice()).is_err() || noise.is_empty());
        // A valid frame and a plausible head reach the table parser.
        let mut body = noise;
        if let Some(head) = body.first_chunk_mut() {
            *head = [head[0] % 9, 0, 0, 0, head[4] % 2, 0, 0, 0];
        }
        let mut writer = FrameWriter::new(Vec::new(), ID);
        writer.write(FrameKind::Pages, [&body, &[]]).unwrap();
        prop_assert!(receive(&target, writer.into_inner().as_slice()).is_err());
        prop_assert!(PageBatch::parse(&body).is_err());
    }
}

/// A stream of a few frames with data, zeros and both, small enough to damage it everywhere.
fn sample(codec: Codec) -> (Vec<u8>, Arc<IncomingMemory>) {
    let source = memory(&[(16, 12)]);
    for (number, how) in (16..28).zip([2, 0, 0, 2, 1, 0, 3, 2, 0, 2, 2, 0]) {
        fill(&source, number, how);
    }
    let mut writer = FrameWriter::new(Vec::new(), ID);
    let mut encoder = PageEncoder::new(codec).unwrap();
    for run in [16..19, 20..28, 17..18] {
        encoder.send(&source, [run.into()], &mut writer).unwrap();
    }
    (writer.into_inner(), Arc::new(IncomingMemory::zeroed(memory(&[(16, 12)]))))
}

#[test]
fn every_truncated_stream_is_an_error() {
    for codec in [Codec::None, Codec::Zstd(1)] {
        let (wire, target) = sample(codec);
        let whole = receive(&target, wire.as_slice()).unwrap();
        assert_eq!(whole.batches, 3);
        let mut at_a_border = 0;
        for length in 1..wire.len() {
            match receive(&target, &wire[..length]) {
                Err(StreamError::Truncated(_)) => {}
                // An end between two frames is detected by the handshake.
                Ok(part) if part.batches < whole.batches => at_a_border += 1,
                other => panic!("{codec} {length}: {other:?}"),
            }
        }
        assert_eq!(at_a_border, 2);
    }
}

#[test]
fn every_flipped_bit_is_an_error() {
    for codec in [Codec::None, Codec::Zstd(1)] {
        let (mut wire, target) = sample(codec);
        for at in 0..wire.len() {
            // Every bit of the first headers and tables, one of each byte of the rest.
            let bits = if at < 200 { 0..8 } else { at % 8..at % 8 + 1 };
            for bit in bits {
                wire[at] ^= 1 << bit;
                assert!(receive(&target, wire.as_slice()).is_err(), "{codec}: byte {at} bit {bit}");
                wire[at] ^= 1 << bit;
            }
        }
        receive(&target, wire.as_slice()).unwrap();
    }
}

fn frame(table: &[u64], codec: u8, data: &[u8]) -> Vec<u8> {
    let mut body = (table.len() as u32).to_le_bytes().to_vec();
    body.extend([codec, 0, 0, 0]);
    table.iter().for_each(|entry| body.extend(entry.to_le_bytes()));
    let mut writer = FrameWriter::new(Vec::new(), ID);
    writer.write(FrameKind::Pages, [&body, data]).unwrap();
    writer.into_inner()
}

fn entry(first: u64, count: u64, kind: u64) -> u64 {
    first | (count - 1) << 40 | kind << 62
}

#[test]
fn pages_outside_memory_are_refused_before_anything_is_written() {
    let target = Arc::new(IncomingMemory::dirty(memory(&[(16, 16), (64, 16)])));
    let last = (1 << 40) - 1;
    for (first, count) in [(0, 1), (15, 2), (31, 2), (32, 1), (63, 1), (79, 2), (last, 1), (last, 1 << 22)] {
        for kind in [0, 1] {
            let count = if kind == 0 { count.min(255) } else { count };
            let pages = if kind == 0 { count as usize + 1 } else { 1 };
            let wire = frame(&[entry(16, 1, 0), entry(first, count, kind)], 0, &vec![0xaa; pages * PAGE]);
            let result = receive(&target, wire.as_slice());
            assert!(matches!(result, Err(StreamError::OutsideMemory { .. })), "{first:#x}+{count} {kind}: {result:?}");
        }
    }
    assert_eq!(page(target.memory(), 16), [0; PAGE], "written although the batch was refused");
    let data = vec![0xaa; 2 * PAGE];
    receive(&target, frame(&[entry(30, 2, 0)], 0, &data).as_slice()).unwrap();
    assert_eq!(page(target.memory(), 31), data[..PAGE]);
}

#[test]
fn malformed_tables_are_refused() {
    let target = Arc::new(IncomingMemory::zeroed(memory(&[(0, 1024)])));
    let good = vec![1; PAGE];
    let packed = |length| zstd::bulk::compress(&vec![3; length], 1).unwrap();
    let cases = [
        ("no entry", frame(&[], 0, &good)),
        ("unknown kind 2", frame(&[entry(0, 1, 2)], 0, &good)),
        ("unknown kind 3", frame(&[entry(0, 1, 3)], 0, &good)),
        ("unknown codec", frame(&[entry(0, 1, 0)], 2, &good)),
        ("too little data", frame(&[entry(0, 2, 0)], 0, &good)),
        ("too much data", frame(&[entry(0, 1, 1)], 0, &good)),
        ("too many data pages", frame(&[entry(0, MAX_BATCH_PAGES + 1, 0)], 1, &good)),
        ("zstd without data", frame(&[entry(0, 1, 1)], 1, &[])),
        ("not zstd", frame(&[entry(0, 1, 0)], 1, b"not zstd")),
        ("decompresses to more", frame(&[entry(0, 1, 0)], 1, &packed(2 * PAGE))),
        ("decompresses to less", frame(&[entry(0, 2, 0)], 1, &packed(PAGE))),
        ("zstd longer than raw", frame(&[entry(0, 1, 0)], 1, &good)),
        ("more entries than allowed", frame(&vec![entry(0, 1, 1); MAX_ENTRIES + 1], 0, &[])),
    ];
    for (what, wire) in cases {
        let result = receive(&target, wire.as_slice());
        let refused = matches!(result, Err(StreamError::Malformed { .. } | StreamError::Codec { .. }));
        assert!(refused, "{what}: {result:?}");
    }
    receive(&target, frame(&[entry(0, 1, 0)], 0, &good).as_slice()).unwrap();
    receive(&target, frame(&[entry(0, 2, 0)], 1, &packed(2 * PAGE)).as_slice()).unwrap();
}

#[test]
fn a_page_of_another_channel_is_refused() {
    let target = Arc::new(IncomingMemory::zeroed(memory(&[(0, 1024)])));
    let wire = frame(&[entry(CHUNK_PAGES, 1, 0)], 0, &[1; PAGE]);
    assert!(matches!(receive_on(&target, wire.as_slice(), 0, 2), Err(StreamError::Malformed { .. })));
    receive_on(&target, wire.as_slice(), 1, 2).unwrap();
    let wire = frame(&[entry(0, 2 * CHUNK_PAGES + 1, 1)], 0, &[]);
    assert!(matches!(receive_on(&target, wire.as_slice(), 0, 2), Err(StreamError::Malformed { .. })));
    receive_on(&target, wire.as_slice(), 0, 1).unwrap();
}

#[test]
fn a_received_page_that_is_sent_as_zero_becomes_zero() {
    for target in [IncomingMemory::zeroed(memory(&[(3, 200)])), IncomingMemory::dirty(memory(&[(3, 200)]))] {
        let target = Arc::new(target);
        let source = memory(&[(3, 200)]);
        for number in 3..203 {
            fill(&source, number, 3);
        }
        let (first, _) = send(&source, vec![3..203], Codec::None);
        receive(&target, first.as_slice()).unwrap();
        for number in 50..150 {
            fill(&source, number, 0);
        }
        let (second, _) = send(&source, vec![40..160], Codec::Zstd(1));
        receive(&target, second.as_slice()).unwrap();
        for number in 3..203 {
            assert!(page(target.memory(), number) == page(&source, number), "page {number}");
        }
    }
}

#[test]
fn a_zero_page_of_zeroed_memory_is_not_touched() {
    // A write would allocate a page of the memfd.
    let fd = sealed_memfd("guest", 1 << 20).unwrap();
    let region = Region::map(fd.as_fd(), GuestAddress(0), 1 << 20, UserAddress(0), 0).unwrap();
    let target = Arc::new(IncomingMemory::zeroed(Memory::new([Arc::new(region)]).unwrap()));
    let (wire, sent) = send(&memory(&[(0, 256)]), vec![0..256], Codec::None);
    receive(&target, wire.as_slice()).unwrap();
    assert_eq!((sent.zero_pages, sent.data_pages, sent.batches), (256, 0, 1));
    assert_eq!(wire.len(), FRAME_HEADER_BYTES + 16);
    assert_eq!(nix::sys::stat::fstat(&fd).unwrap().st_blocks, 0);
    receive(&target, frame(&[entry(7, 1, 0)], 0, &[1; PAGE]).as_slice()).unwrap();
    assert_ne!(nix::sys::stat::fstat(&fd).unwrap().st_blocks, 0);
}

#[test]
fn a_hole_is_sent_as_zero_and_not_allocated() {
    const PAGES: u64 = 5 * CHUNK_PAGES;
    let discard = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for channels in [1, 2] {
        let files = ["source", "destination"].map(|name| sealed_memfd(name, PAGES * LOG_PAGE).unwrap());
        let [source, destination] = files.each_ref().map(|fd| {
            let region = Region::share(fd.try_clone().unwrap(), GuestAddress(0), PAGES * LOG_PAGE, 0).unwrap();
            Memory::new([Arc::new(region)]).unwrap()
        });
        let taken = || files.each_ref().map(|fd| nix::sys::stat::fstat(fd).unwrap().st_blocks / 8);
        let target = Arc::new(IncomingMemory::zeroed(destination));
        let round = |runs: &[Range<u64>]| {
            (0..channels).fold(PageStats::default(), |mut all, channel| {
                let runs = runs.iter().cloned().map(PageRange::from);
                let runs = runs_of_channel(runs, channel, channels).map(PageRange::numbers).collect();
                let (wire, sent) = send(&source, runs, Codec::None);
                assert_eq!(receive_on(&target, wire.as_slice(), channel, channels).unwrap(), sent);
                all += sent;
                all
            })
        };
        let used = [0, 3, CHUNK_PAGES - 1, CHUNK_PAGES, 4 * CHUNK_PAGES + 9];
        used.iter().for_each(|&page| fill(&source, page, 3));
        let sent = round(&[0..PAGES]);
        assert_eq!((sent.data_pages, sent.zero_pages), (5, PAGES - 5));
        assert_eq!(taken(), [5, 5], "pages in use here and there");
        // Sent again: a page that was discarded, one that was filled, and a hole.
        fallocate(&files[0], discard, 3 * 4096, 4096).unwrap();
        fill(&source, 100, 3);
        let sent = round(&[3..4, 100..102]);
        assert_eq!((sent.data_pages, sent.zero_pages), (1, 2));
        assert_eq!(taken(), [5, 6], "it is written with zeros where it was");
        let pages: Vec<u64> = (0..PAGES).collect();
        assert!(pages.into_iter().all(|number| page(&source, number) == page(target.memory(), number)));
    }
}

#[test]
fn pages_outside_memory_are_counted_and_the_rest_is_sent() {
    let source = memory(&[(16, 16), (64, 16)]);
    let (wire, sent) = send(&source, vec![0..20, 30..70, 90..95], Codec::None);
    assert_eq!((sent.pages(), sent.outside_memory), (4 + 2 + 6, 16 + 32 + 5));
    let target = Arc::new(IncomingMemory::zeroed(memory(&[(16, 16), (64, 16)])));
    assert_eq!(receive(&target, wire.as_slice()).unwrap().pages(), 12);
}

#[test]
fn alternating_pages_arrive_in_several_batches() {
    let pages = 3 * MAX_ENTRIES as u64;
    let source = memory(&[(0, pages)]);
    for number in (0..pages).step_by(94) {
        fill(&source, number, 3);
    }
    let every_other = (0..pages).step_by(2).map(|page| page..page + 1).collect();
    let (wire, sent) = send(&source, every_other, Codec::None);
    assert!(sent.batches >= 2);
    let target = Arc::new(IncomingMemory::zeroed(memory(&[(0, pages)])));
    let received = receive(&target, wire.as_slice()).unwrap();
    assert_eq!((received.data_pages, received.zero_pages), (66, pages / 2 - 66));
    for number in (0..pages).step_by(2) {
        assert!(page(target.memory(), number) == page(&source, number), "page {number}");
    }
}

#[test]
fn the_zero_test_uses_the_bytes_that_are_sent() {
    // A writer flips one word between zero and non-zero. A page tested by one read and sent by another would be sent as
    // data and be zero.
    let source = memory(&[(0, 1)]);
    let target = Arc::new(IncomingMemory::zeroed(memory(&[(0, 1)])));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                source.write(GuestAddress(4000), &[0; 8]).unwrap();
                source.write(GuestAddress(4000), &[7; 8]).unwrap();
            }
        });
        for _ in 0..5000 {
            let (wire, sent) = send(&source, vec![0..1], Codec::None);
            receive(&target, wire.as_slice()).unwrap();
            let zero = page(target.memory(), 0).iter().all(|byte| *byte == 0);
            if zero != (sent.zero_pages == 1) {
                stop.store(true, Ordering::Relaxed);
                panic!("told as zero: {}, is zero: {zero}", sent.zero_pages);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(send(&source, vec![0..1], Codec::None).1.data_pages, 1);
}

/// Returns the anonymous memory of this process, KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A source announces any amount of memory in 50 bytes. The cost is bounded before pages arrive, also if all of them
/// arrive as zero.
#[test]
fn memory_without_pages_costs_almost_nothing() {
    const GIB: u64 = (1 << 30) / LOG_PAGE;
    let vast = || memory(&[(0, 16 << 10 << 30 >> 12)]);
    let (wire, sent) = send(&vast(), (0..16 << 10).map(|gib| gib * GIB..gib * GIB + 1).collect(), Codec::None);
    assert_eq!(sent.zero_pages, 16 << 10);
    let before = anonymous_kib();
    let target = Arc::new(IncomingMemory::zeroed(vast()));
    receive(&target, wire.as_slice()).unwrap();
    let grown = anonymous_kib().saturating_sub(before);
    // A complete bitmap would have 512 MiB.
    assert!(grown < 128 << 10, "{grown} KiB");
}
