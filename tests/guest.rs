//! The built-in guest: it continues elsewhere exactly where it stopped, and detects every wrong byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/guest_work.rs"]
mod guest_work;
#[path = "kit/ram_disk.rs"]
mod ram_disk;
#[path = "kit/wait.rs"]
mod wait;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use guest_work::{wait_for, wait_until};
use ram_disk::{Faults, RamDisk};
use rstest::rstest;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::frontend::Device;
use vhost_migrate::guest::{ByteLocation, Guest, GuestConfig, GuestError, GuestState, make_memory};
use vhost_migrate::memory::{Address, GuestAddress, Memory, Region};
use vhost_migrate::ring::DriverRingState;
use vhost_migrate::unstable::guest::{DeviceState, RequestKind, RequestState};

const MIB: u64 = 1 << 20;
const DISK: usize = 8 << 20;

/// Disks that outlive the guests using them.
struct Disks {
    bytes: Vec<Arc<Mutex<Vec<u8>>>>,
    faults: Arc<Faults>,
}

impl Disks {
    fn new(count: usize) -> Disks {
        let bytes = (0..count).map(|_| Arc::new(Mutex::new(vec![0; DISK]))).collect();
        Disks { bytes, faults: Arc::default() }
    }

    fn devices(&self) -> Vec<Box<dyn Device>> {
        self.bytes.iter().map(|bytes| RamDisk::new(bytes, &self.faults) as Box<dyn Device>).collect()
    }
}

fn config(packed: bool) -> GuestConfig {
    GuestConfig::new(32 * MIB)
        .with_packed(packed)
        .with_cpus(2)
        .with_disks(2)
        .with_working_set(2 * MIB)
        .with_cold(2 * MIB)
        .with_dirty_rate(64 * MIB)
        .with_disk_area(MIB)
        .with_request_timeout(1)
}

fn booted(config: GuestConfig) -> (Guest, Disks) {
    let disks = Disks::new(config.disks);
    let mut guest = Guest::new(config).unwrap();
    guest.boot(disks.devices()).unwrap();
    (guest, disks)
}

/// Waits until the guest has made `requests` more requests and written `pages` more pages.
fn run_for(guest: &Guest, requests: u64, pages: u64) {
    let before = guest.stats();
    wait_for(guest, "the guest works", |guest| {
        let now = guest.stats();
        now.completions >= before.completions + requests && now.pages >= before.pages + pages
    });
}

fn copy(memory: &Memory) -> Memory {
    let regions = memory.regions().iter().map(|region| (region.gpa(), region.size()));
    let copy = make_memory(regions, false).unwrap();
    for region in memory.regions() {
        let mut bytes = vec![0; region.size() as usize];
        memory.read(region.gpa(), &mut bytes).unwrap();
        copy.write(region.gpa(), &bytes).unwrap();
    }
    copy
}

fn flip(memory: &Memory, gpa: GuestAddress) {
    let mut byte = [0];
    memory.read(gpa, &mut byte).unwrap();
    memory.write(gpa, &[byte[0] ^ 0x40]).unwrap();
}

fn wrong_location(error: &GuestError) -> ByteLocation {
    match error {
        GuestError::WrongByte(wrong) => wrong.location,
        GuestError::Failed(error) => wrong_location(error),
        other => panic!("{other}"),
    }
}

#[rstest]
fn a_running_guest_finds_no_wrong_byte(#[values(false, true)] packed: bool) {
    let (mut guest, _disks) = booted(config(packed));
    guest.resume().unwrap();
    run_for(&guest, 3000, 2000);
    let verified = guest.verify().unwrap();
    assert_eq!(verified.disk, 4 * MIB, "the parts of two queues on two disks");
    assert!(verified.memory > 20 * MIB, "{verified:?}");
    run_for(&guest, 100, 100);
    guest.pause().unwrap();
    guest.verify().unwrap();
    let stats = guest.stats();
    assert_eq!((stats.outstanding, stats.requests), (0, stats.completions), "a verified guest has no request left");
    assert_eq!((stats.lost, stats.duplicates), (0, 0));
}

