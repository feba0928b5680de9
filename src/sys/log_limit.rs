//! Lines for the log that a guest or a peer can cause at will: a bounded number of each, and the rest are counted.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::counters::counter;

/// Most lines of one place in the code within [`WINDOW`].
const MAX_LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(10);

/// The lines of one place in the code.
pub(crate) struct LogLimit(Mutex<LogWindow>);

struct LogWindow {
    /// Beginning of the window, if there was a line.
    since: Option<Instant>,
    said: u32,
    /// Not said since the last line.
    left_out: u64,
}

impl LogLimit {
    pub(crate) const fn new() -> LogLimit {
        LogLimit(Mutex::new(LogWindow { since: None, said: 0, left_out: 0 }))
    }

    /// Returns how many lines were left out before this one, or `None` if this one is left out too.
    pub(crate) fn admit(&self) -> Option<u64> {
        let admitted = self.admit_at(Instant::now());
        if admitted.is_none() {
            counter!("vhost_log_lines_left_out_total").increment(1);
        }
        admitted
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.since.is_none_or(|since| now.duration_since(since) >= WINDOW) {
            (state.since, state.said) = (Some(now), 0);
        }
        if state.said == MAX_LINES {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.said += 1;
        Some(std::mem::take(&mut state.left_out))
    }
}

/// A line for the log at `level`, unless too many came from this place of late.
macro_rules! limited {
    ($level:ident, $($line:tt)+) => {{
        static LIMIT: $crate::sys::log_limit::LogLimit = $crate::sys::log_limit::LogLimit::new();
        if let Some(left_out) = LIMIT.admit() {
            if left_out > 0 {
                tracing::$level!("{left_out} lines like the next were left out");
            }
            tracing::$level!($($line)+);
        }
    }};
}

pub(crate) use limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let (lines, start) = (LogLimit::new(), Instant::now());
        let flood = |at| (0..100_000).filter_map(|_| lines.admit_at(at)).collect::<Vec<_>>();
        assert_eq!(flood(start), vec![0; MAX_LINES as usize]);
        let next = flood(start + WINDOW);
        assert_eq!((next.len(), next.first()), (MAX_LINES as usize, Some(&(100_000 - u64::from(MAX_LINES)))));
        assert_eq!(lines.admit_at(start + WINDOW / 2), None);
    }
}
