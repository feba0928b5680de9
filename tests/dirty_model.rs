//! Model of marking and harvesting in every interleaving, on a machine with store buffers: no page is lost.
//!
//! The algorithms of `dirty` (rules L10.1, L10.2 and L13.1) are explored exhaustively. Writers store data and mark,
//! with or without loading the bit first, while a harvester takes bits and copies pages. Stores are buffered and reach
//! memory at any later time, as on x86. Locked operations and fences wait for the buffer to be empty. To show that the
//! model notices errors, each wrong variant of an algorithm must lose a page.

use std::collections::HashSet;

/// Number of pieces of data, each with one writer.
const DATA: usize = 2;
/// Page of each piece: a page for each.
const APART: [usize; DATA] = [0, 1];
/// Page of each piece: one page for both.
const SHARED: [usize; DATA] = [0, 0];

/// One step of a program. `reg` is the thread's register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// data += 1, through the store buffer.
    Write(usize),
    /// Waits until the thread's stores have reached memory.
    Fence,
    /// reg = the word of the log.
    LoadLog,
    /// Locked: log |= bit of the page, unless the bit was seen in reg.
    OrUnlessSeen(usize),
    /// Locked: log |= bit of the page.
    Or(usize),
    /// Wrong: log = reg | bit of the page, through the store buffer.
    StoreOr(usize),
    /// Locked, if reg is not zero: reg = log, log = 0.
    Swap,
    /// Wrong: log = 0, through the store buffer.
    StoreZero,
    /// copy = data for all that is in the pages in reg.
    CopyPages,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Thread {
    at: usize,
    reg: u8,
    /// Buffered stores, oldest first: (address, value).
    buffer: Vec<(usize, u8)>,
}

/// Address of the word of the log, after the data.
const LOG: usize = DATA;

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    memory: [u8; DATA + 1],
    copy: [u8; DATA],
    threads: Vec<Thread>,
}

impl State {
    fn load(&self, thread: usize, place: usize) -> u8 {
        let mine = self.threads[thread].buffer.iter().rev().find(|(stored, _)| *stored == place);
        mine.map_or(self.memory[place], |(_, value)| *value)
    }

    /// The state after the thread's next operation; `None` if it must wait.
    fn step(&self, thread: usize, op: Op, page_of: [usize; DATA]) -> Option<State> {
        let mut next = self.clone();
        let drained = self.threads[thread].buffer.is_empty();
        let seen = self.threads[thread].reg;
        let me = &mut next.threads[thread];
        me.at += 1;
        match op {
            Op::Write(place) => me.buffer.push((place, self.load(thread, place) + 1)),
            Op::StoreOr(page) => me.buffer.push((LOG, seen | 1 << page)),
            Op::StoreZero => me.buffer.push((LOG, 0)),
            Op::LoadLog => me.reg = self.load(thread, LOG),
            Op::OrUnlessSeen(page) if seen >> page & 1 != 0 => {}
            Op::Swap if seen == 0 => {}
            Op::CopyPages => {
                for place in (0..DATA).filter(|place| seen >> page_of[*place] & 1 != 0) {
                    next.copy[place] = self.load(thread, place);
                }
            }
            // All further operations wait for the store buffer.
            _ if !drained => return None,
            Op::Fence => {}
            Op::Or(page) | Op::OrUnlessSeen(page) => next.memory[LOG] |= 1 << page,
            Op::Swap => me.reg = std::mem::take(&mut next.memory[LOG]),
        }
        Some(next)
    }

    /// The state after the oldest store of the thread has reached memory.
    fn drain(&self, thread: usize) -> Option<State> {
        let mut next = self.clone();
        let buffer = &mut next.threads[thread].buffer;
        let (place, value) = (!buffer.is_empty()).then(|| buffer.remove(0))?;
        next.memory[place] = value;
        Some(next)
    }
}

