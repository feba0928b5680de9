//! Rings behind an IOMMU with scattered pages: translation, invalidation, misses (rules L5, T1 to T4).

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use std::os::fd::AsFd;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, InflightDescription, IotlbMsg, VringAddr, VringState};
use vhost_migrate::abi::virtio::{
    VIRTIO_BLK_T_IN, VIRTIO_F_RING_PACKED, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use vhost_migrate::memory::{Address, GuestAddress, Iova, LOG_PAGE, UserAddress};
use vhost_migrate::ring::{Buffer, DriverRing, RingLayout};
use zerocopy::{FromZeros, IntoBytes};

use crate::blk::STATUS;
use crate::drain::GatedDevice;
use crate::guest::{Guest, LOG_ALL, REGION, Ring, harvest, install_log, wait_for_error};
use crate::iommu_guest::{BASE, CHANNEL, DATA, FEATURES, IommuGuest, Random, invalidate, iova, page_at, update};
use crate::iommu_load::{DiskLoad, Slot, bytes, contents};
use crate::raw::{DEADLINE, NEED_REPLY, RawFrontend, VERSION};
use crate::server::Server;
use crate::wait::is_readable;

const DISK: u64 = 4 << 20;
const PACKED: VirtioFeatures = VIRTIO_F_RING_PACKED;
const INDIRECT: VirtioFeatures = VIRTIO_RING_F_INDIRECT_DESC.union(VIRTIO_RING_F_EVENT_IDX);

fn server() -> Server {
    Server::disk(DISK, |options| options.iommu = true)
}

/// Runs random reads and writes. The log has the pages that the device has written, by guest-physical address, and no
/// other pages.
fn run_translated_disk(features: VirtioFeatures, indirect: bool) {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES | features);
    let log = install_log(&space.client, &space.guest);
    space.client.send_acknowledged(Code::SET_FEATURES, &(FEATURES | features | LOG_ALL), &[]);
    let mut ring = space.ring(0, 1024, features);
    ring.log_at = Some(ring.layout.used);
    space.start(&ring, ring.initial_base());
    let memory = space.driver_memory(BASE, 24 << 20);
    let mut load = DiskLoad::new(DISK);
    let before = space.guest.snapshot();
    for _ in 0..150 {
        load.round(&mut ring, &memory, |at, len| space.pages(at, len), indirect);
    }
    space.client.ring_base(0);
    let DiskLoad { disk, by_device: expected, by_driver: mut driver_wrote, .. } = load;
    assert_eq!(std::fs::read(server.image()).unwrap(), disk, "other data was written");
    let of_device = match features.contains(PACKED) {
        false => vec![(ring.layout.used, 6 + 8 * 1024)],
        true => vec![(ring.layout.desc, 16 * 1024), (ring.layout.used, 4)],
    };
    let of_ring: BTreeSet<u64> = of_device.iter().flat_map(|(at, len)| space.pages(*at, *len)).collect();
    driver_wrote.extend(space.pages(ring.layout.avail, 6 + 2 * 1024).chain(space.pages(ring.layout.desc, 16 * 1024)));
    let marked = harvest(&log);
    assert_eq!(expected.difference(&marked).count(), 0, "written and not logged");
    assert_eq!(marked.difference(&expected).filter(|page| !of_ring.contains(page)).count(), 0, "logged, not written");
    assert_eq!(log.out_of_range(), 0);
    assert!(of_ring.intersection(&marked).count() >= 3, "the ring is logged where it lies");
    // Every page that has changed, and that the driver has not written, is in the log.
    let mut changed = BTreeSet::new();
    for (region, (was, is)) in space.guest.memory.regions().iter().zip(before.iter().zip(space.guest.snapshot())) {
        let pages = was.chunks(LOG_PAGE as usize).zip(is.chunks(LOG_PAGE as usize));
        changed
            .extend((region.gpa().0 / LOG_PAGE..).zip(pages).filter(|(_, (was, is))| was != is).map(|(page, _)| page));
    }
    changed.retain(|page| !driver_wrote.contains(page));
    assert!(changed.len() > 50, "much was written");
    assert_eq!(changed.difference(&marked).count(), 0, "changed and not logged");
    assert!(space.iommu.misses.load(Ordering::SeqCst) > 100, "nothing was known before");
}

/// Rules L5.2, T1.1, T1.2 and T4.1.
#[test]
fn scattered_memory_is_read_written_and_logged_by_guest_physical_address() {
    run_translated_disk(VirtioFeatures::empty(), false);
}

