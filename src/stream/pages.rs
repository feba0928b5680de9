//! Page batches: encodes guest memory and decodes it. The caller decides which pages to send and on which thread.
//!
//! The encoder reads each page once, into the batch, and tests that copy for zero. The guest may write the page
//! meanwhile; a second read could see other data, and the page could be lost as zero. A write after the read sets the
//! page's bit in the dirty log, and the page is sent again. Holes, memory that was never used, are sent as zero and not
//! read, because a read would allocate them. The decoder reads uncompressed pages directly from the socket into guest
//! memory. A checksum mismatch then fails the migration, while the source still has the guest.
//!
//! Each channel sends its own chunks of 1 MiB:
//!
//! ```
//! use vhost_migrate::memory::{PageNumber, PageRange};
//! use vhost_migrate::unstable::stream::pages::{channel_of, runs_of_channel};
//!
//! let dirty = [PageRange::from(100..600)];
//! let second: Vec<_> = runs_of_channel(dirty, 1, 2).collect();
//! assert_eq!(second, [PageRange::from(256..512)]);
//! assert_eq!(channel_of(PageNumber(300), 2), 1);
//! ```
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::codec::{Compressor, Decompressor};
use super::data_bitmap::DataBitmap;
use super::frame::{FrameBody, FrameHeader, FrameKind, FrameReader, FrameWriter};
use super::sys::{ReadMemory, ReceiveWindow, copy_page};
use super::{Codec, StreamError};
use crate::memory::{Address, ExtentFinder, LOG_PAGE, Memory, PageNumber, PageRange, Region};

/// Number of consecutive pages that belong to one channel: 1 MiB.
pub const CHUNK_PAGES: u64 = 256;
/// Maximum number of data pages in one batch: 1 MiB.
pub const MAX_BATCH_PAGES: u64 = 256;
/// Maximum number of entries in a batch's table.
pub const MAX_ENTRIES: usize = 2048;
const _: () = assert!(
    FrameKind::Pages.limit() as usize == HEAD_BYTES + MAX_ENTRIES * ENTRY_BYTES + MAX_BATCH_PAGES as usize * PAGE_BYTES
);

pub(super) const PAGE_BYTES: usize = LOG_PAGE as usize;
/// Page data of a sent batch, bytes: small enough to stay in the cache until it is written.
const BATCH_BYTES: usize = 256 << 10;
const HEAD_BYTES: usize = 8;
pub(super) const ENTRY_BYTES: usize = 8;
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// Returns the channel of `page`. It is the same for the whole migration, so that a later version of a page cannot
/// overtake an earlier one.
pub fn channel_of(page: PageNumber, channels: u16) -> u16 {
    (page.0 / CHUNK_PAGES % u64::from(channels.max(1))) as u16
}

/// Returns the parts of `runs` that belong to `channel`.
pub fn runs_of_channel(
    runs: impl IntoIterator<Item = PageRange>,
    channel: u16,
    channels: u16,
) -> impl Iterator<Item = PageRange> {
    let stride = u64::from(channels.max(1));
    runs.into_iter().flat_map(move |run| {
        let single = (stride == 1).then_some(run);
        // First chunk of this channel that does not end before the run.
        let chunk = run.start.0 / CHUNK_PAGES;
        let ours = chunk + (u64::from(channel) + stride - chunk % stride) % stride;
        let many = (stride > 1).then_some((ours..).step_by(stride as usize));
        let pieces = many.into_iter().flatten().map(move |chunk| {
            let start = chunk * CHUNK_PAGES;
            run.intersection((start..start + CHUNK_PAGES).into())
        });
        single.into_iter().chain(pieces.take_while(|piece| !piece.is_empty()))
    })
}

/// Numbers of pages and bytes that were sent or received.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PageStats {
    /// Pages with data.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Requested pages outside guest memory. They are not sent; a device may mark them in its log (rule L6.1).
    pub outside_memory: u64,
    /// Frames.
    pub batches: u64,
    /// Bytes on the wire, frame headers included.
    pub wire_bytes: u64,
}

