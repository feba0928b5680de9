//! Dirty rates of a guest by source, and the forecast of a migration at such a rate.
//!
//! Pure arithmetic over harvested page sets: [`RateMeter`] measures, [`forecast`] predicts. Not here but in `migrate`:
//! when to harvest, and the handling of a guest that does not converge.

use std::time::Duration;

use super::page_set::PageSet;
use super::source::LogQuality;
use crate::memory::LOG_PAGE;

/// Number of rounds after which a forecast gives up, also if every round is a little smaller than the one before.
const MAX_ROUNDS: u32 = 1000;

/// The dirty rate of memory over a period.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct DirtyRate {
    /// Length of the period, seconds.
    pub seconds: f64,
    /// Number of measured intervals. A page that is written several times within an interval counts once.
    pub intervals: u32,
    /// Distinct pages dirtied per interval by any source, as pages per second.
    pub pages_per_s: f64,
    /// `pages_per_s` in bytes of guest memory per second.
    pub bytes_per_s: f64,
    /// Distinct bytes dirtied in the whole period: the working set of writes.
    pub working_set_bytes: u64,
    /// The rates by source. A page that two sources wrote counts for both.
    pub sources: Vec<SourceRate>,
    /// Quality of the least exact source.
    #[cfg_attr(feature = "serde", serde(default))]
    pub log_quality: LogQuality,
}

/// The dirty rate of one device or CPU, see [`DirtyRate`].
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct SourceRate {
    /// The name of the source.
    pub name: String,
    /// Distinct pages dirtied per interval, as pages per second.
    pub pages_per_s: f64,
    /// `pages_per_s` in bytes of guest memory per second.
    pub bytes_per_s: f64,
    /// Distinct bytes dirtied in the whole period.
    pub working_set_bytes: u64,
    /// Quality of the source's log.
    #[cfg_attr(feature = "serde", serde(default))]
    pub log_quality: LogQuality,
}

/// Computes a dirty rate from the pages that the sources report interval by interval.
#[derive(Debug, Default)]
pub struct RateMeter {
    elapsed: Duration,
    intervals: u32,
    all: PageCount,
    sources: Vec<(String, PageCount)>,
    /// The pages of the last interval, of all sources.
    interval: PageSet,
}

#[derive(Debug, Default)]
struct PageCount {
    pages: u64,
    working_set: PageSet,
}

impl PageCount {
    fn add(&mut self, pages: &PageSet) {
        self.pages += pages.len();
        self.working_set.union(pages);
    }

    fn rate(&self, name: &str, elapsed: Duration) -> SourceRate {
        let pages_per_s = if elapsed.is_zero() { 0.0 } else { self.pages as f64 / elapsed.as_secs_f64() };
        SourceRate {
            name: name.to_owned(),
            pages_per_s,
            bytes_per_s: pages_per_s * LOG_PAGE as f64,
            working_set_bytes: self.working_set.len() * LOG_PAGE,
            log_quality: LogQuality::Exact,
        }
    }
}

impl RateMeter {
    /// A meter without intervals.
    pub fn new() -> RateMeter {
        RateMeter::default()
    }

    /// Adds one interval of length `elapsed`, with the name of each source and the pages that it dirtied.
    pub fn interval<'a>(&mut self, elapsed: Duration, sources: impl IntoIterator<Item = (&'a str, &'a PageSet)>) {
        self.elapsed += elapsed;
        self.intervals += 1;
        self.interval.clear();
        for (name, pages) in sources {
            self.interval.union(pages);
            match self.sources.iter_mut().find(|(known, _)| known == name) {
                Some((_, count)) => count.add(pages),
                None => {
                    let mut count = PageCount::default();
                    count.add(pages);
                    self.sources.push((name.to_owned(), count));
                }
            }
        }
        self.all.add(&self.interval);
    }

    /// The rate over all intervals so far. The qualities of logs are [`LogQuality::Exact`].
    pub fn rate(&self) -> DirtyRate {
        let all = self.all.rate("", self.elapsed);
        DirtyRate {
            seconds: self.elapsed.as_secs_f64(),
            intervals: self.intervals,
            pages_per_s: all.pages_per_s,
            bytes_per_s: all.bytes_per_s,
            working_set_bytes: all.working_set_bytes,
            sources: self.sources.iter().map(|(name, count)| count.rate(name, self.elapsed)).collect(),
            log_quality: LogQuality::Exact,
        }
    }
}

/// The properties of a guest's dirty rate that a forecast uses.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DirtyModel {
    /// Bytes newly dirtied per second.
    pub bytes_per_s: f64,
    /// Distinct bytes that are ever dirtied. A round never leaves more than these dirty.
    pub working_set_bytes: u64,
}

impl From<&DirtyRate> for DirtyModel {
    fn from(rate: &DirtyRate) -> DirtyModel {
        DirtyModel { bytes_per_s: rate.bytes_per_s, working_set_bytes: rate.working_set_bytes }
    }
}

