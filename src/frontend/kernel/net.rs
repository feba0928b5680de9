//! vhost-net: a network interface behind a tap.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::super::FrontendError;
use super::handle::VhostHandle;
use super::{Kind, LogQuality};
use crate::abi::vhost::{VHOST_NET_F_VIRTIO_NET_HDR, VHOST_NET_SET_BACKEND};
use crate::abi::virtio::{VIRTIO_F_VERSION_1, VIRTIO_ID_NET, VIRTIO_NET_F_MRG_RXBUF, VirtioFeatures};
use crate::sys::tap;

/// Sizes of the header in front of each frame: `struct virtio_net_hdr`, and the one with a number of buffers.
const HEADER: [i32; 2] = [10, 12];

/// A vhost-net device. Its rings start and stop independently.
pub(super) struct Net {
    pub(super) tap: OwnedFd,
}

impl Kind for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queues(&self) -> u16 {
        2
    }

    fn runs_as_a_whole(&self) -> bool {
        false
    }

    fn own_features(&self, _: VirtioFeatures) -> VirtioFeatures {
        // The device makes and strips the header that the tap does not.
        let has_header = tap::flags(self.tap.as_fd()).is_ok_and(|flags| flags & nix::libc::IFF_VNET_HDR as i16 != 0);
        if has_header { VirtioFeatures::empty() } else { VHOST_NET_F_VIRTIO_NET_HDR }
    }

    fn features_set(&self, features: VirtioFeatures) -> Result<(), FrontendError> {
        let with_number = features.intersects(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF);
        if self.own_features(features).is_empty() {
            tap::set_header(self.tap.as_fd(), HEADER[usize::from(with_number)])
                .map_err(FrontendError::system("set the header size of the tap"))?;
        }
        Ok(())
    }

    fn run(&self, handle: &mut VhostHandle, index: u16, _: VirtioFeatures) -> Result<(), FrontendError> {
        // A tap whose interface was removed is accepted, and discards every frame.
        match tap::flags(self.tap.as_fd()) {
            Err(nix::errno::Errno::EBADFD) => {
                let source = nix::errno::Errno::EBADFD.into();
                Err(FrontendError::TapGone { device: handle.name().into(), source })
            }
            _ => handle.set_ring_fd(VHOST_NET_SET_BACKEND, index, Some(self.tap.as_raw_fd())),
        }
    }

    fn halt(&self, handle: &mut VhostHandle, index: u16) -> Result<(), FrontendError> {
        handle.set_ring_fd(VHOST_NET_SET_BACKEND, index, None)
    }

    fn log_quality(&self) -> Result<LogQuality, &'static str> {
        log_quality()
    }
}

/// Returns the quality of the log, or the reason why there is none (rules K4).
pub(super) fn log_quality() -> Result<LogQuality, &'static str> {
    Ok(LogQuality::Exact)
}
