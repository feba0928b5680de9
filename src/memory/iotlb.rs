//! The IOTLB of a device behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM): a cache of translations from I/O virtual addresses
//! to those of the front-end.
//!
//! The front-end's messages fill and empty it; its size is bounded. Not here but in `backend`: asking for missing
//! translations, and waiting until an old translation is no longer in use.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::ops::RangeInclusive;
use std::sync::{PoisonError, RwLock};

use super::{GuestAddress, Iova, Memory, MemoryError, UserAddress};
use crate::abi::vhost::{VHOST_ACCESS_RO, VHOST_ACCESS_RW, VHOST_ACCESS_WO};

/// Maximum number of entries. The back-end asks again for an evicted translation.
const MAX_ENTRIES: usize = 1 << 16;

/// The type of a device's access to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Read and write, for the parts of a ring that both sides write.
    ReadWrite,
}

impl Access {
    /// The value of the `perm` field in messages.
    pub fn permission(self) -> u8 {
        match self {
            Access::Read => VHOST_ACCESS_RO,
            Access::Write => VHOST_ACCESS_WO,
            Access::ReadWrite => VHOST_ACCESS_RW,
        }
    }

    /// The access that the `perm` field of a message permits; `None` for 0 and for unknown values.
    pub fn from_permission(permission: u8) -> Option<Access> {
        [Access::Read, Access::Write, Access::ReadWrite].into_iter().find(|access| access.permission() == permission)
    }

    /// Returns true if this access as a permission permits `access`.
    pub fn permits(self, access: Access) -> bool {
        access.permission() & !self.permission() == 0
    }
}

/// A missing translation, for which the front-end must be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbMiss {
    /// The first I/O virtual address without a translation.
    pub iova: Iova,
    /// The access that was attempted.
    pub access: Access,
    /// True if there is a translation that does not permit this access.
    pub denied: bool,
}

/// A cache of translations, shared by the rings of a device.
///
/// ```
/// # use std::{os::fd::AsFd, sync::Arc};
/// # use vhost_migrate::memory::{Memory, Region, sealed_memfd};
/// use vhost_migrate::memory::{Access, GuestAddress, Iotlb, Iova, UserAddress};
/// # let user_addr = UserAddress(0x7f00_0000_0000);
/// # let fd = sealed_memfd("guest", 1 << 20)?;
/// # let memory = Memory::new([Arc::new(Region::map(fd.as_fd(), GuestAddress(0), 1 << 20, user_addr, 0)?)])?;
///
/// // The front-end permits reads of one page, which is at 0x8000 of the guest.
/// let iotlb = Iotlb::default();
/// iotlb.update(Iova(0xfff0_0000), 4096, UserAddress(user_addr.0 + 0x8000), Some(Access::Read))?;
///
/// let (iova, mut pieces) = (Iova(0xfff0_0010), Vec::new());
/// iotlb.translate(&memory, iova, 16, Access::Read, |gpa, len| pieces.push((gpa, len)))?;
/// assert_eq!(pieces, [(GuestAddress(0x8010), 16)]);
///
/// // A write is a miss, for which the front-end is asked.
/// assert!(iotlb.translate(&memory, iova, 16, Access::Write, |_, _| {}).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Iotlb(RwLock<IotlbEntries>);

#[derive(Debug, Default)]
struct IotlbEntries {
    /// Entries by first address. They never overlap.
    entries: BTreeMap<u64, IotlbEntry>,
    /// First address of the entry that was evicted last. The next one by address is evicted next.
    last_evicted: u64,
}

#[derive(Clone, Copy, Debug)]
struct IotlbEntry {
    last: u64,
    user: UserAddress,
    permitted: Option<Access>,
}

impl Iotlb {
    /// Adds the translation of `size` bytes at `iova` to `user` in the front-end, and replaces older translations of
    /// these bytes (rule T2.3). A translation that permits no access is kept too: with it a front-end denies every
    /// access.
    ///
    /// # Errors
    /// [`MemoryError::BadTranslation`] for an invalid range. The cache is unchanged then.
    pub fn update(
        &self,
        iova: Iova,
        size: u64,
        user: UserAddress,
        permitted: Option<Access>,
    ) -> Result<(), MemoryError> {
        let bad = MemoryError::BadTranslation { iova, size, user };
        let Some(more) = size.checked_sub(1) else { return Err(bad) };
        let (Some(last), Some(_)) = (iova.checked_add(more), user.checked_add(more)) else { return Err(bad) };
        let mut cache = self.0.write().unwrap_or_else(PoisonError::into_inner);
        cache.remove(iova.0, last.0);
        while cache.entries.len() >= MAX_ENTRIES {
            cache.evict_one();
        }
        cache.entries.insert(iova.0, IotlbEntry { last: last.0, user, permitted });
        Ok(())
    }

    /// Removes the translations of these addresses. It does not wait for accesses that use them already.
    pub fn invalidate(&self, iovas: &RangeInclusive<Iova>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(iovas.start().0, iovas.end().0);
    }

