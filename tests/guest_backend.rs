//! The built-in guest on this project's back-end, a separate process that is killed and restarted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/forward.rs"]
mod forward;
#[path = "kit/guest_work.rs"]
mod guest_work;
#[path = "kit/wait.rs"]
mod wait;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forward::forward;
use guest_work::{PATIENCE, assert_works, run_for, wait_for, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use tempfile::TempDir;
use vhost_migrate::abi::vhost_user::ProtocolFeatures;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::blk::{Aio, BlkDevice, BlkOptions};
use vhost_migrate::backend::{self, BackendError, BackendListener};
use vhost_migrate::dirty::{DirtyError, DirtySource, Log, PageSet, Pagemap};
use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig, GuestError, GuestIncomingVm, GuestSourceVm, make_memory};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, PageRange};
use vhost_migrate::migrate::{
    ConvergencePolicy, GuestLocation, IncomingReport, IncomingVm, MigrateError, MigrationFailure, MigrationParameters,
    MigrationReport, Outcomes, RegionLayout, SWITCHOVER_TIMEOUT, SourceVm, VmError, migrate, receive,
};
use vhost_migrate::stream::{self, CancelToken, StreamOptions};
use vhost_migrate::unstable::with_causes;

const MIB: u64 = 1 << 20;
const KILLS: u64 = 20;

/// A back-end process, which ends with the test.
struct Backend {
    folder: TempDir,
    child: Child,
}

impl Backend {
    fn start() -> Backend {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("disk.img")).unwrap().set_len(16 * MIB).unwrap();
        let child = spawn(folder.path(), "s");
        Backend { folder, child }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// Kills the back-end and starts another one.
    fn crash(&mut self) {
        self.end();
        self.child = spawn(self.folder.path(), "s");
    }

    fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn device(&self) -> UserDevice {
        self.device_with(ProtocolFeatures::empty())
    }

