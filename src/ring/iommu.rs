//! A ring whose driver speaks of I/O virtual addresses (VIRTIO_F_ACCESS_PLATFORM): its buffers, its indirect tables and
//! its log are translated here. Its areas are in a [`IovaWindow`], so that a running ring does not notice.

use std::sync::Arc;

use crate::dirty::{Burst, Log};
use crate::memory::{Access, Iotlb, IotlbMiss, IovaWindow, Memory, TranslationError};

use super::{Buffer, RingError};

/// Most pieces of the buffers of a chain: a request of 64 MiB in scattered pages of 4 KiB.
const MAX_PIECES: usize = 16 << 10;

/// What a ring behind an IOMMU needs.
#[derive(Clone, Debug)]
pub struct RingIommu {
    /// Guest memory.
    pub memory: Memory,
    /// Where buffers and indirect tables lie in it.
    pub iotlb: Arc<Iotlb>,
    /// Where the ring lies in it.
    pub window: Arc<IovaWindow>,
}

impl RingIommu {
    /// Appends to `buffers` what makes up a buffer at an I/O virtual address, guest-physical.
    pub(super) fn translate(
        &self,
        head: u16,
        buffer: Buffer,
        access: Access,
        buffers: &mut Vec<Buffer>,
    ) -> Result<(), RingError> {
        let first = buffers.len();
        let found = self.iotlb.translate(&self.memory, buffer.gpa, buffer.len.into(), access, |gpa, len| {
            let len = len as u32;
            if let Some(last) = buffers.get_mut(first..).and_then(<[_]>::last_mut)
                && last.gpa + u64::from(last.len) == gpa
            {
                last.len += len;
            } else if buffers.len() <= MAX_PIECES {
                // One too many is enough to tell.
                buffers.push(Buffer { gpa, len });
            }
        });
        found.map_err(|source| untranslated(head, source))?;
        match buffers.len() {
            0..=MAX_PIECES => Ok(()),
            _ => Err(RingError::TooManyBuffers { head, limit: MAX_PIECES }),
        }
    }

    /// Copies an indirect table.
    pub(super) fn read(&self, head: u16, iova: u64, table: &mut [u8]) -> Result<(), RingError> {
        let mut pieces = Vec::new();
        let len = table.len() as u64;
        let found = self.iotlb.translate(&self.memory, iova, len, Access::Read, |gpa, len| pieces.push((gpa, len)));
        found.map_err(|source| untranslated(head, source))?;
        let mut rest = table;
        for (gpa, len) in pieces {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len as usize);
            self.memory.read(gpa, here).map_err(|source| RingError::IndirectOutside { head, source })?;
            rest = after;
        }
        Ok(())
    }

    /// Marks what makes up a part of the ring.
    pub(super) fn mark(&self, burst: &Burst<'_>, iova: u64, len: u64) {
        self.window.each(iova, len, |gpa, len| burst.mark(gpa, len));
    }
}

/// Returns true if all pages of a part of a ring are marked, given by the address that the ring has for it.
pub(super) fn are_marked(log: &Log, iommu: Option<&RingIommu>, at: u64, len: u64) -> bool {
    let Some(iommu) = iommu else { return log.are_marked(at, len) };
    let mut all = iommu.window.holds(at, len);
    iommu.window.each(at, len, |gpa, len| all &= log.are_marked(gpa, len));
    all
}

fn untranslated(head: u16, source: TranslationError) -> RingError {
    match source {
        TranslationError::Missing(miss) => RingError::Untranslated(miss),
        source => RingError::Translation { head, source },
    }
}

impl RingError {
    /// The translation to ask for, after which this is no error any more.
    pub fn miss(&self) -> Option<IotlbMiss> {
        if let RingError::Untranslated(miss) = self { Some(*miss) } else { None }
    }
}
