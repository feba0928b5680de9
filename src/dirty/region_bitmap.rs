//! The dirty bitmap of a device made of rust-vmm's `vhost-user-backend`: `type Bitmap = RegionBitmap`.
//!
//! That crate makes a bitmap for each region of guest memory, without a place, and tells it of the log later. Its own
//! `BitmapMmapRegion` then misses what is written into memory that comes after the log, and marks whether or not LOG_ALL
//! is on. Here a [`DeviceLog`] brings both together. A bitmap without one begins to mark with SET_LOG_BASE and does not end.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestMemoryRegionBytes};

use crate::abi::bit;
use crate::abi::vhost_user::VHOST_F_LOG_ALL;
use crate::memory::LOG_PAGE;

/// The log of a device, and whether it is in use. Clones are one log.
///
/// A device keeps one, and passes on what its daemon tells it: call [`acked_features`](DeviceLog::acked_features) and
/// [`update_memory`](DeviceLog::update_memory) from the methods of the same names.
#[derive(Clone, Debug, Default)]
pub struct DeviceLog(Arc<RwLock<DeviceLogState>>);

#[derive(Debug, Default)]
struct DeviceLogState {
    /// LOG_ALL.
    on: bool,
    log: Option<LogMemory>,
}

impl DeviceLog {
    /// A log that is off, and not there.
    pub fn new() -> DeviceLog {
        DeviceLog::default()
    }

    /// Takes over LOG_ALL: when this returns, all later writes are marked, or none is (rules L7.2, L7.3). The end of logging is the end
    /// of its log, which the front-end then releases.
    pub fn acked_features(&self, features: u64) {
        let on = features & bit(VHOST_F_LOG_ALL) != 0;
        let mut state = self.write();
        if !on && std::mem::replace(&mut state.on, on) {
            state.log = None;
        }
        state.on = on;
    }

    /// Takes over a new memory table, in which a log that is there goes on (rule L9.2). What was written to its regions
    /// before this call is marked now.
    pub fn update_memory(&self, memory: &GuestMemoryMmap<RegionBitmap>) {
        for region in memory.iter() {
            // The region's own method would give a slice.
            region.get_mmap().bitmap().0.attach(self, region.start_addr().0);
        }
    }

    /// Marks pages if it is on. Returns false if it is on and has no log yet.
    fn mark(&self, gpa: u64, len: u64) -> bool {
        match &*self.read() {
            DeviceLogState { on: false, .. } => true,
            DeviceLogState { log: Some(log), .. } => {
                log.mark(gpa, len);
                true
            }
            DeviceLogState { log: None, .. } => false,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, DeviceLogState> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, DeviceLogState> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bitmap of one region of guest memory.
#[derive(Clone, Debug, Default)]
pub struct RegionBitmap(Arc<AttachedRegion>);

/// Part of a [`RegionBitmap`], as views of guest memory carry it.
#[derive(Clone, Debug)]
pub struct RegionSlice {
    region: Arc<AttachedRegion>,
    offset: u64,
}

#[derive(Debug, Default)]
struct AttachedRegion {
    place: OnceLock<(DeviceLog, u64)>,
    /// Pages written before there was a place or a log: a bit for each.
    early: Box<[AtomicU64]>,
}

impl AttachedRegion {
    fn mark(&self, offset: u64, len: u64) {
        if len == 0 || self.try_mark(offset, len) {
            return;
        }
        for page in offset / LOG_PAGE..=offset.saturating_add(len - 1) / LOG_PAGE {
            let Some(word) = self.early.get((page / 64) as usize) else { break };
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
        // Whoever brings place or log meanwhile looks here after it did so; either sees the other.
        fence(Ordering::SeqCst);
        self.try_mark(offset, len);
    }

    fn try_mark(&self, offset: u64, len: u64) -> bool {
        self.place.get().is_some_and(|(log, base)| log.mark(base.saturating_add(offset), len))
    }

    fn attach(&self, log: &DeviceLog, base: u64) {
        // A region that stays in the table has its place already.
        let _ = self.place.set((log.clone(), base));
        self.flush();
    }

    /// Marks what was written early, if there is a log by now; forgets it if logging is off.
    fn flush(&self) {
        fence(Ordering::SeqCst);
        for (index, word) in (0u64..).zip(&self.early) {
            let bits = word.swap(0, Ordering::Relaxed);
            for page in (0..64).filter(|page| bits >> page & 1 == 1).map(|page| index * 64 + page) {
                if !self.try_mark(page * LOG_PAGE, LOG_PAGE) {
                    word.fetch_or(1 << (page % 64), Ordering::Relaxed);
                }
            }
        }
    }
}

impl NewBitmap for RegionBitmap {
    fn with_len(len: usize) -> RegionBitmap {
        let words = (len as u64).div_ceil(64 * LOG_PAGE);
        let early = (0..words).map(|_| AtomicU64::new(0)).collect();
        RegionBitmap(Arc::new(AttachedRegion { place: OnceLock::new(), early }))
    }
}

impl WithBitmapSlice<'_> for RegionBitmap {
    type S = RegionSlice;
}

impl Bitmap for RegionBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark(offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(offset).dirty_at(0)
    }

    fn slice_at(&self, offset: usize) -> RegionSlice {
        RegionSlice { region: Arc::clone(&self.0), offset: offset as u64 }
    }
}

impl WithBitmapSlice<'_> for RegionSlice {
    type S = RegionSlice;
}

impl BitmapSlice for RegionSlice {}

impl Bitmap for RegionSlice {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.region.mark(self.offset.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let offset = self.offset.saturating_add(offset as u64);
        self.region.place.get().is_some_and(|(log, base)| match &log.read().log {
            Some(log) => log.is_marked(base.saturating_add(offset)),
            None => false,
        })
    }

