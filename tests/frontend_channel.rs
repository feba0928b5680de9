//! Back-end requests to the vhost-user client.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tempfile::TempDir;
use vhost_migrate::abi::vhost_user::{
    BackendRequest, FrontendRequest as Code, Header, InflightDescription, ProtocolFeatures, VringArea, VringState,
    unstable::INFLIGHT_MIGRATION,
};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::blk::{Aio, BlkDevice, BlkOptions};
use vhost_migrate::backend::{self, FrontendHandle, Queue};
use vhost_migrate::frontend::{Device, DeviceEvent, FrontendError, RingSetup, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};
use vhost_migrate::inflight::{InflightRegion, RingKind};
use vhost_migrate::memory::{GuestAddress, Memory, Region};
use vhost_migrate::ring::RingBase;
use zerocopy::{FromBytes, IntoBytes};

#[path = "kit/forward.rs"]
mod forward;
#[path = "kit/guest_work.rs"]
mod guest_work;
#[path = "kit/raw.rs"]
#[allow(dead_code)]
mod raw;
#[path = "kit/served.rs"]
mod served;
#[path = "kit/wait.rs"]
mod wait;

use forward::forward;
use guest_work::wait_for;
use served::Served;
use wait::is_readable;

const MIB: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// A disk, and the handle for back-end requests of the test.
struct ChannelDevice {
    disk: BlkDevice,
    host: Mutex<Arc<FrontendHandle>>,
}

impl backend::VirtioDevice for ChannelDevice {
    forward!(disk: features -> VirtioFeatures, queues -> u16, max_queue_size -> u16, config -> Vec<u8>);

    fn connected(&self, host: Arc<FrontendHandle>) {
        *self.host.lock().unwrap() = host;
    }

    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> std::io::Result<Box<dyn Queue>> {
        self.disk.start_queue(index, size, features)
    }
}

/// A back-end that is served until it is dropped.
struct Backend {
    folder: TempDir,
    channel_device: Arc<ChannelDevice>,
    _served: Served,
}

impl Backend {
    fn start() -> Backend {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(16 * MIB).unwrap();
        let disk = BlkDevice::open(BlkOptions::new(image).with_queues(2).with_aio(Aio::Threads));
        let channel_device = Arc::new(ChannelDevice { disk: disk.unwrap(), host: Mutex::default() });
        let served = Served::new(&folder.path().join("s"), channel_device.clone());
        Backend { folder, channel_device, _served: served }
    }

    fn device(&self, more: ProtocolFeatures) -> UserDevice {
        let usual = UserOptions::default();
        let options = usual.with_protocol_features(usual.protocol_features | more);
        UserDevice::connect(self.folder.path().join("s"), options, Instant::now() + DEADLINE).unwrap()
    }

    fn host(&self) -> Arc<FrontendHandle> {
        self.channel_device.host.lock().unwrap().clone()
    }

    /// Sends a back-end request with need-reply. Returns the acknowledgement.
    fn ask(&self, code: BackendRequest, body: &(impl IntoBytes + zerocopy::Immutable)) -> u64 {
        self.host().send_with_reply(code, body).unwrap().expect("REPLY_ACK").recv_timeout(DEADLINE).unwrap()
    }
}

/// Waits for events by polling.
fn events(device: &mut UserDevice) -> Vec<DeviceEvent> {
    let fd = device.events_fd().unwrap().unwrap();
    assert!(is_readable(&fd, 60_000u16), "no event came");
    device.take_events()
}

fn eventfd() -> Arc<OwnedFd> {
    Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap().into())
}

/// Returns memory and an empty ring 0.
fn ring(device: &mut UserDevice) -> (Memory, RingSetup) {
    let region = Region::create(GuestAddress(0), MIB).unwrap();
    let memory = Memory::new([Arc::new(region)]).unwrap();
    device.set_features(VirtioFeatures::from_bits_retain(1 << 32)).unwrap();
    device.set_memory(&memory).unwrap();
    let (kick, call, error) = (eventfd(), eventfd(), Some(eventfd()));
    let base = RingBase::split(0);
    let [desc, avail, used] = [0x1000, 0x2000, 0x3000].map(GuestAddress);
    (memory, RingSetup { size: 8, desc, avail, used, kick, call, error, base })
}

