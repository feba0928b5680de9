//! Handshake messages. Each is a [record](crate::record) with a version of its own. The types here exist only for the
//! stream; run-time types are converted to and from them.
//!
//! ```
//! use vhost_migrate::stream::MigrationId;
//! use vhost_migrate::unstable::stream::frame::{ChannelId, FrameReader, FrameWriter};
//! use vhost_migrate::unstable::stream::record::{Commit, ToDestination};
//!
//! let id = ChannelId { migration: MigrationId(1), channel: 0 };
//! let mut writer = FrameWriter::new(Vec::new(), id);
//! ToDestination::Commit(Commit { run: true }).write(&mut writer)?;
//!
//! let bytes = writer.into_inner();
//! let mut reader = FrameReader::new(&bytes[..], id);
//! let header = reader.next_frame()?;
//! assert_eq!(ToDestination::read(&header, &mut reader)?, ToDestination::Commit(Commit { run: true }));
//! # Ok::<(), vhost_migrate::stream::StreamError>(())
//! ```
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::frame::{FrameHeader, FrameKind, FrameReader, FrameWriter};
use super::{PageStats, StreamError};
use crate::abi::vhost_user::VHOST_USER_MAX_RAM_SLOTS;
use crate::memory::{GuestAddress, LOG_PAGE, Memory, PageRange};

use crate::record::{decode, encode};

/// Maximum number of regions of a guest's memory: the limit of vhost-user.
pub const MAX_REGIONS: usize = VHOST_USER_MAX_RAM_SLOTS;

/// One region of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RegionLayout {
    /// Guest-physical address of the first byte.
    #[serde(with = "guest_address")]
    pub gpa: GuestAddress,
    /// Size, bytes.
    pub size: u64,
}

/// A guest-physical address in a record: a 64-bit integer.
mod guest_address {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::memory::GuestAddress;

    pub(super) fn serialize<S: Serializer>(gpa: &GuestAddress, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(gpa.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<GuestAddress, D::Error> {
        u64::deserialize(from).map(GuestAddress)
    }
}

/// Memory layout of the source. The destination must have the same. Version 1.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemoryLayout {
    /// All regions, in ascending order of address.
    pub regions: Vec<RegionLayout>,
}

impl MemoryLayout {
    /// Checks the number of regions. Every region costs a descriptor and a mapping, whatever its size.
    ///
    /// # Errors
    /// `Layout` for more than [`MAX_REGIONS`].
    pub fn check_regions(&self) -> Result<(), StreamError> {
        match self.regions.len() {
            ..=MAX_REGIONS => Ok(()),
            count => Err(StreamError::Layout(format!("{count} regions, and no guest has more than {MAX_REGIONS}"))),
        }
    }

    /// Returns the layout of `memory`.
    ///
    /// # Errors
    /// `Layout` if a region is not aligned to pages.
    pub fn from_memory(memory: &Memory) -> Result<MemoryLayout, StreamError> {
        let regions = memory.regions().iter().map(|region| RegionLayout { gpa: region.gpa(), size: region.size() });
        let regions: Vec<_> = regions.collect();
        match regions.iter().find(|r| !r.gpa.0.is_multiple_of(LOG_PAGE) || !r.size.is_multiple_of(LOG_PAGE)) {
            Some(r) => {
                Err(StreamError::Layout(format!("region {:#x}+{:#x} is not made of whole pages", r.gpa.0, r.size)))
            }
            None => Ok(MemoryLayout { regions }),
        }
    }

    /// Checks that `memory` covers exactly the same addresses. Borders between adjacent regions may differ.
    ///
    /// # Errors
    /// `Layout` with the first difference.
    pub fn check_matches(&self, memory: &Memory) -> Result<(), StreamError> {
        let theirs = merge_adjacent(&self.regions)?;
        let ours = merge_adjacent(&MemoryLayout::from_memory(memory)?.regions)?;
        let show = |range: Option<&(u64, u64)>| match range {
            Some((start, end)) => format!("memory at {start:#x}..{end:#x}"),
            None => "no more memory".into(),
        };
        for n in 0..theirs.len().max(ours.len()) {
            let (theirs, ours) = (theirs.get(n), ours.get(n));
            if theirs != ours {
                return Err(StreamError::Layout(format!("source has {}, destination {}", show(theirs), show(ours))));
            }
        }
        Ok(())
    }

    /// Returns true if all of `pages` are memory.
    pub fn contains(&self, pages: PageRange) -> bool {
        let (Some(mut at), Some(end)) = (pages.start.0.checked_mul(LOG_PAGE), pages.end.0.checked_mul(LOG_PAGE)) else {
            return false;
        };
        let first = self.regions.partition_point(|region| region.gpa.0.saturating_add(region.size) <= at);
        for region in self.regions.get(first..).unwrap_or_default() {
            if at >= end || region.gpa.0 > at {
                break;
            }
            at = region.gpa.0.saturating_add(region.size);
        }
        at >= end
    }

