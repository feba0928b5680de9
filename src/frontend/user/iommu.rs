//! A device behind the VMM's IOMMU: its features, and invalidations (rules T1 and T3).
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;

use zerocopy::{FromZeros, IntoBytes};

use super::super::{FrontendError, Iommu};
use super::UserDevice;
use super::backend_channel::BackendChannel;
use crate::abi::vhost::VHOST_IOTLB_INVALIDATE;
use crate::abi::vhost_user::{FrontendRequest, IotlbMsg};
use crate::abi::virtio::{VIRTIO_F_ACCESS_PLATFORM, VirtioFeatures};
use crate::memory::{GuestAddress, Iova, Memory};
use crate::ring::iova;

impl UserDevice {
    /// Puts the device behind the VMM's IOMMU. Call it before ACCESS_PLATFORM is acknowledged. From then on all
    /// addresses of [`RingSetup`](crate::frontend::RingSetup) are I/O virtual (rule T1.1).
    pub fn set_iommu(&mut self, iommu: Arc<dyn Iommu>) {
        self.translator.set(iommu);
    }

    /// Makes the back-end drop the translations of `iovas`, which the [`Iommu`] must no longer return. After the
    /// acknowledgement no access uses them, and the pages may be reused (rule T3.1).
    ///
    /// A back-end without REPLY_ACK has then received the message but may still run requests that use the old
    /// translations; the back-end of this crate does not. After an error that [is a hang-up](FrontendError::is_hang_up)
    /// the pages may be accessed until [`reconnect`](crate::frontend::Device::reconnect) has succeeded; a new back-end
    /// has no translations.
    ///
    /// # Errors
    /// [`FrontendError::Refused`]; errors of the connection.
    pub fn invalidate(&mut self, iovas: RangeInclusive<Iova>) -> Result<(), FrontendError> {
        if iovas.is_empty() || !self.is_translated() {
            return Ok(());
        }
        self.send_invalidation(iovas)?;
        self.connection.wait_for_acks_within(self.options.stop_timeout)
    }

    /// Sends an invalidation of `iovas`.
    pub(super) fn send_invalidation(&mut self, iovas: RangeInclusive<Iova>) -> Result<(), FrontendError> {
        // The size of the whole address space does not fit into 64 bits: its last byte is a message of its own.
        let (Iova(first), Iova(last)) = iovas.into_inner();
        let ranges = match last - first {
            u64::MAX => vec![(first, u64::MAX), (last, 1)],
            more => vec![(first, more + 1)],
        };
        let translator = self.translator.clone();
        let send_lock = translator.lock();
        for (iova, size) in ranges {
            let message = IotlbMsg { iova, size, kind: VHOST_IOTLB_INVALIDATE, ..IotlbMsg::new_zeroed() };
            self.connection.send(FrontendRequest::IOTLB_MSG, message.as_bytes(), &[])?;
        }
        drop(send_lock);
        Ok(())
    }

    /// Changes the memory that mappings refer to; see [`Translator::set_memory`](super::translator::Translator::set_memory).
    pub(super) fn set_translation_memory(&self, memory: Option<&Memory>) {
        self.translator.set_memory(memory);
        self.backend_channel.iter().for_each(BackendChannel::wake);
    }

    /// Returns true if the driver's addresses are I/O virtual.
    pub(super) fn is_translated(&self) -> bool {
        self.features.contains(VIRTIO_F_ACCESS_PLATFORM)
    }

    /// Checks that these features can be acknowledged with regard to translations.
    pub(super) fn check_iommu(&self, features: VirtioFeatures) -> Result<(), FrontendError> {
        if !features.contains(VIRTIO_F_ACCESS_PLATFORM) {
            return Ok(());
        }
        if !self.translator.is_set() {
            return Err(FrontendError::NoIommu);
        }
        match self.backend_channel {
            Some(_) => Ok(()),
            None => Err(FrontendError::NotOffered {
                what: "a back-end channel (BACKEND_REQ), which translations need (rule T1.7)".into(),
                advice: "do not acknowledge ACCESS_PLATFORM, or use a back-end with BACKEND_REQ",
            }),
        }
    }

    /// Returns the guest-physical address and length of each part of a range of the driver's addresses.
    pub(super) fn guest_ranges(&self, addr: GuestAddress, len: u64) -> Result<Vec<(GuestAddress, u64)>, FrontendError> {
        if self.is_translated() { self.translator.guest_ranges(iova(addr), len) } else { Ok(vec![(addr, len)]) }
    }
}