    /// Connects a front-end with additional protocol features.
    fn device_with(&self, more: ProtocolFeatures) -> UserDevice {
        let usual = UserOptions::default();
        let options = usual.with_protocol_features(usual.protocol_features | more);
        UserDevice::connect(self.socket(), options, Instant::now() + PATIENCE).unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn spawn(folder: &Path, socket: &str) -> Child {
    spawn_with(folder, socket, 2)
}

fn spawn_with(folder: &Path, socket: &str, queues: u16) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
    command.args(["--exit-with-parent", "backend", "blk", "--queues", &queues.to_string(), "--socket"]);
    command.arg(folder.join(socket));
    let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
    command.arg("--image").arg(folder.join("disk.img")).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn config() -> GuestConfig {
    GuestConfig::new(32 * MIB)
        .with_working_set(2 * MIB)
        .with_cold(2 * MIB)
        .with_dirty_rate(32 * MIB)
        .with_disk_area(4 * MIB)
}

fn running(backend: &Backend, config: GuestConfig) -> Guest {
    running_on(Box::new(backend.device()), config)
}

/// Boots and starts a guest on the back-end at a socket of `folder`.
fn running_at(folder: &Path, socket: &str, config: GuestConfig) -> Guest {
    running_on(connect_device(folder, socket), config)
}

fn running_on(device: Box<dyn Device>, config: GuestConfig) -> Guest {
    let mut guest = Guest::new(config).unwrap();
    guest.boot(vec![device]).unwrap();
    guest.resume().unwrap();
    guest
}

#[test]
fn a_guest_does_not_overwrite_foreign_disk_contents() {
    let backend = Backend::start();
    let booted = || {
        let mut guest = Guest::new(config()).unwrap();
        guest.boot(vec![Box::new(backend.device())]).unwrap();
        guest
    };
    let works = |mut guest: Guest| {
        guest.resume().unwrap();
        run_for(&guest, 200);
        guest.verify().unwrap();
    };
    let mut guest = booted();
    guest.probe_disks(false).unwrap();
    assert!(guest.config().blank_disks);
    works(guest);
    // The guest may overwrite its own data.
    let mut guest = booted();
    guest.probe_disks(false).unwrap();
    assert!(!guest.config().blank_disks);
    works(guest);
    let image = File::options().read(true).write(true).open(backend.folder.path().join("disk.img")).unwrap();
    image.write_all_at(b"somebody's", 9 * 512 + 100).unwrap();
    let before = std::fs::read(backend.folder.path().join("disk.img")).unwrap();
    let mut guest = booted();
    let refused = guest.probe_disks(false).unwrap_err();
    assert!(matches!(refused, GuestError::ForeignContents { sector: 9, .. }), "{refused}");
    drop(guest);
    assert!(std::fs::read(backend.folder.path().join("disk.img")).unwrap() == before);
    let mut guest = booted();
    guest.probe_disks(true).unwrap();
    works(guest);
}

#[rstest]
fn a_guest_survives_repeated_kills_of_its_back_end(
    #[values(false, true)] packed: bool,
    #[values(ProtocolFeatures::empty(), ProtocolFeatures::INBAND_NOTIFICATIONS)] protocol_features: ProtocolFeatures,
) {
    let mut backend = Backend::start();
    let device = backend.device_with(protocol_features);
    assert_eq!(device.protocol_features() & protocol_features, protocol_features);
    let mut guest = running_on(Box::new(device), config().with_packed(packed));
    for kill in 1..=KILLS {
        // At varying times within requests: after a different number of requests each time.
        run_for(&guest, 50 + 7 * kill);
        backend.crash();
        wait_for(&guest, "the back-end is connected again", |guest| guest.stats().reconnects >= kill);
    }
    run_for(&guest, 200);
    let verified = guest.verify().unwrap();
    assert_eq!(verified.disk, 8 * MIB);
    let stats = guest.stats();
    assert_eq!((stats.lost, stats.duplicates, stats.reconnects), (0, 0, KILLS));
    assert!(stats.resubmitted > 0, "no kill ever met a request: this has tested nothing");
}

#[test]
fn a_back_end_missing_beyond_the_reconnect_timeout_stops_the_guest() {
    let mut backend = Backend::start();
    let mut guest = running(&backend, config().with_reconnect_timeout(Some(1)));
    run_for(&guest, 100);
    backend.end();
    wait_until("the guest fails", || guest.failure().is_some());
    let error = guest.pause().unwrap_err();
    assert!(with_causes(&error).to_string().contains("cannot connect"), "{error}");
    backend.child = spawn(backend.folder.path(), "s");
}

#[test]
fn a_guest_waits_without_limit_for_its_back_end_and_logs_it() {
    let mut backend = Backend::start();
    // A request waits longer than its timeout, but its back-end is disconnected.
    let mut guest = running(&backend, config().with_request_timeout(1));
    run_for(&guest, 100);
    assert_eq!(guest.connections()[0].away_ms, None);
    backend.end();
    wait_for(&guest, "it has been away for a while", |guest| guest.connections()[0].away_ms > Some(5000));
    backend.child = spawn(backend.folder.path(), "s");
    wait_for(&guest, "the back-end is connected again", |guest| guest.stats().reconnects == 1);
    assert_eq!(guest.connections()[0].away_ms, None);
    assert_works(&mut guest);
    assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
}

#[test]
fn a_guest_waits_for_the_right_back_end_while_others_answer() {
    let mut backend = Backend::start();
    let mut guest = running(&backend, config());
    run_for(&guest, 100);
    backend.end();
    // A process with another protocol.
    std::fs::remove_file(backend.socket()).unwrap();
    let other = UnixListener::bind(backend.socket()).unwrap();
    // The peers do not disconnect, because a disconnection would be another reason to wait.
    let answering = |_| {
        let (mut peer, _) = other.accept().unwrap();
        peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        peer
    };
    let peers = [(); 3].map(answering);
    let refused = |guest: &Guest, why: &str| guest.connections()[0].refused.as_ref().is_some_and(|it| it.contains(why));
    wait_for(&guest, "it says what is wrong", |guest| refused(guest, "GET_FEATURES"));
    drop((other, peers));
    std::fs::remove_file(backend.socket()).unwrap();
    // A back-end with other options.
    backend.child = spawn_with(backend.folder.path(), "s", 1);
    wait_for(&guest, "it says what is missing", |guest| {
        refused(guest, "restart the back-end with its previous options")
    });
    assert!(guest.connections()[0].away_ms.is_some() && guest.failure().is_none());
    backend.crash();
    wait_for(&guest, "the back-end is connected again", |guest| guest.stats().reconnects == 1);
    assert_eq!((guest.connections()[0].away_ms, guest.connections()[0].refused.clone()), (None, None));
    assert_works(&mut guest);
    assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
}

#[test]
fn a_disk_in_use_can_grow_but_not_shrink() {
    let backend = Backend::start();
    let mut guest = running(&backend, config());
    run_for(&guest, 100);
    let image = File::options().write(true).open(backend.folder.path().join("disk.img")).unwrap();
    let look_again = || kill(Pid::from_raw(backend.child.id() as i32), Signal::SIGHUP).unwrap();
    for mib in [17, 64, 1000] {
        image.set_len(mib * MIB).unwrap();
        look_again();
        wait_for(&guest, "the disk grows", |guest| guest.connections()[0].capacity == mib * MIB);
    }
    run_for(&guest, 100);
    image.set_len(500 * MIB).unwrap();
    look_again();
    wait_for(&guest, "a smaller image is refused", |_| backend.log().contains("make it as large again"));
    assert_eq!(guest.connections()[0].capacity, 1000 * MIB);
    guest.verify().unwrap();
}

fn signal(backend: &Backend, signal: Signal) {
    kill(Pid::from_raw(backend.child.id() as i32), signal).unwrap();
}

#[rstest]
#[case::first_disk_replies_late(0, false, false)]
#[case::last_disk_replies_late(1, false, false)]
#[case::cancelled_before_the_stop(0, false, true)]
#[case::first_back_end_dies(0, true, false)]
fn a_switchover_cancelled_while_a_disk_hangs_resumes_cpus_and_other_disks_at_once(
    #[case] hung: usize,
    #[case] dies: bool,
    #[case] early: bool,
) {
    let mut backends = [Backend::start(), Backend::start()];
    let mut guest = Guest::new(config().with_disks(2).with_request_timeout(5)).unwrap();
    guest.boot(backends.iter().map(|backend| Box::new(backend.device()) as Box<dyn Device>).collect()).unwrap();
    guest.resume().unwrap();
    run_for(&guest, 100);
    signal(&backends[hung], Signal::SIGSTOP);
    let (guest, cancel) = (Mutex::new(Some(guest)), CancelToken::new().unwrap());
    let mut machine = GuestSourceVm::new(&guest).unwrap();
    machine.set_cancel(&cancel);
    std::thread::scope(|scope| {
        let paused = scope.spawn(|| machine.pause());
        if !early {
            std::thread::sleep(Duration::from_millis(300));
            assert!(!paused.is_finished());
        }
        assert!(cancel.cancel());
        let error = paused.join().unwrap().unwrap_err();
        assert!(error.downcast_ref::<GuestError>().is_some(), "{error}");
    });
    machine.resume().unwrap();
    drop(machine);
    let mut guest = guest.into_inner().unwrap().unwrap();
    assert!(guest.is_running());
    let before = guest.stats().pages;
    wait_for(&guest, "CPUs go on", |guest| guest.stats().pages > before);
    // Only the other disk replies, for longer than the request timeout.
    let away = guest.connections()[hung].clone();
    assert!(away.away_ms.is_some() && away.refused.is_some(), "{away:?}");
    wait_for(&guest, "the other disk is there", |guest| guest.connections()[1 - hung].away_ms.is_none());
    run_for(&guest, 200);
    wait_for(&guest, "it has been silent for a while", |guest| guest.connections()[hung].away_ms > Some(6000));
    if dies {
        backends[hung].crash();
    } else {
        signal(&backends[hung], Signal::SIGCONT);
    }
    wait_for(&guest, "the disk is back", |guest| guest.connections()[hung].away_ms.is_none());
    assert_eq!(guest.stats().reconnects, u64::from(dies));
    run_for(&guest, 200);
    guest.verify().unwrap();
    assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
}

/// Copies pages like a migration.
fn send(from: &Memory, to: &Memory, pages: &PageSet) {
    let mut bytes = [0; LOG_PAGE as usize];
    // The log ends like QEMU's, possibly after the guest's last page.
    let addresses = pages.iter().map(PageNumber::address);
    for gpa in addresses.filter(|gpa| from.slice(*gpa, LOG_PAGE).is_ok()) {
        from.read(gpa, &mut bytes).unwrap();
        to.write(gpa, &bytes).unwrap();
    }
}

fn regions(guest: &Guest) -> Vec<(GuestAddress, u64)> {
    guest.memory().regions().iter().map(|region| (region.gpa(), region.size())).collect()
}

/// Moves a running guest by its dirty pages alone, with its back-end killed meanwhile. With `trust_log` the pages
/// marked by the device are copied.
fn copy_and_restore(mut guest: Guest, backend: &mut Backend, trust_log: bool) -> Result<Guest, GuestError> {
    let memory = guest.memory().clone();
    let pages = memory.end().0 / LOG_PAGE;
    let (log, fd) = Log::create(memory.end()).unwrap();
    let log = Arc::new(log);
    let mut cpu = Pagemap::new("cpu", memory.clone());
    cpu.start().unwrap();
    guest.with_devices(|device| device.start_logging(&log, fd.as_fd())).unwrap();
    let copy = make_memory(regions(&guest), false).unwrap();
    let mut all = PageSet::new(pages);
    for (gpa, size) in regions(&guest) {
        all.insert_range(PageRange::inside(gpa, size));
    }
    send(&memory, &copy, &all);
    let harvest = |cpu: &mut Pagemap| {
        let mut dirty = PageSet::new(pages);
        cpu.harvest(&mut dirty).unwrap();
        let mut marked = PageSet::new(pages);
        log.harvest(&mut marked);
        if trust_log {
            dirty.union(&marked);
        }
        dirty
    };
    let before = guest.stats().reconnects;
    for round in 0..4 {
        run_for(&guest, 100);
        if round == 1 {
            backend.crash();
            wait_for(&guest, "the back-end is connected again", |guest| guest.stats().reconnects > before);
        }
        send(&memory, &copy, &harvest(&mut cpu));
    }
    guest.pause()?;
    guest.stop_devices()?;
    send(&memory, &copy, &harvest(&mut cpu));
    let state = guest.save_state()?;
    assert!(state.devices[0].inflight.is_some());
    assert_eq!(log.out_of_range(), 0);
    drop(guest);
    let mut next = Guest::restore(copy, state)?;
    next.attach(vec![Box::new(backend.device())])?;
    next.start_devices()?;
    next.resume()?;
    Ok(next)
}

#[rstest]
fn a_guest_copied_by_dirty_pages_survives_crashes_of_its_back_end(#[values(false, true)] packed: bool) {
    let mut backend = Backend::start();
    let mut guest = running(&backend, config().with_packed(packed));
    for _ in 0..4 {
        guest = copy_and_restore(guest, &mut backend, true).unwrap();
        run_for(&guest, 100);
        backend.crash();
        wait_for(&guest, "the back-end is connected again", |guest| guest.stats().reconnects > 0);
        assert_works(&mut guest);
    }
    let stats = guest.stats();
    assert_eq!((stats.lost, stats.duplicates), (0, 0));
}

#[rstest]
fn a_guest_detects_device_writes_that_were_not_copied(#[values(false, true)] packed: bool) {
    let mut backend = Backend::start();
    let guest = running(&backend, config().with_packed(packed).with_request_timeout(2));
    let found = copy_and_restore(guest, &mut backend, false).and_then(|mut guest| guest.verify());
    assert!(found.is_err(), "without the device's log this test must fail, or it tests nothing");
}

#[rstest]
fn devices_can_be_controlled_while_their_back_end_crashes(#[values(false, true)] packed: bool) {
    let mut backend = Backend::start();
    let mut guest = running(&backend, config().with_packed(packed));
    let mut log = guest.logs().next().unwrap();
    std::thread::scope(|scope| {
        let toggle = scope.spawn(|| -> Result<(), DirtyError> {
            for _ in 0..40 {
                log.start()?;
                log.stop()?;
            }
            Ok(())
        });
        let mut kills = 0;
        while !toggle.is_finished() {
            // Increasing delays, so that a busy machine has time for the calls in between.
            run_for(&guest, 20 + 5 * kills);
            backend.crash();
            kills += 1;
            wait_for(&guest, "the back-end is connected again", |guest| guest.stats().reconnects >= kills);
        }
        toggle.join().unwrap().unwrap();
    });
    guest.verify().unwrap();
}

/// A disk with internal state, which it may refuse to load.
struct StatefulDevice {
    disk: BlkDevice,
    state: Mutex<Vec<u8>>,
    refuses: AtomicBool,
    /// True if the device cannot serve its rings.
    idles: AtomicBool,
}

impl backend::VirtioDevice for StatefulDevice {
    forward!(disk: features -> VirtioFeatures, queues -> u16, max_queue_size -> u16, config -> Vec<u8>);

    fn state_kind(&self) -> Option<&'static str> {
        Some("stateful disk")
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        Ok(self.state.lock().unwrap().clone())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(BackendError::DeviceState { why: "not here".into() });
        }
        *self.state.lock().unwrap() = state.to_vec();
        Ok(())
    }

    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> std::io::Result<Box<dyn backend::Queue>> {
        if self.idles.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("not now"));
        }
        self.disk.start_queue(index, size, features)
    }
}

