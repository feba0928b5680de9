//! Checks a running vhost-user back-end against the rules of `docs/protocol.md` that live migration and crash recovery
//! depend on.
//!
//! | file | purpose |
//! |---|---|
//! | `rules`, `explain` | rules that exist, and their explanations |
//! | `stop` | early end of a check and of its waits |
//! | `options` | options and errors |
//! | `outcome`, `report` | results of checks, and the report |
//! | `ring_variant` | the rings that a check is run on |
//! | `pages` | pages of guest memory: hashes, changes and marks |
//! | `connection`, `negotiation` | main connection, messages of the back-end channel, and features |
//! | `device` | device kinds and their detection; requests and frames of each kind |
//! | `queue` | one ring of the harness, split or packed |
//! | `harness` | a guest without a CPU: memory, rings, logs, and the messages that pass them to a back-end |
//! | `page_server` | removal of guest memory, and the placement of its pages |
//! | `process` | the back-end's process, if it may be killed and restarted |
//! | `target` | the back-end under test, and connections to it |
//! | `blk`, `framing`, `rings`, `order`, `log`, `marks`, `memory`, `inflight`, `iommu`, `state`, `backend_channel`, `postcopy`, `hostile` | the checks, a file per group of rules |
//! | `table` | all checks: rules, rings, needs and order |
//!
//! A file uses only files above its row, or in it. `tests/layers.rs` fails for a circle.
//!
//! [`check`] runs the checks one after the other, each on a connection of its own. Every response of the back-end is a
//! finding, including a hang or a crash. Nothing is written to a disk unless [`CheckOptions::write`] is set.
//!
//! A check is run on split and packed rings, and on transmit and receive rings of a network interface, if they make a
//! difference; see `RingSelection`.
//!
//! # Example
//!
//! ```
//! # use std::os::fd::AsFd;
//! # use std::os::unix::net::UnixStream;
//! # use std::sync::Arc;
//! # use vhost_migrate::backend::{BackendListener, VirtioDevice, blk::{BlkDevice, BlkOptions}, serve};
//! # let folder = tempfile::tempdir()?;
//! # let (image, path) = (folder.path().join("disk.img"), folder.path().join("disk.sock"));
//! # std::fs::File::create(&image)?.set_len(16 << 20)?;
//! # let disk: Arc<dyn VirtioDevice> = Arc::new(BlkDevice::open(BlkOptions::new(&image))?);
//! # let listener = BackendListener::bind(&path)?;
//! # let (stop, stopper) = UnixStream::pair()?;
//! # let backend = std::thread::spawn(move || serve(&listener, &disk, stop.as_fd()));
//! use vhost_migrate::check::{CheckOptions, Rule, Verdict, check};
//!
//! let mut options = CheckOptions::default();
//! options.only = vec![Rule::F1];
//! let report = check(&path, &options)?;
//! assert_eq!(report.rules()[&Rule::F1], Verdict::Pass);
//! println!("{}", report.text(false));
//! # drop(stopper);
//! # backend.join().map_err(|_| "the back-end panicked")??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod backend_channel;
mod blk;
mod connection;
mod device;
mod explain;
mod framing;
mod harness;
mod hostile;
mod inflight;
mod iommu;
mod log;
mod marks;
mod memory;
mod negotiation;
mod options;
mod order;
mod outcome;
mod page_server;
mod pages;
mod postcopy;
mod process;
mod queue;
mod report;
mod ring_variant;
mod rings;
mod rules;
mod state;
mod stop;
mod table;
mod target;

pub use explain::{Consequence, Explanation, explain};
pub use options::{CheckError, CheckOptions, DeviceKind, FrameSource};
pub use outcome::Verdict;
pub use report::{CheckReport, Finding};
pub use rules::{NoSuchRule, Rule};
pub use stop::StopToken;

use std::path::Path;
use std::time::{Duration, Instant};

use outcome::Outcome;
use ring_variant::{RingSelection, RingVariant};
use table::{CHECKS, Permission};
use target::{describe_backend, prepare};

use crate::sys::with_causes::with_causes;

/// Number of checks that reach the timeout before it is reduced.
const SLOW_CHECKS: u32 = 3;
const REDUCED_TIMEOUT: Duration = Duration::from_secs(2);

/// Progress of a run: the check that is about to start.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CheckProgress {
    /// Number of completed checks.
    pub done: usize,
    /// Total number of checks.
    pub all: usize,
    /// Rule of the check.
    pub rule: Rule,
    /// Name of the check.
    pub what: &'static str,
    /// Rings that are used; empty if rings make no difference.
    pub rings: &'static str,
}

