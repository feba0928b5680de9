//! Memory whose pages come when somebody touches them: userfaultfd, as postcopy uses it (rules P1.2, P1.4).
//!
//! Whoever touches a page of registered memory that is not there yet waits until it is placed and woken for. The fd can
//! be handed to another process, which then hears of the faults of this one and wakes for them, by addresses of this
//! one. Which page is to come from where is not known here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::Region;
use crate::sys::nonblocking;

/// Why pages can't come when they are touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserfaultError {
    /// The kernel does not let this process have a userfaultfd for its own faults and for those in system calls.
    #[error("no userfaultfd ({0}): allow it in the sandbox, or run `sysctl vm.unprivileged_userfaultfd=1`, or as root")]
    Refused(io::Error),
    /// The kernel can't do it for shared memory and huge pages.
    #[error("this kernel has no userfaultfd for shared memory ({0}): it takes Linux 4.11 or later")]
    Kernel(io::Error),
    /// A region that can't be registered.
    #[error("can't wait for pages of the region at {gpa:#x} ({cause}): use a memfd, /dev/shm or hugetlbfs")]
    Region {
        /// Guest-physical start of the region.
        gpa: u64,
        /// What the system said.
        cause: io::Error,
    },
}

/// A userfaultfd. Closing the last fd of it lets everybody go on who waits, with zeroes where nothing came.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// A new one, for memory of this process.
    ///
    /// # Errors
    /// [`UserfaultError::Refused`] and [`UserfaultError::Kernel`].
    pub fn new() -> Result<Userfault, UserfaultError> {
        let fd = open(libc::O_CLOEXEC | libc::O_NONBLOCK, abi::FEATURE_MISSING_SHMEM | abi::FEATURE_MISSING_HUGETLBFS);
        Ok(Userfault(fd.map_err(|refusal| match refusal {
            Refusal::Fd(error) => UserfaultError::Refused(error),
            Refusal::Features(error) => UserfaultError::Kernel(error),
        })?))
    }

    /// One that another process made, for its memory.
    pub fn from_fd(fd: OwnedFd) -> Userfault {
        Userfault(fd)
    }

    /// Lets the pages of `region`, which nobody has touched yet, come when they are touched. Those that the file behind
    /// it has already are there at once.
    ///
    /// # Errors
    /// [`UserfaultError::Region`].
    pub fn register(&self, region: &Region) -> Result<(), UserfaultError> {
        region.avoid_huge_pages();
        let (start, len) = region.mapped();
        let range = abi::Range { start, len };
        let mut register = abi::Register { range, mode: abi::REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the struct is the one this ioctl reads and writes. The memory stays mapped; accesses may wait.
        unsafe { abi::register(self.0.as_raw_fd(), &mut register) }
            .map_err(|errno| UserfaultError::Region { gpa: region.gpa(), cause: errno.into() })?;
        Ok(())
    }

    /// Takes that back: whoever waits goes on, and finds zeroes where nothing came.
    ///
    /// # Errors
    /// [`UserfaultError::Region`].
    pub fn unregister(&self, region: &Region) -> Result<(), UserfaultError> {
        let (start, len) = region.mapped();
        // SAFETY: the struct is the one this ioctl reads.
        unsafe { abi::unregister(self.0.as_raw_fd(), &mut abi::Range { start, len }) }
            .map_err(|errno| UserfaultError::Region { gpa: region.gpa(), cause: errno.into() })?;
        Ok(())
    }

    /// Lets those go on who wait for pages of `len` bytes at `start`, an address in the process that made this; both are
    /// multiples of its page size.
    ///
    /// # Errors
    /// What the system says.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: the struct is the one this ioctl reads; no memory is changed.
        unsafe { abi::wake(self.0.as_raw_fd(), &mut abi::Range { start, len }) }?;
        Ok(())
    }

    /// Places `page`, whole pages of `region` (huge ones where it is made of those), at `offset` in one go, and wakes those
    /// of this process who wait for it; false if something is there already.
    ///
    /// # Errors
    /// `InvalidInput` for bytes that are not whole pages inside the region; what the system says.
    pub fn place(&self, region: &Region, offset: u64, page: &[u8]) -> io::Result<bool> {
        let len = page.len() as u64;
        if !region.holds(offset, len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.place_at(region.host_ptr().addr() as u64 + offset, page)
    }

    /// The same at `address` in the process that made this, which may be another one. There is nothing to be placed but
    /// where memory is registered and not there yet: `NotFound` elsewhere.
    pub(crate) fn place_at(&self, address: u64, page: &[u8]) -> io::Result<bool> {
        let (src, len) = (page.as_ptr().addr() as u64, page.len() as u64);
        loop {
            let mut copy = abi::Copy { dst: address, src, len, mode: 0, copied: 0 };
            // SAFETY: the struct is the one this ioctl reads and writes; the source is a slice of `len` bytes, and the
            // destination is registered, so guest memory, which is only looked at through volatile views.
            match unsafe { abi::copy(self.0.as_raw_fd(), &mut copy) } {
                Ok(_) => return Ok(true),
                Err(Errno::EEXIST) => return Ok(false),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The next address that somebody waits for, in the process that made this; `None` if nobody waits. The fd is
    /// readable when somebody does.
    ///
    /// # Errors
    /// What the system says.
    pub fn fault(&self) -> io::Result<Option<u64>> {
        const EVENT_PAGEFAULT: u8 = 0x12;
        let mut message = [0; 32];
        loop {
            match nonblocking::read(self.0.as_fd(), &mut message) {
                Ok(_) if message.first() == Some(&EVENT_PAGEFAULT) => {
                    let address = message.get(16..24).and_then(|bytes| bytes.try_into().ok());
                    return Ok(address.map(u64::from_ne_bytes));
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

/// What it takes, beside the system call that makes one, to have the pages of one's memory come: ioctls.
pub(crate) const IOCTLS: [libc::Ioctl; 4] = [
    nix::request_code_readwrite!(0xaa, 0x3f, size_of::<abi::Api>()),
    nix::request_code_readwrite!(0xaa, 0x00, size_of::<abi::Register>()),
    nix::request_code_read!(0xaa, 0x01, size_of::<abi::Range>()),
    nix::request_code_read!(0xaa, 0x02, size_of::<abi::Range>()),
];

/// Why there is no userfaultfd.
pub(crate) enum Refusal {
    /// The process may not have one.
    Fd(io::Error),
    /// The kernel lacks features.
    Features(io::Error),
}

/// A userfaultfd with `features`.
pub(crate) fn open(flags: i32, features: u64) -> Result<OwnedFd, Refusal> {
    // SAFETY: userfaultfd takes one integer and returns a new fd or an error.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
    let fd = fd.map_err(|errno| Refusal::Fd(errno.into()))?;
    // SAFETY: the fd is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = abi::Api { api: abi::API, features, ioctls: 0 };
    // SAFETY: the struct is the one this ioctl reads and writes.
    unsafe { abi::api(fd.as_raw_fd(), &mut api) }.map_err(|errno| Refusal::Features(errno.into()))?;
    Ok(fd)
}

/// The kernel's numbers and structures (linux/userfaultfd.h).
#[allow(unreachable_pub, reason = "nix's macros make public functions")]
pub(crate) mod abi {
    pub const API: u64 = 0xaa;
    pub const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
    pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
    pub const REGISTER_MODE_MISSING: u64 = 1;

    #[repr(C)]
    #[derive(Debug)]
    pub struct Api {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct Range {
        pub start: u64,
        pub len: u64,
    }

    #[repr(C)]
    #[derive(Debug)]
    pub struct Register {
        pub range: Range,
        pub mode: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    #[derive(Debug)]
    pub struct Copy {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub copied: i64,
    }

    const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Copy>() == 40);

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    nix::ioctl_read!(wake, 0xaa, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
}
