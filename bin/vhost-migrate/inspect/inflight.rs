//! `inspect inflight`: lists the requests in an inflight region that a restarted back-end would resubmit.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};
use vhost_migrate::abi::inflight::{PackedEntry, PackedHeader, QUEUE_ALIGN, SplitEntry, SplitHeader};
use vhost_migrate::abi::virtio::{MAX_QUEUE_SIZE, PACKED_DESC_F_USED};
use vhost_migrate::inflight::{RingKind, recover_packed, recover_split};
use vhost_migrate::ring::RingBase;
use vhost_migrate::unstable::with_causes;
use zerocopy::FromBytes;

use super::{Inspection, LinePrinter, open};
use crate::wrong_arguments;

/// Arguments for decoding the region.
#[derive(Debug, clap::Args)]
pub(super) struct RegionArguments {
    /// Queues of the region
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    queues: u16,
    /// Size of each queue; by default taken from the region, or from its size while no queue has been used
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUE_SIZE)))]
    queue_size: Option<u16>,
    /// Used index of a queue's ring, as QUEUE:INDEX; by default the region's own
    #[arg(long, value_name = "QUEUE:INDEX", value_parser = used_index)]
    used: Vec<(u16, u16)>,
    /// The region is for packed rings
    #[arg(long, conflicts_with = "used")]
    packed: bool,
    /// A queue whose last batch is in its packed ring; without it a batch under way counts as lost
    #[arg(long, value_name = "QUEUE", requires = "packed")]
    published: Vec<u16>,
    /// Maximum number of requests to list, of all queues together
    #[arg(long, default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    requests: u32,
}

impl RegionArguments {
    /// Returns the arguments for the region of a log that has these queues.
    pub(super) fn of_log(queues: u16, queue_size: u16, packed: bool, requests: u32) -> RegionArguments {
        let queue_size = Some(queue_size);
        RegionArguments { queues, queue_size, used: Vec::new(), packed, published: Vec::new(), requests }
    }
}

fn used_index(text: &str) -> Result<(u16, u16), String> {
    let pair = text.split_once(':').and_then(|(queue, index)| Some((queue.parse().ok()?, index.parse().ok()?)));
    pair.ok_or_else(|| format!("'{text}' is not QUEUE:INDEX, for example 0:1234"))
}

pub(super) fn inspect(file: &Path, region: &RegionArguments, lines: &LinePrinter) -> Result<Inspection, String> {
    let named = region.used.iter().map(|(queue, _)| queue).chain(&region.published);
    if let Some(queue) = named.copied().find(|queue| *queue >= region.queues) {
        wrong_arguments(format!("there is no queue {queue}: the region has {} (--queues)", region.queues));
    }
    let bytes = RegionFile::open(open(file)?).map_err(|error| format!("{}: {error}", file.display()))?;
    let queues = list_queues(&bytes, region, lines).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(json!({"queues": queues}).into())
}

/// Prints and returns what is in flight in each queue of a region.
pub(super) fn list_queues(
    bytes: &RegionFile,
    region: &RegionArguments,
    lines: &LinePrinter,
) -> Result<Vec<Value>, String> {
    if region.packed { packed(bytes, region, lines) } else { split(bytes, region, lines) }
}

/// Limits the number of listed requests.
struct RequestList {
    left: u32,
}

impl RequestList {
    /// Prints and returns `requests` up to the limit. `describe` formats the line and the JSON of one request.
    fn list<T>(
        &mut self,
        requests: &[T],
        lines: &LinePrinter,
        mut describe: impl FnMut(&T) -> (String, Value),
    ) -> Vec<Value> {
        let most = requests.len().min(self.left as usize);
        self.left -= most as u32;
        let list = requests.iter().take(most).map(|request| {
            let (line, json) = describe(request);
            lines.print(format_args!("  {line}: would be executed again"));
            json
        });
        let list = list.collect();
        if most < requests.len() {
            lines.print(format_args!("  … {} more (--requests)", requests.len() - most));
        }
        list
    }
}

