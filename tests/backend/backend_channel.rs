//! The back-end channel: in-band notifications, configuration changes, and front-ends that do not read it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::poll::PollTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt::SndBuf};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{BackendRequest, FrontendRequest as Code, Header, ProtocolFeatures, VringState};
use vhost_migrate::abi::virtio::{
    DESC_F_INDIRECT, PACKED_DESC_F_AVAIL, PackedDesc, VIRTIO_F_VERSION_1, VirtioFeatures,
};
use vhost_migrate::backend::{BackendError, FrontendHandle, Queue, Request, VirtioDevice};
use vhost_migrate::memory::{Address, Iova};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase};
use vhost_migrate::unstable::backend::{
    Logging, MessageOutcome, Notifier, Session, VhostUserMessage, VringConfig, VringController,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::{BASIC, Guest, HIGH, PACKED, PROTOCOL, Ring, SPLIT, status};
use crate::raw::{DEADLINE, RawFrontend, VERSION};
use crate::server::Server;
use crate::wait::is_readable;

const IN_BAND: ProtocolFeatures =
    PROTOCOL.union(ProtocolFeatures::BACKEND_REQ).union(ProtocolFeatures::INBAND_NOTIFICATIONS);
const NO_FD: u64 = 0x100;

/// The front-end's end of the channel.
pub(crate) struct BackendChannel(UnixStream);

impl BackendChannel {
    pub(crate) fn open(client: &RawFrontend) -> BackendChannel {
        let (ours, theirs) = UnixStream::pair().unwrap();
        BackendChannel::open_with(client, ours, theirs.as_fd())
    }

    fn open_with(client: &RawFrontend, ours: UnixStream, theirs: BorrowedFd<'_>) -> BackendChannel {
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(client.acknowledged(Code::SET_BACKEND_REQ_FD, &[], &[theirs]), 0);
        BackendChannel(ours)
    }

    /// Receives the next message. Returns its request code, and its ring if its payload is a ring state.
    pub(crate) fn receive(&mut self) -> (BackendRequest, Option<u32>) {
        let mut head = [0; size_of::<Header>()];
        self.0.read_exact(&mut head).unwrap();
        let header: Header = zerocopy::transmute!(head);
        assert_eq!(header.flags, VERSION);
        let mut body = vec![0; header.size as usize];
        self.0.read_exact(&mut body).unwrap();
        (BackendRequest(header.request), VringState::read_from_bytes(&body).ok().map(|state| state.index))
    }

    fn is_silent(&self) -> bool {
        !is_readable(&self.0, PollTimeout::ZERO)
    }
}

fn negotiate(client: &RawFrontend, guest: &Guest, features: VirtioFeatures, protocol: ProtocolFeatures) {
    client.send_body(Code::SET_OWNER, &[0u8; 0]);
    client.send_body(Code::SET_PROTOCOL_FEATURES, &protocol);
    client.send_acknowledged(Code::SET_FEATURES, &features, &[]);
    guest.send_table(client);
}

/// A disk and its guest, with a back-end channel and in-band notifications.
fn in_band(features: VirtioFeatures) -> (Server, Guest, RawFrontend, BackendChannel) {
    let (server, guest, client) = Server::disk(1 << 20, |_| {}).connected();
    negotiate(&client, &guest, features, IN_BAND);
    let channel = BackendChannel::open(&client);
    (server, guest, client, channel)
}

/// Starts a ring whose kicks, calls and errors are messages.
fn start_in_band_ring(client: &RawFrontend, guest: &Guest, index: u32, features: VirtioFeatures) -> Ring {
    let ring = Ring::new(guest, index, 256, features);
    for code in [Code::SET_VRING_CALL, Code::SET_VRING_ERR] {
        client.send_acknowledged(code, &(u64::from(index) | NO_FD), &[]);
    }
    client.send_body(Code::SET_VRING_NUM, &VringState { index, num: ring.layout.size.into() });
    client.send_body(Code::SET_VRING_BASE, &VringState { index, num: ring.initial_base() });
    client.send_body(Code::SET_VRING_ADDR, &ring.addr(guest));
    client.send_body(Code::SET_VRING_KICK, &(u64::from(index) | NO_FD));
    ring.enable(client, true);
    ring
}

/// Writes invalid entries into a ring that was never used, as a faulty driver does, and kicks in-band.
fn break_ring(client: &RawFrontend, guest: &Guest, ring: &Ring) {
    match ring.driver {
        // An avail index far beyond the ring.
        DriverRing::Split(_) => guest.memory.write(ring.layout.avail.unchecked_add(2), &9999u16.to_le_bytes()).unwrap(),
        // An indirect descriptor although INDIRECT_DESC is not negotiated.
        DriverRing::Packed(_) => {
            let flags = (DESC_F_INDIRECT | 1 << PACKED_DESC_F_AVAIL).into();
            let desc = PackedDesc { addr: HIGH.0.into(), len: 16.into(), id: 0.into(), flags };
            guest.memory.write(ring.layout.desc, desc.as_bytes()).unwrap();
        }
    }
    client.send_acknowledged(Code::VRING_KICK, &VringState { index: ring.index, num: 0 }, &[]);
}

/// Publishes one read and kicks in-band.
fn read_in_band(client: &RawFrontend, guest: &Guest, ring: &mut Ring) {
    ring.read(guest, u64::from(ring.index), 1, 512);
    let _ = ring.driver.publish();
    client.send_acknowledged(Code::VRING_KICK, &VringState { index: ring.index, num: 0 }, &[]);
}

/// Rule B3.2.
#[rstest]
fn in_band_kicks_and_calls_replace_eventfds(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut channel) = in_band(features);
    let mut rings = [0, 1].map(|index| start_in_band_ring(&client, &guest, index, features));
    for round in 0..50 {
        let ring = &mut rings[round % 2];
        read_in_band(&client, &guest, ring);
        assert_eq!(channel.receive(), (BackendRequest::VRING_CALL, Some(ring.index)));
        assert!(ring.driver.pop_used().unwrap().is_some());
        assert_eq!(status(&guest, ring.index.into()), 0);
    }
    assert!(channel.is_silent());
    let missing = VringState { index: 2, num: 0 };
    assert_eq!(client.acknowledged(Code::VRING_KICK, missing.as_bytes(), &[]), 1);
}

