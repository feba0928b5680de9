//! The rings of a device while they run.
//!
//! | file | purpose |
//! |---|---|
//! | `workers` | the rings of a connection and their threads |
//! | `ring_lock` | lets one of several connections run rings |
//! | `ring_task` | starts a ring, waits for the translation of its areas |
//! | `worker` | main loop of a running ring: requests, log, publication, notification |
//! | `tracker` | a ring with its part of the inflight region, as a worker uses it |
//! | `iommu` | IOTLB misses of a ring, and what it has in use of the translations |

mod iommu;
pub(super) mod ring_lock;
mod ring_task;
mod tracker;
mod worker;
mod workers;

pub use workers::Workers;
