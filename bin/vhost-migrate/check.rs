//! `vhost-migrate check`: whether a running back-end keeps the rules.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use crossbeam::channel::RecvTimeoutError;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use vhost_migrate::check::{
    CheckError, CheckOptions, CheckProgress, CheckReport, DeviceKind, Explanation, FrameSource, StopToken, Verdict,
    check_with_progress, explain, rule,
};
use vhost_migrate::inflight::RingKind;

use crate::signals::{before_termination, interrupts_and_hangup};
use crate::values;

/// Nothing could be checked.
const UNCHECKED: u8 = 3;
/// With `--strict`: nothing is broken, but there are warnings.
const WARNED: u8 = 4;
/// The longest time from a signal to the end. What the check has to put back takes less.
const STOPPING: Duration = Duration::from_secs(20);

/// Check which rules a running vhost-user back-end keeps
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate check /run/disk.sock
  vhost-migrate check /run/disk.sock --json
  vhost-migrate check disk.sock --hostile --restart 'vhost-migrate backend blk --socket disk.sock --image disk.img'
  vhost-migrate check /run/disk.sock --junit check.xml
  vhost-migrate check /run/net.sock --frame-source tap0
  vhost-migrate check /run/disk.sock --only R3,L1
  vhost-migrate check --explain R3

The back-end must have no other front-end. Without options nothing is done that back-ends are known to die of, and nothing is
written to the disk. The rules are those of docs/protocol.md;
docs/check.md explains what is done for each, and how to read what was found.

Exit status: 0 nothing is broken; 1 a rule is broken; 2 wrong arguments; 3 it could not be checked; 4 with --strict, nothing is
broken, but there are warnings. SIGINT, SIGTERM and SIGHUP end it within seconds, after it has put back what it has changed.")]
pub(crate) struct Arguments {
    /// The back-end's socket
    #[arg(required_unless_present = "explain", value_parser = values::socket_path())]
    socket: Option<PathBuf>,
    /// Print a rule, what it is for and what to do when it is broken
    #[arg(long, value_name = "RULE", value_parser = explained, exclusive = true)]
    explain: Option<Explanation>,
    /// Check only these rules, by their ids in docs/protocol.md: for example R3,L1
    #[arg(long, value_name = "RULE,...", value_delimiter = ',', value_parser = known)]
    only: Vec<&'static str>,
    /// The kind of the device, where its answers do not tell
    #[arg(long)]
    device: Option<DeviceArgument>,
    /// Check only on these rings; else on split ones, and on packed ones if they are offered
    #[arg(long)]
    rings: Option<RingKindArgument>,
    /// Queue pairs that a network interface serves, if fewer than it says, as with DPDK
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    queue_pairs: Option<u16>,
    /// The source of what comes in. For a network interface: 'loop' if it sends back what it is sent, an interface of the host,
    /// or the socket of another vhost-user back-end whose frames arrive at this one. To vsock: the socket of the host's side.
    /// To a console: the address that it is typed at. Without it a loop is tried
    #[arg(long, value_name = "loop|INTERFACE|SOCKET|tcp:HOST:PORT", value_parser = frame_source)]
    frame_source: Option<FrameSource>,
    /// Warnings have an exit status of their own, 4, if nothing is broken; else they are 0
    #[arg(long)]
    strict: bool,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Write the findings as JUnit XML too
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Seconds that the back-end may take for any step
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// Entries of the ring, a power of two from 64 to 1024; without it 256, or as many as the back-end takes
    #[arg(long, value_name = "N", value_parser = values::queue_size(64, 1024))]
    queue_size: Option<u16>,
    /// The back-end may die: also make the checks that some back-ends do not survive. --hostile and --restart imply it
    #[arg(long)]
    may_kill: bool,
    /// Also send what must be refused; a back-end that is not up to it dies of it
    #[arg(long)]
    hostile: bool,
    /// Also write to the last MiB of the disk; what was there is put back
    #[arg(long)]
    write: bool,
    /// Simple shell command that starts the back-end: kill it with requests in flight, and see whether its successor
    /// answers each once. Without --kill-pid it is also started with this; what the check starts it also ends. One that ends
    /// with its front-end is started again each time
    #[arg(long, value_name = "COMMAND", value_parser = NonEmptyStringValueParser::new())]
    restart: Option<String>,
    /// Process id of the running back-end, which may be killed
    #[arg(long, value_name = "PID", requires = "restart", value_parser = clap::value_parser!(i32).range(2..))]
    kill_pid: Option<i32>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum DeviceArgument {
    Blk,
    Net,
    Rng,
    Fs,
    Vsock,
    Console,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum RingKindArgument {
    Split,
    Packed,
}

fn known(id: &str) -> Result<&'static str, String> {
    rule(id).map_err(|error| error.to_string())
}

fn explained(id: &str) -> Result<Explanation, String> {
    explain(id).map_err(|error| error.to_string())
}

/// A path has a slash in it.
fn frame_source(text: &str) -> Result<FrameSource, String> {
    match text {
        "" => Err("give 'loop', an interface or a socket".into()),
        "loop" => Ok(FrameSource::Loop),
        path if path.contains('/') && !path.starts_with("tcp:") => Ok(FrameSource::Backend(path.into())),
        name => match name.strip_prefix("tcp:") {
            Some(address) => values::host_and_port(address).map(FrameSource::Tcp),
            None => Ok(FrameSource::Interface(name.into())),
        },
    }
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("can't write the findings to {}: {error}", path.display())
}

/// Returns true if what is printed goes to a terminal whose user has nothing against colours (NO_COLOR).
fn wants_colours() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    if let Some(explanation) = &arguments.explain {
        let Explanation { consequence, meaning, remedy, .. } = explanation;
        let (text, broken) = (explanation.text(), consequence.description());
        // The reader may have gone.
        let _ = writeln!(io::stdout(), "{text}\n\nIf broken: {broken}. {meaning}\n\nRemedy: {remedy}");
        return ExitCode::SUCCESS;
    }
    let (strict, stop) = (arguments.strict, StopToken::default());
    // Disconnected when the check has ended.
    let (checking, checked) = crossbeam::channel::bounded::<()>(0);
    let stopping = stop.clone();
    let signals = before_termination(interrupts_and_hangup(), 2 * STOPPING, move |_| {
        stopping.set();
        if checked.recv_timeout(STOPPING) == Err(RecvTimeoutError::Timeout) {
            eprintln!(
                "vhost-migrate: the check does not end: the back-end may run on, and the end of its disk be overwritten"
            );
        }
    });
    if let Err(error) = signals {
        eprintln!("vhost-migrate: signals: {error}");
        return ExitCode::from(UNCHECKED);
    }
    match arguments.run(stop) {
        Err(error) if matches!(error.downcast_ref(), Some(CheckError::Stopped { .. })) => {
            eprintln!("vhost-migrate: {error}");
            drop(checking);
            // The signal is about to end this process.
            std::thread::sleep(2 * STOPPING);
            ExitCode::from(UNCHECKED)
        }
        Ok(report) if report.has_failures() => ExitCode::FAILURE,
        Ok(report) if strict && report.count(Verdict::Warning) > 0 => ExitCode::from(WARNED),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-migrate: {error}");
            ExitCode::from(UNCHECKED)
        }
    }
}

