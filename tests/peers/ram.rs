//! The memory of a guest-free QEMU: its RAM file, mapped by the test. The test writes through qtest in place of a
//! guest, so that QEMU's own dirty tracking records the write. It reads the mapping directly.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

pub(crate) const PAGE: u64 = 4096;
/// The size of guest memory in bytes. All of it is below 4 GiB, so the offset in the file is the guest-physical
/// address.
pub(crate) const SIZE: u64 = 192 << 20;

pub(crate) struct Ram {
    path: PathBuf,
    memory: GuestMemoryMmap<()>,
}

impl Ram {
    pub(crate) fn map(path: &Path) -> Ram {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let range = (GuestAddress(0), usize::try_from(SIZE).unwrap(), Some(FileOffset::new(file, 0)));
        Ram { path: path.into(), memory: GuestMemoryMmap::from_ranges_with_files([range]).unwrap() }
    }

    pub(crate) fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    pub(crate) fn u16(&self, gpa: u64) -> u16 {
        self.memory.load(GuestAddress(gpa), Ordering::Acquire).unwrap()
    }

    pub(crate) fn u32(&self, gpa: u64) -> u32 {
        self.memory.load(GuestAddress(gpa), Ordering::Acquire).unwrap()
    }

    /// Copies all of guest memory.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        File::open(&self.path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        Snapshot(bytes)
    }
}

/// A copy of all of guest memory.
pub(crate) struct Snapshot(Vec<u8>);

impl Snapshot {
    /// The pages whose contents differ.
    pub(crate) fn differing_pages(&self, other: &Snapshot) -> Vec<u64> {
        const STRIDE: usize = 4096;
        let pages = self.0.chunks(STRIDE).zip(other.0.chunks(STRIDE));
        (0..).zip(pages).filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect()
    }
}