#[rstest]
fn a_restored_guest_continues_exactly_where_it_was_saved(#[values(false, true)] packed: bool) {
    let (mut guest, disks) = booted(config(packed));
    let mut outstanding = 0;
    guest.resume().unwrap();
    for _ in 0..5 {
        run_for(&guest, 500, 500);
        guest.pause().unwrap();
        guest.stop_devices().unwrap();
        let state = guest.save_state().unwrap();
        assert_eq!(guest.save_state().unwrap(), state, "a guest that stands still does not change");
        outstanding += state.drivers.iter().flat_map(|driver| &driver.slots).filter(|s| s.request.is_some()).count();
        let encoded = bincode::serde::encode_to_vec(&state, bincode::config::standard()).unwrap();
        let (decoded, _): (GuestState, _) =
            bincode::serde::decode_from_slice(&encoded, bincode::config::standard()).unwrap();
        assert_eq!(decoded, state);
        let mut next = Guest::restore(copy(guest.memory()), decoded).unwrap();
        next.attach(disks.devices()).unwrap();
        let GuestState { cpus, drivers, devices, .. } = next.save_state().unwrap();
        assert_eq!((cpus, drivers, devices), (state.cpus, state.drivers, state.devices));
        assert_eq!(next.stats().requests, guest.stats().requests);
        next.start_devices().unwrap();
        next.resume().unwrap();
        assert!(next.downtime_ns().unwrap() > 0);
        guest = next;
    }
    assert!(outstanding > 0, "no request was ever under way at a switchover: this has tested nothing");
    guest.verify().unwrap();
}

#[test]
fn a_switchover_stops_and_starts_all_devices_concurrently() {
    let (mut guest, disks) = booted(config(false).with_disks(5));
    guest.resume().unwrap();
    guest.pause().unwrap();
    // From here on each call waits until all disks have been called.
    disks.faults.barrier.disks.store(5, Ordering::Relaxed);
    guest.stop_devices().unwrap();
    let mut arrived = Guest::restore(copy(guest.memory()), guest.save_state().unwrap()).unwrap();
    arrived.attach(disks.devices()).unwrap();
    arrived.try_devices().unwrap();
    arrived.start_devices().unwrap();
    arrived.resume().unwrap();
    arrived.verify().unwrap();
    // They are stopped one by one on drop.
    disks.faults.barrier.disks.store(0, Ordering::Relaxed);
}

#[rstest]
fn a_cancelled_switchover_leaves_the_guest_unchanged(#[values(false, true)] packed: bool) {
    let (mut guest, _disks) = booted(config(packed));
    for _ in 0..3 {
        guest.resume().unwrap();
        run_for(&guest, 100, 100);
        guest.pause().unwrap();
        guest.stop_devices().unwrap();
        guest.save_state().unwrap();
        guest.start_devices().unwrap();
    }
    guest.resume().unwrap();
    guest.verify().unwrap();
}

/// A back-end may consume a kick before it reads the ring, as these disks do.
#[test]
fn a_started_ring_is_kicked() {
    let (mut guest, disks) = booted(config(false));
    let kicked = |starts| {
        let rings = u32::try_from(guest_rings(&config(false)) * starts).unwrap();
        wait_until("kicks", || disks.faults.kicked.load(Ordering::Relaxed) == rings);
    };
    kicked(1);
    guest.stop_devices().unwrap();
    guest.start_devices().unwrap();
    kicked(2);
}

fn guest_rings(config: &GuestConfig) -> usize {
    config.disks * usize::from(config.queues)
}

/// Every `step`th address of a region.
fn addresses(region: &Region, step: usize) -> impl Iterator<Item = GuestAddress> {
    (0..region.size()).step_by(step).map(|offset| region.gpa().unchecked_add(offset))
}

/// Returns the first page that matches `is_it`.
fn page_of(guest: &Guest, is_it: impl Fn(GuestAddress, u64) -> bool) -> GuestAddress {
    pages_of(guest, is_it, 1)[0]
}

