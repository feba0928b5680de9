//! Early end of a check and of all its waits.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Ends a check from another thread. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct StopToken {
    since: Arc<OnceLock<Instant>>,
    /// Time after `set` for which waits continue.
    delay: Duration,
}

impl StopToken {
    /// Ends all waits of the check. Changes are restored if the back-end does that within seconds. The check then
    /// returns [`CheckError::Stopped`](super::CheckError::Stopped).
    pub fn set(&self) {
        // An error means that the token is set already.
        let _ = self.since.set(Instant::now());
    }

    pub(super) fn is_set(&self) -> bool {
        self.since.get().is_some_and(|since| since.elapsed() >= self.delay)
    }

    /// Returns the same token for waits that may continue for `delay` after it is set.
    pub(super) fn delayed(&self, delay: Duration) -> StopToken {
        StopToken { since: self.since.clone(), delay }
    }

    /// Returns the deadline of a wait that begins now and takes at most `time`.
    pub(super) fn deadline(&self, time: Duration) -> Deadline {
        Deadline { at: Instant::now() + time, stop: self.clone() }
    }
}

/// End of a wait: a point in time, or the stop of the check.
#[derive(Clone, Debug)]
pub(super) struct Deadline {
    at: Instant,
    stop: StopToken,
}

impl Deadline {
    /// Returns true if the wait is over.
    pub(super) fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// Returns the remaining time.
    pub(super) fn left(&self) -> Duration {
        match self.stop.is_set() {
            true => Duration::ZERO,
            false => self.at.saturating_duration_since(Instant::now()),
        }
    }

    /// Returns the deadline of a part of the wait.
    pub(super) fn within(&self, time: Duration) -> Deadline {
        Deadline { at: self.at.min(Instant::now() + time), stop: self.stop.clone() }
    }
}
