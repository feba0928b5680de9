//! Rate limit for log lines that a guest or a peer can cause at will: further lines are counted, not written.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::counters::counter;

/// Maximum number of lines from one call site within [`WINDOW`].
const MAX_LINES: u32 = 50;
/// Length of the period in which lines are counted.
const WINDOW: Duration = Duration::from_secs(10);

/// The limit of one call site.
pub(crate) struct LogLimit(Mutex<LogWindow>);

struct LogWindow {
    /// Beginning of the window; `None` before the first line.
    since: Option<Instant>,
    /// Lines written in this window.
    written: u32,
    /// Lines dropped since the last one that was written.
    dropped: u64,
}

impl LogLimit {
    pub(crate) const fn new() -> LogLimit {
        LogLimit(Mutex::new(LogWindow { since: None, written: 0, dropped: 0 }))
    }

    /// Returns the number of lines dropped before this one, or `None` if this line must be dropped too.
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
            (state.since, state.written) = (Some(now), 0);
        }
        if state.written == MAX_LINES {
            state.dropped = state.dropped.saturating_add(1);
            return None;
        }
        state.written += 1;
        Some(std::mem::take(&mut state.dropped))
    }
}

/// Logs a line at `level`, unless this call site has used up its [`LogLimit`].
macro_rules! limited {
    ($level:ident, $($line:tt)+) => {{
        static LIMIT: $crate::sys::log_limit::LogLimit = $crate::sys::log_limit::LogLimit::new();
        if let Some(dropped) = LIMIT.admit() {
            if dropped > 0 {
                tracing::$level!("{dropped} lines like the next one were not logged");
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
    fn a_flood_of_lines_is_cut_to_the_limit_and_the_dropped_ones_are_counted() {
        let (limit, start) = (LogLimit::new(), Instant::now());
        let flood = |at| (0..100_000).filter_map(|_| limit.admit_at(at)).collect::<Vec<_>>();
        assert_eq!(flood(start), vec![0; MAX_LINES as usize]);
        let next = flood(start + WINDOW);
        assert_eq!((next.len(), next.first()), (MAX_LINES as usize, Some(&(100_000 - u64::from(MAX_LINES)))));
        assert_eq!(limit.admit_at(start + WINDOW / 2), None);
    }
}