#[test]
fn a_config_change_message_is_one_event() {
    let backend = Backend::start();
    let mut device = backend.device(ProtocolFeatures::empty());
    assert_eq!(device.take_events(), []);
    for _ in 0..3 {
        backend.host().config_changed();
        assert_eq!(events(&mut device), [DeviceEvent::ConfigChanged]);
    }
    // The next connection has a channel as well.
    device.reconnect(Instant::now() + DEADLINE).unwrap();
    backend.host().config_changed();
    assert_eq!(events(&mut device), [DeviceEvent::ConfigChanged]);
    let fd = device.events_fd().unwrap().unwrap();
    assert!(!is_readable(&fd, PollTimeout::ZERO) && device.take_events().is_empty());
}

/// Rules B1.3, B4.2.
#[test]
fn unsupported_back_end_requests_are_refused_when_they_need_a_reply() {
    let backend = Backend::start();
    let mut device = backend.device(ProtocolFeatures::empty());
    let area = VringArea { u64: 1, size: 4096, offset: 0 };
    assert_eq!(backend.ask(BackendRequest::VRING_HOST_NOTIFIER_MSG, &area), 1);
    assert_eq!(events(&mut device), [DeviceEvent::HostNotifierRefused(1)]);
    for code in [BackendRequest(4711), BackendRequest::SHMEM_MAP, BackendRequest(0)] {
        assert_eq!(backend.ask(code, &[0u8; 40]), 1, "{code}");
        assert_eq!(events(&mut device), [DeviceEvent::RequestRefused(code)]);
    }
    // Rings that are not started, and a truncated message.
    for code in [BackendRequest::VRING_CALL, BackendRequest::VRING_ERR] {
        assert_eq!(backend.ask(code, &VringState { index: 0, num: 0 }), 1);
        assert_eq!(backend.ask(code, &VringState { index: u32::MAX, num: 0 }), 1);
        assert_eq!(backend.ask(code, &[0u8; 3]), 1);
    }
    assert_eq!(device.take_events(), []);
    assert_eq!(backend.ask(BackendRequest::CONFIG_CHANGE_MSG, &[0u8; 0]), 0);
}

#[test]
fn a_flooded_channel_keeps_a_bounded_number_of_events() {
    let backend = Backend::start();
    let mut device = backend.device(ProtocolFeatures::empty());
    let host = backend.host();
    let flood = std::thread::spawn(move || {
        for number in 0..20_000 {
            host.config_changed();
            // The front-end reads as fast as the test writes.
            while host.send(BackendRequest(1000 + number), &[0u8; 4000]).is_err() {
                std::thread::yield_now();
            }
        }
    });
    while !flood.is_finished() {
        assert!(device.status().unwrap().is_some());
    }
    flood.join().unwrap();
    // After the flood: all messages were received, and events of other kinds are kept.
    let area = VringArea { u64: 1, size: 4096, offset: 0 };
    assert_eq!(backend.ask(BackendRequest::VRING_HOST_NOTIFIER_MSG, &area), 1);
    assert_eq!(backend.ask(BackendRequest::CONFIG_CHANGE_MSG, &[0u8; 0]), 0);
    let told = device.take_events();
    assert!(told.len() <= 1026, "{} events are kept", told.len());
    for event in [DeviceEvent::ConfigChanged, DeviceEvent::HostNotifierRefused(1)] {
        assert!(told.contains(&event), "{event:?} is lost");
    }
}

/// Rules B3.2, B3.3: the back-end signals the error fd of SET_VRING_ERR, or sends BACKEND_VRING_ERR.
#[test]
fn a_broken_ring_signals_its_error_fd_in_band_and_out_of_band() {
    for in_band in [ProtocolFeatures::empty(), ProtocolFeatures::INBAND_NOTIFICATIONS] {
        let backend = Backend::start();
        let mut device = backend.device(in_band);
        assert_eq!(device.protocol_features() & ProtocolFeatures::INBAND_NOTIFICATIONS, in_band);
        let (memory, setup) = ring(&mut device);
        device.start_ring(0, setup.clone()).unwrap();
        let error = setup.error.unwrap();
        assert!(!is_readable(&error, PollTimeout::ZERO));
        memory.write(GuestAddress(0x2002), &9999u16.to_le_bytes()).unwrap();
        nix::unistd::write(&setup.kick, &1u64.to_ne_bytes()).unwrap();
        assert!(is_readable(&error, 60_000u16), "in-band: {in_band:#x}");
        if in_band != ProtocolFeatures::empty() {
            assert_eq!(events(&mut device), [DeviceEvent::RingBroken(0)]);
        }
        // A stopped ring is not signalled.
        device.stop_ring(0).unwrap();
        assert_eq!(backend.ask(BackendRequest::VRING_CALL, &VringState { index: 0, num: 0 }), 1);
    }
}

