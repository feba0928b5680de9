//! Source side of a migration: rounds while the guest runs, then the switchover.
//!
//! ```text
//! connected → accepted → tracking ⟲ round → paused → last pages → state → READY → COMMIT → STARTED
//!     └──────────┴──────────┴─────────┴────────┴──────────┴────────┴───────┘ ↑        │        │
//!            every failure: guest resumed, bits put back, tracking stopped   └ FAILED ┤    released
//!                                                             HELD, no answer: paused ┘
//! ```
//!
//! From the commit on, the source keeps the guest paused until the destination confirms that it runs. If the connection
//! fails in between, the source queries the outcome over another connection.
//!
//! A page's dirty bit is harvested before the page is read. Pages that a failed round may not have sent are put back
//! (rule L14.1).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, bounded};

use super::converge::{Convergence, ConvergencePolicy, NextStep, RoundResult, RoundTime, STALL_ROUNDS};
use super::error::{MigrateError, MigrationFailure};
use super::report::{GuestLocation, MigrationEvent, MigrationReport, RoundReport};
use super::time_limit::TimeLimit;
use super::vm::SourceVm;
use crate::dirty::{DirtySource, PageSet};
use crate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, PageRange};
use crate::stream::frame::{FrameReader, FrameWriter};
use crate::stream::hashes::send_hashes;
use crate::stream::pages::{PageEncoder, runs_of_channel};
use crate::stream::record::{Commit, DataRuns, MemoryLayout, RoundEnd, ToDestination};
use crate::stream::{
    CancelToken, Codec, PageStats, RateLimiter, Started, StreamChannel, StreamConnection, StreamError, ToSource,
};
use crate::sys::with_causes::with_causes;

/// Interval of [`MigrationEvent::Progress`].
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Time without sent bytes in a round after which the user is warned.
const IDLE_WARNING_TIME: Duration = Duration::from_secs(5);

/// Time limit for reading the reason after the peer has closed the connection.
const FINAL_MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for which a source queries the outcome after the connection has failed.
pub const OUTCOME_QUERY_TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit of one outcome query, and the delay before the next.
const QUERY_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const QUERY_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Minimum of the default switchover timeout.
const MIN_SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(10);

/// The operation that is retried if it fails because a device becomes unavailable.
const STOPPING_GUEST: &str = "stopping the guest";

/// Time for which a device may be unavailable when the guest is to be stopped.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(60);
/// Delay between rounds while a device is unavailable, and the interval of checks.
const DEVICE_ROUND_INTERVAL: Duration = Duration::from_secs(2);
const DEVICE_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Parameters of a migration.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MigrationParameters {
    /// Limits for the rounds.
    pub policy: ConvergencePolicy,
    /// Compression of pages.
    pub codec: Codec,
    /// Compare all memory of the stopped guest with the destination's, by hashes, before the commit. A missing or
    /// incomplete dirty source then fails the migration, and the guest resumes here.
    pub verify: bool,
    /// Time for which the outcome is queried if the connection fails after the commit: [`OUTCOME_QUERY_TIMEOUT`].
    pub outcome_query_timeout: Duration,
    /// Time limit of the switchover, from stopping the guest until the destination confirms that it runs. Before the
    /// commit, the guest resumes here when it has passed; after the commit, the outcome is queried. `None` is four
    /// times the downtime limit and at least 10 s; with `verify` one second more for each 256 MiB of memory.
    pub switchover_timeout: Option<Duration>,
    /// Resume the guest here once a complete file or device holds it: a snapshot. Its disks are not part of the
    /// snapshot. Refused for all other destinations, because the guest would run twice.
    pub continue_here: bool,
}

impl Default for MigrationParameters {
    /// The default policy, pages as they are, no comparison, the default time limits; the guest moves.
    fn default() -> MigrationParameters {
        MigrationParameters {
            policy: ConvergencePolicy::default(),
            codec: Codec::None,
            verify: false,
            outcome_query_timeout: OUTCOME_QUERY_TIMEOUT,
            switchover_timeout: None,
            continue_here: false,
        }
    }
}

impl MigrationParameters {
    /// Returns the switchover timeout for a guest with `memory` bytes of memory.
    fn switchover_limit(&self, memory: u64) -> Duration {
        self.switchover_timeout.unwrap_or_else(|| {
            let verifying = if self.verify { memory >> 28 } else { 0 };
            (4 * self.policy.downtime_limit).max(MIN_SWITCHOVER_TIMEOUT) + Duration::from_secs(verifying)
        })
    }

