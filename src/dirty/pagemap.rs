//! Dirty pages of memory that this process writes itself: PAGEMAP_SCAN with asynchronous write-protection.
//!
//! The kernel removes the write protection of a page at its first write, without notification. One ioctl reports these
//! pages and protects them again. Only writes through the mappings of *this process* are seen. Other processes (a
//! vhost-user back-end) and devices whose driver writes pages in other ways need a dirty log. The mappings themselves
//! are in [`crate::memory`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::error::DirtyError;
use super::harvest::Harvest;
use super::page_set::PageSet;
use super::source::DirtySource;
use crate::abi::linux::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, PageRegion, PmScanArg, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP, UffdioRange, UffdioRegister, UffdioWriteprotect,
};
use crate::memory::userfault::{self, Refusal};
use crate::memory::{Address, LOG_PAGE, Memory, PageRange, Region};

/// Maximum number of page ranges that the kernel reports with one call.
const BATCH: usize = 4096;
/// Write-protection, for shared memory and hugetlbfs and pages that are not populated, with faults resolved by the kernel.
const UFFD_FEATURES: u64 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC;

/// The pages that this process writes in guest memory.
///
/// A write is seen only if it goes through this process's page table. These writes are not seen:
/// - writes of other processes through their own mappings, for example of a vhost-user back-end;
/// - writes through pages that were pinned before, by the kernel or a device: io_uring fixed buffers, an O_DIRECT read
///   that was in flight at a harvest, VFIO. They change memory and leave no trace in any page table;
/// - writes of KVM vCPUs, which have page tables of their own.
///
/// They must be marked in a [`Log`](super::Log), harvested beside this source in a [`UnionSource`](super::UnionSource).
/// [`MigrationParameters::verify`](crate::migrate::MigrationParameters::verify) finds writes that are not marked: it
/// compares all memory by hashes before the guest is handed over.
///
/// A harvest takes 0.7 ms per GiB of clean memory. The first write to a page after a harvest takes 1.4 µs longer.
#[derive(Debug)]
pub struct Pagemap {
    name: String,
    memory: Memory,
    tracking: Option<WriteTracking>,
    /// Pages that were put back. The next harvest reports them again.
    returned: PageSet,
}

#[derive(Debug)]
struct WriteTracking {
    /// The userfaultfd of all regions. They stay registered while it is open.
    userfaultfd: OwnedFd,
    pagemap: File,
    found: Vec<PageRegion>,
}

impl Pagemap {
    /// A source of the writes of this process to `memory`, reported as `name`.
    pub fn new(name: impl Into<String>, memory: Memory) -> Pagemap {
        Pagemap { name: name.into(), memory, tracking: None, returned: PageSet::default() }
    }

    fn failed(&self, cause: DirtyError) -> DirtyError {
        DirtyError::Source { name: self.name.clone(), cause: cause.into() }
    }

    fn scan(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        let WriteTracking { pagemap, found, .. } = self.tracking.as_mut().ok_or(DirtyError::NotStarted)?;
        let mut all = Harvest::default();
        into.grow(self.memory.end().0.div_ceil(LOG_PAGE));
        into.union(&self.returned);
        self.returned.clear();
        for region in self.memory.regions() {
            let (base, mut at, end) = range(region);
            while at < end {
                let (regions, next) = written(pagemap, at, end, found).map_err(|cause| DirtyError::Region {
                    gpa: region.gpa(),
                    size: region.size(),
                    cause,
                })?;
                for part in regions {
                    // Host pages may be larger than a page of the log, and regions may begin and end inside one.
                    let (start, end) = (part.start.max(base) - base, (part.end - base).min(region.size()));
                    let pages = PageRange::touched_by(region.gpa().unchecked_add(start), end - start);
                    all += Harvest { pages: pages.count(), added: into.insert_range(pages) };
                }
                at = next;
            }
        }
        Ok(all)
    }
}

impl WriteTracking {
    fn start(memory: &Memory) -> Result<WriteTracking, DirtyError> {
        let userfaultfd = userfaultfd()?;
        for region in memory.regions() {
            protect(&userfaultfd, region).map_err(|cause| DirtyError::Region {
                gpa: region.gpa(),
                size: region.size(),
                cause,
            })?;
        }
        let pagemap = File::open("/proc/self/pagemap").map_err(DirtyError::Kernel)?;
        let mut found = vec![PageRegion::default(); BATCH];
        // An empty scan fails now, and not at the first harvest, if the kernel does not know the ioctl.
        written(&pagemap, 0, 0, &mut found).map_err(DirtyError::Kernel)?;
        Ok(WriteTracking { userfaultfd, pagemap, found })
    }