/// Serves a stateful device in this process.
fn stateful(folder: &Path, socket: &str, state: &[u8]) -> Arc<StatefulDevice> {
    let options = BlkOptions::new(folder.join("disk.img")).with_queues(2).with_aio(Aio::Threads);
    let device = StatefulDevice {
        disk: BlkDevice::open(options).unwrap(),
        state: Mutex::new(state.to_vec()),
        refuses: AtomicBool::new(false),
        idles: AtomicBool::new(false),
    };
    let device = Arc::new(device);
    serve(folder, socket, device.clone());
    device
}

/// Serves a device in this process until it ends.
fn serve(folder: &Path, socket: &str, device: Arc<dyn backend::VirtioDevice>) {
    let listener = BackendListener::bind(folder.join(socket)).unwrap();
    std::thread::spawn(move || {
        let never = nix::sys::eventfd::EventFd::new().unwrap();
        backend::serve(&listener, &device, never.as_fd()).unwrap();
    });
}

fn connect_device(folder: &Path, socket: &str) -> Box<dyn Device> {
    let device = UserDevice::connect(folder.join(socket), UserOptions::default(), Instant::now() + PATIENCE);
    Box::new(device.unwrap())
}

/// Migrates a guest to the back-end at `to`, with both ends in this process.
fn move_to(
    folder: &Path,
    guest: &Mutex<Option<Guest>>,
    to: &str,
) -> (Result<MigrationReport, MigrationFailure>, Result<IncomingReport, MigrateError>, GuestIncomingVm) {
    let mut arrival = GuestIncomingVm::new(vec![folder.join(to)]).unwrap();
    let (left, arrived) = move_into(folder, guest, &mut arrival, &migration_parameters(), &Outcomes::default());
    (left, arrived, arrival)
}

