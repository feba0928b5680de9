//! DPDK as front-end and as back-end: testpmd drives `backend net`, and this project's front-end drives testpmd.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use vhost_migrate::abi::virtio;
use vhost_migrate::abi::virtio::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VirtioFeatures};
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::frontend::{Device, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory, Region};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase, RingLayout};

use crate::linux_net;
use crate::process::{DEADLINE, Lab, wait_for};
use crate::testpmd::Testpmd;

/// Size of the packets that testpmd generates: an IP packet in the shortest frame.
const PACKET: u64 = 60;

fn testpmd_drives_a_loopback(queues: u16, options: &str) {
    let lab = Lab::new();
    let mut backend = linux_net::backend(&lab, "net", &format!("--loopback --queue-pairs {queues}"));
    // The back-end serves the second testpmd like the first (rule R9.1).
    for _ in 0..2 {
        let mut testpmd = Testpmd::frontend(&lab, &lab.file("net.sock"), queues, options);
        let seen = wait_for("packets go round", || testpmd.counters().filter(|seen| seen.received >= 2000));
        // Packets are counted after their bytes, and the counters are not read at the same time.
        assert_eq!((seen.received_bytes % PACKET, seen.errors), (0, 0), "{seen:?}");
        assert!(seen.received_bytes >= seen.received * PACKET, "{seen:?}");
        assert!(seen.sent >= seen.received, "{seen:?}");
        testpmd.end();
    }
    backend.assert_running();
}

#[test]
fn testpmd_drives_a_loopback_with_split_rings() {
    testpmd_drives_a_loopback(1, "");
}

#[test]
fn testpmd_drives_a_loopback_with_two_pairs_and_single_buffers() {
    testpmd_drives_a_loopback(2, ",mrg_rxbuf=0");
}

#[test]
fn testpmd_drives_a_loopback_with_packed_rings() {
    testpmd_drives_a_loopback(1, ",packed_vq=1");
}

#[test]
fn testpmd_drives_a_loopback_with_two_pairs_of_packed_rings() {
    testpmd_drives_a_loopback(2, ",packed_vq=1");
}

/// Size of the header before a packet.
const HEADER: usize = 12;
const REGION: u64 = 4 << 20;
const SIZE: u16 = 64;
/// Addresses of received and of sent packets, one page for each packet. The device writes the received ones.
const ARRIVALS: GuestAddress = GuestAddress(0x10_0000);
const DEPARTURES: GuestAddress = GuestAddress(0x20_0000);
/// The device status with DRIVER_OK.
const READY: u8 = virtio::VIRTIO_CONFIG_S_ACKNOWLEDGE
    | virtio::VIRTIO_CONFIG_S_DRIVER
    | virtio::VIRTIO_CONFIG_S_FEATURES_OK
    | virtio::VIRTIO_CONFIG_S_DRIVER_OK;
/// Receive and transmit ring.
const RX: usize = 0;
const TX: usize = 1;

/// A driver of testpmd's rings. The driver and the device write different pages.
struct Rig {
    device: UserDevice,
    memory: Memory,
    rings: Vec<DriverRing>,
    layouts: Vec<RingLayout>,
    fds: Vec<[Arc<OwnedFd>; 2]>,
    /// Number of the next packet.
    next: u32,
    testpmd: Testpmd,
    socket: PathBuf,
    _lab: Lab,
}

impl Rig {
    fn new(packed: bool) -> Rig {
        let lab = Lab::new();
        let socket = lab.file("dpdk.sock");
        let testpmd = Testpmd::backend(&lab, &socket, 1, "");
        let features = VIRTIO_F_VERSION_1
            | VIRTIO_NET_F_MRG_RXBUF
            | if packed { VIRTIO_F_RING_PACKED } else { VirtioFeatures::empty() };
        let region = Region::create(GuestAddress(0), REGION).unwrap();
        let memory = Memory::new([Arc::new(region)]).unwrap();
        let layouts: Vec<_> = [0, 0x8000]
            .map(|at| RingLayout::new(features, SIZE, [at + 0x1000, at + 0x2000, at + 0x3000].map(GuestAddress)))
            .into_iter()
            .collect();
        let rings = layouts.iter().map(|layout| DriverRing::new(&memory, *layout, features).unwrap()).collect();
        let eventfd = || Arc::new(OwnedFd::from(EventFd::new().unwrap()));
        let fds = (0..2).map(|_| [eventfd(), eventfd()]).collect();
        let device = connect(&socket, features, &memory);
        let mut rig = Rig { device, memory, rings, layouts, fds, next: 0, testpmd, socket, _lab: lab };
        let start = RingBase::initial(features);
        rig.start([start, start]);
        for slot in 0..SIZE / 2 {
            rig.offer(slot);
        }
        let _ = rig.rings[RX].publish();
        rig
    }

    fn start(&mut self, bases: [RingBase; 2]) {
        let before = self.testpmd.link_changes();
        for (index, base) in (0..).zip(bases) {
            let layout = self.layouts[usize::from(index)];
            let ([desc, avail, used], [kick, call]) = (layout.areas(), self.fds[usize::from(index)].clone());
            let setup = RingSetup { size: layout.size(), desc, avail, used, kick, call, error: None, base };
            self.device.start_ring(index, setup).unwrap();
        }
        // It serves rings only after DRIVER_OK.
        self.device.set_status(READY).unwrap();
        // Until its link is up, it takes packets from one ring and drops them.
        wait_for("its link is up", || (self.testpmd.link_changes() > before).then_some(()));
    }