    setters! {
        with_policy: policy: ConvergencePolicy,
        with_codec: codec: Codec,
        with_verify: verify: bool,
        with_outcome_query_timeout: outcome_query_timeout: Duration,
        with_switchover_timeout: switchover_timeout: Option<Duration>,
        with_continue_here: continue_here: bool,
    }
}

/// Migrates the guest of `vm` over `connection`. The connection's rate limit applies until the guest is stopped. Another
/// thread may cancel the migration by the connection's token.
///
/// # Errors
/// [`MigrationFailure`] with the location of the guest. Before the commit the guest resumes here, if the VM can resume.
pub fn migrate(
    vm: &mut dyn SourceVm,
    connection: StreamConnection,
    parameters: &MigrationParameters,
    on_event: &mut dyn FnMut(MigrationEvent),
) -> Result<MigrationReport, MigrationFailure> {
    let begun = Instant::now();
    vm.set_cancel(connection.cancel_token());
    let memory = vm.memory();
    let run = vm.is_running();
    if parameters.continue_here && !connection.is_to_file() {
        let (error, location) = (MigrateError::NotAFile, local_location(run));
        on_event(MigrationEvent::Failed { message: with_causes(&error).to_string(), location });
        return Err(MigrationFailure { error, location });
    }
    let (cancel, limiter) = (connection.cancel_token().clone(), connection.rate_limiter().clone());
    let codec = if connection.zstd { parameters.codec } else { Codec::None };
    if codec != parameters.codec {
        let message = format!(
            "the destination was built without zstd: pages are sent uncompressed, not with {}",
            parameters.codec
        );
        on_event(MigrationEvent::Warning { message });
    }
    let (stream, dirty) = open(vm, &memory, connection, codec).map_err(|error| {
        let location = local_location(run);
        on_event(MigrationEvent::Failed { message: with_causes(&error).to_string(), location });
        MigrationFailure { error, location }
    })?;
    let mut pending = PageSet::new(PageNumber::containing(memory.end()).0);
    for region in memory.regions() {
        pending.insert_range(region.pages());
    }
    on_event(MigrationEvent::Started {
        guest_bytes: memory.size(),
        channels: stream.channels.len() as u16,
        codec: codec.to_string(),
        log_quality: dirty.log_quality(),
    });
    let report =
        MigrationReport { guest_bytes: memory.size(), log_quality: dirty.log_quality(), ..MigrationReport::default() };
    let mut migration = OutgoingMigration {
        stream,
        memory,
        dirty,
        pending,
        report,
        cancel,
        limiter,
        tell: on_event,
        tracked_seconds: 0.0,
        stopped_at: None,
        run,
    };
    let outcome = migration.run(vm, parameters);
    migration.finish(vm, outcome, parameters, begun)
}

/// Location of a guest that was not handed over.
fn local_location(run: bool) -> GuestLocation {
    if run { GuestLocation::RunningHere } else { GuestLocation::PausedHere }
}

/// Replaces an error that results from cancellation by [`MigrateError::Cancelled`].
fn prefer_cancelled(error: MigrateError, cancel: &CancelToken) -> MigrateError {
    match error {
        MigrateError::Vm { .. } | MigrateError::Dirty(_) if cancel.is_cancelled() => MigrateError::Cancelled,
        error => error,
    }
}

/// Exchanges the memory layout and starts dirty tracking.
fn open(
    vm: &mut dyn SourceVm,
    memory: &Memory,
    connection: StreamConnection,
    codec: Codec,
) -> Result<(OutgoingStream, Box<dyn DirtySource>), MigrateError> {
    let cancel = connection.cancel_token().clone();
    let mut stream = OutgoingStream::new(connection, codec)?;
    let dirty = begin(vm, memory, &mut stream).map_err(|error| prefer_cancelled(error, &cancel));
    let dirty = dirty.inspect_err(|error| stream.send_cancel(error))?;
    Ok((stream, dirty))
}

