//! Migration without draining the disk: requests in flight move with the inflight region (rule I8), by
//! GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/forward.rs"]
mod forward;
#[path = "kit/guest_work.rs"]
mod guest_work;
#[path = "kit/served.rs"]
mod served;
#[path = "kit/wait.rs"]
mod wait;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use rstest::rstest;
use vhost_migrate::abi::vhost_user::ProtocolFeatures;
use vhost_migrate::abi::vhost_user::unstable::INFLIGHT_MIGRATION;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::blk::{Aio, BlkDevice, BlkOptions};
use vhost_migrate::backend::{Queue, Request, VirtioDevice};
use vhost_migrate::frontend::{UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig, GuestState, make_memory};
use vhost_migrate::memory::{LOG_PAGE, Memory};

use forward::forward;
use guest_work::{PATIENCE, run_for};
use served::Served;

const MIB: u64 = 1 << 20;
const MIGRATIONS: u64 = 6;

/// A disk that serves every request 20 ms after it was submitted.
struct SlowDisk(BlkDevice);

struct SlowQueue {
    disk: Box<dyn Queue>,
    waiting: VecDeque<(Instant, Request)>,
    /// Always readable, so that the worker polls for completions.
    ready: EventFd,
}

impl VirtioDevice for SlowDisk {
    forward!(0: features -> VirtioFeatures, queues -> u16, config -> Vec<u8>);

    fn protocol_features(&self) -> ProtocolFeatures {
        INFLIGHT_MIGRATION
    }

    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let disk = self.0.start_queue(index, size, features)?;
        Ok(Box::new(SlowQueue { disk, waiting: VecDeque::new(), ready: EventFd::from_value(1)? }))
    }
}

impl Queue for SlowQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push_back((Instant::now(), request));
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        let due = |(since, _): &(Instant, Request)| since.elapsed() > Duration::from_millis(20);
        while self.waiting.front().is_some_and(due) {
            self.waiting.pop_front().into_iter().for_each(|(_, request)| self.disk.submit(request));
        }
        self.disk.completions(done);
        if done.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        unserved.extend(self.waiting.drain(..).map(|(_, request)| request));
        self.disk.suspend(unserved);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ready.as_fd()).filter(|_| !self.waiting.is_empty()).or(self.disk.completion_fd())
    }
}

/// Starts a back-end on the shared image, and connects to it.
fn start(folder: &Path, socket: &str, aio: Aio) -> (Served, UserDevice) {
    let disk = BlkDevice::open(
        BlkOptions::new(folder.join("image")).with_queues(2).with_aio(aio).with_inflight_migration(true),
    );
    let path = folder.join(socket);
    let served = Served::new(&path, Arc::new(SlowDisk(disk.unwrap())));
    let options = UserOptions::default().with_inflight_migration();
    let device = UserDevice::connect(&path, options, Instant::now() + PATIENCE).unwrap();
    (served, device)
}

fn bytes(memory: &Memory) -> Vec<Vec<u8>> {
    let read = |gpa, size: u64| {
        let mut bytes = vec![0; size as usize];
        memory.read(gpa, &mut bytes).unwrap();
        bytes
    };
    memory.regions().iter().map(|region| read(region.gpa(), region.size())).collect()
}

fn copy(memory: &Memory) -> Memory {
    let regions = memory.regions().iter().map(|region| (region.gpa(), region.size()));
    let to = make_memory(regions, false).unwrap();
    for (region, bytes) in memory.regions().iter().zip(bytes(memory)) {
        to.write(region.gpa(), &bytes).unwrap();
    }
    to
}

/// Number of marks in the inflight regions of a guest. Split entries have 16 bytes and packed ones 32, after a header
/// of the size of one entry.
fn in_flight(state: &GuestState) -> usize {
    let entry = if state.config.packed { 32 } else { 16 };
    let inflight = state.devices.iter().map(|device| device.inflight.as_ref().unwrap());
    let marks = inflight.map(|region| {
        let queues = region.contents.chunks(region.contents.len() / usize::from(region.queues));
        queues.map(|queue| queue.chunks(entry).skip(1).filter(|entry| entry[0] == 1).count()).sum::<usize>()
    });
    marks.sum()
}