/// The predicted course of a pre-copy migration, see [`forecast`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Forecast {
    /// True if the rest becomes small enough to be sent within the allowed downtime.
    pub converges: bool,
    /// Number of rounds sent while the guest runs. Without convergence: until another round would not leave less.
    pub rounds: u32,
    /// Time from the first byte to the last, downtime included, milliseconds.
    pub total_ms: f64,
    /// Downtime of the guest if it is stopped after those rounds, milliseconds.
    pub downtime_ms: f64,
    /// Bytes of guest memory sent, those sent in the downtime included.
    pub bytes: u64,
}

/// Predicts a pre-copy migration of `guest_bytes` at `bandwidth` bytes of guest memory per second, which stops the
/// guest when the rest can be sent in `downtime_ms`.
///
/// Round 0 sends `v(0) = guest_bytes`. A round of `v(i)` bytes takes `v(i) / bandwidth` seconds and leaves `v(i + 1) =
/// min(bytes_per_s · v(i) / bandwidth, working_set_bytes, guest_bytes)` dirty: a geometric series that the working set
/// limits. The migration converges at the first `v(n)`, `n ≥ 1`, that is sent in `downtime_ms` (less than one page
/// counts as 0). It does not converge if `v(i + 1) ≥ v(i)` comes first, or after 1000 rounds. With a bandwidth that is
/// not positive the migration does not converge and all figures are 0.
///
/// ```
/// use vhost_migrate::dirty::{DirtyModel, forecast};
///
/// // A guest of 4 GiB, which dirties 100 MB/s, over a link of 1 GB/s.
/// let guest = DirtyModel { bytes_per_s: 100e6, working_set_bytes: 1 << 30 };
/// let forecast = forecast(&guest, 1e9, 50.0, 4 << 30);
/// assert!(forecast.converges && forecast.downtime_ms < 50.0);
/// assert_eq!(forecast.rounds, 2);
/// ```
pub fn forecast(model: &DirtyModel, bandwidth: f64, downtime_ms: f64, guest_bytes: u64) -> Forecast {
    if bandwidth.is_nan() || bandwidth <= 0.0 {
        return Forecast { converges: false, rounds: 0, total_ms: 0.0, downtime_ms: 0.0, bytes: 0 };
    }
    let ms = |bytes: f64| bytes / bandwidth * 1000.0;
    let cap = (model.working_set_bytes.min(guest_bytes)) as f64;
    let left_by = |sent: f64| {
        let dirty = (model.bytes_per_s.max(0.0) / bandwidth * sent).min(cap);
        if dirty < LOG_PAGE as f64 { 0.0 } else { dirty }
    };
    let (mut sent, mut rounds, mut round) = (0.0, 0, guest_bytes as f64);
    let (converges, rest) = loop {
        sent += round;
        rounds += 1;
        let rest = left_by(round);
        if ms(rest) <= downtime_ms.max(0.0) {
            break (true, rest);
        }
        if rest >= round || rounds == MAX_ROUNDS {
            break (false, rest);
        }
        round = rest;
    };
    let bytes = sent + rest;
    Forecast { converges, rounds, total_ms: ms(bytes), downtime_ms: ms(rest), bytes: bytes as u64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn model(bytes_per_s: u64, working_set_bytes: u64) -> DirtyModel {
        DirtyModel { bytes_per_s: bytes_per_s as f64, working_set_bytes }
    }

    #[test]
    fn a_forecast_equals_the_geometric_series_computed_by_hand() {
        // 1 GiB at 1 GiB/s, dirtied at 256 MiB/s: rounds of 1024, 256, 64, 16 MiB leave 4 MiB, 3.9 ms.
        let forecast = forecast(&model(256 * MIB, GIB), GIB as f64, 5.0, GIB);
        assert!(forecast.converges);
        assert_eq!(forecast.rounds, 4);
        assert_eq!(forecast.bytes, (1024 + 256 + 64 + 16 + 4) * MIB);
        assert_eq!(forecast.downtime_ms, 4.0 / 1024.0 * 1000.0);
        assert_eq!(forecast.total_ms, 1364.0 / 1024.0 * 1000.0);
    }

    #[test]
    fn a_round_leaves_at_most_the_working_set() {
        // Dirtied twice as fast as sent, but only 32 MiB of it: 31.25 ms in any case.
        let model = model(2 * GIB, 32 * MIB);
        let enough = forecast(&model, GIB as f64, 31.25, 16 * GIB);
        assert_eq!((enough.converges, enough.rounds, enough.bytes), (true, 1, 16 * GIB + 32 * MIB));
        assert_eq!(enough.downtime_ms, 31.25);
        let short = forecast(&model, GIB as f64, 31.0, 16 * GIB);
        // The second round leaves as much as the first.
        assert_eq!((short.converges, short.rounds, short.bytes), (false, 2, 16 * GIB + 64 * MIB));
        assert_eq!(short.downtime_ms, 31.25);
    }

    #[test]
    fn a_guest_that_dirties_memory_at_the_bandwidth_does_not_converge() {
        let stuck = forecast(&model(GIB, 64 * GIB), GIB as f64, 300.0, 2 * GIB);
        assert_eq!((stuck.converges, stuck.rounds), (false, 1));
        assert_eq!((stuck.downtime_ms, stuck.total_ms), (2000.0, 4000.0));
    }

    #[test]
    fn an_idle_guest_takes_one_round_and_no_downtime() {
        for idle in [model(0, 0), model(0, GIB), model(1000, GIB)] {
            let idle = forecast(&idle, GIB as f64, 0.0, GIB);
            assert_eq!((idle.converges, idle.rounds, idle.downtime_ms, idle.total_ms), (true, 1, 0.0, 1000.0));
        }
    }

    #[test]
    fn a_migration_without_bandwidth_does_not_converge() {
        for bandwidth in [0.0, -1.0, f64::NAN] {
            let never = forecast(&model(1, GIB), bandwidth, 300.0, GIB);
            assert!(!never.converges && never.rounds == 0 && never.bytes == 0);
        }
    }

    proptest! {
        #[test]
        fn more_bandwidth_is_never_worse(
            rate in 0..4 * GIB, working_set in 0..16 * GIB, guest in 1..16 * GIB,
            bandwidth in MIB..8 * GIB, more in 1..8 * GIB, downtime in 0.0..1000.0f64,
        ) {
            let model = model(rate, working_set);
            let slow = forecast(&model, bandwidth as f64, downtime, guest);
            let fast = forecast(&model, (bandwidth + more) as f64, downtime, guest);
            prop_assert!(fast.converges || !slow.converges);
            if slow.converges {
                prop_assert!(fast.rounds <= slow.rounds && fast.bytes <= slow.bytes && fast.total_ms <= slow.total_ms);
            }
        }

        #[test]
        fn more_downtime_and_fewer_writes_are_never_worse(
            rate in 0..4 * GIB, less in 0..GIB, working_set in 0..16 * GIB, guest in 1..16 * GIB,
            bandwidth in MIB..8 * GIB, downtime in 0.0..1000.0f64, longer in 0.0..1000.0f64,
        ) {
            let busy = forecast(&model(rate, working_set), bandwidth as f64, downtime, guest);
            let patient = forecast(&model(rate, working_set), bandwidth as f64, downtime + longer, guest);
            let calm = forecast(&model(rate.saturating_sub(less), working_set), bandwidth as f64, downtime, guest);
            for better in [patient, calm] {
                prop_assert!(better.converges || !busy.converges);
                prop_assert!(!busy.converges || better.rounds <= busy.rounds && better.bytes <= busy.bytes);
            }
        }

        #[test]
        fn the_figures_of_a_forecast_are_consistent(
            rate in 0..4 * GIB, working_set in 0..16 * GIB, guest in 1..16 * GIB,
            bandwidth in MIB..8 * GIB, downtime in 0.0..1000.0f64,
        ) {
            let it = forecast(&model(rate, working_set), bandwidth as f64, downtime, guest);
            prop_assert_eq!(it.converges, it.downtime_ms <= downtime);
            prop_assert!(it.rounds >= 1 && it.bytes >= guest && it.total_ms >= it.downtime_ms);
            prop_assert!(it.downtime_ms <= working_set.min(guest) as f64 / bandwidth as f64 * 1000.0);
        }
    }

    #[test]
    fn pages_are_counted_once_per_interval_and_source() {
        let set = |range: std::ops::Range<u64>| {
            let mut set = PageSet::new(1000);
            set.insert_range(range.into());
            set
        };
        let mut meter = RateMeter::new();
        assert_eq!(meter.rate(), DirtyRate::default());
        meter.interval(Duration::from_millis(500), [("disk", &set(0..10)), ("cpu", &set(5..25))]);
        meter.interval(Duration::from_millis(1500), [("cpu", &set(20..30)), ("disk", &set(0..0))]);
        let rate = meter.rate();
        assert_eq!((rate.seconds, rate.intervals), (2.0, 2));
        assert_eq!(rate.pages_per_s, (25.0 + 10.0) / 2.0);
        assert_eq!(rate.bytes_per_s, rate.pages_per_s * 4096.0);
        assert_eq!(rate.working_set_bytes, 30 * 4096);
        let source = |at: usize| (rate.sources[at].name.as_str(), rate.sources[at].pages_per_s);
        assert_eq!((source(0), source(1)), (("disk", 5.0), ("cpu", 15.0)));
        assert_eq!(rate.sources[0].working_set_bytes, 10 * 4096);
        assert_eq!(rate.sources[1].working_set_bytes, 25 * 4096);
        let model = DirtyModel::from(&rate);
        assert_eq!((model.bytes_per_s, model.working_set_bytes), (rate.bytes_per_s, 30 * 4096));
        #[cfg(feature = "serde")]
        assert_eq!(serde_json::from_str::<DirtyRate>(&serde_json::to_string(&rate).unwrap()).unwrap(), rate);
    }
}
