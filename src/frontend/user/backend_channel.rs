//! Front-end side of the back-end channel, the socket passed with SET_BACKEND_REQ_FD.
//!
//! One thread per connection reads back-end requests. It replies to requests that need a reply (rule B1), forwards
//! in-band notifications to the driver (rule B3.2), answers translation misses (rule T1.3), and queues everything else
//! as a [`DeviceEvent`]. Equal events are queued once, and the queue is bounded, so a flooding back-end cannot exhaust
//! memory.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};
use tracing::debug;
use zerocopy::{FromBytes, IntoBytes};

use super::super::{DeviceEvent, FrontendError, RingSetup, counters};
use super::connection::ConnectionSocket;
use super::signal;
use super::translator::{MissResult, Translator};
use crate::abi::vhost::{VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_MISS};
use crate::abi::vhost_user::{
    BackendRequest, FrontendRequest, Header, IotlbMsg, VRING_IDX_MASK, VringArea, VringState,
};
use crate::memory::{Access, Iova};
use crate::sys::{join::join, nonblocking, socket};
use crate::sys::{lock, log_limit::limited};

/// Maximum payload of a message, bytes; larger than any defined message.
const MAX_PAYLOAD: usize = 4096;
/// Maximum number of queued events. Further events of kinds that a back-end can repeat without limit are dropped. The
/// other kinds have at most one event per ring.
const MAX_EVENTS: usize = 1024;
/// Maximum number of misses whose translations wait for room in the connection. The channel is not read while there are
/// so many.
const MAX_DEFERRED_MISSES: usize = 1024;

/// Events that the owner of the device has not taken yet. Shared by all connections of a device.
pub(super) struct EventQueue {
    pending: Mutex<BTreeSet<DeviceEvent>>,
    /// Readable while the queue is not empty.
    ready: EventFd,
}

/// An open back-end channel. Dropping it ends its thread.
pub(super) struct BackendChannel {
    shared: Arc<ChannelState>,
    thread: Option<JoinHandle<()>>,
}

struct ChannelState {
    socket: UnixStream,
    /// Wakes the thread after a change of the rings, or to end it.
    wake: EventFd,
    rings: Mutex<BTreeMap<u16, ChannelRing>>,
    closed: AtomicBool,
    events: Arc<EventQueue>,
    translator: Arc<Translator>,
    /// Socket for translations and in-band kicks.
    connection: Arc<ConnectionSocket>,
    in_band_kicks: bool,
}

/// A ring whose calls are forwarded.
#[derive(Clone)]
struct ChannelRing {
    setup: RingSetup,
    /// True if its kicks are forwarded as messages.
    forwards_kicks: bool,
}

/// State of the channel's thread between two polls.
#[derive(Default)]
struct ReadState {
    /// Beginning of an incomplete message.
    partial: Vec<u8>,
    /// Acknowledged misses, address and permission, whose translations are not sent yet. They are looked up again
    /// before they are sent, because the mapping may have changed.
    deferred: BTreeSet<(Iova, u8)>,
    /// Acknowledgements that did not fit into the socket. The channel is not read before they are sent, so a back-end
    /// that sends without reading is not served.
    acks: Vec<u8>,
}

impl EventQueue {
    pub(super) fn new() -> Result<EventQueue, FrontendError> {
        Ok(EventQueue { pending: Mutex::default(), ready: eventfd()? })
    }

    /// Takes all events.
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
    /// Opens a channel and returns the socket for the back-end. Translations and in-band kicks are sent over
    /// `connection`.
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

    /// Adds a ring that is about to be enabled. Its calls are forwarded from now on, its kicks are not.
    pub(super) fn add_ring(&self, index: u16, ring: &RingSetup) {
        lock(&self.shared.rings).insert(index, ChannelRing { setup: ring.clone(), forwards_kicks: false });
    }

    /// Starts or stops forwarding a ring's kicks as messages. After it has stopped, no kick is sent, so that none
    /// arrives after the message that stops the ring and starts it again (rules B3.5, B3.6). Unsent kicks stay in the
    /// eventfd.
    pub(super) fn set_kick_forwarding(&self, index: u16, kicks: bool) {
        lock(&self.shared.rings).entry(index).and_modify(|ring| ring.forwards_kicks = kicks);
        self.wake_for_kicks();
    }

    /// Makes the thread poll the current set of kick fds.
    fn wake_for_kicks(&self) {
        if self.shared.in_band_kicks {
            let _ = self.shared.wake.write(1);
        }
    }

    /// Makes the thread retry deferred translations.
    pub(super) fn wake(&self) {
        let _ = self.shared.wake.write(1);
    }

    /// Removes a stopped ring. Signals its call fd, because the last in-band call may not have been read.
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
                // The miss was acknowledged with success, so the failure is reported here.
                match self.answer_miss(iova, access, true, &mut read.deferred) {
                    MissResult::Deferred => break,
                    MissResult::NotMapped => self.events.add(DeviceEvent::AccessFailed(iova)),
                    MissResult::SentRestricted | MissResult::Sent => {}
                }
            }
            if is_channel_ready {
                let taken = if acks { self.send_acks(&mut read.acks) } else { self.receive(&mut read) };
                channel = taken.map(|()| true).unwrap_or_else(|reason| {
                    if let Some(reason) = reason {
                        limited!(warn, "the back-end channel is closed: {reason} (rule B1.1)");
                        self.events.add(DeviceEvent::ChannelBroken(reason));
                    }
                    let _ = self.socket.shutdown(Shutdown::Both);
                    false
                });
            }
        }
    }

    /// Reads and handles messages. An error closes the channel; `Err(None)` means that the back-end closed it.
    fn receive(&self, read: &mut ReadState) -> Result<(), Option<&'static str>> {
        let mut buffer = [0; MAX_PAYLOAD];
        // No supported back-end request carries an fd.
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

    /// Handles a message. Returns false if it is refused.
    fn handle(&self, code: BackendRequest, payload: &[u8], deferred: &mut BTreeSet<(Iova, u8)>) -> bool {
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
                let iova = Iova(iova);
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

    /// Sends a kick as a message. Returns false if the socket is full; the kick then stays in the eventfd.
    fn forward_kick(&self, index: u16, kick: &Arc<OwnedFd>) -> bool {
        // Held until the message is sent: `set_kick_forwarding` waits for it.
        let rings = lock(&self.rings);
        let accepts = |ring: &ChannelRing| ring.forwards_kicks && Arc::ptr_eq(&ring.setup.kick, kick);
        // Read before the message is sent: a kick in between must be sent too.
        if !rings.get(&index).is_some_and(accepts) || nonblocking::take(kick.as_fd()).is_err() {
            return true;
        }
        let state = VringState { index: index.into(), num: 0 };
        let header = Header {
            request: FrontendRequest::VRING_KICK.0,
            flags: Header::FLAG_VERSION,
            size: size_of_val(&state) as u32,
        };
        let sent = self.connection.try_send(&[header.as_bytes(), state.as_bytes()].concat());
        if !sent {
            signal(kick);
        }
        sent
    }

    /// Answers a miss with a translation, now or when there is room.
    fn answer_miss(
        &self,
        iova: Iova,
        permission: u8,
        acknowledged: bool,
        deferred: &mut BTreeSet<(Iova, u8)>,
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

    /// Sends acknowledgements while there is room in the socket.
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
