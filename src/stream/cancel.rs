//! Cancellation of a migration from another thread, and waits that it ends.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::StreamError;

use crate::sys::lock;

/// Cancels a migration from any thread: every wait ends. It cannot be reset. Clones share one state.
#[derive(Clone)]
pub struct CancelToken(Arc<CancelState>);

struct CancelState {
    cancelled: AtomicBool,
    event: EventFd,
    targets: Mutex<CancelTargets>,
}

enum CancelTargets {
    Armed(Vec<Weak<dyn CancelTarget>>),
    Disarmed,
}

/// Time for a cancelled target to end by itself: it completes the current frame and sends the reason.
const GRACE_PERIOD: Duration = Duration::from_millis(500);

/// Something that may block on a peer and can be cancelled from another thread.
pub(super) trait CancelTarget: Send + Sync {
    fn interrupt(&self);

    /// Called after the grace period.
    fn force_end(&self) {}
}

/// A callback registered with [`CancelToken::on_cancel`]. Dropping it removes the callback.
pub struct CancelCallback {
    call: Option<Arc<dyn CancelTarget>>,
    cancel: CancelToken,
}

impl Drop for CancelCallback {
    /// Removes the callback, and waits for a call under way.
    fn drop(&mut self) {
        self.call = None;
        // Callbacks run with this lock held.
        drop(lock(&self.cancel.0.targets));
    }
}

struct CallbackTarget<F>(F);

impl<F: Fn() + Send + Sync> CancelTarget for CallbackTarget<F> {
    fn interrupt(&self) {
        (self.0)();
    }
}

impl CancelToken {
    /// Creates a token that is not cancelled.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> Result<CancelToken, StreamError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|error| StreamError::Io(error.into()))?;
        let inner = CancelState {
            cancelled: AtomicBool::new(false),
            event,
            targets: Mutex::new(CancelTargets::Armed(Vec::new())),
        };
        Ok(CancelToken(Arc::new(inner)))
    }

    /// Ends every connect, accept, read, write and wait of the channels that use this token, now and later. They return
    /// [`StreamError::Cancelled`]. A frame that is being written to a socket is completed if the peer reads it within
    /// half a second. Returns false and does nothing after [`disarm`](Self::disarm).
    pub fn cancel(&self) -> bool {
        let CancelTargets::Armed(targets) = &mut *lock(&self.0.targets) else { return false };
        self.0.cancelled.store(true, Ordering::SeqCst);
        // One increment per call cannot overflow the counter.
        let _ = self.0.event.write(1);
        let targets = std::mem::take(targets);
        let interrupt =
            |target: &Weak<dyn CancelTarget>| target.upgrade().inspect(|target| target.interrupt()).is_some();
        let left: Arc<[_]> = targets.into_iter().filter(interrupt).collect();
        if left.is_empty() {
            return true;
        }
        let end = |left: &[Weak<dyn CancelTarget>]| {
            left.iter().filter_map(Weak::upgrade).for_each(|target| target.force_end())
        };
        let targets_to_end = left.clone();
        let later = move || {
            std::thread::sleep(GRACE_PERIOD);
            end(&targets_to_end);
        };
        if std::thread::Builder::new().name("cancel".into()).spawn(later).is_err() {
            end(&left);
        }
        true
    }

    /// Disables later calls of [`cancel`](Self::cancel), so that the following step is not interrupted.
    ///
    /// # Errors
    /// `Cancelled` if the token was cancelled before.
    pub fn disarm(&self) -> Result<(), StreamError> {
        let mut targets = lock(&self.0.targets);
        self.check()?;
        *targets = CancelTargets::Disarmed;
        Ok(())
    }

    /// Returns true if [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Returns an error if the token was cancelled.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn check(&self) -> Result<(), StreamError> {
        if self.is_cancelled() { Err(StreamError::Cancelled) } else { Ok(()) }
    }

    /// Waits for `time` or until cancelled.
    ///
    /// # Errors
    /// `Cancelled`, immediately on cancellation.
    pub fn wait(&self, time: Duration) -> Result<(), StreamError> {
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLIN)];
        poll_until(&mut fds, Some(Instant::now() + time))?;
        self.check()
    }

    /// Calls `then` on cancellation, or immediately if already cancelled. Dropping the returned value removes the
    /// callback. `then` must not block.
    pub fn on_cancel(&self, then: impl Fn() + Send + Sync + 'static) -> CancelCallback {
        let call: Arc<dyn CancelTarget> = Arc::new(CallbackTarget(then));
        self.register(Arc::downgrade(&call));
        CancelCallback { call: Some(call), cancel: self.clone() }
    }

    /// Returns a descriptor that is readable after cancellation.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }

    pub(super) fn register(&self, target: Weak<dyn CancelTarget>) {
        if let CancelTargets::Armed(targets) = &mut *lock(&self.0.targets) {
            targets.retain(|target| target.strong_count() > 0);
            targets.push(target.clone());
        }
        if self.is_cancelled()
            && let Some(target) = target.upgrade()
        {
            target.interrupt();
        }
    }
}

/// Polls until a descriptor is ready or the deadline has passed. Returns true if one is ready.
pub(super) fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> Result<bool, StreamError> {
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                // Rounded up: polling again after an early return would spin.
                let millis = left.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
                PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(fds, timeout) {
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(StreamError::Io(error.into())),
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() < deadline) => {}
            Ok(ready) => return Ok(ready > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_callback_runs_once_at_once_if_late_and_never_after_drop() {
        let (cancel, called) = (CancelToken::new().unwrap(), Arc::new(std::sync::atomic::AtomicU32::new(0)));
        let count = || {
            let called = called.clone();
            cancel.on_cancel(move || {
                called.fetch_add(1, Ordering::SeqCst);
            })
        };
        let _kept = count();
        drop(count());
        cancel.cancel();
        cancel.cancel();
        assert_eq!(called.load(Ordering::SeqCst), 1);
        drop(count());
        assert_eq!(called.load(Ordering::SeqCst), 2);
    }
}
