//! The traits of a device: [`VirtioDevice`], its [`Queue`]s, and the [`Request`]s that they serve.
//!
//! A [`Request`] is the only access to guest memory, and it records every byte that was lent for writing. The worker
//! marks these bytes in the dirty log before it publishes the request, so a device does no logging of its own. A
//! request that is dropped is returned to the driver, so none can be lost.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::vhost_user::{DiskGeneration, FrontendRequest as Code, ProtocolFeatures};
use crate::abi::virtio::{
    VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use crate::backend::{BackendError, FrontendHandle};
use crate::memory::{Address, GuestAddress, Memory, MemoryError};
use crate::ring::{Buffer, Chain};

/// The ring features of every device: VERSION_1, indirect descriptors, event indexes, packed rings.
pub const RING_FEATURES: VirtioFeatures =
    VIRTIO_F_VERSION_1.union(VIRTIO_RING_F_INDIRECT_DESC).union(VIRTIO_RING_F_EVENT_IDX).union(VIRTIO_F_RING_PACKED);

/// A vhost-user device: its features, its configuration space, and its queues.
///
/// A device needs [`features`](VirtioDevice::features), [`config`](VirtioDevice::config) and
/// [`start_queue`](VirtioDevice::start_queue). Its methods are called by the threads of connections and rings.
pub trait VirtioDevice: Send + Sync {
    /// Returns the virtio features of the device type and of its rings ([`RING_FEATURES`]). The back-end adds logging
    /// and protocol features.
    fn features(&self) -> VirtioFeatures;

    /// Returns the virtio device id, such as [`VIRTIO_ID_BLOCK`](crate::abi::virtio::VIRTIO_ID_BLOCK). A VDUSE device needs
    /// it; vhost-user does not. `None` by default.
    fn device_id(&self) -> Option<u32> {
        None
    }

    /// Returns a number that names the data of the device on this host, such as the image of a disk. A VDUSE device of a
    /// process that was killed is continued only with the same data. 0 by default.
    fn data_id(&self) -> u128 {
        0
    }

    /// Returns the number of queues, 1 by default.
    fn queues(&self) -> u16 {
        1
    }

    /// Returns the maximum number of entries of a ring, a power of two: 1024 by default.
    fn max_queue_size(&self) -> u16 {
        1024
    }

    /// Returns the configuration space. Reads beyond it return zeroes (rule C1).
    fn config(&self) -> Vec<u8>;

    /// Writes to the configuration space. `flags` is 0 for a write of the driver and 1 for one of a migration (rule C1).
    ///
    /// # Errors
    /// [`BackendError::Config`] if these bytes are not writable. The default implementation always returns it.
    fn set_config(&self, offset: u32, bytes: &[u8], flags: u32) -> Result<(), BackendError> {
        let (len, why) = (bytes.len() as u32, "this device has no writable fields");
        let _ = flags;
        Err(BackendError::Config { code: Code::SET_CONFIG, offset, len, why })
    }

    /// Returns the reply to GET_QUEUE_NUM: the number of queues. Network devices return the number of queue pairs, as
    /// front-ends expect.
    fn queue_num(&self) -> u64 {
        self.queues().into()
    }

    /// Returns the protocol features of the device type, in addition to those of every device. None by default.
    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::empty()
    }

    /// Handles a message that only this device type knows: SEND_RARP or NET_SET_MTU, with its u64 payload.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`], also from the default implementation, or the reason for which the device refuses
    /// it.
    fn handle_message(&self, code: Code, number: u64) -> Result<(), BackendError> {
        let _ = number;
        Err(BackendError::Unsupported { code })
    }

    /// Returns the maximum number of front-ends that may be connected at the same time, 1 by default. Only one of them
    /// can run rings. More than one allows a migration whose source and destination are on one host and share the
    /// back-end. It requires a device that keeps no driver state outside its queues.
    fn max_front_ends(&self) -> usize {
        1
    }

    /// Called when a front-end has connected. The device uses `frontend` to report changes of its configuration space.
    /// The handle does nothing once the connection has ended.
    fn connected(&self, frontend: Arc<FrontendHandle>) {
        let _ = frontend;
    }

    /// Called before a ring runs for the first time on a connection. `resumed` is true if the base or the inflight
    /// region show that a back-end has served the ring before; otherwise its driver is new. `features` are the
    /// acknowledged features.
    fn ring_activated(&self, resumed: bool, features: VirtioFeatures) {
        let _ = (resumed, features);
    }

    /// Called when the front-end enables logging, as it does before a migration. The device can start work on another
    /// thread that makes [`rings_stopped`](VirtioDevice::rings_stopped) faster. The work ends when the returned value
    /// is dropped; the drop must not block.
    fn prepare_to_stop(&self) -> Option<Box<dyn Send>> {
        None
    }

    /// Called when no ring runs any more. The front-end gets its reply after this returns, and may then resume the
    /// guest elsewhere (rule I11). Also called when the back-end itself ends.
    ///
    /// # Errors
    /// An error if data of completed requests could not be made available to another back-end. The connection is then
    /// closed, because GET_VRING_BASE has no reply that means failure.
    fn rings_stopped(&self) -> io::Result<()> {
        Ok(())
    }

    /// Discards all driver settings, as a device reset requires. No queue runs.
    fn reset(&self) {}

    /// Returns the name of the device state, unique to this kind of device. `None` means that the device has no state
    /// besides its rings and its configuration. A device with a state offers DEVICE_STATE (rule D1) and does not offer
    /// STATUS.
    fn state_kind(&self) -> Option<&'static str> {
        None
    }

    /// Returns the device state for DEVICE_STATE, at most about 16 MiB, in a format that carries its version for
    /// [`VirtioDevice::load_state`]. No queue runs. The transfer protects the bytes: they arrive unchanged, at a device
    /// of the same kind.
    ///
    /// # Errors
    /// [`BackendError::DeviceState`] with a reason for the user, also from the default implementation.
    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        Err(BackendError::DeviceState { why: "this device has none".into() })
    }

    /// Restores a state of [`VirtioDevice::save_state`]. No queue runs; the device keeps the state until one does.
    ///
    /// # Errors
    /// As [`VirtioDevice::save_state`]. The device is then unchanged.
    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        let _ = state;
        Err(BackendError::DeviceState { why: "this device has none".into() })
    }

    /// Returns the identity of the disk and the generation of its contents, which is stable until a ring runs
    /// (GET_DISK_GENERATION). No queue of this front-end runs. Devices that implement it offer
    /// [`own::F_DISK_GENERATION`](crate::abi::vhost_user::own) in
    /// [`protocol_features`](VirtioDevice::protocol_features).
    ///
    /// # Errors
    /// [`BackendError::DiskGeneration`] if it is not available, also from the default implementation.
    fn disk_generation(&self) -> Result<DiskGeneration, BackendError> {
        Err(BackendError::DiskGeneration { why: "this device has none".into() })
    }

    /// Returns the permanent identity of the disk, also while rings run (GET_DISK_IDENTITY). It equals the identity in
    /// [`disk_generation`](VirtioDevice::disk_generation).
    ///
    /// # Errors
    /// [`BackendError::DiskIdentity`] if it is not available, also from the default implementation.
    fn disk_identity(&self) -> Result<u128, BackendError> {
        Err(BackendError::DiskIdentity { why: "this device has none".into() })
    }

    /// Checks whether a queue could be started now, without starting one (rule D2).
    ///
    /// # Errors
    /// The error that [`VirtioDevice::start_queue`] would return.
    fn validate_queue(&self) -> io::Result<()> {
        Ok(())
    }

    /// Starts serving a ring with the acknowledged features. Called on the ring's worker thread.
    ///
    /// # Errors
    /// The error of the system. The ring is then not served until it is started again.
    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> io::Result<Box<dyn Queue>>;
}

