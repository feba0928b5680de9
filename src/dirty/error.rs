//! Errors of the dirty log and of other sources of dirty pages.

use std::io;

use crate::memory::GuestAddress;

/// An error of the dirty log, or of another source of dirty pages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The log has 0 bytes.
    #[error("the dirty log has size 0: give it one bit per 4 KiB page of guest memory (rule L2.3)")]
    EmptyLog,
    /// The file ends before the log does. An access beyond its end would raise SIGBUS.
    #[error(
        "the dirty log needs {size} bytes at offset {offset}, but its file has {file} bytes: enlarge the file \
         (rule L2.2)"
    )]
    ShortLogFile {
        /// Size of the log, bytes.
        size: u64,
        /// Offset of the log in the file, bytes.
        offset: u64,
        /// Size of the file, bytes.
        file: u64,
    },
    /// The log does not start at a whole 64-bit word.
    #[error("the dirty log starts at offset {offset}, which is not a multiple of 8: align it (rule L2.3)")]
    MisalignedLog {
        /// Offset of the log in the file, bytes.
        offset: u64,
    },
    /// The log cannot be locked in memory.
    #[error(
        "the dirty log: cannot lock its {size} bytes in memory, of which this process may lock {limit}: raise \
         RLIMIT_MEMLOCK (ulimit -l, in KiB), or give the process CAP_IPC_LOCK (rule K3.1)"
    )]
    NotLocked {
        /// Size of the log, bytes.
        size: u64,
        /// Limit of locked memory, bytes.
        limit: u64,
        /// Error of the system.
        #[source]
        cause: io::Error,
    },
    /// A system call failed.
    #[error("the dirty log: cannot {operation}")]
    System {
        /// The operation that failed, as an infinitive.
        operation: &'static str,
        /// Error of the system.
        #[source]
        cause: io::Error,
    },
    /// The kernel does not permit this process a userfaultfd, by which a [`Pagemap`](super::Pagemap) tracks writes.
    #[error(
        "userfaultfd refused (allow the call in the sandbox, set `sysctl vm.unprivileged_userfaultfd=1`, or run as \
         root)"
    )]
    Userfaultfd(#[source] io::Error),
    /// The kernel has no asynchronous write-protection or no PAGEMAP_SCAN.
    #[error("this kernel can't track writes (use Linux 6.7 or later with CONFIG_PTE_MARKER_UFFD_WP)")]
    Kernel(#[source] io::Error),
    /// A region whose pages cannot be write-protected.
    #[error("region at {:#x} ({size:#x} bytes): cannot track writes", gpa.0)]
    Region {
        /// Guest-physical start of the region.
        gpa: GuestAddress,
        /// Size of the region, bytes.
        size: u64,
        /// Error of the system.
        #[source]
        cause: io::Error,
    },
    /// A harvest of a [`Pagemap`](super::Pagemap) that is not started.
    #[error("writes are not tracked: start the source before its harvest")]
    NotStarted,
    /// A source failed.
    #[error("the source {name} of dirty pages failed")]
    Source {
        /// The name of the source.
        name: String,
        /// The error, with the remedy in its message.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DirtyError {
    pub(super) fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> DirtyError {
        move |cause| DirtyError::System { operation, cause: cause.into() }
    }
}
