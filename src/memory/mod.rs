//! Guest memory: regions mapped from file descriptors, and the translation of guest-physical and front-end virtual
//! addresses to checked views of them.
//!
//! Values from a peer or a guest are not trusted: mappings are checked against the file behind them, and every returned
//! range is inside its region. The logging of written pages is in [`crate::dirty`].
//!
//! [`Region::create`] makes guest memory, [`Region::share`] takes a file for it, and [`Region::map`] maps what a
//! front-end has sent. Arithmetic on a [`GuestAddress`] needs the trait [`Address`] in scope. `{:#x}` prints addresses
//! and page numbers. It does not print a `GuestAddress`, which is vm-memory's, but its field `0`.
//!
//! # Example
//!
//! Map a region that a front-end has sent, and translate an address of the front-end:
//!
//! ```
//! use std::os::fd::AsFd;
//! use std::sync::Arc;
//!
//! use vhost_migrate::memory::{GuestAddress, Memory, Region, UserAddress, sealed_memfd};
//!
//! // 1 MiB, at 1 MiB of the guest, and at this address of the front-end.
//! let user_addr = UserAddress(0x7f00_0000_0000);
//! let fd = sealed_memfd("guest", 1 << 20)?;
//! let region = Region::map(fd.as_fd(), GuestAddress(1 << 20), 1 << 20, user_addr, 0)?;
//! let memory = Memory::new([Arc::new(region)])?;
//!
//! let gpa = memory.gpa_of_user(UserAddress(user_addr.0 + 0x1000), 5)?;
//! assert_eq!(gpa, GuestAddress((1 << 20) + 0x1000));
//! memory.write(gpa, b"hello")?;
//!
//! // A range that leaves the region is an error.
//! assert!(memory.slice(GuestAddress((2 << 20) - 1), 2).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address;
mod error;
mod extent;
mod iotlb;
mod iova_window;
mod page;
mod region;
pub(crate) mod userfault;

pub use address::{Address, FaultAddress, GuestAddress, Iova, UserAddress};
pub use error::MemoryError;
pub use extent::{Extent, ExtentFinder};
pub use iotlb::{Access, Iotlb, IotlbMiss, invalidated};
pub use iova_window::{IovaWindow, RingArea, overlap};
pub use page::{PageNumber, PageRange};
pub use region::{Region, sealed_memfd};
pub use userfault::Userfault;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, VolatileSlice};

use crate::sys::with_causes::with_causes;

/// Size of a page of guest-physical memory, bytes: the unit of every dirty log and of every page that this crate moves.
/// It does not depend on the page size of the host or the guest (rule L1.1).
pub const LOG_PAGE: u64 = 4096;

/// An immutable set of regions, sorted by guest-physical address. Clones share the regions.
///
/// A change of the memory table makes a new `Memory`. A clone of the old one keeps its mappings alive while it is in
/// use.
#[derive(Clone, Default)]
pub struct Memory(Arc<[Arc<Region>]>);

impl Memory {
    /// Guest memory made of `regions`, which may be in any order.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] if two regions share a guest-physical or a front-end address (rule M1.4).
    pub fn new(regions: impl IntoIterator<Item = Arc<Region>>) -> Result<Memory, MemoryError> {
        let mut regions: Vec<Arc<Region>> = regions.into_iter().collect();
        let overlap = |regions: &[Arc<Region>], start: fn(&Region) -> u64, space| {
            regions.windows(2).try_for_each(|pair| match pair {
                [a, b] if start(b) - start(a) < a.size() => {
                    Err(MemoryError::Overlap { first: a.gpa(), second: b.gpa(), space })
                }
                _ => Ok(()),
            })
        };
        regions.sort_by_key(|region| region.user_addr());
        overlap(&regions, |region| region.user_addr().0, "front-end")?;
        regions.sort_by_key(|region| region.gpa());
        overlap(&regions, |region| region.gpa().0, "guest-physical")?;
        Ok(Memory(regions.into()))
    }

