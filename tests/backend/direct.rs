//! Page cache and stable storage of a disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, VringState};
use vhost_migrate::abi::virtio::{
    BlkDiscardWriteZeroes, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VirtioFeatures,
};
use vhost_migrate::backend::blk::{Aio, BlkOptions};
use vhost_migrate::backend::{Queue, Request, SyncQueue, VirtioDevice};
use vhost_migrate::memory::{Address, GuestAddress};
use vhost_migrate::ring::Buffer;
use zerocopy::IntoBytes;

use crate::blk::{DISK, DiskGuest, HEADER, OK, STATUS};
use crate::guest::{BASIC, Guest, HIGH, Ring, header, negotiate};
use crate::raw::{NEED_REPLY, VERSION, ring_message};
use crate::server::{Server, disk_options};

/// A directory for an image, created in the target directory. The file system of the target directory is expected to
/// have a disk, which that of temporary files may not have.
struct OnDisk(tempfile::TempDir);

impl OnDisk {
    fn new() -> OnDisk {
        OnDisk(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    /// Replaces the image in `options` with a new one in this directory, of which nothing is in the page cache.
    fn image(&self, options: &mut BlkOptions) {
        options.image = disk_options(self.0.path(), DISK, |_| {}).image;
        let file = File::open(&options.image).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("image")
    }
}

/// Returns the number of pages of a file in the page cache, and of those that are not on the disk yet (cachestat, Linux
/// 6.5).
fn cached_pages(path: &Path) -> (u64, u64) {
    const SYS_CACHESTAT: libc::c_long = 451;
    let (file, all, mut found) = (File::open(path).unwrap(), [0u64; 2], [0u64; 5]);
    // SAFETY: the kernel reads two 64-bit numbers from `all` and writes five to `found`.
    let done = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), all.as_ptr(), found.as_mut_ptr(), 0) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    let [pages, dirty, written_back, ..] = found;
    (pages, dirty + written_back)
}

/// Rule I11.2.
#[test]
fn direct_io_leaves_the_page_cache_empty_for_any_buffer_alignment() {
    for aio in [Aio::IoUring, Aio::Threads] {
        let disk = OnDisk::new();
        let mut blk = DiskGuest::new(|options| {
            (options.aio, options.direct) = (aio, true);
            disk.image(options);
        });
        // The data is larger than a bounce buffer, and its buffers are not aligned.
        let data: Vec<u8> = (0..40 * 4096u32).map(|at| (at % 253) as u8).collect();
        let (place, len) = (HIGH.unchecked_add(1), data.len() as u32);
        let cut =
            |gpa: GuestAddress| [Buffer { gpa, len: 4097 }, Buffer { gpa: gpa.unchecked_add(4097), len: len - 4097 }];
        blk.guest.memory.write(place, &data).unwrap();
        let readable = [&[header(&blk.guest, HEADER, VIRTIO_BLK_T_OUT, 8)][..], &cut(place)].concat();
        assert_eq!(blk.request(&readable, &[STATUS]), (OK, 1));
        let head = header(&blk.guest, HEADER, VIRTIO_BLK_T_IN, 8);
        let place = HIGH.unchecked_add(0x10_0003);
        assert_eq!(blk.request(&[head], &[&cut(place)[..], &[STATUS]].concat()), (OK, len + 1));
        assert_eq!(cached_pages(&disk.path()).0, 0, "it went through the page cache");
        assert!(blk.guest.bytes(place, data.len()) == data);
        assert!(std::fs::read(disk.path()).unwrap()[4096..][..data.len()] == data);
    }
}

