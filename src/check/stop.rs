//! The end of a check before its time, and with it of every wait.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Ends a check from another thread. Clones are one switch.
#[derive(Clone, Debug, Default)]
pub struct StopToken {
    since: Arc<OnceLock<Instant>>,
    /// The time after it is set for which waits go on.
    delay: Duration,
}

impl StopToken {
    /// Ends all waits of the check. What it has changed is put back, if the back-end serves that within seconds, and then
    /// it returns [`CheckError::Stopped`](super::CheckError::Stopped).
    pub fn set(&self) {
        // One that is set already stays as it is.
        let _ = self.since.set(Instant::now());
    }

    pub(super) fn is_set(&self) -> bool {
        self.since.get().is_some_and(|since| since.elapsed() >= self.delay)
    }

    /// The same switch for waits that may go on for `delay` after it is set.
    pub(super) fn delayed(&self, delay: Duration) -> StopToken {
        StopToken { since: self.since.clone(), delay }
    }

    /// The end of a wait that begins now and takes at most `time`.
    pub(super) fn deadline(&self, time: Duration) -> Deadline {
        Deadline { at: Instant::now() + time, stop: self.clone() }
    }
}

/// The end of a wait: a time, or the stop of the check.
#[derive(Clone, Debug)]
pub(super) struct Deadline {
    at: Instant,
    stop: StopToken,
}

impl Deadline {
    /// Returns true if the time is over.
    pub(super) fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// The time that is left.
    pub(super) fn left(&self) -> Duration {
        match self.stop.is_set() {
            true => Duration::ZERO,
            false => self.at.saturating_duration_since(Instant::now()),
        }
    }

    /// The end of a part of the wait.
    pub(super) fn within(&self, time: Duration) -> Deadline {
        Deadline { at: self.at.min(Instant::now() + time), stop: self.stop.clone() }
    }
}