/// A running queue of a device, used by one thread. Devices that serve one request after the other use a
/// [`SyncQueue`](crate::backend::SyncQueue).
///
/// Requests may complete in any order. Dropping a queue waits until nothing accesses guest memory any more.
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
/// Handing it back again does not compile:
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
    /// Returns true if the queue can use a request now. Asked before each request is taken from the ring. A receive
    /// queue without packets returns false; [`Queue::completion_fd`] then becomes readable when it is to be asked
    /// again.
    fn wants_request(&mut self) -> bool {
        true
    }

    /// Takes a request. It is handed back by [`Queue::completions`], immediately or later.
    fn submit(&mut self, request: Request);

    /// Appends completed requests to `done`, after starting work that [`Queue::submit`] has batched.
    fn completions(&mut self, done: &mut Vec<Request>);

    /// Hands back requests that were not touched, in submission order, because the ring stops. They return to the
    /// available ring. Requests that complete without external input may stay.
    fn put_back(&mut self, unused: &mut Vec<Request>) {
        let _ = unused;
    }

    /// Hands back requests that need not be completed, because the next owner of the inflight region resubmits them
    /// (rule I8). Nothing may access their memory any more. Called repeatedly until every request has been handed back, here
    /// or as completed.
    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        let _ = unserved;
    }

    /// Returns a descriptor that is readable while completions are pending, or when [`Queue::wants_request`] has
    /// changed to true. Queues that complete requests in [`Queue::submit`] have none.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A request of the driver: readable buffers, writable buffers, and a record of what was written.
