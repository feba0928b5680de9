//! Measures dirty rates by harvesting each source at short intervals.

use std::time::{Duration, Instant};

use super::{DirtyError, DirtyRate, DirtySource, PageSet, RateMeter};

/// Measures the dirty rate for `time`, harvesting each of `sources` every `interval`. The sources are started before
/// and stopped after. `wait` sleeps, and returns false to end the measurement early.
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
    measured.and(stopped).map(|()| meter.rate())
}

fn harvest(sources: &mut [Box<dyn DirtySource>], sets: &mut [PageSet]) -> Result<(), DirtyError> {
    sources.iter_mut().zip(sets).try_for_each(|(source, set)| source.harvest(set).map(drop))
}
