//! The back-end channel: what a back-end says without having been asked, kicks where they are messages (rule B3.2), and the
//! translations that it asks for (rule T1.3).
//!
//! A thread per connection polls_channel it, so that a call reaches its driver whatever the device's owner does meanwhile. It
//! answers what wants an answer, and keeps the rest as events, each once: a back-end that floods the channel fills
//! nothing.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};
use tracing::debug;
use zerocopy::{FromBytes, IntoBytes};

use super::super::{DeviceEvent, FrontendError, RingSetup, counters};
use super::connection::ConnectionSocket;
use super::iommu::{MissResult, Translator};
use super::signal;
use crate::abi::vhost::{VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_MISS};
use crate::abi::vhost_user::{BackendRequest, Header, IotlbMsg, Request, VRING_IDX_MASK, VringArea, VringState};
use crate::memory::Access;
use crate::sys::log_limit::limited;
use crate::sys::{join::join, nonblocking, socket};

/// Longest message, bytes: more than any has.
const MAX_PAYLOAD: usize = 4096;
/// Most events that are kept before those that a back-end can make any number of are dropped. There are few others: one
/// per ring and kind.
const MAX_EVENTS: usize = 1024;
/// Most translations that wait for room on the connection; with so many of them nothing more is heard.
const MAX_DEFERRED_MISSES: usize = 1024;

/// What was told and not yet taken; it outlives connections.
pub(super) struct EventQueue {
    pending: Mutex<BTreeSet<DeviceEvent>>,
    /// Readable while there is something.
    ready: EventFd,
}

/// A channel in use; it ends when this is dropped.
pub(super) struct BackendChannel {
    shared: Arc<ChannelState>,
    thread: Option<JoinHandle<()>>,
}

struct ChannelState {
    socket: UnixStream,
    /// Tells the thread that rings have changed, or that it is over.
    wake: EventFd,
    rings: Mutex<BTreeMap<u16, ChannelRing>>,
    closed: AtomicBool,
    events: Arc<EventQueue>,
    translator: Arc<Translator>,
    /// Where translations are sent, and kicks if they are messages.
    connection: Arc<ConnectionSocket>,
    in_band_kicks: bool,
}

/// A ring whose calls are heard.
#[derive(Clone)]
struct ChannelRing {
    setup: RingSetup,
    /// Its kicks are passed on too.
    forwards_kicks: bool,
}

/// What one thread has heard, and has yet to do.
#[derive(Default)]
struct ReadState {
    /// The beginning of a message.
    partial: Vec<u8>,
    /// Questions that have been answered and whose translations are yet to be sent: address and permission. They are
    /// looked up when there is room, as their answer may have changed until then.
    deferred: BTreeSet<(u64, u8)>,
    /// Acknowledgements that the channel has no room for. Nothing more is heard before they are sent: a back-end may ask
    /// faster than it reads, and one that reads nothing is not answered.
    acks: Vec<u8>,
}

impl EventQueue {
    pub(super) fn new() -> Result<EventQueue, FrontendError> {
        Ok(EventQueue { pending: Mutex::default(), ready: eventfd()? })
    }

    /// Takes all there are.
    pub(super) fn take(&self) -> Vec<DeviceEvent> {
        let mut pending = lock(&self.pending);
        let _ = self.ready.read();
        std::mem::take(&mut *pending).into_iter().collect()
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    fn add(&self, event: DeviceEvent) {
        let mut pending = lock(&self.pending);
        let any_number = matches!(event, DeviceEvent::AccessFailed(_) | DeviceEvent::RequestRefused(_));
        if (!any_number || pending.len() < MAX_EVENTS) && pending.insert(event) {
            let _ = self.ready.write(1);
        }
    }
}

impl BackendChannel {
    /// A channel, and the socket that the back-end must get. Translations go over `connection`, and kicks if they are messages.
    pub(super) fn open(
        events: Arc<EventQueue>,
        translator: Arc<Translator>,
        connection: Arc<ConnectionSocket>,
        in_band_kicks: bool,
    ) -> Result<(BackendChannel, OwnedFd), FrontendError> {
        let (socket, theirs) = UnixStream::pair().map_err(FrontendError::system("make a back-end channel"))?;
        let (rings, closed) = (Mutex::default(), AtomicBool::new(false));
        let wake = eventfd()?;
        let shared =
            Arc::new(ChannelState { socket, wake, rings, closed, events, translator, connection, in_band_kicks });
        let reader = shared.clone();
        let thread = std::thread::Builder::new().name("back-end channel".into()).spawn(move || reader.run());
        let thread = Some(thread.map_err(FrontendError::system("start a thread"))?);
        Ok((BackendChannel { shared, thread }, theirs.into()))
    }

    /// A ring is about to be enabled, and may call from then on. Its kicks are not passed on yet.
    pub(super) fn add_ring(&self, index: u16, ring: &RingSetup) {
        lock(&self.shared.rings).insert(index, ChannelRing { setup: ring.clone(), forwards_kicks: false });
    }

