//! vhost-vsock: stream sockets between guest and host.
#![forbid(unsafe_code)]

use super::super::FrontendError;
use super::handle::VhostHandle;
use super::{Kind, LogQuality, no_config};
use crate::abi::vhost::VHOST_VSOCK_SET_RUNNING;
use crate::abi::virtio::{VIRTIO_ID_VSOCK, VirtioFeatures};

/// A vhost-vsock device, with the rings for receiving and sending. The VMM keeps the event ring.
pub(super) struct Vsock {
    pub(super) cid: u64,
}

impl Kind for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queues(&self) -> u16 {
        2
    }

    fn runs_as_a_whole(&self) -> bool {
        true
    }

    fn run(&self, handle: &mut VhostHandle, _: u16, _: VirtioFeatures) -> Result<(), FrontendError> {
        handle.set(VHOST_VSOCK_SET_RUNNING, 1i32)
    }

    fn halt(&self, handle: &mut VhostHandle, _: u16) -> Result<(), FrontendError> {
        handle.set(VHOST_VSOCK_SET_RUNNING, 0i32)
    }

    fn log_quality(&self) -> Result<LogQuality, &'static str> {
        log_quality()
    }

    /// Reads `struct virtio_vsock_config`: the context id.
    fn config(&self, _: &VhostHandle, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        let bytes = self.cid.to_le_bytes();
        match bytes.get(offset as usize..).and_then(|rest| rest.get(..buf.len())) {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => return Err(no_config(format!("{} bytes of configuration at {offset}", buf.len()))),
        }
        Ok(())
    }
}

/// Returns the quality of the log, or the reason why there is none (rules K4).
pub(super) fn log_quality() -> Result<LogQuality, &'static str> {
    Err("the kernel does not log what vhost-vsock writes to guest memory, although it offers LOG_ALL (rule K4.2); \
         wrap it in shadow::ShadowDevice")
}
