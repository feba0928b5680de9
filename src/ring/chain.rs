//! The buffers of one request, as the device receives them.
//!
//! Not here: reading descriptors from a ring (`split`, `packed`). The addresses of buffers are checked when they are
//! used, by
//! [`crate::memory::Memory`]: that check is always needed, so another one here would only cost time.

use zerocopy::{FromBytes, IntoBytes};

use crate::memory::{Access, GuestAddress, Memory};

use super::{RingError, RingIommu};

/// Maximum number of buffers in a chain. It does not depend on the size of the ring: on small rings, block drivers put
/// more buffers into an indirect table than the ring has entries, though virtio forbids it; on large rings, a guest
/// could make the device hold gigabytes of buffers. QEMU has the same limit.
pub(super) const MAX_BUFFERS: usize = 1024;
/// Maximum size of a whole chain, bytes (virtio 1.2, "The Virtqueue Descriptor Table").
const MAX_BYTES: u64 = 1 << 32;
/// Size of a descriptor, split or packed, bytes.
const DESC_BYTES: u32 = 16;

/// One contiguous buffer of guest-physical memory. It may be outside guest memory; that is checked when it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address. The driver of a ring behind an IOMMU adds buffers with I/O virtual addresses.
    pub gpa: GuestAddress,
    /// Length, bytes. It is never 0 in a [`Chain`].
    pub len: u32,
}

/// One request: its name, and its buffers in order.
///
/// It is meant to be reused: taking the next request clears it and keeps its allocations. Buffers of 0 bytes are left
/// out.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Index of the head descriptor. On a packed ring, the buffer id.
    pub head: u16,
    /// Number of descriptors that the request takes in a packed ring; 0 on a split ring.
    pub slots: u16,
    /// Buffers that the device may read.
    pub readable: Vec<Buffer>,
    /// Buffers that the device may write.
    pub writable: Vec<Buffer>,
    /// All buffers with their I/O virtual addresses, if the ring is behind an IOMMU.
    pub(crate) untranslated: Vec<Buffer>,
}

impl Chain {
    /// The number of bytes that the device may read, at most 2^32.
    pub fn readable_bytes(&self) -> u64 {
        bytes(&self.readable)
    }

    /// The number of bytes that the device may write, at most 2^32.
    pub fn writable_bytes(&self) -> u64 {
        bytes(&self.writable)
    }

    /// Clears the chain for the request `head`.
    pub(super) fn begin(&mut self, head: u16) {
        (self.head, self.slots) = (head, 0);
        self.readable.clear();
        self.writable.clear();
    }

    /// Adds the buffer of a descriptor.
    ///
    /// # Errors
    /// [`RingError::TooManyBuffers`], or [`RingError::ReadableAfterWritable`] for a buffer in the wrong order.
    pub(super) fn add(&mut self, buffer: Buffer, writable: bool) -> Result<(), RingError> {
        if buffer.len == 0 {
            return Ok(());
        }
        if self.readable.len() + self.writable.len() >= MAX_BUFFERS {
            return Err(RingError::TooManyBuffers { head: self.head, limit: MAX_BUFFERS });
        }
        if writable {
            self.writable.push(buffer);
        } else if self.writable.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(RingError::ReadableAfterWritable { head: self.head });
        }
        Ok(())
    }

    /// Checks the complete chain, and translates it if the ring is behind an IOMMU.
    ///
    /// # Errors
    /// [`RingError::TooManyBytes`], otherwise the errors of the translation.
    #[inline]
    pub(super) fn finish(&mut self, iommu: Option<&RingIommu>) -> Result<(), RingError> {
        let bytes = self.readable_bytes() + self.writable_bytes();
        if bytes > MAX_BYTES {
            return Err(RingError::TooManyBytes { head: self.head, bytes });
        }
        if let Some(iommu) = iommu { self.translate(iommu) } else { Ok(()) }
    }

    fn translate(&mut self, iommu: &RingIommu) -> Result<(), RingError> {
        let Chain { head, readable, writable, untranslated, .. } = self;
        untranslated.clear();
        for (buffers, access) in [(readable, Access::Read), (writable, Access::Write)] {
            let first = untranslated.len();
            untranslated.append(buffers);
            for buffer in untranslated.get(first..).unwrap_or_default() {
                iommu.translate(*head, *buffer, access, buffers)?;
            }
        }
        Ok(())
    }
}

fn bytes(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// Copies the indirect table of chain `head`, which has `len` bytes at `addr`, to `table`. The copy is what is checked
/// and used, so later writes of the guest have no effect.
pub(super) fn copy_table<T: FromBytes + IntoBytes + Clone>(
    memory: &Memory,
    iommu: Option<&RingIommu>,
    head: u16,
    addr: GuestAddress,
    len: u32,
    table: &mut Vec<T>,
) -> Result<(), RingError> {
    if len == 0 || !len.is_multiple_of(DESC_BYTES) {
        return Err(RingError::Indirect { head, fault: "of a table whose length is not a multiple of 16" });
    }
    let size = (len / DESC_BYTES) as usize;
    if size > MAX_BUFFERS {
        return Err(RingError::TooManyBuffers { head, limit: MAX_BUFFERS });
    }
    table.resize(size, T::new_zeroed());
    match iommu {
        None => memory.read(addr, table.as_mut_bytes()).map_err(|source| RingError::IndirectOutside { head, source }),
        Some(iommu) => iommu.read(head, addr, table.as_mut_bytes()),
    }
}
