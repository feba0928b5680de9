//! Payloads that describe guest memory.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::super::FrontendError;
use crate::abi::vhost_user::{MemoryHeader, MemoryRegion};
use crate::memory::{Memory, MemoryError, Region};

/// Builds SET_MEM_TABLE for all regions of `memory`.
pub(super) fn memory_table(memory: &Memory) -> Result<(Vec<u8>, Vec<BorrowedFd<'_>>), FrontendError> {
    let (regions, fds): (Vec<MemoryRegion>, Vec<_>) =
        memory.regions().iter().map(|region| region_message(region)).collect::<Result<_, _>>()?;
    let header = MemoryHeader { nregions: regions.len() as u32, padding: 0 };
    Ok(([header.as_bytes(), regions.as_bytes()].concat(), fds))
}

/// Returns the description of a region, and its fd.
pub(super) fn region_message(region: &Region) -> Result<(MemoryRegion, BorrowedFd<'_>), FrontendError> {
    let (fd, mmap_offset) = region.shared().ok_or(FrontendError::NotShared { gpa: region.gpa() })?;
    let description = MemoryRegion {
        guest_phys_addr: region.gpa(),
        memory_size: region.size(),
        userspace_addr: region.user_addr(),
        mmap_offset,
    };
    Ok((description, fd))
}

/// Returns the front-end's address of a range, which must be inside one region.
pub(super) fn user_addr(memory: &Memory, (gpa, len): (u64, u64)) -> Result<u64, MemoryError> {
    memory.slice(gpa, len)?;
    let region = memory.regions().iter().rev().find(|region| region.gpa() <= gpa);
    let not_mapped = MemoryError::NotMapped { addr: gpa, len, space: "guest-physical" };
    region.map(|region| region.user_addr() + (gpa - region.gpa())).ok_or(not_mapped)
}
