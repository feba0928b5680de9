//! Layout of guest memory: a pure function of the configuration, the same on every host.
//!
//! Rings, buffers and the CPUs' areas are spread over all regions, so that translation, logging and migration are
//! exercised in each. Areas do not overlap.

use super::error::GuestError;
use crate::abi::virtio::{VIRTIO_F_RING_PACKED, VirtioFeatures};
use crate::memory::{Address, GuestAddress, LOG_PAGE};
use crate::ring::RingLayout;

/// Start of the second region.
const HIGH_MEMORY_START: u64 = 4 << 30;
/// Maximum end of the low region. The hole behind it is reserved for devices, as on real machines.
const LOW_MEMORY_END: u64 = 3 << 30;
/// Maximum memory of a guest, bytes.
const MAX_MEMORY: u64 = 1 << 52;
/// Size of the largest request, bytes.
pub(super) const BUFFER_BYTES: u64 = 64 << 10;
/// Maximum number of descriptors of a request: header, data in up to four segments, status.
pub(super) const MAX_CHAIN: u16 = 6;

/// Configuration of a guest and its workload.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GuestConfig {
    /// Memory, bytes; a multiple of the page size.
    pub memory: u64,
    /// Part of the memory above 4 GiB, bytes. Memory that does not fit below 3 GiB is there in any case.
    pub high: u64,
    /// Allocate all memory at the start.
    pub prefault: bool,
    /// Number of CPUs, which write memory.
    pub cpus: usize,
    /// Memory that all CPUs together write repeatedly, bytes.
    pub working_set: u64,
    /// Memory that is written once, at boot, bytes. The remaining memory is never written.
    pub cold: u64,
    /// Write rate of all CPUs together, bytes per second.
    pub dirty_rate: u64,
    /// Number of every eight 8-byte words that are equal in their page or sector; 0 is incompressible.
    pub repeated: u8,
    /// Number of disks.
    pub disks: usize,
    /// Number of queues of each disk.
    pub queues: u16,
    /// Size of each queue.
    pub queue_size: u16,
    /// True for packed rings.
    pub packed: bool,
    /// True if requests in flight at a stop are left to the device that takes over (rule I8.1).
    pub inflight_migration: bool,
    /// Maximum number of requests in flight of each queue.
    pub depth: u16,
    /// Requests per second of each queue; `None` for no limit.
    pub request_rate: Option<u64>,
    /// Part of the disk that each queue uses, bytes; less if the disk is smaller.
    pub disk_area: u64,
    /// True if disks are zero where the guest has not written.
    pub blank_disks: bool,
    /// Time after which a request counts as lost, seconds.
    pub request_timeout: u64,
    /// Time after which an unavailable back-end fails the guest, seconds; `None` waits for ever.
    pub reconnect_timeout: Option<u64>,
    /// Seed of all random numbers.
    pub seed: u64,
}

impl GuestConfig {
    /// Configures a guest with `memory` bytes of memory, a quarter of it above 4 GiB, one CPU that dirties 200 MiB/s in
    /// a quarter of it, and one disk with two queues.
    pub fn new(memory: u64) -> GuestConfig {
        let pages = memory / LOG_PAGE;
        GuestConfig {
            memory: pages * LOG_PAGE,
            high: pages / 4 * LOG_PAGE,
            prefault: false,
            cpus: 1,
            working_set: memory / 4,
            cold: memory / 4,
            dirty_rate: 200 << 20,
            repeated: 4,
            disks: 1,
            queues: 2,
            queue_size: 128,
            packed: false,
            inflight_migration: false,
            depth: 16,
            request_rate: None,
            disk_area: 16 << 20,
            blank_disks: true,
            request_timeout: 60,
            reconnect_timeout: None,
            seed: 1,
        }
    }

    /// Checks the configuration.
    ///
    /// # Errors
    /// [`GuestError::Config`] with a text for the user.
    pub fn check(&self) -> Result<(), GuestError> {
        GuestLayout::new(self).map(drop)
    }

    /// Number of pages of one CPU's working set.
    fn cpu_pages(&self) -> u64 {
        self.working_set / self.cpus.max(1) as u64 / LOG_PAGE
    }

