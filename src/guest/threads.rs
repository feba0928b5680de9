//! The guest's threads from resume to pause: one per CPU, and a few that drive its queues.
//!
//! Each thread acts when it starts and once more when it is stopped, and reports the times: the time between is the
//! downtime that the guest sees.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::cpu::Cpu;
use super::disk::{Disk, QueueDoorbells};
use super::driver::Driver;
use super::error::GuestError;
use super::layout::GuestConfig;
use super::signal::{GuestFailure, StopEvent, poll_fds};
use super::state::Timestamp;
use crate::memory::LOG_PAGE;

/// Minimum pause of a CPU between two batches of pages.
const MIN_CPU_PAUSE: Duration = Duration::from_millis(1);
/// Interval at which a waiting driver checks for lost requests.
const TIMEOUT_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Minimum number of driver threads, even with fewer host CPUs.
const MIN_DRIVER_THREADS: usize = 4;

/// A thread that returns its work and the time of its last action.
type WorkThread<T> = JoinHandle<Option<(T, u64)>>;

/// The running threads.
pub(super) struct GuestThreads {
    stop: Arc<StopEvent>,
    cpus: Vec<WorkThread<Cpu>>,
    drivers: Vec<WorkThread<Vec<Driver>>>,
}

/// Senders that pass started threads their work.
struct WorkSenders {
    cpus: Vec<Sender<Cpu>>,
    drivers: Vec<Sender<Vec<Driver>>>,
}

/// Data of a thread besides its work.
#[derive(Clone)]
struct ThreadContext {
    stop: Arc<StopEvent>,
    failure: Arc<GuestFailure>,
    /// Receives the time of the thread's first action.
    first: Sender<u64>,
}

impl ThreadContext {
    fn must_stop(&self) -> bool {
        self.stop.is_set() || self.failure.signal().is_set()
    }
}

/// CPUs and drivers that could not be started, and the reason.
pub(super) struct NotStarted {
    pub(super) error: GuestError,
    pub(super) cpus: Vec<Cpu>,
    pub(super) drivers: Vec<Driver>,
}

impl GuestThreads {
    /// Starts all threads. Returns also the time of the first action (CLOCK_MONOTONIC, nanoseconds), if there is one.
    /// `queues` has the disk and the queue number of each driver.
    pub(super) fn start(
        cpus: Vec<Cpu>,
        drivers: Vec<Driver>,
        queues: Vec<(Arc<Disk>, usize)>,
        config: &GuestConfig,
        failure: &Arc<GuestFailure>,
    ) -> Result<(GuestThreads, Option<u64>), Box<NotStarted>> {
        let (first, firsts) = channel();
        let threads = StopEvent::new().and_then(|stop| {
            let context = ThreadContext { stop: Arc::new(stop), failure: failure.clone(), first };
            GuestThreads::spawn(cpus.len(), queues, config, context).map_err(GuestError::system("start a thread"))
        });
        let (threads, work) = match threads {
            Ok(started) => started,
            Err(error) => return Err(Box::new(NotStarted { error, cpus, drivers })),
        };
        // All threads exist now, so that each receives its work.
        work.cpus.iter().zip(cpus).for_each(|(to, cpu)| drop(to.send(cpu)));
        let share = queues_per_thread(drivers.len());
        let mut drivers = drivers.into_iter();
        work.drivers.iter().for_each(|to| drop(to.send(drivers.by_ref().take(share).collect())));
        let acted = firsts.iter().take(threads.cpus.len() + threads.drivers.len()).min();
        Ok((threads, acted))
    }

    /// Starts threads that wait for their work and end without it.
    fn spawn(
        cpus: usize,
        queues: Vec<(Arc<Disk>, usize)>,
        config: &GuestConfig,
        context: ThreadContext,
    ) -> std::io::Result<(GuestThreads, WorkSenders)> {
        let mut threads = GuestThreads { stop: context.stop.clone(), cpus: Vec::new(), drivers: Vec::new() };
        let mut work = WorkSenders { cpus: Vec::new(), drivers: Vec::new() };
        let rate = config.dirty_rate / LOG_PAGE / cpus.max(1) as u64;
        for _ in 0..cpus {
            let (context, (to, inbox)) = (context.clone(), channel());
            let live = move || {
                let mut cpu: Cpu = inbox.recv().ok()?;
                let last = run_reporting_failure(&context, || run_cpu(&mut cpu, rate, &context));
                Some((cpu, last))
            };
            threads.cpus.push(std::thread::Builder::new().name("guest-cpu".into()).spawn(live)?);
            work.cpus.push(to);
        }
        let (rate, patience) = (config.request_rate, Duration::from_secs(config.request_timeout));
        for queues in queues.chunks(queues_per_thread(queues.len())) {
            let (context, (to, inbox)) = (context.clone(), channel());
            let queues = queues.to_vec();
            let live = move || {
                let mut drivers: Vec<Driver> = inbox.recv().ok()?;
                let last =
                    run_reporting_failure(&context, || run_drivers(&mut drivers, &queues, rate, patience, &context));
                Some((drivers, last))
            };
            threads.drivers.push(std::thread::Builder::new().name("guest-disk".into()).spawn(live)?);
            work.drivers.push(to);
        }
        Ok((threads, work))
    }

