//! Errors of guest memory, its translation and its page faults.

use std::io;

use super::{GuestAddress, IotlbMiss, Iova, UserAddress};

/// An error of guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The mapping is outside the file (rule M1.5).
    #[error(
        "region at {:#x}: needs bytes {offset:#x}..{end:#x} of a file of {file_size:#x} bytes: \
         pass an fd of the region's full size (rule M1.5)",
        gpa.0
    )]
    FileTooSmall {
        /// Guest-physical start of the region.
        gpa: GuestAddress,
        /// Offset into the file, bytes.
        offset: u64,
        /// End of the mapping in the file, bytes.
        end: u64,
        /// Size of the file, bytes.
        file_size: u64,
    },
    /// A region of 0 bytes, or one whose end exceeds the 64-bit address space (rule M1.4).
    #[error("region at {:#x}: size {size:#x} is 0 or wraps around the address space (rule M1.4)", gpa.0)]
    BadRange {
        /// Guest-physical start of the region.
        gpa: GuestAddress,
        /// Size, bytes.
        size: u64,
    },
    /// Two regions have addresses in common (rule M1.4).
    #[error("regions at {:#x} and {:#x} overlap in {space} addresses (rule M1.4)", first.0, second.0)]
    Overlap {
        /// Guest-physical start of the first region.
        first: GuestAddress,
        /// Guest-physical start of the second region.
        second: GuestAddress,
        /// Address space: "guest-physical" or "front-end".
        space: &'static str,
    },
    /// The operating system refused the mapping.
    #[error("region at {:#x}: cannot map {size:#x} bytes", gpa.0)]
    Map {
        /// Guest-physical start of the region.
        gpa: GuestAddress,
        /// Size, bytes.
        size: u64,
        /// Error of the system.
        source: io::Error,
    },
    /// A part of a ring behind an IOMMU that cannot be mapped contiguously.
    #[error(
        "ring area of {len:#x} bytes at I/O virtual address {iova:#x}: it is scattered over guest memory in pieces \
         other than pages of 4 KiB: translate whole pages (rule T4.1)"
    )]
    Scattered {
        /// I/O virtual address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// A guest-physical range that is not completely inside guest memory.
    #[error("guest-physical range {:#x} + {len:#x} is not inside guest memory", gpa.0)]
    NotMapped {
        /// Start of the range.
        gpa: GuestAddress,
        /// Length, bytes.
        len: u64,
    },
    /// A range of the front-end's address space that is not completely inside guest memory.
    #[error("front-end range {user_addr:#x} + {len:#x} is not inside guest memory")]
    UserNotMapped {
        /// Start of the range.
        user_addr: UserAddress,
        /// Length, bytes.
        len: u64,
    },
    /// A range of the bytes of a request that its buffers do not have.
    #[error("range {offset:#x} + {len:#x} of a request is not inside its buffers")]
    OutsideRequest {
        /// Start of the range, bytes from the first byte of the request.
        offset: u64,
        /// Length, bytes.
        len: u64,
    },
    /// A range of I/O virtual addresses that exceeds the 64-bit address space.
    #[error("I/O virtual range {iova:#x} + {len:#x} is not inside guest memory")]
    IovaWraps {
        /// Start of the range.
        iova: Iova,
        /// Length, bytes.
        len: u64,
    },
    /// The IOTLB has no translation, or one that does not permit the access. The operation can be repeated when there is
    /// one.
    #[error("I/O virtual address {iova:#x}: no translation for {access:?}", iova = .0.iova, access = .0.access)]
    Untranslated(IotlbMiss),
    /// A translation of an empty range, or of one that exceeds the 64-bit address space.
    #[error("translation of {size:#x} bytes at {iova:#x} to {user:#x}: the range is empty or wraps around (rule T2.2)")]
    BadTranslation {
        /// I/O virtual address.
        iova: Iova,
        /// Length, bytes.
        size: u64,
        /// Address of the front-end.
        user: UserAddress,
    },
    /// The permission of a translation has unknown bits.
    #[error(
        "translation at {iova:#x}: permission {permission} is invalid, only bits 0 (read) and 1 (write) are known \
         (rule T2.2)"
    )]
    BadPermission {
        /// I/O virtual address.
        iova: Iova,
        /// Permission in the message.
        permission: u8,
    },
    /// The kernel does not permit this process a userfaultfd for its own faults and for those in system calls.
    #[error(
        "userfaultfd refused (allow the call in the sandbox, set `sysctl vm.unprivileged_userfaultfd=1`, or run as \
         root)"
    )]
    UserfaultRefused(#[source] io::Error),
    /// The kernel does not support userfaultfd for shared memory and huge pages.
    #[error("userfaultfd for shared memory is not supported by this kernel (use Linux 4.11 or later)")]
    UserfaultKernel(#[source] io::Error),
    /// A region that cannot be registered with a userfaultfd.
    #[error("region at {:#x}: cannot be registered with userfaultfd (use a memfd, /dev/shm or hugetlbfs)", gpa.0)]
    UserfaultRegion {
        /// Guest-physical start of the region.
        gpa: GuestAddress,
        /// Error of the system.
        source: io::Error,
    },
}
