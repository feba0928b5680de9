//! The log of a VDUSE device: a file from which another process continues the device after this one was killed (rules V3.4
//! to V3.6).
//!
//! The first page is the record of the device. It is written with one system call, which a signal does not interrupt, and
//! has a checksum. The rest is the inflight region of the rings, mapped and written as for vhost-user.
//! `docs/vduse-log.md` has the format.

#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use twox_hash::XxHash3_64;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::abi::virtio::{MAX_QUEUE_SIZE, VIRTIO_F_RING_PACKED, VirtioFeatures};
use crate::inflight::{InflightError, InflightRegion, RingKind};
use crate::ring::RingBase;
use crate::vduse::VduseError;

/// Size of the record, bytes. The inflight region follows.
pub const RECORD_BYTES: u64 = size_of::<Page>() as u64;

const MAGIC: [u8; 8] = *b"vduselog";
const VERSION: u16 = 1;
const MAX_QUEUES: usize = 256;
const MAX_CONFIG_BYTES: usize = 256;
/// Attempts to lock the file, which an ending process removes before it unlocks it.
const LOCK_ATTEMPTS: usize = 50;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The first page of the file.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Page {
    magic: [u8; 8],
    version: U16,
    queues: U16,
    queue_size: U16,
    config_bytes: U16,
    boot_id: [u8; 16],
    inode: U64,
    offered: U64,
    features: U64,
    device_id: U32,
    status: u8,
    suspended: u8,
    padding: [u8; 2],
    data_id: [u8; 16],
    config: [u8; MAX_CONFIG_BYTES],
    stopped: [StoppedRing; MAX_QUEUES],
    unused: [u8; 1704],
    /// Xxh3-64 of the bytes before it.
    checksum: U64,
}

const _: () = assert!(size_of::<Page>() == 4096);

/// A ring that was stopped, and its base.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct StoppedRing {
    is_stopped: U32,
    base: U32,
}

/// A reason for which a log cannot be used, or a device cannot be continued from it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VduseLogError {
    /// The kernel does not use the device any more (rule V1.6).
    #[error("the kernel has given up the device, because a message was not answered in time (rule V1.6)")]
    GivenUp,
    /// No directory for the log was given.
    #[error("no directory of its log is given (--state-dir)")]
    NoDirectory,
    /// There is no log.
    #[error("its log {} does not exist", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file does not begin as a log does.
    #[error("the file does not begin with {:?}: it is no log of a VDUSE device", MAGIC.escape_ascii().to_string())]
    NotALog,
    /// The version of the format is not known.
    #[error("the log has version {version}, expected {VERSION}: use the version of this program that wrote it")]
    Version {
        /// The version of the file.
        version: u16,
    },
    /// The checksum of the record is wrong.
    #[error("the log is damaged: its checksum is wrong")]
    Checksum,
    /// A field of the record is not valid.
    #[error("the log is damaged: {field} is {value}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The log is of another device.
    #[error("the log is of an earlier device of this name")]
    OtherDevice,
    /// The device now has other data.
    #[error("its data is not that with which it was created: start it with the image that it had")]
    OtherData,
    /// The device was created with other options.
    #[error("it was created with {was}, and now has {is}: start it with the options that it was created with")]
    OtherOptions {
        /// The features, rings and sizes of the device in the log.
        was: String,
        /// Those of the device to be served.
        is: String,
    },
}

/// Identifies one VDUSE device. Another one of the same name, or one after a restart of the host, has another value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInstance {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: [u8; 16],
    /// Inode number of the device's folder in sysfs, which the kernel does not assign twice.
    pub inode: u64,
}

impl DeviceInstance {
    /// Returns the identity of the device `name`, which exists.
    pub(super) fn of(name: &str) -> io::Result<DeviceInstance> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits = text.trim().replace('-', "");
        let number = u128::from_str_radix(&digits, 16).map_err(|_| io::ErrorKind::InvalidData)?;
        let inode = fs::metadata(format!("/sys/class/vduse/{name}"))?.ino();
        Ok(DeviceInstance { boot_id: number.to_be_bytes(), inode })
    }
}

