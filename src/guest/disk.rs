//! A disk of the guest: its device, shared between threads, and the reconnector, which watches the connection and
//! reconnects when the back-end has disconnected. The data path does not depend on it: rings are in guest memory and
//! continue with the new back-end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::GuestError;
use super::signal::{GuestFailure, StopEvent, poll_fds};
use crate::abi::virtio::SECTOR_BYTES;
use crate::frontend::{Device, DeviceEvent, FrontendError, Interrupt, RingSetup, SharedDevice};
use crate::ring::{RingBase, RingLayout};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;
use crate::sys::{lock, nonblocking};

/// Time limit of one attempt to reconnect.
const CONNECT_ATTEMPT: Duration = Duration::from_secs(2);
/// Delay after a refused attempt.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// Time for which a request waits for an unavailable back-end. The caller can repeat it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval of checks for a connected back-end.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A device and the state of its connection.
///
/// Only the reconnector reconnects. Other requests wait for it or are left to it.
pub(super) struct Disk {
    device: Mutex<Box<dyn Device>>,
    interrupt: Option<Interrupt>,
    pub(super) doorbells: Vec<QueueDoorbells>,
    /// Base of each stopped ring; `None` for running rings. Changes only with the device locked.
    bases: Mutex<Vec<Option<RingBase>>>,
    pub(super) name: String,
    /// Time limit for an unavailable back-end; without it, the guest waits for ever.
    away_limit: Option<Duration>,
    away: AtomicBool,
    outage: Mutex<Option<Outage>>,
    /// Actions for the reconnector as soon as the back-end is connected.
    pending: Mutex<PendingActions>,
    /// Wakes the reconnector for pending actions and a disconnected back-end.
    wake: EventFd,
    /// True if the reconnector has ended.
    reconnector_ended: AtomicBool,
    pub(super) reconnects: AtomicU64,
    pub(super) resubmitted: AtomicU64,
    /// Current size of the disk, bytes.
    pub(super) capacity: AtomicU64,
}

/// State of an unavailable back-end.
struct Outage {
    since: Instant,
    /// Reason that a reconnection was refused, or the request without a reply.
    reason: Option<String>,
}

#[derive(Clone, Copy, Default, PartialEq)]
struct PendingActions {
    start_rings: bool,
    stop_logging: bool,
}

/// A ring's layout and its kick, call and error descriptors.
pub(super) struct QueueDoorbells {
    pub(super) ring: RingLayout,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) call: Arc<OwnedFd>,
    pub(super) error: Arc<OwnedFd>,
    /// True if the device has reported the ring as broken.
    pub(super) broken: AtomicBool,
}

impl QueueDoorbells {
    pub(super) fn new(ring: RingLayout) -> Result<QueueDoorbells, GuestError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = || {
            let made = EventFd::from_value_and_flags(0, flags).map_err(GuestError::system("make an eventfd"))?;
            Ok::<_, GuestError>(Arc::new(OwnedFd::from(made)))
        };
        let broken = AtomicBool::new(false);
        Ok(QueueDoorbells { ring, kick: eventfd()?, call: eventfd()?, error: eventfd()?, broken })
    }

    /// Returns the setup that a device needs to start the ring at `base`.
    pub(super) fn setup(&self, base: RingBase) -> RingSetup {
        let (size, [desc, avail, used]) = (self.ring.size(), self.ring.areas());
        RingSetup {
            size,
            desc,
            avail,
            used,
            kick: self.kick.clone(),
            call: self.call.clone(),
            error: Some(self.error.clone()),
            base,
        }
    }

    pub(super) fn kick(&self) {
        let _ = nonblocking::signal(self.kick.as_fd());
    }

    /// Clears a pending call.
    pub(super) fn ack_call(&self) {
        let _ = nonblocking::take(self.call.as_fd());
    }

    /// Clears a pending error signal. Returns false if there was none.
    pub(super) fn take_error(&self) -> bool {
        nonblocking::take(self.error.as_fd()).is_ok()
    }

    /// Clears the broken state before the ring is started.
    pub(super) fn clear_broken(&self) {
        self.take_error();
        self.broken.store(false, Ordering::Relaxed);
    }
}