///
/// Every request is returned to the driver. One that is dropped counts as completed, with the bytes written so far.
///
/// Guest memory is accessed through the request, which records writes:
///
/// ```
/// use vhost_migrate::backend::Request;
///
/// fn clear(request: &mut Request) {
///     let _ = request.write(0, &[0; 8]);
/// }
/// ```
///
/// There is no access around it:
///
/// ```compile_fail,E0616
/// use vhost_migrate::backend::Request;
/// use vhost_migrate::memory::GuestAddress;
///
/// fn clear(request: &mut Request) {
///     let _ = request.memory.write(GuestAddress(0), &[0; 8]);
/// }
/// ```
///
/// A request cannot be duplicated:
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
    /// Ranges of the writable bytes that were written or lent, in that order of time.
    written: Vec<Range<u64>>,
    /// Upper limit of the used length reported to the driver.
    max_used_len: u64,
    /// Head or entry of the request in the inflight region.
    pub(super) inflight_slot: u16,
    /// True while the device has the request.
    pub(super) submitted: bool,
    dropped: Option<Arc<DroppedRequests>>,
}

/// Requests that the device dropped before completing them.
#[derive(Debug)]
pub(super) struct DroppedRequests {
    any: AtomicBool,
    requests: Mutex<Vec<Request>>,
    /// Wakes the worker.
    wake: Arc<EventFd>,
}

impl DroppedRequests {
    pub(super) fn new(wake: Arc<EventFd>) -> DroppedRequests {
        DroppedRequests { any: AtomicBool::new(false), requests: Mutex::default(), wake }
    }

    /// Moves the dropped requests to `to`. Takes no lock if there are none.
    pub(super) fn take(self: &Arc<DroppedRequests>, to: &mut Vec<Request>) {
        if self.any.load(Ordering::Acquire) {
            let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(false, Ordering::Relaxed);
            // Request objects are reused, and may be dropped again.
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

    /// Clears the request for reuse and returns its chain to be filled.
    pub(super) fn reset(&mut self) -> &mut Chain {
        self.written.clear();
        self.max_used_len = u64::MAX;
        &mut self.chain
    }

    /// The descriptor chain as it was taken from the ring.
    pub(crate) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Returns the descriptor index or buffer id of the request, unique among requests in flight.
    pub fn head(&self) -> u16 {
        self.chain.head
    }

    /// Returns the number of readable bytes.
    pub fn readable_len(&self) -> u64 {
        self.chain.readable_bytes()
    }

    /// Returns the number of writable bytes.
    pub fn writable_len(&self) -> u64 {
        self.chain.writable_bytes()
    }

    /// Copies readable bytes starting at `offset` into `buf`, across buffer boundaries.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRequest`] if there are fewer bytes, [`MemoryError::NotMapped`] if a buffer is outside guest
    /// memory.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = &mut buf[..];
        let (end, memory) = (offset.saturating_add(rest.len() as u64), &self.memory);
        for_each_piece(&self.chain.readable, offset..end, |gpa, len| {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(len as usize);
            rest = after;
            memory.read(gpa, here)
        })
    }

    /// Reads a wire structure at `offset` of the readable bytes.
    ///
    /// # Errors
    /// As [`Request::read`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, offset: u64) -> Result<T, MemoryError> {
        let mut object = T::new_zeroed();
        self.read(offset, object.as_mut_bytes()).map(|()| object)
    }

    /// Copies `data` to the writable bytes starting at `offset`, across buffer boundaries.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRequest`] if there are fewer bytes, [`MemoryError::NotMapped`] if a buffer is outside guest
    /// memory. Nothing is written
    /// then.
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

    /// Returns true if all writable bytes are in guest memory, so that no [`Request::write`] to them fails.
    pub fn is_writable(&self) -> bool {
        self.chain.writable.iter().all(|buffer| self.memory.slices(buffer.gpa, buffer.len.into(), |_| {}).is_ok())
    }

