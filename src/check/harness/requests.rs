//! Requests and frames of the guest, and their completions.

use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use zerocopy::{FromZeros, IntoBytes};

use super::injector::{FrameInjector, send};
use super::{GuestIommu, HEAD, HEADS, HIGH, Harness, SLOT_BYTES, STATUSES};
use crate::abi::virtio::{BlkRequestHeader, VIRTIO_BLK_T_IN};
use crate::check::connection::readable;
use crate::check::device::blk::{BlkGeometry, NO_STATUS};
use crate::check::device::fs::OutHeader;
use crate::check::device::net::{self, HEADER, MAX_FRAME_BYTES};
use crate::check::device::{TestedDevice, console, fs, vsock};
use crate::check::outcome::CheckAbort;
use crate::check::pages::{noise, pages};
use crate::check::queue::DriverQueue;
use crate::check::ring_variant::Flow;
use crate::memory::{Address, GuestAddress, LOG_PAGE};
use crate::ring::Buffer;

/// Interval after which a missing frame is sent again: a back-end may drop frames without a buffer.
pub(in crate::check) const RESEND_INTERVAL: Duration = Duration::from_millis(200);

/// Maximum number of the host's connections that are kept open.
const MAX_OPEN_CONNECTIONS: usize = 256;

/// A request in flight.
#[derive(Clone, Copy)]
pub(super) struct InFlightRequest {
    /// Ring index and id of the request.
    ring: u32,
    head: u16,
    data: Buffer,
}

/// Size of requests in a batch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::check) enum RequestSize {
    /// A few sectors at varying offsets in a page; frames of all lengths.
    Mixed,
    /// Maximum size, so that requests take long.
    Large,
}

impl Harness {
    /// Adds `count` unpublished requests, on all rings in turn. Data buffers are filled with new noise, so that every
    /// write of the device changes them.
    pub(in crate::check) fn add(&mut self, count: u64, size: RequestSize) -> Result<(), CheckAbort> {
        self.long_frames = size == RequestSize::Large;
        for _ in 0..count {
            let Some(slot) = self.slots.iter().position(Option::is_none) else {
                return Err(CheckAbort::System(std::io::Error::other("no slot is free")));
            };
            let offset = match size {
                RequestSize::Large => 0,
                RequestSize::Mixed => self.submitted * 1777 % 0x4000,
            };
            let wanted = match size {
                RequestSize::Large => SLOT_BYTES,
                RequestSize::Mixed => 512 * (1 + self.submitted * 7 % 40),
            };
            self.add_at(slot, HIGH.unchecked_add(slot as u64 * SLOT_BYTES + offset), wanted)?;
        }
        Ok(())
    }

    /// Adds a request in `slot` with data at `gpa`: a read of up to `wanted` bytes, or a frame.
    pub(in crate::check) fn add_at(&mut self, slot: usize, gpa: GuestAddress, wanted: u64) -> Result<(), CheckAbort> {
        match (self.flow, &self.device) {
            (Flow::Requests, TestedDevice::Blk(disk)) => {
                let (head, len) = disk.read(self.submitted, wanted);
                self.view().write(gpa, &noise(self.submitted + 1, len))?;
                self.add_request(slot, head, Buffer { gpa, len })
            }
            (Flow::Requests, TestedDevice::Fs) => {
                let (head, len) = match self.file {
                    Some(file) => file.read(self.submitted, wanted),
                    None => fs::init_request(self.submitted),
                };
                self.view().write(gpa, &noise(self.submitted + 1, len))?;
                self.add_fuse(slot, &head, Buffer { gpa, len })
            }
            (Flow::Requests, _) => {
                let data = Buffer { gpa, len: wanted as u32 };
                self.view().write(gpa, &noise(self.submitted + 1, data.len))?;
                self.mark_writable(data);
                self.enqueue(slot, data, &[], &[data])
            }
            (Flow::Receive, device) => {
                let len = match device {
                    TestedDevice::Vsock(_) => vsock::BUFFER_BYTES,
                    TestedDevice::Console => console::BUFFER_BYTES,
                    _ => (HEADER + MAX_FRAME_BYTES) as u32,
                };
                let data = Buffer { gpa, len };
                self.view().write(gpa, &noise(self.submitted + 1, data.len))?;
                self.mark_writable(data);
                self.enqueue(slot, data, &[], &[data])
            }
            (Flow::Transmit, _) => {
                let packet = packet(self.device, self.submitted, self.long_frames);
                self.view().write(gpa, &packet)?;
                let data = Buffer { gpa, len: packet.len() as u32 };
                self.enqueue(slot, data, &[data], &[])
            }
        }
    }