/// Exchanges the memory layout over `stream` and starts dirty tracking.
fn begin(
    vm: &mut dyn SourceVm,
    memory: &Memory,
    stream: &mut OutgoingStream,
) -> Result<Box<dyn DirtySource>, MigrateError> {
    stream.open(memory)?;
    // A hint: the rounds find pages written from now on.
    let sent = stream.send_message(&ToDestination::DataRuns(DataRuns::from_memory(memory)));
    sent.map_err(|error| stream.peer_reason(error))?;
    let devices = vm.devices().map_err(|cause| MigrateError::Vm { doing: "describing the devices", cause });
    if let Some(devices) = devices? {
        let sent = stream.send_message(&ToDestination::Devices(devices));
        sent.map_err(|error| stream.peer_reason(error))?;
    }
    let dirty = vm.dirty_source().map_err(|cause| MigrateError::Vm { doing: "tracking dirty pages", cause });
    dirty.and_then(|mut dirty| Ok(dirty.start().map(|()| dirty)?))
}

/// Stage at which a migration failed.
enum Stage {
    /// The guest was not touched.
    Running,
    /// The guest is paused, and no complete commit was sent.
    Paused,
    /// The commit may have arrived.
    Committed,
}

struct OutgoingMigration<'a> {
    stream: OutgoingStream,
    memory: Memory,
    dirty: Box<dyn DirtySource>,
    /// Pages that the destination lacks or has in an older version.
    pending: PageSet,
    report: MigrationReport,
    cancel: CancelToken,
    limiter: RateLimiter,
    tell: &'a mut dyn FnMut(MigrationEvent),
    /// Time for which dirty pages were counted, seconds.
    tracked_seconds: f64,
    /// Time at which stopping the guest began.
    stopped_at: Option<Instant>,
    /// True if the guest's CPUs run before and after the migration.
    run: bool,
}

/// Results of the rounds, over all attempts to stop the guest.
struct RoundState {
    convergence: Convergence,
    time: RoundTime,
    /// Number of dirtied pages.
    dirtied: u64,
    count: u32,
    /// Time since which an unavailable device prevents stopping the guest.
    away_since: Option<Instant>,
}