/// Returns options with the time limits of a test.
fn migration_parameters() -> StreamOptions {
    StreamOptions::new().unwrap().with_deadline(Some(PATIENCE)).with_timeout(Some(PATIENCE))
}

/// Migrates a guest to the given [`IncomingVm`] and connection options.
fn move_into(
    folder: &Path,
    guest: &Mutex<Option<Guest>>,
    arrival: &mut (dyn IncomingVm + Send),
    theirs: &StreamOptions,
    outcomes: &Outcomes,
) -> (Result<MigrationReport, MigrationFailure>, Result<IncomingReport, MigrateError>) {
    let options = migration_parameters();
    let socket = format!("unix:{}", folder.join("migration").display());
    let listener = vhost_migrate::stream::StreamListener::bind(&socket.parse().unwrap()).unwrap();
    std::thread::scope(|scope| {
        let arrived = scope.spawn(|| {
            let connection = listener.accept(theirs).unwrap();
            receive(arrival, connection, outcomes, SWITCHOVER_TIMEOUT)
        });
        let connection = stream::connect(listener.uri(), &options).unwrap();
        let policy = ConvergencePolicy::new(PATIENCE, 100);
        let parameters = MigrationParameters::default().with_policy(policy);
        let mut machine = GuestSourceVm::new(guest).unwrap();
        let left = migrate(&mut machine, connection, &parameters, &mut |_| {});
        (left, arrived.join().unwrap())
    })
}

