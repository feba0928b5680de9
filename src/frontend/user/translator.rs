//! Translations of the VMM's IOMMU, sent in order with invalidations (rules T1-T3).
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromZeros, IntoBytes};

use super::super::{FrontendError, Iommu, Mapping};
use super::connection::ConnectionSocket;
use crate::abi::vhost::VHOST_IOTLB_UPDATE;
use crate::abi::vhost_user::{FrontendRequest, Header, IotlbMsg};
use crate::memory::{Access, Address, GuestAddress, Iova, LOG_PAGE, Memory, Region};
use crate::sys::log_limit::limited;

/// The VMM's IOMMU and the memory that its mappings refer to. Shared by all connections of a device.
///
/// The lock is held from the look-up of a mapping until its translation is sent, and while an invalidation is sent. A
/// translation that is sent after an invalidation was therefore looked up after the mapping had changed (rule T3.5).
pub(super) struct Translator(Mutex<TranslatorState>);

pub(super) struct TranslatorState {
    iommu: Option<Arc<dyn Iommu>>,
    /// Memory that the back-end has; `None` while a new table is being sent.
    memory: Option<Memory>,
}

/// Result of a translation miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MissResult {
    Sent,
    /// A translation with less permission than requested was sent.
    SentRestricted,
    /// There is no mapping. If the miss had been acknowledged, a translation without permission was sent.
    NotMapped,
    /// The socket is full or the memory table changes: retry later.
    Deferred,
}

impl Default for Translator {
    fn default() -> Translator {
        Translator(Mutex::new(TranslatorState { iommu: None, memory: Some(Memory::default()) }))
    }
}

impl Translator {
    pub(super) fn set(&self, iommu: Arc<dyn Iommu>) {
        self.lock().iommu = Some(iommu);
    }

    pub(super) fn is_set(&self) -> bool {
        self.lock().iommu.is_some()
    }

    /// Sets the memory that mappings refer to. With `None` translations are deferred: while a table is being sent the
    /// back-end has neither the old nor the new one completely.
    pub(super) fn set_memory(&self, memory: Option<&Memory>) {
        self.lock().memory = memory.cloned();
    }

    /// Returns true while translations are deferred for a memory table.
    pub(super) fn is_paused(&self) -> bool {
        self.lock().memory.is_none()
    }

    /// Looks up `iova` and sends the translation over `socket`. If an `acknowledged` miss has lost its mapping, sends a
    /// translation without permission.
    pub(super) fn send_update(
        &self,
        iova: Iova,
        access: Access,
        acknowledged: bool,
        socket: &ConnectionSocket,
    ) -> MissResult {
        let state = self.lock();
        let Some(memory) = &state.memory else { return MissResult::Deferred };
        let found = state.update(memory, iova, access);
        let Some(update) = found.or_else(|| denial(memory, iova).filter(|_| acknowledged)) else {
            return MissResult::NotMapped;
        };
        let header = Header {
            request: FrontendRequest::IOTLB_MSG.0,
            flags: Header::FLAG_VERSION,
            size: size_of_val(&update) as u32,
        };
        match socket.try_send(&[header.as_bytes(), update.as_bytes()].concat()) {
            false => MissResult::Deferred,
            true if update.perm == 0 => MissResult::NotMapped,
            true if !Access::from_permission(update.perm).is_some_and(|permitted| permitted.permits(access)) => {
                MissResult::SentRestricted
            }
            true => MissResult::Sent,
        }
    }

    /// Returns the guest-physical address and length of each part of `len` bytes at `iova`, for the front-end's own
    /// accesses.
    pub(super) fn guest_ranges(&self, iova: Iova, len: u64) -> Result<Vec<(GuestAddress, u64)>, FrontendError> {
        let state = self.lock();
        let (mut at, mut left, mut pieces) = (iova, len, Vec::new());
        while left > 0 {
            let (mapping, skip) = state.mapping(at, Access::Read).ok_or(FrontendError::Untranslated { iova: at })?;
            let here = left.min(mapping.size - skip);
            pieces.push((GuestAddress(mapping.gpa.0.saturating_add(skip)), here));
            // A range that wraps around fails at the next look-up.
            (at, left) = (Iova(at.0.wrapping_add(here)), left - here);
        }
        Ok(pieces)
    }

    /// Holds translations back until the guard is dropped.
    pub(super) fn lock(&self) -> MutexGuard<'_, TranslatorState> {
        // Ignores poisoning: a panic of the VMM's `translate` leaves the state consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TranslatorState {
    /// Returns the VMM's mapping of an address, and the offset of the address in it.
    fn mapping(&self, iova: Iova, access: Access) -> Option<(Mapping, u64)> {
        let mapping = self.iommu.as_ref()?.translate(iova, access)?;
        let skip = iova.checked_offset_from(mapping.iova).filter(|skip| *skip < mapping.size);
        if skip.is_none() {
            limited!(warn, "the VMM's mapping of {iova:#x} does not contain it: {mapping:x?} (rule T1.3)");
        }
        skip.map(|skip| (mapping, skip))
    }

    /// Builds a translation message, cut at the end of the region: the front-end's addresses are not contiguous beyond
    /// it.
    fn update(&self, memory: &Memory, iova: Iova, access: Access) -> Option<IotlbMsg> {
        let (mapping, skip) = self.mapping(iova, access)?;
        let gpa = mapping.gpa.checked_add(skip)?;
        let offset_in =
            |region: &Region| gpa.checked_offset_from(region.gpa()).filter(|offset| *offset < region.size());
        let found = memory.regions().iter().find_map(|region| Some((region, offset_in(region)?)));
        let Some((region, offset)) = found else {
            limited!(
                warn,
                "the VMM's translation of {iova:#x} leads to {:#x}, where the back-end has no memory (rule T2.2)",
                gpa.0
            );
            return None;
        };
        let before = skip.min(offset);
        let room = (u64::MAX - iova.0).saturating_add(1);
        let after = (mapping.size - skip).min(region.size() - offset).min(room);
        Some(IotlbMsg {
            iova: iova.0 - before,
            size: before.saturating_add(after),
            uaddr: region.user_addr().0 + (offset - before),
            perm: mapping.permission.permission(),
            kind: VHOST_IOTLB_UPDATE,
            ..IotlbMsg::new_zeroed()
        })
    }
}

/// Builds a translation without permission for the page of an address. Its user address is valid, because back-ends
/// check it.
fn denial(memory: &Memory, iova: Iova) -> Option<IotlbMsg> {
    let uaddr = memory.regions().first()?.user_addr().0;
    let (iova, size) = (iova.0 / LOG_PAGE * LOG_PAGE, LOG_PAGE);
    Some(IotlbMsg { iova, size, uaddr, kind: VHOST_IOTLB_UPDATE, ..IotlbMsg::new_zeroed() })
}
