//! What a device author writes: a [`VirtioDevice`] with a [`Queue`] per ring, each given [`Request`]s.
//!
//! A request is the only way to guest memory, and it remembers every byte that was lent for writing. Nobody has to
//! think of the dirty log: the worker marks those bytes when the request comes back, before it publishes it. Nor can a
//! request be forgotten: one that is dropped comes back as it is.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use super::{BackendError, FrontendHandle};
use crate::abi::bit;
use crate::abi::vhost_user::{DiskGeneration, Request as Code};
use crate::abi::virtio::{
    VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use crate::memory::{Memory, MemoryError};
use crate::ring::{Buffer, Chain};

/// What the rings of every device can do: VERSION_1, indirect descriptors, event indexes, packed rings.
pub const RING_FEATURES: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_RING_F_INDIRECT_DESC)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_F_RING_PACKED);

/// A vhost-user device: what it offers, its configuration space, and its queues.
pub trait VirtioDevice: Send + Sync {
    /// The virtio features of the device type and of its rings ([`RING_FEATURES`]). Logging and protocol features are
    /// added by the back-end.
    fn features(&self) -> u64;

    /// How many queues there are.
    fn queues(&self) -> u16 {
        1
    }

    /// The most entries a ring may have; a power of two.
    fn max_queue_size(&self) -> u16 {
        1024
    }

    /// The configuration space. A front-end that asks for more reads zeroes behind it (rule C1.1).
    fn config(&self) -> Vec<u8>;

    /// Writes configuration space: `flags` is 0 for the driver, 1 for a migration (rule C1.2).
    ///
    /// # Errors
    /// [`BackendError::Config`], also from the default implementation: nothing is writable.
    fn set_config(&self, offset: u32, bytes: &[u8], flags: u32) -> Result<(), BackendError> {
        let (len, why) = (bytes.len() as u32, "this device has no writable fields");
        let _ = flags;
        Err(BackendError::Config { code: Code::SET_CONFIG, offset, len, why })
    }

    /// What GET_QUEUE_NUM answers: the queues, except for a net device, which counts pairs as front-ends expect it.
    fn queue_num(&self) -> u64 {
        self.queues().into()
    }

    /// Protocol features of the device type, beside those that every device has.
    fn protocol_features(&self) -> u64 {
        0
    }

    /// A message that is for the device type alone, with its number: SEND_RARP, NET_SET_MTU.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`], also from the default implementation, and whatever the device refuses.
    fn handle_message(&self, code: Code, number: u64) -> Result<(), BackendError> {
        let _ = number;
        Err(BackendError::Unsupported { code })
    }

    /// How many front-ends may be connected at the same time, of which only one has rings that run. More than one makes a
    /// migration possible whose source and destination are on one host and share the back-end. It takes a device that keeps
    /// nothing of its driver's outside its queues.
    fn max_front_ends(&self) -> usize {
        1
    }

    /// A front-end has connected; `host` is told when configuration space changes, for as long as there are other references
    /// to it.
    fn connected(&self, host: Arc<FrontendHandle>) {
        let _ = host;
    }

    /// A ring is about to run for the first time since the front-end has connected, with these features. It goes on if its
    /// base or the inflight region say that a back-end has served it before; else the driver is a new one.
    fn ring_activated(&self, goes_on: bool, features: u64) {
        let _ = (goes_on, features);
    }

    /// The front-end has begun to log what is written, as before a migration: what would take long in
    /// [`rings_stopped`](VirtioDevice::rings_stopped) can begin, on another thread. It ends when what this returns is dropped, which must not wait.
    fn prepare_to_stop(&self) -> Option<Box<dyn Send>> {
        None
    }

    /// No ring runs any more: the front-end has stopped the last one, and may let the guest go on elsewhere as soon as it
    /// is answered, which is after this returns (rule I11.1). Also called when the back-end itself ends.
    ///
    /// # Errors
    /// What keeps another back-end from finding everything that requests have done. The connection then ends, for
    /// GET_VRING_BASE has no answer that means "no".
    fn rings_stopped(&self) -> io::Result<()> {
        Ok(())
    }

