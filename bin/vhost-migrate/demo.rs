//! `vhost-migrate demo`: live-migrates a guest with a disk between two processes on this machine while the guest
//! writes. With `--kill`, the demo kills the guest's back-ends meanwhile.

use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command as Process, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::{Value, json};
use vhost_migrate::abi::virtio::SECTOR_BYTES;
use vhost_migrate::control::{self, ControlCommand, ControlEvent};
use vhost_migrate::guest::GuestConfig;
use vhost_migrate::guest::{GuestStats, OwnerState};
use vhost_migrate::migrate::{MigrationEvent, MigrationReport};

use crate::migrate::TransferArguments;
use crate::progress::{OutputArguments, Progress};
use crate::signals::on_interrupt_or_hangup;
use crate::units;
use crate::wrong_arguments;

/// Live-migrate a built-in guest between two processes on this machine, checking every byte
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate demo
  vhost-migrate demo --memory 4GiB --dirty-rate 500MiB/s --codec zstd:1
  vhost-migrate demo --kill --json
  vhost-migrate demo --device vhost-vdpa

Needs no files but a temporary folder, and root only for vhost-vdpa. Exit status: 0 if every byte was right, 1 if not, 2 wrong arguments.")]
pub(crate) struct Arguments {
    /// Device between the guest and its disk
    #[arg(long, value_enum, default_value_t = DemoDevice::Blk)]
    device: DemoDevice,
    /// Guest memory
    #[arg(long, default_value = "1GiB", value_parser = units::size, value_name = "SIZE")]
    memory: u64,
    /// Size of the guest's disk
    #[arg(long, default_value = "64MiB", value_parser = disk_size, value_name = "SIZE")]
    disk: u64,
    /// Run time of the guest before and after the migration together
    #[arg(long, default_value = "10", value_parser = units::seconds, value_name = "SECONDS")]
    seconds: Duration,
    /// Write rate of the guest's CPUs
    #[arg(long, default_value = "200MiB/s", value_parser = units::rate, value_name = "RATE")]
    dirty_rate: u64,
    /// Packed rings instead of split ones
    #[arg(long)]
    packed: bool,
    /// Kill the back-end (SIGKILL) before, during and after the migration
    #[arg(long)]
    kill: bool,
    #[command(flatten)]
    transfer: TransferArguments,
    #[command(flatten)]
    output: OutputArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DemoDevice {
    /// vhost-user back-ends
    Blk,
    /// VDUSE devices, as /dev/vhost-vdpa-N behind shadow rings: needs root, and the modules vduse and vhost_vdpa
    VhostVdpa,
}

impl DemoDevice {
    /// Returns an error that says what this host or user lacks for the device.
    fn check(self) -> Result<(), String> {
        if self == DemoDevice::Blk {
            return Ok(());
        }
        let modules = [("vduse", "/dev/vduse/control"), ("vhost_vdpa", "/sys/bus/vdpa/drivers/vhost_vdpa")];
        let missing = modules.iter().filter(|(_, place)| !Path::new(place).exists()).map(|(module, _)| *module);
        let missing: Vec<_> = missing.collect();
        let load = (!missing.is_empty()).then(|| format!("run `modprobe -a {}`", missing.join(" ")));
        let root = (!geteuid().is_root()).then(|| "start the demo as root".to_owned());
        match load.into_iter().chain(root).collect::<Vec<_>>() {
            advice if advice.is_empty() => Ok(()),
            advice => Err(format!("--device vhost-vdpa is not possible yet: {}", advice.join(", and "))),
        }
    }
}

/// Queues of the guest's disk.
const QUEUES: u16 = 2;
/// Time limit for a process to start or to reply.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit for a back-end to remove its VDUSE device.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Parses the size of the disk. Each queue uses a part of it, and file offsets limit its size.
fn disk_size(text: &str) -> Result<u64, String> {
    let range = u64::from(QUEUES) * SECTOR_BYTES..=i64::MAX.cast_unsigned();
    let bytes = units::size(text)?;
    if range.contains(&bytes) {
        Ok(bytes)
    } else {
        Err(format!("a disk has {} to {} bytes", range.start(), range.end()))
    }
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let guest = GuestConfig::new(arguments.memory).with_queues(QUEUES).with_packed(arguments.packed);
    if let Err(error) = guest.check() {
        wrong_arguments(error);
    }
    if let Err(lacks) = arguments.device.check() {
        eprintln!("demo: {lacks}");
        return ExitCode::FAILURE;
    }
    let processes = match DemoProcesses::new(&arguments) {
        Ok(processes) => Arc::new(processes),
        Err(error) => {
            eprintln!("demo: can't make a temporary folder: {error}");
            return ExitCode::FAILURE;
        }
    };
    let interrupted = processes.clone();
    if let Err(error) = on_interrupt_or_hangup(move || interrupted.finish(Err(io::Error::other("interrupted")))) {
        eprintln!("signals: {error}");
        return ExitCode::FAILURE;
    }
    let watched = processes.clone();
    std::thread::spawn(move || watched.watch());
    let outcome = Demo::new(&arguments, processes.clone()).run();
    processes.finish(outcome)
}

/// The interval at which the processes are polled.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);

/// The processes of the demo and the folder of their files. `finish` ends the processes and removes the folder.
struct DemoProcesses {
    output: OutputArguments,
    device: DemoDevice,
    folder: Mutex<tempfile::TempDir>,
    /// Names and processes.
    running: Mutex<Vec<(String, Child)>>,
}

impl DemoProcesses {
    fn new(arguments: &Arguments) -> io::Result<DemoProcesses> {
        let (output, device) = (arguments.output, arguments.device);
        let folder = tempfile::Builder::new().prefix("vhost-migrate-").tempdir()?;
        Ok(DemoProcesses { output, device, folder: Mutex::new(folder), running: Mutex::default() })
    }

