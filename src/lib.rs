//! Live migration, dirty logging and crash-resume for vhost devices.

pub mod memory;
pub mod ring;
pub mod abi;
