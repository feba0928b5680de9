//! `vhost-migrate demo`: everything at once, in real processes on this machine. A guest with a disk is live-migrated
//! from one process to another while it writes; with `--kill` its back-ends are killed on the way.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost_migrate::control::{self, Command};
use vhost_migrate::migrate::{Event, Report};

use crate::interrupt::on_interrupt;
use crate::migrate::Transfer;
use crate::progress::{Output, Progress};
use crate::units;

/// Live-migrate a built-in guest between two processes on this machine, checking every byte
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate demo
  vhost-migrate demo --memory 4GiB --dirty-rate 500MiB/s --codec zstd:1
  vhost-migrate demo --kill --json

Needs no root, and no files but a temporary folder. Exit status: 0 if every byte was right, 1 if not.")]
pub(crate) struct Arguments {
    /// Guest memory
    #[arg(long, default_value = "1GiB", value_parser = units::bytes, value_name = "SIZE")]
    memory: u64,
    /// Size of the guest's disk
    #[arg(long, default_value = "64MiB", value_parser = units::bytes, value_name = "SIZE")]
    disk: u64,
    /// How long the guest runs, before and after the migration together
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    seconds: f64,
    /// Memory the guest's CPUs write
    #[arg(long, default_value = "200MiB/s", value_parser = units::bytes, value_name = "RATE")]
    dirty_rate: u64,
    /// Packed rings instead of split ones
    #[arg(long)]
    packed: bool,
    /// Kill the back-end (SIGKILL) before, during and after the migration
    #[arg(long)]
    kill: bool,
    #[command(flatten)]
    transfer: Transfer,
    #[command(flatten)]
    output: Output,
}

/// Queues of the guest's disk.
const QUEUES: &str = "2";
/// Longest wait for a process to come up or to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    // The processes end with this one, and the folder is removed when they are gone.
    let stop = || {
        eprintln!("interrupted");
        std::process::exit(1);
    };
    if let Err(error) = on_interrupt(stop) {
        eprintln!("signals: {error}");
        return ExitCode::FAILURE;
    }
    match Demo::new(&arguments).and_then(|mut demo| demo.play()) {
        Ok(done) => {
            if arguments.output.json {
                println!("{done}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo failed: {error}");
            if arguments.output.json {
                println!("{}", json!({"event": "done", "verified": false, "message": error.to_string()}));
            }
            ExitCode::FAILURE
        }
    }
}

/// One side: a back-end and a guest's process, and where their sockets are.
struct Side {
    socket: PathBuf,
    control: PathBuf,
    backend: Option<Running>,
    guest: Option<Running>,
}

impl Side {
    fn new(folder: &Path, name: &str) -> Side {
        Side {
            socket: folder.join(format!("{name}.vhost")),
            control: folder.join(format!("{name}.control")),
            backend: None,
            guest: None,
        }
    }
}

struct Demo<'a> {
    arguments: &'a Arguments,
    folder: tempfile::TempDir,
    source: Side,
    destination: Side,
    progress: Progress,
    kills: u32,
}

