//! The rings of a connection, one thread each, controlled by the session.
//!
//! Commands are sent over a channel. A worker executes each command between two batches of requests and then
//! acknowledges it, so no effect of the former configuration remains when a command returns. This is the grace period
//! that a new log requires (rule L9.1).

#![forbid(unsafe_code)]

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::backend::rings::ring_lock::RingLockClient;
use crate::backend::rings::ring_task::RingTask;
use crate::backend::rings::worker::WorkerCommand;
use crate::backend::session::replies::PendingReplies;
use crate::backend::session::{Logging, VringConfig, VringController};
use crate::backend::{BackendError, Notifier, VirtioDevice};
use crate::memory::Iova;
use crate::ring::RingBase;
use crate::sys::join::join;
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// Time to wait for a ring before pending replies are sent.
const REPLY_DELAY: Duration = Duration::from_millis(1);

/// Interval at which the connection is polled while a ring is being stopped.
const HANG_UP_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The rings of one connection. Dropping it abandons running rings: requests in flight are completed but not published,
/// so a front-end that has continued with another back-end finds its rings unchanged.
pub struct Workers {
    device: Arc<dyn VirtioDevice>,
    /// The thread of each ring, once it has run.
    threads: Vec<Option<RingThread>>,
    running: Vec<Option<WorkerHandle>>,
    /// The main socket, to detect a hang-up while a ring is being stopped.
    connection: Option<OwnedFd>,
    /// Replies that have not been sent yet.
    replies: Option<Arc<PendingReplies>>,
    /// With several front-ends: permits only one of them to run rings.
    ring_lock: Option<RingLockClient>,
}

struct WorkerHandle {
    commands: Sender<WorkerCommand>,
    wake: Arc<EventFd>,
    /// Receives the base of the ring when it has stopped.
    final_base: Receiver<RingBase>,
    postcopy: bool,
}

/// A thread that serves a ring whenever it runs. It is kept while the ring is stopped, because starting a thread is
/// slower than waking one and adds to the downtime of a migration. It ends on drop.
struct RingThread {
    jobs: Option<Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<JoinHandle<()>>,
}

impl RingThread {
    fn new(index: u16) -> io::Result<RingThread> {
        let (work, works) = unbounded::<Box<dyn FnOnce() + Send>>();
        let serve = move || works.into_iter().for_each(|work| work());
        let thread = thread::Builder::new().name(format!("ring {index}")).spawn(serve)?;
        Ok(RingThread { jobs: Some(work), thread: Some(thread) })
    }

    /// Returns false if the thread has panicked.
    fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for RingThread {
    fn drop(&mut self) {
        self.jobs = None;
        self.thread.take().into_iter().for_each(join);
    }
}

impl Workers {
    /// Creates the controller of a connection. No ring runs.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Workers {
        let queues = 0..device.queues();
        let (threads, running) = (queues.clone().map(|_| None).collect(), queues.map(|_| None).collect());
        Workers { device, threads, running, connection: None, replies: None, ring_lock: None }
    }

    /// Watches the main socket. If the front-end hangs up while a ring is being stopped, the ring's requests are
    /// abandoned, because another back-end may have taken over the ring (rule I10).
    ///
    /// # Errors
    /// The error of the system.
    pub fn watch_connection(&mut self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.connection = Some(connection.try_clone_to_owned()?);
        Ok(())
    }

    /// Sets the pending replies, which are sent before waiting for a ring.
    pub(crate) fn set_replies(&mut self, replies: Arc<PendingReplies>) {
        self.replies = Some(replies);
    }

    /// Waits for a ring, and sends pending replies if that takes long.
    fn wait_for_ack<T>(&self, ring: &Receiver<T>) -> Option<T> {
        match ring.recv_timeout(REPLY_DELAY) {
            Err(RecvTimeoutError::Timeout) => {
                self.replies.iter().for_each(|replies| replies.try_send());
                ring.recv().ok()
            }
            received => received.ok(),
        }
    }

    /// Runs rings only while this connection holds `ring_lock`.
    pub(crate) fn use_ring_lock(&mut self, turn: RingLockClient) {
        self.ring_lock = Some(turn);
    }

    /// Releases the ring lock if no ring runs. Called between messages.
    pub(crate) fn release_idle_ring_lock(&self) {
        if self.running.iter().all(Option::is_none) {
            self.ring_lock.iter().for_each(RingLockClient::release);
        }
    }

