//! A driver of virtio PCI functions that uses qtest, for any device type. It finds the function, maps its BAR,
//! negotiates features, and sets up the queues.

use crate::qtest::Qtest;

const BAR: u64 = 0xe000_0000;

/// Flags of descriptors of a packed ring.
pub(crate) const AVAIL_BIT: u16 = 1 << 7;
pub(crate) const USED_BIT: u16 = 1 << 15;

const ACKNOWLEDGE: u64 = 1;
const DRIVER: u64 = 2;
const DRIVER_OK: u64 = 4;
const FEATURES_OK: u64 = 8;

/// A virtio PCI function: the addresses of its registers.
#[derive(Clone)]
pub(crate) struct VirtioPci {
    common: u64,
    notify: u64,
    notify_multiplier: u64,
}

impl VirtioPci {
    /// Enables the function in PCI slot 3, maps its memory BAR and reads its virtio capabilities.
    pub(crate) fn find(qtest: &mut Qtest) -> VirtioPci {
        assert_eq!(config(qtest, 0) & 0xffff, 0x1af4, "no virtio function in PCI slot 3");
        let mut pointer = config(qtest, 0x34) & 0xff;
        let (mut common, mut notify, mut notify_multiplier, mut bar) = (None, None, 0, 0);
        while pointer != 0 {
            let head = config(qtest, pointer);
            if head & 0xff == 9 {
                let offset = config(qtest, pointer + 8);
                match head >> 24 {
                    1 => (common, bar) = (Some(BAR + offset), config(qtest, pointer + 4) & 0xff),
                    2 => (notify, notify_multiplier) = (Some(BAR + offset), config(qtest, pointer + 16)),
                    _ => {}
                }
            }
            pointer = (head >> 8) & 0xff;
        }
        select(qtest, 0x10 + 4 * bar);
        qtest.store("outl", 0xcfc, BAR);
        select(qtest, 0x14 + 4 * bar);
        qtest.store("outl", 0xcfc, 0);
        select(qtest, 4);
        qtest.store("outw", 0xcfc, 2 | 4); // memory space, bus master
        let (Some(common), Some(notify)) = (common, notify) else { panic!("no modern virtio capabilities") };
        VirtioPci { common, notify, notify_multiplier }
    }

    /// Resets the device and acknowledges `features`, all of which it must offer.
    pub(crate) fn acknowledge(&self, qtest: &mut Qtest, features: u64) {
        let common = self.common;
        qtest.store("writeb", common + 20, 0);
        qtest.store("writeb", common + 20, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for word in 0..2 {
            qtest.store("writel", common, word);
            offered |= qtest.load("readl", common + 4) << (32 * word);
        }
        assert_eq!(features & !offered, 0, "the device does not offer {:#x}", features & !offered);
        for word in 0..2 {
            qtest.store("writel", common + 8, word);
            qtest.store("writel", common + 12, (features >> (32 * word)) & 0xffff_ffff);
        }
        qtest.store("writeb", common + 20, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(qtest.load("readb", common + 20) & FEATURES_OK, 0, "features {features:#x} refused");
    }

    /// Enables a queue of `size` entries whose descriptors, driver and device area are at `areas`.
    pub(crate) fn enable_queue(&self, qtest: &mut Qtest, queue: u16, size: u16, areas: [u64; 3]) {
        let common = self.common;
        qtest.store("writew", common + 22, queue.into());
        qtest.store("writew", common + 24, size.into());
        for (register, gpa) in [32, 40, 48].into_iter().zip(areas) {
            qtest.store("writel", common + register, gpa & 0xffff_ffff);
            qtest.store("writel", common + register + 4, gpa >> 32);
        }
        qtest.store("writew", common + 28, 1);
    }

    /// Sets DRIVER_OK: the driver is ready to drive the device.
    pub(crate) fn driver_ok(&self, qtest: &mut Qtest) {
        qtest.store("writeb", self.common + 20, ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK);
    }

    /// Kicks a queue.
    pub(crate) fn notify(&self, qtest: &mut Qtest, queue: u16) {
        qtest.store("writew", self.notify + u64::from(queue) * self.notify_multiplier, queue.into());
    }
}

/// Encodes a descriptor of a split ring. For a packed ring, pass the id as `flags` and the flags as `next`.
pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn select(qtest: &mut Qtest, register: u64) {
    const SLOT_3: u64 = 1 << 31 | 3 << 11;
    qtest.store("outl", 0xcf8, SLOT_3 | register);
}

fn config(qtest: &mut Qtest, register: u64) -> u64 {
    let aligned = register & !3;
    select(qtest, aligned);
    qtest.load("inl", 0xcfc) >> (8 * (register & 3))
}