impl Arguments {
    /// Checks, and tells what was found.
    fn run(self, stop: StopToken) -> Result<CheckReport, Box<dyn std::error::Error>> {
        let timeout = Duration::from_secs(self.timeout);
        let options = CheckOptions {
            device: self.device.map(|device| match device {
                DeviceArgument::Blk => DeviceKind::Blk,
                DeviceArgument::Net => DeviceKind::Net,
                DeviceArgument::Rng => DeviceKind::Rng,
                DeviceArgument::Fs => DeviceKind::Fs,
                DeviceArgument::Vsock => DeviceKind::Vsock,
                DeviceArgument::Console => DeviceKind::Console,
            }),
            rings: self.rings.map(|rings| match rings {
                RingKindArgument::Split => RingKind::Split,
                RingKindArgument::Packed => RingKind::Packed,
            }),
            only: self.only,
            pairs: self.queue_pairs,
            frame_source: self.frame_source,
            timeout,
            queue_size: self.queue_size,
            may_kill: self.may_kill,
            hostile: self.hostile,
            write: self.write,
            restart: self.restart,
            kill_pid: self.kill_pid,
            stop,
            ..CheckOptions::default()
        };
        // Before a long run, whose findings would be lost.
        let junit = self.junit.map(|path| Ok::<_, String>((File::create(&path).map_err(unwritable(&path))?, path)));
        let junit = junit.transpose()?;
        let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {wide_msg}");
        // On a terminal only.
        let bar = ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let socket = self.socket.unwrap_or_default();
        let report = check_with_progress(&socket, &options, &mut |step: &CheckProgress| {
            bar.set_length(step.all as u64);
            bar.set_position(step.done as u64);
            bar.set_message(format!("{} {} {}", step.rule, step.what, step.rings));
        });
        bar.finish_and_clear();
        let report = report?;
        // Before what may be cut short: whoever reads the table may have gone.
        if let Some((mut file, path)) = junit {
            file.write_all(report.junit().as_bytes()).map_err(unwritable(&path))?;
        }
        let printed = match self.json {
            true => json!({"report": report, "rules": report.rules(), "failed": report.has_failures()}).to_string(),
            false => report.text(wants_colours()),
        };
        match writeln!(io::stdout(), "{printed}") {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(format!("can't print the findings: {error}").into())
            }
            _ => Ok(report),
        }
    }
}
