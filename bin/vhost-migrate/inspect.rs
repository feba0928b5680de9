//! `vhost-migrate inspect`: what a saved dirty log, inflight region or stream holds.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use vhost_migrate::abi::inflight::{PackedEntry, PackedHeader, SplitEntry, SplitHeader};
use vhost_migrate::abi::virtio::PACKED_DESC_F_USED;
use vhost_migrate::dirty::PageSet;
use vhost_migrate::inflight::{Kind as RingKind, recover, recover_packed};
use vhost_migrate::memory::LOG_PAGE;
use vhost_migrate::ring::RingBase;
use vhost_migrate::stream::frame::ConnectionHeader;
use vhost_migrate::stream::hashes::pages_in;
use vhost_migrate::stream::pages::Batch;
use vhost_migrate::stream::{ChannelId, FrameReader, Kind, StreamError, ToDestination};
use zerocopy::FromBytes;

use crate::units::show;

/// Look into a saved dirty log, inflight region or stream
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate inspect log /proc/PID/fd/N         the shared log of a running back-end
  vhost-migrate inspect inflight /proc/PID/fd/N --queues 2 --queue-size 256 --used 0:1234
  vhost-migrate inspect stream guest.vhm           every frame is checked

Exit status: 0 if what was found can be true, 1 if not.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
    /// Print one JSON object
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// The pages marked in a dirty log: one bit for each 4 KiB of guest memory
    Log {
        /// The log's bytes
        file: PathBuf,
        /// Most runs of pages to list
        #[arg(long, default_value_t = 20)]
        runs: usize,
    },
    /// The requests in flight in a region, and what a restarted back-end would do
    Inflight {
        /// The region's bytes
        file: PathBuf,
        /// Queues of the region
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        queues: u16,
        /// Entries of each queue; found from the region if left out
        #[arg(long)]
        queue_size: Option<u16>,
        /// The used index in a queue's ring, as QUEUE:INDEX; without it the region's own is taken
        #[arg(long, value_name = "QUEUE:INDEX", value_parser = used_index)]
        used: Vec<(u16, u16)>,
        /// The region is for packed rings
        #[arg(long, conflicts_with = "used")]
        packed: bool,
        /// A queue whose last batch stands in its packed ring; without it a batch under way is taken for lost
        #[arg(long, value_name = "QUEUE", requires = "packed")]
        published: Vec<u16>,
    },
    /// The frames of a migration saved to a file
    Stream {
        /// The stream
        file: PathBuf,
    },
}

