//! The corner for system calls that the safe wrappers in use don't cover and that several rooms need: fd passing,
//! listening at a path, all that comes through a pipe. Each is behind a safe function.

pub(crate) mod counters;
pub(crate) mod join;
pub(crate) mod listen;
pub(crate) mod log_limit;
pub(crate) mod nonblocking;
pub(crate) mod pipe;
pub(crate) mod random;
pub(crate) mod socket;
pub(crate) mod write_back;
pub(crate) mod xattr;
