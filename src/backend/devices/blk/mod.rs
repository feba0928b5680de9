//! Block device: a raw image file or a block device as a virtio-blk device.
//!
//! This file opens the image, and defines the features and the configuration space. Requests are served in `queue`.
//! `image_lock` is the lock of the image, `generation` identifies the disk and its contents, and `format` detects
//! images that are not raw.
//!
//! To serve an image to one front-end over an established connection:
//!
//! ```
//! # use std::os::fd::AsFd;
//! # let folder = tempfile::tempdir()?;
//! # let image = folder.path().join("disk.img");
//! # std::fs::File::create(&image)?.set_len(16 << 20)?;
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//!
//! use vhost_migrate::backend::blk::{BlkDevice, BlkOptions};
//! use vhost_migrate::backend::{VirtioDevice, serve_connection};
//!
//! let mut options = BlkOptions::new(&image);
//! options.queues = 4;
//! options.serial = "vm1-root".into();
//! let disk = BlkDevice::open(options)?;
//! assert_eq!(disk.capacity(), (16 << 20) / 512);
//!
//! let disk: Arc<dyn VirtioDevice> = Arc::new(disk);
//! let (front_end, connection) = UnixStream::pair()?;
//! let (stop, _stopper) = UnixStream::pair()?;
//! drop(front_end); // it hangs up at once
//! assert!(!serve_connection(&connection, &disk, stop.as_fd()), "not stopped: the front-end has hung up");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod format;
mod generation;
mod image_lock;
mod queue;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use tracing::{debug, info, warn};
use zerocopy::{FromZeros, IntoBytes};

use self::generation::ImageGeneration;
use self::image_lock::{ImageLock, LockMode};
use self::queue::BlkQueue;
use crate::abi::vhost_user::unstable::INFLIGHT_MIGRATION;
use crate::abi::vhost_user::{DiskGeneration, ProtocolFeatures, own};
use crate::abi::virtio::{
    BlkConfig, SECTOR_BYTES, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_IN_ORDER, VIRTIO_ID_BLOCK, VirtioFeatures,
};
use crate::backend::devices::disk_io::{
    self, Alignment, DiskEngine, ImageFiles, ThreadEngine, UringEngine, UringPool, WriteBack,
};
use crate::backend::{BackendError, FrontendHandle, Queue, RING_FEATURES, VirtioDevice};

/// Maximum number of data segments of a request, if rings are large enough.
const MAX_SEGMENTS: u16 = 126;
/// Maximum number of sectors of a discard or write-zeroes request: 1 GiB.
const MAX_CLEAR_SECTORS: u32 = 1 << 21;
/// Maximum block size reported to guests in bytes. Linux accepts none larger than its pages.
const MAX_BLOCK: u64 = 4096;

/// The I/O engine of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// io_uring if the system supports it, otherwise threads.
    #[default]
    IoUring,
    /// Threads.
    Threads,
}

/// Options of a block device.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BlkOptions {
    /// The raw image, or a block device.
    pub image: PathBuf,
    /// True to serve the image as raw even if it looks like another format. A guest can write anything to the start of
    /// its disk.
    pub raw: bool,
    /// True if the guest may only read.
    pub read_only: bool,
    /// Number of queues.
    pub queues: u16,
    /// Maximum number of entries of a ring, a power of two.
    pub max_queue_size: u16,
    /// The serial number that the guest reads, at most 20 bytes.
    pub serial: String,
    /// The I/O engine.
    pub aio: Aio,
    /// True to bypass the page cache (O_DIRECT). The required block size is reported to the guest; writes of partial
    /// blocks go through the page cache to stable storage.
    pub direct: bool,
    /// True to offer IN_ORDER. A slow request then delays those after it.
    pub in_order: bool,
    /// True to let a front-end stop queues without draining them and move requests in flight with the inflight region:
    /// the unstable GET_VRING_BASE_INFLIGHT and SKIP_DRAIN (rule I8.1).
    pub inflight_migration: bool,
    /// True to offer ACCESS_PLATFORM. Only for front-ends that translate addresses: others may pass the offer on to the
    /// driver without supporting it (rule T5.1).
    pub iommu: bool,
    /// True if other processes may write the image at the same time. The image is then not locked.
    pub share_rw: bool,
    /// True if other processes with this option may read a read-only image at the same time. A read of a killed process
    /// can then complete into guest memory after its successor has started (rule I9).
    pub share_readers: bool,
    /// True to offer postcopy, and therefore no memory slots (rule P1.1). `iommu` takes precedence.
    pub postcopy: bool,
    /// Maximum number of front-ends that may be connected at the same time. Only one of them can run rings.
    pub max_front_ends: u16,
}