fn guest_config() -> GuestConfig {
    GuestConfig::new(32 * MIB)
        .with_working_set(2 * MIB)
        .with_cold(2 * MIB)
        .with_dirty_rate(32 * MIB)
        .with_disk_area(4 * MIB)
}

/// Rule B2.2.
#[test]
fn the_guest_reports_the_new_capacity_and_broken_rings() {
    let backend = Backend::start();
    let mut guest = Guest::new(guest_config()).unwrap();
    guest.boot(vec![Box::new(backend.device(ProtocolFeatures::empty()))]).unwrap();
    guest.resume().unwrap();
    let now = |guest: &Guest| guest.connections().remove(0);
    assert_eq!((now(&guest).capacity, now(&guest).broken_rings), (16 * MIB, vec![]));
    let image = File::options().write(true).open(backend.folder.path().join("image")).unwrap();
    image.set_len(64 * MIB).unwrap();
    // The test has the handle of the disk, so the test sends the message.
    backend.channel_device.disk.grow().unwrap();
    backend.host().config_changed();
    wait_for(&guest, "it has grown", |guest| now(guest).capacity == 64 * MIB);
    assert_eq!(backend.ask(BackendRequest::VRING_ERR, &VringState { index: 1, num: 0 }), 0);
    wait_for(&guest, "a ring is broken", |guest| now(guest).broken_rings == [1]);
    // The ring is not broken in fact and continues. After a restart it is reported as intact.
    guest.verify().unwrap();
    guest.pause().unwrap();
    guest.stop_devices().unwrap();
    guest.start_devices().unwrap();
    assert!(now(&guest).broken_rings.is_empty());
}

/// A back-end that negotiates, hands the channel to `talk`, and replies to further requests.
fn serve_with_channel(listener: UnixListener, mut talk: impl FnMut(raw::RawFrontend)) {
    let client = raw::RawFrontend { socket: listener.accept().unwrap().0 };
    loop {
        let mut byte = [0];
        let peeked = nix::sys::socket::recv(
            std::os::fd::AsRawFd::as_raw_fd(&client.socket),
            &mut byte,
            nix::sys::socket::MsgFlags::MSG_PEEK,
        );
        if peeked != Ok(1) {
            return;
        }
        let (header, _, fd) = client.receive();
        let code = Code(header.request);
        let number = match code {
            Code::GET_FEATURES => 1 << 32 | 1 << 30,
            Code::GET_PROTOCOL_FEATURES => {
                (ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::STATUS).bits()
            }
            Code::GET_STATUS => 7,
            _ if header.flags & Header::FLAG_NEED_REPLY != 0 => 0,
            _ => continue,
        };
        client.send(code, Header::REPLY_FLAGS, number.as_bytes(), &[]);
        if code == Code::SET_BACKEND_REQ_FD {
            let socket = UnixStream::from(fd.unwrap());
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            talk(raw::RawFrontend { socket });
        }
    }
}

