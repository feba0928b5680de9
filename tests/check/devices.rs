//! Devices other than disks and network interfaces: detection, and the rules of rings, log, inflight region and memory.
//! The devices of these tests pass; one that logs nothing fails the rules of the log.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::PollTimeout;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::{Queue, RING_FEATURES, Request, SyncQueue, VirtioDevice};
use vhost_migrate::check::Rule::{self, *};
use vhost_migrate::check::{CheckError, CheckOptions, CheckReport, DeviceKind, FrameSource, Verdict, check};
use vhost_migrate::inflight::RingKind;

use crate::fault::Fault;
use crate::faulty_backend::Backend;
use crate::wait::is_readable;

/// Size of the file in the file system.
const FILE: usize = 1 << 20;
/// Bytes of a vsock packet without data.
const PACKET: usize = 44;
/// Context id of the guest.
const CID: u64 = 42;

/// An entropy source with a predictable sequence.
struct Rng;

impl VirtioDevice for Rng {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let mut number = 7u8;
        Ok(Box::new(SyncQueue::new(move |request: &mut Request| {
            let bytes: Vec<u8> = (0..request.writable_len()).map(|_| next(&mut number)).collect();
            request.write(0, &bytes).unwrap();
        })))
    }
}

fn next(number: &mut u8) -> u8 {
    *number = number.wrapping_mul(5).wrapping_add(41);
    *number
}

/// A file system with one file.
struct Fs {
    tag: bool,
}

impl VirtioDevice for Fs {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        let mut config = if self.tag { b"shared".to_vec() } else { Vec::new() };
        config.resize(36, 0);
        [config.as_slice(), &u32::from(self.tag).to_le_bytes()].concat()
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(SyncQueue::new(fuse)))
    }
}

/// Replies to a FUSE request.
fn fuse(request: &mut Request) {
    let number = |at: u64| request.read_obj::<u64>(at).unwrap();
    let (opcode, unique) = (request.read_obj::<u32>(4).unwrap(), number(8));
    let answer = match opcode {
        26 => [7u32, 31].iter().flat_map(|number| number.to_le_bytes()).chain([0; 56]).collect(),
        27 | 14 => vec![1; 16],
        28 => {
            let name = b"a file..";
            let entry = [1u64.to_le_bytes(), 1u64.to_le_bytes(), [6, 0, 0, 0, 8, 0, 0, 0]].concat();
            [entry.as_slice(), name].concat()
        }
        1 => {
            let mut entry = vec![0; 128];
            entry[0] = 2;
            entry[48..56].copy_from_slice(&(FILE as u64).to_le_bytes());
            entry
        }
        15 => {
            let (offset, size) = (number(48) as usize, request.read_obj::<u32>(56).unwrap() as usize);
            (offset..(offset + size).min(FILE)).map(|at| (at / 97) as u8).collect()
        }
        opcode => panic!("FUSE request {opcode}"),
    };
    let head = [&(16 + answer.len() as u32).to_le_bytes()[..], &[0; 4], &unique.to_le_bytes()].concat();
    request.write(0, &[head, answer].concat()).unwrap();
}

/// Vsock without listeners.
struct Vsock {
    /// Replies to the guest: reading and writing end.
    answers: (UnixStream, UnixStream),
}

impl Vsock {
    fn new() -> Vsock {
        let answers = UnixStream::pair().unwrap();
        [&answers.0, &answers.1].iter().for_each(|end| end.set_nonblocking(true).unwrap());
        Vsock { answers }
    }
}

impl VirtioDevice for Vsock {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn queues(&self) -> u16 {
        3
    }

    fn config(&self) -> Vec<u8> {
        CID.to_le_bytes().to_vec()
    }

    fn start_queue(&self, index: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        if index == 0 {
            return Ok(Box::new(Incoming { from: Stream(self.answers.0.try_clone()?), done: Vec::new() }));
        }
        let answers = self.answers.1.try_clone()?;
        Ok(Box::new(SyncQueue::new(move |request: &mut Request| reset(request, &answers))))
    }
}

