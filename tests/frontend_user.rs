//! Messages of the vhost-user client, and its handling of replies, with a scripted back-end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rstest::rstest;
use tempfile::TempDir;
use vhost_migrate::abi::inflight;
use vhost_migrate::abi::vhost_user::{
    FrontendRequest, Header, ProtocolFeatures, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES,
};
use vhost_migrate::abi::virtio::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, FrontendError, Reconnection, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{FaultAddress, GuestAddress, Memory, Region, UserAddress, sealed_memfd};
use vhost_migrate::ring::RingBase;
use zerocopy::IntoBytes;

const LOG_ALL: VirtioFeatures = VHOST_F_LOG_ALL;
const PROTOCOL: VirtioFeatures = VHOST_USER_F_PROTOCOL_FEATURES;
const VERSION_1: VirtioFeatures = VIRTIO_F_VERSION_1;
const PACKED: VirtioFeatures = VIRTIO_F_RING_PACKED;
const ALL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Reaction of the back-end to a message.
enum ScriptedReply {
    Default,
    None,
    /// Sends these bytes and fds.
    Raw(Vec<u8>, Vec<OwnedFd>),
    /// Sends these bytes and closes the connection.
    HangUp(Vec<u8>),
}

impl ScriptedReply {
    /// The reply to `request` with this payload.
    fn of(request: FrontendRequest, payload: &[u8]) -> ScriptedReply {
        ScriptedReply::Raw(reply(request, payload), vec![])
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Message {
    request: FrontendRequest,
    flags: u32,
    payload: Vec<u8>,
}

type Script = Box<dyn FnMut(&Message) -> ScriptedReply + Send>;

/// A back-end that records messages. It has 4 queues, and memory slots for 32 regions.
struct ScriptedBackend {
    folder: TempDir,
    received: Arc<Mutex<Vec<Message>>>,
}

impl ScriptedBackend {
    fn start(
        protocol: ProtocolFeatures,
        script: impl FnMut(&Message) -> ScriptedReply + Send + 'static,
    ) -> ScriptedBackend {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let backend = ScriptedBackend { folder, received: received.clone() };
        let mut script: Script = Box::new(script);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), protocol, &received, &mut script);
            }
        });
        backend
    }

    /// Starts a back-end whose reaction to `request` is scripted.
    fn reacting_to(
        request: FrontendRequest,
        mut script: impl FnMut(&Message) -> ScriptedReply + Send + 'static,
    ) -> ScriptedBackend {
        ScriptedBackend::start(ALL, move |message| match message.request == request {
            true => script(message),
            false => ScriptedReply::Default,
        })
    }

    /// Starts a back-end with these protocol features and the default replies.
    fn unscripted(protocol: ProtocolFeatures) -> ScriptedBackend {
        ScriptedBackend::start(protocol, |_| ScriptedReply::Default)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn connect(&self) -> Result<UserDevice, FrontendError> {
        self.connect_with(UserOptions::default())
    }

    fn connect_with(&self, options: UserOptions) -> Result<UserDevice, FrontendError> {
        UserDevice::connect(self.path(), options, Instant::now())
    }

    /// Returns the messages since the last call.
    fn take(&self) -> Vec<Message> {
        std::mem::take(&mut self.received.lock().unwrap())
    }

    fn requests(&self) -> Vec<String> {
        self.take().iter().map(|message| message.request.to_string()).collect()
    }
}

fn serve(mut stream: UnixStream, protocol: ProtocolFeatures, received: &Mutex<Vec<Message>>, script: &mut Script) {
    loop {
        let mut header = [0; 12];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let header: Header = zerocopy::transmute!(header);
        let mut payload = vec![0; header.size as usize];
        stream.read_exact(&mut payload).unwrap();
        let message = Message { request: FrontendRequest(header.request), flags: header.flags, payload };
        received.lock().unwrap().push(message.clone());
        let (bytes, fds) = match script(&message) {
            ScriptedReply::Default => default_reply(&message, protocol),
            ScriptedReply::None => continue,
            ScriptedReply::Raw(bytes, fds) => (bytes, fds),
            ScriptedReply::HangUp(bytes) => return stream.write_all(&bytes).unwrap_or_default(),
        };
        if bytes.is_empty() {
            continue;
        }
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(bytes.len()));
    }
}

fn default_reply(message: &Message, protocol: ProtocolFeatures) -> (Vec<u8>, Vec<OwnedFd>) {
    let request = message.request;
    let number = |value: u64| (reply(request, value.as_bytes()), vec![]);
    match request {
        FrontendRequest::GET_FEATURES => number((LOG_ALL | PROTOCOL | VERSION_1 | PACKED).bits()),
        FrontendRequest::GET_PROTOCOL_FEATURES => number(protocol.bits()),
        FrontendRequest::GET_QUEUE_NUM => number(4),
        FrontendRequest::GET_MAX_MEM_SLOTS => number(32),
        FrontendRequest::GET_STATUS => number(7),
        FrontendRequest::SET_LOG_BASE | FrontendRequest::GET_VRING_BASE | FrontendRequest::GET_CONFIG => {
            (reply(request, &message.payload), vec![])
        }
        FrontendRequest::GET_INFLIGHT_FD => {
            let queues = u16::from_ne_bytes(message.payload[16..18].try_into().unwrap());
            let size = u16::from_ne_bytes(message.payload[18..20].try_into().unwrap());
            // Large enough for split and packed rings.
            let bytes = inflight::packed_queue_bytes(size) * u64::from(queues);
            let mut payload = message.payload.clone();
            payload[..8].copy_from_slice(&bytes.to_ne_bytes());
            (reply(request, &payload), vec![sealed_memfd("backend", bytes).unwrap()])
        }
        _ if message.flags & Header::FLAG_NEED_REPLY != 0 => number(0),
        _ => (vec![], vec![]),
    }
}

fn reply(request: FrontendRequest, payload: &[u8]) -> Vec<u8> {
    raw(request, Header::REPLY_FLAGS, payload)
}

fn raw(request: FrontendRequest, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { request: request.0, flags, size: payload.len() as u32 };
    [header.as_bytes(), payload].concat()
}

/// `regions` regions of 64 KiB with gaps.
fn memory(regions: u64) -> Memory {
    let region = |i| {
        let fd = sealed_memfd("guest", 0x10000).unwrap();
        Arc::new(Region::share(fd, GuestAddress(i * 0x20000), 0x10000, 0).unwrap())
    };
    Memory::new((0..regions).map(region)).unwrap()
}

fn setup() -> RingSetup {
    let eventfd = || Arc::new(OwnedFd::from(EventFd::new().unwrap()));
    let base = RingBase::split(7);
    RingSetup {
        size: 8,
        desc: GuestAddress(0x1000),
        avail: GuestAddress(0x2000),
        used: GuestAddress(0x3000),
        kick: eventfd(),
        call: eventfd(),
        error: None,
        base,
    }
}

/// A device with features and memory.
fn ready(backend: &ScriptedBackend, options: UserOptions) -> UserDevice {
    let mut device = backend.connect_with(options).unwrap();
    device.set_features(VERSION_1).unwrap();
    device.set_memory(&memory(1)).unwrap();
    device
}

/// A device with memory and one running ring.
fn running(backend: &ScriptedBackend, options: UserOptions) -> UserDevice {
    let mut device = backend.connect_with(options).unwrap();
    device.set_features(VERSION_1).unwrap();
    device.set_inflight(1, 8, None).unwrap();
    device.set_memory(&memory(1)).unwrap();
    device.start_ring(0, setup()).unwrap();
    device
}

fn log() -> (Arc<Log>, OwnedFd) {
    let (log, fd) = Log::create(GuestAddress(0x10000)).unwrap();
    (Arc::new(log), fd)
}

