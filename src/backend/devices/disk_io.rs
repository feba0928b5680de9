//! Disk I/O directly from and to the guest memory of a request, through io_uring or by threads.
//!
//! | file | purpose |
//! |---|---|
//! | `files` | the open files of an image, and whether changes are not on stable storage yet |
//! | `write_back` | write-back of the page cache during a migration |
//! | `uring` | I/O through io_uring; `no_uring` without the feature `io-uring` |
//! | `attempt` | one attempt: past the page cache, through aligned memory, or through the page cache |
//!
//! A [`DiskEngine`] makes one attempt per [`DiskIo`] and returns it with the result of the system call. The caller
//! handles retries, short transfers and errors. A `DiskIo` owns its request until then, and so the guest memory that the
//! kernel writes.

mod attempt;
mod files;
#[cfg(not(feature = "io-uring"))]
mod no_uring;
#[cfg(feature = "io-uring")]
mod uring;
mod write_back;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam::channel::{Receiver, Sender, unbounded};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::fdatasync;

use self::attempt::Attempt;
pub(crate) use self::files::{Alignment, ImageFiles, block_size};
#[cfg(not(feature = "io-uring"))]
pub(crate) use self::no_uring::{UringEngine, UringPool};
#[cfg(feature = "io-uring")]
pub(crate) use self::uring::{UringEngine, UringPool};
pub(crate) use self::write_back::WriteBack;
use crate::backend::Request;

/// Maximum number of submissions passed to the kernel at once.
const MAX_BATCH: u32 = 1024;
/// Number of threads per queue without io_uring.
const THREADS: usize = 8;

/// A disk operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskOp {
    /// Reads from the disk into writable bytes of the request.
    Read,
    /// Writes readable bytes of the request to the disk.
    Write {
        /// True if the data must be on stable storage before the write completes.
        durable: bool,
    },
    /// Puts everything written so far on stable storage (fdatasync).
    Flush,
    /// Deallocates the range.
    Discard,
    /// Makes the range read as zeroes.
    Zero {
        /// True to deallocate the range.
        unmap: bool,
        /// True if the other method has failed already. Not used by the engine.
        is_fallback: bool,
    },
}

impl DiskOp {
    /// Returns true for operations that change the contents of the disk.
    pub(crate) fn changes(self) -> bool {
        match self {
            DiskOp::Write { .. } | DiskOp::Discard | DiskOp::Zero { .. } => true,
            DiskOp::Read | DiskOp::Flush => false,
        }
    }
}

/// Paths of data between the disk and the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IoPath {
    /// Past the page cache, directly from and to the request's memory.
    Direct,
    /// Past the page cache, through aligned memory.
    Bounced,
    /// Through the page cache.
    Cached,
}

impl IoPath {
    /// Returns the path to try after the system has refused this one.
    pub(crate) fn next(self) -> IoPath {
        match self {
            IoPath::Direct => IoPath::Bounced,
            IoPath::Bounced | IoPath::Cached => IoPath::Cached,
        }
    }
}

/// An I/O operation and the request that it belongs to.
#[derive(Debug)]
pub(crate) struct DiskIo {
    pub(crate) request: Request,
    pub(crate) op: DiskOp,
    /// Range of bytes in the file.
    pub(crate) file_range: Range<u64>,
    /// Offset of the data of `file_range.start` in the request.
    pub(crate) request_offset: u64,
    /// The preferred path, if the image is opened for it.
    pub(crate) path: IoPath,
}

impl DiskIo {
    fn len(&self) -> u64 {
        self.file_range.end - self.file_range.start
    }

    /// Returns true if the operation transfers data.
    pub(crate) fn moves_data(&self) -> bool {
        matches!(self.op, DiskOp::Read | DiskOp::Write { .. })
    }

