//! The inflight region as memory: creation, mapping, and the part of each queue.
//!
//! The stores into a part and its recovery are in `split` and `packed`.

use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::abi::inflight::{PackedHeader, packed_queue_bytes, split_queue_bytes};
use crate::abi::virtio::MAX_QUEUE_SIZE;
use crate::memory::{self, GuestAddress, UserAddress, sealed_memfd};
use crate::ring::RingBase;

use super::packed::{PackedInflight, PackedRecovery, recover_packed};
use super::split::{SplitInflight, SplitRecovery, VERSION_AT, recover_split};
use super::{InflightError, StoreSink};

// The version has the same offset for both kinds of ring.
const _: () = assert!(VERSION_AT == offset_of!(PackedHeader, version));

/// The kind of a region's rings. All rings of a device are of one kind: packed if VIRTIO_F_RING_PACKED is negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingKind {
    /// Split rings.
    Split,
    /// Packed rings.
    Packed,
}

impl RingKind {
    /// Size of the part of one queue of `queue_size` entries, bytes.
    pub const fn queue_bytes(self, queue_size: u16) -> u64 {
        match self {
            RingKind::Split => split_queue_bytes(queue_size),
            RingKind::Packed => packed_queue_bytes(queue_size),
        }
    }
}

/// A mapped inflight region, for rings of one kind and size.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    kind: RingKind,
    mapping: Arc<memory::Region>,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Required size for `queues` rings of `queue_size` entries, bytes: the mmap_size of VHOST_USER_GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// [`InflightError::Shape`] for 0 queues and for an invalid ring size.
    pub fn bytes_for(kind: RingKind, queues: u16, queue_size: u16) -> Result<u64, InflightError> {
        if queues == 0 || queue_size == 0 || u32::from(queue_size) > MAX_QUEUE_SIZE {
            return Err(InflightError::Shape { queues, queue_size });
        }
        Ok(kind.queue_bytes(queue_size) * u64::from(queues))
    }

    /// Creates a fresh region. Returns it with the fd to share, a memfd whose size is sealed (rule I1.1).
    ///
    /// # Errors
    /// [`InflightError::Shape`], [`InflightError::Create`] or [`InflightError::Map`].
    pub fn create(kind: RingKind, queues: u16, queue_size: u16) -> Result<(InflightRegion, OwnedFd), InflightError> {
        let size = InflightRegion::bytes_for(kind, queues, queue_size)?;
        let fd = sealed_memfd("vhost-inflight", size)?;
        let region = InflightRegion::map(kind, fd.as_fd(), size, 0, queues, queue_size)?;
        Ok((region, fd))
    }

    /// Maps the region that VHOST_USER_SET_INFLIGHT_FD describes: `size` bytes from `offset` of `fd`
    /// (rules I1.1, I1.2).
    ///
    /// The contents are checked queue by queue, by [`InflightRegion::split`] or [`InflightRegion::packed`].
    ///
    /// # Errors
    /// [`InflightError::Shape`], [`InflightError::TooSmall`] or [`InflightError::Misaligned`] for an invalid
    /// description, [`InflightError::Map`] for a file that is too small or cannot be mapped.
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
        let mapping = Arc::new(memory::Region::map(fd, GuestAddress(0), needed, UserAddress(0), offset)?);
        Ok(InflightRegion { kind, mapping, queues, queue_size })
    }

    /// The kind of the rings.
    pub fn kind(&self) -> RingKind {
        self.kind
    }

    /// The number of queues.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The number of entries of each queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Starts tracking queue `queue`, a split ring of `ring_size` entries whose used index is `used_idx`. Returns the
    /// tracker and the requests that a predecessor left in flight (rules I3, I5).
    ///
    /// # Errors
    /// [`InflightError::RingKind`], [`InflightError::NoQueue`] or [`InflightError::RingTooLarge`] if the region is not
    /// for this ring, otherwise the errors of [`recover_split`].
    pub fn split(
        &self,
        queue: u16,
        ring_size: u16,
        used_idx: u16,
    ) -> Result<(SplitInflight, SplitRecovery), InflightError> {
        let part = self.part_for(RingKind::Split, queue, ring_size)?;
        let recovery = recover_split(&part.copy(), used_idx, self.queue_size)?;
        Ok((SplitInflight::resume(part, &recovery), recovery))
    }

    /// Starts tracking queue `queue`, a packed ring of `ring_size` entries with the base `base`. Returns the tracker
    /// and the requests that a predecessor left in flight (rules I4, I5). `flags_of` reads the flags of the ring's
    /// descriptor at a position.
    ///
    /// # Errors
    /// [`InflightError::RingKind`], [`InflightError::NoQueue`] or [`InflightError::RingTooLarge`] if the region is not
    /// for this ring, otherwise the errors of [`recover_packed`].
    pub fn packed(
        &self,
        queue: u16,
        ring_size: u16,
        base: RingBase,
        flags_of: impl Fn(u16) -> u16,
    ) -> Result<(PackedInflight, PackedRecovery), InflightError> {
        let part = self.part_for(RingKind::Packed, queue, ring_size)?;
        let recovery = recover_packed(&part.copy(), self.queue_size, ring_size, base, flags_of)?;
        Ok((PackedInflight::resume(part, &recovery), recovery))
    }

    /// Marks the part of every queue as fresh, as a reset of the device requires (rule I7.1). No queue may be running.
    pub fn reset(&self) {
        for queue in 0..self.queues {
            if let Ok(mut part) = self.part(queue) {
                part.u16(VERSION_AT, 0);
            }
        }
    }

    /// A copy of the part of queue `queue`.
    ///
    /// # Errors
    /// [`InflightError::NoQueue`].
    pub fn copy(&self, queue: u16) -> Result<Vec<u8>, InflightError> {
        Ok(self.part(queue)?.copy())
    }

    /// The part of queue `queue`, for a ring of `kind` with `ring_size` entries.
    fn part_for(&self, kind: RingKind, queue: u16, ring_size: u16) -> Result<QueueRegion, InflightError> {
        let queue_size = self.queue_size;
        if kind != self.kind {
            return Err(InflightError::RingKind { kind: self.kind });
        }
        if ring_size > queue_size {
            return Err(InflightError::RingTooLarge { ring_size, queue_size });
        }
        self.part(queue)
    }

    /// The part of queue `queue`.
    fn part(&self, queue: u16) -> Result<QueueRegion, InflightError> {
        let len = self.kind.queue_bytes(self.queue_size);
        let no_queue = InflightError::NoQueue { queue, queues: self.queues };
        if queue >= self.queues {
            return Err(no_queue);
        }
        let region = self.mapping.clone();
        // Inside the mapping: `map` gives it the size of all parts.
        let first = NonNull::new(region.host_ptr().wrapping_add(len as usize * usize::from(queue)));
        Ok(QueueRegion { first: first.ok_or(no_queue)?, len: len as usize, _region: region })
    }
}

/// The part of one queue in a mapped region. Stores go to shared memory in program order.
///
/// Program order is sufficient: killing a process does not undo or reorder stores that it has executed. So only the
/// compiler must not reorder them, which release stores prevent.
#[derive(Debug)]
pub struct QueueRegion {
    first: NonNull<u8>,
    len: usize,
    /// The mapping, which must outlive `first`.
    _region: Arc<memory::Region>,
}

// SAFETY: the pointer is to memory that `_region` keeps mapped and that is not bound to a thread.
unsafe impl Send for QueueRegion {}

impl QueueRegion {
    /// Copies all bytes, each read once.
    fn copy(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `len` bytes from `first` are mapped as long as `self` exists, and `VolatileSlice` supports memory
        // that other processes write.
        unsafe { VolatileSlice::new(self.first.as_ptr(), self.len) }.copy_to(&mut bytes);
        bytes
    }

    /// The `T` at `offset`; `None` if it is outside the part or not aligned.
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
            // SAFETY: `at` is aligned and inside the mapping, which `_region` keeps alive. All access to it is atomic.
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
