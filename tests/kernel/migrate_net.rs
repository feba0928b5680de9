//! A guest with vhost-net that moves to another process under load (rules K1.3, K1.5, K2.5, K4.1).
//!
//! Two guests send numbered frames to each other over a bridge. One of them moves: the library's stream carries its
//! memory and state, and the device's log tells what the device has written meanwhile. The other guest stays.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, fs};

use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};
use vhost_migrate::dirty::{DirtyError, DirtySource, Harvest, Log, LogSource, PageSet, UnionSource};
use vhost_migrate::frontend::{Device, DeviceDirtySource, KernelOptions, SharedDevice};
use vhost_migrate::memory::{LOG_PAGE, Memory, PageNumber};
use vhost_migrate::migrate::*;
use vhost_migrate::ring::{DriverRingState, RingBase};
use vhost_migrate::stream::{CancelToken, StreamListener, StreamOptions, Uri, connect};

use crate::net::{FEATURES, HEADER, RECEIVE, RING_PAGES, SEND, open};
use crate::process::ChildProcess;
use crate::rings::{Ring, page, region};
use crate::tap::{Tap, frame_between, mac, make_bridge};
use crate::wait::wait_until;

const BRIDGE: &str = "migration";
/// The guest that moves, and the one that stays.
const MOVING: u8 = 1;
const STAYING: u8 = 2;
const PAGES: u64 = 1024;
/// Pages of the buffers, which are used in this order again and again.
const SEND_PAGES: Range<u64> = 128..192;
const RECEIVE_PAGES: Range<u64> = 512..1024;
/// A guest sends so many frames, and waits. A round of the migration does not write all buffers.
const BURST: u32 = 2;
const PACE: Duration = Duration::from_millis(4);
/// Number of frames that arrive before the migration, and after it.
const FRAMES: u64 = 300;
/// Number of rounds under load, and of the frames that arrive in each.
const ROUNDS: usize = 5;
const LOAD: u64 = 60;
/// The environment variable with the folder of the migration, for the process of the destination.
const FOLDER: &str = "MIGRATE_NET_FOLDER";

fn nth(pages: Range<u64>, number: u64) -> u64 {
    pages.start + number % (pages.end - pages.start)
}

/// The frame of a guest with this number.
fn numbered(from: u8, number: u64) -> Vec<u8> {
    let contents = (0..40 + number * 37 % 1300).map(|at| (number * 31 + at + u64::from(from) * 101) as u8);
    let payload: Vec<u8> = number.to_le_bytes().into_iter().chain(contents).collect();
    let to = MOVING + STAYING - from;
    [vec![0; HEADER], frame_between(mac(from), mac(to), &payload)].concat()
}

/// Verifies the frame in a page, and returns its number and its length.
fn verified(memory: &Memory, number: u64, from: u8) -> (u64, usize) {
    let bytes = page(memory, number);
    let number = u64::from_le_bytes(bytes[HEADER + 14..][..8].try_into().unwrap());
    let expected = numbered(from, number);
    let first = &bytes[HEADER..HEADER + 30];
    assert!(bytes[HEADER..expected.len()] == expected[HEADER..], "another frame: {first:?}…");
    (number, expected.len())
}

/// The state of a guest's program: everything but its rings and memory.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Traffic {
    /// Number of frames sent.
    sent: u64,
    /// The number after the highest that has arrived.
    next: u64,
    /// Numbers that did not arrive.
    lost: Vec<Range<u64>>,
    /// Numbers of receive buffers added and used.
    added: u64,
    used: u64,
    /// The number of the frame in each page of a used receive buffer.
    frames: BTreeMap<u64, u64>,
}

/// The driver of a guest, and its program.
struct Driver {
    me: u8,
    memory: Memory,
    log: Arc<Log>,
    rings: [Ring; 2],
    traffic: Traffic,
    arrived: Arc<AtomicU64>,
}

impl Driver {
    fn add(&mut self, index: u16, page: u64, len: u32) {
        let ring = &mut self.rings[usize::from(index)];
        ring.add(page, len, index == RECEIVE);
        let written = ring.driver_pages().into_iter().chain((index == SEND).then_some(page));
        written.for_each(|page| self.log.mark(PageNumber(page).address(), LOG_PAGE));
    }

    fn add_receive_buffers(&mut self) {
        while self.rings[usize::from(RECEIVE)].driver.free() > 0 {
            let page = nth(RECEIVE_PAGES, self.traffic.added);
            self.traffic.frames.remove(&page);
            self.add(RECEIVE, page, LOG_PAGE as u32);
            self.traffic.added += 1;
        }
    }

