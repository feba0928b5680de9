//! Whose rings of a device run, where several front-ends are connected at the same time: as the source and the destination of
//! a migration on one host, of which the destination connects and restores while the source still has its rings.
#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait of a front-end for another one's rings to be stopped.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval at which it looks whether it is still wanted.
const CANCEL_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Lets one connection at a time run rings.
#[derive(Default)]
pub(super) struct RingLock {
    holder: Mutex<Option<Holder>>,
    released: Condvar,
}

struct Holder {
    connection: u64,
    /// Its front-end has gone, and its rings end.
    releasing: bool,
}

/// A connection that may have its turn.
pub(super) struct RingLockClient {
    lock: Arc<RingLock>,
    number: u64,
}

impl RingLockClient {
    /// `number` is different for every connection.
    pub(super) fn new(turns: &Arc<RingLock>, number: u64) -> RingLockClient {
        RingLockClient { lock: turns.clone(), number }
    }

    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.lock.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other connection runs rings, and takes the turn: for some time if the other one is in use, and as long
    /// as it takes if it is about to end. False if that was in vain, or `over` says so.
    pub(super) fn acquire(&self, over: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + ACQUIRE_TIMEOUT;
        let mut holder = self.holder();
        loop {
            match &*holder {
                Some(other) if other.connection != self.number => {
                    if over() || !other.releasing && Instant::now() >= deadline {
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

    /// Lets others run rings.
    pub(super) fn release(&self) {
        let mut holder = self.holder();
        if holder.as_ref().is_some_and(|holder| holder.connection == self.number) {
            *holder = None;
            self.lock.released.notify_all();
        }
    }

    /// Says that its rings are about to end.
    pub(super) fn mark_releasing(&self) {
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