#[rstest]
#[case::split(false, Aio::IoUring)]
#[case::packed(true, Aio::IoUring)]
#[case::threads(false, Aio::Threads)]
fn requests_in_flight_move_with_the_inflight_region(#[case] packed: bool, #[case] aio: Aio) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("image")).unwrap().set_len(16 * MIB).unwrap();
    let config = GuestConfig::new(16 * MIB)
        .with_packed(packed)
        .with_inflight_migration(true)
        .with_disk_area(4 * MIB)
        .with_dirty_rate(MIB);
    let (mut backend, device) = start(folder.path(), "0", aio);
    let mut guest = Guest::new(config).unwrap();
    guest.boot(vec![Box::new(device)]).unwrap();
    guest.resume().unwrap();
    let mut moved = 0;
    for number in 1..=MIGRATIONS {
        run_for(&guest, 50);
        guest.pause().unwrap();
        guest.stop_devices().unwrap();
        let before = bytes(guest.memory());
        if number % 3 == 0 {
            // As if the migration had failed: the guest continues at the source.
            guest.start_devices().unwrap();
            guest.resume().unwrap();
            run_for(&guest, 50);
            guest.pause().unwrap();
            guest.stop_devices().unwrap();
        } else {
            std::thread::sleep(Duration::from_millis(30));
            assert!(before == bytes(guest.memory()), "memory is written after the rings have stopped");
        }
        let state = guest.save_state().unwrap();
        moved += in_flight(&state);
        let memory = copy(guest.memory());
        drop(guest);
        drop(backend);
        let device;
        (backend, device) = start(folder.path(), &number.to_string(), aio);
        guest = Guest::restore(memory, state).unwrap();
        guest.attach(vec![Box::new(device)]).unwrap();
        guest.start_devices().unwrap();
        guest.resume().unwrap();
    }
    run_for(&guest, 100);
    guest.verify().unwrap();
    assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
    assert!(moved >= MIGRATIONS as usize, "only {moved} requests were in flight in {MIGRATIONS} migrations");
    drop(guest);
    drop(backend);
}

/// Rule I8.3.
#[test]
fn a_back_end_without_the_inflight_migration_features_is_refused_at_boot() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("image")).unwrap().set_len(16 * MIB).unwrap();
    let (_backend, device) = start(folder.path(), "0", Aio::Threads);
    drop(device);
    // A front-end that does not ask for the features does not negotiate them.
    let path = folder.path().join("0");
    let device = UserDevice::connect(path, UserOptions::default(), Instant::now() + PATIENCE).unwrap();
    let mut guest = Guest::new(GuestConfig::new(16 * MIB).with_inflight_migration(true)).unwrap();
    let error = guest.boot(vec![Box::new(device)]).unwrap_err();
    assert!(error.to_string().contains("--inflight-migration"), "{error}");
}

#[test]
fn requests_in_flight_are_not_moved_to_a_device_with_another_region() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("image")).unwrap().set_len(16 * MIB).unwrap();
    let config = GuestConfig::new(16 * MIB).with_inflight_migration(true).with_dirty_rate(MIB);
    let (backend, device) = start(folder.path(), "0", Aio::Threads);
    let mut guest = Guest::new(config).unwrap();
    guest.boot(vec![Box::new(device)]).unwrap();
    guest.resume().unwrap();
    run_for(&guest, 50);
    guest.pause().unwrap();
    guest.stop_devices().unwrap();
    let mut state = guest.save_state().unwrap();
    assert!(in_flight(&state) > 0);
    let inflight = state.devices[0].inflight.as_mut().unwrap();
    inflight.contents.extend([0; LOG_PAGE as usize]);
    let memory = copy(guest.memory());
    drop((guest, backend));
    let (_backend, device) = start(folder.path(), "1", Aio::Threads);
    let mut guest = Guest::restore(memory, state).unwrap();
    let error = guest.attach(vec![Box::new(device)]).unwrap_err();
    assert!(error.to_string().contains("in flight"), "{error}");
}