impl OutgoingMigration<'_> {
    fn run(&mut self, vm: &mut dyn SourceVm, parameters: &MigrationParameters) -> Result<(), (Stage, MigrateError)> {
        let convergence = Convergence::new(parameters.policy, self.pending.len());
        let mut rounds = RoundState { convergence, time: RoundTime::default(), dirtied: 0, count: 0, away_since: None };
        loop {
            self.rounds(vm, &mut rounds).map_err(|error| (Stage::Running, error))?;
            let failed = match self.switchover(vm, rounds.count, parameters) {
                Err((Stage::Paused, error @ MigrateError::Vm { doing: STOPPING_GUEST, .. })) => error,
                done => return done,
            };
            if self.cancel.is_cancelled() || vm.blocker().is_none() {
                return Err((Stage::Paused, failed));
            }
            // A device became unavailable during the pause.
            if let Err(cause) = vm.resume() {
                return Err((Stage::Paused, MigrateError::NotResumed { error: failed.into(), cause }));
            }
        }
    }

    /// Sends rounds until the guest is to be stopped and nothing prevents it.
    fn rounds(&mut self, vm: &mut dyn SourceVm, rounds: &mut RoundState) -> Result<(), MigrateError> {
        loop {
            let round = rounds.count;
            let begun = Instant::now();
            let wire_before = self.stream.bytes();
            let (sent, spent) = self.send_round(round, false, false)?;
            rounds.time += spent;
            // Data synced now need not be synced while the guest is stopped.
            let syncing = Instant::now();
            self.stream.sync()?;
            let sending = spent.sending + syncing.elapsed();
            // Everything pending was sent. Pages written since are in the harvest, also if it fails halfway.
            self.pending = PageSet::new(self.pending.capacity());
            self.dirty.harvest(&mut self.pending)?;
            let took = begun.elapsed().as_secs_f64();
            self.tracked_seconds += took;
            rounds.dirtied += self.pending.len();
            self.report.dirty_rate_bytes_per_s = (rounds.dirtied * LOG_PAGE) as f64 / self.tracked_seconds;
            let left = self.pending.len();
            let next = rounds.convergence.next_step(RoundResult {
                data_pages: sent.data_pages,
                zero_pages: sent.zero_pages,
                duration: sending,
                left,
            });
            let (NextStep::Round { expected, .. } | NextStep::Switchover { expected } | NextStep::GiveUp { expected }) =
                next;
            let expected_downtime_ms = as_milliseconds(expected);
            (self.tell)(MigrationEvent::Round(RoundReport {
                round,
                data_pages: sent.data_pages,
                zero_pages: sent.zero_pages,
                wire_bytes: self.stream.bytes() - wire_before,
                ms: took * 1e3,
                pages_left: left,
                dirty_bytes_per_second: (left * LOG_PAGE) as f64 / took,
                expected_downtime_ms,
            }));
            rounds.count += 1;
            match next {
                NextStep::Round { without_progress, .. } => {
                    if without_progress == STALL_ROUNDS {
                        (self.tell)(MigrationEvent::Stalled { message: stall_message(rounds, left, took, expected) });
                    }
                }
                NextStep::Switchover { .. } => {
                    if let Some(message) = vm.blocker() {
                        self.wait_for_devices(vm, rounds, message)?;
                        continue;
                    }
                    rounds.away_since = None;
                    (self.tell)(MigrationEvent::Switchover { pages_left: left, expected_downtime_ms });
                    return Ok(());
                }
                NextStep::GiveUp { .. } => {
                    return Err(MigrateError::NoConvergence {
                        rounds: rounds.count,
                        expected_ms: expected_downtime_ms,
                        remedy: rounds.time.remedy(),
                    });
                }
            }
        }
    }

    /// Waits for an unavailable device, at most until the next round is due.
    fn wait_for_devices(
        &mut self,
        vm: &dyn SourceVm,
        rounds: &mut RoundState,
        message: String,
    ) -> Result<(), MigrateError> {
        if rounds.away_since.is_none() {
            (self.tell)(MigrationEvent::Waiting { message: message.clone() });
        }
        let since = *rounds.away_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= DEVICE_TIMEOUT {
            return Err(MigrateError::DeviceAway(message));
        }
        let begun = Instant::now();
        while begun.elapsed() < DEVICE_ROUND_INTERVAL && vm.blocker().is_some() {
            self.cancel.wait(DEVICE_POLL_INTERVAL)?;
        }
        Ok(())
    }

    /// Stops the guest and hands it over within the switchover timeout.
    fn switchover(
        &mut self,
        vm: &mut dyn SourceVm,
        round: u32,
        parameters: &MigrationParameters,
    ) -> Result<(), (Stage, MigrateError)> {
        let limit = parameters.switchover_limit(self.memory.size());
        let timer = self.stream.start_time_limit(limit, &self.cancel).map_err(|error| (Stage::Running, error))?;
        self.hand_over(vm, round, parameters.verify).map_err(|(stage, error)| match error {
            MigrateError::Cancelled | MigrateError::Stream(_) if timer.has_passed() => {
                (stage, MigrateError::SwitchoverTimeout { limit, doing: "sending what was left and hearing of it" })
            }
            MigrateError::Vm { doing, .. } if timer.has_passed() => {
                (stage, MigrateError::SwitchoverTimeout { limit, doing })
            }
            error => (stage, error),
        })
    }

    fn hand_over(&mut self, vm: &mut dyn SourceVm, round: u32, verify: bool) -> Result<(), (Stage, MigrateError)> {
        let vm_error = |doing| move |cause| MigrateError::Vm { doing, cause };
        self.stopped_at = Some(Instant::now());
        let paused = (|| {
            vm.pause().map_err(vm_error(STOPPING_GUEST))?;
            self.limiter.set(None);
            self.dirty.harvest_stopped(&mut self.pending)?;
            self.send_round(round, true, verify)?;
            self.report.rounds = round + 1;
            let state = vm.state().map_err(vm_error("saving the guest's state"))?;
            vm.warnings().into_iter().for_each(|message| (self.tell)(MigrationEvent::Warning { message }));
            self.stream.send_message(&ToDestination::State(state))?;
            if !self.stream.one_way {
                self.stream.expect("READY", |message| matches!(message, ToSource::Ready).then_some(()))?;
            }
            // A slow disk cannot be interrupted. If the time has passed meanwhile, the guest still resumes here.
            self.stream.sync()?;
            // The migration cannot be cancelled from here on: the commit is sent completely or not at all.
            self.cancel.disarm()?;
            self.stream.send_message(&ToDestination::Commit(Commit { run: self.run }))
        })();
        paused.map_err(|error: MigrateError| (Stage::Paused, error))?;
        if self.stream.one_way {
            self.stream.finish_one_way()?;
        } else {
            let started = self.stream.read_outcome().map_err(|error| match error {
                MigrateError::Destination(_) => (Stage::Paused, error),
                error => (Stage::Committed, error),
            })?;
            self.record_observed_downtime(started);
        }
        Ok(())
    }

    fn record_observed_downtime(&mut self, started: Started) {
        self.report.observed_downtime_ms = started.observed_downtime_ns.map(|ns| ns as f64 / 1e6);
    }

    /// Resumes or releases the guest according to `outcome`, and creates the report.
    fn finish(
        mut self,
        vm: &mut dyn SourceVm,
        outcome: Result<(), (Stage, MigrateError)>,
        parameters: &MigrationParameters,
        begun: Instant,
    ) -> Result<MigrationReport, MigrationFailure> {
        let outcome = outcome.or_else(|(stage, error)| match stage {
            Stage::Committed => self.query_outcome(error, parameters.outcome_query_timeout),
            stage => Err((stage, error)),
        });
        let downtime = match outcome {
            Ok(()) => {
                if parameters.continue_here
                    && let Err(cause) = vm.resume()
                {
                    return Err(self.report_failure(MigrateError::SavedNotResumed(cause), GuestLocation::PausedHere));
                }
                let downtime = self.stopped_at.map(|stopped_at| stopped_at.elapsed()).unwrap_or_default();
                if !parameters.continue_here {
                    vm.release();
                }
                self.stream.detach();
                downtime
            }
            Err((Stage::Committed, error)) => {
                self.dirty.put_back(&self.pending);
                self.stream.detach();
                return Err(self.report_failure(error, GuestLocation::OutcomeUnknown));
            }
            Err((stage, error)) => {
                // Resumed first: the following steps may wait for the destination.
                let resumed = if let Stage::Paused = stage { vm.resume() } else { Ok(()) };
                let error = match prefer_cancelled(error, &self.cancel) {
                    MigrateError::Cancelled => MigrateError::Cancelled,
                    error => self.stream.peer_reason(error),
                };
                self.stream.send_cancel(&error);
                self.dirty.put_back(&self.pending);
                let location = local_location(self.run);
                return Err(match resumed {
                    Ok(()) => self.report_failure(error, location),
                    Err(cause) => {
                        let error = MigrateError::NotResumed { error: error.into(), cause };
                        self.report_failure(error, GuestLocation::PausedHere)
                    }
                });
            }
        };
        stop_tracking(self.dirty.as_mut());
        self.report.total_ms = as_milliseconds(begun.elapsed());
        self.report.downtime_ms = as_milliseconds(downtime);
        self.report.wire_bytes = self.stream.bytes();
        (self.tell)(MigrationEvent::Completed(self.report.clone()));
        Ok(self.report)
    }

    /// Queries the outcome of a commit until it is known or `timeout` has passed.
    fn query_outcome(&mut self, error: MigrateError, timeout: Duration) -> Result<(), (Stage, MigrateError)> {
        let begun = Instant::now();
        let answered = matches!(error, MigrateError::Held(_));
        let Some(connection) = self.stream.connection.as_ref().filter(|to| !answered && !to.one_way) else {
            return Err((Stage::Committed, error));
        };
        (self.tell)(MigrationEvent::Asking { message: with_causes(&error).to_string() });
        // The old connection must not deliver an answer any more.
        connection.channels.iter().for_each(StreamChannel::shutdown);
        let vm_error = loop {
            let left = timeout.saturating_sub(begun.elapsed());
            let (vm_error, last) = match connection.query_outcome(left.min(QUERY_ATTEMPT_TIMEOUT)) {
                Ok(ToSource::Started(started)) => {
                    self.record_observed_downtime(started);
                    return Ok(());
                }
                Ok(ToSource::Failed { message }) => return Err((Stage::Paused, MigrateError::Destination(message))),
                Ok(ToSource::Held(held)) if !held.starting => {
                    return Err((Stage::Committed, MigrateError::Held(held.message)));
                }
                Ok(ToSource::Held(_)) => ("the destination is starting the guest".into(), false),
                Ok(ToSource::Unknown) => ("another process replied, which does not know this migration".into(), true),
                Ok(other) => (format!("the destination replied with {other:?}"), true),
                Err(error @ StreamError::NoReturnPath) => (error.to_string(), true),
                Err(error) => (with_causes(&error).to_string(), false),
            };
            if last || begun.elapsed() >= timeout {
                break vm_error;
            }
            std::thread::sleep(QUERY_RETRY_DELAY);
        };
        Err((Stage::Committed, MigrateError::OutcomeUnknown { error: error.into(), reason: vm_error }))
    }

    fn report_failure(&mut self, error: MigrateError, location: GuestLocation) -> MigrationFailure {
        stop_tracking(self.dirty.as_mut());
        (self.tell)(MigrationEvent::Failed { message: with_causes(&error).to_string(), location });
        MigrationFailure { error, location }
    }

    /// Sends all pending pages, with `verify` also hashes of all memory, and ends the round on every channel. Returns
    /// the time of the slowest channel.
    fn send_round(&mut self, round: u32, last: bool, verify: bool) -> Result<(PageStats, RoundTime), MigrateError> {
        let (memory, pending, limiter, tell) = (&self.memory, &self.pending, &self.limiter, &mut self.tell);
        let siblings: Vec<StreamChannel> =
            self.stream.channels.iter_mut().map(|c| c.writer.get_mut().clone()).collect();
        let channels = self.stream.channels.len() as u16;
        let total = pending.len();
        let (mut sent, mut longest, mut hashed_for) = (PageStats::default(), RoundTime::default(), Duration::ZERO);
        std::thread::scope(|scope| {
            let (done, ended) = bounded(usize::from(channels));
            let before: u64 = self.stream.pages_sent();
            let counters: Vec<Arc<AtomicU64>> = self.stream.channels.iter().map(|c| c.encoder.progress()).collect();
            for (number, channel) in self.stream.channels.iter_mut().enumerate() {
                let done = done.clone();
                scope.spawn(move || {
                    let runs = runs_of_channel(pending.runs(), number as u16, channels);
                    let hashed = verify.then_some(PageRange::inside(GuestAddress(0), memory.end().0));
                    let hashed = runs_of_channel(hashed, number as u16, channels);
                    let result = channel.send_round(memory, runs, hashed, round, last);
                    // The receiver outlives all senders.
                    let _ = done.send(result);
                });
            }
            drop(done);
            let (mut reported, mut reported_at) = (0, Instant::now());
            let mut idle = IdleDetector::default();
            loop {
                match ended.recv_timeout(PROGRESS_INTERVAL) {
                    Ok(Err(error)) => {
                        // The data of the other channels is useless now. Channel 0 can still receive the reason. After
                        // cancellation the channels end by themselves between two frames, so that the source can send
                        // its reason.
                        limiter.set(None);
                        if !self.cancel.is_cancelled() {
                            siblings.iter().for_each(StreamChannel::shutdown_write);
                        }
                        return Err(error);
                    }
                    Ok(Ok((pages, spent, hashing))) => {
                        sent += pages;
                        if spent.sending >= longest.sending {
                            longest = spent;
                        }
                        hashed_for = hashed_for.max(hashing);
                    }
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                    Err(RecvTimeoutError::Timeout) if last => {}
                    Err(RecvTimeoutError::Timeout) => {
                        let now: u64 = counters.iter().map(|counter| counter.load(Ordering::Relaxed)).sum();
                        let so_far = now - before;
                        let bytes_per_second = ((so_far - reported) * LOG_PAGE) as f64 / reported_at.elapsed().as_secs_f64();
                        let pages_left = total.saturating_sub(so_far);
                        tell(MigrationEvent::Progress { round, pages_left, bytes_per_second });
                        (reported, reported_at) = (so_far, Instant::now());
                        if idle.starts_idle(siblings.iter().map(StreamChannel::bytes_sent).sum()) {
                            let message = format!(
                                "nothing was read by the destination for {IDLE_WARNING_TIME:?}: it or the network may be stuck. The guest \
                                 runs here, and keeps running here if the migration fails"
                            );
                            tell(MigrationEvent::Warning { message });
                        }
                    }
                }
            }
        })
        .map_err(|error: StreamError| MigrateError::from(error))?;
        self.report.pages_sent += sent.pages();
        self.report.zero_pages += sent.zero_pages;
        self.report.verify_ms = verify.then(|| as_milliseconds(hashed_for));
        Ok((sent, longest))
    }
}