#[test]
fn split_rings_with_indirect_tables_are_translated() {
    run_translated_disk(INDIRECT, true);
}

/// Rule L5.1.
#[test]
fn packed_rings_are_translated_and_logged_by_guest_physical_address() {
    run_translated_disk(PACKED, false);
}

#[test]
fn packed_rings_with_indirect_tables_are_translated() {
    run_translated_disk(PACKED | INDIRECT, true);
}

/// Rule T3.1: pages are remapped while requests that use them are in flight. After the reply, the device does not write
/// to the old pages.
fn invalidate_under_load(features: VirtioFeatures) {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES | features);
    let mut rings: Vec<Ring> = (0..2).map(|index| space.ring(index, 256, features)).collect();
    for ring in &rings {
        space.start(ring, ring.initial_base());
    }
    let (mut dice, mut taken) = (Random(3), BTreeSet::new());
    let mut free: Vec<UserAddress> = {
        let map = space.iommu.map.lock().unwrap();
        let used: BTreeSet<UserAddress> = map.values().map(|(user, _)| *user).collect();
        let all = space
            .guest
            .memory
            .regions()
            .iter()
            .flat_map(|r| (0..r.size() / LOG_PAGE).map(|p| UserAddress(r.user_addr().0 + p * LOG_PAGE)));
        all.filter(|user| !used.contains(user)).collect()
    };
    let check = |taken: &BTreeSet<GuestAddress>| {
        for gpa in taken {
            assert!(
                space.guest.bytes(*gpa, 4096).iter().all(|byte| *byte == 0xee),
                "{:#x} was written after the reply",
                gpa.0
            );
        }
    };
    for round in 0..60 {
        let memory = space.driver_memory(DATA, 8 << 20);
        let mut wanted = Vec::new();
        for (index, ring) in (0..).zip(&mut rings) {
            for number in 0..16 {
                let slot = Slot(index * 16 + number);
                let (sector, len) = (dice.below(DISK / 512 - 128), (2 + dice.below(100)) * 512);
                slot.add(ring, &memory, VIRTIO_BLK_T_IN, sector, len, false);
                wanted.push((slot, sector, len));
            }
            ring.kick();
        }
        // One data page of each request is remapped. If the request is already complete, its data is in the old page.
        let mut moved = Vec::new();
        for (slot, _, len) in &wanted {
            let page = page_at(slot.data().unchecked_add(dice.below(*len)));
            let to = free.swap_remove(dice.below(free.len() as u64) as usize);
            let was = space.gpa(page);
            space.remap([(page, Some((to, 3)))]);
            taken.insert(was);
            taken.remove(&space.gpa(page));
            space.guest.memory.write(was, &[0xee; 4096]).unwrap();
            free.push(space.guest.user(was));
            moved.push(page);
            if round % 8 == 0 {
                check(&taken);
            }
        }
        for ring in &mut rings {
            assert_eq!(ring.completions(16).len(), 16);
        }
        check(&taken);
        // All data outside the remapped pages has arrived.
        let memory = space.driver_memory(DATA, 8 << 20);
        for (slot, sector, len) in wanted {
            assert_eq!(bytes(&memory, slot.status(), 1), [0]);
            let (found, right) = (bytes(&memory, slot.data(), len), contents(sector, len));
            let moved = |at: u64| moved.contains(&page_at(slot.data().unchecked_add(at)));
            assert!((0..len).all(|at| moved(at) || found[at as usize] == right[at as usize]), "other data was read");
        }
    }
}

#[test]
fn a_split_ring_does_not_access_a_page_after_acknowledging_its_invalidation() {
    invalidate_under_load(VirtioFeatures::empty());
}

#[test]
fn a_packed_ring_does_not_access_a_page_after_acknowledging_its_invalidation() {
    invalidate_under_load(PACKED);
}

fn page(slot: u64) -> Buffer {
    Buffer { gpa: DATA.unchecked_add(slot * LOG_PAGE), len: LOG_PAGE as u32 }
}

/// Starts ring 0 with `count` requests of one page each. The device has taken all of them, and holds them.
fn held(space: &IommuGuest, features: VirtioFeatures, count: u64) -> Ring {
    let mut ring = space.ring(0, 256, features);
    for slot in 0..count {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
    }
    space.start(&ring, ring.initial_base());
    ring.kick();
    while (0..count).any(|slot| space.guest.bytes(space.gpa(page(slot).gpa), 1) != [0x5a]) {
        space.client.wait_until_processed();
    }
    ring
}