#[test]
fn device_state_moves_with_the_guest_and_a_refused_state_keeps_it_at_the_source() {
    let folder = tempfile::tempdir().unwrap();
    File::create(folder.path().join("disk.img")).unwrap().set_len(16 * MIB).unwrap();
    let _source = stateful(folder.path(), "a", b"set by the driver");
    let destination = stateful(folder.path(), "b", b"");
    let guest = Mutex::new(Some(running_at(folder.path(), "a", config())));
    for refuses in [true, false] {
        destination.refuses.store(refuses, Ordering::Relaxed);
        let (left, arrived, arrival) = move_to(folder.path(), &guest, "b");
        if refuses {
            let failure = left.unwrap_err();
            assert_eq!(failure.location, GuestLocation::RunningHere, "{failure}");
            assert!(with_causes(&failure).to_string().contains("CHECK_DEVICE_STATE"), "{failure}");
            assert!(arrived.is_err() && arrival.into_guest().is_none());
            run_for(guest.lock().unwrap().as_ref().unwrap(), 100);
            assert_eq!(*destination.state.lock().unwrap(), b"");
        } else {
            left.unwrap();
            arrived.unwrap();
            assert_eq!(*destination.state.lock().unwrap(), b"set by the driver");
            let mut guest = arrival.into_guest().unwrap();
            assert_works(&mut guest);
        }
    }
}

