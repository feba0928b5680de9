//! The features and rings that a device is offered with, which the kernel restricts (rule V2).

#![forbid(unsafe_code)]

use crate::abi::virtio::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED, VIRTIO_ID_BLOCK, VIRTIO_ID_NET,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VirtioFeatures,
};
use crate::backend::VirtioDevice;

/// Features of a network interface that need its control queue.
const OF_CONTROL_QUEUE: VirtioFeatures = VIRTIO_NET_F_CTRL_VQ
    .union(VIRTIO_NET_F_CTRL_RX)
    .union(VIRTIO_NET_F_CTRL_VLAN)
    .union(VIRTIO_NET_F_CTRL_RX_EXTRA)
    .union(VIRTIO_NET_F_CTRL_MAC_ADDR)
    .union(VIRTIO_NET_F_GUEST_ANNOUNCE)
    .union(VIRTIO_NET_F_MQ);
/// Rings of a network interface without a control queue.
const RINGS_OF_ONE_PAIR: u16 = 2;

/// The features and the number of rings that a device is offered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) features: VirtioFeatures,
    pub(super) queues: u16,
}

/// Returns the offers to try, the largest first.
pub(super) fn offers(device: &dyn VirtioDevice, device_id: u32, split_rings: bool) -> Vec<Offer> {
    let mut features = device.features() | VIRTIO_F_ACCESS_PLATFORM;
    if split_rings {
        features.remove(VIRTIO_F_RING_PACKED);
    }
    let whole = Offer { features, queues: device.queues() };
    let reduced = match device_id {
        VIRTIO_ID_NET => Offer { features: features & !OF_CONTROL_QUEUE, queues: whole.queues.min(RINGS_OF_ONE_PAIR) },
        VIRTIO_ID_BLOCK => Offer { features: features & !VIRTIO_BLK_F_CONFIG_WCE, ..whole },
        _ => whole,
    };
    if reduced == whole { vec![whole] } else { vec![whole, reduced] }
}

#[cfg(test)]
mod tests {
    use std::io;

    use rstest::rstest;

    use super::*;
    use crate::abi::virtio::{VIRTIO_F_VERSION_1, VIRTIO_NET_F_MAC};
    use crate::backend::Queue;

    struct Device(VirtioFeatures);

    impl VirtioDevice for Device {
        fn features(&self) -> VirtioFeatures {
            self.0
        }

        fn queues(&self) -> u16 {
            5
        }

        fn config(&self) -> Vec<u8> {
            Vec::new()
        }

        fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Rule V2.3.
    #[rstest]
    #[case(VIRTIO_ID_NET, VIRTIO_NET_F_MAC | VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ, VIRTIO_NET_F_MAC, 2)]
    #[case(VIRTIO_ID_BLOCK, VIRTIO_BLK_F_CONFIG_WCE, VirtioFeatures::empty(), 5)]
    fn the_second_offer_leaves_out_what_kernels_refuse(
        #[case] id: u32,
        #[case] whole: VirtioFeatures,
        #[case] reduced: VirtioFeatures,
        #[case] queues: u16,
    ) {
        let all = |own| own | VIRTIO_F_VERSION_1 | VIRTIO_F_RING_PACKED | VIRTIO_F_ACCESS_PLATFORM;
        let [first, second] = offers(&Device(all(whole)), id, false)[..] else { panic!("two offers") };
        assert_eq!((first.features, first.queues), (all(whole), 5));
        assert_eq!((second.features, second.queues), (all(reduced), queues));
    }

    /// Rule V2.1.
    #[test]
    fn access_platform_is_always_offered_and_packed_rings_unless_they_are_unwanted() {
        let device = Device(VIRTIO_F_VERSION_1 | VIRTIO_F_RING_PACKED);
        let of = |split_rings| offers(&device, VIRTIO_ID_BLOCK, split_rings)[0].features;
        assert_eq!(of(false), VIRTIO_F_VERSION_1 | VIRTIO_F_RING_PACKED | VIRTIO_F_ACCESS_PLATFORM);
        assert_eq!(of(true), VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM);
    }
}
