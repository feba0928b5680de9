//! Rings that are stopped without being drained: requests in flight move with the inflight region (rule I8).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use vhost_migrate::abi::vhost_user::unstable::INFLIGHT_MIGRATION;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, InflightDescription, ProtocolFeatures, VringState};
use vhost_migrate::abi::virtio::{VIRTIO_F_IN_ORDER, VirtioFeatures};
use vhost_migrate::backend::{Queue, RING_FEATURES, Request, VirtioDevice};
use vhost_migrate::dirty::Log;
use vhost_migrate::inflight::{InflightRegion, RingKind};
use vhost_migrate::memory::LOG_PAGE;
use vhost_migrate::ring::RingBase;
use zerocopy::{FromBytes, IntoBytes};

use crate::drain::{GatedDevice, LOG_AT, page};
use crate::guest::{
    BASIC, Guest, PACKED, PROTOCOL, Ring, SPLIT, harvest, inflight_kind as kind, install_log, negotiate_with,
    start_logging,
};
use crate::raw::{RawFrontend, VERSION};
use crate::server::Server;

const COUNT: u64 = 10;
const SIZE: u16 = 256;
const IN_ORDER: VirtioFeatures = VIRTIO_F_IN_ORDER;
const BOTH: [VirtioFeatures; 2] = [SPLIT, PACKED];

/// A guest with requests in flight on ring 0 of a device that completes none until its gate is open.
struct SuspendGuest {
    server: Server,
    gate: Arc<EventFd>,
    guest: Guest,
    client: RawFrontend,
    ring: Ring,
    region: InflightRegion,
    fd: OwnedFd,
    log: Log,
    features: VirtioFeatures,
    protocol: ProtocolFeatures,
}

impl SuspendGuest {
    fn new(features: VirtioFeatures, protocol: ProtocolFeatures) -> SuspendGuest {
        let (device, gate) = GatedDevice::new();
        SuspendGuest::on(device, gate, features, protocol)
    }

    fn on(
        device: Arc<dyn VirtioDevice>,
        gate: Arc<EventFd>,
        features: VirtioFeatures,
        protocol: ProtocolFeatures,
    ) -> SuspendGuest {
        let (server, guest) = (Server::new(device), Guest::new());
        let (region, fd) = InflightRegion::create(kind(features), 1, SIZE).unwrap();
        let client = server.connect();
        negotiate_with(&client, &guest, features, PROTOCOL | protocol);
        let log = install_log(&client, &guest);
        let ring = Ring::new(&guest, 0, SIZE, features);
        let mut scene = SuspendGuest { server, gate, guest, client, ring, region, fd, log, features, protocol };
        scene.send_inflight_region();
        scene.ring.set_up(&scene.client, &scene.guest, RingBase::initial(features).bits());
        start_logging(&scene.client, &scene.guest, features, &mut [&mut scene.ring], LOG_AT);
        scene.ring.enable(&scene.client, true);
        scene.add(0..COUNT);
        scene
    }

    fn send_inflight_region(&self) {
        let mmap_size = InflightRegion::bytes_for(kind(self.features), 1, SIZE).unwrap();
        let description =
            InflightDescription { mmap_size, mmap_offset: 0, num_queues: 1, queue_size: SIZE, padding: [0; 4] };
        self.client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[self.fd.as_fd()]);
    }

    /// Adds requests of one page each, and waits until the device has written them.
    fn add(&mut self, slots: std::ops::Range<u64>) {
        for slot in slots.clone() {
            self.ring.driver.add(&[], &[page(slot)], None).unwrap().unwrap();
        }
        self.ring.kick();
        while slots.clone().any(|slot| self.guest.bytes(page(slot).gpa, 1) != [0x5a]) {
            self.client.wait_until_processed();
        }
    }

    fn stop(&self, code: Code) -> u32 {
        let state = VringState { index: 0, num: 0 };
        VringState::read_from_bytes(&self.client.request(code, state.as_bytes())).unwrap().num
    }

    fn requests_marked(&self) -> u64 {
        let (header, entry) = if kind(self.features) == RingKind::Packed { (32, 32) } else { (16, 16) };
        let bytes = self.region.copy(0).unwrap();
        bytes[header..].chunks_exact(entry).take(SIZE.into()).filter(|entry| entry[0] == 1).count() as u64
    }

    /// Moves the ring to another back-end, which has only the inflight region and the base.
    fn move_to_another_back_end(&mut self, base: u32) {
        let (device, gate) = GatedDevice::new();
        self.gate = gate;
        self.move_to(device, base);
    }

    fn move_to(&mut self, device: Arc<dyn VirtioDevice>, base: u32) {
        self.server = Server::new(device);
        self.client = self.server.connect();
        negotiate_with(&self.client, &self.guest, self.features, PROTOCOL | self.protocol);
        self.send_inflight_region();
        self.ring.log_at = None;
        self.ring.set_up(&self.client, &self.guest, base);
        self.ring.enable(&self.client, true);
    }
}