impl BlkOptions {
    /// Returns the options of a writable disk with one queue of up to 1024 entries, no serial number, and all other
    /// features off.
    pub fn new(image: impl Into<PathBuf>) -> BlkOptions {
        BlkOptions {
            image: image.into(),
            raw: false,
            read_only: false,
            queues: 1,
            max_queue_size: 1024,
            serial: String::new(),
            aio: Aio::default(),
            direct: false,
            in_order: false,
            inflight_migration: false,
            iommu: false,
            share_rw: false,
            share_readers: false,
            postcopy: false,
            max_front_ends: 1,
        }
    }

    setters! {
        with_raw: raw: bool,
        with_read_only: read_only: bool,
        with_queues: queues: u16,
        with_max_queue_size: max_queue_size: u16,
        with_serial: serial: String,
        with_aio: aio: Aio,
        with_direct: direct: bool,
        with_in_order: in_order: bool,
        with_inflight_migration: inflight_migration: bool,
        with_iommu: iommu: bool,
        with_share_rw: share_rw: bool,
        with_share_readers: share_readers: bool,
        with_postcopy: postcopy: bool,
        with_max_front_ends: max_front_ends: u16,
    }
}

/// The error of a disk that cannot be opened or served. The messages contain advice for the user.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// The image cannot be opened.
    #[error("can't open image {image} ({advice})", image = image.display())]
    Open {
        /// The image.
        image: PathBuf,
        /// The error of the system.
        source: io::Error,
        /// Advice for the user.
        advice: &'static str,
    },
    /// The image is neither a file nor a block device.
    #[error("{image} is neither a file nor a block device: give the path of a raw image", image = image.display())]
    NotADisk {
        /// The image.
        image: PathBuf,
    },
    /// The file system does not support direct I/O (O_DIRECT).
    #[error("{image} can't be used past the page cache, its file system does not do that: leave out --direct, or move it",
        image = image.display())]
    NotDirect {
        /// The image.
        image: PathBuf,
    },
    /// The image has a format other than raw.
    #[error("{image} looks like a {format} image, and only raw ones are served: convert it with qemu-img convert -O raw, or \
        use --format raw if the guest itself has written that", image = image.display())]
    Format {
        /// The image.
        image: PathBuf,
        /// The detected format, by qemu-img's name.
        format: &'static str,
    },
    /// The image is smaller than a sector.
    #[error("image {image} has {bytes} bytes: make it at least 512 bytes large, for example with truncate -s 1G",
        image = image.display())]
    TooSmall {
        /// The image.
        image: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The image has shrunk while it was served.
    #[error("image {image} has {bytes} bytes: the guest was result {capacity}, and that stays; make it as large again",
        image = image.display())]
    Shrunk {
        /// The image.
        image: PathBuf,
        /// Its size.
        bytes: u64,
        /// The capacity reported to the guest.
        capacity: u64,
    },
    /// The serial number is too long.
    #[error("serial {serial:?} has {len} bytes: at most 20 fit", len = serial.len())]
    Serial {
        /// The serial.
        serial: String,
    },
    /// An invalid number of queues or of entries.
    #[error("{queues} queues of {size} entries: use 1 to 256 queues, and a power of two from 2 to 32768 entries")]
    QueueLayout {
        /// Queues.
        queues: u16,
        /// Entries.
        size: u16,
    },
}

