//! The guest's threads: one per CPU, and a few that drive its queues, from resume to pause.
//!
//! Each acts as soon as it starts and once more when it is told to stop, and says when that was: the time between is what
//! the guest sees of a migration.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::cpu::Cpu;
use super::driver::Driver;
use super::error::GuestError;
use super::layout::GuestConfig;
use super::signal::{Failure, Signal, wait};
use super::state::Moment;
use super::unit::{Line, Unit};
use crate::memory::LOG_PAGE;

/// CPUs act at least this often, when they are to act that often at all.
const TICK: Duration = Duration::from_millis(1);
/// How often a waiting driver looks whether its requests are lost.
const LOOK: Duration = Duration::from_secs(1);

/// Threads that drive queues even where there are fewer CPUs.
const FEWEST_DRIVING: usize = 4;

/// A thread and what it gives back: its work, and the moment of its last action.
type Running<T> = JoinHandle<Option<(T, u64)>>;

/// Threads that run.
pub(super) struct Crew {
    stop: Arc<Signal>,
    cpus: Vec<Running<Cpu>>,
    drivers: Vec<Running<Vec<Driver>>>,
}

/// Where threads that have been started wait for their work.
struct Inboxes {
    cpus: Vec<Sender<Cpu>>,
    drivers: Vec<Sender<Vec<Driver>>>,
}

/// What a thread needs beside its work.
#[derive(Clone)]
struct Duty {
    stop: Arc<Signal>,
    failure: Arc<Failure>,
    /// Takes the moment of the thread's first action.
    first: Sender<u64>,
}

impl Duty {
    fn is_over(&self) -> bool {
        self.stop.is_set() || self.failure.signal().is_set()
    }
}

/// What was to run, and why it could not be started.
pub(super) struct NotStarted {
    pub(super) error: GuestError,
    pub(super) cpus: Vec<Cpu>,
    pub(super) drivers: Vec<Driver>,
}

impl Crew {
    /// Starts all threads. Returns also when the first of them acted (CLOCK_MONOTONIC, nanoseconds), if there is any.
    /// `queues` has the unit and the line of each driver.
    pub(super) fn start(
        cpus: Vec<Cpu>,
        drivers: Vec<Driver>,
        queues: Vec<(Arc<Unit>, usize)>,
        config: &GuestConfig,
        failure: &Arc<Failure>,
    ) -> Result<(Crew, Option<u64>), Box<NotStarted>> {
        let (first, firsts) = channel();
        let crew = Signal::new().and_then(|stop| {
            let duty = Duty { stop: Arc::new(stop), failure: failure.clone(), first };
            Crew::spawn(cpus.len(), queues, config, duty).map_err(GuestError::system("start a thread"))
        });
        let (crew, work) = match crew {
            Ok(started) => started,
            Err(error) => return Err(Box::new(NotStarted { error, cpus, drivers })),
        };
        // All of them are there now, so that each gets its work.
        work.cpus.iter().zip(cpus).for_each(|(to, cpu)| drop(to.send(cpu)));
        let share = share(drivers.len());
        let mut drivers = drivers.into_iter();
        work.drivers.iter().for_each(|to| drop(to.send(drivers.by_ref().take(share).collect())));
        let acted = firsts.iter().take(crew.cpus.len() + crew.drivers.len()).min();
        Ok((crew, acted))
    }

