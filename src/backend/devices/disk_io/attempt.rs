//! One attempt at an I/O operation: its path, and the memory given to the kernel.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use vm_memory::VolatileSlice;

use super::{Alignment, DiskIo, DiskOp, ImageFiles, IoPath};

/// Maximum number of ranges of one system call (IOV_MAX). The rest is left to the next attempt.
const MAX_IOVECS: usize = 1024;
/// Maximum number of bytes bounced at a time, unless a block is larger. The rest is left to the next attempt.
const MAX_BOUNCED: u64 = 64 << 10;
/// Minimum alignment of bounce buffers in bytes.
const PAGE: usize = 4096;

/// The arguments of a system call.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    pub(super) fd: RawFd,
    /// First byte in the file.
    pub(super) start: u64,
    pub(super) iovecs: Vec<libc::iovec>,
    /// Flags of a write.
    pub(super) flags: i32,
    bounce_buffer: Option<BounceBuffer>,
}

/// Aligned memory in place of the request's memory.
#[derive(Debug)]
struct BounceBuffer {
    bytes: Vec<u8>,
    /// Position of the request's data in `bytes`.
    data: Range<usize>,
    /// The request's memory.
    iovecs: Vec<libc::iovec>,
}

impl Attempt {
    /// Prepares an attempt and chooses its path by buffers, range and file.
    ///
    /// # Errors
    /// An error if a buffer is outside guest memory. Nothing has been started then.
    pub(super) fn prepare(&mut self, files: &ImageFiles, io: &mut DiskIo) -> io::Result<()> {
        *self = Attempt { iovecs: std::mem::take(&mut self.iovecs), start: io.file_range.start, ..Attempt::default() };
        self.iovecs.clear();
        let range = io.request_offset..io.request_offset.saturating_add(io.len());
        match io.op {
            DiskOp::Read => io.request.lend_writable(range, &mut self.iovecs),
            DiskOp::Write { .. } => io.request.lend_readable(range, &mut self.iovecs),
            DiskOp::Flush | DiskOp::Discard | DiskOp::Zero { .. } => Ok(()),
        }
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let alignment = files.alignment();
        if let Some(alignment) = alignment.filter(|_| io.moves_data()) {
            io.path = self.choose_path(io, alignment);
            if io.path == IoPath::Bounced {
                self.bounce(io, alignment);
            }
        }
        self.iovecs.truncate(MAX_IOVECS);
        // Other hosts read the image past this page cache, so cached writes of a direct image are durable.
        let stable = io.op == (DiskOp::Write { durable: true }) || alignment.is_some() && io.path == IoPath::Cached;
        self.flags = if stable { libc::RWF_DSYNC } else { 0 };
        self.fd = files.file_for(io.path).as_raw_fd();
        files.note_start(io.op, io.path);
        Ok(())
    }

    /// Returns the path of this attempt, no better than that of the last one.
    fn choose_path(&self, io: &DiskIo, Alignment { memory, block }: Alignment) -> IoPath {
        let whole = (io.file_range.start | io.len()).is_multiple_of(block);
        let is_aligned = |iovec: &libc::iovec| {
            (iovec.iov_base as u64).is_multiple_of(memory) && (iovec.iov_len as u64).is_multiple_of(block)
        };
        match io.path {
            IoPath::Direct if whole && self.iovecs.iter().all(is_aligned) => IoPath::Direct,
            // A partial block write needs the rest of the block, which the page cache reads.
            IoPath::Direct | IoPath::Bounced if whole || io.op == DiskOp::Read => IoPath::Bounced,
            _ => IoPath::Cached,
        }
    }

    /// Replaces the request's memory with aligned memory, for whole blocks.
    fn bounce(&mut self, io: &DiskIo, Alignment { memory, block }: Alignment) {
        let start = io.file_range.start - io.file_range.start % block;
        let most = start.saturating_add(MAX_BOUNCED.max(block));
        let end = io.file_range.end.checked_next_multiple_of(block).unwrap_or(io.file_range.end).min(most);
        let (skip, len) = ((io.file_range.start - start) as usize, (end - start) as usize);
        let align = PAGE.max(memory as usize);
        let mut bytes = vec![0; len + align];
        let begin = bytes.as_ptr().align_offset(align);
        let data = begin + skip..begin + skip + (end.min(io.file_range.end) - io.file_range.start) as usize;
        if let (DiskOp::Write { .. }, Some(to)) = (io.op, bytes.get_mut(data.clone())) {
            let mut rest = to;
            for slice in self.iovecs.iter().map(volatile) {
                let (here, later) = rest.split_at_mut(slice.len().min(rest.len()));
                slice.copy_to(here);
                rest = later;
            }
        }
        let iov_base = bytes.as_mut_ptr().wrapping_add(begin).cast();
        let iovecs = std::mem::replace(&mut self.iovecs, vec![libc::iovec { iov_base, iov_len: len }]);
        (self.start, self.bounce_buffer) = (start, Some(BounceBuffer { bytes, data, iovecs }));
    }

    /// Ends the attempt: copies bounced data to the request and returns the number of the request's bytes.
    pub(super) fn end(&mut self, files: &ImageFiles, io: &DiskIo, result: io::Result<u64>) -> io::Result<u64> {
        files.note_end(io.op, result.is_ok());
        let (Some(BounceBuffer { bytes, data, iovecs }), Ok(count)) = (self.bounce_buffer.take(), &result) else {
            return result;
        };
        if io.op != DiskOp::Read {
            return result;
        }
        // The data read begins at the start of the block.
        let skip = io.file_range.start - self.start;
        let came = count.saturating_sub(skip).min(data.len() as u64);
        let mut rest = bytes.get(data).and_then(|data| data.get(..came as usize)).unwrap_or_default();
        for slice in iovecs.iter().map(volatile) {
            let (here, later) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(here);
            rest = later;
        }
        Ok(came)
    }
}

/// Returns guest memory lent by a request.
fn volatile(iovec: &libc::iovec) -> VolatileSlice<'_> {
    // SAFETY: the range is guest memory of a request that is not handed back before the attempt has ended, and is only
    // used until then.
    unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
}