/// Rule F7.2.
#[test]
fn the_reply_to_set_log_base_may_have_any_length() {
    for len in [0, 8, 16, 24] {
        let backend = ScriptedBackend::reacting_to(FrontendRequest::SET_LOG_BASE, move |_| {
            ScriptedReply::of(FrontendRequest::SET_LOG_BASE, &vec![0xab; len])
        });
        let mut device = running(&backend, UserOptions::default());
        let (log, fd) = log();
        device.start_logging(&log, fd.as_fd()).unwrap();
        device.stop_logging().unwrap();
    }
}

/// Rules L7.1 and L7.3.
#[test]
fn logging_starts_with_the_log_then_features_then_rings() {
    let backend = ScriptedBackend::unscripted(ALL);
    let mut device = running(&backend, UserOptions::default());
    backend.take();
    let (log, fd) = log();
    device.start_logging(&log, fd.as_fd()).unwrap();
    let on = backend.take();
    let names: Vec<_> = on.iter().map(|message| message.request).collect();
    assert_eq!(names, [FrontendRequest::SET_LOG_BASE, FrontendRequest::SET_FEATURES, FrontendRequest::SET_VRING_ADDR]);
    assert_eq!(on[0].flags, 1, "SET_LOG_BASE has a reply of its own (rule F3.1)");
    assert_eq!(on[0].payload, [log.size(), 0].as_bytes());
    assert_eq!(on[1].payload, (LOG_ALL | PROTOCOL | VERSION_1).as_bytes());
    assert_eq!(on[2].payload[4..8], 1u32.to_ne_bytes(), "VHOST_VRING_F_LOG");
    assert_eq!(on[2].payload[32..], 0x3000u64.to_ne_bytes(), "log_guest_addr is guest-physical");
    device.start_logging(&log, fd.as_fd()).unwrap();
    assert_eq!(backend.requests(), ["SET_LOG_BASE"], "a new log while logging (rule L9.1)");
    device.stop_logging().unwrap();
    let off = backend.take();
    let names: Vec<_> = off.iter().map(|message| message.request).collect();
    assert_eq!(names, [FrontendRequest::SET_FEATURES, FrontendRequest::SET_VRING_ADDR]);
    assert_eq!(off[0].payload, (PROTOCOL | VERSION_1).as_bytes());
    assert_eq!(off[1].payload[4..8], [0; 4]);
}

/// Rule F4.4.
#[test]
fn without_reply_ack_every_step_ends_with_a_get_features_round_trip() {
    let backend = ScriptedBackend::unscripted(ALL & !ProtocolFeatures::REPLY_ACK);
    let mut device = running(&backend, UserOptions::default());
    backend.take();
    let (log, fd) = log();
    device.start_logging(&log, fd.as_fd()).unwrap();
    assert_eq!(backend.requests(), ["SET_LOG_BASE", "SET_FEATURES", "SET_VRING_ADDR", "GET_FEATURES"]);
    device.set_memory(&memory(2)).unwrap();
    let received = backend.take();
    assert_eq!(received.last().unwrap().request, FrontendRequest::GET_FEATURES);
    assert!(received.iter().all(|message| message.flags == 1), "nobody may be asked for acknowledgements");
}

/// Rules F4.1 and F5.1.
#[test]
fn a_refusal_is_an_error_and_keeps_the_connection() {
    let mut calls = 0;
    let backend = ScriptedBackend::reacting_to(FrontendRequest::SET_MEM_TABLE, move |_| {
        calls += 1;
        let code = u64::from(calls == 2);
        ScriptedReply::of(FrontendRequest::SET_MEM_TABLE, code.as_bytes())
    });
    let mut device = running(&backend, UserOptions::default());
    let error = device.set_memory(&memory(3)).unwrap_err();
    assert!(matches!(error, FrontendError::Refused { request: FrontendRequest::SET_MEM_TABLE, code: 1 }), "{error}");
    assert!(!device.needs_reconnect());
    assert_eq!(device.stop_ring(0).unwrap(), RingBase::split(0));
}

#[test]
fn an_invalid_reply_names_its_rule_and_closes_the_connection() {
    let number = 0u64;
    let bad = [
        ("F2.2", raw(FrontendRequest::GET_STATUS, 1, number.as_bytes())),
        ("F2.2", raw(FrontendRequest::GET_STATUS, 0xd, number.as_bytes())),
        ("F10.1", reply(FrontendRequest::GET_FEATURES, number.as_bytes())),
        ("F3.1", reply(FrontendRequest::GET_STATUS, &[0; 4])),
        ("F3.1", reply(FrontendRequest::GET_STATUS, &[0; 16])),
        ("F1.4", reply(FrontendRequest::GET_STATUS, &vec![0; 4097])),
        ("F1.4", Header { request: FrontendRequest::GET_STATUS.0, flags: 5, size: u32::MAX }.as_bytes().to_vec()),
    ];
    for (expected, bytes) in bad {
        let shown = format!("{bytes:x?}");
        let backend = ScriptedBackend::reacting_to(FrontendRequest::GET_STATUS, move |_| {
            ScriptedReply::Raw(bytes.clone(), vec![])
        });
        let mut device = backend.connect().unwrap();
        match device.status().unwrap_err() {
            FrontendError::ProtocolViolation { request: FrontendRequest::GET_STATUS, rule, .. } => {
                assert_eq!(rule, expected, "{shown}")
            }
            other => panic!("{other} for {shown}"),
        }
        assert!(expected == "F3.1" || device.needs_reconnect(), "what follows can't be trusted: {shown}");
    }
}

#[test]
fn a_connection_closed_at_any_byte_of_a_reply_is_a_hang_up() {
    let whole = reply(FrontendRequest::GET_STATUS, 0u64.as_bytes());
    for len in 0..whole.len() {
        let part = whole[..len].to_vec();
        let backend =
            ScriptedBackend::reacting_to(FrontendRequest::GET_STATUS, move |_| ScriptedReply::HangUp(part.clone()));
        let mut device = backend.connect().unwrap();
        let watch = device.hang_up_fd().unwrap().unwrap();
        let error = device.status().unwrap_err();
        assert!(
            matches!(error, FrontendError::HungUp { request: FrontendRequest::GET_STATUS }),
            "{error} after {len} bytes"
        );
        assert!(device.needs_reconnect());
        let mut ready = [nix::poll::PollFd::new(watch.as_fd(), nix::poll::PollFlags::empty())];
        assert_eq!(nix::poll::poll(&mut ready, 10_000u16), Ok(1), "who watches is woken");
    }
}

#[test]
fn a_missing_reply_is_a_timeout_after_the_deadline() {
    let backend = ScriptedBackend::start(ALL, |message| match message.request {
        FrontendRequest::GET_STATUS | FrontendRequest::GET_VRING_BASE => ScriptedReply::None,
        _ => ScriptedReply::Default,
    });
    let timeout = Duration::from_millis(30);
    let options = UserOptions::default().with_timeout(timeout).with_stop_timeout(2 * timeout);
    let error = backend.connect_with(options).unwrap().status().unwrap_err();
    assert!(matches!(error, FrontendError::Timeout { waited, .. } if waited == timeout), "{error}");
    assert!(error.is_hang_up());
    let mut device = running(&backend, options);
    let error = device.stop_ring(0).unwrap_err();
    assert!(matches!(error, FrontendError::Timeout { waited, .. } if waited == 2 * timeout), "{error}");
    assert!(device.needs_reconnect(), "a late answer must not be taken for the next");
}

/// A back-end that waits for a signal before it replies to the first such request.
fn backend_slow_at(request: FrontendRequest, protocol: ProtocolFeatures) -> (ScriptedBackend, Sender<()>) {
    let (go, gone) = channel();
    let mut held = false;
    let backend = ScriptedBackend::start(protocol, move |message| {
        let disables = request != FrontendRequest::SET_VRING_ENABLE || message.payload.get(4) == Some(&0);
        if message.request == request && disables && !std::mem::replace(&mut held, true) {
            gone.recv().unwrap();
        }
        ScriptedReply::Default
    });
    (backend, go)
}