    /// The regions, by increasing guest-physical address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.0
    }

    /// The guest-physical address after the last byte; 0 without regions.
    pub fn end(&self) -> GuestAddress {
        GuestAddress(self.0.last().map_or(0, |region| region.range().end))
    }

    /// The total size of the regions, bytes, without the gaps between them.
    pub fn size(&self) -> u64 {
        self.0.iter().map(|region| region.size()).sum()
    }

    /// A view of `len` bytes at `gpa`, all inside one region.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if the range is not completely inside one region.
    #[inline]
    pub fn slice(&self, gpa: GuestAddress, len: u64) -> Result<VolatileSlice<'_>, MemoryError> {
        let not_mapped = MemoryError::NotMapped { gpa, len };
        let Some((region, offset)) = self.region_at(gpa) else { return Err(not_mapped) };
        region.slice(offset, len).ok_or(not_mapped)
    }

    /// Calls `each` with the views that make up `len` bytes at `gpa`, in order. The range may span adjacent regions.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if any byte is in no region. `each` may have been called for the bytes before it.
    #[inline]
    pub fn slices<'a>(
        &'a self,
        gpa: GuestAddress,
        len: u64,
        mut each: impl FnMut(VolatileSlice<'a>),
    ) -> Result<(), MemoryError> {
        let (mut at, mut left) = (gpa, len);
        while left > 0 {
            let not_mapped = MemoryError::NotMapped { gpa, len };
            let Some((region, offset)) = self.region_at(at) else { return Err(not_mapped) };
            let here = left.min(region.size() - offset);
            let Some(slice) = region.slice(offset, here) else { return Err(not_mapped) };
            each(slice);
            left -= here;
            at = match at.checked_add(here) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(not_mapped),
            };
        }
        Ok(())
    }

    /// Appends the ranges of this process that make up `len` bytes at `gpa` to `out`, for `readv` and similar calls.
    ///
    /// The ranges are valid as long as this `Memory` or a clone of it exists.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if any byte is in no region. `out` is unchanged then.
    #[inline]
    pub fn iovecs(&self, gpa: GuestAddress, len: u64, out: &mut Vec<libc::iovec>) -> Result<(), MemoryError> {
        let before = out.len();
        let push = |slice: VolatileSlice<'_>| {
            out.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        };
        self.slices(gpa, len, push).inspect_err(|_| out.truncate(before))
    }

    /// Translates an address of the front-end's address space, in which ring addresses are given, to guest-physical.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if the range is not completely inside one region.
    pub fn gpa_of_user(&self, user_addr: UserAddress, len: u64) -> Result<GuestAddress, MemoryError> {
        let gpa_in = |region: &Arc<Region>| {
            let offset = user_addr.checked_offset_from(region.user_addr())?;
            region.holds(offset, len).then(|| region.gpa().unchecked_add(offset))
        };
        self.0.iter().find_map(gpa_in).ok_or(MemoryError::UserNotMapped { user_addr, len })
    }

    /// Calls `each` with the guest-physical address and the length of every piece of `len` bytes at `user_addr` of the
    /// front-end's address space. A piece is inside one region.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if any byte is in no region. `each` may have been called for the bytes before it.
    pub fn pieces_of_user(
        &self,
        user_addr: UserAddress,
        len: u64,
        mut each: impl FnMut(GuestAddress, u64),
    ) -> Result<(), MemoryError> {
        let (mut at, mut left) = (user_addr, len);
        while left > 0 {
            let gpa = self.gpa_of_user(at, 1)?;
            let Some((region, offset)) = self.region_at(gpa) else { break };
            let here = left.min(region.size() - offset);
            each(gpa, here);
            (at, left) = (UserAddress(at.0.wrapping_add(here)), left - here);
        }
        Ok(())
    }

    /// Copies guest memory at `gpa` into `buf`.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if any byte is in no region.
    pub fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = &mut buf[..];
        let len = rest.len() as u64;
        self.slices(gpa, len, |slice| {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(slice.len());
            slice.copy_to(here);
            rest = after;
        })
    }

    /// Copies `buf` into guest memory at `gpa` without logging it.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if any byte is in no region. The bytes before it may have been written.
    pub fn write(&self, gpa: GuestAddress, buf: &[u8]) -> Result<(), MemoryError> {
        let mut rest = buf;
        self.slices(gpa, buf.len() as u64, |slice| {
            let (here, after) = rest.split_at(slice.len());
            slice.copy_from(here);
            rest = after;
        })
    }

    /// Allocates the memory of `pages` for writing and keeps the contents. Pages outside regions are
    /// skipped.
    ///
    /// # Errors
    /// The error of the system: out of memory, or a kernel before Linux 5.14.
    pub fn populate(&self, pages: PageRange) -> io::Result<()> {
        self.parts(pages).try_for_each(|(region, range)| region.populate(range))
    }

    /// Advises the system to use huge pages for `pages`. The system may refuse it for this type of memory.
    pub fn advise_huge_pages(&self, pages: PageRange) {
        for (region, range) in self.parts(pages) {
            if let Err(error) = region.advise_huge_pages(range) {
                tracing::debug!(error = %with_causes(&error), ?region, "huge pages refused");
            }
        }
    }

    /// The parts of `pages` that are inside regions, region by region.
    pub fn pages(&self, pages: PageRange) -> impl Iterator<Item = PageRange> + use<'_> {
        self.0.iter().map(move |region| pages.intersection(region.pages())).filter(|pages| !pages.is_empty())
    }

    /// The parts of `pages` that are inside regions: region, and range of offsets in it, bytes.
    fn parts(&self, pages: PageRange) -> impl Iterator<Item = (&Region, Range<u64>)> + use<'_> {
        let (start, end) = (pages.start.address().0, pages.end.address().0);
        self.0.iter().filter_map(move |region| {
            let all = region.range();
            let here = start.max(all.start)..end.min(all.end);
            (!here.is_empty()).then(|| (region.as_ref(), here.start - all.start..here.end - all.start))
        })
    }

    /// The region that has the byte at `gpa`, and the byte's offset in it.
    #[inline]
    fn region_at(&self, gpa: GuestAddress) -> Option<(&Region, u64)> {
        // Almost every guest has one or two regions. Binary search is faster only for more.
        let regions = &self.0;
        let index = match regions.len() {
            0..=2 => regions.iter().rposition(|region| region.gpa() <= gpa)?,
            _ => regions.partition_point(|region| region.gpa() <= gpa).checked_sub(1)?,
        };
        let region = regions.get(index)?;
        let offset = gpa.checked_offset_from(region.gpa())?;
        region.holds(offset, 1).then_some((region, offset))
    }
}

