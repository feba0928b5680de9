//! Back-ends that are killed or terminated, and their last replies. After a SIGKILL at a random time, the successor
//! completes every request exactly once, with the right data, and logs its writes.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{
    FrontendRequest as Code, Header, InflightDescription, LogDescription, VringState,
};
use vhost_migrate::abi::virtio::{VIRTIO_F_IN_ORDER, VIRTIO_RING_F_EVENT_IDX, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::inflight;
use vhost_migrate::memory::GuestAddress;
use zerocopy::IntoBytes;

use crate::guest::{
    BASIC, Guest, LOG_ALL, PACKED, PreviousBackend, Ring, SPLIT, harvest, inflight_kind, inflight_region, negotiate,
    pages, request_addresses, status,
};
use crate::raw::{NEED_REPLY, RawFrontend, VERSION, ring_message};
use crate::server::{Process, disk_options};
use crate::wait::{is_readable, wait_until};

const SLOTS: u64 = 20;
const BLOCK: usize = 32 << 10;
const LOG_AT: GuestAddress = GuestAddress(0x30_0000);

/// A guest that writes self-describing blocks, and reads each back before it writes the next version.
struct VerifyingGuest {
    guest: Guest,
    ring: Ring,
    features: VirtioFeatures,
    inflight: (OwnedFd, InflightDescription),
    log: (Log, OwnedFd),
    marks: BTreeSet<u64>,
    slots: Vec<Slot>,
    completed: u64,
}

#[derive(Clone, Copy)]
struct Slot {
    head: u16,
    version: u64,
    reads: bool,
}

impl VerifyingGuest {
    fn new(features: VirtioFeatures) -> VerifyingGuest {
        let guest = Guest::new();
        let mut ring = Ring::new(&guest, 0, 64, features);
        ring.log_at = Some(LOG_AT);
        let (_, fd, description) = inflight_region(features, 1, 64);
        let inflight = (fd, description);
        let log = Log::create(guest.memory.end()).unwrap();
        let slots = vec![Slot { head: u16::MAX, version: 0, reads: true }; SLOTS as usize];
        let mut guests =
            VerifyingGuest { guest, ring, features, inflight, log, marks: BTreeSet::new(), slots, completed: 0 };
        (0..SLOTS).for_each(|slot| guests.next(slot));
        guests
    }

    /// Connects as QEMU does on reconnect. The base is the used index of a split ring, and the initial base of a packed
    /// ring. The back-end takes the current position from the inflight region (rules I3.4, I4.5).
    fn attach(&mut self, socket: &Path) -> RawFrontend {
        let client = RawFrontend::connect(socket);
        negotiate(&client, &self.guest, self.features | LOG_ALL);
        client.send_acknowledged(Code::SET_INFLIGHT_FD, &self.inflight.1, &[self.inflight.0.as_fd()]);
        let base = match inflight_kind(self.features) {
            inflight::RingKind::Split => self.ring.used_index(&self.guest).into(),
            inflight::RingKind::Packed => self.ring.initial_base(),
        };
        self.ring.set_up(&client, &self.guest, base);
        let log = LogDescription { mmap_size: self.log.0.size(), mmap_offset: 0 };
        client.send(Code::SET_LOG_BASE, VERSION, log.as_bytes(), &[self.log.1.as_fd()]);
        client.reply(Code::SET_LOG_BASE);
        self.ring.enable(&client, true);
        self.ring.kick.write(1).unwrap();
        client
    }

    fn block(slot: u64, version: u64) -> Vec<u8> {
        [slot, version].as_bytes().repeat(BLOCK / 16)
    }

    /// Submits the next request of a slot: a read after a write, and a write of the next version after a read.
    fn next(&mut self, slot: u64) {
        let mut state = self.slots[slot as usize];
        let sector = slot * (BLOCK / 512) as u64;
        self.collect_marks();
        for page in pages(request_addresses(slot).1, 1).chain(pages(request_addresses(slot).2, BLOCK as u64)) {
            self.marks.remove(&page);
        }
        state.reads = !state.reads;
        state.head = if state.reads {
            self.guest.memory.write(request_addresses(slot).2, &[0; BLOCK]).unwrap();
            self.ring.read(&self.guest, slot, sector, BLOCK as u32)
        } else {
            state.version += 1;
            self.ring.write(&self.guest, slot, sector, &VerifyingGuest::block(slot, state.version))
        };
        self.slots[slot as usize] = state;
        self.ring.kick();
    }

    fn collect_marks(&mut self) {
        self.marks.extend(harvest(&self.log.0));
    }

    /// Takes one completion, if there is one. Checks its status, its data and the marks in the log. Returns its slot.
    fn completion(&mut self) -> Option<u64> {
        // The completion of a request that is not in flight, for example a second completion, is an error here.
        let used = self.ring.driver.pop_used().expect("a request was answered twice")?;
        let slot = self.slots.iter().position(|slot| slot.head == used.head).unwrap() as u64;
        let state = self.slots[slot as usize];
        assert_eq!(status(&self.guest, slot), 0);
        self.collect_marks();
        let marked = |gpa, len| pages(gpa, len).all(|page| self.marks.contains(&page));
        let (_, status_at, data) = request_addresses(slot);
        assert!(marked(status_at, 1), "a status was not logged");
        if state.reads {
            let found = self.guest.bytes(data, BLOCK);
            assert!(
                found == VerifyingGuest::block(slot, state.version),
                "slot {slot} doesn't hold version {}",
                state.version
            );
            assert!(marked(data, BLOCK as u64), "data was not logged");
        }
        self.completed += 1;
        Some(slot)
    }

    /// Takes completions and submits requests until the back-end is dead.
    fn run_until(&mut self, dead: &AtomicBool) {
        while !dead.load(Ordering::Relaxed) {
            while let Some(slot) = self.completion() {
                self.next(slot);
            }
            if !self.ring.driver.enable_notifications() {
                is_readable(&self.ring.call, 1u8);
                let _ = self.ring.call.read();
            }
        }
    }

    /// Waits until no request is outstanding.
    fn drain(&mut self) {
        while self.ring.driver.outstanding() > 0 {
            match self.completion() {
                Some(_) => {}
                None if self.ring.driver.enable_notifications() => {}
                None => {
                    assert!(is_readable(&self.ring.call, 20_000u16), "a request was lost");
                    let _ = self.ring.call.read();
                }
            }
        }
    }
}

fn survives_kills(kills: u32, features: VirtioFeatures, more: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let options = disk_options(folder.path(), SLOTS * BLOCK as u64, |_| {});
    let socket = folder.path().join("socket");
    let mut guests = VerifyingGuest::new(features);
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for _ in 0..kills {
        let mut process = Process::start(&socket, &options.image, more);
        let _client = guests.attach(&socket);
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
        let (life, dead) = (Duration::from_micros((random >> 33) % 3000), Arc::new(AtomicBool::new(false)));
        let killer = {
            let dead = dead.clone();
            thread::spawn(move || {
                thread::sleep(life);
                process.child.kill().unwrap();
                process.child.wait().unwrap();
                dead.store(true, Ordering::Relaxed);
                process
            })
        };
        guests.run_until(&dead);
        let said = killer.join().unwrap().stderr();
        assert!(!said.contains("ERROR") && !said.contains("panicked"), "{said}");
    }
    let process = Process::start(&socket, &options.image, more);
    let client = guests.attach(&socket);
    guests.drain();
    assert!(guests.completed > u64::from(kills), "the guest hardly did anything");
    assert_eq!(client.ring_base(0), guests.ring.drained_base(), "a request was taken twice or never");
    drop(process);
}

/// Rules I3.3 and I6.2.
#[test]
fn every_request_completes_exactly_once_after_100_kills() {
    survives_kills(100, BASIC, &[]);
}

#[test]
fn every_request_completes_exactly_once_after_100_kills_with_event_idx_and_threads() {
    survives_kills(100, BASIC | VIRTIO_RING_F_EVENT_IDX, &["--aio", "threads"]);
}

/// Rule I4.5.
#[test]
fn every_request_completes_exactly_once_after_100_kills_with_packed_rings() {
    survives_kills(100, PACKED, &[]);
}

#[test]
fn every_request_completes_exactly_once_after_100_kills_with_packed_rings_and_event_idx() {
    survives_kills(100, PACKED | VIRTIO_RING_F_EVENT_IDX, &["--aio", "threads"]);
}

#[test]
fn every_request_completes_exactly_once_after_50_kills_with_in_order() {
    for ring in [SPLIT, PACKED] {
        survives_kills(50, ring | VIRTIO_F_IN_ORDER, &["--in-order"]);
    }
}

#[test]
fn every_request_completes_exactly_once_after_50_kills_with_o_direct() {
    survives_kills(50, BASIC | VIRTIO_RING_F_EVENT_IDX, &["--direct"]);
}

#[test]
fn sigterm_and_sigint_end_the_process_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let options = disk_options(folder.path(), 1 << 20, |_| {});
    let socket = folder.path().join("socket");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut process = Process::start(&socket, &options.image, &[]);
        let _connected = RawFrontend::connect(&socket);
        kill(Pid::from_raw(process.child.id() as i32), signal).unwrap();
        assert!(process.child.wait().unwrap().success());
        assert!(!socket.exists());
    }
}