/// Runs `call`, whose reply does not arrive, and ends the wait with the interrupt.
fn interrupted(
    backend: &ScriptedBackend,
    slow: FrontendRequest,
    device: &mut UserDevice,
    call: impl FnOnce(&mut UserDevice) -> Result<(), FrontendError>,
) {
    let interrupt = device.interrupt().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while !backend.received.lock().unwrap().iter().any(|message| message.request == slow) {
                assert!(start.elapsed() < Duration::from_secs(60));
                std::thread::sleep(Duration::from_millis(1));
            }
            interrupt.set();
        });
        let error = call(device).unwrap_err();
        assert!(matches!(error, FrontendError::Interrupted { .. }), "{error}");
    });
    assert!(device.needs_reconnect());
}

/// Rule F10.3.
#[rstest]
fn a_ring_whose_stop_was_interrupted_is_restarted_by_reconnect(
    #[values(FrontendRequest::SET_VRING_ENABLE, FrontendRequest::GET_VRING_BASE)] slow: FrontendRequest,
    #[values(ALL, ALL & !ProtocolFeatures::INFLIGHT_SHMFD, ALL & !ProtocolFeatures::REPLY_ACK & !ProtocolFeatures::INFLIGHT_SHMFD)]
    protocol: ProtocolFeatures,
) {
    let (backend, go) = backend_slow_at(slow, protocol);
    let mut device = running(&backend, UserOptions::default());
    let interrupt = device.interrupt().unwrap();
    backend.take();
    interrupted(&backend, slow, &mut device, |device| device.stop_ring(0).map(drop));
    backend.take();
    // Nothing is sent while a reply is pending, and no call waits.
    let (log, fd) = log();
    assert!(matches!(device.start_logging(&log, fd.as_fd()).unwrap_err(), FrontendError::Interrupted { .. }));
    let late = || Instant::now() + Duration::from_secs(3600);
    assert!(matches!(device.reconnect(late()).unwrap_err(), FrontendError::Interrupted { .. }));
    interrupt.clear();
    let error = device.reconnect(Instant::now() + Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, FrontendError::Timeout { .. }) && backend.take().is_empty(), "{error}");

    go.send(()).unwrap();
    let back = device.reconnect(late()).unwrap();
    assert_eq!(back, Reconnection::default(), "the connection is the old one");
    assert!(!device.needs_reconnect());
    let received = backend.take();
    let index = |request| received.iter().position(|message| message.request == request);
    let enabled = index(FrontendRequest::SET_VRING_ENABLE).unwrap();
    assert_eq!(received[enabled].payload[4], 1, "{received:?}");
    // GET_VRING_BASE was sent after the disable: the ring starts at the returned base.
    assert!(index(FrontendRequest::SET_VRING_KICK).is_some_and(|kick| kick < enabled), "{received:?}");
    assert_eq!(device.stop_ring(0).unwrap().bits(), 0);
}

/// A back-end that, once armed, waits for a signal at the next such request and then replies with `code`.
fn backend_held_at(
    request: FrontendRequest,
    protocol: ProtocolFeatures,
    code: u64,
) -> (ScriptedBackend, impl Fn(&ScriptedBackend), Sender<()>) {
    let ((go, gone), holds) = (channel(), Arc::new(AtomicBool::new(false)));
    let hold = {
        let holds = holds.clone();
        move |backend: &ScriptedBackend| {
            backend.take();
            holds.store(true, Ordering::Relaxed);
        }
    };
    let backend = ScriptedBackend::start(protocol, move |message| {
        let is_held = message.request == request && holds.swap(false, Ordering::Relaxed);
        if is_held {
            gone.recv().unwrap();
        }
        match is_held && code != 0 {
            true => ScriptedReply::of(request, code.as_bytes()),
            false => ScriptedReply::Default,
        }
    });
    (backend, hold, go)
}

type Call = fn(&mut UserDevice) -> Result<(), FrontendError>;

const DEADLINE: Duration = Duration::from_secs(60);

/// Options with a timeout that is never reached.
fn long_timeout() -> UserOptions {
    UserOptions::default().with_timeout(DEADLINE)
}

#[rstest]
#[case::features(FrontendRequest::SET_FEATURES, |device: &mut UserDevice| device.set_features(VERSION_1))]
#[case::memory(FrontendRequest::SET_MEM_TABLE, |device: &mut UserDevice| device.set_memory(&memory(2)))]
#[case::memory_slots(FrontendRequest::ADD_MEM_REG, |device: &mut UserDevice| device.set_memory(&memory(20)))]
#[case::inflight(FrontendRequest::GET_INFLIGHT_FD, |device: &mut UserDevice| device.set_inflight(1, 8, None).map(drop))]
#[case::inflight_fd(FrontendRequest::SET_INFLIGHT_FD, |device: &mut UserDevice| device.set_inflight(1, 8, None).map(drop))]
#[case::configuration(FrontendRequest::GET_CONFIG, |device: &mut UserDevice| device.config(0, &mut [0; 8]))]
#[case::status(FrontendRequest::SET_STATUS, |device: &mut UserDevice| device.set_status(1))]
#[case::trial_of_a_ring(FrontendRequest::SET_VRING_NUM, |device: &mut UserDevice| device.validate_ring(1, &setup()))]
fn the_interrupt_ends_the_wait_for_any_reply_and_the_call_can_be_repeated(
    #[case] slow: FrontendRequest,
    #[case] call: Call,
    #[values(ALL, ALL & !ProtocolFeatures::REPLY_ACK)] protocol: ProtocolFeatures,
) {
    let (backend, hold, go) = backend_held_at(slow, protocol, 0);
    let mut device = running(&backend, long_timeout());
    hold(&backend);
    interrupted(&backend, slow, &mut device, call);
    device.interrupt().unwrap().clear();
    go.send(()).unwrap();
    let back = device.reconnect(Instant::now() + DEADLINE).unwrap();
    assert_eq!(back, Reconnection::default(), "the connection is the old one");
    assert!(!device.needs_reconnect());
    call(&mut device).unwrap();
    device.stop_ring(0).unwrap();
}

/// Rule F10.4.
#[rstest]
fn a_ring_whose_start_was_interrupted_runs_after_reconnect(
    #[values(ALL, ALL & !ProtocolFeatures::REPLY_ACK)] protocol: ProtocolFeatures,
) {
    let (backend, hold, go) = backend_held_at(FrontendRequest::SET_VRING_KICK, protocol, 0);
    let mut device = running(&backend, long_timeout());
    let call: Call = |device| device.start_ring(1, setup());
    hold(&backend);
    interrupted(&backend, FrontendRequest::SET_VRING_KICK, &mut device, call);
    device.interrupt().unwrap().clear();
    assert!(matches!(call(&mut device).unwrap_err(), FrontendError::Unavailable { .. }), "nothing is known of it");
    go.send(()).unwrap();
    assert_eq!(device.reconnect(Instant::now() + DEADLINE).unwrap(), Reconnection::default());
    assert!(matches!(call(&mut device).unwrap_err(), FrontendError::InvalidRing { .. }), "it runs");
    assert!(!backend.requests().contains(&"GET_VRING_BASE".to_owned()));
    device.stop_ring(1).unwrap();
    call(&mut device).unwrap();
}

/// Rule F10.4.
#[test]
fn a_start_refused_after_an_interrupt_is_repeated_on_a_new_connection() {
    let (backend, hold, go) = backend_held_at(FrontendRequest::SET_VRING_KICK, ALL, 1);
    let mut device = running(&backend, long_timeout());
    hold(&backend);
    interrupted(&backend, FrontendRequest::SET_VRING_KICK, &mut device, |device| device.start_ring(1, setup()));
    device.interrupt().unwrap().clear();
    go.send(()).unwrap();
    assert_eq!(device.reconnect(Instant::now() + DEADLINE).unwrap().attempts, 1, "over a new connection");
    assert_eq!(backend.requests().iter().filter(|request| *request == "SET_VRING_KICK").count(), 3);
    device.stop_ring(1).unwrap();
}

