//! Replaces the contexts of zstd without the feature `zstd`: compression is refused with the reason.
#![forbid(unsafe_code)]

use std::io;
use std::marker::PhantomData;

/// A context that can't be made.
pub(super) struct Compressor<'a>(PhantomData<&'a ()>);

impl Compressor<'_> {
    /// # Errors
    /// Always.
    pub(super) fn new(_level: i32) -> io::Result<Self> {
        Err(missing())
    }

    /// # Errors
    /// Always.
    pub(super) fn compress_to_buffer(&mut self, _: &[u8], _: &mut Vec<u8>) -> io::Result<usize> {
        Err(missing())
    }
}

/// A context that decompresses nothing. Streams without compression need none.
pub(super) struct Decompressor<'a>(PhantomData<&'a ()>);

impl Decompressor<'_> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Decompressor(PhantomData))
    }

    /// # Errors
    /// Always.
    pub(super) fn decompress_to_buffer(&mut self, _: &[u8], _: &mut [u8]) -> io::Result<usize> {
        Err(missing())
    }
}

fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "this program was built without the feature zstd: use codec none")
}
