//! Whether a running vhost-user back-end keeps the rules of `docs/protocol.md` that migration and crash-resume rest on.
//!
//! | file | purpose |
//! |---|---|
//! | `link` | one connection, message by message |
//! | `rig` | a guest without a CPU: memory, a ring in it, logs, and the messages that hand them to a back-end |
//! | `blk` | what only a block device has: its requests, its configuration space |
//! | `framing`, `rings`, `log`, `memory`, `inflight`, `hostile` | the checks, a file per group of rules |
//! | `process` | the back-end's process, where it may be killed and started again |
//! | `report` | what was found |
//!
//! [`check`] makes one connection after the other, and each check has one of its own. Whatever the back-end does, hanging
//! and dying included, is a finding. Nothing is written to the disk, unless [`Options::write`] allows it.
//!
//! Here: split rings of a block device. Another kind of device brings its own requests in the place of `blk`; the checks
//! ask only for a batch of device writes, and where those may land.
#![forbid(unsafe_code)]

mod blk;
mod framing;
mod hostile;
mod inflight;
mod link;
mod log;
mod memory;
mod process;
mod report;
mod rig;
mod rings;

pub use report::{Finding, Report, Verdict};

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::abi::bit;
use crate::abi::vhost_user::{Request as Code, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature};
use crate::dirty::LogError;
use crate::memory::MemoryError;
use crate::ring::RingError;

use blk::Disk;
use link::{Link, Replies};
use process::Process;
use rig::{PROTOCOL, Rig};

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
];

/// How to check.
#[derive(Clone, Debug)]
pub struct Options {
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
    run: fn(&mut Bench) -> Result<Outcome, Fault>,
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
    disk: Disk,
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
        Rig::new(self.connect()?, self.offer, self.disk, &self.options, features)
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
}

/// Checks the back-end at `socket`.
///
/// # Errors
/// When there is nothing to be checked. What goes wrong later is a finding.
pub fn check(socket: &Path, options: &Options) -> Result<Report, CheckError> {
    if !options.queue_size.is_power_of_two() || !(64..=1024).contains(&options.queue_size) {
        return Err(CheckError::QueueSize(options.queue_size));
    }
    let process = start(socket, options)?;
    let replies = Rc::new(RefCell::new(Replies::default()));
    let link = Link::connect(socket, options.timeout, replies.clone())
        .map_err(|source| CheckError::Connect { path: socket.into(), source })?;
    let greeted = greet(&link).and_then(|offer| Ok((offer, Disk::of(&link, offer)?)));
    let (offer, disk) =
        greeted.map_err(|fault| CheckError::Greeting { path: socket.into(), why: fault.to_string() })?;
    drop(link);
    let mut bench = Bench { socket: socket.into(), options: options.clone(), replies, offer, disk, process };
    let mut findings = Vec::new();
    let mut gone = None;
    let groups = [framing::CHECKS, blk::CHECKS, rings::CHECKS, log::CHECKS, memory::CHECKS, inflight::CHECKS];
    for check in groups.into_iter().chain([log::DEADLY, hostile::CHECKS]).flatten() {
        let Check { rule, what, run } = *check;
        let began = Instant::now();
        let unasked = what.starts_with(hostile::PREFIX) && !options.hostile;
        let Outcome(verdict, seen) = match &gone {
            _ if unasked => Outcome::not_tested("needs --hostile"),
            Some(reason) => Outcome::not_tested(reason),
            None => run(&mut bench).unwrap_or_else(Outcome::from),
        };
        findings.push(Finding { rule, what, verdict, seen, seconds: began.elapsed().as_secs_f64() });
        if gone.is_none()
            && !unasked
            && let Err(fault) = bench.lives()
        {
            let seen = format!("after \"{rule} {what}\": {fault}");
            let next = "the next front-end is served";
            findings.push(Finding { rule: "R9", what: next, verdict: Verdict::Broken, seen, seconds: 0.0 });
            let again = if bench.process.is_some() { bench.replace() } else { Err(fault) };
            gone = again.err().map(|fault| format!("the back-end is gone since \"{rule} {what}\": {fault}"));
        }
    }
    findings.push(flags(&bench.replies.borrow()));
    for (rule, what) in RULES {
        if !findings.iter().any(|finding| finding.rule == *rule) {
            let seen = "no check is about it".into();
            findings.push(Finding { rule, what, verdict: Verdict::NotTested, seen, seconds: 0.0 });
        }
    }
    Ok(Report { socket: socket.into(), offers: offers(&bench), findings })
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
    Finding { rule: "F2", what: "every reply has the flags 0x5", verdict, seen, seconds: 0.0 }
}

fn offers(bench: &Bench) -> String {
    let Offer { features, protocol, queues } = bench.offer;
    let names: Vec<String> = (0..64).filter(|number| protocol & bit(*number) != 0).map(protocol_name).collect();
    format!(
        "a disk of {} bytes, {queues} queues, features {features:#x}, protocol features {}",
        bench.disk.bytes(),
        if names.is_empty() { "none".into() } else { names.join(" ") }
    )
}

fn protocol_name(feature: u32) -> String {
    let known = protocol_feature::NAMES.iter().find(|(number, _)| *number == feature);
    known.map_or_else(|| format!("bit {feature}"), |(_, name)| (*name).into())
}
