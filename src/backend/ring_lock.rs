//! Whose rings of a device run, where several front-ends are connected at the same time: as the source and the destination of
//! a migration on one host, of which the destination connects and restores while the source still has its rings.
#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait of a front-end for another one's rings to be stopped.
const PATIENCE: Duration = Duration::from_secs(5);
/// The interval at which it looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Lets one connection at a time run rings.
#[derive(Default)]
pub(super) struct Turns {
    holder: Mutex<Option<Holder>>,
    freed: Condvar,
}

struct Holder {
    number: u64,
    /// Its front-end has gone, and its rings end.
    leaving: bool,
}

/// A connection that may have its turn.
pub(super) struct Turn {
    turns: Arc<Turns>,
    number: u64,
}

impl Turn {
    /// `number` is different for every connection.
    pub(super) fn new(turns: &Arc<Turns>, number: u64) -> Turn {
        Turn { turns: turns.clone(), number }
    }

    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.turns.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other connection runs rings, and takes the turn: for some time if the other one is in use, and as long
    /// as it takes if it is about to end. False if that was in vain, or `over` says so.
    pub(super) fn take(&self, over: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut holder = self.holder();
        loop {
            match &*holder {
                Some(other) if other.number != self.number => {
                    if over() || !other.leaving && Instant::now() >= deadline {
                        return false;
                    }
                }
                _ => {
                    *holder = Some(Holder { number: self.number, leaving: false });
                    return true;
                }
            }
            let waited = self.turns.freed.wait_timeout(holder, LOOK_EVERY);
            holder = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets others run rings.
    pub(super) fn release(&self) {
        let mut holder = self.holder();
        if holder.as_ref().is_some_and(|holder| holder.number == self.number) {
            *holder = None;
            self.turns.freed.notify_all();
        }
    }

    /// Says that its rings are about to end.
    pub(super) fn leave(&self) {
        if let Some(holder) = self.holder().as_mut().filter(|holder| holder.number == self.number) {
            holder.leaving = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_its_turn_and_the_next_when_it_ends() {
        let turns = Arc::new(Turns::default());
        let (first, second) = (Turn::new(&turns, 1), Turn::new(&turns, 2));
        assert!(first.take(|| true) && first.take(|| true));
        second.release();
        assert!(!second.take(|| true), "it is the other's turn");
        first.leave();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| second.take(|| false));
            first.release();
            assert!(waiting.join().unwrap());
        });
        assert!(!first.take(|| true));
    }
}