    fn stop(&mut self) -> [RingBase; 2] {
        [0, 1].map(|index| self.device.stop_ring(index).unwrap())
    }

    /// Makes a receive buffer available.
    fn offer(&mut self, slot: u16) {
        let buffer = Buffer { gpa: ARRIVALS.unchecked_add(u64::from(slot) * LOG_PAGE), len: 2048 };
        assert!(self.rings[RX].add(&[], &[buffer], None).unwrap().is_some());
    }

    /// Sends `count` packets one after the other, waits for the return of each, and checks every byte. Returns the pages that
    /// the device wrote.
    fn send(&mut self, count: u32) -> BTreeSet<u64> {
        let before = self.contents();
        let mut own = BTreeSet::new();
        for _ in 0..count {
            let (number, len) = (self.next, 60 + self.next as usize * 37 % 1400);
            self.next += 1;
            let mut packet = vec![0; HEADER];
            packet.extend((0..len as u32).map(|at| (number.wrapping_mul(31).wrapping_add(at * 7) >> 1) as u8));
            let at = DEPARTURES.unchecked_add(u64::from(number % 64) * LOG_PAGE);
            self.memory.write(at, &packet).unwrap();
            own.insert(at.0 / LOG_PAGE);
            let buffer = Buffer { gpa: at, len: packet.len() as u32 };
            assert!(self.rings[TX].add(&[buffer], &[], None).unwrap().is_some());
            let _ = self.rings[TX].publish(); // it polls
            let arrival = wait_for("the packet comes back", || self.rings[RX].pop_used().unwrap());
            wait_for("the packet is sent", || self.rings[TX].pop_used().unwrap());
            // Buffers are used in order, so each can be added at its place again.
            let slot = (number % u32::from(SIZE / 2)) as u16;
            assert_eq!(arrival.len as usize, packet.len());
            let mut found = vec![0; packet.len()];
            self.memory.read(ARRIVALS.unchecked_add(u64::from(slot) * LOG_PAGE), &mut found).unwrap();
            assert_eq!(found[HEADER..], packet[HEADER..], "packet {number}");
            self.offer(slot);
            let _ = self.rings[RX].publish();
        }
        // The driver writes the first two areas of a split ring. Both sides write the descriptor ring of a packed one.
        let packed = matches!(self.layouts[0], RingLayout::Packed(_));
        for layout in &self.layouts {
            let [desc, driver, _] = layout.areas();
            own.extend([driver].into_iter().chain((!packed).then_some(desc)).map(|area| area.0 / LOG_PAGE));
        }
        let pages = |bytes: &Vec<u8>| bytes.chunks(LOG_PAGE as usize).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let changed = pages(&before).into_iter().zip(pages(&self.contents())).enumerate();
        changed.filter(|(_, (a, b))| a != b).map(|(page, _)| page as u64).filter(|page| !own.contains(page)).collect()
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION as usize];
        self.memory.read(GuestAddress(0), &mut bytes).unwrap();
        bytes
    }
}

fn connect(socket: &Path, features: VirtioFeatures, memory: &Memory) -> UserDevice {
    let mut device = UserDevice::connect(socket, UserOptions::default(), Instant::now() + DEADLINE).unwrap();
    device.set_features(features).unwrap();
    assert!(!device.set_inflight(2, SIZE, None).unwrap(), "its network back-end has no inflight tracking");
    device.set_memory(memory).unwrap();
    device
}

fn harvest(log: &Log) -> BTreeSet<u64> {
    let mut pages = PageSet::new(log.pages());
    log.harvest(&mut pages);
    pages.iter().map(|page| page.0).collect()
}

/// Rule R2.5.
fn testpmd_is_driven(packed: bool) {
    let mut rig = Rig::new(packed);
    rig.send(200);

    let (log, fd) = Log::create(rig.memory.end()).unwrap();
    let log = Arc::new(log);
    rig.device.start_logging(&log, fd.as_fd()).unwrap();
    for _ in 0..5 {
        let changed = rig.send(20);
        let marked = harvest(&log);
        let missed: BTreeSet<_> = changed.difference(&marked).copied().collect();
        let extra: BTreeSet<_> = marked.difference(&changed).copied().collect();
        assert!(changed.len() > 20);
        // It marks the device event area of a packed ring for its writes to the descriptors (rule L4.2).
        let area = |which: usize| rig.layouts.iter().map(|layout| layout.areas()[which].0 / LOG_PAGE).collect();
        let expected = if packed { [area(0), area(2)] } else { [BTreeSet::new(), BTreeSet::new()] };
        assert_eq!([missed, extra], expected);
    }
    rig.device.stop_logging().unwrap();
    harvest(&log);
    rig.send(20);
    assert_eq!(harvest(&log), BTreeSet::new(), "logging is off");

    let bases = rig.stop();
    rig.start(bases);
    rig.send(100);

    // Another connection to the same process.
    let bases = rig.stop();
    let features = rig.device.acked_features();
    rig.device = connect(&rig.socket, features, &rig.memory);
    rig.start(bases);
    rig.send(100);
    rig.testpmd.end();
}

#[test]
fn testpmd_is_driven_over_split_rings_and_logs_what_it_writes() {
    testpmd_is_driven(false);
}

#[test]
fn testpmd_is_driven_over_packed_rings_and_misses_their_descriptors() {
    testpmd_is_driven(true);
}
