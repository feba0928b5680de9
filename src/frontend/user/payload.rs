//! Payloads that describe guest memory.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::super::FrontendError;
use crate::abi::vhost_user::{MemoryHeader, MemoryRegion};
use crate::memory::{Address, GuestAddress, Memory, MemoryError, Region, UserAddress};

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
        guest_phys_addr: region.gpa().0,
        memory_size: region.size(),
        userspace_addr: region.user_addr().0,
        mmap_offset,
    };
    Ok((description, fd))
}

/// Returns the front-end's address of a range, which must be inside one region.
pub(super) fn user_addr(memory: &Memory, gpa: GuestAddress, len: u64) -> Result<UserAddress, MemoryError> {
    let in_region = |region: &Arc<Region>| {
        let offset = gpa.checked_offset_from(region.gpa())?;
        region.slice(offset, len)?;
        region.user_addr().checked_add(offset)
    };
    memory.regions().iter().find_map(in_region).ok_or(MemoryError::NotMapped { gpa, len })
}