    /// Returns the configuration with another memory size. Default fractions of the memory are kept.
    fn resized(&self, memory: u64) -> GuestConfig {
        let (before, now) = (GuestConfig::new(self.memory), GuestConfig::new(memory));
        let part = |of: fn(&GuestConfig) -> u64| if of(self) == of(&before) { of(&now) } else { of(self) };
        let [high, working_set, cold] = [part(|c| c.high), part(|c| c.working_set), part(|c| c.cold)];
        GuestConfig { memory, high: high.min(memory), working_set, cold, ..self.clone() }
    }

    /// Returns the feature bits for the kind of ring.
    pub(super) fn ring_features(&self) -> VirtioFeatures {
        if self.packed { VIRTIO_F_RING_PACKED } else { VirtioFeatures::empty() }
    }

    /// Returns guest-physical address and size of each region, bytes.
    pub fn regions(&self) -> Vec<(GuestAddress, u64)> {
        let low = self.memory.saturating_sub(self.high).min(LOW_MEMORY_END);
        let both = [(0, low), (HIGH_MEMORY_START, self.memory.saturating_sub(low))];
        both.into_iter().filter(|(_, size)| *size > 0).map(|(gpa, size)| (GuestAddress(gpa), size)).collect()
    }

    setters! {
        with_high: high: u64,
        with_prefault: prefault: bool,
        with_cpus: cpus: usize,
        with_working_set: working_set: u64,
        with_cold: cold: u64,
        with_dirty_rate: dirty_rate: u64,
        with_repeated: repeated: u8,
        with_disks: disks: usize,
        with_queues: queues: u16,
        with_queue_size: queue_size: u16,
        with_packed: packed: bool,
        with_inflight_migration: inflight_migration: bool,
        with_depth: depth: u16,
        with_request_rate: request_rate: Option<u64>,
        with_disk_area: disk_area: u64,
        with_blank_disks: blank_disks: bool,
        with_request_timeout: request_timeout: u64,
        with_reconnect_timeout: reconnect_timeout: Option<u64>,
        with_seed: seed: u64,
    }
}

/// Pages of one purpose, in one or more pieces of memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Area {
    /// Guest-physical address and pages of each piece.
    pieces: Vec<(GuestAddress, u64)>,
}

impl Area {
    pub(super) fn pages(&self) -> u64 {
        self.pieces.iter().map(|(_, pages)| pages).sum()
    }

    /// Returns the guest-physical address of page `index`, counted across all pieces.
    pub(super) fn page(&self, mut index: u64) -> GuestAddress {
        for (gpa, pages) in &self.pieces {
            match index.checked_sub(*pages) {
                Some(rest) => index = rest,
                None => return gpa.unchecked_add(index * LOG_PAGE),
            }
        }
        GuestAddress(0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = GuestAddress> {
        self.pieces.iter().flat_map(|(gpa, pages)| (0..*pages).map(move |page| gpa.unchecked_add(page * LOG_PAGE)))
    }
}

/// Memory of one queue of a disk.
#[derive(Clone, Debug)]
pub(super) struct QueueLayout {
    pub(super) ring: RingLayout,
    pub(super) slots: Vec<SlotLayout>,
}

/// Memory of one request slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotLayout {
    pub(super) header: GuestAddress,
    pub(super) table: GuestAddress,
    pub(super) status: GuestAddress,
    pub(super) data: GuestAddress,
}

/// Layout of a guest's memory.
#[derive(Clone, Debug)]
pub(super) struct GuestLayout {
    /// In order of the disks.
    pub(super) queues: Vec<QueueLayout>,
    pub(super) cpus: Vec<Area>,
    pub(super) cold: Area,
    pub(super) zero: Area,
}

impl GuestLayout {
    pub(super) fn new(config: &GuestConfig) -> Result<GuestLayout, GuestError> {
        let impossible = |what: &str| Err(GuestError::Config(what.into()));
        if config.memory == 0 || !config.memory.is_multiple_of(LOG_PAGE) || !config.high.is_multiple_of(LOG_PAGE) {
            return impossible("memory comes in whole pages of 4 KiB, of which there is at least one");
        }
        if config.memory > MAX_MEMORY {
            return impossible("no machine has more than 4 PiB of memory");
        }
        if config.disks > 256 || config.cpus > 4096 {
            return impossible("it has more than 256 disks or 4096 CPUs");
        }
        if config.high > config.memory {
            return impossible("it has less memory than it shall have above 4 GiB");
        }
        if config.disks > 0 && (config.queues == 0 || config.depth == 0) {
            return impossible("a disk needs a queue and a depth of at least 1");
        }
        if config.disks > 0
            && (!config.queue_size.is_power_of_two() || config.queue_size < MAX_CHAIN.next_power_of_two())
        {
            return impossible("a queue has 8 entries or more, a power of two");
        }
        if config.cpus > 0 && config.cpu_pages() == 0 {
            return impossible("every CPU needs at least one page of working set");
        }
        GuestLayout::divide(config).ok_or_else(|| GuestError::Config(too_little_memory(config)))
    }

