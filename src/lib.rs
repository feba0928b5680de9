//! Live migration, dirty logging and crash-resume for vhost devices.

// Helpers of several modules are used by none where their features are off.
#![cfg_attr(not(feature = "command"), allow(dead_code))]

pub mod abi;
#[cfg(feature = "backend")]
pub mod backend;
#[cfg(feature = "check")]
pub mod check;
#[cfg(feature = "command")]
pub mod control;
pub mod dirty;
#[cfg(feature = "frontend")]
pub mod frontend;
#[cfg(feature = "guest")]
pub mod guest;
pub mod inflight;
pub mod memory;
#[cfg(feature = "migrate")]
pub mod migrate;
pub mod ring;
#[cfg(any(feature = "backend", feature = "migrate"))]
pub mod stream;
mod sys;
