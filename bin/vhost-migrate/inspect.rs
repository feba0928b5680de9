//! `vhost-migrate inspect`: prints the contents of a dirty log, an inflight region, the log of a VDUSE device or a
//! stream, or what the kernel has. The memory use is bounded for every file.

mod inflight;
mod kernel;
mod log;
mod stream;
mod vduse_log;

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;

use crate::units;

/// Print the contents of a dirty log, an inflight region, the log of a VDUSE device, or a saved stream; or list what the
/// kernel has
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate inspect log /proc/PID/fd/N         the shared log of a running back-end
  vhost-migrate inspect log saved.log --memory 4GiB
  vhost-migrate inspect inflight /proc/PID/fd/N --queues 2 --queue-size 256 --used 0:1234
  vhost-migrate inspect vduse-log /run/vhost-migrate/disk0
  vhost-migrate inspect kernel                     what this host has, and what is missing
  vhost-migrate inspect stream guest.vhm           every frame is checked, and that none is missing

Exit status: 0 if what was found can be true; 1 if not; 2 wrong arguments; 4 if nothing tells whether the file is a log.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: InspectCommand,
    /// Print one JSON object
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum InspectCommand {
    /// The pages marked in a dirty log: one bit for each 4 KiB of guest memory
    Log {
        /// The log's bytes
        file: PathBuf,
        /// Maximum number of runs of pages to list
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
        runs: u32,
        /// End of guest memory, including holes. The file is a log only if it reaches this address and marks no page
        /// beyond it
        #[arg(long, value_parser = units::nonzero_size, value_name = "SIZE")]
        memory: Option<u64>,
    },
    /// The requests in flight in a region, and what a restarted back-end would do
    Inflight {
        /// The region's bytes
        file: PathBuf,
        #[command(flatten)]
        region: inflight::RegionArguments,
    },
    /// The record of a VDUSE device and its requests in flight, from which a restarted process continues it
    VduseLog {
        /// The log
        file: PathBuf,
        /// Maximum number of requests to list, of all queues together
        #[arg(long, default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
        requests: u32,
    },
    /// The vhost devices of this kernel, VDUSE and the vDPA bus: what can log, what is missing and how to get it. Opens each
    /// device that no process uses; a vDPA device is reset by that
    Kernel,
    /// The frames of a migration saved to a file or device
    Stream {
        /// The stream
        file: PathBuf,
    },
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let lines = LinePrinter { quiet: arguments.json };
    let found = match &arguments.command {
        InspectCommand::Log { file, runs, memory } => log::inspect(file, *runs as usize, *memory, &lines),
        InspectCommand::Inflight { file, region } => inflight::inspect(file, region, &lines),
        InspectCommand::VduseLog { file, requests } => vduse_log::inspect(file, *requests, &lines),
        InspectCommand::Kernel => kernel::inspect(&lines),
        InspectCommand::Stream { file } => stream::inspect(file, &lines),
    };
    match found {
        Ok(found) => {
            if arguments.json {
                println!("{}", found.json);
            }
            if let Some(doubt) = found.doubt {
                eprintln!("inspect: {doubt}");
                return ExitCode::from(4);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("inspect: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Result of an inspection, apart from the lines already printed.
struct Inspection {
    json: Value,
    /// The reason why the file may be something else, if there is one.
    doubt: Option<String>,
}

impl From<Value> for Inspection {
    fn from(json: Value) -> Inspection {
        Inspection { json, doubt: None }
    }
}

/// Prints each line immediately, because a file may have any number of lines.
struct LinePrinter {
    quiet: bool,
}

impl LinePrinter {
    fn print(&self, line: std::fmt::Arguments<'_>) {
        if !self.quiet {
            println!("{line}");
        }
    }
}

/// Opens a file of finite size.
fn open(file: &Path) -> Result<File, String> {
    let with_path = |error| format!("{}: {error}", file.display());
    let open = File::open(file).map_err(with_path)?;
    if open.metadata().map_err(with_path)?.file_type().is_char_device() {
        return Err(format!("{}: this is a character device, which has no end", file.display()));
    }
    Ok(open)
}
