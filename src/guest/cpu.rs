//! A CPU of the guest: writes the pages of its own area in turn and checks pages that it has written before.
//!
//! Step `n` writes version `n / N + 1` of the page that a fixed permutation of the area's `N` pages assigns to `n mod
//! N`. The version of every page therefore follows from the number of steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::IntoBytes;

use super::error::{ByteLocation, GuestError};
use super::layout::Area;
use super::pattern::{PAGE_WORDS, Pattern, mix};
use super::state::CpuState;
use crate::memory::{Address, GuestAddress, Memory};

pub(super) struct Cpu {
    memory: Memory,
    area: Area,
    pattern: Pattern,
    permutation: PagePermutation,
    steps: u64,
    /// Number of steps, readable by other threads.
    counter: Arc<AtomicU64>,
}

impl Cpu {
    /// Creates CPU `number` before its first step. [`Cpu::boot`] writes the initial contents of its pages.
    pub(super) fn new(number: usize, memory: &Memory, area: Area, pattern: Pattern) -> Cpu {
        let order = PagePermutation::new(area.pages(), mix(pattern.seed.wrapping_add(number as u64)));
        Cpu { memory: memory.clone(), area, pattern, permutation: order, steps: 0, counter: Arc::default() }
    }

    pub(super) fn restore(self, state: CpuState) -> Cpu {
        self.counter.store(state.steps, Ordering::Relaxed);
        Cpu { steps: state.steps, ..self }
    }

    pub(super) fn state(&self) -> CpuState {
        CpuState { steps: self.steps }
    }

    /// Writes version 0 of all pages.
    pub(super) fn boot(&self) -> Result<(), GuestError> {
        fill(&self.memory, &self.pattern, &self.area)
    }

    /// Writes the next page and checks another.
    pub(super) fn step(&mut self) -> Result<(), GuestError> {
        let pages = self.area.pages();
        let gpa = self.area.page(self.permutation.page(self.steps % pages));
        let mut page = [0; PAGE_WORDS];
        self.pattern.fill(gpa.0, (self.steps / pages).wrapping_add(1), &mut page);
        self.memory.write(gpa, page.as_bytes())?;
        self.steps = self.steps.wrapping_add(1);
        self.counter.store(self.steps, Ordering::Relaxed);
        self.check(mix(self.steps) % pages)
    }

    /// Checks every page.
    pub(super) fn verify(&self) -> Result<(), GuestError> {
        (0..self.area.pages()).try_for_each(|turn| self.check(turn))
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    pub(super) fn counter(&self) -> &Arc<AtomicU64> {
        &self.counter
    }

    /// Checks the page written at steps `turn`, `turn + N` and so on.
    fn check(&self, turn: u64) -> Result<(), GuestError> {
        let version = self.steps.checked_sub(turn + 1).map_or(0, |since| (since / self.area.pages()).wrapping_add(1));
        check(&self.memory, &self.pattern, self.area.page(self.permutation.page(turn)), version, false)
    }
}

/// Writes version 0 of all pages of `area`.
pub(super) fn fill(memory: &Memory, pattern: &Pattern, area: &Area) -> Result<(), GuestError> {
    let mut page = [0; PAGE_WORDS];
    area.iter().try_for_each(|gpa| {
        pattern.fill(gpa.0, 0, &mut page);
        Ok(memory.write(gpa, page.as_bytes())?)
    })
}

/// Checks the page at `gpa`. A `blank` page is zero at version 0.
pub(super) fn check(
    memory: &Memory,
    pattern: &Pattern,
    gpa: GuestAddress,
    version: u64,
    blank: bool,
) -> Result<(), GuestError> {
    let mut page = [0; PAGE_WORDS];
    memory.read(gpa, page.as_mut_bytes())?;
    Ok(pattern.check(gpa.0, version, blank, &page, |offset| ByteLocation::Memory(gpa.unchecked_add(offset)))?)
}

/// A permutation of `0..pages`, of the form `a * turn + b`.
struct PagePermutation {
    pages: u64,
    a: u64,
    b: u64,
}

impl PagePermutation {
    fn new(pages: u64, random: u64) -> PagePermutation {
        let coprime = |a: &u64| gcd(*a, pages) == 1;
        // Near the golden section, so that successive pages are far apart in memory.
        let golden = (u128::from(pages) * 618 / 1000) as u64;
        PagePermutation { pages, a: (golden.max(1)..).find(coprime).unwrap_or(1), b: random % pages.max(1) }
    }

    fn page(&self, turn: u64) -> u64 {
        let sum = u128::from(self.a) * u128::from(turn) + u128::from(self.b);
        (sum % u128::from(self.pages.max(1))) as u64
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_permutation_visits_every_page_once() {
        for pages in [1, 2, 3, 64, 1000, 4095] {
            let order = PagePermutation::new(pages, 12345);
            let mut seen: Vec<u64> = (0..pages).map(|turn| order.page(turn)).collect();
            seen.sort();
            assert!(seen.into_iter().eq(0..pages), "{pages} pages");
        }
    }
}