fn split(bytes: &RegionFile, region: &RegionArguments, lines: &LinePrinter) -> Result<Vec<Value>, String> {
    let (mut list, mut listed) = (Vec::new(), RequestList { left: region.requests });
    let size_in_header = bytes.read_header::<SplitHeader>()?.desc_num.get();
    let queue_size = bytes.queue_size(RingKind::Split, region, size_in_header)?;
    for queue in 0..region.queues {
        let part = bytes.read_queue(RingKind::Split, queue, queue_size)?;
        let header: SplitHeader = parse_header(&part)?;
        let given = region.used.iter().find(|(of, _)| *of == queue);
        let used_idx = given.map_or(header.used_idx.get(), |(_, index)| *index);
        let recovery = recover_split(&part, used_idx, queue_size)
            .map_err(|error| format!("queue {queue}: {}", with_causes(&error)))?;
        lines.print(format_args!(
            "queue {queue}: version {}, {} entries, used index {} in the region and {used_idx} in the ring, last batch at {}",
            header.version.get(),
            header.desc_num.get(),
            header.used_idx.get(),
            header.last_batch_head.get()
        ));
        let resubmit = listed.list(&recovery.resubmit, lines, |&head| {
            let counter = parse_entry::<SplitHeader, SplitEntry>(&part, head).map_or(0, |entry| entry.counter.get());
            (format!("head {head:>5}  counter {counter}"), json!({"head": head, "counter": counter}))
        });
        print_in_flight(
            lines,
            queue_size,
            recovery.resubmit.len(),
            recovery.next_avail.map(|next| format!("avail index {next}")),
        );
        list.push(json!({
            "queue": queue,
            "version": header.version.get(),
            "desc_num": header.desc_num.get(),
            "region_used_idx": header.used_idx.get(),
            "ring_used_idx": used_idx,
            "next_avail": recovery.next_avail,
            "in_flight": recovery.resubmit.len(),
            "resubmit": resubmit,
        }));
    }
    Ok(list)
}

fn packed(bytes: &RegionFile, region: &RegionArguments, lines: &LinePrinter) -> Result<Vec<Value>, String> {
    let (mut list, mut listed) = (Vec::new(), RequestList { left: region.requests });
    let size_in_header = bytes.read_header::<PackedHeader>()?.desc_num.get();
    let queue_size = bytes.queue_size(RingKind::Packed, region, size_in_header)?;
    for queue in 0..region.queues {
        let part = bytes.read_queue(RingKind::Packed, queue, queue_size)?;
        let header: PackedHeader = parse_header(&part)?;
        // The ring itself is not available. The flags of its descriptors are derived from the arguments.
        let used = (header.old_used_wrap_counter == 1) == region.published.contains(&queue);
        let flags = u16::from(used) << PACKED_DESC_F_USED;
        let recovery = recover_packed(&part, queue_size, queue_size, RingBase::default(), |_| flags)
            .map_err(|error| format!("queue {queue}: {}", with_causes(&error)))?;
        let now = (header.used_idx.get(), header.used_wrap_counter);
        let committed = (header.old_used_idx.get(), header.old_used_wrap_counter);
        lines.print(format_args!(
            "queue {queue}: version {}, {} entries, used position {} wrap {}, committed {} wrap {}",
            header.version.get(),
            header.desc_num.get(),
            now.0,
            now.1,
            committed.0,
            committed.1
        ));
        let resubmit = listed.list(&recovery.resubmit, lines, |request| {
            let (entry, descs) = (request.entry, request.descs.len());
            let counter = parse_entry::<PackedHeader, PackedEntry>(&part, entry).map_or(0, |entry| entry.counter.get());
            let id = request.descs.last().map_or(0, |desc| desc.id.get());
            (
                format!("entry {entry:>5}  counter {counter}, buffer {id}, {descs} descriptors"),
                json!({"entry": entry, "counter": counter, "id": id, "descriptors": descs}),
            )
        });
        print_in_flight(lines, queue_size, recovery.resubmit.len(), recovery.base.map(|base| format!("base {base:?}")));
        list.push(json!({
            "queue": queue,
            "version": header.version.get(),
            "desc_num": header.desc_num.get(),
            "used_idx": now.0,
            "used_wrap_counter": now.1,
            "old_used_idx": committed.0,
            "old_used_wrap_counter": committed.1,
            "base": recovery.base.map(RingBase::bits),
            "in_flight": recovery.resubmit.len(),
            "resubmit": resubmit,
        }));
    }
    Ok(list)
}