#[test]
fn an_invalid_skip_drain_request_stops_no_ring() {
    for features in BOTH {
        let mut scene = SuspendGuest::new(features, INFLIGHT_MIGRATION);
        let (code, none) = (Code::GET_VRING_BASE_SKIP_DRAIN, VringState { index: 9, num: 0 });
        for payload in [&[][..], &[0; 3], &[0; 7], none.as_bytes()] {
            assert_eq!(scene.client.acknowledged(code, payload, &[]), u64::MAX, "{} bytes", payload.len());
        }
        assert_eq!(scene.requests_marked(), COUNT);
        scene.add(COUNT..COUNT + 3);
        assert_eq!(scene.requests_marked(), COUNT + 3);
        scene.gate.write(1).unwrap();
        assert_eq!(scene.ring.completions(COUNT as usize + 3).len(), COUNT as usize + 3);
        // Without need-reply, no reply can report the error, so the connection ends.
        scene.client.send(code, VERSION, &[0; 3], &[]);
        assert!(scene.client.is_closed());
        scene.server.connect().wait_until_processed();
    }
}

/// Rule I8.2.
#[test]
fn suspended_requests_stay_marked_logged_and_unpublished_and_are_resubmitted_elsewhere() {
    for features in BOTH {
        let mut scene = SuspendGuest::new(features, INFLIGHT_MIGRATION);
        // QEMU disables a ring before it sends the request that determines how the ring is stopped.
        scene.ring.enable(&scene.client, false);
        let base = scene.stop(Code::GET_VRING_BASE_SKIP_DRAIN);
        assert_eq!(scene.requests_marked(), COUNT);
        assert!(scene.ring.driver.pop_used().unwrap().is_none(), "a request was published");
        // The device has written these pages already.
        let marks = harvest(&scene.log);
        assert!((0..COUNT).all(|slot| marks.contains(&(page(slot).gpa.0 / LOG_PAGE))), "a page was not logged");
        let before = scene.guest.snapshot();
        scene.gate.write(1).unwrap();
        scene.client.wait_until_processed();
        scene.server.stop();
        assert!(before == scene.guest.snapshot(), "memory was written after the reply");

        scene.move_to_another_back_end(base);
        scene.gate.write(1).unwrap();
        scene.ring.completions(COUNT as usize);
        assert_eq!(scene.requests_marked(), 0);
        scene.add(COUNT..2 * COUNT);
        scene.ring.completions(COUNT as usize);
        assert_eq!(scene.client.ring_base(0), scene.ring.drained_base());
    }
}

#[test]
fn a_suspended_ring_resumes_its_requests_after_a_failed_migration() {
    for features in BOTH {
        let mut scene = SuspendGuest::new(features, INFLIGHT_MIGRATION);
        let base = scene.stop(Code::GET_VRING_BASE_SKIP_DRAIN);
        scene.ring.set_up(&scene.client, &scene.guest, base);
        scene.ring.enable(&scene.client, true);
        scene.gate.write(1).unwrap();
        scene.ring.completions(COUNT as usize);
        assert_eq!(scene.requests_marked(), 0);
    }
}