/// An open block device. Implements [`VirtioDevice`].
#[derive(Debug)]
pub struct BlkDevice {
    files: Arc<ImageFiles>,
    /// io_uring instances, if they are used.
    urings: Option<Arc<UringPool>>,
    /// Size in sectors of 512 bytes. It only grows.
    capacity: Arc<AtomicU64>,
    /// Front-ends to notify when the disk grows.
    frontends: Mutex<Vec<Weak<FrontendHandle>>>,
    block_size: u32,
    /// The number of the block device, or of the file system and the inode of a file.
    data_id: u128,
    /// True if parts of the image can be deallocated or zeroed.
    can_clear: bool,
    serial: [u8; VIRTIO_BLK_ID_BYTES],
    /// The lock of the image, held while queues run.
    image: Option<Arc<ImageLock>>,
    /// The generation of the image, if it can have one.
    generation: Option<Arc<ImageGeneration>>,
    options: BlkOptions,
}

impl BlkDevice {
    /// Opens the image.
    ///
    /// # Errors
    /// [`BlkError`], with a message for the user.
    pub fn open(options: BlkOptions) -> Result<BlkDevice, BlkError> {
        let image = options.image.clone();
        let mut serial = [0; VIRTIO_BLK_ID_BYTES];
        match serial.get_mut(..options.serial.len()) {
            Some(to) => to.copy_from_slice(options.serial.as_bytes()),
            None => return Err(BlkError::Serial { serial: options.serial }),
        }
        let (queues, entries) = (options.queues, options.max_queue_size);
        if !(1..=256).contains(&queues) || !(2..=32768).contains(&entries) || !entries.is_power_of_two() {
            return Err(BlkError::QueueLayout { queues, size: entries });
        }
        let buffered = open(&image, options.read_only, 0)?;
        let metadata = buffered.metadata().map_err(|source| open_error(&image, source))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlkError::NotADisk { image });
        }
        let data_id = match kind.is_block_device() {
            true => u128::from(metadata.rdev()),
            false => u128::from(metadata.dev()) << 64 | u128::from(metadata.ino()),
        };
        let bytes = size(&image, &buffered)?;
        if !options.raw
            && let Some(format) = format::find(&buffered, bytes).map_err(|source| open_error(&image, source))?
        {
            return Err(BlkError::Format { image, format });
        }
        let capacity = bytes / SECTOR_BYTES;
        if capacity == 0 {
            return Err(BlkError::TooSmall { image, bytes });
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            warn!("{}: the last {} bytes are no whole sector and left out", image.display(), bytes % SECTOR_BYTES);
        }
        let direct = if options.direct { Some(open(&image, options.read_only, libc::O_DIRECT)?) } else { None };
        let clears = !options.read_only && (kind.is_block_device() || punches_holes(&buffered, bytes));
        let sharing = if options.read_only && options.share_readers { LockMode::Shared } else { LockMode::Exclusive };
        let files = ImageFiles::new(buffered, direct).map_err(|source| match source.kind() {
            io::ErrorKind::Unsupported => BlkError::NotDirect { image: image.clone() },
            _ => open_error(&image, source),
        })?;
        let block_size = match files.alignment() {
            // Drivers do not support larger blocks. Their writes of partial blocks go through the page cache.
            Some(Alignment { block, .. }) => block.min(MAX_BLOCK) as u32,
            None if kind.is_block_device() => disk_io::block_size(files.buffered.as_fd()),
            None => 512,
        };
        let (files, capacity) = (Arc::new(files), Arc::new(AtomicU64::new(capacity)));
        let lock = ImageLock::new(files.preferred(), sharing).map_err(|source| open_error(&image, source))?;
        let generation =
            ImageGeneration::new(files.preferred(), !options.read_only).map_err(|source| open_error(&image, source))?;
        let image = (!options.share_rw).then(|| Arc::new(lock));
        let urings = match options.aio {
            Aio::IoUring => UringPool::new(queues, entries)
                .inspect_err(|error| info!("io_uring is not available ({error}): threads are used for disk I/O")),
            Aio::Threads => Err(io::ErrorKind::Unsupported.into()),
        };
        let urings = urings.ok().map(Arc::new);
        let hosts = Mutex::default();
        Ok(BlkDevice {
            files,
            urings,
            capacity,
            frontends: hosts,
            block_size,
            data_id,
            can_clear: clears,
            serial,
            image,
            generation,
            options,
        })
    }

    /// Returns the size in sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Reads the image size again. If the image has grown, sets the new capacity and notifies the front-ends. Returns
    /// the size in sectors of 512 bytes.
    ///
    /// # Errors
    /// [`BlkError::Shrunk`], or the error of the system. The disk is then unchanged.
    pub fn grow(&self) -> Result<u64, BlkError> {
        // Held until the notifications are sent, so that concurrent calls notify in order.
        let hosts = self.frontends.lock().unwrap_or_else(PoisonError::into_inner);
        let image = &self.options.image;
        let bytes = size(image, &self.files.buffered)?;
        let (before, now) = (self.capacity(), bytes / SECTOR_BYTES);
        if now < before {
            return Err(BlkError::Shrunk { image: image.clone(), bytes, capacity: before * SECTOR_BYTES });
        }
        if now > before {
            self.capacity.store(now, Ordering::Relaxed);
            info!(
                "{}: the disk has grown to {} bytes from {}",
                image.display(),
                now * SECTOR_BYTES,
                before * SECTOR_BYTES
            );
            hosts.iter().filter_map(Weak::upgrade).for_each(|host| host.config_changed());
        }
        Ok(now)
    }

    fn engine(&self) -> io::Result<Box<dyn DiskEngine>> {
        let uring = self.urings.as_ref().and_then(|urings| UringEngine::new(self.files.clone(), urings));
        match uring {
            Some(uring) => Ok(Box::new(uring)),
            None => Ok(Box::new(ThreadEngine::new(&self.files)?)),
        }
    }
}

