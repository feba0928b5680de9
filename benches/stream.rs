//! Throughput of page batches and complete streams: encode, decode, and end to end over unix and tcp, for three images,
//! compared with copying and with the sockets alone. Prints a table of guest GB/s, medians of interleaved runs.
//!
//! ```text
//! cargo bench --bench stream [-- --size-mib 1024 --runs 5 --cpu-time 1 --only unix]
//! cargo bench --bench stream -- --image data|mix|zero PATH [--size-mib 1024 --used-mib 1024]     write an image, to feed a
//!                                                                                     peer with it
//! cargo bench --bench stream -- --untouched 1 --size-mib 4096 --used-mib 1024     one whole migration, milliseconds
//! ```
//! With `--used-mib`, the guest and the image have runs of 16 MiB of data, and holes between them. `--untouched` migrates
//! the `data` image over a UNIX socket, into memory that was never accessed. `--cpu-time 1` divides by the CPU time of all
//! threads of both sides instead of the elapsed time: GB per core second, which other load on the machine changes less.
//!
//! Images consist of 4096-byte pages. Page `p` has 512 words `w`, with `r = splitmix64(512 p + w)`:
//! - `data`: word `w` is `r` if `w % 16 < 5`, otherwise the text word `TEXT[w % 8]`. zstd:1 compresses it to a third.
//! - `mix`: as `data`, but page `p` is zero if `splitmix64(p) % 10 < 4`, so zero and data pages alternate at random.
//! - `zero`: only zeros.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::single_range_in_vec_init, missing_docs)]

use std::hint::black_box;
use std::io::{IoSlice, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::time::{ClockId, clock_gettime};

use vhost_migrate::dirty::{DirtySource, UnionSource};
use vhost_migrate::guest::make_memory;
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, Region, UserAddress, sealed_memfd};
use vhost_migrate::migrate::{
    IncomingVm, MigrationParameters, Outcomes, RegionLayout, SWITCHOVER_TIMEOUT, SourceVm, VmError, migrate, receive,
};
use vhost_migrate::stream::{
    CancelToken, Codec, MigrationId, StreamError, StreamListener, StreamOptions, Uri, connect,
};
use vhost_migrate::unstable::stream::frame::{ChannelId, FrameReader, FrameWriter};
use vhost_migrate::unstable::stream::pages::{IncomingMemory, PageDecoder, PageEncoder, runs_of_channel};

const TEXT: [&[u8; 8]; 8] =
    [b"guest   ", b"memory  ", b"is mostl", b"y text, ", b"pointers", b" and zer", b"o bytes ", b"in rows\n"];
const CHANNELS: u16 = 2;
const ID: ChannelId = ChannelId { migration: MigrationId(1), channel: 0 };
const IMAGES: [&str; 3] = ["data", "mix", "zero"];

static CPU_TIME: AtomicBool = AtomicBool::new(false);

fn seconds() -> f64 {
    let cpu = CPU_TIME.load(Ordering::Relaxed);
    let clock = if cpu { ClockId::CLOCK_PROCESS_CPUTIME_ID } else { ClockId::CLOCK_MONOTONIC };
    std::time::Duration::from(clock_gettime(clock).unwrap()).as_secs_f64()
}