/// Checks the back-end at `socket`.
///
/// # Errors
/// If nothing can be checked, or [`CheckOptions::stop`] is set. Later errors are findings.
pub fn check(socket: &Path, options: &CheckOptions) -> Result<CheckReport, CheckError> {
    check_with_progress(socket, options, &mut |_| {})
}

/// Checks the back-end at `socket`, and calls `watch` before each check.
///
/// # Errors
/// As [`check`].
pub fn check_with_progress(
    socket: &Path,
    options: &CheckOptions,
    watch: &mut dyn FnMut(&CheckProgress),
) -> Result<CheckReport, CheckError> {
    if let Some(size) = options.queue_size.filter(|size| !size.is_power_of_two() || !(64..=1024).contains(size)) {
        return Err(CheckError::QueueSize(size));
    }
    let wanted = |rule: Rule| options.only.is_empty() || options.only.contains(&rule);
    let mut target = prepare(socket, options).map_err(|error| match options.stop.is_set() {
        true => CheckError::Stopped { unrestored: Vec::new() },
        false => error,
    })?;
    let mut runs = Vec::new();
    for check in CHECKS {
        let mut variants: Vec<Option<RingVariant>> = target.variants(check.run_on).into_iter().map(Some).collect();
        if variants.is_empty() {
            variants.push(None);
        }
        let named = variants.into_iter().map(|variant| (check, check.rule_on(variant), variant));
        runs.extend(named.filter(|(_, rule, _)| wanted(*rule)));
    }
    let mut findings = Vec::new();
    let mut gone = None;
    let (mut slow, all) = (0, runs.len());
    for (done, (check, rule, variant)) in runs.into_iter().enumerate() {
        let what = check.what;
        let rings = if check.run_on == RingSelection::Once { "" } else { variant.map_or("", RingVariant::name) };
        watch(&CheckProgress { done, all, rule, what, rings });
        let began = Instant::now();
        let missing = check.needs.missing(options);
        let outcome = match (missing, &gone, variant) {
            (Some(missing), ..) => Outcome::not_tested(missing),
            (_, _, None) => target.skip_outcome(check.run_on),
            (_, Some(reason), _) => Outcome::not_tested(reason),
            (None, None, Some(variant)) => {
                target.variant = variant;
                (check.run)(&mut target).unwrap_or_else(Outcome::from)
            }
        };
        let (took, verdict) = (began.elapsed(), outcome.0);
        let hostile = check.needs == Permission::Hostile;
        findings.push(Finding { rings, seconds: took.as_secs_f64(), hostile, ..Finding::new(rule, what, outcome) });
        if gone.is_some() || missing.is_some() || variant.is_none() {
            continue;
        }
        // A back-end that repeatedly does not reply in time gets a shorter timeout.
        slow += u32::from(verdict == Verdict::Fail && took >= target.options.timeout);
        if slow == SLOW_CHECKS {
            target.options.timeout = target.options.timeout.min(REDUCED_TIMEOUT);
        }
        let lives = target.check_served();
        target.check_stop()?;
        if let Err(abort) = lives {
            let name = format!("{rule} {what}");
            findings.push(Finding { rings, ..Finding::after(name.clone(), with_causes(&abort).to_string()) });
            let again = if target.process.is_some() { target.replace() } else { Err(abort) };
            gone = again.err().map(|abort| format!("the back-end is gone since \"{name}\": {}", with_causes(&abort)));
        }
    }
    target.check_stop()?;
    if let Some((status, times)) =
        target.process.as_ref().and_then(|process| Some((process.usual_exit()?, process.restarts.get())))
        && wanted(Rule::R9)
    {
        let seen = format!("it exits after each connection ({status}); it was restarted {times} times");
        findings.push(Finding::new(Rule::R9, "the back-end outlives its front-end", Outcome::warning(seen)));
    }
    if wanted(Rule::F2) {
        let outcome = target.replies.borrow().outcome();
        findings.push(Finding::new(Rule::F2, "every reply of the run has the flags 0x5", outcome));
    }
    for rule in Rule::ALL.iter().copied().filter(|rule| wanted(*rule)) {
        if !findings.iter().any(|finding| finding.rule == rule) {
            let outcome = Outcome::not_tested(rule.untestable().unwrap_or("there is no check for it"));
            findings.push(Finding::new(rule, rule.title(), outcome));
        }
    }
    Ok(CheckReport { socket: socket.into(), offers: describe_backend(&target), findings })
}
