//! The shared log as the dirty bitmap of vm-memory, so that any device written over `GuestMemoryMmap<B>` logs into it.
//!
//! A [`LogBitmap`] is the `B` of one memory region: it knows the region's place in guest-physical memory. It marks
//! either in a log that is there for good ([`Log`]) or in whichever is installed at the moment ([`LogSwitch`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::log::{Log, LogError};

/// Something that marks pages by guest-physical address.
pub trait PageMarker: std::fmt::Debug {
    /// Marks the pages of `gpa..gpa + len` bytes, after they were written.
    fn mark(&self, gpa: u64, len: u64);
    /// Whether the page of `gpa` is marked.
    fn is_marked(&self, gpa: u64) -> bool;
}

impl PageMarker for Log {
    #[inline]
    fn mark(&self, gpa: u64, len: u64) {
        Log::mark(self, gpa, len);
    }

    fn is_marked(&self, gpa: u64) -> bool {
        Log::is_marked(self, gpa)
    }
}

/// A place for a log that is put in, exchanged and taken out while devices write.
///
/// While there is none, a write costs one load and a branch that is never taken.
#[derive(Debug)]
pub struct LogSwitch {
    /// Whether `log` holds one; a hint that spares idle writers the lock.
    on: AtomicBool,
    /// Marking holds it shared: who exchanges the log waits for the marks that are under way.
    log: RwLock<Option<Arc<Log>>>,
}

impl LogSwitch {
    /// A switch without a log.
    ///
    /// # Errors
    /// If the kernel has no `membarrier` (it came with Linux 4.14) or a filter forbids it.
    pub fn new() -> Result<LogSwitch, LogError> {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
        Ok(LogSwitch { on: AtomicBool::new(false), log: RwLock::new(None) })
    }

    /// Installs `log`, or none.
    ///
    /// When this returns, nobody marks in the former log any more (rule L9.1), every write that is not marked in the
    /// new one is visible to all threads, and every later write is marked (rule L7.2): acknowledge now.
    ///
    /// # Errors
    /// What the system says of the barrier; the log is installed, but must not be acknowledged.
    pub fn set(&self, log: Option<Arc<Log>>) -> Result<(), LogError> {
        {
            let mut place = self.log.write().unwrap_or_else(PoisonError::into_inner);
            self.on.store(log.is_some(), Ordering::SeqCst);
            *place = log;
        }
        // A writer stores data and then loads `on`, without a fence, so the load may run ahead of the store. This
        // puts the fence into all threads at once, here, where it costs the writers nothing.
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    }

    /// The log that is installed.
    pub fn log(&self) -> Option<Arc<Log>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cold]
    fn mark_in_log(&self, gpa: u64, len: u64) {
        if let Some(log) = &*self.log.read().unwrap_or_else(PoisonError::into_inner) {
            log.mark(gpa, len);
        }
    }
}

impl PageMarker for LogSwitch {
    #[inline]
    fn mark(&self, gpa: u64, len: u64) {
        if self.on.load(Ordering::Relaxed) {
            self.mark_in_log(gpa, len);
        }
    }

    fn is_marked(&self, gpa: u64) -> bool {
        self.log().is_some_and(|log| log.is_marked(gpa))
    }
}

fn membarrier(command: i32) -> Result<(), LogError> {
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    Errno::result(result).map(drop).map_err(LogError::system("order writers (membarrier, Linux 4.14) with"))
}

/// The bitmap of one vm-memory region: marks go into a log, at the region's guest-physical address.
#[derive(Debug)]
pub struct LogBitmap<M = Log> {
    marks: Arc<M>,
    base: u64,
}

impl<M> LogBitmap<M> {
    /// The bitmap of a region that starts at guest-physical `base`.
    pub fn new(marks: Arc<M>, base: u64) -> LogBitmap<M> {
        LogBitmap { marks, base }
    }
}

