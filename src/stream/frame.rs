//! Connection header and frames: lengths, sequence numbers and checksums. `pages` and `record` define the bodies,
//! `transport` carries the bytes.
//!
//! ```
//! use vhost_migrate::stream::{FrameKind, MigrationId};
//! use vhost_migrate::unstable::stream::frame::{ChannelId, FrameReader, FrameWriter};
//!
//! let id = ChannelId { migration: MigrationId(1), channel: 0 };
//! let mut writer = FrameWriter::new(Vec::new(), id);
//! writer.write(FrameKind::State, [b"head", b" and tail"])?;
//! let bytes = writer.into_inner();
//!
//! let mut reader = FrameReader::new(&bytes[..], id);
//! let header = reader.next_frame()?;
//! assert_eq!(header.kind, FrameKind::State);
//! let mut body = Vec::new();
//! reader.body(&header, &mut body)?;
//! assert_eq!(body, b"head and tail");
//!
//! // A frame of another migration fails its checksum.
//! let other = ChannelId { migration: MigrationId(2), channel: 0 };
//! let mut reader = FrameReader::new(&bytes[..], other);
//! assert!(reader.next_frame().and_then(|header| reader.body(&header, &mut body)).is_err());
//! # Ok::<(), vhost_migrate::stream::StreamError>(())
//! ```
#![forbid(unsafe_code)]

use std::fmt;
use std::hash::Hasher;
use std::io::{self, IoSlice, Read, Write};

use twox_hash::XxHash3_64;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::StreamError;
use super::codec::Codec;
use super::sys::{ReadMemory, ReceiveWindow};
use crate::record::MAX_STATE;
use crate::sys::random::random;

/// First bytes of every connection and file. They are not ASCII and contain both kinds of line ends, so that a
/// text-mode copy is detected.
pub const MAGIC: [u8; 8] = *b"\x89VHM\r\n\x1a\n";
/// Newest version of the stream that this program writes and reads.
pub const VERSION: u16 = 2;
/// Oldest version of the stream that this program writes and reads.
pub const OLDEST_VERSION: u16 = 2;
/// Bytes of a connection header.
pub const HEADER_BYTES: usize = size_of::<RawConnectionHeader>();
/// Bytes of a frame header.
pub const FRAME_HEADER_BYTES: usize = size_of::<RawFrameHeader>();
/// Maximum number of channels of a migration.
pub const MAX_CHANNELS: u16 = 64;

/// Identifies one migration; the same on all its channels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MigrationId(pub u128);

impl MigrationId {
    /// Creates a random id.
    ///
    /// # Errors
    /// The error of the system.
    pub fn random() -> Result<MigrationId, StreamError> {
        Ok(MigrationId(random()?))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Identifies one channel of one migration. It is part of every frame's hash, so that a frame is valid on this channel
/// only. The direction needs no field: source and destination use different frame kinds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelId {
    /// The migration.
    pub migration: MigrationId,
    /// The channel's number.
    pub channel: u16,
}

/// The first bytes that each side sends on each channel. The source offers, the destination replies with what it
/// [accepts](Self::accepted), unless `one_way`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnectionHeader {
    /// Version of the stream: the newest that the source writes, or the one that the destination accepts.
    pub version: u16,
    /// The migration this channel belongs to.
    pub id: MigrationId,
    /// This channel's number, below `channels`.
    pub channel: u16,
    /// Number of channels of the migration, 1 to [`MAX_CHANNELS`].
    pub channels: u16,
    /// The destination sends nothing: the transport is a file, a pipe or a filter command.
    pub one_way: bool,
    /// The source asks for the outcome of the migration `id` instead of starting one. There is one channel.
    pub outcome_query: bool,
    /// The source may compress pages with zstd, or the destination decompresses them. Not used one way.
    pub zstd: bool,
}