    fn receive(&mut self, len: usize) {
        let page = nth(RECEIVE_PAGES, self.traffic.used);
        let (number, expected) = verified(&self.memory, page, MOVING + STAYING - self.me);
        assert_eq!(len, expected);
        let traffic = &mut self.traffic;
        assert!(number >= traffic.next, "frame {number} arrives again, or late, after {}", traffic.next);
        if number > traffic.next {
            traffic.lost.push(traffic.next..number);
        }
        traffic.next = number + 1;
        traffic.frames.insert(page, number);
        traffic.used += 1;
        self.arrived.fetch_add(1, Ordering::Relaxed);
    }

    fn send(&mut self) {
        let page = nth(SEND_PAGES, self.traffic.sent);
        let frame = numbered(self.me, self.traffic.sent);
        self.memory.write(PageNumber(page).address(), &frame).unwrap();
        self.add(SEND, page, frame.len() as u32);
        self.traffic.sent += 1;
    }

    /// Runs until `stop` is dropped at its other end.
    fn run(mut self, stop: &mpsc::Receiver<()>) -> Driver {
        while stop.recv_timeout(PACE) == Err(mpsc::RecvTimeoutError::Timeout) {
            while let Some(used) = self.rings[usize::from(RECEIVE)].driver.pop_used().unwrap() {
                self.receive(used.len as usize);
            }
            self.add_receive_buffers();
            while self.rings[usize::from(SEND)].driver.pop_used().unwrap().is_some() {}
            for _ in 0..BURST.min(self.rings[usize::from(SEND)].driver.free().into()) {
                self.send();
            }
        }
        self
    }
}

/// A harvest of the device's log.
#[derive(Debug)]
struct Harvested {
    pages: usize,
    /// Number of frames that had arrived.
    arrived: u64,
}

/// A guest, and its device behind a tap of the bridge.
struct Guest {
    memory: Memory,
    device: Arc<Mutex<Box<dyn Device>>>,
    /// The log of the driver.
    log: Arc<Log>,
    driver: Option<Driver>,
    thread: Option<(mpsc::Sender<()>, JoinHandle<Driver>)>,
    /// Number of frames that have arrived.
    arrived: Arc<AtomicU64>,
    log_signal: Option<EventFd>,
    harvests: Arc<Mutex<Vec<Harvested>>>,
}

impl Guest {
    fn new(tap: &str) -> Guest {
        let tap = Tap::new(tap, libc::IFF_VNET_HDR);
        tap.join(BRIDGE);
        let memory = Memory::new([region(0, PAGES)]).unwrap();
        let mut device = open(&tap, &memory, KernelOptions::default());
        let log_signal = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        device.set_log_fd(Some(log_signal.as_fd())).unwrap();
        let log = Arc::new(Log::create(memory.end()).unwrap().0);
        Guest {
            memory,
            device: Arc::new(Mutex::new(Box::new(device))),
            log,
            driver: None,
            thread: None,
            arrived: Arc::default(),
            log_signal: Some(log_signal),
            harvests: Arc::default(),
        }
    }

    fn set_driver(&mut self, me: u8, rings: [Ring; 2], traffic: Traffic) {
        let (memory, log, arrived) = (self.memory.clone(), self.log.clone(), self.arrived.clone());
        self.driver = Some(Driver { me, memory, log, rings, traffic, arrived });
    }

    /// A guest whose program has not begun.
    fn fresh(tap: &str, me: u8) -> Guest {
        let mut guest = Guest::new(tap);
        let rings = RING_PAGES.map(|page| Ring::new(&guest.memory, page, FEATURES));
        guest.set_driver(me, rings, Traffic::default());
        guest
    }

    /// Waits until this many frames have arrived.
    fn wait_for(&self, frames: u64) {
        wait_until("frames", || {
            assert!(!self.thread.as_ref().unwrap().1.is_finished(), "the driver has panicked");
            self.arrived.load(Ordering::Relaxed) >= frames
        });
    }

    /// Number of frames that the stopped device has used of a ring.
    fn used(&self, index: u16) -> u16 {
        let used_page = self.driver.as_ref().unwrap().rings[usize::from(index)].used_page();
        let bytes = page(&self.memory, used_page);
        u16::from_le_bytes([bytes[2], bytes[3]])
    }

    fn traffic(&self) -> &Traffic {
        &self.driver.as_ref().unwrap().traffic
    }
}

