//! Destination side of a migration: receives pages, restores the state, sends READY, and starts the guest after the
//! commit.
//!
//! Nothing runs before the commit. Failures until then are reported to the source, which resumes the guest. From the
//! commit on the guest belongs to this side, even if it cannot be started or the connection ends.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded};

use super::error::MigrateError;
use super::outcomes::Outcomes;
use super::populate::{ArrivedPages, populate};
use super::time_limit::TimeLimit;
use super::vm::{IncomingVm, VmError};
use crate::memory::LOG_PAGE;
use crate::stream::frame::{FrameReader, FrameWriter};
use crate::stream::hashes::HashComparison;
use crate::stream::pages::{IncomingMemory, PageDecoder};
use crate::stream::record::{Commit, DataRuns, MemoryLayout, ToDestination};
use crate::stream::{
    CancelToken, FrameKind, MigrationId, PageStats, Started, StreamChannel, StreamConnection, StreamError, ToSource,
};
use crate::sys::with_causes::with_causes;

/// Time limit for ending the connection.
const FINAL_MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Default time limit of a switchover, from the end of the last round on any channel to the commit.
pub const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit for the next frame after a memory layout was accepted.
const NEXT_FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// The frames expected on a channel until the end of its last round.
const PAGES_OR_ROUND_END: &str = "pages or a round's end";

/// Number of attempts to start the guest, and the delay between two attempts.
const START_ATTEMPTS: u32 = 3;
const START_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Result of a successful incoming migration.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct IncomingReport {
    /// Received pages of all rounds, zero pages included.
    pub pages: PageStats,
    /// Number of pages compared by hash: all pages, or none unless the source verifies.
    pub compared: u64,
    /// Downtime by the guest's own clock, nanoseconds, if that clock is the source's too.
    pub observed_downtime_ns: Option<u64>,
    /// True if the CPUs run. False for a guest that was paused before the migration.
    pub running: bool,
}

/// Receives a guest over `connection` and starts it. Another thread may cancel this by the connection's token until
/// READY was sent; [`Outcomes::give_up`] still works until the commit is read.
///
/// `outcomes` records the result. Keep it, and answer outcome queries ([`Outcomes::answer`]), for at least
/// [`OUTCOME_QUERY_TIMEOUT`](super::OUTCOME_QUERY_TIMEOUT) after this has returned. A migration that does not commit
/// within `switchover_timeout` ([`SWITCHOVER_TIMEOUT`]) is given up.
///
/// # Errors
/// [`MigrateError::NotStarted`]: the guest belongs to this side and is paused in `vm`; keep it. All others: the guest
/// never runs here. The reason was sent to the source, if it is still connected.
pub fn receive(
    vm: &mut dyn IncomingVm,
    connection: StreamConnection,
    outcomes: &Outcomes,
    switchover_timeout: Duration,
) -> Result<IncomingReport, MigrateError> {
    let first = connection.writers().into_iter().next().ok_or(StreamError::Ended)?;
    let mut replies = ReplyWriter { writer: first, one_way: connection.one_way };
    let mut readers = connection.readers();
    let id = connection.id;
    let cancel = connection.cancel_token().clone();
    vm.set_cancel(&cancel);
    outcomes.begin(connection.id, connection.one_way, &connection.channels, &cancel)?;
    let start_time_limit = || {
        let (outcomes, why) = (outcomes.clone(), format!("the switchover took longer than {switchover_timeout:?}"));
        TimeLimit::start(switchover_timeout, move || {
            // A committed migration is not given up.
            let _ = outcomes.give_up(id, &why);
        })
    };
    let wait_for_next = || connection.wait_for_frame(NEXT_FRAME_TIMEOUT);
    let take_ownership = || outcomes.commit(id);
    let outcome = match receive_until_commit(
        vm,
        &mut readers,
        &mut replies,
        &cancel,
        &wait_for_next,
        &start_time_limit,
        &take_ownership,
    ) {
        Ok(CommittedMigration { pages, compared, commit, start_cancel }) => {
            start(vm, id, commit.run, &start_cancel, outcomes, &mut replies).map(|observed_downtime_ns| {
                let running = commit.run;
                IncomingReport { pages, compared, observed_downtime_ns, running }
            })
        }
        Err(error) => {
            let error = outcomes.record_failure(id, error);
            // The source may have disconnected. It queries the outcome if it has sent a commit.
            replies.writer.get_mut().allow_final_frame();
            let _ = replies.send(&ToSource::Failed { message: with_causes(&error).to_string() });
            Err(error)
        }
    };
    finish_connection(connection);
    if outcome.is_err() {
        cancel.cancel();
    }
    outcome
}

