//! `check`: our back-ends pass every rule, and each injected fault fails its own rule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod backend_channel;
mod command;
mod devices;
mod fault;
mod faulty_backend;
mod faulty_disk;
#[path = "../kit/forward.rs"]
mod forward;
mod iommu;
mod own_backends;
mod postcopy;
mod rules;
mod state;
#[path = "../kit/wait.rs"]
mod wait;
mod wire;