/// Rules D2.1 and D2.3.
#[test]
fn a_destination_back_end_refuses_rings_before_the_commit() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for image in ["disk.img", "other.img"] {
        File::create(folder.join(image)).unwrap().set_len(16 * MIB).unwrap();
    }
    let disk = |image: &str, max_queue_size| {
        let image = folder.join(image);
        let options = BlkOptions::new(image).with_queues(2).with_max_queue_size(max_queue_size).with_aio(Aio::Threads);
        Arc::new(BlkDevice::open(options).unwrap())
    };
    let size = 256;
    serve(folder, "a", disk("disk.img", size));
    serve(folder, "small", disk("disk.img", size / 2));
    // As its configuration says: with fewer than 128 entries not all segments fit.
    serve(folder, "smaller", disk("disk.img", size / 4));
    serve(folder, "locked", disk("other.img", size));
    serve(folder, "b", disk("disk.img", size));
    let lock = File::open(folder.join("other.img")).unwrap();
    lock.lock().unwrap();
    let guest = Mutex::new(Some(running_at(folder, "a", config().with_queue_size(size))));
    let segments = "largest number of segments differs: 62 here, 126 at the source";
    for (to, why) in [("small", "SET_VRING_NUM"), ("smaller", segments), ("locked", "SET_VRING_ENABLE")] {
        let (left, arrived, arrival) = move_to(folder, &guest, to);
        let failure = left.unwrap_err();
        assert!(with_causes(&failure).to_string().contains(why), "{to}: {failure}");
        assert_eq!(failure.location, GuestLocation::RunningHere, "{to}: {failure}");
        assert!(arrived.is_err() && arrival.into_guest().is_none());
        run_for(guest.lock().unwrap().as_ref().unwrap(), 100);
    }
    // The attempt was undone: the source's image is unlocked, and its successor locks it.
    let (left, arrived, arrival) = move_to(folder, &guest, "b");
    left.unwrap();
    arrived.unwrap();
    let mut guest = arrival.into_guest().unwrap();
    assert_works(&mut guest);
}

/// An incoming guest whose back-end is stopped before a step.
struct StallingIncomingVm<'a> {
    arrival: GuestIncomingVm,
    backend: &'a Backend,
    before: Step,
    /// Signalled when the back-end is stopped.
    stopped: Sender<()>,
    starts: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Prepare,
    Restore,
    Start,
}

impl StallingIncomingVm<'_> {
    fn step(&mut self, step: Step) {
        if step == self.before {
            signal(self.backend, Signal::SIGSTOP);
            self.stopped.send(()).unwrap();
        }
    }
}