#[test]
fn a_stop_timeout_keeps_the_connection_when_there_is_no_inflight_region() {
    let (backend, go) = backend_slow_at(FrontendRequest::GET_VRING_BASE, ALL & !ProtocolFeatures::INFLIGHT_SHMFD);
    let options = UserOptions::default().with_stop_timeout(Duration::from_millis(30));
    let mut device = running(&backend, options);
    let error = device.stop_ring(0).unwrap_err();
    assert!(matches!(error, FrontendError::Timeout { .. }), "{error}");
    go.send(()).unwrap();
    assert_eq!(device.reconnect(Instant::now() + Duration::from_secs(60)).unwrap(), Reconnection::default());
    assert!(!device.needs_reconnect());
}

/// Two rings with different bases.
fn two_rings() -> [(u16, RingSetup); 2] {
    [0, 1].map(|index| (index, RingSetup { base: RingBase::split(10 + index), ..setup() }))
}

/// A back-end that replies only after the last message in `last` for ring 1.
fn backend_replying_after(last: &[FrontendRequest], protocol: ProtocolFeatures) -> ScriptedBackend {
    let (last, mut kept) = (last.to_vec(), Vec::new());
    let rings = [
        FrontendRequest::SET_VRING_CALL,
        FrontendRequest::SET_VRING_KICK,
        FrontendRequest::SET_VRING_NUM,
        FrontendRequest::SET_VRING_BASE,
    ];
    let more = [FrontendRequest::SET_VRING_ADDR, FrontendRequest::SET_VRING_ENABLE, FrontendRequest::GET_VRING_BASE];
    ScriptedBackend::start(protocol, move |message| {
        if !rings.iter().chain(&more).any(|request| *request == message.request) {
            return ScriptedReply::Default;
        }
        kept.extend(default_reply(message, protocol).0);
        match last.contains(&message.request) && message.payload.first() == Some(&1) {
            true => ScriptedReply::Raw(std::mem::take(&mut kept), vec![]),
            false => ScriptedReply::None,
        }
    })
}

/// Rule R3.5.
#[rstest]
fn messages_that_start_and_stop_rings_are_sent_before_the_first_reply_is_read(
    #[values(ALL, ALL & !ProtocolFeatures::REPLY_ACK)] protocol: ProtocolFeatures,
) {
    let backend = backend_replying_after(&[FrontendRequest::SET_VRING_ENABLE], protocol);
    let mut device = ready(&backend, UserOptions::default());
    let mut started = Vec::new();
    device.start_rings(&two_rings(), &mut || {}, &mut |index| started.push(index)).unwrap();
    assert_eq!(started, [0, 1]);
    drop(device);

    let backend =
        backend_replying_after(&[FrontendRequest::SET_VRING_ENABLE, FrontendRequest::GET_VRING_BASE], protocol);
    let mut device = ready(&backend, UserOptions::default());
    device.start_rings(&two_rings(), &mut || {}, &mut |_| {}).unwrap();
    backend.take();
    let mut stopped = Vec::new();
    device.stop_rings(&[0, 1], &mut || {}, &mut |index, base| stopped.push((index, base.bits()))).unwrap();
    // The scripted back-end returns base 0.
    assert_eq!(stopped, [(0, 0), (1, 0)]);
    let (enable, base) = (FrontendRequest::SET_VRING_ENABLE, FrontendRequest::GET_VRING_BASE);
    let received: Vec<_> = backend.take().iter().map(|message| (message.request, message.payload[0])).collect();
    assert_eq!(received, [(enable, 0), (enable, 1), (base, 0), (base, 1)]);
    // Both rings can be started again.
    device.start_rings(&two_rings(), &mut || {}, &mut |_| {}).unwrap();
}

/// The back-end of each device replies after both devices have sent their requests.
#[test]
fn one_thread_sends_to_two_devices_before_it_waits_for_either() {
    let last = [FrontendRequest::SET_VRING_NUM, FrontendRequest::SET_VRING_ENABLE, FrontendRequest::GET_VRING_BASE];
    let asked = std::sync::Arc::new(std::sync::Mutex::new(std::collections::HashMap::new()));
    let both_are_asked = std::sync::Arc::new(std::sync::Condvar::new());
    let fakes = [0, 1].map(|_| {
        let (asked, both_are_asked, mut received) = (asked.clone(), both_are_asked.clone(), 0);
        ScriptedBackend::start(ALL, move |message| {
            if last.contains(&message.request) {
                received += 1;
                let mut asked = asked.lock().unwrap();
                *asked.entry(received).or_insert(0) += 1;
                both_are_asked.notify_all();
                let waited = both_are_asked.wait_timeout_while(asked, DEADLINE, |asked| asked[&received] < 2).unwrap();
                assert!(!waited.1.timed_out(), "{}: the other device is not asked", message.request);
            }
            ScriptedReply::Default
        })
    });
    let [mut one, mut other] = fakes.each_ref().map(|backend| ready(backend, long_timeout()));
    assert!(one.reports_sent());
    let rings = [(0, setup())];
    one.validate_rings(&rings, &mut || other.validate_rings(&rings, &mut || {}).unwrap()).unwrap();
    let (mut started, mut stopped) = (Vec::new(), Vec::new());
    let mut sent = || other.start_rings(&rings, &mut || {}, &mut |_| {}).unwrap();
    one.start_rings(&rings, &mut sent, &mut |index| started.push(index)).unwrap();
    let mut sent = || other.stop_rings(&[0], &mut || {}, &mut |_, _| {}).unwrap();
    one.stop_rings(&[0], &mut sent, &mut |index, _| stopped.push(index)).unwrap();
    assert_eq!((started, stopped), (vec![0], vec![0]));
}

#[test]
fn ring_parameters_are_sent_again_only_after_a_change() {
    let backend = ScriptedBackend::unscripted(ALL);
    let mut device = ready(&backend, UserOptions::default());
    let rings = [(0, setup())];
    let told =
        |of: &str| -> Vec<String> { backend.requests().into_iter().filter(|request| request.contains(of)).collect() };
    let size = ["SET_VRING_CALL", "SET_VRING_NUM"];
    let place = ["SET_VRING_BASE", "SET_VRING_ADDR"];
    let trial = ["SET_VRING_ENABLE"; 2];
    let start = ["SET_VRING_KICK", "SET_VRING_ENABLE"];
    backend.take();
    device.prepare_rings(&rings).unwrap();
    assert_eq!(told("VRING"), size);
    backend.take();
    device.validate_rings(&rings, &mut || {}).unwrap();
    assert_eq!(told("VRING"), [&place[..], &trial].concat());
    backend.take();
    device.start_ring(0, setup_of(&rings)).unwrap();
    assert_eq!(told("VRING"), start);
    device.stop_ring(0).unwrap();
    backend.take();
    // A back-end may forget the parameters of a stopped ring.
    device.validate_rings(&rings, &mut || {}).unwrap();
    assert_eq!(told("VRING"), [&size[..], &place, &trial].concat());
    backend.take();
    // Other memory gives the ring other addresses.
    device.set_memory(&memory(2)).unwrap();
    device.start_ring(0, setup_of(&rings)).unwrap();
    assert_eq!(told("VRING"), [&place[..], &start].concat());
    device.stop_ring(0).unwrap();
    device.prepare_rings(&rings).unwrap();
    device.validate_rings(&rings, &mut || {}).unwrap();
    backend.take();
    let other = RingSetup { base: RingBase::split(7), call: setup().call, ..setup_of(&rings) };
    device.start_ring(0, other).unwrap();
    assert_eq!(told("VRING"), [&size[..], &place, &start].concat());
    device.stop_ring(0).unwrap();
    // Features and a status reset make the back-end forget them.
    let forgets: [Call; 2] = [|device| device.set_features(VirtioFeatures::empty()), |device| device.set_status(0)];
    for forget in forgets {
        device.prepare_rings(&rings).unwrap();
        forget(&mut device).unwrap();
        backend.take();
        device.prepare_rings(&rings).unwrap();
        assert_eq!(told("VRING"), size);
    }
}