    fn has_hung_up(&self) -> bool {
        let Some(connection) = &self.connection else { return false };
        // A hang-up is reported without requested events.
        let mut fds = [PollFd::new(connection.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Stops all rings as [`VringController::stop`] does.
    pub fn stop_all(&mut self) {
        self.stop_workers(|| WorkerCommand::Stop);
    }

    fn stop_workers(&mut self, command: fn() -> WorkerCommand) {
        for handle in self.running.iter().flatten() {
            handle.send(command());
        }
        for handle in self.running.iter_mut().filter_map(Option::take) {
            let _ = handle.final_base.recv();
        }
    }

    fn stop_ring(&mut self, index: u16, command: WorkerCommand) -> Result<RingBase, BackendError> {
        let lost = BackendError::WorkerLost { index };
        let Some(handle) = self.running.get_mut(usize::from(index)).and_then(Option::take) else { return Err(lost) };
        handle.send(command);
        let mut wait = REPLY_DELAY;
        loop {
            match handle.final_base.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) if self.has_hung_up() => {
                    handle.send(WorkerCommand::Abandon);
                    return handle.final_base.recv().map_err(|_| lost);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.replies.iter().for_each(|replies| replies.try_send());
                    wait = HANG_UP_POLL_INTERVAL;
                }
                ended => return ended.map_err(|_| lost),
            }
        }
    }

    /// Returns the thread of ring `index`, creating it if there is none.
    fn thread(&mut self, index: u16) -> Result<&RingThread, BackendError> {
        let slot = self.threads.get_mut(usize::from(index)).ok_or(BackendError::WorkerLost { index })?;
        let thread = match slot.take().filter(RingThread::is_alive) {
            Some(thread) => thread,
            None => RingThread::new(index).map_err(BackendError::system("start a thread"))?,
        };
        Ok(slot.insert(thread))
    }

    /// Runs `work` on the thread of ring `index`.
    fn run_on_thread(&mut self, index: u16, work: impl FnOnce() + Send + 'static) -> Result<(), BackendError> {
        let to = self.thread(index)?.jobs.as_ref();
        let sent = to.is_some_and(|to| to.send(Box::new(work)).is_ok());
        if sent { Ok(()) } else { Err(BackendError::WorkerLost { index }) }
    }

    fn handle(&self, index: u16) -> Option<&WorkerHandle> {
        self.running.get(usize::from(index))?.as_ref()
    }
}

impl WorkerHandle {
    fn send(&self, command: WorkerCommand) {
        // A worker receives commands until it is stopped.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.ring_lock.iter().for_each(RingLockClient::mark_releasing);
        self.stop_workers(|| WorkerCommand::Abandon);
        // All threads receive the command to end before the first is joined.
        self.threads.iter_mut().flatten().for_each(|thread| thread.jobs = None);
        self.ring_lock.iter().for_each(RingLockClient::release);
    }
}

impl VringController for Workers {
    fn before_blocking(&mut self) {
        self.replies.iter().for_each(|replies| replies.try_send());
    }

    fn prepare(&mut self, index: u16) {
        if let Err(error) = self.thread(index) {
            limited!(debug, "ring {index}: {}", with_causes(&error));
        }
    }

    fn start(&mut self, index: u16, config: VringConfig) -> Result<(), BackendError> {
        let take = |turn: &RingLockClient| {
            self.replies.iter().for_each(|replies| replies.try_send());
            turn.acquire(|| self.has_hung_up())
        };
        if self.ring_lock.as_ref().is_some_and(|turn| !take(turn)) {
            return Err(BackendError::OtherFrontEndRuns { index });
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags).map_err(BackendError::system("make an eventfd"))?);
        let (orders, inbox) = unbounded();
        let (ready, is_ready) = bounded(1);
        config.kick.iter().for_each(|kick| kick.add_waker(&wake));
        let (device, woken, postcopy) = (self.device.clone(), wake.clone(), config.in_postcopy);
        let (ending, ended) = bounded(1);
        let serve = move || {
            let post = RingTask { index, device, commands: inbox, wake: woken };
            if let Some(iotlb) = config.iotlb.clone() {
                // Errors of the ring are found once its areas are translated.
                let _ = ready.send(Ok(()));
                return post.run_translated(config, &iotlb);
            }
            let (base, failed) = (config.base, config.error.clone());
            match post.start_worker(config, None) {
                Err(error) => {
                    if postcopy {
                        limited!(warn, "{}", with_causes(&error));
                        failed.iter().for_each(|failed| failed.signal());
                    }
                    let _ = ready.send(Err(error));
                    base
                }
                Ok((worker, recovered)) => {
                    let _ = ready.send(Ok(()));
                    worker.run(recovered).base()
                }
            }
        };
        self.run_on_thread(index, move || {
            // The worker is dropped before the ring is reported as stopped.
            let base = serve();
            let _ = ending.send(base);
        })?;
        if !postcopy {
            let ended = || BackendError::system("serve a queue")(io::Error::other("its thread ended"));
            self.wait_for_ack(&is_ready).unwrap_or_else(|| Err(ended()))?;
        }
        if let Some(slot) = self.running.get_mut(usize::from(index)) {
            *slot = Some(WorkerHandle { commands: orders, wake, final_base: ended, postcopy });
        }
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.stop_ring(index, WorkerCommand::Stop)
    }

    fn suspend(&mut self, index: u16) -> Result<RingBase, BackendError> {
        self.stop_ring(index, WorkerCommand::Suspend)
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.send(WorkerCommand::SetEnabled(enabled, done));
            let _ = self.wait_for_ack(&is_done);
        }
    }

    fn set_logging(&mut self, index: u16, logging: Logging) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.send(WorkerCommand::Logging(logging, done));
            let _ = self.wait_for_ack(&is_done);
        }
    }

    fn invalidate(&mut self, iovas: &RangeInclusive<Iova>) {
        let send = |handle: &WorkerHandle| {
            let (done, is_done) = bounded(1);
            handle.send(WorkerCommand::Invalidate(iovas.clone(), done));
            is_done
        };
        let pending: Vec<_> = self.running.iter().flatten().map(send).collect();
        for is_done in pending {
            let _ = self.wait_for_ack(&is_done);
        }
    }

    fn kick(&mut self, index: u16) {
        if let Some(handle) = self.handle(index) {
            let _ = handle.wake.write(1);
        }
    }

    fn set_notifiers(&mut self, index: u16, call: Option<Arc<Notifier>>, error: Option<Arc<Notifier>>) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.send(WorkerCommand::Notifiers { call, error, done });
            // The worker may wait for a page that the front-end serves only after the reply (rule P1.5).
            if !handle.postcopy {
                let _ = self.wait_for_ack(&is_done);
            }
        }
    }
}