    /// Number of pages of memory, without holes.
    pub fn pages(&self) -> u64 {
        self.regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.size / LOG_PAGE))
    }
}

/// Maximum number of runs in a [`DataRuns`].
pub const MAX_DATA_RUNS: usize = 32 << 10;

/// Pages that the source will send with data, so that the destination can allocate memory in advance. This is a hint
/// and as complete as the frame has room for. Version 1.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct DataRuns {
    /// Page numbers in ascending order.
    pub runs: Vec<Range<u64>>,
}

impl DataRuns {
    /// Returns the first runs of pages of `memory` that are in use.
    pub fn from_memory(memory: &Memory) -> DataRuns {
        let mut runs: Vec<Range<u64>> = Vec::new();
        memory.data(|PageRange { start, end }| {
            match runs.last_mut() {
                Some(last) if last.end == start.0 => last.end = end.0,
                _ => runs.push(start.0..end.0),
            }
            runs.len() < MAX_DATA_RUNS
        });
        DataRuns { runs }
    }
}

/// End of a round. Sent on every channel after its pages. Version 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RoundEnd {
    /// Number of the round, from 0.
    pub round: u32,
    /// True for the last round: the state follows on channel 0, and no more pages.
    pub last: bool,
    /// Pages sent with data on this channel in this round.
    pub data_pages: u64,
    /// Pages sent as zero on this channel in this round.
    pub zero_pages: u64,
}

impl RoundEnd {
    /// Creates the end of a round in which this channel has sent `sent`.
    pub fn new(round: u32, last: bool, sent: &PageStats) -> RoundEnd {
        RoundEnd { round, last, data_pages: sent.data_pages, zero_pages: sent.zero_pages }
    }

    /// Checks that everything sent on this channel in the round has arrived.
    ///
    /// # Errors
    /// `Malformed` if not.
    pub fn check_received(&self, received: &PageStats) -> Result<(), StreamError> {
        if (self.data_pages, self.zero_pages) == (received.data_pages, received.zero_pages) {
            return Ok(());
        }
        let why = format!(
            "{} data and {} zero pages came, {} and {} were sent",
            received.data_pages, received.zero_pages, self.data_pages, self.zero_pages
        );
        Err(StreamError::Malformed { what: "round", why })
    }
}

/// Messages from the source to the destination, except pages. Each has its own frame kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToDestination {
    /// First message on channel 0.
    Layout(MemoryLayout),
    /// Lists the pages that will have data. Sent once on channel 0 before the end of the first round.
    DataRuns(DataRuns),
    /// Describes the guest's devices while the guest runs. Sent once on channel 0 before the end of the first round;
    /// opaque to the stream.
    Devices(Vec<u8>),
    /// Ends a round. Sent on every channel.
    RoundEnd(RoundEnd),
    /// Saved state, encoded with [`encode`]; opaque to the stream.
    State(Vec<u8>),
    /// The destination owns the guest from this message on.
    Commit(Commit),
    /// The migration is cancelled; the guest stays at the source.
    Cancel {
        /// The reason.
        reason: String,
    },
}

/// Messages from the destination to the source, on channel 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToSource {
    /// The layout fits. The destination is ready for pages.
    Accepted,
    /// The state is restored. The destination waits for the commit.
    Ready,
    /// The guest runs.
    Started(Started),
    /// The destination has given up and never starts the guest, even if a commit arrives. The source resumes the guest.
    Failed {
        /// The reason.
        message: String,
    },
    /// The destination owns the guest and does not run it.
    Held(Held),
    /// The destination does not know the migration of an outcome query.
    Unknown,
}

/// Transfers the guest to the destination. Version 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// True if the CPUs are to run. False for a guest that was paused before the migration.
    pub run: bool,
}

/// Reason that the destination does not run a guest it owns. Version 1.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Held {
    /// True while the guest is being started. Another answer follows.
    pub starting: bool,
    /// The reason, at most 4096 bytes.
    pub message: String,
}

/// Times measured by the destination at the start of the guest. Version 1.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Started {
    /// Time between the guest's last action at the source and its first at the destination by its own clock,
    /// nanoseconds; only if both share a clock.
    pub observed_downtime_ns: Option<u64>,
    /// Time from the commit to the running guest, nanoseconds.
    pub start_ns: u64,
}

