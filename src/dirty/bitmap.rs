//! The shared log as the dirty bitmap of vm-memory, so that any device written over `GuestMemoryMmap<B>` logs into it.
//!
//! A [`LogBitmap`] is the `B` of one memory region and holds the region's guest-physical address. It marks in a fixed
//! log ([`Log`]) or in the log that is currently installed ([`LogSwitch`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::error::DirtyError;
use super::log::Log;
use crate::memory::{Address, GuestAddress};

/// Marks pages by guest-physical address.
pub trait PageMarker: std::fmt::Debug {
    /// Marks the pages of the bytes `gpa..gpa + len`. Call it after they are written.
    fn mark(&self, gpa: GuestAddress, len: u64);
    /// Returns true if the page of `gpa` is marked.
    fn is_marked(&self, gpa: GuestAddress) -> bool;
}

impl PageMarker for Log {
    #[inline]
    fn mark(&self, gpa: GuestAddress, len: u64) {
        Log::mark(self, gpa, len);
    }

    fn is_marked(&self, gpa: GuestAddress) -> bool {
        Log::is_marked(self, gpa)
    }
}

/// The log of a device, which can be installed, exchanged and removed while the device writes.
///
/// Without a log, a write costs one load and a branch that is not taken.
#[derive(Debug)]
pub struct LogSwitch {
    /// True if `log` holds a log. It spares writers the lock while there is none.
    installed: AtomicBool,
    /// Marking locks it shared, so an exchange of the log waits for marks in progress.
    log: RwLock<Option<Arc<Log>>>,
}

impl LogSwitch {
    /// A switch without a log.
    ///
    /// # Errors
    /// [`DirtyError::System`] if the kernel has no `membarrier` (added in Linux 4.14) or a filter forbids it.
    pub fn new() -> Result<LogSwitch, DirtyError> {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
        Ok(LogSwitch { installed: AtomicBool::new(false), log: RwLock::new(None) })
    }

    /// Installs `log`, or removes the log.
    ///
    /// When this returns, no thread marks in the former log any more (rule L9.1), every write that is not marked in the
    /// new log is visible to all threads, and every later write is marked (rule L7.2). Acknowledge the change only
    /// then.
    ///
    /// # Errors
    /// [`DirtyError::System`] if the barrier fails. The log is installed then, but must not be acknowledged.
    pub fn set(&self, log: Option<Arc<Log>>) -> Result<(), DirtyError> {
        {
            let mut current = self.log.write().unwrap_or_else(PoisonError::into_inner);
            self.installed.store(log.is_some(), Ordering::SeqCst);
            *current = log;
        }
        // A writer stores data and then loads `installed` without a fence, so the load may be reordered before the
        // store. membarrier executes the fence in all threads here, so that it costs writers nothing.
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    }

    /// The installed log.
    pub fn log(&self) -> Option<Arc<Log>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cold]
    fn mark_in_log(&self, gpa: GuestAddress, len: u64) {
        if let Some(log) = &*self.log.read().unwrap_or_else(PoisonError::into_inner) {
            log.mark(gpa, len);
        }
    }
}

impl PageMarker for LogSwitch {
    #[inline]
    fn mark(&self, gpa: GuestAddress, len: u64) {
        if self.installed.load(Ordering::Relaxed) {
            self.mark_in_log(gpa, len);
        }
    }

    fn is_marked(&self, gpa: GuestAddress) -> bool {
        self.log().is_some_and(|log| log.is_marked(gpa))
    }
}

fn membarrier(command: i32) -> Result<(), DirtyError> {
    // SAFETY: membarrier takes three integers and accesses no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    Errno::result(result).map(drop).map_err(DirtyError::system("order writers with membarrier (Linux 4.14 or later)"))
}