impl PageStats {
    /// Number of data and zero pages.
    pub fn pages(&self) -> u64 {
        self.data_pages + self.zero_pages
    }
}

impl AddAssign for PageStats {
    fn add_assign(&mut self, other: PageStats) {
        self.data_pages += other.data_pages;
        self.zero_pages += other.zero_pages;
        self.outside_memory += other.outside_memory;
        self.batches += other.batches;
        self.wire_bytes += other.wire_bytes;
    }
}

/// Encodes pages into frames for one channel. Its buffers take about 256 KiB, 512 KiB with a codec.
pub struct PageEncoder {
    compressor: Compressor,
    data: Vec<u8>,
    used: usize,
    entries: Vec<PageRun>,
    table: Vec<u8>,
    progress: Arc<AtomicU64>,
    /// Time spent on compression so far.
    coding: Duration,
}

impl PageEncoder {
    /// An encoder with empty buffers.
    ///
    /// # Errors
    /// When the codec can't be set up.
    pub fn new(codec: Codec) -> Result<PageEncoder, StreamError> {
        Ok(PageEncoder {
            compressor: Compressor::new(codec, BATCH_BYTES)?,
            data: vec![0; BATCH_BYTES],
            used: 0,
            entries: Vec::with_capacity(MAX_ENTRIES),
            table: Vec::with_capacity(HEAD_BYTES + MAX_ENTRIES * ENTRY_BYTES),
            progress: Arc::default(),
            coding: Duration::ZERO,
        })
    }

    /// The time that compressing has taken so far.
    pub fn compression_time(&self) -> Duration {
        self.coding
    }

    /// Returns the counter of sent pages, which other threads may read during a round.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.progress.clone()
    }

    /// Reads the pages of `runs`, which may have any order, from `memory` and writes them to `to` in complete batches.
    /// The guest may write the memory meanwhile.
    ///
    /// # Errors
    /// Errors of the transport. It is unknown which pages were sent then: all of `runs` must be put back (rule L14.1).
    pub fn send<W: Write>(
        &mut self,
        memory: &Memory,
        runs: impl IntoIterator<Item = PageRange>,
        to: &mut FrameWriter<W>,
    ) -> Result<PageStats, StreamError> {
        self.clear();
        let mut stats = PageStats::default();
        let mut extents = ExtentFinder::new();
        for run in runs {
            let mut inside = 0;
            for (region, mut pages) in regions_of_run(memory, run) {
                inside += pages.count();
                while !pages.is_empty() {
                    let (part, hole) = extents.first(region, pages);
                    pages.start = part.end;
                    if hole {
                        self.add_hole(part, to, &mut stats)?;
                    } else {
                        self.add(region, part, to, &mut stats)?;
                    }
                }
            }
            stats.outside_memory += run.count().saturating_sub(inside);
        }
        self.flush(to, &mut stats)?;
        Ok(stats)
    }

    fn add<W: Write>(
        &mut self,
        region: &Region,
        pages: PageRange,
        to: &mut FrameWriter<W>,
        stats: &mut PageStats,
    ) -> Result<(), StreamError> {
        let start = pages.address().unchecked_offset_from(region.gpa());
        let slice = region.slice(start, pages.bytes()).ok_or_else(|| outside(pages))?;
        let mut offset = 0;
        for page in pages.iter() {
            if self.used == BATCH_BYTES || self.entries.len() == MAX_ENTRIES {
                self.flush(to, stats)?;
            }
            let from = slice.subslice(offset, PAGE_BYTES).map_err(|_| outside(pages))?;
            offset += PAGE_BYTES;
            let Some(slot) = self.data.get_mut(self.used..).and_then(|free| free.first_chunk_mut()) else {
                continue;
            };
            let zero = copy_page(&from, slot, page.0 + 1 < pages.end.0);
            if !zero {
                self.used += PAGE_BYTES;
            }
            push_page(&mut self.entries, page, zero);
        }
        Ok(())
    }

    /// Adds `pages` as zero without reading them.
    fn add_hole<W: Write>(
        &mut self,
        mut pages: PageRange,
        to: &mut FrameWriter<W>,
        stats: &mut PageStats,
    ) -> Result<(), StreamError> {
        while !pages.is_empty() {
            if self.entries.len() == MAX_ENTRIES {
                self.flush(to, stats)?;
            }
            let end = pages.end.min(PageNumber(pages.start.0 + PageRun::MAX_COUNT));
            self.entries.push(PageRun { pages: PageRange { end, ..pages }, zero: true });
            pages.start = end;
        }
        Ok(())
    }

    fn flush<W: Write>(&mut self, to: &mut FrameWriter<W>, stats: &mut PageStats) -> Result<(), StreamError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let raw = self.data.get(..self.used).unwrap_or_default();
        let begun = self.compressor.is_enabled().then(Instant::now);
        let (codec, data) = match self.compressor.compress(raw) {
            Some(packed) => (CODEC_ZSTD, packed),
            None => (CODEC_RAW, raw),
        };
        self.coding += begun.map(|begun| begun.elapsed()).unwrap_or_default();
        self.table.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        self.table.extend_from_slice(&[codec, 0, 0, 0]);
        let (mut pages, mut zero_pages) = (0, 0);
        for entry in &self.entries {
            self.table.extend_from_slice(&entry.encode().to_le_bytes());
            pages += entry.count();
            zero_pages += if entry.zero { entry.count() } else { 0 };
        }
        stats.wire_bytes += to.write(FrameKind::Pages, [&self.table, data])?;
        stats.batches += 1;
        stats.zero_pages += zero_pages;
        stats.data_pages += pages - zero_pages;
        self.progress.fetch_add(pages, Ordering::Relaxed);
        self.clear();
        Ok(())
    }

    fn clear(&mut self) {
        self.used = 0;
        self.entries.clear();
        self.table.clear();
    }
}