/// Truncated kicks, and channel messages with a wrong number of descriptors or without a socket, are refused with and
/// without need-reply. The refused messages do not replace the channel.
/// Rules B1.1 and F8.3.
#[rstest]
fn invalid_in_band_kicks_and_channel_fds_are_refused_without_effect(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut channel) = in_band(features);
    let mut ring = start_in_band_ring(&client, &guest, 0, features);
    let file = tempfile::tempfile().unwrap();
    let (file, socket) = (file.as_fd(), client.as_fd());
    let wrong: [(Code, &[u8], &[BorrowedFd<'_>]); 7] = [
        (Code::VRING_KICK, &[], &[]),
        (Code::VRING_KICK, &[0; 3], &[file]),
        (Code::VRING_KICK, &[0; 7], &[]),
        (Code::SET_BACKEND_REQ_FD, &[], &[]),
        (Code::SET_BACKEND_REQ_FD, &[], &[socket, socket]),
        (Code::SET_BACKEND_REQ_FD, &[], &[file]),
        (Code::SET_BACKEND_REQ_FD, &[0; 8], &[file]),
    ];
    for (code, payload, fds) in wrong {
        assert_eq!(client.acknowledged(code, payload, fds), 1, "{code} of {} bytes was taken", payload.len());
        client.send(code, VERSION, payload, fds);
        read_in_band(&client, &guest, &mut ring);
        assert_eq!(channel.receive(), (BackendRequest::VRING_CALL, Some(0)));
        assert!(ring.driver.pop_used().unwrap().is_some());
    }
    assert!(channel.is_silent());
}

/// Rules B3.3, B3.4: User-mode Linux sends neither SET_VRING_KICK nor SET_VRING_CALL. It sends base 0 for packed rings
/// too (rule R4.4).
#[rstest]
fn the_first_in_band_kick_starts_a_ring_without_kick_and_call_fds(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut channel) = in_band(features);
    let mut ring = Ring::new(&guest, 0, 256, features);
    client.send_body(Code::SET_VRING_NUM, &VringState { index: 0, num: ring.layout.size.into() });
    client.send_body(Code::SET_VRING_BASE, &VringState { index: 0, num: 0 });
    client.send_body(Code::SET_VRING_ADDR, &ring.addr(&guest));
    ring.enable(&client, true);
    for _ in 0..2 {
        read_in_band(&client, &guest, &mut ring);
        assert_eq!(channel.receive(), (BackendRequest::VRING_CALL, Some(0)));
        assert!(ring.driver.pop_used().unwrap().is_some());
    }
    client.ring_base(0);
    let ring = start_in_band_ring(&client, &guest, 0, features);
    break_ring(&client, &guest, &ring);
    assert_eq!(channel.receive(), (BackendRequest::VRING_ERR, Some(0)));
}

