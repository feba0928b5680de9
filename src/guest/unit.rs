//! A device as the guest holds it: shared with whoever controls it, watched, and connected again when its back-end has
//! gone away. The data path needs none of this: rings are in guest memory, and go on when the new back-end does.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::GuestError;
use super::signal::{Failure, Signal, wait};
use crate::abi::virtio::SECTOR_BYTES;
use crate::frontend::{Device, DeviceEvent, FrontendError, SharedDevice};
use crate::ring::RingLayout;

/// The longest that anybody else waits for the device while its back-end is away.
const SLICE: Duration = Duration::from_secs(2);
/// After which time one that was refused is tried again.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a back-end may be away while something is asked of it: whoever asks can ask again.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device, and what the guest knows of its connection.
pub(super) struct Unit {
    pub(super) device: Arc<Mutex<Box<dyn Device>>>,
    pub(super) lines: Vec<Line>,
    pub(super) name: String,
    /// How long a back-end may be away before the guest gives up; else it waits for ever.
    limit: Option<Duration>,
    away: AtomicBool,
    absence: Mutex<Option<Absence>>,
    pub(super) reconnects: AtomicU64,
    pub(super) resubmitted: AtomicU64,
    /// Bytes of the disk, as the device says now.
    pub(super) capacity: AtomicU64,
}

/// What is known of a back-end that is away.
struct Absence {
    since: Instant,
    /// Why what answers in its place can't go on for it, if there is something.
    why: Option<String>,
}

/// A ring's place in memory and its doorbells.
pub(super) struct Line {
    pub(super) ring: RingLayout,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) call: Arc<OwnedFd>,
    pub(super) error: Arc<OwnedFd>,
    /// Whether the device has said that the ring is broken.
    pub(super) broken: AtomicBool,
}

impl Line {
    pub(super) fn new(ring: RingLayout) -> Result<Line, GuestError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = || {
            let made = EventFd::from_value_and_flags(0, flags).map_err(GuestError::system("make an eventfd"))?;
            Ok::<_, GuestError>(Arc::new(OwnedFd::from(made)))
        };
        let broken = AtomicBool::new(false);
        Ok(Line { ring, kick: eventfd()?, call: eventfd()?, error: eventfd()?, broken })
    }

    pub(super) fn kick(&self) {
        // A full eventfd is a kick that nobody has looked at yet.
        let _ = nix::unistd::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// Takes a call back, if there is one.
    pub(super) fn answer(&self) {
        let _ = nix::unistd::read(&self.call, &mut [0; 8]);
    }

    /// Takes a signal of a broken ring back; false if there was none.
    pub(super) fn complaint(&self) -> bool {
        nix::unistd::read(&self.error, &mut [0; 8]).is_ok()
    }

    /// The ring begins anew.
    pub(super) fn mend(&self) {
        self.complaint();
        self.broken.store(false, Ordering::Relaxed);
    }
}