impl ToDestination {
    /// Writes the message as one frame. Returns its size on the wire.
    ///
    /// # Errors
    /// Errors of the transport.
    pub fn write<W: Write>(&self, to: &mut FrameWriter<W>) -> Result<u64, StreamError> {
        match self {
            ToDestination::Layout(layout) => to.write(FrameKind::Layout, [&encode(1, layout)?, &[]]),
            ToDestination::DataRuns(runs) => to.write(FrameKind::DataRuns, [&encode(1, runs)?, &[]]),
            ToDestination::Devices(devices) => to.write(FrameKind::Devices, [devices, &[]]),
            ToDestination::RoundEnd(end) => to.write(FrameKind::RoundEnd, [&encode(1, end)?, &[]]),
            ToDestination::State(state) => to.write(FrameKind::State, [state, &[]]),
            ToDestination::Commit(commit) => to.write(FrameKind::Commit, [&encode(1, commit)?, &[]]),
            ToDestination::Cancel { reason } => {
                to.write(FrameKind::Cancel, [&encode(1, truncate_reason(reason))?, &[]])
            }
        }
    }

    /// Reads the body of a frame whose header was just read.
    ///
    /// # Errors
    /// `Unexpected` for pages and for what only the destination sends, and all that a damaged record can be.
    pub fn read<R: Read>(header: &FrameHeader, from: &mut FrameReader<R>) -> Result<ToDestination, StreamError> {
        let body = read_body(header, from)?;
        let limit = header.kind.limit() as usize;
        Ok(match header.kind {
            FrameKind::Layout => ToDestination::Layout(decode("memory layout", 1, &body, limit)?),
            FrameKind::DataRuns => ToDestination::DataRuns(decode("data runs", 1, &body, limit)?),
            FrameKind::RoundEnd => ToDestination::RoundEnd(decode("round end", 1, &body, limit)?),
            FrameKind::State => ToDestination::State(body),
            FrameKind::Devices => ToDestination::Devices(body),
            FrameKind::Commit => ToDestination::Commit(decode("commit", 1, &body, limit)?),
            FrameKind::Cancel => ToDestination::Cancel { reason: decode("cancel", 1, &body, limit)? },
            found => return Err(StreamError::Unexpected { found, wanted: "a message of the source" }),
        })
    }
}

impl ToSource {
    /// Writes the message as one frame and returns its bytes on the wire.
    ///
    /// # Errors
    /// Errors of the transport.
    pub fn write<W: Write>(&self, to: &mut FrameWriter<W>) -> Result<u64, StreamError> {
        match self {
            ToSource::Accepted => to.write(FrameKind::Accepted, [&[], &[]]),
            ToSource::Ready => to.write(FrameKind::Ready, [&[], &[]]),
            ToSource::Started(started) => to.write(FrameKind::Started, [&encode(1, started)?, &[]]),
            ToSource::Failed { message } => to.write(FrameKind::Failed, [&encode(1, truncate_reason(message))?, &[]]),
            ToSource::Held(held) => {
                let held = Held { message: truncate_reason(&held.message).into(), ..*held };
                to.write(FrameKind::Held, [&encode(1, &held)?, &[]])
            }
            ToSource::Unknown => to.write(FrameKind::Unknown, [&[], &[]]),
        }
    }

    /// Reads the body of a frame whose header was just read.
    ///
    /// # Errors
    /// `Unexpected` for what only the source sends, and all that a damaged record can be.
    pub fn read<R: Read>(header: &FrameHeader, from: &mut FrameReader<R>) -> Result<ToSource, StreamError> {
        let body = read_body(header, from)?;
        let limit = header.kind.limit() as usize;
        Ok(match header.kind {
            FrameKind::Accepted => ToSource::Accepted,
            FrameKind::Ready => ToSource::Ready,
            FrameKind::Started => ToSource::Started(decode("started", 1, &body, limit)?),
            FrameKind::Failed => ToSource::Failed { message: decode("failed", 1, &body, limit)? },
            FrameKind::Held => ToSource::Held(decode("held", 1, &body, limit)?),
            FrameKind::Unknown => ToSource::Unknown,
            found => return Err(StreamError::Unexpected { found, wanted: "a message of the destination" }),
        })
    }

    /// Reads the next message.
    ///
    /// # Errors
    /// As `FrameReader::next_frame` and [`read`](Self::read).
    pub fn next<R: Read>(from: &mut FrameReader<R>) -> Result<ToSource, StreamError> {
        let header = from.next_frame()?;
        ToSource::read(&header, from)
    }
}

fn read_body<R: Read>(header: &FrameHeader, from: &mut FrameReader<R>) -> Result<Vec<u8>, StreamError> {
    let mut body = Vec::new();
    if header.kind != FrameKind::Pages {
        from.body(header, &mut body)?;
    }
    Ok(body)
}

/// Shortens a reason to 4096 bytes, so that it fits its frame.
fn truncate_reason(text: &str) -> &str {
    text.get(..text.floor_char_boundary(4096)).unwrap_or(text)
}

