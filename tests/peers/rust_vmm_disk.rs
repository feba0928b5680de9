//! A disk of rust-vmm's crates (`examples/rust_vmm_disk.rs`) with our front-end and the built-in guest: supported
//! features, and refusals of the others.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use vhost_migrate::abi::vhost_user::{FrontendRequest, ProtocolFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig, GuestError, GuestIncomingVm, GuestSourceVm};
use vhost_migrate::memory::Address;
use vhost_migrate::migrate::{ConvergencePolicy, MigrationParameters, Outcomes, SWITCHOVER_TIMEOUT, migrate, receive};
use vhost_migrate::stream::{self, StreamListener, StreamOptions};
use vhost_migrate::unstable::with_causes;

use crate::backend::{Backend, Kind};
use crate::disk_driver::{DATA, HIGH, harvest};
use crate::process::{DEADLINE, Lab, wait_for};
use crate::qsd::Rig;

const MIB: u64 = 1 << 20;

fn disk(lab: &Lab) -> PathBuf {
    let image = lab.disk();
    File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    image
}

fn device(backend: &Backend, options: UserOptions) -> Box<dyn Device> {
    Box::new(UserDevice::connect(backend.socket(), options, Instant::now() + DEADLINE).unwrap())
}

fn config() -> GuestConfig {
    GuestConfig::new(32 * MIB).with_working_set(2 * MIB).with_dirty_rate(32 * MIB).with_disk_area(4 * MIB)
}

fn running(backend: &Backend, options: UserOptions) -> Guest {
    let mut guest = Guest::new(config()).unwrap();
    guest.boot(vec![device(backend, options)]).unwrap();
    guest.resume().unwrap();
    guest
}

/// Waits for `requests` further completions.
fn works(guest: &Guest, requests: u64) {
    let goal = guest.stats().completions + requests;
    wait_for("the guest works", || {
        assert!(guest.failure().is_none(), "{}", guest.failure().unwrap());
        (guest.stats().completions >= goal).then_some(())
    });
}

/// Rule F4.5.
#[test]
fn a_guest_on_a_rust_vmm_disk_stops_resumes_and_verifies() {
    let usual = UserOptions::default();
    let without_acks = usual.with_protocol_features(usual.protocol_features & !ProtocolFeatures::REPLY_ACK);
    for options in [usual, without_acks] {
        let lab = Lab::new();
        let backend = Backend::start(&lab, Kind::RustVmm, "rust-vmm", &disk(&lab), 2);
        let mut guest = running(&backend, options);
        for _ in 0..5 {
            works(&guest, 200);
            guest.pause().unwrap();
            guest.stop_devices().unwrap();
            guest.start_devices().unwrap();
            guest.resume().unwrap();
        }
        works(&guest, 200);
        assert_eq!(guest.verify().unwrap().disk, 8 * MIB);
        assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
    }
}

#[test]
fn a_guest_migrates_between_two_rust_vmm_disks() {
    let lab = Lab::new();
    let image = disk(&lab);
    let backends = ["a", "b"].map(|name| Backend::start(&lab, Kind::RustVmm, name, &image, 2));
    let mut guest = running(&backends[0], UserOptions::default());
    for trip in 1..=4 {
        works(&guest, 200);
        let options = || StreamOptions::new().unwrap().with_deadline(Some(DEADLINE)).with_timeout(Some(DEADLINE));
        let (ours, theirs) = (options(), options());
        let socket = format!("unix:{}", lab.file(&format!("migration{trip}")).display());
        let listener = StreamListener::bind(&socket.parse().unwrap()).unwrap();
        let mut arrival = GuestIncomingVm::new(vec![backends[trip % 2].socket().into()]).unwrap();
        let leaving = Mutex::new(Some(guest));
        std::thread::scope(|scope| {
            let arrived = scope.spawn(|| {
                let connection = listener.accept(&theirs).unwrap();
                receive(&mut arrival, connection, &Outcomes::default(), SWITCHOVER_TIMEOUT)
            });
            let connection = stream::connect(listener.uri(), &ours).unwrap();
            let plan = MigrationParameters::default().with_policy(ConvergencePolicy::new(DEADLINE, 100));
            let mut machine = GuestSourceVm::new(&leaving).unwrap();
            migrate(&mut machine, connection, &plan, &mut |_| {}).unwrap();
            arrived.join().unwrap().unwrap();
        });
        guest = arrival.into_guest().unwrap();
        works(&guest, 200);
        guest.verify().unwrap();
    }
    assert_eq!((guest.stats().lost, guest.stats().duplicates), (0, 0));
}

