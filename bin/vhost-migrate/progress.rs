//! Shows the events of a migration on a terminal or as JSON lines.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use vhost_migrate::control::ControlEvent;
use vhost_migrate::dirty::LogQuality;
use vhost_migrate::migrate::{MigrationEvent, MigrationReport};

use crate::units::format_bytes;

/// Arguments for the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub(crate) struct OutputArguments {
    /// Print events as JSON lines
    #[arg(long)]
    pub(crate) json: bool,
    /// Print nothing but errors
    #[arg(long, conflicts_with = "json")]
    pub(crate) quiet: bool,
}

/// Shows the progress of one migration.
pub(crate) struct Progress {
    output: OutputArguments,
    bar: ProgressBar,
    left: u64,
}

impl Progress {
    /// Creates a progress display. It shows nothing before the first event.
    pub(crate) fn new(output: OutputArguments) -> Progress {
        Progress { output, bar: ProgressBar::hidden(), left: 0 }
    }

    /// Shows one event of the guest's process.
    pub(crate) fn event(&mut self, event: &ControlEvent) {
        if self.output.json {
            println!("{event}");
        } else if !self.output.quiet
            && let ControlEvent::Migration(event) = event
        {
            self.show(event);
        }
    }

    /// Prints a line of text between events, except with JSON or quiet output.
    pub(crate) fn print_line(&self, text: &str) {
        if !self.output.json && !self.output.quiet {
            self.bar.suspend(|| println!("{text}"));
        }
    }

    fn show(&mut self, event: &MigrationEvent) {
        match event {
            MigrationEvent::Started { guest_bytes, channels, codec, log_quality } => {
                let style = ProgressStyle::with_template("{spinner} {prefix} [{bar:30}] {msg}");
                self.bar = ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                self.bar.enable_steady_tick(Duration::from_millis(120));
                self.bar.set_prefix("round 0");
                let guest = format_bytes(*guest_bytes as f64);
                let quality = describe_inexact(*log_quality);
                self.print_line(&format!(
                    "migrating {guest} of guest memory, {channels} channels, codec {codec}{quality}"
                ));
            }
            MigrationEvent::Progress { round, pages_left, bytes_per_second, .. } => {
                self.left = self.left.max(*pages_left);
                self.bar.set_prefix(format!("round {round}"));
                self.bar.set_length(self.left.max(1));
                self.bar.set_position(self.left - pages_left);
                self.bar.set_message(format!("{pages_left} pages left, {}/s", format_bytes(*bytes_per_second)));
            }
            MigrationEvent::Round(round) => {
                let rate = round.wire_bytes as f64 / (round.ms / 1000.0).max(1e-6);
                self.print_line(&format!(
                    "round {:>2}: {:>7} pages and {:>7} zero pages in {:>7.1} ms ({}/s); {} left, dirtied {}/s, \
                     expected downtime {:.1} ms",
                    round.round,
                    round.data_pages,
                    round.zero_pages,
                    round.ms,
                    format_bytes(rate),
                    round.pages_left,
                    format_bytes(round.dirty_bytes_per_second),
                    round.expected_downtime_ms,
                ));
                self.left = 0;
            }
            MigrationEvent::Stalled { message } => self.print_line(&format!("stalled: {message}")),
            MigrationEvent::Waiting { message } => {
                self.print_line(&format!("waiting, the guest keeps running here: {message}"))
            }
            MigrationEvent::Warning { message } => self.print_line(&format!("warning: {message}")),
            MigrationEvent::Switchover { pages_left, expected_downtime_ms } => {
                self.print_line(&format!(
                    "stopping the guest: {pages_left} pages left, expect {expected_downtime_ms:.1} ms"
                ));
            }
            MigrationEvent::Completed(report) => {
                self.bar.finish_and_clear();
                println!("{}", summary(report));
            }
            // The caller reports it with the exit status.
            _ => self.bar.finish_and_clear(),
        }
    }
}

/// Returns a text about the quality of a dirty log, empty if the log is exact.
pub(crate) fn describe_inexact(quality: LogQuality) -> String {
    if quality == LogQuality::Exact { String::new() } else { format!(", dirty log {quality}") }
}

fn summary(report: &MigrationReport) -> String {
    let seen = report.observed_downtime_ms.map_or(String::new(), |ms| format!(", {ms:.1} ms seen by the guest"));
    format!(
        "migrated in {:.0} ms: {} rounds, downtime {:.1} ms{seen}; {} pages ({} zero), {} on the wire for {} of guest",
        report.total_ms,
        report.rounds,
        report.downtime_ms,
        report.pages_sent,
        report.zero_pages,
        format_bytes(report.wire_bytes as f64),
        format_bytes(report.guest_bytes as f64),
    )
}
