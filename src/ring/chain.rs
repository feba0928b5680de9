//! The buffers of one request, as a device sees them.
//!
//! How descriptors are found is the ring's; where the buffers lie is checked at use, by [`crate::memory::Memory`], for
//! that check can't be left out and a second one would only cost.

use zerocopy::{FromBytes, IntoBytes};

use crate::memory::{Access, Memory};

use super::{RingError, RingIommu};

/// Most buffers of a chain, whatever the size of its ring: on smaller ones block drivers are known to put more buffers
/// into an indirect table than there are entries, though virtio forbids it; on larger ones a guest could make the device
/// hold gigabytes of them. QEMU has the same limit.
pub(super) const MAX_BUFFERS: usize = 1024;
/// Bytes of a whole chain (virtio 1.2, "The Virtqueue Descriptor Table").
const MAX_BYTES: u64 = 1 << 32;
/// Bytes of a descriptor, split or packed.
const DESC_BYTES: u32 = 16;

/// One contiguous buffer of guest-physical memory. Not checked against guest memory yet: that happens at use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address; what the driver of a ring behind an IOMMU adds is I/O virtual.
    pub gpa: u64,
    /// Bytes; in a [`Chain`] never 0.
    pub len: u32,
}

/// One request: its buffers in order, and what names it.
///
/// Made to be used again and again: taking the next request clears it and keeps its allocations. Descriptors of no
/// bytes carry nothing and are left out.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Index of the head descriptor; of a packed ring, the buffer id.
    pub head: u16,
    /// Descriptors of a packed ring that it takes; 0 on a split ring.
    pub slots: u16,
    /// What the driver wrote for the device to read.
    pub readable: Vec<Buffer>,
    /// What the device may write.
    pub writable: Vec<Buffer>,
    /// Behind an IOMMU: all buffers as the driver named them, which is by I/O virtual addresses.
    pub(crate) untranslated: Vec<Buffer>,
}

impl Chain {
    /// Bytes the device may read, at most 2^32.
    pub fn readable_bytes(&self) -> u64 {
        bytes(&self.readable)
    }

    /// Bytes the device may write, at most 2^32.
    pub fn writable_bytes(&self) -> u64 {
        bytes(&self.writable)
    }

    /// Starts over for the request `head`.
    pub(super) fn begin(&mut self, head: u16) {
        (self.head, self.slots) = (head, 0);
        self.readable.clear();
        self.writable.clear();
    }

    /// Adds the buffer that a descriptor describes.
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

    /// Checks what only the whole chain shows, and translates it behind an IOMMU.
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

/// Copies the indirect table of chain `head`, which is `len` bytes at `addr`, to `table`. A guest that changes it
/// meanwhile changes nothing that was checked.
pub(super) fn copy_table<T: FromBytes + IntoBytes + Clone>(
    memory: &Memory,
    iommu: Option<&RingIommu>,
    head: u16,
    addr: u64,
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