/// A message that was not sent has no reply: the connection stays usable.
/// Rule F10.2.
#[test]
fn rings_are_neither_validated_nor_stopped_while_a_reply_is_pending() {
    let (backend, hold, go) = backend_held_at(FrontendRequest::SET_FEATURES, ALL, 0);
    let mut device = running(&backend, long_timeout());
    hold(&backend);
    interrupted(&backend, FrontendRequest::SET_FEATURES, &mut device, |device| device.set_features(VERSION_1));
    device.interrupt().unwrap().clear();
    let rings = [(1, setup())];
    let calls: [Call; 3] = [
        |device| device.validate_rings(&[(1, setup())], &mut || {}),
        |device| device.prepare_rings(&[(1, setup())]),
        |device| device.stop_rings(&[0], &mut || {}, &mut |_, _| {}),
    ];
    for call in calls {
        assert!(matches!(call(&mut device).unwrap_err(), FrontendError::Unavailable { .. }));
    }
    go.send(()).unwrap();
    assert_eq!(device.reconnect(Instant::now() + DEADLINE).unwrap(), Reconnection::default());
    device.validate_rings(&rings, &mut || {}).unwrap();
    device.stop_ring(0).unwrap();
}

fn setup_of(rings: &[(u16, RingSetup); 1]) -> RingSetup {
    rings[0].1.clone()
}

#[test]
fn a_refused_ring_does_not_stop_the_others_from_starting() {
    let backend = ScriptedBackend::start(ALL, |message| match (message.request, message.payload.first()) {
        (FrontendRequest::SET_VRING_ADDR, Some(0)) => ScriptedReply::of(message.request, &1u64.to_ne_bytes()),
        _ => ScriptedReply::Default,
    });
    let mut device = ready(&backend, UserOptions::default());
    let mut started = Vec::new();
    let refused = device.start_rings(&two_rings(), &mut || {}, &mut |index| started.push(index)).unwrap_err();
    assert!(
        matches!(refused, FrontendError::Refused { request: FrontendRequest::SET_VRING_ADDR, code: 1 }),
        "{refused}"
    );
    assert_eq!(started, [1]);
    assert!(matches!(device.stop_ring(0).unwrap_err(), FrontendError::InvalidRing { index: 0, .. }));
    device.stop_ring(1).unwrap();
}

#[test]
fn stopped_rings_stay_stopped_when_the_wait_for_the_next_is_interrupted() {
    let (go, gone) = channel();
    let (asked, is_asked) = channel();
    let backend = ScriptedBackend::start(ALL, move |message| {
        if (message.request, message.payload.first()) == (FrontendRequest::GET_VRING_BASE, Some(&1)) {
            let _ = asked.send(());
            gone.recv().unwrap();
        }
        ScriptedReply::Default
    });
    let mut device = ready(&backend, UserOptions::default());
    let rings: Vec<_> = (0..3).map(|index| (index, setup())).collect();
    device.start_rings(&rings, &mut || {}, &mut |_| {}).unwrap();
    let interrupt = device.interrupt().unwrap();
    let mut stopped = Vec::new();
    std::thread::scope(|scope| {
        let interrupt = &interrupt;
        scope.spawn(move || {
            is_asked.recv().unwrap();
            interrupt.set();
        });
        let error = device.stop_rings(&[0, 1, 2], &mut || {}, &mut |index, _| stopped.push(index)).unwrap_err();
        assert!(matches!(error, FrontendError::Interrupted { request: FrontendRequest::GET_VRING_BASE }), "{error}");
    });
    assert_eq!(stopped, [0]);
    interrupt.clear();
    backend.take();
    go.send(()).unwrap();
    assert_eq!(device.reconnect(Instant::now() + Duration::from_secs(60)).unwrap(), Reconnection::default());
    let started = backend.take().into_iter().filter(|message| message.request == FrontendRequest::SET_VRING_KICK);
    assert_eq!(started.map(|message| message.payload[0]).collect::<Vec<_>>(), [1, 2]);
    assert!(matches!(device.stop_ring(0).unwrap_err(), FrontendError::InvalidRing { index: 0, .. }));
    go.send(()).unwrap();
    device.stop_rings(&[1, 2], &mut || {}, &mut |index, _| stopped.push(index)).unwrap();
    assert_eq!(stopped, [0, 1, 2]);
}

#[test]
fn each_ring_has_its_own_stop_timeout() {
    let backend = ScriptedBackend::start(ALL & !ProtocolFeatures::INFLIGHT_SHMFD, |message| {
        match (message.request, message.payload.first()) {
            (FrontendRequest::GET_VRING_BASE, Some(1)) => ScriptedReply::None,
            _ => ScriptedReply::Default,
        }
    });
    let options = UserOptions::default().with_stop_timeout(Duration::from_millis(30));
    let mut device = ready(&backend, options);
    device.start_rings(&two_rings(), &mut || {}, &mut |_| {}).unwrap();
    let mut stopped = Vec::new();
    let error = device.stop_rings(&[0, 1], &mut || {}, &mut |index, _| stopped.push(index)).unwrap_err();
    assert!(matches!(error, FrontendError::Timeout { request: FrontendRequest::GET_VRING_BASE, .. }), "{error}");
    assert_eq!(stopped, [0]);
}

#[test]
fn a_busy_back_end_is_told_apart_from_one_that_hangs() {
    let backend = ScriptedBackend::unscripted(ALL);
    let options = UserOptions::default().with_timeout(Duration::from_millis(30));
    let first = backend.connect().unwrap();
    let error = backend.connect_with(options).err().unwrap();
    assert!(matches!(error, FrontendError::NotServed { busy: true, .. }) && error.is_transient(), "{error}");
    let text = error.to_string();
    assert!(text.contains("serves another front-end") && !text.contains("hangs"), "{text}");
    drop(first);
    // No connection is served, for an unknown reason.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let error = UserDevice::connect(&path, options, Instant::now()).err().unwrap();
    assert!(matches!(error, FrontendError::NotServed { busy: false, .. }), "{error}");
    assert!(error.to_string().contains("before it is restarted"), "{error}");
    // A back-end that has read the request and does not reply.
    let reader = std::thread::spawn(move || {
        let mut stream = listener.incoming().nth(1).unwrap().unwrap();
        let mut bytes = [0; 24];
        stream.read_exact(&mut bytes).unwrap();
        stream
    });
    let longer = options.with_timeout(Duration::from_secs(5));
    let error = UserDevice::connect(&path, longer, Instant::now()).err().unwrap();
    assert!(matches!(error, FrontendError::Timeout { .. }), "{error}");
    drop(reader.join().unwrap());
}

#[test]
fn connect_waits_for_a_full_listen_queue_until_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let filler = UnixStream::connect(&path).unwrap();
    let connect = |wait| UserDevice::connect(&path, UserOptions::default(), Instant::now() + wait);
    let error = connect(Duration::from_millis(30)).err().unwrap();
    assert!(error.to_string().contains("queue of connections is full"), "{error}");
    std::thread::scope(|scope| {
        let connected = scope.spawn(|| connect(Duration::from_secs(60)).map(drop));
        drop((listener.accept().unwrap(), filler));
        let mut script: Script = Box::new(|_| ScriptedReply::Default);
        serve(listener.accept().unwrap().0, ALL, &Mutex::default(), &mut script);
        connected.join().unwrap().unwrap();
    });
}

#[test]
fn unexpected_fds_in_a_reply_are_closed() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut writer = Some(OwnedFd::from(writer));
    let backend = ScriptedBackend::start(ALL, move |message| match (message.request, writer.take()) {
        (FrontendRequest::GET_STATUS, Some(fd)) => {
            let second = fd.try_clone().unwrap();
            ScriptedReply::Raw(reply(FrontendRequest::GET_STATUS, 0u64.as_bytes()), vec![fd, second])
        }
        (_, fd) => {
            writer = fd;
            ScriptedReply::Default
        }
    });
    let mut device = backend.connect().unwrap();
    device.status().unwrap();
    let mut end = Vec::new();
    assert_eq!(reader.read_to_end(&mut end).unwrap(), 0, "the pipe ends when its last writer is closed");
}

