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
///
/// To discard a page (a balloon, free page reporting, MADV_REMOVE, FALLOC_FL_PUNCH_HOLE) turns it to zero without a write: no
/// source reports it, and a destination keeps the contents that it has received. Where the guest relies on the zeros, mark
/// discarded pages as dirty; they are then sent as zero, and not read. A verified migration fails at pages that were not.
pub trait DirtySource: Send {
    /// Begins to track: from its return on, every write is reported by a later harvest.
    ///
    /// # Errors
    /// If the source can't track; it then is as before the call.
    fn start(&mut self) -> Result<(), DirtyError>;

    /// Adds the pages written since the last harvest (or the start) to `into`, and forgets them.
    ///
    /// Read the pages only after this returns (rule L13.1).
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

    /// Takes back pages that were harvested but could not be sent: the next harvest reports them again (rule L14.1).
    fn put_back(&mut self, pages: &PageSet);

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

    fn put_back(&mut self, pages: &PageSet) {
        self.log.put_back(pages);
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
pub struct UnionSource {
    parts: Vec<UnionMember>,
    /// Put back: nobody knows any more which part found them.
    returned: PageSet,
}

struct UnionMember {
    source: Box<dyn DirtySource>,
    last: u64,
    total: u64,
}

/// What one source of a [`UnionSource`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceShare<'a> {
    /// The source's name.
    pub name: &'a str,
    /// Pages it reported in the last harvest.
    pub last: u64,
    /// Pages it reported since the start, a page that was dirtied again counting again.
    pub total: u64,
}

impl UnionSource {
    /// A union of `sources`; more can be added until it is started.
    pub fn new(sources: impl IntoIterator<Item = Box<dyn DirtySource>>) -> UnionSource {
        let mut union = UnionSource::default();
        sources.into_iter().for_each(|source| union.push(source));
        union
    }

    /// Adds a source.
    pub fn push(&mut self, source: Box<dyn DirtySource>) {
        self.parts.push(UnionMember { source, last: 0, total: 0 });
    }

    /// What each source has found, in the order they were added.
    pub fn shares(&self) -> impl Iterator<Item = SourceShare<'_>> {
        self.parts.iter().map(|part| SourceShare { name: part.source.name(), last: part.last, total: part.total })
    }

    fn each(
        &mut self,
        harvest: impl Fn(&mut dyn DirtySource, &mut PageSet) -> Result<Harvest, DirtyError>,
        into: &mut PageSet,
    ) -> Result<Harvest, DirtyError> {
        let mut all = Harvest::default();
        into.union(&self.returned);
        self.returned.clear();
        for part in &mut self.parts {
            let found = harvest(part.source.as_mut(), into)?;
            part.last = found.pages;
            part.total += found.pages;
            all += found;
        }
        Ok(all)
    }
}

impl DirtySource for UnionSource {
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

    fn put_back(&mut self, pages: &PageSet) {
        self.returned.union(pages);
    }

    /// Stops all sources, also after one of them failed to; the first failure is returned.
    fn stop(&mut self) -> Result<(), DirtyError> {
        self.parts.iter_mut().map(|part| part.source.stop()).fold(Ok(()), Result::and)
    }

    fn name(&self) -> &str {
        "all"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A source that reports `pages`, fails where told to, and writes down what it was asked.
    struct Scripted {
        name: &'static str,
        pages: std::ops::Range<u64>,
        fails: &'static str,
        asked: Arc<Mutex<Vec<String>>>,
    }

    impl Scripted {
        fn asked(&self, what: &str) -> Result<(), DirtyError> {
            self.asked.lock().unwrap().push(format!("{} {what}", self.name));
            match what == self.fails {
                true => Err(DirtyError::Source { name: self.name.into(), cause: what.into() }),
                false => Ok(()),
            }
        }
    }

    impl DirtySource for Scripted {
        fn start(&mut self) -> Result<(), DirtyError> {
            self.asked("start")
        }

        fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
            self.asked("harvest")?;
            into.grow(self.pages.end);
            let pages = self.pages.end - self.pages.start;
            Ok(Harvest { pages, added: into.insert_range(self.pages.clone()) })
        }

        fn put_back(&mut self, _: &PageSet) {}

        fn stop(&mut self) -> Result<(), DirtyError> {
            self.asked("stop")
        }

        fn name(&self) -> &str {
            self.name
        }
    }

