//! The downtime of a guest by the number of its disks.
//!
//! Migrates an idle guest with 1, 4, 16 and 32 disks of two queues to and fro within this process; each disk has a
//! back-end process on either side. Source and destination share the machine's CPUs. Prints medians of the source's
//! report, of the downtime by the guest's own clock, and of the steps that depend on the number of devices.
//!
//! `cargo bench --bench downtime -- [TURNS [DISKS…]]`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vhost_migrate::dirty::DirtySource;
use vhost_migrate::frontend::{Device, UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig, GuestIncomingVm, GuestSourceVm};
use vhost_migrate::memory::Memory;
use vhost_migrate::migrate::{
    ConvergencePolicy, IncomingVm, MigrationListener, MigrationParameters, MigrationReport, Outcomes, RegionLayout,
    SWITCHOVER_TIMEOUT, SourceVm, VmError, migrate, receive,
};
use vhost_migrate::stream::{self, CancelToken, StreamListener, StreamOptions};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const QUEUES: u16 = 2;

/// Milliseconds of each part, by its name.
type Times = BTreeMap<&'static str, f64>;

fn timed<T>(times: &mut Times, part: &'static str, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    times.insert(part, begun.elapsed().as_secs_f64() * 1e3);
    done
}

/// A machine whose calls are timed.
struct TimedSourceVm<'a>(GuestSourceVm<'a>, Times);

impl SourceVm for TimedSourceVm<'_> {
    fn set_cancel(&mut self, cancel: &CancelToken) {
        self.0.set_cancel(cancel);
    }

    fn memory(&self) -> Memory {
        self.0.memory()
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        self.0.dirty_source()
    }

    fn devices(&mut self) -> Result<Option<Vec<u8>>, VmError> {
        self.0.devices()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        timed(&mut self.1, "stop", || self.0.pause())
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        timed(&mut self.1, "save", || self.0.state())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.0.resume()
    }

    fn release(&mut self) {
        self.0.release();
    }
}

/// Measures the steps of an [`IncomingVm`].
struct TimedIncomingVm(GuestIncomingVm, Times);

impl IncomingVm for TimedIncomingVm {
    fn set_cancel(&mut self, cancel: &CancelToken) {
        self.0.set_cancel(cancel);
    }

    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        self.0.prepare(regions)
    }

    fn prepare_devices(&mut self, devices: &[u8]) -> Result<(), VmError> {
        self.0.prepare_devices(devices)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        timed(&mut self.1, "restore", || self.0.restore(state))
    }

    fn start(&mut self, run: bool, cancel: &CancelToken) -> Result<Option<u64>, VmError> {
        timed(&mut self.1, "start", || self.0.start(run, cancel))
    }
}

/// Back-end processes for all disks on both sides, and their images: in memory, so that no disk is measured.
struct BackendProcesses {
    folder: tempfile::TempDir,
    children: Vec<Child>,
    disks: usize,
}

