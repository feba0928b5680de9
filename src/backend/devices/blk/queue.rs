//! Requests of a virtio-blk queue (virtio 1.2, "Block Device").
//!
//! A request is a readable header, data, and a status byte, the last writable byte. The split into descriptors has no
//! meaning. Disk errors are reported to the guest as IOERR and logged; they never stop the queue.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use tracing::debug;

use super::generation::{ImageGeneration, RunningQueue};
use super::image_lock::ImageLockGuard;
use super::{BlkDevice, MAX_CLEAR_SECTORS};
use crate::abi::virtio::{
    BlkDiscardWriteZeroes, BlkRequestHeader, SECTOR_BYTES, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, VirtioFeatures,
};
use crate::backend::devices::disk_io::{DiskEngine, DiskIo, DiskOp, IoPath};
use crate::backend::{Queue, Request, counters};
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

const HEADER: u64 = size_of::<BlkRequestHeader>() as u64;

pub(super) struct BlkQueue {
    index: u16,
    /// Size in sectors. The disk may grow.
    capacity: Arc<AtomicU64>,
    can_clear: bool,
    read_only: bool,
    /// The preferred path for data.
    path: IoPath,
    /// True if writes and zeroes complete only on stable storage, for drivers without FLUSH.
    durable: bool,
    serial: [u8; VIRTIO_BLK_ID_BYTES],
    engine: Box<dyn DiskEngine>,
    /// The running queue of the image's generation. It is dropped after the engine, whose drop waits for its I/O, and
    /// before the lock.
    generation: Option<RunningQueue>,
    _lock: Option<ImageLockGuard>,
    /// Completed requests.
    ready: Vec<Request>,
    /// Incomplete requests, while the queue is being suspended.
    unserved: Option<Vec<Request>>,
    /// Attempts that have ended.
    attempts: VecDeque<(DiskIo, io::Result<u64>)>,
}

/// A decoded request.
enum ParsedRequest {
    /// Complete with this status.
    Complete(u8),
    /// Execute this operation: first byte on the disk, number of bytes, and offset of the data in the request.
    Io { op: DiskOp, start: u64, len: u64, at: u64 },
}

impl BlkQueue {
    pub(super) fn new(
        disk: &BlkDevice,
        index: u16,
        features: VirtioFeatures,
        engine: Box<dyn DiskEngine>,
        guard: Option<ImageLockGuard>,
    ) -> BlkQueue {
        BlkQueue {
            index,
            capacity: disk.capacity.clone(),
            can_clear: disk.can_clear,
            read_only: disk.options.read_only,
            path: if disk.files.alignment().is_some() { IoPath::Direct } else { IoPath::Cached },
            durable: !features.contains(VIRTIO_BLK_F_FLUSH),
            serial: disk.serial,
            engine,
            generation: disk.generation.as_ref().map(ImageGeneration::queue_started),
            _lock: guard,
            ready: Vec::new(),
            unserved: None,
            attempts: VecDeque::new(),
        }
    }