/// Rule T3.2, with a device that completes no request until its gate is open.
#[test]
fn an_invalidation_waits_only_for_requests_that_use_the_range() {
    let (device, gate) = GatedDevice::new();
    let server = Server::new(device);
    let space = IommuGuest::new(server.connect(), FEATURES);
    let mut ring = held(&space, VirtioFeatures::empty(), 4);
    space.client.send_acknowledged(Code::IOTLB_MSG, &invalidate(Iova(page(4).gpa.0), 1 << 20), &[]);
    space.client.send(Code::IOTLB_MSG, NEED_REPLY, invalidate(Iova(page(3).gpa.0 + 4095), 1).as_bytes(), &[]);
    assert!(!is_readable(&space.client, 100u8), "it was acknowledged while a request used it");
    gate.write(1).unwrap();
    assert_eq!(space.client.reply(Code::IOTLB_MSG), [0; 8]);
    assert_eq!(ring.completions(4).len(), 4);
    // An invalidation of the ring's own pages waits until the request in flight is published.
    let _ = gate.read();
    ring.driver.add(&[], &[page(7)], None).unwrap().unwrap();
    ring.kick();
    while space.guest.bytes(space.gpa(page(7).gpa), 1) != [0x5a] {
        std::thread::yield_now();
    }
    space.client.send(Code::IOTLB_MSG, NEED_REPLY, invalidate(Iova(ring.layout.used.0), 1).as_bytes(), &[]);
    assert!(!is_readable(&space.client, 100u8), "it was acknowledged while a request was to be published");
    gate.write(1).unwrap();
    assert_eq!(space.client.reply(Code::IOTLB_MSG), [0; 8]);
    assert!(ring.driver.pop_used().unwrap().is_some(), "it was acknowledged before the request was published");
}

/// Rules T1.1, I3.3, I4.5: the inflight region has I/O virtual addresses, and a successor starts without translations.
fn recover_after_kill(features: VirtioFeatures) {
    let (device, gate) = GatedDevice::new();
    let server = Server::new(device);
    let space = IommuGuest::new(server.connect(), FEATURES | features);
    let wish = InflightDescription { num_queues: 2, queue_size: 256, ..InflightDescription::new_zeroed() };
    space.client.send(Code::GET_INFLIGHT_FD, VERSION, wish.as_bytes(), &[]);
    let (_, region, fd) = space.client.receive();
    let fd = fd.unwrap();
    assert_eq!(space.client.acknowledged(Code::SET_INFLIGHT_FD, &region, &[fd.as_fd()]), 0);
    let mut ring = held(&space, features, 5);
    let guest = Guest { memory: space.guest.memory.clone() };
    let (memory, region_file) = (guest.snapshot(), File::from(fd.try_clone().unwrap()));
    let mut contents = vec![0; region_file.metadata().unwrap().len() as usize];
    region_file.read_exact_at(&mut contents, 0).unwrap();
    gate.write(1).unwrap();
    drop(space);
    let space = IommuGuest::of(guest, server.connect(), FEATURES | features);
    let _ = gate.read();
    // Memory and inflight region are restored, as if the first back-end had been killed with its requests in flight.
    for (region, bytes) in space.guest.memory.regions().iter().zip(memory) {
        space.guest.memory.write(region.gpa(), &bytes).unwrap();
    }
    region_file.write_all_at(&contents, 0).unwrap();
    for slot in 0..5 {
        space.guest.memory.write(space.gpa(page(slot).gpa), &[0; 4096]).unwrap();
    }
    assert!(ring.driver.pop_used().unwrap().is_none());
    assert_eq!(space.client.acknowledged(Code::SET_INFLIGHT_FD, &region, &[fd.as_fd()]), 0);
    // At first, the IOMMU answers no miss, and only the ring's areas are translated. The ring can be stopped and keeps
    // its requests.
    for page in [ring.layout.desc, ring.layout.avail, ring.layout.used] {
        for page in (0..3).map(|number| page.unchecked_add(number * LOG_PAGE)) {
            let translation = update(iova(page), LOG_PAGE, space.guest.user(space.gpa(page)), 3);
            space.client.send_acknowledged(Code::IOTLB_MSG, &translation, &[]);
        }
    }
    space.iommu.silent.store(true, Ordering::SeqCst);
    space.start(&ring, 0);
    let base = space.client.ring_base(0);
    assert_eq!(space.guest.bytes(space.gpa(page(0).gpa), 4096), [0; 4096]);
    space.iommu.silent.store(false, Ordering::SeqCst);
    space.start(&ring, base);
    gate.write(1).unwrap();
    assert_eq!(ring.completions(5).len(), 5);
    for slot in 0..5 {
        assert_eq!(space.guest.bytes(space.gpa(page(slot).gpa), 4096), [0x5a; 4096], "{slot} was not served again");
    }
    assert_eq!(space.client.ring_base(0), ring.drained_base());
}