/// Rule I11.1.
#[test]
fn written_data_is_on_stable_storage_when_the_last_ring_has_stopped() {
    for aio in [Aio::IoUring, Aio::Threads] {
        let disk = OnDisk::new();
        let mut blk = DiskGuest::new(|options| {
            options.aio = aio;
            disk.image(options);
        });
        let _other = Ring::started(&blk.client, &blk.guest, 1, 64, BASIC);
        assert_eq!(blk.simple(VIRTIO_BLK_T_OUT, 0, &[7; 0x8000], 0), (OK, 1));
        blk.client.ring_base(1);
        blk.client.ring_base(0);
        assert_eq!(cached_pages(&disk.path()).1, 0, "pages that are not on the disk");
        assert_eq!(std::fs::read(disk.path()).unwrap()[..0x8000], [7; 0x8000]);
    }
}

#[test]
fn write_zeroes_is_durable_for_a_driver_without_flush() {
    for aio in [Aio::IoUring, Aio::Threads] {
        for (flags, sector) in [(0, 9u64), (1, 17)] {
            let disk = OnDisk::new();
            let mut blk = DiskGuest::negotiated(BASIC, |options| {
                options.aio = aio;
                disk.image(options);
            });
            // The range is part of a page. File systems clear such a range in the page cache.
            let range = BlkDiscardWriteZeroes { sector: sector.into(), num_sectors: 1.into(), flags: flags.into() };
            assert_eq!(blk.simple(VIRTIO_BLK_T_WRITE_ZEROES, 0, range.as_bytes(), 0), (OK, 1));
            assert_eq!(cached_pages(&disk.path()).1, 0, "zeroes that are not on the disk");
            let image = std::fs::read(disk.path()).unwrap();
            assert!(image[sector as usize * 512..][..512].iter().all(|byte| *byte == 0));
        }
    }
}

/// A device that completes all requests, and whose sync fails when the last ring has stopped.
struct FailingSyncDevice;

impl VirtioDevice for FailingSyncDevice {
    fn features(&self) -> VirtioFeatures {
        BASIC
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn rings_stopped(&self) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(SyncQueue::new(|_: &mut Request| ())))
    }
}

/// A device whose sync ends when the test sends a message.
struct SlowSyncDevice(Mutex<Receiver<()>>);

impl VirtioDevice for SlowSyncDevice {
    fn features(&self) -> VirtioFeatures {
        BASIC
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queues(&self) -> u16 {
        2
    }

    fn rings_stopped(&self) -> io::Result<()> {
        // An error means that the test has ended and dropped the sender.
        let _ = self.0.lock().unwrap().recv();
        Ok(())
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(SyncQueue::new(|_: &mut Request| ())))
    }
}

#[test]
fn only_the_last_get_vring_base_waits_for_the_disk_sync() {
    let (synced, sync) = channel();
    let (server, guest) = (Server::new(Arc::new(SlowSyncDevice(Mutex::new(sync)))), Guest::new());
    // The sender is dropped before the server, whose end waits for a sync.
    let synced = synced;
    let client = server.connect();
    negotiate(&client, &guest, BASIC);
    let rings = [0, 1].map(|index| Ring::new(&guest, index, 64, BASIC));
    for ring in &rings {
        ring.start(&client, &guest);
    }
    let [disable, base] = [Code::SET_VRING_ENABLE, Code::GET_VRING_BASE];
    let messages = [(disable, NEED_REPLY, 0), (base, VERSION, 0), (base, VERSION, 1)];
    let messages = messages.map(|(code, flags, index)| ring_message(code, flags, VringState { index, num: 0 }));
    client.send_bytes(&messages.concat(), &[]);
    assert_eq!(client.reply(disable), [0; 8]);
    client.ring_base_reply(0);
    synced.send(()).unwrap();
    client.ring_base_reply(1);
}

/// Rule I11.3.
#[test]
fn a_failed_disk_sync_closes_the_connection_instead_of_replying_to_get_vring_base() {
    let (_server, guest, client) = Server::new(Arc::new(FailingSyncDevice)).negotiated(BASIC);
    let _ring = Ring::started(&client, &guest, 0, 64, BASIC);
    client.send_body(Code::GET_VRING_BASE, &VringState { index: 0, num: 0 });
    assert!(client.is_closed());
}
