//! Formats of images that are not raw. A guest that was given such an image would see its metadata, and write over them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Name of a format, and the bytes at this offset by which it is known.
const BEGINNINGS: [(&str, usize, &[u8]); 11] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, VPC),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
];
/// In the last sector of a vpc image of fixed size, and in the first one of others.
const VPC: &[u8] = b"conectix";
/// The beginning of the last sector, counted from the end.
const LAST: u64 = 512;

/// The format of an image of `bytes` bytes, by the name that qemu-img has for it; `None` for a raw one.
pub(super) fn find(file: &File, bytes: u64) -> io::Result<Option<&'static str>> {
    let (mut first, mut last) = ([0; 128], [0; VPC.len()]);
    // Shorter ones leave zeroes behind.
    file.read_at(&mut first, 0)?;
    file.read_at(&mut last, bytes.saturating_sub(LAST))?;
    if last == VPC {
        return Ok(Some("vpc"));
    }
    let begins = |(_, at, magic): &&(_, usize, &[u8])| first.get(*at..).is_some_and(|bytes| bytes.starts_with(magic));
    Ok(BEGINNINGS.iter().find(begins).map(|(name, ..)| *name))
}