#[test]
fn a_rust_vmm_disk_killed_with_open_requests_fails_the_guest() {
    let lab = Lab::new();
    let mut backend = Backend::start(&lab, Kind::RustVmm, "rust-vmm", &disk(&lab), 2);
    let guest = running(&backend, UserOptions::default());
    // A kill without a request in flight is survived; at some kill one is in flight.
    let failure = wait_for("a kill meets a request", || {
        works_or_fails(&guest);
        backend.kill();
        backend.restart();
        guest.failure()
    });
    let text = with_causes(&*failure).to_string();
    assert!(text.contains("requests outstanding and no inflight region: their fate is unknown"), "{text}");
    assert!(text.contains("use a back-end with INFLIGHT_SHMFD"), "{text}");
}

fn works_or_fails(guest: &Guest) {
    let goal = guest.stats().completions + 20;
    wait_for("the guest works or says why not", || {
        (guest.stats().completions >= goal || guest.failure().is_some()).then_some(())
    });
}

#[test]
fn a_rust_vmm_disk_killed_without_open_requests_is_reconnected() {
    let lab = Lab::new();
    let mut backend = Backend::start(&lab, Kind::RustVmm, "rust-vmm", &disk(&lab), 2);
    let mut guest = running(&backend, UserOptions::default());
    for deaths in 1..=3 {
        works(&guest, 100);
        guest.pause().unwrap();
        // Drains and stops the rings.
        guest.stop_devices().unwrap();
        backend.kill();
        backend.restart();
        guest.start_devices().unwrap();
        guest.resume().unwrap();
        works(&guest, 100);
        assert_eq!(guest.stats().reconnects, deaths);
    }
    guest.verify().unwrap();
}

#[test]
fn a_rust_vmm_disk_marks_exactly_and_continues_after_logging_stops() {
    let mut rig = Rig::on(Kind::RustVmm, UserOptions::default());
    rig.driver.write(0, 0x11);
    let ((first, first_fd), (second, second_fd)) = (rig.driver.new_log(), rig.driver.new_log());
    rig.device.start_logging(&first, first_fd.as_fd()).unwrap();
    for gpa in [DATA.unchecked_add(0x4800), HIGH.unchecked_add(0x20000)] {
        let written = rig.driver.read(0, gpa, 0x11);
        assert_eq!(harvest(&first), written);
    }
    rig.device.start_logging(&second, second_fd.as_fd()).unwrap();
    // The mark of an event word may follow a completion.
    harvest(&first);
    let written = rig.driver.read(0, DATA.unchecked_add(0x8000), 0x11);
    assert_eq!((harvest(&first), harvest(&second)), (Vec::new(), written));
    // LOG_ALL and F_LOG are ignored (rule L7.3). This log is no longer read.
    rig.device.stop_logging().unwrap();
    let written = rig.driver.read(0, DATA.unchecked_add(0xc000), 0x11);
    assert_eq!(harvest(&second), written);
}

#[test]
fn a_request_that_a_rust_vmm_disk_hangs_up_at_is_not_repeated_by_reconnect() {
    let mut rig = Rig::on(Kind::RustVmm, UserOptions::default());
    rig.driver.write(0, 0x22);
    let signal = nix::sys::eventfd::EventFd::new().unwrap();
    let (short, short_fd) = Log::create(DATA).unwrap();
    let short = std::sync::Arc::new(short);
    for request in [FrontendRequest::SET_LOG_FD, FrontendRequest::SET_LOG_BASE] {
        let error = match request {
            FrontendRequest::SET_LOG_FD => rig.device.set_log_fd(Some(signal.as_fd())).unwrap_err(),
            // A log that is too small for guest memory.
            _ => rig.device.start_logging(&short, short_fd.as_fd()).unwrap_err(),
        };
        assert!(error.is_hang_up(), "{error}");
        rig.device.reconnect(Instant::now() + DEADLINE).unwrap();
        rig.driver.read(0, DATA, 0x22);
    }
}

#[test]
fn missing_features_of_a_rust_vmm_disk_are_reported_at_boot() {
    let lab = Lab::new();
    let backend = Backend::start(&lab, Kind::RustVmm, "rust-vmm", &disk(&lab), 2);
    let refused = |config| {
        let device = device(&backend, UserOptions::default().with_inflight_migration());
        let refused: GuestError = Guest::new(config).unwrap().boot(vec![device]).unwrap_err();
        refused.to_string()
    };
    let packed = refused(config().with_packed(true));
    assert!(packed.contains("it has no packed rings"), "{packed}");
    let in_flight = refused(config().with_inflight_migration(true));
    assert!(in_flight.contains("it can't leave requests in flight"), "{in_flight}");
    let queues = refused(config().with_queues(3));
    assert!(queues.contains("it has 2 queues, and the guest wants 3"), "{queues}");
    let mut device = device(&backend, UserOptions::default());
    let state = device.load_state(&[1; 16]).unwrap_err();
    assert!(state.to_string().contains("does not offer DEVICE_STATE"), "{state}");
}