/// Guest memory at the destination, shared by the decoders of all channels.
pub struct IncomingMemory {
    memory: Memory,
    /// For each region: its pages, and a bit for each page that may hold data.
    regions: Vec<(PageRange, DataBitmap)>,
}

impl IncomingMemory {
    /// Creates it from zeroed memory, such as a new memfd. Pages received only as zero are never touched.
    pub fn zeroed(memory: Memory) -> IncomingMemory {
        IncomingMemory::new(memory, 0)
    }

    /// Creates it from memory with any contents.
    pub fn dirty(memory: Memory) -> IncomingMemory {
        IncomingMemory::new(memory, u64::MAX)
    }

    /// The memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Returns true if `page` may hold data other than zeros.
    pub fn has_data(&self, page: PageNumber) -> bool {
        let mut data = false;
        let pages = (page.0..page.0.saturating_add(1)).into();
        self.for_each_word(pages, DataBitmap::allocated_word, |word, mask, _| {
            data = word.load(Ordering::Relaxed) & mask != 0
        });
        data
    }

    fn new(memory: Memory, bits: u64) -> IncomingMemory {
        let regions = memory.regions().iter().map(|region| {
            let pages = region.pages();
            (pages, DataBitmap::new(pages.count().div_ceil(64), bits))
        });
        let regions = regions.collect();
        IncomingMemory { memory, regions }
    }

    /// Returns true if all of `pages` are in memory.
    fn contains(&self, pages: PageRange) -> bool {
        let mut next = pages.start;
        while next < pages.end {
            match self.region(next) {
                Some((region, _)) => next = region.end,
                None => return false,
            }
        }
        true
    }

