//! Memory of the destination provided ahead of the pages that arrive: in large pieces it costs the system less than page
//! by page in the midst of a read, and somebody else's time.
//!
//! What a source announces is a hint, and costs it nothing. So no more is provided than a window, and some pages for each
//! one that has arrived with data.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::memory::LOG_PAGE;
use crate::stream::IncomingMemory;

/// Pages populated with one system call: 4 MiB, a millisecond or two.
const CHUNK_PAGES: u64 = (4 << 20) / LOG_PAGE;
/// Runs of at least this many pages are worth an advice to use huge pages, each of which splits a mapping.
const MIN_HUGE_RUN: u64 = (64 << 20) / LOG_PAGE;
/// Pages that may be populated before any has arrived: 64 MiB.
const POPULATE_AHEAD: u64 = (64 << 20) / LOG_PAGE;
/// Pages that may be populated for each that has arrived with data. More than one, as announced pages can arrive as zero.
const POPULATE_PER_ARRIVED: u64 = 4;

/// The pages of a migration that have arrived so far.
#[derive(Debug, Default)]
pub(super) struct ArrivedPages {
    count: Mutex<ArrivalCount>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ArrivalCount {
    /// With data.
    pages: u64,
    /// No more come.
    ended: bool,
    /// Pages that are not populated before more have arrived; 0 if none is waited for.
    waiting_for: u64,
}

impl ArrivedPages {
    /// Notes pages that have arrived with data.
    pub(super) fn add(&self, pages: u64) {
        self.lock().pages += pages;
        self.changed.notify_all();
    }

