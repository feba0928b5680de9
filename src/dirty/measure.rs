//! Measures dirty rates by harvesting each source at short intervals.

use std::time::{Duration, Instant};

use super::{DirtyError, DirtyRate, DirtySource, PageSet, RateMeter};

/// Measures the dirty rate for `time`, harvesting each of `sources` every `interval`. The sources are started before
/// and stopped after. `wait` sleeps, and returns false to end the measurement early.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use vhost_migrate::dirty::{DirtySource, Log, LogSource, measure_dirty_rate};
/// use vhost_migrate::memory::GuestAddress;
///
/// let log = Arc::new(Log::create(GuestAddress(1 << 20))?.0);
/// let mut sources: [Box<dyn DirtySource>; 1] = [Box::new(LogSource::new("disk", log.clone()))];
/// let (time, interval) = (Duration::from_millis(50), Duration::from_millis(10));
/// let rate = measure_dirty_rate(&mut sources, time, interval, |interval| {
///     // The disk writes the same 8 KiB in every interval.
///     log.mark(GuestAddress(0x4000), 8192);
///     std::thread::sleep(interval);
///     true
/// })?;
/// assert!(rate.bytes_per_s > 0.0);
/// assert_eq!(rate.working_set_bytes, 8192);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Errors of a source. The sources are stopped in any case.
pub fn measure_dirty_rate(
    sources: &mut [Box<dyn DirtySource>],
    time: Duration,
    interval: Duration,
    mut wait: impl FnMut(Duration) -> bool,
) -> Result<DirtyRate, DirtyError> {
    let mut meter = RateMeter::new();
    let measured = (|| {
        for source in sources.iter_mut() {
            source.start()?;
        }
        let mut sets: Vec<PageSet> = sources.iter().map(|_| PageSet::default()).collect();
        // Marks from before the start do not belong to this period.
        harvest(sources, &mut sets)?;
        let begun = Instant::now();
        let mut last = begun;
        while begun.elapsed() < time && wait(interval.min(time.saturating_sub(begun.elapsed()))) {
            sets.iter_mut().for_each(PageSet::clear);
            harvest(sources, &mut sets)?;
            let now = Instant::now();
            meter.interval(now - last, sources.iter().map(|source| source.name()).zip(&sets));
            last = now;
        }
        Ok(())
    })();
    let stopped = sources.iter_mut().map(|source| source.stop()).fold(Ok(()), Result::and);
    measured.and(stopped)?;
    let mut rate = meter.rate();
    for source in sources.iter() {
        let quality = source.log_quality();
        rate.log_quality = rate.log_quality.max(quality);
        let named = rate.sources.iter_mut().filter(|rate| rate.name == source.name());
        named.for_each(|rate| rate.log_quality = rate.log_quality.max(quality));
    }
    Ok(rate)
}

fn harvest(sources: &mut [Box<dyn DirtySource>], sets: &mut [PageSet]) -> Result<(), DirtyError> {
    sources.iter_mut().zip(sets).try_for_each(|(source, set)| source.harvest(set).map(drop))
}