#[test]
fn a_get_config_reply_with_another_offset_or_size_is_an_error() {
    type Change = fn(&[u8]) -> Vec<u8>;
    let answers: [Change; 4] = [
        |_| vec![],
        |payload| payload[..payload.len() - 1].to_vec(),
        |payload| [&[1], &payload[1..]].concat(),
        |payload| [&payload[..4], &[0; 4], &payload[8..]].concat(),
    ];
    for answer in answers {
        let backend = ScriptedBackend::reacting_to(FrontendRequest::GET_CONFIG, move |message| {
            ScriptedReply::of(message.request, &answer(&message.payload))
        });
        assert!(backend.connect().unwrap().config(8, &mut [0; 8]).is_err());
    }
    let backend = ScriptedBackend::reacting_to(FrontendRequest::GET_CONFIG, |message| {
        let payload = [&message.payload[..12], b"01234567"].concat();
        ScriptedReply::of(message.request, &payload)
    });
    let (mut device, mut buf) = (backend.connect().unwrap(), [0; 8]);
    device.config(8, &mut buf).unwrap();
    assert_eq!(&buf, b"01234567");
    assert!(device.config(0, &mut [0; 257]).is_err());
}

/// Rules C1.1 and C1.2.
#[test]
fn set_config_and_restore_config_send_their_flags_and_report_refusals() {
    type Write = fn(&mut UserDevice, u32, &[u8]) -> Result<(), FrontendError>;
    for (flags, write) in [(0u32, UserDevice::set_config as Write), (1, UserDevice::restore_config)] {
        let backend = ScriptedBackend::start(ALL, |message| match message.request {
            // The only field is at offset 8.
            FrontendRequest::SET_CONFIG if message.payload[..4] != 8u32.to_ne_bytes() => {
                ScriptedReply::of(message.request, 1u64.as_bytes())
            }
            _ => ScriptedReply::Default,
        });
        let mut device = backend.connect().unwrap();
        backend.take();
        write(&mut device, 8, b"bytes").unwrap();
        let received = backend.take();
        let payload = [[8, 5, flags].as_bytes(), b"bytes"].concat();
        let need_reply = 1 | Header::FLAG_NEED_REPLY;
        assert_eq!(received, [Message { request: FrontendRequest::SET_CONFIG, flags: need_reply, payload }]);
        let error = write(&mut device, 9, b"bytes").unwrap_err();
        assert!(matches!(error, FrontendError::Refused { request: FrontendRequest::SET_CONFIG, code: 1 }), "{error}");
        assert_eq!(backend.requests(), ["SET_CONFIG"]);
        for bytes in [&[0; 257][..], &[]] {
            let error = write(&mut device, 8, bytes).unwrap_err();
            assert!(matches!(error, FrontendError::NotOffered { .. }), "{error}");
        }
        assert_eq!(backend.requests(), [""; 0], "what can't be right is not sent");
        assert_eq!(device.status().unwrap(), Some(7), "the connection goes on");

        let backend = ScriptedBackend::unscripted(ALL & !ProtocolFeatures::CONFIG);
        let error = write(&mut backend.connect().unwrap(), 8, b"bytes").unwrap_err();
        assert!(matches!(error, FrontendError::NotOffered { .. }), "{error}");
    }
}

#[test]
fn an_invalid_inflight_region_is_refused() {
    let needed = inflight::split_queue_bytes(8) * 2;
    // Size, offset, queues, entries, bytes in the file, fds.
    let bad = [
        (needed - 64, 0, 2, 8, needed, 1),
        (needed, 0, 2, 8, needed - 1, 1),
        (needed, 64, 2, 8, needed, 1),
        (needed, u64::MAX, 2, 8, needed, 1),
        (u64::MAX, 0, 2, 8, needed, 1),
        (needed, 0, 1, 8, needed, 1),
        (needed, 0, 2, 16, needed, 1),
        (needed, 0, 2, 8, needed, 0),
        (needed, 0, 2, 8, needed, 2),
    ];
    for case @ (size, offset, queues, entries, bytes, fds) in bad {
        let backend = ScriptedBackend::reacting_to(FrontendRequest::GET_INFLIGHT_FD, move |message| {
            let numbers = [queues, entries, 0, 0u16];
            let payload = [[size, offset].as_bytes(), numbers.as_bytes()].concat();
            let fds = (0..fds).map(|_| sealed_memfd("bad", bytes).unwrap()).collect();
            ScriptedReply::Raw(reply(message.request, &payload), fds)
        });
        let error = backend.connect().unwrap().set_inflight(2, 8, None).unwrap_err();
        assert!(matches!(error, FrontendError::ProtocolViolation { rule: "I1.2", .. }), "{error} for {case:?}");
    }
}

/// Rules L15.4 and R6.1.
#[rstest]
fn reconnect_restores_the_device_in_the_order_of_qemu(#[values(VirtioFeatures::empty(), PACKED)] kind: VirtioFeatures) {
    let backend = ScriptedBackend::reacting_to(FrontendRequest::SEND_RARP, |_| ScriptedReply::HangUp(vec![]));
    let mut device = backend.connect().unwrap();
    device.set_features(VERSION_1 | kind).unwrap();
    assert!(device.set_inflight(1, 8, None).unwrap());
    let memory = memory(1);
    device.set_memory(&memory).unwrap();
    let setup = RingSetup { base: if kind == PACKED { RingBase::PACKED_START } else { RingBase::split(7) }, ..setup() };
    device.start_ring(0, setup.clone()).unwrap();
    let (log, fd) = log();
    device.start_logging(&log, fd.as_fd()).unwrap();
    let started = backend.take();
    let inflight = started.iter().find(|message| message.request == FrontendRequest::SET_INFLIGHT_FD).unwrap();
    // The guest has seen 0x1234 completions; the failed back-end has marked three requests.
    memory.write(GuestAddress(0x3002), &0x1234u16.to_le_bytes()).unwrap();
    let mut state = device.inflight_state().unwrap().unwrap();
    for entry in [0, 3, 7] {
        state.contents[if kind == PACKED { 32 + 32 * entry } else { 16 + 16 * entry }] = 1;
    }
    assert!(device.set_inflight(1, 8, Some(&state)).unwrap());
    assert_eq!(device.inflight_state().unwrap().unwrap(), state);
    backend.take();
    let found = device.reconnect(Instant::now()).unwrap();
    assert_eq!((found.resubmitted, found.attempts), (3, 1));
    let received = backend.take();
    let names: Vec<_> = received.iter().map(|message| message.request.to_string()).collect();
    let greeting = [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "GET_MAX_MEM_SLOTS",
        "GET_FEATURES",
    ];
    let rest = [
        "SET_FEATURES",
        "SET_INFLIGHT_FD",
        "SET_MEM_TABLE",
        "SET_VRING_CALL",
        "SET_VRING_NUM",
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_KICK",
        "SET_LOG_BASE",
        "SET_VRING_ENABLE",
    ];
    let rest_heard: Vec<_> = names.iter().map(String::as_str).skip_while(|name| *name != "SET_FEATURES").collect();
    assert!(names.iter().zip(greeting).take(6).all(|(name, expected)| name == expected), "{names:?}");
    assert_eq!(rest_heard, rest);
    let payload = |request| &received.iter().find(|message| message.request == request).unwrap().payload;
    assert_eq!(
        payload(FrontendRequest::SET_FEATURES),
        (LOG_ALL | PROTOCOL | VERSION_1 | kind).as_bytes(),
        "LOG_ALL (rule L8.1)"
    );
    assert_eq!(payload(FrontendRequest::SET_INFLIGHT_FD), &inflight.payload, "the region is kept");
    // The used index (rule I3.4); the position of a packed ring is only in the region (rule I4.5).
    let base = if kind == PACKED { 0x8000_8000u32 } else { 0x1234 };
    assert_eq!(payload(FrontendRequest::SET_VRING_BASE)[4..], base.to_ne_bytes());
    assert_eq!(payload(FrontendRequest::SET_VRING_ADDR)[4..8], 1u32.to_ne_bytes(), "VHOST_VRING_F_LOG");
    assert!(log.is_marked(GuestAddress(0x3000)), "the old back-end may have died before it logged the used ring");
    assert_eq!(log.is_marked(GuestAddress(0x1000)), kind == PACKED, "a device writes the descriptors of packed rings");
    for fd in [&setup.kick, &setup.call] {
        let mut count = [0; 8];
        assert_eq!(File::from(fd.try_clone().unwrap()).read(&mut count).unwrap(), 8, "nobody waits for ever");
    }
}