    /// Divides the memory. Returns `None` if there is too little.
    fn divide(config: &GuestConfig) -> Option<GuestLayout> {
        let mut free = FreeMemory { pieces: config.regions() };
        // The first page stays unused, because address 0 is typical of a missing address.
        free.take(0, LOG_PAGE)?;
        let queues = (0..config.disks * usize::from(config.queues)).map(|queue| free.queue(queue, config));
        let queues = queues.collect::<Option<_>>()?;
        let cpus = (0..config.cpus).map(|_| free.spread(config.cpu_pages())).collect::<Option<_>>()?;
        let cold = free.spread(config.cold / LOG_PAGE)?;
        let zero = Area { pieces: free.pieces.iter().map(|(gpa, bytes)| (*gpa, bytes / LOG_PAGE)).collect() };
        Some(GuestLayout { queues, cpus, cold, zero })
    }
}

/// Describes how much memory the configuration needs.
fn too_little_memory(config: &GuestConfig) -> String {
    let fits = |mib: u64| GuestLayout::divide(&config.resized(mib << 20)).is_some();
    let (mut too_little, mut enough) = (config.memory >> 20, (config.memory >> 20).max(1));
    while !fits(enough) && enough < MAX_MEMORY >> 20 {
        (too_little, enough) = (enough, enough * 2);
    }
    while enough - too_little > 1 {
        let middle = too_little + (enough - too_little) / 2;
        if fits(middle) { enough = middle } else { too_little = middle }
    }
    format!(
        "{} MiB of memory are too little: with {} disks of {} queues ({} entries, depth {}), a working set of {} MiB and {} MiB \
         that are written once it needs {enough} MiB",
        config.memory >> 20,
        config.disks,
        config.queues,
        config.queue_size,
        config.depth,
        config.resized(enough << 20).working_set >> 20,
        config.resized(enough << 20).cold >> 20
    )
}

/// Unassigned memory: address and bytes left of each region.
struct FreeMemory {
    pieces: Vec<(GuestAddress, u64)>,
}

impl FreeMemory {
    /// Allocates whole pages for `bytes` from the region `prefer` (modulo their number), or from another.
    fn take(&mut self, prefer: usize, bytes: u64) -> Option<GuestAddress> {
        let bytes = bytes.next_multiple_of(LOG_PAGE);
        let regions = self.pieces.len();
        let from = (0..regions).map(|other| (prefer + other) % regions);
        for region in from {
            if let Some((gpa, left)) = self.pieces.get_mut(region)
                && *left >= bytes
            {
                let taken = *gpa;
                (*gpa, *left) = (gpa.unchecked_add(bytes), *left - bytes);
                return Some(taken);
            }
        }
        None
    }

    /// Allocates `pages` from all regions in proportion to their remaining memory.
    fn spread(&mut self, pages: u64) -> Option<Area> {
        let (mut area, mut pages) = (Area::default(), pages);
        let mut total: u64 = self.pieces.iter().map(|(_, left)| left / LOG_PAGE).sum();
        if pages > total {
            return None;
        }
        for (gpa, left) in &mut self.pieces {
            let here = *left / LOG_PAGE;
            let part =
                if total == 0 { 0 } else { (u128::from(pages) * u128::from(here)).div_ceil(total.into()) as u64 };
            (pages, total) = (pages - part, total - here);
            if part > 0 {
                area.pieces.push((*gpa, part));
            }
            (*gpa, *left) = (gpa.unchecked_add(part * LOG_PAGE), *left - part * LOG_PAGE);
        }
        Some(area)
    }