/// Result of a migration up to the commit.
struct CommittedMigration {
    pages: PageStats,
    compared: u64,
    commit: Commit,
    /// Cancels the start of the guest.
    start_cancel: CancelToken,
}

/// Starts a guest that this side owns. The guest stays here in any case.
fn start(
    vm: &mut dyn IncomingVm,
    id: MigrationId,
    run: bool,
    cancel: &CancelToken,
    outcomes: &Outcomes,
    replies: &mut ReplyWriter,
) -> Result<Option<u64>, MigrateError> {
    let committed = Instant::now();
    match start_with_retries(vm, run, cancel) {
        Ok(observed_downtime_ns) => {
            let start_ns = committed.elapsed().as_nanos() as u64;
            let started = Started { observed_downtime_ns, start_ns };
            outcomes.record_started(id, started);
            // The guest runs, whether or not the source is informed.
            if let Err(error) = replies.send(&ToSource::Started(started)) {
                let error = with_causes(&error);
                tracing::warn!(%error, "the guest runs here, but its source could not be told: it will ask");
            }
            Ok(observed_downtime_ns)
        }
        Err(cause) => {
            let held = outcomes.record_held(id, &with_causes(cause.as_ref()).to_string());
            if let Err(error) = replies.send(&ToSource::Held(held)) {
                let error = with_causes(&error);
                tracing::warn!(%error, "the guest is paused here, but its source could not be told: it will ask");
            }
            Err(MigrateError::NotStarted(cause))
        }
    }
}