    /// Forgets what the driver has set, as a reset of the device wants it. No queue runs.
    fn reset(&self) {}

    /// What kind of state travels with the device, by a name that other kinds of devices don't have; `None` if all there is
    /// to it are its rings and its configuration. With a state DEVICE_STATE is offered (rules D1.1, D1.10), and STATUS is not.
    fn state_kind(&self) -> Option<&'static str> {
        None
    }

    /// The state to travel, in a form that [`VirtioDevice::load_state`] can tell the version of; at most about 16 MiB. No queue
    /// runs. It is protected on its way: what arrives is what was saved, of this kind of device.
    ///
    /// # Errors
    /// [`BackendError::DeviceState`], in words for whoever migrates; also from the default implementation.
    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        Err(BackendError::DeviceState { why: "this device has none".into() })
    }

    /// Takes over what [`VirtioDevice::save_state`] saved elsewhere. No queue runs; the state is to be kept until they do.
    ///
    /// # Errors
    /// As [`VirtioDevice::save_state`]; nothing has changed then.
    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        let _ = state;
        Err(BackendError::DeviceState { why: "this device has none".into() })
    }

    /// Which disk it is and the state of its contents, as they stay until a ring runs (GET_DISK_GENERATION). No queue of this front-end
    /// runs. A device that has one offers [`own::F_DISK_GENERATION`](crate::abi::vhost_user::own) among its
    /// [`protocol_features`](VirtioDevice::protocol_features).
    ///
    /// # Errors
    /// [`BackendError::DiskGeneration`] if it can't be told; also from the default implementation.
    fn disk_generation(&self) -> Result<DiskGeneration, BackendError> {
        Err(BackendError::DiskGeneration { why: "this device has none".into() })
    }

    /// Which disk it is, as it stays for good; also while rings run (GET_DISK_IDENTITY). It is the identity of
    /// [`disk_generation`](VirtioDevice::disk_generation).
    ///
    /// # Errors
    /// [`BackendError::DiskIdentity`] if it can't be told; also from the default implementation.
    fn disk_identity(&self) -> Result<u128, BackendError> {
        Err(BackendError::DiskIdentity { why: "this device has none".into() })
    }

    /// Finds out whether a ring could be served now, without serving one: a front-end asks before it depends on it
    /// (rule D2.3).
    ///
    /// # Errors
    /// What would keep [`VirtioDevice::start_queue`] from it.
    fn validate_queue(&self) -> io::Result<()> {
        Ok(())
    }

    /// Begins to serve a ring, in the thread that will do it, with the features that the driver accepted.
    ///
    /// # Errors
    /// What the system says; the ring then stays silent until it is started again.
    fn start_queue(&self, index: u16, size: u16, features: u64) -> io::Result<Box<dyn Queue>>;
}

/// One running queue of a device; used by one thread. One that serves requests as they come is an
/// [`SyncQueue`](super::SyncQueue).
///
/// Requests may be completed in any order. Dropping a queue waits for whatever still reaches into guest memory.
///
/// A request is handed back once:
///
/// ```
/// use vhost_migrate::backend::Request;
///
/// fn complete(request: Request, done: &mut Vec<Request>) {
///     done.push(request);
/// }
/// ```
///
/// and not again, which does not compile:
///
/// ```compile_fail,E0382
/// use vhost_migrate::backend::Request;
///
/// fn complete(request: Request, done: &mut Vec<Request>) {
///     done.push(request);
///     done.push(request);
/// }
/// ```
pub trait Queue {
    /// Whether it can use a request now; asked before each one is taken from the ring. A queue of buffers for what is yet
    /// to come wants none before it has come; then [`Queue::completion_fd`] says when to ask again.
    fn wants_request(&mut self) -> bool {
        true
    }

    /// Takes a request. It comes back from [`Queue::completions`], now or later.
    fn submit(&mut self, request: Request);

