//! Memory of the destination provided ahead of the pages that arrive: in large pieces it costs the system less than page
//! by page in the midst of a read, and somebody else's time.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::memory::LOG_PAGE;
use crate::stream::Target;

/// Pages populated with one system call: 4 MiB, a millisecond or two.
const PIECE: u64 = (4 << 20) / LOG_PAGE;
/// Runs of at least this many pages are worth an advice to use huge pages, each of which splits a mapping.
const HUGE: u64 = (64 << 20) / LOG_PAGE;

/// Populates `runs`, the pages for which the source has announced data, until all are done or `over` is set. Pieces that
/// pages have reached already are left out. Populates no other page: no more than the source uses.
pub(super) fn populate(target: &Target, runs: &[Range<u64>], over: &AtomicBool) {
    let memory = target.memory();
    let mut done = 0;
    for run in runs {
        // What is not memory, or not in order, is not believed.
        for part in memory.pages(&(run.start.max(done)..run.end)) {
            if part.end - part.start >= HUGE {
                memory.advise_huge_pages(&part);
            }
            for start in (part.start / PIECE..part.end.div_ceil(PIECE)).map(|piece| piece * PIECE) {
                let piece = part.start.max(start)..part.end.min(start + PIECE);
                if over.load(Ordering::Relaxed) {
                    return;
                }
                if target.has_data(piece.end - 1) {
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
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use super::*;
    use crate::memory::{Memory, Region, sealed_memfd};

    const PAGES: u64 = 8 << 10;

    /// The pages that a file of `PAGES` pages takes after `runs` were announced for it.
    fn taken(runs: &[Range<u64>], over: bool) -> u64 {
        let fd = sealed_memfd("populate-test", PAGES * LOG_PAGE).unwrap();
        let region = Region::map(fd.as_fd(), 0, PAGES * LOG_PAGE, 0, 0).unwrap();
        let target = Target::fresh(Memory::new([Arc::new(region)]).unwrap());
        populate(&target, runs, &AtomicBool::new(over));
        nix::sys::stat::fstat(&fd).unwrap().st_blocks as u64 / 8
    }

    #[test]
    fn announced_pages_are_provided_and_no_others() {
        assert_eq!(taken(&[1..3, 1000..1025, 2000..5000], false), 2 + 25 + 3000);
        assert_eq!(taken(&[0..PAGES], true), 0, "the migration is over");
    }

    #[test]
    fn a_source_that_announces_nonsense_gets_no_more_than_the_guest_has() {
        let ends = |start| start..u64::MAX;
        assert_eq!(taken(&[ends(PAGES - 1), ends(0), 0..PAGES], false), 1, "runs that come back are ignored");
        assert_eq!(taken(&[PAGES..PAGES + 9, 7..8], false), 0);
        assert_eq!(taken(&[ends(0)], false), PAGES);
    }
}
