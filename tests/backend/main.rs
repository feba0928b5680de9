//! Tests of the vhost-user back-end with a raw protocol client as the front-end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod backend_channel;
mod blk;
mod broken_rings;
mod connect;
mod crash;
mod direct;
mod drain;
mod guest;
mod hostile;
mod iommu;
mod iommu_discard;
mod iommu_guest;
mod iommu_load;
mod leaks;
mod log;
mod log_order;
mod metrics;
mod net;
mod net_driver;
#[path = "../page_cache/mod.rs"]
mod page_cache;
mod postcopy;
mod race;
mod raw;
mod ring_base;
mod rules;
mod sandbox;
mod server;
mod shared_fds;
mod state;
mod suspend;
