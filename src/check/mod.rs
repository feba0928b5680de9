//! Checks a running vhost-user back-end against the rules of `docs/protocol.md` that live migration and crash recovery
//! depend on.
//!
//! | file | purpose |
//! |---|---|
//! | `rules`, `options` | rules that exist; options and errors |
//! | `connection` | main connection and messages of the back-end channel |
//! | `harness` | a guest without a CPU: memory, rings, logs, and the messages that pass them to a back-end |
//! | `queue` | one ring of the harness, split or packed |
//! | `target`, `ring_variant` | the back-end under test, and the rings that a check is run on |
//! | `device` | device kinds and their detection |
//! | `blk`, `net`, `fs`, `vsock`, `console` | requests, frames and rules of one kind of device |
//! | `framing`, `rings`, `order`, `log`, `marks`, `memory`, `inflight`, `iommu`, `state`, `backend_channel`, `postcopy`, `hostile` | the checks, a file per group of rules |
//! | `page_server` | removal of guest memory, and the placement of its pages |
//! | `stop` | early end of a check and of its waits |
//! | `process` | the back-end's process, if it may be killed and restarted |
//! | `outcome`, `report`, `explain` | results of checks, the report, and explanations of rules |
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
//! use vhost_migrate::check::{CheckOptions, Verdict, check, rule};
//!
//! let mut options = CheckOptions::default();
//! options.only = vec![rule("F1")?];
//! let report = check(&path, &options)?;
//! assert_eq!(report.rules()["F1"], Verdict::Pass);
//! println!("{}", report.text(false));
//! # drop(stopper);
//! # backend.join().map_err(|_| "the back-end panicked")??;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod backend_channel;
mod blk;
mod connection;
mod console;
mod device;
mod explain;
mod framing;
mod fs;
mod harness;
mod hostile;
mod inflight;
mod iommu;
mod log;
mod marks;
mod memory;
mod net;
mod options;
mod order;
mod outcome;
mod page_server;
mod postcopy;
mod process;
mod queue;
mod report;
mod ring_variant;
mod rings;
mod rules;
mod state;
mod stop;
mod target;
mod vsock;

pub use explain::{Consequence, Explanation, explain};
pub use net::FrameSource;
pub use options::{CheckError, CheckOptions, DeviceKind};
pub use report::{CheckReport, Finding, Verdict};
pub use rules::{RULES, rule};
pub use stop::StopToken;

use std::path::Path;
use std::time::{Duration, Instant};

use device::TestedDevice;
use outcome::{CheckAbort, Outcome};
use ring_variant::{Flow, RingSelection, RingVariant};
use rules::UNTESTABLE;
use target::{BackendFeatures, Target, describe_backend, prepare};

/// Number of checks that reach the timeout before it is reduced.
const SLOW_CHECKS: u32 = 3;
const REDUCED_TIMEOUT: Duration = Duration::from_secs(2);

/// A check of one rule.
struct Check {
    rule: &'static str,
    what: &'static str,
    run_on: RingSelection,
    run: fn(&mut Target) -> Result<Outcome, CheckAbort>,
}

impl Check {
    /// Returns the rule that is checked on these rings: for packed rings the inflight region has a rule of its own.
    fn rule_on(&self, variant: Option<RingVariant>) -> &'static str {
        match self.rule {
            "I2" | "I3" if variant.is_some_and(|variant| variant.packed) => "I4",
            rule => rule,
        }
    }
}