    fn parse(&self, request: &mut Request) -> ParsedRequest {
        let Ok(header) = request.read_obj::<BlkRequestHeader>(0) else {
            debug!("queue {}: a request without a readable header", self.index);
            return ParsedRequest::Complete(VIRTIO_BLK_S_IOERR);
        };
        let (sector, room) = (header.sector.get(), request.writable_len().saturating_sub(1));
        match header.request_type.get() {
            VIRTIO_BLK_T_IN => self.transfer(DiskOp::Read, sector, room, 0),
            VIRTIO_BLK_T_OUT if self.read_only => ParsedRequest::Complete(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_OUT => {
                let len = request.readable_len() - HEADER;
                self.transfer(DiskOp::Write { durable: self.durable }, sector, len, HEADER)
            }
            VIRTIO_BLK_T_FLUSH => ParsedRequest::Io { op: DiskOp::Flush, start: 0, len: 0, at: 0 },
            VIRTIO_BLK_T_GET_ID => {
                let len = (VIRTIO_BLK_ID_BYTES as u64).min(room) as usize;
                match request.write(0, self.serial.get(..len).unwrap_or_default()) {
                    Ok(()) => ParsedRequest::Complete(VIRTIO_BLK_S_OK),
                    Err(_) => ParsedRequest::Complete(VIRTIO_BLK_S_IOERR),
                }
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.read_only => {
                ParsedRequest::Complete(VIRTIO_BLK_S_IOERR)
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if self.can_clear => self.clear(kind, request),
            kind => {
                debug!("queue {}: request type {kind} is not supported", self.index);
                ParsedRequest::Complete(VIRTIO_BLK_S_UNSUPP)
            }
        }
    }

    /// Returns the operation on a range, if it is on the disk.
    fn transfer(&self, op: DiskOp, sector: u64, len: u64, at: u64) -> ParsedRequest {
        let (start, capacity) =
            (sector.checked_mul(SECTOR_BYTES), self.capacity.load(Ordering::Relaxed) * SECTOR_BYTES);
        match start.filter(|start| start.checked_add(len).is_some_and(|end| end <= capacity)) {
            Some(_) if len == 0 => ParsedRequest::Complete(VIRTIO_BLK_S_OK),
            Some(start) if len.is_multiple_of(SECTOR_BYTES) => ParsedRequest::Io { op, start, len, at },
            _ => {
                debug!("queue {}: {len} bytes at sector {sector} are no whole sectors of the disk", self.index);
                ParsedRequest::Complete(VIRTIO_BLK_S_IOERR)
            }
        }
    }

    fn clear(&self, kind: u32, request: &Request) -> ParsedRequest {
        let whole = request.readable_len() == HEADER + size_of::<BlkDiscardWriteZeroes>() as u64;
        let Some(range) = request.read_obj::<BlkDiscardWriteZeroes>(HEADER).ok().filter(|_| whole) else {
            debug!("queue {}: a discard or write-zeroes that doesn't have one range", self.index);
            return ParsedRequest::Complete(VIRTIO_BLK_S_IOERR);
        };
        let unmap = range.flags.get() & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let op = match (kind, range.flags.get() & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) {
            (VIRTIO_BLK_T_DISCARD, 0) if !unmap => DiskOp::Discard,
            (VIRTIO_BLK_T_WRITE_ZEROES, 0) => DiskOp::Zero { unmap, is_fallback: false },
            _ => return ParsedRequest::Complete(VIRTIO_BLK_S_UNSUPP),
        };
        let sectors = range.num_sectors.get();
        if sectors > MAX_CLEAR_SECTORS {
            debug!("queue {}: {op:?} of {sectors} sectors, and {MAX_CLEAR_SECTORS} were offered", self.index);
            return ParsedRequest::Complete(VIRTIO_BLK_S_IOERR);
        }
        self.transfer(op, range.sector.get(), u64::from(sectors) * SECTOR_BYTES, 0)
    }

    /// Replaces the generation before the first operation that changes the image (GET_DISK_GENERATION).
    fn before_change(&self, op: DiskOp) -> io::Result<()> {
        match &self.generation {
            Some(generation) if op.changes() => generation.before_change(),
            _ => Ok(()),
        }
    }

    /// Completes a request after an attempt, or starts the next attempt.
    fn handle_result(&mut self, mut io: DiskIo, result: io::Result<u64>) {
        let status = match result {
            // Without FLUSH the driver relies on durable zeroes (virtio 1.2, 5.2.6.2).
            Ok(_) if matches!(io.op, DiskOp::Zero { .. }) && self.durable => {
                return self.retry(DiskIo { op: DiskOp::Flush, ..io });
            }
            Ok(count) => {
                io.file_range.start += if io.moves_data() { count } else { io.file_range.end - io.file_range.start };
                io.request_offset += count;
                match io.file_range.is_empty() {
                    true => VIRTIO_BLK_S_OK,
                    false if count > 0 => return self.retry(io),
                    false => self.disk_error(&io, "the image ends here: was it truncated?"),
                }
            }
            // No system call was made: a buffer is outside guest memory.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && error.raw_os_error().is_none() => {
                debug!("queue {}: {}", self.index, with_causes(&error));
                VIRTIO_BLK_S_IOERR
            }
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR | Errno::EAGAIN) => return self.retry(io),
                Some(Errno::ECANCELED) if self.unserved.is_some() => return self.retry(io),
                // Direct I/O has stricter requirements than the file reports.
                Some(Errno::EINVAL) if io.path != IoPath::Cached => {
                    return self.retry(DiskIo { path: io.path.next(), ..io });
                }
                // A discard is a hint and may have no effect. Zeroes are retried with the other method.
                Some(Errno::EOPNOTSUPP) => match io.op {
                    DiskOp::Discard => VIRTIO_BLK_S_OK,
                    DiskOp::Zero { unmap, is_fallback: false } => {
                        return self.retry(DiskIo { op: DiskOp::Zero { unmap: !unmap, is_fallback: true }, ..io });
                    }
                    _ => self.disk_error(&io, &with_causes(&error).to_string()),
                },
                _ => self.disk_error(&io, &with_causes(&error).to_string()),
            },
        };
        if io.op == DiskOp::Read && status != VIRTIO_BLK_S_OK {
            // The whole buffer was passed to the read, but not all of it was filled.
            io.request.limit_used_len(io.request_offset);
        }
        self.complete(io.request, status);
    }

