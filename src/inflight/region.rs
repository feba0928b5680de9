//! The region as memory: made or mapped, checked, and handed out queue by queue.

use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::abi::inflight::{PackedHeader, packed_queue_bytes, split_queue_bytes};
use crate::abi::virtio::MAX_QUEUE_SIZE;
use crate::memory::{self, sealed_memfd};
use crate::ring::RingBase;

use super::packed::{PackedInflight, PackedRecovery, recover_packed};
use super::split::{SplitInflight, SplitRecovery, VERSION_AT, recover_split};
use super::{InflightError, StoreSink};

// The version stands in the same place for both kinds of ring.
const _: () = assert!(VERSION_AT == offset_of!(PackedHeader, version));

/// The kind of the rings that a region is for, of which there is one on a device: packed if VIRTIO_F_RING_PACKED is
/// negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingKind {
    /// Split rings.
    Split,
    /// Packed rings.
    Packed,
}

impl RingKind {
    /// Bytes that the part of one queue takes.
    pub const fn queue_bytes(self, queue_size: u16) -> u64 {
        match self {
            RingKind::Split => split_queue_bytes(queue_size),
            RingKind::Packed => packed_queue_bytes(queue_size),
        }
    }
}

/// A mapped inflight region of some rings of one kind and size.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    kind: RingKind,
    mapping: Arc<memory::Region>,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Bytes that `queues` rings of `queue_size` entries need: the mmap_size of VHOST_USER_GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// [`InflightError::Shape`].
    pub fn bytes_for(kind: RingKind, queues: u16, queue_size: u16) -> Result<u64, InflightError> {
        if queues == 0 || queue_size == 0 || u32::from(queue_size) > MAX_QUEUE_SIZE {
            return Err(InflightError::Shape { queues, queue_size });
        }
        Ok(kind.queue_bytes(queue_size) * u64::from(queues))
    }

    /// Makes a fresh region and the fd to share it by, a memfd that can't shrink (rule I1.1).
    ///
    /// # Errors
    /// A shape that no device has, or what the system says.
    pub fn create(kind: RingKind, queues: u16, queue_size: u16) -> Result<(InflightRegion, OwnedFd), InflightError> {
        let size = InflightRegion::bytes_for(kind, queues, queue_size)?;
        let fd = sealed_memfd("vhost-inflight", size)?;
        let region = InflightRegion::map(kind, fd.as_fd(), size, 0, queues, queue_size)?;
        Ok((region, fd))
    }

    /// Maps the region that VHOST_USER_SET_INFLIGHT_FD describes: `size` bytes from `offset` of `fd` (rules I1.1, I1.2).
    ///
    /// What is in it is checked ring by ring, by [`InflightRegion::split`] or [`InflightRegion::packed`].
    ///
    /// # Errors
    /// A shape that no device has, a region or a file too small for it, or what the system says.
    pub fn map(
        kind: RingKind,
        fd: BorrowedFd<'_>,
        size: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<InflightRegion, InflightError> {
        let needed = InflightRegion::bytes_for(kind, queues, queue_size)?;
        if size < needed {
            return Err(InflightError::TooSmall { size, needed });
        }
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Misaligned { offset });
        }
        let mapping = Arc::new(memory::Region::map(fd, 0, needed, 0, offset)?);
        Ok(InflightRegion { kind, mapping, queues, queue_size })
    }

    /// The kind of rings that it is for.
    pub fn kind(&self) -> RingKind {
        self.kind
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
    /// A region for packed rings, no such queue, a larger ring than the region is for, or contents that can't be true.
    pub fn split(
        &self,
        queue: u16,
        ring_size: u16,
        used_idx: u16,
    ) -> Result<(SplitInflight, SplitRecovery), InflightError> {
        let mapped = self.of(RingKind::Split, queue, ring_size)?;
        let recovery = recover_split(&mapped.copy(), used_idx, self.queue_size)?;
        Ok((SplitInflight::resume(mapped, &recovery), recovery))
    }

    /// Starts tracking queue `queue`, a packed ring of `ring_size` entries that would go on at `base`, and says what a
    /// predecessor left to be done (rules I4, I5). `flags_of` reads the flags of the ring's descriptor at a position.
    ///
    /// # Errors
    /// A region for split rings, no such queue, a larger ring than the region is for, or contents that can't be true.
    pub fn packed(
        &self,
        queue: u16,
        ring_size: u16,
        base: RingBase,
        flags_of: impl Fn(u16) -> u16,
    ) -> Result<(PackedInflight, PackedRecovery), InflightError> {
        let mapped = self.of(RingKind::Packed, queue, ring_size)?;
        let recovery = recover_packed(&mapped.copy(), self.queue_size, ring_size, base, flags_of)?;
        Ok((PackedInflight::resume(mapped, &recovery), recovery))
    }

    /// Makes every queue count as fresh, as a reset of the device wants it (rule I7.1). No queue may be running.
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

    /// The part of queue `queue` for a ring of `kind` and `ring_size`.
    fn of(&self, kind: RingKind, queue: u16, ring_size: u16) -> Result<QueueRegion, InflightError> {
        let queue_size = self.queue_size;
        if kind != self.kind {
            return Err(InflightError::RingKind { kind: self.kind });
        }
        if ring_size > queue_size {
            return Err(InflightError::RingTooLarge { ring_size, queue_size });
        }
        self.mapped(queue)
    }

    fn mapped(&self, queue: u16) -> Result<QueueRegion, InflightError> {
        let len = self.kind.queue_bytes(self.queue_size);
        let no_queue = InflightError::NoQueue { queue, queues: self.queues };
        if queue >= self.queues {
            return Err(no_queue);
        }
        let region = self.mapping.clone();
        // Inside the mapping, whose size `map` made that of all queues together.
        let first = NonNull::new(region.host_ptr().wrapping_add(len as usize * usize::from(queue)));
        Ok(QueueRegion { first: first.ok_or(no_queue)?, len: len as usize, _region: region })
    }
}

/// One queue's part of a mapped region: each store goes to shared memory, in program order.
///
/// Program order is enough: what kills a process does not undo or reorder the stores it had executed, so only the
/// compiler must not move them, and release stores keep it from that.
#[derive(Debug)]
pub struct QueueRegion {
    first: NonNull<u8>,
    len: usize,
    /// Keeps the mapping alive.
    _region: Arc<memory::Region>,
}

// SAFETY: the pointer is to memory that `_region` keeps mapped; it belongs to no thread.
unsafe impl Send for QueueRegion {}

impl QueueRegion {
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

impl StoreSink for QueueRegion {
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
    fn u32(&mut self, offset: usize, value: u32) {
        if let Some(at) = self.at::<AtomicU32>(offset) {
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