/// Rule B1.1.
#[test]
fn a_protocol_violation_on_the_back_end_channel_closes_only_the_channel() {
    let header = |flags, size| Header { request: 2, flags, size }.as_bytes().to_vec();
    for bytes in [vec![0xff; 100], header(5, 8), header(1, 4097), header(1, u32::MAX), header(0, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let shown = format!("{bytes:x?}");
        let violate = move |channel: raw::RawFrontend| {
            channel.send_bytes(&bytes, &[]);
            // The front-end closes the channel without a reply.
            assert!(channel.is_closed());
        };
        let backend = std::thread::spawn(move || serve_with_channel(listener, violate));
        let path = folder.path().join("s");
        let mut device = UserDevice::connect(path, UserOptions::default(), Instant::now() + DEADLINE).unwrap();
        assert!(matches!(events(&mut device)[..], [DeviceEvent::ChannelBroken(_)]), "{shown}");
        assert_eq!(device.status().unwrap(), Some(7), "{shown}");
        drop(device);
        backend.join().unwrap();
    }
}

/// Rule B4.2.
#[test]
fn a_host_notifier_is_refused_and_its_fd_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("s")).unwrap();
    let talk = |channel: raw::RawFrontend| {
        let code = Code(BackendRequest::VRING_HOST_NOTIFIER_MSG.0);
        let area = VringArea { u64: 0, size: 4096, offset: 0 };
        for flags in [raw::VERSION, raw::NEED_REPLY] {
            let (mut reader, writer) = std::io::pipe().unwrap();
            channel.send(code, flags, area.as_bytes(), &[writer.as_fd()]);
            drop(writer);
            assert_eq!(reader.read(&mut [0]).unwrap(), 0, "the pipe ends when its last writer is closed");
        }
        assert_eq!(channel.reply(code), 1u64.as_bytes());
    };
    let backend = std::thread::spawn(move || serve_with_channel(listener, talk));
    let path = folder.path().join("s");
    let mut device = UserDevice::connect(path, UserOptions::default(), Instant::now() + DEADLINE).unwrap();
    assert_eq!(events(&mut device), [DeviceEvent::HostNotifierRefused(0)]);
    // The status request is served after the channel messages.
    assert_eq!(device.status().unwrap(), Some(7));
    drop(device);
    backend.join().unwrap();
}

/// A back-end with in-band notifications that the test drives, after negotiation.
struct ManualBackend {
    connection: raw::RawFrontend,
    channel: raw::RawFrontend,
}

impl ManualBackend {
    fn connect() -> (ManualBackend, UserDevice) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let negotiates = std::thread::spawn(move || ManualBackend::negotiate(&listener));
        let more = ProtocolFeatures::INBAND_NOTIFICATIONS | INFLIGHT_MIGRATION;
        let usual = UserOptions::default();
        let options = usual.with_protocol_features(usual.protocol_features | more);
        let device = UserDevice::connect(folder.path().join("s"), options, Instant::now() + DEADLINE).unwrap();
        (negotiates.join().unwrap(), device)
    }

    fn negotiate(listener: &UnixListener) -> ManualBackend {
        let own = |socket: UnixStream| {
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            raw::RawFrontend { socket }
        };
        let connection = own(listener.accept().unwrap().0);
        loop {
            let (header, _, fd) = connection.receive();
            let code = Code(header.request);
            let of_channel = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ;
            let of_rings = ProtocolFeatures::INBAND_NOTIFICATIONS | ProtocolFeatures::INFLIGHT_SHMFD;
            let number = match code {
                Code::GET_FEATURES => 1 << 32 | 1 << 30,
                Code::GET_PROTOCOL_FEATURES => (of_channel | of_rings | INFLIGHT_MIGRATION).bits(),
                _ if header.flags & Header::FLAG_NEED_REPLY != 0 => 0,
                _ => continue,
            };
            connection.send(code, Header::REPLY_FLAGS, number.as_bytes(), &[]);
            if code == Code::SET_BACKEND_REQ_FD {
                return ManualBackend { connection, channel: own(UnixStream::from(fd.unwrap())) };
            }
        }
    }

    /// Replies to all requests up to `code`, to which it does not reply.
    fn receive_until(&self, code: Code) {
        loop {
            let (header, payload, _) = self.connection.receive();
            match Code(header.request) {
                request if request == code => return,
                Code::GET_INFLIGHT_FD => {
                    let wish = InflightDescription::read_from_bytes(&payload).unwrap();
                    let (queues, size) = (wish.num_queues, wish.queue_size);
                    let mmap_size = InflightRegion::bytes_for(RingKind::Split, queues, size).unwrap();
                    let (_, fd) = InflightRegion::create(RingKind::Split, queues, size).unwrap();
                    let region = InflightDescription { mmap_size, ..wish };
                    self.reply(Code::GET_INFLIGHT_FD, &region, &[fd.as_fd()]);
                }
                request => self.reply(request, &0u64, &[]),
            }
        }
    }

    fn reply(&self, code: Code, body: &(impl IntoBytes + zerocopy::Immutable), fds: &[std::os::fd::BorrowedFd<'_>]) {
        self.connection.send(code, Header::REPLY_FLAGS, body.as_bytes(), fds);
    }

    /// Sends a call for ring 0 with need-reply. Returns the acknowledgement.
    fn call_ring_0(&self) -> u64 {
        let code = Code(BackendRequest::VRING_CALL.0);
        self.channel.acknowledged(code, VringState { index: 0, num: 0 }.as_bytes(), &[])
    }

    /// Starts ring 0. Returns the device and the ring's fds.
    fn start_ring_0(&self, device: UserDevice) -> (UserDevice, RingSetup) {
        let starts = std::thread::spawn(move || {
            let mut device = device;
            let (_memory, setup) = ring(&mut device);
            assert!(device.set_inflight(1, 8, None).unwrap());
            device.start_ring(0, setup.clone()).unwrap();
            (device, setup)
        });
        self.receive_until(Code::SET_VRING_ENABLE);
        // The ring was served as soon as it was enabled.
        assert_eq!(self.call_ring_0(), 0, "a ring that is being enabled is not known");
        self.reply(Code::SET_VRING_ENABLE, &0u64, &[]);
        starts.join().unwrap()
    }
}