/// Detects that no bytes are sent any more.
struct IdleDetector {
    sent: u64,
    since: Instant,
    reported: bool,
}

impl Default for IdleDetector {
    fn default() -> IdleDetector {
        IdleDetector { sent: 0, since: Instant::now(), reported: false }
    }
}

impl IdleDetector {
    /// Returns true once when `sent` has not increased for [`IDLE_WARNING_TIME`], and again after it has increased.
    fn starts_idle(&mut self, sent: u64) -> bool {
        if sent != self.sent {
            *self = IdleDetector { sent, ..IdleDetector::default() };
        }
        let over = self.since.elapsed() >= IDLE_WARNING_TIME;
        over && !std::mem::replace(&mut self.reported, over)
    }
}

fn stop_tracking(dirty: &mut dyn DirtySource) {
    if let Err(error) = dirty.stop() {
        tracing::warn!(error = %with_causes(&error), "dirty tracking could not be switched off");
    }
}

/// Text of [`MigrationEvent::Stalled`].
fn stall_message(rounds: &RoundState, left: u64, round_seconds: f64, expected: Duration) -> String {
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    format!(
        "{STALL_ROUNDS} rounds left no less than before: the guest dirties {:.0} MiB/s, {:.0} MiB/s go out. Allow a downtime \
         of {:.0} ms, or {}, or have the guest write less",
        mib((left * LOG_PAGE) as f64 / round_seconds),
        mib(rounds.convergence.bytes_per_second().unwrap_or_default()),
        as_milliseconds(expected).ceil(),
        rounds.time.remedy()
    )
}

