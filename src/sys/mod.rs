//! The corner for system calls that the safe wrappers in use don't cover: fd passing, and disk I/O straight to and
//! from guest memory. Each is behind a safe function.

pub(crate) mod disk;
pub(crate) mod socket;