    fn queue(&mut self, queue: usize, config: &GuestConfig) -> Option<QueueLayout> {
        let features = config.ring_features();
        let [desc, driver, device] = RingLayout::area_bytes(features, config.queue_size);
        let areas = [self.take(queue, desc)?, self.take(queue, driver)?, self.take(queue + 1, device)?];
        let ring = RingLayout::new(features, config.queue_size, areas);
        // Twice the queue depth, so that read data stays for a while and is checked again.
        let slots = 2 * u64::from(config.depth);
        let (header, table) = (16, 16 * u64::from(MAX_CHAIN));
        let heads = self.take(queue + 1, slots * (header + table))?;
        let statuses = self.take(queue, slots)?;
        let slot = |slot: u64| {
            let head = heads.unchecked_add(slot * (header + table));
            let data = self.take(queue + slot as usize, BUFFER_BYTES)?;
            Some(SlotLayout {
                table: head,
                header: head.unchecked_add(table),
                status: statuses.unchecked_add(slot),
                data,
            })
        };
        Some(QueueLayout { ring, slots: (0..slots).map(slot).collect::<Option<_>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_uses_every_page_once_and_all_regions() {
        let config = GuestConfig { cpus: 3, disks: 2, ..GuestConfig::new(64 << 20) };
        let layout = GuestLayout::new(&config).unwrap();
        let mut pages: Vec<GuestAddress> = Vec::new();
        for area in layout.cpus.iter().chain([&layout.cold, &layout.zero]) {
            assert!(
                area.iter().any(|gpa| gpa.0 < HIGH_MEMORY_START) && area.iter().any(|gpa| gpa.0 >= HIGH_MEMORY_START),
                "{area:x?}"
            );
            assert!((0..area.pages()).map(|index| area.page(index)).eq(area.iter()));
            pages.extend(area.iter());
        }
        for queue in &layout.queues {
            pages.extend(queue.ring.areas());
            pages.extend(
                queue.slots.iter().flat_map(|slot| (0..16).map(|page| slot.data.unchecked_add(page * LOG_PAGE))),
            );
            pages.push(queue.slots[0].status);
            pages.push(queue.slots[0].table);
        }
        let all = pages.len();
        pages.sort();
        pages.dedup();
        assert_eq!(pages.len(), all, "some page has two purposes");
        let known: u64 = config.regions().iter().map(|(_, size)| size / LOG_PAGE).sum();
        assert!((all as u64) < known && known - (all as u64) < 16, "{all} of {known} pages");
        let in_region = |gpa: &GuestAddress, (start, size): &(GuestAddress, u64)| {
            gpa.checked_offset_from(*start).is_some_and(|offset| offset < *size)
        };
        assert!(pages.iter().all(|gpa| config.regions().iter().any(|region| in_region(gpa, region))));
    }

    #[test]
    fn an_impossible_configuration_is_refused_with_a_reason() {
        let config = GuestConfig::new(16 << 20);
        let too = |change: fn(&mut GuestConfig)| {
            let mut config = config.clone();
            change(&mut config);
            GuestLayout::new(&config).unwrap_err().to_string()
        };
        assert!(too(|config| config.cold = 16 << 20).contains("it needs"));
        assert!(too(|config| config.depth = 512).contains("depth 512"));
        assert!(too(|config| config.queue_size = 4).contains("8 entries"));
        assert!(too(|config| config.memory += 1).contains("whole pages"));
        assert!(too(|config| config.working_set = 0).contains("working set"));
    }

    #[test]
    fn too_little_memory_is_refused_with_the_needed_size() {
        for (disks, cold) in [(64, None), (64, Some(1 << 30)), (1, Some(64 << 20))] {
            let mut config = GuestConfig { disks, ..GuestConfig::new(32 << 20) };
            config.cold = cold.unwrap_or(config.cold);
            let message = GuestLayout::new(&config).unwrap_err().to_string();
            let needed: u64 = message.split("it needs ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
            assert!(GuestLayout::new(&config.resized(needed << 20)).is_ok(), "{message}");
            assert!(GuestLayout::new(&config.resized((needed - 1) << 20)).is_err(), "{message}");
        }
    }

    #[test]
    fn memory_beyond_3_gib_lies_above_4_gib() {
        let config = GuestConfig { high: 0, ..GuestConfig::new(5 << 30) };
        assert_eq!(config.regions(), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
        let config = GuestConfig { high: 0, ..GuestConfig::new(1 << 30) };
        assert_eq!(config.regions(), [(GuestAddress(0), 1 << 30)]);
    }
}
