//! One region of guest memory: a mapping of part of a file, with its address in the guest and in the front-end.
//!
//! The set of regions and the translation between address spaces are in [`super::Memory`].

use std::any::Any;
use std::ffi::CString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, MmapRegion, VolatileSlice};

use super::extent::{Extent, HoleSearch, OwnPageTable};
use super::{GuestAddress, Iova, LOG_PAGE, MemoryError, PageRange, UserAddress};

/// A shared, writable mapping of guest memory.
///
/// If the file is truncated after [`Region::map`] has checked its size, accesses raise SIGBUS. Sealed memfds cannot be
/// truncated.
pub struct Region {
    gpa: GuestAddress,
    size: u64,
    user_addr: UserAddress,
    /// Address of the first byte in this process. The mapping consists of whole pages and may begin before it.
    host: *mut u8,
    mapping: Arc<HostMapping>,
    page: u64,
    backing: Backing,
}

/// The mapping that holds the memory of a region.
enum HostMapping {
    Own(MmapRaw),
    /// Mapped by another library, until the owner is dropped.
    Other {
        start: *mut u8,
        len: usize,
        _owner: Arc<dyn Any + Send + Sync>,
    },
}

// SAFETY: the pointer is only returned, never dereferenced here; its memory stays mapped until the owner, which is
// `Send`, is dropped.
unsafe impl Send for HostMapping {}
// SAFETY: as for `Send`; the owner is `Sync`.
unsafe impl Sync for HostMapping {}

impl HostMapping {
    fn as_mut_ptr(&self) -> *mut u8 {
        match self {
            HostMapping::Own(mapping) => mapping.as_mut_ptr(),
            HostMapping::Other { start, .. } => *start,
        }
    }

    fn len(&self) -> usize {
        match self {
            HostMapping::Own(mapping) => mapping.len(),
            HostMapping::Other { len, .. } => *len,
        }
    }
}

/// The origin of a region's memory.
enum Backing {
    Unknown,
    /// A file, kept to share the region with devices.
    Shared(SharedFile),
    /// Anonymous memory of this process alone.
    Private(OwnPageTable),
}

/// The file of a shared region.
struct SharedFile {
    fd: OwnedFd,
    offset: u64,
    holes: HoleSearch,
}

