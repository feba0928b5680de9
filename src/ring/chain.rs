//! The buffers of one request, as a device sees them.
//!
//! How descriptors are found is the ring's; where the buffers lie is checked at use, by [`crate::memory::Memory`], for
//! that check can't be left out and a second one would only cost.

use crate::abi::virtio::{DESC_F_WRITE, Desc};

use super::RingError;

/// A chain may have this many buffers even on a smaller ring: block drivers are known to put more buffers into an
/// indirect table than their ring has entries, though virtio forbids it.
const MIN_BUFFER_LIMIT: usize = 1024;
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

    /// Adds the buffer of `desc`, found in a ring of `size` entries.
    pub(super) fn add(&mut self, desc: &Desc, size: u16) -> Result<(), RingError> {
        let buffer = Buffer { gpa: desc.addr.get(), len: desc.len.get() };
        if buffer.len == 0 {
            return Ok(());
        }
        if self.readable.len() + self.writable.len() >= buffer_limit(size) {
            return Err(RingError::TooManyBuffers { head: self.head, limit: buffer_limit(size) });
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

/// Most buffers of a chain on a ring of `size` entries.
pub(super) fn buffer_limit(size: u16) -> usize {
    MIN_BUFFER_LIMIT.max(size.into())
}

fn bytes(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}
