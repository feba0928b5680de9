//! Each control message is logged as exactly one event with its name: in the session of a back-end, in the vhost-user
//! client, and on the back-end channel.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/served.rs"]
mod served;

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry;
use vhost_migrate::abi::vhost_user::{BackendRequest, FrontendRequest as Code, Header};
use vhost_migrate::abi::virtio::{VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::backend::{BackendError, FrontendHandle, Queue, RING_FEATURES, Request, SyncQueue, VirtioDevice};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device as _, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{GuestAddress, Iova, Memory, Region};
use vhost_migrate::ring::RingBase;
use vhost_migrate::unstable::backend::{Logging, Notifier, Session, VhostUserMessage, VringConfig, VringController};

use served::Served;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const SESSION: &str = "vhost_migrate::backend::session";
const CLIENT: &str = "vhost_migrate::frontend::user::connection";
const CHANNEL: &str = "vhost_migrate::frontend::user::backend_channel";

/// A layer that records the texts of all debug events, each with its module.
#[derive(Clone, Default)]
struct RecordedEvents(Arc<Mutex<Vec<(String, String)>>>);

impl RecordedEvents {
    /// The text before the colon in each event of a module, in their order.
    fn names(&self, module: &str) -> Vec<String> {
        let all = self.0.lock().unwrap();
        let of_module = all.iter().filter(|(target, _)| target == module);
        of_module.map(|(_, words)| words.split(':').next().unwrap().to_owned()).collect()
    }
}

impl<S: Subscriber> Layer<S> for RecordedEvents {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Words(String);
        impl Visit for Words {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        if *event.metadata().level() == Level::DEBUG {
            let mut words = Words(String::new());
            event.record(&mut words);
            self.0.lock().unwrap().push((event.metadata().target().to_owned(), words.0));
        }
    }
}

/// A device with one ring. It completes every request unchanged, and gives the test its front-end handle.
#[derive(Default)]
struct EchoDevice(Mutex<Arc<FrontendHandle>>);

impl VirtioDevice for EchoDevice {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES
    }

    fn config(&self) -> Vec<u8> {
        vec![0; 8]
    }

    fn connected(&self, host: Arc<FrontendHandle>) {
        *self.0.lock().unwrap() = host;
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(SyncQueue::new(|_: &mut Request| {})))
    }
}

/// Rings without workers.
struct NoRings;

impl VringController for NoRings {
    fn start(&mut self, _index: u16, _setup: VringConfig) -> Result<(), BackendError> {
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

#[test]
fn every_session_message_is_one_event_with_its_name_even_if_refused_or_unknown() {
    let heard = RecordedEvents::default();
    let codes: Vec<_> = (0..=64).chain([4711, u32::MAX]).map(Code).collect();
    tracing::subscriber::with_default(registry().with(heard.clone()), || {
        let mut session = Session::new(Arc::new(EchoDevice::default()));
        for &code in &codes {
            // Most messages are refused without a payload.
            let message = VhostUserMessage { code, flags: Header::FLAG_VERSION, payload: vec![], fds: vec![] };
            let _ = session.handle_message(message, &mut NoRings);
        }
    });
    let expected: Vec<_> = codes.iter().map(Code::to_string).collect();
    assert_eq!(heard.names(SESSION), expected);
    assert!(expected.contains(&"SET_MEM_TABLE".into()) && expected.contains(&"request 4711".into()), "{expected:?}");
}

#[test]
fn each_message_is_one_event_on_each_side_of_either_channel() {
    let heard = RecordedEvents::default();
    // The back-end and the channel have threads of their own.
    tracing::subscriber::set_global_default(registry().with(heard.clone())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let plain = Arc::new(EchoDevice::default());
    let served = Served::new(&path, plain.clone());

    let mut device = UserDevice::connect(&path, UserOptions::default(), Instant::now() + PATIENCE).unwrap();
    device.set_features(VIRTIO_F_VERSION_1).unwrap();
    device.set_inflight(1, 8, None).unwrap();
    let region = Region::create(GuestAddress(0), MIB).unwrap();
    device.set_memory(&Memory::new([Arc::new(region)]).unwrap()).unwrap();
    let eventfd = || Arc::new(OwnedFd::from(EventFd::new().unwrap()));
    let (kick, call, base) = (eventfd(), eventfd(), RingBase::split(0));
    let [desc, avail, used] = [0x1000, 0x2000, 0x3000].map(GuestAddress);
    let ring = RingSetup { size: 8, desc, avail, used, kick, call, error: None, base };
    device.start_ring(0, ring).unwrap();
    let (log, fd) = Log::create(GuestAddress(MIB)).unwrap();
    device.start_logging(&Arc::new(log), fd.as_fd()).unwrap();
    device.stop_logging().unwrap();
    device.config(0, &mut [0; 8]).unwrap();
    assert!(device.set_config(0, &[0; 8]).is_err(), "a refused one is an event too");
    device.set_status(4).unwrap();
    device.stop_ring(0).unwrap();
    device.reset().unwrap();
    let unknown = BackendRequest(4711);
    let host = plain.0.lock().unwrap().clone();
    assert_eq!(host.send_with_reply(unknown, &[0u8; 8]).unwrap().unwrap().recv_timeout(PATIENCE), Ok(1));
    drop((device, served));

    let sent = heard.names(CLIENT);
    assert_eq!(heard.names(SESSION), sent, "each has come once, in its order");
    assert!(sent.len() > 25, "{sent:?}");
    let known = |name: &String| (1..=64).any(|number| Code(number).name() == Some(name.as_str()));
    assert!(sent.iter().all(known), "names, no numbers: {sent:?}");
    assert_eq!(heard.names(CHANNEL), [unknown.to_string()]);
}