    /// No more pages come.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until `pages` more than the window have arrived; false if they never will.
    fn wait_to_populate(&self, pages: u64) -> bool {
        let mut progress = self.lock();
        while !progress.ended && POPULATE_AHEAD + POPULATE_PER_ARRIVED * progress.pages < pages {
            progress.waiting_for = pages;
            progress = self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
        progress.waiting_for = 0;
        !progress.ended
    }

    fn lock(&self) -> MutexGuard<'_, ArrivalCount> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Populates `runs`, the pages for which the source has announced data, until all are done or no more pages arrive, and
/// waits for pages to arrive where it has come too far. Pieces that pages have reached already are left out. Populates no
/// other page: no more than the source uses.
pub(super) fn populate(target: &IncomingMemory, runs: &[Range<u64>], arrived: &ArrivedPages) {
    let memory = target.memory();
    let (mut done, mut populated) = (0, 0);
    for run in runs {
        // What is not memory, or not in order, is not believed.
        for part in memory.pages(&(run.start.max(done)..run.end)) {
            if part.end - part.start >= MIN_HUGE_RUN {
                memory.advise_huge_pages(&part);
            }
            for start in (part.start / CHUNK_PAGES..part.end.div_ceil(CHUNK_PAGES)).map(|piece| piece * CHUNK_PAGES) {
                let piece = part.start.max(start)..part.end.min(start + CHUNK_PAGES);
                populated += piece.end - piece.start;
                if !arrived.wait_to_populate(populated) {
                    return;
                }
                if target.has_data(piece.end - 1) {
                    populated -= piece.end - piece.start;
                    continue;
                }
                if let Err(error) = memory.populate(&piece) {
                    // The pages themselves will tell if there is no memory; an old kernel just can't do it.
                    tracing::debug!(%error, "memory is not populated ahead");
                    return;
                }
            }
        }
        done = done.max(run.end);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::memory::{Memory, Region, sealed_memfd};

    const PAGES: u64 = 8 << 10;

    fn target(pages: u64) -> (IncomingMemory, OwnedFd) {
        let fd = sealed_memfd("populate-test", pages * LOG_PAGE).unwrap();
        let region = Region::map(fd.as_fd(), 0, pages * LOG_PAGE, 0, 0).unwrap();
        (IncomingMemory::zeroed(Memory::new([Arc::new(region)]).unwrap()), fd)
    }

    fn resident(fd: &OwnedFd) -> u64 {
        nix::sys::stat::fstat(fd).unwrap().st_blocks as u64 / 8
    }

    /// The pages that a file of `PAGES` pages takes after `runs` were announced for it.
    fn populated_pages(runs: &[Range<u64>], ended: bool) -> u64 {
        let (target, fd) = target(PAGES);
        let arrived = ArrivedPages::default();
        if ended {
            arrived.end();
        }
        populate(&target, runs, &arrived);
        resident(&fd)
    }

    #[test]
    fn only_announced_pages_are_populated() {
        assert_eq!(populated_pages(&[1..3, 1000..1025, 2000..5000], false), 2 + 25 + 3000);
        assert_eq!(populated_pages(&[0..PAGES], true), 0, "the migration is over");
    }

    #[test]
    fn malformed_data_runs_populate_only_guest_memory() {
        let ends = |start| start..u64::MAX;
        assert_eq!(populated_pages(&[ends(PAGES - 1), ends(0), 0..PAGES], false), 1, "runs that come back are ignored");
        assert_eq!(populated_pages(&[PAGES..PAGES + 9, 7..8], false), 0);
        assert_eq!(populated_pages(&[ends(0)], false), PAGES);
    }

    /// Waits until `pages` are populated and the next chunk is too much. Returns the pages that the file takes.
    fn resident_when_waiting(arrived: &ArrivedPages, fd: &OwnedFd, pages: u64) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(60);
        while arrived.lock().waiting_for != pages + CHUNK_PAGES {
            assert!(Instant::now() < deadline, "{} pages", resident(fd));
            std::thread::sleep(Duration::from_millis(1));
        }
        resident(fd)
    }

    #[test]
    fn chunks_that_have_arrived_do_not_count_against_the_window() {
        const ALL: u64 = 2 * POPULATE_AHEAD;
        let (target, fd) = target(ALL);
        let arrived = ArrivedPages::default();
        target.mark_data(&(POPULATE_AHEAD / 2..POPULATE_AHEAD / 2 + CHUNK_PAGES));
        std::thread::scope(|scope| {
            let populating = scope.spawn(|| populate(&target, &[0..ALL], &arrived));
            assert_eq!(resident_when_waiting(&arrived, &fd, POPULATE_AHEAD), POPULATE_AHEAD);
            arrived.add(ALL);
            populating.join().unwrap();
            assert_eq!(resident(&fd), ALL - CHUNK_PAGES);
        });
    }

    #[test]
    fn populating_stays_within_a_window_ahead_of_the_arrived_pages() {
        const ALL: u64 = 4 * POPULATE_AHEAD;
        let (target, fd) = target(ALL);
        let arrived = ArrivedPages::default();
        let until_it_waits_after = |pages| resident_when_waiting(&arrived, &fd, pages);
        std::thread::scope(|scope| {
            let populating = scope.spawn(|| populate(&target, &[0..ALL], &arrived));
            assert_eq!(until_it_waits_after(POPULATE_AHEAD), POPULATE_AHEAD);
            arrived.add(CHUNK_PAGES);
            let more = POPULATE_AHEAD + POPULATE_PER_ARRIVED * CHUNK_PAGES;
            assert_eq!(until_it_waits_after(more), more);
            arrived.add(ALL);
            populating.join().unwrap();
            assert_eq!(resident(&fd), ALL);
        });
    }

    #[test]
    fn populating_ends_when_no_more_pages_arrive() {
        let (target, fd) = target(2 * POPULATE_AHEAD);
        let arrived = ArrivedPages::default();
        std::thread::scope(|scope| {
            let populating = scope.spawn(|| populate(&target, &[0..2 * POPULATE_AHEAD], &arrived));
            arrived.end();
            populating.join().unwrap();
        });
        assert!(resident(&fd) <= POPULATE_AHEAD);
    }
}
