//! Pages of guest memory: hashes, changes, and their roles.

use std::collections::BTreeSet;

use twox_hash::XxHash3_64;

use super::{FRAMES, FRAMES_BYTES, HEAD, HEADS, Harness, MAX_REQUESTS};
use crate::check::CheckAbort;
use crate::check::queue::DriverQueue;
use crate::dirty::{Log, PageSet};
use crate::memory::{LOG_PAGE, Memory};

pub(in crate::check) type Pages = BTreeSet<u64>;

impl Harness {
    /// Returns a hash of every page of guest memory.
    pub(in crate::check) fn hashes(&self) -> Result<Vec<(u64, u64)>, CheckAbort> {
        let regions = self.memory.regions().iter();
        hashes(&self.memory, regions.flat_map(|region| pages(region.gpa(), region.size())))
    }

    /// Returns hashes of some pages.
    pub(in crate::check) fn hashes_of(&self, pages: &Pages) -> Result<Vec<(u64, u64)>, CheckAbort> {
        hashes(&self.memory, pages.iter().copied())
    }

    /// Returns hashes of all pages in the driver's view.
    pub(in crate::check) fn driver_view_hashes(&self) -> Result<Vec<(u64, u64)>, CheckAbort> {
        let regions = self.view().regions().iter();
        hashes(self.view(), regions.flat_map(|region| pages(region.gpa(), region.size())))
    }

    /// Returns the pages that only the driver writes.
    pub(in crate::check) fn driver_pages(&self) -> Pages {
        let rings = self.all().flat_map(DriverQueue::driver_pages);
        self.guest_pages(rings.chain(pages(HEADS, MAX_REQUESTS * HEAD)).chain(pages(FRAMES, FRAMES_BYTES))).collect()
    }

    /// Returns the pages that are written to inject frames: frames and the other rings.
    pub(in crate::check) fn frame_source_pages(&self) -> Pages {
        let rings = self.other_direction.iter().flat_map(|queue| &queue.driver_pages() | &queue.device_pages());
        rings.chain(pages(FRAMES, FRAMES_BYTES)).collect()
    }

    /// Returns the pages of all rings that the device writes.
    pub(in crate::check) fn device_pages(&self) -> Pages {
        self.guest_pages(self.all().flat_map(DriverQueue::device_pages)).collect()
    }

    /// Returns the pages of the request rings that the device writes.
    pub(in crate::check) fn request_device_pages(&self) -> Pages {
        self.guest_pages(self.rings().flat_map(DriverQueue::device_pages)).collect()
    }
}

fn hashes(memory: &Memory, pages: impl Iterator<Item = u64>) -> Result<Vec<(u64, u64)>, CheckAbort> {
    let mut bytes = [0; LOG_PAGE as usize];
    let mut hash = |page| {
        memory.read(page * LOG_PAGE, &mut bytes)?;
        Ok((page, XxHash3_64::oneshot(&bytes)))
    };
    pages.map(&mut hash).collect()
}

/// Returns the pages of a non-empty range.
pub(in crate::check) fn pages(gpa: u64, len: u64) -> impl Iterator<Item = u64> {
    gpa / LOG_PAGE..=(gpa + len - 1) / LOG_PAGE
}

/// Returns the pages whose hashes differ.
pub(in crate::check) fn changed(before: &[(u64, u64)], after: &[(u64, u64)]) -> Pages {
    before.iter().zip(after).filter(|(before, after)| before != after).map(|(_, (page, _))| *page).collect()
}

/// Harvests a log. Returns the marked pages.
pub(in crate::check) fn harvest(log: &Log) -> Pages {
    let mut set = PageSet::new(log.pages());
    log.harvest(&mut set);
    set.runs().flatten().collect()
}

/// Returns pseudo-random bytes, different for each `seed`.
pub(in crate::check) fn noise(seed: u64, len: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; len as usize];
    for part in bytes.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        part.copy_from_slice((state ^ state >> 32).to_le_bytes().get(..part.len()).unwrap_or_default());
    }
    bytes
}