    /// Removes all translations. It does not wait for accesses that use them already.
    pub fn clear(&self) {
        self.invalidate(&(Iova(0)..=Iova(u64::MAX)));
    }

    /// The number of translations.
    pub fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).entries.len()
    }

    /// Returns true if the cache has no translation.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with the guest-physical address and the length of every piece of `len` bytes at `iova`. A piece is
    /// inside one translation and one region of `memory`.
    ///
    /// # Errors
    /// [`MemoryError::Untranslated`], or another error of the memory, for the first byte that cannot be accessed. `each`
    /// may have been called for the bytes before it.
    pub fn translate(
        &self,
        memory: &Memory,
        iova: Iova,
        len: u64,
        access: Access,
        mut each: impl FnMut(GuestAddress, u64),
    ) -> Result<(), MemoryError> {
        let cache = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut left) = (iova.0, len);
        while left > 0 {
            let missing = |denied| MemoryError::Untranslated(IotlbMiss { iova: Iova(at), access, denied });
            let (start, entry) = cache.entry_at(at).ok_or(missing(false))?;
            if !entry.permitted.is_some_and(|permitted| permitted.permits(access)) {
                return Err(missing(true));
            }
            let here = left.min((entry.last - at).saturating_add(1));
            memory.pieces_of_user(UserAddress(entry.user.0 + (at - start)), here, &mut each)?;
            left -= here;
            at = match at.checked_add(here) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(MemoryError::IovaWraps { iova, len }),
            };
        }
        Ok(())
    }
}

impl IotlbEntries {
    /// The entry that translates `iova`, with its first address.
    fn entry_at(&self, iova: u64) -> Option<(u64, IotlbEntry)> {
        let (start, entry) = self.entries.range(..=iova).next_back()?;
        (entry.last >= iova).then_some((*start, *entry))
    }

    /// Removes `first..=last` from all entries; the parts outside that range stay.
    fn remove(&mut self, first: u64, last: u64) {
        while let Some((&start, &entry)) = self.entries.range(..=last).next_back().filter(|(_, e)| e.last >= first) {
            self.entries.remove(&start);
            if entry.last > last {
                let user = UserAddress(entry.user.0 + (last + 1 - start));
                self.entries.insert(last + 1, IotlbEntry { user, ..entry });
            }
            if start < first {
                self.entries.insert(start, IotlbEntry { last: first - 1, ..entry });
                break;
            }
        }
    }

    /// Removes one entry, in the order of addresses.
    fn evict_one(&mut self) {
        let next = self.entries.range((Excluded(self.last_evicted), Unbounded)).next();
        if let Some((&start, _)) = next.or_else(|| self.entries.iter().next()) {
            self.entries.remove(&start);
            self.last_evicted = start;
        }
    }
}

