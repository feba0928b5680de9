//! Transfer of the device state, with raw messages and with this project's front-end (rule D1).

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vhost_migrate::abi::vhost_user::{
    CONFIG_TYPE_MIGRATION, ConfigHeader, DEVICE_STATE_LOAD, DEVICE_STATE_SAVE, DeviceStateTransfer,
    FrontendRequest as Code, ProtocolFeatures, VringState,
};
use vhost_migrate::abi::virtio::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP, VirtioFeatures};
use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer};
use vhost_migrate::backend::{BackendError, Queue, VirtioDevice};
use vhost_migrate::frontend::{Device as _, FrontendError, UserDevice, UserOptions};
use zerocopy::{FromBytes, IntoBytes};

use crate::drain::GatedDevice;
use crate::forward::forward;
use crate::guest::{BASIC, Guest, Ring};
use crate::raw::{DEADLINE, NEED_REPLY, RawFrontend, VERSION};
use crate::server::Server;

const NO_FD: u64 = 0x100;
const REFUSED: u64 = 0x101;

/// A device with a state and gated queues.
struct StatefulDevice {
    kind: &'static str,
    state: Mutex<Vec<u8>>,
    rings: Arc<GatedDevice>,
}

impl StatefulDevice {
    fn new(kind: &'static str, state: &[u8]) -> Arc<StatefulDevice> {
        Arc::new(StatefulDevice { kind, state: Mutex::new(state.to_vec()), rings: GatedDevice::new().0 })
    }

    fn state(&self) -> Vec<u8> {
        self.state.lock().unwrap().clone()
    }
}

impl VirtioDevice for StatefulDevice {
    forward!(rings: features -> VirtioFeatures, queues -> u16, max_queue_size -> u16);

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn state_kind(&self) -> Option<&'static str> {
        Some(self.kind)
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        Ok(self.state())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        if state == b"poison" {
            return Err(BackendError::DeviceState { why: "this one is bad".into() });
        }
        *self.state.lock().unwrap() = state.to_vec();
        Ok(())
    }

    fn reset(&self) {
        self.state.lock().unwrap().clear();
    }

    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> std::io::Result<Box<dyn Queue>> {
        self.rings.start_queue(index, size, features)
    }
}

/// A front-end that has acknowledged all offered protocol features.
fn connect_negotiated(server: &Server) -> RawFrontend {
    let client = server.connect();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &client.request_u64(Code::GET_PROTOCOL_FEATURES));
    client.send_acknowledged(Code::SET_FEATURES, &BASIC, &[]);
    client
}

fn transfer(client: &RawFrontend, direction: u32, phase: u32, fd: BorrowedFd<'_>) -> u64 {
    let body = DeviceStateTransfer { direction, phase };
    client.send(Code::SET_DEVICE_STATE_FD, VERSION, body.as_bytes(), &[fd]);
    u64::read_from_bytes(&client.reply(Code::SET_DEVICE_STATE_FD)).unwrap()
}

fn save(client: &RawFrontend) -> Vec<u8> {
    let (mut reader, writer) = std::io::pipe().unwrap();
    assert_eq!(transfer(client, DEVICE_STATE_SAVE, 0, writer.as_fd()), NO_FD);
    drop(writer);
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert_eq!(client.request_u64(Code::CHECK_DEVICE_STATE), 0);
    state
}

/// Loads these bytes. Returns the reply to CHECK_DEVICE_STATE.
fn load(client: &RawFrontend, bytes: &[u8]) -> u64 {
    let (reader, mut writer) = std::io::pipe().unwrap();
    assert_eq!(transfer(client, DEVICE_STATE_LOAD, 0, reader.as_fd()), NO_FD);
    drop(reader);
    // The back-end reads no further than necessary, so this write may fail.
    let _ = writer.write_all(bytes);
    drop(writer);
    client.request_u64(Code::CHECK_DEVICE_STATE)
}

