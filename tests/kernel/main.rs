//! Tests that run in the kernel lab (`tests/kernel/run`): our front-ends and devices with Linux's vhost, vDPA and VDUSE.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod demo;
mod errors;
mod guide;
mod inspect;
mod migrate_net;
mod modules;
mod net;
#[path = "../kit/process.rs"]
mod process;
mod rings;
mod scsi;
mod shadow;
mod tap;
mod vdpa;
mod vduse;
mod vduse_blk;
mod vduse_bus;
mod vduse_calls;
mod vduse_crash;
mod vduse_faults;
mod vduse_guide;
mod vduse_net;
mod vduse_vhost;
mod vsock;
#[path = "../kit/wait.rs"]
mod wait;