/// The addresses that an INVALIDATE message names. 0 bytes at address 0 mean all addresses: the size of the whole
/// address space is 0 in 64 bits.
///
/// # Errors
/// [`MemoryError::BadTranslation`] for an empty range elsewhere and for one that wraps around.
pub fn invalidated(iova: Iova, size: u64) -> Result<RangeInclusive<Iova>, MemoryError> {
    match (iova, size) {
        (Iova(0), 0) => Ok(Iova(0)..=Iova(u64::MAX)),
        _ => {
            let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
            last.map(|last| iova..=last).ok_or(MemoryError::BadTranslation { iova, size, user: UserAddress(0) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Region, sealed_memfd};
    use std::os::fd::AsFd;
    use std::sync::Arc;

    const USER: u64 = 0x7000_0000;

    /// Two regions that are adjacent in the front-end's address space and far apart in the guest's.
    fn memory() -> Memory {
        let fd = sealed_memfd("iotlb-test", 0x8000).unwrap();
        let map = |gpa, user, offset| {
            Arc::new(Region::map(fd.as_fd(), GuestAddress(gpa), 0x4000, UserAddress(user), offset).unwrap())
        };
        Memory::new([map(0x10_0000, USER, 0), map(0x90_0000, USER + 0x4000, 0x4000)]).unwrap()
    }

    /// Adds a translation with the permission bits of a message.
    fn update(iotlb: &Iotlb, iova: u64, size: u64, user: u64, permission: u8) -> Result<(), MemoryError> {
        iotlb.update(Iova(iova), size, UserAddress(user), Access::from_permission(permission))
    }

    fn found(iotlb: &Iotlb, iova: u64, len: u64, access: Access) -> Result<Vec<(u64, u64)>, IotlbMiss> {
        let mut pieces = Vec::new();
        match iotlb.translate(&memory(), Iova(iova), len, access, |gpa, len| pieces.push((gpa.0, len))) {
            Ok(()) => Ok(pieces),
            Err(MemoryError::Untranslated(miss)) => Err(miss),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_range_is_split_at_the_ends_of_translations_and_regions() {
        let iotlb = Iotlb::default();
        update(&iotlb, 0x1000, 0x1000, USER + 0x2000, 3).unwrap();
        update(&iotlb, 0x2000, 0x2000, USER + 0x3000, 3).unwrap();
        let pieces = found(&iotlb, 0x1800, 0x1900, Access::Write).unwrap();
        assert_eq!(pieces, [(0x10_2800, 0x800), (0x10_3000, 0x1000), (0x90_0000, 0x100)]);
        let miss = found(&iotlb, 0x3f00, 0x101, Access::Read).unwrap_err();
        assert_eq!(miss, IotlbMiss { iova: Iova(0x4000), access: Access::Read, denied: false });
    }

    #[test]
    fn an_access_needs_its_permission() {
        let iotlb = Iotlb::default();
        for (permission, read, write) in [(0, false, false), (1, true, false), (2, false, true), (3, true, true)] {
            update(&iotlb, 0, 0x1000, USER, permission).unwrap();
            assert_eq!(found(&iotlb, 0, 1, Access::Read).is_ok(), read, "{permission}");
            assert_eq!(found(&iotlb, 0, 1, Access::Write).is_ok(), write, "{permission}");
            assert_eq!(found(&iotlb, 0, 1, Access::ReadWrite).is_ok(), read && write, "{permission}");
        }
        update(&iotlb, 0, 0x1000, USER, 1).unwrap();
        assert!(found(&iotlb, 0, 1, Access::Write).unwrap_err().denied);
    }

    /// Rule T2.4.
    #[test]
    fn an_invalidation_removes_its_addresses_and_no_others() {
        let iotlb = Iotlb::default();
        update(&iotlb, 0x1000, 0x4000, USER, 3).unwrap();
        iotlb.invalidate(&(Iova(0x2000)..=Iova(0x2fff)));
        assert_eq!(found(&iotlb, 0x1000, 0x1000, Access::Read).unwrap(), [(0x10_0000, 0x1000)]);
        assert_eq!(found(&iotlb, 0x2fff, 1, Access::Read).unwrap_err().iova, Iova(0x2fff));
        assert_eq!(found(&iotlb, 0x3000, 0x2000, Access::Read).unwrap(), [(0x10_2000, 0x2000)]);
        update(&iotlb, 0x1800, 0x2000, USER + 0x100, 3).unwrap();
        assert_eq!(
            found(&iotlb, 0x1000, 0x4000, Access::Read).unwrap(),
            [(0x10_0000, 0x800), (0x10_0100, 0x2000), (0x10_2800, 0x1800)],
            "a new translation replaces the old one"
        );
        iotlb.clear();
        assert!(iotlb.is_empty());
    }

    /// Rule T2.6.
    #[test]
    fn the_cache_is_bounded_and_keeps_the_latest_translation() {
        let iotlb = Iotlb::default();
        for number in 0..200_000u64 {
            let iova = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) << 12;
            update(&iotlb, iova, 0x1000, USER, 3).unwrap();
            assert!(found(&iotlb, iova, 1, Access::Read).is_ok());
        }
        assert!((MAX_ENTRIES / 2..=MAX_ENTRIES + 1).contains(&iotlb.len()), "{}", iotlb.len());
        // One entry that updates split into many.
        iotlb.clear();
        update(&iotlb, 0, 1 << 40, USER, 3).unwrap();
        (0..200_000u64).for_each(|page| update(&iotlb, page << 13, 0x1000, USER, 3).unwrap());
        assert!(iotlb.len() <= MAX_ENTRIES + 1, "{}", iotlb.len());
    }

    #[test]
    fn an_invalid_translation_is_refused() {
        let iotlb = Iotlb::default();
        for (iova, size, user) in [(0x1000, 0, USER), (u64::MAX, 2, USER), (0, 2, u64::MAX), (1, u64::MAX, USER)] {
            assert!(
                matches!(update(&iotlb, iova, size, user, 3), Err(MemoryError::BadTranslation { .. })),
                "{iova:#x} {size:#x}"
            );
        }
        assert_eq!(Access::from_permission(4), None);
        assert!(iotlb.is_empty());
        update(&iotlb, u64::MAX, 1, USER, 3).unwrap();
        assert_eq!(found(&iotlb, u64::MAX, 1, Access::Read).unwrap(), [(0x10_0000, 1)]);
        assert!(iotlb.translate(&memory(), Iova(u64::MAX), 2, Access::Read, |_, _| {}).is_err());
        assert_eq!(invalidated(Iova(0), 0).unwrap(), Iova(0)..=Iova(u64::MAX));
        assert_eq!(invalidated(Iova(u64::MAX), 1).unwrap(), Iova(u64::MAX)..=Iova(u64::MAX));
        assert!(invalidated(Iova(4096), 0).is_err() && invalidated(Iova(2), u64::MAX).is_err());
    }

    #[test]
    fn a_translation_that_leads_outside_memory_is_an_error_and_not_a_miss() {
        let iotlb = Iotlb::default();
        update(&iotlb, 0, 0x1000, USER + 0x7800, 3).unwrap();
        let found = iotlb.translate(&memory(), Iova(0x700), 0x101, Access::Read, |_, _| {});
        assert!(matches!(found, Err(MemoryError::UserNotMapped { .. })));
    }
}
