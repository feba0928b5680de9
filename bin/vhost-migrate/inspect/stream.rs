//! `inspect stream`: lists the frames of a saved migration and checks that a guest can be restored from them: every
//! needed frame must be present, in order and complete.

use std::io::{BufReader, Seek};
use std::path::Path;

use serde_json::{Value, json};
use vhost_migrate::abi::vhost_user::DiskGeneration;
use vhost_migrate::stream::{FrameKind, PageStats, StreamError};
use vhost_migrate::unstable::guest::decode_saved_disks;
use vhost_migrate::unstable::stream::frame::{ChannelId, ConnectionHeader, FrameReader};
use vhost_migrate::unstable::stream::hashes::count_pages;
use vhost_migrate::unstable::stream::pages::PageBatch;
use vhost_migrate::unstable::stream::record::{MemoryLayout, ToDestination};
use vhost_migrate::unstable::with_causes;

use super::{Inspection, LinePrinter, open};
use crate::units::format_bytes;

/// The frame that a restore needs next.
#[derive(Clone, Copy, PartialEq)]
enum ExpectedFrame {
    Layout,
    Pages,
    State,
    Commit,
}

impl ExpectedFrame {
    fn name(self) -> &'static str {
        match self {
            ExpectedFrame::Layout => "memory layout",
            ExpectedFrame::Pages => "end of the last round",
            ExpectedFrame::State => "state",
            ExpectedFrame::Commit => "commit",
        }
    }
}

