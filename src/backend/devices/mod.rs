//! The devices of this crate.
//!
//! | file | purpose |
//! |---|---|
//! | `blk` | block device |
//! | `net` | network device |
//! | `disk_io` | disk I/O from and to the memory of a request |
//! | `sync_queue` | a queue that serves each request synchronously, for simple devices |

pub mod blk;
mod disk_io;
pub mod net;
mod sync_queue;

pub use sync_queue::SyncQueue;