fn print_in_flight(lines: &LinePrinter, queue_size: u16, count: usize, goes_on: Option<String>) {
    match goes_on {
        Some(at) => lines.print(format_args!("  {count} in flight; goes on at {at}")),
        // Rule I7.1. A file of zeros can't be told from a region that was never used.
        None => lines.print(format_args!(
            "  version 0: never used, or reset. Nothing is in flight; room for {queue_size} entries; goes on where the \
             front-end says"
        )),
    }
}

/// A region file, read one queue at a time.
pub(super) struct RegionFile {
    file: File,
    /// Offset of the region, bytes.
    start: u64,
    len: u64,
}

impl RegionFile {
    fn open(file: File) -> Result<RegionFile, String> {
        RegionFile::after(file, 0)
    }

    /// Opens the region that follows the first `start` bytes of a file.
    pub(super) fn after(mut file: File, start: u64) -> Result<RegionFile, String> {
        let end = file.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
        let len = end.saturating_sub(start);
        match len > 0 && len.is_multiple_of(QUEUE_ALIGN) {
            true => Ok(RegionFile { file, start, len }),
            false => Err(format!(
                "{len} bytes are no inflight region: it has a part for each queue, of a multiple of {QUEUE_ALIGN} bytes"
            )),
        }
    }

    /// Returns the size of each queue. `size_in_header` is the size in the first queue's header, or 0 if that queue was
    /// not used.
    fn queue_size(&self, kind: RingKind, region: &RegionArguments, size_in_header: u16) -> Result<u16, String> {
        let mut sizes = (1..=MAX_QUEUE_SIZE as u16).filter(|size| kind == RingKind::Packed || size.is_power_of_two());
        let fits = |size: &u16| kind.queue_bytes(*size) * u64::from(region.queues) == self.len;
        match (region.queue_size, size_in_header) {
            (Some(size), _) => Ok(size),
            (None, 0) => sizes.rfind(fits).ok_or_else(|| {
                let RegionFile { len, .. } = self;
                format!(
                    "no queue has been used, which would tell its size, and no queue size makes a region of {len} bytes with \
                     --queues {}: pass --queues and --queue-size as the device had them",
                    region.queues
                )
            }),
            (None, size_in_header) => Ok(size_in_header),
        }
    }

    fn read_header<H: FromBytes>(&self) -> Result<H, String> {
        let mut bytes = vec![0; size_of::<H>()];
        let read = self.file.read_exact_at(&mut bytes, self.start);
        read.map_err(|error| format!("no header of an inflight region can be read: {error}"))?;
        parse_header(&bytes)
    }

    fn read_queue(&self, kind: RingKind, queue: u16, queue_size: u16) -> Result<Vec<u8>, String> {
        let stride = kind.queue_bytes(queue_size);
        let mut bytes = vec![0; stride as usize];
        self.file.read_exact_at(&mut bytes, self.start + u64::from(queue) * stride).map_err(|error| {
            format!(
                "queue {queue} of {queue_size} entries can't be read ({error}): pass --queues and --queue-size as the \
                 device had them"
            )
        })?;
        Ok(bytes)
    }
}

fn parse_header<H: FromBytes>(bytes: &[u8]) -> Result<H, String> {
    let (header, _) =
        H::read_from_prefix(bytes).map_err(|_| format!("{} bytes are too few for an inflight region", bytes.len()))?;
    Ok(header)
}

fn parse_entry<H, E: FromBytes>(part: &[u8], index: u16) -> Option<E> {
    let rest = part.get(size_of::<H>() + usize::from(index) * size_of::<E>()..)?;
    Some(E::read_from_prefix(rest).ok()?.0)
}