#[test]
fn a_process_serves_an_inherited_connection_until_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let options = disk_options(folder.path(), 1 << 20, |_| {});
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = Process::command(&["--fd", "0", "--image", options.image.to_str().unwrap()]);
    let mut child = command.stdin(OwnedFd::from(theirs)).stdout(std::process::Stdio::null()).spawn().unwrap();
    drop(command);
    let client = RawFrontend { socket: ours };
    client.wait_until_processed();
    drop(client);
    assert!(child.wait().unwrap().success());
}

/// Number of times that the thread of ring 0 has slept. It is 0 if there is no such thread.
fn sleep_count(process: &Process) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.child.id())).unwrap();
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let ring = tasks.map(|task| task.unwrap().path()).find(|task| read(task.join("comm")).trim() == "ring 0");
    let status = ring.map(|task| read(task.join("status"))).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.map_or(0, |count| count.trim().parse().unwrap())
}

/// Rules I10.1 and R6.2: a predecessor that has locked the image may still serve the ring.
#[rstest]
fn a_successor_reads_ring_and_region_only_after_locking_the_image(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("socket"), disk_options(folder.path(), 1 << 20, |_| {}).image);
    let guest = Guest::new();
    let mut ring = Ring::new(&guest, 0, 64, features);
    (0..3).for_each(|slot| _ = ring.read(&guest, slot, slot, 512));
    let _ = ring.driver.publish();
    let (region, fd, description) = inflight_region(features, 1, 64);
    let mut predecessor = PreviousBackend::of(&ring, &guest, &region, 3);
    let claim = File::open(&image).unwrap();
    claim.lock().unwrap();
    let process = Process::start(&socket, &image, &[]);
    let client = RawFrontend::connect(&socket);
    negotiate(&client, &guest, features);
    client.send_acknowledged(Code::SET_INFLIGHT_FD, &description, &[fd.as_fd()]);
    ring.set_up(&client, &guest, ring.initial_base());
    client.send_body(Code::SET_VRING_ENABLE, &VringState { index: 0, num: 1 });
    wait_until("the successor waits for the image", || sleep_count(&process) >= 20);
    // The predecessor continues.
    predecessor.complete_one(&guest);
    claim.unlock().unwrap();
    let heads = ring.completions(3);
    assert_eq!(heads.len(), 3, "a request was served twice");
    assert_eq!(client.ring_base(0), ring.drained_base());
    assert!(!ring.has_completion(&guest), "a request was served twice");
    // The predecessor completed the first request without writing its data. Data there would come from the successor.
    assert!(guest.bytes(request_addresses(0).2, 512).iter().all(|byte| *byte == 0), "a request was served twice");
    assert!((1..3).all(|slot| status(&guest, slot) == 0));
}

