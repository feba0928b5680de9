//! To be a vhost-user device: the protocol, the socket around it, one worker per ring, and the devices.
//!
//! | file | purpose |
//! |---|---|
//! | `message` | one message of the protocol, framed and unframed |
//! | `session` | what messages mean: a state machine without I/O |
//! | `server` | listens, reads and answers messages, survives its front-ends |
//! | `iommu` | what a ring behind an IOMMU asks for, and what it has in use |
//! | `tracker` | what the inflight region is told of a ring's requests |
//! | `ring_task` | where a ring is taken up, and waits for its areas behind an IOMMU |
//! | `workers` | the rings of a connection, and how they are commanded |
//! | `worker` | the thread of a running ring: takes requests, logs, publishes, notifies |
//! | `backend_channel` | what the front-end is told without having asked |
//! | `device` | what a device author writes, and the [`Request`] it gets |
//! | `sync_queue` | a queue that serves its requests as they come |
//! | `transfer` | a device's state through a pipe |
//! | `postcopy` | guest memory that comes while rings run |
//! | `sandbox` | what a process that serves may ask of the kernel |
//! | `counters` | what is counted, for monitoring |
//! | `blk` | a disk |
//! | `net` | a network interface |
//! | `disk_io` | disk I/O from and to the memory of a request |
//!
//! A device never logs: it can only reach guest memory through its [`Request`], which remembers what was lent for
//! writing, and the worker marks that before it publishes the request. Not here: how rings and inflight regions look
//! ([`crate::ring`], [`crate::inflight`]), and driving a device (`frontend`).

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
