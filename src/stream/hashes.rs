//! Hashes of guest memory, which compare the memory of a stopped guest with the memory at the destination. `migrate`
//! decides when to compare and what a difference means.
//!
//! A channel sends the hashes of its own pages after those pages, so that the comparison sees their final contents.
//!
//! ```
//! # use std::sync::Arc;
//! # use vhost_migrate::memory::{GuestAddress, Memory, PageNumber, Region};
//! # fn guest_memory() -> Result<Memory, Box<dyn std::error::Error>> {
//! #     Ok(Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?)
//! # }
//! use vhost_migrate::stream::MigrationId;
//! use vhost_migrate::unstable::stream::frame::{ChannelId, FrameReader, FrameWriter};
//! use vhost_migrate::unstable::stream::hashes::send_hashes;
//! use vhost_migrate::unstable::stream::pages::{IncomingMemory, PageDecoder};
//!
//! let (source, destination) = (guest_memory()?, guest_memory()?);
//! source.write(GuestAddress(0x5000), b"lost")?;
//! let id = ChannelId { migration: MigrationId(1), channel: 0 };
//! let mut writer = FrameWriter::new(Vec::new(), id);
//! send_hashes(&source, [(0..256).into()], &mut writer)?;
//!
//! let bytes = writer.into_inner();
//! let mut reader = FrameReader::new(&bytes[..], id);
//! let header = reader.next_frame()?;
//! let decoder = PageDecoder::new(Arc::new(IncomingMemory::zeroed(destination)), 0, 1)?;
//! let found = decoder.compare(&header, &mut reader)?;
//! assert_eq!((found.pages, found.first_different), (256, vec![PageNumber(5)]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::ops::AddAssign;

use twox_hash::XxHash3_64;

use super::StreamError;
use super::frame::{FrameBody, FrameHeader, FrameKind, FrameReader, FrameWriter};
use super::pages::{ENTRY_BYTES, MAX_ENTRIES, PAGE_BYTES, PageDecoder, PageRun, push_page};
use super::sys::copy_page;
use crate::memory::{ExtentFinder, LOG_PAGE, Memory, PageNumber, PageRange};

/// Maximum number of hashes in one frame, for 64 MiB of memory.
pub const MAX_HASHES: usize = 16 << 10;
const _: () =
    assert!(FrameKind::Hashes.limit() as usize == HEAD_BYTES + MAX_ENTRIES * ENTRY_BYTES + MAX_HASHES * HASH_BYTES);

const HEAD_BYTES: usize = 8;
const HASH_BYTES: usize = 8;
/// Maximum number of pages listed in a [`HashComparison`].
const MAX_LISTED: usize = 16;

/// Writes hashes of all pages of `runs` that are in `memory`. Zero pages have none, and holes are not
/// touched.
///
/// # Errors
/// Errors of the transport.
pub fn send_hashes<W: Write>(
    memory: &Memory,
    runs: impl IntoIterator<Item = PageRange>,
    to: &mut FrameWriter<W>,
) -> Result<(), StreamError> {
    let mut pages = PageHasher::new(memory);
    let (mut entries, mut hashes) = (Vec::new(), Vec::new());
    for page in runs.into_iter().flat_map(|run| memory.pages(run)).flat_map(PageRange::iter) {
        let hash = pages.hash(page)?;
        push_page(&mut entries, page, hash.is_none());
        hashes.extend(hash);
        if entries.len() == MAX_ENTRIES || hashes.len() == MAX_HASHES {
            flush(&mut entries, &mut hashes, to)?;
        }
    }
    flush(&mut entries, &mut hashes, to)
}

fn flush<W: Write>(
    entries: &mut Vec<PageRun>,
    hashes: &mut Vec<u64>,
    to: &mut FrameWriter<W>,
) -> Result<(), StreamError> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut head = (entries.len() as u64).to_le_bytes().to_vec();
    head.extend(entries.drain(..).flat_map(|entry| entry.encode().to_le_bytes()));
    let hashes: Vec<u8> = hashes.drain(..).flat_map(u64::to_le_bytes).collect();
    to.write(FrameKind::Hashes, [&head, &hashes])?;
    Ok(())
}