/// The back-end may send several replies together, but no reply waits until a later message has locked the image.
/// Rule F4.4.
#[test]
fn a_reply_is_sent_before_a_later_message_waits_for_the_image_lock() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("socket"), disk_options(folder.path(), 1 << 20, |_| {}).image);
    let guest = Guest::new();
    let ring = Ring::new(&guest, 0, 64, SPLIT);
    let claim = File::open(&image).unwrap();
    claim.lock().unwrap();
    let _process = Process::start(&socket, &image, &[]);
    let client = RawFrontend::connect(&socket);
    negotiate(&client, &guest, SPLIT);
    ring.set_up(&client, &guest, ring.initial_base());
    client.wait_until_processed();
    client.send_bytes(
        &[message(Code::SET_VRING_BASE, ring.initial_base()), message(Code::SET_VRING_ENABLE, 1)].concat(),
        &[],
    );
    assert_eq!(client.reply(Code::SET_VRING_BASE), [0; 8]);
    // The back-end waits at most 10 s for the lock, and would then refuse the ring.
    claim.unlock().unwrap();
    assert_eq!(client.reply(Code::SET_VRING_ENABLE), [0; 8]);
}

/// No reply waits until a later SET_VRING_ENABLE of a stopped ring has probed the lock. A probe takes up to 1 s.
/// Rule D2.3.
#[test]
fn a_reply_is_sent_before_a_later_message_probes_the_image_lock() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("socket"), disk_options(folder.path(), 1 << 20, |_| {}).image);
    let guest = Guest::new();
    let claim = File::open(&image).unwrap();
    let _process = Process::start(&socket, &image, &[]);
    let client = RawFrontend::connect(&socket);
    negotiate(&client, &guest, SPLIT);
    // On a machine that is busy for 1 s, the probe may time out before the image is unlocked. The test then tries
    // again.
    let is_free_in_time = |_| {
        claim.lock().unwrap();
        let messages = [message(Code::SET_VRING_NUM, 64), message(Code::SET_VRING_ENABLE, 1)];
        client.send_bytes(&messages.concat(), &[]);
        assert_eq!(client.reply(Code::SET_VRING_NUM), [0; 8]);
        claim.unlock().unwrap();
        let is_free = client.reply(Code::SET_VRING_ENABLE) == [0; 8];
        client.send_acknowledged(Code::SET_VRING_ENABLE, &VringState { index: 0, num: 0 }, &[]);
        is_free
    };
    assert!((0..20).any(is_free_in_time), "the answer came when the trial was over");
}

/// A message for ring 0 with need-reply.
fn message(code: Code, num: u32) -> Vec<u8> {
    ring_message(code, NEED_REPLY, VringState { index: 0, num })
}

/// The back-end acknowledges the messages that it processed before the end of the connection. The connection ends after
/// a whole message, with an invalid header, or within a header.
#[test]
fn pending_replies_are_sent_before_the_connection_closes() {
    let (_folder, socket, _process) = Process::disk(&[]);
    let wrong = Header { request: Code::SET_VRING_NUM.0, flags: NEED_REPLY, size: u32::MAX };
    for last in [vec![], wrong.as_bytes().to_vec(), wrong.as_bytes()[..5].to_vec()] {
        let client = RawFrontend::connect(&socket);
        let guest = Guest::new();
        negotiate(&client, &guest, SPLIT);
        let messages = [64, 128, 256].map(|num| message(Code::SET_VRING_NUM, num)).concat();
        client.send_bytes(&[messages, last].concat(), &[]);
        client.socket.shutdown(std::net::Shutdown::Write).unwrap();
        (0..3).for_each(|_| assert_eq!(client.reply(Code::SET_VRING_NUM), [0; 8]));
        assert!(client.is_closed());
    }
}