    /// Threads that wait for their work, and end without it.
    fn spawn(
        cpus: usize,
        queues: Vec<(Arc<Unit>, usize)>,
        config: &GuestConfig,
        duty: Duty,
    ) -> std::io::Result<(Crew, Inboxes)> {
        let mut crew = Crew { stop: duty.stop.clone(), cpus: Vec::new(), drivers: Vec::new() };
        let mut work = Inboxes { cpus: Vec::new(), drivers: Vec::new() };
        let rate = config.dirty_rate / LOG_PAGE / cpus.max(1) as u64;
        for _ in 0..cpus {
            let (duty, (to, inbox)) = (duty.clone(), channel());
            let live = move || {
                let mut cpu: Cpu = inbox.recv().ok()?;
                let last = run(&duty, || compute(&mut cpu, rate, &duty));
                Some((cpu, last))
            };
            crew.cpus.push(std::thread::Builder::new().name("guest-cpu".into()).spawn(live)?);
            work.cpus.push(to);
        }
        let (rate, patience) = (config.request_rate, Duration::from_secs(config.request_timeout));
        for queues in queues.chunks(share(queues.len())) {
            let (duty, (to, inbox)) = (duty.clone(), channel());
            let queues = queues.to_vec();
            let live = move || {
                let mut drivers: Vec<Driver> = inbox.recv().ok()?;
                let last = run(&duty, || drive(&mut drivers, &queues, rate, patience, &duty));
                Some((drivers, last))
            };
            crew.drivers.push(std::thread::Builder::new().name("guest-disk".into()).spawn(live)?);
            work.drivers.push(to);
        }
        Ok((crew, work))
    }

    /// Stops all threads and gets their work back, with the moment of the last action (CLOCK_MONOTONIC, nanoseconds).
    pub(super) fn stop(self) -> Result<(Vec<Cpu>, Vec<Driver>, u64), GuestError> {
        self.stop.set();
        let lost = || GuestError::State("one of its threads has panicked".into());
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

/// The number of queues that a thread drives. With a thread for each of a hundred queues on two CPUs, all would wait for each other
/// whenever the guest is stopped or started.
fn share(queues: usize) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    queues.div_ceil(cpus.max(FEWEST_DRIVING)).max(1)
}

/// Does `work`, and lets nobody wait for a first action that an error has prevented.
fn run(duty: &Duty, work: impl FnOnce() -> Result<u64, GuestError>) -> u64 {
    work().unwrap_or_else(|error| {
        duty.failure.report(error);
        let _ = duty.first.send(now());
        now()
    })
}

/// A CPU's life: pages at `rate` per second. Returns when it acted last.
fn compute(cpu: &mut Cpu, rate: u64, duty: &Duty) -> Result<u64, GuestError> {
    let (start, begun) = (Instant::now(), cpu.steps());
    cpu.step()?;
    let _ = duty.first.send(now());
    while !duty.is_over() {
        let due = due(rate, start.elapsed());
        while cpu.steps() - begun < due && !duty.is_over() {
            cpu.step()?;
        }
        let pause = next(rate, cpu.steps() - begun, start).map(|pause| pause.max(TICK));
        wait(&[duty.stop.as_fd(), duty.failure.signal().as_fd()], None, pause)?;
    }
    cpu.step()?;
    Ok(now())
}

/// A driver at work.
struct Driving<'a> {
    driver: &'a mut Driver,
    unit: &'a Unit,
    line: &'a Line,
    /// Requests that it had made before.
    before: u64,
    /// The time of the last look for a lost request.
    looked: Instant,
}