/// Progress of a run: the check that is about to start.
#[derive(Clone, Copy, Debug)]
pub struct CheckProgress {
    /// Number of completed checks.
    pub done: usize,
    /// Total number of checks.
    pub all: usize,
    /// Rule of the check.
    pub rule: &'static str,
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
    options.only.iter().try_for_each(|id| rule(id).map(drop))?;
    let wanted = |rule: &str| options.only.is_empty() || options.only.contains(&rule);
    let mut target = prepare(socket, options).map_err(|error| match options.stop.is_set() {
        true => CheckError::Stopped { unrestored: Vec::new() },
        false => error,
    })?;
    let mut runs = Vec::new();
    let groups = [framing::CHECKS, blk::CHECKS, rings::CHECKS, order::CHECKS, log::CHECKS];
    let groups = groups.into_iter().chain([marks::CHECKS, memory::CHECKS, inflight::CHECKS]);
    let groups = groups.chain([iommu::CHECKS, state::CHECKS, backend_channel::CHECKS, postcopy::CHECKS]);
    let may_kill = options.may_kill || options.hostile || options.restart.is_some();
    let needs_leave = (!may_kill).then_some("needs --may-kill: some back-ends do not survive it");
    let needs_hostile = (!options.hostile).then_some("needs --hostile");
    let groups = groups.map(|group| (None, group));
    let deadly =
        [(needs_leave, log::DESTRUCTIVE), (needs_leave, postcopy::DESTRUCTIVE), (needs_hostile, hostile::CHECKS)];
    for (needs, check) in groups.chain(deadly).flat_map(|(needs, group)| group.iter().map(move |check| (needs, check)))
    {
        let mut variants: Vec<Option<RingVariant>> = target.variants(check.run_on).into_iter().map(Some).collect();
        if variants.is_empty() {
            variants.push(None);
        }
        let named = variants.into_iter().map(|variant| (needs, check, check.rule_on(variant), variant));
        runs.extend(named.filter(|(_, _, rule, _)| wanted(rule)));
    }
    let mut findings = Vec::new();
    let mut gone = None;
    let (mut slow, all) = (0, runs.len());
    for (done, (needs, check, rule, variant)) in runs.into_iter().enumerate() {
        let Check { what, run_on, run, .. } = *check;
        let rings = if run_on == RingSelection::Once { "" } else { variant.map_or("", RingVariant::name) };
        watch(&CheckProgress { done, all, rule, what, rings });
        let began = Instant::now();
        let Outcome(verdict, seen) = match (needs, &gone, variant) {
            (Some(needs), ..) => Outcome::not_tested(needs),
            (_, _, None) => target.skip_outcome(run_on),
            (_, Some(reason), _) => Outcome::not_tested(reason),
            (None, None, Some(variant)) => {
                target.variant = variant;
                run(&mut target).unwrap_or_else(Outcome::from)
            }
        };
        let took = began.elapsed();
        findings.push(Finding { rule, what, rings, verdict, seen, seconds: took.as_secs_f64() });
        if gone.is_some() || needs.is_some() || variant.is_none() {
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
            let seen = format!("{}{rule} {what}\": {abort}", report::AFTER_PREFIX);
            let what = "the next front-end is served";
            findings.push(Finding { rule: "R9", what, rings, verdict: Verdict::Fail, seen, seconds: 0.0 });
            let again = if target.process.is_some() { target.replace() } else { Err(abort) };
            gone = again.err().map(|abort| format!("the back-end is gone since \"{rule} {}\": {abort}", check.what));
        }
    }
    target.check_stop()?;
    if let Some((status, times)) =
        target.process.as_ref().and_then(|process| Some((process.usual_exit()?, process.restarts.get())))
        && wanted("R9")
    {
        let (what, rings) = ("the back-end outlives its front-end", "");
        let seen = format!("it exits after each connection ({status}); it was restarted {times} times");
        findings.push(Finding { rule: "R9", what, rings, verdict: Verdict::Warning, seen, seconds: 0.0 });
    }
    if wanted("F2") {
        let Outcome(verdict, seen) = target.replies.borrow().outcome();
        let what = "every reply of the run has the flags 0x5";
        findings.push(Finding { rule: "F2", what, rings: "", verdict, seen, seconds: 0.0 });
    }
    for (rule, what) in RULES.iter().filter(|(rule, _)| wanted(rule)) {
        if !findings.iter().any(|finding| finding.rule == *rule) {
            let untestable = UNTESTABLE.iter().find(|(untestable, _)| untestable == rule);
            let seen = untestable.map_or("there is no check for it", |(_, reason)| reason).into();
            findings.push(Finding { rule, what, rings: "", verdict: Verdict::NotTested, seen, seconds: 0.0 });
        }
    }
    Ok(CheckReport { socket: socket.into(), offers: describe_backend(&target), findings })
}