/// Rules B3.2, B3.6.
#[test]
fn in_band_calls_are_forwarded_while_a_ring_is_enabled_and_after_it_is_stopped() {
    let (backend, device) = ManualBackend::connect();
    let (device, setup) = backend.start_ring_0(device);
    assert!(is_readable(&setup.call, PollTimeout::ZERO), "the call before the acknowledgement is lost");
    nix::unistd::read(&setup.call, &mut [0; 8]).unwrap();
    let mut device = device;
    let stops = std::thread::spawn(move || device.stop_ring(0).map(|_| device));
    backend.receive_until(Code::GET_VRING_BASE);
    backend.reply(Code::GET_VRING_BASE, &VringState { index: 0, num: 1 }, &[]);
    let _device = stops.join().unwrap().unwrap();
    // The last call may be sent after the reply to GET_VRING_BASE.
    assert_eq!(backend.call_ring_0(), 1);
    assert!(is_readable(&setup.call, PollTimeout::ZERO), "the last call is lost");
}

/// Rules B3.5, I8.2: a late kick would start the ring again.
#[test]
fn no_in_band_kick_follows_the_message_that_stops_its_ring() {
    let stop: fn(&mut UserDevice) -> Result<RingBase, FrontendError> = |device| device.stop_ring(0);
    for (stop, code) in
        [(stop, Code::GET_VRING_BASE), (|device| device.suspend_ring(0), Code::GET_VRING_BASE_SKIP_DRAIN)]
    {
        let (backend, device) = ManualBackend::connect();
        let (mut device, setup) = backend.start_ring_0(device);
        let kick = || nix::unistd::write(&setup.kick, &1u64.to_ne_bytes()).unwrap();
        kick();
        backend.receive_until(Code::VRING_KICK);
        let stops = std::thread::spawn(move || (stop(&mut device), device));
        backend.receive_until(code);
        kick();
        assert!(!is_readable(&backend.connection, 300u16), "a kick comes after {code}");
        backend.reply(code, &VringState { index: 0, num: 1 }, &[]);
        let (base, _device) = stops.join().unwrap();
        assert_eq!(base.unwrap(), RingBase::split(1));
        assert!(!is_readable(&backend.connection, 100u16), "a kick comes after the answer to {code}");
        assert!(is_readable(&setup.kick, PollTimeout::ZERO), "the kick is there for whoever starts the ring next");
    }
}

#[test]
fn get_vring_base_is_sent_after_a_refused_disable() {
    let (backend, device) = ManualBackend::connect();
    let (mut device, setup) = backend.start_ring_0(device);
    let stops = std::thread::spawn(move || (device.stop_ring(0), device));
    backend.receive_until(Code::SET_VRING_ENABLE);
    nix::unistd::write(&setup.kick, &1u64.to_ne_bytes()).unwrap();
    backend.reply(Code::SET_VRING_ENABLE, &1u64, &[]);
    backend.receive_until(Code::GET_VRING_BASE);
    backend.reply(Code::GET_VRING_BASE, &VringState { index: 0, num: 1 }, &[]);
    let (base, _device) = stops.join().unwrap();
    assert_eq!(base.unwrap(), RingBase::split(1));
    assert!(is_readable(&setup.kick, PollTimeout::ZERO), "the kick is there for whoever starts the ring next");
}