impl Disk {
    pub(super) fn new(
        device: Box<dyn Device>,
        doorbells: Vec<QueueDoorbells>,
        stopped: Vec<Option<RingBase>>,
        capacity: u64,
        limit: Option<Duration>,
    ) -> Result<Disk, GuestError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Disk {
            name: device.name().to_owned(),
            interrupt: device.interrupt(),
            device: Mutex::new(device),
            doorbells,
            bases: Mutex::new(stopped),
            away_limit: limit,
            away: AtomicBool::new(false),
            outage: Mutex::new(None),
            pending: Mutex::default(),
            wake: EventFd::from_value_and_flags(0, flags).map_err(GuestError::system("make an eventfd"))?,
            reconnector_ended: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            resubmitted: AtomicU64::new(0),
            capacity: AtomicU64::new(capacity),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Device>> {
        lock(&self.device)
    }

    /// Returns the interrupt that ends waits for the back-end.
    pub(super) fn interrupt(&self) -> Option<&Interrupt> {
        self.interrupt.as_ref()
    }

    /// Returns the base of each stopped ring; `None` for running rings.
    pub(super) fn stopped_bases(&self) -> Vec<Option<RingBase>> {
        lock(&self.bases).clone()
    }

    /// Returns true if the back-end is known to be unavailable.
    pub(super) fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Returns the time for which the back-end has been unavailable, if it is.
    pub(super) fn away_for(&self) -> Option<Duration> {
        lock(&self.outage).as_ref().map(|absence| absence.since.elapsed())
    }

    /// Returns the reason that a reconnection was refused.
    pub(super) fn refusal_reason(&self) -> Option<String> {
        lock(&self.outage).as_ref()?.reason.clone()
    }

    /// Records that the back-end is unavailable, and wakes the reconnector.
    fn mark_away(&self, error: Option<&FrontendError>) {
        let silent = error.and_then(|error| match error {
            FrontendError::Interrupted { request } => Some(format!("no reply to {request} yet")),
            _ => None,
        });
        self.away.store(true, Ordering::Relaxed);
        let mut absence = lock(&self.outage);
        if absence.is_none() {
            *absence = Some(Outage { since: Instant::now(), reason: silent.clone() });
            drop(absence);
            match silent {
                Some(why) => limited!(warn, "{}: {why}; the guest continues without this device", self.name),
                None => {
                    limited!(warn, "{}: the back-end has disconnected or does not reply; reconnecting", self.name)
                }
            }
        }
        self.wake();
    }

    fn wake(&self) {
        // A full counter is already set.
        let _ = self.wake.write(1);
    }

    /// Records the reason of a failed attempt. A missing back-end is not logged again.
    fn record_refusal(&self, error: &FrontendError) {
        let is_silent = matches!(error, FrontendError::Timeout { .. } | FrontendError::NotServed { .. });
        let why = (is_silent || !error.is_transient()).then(|| with_causes(error).to_string());
        // A back-end that is still silent is not logged again.
        let is_new = |absence: &&mut Outage| absence.reason != why && !(is_silent && absence.reason.is_some());
        if let Some(absence) = lock(&self.outage).as_mut().filter(is_new) {
            if why.is_some() {
                limited!(
                    warn,
                    "{}: refused to reconnect to the process at this socket: {}; trying again",
                    self.name,
                    with_causes(error)
                );
            }
            absence.reason = why;
        }
    }

    /// Calls `f`, and again if the back-end disconnects meanwhile and is reconnected.
    pub(super) fn retry_until_connected<T>(
        &self,
        mut f: impl FnMut(&mut dyn Device) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        let deadline = Instant::now() + REQUEST_TIMEOUT.min(self.away_limit.unwrap_or(REQUEST_TIMEOUT));
        loop {
            match self.try_with(&mut f) {
                Err(error) if is_away(&error) => {
                    let over = self.reconnector_ended.load(Ordering::Relaxed) || Instant::now() >= deadline;
                    if over || self.is_interrupted() {
                        return Err(self.away_error());
                    }
                    std::thread::sleep(POLL_INTERVAL);
                }
                done => return done,
            }
        }
    }

    /// Calls `f` unless the back-end is unavailable.
    pub(super) fn try_with<T>(
        &self,
        f: impl FnOnce(&mut dyn Device) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        let mut device = loop {
            if self.is_away() {
                return Err(self.away_error());
            }
            // The reconnector holds the lock during an attempt to connect.
            match self.device.try_lock() {
                Ok(device) => break device,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if self.is_interrupted() => return Err(self.away_error()),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        // It may have disconnected while another thread held the lock.
        if self.is_away() {
            return Err(self.away_error());
        }
        let done = f(device.as_mut());
        match &done {
            Err(error) if error.needs_reconnect() => self.mark_away(Some(error)),
            Ok(_) if device.needs_reconnect() => self.mark_away(None),
            _ => {}
        }
        done
    }

    /// Returns true if waits for the back-end are to end.
    pub(super) fn is_interrupted(&self) -> bool {
        self.interrupt.as_ref().is_some_and(Interrupt::is_set)
    }

    fn away_error(&self) -> FrontendError {
        FrontendError::Unavailable { device: self.name.clone(), reason: self.refusal_reason() }
    }

    /// Returns the setups of the stopped rings.
    pub(super) fn stopped_rings(&self) -> Vec<(u16, RingSetup)> {
        let stopped = (0..).zip(&self.doorbells).zip(self.stopped_bases());
        stopped.filter_map(|((index, doorbells), base)| Some((index, doorbells.setup(base?)))).collect()
    }

    /// Starts all stopped rings.
    pub(super) fn start_rings(&self, device: &mut dyn Device, sent: &mut dyn FnMut()) -> Result<(), FrontendError> {
        let rings = self.stopped_rings();
        let mut bases = lock(&self.bases);
        rings
            .iter()
            .filter_map(|(index, _)| self.doorbells.get(usize::from(*index)))
            .for_each(QueueDoorbells::clear_broken);
        device.start_rings(&rings, sent, &mut |index| {
            // For requests that were added while the ring was stopped, or whose kick was lost with another host. A kick
            // before the start may be consumed by a device that does not read the ring yet.
            self.doorbells.get(usize::from(index)).iter().for_each(|doorbells| doorbells.kick());
            bases.get_mut(usize::from(index)).into_iter().for_each(|base| *base = None);
        })
    }

    /// Stops all rings; with `suspend`, without waiting for their requests.
    pub(super) fn stop_rings(
        &self,
        device: &mut dyn Device,
        suspend: bool,
        sent: &mut dyn FnMut(),
    ) -> Result<(), FrontendError> {
        lock(&self.pending).start_rings = false;
        let mut bases = lock(&self.bases);
        let running: Vec<u16> =
            (0..).zip(bases.iter()).filter(|(_, base)| base.is_none()).map(|(index, _)| index).collect();
        let mut stopped =
            |index, base| bases.get_mut(usize::from(index)).into_iter().for_each(|known| *known = Some(base));
        match suspend {
            true => device.suspend_rings(&running, sent, &mut stopped),
            false => device.stop_rings(&running, sent, &mut stopped),
        }
    }

    /// Requests the reconnector to start all stopped rings as soon as the back-end is connected.
    pub(super) fn request_start(&self) {
        lock(&self.pending).start_rings = true;
        self.wake();
    }

    /// Waits until the reconnector has completed its pending actions.
    pub(super) fn wait_for_pending(&self) -> Result<(), FrontendError> {
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        while *lock(&self.pending) != PendingActions::default() {
            let over = self.reconnector_ended.load(Ordering::Relaxed) || Instant::now() >= deadline;
            if over || self.is_interrupted() {
                return Err(self.away_error());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn reconnect(&self, device: &mut dyn Device, deadline: Instant) -> Result<(), FrontendError> {
        self.doorbells.iter().for_each(QueueDoorbells::clear_broken);
        let found = device.reconnect(deadline)?;
        self.update_capacity(device);
        if found.attempts > 0 {
            self.reconnects.fetch_add(1, Ordering::Relaxed);
            self.resubmitted.fetch_add(found.resubmitted, Ordering::Relaxed);
            let requests = found.resubmitted;
            limited!(info, "{}: reconnected to the back-end, which resubmits {requests} requests", self.name);
        }
        Ok(())
    }

    /// Records that the back-end is connected.
    fn mark_connected(&self) {
        self.away.store(false, Ordering::Relaxed);
        if let Some(absence) = lock(&self.outage).take() {
            limited!(
                info,
                "{}: the back-end is connected again after {} ms",
                self.name,
                absence.since.elapsed().as_millis()
            );
        }
    }

    /// Executes the pending actions.
    fn run_pending(&self, device: &mut dyn Device) -> Result<(), FrontendError> {
        if lock(&self.pending).stop_logging {
            match device.stop_logging() {
                Err(error) if error.needs_reconnect() => return Err(error),
                Err(error) => {
                    limited!(warn, "{}: logging could not be switched off: {}", self.name, with_causes(&error))
                }
                Ok(()) => {}
            }
            lock(&self.pending).stop_logging = false;
        }
        if lock(&self.pending).start_rings {
            self.start_rings(device, &mut || {})?;
            lock(&self.pending).start_rings = false;
        }
        Ok(())
    }

    /// Updates the disk's capacity.
    fn update_capacity(&self, device: &mut dyn Device) {
        let mut capacity = [0; 8];
        match device.config(0, &mut capacity) {
            Ok(()) => {
                let now = u64::from_le_bytes(capacity).saturating_mul(SECTOR_BYTES);
                let before = self.capacity.swap(now, Ordering::Relaxed);
                if before != now {
                    limited!(info, "{}: the disk has {now} bytes now, it had {before}", self.name);
                }
            }
            // A disconnected back-end is read when it is back.
            Err(error) => limited!(warn, "{}: its capacity can't be read: {}", self.name, with_causes(&error)),
        }
    }

    /// Handles events of the device.
    fn handle_events(&self) {
        for (index, doorbells) in self.doorbells.iter().enumerate().filter(|(_, doorbells)| doorbells.take_error()) {
            limited!(warn, "{}: ring {index} is broken and completes no more requests", self.name);
            doorbells.broken.store(true, Ordering::Relaxed);
        }
        let mut device = self.lock();
        for event in device.take_events() {
            match event {
                DeviceEvent::ConfigChanged => self.update_capacity(device.as_mut()),
                // Already reported by the error descriptor.
                DeviceEvent::RingBroken(_) => {}
                other => limited!(warn, "{}: {other:?}", self.name),
            }
        }
    }

    /// Reconnects until it succeeds or the time limit has passed, and executes the pending actions. Unlocks the device
    /// between attempts. A wrong back-end at the socket may be replaced by the right one later.
    fn restore_connection(&self, stop: &StopEvent) -> Result<(), GuestError> {
        let deadline = self.away_limit.map(|limit| Instant::now() + limit);
        loop {
            let (error, connected) = {
                let mut device = self.lock();
                let connected = match device.needs_reconnect() {
                    true => {
                        self.mark_away(None);
                        let slice = Instant::now() + CONNECT_ATTEMPT;
                        self.reconnect(device.as_mut(), deadline.map_or(slice, |deadline| deadline.min(slice)))
                    }
                    false => Ok(()),
                };
                let is_connected = connected.is_ok();
                match connected.and_then(|()| self.run_pending(device.as_mut())) {
                    Ok(()) => {
                        self.mark_connected();
                        return Ok(());
                    }
                    Err(error) => (error, is_connected),
                }
            };
            if stop.is_set() {
                return Ok(());
            }
            let over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if error.is_unrecoverable() || over {
                return Err(error.into());
            }
            if connected && !error.needs_reconnect() {
                // The back-end may accept its rings later: when its image is unlocked, or another back-end is in its
                // place.
                self.mark_away(Some(&error));
            }
            if matches!(error, FrontendError::Interrupted { .. }) {
                poll_fds(&[stop.as_fd()], None, Some(POLL_INTERVAL))?;
                continue;
            }
            self.record_refusal(&error);
            if !error.is_transient() {
                poll_fds(&[stop.as_fd()], None, Some(RETRY_DELAY))?;
            }
        }
    }
}

impl SharedDevice for Arc<Disk> {
    fn with(&self, ask: &mut dyn FnMut(&mut dyn Device) -> Result<(), FrontendError>) -> Result<(), FrontendError> {
        Disk::retry_until_connected(self, ask)
    }

    fn stop_logging(&self) -> Result<(), FrontendError> {
        match self.try_with(|device| device.stop_logging()) {
            Err(FrontendError::Unavailable { .. }) => {
                lock(&self.pending).stop_logging = true;
                self.wake();
                Ok(())
            }
            done => done,
        }
    }
}

/// Returns true if a reconnection may succeed.
pub(super) fn is_away(error: &FrontendError) -> bool {
    error.is_hang_up() || matches!(error, FrontendError::Unavailable { .. })
}

/// The thread that watches a device's connection. Dropping it ends the thread.
pub(super) struct Reconnector {
    stop: Arc<StopEvent>,
    interrupt: Option<Interrupt>,
    thread: Option<JoinHandle<()>>,
}

impl Reconnector {
    pub(super) fn start(disk: Arc<Disk>, failure: Arc<GuestFailure>) -> Result<Reconnector, GuestError> {
        let stop = Arc::new(StopEvent::new()?);
        let (stopped, interrupt) = (stop.clone(), disk.interrupt.clone());
        let watch = move || {
            let watched = watch(&disk, &stopped);
            disk.reconnector_ended.store(true, Ordering::Relaxed);
            if let Err(error) = watched {
                failure.report(error);
            }
        };
        let thread = std::thread::Builder::new().name("reconnector".into()).spawn(watch);
        Ok(Reconnector { stop, interrupt, thread: Some(thread.map_err(GuestError::system("start a thread"))?) })
    }
}

impl Drop for Reconnector {
    fn drop(&mut self) {
        self.stop.set();
        self.interrupt.iter().for_each(Interrupt::set);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Remaining users of the device may wait for it again.
        self.interrupt.iter().for_each(Interrupt::clear);
    }
}

fn watch(disk: &Disk, stop: &StopEvent) -> Result<(), GuestError> {
    while !stop.is_set() {
        let (connection, events) = {
            let device = disk.lock();
            (device.hang_up_fd()?, device.events_fd()?)
        };
        let errors = disk.doorbells.iter().map(|doorbells| doorbells.error.as_fd());
        let readable: Vec<_> =
            errors.chain([stop.as_fd(), disk.wake.as_fd()]).chain(events.iter().map(AsFd::as_fd)).collect();
        poll_fds(&readable, connection.as_ref().map(AsFd::as_fd), None)?;
        if !stop.is_set() {
            // Later signals wake the thread again.
            let _ = disk.wake.read();
            disk.handle_events();
            disk.restore_connection(stop)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::virtio::VirtioFeatures;
    use crate::memory::GuestAddress;

    /// The back-end has every descriptor of a queue too.
    #[test]
    fn doorbells_made_blocking_by_the_back_end_do_not_block_the_guest() {
        let doorbells =
            QueueDoorbells::new(RingLayout::new(VirtioFeatures::empty(), 64, [0, 0x1000, 0x2000].map(GuestAddress)))
                .unwrap();
        for fd in [&doorbells.kick, &doorbells.call, &doorbells.error] {
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
        }
        nix::unistd::write(&doorbells.kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            doorbells.kick();
            doorbells.ack_call();
            let complained = doorbells.take_error();
            done.send(complained)
        });
        assert_eq!(is_done.recv_timeout(Duration::from_secs(60)), Ok(false));
    }
}
