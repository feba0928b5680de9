//! vhost-user back-end: protocol, socket, a worker thread per ring, and the devices.
//!
//! | file | purpose |
//! |---|---|
//! | `message` | decoding and encoding of one protocol message |
//! | `session` | protocol state machine, without I/O |
//! | `server` | accepts connections, reads messages, sends replies |
//! | `replies` | replies that are sent together |
//! | `ring_lock` | lets one of several connections run rings |
//! | `workers` | the rings of a connection and their threads |
//! | `ring_task` | starts a ring, waits for the translation of its areas |
//! | `worker` | main loop of a running ring: requests, log, publication, notification |
//! | `tracker` | the inflight region as a worker uses it |
//! | `iommu` | IOTLB misses of a ring, and what it has in use of the translations |
//! | `backend_channel` | requests to the front-end over the socket of SET_BACKEND_REQ_FD |
//! | `kick`, `notify` | kick, call and error descriptors |
//! | `device` | the traits of a device, and [`Request`] |
//! | `sync_queue` | a queue that serves each request synchronously |
//! | `transfer` | transfer of the device state through a pipe |
//! | `postcopy` | guest memory whose pages arrive while rings run |
//! | `sandbox` | seccomp filter of a serving process |
//! | `counters` | metrics |
//! | `blk` | block device |
//! | `net` | network device |
//! | `disk_io` | disk I/O from and to the memory of a request |
//!
//! Devices do no logging. They access guest memory only through a [`Request`], which records what was lent for writing;
//! the worker marks it before it publishes the request. The layout of rings and inflight regions is in [`crate::ring`]
//! and [`crate::inflight`]; the driving side is in `frontend`.

mod backend_channel;
pub mod blk;
mod counters;
mod device;
mod disk_io;
mod error;
mod iommu;
mod kick;
mod message;
pub mod net;
mod notify;
mod postcopy;
mod replies;
mod ring_lock;
mod ring_task;
mod sandbox;
mod server;
mod session;
mod sync_queue;
mod tracker;
mod transfer;
mod worker;
mod workers;

pub use backend_channel::FrontendHandle;
#[cfg(feature = "metrics")]
pub use counters::describe_counters;
pub use device::{Queue, RING_FEATURES, Request, VirtioDevice};
pub use error::BackendError;
pub use kick::Kick;
pub use message::{MAX_FDS, MAX_PAYLOAD, VhostUserMessage, VhostUserReply};
pub use notify::Notifier;
pub use sandbox::{Sandbox, SandboxError, ViolationAction};
pub use server::{BackendListener, InheritedSocket, connect_and_serve, inherit_socket, serve, serve_connection};
pub use session::{Logging, MessageOutcome, Session, VringConfig, VringController};
pub use sync_queue::SyncQueue;
pub use workers::Workers;
