//! Rate limit, shared by all channels of a migration.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::StreamError;
use super::cancel::CancelToken;
use crate::sys::lock;

/// A bandwidth limit shared by all channels of a migration. Clones share one limit.
#[derive(Clone)]
pub struct RateLimiter(Arc<Mutex<LeakyBucket>>);

struct LeakyBucket {
    /// Bytes per second; 0 for no limit.
    rate: u64,
    /// Bytes sent beyond what the rate has allowed so far.
    debt: f64,
    updated: Instant,
}

impl RateLimiter {
    /// Creates a limit of `rate` bytes per second; `None` for no limit.
    pub fn new(rate: Option<u64>) -> RateLimiter {
        let bucket = LeakyBucket { rate: rate.unwrap_or(0), debt: 0.0, updated: Instant::now() };
        RateLimiter(Arc::new(Mutex::new(bucket)))
    }

    /// Changes the limit to `rate` bytes per second, also for waiting writers; `None` for no limit.
    pub fn set(&self, rate: Option<u64>) {
        lock(&self.0).rate = rate.unwrap_or(0);
    }

    /// Maximum size of one write, bytes: a tenth of a second at the current rate.
    pub(super) fn max_write_bytes(&self) -> usize {
        match lock(&self.0).rate {
            0 => usize::MAX,
            rate => usize::try_from(rate / 10).unwrap_or(usize::MAX).max(4096),
        }
    }

    /// Waits until the rate allows a write, then accounts for `bytes`. Returns the time waited.
    pub(super) fn acquire(&self, bytes: usize, cancel: &CancelToken) -> Result<Duration, StreamError> {
        /// Waiting writers check for a new rate at this interval.
        const POLL_INTERVAL: Duration = Duration::from_millis(20);
        let mut begun = None;
        let waited = |begun: Option<Instant>| begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        loop {
            let wait = {
                let mut bucket = lock(&self.0);
                if bucket.rate == 0 {
                    bucket.debt = 0.0;
                    return Ok(waited(begun));
                }
                let rate = bucket.rate as f64;
                let now = Instant::now();
                bucket.debt = (bucket.debt - (now - bucket.updated).as_secs_f64() * rate).max(0.0);
                bucket.updated = now;
                if bucket.debt <= 0.0 {
                    bucket.debt = bytes as f64;
                    return Ok(waited(begun));
                }
                Duration::try_from_secs_f64(bucket.debt / rate).unwrap_or(POLL_INTERVAL)
            };
            begun.get_or_insert_with(Instant::now);
            cancel.wait(wait.min(POLL_INTERVAL))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_of_a_rate_limiter_share_one_limit() {
        let cancel = CancelToken::new().unwrap();
        let limiter = RateLimiter::new(Some(10 << 20));
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..10).for_each(|_| assert!(limiter.acquire(50 << 10, &cancel).is_ok())));
            }
        });
        // 1000 KiB at 10 MiB/s are 98 ms, of which the last piece is not waited for.
        assert!(start.elapsed() >= Duration::from_millis(90), "{:?}", start.elapsed());
    }

    #[test]
    fn lifting_the_limit_wakes_waiting_writers() {
        let cancel = CancelToken::new().unwrap();
        let limiter = RateLimiter::new(Some(1));
        limiter.acquire(1 << 30, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.acquire(1, &cancel));
            limiter.set(None);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn cancelling_wakes_waiting_writers() {
        let cancel = CancelToken::new().unwrap();
        let limiter = RateLimiter::new(Some(1));
        limiter.acquire(1 << 30, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limiter.acquire(1, &cancel));
            cancel.cancel();
            assert!(matches!(waiting.join().unwrap(), Err(StreamError::Cancelled)));
        });
    }
}
