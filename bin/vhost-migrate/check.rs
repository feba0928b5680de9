//! `vhost-migrate check`: checks a running vhost-user back-end.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use crossbeam::channel::RecvTimeoutError;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use vhost_migrate::check::{
    CheckError, CheckOptions, CheckProgress, CheckReport, DeviceKind, Explanation, FrameSource, Rule, StopToken,
    Verdict, check_with_progress, explain,
};
use vhost_migrate::inflight::RingKind;
use vhost_migrate::unstable::with_causes;

use crate::signals::{before_termination, interrupts_and_hangup};
use crate::values;

/// Exit status if nothing could be checked.
const NOT_CHECKED: u8 = 3;
/// Exit status with `--strict` for warnings without a failure.
const WARNINGS: u8 = 4;
/// Maximum time from a signal to the end of the check. Restoring changes takes less.
const STOPPING: Duration = Duration::from_secs(20);

/// Check a running vhost-user back-end against the rules of docs/protocol.md
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate check /run/disk.sock
  vhost-migrate check /run/disk.sock --json
  vhost-migrate check disk.sock --hostile --restart 'vhost-migrate backend blk --socket disk.sock --image disk.img'
  vhost-migrate check /run/disk.sock --junit check.xml
  vhost-migrate check /run/net.sock --frame-source tap0
  vhost-migrate check /run/disk.sock --only R3,L1
  vhost-migrate check --explain R3

The back-end must not have another front-end. Without options the check does nothing that is known
to crash back-ends, and does not write to the disk. docs/protocol.md has the rules; docs/check.md
describes the checks and the report.

Exit status: 0 no failure; 1 a rule failed; 2 wrong arguments; 3 the back-end could not be checked;
4 with --strict, warnings and no failure. SIGINT, SIGTERM and SIGHUP end the check within seconds,
after it has restored its changes.")]
pub(crate) struct Arguments {
    /// Socket of the back-end
    #[arg(required_unless_present = "explain", value_parser = values::socket_path())]
    socket: Option<PathBuf>,
    /// Print a rule, the consequence of a violation, and advice
    #[arg(long, value_name = "RULE", value_parser = Rule::from_str, exclusive = true)]
    explain: Option<Rule>,
    /// Check only these rules: for example R3,L1
    #[arg(long, value_name = "RULE,...", value_delimiter = ',', value_parser = Rule::from_str)]
    only: Vec<Rule>,
    /// Kind of the device, if it cannot be detected
    #[arg(long)]
    device: Option<DeviceArgument>,
    /// Check only rings of this format. Default: split rings, and packed rings if they are offered
    #[arg(long)]
    rings: Option<RingKindArgument>,
    /// Number of queue pairs that a network interface serves, if it reports more, as DPDK does
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    queue_pairs: Option<u16>,
    /// Source of incoming data. Network interface: 'loop' if it sends frames back, an interface of the host, or the
    /// socket of another vhost-user back-end whose frames arrive at this one. Vsock: the host's socket. Console: the
    /// TCP address of its input. Default: 'loop' if a frame returns
    #[arg(long, value_name = "loop|INTERFACE|SOCKET|tcp:HOST:PORT", value_parser = parse_frame_source)]
    frame_source: Option<FrameSource>,
    /// Exit with status 4 if there are warnings and no failures. Default: status 0
    #[arg(long)]
    strict: bool,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Also write the findings as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Maximum seconds for each step of the back-end
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// Ring size, a power of two from 64 to 1024. Default: 256, or the largest that the back-end accepts
    #[arg(long, value_name = "N", value_parser = values::queue_size(64, 1024))]
    queue_size: Option<u16>,
    /// Also run checks that some back-ends do not survive. Implied by --hostile and --restart
    #[arg(long)]
    may_kill: bool,
    /// Also send messages that must be refused. They may crash a faulty back-end
    #[arg(long)]
    hostile: bool,
    /// Also write to the last MiB of the disk. The old contents are restored
    #[arg(long)]
    write: bool,
    /// Simple shell command that starts the back-end. The check kills it with requests in flight, and verifies that the
    /// restarted back-end completes each request once. The check also starts it first, unless --kill-pid is given,
    /// whenever it exits with its front-end, and ends it at the end
    #[arg(long, value_name = "COMMAND", value_parser = NonEmptyStringValueParser::new())]
    restart: Option<String>,
    /// Process id of a running back-end, which the check may kill
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

/// Parses a frame source. A path contains a slash.
fn parse_frame_source(text: &str) -> Result<FrameSource, String> {
    match text {
        "" => Err("expected 'loop', an interface or a socket".into()),
        "loop" => Ok(FrameSource::Loop),
        path if path.contains('/') && !path.starts_with("tcp:") => Ok(FrameSource::Backend(path.into())),
        name => match name.strip_prefix("tcp:") {
            Some(address) => values::host_and_port(address).map(FrameSource::Tcp),
            None => Ok(FrameSource::Interface(name.into())),
        },
    }
}

fn cannot_write(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("cannot write the findings to {}: {error}", path.display())
}

/// Returns true if stdout is a terminal and NO_COLOR is not set.
fn has_colour_terminal() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    if let Some(rule) = arguments.explain {
        let explanation = explain(rule);
        let Explanation { consequence, meaning, remedy, .. } = explanation;
        let (text, broken) = (explanation.text(), consequence.description());
        // An error means that the reader has closed the pipe.
        let _ = writeln!(io::stdout(), "{text}\n\nIf broken: {broken}. {meaning}\n\nRemedy: {remedy}");
        return ExitCode::SUCCESS;
    }
    let (strict, stop) = (arguments.strict, StopToken::default());
    // The channel is disconnected at the end of the check.
    let (checking, checked) = crossbeam::channel::bounded::<()>(0);
    let stopping = stop.clone();
    let signals = before_termination(interrupts_and_hangup(), 2 * STOPPING, move |_| {
        stopping.set();
        if checked.recv_timeout(STOPPING) == Err(RecvTimeoutError::Timeout) {
            eprintln!(
                "vhost-migrate: the check did not end in time. The back-end may still run, and the end of its disk may have changed"
            );
        }
    });
    if let Err(error) = signals {
        eprintln!("vhost-migrate: signals: {error}");
        return ExitCode::from(NOT_CHECKED);
    }
    match arguments.run(stop) {
        Err(error) if matches!(error.downcast_ref(), Some(CheckError::Stopped { .. })) => {
            eprintln!("vhost-migrate: {}", with_causes(error.as_ref()));
            drop(checking);
            // The signal is about to end this process.
            std::thread::sleep(2 * STOPPING);
            ExitCode::from(NOT_CHECKED)
        }
        Ok(report) if report.has_failures() => ExitCode::FAILURE,
        Ok(report) if strict && report.count(Verdict::Warning) > 0 => ExitCode::from(WARNINGS),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-migrate: {}", with_causes(error.as_ref()));
            ExitCode::from(NOT_CHECKED)
        }
    }
}