    /// Hands back what is complete, in `done`, after passing on whatever [`Queue::submit`] held back to pass on in one
    /// go.
    fn completions(&mut self, done: &mut Vec<Request>);

    /// Hands back the requests that it has and did not touch, in the order in which it got them: the ring stops, and they
    /// go back into it. What is served without fail can stay.
    fn put_back(&mut self, unused: &mut Vec<Request>) {
        let _ = unused;
    }

    /// Hands back requests that it need not complete, for whoever takes over the inflight region serves them anew (rule
    /// I8.2); nothing may reach into their memory any more. Asked again and again, until every request has come back, here
    /// or complete.
    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        let _ = unserved;
    }

    /// An fd that is readable while completions wait, or while [`Queue::wants_request`] would say yes where it said no; a queue
    /// that completes requests at once has none.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A request of the driver: buffers to read, buffers to write, and what was written.
///
/// It goes back to the driver whatever happens: one that is dropped counts as complete, with what was written until then.
///
/// Guest memory is reached through it, which notes what is written:
///
/// ```
/// use vhost_migrate::backend::Request;
///
/// fn clear(request: &mut Request) {
///     let _ = request.write(0, &[0; 8]);
/// }
/// ```
///
/// and not past it:
///
/// ```compile_fail,E0616
/// use vhost_migrate::backend::Request;
///
/// fn clear(request: &mut Request) {
///     let _ = request.memory.write(0, &[0; 8]);
/// }
/// ```
///
/// There is one of each:
///
/// ```compile_fail,E0599
/// use vhost_migrate::backend::Request;
///
/// fn twice(request: Request) -> [Request; 2] {
///     [request.clone(), request]
/// }
/// ```
#[derive(Debug)]
#[must_use = "dropped, it goes back to the driver as it is"]
pub struct Request {
    chain: Chain,
    memory: Memory,
    /// Parts of the writable bytes that were lent, in the order they were lent.
    written: Vec<Range<u64>>,
    /// Most bytes that the driver is told of.
    max_used_len: u64,
    /// What names it in the inflight region.
    pub(super) inflight_slot: u16,
    /// Whether the device has it.
    pub(super) submitted: bool,
    dropped: Option<Arc<DroppedRequests>>,
}

/// Requests that were dropped before they were complete.
#[derive(Debug)]
pub(super) struct DroppedRequests {
    any: AtomicBool,
    requests: Mutex<Vec<Request>>,
    /// Wakes whoever takes them.
    wake: Arc<EventFd>,
}

impl DroppedRequests {
    pub(super) fn new(wake: Arc<EventFd>) -> DroppedRequests {
        DroppedRequests { any: AtomicBool::new(false), requests: Mutex::default(), wake }
    }

    /// Moves them to `to`; costs nothing if there are none.
    pub(super) fn take(self: &Arc<DroppedRequests>, to: &mut Vec<Request>) {
        if self.any.load(Ordering::Acquire) {
            let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(false, Ordering::Relaxed);
            // They are used again, and may be dropped again.
            to.extend(requests.drain(..).map(|request| request.with_dropped_list(self)));
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let Some(dropped) = self.dropped.take().filter(|_| self.submitted) else { return };
        let (chain, written) = (std::mem::take(&mut self.chain), std::mem::take(&mut self.written));
        let (memory, reported, name) = (self.memory.clone(), self.max_used_len, self.inflight_slot);
        let request = Request {
            chain,
            memory,
            written,
            max_used_len: reported,
            inflight_slot: name,
            submitted: false,
            dropped: None,
        };
        dropped.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        dropped.any.store(true, Ordering::Release);
        let _ = dropped.wake.write(1);
    }
}

impl Request {
    pub(super) fn new(memory: Memory, dropped: Option<Arc<DroppedRequests>>) -> Request {
        let (chain, written) = (Chain::default(), Vec::new());
        Request { chain, memory, written, max_used_len: u64::MAX, inflight_slot: 0, submitted: false, dropped }
    }

    fn with_dropped_list(mut self, dropped: &Arc<DroppedRequests>) -> Request {
        self.dropped = Some(dropped.clone());
        self
    }

