//! Time limit for an operation that another thread can end.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

use super::error::MigrateError;

/// Calls a function after a time limit, unless it is dropped before.
pub(super) struct TimeLimit {
    limit: Duration,
    begun: Instant,
    passed: Arc<AtomicBool>,
    ended: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TimeLimit {
    /// Calls `then` on a separate thread when `limit` has passed. It must not block.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn start(limit: Duration, then: impl FnOnce() + Send + 'static) -> io::Result<TimeLimit> {
        let (begun, passed) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let (ended, end) = bounded(1);
        let thread_passed = passed.clone();
        let wait = move || {
            if let Err(RecvTimeoutError::Timeout) = end.recv_timeout(limit) {
                thread_passed.store(true, Ordering::SeqCst);
                then();
            }
        };
        let thread = std::thread::Builder::new().name("time limit".into()).spawn(wait)?;
        Ok(TimeLimit { limit, begun, passed, ended: Some(ended), thread: Some(thread) })
    }

    /// Checks the clock. A process that was stopped may run other threads before the function is called.
    ///
    /// # Errors
    /// [`MigrateError::SwitchoverTimeout`] with `doing`, if the time has passed.
    pub(super) fn check(&self, doing: &'static str) -> Result<(), MigrateError> {
        if self.begun.elapsed() < self.limit {
            return Ok(());
        }
        Err(MigrateError::SwitchoverTimeout { limit: self.limit, doing })
    }

    /// Returns true if the function was called.
    pub(super) fn has_passed(&self) -> bool {
        self.passed.load(Ordering::SeqCst)
    }
}

impl Drop for TimeLimit {
    fn drop(&mut self) {
        self.ended = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_calls_its_function_unless_it_is_dropped_first() {
        let (done, called) = bounded(1);
        let limit = TimeLimit::start(Duration::from_millis(1), move || done.send(()).unwrap()).unwrap();
        called.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(limit.has_passed());
        let limit = TimeLimit::start(Duration::from_secs(3600), || unreachable!()).unwrap();
        assert!(!limit.has_passed());
        drop(limit);
    }
    #[test]
    fn a_time_limit_check_uses_the_clock() {
        // Like a process that was stopped: the thread has not run yet.
        let past = |seconds| {
            let mut limit = TimeLimit::start(Duration::from_secs(3600), || unreachable!()).unwrap();
            limit.begun = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            limit.limit = Duration::from_secs(60);
            limit.check("waiting")
        };
        assert!(past(1).is_ok());
        assert!(matches!(past(61), Err(MigrateError::SwitchoverTimeout { .. })));
    }
}
