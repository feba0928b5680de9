//! Disk I/O through io_uring: a pool of rings that are set up in advance, and the engine that uses one of them.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::attempt::Attempt;
use super::{DiskEngine, DiskIo, DiskOp, Done, ImageFiles, MAX_BATCH};

/// Rings of io_uring. They are set up before the first front-end is served, because the sandbox then refuses the system
/// call. Each accepts only disk I/O.
pub(crate) struct UringPool(Mutex<Vec<IoUring>>);

impl fmt::Debug for UringPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Urings")
    }
}

impl UringPool {
    /// Sets up a ring for each of `queues` queues, with up to `depth` operations in flight.
    pub(crate) fn new(queues: u16, depth: u16) -> io::Result<UringPool> {
        let depth = u32::from(depth.max(1)).next_power_of_two();
        let make = |_| {
            let mut builder = IoUring::builder();
            let ring = builder.setup_r_disabled().setup_clamp().setup_cqsize(depth * 2).build(depth.min(MAX_BATCH))?;
            let [read, readv] = [opcode::Read::CODE, opcode::Readv::CODE];
            let [write, writev] = [opcode::Write::CODE, opcode::Writev::CODE];
            let [fsync, fallocate] = [opcode::Fsync::CODE, opcode::Fallocate::CODE];
            let cancel = opcode::AsyncCancel2::CODE;
            let mut only = [read, readv, write, writev, fsync, fallocate, cancel].map(Restriction::sqe_op);
            ring.submitter().register_restrictions(&mut only)?;
            ring.submitter().register_enable_rings()?;
            Ok(ring)
        };
        // The kernel interrupts the thread that set a ring up when the ring is closed. A thread of its own does it, which
        // has ended by then.
        let rings = thread::scope(|scope| scope.spawn(|| (0..queues).map(make).collect::<io::Result<_>>()).join());
        Ok(UringPool(Mutex::new(rings.map_err(|_| io::Error::other("a thread has failed"))??)))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<IoUring>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// I/O through io_uring.
pub(crate) struct UringEngine {
    ring: ManuallyDrop<IoUring>,
    /// The pool that lends the ring and takes it back.
    pool: Arc<UringPool>,
    files: Arc<ImageFiles>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Requests that could not be submitted.
    failed: Vec<Done>,
}

#[derive(Default)]
struct Slot {
    io: Option<DiskIo>,
    attempt: Attempt,
}

impl UringEngine {
    /// Creates an engine with a free ring; `None` if all are in use.
    pub(crate) fn new(files: Arc<ImageFiles>, pool: &Arc<UringPool>) -> Option<UringEngine> {
        let ring = ManuallyDrop::new(pool.idle().pop()?);
        Some(UringEngine { ring, pool: pool.clone(), files, slots: Vec::new(), free: Vec::new(), failed: Vec::new() })
    }

    fn submission_entry(&Attempt { fd, start, ref iovecs, flags, .. }: &Attempt, io: &DiskIo) -> squeue::Entry {
        let (fd, many) = (types::Fd(fd), iovecs.len() as u32);
        match (io.op, iovecs.as_slice()) {
            (DiskOp::Read, [one]) => opcode::Read::new(fd, one.iov_base.cast(), length(one)).offset(start).build(),
            (DiskOp::Read, all) => opcode::Readv::new(fd, all.as_ptr(), many).offset(start).build(),
            (DiskOp::Write { .. }, [one]) => opcode::Write::new(fd, one.iov_base.cast_const().cast(), length(one))
                .offset(start)
                .rw_flags(flags)
                .build(),
            (DiskOp::Write { .. }, all) => {
                opcode::Writev::new(fd, all.as_ptr(), many).offset(start).rw_flags(flags).build()
            }
            (DiskOp::Flush, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            (DiskOp::Discard | DiskOp::Zero { .. }, _) => {
                opcode::Fallocate::new(fd, io.len()).offset(start).mode(io.fallocate_flags().bits()).build()
            }
        }
    }

    /// Submits all queued entries. If the kernel accepts no more, completions must be taken first.
    fn submit_queued(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => break,
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// Returns the number of bytes of a range for one call. The rest is left to the next attempt.
fn length(iovec: &libc::iovec) -> u32 {
    iovec.iov_len.min(1 << 30) as u32
}

impl DiskEngine for UringEngine {
    fn submit(&mut self, mut io: DiskIo) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let Some(slot) = self.slots.get_mut(index) else { return };
        if let Err(error) = slot.attempt.prepare(&self.files, &mut io) {
            self.free.push(index);
            self.failed.push((io, Err(error)));
            return;
        }
        let entry = UringEngine::submission_entry(&slot.attempt, &io).user_data(index as u64);
        slot.io = Some(io);
        // SAFETY: the buffers are guest memory of the request in `slot.io` or aligned memory in `slot.attempt`, which also
        // has the list of them. Neither is accessed until the completion with this index has been taken; `drop` waits for
        // it too. The file is open as long as `self.files` exists.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // The queue is full: the kernel must take entries first.
            if let Err(error) = self.ring.submit()
                && error.raw_os_error() != Some(libc::EINTR)
            {
                if let Some(slot) = self.slots.get_mut(index)
                    && let Some(io) = slot.io.take()
                {
                    self.free.push(index);
                    let result = slot.attempt.end(&self.files, &io, Err(error));
                    self.failed.push((io, result));
                }
                return;
            }
        }
    }

    fn cancel(&mut self) {
        self.submit_queued();
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build().user_data(u64::MAX);
        // SAFETY: the entry refers to no memory. Its completion belongs to no slot.
        let _ = unsafe { self.ring.submission().push(&entry) };
        self.submit_queued();
    }

    fn completions(&mut self, done: &mut VecDeque<Done>) {
        self.submit_queued();
        done.extend(self.failed.drain(..));
        for completion in self.ring.completion() {
            let index = completion.user_data() as usize;
            let Some(slot) = self.slots.get_mut(index) else { continue };
            let Some(io) = slot.io.take() else { continue };
            self.free.push(index);
            let result = u64::try_from(completion.result());
            let result = result.map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            let result = slot.attempt.end(&self.files, &io, result);
            done.push_back((io, result));
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the fd, and the result borrows the ring.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        let mut done = VecDeque::new();
        self.completions(&mut done);
        while self.in_flight() > 0 {
            // An interrupted wait is repeated.
            let _ = self.ring.submit_and_wait(1);
            self.completions(&mut done);
        }
        // SAFETY: nothing uses `self.ring` after this.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        self.pool.idle().push(ring);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::backend::Request;
    use crate::backend::devices::disk_io::IoPath;
    use crate::memory::{GuestAddress, Memory, Region, UserAddress, sealed_memfd};
    use crate::ring::Buffer;

    #[test]
    fn an_io_uring_is_restricted_to_disk_io() {
        let urings = UringPool::new(1, 4).unwrap();
        let mut ring = urings.idle().pop().unwrap();
        let null = File::open("/dev/null").unwrap();
        let opening = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build();
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        let syncing = opcode::Fsync::new(types::Fd(null.as_raw_fd())).build();
        let results = [opening, socket, syncing].map(|entry| {
            // SAFETY: the path is a constant, and the file is open until the end of the test.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        });
        assert_eq!(results, [-libc::EACCES, -libc::EACCES, -libc::EINVAL], "/dev/null can't be synced");
    }

    #[test]
    fn blocked_io_completes_when_canceled() {
        let (empty, _keeps_it_open) = nix::unistd::pipe().unwrap();
        let files = Arc::new(ImageFiles::new(empty.into(), None).unwrap());
        let fd = sealed_memfd("disk-io-test", 0x2000).unwrap();
        let memory =
            Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x2000, UserAddress(0), 0).unwrap())])
                .unwrap();
        let mut engine = UringEngine::new(files, &Arc::new(UringPool::new(1, 4).unwrap())).unwrap();
        for gpa in [0, 0x1000].map(GuestAddress) {
            let mut request = Request::new(memory.clone(), None);
            request.reset().writable.push(Buffer { gpa, len: 0x1000 });
            engine.submit(DiskIo {
                request,
                op: DiskOp::Read,
                file_range: 0..0x1000,
                request_offset: 0,
                path: IoPath::Cached,
            });
        }
        let mut done = VecDeque::new();
        engine.completions(&mut done);
        assert!(done.is_empty());
        engine.cancel();
        while done.len() < 2 {
            engine.ring.submit_and_wait(1).unwrap();
            engine.completions(&mut done);
        }
        for (_, result) in done {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        }
    }
}
