//! The back-end under test: what it says of itself, and connections to it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use super::connection::{self as link, Link, Replies};
use super::device::Subject;
use super::harness::{PROTOCOL, Plan, Rig, Scatter};
use super::net::{self, Source};
use super::process::{LOOK, Process};
use super::queue::MAX_RINGS;
use super::{CheckError, CheckOptions, Fault, Flow, FrameSource, Outcome, Shape, StopToken, When};
use crate::abi::bit;
use crate::abi::features::protocol_feature_name;
use crate::abi::vhost_user::{Request as Code, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_NET_F_MQ};
use crate::inflight::Kind;

/// Entries of a ring where the back-end takes so many.
const MOST_ENTRIES: u16 = 256;
/// Entries that all requests of a batch need.
const LEAST_ENTRIES: u16 = 64;
/// The time that a stopped check has to put back what it has changed.
const UNDO: Duration = Duration::from_secs(5);

/// What the back-end said when it was greeted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
}

impl Offer {
    pub(super) fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    pub(super) fn speaks(&self, feature: u32) -> bool {
        self.protocol & bit(feature) != 0
    }

    /// Fails with "not offered" without translation and a channel to ask over.
    pub(super) fn need_iommu(&self) -> Result<(), Fault> {
        match self.has(VIRTIO_F_ACCESS_PLATFORM) {
            true => self.need(protocol_feature::BACKEND_REQ),
            false => Err(Fault::NotOffered("ACCESS_PLATFORM".into())),
        }
    }

    /// Fails with "not offered" without the protocol feature.
    pub(super) fn need(&self, feature: u32) -> Result<(), Fault> {
        match self.speaks(feature) {
            true => Ok(()),
            false => Err(Fault::NotOffered(protocol_feature_name(feature))),
        }
    }
}

/// The back-end under test, and what every check needs.
pub(super) struct Bench {
    pub(super) socket: PathBuf,
    pub(super) options: CheckOptions,
    pub(super) replies: Rc<RefCell<Replies>>,
    pub(super) offer: Offer,
    pub(super) subject: Subject,
    /// What brings frames in, if anything does.
    pub(super) frame_source: Option<FrameSource>,
    /// The rings of the check that runs.
    pub(super) shape: Shape,
    /// Entries of a ring.
    pub(super) size: u16,
    /// What may be killed and started again.
    pub(super) process: Option<Process>,
    /// The last connection. It ends before another one begins: many back-ends serve one at a time.
    last: RefCell<Option<UnixStream>>,
    /// Changes of a check that could not be put back, in words.
    pub(super) left: Vec<String>,
}

impl Bench {
    /// A new connection on which only GET_FEATURES was said.
    pub(super) fn connect(&self) -> Result<Link, Fault> {
        if let Some(last) = self.last.take() {
            // It may have ended by itself.
            let _ = last.shutdown(Shutdown::Both);
        }
        let deadline = self.options.stop.deadline(self.options.timeout / 4);
        loop {
            let stream = match &self.process {
                Some(process) => process.connect(),
                None => self.connect_soon(),
            };
            let link = Link::over(stream.map_err(Fault::Connect)?, &self.options, self.replies.clone());
            match link.barrier() {
                // One that listens for each connection anew hangs up at those that come before it has stopped listening.
                Err(Fault::HungUp { .. }) if !deadline.is_over() => thread::sleep(LOOK),
                answer => {
                    answer?;
                    *self.last.borrow_mut() = Some(link.another()?);
                    return Ok(link);
                }
            }
        }
    }

    /// Connects to a back-end that may listen again only after its last connection has ended.
    fn connect_soon(&self) -> io::Result<UnixStream> {
        let deadline = self.options.stop.deadline(self.options.timeout / 4);
        loop {
            match link::connect(&self.socket, self.options.timeout, &self.options.stop) {
                Err(error) if is_absent(&error) && !deadline.is_over() => thread::sleep(LOOK),
                connected => return connected,
            }
        }
    }

    /// A new connection with features, memory and a ring that is not started.
    pub(super) fn rig(&self, features: u64) -> Result<Rig, Fault> {
        self.rigged(features, 1)
    }