impl<B: Bitmap + Send + Sync + 'static> TryFrom<&GuestMemoryMmap<B>> for Memory {
    type Error = MemoryError;

    /// Guest memory of a VMM built from rust-vmm's crates, to be migrated. It stays mapped as long as the result
    /// exists.
    ///
    /// Writes of this crate are not marked in the bitmap `B`. Holes are found if vm-memory has mapped the memory
    /// itself. A [`Pagemap`](crate::dirty::Pagemap) makes holes of private anonymous memory look used.
    ///
    /// # Errors
    /// [`MemoryError::Map`] with the error of the system.
    fn try_from(memory: &GuestMemoryMmap<B>) -> Result<Memory, MemoryError> {
        let region =
            |region: &GuestRegionMmap<B>| Region::of_mapping(region.start_addr(), region.get_mmap()).map(Arc::new);
        Memory::new(memory.iter().map(region).collect::<Result<Vec<_>, _>>()?)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use proptest::prelude::*;
    use vm_memory::{Bytes, FileOffset};

    const HIGH: u64 = 1 << 32;

    /// Two adjacent regions from one memfd, a gap, and one region above 4 GiB.
    fn memory() -> Memory {
        let fd = sealed_memfd("memory-test", 0x6000).unwrap();
        let map = |gpa, size, user, offset| {
            Arc::new(Region::map(fd.as_fd(), GuestAddress(gpa), size, UserAddress(user), offset).unwrap())
        };
        Memory::new([
            map(HIGH, 0x2000, 0x7000_0000, 0x4000),
            map(0, 0x1000, 0x5000_0000, 0),
            map(0x1000, 0x3000, 0x6000_0000, 0x1000),
        ])
        .unwrap()
    }

    #[test]
    fn a_copy_spans_adjacent_regions_in_order() {
        let memory = memory();
        let data: Vec<u8> = (0..0x3000u32).map(|i| (i / 7) as u8).collect();
        memory.write(GuestAddress(0x800), &data).unwrap();
        let mut back = vec![0; data.len()];
        memory.read(GuestAddress(0x800), &mut back).unwrap();
        assert_eq!(back, data);
        let mut iovecs = Vec::new();
        memory.iovecs(GuestAddress(0x800), 0x3000, &mut iovecs).unwrap();
        assert_eq!(iovecs.iter().map(|v| v.iov_len).collect::<Vec<_>>(), [0x800, 0x2800]);
    }

    #[test]
    fn a_range_that_leaves_its_region_is_refused() {
        let memory = memory();
        assert!(memory.slice(GuestAddress(0xfff), 1).is_ok());
        assert!(memory.slice(GuestAddress(0xfff), 2).is_err(), "one view never crosses a region");
        for (gpa, len) in [(0x3fff, 2), (0x4000, 1), (HIGH - 1, 2), (HIGH + 0x1fff, 2), (u64::MAX, 1), (0, u64::MAX)] {
            assert!(memory.slice(GuestAddress(gpa), len).is_err(), "{gpa:#x}+{len:#x}");
            let mut iovecs = Vec::new();
            assert!(memory.iovecs(GuestAddress(gpa), len, &mut iovecs).is_err(), "{gpa:#x}+{len:#x}");
            assert!(iovecs.is_empty());
        }
        assert!(memory.slice(GuestAddress(HIGH + 1), u64::MAX).is_err());
        assert_eq!(memory.end(), GuestAddress(HIGH + 0x2000));
        assert_eq!(memory.size(), 0x6000);
    }

    #[test]
    fn a_front_end_range_translates_only_inside_one_region() {
        let memory = memory();
        assert_eq!(memory.gpa_of_user(UserAddress(0x6000_0010), 0x10).unwrap(), GuestAddress(0x1010));
        assert_eq!(memory.gpa_of_user(UserAddress(0x7000_1fff), 1).unwrap(), GuestAddress(HIGH + 0x1fff));
        assert!(memory.gpa_of_user(UserAddress(0x7000_1fff), 2).is_err());
        assert!(memory.gpa_of_user(UserAddress(u64::MAX), u64::MAX).is_err());
        assert!(memory.gpa_of_user(UserAddress(0x1010), 1).is_err());
    }

    #[test]
    fn overlapping_regions_are_refused_in_either_address_space() {
        let fd = sealed_memfd("memory-test", 0x4000).unwrap();
        let map =
            |gpa, user| Arc::new(Region::map(fd.as_fd(), GuestAddress(gpa), 0x2000, UserAddress(user), 0).unwrap());
        let gpa = Memory::new([map(0, 0x10000), map(0x1fff, 0x20000)]).unwrap_err();
        assert!(matches!(gpa, MemoryError::Overlap { space: "guest-physical", .. }), "{gpa}");
        let user = Memory::new([map(0, 0x10000), map(0x2000, 0x11000)]).unwrap_err();
        assert!(matches!(user, MemoryError::Overlap { space: "front-end", .. }), "{user}");
    }

    #[test]
    fn a_region_beyond_its_file_is_refused_before_it_is_mapped() {
        let fd = sealed_memfd("memory-test", 0x2000).unwrap();
        for (size, offset) in [(0x2001, 0), (0x1001, 0x1000), (0x1000, u64::MAX), (u64::MAX, 1), (0, 0)] {
            assert!(
                Region::map(fd.as_fd(), GuestAddress(0), size, UserAddress(0), offset).is_err(),
                "{size:#x} at {offset:#x}"
            );
        }
        assert!(Region::map(fd.as_fd(), GuestAddress(u64::MAX - 0xfff), 0x1001, UserAddress(0), 0).is_err());
        assert!(Region::map(fd.as_fd(), GuestAddress(0), 0x1001, UserAddress(u64::MAX - 0xfff), 0).is_err());
    }

    #[test]
    fn a_region_may_start_at_an_unaligned_file_offset() {
        let fd = sealed_memfd("memory-test", 0x3000).unwrap();
        let all = Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x3000, UserAddress(0), 0).unwrap())])
            .unwrap();
        all.write(GuestAddress(0x1234), b"here").unwrap();
        let part =
            Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x800, UserAddress(0), 0x1230).unwrap())])
                .unwrap();
        let mut found = [0; 4];
        part.read(GuestAddress(4), &mut found).unwrap();
        assert_eq!(&found, b"here");
    }

    proptest! {
        /// Regions that begin and end inside pages, low and at the end of the address space.
        #[test]
        fn the_pages_of_memory_are_those_that_are_completely_in_a_region(
            at_end: bool,
            sizes in proptest::collection::vec((0..0x1800u64, 1..0x3800u64), 1..4),
            (first, count) in (0..12u64, 0..12u64),
        ) {
            let fd = sealed_memfd("memory-test", 0x4000).unwrap();
            let total: u64 = sizes.iter().map(|(gap, size)| gap + size).sum();
            // No region has the last byte of the address space.
            let (mut at, first) = if at_end { (u64::MAX - total, (1 << 52) - 12 + first) } else { (0, first) };
            let mut regions = Vec::new();
            for (gap, size) in &sizes {
                at += gap;
                regions.push(Arc::new(Region::map(fd.as_fd(), GuestAddress(at), *size, UserAddress(at), 0).unwrap()));
                at += size;
            }
            let memory = Memory::new(regions).unwrap();
            prop_assert_eq!(memory.end().0, at);
            let in_one_region = |page: &u64| {
                let start = u128::from(*page) * u128::from(LOG_PAGE);
                let is_in = |region: &Region| {
                    let first = u128::from(region.gpa().0);
                    first <= start && start + u128::from(LOG_PAGE) <= first + u128::from(region.size())
                };
                memory.regions().iter().any(|region| is_in(region))
            };
            let expected: Vec<u64> = (first..first + count).filter(in_one_region).collect();
            let found = memory.pages((first..first + count).into()).flat_map(PageRange::iter).map(|page| page.0);
            prop_assert_eq!(found.collect::<Vec<_>>(), expected);
            memory.populate((first..first + count).into()).unwrap();

            let mut data = Vec::new();
            memory.data(|run| {
                data.extend(run.numbers());
                true
            });
            let whole = memory.pages((0..u64::MAX).into()).flat_map(PageRange::iter).map(|page| page.0);
            prop_assert_eq!(data, whole.collect::<Vec<_>>());
        }
    }

    /// The runs of pages that are data.
    fn data(memory: &Memory) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        memory.data(|run| {
            runs.push(run.numbers());
            true
        });
        runs
    }

    #[test]
    fn guest_memory_of_vm_memory_keeps_its_contents_its_files_and_its_holes() {
        const SIZE: usize = 2 << 20;
        let fd = sealed_memfd("memory-test", SIZE as u64 + 0x4000).unwrap();
        let file = |start| Some(FileOffset::new(std::fs::File::from(fd.try_clone().unwrap()), start));
        let ranges = [(GuestAddress(0), SIZE, None), (GuestAddress(HIGH), SIZE, file(0x4000))];
        let theirs = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let written = [0x3000, SIZE as u64 - 1, HIGH, HIGH + 0x7008];
        for gpa in written {
            theirs.write_obj(7u8, GuestAddress(gpa)).unwrap();
        }
        let ours = Memory::try_from(&theirs).unwrap();
        drop(theirs);
        let (last, high) = (SIZE as u64 / LOG_PAGE - 1, HIGH / LOG_PAGE);
        assert_eq!(data(&ours), [3..4, last..last + 1, high..high + 1, high + 7..high + 8]);
        for gpa in written {
            let mut byte = [0];
            ours.read(GuestAddress(gpa), &mut byte).unwrap();
            assert_eq!(byte, [7], "{gpa:#x}");
        }
        let shared = ours.regions().iter().map(|region| region.shared().map(|(_, offset)| offset));
        assert!(shared.eq([None, Some(0x4000)]));
        ours.write(GuestAddress(HIGH + 0x1000), b"here").unwrap();
        let file =
            Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x6000, UserAddress(0), 0).unwrap())])
                .unwrap();
        let mut found = [0; 4];
        file.read(GuestAddress(0x5000), &mut found).unwrap();
        assert_eq!(&found, b"here", "both map the same memory");
        let user_addr = UserAddress(ours.regions()[1].host_ptr() as u64 + 5);
        assert_eq!(ours.gpa_of_user(user_addr, 1).unwrap(), GuestAddress(HIGH + 5));
    }

    #[test]
    fn memory_that_vm_memory_has_not_mapped_itself_is_all_data() {
        let fd = sealed_memfd("memory-test", 0x4000).unwrap();
        let region = Region::map(fd.as_fd(), GuestAddress(0), 0x4000, UserAddress(0), 0).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        // SAFETY: the mapping is `region`'s, which outlives it.
        let raw = unsafe { vm_memory::MmapRegion::<()>::build_raw(region.host_ptr(), 0x4000, prot, flags) }.unwrap();
        let theirs = GuestRegionMmap::new(raw, GuestAddress(0)).unwrap();
        let ours = Memory::try_from(&GuestMemoryMmap::from_regions(vec![theirs]).unwrap()).unwrap();
        assert_eq!(data(&ours), [0..4]);
    }
}
