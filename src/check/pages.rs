//! Pages of guest memory: hashes, changes and marks.

use std::collections::BTreeSet;

use twox_hash::XxHash3_64;

use super::outcome::CheckAbort;
use crate::dirty::{Log, PageSet};
use crate::memory::{GuestAddress, LOG_PAGE, Memory};

/// Numbers of pages.
pub(super) type Pages = BTreeSet<u64>;

/// Returns a hash of each page.
pub(super) fn hashes(memory: &Memory, pages: impl Iterator<Item = u64>) -> Result<Vec<(u64, u64)>, CheckAbort> {
    let mut bytes = [0; LOG_PAGE as usize];
    let mut hash = |page| {
        memory.read(GuestAddress(page * LOG_PAGE), &mut bytes)?;
        Ok((page, XxHash3_64::oneshot(&bytes)))
    };
    pages.map(&mut hash).collect()
}

/// Returns the pages of a non-empty range.
pub(super) fn pages(gpa: GuestAddress, len: u64) -> impl Iterator<Item = u64> {
    gpa.0 / LOG_PAGE..=(gpa.0 + len - 1) / LOG_PAGE
}

/// Returns the pages whose hashes differ.
pub(super) fn changed(before: &[(u64, u64)], after: &[(u64, u64)]) -> Pages {
    before.iter().zip(after).filter(|(before, after)| before != after).map(|(_, (page, _))| *page).collect()
}

/// Harvests a log. Returns the marked pages.
pub(super) fn harvest(log: &Log) -> Pages {
    let mut set = PageSet::new(log.pages());
    log.harvest(&mut set);
    set.iter().map(|page| page.0).collect()
}

/// Returns pseudo-random bytes, different for each `seed`.
pub(super) fn noise(seed: u64, len: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; len as usize];
    for part in bytes.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        part.copy_from_slice((state ^ state >> 32).to_le_bytes().get(..part.len()).unwrap_or_default());
    }
    bytes
}