impl SourceVm for Guest {
    fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Prevents the switchover before the last round, and the next round until frames have arrived.
    fn blocker(&self) -> Option<String> {
        let harvests = self.harvests.lock().unwrap();
        let at_last = harvests.last().map_or(0, |harvest| harvest.arrived);
        let waits = harvests.len() < ROUNDS && self.arrived.load(Ordering::Relaxed) < at_last + LOAD;
        waits.then(|| "more frames are to arrive".into())
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        let compared = Compared {
            log: DeviceDirtySource::new(self.device.clone(), "net", self.memory.end()),
            memory: self.memory.clone(),
            log_signal: self.log_signal.take().unwrap(),
            hashes: BTreeMap::new(),
            former: BTreeSet::new(),
            missing: BTreeSet::new(),
            arrived: self.arrived.clone(),
            harvests: self.harvests.clone(),
        };
        let driver = LogSource::new("driver", self.log.clone());
        Ok(Box::new(UnionSource::new([Box::new(driver) as Box<dyn DirtySource>, Box::new(compared)])))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            self.driver = Some(thread.join().map_err(|_| "the driver has panicked")?);
        }
        for index in [SEND, RECEIVE] {
            let mut base = RingBase::default();
            self.device.with(&mut |device| device.stop_ring(index).map(|at| base = at))?;
            assert_eq!(base, RingBase::split(self.used(index)), "a device of vhost-net has nothing in flight");
            self.driver.as_mut().unwrap().rings[usize::from(index)].setup.base = base;
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        let driver = self.driver.as_ref().ok_or("the guest runs")?;
        let rings = driver.rings.each_ref().map(|ring| (ring.driver.state(), ring.setup.base));
        Ok(serde_json::to_vec(&(rings, &driver.traffic))?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let driver = self.driver.take().ok_or("the guest runs")?;
        for index in [RECEIVE, SEND] {
            let setup = &driver.rings[usize::from(index)].setup;
            self.device.with(&mut |device| device.start_ring(index, setup.clone()))?;
        }
        let (stop, stopped) = mpsc::channel();
        self.thread = Some((stop, thread::spawn(move || driver.run(&stopped))));
        Ok(())
    }

    fn release(&mut self) {}
}

/// The guest at the destination.
struct Incoming(Guest);

impl IncomingVm for Incoming {
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        assert_eq!(regions.len(), 1);
        Ok(self.0.memory())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        let (rings, traffic): ([(DriverRingState, RingBase); 2], Traffic) = serde_json::from_slice(state)?;
        assert!(!traffic.frames.is_empty());
        for (page, number) in &traffic.frames {
            assert_eq!(verified(&self.0.memory, *page, STAYING).0, *number);
        }
        let [receive, send] = [RECEIVE, SEND].map(|index| {
            let (state, base) = &rings[usize::from(index)];
            Ring::restore(&self.0.memory, RING_PAGES[usize::from(index)], FEATURES, state, *base)
        });
        self.0.set_driver(MOVING, [receive, send], traffic);
        Ok(())
    }

    fn start(&mut self, run: bool, _: &CancelToken) -> Result<Option<u64>, VmError> {
        assert!(run);
        self.0.resume().map(|()| None)
    }
}

/// The log of a device. Each harvest is compared with the hashes of the pages that only the device writes.
struct Compared {
    log: DeviceDirtySource,
    memory: Memory,
    log_signal: EventFd,
    hashes: BTreeMap<u64, u64>,
    /// The pages of the last harvest.
    former: BTreeSet<u64>,
    /// Pages that had changed at the last harvest and were not yet in the log: it is written after the page.
    missing: BTreeSet<u64>,
    arrived: Arc<AtomicU64>,
    harvests: Arc<Mutex<Vec<Harvested>>>,
}

impl Compared {
    fn hashes(&self) -> BTreeMap<u64, u64> {
        let hash = |number| {
            let mut hasher = DefaultHasher::new();
            page(&self.memory, number).hash(&mut hasher);
            (number, hasher.finish())
        };
        RECEIVE_PAGES.chain(RING_PAGES.map(|page| page + 2)).map(hash).collect()
    }

    fn compare(&mut self, hashes: BTreeMap<u64, u64>, found: &PageSet) {
        let found: BTreeSet<u64> = found.iter().map(|PageNumber(page)| page).collect();
        assert!(found.iter().all(|page| hashes.contains_key(page)), "a page that the device does not write");
        assert_eq!(&self.missing - &found, BTreeSet::new(), "changed, and not in the log");
        let changed: BTreeSet<u64> = hashes.keys().filter(|at| hashes[at] != self.hashes[at]).copied().collect();
        // A page may have changed after its last hash and before the last harvest.
        self.missing = &(&changed - &found) - &self.former;
        let harvested = Harvested { pages: found.len(), arrived: self.arrived.load(Ordering::Relaxed) };
        self.harvests.lock().unwrap().push(harvested);
        (self.hashes, self.former) = (hashes, found);
    }
}