    /// Adds a block request in `slot`.
    pub(in crate::check) fn add_request(
        &mut self,
        slot: usize,
        head: BlkRequestHeader,
        data: Buffer,
    ) -> Result<(), CheckAbort> {
        let (head_at, status) = (head_at(slot), status_at(slot));
        self.view().write(head_at, head.as_bytes())?;
        self.view().write(status, &[NO_STATUS])?;
        let reads = head.request_type.get() == VIRTIO_BLK_T_IN;
        let head = Buffer { gpa: head_at, len: size_of_val(&head) as u32 };
        let status = Buffer { gpa: status, len: 1 };
        self.mark_writable(status);
        if !reads {
            return self.enqueue(slot, data, &[head, data], &[status]);
        }
        self.mark_writable(data);
        self.enqueue(slot, data, &[head], &[data, status])
    }

    /// Adds a FUSE request in `slot`, whose reply data goes to `data`.
    fn add_fuse(&mut self, slot: usize, head: &[u8], data: Buffer) -> Result<(), CheckAbort> {
        let (head_at, status_at) = (head_at(slot), status_at(slot));
        self.view().write(head_at, head)?;
        let no_answer = [NO_STATUS; size_of::<OutHeader>()];
        self.view().write(status_at, &no_answer)?;
        let head = Buffer { gpa: head_at, len: head.len() as u32 };
        let status = Buffer { gpa: status_at, len: no_answer.len() as u32 };
        self.mark_writable(status);
        self.mark_writable(data);
        self.enqueue(slot, data, &[head], &[status, data])
    }

    /// Runs a FUSE request and returns its reply of up to `room` bytes. No other request may be in flight.
    pub(in crate::check) fn exchange(&mut self, head: &[u8], unique: u64, room: u32) -> Result<Vec<u8>, CheckAbort> {
        self.add_fuse(0, head, Buffer { gpa: HIGH, len: room })?;
        self.publish();
        self.finish()?;
        let mut answer = OutHeader::new_zeroed();
        self.view().read(STATUSES, answer.as_mut_bytes())?;
        let len = (answer.len.get() as usize).checked_sub(size_of_val(&answer)).filter(|len| *len <= room as usize);
        let Some(len) = len.filter(|_| answer.unique.get() == unique) else {
            let (len, named) = (answer.len.get(), answer.unique.get());
            return Err(CheckAbort::Violation(format!(
                "the reply to FUSE request {unique} is for {named} and has {len} bytes"
            )));
        };
        let mut data = vec![0; len];
        self.view().read(HIGH, &mut data)?;
        Ok(data)
    }

    /// Records that the device may write the buffer.
    fn mark_writable(&mut self, buffer: Buffer) {
        let places: Vec<u64> = self.guest_pages(pages(buffer.gpa, buffer.len.into())).collect();
        self.writable_pages.extend(places);
    }

    /// Adds a request to the next ring in turn.
    fn enqueue(
        &mut self,
        slot: usize,
        data: Buffer,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Result<(), CheckAbort> {
        let turn = self.submitted as usize % (1 + self.more_rings.len());
        let Some(queue) = self.rings_mut().nth(turn) else { return Ok(()) };
        let ring = queue.index;
        let Some(head) = queue.driver.add(readable, writable, None)? else {
            return Err(CheckAbort::System(std::io::Error::other("the ring is full")));
        };
        queue.awaited_frames += u64::from(readable.is_empty());
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(InFlightRequest { ring, head, data });
        }
        self.submitted += 1;
        Ok(())
    }