// SAFETY: the pointers are to memory that `mapping` keeps mapped, and all access to it is volatile or atomic, as needed
// for memory that other threads and processes write.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `size` bytes of `fd` from `mmap_offset` as the region at `gpa` of the guest and at `user_addr` of the
    /// front-end.
    ///
    /// The fd may be closed afterwards. Memfds, files and hugetlbfs work. Offsets need no alignment.
    ///
    /// # Errors
    /// [`MemoryError::BadRange`] and [`MemoryError::FileTooSmall`] before anything is mapped, [`MemoryError::Map`] if
    /// the system refuses (rule M1.5).
    pub fn map(
        fd: BorrowedFd<'_>,
        gpa: GuestAddress,
        size: u64,
        user_addr: UserAddress,
        mmap_offset: u64,
    ) -> Result<Region, MemoryError> {
        let bad = MemoryError::BadRange { gpa, size };
        if size == 0 || gpa.checked_add(size).is_none() || user_addr.checked_add(size).is_none() {
            return Err(bad);
        }
        let Some(end) = mmap_offset.checked_add(size) else { return Err(bad) };
        let refused = |source: io::Error| MemoryError::Map { gpa, size, source };
        let stat = fstat(fd).map_err(|e| refused(e.into()))?;
        let file_size = stat.st_size as u64;
        let regular = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
        if regular && end > file_size {
            return Err(MemoryError::FileTooSmall { gpa, offset: mmap_offset, end, file_size });
        }
        let page = mapping_unit(fd).map_err(refused)?;
        let start = mmap_offset - mmap_offset % page;
        let (Some(stop), Ok(skip)) = (end.checked_next_multiple_of(page), usize::try_from(mmap_offset - start)) else {
            return Err(bad);
        };
        let Ok(len) = usize::try_from(stop - start) else { return Err(bad) };
        let mapping = MmapOptions::new().offset(start).len(len).map_raw(fd.as_raw_fd()).map_err(refused)?;
        let host = mapping.as_mut_ptr().wrapping_add(skip);
        Ok(Region {
            gpa,
            size,
            user_addr,
            host,
            mapping: Arc::new(HostMapping::Own(mapping)),
            page,
            backing: Backing::Unknown,
        })
    }

    /// The region at address `at`, of guest and front-end, that consists of `size` bytes of this one from `offset`.
    /// Both share the mapping.
    pub(super) fn part(&self, at: Iova, offset: u64, size: u64) -> Result<Region, MemoryError> {
        if size == 0 || !self.holds(offset, size) || at.checked_add(size).is_none() {
            return Err(MemoryError::BadRange { gpa: GuestAddress(at.0), size });
        }
        let host = self.host.wrapping_add(offset as usize);
        Ok(Region {
            gpa: GuestAddress(at.0),
            size,
            user_addr: UserAddress(at.0),
            host,
            mapping: self.mapping.clone(),
            page: self.page,
            backing: Backing::Unknown,
        })
    }

    /// A region of `size` bytes at `at` made of parts: region, offset and length in bytes. Their pages are mapped a
    /// second time, one after the other.
    ///
    /// # Errors
    /// [`MemoryError::Scattered`] if parts do not join at page boundaries, [`MemoryError::BadRange`],
    /// [`MemoryError::Map`].
    pub(super) fn join(at: Iova, size: u64, parts: &[(&Region, u64, u64)]) -> Result<Region, MemoryError> {
        let scattered = MemoryError::Scattered { iova: at, len: size };
        let bad = MemoryError::BadRange { gpa: GuestAddress(at.0), size };
        let page = LOG_PAGE as usize;
        let skip = at.0 as usize % page;
        let (Ok(size_here), Some(_)) = (usize::try_from(size), at.checked_add(size)) else { return Err(bad) };
        let Some(len) = size_here.checked_add(skip).and_then(|end| end.checked_next_multiple_of(page)) else {
            return Err(bad);
        };
        let end = skip + size_here;
        let refused = |source| MemoryError::Map { gpa: GuestAddress(at.0), size, source };
        let mapping = MmapRaw::from(MmapOptions::new().len(len).map_anon().map_err(refused)?);
        let mut from = skip;
        for &(region, offset, bytes) in parts {
            let host = region.host.wrapping_add(offset as usize);
            let (into, to) = (from % page, from.saturating_add(bytes as usize));
            // Only the first part may begin, and only the last may end, in the middle of a page.
            let whole = (into == 0 || from == skip) && (to.is_multiple_of(page) || to == end);
            if !whole || to > end || host.addr() % page != into || !region.holds(offset, bytes) {
                return Err(scattered);
            }
            let (old, new) = (host.wrapping_sub(into), mapping.as_mut_ptr().wrapping_add(from - into));
            let span = (to - (from - into)).next_multiple_of(page);
            let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: `old` is the start of a page in a shared mapping of at least `span` bytes from there, as mappings
            // consist of whole pages. An old length of 0 leaves it in place and maps it a second time. `new` and `span`
            // bytes are inside `mapping`, which is not shared yet and unmaps its range when it is dropped.
            let moved = unsafe { libc::mremap(old.cast(), 0, span, how, new.cast::<libc::c_void>()) };
            if moved == libc::MAP_FAILED {
                return Err(refused(io::Error::last_os_error()));
            }
            from = to;
        }
        if size == 0 || from != end {
            return Err(scattered);
        }
        let host = mapping.as_mut_ptr().wrapping_add(skip);
        Ok(Region {
            gpa: GuestAddress(at.0),
            size,
            user_addr: UserAddress(at.0),
            host,
            mapping: Arc::new(HostMapping::Own(mapping)),
            page: LOG_PAGE,
            backing: Backing::Unknown,
        })
    }

    /// Creates a region of zeros in a new sealed memfd, which it keeps to share it with devices.
    ///
    /// # Errors
    /// [`MemoryError::BadRange`], or [`MemoryError::Map`] if the system refuses.
    pub fn create(gpa: GuestAddress, size: u64) -> Result<Region, MemoryError> {
        let fd = sealed_memfd("guest", size).map_err(|source| MemoryError::Map { gpa, size, source })?;
        Region::share(fd, gpa, size, 0)
    }

    /// Maps a region of this process's own guest memory and keeps `fd` to share it with devices. Its front-end address
    /// is its address in this process.
    ///
    /// # Errors
    /// As [`Region::map`].
    pub fn share(fd: OwnedFd, gpa: GuestAddress, size: u64, mmap_offset: u64) -> Result<Region, MemoryError> {
        let mut region = Region::map(fd.as_fd(), gpa, size, UserAddress(0), mmap_offset)?;
        region.user_addr = UserAddress(region.host_ptr() as u64);
        region.backing = Backing::Shared(SharedFile { holes: HoleSearch::of(fd.as_fd()), fd, offset: mmap_offset });
        Ok(region)
    }

    /// The fd of a shared region and the region's offset in it, bytes. `None` if the region does not keep an fd
    /// ([`Region::share`]).
    pub fn shared(&self) -> Option<(BorrowedFd<'_>, u64)> {
        match &self.backing {
            Backing::Shared(shared) => Some((shared.fd.as_fd(), shared.offset)),
            _ => None,
        }
    }

    /// The extent that begins `offset` bytes into the region.
    ///
    /// Holes are found in private anonymous memory, and in regions that keep their file ([`Region::share`]) on tmpfs
    /// (memfds), hugetlbfs, ext4, XFS and Btrfs; the search moves the file position of the fd. Other regions are all
    /// data.
    pub fn extent(&self, offset: u64) -> Extent {
        let size = self.size.saturating_sub(offset);
        match &self.backing {
            Backing::Shared(shared) => {
                shared.holes.extent(shared.fd.as_fd(), shared.offset + offset..shared.offset + self.size)
            }
            Backing::Private(table) => table.extent(self.host.addr() as u64 + offset, size),
            Backing::Unknown => Extent { len: size, hole: false },
        }
    }

    /// The region of a mapping of rust-vmm's `vm-memory`, at `gpa` of the guest. Its front-end address is its address
    /// in this process. A shared mapping of a file can be shared with devices.
    pub(super) fn of_mapping<B: Bitmap + Send + Sync + 'static>(
        gpa: GuestAddress,
        other: Arc<MmapRegion<B>>,
    ) -> Result<Region, MemoryError> {
        let (start, len) = (other.as_ptr(), other.size());
        let size = len as u64;
        let refused = |source: io::Error| MemoryError::Map { gpa, size, source };
        if size == 0 || gpa.checked_add(size).is_none() {
            return Err(MemoryError::BadRange { gpa, size });
        }
        let mut page = LOG_PAGE;
        // vm-memory knows the flags only of mappings that it has made itself.
        let backing = match other.file_offset() {
            Some(file) if other.owned() && other.flags() & libc::MAP_SHARED != 0 => {
                let fd = OwnedFd::from(file.file().try_clone().map_err(refused)?);
                page = mapping_unit(fd.as_fd()).map_err(refused)?;
                Backing::Shared(SharedFile { holes: HoleSearch::of(fd.as_fd()), fd, offset: file.start() })
            }
            None if other.owned() && other.flags() & libc::MAP_PRIVATE != 0 => {
                Backing::Private(OwnPageTable::open().map_err(refused)?)
            }
            _ => Backing::Unknown,
        };
        let mapping = Arc::new(HostMapping::Other { start, len, _owner: other });
        Ok(Region { gpa, size, user_addr: UserAddress(start.addr() as u64), host: start, mapping, page, backing })
    }

    /// Guest-physical address of the first byte.
    pub fn gpa(&self) -> GuestAddress {
        self.gpa
    }

    /// Size, bytes; never 0.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The guest-physical addresses.
    pub(super) fn range(&self) -> Range<u64> {
        self.gpa.0..self.gpa.0 + self.size
    }

    /// The pages of the guest that are completely in the region.
    pub fn pages(&self) -> PageRange {
        PageRange::inside(self.gpa, self.size)
    }

    /// Address of the first byte in the front-end's address space.
    pub fn user_addr(&self) -> UserAddress {
        self.user_addr
    }

    /// Address of the first byte in this process. It is valid for [`Region::size`] bytes while the region exists.
    #[inline]
    pub fn host_ptr(&self) -> *mut u8 {
        self.host
    }

    /// Address in this process and length of the region's mapping, which consists of whole pages of its file.
    pub(crate) fn mapped(&self) -> (u64, u64) {
        (self.mapping.as_mut_ptr().addr() as u64, self.mapping.len() as u64)
    }

    /// Page size of the region's file, bytes. A [`Userfault`](super::Userfault) places pages of this size.
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// Advises the kernel not to merge pages into huge ones, so that postcopy can place each page by itself.
    pub(super) fn avoid_huge_pages(&self) {
        let (start, len) = (self.mapping.as_mut_ptr().cast(), self.mapping.len());
        // SAFETY: the range is this mapping, and the advice changes no contents. The kernel refuses it where it does
        // not apply.
        unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
    }

    /// Allocates the memory of `range` (offsets, bytes) for writing and keeps the contents.
    pub(super) fn populate(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, LOG_PAGE, libc::MADV_POPULATE_WRITE)
    }

    /// Advises the system to use huge pages for the whole huge pages in `range` (offsets, bytes).
    pub(super) fn advise_huge_pages(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(range, 2 << 20, libc::MADV_HUGEPAGE)
    }

    /// Gives an advice that changes no contents, for the part of `range` (offsets, bytes) that consists of whole
    /// `unit`s (bytes) of addresses in this process.
    fn advise(&self, range: Range<u64>, unit: u64, advice: libc::c_int) -> io::Result<()> {
        if range.end > self.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let base = self.host.addr() as u64;
        let start = (base + range.start).next_multiple_of(unit);
        let end = (base + range.end) / unit * unit;
        if start >= end {
            return Ok(());
        }
        let at = self.host.with_addr(start as usize).cast();
        // SAFETY: the range is inside this mapping, and the caller's advice changes no contents.
        match unsafe { libc::madvise(at, (end - start) as usize, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Replaces the file's memory by zeroed private memory: reads return zero, and writes are seen by this process
    /// alone.
    pub(crate) fn blank(&self) -> io::Result<()> {
        let (start, len) = (self.mapping.as_mut_ptr().cast(), self.mapping.len());
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: exactly this mapping is replaced, atomically, by one of the same length that can be used and unmapped
        // like it. Its contents change for concurrent readers, as guest memory may at any time.
        match unsafe { libc::mmap(start, len, protection, flags, -1, 0) } {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Returns true if `len` bytes from `offset` are inside the region.
    #[inline]
    pub(crate) fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// A view of `len` bytes from `offset`; `None` if they are not inside the region.
    #[inline]
    pub fn slice(&self, offset: u64, len: u64) -> Option<VolatileSlice<'_>> {
        // SAFETY: `holds` keeps the range inside the mapping, which exists as long as the view's borrow of `self`. All
        // access is by volatile or atomic operations, as memory shared with a guest needs.
        self.holds(offset, len)
            .then(|| unsafe { VolatileSlice::new(self.host_ptr().wrapping_add(offset as usize), len as usize) })
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa {:#x} size {:#x} user {:#x}", self.gpa.0, self.size, self.user_addr)
    }
}

/// Creates a memfd of `size` bytes whose size is sealed, to be shared with a peer that maps it.
///
/// # Errors
/// The error of the system.
pub fn sealed_memfd(name: &str, size: u64) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let len = i64::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    nix::unistd::ftruncate(&fd, len)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
    Ok(fd)
}

/// Required alignment of a mapping's file offset and length, bytes: the huge page size on hugetlbfs, otherwise 4096.
fn mapping_unit(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let fs = fstatfs(fd)?;
    let huge = fs.filesystem_type() == HUGETLBFS_MAGIC;
    let unit = if huge { fs.block_size() as u64 } else { 4096 };
    Ok(unit.max(1))
}