/// Result of a comparison.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct HashComparison {
    /// Pages compared.
    pub pages: u64,
    /// Pages that differ.
    pub different: u64,
    /// The first of them, by page number.
    pub first_different: Vec<PageNumber>,
}

impl AddAssign for HashComparison {
    fn add_assign(&mut self, other: HashComparison) {
        self.pages += other.pages;
        self.different += other.different;
        self.first_different.extend(other.first_different);
        self.first_different.sort_unstable();
        self.first_different.truncate(MAX_LISTED);
    }
}

impl PageDecoder {
    /// Reads the body of a hash frame and compares it with the received pages. The header has been read.
    ///
    /// # Errors
    /// `Malformed`, `OutsideMemory`, `Truncated`, `Checksum`, and errors of the transport.
    pub fn compare<R: Read>(
        &self,
        header: &FrameHeader,
        from: &mut FrameReader<R>,
    ) -> Result<HashComparison, StreamError> {
        let mut bytes = Vec::new();
        let mut body = FrameBody::new(from, header);
        body.take(header.length as usize, &mut bytes)?;
        body.finish()?;
        let (entries, hashes) = parse(&bytes)?;
        let mut pages = PageHasher::new(self.memory().memory());
        let mut hashes = hashes.iter().map(|hash| u64::from_le_bytes(*hash));
        let mut found = HashComparison::default();
        for entry in entries {
            self.check_run(entry.pages)?;
            for page in entry.pages.iter() {
                found.pages += 1;
                let theirs = if entry.zero { None } else { hashes.next() };
                if pages.hash(page)? != theirs {
                    found.different += 1;
                    if found.first_different.len() < MAX_LISTED {
                        found.first_different.push(page);
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Returns the number of pages covered by a body of hashes. Does not need the guest's memory.
///
/// # Errors
/// `Malformed` and `Truncated`.
pub fn count_pages(body: &[u8]) -> Result<u64, StreamError> {
    Ok(parse(body)?.0.iter().map(PageRun::count).sum())
}

/// Parses the entries and hashes of a frame's body and checks that their numbers match.
fn parse(body: &[u8]) -> Result<(Vec<PageRun>, &[[u8; HASH_BYTES]]), StreamError> {
    let malformed = |why: &str| StreamError::Malformed { what: "hashes", why: why.into() };
    let (head, rest) = body.split_first_chunk().ok_or(StreamError::Truncated("hashes"))?;
    let count = usize::try_from(u64::from_le_bytes(*head)).ok().filter(|count| (1..=MAX_ENTRIES).contains(count));
    let table = count.and_then(|count| rest.split_at_checked(count * ENTRY_BYTES));
    let (table, hashes) = table.ok_or_else(|| malformed("the table has no entry, too many, or is cut off"))?;
    let (words, _) = table.as_chunks();
    let entries = words.iter().map(|word| PageRun::decode(u64::from_le_bytes(*word))).collect::<Result<Vec<_>, _>>()?;
    let wanted: u64 = entries.iter().filter(|entry| !entry.zero).map(PageRun::count).sum();
    match hashes.as_chunks() {
        (hashes, []) if hashes.len() as u64 == wanted => Ok((entries, hashes)),
        _ => Err(malformed("there is not one hash for each page")),
    }
}

/// Hashes pages without allocating holes.
struct PageHasher<'m> {
    memory: &'m Memory,
    extents: ExtentFinder,
    copy: [u8; PAGE_BYTES],
}

impl<'m> PageHasher<'m> {
    fn new(memory: &'m Memory) -> PageHasher<'m> {
        PageHasher { memory, extents: ExtentFinder::new(), copy: [0; PAGE_BYTES] }
    }

    /// Returns the hash of `page`, or `None` if the page is zero.
    fn hash(&mut self, page: PageNumber) -> Result<Option<u64>, StreamError> {
        if self.extents.is_hole(self.memory, page) {
            return Ok(None);
        }
        let slice = self.memory.slice(page.address(), LOG_PAGE)?;
        let zero = copy_page(&slice, &mut self.copy, false);
        Ok((!zero).then(|| XxHash3_64::oneshot(&self.copy)))
    }
}
