//! Live migration, dirty logging and crash-resume for vhost devices.

pub mod dirty;