#[test]
fn reconnect_fails_with_outstanding_requests_and_no_inflight_region() {
    let backend = ScriptedBackend::unscripted(ALL & !ProtocolFeatures::INFLIGHT_SHMFD);
    let mut device = backend.connect().unwrap();
    device.set_features(VERSION_1).unwrap();
    assert!(!device.set_inflight(1, 8, None).unwrap());
    let memory = memory(1);
    device.set_memory(&memory).unwrap();
    device.start_ring(0, setup()).unwrap();
    device.reconnect(Instant::now()).unwrap();
    memory.write(GuestAddress(0x2002), &2u16.to_le_bytes()).unwrap();
    let error = device.reconnect(Instant::now()).unwrap_err();
    assert!(matches!(error, FrontendError::Unrecoverable { index: 0, outstanding: 2 }), "{error}");
}

#[test]
fn reconnect_refuses_a_back_end_with_fewer_features() {
    let (listens, started) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(ALL)));
    let path = listens.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let protocol = started.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut script: Script = Box::new(|_| ScriptedReply::Default);
            let now = *protocol.lock().unwrap();
            serve(stream.unwrap(), now, &Mutex::default(), &mut script);
        }
    });
    let mut device = UserDevice::connect(&path, UserOptions::default(), Instant::now()).unwrap();
    *started.lock().unwrap() = ALL & !ProtocolFeatures::LOG_SHMFD;
    let error = device.reconnect(Instant::now()).unwrap_err();
    assert!(error.to_string().contains("LOG_SHMFD"), "{error}");
    *started.lock().unwrap() = ALL;
    device.reconnect(Instant::now()).unwrap();
}

#[test]
fn reconnect_does_not_install_a_log_that_ended_the_connection() {
    let mut crashes = 1;
    let backend = ScriptedBackend::start(ALL, move |message| match message.request {
        FrontendRequest::SET_LOG_BASE if crashes > 0 => {
            crashes -= 1;
            ScriptedReply::HangUp(vec![])
        }
        _ => ScriptedReply::Default,
    });
    let mut device = running(&backend, UserOptions::default());
    let (log, fd) = log();
    assert!(device.start_logging(&log, fd.as_fd()).unwrap_err().is_hang_up());
    backend.take();
    device.reconnect(Instant::now()).unwrap();
    assert!(!backend.requests().contains(&"SET_LOG_BASE".into()) && device.log().is_none());
    backend.take();
    device.start_logging(&log, fd.as_fd()).unwrap();
    assert!(backend.requests().contains(&"SET_LOG_BASE".into()) && device.log().is_some());
}

/// Rule M1.2.
#[test]
fn more_than_8_regions_are_sent_as_memory_slot_changes() {
    let backend = ScriptedBackend::unscripted(ALL);
    let mut device = backend.connect().unwrap();
    backend.take();
    let many = memory(12);
    device.set_memory(&many).unwrap();
    assert_eq!(backend.requests(), ["ADD_MEM_REG"; 12]);
    let fewer = Memory::new(many.regions().iter().skip(2).cloned()).unwrap();
    device.set_memory(&fewer).unwrap();
    assert_eq!(backend.requests(), ["REM_MEM_REG"; 2]);
    device.set_memory(&memory(8)).unwrap();
    assert_eq!(backend.requests(), ["SET_MEM_TABLE"]);
    assert_eq!(device.max_mem_slots(), 32);
    assert!(matches!(device.set_memory(&memory(33)).unwrap_err(), FrontendError::NotOffered { .. }));
}

/// Rule M1.1.
#[test]
fn invalid_memory_and_rings_are_refused_before_anything_is_sent() {
    let backend = ScriptedBackend::unscripted(ALL);
    let mut device = running(&backend, UserOptions::default());
    backend.take();
    let fd = sealed_memfd("guest", 0x1000).unwrap();
    let private =
        Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x1000, UserAddress(0), 0).unwrap())]).unwrap();
    assert!(matches!(device.set_memory(&private).unwrap_err(), FrontendError::NotShared { gpa: GuestAddress(0) }));
    assert!(matches!(device.start_ring(4, setup()).unwrap_err(), FrontendError::InvalidRing { index: 4, .. }));
    assert!(matches!(device.start_ring(0, setup()).unwrap_err(), FrontendError::InvalidRing { index: 0, .. }));
    let uneven = RingSetup { size: 6, ..setup() };
    assert!(matches!(device.start_ring(1, uneven).unwrap_err(), FrontendError::InvalidRing { index: 1, .. }));
    assert!(matches!(device.stop_ring(1).unwrap_err(), FrontendError::InvalidRing { index: 1, .. }));
    let outside = RingSetup { used: GuestAddress(0xfff0), ..setup() };
    assert!(matches!(device.start_ring(1, outside).unwrap_err(), FrontendError::Memory(_)));
    assert_eq!(backend.requests(), [""; 0]);
    device.stop_ring(0).unwrap();
}

#[test]
fn connect_waits_for_a_starting_back_end_until_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let none = UserDevice::connect(&path, UserOptions::default(), Instant::now() + Duration::from_millis(5));
    let error = none.err().unwrap();
    assert!(error.to_string().contains("check that it is running"), "{error}");
    let late = path.clone();
    let starter = std::thread::spawn(move || {
        let listener = UnixListener::bind(late).unwrap();
        // The first connection is closed at once, as by a back-end that fails at its start.
        drop(listener.accept().unwrap());
        let mut script: Script = Box::new(|_| ScriptedReply::Default);
        serve(listener.accept().unwrap().0, ALL, &Mutex::default(), &mut script);
    });
    let device = UserDevice::connect(&path, UserOptions::default(), Instant::now() + Duration::from_secs(60)).unwrap();
    assert_eq!(device.queues(), 4);
    drop(device);
    starter.join().unwrap();
    let error = UserDevice::connect(&path, UserOptions::default(), Instant::now()).err().unwrap();
    assert!(error.to_string().contains("stale socket"), "{error}");
    let long = folder.path().join("x".repeat(108));
    let error = UserDevice::connect(long, UserOptions::default(), Instant::now()).err().unwrap();
    assert!(error.to_string().contains("107 bytes"), "{error}");
}

/// A device whose back-end replies to SET_DEVICE_STATE_FD with `code` and `fds`, and to CHECK_DEVICE_STATE with
/// `check`.
fn with_state(code: u64, mut fds: Vec<OwnedFd>, check: impl Fn() -> ScriptedReply + Send + 'static) -> UserDevice {
    let backend = ScriptedBackend::start(ALL | ProtocolFeatures::DEVICE_STATE, move |message| match message.request {
        FrontendRequest::SET_DEVICE_STATE_FD => {
            ScriptedReply::Raw(reply(message.request, code.as_bytes()), std::mem::take(&mut fds))
        }
        FrontendRequest::CHECK_DEVICE_STATE => check(),
        _ => ScriptedReply::Default,
    });
    backend.connect_with(UserOptions::default().with_stop_timeout(Duration::from_millis(200))).unwrap()
}

fn checked(code: u64) -> impl Fn() -> ScriptedReply {
    move || ScriptedReply::of(FrontendRequest::CHECK_DEVICE_STATE, code.as_bytes())
}