impl VirtioDevice for BlkDevice {
    fn features(&self) -> VirtioFeatures {
        let or = |yes: bool, feature| if yes { feature } else { VirtioFeatures::empty() };
        RING_FEATURES
            | VIRTIO_BLK_F_SEG_MAX
            | VIRTIO_BLK_F_BLK_SIZE
            | VIRTIO_BLK_F_FLUSH
            | or(self.options.in_order, VIRTIO_F_IN_ORDER)
            | or(self.options.iommu, VIRTIO_F_ACCESS_PLATFORM)
            | or(self.options.queues > 1, VIRTIO_BLK_F_MQ)
            | or(self.options.read_only, VIRTIO_BLK_F_RO)
            | or(self.can_clear, VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES)
    }

    fn device_id(&self) -> Option<u32> {
        Some(VIRTIO_ID_BLOCK)
    }

    fn data_id(&self) -> u128 {
        self.data_id
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        let mut features = ProtocolFeatures::empty();
        features.set(ProtocolFeatures::PAGEFAULT, self.options.postcopy);
        features.set(INFLIGHT_MIGRATION, self.options.inflight_migration);
        features.set(own::F_DISK_GENERATION, self.generation.is_some());
        features
    }

    fn queues(&self) -> u16 {
        self.options.queues
    }

    fn max_queue_size(&self) -> u16 {
        self.options.max_queue_size
    }

