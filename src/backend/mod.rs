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
//!
//! # Example
//!
//! Write a device, serve it on a socket, and let a front-end connect:
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("rng.sock");
//! use std::io;
//! use std::os::fd::AsFd;
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//! use std::thread;
//! use std::time::{Duration, Instant};
//!
//! use vhost_migrate::backend::{BackendListener, Queue, RING_FEATURES, Request, SyncQueue, VirtioDevice, serve};
//! use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
//!
//! /// A source of random numbers, which are all 4.
//! struct Rng;
//!
//! impl VirtioDevice for Rng {
//!     fn features(&self) -> u64 {
//!         RING_FEATURES
//!     }
//!
//!     fn config(&self) -> Vec<u8> {
//!         Vec::new()
//!     }
//!
//!     fn start_queue(&self, _index: u16, _size: u16, _features: u64) -> io::Result<Box<dyn Queue>> {
//!         Ok(Box::new(SyncQueue::new(|request: &mut Request| {
//!             let numbers = vec![4; request.writable_len().min(4096) as usize];
//!             // Fails for addresses outside guest memory: nothing is written then.
//!             let _ = request.write(0, &numbers);
//!         })))
//!     }
//! }
//!
//! let device: Arc<dyn VirtioDevice> = Arc::new(Rng);
//! let listener = BackendListener::bind(&path)?;
//! let (stop, stopper) = UnixStream::pair()?;
//! thread::scope(|scope| -> Result<(), Box<dyn std::error::Error>> {
//!     let backend = scope.spawn(|| serve(&listener, &device, stop.as_fd()));
//!
//!     let deadline = Instant::now() + Duration::from_secs(10);
//!     let frontend = UserDevice::connect(&path, UserOptions::default(), deadline)?;
//!     assert_eq!(frontend.features() & RING_FEATURES, RING_FEATURES);
//!     assert_eq!(frontend.queues(), 1);
//!
//!     drop(stopper);
//!     Ok(backend.join().map_err(|_| "the back-end panicked")??)
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
