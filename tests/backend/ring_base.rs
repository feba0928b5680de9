//! Position of a ring whose driver has started again, or whose front-end has lost the base (rules I12.1, I12.2).

use std::os::fd::AsFd;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::FrontendRequest as Code;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::ring::{Chain, DeviceRing, RingBase, RingLayout, SplitLayout};

use crate::drain::{GatedDevice, page};
use crate::guest::{Guest, PACKED, Ring, SPLIT, inflight_region, negotiate, status, wait_for_error};
use crate::raw::RawFrontend;
use crate::server::Server;

/// The guest was reset, and its driver begins with empty rings; the front-end keeps the region.
#[rstest]
fn a_driver_that_starts_with_empty_rings_is_served_with_a_used_inflight_region(
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
    #[values(false, true)] reconnects: bool,
    #[values(1, 5, 13, 21)] before: u64,
) {
    let (server, guest) = (Server::disk(1 << 18, |_| {}), Guest::new());
    let (_region, fd, description) = inflight_region(features, 1, 16);
    let connect = || {
        let client = server.connect();
        negotiate(&client, &guest, features);
        client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
        client
    };
    let serve = |client: &RawFrontend, ring: &mut Ring, slots: std::ops::Range<u64>| {
        ring.start(client, &guest);
        for slot in slots {
            ring.read(&guest, slot, slot, 512);
            ring.serve_one();
            assert_eq!(status(&guest, slot), 0);
        }
        assert_eq!(client.ring_base(0), ring.drained_base());
    };
    let mut client = connect();
    serve(&client, &mut Ring::new(&guest, 0, 16, features), 0..before);
    let fresh = Ring::new(&guest, 0, 16, features);
    let SplitLayout { desc, avail, used, .. } = fresh.layout;
    for (area, bytes) in [(desc, 256), (avail, 64), (used, 256)] {
        guest.memory.write(area, &vec![0; bytes]).unwrap();
    }
    if reconnects {
        drop(client);
        client = connect();
    }
    serve(&client, &mut { fresh }, 30..50);
}

/// Serves `count` requests of one page each, as a device that is then killed. The driver keeps `ahead` more available.
fn serve_and_die(guest: &Guest, ring: &mut Ring, ahead: u64, count: u64) {
    let SplitLayout { size, desc, avail, used } = ring.layout;
    let layout = RingLayout::new(PACKED, size, [desc, avail, used]);
    let mut device = DeviceRing::new(&guest.memory, layout, PACKED, RingBase::PACKED_START).unwrap();
    let mut chain = Chain::default();
    let add = |ring: &mut Ring, slot| {
        ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
        let _ = ring.driver.publish();
    };
    (0..ahead).for_each(|slot| add(ring, slot));
    for slot in 0..count {
        assert!(device.pop(&mut chain).unwrap());
        device.push(&chain, 4096);
        let _ = device.publish();
        ring.driver.pop_used().unwrap().unwrap();
        add(ring, ahead + slot);
    }
}

/// QEMU's network devices have no inflight region, and their base is out of date.
#[test]
fn a_packed_ring_without_a_region_resumes_at_the_position_found_in_its_descriptors() {
    let (device, gate) = GatedDevice::new();
    gate.write(1).unwrap();
    let server = Server::new(device);
    for ahead in [2, 5, 8] {
        for count in 0..=33 {
            let guest = Guest::new();
            let mut ring = Ring::new(&guest, 0, 8, PACKED);
            serve_and_die(&guest, &mut ring, ahead, count);
            let client = server.connect();
            negotiate(&client, &guest, PACKED);
            ring.start(&client, &guest);
            assert_eq!(ring.completions(ahead as usize).len(), ahead as usize, "{ahead} {count}");
            assert_eq!(client.ring_base(0), ring.drained_base());
        }
    }
}

#[test]
fn a_packed_ring_whose_position_contradicts_the_base_and_cannot_be_found_is_broken() {
    let (device, gate) = GatedDevice::new();
    gate.write(1).unwrap();
    let (server, guest) = (Server::new(device), Guest::new());
    let mut ring = Ring::new(&guest, 0, 8, PACKED);
    // The driver reuses the id at once, so the available descriptor may be the rest of a chain.
    serve_and_die(&guest, &mut ring, 1, 5);
    let client = server.connect();
    negotiate(&client, &guest, PACKED);
    let error = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    client.send_acknowledged(Code::SET_VRING_ERR, &0u64, &[error.as_fd()]);
    ring.start(&client, &guest);
    wait_for_error(&error, "a ring that stands elsewhere than at its base");
}
