//! The guest's block driver: one queue of a disk, with a workload that knows the expected contents of every sector.
//!
//! Requests in flight never overlap. Data stays in a read buffer until its slot is reused and is then checked again:
//! only the device has written these pages, so that a faulty migration would lose them first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::error::{ByteLocation, GuestError};
use super::layout::{BUFFER_BYTES, GuestConfig, MAX_CHAIN, QueueLayout, SlotLayout};
use super::pattern::{Pattern, Random, SECTOR_WORDS, mix};
use super::state::{BlkDriverState, RequestKind, RequestState, RetainedState, SlotState};
use crate::abi::virtio::{
    BlkRequestHeader, SECTOR_BYTES, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use crate::memory::{Address, GuestAddress, Memory};
use crate::ring::{Buffer, DriverRing, RingError};

/// Sizes of requests in sectors. Half of all requests have 4 KiB.
const SIZES: [u64; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Every 64th request is a flush.
const FLUSH_EVERY: u64 = 64;
/// A status byte that no device writes.
const NO_STATUS: u8 = 0xa5;

/// Counters of a driver, readable by other threads.
#[derive(Debug, Default)]
pub(super) struct DriverCounters {
    pub(super) requests: AtomicU64,
    pub(super) completions: AtomicU64,
    pub(super) outstanding: AtomicU64,
    pub(super) duplicates: AtomicU64,
}

/// Properties of a disk that a driver needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskGeometry {
    pub(super) features: VirtioFeatures,
    /// Bytes.
    pub(super) capacity: u64,
    /// Maximum number of data segments of a request.
    pub(super) segments: u32,
    /// Sectors of a logical block.
    pub(super) block: u64,
}

/// Contents of a disk before the guest's first write.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PriorContents {
    /// True if some sectors were written by a guest with the same seed.
    pub(super) own: bool,
    /// The first other sector that is not blank.
    pub(super) foreign: Option<u64>,
}

pub(super) struct Driver {
    /// Number of the queue, counted across all disks.
    queue: usize,
    memory: Memory,
    layout: QueueLayout,
    pattern: Pattern,
    zero_initialized: bool,
    /// Contents found by a probe in progress.
    prior: Option<PriorContents>,
    depth: u16,
    geometry: DiskGeometry,
    ring: DriverRing,
    first_sector: u64,
    versions: Vec<u32>,
    next_version: u32,
    random: Random,
    slots: Vec<SlotState>,
    /// Submission time of the request in each slot.
    submitted_at: Vec<Instant>,
    requests: u64,
    completions: u64,
    counters: Arc<DriverCounters>,
}

impl Driver {
    /// Creates a driver with an empty ring.
    pub(super) fn new(
        queue: usize,
        memory: &Memory,
        layout: QueueLayout,
        config: &GuestConfig,
        pattern: Pattern,
        disk: DiskGeometry,
    ) -> Result<Driver, GuestError> {
        let ring = DriverRing::new(memory, layout.ring, disk.features);
        let ring = ring.map_err(|source| GuestError::Ring { queue, source })?;
        let queues = u64::from(config.queues);
        let block_bytes = disk.block * SECTOR_BYTES;
        let area = (disk.capacity / queues).min(config.disk_area) / block_bytes * disk.block;
        if area == 0 {
            return Err(GuestError::Config("its disk is too small".into()));
        }
        Ok(Driver {
            queue,
            memory: memory.clone(),
            slots: vec![SlotState::default(); layout.slots.len()],
            submitted_at: vec![Instant::now(); layout.slots.len()],
            layout,
            pattern,
            zero_initialized: config.blank_disks,
            prior: None,
            depth: config.depth,
            geometry: disk,
            ring,
            first_sector: queue as u64 % queues * area,
            versions: vec![0; area as usize],
            next_version: 1,
            random: Random(mix(pattern.seed ^ mix(queue as u64))),
            requests: 0,
            completions: 0,
            counters: Arc::default(),
        })
    }