    fn config(&self) -> Vec<u8> {
        let mut config = BlkConfig::new_zeroed();
        config.capacity = self.capacity().into();
        // Without indirect descriptors, each segment, the header and the status take one descriptor of the ring each.
        let segments = self.options.max_queue_size.saturating_sub(2).min(MAX_SEGMENTS);
        config.seg_max = u32::from(segments).into();
        config.blk_size = self.block_size.into();
        config.num_queues = self.options.queues.into();
        if self.can_clear {
            config.max_discard_sectors = MAX_CLEAR_SECTORS.into();
            config.max_discard_seg = 1.into();
            config.discard_sector_alignment = (self.block_size / SECTOR_BYTES as u32).into();
            config.max_write_zeroes_sectors = MAX_CLEAR_SECTORS.into();
            config.max_write_zeroes_seg = 1.into();
            config.write_zeroes_may_unmap = 1;
        }
        config.as_bytes().to_vec()
    }

    fn max_front_ends(&self) -> usize {
        self.options.max_front_ends.into()
    }

    fn connected(&self, host: Arc<FrontendHandle>) {
        let mut hosts = self.frontends.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|host| host.strong_count() > 0);
        hosts.push(Arc::downgrade(&host));
    }

    fn prepare_to_stop(&self) -> Option<Box<dyn Send>> {
        // With direct I/O there is nothing to write back.
        if self.options.read_only || self.files.alignment().is_some() {
            return None;
        }
        let write_back = WriteBack::start(self.files.clone());
        let write_back = write_back.inspect_err(|error| warn!("the image is not written back ahead: {error}"));
        write_back.ok().map(|write_back| Box::new(write_back) as Box<dyn Send>)
    }

    fn rings_stopped(&self) -> io::Result<()> {
        let begin = Instant::now();
        self.files.sync()?;
        self.files.drop_used_cache();
        debug!("{}: on stable storage after {:?}", self.options.image.display(), begin.elapsed());
        Ok(())
    }

    fn disk_generation(&self) -> Result<DiskGeneration, BackendError> {
        let generation = self.generation.as_ref().ok_or_else(|| io::Error::other("the image can't have one"));
        let told = generation.and_then(|generation| generation.current(self.image.as_ref()));
        told.map_err(|error| BackendError::DiskGeneration { why: error.to_string() })
    }

    fn disk_identity(&self) -> Result<u128, BackendError> {
        let generation = self.generation.as_ref().ok_or_else(|| io::Error::other("the image can't have one"));
        let told = generation.and_then(|generation| generation.identity(self.image.as_ref()));
        told.map_err(|error| BackendError::DiskIdentity { why: error.to_string() })
    }

    fn validate_queue(&self) -> io::Result<()> {
        self.image.as_ref().map_or(Ok(()), ImageLock::probe)
    }

    fn start_queue(&self, index: u16, _size: u16, features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let claim = self.image.as_ref().map(ImageLock::lock).transpose()?;
        // Another process may have changed the image before it was locked.
        self.files.drop_cache();
        Ok(Box::new(BlkQueue::new(self, index, features, self.engine()?, claim)))
    }
}

/// Returns the size of an image or block device in bytes.
fn size(image: &Path, mut file: &File) -> Result<u64, BlkError> {
    file.seek(SeekFrom::End(0)).map_err(|source| open_error(image, source))
}

fn open(image: &Path, read_only: bool, flags: i32) -> Result<File, BlkError> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(image)
        .map_err(|source| open_error(image, source))
}

fn open_error(image: &Path, source: io::Error) -> BlkError {
    let advice = match source.kind() {
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::PermissionDenied => "change its owner or mode, or use --read-only",
        io::ErrorKind::ReadOnlyFilesystem => "use --read-only",
        io::ErrorKind::IsADirectory => "give the path of a raw image",
        io::ErrorKind::InvalidInput => "its file system may not support --direct",
        _ => "check the path and the mode",
    };
    BlkError::Open { image: image.to_owned(), source, advice }
}

/// Returns true if the file system can deallocate ranges. The test range is beyond the end of the file, so that
/// its deallocation changes nothing.
fn punches_holes(file: &File, end: u64) -> bool {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let Ok(end) = i64::try_from(end) else { return false };
    !matches!(fallocate(file, flags, end, 4096), Err(Errno::EOPNOTSUPP | Errno::ENOSYS))
}