/// The bitmap of one vm-memory region. It marks pages in a log, at the region's guest-physical address.
///
/// ```
/// use std::sync::Arc;
///
/// use vhost_migrate::dirty::{Log, LogBitmap};
/// use vhost_migrate::memory::GuestAddress;
/// use vm_memory::bitmap::Bitmap;
///
/// let log = Arc::new(Log::create(GuestAddress(1 << 20))?.0);
/// let bitmap = LogBitmap::new(Arc::clone(&log), GuestAddress(0x8000));
/// bitmap.mark_dirty(0x10, 4);
/// assert!(log.is_marked(GuestAddress(0x8010)));
/// # Ok::<(), vhost_migrate::dirty::DirtyError>(())
/// ```
#[derive(Debug)]
pub struct LogBitmap<M = Log> {
    marker: Arc<M>,
    base: GuestAddress,
}

impl<M> LogBitmap<M> {
    /// The bitmap of a region that starts at guest-physical `base`.
    pub fn new(marker: Arc<M>, base: GuestAddress) -> LogBitmap<M> {
        LogBitmap { marker, base }
    }
}

impl<M> Clone for LogBitmap<M> {
    fn clone(&self) -> LogBitmap<M> {
        LogBitmap { marker: Arc::clone(&self.marker), base: self.base }
    }
}

impl<'a, M: PageMarker + 'a> WithBitmapSlice<'a> for LogBitmap<M> {
    type S = LogSlice<'a, M>;
}

impl<M: PageMarker + 'static> Bitmap for LogBitmap<M> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'_, M> {
        LogSlice { marker: &self.marker, base: GuestAddress(self.base.0.wrapping_add(offset as u64)) }
    }
}

/// The part of a [`LogBitmap`] that belongs to a view of guest memory.
#[derive(Debug)]
pub struct LogSlice<'a, M> {
    marker: &'a M,
    base: GuestAddress,
}

impl<M> Clone for LogSlice<'_, M> {
    #[inline]
    fn clone(&self) -> Self {
        LogSlice { marker: self.marker, base: self.base }
    }
}

impl<M: PageMarker> WithBitmapSlice<'_> for LogSlice<'_, M> {
    type S = Self;
}

impl<M: PageMarker> BitmapSlice for LogSlice<'_, M> {}