/// Replies to a connection request with a reset.
fn reset(request: &mut Request, mut answers: &UnixStream) {
    let mut packet = [0; PACKET];
    request.read(0, &mut packet).unwrap();
    assert_eq!((packet[0], packet[8], packet[30]), (CID as u8, 2, 1), "it asks for a connection");
    let swapped = [&packet[8..16], &packet[..8], &packet[20..24], &packet[16..20], &[0; 4], &[1, 0, 3, 0], &[0; 12]];
    // If the socket is full, `check` sends the request again.
    let _ = answers.write(&swapped.concat());
}

/// A receive queue for data of a readable source.
struct Incoming<T> {
    from: T,
    done: Vec<Request>,
}

/// A source of received data.
trait Readable: AsFd {
    /// Returns the next bytes, if there are some.
    fn next(&mut self, most: usize) -> Option<Vec<u8>>;
    /// Returns true if there are some.
    fn has_more(&mut self) -> bool;
}

struct Stream(UnixStream);

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Readable for Stream {
    fn next(&mut self, _: usize) -> Option<Vec<u8>> {
        let mut packet = vec![0; PACKET];
        self.0.read_exact(&mut packet).ok().map(|()| packet)
    }

    fn has_more(&mut self) -> bool {
        is_readable(&self.0, PollTimeout::ZERO)
    }
}

impl<T: Readable> Queue for Incoming<T> {
    fn wants_request(&mut self) -> bool {
        self.from.has_more()
    }

    fn submit(&mut self, mut request: Request) {
        if let Some(bytes) = self.from.next(request.writable_len() as usize) {
            request.write(0, &bytes).unwrap();
        }
        self.done.push(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.done);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.from.as_fd())
    }
}

/// A console with its input from a TCP connection.
struct Console {
    listener: TcpListener,
    typed: Arc<Mutex<Option<TcpStream>>>,
}

impl Console {
    fn new() -> Console {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Console { listener, typed: Arc::default() }
    }
}

impl VirtioDevice for Console {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES | VirtioFeatures::from_bits_retain(1)
    }

    fn queues(&self) -> u16 {
        2
    }

    fn config(&self) -> Vec<u8> {
        vec![80, 0, 25, 0, 0, 0, 0, 0]
    }

    fn start_queue(&self, index: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        if index == 0 {
            let from = Keyboard { listener: self.listener.try_clone()?, typed: None, kept: self.typed.clone() };
            return Ok(Box::new(Incoming { from, done: Vec::new() }));
        }
        Ok(Box::new(SyncQueue::new(|request: &mut Request| {
            let mut text = vec![0; request.readable_len() as usize];
            request.read(0, &mut text).unwrap();
            assert!(text.is_ascii(), "text leaves a console");
        })))
    }
}

/// The current input connection of a console; kept while no ring runs.
struct Keyboard {
    listener: TcpListener,
    typed: Option<TcpStream>,
    kept: Arc<Mutex<Option<TcpStream>>>,
}

impl AsFd for Keyboard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.typed.as_ref().map_or(self.listener.as_fd(), AsFd::as_fd)
    }
}

impl Readable for Keyboard {
    fn next(&mut self, most: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; most];
        let count = self.typed.as_ref()?.read(&mut bytes).ok()?;
        bytes.truncate(count);
        Some(bytes)
    }

    fn has_more(&mut self) -> bool {
        self.typed = self.typed.take().or_else(|| self.kept.lock().unwrap().take());
        loop {
            let Some(typed) = &self.typed else {
                let Ok((stream, _)) = self.listener.accept() else { return false };
                self.typed = Some(stream);
                continue;
            };
            match is_readable(typed, PollTimeout::ZERO).then(|| typed.peek(&mut [0])) {
                None => return false,
                Some(Ok(1)) => return true,
                // The connection was closed.
                Some(_) => self.typed = None,
            }
        }
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        *self.kept.lock().unwrap() = self.typed.take();
    }
}

