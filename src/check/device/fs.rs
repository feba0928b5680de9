//! File systems: a FUSE session on the request queue, and a file in the root directory.
//!
//! The session begins with INIT. Then a non-empty regular file is looked up and opened, which the checks read.

use std::io;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::check::outcome::CheckAbort;

const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
/// FUSE protocol version. 7.31 needs none of the newer flags.
const VERSION: [u32; 2] = [7, 31];
/// Bytes of the reply to INIT.
const INIT_ANSWER: u32 = 64;
const ROOT: u64 = 1;
const DIRECTORY_BYTES: u32 = 64 << 10;
const REGULAR: u32 = 8;
/// Bytes of the file that are read, at most.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// Offset of the file size in the reply to LOOKUP.
const SIZE_AT: usize = 48;

/// `struct fuse_in_header`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InHeader {
    len: U32,
    opcode: U32,
    unique: U64,
    nodeid: U64,
    uid: U32,
    gid: U32,
    pid: U32,
    extensions: U16,
    padding: U16,
}

/// `struct fuse_out_header`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(in crate::check) struct OutHeader {
    pub(in crate::check) len: U32,
    pub(in crate::check) error: U32,
    pub(in crate::check) unique: U64,
}

/// `struct fuse_read_in`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReadIn {
    fh: U64,
    offset: U64,
    size: U32,
    read_flags: U32,
    lock_owner: U64,
    flags: U32,
    padding: U32,
}

/// `struct fuse_dirent`, before the name.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Dirent {
    ino: U64,
    off: U64,
    name_len: U32,
    kind: U32,
}

/// An open file.
#[derive(Clone, Copy, Debug)]
pub(in crate::check) struct OpenFile {
    node: u64,
    handle: u64,
    size: u64,
}

impl OpenFile {
    /// Returns read request `number`, and the number of bytes that it returns, at most `len`.
    pub(in crate::check) fn read(&self, number: u64, len: u64) -> (Vec<u8>, u32) {
        let len = len.min(self.size);
        let offset = number.wrapping_mul(97 * 512) % (self.size - len + 1);
        (read(READ, self.node, self.handle, offset, len as u32, number), len as u32)
    }
}

/// Returns INIT, which needs no session, and the size of its reply.
pub(in crate::check) fn init_request(number: u64) -> (Vec<u8>, u32) {
    (request(INIT, 0, number, [VERSION[0], VERSION[1], 1 << 17, 0].as_bytes()), INIT_ANSWER)
}

/// Builds a request.
fn request(opcode: u32, nodeid: u64, unique: u64, arguments: &[u8]) -> Vec<u8> {
    let len = (size_of::<InHeader>() + arguments.len()) as u32;
    let (opcode, nodeid, unique) = (opcode.into(), nodeid.into(), unique.into());
    let header = InHeader { len: len.into(), opcode, unique, nodeid, ..InHeader::new_zeroed() };
    [header.as_bytes(), arguments].concat()
}

fn read(opcode: u32, node: u64, handle: u64, offset: u64, len: u32, unique: u64) -> Vec<u8> {
    let read = ReadIn { fh: handle.into(), offset: offset.into(), size: len.into(), ..ReadIn::new_zeroed() };
    request(opcode, node, unique, read.as_bytes())
}

/// Starts a session and opens a file. `exchange` runs a request with a unique number, and returns its reply of up to a
/// number of bytes.
pub(in crate::check) fn open(
    mut exchange: impl FnMut(&[u8], u64, u32) -> Result<Vec<u8>, CheckAbort>,
) -> Result<OpenFile, CheckAbort> {
    let (init, room) = init_request(0);
    exchange(&init, 0, room)?;
    let mut unique = 0;
    let mut ask = |opcode, nodeid, arguments: &[u8], room| {
        unique += 1;
        exchange(&request(opcode, nodeid, unique, arguments), unique, room)
    };
    let directory = u64_at(&ask(OPENDIR, ROOT, &[0; 8], 16)?, 0)?;
    let listing = ReadIn { fh: directory.into(), size: DIRECTORY_BYTES.into(), ..ReadIn::new_zeroed() };
    let entries = ask(READDIR, ROOT, listing.as_bytes(), DIRECTORY_BYTES)?;
    for name in regular_files(&entries) {
        let entry = ask(LOOKUP, ROOT, &[name, &[0]].concat(), 128)?;
        let (node, size) = (u64_at(&entry, 0)?, u64_at(&entry, SIZE_AT)?);
        if size > 0 {
            let handle = u64_at(&ask(OPEN, node, &[0; 8], 16)?, 0)?;
            return Ok(OpenFile { node, handle, size: size.min(MAX_FILE_BYTES) });
        }
    }
    Err(CheckAbort::System(io::Error::other("the root directory has no readable file: add one of at least 1 MiB")))
}

fn u64_at(answer: &[u8], at: usize) -> Result<u64, CheckAbort> {
    let bytes = answer.get(at..).and_then(<[u8]>::first_chunk);
    let number = bytes.map(|bytes| u64::from_le_bytes(*bytes));
    number.ok_or_else(|| CheckAbort::Violation(format!("a reply of {} bytes is too short", answer.len())))
}

/// Returns the names of regular files in a directory listing.
fn regular_files(mut listing: &[u8]) -> Vec<&[u8]> {
    let mut names = Vec::new();
    while let Ok((entry, rest)) = Dirent::read_from_prefix(listing) {
        let len = entry.name_len.get() as usize;
        let Some(name) = rest.get(..len).filter(|name| !name.is_empty()) else { break };
        if entry.kind.get() == REGULAR {
            names.push(name);
        }
        listing = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_directory_listing_yields_fewer_names() {
        let entry = |name: &[u8], kind: u32| {
            let entry =
                Dirent { ino: 1.into(), off: 1.into(), name_len: (name.len() as u32).into(), kind: kind.into() };
            let mut bytes = [entry.as_bytes(), name].concat();
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let listing = [entry(b"..", 4), entry(b"a file", REGULAR), entry(b"another", REGULAR)].concat();
        assert_eq!(regular_files(&listing), [b"a file".as_slice(), b"another"]);
        for end in 0..listing.len() {
            assert!(regular_files(&listing[..end]).len() <= 2);
        }
        assert!(regular_files(&[0xff; 100]).is_empty());
    }
}