    /// Stops all threads. Returns their work and the time of the last action (CLOCK_MONOTONIC, nanoseconds).
    pub(super) fn stop(self) -> Result<(Vec<Cpu>, Vec<Driver>, u64), GuestError> {
        self.stop.set();
        let lost = || GuestError::State("a thread of the guest has panicked".into());
        let cpus = self.cpus.into_iter().map(|thread| thread.join().ok().flatten().ok_or_else(lost));
        let cpus = cpus.collect::<Result<Vec<_>, _>>()?;
        let drivers = self.drivers.into_iter().map(|thread| thread.join().ok().flatten().ok_or_else(lost));
        let drivers = drivers.collect::<Result<Vec<_>, _>>()?;
        let last = cpus.iter().map(|(_, last)| *last).chain(drivers.iter().map(|(_, last)| *last)).max();
        let (cpus, _): (Vec<_>, Vec<_>) = cpus.into_iter().unzip();
        let drivers = drivers.into_iter().flat_map(|(drivers, _)| drivers).collect();
        Ok((cpus, drivers, last.unwrap_or_default()))
    }
}

/// Returns the number of queues per driver thread. With one thread for each of a hundred queues on two CPUs, the
/// threads would delay each other at every stop and start.
fn queues_per_thread(queues: usize) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    queues.div_ceil(cpus.max(MIN_DRIVER_THREADS)).max(1)
}

/// Runs `work` and reports its failure. The first action is reported in any case.
fn run_reporting_failure(context: &ThreadContext, work: impl FnOnce() -> Result<u64, GuestError>) -> u64 {
    work().unwrap_or_else(|error| {
        context.failure.report(error);
        let _ = context.first.send(now());
        now()
    })
}

/// Runs a CPU at `rate` pages per second. Returns the time of its last action.
fn run_cpu(cpu: &mut Cpu, rate: u64, context: &ThreadContext) -> Result<u64, GuestError> {
    let (start, begun) = (Instant::now(), cpu.steps());
    cpu.step()?;
    let _ = context.first.send(now());
    while !context.must_stop() {
        let due = due_by(rate, start.elapsed());
        while cpu.steps() - begun < due && !context.must_stop() {
            cpu.step()?;
        }
        let pause = time_until_next(rate, cpu.steps() - begun, start).map(|pause| pause.max(MIN_CPU_PAUSE));
        poll_fds(&[context.stop.as_fd(), context.failure.signal().as_fd()], None, pause)?;
    }
    cpu.step()?;
    Ok(now())
}

/// A driver and its queue.
struct ActiveQueue<'a> {
    driver: &'a mut Driver,
    disk: &'a Disk,
    doorbells: &'a QueueDoorbells,
    /// Number of requests before the start.
    requests_at_start: u64,
    /// Time of the last check for lost requests.
    last_check: Instant,
}