    /// Returns true if all bytes are in guest memory.
    pub(crate) fn is_mapped(&self) -> bool {
        let readable = &self.chain.readable;
        self.is_writable()
            && readable.iter().all(|buffer| self.memory.slices(buffer.gpa, buffer.len.into(), |_| {}).is_ok())
    }

    /// Records that another device has served the request and reports `used_len` written bytes. All writable bytes
    /// count as written, because a device may write more than it reports.
    pub(crate) fn written_by_device(&mut self, used_len: u32) {
        self.written.push(0..self.writable_len());
        self.limit_used_len(used_len.into());
    }

    /// Appends the host ranges of a part of the readable bytes to `out`, for `writev`, io_uring or foreign code. They
    /// are valid until the request is handed back or dropped; all accesses must have ended by then.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRequest`] if there are fewer bytes, [`MemoryError::NotMapped`] if a buffer is outside guest
    /// memory.
    pub fn lend_readable(&self, range: Range<u64>, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        for_each_piece(&self.chain.readable, range, |gpa, len| self.memory.iovecs(gpa, len, out))
    }

    /// Appends the host ranges of a part of the writable bytes to `out`, for `readv`, io_uring or foreign code. They
    /// are valid until the request is handed back or dropped; all accesses must have ended by then. The whole part
    /// counts as written and is logged with the request.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRequest`] if there are fewer bytes, [`MemoryError::NotMapped`] if a buffer is outside guest
    /// memory. Nothing is lent then.
    pub fn lend_writable(&mut self, range: Range<u64>, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        for_each_piece(&self.chain.writable, range.clone(), |gpa, len| self.memory.iovecs(gpa, len, out))?;
        if !self.written.iter().any(|lent| lent.start <= range.start && range.end <= lent.end) {
            self.written.push(range);
        }
        Ok(())
    }

    /// Limits the used length reported to the driver to `len`, for bytes that were lent and not written. All lent bytes
    /// are logged nevertheless.
    pub fn limit_used_len(&mut self, len: u64) {
        self.max_used_len = len;
    }

    /// Returns the used length: the number of bytes written without a gap from the first one (virtio 1.2, "The
    /// Virtqueue Used Ring").
    pub(super) fn used_len(&self) -> u32 {
        let mut end = 0;
        // Writes are usually in order; then one pass finds the end.
        while let Some(more) = self.written.iter().fold(None, |found, range| {
            let from = found.unwrap_or(end);
            if range.start <= from && from < range.end { Some(range.end) } else { found }
        }) {
            end = more;
        }
        u32::try_from(end.min(self.max_used_len)).unwrap_or(u32::MAX)
    }

    /// Calls `each` with the guest-physical ranges that were written.
    pub(super) fn for_each_written(&self, mut each: impl FnMut(GuestAddress, u64)) {
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
    mut each: impl FnMut(GuestAddress, u64) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut at = 0;
    for buffer in buffers {
        let end = at + u64::from(buffer.len);
        let (from, to) = (range.start.max(at), range.end.min(end));
        if from < to {
            let outside = MemoryError::NotMapped { gpa: buffer.gpa, len: to - at };
            each(buffer.gpa.checked_add(from - at).ok_or(outside)?, to - from)?;
        }
        at = end;
    }
    if range.end <= at {
        return Ok(());
    }
    Err(MemoryError::OutsideRequest { offset: range.start, len: range.end.saturating_sub(range.start) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Region, UserAddress, sealed_memfd};
    use std::os::fd::AsFd;

    fn request(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Request {
        let fd = sealed_memfd("request-test", 0x4000).unwrap();
        let region = Region::map(fd.as_fd(), GuestAddress(0x1000), 0x4000, UserAddress(0), 0).unwrap();
        let mut request = Request::new(Memory::new([Arc::new(region)]).unwrap(), None);
        let buffers = |of: &[(u64, u32)]| of.iter().map(|&(gpa, len)| Buffer { gpa: GuestAddress(gpa), len }).collect();
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
        assert!(
            request.lend_readable(Range { start: 20, end: 10 }, &mut Vec::new()).is_err(),
            "it ends before it starts"
        );
    }

    #[test]
    fn lent_bytes_count_as_written() {
        let mut request = request(&[], &[(0x1000, 16), (0x3000, 16)]);
        request.lend_writable(8..20, &mut Vec::new()).unwrap();
        request.lend_writable(12..20, &mut Vec::new()).unwrap();
        request.write(31, b"s").unwrap();
        let mut pieces = Vec::new();
        request.for_each_written(|gpa, len| pieces.push((gpa.0, len)));
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