impl<'a> Demo<'a> {
    fn new(arguments: &'a Arguments) -> io::Result<Demo<'a>> {
        let folder = tempfile::Builder::new().prefix("vhost-migrate-").tempdir()?;
        let (source, destination) = (Side::new(folder.path(), "source"), Side::new(folder.path(), "destination"));
        Ok(Demo { arguments, source, destination, progress: Progress::new(arguments.output), kills: 0, folder })
    }

    fn play(&mut self) -> io::Result<Value> {
        let begun = Instant::now();
        let image = self.folder.path().join("disk.img");
        std::fs::File::create(&image)?.set_len(self.arguments.disk)?;
        let incoming = format!("unix:{}", self.folder.path().join("migration").display());

        self.source.backend = Some(self.start_backend(&self.source.socket)?);
        self.destination.backend = Some(self.start_backend(&self.destination.socket)?);
        let rate = format!("{}", self.arguments.dirty_rate);
        let memory = format!("{}", self.arguments.memory);
        let mut workload = vec!["--memory", &memory, "--dirty-rate", &rate, "--queues", QUEUES];
        if self.arguments.packed {
            workload.push("--packed");
        }
        self.destination.guest = Some(start_guest(&self.destination, &["--incoming", &incoming])?);
        self.source.guest = Some(start_guest(&self.source, &workload)?);
        wait_for(&self.source.control, "running")?;
        self.progress.say(&format!("guest up after {:.1} s: it writes memory and disk, and checks", seconds(begun)));

        let each = Duration::from_secs_f64(self.arguments.seconds.max(0.2) / 2.0);
        self.run_guest(each, |demo| &mut demo.source)?;
        let report = self.migrate(&incoming)?;
        self.run_guest(each, |demo| &mut demo.destination)?;

        let status = self.verify()?;
        let kills = self.kills;
        self.progress.say(&format!(
            "verified: every byte of memory and disk is right after {} requests and {} killed back-ends, {} requests \
             resubmitted, 0 lost ({:.1} s in all)",
            status["requests"],
            kills,
            status["resubmitted"],
            seconds(begun)
        ));
        for side in [&self.source, &self.destination] {
            // The source's guest has ended by itself if the migration let it.
            let _ = control::call(&side.control, &Command::Quit, |_| ());
        }
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
            "requests": status["requests"],
            "lost": status["lost"],
            "resubmitted": status["resubmitted"],
            "reconnects": status["reconnects"],
            "kills": kills,
            "dirty_rate_bytes_per_s": report.dirty_rate_bytes_per_s,
        }))
    }

    /// Lets the guest of one side run, killing its back-end in the middle if asked.
    fn run_guest(&mut self, time: Duration, side: fn(&mut Self) -> &mut Side) -> io::Result<()> {
        std::thread::sleep(time / 2);
        if self.arguments.kill {
            self.kill_backend(side)?;
        }
        std::thread::sleep(time / 2);
        Ok(())
    }

    fn kill_backend(&mut self, side: fn(&mut Self) -> &mut Side) -> io::Result<()> {
        let socket = side(self).socket.clone();
        // Dropping the process kills it with SIGKILL and waits for its end.
        side(self).backend = None;
        let again = self.start_backend(&socket)?;
        side(self).backend = Some(again);
        self.kills += 1;
        self.progress.say("killed the back-end and started it again");
        Ok(())
    }

    fn migrate(&mut self, uri: &str) -> io::Result<Report> {
        let mut completed = None;
        let mut kill = if self.arguments.kill { Some(Ok(())) } else { None };
        let control = self.source.control.clone();
        let order = self.arguments.transfer.to(uri);
        control::call(&control, &order, |value| {
            self.progress.event(&value);
            match serde_json::from_value(value) {
                // In the middle of the migration: logging is on and most memory is still to be sent.
                Ok(Event::Progress { .. } | Event::Round(_)) if matches!(kill, Some(Ok(()))) => {
                    kill = self.kill_backend(|demo| &mut demo.source).err().map(Err);
                }
                Ok(Event::Completed(report)) => completed = Some(report),
                _ => {}
            }
        })?;
        if let Some(Err(error)) = kill {
            return Err(error);
        }
        completed.ok_or_else(|| io::Error::other("the migration ended without a report"))
    }

    fn verify(&self) -> io::Result<Value> {
        let mut status = Value::Null;
        control::call(&self.destination.control, &Command::Verify, |event| status = event)?;
        if status["lost"] != 0 {
            return Err(io::Error::other(format!("{} requests were lost", status["lost"])));
        }
        Ok(status)
    }

    fn start_backend(&self, socket: &Path) -> io::Result<Running> {
        let image = self.folder.path().join("disk.img");
        let arguments = ["backend", "blk", "--exit-with-parent", "--log-level", "warn", "--queues", QUEUES];
        let child = program()?.args(arguments).arg("--image").arg(image).arg("--socket").arg(socket).spawn()?;
        Ok(Running(child))
    }
}

/// A process that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_guest(side: &Side, more: &[&str]) -> io::Result<Running> {
    let mut process = program()?;
    process
        .args(["guest", "--exit-with-parent", "--log-level", "warn", "--backend"])
        .arg(&side.socket)
        .arg("--control")
        .arg(&side.control);
    Ok(Running(process.args(more).spawn()?))
}

fn program() -> io::Result<Process> {
    let mut process = Process::new(std::env::current_exe()?);
    process.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(process)
}

/// Waits until the guest behind a control socket is in `state`.
fn wait_for(control: &Path, state: &str) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut seen = Value::Null;
        let answer = control::call(control, &Command::Status, |event| seen = event["state"].clone());
        if answer.is_ok() && seen == state {
            return Ok(());
        }
        if Instant::now() > deadline {
            let why = answer.err().map_or_else(|| format!("state {seen}"), |error| error.to_string());
            return Err(io::Error::other(format!("the guest did not come up in {PATIENCE:?}: {why}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}