fn start_with_retries(vm: &mut dyn IncomingVm, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError> {
    for _ in 1..START_ATTEMPTS {
        let error = match vm.start(run, cancel) {
            Ok(downtime) => return Ok(downtime),
            Err(error) => error,
        };
        if cancel.is_cancelled() {
            return Err(error);
        }
        tracing::warn!("the guest has arrived and can't be started: {}; trying again", with_causes(error.as_ref()));
        if cancel.wait(START_RETRY_DELAY).is_err() {
            return Err(error);
        }
    }
    vm.start(run, cancel)
}

/// Ends the connection. A command may still buffer the last message; it ends when the source closes its side.
fn finish_connection(connection: StreamConnection) {
    let ended = connection.channels.iter().try_for_each(|channel| channel.set_timeout(Some(FINAL_MESSAGE_TIMEOUT)));
    if let Err(error) = ended.and_then(|()| connection.finish()) {
        tracing::debug!(error = %with_causes(&error), "the connection did not end well");
    }
}

struct ReplyWriter {
    writer: FrameWriter<StreamChannel>,
    one_way: bool,
}

impl ReplyWriter {
    fn send(&mut self, message: &ToSource) -> Result<(), MigrateError> {
        if !self.one_way {
            message.write(&mut self.writer)?;
        }
        Ok(())
    }
}

/// Receives everything up to the commit, which takes effect if `take_ownership` succeeds. `wait_for_next` waits for the
/// first frame after the memory layout was accepted; `start_time_limit` limits the switchover.
fn receive_until_commit(
    vm: &mut dyn IncomingVm,
    readers: &mut [FrameReader<StreamChannel>],
    replies: &mut ReplyWriter,
    cancel: &CancelToken,
    wait_for_next: &dyn Fn() -> Result<(), StreamError>,
    start_time_limit: &dyn Fn() -> io::Result<TimeLimit>,
    take_ownership: &dyn Fn() -> Result<CancelToken, MigrateError>,
) -> Result<CommittedMigration, MigrateError> {
    let vm_error = |doing| move |cause| MigrateError::Vm { doing, cause };
    let layout = next_message(readers, "the memory layout", |message| match message {
        ToDestination::Layout(layout) => Some(layout),
        _ => None,
    })?;
    layout.check_regions()?;
    let memory = vm.prepare(&layout.regions).map_err(vm_error("making guest memory"))?;
    MemoryLayout::check_matches(&layout, &memory)?;
    replies.send(&ToSource::Accepted)?;
    if !replies.one_way {
        // Other migrations wait meanwhile.
        wait_for_next()?;
    }

    let guest_pages = memory.size() / LOG_PAGE;
    let mut limit = None;
    let mut on_channel_end = || {
        // A one-way stream has no stopped guest that waits for a reply.
        if limit.is_none() && !replies.one_way {
            limit = Some(start_time_limit().map_err(StreamError::from)?);
        }
        Ok(())
    };
    let mut prepare = |devices: &[u8]| vm.prepare_devices(devices).map_err(vm_error("preparing the devices"));
    let target = Arc::new(IncomingMemory::zeroed(memory));
    let (pages, compared) = receive_pages(&target, readers, &mut on_channel_end, &mut prepare)?;
    check_comparison(&compared, guest_pages)?;

    let state = next_message(readers, "the guest's state", |message| match message {
        ToDestination::State(state) => Some(state),
        _ => None,
    })?;
    vm.restore(&state).map_err(vm_error("restoring the guest"))?;
    if !replies.one_way {
        // From here on the source decides: it may already have committed when a cancellation arrives here.
        cancel.disarm()?;
        replies.send(&ToSource::Ready)?;
    }
    let commit = next_message(readers, "the commit", |message| match message {
        ToDestination::Commit(commit) => Some(commit),
        _ => None,
    })?;
    if replies.one_way {
        cancel.disarm()?;
    }
    if let Some(limit) = &limit {
        // The source may have received the answer that this side never starts the guest.
        limit.check("waiting for the commit")?;
    }
    let start_cancel = take_ownership()?;
    Ok(CommittedMigration { pages, compared: compared.pages, commit, start_cancel })
}

/// Checks the result of the comparison, if the source has sent hashes.
fn check_comparison(compared: &HashComparison, guest_pages: u64) -> Result<(), MigrateError> {
    if compared.different > 0 {
        return Err(MigrateError::MemoryDiffers {
            pages: compared.different,
            first_different: compared.first_different.clone(),
        });
    }
    if compared.pages > 0 && compared.pages != guest_pages {
        let why = format!("they are of {} pages, the guest has {guest_pages}", compared.pages);
        return Err(StreamError::Malformed { what: "hashes", why }.into());
    }
    Ok(())
}

/// An event of a channel's thread.
enum ChannelEvent {
    /// The source's description of its devices.
    Devices(Vec<u8>),
    /// The end of a channel: its totals, or an error.
    Ended(Result<(PageStats, HashComparison), MigrateError>),
}

/// Receives pages and hashes on all channels until each has ended the last round. Calls `on_channel_end` for each of
/// them, and `prepare` with the description of the devices.
fn receive_pages(
    target: &Arc<IncomingMemory>,
    readers: &mut [FrameReader<StreamChannel>],
    on_channel_end: &mut dyn FnMut() -> Result<(), MigrateError>,
    prepare: &mut dyn FnMut(&[u8]) -> Result<(), MigrateError>,
) -> Result<(PageStats, HashComparison), MigrateError> {
    let channels = readers.len() as u16;
    let sockets: Vec<StreamChannel> = readers.iter_mut().map(|reader| reader.get_mut().clone()).collect();
    let arrived = ArrivedPages::default();
    std::thread::scope(|scope| {
        // Capacity for all events: the end of each channel, and the devices on one of them.
        let (events, received_events) = bounded(readers.len() + 1);
        let (data_runs, announced) = bounded::<DataRuns>(1);
        // Ends when all senders are dropped.
        let arrived = &arrived;
        scope.spawn(move || announced.into_iter().for_each(|data| populate(target, &data.runs, arrived)));
        let mut hints = Some(HintSenders { data_runs: Some(data_runs), devices: Some(events.clone()) });
        for (number, reader) in readers.iter_mut().enumerate() {
            let (events, target, hints) = (events.clone(), target.clone(), hints.take());
            scope.spawn(move || {
                let result = PageDecoder::new(target, number as u16, channels)
                    .map_err(MigrateError::from)
                    .and_then(|mut decoder| receive_channel(&mut decoder, reader, hints, arrived));
                // The receiver outlives all senders.
                let _ = events.send(ChannelEvent::Ended(result));
            });
        }
        drop(events);
        let mut outcome = Ok(<(PageStats, HashComparison)>::default());
        for event in received_events {
            let result = match event {
                ChannelEvent::Devices(devices) if outcome.is_ok() => prepare(&devices).map(|()| None),
                ChannelEvent::Devices(_) => Ok(None),
                ChannelEvent::Ended(result) => result.and_then(|received| on_channel_end().map(|()| Some(received))),
            };
            match (result, &mut outcome) {
                (Ok(Some((stats, found))), Ok((all, compared))) => {
                    *all += stats;
                    *compared += found;
                }
                (Ok(_), _) => {}
                (Err(error), Ok(_)) => {
                    // The other threads wait for pages that will not arrive. Channel 0 can still send the reason.
                    sockets.iter().for_each(StreamChannel::shutdown_read);
                    outcome = Err(error);
                }
                // The source's reason is more useful than the closed connection.
                (Err(error @ MigrateError::Source(_)), Err(_)) => outcome = Err(error),
                (Err(_), Err(_)) => {}
            }
        }
        arrived.end();
        outcome
    })
}

/// The receivers of the data for preparations, to which channel 0 sends each once.
struct HintSenders {
    /// The announced pages.
    data_runs: Option<Sender<DataRuns>>,
    devices: Option<Sender<ChannelEvent>>,
}

/// Reads pages until the last round ends.
fn receive_channel(
    decoder: &mut PageDecoder,
    reader: &mut FrameReader<StreamChannel>,
    hints: Option<HintSenders>,
    arrived: &ArrivedPages,
) -> Result<(PageStats, HashComparison), MigrateError> {
    let mut all = PageStats::default();
    let mut round = PageStats::default();
    let mut compared = HashComparison::default();
    let HintSenders { mut data_runs, mut devices } = hints.unwrap_or(HintSenders { data_runs: None, devices: None });
    loop {
        let header = reader.next_frame()?;
        if header.kind == FrameKind::Pages {
            let received = decoder.receive(&header, reader)?;
            arrived.add(received.data_pages);
            round += received;
            continue;
        }
        if header.kind == FrameKind::Hashes {
            compared += decoder.compare(&header, reader)?;
            continue;
        }
        // Only channel 0 sends these, and each once: there is capacity.
        let again =
            || MigrateError::Handshake { found: format!("a {} frame", header.kind), wanted: PAGES_OR_ROUND_END };
        match ToDestination::read(&header, reader)? {
            ToDestination::DataRuns(data) => drop(data_runs.take().ok_or_else(again)?.try_send(data)),
            ToDestination::Devices(said) => {
                drop(devices.take().ok_or_else(again)?.try_send(ChannelEvent::Devices(said)))
            }
            ToDestination::RoundEnd(end) => {
                end.check_received(&round)?;
                all += std::mem::take(&mut round);
                if end.last {
                    return Ok((all, compared));
                }
            }
            ToDestination::Cancel { reason } => return Err(MigrateError::Source(reason)),
            other => return Err(MigrateError::Handshake { found: format!("{other:?}"), wanted: PAGES_OR_ROUND_END }),
        }
    }
}

/// Reads the next message on channel 0, which `pick` must accept.
fn next_message<T>(
    readers: &mut [FrameReader<StreamChannel>],
    wanted: &'static str,
    pick: impl FnOnce(ToDestination) -> Option<T>,
) -> Result<T, MigrateError> {
    let first = readers.first_mut().ok_or(StreamError::Ended)?;
    let header = first.next_frame()?;
    match ToDestination::read(&header, first)? {
        ToDestination::Cancel { reason } => Err(MigrateError::Source(reason)),
        message => {
            let found = header.kind;
            pick(message).ok_or_else(|| MigrateError::Handshake { found: format!("a {found} frame"), wanted })
        }
    }
}