pub(super) fn inspect(file: &Path, lines: &LinePrinter) -> Result<Inspection, String> {
    let with_path = |error: StreamError| format!("{}: {}", file.display(), with_causes(&error));
    let lacks = |what: &str| format!("{}: {what}: no guest can be restored from it", file.display());
    let mut bytes = BufReader::with_capacity(1 << 20, open(file)?);
    let header = ConnectionHeader::read(&mut bytes).map_err(with_path)?;
    let mut reader = FrameReader::new(bytes, ChannelId { migration: header.id, channel: header.channel });
    lines.print(format_args!(
        "stream version {}, migration {}, channel {} of {}",
        header.version, header.id, header.channel, header.channels
    ));
    let mut due = ExpectedFrame::Layout;
    let mut layout = MemoryLayout { regions: Vec::new() };
    let (mut pages, mut round) = (PageStats::default(), PageStats::default());
    let (mut frames, mut rounds, mut hashed_pages, mut state_bytes) = (0u64, 0u64, 0, 0);
    let mut body = Vec::new();
    let mut disks = None;
    loop {
        let frame = match reader.next_frame() {
            Ok(frame) => frame,
            Err(StreamError::Ended) => return Err(lacks(&format!("it ends without a {}", due.name()))),
            Err(error) => return Err(with_path(error)),
        };
        frames += 1;
        let wanted = match frame.kind {
            FrameKind::Layout => ExpectedFrame::Layout,
            FrameKind::DataRuns | FrameKind::Devices | FrameKind::Pages | FrameKind::Hashes | FrameKind::RoundEnd => {
                ExpectedFrame::Pages
            }
            FrameKind::State => ExpectedFrame::State,
            FrameKind::Commit => ExpectedFrame::Commit,
            _ => due,
        };
        if wanted != due {
            return Err(lacks(&format!("frame {} is a {}, and its {} is missing", frames - 1, frame.kind, due.name())));
        }
        match frame.kind {
            FrameKind::Pages => {
                reader.body(&frame, &mut body).map_err(with_path)?;
                let batch = PageBatch::parse(&body).map_err(with_path)?;
                if let Some(entry) = batch.entries.iter().find(|entry| !layout.contains(entry.pages)) {
                    return Err(with_path(StreamError::OutsideMemory { pages: entry.pages }));
                }
                round.data_pages += batch.data_pages();
                round.zero_pages += batch.zero_pages();
                continue;
            }
            FrameKind::Hashes => {
                reader.body(&frame, &mut body).map_err(with_path)?;
                hashed_pages += count_pages(&body).map_err(with_path)?;
                continue;
            }
            FrameKind::State => {
                reader.beginning(&frame, &mut body).map_err(with_path)?;
                state_bytes = frame.length;
                lines.print(format_args!("  state of {state_bytes} bytes"));
                disks = decode_saved_disks(&body);
                for (number, disk) in disks.iter().flatten().enumerate() {
                    match disk {
                        Some(disk) => lines.print(format_args!(
                            "  disk {number}: {:032x}, generation {:032x}",
                            disk.identity, disk.generation
                        )),
                        None => {
                            lines.print(format_args!("  disk {number}: not known, so that a restore can't compare it"))
                        }
                    }
                }
                due = ExpectedFrame::Commit;
                continue;
            }
            _ => {}
        }
        match ToDestination::read(&frame, &mut reader).map_err(with_path)? {
            ToDestination::Layout(found) => {
                for region in &found.regions {
                    lines.print(format_args!("  region {:#x}, {}", region.gpa.0, format_bytes(region.size as f64)));
                }
                layout = found;
                due = ExpectedFrame::Pages;
            }
            ToDestination::DataRuns(data) => {
                let pages: u64 = data.runs.iter().map(|run| run.end.saturating_sub(run.start)).sum();
                lines.print(format_args!("  {pages} pages in use at the start, in {} runs", data.runs.len()));
            }
            ToDestination::Devices(devices) => {
                lines.print(format_args!("  devices described in {} bytes", devices.len()));
            }
            ToDestination::RoundEnd(end) => {
                end.check_received(&round).map_err(with_path)?;
                pages += std::mem::take(&mut round);
                rounds += 1;
                let last = if end.last { ", the last" } else { "" };
                let (number, data, zero) = (end.round, end.data_pages, end.zero_pages);
                lines.print(format_args!("  round {number}: {data} pages with contents, {zero} zero{last}"));
                if end.last {
                    due = ExpectedFrame::State;
                }
            }
            ToDestination::Commit(_) => break,
            ToDestination::Cancel { reason } => return Err(lacks(&format!("the migration was cancelled ({reason})"))),
            ToDestination::State(_) => {}
        }
    }
    lines.print(format_args!("  commit"));
    if header.channels > 1 {
        return Err(lacks(&format!("it is one of {} channels", header.channels)));
    }
    let PageStats { data_pages, zero_pages, .. } = pages;
    if hashed_pages > 0 {
        lines.print(format_args!("  hashes of {hashed_pages} pages, to verify them by"));
    }
    lines.print(format_args!(
        "{frames} frames, complete, all checksums right: {data_pages} pages with contents and {zero_pages} zero in {rounds} rounds"
    ));
    // The stream ends with its commit. A device may contain older data after it.
    let rest = unread_bytes(reader.into_inner());
    if let Some(rest) = rest.filter(|rest| *rest > 0) {
        lines.print(format_args!("{rest} bytes follow, which are not part of it"));
    }
    let json = json!({
        "migration": header.id.to_string(), "channels": header.channels, "frames": frames, "rounds": rounds,
        "data_pages": data_pages, "zero_pages": zero_pages, "hashed_pages": hashed_pages, "state_bytes": state_bytes,
        "committed": true, "bytes_after": rest, "disks": disks.map(|disks| disks_to_json(&disks)),
    });
    Ok(json.into())
}

/// Formats 128-bit numbers as text, because not every JSON parser supports them.
fn disks_to_json(disks: &[Option<DiskGeneration>]) -> Value {
    let hex = |number| format!("{number:032x}");
    let json = |disk: &DiskGeneration| json!({"identity": hex(disk.identity), "generation": hex(disk.generation)});
    disks.iter().map(|disk| disk.as_ref().map_or(Value::Null, json)).collect()
}

/// Returns the number of bytes of the file that were not read; `None` if unknown.
fn unread_bytes(mut bytes: BufReader<std::fs::File>) -> Option<u64> {
    let at = bytes.stream_position().ok()?;
    let metadata = bytes.get_ref().metadata().ok()?;
    metadata.is_file().then(|| metadata.len().saturating_sub(at))
}