fn as_milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The channels to the destination.
struct OutgoingStream {
    channels: Vec<PageSender>,
    /// Replies of the destination, on channel 0.
    replies: FrameReader<StreamChannel>,
    one_way: bool,
    /// Kept for completing a file or a command.
    connection: Option<StreamConnection>,
}

struct PageSender {
    writer: FrameWriter<StreamChannel>,
    encoder: PageEncoder,
}

impl PageSender {
    /// Sends pages, then hashes, and ends the round. Returns the times spent on pages and on hashes.
    fn send_round(
        &mut self,
        memory: &Memory,
        runs: impl Iterator<Item = PageRange>,
        hashed: impl Iterator<Item = PageRange>,
        round: u32,
        last: bool,
    ) -> Result<(PageStats, RoundTime, Duration), StreamError> {
        let (begun, waited, coding) =
            (Instant::now(), self.writer.get_mut().rate_limited_time(), self.encoder.compression_time());
        let sent = self.encoder.send(memory, runs, &mut self.writer)?;
        let sending = begun.elapsed();
        send_hashes(memory, hashed, &mut self.writer)?;
        let hashing = begun.elapsed().saturating_sub(sending);
        ToDestination::RoundEnd(RoundEnd::new(round, last, &sent)).write(&mut self.writer)?;
        let waiting = self.writer.get_mut().rate_limited_time().saturating_sub(waited);
        let coding = self.encoder.compression_time().saturating_sub(coding);
        Ok((
            sent,
            RoundTime { sending: sending.saturating_sub(waiting), compressing: coding, rate_limited: waiting },
            hashing,
        ))
    }
}

