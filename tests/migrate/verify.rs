//! Verification: a writer without a dirty source fails the migration instead of the guest.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use vhost_migrate::dirty::{DirtySource, Log, LogSource, PageSet, Pagemap, UnionSource};
use vhost_migrate::memory::{Address, GuestAddress, LOG_PAGE, Memory, PageNumber, Region};
use vhost_migrate::migrate::{GuestLocation, MigrateError, MigrationEvent, SourceVm, VmError, migrate};
use vhost_migrate::stream::{self};
use vhost_migrate::unstable::with_causes;

use crate::guest::{Guest, GuestFault, HIGH, RefusalPoint};
use crate::harness::{Destination, MigrationSetup, TempFolder, assert_source_unharmed, migrate_out, migrate_to, uri};

const PAGES: u64 = 2048;

#[test]
fn a_verified_migration_compares_every_page() {
    for (channels, codec) in [(1, "none"), (3, "zstd:1")] {
        let mut guest = Guest::running(PAGES);
        let (_folder, destination) = Destination::start();
        let left =
            migrate_out(&mut guest, &destination.uri, &MigrationSetup::new().channels(channels).codec(codec).verify());
        assert!(left.outcome.unwrap().verify_ms.is_some());
        let arrived = destination.join();
        assert_eq!(arrived.outcome.as_ref().unwrap().compared, PAGES);
        arrived.guest();
    }
    let folder = TempFolder::new();
    let file = uri(&format!("file:{}", folder.path("saved")));
    let mut guest = Guest::running(PAGES);
    migrate_out(&mut guest, &file, &MigrationSetup::new().one_way().verify()).outcome.unwrap();
    assert_eq!(Destination::at(&file).join().outcome.unwrap().compared, PAGES);
    let (_, report) = migrate_to(Guest::running(PAGES), &folder.unix("socket"), &MigrationSetup::new());
    assert_eq!(report.verify_ms, None);
}

#[test]
fn verification_fails_a_migration_whose_dirty_source_misses_writes() {
    let mut guest = Guest::running(PAGES).with_fault(GuestFault::LogOff);
    let (_folder, destination) = Destination::start();
    let failure = migrate_out(&mut guest, &destination.uri, &MigrationSetup::new().channels(2).verify()).failure();
    assert!(matches!(&failure.error, MigrateError::Destination(words) if words.contains("differ")), "{failure}");
    assert!(matches!(destination.join().expect_failure(), MigrateError::MemoryDiffers { .. }));
    assert_source_unharmed(guest, &failure);
}

/// A guest whose memory only the test writes.
struct StaticVm {
    memory: Memory,
    sources: Vec<Box<dyn DirtySource>>,
    paused: bool,
}

impl StaticVm {
    /// All pages except every fourth have contents.
    fn new() -> StaticVm {
        let memory = Memory::new([GuestAddress(0), HIGH].map(|gpa| {
            let size = PAGES / 2 * LOG_PAGE;
            Arc::new(Region::create(gpa, size).unwrap())
        }));
        let memory = memory.unwrap();
        for page in (0..PAGES / 2).filter(|page| page % 4 != 0) {
            memory.write(GuestAddress(page * LOG_PAGE), &[1; 100]).unwrap();
            memory.write(HIGH.unchecked_add(page * LOG_PAGE), &[2; 100]).unwrap();
        }
        StaticVm { memory, sources: Vec::new(), paused: false }
    }

    /// Migrates, with `write` called after the first round. Returns the pages that differ at the destination, and the
    /// source's error text.
    fn differences(mut self, mut write: impl FnMut(&Memory)) -> Option<(u64, Vec<u64>, String)> {
        let folder = TempFolder::new();
        let destination = Destination::new(&folder.unix("socket"), Some(RefusalPoint::Restore));
        let setup = MigrationSetup::new().channels(2).verify();
        let connection = stream::connect(&destination.uri, &setup.options).unwrap();
        let (memory, mut rounds) = (self.memory.clone(), 0);
        let outcome = migrate(&mut self, connection, &setup.parameters, &mut |event| {
            if let MigrationEvent::Switchover { .. } = event {
                write(&memory);
                rounds += 1;
            }
        });
        assert_eq!(rounds, 1);
        match destination.join().outcome {
            Err(MigrateError::MemoryDiffers { pages, first_different: named }) => {
                let failure = outcome.unwrap_err();
                assert!(failure.location == GuestLocation::RunningHere && !self.paused, "{failure}");
                Some((pages, named.iter().map(|page| page.0).collect(), with_causes(&failure).to_string()))
            }
            // The destination always refuses the state, which it receives if memory matches.
            Err(MigrateError::Vm { .. }) => None,
            other => panic!("{other:?}"),
        }
    }
}

impl SourceVm for StaticVm {
    fn memory(&self) -> Memory {
        self.memory.clone()
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        Ok(Box::new(UnionSource::new(std::mem::take(&mut self.sources))))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.paused = true;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(Vec::new())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.paused = false;
        Ok(())
    }

    fn release(&mut self) {}
}