/// Rule I8.5.
#[test]
fn a_disabled_ring_keeps_its_requests_takes_no_new_ones_and_resumes_when_enabled() {
    for features in BOTH {
        let mut scene = SuspendGuest::new(features, INFLIGHT_MIGRATION);
        scene.ring.enable(&scene.client, false);
        scene.ring.driver.add(&[], &[page(COUNT)], None).unwrap().unwrap();
        scene.ring.kick();
        scene.ring.kick.write(1).unwrap();
        scene.gate.write(1).unwrap();
        scene.ring.completions(COUNT as usize);
        scene.client.wait_until_processed();
        assert_ne!(scene.guest.bytes(page(COUNT).gpa, 1), [0x5a], "a disabled ring took a request");
        scene.ring.enable(&scene.client, true);
        scene.ring.completion();
    }
}

/// Rule I8.4.
#[test]
fn get_vring_base_drains_unless_only_the_inflight_feature_is_acknowledged() {
    let inflight = ProtocolFeatures::GET_VRING_BASE_INFLIGHT;
    for features in BOTH {
        for (protocol, left) in [(INFLIGHT_MIGRATION, 0), (ProtocolFeatures::empty(), 0), (inflight, COUNT)] {
            let scene = SuspendGuest::new(features, protocol);
            scene.client.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
            if left == 0 {
                scene.gate.write(1).unwrap();
            }
            scene.client.ring_base_reply(0);
            assert_eq!(scene.requests_marked(), left, "protocol features {protocol:#x}");
        }
    }
}

/// A device that keeps its first request and completes all others immediately.
struct HoldsFirstRequest;

struct HoldsFirstRequestQueue {
    kept: Option<Request>,
    done: Vec<Request>,
}

impl VirtioDevice for HoldsFirstRequest {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES | IN_ORDER
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        INFLIGHT_MIGRATION
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(HoldsFirstRequestQueue { kept: None, done: Vec::new() }))
    }
}

impl Queue for HoldsFirstRequestQueue {
    fn submit(&mut self, mut request: Request) {
        request.write(0, &[0x5a]).unwrap();
        match self.kept {
            None => self.kept = Some(request),
            Some(_) => self.done.push(request),
        }
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.done);
    }

    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        unserved.extend(self.kept.take());
    }
}

#[test]
fn suspend_leaves_requests_completed_behind_an_open_one_with_in_order() {
    for features in BOTH {
        let (device, gate) = GatedDevice::new();
        let mut scene = SuspendGuest::on(Arc::new(HoldsFirstRequest), gate, features | IN_ORDER, INFLIGHT_MIGRATION);
        let base = scene.stop(Code::GET_VRING_BASE_SKIP_DRAIN);
        assert_eq!(scene.requests_marked(), COUNT);
        let marks = harvest(&scene.log);
        assert!((0..COUNT).all(|slot| marks.contains(&(page(slot).gpa.0 / LOG_PAGE))), "a page was not logged");
        scene.move_to(device, base);
        scene.gate.write(1).unwrap();
        scene.ring.completions(COUNT as usize);
    }
}

/// Rules I8.1 and I8.6.
#[test]
fn skip_drain_drains_without_a_region_and_is_unsupported_without_the_feature() {
    let (device, gate) = GatedDevice::new();
    let (server, guest, client) = Server::new(device).connected();
    negotiate_with(&client, &guest, BASIC, PROTOCOL | INFLIGHT_MIGRATION);
    let mut ring = crate::drain::start_with_requests_in_flight(&client, &guest, BASIC, COUNT);
    client.send_body(Code::GET_VRING_BASE_SKIP_DRAIN, &VringState { index: 0, num: 0 });
    gate.write(1).unwrap();
    client.reply(Code::GET_VRING_BASE_SKIP_DRAIN);
    let mut used = 0;
    while ring.driver.pop_used().unwrap().is_some() {
        used += 1;
    }
    assert_eq!(used, COUNT);
    drop(client);

    let client = server.connect();
    negotiate_with(&client, &guest, BASIC, PROTOCOL);
    client.send(Code::GET_VRING_BASE_SKIP_DRAIN, VERSION, VringState { index: 0, num: 0 }.as_bytes(), &[]);
    assert!(client.is_closed(), "it was answered without having been negotiated");
}
