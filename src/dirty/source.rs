//! The interface through which a migration gets dirty pages, the log as a source, and the union of several sources.
//!
//! Other sources implement [`DirtySource`] in files of their own. Rounds and convergence are in `migrate`.

use std::fmt;
use std::sync::Arc;

use super::error::DirtyError;
use super::harvest::Harvest;
use super::log::Log;
use super::page_set::PageSet;

use crate::sys::with_causes::with_causes;

/// Quality of a dirty log, from the most to the least exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum LogQuality {
    /// The log has each page that the device wrote, and no other.
    #[default]
    Exact,
    /// The log has each page that the device wrote, and may have pages that it could have written.
    Conservative,
    /// The log has each page that the device wrote, because the device writes through rings of the front-end.
    Shadowed,
}

impl fmt::Display for LogQuality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogQuality::Exact => "exact",
            LogQuality::Conservative => "conservative",
            LogQuality::Shadowed => "shadowed",
        })
    }
}

/// A source of dirty pages: a vhost log, KVM, pagemap, content hashes, or a union of several.
///
/// Discarding a page (by a balloon, free page reporting, MADV_REMOVE, FALLOC_FL_PUNCH_HOLE) zeroes it without a write.
/// No source reports that, so the destination keeps the contents that it has received. If the guest relies on the
/// zeros, mark discarded pages as dirty; they are then sent as zero pages without being read. A verified migration
/// fails at discarded pages that were not marked.
pub trait DirtySource: Send {
    /// Begins tracking. Every write after the return is reported by a later harvest.
    ///
    /// # Errors
    /// [`DirtyError`] if the source cannot track. Its state is then as before the call.
    fn start(&mut self) -> Result<(), DirtyError>;

    /// Adds the pages written since the last harvest or the start to `into`. Each write is reported once.
    ///
    /// Read the pages only after this returns (rule L13.1). `into` grows if it is too small.
    ///
    /// # Errors
    /// [`DirtyError`] if the source failed. `into` keeps the pages found until then.
    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError>;

    /// As [`harvest`](DirtySource::harvest), and possibly faster, for the last harvest. All writers that this source
    /// tracks must have stopped.
    ///
    /// # Errors
    /// As [`harvest`](DirtySource::harvest).
    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.harvest(into)
    }

    /// Takes back pages that were harvested and could not be sent. The next harvest reports them again (rule L14.1).
    fn put_back(&mut self, pages: &PageSet);

    /// Ends tracking. The source can be started again.
    ///
    /// # Errors
    /// [`DirtyError`] if tracking could not be switched off.
    fn stop(&mut self) -> Result<(), DirtyError>;

    /// The name of the source in reports, for example of a device or a CPU.
    fn name(&self) -> &str;

    /// The quality of what the source has reported since it was started.
    fn log_quality(&self) -> LogQuality {
        LogQuality::Exact
    }
}

/// A shared log as a source. The owner of the devices switches their logging on and off.
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
    /// Does nothing. Devices may log already, and marks made before this call are kept, also those of pages that a
    /// failed migration has put back. The next migration sends all memory in its first round: harvest the log into an
    /// unused [`PageSet`] before, or these pages are sent twice.
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

/// The union of several sources. A page is dirty if any of them reports it.
///
/// ```
/// use std::sync::Arc;
///
/// use vhost_migrate::dirty::{DirtySource, Log, LogSource, PageSet, UnionSource};
/// use vhost_migrate::memory::GuestAddress;
///
/// let disk = Arc::new(Log::create(GuestAddress(1 << 20))?.0);
/// let net = Arc::new(Log::create(GuestAddress(1 << 20))?.0);
/// let sources = [("disk", &disk), ("net", &net)];
/// let sources = sources.map(|(name, log)| Box::new(LogSource::new(name, log.clone())) as Box<dyn DirtySource>);
/// let mut union = UnionSource::new(sources);
/// union.start()?;
/// disk.mark(GuestAddress(0x1000), 1);
/// net.mark(GuestAddress(0x1000), 8192);
///
/// let mut pages = PageSet::default();
/// union.harvest(&mut pages)?;
/// assert_eq!(pages.len(), 2);
/// let shares: Vec<_> = union.shares().map(|share| (share.name, share.last)).collect();
/// assert_eq!(shares, [("disk", 1), ("net", 2)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default)]
pub struct UnionSource {
    members: Vec<UnionMember>,
    /// Pages that were put back. It is not recorded which member reported them.
    returned: PageSet,
}