    /// Forgets the last request; the buffers of the next are put in the chain.
    pub(super) fn reset(&mut self) -> &mut Chain {
        self.written.clear();
        self.max_used_len = u64::MAX;
        &mut self.chain
    }

    /// As the ring had it.
    pub(super) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The descriptor or buffer id that names this request; no other one in flight has it.
    pub fn head(&self) -> u16 {
        self.chain.head
    }

    /// Bytes to read.
    pub fn readable_len(&self) -> u64 {
        self.chain.readable_bytes()
    }

    /// Bytes to write.
    pub fn writable_len(&self) -> u64 {
        self.chain.writable_bytes()
    }

    /// Copies readable bytes from `offset` on into `buf`, however they are cut into buffers.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if there are fewer bytes, or a buffer is outside guest memory.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = &mut buf[..];
        let (end, memory) = (offset.saturating_add(rest.len() as u64), &self.memory);
        for_each_piece(&self.chain.readable, offset..end, |gpa, len| {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len as usize);
            rest = after;
            memory.read(gpa, here)
        })
    }

    /// A wire structure at `offset` of the readable bytes.
    ///
    /// # Errors
    /// As [`Request::read`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, offset: u64) -> Result<T, MemoryError> {
        let mut object = T::new_zeroed();
        self.read(offset, object.as_mut_bytes()).map(|()| object)
    }

    /// Copies `data` to the writable bytes from `offset` on.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if there are fewer bytes, or a buffer is outside guest memory; nothing is written then.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut rest = data;
        let range = offset..offset.saturating_add(rest.len() as u64);
        let memory = &self.memory;
        for_each_piece(&self.chain.writable, range.clone(), |gpa, len| memory.slices(gpa, len, |_| {}))?;
        for_each_piece(&self.chain.writable, range.clone(), |gpa, len| {
            let (here, after) = rest.split_at(len as usize);
            rest = after;
            memory.write(gpa, here)
        })?;
        self.written.push(range);
        Ok(())
    }

    /// Whether all writable bytes are in guest memory, so that no [`Request::write`] to them fails.
    pub fn is_writable(&self) -> bool {
        self.chain.writable.iter().all(|buffer| self.memory.slices(buffer.gpa, buffer.len.into(), |_| {}).is_ok())
    }

    /// Appends the host ranges of a part of the readable bytes to `out`, for calls that go past Rust: `writev`, io_uring,
    /// a pointer of a library in another language. They are valid until the request is handed back or dropped: what uses
    /// them must have ended by then.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if there are fewer bytes, or a buffer is outside guest memory.
    pub fn lend_readable(&self, range: Range<u64>, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        for_each_piece(&self.chain.readable, range, |gpa, len| self.memory.iovecs(gpa, len, out))
    }

    /// Appends the host ranges of a part of the writable bytes to `out`, for calls that go past Rust: `readv`, io_uring, a
    /// pointer of a library in another language. They are valid until the request is handed back or dropped: what uses
    /// them must have ended by then. All of it counts as written from here on, and is logged with the request.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if there are fewer bytes, or a buffer is outside guest memory; nothing is lent then.
    pub fn lend_writable(&mut self, range: Range<u64>, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        for_each_piece(&self.chain.writable, range.clone(), |gpa, len| self.memory.iovecs(gpa, len, out))?;
        if !self.written.iter().any(|lent| lent.start <= range.start && range.end <= lent.end) {
            self.written.push(range);
        }
        Ok(())
    }

    /// Tells the driver of at most the first `len` writable bytes that they were written: for what was lent and then not
    /// written. All that was lent is logged all the same.
    pub fn limit_used_len(&mut self, len: u64) {
        self.max_used_len = len;
    }

    /// Bytes written from the first one on, for the used ring: the driver may rely on as many, and knows nothing of
    /// others (virtio 1.2, "The Virtqueue Used Ring").
    pub(super) fn used_len(&self) -> u32 {
        let mut end = 0;
        // Nearly always in order: then one pass finds all.
        while let Some(more) = self.written.iter().fold(None, |found, range| {
            let from = found.unwrap_or(end);
            if range.start <= from && from < range.end { Some(range.end) } else { found }
        }) {
            end = more;
        }
        u32::try_from(end.min(self.max_used_len)).unwrap_or(u32::MAX)
    }

    /// Calls `each` with the guest-physical ranges that were written.
    pub(super) fn for_each_written(&self, mut each: impl FnMut(u64, u64)) {
        for range in &self.written {
            let _ = for_each_piece(&self.chain.writable, range.clone(), |gpa, len| {
                each(gpa, len);
                Ok(())
            });
        }
    }
}

