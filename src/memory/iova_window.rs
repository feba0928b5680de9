//! The areas of a ring behind an IOMMU as contiguous memory: a [`Memory`] whose addresses are I/O virtual.
//!
//! An area is contiguous for the driver and may be scattered over guest memory page by page. Scattered pages are mapped
//! a second time, one after the other.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::{Access, Address, GuestAddress, Iotlb, Iova, Memory, MemoryError, Region};

/// An area of a ring: I/O virtual address, length in bytes, and the access that the device needs.
pub type RingArea = (Iova, u64, Access);

/// The mapped areas of one ring. It is immutable: after a change of one of its translations, open another one.
#[derive(Debug)]
pub struct IovaWindow {
    memory: Memory,
    pieces: Vec<IovaPiece>,
}

/// A contiguous part of an area in guest-physical memory.
#[derive(Clone, Copy, Debug)]
struct IovaPiece {
    iova: Iova,
    len: u64,
    gpa: GuestAddress,
}

impl IovaWindow {
    /// Translates and maps `areas`. `logged` is a further range (I/O virtual address, bytes) that is translated but not
    /// mapped, as only its pages are logged.
    ///
    /// # Errors
    /// [`MemoryError::Untranslated`] for the first part without a translation, other errors of the memory for areas
    /// that overlap or that are scattered in pieces other than whole pages.
    pub fn open(
        memory: &Memory,
        iotlb: &Iotlb,
        areas: &[RingArea],
        logged: Option<(Iova, u64)>,
    ) -> Result<IovaWindow, MemoryError> {
        let mut pieces = Vec::new();
        let mut regions = Vec::new();
        let find = |(iova, len, access): RingArea| {
            let (mut found, mut at) = (Vec::new(), iova);
            iotlb.translate(memory, iova, len, access, |gpa, len| {
                found.push(IovaPiece { iova: at, len, gpa });
                at = Iova(at.0.wrapping_add(len));
            })?;
            Ok::<_, MemoryError>(found)
        };
        for &area in areas {
            let found = find(area)?;
            regions.push(Arc::new(join(memory, area.0, area.1, &found)?));
            pieces.extend(found);
        }
        let mut window = IovaWindow { memory: Memory::new(regions)?, pieces };
        // Usually it is the device area, which is translated already.
        if let Some((iova, len)) = logged.filter(|(iova, len)| !window.holds(*iova, *len)) {
            window.pieces.extend(find((iova, len, Access::Read))?);
        }
        Ok(window)
    }

    /// The areas as memory, at their I/O virtual addresses.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Returns true if the window has any byte at the addresses `iovas`.
    pub fn uses(&self, iovas: &RangeInclusive<Iova>) -> bool {
        self.pieces.iter().any(|piece| overlap(piece.iova, piece.len, iovas))
    }

    /// Returns true if all `len` bytes at `iova` are in the window.
    pub fn holds(&self, iova: Iova, len: u64) -> bool {
        let end = iova.0.saturating_add(len);
        let mut at = iova;
        while at.0 < end {
            let holds = |piece: &&IovaPiece| at.checked_offset_from(piece.iova).is_some_and(|skip| skip < piece.len);
            let Some(piece) = self.pieces.iter().find(holds) else { return false };
            at = Iova(piece.iova.0.saturating_add(piece.len));
        }
        true
    }

    /// Calls `each` with the guest-physical address and the length of every piece of `len` bytes at `iova` that is in
    /// the window. A piece is given twice if the logged range overlaps an area.
    pub fn each(&self, iova: Iova, len: u64, mut each: impl FnMut(GuestAddress, u64)) {
        let end = iova.0.saturating_add(len);
        for piece in &self.pieces {
            let start = piece.iova.0;
            let (from, to) = (start.max(iova.0), end.min(start.saturating_add(piece.len)));
            if from < to {
                each(piece.gpa.unchecked_add(from - start), to - from);
            }
        }
    }
}

/// Returns true if any of `len` bytes at `iova` is in `iovas`.
pub fn overlap(iova: Iova, len: u64, iovas: &RangeInclusive<Iova>) -> bool {
    len > 0 && iova <= *iovas.end() && iova.0.saturating_add(len - 1) >= iovas.start().0
}

