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
use super::populate::{Arrived, populate};
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
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The longest that a switchover may take, from the end of the last round on any channel to the commit, unless another
/// limit is asked for.
pub const SWITCHOVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Limit to the silence of a source whose memory layout was just accepted. It has more to say at once.
const NEXT_FRAME_TIME: Duration = Duration::from_secs(10);

/// What a channel brings until its last round has ended.
const UNTIL_THE_END: &str = "pages or a round's end";

/// How often a guest that can't be started is tried, and how long after the time before.
const START_TRIES: u32 = 3;
const START_PAUSE: Duration = Duration::from_secs(1);

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
/// [`MigrateError::NotStarted`]: the guest belongs to this side and is in `arrival`, paused: keep it. All others: the
/// guest never runs here. The source has been told why if it still listens.
pub fn receive(
    arrival: &mut dyn IncomingVm,
    connection: StreamConnection,
    cancel: &CancelToken,
    outcomes: &Outcomes,
    switchover_timeout: Duration,
) -> Result<IncomingReport, MigrateError> {
    let first = connection.writers().into_iter().next().ok_or(StreamError::Ended)?;
    let mut answers = Answers { to: first, one_way: connection.one_way };
    let mut readers = connection.readers();
    let id = connection.id;
    outcomes.begin(&connection, cancel)?;
    let timer = || {
        let (outcomes, why) = (outcomes.clone(), format!("its switchover took longer than {switchover_timeout:?}"));
        TimeLimit::start(switchover_timeout, move || {
            // One that is committed has made it in time.
            let _ = outcomes.give_up(id, &why);
        })
    };
    let goes_on = || connection.wait_for_frame(NEXT_FRAME_TIME);
    let own = || outcomes.commit(id);
    let outcome = match take_in(arrival, &mut readers, &mut answers, cancel, &goes_on, &timer, &own) {
        Ok(Committed { pages, compared, commit, starting }) => {
            start(arrival, id, commit.run, &starting, outcomes, &mut answers).map(|observed_downtime_ns| {
                let running = commit.run;
                IncomingReport { pages, compared, observed_downtime_ns, running }
            })
        }
        Err(error) => {
            let error = outcomes.failed(id, error);
            // The source may be gone; it asks if it has sent a commit.
            answers.to.get_mut().allow_last_words();
            let _ = answers.say(&ToSource::Failed { message: error.to_string() });
            Err(error)
        }
    };
    deliver(connection);
    if outcome.is_err() {
        cancel.cancel();
    }
    outcome
}

/// What has come by the commit.
struct Committed {
    pages: PageStats,
    compared: u64,
    commit: Commit,
    /// Ends the tries to start the guest.
    starting: CancelToken,
}

/// Starts a guest that this side owns. Whatever comes of it, the guest stays here.
fn start(
    arrival: &mut dyn IncomingVm,
    id: MigrationId,
    run: bool,
    cancel: &CancelToken,
    outcomes: &Outcomes,
    answers: &mut Answers,
) -> Result<Option<u64>, MigrateError> {
    let committed = Instant::now();
    match try_start(arrival, run, cancel) {
        Ok(observed_downtime_ns) => {
            let start_ns = committed.elapsed().as_nanos() as u64;
            let started = Started { observed_downtime_ns, start_ns };
            outcomes.started(id, started);
            // The guest runs, whether or not the source hears of it.
            if let Err(error) = answers.say(&ToSource::Started(started)) {
                tracing::warn!(%error, "the guest runs here, but its source could not be told: it will ask");
            }
            Ok(observed_downtime_ns)
        }
        Err(cause) => {
            let held = outcomes.held(id, &cause.to_string());
            if let Err(error) = answers.say(&ToSource::Held(held)) {
                tracing::warn!(%error, "the guest is paused here, but its source could not be told: it will ask");
            }
            Err(MigrateError::NotStarted(cause))
        }
    }
}

