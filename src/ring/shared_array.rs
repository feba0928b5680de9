//! Typed, checked access to arrays in memory that a guest or a peer writes concurrently.
//!
//! All `unsafe` code of the rings is here. Not here: the meaning of the arrays.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use crate::memory::{GuestAddress, Memory};

use super::RingError;

/// A type that may be in shared memory: every bit pattern is valid, and other processes may change it at any time.
///
/// # Safety
/// Implement it only for atomic integers and arrays of them.
pub(super) unsafe trait SharedValue {}
// SAFETY: an atomic integer.
unsafe impl SharedValue for AtomicU16 {}
// SAFETY: an atomic integer.
unsafe impl SharedValue for AtomicU32 {}
// SAFETY: an array of atomic integers.
unsafe impl SharedValue for [AtomicU32; 2] {}
// SAFETY: an array of atomic integers.
unsafe impl SharedValue for [AtomicU64; 2] {}

/// An array of `T` in guest memory. Access is in range for every index.
pub(super) struct SharedArray<T: SharedValue> {
    first: NonNull<T>,
    /// The last valid index.
    last: u16,
    /// The mapping, which must outlive `first`.
    _memory: Memory,
}

impl<T: SharedValue> SharedArray<T> {
    /// The array of `count` (not 0) elements at `gpa`. `area` names it in errors.
    ///
    /// # Errors
    /// [`RingError::Outside`] or [`RingError::Misaligned`].
    pub(super) fn new(
        memory: &Memory,
        area: &'static str,
        gpa: GuestAddress,
        count: u16,
    ) -> Result<SharedArray<T>, RingError> {
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

    /// The element at `index` modulo the length, for the free-running indexes of split rings, whose length is a power
    /// of two.
    #[inline]
    pub(super) fn at(&self, index: u16) -> &T {
        // The mask only clears bits, so the result is at most `last` for every length.
        self.nth(index & self.last)
    }

    /// The element at `index`, or the last one if `index` is beyond it.
    #[inline]
    pub(super) fn nth(&self, index: u16) -> &T {
        // SAFETY: `new` checked that `last + 1` elements are mapped and aligned, and `_memory` keeps them mapped as
        // long as `self` exists. `T` is `SharedValue`: all access to it is atomic and every value is valid.
        unsafe { self.first.add(usize::from(index.min(self.last))).as_ref() }
    }
}

// SAFETY: the pointer is to memory that `_memory` (Send and Sync) keeps mapped, and only `&T` of atomics are returned.
unsafe impl<T: SharedValue> Send for SharedArray<T> {}
// SAFETY: as for `Send`.
unsafe impl<T: SharedValue> Sync for SharedArray<T> {}