impl Arguments {
    /// Runs the check and prints the report.
    fn run(self, stop: StopToken) -> Result<CheckReport, Box<dyn std::error::Error>> {
        let timeout = Duration::from_secs(self.timeout);
        let options = CheckOptions::default()
            .with_device(self.device.map(|device| match device {
                DeviceArgument::Blk => DeviceKind::Blk,
                DeviceArgument::Net => DeviceKind::Net,
                DeviceArgument::Rng => DeviceKind::Rng,
                DeviceArgument::Fs => DeviceKind::Fs,
                DeviceArgument::Vsock => DeviceKind::Vsock,
                DeviceArgument::Console => DeviceKind::Console,
            }))
            .with_rings(self.rings.map(|rings| match rings {
                RingKindArgument::Split => RingKind::Split,
                RingKindArgument::Packed => RingKind::Packed,
            }))
            .with_only(self.only)
            .with_pairs(self.queue_pairs)
            .with_frame_source(self.frame_source)
            .with_timeout(timeout)
            .with_queue_size(self.queue_size)
            .with_may_kill(self.may_kill)
            .with_hostile(self.hostile)
            .with_write(self.write)
            .with_restart(self.restart)
            .with_kill_pid(self.kill_pid)
            .with_stop(stop);
        // The file is created first, because an error after a long run would lose the findings.
        let junit = self.junit.map(|path| Ok::<_, String>((File::create(&path).map_err(cannot_write(&path))?, path)));
        let junit = junit.transpose()?;
        let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {wide_msg}");
        // The bar is shown only on a terminal.
        let bar = ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let socket = self.socket.unwrap_or_default();
        let report = check_with_progress(&socket, &options, &mut |step: &CheckProgress| {
            bar.set_length(step.all as u64);
            bar.set_position(step.done as u64);
            bar.set_message(format!("{} {} {}", step.rule, step.what, step.rings));
        });
        bar.finish_and_clear();
        let report = report?;
        // The file is written before the table, because printing may fail if the reader has closed the pipe.
        if let Some((mut file, path)) = junit {
            file.write_all(report.junit().as_bytes()).map_err(cannot_write(&path))?;
        }
        let printed = match self.json {
            true => json!({"report": report, "rules": report.rules(), "failed": report.has_failures()}).to_string(),
            false => report.text(has_colour_terminal()),
        };
        match writeln!(io::stdout(), "{printed}") {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(format!("cannot print the findings: {error}").into())
            }
            _ => Ok(report),
        }
    }
}
