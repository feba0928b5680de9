//! The corner for system calls that the safe wrappers in use don't cover: fd passing, disk I/O straight to and from
//! guest memory, and listening at a path. Each is behind a safe function.

pub(crate) mod disk;
pub(crate) mod listen;
pub(crate) mod socket;
