//! The running rings of a connection, a thread each, and how a session commands them.
//!
//! Orders come over a channel, and each is carried out between two batches of requests and then acknowledged. So
//! whatever a ring did by its old orders is done when the order returns: that is the grace period which a new log needs
//! (rule L9.1).

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

use super::replies::PendingReplies;
use super::ring_lock::RingLockClient;
use super::ring_task::RingTask;
use super::session::{Logging, VringConfig, VringController};
use super::worker::WorkerCommand;
use super::{BackendError, Notifier, VirtioDevice};
use crate::ring::RingBase;
use crate::sys::join::join;
use crate::sys::log_limit::limited;

/// Time that answers wait for a ring.
const REPLY_DELAY: Duration = Duration::from_millis(1);

/// The interval at which the front-end is polled while a ring is being stopped.
const HANG_UP_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The rings of one connection. Dropping it abandons those that run: what is under way ends, but is not published, so
/// that a front-end which has gone on without us finds its rings as it left them.
pub struct Workers {
    device: Arc<dyn VirtioDevice>,
    /// The thread of each ring, once it has run.
    threads: Vec<Option<RingThread>>,
    running: Vec<Option<WorkerHandle>>,
    /// The connection to the front-end, to see it hang up while a ring is being stopped.
    connection: Option<OwnedFd>,
    /// Answers that the front-end has not been sent yet.
    replies: Option<Arc<PendingReplies>>,
    /// Where several front-ends may be connected: only one has rings that run.
    ring_lock: Option<RingLockClient>,
}

struct WorkerHandle {
    commands: Sender<WorkerCommand>,
    wake: Arc<EventFd>,
    /// Brings the base of the ring when it has ended.
    final_base: Receiver<RingBase>,
    postcopy: bool,
}

/// A thread that serves a ring whenever that runs: to wake one takes a fraction of the time that it takes to make one, which
/// is time for which a guest that is migrated stands still. It ends when this is dropped.
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

    /// Returns false if it has panicked: it does nothing any more.
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
    /// No ring runs yet.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Workers {
        let queues = 0..device.queues();
        let (threads, running) = (queues.clone().map(|_| None).collect(), queues.map(|_| None).collect());
        Workers { device, threads, running, connection: None, replies: None, ring_lock: None }
    }

    /// Watches the connection to the front-end from now on. If the front-end hangs up while a ring is being stopped, what
    /// the ring has is abandoned: the front-end's next back-end may have taken the ring up (rule I10.2).
    ///
    /// # Errors
    /// The error of the system.
    pub fn watch_connection(&mut self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.connection = Some(connection.try_clone_to_owned()?);
        Ok(())
    }

    /// Sends `answers` from now on before a ring is waited for.
    pub(super) fn set_replies(&mut self, answers: Arc<PendingReplies>) {
        self.replies = Some(answers);
    }

    /// Waits for a ring, which mostly takes no time.
    fn wait_for_ack<T>(&self, ring: &Receiver<T>) -> Option<T> {
        match ring.recv_timeout(REPLY_DELAY) {
            Err(RecvTimeoutError::Timeout) => {
                self.replies.iter().for_each(|answers| answers.try_send());
                ring.recv().ok()
            }
            received => received.ok(),
        }
    }

    /// Runs rings only while no other connection does.
    pub(super) fn use_ring_lock(&mut self, turn: RingLockClient) {
        self.ring_lock = Some(turn);
    }

    /// Between two messages: lets other connections run rings, if none runs here.
    pub(super) fn release_idle_ring_lock(&self) {
        if self.running.iter().all(Option::is_none) {
            self.ring_lock.iter().for_each(RingLockClient::release);
        }
    }

    fn has_hung_up(&self) -> bool {
        let Some(connection) = &self.connection else { return false };
        // Also without events asked for, the system reports the end.
        let mut fds = [PollFd::new(connection.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Stops all rings as [`VringController::stop`] does.
    pub fn stop_all(&mut self) {
        self.stop_workers(|| WorkerCommand::Stop);
    }

    fn stop_workers(&mut self, order: fn() -> WorkerCommand) {
        for handle in self.running.iter().flatten() {
            handle.send(order());
        }
        for handle in self.running.iter_mut().filter_map(Option::take) {
            let _ = handle.final_base.recv();
        }
    }

    fn stop_ring(&mut self, index: u16, order: WorkerCommand) -> Result<RingBase, BackendError> {
        let lost = BackendError::WorkerLost { index };
        let Some(handle) = self.running.get_mut(usize::from(index)).and_then(Option::take) else { return Err(lost) };
        handle.send(order);
        let mut wait = REPLY_DELAY;
        loop {
            match handle.final_base.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) if self.has_hung_up() => {
                    handle.send(WorkerCommand::Abandon);
                    return handle.final_base.recv().map_err(|_| lost);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.replies.iter().for_each(|answers| answers.try_send());
                    wait = HANG_UP_POLL_INTERVAL;
                }
                ended => return ended.map_err(|_| lost),
            }
        }
    }

    /// The thread of ring `index`, which is made if there is none.
    fn thread(&mut self, index: u16) -> Result<&RingThread, BackendError> {
        let slot = self.threads.get_mut(usize::from(index)).ok_or(BackendError::WorkerLost { index })?;
        let thread = match slot.take().filter(RingThread::is_alive) {
            Some(thread) => thread,
            None => RingThread::new(index).map_err(BackendError::system("start a thread"))?,
        };
        Ok(slot.insert(thread))
    }

    /// Has the thread of ring `index` work.
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
    fn send(&self, order: WorkerCommand) {
        // A worker takes orders until it is told to end.
        let _ = self.commands.send(order);
        let _ = self.wake.write(1);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.ring_lock.iter().for_each(RingLockClient::mark_releasing);
        self.stop_workers(|| WorkerCommand::Abandon);
        // All of them end now, before the first is waited for.
        self.threads.iter_mut().flatten().for_each(|thread| thread.jobs = None);
        self.ring_lock.iter().for_each(RingLockClient::release);
    }
}