impl BackendProcesses {
    fn new(disks: usize) -> BackendProcesses {
        let in_memory = Path::new("/dev/shm");
        let folder = if in_memory.is_dir() { tempfile::tempdir_in(in_memory) } else { tempfile::tempdir() };
        let mut backends = BackendProcesses { folder: folder.unwrap(), children: Vec::new(), disks };
        for disk in 0..disks {
            File::create(backends.image(disk)).unwrap().set_len(16 * MIB).unwrap();
        }
        for (side, disk) in (0..2).flat_map(|side| (0..disks).map(move |disk| (side, disk))) {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
            command.args([
                "--exit-with-parent",
                "backend",
                "blk",
                "--log-level",
                "error",
                "--queues",
                &QUEUES.to_string(),
            ]);
            command.arg("--image").arg(backends.image(disk)).arg("--socket").arg(backends.socket(side, disk));
            backends.children.push(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
        }
        backends
    }

    fn image(&self, disk: usize) -> PathBuf {
        self.folder.path().join(format!("{disk}.img"))
    }

    fn socket(&self, side: usize, disk: usize) -> PathBuf {
        self.folder.path().join(format!("{side}-{disk}"))
    }

    fn sockets(&self, side: usize) -> Vec<PathBuf> {
        (0..self.disks).map(|disk| self.socket(side, disk)).collect()
    }
}

impl Drop for BackendProcesses {
    fn drop(&mut self) {
        for child in &mut self.children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

fn config(disks: usize) -> GuestConfig {
    GuestConfig::new(512 * MIB)
        .with_working_set(4 * MIB)
        .with_cold(4 * MIB)
        .with_dirty_rate(0)
        .with_request_rate(Some(0))
        .with_disks(disks)
        .with_queues(QUEUES)
        .with_depth(4)
        .with_disk_area(MIB)
}

/// Moves the guest to the other side.
fn migrate_to_side(guest: Guest, backends: &BackendProcesses, to: usize) -> (Guest, MigrationReport, Times) {
    let uri = format!("unix:{}", backends.folder.path().join("migration").display()).parse().unwrap();
    let outcomes = Outcomes::default();
    let incoming = MigrationListener::start(StreamListener::bind(&uri).unwrap(), outcomes.clone()).unwrap();
    let guest = Mutex::new(Some(guest));
    let parameters = MigrationParameters::default().with_policy(ConvergencePolicy::new(PATIENCE, 100));
    let options = StreamOptions::new().unwrap().with_channels(2);
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let arriving = incoming.next().unwrap().unwrap();
            let mut arrival = TimedIncomingVm(GuestIncomingVm::new(backends.sockets(to)).unwrap(), Times::new());
            receive(&mut arrival, arriving, &outcomes, SWITCHOVER_TIMEOUT).unwrap();
            arrival
        });
        let connection = stream::connect(&uri, &options).unwrap();
        let mut machine = TimedSourceVm(GuestSourceVm::new(&guest).unwrap(), Times::new());
        let report = migrate(&mut machine, connection, &parameters, &mut |_| {}).unwrap();
        let TimedIncomingVm(arrival, mut times) = destination.join().unwrap();
        times.append(&mut machine.1);
        (arrival.into_guest().unwrap(), report, times)
    })
}

fn main() {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<usize>().ok());
    let turns = numbers.next().unwrap_or(21);
    let mut counts: Vec<usize> = numbers.collect();
    if counts.is_empty() {
        counts = vec![1, 4, 16, 32];
    }
    println!("idle guest, disks of {QUEUES} queues; medians of {turns} migrations, ms");
    println!("disks  reported  observed  per disk      stop      save   restore     start");
    for disks in counts {
        let backends = BackendProcesses::new(disks);
        let connect = |path: PathBuf| -> Box<dyn Device> {
            Box::new(UserDevice::connect(path, UserOptions::default(), Instant::now() + PATIENCE).unwrap())
        };
        let mut guest = Guest::new(config(disks)).unwrap();
        guest.boot(backends.sockets(0).into_iter().map(connect).collect()).unwrap();
        guest.resume().unwrap();
        let mut columns = vec![Vec::new(); 7];
        // The first trips warm up: both sides' back-ends, and memory.
        for turn in 0..turns + 2 {
            let (arrived, report, times) = migrate_to_side(guest, &backends, (turn + 1) % 2);
            guest = arrived;
            let observed = report.observed_downtime_ms.unwrap();
            let parts = ["stop", "save", "restore", "start"].map(|part| times[part]);
            let figures = [report.downtime_ms, observed, observed / disks as f64].into_iter().chain(parts);
            if turn > 1 {
                columns.iter_mut().zip(figures).for_each(|(column, figure)| column.push(figure));
            }
        }
        guest.verify().unwrap();
        let medians: Vec<f64> = columns.iter_mut().map(|column| median(column)).collect();
        let medians: Vec<String> = medians.iter().map(|figure| format!("{figure:>8.2}")).collect();
        println!("{disks:>5}  {}", medians.join("  "));
    }
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
