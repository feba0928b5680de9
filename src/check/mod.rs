//! Whether a running vhost-user back-end keeps the rules of `docs/protocol.md` that migration and crash-resume rest on.
//!
//! | file | purpose |
//! |---|---|
//! | `link` | one connection, message by message |
//! | `rig` | a guest without a CPU: memory, a ring in it, logs, and the messages that hand them to a back-end |
//! | `queue` | one ring of it, split or packed |
//! | `blk`, `net` | what only a disk has, and only a network interface: requests and frames, rules of their own |
//! | `framing`, `rings`, `order`, `log`, `marks`, `memory`, `inflight`, `hostile` | the checks, a file per group of rules |
//! | `process` | the back-end's process, where it may be killed and started again |
//! | `report` | what was found |
//!
//! [`check`] makes one connection after the other, and each check has one of its own. Whatever the back-end does, hanging
//! and dying included, is a finding. Nothing is written to a disk, unless [`Options::write`] allows it.
//!
//! A check is run on split rings and on packed ones, and of a network interface with frames that leave and with frames
//! that come in, as far as it makes a difference: `When` says so.
#![forbid(unsafe_code)]

mod blk;
mod framing;
mod hostile;
mod inflight;
mod link;
mod log;
mod marks;
mod memory;
mod net;
mod order;
mod process;
mod queue;
mod report;
mod rig;
mod rings;

pub use net::Feed;
pub use report::{Finding, Report, Verdict};

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::abi::bit;
use crate::abi::vhost_user::{Request as Code, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature};
use crate::abi::virtio::{
    VIRTIO_F_RING_PACKED, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use crate::dirty::LogError;
use crate::memory::MemoryError;
use crate::ring::RingError;

use blk::Disk;
use link::{Link, Replies};
use net::Source;
use process::Process;
use queue::MAX_RINGS;
use rig::{PROTOCOL, Plan, Rig};

/// Every rule of `docs/protocol.md`, with its subject.
pub const RULES: &[(&str, &str)] = &[
    ("F1", "framing"),
    ("F2", "flags"),
    ("F3", "replies"),
    ("F4", "acknowledgements and order"),
    ("F5", "unknown requests"),
    ("F6", "payloads larger than their content"),
    ("F7", "reply to SET_LOG_BASE"),
    ("F8", "notification through sockets and pipes"),
    ("B1", "the back-end channel"),
    ("B2", "news of configuration"),
    ("B3", "notifications in messages"),
    ("B4", "doorbells of hardware"),
    ("R1", "features that are not offered"),
    ("R2", "started and enabled"),
    ("R3", "drain at GET_VRING_BASE"),
    ("R4", "bases"),
    ("R5", "SET_VRING_ADDR on a running ring"),
    ("R6", "order in which QEMU starts"),
    ("R7", "order in which User-mode Linux starts"),
    ("R8", "resets"),
    ("R9", "reconnecting"),
    ("R10", "notifications before there is a call fd"),
    ("T1", "translations and misses"),
    ("T2", "IOTLB messages"),
    ("T3", "invalidation"),
    ("T4", "rings in scattered pages"),
    ("T5", "offer of ACCESS_PLATFORM"),
    ("L1", "marks of data"),
    ("L2", "logs of any size and place"),
    ("L3", "marks of the used ring"),
    ("L4", "marks of packed rings"),
    ("L5", "marks behind an IOMMU"),
    ("L6", "pages outside the log"),
    ("L7", "logging on and off"),
    ("L8", "reconnecting while logging"),
    ("L9", "changes under load"),
    ("L10", "order of data, mark and used index"),
    ("L11", "several writers of one log"),
    ("L12", "SET_LOG_FD"),
    ("L13", "harvest"),
    ("L14", "pages that could not be sent"),
    ("L15", "the log of a dead back-end"),
    ("I1", "shape of the inflight region"),
    ("I2", "contents of the inflight region"),
    ("I3", "recovery"),
    ("I4", "packed inflight regions"),
    ("I5", "a fresh region on a used ring"),
    ("I6", "counters"),
    ("I7", "region after a reset"),
    ("I8", "unstable features"),
    ("I9", "I/O that outlives its process"),
    ("M1", "memory table"),
    ("C1", "configuration space"),
    ("D1", "device state"),
    ("P1", "postcopy"),
];

/// Rules that a back-end's peer can't see it keep, and why.
const ASIDE: &[(&str, &str)] = &[
    ("B4", "is about hardware"),
    ("L5", "needs an IOMMU, which this front-end is not"),
    ("L13", "is the front-end's; that marks survive it is checked with L11"),
    ("L14", "is the front-end's"),
    ("I9", "needs a machine whose disk stalls"),
];
/// After so many checks that took all the time there is, there is less.
const PATIENCE: u32 = 3;
const IMPATIENT: Duration = Duration::from_secs(2);

/// Kinds of devices that can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Blk,
    /// A network interface.
    Net,
}

