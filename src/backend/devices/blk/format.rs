//! Detection of image formats other than raw. Served as raw, such an image would expose its metadata to the guest,
//! which could overwrite it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Format name, offset of its magic bytes, and the magic bytes.
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
/// Magic bytes in the last sector of a vpc image of fixed size, and in the first sector of others.
const VPC: &[u8] = b"conectix";
/// Offset of the last sector from the end.
const LAST: u64 = 512;

/// Returns the format of an image of `bytes` bytes by its qemu-img name; `None` for a raw one.
pub(super) fn find(file: &File, bytes: u64) -> io::Result<Option<&'static str>> {
    let (mut first, mut last) = ([0; 128], [0; VPC.len()]);
    // If the image is shorter than a buffer, the rest of the buffer stays zero.
    file.read_at(&mut first, 0)?;
    file.read_at(&mut last, bytes.saturating_sub(LAST))?;
    if last == VPC {
        return Ok(Some("vpc"));
    }
    let begins = |(_, at, magic): &&(_, usize, &[u8])| first.get(*at..).is_some_and(|bytes| bytes.starts_with(magic));
    Ok(BEGINNINGS.iter().find(begins).map(|(name, ..)| *name))
}
