//! The one error type of the stream. Texts say what to do; nothing here decides whether a migration goes on.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::frame::FrameKind;
use crate::memory::MemoryError;

/// Why a stream could not be written, read, opened or believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The first bytes are not those of a migration stream.
    #[error("this is not a migration stream (bad magic): check that the other side is vhost-migrate")]
    NotAStream,
    /// The two sides speak different versions of the stream.
    #[error("{}", version_advice("stream", *.ours, *.theirs))]
    Version {
        /// Version that this program speaks.
        ours: u16,
        /// Version found in the peer's header.
        theirs: u16,
    },
    /// A save to this file or device was cancelled, failed or was killed before its end.
    #[error("this save was not finished: the source was killed, cancelled or failed. Save the guest again")]
    Unfinished,
    /// The name of a `file:` was given to another file since this save began.
    #[error("{}: another save has taken this name since this one began: save under another name", .0.display())]
    NameTaken(PathBuf),
    /// A record has a version that this program does not read.
    #[error("{}", version_advice(.record, *.ours, *.theirs))]
    RecordVersion {
        /// Name of the record.
        record: &'static str,
        /// Version that this program reads.
        ours: u16,
        /// Version found.
        theirs: u16,
    },
    /// The stream ended inside a header or a frame.
    #[error("the stream ends in the middle of {0}: the peer died, the connection was cut or the file is incomplete")]
    Truncated(&'static str),
    /// The stream ended between two frames, but its last record has not been seen.
    #[error("the stream ended before the migration did: the peer went away or the file is incomplete")]
    Ended,
    /// A checksum does not fit.
    #[error("the checksum of {what} number {sequence} does not fit: the stream was damaged on its way")]
    Checksum {
        /// What was damaged.
        what: &'static str,
        /// Frame sequence number within its channel.
        sequence: u64,
    },
    /// A frame was lost, repeated or came from another stream.
    #[error("frame {found} came where frame {wanted} was due: frames were lost or mixed up on the way")]
    Sequence {
        /// The number that was due.
        wanted: u64,
        /// The number found.
        found: u64,
    },
    /// A frame of a kind this version does not know.
    #[error("frame kind {0:#06x} is unknown to this version: the stream is damaged or the sender is newer")]
    UnknownKind(u16),
    /// A length beyond what its frame or record may have; nothing was allocated for it.
    #[error("{what} of {length} bytes is over the limit of {limit} bytes")]
    TooLong {
        /// What was too long.
        what: &'static str,
        /// Its length, bytes.
        length: u64,
        /// The most it may be, bytes.
        limit: u64,
    },
    /// Bytes that break a rule of the format.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// The frame or record.
        what: &'static str,
        /// The broken rule.
        why: String,
    },
    /// A frame that is valid but not now.
    #[error("a {found} frame came where {wanted} was due")]
    Unexpected {
        /// What came.
        found: FrameKind,
        /// What was due.
        wanted: &'static str,
    },
    /// The peer's pages are not pages of this guest.
    #[error("pages {first:#x} to {end:#x} are not all in guest memory: start the destination with the same memory")]
    OutsideMemory {
        /// First page number.
        first: u64,
        /// One past the last page number.
        end: u64,
    },
    /// The memory of source and destination differs.
    #[error("memory of source and destination differs: {0}: start the destination with the same memory")]
    Layout(String),
    /// Guest memory refused an access.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A codec name nobody knows, or a level zstd does not have.
    #[error("unknown codec \"{0}\": use none, zstd or zstd:LEVEL with a level from -7 to 22")]
    UnknownCodec(String),
    /// The compressor or decompressor failed.
    #[error("{doing} failed: {source}")]
    Codec {
        /// What was tried.
        doing: &'static str,
        /// What zstd says.
        source: io::Error,
    },
    /// A URI that can't be understood.
    #[error("\"{uri}\": {why}")]
    Uri {
        /// The text given.
        uri: String,
        /// What is wrong and what to write.
        why: String,
    },
    /// A transport could not be opened.
    #[error("{uri}: {advice}")]
    Open {
        /// The URI.
        uri: String,
        /// What happened and what to do.
        advice: String,
        /// What the system said, when it said something.
        #[source]
        source: Option<io::Error>,
    },
    /// The command of an `exec:` URI did not end well.
    #[error("the command \"{command}\" ended with {status}: see its own messages")]
    Command {
        /// The command line.
        command: String,
        /// Exit status or signal.
        status: String,
    },
    /// A question about a migration that came or went over a connection which can't be made again.
    #[error("the destination can't be asked again: only tcp: and unix: can be connected to a second time")]
    NoReturnPath,
    /// The peer closed its end.
    #[error("the peer closed the connection: its own log says why")]
    PeerGone,
    /// The disk of a `file:` transport is full.
    #[error("no space left for the migration file: free some space or name another file")]
    DiskFull,
    /// Nothing moved for the whole timeout.
    #[error("no progress on the connection for {0:?}: the peer hangs or the network is cut")]
    Timeout(Duration),
    /// [`CancelToken::cancel`](super::CancelToken::cancel) was called.
    #[error("cancelled")]
    Cancelled,
    /// Any other failure to read or write.
    #[error("reading or writing the stream failed: {0}")]
    Io(io::Error),
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

fn version_advice(what: &str, ours: u16, theirs: u16) -> String {
    let (newer, older) = if theirs > ours { ("the peer", "this program") } else { ("this program", "the peer") };
    format!("{what} version {theirs} came, this program speaks {ours}: {newer} is newer, update {older}")
}