/// Rings to check on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rings {
    /// Split ones.
    Split,
    /// Packed ones.
    Packed,
}

/// How to check.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the device is, where its features don't tell.
    pub device: Option<Kind>,
    /// Only on these rings; otherwise on split ones, and on packed ones if those are offered.
    pub rings: Option<Rings>,
    /// Queue pairs that a network interface serves, if fewer than it says: DPDK says 128 whatever it was started with.
    pub pairs: Option<u16>,
    /// What brings frames to a network interface. Without it, what is sent is watched for.
    pub feed: Option<Feed>,
    /// How long the back-end may take for any step.
    pub timeout: Duration,
    /// How long to watch whether something happens that must not.
    pub settle: Duration,
    /// Entries of the ring, a power of two from 64 on.
    pub queue_size: u16,
    /// Also send what must be refused. A back-end that is not up to it dies of it.
    pub hostile: bool,
    /// Also write to the last MiB of the disk, and put back what was there.
    pub write: bool,
    /// A simple shell command that starts the back-end. It is run whenever the back-end died, killed by a check or not;
    /// and first of all, unless [`kill_pid`](Options::kill_pid) says that one runs already.
    pub restart: Option<String>,
    /// The back-end's process, to be killed with requests in flight. Needs `restart`.
    pub kill_pid: Option<i32>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            device: None,
            rings: None,
            pairs: None,
            feed: None,
            timeout: Duration::from_secs(10),
            settle: Duration::from_millis(300),
            queue_size: 256,
            hostile: false,
            write: false,
            restart: None,
            kill_pid: None,
        }
    }
}

/// Why nothing could be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// No connection, from the first.
    #[error("can't connect to {}: {source}: is the back-end running, and is this its socket?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A connection, and nothing behind it that a check could be made with.
    #[error("{} does not speak vhost-user, or not with us: {why}", path.display())]
    Greeting {
        /// The socket.
        path: PathBuf,
        /// What happened.
        why: String,
    },
    /// Rings that are to be checked and are not offered.
    #[error("packed rings are not offered: leave --rings out, or start the back-end with them")]
    NotPacked,
    /// Frames that don't come.
    #[error("no frame comes in from {feed:?}: {why}: is it the other end of this back-end, and is that up?")]
    Feed {
        /// Where they were to come from.
        feed: Feed,
        /// What happened.
        why: String,
    },
    /// A ring size that no split ring can have, or that is too small to check with.
    #[error("a ring of {0} entries: use a power of two from 64 to 1024")]
    QueueSize(u16),
    /// Something listens where the back-end was to be started.
    #[error("{} is served already: give --kill-pid if that may be killed, or another socket", path.display())]
    Served {
        /// The socket.
        path: PathBuf,
    },
    /// The back-end can't be started.
    #[error("can't start the back-end: {0}")]
    Start(io::Error),
}