    /// Whether a ring's kicks are passed on. Once that is forbidden none is sent any more, so that none overtakes what
    /// stops the ring and starts it again (rules B3.5, B3.6); they are kept for whoever starts it next.
    pub(super) fn set_kick_forwarding(&self, index: u16, kicks: bool) {
        lock(&self.shared.rings).entry(index).and_modify(|ring| ring.forwards_kicks = kicks);
        self.wake_for_kicks();
    }

    /// The thread waits for kicks of other rings from now on, if it waits for any.
    fn wake_for_kicks(&self) {
        if self.shared.in_band_kicks {
            let _ = self.shared.wake.write(1);
        }
    }

    /// Translations may find what they waited for.
    pub(super) fn wake(&self) {
        let _ = self.shared.wake.write(1);
    }

    /// It has been stopped. Its last call may not have been heard yet, and nobody is there for it any more.
    pub(super) fn remove_ring(&self, index: u16) {
        let removed = lock(&self.shared.rings).remove(&index).filter(|_| self.shared.in_band_kicks);
        removed.iter().for_each(|ring| signal(&ring.setup.call));
        self.wake_for_kicks();
    }
}

impl Drop for BackendChannel {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            join(thread);
        }
    }
}

impl ChannelState {
    fn run(&self) {
        let (mut read, mut channel, mut full) = (ReadState::default(), true, false);
        while !self.closed.load(Ordering::Acquire) {
            let kicks = self.in_band_kicks && !full;
            let rings = kicks.then(|| lock(&self.rings).clone()).into_iter().flatten();
            let rings: Vec<_> =
                rings.filter(|(_, ring)| ring.forwards_kicks).map(|(index, ring)| (index, ring.setup.kick)).collect();
            let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            fds.extend(rings.iter().map(|(_, kick)| PollFd::new(kick.as_fd(), PollFlags::POLLIN)));
            let fixed = fds.len();
            let acks = !read.acks.is_empty();
            let polls_channel = channel && (acks || read.deferred.len() < MAX_DEFERRED_MISSES);
            if polls_channel {
                let flags = if acks { PollFlags::POLLOUT } else { PollFlags::POLLIN };
                fds.push(PollFd::new(self.socket.as_fd(), flags));
            }
            if full || !read.deferred.is_empty() && !self.translator.is_paused() {
                fds.push(PollFd::new(self.connection.fd(), PollFlags::POLLOUT));
            }
            if poll(&mut fds, PollTimeout::NONE).is_err_and(|errno| errno != Errno::EINTR) {
                return;
            }
            let kicked: Vec<bool> = fds.iter().take(fixed).skip(1).map(|fd| fd.any() == Some(true)).collect();
            let is_ready = |at| fds.get(at).is_some_and(|fd: &PollFd<'_>| fd.any() == Some(true));
            let (is_channel_ready, room) =
                (polls_channel && is_ready(fixed), is_ready(fixed + usize::from(polls_channel)));
            drop(fds);
            let _ = self.wake.read();
            full = false;
            for ((index, kick), _) in rings.iter().zip(kicked).filter(|(_, kicked)| *kicked) {
                full |= !self.forward_kick(*index, kick);
            }
            while room && let Some((iova, access)) = read.deferred.pop_first() {
                // It was acknowledged: nobody else says that it has gone.
                match self.answer_miss(iova, access, true, &mut read.deferred) {
                    MissResult::Deferred => break,
                    MissResult::NotMapped => self.events.add(DeviceEvent::AccessFailed(iova)),
                    MissResult::SentRestricted | MissResult::Sent => {}
                }
            }
            if is_channel_ready {
                let taken = if acks { self.send_acks(&mut read.acks) } else { self.receive(&mut read) };
                channel = taken.map(|()| true).unwrap_or_else(|why| {
                    if let Some(why) = why {
                        limited!(warn, "the back-end channel is closed: {why} (rule B1.1)");
                        self.events.add(DeviceEvent::ChannelBroken(why));
                    }
                    let _ = self.socket.shutdown(Shutdown::Both);
                    false
                });
            }
        }
    }

    /// Takes what has come. An error ends the channel; one without words is a back-end that has hung up.
    fn receive(&self, read: &mut ReadState) -> Result<(), Option<&'static str>> {
        let mut buffer = [0; MAX_PAYLOAD];
        // Nothing that is heard here comes with an fd of use.
        match socket::receive(self.socket.as_fd(), &mut buffer, &mut Vec::new(), 0) {
            Ok(0) => return Err(None),
            Ok(count) => read.partial.extend(buffer.get(..count).unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => return Err(None),
        }
        while let Some((head, rest)) = read.partial.split_first_chunk::<{ size_of::<Header>() }>() {
            let header: Header = zerocopy::transmute!(*head);
            if header.flags & !Header::FLAG_NEED_REPLY != Header::FLAG_VERSION {
                return Err(Some("a message with wrong flags"));
            }
            let size = header.size as usize;
            if size > MAX_PAYLOAD {
                return Err(Some("a message that is too long"));
            }
            let Some((payload, rest)) = rest.split_at_checked(size) else { break };
            let done = self.handle(BackendRequest(header.request), payload, &mut read.deferred);
            if !done {
                counters::backend_request_refused();
            }
            let rest = rest.to_vec();
            if header.flags & Header::FLAG_NEED_REPLY != 0 {
                let header = Header { flags: Header::REPLY_FLAGS, size: size_of::<u64>() as u32, ..header };
                read.acks.extend([header.as_bytes(), u64::from(!done).as_bytes()].concat());
            }
            read.partial = rest;
        }
        self.send_acks(&mut read.acks)
    }

    /// Does what a message says; false if it is refused.
    fn handle(&self, code: BackendRequest, payload: &[u8], deferred: &mut BTreeSet<(u64, u8)>) -> bool {
        debug!("{code}: {} bytes", payload.len());
        let ring = || {
            let (state, _) = VringState::read_from_prefix(payload).ok()?;
            let index = u16::try_from(state.index).ok()?;
            lock(&self.rings).get(&index).map(|ring| (index, ring.setup.clone()))
        };
        match code {
            BackendRequest::CONFIG_CHANGE_MSG => self.events.add(DeviceEvent::ConfigChanged),
            BackendRequest::VRING_CALL => match ring() {
                Some((_, ring)) => signal(&ring.call),
                None => return false,
            },
            BackendRequest::VRING_ERR => match ring() {
                Some((index, ring)) => {
                    ring.error.iter().for_each(|error| signal(error));
                    self.events.add(DeviceEvent::RingBroken(index));
                }
                None => return false,
            },
            BackendRequest::VRING_HOST_NOTIFIER_MSG => {
                let area = VringArea::read_from_prefix(payload).map(|(area, _)| area.u64 & VRING_IDX_MASK);
                self.events.add(DeviceEvent::HostNotifierRefused(area.unwrap_or_default() as u16));
                return false;
            }
            BackendRequest::IOTLB_MSG if self.translator.is_set() => {
                let asked = IotlbMsg::read_from_prefix(payload).map(|(asked, _)| asked);
                let Ok(IotlbMsg { iova, perm, kind, .. }) = asked else { return false };
                match kind {
                    VHOST_IOTLB_MISS if self.answer_miss(iova, perm, false, deferred) != MissResult::NotMapped => {}
                    VHOST_IOTLB_MISS => {
                        self.events.add(DeviceEvent::AccessFailed(iova));
                        return false;
                    }
                    VHOST_IOTLB_ACCESS_FAIL => self.events.add(DeviceEvent::AccessFailed(iova)),
                    _ => return false,
                }
            }
            _ => {
                self.events.add(DeviceEvent::RequestRefused(code));
                return false;
            }
        }
        true
    }

    /// Passes a kick on; false if there is no room for it, and then it is still there.
    fn forward_kick(&self, index: u16, kick: &Arc<OwnedFd>) -> bool {
        // Held until it is sent: whoever forbids kicks waits for it.
        let rings = lock(&self.rings);
        let accepts = |ring: &ChannelRing| ring.forwards_kicks && Arc::ptr_eq(&ring.setup.kick, kick);
        // Taken before it is sent: one that comes in between is another one.
        if !rings.get(&index).is_some_and(accepts) || nonblocking::take(kick.as_fd()).is_err() {
            return true;
        }
        let state = VringState { index: index.into(), num: 0 };
        let header =
            Header { request: Request::VRING_KICK.0, flags: Header::FLAG_VERSION, size: size_of_val(&state) as u32 };
        let sent = self.connection.try_send(&[header.as_bytes(), state.as_bytes()].concat());
        if !sent {
            signal(kick);
        }
        sent
    }

    /// Answers a question by a translation, now or when there is room.
    fn answer_miss(
        &self,
        iova: u64,
        permission: u8,
        acknowledged: bool,
        deferred: &mut BTreeSet<(u64, u8)>,
    ) -> MissResult {
        let Some(access) = Access::from_permission(permission) else { return MissResult::NotMapped };
        let result = self.translator.send_update(iova, access, acknowledged, &self.connection);
        match result {
            MissResult::Deferred => drop(deferred.insert((iova, permission))),
            MissResult::SentRestricted => self.events.add(DeviceEvent::AccessFailed(iova)),
            MissResult::Sent | MissResult::NotMapped => {}
        }
        result
    }

    /// Sends of these acknowledgements what there is room for.
    fn send_acks(&self, acks: &mut Vec<u8>) -> Result<(), Option<&'static str>> {
        while !acks.is_empty() {
            match send(self.socket.as_raw_fd(), acks, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => drop(acks.drain(..sent)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => return Err(None),
            }
        }
        Ok(())
    }
}

fn eventfd() -> Result<EventFd, FrontendError> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    EventFd::from_flags(flags).map_err(FrontendError::system("make an eventfd"))
}

/// A thread that panicked while it held the lock has left what it guards whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
