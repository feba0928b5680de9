//! Pages of the harness's memory: hashes and roles.

use super::{FRAMES, FRAMES_BYTES, HEAD, HEADS, Harness, MAX_REQUESTS};
use crate::check::outcome::CheckAbort;
use crate::check::pages::{Pages, hashes, pages};
use crate::check::queue::DriverQueue;

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
