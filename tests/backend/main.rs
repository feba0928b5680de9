//! Tests of the vhost-user back-end with a raw protocol client as the front-end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod afresh;
mod blk;
mod broken;
mod channel;
mod confined;
mod connect;
mod crash;
mod direct;
mod drain;
mod guest;
mod hostile;
mod interface;
mod iommu;
mod iommu_anew;
mod iommu_load;
mod iommu_space;
mod leaks;
mod log;
mod log_order;
mod metrics;
mod net;
#[path = "../page_cache/mod.rs"]
mod page_cache;
mod postcopy;
mod race;
mod raw;
mod rules;
mod server;
mod shared;
mod state;
mod suspend;
