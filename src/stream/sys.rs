//! The only `unsafe` code of the stream: reads from a file descriptor directly into guest memory, copies of pages,
//! inherited descriptors, and renameat2.

use std::hash::Hasher;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::NixPath;
use nix::errno::Errno;
use twox_hash::XxHash3_64;
use vm_memory::VolatileSlice;

/// Size of a page, bytes.
const PAGE_BYTES: usize = crate::memory::LOG_PAGE as usize;
/// Maximum number of buffers of one `readv`.
const IOV_MAX: usize = 1024;

/// Ranges of guest memory to be filled from the stream, in order.
#[derive(Default)]
pub struct ReceiveWindow<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    first: usize,
    left: usize,
}

impl<'m> ReceiveWindow<'m> {
    pub(super) fn push(&mut self, piece: VolatileSlice<'m>) {
        self.left += piece.len();
        self.pieces.push(piece);
    }

    /// Number of bytes that are still missing.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Copies `bytes` to the front of the window. Returns the number of bytes copied.
    pub fn store(&self, mut bytes: &[u8]) -> usize {
        let before = bytes.len();
        for piece in self.unfilled() {
            piece.copy_from(bytes);
            bytes = bytes.get(piece.len()..).unwrap_or_default();
            if bytes.is_empty() {
                break;
            }
        }
        before - bytes.len()
    }

    /// Reads to the front of the window with one `readv`. Returns the number of bytes, 0 at the end of the file.
    ///
    /// # Errors
    /// The error of the system.
    pub fn readv(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let guards: Vec<_> = self.unfilled().iter().take(IOV_MAX).map(VolatileSlice::ptr_guard_mut).collect();
        let iovecs: Vec<_> =
            guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
        // SAFETY: each iovec is a live, writable mapping of guest memory (the slices borrow it), which is shared memory
        // that no Rust reference points into; the count is at most IOV_MAX, so it fits.
        let count = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Hashes the first `count` bytes, as they are in guest memory now, and removes them from the window.
    pub(super) fn advance(&mut self, count: usize, hash: &mut XxHash3_64) {
        let mut count = count.min(self.left);
        self.left -= count;
        // Hashes a copy: other processes may change the memory behind a Rust slice.
        let mut copy = [0; PAGE_BYTES];
        while let Some(piece) = self.pieces.get_mut(self.first).filter(|_| count > 0) {
            let length = piece.copy_to(&mut copy).min(count);
            hash.write(copy.get(..length).unwrap_or_default());
            count -= length;
            match piece.offset(length) {
                Ok(rest) if !rest.is_empty() => *piece = rest,
                _ => self.first += 1,
            }
        }
    }

    fn unfilled(&self) -> &[VolatileSlice<'m>] {
        self.pieces.get(self.first..).unwrap_or_default()
    }
}

/// A reader that can read directly into guest memory.
pub trait ReadMemory: Read {
    /// Reads bytes to the front of `window`. Returns the number of bytes, 0 at the end of the stream.
    ///
    /// # Errors
    /// As [`Read::read`].
    fn read_memory(&mut self, window: &ReceiveWindow<'_>) -> io::Result<usize>;
}

impl ReadMemory for &[u8] {
    fn read_memory(&mut self, window: &ReceiveWindow<'_>) -> io::Result<usize> {
        let count = window.store(self);
        *self = self.get(count..).unwrap_or_default();
        Ok(count)
    }
}

/// Implements [`ReadMemory`] for any reader by copying through a small buffer.
#[derive(Debug)]
pub struct CopyingReader<R>(pub R);

impl<R: Read> Read for CopyingReader<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl<R: Read> ReadMemory for CopyingReader<R> {
    fn read_memory(&mut self, window: &ReceiveWindow<'_>) -> io::Result<usize> {
        let mut buffer = [0; 16384];
        let room = buffer.len().min(window.left());
        let count = self.0.read(buffer.get_mut(..room).unwrap_or_default())?;
        Ok(window.store(buffer.get(..count).unwrap_or_default()))
    }
}

/// Copies the page `from` to `into`. Returns true if the copy is all zeros. Guest memory is read once. `more` says that
/// the next page in memory is copied next.
pub(super) fn copy_page(from: &VolatileSlice<'_>, into: &mut [u8; PAGE_BYTES], more: bool) -> bool {
    #[cfg(target_arch = "x86_64")]
    if from.len() == PAGE_BYTES && std::arch::is_x86_feature_detected!("avx2") {
        let guard = from.ptr_guard();
        // SAFETY: the guard's pointer is valid for reads of its length, which is a page; AVX2 is there.
        return unsafe { copy_page_avx2(guard.as_ptr(), into, more) };
    }
    let _ = more;
    from.copy_to(into);
    let (pieces, _) = into.as_chunks::<256>();
    pieces.iter().all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

/// # Safety
/// `from` must be valid for reads of a page; others may write it meanwhile.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_page_avx2(from: *const u8, into: &mut [u8; PAGE_BYTES], more: bool) -> bool {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256,
    };

    /// Guest memory needs no alignment in this process.
    #[derive(Clone, Copy)]
    #[repr(C, packed)]
    struct Chunk([__m256i; 4]);

    let mut any = _mm256_setzero_si256();
    for offset in (0..PAGE_BYTES).step_by(size_of::<Chunk>()) {
        if more {
            // The hardware does not look ahead over the end of a page.
            for line in [0, 64] {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(PAGE_BYTES + offset + line).cast());
            }
        }
        // SAFETY: the caller's promise, and a line that ends inside both pages. Volatile, because the guest may write
        // while we read: what is looked at must be what was copied.
        let line = unsafe { from.add(offset).cast::<Chunk>().read_volatile() };
        let [a, b, c, d] = line.0;
        any = _mm256_or_si256(any, _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)));
        // SAFETY: as above; `into` is a page of ours.
        unsafe { into.as_mut_ptr().add(offset).cast::<Chunk>().write(line) };
    }
    _mm256_testz_si256(any, any) == 1
}

/// Duplicates the inherited descriptor `number`, with close-on-exec.
///
/// # Errors
/// The error of the system, `EBADF` if the descriptor is not open.
pub(super) fn duplicate_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC touches no memory and fails cleanly on numbers that are not open.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
/// Renames a file. Without `replace`, an existing file yields EEXIST. Called by number: not every libc has the
/// function.
pub(super) fn rename(from: &Path, to: &Path, replace: bool) -> nix::Result<()> {
    let flags = if replace { 0 } else { libc::RENAME_NOREPLACE };
    let (here, call) = (libc::AT_FDCWD, libc::SYS_renameat2);
    let renamed = from.with_nix_path(|from| {
        // SAFETY: both paths end with a zero and live during the call.
        to.with_nix_path(|to| unsafe { libc::syscall(call, here, from.as_ptr(), here, to.as_ptr(), flags) })
    })??;
    Errno::result(renamed).map(drop)
}
