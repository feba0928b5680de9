//! Kernel interfaces besides vhost: userfaultfd, the scan of page tables, asynchronous I/O, taps.
//!
//! The ioctls themselves are where they are called, because calling them is unsafe.
#![allow(unreachable_pub, reason = "the macro `wire` declares public structures")]

use super::wire;

/// userfaultfd(2) for the faults of this process's own code only.
pub(crate) const UFFD_USER_MODE_ONLY: i32 = 1;
/// Version of the userfaultfd interface.
pub(crate) const UFFD_API: u64 = 0xaa;
/// Faults of write-protected pages.
pub(crate) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Missing pages of hugetlbfs.
pub(crate) const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// Missing pages of shared memory.
pub(crate) const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Write-protection of shared memory and hugetlbfs.
pub(crate) const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Write-protection of pages that are not populated.
pub(crate) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel resolves faults of write-protected pages.
pub(crate) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Registers a range for faults of missing pages.
pub(crate) const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
/// Registers a range for write-protection.
pub(crate) const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// Protects a range; without it, protection ends.
pub(crate) const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// Write-protects the pages that a scan finds.
pub(crate) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// Fails unless the range is registered for asynchronous write-protection.
pub(crate) const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Category of pages written since they were write-protected.
pub(crate) const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// Reads at an offset.
pub(crate) const IOCB_CMD_PREAD: u16 = 0;
/// Signals an eventfd at completion.
pub(crate) const IOCB_FLAG_RESFD: u32 = 1 << 0;
/// Compares two open file descriptions.
pub(crate) const KCMP_FILE: i32 = 0;

wire! {
    /// `struct uffdio_api` (`linux/userfaultfd.h`).
    UffdioApi, 24 bytes {
        /// [`UFFD_API`].
        api: u64 => 0,
        /// Requested features, replaced by all that the kernel has.
        features: u64 => 8,
        /// Set by the kernel: the ioctls of the fd.
        ioctls: u64 => 16,
    }

    /// `struct uffdio_range`.
    UffdioRange, 16 bytes {
        /// Address of the first byte, a multiple of the page size.
        start: u64 => 0,
        /// Bytes, a multiple of the page size.
        len: u64 => 8,
    }

    /// `struct uffdio_register`.
    UffdioRegister, 32 bytes {
        /// The range.
        range: UffdioRange => 0,
        /// `UFFDIO_REGISTER_MODE_*`.
        mode: u64 => 16,
        /// Set by the kernel: the ioctls of the range.
        ioctls: u64 => 24,
    }

    /// `struct uffdio_copy`.
    UffdioCopy, 40 bytes {
        /// Address of the missing pages.
        dst: u64 => 0,
        /// Address of their contents.
        src: u64 => 8,
        /// Bytes, a multiple of the page size.
        len: u64 => 16,
        /// `UFFDIO_COPY_MODE_*`.
        mode: u64 => 24,
        /// Set by the kernel: the bytes copied, or a negative error number.
        copied: i64 => 32,
    }

    /// `struct uffdio_writeprotect`.
    UffdioWriteprotect, 24 bytes {
        /// The range.
        range: UffdioRange => 0,
        /// `UFFDIO_WRITEPROTECT_MODE_*`.
        mode: u64 => 16,
    }

    /// `struct pm_scan_arg` (`linux/fs.h`).
    #[derive(Default)]
    PmScanArg, 96 bytes {
        /// Size of this structure, bytes.
        size: u64 => 0,
        /// `PM_SCAN_*`.
        flags: u64 => 8,
        /// Address of the first byte to scan.
        start: u64 => 16,
        /// Address after the last byte to scan.
        end: u64 => 24,
        /// Set by the kernel: the address at which the scan ended.
        walk_end: u64 => 32,
        /// Address of an array of [`PageRegion`].
        vec: u64 => 40,
        /// Length of the array.
        vec_len: u64 => 48,
        /// Maximum number of pages to find; 0 for no limit.
        max_pages: u64 => 56,
        /// Categories whose meaning is inverted.
        category_inverted: u64 => 64,
        /// Categories that a page must have.
        category_mask: u64 => 72,
        /// Categories of which a page must have one.
        category_anyof_mask: u64 => 80,
        /// Categories to return.
        return_mask: u64 => 88,
    }

    /// `struct page_region` (`linux/fs.h`).
    #[derive(Default)]
    PageRegion, 24 bytes {
        /// Address of the first byte.
        start: u64 => 0,
        /// Address after the last byte.
        end: u64 => 8,
        /// Categories of the pages.
        categories: u64 => 16,
    }

    /// `struct iocb`, little-endian (`linux/aio_abi.h`).
    #[derive(Default)]
    Iocb, 64 bytes {
        /// Returned with the completion.
        data: u64 => 0,
        /// Used by the kernel.
        key: u32 => 8,
        /// Flags of the read or write.
        rw_flags: u32 => 12,
        /// `IOCB_CMD_*`.
        opcode: u16 => 16,
        /// Priority.
        priority: i16 => 18,
        /// The file.
        fd: u32 => 20,
        /// Address of the buffer.
        buffer: u64 => 24,
        /// Size of the buffer, bytes.
        bytes: u64 => 32,
        /// Offset in the file, bytes.
        offset: i64 => 40,
        /// 0.
        reserved: u64 => 48,
        /// `IOCB_FLAG_*`.
        flags: u32 => 56,
        /// The eventfd to signal.
        signalled: u32 => 60,
    }

    /// `struct ifreq` as TUNSETIFF uses it (`linux/if.h`).
    InterfaceRequest, 40 bytes {
        /// Name of the interface, ends with a zero.
        name: [u8; 16] => 0,
        /// `IFF_*`.
        flags: i16 => 16,
        /// Not used.
        padding: [u8; 22] => 18,
    }
}