/// Why a check could not go on.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0} is not offered")]
    NotOffered(String),
    #[error("no connection: {0}")]
    Connect(io::Error),
    #[error("the back-end hung up at {code}")]
    HungUp { code: Code },
    #[error("no answer to {code} within {waited:?}")]
    Silent { code: Code, waited: Duration },
    #[error("{code} was refused (answer {answer:#x})")]
    Refused { code: Code, answer: u64 },
    #[error("{0}")]
    Breach(String),
    #[error("the used ring is broken: {0}")]
    Ring(#[from] RingError),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("{0}")]
    Log(#[from] LogError),
    #[error("{0}")]
    System(#[from] io::Error),
}

impl From<nix::Error> for Fault {
    fn from(errno: nix::Error) -> Fault {
        Fault::System(errno.into())
    }
}

/// What a check came to, and what it saw.
struct Outcome(Verdict, String);

impl Outcome {
    fn kept(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::Kept, seen.into())
    }

    fn warning(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::Warning, seen.into())
    }

    fn broken(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::Broken, seen.into())
    }

    fn not_tested(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::NotTested, seen.into())
    }
}

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Outcome {
        let verdict = match &fault {
            Fault::NotOffered(_) => Verdict::NotOffered,
            // Our own trouble says nothing of the back-end.
            Fault::Memory(_) | Fault::Log(_) | Fault::System(_) => Verdict::NotTested,
            _ => Verdict::Broken,
        };
        Outcome(verdict, fault.to_string())
    }
}

/// One check of one rule.
struct Check {
    rule: &'static str,
    what: &'static str,
    when: When,
    run: fn(&mut Bench) -> Result<Outcome, Fault>,
}

/// On which rings a check is run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// Once: rings make no difference.
    Once,
    /// On split and packed rings; of a network interface, those that frames leave by.
    Rings,
    /// On split and packed rings by which the device writes data.
    Data,
    /// The same, but without anybody to bring frames in, those that they leave by.
    Best,
    /// On all of them.
    Each,
    /// On all split ones.
    Split,
    /// On all packed ones.
    Packed,
}

/// What rings carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// Requests to a disk.
    Requests,
    /// Frames that leave.
    Transmit,
    /// Frames that come in.
    Receive,
}

/// Rings to run a check on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    packed: bool,
    flow: Flow,
}

impl Shape {
    fn name(self) -> &'static str {
        match (self.flow, self.packed) {
            (Flow::Requests, false) => "split",
            (Flow::Requests, true) => "packed",
            (Flow::Transmit, false) => "split transmit",
            (Flow::Transmit, true) => "packed transmit",
            (Flow::Receive, false) => "split receive",
            (Flow::Receive, true) => "packed receive",
        }
    }
}

/// The device under test.
#[derive(Clone, Copy, Debug)]
enum Subject {
    Disk(Disk),
    Net,
}

impl Subject {
    /// A disk, or a network interface; the features that only one of them has tell.
    fn of(link: &Link, offer: Offer, given: Option<Kind>) -> Result<Subject, Fault> {
        let of_net = [VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_GUEST_ANNOUNCE]
            .into_iter()
            .chain([VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_MAC_ADDR])
            .any(|feature| offer.has(feature));
        match given.unwrap_or(if of_net { Kind::Net } else { Kind::Blk }) {
            Kind::Blk => Disk::of(link, offer).map(Subject::Disk),
            Kind::Net => Ok(Subject::Net),
        }
    }
}

/// A check that is about to be run, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Checks made.
    pub done: usize,
    /// Checks in all.
    pub all: usize,
    /// The rule.
    pub rule: &'static str,
    /// What is to be seen.
    pub what: &'static str,
    /// On which rings; empty if they make no difference.
    pub rings: &'static str,
}

/// What the back-end said when it was greeted.
#[derive(Clone, Copy, Debug)]
struct Offer {
    features: u64,
    protocol: u64,
    queues: u64,
}

impl Offer {
    fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    fn speaks(&self, feature: u32) -> bool {
        self.protocol & bit(feature) != 0
    }

    /// Fails with "not offered" without the protocol feature.
    fn need(&self, feature: u32) -> Result<(), Fault> {
        match self.speaks(feature) {
            true => Ok(()),
            false => Err(Fault::NotOffered(protocol_name(feature))),
        }
    }
}

