//! Address translation for a ring behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM): of its buffers, its indirect tables and
//! its log.
//!
//! The areas of the ring are mapped in an [`IovaWindow`], so accesses to them need no translation.

use std::sync::Arc;

use crate::dirty::{Burst, Log};

use crate::memory::{Access, Address, GuestAddress, Iotlb, IotlbMiss, Iova, IovaWindow, Memory, MemoryError};

use super::{Buffer, RingError};

/// Maximum number of pieces of all buffers of a chain: a request of 64 MiB in scattered pages of 4 KiB.
const MAX_PIECES: usize = 16 << 10;

/// The translations of a ring behind an IOMMU.
#[derive(Clone, Debug)]
pub struct RingIommu {
    /// Guest memory.
    pub memory: Memory,
    /// Translations of buffers and indirect tables.
    pub iotlb: Arc<Iotlb>,
    /// Areas of the ring.
    pub window: Arc<IovaWindow>,
}

impl RingIommu {
    /// Appends the guest-physical pieces of a buffer at an I/O virtual address to `buffers`.
    pub(super) fn translate(
        &self,
        head: u16,
        buffer: Buffer,
        access: Access,
        buffers: &mut Vec<Buffer>,
    ) -> Result<(), RingError> {
        let first = buffers.len();
        let found = self.iotlb.translate(&self.memory, iova(buffer.gpa), buffer.len.into(), access, |gpa, len| {
            let len = len as u32;
            if let Some(last) = buffers.get_mut(first..).and_then(<[_]>::last_mut)
                && last.gpa.checked_add(last.len.into()) == Some(gpa)
            {
                last.len += len;
            } else if buffers.len() <= MAX_PIECES {
                // One piece more than the maximum is kept, which shows below that there are too many.
                buffers.push(Buffer { gpa, len });
            }
        });
        found.map_err(|source| untranslated(head, source))?;
        match buffers.len() {
            0..=MAX_PIECES => Ok(()),
            _ => Err(RingError::TooManyBuffers { head, limit: MAX_PIECES }),
        }
    }

    /// Copies the indirect table of chain `head` at an I/O virtual address to `table`.
    pub(super) fn read(&self, head: u16, address: GuestAddress, table: &mut [u8]) -> Result<(), RingError> {
        let mut pieces = Vec::new();
        let len = table.len() as u64;
        let found =
            self.iotlb.translate(&self.memory, iova(address), len, Access::Read, |gpa, len| pieces.push((gpa, len)));
        found.map_err(|source| untranslated(head, source))?;
        let mut rest = table;
        for (gpa, len) in pieces {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len as usize);
            self.memory.read(gpa, here).map_err(|source| RingError::IndirectOutside { head, source })?;
            rest = after;
        }
        Ok(())
    }

    /// Marks the pages of a part of the ring, given by its I/O virtual address.
    pub(super) fn mark(&self, burst: &Burst<'_>, address: GuestAddress, len: u64) {
        self.window.each(iova(address), len, |gpa, len| burst.mark(gpa, len));
    }
}

/// Returns true if all pages of a part of a ring are marked. `at` is I/O virtual if the ring is behind an IOMMU.
pub(super) fn are_marked(log: &Log, iommu: Option<&RingIommu>, at: GuestAddress, len: u64) -> bool {
    let Some(iommu) = iommu else { return log.are_marked(at, len) };
    let mut all = iommu.window.holds(iova(at), len);
    iommu.window.each(iova(at), len, |gpa, len| all &= log.are_marked(gpa, len));
    all
}

/// The I/O virtual address that a ring behind an IOMMU has in place of a guest-physical one.
pub(crate) fn iova(address: GuestAddress) -> Iova {
    Iova(address.0)
}

/// The error for a failed translation of chain `head`.
fn untranslated(head: u16, source: MemoryError) -> RingError {
    match source {
        MemoryError::Untranslated(miss) => RingError::Untranslated(miss),
        source => RingError::Translation { head, source },
    }
}

impl RingError {
    /// The missing translation, if that is the error. The operation can be repeated when there is one.
    pub fn miss(&self) -> Option<IotlbMiss> {
        if let RingError::Untranslated(miss) = self { Some(*miss) } else { None }
    }
}
