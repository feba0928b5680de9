//! A relay between source and destination that parses frames and can cut, hold or damage the stream at any byte in
//! either direction.

use std::convert::Infallible;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost_migrate::stream::{FrameKind, Uri};
use vhost_migrate::unstable::stream::frame::{ConnectionHeader, FRAME_HEADER_BYTES, HEADER_BYTES};

/// Direction of a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Direction {
    ToDestination,
    ToSource,
}

/// Position in the stream of one channel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum FaultPosition {
    /// Bytes after the start of the stream.
    Byte(u64),
    /// Bytes after the start of the first frame of this kind.
    Frame(FrameKind, u64),
}

/// Action on this byte and, except for a flip, on all that follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum FaultAction {
    /// One bit of the byte changes.
    Flip,
    /// The connection is closed on both sides.
    Cut,
    /// The connection is closed on both sides, and no further connection is relayed.
    CutForGood,
    /// No more bytes are relayed in this direction.
    Hold,
    /// Bytes are relayed one at a time in this direction, with a pause before each.
    Trickle(Duration),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) channel: u16,
    pub(crate) direction: Direction,
    pub(crate) at: FaultPosition,
    pub(crate) action: FaultAction,
}

impl Fault {
    pub(crate) fn new(direction: Direction, at: FaultPosition, action: FaultAction) -> Fault {
        Fault { channel: 0, direction, at, action }
    }
}

/// Accepts connections at one socket and relays them to another, until it is dropped.
pub(crate) struct Relay {
    pub(crate) uri: Uri,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    faults: Vec<Fault>,
    triggered: AtomicBool,
    open: Mutex<Option<Vec<UnixStream>>>,
}

impl Relay {
    pub(crate) fn new(uri: Uri, to: &Uri, fault: Fault) -> Relay {
        Relay::with_faults(uri, to, [fault])
    }

    pub(crate) fn with_faults(uri: Uri, to: &Uri, faults: impl IntoIterator<Item = Fault>) -> Relay {
        let faults: Vec<Fault> = faults.into_iter().collect();
        let Uri::Unix(path) = &uri else { panic!("{uri} is no socket") };
        let Uri::Unix(target) = to.clone() else { panic!("{to} is no socket") };
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared { faults, triggered: AtomicBool::new(false), open: Mutex::new(Some(Vec::new())) });
        let its = shared.clone();
        let thread = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                for source in listener.incoming() {
                    let (source, shared) = (source.unwrap(), &*its);
                    let for_good = |fault: &Fault| fault.action == FaultAction::CutForGood;
                    let lost = shared.faults.iter().any(for_good) && shared.triggered.load(Ordering::SeqCst);
                    let destination = if lost { Err(ErrorKind::Other.into()) } else { UnixStream::connect(&target) };
                    match (&mut *shared.open.lock().unwrap(), &destination) {
                        (None, _) => break,
                        (Some(open), Ok(destination)) => {
                            open.extend([source.try_clone().unwrap(), destination.try_clone().unwrap()]);
                        }
                        // The destination no longer listens. The source receives a hang-up.
                        (Some(_), Err(_)) => continue,
                    }
                    let destination = destination.unwrap();
                    scope.spawn(move || carry(source, destination, shared, scope));
                }
            });
        });
        Relay { uri, shared, thread: Some(thread) }
    }

    /// Returns true if the fault was triggered.
    pub(crate) fn triggered(&self) -> bool {
        self.shared.triggered.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for stream in self.shared.open.lock().unwrap().take().unwrap() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let Uri::Unix(path) = &self.uri else { return };
        // Wakes the relay thread.
        let _ = UnixStream::connect(path);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

fn carry<'scope>(
    mut source: UnixStream,
    destination: UnixStream,
    shared: &'scope Shared,
    scope: &'scope std::thread::Scope<'scope, '_>,
) {
    let mut header = [0; HEADER_BYTES];
    if source.read_exact(&mut header).is_err() {
        return;
    }
    let channel = ConnectionHeader::decode(&header).unwrap().channel;
    // A fault is triggered once: later streams are relayed unchanged.
    let triggered = shared.triggered.load(Ordering::SeqCst);
    let here = |fault: &&Fault, direction| !triggered && fault.channel == channel && fault.direction == direction;
    let fault = |direction| shared.faults.iter().find(|fault| here(fault, direction)).copied();
    let back = (destination.try_clone().unwrap(), source.try_clone().unwrap());
    let (forth, back_fault) = (fault(Direction::ToDestination), fault(Direction::ToSource));
    scope.spawn(move || pump(back.0, back.1, None, back_fault, shared));
    pump(source, destination, Some(header), forth, shared);
}