/// Flags of a connection header. Bits 8 to 15 are offers, which a destination that does not know them ignores.
mod flags {
    /// [`ConnectionHeader::one_way`](super::ConnectionHeader::one_way).
    pub(super) const ONE_WAY: u16 = 1 << 0;
    /// A file or device onto which a save has begun and not been completed.
    pub(super) const UNFINISHED: u16 = 1 << 1;
    /// [`ConnectionHeader::outcome_query`](super::ConnectionHeader::outcome_query).
    pub(super) const OUTCOME_QUERY: u16 = 1 << 2;
    /// [`ConnectionHeader::zstd`](super::ConnectionHeader::zstd).
    pub(super) const ZSTD: u16 = 1 << 8;
    /// All offers, known or not.
    pub(super) const OFFERS: u16 = 0xff00;
}

impl ConnectionHeader {
    /// Returns the header of a migration with one channel and replies, in the newest version, that offers nothing.
    pub const fn new(id: MigrationId) -> ConnectionHeader {
        ConnectionHeader {
            version: VERSION,
            id,
            channel: 0,
            channels: 1,
            one_way: false,
            outcome_query: false,
            zstd: false,
        }
    }

    /// Returns the destination's reply: the newest version that both sides know, and the offers that this program
    /// accepts.
    #[must_use]
    pub fn accepted(&self) -> ConnectionHeader {
        ConnectionHeader { version: self.version.min(VERSION), zstd: self.zstd && Codec::HAS_ZSTD, ..*self }
    }

    /// Checks that `reply` accepts this header, in a version and with offers that it has.
    ///
    /// # Errors
    /// `Version` for a newer one; `Malformed` if it replies to another header.
    pub fn check_reply(&self, reply: &ConnectionHeader) -> Result<(), StreamError> {
        if reply.version > self.version {
            return Err(StreamError::Version { ours: self.version, theirs: reply.version });
        }
        if *reply == (ConnectionHeader { version: reply.version, zstd: reply.zstd && self.zstd, ..*self }) {
            return Ok(());
        }
        let why = "it replies to another migration: connect to the destination directly".into();
        Err(StreamError::Malformed { what: "connection header", why })
    }

    /// Returns the encoded header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        self.encode_with(0)
    }

    /// Returns the header of a file or device whose save is not complete. Decoding it yields
    /// [`StreamError::Unfinished`].
    pub fn encode_unfinished(&self) -> [u8; HEADER_BYTES] {
        self.encode_with(flags::UNFINISHED)
    }

    fn encode_with(&self, more: u16) -> [u8; HEADER_BYTES] {
        let set =
            [(self.one_way, flags::ONE_WAY), (self.outcome_query, flags::OUTCOME_QUERY), (self.zstd, flags::ZSTD)];
        let flags = set.into_iter().filter(|(set, _)| *set).fold(more, |flags, (_, flag)| flags | flag);
        let mut raw = RawConnectionHeader {
            magic: MAGIC,
            version: self.version.into(),
            flags: flags.into(),
            channel: self.channel.into(),
            channels: self.channels.into(),
            id: self.id.0.into(),
            hash: U64::ZERO,
        };
        raw.hash = raw.digest().into();
        zerocopy::transmute!(raw)
    }

    /// Checks and decodes a header. Its version may be newer than [`VERSION`] if its source reads the reply: it then
    /// continues in the version that the reply names.
    ///
    /// # Errors
    /// `NotAStream`, `Version`, `Checksum`, `Unfinished`, or `Malformed` for unknown flags other than offers and for
    /// channel numbers out of range.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<ConnectionHeader, StreamError> {
        let raw: RawConnectionHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(StreamError::NotAStream);
        }
        let (version, flags) = (raw.version.get(), raw.flags.get());
        let newest = if flags & flags::ONE_WAY == 0 { u16::MAX } else { VERSION };
        if !(OLDEST_VERSION..=newest).contains(&version) {
            return Err(StreamError::Version { ours: VERSION, theirs: version });
        }
        if raw.hash.get() != raw.digest() {
            return Err(StreamError::Checksum { what: "the connection header", sequence: 0 });
        }
        let (channel, channels) = (raw.channel.get(), raw.channels.get());
        if flags & flags::UNFINISHED != 0 {
            return Err(StreamError::Unfinished);
        }
        let (one_way, outcome_query) = (flags & flags::ONE_WAY != 0, flags & flags::OUTCOME_QUERY != 0);
        let known = flags & !(flags::OFFERS | flags::ONE_WAY | flags::OUTCOME_QUERY) == 0
            && (!outcome_query || !one_way && channels == 1);
        if !known || channels == 0 || channels > MAX_CHANNELS || channel >= channels {
            let why = format!("flags {flags:#x}, channel {channel} of {channels} (at most {MAX_CHANNELS})");
            return Err(StreamError::Malformed { what: "connection header", why });
        }
        let (id, zstd) = (MigrationId(raw.id.get()), flags & flags::ZSTD != 0);
        Ok(ConnectionHeader { version, id, channel, channels, one_way, outcome_query, zstd })
    }

    /// Reads and decodes a header.
    ///
    /// # Errors
    /// As [`decode`](Self::decode), `Truncated`, and errors of the reader.
    pub fn read(from: &mut impl Read) -> Result<ConnectionHeader, StreamError> {
        let mut bytes = [0; HEADER_BYTES];
        read_exact_or_truncated(from, &mut bytes, "the connection header")?;
        ConnectionHeader::decode(&bytes)
    }
}

