//! userfaultfd as postcopy uses it (rules P1.2, P1.4): memory whose pages are placed when a thread first accesses them.
//!
//! A thread that accesses a missing page of registered memory waits until the page is placed and the thread is woken.
//! The fd can be passed to another process, which then reads the faults of the process that made it and wakes its
//! threads, by addresses of that process. Not here: fetching pages from the source.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{FaultAddress, MemoryError, Region};
use crate::abi::linux::{
    UFFD_API, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFDIO_REGISTER_MODE_MISSING, UffdioApi,
    UffdioCopy, UffdioRange, UffdioRegister,
};
use crate::sys::nonblocking;

/// A userfaultfd. When the last fd of it is closed, waiting threads continue, with zeros in pages that were not placed.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Creates a userfaultfd for memory of this process.
    ///
    /// # Errors
    /// [`MemoryError::UserfaultRefused`] and [`MemoryError::UserfaultKernel`].
    pub fn new() -> Result<Userfault, MemoryError> {
        let fd = open(libc::O_CLOEXEC | libc::O_NONBLOCK, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS);
        Ok(Userfault(fd.map_err(|refusal| match refusal {
            Refusal::Fd(error) => MemoryError::UserfaultRefused(error),
            Refusal::Features(error) => MemoryError::UserfaultKernel(error),
        })?))
    }

    /// A userfaultfd that another process made for its own memory.
    pub fn from_fd(fd: OwnedFd) -> Userfault {
        Userfault(fd)
    }

    /// Registers `region` for missing pages, before its first access. Pages that its file already has are not missing.
    ///
    /// # Errors
    /// [`MemoryError::UserfaultRegion`] if the kernel refuses the region.
    pub fn register(&self, region: &Region) -> Result<(), MemoryError> {
        region.avoid_huge_pages();
        let (start, len) = region.mapped();
        let range = UffdioRange { start, len };
        let mut register = UffdioRegister { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the struct is the one this ioctl reads and writes. The memory stays mapped; accesses may wait.
        unsafe { ioctls::register(self.0.as_raw_fd(), &mut register) }
            .map_err(|errno| MemoryError::UserfaultRegion { gpa: region.gpa(), source: errno.into() })?;
        Ok(())
    }

    /// Ends the registration of `region`. Waiting threads continue, with zeros in pages that were not placed.
    ///
    /// # Errors
    /// [`MemoryError::UserfaultRegion`] if the kernel refuses the region.
    pub fn unregister(&self, region: &Region) -> Result<(), MemoryError> {
        let (start, len) = region.mapped();
        // SAFETY: the struct is the one this ioctl reads.
        unsafe { ioctls::unregister(self.0.as_raw_fd(), &mut UffdioRange { start, len }) }
            .map_err(|errno| MemoryError::UserfaultRegion { gpa: region.gpa(), source: errno.into() })?;
        Ok(())
    }

    /// Wakes the threads that wait for pages in `len` bytes at `start`, an address in the process that made the
    /// userfaultfd. Both are multiples of the page size.
    ///
    /// # Errors
    /// The error of the system.
    pub fn wake(&self, start: FaultAddress, len: u64) -> io::Result<()> {
        // SAFETY: the struct is the one this ioctl reads; no memory is changed.
        unsafe { ioctls::wake(self.0.as_raw_fd(), &mut UffdioRange { start: start.0, len }) }?;
        Ok(())
    }

    /// Places `page` at `offset` of `region` atomically and wakes the threads of this process that wait for it. `page`
    /// is one or more whole pages, huge ones if the region has huge pages. Returns false if a page is there already.
    ///
    /// # Errors
    /// `InvalidInput` for bytes that are not whole pages inside the region, otherwise the error of the system.
    pub fn place(&self, region: &Region, offset: u64, page: &[u8]) -> io::Result<bool> {
        let len = page.len() as u64;
        if !region.holds(offset, len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.place_at(FaultAddress(region.host_ptr().addr() as u64 + offset), page)
    }

    /// As [`Userfault::place`], at `address` of the process that made the userfaultfd, which may be another process.
    ///
    /// # Errors
    /// `NotFound` where no registered memory is, otherwise the error of the system.
    pub(crate) fn place_at(&self, address: FaultAddress, page: &[u8]) -> io::Result<bool> {
        let (src, len) = (page.as_ptr().addr() as u64, page.len() as u64);
        loop {
            let mut copy = UffdioCopy { dst: address.0, src, len, mode: 0, copied: 0 };
            // SAFETY: the struct is the one this ioctl reads and writes. The source is a slice of `len` bytes. The
            // destination is registered, so it is guest memory, which is accessed through volatile views alone.
            match unsafe { ioctls::copy(self.0.as_raw_fd(), &mut copy) } {
                Ok(_) => return Ok(true),
                Err(Errno::EEXIST) => return Ok(false),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The address of the next unread fault, in the process that made the userfaultfd; `None` if there is none. The fd
    /// is readable while there is one.
    ///
    /// # Errors
    /// The error of the system.
    pub fn fault(&self) -> io::Result<Option<FaultAddress>> {
        const EVENT_PAGEFAULT: u8 = 0x12;
        let mut message = [0; 32];
        loop {
            match nonblocking::read(self.0.as_fd(), &mut message) {
                Ok(_) if message.first() == Some(&EVENT_PAGEFAULT) => {
                    let address = message.get(16..24).and_then(|bytes| bytes.try_into().ok());
                    return Ok(address.map(|bytes| FaultAddress(u64::from_ne_bytes(bytes))));
                }
                Ok(0) | Err(Errno::EAGAIN) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The ioctls that a sandbox must permit for a process that registers its own memory, beside the userfaultfd system
/// call.
pub(crate) const IOCTLS: [libc::Ioctl; 4] = [
    nix::request_code_readwrite!(0xaa, 0x3f, size_of::<UffdioApi>()),
    nix::request_code_readwrite!(0xaa, 0x00, size_of::<UffdioRegister>()),
    nix::request_code_read!(0xaa, 0x01, size_of::<UffdioRange>()),
    nix::request_code_read!(0xaa, 0x02, size_of::<UffdioRange>()),
];

/// The step at which the kernel refused a userfaultfd.
pub(crate) enum Refusal {
    /// The system call.
    Fd(io::Error),
    /// The request for features.
    Features(io::Error),
}

/// Creates a userfaultfd with `features`.
///
/// # Errors
/// [`Refusal`] with the error of the system.
pub(crate) fn open(flags: i32, features: u64) -> Result<OwnedFd, Refusal> {
    // SAFETY: userfaultfd takes one integer and returns a new fd or an error.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
    let fd = fd.map_err(|errno| Refusal::Fd(errno.into()))?;
    // SAFETY: the system call has just opened the fd for this process, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the struct is the one this ioctl reads and writes.
    unsafe { ioctls::api(fd.as_raw_fd(), &mut api) }.map_err(|errno| Refusal::Features(errno.into()))?;
    Ok(fd)
}

/// The ioctls of a userfaultfd.
#[allow(unreachable_pub, reason = "nix's macros make public functions")]
pub(crate) mod ioctls {
    use crate::abi::linux::{UffdioApi, UffdioCopy, UffdioRange, UffdioRegister};

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, UffdioApi);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, UffdioRegister);
    nix::ioctl_read!(unregister, 0xaa, 0x01, UffdioRange);
    nix::ioctl_read!(wake, 0xaa, 0x02, UffdioRange);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, UffdioCopy);
}