impl Unit {
    pub(super) fn new(device: Box<dyn Device>, lines: Vec<Line>, capacity: u64, limit: Option<Duration>) -> Unit {
        Unit {
            name: device.name().to_owned(),
            device: Arc::new(Mutex::new(device)),
            lines,
            limit,
            away: AtomicBool::new(false),
            absence: Mutex::new(None),
            reconnects: AtomicU64::new(0),
            resubmitted: AtomicU64::new(0),
            capacity: AtomicU64::new(capacity),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Box<dyn Device>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the back-end is known to be away.
    pub(super) fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// For how long its back-end has been away, if it is.
    pub(super) fn away_for(&self) -> Option<Duration> {
        self.absence().as_ref().map(|absence| absence.since.elapsed())
    }

    /// Why what answers in its place can't go on for it.
    pub(super) fn refused_because(&self) -> Option<String> {
        self.absence().as_ref()?.why.clone()
    }

    fn absence(&self) -> MutexGuard<'_, Option<Absence>> {
        self.absence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of it if this is new.
    fn has_gone(&self) {
        self.away.store(true, Ordering::Relaxed);
        self.absence().get_or_insert_with(|| {
            tracing::warn!("{}: the back-end has gone away; connecting again", self.name);
            Absence { since: Instant::now(), why: None }
        });
    }

    /// Takes note of why an attempt has failed. That nobody is there is no news.
    fn is_refused(&self, error: &FrontendError) {
        let why = (!error.is_away()).then(|| error.to_string());
        if let Some(absence) = self.absence().as_mut().filter(|absence| absence.why != why) {
            if why.is_some() {
                tracing::warn!("{}: what answers can't go on for the back-end: {error}; connecting again", self.name);
            }
            absence.why = why;
        }
    }

    /// Calls `f`, again after a reconnection if the back-end goes away meanwhile.
    pub(super) fn with<T>(
        &self,
        mut f: impl FnMut(&mut dyn Device) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        let deadline = Instant::now() + PATIENCE.min(self.limit.unwrap_or(PATIENCE));
        loop {
            let mut device = self.lock();
            match f(device.as_mut()) {
                Err(error) if error.is_hang_up() && Instant::now() < deadline => {
                    self.reconnect(device.as_mut(), deadline)?;
                }
                done => return done,
            }
        }
    }

    fn reconnect(&self, device: &mut dyn Device, deadline: Instant) -> Result<(), FrontendError> {
        self.has_gone();
        self.lines.iter().for_each(Line::mend);
        let found = device.reconnect(deadline)?;
        self.look(device);
        self.away.store(false, Ordering::Relaxed);
        if let Some(absence) = self.absence().take() {
            let (name, ms, requests) = (&self.name, absence.since.elapsed().as_millis(), found.resubmitted);
            tracing::info!("{name}: the back-end is back after {ms} ms, with {requests} requests to serve again");
        }
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        self.resubmitted.fetch_add(found.resubmitted, Ordering::Relaxed);
        Ok(())
    }

    /// Reads the disk's capacity again.
    fn look(&self, device: &mut dyn Device) {
        let mut capacity = [0; 8];
        match device.config(0, &mut capacity) {
            Ok(()) => {
                let now = u64::from_le_bytes(capacity).saturating_mul(SECTOR_BYTES);
                let before = self.capacity.swap(now, Ordering::Relaxed);
                if before != now {
                    tracing::info!("{}: the disk has {now} bytes now, it had {before}", self.name);
                }
            }
            // One that has gone away is looked at when it is back.
            Err(error) => tracing::warn!("{}: its capacity can't be read: {error}", self.name),
        }
    }

    /// Takes note of what the device has said without having been asked.
    fn hear(&self) {
        for (index, line) in self.lines.iter().enumerate().filter(|(_, line)| line.complaint()) {
            tracing::error!("{}: ring {index} is broken, and nothing more comes from it", self.name);
            line.broken.store(true, Ordering::Relaxed);
        }
        let mut device = self.lock();
        for event in device.events() {
            match event {
                DeviceEvent::ConfigChanged => self.look(device.as_mut()),
                // The error fd has said so.
                DeviceEvent::RingBroken(_) => {}
                other => tracing::warn!("{}: {other:?}", self.name),
            }
        }
    }

    /// Connects again as long as it takes, unless there is a limit, and lets others at the device between attempts. Whatever
    /// answers there in the back-end's place may be replaced by the right one.
    fn revive(&self, stop: &Signal) -> Result<(), GuestError> {
        let deadline = self.limit.map(|limit| Instant::now() + limit);
        loop {
            let error = {
                let mut device = self.lock();
                if !device.hung_up() {
                    return Ok(());
                }
                let slice = Instant::now() + SLICE;
                match self.reconnect(device.as_mut(), deadline.map_or(slice, |deadline| deadline.min(slice))) {
                    Ok(()) => continue,
                    Err(error) => error,
                }
            };
            if stop.is_set() {
                return Ok(());
            }
            if error.is_final() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(error.into());
            }
            self.is_refused(&error);
            if !error.is_away() {
                wait(&[stop.as_fd()], None, Some(PAUSE))?;
            }
        }
    }
}

impl SharedDevice for Arc<Unit> {
    fn with(&self, ask: &mut dyn FnMut(&mut dyn Device) -> Result<(), FrontendError>) -> Result<(), FrontendError> {
        Unit::with(self, ask)
    }
}

/// The thread that watches a device's connection; it ends when this is dropped.
pub(super) struct Supervisor {
    stop: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    pub(super) fn start(unit: Arc<Unit>, failure: Arc<Failure>) -> Result<Supervisor, GuestError> {
        let stop = Arc::new(Signal::new()?);
        let stopped = stop.clone();
        let watch = move || {
            if let Err(error) = watch(&unit, &stopped) {
                failure.report(error);
            }
        };
        let thread = std::thread::Builder::new().name("supervisor".into()).spawn(watch);
        Ok(Supervisor { stop, thread: Some(thread.map_err(GuestError::system("start a thread"))?) })
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(unit: &Unit, stop: &Signal) -> Result<(), GuestError> {
    while !stop.is_set() {
        let (connection, events) = {
            let device = unit.lock();
            (device.watch()?, device.watch_events()?)
        };
        let Some(connection) = connection else { return Ok(()) };
        let errors = unit.lines.iter().map(|line| line.error.as_fd());
        let readable: Vec<_> = errors.chain([stop.as_fd()]).chain(events.iter().map(AsFd::as_fd)).collect();
        wait(&readable, Some(connection.as_fd()), None)?;
        if !stop.is_set() {
            unit.hear();
            unit.revive(stop)?;
        }
    }
    Ok(())
}