/// Runs drivers at `rate` requests per second each, or as fast as the disk replies. Returns the time of the last
/// action.
fn run_drivers(
    drivers: &mut [Driver],
    queues: &[(Arc<Disk>, usize)],
    rate: Option<u64>,
    patience: Duration,
    context: &ThreadContext,
) -> Result<u64, GuestError> {
    let start = Instant::now();
    let at_work = drivers.iter_mut().zip(queues).filter_map(|(driver, (disk, doorbells))| {
        driver.restart_timeouts();
        let (before, doorbells) = (driver.requests(), disk.doorbells.get(*doorbells)?);
        Some(ActiveQueue { driver, disk, doorbells, requests_at_start: before, last_check: start })
    });
    let mut at_work: Vec<ActiveQueue<'_>> = at_work.collect();
    let mut first = Some(&context.first);
    loop {
        let over = context.must_stop();
        for ActiveQueue { driver, doorbells, requests_at_start: before, .. } in &mut at_work {
            driver.reap()?;
            let allowed = match rate {
                _ if over => 1,
                Some(rate) => (due_by(rate, start.elapsed()) + 1).saturating_sub(driver.requests() - *before),
                None => u64::MAX,
            };
            for _ in 0..allowed {
                if !driver.submit()? || !over && context.must_stop() {
                    break;
                }
            }
            if driver.publish() {
                doorbells.kick();
            }
            if let Some(first) = first.take() {
                let _ = first.send(now());
            }
        }
        if over {
            return Ok(now());
        }
        let (mut pause, mut called) = (TIMEOUT_CHECK_INTERVAL, false);
        for ActiveQueue { driver, disk, requests_at_start: before, last_check: looked, .. } in &mut at_work {
            check_requests(driver, disk, patience, looked)?;
            called |= driver.enable_calls();
            let next = rate.and_then(|rate| time_until_next(rate, driver.requests() - *before, start));
            pause = next.map_or(pause, |next| next.min(pause));
        }
        if called {
            continue;
        }
        let calls = at_work.iter().map(|driving| driving.doorbells.call.as_fd());
        let fds: Vec<_> = calls.chain([context.stop.as_fd(), context.failure.signal().as_fd()]).collect();
        let readable = poll_fds(&fds, None, Some(pause))?;
        at_work
            .iter()
            .zip(readable)
            .filter(|(_, called)| *called)
            .for_each(|(driving, _)| driving.doorbells.ack_call());
    }
}

/// Completes the outstanding requests, then reads and checks the queue's part of the disk, unless the device's
/// interrupt ends it.
pub(super) fn scan_disk(
    driver: &mut Driver,
    disk: &Disk,
    doorbells: &QueueDoorbells,
    patience: Duration,
) -> Result<(), GuestError> {
    driver.verify_retained()?;
    driver.restart_timeouts();
    let (mut next, mut looked) = (None, Instant::now());
    loop {
        driver.reap()?;
        match &mut next {
            // The outstanding requests come first, because they include writes.
            None if driver.outstanding() == 0 => next = Some(0),
            None => {}
            Some(sector) => {
                while *sector < driver.sectors() {
                    let Some(after) = driver.submit_scan(*sector)? else { break };
                    *sector = after;
                }
                if *sector == driver.sectors() && driver.outstanding() == 0 {
                    return Ok(());
                }
            }
        }
        if driver.publish() {
            doorbells.kick();
        }
        check_requests(driver, disk, patience, &mut looked)?;
        if disk.is_interrupted() {
            return Err(GuestError::Interrupted);
        }
        if driver.outstanding() > 0 && !driver.enable_calls() {
            let interrupt = disk.interrupt().map(AsFd::as_fd);
            let ends: Vec<_> = [doorbells.call.as_fd()].into_iter().chain(interrupt).collect();
            poll_fds(&ends, None, Some(TIMEOUT_CHECK_INTERVAL))?;
            doorbells.ack_call();
        }
    }
}

/// Checks for lost requests at an interval, while the back-end is connected.
fn check_requests(
    driver: &mut Driver,
    disk: &Disk,
    patience: Duration,
    looked: &mut Instant,
) -> Result<(), GuestError> {
    if disk.is_away() {
        driver.restart_timeouts();
    } else if looked.elapsed() >= TIMEOUT_CHECK_INTERVAL {
        *looked = Instant::now();
        driver.check_timeouts(patience)?;
    }
    Ok(())
}

/// Returns the number of actions due after `elapsed`, at `rate` per second.
fn due_by(rate: u64, elapsed: Duration) -> u64 {
    (u128::from(rate) * elapsed.as_nanos() / 1_000_000_000) as u64
}

/// Returns the time until one more than `done` actions are due; `None` for never.
fn time_until_next(rate: u64, done: u64, start: Instant) -> Option<Duration> {
    let nanos = u128::from(done + 1) * 1_000_000_000 / u128::from(rate.max(1));
    let when = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
    (rate > 0).then(|| when.saturating_sub(start.elapsed()))
}

/// Returns CLOCK_MONOTONIC in nanoseconds.
fn now() -> u64 {
    nanos(ClockId::CLOCK_MONOTONIC)
}

/// Converts a recent CLOCK_MONOTONIC time to a [`Timestamp`].
pub(super) fn timestamp(monotonic_ns: u64) -> Timestamp {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let since = now().saturating_sub(monotonic_ns);
    let realtime_ns = nanos(ClockId::CLOCK_REALTIME).saturating_sub(since);
    Timestamp { boot: boot.trim().into(), monotonic_ns, realtime_ns }
}

fn nanos(clock: ClockId) -> u64 {
    // These clocks always exist, so that the call cannot fail.
    clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos() as u64)
}
