//! Populates the destination's memory ahead of the pages: large populate calls cost less than page faults during reads.
//!
//! An announcement costs the source nothing. Therefore only a window, plus some pages for each received data page, is
//! populated ahead.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::memory::{LOG_PAGE, PageNumber};
use crate::stream::pages::IncomingMemory;
use crate::sys::with_causes::with_causes;

/// Number of pages populated with one system call: 4 MiB, which takes 1 to 2 ms.
const CHUNK_PAGES: u64 = (4 << 20) / LOG_PAGE;
/// Minimum length of a run for huge-page advice, which splits a mapping.
const MIN_HUGE_RUN: u64 = (64 << 20) / LOG_PAGE;
/// Number of pages that may be populated before any has arrived: 64 MiB.
const POPULATE_AHEAD: u64 = (64 << 20) / LOG_PAGE;
/// Number of pages that may be populated for each received data page. More than one, because announced pages can arrive
/// as zero.
const POPULATE_PER_ARRIVED: u64 = 4;

/// Count of the pages received so far.
#[derive(Debug, Default)]
pub(super) struct ArrivedPages {
    count: Mutex<ArrivalCount>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ArrivalCount {
    /// Received data pages.
    pages: u64,
    /// True if no more pages arrive.
    ended: bool,
    /// Number of pages for which populating waits; 0 if it does not wait.
    waiting_for: u64,
}

impl ArrivedPages {
    /// Adds received data pages.
    pub(super) fn add(&self, pages: u64) {
        self.lock().pages += pages;
        self.changed.notify_all();
    }

    /// Records that no more pages arrive.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until `pages` pages may be populated. Returns false if no more pages arrive.
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

/// Populates the announced `runs` until all are done or no more pages arrive, and waits when it is too far ahead.
/// Chunks that already hold data are skipped. No other page is populated, so that no more memory is used than at the
/// source.
pub(super) fn populate(target: &IncomingMemory, runs: &[Range<u64>], arrived: &ArrivedPages) {
    let memory = target.memory();
    let (mut done, mut populated) = (0, 0);
    for run in runs {
        // Runs outside memory or out of order are ignored.
        for part in memory.pages((run.start.max(done)..run.end).into()) {
            if part.count() >= MIN_HUGE_RUN {
                memory.advise_huge_pages(part);
            }
            for chunk in part.start.0 / CHUNK_PAGES..part.end.0.div_ceil(CHUNK_PAGES) {
                let piece = part.intersection((chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES).into());
                populated += piece.count();
                if !arrived.wait_to_populate(populated) {
                    return;
                }
                if target.has_data(PageNumber(piece.end.0 - 1)) {
                    populated -= piece.count();
                    continue;
                }
                if let Err(error) = memory.populate(piece) {
                    // Receiving the pages reports a lack of memory; an old kernel does not support this call.
                    tracing::debug!(error = %with_causes(&error), "memory is not populated ahead");
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
    use crate::memory::{GuestAddress, Memory, Region, UserAddress, sealed_memfd};

    const PAGES: u64 = 8 << 10;

    fn target(pages: u64) -> (IncomingMemory, OwnedFd) {
        let fd = sealed_memfd("populate-test", pages * LOG_PAGE).unwrap();
        let region = Region::map(fd.as_fd(), GuestAddress(0), pages * LOG_PAGE, UserAddress(0), 0).unwrap();
        (IncomingMemory::zeroed(Memory::new([Arc::new(region)]).unwrap()), fd)
    }

    fn resident(fd: &OwnedFd) -> u64 {
        nix::sys::stat::fstat(fd).unwrap().st_blocks as u64 / 8
    }

    /// Number of pages allocated in a file of `PAGES` pages after `runs` were announced.
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
        target.mark_data((POPULATE_AHEAD / 2..POPULATE_AHEAD / 2 + CHUNK_PAGES).into());
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
