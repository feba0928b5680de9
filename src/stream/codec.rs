//! Compression of page batches: none or zstd. Contexts are kept and reused.
//!
//! ```
//! use vhost_migrate::stream::Codec;
//!
//! assert_eq!("zstd".parse::<Codec>()?, Codec::Zstd(1));
//! assert_eq!(Codec::Zstd(-3).to_string(), "zstd:-3");
//! assert!("gzip".parse::<Codec>().is_err());
//! # Ok::<(), vhost_migrate::stream::StreamError>(())
//! ```
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use super::StreamError;
#[cfg(not(feature = "zstd"))]
use super::no_zstd::{Compressor as ZstdCompressor, Decompressor as ZstdDecompressor};
#[cfg(feature = "zstd")]
use zstd::bulk::{Compressor as ZstdCompressor, Decompressor as ZstdDecompressor};

/// Compression of page data.
///
/// Parses from `none`, `zstd` (level 1) and `zstd:LEVEL`, levels -7 to 22.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Codec {
    /// Pages are sent uncompressed.
    #[default]
    None,
    /// One zstd frame per batch, with this level.
    Zstd(i32),
}

impl Codec {
    /// True if this program reads and writes zstd: it was built with the feature `zstd`.
    pub const HAS_ZSTD: bool = cfg!(feature = "zstd");
    const LEVELS: std::ops::RangeInclusive<i32> = -7..=22;
}

impl FromStr for Codec {
    type Err = StreamError;

    fn from_str(text: &str) -> Result<Codec, StreamError> {
        let level = match text.split_once(':') {
            None if text == "none" => return Ok(Codec::None),
            None if text == "zstd" => Some(1),
            Some(("zstd", level)) => level.parse().ok().filter(|level| Codec::LEVELS.contains(level)),
            _ => None,
        };
        level.map(Codec::Zstd).ok_or_else(|| StreamError::UnknownCodec(text.into()))
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::None => write!(f, "none"),
            Codec::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// The sending half of a codec.
pub(super) struct Compressor(Option<(ZstdCompressor<'static>, Vec<u8>)>);

impl Compressor {
    /// Creates a compressor for batches of at most `batch` bytes.
    pub(super) fn new(codec: Codec, batch: usize) -> Result<Compressor, StreamError> {
        let Codec::Zstd(level) = codec else {
            return Ok(Compressor(None));
        };
        let context = ZstdCompressor::new(level)
            .map_err(|source| StreamError::Codec { doing: "setting up zstd compression", source })?;
        Ok(Compressor(Some((context, Vec::with_capacity(batch)))))
    }

    /// Returns true unless the codec is [`Codec::None`].
    pub(super) fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Compresses `data`. Returns `None` if the codec is none or the result would not be smaller.
    pub(super) fn compress(&mut self, data: &[u8]) -> Option<&[u8]> {
        let (context, out) = self.0.as_mut()?;
        out.clear();
        // The buffer is as large as the largest batch: not fitting means that it does not compress.
        let length = context.compress_to_buffer(data, out).ok()?;
        if length < data.len() { out.get(..length) } else { None }
    }
}

/// The receiving half of every codec.
pub(super) struct Decompressor {
    zstd: ZstdDecompressor<'static>,
    out: Vec<u8>,
}

impl Decompressor {
    pub(super) fn new() -> Result<Decompressor, StreamError> {
        let zstd = ZstdDecompressor::new()
            .map_err(|source| StreamError::Codec { doing: "setting up zstd decompression", source })?;
        Ok(Decompressor { zstd, out: Vec::new() })
    }

    /// Decompresses to exactly `length` bytes. The caller bounds `length`.
    pub(super) fn decompress(&mut self, data: &[u8], length: usize) -> Result<&[u8], StreamError> {
        self.out.resize(length, 0);
        let found = self
            .zstd
            .decompress_to_buffer(data, self.out.as_mut_slice())
            .map_err(|source| StreamError::Codec { doing: "decompressing a page batch", source })?;
        if found != length {
            let why = format!("it decompresses to {found} bytes, not {length}");
            return Err(StreamError::Malformed { what: "page batch", why });
        }
        Ok(&self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codec_names_round_trip() {
        for (text, codec) in [("none", Codec::None), ("zstd:1", Codec::Zstd(1)), ("zstd:-3", Codec::Zstd(-3))] {
            assert_eq!(text.parse::<Codec>().unwrap(), codec);
            assert_eq!(codec.to_string(), text);
        }
        assert_eq!("zstd".parse::<Codec>().unwrap(), Codec::Zstd(1));
    }

    #[test]
    fn an_unknown_codec_error_lists_the_known_ones() {
        for text in ["", "lz4", "zstd:", "zstd:99", "zstd:fast", "none:1", "ZSTD"] {
            let error = text.parse::<Codec>().unwrap_err().to_string();
            assert!(error.contains("use none, zstd or zstd:LEVEL"), "{error}");
        }
    }

    #[test]
    fn incompressible_data_is_sent_raw() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        let mut compressor = Compressor::new(Codec::Zstd(1), 65536).unwrap();
        assert!(compressor.compress(&noise).is_none());
        assert!(compressor.compress(&noise[..4096]).is_none());
        let text = vec![b'a'; 65536];
        let small = compressor.compress(&text).unwrap();
        assert!(small.len() < 100);
        let mut decompressor = Decompressor::new().unwrap();
        assert_eq!(decompressor.decompress(small, text.len()).unwrap(), text);
        assert!(decompressor.decompress(small, text.len() - 1).is_err());
        assert!(decompressor.decompress(small, text.len() + 1).is_err());
    }

    /// Decoders of these formats have had vulnerabilities, and no version of this program has sent them.
    #[test]
    fn formats_before_zstd_0_8_are_refused() {
        let frame_of_0_7 = b"\x27\xb5\x2f\xfd\x20\x04\x40\x00\x04page\xc0\x00\x00";
        assert!(Decompressor::new().unwrap().decompress(frame_of_0_7, 4).is_err());
    }
}