/// Runs the programs in every interleaving. Returns the number of states, and true if a page is lost in any of them:
/// the last version of its data is not copied, and its bit is not left for the last harvest.
fn explore(programs: &[Vec<Op>], page_of: [usize; DATA]) -> (usize, bool) {
    let threads = programs.iter().map(|_| Thread { at: 0, reg: 0, buffer: Vec::new() }).collect();
    let mut todo = vec![State { memory: [0; DATA + 1], copy: [0; DATA], threads }];
    let (mut seen, mut lost) = (HashSet::new(), false);
    while let Some(state) = todo.pop() {
        let mut finished = true;
        for (thread, program) in programs.iter().enumerate() {
            let step = program.get(state.threads[thread].at).map(|op| state.step(thread, *op, page_of));
            finished &= step.is_none() && state.threads[thread].buffer.is_empty();
            let next = step.flatten().into_iter().chain(state.drain(thread));
            todo.extend(next.filter(|next| seen.insert(next.clone())));
        }
        if finished {
            let left = state.memory[LOG];
            lost |= (0..DATA).any(|at| state.copy[at] != state.memory[at] && left >> page_of[at] & 1 == 0);
        }
    }
    (seen.len(), lost)
}

/// `Log::mark`: the locked operation is the fence.
fn mark(page: usize) -> Vec<Op> {
    vec![Op::Write(page), Op::Or(page)]
}

/// `Log::burst` and `Burst::mark`.
fn burst(page: usize) -> Vec<Op> {
    vec![Op::Write(page), Op::Fence, Op::LoadLog, Op::OrUnlessSeen(page)]
}

/// `Log::harvest`, and the copying of the pages after it.
fn harvest() -> Vec<Op> {
    vec![Op::LoadLog, Op::Swap, Op::Fence, Op::CopyPages]
}

fn lost_in(page_of: [usize; DATA], writers: [Vec<Op>; 2], harvester: Vec<Op>) -> bool {
    let programs = [writers[0].repeat(2), writers[1].repeat(2), harvester.repeat(3)];
    let (states, lost) = explore(&programs, page_of);
    assert!(states > 2000, "only {states} states: the model does not interleave");
    lost
}

fn lost(writers: [Vec<Op>; 2], harvester: Vec<Op>) -> bool {
    lost_in(APART, writers, harvester)
}

#[test]
fn no_page_is_lost_in_any_interleaving() {
    assert!(!lost([mark(0), mark(1)], harvest()));
    assert!(!lost([burst(0), mark(1)], harvest()));
    assert!(!lost([burst(0), burst(1)], harvest()));
}

#[test]
fn no_version_of_a_page_with_two_writers_is_lost() {
    let burst = |data| vec![Op::Write(data), Op::Fence, Op::LoadLog, Op::OrUnlessSeen(0)];
    let mark = |data| vec![Op::Write(data), Op::Or(0)];
    assert!(!lost_in(SHARED, [burst(0), burst(1)], harvest()));
    assert!(!lost_in(SHARED, [burst(0), mark(1)], harvest()));
    let unfenced = vec![Op::Write(0), Op::LoadLog, Op::OrUnlessSeen(0)];
    assert!(lost_in(SHARED, [unfenced, mark(1)], harvest()));
}

#[test]
fn one_fence_is_enough_for_many_marks_of_a_burst() {
    let both =
        vec![Op::Write(0), Op::Write(1), Op::Fence, Op::LoadLog, Op::OrUnlessSeen(0), Op::LoadLog, Op::OrUnlessSeen(1)];
    assert!(!lost([both, burst(1)], harvest()));
}

#[test]
fn a_burst_without_a_fence_loses_a_page() {
    let unfenced = vec![Op::Write(0), Op::LoadLog, Op::OrUnlessSeen(0)];
    assert!(lost([unfenced, mark(1)], harvest()));
}

#[test]
fn a_burst_with_the_fence_before_the_data_loses_a_page() {
    let early = vec![Op::Fence, Op::Write(0), Op::LoadLog, Op::OrUnlessSeen(0)];
    assert!(lost([early, mark(1)], harvest()));
}

#[test]
fn a_mark_before_the_data_loses_a_page() {
    assert!(lost([vec![Op::Or(0), Op::Write(0), Op::Fence], mark(1)], harvest()));
}

#[test]
fn a_mark_without_a_locked_operation_loses_a_page() {
    let racy = vec![Op::Write(0), Op::Fence, Op::LoadLog, Op::StoreOr(0), Op::Fence];
    assert!(lost([racy, mark(1)], harvest()));
}

#[test]
fn a_harvest_without_a_swap_loses_a_page() {
    let racy = vec![Op::LoadLog, Op::StoreZero, Op::Fence, Op::CopyPages];
    assert!(lost([mark(0), mark(1)], racy));
}

#[test]
fn a_harvest_that_copies_before_the_swap_loses_a_page() {
    assert!(lost([mark(0), mark(1)], vec![Op::LoadLog, Op::CopyPages, Op::Swap]));
}