    fn folder(&self) -> PathBuf {
        lock(&self.folder).path().to_owned()
    }

    /// Starts a process. Returns its output, if that is a pipe.
    fn start(&self, name: &str, process: &mut Process) -> io::Result<Option<ChildStdout>> {
        let mut running = lock(&self.running);
        let mut child = process.spawn()?;
        let output = child.stdout.take();
        running.push((name.into(), child));
        Ok(output)
    }

    /// Kills one process with SIGKILL and waits for its end.
    fn kill(&self, name: &str) {
        let mut running = lock(&self.running);
        if let Some(place) = running.iter().position(|(other, _)| other == name) {
            kill_and_wait(&mut running.swap_remove(place).1);
        }
    }

    /// Ends the demo when a process ends unexpectedly.
    fn watch(&self) {
        loop {
            std::thread::sleep(WATCH_INTERVAL);
            let ended = lock(&self.running).iter_mut().find_map(|(name, child)| {
                let status: Option<ExitStatus> = child.try_wait().ok().flatten();
                status.map(|status| format!("{name} has ended: {status}"))
            });
            if let Some(message) = ended {
                self.finish(Err(io::Error::other(message)));
            }
        }
    }

    /// Ends all processes, removes their folder, prints the result and exits.
    fn finish(&self, outcome: io::Result<Value>) -> ! {
        // Both locks are held until the exit: no process can be started, and no other thread can finish.
        let mut running = lock(&self.running);
        // Guests are killed first, so that none reports a disconnected back-end.
        running.sort_by_key(|(name, _)| name.ends_with("back-end"));
        for (name, child) in running.iter_mut() {
            if self.device == DemoDevice::VhostVdpa && name.ends_with("back-end") {
                terminate(child);
            }
            kill_and_wait(child);
        }
        let folder = lock(&self.folder);
        if let Err(error) = std::fs::remove_dir_all(folder.path()) {
            eprintln!("demo: can't remove {}: {error}", folder.path().display());
        }
        let failed = outcome.is_err();
        let done = outcome.unwrap_or_else(|error| {
            eprintln!("demo failed: {error}");
            json!({"event": "done", "verified": false, "message": error.to_string()})
        });
        if self.output.json {
            println!("{done}");
        }
        std::process::exit(failed.into())
    }
}

fn kill_and_wait(child: &mut Child) {
    // The process may have ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Lets a back-end remove its VDUSE device, which a killed one would leave behind.
fn terminate(child: &mut Child) {
    let deadline = Instant::now() + REMOVAL_TIMEOUT;
    // The process may have ended already.
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The disk of a back-end, and the control socket of a guest's process.
struct DemoSide {
    name: &'static str,
    /// The back-end's socket, or its device once it has started.
    disk: PathBuf,
    control: PathBuf,
}

impl DemoSide {
    fn new(folder: &Path, name: &'static str) -> DemoSide {
        DemoSide { name, disk: folder.join(format!("{name}.vhost")), control: folder.join(format!("{name}.control")) }
    }
}

struct Demo<'a> {
    arguments: &'a Arguments,
    processes: Arc<DemoProcesses>,
    folder: PathBuf,
    source: DemoSide,
    destination: DemoSide,
    progress: Progress,
    kills: u32,
}

impl<'a> Demo<'a> {
    fn new(arguments: &'a Arguments, processes: Arc<DemoProcesses>) -> Demo<'a> {
        let folder = processes.folder();
        let (source, destination) = (DemoSide::new(&folder, "source"), DemoSide::new(&folder, "destination"));
        let progress = Progress::new(arguments.output);
        Demo { arguments, processes, folder, source, destination, progress, kills: 0 }
    }

    fn run(&mut self) -> io::Result<Value> {
        let begun = Instant::now();
        let image = self.folder.join("disk.img");
        std::fs::File::create(&image)?.set_len(self.arguments.disk)?;
        let incoming = format!("unix:{}", self.folder.join("migration").display());

        self.source.disk = self.start_backend(&self.source)?;
        self.destination.disk = self.start_backend(&self.destination)?;
        let rate = format!("{}B/s", self.arguments.dirty_rate);
        let memory = format!("{}", self.arguments.memory);
        let queues = QUEUES.to_string();
        let mut workload = vec!["--memory", &memory, "--dirty-rate", &rate, "--queues", &queues];
        if self.arguments.packed {
            workload.push("--packed");
        }
        self.start_guest(&self.destination, &["--incoming", &incoming])?;
        self.start_guest(&self.source, &workload)?;
        wait_for(&self.source.control, OwnerState::Running)?;
        self.progress
            .print_line(&format!("guest up after {:.1} s: it writes memory and disk, and checks", seconds(begun)));

        let each = self.arguments.seconds / 2;
        self.run_guest(each, |demo| &demo.source)?;
        let report = self.migrate(&incoming)?;
        self.run_guest(each, |demo| &demo.destination)?;

        let stats = self.verify()?;
        let kills = self.kills;
        self.progress.print_line(&format!(
            "verified: every byte of memory and disk is right after {} requests and {} killed back-ends, {} requests \
             resubmitted, 0 lost ({:.1} s in all)",
            stats.requests,
            kills,
            stats.resubmitted,
            seconds(begun)
        ));
        Ok(json!({
            "event": "done",
            "verified": true,
            "total_ms": report.total_ms,
            "downtime_ms": report.downtime_ms,
            "observed_downtime_ms": report.observed_downtime_ms,
            "rounds": report.rounds,
            "guest_bytes": report.guest_bytes,
            "wire_bytes": report.wire_bytes,
            "pages_sent": report.pages_sent,
            "zero_pages": report.zero_pages,
            "requests": stats.requests,
            "lost": stats.lost,
            "resubmitted": stats.resubmitted,
            "reconnects": stats.reconnects,
            "kills": kills,
            "dirty_rate_bytes_per_s": report.dirty_rate_bytes_per_s,
            "log_quality": report.log_quality,
        }))
    }

    /// Waits while the guest of one side runs, and kills its back-end in the middle if requested.
    fn run_guest(&mut self, time: Duration, side: fn(&Self) -> &DemoSide) -> io::Result<()> {
        std::thread::sleep(time / 2);
        if self.arguments.kill {
            self.kill_backend(side)?;
        }
        std::thread::sleep(time / 2);
        Ok(())
    }

    fn kill_backend(&mut self, side: fn(&Self) -> &DemoSide) -> io::Result<()> {
        self.processes.kill(&backend_name(side(self)));
        self.start_backend(side(self))?;
        self.kills += 1;
        self.progress.print_line("killed the back-end and started it again");
        Ok(())
    }

    fn migrate(&mut self, uri: &str) -> io::Result<MigrationReport> {
        let mut completed = None;
        let mut kill = if self.arguments.kill { Some(Ok(())) } else { None };
        let control = self.source.control.clone();
        let order = ControlCommand::Migrate(self.arguments.transfer.migrate_arguments(uri));
        control::call(&control, &order, |event| {
            self.progress.event(&event);
            let ControlEvent::Migration(event) = event else { return };
            match *event {
                // The back-end is killed while logging is on and most memory has not been sent.
                MigrationEvent::Progress { .. } | MigrationEvent::Round(_) if matches!(kill, Some(Ok(()))) => {
                    kill = self.kill_backend(|demo| &demo.source).err().map(Err);
                }
                MigrationEvent::Completed(report) => completed = Some(report),
                _ => {}
            }
        })?;
        if let Some(Err(error)) = kill {
            return Err(error);
        }
        completed.ok_or_else(|| io::Error::other("the migration ended without a report"))
    }

    fn verify(&self) -> io::Result<GuestStats> {
        control::call(&self.destination.control, &ControlCommand::Verify {}, |_| ())?;
        let guest = control::status(&self.destination.control)?.guest;
        let stats = guest.ok_or_else(|| io::Error::other("the guest is gone"))?.stats;
        if stats.lost != 0 {
            return Err(io::Error::other(format!("{} requests were lost", stats.lost)));
        }
        Ok(stats)
    }

    /// Starts a back-end. Returns the path of its disk.
    fn start_backend(&self, side: &DemoSide) -> io::Result<PathBuf> {
        let queues = QUEUES.to_string();
        let arguments = ["backend", "blk", "--exit-with-parent", "--log-level", "warn", "--queues", &queues, "--image"];
        let mut process = program()?;
        process.args(arguments).arg(self.folder.join("disk.img"));
        match self.arguments.device {
            DemoDevice::Blk => process.arg("--socket").arg(&side.disk),
            DemoDevice::VhostVdpa => {
                let name = format!("demo-{}-{}", std::process::id(), side.name);
                process.args(["--vduse", &name, "--attach", "vhost", "--state-dir"]).arg(&self.folder);
                process.stdout(Stdio::piped())
            }
        };
        match self.processes.start(&backend_name(side), &mut process)? {
            Some(output) => device_path(output),
            None => Ok(side.disk.clone()),
        }
    }

    fn start_guest(&self, side: &DemoSide, more: &[&str]) -> io::Result<()> {
        let mut process = program()?;
        let arguments = ["guest", "--exit-with-parent", "--log-level", "warn", "--backend"];
        process.args(arguments).arg(&side.disk).arg("--control").arg(&side.control).args(more);
        self.processes.start(&format!("the guest's process at the {}", side.name), &mut process).map(drop)
    }
}

fn backend_name(side: &DemoSide) -> String {
    format!("the {}'s back-end", side.name)
}

/// Reads the path of a VDUSE device from the line in which its back-end says what it serves.
fn device_path(output: ChildStdout) -> io::Result<PathBuf> {
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    let path = line.rsplit_once('(').and_then(|(_, path)| path.trim_end().strip_suffix(')'));
    path.map(PathBuf::from).ok_or_else(|| io::Error::other("a back-end does not serve its device"))
}

fn program() -> io::Result<Process> {
    let mut process = Process::new(std::env::current_exe()?);
    process.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(process)
}

/// Waits until the guest behind a control socket is in `state`.
fn wait_for(control: &Path, state: OwnerState) -> io::Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let status = control::status(control);
        if status.as_ref().is_ok_and(|status| status.state == state) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let why = status.map_or_else(|error| error.to_string(), |status| format!("state {}", status.state));
            return Err(io::Error::other(format!("the guest did not come up in {START_TIMEOUT:?}: {why}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}