impl OutgoingStream {
    fn new(connection: StreamConnection, codec: Codec) -> Result<OutgoingStream, MigrateError> {
        let senders =
            connection.writers().into_iter().map(|writer| Ok(PageSender { writer, encoder: PageEncoder::new(codec)? }));
        let channels = senders.collect::<Result<Vec<_>, StreamError>>()?;
        let replies = connection.readers().into_iter().next().ok_or(StreamError::Ended)?;
        Ok(OutgoingStream { channels, replies, one_way: connection.one_way, connection: Some(connection) })
    }

    /// Starts the switchover timeout. It cancels the migration or, after the commit, ends the wait for the answer.
    fn start_time_limit(&self, limit: Duration, cancel: &CancelToken) -> Result<TimeLimit, MigrateError> {
        let channels = self.connection.as_ref().map(|connection| connection.channels.clone()).unwrap_or_default();
        let cancel = cancel.clone();
        let over = move || {
            if !cancel.cancel() {
                channels.iter().for_each(StreamChannel::shutdown);
            }
        };
        Ok(TimeLimit::start(limit, over).map_err(StreamError::from)?)
    }

    /// Sends the memory layout and waits until it is accepted.
    fn open(&mut self, memory: &Memory) -> Result<(), MigrateError> {
        let offered = self.send_message(&ToDestination::Layout(MemoryLayout::from_memory(memory)?));
        offered.map_err(|error| self.peer_reason(error))?;
        if self.one_way {
            return Ok(());
        }
        self.expect("ACCEPTED", |message| matches!(message, ToSource::Accepted).then_some(()))
    }

