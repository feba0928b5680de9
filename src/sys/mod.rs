//! The corner for system calls that the safe wrappers in use don't cover and that several rooms need: fd passing, and
//! listening at a path. Each is behind a safe function.

pub(crate) mod listen;
pub(crate) mod socket;
