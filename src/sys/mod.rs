//! System calls that several modules need and that the wrappers in use (nix, std) do not cover: fd passing, listening
//! at a path, reads and writes that never block, extended attributes.
//!
//! Each is behind a safe function. System calls that one module alone needs stay in that module. Beside them: waiting
//! for threads, the limit of log lines, counters, and the text of an error with its causes.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) mod counters;
pub(crate) mod join;
pub(crate) mod listen;
pub(crate) mod log_limit;
pub(crate) mod nonblocking;
pub(crate) mod pipe;
pub(crate) mod random;
pub(crate) mod socket;
#[cfg(feature = "frontend")]
pub(crate) mod tap;
pub(crate) mod with_causes;
pub(crate) mod write_back;
pub(crate) mod xattr;

/// Locks a mutex. Ignores poisoning: no code that can panic leaves the guarded data inconsistent.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