/// The back-end under test, and what every check needs.
struct Bench {
    socket: PathBuf,
    options: Options,
    replies: Rc<RefCell<Replies>>,
    offer: Offer,
    subject: Subject,
    /// What brings frames in, if anything does.
    feed: Option<Feed>,
    /// The rings of the check that runs.
    shape: Shape,
    /// What may be killed and started again.
    process: Option<Process>,
}

impl Bench {
    /// A new connection on which nothing was said.
    fn connect(&self) -> Result<Link, Fault> {
        Link::connect(&self.socket, self.options.timeout, self.replies.clone()).map_err(Fault::Connect)
    }

    /// A new connection with features, memory and a ring that is not started.
    fn rig(&self, features: u64) -> Result<Rig, Fault> {
        self.rigged(features, 1)
    }

    /// The same with several rings for requests.
    fn rigged(&self, features: u64, rings: usize) -> Result<Rig, Fault> {
        let Bench { subject, shape, .. } = *self;
        let source = if shape.flow == Flow::Receive { self.source()? } else { None };
        Rig::new(self.connect()?, self.offer, &self.options, Plan { subject, shape, features, rings, source })
    }

    /// Somebody to bring frames in.
    fn source(&self) -> Result<Option<Source>, Fault> {
        Ok(match &self.feed {
            None => None,
            Some(Feed::Loop) => Some(Source::Loop),
            Some(Feed::Interface(name)) => Some(Source::interface(name)?),
            Some(Feed::Backend(socket)) => {
                let connect = || Link::connect(socket, self.options.timeout, Rc::default()).map_err(Fault::Connect);
                let link = connect()?;
                let offer = greet(&link)?;
                drop(link);
                let shape = Shape { packed: false, flow: Flow::Transmit };
                let plan = Plan { subject: Subject::Net, shape, features: 0, rings: 1, source: None };
                let rig = Rig::new(connect()?, offer, &self.options, plan)?;
                rig.start()?;
                Some(Source::Backend(Box::new(rig)))
            }
        })
    }

    /// How many rings may have requests at the same time.
    fn most_rings(&self) -> usize {
        let offered = usize::try_from(self.offer.queues).unwrap_or(MAX_RINGS);
        match self.subject {
            Subject::Disk(_) => offered.min(MAX_RINGS),
            // Pairs, of which the device says how many it has.
            Subject::Net if !self.offer.has(VIRTIO_NET_F_MQ) => 1,
            Subject::Net => self.options.pairs.map_or(offered, usize::from).min(offered).min(MAX_RINGS / 2),
        }
    }

    /// Whether the back-end serves another front-end.
    fn lives(&self) -> Result<(), Fault> {
        self.connect()?.barrier().map(|_| ())
    }

    /// Kills the back-end, and starts its successor.
    fn replace(&mut self) -> Result<(), Fault> {
        if let Some(process) = &mut self.process {
            process.kill()?;
            process.start()?;
        }
        Ok(())
    }

    /// The rings that a check is run on.
    fn shapes(&self, when: When) -> Vec<Shape> {
        let main = self.main_flow();
        let data = match self.subject {
            Subject::Disk(_) => Some(main),
            Subject::Net => self.feed.as_ref().map(|_| Flow::Receive),
        };
        let flows = match when {
            When::Once | When::Rings => vec![main],
            When::Data => data.into_iter().collect(),
            When::Best => vec![data.unwrap_or(main)],
            When::Each | When::Split | When::Packed => {
                std::iter::once(main).chain(data.filter(|data| *data != main)).collect()
            }
        };
        let split = self.options.rings != Some(Rings::Packed) && when != When::Packed;
        let packed = self.offer.has(VIRTIO_F_RING_PACKED) && self.options.rings != Some(Rings::Split);
        let packed = packed && when != When::Split;
        let kinds = split.then_some(false).into_iter().chain(packed.then_some(true));
        let kinds = kinds.take(if when == When::Once { 1 } else { 2 });
        kinds.flat_map(|packed| flows.iter().map(move |flow| Shape { packed, flow: *flow })).collect()
    }

