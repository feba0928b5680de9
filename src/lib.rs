//! Live migration, dirty logging and crash recovery for vhost devices.
//!
//! # Features
//!
//! | feature | content |
//! |---|---|
//! | none | [`abi`], [`memory`], [`dirty`], [`ring`], [`inflight`] |
//! | `backend` | [`backend`]: vhost-user devices, with a disk and a network interface |
//! | `frontend` | [`frontend`]: a front-end that drives vhost-user devices |
//! | `migrate` | [`migrate`] and [`stream`]: live migration, and the stream that carries it |
//! | `guest` | [`guest`]: the built-in guest, which checks its memory and disks |
//! | `check` | [`check`]: conformance checks of vhost-user back-ends |
//! | `io-uring` | disk I/O of `backend` by io_uring; by threads otherwise |
//! | `zstd` | compressed migration streams |
//! | `metrics` | counters, through the facade of the crate `metrics` |
//! | `serde` | `Serialize` and `Deserialize` for states and figures |
//! | `vm-memory-bitmap` | `dirty::LogBitmap`: the dirty log as the bitmap of vm-memory's guest memory |
//! | `vhost-user-backend` | `dirty::RegionBitmap`: the dirty log for devices made of rust-vmm's crate of that name |
//! | `command` | the command `vhost-migrate`, and [`control`]; includes all features above except the last two |
//!
//! The default is `command` and `vm-memory-bitmap`. Users of the library set `default-features = false` and the
//! features that they need.

// Some shared helpers are unused if the features of all their users are off.
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
#[cfg(any(feature = "backend", feature = "migrate"))]
pub mod record;
pub mod ring;
#[cfg(feature = "migrate")]
pub mod stream;
mod sys;
