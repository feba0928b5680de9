//! The migration stream: connection header, frames, pages, records and transports. `migrate` decides what to send and
//! when. Nothing here starts a thread, except for cancellation, host names and `exec:` commands.
//!
//! | file | purpose |
//! |---|---|
//! | [`frame`] | connection header and self-contained, checksummed frames |
//! | [`record`] | everything that is not a page: the handshake and saved state, each with its version |
//! | [`pages`] | guest memory to page batches and back |
//! | [`hashes`] | hashes of guest memory, and their comparison |
//! | [`codec`] | none or zstd |
//! | [`transport`] | `tcp:`, `unix:`, `file:`, `exec:`, `fd:` as channels |
//!
//! `docs/stream-format.md` specifies every byte.
//!
//! # Example
//!
//! Send all pages of a guest through a pair of sockets, and restore them:
//!
//! ```
//! # use std::sync::Arc;
//! # use vhost_migrate::memory::{Memory, Region, sealed_memfd};
//! # fn guest_memory() -> Result<Memory, Box<dyn std::error::Error>> {
//! #     Ok(Memory::new([Arc::new(Region::share(sealed_memfd("guest", 1 << 20)?, 0, 1 << 20, 0)?)])?)
//! # }
//! use std::os::unix::net::UnixStream;
//!
//! use vhost_migrate::stream::{
//!     ChannelId, Codec, CopyingReader, FrameReader, FrameWriter, IncomingMemory, MigrationId, PageDecoder, PageEncoder,
//!     PageStats,
//! };
//!
//! let (source, destination) = (guest_memory()?, guest_memory()?);
//! source.write(0x5000, b"contents")?;
//! let (ours, theirs) = UnixStream::pair()?;
//! let id = ChannelId { migration: MigrationId::random()?, channel: 0 };
//!
//! let mut writer = FrameWriter::new(ours, id);
//! let sent = PageEncoder::new(Codec::None)?.send(&source, [0..256], &mut writer)?;
//! assert_eq!((sent.data_pages, sent.zero_pages), (1, 255));
//!
//! let mut reader = FrameReader::new(CopyingReader(theirs), id);
//! let mut decoder = PageDecoder::new(Arc::new(IncomingMemory::zeroed(destination.clone())), 0, 1)?;
//! let mut received = PageStats::default();
//! while received.pages() < sent.pages() {
//!     let header = reader.next_frame()?;
//!     received += decoder.receive(&header, &mut reader)?;
//! }
//! let mut contents = [0; 8];
//! destination.read(0x5000, &mut contents)?;
//! assert_eq!(&contents, b"contents");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod codec;
mod data_bitmap;
mod error;
pub mod frame;
pub mod hashes;
mod limiter;
#[cfg(not(feature = "zstd"))]
mod no_zstd;
pub mod pages;
pub mod record;
mod sys;
pub mod transport;

pub use codec::Codec;
pub use error::StreamError;
pub use frame::{ChannelId, FrameHeader, FrameKind, FrameReader, FrameWriter, MigrationId};
pub use hashes::{HashComparison, send_hashes};
pub use limiter::RateLimiter;
pub use pages::{IncomingMemory, PageDecoder, PageEncoder, PageStats, channel_of, runs_of_channel};
pub use record::{ToDestination, ToSource};
pub use sys::{CopyingReader, ReadMemory, ReceiveWindow};
pub use transport::{
    CancelToken, IncomingConnection, OutcomeQuery, StreamChannel, StreamConnection, StreamListener, StreamOptions, Uri,
};
