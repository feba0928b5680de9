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
