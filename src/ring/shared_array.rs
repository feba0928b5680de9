//! Typed, checked access to arrays in memory that a guest or a peer writes at the same time.
//!
//! All `unsafe` of the rings is here. Not here: what the arrays mean.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use crate::memory::Memory;

use super::RingError;

/// What may lie in shared memory: any bytes are a valid value, and others may change it at any time.
///
/// # Safety
/// Only for atomic integers and arrays of them.
pub(super) unsafe trait SharedValue {}
// SAFETY: an atomic integer.
unsafe impl SharedValue for AtomicU16 {}
// SAFETY: an atomic integer.
unsafe impl SharedValue for AtomicU32 {}
// SAFETY: an array of atomic integers.
unsafe impl SharedValue for [AtomicU32; 2] {}
// SAFETY: an array of atomic integers.
unsafe impl SharedValue for [AtomicU64; 2] {}

/// An array of `T` in guest memory. Whatever the index, no access is out of range.
pub(super) struct SharedArray<T: SharedValue> {
    first: NonNull<T>,
    /// The last index.
    last: u16,
    /// Keeps the mapping alive.
    _memory: Memory,
}

impl<T: SharedValue> SharedArray<T> {
    /// The `count` (not 0) `T`s at `gpa`, which belong to `area`.
    pub(super) fn new(memory: &Memory, area: &'static str, gpa: u64, count: u16) -> Result<SharedArray<T>, RingError> {
        let bytes = u64::from(count) * size_of::<T>() as u64;
        let slice = memory.slice(gpa, bytes).map_err(|source| RingError::Outside { area, source })?;
        let misaligned = RingError::Misaligned { area, gpa, align: align_of::<T>() as u64 };
        match NonNull::new(slice.ptr_guard_mut().as_ptr().cast::<T>()) {
            Some(first) if first.is_aligned() && count > 0 => {
                Ok(SharedArray { first, last: count - 1, _memory: memory.clone() })
            }
            _ => Err(misaligned),
        }
    }

    /// The element `index` modulo the length, which is a power of two, as split rings want it.
    #[inline]
    pub(super) fn at(&self, index: u16) -> &T {
        // A mask only takes bits away: the result is at most `last`, whatever the length.
        self.nth(index & self.last)
    }

    /// The element `index`, or the last one if there are fewer.
    #[inline]
    pub(super) fn nth(&self, index: u16) -> &T {
        // SAFETY: `new` checked that `last + 1` elements are mapped and aligned, and `_memory` keeps them mapped for as
        // long as `self` lives. `T` is `SharedValue`: all access to it is atomic and every value is valid.
        unsafe { self.first.add(usize::from(index.min(self.last))).as_ref() }
    }
}

// SAFETY: the pointer is to memory that `_memory` (Send and Sync) keeps mapped, and gives out only `&T` of atomics.
unsafe impl<T: SharedValue> Send for SharedArray<T> {}
// SAFETY: as for `Send`.
unsafe impl<T: SharedValue> Sync for SharedArray<T> {}