/// Finds pages by their first words: their address and version.
fn pages_of(guest: &Guest, is_it: impl Fn(GuestAddress, u64) -> bool, most: usize) -> Vec<GuestAddress> {
    let pages = guest.memory().regions().iter().flat_map(|region| addresses(region, 4096));
    let head = |gpa| {
        let mut head = [0; 16];
        guest.memory().read(gpa, &mut head).unwrap();
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
        (word(0), word(8))
    };
    pages.filter(|gpa| gpa.0 > 0 && head(*gpa).0 == gpa.0 && is_it(*gpa, head(*gpa).1)).take(most).collect()
}

#[rstest]
fn a_flipped_byte_is_found_in_hot_cold_and_untouched_memory(#[values(false, true)] packed: bool) {
    for which in 0..4 {
        let (mut guest, _disks) = booted(config(packed));
        guest.resume().unwrap();
        // Every hot page is written at least once, so that only cold pages have version 0.
        run_for(&guest, 1, 2 * 1024);
        guest.pause().unwrap();
        let high = guest.memory().regions()[1].gpa();
        // Above 4 GiB no data of the disk looks like a page: disk offsets are too small.
        let hot = page_of(&guest, |gpa, version| version > 0 && gpa >= high);
        let cold = page_of(&guest, |gpa, version| version == 0 && gpa >= high);
        let untouched = GuestAddress(guest.memory().end().0 - 4096);
        let gpa = [hot, hot.unchecked_add(4095), cold.unchecked_add(100), untouched.unchecked_add(2000)][which];
        guest.verify().unwrap();
        flip(guest.memory(), gpa);
        let error = guest.verify().unwrap_err();
        assert_eq!(wrong_location(&error), ByteLocation::Memory(gpa));
        assert!(error.to_string().contains("WRONG BYTE"), "{error}");
        has_failed(&mut guest, &error);
    }
}

/// The error of a check is the guest's failure.
fn has_failed(guest: &mut Guest, error: &GuestError) {
    assert_eq!(guest.failure().map(|failure| failure.to_string()), Some(error.to_string()));
    assert!(guest.resume().is_err() && !guest.is_running(), "it never runs again");
}

#[rstest]
fn a_stale_page_is_found_and_identified(#[values(false, true)] packed: bool) {
    let (mut guest, _disks) = booted(config(packed));
    guest.resume().unwrap();
    run_for(&guest, 1, 1024);
    guest.pause().unwrap();
    let (gpa, mut old) = (page_of(&guest, |gpa, version| version > 0 && gpa >= GuestAddress(1 << 32)), [0; 4096]);
    guest.memory().read(gpa, &mut old).unwrap();
    guest.resume().unwrap();
    run_for(&guest, 1, 2048);
    guest.pause().unwrap();
    guest.memory().write(gpa, &old).unwrap();
    let error = guest.verify().unwrap_err().to_string();
    assert!(error.contains("as a whole, version"), "{error}");
}

#[rstest]
fn a_running_cpu_detects_a_wrong_byte(#[values(false, true)] packed: bool) {
    let (mut guest, _disks) = booted(config(packed));
    guest.resume().unwrap();
    run_for(&guest, 1, 2048);
    // A ring may follow them.
    let hot = pages_of(&guest, |_, version| version > 0, 64);
    wait_until("the guest stops", || {
        hot.iter().for_each(|page| guest.memory().write(*page, b"garbage").unwrap());
        guest.failure().is_some()
    });
    let error = guest.pause().unwrap_err();
    assert!(error.to_string().contains("WRONG BYTE"), "{error}");
    assert!(guest.resume().is_err(), "it never runs again");
}

#[rstest]
fn a_wrong_byte_on_the_disk_is_found(#[values(false, true)] packed: bool) {
    let part = DISK as u64 / 2;
    for offset in [5000, MIB + 77, part.min(MIB) - 1] {
        let (mut guest, disks) = booted(config(packed));
        guest.resume().unwrap();
        run_for(&guest, 500, 1);
        guest.verify().unwrap();
        assert!(guest.is_running());
        guest.pause().unwrap();
        let offset = offset.min(2 * MIB - 1) as usize;
        disks.bytes[1].lock().unwrap()[offset] ^= 1;
        let error = guest.verify().unwrap_err();
        assert!(matches!(wrong_location(&error), ByteLocation::Buffer(_, at) if at == offset as u64), "{error}");
        has_failed(&mut guest, &error);
    }
}