struct UnionMember {
    source: Box<dyn DirtySource>,
    last: u64,
    total: u64,
}

/// The number of pages that one source of a [`UnionSource`] has reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceShare<'a> {
    /// The source's name.
    pub name: &'a str,
    /// Number of pages reported in the last harvest.
    pub last: u64,
    /// Number of pages reported since the start. A page that is dirtied again counts again.
    pub total: u64,
}

impl UnionSource {
    /// A union of `sources`. More can be added until it is started.
    pub fn new(sources: impl IntoIterator<Item = Box<dyn DirtySource>>) -> UnionSource {
        let mut union = UnionSource::default();
        sources.into_iter().for_each(|source| union.push(source));
        union
    }

    /// Adds a source.
    pub fn push(&mut self, source: Box<dyn DirtySource>) {
        self.members.push(UnionMember { source, last: 0, total: 0 });
    }

    /// The share of each source, in the order in which they were added.
    pub fn shares(&self) -> impl Iterator<Item = SourceShare<'_>> {
        self.members.iter().map(|UnionMember { source, last, total }| SourceShare {
            name: source.name(),
            last: *last,
            total: *total,
        })
    }

    fn harvest_members(
        &mut self,
        harvest: impl Fn(&mut dyn DirtySource, &mut PageSet) -> Result<Harvest, DirtyError>,
        into: &mut PageSet,
    ) -> Result<Harvest, DirtyError> {
        let mut all = Harvest::default();
        into.union(&self.returned);
        self.returned.clear();
        for member in &mut self.members {
            let found = harvest(member.source.as_mut(), into)?;
            member.last = found.pages;
            member.total += found.pages;
            all += found;
        }
        Ok(all)
    }
}