/// The kind of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum FrameKind {
    /// The source's memory layout; first frame of channel 0.
    Layout = 0x01,
    /// A batch of pages, on any channel.
    Pages = 0x02,
    /// End of a round, on every channel.
    RoundEnd = 0x03,
    /// State of CPUs and devices; opaque to the stream.
    State = 0x04,
    /// The destination owns the guest.
    Commit = 0x05,
    /// The source cancels the migration; the guest stays there.
    Cancel = 0x06,
    /// Pages that will be sent with data, so that the destination can allocate memory in advance.
    DataRuns = 0x07,
    /// Hashes of the pages of a stopped guest.
    Hashes = 0x08,
    /// Description of the guest's devices, sent while the guest runs; opaque to the stream.
    Devices = 0x09,
    /// The destination has the same memory layout and accepts the migration.
    Accepted = 0x81,
    /// The destination has restored the state and waits for the commit.
    Ready = 0x82,
    /// The guest runs at the destination.
    Started = 0x83,
    /// The destination has given up and never starts the guest; with the reason.
    Failed = 0x84,
    /// The destination owns the guest and has not started it; with the reason.
    Held = 0x85,
    /// The destination does not know the migration of an outcome query.
    Unknown = 0x86,
}

impl FrameKind {
    /// All kinds.
    pub const ALL: [FrameKind; 15] = [
        FrameKind::Layout,
        FrameKind::Pages,
        FrameKind::RoundEnd,
        FrameKind::State,
        FrameKind::Commit,
        FrameKind::Cancel,
        FrameKind::DataRuns,
        FrameKind::Hashes,
        FrameKind::Devices,
        FrameKind::Accepted,
        FrameKind::Ready,
        FrameKind::Started,
        FrameKind::Failed,
        FrameKind::Held,
        FrameKind::Unknown,
    ];

    /// Maximum size of a body of this kind, bytes. Checked before anything is allocated or read.
    pub const fn limit(self) -> u32 {
        match self {
            // A table of 2048 entries, and 256 pages or 16384 hashes.
            FrameKind::Pages => (16 << 10) + 8 + (1 << 20),
            FrameKind::Hashes => (16 << 10) + 8 + (128 << 10),
            FrameKind::State => MAX_STATE as u32,
            FrameKind::Layout | FrameKind::DataRuns | FrameKind::Devices => 1 << 20,
            FrameKind::Accepted | FrameKind::Ready | FrameKind::Unknown => 0,
            _ => 64 << 10,
        }
    }