/// The state of a VDUSE device that a successor needs besides the requests in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VduseRecord {
    /// The device.
    pub instance: DeviceInstance,
    /// Its virtio device id.
    pub device_id: u32,
    /// The data of the device, as [`VirtioDevice::data_id`](crate::backend::VirtioDevice::data_id) names it.
    pub data_id: u128,
    /// Maximum size of a ring, entries.
    pub queue_size: u16,
    /// The features that drivers are offered.
    pub offered: VirtioFeatures,
    /// The features of the driver that has started the rings.
    pub features: VirtioFeatures,
    /// The device status, as the driver has set it last.
    pub status: u8,
    /// True if the kernel has suspended the device.
    pub suspended: bool,
    /// The configuration space that the driver reads.
    pub config: Vec<u8>,
    /// The base of each ring that was stopped by itself, for example because the kernel has asked for its base.
    pub stopped_at: Vec<Option<RingBase>>,
}

impl VduseRecord {
    /// The number of rings.
    pub fn queues(&self) -> u16 {
        self.stopped_at.len() as u16
    }

    /// The kind of the rings, by the features of the driver.
    pub fn ring_kind(&self) -> RingKind {
        if self.features.contains(VIRTIO_F_RING_PACKED) { RingKind::Packed } else { RingKind::Split }
    }

    /// Reads the record from the first bytes of a log.
    ///
    /// # Errors
    /// [`VduseLogError`] if they are not those of a valid log.
    pub fn read(bytes: &[u8]) -> Result<VduseRecord, VduseLogError> {
        let (page, _) = Page::ref_from_prefix(bytes).map_err(|_| VduseLogError::NotALog)?;
        if page.magic != MAGIC {
            return Err(VduseLogError::NotALog);
        }
        if page.version != VERSION {
            return Err(VduseLogError::Version { version: page.version.get() });
        }
        if page.checksum != page.sum() {
            return Err(VduseLogError::Checksum);
        }
        let field = |field, value: u16| VduseLogError::Field { field, value: value.into() };
        let queues = page.queues.get();
        let rings = Some(queues).filter(|count| *count > 0).and_then(|count| page.stopped.get(..count.into()));
        let config = page.config.get(..page.config_bytes.get().into());
        let queue_size = page.queue_size.get();
        if queue_size == 0 || u32::from(queue_size) > MAX_QUEUE_SIZE {
            return Err(field("queue_size", queue_size));
        }
        Ok(VduseRecord {
            instance: DeviceInstance { boot_id: page.boot_id, inode: page.inode.get() },
            device_id: page.device_id.get(),
            data_id: u128::from_le_bytes(page.data_id),
            queue_size,
            offered: VirtioFeatures::from_bits_retain(page.offered.get()),
            features: VirtioFeatures::from_bits_retain(page.features.get()),
            status: page.status,
            suspended: page.suspended != 0,
            config: config.ok_or(field("config_bytes", page.config_bytes.get()))?.to_vec(),
            stopped_at: rings.ok_or(field("queues", queues))?.iter().map(StoppedRing::base).collect(),
        })
    }

    fn page(&self) -> Result<Page, VduseLogError> {
        let too_large = |field, value: usize| VduseLogError::Field { field, value: value as u64 };
        let mut page = Page {
            magic: MAGIC,
            version: VERSION.into(),
            queues: self.queues().into(),
            queue_size: self.queue_size.into(),
            config_bytes: (self.config.len() as u16).into(),
            boot_id: self.instance.boot_id,
            inode: self.instance.inode.into(),
            offered: self.offered.bits().into(),
            features: self.features.bits().into(),
            device_id: self.device_id.into(),
            data_id: self.data_id.to_le_bytes(),
            status: self.status,
            suspended: self.suspended.into(),
            ..Page::new_zeroed()
        };
        let config = page.config.get_mut(..self.config.len());
        config.ok_or(too_large("config_bytes", self.config.len()))?.copy_from_slice(&self.config);
        let rings = page.stopped.get_mut(..self.stopped_at.len());
        let rings = rings.ok_or(too_large("queues", self.stopped_at.len()))?;
        for (ring, base) in rings.iter_mut().zip(&self.stopped_at) {
            *ring = StoppedRing::new(*base);
        }
        page.checksum = page.sum();
        Ok(page)
    }
}