fn driver(server: &Server) -> UserDevice {
    let path: PathBuf = server.folder.path().join("socket");
    UserDevice::connect(path, UserOptions::default(), Instant::now() + DEADLINE).unwrap()
}

/// Rules D1.2 and D1.3.
#[test]
fn a_device_state_larger_than_a_pipe_is_transferred_intact() {
    let state: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let (from, to) = (StatefulDevice::new("keeper", &state), StatefulDevice::new("keeper", b"other"));
    let (source, destination) = (Server::new(from), Server::new(to.clone()));
    let saved = driver(&source).save_state().unwrap().unwrap();
    driver(&destination).load_state(&saved).unwrap();
    assert!(to.state() == state);
    // The same with raw messages, from a device that never had a ring.
    assert_eq!(save(&connect_negotiated(&destination)), saved);
}

/// Rules D1.4 and D1.5.
#[test]
fn an_invalid_or_foreign_device_state_is_refused_and_changes_nothing() {
    let device = StatefulDevice::new("keeper", b"as it was");
    let server = Server::new(device.clone());
    let client = connect_negotiated(&server);
    let good = save(&client);
    let other = Server::new(StatefulDevice::new("another", b"state"));
    let mut bad = vec![vec![], save(&connect_negotiated(&other)), vec![0; 17 << 20], [&good[..], &[0]].concat()];
    bad.extend((0..good.len()).map(|end| good[..end].to_vec()));
    bad.extend((0..good.len()).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    }));
    let poisoned = Server::new(StatefulDevice::new("keeper", b"poison"));
    bad.push(save(&connect_negotiated(&poisoned)));
    device.reset();
    for bytes in bad {
        assert_eq!(load(&client, &bytes), 1, "{} bytes", bytes.len());
        assert_eq!(device.state(), b"");
    }
    assert_eq!(client.request_u64(Code::CHECK_DEVICE_STATE), 1, "each transfer is asked about once");
    assert_eq!(load(&client, &good), 0);
    assert_eq!(device.state(), b"as it was");
}

