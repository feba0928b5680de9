//! A device that a process has left behind on the vDPA bus, while it is removed.
//!
//! The kernel removes a disk only after all its requests are completed, also those that flush its page cache. They are
//! completed with an error here, because the image may be another one.

#![forbid(unsafe_code)]

use std::io;

use crate::abi::virtio::{
    MAX_QUEUE_SIZE, PACKED_DESC_F_AVAIL, PackedDesc, VIRTIO_BLK_S_IOERR, VIRTIO_ID_BLOCK, VirtioFeatures,
};
use crate::backend::{Queue, Request, SyncQueue, VirtioDevice};
use crate::ring::RingBase;
use crate::vduse::files::DeviceFile;
use crate::vduse::offer::Offer;

/// A device whose disk requests fail.
pub(super) struct LeftBehind {
    queues: u16,
    /// Other devices complete no requests: none are needed to remove them.
    is_disk: bool,
}

impl LeftBehind {
    /// Describes the device behind `file`.
    pub(super) fn new(file: &DeviceFile, is_disk: bool) -> LeftBehind {
        let queues = (0..u16::MAX).take_while(|index| file.ring(*index).is_ok()).count();
        LeftBehind { queues: queues as u16, is_disk }
    }

    /// The offer, of which only the number of rings is known.
    pub(super) fn offer(&self) -> Offer {
        Offer { features: self.features(), queues: self.queues }
    }
}

impl VirtioDevice for LeftBehind {
    fn features(&self) -> VirtioFeatures {
        VirtioFeatures::from_bits_retain(u64::MAX)
    }

    fn device_id(&self) -> Option<u32> {
        self.is_disk.then_some(VIRTIO_ID_BLOCK)
    }

    fn queues(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE as u16
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        if !self.is_disk {
            return Ok(Box::new(Unserved));
        }
        Ok(Box::new(SyncQueue::new(|request: &mut Request| {
            if let Some(status) = request.writable_len().checked_sub(1) {
                let _ = request.write(status, &[VIRTIO_BLK_S_IOERR]);
            }
        })))
    }
}

/// A queue that takes no requests.
struct Unserved;

impl Queue for Unserved {
    fn wants_request(&mut self) -> bool {
        false
    }

    fn submit(&mut self, request: Request) {
        drop(request);
    }

    fn completions(&mut self, _: &mut Vec<Request>) {}
}

/// Returns the base of a packed ring without requests in flight. The driver writes one descriptor after another, each with
/// its wrap counter as AVAIL, and the device leaves that bit as it is: the ring stands where the bit changes.
pub(super) fn idle_base(descs: &[PackedDesc]) -> RingBase {
    let is_avail = |desc: &PackedDesc| desc.flags.get() >> PACKED_DESC_F_AVAIL & 1 != 0;
    let first = descs.first().is_some_and(is_avail);
    let (index, wrap) = match descs.iter().position(|desc| is_avail(desc) != first) {
        Some(index) => (index as u16, first),
        None => (0, !first),
    };
    RingBase::packed(index, wrap, index, wrap)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use zerocopy::FromZeros;

    use super::*;

    /// Rule V3.2.
    #[rstest]
    #[case::fresh(&[false; 4], 0, true)]
    #[case::in_the_first_lap(&[true, true, false, false], 2, true)]
    #[case::after_the_first_lap(&[true; 4], 0, false)]
    #[case::in_the_second_lap(&[false, true, true, true], 1, false)]
    fn a_packed_ring_stands_where_avail_changes(#[case] avail: &[bool], #[case] index: u16, #[case] wrap: bool) {
        let desc = |avail: &bool| PackedDesc {
            flags: (u16::from(*avail) << PACKED_DESC_F_AVAIL).into(),
            ..PackedDesc::new_zeroed()
        };
        let descs: Vec<_> = avail.iter().map(desc).collect();
        assert_eq!(idle_base(&descs), RingBase::packed(index, wrap, index, wrap));
    }
}
