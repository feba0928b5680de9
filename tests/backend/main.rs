//! Tests of the vhost-user back-end with a raw protocol client as the front-end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod backend_channel;
mod blk;
mod broken_rings;
mod connect;
mod crash;
mod direct;
mod drain;
#[path = "../kit/forward.rs"]
mod forward;
#[path = "../kit/guest.rs"]
mod guest;
mod hostile;
mod iommu;
mod iommu_discard;
#[path = "../kit/iommu_guest.rs"]
mod iommu_guest;
#[path = "../kit/iommu_load.rs"]
mod iommu_load;
mod leaks;
mod log;
mod log_order;
mod metrics;
mod net;
mod net_driver;
#[path = "../kit/page_cache.rs"]
mod page_cache;
mod postcopy;
#[path = "../kit/metrics.rs"]
mod prometheus;
mod race;
#[path = "../kit/raw.rs"]
mod raw;
mod ring_base;
mod rules;
mod sandbox;
#[path = "../kit/served.rs"]
mod served;
#[path = "../kit/server.rs"]
mod server;
mod shared_fds;
mod state;
mod suspend;
#[path = "../kit/tracked_ring.rs"]
mod tracked_ring;
#[path = "../kit/wait.rs"]
mod wait;