    /// Why a check is run on none.
    fn left_out(&self, when: When) -> Outcome {
        match when {
            When::Packed if !self.offer.has(VIRTIO_F_RING_PACKED) => Fault::NotOffered("RING_PACKED".into()).into(),
            When::Split | When::Packed => Outcome::not_tested("--rings leaves it out"),
            _ => Outcome::not_tested("only frames that come in are written to memory: --feed brings some"),
        }
    }

    fn main_flow(&self) -> Flow {
        match self.subject {
            Subject::Disk(_) => Flow::Requests,
            Subject::Net => Flow::Transmit,
        }
    }
}

/// Checks the back-end at `socket`.
///
/// # Errors
/// When there is nothing to be checked. What goes wrong later is a finding.
pub fn check(socket: &Path, options: &Options) -> Result<Report, CheckError> {
    check_watched(socket, options, &mut |_| {})
}

/// Checks the back-end at `socket`, and tells `watch` of every check before it is run.
///
/// # Errors
/// As [`check`].
pub fn check_watched(socket: &Path, options: &Options, watch: &mut dyn FnMut(&Step)) -> Result<Report, CheckError> {
    if !options.queue_size.is_power_of_two() || !(64..=1024).contains(&options.queue_size) {
        return Err(CheckError::QueueSize(options.queue_size));
    }
    let mut bench = prepare(socket, options)?;
    let mut runs = Vec::new();
    let groups = [framing::CHECKS, blk::CHECKS, rings::CHECKS, order::CHECKS, log::CHECKS];
    let groups = groups.into_iter().chain([marks::CHECKS, memory::CHECKS, inflight::CHECKS]);
    for check in groups.chain([log::DEADLY, hostile::CHECKS]).flatten() {
        let shapes = bench.shapes(check.when);
        if shapes.is_empty() {
            runs.push((check, None));
        }
        runs.extend(shapes.into_iter().map(|shape| (check, Some(shape))));
    }
    let mut findings = Vec::new();
    let mut gone = None;
    let (mut slow, all) = (0, runs.len());
    for (done, (check, shape)) in runs.into_iter().enumerate() {
        let Check { rule, what, when, run } = *check;
        let rings = if when == When::Once { "" } else { shape.map_or("", Shape::name) };
        // What a region of packed rings holds, and what is made of it, is a rule of its own.
        let rule = if shape.is_some_and(|shape| shape.packed) && ["I2", "I3"].contains(&rule) { "I4" } else { rule };
        watch(&Step { done, all, rule, what, rings });
        let began = Instant::now();
        let unasked = what.starts_with(hostile::PREFIX) && !options.hostile;
        let Outcome(verdict, seen) = match (&gone, shape) {
            _ if unasked => Outcome::not_tested("needs --hostile"),
            (_, None) => bench.left_out(when),
            (Some(reason), _) => Outcome::not_tested(reason),
            (None, Some(shape)) => {
                bench.shape = shape;
                run(&mut bench).unwrap_or_else(Outcome::from)
            }
        };
        let took = began.elapsed();
        findings.push(Finding { rule, what, rings, verdict, seen, seconds: took.as_secs_f64() });
        if gone.is_some() || unasked || shape.is_none() {
            continue;
        }
        // Who was given all the time there is again and again, and did not answer, is given less.
        slow += u32::from(took >= bench.options.timeout);
        if slow == PATIENCE {
            bench.options.timeout = bench.options.timeout.min(IMPATIENT);
        }
        if let Err(fault) = bench.lives() {
            let seen = format!("after \"{rule} {what}\": {fault}");
            let what = "the next front-end is served";
            findings.push(Finding { rule: "R9", what, rings, verdict: Verdict::Broken, seen, seconds: 0.0 });
            let again = if bench.process.is_some() { bench.replace() } else { Err(fault) };
            gone = again.err().map(|fault| format!("the back-end is gone since \"{rule} {}\": {fault}", check.what));
        }
    }
    findings.push(flags(&bench.replies.borrow()));
    for (rule, what) in RULES {
        if !findings.iter().any(|finding| finding.rule == *rule) {
            let aside = ASIDE.iter().find(|(aside, _)| aside == rule);
            let seen = aside.map_or("no check is about it", |(_, why)| why).into();
            findings.push(Finding { rule, what, rings: "", verdict: Verdict::NotTested, seen, seconds: 0.0 });
        }
    }
    Ok(Report { socket: socket.into(), offers: offers(&bench), findings })
}

