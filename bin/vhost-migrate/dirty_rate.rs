//! `vhost-migrate dirty-rate`: measures a guest's dirty rate by source and forecasts its migration.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use vhost_migrate::control::{self, ControlCommand, ControlEvent};
use vhost_migrate::dirty::LogQuality;
use vhost_migrate::guest::MeasuredRate;

use crate::progress::describe_inexact;
use crate::units::{self, format_bytes};
use crate::values;

/// Measure how fast a guest dirties memory, and forecast its migration
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  vhost-migrate dirty-rate --control guest.ctl --seconds 5
  vhost-migrate dirty-rate --control guest.ctl --seconds 5 --bandwidth 1GiB/s --downtime 50 --json

Each device is counted by its dirty log, and the CPUs by write-protected pages: what a device writes is in no page
table. A page that is written again within a tenth of a second counts once.")]
pub(crate) struct Arguments {
    /// Control socket of the process that owns the guest
    #[arg(long, value_name = "SOCKET", value_parser = values::socket_path())]
    control: PathBuf,
    /// Duration of the measurement, 0.01 to 3600 seconds
    #[arg(long, default_value = "1", value_parser = measured, value_name = "SECONDS")]
    seconds: Duration,
    /// Bandwidth for the forecast, in guest memory per second
    #[arg(long, value_parser = units::rate_limit, default_value = "1GiB/s", value_name = "RATE")]
    bandwidth: u64,
    /// Downtime limit for the forecast, for example 50ms; a number alone is milliseconds
    #[arg(long, default_value = "300ms", value_parser = units::milliseconds, value_name = "TIME")]
    downtime: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Parses the length of a measurement.
fn measured(text: &str) -> Result<Duration, String> {
    let range = Duration::from_millis(10)..=Duration::from_secs(3600);
    let time = units::seconds(text)?;
    if range.contains(&time) { Ok(time) } else { Err("measure for 0.01 to 3600 seconds".into()) }
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    let order = ControlCommand::DirtyRate {
        seconds: arguments.seconds.as_secs_f64(),
        bandwidth: arguments.bandwidth,
        downtime_ms: arguments.downtime,
    };
    let outcome = control::call(&arguments.control, &order, |event| {
        if arguments.json {
            println!("{event}");
        } else if let ControlEvent::DirtyRate(measured) = event {
            print(&measured);
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dirty-rate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(MeasuredRate { rate, bandwidth, forecast }: &MeasuredRate) {
    let line = |name: &str, pages: f64, bytes: f64, working_set: u64, quality: LogQuality| {
        let (bytes, working_set) = (format_bytes(bytes), format_bytes(working_set as f64));
        let quality = describe_inexact(quality);
        println!("{name:<24} {pages:>9.0} pages/s  {bytes:>10}/s  working set {working_set}{quality}");
    };
    line("guest", rate.pages_per_s, rate.bytes_per_s, rate.working_set_bytes, rate.log_quality);
    for source in &rate.sources {
        let name = format!("  {}", source.name);
        line(&name, source.pages_per_s, source.bytes_per_s, source.working_set_bytes, source.log_quality);
    }
    println!(
        "at {}/s it {}: {} rounds, {:.0} ms in all, downtime {:.1} ms, {} sent",
        format_bytes(*bandwidth as f64),
        if forecast.converges { "converges" } else { "does not converge" },
        forecast.rounds,
        forecast.total_ms,
        forecast.downtime_ms,
        format_bytes(forecast.bytes as f64)
    );
}
