//! The destination's side: pages into place, state restored, READY, and on the commit the guest goes on here.
//!
//! Nothing runs before the commit. Whatever fails until then is told to the source, which goes on. From the commit on
//! the guest belongs to this side, also if it can't be started or the connection ends.

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
use crate::stream::record::{Commit, DataRuns, MemoryLayout, Started};
use crate::stream::{
    CancelToken, FrameKind, FrameReader, FrameWriter, HashComparison, MigrationId, PageDecoder, StreamChannel,
    StreamConnection,
};
use crate::stream::{IncomingMemory, PageStats, StreamError, ToDestination, ToSource};

/// How long what carries the stream may take to end.
const FINAL_MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest that a switchover may take, from the end of the last round on any channel to the commit, unless another
/// limit is asked for.
pub const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Limit to the silence of a source whose memory layout was just accepted. It has to go on at once.
const NEXT_FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// What a channel brings until its last round has ended.
const PAGES_OR_ROUND_END: &str = "pages or a round's end";

/// How often a guest that can't be started is tried, and how long after the time before.
const START_ATTEMPTS: u32 = 3;
const START_RETRY_DELAY: Duration = Duration::from_secs(1);

/// What arrived.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IncomingReport {
    /// Pages, zero pages included, over all rounds.
    pub pages: PageStats,
    /// Pages whose hashes were compared with the source's: all of them or, unless the source verifies, none.
    pub compared: u64,
    /// How long the guest stood still by its own clock, nanoseconds, if that clock is the source's too.
    pub observed_downtime_ns: Option<u64>,
    /// Whether its CPUs run. They do not in a guest that was paused before the migration.
    pub running: bool,
}

/// Takes in the guest that comes over `connection`, and starts it. `cancel` is the connection's; it has no effect any
/// more once the source has been told that this side is ready, but [`Outcomes::give_up`] has until the commit is read.
///
/// `outcomes` learns what comes of it. Keep it, and answer sources that ask ([`Outcomes::answer`]), for at least
/// [`OUTCOME_QUERY_TIMEOUT`](super::OUTCOME_QUERY_TIMEOUT) after this has returned. A migration whose source stops its guest and does not commit
/// within `switchover_timeout` ([`SWITCHOVER_TIMEOUT`]) is given up.
///
/// # Errors
/// [`MigrateError::NotStarted`]: the guest belongs to this side and is in `vm`, paused: keep it. All others: the
/// guest never runs here. The source has been told why if it still listens.
pub fn receive(
    vm: &mut dyn IncomingVm,
    connection: StreamConnection,
    cancel: &CancelToken,
    outcomes: &Outcomes,
    switchover_timeout: Duration,
) -> Result<IncomingReport, MigrateError> {
    let first = connection.writers().into_iter().next().ok_or(StreamError::Ended)?;
    let mut replies = ReplyWriter { writer: first, one_way: connection.one_way };
    let mut readers = connection.readers();
    let id = connection.id;
    outcomes.begin(connection.id, connection.one_way, &connection.channels, cancel)?;
    let start_time_limit = || {
        let (outcomes, why) = (outcomes.clone(), format!("its switchover took longer than {switchover_timeout:?}"));
        TimeLimit::start(switchover_timeout, move || {
            // One that is committed has made it in time.
            let _ = outcomes.give_up(id, &why);
        })
    };
    let wait_for_next = || connection.wait_for_frame(NEXT_FRAME_TIMEOUT);
    let take_ownership = || outcomes.commit(id);
    let outcome = match receive_until_commit(
        vm,
        &mut readers,
        &mut replies,
        cancel,
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
            // The source may be gone; it asks if it has sent a commit.
            replies.writer.get_mut().allow_final_frame();
            let _ = replies.send(&ToSource::Failed { message: error.to_string() });
            Err(error)
        }
    };
    finish_connection(connection);
    if outcome.is_err() {
        cancel.cancel();
    }
    outcome
}

/// What has come by the commit.
struct CommittedMigration {
    pages: PageStats,
    compared: u64,
    commit: Commit,
    /// Ends the tries to start the guest.
    start_cancel: CancelToken,
}

/// Starts a guest that this side owns. Whatever comes of it, the guest stays here.
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
            // The guest runs, whether or not the source hears of it.
            if let Err(error) = replies.send(&ToSource::Started(started)) {
                tracing::warn!(%error, "the guest runs here, but its source could not be told: it will ask");
            }
            Ok(observed_downtime_ns)
        }
        Err(cause) => {
            let held = outcomes.record_held(id, &cause.to_string());
            if let Err(error) = replies.send(&ToSource::Held(held)) {
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
        tracing::warn!("the guest has arrived and can't be started: {error}; trying again");
        if cancel.wait(START_RETRY_DELAY).is_err() {
            return Err(error);
        }
    }
    vm.start(run, cancel)
}

