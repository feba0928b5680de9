//! The migration stream: connection header, frames, pages, records and transports. `migrate` decides what to send and
//! when. Nothing here starts a thread, except for cancellation, host names and `exec:` commands.
//!
//! | file | purpose |
//! |---|---|
//! | `frame` | connection header and self-contained, checksummed frames |
//! | `record` | everything that is not a page: the handshake and saved state, each with its version |
//! | `pages` | guest memory to page batches and back |
//! | `hashes` | hashes of guest memory, and their comparison |
//! | `codec` | none or zstd |
//! | `transport` | `tcp:`, `unix:`, `file:`, `exec:`, `fd:` as channels |
//!
//! `docs/stream-format.md` specifies every byte.
//!
//! # Example
//!
//! Connect two channels of a migration:
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("incoming");
//! use vhost_migrate::stream::{StreamListener, StreamOptions, Uri, connect};
//!
//! let uri: Uri = format!("unix:{}", path.display()).parse()?;
//! let listener = StreamListener::bind(&uri)?;
//! let destination = std::thread::spawn(move || listener.accept(&StreamOptions::new()?));
//!
//! let mut options = StreamOptions::new()?;
//! options.channels = 2;
//! let connection = connect(&uri, &options)?;
//! let accepted = destination.join().map_err(|_| "the destination panicked")??;
//! assert_eq!((accepted.id, accepted.channels.len()), (connection.id, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cancel;
mod codec;
mod data_bitmap;
mod error;
pub(crate) mod frame;
pub(crate) mod hashes;
mod limiter;
#[cfg(not(feature = "zstd"))]
mod no_zstd;
pub(crate) mod pages;
pub(crate) mod record;
pub(crate) mod sys;
mod transport;

pub use cancel::{CancelCallback, CancelToken};
pub use codec::Codec;
pub use error::StreamError;
pub use frame::{FrameKind, MAX_CHANNELS, MigrationId};
pub use limiter::RateLimiter;
pub use pages::PageStats;
pub use record::{Held, RegionLayout, Started, ToSource};
pub use transport::{
    IncomingConnection, OutcomeQuery, StreamChannel, StreamConnection, StreamListener, StreamOptions, Uri, connect,
    query_outcome, remove_unfinished_saves,
};
