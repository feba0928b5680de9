//! Decides when to stop the guest, from the results of the rounds so far. No clocks and no I/O.
//!
//! The expected downtime is the time to send the pages left at the measured rate. Once it is within the limit, further
//! rounds are made only while each halves the number of pages left: they cost the guest nothing and shorten its stop.

use std::ops::AddAssign;
use std::time::Duration;

use crate::memory::LOG_PAGE;

/// Limits for the rounds of a migration.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConvergencePolicy {
    /// Longest acceptable downtime.
    pub downtime_limit: Duration,
    /// Maximum number of rounds. The migration then fails and the guest keeps running.
    pub max_rounds: u32,
}

impl Default for ConvergencePolicy {
    /// 300 ms, QEMU's default, and 100 rounds.
    fn default() -> ConvergencePolicy {
        ConvergencePolicy { downtime_limit: Duration::from_millis(300), max_rounds: 100 }
    }
}

impl ConvergencePolicy {
    /// Creates limits.
    pub fn new(downtime_limit: Duration, max_rounds: u32) -> ConvergencePolicy {
        ConvergencePolicy { downtime_limit, max_rounds }
    }
}

/// Result of one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundResult {
    /// Pages sent with data. Zero pages are almost free and would distort the rate.
    pub data_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Time spent on sending, without waits for the rate limit, which is lifted when the guest stops.
    pub duration: Duration,
    /// Pages dirtied meanwhile, which are left to send.
    pub left: u64,
}

/// Time spent in rounds, by activity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundTime {
    /// Sending, including compression.
    pub sending: Duration,
    /// Compression.
    pub compressing: Duration,
    /// Waiting for the rate limit, not part of `sending`.
    pub rate_limited: Duration,
}

impl RoundTime {
    /// Returns advice for the activity that takes most of the time, as a phrase that follows "or".
    pub fn remedy(&self) -> &'static str {
        if self.rate_limited > self.sending {
            "raise the bandwidth limit, which rounds wait for most of their time"
        } else if self.compressing > self.sending / 2 {
            "use a faster codec, or no codec, or more channels: compressing takes most of the time"
        } else {
            "give it more bandwidth"
        }
    }
}

impl AddAssign for RoundTime {
    fn add_assign(&mut self, other: RoundTime) {
        self.sending += other.sending;
        self.compressing += other.compressing;
        self.rate_limited += other.rate_limited;
    }
}

/// The next step after a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NextStep {
    /// Send the pages left while the guest runs.
    Round {
        /// Expected downtime if the guest were stopped now.
        expected: Duration,
        /// Number of consecutive rounds that left no fewer pages than the best round before them.
        without_progress: u32,
    },
    /// Stop the guest and send the pages left.
    Switchover {
        /// Expected downtime.
        expected: Duration,
    },
    /// The maximum number of rounds is reached.
    GiveUp {
        /// Expected downtime. A higher downtime limit would let the migration converge.
        expected: Duration,
    },
}

/// Number of rounds without progress after which the user is informed.
pub const STALL_ROUNDS: u32 = 5;

/// The rate is measured only in rounds of at least this many pages (8 MiB). Shorter rounds measure overhead.
const MIN_RATED_PAGES: u64 = 2048;
/// Assumed rate before the first measurement, pages per second: 10 MiB/s, less than most links provide.
const ASSUMED_PAGES_PER_SECOND: f64 = 2560.0;
/// Time for stopping devices, the last harvest and the handshake.
const SWITCHOVER_OVERHEAD: Duration = Duration::from_millis(2);
/// Expected downtime below which another round gains nothing.
const MIN_USEFUL_GAIN: Duration = Duration::from_millis(4);
/// Maximum number of rounds made only to shorten a downtime that is already within the limit.
const MAX_EXTRA_ROUNDS: u32 = 8;

/// State of the rounds so far.
///
/// ```
/// use std::time::Duration;
///
/// use vhost_migrate::migrate::{Convergence, ConvergencePolicy, NextStep, RoundResult};
///
/// // A guest of 1 GiB. Each round takes a second per GiB and leaves 1/64 of its pages dirty.
/// let mut convergence = Convergence::new(ConvergencePolicy::default(), 1 << 18);
/// let round = |pages: u64| RoundResult {
///     data_pages: pages,
///     zero_pages: 0,
///     duration: Duration::from_secs(1) * pages as u32 / (1 << 18),
///     left: pages / 64,
/// };
/// assert!(matches!(convergence.next_step(round(1 << 18)), NextStep::Round { .. }));
/// assert!(matches!(convergence.next_step(round(1 << 12)), NextStep::Switchover { .. }));
/// ```
#[derive(Clone, Debug)]
pub struct Convergence {
    policy: ConvergencePolicy,
    rounds: u32,
    extra_rounds: u32,
    pages_per_second: Option<f64>,
    /// Rate of a round that sent only zero pages; used until a round has sent data.
    zeros_per_second: Option<f64>,
    rate_is_measured: bool,
    previous_left: u64,
    smallest_left: u64,
    without_progress: u32,
}