    /// Submits the request again, or keeps it as unserved while the queue is being suspended.
    fn retry(&mut self, io: DiskIo) {
        match &mut self.unserved {
            Some(unserved) => unserved.push(io.request),
            None => self.engine.submit(io),
        }
    }

    /// Handles attempts until none has ended. Each may start another attempt, which is submitted in the same call.
    fn collect(&mut self) {
        loop {
            self.engine.completions(&mut self.attempts);
            if self.attempts.is_empty() {
                break;
            }
            while let Some((io, result)) = self.attempts.pop_front() {
                self.handle_result(io, result);
            }
        }
    }

    /// Writes the status byte and completes the request.
    fn complete(&mut self, mut request: Request, status: u8) {
        if status != VIRTIO_BLK_S_OK {
            counters::request_failed(self.index);
        }
        match request.writable_len().checked_sub(1).map(|last| request.write(last, &[status])) {
            Some(Ok(())) => {}
            _ => debug!("queue {}: a request without room for its status", self.index),
        }
        self.ready.push(request);
    }

    fn disk_error(&self, io: &DiskIo, why: &str) -> u8 {
        let (from, len) =
            (io.file_range.start / SECTOR_BYTES, (io.file_range.end - io.file_range.start) / SECTOR_BYTES);
        limited!(error, "queue {}: the disk failed: {:?} of {len} sectors at sector {from}: {why}", self.index, io.op);
        VIRTIO_BLK_S_IOERR
    }
}

impl Queue for BlkQueue {
    fn submit(&mut self, mut request: Request) {
        // The request has no room for a status byte.
        if request.writable_len() == 0 {
            return self.complete(request, VIRTIO_BLK_S_IOERR);
        }
        match self.parse(&mut request) {
            ParsedRequest::Complete(status) => self.complete(request, status),
            ParsedRequest::Io { op, .. } if let Err(error) = self.before_change(op) => {
                limited!(error, "queue {}: {op:?}: the image's generation can't be replaced: {error}", self.index);
                self.complete(request, VIRTIO_BLK_S_IOERR);
            }
            ParsedRequest::Io { op, start, len, at } => {
                self.engine.submit(DiskIo {
                    request,
                    op,
                    file_range: start..start + len,
                    request_offset: at,
                    path: self.path,
                });
            }
        }
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        self.collect();
        done.append(&mut self.ready);
    }

    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        if self.unserved.is_none() {
            self.unserved = Some(Vec::new());
            self.engine.cancel();
        }
        self.collect();
        unserved.extend(self.unserved.iter_mut().flat_map(|requests| requests.drain(..)));
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.engine.fd())
    }
}