    /// Publishes requests, kicks if the device needs it, and injects frames.
    pub(in crate::check) fn publish(&mut self) {
        self.rings_mut().for_each(DriverQueue::publish);
        // The frame source may not be ready; `finish` retries.
        let _ = self.inject_frames();
    }

    /// Injects the awaited frames.
    pub(in crate::check) fn inject_frames(&mut self) -> Result<(), CheckAbort> {
        let (view, device, long) = (self.view().clone(), self.device, self.long_frames);
        let rings = std::iter::once(&mut self.ring).chain(&mut self.more_rings);
        for (number, queue) in rings.enumerate() {
            while queue.awaited_frames > 0 {
                let payload = net::payload(self.frames_sent, self.long_frames);
                let sent = match &mut self.source {
                    None => break,
                    Some(FrameInjector::Loop) => match self.other_direction.get_mut(number) {
                        Some(other) => send(other, &view, self.frames_sent, &packet(device, self.frames_sent, long))?,
                        None => false,
                    },
                    Some(FrameInjector::Interface(socket)) => {
                        socket.send_to(&payload, (Ipv4Addr::BROADCAST, 9))? == payload.len()
                    }
                    Some(FrameInjector::Backend(harness)) => {
                        send(&mut harness.ring, &harness.memory, self.frames_sent, &net::packet(&payload))?
                    }
                    Some(FrameInjector::VsockHost(path, open)) => {
                        open.truncate(MAX_OPEN_CONNECTIONS - 1);
                        open.push_front(vsock::connect(path, self.frames_sent)?);
                        true
                    }
                    Some(FrameInjector::Tcp(stream)) => {
                        let typed = console::input(self.frames_sent, 1);
                        stream.write(&typed)? == typed.len()
                    }
                };
                if !sent {
                    break;
                }
                queue.awaited_frames -= 1;
                self.frames_sent += 1;
            }
        }
        Ok(())
    }

    /// Pops one completion. Returns false if there is none.
    pub(in crate::check) fn pop(&mut self) -> Result<bool, CheckAbort> {
        let mut found = None;
        for queue in self.rings_mut() {
            if let Some(used) = queue.driver.pop_used()? {
                found = Some((queue.index, used));
                break;
            }
        }
        let Some((ring, used)) = found else { return Ok(false) };
        let is_it =
            |request: &Option<InFlightRequest>| request.is_some_and(|it| (it.ring, it.head) == (ring, used.head));
        let Some(slot) = self.slots.iter().position(is_it) else { return Ok(true) };
        let request = self.slots.get_mut(slot).and_then(Option::take);
        let data = request.map_or(Buffer { gpa: GuestAddress(0), len: 0 }, |request| request.data);
        self.last_data = if self.flow == Flow::Receive { Buffer { len: used.len, ..data } } else { data };
        match self.flow {
            Flow::Transmit => Ok(true),
            Flow::Receive => {
                if used.len > data.len {
                    let (written, len) = (used.len, data.len);
                    return Err(CheckAbort::Violation(format!("{written} bytes were received into a buffer of {len}")));
                }
                let mut bytes = vec![0; used.len as usize];
                self.view().read(data.gpa, &mut bytes)?;
                self.frames_received += u64::from(match self.device {
                    TestedDevice::Vsock(cid) => vsock::received(cid, &bytes)?,
                    TestedDevice::Console => console::received(&bytes)?,
                    _ => net::received(&bytes)?,
                });
                Ok(true)
            }
            Flow::Requests if matches!(self.device, TestedDevice::Rng) => {
                self.last_data.len = used.len;
                match (1..=data.len).contains(&used.len) {
                    true => Ok(true),
                    false => Err(CheckAbort::Violation(format!(
                        "a buffer of {} bytes was returned with {}",
                        data.len, used.len
                    ))),
                }
            }
            Flow::Requests if matches!(self.device, TestedDevice::Fs) => {
                let mut answer = OutHeader::new_zeroed();
                self.view().read(status_at(slot), answer.as_mut_bytes())?;
                match (answer.error.get().cast_signed(), answer.len.get()) {
                    (0, _) => Ok(true),
                    (-1, u32::MAX) => Err(CheckAbort::Violation("a request was completed without a reply".into())),
                    (error, _) => Err(CheckAbort::Violation(format!("a FUSE request failed with error {error}"))),
                }
            }
            Flow::Requests => {
                let mut status = [NO_STATUS];
                self.view().read(status_at(slot), &mut status)?;
                match status {
                    [NO_STATUS] => Err(CheckAbort::Violation("a request was completed without a status".into())),
                    [status] if BlkGeometry::is_success(status) => Ok(true),
                    [status] => Err(CheckAbort::Violation(format!("a read failed with status {status}"))),
                }
            }
        }
    }