/// Calls `each` with guest-physical address and length of the pieces that make up `range` of `buffers`.
fn for_each_piece(
    buffers: &[Buffer],
    range: Range<u64>,
    mut each: impl FnMut(u64, u64) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut at = 0;
    for buffer in buffers {
        let end = at + u64::from(buffer.len);
        let (from, to) = (range.start.max(at), range.end.min(end));
        if from < to {
            let outside = MemoryError::NotMapped { addr: buffer.gpa, len: to - at, space: "guest-physical" };
            each(buffer.gpa.checked_add(from - at).ok_or(outside)?, to - from)?;
        }
        at = end;
    }
    if range.end <= at {
        return Ok(());
    }
    Err(MemoryError::NotMapped { addr: range.start, len: range.end - range.start, space: "request" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Region, sealed_memfd};
    use std::os::fd::AsFd;

    fn request(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Request {
        let fd = sealed_memfd("request-test", 0x4000).unwrap();
        let region = Region::map(fd.as_fd(), 0x1000, 0x4000, 0, 0).unwrap();
        let mut request = Request::new(Memory::new([Arc::new(region)]).unwrap(), None);
        let buffers = |of: &[(u64, u32)]| of.iter().map(|&(gpa, len)| Buffer { gpa, len }).collect();
        let chain = request.reset();
        (chain.readable, chain.writable) = (buffers(readable), buffers(writable));
        request
    }

    #[test]
    fn reads_and_writes_span_buffer_boundaries() {
        let mut request = request(&[(0x1000, 3), (0x2000, 0), (0x1003, 5)], &[(0x1000, 4), (0x1004, 4)]);
        request.write(0, b"headers!").unwrap();
        let mut found = [0; 4];
        request.read(2, &mut found).unwrap();
        assert_eq!(&found, b"ader");
        assert!(request.read(5, &mut found).is_err(), "only 8 bytes are readable");
        assert!(request.write(8, b"x").is_err(), "only 8 bytes are writable");
        assert!(request.read(u64::MAX, &mut found).is_err());
    }

    #[test]
    fn lent_bytes_count_as_written() {
        let mut request = request(&[], &[(0x1000, 16), (0x3000, 16)]);
        request.lend_writable(8..20, &mut Vec::new()).unwrap();
        request.lend_writable(12..20, &mut Vec::new()).unwrap();
        request.write(31, b"s").unwrap();
        let mut pieces = Vec::new();
        request.for_each_written(|gpa, len| pieces.push((gpa, len)));
        assert_eq!(pieces, [(0x1008, 8), (0x3000, 4), (0x300f, 1)]);
        assert_eq!(request.used_len(), 0, "the first byte was not written");
        request.lend_writable(0..8, &mut Vec::new()).unwrap();
        assert_eq!(request.used_len(), 20);
        assert!(request.lend_writable(0..33, &mut Vec::new()).is_err());
        assert_eq!(request.used_len(), 20, "what could not be lent was not written");
    }

    #[test]
    fn a_buffer_outside_memory_is_an_error() {
        let mut request = request(&[(0x5000, 1)], &[(0xfff, 1), (u64::MAX, 2)]);
        assert!(request.read(0, &mut [0]).is_err());
        assert!(request.write(0, b"x").is_err());
        assert!(request.lend_writable(1..3, &mut Vec::new()).is_err());
    }
}