fn checked(device: Arc<dyn VirtioDevice>, fault: Fault, options: CheckOptions) -> CheckReport {
    let options = options.with_settle(Duration::from_millis(50));
    Backend::serving(tempfile::tempdir().unwrap(), device, Arc::default(), fault).checked(options)
}

fn of(report: &CheckReport, verdict: Verdict) -> BTreeSet<Rule> {
    report.rules().into_iter().filter(|(_, v)| *v == verdict).map(|(rule, _)| rule).collect()
}

/// Rules that apply to every device: rings, log, inflight region and memory.
const COMMON: &[Rule] = &[
    R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, L1, L2, L3, L4, L6, L7, L8, L9, L10, L11, L12, L15, I1, I2, I3, I4, I5,
    I6, I7, M1,
];

fn assert_common_rules_pass_and_an_unlogged_device_fails(
    device: &dyn Fn() -> (Arc<dyn VirtioDevice>, CheckOptions),
    is: &str,
) {
    let (rules, (known, options)) = (COMMON.to_vec(), device());
    let report = checked(known, Fault::None, options.with_only(rules.clone()).with_may_kill(true));
    assert!(report.offers.contains(is), "{report}");
    assert_eq!(of(&report, Verdict::Pass), rules.into_iter().collect(), "{report}");
    let (known, options) = device();
    let only = vec![L1, L9, M1, L3, R3];
    let rings = Some(RingKind::Split);
    let report = checked(known, Fault::DoesNotLogData, options.with_only(only).with_rings(rings));
    assert_eq!(of(&report, Verdict::Fail), BTreeSet::from([L1, L9, M1]), "{report}");
}

#[test]
fn common_rules_are_checked_on_an_rng() {
    let device = || -> (Arc<dyn VirtioDevice>, CheckOptions) { (Arc::new(Rng), CheckOptions::default()) };
    assert_common_rules_pass_and_an_unlogged_device_fails(&device, "an entropy source");
}

#[test]
fn common_rules_are_checked_on_a_file_system() {
    let device = || -> (Arc<dyn VirtioDevice>, CheckOptions) { (Arc::new(Fs { tag: true }), CheckOptions::default()) };
    assert_common_rules_pass_and_an_unlogged_device_fails(&device, "a file system");
}

#[test]
fn common_rules_are_checked_on_vsock() {
    let options = CheckOptions::default().with_device(Some(DeviceKind::Vsock));
    let device = || -> (Arc<dyn VirtioDevice>, CheckOptions) { (Arc::new(Vsock::new()), options.clone()) };
    assert_common_rules_pass_and_an_unlogged_device_fails(&device, "vsock with context id 42, frame source Loop");
}

#[test]
fn common_rules_are_checked_on_a_console() {
    let device = || -> (Arc<dyn VirtioDevice>, CheckOptions) {
        let console = Console::new();
        let frame_source = Some(FrameSource::Tcp(console.listener.local_addr().unwrap().to_string()));
        (
            Arc::new(console),
            CheckOptions::default().with_device(Some(DeviceKind::Console)).with_frame_source(frame_source),
        )
    };
    assert_common_rules_pass_and_an_unlogged_device_fails(&device, "a console, frame source Tcp");
}

#[test]
fn an_ambiguous_device_kind_is_an_error_that_names_the_device_option() {
    let devices: [(Arc<dyn VirtioDevice>, &str); 3] = [
        (Arc::new(Fs { tag: false }), "none of the known kinds"),
        (Arc::new(Vsock::new()), "blk, vsock"),
        (Arc::new(Console::new()), "console"),
    ];
    for (device, may_be) in devices {
        let backend = Backend::serving(tempfile::tempdir().unwrap(), device, Arc::default(), Fault::None);
        let refused = check(&backend.socket(), &CheckOptions::default()).unwrap_err();
        let text = refused.to_string();
        assert!(matches!(refused, CheckError::UnknownDevice { .. }), "{text}");
        assert!(text.contains(may_be) && text.ends_with("Name it with --device"), "{text}");
    }
}
