//! The buffers of one request, as a device sees them.
//!
//! How descriptors are found is the ring's; where the buffers lie is checked at use, by [`crate::memory::Memory`], for
//! that check can't be left out and a second one would only cost.

use crate::abi::virtio::{DESC_F_WRITE, Desc};

use super::RingError;

/// Most buffers of a chain, whatever the size of its ring: on smaller ones block drivers are known to put more buffers
/// into an indirect table than there are entries, though virtio forbids it; on larger ones a guest could make the device
/// hold gigabytes of them. QEMU has the same limit.
pub(super) const MAX_BUFFERS: usize = 1024;
/// Bytes of a whole chain (virtio 1.2, "The Virtqueue Descriptor Table").
const MAX_BYTES: u64 = 1 << 32;

/// One contiguous buffer of guest-physical memory. Not checked against guest memory yet: that happens at use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes; in a [`Chain`] never 0.
    pub len: u32,
}

/// One request: its buffers in order, and the head descriptor that names it.
///
/// Made to be used again and again: taking the next request clears it and keeps its allocations. Descriptors of no
/// bytes carry nothing and are left out.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Index of the head descriptor.
    pub head: u16,
    /// What the driver wrote for the device to read.
    pub readable: Vec<Buffer>,
    /// What the device may write.
    pub writable: Vec<Buffer>,
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
        self.head = head;
        self.readable.clear();
        self.writable.clear();
    }

    /// Adds the buffer of `desc`.
    pub(super) fn add(&mut self, desc: &Desc) -> Result<(), RingError> {
        let buffer = Buffer { gpa: desc.addr.get(), len: desc.len.get() };
        if buffer.len == 0 {
            return Ok(());
        }
        if self.readable.len() + self.writable.len() >= MAX_BUFFERS {
            return Err(RingError::TooManyBuffers { head: self.head, limit: MAX_BUFFERS });
        }
        if desc.flags.get() & DESC_F_WRITE != 0 {
            self.writable.push(buffer);
        } else if self.writable.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(RingError::ReadableAfterWritable { head: self.head });
        }
        Ok(())
    }

    /// Checks what only the whole chain shows.
    pub(super) fn finish(&self) -> Result<(), RingError> {
        let bytes = self.readable_bytes() + self.writable_bytes();
        if bytes > MAX_BYTES { Err(RingError::TooManyBytes { head: self.head, bytes }) } else { Ok(()) }
    }
}

fn bytes(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}