/// Merges adjacent regions.
fn merge_adjacent(regions: &[RegionLayout]) -> Result<Vec<(u64, u64)>, StreamError> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for region in regions {
        let start = region.gpa.0;
        let end = start.checked_add(region.size).filter(|end| *end > start);
        let end = end.ok_or_else(|| StreamError::Layout(format!("a region at {start:#x} is impossible")))?;
        match ranges.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            Some((_, last)) if *last > start => {
                return Err(StreamError::Layout(format!("regions at {start:#x} overlap or are out of order")));
            }
            _ => ranges.push((start, end)),
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::MigrationId;
    use crate::stream::frame::ChannelId;

    const ID: ChannelId = ChannelId { migration: MigrationId(1), channel: 0 };

    #[test]
    fn a_layout_contains_runs_across_adjacent_regions_but_not_across_holes() {
        let region = |gpa, pages| RegionLayout { gpa: GuestAddress(gpa * LOG_PAGE), size: pages * LOG_PAGE };
        let layout = MemoryLayout { regions: vec![region(1, 4), region(5, 5), region(20, 1)] };
        for inside in [1..2, 4..6, 1..10, 20..21, 9..10] {
            assert!(layout.contains(inside.clone().into()), "{inside:?}");
        }
        for outside in [0..1, 0..2, 9..11, 10..11, 19..21, 20..22, 1..21, 21..22, u64::MAX / 2..u64::MAX] {
            assert!(!layout.contains(outside.clone().into()), "{outside:?}");
        }
    }

    #[test]
    fn every_message_round_trips() {
        let layout = MemoryLayout { regions: vec![RegionLayout { gpa: GuestAddress(0), size: 4096 }] };
        let end = RoundEnd { round: 2, last: true, data_pages: 5, zero_pages: 6 };
        let out = [
            ToDestination::Layout(layout),
            ToDestination::RoundEnd(end),
            ToDestination::State(vec![1; 100_000]),
            ToDestination::Cancel { reason: "user".into() },
            ToDestination::Commit(Commit { run: true }),
        ];
        let mut writer = FrameWriter::new(Vec::new(), ID);
        for message in &out {
            message.write(&mut writer).unwrap();
        }
        let wire = writer.into_inner();
        let mut reader = FrameReader::new(wire.as_slice(), ID);
        for message in &out {
            let header = reader.next_frame().unwrap();
            assert_eq!(ToDestination::read(&header, &mut reader).unwrap(), *message);
        }
        let back = [
            ToSource::Accepted,
            ToSource::Ready,
            ToSource::Started(Started { observed_downtime_ns: Some(3), start_ns: 4 }),
            ToSource::Failed { message: "disk full".into() },
            ToSource::Held(Held { starting: false, message: "no lock".into() }),
            ToSource::Unknown,
        ];
        let mut writer = FrameWriter::new(Vec::new(), ID);
        for message in &back {
            message.write(&mut writer).unwrap();
        }
        let wire = writer.into_inner();
        let mut reader = FrameReader::new(wire.as_slice(), ID);
        for message in &back {
            assert_eq!(ToSource::next(&mut reader).unwrap(), *message);
        }
        let mut reader = FrameReader::new(wire.as_slice(), ID);
        let header = reader.next_frame().unwrap();
        let wrong_way = ToDestination::read(&header, &mut reader);
        assert!(matches!(wrong_way, Err(StreamError::Unexpected { found: FrameKind::Accepted, .. })));
    }

    #[test]
    fn a_long_reason_is_truncated_and_sent() {
        let mut writer = FrameWriter::new(Vec::new(), ID);
        ToSource::Failed { message: "é".repeat(100_000) }.write(&mut writer).unwrap();
        let wire = writer.into_inner();
        let ToSource::Failed { message } = ToSource::next(&mut FrameReader::new(wire.as_slice(), ID)).unwrap() else {
            panic!("another message");
        };
        assert_eq!(message, "é".repeat(2048));
    }

    #[test]
    fn an_impossible_layout_is_an_error() {
        for regions in [vec![(0, 0)], vec![(u64::MAX, 4096)], vec![(4096, 4096), (0, 4096)], vec![(0, 8192), (4096, 1)]]
        {
            let regions: Vec<_> =
                regions.into_iter().map(|(gpa, size)| RegionLayout { gpa: GuestAddress(gpa), size }).collect();
            assert!(merge_adjacent(&regions).is_err());
        }
    }

    #[test]
    fn a_layout_of_more_regions_than_a_guest_has_is_refused() {
        let layout =
            |count| MemoryLayout { regions: vec![RegionLayout { gpa: GuestAddress(0), size: LOG_PAGE }; count] };
        layout(MAX_REGIONS).check_regions().unwrap();
        let why = layout(MAX_REGIONS + 1).check_regions().unwrap_err().to_string();
        assert!(why.contains("510 regions"), "{why}");
    }
}