/// Maps the pieces of an area as one region at its I/O virtual address.
fn join(memory: &Memory, iova: Iova, len: u64, pieces: &[IovaPiece]) -> Result<Region, MemoryError> {
    let part = |piece: &IovaPiece| {
        let not_mapped = MemoryError::NotMapped { gpa: piece.gpa, len: piece.len };
        let (region, offset) = memory.region_at(piece.gpa).ok_or(not_mapped)?;
        Ok::<_, MemoryError>((region, offset, piece.len))
    };
    let parts = pieces.iter().map(part).collect::<Result<Vec<_>, _>>()?;
    match parts.as_slice() {
        [(region, offset, len)] => region.part(iova, *offset, *len),
        _ => Region::join(iova, len, &parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{UserAddress, sealed_memfd};
    use std::os::fd::AsFd;

    fn memory() -> Memory {
        let fd = sealed_memfd("window-test", 0x10000).unwrap();
        Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 0x10000, UserAddress(0), 0).unwrap())]).unwrap()
    }

    /// Rule T4.2.
    #[test]
    fn scattered_pages_are_contiguous_in_a_window() {
        let (memory, iotlb) = (memory(), Iotlb::default());
        for (iova, user) in [(0x5000, 0x9000), (0x6000, 0x2000), (0x7000, 0x4000)] {
            iotlb.update(Iova(iova), 0x1000, UserAddress(user), Some(Access::ReadWrite)).unwrap();
        }
        let area = (Iova(0x5800), 0x2000, Access::ReadWrite);
        let window = IovaWindow::open(&memory, &iotlb, &[area], None).unwrap();
        let data: Vec<u8> = (0..0x2000u32).map(|i| (i / 5) as u8).collect();
        window.memory().write(GuestAddress(0x5800), &data).unwrap();
        let mut back = vec![0; 0x2000];
        memory.read(GuestAddress(0x9800), &mut back[..0x800]).unwrap();
        memory.read(GuestAddress(0x2000), &mut back[0x800..0x1800]).unwrap();
        memory.read(GuestAddress(0x4000), &mut back[0x1800..]).unwrap();
        assert_eq!(back, data);
        window.memory().slice(GuestAddress(0x5800), 0x2000).expect("one contiguous region");
        let mut pieces = Vec::new();
        window.each(Iova(0x5ffc), 8, |gpa, len| pieces.push((gpa.0, len)));
        assert_eq!(pieces, [(0x9ffc, 4), (0x2000, 4)]);
        let uses = |first, last| window.uses(&(Iova(first)..=Iova(last)));
        assert!(uses(0x7000, 0x7000) && uses(0, u64::MAX));
        assert!(!uses(0, 0x57ff) && !uses(0x7800, u64::MAX));
        assert!(window.holds(Iova(0x5800), 0x2000) && !window.holds(Iova(0x5800), 0x2001));
    }

    #[test]
    fn a_contiguous_area_shares_its_regions_mapping_and_outlives_the_region() {
        let (memory, iotlb) = (memory(), Iotlb::default());
        iotlb.update(Iova(0x5008), 0x100, UserAddress(0x1238), Some(Access::Read)).unwrap();
        let window = IovaWindow::open(&memory, &iotlb, &[(Iova(0x5008), 0x100, Access::Read)], None).unwrap();
        memory.write(GuestAddress(0x1240), b"here").unwrap();
        drop(memory);
        let mut found = [0; 4];
        window.memory().read(GuestAddress(0x5010), &mut found).unwrap();
        assert_eq!(&found, b"here");
    }

    /// Rule T4.3.
    #[test]
    fn areas_that_overlap_or_are_scattered_inside_pages_are_refused() {
        let (memory, iotlb) = (memory(), Iotlb::default());
        iotlb.update(Iova(0x5000), 0x800, UserAddress(0x1000), Some(Access::ReadWrite)).unwrap();
        iotlb.update(Iova(0x5800), 0x800, UserAddress(0x3800), Some(Access::ReadWrite)).unwrap();
        let open = |areas: &[RingArea]| IovaWindow::open(&memory, &iotlb, areas, None).unwrap_err();
        assert!(matches!(open(&[(Iova(0x5700), 0x200, Access::Read)]), MemoryError::Scattered { .. }));
        let twice = [(Iova(0x5000), 0x10, Access::Read), (Iova(0x5008), 0x10, Access::Read)];
        assert!(matches!(open(&twice), MemoryError::Overlap { .. }));
        assert!(
            matches!(open(&[(Iova(0x6000), 1, Access::Read)]), MemoryError::Untranslated(miss) if miss.iova == Iova(0x6000))
        );
    }
}
