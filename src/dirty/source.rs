//! The one interface through which a migration asks for dirty pages, the log as such a source, and several as one.
//!
//! Other sources live in files of their own and implement [`DirtySource`]. Rounds and convergence are in `migrate`.

use std::sync::Arc;

use super::harvest::Harvest;
use super::log::{Log, LogError};
use super::page_set::PageSet;

/// Why a source can't say which pages are dirty.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The shared log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Another source failed.
    #[error("dirty pages of {name}: {cause}")]
    Source {
        /// The name of the source.
        name: String,
        /// What went wrong, in words that say what to do.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A source of dirty pages: a vhost log, KVM, pagemap, content hashes, or several as one.
pub trait DirtySource: Send {
    /// Begins to track: from its return on, every write is reported by a later harvest.
    ///
    /// # Errors
    /// If the source can't track; it then is as before the call.
    fn start(&mut self) -> Result<(), DirtyError>;

    /// Adds the pages written since the last harvest (or the start) to `into`, and forgets them.
    ///
    /// Read the pages only after this returns (rule L13).
    ///
    /// # Errors
    /// If the source failed; `into` keeps what was found until then, and is grown where it was too small.
    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError>;

    /// The last harvest, when everything that this source watches has stopped writing; may be faster.
    ///
    /// # Errors
    /// As [`harvest`](DirtySource::harvest).
    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.harvest(into)
    }

    /// Stops to track. A source can be started again.
    ///
    /// # Errors
    /// If the source could not be switched off.
    fn stop(&mut self) -> Result<(), DirtyError>;

    /// What to call the source in reports: a device, a CPU.
    fn name(&self) -> &str;
}

/// A shared log as a source. Whoever holds the devices switches their logging on and off.
#[derive(Debug)]
pub struct LogSource {
    name: String,
    log: Arc<Log>,
}

impl LogSource {
    /// A source that harvests `log`, reported as `name`.
    pub fn new(name: impl Into<String>, log: Arc<Log>) -> LogSource {
        LogSource { name: name.into(), log }
    }

    /// The log.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }
}

impl DirtySource for LogSource {
    /// Nothing to do: marks that devices made before this call count, they may log already.
    fn start(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        Ok(self.log.harvest(into))
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        Ok(self.log.harvest_stopped(into))
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// Several sources as one; a page is dirty if any of them says so.
#[derive(Default)]
pub struct Union {
    parts: Vec<Part>,
}

struct Part {
    source: Box<dyn DirtySource>,
    last: u64,
    total: u64,
}

/// What one source of a [`Union`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share<'a> {
    /// The source's name.
    pub name: &'a str,
    /// Pages it reported in the last harvest.
    pub last: u64,
    /// Pages it reported since the start, a page that was dirtied again counting again.
    pub total: u64,
}

impl Union {
    /// A union of `sources`; more can be added until it is started.
    pub fn new(sources: impl IntoIterator<Item = Box<dyn DirtySource>>) -> Union {
        let mut union = Union::default();
        sources.into_iter().for_each(|source| union.push(source));
        union
    }

    /// Adds a source.
    pub fn push(&mut self, source: Box<dyn DirtySource>) {
        self.parts.push(Part { source, last: 0, total: 0 });
    }

    /// What each source has found, in the order they were added.
    pub fn shares(&self) -> impl Iterator<Item = Share<'_>> {
        self.parts.iter().map(|part| Share { name: part.source.name(), last: part.last, total: part.total })
    }

    fn each(
        &mut self,
        harvest: impl Fn(&mut dyn DirtySource, &mut PageSet) -> Result<Harvest, DirtyError>,
        into: &mut PageSet,
    ) -> Result<Harvest, DirtyError> {
        let mut all = Harvest::default();
        for part in &mut self.parts {
            let found = harvest(part.source.as_mut(), into)?;
            part.last = found.pages;
            part.total += found.pages;
            all += found;
        }
        Ok(all)
    }
}

impl DirtySource for Union {
    /// Starts all sources, or none: if one fails, those already started are stopped again.
    fn start(&mut self) -> Result<(), DirtyError> {
        for at in 0..self.parts.len() {
            let (started, rest) = self.parts.split_at_mut(at);
            let Some(part) = rest.first_mut() else { break };
            (part.last, part.total) = (0, 0);
            if let Err(error) = part.source.start() {
                for part in started {
                    if let Err(error) = part.source.stop() {
                        tracing::warn!("{}: not stopped: {error}", part.source.name());
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Harvests all sources into one set. The first failure ends it: what was found until then is in `into`.
    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.each(|source, into| source.harvest(into), into)
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.each(|source, into| source.harvest_stopped(into), into)
    }

    /// Stops all sources, also after one of them failed to; the first failure is returned.
    fn stop(&mut self) -> Result<(), DirtyError> {
        self.parts.iter_mut().map(|part| part.source.stop()).fold(Ok(()), Result::and)
    }

    fn name(&self) -> &str {
        "all"
    }
}