#[test]
fn a_successor_translates_and_completes_requests_of_a_split_ring_in_flight() {
    recover_after_kill(VirtioFeatures::empty());
}

#[test]
fn a_successor_translates_and_completes_requests_of_a_packed_ring_in_flight() {
    recover_after_kill(PACKED);
}

/// Publishes one read in `slot`, and kicks.
fn read(space: &IommuGuest, ring: &mut Ring, slot: u64) {
    Slot(slot).add(ring, &space.driver_memory(Slot(slot).at(), Slot::BYTES), VIRTIO_BLK_T_IN, 1, 1024, false);
    ring.kick();
}

pub(crate) fn assert_served(space: &IommuGuest, ring: &mut Ring, slot: u64) {
    read(space, ring, slot);
    ring.completion();
    assert_eq!(bytes(&space.driver_memory(Slot(slot).data(), 1024), Slot(slot).data(), 1024), contents(1, 1024));
}

/// Rule F6.4.
#[test]
fn a_truncated_iotlb_msg_is_refused_and_the_ring_continues() {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES);
    let mut ring = space.ring(0, 256, VirtioFeatures::empty());
    space.start(&ring, 0);
    let whole = invalidate(Iova(0), 0);
    for len in [0, 3, 31] {
        let payload = &whole.as_bytes()[..len];
        assert_eq!(space.client.acknowledged(Code::IOTLB_MSG, payload, &[]), 1, "{len} bytes");
        space.client.send(Code::IOTLB_MSG, VERSION, payload, &[space.client.as_fd()]);
        assert_served(&space, &mut ring, len as u64);
    }
    assert_eq!(space.client.ring_base(0), 3);
}

/// Rule T1.4: a page that may only be read, one without any permission, and one without a mapping.
#[test]
fn a_refused_translation_breaks_only_the_ring_that_needs_it() {
    for permission in [Some(1), Some(0), None] {
        let server = server();
        let space = IommuGuest::new(server.connect(), FEATURES);
        let (mut bad, mut good) =
            (space.ring(0, 256, VirtioFeatures::empty()), space.ring(1, 256, VirtioFeatures::empty()));
        let error = space.start(&bad, 0);
        space.start(&good, 0);
        let page = page_at(Slot(0).data().unchecked_add(1000));
        let (user, _) = space.iommu.map.lock().unwrap()[&(page.0 / LOG_PAGE)];
        let gpa = space.gpa(page);
        assert_served(&space, &mut bad, 0);
        let before = space.guest.bytes(gpa, 4096);
        Slot(0).add(&mut bad, &space.driver_memory(DATA, 8 << 20), VIRTIO_BLK_T_IN, 77, 2048, false);
        space.remap([(page, permission.map(|permission| (user, permission)))]);
        bad.kick();
        wait_for_error(&error, "the ring");
        assert_eq!(space.guest.bytes(gpa, 4096), before, "it was written");
        assert_served(&space, &mut good, 1);
        let refused = space.iommu.failures.load(Ordering::SeqCst);
        assert_eq!(refused, u64::from(permission.is_some()), "the IOMMU hears of what it forbids");
        assert_eq!(space.client.ring_base(0), 1, "what could not be translated was not taken");
        // Once the page is mapped again, the ring continues at its base.
        space.remap([(page, Some((user, 3)))]);
        space.start(&bad, 1);
        bad.completion();
        assert_eq!(bytes(&space.driver_memory(Slot(0).data(), 2048), Slot(0).data(), 2048), contents(77, 2048));
    }
}

