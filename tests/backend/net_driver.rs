//! The driver of a loopback network device: two pairs of rings and a control queue.

use vhost_migrate::abi::virtio::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VirtioFeatures,
};
use vhost_migrate::memory::GuestAddress;
use vhost_migrate::ring::Buffer;

use crate::guest::{Guest, HIGH, Ring, negotiate};
use crate::raw::RawFrontend;

/// Index of the control queue, which follows the two pairs.
pub(crate) const CONTROL: u32 = 4;
const HEADER: usize = 12;
/// Addresses of sent packets and commands, and of received packets and replies.
const SENT: GuestAddress = GuestAddress(0xc0_0000);
const RECEIVED: GuestAddress = HIGH;

/// Features that the driver acknowledges, with the kind of its rings in `rings`.
pub(crate) fn interface_features(rings: VirtioFeatures) -> VirtioFeatures {
    let features = [VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX];
    features.into_iter().fold(rings, |all, feature| all | feature)
}

/// The driver of a loopback network device with two pairs and a control queue.
pub(crate) struct LoopbackNetGuest {
    pub(crate) client: RawFrontend,
    pub(crate) guest: Guest,
    features: VirtioFeatures,
    pub(crate) rings: Vec<Ring>,
    seed: u8,
}

impl LoopbackNetGuest {
    pub(crate) fn new(client: RawFrontend, features: VirtioFeatures) -> LoopbackNetGuest {
        let guest = Guest::new();
        negotiate(&client, &guest, features);
        LoopbackNetGuest::on_connection(client, guest, features)
    }

    /// Starts the rings on a connection whose memory and features are already set.
    pub(crate) fn on_connection(client: RawFrontend, guest: Guest, features: VirtioFeatures) -> LoopbackNetGuest {
        let rings = (0..=CONTROL).map(|index| Ring::started(&client, &guest, index, 256, features));
        let rings = rings.collect();
        let mut net = LoopbackNetGuest { client, guest, features, rings, seed: 0 };
        net.ask(&[VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, 2, 0]);
        net
    }

    pub(crate) fn restart_ring(&mut self, index: u32) {
        let ring = Ring::new(&self.guest, index, 256, self.features);
        ring.set_up(&self.client, &self.guest, ring.initial_base());
        self.rings[index as usize] = ring;
    }

    /// Sends a packet with contents of its own on `pair`, and returns it.
    pub(crate) fn send(&mut self, pair: usize) -> Vec<u8> {
        self.seed += 1;
        // A broadcast, which every filter accepts.
        let packet = [&[0xff; 6][..], &[self.seed; 700]].concat();
        self.guest.memory.write(SENT, &[&[0; HEADER], packet.as_slice()].concat()).unwrap();
        let tx = &mut self.rings[2 * pair + 1];
        let len = (HEADER + packet.len()) as u32;
        tx.driver.add(&[Buffer { gpa: SENT, len }], &[], None).unwrap().unwrap();
        tx.serve_one();
        packet
    }

    pub(crate) fn receive(&mut self, pair: usize) -> Vec<u8> {
        let rx = &mut self.rings[2 * pair];
        rx.driver.add(&[], &[Buffer { gpa: RECEIVED, len: 2000 }], None).unwrap().unwrap();
        rx.kick();
        let (_, len) = rx.completion();
        self.guest.bytes(RECEIVED, len as usize).split_off(HEADER)
    }

    /// Sets a receive mode, which does not affect broadcasts.
    pub(crate) fn command(&mut self) {
        self.ask(&[0, 1, 1]);
    }

    /// Sends a command and asserts that it succeeds.
    fn ask(&mut self, command: &[u8]) {
        self.guest.memory.write(SENT, command).unwrap();
        self.guest.memory.write(RECEIVED, &[0xff]).unwrap();
        let control = &mut self.rings[CONTROL as usize];
        let len = command.len() as u32;
        let (command, answer) = (Buffer { gpa: SENT, len }, Buffer { gpa: RECEIVED, len: 1 });
        control.driver.add(&[command], &[answer], None).unwrap().unwrap();
        control.serve_one();
        assert_eq!(self.guest.bytes(RECEIVED, 1), [0]);
    }
}