#[rstest]
fn an_acknowledged_but_lost_write_is_found(#[values(false, true)] packed: bool) {
    let (mut guest, disks) = booted(config(packed));
    // The sector of a lost write may be overwritten before the verification.
    let found = (0..20).find_map(|_| {
        disks.faults.lose_write.store(1, Ordering::Relaxed);
        // The guest may detect it before the resume is complete.
        let _ = guest.resume();
        wait_until("a lost write", || disks.faults.lose_write.load(Ordering::Relaxed) == 0);
        let _ = guest.pause();
        guest.verify().err()
    });
    assert!(matches!(wrong_location(&found.unwrap()), ByteLocation::Buffer(..)));
}

#[rstest]
fn a_read_buffer_is_verified_again_later(#[values(false, true)] packed: bool) {
    let (mut guest, _disks) = booted(config(packed));
    // Repeated until the first queue retains a buffer with written data.
    let (state, held, written) = loop {
        guest.resume().unwrap();
        run_for(&guest, 500, 1);
        guest.pause().unwrap();
        guest.stop_devices().unwrap();
        let state = guest.save_state().unwrap();
        guest.start_devices().unwrap();
        let mut held = state.drivers[0].slots.iter().filter_map(|slot| slot.retained.clone());
        let found = held.find_map(|held| {
            let written = held.versions.iter().position(|version| *version > 0)?;
            Some((held, written as u64))
        });
        if let Some((held, written)) = found {
            break (state, held, written);
        }
    };
    let offset = (state.drivers[0].first_sector + held.sector + written) * 512;
    let version = u64::from(held.versions[written as usize]);
    let mut found = Vec::new();
    for region in guest.memory().regions() {
        for gpa in addresses(region, 512) {
            let mut head = [0; 16];
            guest.memory().read(gpa, &mut head).unwrap();
            if head == [offset.to_le_bytes(), version.to_le_bytes()].concat()[..] {
                found.push(gpa);
            }
        }
    }
    for gpa in found {
        flip(guest.memory(), gpa.unchecked_add(300));
    }
    let error = guest.verify().unwrap_err();
    assert!(matches!(wrong_location(&error), ByteLocation::Buffer(..)), "{error}");
}

fn fails_by(packed: bool, fault: impl Fn(&Faults) -> &AtomicU32, how: impl Fn(&GuestError) -> bool) -> Guest {
    let (mut guest, disks) = booted(config(packed));
    guest.resume().unwrap();
    run_for(&guest, 100, 1);
    fault(&disks.faults).store(1, Ordering::Relaxed);
    wait_until("the guest stops", || guest.failure().is_some());
    let failure = guest.failure().unwrap();
    assert!(how(&failure), "{failure}");
    assert!(guest.pause().is_err() && guest.verify().is_err());
    guest
}

#[rstest]
fn a_request_that_is_completed_twice_stops_the_guest(#[values(false, true)] packed: bool) {
    let how = |error: &GuestError| matches!(error, GuestError::DuplicateCompletion { .. } | GuestError::Ring { .. });
    let guest = fails_by(packed, |faults| &faults.complete_twice, how);
    assert_eq!(guest.stats().duplicates, 1);
}

#[rstest]
fn a_request_that_is_never_completed_stops_the_guest(#[values(false, true)] packed: bool) {
    let guest = fails_by(packed, |faults| &faults.forget, |error| matches!(error, GuestError::LostRequest { .. }));
    assert!(guest.stats().lost > 0);
}

#[rstest]
fn a_disk_error_stops_the_guest(#[values(false, true)] packed: bool) {
    fails_by(packed, |faults| &faults.answer_ioerr, |error| matches!(error, GuestError::Io { status: 1, .. }));
}

