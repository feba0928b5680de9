//! Disk requests behind an IOMMU whose parts cross page boundaries.

use std::collections::BTreeSet;

use vhost_migrate::abi::virtio::{BlkRequestHeader, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory};
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::guest::Ring;
use crate::iommu_guest::{DATA, Random};

/// Initial contents of a disk of [`crate::server::Server`].
pub(crate) fn contents(sector: u64, len: u64) -> Vec<u8> {
    let sectors = (sector..sector + len / 512).flat_map(|number| {
        let mut bytes = [number as u8 | 1; 512];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes
    });
    sectors.collect()
}

pub(crate) fn bytes(memory: &Memory, address: GuestAddress, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    memory.read(address, &mut bytes).unwrap();
    bytes
}

/// Memory of one request: header, status, table, and 64 KiB of data.
pub(crate) struct Slot(pub(crate) u64);

impl Slot {
    pub(crate) const BYTES: u64 = 32 * LOG_PAGE;

    /// Its first address.
    pub(crate) fn at(&self) -> GuestAddress {
        DATA.unchecked_add(self.0 * Slot::BYTES)
    }

    pub(crate) fn header(&self) -> GuestAddress {
        // It crosses a page boundary, like the other parts.
        self.at().unchecked_add(LOG_PAGE - 7)
    }

    pub(crate) fn status(&self) -> GuestAddress {
        self.at().unchecked_add(3 * LOG_PAGE)
    }

    pub(crate) fn table(&self) -> GuestAddress {
        self.at().unchecked_add(6 * LOG_PAGE - 24)
    }

    pub(crate) fn data(&self) -> GuestAddress {
        self.at().unchecked_add(8 * LOG_PAGE + 100)
    }

    pub(crate) fn add(&self, ring: &mut Ring, memory: &Memory, kind: u32, sector: u64, len: u64, indirect: bool) {
        let header = BlkRequestHeader { request_type: kind.into(), ioprio: 0.into(), sector: sector.into() };
        memory.write(self.header(), header.as_bytes()).unwrap();
        memory.write(self.status(), &[0xff]).unwrap();
        let header = Buffer { gpa: self.header(), len: 16 };
        let data = [
            Buffer { gpa: self.data(), len: 300 },
            Buffer { gpa: self.data().unchecked_add(300), len: len as u32 - 300 },
        ];
        let status = Buffer { gpa: self.status(), len: 1 };
        let table = indirect.then(|| self.table());
        let added = match kind {
            VIRTIO_BLK_T_IN => ring.driver.add(&[header], &[data[0], data[1], status], table),
            _ => ring.driver.add(&[header, data[0], data[1]], &[status], table),
        };
        added.unwrap().expect("the ring has room");
    }
}

/// Random reads and writes of a disk, and what they change.
pub(crate) struct DiskLoad {
    dice: Random,
    pub(crate) disk: Vec<u8>,
    /// Pages that the device has written, and those that the driver has.
    pub(crate) by_device: BTreeSet<u64>,
    pub(crate) by_driver: BTreeSet<u64>,
}

impl DiskLoad {
    /// A load for a new disk of `bytes`.
    pub(crate) fn new(bytes: u64) -> DiskLoad {
        DiskLoad { dice: Random(1), disk: contents(0, bytes), by_device: BTreeSet::new(), by_driver: BTreeSet::new() }
    }

    /// Executes eight requests at once and checks them. `memory` is the driver's, and `pages` returns the guest-physical
    /// pages of a range of it.
    pub(crate) fn round<P: Iterator<Item = u64>>(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        pages: impl Fn(GuestAddress, u64) -> P,
        indirect: bool,
    ) {
        let (mut reads, sectors) = (Vec::new(), self.disk.len() as u64 / 512);
        for number in 0..8u64 {
            let writes = self.dice.below(2);
            let slot = Slot(writes * 8 + number);
            // A part of the disk for each, so that their order does not matter.
            let len = (2 + self.dice.below(60)) * 512;
            let sector = number * (sectors / 8) + self.dice.below(sectors / 8 - 64);
            let on_disk = sector as usize * 512..sector as usize * 512 + len as usize;
            self.by_device.extend(pages(slot.status(), 1));
            self.by_driver.extend(pages(slot.header(), 16).chain(pages(slot.status(), 1)));
            self.by_driver.extend(pages(slot.table(), 4 * 16));
            if writes == 1 {
                let data: Vec<u8> = (0..len).map(|_| self.dice.below(256) as u8).collect();
                memory.write(slot.data(), &data).unwrap();
                self.by_driver.extend(pages(slot.data(), len));
                self.disk[on_disk].copy_from_slice(&data);
                slot.add(ring, memory, VIRTIO_BLK_T_OUT, sector, len, indirect);
            } else {
                self.by_device.extend(pages(slot.data(), len));
                slot.add(ring, memory, VIRTIO_BLK_T_IN, sector, len, indirect);
                reads.push((slot, on_disk));
            }
        }
        ring.kick();
        assert_eq!(ring.completions(8).len(), 8);
        for (slot, on_disk) in reads {
            assert_eq!(bytes(memory, slot.status(), 1), [0]);
            assert!(
                bytes(memory, slot.data(), on_disk.len() as u64) == self.disk[on_disk],
                "other data was read in slot {}",
                slot.0
            );
        }
    }
}