impl<M: PageMarker> Bitmap for LogSlice<'_, M> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        // Saturating: a wrapped address would mark an unrelated page. The highest address is outside every log, which
        // counts the write there.
        self.marker.mark(GuestAddress(self.base.0.saturating_add(offset as u64)), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.base.checked_add(offset as u64).is_some_and(|gpa| self.marker.is_marked(gpa))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        LogSlice { marker: self.marker, base: GuestAddress(self.base.0.saturating_add(offset as u64)) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, ReadVolatile};

    use super::*;
    use crate::dirty::PageSet;

    const BASES: [u64; 2] = [0, 4 << 30];

    fn memory<M: PageMarker + 'static>(marker: &Arc<M>) -> GuestMemoryMmap<LogBitmap<M>> {
        let region = |base| {
            let bitmap = LogBitmap::new(Arc::clone(marker), GuestAddress(base));
            let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            let builder = MmapRegionBuilder::new_with_bitmap(1 << 20, bitmap).with_mmap_flags(flags);
            let mapping = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(base)).unwrap()
        };
        GuestMemoryMmap::from_regions(BASES.map(region).into()).unwrap()
    }

    fn harvested(log: &Log) -> Vec<u64> {
        let mut set = PageSet::default();
        log.harvest(&mut set);
        set.iter().map(|page| page.0).collect()
    }

    #[test]
    fn every_write_through_vm_memory_is_marked_in_the_log() {
        let log = Arc::new(Log::create(GuestAddress(5 << 30)).unwrap().0);
        let memory = memory(&log);
        let high = BASES[1] >> 12;
        memory.write_slice(&[1; 5000], GuestAddress(4090)).unwrap();
        assert_eq!(harvested(&log), [0, 1, 2]);
        memory.write_obj(7u64, GuestAddress(BASES[1] + 0x3000)).unwrap();
        assert_eq!(harvested(&log), [high + 3]);
        memory.store(7u16, GuestAddress(0x5ffe), Ordering::Release).unwrap();
        assert_eq!(harvested(&log), [5]);
        let mut view = memory.get_slices(GuestAddress(BASES[1] + 0x7fff), 2).next().unwrap().unwrap();
        Cursor::new([1, 2]).read_volatile(&mut view).unwrap();
        assert_eq!(harvested(&log), [high + 7, high + 8]);
        memory.read_obj::<u64>(GuestAddress(0x9000)).unwrap();
        assert!(harvested(&log).is_empty(), "a read is not marked");
        assert_eq!(log.out_of_range(), 0);
    }

    #[test]
    fn a_bitmap_and_its_slices_report_the_marks_at_their_offsets() {
        let log = Arc::new(Log::create(GuestAddress(5 << 30)).unwrap().0);
        let bitmap = LogBitmap::new(Arc::clone(&log), GuestAddress(BASES[1]));
        bitmap.mark_dirty(0x3000, 1);
        bitmap.slice_at(0x4000).slice_at(0x1000).mark_dirty(0xfff, 2);
        let high = BASES[1] >> 12;
        let marked = [0x2fff, 0x3000, 0x3fff, 0x4000, 0x5000, 0x6fff, 0x7000].map(|offset| bitmap.dirty_at(offset));
        assert_eq!(marked, [false, true, true, false, true, true, false]);
        let slice = bitmap.slice_at(0x2000).slice_at(0x1000);
        assert_eq!([0, 0xfff, 0x1000, usize::MAX].map(|offset| slice.dirty_at(offset)), [true, true, false, false]);
        assert_eq!(harvested(&log), [high + 3, high + 5, high + 6]);
    }

    #[test]
    fn a_switch_marks_only_in_the_installed_log() {
        let switch = Arc::new(LogSwitch::new().unwrap());
        let logs = [(); 2].map(|()| Arc::new(Log::create(GuestAddress(5 << 30)).unwrap().0));
        let memory = memory(&switch);
        let write = || memory.write_obj(7u64, GuestAddress(0x3000)).unwrap();
        write();
        assert!(!switch.is_marked(GuestAddress(0x3000)));
        for log in [&logs[0], &logs[1], &logs[0]] {
            switch.set(Some(Arc::clone(log))).unwrap();
            write();
            assert!(switch.is_marked(GuestAddress(0x3000)));
            assert_eq!(logs.each_ref().map(|log| harvested(log)).concat(), [3]);
        }
        switch.set(None).unwrap();
        write();
        assert!(logs.iter().all(|log| harvested(log).is_empty() && Arc::strong_count(log) == 1));
    }

    #[test]
    fn no_write_is_lost_when_the_log_is_switched_under_load() {
        let switch = Arc::new(LogSwitch::new().unwrap());
        let memory = memory(&switch);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut count = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    memory.write_obj(count, GuestAddress(0x3000)).unwrap();
                }
                count
            });
            let mut old: Option<(Arc<Log>, u64)> = None;
            for _ in 0..300 {
                let log = Arc::new(Log::create(GuestAddress(5 << 30)).unwrap().0);
                switch.set(Some(Arc::clone(&log))).unwrap();
                // From here on every write must be marked in the new log, and in it alone.
                let copy: u64 = memory.read_obj(GuestAddress(0x3000)).unwrap();
                if let Some((old, before)) = old {
                    assert!(copy == before || old.is_marked(GuestAddress(0x3000)));
                    old.harvest(&mut PageSet::default());
                    assert!(
                        !old.is_marked(GuestAddress(0x3000)),
                        "a write after the switch is marked in the former log"
                    );
                }
                while memory.read_obj::<u64>(GuestAddress(0x3000)).unwrap() < copy + 2 {
                    std::hint::spin_loop();
                }
                assert!(log.is_marked(GuestAddress(0x3000)), "a write after the switch is not marked");
                old = Some((log, copy));
            }
            stop.store(true, Ordering::Relaxed);
            assert!(writer.join().unwrap() > 600);
        });
    }
}
