//! vhost-user back-end: protocol, socket, a worker thread per ring, and the devices.
//!
//! | file | purpose |
//! |---|---|
//! | `server` | accepts connections, reads messages, sends replies |
//! | `session` | protocol state machine of a connection, and what its messages set up |
//! | `rings` | the running rings: threads, main loop, inflight region, translations |
//! | `device` | the traits of a device, and [`Request`] |
//! | `devices` | block device, network device |
//! | `sandbox` | seccomp filter of a serving process |
//! | `counters` | metrics |
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
//! use vhost_migrate::abi::virtio::VirtioFeatures;
//! use vhost_migrate::backend::{BackendListener, Queue, RING_FEATURES, Request, SyncQueue, VirtioDevice, serve};
//! use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
//!
//! /// A source of random numbers, which are all 4.
//! struct Rng;
//!
//! impl VirtioDevice for Rng {
//!     fn features(&self) -> VirtioFeatures {
//!         RING_FEATURES
//!     }
//!
//!     fn config(&self) -> Vec<u8> {
//!         Vec::new()
//!     }
//!
//!     fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
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

mod counters;
mod device;
mod devices;
mod error;
pub(crate) mod rings;
mod sandbox;
mod server;
pub(crate) mod session;

#[cfg(feature = "metrics")]
pub use counters::describe_counters;
pub use device::{Queue, RING_FEATURES, Request, VirtioDevice};
pub use devices::{SyncQueue, blk, net};
pub use error::BackendError;
pub use sandbox::{Sandbox, SandboxError, ViolationAction};
pub use server::{BackendListener, InheritedSocket, connect_and_serve, inherit_socket, serve, serve_connection};
pub use session::FrontendHandle;

use rings::Workers;
use session::{Kick, MAX_FDS, Notifier, VhostUserMessage, VhostUserReply, VringConfig};
