//! Live migration, dirty logging and crash-resume for vhost devices.

pub mod abi;
pub mod backend;
pub mod check;
pub mod control;
pub mod dirty;
pub mod frontend;
pub mod guest;
pub mod inflight;
pub mod memory;
pub mod migrate;
pub mod ring;
pub mod stream;
mod sys;