/// The life of some drivers: requests at `rate` per second of each, or as fast as the disk answers. Returns when they acted
/// last.
fn drive(
    drivers: &mut [Driver],
    queues: &[(Arc<Unit>, usize)],
    rate: Option<u64>,
    patience: Duration,
    duty: &Duty,
) -> Result<u64, GuestError> {
    let start = Instant::now();
    let at_work = drivers.iter_mut().zip(queues).filter_map(|(driver, (unit, line))| {
        driver.forgive();
        let (before, line) = (driver.requests(), unit.lines.get(*line)?);
        Some(Driving { driver, unit, line, before, looked: start })
    });
    let mut at_work: Vec<Driving<'_>> = at_work.collect();
    let mut first = Some(&duty.first);
    loop {
        let over = duty.is_over();
        for Driving { driver, line, before, .. } in &mut at_work {
            driver.reap()?;
            let allowed = match rate {
                _ if over => 1,
                Some(rate) => (due(rate, start.elapsed()) + 1).saturating_sub(driver.requests() - *before),
                None => u64::MAX,
            };
            for _ in 0..allowed {
                if !driver.submit()? || !over && duty.is_over() {
                    break;
                }
            }
            if driver.publish() {
                line.kick();
            }
            if let Some(first) = first.take() {
                let _ = first.send(now());
            }
        }
        if over {
            return Ok(now());
        }
        let (mut pause, mut called) = (LOOK, false);
        for Driving { driver, unit, before, looked, .. } in &mut at_work {
            look(driver, unit, patience, looked)?;
            called |= driver.listen();
            let next = rate.and_then(|rate| next(rate, driver.requests() - *before, start));
            pause = next.map_or(pause, |next| next.min(pause));
        }
        if called {
            continue;
        }
        let calls = at_work.iter().map(|driving| driving.line.call.as_fd());
        let fds: Vec<_> = calls.chain([duty.stop.as_fd(), duty.failure.signal().as_fd()]).collect();
        let readable = wait(&fds, None, Some(pause))?;
        at_work.iter().zip(readable).filter(|(_, called)| *called).for_each(|(driving, _)| driving.line.answer());
    }
}

/// Completes what is outstanding and reads the queue's whole part of the disk, checking every byte, unless the device's
/// interrupt ends it.
pub(super) fn scan(driver: &mut Driver, unit: &Unit, line: &Line, patience: Duration) -> Result<(), GuestError> {
    driver.verify_held()?;
    driver.forgive();
    let (mut next, mut looked) = (None, Instant::now());
    loop {
        driver.reap()?;
        match &mut next {
            // First the requests that were under way, among which are writes.
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
            line.kick();
        }
        look(driver, unit, patience, &mut looked)?;
        if unit.is_interrupted() {
            return Err(GuestError::Interrupted);
        }
        if driver.outstanding() > 0 && !driver.listen() {
            let interrupt = unit.interrupt().map(AsFd::as_fd);
            let ends: Vec<_> = [line.call.as_fd()].into_iter().chain(interrupt).collect();
            wait(&ends, None, Some(LOOK))?;
            line.answer();
        }
    }
}

/// Looks now and then whether a request is lost, while there is somebody to answer.
fn look(driver: &mut Driver, unit: &Unit, patience: Duration, looked: &mut Instant) -> Result<(), GuestError> {
    if unit.is_away() {
        driver.forgive();
    } else if looked.elapsed() >= LOOK {
        *looked = Instant::now();
        driver.check_lost(patience)?;
    }
    Ok(())
}

/// How many of something there should be after `elapsed`, at `rate` per second.
fn due(rate: u64, elapsed: Duration) -> u64 {
    (u128::from(rate) * elapsed.as_nanos() / 1_000_000_000) as u64
}

/// How long from now until there should be one more than `done`; `None` is never.
fn next(rate: u64, done: u64, start: Instant) -> Option<Duration> {
    let nanos = u128::from(done + 1) * 1_000_000_000 / u128::from(rate.max(1));
    let when = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
    (rate > 0).then(|| when.saturating_sub(start.elapsed()))
}

/// CLOCK_MONOTONIC in nanoseconds.
fn now() -> u64 {
    nanos(ClockId::CLOCK_MONOTONIC)
}

/// The moment at which CLOCK_MONOTONIC showed `monotonic_ns`, not long ago.
pub(super) fn moment(monotonic_ns: u64) -> Moment {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let since = now().saturating_sub(monotonic_ns);
    let realtime_ns = nanos(ClockId::CLOCK_REALTIME).saturating_sub(since);
    Moment { boot: boot.trim().into(), monotonic_ns, realtime_ns }
}

fn nanos(clock: ClockId) -> u64 {
    // These clocks always exist.
    clock_gettime(clock).map_or(0, |time| Duration::from(time).as_nanos() as u64)
}
