//! Behind an IOMMU: events after which the back-end discards translations without an invalidation (rule T3.7).

use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, MemoryHeader, MemoryRegion};
use vhost_migrate::abi::virtio::{VIRTIO_BLK_T_IN, VIRTIO_F_RING_PACKED, VirtioFeatures};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Region, UserAddress};
use zerocopy::IntoBytes;

use crate::guest::{BASIC, Guest, HIGH, REGION, Ring};
use crate::iommu_guest::{BASE, FEATURES, IommuGuest};
use crate::iommu_load::{Slot, bytes, contents};
use crate::server::Server;

const DISK: u64 = 4 << 20;
const BOTH: [VirtioFeatures; 2] = [VirtioFeatures::empty(), VIRTIO_F_RING_PACKED];

fn server() -> Server {
    Server::disk(DISK, |options| options.iommu = true)
}

/// Submits one read, and asserts that its data is in the pages that the IOMMU maps now.
fn assert_read(space: &IommuGuest, ring: &mut Ring, sector: u64) {
    let memory = space.driver_memory(Slot(0).at(), Slot::BYTES);
    Slot(0).add(ring, &memory, VIRTIO_BLK_T_IN, sector, 1024, false);
    ring.serve_one();
    assert_eq!(bytes(&memory, Slot(0).data(), 1024), contents(sector, 1024));
}

/// Remaps the pages of a request without an invalidation. The driver fills the old pages, which are returned.
fn remap_silently(space: &IommuGuest, to: GuestAddress) -> Vec<GuestAddress> {
    let (first, count) = (Slot(0).at().0 / LOG_PAGE, Slot::BYTES / LOG_PAGE);
    let pages = first..first + count;
    let old: Vec<_> = pages.clone().map(|page| space.gpa(GuestAddress(page * LOG_PAGE))).collect();
    let mut map = space.iommu.map.lock().unwrap();
    for (page, free) in pages.zip(to.0 / LOG_PAGE..) {
        let new = map[&free];
        map.insert(page, new);
    }
    drop(map);
    old.iter().for_each(|gpa| space.guest.memory.write(*gpa, &[0xee; LOG_PAGE as usize]).unwrap());
    old
}

fn assert_untouched(space: &IommuGuest, pages: &[GuestAddress]) {
    for gpa in pages {
        let is_as_it_was = space.guest.bytes(*gpa, LOG_PAGE as usize).iter().all(|byte| *byte == 0xee);
        assert!(is_as_it_was, "{:#x} was written by an old translation", gpa.0);
    }
}

#[test]
fn a_stopped_device_requests_every_translation_again_when_restarted() {
    for features in BOTH {
        let server = server();
        let space = IommuGuest::new(server.connect(), FEATURES | features);
        let mut ring = space.ring(0, 256, features);
        space.start(&ring, ring.initial_base());
        assert_read(&space, &mut ring, 1);
        ring.enable(&space.client, false);
        let base = space.client.ring_base(0);
        let old = remap_silently(&space, BASE.unchecked_add(12 << 20));
        space.start(&ring, base);
        assert_read(&space, &mut ring, 7);
        assert_untouched(&space, &old);
    }
}

#[test]
fn acknowledging_access_platform_again_discards_all_translations() {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES);
    let mut ring = space.ring(0, 256, VirtioFeatures::empty());
    space.start(&ring, 0);
    assert_read(&space, &mut ring, 1);
    // The ring is disabled, but not stopped.
    ring.enable(&space.client, false);
    space.client.send_acknowledged(Code::SET_FEATURES, &BASIC, &[]);
    let old = remap_silently(&space, BASE.unchecked_add(12 << 20));
    space.client.send_acknowledged(Code::SET_FEATURES, &FEATURES, &[]);
    ring.enable(&space.client, true);
    assert_read(&space, &mut ring, 7);
    assert_untouched(&space, &old);
    assert_eq!(space.client.ring_base(0), 2);
}

/// The user addresses of the two regions are swapped. The ring continues.
#[test]
fn a_new_memory_table_discards_translations_to_old_addresses() {
    for features in BOTH {
        let server = server();
        let space = IommuGuest::new(server.connect(), FEATURES | features);
        let mut ring = space.ring(0, 256, features);
        space.start(&ring, ring.initial_base());
        assert_read(&space, &mut ring, 1);
        let memory = space.driver_memory(Slot(0).at(), Slot::BYTES);
        let (low, high) = (space.guest.user(GuestAddress(0)), space.guest.user(HIGH));
        let other = |user| if user == low { high } else { low };
        for (user, _) in space.iommu.map.lock().unwrap().values_mut() {
            let is_low = user.checked_offset_from(low).is_some_and(|offset| offset < REGION);
            let region = if is_low { low } else { high };
            let offset = user.checked_offset_from(region).unwrap();
            *user = other(region).checked_add(offset).unwrap();
        }
        let describe = |region: &std::sync::Arc<Region>| {
            let region = Guest::describe(region);
            MemoryRegion { userspace_addr: other(UserAddress(region.userspace_addr)).0, ..region }
        };
        let regions: Vec<MemoryRegion> = space.guest.memory.regions().iter().map(describe).collect();
        let header = MemoryHeader { nregions: regions.len() as u32, padding: 0 };
        let table = [header.as_bytes(), regions.as_bytes()].concat();
        assert_eq!(space.client.acknowledged(Code::SET_MEM_TABLE, &table, &space.guest.fds()), 0);
        // The I/O virtual addresses still lead to the same pages of the guest.
        Slot(0).add(&mut ring, &memory, VIRTIO_BLK_T_IN, 7, 1024, false);
        ring.serve_one();
        assert_eq!(bytes(&memory, Slot(0).data(), 1024), contents(7, 1024));
    }
}