impl Page {
    fn sum(&self) -> U64 {
        let bytes = self.as_bytes();
        XxHash3_64::oneshot(bytes.get(..bytes.len() - size_of::<U64>()).unwrap_or_default()).into()
    }
}

impl StoppedRing {
    fn new(base: Option<RingBase>) -> StoppedRing {
        StoppedRing { is_stopped: u32::from(base.is_some()).into(), base: base.map_or(0, RingBase::bits).into() }
    }

    fn base(&self) -> Option<RingBase> {
        (self.is_stopped != 0).then(|| RingBase::from_bits(self.base.get()))
    }
}

/// The file of a log, locked for this process.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Opens the log of device `name` in `folder`. With `create`, creates folder and file if they do not exist.
    pub(super) fn open(folder: &Path, name: &str, create: bool) -> Result<LogFile, VduseError> {
        let path = folder.join(name);
        let failed = |source| VduseError::LogFile { path: path.clone(), source };
        if create {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        }
        for _ in 0..LOCK_ATTEMPTS {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(create).truncate(false).mode(0o600);
            let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    thread::sleep(LOCK_INTERVAL);
                    continue;
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            let opened = file.metadata().map_err(failed)?;
            if !opened.is_file() {
                return Err(failed(io::Error::other("not a regular file")));
            }
            // The process that had it locked may have removed it.
            let found = fs::symlink_metadata(&path);
            if found.is_ok_and(|found| (found.dev(), found.ino()) == (opened.dev(), opened.ino())) {
                return Ok(LogFile { path, file });
            }
        }
        Err(VduseError::LogInUse { path })
    }

    /// Reads the record of the device `instance`.
    pub(super) fn read(&self, instance: DeviceInstance) -> Result<VduseRecord, VduseLogError> {
        let mut bytes = Vec::new();
        let read = (&self.file).take(RECORD_BYTES).read_to_end(&mut bytes);
        let record = read.map_err(|_| VduseLogError::NotALog).and_then(|_| VduseRecord::read(&bytes))?;
        if record.instance == instance { Ok(record) } else { Err(VduseLogError::OtherDevice) }
    }

    fn failed(&self, source: io::Error) -> VduseError {
        VduseError::LogFile { path: self.path.clone(), source }
    }
}

/// The log of a device that is served.
#[derive(Debug)]
pub(super) struct VduseLog {
    file: LogFile,
    record: VduseRecord,
}

impl VduseLog {
    /// Replaces the contents of the file by `record` and no requests in flight.
    pub(super) fn create(file: LogFile, record: VduseRecord) -> Result<VduseLog, VduseError> {
        let log = VduseLog { file, record };
        let size = RECORD_BYTES + log.region_bytes();
        let file = &log.file.file;
        file.set_len(0).map_err(|source| log.file.failed(source))?;
        // All of it is allocated: a store into the mapping would end the process if the file system were full.
        let allocated = fallocate(file, FallocateFlags::empty(), 0, size as i64);
        allocated.map_err(|errno| log.file.failed(errno.into()))?;
        log.write()?;
        Ok(log)
    }

    /// Continues the log of a process that has ended, with the record that it has written last.
    pub(super) fn resume(file: LogFile, record: VduseRecord) -> VduseLog {
        VduseLog { file, record }
    }

    /// The record.
    pub(super) fn record(&self) -> &VduseRecord {
        &self.record
    }

    /// Changes the record.
    pub(super) fn save(&mut self, change: impl FnOnce(&mut VduseRecord)) -> Result<(), VduseError> {
        let before = self.record.clone();
        change(&mut self.record);
        if self.record == before { Ok(()) } else { self.write() }
    }

