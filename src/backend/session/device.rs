//! Messages about the device: configuration, inflight region, device state (rules C1, I1, D1), and the disk extensions
//! GET_DISK_GENERATION and GET_DISK_IDENTITY.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use zerocopy::{Immutable, IntoBytes};

use super::Session;
use crate::abi::vhost_user::{
    ConfigHeader, FrontendRequest as Code, InflightDescription, VHOST_USER_MAX_CONFIG_SIZE, own,
};
use crate::backend::session::transfer::StateTransfer;
use crate::backend::{BackendError, VhostUserMessage, VhostUserReply};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;
use crate::{abi::virtio, inflight};

impl Session {
    pub(super) fn get_config(&self, message: &VhostUserMessage) -> Result<VhostUserReply, BackendError> {
        let header: ConfigHeader = message.body()?;
        let ConfigHeader { offset, size, .. } = header;
        let mut reply = VhostUserReply::new(message.code, &header);
        match config_end(message.code, offset, size) {
            Ok(end) => {
                let mut config = self.device.config();
                config.resize(end.max(config.len()), 0);
                reply.payload.extend(config.get(offset as usize..end).unwrap_or_default());
            }
            Err(error) => {
                // This request has an answer that means "no": no payload.
                limited!(warn, "{}", with_causes(&error));
                reply.payload.clear();
            }
        }
        Ok(reply)
    }

    pub(super) fn get_inflight(&self, wanted: InflightDescription) -> VhostUserReply {
        let make = || {
            self.check_inflight_description(&wanted)?;
            let mmap_size =
                inflight::InflightRegion::bytes_for(self.inflight_kind(), wanted.num_queues, wanted.queue_size)?;
            let (_, fd) = inflight::InflightRegion::create(self.inflight_kind(), wanted.num_queues, wanted.queue_size)?;
            Ok::<_, BackendError>((mmap_size, Some(fd)))
        };
        let (mmap_size, fd) = make().unwrap_or_else(|error| {
            // This request has an answer that means "no": a region of no bytes.
            limited!(warn, "{}", with_causes(&error));
            (0, None)
        });
        let description = InflightDescription { mmap_size, mmap_offset: 0, ..wanted };
        VhostUserReply { fd, ..VhostUserReply::new(Code::GET_INFLIGHT_FD, &description) }
    }

    pub(super) fn get_generation(&mut self) -> VhostUserReply {
        let code = own::GET_DISK_GENERATION;
        reply_or_empty(code, self.require_all_stopped(code, "G1.4").and_then(|()| self.device.disk_generation()))
    }

    pub(super) fn get_identity(&self) -> VhostUserReply {
        reply_or_empty(own::GET_DISK_IDENTITY, self.device.disk_identity())
    }

    pub(super) fn set_inflight(&mut self, description: &InflightDescription, fd: &OwnedFd) -> Result<(), BackendError> {
        self.check_inflight_description(description)?;
        self.require_all_stopped(Code::SET_INFLIGHT_FD, "I1.3")?;
        let InflightDescription { mmap_size, mmap_offset, num_queues, queue_size, .. } = *description;
        let kind = self.inflight_kind();
        let region = inflight::InflightRegion::map(kind, fd.as_fd(), mmap_size, mmap_offset, num_queues, queue_size)?;
        self.inflight = Some(Arc::new(region));
        Ok(())
    }

    pub(super) fn inflight_kind(&self) -> inflight::RingKind {
        if self.is_packed() { inflight::RingKind::Packed } else { inflight::RingKind::Split }
    }

    pub(super) fn check_inflight_description(&self, wanted: &InflightDescription) -> Result<(), BackendError> {
        let (queues, size, max) = (wanted.num_queues, wanted.queue_size, self.device.queues());
        match queues >= 1 && queues <= max && size >= 1 && u32::from(size) <= virtio::MAX_QUEUE_SIZE {
            true => Ok(()),
            false => Err(BackendError::InflightQueues { queues, size, max }),
        }
    }

    /// Handles SET_DEVICE_STATE_FD. A transfer whose result was not requested is cancelled.
    pub(super) fn begin_transfer(&mut self, message: &mut VhostUserMessage) -> Result<(), BackendError> {
        self.require_all_stopped(message.code, "D1.6")?;
        self.transfer = Some(StateTransfer::begin(self.device.as_ref(), message.body()?, message.only_fd()?)?);
        Ok(())
    }

    pub(super) fn check_transfer(&mut self) -> Result<(), BackendError> {
        let nothing = || BackendError::DeviceState { why: "SET_DEVICE_STATE_FD did not begin a transfer".into() };
        let transfer = self.transfer.take().ok_or_else(nothing)?;
        self.require_all_stopped(Code::CHECK_DEVICE_STATE, "D1.6")?;
        transfer.check(self.device.as_ref())
    }
}

/// Returns the reply to a request for which an empty payload means failure.
fn reply_or_empty<T: IntoBytes + Immutable>(code: Code, told: Result<T, BackendError>) -> VhostUserReply {
    told.map(|told| VhostUserReply::new(code, &told)).unwrap_or_else(|error| {
        limited!(warn, "{}", with_causes(&error));
        VhostUserReply { code, payload: Vec::new(), fd: None }
    })
}

/// Returns the end of a message's range of configuration space.
fn config_end(code: Code, offset: u32, len: u32) -> Result<usize, BackendError> {
    match offset.checked_add(len).map(|end| end as usize) {
        Some(end) if end <= VHOST_USER_MAX_CONFIG_SIZE => Ok(end),
        _ => Err(BackendError::Config { code, offset, len, why: "there are 256 bytes at most" }),
    }
}

pub(super) fn config_bytes(message: &VhostUserMessage, offset: u32, len: u32) -> Result<&[u8], BackendError> {
    config_end(message.code, offset, len)?;
    let head = size_of::<ConfigHeader>();
    let (got, needed) = (message.payload.len(), head + len as usize);
    message.payload.get(head..needed).ok_or(BackendError::ShortPayload { code: message.code, got, needed })
}