    fn from_wire(kind: u16) -> Result<FrameKind, StreamError> {
        FrameKind::ALL.into_iter().find(|k| *k as u16 == kind).ok_or(StreamError::UnknownKind(kind))
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A frame header whose kind, length and sequence have been checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Kind of the body.
    pub kind: FrameKind,
    /// Bytes of body that follow.
    pub length: u32,
    /// Number of this frame in its channel and direction, from 0.
    pub sequence: u64,
    /// xxh3-64 over migration id, channel, the first 16 bytes of the header, then the body.
    pub hash: u64,
}

/// Writes frames with sequence numbers and hashes.
#[derive(Debug)]
pub struct FrameWriter<W> {
    to: W,
    id: ChannelId,
    sequence: u64,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Creates a writer for channel `id`, starting with frame 0. The connection header has been written.
    pub fn new(to: W, id: ChannelId) -> FrameWriter<W> {
        FrameWriter { to, id, sequence: 0, bytes: 0 }
    }

    /// Writes one frame whose body is the concatenation of `parts`. Returns the bytes written, header included.
    ///
    /// # Errors
    /// `TooLong` when the body is over its kind's limit (nothing is written), and errors of the transport.
    pub fn write(&mut self, kind: FrameKind, parts: [&[u8]; 2]) -> Result<u64, StreamError> {
        let length = parts.iter().map(|part| part.len() as u64).sum();
        let limit = kind.limit();
        let length = u32::try_from(length).ok().filter(|length| *length <= limit).ok_or(StreamError::TooLong {
            what: "frame to send",
            length,
            limit: limit.into(),
        })?;
        let mut raw = RawFrameHeader {
            kind: (kind as u16).into(),
            reserved: U16::ZERO,
            length: length.into(),
            sequence: self.sequence.into(),
            hash: U64::ZERO,
        };
        let mut hash = raw.hasher(self.id);
        for part in parts {
            hash.write(part);
        }
        raw.hash = hash.finish().into();
        let [first, second] = parts;
        write_all(&mut self.to, &mut [raw.as_bytes(), first, second].map(IoSlice::new))?;
        // A channel that is cancelled ends here.
        self.to.flush()?;
        self.sequence += 1;
        let written = FRAME_HEADER_BYTES as u64 + u64::from(length);
        self.bytes += written;
        Ok(written)
    }

    /// Bytes written so far, frame headers included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The underlying transport.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    /// Gives the transport back.
    pub fn into_inner(self) -> W {
        self.to
    }
}

/// Reads and checks frames. The stream is unusable after an error.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    id: ChannelId,
    sequence: u64,
    bytes: u64,
}

impl<R: Read> FrameReader<R> {
    /// Creates a reader for channel `id` that expects frame 0. The connection header has been read.
    pub fn new(from: R, id: ChannelId) -> FrameReader<R> {
        FrameReader { inner: from, id, sequence: 0, bytes: 0 }
    }

    /// Reads the next frame's header. Its body must be read before the next call.
    ///
    /// # Errors
    /// `Ended` when the stream ends here, `Truncated`, `UnknownKind`, `TooLong`, `Sequence`, `Malformed`, and what
    /// the transport reports.
    pub fn next_frame(&mut self) -> Result<FrameHeader, StreamError> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        let (first, rest) = bytes.split_at_mut(1);
        match read_exact_or_truncated(&mut self.inner, first, "") {
            Err(StreamError::Truncated(_)) => return Err(StreamError::Ended),
            other => other?,
        }
        read_exact_or_truncated(&mut self.inner, rest, "a frame header")?;
        let raw: RawFrameHeader = zerocopy::transmute!(bytes);
        let kind = FrameKind::from_wire(raw.kind.get())?;
        if raw.reserved != U16::ZERO {
            return Err(StreamError::Malformed { what: "frame header", why: "reserved bytes are not zero".into() });
        }
        let (length, limit) = (raw.length.get(), kind.limit());
        if length > limit {
            return Err(StreamError::TooLong { what: "a frame", length: length.into(), limit: limit.into() });
        }
        if raw.sequence.get() != self.sequence {
            return Err(StreamError::Sequence { wanted: self.sequence, found: raw.sequence.get() });
        }
        self.sequence += 1;
        self.bytes += FRAME_HEADER_BYTES as u64 + u64::from(length);
        Ok(FrameHeader { kind, length, sequence: raw.sequence.get(), hash: raw.hash.get() })
    }

    /// Reads a whole body into `into`, replacing its contents, and checks the hash. Memory grows only with received
    /// bytes.
    ///
    /// # Errors
    /// `Truncated`, `Checksum`, and errors of the transport.
    pub fn body(&mut self, header: &FrameHeader, into: &mut Vec<u8>) -> Result<(), StreamError> {
        let mut body = FrameBody::new(self, header);
        into.clear();
        body.take(header.length as usize, into)?;
        body.finish()
    }

    /// Skips a body and checks its hash, with bounded memory.
    ///
    /// # Errors
    /// As [`body`](Self::body).
    pub fn skip(&mut self, header: &FrameHeader) -> Result<(), StreamError> {
        self.beginning(header, &mut Vec::new())
    }

    /// Skips a body as [`skip`](Self::skip) does and stores its first bytes, at most 64 KiB, in `beginning`.
    ///
    /// # Errors
    /// As [`body`](Self::body).
    pub fn beginning(&mut self, header: &FrameHeader, beginning: &mut Vec<u8>) -> Result<(), StreamError> {
        const CHUNK_BYTES: usize = 64 << 10;
        let mut body = FrameBody::new(self, header);
        beginning.clear();
        body.take(body.left().min(CHUNK_BYTES), beginning)?;
        let mut piece = Vec::new();
        while body.left() > 0 {
            piece.clear();
            body.take(body.left().min(CHUNK_BYTES), &mut piece)?;
        }
        body.finish()
    }

    /// Bytes read so far, frame headers included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The transport below.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// Gives the transport back.
    pub fn into_inner(self) -> R {
        self.inner
    }
}