#[test]
fn a_call_in_the_wrong_state_is_refused_with_advice() {
    let config = config(false);
    let disks = Disks::new(2);
    let mut guest = Guest::new(config.clone()).unwrap();
    assert!(guest.pause().unwrap_err().to_string().contains("resume it first"));
    assert!(guest.boot(Disks::new(1).devices()).unwrap_err().to_string().contains("2 disks"));
    assert!(guest.attach(disks.devices()).unwrap_err().to_string().contains("boot it"));
    guest.boot(disks.devices()).unwrap();
    assert!(guest.boot(disks.devices()).is_err());
    assert!(guest.save_state().unwrap_err().to_string().contains("stop them first"));
    guest.resume().unwrap();
    assert!(guest.resume().unwrap_err().to_string().contains("pause it first"));
    assert!(guest.stop_devices().is_err() && guest.save_state().is_err());
    guest.verify().unwrap();
}

#[rstest]
fn a_mismatched_state_is_refused(#[values(false, true)] packed: bool) {
    let (mut guest, disks) = booted(config(packed));
    guest.resume().unwrap();
    run_for(&guest, 100, 100);
    guest.pause().unwrap();
    guest.stop_devices().unwrap();
    let state = guest.save_state().unwrap();
    let refused = |change: fn(&mut GuestState)| {
        let mut state = state.clone();
        change(&mut state);
        Guest::restore(guest.memory().clone(), state).map(drop).unwrap_err();
    };
    refused(|state| state.version += 1);
    refused(|state| state.config.memory += 4096);
    refused(|state| state.config.depth += 1);
    refused(|state| state.cpus.clear());
    refused(|state| drop(state.drivers.pop()));
    refused(|state| drop(state.devices.pop()));
    refused(|state| drop(state.drivers[0].slots.pop()));
    refused(|state| state.drivers[0].versions.clear());
    refused(|state| state.drivers[0].first_sector = u64::MAX);
    refused(|state| match &mut state.drivers[1].ring {
        DriverRingState::Split(ring) => ring.avail = ring.avail.wrapping_add(1),
        DriverRingState::Packed(ring) => ring.avail.index ^= 1,
    });
    refused(|state| state.devices[0].block_size = 0);
    refused(|state| state.devices[0].block_size = 1 << 30);
    refused(|state| state.config.disks = usize::MAX);
    refused(|state| (state.config.memory, state.config.high) = (!0xfff, 0));
    refused(|state| state.config.working_set = u64::MAX);
    let extra = |state: &mut GuestState| {
        let slot = state.drivers[0].slots.iter_mut().find(|slot| slot.request.is_none()).unwrap();
        let kind = RequestKind::Flush;
        slot.request = Some(RequestState { head: 0, kind, sector: 0, sectors: 0, offset: 0 });
    };
    refused(extra);
    let mut other = Guest::restore(copy(guest.memory()), state.clone()).unwrap();
    let small = Disks::new(2);
    small.bytes.iter().for_each(|bytes| bytes.lock().unwrap().truncate(DISK / 2));
    assert!(other.attach(small.devices()).unwrap_err().to_string().contains("bytes"));
    other.attach(disks.devices()).unwrap();
}

#[test]
fn a_mismatched_disk_is_refused_with_both_values() {
    let (mut guest, disks) = booted(config(false));
    guest.stop_devices().unwrap();
    let state = guest.save_state().unwrap();
    let refused = |change: &dyn Fn(&mut DeviceState)| {
        let mut state = state.clone();
        change(&mut state.devices[0]);
        let mut guest = Guest::restore(copy(guest.memory()), state).unwrap();
        guest.attach(disks.devices()).unwrap_err().to_string()
    };
    let (capacity, block) = (state.devices[0].capacity, state.devices[0].block_size);
    let text = refused(&|device| device.block_size = 8 * block);
    assert!(
        text.contains(&format!("block size in bytes differs: {block} here, {} at the source", 8 * block)),
        "{text}"
    );
    let text = refused(&|device| device.capacity += 512);
    let sizes = format!("disk size in bytes differs: {capacity} here, {} at the source", capacity + 512);
    assert!(text.contains(&sizes), "{text}");
    let text = refused(&|device| device.bases.truncate(1));
    assert!(text.contains("queues differs: 2 here, 1 at the source"), "{text}");
    let text = refused(&|device| device.features |= VirtioFeatures::from_bits_retain(1 << 13));
    assert!(text.contains("it does not offer VIRTIO_BLK_F_DISCARD"), "{text}");
}
