//! The dirty bitmap of a device built with rust-vmm's `vhost-user-backend`: `type Bitmap = RegionBitmap`.
//!
//! That crate makes a bitmap for each region of guest memory without the region's address, and passes the log to it
//! later. Its own `BitmapMmapRegion` misses writes to memory that is added after the log, and marks also while LOG_ALL
//! is off. Here a [`DeviceLog`] provides address and LOG_ALL to all bitmaps of a device. A bitmap without a `DeviceLog`
//! marks from SET_LOG_BASE on and never stops.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestMemoryRegionBytes};

use crate::abi::vhost_user::VHOST_F_LOG_ALL;
use crate::abi::virtio::VirtioFeatures;
use crate::memory::LOG_PAGE;

/// The dirty log of a device, and the state of LOG_ALL. Clones share both.
///
/// A device keeps one and calls [`acked_features`](DeviceLog::acked_features) and
/// [`update_memory`](DeviceLog::update_memory) from its own methods of the same names.
#[derive(Clone, Debug, Default)]
pub struct DeviceLog(Arc<RwLock<DeviceLogState>>);

#[derive(Debug, Default)]
struct DeviceLogState {
    /// True if LOG_ALL is acknowledged.
    log_all: bool,
    log: Option<LogMemory>,
}

impl DeviceLog {
    /// The state before LOG_ALL and SET_LOG_BASE: no logging and no log.
    pub fn new() -> DeviceLog {
        DeviceLog::default()
    }

    /// Switches logging on or off by LOG_ALL in `features`. When this returns, all later writes are marked, or none is
    /// (rules L7.2, L7.3). Switching off drops the log, which the front-end releases then.
    pub fn acked_features(&self, features: VirtioFeatures) {
        let log_all = features.contains(VHOST_F_LOG_ALL);
        let mut state = self.write();
        if !log_all && std::mem::replace(&mut state.log_all, log_all) {
            state.log = None;
        }
        state.log_all = log_all;
    }

    /// Attaches the regions of a new memory table, for which an installed log stays in use (rule L9.2). Writes to these
    /// regions before this call are marked now.
    pub fn update_memory(&self, memory: &GuestMemoryMmap<RegionBitmap>) {
        for region in memory.iter() {
            // `region.bitmap()` returns a slice, so the mapping is asked for the bitmap.
            region.get_mmap().bitmap().0.attach(self, region.start_addr().0);
        }
    }

    /// Marks pages if logging is on. Returns false if logging is on and there is no log yet.
    fn mark(&self, gpa: u64, len: u64) -> bool {
        match &*self.read() {
            DeviceLogState { log_all: false, .. } => true,
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

/// The part of a [`RegionBitmap`] that belongs to a view of guest memory.
#[derive(Clone, Debug)]
pub struct RegionSlice {
    region: Arc<AttachedRegion>,
    offset: u64,
}

#[derive(Debug, Default)]
struct AttachedRegion {
    /// The device's log and the guest-physical start of the region, once they are known.
    attachment: OnceLock<(DeviceLog, u64)>,
    /// One bit per page that was written before the attachment or the log was there.
    pending: Box<[AtomicU64]>,
}

impl AttachedRegion {
    fn mark(&self, offset: u64, len: u64) {
        if len == 0 || self.try_mark(offset, len) {
            return;
        }
        for page in offset / LOG_PAGE..=offset.saturating_add(len - 1) / LOG_PAGE {
            let Some(word) = self.pending.get((page / 64) as usize) else { break };
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
        // Pairs with the fence of `flush`. A thread that concurrently sets the attachment or the log flushes
        // afterwards: either it sees these bits, or the call below sees the attachment and the log.
        fence(Ordering::SeqCst);
        self.try_mark(offset, len);
    }

    /// Marks pages in the log. Returns false if the attachment or the log is missing.
    fn try_mark(&self, offset: u64, len: u64) -> bool {
        self.attachment.get().is_some_and(|(log, base)| log.mark(base.saturating_add(offset), len))
    }

    fn attach(&self, log: &DeviceLog, base: u64) {
        // A region that was in the table before is attached already.
        let _ = self.attachment.set((log.clone(), base));
        self.flush();
    }

    /// Marks the pending pages if there is a log, and drops them if logging is off.
    fn flush(&self) {
        fence(Ordering::SeqCst);
        for (index, word) in (0u64..).zip(&self.pending) {
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
        let pending = (0..words).map(|_| AtomicU64::new(0)).collect();
        RegionBitmap(Arc::new(AttachedRegion { attachment: OnceLock::new(), pending }))
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
        self.region.attachment.get().is_some_and(|(log, base)| match &log.read().log {
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
        let (device, _) = self.0.attachment.get_or_init(|| {
            // The device has no `DeviceLog` of its own, so LOG_ALL is not known: the log is used.
            let device = DeviceLog::new();
            device.write().log_all = true;
            (device, log.base)
        });
        device.write().log = Some(log);
        self.0.flush();
    }
}

/// The log shared by the front-end.
#[derive(Clone, Debug)]
pub struct LogMemory {
    log: Arc<MmapLogReg>,
    /// Number of pages that the log has a bit for.
    pages: u64,
    /// Guest-physical start of the region that the value was made for.
    base: u64,
}

impl MemRegionBitmap for LogMemory {
    /// Accepts a log of any size. Pages outside it are not marked (rule L6.1).
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<LogMemory> {
        // The crate does not expose the size of a log, but refuses memory that the log does not cover: a binary search.
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
            // Release: the data is visible before the bit (rule L10.1).
            self.log[(page / 8) as usize].fetch_or(1 << (page % 8), Ordering::Release);
        }
    }

    fn is_marked(&self, gpa: u64) -> bool {
        let page = gpa / LOG_PAGE;
        // The crate offers only indexing, which panics beyond the end.
        page < self.pages && self.log[(page / 8) as usize].load(Ordering::Relaxed) >> (page % 8) & 1 == 1
    }
}

/// A region of so many bytes at address 0.
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