#[test]
fn the_fd_in_the_set_device_state_fd_reply_is_used() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"state").unwrap();
    drop(writer);
    let saved = with_state(0, vec![reader.into()], checked(0)).save_state().unwrap();
    assert_eq!(saved.as_deref(), Some(&b"state"[..]));
    let (mut reader, writer) = std::io::pipe().unwrap();
    with_state(0, vec![writer.into()], checked(0)).load_state(b"other").unwrap();
    let mut found = Vec::new();
    reader.read_to_end(&mut found).unwrap();
    assert_eq!(found, b"other");
}

#[test]
fn a_failed_device_state_transfer_is_an_error() {
    use std::io::ErrorKind::{FileTooLarge, TimedOut};
    let failed = |error: FrontendError, kind| match error {
        FrontendError::DeviceState { source, .. } => assert_eq!(source.kind(), kind),
        other => panic!("{other}"),
    };
    // A pipe that is never closed.
    let (reader, _open) = std::io::pipe().unwrap();
    failed(with_state(0, vec![reader.into()], checked(0)).save_state().unwrap_err(), TimedOut);
    // A state without end.
    let zeroes = File::open("/dev/zero").unwrap();
    failed(with_state(0, vec![zeroes.into()], checked(0)).save_state().unwrap_err(), FileTooLarge);
    // A pipe that is never read.
    let (_unread, writer) = std::io::pipe().unwrap();
    failed(with_state(0, vec![writer.into()], checked(0)).load_state(&vec![0; 1 << 20]).unwrap_err(), TimedOut);
    // A refusal at the start, and after the transfer.
    let mut device = with_state(0x101, vec![], checked(0));
    assert!(matches!(device.save_state(), Err(FrontendError::Refused { code: 0x101, .. })));
    assert_eq!(device.status().unwrap(), Some(7), "the connection goes on");
    let (reader, _) = std::io::pipe().unwrap();
    let error = with_state(0, vec![reader.into()], checked(5)).save_state().unwrap_err();
    assert!(matches!(error, FrontendError::Refused { code: 5, .. }), "{error}");
    let (_, writer) = std::io::pipe().unwrap();
    let error = with_state(0, vec![writer.into()], checked(5)).load_state(b"state").unwrap_err();
    assert!(matches!(error, FrontendError::Refused { code: 5, .. }), "{error}");
    // An announced fd that is missing.
    let error = with_state(0, vec![], checked(0)).save_state().unwrap_err();
    assert!(matches!(error, FrontendError::ProtocolViolation { rule: "D1.2", .. }), "{error}");
    // A connection closed during the transfer.
    let (reader, _) = std::io::pipe().unwrap();
    let error = with_state(0, vec![reader.into()], || ScriptedReply::HangUp(vec![])).save_state().unwrap_err();
    assert!(error.is_hang_up(), "{error}");
}

#[test]
fn a_postcopy_memory_table_reply_with_other_regions_is_a_protocol_violation() {
    for change in [0, 8, 16, 24] {
        let backend = ScriptedBackend::start(ALL | ProtocolFeatures::PAGEFAULT, move |message| match message.request {
            FrontendRequest::SET_MEM_TABLE if message.payload.len() == 8 => ScriptedReply::None,
            FrontendRequest::SET_MEM_TABLE => {
                let mut payload = message.payload.clone();
                // Guest-physical address, size, user address (which may differ), offset (which is ignored).
                payload[8 + change] ^= 1;
                ScriptedReply::of(message.request, &payload)
            }
            FrontendRequest::POSTCOPY_LISTEN | FrontendRequest::POSTCOPY_END => {
                ScriptedReply::of(message.request, 0u64.as_bytes())
            }
            FrontendRequest::POSTCOPY_ADVISE => ScriptedReply::of(message.request, &[]),
            _ => ScriptedReply::Default,
        });
        let protocol_features = UserOptions::default().protocol_features | ProtocolFeatures::PAGEFAULT;
        let mut device =
            backend.connect_with(UserOptions::default().with_protocol_features(protocol_features)).unwrap();
        assert!(matches!(device.postcopy_advise(), Err(FrontendError::NotOffered { .. })), "no fd came");
        device.postcopy_listen().unwrap();
        let (mut told, memory) = (None, memory(1));
        let done = device.postcopy_set_memory(&memory, |addresses| told = Some(addresses));
        if change < 16 {
            assert!(
                matches!(done, Err(FrontendError::ProtocolViolation { rule: "P1.4", .. })) && told.is_none(),
                "{done:?}"
            );
            continue;
        }
        done.unwrap();
        device.postcopy_end().unwrap();
        let messages = backend.take();
        let last = |request| messages.iter().rfind(|message| message.request == request).unwrap();
        let sent = last(FrontendRequest::SET_MEM_TABLE);
        assert_eq!((sent.flags, &sent.payload[..]), (1, 0u64.as_bytes()), "the acknowledgement");
        let need_reply =
            [FrontendRequest::POSTCOPY_LISTEN, FrontendRequest::POSTCOPY_END].map(|request| last(request).flags);
        assert_eq!(need_reply, [9, 9], "some answer only then");
        let (told, user) = (told.unwrap(), memory.regions()[0].user_addr().0 ^ u64::from(change == 16));
        let (gpa, address) = (GuestAddress(5), FaultAddress(user + 5));
        assert_eq!((told.gpa(address), told.address(gpa)), (Some(gpa), Some(address)));
        assert_eq!((told.gpa(FaultAddress(user + 0x10000)), told.address(GuestAddress(0x10000))), (None, None));
    }
}

#[test]
fn rarp_mtu_and_log_fd_are_sent_and_restored_by_reconnect() {
    let all = ALL | ProtocolFeatures::RARP | ProtocolFeatures::MTU | ProtocolFeatures::RESET_DEVICE;
    let backend = ScriptedBackend::unscripted(all);
    let mut device = ready(&backend, UserOptions::default());
    let ring = setup();
    device.start_ring(0, ring.clone()).unwrap();
    backend.take();
    device.send_rarp([2, 1, 2, 3, 4, 5]).unwrap();
    device.set_mtu(9000).unwrap();
    let signal = EventFd::new().unwrap();
    device.set_log_fd(Some(signal.as_fd())).unwrap();
    let received: Vec<_> = backend.take().into_iter().map(|message| (message.request, message.payload)).collect();
    let numbers = |number: u64| number.as_bytes().to_vec();
    let expected = [
        (FrontendRequest::SEND_RARP, numbers(0x0504_0302_0102)),
        (FrontendRequest::NET_SET_MTU, numbers(9000)),
        (FrontendRequest::SET_LOG_FD, vec![]),
    ];
    assert_eq!(received, expected);

    device.reset().unwrap();
    assert_eq!(backend.requests(), ["RESET_DEVICE"]);
    assert_eq!(device.acked_features(), VirtioFeatures::empty());
    device.set_features(VERSION_1).unwrap();
    device.start_ring(0, ring).unwrap();
    backend.take();
    device.reconnect(Instant::now() + Duration::from_secs(60)).unwrap();
    let received = backend.requests();
    let count = |name: &str| received.iter().filter(|request| *request == name).count();
    assert_eq!((count("NET_SET_MTU"), count("SET_LOG_FD"), count("SEND_RARP")), (1, 1, 0), "{received:?}");
}

#[test]
fn rarp_and_mtu_need_their_features_and_reset_falls_back_to_set_status() {
    let backend = ScriptedBackend::unscripted(ALL);
    let mut device = backend.connect().unwrap();
    backend.take();
    assert!(matches!(device.send_rarp([2; 6]), Err(FrontendError::NotOffered { .. })));
    assert!(matches!(device.set_mtu(1500), Err(FrontendError::NotOffered { .. })));
    device.reset().unwrap();
    assert_eq!(backend.requests(), ["SET_STATUS"]);
    let backend = ScriptedBackend::unscripted(ProtocolFeatures::REPLY_ACK);
    assert!(matches!(backend.connect().unwrap().reset(), Err(FrontendError::NotOffered { .. })));
}
