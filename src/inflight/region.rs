//! The region as memory: made or mapped, checked, and handed out queue by queue.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::abi::inflight::split_queue_bytes;
use crate::abi::virtio::MAX_QUEUE_SIZE;
use crate::memory::{self, sealed_memfd};

use super::split::{Recovery, SplitInflight, VERSION_AT, recover};
use super::{InflightError, Sink};

/// A mapped inflight region of some split rings of one size.
#[derive(Clone, Debug)]
pub struct Region {
    mapping: Arc<memory::Region>,
    queues: u16,
    queue_size: u16,
}

impl Region {
    /// Bytes that `queues` split rings of `queue_size` entries need: the mmap_size of VHOST_USER_GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// [`InflightError::Shape`].
    pub fn bytes_for(queues: u16, queue_size: u16) -> Result<u64, InflightError> {
        if queues == 0 || queue_size == 0 || u32::from(queue_size) > MAX_QUEUE_SIZE {
            return Err(InflightError::Shape { queues, queue_size });
        }
        Ok(split_queue_bytes(queue_size) * u64::from(queues))
    }

    /// Makes a fresh region and the fd to share it by, a memfd that can't shrink (rule I1).
    ///
    /// # Errors
    /// A shape that no device has, or what the system says.
    pub fn create(queues: u16, queue_size: u16) -> Result<(Region, OwnedFd), InflightError> {
        let size = Region::bytes_for(queues, queue_size)?;
        let fd = sealed_memfd("vhost-inflight", size)?;
        let region = Region::map(fd.as_fd(), size, 0, queues, queue_size)?;
        Ok((region, fd))
    }

    /// Maps the region that VHOST_USER_SET_INFLIGHT_FD describes: `size` bytes from `offset` of `fd` (rule I1).
    ///
    /// What is in it is checked ring by ring, by [`Region::split`].
    ///
    /// # Errors
    /// A shape that no device has, a region or a file too small for it, or what the system says.
    pub fn map(
        fd: BorrowedFd<'_>,
        size: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Region, InflightError> {
        let needed = Region::bytes_for(queues, queue_size)?;
        if size < needed {
            return Err(InflightError::TooSmall { size, needed });
        }
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Misaligned { offset });
        }
        let mapping = Arc::new(memory::Region::map(fd, 0, needed, 0, offset)?);
        Ok(Region { mapping, queues, queue_size })
    }

    /// How many queues it is for.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Entries of each queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Starts tracking queue `queue`, a split ring of `ring_size` entries whose used index is `used_idx`, and says what
    /// a predecessor left to be done (rules I3, I5).
    ///
    /// # Errors
    /// No such queue, a larger ring than the region is for, or contents that can't be true.
    pub fn split(&self, queue: u16, ring_size: u16, used_idx: u16) -> Result<(SplitInflight, Recovery), InflightError> {
        let queue_size = self.queue_size;
        if ring_size > queue_size {
            return Err(InflightError::RingTooLarge { ring_size, queue_size });
        }
        let mapped = self.mapped(queue)?;
        let recovery = recover(&mapped.copy(), used_idx, queue_size)?;
        Ok((SplitInflight::resume(mapped, &recovery), recovery))
    }

    /// Makes every queue count as fresh, as a reset of the device wants it (rule I7). No queue may be running.
    pub fn reset(&self) {
        for queue in 0..self.queues {
            if let Ok(mut mapped) = self.mapped(queue) {
                mapped.u16(VERSION_AT, 0);
            }
        }
    }

    /// A copy of the part of queue `queue`.
    ///
    /// # Errors
    /// No such queue.
    pub fn copy(&self, queue: u16) -> Result<Vec<u8>, InflightError> {
        Ok(self.mapped(queue)?.copy())
    }

    fn mapped(&self, queue: u16) -> Result<Mapped, InflightError> {
        let len = split_queue_bytes(self.queue_size);
        let no_queue = InflightError::NoQueue { queue, queues: self.queues };
        if queue >= self.queues {
            return Err(no_queue);
        }
        let region = self.mapping.clone();
        // Inside the mapping, whose size `map` made that of all queues together.
        let first = NonNull::new(region.host_ptr().wrapping_add(len as usize * usize::from(queue)));
        Ok(Mapped { first: first.ok_or(no_queue)?, len: len as usize, _region: region })
    }
}

/// One queue's part of a mapped region: each store goes to shared memory, in program order.
///
/// Program order is enough: what kills a process does not undo or reorder the stores it had executed, so only the
/// compiler must not move them, and release stores keep it from that.
#[derive(Debug)]
pub struct Mapped {
    first: NonNull<u8>,
    len: usize,
    /// Keeps the mapping alive.
    _region: Arc<memory::Region>,
}

// SAFETY: the pointer is to memory that `_region` keeps mapped; it belongs to no thread.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Reads all of it once.
    fn copy(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `len` bytes from `first` are mapped as long as `self` lives, and `VolatileSlice` is made for memory
        // that others write.
        unsafe { VolatileSlice::new(self.first.as_ptr(), self.len) }.copy_to(&mut bytes);
        bytes
    }

    /// The `T` at `offset`, if it is inside and aligned.
    #[inline]
    fn at<T>(&self, offset: usize) -> Option<NonNull<T>> {
        if offset > self.len - size_of::<T>() {
            return None;
        }
        // SAFETY: `offset` is inside the queue's part, checked above.
        let at = unsafe { self.first.add(offset) }.cast::<T>();
        at.is_aligned().then_some(at)
    }
}

impl Sink for Mapped {
    #[inline]
    fn u8(&mut self, offset: usize, value: u8) {
        if let Some(at) = self.at::<AtomicU8>(offset) {
            // SAFETY: `at` is aligned and inside the mapping, which `_region` keeps; all access to it is atomic.
            unsafe { at.as_ref() }.store(value, Ordering::Release);
        }
    }

    #[inline]
    fn u16(&mut self, offset: usize, value: u16) {
        if let Some(at) = self.at::<AtomicU16>(offset) {
            // SAFETY: as above.
            unsafe { at.as_ref() }.store(value.to_le(), Ordering::Release);
        }
    }

    #[inline]
    fn u64(&mut self, offset: usize, value: u64) {
        if let Some(at) = self.at::<AtomicU64>(offset) {
            // SAFETY: as above.
            unsafe { at.as_ref() }.store(value.to_le(), Ordering::Release);
        }
    }
}