fn try_start(arrival: &mut dyn IncomingVm, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError> {
    for _ in 1..START_TRIES {
        let error = match arrival.start(run, cancel) {
            Ok(downtime) => return Ok(downtime),
            Err(error) => error,
        };
        if cancel.is_cancelled() {
            return Err(error);
        }
        tracing::warn!("the guest has arrived and can't be started: {error}; trying again");
        if cancel.wait(START_PAUSE).is_err() {
            return Err(error);
        }
    }
    arrival.start(run, cancel)
}

/// A command that carries the stream may still hold what was said last. It ends when the source hangs up.
fn deliver(connection: StreamConnection) {
    let ended = connection.channels.iter().try_for_each(|channel| channel.set_timeout(Some(LAST_WORDS)));
    if let Err(error) = ended.and_then(|()| connection.finish()) {
        tracing::debug!(%error, "the connection did not end well");
    }
}

struct Answers {
    to: FrameWriter<StreamChannel>,
    one_way: bool,
}

impl Answers {
    fn say(&mut self, message: &ToSource) -> Result<(), MigrateError> {
        if !self.one_way {
            message.write(&mut self.to)?;
        }
        Ok(())
    }
}

/// Everything up to the commit, which has effect if `own` agrees and says what ends the tries to start. `goes_on` waits until
/// the source goes on once its memory layout is accepted, `timer` limits the switchover.
fn take_in(
    arrival: &mut dyn IncomingVm,
    readers: &mut [FrameReader<StreamChannel>],
    answers: &mut Answers,
    cancel: &CancelToken,
    goes_on: &dyn Fn() -> Result<(), StreamError>,
    timer: &dyn Fn() -> io::Result<TimeLimit>,
    own: &dyn Fn() -> Result<CancelToken, MigrateError>,
) -> Result<Committed, MigrateError> {
    let asked = |doing| move |cause| MigrateError::Vm { doing, cause };
    let layout = next(readers, "the memory layout", |message| match message {
        ToDestination::Layout(layout) => Some(layout),
        _ => None,
    })?;
    layout.check_regions()?;
    let memory = arrival.prepare(&layout.regions).map_err(asked("making guest memory"))?;
    MemoryLayout::check(&layout, &memory)?;
    answers.say(&ToSource::Accepted)?;
    if !answers.one_way {
        // Others wait meanwhile.
        goes_on()?;
    }

    let guest_pages = memory.size() / LOG_PAGE;
    let mut limit = None;
    let mut one_ended = || {
        // Where nobody answers, no guest stands still.
        if limit.is_none() && !answers.one_way {
            limit = Some(timer().map_err(StreamError::from)?);
        }
        Ok(())
    };
    let mut prepare = |devices: &[u8]| arrival.prepare_devices(devices).map_err(asked("preparing the devices"));
    let target = Arc::new(IncomingMemory::zeroed(memory));
    let (pages, compared) = receive_pages(&target, readers, &mut one_ended, &mut prepare)?;
    check_comparison(&compared, guest_pages)?;

    let state = next(readers, "the guest's state", |message| match message {
        ToDestination::State(state) => Some(state),
        _ => None,
    })?;
    arrival.restore(&state).map_err(asked("restoring the guest"))?;
    if !answers.one_way {
        // From here on the source decides: it may have committed by the time that anybody calls it off here.
        cancel.disarm()?;
        answers.say(&ToSource::Ready)?;
    }
    let commit = next(readers, "the commit", |message| match message {
        ToDestination::Commit(commit) => Some(commit),
        _ => None,
    })?;
    if answers.one_way {
        cancel.disarm()?;
    }
    if let Some(limit) = &limit {
        // The source may have been told by now that this side never starts the guest.
        limit.check("waiting for the commit")?;
    }
    let starting = own()?;
    Ok(Committed { pages, compared: compared.pages, commit, starting })
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
enum Told {
    /// What the source knows of its devices.
    Devices(Vec<u8>),
    /// How the channel ended: all that it has brought, or why not.
    Ended(Result<(PageStats, HashComparison), MigrateError>),
}

/// Reads pages, and hashes, on all channels until each has ended the last round; `one_ended` hears of each that has, and
/// `prepare` of what the source knows of its devices.
fn receive_pages(
    target: &Arc<IncomingMemory>,
    readers: &mut [FrameReader<StreamChannel>],
    one_ended: &mut dyn FnMut() -> Result<(), MigrateError>,
    prepare: &mut dyn FnMut(&[u8]) -> Result<(), MigrateError>,
) -> Result<(PageStats, HashComparison), MigrateError> {
    let channels = readers.len() as u16;
    let sockets: Vec<StreamChannel> = readers.iter_mut().map(|reader| reader.get_mut().clone()).collect();
    let arrived = Arrived::default();
    std::thread::scope(|scope| {
        // Room for all that is told: each channel's end, and on one of them the devices.
        let (tell, told) = bounded(readers.len() + 1);
        let (announce, announced) = bounded::<DataRuns>(1);
        // Ends when nobody can announce anything any more.
        let arrived = &arrived;
        scope.spawn(move || announced.into_iter().for_each(|data| populate(target, &data.runs, arrived)));
        let mut hints = Some(Hints { announce: Some(announce), devices: Some(tell.clone()) });
        for (number, reader) in readers.iter_mut().enumerate() {
            let (tell, target, hints) = (tell.clone(), target.clone(), hints.take());
            scope.spawn(move || {
                let result = PageDecoder::new(target, number as u16, channels)
                    .map_err(MigrateError::from)
                    .and_then(|mut decoder| receive_channel(&mut decoder, reader, hints, arrived));
                // The receiver outlives all senders.
                let _ = tell.send(Told::Ended(result));
            });
        }
        drop(tell);
        let mut outcome = Ok(<(PageStats, HashComparison)>::default());
        for told in told {
            let result = match told {
                Told::Devices(devices) if outcome.is_ok() => prepare(&devices).map(|()| None),
                Told::Devices(_) => Ok(None),
                Told::Ended(result) => result.and_then(|received| one_ended().map(|()| Some(received))),
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
struct Hints {
    /// The pages that will come.
    announce: Option<Sender<DataRuns>>,
    devices: Option<Sender<Told>>,
}

/// Reads pages until the last round ends.
fn receive_channel(
    decoder: &mut PageDecoder,
    reader: &mut FrameReader<StreamChannel>,
    hints: Option<Hints>,
    arrived: &Arrived,
) -> Result<(PageStats, HashComparison), MigrateError> {
    let mut all = PageStats::default();
    let mut round = PageStats::default();
    let mut compared = HashComparison::default();
    let Hints { mut announce, mut devices } = hints.unwrap_or(Hints { announce: None, devices: None });
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
        let again = || MigrateError::Handshake { found: format!("a {} frame", header.kind), wanted: UNTIL_THE_END };
        match ToDestination::read(&header, reader)? {
            ToDestination::DataRuns(data) => drop(announce.take().ok_or_else(again)?.try_send(data)),
            ToDestination::Devices(said) => drop(devices.take().ok_or_else(again)?.try_send(Told::Devices(said))),
            ToDestination::RoundEnd(end) => {
                end.check(&round)?;
                all += std::mem::take(&mut round);
                if end.last {
                    return Ok((all, compared));
                }
            }
            ToDestination::Cancel { reason } => return Err(MigrateError::Source(reason)),
            other => return Err(MigrateError::Handshake { found: format!("{other:?}"), wanted: UNTIL_THE_END }),
        }
    }
}

/// Reads the next message on channel 0, which must be the one that `pick` takes.
fn next<T>(
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