    fn stop(self, memory: &Memory) -> Result<(), DirtyError> {
        for region in memory.regions() {
            let (_, start, end) = range(region);
            let mut range = UffdioRange { start, len: end - start };
            // SAFETY: the struct is the one this ioctl reads.
            unsafe { userfault::ioctls::unregister(self.userfaultfd.as_raw_fd(), &mut range) }
                .map_err(|errno| DirtyError::Region { gpa: region.gpa(), size: region.size(), cause: errno.into() })?;
        }
        Ok(())
    }
}

impl DirtySource for Pagemap {
    fn start(&mut self) -> Result<(), DirtyError> {
        self.tracking = Some(WriteTracking::start(&self.memory).map_err(|error| self.failed(error))?);
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        self.scan(into).map_err(|error| self.failed(error))
    }

    fn put_back(&mut self, pages: &PageSet) {
        self.returned.union(pages);
    }

    /// Unregisters the memory. Also after an error the userfaultfd is closed, which unregisters all of it.
    fn stop(&mut self) -> Result<(), DirtyError> {
        let Some(tracking) = self.tracking.take() else { return Ok(()) };
        tracking.stop(&self.memory).map_err(|error| self.failed(error))
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// The address of the region in this process, and start and end of the host pages around it.
fn range(region: &Region) -> (u64, u64, u64) {
    let base = region.host_ptr().addr() as u64;
    (base, base / LOG_PAGE * LOG_PAGE, (base + region.size()).next_multiple_of(LOG_PAGE))
}

/// Creates a userfaultfd for asynchronous write-protection, which reports no faults.
fn userfaultfd() -> Result<OwnedFd, DirtyError> {
    // USER_MODE_ONLY needs no privilege. It excludes faults of the kernel from reports, and there are no reports here.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    userfault::open(flags, UFFD_FEATURES).map_err(|refusal| match refusal {
        Refusal::Fd(error) => DirtyError::Userfaultfd(error),
        Refusal::Features(error) => DirtyError::Kernel(error),
    })
}

/// Registers a region and write-protects all of it, pages that are not populated included.
fn protect(userfaultfd: &OwnedFd, region: &Region) -> io::Result<()> {
    let (_, start, end) = range(region);
    let range = UffdioRange { start, len: end - start };
    let mut register = UffdioRegister { range, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the struct is the one this ioctl reads and writes. The memory stays mapped and usable as before.
    unsafe { userfault::ioctls::register(userfaultfd.as_raw_fd(), &mut register) }?;
    let mut protect = UffdioWriteprotect { range, mode: UFFDIO_WRITEPROTECT_MODE_WP };
    // SAFETY: as above.
    unsafe { ioctls::uffdio_writeprotect(userfaultfd.as_raw_fd(), &mut protect) }?;
    Ok(())
}

/// The ranges written in `start..end` of this process, which are protected again, and the address at which to continue.
fn written<'a>(
    pagemap: &File,
    start: u64,
    end: u64,
    found: &'a mut [PageRegion],
) -> io::Result<(&'a [PageRegion], u64)> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start,
        end,
        vec: found.as_mut_ptr().addr() as u64,
        vec_len: found.len() as u64,
        category_mask: PAGE_IS_WRITTEN,
        return_mask: PAGE_IS_WRITTEN,
        ..PmScanArg::default()
    };
    // SAFETY: the struct is the one this ioctl reads and writes, and `found` has `vec_len` entries.
    let count = unsafe { ioctls::pagemap_scan(pagemap.as_raw_fd(), &mut arg) }?;
    let regions = found.get(..count as usize).unwrap_or(found);
    Ok((regions, arg.walk_end))
}

/// The ioctls of this source.
#[allow(unreachable_pub, reason = "nix's macros make public functions")]
mod ioctls {
    use crate::abi::linux::{PmScanArg, UffdioWriteprotect};

    nix::ioctl_readwrite!(uffdio_writeprotect, 0xaa, 0x06, UffdioWriteprotect);
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use super::*;
    use crate::memory::{GuestAddress, PageNumber, UserAddress, sealed_memfd};
    use crate::sys::with_causes::with_causes;