/// Relays one direction of one channel until it ends.
fn pump(
    mut from: UnixStream,
    mut to: UnixStream,
    header: Option<[u8; HEADER_BYTES]>,
    fault: Option<Fault>,
    shared: &Shared,
) {
    let ends = [from.try_clone().unwrap(), to.try_clone().unwrap()];
    let mut pass =
        FaultInjector { to: &mut to, offset: 0, seen: Vec::new(), fault, trickle: None, shared, ends: &ends };
    let end = (|| -> std::io::Result<Infallible> {
        let mut buffer = header.map_or_else(|| vec![0; HEADER_BYTES], Vec::from);
        if header.is_none() {
            from.read_exact(&mut buffer)?;
        }
        pass.on(None, &mut buffer)?;
        loop {
            buffer.resize(FRAME_HEADER_BYTES, 0);
            from.read_exact(&mut buffer)?;
            let kind = u16::from_le_bytes([buffer[0], buffer[1]]);
            let mut left = u32::from_le_bytes([buffer[4], buffer[5], buffer[6], buffer[7]]) as usize;
            pass.on(Some(kind), &mut buffer)?;
            while left > 0 {
                buffer.resize(left.min(64 << 10), 0);
                from.read_exact(&mut buffer)?;
                left -= buffer.len();
                pass.on(None, &mut buffer)?;
            }
        }
    })();
    // The end is relayed too, but the other direction stays open.
    if end.is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock) {
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
    }
}

struct FaultInjector<'a> {
    to: &'a mut UnixStream,
    offset: u64,
    /// Kinds of frames seen, and their offsets.
    seen: Vec<(u16, u64)>,
    fault: Option<Fault>,
    /// Pause before each byte after a trickle fault.
    trickle: Option<Duration>,
    shared: &'a Shared,
    ends: &'a [UnixStream; 2],
}

impl FaultInjector<'_> {
    fn pass_on(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let Some(pause) = self.trickle else { return self.to.write_all(bytes) };
        for byte in bytes {
            std::thread::sleep(pause);
            self.to.write_all(&[*byte])?;
        }
        Ok(())
    }

    /// Relays `bytes`, which start a frame if `kind` is given.
    fn on(&mut self, kind: Option<u16>, bytes: &mut [u8]) -> std::io::Result<()> {
        if let Some(kind) = kind.filter(|kind| self.seen.iter().all(|(seen, _)| seen != kind)) {
            self.seen.push((kind, self.offset));
        }
        let at = self.fault.and_then(|fault| match fault.at {
            FaultPosition::Byte(at) => Some(at),
            FaultPosition::Frame(kind, at) => {
                let (_, begin) = self.seen.iter().find(|(seen, _)| *seen == kind as u16)?;
                Some(begin + at)
            }
        });
        let here = at.and_then(|at| at.checked_sub(self.offset)).filter(|at| *at < bytes.len() as u64);
        self.offset += bytes.len() as u64;
        let (Some(here), Some(fault)) = (here.map(|here| here as usize), self.fault) else {
            return self.pass_on(bytes);
        };
        self.shared.triggered.store(true, Ordering::SeqCst);
        if let FaultAction::Trickle(pause) = fault.action {
            self.trickle = Some(pause);
            self.fault = None;
            self.to.write_all(&bytes[..here])?;
            return self.pass_on(&bytes[here..]);
        }
        if fault.action == FaultAction::Flip {
            bytes[here] ^= 1;
            self.fault = None;
            return self.to.write_all(bytes);
        }
        self.to.write_all(&bytes[..here])?;
        if matches!(fault.action, FaultAction::Cut | FaultAction::CutForGood) {
            for end in self.ends {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
        Err(std::io::ErrorKind::WouldBlock.into())
    }
}