#[test]
fn verification_lists_the_pages_of_an_untracked_writer() {
    let first = HIGH.0 / LOG_PAGE;
    // Pages with contents, pages that were holes, and both ends of the regions.
    let written = [0, 5, 8, PAGES / 2 - 1, first, first + 600];
    let (pages, named, words) = StaticVm::new()
        .differences(|memory| {
            written.iter().for_each(|page| memory.write(GuestAddress(page * LOG_PAGE + 200), &[7]).unwrap())
        })
        .unwrap();
    assert_eq!((pages, named.as_slice()), (6, written.as_slice()));
    assert!(words.contains("6 pages differ") && words.contains("at 0x0, 0x5000, 0x8000, "), "{words}");
    // All are counted, and the first are listed.
    let (pages, named, words) = StaticVm::new()
        .differences(|memory| (0..600).for_each(|page| memory.write(GuestAddress(page * LOG_PAGE), &[9]).unwrap()))
        .unwrap();
    assert_eq!((pages, named), (600, (0..16).collect()));
    assert!(words.contains(", …"), "{words}");
    // A page that was zeroed here still has contents at the destination.
    let found = StaticVm::new().differences(|memory| memory.write(GuestAddress(LOG_PAGE), &[0; 100]).unwrap()).unwrap();
    assert_eq!((found.0, found.1), (1, vec![1]));
    assert_eq!(StaticVm::new().differences(|_| ()), None);
}

/// A device that writes guest memory through pages pinned by the kernel.
struct PinnedDevice {
    ring: IoUring,
    file: std::fs::File,
    buffer: libc::iovec,
}

impl PinnedDevice {
    fn new(memory: &Memory, gpa: GuestAddress) -> PinnedDevice {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0x5a; 4096]).unwrap();
        let ring = IoUring::new(2).unwrap();
        let mut buffers = Vec::new();
        memory.iovecs(gpa, LOG_PAGE, &mut buffers).unwrap();
        // SAFETY: the buffer is guest memory, which the caller keeps mapped longer than this device.
        unsafe { ring.submitter().register_buffers(&buffers) }.unwrap();
        PinnedDevice { ring, file, buffer: buffers[0] }
    }

    fn write(&mut self) {
        let fd = types::Fd(self.file.as_raw_fd());
        let read = opcode::ReadFixed::new(fd, self.buffer.iov_base.cast(), 4096, 0).build();
        // SAFETY: file and buffer outlive the request, which is waited for.
        unsafe { self.ring.submission().push(&read) }.unwrap();
        self.ring.submit_and_wait(1).unwrap();
        assert_eq!(self.ring.completion().next().unwrap().result(), 4096);
    }
}

/// The page written by the pinned device.
const PINNED: u64 = 9;
const PINNED_GPA: GuestAddress = GuestAddress(PINNED * LOG_PAGE);

#[test]
fn a_write_through_pinned_pages_is_in_the_device_log_but_not_in_the_pagemap() {
    let StaticVm { memory, .. } = StaticVm::new();
    let mut device = PinnedDevice::new(&memory, PINNED_GPA);
    let log = Arc::new(Log::create(memory.end()).unwrap().0);
    let mut blind = Pagemap::new("cpus", memory.clone());
    blind.start().unwrap();
    device.write();
    let mut byte = [0];
    memory.read(PINNED_GPA, &mut byte).unwrap();
    assert_eq!(byte, [0x5a]);
    let mut set = PageSet::default();
    blind.harvest(&mut set).unwrap();
    assert!(set.is_empty(), "{set:?}");
    blind.stop().unwrap();

    let mut both =
        UnionSource::new([Box::new(blind) as Box<dyn DirtySource>, Box::new(LogSource::new("device", log.clone()))]);
    both.start().unwrap();
    device.write();
    log.mark(PINNED_GPA, LOG_PAGE);
    both.harvest(&mut set).unwrap();
    assert!(set.iter().eq([PageNumber(PINNED)]), "{set:?}");
    both.stop().unwrap();
}

#[test]
fn verification_finds_writes_through_pinned_pages() {
    let mut guest = StaticVm::new();
    let memory = guest.memory.clone();
    guest.sources.push(Box::new(Pagemap::new("cpus", memory.clone())));
    let mut device = PinnedDevice::new(&memory, PINNED_GPA);
    let (pages, named, _) = guest.differences(|_| device.write()).unwrap();
    assert_eq!((pages, named), (1, vec![PINNED]));
    // With the device's log as another source.
    let mut guest = StaticVm::new();
    let memory = guest.memory.clone();
    let log = Arc::new(Log::create(memory.end()).unwrap().0);
    guest.sources.push(Box::new(Pagemap::new("cpus", memory.clone())));
    guest.sources.push(Box::new(LogSource::new("device", log.clone())));
    let mut device = PinnedDevice::new(&memory, PINNED_GPA);
    let found = guest.differences(|_| {
        device.write();
        log.mark(PINNED_GPA, LOG_PAGE);
    });
    assert_eq!(found, None);
}