    /// The same with several rings for requests.
    pub(super) fn rigged(&self, features: u64, rings: usize) -> Result<Rig, Fault> {
        self.planned(features, rings, None)
    }

    /// The same behind an IOMMU.
    pub(super) fn behind(&self, features: u64, scatter: Scatter, rings: usize) -> Result<Rig, Fault> {
        self.offer.need_iommu()?;
        self.planned(features, rings, Some(scatter))
    }

    fn planned(&self, features: u64, rings: usize, iommu: Option<Scatter>) -> Result<Rig, Fault> {
        let Bench { subject, shape, size, .. } = *self;
        // First, for what feeds a device may begin with its connection.
        let link = self.connect()?;
        let source = if shape.flow == Flow::Receive { self.source()? } else { None };
        let plan = Plan { subject, shape, size, features, rings, source, iommu };
        let mut rig = Rig::new(link, self.offer, &self.options, plan)?;
        rig.begin_session()?;
        Ok(rig)
    }

    /// Entries of the largest ring that the back-end takes, or of the one that was asked for.
    fn ring_size(&mut self) -> Result<u16, CheckError> {
        loop {
            let (size, smaller) = (self.size, self.size / 2);
            match self.rig(0).and_then(|rig| rig.all().try_for_each(|queue| rig.send_size(queue))) {
                Ok(()) => return Ok(size),
                Err(Fault::Refused { .. } | Fault::HungUp { .. })
                    if self.options.queue_size.is_none() && smaller >= LEAST_ENTRIES =>
                {
                    self.size = smaller;
                    if self.lives().is_err() {
                        // It may end when it refuses something.
                        let again = self.replace().and_then(|()| self.lives());
                        again.map_err(|fault| CheckError::QueueSizeRefused(size, fault.to_string()))?;
                    }
                }
                Err(fault) => return Err(CheckError::QueueSizeRefused(size, fault.to_string())),
            }
        }
    }

    /// The same as [`rig`](Bench::rig), with more protocol features agreed on.
    pub(super) fn rig_with(&self, protocol: &[u32]) -> Result<Rig, Fault> {
        protocol.iter().try_for_each(|feature| self.offer.need(*feature))?;
        let mut rig = self.rig(0)?;
        rig.protocol |= protocol.iter().fold(0, |all, feature| all | bit(*feature));
        rig.reconnect(self.connect()?)?;
        Ok(rig)
    }

    /// Somebody to bring frames in.
    pub(super) fn source(&self) -> Result<Option<Source>, Fault> {
        Ok(match &self.frame_source {
            None => None,
            Some(FrameSource::Loop) => Some(Source::Loop),
            Some(FrameSource::Interface(name)) => Some(Source::interface(name)?),
            Some(FrameSource::Tcp(address)) => Some(Source::Typed(TcpStream::connect(address)?)),
            Some(FrameSource::Backend(socket)) if matches!(self.subject, Subject::Vsock(_)) => {
                Some(Source::Host(socket.clone(), VecDeque::new()))
            }
            Some(FrameSource::Backend(socket)) => {
                let connect = || Link::connect(socket, &self.options, Rc::default()).map_err(Fault::Connect);
                let link = connect()?;
                let offer = greet(&link)?;
                drop(link);
                let shape = Shape { packed: false, flow: Flow::Transmit };
                let (subject, size) = (Subject::Net, LEAST_ENTRIES);
                let plan = Plan { subject, shape, size, features: 0, rings: 1, source: None, iommu: None };
                let rig = Rig::new(connect()?, offer, &self.options, plan)?;
                rig.start()?;
                Some(Source::Backend(Box::new(rig)))
            }
        })
    }

    /// How many rings may have requests at the same time.
    pub(super) fn most_rings(&self) -> usize {
        let offered = usize::try_from(self.offer.queues).unwrap_or(MAX_RINGS);
        match self.subject {
            Subject::Disk(_) => offered.min(MAX_RINGS),
            // One has a priority of its own.
            Subject::Fs => offered.saturating_sub(1).clamp(1, MAX_RINGS - 1),
            Subject::Rng | Subject::Vsock(_) | Subject::Console => 1,
            // Pairs, of which the device says how many it has.
            Subject::Net if !self.offer.has(VIRTIO_NET_F_MQ) => 1,
            Subject::Net => self.options.pairs.map_or(offered, usize::from).min(offered).min(MAX_RINGS / 2),
        }
    }