/// Records for each started ring whether it is polled.
#[derive(Default)]
struct StartedRings(Vec<bool>);

impl VringController for StartedRings {
    fn start(&mut self, _index: u16, setup: VringConfig) -> Result<(), BackendError> {
        self.0.push(setup.is_polled);
        Ok(())
    }

    fn stop(&mut self, _index: u16) -> Result<RingBase, BackendError> {
        Ok(RingBase::split(0))
    }

    fn set_logging(&mut self, _index: u16, _logging: Logging) {}

    fn invalidate(&mut self, _range: &std::ops::RangeInclusive<Iova>) {}

    fn kick(&mut self, _index: u16) {}

    fn set_notifiers(&mut self, _index: u16, _call: Option<Arc<Notifier>>, _error: Option<Arc<Notifier>>) {}
}

/// Rule B3.7.
#[test]
fn a_ring_without_a_kick_fd_is_polled_unless_kicks_are_in_band() {
    for (protocol, polled) in [(PROTOCOL, true), (IN_BAND, false)] {
        let guest = Guest::new();
        let (mut session, mut rings) =
            (Session::new(Arc::new(ConfigChangingDevice::default())), StartedRings::default());
        let mut tell = |code, payload: &[u8], fds: &[BorrowedFd<'_>]| {
            let fds = fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
            let step = session
                .handle_message(VhostUserMessage { code, flags: VERSION, payload: payload.to_vec(), fds }, &mut rings);
            assert!(matches!(step, MessageOutcome::NoReply), "{code}: {step:?}");
        };
        let ring = Ring::new(&guest, 0, 256, BASIC);
        let state = |num| VringState { index: 0, num };
        tell(Code::SET_PROTOCOL_FEATURES, protocol.as_bytes(), &[]);
        tell(Code::SET_FEATURES, BASIC.as_bytes(), &[]);
        tell(Code::SET_MEM_TABLE, &guest.table(), &guest.fds());
        tell(Code::SET_VRING_NUM, state(256).as_bytes(), &[]);
        tell(Code::SET_VRING_ADDR, ring.addr(&guest).as_bytes(), &[]);
        tell(Code::SET_VRING_KICK, NO_FD.as_bytes(), &[]);
        tell(Code::SET_VRING_ENABLE, state(1).as_bytes(), &[]);
        assert_eq!(rings.0, [polled], "{protocol:#x}");
    }
}

#[rstest]
fn a_broken_ring_sends_vring_err_and_other_rings_continue(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client, mut channel) = in_band(features);
    let [broken, mut good] = [0, 1].map(|index| start_in_band_ring(&client, &guest, index, features));
    break_ring(&client, &guest, &broken);
    assert_eq!(channel.receive(), (BackendRequest::VRING_ERR, Some(0)));
    read_in_band(&client, &guest, &mut good);
    assert_eq!(channel.receive(), (BackendRequest::VRING_CALL, Some(1)));
    client.ring_base(0);
    let mut again = start_in_band_ring(&client, &guest, 0, features);
    read_in_band(&client, &guest, &mut again);
    assert_eq!(channel.receive(), (BackendRequest::VRING_CALL, Some(0)));
}