    const MIB: u64 = 1 << 20;

    /// Two regions of one file, the second above 4 GiB.
    fn started() -> (Memory, Pagemap) {
        let fd = sealed_memfd("guest", 5 * MIB).unwrap();
        let region = |gpa, size, offset| {
            Arc::new(Region::map(fd.as_fd(), GuestAddress(gpa), size, UserAddress(gpa), offset).unwrap())
        };
        let memory = Memory::new([region(0, 4 * MIB, 0), region(4 << 30, MIB, 4 * MIB)]).unwrap();
        memory.write(GuestAddress(0x2000), &[1; 0x10000]).unwrap();
        let mut source = Pagemap::new("cpu", memory.clone());
        source.start().unwrap();
        (memory, source)
    }

    fn harvested(source: &mut Pagemap) -> Vec<u64> {
        let mut set = PageSet::default();
        let found = source.harvest(&mut set).unwrap();
        assert_eq!((found.pages, found.added), (set.len(), set.len()));
        set.iter().map(|page| page.0).collect()
    }

    #[test]
    fn every_write_of_this_process_is_reported_once() {
        let (memory, mut source) = started();
        assert!(harvested(&mut source).is_empty(), "written before the start");
        let high = (4 << 30) / LOG_PAGE;
        // A page populated before the start, one that was not, the last and the first page of a region.
        for page in [3, 600, 1023, high] {
            memory.write(GuestAddress(page * LOG_PAGE + 5), &[2]).unwrap();
        }
        assert_eq!(harvested(&mut source), [3, 600, 1023, high]);
        assert!(harvested(&mut source).is_empty(), "reported already");
        memory.write(GuestAddress(3 * LOG_PAGE), &[3]).unwrap();
        assert_eq!(harvested(&mut source), [3], "written again");
        let mut unsent = PageSet::new(10);
        unsent.insert(PageNumber(7));
        source.put_back(&unsent);
        let mut set = PageSet::default();
        source.harvest(&mut set).unwrap();
        assert!(set.iter().eq([PageNumber(7)]), "put back");
        let mut read = [0; 8];
        memory.read(GuestAddress(700 * LOG_PAGE), &mut read).unwrap();
        assert!(harvested(&mut source).is_empty(), "a read is not reported");
        source.stop().unwrap();
    }

    #[test]
    fn more_ranges_than_one_call_reports_are_all_found() {
        let (memory, mut source) = started();
        source.tracking.as_mut().unwrap().found.truncate(7);
        let pages: Vec<u64> = (0..1024).filter(|page| page % 3 == 0).collect();
        pages.iter().for_each(|page| memory.write(GuestAddress(page * LOG_PAGE), &[1]).unwrap());
        assert_eq!(harvested(&mut source), pages);
        assert!(harvested(&mut source).is_empty());
    }

    #[test]
    fn writes_by_system_calls_of_this_process_are_reported() {
        let (memory, mut source) = started();
        let mut iov = Vec::new();
        memory.iovecs(GuestAddress(0x5000), 8, &mut iov).unwrap();
        let zero = File::open("/dev/zero").unwrap();
        // SAFETY: the iovec is one of `memory`, which is alive.
        let read = unsafe { libc::readv(zero.as_raw_fd(), iov.as_ptr(), 1) };
        assert_eq!(read, 8);
        assert_eq!(harvested(&mut source), [5]);
    }

    #[test]
    fn a_stopped_source_does_not_track_and_can_be_started_again() {
        let (memory, mut source) = started();
        source.stop().unwrap();
        source.stop().unwrap();
        memory.write(GuestAddress(0x3000), &[1]).unwrap();
        let error = source.harvest(&mut PageSet::default()).unwrap_err();
        assert!(with_causes(&error).to_string().contains("start the source"), "{error}");
        source.start().unwrap();
        assert!(harvested(&mut source).is_empty());
        memory.write(GuestAddress(0x3000), &[1]).unwrap();
        assert_eq!(harvested(&mut source), [3]);
        // The kernel refuses a second source for the same memory, and the first continues.
        let mut second = Pagemap::new("second", memory.clone());
        let error = second.start().unwrap_err();
        assert!(with_causes(&error).to_string().contains("region at 0x0"), "{error}");
        memory.write(GuestAddress(0x4000), &[1]).unwrap();
        assert_eq!(harvested(&mut source), [4]);
    }
}