impl DirtySource for Compared {
    fn start(&mut self) -> Result<(), DirtyError> {
        self.log.start()?;
        self.hashes = self.hashes();
        Ok(())
    }

    fn harvest(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        let (hashes, mut found) = (self.hashes(), PageSet::default());
        let harvest = self.log.harvest(&mut found)?;
        into.union(&found);
        self.compare(hashes, &found);
        Ok(harvest)
    }

    fn harvest_stopped(&mut self, into: &mut PageSet) -> Result<Harvest, DirtyError> {
        let harvest = self.harvest(into)?;
        assert_eq!(self.missing, BTreeSet::new(), "changed before the stop, and not in the log");
        let signals = self.log_signal.read().unwrap();
        println!("the log signal was written {signals} times");
        Ok(harvest)
    }

    fn put_back(&mut self, pages: &PageSet) {
        self.log.put_back(pages);
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.log.stop()
    }

    fn name(&self) -> &str {
        self.log.name()
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("migration")
}

#[test]
fn a_guest_moves_to_another_process_under_load() {
    make_bridge(BRIDGE);
    let mut staying = Guest::fresh("stays", STAYING);
    let mut moving = Guest::fresh("source", MOVING);
    staying.resume().unwrap();
    moving.resume().unwrap();
    moving.wait_for(FRAMES);

    let folder = tempfile::tempdir().unwrap();
    let destination = ["--exact", "migrate_net::destination", "--ignored", "--nocapture"];
    let destination = Command::new(env::current_exe().unwrap()).args(destination).env(FOLDER, folder.path()).spawn();
    let mut destination = ChildProcess(destination.unwrap());
    let uri = Uri::Unix(socket(folder.path()));
    wait_until("a listener", || socket(folder.path()).exists());
    let connection = connect(&uri, &StreamOptions::new().unwrap()).unwrap();
    let policy = ConvergencePolicy::new(Duration::from_secs(1), 100);
    let parameters = MigrationParameters::default().with_policy(policy).with_verify(true);
    let report = migrate(&mut moving, connection, &parameters, &mut |_| {}).unwrap();
    let at_source = (moving.traffic().used, moving.used(RECEIVE));
    let taken = at_source.0 + u64::from(at_source.1.wrapping_sub(at_source.0 as u16));

    assert!(destination.0.wait().unwrap().success());
    let (sent, moved): (u64, Traffic) =
        serde_json::from_slice(&fs::read(folder.path().join("traffic")).unwrap()).unwrap();
    staying.wait_for(sent);
    staying.pause().unwrap();
    let stayed = staying.traffic();
    let lost: u64 = moved.lost.iter().map(|gap| gap.end - gap.start).sum();
    let harvests = moving.harvests.lock().unwrap();
    println!("{} rounds, downtime {:.0} ms, harvests {harvests:?}", report.rounds, report.downtime_ms);
    println!("{sent} frames there, none lost; {} back, {lost} lost: {:?}", stayed.sent, moved.lost);

    // The ring keeps the frames that the device had not sent, and the next device sends them.
    assert_eq!((stayed.next, stayed.used, stayed.lost.len()), (sent, sent, 0));
    // Frames are lost that came to the source's tap after its device had stopped, and no other.
    assert_eq!(moved.used + lost, moved.next);
    assert!(moved.lost.len() <= 1 && moved.lost.iter().all(|gap| gap.start == taken), "{taken}");
    assert!(harvests.len() > ROUNDS && harvests[..ROUNDS].iter().all(|harvest| harvest.pages as u64 > LOAD / 2));
}

#[test]
#[ignore = "the process that a_guest_moves_to_another_process_under_load starts"]
fn destination() {
    let folder = PathBuf::from(env::var_os(FOLDER).unwrap());
    let mut incoming = Incoming(Guest::new("destination"));
    let listener = StreamListener::bind(&Uri::Unix(socket(&folder))).unwrap();
    let connection = listener.accept(&StreamOptions::new().unwrap()).unwrap();
    receive(&mut incoming, connection, &Outcomes::default(), SWITCHOVER_TIMEOUT).unwrap();
    let Incoming(mut guest) = incoming;
    guest.wait_for(FRAMES);
    guest.pause().unwrap();
    let traffic = guest.traffic();
    let unsent = (traffic.sent as u16).wrapping_sub(guest.used(SEND));
    let sent = traffic.sent - u64::from(unsent);
    fs::write(folder.join("traffic"), serde_json::to_vec(&(sent, traffic)).unwrap()).unwrap();
}