/// A device that reports a configuration change with every request.
#[derive(Default)]
struct ConfigChangingDevice {
    host: Mutex<Arc<FrontendHandle>>,
}

struct ConfigChangingQueue(Arc<FrontendHandle>, Vec<Request>);

impl VirtioDevice for ConfigChangingDevice {
    fn features(&self) -> VirtioFeatures {
        VIRTIO_F_VERSION_1
    }

    fn queues(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4]
    }

    fn connected(&self, host: Arc<FrontendHandle>) {
        *self.host.lock().unwrap() = host;
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> std::io::Result<Box<dyn Queue>> {
        Ok(Box::new(ConfigChangingQueue(self.host.lock().unwrap().clone(), Vec::new())))
    }
}

impl Queue for ConfigChangingQueue {
    fn submit(&mut self, request: Request) {
        self.0.config_changed();
        self.1.push(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        done.append(&mut self.1);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn serve_requests(ring: &mut Ring, count: usize) {
    for _ in 0..count {
        ring.driver.add(&[], &[Buffer { gpa: HIGH, len: 8 }], None).unwrap().unwrap();
        ring.serve_one();
    }
}

/// Rules B1.2, B1.4, B2.1.
#[test]
fn a_front_end_that_does_not_read_its_channel_stalls_no_ring_and_gets_the_last_change() {
    let device = Arc::new(ConfigChangingDevice::default());
    let (_server, guest, client) = Server::new(device.clone()).connected();
    negotiate(&client, &guest, BASIC, PROTOCOL | ProtocolFeatures::BACKEND_REQ);
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
    // The smallest send buffer that the system permits.
    setsockopt(&theirs, SndBuf, &1).unwrap();
    let mut channel = BackendChannel::open_with(&client, ours.into(), theirs.as_fd());
    let mut ring = Ring::new(&guest, 0, 256, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    serve_requests(&mut ring, 5000);
    let mut heard = 0;
    // The back-end sends a pending event as soon as the socket has room for it. No further request is needed.
    while heard == 0 || !channel.is_silent() {
        assert_eq!(channel.receive(), (BackendRequest::CONFIG_CHANGE_MSG, None));
        heard += 1;
    }
    assert!(heard < 1000, "{heard} of 5000 changes were told to somebody who did not listen");
    serve_requests(&mut ring, 1);
    assert_eq!(channel.receive(), (BackendRequest::CONFIG_CHANGE_MSG, None));
}

/// Rule B1.5.
#[test]
fn invalid_data_on_the_back_end_channel_or_its_end_closes_only_the_channel() {
    let device = Arc::new(ConfigChangingDevice::default());
    let (_server, guest, client) = Server::new(device.clone()).connected();
    negotiate(&client, &guest, BASIC, PROTOCOL | ProtocolFeatures::BACKEND_REQ);
    let mut ring = Ring::new(&guest, 0, 256, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    for round in 0..20 {
        let mut channel = BackendChannel::open(&client);
        serve_requests(&mut ring, 1);
        assert_eq!(channel.receive(), (BackendRequest::CONFIG_CHANGE_MSG, None));
        if round % 2 == 0 {
            channel.0.write_all(&[0xee; 100]).unwrap();
            // The back-end closes the channel once it has read this data.
            let _ = channel.0.read_to_end(&mut Vec::new());
        }
        drop(channel);
        serve_requests(&mut ring, 1);
        // Configuration changes are sent over the next channel.
        let mut next = BackendChannel::open(&client);
        serve_requests(&mut ring, 1);
        assert_eq!(next.receive(), (BackendRequest::CONFIG_CHANGE_MSG, None));
    }
}