fn splitmix64(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fill_page(image: &str, page: u64, bytes: &mut [u8; 4096]) {
    if image == "zero" || (image == "mix" && splitmix64(page) % 10 < 4) {
        return bytes.fill(0);
    }
    for (word, out) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let random = splitmix64(512 * page + word as u64).to_le_bytes();
        *out = if word % 16 < 5 { random } else { *TEXT[word % 8] };
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let option = |name: &str| arguments.iter().position(|argument| argument == name).map(|at| &arguments[at + 1..]);
    let number = |name, default| option(name).map_or(default, |rest| rest[0].parse().expect("a number"));
    let pages = number("--size-mib", 1024) * 256;
    let runs = number("--runs", 5);
    CPU_TIME.store(number("--cpu-time", 0) == 1, Ordering::Relaxed);
    let used = (number("--used-mib", pages / 256) * 256).min(pages);
    if let Some([image, path, ..]) = option("--image") {
        return write_image(image, path, pages, used);
    }
    if number("--untouched", 0) == 1 {
        return println!("{:.1}", migrate_untouched(pages, used));
    }
    println!("guest of {} MiB, {CHANNELS} channels, medians of {runs} runs, guest GB/s\n", pages / 256);
    println!("| what | {} |\n|---|{}", IMAGES.join(" | "), "---|".repeat(IMAGES.len()));
    let guests: Vec<Guest> = IMAGES.iter().map(|image| Guest::new(image, pages)).collect();
    print_row("copy to a 1 MiB buffer, 1 thread", runs, &guests, &|guest| copy(&guest.source));
    print_row("unix socket alone, 2 threads each side", runs, &guests, &|guest| sockets(guest.pages));
    for codec in [Codec::None, Codec::Zstd(1)] {
        print_row(&format!("encode, 1 thread, {codec}"), runs, &guests, &|guest| encode(guest, codec));
        print_row(&format!("decode, 1 thread, {codec}"), runs, &guests, &|guest| decode(guest, codec));
        let socket = std::env::temp_dir().join(format!("stream-bench-{}", std::process::id()));
        let unix = StreamListener::bind(&Uri::Unix(socket)).unwrap();
        print_row(&format!("unix, {codec}"), runs, &guests, &|guest| end_to_end(guest, &unix, codec));
        let tcp = StreamListener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        print_row(&format!("tcp loopback, {codec}"), runs, &guests, &|guest| end_to_end(guest, &tcp, codec));
    }
    let wire: Vec<_> = guests.iter().map(|guest| format!("{:.0}", guest.wire(Codec::Zstd(1)) as f64 / 1e6)).collect();
    println!("| MB on the wire, zstd:1 | {} |", wire.join(" | "));
    for guest in guests {
        guest.verify();
    }
}

/// Prints the median guest GB/s of each image; `measure` returns seconds. Runs of the images are interleaved.
fn print_row(what: &str, runs: u64, guests: &[Guest], measure: &dyn Fn(&Guest) -> f64) {
    let arguments: Vec<String> = std::env::args().collect();
    let only = arguments.iter().position(|argument| argument == "--only").and_then(|at| arguments.get(at + 1));
    if only.is_some_and(|only| !what.contains(only)) {
        return;
    }
    let mut times = vec![Vec::new(); guests.len()];
    for _ in 0..runs {
        for (times, guest) in times.iter_mut().zip(guests) {
            times.push(measure(guest));
        }
    }
    let median = |times: &mut Vec<f64>, guest: &Guest| {
        times.sort_by(f64::total_cmp);
        format!("{:.2}", (guest.pages * LOG_PAGE) as f64 / 1e9 / times[times.len() / 2])
    };
    let cells: Vec<_> = times.iter_mut().zip(guests).map(|(times, guest)| median(times, guest)).collect();
    println!("| {what} | {} |", cells.join(" | "));
}

/// An image and a place for it to arrive, both faulted in.
struct Guest {
    pages: u64,
    source: Memory,
    destination: Memory,
}

impl Guest {
    fn new(image: &str, pages: u64) -> Guest {
        let guest = Guest { pages, source: memory(pages), destination: memory(pages) };
        let mut bytes = [0; 4096];
        for page in 0..pages {
            guest.destination.write(GuestAddress(page * LOG_PAGE), &bytes).unwrap();
        }
        for page in 0..pages {
            fill_page(image, page, &mut bytes);
            guest.source.write(GuestAddress(page * LOG_PAGE), &bytes).unwrap();
        }
        guest
    }

    fn wire(&self, codec: Codec) -> u64 {
        let mut writer = FrameWriter::new(std::io::sink(), ID);
        PageEncoder::new(codec).unwrap().send(&self.source, [(0..self.pages).into()], &mut writer).unwrap().wire_bytes
    }

    fn verify(&self) {
        let (mut sent, mut received) = ([0; 4096], [0; 4096]);
        for page in 0..self.pages {
            self.source.read(GuestAddress(page * LOG_PAGE), &mut sent).unwrap();
            self.destination.read(GuestAddress(page * LOG_PAGE), &mut received).unwrap();
            assert!(sent == received, "page {page} differs");
        }
    }
}

fn memory(pages: u64) -> Memory {
    let fd = sealed_memfd("bench", pages * LOG_PAGE).unwrap();
    let region = Region::map(fd.as_fd(), GuestAddress(0), pages * LOG_PAGE, UserAddress(0), 0).unwrap();
    Memory::new([Arc::new(region)]).unwrap()
}

fn copy(memory: &Memory) -> f64 {
    let mut buffer = vec![0; 1 << 20];
    let start = seconds();
    for gpa in (0..memory.size()).step_by(1 << 20) {
        memory.read(GuestAddress(gpa), &mut buffer).unwrap();
        black_box(&buffer);
    }
    seconds() - start
}

fn sockets(pages: u64) -> f64 {
    let each = (pages * LOG_PAGE / u64::from(CHANNELS)) >> 20;
    let start = seconds();
    thread::scope(|scope| {
        for _ in 0..CHANNELS {
            let (mut to, mut from) = UnixStream::pair().unwrap();
            nix::sys::socket::setsockopt(&to, nix::sys::socket::sockopt::SndBuf, &(4 << 20)).unwrap();
            scope.spawn(move || {
                let buffer = vec![1; 1 << 20];
                (0..each).for_each(|_| to.write_all(&buffer).unwrap());
            });
            scope.spawn(move || {
                let mut buffer = vec![0; 1 << 20];
                (0..each).for_each(|_| from.read_exact(&mut buffer).unwrap());
            });
        }
    });
    seconds() - start
}

/// Keeps nothing, but takes as many bytes as it is given.
struct NullWriter;

impl Write for NullWriter {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        Ok(black_box(from).len())
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> std::io::Result<usize> {
        Ok(black_box(from).iter().map(|part| part.len()).sum())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn encode(guest: &Guest, codec: Codec) -> f64 {
    let mut encoder = PageEncoder::new(codec).unwrap();
    let mut writer = FrameWriter::new(NullWriter, ID);
    let start = seconds();
    encoder.send(&guest.source, [(0..guest.pages).into()], &mut writer).unwrap();
    seconds() - start
}

fn decode(guest: &Guest, codec: Codec) -> f64 {
    // A part of the guest is enough, and needs less memory for the stream.
    let pages = guest.pages / 8;
    let mut writer = FrameWriter::new(Vec::new(), ID);
    PageEncoder::new(codec).unwrap().send(&guest.source, [(0..pages).into()], &mut writer).unwrap();
    let wire = writer.into_inner();
    let target = Arc::new(IncomingMemory::zeroed(guest.destination.clone()));
    let mut decoder = PageDecoder::new(target, 0, 1).unwrap();
    let mut reader = FrameReader::new(wire.as_slice(), ID);
    let start = seconds();
    while let Ok(header) = reader.next_frame() {
        decoder.receive(&header, &mut reader).unwrap();
    }
    (seconds() - start) * 8.0
}

fn end_to_end(guest: &Guest, listener: &StreamListener, codec: Codec) -> f64 {
    let target = Arc::new(IncomingMemory::zeroed(guest.destination.clone()));
    let options = StreamOptions::new().unwrap().with_channels(CHANNELS);
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(&options).unwrap());
        let from = connect(listener.uri(), &options).unwrap();
        let to = accepting.join().unwrap();
        let start = seconds();
        thread::scope(|scope| {
            for (mut writer, number) in from.writers().into_iter().zip(0..) {
                scope.spawn(move || {
                    let runs = runs_of_channel([(0..guest.pages).into()], number, CHANNELS);
                    PageEncoder::new(codec).unwrap().send(&guest.source, runs, &mut writer).unwrap();
                    writer.into_inner().shutdown();
                });
            }
            for (mut reader, number) in to.readers().into_iter().zip(0..) {
                let target = target.clone();
                scope.spawn(move || {
                    let mut decoder = PageDecoder::new(target, number, CHANNELS).unwrap();
                    loop {
                        match reader.next_frame() {
                            Ok(header) => decoder.receive(&header, &mut reader).map(|_| ()).unwrap(),
                            Err(StreamError::Ended) => break,
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
        });
        seconds() - start
    })
}

/// The pages that are used: runs of 16 MiB, spread evenly.
fn used_runs(pages: u64, used: u64) -> impl Iterator<Item = Range<u64>> {
    const RUN: u64 = 4096;
    let runs = used.div_ceil(RUN).max(1);
    (0..runs).map(move |run| {
        let start = pages / runs * run;
        start..start + RUN.min(used - run * RUN)
    })
}

fn write_image(image: &str, path: &str, pages: u64, used: u64) {
    assert!(IMAGES.contains(&image), "images are {IMAGES:?}");
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let mut bytes = [0; 4096];
    for run in used_runs(pages, used) {
        file.seek(SeekFrom::Start(run.start * LOG_PAGE)).unwrap();
        for page in run {
            fill_page(image, page, &mut bytes);
            file.write_all(&bytes).unwrap();
        }
    }
    file.flush().unwrap();
    file.get_ref().set_len(pages * LOG_PAGE).unwrap();
}

/// A guest that stands still.
struct StaticVm(Memory);

impl SourceVm for StaticVm {
    fn memory(&self) -> Memory {
        self.0.clone()
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        Ok(Box::new(UnionSource::new([])))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(Vec::new())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn release(&mut self) {}
}

#[derive(Default)]
struct StaticIncomingVm(Option<Memory>);

impl IncomingVm for StaticIncomingVm {
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        let memory = make_memory(regions.iter().map(|region| (region.gpa, region.size)), false)?;
        Ok(self.0.insert(memory).clone())
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }

    fn start(&mut self, _run: bool, _: &CancelToken) -> Result<Option<u64>, VmError> {
        Ok(None)
    }
}

/// Moves a guest of which `used` pages are in use. Returns what the source reports, milliseconds.
fn migrate_untouched(pages: u64, used: u64) -> f64 {
    let source = make_memory([(GuestAddress(0), pages * LOG_PAGE)], false).unwrap();
    let mut bytes = [0; 4096];
    for page in used_runs(pages, used).flatten() {
        fill_page("data", page, &mut bytes);
        source.write(GuestAddress(page * LOG_PAGE), &bytes).unwrap();
    }
    let socket = std::env::temp_dir().join(format!("stream-bench-{}", std::process::id()));
    let listener = StreamListener::bind(&Uri::Unix(socket)).unwrap();
    let options = StreamOptions::new().unwrap().with_channels(CHANNELS);
    let mut destination = StaticIncomingVm::default();
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            let options = StreamOptions::new().unwrap().with_channels(CHANNELS);
            let connection = listener.accept(&options).unwrap();
            receive(&mut destination, connection, &Outcomes::default(), SWITCHOVER_TIMEOUT).unwrap();
        });
        let connection = connect(listener.uri(), &options).unwrap();
        let parameters = MigrationParameters::default();
        migrate(&mut StaticVm(source.clone()), connection, &parameters, &mut |_| ()).unwrap()
    });
    let destination = destination.0.unwrap();
    let mut arrived = [0; 4096];
    for page in used_runs(pages, used).flatten() {
        source.read(GuestAddress(page * LOG_PAGE), &mut bytes).unwrap();
        destination.read(GuestAddress(page * LOG_PAGE), &mut arrived).unwrap();
        assert!(bytes == arrived, "page {page} differs");
    }
    report.total_ms
}