    fn fallocate_flags(&self) -> FallocateFlags {
        match self.op {
            DiskOp::Zero { unmap: false, .. } => {
                FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
            }
            _ => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// An operation and the number of bytes that its attempt transferred.
pub(crate) type Done = (DiskIo, io::Result<u64>);

/// Executes disk I/O, used by one thread. Dropping it waits for operations in flight.
pub(crate) trait DiskEngine {
    /// Starts an attempt, which may be batched until [`DiskEngine::completions`].
    fn submit(&mut self, io: DiskIo);

    /// Cancels operations in flight as far as possible. They complete with ECANCELED.
    fn cancel(&mut self);

    /// Submits batched attempts and collects completed ones.
    fn completions(&mut self, done: &mut VecDeque<Done>);

    /// Returns a descriptor that is readable while completions are pending.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// Disk I/O by blocking threads.
pub(crate) struct ThreadEngine {
    jobs: Option<Sender<DiskIo>>,
    /// Those that no thread has taken yet.
    todo: Receiver<DiskIo>,
    results: Receiver<Done>,
    canceled: Vec<Done>,
    ready: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadEngine {
    /// Starts the threads.
    pub(crate) fn new(files: &Arc<ImageFiles>) -> io::Result<ThreadEngine> {
        let (jobs, todo) = unbounded::<DiskIo>();
        let (finished, results) = unbounded();
        let ready = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let spawn = |_| {
            let (todo, finished, ready, files) = (todo.clone(), finished.clone(), ready.clone(), files.clone());
            thread::Builder::new().name("disk".into()).spawn(move || {
                for mut io in todo {
                    let result = attempt(&files, &mut io);
                    let _ = finished.send((io, result));
                    let _ = ready.write(1);
                }
            })
        };
        let threads = (0..THREADS).map(spawn).collect::<io::Result<_>>()?;
        Ok(ThreadEngine { jobs: Some(jobs), todo, results, canceled: Vec::new(), ready, threads })
    }
}

impl DiskEngine for ThreadEngine {
    fn submit(&mut self, io: DiskIo) {
        if let Some(jobs) = &self.jobs {
            // The threads live as long as this sender.
            let _ = jobs.send(io);
        }
    }

    fn cancel(&mut self) {
        let canceled = |io| (io, Err(Errno::ECANCELED.into()));
        self.canceled.extend(self.todo.try_iter().map(canceled));
    }

    fn completions(&mut self, done: &mut VecDeque<Done>) {
        let _ = self.ready.read();
        done.extend(self.canceled.drain(..));
        done.extend(self.results.try_iter());
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

impl Drop for ThreadEngine {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Executes one blocking attempt.
fn attempt(files: &ImageFiles, io: &mut DiskIo) -> io::Result<u64> {
    let mut attempt = Attempt::default();
    attempt.prepare(files, io)?;
    let result = transfer(files, &attempt, io);
    attempt.end(files, io, result)
}

fn transfer(files: &ImageFiles, attempt: &Attempt, io: &DiskIo) -> io::Result<u64> {
    let offset = i64::try_from(attempt.start).map_err(|_| Errno::EFBIG)?;
    let len = i64::try_from(io.len()).map_err(|_| Errno::EFBIG)?;
    let (iovecs, count) = (attempt.iovecs.as_ptr(), attempt.iovecs.len() as i32);
    // SAFETY: the ranges are guest memory of the request in `io`, or the aligned memory of `attempt`. The kernel may write
    // both, and both outlive this call.
    let result = unsafe {
        match io.op {
            DiskOp::Read => libc::preadv(attempt.fd, iovecs, count, offset),
            DiskOp::Write { .. } => libc::pwritev2(attempt.fd, iovecs, count, offset, attempt.flags),
            DiskOp::Flush => return Ok(fdatasync(files.preferred()).map(|()| 0)?),
            DiskOp::Discard | DiskOp::Zero { .. } => {
                return Ok(fallocate(files.preferred(), io.fallocate_flags(), offset, len).map(|()| 0)?);
            }
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
#[cfg(feature = "io-uring")]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::memory::{GuestAddress, Memory, Region, UserAddress, sealed_memfd};
    use crate::ring::Buffer;

    /// Calls `each` with a direct disk of 16 KiB, for each engine, and its contents.
    fn direct_disks(each: impl Fn(&ImageFiles, &mut dyn FnMut(DiskIo) -> (DiskIo, u64), &mut Vec<u8>)) {
        for uring in [true, false] {
            let image = tempfile::NamedTempFile::new().unwrap();
            let mut contents: Vec<u8> = (0..0x4000u32).map(|at| (at % 251) as u8).collect();
            std::fs::write(image.path(), &contents).unwrap();
            let open = |flags| File::options().read(true).write(true).custom_flags(flags).open(image.path()).unwrap();
            let files = Arc::new(ImageFiles::new(open(0), Some(open(libc::O_DIRECT))).unwrap().with_blocks(4096));
            let mut engine: Box<dyn DiskEngine> = match uring {
                true => Box::new(UringEngine::new(files.clone(), &Arc::new(UringPool::new(1, 4).unwrap())).unwrap()),
                false => Box::new(ThreadEngine::new(&files).unwrap()),
            };
            let mut serve = |io| {
                engine.submit(io);
                let mut done = VecDeque::new();
                while done.is_empty() {
                    let mut fds = [PollFd::new(engine.fd(), PollFlags::POLLIN)];
                    poll(&mut fds, PollTimeout::from(10u8)).unwrap();
                    engine.completions(&mut done);
                }
                let (io, result) = done.pop_front().unwrap();
                (io, result.unwrap())
            };
            each(&files, &mut serve, &mut contents);
            assert!(std::fs::read(image.path()).unwrap() == contents);
        }
    }

    fn memory() -> Memory {
        let fd = sealed_memfd("disk-io-test", 0x8000).unwrap();
        Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x8000, UserAddress(0), 0).unwrap())]).unwrap()
    }

    fn io(memory: &Memory, op: DiskOp, gpa: u64, disk: Range<u64>) -> DiskIo {
        let mut request = Request::new(memory.clone(), None);
        let (first, buffer) = (100, Buffer { gpa: GuestAddress(gpa), len: (disk.end - disk.start) as u32 });
        let chain = request.reset();
        let buffers = if op == DiskOp::Read { &mut chain.writable } else { &mut chain.readable };
        match gpa.is_multiple_of(4096) {
            true => buffers.push(buffer),
            false => buffers.extend([
                Buffer { len: first, ..buffer },
                Buffer { gpa: GuestAddress(gpa + u64::from(first)), len: buffer.len - first },
            ]),
        }
        DiskIo { request, op, file_range: disk, request_offset: 0, path: IoPath::Direct }
    }

    #[test]
    fn unaligned_io_is_bounced_and_only_partial_block_writes_use_the_page_cache() {
        let write = DiskOp::Write { durable: false };
        direct_disks(|files, serve, contents| {
            let memory = memory();
            let mut read = |gpa: u64, disk: Range<u64>, way| {
                let (at, len) = (disk.start as usize, (disk.end - disk.start) as usize);
                let (io, count) = serve(io(&memory, DiskOp::Read, gpa, disk));
                let mut bytes = vec![0; len];
                memory.read(GuestAddress(gpa), &mut bytes).unwrap();
                assert_eq!((io.path, count), (way, len as u64));
                assert_eq!(io.request.used_len() as usize, len);
                assert!(bytes == contents[at..at + len]);
            };
            read(0, 4096..0x3000, IoPath::Direct);
            read(3, 4096..0x3000, IoPath::Bounced);
            read(0, 512..1024, IoPath::Bounced);
            read(3, 0x1e00..0x2200, IoPath::Bounced);
            read(4096, 0x3e00..0x4000, IoPath::Bounced);
            assert!(!files.is_unsynced());
            for (gpa, disk, way) in [
                (0, 0..4096, IoPath::Direct),
                (7, 4096..0x3000, IoPath::Bounced),
                (4096, 0x3200..0x3400, IoPath::Cached),
            ] {
                let data = vec![0xa0 | gpa as u8; (disk.end - disk.start) as usize];
                memory.write(GuestAddress(gpa), &data).unwrap();
                contents[disk.start as usize..disk.end as usize].copy_from_slice(&data);
                let (io, count) = serve(io(&memory, write, gpa, disk));
                assert_eq!((io.path, count), (way, data.len() as u64));
            }
        });
    }

    #[test]
    fn changes_are_unsynced_until_a_later_flush_completes() {
        direct_disks(|files, serve, contents| {
            let memory = memory();
            contents[..4096].fill(0);
            serve(io(&memory, DiskOp::Write { durable: true }, 0, 0..4096));
            assert!(!files.is_unsynced());
            serve(io(&memory, DiskOp::Write { durable: false }, 0, 0..4096));
            assert!(files.is_unsynced());
            serve(DiskIo { file_range: 0..0, ..io(&memory, DiskOp::Flush, 0, 0..4096) });
            assert!(!files.is_unsynced());
            contents[4096..0x2000].fill(0);
            serve(io(&memory, DiskOp::Discard, 0, 4096..0x2000));
            assert!(files.is_unsynced());
            files.sync().unwrap();
            assert!(!files.is_unsynced());
            files.note_start(DiskOp::Flush, IoPath::Direct);
            files.note_end(DiskOp::Flush, false);
            assert!(files.is_unsynced(), "a flush that fails leaves it to be done");
        });
    }
}