/// Rule T1.5: the IOMMU does not answer misses.
#[test]
fn an_unanswered_miss_delays_only_the_ring_that_needs_it() {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES);
    let (mut stuck, mut good) =
        (space.ring(0, 256, VirtioFeatures::empty()), space.ring(1, 256, VirtioFeatures::empty()));
    space.start(&stuck, 0);
    space.start(&good, 0);
    assert_served(&space, &mut stuck, 0);
    assert_served(&space, &mut good, 1);
    space.iommu.silent.store(true, Ordering::SeqCst);
    read(&space, &mut stuck, 5);
    for _ in 0..100 {
        assert_served(&space, &mut good, 1);
    }
    assert!(stuck.driver.pop_used().unwrap().is_none());
    // An invalidation of the address that the ring waits for is acknowledged meanwhile.
    space.client.send_acknowledged(Code::IOTLB_MSG, &invalidate(iova(Slot(5).header()), 16), &[]);
    assert_eq!(space.client.ring_base(0), 1);
    space.start(&stuck, 1);
    // A ring that waits for a translation of its own areas can be stopped too.
    space.client.send_acknowledged(Code::IOTLB_MSG, &invalidate(iova(stuck.layout.avail), 4096), &[]);
    assert_eq!(space.client.ring_base(0), 1);
    space.start(&stuck, 1);
    space.iommu.silent.store(false, Ordering::SeqCst);
    space.client.ring_base(0);
    space.start(&stuck, 1);
    stuck.completion();
    assert_eq!(bytes(&space.driver_memory(Slot(5).data(), 1024), Slot(5).data(), 1024), contents(1, 1024));
    // A hang-up ends the wait for the translation, and the next front-end is served.
    space.iommu.silent.store(true, Ordering::SeqCst);
    read(&space, &mut stuck, 6);
    assert_served(&space, &mut good, 1);
    drop(space);
    IommuGuest::new(server.connect(), FEATURES);
}

/// Rule T3.4: the pages of a ring are remapped while the ring runs.
fn remap_ring(features: VirtioFeatures) {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES | features);
    let mut ring = space.ring(0, 256, features);
    space.start(&ring, ring.initial_base());
    let mut free = BASE.unchecked_add(12 << 20);
    for round in 0..20 {
        assert_served(&space, &mut ring, round);
        let parts = [ring.layout.desc, ring.layout.avail, ring.layout.used];
        let page = parts[round as usize % 3];
        let (old, new) = (space.gpa(page), space.gpa(free));
        let (user, _) = space.iommu.map.lock().unwrap()[&(free.0 / LOG_PAGE)];
        free = free.unchecked_add(LOG_PAGE);
        space.remap([(page, None)]);
        // The old page belongs to the driver now, which may write anything to it.
        let contents = space.guest.bytes(old, 4096);
        space.guest.memory.write(old, &[0xee; 4096]).unwrap();
        let state = ring.driver.state();
        space.guest.memory.write(new, &contents).unwrap();
        space.remap([(page, Some((user, 3)))]);
        let layout = RingLayout::new(features, 256, parts);
        let memory = space.driver_memory(BASE, 24 << 20);
        ring.driver = DriverRing::restore(&memory, layout, features, &state).unwrap();
        assert_served(&space, &mut ring, round);
        assert!(space.guest.bytes(old, 4096).iter().all(|byte| *byte == 0xee), "the old page was written");
    }
}

#[test]
fn a_split_ring_continues_after_its_pages_are_remapped() {
    remap_ring(VirtioFeatures::empty());
}

#[test]
fn a_packed_ring_continues_after_its_pages_are_remapped() {
    remap_ring(PACKED);
}