    /// Returns the number of requests in flight.
    pub(in crate::check) fn outstanding(&self) -> u16 {
        self.rings().map(|queue| queue.driver.outstanding()).sum()
    }

    /// Waits until no request is in flight.
    pub(in crate::check) fn finish(&mut self) -> Result<(), CheckAbort> {
        let deadline = self.deadline(self.timeout);
        while self.outstanding() > 0 {
            if self.pop()? || self.rings_mut().any(|queue| queue.driver.enable_notifications()) {
                continue;
            }
            self.inject_frames()?;
            let until = if self.source.is_some() { deadline.within(RESEND_INTERVAL) } else { deadline.clone() };
            let calls: Vec<BorrowedFd<'_>> = self.rings().map(|queue| queue.call.as_fd()).collect();
            let notified = readable(&calls, &until);
            self.rings().for_each(|queue| _ = queue.ack_call());
            if notified {
                continue;
            }
            let left = self.outstanding();
            if deadline.is_over() {
                // An error on the back-end channel is the cause.
                self.iommu.as_ref().map(GuestIommu::misses).transpose()?;
                let late = self.pop()?;
                let what = if late { "notification" } else { "answer" };
                let waited = self.timeout;
                return Err(CheckAbort::Violation(format!("{left} requests without {what} within {waited:?}")));
            }
            self.rings_mut().for_each(|queue| queue.awaited_frames = queue.driver.outstanding().into());
        }
        Ok(())
    }

    /// Runs a batch of requests until all are complete.
    pub(in crate::check) fn run_batch(&mut self, count: u64, size: RequestSize) -> Result<(), CheckAbort> {
        self.add(count, size)?;
        self.serve()
    }

    /// Publishes requests, and waits until none is in flight.
    pub(in crate::check) fn serve(&mut self) -> Result<(), CheckAbort> {
        self.publish();
        self.finish()
    }

    /// Pops all completions. Returns their number.
    pub(in crate::check) fn pop_all(&mut self) -> Result<u64, CheckAbort> {
        let mut count = 0;
        while self.pop()? {
            count += 1;
        }
        Ok(count)
    }
}

/// Address of the request header of a slot.
fn head_at(slot: usize) -> GuestAddress {
    HEADS.unchecked_add(slot as u64 * HEAD)
}

/// Address of the status of a slot.
fn status_at(slot: usize) -> GuestAddress {
    STATUSES.unchecked_add(slot as u64 * LOG_PAGE)
}

/// Builds packet `number`.
fn packet(device: TestedDevice, number: u64, long: bool) -> Vec<u8> {
    match device {
        TestedDevice::Vsock(cid) => vsock::packet(cid, number),
        TestedDevice::Console => console::packet(number),
        _ => net::packet(&net::payload(number, long)),
    }
}