impl DirtySource for UnionSource {
    /// Starts all sources, or none: if one fails, those already started are stopped again.
    fn start(&mut self) -> Result<(), DirtyError> {
        for at in 0..self.members.len() {
            let (started, rest) = self.members.split_at_mut(at);
            let Some(member) = rest.first_mut() else { break };
            (member.last, member.total) = (0, 0);
            if let Err(error) = member.source.start() {
                for member in started {
                    if let Err(error) = member.source.stop() {
                        tracing::warn!("{}: cannot stop tracking: {}", member.source.name(), with_causes(&error));
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Harvests all sources into one set, up to the first failure. `into` keeps the pages found until then.
    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.harvest_members(|source, into| source.harvest(into), into)
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.harvest_members(|source, into| source.harvest_stopped(into), into)
    }

    fn put_back(&mut self, pages: &PageSet) {
        self.returned.union(pages);
    }

    /// Stops all sources, also after a failure, and returns the first failure.
    fn stop(&mut self) -> Result<(), DirtyError> {
        self.members.iter_mut().map(|member| member.source.stop()).fold(Ok(()), Result::and)
    }

    fn name(&self) -> &str {
        "all"
    }

    /// That of the least exact source.
    fn log_quality(&self) -> LogQuality {
        self.members.iter().map(|member| member.source.log_quality()).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::memory::{GuestAddress, PageNumber, PageRange};

    /// A source that reports `pages`, records its calls, and fails the call named `fails`.
    struct ScriptedSource {
        name: &'static str,
        pages: std::ops::Range<u64>,
        fails: &'static str,
        calls: Arc<Mutex<Vec<String>>>,
    }

    impl ScriptedSource {
        fn called(&self, call: &str) -> Result<(), DirtyError> {
            self.calls.lock().unwrap().push(format!("{} {call}", self.name));
            match call == self.fails {
                true => Err(DirtyError::Source { name: self.name.into(), cause: call.into() }),
                false => Ok(()),
            }
        }
    }

    impl DirtySource for ScriptedSource {
        fn start(&mut self) -> Result<(), DirtyError> {
            self.called("start")
        }

        fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
            self.called("harvest")?;
            into.grow(self.pages.end);
            let pages = self.pages.end - self.pages.start;
            Ok(Harvest { pages, added: into.insert_range(self.pages.clone().into()) })
        }

        fn put_back(&mut self, _: &PageSet) {}

        fn stop(&mut self) -> Result<(), DirtyError> {
            self.called("stop")
        }

        fn name(&self) -> &str {
            self.name
        }
    }

    fn union(fails: [&'static str; 3]) -> (UnionSource, Arc<Mutex<Vec<String>>>) {
        let calls = Arc::default();
        let members = [("a", 0..10, fails[0]), ("b", 5..25, fails[1]), ("c", 90..91, fails[2])];
        let sources = members.map(|(name, pages, fails)| {
            Box::new(ScriptedSource { name, pages, fails, calls: Arc::clone(&calls) }) as Box<dyn DirtySource>
        });
        (UnionSource::new(sources), calls)
    }

    #[test]
    fn a_union_reports_every_page_once_and_counts_pages_by_source() {
        let (mut union, _) = union([""; 3]);
        let mut set = PageSet::default();
        union.start().unwrap();
        assert_eq!(union.harvest(&mut set).unwrap(), Harvest { pages: 31, added: 26 });
        assert_eq!(union.harvest_stopped(&mut set).unwrap(), Harvest { pages: 31, added: 0 });
        assert_eq!(set.runs().collect::<Vec<_>>(), [0..25, 90..91].map(PageRange::from));
        let shares: Vec<_> = union.shares().map(|share| (share.name, share.last, share.total)).collect();
        assert_eq!(shares, [("a", 10, 20), ("b", 20, 40), ("c", 1, 2)]);
        union.start().unwrap();
        assert!(union.shares().all(|share| share.total == 0), "a start resets the counts");
    }

    #[test]
    fn pages_that_are_put_back_are_harvested_exactly_once_more() {
        let mut unsent = PageSet::new(200);
        unsent.insert_range((60..70).into());
        unsent.insert(PageNumber(199));
        let log = Arc::new(Log::create(GuestAddress(200 * crate::memory::LOG_PAGE)).unwrap().0);
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
    fn a_union_that_cannot_start_stops_the_sources_already_started() {
        let (mut union, calls) = union(["", "", "start"]);
        assert_eq!(with_causes(&union.start().unwrap_err()).to_string(), "the source c of dirty pages failed: start");
        assert_eq!(*calls.lock().unwrap(), ["a start", "b start", "c start", "a stop", "b stop"]);
    }

    #[test]
    fn a_failed_harvest_keeps_the_pages_found_before() {
        let (mut union, _) = union(["", "harvest", ""]);
        let mut set = PageSet::default();
        assert!(union.harvest(&mut set).is_err());
        assert!(set.iter().eq((0..10).map(PageNumber)));
    }

    #[test]
    fn all_sources_are_stopped_even_if_one_fails() {
        let (mut union, calls) = union(["stop", "", "stop"]);
        assert_eq!(with_causes(&union.stop().unwrap_err()).to_string(), "the source a of dirty pages failed: stop");
        assert_eq!(calls.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_log_source_reports_the_marks_of_its_log() {
        let log = Arc::new(Log::create(GuestAddress(1 << 30)).unwrap().0);
        let mut source = LogSource::new("disk", Arc::clone(&log));
        log.mark(GuestAddress(4096), 1);
        source.start().unwrap();
        let mut set = PageSet::default();
        assert_eq!(source.harvest(&mut set).unwrap().pages, 1, "marked before the start and kept");
        log.mark(GuestAddress(4096), 1);
        assert_eq!(source.harvest_stopped(&mut set).unwrap(), Harvest { pages: 1, added: 0 });
        assert_eq!((source.name(), source.log().size()), ("disk", 32 << 10));
    }
}
