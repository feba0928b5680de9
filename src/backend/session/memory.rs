//! Guest memory of a session, and IOTLB messages (rules M1, P1, T2, T3).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use zerocopy::FromBytes;

use super::{Session, VringController};
use crate::abi::vhost::{VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE};
use crate::abi::vhost_user::{FrontendRequest as Code, IotlbMsg, MemoryHeader, MemoryRegion, VHOST_USER_MAX_RAM_SLOTS};
use crate::backend::{BackendError, VhostUserMessage};
use crate::memory::{Access, GuestAddress, Iova, Memory, MemoryError, Region, UserAddress, invalidated};

impl Session {
    pub(super) fn add_region(
        &mut self,
        region: &MemoryRegion,
        fd: OwnedFd,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        let mut regions = self.memory.regions().to_vec();
        if regions.len() >= VHOST_USER_MAX_RAM_SLOTS {
            return Err(BackendError::NoSlot { slots: VHOST_USER_MAX_RAM_SLOTS });
        }
        regions.push(map_region(region, &fd)?);
        self.replace_memory(Memory::new(regions)?, rings)
    }

    pub(super) fn remove_region(
        &mut self,
        region: &MemoryRegion,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        let mut regions = self.memory.regions().to_vec();
        let (gpa, size) = (GuestAddress(region.guest_phys_addr), region.memory_size);
        let user_addr = UserAddress(region.userspace_addr);
        let found = regions.iter().position(|r| (r.gpa(), r.size(), r.user_addr()) == (gpa, size, user_addr));
        regions.remove(found.ok_or(BackendError::NoSuchRegion { gpa, size, user_addr })?);
        self.replace_memory(Memory::new(regions)?, rings)
    }

    /// Replaces guest memory. Requests in flight complete in the old memory, then the rings continue in the new one
    /// (rule L9.2).
    pub(super) fn replace_memory(
        &mut self,
        memory: Memory,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        for index in 0..self.device.queues() {
            self.stop_ring(index, rings)?;
        }
        self.memory = memory;
        // The front-end's addresses may mean other pages now.
        self.clear_iotlb();
        self.check_log_size();
        self.apply_ring_states(rings)
    }

    /// Handles the acknowledgement of a memory table. The front-end serves faults from here on, so rings may run
    /// (rule P1.5).
    pub(super) fn acknowledge_memory(
        &mut self,
        message: &VhostUserMessage,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        let memory = self.postcopy.acknowledge(message, message.code == Code::SET_MEM_TABLE)?;
        self.replace_memory(memory, rings)
    }

    /// Discards all translations at events for which front-ends send no invalidation; no ring runs then (rule T3.7).
    /// Without a channel they are kept, because the front-end could not be asked again (rule T3.8).
    pub(super) fn clear_iotlb(&self) {
        if self.frontend.has_channel() {
            self.iotlb.clear();
        }
    }

    /// Handles IOTLB_MSG (rules T2, T3).
    pub(super) fn handle_iotlb_msg(
        &mut self,
        message: &IotlbMsg,
        rings: &mut dyn VringController,
    ) -> Result<(), BackendError> {
        let IotlbMsg { size, perm, kind, .. } = *message;
        let (iova, user) = (Iova(message.iova), UserAddress(message.uaddr));
        match kind {
            VHOST_IOTLB_UPDATE => {
                if perm != 0 {
                    self.memory.pieces_of_user(user, size, |_, _| {})?;
                }
                let permitted = Access::from_permission(perm);
                if permitted.is_none() && perm != 0 {
                    return Err(MemoryError::BadPermission { iova, permission: perm }.into());
                }
                self.iotlb.update(iova, size, user, permitted)?;
                // Rings may wait for this translation.
                for (index, _) in (0..).zip(&self.rings).filter(|(_, ring)| ring.running) {
                    rings.kick(index);
                }
                Ok(())
            }
            VHOST_IOTLB_INVALIDATE => {
                let iovas = invalidated(iova, size)?;
                self.iotlb.invalidate(&iovas);
                rings.invalidate(&iovas);
                Ok(())
            }
            _ => Err(BackendError::IotlbKind { kind }),
        }
    }
}

/// Maps the regions of SET_MEM_TABLE.
pub(super) fn regions_of(message: &VhostUserMessage) -> Result<Vec<Arc<Region>>, BackendError> {
    let MemoryHeader { nregions, .. } = message.body()?;
    let (got, head) = (message.payload.len(), size_of::<MemoryHeader>());
    let needed = (nregions as usize).saturating_mul(size_of::<MemoryRegion>()).saturating_add(head);
    let table =
        message.payload.get(head..needed).ok_or(BackendError::ShortPayload { code: message.code, got, needed })?;
    if message.fds.len() != nregions as usize {
        let (got, needed) = (message.fds.len(), nregions as usize);
        return Err(BackendError::FdCount { code: message.code, got, needed });
    }
    let regions = table.chunks_exact(size_of::<MemoryRegion>()).zip(&message.fds).map(|(bytes, fd)| {
        let region = MemoryRegion::read_from_bytes(bytes).map_err(|_| BackendError::ShortPayload {
            code: message.code,
            got,
            needed,
        })?;
        map_region(&region, fd)
    });
    regions.collect()
}

fn map_region(region: &MemoryRegion, fd: &OwnedFd) -> Result<Arc<Region>, BackendError> {
    let (gpa, user_addr) = (GuestAddress(region.guest_phys_addr), UserAddress(region.userspace_addr));
    Ok(Arc::new(Region::map(fd.as_fd(), gpa, region.memory_size, user_addr, region.mmap_offset)?))
}