    fn region(&self, page: PageNumber) -> Option<&(PageRange, DataBitmap)> {
        let index = self.regions.partition_point(|(pages, _)| pages.end <= page);
        self.regions.get(index).filter(|(pages, _)| pages.contains(page))
    }

    /// Calls `each` with every bitmap word of `pages` that `find` returns, the mask of the pages' bits in it, and the
    /// page of its bit 0.
    fn for_each_word<'a>(
        &'a self,
        pages: PageRange,
        find: impl Fn(&'a DataBitmap, u64) -> Option<&'a AtomicU64>,
        mut each: impl FnMut(&AtomicU64, u64, u64),
    ) {
        let mut page = pages.start;
        while page < pages.end {
            let Some((region, words)) = self.region(page) else { return };
            let bit = page.0 - region.start.0;
            let first = page.0 - bit % 64;
            let end = pages.end.min(region.end).min(PageNumber(first + 64));
            let mask = (u64::MAX >> (64 - (end.0 - page.0))) << (bit % 64);
            if let Some(word) = find(words, bit / 64) {
                each(word, mask, first);
            }
            page = end;
        }
    }

    /// Notes that `pages` may hold something else than zeros from now on.
    pub(crate) fn mark_data(&self, pages: PageRange) {
        self.for_each_word(pages, DataBitmap::word_or_allocate, |word, mask, _| {
            word.fetch_or(mask, Ordering::Relaxed);
        });
    }

    fn clear(&self, pages: PageRange) -> Result<(), StreamError> {
        let mut result = Ok(());
        self.for_each_word(pages, DataBitmap::allocated_word, |word, mask, first| {
            // Relaxed: only this page's channel reads its bit.
            let mut dirty = word.load(Ordering::Relaxed) & mask;
            if dirty == 0 || result.is_err() {
                return;
            }
            word.fetch_and(!dirty, Ordering::Relaxed);
            while dirty != 0 && result.is_ok() {
                let page = PageNumber(first + u64::from(dirty.trailing_zeros()));
                result = self.memory.write(page.address(), &[0; PAGE_BYTES]);
                dirty &= dirty - 1;
            }
        });
        Ok(result?)
    }
}

/// Decodes the page frames of one channel into guest memory. Its buffers take up to 2 MiB with a codec.
pub struct PageDecoder {
    memory: Arc<IncomingMemory>,
    channel: u16,
    channels: u16,
    decompressor: Decompressor,
    buffer: Vec<u8>,
}

impl PageDecoder {
    /// Creates a decoder for channel `channel` of `channels`. Pages of other channels are refused, so that no two
    /// decoders write the same page.
    ///
    /// # Errors
    /// When the codecs can't be set up.
    pub fn new(target: Arc<IncomingMemory>, channel: u16, channels: u16) -> Result<PageDecoder, StreamError> {
        Ok(PageDecoder { memory: target, channel, channels, decompressor: Decompressor::new()?, buffer: Vec::new() })
    }

    /// Reads the body of a page frame and writes its pages. The header has been read.
    ///
    /// # Errors
    /// `Malformed`, `OutsideMemory`, `Truncated`, `Checksum`, and errors of the transport. Pages inside guest memory
    /// may have been written; the migration has failed.
    pub fn receive<R: ReadMemory>(
        &mut self,
        header: &FrameHeader,
        from: &mut FrameReader<R>,
    ) -> Result<PageStats, StreamError> {
        let mut body = FrameBody::new(from, header);
        let batch = read_table(&mut body, &mut self.buffer)?;
        for entry in &batch.entries {
            self.check_run(entry.pages)?;
        }
        let target = &*self.memory;
        let data = || batch.entries.iter().filter(|entry| !entry.zero);
        data().for_each(|entry| target.mark_data(entry.pages));
        if batch.compressed {
            self.buffer.clear();
            body.take(batch.data_bytes, &mut self.buffer)?;
            body.finish()?;
            let mut pages = self.decompressor.decompress(&self.buffer, batch.data_pages() as usize * PAGE_BYTES)?;
            for entry in data() {
                let (now, rest) = pages.split_at_checked(entry.count() as usize * PAGE_BYTES).unwrap_or_default();
                target.memory.write(entry.pages.address(), now)?;
                pages = rest;
            }
        } else {
            let mut window = ReceiveWindow::default();
            for entry in data() {
                target.memory.slices(entry.pages.address(), entry.pages.bytes(), |slice| window.push(slice))?;
            }
            body.fill(&mut window)?;
            body.finish()?;
        }
        for entry in batch.entries.iter().filter(|entry| entry.zero) {
            target.clear(entry.pages)?;
        }
        Ok(PageStats {
            data_pages: batch.data_pages(),
            zero_pages: batch.zero_pages(),
            outside_memory: 0,
            batches: 1,
            wire_bytes: super::frame::FRAME_HEADER_BYTES as u64 + u64::from(header.length),
        })
    }