impl<M> Clone for LogBitmap<M> {
    fn clone(&self) -> LogBitmap<M> {
        LogBitmap { marks: Arc::clone(&self.marks), base: self.base }
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
        LogSlice { marks: &self.marks, base: self.base.wrapping_add(offset as u64) }
    }
}

/// Part of a [`LogBitmap`], as views of guest memory carry it.
#[derive(Debug)]
pub struct LogSlice<'a, M> {
    marks: &'a M,
    base: u64,
}

impl<M> Clone for LogSlice<'_, M> {
    #[inline]
    fn clone(&self) -> Self {
        LogSlice { marks: self.marks, base: self.base }
    }
}

impl<M: PageMarker> WithBitmapSlice<'_> for LogSlice<'_, M> {
    type S = Self;
}

impl<M: PageMarker> BitmapSlice for LogSlice<'_, M> {}

impl<M: PageMarker> Bitmap for LogSlice<'_, M> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        // A sum that wraps is outside every log: counted there, not marked somewhere else.
        self.marks.mark(self.base.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.base.checked_add(offset as u64).is_some_and(|gpa| self.marks.is_marked(gpa))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        LogSlice { marks: self.marks, base: self.base.saturating_add(offset as u64) }
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

    fn memory<M: PageMarker + 'static>(marks: &Arc<M>) -> GuestMemoryMmap<LogBitmap<M>> {
        let region = |base| {
            let bitmap = LogBitmap::new(Arc::clone(marks), base);
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
        set.iter().collect()
    }

    #[test]
    fn every_way_to_write_through_vm_memory_lands_in_the_log() {
        let log = Arc::new(Log::create(5 << 30).unwrap().0);
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
        assert!(harvested(&log).is_empty(), "reading marks nothing");
        assert_eq!(log.out_of_range(), 0);
    }

    #[test]
    fn a_bitmap_and_its_slices_tell_the_marks_at_their_place() {
        let log = Arc::new(Log::create(5 << 30).unwrap().0);
        let bitmap = LogBitmap::new(Arc::clone(&log), BASES[1]);
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
    fn a_switch_marks_in_the_log_that_is_installed_and_in_no_other() {
        let switch = Arc::new(LogSwitch::new().unwrap());
        let logs = [(); 2].map(|()| Arc::new(Log::create(5 << 30).unwrap().0));
        let memory = memory(&switch);
        let write = || memory.write_obj(7u64, GuestAddress(0x3000)).unwrap();
        write();
        assert!(!switch.is_marked(0x3000));
        for log in [&logs[0], &logs[1], &logs[0]] {
            switch.set(Some(Arc::clone(log))).unwrap();
            write();
            assert!(switch.is_marked(0x3000));
            assert_eq!(logs.each_ref().map(|log| harvested(log)).concat(), [3]);
        }
        switch.set(None).unwrap();
        write();
        assert!(logs.iter().all(|log| harvested(log).is_empty() && Arc::strong_count(log) == 1));
    }

    #[test]
    fn no_write_gets_lost_when_the_log_is_switched_under_load() {
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
                let log = Arc::new(Log::create(5 << 30).unwrap().0);
                switch.set(Some(Arc::clone(&log))).unwrap();
                // Acknowledged. What is written from here on is in the new log, and in it alone.
                let copy: u64 = memory.read_obj(GuestAddress(0x3000)).unwrap();
                if let Some((old, before)) = old {
                    assert!(copy == before || old.is_marked(0x3000));
                    old.harvest(&mut PageSet::default());
                    assert!(!old.is_marked(0x3000), "the former log is written after the switch");
                }
                while memory.read_obj::<u64>(GuestAddress(0x3000)).unwrap() < copy + 2 {
                    std::hint::spin_loop();
                }
                assert!(log.is_marked(0x3000), "a write after the switch is in no log");
                old = Some((log, copy));
            }
            stop.store(true, Ordering::Relaxed);
            assert!(writer.join().unwrap() > 600);
        });
    }
}
