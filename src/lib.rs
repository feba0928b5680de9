//! Live migration, dirty logging and crash-resume for vhost devices.

pub mod abi;
pub mod control;
pub mod frontend;
pub mod memory;
pub mod migrate;
pub mod ring;
pub mod dirty;
pub mod inflight;
pub mod dirty;
pub mod memory;
pub mod migrate;
pub mod ring;