/// Meets the back-end, and whoever brings frames to it.
fn prepare(socket: &Path, options: &Options) -> Result<Bench, CheckError> {
    let process = start(socket, options)?;
    let replies = Rc::new(RefCell::new(Replies::default()));
    let link = Link::connect(socket, options.timeout, replies.clone())
        .map_err(|source| CheckError::Connect { path: socket.into(), source })?;
    let greeted = greet(&link).and_then(|offer| Ok((offer, Subject::of(&link, offer, options.device)?)));
    let greeting = |fault: Fault| CheckError::Greeting { path: socket.into(), why: fault.to_string() };
    let (offer, subject) = greeted.map_err(greeting)?;
    drop(link);
    if options.rings == Some(Rings::Packed) && !offer.has(VIRTIO_F_RING_PACKED) {
        return Err(CheckError::NotPacked);
    }
    let packed = options.rings == Some(Rings::Packed);
    let flow = if let Subject::Disk(_) = subject { Flow::Requests } else { Flow::Receive };
    let shape = Shape { packed, flow };
    let feed = options.feed.clone();
    let mut bench =
        Bench { socket: socket.into(), options: options.clone(), replies, offer, subject, feed, shape, process };
    if let Subject::Net = subject {
        match &options.feed {
            Some(feed) => {
                net::arrives(&bench).map_err(|fault| CheckError::Feed { feed: feed.clone(), why: fault.to_string() })?
            }
            None => {
                bench.feed = Some(Feed::Loop);
                if !net::loops(&bench).map_err(greeting)? {
                    bench.feed = None;
                }
            }
        }
    }
    Ok(bench)
}

/// Starts the back-end, if that is ours to do.
fn start(socket: &Path, options: &Options) -> Result<Option<Process>, CheckError> {
    let Some(command) = &options.restart else { return Ok(None) };
    let given = options.kill_pid.map(nix::unistd::Pid::from_raw);
    let mut process = Process::new(command, socket, options.timeout, given);
    if given.is_none() {
        if link::connect(socket, options.timeout).is_ok() {
            return Err(CheckError::Served { path: socket.into() });
        }
        process.start().map_err(CheckError::Start)?;
    }
    Ok(Some(process))
}

/// Says hello, and hears what the back-end offers. What it can't do otherwise it needs not offer.
fn greet(link: &Link) -> Result<Offer, Fault> {
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

/// Rule F2, by all replies of the run.
fn flags(replies: &Replies) -> Finding {
    let odd: Vec<String> =
        replies.odd.iter().map(|((code, flags), count)| format!("{code} {flags:#x} ({count} times)")).collect();
    let (verdict, seen) = match odd.is_empty() {
        true => (Verdict::Kept, format!("{} replies", replies.count)),
        false => (Verdict::Broken, format!("of {} replies: {}", replies.count, odd.join(", "))),
    };
    Finding { rule: "F2", what: "every reply has the flags 0x5", rings: "", verdict, seen, seconds: 0.0 }
}

fn offers(bench: &Bench) -> String {
    let Offer { features, protocol, queues } = bench.offer;
    let names: Vec<String> = (0..64).filter(|number| protocol & bit(*number) != 0).map(protocol_name).collect();
    let names = if names.is_empty() { "none".into() } else { names.join(" ") };
    let device = match (bench.subject, &bench.feed) {
        (Subject::Disk(disk), _) => format!("a disk of {} bytes", disk.bytes()),
        (Subject::Net, Some(feed)) => format!("a network interface, frames come from {feed:?}"),
        (Subject::Net, None) => "a network interface".into(),
    };
    format!("{device}, {queues} queues, features {features:#x}, protocol features {names}")
}

fn protocol_name(feature: u32) -> String {
    let known = protocol_feature::NAMES.iter().find(|(number, _)| *number == feature);
    known.map_or_else(|| format!("bit {feature}"), |(_, name)| (*name).into())
}