impl Convergence {
    /// Creates the state before the first round of a guest with `pages` pages.
    pub fn new(policy: ConvergencePolicy, pages: u64) -> Convergence {
        Convergence {
            policy,
            rounds: 0,
            extra_rounds: 0,
            pages_per_second: None,
            zeros_per_second: None,
            rate_is_measured: false,
            previous_left: pages,
            smallest_left: pages,
            without_progress: 0,
        }
    }

    /// Returns the measured rate of data pages in bytes per second, if known.
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.pages_per_second.map(|pages| pages * LOG_PAGE as f64)
    }

    /// Adds a completed round and returns the next step.
    pub fn next_step(&mut self, round: RoundResult) -> NextStep {
        self.rounds += 1;
        self.update_rate(round);
        let expected = self.expected_downtime(round.left);
        let halved = round.left <= self.previous_left / 2;
        if round.left < self.smallest_left {
            self.smallest_left = round.left;
            self.without_progress = 0;
        } else {
            self.without_progress += 1;
        }
        self.previous_left = round.left;
        if expected <= self.policy.downtime_limit {
            let pays = halved && expected > MIN_USEFUL_GAIN && self.extra_rounds < MAX_EXTRA_ROUNDS;
            if !pays {
                return NextStep::Switchover { expected };
            }
            self.extra_rounds += 1;
        }
        if self.rounds >= self.policy.max_rounds {
            return NextStep::GiveUp { expected };
        }
        NextStep::Round { expected, without_progress: self.without_progress }
    }

    fn update_rate(&mut self, round: RoundResult) {
        let long = round.data_pages >= MIN_RATED_PAGES;
        let per_second = |pages: u64| pages as f64 / round.duration.as_secs_f64().max(1e-6);
        // The first round has no information about rewritten pages.
        if round.data_pages == 0 && round.zero_pages > 0 && self.rounds > 1 {
            self.zeros_per_second = Some(per_second(round.zero_pages));
        }
        if round.data_pages == 0 || (self.rate_is_measured && !long) {
            return;
        }
        let now = per_second(round.data_pages);
        // The latest long round has a weight of one half, because the load on both hosts changes.
        self.pages_per_second = Some(match self.pages_per_second {
            Some(before) if self.rate_is_measured => (before + now) / 2.0,
            _ => now,
        });
        self.rate_is_measured = long;
    }

    fn expected_downtime(&self, left: u64) -> Duration {
        let rate = self.pages_per_second.or(self.zeros_per_second).unwrap_or(ASSUMED_PAGES_PER_SECOND);
        SWITCHOVER_OVERHEAD + Duration::try_from_secs_f64(left as f64 / rate).unwrap_or(Duration::MAX / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn policy(downtime_ms: u32) -> ConvergencePolicy {
        ConvergencePolicy { downtime_limit: MS * downtime_ms, max_rounds: 20 }
    }

    /// A round of data pages.
    fn sent(data_pages: u64, duration: Duration, left: u64) -> RoundResult {
        RoundResult { data_pages, zero_pages: 0, duration, left }
    }

    #[test]
    fn the_remedy_addresses_the_largest_share_of_round_time() {
        let spent = |sending, coding, waiting| RoundTime {
            sending: MS * sending,
            compressing: MS * coding,
            rate_limited: MS * waiting,
        };
        for (spent, words) in [
            (spent(100, 0, 0), "more bandwidth"),
            (spent(100, 40, 90), "more bandwidth"),
            (spent(100, 60, 0), "a faster codec"),
            (spent(100, 60, 900), "the bandwidth limit"),
        ] {
            assert!(spent.remedy().contains(words), "{spent:?}");
        }
    }

    #[test]
    fn a_short_round_sets_the_rate_only_until_a_long_round() {
        let mut rounds = Convergence::new(policy(100), 1 << 20);
        let mut rate_after = |pages: u64| {
            let _ = rounds.next_step(sent(pages, MS * 1000, 1 << 20));
            rounds.bytes_per_second().unwrap() / LOG_PAGE as f64
        };
        assert_eq!(
            [100, MIN_RATED_PAGES, 100, 3 * MIN_RATED_PAGES].map(&mut rate_after),
            [100.0, 2048.0, 2048.0, 4096.0]
        );
    }

    #[test]
    fn an_idle_guest_is_stopped_after_the_first_round() {
        let mut rounds = Convergence::new(policy(300), 262_144);
        let first = sent(200_000, MS * 400, 0);
        assert_eq!(rounds.next_step(first), NextStep::Switchover { expected: SWITCHOVER_OVERHEAD });
    }

    #[test]
    fn rounds_continue_below_the_limit_while_each_halves_the_pages_left() {
        let mut rounds = Convergence::new(policy(300), 262_144);
        // 500 pages a millisecond: 25 600 left are 51 ms, 2 560 left 5 ms, 256 left under one.
        for (pages, left) in [(262_144, 25_600), (25_600, 2_560)] {
            let next = rounds.next_step(sent(pages, MS * (pages as u32 / 500), left));
            assert!(matches!(next, NextStep::Round { .. }), "{left}: {next:?}");
        }
        let next = rounds.next_step(sent(2_560, MS * 5, 256));
        assert!(matches!(next, NextStep::Switchover { expected } if expected < MS * 4), "{next:?}");
    }

    #[test]
    fn pages_that_no_longer_shrink_are_sent_in_the_switchover_within_the_limit() {
        let mut rounds = Convergence::new(policy(300), 100_000);
        rounds.next_step(sent(100_000, MS * 1000, 20_000));
        let next = rounds.next_step(sent(20_000, MS * 200, 19_000));
        assert!(matches!(next, NextStep::Switchover { expected } if expected > MS * 150), "{next:?}");
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_link_stalls_until_give_up() {
        let mut rounds = Convergence::new(policy(50), 100_000);
        let round = sent(100_000, MS * 1000, 100_000);
        for n in 1..20 {
            match rounds.next_step(round) {
                NextStep::Round { without_progress, .. } => assert_eq!(without_progress, n),
                other => panic!("round {n}: {other:?}"),
            }
        }
        assert!(matches!(rounds.next_step(round), NextStep::GiveUp { expected } if expected >= MS * 1000));
    }

    #[test]
    fn a_tiny_round_does_not_change_the_measured_rate() {
        let mut rounds = Convergence::new(policy(1), 100_000);
        rounds.next_step(sent(100_000, MS * 100, 50_000));
        let before = rounds.bytes_per_second();
        assert!(before.is_some_and(|rate| (rate / (1e6 * LOG_PAGE as f64) - 1.0).abs() < 1e-9), "{before:?}");
        rounds.next_step(sent(10, MS * 10, 50_000));
        assert_eq!(rounds.bytes_per_second(), before);
    }

    #[test]
    fn a_round_of_zero_pages_leaves_the_rate_unknown() {
        let mut rounds = Convergence::new(policy(300), 100_000);
        let next = rounds.next_step(sent(0, Duration::ZERO, 0));
        assert_eq!(next, NextStep::Switchover { expected: SWITCHOVER_OVERHEAD });
        assert_eq!(rounds.bytes_per_second(), None);
    }

    #[test]
    fn an_unknown_rate_is_assumed_to_be_slow() {
        let mut rounds = Convergence::new(policy(300), 1 << 20);
        // A guest of 4 GiB that was all zero has written all of it meanwhile.
        let zeros = |left| RoundResult { data_pages: 0, zero_pages: 1 << 20, duration: MS * 130, left };
        let next = rounds.next_step(zeros(1 << 20));
        assert!(matches!(next, NextStep::Round { expected, .. } if expected > MS * 100_000), "{next:?}");
        // A handful of pages is sent in time over any link.
        let mut rounds = Convergence::new(policy(300), 1 << 20);
        assert!(matches!(rounds.next_step(zeros(4)), NextStep::Switchover { expected } if expected < MS * 4));
    }

    #[test]
    fn an_empty_round_does_not_change_the_rate() {
        let mut rounds = Convergence::new(policy(1), 1 << 20);
        for _ in 0..2 {
            let next = rounds.next_step(sent(0, MS * 10, 8));
            assert!(matches!(next, NextStep::Round { expected, .. } if expected < MS * 6), "{next:?}");
        }
    }

    #[test]
    fn a_guest_that_writes_only_zeros_converges() {
        let mut rounds = Convergence::new(policy(300), 100_000);
        let zeros = RoundResult { data_pages: 0, zero_pages: 100_000, duration: MS * 20, left: 100_000 };
        assert!(matches!(rounds.next_step(zeros), NextStep::Round { .. }));
        assert!(matches!(rounds.next_step(zeros), NextStep::Switchover { expected } if expected < MS * 30));
        // After a round with data, its rate applies.
        let mut rounds = Convergence::new(policy(300), 100_000);
        rounds.next_step(sent(10_000, MS * 1000, 100_000));
        assert!(matches!(rounds.next_step(zeros), NextStep::Round { expected, .. } if expected > MS * 9000));
    }
}
