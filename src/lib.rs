//! Live migration, dirty logging and crash recovery for vhost-user devices.
//!
//! In vhost-user, the *front-end* is the process that owns a guest's memory, usually a VMM. The *back-end* is the process
//! that implements a device. This crate has both sides, and the migration of a guest between two hosts.
//!
//! # Which module for which task
//!
//! | task | module | complete program |
//! |---|---|---|
//! | write a vhost-user device | [`backend`] | `examples/file_disk.rs` |
//! | serve a disk or a network interface | [`backend::blk`], [`backend::net`] | the command's `backend` |
//! | serve a device to the kernel's vDPA bus | [`vduse`] | the command's `backend --vduse` |
//! | drive a device from a VMM | [`frontend`] | `examples/drive_device.rs` |
//! | log the writes of a device that has no dirty log | [`shadow`] | |
//! | migrate a guest | [`migrate`] | `examples/migrate_vm.rs` |
//! | use only the stream of a migration, or its transports | [`stream`] | |
//! | log the writes of a device that has its own protocol code | [`dirty`] | `examples/rust_vmm_device.rs` |
//! | measure how fast a guest writes memory | [`dirty::measure_dirty_rate`] | the command's `dirty-rate` |
//! | process rings, as driver or as device | [`ring`] | |
//! | keep requests over a crash of a device | [`inflight`] | |
//! | map guest memory, translate addresses, missing pages | [`memory`] | |
//! | test a back-end for what migration needs | [`check`] | the command's `check` |
//! | test a migration or a back-end with a guest that verifies all its data | [`guest`] | the command's `guest` |
//! | control a process that owns a guest | [`control`] | the command's `migrate` |
//! | save state with a version | [`record`] | |
//! | numbers and structures of the kernel and the specifications | [`abi`] | |
//!
//! # Example
//!
//! One step of a live migration: copy the pages that a device has written while the guest runs.
//!
//! ```
//! use std::sync::Arc;
//!
//! use vhost_migrate::dirty::{Log, PageSet};
//! use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, Region};
//!
//! // Guest memory at the source and at the destination, 1 MiB each.
//! fn guest_memory() -> Result<Memory, Box<dyn std::error::Error>> {
//!     Ok(Memory::new([Arc::new(Region::create(GuestAddress(0), 1 << 20)?)])?)
//! }
//! let (source, destination) = (guest_memory()?, guest_memory()?);
//!
//! // A device writes 8 bytes, which are on two pages, and marks them in the log.
//! let (log, _fd) = Log::create(source.end())?;
//! source.write(GuestAddress(0x1ffc), b"received")?;
//! log.mark(GuestAddress(0x1ffc), 8);
//!
//! // The migration takes the marks out of the log and copies these pages.
//! let mut dirty = PageSet::default();
//! log.harvest(&mut dirty);
//! assert_eq!(dirty.len(), 2);
//! for page in dirty.iter() {
//!     let mut contents = [0; LOG_PAGE as usize];
//!     source.read(page.address(), &mut contents)?;
//!     destination.write(page.address(), &contents)?;
//! }
//!
//! let mut arrived = [0; 8];
//! destination.read(GuestAddress(0x1ffc), &mut arrived)?;
//! assert_eq!(&arrived, b"received");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//!
//! | feature | content |
//! |---|---|
//! | none | [`abi`], [`memory`], [`dirty`], [`ring`], [`inflight`] |
//! | `backend` | [`backend`]: vhost-user devices, with a disk and a network interface |
//! | `vduse` | [`vduse`]: devices of `backend` on the kernel's vDPA bus |
//! | `frontend` | [`frontend`]: a front-end that drives vhost-user devices and those of the kernel; with `backend` also [`shadow`] |
//! | `migrate` | [`migrate`] and [`stream`]: live migration, and the stream that carries it |
//! | `guest` | [`guest`]: the built-in guest, which checks its memory and disks |
//! | `check` | [`check`]: conformance checks of vhost-user back-ends |
//! | `io-uring` | disk I/O of `backend` by io_uring; by threads otherwise |
//! | `zstd` | compressed migration streams |
//! | `metrics` | counters, through the facade of the crate `metrics` |
//! | `serde` | `Serialize` and `Deserialize` for states and figures |
//! | `vm-memory-bitmap` | `dirty::LogBitmap`: the dirty log as the bitmap of vm-memory's guest memory |
//! | `vhost-user-backend` | `dirty::RegionBitmap`: the dirty log for devices made of rust-vmm's crate of that name |
//! | `unstable` | `unstable`: internals for this project's tests, which any version may change |
//! | `command` | the command `vhost-migrate`, and [`control`]; includes all features but `vm-memory-bitmap` and `vhost-user-backend` |
//!
//! The default is `command` and `vm-memory-bitmap`. Users of the library set `default-features = false` and the
//! features that they need.
//!
//! # Rules and log messages
//!
//! "Rule R3.2" is an obligation of `docs/protocol.md`. `docs/glossary.md` has the terms.
//!
//! An error of a connection or of a ring ends only that, and is logged by the crate `tracing`. A program sees these
//! messages if it installs a subscriber, for example by `tracing_subscriber::fmt::init()`.

// docs.rs builds with a nightly toolchain and shows the feature that each item needs.
#![cfg_attr(docsrs, feature(doc_cfg))]
// Some shared helpers are unused if the features of all their users are off.
#![cfg_attr(not(feature = "command"), allow(dead_code, unused_macros))]
// Without `unstable`, what only it re-exports is private.
#![cfg_attr(not(feature = "unstable"), allow(unreachable_pub, unused_imports))]

/// Defines methods that return options with one field changed.
macro_rules! setters {
    ($($with:ident: $field:ident: $type:ty),* $(,)?) => {
        $(
            #[doc = concat!("Sets `", stringify!($field), "`.")]
            #[must_use]
            pub fn $with(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )*
    };
}

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
#[cfg(all(feature = "backend", feature = "frontend"))]
pub mod shadow;
#[cfg(feature = "migrate")]
pub mod stream;
mod sys;
#[cfg(feature = "unstable")]
pub mod unstable;
#[cfg(feature = "vduse")]
pub mod vduse;

/// The example in the guide.
#[cfg(all(doctest, feature = "backend", feature = "frontend"))]
#[doc = include_str!("../docs/guide/kernel-vhost.md")]
struct KernelVhostGuide;
