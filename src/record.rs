//! Versioned records: the encoding of saved state and of the messages of a migration. Only this file uses bincode.
//!
//! A record is its version (u16, little endian), then bincode 2 with fixed-width little-endian integers.
//!
//! # Example
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use vhost_migrate::record::{RecordError, decode, encode};
//!
//! #[derive(Serialize, Deserialize, Debug, PartialEq)]
//! struct Clock {
//!     ticks: u64,
//! }
//!
//! let bytes = encode(1, &Clock { ticks: 7 })?;
//! assert_eq!(decode::<Clock>("clock", 1, &bytes, 1 << 10)?, Clock { ticks: 7 });
//!
//! // A program that knows only version 2 refuses it, and says which side is older.
//! let error = decode::<Clock>("clock", 2, &bytes, 1 << 10).unwrap_err();
//! assert!(matches!(error, RecordError::Version { ours: 2, theirs: 1, .. }));
//! # Ok::<(), RecordError>(())
//! ```
#![forbid(unsafe_code)]

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// An error while encoding or decoding a record.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The record ends before its version does.
    #[error("a record ends in the middle of its version: it is incomplete")]
    Truncated,
    /// A version that this program cannot read.
    #[error("{}", version_advice(.record, *.ours, *.theirs))]
    Version {
        /// Name of the record.
        record: &'static str,
        /// Version that this program reads.
        ours: u16,
        /// Version found.
        theirs: u16,
    },
    /// A record over its limit. Nothing was allocated for it.
    #[error("{what} of {length} bytes is over the limit of {limit} bytes")]
    TooLong {
        /// Name of the record.
        what: &'static str,
        /// Its length, bytes.
        length: u64,
        /// The limit, bytes.
        limit: u64,
    },
    /// Contents that are no value of the record's type.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// Name of the record.
        what: &'static str,
        /// The error of bincode.
        why: String,
    },
}

pub(crate) fn version_advice(what: &str, ours: u16, theirs: u16) -> String {
    let (newer, older) = if theirs > ours { ("the peer", "this program") } else { ("this program", "the peer") };
    format!("received {what} version {theirs}, this program uses version {ours}: {newer} is newer, update {older}")
}

/// Maximum size of a record, bytes.
pub const MAX_STATE: usize = 64 << 20;

/// Encodes `value` as version `version` of its record.
///
/// # Errors
/// `Malformed` if bincode cannot encode the type (a map of unknown length, for example).
pub fn encode<T: Serialize + ?Sized>(version: u16, value: &T) -> Result<Vec<u8>, RecordError> {
    let mut bytes = version.to_le_bytes().to_vec();
    bincode::serde::encode_into_std_write(value, &mut bytes, bincode::config::legacy())
        .map_err(|error| RecordError::Malformed { what: "record", why: error.to_string() })?;
    Ok(bytes)
}

/// Returns the version of an encoded record, which selects the type for [`decode`].
///
/// # Errors
/// `Truncated` if the version is incomplete.
pub fn version(bytes: &[u8]) -> Result<u16, RecordError> {
    let version = bytes.first_chunk().ok_or(RecordError::Truncated)?;
    Ok(u16::from_le_bytes(*version))
}

/// Decodes the first field of a record of version `wanted`. `beginning` may end after that field. The field may take as
/// much memory as a record of 64 KiB.
///
/// # Errors
/// `Version` and `Malformed`.
pub fn decode_first<T: DeserializeOwned>(wanted: u16, beginning: &[u8]) -> Result<T, RecordError> {
    let theirs = version(beginning)?;
    if theirs != wanted {
        return Err(RecordError::Version { record: "record", ours: wanted, theirs });
    }
    let config = bincode::config::legacy().with_limit::<{ 64 << 10 }>();
    let decoded = bincode::serde::decode_from_slice(beginning.get(2..).unwrap_or_default(), config);
    decoded.map(|(value, _)| value).map_err(|error| RecordError::Malformed { what: "record", why: error.to_string() })
}

/// Decodes a record called `name` of at most `limit` bytes. It must have version `wanted` and end at the end of
/// `bytes`. Lengths inside it are bounded by 16 times its own size (at least 64 KiB) or 64 MiB before anything is
/// allocated.
///
/// # Errors
/// `TooLong`, `Version` and `Malformed`.
pub fn decode<T: DeserializeOwned>(
    name: &'static str,
    wanted: u16,
    bytes: &[u8],
    limit: usize,
) -> Result<T, RecordError> {
    const SMALL: usize = 4 << 10;
    if bytes.len() > limit {
        return Err(RecordError::TooLong { what: name, length: bytes.len() as u64, limit: limit as u64 });
    }
    let theirs = version(bytes)?;
    if theirs != wanted {
        return Err(RecordError::Version { record: name, ours: wanted, theirs });
    }
    let body = bytes.get(2..).unwrap_or_default();
    let config = bincode::config::legacy();
    let decoded = if body.len() <= SMALL {
        bincode::serde::decode_from_slice(body, config.with_limit::<{ 16 * SMALL }>())
    } else {
        bincode::serde::decode_from_slice(body, config.with_limit::<MAX_STATE>())
    };
    match decoded {
        Ok((value, used)) if used == body.len() => Ok(value),
        Ok(_) => Err(RecordError::Malformed { what: name, why: "bytes are left over".into() }),
        Err(error) => Err(RecordError::Malformed { what: name, why: error.to_string() }),
    }
}

/// Bytes inside a record, encoded as one block, unlike a `Vec<u8>`.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Example {
        name: String,
        words: Vec<u64>,
        inflight: Bytes,
    }

    fn state() -> Example {
        Example { name: "disk0".into(), words: vec![1, 2, 3], inflight: Bytes(vec![7; 1000]) }
    }

    #[test]
    fn a_record_round_trips_as_fixed_width_little_endian() {
        let bytes = encode(3, &state()).unwrap();
        assert_eq!(version(&bytes).unwrap(), 3);
        assert_eq!(decode::<Example>("state", 3, &bytes, MAX_STATE).unwrap(), state());
        assert_eq!(encode(0x0102, &(0x0304u16, 5u32, Some(1u8))).unwrap(), [2, 1, 4, 3, 5, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn a_record_version_error_names_the_side_to_update() {
        let bytes = encode(3, &state()).unwrap();
        let error = decode::<Example>("disk state", 2, &bytes, MAX_STATE).unwrap_err().to_string();
        assert_eq!(
            error,
            "received disk state version 3, this program uses version 2: the peer is newer, update this program"
        );
    }

    #[test]
    fn truncated_and_overlong_records_are_refused() {
        let mut bytes = encode(3, &state()).unwrap();
        for length in 0..bytes.len() {
            assert!(decode::<Example>("state", 3, &bytes[..length], MAX_STATE).is_err(), "{length}");
        }
        bytes.push(0);
        assert!(decode::<Example>("state", 3, &bytes, MAX_STATE).is_err());
        assert!(matches!(decode::<Example>("state", 3, &bytes, 100), Err(RecordError::TooLong { .. })));
    }

    #[test]
    fn a_huge_length_inside_a_record_is_refused() {
        for length in [u64::MAX, 1 << 40, 1 << 27, 1 << 17] {
            let bytes = encode(1, &length).unwrap();
            assert!(decode::<Bytes>("bytes", 1, &bytes, MAX_STATE).is_err());
            assert!(decode::<Vec<u64>>("words", 1, &bytes, MAX_STATE).is_err());
            assert!(decode::<String>("text", 1, &bytes, MAX_STATE).is_err());
        }
    }
}