    fn slice_at(&self, offset: usize) -> RegionSlice {
        RegionSlice { region: Arc::clone(&self.region), offset: self.offset.saturating_add(offset as u64) }
    }
}

impl BitmapReplace for RegionBitmap {
    type InnerBitmap = LogMemory;

    /// Installs the log of a SET_LOG_BASE, for all regions of the device.
    fn replace(&self, log: LogMemory) {
        let (device, _) = self.0.place.get_or_init(|| {
            // A device that tells nothing of its features: a log that comes is used.
            let device = DeviceLog::new();
            device.write().on = true;
            (device, log.base)
        });
        device.write().log = Some(log);
        self.0.flush();
    }
}

/// A log as the front-end shares it.
#[derive(Clone, Debug)]
pub struct LogMemory {
    log: Arc<MmapLogReg>,
    /// Pages that it has a bit for.
    pages: u64,
    /// Guest-physical start of the region that it was made for.
    base: u64,
}

impl MemRegionBitmap for LogMemory {
    /// Takes a log of any size: pages outside it are not marked (rule L6.1).
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<LogMemory> {
        // The crate does not say how long a log is, but whether memory up to a page fits.
        let fits = |pages: u64| AtomicBitmapMmap::new(&Span(pages * LOG_PAGE), Arc::clone(&log)).is_ok();
        let (mut pages, mut too_many) = (0, 1 << 40);
        while pages + 1 < too_many {
            let middle = (pages + too_many) / 2;
            *(if fits(middle) { &mut pages } else { &mut too_many }) = middle;
        }
        Ok(LogMemory { log, pages, base: region.start_addr().0 })
    }
}

impl LogMemory {
    fn mark(&self, gpa: u64, len: u64) {
        let last = gpa.saturating_add(len.saturating_sub(1)) / LOG_PAGE;
        for page in gpa / LOG_PAGE..self.pages.min(last + 1) {
            // After the data (rule L10.1).
            self.log[(page / 8) as usize].fetch_or(1 << (page % 8), Ordering::Release);
        }
    }

    fn is_marked(&self, gpa: u64) -> bool {
        let page = gpa / LOG_PAGE;
        // Indexing is all that the crate has, and fails behind the end.
        page < self.pages && self.log[(page / 8) as usize].load(Ordering::Relaxed) >> (page % 8) & 1 == 1
    }
}

/// So many bytes from address 0 on.
struct Span(u64);

impl GuestMemoryRegion for Span {
    type B = ();

    fn len(&self) -> u64 {
        self.0
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }

    fn bitmap(&self) -> BS<'_, ()> {}
}

impl GuestMemoryRegionBytes for Span {}