    fn write(&self) -> Result<(), VduseError> {
        let LogFile { path, file } = &self.file;
        let page = self.record.page().map_err(|source| VduseError::Log { path: path.clone(), source })?;
        // One call for one page: it is executed or not, whenever the process is killed.
        file.write_all_at(page.as_bytes(), 0).map_err(|source| self.file.failed(source))
    }

    /// Maps the inflight region of the rings of the present driver.
    pub(super) fn region(&self) -> Result<InflightRegion, InflightError> {
        let VduseRecord { queue_size, .. } = self.record;
        let (kind, queues) = (self.record.ring_kind(), self.record.queues());
        let size = InflightRegion::bytes_for(kind, queues, queue_size)?;
        InflightRegion::map(kind, self.file.file.as_fd(), size, RECORD_BYTES, queues, queue_size)
    }

    /// Clears the inflight region, which the next driver may use with rings of the other kind. No ring may be running.
    pub(super) fn clear_region(&self) -> Result<(), VduseError> {
        let zeros = vec![0; self.region_bytes() as usize];
        self.file.file.write_all_at(&zeros, RECORD_BYTES).map_err(|source| self.file.failed(source))
    }

    /// Size of the region for rings of either kind, bytes.
    fn region_bytes(&self) -> u64 {
        let bytes = |kind: RingKind| kind.queue_bytes(self.record.queue_size) * u64::from(self.record.queues());
        bytes(RingKind::Split).max(bytes(RingKind::Packed))
    }

    /// Removes the file.
    pub(super) fn remove(self) -> Result<(), VduseError> {
        fs::remove_file(&self.file.path).map_err(|source| self.file.failed(source))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inflight::SplitRecovery;

    const INSTANCE: DeviceInstance = DeviceInstance { boot_id: [7; 16], inode: 0x1_0000_0042 };

    fn record() -> VduseRecord {
        VduseRecord {
            instance: INSTANCE,
            device_id: 2,
            data_id: 0x0102,
            queue_size: 128,
            offered: VirtioFeatures::from_bits_retain(0x3_3000_1000),
            features: VirtioFeatures::from_bits_retain(0x3_1000_1000),
            status: 15,
            suspended: false,
            config: vec![1, 2, 3],
            stopped_at: vec![None, Some(RingBase::split(513))],
        }
    }

    /// A folder that is removed with all it contains.
    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let page = record().page().unwrap();
        assert_eq!(VduseRecord::read(page.as_bytes()), Ok(record()));
    }