    /// Sends a message on channel 0.
    fn send_message(&mut self, message: &ToDestination) -> Result<(), MigrateError> {
        let first = self.channels.first_mut().ok_or(StreamError::Ended)?;
        message.write(&mut first.writer)?;
        Ok(())
    }

    /// Waits for one message of the destination, which `pick` must accept.
    fn expect<T>(
        &mut self,
        wanted: &'static str,
        pick: impl FnOnce(&ToSource) -> Option<T>,
    ) -> Result<T, MigrateError> {
        let message = ToSource::next(&mut self.replies)?;
        match (pick(&message), message) {
            (Some(picked), _) => Ok(picked),
            (None, ToSource::Failed { message }) => Err(MigrateError::Destination(message)),
            (None, other) => Err(MigrateError::Handshake { found: format!("{other:?}"), wanted }),
        }
    }

    /// Returns the destination's reason for a broken stream, if it sent one, or `error`.
    fn peer_reason(&mut self, error: MigrateError) -> MigrateError {
        let broken =
            matches!(error, MigrateError::Stream(StreamError::Io(_) | StreamError::Ended | StreamError::PeerGone));
        if !broken || self.one_way {
            return error;
        }
        // A closed connection delivers the reason at once; a silent peer gets only a short time.
        self.replies.get_mut().set_timeout(Some(FINAL_MESSAGE_TIMEOUT)).ok();
        match self.expect("a reason", |_| None::<()>) {
            Err(MigrateError::Destination(message)) => MigrateError::Destination(message),
            _ => error,
        }
    }

    /// Sends the reason of a local failure to the destination.
    fn send_cancel(&mut self, error: &MigrateError) {
        let local = matches!(
            error,
            MigrateError::Vm { .. }
                | MigrateError::Dirty(_)
                | MigrateError::NoConvergence { .. }
                | MigrateError::DeviceAway(_)
                | MigrateError::Cancelled
                | MigrateError::SwitchoverTimeout { .. }
        );
        if local && !self.one_way {
            self.channels.iter_mut().take(1).for_each(|first| first.writer.get_mut().allow_final_frame());
            // Otherwise it notices the closed connection.
            let _ = self.send_message(&ToDestination::Cancel { reason: with_causes(error).to_string() });
        }
    }

    /// Syncs a file or device.
    fn sync(&self) -> Result<(), MigrateError> {
        Ok(self.connection.as_ref().map_or(Ok(()), StreamConnection::sync)?)
    }

    /// Waits for the destination's answer to the commit.
    fn read_outcome(&mut self) -> Result<Started, MigrateError> {
        match ToSource::next(&mut self.replies)? {
            ToSource::Started(started) => Ok(started),
            ToSource::Failed { message } => Err(MigrateError::Destination(message)),
            ToSource::Held(held) => Err(MigrateError::Held(held.message)),
            other => Err(MigrateError::Handshake { found: format!("{other:?}"), wanted: "word of the guest" }),
        }
    }

    /// Completes a one-way stream. The guest is handed over only if it is in a complete, durable file.
    fn finish_one_way(&mut self) -> Result<(), (Stage, MigrateError)> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let is_file = connection.is_to_file();
        match connection.finish() {
            Ok(()) if is_file => Ok(()),
            Ok(()) => Err((Stage::Committed, MigrateError::OneWay)),
            // Readers refuse an unfinished save.
            Err(error) if is_file => Err((Stage::Paused, error.into())),
            Err(error) => Err((Stage::Committed, error.into())),
        }
    }

    /// Releases the connection. A command that holds or forwards the guest runs on.
    fn detach(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.detach();
        }
    }

    /// Returns the number of bytes sent.
    fn bytes(&self) -> u64 {
        self.channels.iter().map(|channel| channel.writer.bytes()).sum()
    }

    /// Returns the number of pages sent.
    fn pages_sent(&self) -> u64 {
        self.channels.iter().map(|channel| channel.encoder.progress().load(Ordering::Relaxed)).sum()
    }
}