/// A body that is read in parts and hashed on the way.
pub(super) struct FrameBody<'r, R> {
    from: &'r mut R,
    header: FrameHeader,
    left: usize,
    hash: XxHash3_64,
}

impl<'r, R: Read> FrameBody<'r, R> {
    pub(super) fn new(reader: &'r mut FrameReader<R>, header: &FrameHeader) -> FrameBody<'r, R> {
        let raw = RawFrameHeader {
            kind: (header.kind as u16).into(),
            reserved: U16::ZERO,
            length: header.length.into(),
            sequence: header.sequence.into(),
            hash: U64::ZERO,
        };
        let hash = raw.hasher(reader.id);
        FrameBody { from: &mut reader.inner, header: *header, left: header.length as usize, hash }
    }

    /// Number of bytes of the body that have not been read.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Appends the next `count` bytes to `into`.
    pub(super) fn take(&mut self, count: usize, into: &mut Vec<u8>) -> Result<(), StreamError> {
        self.claim(count)?;
        let start = into.len();
        let read = (&mut self.from).take(count as u64).read_to_end(into)?;
        if read < count {
            return Err(StreamError::Truncated("a frame"));
        }
        self.hash.write(into.get(start..).unwrap_or_default());
        Ok(())
    }

    /// Reads directly into guest memory until `window` is full.
    pub(super) fn fill(&mut self, window: &mut ReceiveWindow<'_>) -> Result<(), StreamError>
    where
        R: ReadMemory,
    {
        self.claim(window.left())?;
        while window.left() > 0 {
            match self.from.read_memory(window) {
                Ok(0) => return Err(StreamError::Truncated("a frame")),
                Ok(count) => window.advance(count, &mut self.hash),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Checks the hash after the whole body has been read.
    pub(super) fn finish(self) -> Result<(), StreamError> {
        if self.left == 0 && self.hash.finish() == self.header.hash {
            Ok(())
        } else {
            Err(StreamError::Checksum { what: "frame", sequence: self.header.sequence })
        }
    }

    fn claim(&mut self, count: usize) -> Result<(), StreamError> {
        self.left = self
            .left
            .checked_sub(count)
            .ok_or(StreamError::Malformed { what: "frame", why: "its contents are longer than its body".into() })?;
        Ok(())
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawConnectionHeader {
    magic: [u8; 8],
    version: U16,
    flags: U16,
    channel: U16,
    channels: U16,
    id: U128,
    hash: U64,
}

impl RawConnectionHeader {
    fn digest(&self) -> u64 {
        XxHash3_64::oneshot(RawConnectionHeader { hash: U64::ZERO, ..*self }.as_bytes())
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFrameHeader {
    kind: U16,
    reserved: U16,
    length: U32,
    sequence: U64,
    hash: U64,
}

impl RawFrameHeader {
    /// Hashes the channel's id and everything before the hash itself.
    fn hasher(&self, id: ChannelId) -> XxHash3_64 {
        let mut hash = XxHash3_64::new();
        hash.write(&id.migration.0.to_le_bytes());
        hash.write(&id.channel.to_le_bytes());
        hash.write(self.as_bytes().get(..16).unwrap_or_default());
        hash
    }
}

/// `read_exact` with [`StreamError::Truncated`] for an early end.
fn read_exact_or_truncated(from: &mut impl Read, into: &mut [u8], what: &'static str) -> Result<(), StreamError> {
    from.read_exact(into).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => StreamError::Truncated(what),
        _ => error.into(),
    })
}

fn write_all(to: &mut impl Write, mut parts: &mut [IoSlice<'_>]) -> Result<(), StreamError> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match to.write_vectored(parts) {
            Ok(0) => return Err(StreamError::PeerGone),
            Ok(count) => IoSlice::advance_slices(&mut parts, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ChannelId = ChannelId { migration: MigrationId(0x0123_4567_89ab_cdef), channel: 1 };

    fn header() -> ConnectionHeader {
        ConnectionHeader { channel: 1, channels: 3, one_way: true, ..ConnectionHeader::new(ID.migration) }
    }

    #[test]
    fn a_connection_header_round_trips() {
        assert_eq!(ConnectionHeader::decode(&header().encode()).unwrap(), header());
        assert_eq!(header().encode().len(), 40);
    }

    #[test]
    fn a_newer_source_continues_in_the_version_and_with_the_offers_that_both_sides_know() {
        let here = ConnectionHeader::new(ID.migration);
        let newer = ConnectionHeader { version: VERSION + 1, zstd: true, ..here };
        let received = ConnectionHeader::decode(&newer.encode_with(1 << 15)).unwrap();
        assert_eq!(received, newer);
        let reply = ConnectionHeader::decode(&received.accepted().encode()).unwrap();
        assert_eq!(reply, ConnectionHeader { zstd: Codec::HAS_ZSTD, ..here });
        newer.check_reply(&reply).unwrap();
    }

    #[test]
    fn a_reply_in_a_newer_version_or_with_more_than_was_offered_is_refused() {
        let here = ConnectionHeader::new(ID.migration);
        let newer = here.check_reply(&ConnectionHeader { version: VERSION + 1, ..here });
        assert!(matches!(newer, Err(StreamError::Version { ours: VERSION, theirs: 3 })), "{newer:?}");
        let other = ConnectionHeader { id: MigrationId(1), ..here };
        for reply in [ConnectionHeader { zstd: true, ..here }, ConnectionHeader { channels: 2, ..here }, other] {
            let refused = here.check_reply(&reply);
            assert!(matches!(refused, Err(StreamError::Malformed { .. })), "{refused:?}");
        }
    }

    #[test]
    fn unknown_flags_other_than_offers_are_refused() {
        let refused = ConnectionHeader::decode(&ConnectionHeader::new(ID.migration).encode_with(1 << 7));
        assert!(matches!(refused, Err(StreamError::Malformed { .. })), "{refused:?}");
    }

    #[test]
    fn any_flipped_bit_of_a_connection_header_is_an_error() {
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(ConnectionHeader::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn an_unfinished_header_is_reported_as_unfinished() {
        let refused = ConnectionHeader::decode(&header().encode_unfinished());
        assert!(matches!(refused, Err(StreamError::Unfinished)), "{refused:?}");
    }

    #[test]
    fn a_version_mismatch_error_names_the_side_to_update() {
        let mut bytes = header().encode();
        bytes[8] = 9;
        let newer = ConnectionHeader::decode(&bytes).unwrap_err().to_string();
        assert!(newer.contains("the peer is newer, update this program"), "{newer}");
        bytes[8] = 0;
        let older = ConnectionHeader::decode(&bytes).unwrap_err().to_string();
        assert!(older.contains("this program is newer, update the peer"), "{older}");
    }

    #[test]
    fn frames_round_trip_in_order_until_the_end_of_the_stream() {
        let mut writer = FrameWriter::new(Vec::new(), ID);
        writer.write(FrameKind::Commit, [b"", b""]).unwrap();
        writer.write(FrameKind::Cancel, [b"first", b"second"]).unwrap();
        let bytes = writer.bytes();
        let wire = writer.into_inner();
        assert_eq!(wire.len() as u64, bytes);
        let mut reader = FrameReader::new(wire.as_slice(), ID);
        let mut body = Vec::new();
        let frame = reader.next_frame().unwrap();
        assert_eq!((frame.kind, frame.length), (FrameKind::Commit, 0));
        reader.body(&frame, &mut body).unwrap();
        let frame = reader.next_frame().unwrap();
        reader.body(&frame, &mut body).unwrap();
        assert_eq!((frame.kind, body.as_slice()), (FrameKind::Cancel, b"firstsecond".as_slice()));
        assert!(matches!(reader.next_frame(), Err(StreamError::Ended)));
        assert_eq!(reader.bytes(), bytes);
    }

    #[test]
    fn a_frame_is_valid_only_on_its_own_channel_of_its_own_migration() {
        let mut writer = FrameWriter::new(Vec::new(), ID);
        writer.write(FrameKind::Cancel, [b"body", b""]).unwrap();
        let wire = writer.into_inner();
        let read = |id| {
            let mut reader = FrameReader::new(wire.as_slice(), id);
            let frame = reader.next_frame()?;
            reader.body(&frame, &mut Vec::new())
        };
        read(ID).unwrap();
        for other in [
            ChannelId { migration: MigrationId(ID.migration.0 + 1), ..ID },
            ChannelId { migration: MigrationId(ID.migration.0 ^ 1 << 127), ..ID },
            ChannelId { channel: 0, ..ID },
        ] {
            assert!(matches!(read(other), Err(StreamError::Checksum { .. })), "{other:?}");
        }
    }

    #[test]
    fn a_repeated_frame_is_an_error() {
        let mut writer = FrameWriter::new(Vec::new(), ID);
        writer.write(FrameKind::Commit, [b"", b""]).unwrap();
        let one = writer.into_inner();
        let twice = [one.clone(), one].concat();
        let mut reader = FrameReader::new(twice.as_slice(), ID);
        let frame = reader.next_frame().unwrap();
        reader.body(&frame, &mut Vec::new()).unwrap();
        assert!(matches!(reader.next_frame(), Err(StreamError::Sequence { wanted: 1, found: 0 })));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_on_both_sides() {
        let raw = RawFrameHeader {
            kind: (FrameKind::State as u16).into(),
            reserved: U16::ZERO,
            length: u32::MAX.into(),
            sequence: U64::ZERO,
            hash: U64::ZERO,
        };
        let refused = FrameReader::new(raw.as_bytes(), ID).next_frame();
        assert!(matches!(refused, Err(StreamError::TooLong { .. })));
        let mut writer = FrameWriter::new(Vec::new(), ID);
        let long = vec![0; FrameKind::Cancel.limit() as usize + 1];
        assert!(matches!(writer.write(FrameKind::Cancel, [&long, b""]), Err(StreamError::TooLong { .. })));
        assert!(writer.into_inner().is_empty());
    }

    #[test]
    fn an_announced_body_allocates_only_for_received_bytes() {
        let mut writer = FrameWriter::new(Vec::new(), ID);
        writer.write(FrameKind::State, [&vec![7; 60 << 20], b""]).unwrap();
        let wire = writer.into_inner();
        let mut reader = FrameReader::new(&wire[..1000], ID);
        let frame = reader.next_frame().unwrap();
        let mut body = Vec::new();
        assert!(matches!(reader.body(&frame, &mut body), Err(StreamError::Truncated(_))));
        assert!(body.capacity() < 64 << 10, "{}", body.capacity());
    }
}