    /// Whether the back-end serves another front-end.
    pub(super) fn lives(&self) -> Result<(), Fault> {
        self.connect().map(|_| ())
    }

    /// Kills the back-end, and starts its successor.
    pub(super) fn replace(&mut self) -> Result<(), Fault> {
        if let Some(process) = &mut self.process {
            process.kill()?;
            process.start()?;
        }
        Ok(())
    }

    /// Has `undo` put back what a check has changed, after a stop too. Where the back-end may be killed, its successor has another
    /// try.
    pub(super) fn undo(&mut self, undo: impl Fn(&Bench) -> Result<(), Fault>) -> Result<(), Fault> {
        let stop = self.options.stop.clone();
        self.waits_until(stop.delayed(UNDO));
        let mut done = undo(self);
        if done.is_err() && self.process.is_some() {
            self.waits_until(stop.delayed(2 * UNDO));
            done = self.replace().and_then(|()| undo(self));
        }
        self.waits_until(stop);
        done
    }

    /// Fails once the check is to stop.
    pub(super) fn goes_on(&mut self) -> Result<(), CheckError> {
        match self.options.stop.is_set() {
            true => Err(CheckError::Stopped { left: std::mem::take(&mut self.left) }),
            false => Ok(()),
        }
    }

    fn waits_until(&mut self, stop: StopToken) {
        if let Some(process) = &mut self.process {
            process.stop = stop.clone();
        }
        self.options.stop = stop;
    }

    /// Learns whether the back-end serves a second front-end, or ends with its first.
    fn meet_again(&self) -> Result<(), Fault> {
        let deadline = self.options.stop.deadline(self.options.timeout);
        while let Err(fault) = self.lives() {
            if self.process.is_none() || deadline.is_over() {
                return Err(fault);
            }
            thread::sleep(LOOK);
        }
        self.process.iter().for_each(Process::is_known);
        Ok(())
    }

    /// The rings that a check is run on.
    pub(super) fn shapes(&self, when: When) -> Vec<Shape> {
        let main = self.main_flow();
        let data = match self.subject.has_requests() {
            true => Some(main),
            false => self.frame_source.as_ref().map(|_| Flow::Receive),
        };
        let flows = match when {
            When::Once | When::Rings => vec![main],
            When::Data => data.into_iter().collect(),
            When::Best => vec![data.unwrap_or(main)],
            When::Each | When::Split | When::Packed => {
                std::iter::once(main).chain(data.filter(|data| *data != main)).collect()
            }
        };
        let split = self.options.rings != Some(Kind::Packed) && when != When::Packed;
        let packed = self.offer.has(VIRTIO_F_RING_PACKED) && self.options.rings != Some(Kind::Split);
        let packed = packed && when != When::Split;
        let kinds = split.then_some(false).into_iter().chain(packed.then_some(true));
        let kinds = kinds.take(if when == When::Once { 1 } else { 2 });
        kinds.flat_map(|packed| flows.iter().map(move |flow| Shape { packed, flow: *flow })).collect()
    }

    /// Why a check is run on none.
    pub(super) fn left_out(&self, when: When) -> Outcome {
        match when {
            When::Packed if !self.offer.has(VIRTIO_F_RING_PACKED) => Fault::NotOffered("RING_PACKED".into()).into(),
            When::Split | When::Packed => Outcome::not_tested("--rings leaves it out"),
            _ => Outcome::not_tested("only what comes in is written to memory: --frame-source brings something"),
        }
    }

    pub(super) fn main_flow(&self) -> Flow {
        match self.subject.has_requests() {
            true => Flow::Requests,
            false => Flow::Transmit,
        }
    }
}