/// A command that carries the stream may still hold what was said last. It ends when the source hangs up.
fn finish_connection(connection: StreamConnection) {
    let ended = connection.channels.iter().try_for_each(|channel| channel.set_timeout(Some(FINAL_MESSAGE_TIMEOUT)));
    if let Err(error) = ended.and_then(|()| connection.finish()) {
        tracing::debug!(%error, "the connection did not end well");
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

/// Everything up to the commit, which has effect if `take_ownership` agrees and says what ends the tries to start. `wait_for_next` waits until
/// the source goes on once its memory layout is accepted, `start_time_limit` limits the switchover.
fn receive_until_commit(
    vm: &mut dyn IncomingVm,
    readers: &mut [FrameReader<StreamChannel>],
    replies: &mut ReplyWriter,
    cancel: &CancelToken,
    wait_for_next: &dyn Fn() -> Result<(), StreamError>,
    start_time_limit: &dyn Fn() -> io::Result<TimeLimit>,
    take_ownership: &dyn Fn() -> Result<CancelToken, MigrateError>,
) -> Result<CommittedMigration, MigrateError> {
    let asked = |doing| move |cause| MigrateError::Vm { doing, cause };
    let layout = next_message(readers, "the memory layout", |message| match message {
        ToDestination::Layout(layout) => Some(layout),
        _ => None,
    })?;
    layout.check_regions()?;
    let memory = vm.prepare(&layout.regions).map_err(asked("making guest memory"))?;
    MemoryLayout::check_matches(&layout, &memory)?;
    replies.send(&ToSource::Accepted)?;
    if !replies.one_way {
        // Others wait meanwhile.
        wait_for_next()?;
    }

    let guest_pages = memory.size() / LOG_PAGE;
    let mut limit = None;
    let mut on_channel_end = || {
        // Where nobody replies, no guest stands still.
        if limit.is_none() && !replies.one_way {
            limit = Some(start_time_limit().map_err(StreamError::from)?);
        }
        Ok(())
    };
    let mut prepare = |devices: &[u8]| vm.prepare_devices(devices).map_err(asked("preparing the devices"));
    let target = Arc::new(IncomingMemory::zeroed(memory));
    let (pages, compared) = receive_pages(&target, readers, &mut on_channel_end, &mut prepare)?;
    check_comparison(&compared, guest_pages)?;

    let state = next_message(readers, "the guest's state", |message| match message {
        ToDestination::State(state) => Some(state),
        _ => None,
    })?;
    vm.restore(&state).map_err(asked("restoring the guest"))?;
    if !replies.one_way {
        // From here on the source decides: it may have committed by the time that anybody calls it off here.
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
        // The source may have been told by now that this side never starts the guest.
        limit.check("waiting for the commit")?;
    }
    let start_cancel = take_ownership()?;
    Ok(CommittedMigration { pages, compared: compared.pages, commit, start_cancel })
}

/// Whether all pages are as they are at the source, if it has sent hashes at all.
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

/// What a channel's thread tells.
enum ChannelEvent {
    /// What the source knows of its devices.
    Devices(Vec<u8>),
    /// How the channel ended: all that it has brought, or why not.
    Ended(Result<(PageStats, HashComparison), MigrateError>),
}

/// Reads pages, and hashes, on all channels until each has ended the last round; `on_channel_end` hears of each that has, and
/// `prepare` of what the source knows of its devices.
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
        // Room for all that is told: each channel's end, and on one of them the devices.
        let (events, received_events) = bounded(readers.len() + 1);
        let (data_runs, announced) = bounded::<DataRuns>(1);
        // Ends when all senders are gone.
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
                    // The other threads wait for pages that will not come. Channel 0 can still carry the reason back.
                    sockets.iter().for_each(StreamChannel::shutdown_read);
                    outcome = Err(error);
                }
                // What the source said before it hung up is worth more than that it did.
                (Err(error @ MigrateError::Source(_)), Err(_)) => outcome = Err(error),
                (Err(_), Err(_)) => {}
            }
        }
        arrived.end();
        outcome
    })
}

/// Where channel 0 tells what it brings to prepare with, each thing once.
struct HintSenders {
    /// The pages that will come.
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
        // Nobody else sends these, and each only once: there is room for it.
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

/// Reads the next message on channel 0, which must be the one that `pick` takes.
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