fn used_index(text: &str) -> Result<(u16, u16), String> {
    let pair = text.split_once(':').and_then(|(queue, index)| Some((queue.parse().ok()?, index.parse().ok()?)));
    pair.ok_or_else(|| format!("'{text}' is not QUEUE:INDEX, for example 0:1234"))
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let found = match &arguments.what {
        What::Log { file, runs } => log(file, *runs),
        What::Inflight { file, queues, queue_size, packed: true, published, .. } => {
            packed(file, *queues, *queue_size, published)
        }
        What::Inflight { file, queues, queue_size, used, .. } => inflight(file, *queues, *queue_size, used),
        What::Stream { file } => stream(file),
    };
    match found {
        Ok(Found { text, json }) => {
            if arguments.json {
                println!("{json}");
            } else {
                text.iter().for_each(|line| println!("{line}"));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("inspect: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Found {
    text: Vec<String>,
    json: Value,
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))
}

fn log(file: &Path, most: usize) -> Result<Found, String> {
    let bytes = read(file)?;
    let mut pages = PageSet::new(bytes.len() as u64 * 8);
    for (at, byte) in (0u64..).zip(&bytes) {
        for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
            pages.insert(at * 8 + bit);
        }
    }
    let runs: Vec<Range<u64>> = pages.runs().collect();
    let covers = bytes.len() as u64 * 8 * LOG_PAGE;
    let dirty = pages.len() * LOG_PAGE;
    let mut text = vec![format!(
        "{} bytes, for guest memory up to {covers:#x} ({}): {} pages dirty ({}) in {} runs",
        bytes.len(),
        show(covers as f64),
        pages.len(),
        show(dirty as f64),
        runs.len()
    )];
    let line = |run: &Range<u64>| {
        let count = run.end - run.start;
        format!("  {:#014x}..{:#014x}  {count} pages", run.start * LOG_PAGE, run.end * LOG_PAGE)
    };
    text.extend(runs.iter().take(most).map(line));
    if runs.len() > most {
        text.push(format!("  … {} more runs (--runs {})", runs.len() - most, runs.len()));
    }
    let list: Vec<Value> =
        runs.iter().take(most).map(|run| json!({"gpa": run.start * LOG_PAGE, "pages": run.end - run.start})).collect();
    let json =
        json!({"log_bytes": bytes.len(), "pages": pages.len(), "bytes": dirty, "runs": runs.len(), "first": list});
    Ok(Found { text, json })
}

fn inflight(file: &Path, queues: u16, queue_size: Option<u16>, used: &[(u16, u16)]) -> Result<Found, String> {
    let bytes = read(file)?;
    let (mut text, mut list) = (Vec::new(), Vec::new());
    let queue_size =
        queue_size.map_or_else(|| Ok(header_of::<SplitHeader>(&bytes)?.desc_num.get()), Ok::<_, String>)?;
    for queue in 0..queues {
        let part = part_of(&bytes, RingKind::Split, queue, queue_size)?;
        let header: SplitHeader = header_of(part)?;
        let used_idx = used.iter().find(|(of, _)| *of == queue).map_or(header.used_idx.get(), |(_, index)| *index);
        let recovery = recover(part, used_idx, queue_size).map_err(|error| format!("queue {queue}: {error}"))?;
        text.push(format!(
            "queue {queue}: version {}, {} entries, used index {} in the region and {used_idx} in the ring, last batch at {}",
            header.version.get(),
            header.desc_num.get(),
            header.used_idx.get(),
            header.last_batch_head.get()
        ));
        let resubmit: Vec<Value> = recovery
            .resubmit
            .iter()
            .map(|&head| {
                let counter = entry_of::<SplitHeader, SplitEntry>(part, head).map_or(0, |entry| entry.counter.get());
                text.push(format!("  head {head:>5}  counter {counter}: would be executed again"));
                json!({"head": head, "counter": counter})
            })
            .collect();
        match recovery.next_avail {
            Some(next) => text.push(format!("  {} in flight; goes on at avail index {next}", resubmit.len())),
            None => text.push("  fresh: nothing in flight; goes on where the front-end says".into()),
        }
        list.push(json!({
            "queue": queue,
            "version": header.version.get(),
            "desc_num": header.desc_num.get(),
            "region_used_idx": header.used_idx.get(),
            "ring_used_idx": used_idx,
            "next_avail": recovery.next_avail,
            "resubmit": resubmit,
        }));
    }
    Ok(Found { text, json: json!({"queues": list}) })
}

fn packed(file: &Path, queues: u16, queue_size: Option<u16>, published: &[u16]) -> Result<Found, String> {
    let bytes = read(file)?;
    let (mut text, mut list) = (Vec::new(), Vec::new());
    let queue_size =
        queue_size.map_or_else(|| Ok(header_of::<PackedHeader>(&bytes)?.desc_num.get()), Ok::<_, String>)?;
    for queue in 0..queues {
        let part = part_of(&bytes, RingKind::Packed, queue, queue_size)?;
        let header: PackedHeader = header_of(part)?;
        // The ring itself is not at hand: its descriptors look as they are said to.
        let used = (header.old_used_wrap_counter == 1) == published.contains(&queue);
        let flags = u16::from(used) << PACKED_DESC_F_USED;
        let recovery = recover_packed(part, queue_size, queue_size, RingBase::default(), |_| flags)
            .map_err(|error| format!("queue {queue}: {error}"))?;
        let [now, committed] = [
            (header.used_idx.get(), header.used_wrap_counter),
            (header.old_used_idx.get(), header.old_used_wrap_counter),
        ];
        text.push(format!(
            "queue {queue}: version {}, {} entries, used position {} wrap {}, committed {} wrap {}",
            header.version.get(),
            header.desc_num.get(),
            now.0,
            now.1,
            committed.0,
            committed.1
        ));
        let resubmit: Vec<Value> = recovery
            .resubmit
            .iter()
            .map(|request| {
                let (entry, descs) = (request.entry, request.descs.len());
                let counter = entry_of::<PackedHeader, PackedEntry>(part, entry).map_or(0, |entry| entry.counter.get());
                let id = request.descs.last().map_or(0, |desc| desc.id.get());
                text.push(format!(
                    "  entry {entry:>5}  counter {counter}, buffer {id}, {descs} descriptors: would be executed again"
                ));
                json!({"entry": entry, "counter": counter, "id": id, "descriptors": descs})
            })
            .collect();
        match recovery.base {
            Some(base) => text.push(format!("  {} in flight; goes on at base {base:?}", resubmit.len())),
            None => text.push("  fresh: nothing in flight; goes on where the front-end says".into()),
        }
        list.push(json!({
            "queue": queue,
            "version": header.version.get(),
            "desc_num": header.desc_num.get(),
            "used_idx": now.0,
            "used_wrap_counter": now.1,
            "old_used_idx": committed.0,
            "old_used_wrap_counter": committed.1,
            "base": recovery.base.map(RingBase::bits),
            "resubmit": resubmit,
        }));
    }
    Ok(Found { text, json: json!({"queues": list}) })
}

fn part_of(bytes: &[u8], kind: RingKind, queue: u16, queue_size: u16) -> Result<&[u8], String> {
    let stride = kind.queue_bytes(queue_size) as usize;
    bytes.get(usize::from(queue) * stride..).and_then(|rest| rest.get(..stride)).ok_or_else(|| {
        format!(
            "queue {queue} of {queue_size} entries lies outside the {} bytes: pass --queues and --queue-size as the \
             device had them",
            bytes.len()
        )
    })
}

fn header_of<H: FromBytes>(bytes: &[u8]) -> Result<H, String> {
    let (header, _) =
        H::read_from_prefix(bytes).map_err(|_| format!("{} bytes are too few for an inflight region", bytes.len()))?;
    Ok(header)
}

fn entry_of<H, E: FromBytes>(part: &[u8], index: u16) -> Option<E> {
    let rest = part.get(size_of::<H>() + usize::from(index) * size_of::<E>()..)?;
    Some(E::read_from_prefix(rest).ok()?.0)
}

fn stream(file: &Path) -> Result<Found, String> {
    let open = File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut bytes = BufReader::with_capacity(1 << 20, open);
    let told = |error: StreamError| format!("{}: {error}", file.display());
    let header = ConnectionHeader::read(&mut bytes).map_err(told)?;
    let mut reader = FrameReader::new(bytes, ChannelId { migration: header.id, channel: header.channel });
    let mut text = vec![format!("migration {}, channel {} of {}", header.id, header.channel, header.channels)];
    let (mut frames, mut data_pages, mut zero_pages, mut rounds, mut state_bytes) = (0u64, 0, 0, 0u32, 0);
    let (mut committed, mut hashed_pages) = (false, 0);
    let mut body = Vec::new();
    loop {
        let frame = match reader.next_frame() {
            Ok(frame) => frame,
            Err(StreamError::Ended) => break,
            Err(error) => return Err(told(error)),
        };
        frames += 1;
        if frame.kind == Kind::Pages {
            reader.body(&frame, &mut body).map_err(told)?;
            let batch = Batch::parse(&body).map_err(told)?;
            data_pages += batch.data_pages();
            zero_pages += batch.zero_pages();
            continue;
        }
        if frame.kind == Kind::Hashes {
            reader.body(&frame, &mut body).map_err(told)?;
            hashed_pages += pages_in(&body).map_err(told)?;
            continue;
        }
        match ToDestination::read(&frame, &mut reader).map_err(told)? {
            ToDestination::Layout(layout) => {
                for region in &layout.regions {
                    text.push(format!("  region {:#x}, {}", region.gpa, show(region.size as f64)));
                }
            }
            ToDestination::DataRuns(data) => {
                let pages: u64 = data.runs.iter().map(|run| run.end.saturating_sub(run.start)).sum();
                text.push(format!("  {pages} pages in use at the start, in {} runs", data.runs.len()));
            }
            ToDestination::RoundEnd(end) => {
                rounds += 1;
                text.push(format!(
                    "  round {}: {} pages with contents, {} zero{}",
                    end.round,
                    end.data_pages,
                    end.zero_pages,
                    if end.last { ", the last" } else { "" }
                ));
            }
            ToDestination::State(state) => {
                state_bytes = state.len();
                text.push(format!("  state of {state_bytes} bytes"));
            }
            ToDestination::Commit(_) => {
                committed = true;
                text.push("  commit".into());
            }
            ToDestination::Cancel { reason } => text.push(format!("  cancelled: {reason}")),
        }
    }
    if hashed_pages > 0 {
        text.push(format!("  hashes of {hashed_pages} pages, to verify them by"));
    }
    // Nothing may follow.
    let mut rest = Vec::new();
    let left = reader.get_mut().read_to_end(&mut rest).map_err(|error| error.to_string())?;
    text.push(format!(
        "{frames} frames, all checksums right: {data_pages} pages with contents and {zero_pages} zero in {rounds} rounds"
    ));
    if !committed || left > 0 {
        return Err(format!("{}: no commit at the end: this guest can't be restored from it", file.display()));
    }
    let json = json!({
        "migration": header.id.to_string(), "channels": header.channels, "frames": frames, "rounds": rounds,
        "data_pages": data_pages, "zero_pages": zero_pages, "hashed_pages": hashed_pages, "state_bytes": state_bytes,
        "committed": committed,
    });
    Ok(Found { text, json })
}