    pub(super) fn memory(&self) -> &IncomingMemory {
        &self.memory
    }

    pub(super) fn check_run(&self, pages: PageRange) -> Result<(), StreamError> {
        if !self.memory.contains(pages) {
            return Err(outside(pages));
        }
        let last = PageNumber(pages.end.0 - 1);
        let one_chunk = pages.start.0 / CHUNK_PAGES == last.0 / CHUNK_PAGES;
        if self.channels > 1 && !(one_chunk && channel_of(last, self.channels) == self.channel) {
            let (start, end, channel) = (pages.start, pages.end, self.channel);
            let why = format!("pages {start:#x} to {end:#x} do not belong to channel {channel}");
            return Err(StreamError::Malformed { what: "page batch", why });
        }
        Ok(())
    }
}

/// A run of pages in a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageRun {
    /// The pages.
    pub pages: PageRange,
    /// True if all pages of the run are zero and have no data.
    pub zero: bool,
}

impl PageRun {
    /// Maximum number of pages in one entry.
    pub const MAX_COUNT: u64 = 1 << PageRun::COUNT_BITS;

    const PAGE_BITS: u32 = 40;
    const COUNT_BITS: u32 = 22;

    pub(super) fn count(&self) -> u64 {
        self.pages.count()
    }

    /// Encodes 40 bits of page number, 22 bits of count minus one and 2 bits of kind. 40 bits cover 52-bit physical
    /// addresses.
    pub(super) fn encode(&self) -> u64 {
        let count = self.count().wrapping_sub(1) << PageRun::PAGE_BITS;
        self.pages.start.0 | count | u64::from(self.zero) << (PageRun::PAGE_BITS + PageRun::COUNT_BITS)
    }

    pub(super) fn decode(bits: u64) -> Result<PageRun, StreamError> {
        let start = bits & ((1 << PageRun::PAGE_BITS) - 1);
        let count = ((bits >> PageRun::PAGE_BITS) & (PageRun::MAX_COUNT - 1)) + 1;
        let zero = match bits >> (PageRun::PAGE_BITS + PageRun::COUNT_BITS) {
            0 => false,
            1 => true,
            kind => return Err(malformed(format!("entry of unknown kind {kind}"))),
        };
        Ok(PageRun { pages: (start..start + count).into(), zero })
    }
}

/// Adds `page` to the last of `entries` if it continues that run, or as a new entry.
pub(super) fn push_page(entries: &mut Vec<PageRun>, page: PageNumber, zero: bool) {
    match entries.last_mut() {
        Some(last) if last.zero == zero && last.pages.end == page && last.count() < PageRun::MAX_COUNT => {
            last.pages.end.0 += 1;
        }
        _ => entries.push(PageRun { pages: (page.0..page.0 + 1).into(), zero }),
    }
}

/// The parsed table of a page frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageBatch {
    /// The runs, in the order of their data.
    pub entries: Vec<PageRun>,
    /// True if the data is one zstd frame.
    pub compressed: bool,
    /// Bytes of data on the wire.
    pub data_bytes: usize,
}