    /// Creates a driver that continues at `state`.
    pub(super) fn restore(
        queue: usize,
        memory: &Memory,
        layout: QueueLayout,
        config: &GuestConfig,
        pattern: Pattern,
        disk: DiskGeometry,
        state: BlkDriverState,
    ) -> Result<Driver, GuestError> {
        let ring = DriverRing::restore(memory, layout.ring, disk.features, &state.ring);
        let ring = ring.map_err(|source| GuestError::Ring { queue, source })?;
        let mismatch = |what: &str| Err(GuestError::State(format!("queue {queue}: {what}")));
        let sectors = state.versions.len() as u64;
        let buffer = BUFFER_BYTES / SECTOR_BYTES;
        let fits = |sector: u64, count: u64, offset: u64| {
            sector.checked_add(count).is_some_and(|end| end <= sectors)
                && count <= buffer
                && offset <= BUFFER_BYTES - count * SECTOR_BYTES
        };
        let request_fits = |r: &RequestState| fits(r.sector, r.sectors.into(), r.offset);
        let held_fits = |h: &RetainedState| fits(h.sector, h.versions.len() as u64, h.offset);
        if state.slots.len() != layout.slots.len() {
            return mismatch(&format!("{} slots in the state, {} here", state.slots.len(), layout.slots.len()));
        }
        let mut slots = state.slots.iter();
        if !slots.all(|s| s.request.iter().all(request_fits) && s.retained.iter().all(held_fits)) {
            return mismatch("a request that is not on its disk");
        }
        let outstanding = state.slots.iter().filter(|slot| slot.request.is_some()).count();
        if outstanding != usize::from(ring.outstanding()) {
            return mismatch(&format!("{outstanding} requests in the state, {} in its ring", ring.outstanding()));
        }
        let end = state.first_sector.checked_add(sectors);
        if sectors == 0 || end.is_none_or(|end| end > disk.capacity / SECTOR_BYTES) {
            let (first, disk) = (state.first_sector, disk.capacity / SECTOR_BYTES);
            return mismatch(&format!("its {sectors} sectors from {first} are not on the disk, which has {disk}"));
        }
        let driver = Driver {
            queue,
            memory: memory.clone(),
            layout,
            pattern,
            zero_initialized: config.blank_disks,
            prior: None,
            depth: config.depth,
            geometry: disk,
            ring,
            first_sector: state.first_sector,
            versions: state.versions,
            next_version: state.next_version,
            random: Random(state.random),
            submitted_at: vec![Instant::now(); state.slots.len()],
            slots: state.slots,
            requests: state.requests,
            completions: state.completions,
            counters: Arc::default(),
        };
        driver.update_counters();
        Ok(driver)
    }

    pub(super) fn state(&self) -> BlkDriverState {
        BlkDriverState {
            ring: self.ring.state(),
            first_sector: self.first_sector,
            versions: self.versions.clone(),
            next_version: self.next_version,
            random: self.random.0,
            slots: self.slots.clone(),
            requests: self.requests,
            completions: self.completions,
        }
    }

    pub(super) fn counters(&self) -> &Arc<DriverCounters> {
        &self.counters
    }

    /// Restarts the timeouts of all requests, because they could not be answered until now.
    pub(super) fn restart_timeouts(&mut self) {
        self.submitted_at.fill(Instant::now());
    }