/// Meets the back-end, and whoever brings frames to it.
pub(super) fn prepare(socket: &Path, options: &CheckOptions) -> Result<Bench, CheckError> {
    let process = start(socket, options)?;
    let replies = Rc::new(RefCell::new(Replies::default()));
    let path = || socket.to_path_buf();
    let busy = || CheckError::Busy { path: path(), waited: options.timeout };
    let stream = match &process {
        Some(process) => process.connect().map_err(CheckError::Start)?,
        None => link::connect(socket, options.timeout, &options.stop).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => busy(),
            _ => CheckError::Connect { path: path(), source },
        })?,
    };
    let link = Link::over(stream, options, replies.clone());
    let greeted = greet(&link).and_then(|offer| Ok((offer, Subject::of(&link, offer, options.device)?)));
    let greeting = |fault: Fault| CheckError::Greeting { path: path(), why: fault.to_string() };
    let (offer, subject) = greeted.map_err(|fault| match fault {
        Fault::Silent { .. } if link.is_unread() => busy(),
        Fault::UnknownDevice(why) => CheckError::UnknownDevice { path: path(), why },
        fault => greeting(fault),
    })?;
    drop(link);
    if options.rings == Some(Kind::Packed) && !offer.has(VIRTIO_F_RING_PACKED) {
        return Err(CheckError::NotPacked);
    }
    let packed = options.rings == Some(Kind::Packed);
    let flow = if subject.has_requests() { Flow::Requests } else { Flow::Transmit };
    let shape = Shape { packed, flow };
    let (frame_source, size) = (options.frame_source.clone(), options.queue_size.unwrap_or(MOST_ENTRIES));
    let (socket, options, last, left) = (path(), options.clone(), RefCell::default(), Vec::new());
    let mut bench = Bench { socket, options, replies, offer, subject, frame_source, shape, size, process, last, left };
    bench.meet_again().map_err(|fault| CheckError::Once { path: path(), why: fault.to_string() })?;
    bench.size = bench.ring_size()?;
    if bench.subject.has_requests() {
        return Ok(bench);
    }
    bench.shape.flow = Flow::Receive;
    match &bench.options.frame_source {
        Some(frame_source) => net::arrives(&bench)
            .map_err(|fault| CheckError::FrameSource { frame_source: frame_source.clone(), why: fault.to_string() })?,
        None => {
            bench.frame_source = Some(FrameSource::Loop);
            if !net::loops(&bench).map_err(greeting)? {
                bench.frame_source = None;
            }
        }
    }
    Ok(bench)
}

/// Starts the back-end, if that is ours to do.
pub(super) fn start(socket: &Path, options: &CheckOptions) -> Result<Option<Process>, CheckError> {
    let Some(command) = &options.restart else { return Ok(None) };
    let process = Process::new(command, socket, options);
    if options.kill_pid.is_none() {
        if link::connect(socket, options.timeout, &options.stop).is_ok() {
            return Err(CheckError::Served { path: socket.into() });
        }
        process.start().map_err(CheckError::Start)?;
    }
    Ok(Some(process))
}

/// Says hello, and hears what the back-end offers. What it can't do otherwise it needs not offer.
pub(super) fn greet(link: &Link) -> Result<Offer, Fault> {
    let features = link.barrier()?;
    let mut offer = Offer { features, protocol: 0, queues: 1 };
    if offer.has(VHOST_USER_F_PROTOCOL_FEATURES) {
        offer.protocol = link.ask_number(Code::GET_PROTOCOL_FEATURES)?;
        let agreed = offer.protocol & PROTOCOL;
        link.send(Code::SET_PROTOCOL_FEATURES, 1, &agreed.to_ne_bytes(), &[])?;
        if offer.speaks(protocol_feature::MQ) {
            offer.queues = link.ask_number(Code::GET_QUEUE_NUM)?;
        }
    }
    Ok(offer)
}

pub(super) fn offers(bench: &Bench) -> String {
    let Offer { features, protocol, queues } = bench.offer;
    let names: Vec<String> = (0..64).filter(|number| protocol & bit(*number) != 0).map(protocol_feature_name).collect();
    let names = if names.is_empty() { "none".into() } else { names.join(" ") };
    let mut device = bench.subject.name();
    if let Some(frame_source) = &bench.frame_source {
        device += &format!(", fed by {frame_source:?}");
    }
    let size = bench.size;
    format!("{device}, {queues} queues, rings of {size}, features {features:#x}, protocol features {names}")
}

/// Returns true for errors of a socket at which no process listens.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}