impl IncomingVm for StallingIncomingVm<'_> {
    fn set_cancel(&mut self, cancel: &CancelToken) {
        self.arrival.set_cancel(cancel);
    }

    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        self.arrival.prepare(regions)
    }

    fn prepare_devices(&mut self, devices: &[u8]) -> Result<(), VmError> {
        self.step(Step::Prepare);
        self.arrival.prepare_devices(devices)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.step(Step::Restore);
        self.arrival.restore(state)
    }

    fn start(&mut self, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError> {
        self.starts += 1;
        self.step(Step::Start);
        self.arrival.start(run, cancel)
    }
}

/// Migrates a guest to a back-end that is stopped before `step`, and calls `cancel` then.
fn stalling_vm<'a>(
    source: &Backend,
    backend: &'a Backend,
    guest: &Mutex<Option<Guest>>,
    before: Step,
    cancel: impl FnOnce(&CancelToken, &Outcomes) -> bool + Send,
) -> (Result<MigrationReport, MigrationFailure>, Result<IncomingReport, MigrateError>, StallingIncomingVm<'a>) {
    let (theirs, outcomes, (stopped, is_stopped)) = (migration_parameters(), Outcomes::default(), channel());
    let arrival = GuestIncomingVm::new(vec![backend.socket()]).unwrap();
    // It has another disk.
    let arrival = arrival.with_disk_checks(false, true);
    let mut arrival = StallingIncomingVm { arrival, backend, before, stopped, starts: 0 };
    let (left, arrived) = std::thread::scope(|scope| {
        let (switch, known) = (&theirs.cancel, &outcomes);
        scope.spawn(move || {
            is_stopped.recv_timeout(PATIENCE).unwrap();
            assert!(cancel(switch, known), "it is not too late");
        });
        move_into(source.folder.path(), guest, &mut arrival, &theirs, &outcomes)
    });
    (left, arrived, arrival)
}

#[rstest]
fn cancel_ends_a_destination_whose_back_end_hangs(#[values(Step::Prepare, Step::Restore)] step: Step) {
    let backends = [Backend::start(), Backend::start()];
    let guest = Mutex::new(Some(running(&backends[0], config())));
    let (left, arrived, _) = stalling_vm(&backends[0], &backends[1], &guest, step, |cancel, _| cancel.cancel());
    // The cause is not the back-end's timeout.
    let error = with_causes(&arrived.unwrap_err()).to_string();
    assert!(error.contains("was interrupted"), "{error}");
    assert_eq!(left.unwrap_err().location, GuestLocation::RunningHere);
    signal(&backends[1], Signal::SIGCONT);
    run_for(guest.lock().unwrap().as_ref().unwrap(), 100);
}

#[test]
fn cancel_of_a_hanging_start_keeps_the_arrived_guest_and_resume_starts_it() {
    let mut backends = [Backend::start(), Backend::start()];
    let guest = Mutex::new(Some(running(&backends[0], config())));
    let image = |backend: &Backend| backend.folder.path().join("disk.img");
    // Both sides use one disk.
    backends[1].end();
    std::fs::remove_file(image(&backends[1])).unwrap();
    std::fs::hard_link(image(&backends[0]), image(&backends[1])).unwrap();
    backends[1].child = spawn(backends[1].folder.path(), "s");
    let stop = |_: &CancelToken, outcomes: &Outcomes| outcomes.cancel_start();
    let (left, arrived, stalling_vm) = stalling_vm(&backends[0], &backends[1], &guest, Step::Start, stop);
    let error = arrived.unwrap_err();
    assert!(
        matches!(error, MigrateError::NotStarted(_)) && with_causes(&error).to_string().contains("was interrupted"),
        "{error}"
    );
    assert_eq!(stalling_vm.starts, 1, "it was not tried again");
    assert_eq!(left.unwrap_err().location, GuestLocation::OutcomeUnknown);
    *guest.lock().unwrap() = None;
    let mut guest = stalling_vm.arrival.into_guest().unwrap();
    signal(&backends[1], Signal::SIGCONT);
    guest.start().unwrap();
    assert_works(&mut guest);
}