/// The requests are truncated, without an fd, with two fds, or with an unknown phase.
#[test]
fn an_invalid_set_device_state_fd_does_not_end_the_current_transfer() {
    let device = StatefulDevice::new("keeper", b"as it was");
    let server = Server::new(device.clone());
    let client = connect_negotiated(&server);
    let good = save(&client);
    device.reset();
    let (reader, mut writer) = std::io::pipe().unwrap();
    assert_eq!(transfer(&client, DEVICE_STATE_LOAD, 0, reader.as_fd()), NO_FD);
    let body = |phase| DeviceStateTransfer { direction: DEVICE_STATE_LOAD, phase };
    let (load, later, fd) = (body(0), body(1), reader.as_fd());
    let (load, later) = (load.as_bytes(), later.as_bytes());
    let wrong: [(&[u8], &[BorrowedFd<'_>]); 5] =
        [(&load[..7], &[fd]), (&[], &[fd]), (load, &[]), (load, &[fd, fd]), (later, &[fd])];
    for (payload, fds) in wrong {
        for flags in [VERSION, NEED_REPLY] {
            client.send(Code::SET_DEVICE_STATE_FD, flags, payload, fds);
            let answer = u64::read_from_bytes(&client.reply(Code::SET_DEVICE_STATE_FD)).unwrap();
            assert_eq!(answer, REFUSED, "{} bytes, {} fds", payload.len(), fds.len());
        }
    }
    drop(reader);
    writer.write_all(&good).unwrap();
    drop(writer);
    // CHECK_DEVICE_STATE has no payload. Bytes and fds that are sent with it are ignored.
    client.send(Code::CHECK_DEVICE_STATE, NEED_REPLY, &[1; 3], &[client.as_fd()]);
    assert_eq!(client.reply(Code::CHECK_DEVICE_STATE), [0; 8]);
    assert_eq!(device.state(), b"as it was", "the transfer was lost");
    assert_eq!(client.request_u64(Code::CHECK_DEVICE_STATE), 1, "each transfer is asked about once");
}

/// Rules D1.1 and D1.6.
#[test]
fn device_state_is_transferred_only_while_all_rings_are_stopped() {
    let device = StatefulDevice::new("keeper", b"as it was");
    let (_server, guest, client) = Server::new(device.clone()).negotiated(BASIC);
    client.send_body(Code::SET_PROTOCOL_FEATURES, &client.request_u64(Code::GET_PROTOCOL_FEATURES));
    let good = save(&client);
    let (reader, mut writer) = std::io::pipe().unwrap();
    assert_eq!(transfer(&client, DEVICE_STATE_LOAD, 0, reader.as_fd()), NO_FD);
    let ring = Ring::new(&guest, 0, 256, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    writer.write_all(&good).unwrap();
    drop(writer);
    assert_eq!(client.request_u64(Code::CHECK_DEVICE_STATE), 1, "it runs by now");
    for direction in [DEVICE_STATE_SAVE, DEVICE_STATE_LOAD] {
        let (reader, writer) = std::io::pipe().unwrap();
        let fd = if direction == DEVICE_STATE_SAVE { writer.as_fd() } else { reader.as_fd() };
        assert_eq!(transfer(&client, direction, 0, fd), REFUSED);
    }
    client.ring_base(0);
    assert_eq!(save(&client), good);
    for (direction, phase) in [(DEVICE_STATE_SAVE, 1), (2, 0)] {
        assert_eq!(transfer(&client, direction, phase, reader.as_fd()), REFUSED);
    }
    assert_eq!(device.state(), b"as it was");
}

/// Rule D1.3.
#[test]
fn a_stalled_device_state_pipe_blocks_no_message() {
    let device = StatefulDevice::new("keeper", &vec![7; 1 << 20]);
    let (server, guest) = (Server::new(device.clone()), Guest::new());
    let (reader, writer) = std::io::pipe().unwrap();
    for _ in 0..3 {
        let client = connect_negotiated(&server);
        assert_eq!(transfer(&client, DEVICE_STATE_SAVE, 0, writer.as_fd()), NO_FD);
        client.wait_until_processed();
        guest.send_table(&client);
        // A second transfer replaces the first.
        assert_eq!(transfer(&client, DEVICE_STATE_LOAD, 0, reader.as_fd()), NO_FD);
        client.wait_until_processed();
        // The end of the connection ends the second transfer.
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = connect_negotiated(&server);
    assert_eq!(transfer(&client, DEVICE_STATE_SAVE, 0, theirs.as_fd()), NO_FD);
    drop((ours, theirs));
    assert_eq!(client.request_u64(Code::CHECK_DEVICE_STATE), 1, "nobody has read it");
    assert_eq!(load(&client, &save(&client)), 0);
}

/// Rule D1.10.
#[test]
fn a_device_without_state_does_not_offer_device_state() {
    let server = Server::new(GatedDevice::new().0);
    let client = connect_negotiated(&server);
    assert!(
        !ProtocolFeatures::from_bits_retain(client.request_u64(Code::GET_PROTOCOL_FEATURES))
            .contains(ProtocolFeatures::DEVICE_STATE)
    );
    let (_, writer) = std::io::pipe().unwrap();
    let body = DeviceStateTransfer { direction: DEVICE_STATE_SAVE, phase: 0 };
    assert_eq!(client.acknowledged(Code::SET_DEVICE_STATE_FD, body.as_bytes(), &[writer.as_fd()]), 1);
    drop(client);
    assert_eq!(driver(&server).save_state().unwrap(), None);
    let error = driver(&server).load_state(&[]).unwrap_err();
    assert!(matches!(error, FrontendError::NotOffered { .. }), "{error}");
}

#[test]
fn a_refused_device_state_is_reported_by_check_device_state() {
    let server = Server::new(StatefulDevice::new("keeper", b""));
    let mut device = driver(&server);
    for bytes in [vec![], vec![0; 17 << 20]] {
        let error = device.load_state(&bytes).unwrap_err();
        let request = Code::CHECK_DEVICE_STATE;
        assert!(matches!(error, FrontendError::Refused { request: asked, .. } if asked == request), "{error}");
    }
    device.save_state().unwrap().unwrap();
}

/// A front-end that reconnects before it has started a ring loads the state again.
#[test]
fn a_loaded_device_state_is_loaded_again_after_a_reconnect_until_a_ring_starts() {
    let saved = driver(&Server::new(StatefulDevice::new("keeper", b"of the guest"))).save_state().unwrap().unwrap();
    let first = Server::new(StatefulDevice::new("keeper", b""));
    let mut device = driver(&first);
    device.load_state(&saved).unwrap();
    let successor = StatefulDevice::new("keeper", b"");
    let folder = {
        let mut first = first;
        first.stop();
        std::mem::replace(&mut first.folder, tempfile::tempdir().unwrap())
    };
    let _second = Server::at(folder, successor.clone());
    device.reconnect(Instant::now() + DEADLINE).unwrap();
    assert_eq!(successor.state(), b"of the guest");
}

/// Rule D1.7.
#[test]
fn network_driver_settings_are_transferred_and_kept_until_reset() {
    let net = |mtu| {
        let options = NetOptions::new(NetPeer::Loopback, [2, 0, 0, 0, 0, 1]).with_mtu(mtu);
        let device = Arc::new(NetDevice::open(options).unwrap());
        (device.clone(), Server::new(device))
    };
    let mac = [2, 0, 0, 0, 0, 9];
    let (_source, source_server) = net(None);
    let client = connect_negotiated(&source_server);
    let header = ConfigHeader { offset: 0, size: 6, flags: CONFIG_TYPE_MIGRATION };
    assert_eq!(client.acknowledged(Code::SET_CONFIG, &[header.as_bytes(), &mac].concat(), &[]), 0);
    let state = save(&client);
    let (_other, other_server) = net(Some(1400));
    assert_eq!(load(&connect_negotiated(&other_server), &state), 1, "the driver was not told this MTU");
    let (destination, server) = net(None);
    let (client, guest) = (connect_negotiated(&server), Guest::new());
    assert_eq!(load(&client, &state), 0);
    guest.send_table(&client);
    let ring = Ring::new(&guest, 0, 256, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    client.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
    client.ring_base_reply(0);
    assert_eq!(destination.config()[..6], mac);
    assert_eq!(destination.config()[6], VIRTIO_NET_S_LINK_UP as u8 | VIRTIO_NET_S_ANNOUNCE as u8);
    client.send_acknowledged(Code::RESET_DEVICE, &[0u8; 0], &[]);
    assert_ne!(destination.config()[..6], mac);
    assert_eq!(destination.config()[6], VIRTIO_NET_S_LINK_UP as u8);
}

/// State of a network interface as version 0.1 saved it: the driver's MAC, all else at its initial value.
const NET_STATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compat/files/device-state-net-1");
const DRIVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn net_device() -> (Arc<NetDevice>, Server) {
    let device = Arc::new(NetDevice::open(NetOptions::new(NetPeer::Loopback, [2, 0, 0, 0, 0, 1])).unwrap());
    (device.clone(), Server::new(device))
}

#[test]
fn a_network_state_of_version_0_1_is_loaded() {
    let (device, server) = net_device();
    assert_eq!(load(&connect_negotiated(&server), &std::fs::read(NET_STATE).unwrap()), 0);
    assert_eq!(device.config()[..6], DRIVER_MAC);
}

#[test]
#[ignore = "writes the file, unless it exists"]
fn write_network_state() {
    let (_device, server) = net_device();
    let client = connect_negotiated(&server);
    let header = ConfigHeader { offset: 0, size: 6, flags: CONFIG_TYPE_MIGRATION };
    assert_eq!(client.acknowledged(Code::SET_CONFIG, &[header.as_bytes(), &DRIVER_MAC].concat(), &[]), 0);
    if !std::fs::exists(NET_STATE).unwrap() {
        std::fs::write(NET_STATE, save(&client)).unwrap();
    }
}
