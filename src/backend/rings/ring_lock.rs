//! Lock that lets one of several connections run rings.
//!
//! With several front-ends, as the source and the destination of a migration on one host, the destination connects and
//! restores while the source still runs its rings (rule R9.2).
#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Maximum wait for another connection to stop its rings.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which a waiting connection checks for cancellation.
const CANCEL_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The lock, held by at most one connection.
#[derive(Default)]
pub(crate) struct RingLock {
    holder: Mutex<Option<Holder>>,
    released: Condvar,
}

struct Holder {
    connection: u64,
    /// The front-end has hung up, and the rings are being stopped.
    releasing: bool,
}

/// A connection that can acquire the lock.
pub(crate) struct RingLockClient {
    lock: Arc<RingLock>,
    number: u64,
}

impl RingLockClient {
    /// Creates a client. `number` is unique to the connection.
    pub(crate) fn new(turns: &Arc<RingLock>, number: u64) -> RingLockClient {
        RingLockClient { lock: turns.clone(), number }
    }

    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.lock.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Acquires the lock. Waits up to `ACQUIRE_TIMEOUT` while another connection holds it, and without limit once that
    /// connection is stopping its rings. Returns false on timeout or once `cancelled` returns true.
    pub(crate) fn acquire(&self, cancelled: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + ACQUIRE_TIMEOUT;
        let mut holder = self.holder();
        loop {
            match &*holder {
                Some(other) if other.connection != self.number => {
                    if cancelled() || !other.releasing && Instant::now() >= deadline {
                        return false;
                    }
                }
                _ => {
                    *holder = Some(Holder { connection: self.number, releasing: false });
                    return true;
                }
            }
            let waited = self.lock.released.wait_timeout(holder, CANCEL_POLL_INTERVAL);
            holder = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Releases the lock if this connection holds it.
    pub(crate) fn release(&self) {
        let mut holder = self.holder();
        if holder.as_ref().is_some_and(|holder| holder.connection == self.number) {
            *holder = None;
            self.lock.released.notify_all();
        }
    }

    /// Marks the lock as about to be released.
    pub(crate) fn mark_releasing(&self) {
        if let Some(holder) = self.holder().as_mut().filter(|holder| holder.connection == self.number) {
            holder.releasing = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_holds_the_ring_lock_at_a_time() {
        let turns = Arc::new(RingLock::default());
        let (first, second) = (RingLockClient::new(&turns, 1), RingLockClient::new(&turns, 2));
        assert!(first.acquire(|| true) && first.acquire(|| true));
        second.release();
        assert!(!second.acquire(|| true), "it is the other's turn");
        first.mark_releasing();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| second.acquire(|| false));
            first.release();
            assert!(waiting.join().unwrap());
        });
        assert!(!first.acquire(|| true));
    }
}