impl PageBatch {
    /// Parses the table of a complete page body. Does not need the guest's memory.
    ///
    /// # Errors
    /// `Malformed` and `Truncated`.
    pub fn parse(body: &[u8]) -> Result<PageBatch, StreamError> {
        let (head, rest) = body.split_first_chunk().ok_or(StreamError::Truncated("a page batch"))?;
        let (entries, codec) = parse_head(head, rest.len())?;
        let (table, data) = rest.split_at_checked(entries * ENTRY_BYTES).unwrap_or_default();
        PageBatch::new(codec, table, data.len())
    }

    /// Number of pages with data.
    pub fn data_pages(&self) -> u64 {
        self.count(false)
    }

    /// Number of zero pages.
    pub fn zero_pages(&self) -> u64 {
        self.count(true)
    }

    fn count(&self, zero: bool) -> u64 {
        self.entries.iter().filter(|entry| entry.zero == zero).map(PageRun::count).sum()
    }

    fn new(codec: u8, table: &[u8], data_bytes: usize) -> Result<PageBatch, StreamError> {
        let (words, _) = table.as_chunks();
        let entries = words.iter().map(|word| PageRun::decode(u64::from_le_bytes(*word))).collect::<Result<_, _>>()?;
        let batch = PageBatch { entries, compressed: codec == CODEC_ZSTD, data_bytes };
        let pages = batch.data_pages();
        if pages > MAX_BATCH_PAGES {
            return Err(malformed(format!("{pages} pages of data, at most {MAX_BATCH_PAGES} may be")));
        }
        let raw = pages as usize * PAGE_BYTES;
        let fits = if batch.compressed { (1..raw).contains(&data_bytes) } else { data_bytes == raw };
        if fits { Ok(batch) } else { Err(malformed(format!("{data_bytes} bytes of data for {pages} pages"))) }
    }
}

fn read_table<R: Read>(body: &mut FrameBody<'_, R>, buffer: &mut Vec<u8>) -> Result<PageBatch, StreamError> {
    buffer.clear();
    body.take(HEAD_BYTES, buffer)?;
    let head = buffer.first_chunk().ok_or(StreamError::Truncated("a page batch"))?;
    let (entries, codec) = parse_head(head, body.left())?;
    buffer.clear();
    body.take(entries * ENTRY_BYTES, buffer)?;
    PageBatch::new(codec, buffer, body.left())
}

/// Parses the number of entries and the codec, and checks them against the `follow` bytes that remain.
fn parse_head(head: &[u8; HEAD_BYTES], follow: usize) -> Result<(usize, u8), StreamError> {
    let [a, b, c, d, codec, reserved @ ..] = *head;
    let entries = u32::from_le_bytes([a, b, c, d]) as usize;
    if entries == 0 || entries > MAX_ENTRIES || entries * ENTRY_BYTES > follow {
        return Err(malformed(format!("{entries} entries")));
    }
    if codec > CODEC_ZSTD || reserved != [0; 3] {
        return Err(malformed(format!("codec {codec}, reserved bytes {reserved:?}")));
    }
    Ok((entries, codec))
}

/// Returns the parts of `run` that are in memory.
fn regions_of_run<'m>(memory: &'m Memory, run: PageRange) -> impl Iterator<Item = (&'m Region, PageRange)> + use<'m> {
    let regions = memory.regions();
    let first = regions.partition_point(|region| region.pages().end <= run.start);
    let regions = regions.get(first..).unwrap_or_default();
    regions.iter().map_while(move |region| {
        let pages = run.intersection(region.pages());
        (!pages.is_empty()).then_some((region.as_ref(), pages))
    })
}

fn outside(pages: PageRange) -> StreamError {
    StreamError::OutsideMemory { pages }
}

fn malformed(why: String) -> StreamError {
    StreamError::Malformed { what: "page batch", why }
}
