//! The error type of the stream. Texts include advice for the user.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::frame::FrameKind;
use crate::memory::{MemoryError, PageRange};
use crate::record::{RecordError, version_advice};

/// An error while opening, reading or writing a migration stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The first bytes are not those of a migration stream.
    #[error("this is not a migration stream (bad magic): check that the other side is vhost-migrate")]
    NotAStream,
    /// Source and destination use different versions of the stream.
    #[error("{}", version_advice("stream", *.ours, *.theirs))]
    Version {
        /// Version used by this program.
        ours: u16,
        /// Version found in the peer's header.
        theirs: u16,
    },
    /// A save to this file or device was cancelled, failed or was killed before it was complete.
    #[error("this save is incomplete: the source was killed, cancelled or failed. Save the guest again")]
    Unfinished,
    /// Another file took the name of a `file:` URI while this save was under way.
    #[error("{}: another save has taken this name since this one started. Save under another name", .0.display())]
    NameTaken(PathBuf),
    /// A record cannot be encoded or decoded.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The stream ended inside a header or a frame.
    #[error("the stream ends in the middle of {0}: the peer died, the connection was cut or the file is incomplete")]
    Truncated(&'static str),
    /// The stream ended between two frames and before its last record.
    #[error("the stream ended before the migration did: the peer went away or the file is incomplete")]
    Ended,
    /// A checksum does not match.
    #[error("checksum mismatch in {what} {sequence}: the stream was damaged on its way")]
    Checksum {
        /// The damaged item.
        what: &'static str,
        /// Frame sequence number within its channel.
        sequence: u64,
    },
    /// A frame was lost, repeated or belongs to another stream.
    #[error("received frame {found}, expected frame {wanted}: frames were lost or reordered on the way")]
    Sequence {
        /// The expected number.
        wanted: u64,
        /// The number found.
        found: u64,
    },
    /// A frame kind that this version does not know.
    #[error("frame kind {0:#06x} is unknown to this version: the stream is damaged or the sender is newer")]
    UnknownKind(u16),
    /// A frame over its limit. Nothing was allocated for it.
    #[error("{what} of {length} bytes is over the limit of {limit} bytes")]
    TooLong {
        /// The frame.
        what: &'static str,
        /// Its length, bytes.
        length: u64,
        /// The limit, bytes.
        limit: u64,
    },
    /// Data that violates the format, other than a record's encoding.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// The frame, or what is in it.
        what: &'static str,
        /// The violated rule.
        why: String,
    },
    /// A valid frame at the wrong point of the handshake.
    #[error("received a {found} frame, expected {wanted}")]
    Unexpected {
        /// The received frame.
        found: FrameKind,
        /// The expected frame or frames.
        wanted: &'static str,
    },
    /// A page number of the peer is outside guest memory.
    #[error(
        "pages {:#x} to {:#x} are not all in guest memory: start the destination with the same memory",
        pages.start,
        pages.end
    )]
    OutsideMemory {
        /// The pages.
        pages: PageRange,
    },
    /// Source and destination have different memory layouts.
    #[error("memory of source and destination differs: {0}: start the destination with the same memory")]
    Layout(String),
    /// An access to guest memory failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An unknown codec name or a compression level that zstd does not support.
    #[error("unknown codec \"{0}\": use none, zstd or zstd:LEVEL with a level from -7 to 22")]
    UnknownCodec(String),
    /// Compression or decompression failed.
    #[error("{doing} failed")]
    Codec {
        /// The failed operation.
        doing: &'static str,
        /// The error of zstd.
        source: io::Error,
    },
    /// A malformed URI.
    #[error("\"{uri}\": {why}")]
    Uri {
        /// The given text.
        uri: String,
        /// The reason and the correct syntax.
        why: String,
    },
    /// A transport could not be opened.
    #[error("{uri}: {advice}")]
    Open {
        /// The URI.
        uri: String,
        /// The reason and advice.
        advice: String,
        /// The error of the system, if there was one.
        #[source]
        source: Option<io::Error>,
    },
    /// The command of an `exec:` URI failed.
    #[error("the command \"{command}\" ended with {status}: see its own messages")]
    Command {
        /// The command line.
        command: String,
        /// Exit status or signal.
        status: String,
    },
    /// The outcome cannot be queried: the migration used a connection that cannot be made again.
    #[error("the outcome can't be queried: only tcp: and unix: destinations accept a second connection")]
    NoReturnPath,
    /// The peer closed the connection.
    #[error("the peer closed the connection: see its log for the reason")]
    PeerGone,
    /// The file system of a `file:` transport is full.
    #[error("no space left for the migration file: free some space or name another file")]
    DiskFull,
    /// No bytes were transferred for the whole timeout.
    #[error("no progress on the connection for {0:?}: the peer hangs or the network is cut")]
    Timeout(Duration),
    /// [`CancelToken::cancel`](super::CancelToken::cancel) was called.
    #[error("cancelled")]
    Cancelled,
    /// Any other failure to read or write.
    #[error("reading or writing the stream failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for StreamError {
    fn from(error: io::Error) -> StreamError {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => StreamError::PeerGone,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StreamError::DiskFull,
            _ => error.downcast::<StreamError>().unwrap_or_else(StreamError::Io),
        }
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> io::Error {
        match error {
            StreamError::Io(error) => error,
            other => io::Error::other(other),
        }
    }
}