impl VringController for Workers {
    fn before_blocking(&mut self) {
        self.replies.iter().for_each(|answers| answers.try_send());
    }

    fn prepare(&mut self, index: u16) {
        if let Err(error) = self.thread(index) {
            limited!(debug, "ring {index}: {error}");
        }
    }

    fn start(&mut self, index: u16, setup: VringConfig) -> Result<(), BackendError> {
        let take = |turn: &RingLockClient| {
            self.replies.iter().for_each(|answers| answers.try_send());
            turn.acquire(|| self.has_hung_up())
        };
        if self.ring_lock.as_ref().is_some_and(|turn| !take(turn)) {
            return Err(BackendError::OtherFrontEndRuns { index });
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_flags(flags).map_err(BackendError::system("make an eventfd"))?);
        let (orders, inbox) = unbounded();
        let (ready, is_ready) = bounded(1);
        setup.kick.iter().for_each(|kick| kick.add_waker(&wake));
        let (device, woken, postcopy) = (self.device.clone(), wake.clone(), setup.in_postcopy);
        let (ending, ended) = bounded(1);
        let serve = move || {
            let post = RingTask { index, device, commands: inbox, wake: woken };
            if let Some(iotlb) = setup.iotlb.clone() {
                // What is wrong with it is found out when its areas are there.
                let _ = ready.send(Ok(()));
                return post.run_translated(setup, &iotlb);
            }
            let (base, failed) = (setup.base, setup.error.clone());
            match post.start_worker(setup, None) {
                Err(error) => {
                    if postcopy {
                        limited!(warn, "{error}");
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
            // Nothing of the ring is left when it is said to have ended.
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

    fn set_enabled(&mut self, index: u16, yes: bool) {
        if let Some(handle) = self.handle(index) {
            let (done, is_done) = bounded(1);
            handle.send(WorkerCommand::SetEnabled(yes, done));
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

    fn invalidate(&mut self, iovas: &RangeInclusive<u64>) {
        let tell = |handle: &WorkerHandle| {
            let (done, is_done) = bounded(1);
            handle.send(WorkerCommand::Invalidate(iovas.clone(), done));
            is_done
        };
        let told: Vec<_> = self.running.iter().flatten().map(tell).collect();
        for is_done in told {
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
            // It may wait for a page that comes only if the front-end has its answer.
            if !handle.postcopy {
                let _ = self.wait_for_ack(&is_done);
            }
        }
    }
}