    #[test]
    fn the_layout_is_that_of_the_documentation() {
        let page = record().page().unwrap();
        let bytes = page.as_bytes();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(bytes[..16], *b"vduselog\x01\0\x02\0\x80\0\x03\0");
        assert_eq!(bytes[16..32], [7; 16]);
        assert_eq!(bytes[32..40], 0x1_0000_0042_u64.to_le_bytes());
        assert_eq!(bytes[40..48], 0x3_3000_1000_u64.to_le_bytes());
        assert_eq!(bytes[48..56], 0x3_1000_1000_u64.to_le_bytes());
        assert_eq!(bytes[56..64], [2, 0, 0, 0, 15, 0, 0, 0]);
        assert_eq!(bytes[64..80], 0x0102_u128.to_le_bytes());
        assert_eq!(bytes[80..84], [1, 2, 3, 0]);
        assert_eq!(bytes[336..352], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0]);
        assert_eq!(bytes[4088..], XxHash3_64::oneshot(&bytes[..4088]).to_le_bytes());
    }

    #[test]
    fn a_record_that_does_not_fit_is_refused() {
        for (record, field) in [
            (VduseRecord { config: vec![0; 257], ..record() }, "config_bytes"),
            (VduseRecord { stopped_at: vec![None; 257], ..record() }, "queues"),
        ] {
            assert_eq!(record.page().unwrap_err(), VduseLogError::Field { field, value: 257 });
        }
    }

    #[test]
    fn invalid_fields_are_refused_though_the_checksum_is_right() {
        let refused = |change: fn(&mut Page)| {
            let mut page = record().page().unwrap();
            change(&mut page);
            page.checksum = page.sum();
            VduseRecord::read(page.as_bytes()).unwrap_err()
        };
        let field = |field, value| VduseLogError::Field { field, value };
        assert_eq!(refused(|page| page.version = 2.into()), VduseLogError::Version { version: 2 });
        assert_eq!(refused(|page| page.magic[0] = 0), VduseLogError::NotALog);
        assert_eq!(refused(|page| page.queues = 0.into()), field("queues", 0));
        assert_eq!(refused(|page| page.queues = 257.into()), field("queues", 257));
        assert_eq!(refused(|page| page.queue_size = 0.into()), field("queue_size", 0));
        assert_eq!(refused(|page| page.queue_size = 32769.into()), field("queue_size", 32769));
        assert_eq!(refused(|page| page.config_bytes = 257.into()), field("config_bytes", 257));
    }

    proptest! {
        #[test]
        fn a_record_with_a_wrong_bit_is_refused(bit in 0..8 * RECORD_BYTES as usize) {
            let page = record().page().unwrap();
            let mut bytes = page.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(VduseRecord::read(&bytes).is_err());
        }

        #[test]
        fn any_bytes_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            let _ = VduseRecord::read(&bytes);
        }
    }

    #[test]
    fn a_successor_reads_the_record_and_the_requests_in_flight() {
        let folder = folder();
        let state = folder.path().join("state");
        let mut log = VduseLog::create(LogFile::open(&state, "disk0", true).unwrap(), record()).unwrap();
        let (mut tracker, _) = log.region().unwrap().split(1, 128, 0).unwrap();
        [3, 5, 9].into_iter().for_each(|head| tracker.take(head));
        log.save(|record| record.status = 7).unwrap();
        drop((log, tracker));

        let file = LogFile::open(&state, "disk0", false).unwrap();
        let found = file.read(INSTANCE).unwrap();
        assert_eq!(found, VduseRecord { status: 7, ..record() });
        let log = VduseLog::resume(file, found);
        let in_flight = |log: &VduseLog| -> SplitRecovery { log.region().unwrap().split(1, 128, 0).unwrap().1 };
        assert_eq!(in_flight(&log).resubmit, [3, 5, 9]);
        log.clear_region().unwrap();
        let cleared = in_flight(&log);
        assert_eq!((cleared.resubmit, cleared.next_avail), (vec![], None));
        assert_eq!(fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(state.join("disk0")).unwrap().mode() & 0o777, 0o600);
        log.remove().unwrap();
        assert!(!state.join("disk0").exists());
    }

    #[test]
    fn a_log_without_a_record_of_this_device_is_refused() {
        let folder = folder();
        let file = || LogFile::open(folder.path(), "disk0", true).unwrap();
        let path = folder.path().join("disk0");
        assert_eq!(file().read(INSTANCE), Err(VduseLogError::NotALog));
        VduseLog::create(file(), record()).unwrap();
        for other in [DeviceInstance { inode: 1, ..INSTANCE }, DeviceInstance { boot_id: [0; 16], ..INSTANCE }] {
            assert_eq!(file().read(other), Err(VduseLogError::OtherDevice));
        }
        fs::write(&path, [0; 100]).unwrap();
        assert_eq!(file().read(INSTANCE), Err(VduseLogError::NotALog));
    }

    #[test]
    fn a_log_has_one_user() {
        let folder = folder();
        let first = LogFile::open(folder.path(), "disk0", true).unwrap();
        let refused = LogFile::open(folder.path(), "disk0", true).unwrap_err();
        assert!(matches!(refused, VduseError::LogInUse { .. }), "{refused}");
        // Another file at the path has a lock of its own.
        fs::remove_file(folder.path().join("disk0")).unwrap();
        LogFile::open(folder.path(), "disk0", true).unwrap();
        drop(first);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let folder = folder();
        std::os::unix::fs::symlink("elsewhere", folder.path().join("link")).unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["link", "folder", "pipe"] {
            let refused = LogFile::open(folder.path(), name, true).unwrap_err();
            assert!(matches!(refused, VduseError::LogFile { .. }), "{name}: {refused}");
        }
        assert!(!folder.path().join("elsewhere").exists());
    }
}