    /// Fails if a request has waited longer than `patience`.
    pub(super) fn check_timeouts(&self, patience: Duration) -> Result<(), GuestError> {
        let mut slots = self.slots.iter().zip(&self.submitted_at);
        if !slots.any(|(slot, since)| slot.request.is_some() && since.elapsed() > patience) {
            return Ok(());
        }
        let outstanding = self.ring.outstanding();
        Err(GuestError::LostRequest { queue: self.queue, outstanding, seconds: patience.as_secs() })
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    pub(super) fn outstanding(&self) -> u16 {
        self.ring.outstanding()
    }

    /// Handles and checks all completions. Returns their number.
    pub(super) fn reap(&mut self) -> Result<u64, GuestError> {
        let mut taken = 0;
        let queue = self.queue;
        while let Some(used) = self.ring.pop_used().map_err(|source| self.ring_error(source))? {
            let outstanding = |slot: &SlotState| slot.request.is_some_and(|request| request.head == used.head);
            let Some(slot) = self.slots.iter().position(outstanding) else {
                return Err(GuestError::DuplicateCompletion { queue, head: used.head });
            };
            self.complete(slot)?;
            taken += 1;
        }
        self.completions = self.completions.wrapping_add(taken);
        self.update_counters();
        Ok(taken)
    }

    /// Enables a call for the next completion. Returns true if there is one already.
    pub(super) fn enable_calls(&mut self) -> bool {
        self.ring.enable_notifications()
    }

    /// Adds one random request, if there is a free slot. [`Driver::publish`] makes it visible to the device.
    pub(super) fn submit(&mut self) -> Result<bool, GuestError> {
        if self.ring.outstanding() >= self.depth || self.ring.free() < MAX_CHAIN {
            return Ok(false);
        }
        let start = self.random.below(self.slots.len() as u64) as usize;
        let Some(slot) = self.free_slot(start) else { return Ok(false) };
        let flushes = self.geometry.features.contains(VIRTIO_BLK_F_FLUSH);
        if flushes && self.requests % FLUSH_EVERY == FLUSH_EVERY - 1 {
            self.add(slot, RequestKind::Flush, 0, 0)?;
            return Ok(true);
        }
        let Some((sector, sectors)) = self.pick() else { return Ok(false) };
        let kind = if self.random.below(2) == 0 { RequestKind::Read } else { RequestKind::Write };
        self.add(slot, kind, sector, sectors)?;
        Ok(true)
    }

    /// Makes added requests visible to the device. Returns true if a kick is needed.
    pub(super) fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Adds a read starting at `sector` of the maximum size. Returns the sector after it.
    pub(super) fn submit_scan(&mut self, sector: u64) -> Result<Option<u64>, GuestError> {
        if self.ring.outstanding() >= self.depth || self.ring.free() < MAX_CHAIN {
            return Ok(None);
        }
        let Some(slot) = self.free_slot(0) else { return Ok(None) };
        let sectors = (self.versions.len() as u64 - sector).min(BUFFER_BYTES / SECTOR_BYTES);
        self.add(slot, RequestKind::Read, sector, sectors)?;
        Ok(Some(sector + sectors))
    }

    /// Starts a probe: reads record the contents instead of checking them.
    pub(super) fn begin_probe(&mut self) {
        self.prior = Some(PriorContents::default());
    }

    pub(super) fn end_probe(&mut self) -> PriorContents {
        self.prior.take().unwrap_or_default()
    }

    /// Sets if the disk is zero where the guest has not written.
    pub(super) fn set_blank(&mut self, blank: bool) {
        self.zero_initialized = blank;
    }

    /// Returns the number of sectors of the queue's part of the disk.
    pub(super) fn sectors(&self) -> u64 {
        self.versions.len() as u64
    }

    /// Checks all buffers that still hold data of a read.
    pub(super) fn verify_retained(&self) -> Result<(), GuestError> {
        let slots = self.slots.iter().zip(&self.layout.slots);
        slots.filter_map(|(state, layout)| Some((state.retained.as_ref()?, layout))).try_for_each(|(held, layout)| {
            self.check(layout.data.unchecked_add(held.offset), held.sector, &held.versions)
        })
    }

    /// Chooses a random range that no outstanding request overlaps.
    fn pick(&mut self) -> Option<(u64, u64)> {
        let (block, total) = (self.geometry.block, self.versions.len() as u64);
        for _ in 0..8 {
            let size = SIZES.get(self.random.below(2 * SIZES.len() as u64) as usize).copied().unwrap_or(8);
            let sectors = size.next_multiple_of(block).min(total);
            let sector = self.random.below((total - sectors) / block + 1) * block;
            let mut requests = self.slots.iter().filter_map(|slot| slot.request);
            if requests.all(|r| r.sector + u64::from(r.sectors) <= sector || sector + sectors <= r.sector) {
                return Some((sector, sectors));
            }
        }
        None
    }

    /// Returns the first free slot from `start` on.
    fn free_slot(&self, start: usize) -> Option<usize> {
        let count = self.slots.len();
        (0..count)
            .map(|other| (start + other) % count)
            .find(|slot| self.slots.get(*slot).is_some_and(|state| state.request.is_none()))
    }

    fn add(&mut self, slot: usize, kind: RequestKind, sector: u64, sectors: u64) -> Result<(), GuestError> {
        let Some(&SlotLayout { header, table, status, data }) = self.layout.slots.get(slot) else { return Ok(()) };
        if let Some(held) = self.slots.get_mut(slot).and_then(|state| state.retained.take()) {
            self.check(data.unchecked_add(held.offset), held.sector, &held.versions)?;
        }
        let bytes = sectors * SECTOR_BYTES;
        let offset = self.random.below((BUFFER_BYTES - bytes) / SECTOR_BYTES + 1) * SECTOR_BYTES;
        let request_type = match kind {
            RequestKind::Read => VIRTIO_BLK_T_IN,
            RequestKind::Write => VIRTIO_BLK_T_OUT,
            RequestKind::Flush => VIRTIO_BLK_T_FLUSH,
        };
        let first = if kind == RequestKind::Flush { 0 } else { self.first_sector + sector };
        let head =
            BlkRequestHeader { request_type: U32::new(request_type), ioprio: U32::ZERO, sector: U64::new(first) };
        self.memory.write(header, head.as_bytes())?;
        self.memory.write(status, &[NO_STATUS])?;
        if kind == RequestKind::Write {
            self.write_sectors(data.unchecked_add(offset), sector, sectors)?;
        }
        let mut readable = vec![Buffer { gpa: header, len: 16 }];
        let mut writable = Vec::new();
        let side = if kind == RequestKind::Read { &mut writable } else { &mut readable };
        self.split(data.unchecked_add(offset), bytes, side);
        writable.push(Buffer { gpa: status, len: 1 });
        let indirect = self.geometry.features.contains(VIRTIO_RING_F_INDIRECT_DESC) && self.random.below(2) == 0;
        let added = self.ring.add(&readable, &writable, indirect.then_some(table));
        // There are enough free descriptors for the longest chain.
        let Some(head) = added.map_err(|source| self.ring_error(source))? else { return Ok(()) };
        if let Some(state) = self.slots.get_mut(slot) {
            state.request = Some(RequestState { head, kind, sector, sectors: sectors as u32, offset });
        }
        if let Some(since) = self.submitted_at.get_mut(slot) {
            *since = Instant::now();
        }
        self.requests = self.requests.wrapping_add(1);
        self.update_counters();
        Ok(())
    }

    /// Divides `bytes` at `gpa` into one to four segments.
    fn split(&mut self, mut gpa: GuestAddress, mut bytes: u64, out: &mut Vec<Buffer>) {
        let most = u64::from(self.geometry.segments.clamp(1, u32::from(MAX_CHAIN) - 2));
        let mut parts = 1 + self.random.below(most);
        while bytes > 0 {
            parts -= 1;
            let here = if parts == 0 { bytes } else { (1 + self.random.below(bytes / SECTOR_BYTES)) * SECTOR_BYTES };
            out.push(Buffer { gpa, len: here as u32 });
            (gpa, bytes) = (gpa.unchecked_add(here), bytes - here);
        }
    }

    /// Assigns sectors a new version and writes their contents to `gpa`.
    fn write_sectors(&mut self, gpa: GuestAddress, sector: u64, sectors: u64) -> Result<(), GuestError> {
        let version = self.next_version;
        // Wraps after 2^32 - 1 writes; 0 stays "never written".
        self.next_version = self.next_version.checked_add(1).unwrap_or(1);
        let mut words = [0; SECTOR_WORDS];
        for at in 0..sectors {
            self.pattern.fill(self.disk_offset(sector + at), version.into(), &mut words);
            self.memory.write(gpa.unchecked_add(at * SECTOR_BYTES), words.as_bytes())?;
            if let Some(known) = self.versions.get_mut((sector + at) as usize) {
                *known = version;
            }
        }
        Ok(())
    }

    fn complete(&mut self, slot: usize) -> Result<(), GuestError> {
        let (Some(state), Some(layout)) = (self.slots.get_mut(slot), self.layout.slots.get(slot)) else {
            return Ok(());
        };
        let Some(request) = state.request.take() else { return Ok(()) };
        let mut status = [NO_STATUS];
        self.memory.read(layout.status, &mut status)?;
        let ([status], sector, sectors) = (status, self.first_sector + request.sector, request.sectors);
        let kind = match request.kind {
            RequestKind::Read => "a read",
            RequestKind::Write => "a write",
            RequestKind::Flush => "a flush",
        };
        if status != VIRTIO_BLK_S_OK {
            return Err(GuestError::Io { kind, sector, sectors, status });
        }
        if request.kind != RequestKind::Read {
            return Ok(());
        }
        let range = request.sector as usize..request.sector as usize + sectors as usize;
        let versions = self.versions.get(range).unwrap_or_default().to_vec();
        let gpa = layout.data.unchecked_add(request.offset);
        if self.prior.is_some() {
            return self.record_contents(gpa, request.sector, sectors);
        }
        self.check(gpa, request.sector, &versions)?;
        if let Some(state) = self.slots.get_mut(slot) {
            state.retained = Some(RetainedState { sector: request.sector, offset: request.offset, versions });
        }
        Ok(())
    }

    /// Records the contents of the sectors from `sector` on, which were read to `gpa`.
    fn record_contents(&mut self, gpa: GuestAddress, sector: u64, sectors: u32) -> Result<(), GuestError> {
        let mut words = [0; SECTOR_WORDS];
        for at in 0..sectors.into() {
            self.memory.read(gpa.unchecked_add(at * SECTOR_BYTES), words.as_mut_bytes())?;
            let own = self.pattern.has_written(self.disk_offset(sector + at), &words);
            let Some(survey) = self.prior.as_mut().filter(|_| words != [0; SECTOR_WORDS]) else { continue };
            match own {
                true => survey.own = true,
                false => survey.foreign = survey.foreign.or(Some(self.first_sector + sector + at)),
            }
        }
        Ok(())
    }

    /// Checks that the sectors at `gpa` have these versions.
    fn check(&self, gpa: GuestAddress, sector: u64, versions: &[u32]) -> Result<(), GuestError> {
        let mut words = [0; SECTOR_WORDS];
        for (at, &version) in (0..).zip(versions) {
            if version == 0 && !self.zero_initialized {
                continue;
            }
            let (gpa, offset) = (gpa.unchecked_add(at * SECTOR_BYTES), self.disk_offset(sector + at));
            self.memory.read(gpa, words.as_mut_bytes())?;
            let place = |byte| ByteLocation::Buffer(gpa.unchecked_add(byte), offset + byte);
            self.pattern.check(offset, version.into(), self.zero_initialized, &words, place)?;
        }
        Ok(())
    }

    fn disk_offset(&self, sector: u64) -> u64 {
        (self.first_sector + sector) * SECTOR_BYTES
    }

    fn ring_error(&self, source: RingError) -> GuestError {
        match source {
            RingError::UsedId { id } => {
                self.counters.duplicates.fetch_add(1, Ordering::Relaxed);
                GuestError::DuplicateCompletion { queue: self.queue, head: id as u16 }
            }
            source => {
                if matches!(source, RingError::UsedIndex { .. }) {
                    self.counters.duplicates.fetch_add(1, Ordering::Relaxed);
                }
                GuestError::Ring { queue: self.queue, source }
            }
        }
    }

    fn update_counters(&self) {
        self.counters.requests.store(self.requests, Ordering::Relaxed);
        self.counters.completions.store(self.completions, Ordering::Relaxed);
        self.counters.outstanding.store(self.ring.outstanding().into(), Ordering::Relaxed);
    }
}