    fn union(fails: [&'static str; 3]) -> (UnionSource, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::default();
        let parts = [("a", 0..10, fails[0]), ("b", 5..25, fails[1]), ("c", 90..91, fails[2])];
        let sources = parts.map(|(name, pages, fails)| {
            Box::new(Scripted { name, pages, fails, asked: Arc::clone(&asked) }) as Box<dyn DirtySource>
        });
        (UnionSource::new(sources), asked)
    }

    #[test]
    fn a_union_reports_every_page_once_and_every_source_by_itself() {
        let (mut union, _) = union([""; 3]);
        let mut set = PageSet::default();
        union.start().unwrap();
        assert_eq!(union.harvest(&mut set).unwrap(), Harvest { pages: 31, added: 26 });
        assert_eq!(union.harvest_stopped(&mut set).unwrap(), Harvest { pages: 31, added: 0 });
        assert_eq!(set.runs().collect::<Vec<_>>(), [0..25, 90..91]);
        let shares: Vec<_> = union.shares().map(|share| (share.name, share.last, share.total)).collect();
        assert_eq!(shares, [("a", 10, 20), ("b", 20, 40), ("c", 1, 2)]);
        union.start().unwrap();
        assert!(union.shares().all(|share| share.total == 0), "a new start counts anew");
    }

    #[test]
    fn pages_that_are_put_back_are_harvested_again_and_once() {
        let mut unsent = PageSet::new(200);
        unsent.insert_range(60..70);
        unsent.insert(199);
        let log = Arc::new(Log::create(200 * crate::memory::LOG_PAGE).unwrap().0);
        let log: Box<dyn DirtySource> = Box::new(LogSource::new("disk", log));
        let union: Box<dyn DirtySource> = Box::new(UnionSource::default());
        for mut source in [log, union] {
            let mut set = PageSet::default();
            source.put_back(&unsent);
            source.harvest(&mut set).unwrap();
            assert!(set.iter().eq(unsent.iter()), "{}", source.name());
            set.clear();
            source.harvest(&mut set).unwrap();
            assert!(set.is_empty(), "{}", source.name());
        }
    }

    #[test]
    fn a_union_that_cannot_start_leaves_nothing_started() {
        let (mut union, asked) = union(["", "", "start"]);
        assert_eq!(union.start().unwrap_err().to_string(), "dirty pages of c: start");
        assert_eq!(*asked.lock().unwrap(), ["a start", "b start", "c start", "a stop", "b stop"]);
    }

    #[test]
    fn a_failed_harvest_keeps_what_was_found() {
        let (mut union, _) = union(["", "harvest", ""]);
        let mut set = PageSet::default();
        assert!(union.harvest(&mut set).is_err());
        assert!(set.iter().eq(0..10));
    }

    #[test]
    fn all_sources_are_stopped_even_if_one_fails() {
        let (mut union, asked) = union(["stop", "", "stop"]);
        assert_eq!(union.stop().unwrap_err().to_string(), "dirty pages of a: stop");
        assert_eq!(asked.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_log_is_a_source() {
        let log = Arc::new(Log::create(1 << 30).unwrap().0);
        let mut source = LogSource::new("disk", Arc::clone(&log));
        log.mark(4096, 1);
        source.start().unwrap();
        let mut set = PageSet::default();
        assert_eq!(source.harvest(&mut set).unwrap().pages, 1, "marked before the start and kept");
        log.mark(4096, 1);
        assert_eq!(source.harvest_stopped(&mut set).unwrap(), Harvest { pages: 1, added: 0 });
        assert_eq!((source.name(), source.log().size()), ("disk", 32 << 10));
    }
}