#[test]
fn the_destination_prepares_and_compares_its_disk_while_the_guest_runs() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (image, mib) in [("disk.img", 16), ("other.img", 32)] {
        File::create(folder.join(image)).unwrap().set_len(mib * MIB).unwrap();
    }
    let disk = |image: &str| {
        let options = BlkOptions::new(folder.join(image)).with_queues(2).with_aio(Aio::Threads);
        Arc::new(BlkDevice::open(options).unwrap())
    };
    serve(folder, "a", disk("disk.img"));
    serve(folder, "b", disk("disk.img"));
    serve(folder, "other", disk("other.img"));
    let guest = running_at(folder, "a", config());
    let regions: Vec<_> =
        guest.memory().regions().iter().map(|r| RegionLayout { gpa: r.gpa(), size: r.size() }).collect();
    let guest = Mutex::new(Some(guest));
    let devices = GuestSourceVm::new(&guest).unwrap().devices().unwrap().unwrap();
    for (to, refused) in [("other", Some("disk size in bytes differs")), ("b", None)] {
        let mut arrival = GuestIncomingVm::new(vec![folder.join(to)]).unwrap();
        arrival.prepare(&regions).unwrap();
        let prepared = arrival.prepare_devices(&devices).map_err(|error| with_causes(error.as_ref()).to_string());
        match refused {
            Some(why) => assert!(prepared.unwrap_err().contains(why), "{why}"),
            None => prepared.unwrap(),
        }
    }
    run_for(guest.lock().unwrap().as_ref().unwrap(), 100);
}

#[test]
fn refused_rings_are_retried_until_they_run() {
    let folder = tempfile::tempdir().unwrap();
    File::create(folder.path().join("disk.img")).unwrap().set_len(16 * MIB).unwrap();
    let device = stateful(folder.path(), "a", b"");
    let mut guest = running_at(folder.path(), "a", config());
    run_for(&guest, 100);

    // Like the end of a failed migration, which waits for no device.
    guest.pause().unwrap();
    guest.stop_devices().unwrap();
    device.idles.store(true, Ordering::Relaxed);
    guest.resume_without_waiting().unwrap();
    wait_for(&guest, "it says why its disk stands still", |guest| guest.connections()[0].refused.is_some());
    assert!(guest.is_running() && guest.failure().is_none());
    device.idles.store(false, Ordering::Relaxed);
    assert_works(&mut guest);

    // Like an operator's command, which is answered when everything runs.
    guest.pause().unwrap();
    guest.stop_devices().unwrap();
    device.idles.store(true, Ordering::Relaxed);
    guest.start().unwrap_err();
    assert!(!guest.is_running() && guest.failure().is_none());
    device.idles.store(false, Ordering::Relaxed);
    guest.start().unwrap();
    assert_works(&mut guest);
}

/// Runs itself again in a separate process without available file descriptors.
#[test]
fn a_guest_whose_threads_cannot_start_stays_paused_and_intact() {
    const ALONE: &str = "VHOST_MIGRATE_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "a_guest_whose_threads_cannot_start_stays_paused_and_intact";
        let mut again = Command::new(std::env::current_exe().unwrap());
        let output = again.args(["--exact", name]).env(ALONE, "1").output().unwrap();
        let words = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && words.contains("1 passed"), "{words}");
        return;
    }
    let backend = Backend::start();
    let mut guest = running(&backend, config());
    guest.pause().unwrap();
    let limit = |files: Option<libc::rlimit>| {
        let (new, mut before) = (files, libc::rlimit { rlim_cur: 0, rlim_max: 0 });
        let new = new.as_ref().map_or(std::ptr::null(), |files| files as *const _);
        // SAFETY: the pointers are null or to structures of this function.
        assert_eq!(unsafe { libc::prlimit(0, libc::RLIMIT_NOFILE, new, &mut before) }, 0);
        before
    };
    let before = limit(None);
    limit(Some(libc::rlimit { rlim_cur: 0, ..before }));
    let refused = guest.resume();
    limit(Some(before));
    assert!(with_causes(&refused.unwrap_err()).to_string().contains("make an eventfd"));
    guest.resume().unwrap();
    assert_works(&mut guest);
}