/// Without a channel, the back-end uses the translations that it was sent. A ring that needs another
/// translation breaks.
/// Rules T1.7 and T3.8.
#[test]
fn without_a_back_end_channel_only_pushed_translations_are_used() {
    let server = server();
    let client = server.connect();
    let guest = Guest::new();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &CHANNEL);
    client.send_acknowledged(Code::SET_FEATURES, &FEATURES, &[]);
    guest.send_table(&client);
    // One translation of the whole first region, as a front-end without an IOMMU may send it.
    client.send_acknowledged(Code::IOTLB_MSG, &update(Iova(0), REGION, guest.user(GuestAddress(0)), 3), &[]);
    let mut ring = Ring::new(&guest, 0, 256, VirtioFeatures::empty());
    let error = EventFd::new().unwrap();
    client.send_acknowledged(Code::SET_VRING_ERR, &0u64, &[error.as_fd()]);
    let space_addr = |ring: &Ring| VringAddr {
        index: 0,
        flags: 0,
        desc_user_addr: ring.layout.desc.0,
        used_user_addr: ring.layout.used.0,
        avail_user_addr: ring.layout.avail.0,
        log_guest_addr: 0,
    };
    let start = |ring: &Ring| {
        client.send_acknowledged(Code::SET_VRING_CALL, &0u64, &[ring.call.as_fd()]);
        client.send_body(Code::SET_VRING_NUM, &VringState { index: 0, num: 256 });
        client.send_body(Code::SET_VRING_ADDR, &space_addr(ring));
        client.send_acknowledged(Code::SET_VRING_KICK, &0u64, &[ring.kick.as_fd()]);
        ring.enable(&client, true);
    };
    start(&ring);
    let header = crate::guest::header(&guest, GuestAddress(0x60_0000), VIRTIO_BLK_T_IN, 3);
    let add = |ring: &mut Ring, gpa| {
        let writable = [Buffer { gpa, len: 512 }, STATUS];
        ring.driver.add(&[header], &writable, None).unwrap().unwrap();
        ring.kick();
    };
    let data = GuestAddress(0x90_0000);
    add(&mut ring, data);
    ring.completion();
    assert_eq!(guest.bytes(data, 512), contents(3, 512));
    add(&mut ring, GuestAddress(0x4000_0000));
    wait_for_error(&error, "the ring");
    assert_eq!(client.ring_base(0), 1);
}

/// Invalid messages have no effect. An invalidation of everything during I/O only delays requests.
/// Rules T2.1 and T2.2.
#[test]
fn invalid_translations_are_refused_and_the_rings_continue() {
    let server = server();
    let space = IommuGuest::new(server.connect(), FEATURES);
    let mut ring = space.ring(0, 256, VirtioFeatures::empty());
    space.start(&ring, 0);
    assert_served(&space, &mut ring, 0);
    let (base, user) = (iova(BASE), space.guest.user(GuestAddress(0)));
    let refused = |message: &IotlbMsg| {
        assert_ne!(space.client.acknowledged(Code::IOTLB_MSG, message.as_bytes(), &[]), 0, "{message:?}");
    };
    let foreign = |kind| IotlbMsg { kind, ..update(base, LOG_PAGE, user, 3) };
    (0..=u8::MAX).filter(|kind| !(2..=3).contains(kind)).for_each(|kind| refused(&foreign(kind)));
    for (iova, size, user, perm) in [
        (base, 0, user, 3),
        (Iova(u64::MAX), 2, user, 3),
        (Iova(0), u64::MAX, user, 3),
        (base, LOG_PAGE, UserAddress(u64::MAX - 5), 3),
        (base, LOG_PAGE, UserAddress(0x1000), 3),
        (base, 1 << 40, user, 3),
        (base, LOG_PAGE, user, 4),
        (base, LOG_PAGE, user, 255),
    ] {
        refused(&update(iova, size, user, perm));
    }
    for (iova, size) in [(base, 0), (Iova(2), u64::MAX), (Iova(u64::MAX), 2)] {
        refused(&invalidate(iova, size));
    }
    assert_ne!(space.client.acknowledged(Code::IOTLB_MSG, &[0; 31], &[]), 0);
    assert_served(&space, &mut ring, 0);
    // A flood of updates. Invalidations of everything follow, each with a read in flight.
    let begin = Instant::now();
    for number in 0..20_000u64 {
        space.iommu.tell(&update(Iova(number << 13), LOG_PAGE, user, 3));
    }
    for round in 0..30 {
        read(&space, &mut ring, 1);
        let all = if round % 2 == 0 { invalidate(Iova(0), 0) } else { invalidate(Iova(0), u64::MAX) };
        space.client.send_acknowledged(Code::IOTLB_MSG, &all, &[]);
        ring.completion();
        assert_served(&space, &mut ring, 2);
    }
    assert!(begin.elapsed() < 10 * DEADLINE);
}

/// A device that does not offer ACCESS_PLATFORM refuses its acknowledgement, and refuses IOTLB_MSG.
/// Rule T5.1.
#[test]
fn access_platform_is_offered_only_if_configured() {
    let server = Server::disk(DISK, |_| {});
    let client: RawFrontend = server.connect();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &CHANNEL);
    assert_eq!(client.request_u64(Code::GET_FEATURES) >> 33 & 1, 0);
    assert_ne!(client.acknowledged(Code::SET_FEATURES, FEATURES.as_bytes(), &[]), 0);
    assert_ne!(client.acknowledged(Code::IOTLB_MSG, invalidate(Iova(0), 0).as_bytes(), &[]), 0);
}
