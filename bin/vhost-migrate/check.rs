//! `vhost-migrate check`: whether a running back-end keeps the rules.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use vhost_migrate::check::{Options, check};

/// Nothing could be checked.
const UNCHECKED: u8 = 3;

/// Check which rules a running vhost-user block back-end keeps
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate check /run/disk.sock
  vhost-migrate check /run/disk.sock --json
  vhost-migrate check disk.sock --hostile --restart 'vhost-migrate backend blk --socket disk.sock --image disk.img'
  vhost-migrate check /run/disk.sock --junit check.xml

The back-end must have no other front-end. Nothing is written to its disk without --write. The rules are those of docs/protocol.md;
docs/check.md explains what is done for each, and how to read what was found.

Exit status: 0 nothing is broken; 1 a rule is broken; 2 wrong arguments; 3 it could not be checked.")]
pub(crate) struct Arguments {
    /// The back-end's socket
    socket: PathBuf,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Write the findings as JUnit XML too
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Seconds that the back-end may take for any step
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// Entries of the ring, a power of two
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = queue_size)]
    queue_size: u16,
    /// Also send what must be refused; a back-end that is not up to it dies of it
    #[arg(long)]
    hostile: bool,
    /// Also write to the last MiB of the disk; what was there is put back
    #[arg(long)]
    write: bool,
    /// Simple shell command that starts the back-end: kill it with requests in flight, and see whether its successor
    /// answers each once. Without --kill-pid it is also started with this; what the check starts it also ends
    #[arg(long, value_name = "COMMAND")]
    restart: Option<String>,
    /// Process id of the running back-end, which may be killed
    #[arg(long, value_name = "PID", requires = "restart", value_parser = clap::value_parser!(i32).range(2..))]
    kill_pid: Option<i32>,
}

fn queue_size(text: &str) -> Result<u16, String> {
    let size = text.parse().ok().filter(|size: &u16| size.is_power_of_two() && (64..=1024).contains(size));
    size.ok_or_else(|| format!("'{text}' is not a power of two from 64 to 1024"))
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    match arguments.run() {
        Ok(true) => ExitCode::FAILURE,
        Ok(false) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-migrate: {error}");
            ExitCode::from(UNCHECKED)
        }
    }
}

impl Arguments {
    /// Whether something is broken.
    fn run(self) -> Result<bool, Box<dyn std::error::Error>> {
        let timeout = Duration::from_secs(self.timeout);
        let options = Options {
            timeout,
            queue_size: self.queue_size,
            hostile: self.hostile,
            write: self.write,
            restart: self.restart,
            kill_pid: self.kill_pid,
            ..Options::default()
        };
        let report = check(&self.socket, &options)?;
        if let Some(file) = &self.junit {
            std::fs::write(file, report.junit()).map_err(|error| format!("{}: {error}", file.display()))?;
        }
        match self.json {
            true => println!("{}", json!({"report": report, "rules": report.rules(), "broken": report.is_broken()})),
            false => println!("{report}"),
        }
        Ok(report.is_broken())
    }
}
